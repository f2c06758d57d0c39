"""Answers that prove themselves: checkpoints and completion evidence over real TLS, read by the
openai package and held to receipt, epochs and report by the relying party's own check."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from appliance.config import Policy
from appliance.endorsements.anchors import load_anchors, load_simulated_anchors
from appliance.rats.checkpoints import check_cut_stream
from appliance.rats.exchange import Exchange
from appliance.rats.result import AttestationResult
from appliance.verifier.bundle import Bundle
from appliance.verifier.check import Rules, check, fetch
from appliance.wire.canonical import parse_json_object
from appliance.wire.checkpoint import checkpoint_of_answer, find_checkpoints
from appliance.wire.encoding import format_sha256
from appliance.wire.epoch import parse_epoch
from appliance.wire.receipt import EventLog, Receipt, parse_receipt, read_events
from appliance.wire.sse import DONE_EVENT, PING_LINE
from tests.integration.appliance import (
    MODEL,
    QUESTION,
    RawConnection,
    RunningAppliance,
    Sections,
    start_appliance,
)
from tests.processes import collectors

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RULES = Rules(
    Policy(tee_types=("unsafe_simulated",), gpus="unsafe_simulated"),
    load_simulated_anchors(load_anchors()),
    None,
)
EVERYTHING: Any = {"include_usage": True, "include_receipt": True, "include_checkpoints": True}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
PATIENCE_S = 30.0


def body(**more: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": QUESTION, "seed": 7, **more}).encode()


def prompted(prompt: str, **more: Any) -> bytes:
    return body(messages=[{"role": "user", "content": prompt}], **more)


async def receipt_of(appliance: RunningAppliance, identifier: str) -> Receipt:
    """As soon as it is there."""
    async with appliance.client() as client:
        with trio.fail_after(PATIENCE_S):
            while True:
                response = await client.get(f"/v1/aci/receipts/{identifier}")
                if response.status_code == 200:
                    return parse_receipt(response.content)
                await trio.sleep(0.05)


async def log_of(appliance: RunningAppliance, response: httpx2.Response) -> EventLog:
    return read_events(await receipt_of(appliance, response.headers["x-receipt-id"]))


async def report_of(appliance: RunningAppliance) -> Bundle:
    return await fetch(appliance.url, os.urandom(32), now=datetime.datetime.now(datetime.UTC))


async def verified(
    appliance: RunningAppliance, request: bytes, response: httpx2.Response
) -> AttestationResult:
    """What a relying party finds on an exchange, all ten steps."""
    bundle = await report_of(appliance)
    receipt = await receipt_of(appliance, response.headers["x-receipt-id"])
    log = read_events(receipt)
    epochs = []
    async with appliance.client() as client:
        for event in (log.admission, log.completion):
            if event is not None:
                digest = format_sha256(event.evidence_digest)
                epochs.append(parse_epoch((await client.get(f"/v1/dcv/epochs/{digest}")).content))
    exchange = Exchange(receipt, tuple(epochs), request, response.content)
    whole = Bundle(
        bundle.url, bundle.fetched_at, bundle.nonce, bundle.spki_sha256, bundle.report, exchange
    )
    result = check(whole, RULES, at=datetime.datetime.now(datetime.UTC))
    part = result.submods["receipt"]
    assert [finding.check for finding in part.findings] == []
    return part


# --------------------------------------------------------------------------- the openai package


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_the_openai_package_reads_every_chat(
    nursery: trio.Nursery, tmp_path: Path, n: int, split: bool
) -> None:
    sections: Sections = {
        "limits": {"checkpoint_s": 0.02, "heartbeat_s": 0.05},
        "attestation": {"simulated_latency_s": 0.1},
    }
    modes = ("split:3",) if split else ()
    appliance = await start_appliance(nursery, tmp_path, sections=sections, modes=modes)
    async with appliance.async_openai() as client:
        await read_chats(client, n)


async def read_chats(client: Any, n: int) -> None:
    question: Any = [{"role": "user", "content": "[[mode:slow:5]] Where does the moon go?"}]
    asked: Any = {"model": MODEL, "messages": question, "n": n, "seed": 7}
    plain = await client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in plain.choices]
    for tee in (False, True):
        more = {"tee": tee}
        answer = await client.chat.completions.create(
            **asked, extra_body={**more, "stream_options": {"include_receipt": True}}
        )
        assert [choice.message.content for choice in answer.choices] == texts
        assert answer.model_extra is not None
        assert answer.model_extra["dcv"]["final"] is True
        assert ("attestation" in answer.model_extra) == tee
        joined = [""] * n
        last = None
        stream = await client.chat.completions.create(
            **asked, stream=True, stream_options=EVERYTHING, extra_body=more
        )
        async for chunk in stream:
            last = chunk
            for choice in chunk.choices:
                joined[choice.index] += choice.delta.content or ""
        assert joined == texts
        assert last is not None
        assert last.model_extra is not None
        assert (last.choices, last.object) == ([], "chat.completion.chunk")
        assert last.model_extra["dcv"]["receipt_id"] == stream.response.headers["x-receipt-id"]
        assert ("resolved_model" in last.model_extra) == tee
        if n > 1:  # the package's helper wants the first chunk of all to be of choice 0
            continue
        async with client.chat.completions.stream(
            **asked, stream_options=EVERYTHING, extra_body=more
        ) as events:
            final = await events.get_final_completion()
        assert [choice.message.content for choice in final.choices] == texts
        assert final.usage is not None


async def test_the_openai_package_reads_every_completion_and_tool_call(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    sections: Sections = {
        "limits": {"checkpoint_s": 0.02},
        "engine": {"tool_call_parser": "pythonic"},
    }
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    async with appliance.async_openai() as client:
        await read_completions(client)
        await read_tool_calls(client)


async def read_completions(client: Any) -> None:
    asked: Any = {"model": MODEL, "prompt": ["One [[mode:slow:5]]", "Two"], "n": 2, "seed": 7}
    plain = await client.completions.create(**asked)
    answer = await client.completions.create(**asked, extra_body={"tee": True})
    assert [one.text for one in answer.choices] == [one.text for one in plain.choices]
    assert "dcv" in (answer.model_extra or {})
    joined = [""] * 4
    extra = None
    stream = await client.completions.create(
        **asked, stream=True, extra_body={"stream_options": EVERYTHING, "tee": True}
    )
    async for chunk in stream:
        extra = chunk.model_extra
        for choice in chunk.choices:
            joined[choice.index] += choice.text
    assert joined == [one.text for one in plain.choices]
    assert extra is not None
    assert extra["attestation"]["verified"] is True


async def read_tool_calls(client: Any) -> None:
    question: Any = [{"role": "user", "content": "[[tool]] What of Paris?"}]
    with_tools: Any = {"model": MODEL, "messages": question, "tools": TOOLS, "seed": 7}
    calls = (await client.chat.completions.create(**with_tools)).choices[0].message.tool_calls
    async with client.chat.completions.stream(
        **with_tools, stream_options=EVERYTHING, extra_body={"tee": True}
    ) as events:
        final = await events.get_final_completion()
    assert calls is not None
    [call] = final.choices[0].message.tool_calls or []
    assert call.function.arguments == calls[0].function.arguments


# ------------------------------------------------------------------------------ what is proven

ASKED: list[dict[str, Any]] = [
    {},
    {"tee": True},
    {"stream_options": {"include_receipt": True}},
    {"stream": True},
    {"stream": True, "tee": True},
    {"stream": True, "stream_options": {"include_receipt": True}},
    {"stream": True, "stream_options": {"include_checkpoints": True}},
    {"stream": True, "stream_options": EVERYTHING, "tee": True},
]


@pytest.mark.parametrize("n", [1, 3])
async def test_every_answer_verifies_and_says_the_same_whatever_was_asked(
    nursery: trio.Nursery, tmp_path: Path, n: int
) -> None:
    sections: Sections = {"limits": {"checkpoint_s": 0.03}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    digests = set[str]()
    for asked in ASKED:
        request = prompted("[[mode:slow:8]] Go on", n=n, **asked)
        async with appliance.client() as client:
            response = await client.post(CHAT, content=request)
        part = await verified(appliance, request, response)
        digests.add(str(part.claims["output_digest"]))
        options = asked.get("stream_options", {})
        tee, at_end = "tee" in asked, "tee" in asked or "include_receipt" in options
        count = part.claims["checkpoints"]
        assert isinstance(count, int)
        if "include_checkpoints" in options:
            assert count >= 1 + at_end
        else:
            assert count == at_end
        assert ("completion GPU-0" in part.submods) == tee
        assert ("completion_evidence_digest" in part.claims) == tee
        if not asked.keys() - {"stream"}:
            assert b"dcv" not in response.content
    assert len(digests) == 1


async def test_tee_adds_the_original_shape_which_the_device_verifies(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(nursery, tmp_path)
    async with appliance.client() as client:
        for request, query in ((body(tee=True), ""), (body(), "?tee=true")):
            response = await client.post(CHAT + query, content=request)
            answer = response.json()
            attestation = answer["attestation"]
            assert attestation.keys() == {
                "raw",
                "nonce",
                "evidences",
                "claims",
                "eat",
                "verified",
                "inclusion",
            }
            assert answer["resolved_model"].keys() == {"id", "revision", "digest"}
            checkpoint = checkpoint_of_answer(parse_json_object(response.content, max_nesting=64))
            assert checkpoint is not None
            assert checkpoint.core.prefix_bytes is None
            assert attestation["raw"].encode() == checkpoint.raw
            log = await log_of(appliance, response)
            assert log.completion == checkpoint.completion
            assert log.completion is not None
            assert log.admission is not None
            assert log.completion.evidence_digest != log.admission.evidence_digest
            names = ("evidences", "nonce", "inclusion", "raw")
            shown = {name: attestation[name] for name in names}
            shown["keyset_digest"] = response.headers["x-aci-keyset-digest"]
            verdict = (await client.post("/v1/dcv/attestation/verify", json=shown)).json()
            assert verdict["verified"] is True
            assert not [one for one in verdict["findings"] if "presented" in one["check"]]
            shown["raw"] = shown["raw"].replace('"seq":0', '"seq":1')
            verdict = (await client.post("/v1/dcv/attestation/verify", json=shown)).json()
            assert (verdict["verified"], verdict["error"]["code"]) == (False, "unbound")


async def test_a_plain_clients_bytes_are_those_of_an_asking_one_without_what_was_added(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    sections: Sections = {
        "limits": {"checkpoint_s": 0.02, "heartbeat_s": 0.1},
        "attestation": {"simulated_latency_s": 0.25},
    }
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    asking = {"tee": True, "stream_options": {"include_receipt": True, "include_checkpoints": True}}
    prompt = "[[mode:slow:5]] Go on"
    contents = []
    for more in ({}, asking):
        async with appliance.client() as client:
            response = await client.post(CHAT, content=prompted(prompt, stream=True, **more))
        contents.append(response.content)
    plain, asked = contents
    added = list(find_checkpoints(asked))
    assert len(added) > 2
    assert asked[added[-1].start or 0 :].startswith(PING_LINE)  # heartbeats of the second wait
    for one in reversed(added):
        assert one.start is not None
        asked = asked[: one.start] + asked[one.end :]
    own = re.compile(rb'"id":"chatcmpl-\w+"|"created":\d+')
    assert own.sub(b"", plain) == own.sub(b"", asked)
    assert b"dcv" not in plain
    assert plain.endswith(DONE_EVENT)


async def test_a_cut_stream_is_proven_up_to_its_last_checkpoint(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    sections: Sections = {"limits": {"checkpoint_s": 0.1}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    request = prompted(
        "[[mode:slow:20]] Go on",
        stream=True,
        max_tokens=1000,
        ignore_eos=True,
        stream_options={"include_checkpoints": True},
    )
    bundle = await report_of(appliance)
    content = b""
    async with RawConnection.open(appliance) as connection:
        await connection.post(CHAT, request)
        with trio.fail_after(PATIENCE_S):
            while len(list(find_checkpoints(content))) < 3:
                content += await connection.read_some(1)
    last = check_cut_stream(content, report=bundle.report, request=request)
    assert last.core.seq >= 2
    size = last.core.prefix_bytes
    assert size is not None
    assert last.core.prefix_sha256 == hashlib.sha256(content[:size]).digest()
    log = read_events(await receipt_of(appliance, last.core.receipt_id))
    assert log.ended.outcome == "client_disconnected"
    assert log.admission == last.core.gpu


# ---------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("query", "more", "param"),
    [
        ("?tee=true&tee=true", {}, "tee"),
        ("?tee=yes", {}, "tee"),
        ("?tee=", {}, "tee"),
        ("?tee=false", {"tee": True}, "tee"),
        ("?tee=true", {"tee": False}, "tee"),
        ("", {"tee": "yes"}, "tee"),
        (
            "",
            {"stream_options": {"include_checkpoints": True}},
            "stream_options.include_checkpoints",
        ),
        (
            "",
            {"stream": True, "stream_options": {"include_receipt": 1}},
            "stream_options.include_receipt",
        ),
    ],
)
async def test_what_cannot_be_meant_is_a_clear_400(
    appliance: RunningAppliance, query: str, more: dict[str, Any], param: str
) -> None:
    async with appliance.client() as client:
        response = await client.post(CHAT + query, content=body(**more))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
    assert param.rpartition(".")[2] in error["message"]
    assert await appliance.engine_seen() == []
    log = await log_of(appliance, response)
    assert (log.ended.outcome, log.ended.code) == ("refused", "invalid_request")


# ------------------------------------------------------------------------------ when it goes wrong


async def while_it_answers(
    appliance: RunningAppliance, request: bytes, act: Callable[[], None]
) -> httpx2.Response:
    """Ask, and act once the engine is at work: between the admission and the completion."""
    responses: list[httpx2.Response] = []

    async def ask() -> None:
        async with appliance.client() as client:
            responses.append(await client.post(CHAT, content=request))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        with trio.fail_after(PATIENCE_S):
            while not await appliance.engine_seen():
                await trio.sleep(0.02)
        act()
    return responses[0]


async def test_a_whole_answer_without_completion_evidence_is_kept_back(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    sections: Sections = {"attestation": {"collect_s": 1.0}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    [collector] = collectors()
    request = prompted("[[mode:slow:100]] Go on", tee=True, max_tokens=8, ignore_eos=True)
    try:
        response = await while_it_answers(
            appliance, request, lambda: os.kill(collector, signal.SIGSTOP)
        )
    finally:
        os.kill(collector, signal.SIGCONT)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "attestation_failed"
    assert response.headers["x-should-retry"] == "false"
    log = await log_of(appliance, response)
    assert (log.ended.outcome, log.ended.code) == ("refused", "attestation_failed")
    assert log.forwarded is not None
    assert (log.output, log.completion) == (None, None)
    assert log.returned.body_hash == hashlib.sha256(response.content).digest()


async def test_a_drain_ends_a_whole_answers_wait_for_evidence(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    sections: Sections = {
        "attestation": {"simulated_latency_s": 4.0, "collect_s": 20.0},
        "limits": {"drain_s": 0.2},
    }
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    response = await while_it_answers(
        appliance, body(tee=True), lambda: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_serving")
    with trio.fail_after(PATIENCE_S):
        await appliance.ended.wait()


async def test_a_defect_of_ours_is_not_said_to_be_the_clients_leaving(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    """A source of randomness that fails once the request was understood: what the receipt needs of
    it has 16 and 32 bytes, a seed 7."""
    failing = False

    def random(size: int) -> bytes:
        if failing and size == 7:
            raise ZeroDivisionError("of a prompt")
        return os.urandom(size)

    appliance = await start_appliance(nursery, tmp_path, random=random)
    failing = True
    async with appliance.client() as client:
        response = await client.post(CHAT, content=body())
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "prompt" not in response.text
    log = await log_of(appliance, response)
    assert (log.ended.outcome, log.ended.code) == ("refused", "internal_error")
    assert log.returned.body_hash == hashlib.sha256(response.content).digest()
    assert log.ended.bytes == len(response.content)
    [defect] = [line for line in appliance.log_lines if line["event"] == "request_defect"]
    assert defect["error"] == "ZeroDivisionError"
    # The next request is served.
    failing = False
    assert (await appliance.chat()).status_code == 200
