"""Every exchange is gated on fresh evidence and leaves a receipt whose outcome is true."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
from h2.settings import SettingCodes

from appliance.errors import InternalError, Malformed
from appliance.rats.binding import check_inclusion
from appliance.serving.auth import hash_key
from appliance.web.http2 import BUFFER_BYTES
from appliance.web.stream import PART_BYTES
from appliance.wire.canonical import parse_json_object
from appliance.wire.commitments import gpu_evidence_digest, request_commitment
from appliance.wire.encoding import decode_base64
from appliance.wire.evidence import GpuEvidence
from appliance.wire.merkle import root_of
from appliance.wire.output import output_of_answer, output_of_stream
from appliance.wire.receipt import (
    EventLog,
    forwarded_bytes,
    forwarded_hash,
    parse_receipt,
    read_events,
    verify_signature,
)
from appliance.wire.report import parse_report
from tests.integration.appliance import (
    MODEL,
    QUESTION,
    RawConnection,
    RunningAppliance,
    Sections,
    start_appliance,
)
from tests.integration.test_life import slow_chat
from tests.integration.wire import FrameWire, Wire
from tests.processes import collectors

CHAT = "/v1/chat/completions"
MAX_BYTES = 1 << 20


async def receipt_of(
    appliance: RunningAppliance, receipt_id: str, **headers: str
) -> httpx2.Response:
    async with appliance.client(headers=headers) as client:
        return await client.get(f"/v1/aci/receipts/{receipt_id}")


async def checked(
    appliance: RunningAppliance, response_id: str, request: bytes, answer: bytes
) -> EventLog:
    """Fetch a receipt and hold it against what was sent, what came, and the epoch's evidence."""
    async with appliance.client() as client:
        response = await client.get(f"/v1/aci/receipts/{response_id}")
        assert response.status_code == 200, response.text
        report = parse_report((await client.get("/v1/aci/attestation")).content)
        receipt = parse_receipt(response.content)
        # The receipt key is the one that the CPU quote binds.
        verify_signature(receipt.document, report.keyset.receipt_keys[0])
        assert receipt.keyset_digest == report.keyset_digest
        log = read_events(receipt)
        # What was asked and what was answered, byte for byte.
        assert log.received.body_hash == hashlib.sha256(request).digest()
        assert log.returned.body_hash == hashlib.sha256(answer).digest()
        assert log.ended.bytes == len(answer)
        # The commitment is in an epoch, and the epoch's reports carry its nonce.
        commitment = request_commitment(
            receipt.receipt_id,
            receipt.endpoint,
            client_nonce=log.committed.client_nonce,
            body_sha256=log.received.body_hash,
            blind=log.committed.blind,
        )
        assert commitment == log.committed.commitment
        if log.admission is not None:
            inclusion = log.admission.inclusion
            check_inclusion(inclusion, commitment, receipt.keyset_digest)
            digest = f"sha256:{log.admission.evidence_digest.hex()}"
            epoch = (await client.get(f"/v1/dcv/epochs/{digest}")).json()
            gpus = [
                GpuEvidence(
                    "simulated",
                    decode_base64(one["report_b64"], field="r", max_bytes=MAX_BYTES),
                    decode_base64(one["cert_chain_b64"], field="c", max_bytes=MAX_BYTES),
                )
                for one in epoch["gpus"]
            ]
            assert gpu_evidence_digest(gpus) == log.admission.evidence_digest
            assert gpus[0].report[4:36] == inclusion.nonce
        # What the engine got follows from what was asked.
        if log.forwarded is not None:
            assert log.engine is not None
            bodies = [forwarded_bytes(request, rewrite) for rewrite in log.engine.rewrite]
            assert forwarded_hash(bodies) == log.forwarded.body_hash
        return log


def body(**more: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": QUESTION, "seed": 7, **more}).encode()


@pytest.mark.parametrize("choices", [1, 3])
async def test_a_stream_and_a_whole_answer_have_receipts_with_one_output_digest(
    appliance: RunningAppliance, choices: int
) -> None:
    whole, streamed = body(n=choices), body(n=choices, stream=True)
    async with appliance.client() as client:
        first = await client.post(CHAT, content=whole)
        second = await client.post(CHAT, content=streamed)
    one = await checked(appliance, first.headers["x-receipt-id"], whole, first.content)
    two = await checked(appliance, second.headers["x-receipt-id"], streamed, second.content)
    assert (one.ended.outcome, two.ended.outcome) == ("complete", "complete")
    assert one.output is not None
    assert two.output is not None
    answer = output_of_answer(first.json(), max_bytes=MAX_BYTES)
    events = output_of_stream(second.content, max_bytes=MAX_BYTES)
    assert answer.digest == one.output.output_digest
    assert events.digest == two.output.output_digest
    assert one.output.output_digest == two.output.output_digest
    assert len(one.output.finish_reasons) == choices
    assert one.engine is not None
    assert (one.engine.seed, len(one.engine.rewrite)) == (7, choices)
    assert await checked(appliance, first.json()["id"], whole, first.content) == one


async def test_what_the_engine_got_is_what_the_receipt_says(appliance: RunningAppliance) -> None:
    request = body(tee=False, user="me", stream=True)
    async with appliance.client() as client:
        response = await client.post(CHAT, content=request)
    log = await checked(appliance, response.headers["x-receipt-id"], request, response.content)
    assert log.forwarded is not None
    seen = (await appliance.engine_seen())[-1]
    assert log.engine is not None
    assert seen == parse_json_object(
        forwarded_bytes(request, log.engine.rewrite[0]), max_nesting=64
    )


async def test_a_nonce_of_the_clients_is_in_the_commitment(appliance: RunningAppliance) -> None:
    request = body()
    async with appliance.client(headers={"X-DCV-Nonce": "ab" * 32}) as client:
        response = await client.post(CHAT, content=request)
    log = await checked(appliance, response.headers["x-receipt-id"], request, response.content)
    assert log.committed.client_nonce == bytes.fromhex("ab" * 32)


async def test_requests_that_wait_together_share_one_report(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    sections: Sections = {"attestation": {"simulated_latency_s": 0.3}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    ids: list[str] = []

    async def ask() -> None:
        async with appliance.client() as client:
            response = await client.post(CHAT, content=body())
        assert response.status_code == 200
        ids.append(response.headers["x-receipt-id"])

    async with trio.open_nursery() as requests:
        for _ in range(16):
            requests.start_soon(ask)
    sizes = []
    for receipt_id in ids:
        log = read_events(parse_receipt((await receipt_of(appliance, receipt_id)).content))
        assert log.admission is not None
        inclusion = log.admission.inclusion
        assert inclusion.leaf_index is not None
        assert inclusion.path is not None
        root = root_of(
            log.committed.commitment, inclusion.leaf_index, inclusion.tree_size, inclusion.path
        )
        assert root == inclusion.root
        sizes.append(inclusion.tree_size)
    assert len({*sizes}) <= 4
    assert max(sizes) >= 4


async def test_earlier_evidence_is_used_only_under_its_name_and_the_receipt_says_so(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    sections: Sections = {"attestation": {"unsafe_max_evidence_age_s": 60.0}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    digests = set()
    for _ in range(2):
        async with appliance.client() as client:
            response = await client.post(CHAT, content=body())
        data = (await receipt_of(appliance, response.headers["x-receipt-id"])).content
        admission = read_events(parse_receipt(data)).admission
        assert admission is not None
        assert (admission.inclusion.leaf_index, admission.inclusion.path) == (None, None)
        digests.add(admission.evidence_digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("request_body", "status", "code"),
    [
        (b"not json", 400, "malformed"),
        (b'{"model": "another", "messages": []}', 400, "invalid_request"),
        (json.dumps({"model": "another", "messages": QUESTION}).encode(), 404, "model_not_found"),
        (body(priority=1), 400, "unknown_parameter"),
        (body(n=99), 400, "invalid_request"),
    ],
    ids=["garbage", "no messages", "another model", "refused key", "too many choices"],
)
async def test_a_refusal_after_the_body_has_a_receipt_that_says_refused(
    appliance: RunningAppliance, request_body: bytes, status: int, code: str
) -> None:
    async with appliance.client() as client:
        response = await client.post(CHAT, content=request_body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    log = await checked(appliance, response.headers["x-receipt-id"], request_body, response.content)
    assert (log.ended.outcome, log.ended.code) == ("refused", code)
    assert (log.admission, log.forwarded, log.output) == (None, None, None)


async def test_a_nonce_out_of_form_is_refused_with_a_receipt(appliance: RunningAppliance) -> None:
    async with appliance.client(headers={"X-DCV-Nonce": "short"}) as client:
        response = await client.post(CHAT, content=body())
    assert response.status_code == 400
    log = await checked(appliance, response.headers["x-receipt-id"], body(), response.content)
    assert log.ended.outcome == "refused"


async def test_no_key_leaves_no_receipt_and_another_keys_is_not_found(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    keys = [{"name": name, "sha256": hash_key(name)} for name in ("alice", "bob")]
    sections: Sections = {"auth": {"mode": "keys", "keys": keys}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    async with appliance.client() as client:
        nobody = await client.post(CHAT, content=body())
        assert nobody.status_code == 401
        assert "x-receipt-id" not in nobody.headers
        alice = {"Authorization": "Bearer alice"}
        answer = await client.post(CHAT, content=body(), headers=alice)
    receipt_id = answer.headers["x-receipt-id"]
    assert (await receipt_of(appliance, receipt_id)).status_code == 401
    assert (await receipt_of(appliance, "unknown")).status_code == 401
    mine = await receipt_of(appliance, receipt_id, Authorization="Bearer alice")
    theirs = await receipt_of(appliance, receipt_id, Authorization="Bearer bob")
    assert (mine.status_code, theirs.status_code) == (200, 404)
    assert theirs.json()["error"]["code"] == "not_found"
    digest = mine.json()["event_log"][2]["evidence_digest"]
    async with appliance.client(headers={"Authorization": "Bearer bob"}) as client:
        assert (await client.get(f"/v1/dcv/epochs/{digest}")).status_code == 404


async def test_while_it_runs_there_is_no_receipt_and_a_client_that_leaves_is_said_to(
    appliance: RunningAppliance,
) -> None:
    request = slow_chat()
    async with RawConnection.open(appliance) as running:
        await running.post(CHAT, request)
        await running.read_some(1)
        receipt_id = await _open_receipt(appliance)
        assert (await receipt_of(appliance, receipt_id)).status_code == 404
    log = await _receipt_when_there(appliance, receipt_id)
    assert (log.ended.outcome, log.ended.code, log.output) == ("client_disconnected", None, None)
    assert log.ended.bytes > 0
    assert log.received.body_hash == hashlib.sha256(request).digest()


async def _open_receipt(appliance: RunningAppliance) -> str:
    """Of the one exchange that runs: from its engine request's id, which is the answer's."""
    return str((await appliance.engine_seen())[-1]["rid"])


async def _receipt_when_there(appliance: RunningAppliance, identifier: str) -> EventLog:
    with trio.fail_after(10):
        while True:
            response = await receipt_of(appliance, identifier)
            if response.status_code == 200:
                return read_events(parse_receipt(response.content))
            await trio.sleep(0.05)


@pytest.mark.parametrize(
    ("what", "outcome", "codes"),
    [
        # The stream breaks off a moment before or after the engine's exit is noticed.
        ("engine", "engine_failed", {"engine_died", "engine_failed"}),
        ("collector", "withdrawn", {"attester_unavailable"}),
        ("drain", "drained", {"not_serving"}),
    ],
    ids=["engine", "collector", "drain"],
)
async def test_a_stream_that_ends_badly_has_a_receipt_whose_outcome_is_true(
    tmp_path: Path, what: str, outcome: str, codes: set[str]
) -> None:
    """Found after a restart of the service, on whose state folder it was written."""
    request = slow_chat()
    async with trio.open_nursery() as nursery:
        sections: Sections = {"limits": {"drain_s": 0.2}}
        appliance = await start_appliance(nursery, tmp_path, sections=sections)
        async with RawConnection.open(appliance) as running:
            await running.post(CHAT, request)
            first = await running.read_some(1)
            identifier = await _open_receipt(appliance)
            match what:
                case "engine":
                    ready = [x for x in appliance.log_lines if x["event"] == "engine_ready"]
                    os.kill(ready[0]["pid"], signal.SIGKILL)
                case "collector":
                    [pid] = collectors()
                    os.kill(pid, signal.SIGKILL)
                case _:
                    os.kill(os.getpid(), signal.SIGTERM)
            response = await running.read_response()
        assert not response.clean
        with trio.fail_after(20):
            await appliance.ended.wait()
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        again = await start_appliance(nursery, tmp_path)
        log = await _receipt_when_there(again, identifier)
        # The keyset it cites, which was another one, is still there to be verified with.
        receipt = parse_receipt((await receipt_of(again, identifier)).content)
        async with again.client() as client:
            found = await client.get(f"/v1/dcv/reports/sha256:{receipt.keyset_digest.hex()}")
        verify_signature(receipt.document, parse_report(found.content).keyset.receipt_keys[0])
        nursery.cancel_scope.cancel()
    assert log.ended.outcome == outcome
    assert log.ended.code in codes
    assert log.returned.body_hash == hashlib.sha256(first + response.body).digest()
    assert log.output is None


@pytest.mark.parametrize("what", ["engine", "drain"])
async def test_whoever_waits_for_evidence_at_the_end_is_refused_and_never_forwarded(
    tmp_path: Path, what: str
) -> None:
    """The connection was once cut without an answer and the client blamed for it; and where the
    evidence came before that, the prompt was forwarded by an appliance that no longer served."""
    sections: Sections = {
        "limits": {"drain_s": 0.2},
        "attestation": {"simulated_latency_s": 1.5, "interval_s": 600.0},
    }
    answers: list[httpx2.Response] = []
    async with trio.open_nursery() as nursery:
        appliance = await start_appliance(nursery, tmp_path, sections=sections)

        async def ask(request: bytes) -> None:
            async with appliance.client() as client:
                answers.append(await client.post(CHAT, content=request))

        async with trio.open_nursery() as requests, appliance.client() as client:
            for request in (body(), body(stream=True)):
                requests.start_soon(ask, request)
            while (await client.get("/health")).json()["running"] < 2:
                await trio.sleep(0.02)
            if what == "engine":
                [ready] = [x for x in appliance.log_lines if x["event"] == "engine_ready"]
                os.kill(ready["pid"], signal.SIGKILL)
            else:
                os.kill(os.getpid(), signal.SIGTERM)
        with trio.fail_after(20):
            await appliance.ended.wait()
        nursery.cancel_scope.cancel()
    assert [one.status_code for one in answers] == [503, 503]
    async with trio.open_nursery() as nursery:
        again = await start_appliance(nursery, tmp_path)
        for answer in answers:
            log = await _receipt_when_there(again, answer.headers["x-receipt-id"])
            assert (log.ended.outcome, log.ended.code) == (
                "refused",
                answer.json()["error"]["code"],
            )
            assert log.returned.body_hash == hashlib.sha256(answer.content).digest()
            assert (log.admission, log.forwarded) == (None, None)
        nursery.cancel_scope.cancel()
    codes = {one.json()["error"]["code"] for one in answers}
    assert codes == {"engine_died" if what == "engine" else "not_serving"}


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/2"])
async def test_a_whole_answer_that_is_not_read_is_not_said_to_be_delivered(
    nursery: trio.Nursery, tmp_path: Path, protocol: str
) -> None:
    """Its receipt once said complete, with all its bytes, before one of them was written."""
    sections: Sections = {"limits": {"write_s": 0.5, "max_choices": 32}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    if protocol == "HTTP/1.1":
        # Some megabytes, so that the kernel's buffers do not take all of it.
        words = {"max_tokens": 800, "ignore_eos": True, "logprobs": True, "top_logprobs": 5}
        request = body(n=32, **words)
        async with Wire.open(appliance, receive_bytes=4096) as wire:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(request)}\r\n\r\n"
            await wire.send(head.encode() + request)
            head = (await wire.read_until(b"\r\n\r\n")).decode().lower()
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            log = await _receipt_when_there(appliance, fields["x-receipt-id"])
    else:
        async with FrameWire.open(appliance) as frames:
            await frames.greet({SettingCodes.INITIAL_WINDOW_SIZE: 10})
            await frames.send_frames(*frames.post(1, CHAT, body()))
            fields = await frames.headers(1)
            log = await _receipt_when_there(appliance, fields["x-receipt-id"])
    assert (log.ended.outcome, log.ended.code) == ("client_disconnected", None)
    length = int(fields["content-length"])
    if protocol == "HTTP/1.1":
        assert log.ended.bytes in range(0, length, PART_BYTES)
    else:  # it waits for the client's window, in our buffer
        assert log.ended.bytes == length <= BUFFER_BYTES
    assert log.output is None
    assert not {"application_error", "request_defect"} & {x["event"] for x in appliance.log_lines}


async def test_a_second_sigterm_ends_at_once_and_loses_no_receipt(tmp_path: Path) -> None:
    """It ended the store together with the exchanges, whose receipts came too late."""
    async with trio.open_nursery() as nursery:
        sections: Sections = {"limits": {"drain_s": 60.0}}
        appliance = await start_appliance(nursery, tmp_path, sections=sections)
        async with AsyncExitStack() as clients:
            identifiers = []
            running = [
                await clients.enter_async_context(RawConnection.open(appliance)) for _ in range(4)
            ]
            for one in running:
                await one.post(CHAT, slow_chat())
                await one.read_some(1)
                identifiers.append(await _open_receipt(appliance))
            os.kill(os.getpid(), signal.SIGTERM)
            await trio.sleep(0.2)
            assert not appliance.ended.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            with trio.fail_after(20):
                await appliance.ended.wait()
        nursery.cancel_scope.cancel()
    assert appliance.result == [None]
    async with trio.open_nursery() as nursery:
        again = await start_appliance(nursery, tmp_path)
        logs = [await _receipt_when_there(again, one) for one in identifiers]
        nursery.cancel_scope.cancel()
    assert {(log.ended.outcome, log.ended.code) for log in logs} == {("drained", "not_serving")}


async def test_a_defect_of_ours_in_mid_stream_is_not_said_to_be_the_clients_leaving(
    tmp_path: Path,
) -> None:
    """It was: whatever ended the server cancelled its requests, as a client's leaving does."""
    broken: list[bool] = []

    def random(size: int) -> bytes:
        """Re-attestation asks for two bytes, and nobody else."""
        if broken and size == 2:
            raise KeyError(size)
        return secrets.token_bytes(size)

    async with trio.open_nursery() as nursery:
        sections: Sections = {"attestation": {"interval_s": 0.2}}
        appliance = await start_appliance(nursery, tmp_path, sections=sections, random=random)
        async with RawConnection.open(appliance) as running:
            await running.post(CHAT, slow_chat())
            await running.read_some(1)
            identifier = await _open_receipt(appliance)
            broken.append(True)
            assert not (await running.read_response()).clean
        with trio.fail_after(20):
            await appliance.ended.wait()
        nursery.cancel_scope.cancel()
    assert isinstance(appliance.result[0], InternalError)
    async with trio.open_nursery() as nursery:
        again = await start_appliance(nursery, tmp_path)
        log = await _receipt_when_there(again, identifier)
        nursery.cancel_scope.cancel()
    assert (log.ended.outcome, log.ended.code) == ("refused", "internal_error")
    assert log.forwarded is not None
    assert log.ended.bytes > 0
    assert log.output is None


async def test_a_disk_that_hangs_is_503_in_time_and_answers_go_on(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    stalled, goes_on = threading.Event(), threading.Event()

    def clock() -> float:
        """Stands still for whoever writes receipts, in the thread that touches the disk."""
        if stalled.is_set() and threading.current_thread() is not threading.main_thread():
            goes_on.wait(60)
        return time.time()

    sections: Sections = {"attestation": {"interval_s": 600.0}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections, wall_clock=clock)
    answers: list[httpx2.Response] = []

    async def ask(path: str) -> None:
        async with appliance.client() as client:
            answers.append(await client.get(path))

    stalled.set()
    try:
        assert (await appliance.chat()).status_code == 200
        async with trio.open_nursery() as askers:
            for path in ("aci/receipts/" + "0" * 32, "dcv/epochs/sha256:" + "0" * 64):
                askers.start_soon(ask, "/v1/" + path)
            askers.start_soon(ask, "/v1/dcv/reports/sha256:" + "0" * 64)
        assert (await appliance.chat()).status_code == 200
    finally:
        goes_on.set()
    assert [one.status_code for one in answers] == [503] * 3
    assert {one.json()["error"]["code"] for one in answers} == {"overloaded"}
    assert {one.headers["retry-after"] for one in answers} == {"5"}


async def test_a_flipped_byte_of_a_receipt_does_not_verify(appliance: RunningAppliance) -> None:
    async with appliance.client() as client:
        response = await client.post(CHAT, content=body())
        report = parse_report((await client.get("/v1/aci/attestation")).content)
    data = (await receipt_of(appliance, response.headers["x-receipt-id"])).content
    key = report.keyset.receipt_keys[0]
    verify_signature(parse_receipt(data).document, key)
    for place in range(0, len(data), 97):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(Exception, match=r".") as refused:
            verify_signature(parse_receipt(bytes(changed)).document, key)
        assert isinstance(refused.value, Malformed) or refused.value.code == "unauthentic"  # type: ignore[attr-defined]
