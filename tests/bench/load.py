"""The client side of the benchmarks: kept HTTP/1.1 connections that ask and note when what came.

TLS by OpenSSL on a non-blocking socket, without Trio's stream layers: the client shares the
machine with what it measures, so it has to cost little.
"""

from __future__ import annotations

import json
import math
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self

import trio

from appliance.wire.http1 import ResponseReader
from tests.integration.appliance import MODEL

CHAT = "/v1/chat/completions"
PATIENCE_S = 30.0
"""For what must come: an answer, a connection, a process that starts."""

RECEIVE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Address:
    """Where to ask.

    Attributes:
        trust: None for plain HTTP.
        key: sent as a bearer token; empty sends none.
    """

    port: int
    trust: ssl.SSLContext | None
    key: str = field(default="", repr=False)


def chat_body(*, tokens: int, ms_per_token: int = 0, stream: bool = True) -> bytes:
    """A request for so many tokens at the stand-in engine's pace."""
    pace = f"[[mode:slow:{ms_per_token}]] " if ms_per_token else ""
    return json.dumps(
        {
            "model": MODEL,
            "stream": stream,
            "max_tokens": tokens,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": f"{pace}Go on"}],
        }
    ).encode()


@dataclass(slots=True)
class Answer:
    """What came, and when, in seconds since the request's first byte was sent.

    Attributes:
        head_s, first_s: until the whole head, and until the first event; NaN until they come.
        gaps_s: between arrivals of events, which may come several at a time.
    """

    head_s: float = math.nan
    first_s: float = math.nan
    status: int = 0
    events: int = 0
    gaps_s: list[float] = field(default_factory=list)
    ended_well: bool = False


class Connection:
    """One kept connection, one request at a time. Only `open` makes it.

    Attributes:
        events: of all answers so far.
    """

    def __init__(self, connection: socket.socket, address: Address) -> None:
        self._socket = connection
        self._address = address
        self.events = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, address: Address) -> AsyncIterator[Self]:
        """Connect and shake hands; closes the socket at the end, whatever still comes.

        Raises:
            OSError: refused, or the handshake failed.
        """
        connection = await _connect(address)
        try:
            yield cls(connection, address)
        finally:
            connection.close()

    async def ask(
        self, body: bytes, *, path: str = CHAT, on_event: Callable[[int], None] | None = None
    ) -> Answer:
        """Ask and read the answer to its end.

        Args:
            on_event: told how many events just came.

        Raises:
            EOFError: the connection ended first. Malformed: it is no HTTP answer.
        """
        answer, reader = Answer(), ResponseReader()
        sent = last = trio.current_time()
        await self._send(self._request(path, body))
        tail = b""
        while not reader.complete:
            data = await self._receive()
            if not data:
                raise EOFError("the connection ended within the answer")
            reader.feed(data)
            if reader.head is None:
                continue
            now = trio.current_time()
            if not answer.status:
                answer.head_s, answer.status = now - sent, reader.head.status
            data = reader.take()
            count = _events(tail, data)
            tail = (tail + data)[-14:]
            if not count:
                continue
            if answer.events:
                answer.gaps_s.append(now - last)
            else:
                answer.first_s = now - sent
            last = now
            answer.events += count
            if on_event is not None:
                on_event(count)
        answer.ended_well = answer.status == 200 and (
            not answer.events or tail.endswith(b"data: [DONE]\n\n")
        )
        return answer

    def _request(self, path: str, body: bytes) -> bytes:
        key = f"authorization: Bearer {self._address.key}\r\n" if self._address.key else ""
        return (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{key}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode() + body

    async def _send(self, data: bytes) -> None:
        while data:
            try:
                data = data[self._socket.send(data) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await trio.lowlevel.wait_writable(self._socket)

    async def _receive(self) -> bytes:
        while True:
            try:
                return self._socket.recv(RECEIVE_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError):
                await trio.lowlevel.wait_readable(self._socket)
            except ssl.SSLEOFError:
                return b""


def _events(tail: bytes, data: bytes) -> int:
    """How many events end in `data`; a blank line may have begun in what came before it."""
    return data.count(b"\n\n") + (tail.endswith(b"\n") and data.startswith(b"\n"))


async def _connect(address: Address) -> socket.socket:
    stream = await trio.open_tcp_stream("127.0.0.1", address.port)
    # Ours from here on: Trio's object would close it with itself.
    connection = socket.socket(fileno=stream.socket.detach())
    try:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.trust is None:
            return connection
        wrapped = address.trust.wrap_socket(
            connection, server_hostname="127.0.0.1", do_handshake_on_connect=False
        )
        connection = wrapped
        while True:
            try:
                wrapped.do_handshake()
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(wrapped)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(wrapped)
            else:
                return wrapped
    except BaseException:
        connection.close()
        raise
