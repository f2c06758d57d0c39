"""HTTP/1.1 on one connection: no upgrades, no ambiguous framing, and a client's end is seen.

Hypercorn's protocol class, with its event loop replaced. Its own stops reading while an answer
runs and the client has sent more, so that a client which pipelines and goes away is not noticed
until the answer ends. Here reading goes on, up to a bound.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import h11
from hypercorn.events import Closed, RawData, Updated
from hypercorn.protocol.events import Body, EndBody, Request
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.typing import H11SendableEvent

PIPELINED_BYTES = 1 << 16
"""Of requests that came before the answer to an earlier one had ended. Nobody pipelines on
purpose; past this the client waits, as with any full buffer."""

VERSIONS = (b"1.0", b"1.1")

OwnHeaders: TypeAlias = Callable[[], Sequence[tuple[bytes, bytes]]]

# h11 reads on where a line ends without CR and where the next one continues it (RFC 9112 sections
# 2.2 and 5.2 allow both, and to refuse both). Other readers see other fields there.
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_AMBIGUOUS_LINES = re.compile(rb"(?<!\r)\n|\n[ \t]")
_CHUNKED = b"\r\nTransfer-Encoding: chunked\r\n"
"""How h11 writes it in a head, where the application has not told the length."""

_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:%\[\]-]*")


class Http1Protocol(H11Protocol):
    """HTTP/1.1 without upgrades.

    Attributes:
        failed: the peer broke the protocol; nothing it sends will be understood any more.
    """

    connection: h11.Connection

    def __init__(
        self,
        *arguments: Any,
        wake: Callable[[], None],
        write_now: Callable[[bytes], Awaitable[None] | None],
        headers: OwnHeaders,
    ) -> None:
        """Hypercorn's, and three of the connection's own.

        Args:
            wake: makes the reading task call `resume`.
            write_now: None where the kernel took the bytes at once, else what to await.
            headers: of answers that are not the application's.
        """
        super().__init__(*arguments)
        self.failed = False
        self._wake = wake
        self._write_now = write_now
        self._headers = headers
        self._head = b""  # of an answer whose body is about to follow
        self._chunked = False

    @property
    def within_head(self) -> bool:
        """Whether the peer has sent a part of a request's head."""
        return self.stream is None and not self.failed and bool(self.connection.trailing_data[0])

    @property
    def full(self) -> bool:
        """Whether so much was pipelined that reading has to wait."""
        return (
            self.stream is not None
            and self.connection.their_state is h11.DONE
            and len(self.connection.trailing_data[0]) >= PIPELINED_BYTES
        )

    @property
    def unread(self) -> bool:
        """Whether the peer may still be sending what nobody will read."""
        return self.connection.their_state in (h11.SEND_BODY, h11.ERROR) or bool(
            self.connection.trailing_data[0]
        )

    def write_now(self, data: bytes) -> Awaitable[None] | None:
        """Send bytes of the running answer's body behind its head, if that has not left yet; None
        where the kernel took all at once, else what to await."""
        if not self._chunked or self.connection.our_state is not h11.SEND_BODY:
            return self.stream_send(Body(stream_id=STREAM_ID, data=data))
        # As h11 frames it (RFC 9112 section 7.1), without an event for each of three layers.
        if data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        return self._write_now(self._with_head(data))

    async def resume(self) -> None:
        """An answer has ended: go on with what was pipelined behind its request."""
        await self._handle_events()

    async def goodbye(self) -> None:
        """HTTP/1.1 has none."""

    async def _handle_events(self) -> None:
        while not self.failed:
            if self.connection.they_are_waiting_for_100_continue:
                await self._send_h11_event(h11.InformationalResponse(status_code=100, headers=[]))
            if self.connection.their_state is h11.IDLE and _ambiguous_lines(
                self.connection.trailing_data[0]
            ):
                await self._refuse(400)
                return
            try:
                event = self.connection.next_event()
            except h11.RemoteProtocolError as error:
                await self._refuse(error.error_status_hint)
                return
            if isinstance(event, h11.Request):
                await self.send(Updated(idle=False))
                await self._create_stream(event)
            elif self.stream is None:
                return  # NEED_DATA, or the rest of a request that has its answer
            elif isinstance(event, h11.Data):
                await self.stream.handle(Body(stream_id=STREAM_ID, data=event.data))
            elif isinstance(event, h11.EndOfMessage):
                await self.stream.handle(EndBody(stream_id=STREAM_ID))
            else:
                return  # NEED_DATA, PAUSED until the answer has ended, or ConnectionClosed

    async def _create_stream(self, request: h11.Request) -> None:
        """Open the one stream, always a plain one.

        A websocket upgrade is the plain request it also is (RFC 9110 section 7.8). HTTP/2 in clear
        text is not offered: over TLS the protocol was agreed by ALPN (RFC 9113 section 3.2).
        """
        path = _origin_form(request.target)
        if request.http_version not in VERSIONS:
            await self._refuse(505)
        elif path is None or _ambiguous_framing(request) or _bad_host(request):
            await self._refuse(400)
        else:
            self.stream = HTTPStream(
                self.app,
                self.config,
                self.context,
                self.task_group,
                self.ssl,
                self.client,
                self.server,
                self.stream_send,
                STREAM_ID,
            )
            await self.stream.handle(
                Request(
                    stream_id=STREAM_ID,
                    headers=[item for item in request.headers if item[0] != b"upgrade"],
                    http_version=request.http_version.decode(),
                    method=request.method.decode("ascii").upper(),
                    raw_path=path,
                    state=self.connection_state,
                )
            )

    async def _refuse(self, status: int) -> None:
        """Answer if no answer has begun, and end the connection."""
        self.failed = True
        if self.connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._send_error_response(status)
        await self.send(Closed())

    async def _send_error_response(self, status_code: int) -> None:
        own = [*self._headers(), (b"content-length", b"0"), (b"connection", b"close")]
        await self._send_h11_event(
            h11.Response(
                status_code=status_code, headers=[*own, *self.config.response_headers("h11")]
            )
        )
        await self._send_h11_event(h11.EndOfMessage())

    async def _send_h11_event(self, event: H11SendableEvent) -> None:
        """Send; the head of an answer leaves with what follows it, in one record and one packet."""
        try:
            data = self.connection.send(event)
        except h11.LocalProtocolError:
            if self.connection.their_state is not h11.ERROR:
                raise
            return
        assert data is not None  # only for a closed connection, which is no event we send
        if isinstance(event, h11.Response):
            self._head = data
            self._chunked = _CHUNKED in data
        else:
            await self.send(RawData(data=self._with_head(data)))

    def _with_head(self, data: bytes) -> bytes:
        head, self._head = self._head, b""
        return head + data

    async def _maybe_recycle(self) -> None:
        if self._head:  # nothing followed
            await self.send(RawData(data=self._with_head(b"")))
        await super()._maybe_recycle()
        if self.connection.trailing_data[0]:
            self._wake()


def _ambiguous_lines(data: bytes) -> bool:
    """Whether the head at the start of `data`, as far as it has come, has lines that readers
    divide differently."""
    end = _END_OF_HEAD.search(data)
    return _AMBIGUOUS_LINES.search(data, 0, end.end() if end else len(data)) is not None


def _bad_host(request: h11.Request) -> bool:
    """RFC 9112 section 3.2: a server MUST respond with 400 to an invalid Host. h11 has seen to it
    that there is one."""
    return not all(_HOST.fullmatch(value) for name, value in request.headers if name == b"host")


def _ambiguous_framing(request: h11.Request) -> bool:
    """Whether two readers could disagree where this request ends: request smuggling.

    RFC 9112 section 6.1: both framings at once "ought to be handled as an error", and one that
    HTTP/1.0 does not know MUST be taken for faulty. h11 refuses the rest by itself: two lengths,
    signs, other transfer codings.
    """
    names = {name for name, _ in request.headers}
    return b"transfer-encoding" in names and (
        b"content-length" in names or request.http_version == b"1.0"
    )


def _origin_form(target: bytes) -> bytes | None:
    """`/path?query`, which is all that is served here, also from `https://host/path?query`, which
    every server MUST accept (RFC 9112 section 3.2.2). None for anything else."""
    scheme, separator, rest = target.partition(b"://")
    if separator and scheme.lower() in (b"http", b"https"):
        _, slash, path = rest.partition(b"/")
        target = slash + path if slash else b"/"
    return target if target.startswith(b"/") else None
