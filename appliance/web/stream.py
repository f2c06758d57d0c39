"""The body of a streamed answer: events as they come, a heartbeat in silence, a true end.

A stream ends in one of two ways. Cleanly: `data: [DONE]`, then the end of the body. Otherwise:
one `data: {"error": …}` event and then *no* end: no last chunk on HTTP/1.1, RST_STREAM on HTTP/2.
Client libraries take a clean end without `[DONE]` for success, silently, so a failure must not
look like one. Raising out of the body is how an ASGI application says this to its server; see
`web.server`, which turns it into the unclean end.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import trio
from quart.wrappers.response import ResponseBody

from appliance.config import Limits
from appliance.errors import ApplianceError, EngineStreamFailed
from appliance.serving.admission import Exchange
from appliance.serving.exchanges import ExchangeRecord
from appliance.serving.metrics import COMPLETE, ExchangeMetrics
from appliance.serving.relay import EventSource, find_usage
from appliance.web.problem import error_body
from appliance.wire.sse import PING, encode_event

USAGE = b'"usage"'
"""What events contain that tell it. Inside a text the quotes would be escaped."""


class UncleanEnd(Exception):  # noqa: N818  # an instruction to the server, not an error
    """Raised through Quart into the server: the answer so far must not end cleanly."""


class EventStreamBody(ResponseBody):
    """Owns the exchange while Quart sends the body; leaving it releases the exchange.

    Quart enters it, iterates and leaves, all in the task that sends the answer, which is cancelled
    when the client goes away. The nursery of a merged source opens on entry and closes on exit, so
    nothing is yielded from inside one.
    """

    def __init__(
        self,
        source: EventSource,
        exchange: Exchange,
        limits: Limits,
        observed: ExchangeMetrics,
        record: ExchangeRecord,
        *,
        first_deadline: float,
        usage_asked: bool,
    ) -> None:
        """Take over an exchange.

        Args:
            first_deadline: on Trio's clock; the engine's first event comes before it.
            usage_asked: whether the engine was asked to tell the usage at the end.
        """
        self._source = source
        self._exchange = exchange
        self._limits = limits
        self._observed = observed
        self._record = record
        self._deadline = first_deadline
        self._usage_asked = usage_asked
        self._usage = b""  # the last events that may tell it
        self._failed = False

    async def __aenter__(self) -> Self:
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

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._failed:
            raise UncleanEnd
        try:
            return await self._next()
        except ApplianceError as error:
            self._failed = True
            told = self._exchange.interrupted or error
            self._observed.end(told.code)
            data = encode_event(error_body(told))
            self._record.write(data)
            self._record.failed(told)
            return data

    async def _next(self) -> bytes:
        with trio.move_on_after(self._limits.heartbeat_s):
            data = await self._source.receive()
            if not data:
                self._exchange.complete()
                if self._usage:
                    self._observed.usage(find_usage(self._usage, self._limits))
                self._observed.end(COMPLETE)
                self._record.complete()
                raise StopAsyncIteration
            self._observed.events(data.count(b"\n\n"))
            if self._usage_asked and USAGE in data:
                self._usage = data
            self._deadline = trio.current_time() + self._limits.engine_idle_s
            self._record.write(data)
            return data
        if trio.current_time() >= self._deadline:
            raise EngineStreamFailed("the engine has been silent for too long")
        self._record.write(PING)
        return PING
