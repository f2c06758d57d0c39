"""`dcv chat`, `dcv verify` and `dcv receipt verify` against a real appliance: real processes, real
TLS, and real people in between."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
import trustme

from appliance.errors import Unbound
from appliance.serving.auth import hash_key
from appliance.verifier.session import pinned_client
from appliance.verifier.tls import PinnedContext, spki_of
from tests.integration.appliance import MODEL, QUESTION, RunningAppliance, Sections, start_appliance
from tests.integration.test_attestation import POLICY, checks

PROMPT = "Tell nobody: the cat is called Schroedinger."
EXIT = {"affirming": 0, "contraindicated": 1, None: 2, "warning": 3}


@dataclass
class Done:
    status: int
    out: str
    err: str


async def dcv(*arguments: str, stdin: bytes = b"") -> Done:
    with trio.fail_after(60):
        done = await trio.run_process(
            [sys.executable, "-m", "appliance", *arguments],
            stdin=stdin,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


async def chat(url: str, folder: Path, *more: str, stdin: bytes = b"") -> Done:
    return await dcv("chat", url, "--policy", str(policy(folder)), *more, stdin=stdin)


async def verdict_on(*arguments: str, folder: Path) -> dict[str, Any]:
    done = await dcv(*arguments, "--json", "--policy", str(policy(folder)))
    outcome: dict[str, Any] = json.loads(done.out)
    assert done.status == EXIT[outcome["verdict"]]
    return outcome


def policy(folder: Path) -> Path:
    path = folder / "policy.toml"
    path.write_text(POLICY)
    return path


# --------------------------------------------------------------------------------------- dcv chat


async def test_an_answer_is_streamed_verified_and_verifies_again_from_its_bundle(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle.json"
    async with trio.open_nursery() as life:
        appliance = await start_appliance(life, tmp_path)
        done = await chat(
            appliance.url, tmp_path, "--save", str(bundle), "--with-content", "-", stdin=b"Hello?"
        )
        seen = (await appliance.engine_seen())[-1]
        life.cancel_scope.cancel()
    assert done.status == 3, done.err
    assert seen["messages"][0]["content"] == "Hello?"
    assert done.err.startswith("warning: complete, model stand-in, receipt ")
    saved = await verdict_on("verify", str(bundle), folder=tmp_path)
    assert saved["verdict"] == "warning"
    receipt = saved["claims"]["submods"]["receipt"]
    assert receipt["outcome"] == "complete"
    assert receipt["receipt_id"] in done.err
    # The bundle has the bytes of both, and what was printed is what they say.
    assert not {check for check in checks(saved) if check.startswith("receipt.")}
    assert "admission GPU-0" in receipt["submods"]
    # As of when, and by whose word.
    at = saved["claims"]["at"]
    assert (at["source"], at["word_of"]) == ("receipt", "the appliance")
    assert at["time"] == receipt["served_at"]["time"]
    same = await verdict_on("receipt", "verify", str(bundle), folder=tmp_path)
    assert same == saved
    late = await verdict_on("verify", str(bundle), "--at", "2040-01-01T00:00:00Z", folder=tmp_path)
    assert late["error"]["code"] == "stale"


async def test_without_content_the_bundle_holds_none_and_says_what_was_not_compared(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle.json"
    done = await chat(appliance.url, tmp_path, "--save", str(bundle), PROMPT)
    assert done.status == 3, done.err
    document = json.loads(bundle.read_text())
    assert (document["request_b64"], document["response_b64"]) == (None, None)
    assert "Schroedinger" not in bundle.read_text()
    saved = await verdict_on("verify", str(bundle), folder=tmp_path)
    assert {"receipt.request", "receipt.response"} <= set(checks(saved))
    for name in ("receipt", "epochs"):
        without = tmp_path / "without.json"
        without.write_text(json.dumps(document | {name: [] if name == "epochs" else None}))
        outcome = await verdict_on("verify", str(without), folder=tmp_path)
        expected = "warning" if name == "epochs" else "contraindicated"
        assert outcome["verdict"] == expected


async def test_an_appliance_that_the_policy_refuses_gets_no_prompt(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    before = len(await appliance.engine_seen())
    done = await dcv("chat", appliance.url, PROMPT)
    assert done.status == 1
    assert (done.out, len(await appliance.engine_seen())) == ("", before)
    assert "simulated" in done.err
    other = POLICY + f'models = ["sha256:{"0" * 64}"]\n'
    (tmp_path / "other.toml").write_text(other)
    done = await dcv("chat", appliance.url, "--policy", str(tmp_path / "other.toml"), PROMPT)
    assert done.status == 1
    assert (done.out, len(await appliance.engine_seen())) == ("", before)


async def test_a_key_is_read_from_a_file_and_a_refusal_is_told(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    keys = [{"name": "alice", "sha256": hash_key("alice")}]
    sections: Sections = {"auth": {"mode": "keys", "keys": keys}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    key = tmp_path / "key"
    key.write_text("alice\n")
    done = await chat(appliance.url, tmp_path, "--api-key-file", str(key), PROMPT)
    assert done.status == 3, done.err
    refused = await chat(appliance.url, tmp_path, PROMPT)
    assert refused.status == 2
    assert "HTTP 401" in refused.err
    # Refused with a receipt: the exchange verifies, and is no answer.
    unknown = await chat(
        appliance.url, tmp_path, "--api-key-file", str(key), "--model", "another", PROMPT
    )
    assert unknown.status == 3
    assert "HTTP 404" in unknown.err
    assert "warning: refused" in unknown.err


async def test_an_answer_that_breaks_off_is_told_and_its_receipt_says_so(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(nursery, tmp_path)
    await appliance.engine_control({"set": {"error_event": None}})
    done = await chat(appliance.url, tmp_path, PROMPT)
    assert done.status == 3, done.err
    assert "warning: engine_failed" in done.err
    assert "receipt.outcome" in done.err


async def test_an_answer_that_takes_too_long_is_given_up_and_not_taken_for_checked(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    done = await chat(appliance.url, tmp_path, "--within", "2", "[[mode:hang_stream:3]] Go on")
    assert done.status == 2, done.err
    found = re.search(r"within\s+2\s+s;\s+its\s+receipt\s+is\s+(\w{32})", done.err)
    assert found is not None, done.err
    assert done.out  # what came of it was shown
    async with appliance.client() as client:
        with trio.fail_after(60):
            while (receipt := await client.get(f"/v1/aci/receipts/{found[1]}")).status_code == 404:
                await trio.sleep(0.05)
    [ended] = [one for one in receipt.json()["event_log"] if one["type"] == "dcv.ended"]
    assert ended["outcome"] == "client_disconnected"
    refused = await chat(appliance.url, tmp_path, "--within", "soon", PROMPT)
    assert refused.status == 2
    assert "expected seconds" in refused.err


async def test_on_a_terminal_it_is_said_what_is_waited_for(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "appliance", "chat", appliance.url, PROMPT]
    command += ["--policy", str(policy(tmp_path))]
    ours, its = os.openpty()
    read = bytearray()

    def watch() -> None:
        with suppress(OSError):  # the terminal's other end was closed
            while part := os.read(ours, 4096):
                read.extend(part)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, watch)
            try:
                done = await trio.run_process(
                    command,
                    capture_stdout=True,
                    stderr=its,
                    env=os.environ | {"TERM": "xterm", "COLUMNS": "200"},
                    check=False,
                )
            finally:
                os.close(its)
    os.close(ours)
    said = read.decode()
    assert done.returncode == 3
    assert f"verifying {appliance.url}" in said
    assert "warning: complete" in said
    assert b"verifying" not in done.stdout


# ------------------------------------------------------------------------------- who is in between


@dataclass
class Between:
    """Somebody in between, with a valid certificate.

    Attributes:
        intercepts: whether the connection of this number is his.
        read: what he could read of what clients said.
    """

    port: int
    authority: trustme.CA
    intercepts: Callable[[int], bool]
    connections: int = 0
    read: bytearray = field(default_factory=bytearray)
    open: set[trio.SocketStream] = field(default_factory=set)

    def drop(self) -> None:
        """End every connection, so that the next request needs another."""
        for stream in self.open:
            with suppress(OSError):  # it has gone by itself
                stream.socket.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context


@asynccontextmanager
async def between(
    appliance: RunningAppliance, intercepts: Callable[[int], bool]
) -> AsyncIterator[Between]:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    he = Between(listener.socket.getsockname()[1], authority, intercepts)

    async def pump(source: trio.abc.Stream, sink: trio.abc.Stream, seen: bytearray | None) -> None:
        try:
            while data := await source.receive_some(65536):
                if seen is not None:
                    seen += data
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def relay(stream: trio.SocketStream) -> None:
        number, he.connections = he.connections, he.connections + 1
        he.open.add(stream)
        try:
            await hand_on(stream, number)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # who would not talk to him
        finally:
            he.open.discard(stream)

    async def hand_on(stream: trio.SocketStream, number: int) -> None:
        if he.intercepts(number):
            outside: trio.abc.Stream = trio.SSLStream(
                stream, context, server_side=True, https_compatible=True
            )
            inside: trio.abc.Stream = await trio.open_ssl_over_tcp_stream(
                "127.0.0.1", appliance.port, ssl_context=appliance.trust, https_compatible=True
            )
            seen = he.read
        else:
            outside = stream
            inside = await trio.open_tcp_stream("127.0.0.1", appliance.port)
            seen = None
        async with outside, inside, trio.open_nursery() as both:
            both.start_soon(pump, outside, inside, seen)
            await pump(inside, outside, None)
            both.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, relay, [listener]))
        yield he
        nursery.cancel_scope.cancel()


async def test_somebody_in_between_reads_a_plain_clients_prompt_and_not_a_verified_ones(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    async with between(appliance, lambda _: True) as he:
        async with httpx2.AsyncClient(verify=he.trust, timeout=20) as fooled:
            answer = await fooled.post(
                f"{he.url}/v1/chat/completions", json={"model": MODEL, "messages": QUESTION}
            )
        assert answer.status_code == 200
        assert QUESTION[0]["content"].encode() in he.read
        he.read.clear()
        done = await chat(he.url, tmp_path, PROMPT)
    assert (done.status, done.out) == (1, "")
    assert "somebody stands between" in done.err
    assert b"GET /v1/aci/attestation" in he.read
    assert b"Schroedinger" not in he.read
    assert b"POST" not in he.read


async def test_a_tls_key_that_changes_after_the_report_gets_not_even_a_request_line(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    """He lets the report pass, and steps in for the prompt."""
    before = len(await appliance.engine_seen())
    async with between(appliance, lambda number: number > 0) as he:
        done = await chat(he.url, tmp_path, PROMPT)
    assert (done.status, done.out) == (1, "")
    assert "somebody stands between" in done.err
    assert he.connections == 2
    assert he.read == b""
    assert len(await appliance.engine_seen()) == before


async def test_somebody_who_only_hands_bytes_on_is_none_of_our_business(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    async with between(appliance, lambda _: False) as he:
        done = await chat(he.url, tmp_path, PROMPT)
    assert done.status == 3, done.err
    assert he.read == b""


async def test_a_pinned_connection_ends_at_its_key_or_sends_nothing(
    appliance: RunningAppliance,
) -> None:
    where = ("127.0.0.1", appliance.port)
    pem = await trio.to_thread.run_sync(ssl.get_server_certificate, where)
    spki = spki_of(ssl.PEM_cert_to_DER_cert(pem))
    async with pinned_client(appliance.url, [spki], read_s=20) as client:
        assert (await client.get("/health")).status_code == 200
    async with pinned_client(appliance.url, [b"\x00" * 32], read_s=20) as client:
        with pytest.raises(Unbound, match="somebody stands between"):
            await client.get("/health")

    def synchronous(pin: bytes) -> int:
        with httpx2.Client(verify=PinnedContext.to(pin), trust_env=False) as client:
            return client.get(f"{appliance.url}/health").status_code

    assert await trio.to_thread.run_sync(synchronous, spki) == 200
    with pytest.raises(Unbound, match="somebody stands between"):
        await trio.to_thread.run_sync(synchronous, b"\x00" * 32)


# ----------------------------------------------------------------------------- dcv receipt verify


async def test_a_bare_receipt_verifies_with_the_null_form_report_of_its_keyset(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    request = json.dumps({"model": MODEL, "messages": QUESTION}).encode()
    names = ("receipt", "report", "epoch", "request", "response")
    files = {name: tmp_path / f"{name}.json" for name in names}
    async with appliance.client() as client:
        answer = await client.post("/v1/chat/completions", content=request)
        receipt = await client.get(f"/v1/aci/receipts/{answer.headers['x-receipt-id']}")
        document = receipt.json()
        digest = document["workload_keyset_digest"]
        files["report"].write_bytes((await client.get(f"/v1/dcv/reports/{digest}")).content)
        epoch = document["event_log"][2]["evidence_digest"]
        files["epoch"].write_bytes((await client.get(f"/v1/dcv/epochs/{epoch}")).content)
    files["receipt"].write_bytes(receipt.content)
    files["request"].write_bytes(request)
    files["response"].write_bytes(answer.content)
    beside = [
        word for name in names[1:] for word in (f"--{name}", str(files[name])) if name in files
    ]
    command = ("receipt", "verify", str(files["receipt"]))
    whole = await verdict_on(*command, *beside, folder=tmp_path)
    assert whole["verdict"] == "warning"
    assert not {check for check in checks(whole) if check.startswith("receipt.")}
    less = await verdict_on(*command, *beside[:2], folder=tmp_path)
    assert {"receipt.request", "receipt.response", "receipt.admission_evidence"} <= {*checks(less)}
    # Another answer's bytes, and a receipt with one word changed.
    files["response"].write_bytes(answer.content + b" ")
    other = await verdict_on(*command, *beside, folder=tmp_path)
    assert (other["verdict"], other["error"]["code"]) == ("contraindicated", "unbound")
    files["receipt"].write_text(json.dumps(document | {"model": "another"}))
    forged = await verdict_on(*command, *beside[:2], folder=tmp_path)
    assert (forged["verdict"], forged["error"]["code"]) == ("contraindicated", "unauthentic")


async def test_a_receipt_without_a_report_is_not_checked(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    answer = await appliance.chat()
    async with appliance.client() as client:
        receipt = await client.get(f"/v1/aci/receipts/{answer.headers['x-receipt-id']}")
    (tmp_path / "receipt.json").write_bytes(receipt.content)
    outcome = await verdict_on("receipt", "verify", str(tmp_path / "receipt.json"), folder=tmp_path)
    assert outcome["verdict"] is None
    assert "--report" in outcome["error"]["message"]


async def test_what_is_given_beside_a_bundle_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    """`dcv receipt verify BUNDLE --request WRONG` once ended as if it had been compared."""
    bundle = tmp_path / "bundle.json"
    bundle.write_text('{"type": "bundle"}')
    options = ("--report", "--request", "--response", "--epoch")
    beside = [word for option in options for word in (option, str(bundle))]
    command = ("receipt", "verify", str(bundle), *beside, "--nonce", "00" * 32)
    outcome = await verdict_on(*command, folder=tmp_path)
    assert outcome["verdict"] is None
    assert all(option in outcome["error"]["message"] for option in (*options, "--nonce"))
