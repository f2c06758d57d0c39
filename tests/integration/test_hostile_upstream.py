"""Who holds the appliance's TLS key and does not keep to HTTP: whatever comes, no verified client
takes it for an answer, none waits for ever, and the next honest answer is as good as ever."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import httpx2
import openai
import pytest
import trio

from appliance.errors import ApplianceError, VerificationIncomplete
from appliance.verifier import transport
from appliance.verifier.bundle import MAX_CONTENT_BYTES
from tests.integration.aftermath import aborted
from tests.integration.appliance import MODEL, RunningAppliance
from tests.integration.front import Answer, Front, honest
from tests.integration.proxies import proxy
from tests.integration.test_transport import (
    QUESTION,
    asked,
    asked_async,
    in_thread,
    lying,
    of_answers,
    streamed,
    streamed_async,
    verified,
    verified_async,
)
from tests.integration.test_verify_receipts import chat

WARNING = "--unsafe-accept-warning"
MALLORY = "Mallory was here"
REFUSED = (ApplianceError, openai.APIConnectionError, httpx2.RequestError)
"""Ours where something does not hold; the network's where it is no HTTP. Never an answer."""

Change: TypeAlias = Callable[[Answer], Answer]


def head(answer: Answer, *more: str, status: str = "200 OK") -> bytes:
    """A head like the answer's own."""
    kept = [f"{name}: {value}" for name, value in answer.headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *kept, *more, "", ""]).encode()


def sized(answer: Answer, size: int, body: bytes, *, clean: bool = True) -> Answer:
    raw = head(answer, f"content-length: {size}") + body
    return replace(answer, raw=raw, clean=clean)


def forged(answer: Answer) -> Answer:
    """The same head, above another answer."""
    text = json.dumps(MALLORY).encode()
    said = b'{"id":"x","object":"chat.completion","created":1,"model":"stand-in","choices":[{"index":0,'
    said += b'"finish_reason":"stop","message":{"role":"assistant","content":' + text + b"}}]}"
    if b"event-stream" in answer.headers["content-type"].encode():
        said = b'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"stand-in",'
        said += b'"choices":[{"index":0,"delta":{"content":' + text + b"}}]}\n\ndata: [DONE]\n\n"
    return answer.saying(said)


def two_in_one(answer: Answer) -> Answer:
    """A second answer at once, for a question that was not asked yet."""
    truth = sized(answer, len(answer.body), answer.body)
    other = forged(answer)
    assert truth.raw is not None
    return replace(truth, raw=truth.raw + (sized(other, len(other.body), other.body).raw or b""))


LIES: dict[str, Change] = {
    "it is shorter than it says": lambda one: sized(one, len(one.body) + 9, one.body, clean=False),
    "it is longer than it says": lambda one: sized(one, len(one.body) - 9, one.body),
    "it has two lengths": lambda one: replace(
        one, raw=head(one, "content-length: 5", "content-length: 6") + one.body
    ),
    "it has a length and chunks": lambda one: replace(
        one, raw=head(one, "content-length: 5", "transfer-encoding: chunked") + b"zz\r\n" + one.body
    ),
    "its transfer is coded": lambda one: replace(
        one, raw=head(one, "transfer-encoding: gzip, chunked") + one.body
    ),
    "a chunk has no size": lambda one: replace(
        one, raw=head(one, "transfer-encoding: chunked") + b"\r\n" + one.body
    ),
    "its head does not end": lambda one: replace(
        one, raw=head(one)[:-2] + b"X: ", endless=b"a" * 65_536
    ),
    "its heads do not end": lambda one: replace(
        one, raw=head(one)[:-2], endless=b"X-More: a\r\n" * 4096
    ),
    "its body does not end": lambda one: replace(
        one, raw=head(one, f"content-length: {1 << 40}"), endless=b": wait\n\n" * 8192
    ),
    "its chunks are mostly extensions": lambda one: replace(
        one, raw=head(one, "transfer-encoding: chunked") + b"1;", endless=b"x" * 65_536
    ),
    "its trailers do not end": lambda one: replace(
        one, raw=head(one, "transfer-encoding: chunked") + b"0\r\n", endless=b"X-More: a\r\n" * 4096
    ),
    "another protocol follows": lambda one: replace(
        one, raw=head(one, "upgrade: mallory", "connection: upgrade", status="101 Switching")
    ),
    "its status is none": lambda one: replace(one, raw=head(one, status="999 Mallory") + one.body),
    "it has no content": lambda one: replace(one, raw=head(one, status="204 No Content")),
    "it did not change": lambda one: replace(one, raw=head(one, status="304 Not Modified")),
    "it is no HTTP": lambda one: replace(one, raw=b"\x00\x01\x02 Mallory\r\n\r\n"),
    "nothing comes": lambda one: replace(one, raw=b"", clean=False),
    "another answer comes": forged,
}


def lie_about(answers: Change) -> Callable[[str, Answer], Answer]:
    return of_answers(answers)


async def test_a_thread_takes_none_of_it_for_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lying(tmp_path, monkeypatch) as it:
        with verified(it.url, tmp_path, max_retries=0) as client:
            for name, lie in LIES.items():
                for call in (asked, streamed):
                    it.lie = lie_about(lie)
                    with pytest.raises(REFUSED):
                        print(name, call.__name__)
                        await in_thread(lambda call=call: call(client))  # type: ignore[misc]
                    it.lie = honest
                    assert MALLORY not in await in_thread(lambda call=call: call(client))  # type: ignore[misc]


async def test_a_task_takes_none_of_it_for_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lying(tmp_path, monkeypatch) as it, verified_async(it.url, tmp_path) as plain:
        client = plain.with_options(max_retries=0)
        for name, lie in LIES.items():
            for call in (asked_async, streamed_async):
                with trio.fail_after(60):
                    it.lie = lie_about(lie)
                    with pytest.raises(REFUSED):
                        print(name, call.__name__)
                        await call(client)
                    it.lie = honest
                    assert MALLORY not in await call(client)


@pytest.mark.parametrize(
    "name",
    [
        "it is longer than it says",
        "its head does not end",
        "its body does not end",
        "another protocol follows",
        "another answer comes",
    ],
)
async def test_dcv_chat_takes_none_of_it_for_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async with lying(tmp_path, monkeypatch) as it:
        it.lie = lie_about(LIES[name])
        done = await chat(it.url, tmp_path, "What is the cat called?")
    assert done.status in (1, 2), done.err
    assert "affirming" not in done.err.lower()
    assert "warning:" not in done.err


async def said(url: str, **body: Any) -> tuple[int, bytes, bool]:
    """Status and bytes of what a proxy says, and whether it ended as HTTP has it."""
    content = b""
    async with (
        httpx2.AsyncClient(timeout=60, trust_env=False) as client,
        client.stream(
            "POST",
            f"{url}/chat/completions",
            json={"model": MODEL, "messages": QUESTION, **body},
        ) as response,
    ):
        try:
            async for part in response.aiter_raw():
                content += part
        except httpx2.RemoteProtocolError:
            return response.status_code, content, False
    return response.status_code, content, True


async def test_the_proxy_hands_on_none_of_it_and_serves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lying(tmp_path, monkeypatch) as it, proxy(it.url, tmp_path, WARNING) as between:
        for name, lie in LIES.items():
            for stream in (False, True):
                it.lie = lie_about(lie)
                status, content, clean = await said(between.url, stream=stream)
                refused = status == 502 and clean
                broken = stream and status == 200 and not clean
                assert refused or broken, (name, stream, status, content[-200:])
                assert b"[DONE]" not in content, name
                told = json.loads(content.rstrip().rpartition(b"data: ")[2])
                assert told["error"]["code"], name
                if not stream:
                    assert MALLORY.encode() not in content, name
                it.lie = honest
                status, content, clean = await said(between.url, stream=stream)
                assert (status, clean) == (200, True), (name, content)
                assert MALLORY.encode() not in content, name


async def test_an_answer_that_came_before_its_question_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is the truth. What follows it on the connection answers no question of ours, neither
    for the receipt nor the next one; and once that connection is gone all is well."""

    def converse(it: Front, client: openai.OpenAI) -> None:
        for call in (asked, streamed):
            heard: list[str] = []
            for lie in (lie_about(two_in_one), honest, honest):
                it.lie = lie
                with suppress(*REFUSED):
                    heard.append(call(client))
            assert call(client)
            assert MALLORY not in "".join(heard)

    async with lying(tmp_path, monkeypatch) as it:
        with verified(it.url, tmp_path, max_retries=0) as client:
            await in_thread(lambda: converse(it, client))


async def test_a_flood_of_promises_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flood(answer: Answer) -> Answer:
        return replace(answer, raw=b"", endless=b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)

    async with lying(tmp_path, monkeypatch) as it, verified_async(it.url, tmp_path) as patient:
        with verified(it.url, tmp_path, max_retries=0) as client:
            for _ in range(2):  # both know the appliance before the deadline is short
                assert await in_thread(lambda: asked(client))
                assert await asked_async(patient)
            monkeypatch.setattr(transport, "ANSWER_S", 2.0)
            it.lie = lie_about(flood)
            began = time.monotonic()
            with pytest.raises(REFUSED):
                await in_thread(lambda: asked(client))
            with trio.fail_after(60), pytest.raises(VerificationIncomplete, match="within 2 s"):
                await asked_async(patient)
            assert time.monotonic() - began < 30


async def test_a_receipt_of_another_keyset_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swapped while the answer came: with a keyset that nobody knows, then with the report of the
    right one in its place."""
    kept: dict[str, Answer] = {}

    def unknown(path: str, answer: Answer) -> Answer:
        if not path.startswith("/v1/aci/receipts/"):
            return answer
        document = json.loads(answer.body)
        document["workload_keyset_digest"] = f"sha256:{'ab' * 32}"
        return answer.saying(json.dumps(document).encode())

    def other_report(path: str, answer: Answer) -> Answer:
        if path.startswith("/v1/dcv/reports/"):
            return kept["report"]
        return unknown(path, answer)

    def learn(path: str, answer: Answer) -> Answer:
        if path.startswith("/v1/aci/attestation"):
            kept["report"] = answer
        return answer

    async with lying(tmp_path, monkeypatch) as it:
        it.lie = learn
        with verified(it.url, tmp_path, max_retries=0) as client:
            assert await in_thread(lambda: asked(client))
            for lie in (unknown, other_report):
                it.lie = lie
                for call in (asked, streamed):
                    with pytest.raises(ApplianceError):
                        await in_thread(lambda call=call: call(client))  # type: ignore[misc]


async def test_a_proof_that_does_not_end_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lying(tmp_path, monkeypatch) as it:
        for asked_for in ("/v1/aci/receipts/", "/v1/dcv/epochs/", "/v1/aci/attestation"):

            def endless(path: str, answer: Answer, *, which: str = asked_for) -> Answer:
                if not path.startswith(which):
                    return answer
                size = f"content-length: {1 << 40}"
                return replace(answer, raw=head(answer, size), endless=b" " * 65_536)

            it.lie = endless
            with (
                verified(it.url, tmp_path, max_retries=0) as client,
                pytest.raises(VerificationIncomplete, match="at most"),
            ):
                await in_thread(lambda client=client: asked(client))  # type: ignore[misc]


async def test_an_answer_is_kept_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lying(tmp_path, monkeypatch) as it:
        it.lie = lie_about(LIES["its body does not end"])
        with verified(it.url, tmp_path, max_retries=0) as client:
            for call in (asked, streamed):
                with pytest.raises(VerificationIncomplete, match=f"at most {MAX_CONTENT_BYTES}"):
                    await in_thread(lambda call=call: call(client))  # type: ignore[misc]


# ---------------------------------------------------------------- and local clients of the proxy


async def test_no_request_of_a_local_client_ends_the_proxy(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    async with proxy(appliance.url, tmp_path, WARNING) as it, it.openai() as client:
        port = int(it.url.rpartition(":")[2].partition("/")[0])
        for target, header, status in (
            (b"//a:b/", b"", b"400"),
            (b"//[", b"", b"400"),
            (b"//example.org/v1/models", b"", b"400"),
            (b"http://example.org/v1/models", b"", b"400"),
            (b"/v1/models", b"User-Agent: \xe9\xff\r\n", b"200"),
            (b"/v1/../../x", b"", b"404"),
            (b"/%zz", b"", b"404"),
        ):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(
                    b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n"
                )
                with trio.fail_after(60):
                    answer = bytes(await stream.receive_some(4096))
                assert answer.startswith(b"HTTP/1.1 " + status), (target, answer)
        assert await asked_async(client)


async def test_a_local_client_that_leaves_ends_its_generation(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    """Also one that waits for a whole answer, to whom nothing is written meanwhile."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "[[mode:slow:50]] Go on"}],
        "max_tokens": 4000,
        "ignore_eos": True,
    }
    async with proxy(appliance.url, tmp_path, WARNING) as it:
        await it.said("appliance_verified")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: said(it.url, **body))
            with trio.fail_after(60):
                while not await appliance.engine_counter("sglang:num_running_reqs"):
                    await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
        await aborted(appliance)
