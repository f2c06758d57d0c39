"""One exchange with the engine, against small servers that do what a test needs of them."""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
import sys
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from appliance.engine.client import (
    EngineAddress,
    EngineConnection,
    EngineResponse,
    error_event_reason,
    fetch_status,
    open_exchange,
    read_refusal,
)
from appliance.errors import (
    EngineError,
    EngineProtocolError,
    EngineRefused,
    EngineStreamFailed,
    EngineUnavailable,
)
from appliance.wire.http1 import ResponseHead

PATIENCE_S = 10.0
"""Far more than any step takes; only a hang reaches it."""

KEY = "engine-key-7d1f"
CANARY = "canary7f3a"
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass
class Peer:
    """A server in the engine's place: it accepts when the test says so."""

    listener: trio.SocketListener

    @property
    def address(self) -> EngineAddress:
        port: int = self.listener.socket.getsockname()[1]
        return EngineAddress(port=port, key=KEY)

    async def accept(self) -> tuple[trio.SocketStream, bytes]:
        """The next connection, and the head of the request on it."""
        stream = await self.listener.accept()
        request = b""
        while b"\r\n\r\n" not in request:
            request += await stream.receive_some(65_536)
        return stream, request


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(PATIENCE_S):
        async with listener:
            yield Peer(listener)


@asynccontextmanager
async def exchange(peer: Peer) -> AsyncIterator[tuple[EngineResponse, trio.SocketStream]]:
    """A request that was sent, and the server's side of it."""
    response = await open_exchange(peer.address, "POST", "/v1/completions", b"{}")
    stream, _ = await peer.accept()
    try:
        async with stream:
            yield response, stream
    finally:
        response.close()


@asynccontextmanager
async def answered(peer: Peer, *answer: bytes) -> AsyncIterator[EngineResponse]:
    """A response that is all there: its bytes came, and then the connection's end."""
    async with exchange(peer) as (response, stream):
        for part in answer:
            await stream.send_all(part)
        await stream.send_eof()
        yield response


def reset(stream: trio.SocketStream) -> None:
    """End a connection as a killed process's kernel may: with RST instead of FIN."""
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


async def interrupted(wait: Callable[[], Awaitable[object]]) -> None:
    """Begin to wait, and be cancelled while waiting."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


# ------------------------------------------------------------------------------------- request


async def test_a_request_is_one_http_1_1_message_with_the_key(peer: Peer) -> None:
    body = json.dumps({"prompt": "é"}).encode()
    response = await open_exchange(peer.address, "POST", "/v1/completions", body)
    stream, request = await peer.accept()
    assert request == (
        b"POST /v1/completions HTTP/1.1\r\n"
        b"host: 127.0.0.1:%d\r\n"
        b"authorization: Bearer engine-key-7d1f\r\n"
        b"content-type: application/json\r\n"
        b"content-length: %d\r\n"
        b"connection: close\r\n\r\n%b" % (peer.address.port, len(body), body)
    )
    response.close()
    await stream.aclose()


def test_the_key_is_not_shown() -> None:
    assert KEY not in repr(EngineAddress(port=1, key=KEY))


async def test_a_refused_connection_is_unavailability() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        with pytest.raises(EngineUnavailable):
            await open_exchange(EngineAddress(port=probe.getsockname()[1], key=KEY), "GET", "/")


async def test_without_a_descriptor_left_the_engine_is_unavailable() -> None:
    """It ended the appliance: its health watch expects the engine's errors, not the machine's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(EngineUnavailable):
            await open_exchange(EngineAddress(port=1, key="key"), "GET", "/health")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_an_engine_that_breaks_off_while_it_is_told_is_unavailability(peer: Peer) -> None:
    """The body is more than the buffers of both sides hold, and nobody reads it."""

    async def break_off() -> None:
        stream = await peer.listener.accept()
        reset(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(break_off)
        with pytest.raises(EngineUnavailable):
            await open_exchange(peer.address, "POST", "/", b"x" * (64 << 20))


async def test_cancelling_while_sending_closes_the_connection(peer: Peer) -> None:
    async def send() -> None:
        await open_exchange(peer.address, "POST", "/", b"x" * (64 << 20))

    await interrupted(send)
    stream = await peer.listener.accept()
    async with stream:
        received = 0
        with pytest.raises((trio.BrokenResourceError, EOFError)):
            received += await drain(stream)
    assert received < 64 << 20


async def drain(stream: trio.SocketStream) -> int:
    """Read to the end and say so, since a cut connection may look like one or like a reset."""
    while await stream.receive_some(1 << 20):
        pass
    raise EOFError


async def test_nothing_of_a_request_is_kept_once_it_is_sent(peer: Peer) -> None:
    """Every running answer kept its request, beyond what all bodies may take together."""
    body = bytes(8 << 20)
    kept = sys.getrefcount(body)
    connection = EngineConnection(peer.address)

    async def receive() -> None:
        stream, request = await peer.accept()
        async with stream:
            left = len(body) - len(request.partition(b"\r\n\r\n")[2])
            while left:
                left -= len(await stream.receive_some(1 << 20))

    tracemalloc.start()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            assert not connection.ask_now("POST", "/", body)
            assert tracemalloc.get_traced_memory()[0] > len(body)
            await connection.ask_rest()
        assert tracemalloc.get_traced_memory()[0] < len(body)
    finally:
        tracemalloc.stop()
    assert sys.getrefcount(body) == kept
    connection.close()


async def test_a_large_request_arrives_whole(peer: Peer) -> None:
    body = bytes(range(256)) * (1 << 14)

    async def receive() -> None:
        stream, request = await peer.accept()
        async with stream:
            received = bytearray(request.partition(b"\r\n\r\n")[2])
            while len(received) < len(body):
                received += await stream.receive_some(1 << 20)
            assert received == body
            await stream.send_all(SIZED + b"hello")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        response = await open_exchange(peer.address, "POST", "/", body)
        assert await response.read_all(limit_bytes=5) == b"hello"
        response.close()


# ------------------------------------------------------------------------------------- reading


async def test_head_and_body_are_read_as_they_come(peer: Peer) -> None:
    async with exchange(peer) as (response, stream):
        await stream.send_all(CHUNKED + b"5\r\nhello\r\n")
        assert await response.head() == ResponseHead(200, {b"transfer-encoding": b"chunked"})
        assert await response.receive() == b"hello"
        await stream.send_all(b"1\r\n!\r\n0\r\n\r\n")
        assert await response.receive() == b"!"
        assert await response.receive() == b""
        assert await response.receive() == b""


async def test_the_body_can_be_read_without_asking_for_the_head(peer: Peer) -> None:
    async with answered(peer, SIZED + b"hello") as response:
        assert await response.read_all(limit_bytes=5) == b"hello"
        assert (await response.head()).status == 200


@pytest.mark.parametrize(
    "answer",
    [SIZED + b"hello", CHUNKED + b"2\r\nhe\r\n3;x\r\nllo\r\n0\r\nT: x\r\n\r\n"],
    ids=["sized", "chunked"],
)
async def test_reads_that_are_cancelled_and_resumed_lose_no_byte(peer: Peer, answer: bytes) -> None:
    async with exchange(peer) as (response, stream):
        body = b""

        async def receive() -> None:
            nonlocal body
            body += await response.receive()

        for at in range(len(answer)):
            await interrupted(response.head if b"\r\n\r\n" not in answer[:at] else receive)
            await stream.send_all(answer[at : at + 1])
        assert (await response.head()).status == 200
        assert body + await response.read_all(limit_bytes=5) == b"hello"


async def test_a_read_that_is_cancelled_before_it_waits_loses_nothing(peer: Peer) -> None:
    async with answered(peer, SIZED + b"hello") as response:
        with trio.CancelScope() as scope:
            scope.cancel()
            await response.head()
        assert scope.cancelled_caught
        assert await response.read_all(limit_bytes=5) == b"hello"


# ---------------------------------------------------------------------------------- broken off

CUT = [
    pytest.param(b"", id="nothing"),
    pytest.param(SIZED[:20], id="in the head"),
    pytest.param(SIZED, id="before the body"),
    pytest.param(SIZED + b"hell", id="in the body"),
    pytest.param(CHUNKED + b"5\r\nhel", id="in a chunk"),
    pytest.param(CHUNKED + b"5\r\nhello\r\n", id="before the last chunk"),
    pytest.param(CHUNKED + b"5\r\nhello\r\n0\r\n", id="in the trailer"),
]


@pytest.mark.parametrize("answer", CUT)
async def test_an_answer_that_ends_early_has_failed(peer: Peer, answer: bytes) -> None:
    async with answered(peer, answer) as response:
        with pytest.raises(EngineStreamFailed, match="early"):
            await response.read_all(limit_bytes=100)


@pytest.mark.parametrize("answer", CUT)
async def test_a_connection_that_is_reset_has_failed(peer: Peer, answer: bytes) -> None:
    async with exchange(peer) as (response, stream):
        if answer:
            await stream.send_all(answer)
        await interrupted(partial_read(response))
        reset(stream)
        with pytest.raises(EngineStreamFailed, match="broke"):
            await response.read_all(limit_bytes=100)


def partial_read(response: EngineResponse) -> Callable[[], Awaitable[None]]:
    """Read what is there, then wait for more."""

    async def read() -> None:
        await response.head()
        while await response.receive():
            pass

    return read


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + CANARY.encode() + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + CANARY.encode() + b"\r\n\r\n",
        CHUNKED + CANARY.encode() + b"\r\n",
        SIZED + b"hello" + CANARY.encode(),
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" + CANARY.encode(),
    ],
)
async def test_what_is_not_http_is_a_protocol_error_that_quotes_nothing(
    peer: Peer, answer: bytes
) -> None:
    async with answered(peer, answer) as response:
        with pytest.raises(EngineProtocolError) as caught:
            await response.read_all(limit_bytes=100)
        assert CANARY not in str(caught.value)


# ------------------------------------------------------------------------------------- closing


@pytest.mark.parametrize("answer", [b"", SIZED, CHUNKED + b"5\r\nhe"])
async def test_closing_wakes_the_task_that_reads(peer: Peer, answer: bytes) -> None:
    async with exchange(peer) as (response, stream):
        if answer:
            await stream.send_all(answer)
        failures: list[EngineError] = []

        async def read() -> None:
            try:
                await response.read_all(limit_bytes=100)
            except EngineError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            response.close()
        (failure,) = failures
        assert isinstance(failure, EngineStreamFailed)
        assert "was ended" in failure.message


async def test_closing_tells_the_engine_at_once(peer: Peer) -> None:
    async with exchange(peer) as (response, stream):
        await stream.send_all(SIZED)
        await response.head()
        response.close()
        response.close()
        assert await stream.receive_some(1) == b""
        with pytest.raises(EngineStreamFailed, match="was ended"):
            await response.receive()


async def test_closing_in_the_same_turn_in_which_bytes_come_is_a_failure_too(peer: Peer) -> None:
    async with exchange(peer) as (response, stream), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def read() -> None:
            with pytest.raises(EngineStreamFailed):
                await response.head()

        await trio.testing.wait_all_tasks_blocked()
        os.write(stream.socket.fileno(), SIZED)
        response.close()


# -------------------------------------------------------------------------------------- limits


async def test_a_body_may_be_as_long_as_the_limit_and_no_longer(peer: Peer) -> None:
    async with answered(peer, SIZED + b"hello") as response:
        assert await response.read_all(limit_bytes=5) == b"hello"
    async with answered(peer, SIZED + b"hello") as response:
        with pytest.raises(EngineProtocolError, match="at most 4 bytes"):
            await response.read_all(limit_bytes=4)


async def test_an_endless_body_is_refused_at_the_limit(peer: Peer) -> None:
    async with exchange(peer) as (response, stream):

        async def send_for_ever() -> None:
            await stream.send_all(CHUNKED)
            while True:
                await stream.send_all(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_for_ever)
            with pytest.raises(EngineProtocolError, match="at most"):
                await response.read_all(limit_bytes=1 << 20)
            nursery.cancel_scope.cancel()


# -------------------------------------------------------------------------------------- status


@pytest.mark.parametrize("status", [200, 401, 503])
async def test_a_status_is_fetched_and_the_connection_closed(peer: Peer, status: int) -> None:
    async def serve() -> None:
        stream, request = await peer.accept()
        assert request.startswith(b"GET /ready HTTP/1.1\r\n")
        async with stream:
            await stream.send_all(b"HTTP/1.1 %d X\r\nContent-Length: 9\r\n\r\n" % status)
            assert await stream.receive_some(1) == b""

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        assert await fetch_status(peer.address, "/ready") == status


# ------------------------------------------------------------------------------------ refusals


async def refusal(peer: Peer, status: int, body: bytes) -> EngineError:
    head = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
    async with answered(peer, head, body) as response:
        return await read_refusal(response)


def sglang_error(message: str, code: int = 400) -> bytes:
    return json.dumps(
        {"object": "error", "message": message, "type": "BadRequest", "code": code}
    ).encode()


@pytest.mark.parametrize(
    ("status", "kind", "http_status"),
    [
        (400, EngineRefused, 400),
        (413, EngineRefused, 400),
        (422, EngineRefused, 400),
        (429, EngineUnavailable, 503),
        (503, EngineUnavailable, 503),
        (500, EngineStreamFailed, 502),
        (502, EngineStreamFailed, 502),
        (599, EngineStreamFailed, 502),
        (401, EngineProtocolError, 502),
        (403, EngineProtocolError, 502),
        (404, EngineProtocolError, 502),
        (204, EngineProtocolError, 502),
        (302, EngineProtocolError, 502),
    ],
)
async def test_a_refusals_status_decides_and_its_message_is_never_repeated(
    peer: Peer, status: int, kind: type[EngineError], http_status: int
) -> None:
    error = await refusal(peer, status, sglang_error(f"{CANARY} /opt/engine/x.py", status))
    assert type(error) is kind
    assert error.http_status == http_status
    told = f"{error} {error!r} {error.param} {error.__dict__}"
    assert CANARY not in told
    assert "/opt" not in told


LENGTHS = [
    (
        "The input ({} tokens) is longer than the model's context length ({} tokens).",
        ("9000", "8192"),
        "the input has 9000 tokens, the model's context is 8192",
    ),
    (
        "This model has a maximum context length of {} tokens. You requested a total of {} tokens",
        ("8192", "9000"),
        "input and completion need 9000 tokens, the model's context is 8192",
    ),
]


@pytest.mark.parametrize(("shape", "numbers", "told"), LENGTHS)
async def test_of_a_length_refusal_the_numbers_are_told(
    peer: Peer, shape: str, numbers: tuple[str, str], told: str
) -> None:
    message = f"{CANARY} {shape.format(*numbers)} {CANARY}"
    assert (await refusal(peer, 400, sglang_error(message))).message == told
    event = json.dumps({"error": {"message": message, "code": 400}}).encode()
    assert error_event_reason(event).message == told


@pytest.mark.parametrize(("shape", "numbers", "told"), LENGTHS)
async def test_nothing_but_numbers_is_told_of_a_length_refusal(
    peer: Peer, shape: str, numbers: tuple[str, str], told: str
) -> None:
    for wrong in (
        (CANARY, "1"),
        ("1", CANARY),
        ("1" * 10, "1"),
        ("", "1"),
        ("-1", "1"),
        ("\u0661", "x"),
    ):
        error = await refusal(peer, 400, sglang_error(shape.format(*wrong)))
        assert error.message == "the engine refused a value in this request"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 X\r\nContent-Length: 1000\r\n\r\n" + CANARY.encode(),
        b"HTTP/1.1 400 X\r\nContent-Length: 100000\r\n\r\n" + CANARY.encode() * 10_000,
        b"HTTP/1.1 400 X\r\nTransfer-Encoding: chunked\r\n\r\n" + CANARY.encode(),
        b"HTTP/1.1 400 X\r\nContent-Length: 2\r\n\r\n\xff\xfe",
        b"HTTP/1.1 400 X\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["cut off", "too long", "broken", "no text", "empty"],
)
async def test_a_refusal_whose_body_cannot_be_read_is_a_refusal_all_the_same(
    peer: Peer, answer: bytes
) -> None:
    async with answered(peer, answer) as response:
        error = await read_refusal(response)
    assert type(error) is EngineRefused
    assert error.message == "the engine refused a value in this request"


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ({"error": {"message": CANARY, "code": 400}}, EngineRefused),
        ({"error": {"message": [CANARY], "code": 400}}, EngineRefused),
        ({"error": {"code": 400}}, EngineRefused),
        ({"error": {"message": CANARY, "code": 500}}, EngineStreamFailed),
        ({"error": {"message": CANARY, "code": "400"}}, EngineStreamFailed),
        ({"error": {"message": CANARY}}, EngineStreamFailed),
        ({"error": CANARY}, EngineStreamFailed),
        ({"error": None}, EngineStreamFailed),
        ({CANARY: 1}, EngineStreamFailed),
        ([CANARY], EngineStreamFailed),
        ({"error": {"code": 400, "deep": [[[[[[[[CANARY]]]]]]]]}}, EngineStreamFailed),
    ],
)
def test_an_error_events_code_decides_and_its_message_is_never_repeated(
    event: object, kind: type[EngineError]
) -> None:
    error = error_event_reason(json.dumps(event).encode())
    assert type(error) is kind
    assert CANARY not in f"{error} {error!r} {error.param} {error.__dict__}"


def test_an_error_event_that_is_no_json_is_a_failure() -> None:
    assert type(error_event_reason(b'{"error": nonsense')) is EngineStreamFailed
