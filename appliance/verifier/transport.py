"""A transport for httpx2, and so for the openai package, that verifies what it talks to.

    client = OpenAI(http_client=verified_client("https://HOST:8443", policy="policy.toml"))

Before the first prompt the appliance is verified; every connection ends at a TLS key that its
evidence names, or nothing is written; a keyset that changes is verified again; each answer is held
against its receipt. What does not hold raises one of our errors, never httpx2's: the openai package
retries those of httpx2 and wraps them, and hands ours on as they are, untried.

    an answer at once     raises instead of returning the response
    a stream              raises at its end, in place of `[DONE]`
    a refusal             is handed on as it came, once the receipt holds that it has, if any

A stream that the caller leaves before its end is not proven. The steps are in `verified`, told once
for threads (`VerifiedTransport`) and for Trio and asyncio (`AsyncVerifiedTransport`). Neither
follows redirects, reads the environment, or talks to another host.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio
import httpx2

from appliance.errors import Unbound, VerificationIncomplete
from appliance.verifier.check import Rules, load_rules
from appliance.verifier.fetching import fetch, fetch_sync
from appliance.verifier.session import (
    CONNECT_S,
    anybody,
    anybody_sync,
    pinned_client,
    pinned_client_sync,
)
from appliance.verifier.tls import deadline
from appliance.verifier.verdict import Outcome
from appliance.verifier.verified import (
    MAX_REFUSAL_BYTES,
    Accept,
    Content,
    HeldBack,
    Notice,
    Outgoing,
    RelyingParty,
    Verified,
    relying_party,
    streams,
)

READ_S = 600.0
"""Between two parts of an answer, where the caller says nothing else; the openai package's own. An
answer that does not stream comes after the last of it has been generated."""

ANSWER_S = 3600.0
"""For all of an answer, however slowly it comes."""


def verified_client(
    url: str,
    *,
    policy: str | Path | None = None,
    reference: str | Path | None = None,
    accept: Accept = "affirming",
    on_verified: Notice | None = None,
) -> httpx2.Client:
    """A client for `OpenAI(http_client=…)`; share it between threads as you would any other.

    Args:
        url: of the appliance, `https://HOST:8443`.
        policy: TOML, as for `dcv verify`; None: the strict one.
        reference: JSON, reference values of the images that are accepted; without them nothing is
            affirmed.
        accept: which verdicts are good enough.
        on_verified: called with the outcome of every verification that was.

    Raises:
        VerificationIncomplete: a file cannot be read, or this is no https URL. Nothing is fetched
            before the first request.
    """
    rules = load_rules(_path(policy), _path(reference))
    transport = VerifiedTransport(url, rules, accept=accept, on_verified=on_verified)
    return httpx2.Client(
        base_url=transport.url,
        transport=transport,
        timeout=httpx2.Timeout(READ_S, connect=CONNECT_S),
        trust_env=False,
        follow_redirects=False,
    )


def async_verified_client(
    url: str,
    *,
    policy: str | Path | None = None,
    reference: str | Path | None = None,
    accept: Accept = "affirming",
    on_verified: Notice | None = None,
) -> httpx2.AsyncClient:
    """`verified_client`, for `AsyncOpenAI`, under Trio or asyncio."""
    rules = load_rules(_path(policy), _path(reference))
    transport = AsyncVerifiedTransport(url, rules, accept=accept, on_verified=on_verified)
    return httpx2.AsyncClient(
        base_url=transport.url,
        transport=transport,
        timeout=httpx2.Timeout(READ_S, connect=CONNECT_S),
        trust_env=False,
        follow_redirects=False,
    )


# ------------------------------------------------------------------------------------- in threads


@dataclass(frozen=True, slots=True)
class _Session:
    """A verified appliance, and the client whose connections end at its keys."""

    verified: Verified
    client: httpx2.Client


class VerifiedTransport(httpx2.BaseTransport):
    """For synchronous clients, of one thread or many."""

    def __init__(
        self,
        url: str,
        rules: Rules,
        *,
        accept: Accept = "affirming",
        on_verified: Notice | None = None,
        clock: Callable[[], datetime.datetime] | None = None,
    ) -> None:
        """See `verified_client`.

        Args:
            clock: timezone-aware; default: this machine's.
        """
        self._party = relying_party(url, rules, accept=accept, notice=on_verified, clock=clock)
        self._lock = threading.Lock()  # held while the appliance is verified: once is enough
        self._session: _Session | None = None
        self._retired: httpx2.Client | None = None

    @property
    def url(self) -> str:
        """Of the appliance."""
        return self._party.url

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """One exchange.

        Raises:
            ApplianceError: ours; what did not hold.
            httpx2.RequestError: the network, once the appliance was verified.
        """
        until = time.monotonic() + ANSWER_S
        sent = self._party.outgoing(request, request.read())
        # Steps 1 to 9, where they have not been taken or are out of their time.
        session = self._verified()
        try:
            head = _send(session, sent, until)
        except Unbound:
            # It has another key than the verified ones, and has been sent nothing. It was started
            # again, or somebody stands between: steps 1 to 9 say which.
            session = self._verified(but=session)
            head = _send(session, sent, until)
        with ExitStack() as refused:
            refused.callback(head.close)
            if self._party.is_news(head, session.verified):
                session = self._verified(but=session)
                self._party.require_keyset(head, session.verified)
            self._party.check_head(head, sent)
            response = self._answer(_Answer(self._party, session, sent, head, until))
            refused.pop_all()  # from here on whoever reads it closes it
        return response

    def _answer(self, answer: _Answer) -> httpx2.Response:
        head = answer.head
        if not answer.has_proof:
            return _response(head, _Bounded(answer))
        if head.is_success and streams(head):
            return _response(head, _Proven(answer))
        content = Content() if head.is_success else Content(max_bytes=MAX_REFUSAL_BYTES)
        for part in answer.parts():
            content.add(part)
        head.close()
        # Step 10, before the caller sees any of it.
        answer.prove(content)
        return _response(head, httpx2.ByteStream(content.all()))

    def _verified(self, but: _Session | None = None) -> _Session:
        """Who is verified; verified now where nobody is, or only `but`."""
        with self._lock:
            session = self._session
            if session is not None and session is not but and self._holds(session):
                return session
            with anybody_sync(self.url) as client:
                verified = fetch_sync(client, self._party.verification())
            if session is not None and session.verified.pins == verified.pins:
                renewed = _Session(verified, session.client)
            else:
                renewed = _Session(
                    verified, pinned_client_sync(self.url, verified.pins, read_s=READ_S)
                )
                self._retire(session)
            self._session = renewed
            return renewed

    def _holds(self, session: _Session) -> bool:
        return session.verified.holds(self._party.clock())

    def _retire(self, session: _Session | None) -> None:
        """Answers that still come over connections to earlier keys may end, until the next such
        change."""
        if self._retired is not None:
            self._retired.close()
        self._retired = None if session is None else session.client

    def close(self) -> None:
        """Close every connection."""
        with self._lock:
            for client in (self._retired, self._session.client if self._session else None):
                if client is not None:
                    client.close()
            self._retired, self._session = None, None


def _send(session: _Session, sent: Outgoing, until: float) -> httpx2.Response:
    with deadline(_left(until)):
        return session.client.send(sent.request, stream=True)


@dataclass(frozen=True, slots=True)
class _Answer:
    """A response whose head was accepted."""

    party: RelyingParty
    session: _Session
    sent: Outgoing
    head: httpx2.Response
    until: float

    @property
    def has_proof(self) -> bool:
        return self.party.has_proof(self.head, self.sent)

    def parts(self) -> Iterator[bytes]:
        parts = self.head.iter_raw()
        while True:
            with deadline(_left(self.until)):
                part = next(parts, None)
            if part is None:
                return
            yield part

    def prove(self, content: Content) -> Outcome:
        proof = self.party.proof(self.session.verified, self.sent, self.head, content.all())
        return fetch_sync(self.session.client, proof, headers=self.sent.credential)


class _Bounded(httpx2.SyncByteStream):
    """What has no receipt: a list of models, a refusal."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        content = Content()
        for part in self._answer.parts():
            content.add(part)
            yield part

    def close(self) -> None:
        self._answer.head.close()


class _Proven(httpx2.SyncByteStream):
    """A stream whose end is handed on once it is proven."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        content, held = Content(), HeldBack()
        for part in self._answer.parts():
            content.add(part)
            if ready := held.feed(part):
                yield ready
        # Step 10, before the caller sees the end of it.
        self._answer.prove(content)
        if rest := held.rest():
            yield rest

    def close(self) -> None:
        self._answer.head.close()


# ------------------------------------------------------------------------------ in Trio or asyncio


@dataclass(frozen=True, slots=True)
class _AsyncSession:
    verified: Verified
    client: httpx2.AsyncClient


class AsyncVerifiedTransport(httpx2.AsyncBaseTransport):
    """`VerifiedTransport`, for clients of one event loop."""

    def __init__(
        self,
        url: str,
        rules: Rules,
        *,
        accept: Accept = "affirming",
        on_verified: Notice | None = None,
        clock: Callable[[], datetime.datetime] | None = None,
    ) -> None:
        """See `verified_client`.

        Args:
            clock: timezone-aware; default: this machine's.
        """
        self._party = relying_party(url, rules, accept=accept, notice=on_verified, clock=clock)
        self._lock = anyio.Lock()
        self._session: _AsyncSession | None = None
        self._retired: httpx2.AsyncClient | None = None

    @property
    def url(self) -> str:
        """Of the appliance."""
        return self._party.url

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """One exchange.

        Raises:
            ApplianceError: ours; what did not hold.
            httpx2.RequestError: the network, once the appliance was verified.
        """
        until = time.monotonic() + ANSWER_S
        sent = self._party.outgoing(request, await request.aread())
        # Steps 1 to 9, where they have not been taken or are out of their time.
        session = await self.verify()
        try:
            head = await _send_async(session, sent, until)
        except Unbound:
            # Another key than the verified ones, and nothing was sent: as above.
            session = await self.verify(but=session)
            head = await _send_async(session, sent, until)
        async with AsyncExitStack() as refused:
            refused.push_async_callback(_close, head.aclose)
            if self._party.is_news(head, session.verified):
                session = await self.verify(but=session)
                self._party.require_keyset(head, session.verified)
            self._party.check_head(head, sent)
            response = await self._answer(_AsyncAnswer(self._party, session, sent, head, until))
            refused.pop_all()  # from here on whoever reads it closes it
        return response

    async def _answer(self, answer: _AsyncAnswer) -> httpx2.Response:
        head = answer.head
        if not answer.has_proof:
            return _response(head, _AsyncBounded(answer))
        if head.is_success and streams(head):
            return _response(head, _AsyncProven(answer))
        content = Content() if head.is_success else Content(max_bytes=MAX_REFUSAL_BYTES)
        while (part := await answer.next_part()) is not None:
            content.add(part)
        await answer.close()
        # Step 10, before the caller sees any of it.
        await answer.prove(content)
        return _response(head, httpx2.ByteStream(content.all()))

    async def verify(self, but: _AsyncSession | None = None) -> _AsyncSession:
        """Who is verified; verified now where nobody is, or only `but`."""
        async with self._lock:
            session = self._session
            if session is not None and session is not but and self._holds(session):
                return session
            async with anybody(self.url) as client:
                verified = await fetch(client, self._party.verification())
            if session is not None and session.verified.pins == verified.pins:
                renewed = _AsyncSession(verified, session.client)
            else:
                pinned = pinned_client(self.url, verified.pins, read_s=READ_S)
                renewed = _AsyncSession(verified, pinned)
            self._session = renewed
            if session is not None and session.client is not renewed.client:
                await self._retire(session.client)
            return renewed

    async def _retire(self, client: httpx2.AsyncClient) -> None:
        retired, self._retired = self._retired, client
        if retired is not None:
            await _close(retired.aclose)

    def _holds(self, session: _AsyncSession) -> bool:
        return session.verified.holds(self._party.clock())

    async def aclose(self) -> None:
        """Close every connection."""
        session, retired = self._session, self._retired
        self._session, self._retired = None, None
        for client in (retired, session.client if session else None):
            if client is not None:
                await _close(client.aclose)


async def _send_async(session: _AsyncSession, sent: Outgoing, until: float) -> httpx2.Response:
    try:
        with anyio.fail_after(_left(until)):
            return await session.client.send(sent.request, stream=True)
    except TimeoutError:
        raise _too_slow() from None


async def _close(closing: Callable[[], Awaitable[None]]) -> None:
    """Also where we are cancelled: what is left of a connection is not waited for."""
    with anyio.move_on_after(CONNECT_S, shield=True):
        await closing()


class _AsyncAnswer:
    """A response whose head was accepted."""

    def __init__(
        self,
        party: RelyingParty,
        session: _AsyncSession,
        sent: Outgoing,
        head: httpx2.Response,
        until: float,
    ) -> None:
        self.head = head
        self._party, self._session, self._sent, self._until = party, session, sent, until
        self._parts = head.aiter_raw()

    @property
    def has_proof(self) -> bool:
        return self._party.has_proof(self.head, self._sent)

    async def next_part(self) -> bytes | None:
        """None at the end."""
        try:
            with anyio.fail_after(_left(self._until)):
                return await anext(self._parts, None)
        except TimeoutError:
            raise _too_slow() from None

    async def prove(self, content: Content) -> Outcome:
        verified, client = self._session.verified, self._session.client
        proof = self._party.proof(verified, self._sent, self.head, content.all())
        return await fetch(client, proof, headers=self._sent.credential)

    async def close(self) -> None:
        await _close(self._parts.aclose)
        await _close(self.head.aclose)


class _AsyncBounded(httpx2.AsyncByteStream):
    """What has no receipt: a list of models, a refusal."""

    def __init__(self, answer: _AsyncAnswer) -> None:
        self._answer = answer
        self._content = Content()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        part = await self._answer.next_part()
        if part is None:
            raise StopAsyncIteration
        self._content.add(part)
        return part

    async def aclose(self) -> None:
        await self._answer.close()


class _AsyncProven(httpx2.AsyncByteStream):
    """A stream whose end is handed on once it is proven. Not a generator: callers of the openai
    package leave those to the garbage collector."""

    def __init__(self, answer: _AsyncAnswer) -> None:
        self._answer = answer
        self._content, self._held = Content(), HeldBack()
        self._ended = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._ended:
            part = await self._answer.next_part()
            if part is not None:
                self._content.add(part)
                if ready := self._held.feed(part):
                    return ready
                continue
            # Step 10, before the caller sees the end of it.
            await self._answer.prove(self._content)
            self._ended = True
            if rest := self._held.rest():
                return rest
        raise StopAsyncIteration

    async def aclose(self) -> None:
        await self._answer.close()


# -------------------------------------------------------------------------------------- and shared


def _response(
    head: httpx2.Response, stream: httpx2.SyncByteStream | httpx2.AsyncByteStream
) -> httpx2.Response:
    return httpx2.Response(
        head.status_code, headers=head.headers.raw, stream=stream, extensions=head.extensions
    )


def _left(until: float) -> float:
    """Seconds.

    Raises:
        VerificationIncomplete: none are.
    """
    left = until - time.monotonic()
    if left <= 0:
        raise _too_slow()
    return left


def _too_slow() -> VerificationIncomplete:
    return VerificationIncomplete(f"expected the whole answer within {ANSWER_S:g} s")


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)
