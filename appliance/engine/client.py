"""One HTTP/1.1 exchange with the engine, on Trio, as few layers as it takes.

A connection serves one request. Closing it is what aborts the generation in the engine, so it
must belong to one request anyway; connecting over loopback costs about 0.1 ms, and the question
whether a kept connection died before or after the engine read the request never arises. It may be
opened before the request may be sent: then the engine has accepted it by the time that it is.

Sockets are used directly (`wait_readable` and `recv`): Trio's stream layers cost more per token
than everything else the relay does (docs/adr/0004).
"""

from __future__ import annotations

import re
import socket
from contextlib import ExitStack
from dataclasses import dataclass, field

import trio

from appliance.errors import (
    EngineError,
    EngineProtocolError,
    EngineRefused,
    EngineStreamFailed,
    EngineUnavailable,
    Malformed,
)
from appliance.wire.canonical import parse_json_object
from appliance.wire.http1 import ResponseHead, ResponseReader

LOOPBACK = "127.0.0.1"

_RECEIVE_BYTES = 65_536
_MAX_ERROR_BYTES = 65_536
_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where the engine answers, and the key it wants."""

    port: int
    key: str = field(repr=False)
    host: str = LOOPBACK


class EngineConnection:
    """A connection to the engine, for one request. Whoever opened it closes it.

    Attributes:
        socket: not to be read by anybody but the response.
        closed: by us.
    """

    def __init__(self, address: EngineAddress) -> None:
        """Begin to connect, without waiting: what that comes to, `ask_now` and `ask_rest` tell.

        Raises:
            EngineUnavailable: there is no descriptor left to ask it with.
        """
        self.closed = False
        self._address = address
        self._unsent = _NOTHING
        with ExitStack() as unless_opened:
            try:
                self.socket = unless_opened.enter_context(
                    socket.socket(
                        socket.AF_INET,
                        socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                    )
                )
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                raise _unavailable() from error
            self.socket.connect_ex((address.host, address.port))
            unless_opened.pop_all()

    def ask_now(self, method: str, path: str, body: bytes = b"") -> bool:
        """Send the one request; whether the kernel took all of it. If not, `ask_rest` sends the rest.

        Raises:
            EngineUnavailable: the engine does not take the connection or the request.
        """
        self._unsent = memoryview(_request(self._address, method, path, body))
        return self._push()

    async def ask_rest(self) -> None:
        """Wait until the kernel has taken the rest. Cancelled, close the connection.

        Raises:
            EngineUnavailable: as `ask_now`.
        """
        try:
            while not self._push():
                await trio.lowlevel.wait_writable(self.socket)
        except trio.ClosedResourceError as error:
            raise _unavailable() from error

    def close(self) -> None:
        """Close it, which aborts what the engine is doing. Any task may, at any time. Idempotent."""
        if not self.closed:
            self.closed = True
            self._unsent = _NOTHING
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()

    def _push(self) -> bool:
        try:
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:  # also while it connects
            return False
        except OSError as error:
            raise _unavailable() from error
        self._unsent = _NOTHING  # an empty part would hold the whole
        return True


class EngineResponse:
    """The engine's answer to the request that was sent on a connection, read as it comes.

    Reading methods may be cancelled and called again: no byte is lost. Only one task may read.
    `close` may be called from any task at any time; a read in progress then raises
    EngineStreamFailed.
    """

    def __init__(self, connection: EngineConnection) -> None:
        self._connection = connection
        self._reader = ResponseReader()

    async def head(self) -> ResponseHead:
        """Wait for status and headers.

        Raises:
            EngineStreamFailed: the connection ended first.
            EngineProtocolError: what came is not an HTTP response.
        """
        while self._reader.head is None:
            await self._feed()
        return self._reader.head

    async def receive(self) -> bytes:
        """The body bytes that are there, at least one; b"" once at its end.

        Raises:
            EngineStreamFailed: the connection ended before the body did.
            EngineProtocolError: the body's framing is broken.
        """
        while True:
            try:
                data = self._reader.take()
            except Malformed as error:
                raise EngineProtocolError(error.message) from error
            if data or self._reader.complete:
                return data
            await self._feed()

    async def read_all(self, *, limit_bytes: int) -> bytes:
        """The whole body.

        Raises:
            EngineProtocolError: it is over the limit, or as for `receive`.
            EngineStreamFailed: as for `receive`.
        """
        parts: list[bytes] = []
        size = 0
        while data := await self.receive():
            parts.append(data)
            size += len(data)
            if size > limit_bytes:
                raise EngineProtocolError(f"expected an answer of at most {limit_bytes} bytes")
        return b"".join(parts)

    def close(self) -> None:
        """As `EngineConnection.close`."""
        self._connection.close()

    async def _feed(self) -> None:
        if self._connection.closed:
            raise EngineStreamFailed("the exchange with the engine was ended")
        connection = self._connection.socket
        try:
            await trio.lowlevel.wait_readable(connection)
            data = connection.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except trio.ClosedResourceError:
            raise EngineStreamFailed("the exchange with the engine was ended") from None
        except OSError as error:
            raise EngineStreamFailed("the engine broke the connection") from error
        try:
            self._reader.feed(data)
        except Malformed as error:
            if not data:
                raise EngineStreamFailed("the engine ended the connection early") from error
            raise EngineProtocolError(error.message) from error


async def open_exchange(
    address: EngineAddress, method: str, path: str, body: bytes = b""
) -> EngineResponse:
    """Connect and send a request. The caller owns the response and closes it.

    Raises:
        EngineUnavailable: as `EngineConnection` and its methods.
    """
    with ExitStack() as unless_sent:
        connection = EngineConnection(address)
        unless_sent.callback(connection.close)
        if not connection.ask_now(method, path, body):
            await connection.ask_rest()
        unless_sent.pop_all()
    return EngineResponse(connection)


async def fetch_status(address: EngineAddress, path: str) -> int:
    """Status of a GET whose body does not matter.

    Raises:
        EngineError: the engine does not answer, or not in HTTP.
    """
    response = await open_exchange(address, "GET", path)
    try:
        return (await response.head()).status
    finally:
        response.close()


async def read_refusal(response: EngineResponse) -> EngineError:
    """The error behind a response whose status is not 200.

    SGLang's message echoes input and server paths; only the shapes below are repeated, with
    nothing but their numbers.
    """
    status = (await response.head()).status
    try:
        text = (await response.read_all(limit_bytes=_MAX_ERROR_BYTES)).decode("utf-8", "replace")
    except EngineError:
        text = ""
    if status in (400, 413, 422):
        return EngineRefused(_explain(text), http_status=400)
    if status in (429, 503):
        return EngineUnavailable("the engine is not taking requests")
    if status >= 500:
        return EngineStreamFailed("the engine failed on this request")
    return EngineProtocolError(f"expected 200 or a refusal from the engine, got status {status}")


def error_event_reason(text: bytes) -> EngineError:
    """The error behind an error event in a stream: SGLang's status says whose fault it is.

    Args:
        text: the event's JSON, `{"error": {…, "code": 400}}`; nothing else of it is repeated.
    """
    try:
        event = parse_json_object(text, max_nesting=8)
    except Malformed:
        event = {}
    error = event.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    if code == 400:
        return EngineRefused(_explain(message if isinstance(message, str) else ""), http_status=400)
    return EngineStreamFailed("the engine failed while it answered")


_REASONS = (
    (
        re.compile(
            r"\((\d{1,9}) tokens\) is longer than the model's context length \((\d{1,9}) tokens"
        ),
        "the input has {0} tokens, the model's context is {1}",
    ),
    (
        re.compile(
            r"maximum context length of (\d{1,9}) tokens\. You requested a total of (\d{1,9}) tokens"
        ),
        "input and completion need {1} tokens, the model's context is {0}",
    ),
)


def _explain(text: str) -> str:
    for shape, message in _REASONS:
        if found := shape.search(text):
            return message.format(*found.groups())
    return "the engine refused a value in this request"


def _request(address: EngineAddress, method: str, path: str, body: bytes) -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\r\n"
        f"host: {address.host}:{address.port}\r\n"
        f"authorization: Bearer {address.key}\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body


def _unavailable() -> EngineUnavailable:
    return EngineUnavailable("the engine does not accept connections")
