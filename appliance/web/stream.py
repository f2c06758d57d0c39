"""The body of an answer: of a stream, events as they come, a heartbeat in silence, a true end.

A stream ends in one of two ways. Cleanly: `data: [DONE]`, then the end of the body. Otherwise:
one `data: {"error": …}` event and then *no* end: no last chunk on HTTP/1.1, RST_STREAM on HTTP/2.
Client libraries take a clean end without `[DONE]` for success, silently, so a failure must not
look like one. Raising out of the body is how an ASGI application says this to its server; see
`web.server`, which turns it into the unclean end.

What a client can have proven inside its stream (protocol.md section 6) is a body of its own,
`ProvenStreamBody`: whoever asks for nothing pays nothing for it. An answer that is there as a whole
goes out as a `WholeAnswerBody`, so that its receipt says what of it went.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

import trio
from quart.wrappers.response import ResponseBody

from appliance.config import Limits
from appliance.errors import (
    ApplianceError,
    EngineStreamFailed,
)
from appliance.serving.admission import Exchange
from appliance.serving.epochs import Attested, Epochs, Member
from appliance.serving.exchanges import ExchangeRecord
from appliance.serving.metrics import COMPLETE, ExchangeMetrics
from appliance.serving.relay import EventSource, find_usage
from appliance.web.evidence import evidence_late, evidence_refusals
from appliance.web.problem import defect, error_body
from appliance.wire.canonical import JsonObject
from appliance.wire.checkpoint import Core, checkpoint_comment
from appliance.wire.commitments import completion_commitment
from appliance.wire.openai import Proof
from appliance.wire.sse import DONE_EVENT, PING, PING_LINE, encode_event

PART_BYTES = 1 << 16
"""Of a whole answer, written and recorded at a time; what a connection writes by one deadline."""

USAGE = b'"usage"'
"""What events contain that tell it. Inside a text the quotes would be escaped."""


WRITE_NOW = "dcv.write_now"
"""The ASGI extension in which `web.server` offers, on HTTP/1.1, a `Write` for a streamed body's
bytes as its `write`: a token goes from here to the kernel without a message for each layer."""

Write: TypeAlias = Callable[[bytes], Awaitable[None] | None]
"""Writes body bytes. None where the kernel took them at once; else what to await, right then. No
bytes at all see to it that the answer's head has left."""


class UncleanEnd(Exception):  # noqa: N818  # an instruction to the server, not an error
    """Raised through Quart into the server: the answer so far must not end cleanly."""


class ClientGone(OSError):  # noqa: N818  # what happened, and nobody's error
    """Raised where an answer is written, as ASGI 2.4 has it: the client does not take it."""


class EventStreamBody(ResponseBody):
    """Owns the exchange while the body is sent; leaving it releases the exchange.

    `web.app` enters it, has it relay and leaves, all in the task that sends the answer, which is
    cancelled when the client goes away. The nursery of a merged source opens on entry and closes on
    exit.
    """

    def __init__(
        self,
        source: EventSource,
        exchange: Exchange,
        limits: Limits,
        observed: ExchangeMetrics,
        record: ExchangeRecord,
        *,
        begun: bool,
        first_deadline: float,
        usage_asked: bool,
    ) -> None:
        """Take over an exchange.

        Args:
            begun: whether there is something to write at once.
            first_deadline: on Trio's clock; the engine's first event comes before it.
            usage_asked: whether the engine was asked to tell the usage at the end.
        """
        self._source = source
        self._exchange = exchange
        self._limits = limits
        self._observed = observed
        self._record = record
        self._begun = begun
        self._deadline = first_deadline
        self._silent_since = trio.current_time()
        self._usage_asked = usage_asked
        self._usage = b""  # the last events that may tell it

    async def __aenter__(self) -> Self:  # type: ignore[override]  # Quart would iterate over it
        await self._source.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._source.__aexit__(kind, error, traceback)
        finally:
            self._exchange.release()

    async def relay(self, write: Write) -> None:
        """Write the whole answer, or what there is of it and the error event.

        Raises:
            UncleanEnd: after the error event there must be nothing, no end either.
            ClientGone: from `write`; the answer ends as it does when its task is cancelled.
        """
        ended_by: Exception
        try:
            if not self._begun:
                await _written(write(b""))
            await self._relay(write)
        except ClientGone:
            raise
        except ApplianceError as error:
            told, ended_by = self._exchange.interrupted or error, UncleanEnd()
        except Exception as error:  # noqa: BLE001  # goes on to the server behind the error event
            # A defect: told and recorded like any failure. The server's log names it, and ends
            # the answer as uncleanly.
            told, ended_by = defect(), error
        else:
            return
        self._observed.end(told.code)
        data = encode_event(error_body(told))
        self._record.write(data)
        self._record.failed(told)
        await _written(write(data))
        raise ended_by

    async def _relay(self, write: Write) -> None:
        """Events and heartbeats, to the end."""
        while True:
            waiting = None
            # Entered for each heartbeat and not for each event, a tenth of which it would take.
            with trio.CancelScope(deadline=self._silent_since + self._limits.heartbeat_s):
                while waiting is None:
                    data = await self._source.receive()
                    if not data:
                        self._complete()
                        return
                    self._observe(data)
                    self._record.write(data)
                    waiting = write(data)
            if waiting is not None:
                await waiting
                self._silent_since = trio.current_time()
            elif trio.current_time() >= self._silent_since + self._limits.heartbeat_s:
                self._check_silence()
                self._record.write(PING)
                await _written(write(PING))
                self._silent_since = trio.current_time()

    def _complete(self) -> None:
        self._exchange.complete()
        if self._usage:
            self._observed.usage(find_usage(self._usage, self._limits))
        self._observed.end(COMPLETE)
        self._record.complete()

    def _observe(self, data: bytes) -> None:
        now = self._silent_since = trio.current_time()
        self._observed.events(data.count(b"\n\n"))
        if self._usage_asked and USAGE in data:
            self._usage = data
        self._deadline = now + self._limits.engine_idle_s

    def _check_silence(self) -> None:
        if trio.current_time() >= self._deadline:
            raise EngineStreamFailed("the engine has been silent for too long")


async def _written(waiting: Awaitable[None] | None) -> None:
    if waiting is not None:
        await waiting


class WholeAnswerBody(ResponseBody):
    """An answer in parts that are recorded as they are taken.

    It is complete only when it was `delivered`: a client that stops reading leaves with its parts.
    """

    def __init__(self, data: bytes, observed: ExchangeMetrics, record: ExchangeRecord) -> None:
        self._data = data
        self._observed = observed
        self._record = record
        self._part = b""
        self._next = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        self._record.write(self._part)  # asked for the next, this one was taken
        start, self._next = self._next, self._next + PART_BYTES
        self._part = self._data[start : self._next]
        if not self._part:
            raise StopAsyncIteration
        return self._part

    def delivered(self) -> None:
        """All of it was taken, and its end."""
        self._observed.end(COMPLETE)
        self._record.complete()


@dataclass(frozen=True, slots=True)
class StreamProof:
    """What a stream is to prove inside itself, and with what.

    Attributes:
        chunk: the members of the last checkpoint to the chunk that carries them.
        evidence_s: seconds that completion evidence may take.
    """

    wanted: Proof
    chunk: Callable[[JsonObject], JsonObject]
    epochs: Epochs
    evidence_s: float


class ProvenStreamBody(EventStreamBody):
    """A stream with signed checkpoints in it.

        events, `: dcv-checkpoint` every `checkpoint_s`, events, …   while the engine answers
        `: ping` lines                                               while evidence is awaited
        data: {…, "dcv": {…}}, data: [DONE]

    What the engine hands on are whole events, so what is put in between is never inside one. The
    last checkpoint names the bytes before its own event, and is committed to before evidence is
    collected; so a heartbeat of that time is a comment line at the beginning of that event.
    """

    def __init__(
        self,
        source: EventSource,
        exchange: Exchange,
        limits: Limits,
        observed: ExchangeMetrics,
        record: ExchangeRecord,
        *,
        begun: bool,
        first_deadline: float,
        usage_asked: bool,
        proof: StreamProof,
    ) -> None:
        """Take over an exchange; as `EventStreamBody`."""
        super().__init__(
            source,
            exchange,
            limits,
            observed,
            record,
            begun=begun,
            first_deadline=first_deadline,
            usage_asked=usage_asked,
        )
        self._proof = proof
        self._checkpoint_at = math.inf
        if proof.wanted.checkpoints:
            self._checkpoint_at = trio.current_time() + limits.checkpoint_s
        self._answered = False  # the engine's [DONE] has come
        self._proven = False  # ours has gone out
        self._core: Core | None = None
        self._member: Member | None = None
        self._heartbeat_at = self._evidence_until = math.inf
        self._waiting = trio.CancelScope()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._member is not None:
            self._proof.epochs.leave(self._member)
        await super().__aexit__(kind, error, traceback)

    async def _relay(self, write: Write) -> None:
        while not self._proven:
            self._heartbeat_at = trio.current_time() + self._limits.heartbeat_s
            data = b"" if self._answered else await self._event()
            if not data:
                data = await self._last_event()
            self._record.write(data)
            await _written(write(data))
        await super()._relay(write)  # the end

    async def _event(self) -> bytes:
        """Events of the engine's, a checkpoint or a heartbeat; b"" where only `[DONE]` came."""
        if trio.current_time() < self._checkpoint_at:
            with trio.move_on_at(min(self._heartbeat_at, self._checkpoint_at)):
                return self._without_done(await self._source.receive())
            self._check_silence()
        if trio.current_time() < self._checkpoint_at:
            return PING
        self._checkpoint_at = trio.current_time() + self._limits.checkpoint_s
        return checkpoint_comment(self._record.running_checkpoint())

    def _without_done(self, data: bytes) -> bytes:
        self._observe(data)
        self._answered = data.endswith(DONE_EVENT)
        if self._answered:
            self._exchange.complete()  # the engine has nothing left to be told
        return data.removesuffix(DONE_EVENT)

    async def _last_event(self) -> bytes:
        """The last checkpoint and `[DONE]`; or, as long as there is no evidence yet, a heartbeat."""
        assert self._answered
        wanted = self._proof.wanted
        if not wanted.at_end:
            self._proven = True
            return DONE_EVENT
        if self._core is None:
            self._core = self._record.final_core()
        attested = None
        if wanted.tee:
            attested = await self._completion_evidence(self._core)
            if attested is None:
                return PING_LINE
        chunk = self._proof.chunk(self._record.final_members(self._core, attested))
        if self._usage:
            # Told again: the openai package takes the last chunk's usage for the stream's.
            chunk["usage"] = find_usage(self._usage, self._limits)
        self._proven = True
        return encode_event(chunk) + DONE_EVENT

    async def _completion_evidence(self, core: Core) -> Attested | None:
        """Evidence that covers the core; None when a heartbeat is due.

        Raises:
            AttestationFailed: it could not be had in time, or it does not hold.
            ApplianceError: the exchange was interrupted; this is the reason.
        """
        proof, exchange = self._proof, self._exchange
        with evidence_refusals():
            if self._member is None:
                commitment = completion_commitment(core.to_json())
                self._member = proof.epochs.enter("completion", commitment)
                self._evidence_until = trio.current_time() + proof.evidence_s
                exchange.on_close(self._stop_waiting)
            until = min(self._heartbeat_at, self._evidence_until)
            if self._member.settled.is_set():  # while the client was slow to read
                until = math.inf
            with trio.move_on_at(until) as self._waiting:
                if exchange.interrupted is None:
                    return await self._member.wait()
        if exchange.interrupted is not None:
            raise exchange.interrupted
        if trio.current_time() >= self._evidence_until:
            raise evidence_late(proof.evidence_s)
        return None

    def _stop_waiting(self) -> None:
        self._waiting.cancel()
