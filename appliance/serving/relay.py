"""From the engine's answer to the client's bytes.

    engine.client ── EngineStream ──┐
    engine.client ── EngineStream ──┴─ MergedStream ── web.stream ── client

Events are handed on as the bytes they came in. Nothing is decoded per token unless several
engine answers must become one. Nothing here waits with a deadline: whoever calls `start` or
`receive` sets one, and both may be cancelled and called again without losing a byte.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import trio

from appliance.config import Limits
from appliance.engine.client import (
    EngineAddress,
    EngineConnection,
    EngineResponse,
    error_event_reason,
    read_refusal,
)
from appliance.errors import (
    EngineError,
    EngineProtocolError,
    EngineStreamFailed,
    EngineUnavailable,
    Malformed,
    Overloaded,
)
from appliance.serving.aborts import Aborts
from appliance.serving.admission import Exchange
from appliance.serving.workers import LARGE_BYTES, Work
from appliance.wire.answers import ChunkMerger, merge_answers
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json, parse_json_object
from appliance.wire.openai import (
    ChoicePlan,
    InferenceRequest,
    forwarded_bodies,
    forwarded_body,
)
from appliance.wire.output import decode_embeddings, encode_answer
from appliance.wire.receipt import forwarded_hash
from appliance.wire.sse import DONE_EVENT, Block, BlockReader, encode_event, split_events


class EventSource(Protocol):
    """A stream of SSE events. Entered around `receive`; `start` comes before."""

    async def start(self) -> None:
        """Wait until the engine has begun to answer; raise what it refuses with."""

    async def receive(self) -> bytes:
        """The bytes of at least one event, `[DONE]` included; b"" once after the last."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def connect(address: EngineAddress, exchange: Exchange, *, count: int) -> list[EngineConnection]:
    """Begin to connect to the engine, for so many requests; nothing is sent.

    The connections belong to the exchange from here on: its end closes them.

    Raises:
        EngineUnavailable: there is no descriptor left to ask it with.
    """
    connections = list[EngineConnection]()
    for _ in range(count):
        connection = EngineConnection(address)
        exchange.on_close(connection.close)
        connections.append(connection)
    return connections


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What the engine is to get of a request.

    Attributes:
        body_hash: over all bodies, as the receipt has it, 32 bytes.
        bodies: one for each plan; none where they are too large to be kept until they are sent,
            and are made again then.
    """

    body_hash: bytes
    bodies: tuple[bytes, ...] = field(repr=False)


def prepare(body: JsonObject, plans: Sequence[ChoicePlan]) -> Outgoing:
    """Make what is forwarded of a request; takes as long as it is large."""
    kept, size = list[bytes](), 0

    def each() -> Iterator[bytes]:
        nonlocal size
        for made in forwarded_bodies(body, plans):
            size += len(made)
            if size < LARGE_BYTES:
                kept.append(made)
            yield made

    body_hash = forwarded_hash(each())
    return Outgoing(body_hash, tuple(kept) if size < LARGE_BYTES else ())


async def forward(
    connections: Sequence[EngineConnection],
    request: InferenceRequest,
    plans: Sequence[ChoicePlan],
    outgoing: Outgoing,
    exchange: Exchange,
    aborts: Aborts,
    *,
    work: Work,
    until: float,
) -> list[EngineResponse]:
    """Send the engine one request per planned choice.

    The end of the exchange aborts what the engine has not answered completely.

    Args:
        connections: of the exchange, one for each plan.
        outgoing: as `prepare` made it.
        work: how to put a body of this size in canonical form.
        until: when all of them must have been sent, on Trio's clock.

    Raises:
        EngineUnavailable: the engine does not take them.
        EngineStreamFailed: they could not be sent in time.
        ApplianceError: the exchange was interrupted; what was not sent yet is never sent.
    """
    path = request.endpoint.value
    responses = []
    for number, (connection, plan) in enumerate(zip(connections, plans, strict=True)):
        if outgoing.bodies:
            body = outgoing.bodies[number]
        else:
            try:
                body = await work(partial(forwarded_body, request.body, plan))
            except Overloaded as error:
                raise EngineUnavailable(f"the request was not sent: {error.message}") from error
        if "rid" in plan.set:  # embeddings have none; the engine notices when nobody listens
            exchange.on_abandon(partial(aborts.add, str(plan.set["rid"])))
        if exchange.interrupted is not None:
            raise exchange.interrupted
        if trio.current_time() >= until:
            raise EngineStreamFailed("the request could not be sent in time")
        if not connection.ask_now("POST", path, body):
            try:
                await exchange.unless_interrupted(connection.ask_rest, until=until)
            except trio.TooSlowError:
                raise EngineStreamFailed("the engine did not take the request in time") from None
        responses.append(EngineResponse(connection))
    return responses


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer that was not streamed.

    Attributes:
        data: its JSON, the engine's own bytes where there is one choice.
        value: what these bytes say.
    """

    data: bytes = field(repr=False)
    value: JsonObject = field(repr=False)


async def collect_answer(
    responses: Sequence[EngineResponse],
    plans: Sequence[ChoicePlan],
    limits: Limits,
    *,
    response_id: str,
    work_for: Callable[[int], Work],
) -> Answer:
    """The whole answer of a request that is not streamed.

    Args:
        work_for: how to read an answer of so many bytes.

    Raises:
        EngineError: the engine refused, failed, or answered something that is not an answer.
        Overloaded: too many answers are being read.
    """
    bodies: list[bytes] = [b""] * len(responses)

    async def collect(number: int) -> None:
        bodies[number] = await _answer_body(responses[number], limits)

    if len(responses) == 1:
        await collect(0)
    else:
        await _all_or_first_error([partial(collect, n) for n in range(len(responses))])
    read = partial(_read_answers, bodies, plans, limits, response_id=response_id)
    return await work_for(sum(map(len, bodies)))(read)


def _read_answers(
    bodies: Sequence[bytes], plans: Sequence[ChoicePlan], limits: Limits, *, response_id: str
) -> Answer:
    try:
        answers = [parse_json_object(body, max_nesting=limits.max_nesting) for body in bodies]
        if len(answers) == 1:
            return Answer(bodies[0], answers[0])
        merged = merge_answers(answers, plans, response_id=response_id)
        return Answer(canonical_json(merged), merged)
    except Malformed as error:
        raise EngineProtocolError(f"the engine's answer: {error.message}") from error


async def collect_embeddings(
    response: EngineResponse,
    request: InferenceRequest,
    limits: Limits,
    *,
    work_for: Callable[[int], Work],
) -> Answer:
    """The embeddings of a request, under the model's public name: SGLang tells its folder.

    Args:
        work_for: as `collect_answer`.

    Raises:
        EngineError: the engine refused, failed, or answered something else than one embedding for
            each text, all of one length and of finite binary32 numbers.
        Overloaded: as `collect_answer`.
    """
    body = await _answer_body(response, limits)
    return await work_for(len(body))(partial(_read_embeddings, body, request))


def _read_embeddings(body: bytes, request: InferenceRequest) -> Answer:
    try:
        embeddings = decode_embeddings(body)
        count = len(embeddings.vectors())
    except Malformed as error:
        raise EngineProtocolError(f"the engine's answer: {error.message}") from error
    if count != request.inputs:
        raise EngineProtocolError(f"expected {request.inputs} embeddings, got {count}")
    value = embeddings.answer(model=request.model)
    return Answer(encode_answer(value), value)


def find_usage(events: bytes, limits: Limits) -> JsonValue:
    """The last `usage` that events tell, None when they tell none.

    Args:
        events: whole ones, as `EventSource.receive` returned them.
    """
    usage: JsonValue = None
    for event in split_events(events.removesuffix(DONE_EVENT)):
        try:
            told = parse_json_object(event, max_nesting=limits.max_nesting).get("usage")
        except Malformed:  # handed on all the same; it is the client's to judge
            continue
        usage = usage if told is None else told
    return usage


def event_source(
    responses: Sequence[EngineResponse],
    plans: Sequence[ChoicePlan],
    limits: Limits,
    *,
    response_id: str,
) -> EventSource:
    """The event stream of a streamed request."""
    streams = [EngineStream(response, limits) for response in responses]
    if len(streams) == 1:
        return streams[0]
    return MergedStream(streams, plans, limits, response_id=response_id)


class EngineStream:
    """The events of one engine answer."""

    def __init__(self, response: EngineResponse, limits: Limits) -> None:
        self._response = response
        self._reader = BlockReader(max_event_bytes=limits.max_event_bytes)
        self._started = False
        self._first: Block | None = None
        self._failed: EngineError | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._response.close()

    async def start(self) -> None:
        """As `EventSource.start`.

        The first events come with the head, and SGLang reports some mistakes of the client as an
        error event behind a 200. So the first block is looked at before the client gets a head.

        Raises:
            EngineRefused, EngineUnavailable, EngineStreamFailed, EngineProtocolError.
        """
        if self._started:
            return
        head = await self._response.head()
        if head.status != 200:
            raise await read_refusal(self._response)
        if not head.headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            raise EngineProtocolError("expected an event stream from the engine")
        self._first = await self._read_block()
        self._started = True

    async def receive(self) -> bytes:
        """As `EventSource.receive`.

        Raises:
            EngineRefused, EngineStreamFailed: an error event, or the end before `[DONE]`.
            EngineProtocolError: not events as SGLang writes them.
        """
        block = await self.receive_block()
        if block is None:
            return b""
        return block.data + DONE_EVENT if block.done else block.data

    async def receive_block(self) -> Block | None:
        """The next block with at least one event or the terminator; None after the terminator.

        Raises:
            EngineError: as for `receive`.
        """
        if not self._started:
            await self.start()
        if self._first is not None:
            block, self._first = self._first, None
            return block
        if self._failed is not None:
            raise self._failed
        return None if self._reader.done else await self._read_block()

    async def _read_block(self) -> Block:
        while True:
            data = await self._response.receive()
            if not data:
                raise EngineStreamFailed("the engine ended its answer before it was complete")
            try:
                block = self._reader.feed(data)
            except Malformed as error:
                raise EngineProtocolError(f"the engine's events: {error.message}") from error
            if block is None:
                continue
            if block.error is not None:
                self._failed = error_event_reason(block.error)
                if not block.data:
                    raise self._failed
            return block


class MergedStream:
    """Several engine answers as one stream, in the order their events arrive.

    Entering opens the nursery of the tasks that read; leaving cancels them. A channel without a
    buffer joins them, so a client that does not read stops all of them.
    """

    def __init__(
        self,
        streams: Sequence[EngineStream],
        plans: Sequence[ChoicePlan],
        limits: Limits,
        *,
        response_id: str,
    ) -> None:
        self._streams = streams
        self._plans = plans
        self._max_nesting = limits.max_nesting
        self._merger = ChunkMerger(plans, response_id=response_id)
        self._send, self._receive = trio.open_memory_channel[bytes | EngineError](0)
        self._manager: AbstractAsyncContextManager[trio.Nursery] = trio.open_nursery()
        self._nursery: trio.Nursery | None = None
        self._ended = False

    async def start(self) -> None:
        """As `EventSource.start`, for all of them."""
        await _all_or_first_error([stream.start for stream in self._streams])

    async def __aenter__(self) -> Self:
        self._nursery = await self._manager.__aenter__()
        for stream, plan in zip(self._streams, self._plans, strict=True):
            self._nursery.start_soon(self._read, stream, plan, self._send.clone())
        self._send.close()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()
        await self._manager.__aexit__(kind, error, traceback)

    async def receive(self) -> bytes:
        """As `EventSource.receive`."""
        if self._ended:
            return b""
        try:
            item = await self._receive.receive()
        except trio.EndOfChannel:
            self._ended = True
            usage = self._merger.usage_chunk()
            return (encode_event(usage) if usage is not None else b"") + DONE_EVENT
        if isinstance(item, EngineError):
            raise item
        return item

    async def _read(
        self,
        stream: EngineStream,
        plan: ChoicePlan,
        send: trio.MemorySendChannel[bytes | EngineError],
    ) -> None:
        """Hand on one stream's events; its failure travels to the reader as a value."""
        with send:
            try:
                while (block := await stream.receive_block()) is not None:
                    if events := self._rewrite(block, plan):
                        await send.send(events)
            except EngineError as error:
                await send.send(error)

    def _rewrite(self, block: Block, plan: ChoicePlan) -> bytes:
        chunks: list[JsonObject | None] = []
        try:
            for event in split_events(block.data):
                chunk = parse_json_object(event, max_nesting=self._max_nesting)
                chunks.append(self._merger.rewrite(chunk, plan))
        except Malformed as error:
            raise EngineProtocolError(f"the engine's events: {error.message}") from error
        return b"".join(encode_event(chunk) for chunk in chunks if chunk is not None)


async def _answer_body(response: EngineResponse, limits: Limits) -> bytes:
    if (await response.head()).status != 200:
        raise await read_refusal(response)
    return await response.read_all(limit_bytes=limits.max_response_bytes)


async def _all_or_first_error(tasks: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run all; the first EngineError ends the others and is raised by itself, not in a group."""
    failures: list[EngineError] = []

    async def run(task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except EngineError as error:
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(run, task)
    if failures:
        raise failures[0]
