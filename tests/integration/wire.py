"""Clients that do what no client library lets one do: TLS by hand, HTTP/2 frame by frame."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import trio
from hpack import Decoder, Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW = 65_535  # what a peer may send before it hears of more (RFC 9113 section 6.9.2)
PATIENCE_S = 15.0  # for what must come; a test that waits so long has failed

AnyFrame = TypeVar("AnyFrame", bound=Frame)
Header = tuple[str | bytes, str | bytes]


class Target(Protocol):
    """Where to connect to, and whom to trust there."""

    @property
    def port(self) -> int: ...
    @property
    def trust(self) -> ssl.SSLContext: ...


@dataclass
class Address:
    port: int
    trust: ssl.SSLContext


async def connect_tcp(port: int, *, receive_bytes: int | None = None) -> trio.SocketStream:
    """`receive_bytes`: size of the kernel's buffer; small, so that a stalled reader shows soon."""
    stream_socket = trio.socket.socket()
    if receive_bytes is not None:
        stream_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    try:
        await stream_socket.connect(("127.0.0.1", port))
    except BaseException:
        stream_socket.close()
        raise
    return trio.SocketStream(stream_socket)


def reset(stream: trio.SocketStream) -> None:
    """Close so that the kernel sends RST."""
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


class Wire:
    """A TLS connection by hand."""

    protocol = "http/1.1"

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream

    @classmethod
    @asynccontextmanager
    async def open(cls, target: Target, *, receive_bytes: int | None = None) -> AsyncIterator[Self]:
        context = target.trust
        context.set_alpn_protocols([cls.protocol])
        tcp = await connect_tcp(target.port, receive_bytes=receive_bytes)
        stream = trio.SSLStream(tcp, context, server_hostname="127.0.0.1", https_compatible=True)
        try:
            with trio.fail_after(PATIENCE_S):
                await stream.do_handshake()
            yield cls(stream)
        finally:
            tcp.socket.close()

    async def send(self, data: bytes) -> bool:
        """Send; False when the other side is gone."""
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True

    async def receive(self) -> bytes:
        """What comes next; nothing when the other side is gone."""
        try:
            return bytes(await self.stream.receive_some(65_536))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def read_to_end(self) -> bytes:
        """Everything until the other side closes, which it has to do soon."""
        everything = b""
        with trio.fail_after(PATIENCE_S):
            while data := await self.receive():
                everything += data
        return everything

    async def read_until(self, text: bytes) -> bytes:
        everything = b""
        with trio.fail_after(PATIENCE_S):
            while text not in everything:
                data = await self.receive()
                assert data, f"closed before {text!r}: {everything!r}"
                everything += data
        return everything

    def reset(self) -> None:
        reset(self.stream.transport_stream)

    def drop(self) -> None:
        self.stream.transport_stream.socket.close()


class FrameWire(Wire):
    """HTTP/2 by hand.

    Attributes:
        frames: every frame received.
    """

    protocol = "h2"

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        super().__init__(stream)
        self.frames = list[Frame]()
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._buffer = b""
        self._headers = dict[int, list[tuple[str, str]]]()

    async def greet(self, settings: dict[int, int] | None = None) -> None:
        await self.send(PREFACE + SettingsFrame(0, settings=settings or {}).serialize())

    async def send_frames(self, *frames: Frame) -> bool:
        return await self.send(b"".join(frame.serialize() for frame in frames))

    def head(
        self, stream_id: int, headers: Iterable[Header], *, end_stream: bool = False
    ) -> HeadersFrame:
        flags = ["END_HEADERS", "END_STREAM"] if end_stream else ["END_HEADERS"]
        return HeadersFrame(stream_id, data=self._encoder.encode(list(headers)), flags=flags)

    def get(self, stream_id: int, path: str = "/health") -> HeadersFrame:
        return self.head(stream_id, request_headers("GET", path), end_stream=True)

    def post(self, stream_id: int, path: str, body: bytes, *more: Header) -> list[Frame]:
        headers = [*request_headers("POST", path), ("content-type", "application/json"), *more]
        return [
            self.head(stream_id, headers),
            DataFrame(stream_id, data=body, flags=["END_STREAM"]),
        ]

    async def next_frame(self) -> Frame | None:
        """The next frame; None when the connection has ended."""
        while True:
            if len(self._buffer) >= 9:
                frame, length = Frame.parse_frame_header(memoryview(self._buffer[:9]))
                if len(self._buffer) >= 9 + length:
                    frame.parse_body(memoryview(self._buffer[9 : 9 + length]))
                    self._buffer = self._buffer[9 + length :]
                    self.frames.append(frame)
                    if isinstance(frame, HeadersFrame):
                        # Always: the table that blocks share must see each one, in order.
                        decoded = self._decoder.decode(frame.data)
                        self._headers[frame.stream_id] = [(str(n), str(v)) for n, v in decoded]
                    return frame
            data = await self.receive()
            if not data:
                return None
            self._buffer += data

    async def wait_for(self, kind: type[AnyFrame], stream_id: int | None = None) -> AnyFrame:
        """Read until a frame of this kind comes (on this stream)."""
        with trio.fail_after(PATIENCE_S):
            while True:
                frame = await self.next_frame()
                assert frame is not None, f"closed before {kind.__name__}: {self.frames[-5:]}"
                if isinstance(frame, kind) and stream_id in (None, frame.stream_id):
                    return frame

    async def read_frames_to_end(self) -> list[Frame]:
        with trio.fail_after(PATIENCE_S):
            while await self.next_frame() is not None:
                pass
        return self.frames

    async def status(self, stream_id: int) -> int:
        """Status of the answer on a stream."""
        return int((await self.headers(stream_id))[":status"])

    async def headers(self, stream_id: int) -> dict[str, str]:
        """Head of the answer on a stream."""
        while stream_id not in self._headers:
            await self.wait_for(HeadersFrame, stream_id)
        return dict(self._headers[stream_id])

    async def wait_for_end(self, stream_id: int) -> bytes:
        """The body of an answer that ends cleanly."""
        while not any(
            frame.stream_id == stream_id and "END_STREAM" in frame.flags for frame in self.frames
        ):
            with trio.fail_after(PATIENCE_S):
                frame = await self.next_frame()
            assert frame is not None, self.frames[-5:]
            if isinstance(frame, RstStreamFrame) and frame.stream_id == stream_id:
                raise AssertionError(f"reset with {frame.error_code}")
        return self.body(stream_id)

    def body(self, stream_id: int) -> bytes:
        """What came so far."""
        return b"".join(
            frame.data
            for frame in self.frames
            if isinstance(frame, DataFrame) and frame.stream_id == stream_id
        )


def request_headers(method: str, path: str) -> list[Header]:
    return [
        (":method", method),
        (":scheme", "https"),
        (":authority", "localhost"),
        (":path", path),
    ]


class RawFrame(Frame):
    """Bytes that hyperframe would not write."""

    def __init__(self, kind: int, stream_id: int, body: bytes, flags: int) -> None:
        super().__init__(stream_id)
        self._bytes = (
            len(body).to_bytes(3, "big")
            + bytes([kind, flags])
            + stream_id.to_bytes(4, "big")
            + body
        )

    def serialize(self) -> bytes:
        return self._bytes


def raw_frame(kind: int, stream_id: int, body: bytes, flags: int = 0) -> Frame:
    return RawFrame(kind, stream_id, body, flags)


__all__ = [
    "PATIENCE_S",
    "PREFACE",
    "WINDOW",
    "Address",
    "ContinuationFrame",
    "DataFrame",
    "Frame",
    "FrameWire",
    "GoAwayFrame",
    "HeadersFrame",
    "PingFrame",
    "RstStreamFrame",
    "SettingsFrame",
    "WindowUpdateFrame",
    "Wire",
    "connect_tcp",
    "raw_frame",
    "request_headers",
    "reset",
]
