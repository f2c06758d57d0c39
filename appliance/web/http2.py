"""HTTP/2 on one connection: what it holds is bounded, and one stream's trouble is its own.

Hypercorn's protocol class, with everything replaced through which a single client can harm the
others or itself: Hypercorn assumes that looked-up streams exist, that a writer may pass once
anything was sent, and that frames are sent for a reason.

    Http2Protocol   streams, answers, resets, the end of a connection
    StreamBuffer    back-pressure that blocks until the client reads, with a deadline
    Allowance       how many frames a client may send that move no request along
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trio
from h2.settings import SettingCodes
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, EndBody, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import BufferCompleteError, H2Protocol
from hyperframe.frame import DataFrame, Frame, HeadersFrame, RstStreamFrame
from priority.priority import MissingStreamError

MAX_STREAMS = 128
"""At once on one connection; RFC 9113 section 6.5.2 recommends no fewer than 100."""

MAX_CLOSED_STREAMS = 1024
"""Whose fate is remembered, for frames still on their way. h2's own default is 65536."""

BUFFER_BYTES = 1 << 15
"""Of one answer, between the application and the client's window: two frames."""

FRAME_BYTES = 1 << 14
"""A DATA frame of ours: what every client takes (RFC 9113 section 4.2), and one TLS record."""

PROGRESS_BYTES = 1 << 14
"""What a client has to take within the write deadline, so that a byte now and then is not enough
to hold a generation."""

DISCARD_BYTES = 1 << 26
"""Of a body whose request has its answer already, before the client is stopped by a reset. RFC 9113
section 8.1 lets us do that at once, but httpx then waits for ever, and others lose the answer."""

ENCODER_TABLE_BYTES = 4096
"""Our HPACK table. A client may offer 4 GiB, which would then fill, and be searched, for ever."""

# Frames that move no request along, as a bucket that refills. The reset limit is Netty's (200 in
# 30 s, against CVE-2023-44487), for the client's resets and for those it has us send alike
# (CVE-2025-8671); the other one is above Jetty's (128 a second) for its burst.
RESET_BURST, RESETS_PER_S = 200, 200 / 30
CONTROL_BURST, CONTROL_PER_S = 1000, 128.0

WINDOW_UPDATES_PER_FRAME = 2
"""What a DATA frame of ours may rightly be answered with: one for the stream, one for the
connection."""

CONTROL_BYTES = frozenset(range(0x21)) | {0x7F}


class Allowance:
    """A bucket of so many frames, refilled over time."""

    def __init__(self, burst: float, per_s: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._left = burst
        self._at = trio.current_time()

    def spend(self) -> None:
        """Take one.

        Raises:
            h2.exceptions.DenialOfServiceError: none is left; h2 then says ENHANCE_YOUR_CALM.
        """
        now = trio.current_time()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            raise h2.exceptions.DenialOfServiceError("too many frames")
        self._left -= 1

    def earn(self, frames: int) -> None:
        """Put some back: there was a reason to send them."""
        self._left = min(self._burst, self._left + frames)


class GuardedConnection(h2.connection.H2Connection):
    """h2's connection, counting frames as they are parsed, so that none goes uncounted."""

    MAX_CLOSED_STREAMS = MAX_CLOSED_STREAMS

    def __init__(self, *, max_header_list_bytes: int) -> None:
        super().__init__(h2.config.H2Configuration(client_side=False, header_encoding=None))
        # Hypercorn also offers websockets over HTTP/2 here (RFC 8441), which we refuse.
        self.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                SettingCodes.MAX_HEADER_LIST_SIZE: max_header_list_bytes,
            },
        )
        # What is told is not yet what is done: h2 takes a setting over when it *changes*.
        self.decoder.max_header_list_size = max_header_list_bytes
        self.resets = Allowance(RESET_BURST, RESETS_PER_S)
        self.controls = Allowance(CONTROL_BURST, CONTROL_PER_S)
        self.greeted = False
        self._parsing = False

    @property
    def within_headers(self) -> bool:
        """Whether a header block has begun and not ended; h2 bounds its CONTINUATIONs to 64."""
        return bool(self.incoming_buffer._headers_buffer)  # noqa: SLF001  # h2 shows it nowhere

    def _receive_frame(self, frame: Frame) -> list[h2.events.Event]:
        self.greeted = True
        if isinstance(frame, RstStreamFrame):
            self.resets.spend()
        elif isinstance(frame, HeadersFrame):
            self.controls.earn(WINDOW_UPDATES_PER_FRAME)
        elif not isinstance(frame, DataFrame) or not (frame.data or "END_STREAM" in frame.flags):
            self.controls.spend()
        self._parsing = True
        try:
            events = super()._receive_frame(frame)
        finally:
            self._parsing = False
        for event in events:
            if isinstance(event, h2.events.RequestReceived) and not _can_be_meant(event):
                self.resets.spend()
        return events

    def _prepare_for_sending(self, frames: list[Frame]) -> None:
        """A reset that answers a frame is the client's doing; one that ends an answer is not."""
        if self._parsing:
            for frame in frames:
                if isinstance(frame, RstStreamFrame):
                    self.resets.spend()
        super()._prepare_for_sending(frames)


class StreamBuffer:
    """Bytes of one answer on their way to the client; Hypercorn's interface.

    Hypercorn's own lets a writer pass as soon as anything was sent, so a client that opens no
    window makes it hold the whole answer. Here a writer waits until there is room again, and a
    client that takes next to nothing for `write_s` is given up.
    """

    def __init__(self, *, write_s: float, on_stalled: Callable[[], Awaitable[None]]) -> None:
        self._buffer = bytearray()
        self._write_s = write_s
        self._on_stalled = on_stalled
        self._taken = 0
        self._moved = trio.Event()
        self._closed = False
        self._lost = False
        self.finished = False  # the application has said all it will say

    @property
    def complete(self) -> bool:
        """Whether nothing more will come out."""
        return self._closed or (self.finished and not self._buffer)

    def set_complete(self) -> None:
        """The application has sent its last byte."""
        self.finished = True

    async def close(self) -> None:
        """The stream is over, sent or not: let go of everything that waits."""
        self._closed = True
        self._lost = self._lost or bool(self._buffer)
        self._buffer.clear()
        self._wake()

    async def push(self, data: bytes) -> None:
        """Add bytes; returns once there is room for more.

        Raises:
            BufferCompleteError: the client is gone, or has not read for too long.
        """
        if self._closed or self.finished:
            raise BufferCompleteError
        self._buffer += data
        await self._wait_below(BUFFER_BYTES)
        if self._closed:
            raise BufferCompleteError

    async def drain(self) -> None:
        """Wait until everything was handed to the connection; with `finished`, the end too.

        Raises:
            BufferCompleteError: the client is gone, or has not read for too long.
        """
        await self._wait_below(0 if self.finished else 1)
        if self._lost:
            raise BufferCompleteError

    async def pop(self, max_length: int) -> bytes:
        """Take at most so many bytes, for sending now."""
        data = bytes(self._buffer[:max_length])
        if data:
            del self._buffer[:max_length]
            self._taken += len(data)
            self._wake()
        return data

    async def _wait_below(self, size: int) -> None:
        def waiting() -> bool:
            return len(self._buffer) >= size and not self._closed

        while waiting():
            goal = self._taken + PROGRESS_BYTES
            with trio.move_on_after(self._write_s) as deadline:
                while waiting() and self._taken < goal:
                    await self._moved.wait()
            if deadline.cancelled_caught:
                await self._on_stalled()
                raise BufferCompleteError

    def _wake(self) -> None:
        moved, self._moved = self._moved, trio.Event()
        moved.set()


class Http2Protocol(H2Protocol):
    """HTTP/2 that bounds what it holds and never takes the connection down for one stream.

    Attributes:
        failed: the peer broke the protocol, GOAWAY has been said.
    """

    connection: GuardedConnection

    def __init__(self, *arguments: Any, write_s: float) -> None:
        """A client that reads next to nothing for `write_s` is given up; the rest is Hypercorn's."""
        super().__init__(*arguments)
        self.connection = GuardedConnection(
            max_header_list_bytes=self.config.h2_max_header_list_size
        )
        self.failed = False
        self.full = False  # reading never has to wait: windows do that here
        self.buffers: dict[int, StreamBuffer] = {}
        self.stream_buffers = self.buffers  # type: ignore[assignment]  # same interface, ours
        self._write_s = write_s
        self._receiving: dict[int, int] = {}  # requests without their end yet: bytes discarded

    @property
    def within_head(self) -> bool:
        """Whether the peer owes its preface, or the rest of a header block."""
        return not self.failed and (not self.connection.greeted or self.connection.within_headers)

    @property
    def unread(self) -> bool:
        """Whether the peer may still be sending what nobody will read."""
        return self.failed or bool(self._receiving)

    async def resume(self) -> None:
        """Nothing is ever left unparsed."""

    async def goodbye(self) -> None:
        """Tell the peer that no stream will be served any more.

        Not before the last stream has ended: h2, on either side, takes a GOAWAY for the end of
        everything, so that a Python client would lose the answers it was told to wait for.
        """
        if not self.failed and not self.closed:
            with contextlib.suppress(h2.exceptions.ProtocolError):
                self.connection.close_connection()
            await self._flush()

    async def handle(self, event: Event) -> None:
        """Bytes from the peer, or the end of the connection."""
        if isinstance(event, RawData):
            try:
                events = self.connection.receive_data(event.data)
            except h2.exceptions.ProtocolError:
                self.failed = True
                await self.config.log.debug("HTTP/2 protocol error")
                await self._flush()
                await self.send(Closed())
            else:
                await self._handle_events(events)
        elif isinstance(event, Closed):
            self.closed = True
            for buffer in tuple(self.buffers.values()):
                await buffer.close()
            for stream_id in tuple(self.streams):
                await self._close_stream(stream_id)
            await self.has_data.set()

    async def stream_send(self, event: StreamEvent) -> None:
        """What the application says on a stream.

        Raises:
            BufferCompleteError: of a body, that not all of it goes out; a head or an end on a stream
                that is gone is dropped.
        """
        buffer = self.buffers.get(event.stream_id)
        if isinstance(event, StreamClosed):
            await self._end(event.stream_id, buffer)
        elif isinstance(event, Body | EndBody):
            if buffer is None:
                raise BufferCompleteError
            with contextlib.suppress(MissingStreamError):
                self.priority.unblock(event.stream_id)
            await self.has_data.set()
            if isinstance(event, Body):
                await buffer.push(event.data)
            else:
                buffer.set_complete()
                await buffer.drain()
        elif buffer is None:
            return
        else:
            await super().stream_send(event)

    async def _end(self, stream_id: int, buffer: StreamBuffer | None) -> None:
        """The application is done with a stream."""
        if buffer is not None and not buffer.finished:
            # Its answer was broken off: what was said before still goes out, then a reset.
            with contextlib.suppress(BufferCompleteError):
                await buffer.drain()
            await self._reset(stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
        await self._close_stream(stream_id)
        if not self.streams:
            await self.send(Updated(idle=True))

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            match event:
                case h2.events.RequestReceived():
                    await self._create_stream(event)
                case h2.events.DataReceived():
                    await self._receive_body(event)
                case h2.events.StreamEnded(stream_id=int(stream_id)):
                    self._receiving.pop(stream_id, None)
                    if stream_id in self.streams:
                        await self.streams[stream_id].handle(EndBody(stream_id=stream_id))
                case h2.events.StreamReset(stream_id=int(stream_id)):
                    self._receiving.pop(stream_id, None)
                    await self._forget(stream_id)
                    await self._close_stream(stream_id)
                case h2.events.WindowUpdated(stream_id=stream_id):
                    await self._window_updated(stream_id)
                case h2.events.RemoteSettingsChanged():
                    self._bound_encoder()
                    await self._window_updated(None)
                case h2.events.ConnectionTerminated():
                    await self.send(Closed())
                case _:  # acknowledgements, and priorities, which RFC 9113 section 5.3 retired
                    pass
        await self._flush()

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        """Open a stream for a request that we serve; reset the stream of any other."""
        stream_id = request.stream_id
        assert stream_id is not None
        if self.context.terminated.is_set():
            # The client may retry elsewhere: nothing was done (RFC 9113 section 8.7).
            await self._reset(stream_id, h2.errors.ErrorCodes.REFUSED_STREAM)
        elif not _can_be_meant(request):
            await self._reset(stream_id, h2.errors.ErrorCodes.PROTOCOL_ERROR)
        else:
            self._receiving[stream_id] = 0
            await self.send(Updated(idle=False))
            await super()._create_stream(request)
            # Only what was awaited above lets others run, and none of it sends on this stream.
            self.buffers[stream_id] = StreamBuffer(
                write_s=self._write_s, on_stalled=partial(self._give_up, stream_id)
            )

    async def _receive_body(self, event: h2.events.DataReceived) -> None:
        stream_id, data = event.stream_id, event.data or b""
        assert stream_id is not None
        if stream_id in self.streams:
            await self.streams[stream_id].handle(Body(stream_id=stream_id, data=data))
        elif stream_id in self._receiving:
            # Answered already: a refusal, mostly.
            self._receiving[stream_id] += len(data)
            if self._receiving[stream_id] > DISCARD_BYTES:
                await self._reset(stream_id, h2.errors.ErrorCodes.NO_ERROR)
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self.connection.acknowledge_received_data(event.flow_controlled_length or 0, stream_id)

    async def _send_data(self, stream_id: int) -> None:
        """Send one frame of a stream that has something to say, or let it wait."""
        buffer = self.buffers.get(stream_id)
        try:
            window = self.connection.local_flow_control_window(stream_id)
            room = max(0, min(window, self.connection.max_outbound_frame_size, FRAME_BYTES))
            data = b"" if buffer is None else await buffer.pop(room)
            ended = buffer is None or buffer.complete
            if data or ended:
                self.connection.send_data(stream_id, data, end_stream=ended)
        except h2.exceptions.ProtocolError:  # the stream or the connection is gone
            await self._forget(stream_id)
            return
        if not data and not ended:
            self.priority.block(stream_id)
            return
        self.connection.controls.earn(WINDOW_UPDATES_PER_FRAME)
        await self._flush()
        if ended:
            await self._forget(stream_id)

    async def _window_updated(self, stream_id: int | None) -> None:
        for waiting in tuple(self.buffers) if not stream_id else (stream_id,):
            with contextlib.suppress(MissingStreamError):
                self.priority.unblock(waiting)
        await self.has_data.set()

    def _bound_encoder(self) -> None:
        encoder = self.connection.encoder
        if encoder.header_table_size > ENCODER_TABLE_BYTES:  # noqa: PLR1730  # see below
            # Only then: hpack forgets to announce a change when the same size is set once more.
            encoder.header_table_size = ENCODER_TABLE_BYTES

    async def _give_up(self, stream_id: int) -> None:
        """The client has not read for too long: end the stream and tell the application."""
        await self.config.log.info("HTTP/2 stream given up: the client does not read")
        await self._reset(stream_id, h2.errors.ErrorCodes.CANCEL)
        await self._close_stream(stream_id)

    async def _reset(self, stream_id: int, code: h2.errors.ErrorCodes) -> None:
        await self._forget(stream_id)
        self._receiving.pop(stream_id, None)
        try:
            self.connection.reset_stream(stream_id, code)
        except h2.exceptions.ProtocolError:
            return  # the stream or the connection is closed already
        await self._flush()

    async def _forget(self, stream_id: int) -> None:
        """Nothing more is sent on this stream."""
        buffer = self.buffers.pop(stream_id, None)
        if buffer is not None:
            await buffer.close()
        with contextlib.suppress(MissingStreamError):
            self.priority.remove_stream(stream_id)


def _can_be_meant(request: h2.events.RequestReceived) -> bool:
    """Whether Hypercorn can serve a request whose head h2 has found well-formed: it assumes an
    ASCII `:path` and a method other than CONNECT."""
    pseudo = {name: value for name, value in request.headers or [] if name[:1] == b":"}
    path, method = pseudo.get(b":path", b""), pseudo.get(b":method", b"")
    return method != b"CONNECT" and method.isascii() and _is_plain(path)


def _is_plain(path: bytes) -> bool:
    """Whether this is an origin-form path of visible ASCII (RFC 3986 section 2)."""
    return path.startswith(b"/") and path.isascii() and CONTROL_BYTES.isdisjoint(path)
