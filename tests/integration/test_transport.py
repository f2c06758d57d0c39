"""`OpenAI(http_client=verified_client(…))`: the locked openai package, a real appliance, and people
in between who hold its TLS key."""

from __future__ import annotations

import asyncio
import datetime
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import openai
import pytest
import trio
import trustme
from openai import AsyncOpenAI, OpenAI

from appliance.errors import (
    ApplianceError,
    Contraindicated,
    Unauthentic,
    Unbound,
    VerificationIncomplete,
)
from appliance.rats.result import Tier
from appliance.verifier import transport
from appliance.verifier.check import load_rules
from appliance.verifier.fetching import Fetching, Get, fetch, fetch_sync
from appliance.verifier.session import anybody, anybody_sync
from appliance.verifier.transport import (
    AsyncVerifiedTransport,
    async_verified_client,
    verified_client,
)
from appliance.verifier.verdict import Outcome
from tests.integration.appliance import MODEL, RunningAppliance, Sections, start_appliance
from tests.integration.front import Answer, Front, Lie, front, steal_tls_key
from tests.integration.test_verify_receipts import policy

T = TypeVar("T")
QUESTION: Any = [{"role": "user", "content": "What is the cat called?"}]


async def in_thread(call: Callable[[], T]) -> T:
    """Under a deadline: nothing here takes as long."""
    with trio.fail_after(60):
        return await trio.to_thread.run_sync(call)


def asked(client: OpenAI) -> str:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION)
    return answer.choices[0].message.content or ""


def streamed(client: OpenAI, heard: list[str] | None = None) -> str:
    heard = [] if heard is None else heard
    for chunk in client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True):
        heard += [choice.delta.content or "" for choice in chunk.choices]
    return "".join(heard)


async def asked_async(client: AsyncOpenAI) -> str:
    answer = await client.chat.completions.create(model=MODEL, messages=QUESTION)
    return answer.choices[0].message.content or ""


async def streamed_async(client: AsyncOpenAI) -> str:
    stream = await client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True)
    heard = []
    async for chunk in stream:
        heard += [choice.delta.content or "" for choice in chunk.choices]
    return "".join(heard)


@dataclass
class Seen:
    """What a client was told of."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def receipts(self) -> list[Any]:
        parts: list[Any] = [one.claims.get("submods") for one in self.outcomes]
        return [part["receipt"] for part in parts if "receipt" in part]


def verified(url: str, folder: Path, seen: Seen | None = None, **options: Any) -> OpenAI:
    """With the openai package's own retries, so that it is seen what they do."""
    http = verified_client(
        url,
        policy=policy(folder),
        accept="unsafe_warning",
        on_verified=None if seen is None else seen.outcomes.append,
    )
    return OpenAI(base_url=f"{url}/v1", api_key="unused", http_client=http, **options)


def verified_async(url: str, folder: Path, seen: Seen | None = None) -> AsyncOpenAI:
    http = async_verified_client(
        url,
        policy=policy(folder),
        accept="unsafe_warning",
        on_verified=None if seen is None else seen.outcomes.append,
    )
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", http_client=http)


# ------------------------------------------------------------------------------------ what it does


async def test_a_thread_gets_answers_that_were_verified(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    seen = Seen()

    def converse() -> None:
        with verified(appliance.url, tmp_path, seen) as client:
            assert asked(client)
            assert len(seen.receipts) == 1
            assert streamed(client)
            assert len(seen.receipts) == 2
            assert [model.id for model in client.models.list()] == [MODEL]

    await in_thread(converse)
    # The appliance once, and each answer.
    assert [one.verdict for one in seen.outcomes] == [Tier.WARNING] * 3
    assert {one["outcome"] for one in seen.receipts} == {"complete"}
    assert len({one["receipt_id"] for one in seen.receipts}) == 2


async def test_so_does_a_task_in_trio(appliance: RunningAppliance, tmp_path: Path) -> None:
    seen = Seen()
    with trio.fail_after(60):
        async with verified_async(appliance.url, tmp_path, seen) as client:
            assert await asked_async(client)
            assert await streamed_async(client)
            assert [model.id async for model in client.models.list()] == [MODEL]
    assert [one["outcome"] for one in seen.receipts] == ["complete"] * 2


async def test_so_does_a_task_in_asyncio(appliance: RunningAppliance, tmp_path: Path) -> None:
    seen = Seen()

    async def converse() -> None:
        async with verified_async(appliance.url, tmp_path, seen) as client:
            assert await asked_async(client)
            assert await streamed_async(client)

    await in_thread(lambda: asyncio.run(converse()))
    assert [one["outcome"] for one in seen.receipts] == ["complete"] * 2


async def test_a_client_that_was_given_no_base_url_means_the_appliance(
    appliance: RunningAppliance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def converse() -> str:
        http = verified_client(appliance.url, policy=policy(tmp_path), accept="unsafe_warning")
        with OpenAI(api_key="unused", http_client=http) as client:
            assert client.base_url.host == "api.openai.com"
            return asked(client)

    assert await in_thread(converse)
    [seen] = await appliance.engine_seen()
    assert seen["messages"][0]["content"] == QUESTION[0]["content"]


async def test_threads_share_a_client_that_verifies_once(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    seen = Seen()
    with verified(appliance.url, tmp_path, seen) as client:
        async with trio.open_nursery() as both:
            for call in (asked, streamed, asked, streamed):
                both.start_soon(in_thread, partial(call, client))
    assert len(seen.receipts) == 4
    assert len(seen.outcomes) == 5


async def test_a_warning_is_not_good_enough_unless_it_is_said_to_be(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    http = verified_client(appliance.url, policy=policy(tmp_path))
    with OpenAI(base_url=f"{appliance.url}/v1", api_key="unused", http_client=http) as client:
        refused = pytest.raises(Contraindicated, match="expected affirming, got warning")
        with refused:
            await in_thread(lambda: asked(client))
    with pytest.raises(VerificationIncomplete, match="accept"):
        verified_client(appliance.url, accept="warning")  # type: ignore[arg-type]
    assert await appliance.engine_seen() == []


async def test_a_refusal_reaches_the_caller_as_what_it_is(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    seen = Seen()

    def refused(client: OpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="not served here"):
            client.chat.completions.create(model="another", messages=QUESTION)

    with verified(appliance.url, tmp_path, seen) as client:
        await in_thread(lambda: refused(client))
    assert [one["outcome"] for one in seen.receipts] == ["refused"]


@pytest.mark.parametrize("mode", ["error_event:2", "reset_stream:2", "no_done"])
async def test_a_stream_that_breaks_off_is_no_answer(
    appliance: RunningAppliance, tmp_path: Path, mode: str
) -> None:
    def broken(client: OpenAI) -> None:
        question: Any = [{"role": "user", "content": f"[[mode:{mode}]] Go on"}]
        with pytest.raises(openai.APIError):
            list(client.chat.completions.create(model=MODEL, messages=question, stream=True))

    with verified(appliance.url, tmp_path, max_retries=0) as client:
        await in_thread(lambda: broken(client))


async def test_other_hosts_are_not_asked(appliance: RunningAppliance, tmp_path: Path) -> None:
    with verified_client(appliance.url, policy=policy(tmp_path), accept="unsafe_warning") as client:
        for url in ("https://example.org/v1/models", appliance.url.replace("https", "http")):
            with pytest.raises(VerificationIncomplete, match="expected a request to"):
                await in_thread(partial(client.get, url))


async def test_a_renewed_keyset_is_verified_before_the_answer_is_handed_on(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    sections: Sections = {"attestation": {"interval_s": 0.05, "keyset_s": 100.0}}
    ahead = [0.0]
    appliance = await start_appliance(
        nursery, tmp_path, sections=sections, wall_clock=lambda: time.time() + ahead[0]
    )
    seen = Seen()
    rules = load_rules(policy(tmp_path), None)

    def clock() -> datetime.datetime:
        return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead[0])

    inner = AsyncVerifiedTransport(
        appliance.url,
        rules,
        accept="unsafe_warning",
        on_verified=seen.outcomes.append,
        clock=clock,
    )
    async with (
        httpx2.AsyncClient(transport=inner, timeout=30) as http,
        AsyncOpenAI(base_url=f"{appliance.url}/v1", api_key="x", http_client=http) as client,
    ):
        with trio.fail_after(60):
            assert await asked_async(client)
            before = await keyset_of(appliance)
            ahead[0] = 80.0
            while await keyset_of(appliance) == before:
                await trio.sleep(0.02)
            assert await asked_async(client)
    verified_ones = [one.claims["workload_keyset_digest"] for one in seen.outcomes]
    # The appliance, an answer; the appliance again, and an answer under the new keyset.
    assert len(verified_ones) == 4
    assert verified_ones[:2] == [before] * 2
    assert len(set(verified_ones[2:]) | {before}) == 2


async def keyset_of(appliance: RunningAppliance) -> str:
    async with appliance.client() as client:
        return (await client.get("/health/live")).headers["x-aci-keyset-digest"]


# -------------------------------------------------------------------- who holds its TLS key, and lies


@asynccontextmanager
async def lying(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Front]:
    stolen = steal_tls_key(monkeypatch)
    async with trio.open_nursery() as nursery:
        appliance = await start_appliance(nursery, folder)
        async with front(appliance, stolen[0]) as it:
            yield it
        nursery.cancel_scope.cancel()


def of_answers(change: Callable[[Answer], Answer]) -> Lie:
    def lie(path: str, answer: Answer) -> Answer:
        return change(answer) if path.startswith("/v1/chat/completions") else answer

    return lie


def of_receipts(change: Callable[[Answer], Answer]) -> Lie:
    def lie(path: str, answer: Answer) -> Answer:
        return change(answer) if path.startswith("/v1/aci/receipts/") else answer

    return lie


def changed(answer: Answer, old: bytes, new: bytes) -> Answer:
    assert old in answer.body
    return answer.saying(answer.body.replace(old, new, 1))


def reordered(answer: Answer) -> Answer:
    first, second, *rest = answer.body.split(b"\n\n")
    return answer.saying(b"\n\n".join([second, first, *rest]))


def injected(answer: Answer) -> Answer:
    first, *rest = answer.body.split(b"\n\n")
    return answer.saying(b"\n\n".join([first, first, *rest]))


def cut(answer: Answer) -> Answer:
    first, second, *_, done, _ = answer.body.split(b"\n\n")
    return answer.saying(b"\n\n".join([first, second, done, b""]))


def without_end(answer: Answer) -> Answer:
    return answer.saying(answer.body.replace(b"data: [DONE]\n\n", b""))


def ending(end: bytes) -> Lie:
    """`data: [DONE]` and the blank line replaced."""
    return of_answers(lambda one: one.saying(one.body.removesuffix(b"data: [DONE]\n\n") + end))


def other_model(answer: Answer) -> Answer:
    document = json.loads(answer.body) | {"model": "another"}
    return answer.saying(json.dumps(document).encode())


STREAM_LIES: dict[str, tuple[Lie, type[ApplianceError]]] = {
    "an event is missing": (of_answers(cut), Unbound),
    "events change places": (of_answers(reordered), Unbound),
    "an event is there twice": (of_answers(injected), Unbound),
    "the end is missing": (of_answers(without_end), Unbound),
    "the end is there twice": (ending(b"data: [DONE]\n\n" * 2), Unbound),
    "more comes behind the end": (ending(b'data: [DONE]\n\ndata: {"choices":[]}\n\n'), Unbound),
    "the end is spelled otherwise": (ending(b"data:[DONE]\r\n\r\n"), Unbound),
    "the end is one for some clients": (ending(b"data: x\xe2\x80\xa8data: [DONE]\n\n"), Unbound),
    "a byte differs": (of_answers(lambda one: changed(one, b"stand-in", b"stand-on")), Unbound),
    "a comment is added": (of_answers(lambda one: one.saying(b": hi\n\n" + one.body)), Unbound),
    "a receipt is forged": (of_receipts(other_model), Unauthentic),
    "the keyset is another": (
        of_answers(lambda one: one.heading(x_aci_keyset_digest=f"sha256:{'0' * 64}")),
        Unbound,
    ),
    "the keyset is not named": (
        of_answers(lambda one: one.heading(x_aci_keyset_digest="")),
        Unbound,
    ),
    "no receipt is named": (
        of_answers(lambda one: one.heading(x_receipt_id="")),
        VerificationIncomplete,
    ),
    "the receipt's name is a path": (
        of_answers(lambda one: one.heading(x_receipt_id="../../models")),
        VerificationIncomplete,
    ),
    "the answer is coded": (
        of_answers(lambda one: one.heading(content_encoding="gzip")),
        VerificationIncomplete,
    ),
    "the caller is sent elsewhere": (
        of_answers(lambda one: replace(one.heading(location="https://example.org/"), status=307)),
        VerificationIncomplete,
    ),
    "a refusal says that it was answered": (
        of_answers(lambda one: replace(one, status=500)),
        Unbound,
    ),
}


@pytest.mark.parametrize(("lie", "error"), STREAM_LIES.values(), ids=STREAM_LIES)
async def test_a_stream_that_is_not_the_appliances_never_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: Lie, error: type[ApplianceError]
) -> None:
    async with lying(tmp_path, monkeypatch) as it:
        with verified(it.url, tmp_path) as client:
            assert await in_thread(lambda: streamed(client))
            it.lie, before = lie, it.posts()
            with pytest.raises(error):
                await in_thread(lambda: streamed(client))
            assert it.posts() == before + 1  # the openai package did not try again
        async with verified_async(it.url, tmp_path) as patient:
            with trio.fail_after(60), pytest.raises(error):
                await streamed_async(patient)


@pytest.mark.parametrize("flipped", [b"stand-in", b'"stop"', b'"index"'])
async def test_a_whole_answer_with_a_changed_byte_is_not_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flipped: bytes
) -> None:
    async with lying(tmp_path, monkeypatch) as it:
        it.lie = of_answers(lambda one: changed(one, flipped, flipped[:-2] + b"X" + flipped[-1:]))
        with verified(it.url, tmp_path) as client, pytest.raises(Unbound):
            await in_thread(lambda: asked(client))


async def test_an_answer_that_broke_off_and_was_ended_by_somebody_else_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte is the appliance's, and its receipt says that they are not all."""
    question = [{"role": "user", "content": "[[mode:error_event:2]] Go on"}]
    body = {"model": MODEL, "messages": question, "stream": True}
    async with lying(tmp_path, monkeypatch) as it:
        client = verified_client(it.url, policy=policy(tmp_path), accept="unsafe_warning")
        with client, pytest.raises(Contraindicated, match="expected complete, got engine_failed"):
            await in_thread(lambda: client.post("/v1/chat/completions", json=body))


async def test_another_requests_receipt_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lying(tmp_path, monkeypatch) as it:
        kept: dict[str, Answer] = {}

        def swapped(path: str, answer: Answer) -> Answer:
            if path.startswith("/v1/aci/receipts/"):
                return kept.setdefault("receipt", answer)
            return answer

        def renamed(answer: Answer) -> Answer:
            name = json.loads(kept["receipt"].body)["receipt_id"]
            return answer.heading(x_receipt_id=name)

        it.lie = swapped
        with verified(it.url, tmp_path) as client:
            assert await in_thread(lambda: asked(client))
            # Its receipt in place of this one's; then its name in place of this one's.
            with pytest.raises(Unbound):
                await in_thread(lambda: asked(client))
            it.lie = of_answers(renamed)
            with pytest.raises(Unbound):
                await in_thread(lambda: asked(client))


async def test_who_sends_a_byte_at_a_time_does_not_hold_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lying(tmp_path, monkeypatch) as it:
        with verified(it.url, tmp_path, max_retries=0) as client:
            assert await in_thread(lambda: asked(client))
            monkeypatch.setattr(transport, "ANSWER_S", 2.0)
            it.lie = of_answers(lambda one: replace(one, pause_s=0.2))
            for call in (asked, streamed):
                with pytest.raises(
                    (VerificationIncomplete, openai.APITimeoutError, httpx2.ReadTimeout)
                ):
                    await in_thread(partial(call, client))
        async with verified_async(it.url, tmp_path) as patient:
            with trio.fail_after(60), pytest.raises(VerificationIncomplete, match="within 2 s"):
                await streamed_async(patient)


@pytest.mark.parametrize("opening", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
async def test_a_document_that_drips_is_not_waited_for(opening: bytes) -> None:
    """Each byte comes in time for a timeout per read, and the last one never."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)

    async def drip(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        with suppress(trio.BrokenResourceError):
            await tls.receive_some()
            await tls.send_all(opening)
            while True:
                await trio.sleep(0.02)
                await tls.send_all(b"x")

    def document() -> Fetching[bytes]:
        return (yield Get("/", 1 << 20, within_s=0.5)).body

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    url = f"https://127.0.0.1:{listener.socket.getsockname()[1]}"

    def wait() -> None:
        with anybody_sync(url) as client, pytest.raises(VerificationIncomplete):
            fetch_sync(client, document())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, drip, [listener]))
        await in_thread(wait)
        async with anybody(url) as client:
            with trio.fail_after(60), pytest.raises(VerificationIncomplete, match=r"within 0\.5 s"):
                await fetch(client, document())
        nursery.cancel_scope.cancel()


async def test_each_question_has_a_nonce_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lying(tmp_path, monkeypatch) as it:
        with verified(it.url, tmp_path) as client:
            assert await in_thread(lambda: asked(client) and asked(client))
        told = [
            one for one, (method, _) in zip(it.headers, it.asked, strict=True) if method == "POST"
        ]
    assert len({one["x-dcv-nonce"] for one in told}) == len(told) == 2
    assert {one["accept-encoding"] for one in told} == {"identity"}
