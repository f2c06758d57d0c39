"""Attacks on a running appliance over real sockets; after each it serves on and nothing is left.

What Hypercorn alone makes of the worst of them is in test_plain_hypercorn.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import resource
import signal
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import h11
import httpx2
import pytest
import trio
import trustme
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.utils import wrap_app
from hyperframe.frame import PriorityFrame
from quart_trio import QuartTrio

from appliance.config import parse_config
from appliance.log import configure_log
from appliance.serving.lifecycle import Lifecycle
from appliance.serving.metrics import Metrics
from appliance.web.http1 import Http1Protocol
from appliance.web.http2 import (
    CONTROL_BURST,
    DISCARD_BYTES,
    MAX_STREAMS,
    RESET_BURST,
    Http2Protocol,
)
from appliance.web.metrics import serve_metrics
from appliance.web.peers import site_of
from appliance.web.server import HEAD_BYTES, Connection, Connections, Service
from tests.integration.aftermath import (
    LAST_LIVE,
    LIVE,
    LIVE_BODY,
    aborted,
    assert_serving,
    generating,
    open_descriptors,
    unharmed,
)
from tests.integration.appliance import (
    MODEL,
    QUESTION,
    RawConnection,
    RunningAppliance,
    config_text,
    start_appliance,
)
from tests.integration.wire import (
    PATIENCE_S,
    WINDOW,
    ContinuationFrame,
    DataFrame,
    Frame,
    FrameWire,
    GoAwayFrame,
    Header,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
    Wire,
    connect_tcp,
    raw_frame,
    request_headers,
    reset,
)

CHAT = "/v1/chat/completions"
MAX_U32 = 2**32 - 1
MIB = 1 << 20


def chat(prompt: str = "", **more: object) -> bytes:
    messages = [{"role": "user", "content": prompt}] if prompt else QUESTION
    return json.dumps({"model": MODEL, "messages": messages, **more}).encode()


def endless_chat() -> bytes:
    """About 30 MB, as fast as it is taken."""
    return chat("[[mode:long:100000]] Go", stream=True)


def slow_chat(tokens: int = 1000, ms: int = 20) -> bytes:
    return chat(f"[[mode:slow:{ms}]] Go", stream=True, max_tokens=tokens, ignore_eos=True)


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def assert_connection_serves(wire: FrameWire, stream_id: int) -> None:
    await wire.send_frames(wire.get(stream_id, "/health/live"))
    assert await wire.wait_for_end(stream_id) == LIVE_BODY


async def start(nursery: trio.Nursery, folder: Path, **limits: float) -> RunningAppliance:
    return await start_appliance(nursery, folder, sections={"limits": dict(limits)})


# The four kills of one connection that end plain Hypercorn.


async def test_data_after_an_early_answer_is_dropped(appliance: RunningAppliance) -> None:
    async with unharmed(appliance), FrameWire.open(appliance) as wire:
        await wire.greet()
        await wire.send_frames(wire.head(1, request_headers("POST", "/nowhere")))
        assert await wire.status(1) == 404
        await wire.wait_for_end(1)
        for _ in range(50):  # more than any queue holds
            await wire.send_frames(DataFrame(1, data=b"x" * 100))
        await wire.send_frames(DataFrame(1, data=b"x", flags=["END_STREAM"]))
        await assert_connection_serves(wire, 3)


UNSERVED: dict[str, tuple[bytes, bytes | None]] = {
    "non-ASCII path": (b"GET", b"/\xff\xfe"),
    "space in the path": (b"GET", b"/a b"),
    "absolute path": (b"GET", b"http://localhost/"),
    "star": (b"GET", b"*"),
    "CONNECT without path": (b"CONNECT", None),
    "non-ASCII method": (b"G\xffT", b"/"),
}


async def test_a_request_that_http2_cannot_mean_costs_its_stream_alone(
    appliance: RunningAppliance,
) -> None:
    async with unharmed(appliance):
        for name, (method, path) in UNSERVED.items():
            async with FrameWire.open(appliance) as wire:
                await wire.greet()
                headers: list[Header] = [(":method", method), (":authority", "localhost")]
                if path is not None:
                    headers += [(":scheme", "https"), (":path", path)]
                await wire.send_frames(wire.head(1, headers, end_stream=True))
                ended = await wire.wait_for(RstStreamFrame, 1)
                assert ended.error_code == ErrorCodes.PROTOCOL_ERROR, name
                await assert_connection_serves(wire, 3)


WEBSOCKET = b"""Connection: Upgrade\r
Upgrade: websocket\r
Sec-WebSocket-Version: 13\r
Sec-WebSocket-Key: bKdPyn3u98cTfZJSh4TNeQ==\r
"""
UPGRADES = (
    WEBSOCKET,
    b"Upgrade: h2c\r\nConnection: upgrade, http2-settings\r\nHTTP2-Settings: AAMAAABk\r\n",
    b"Upgrade: h2c\r\nConnection: upgrade, http2-settings\r\nHTTP2-Settings: !!!!\r\n",
)


async def test_an_upgrade_is_not_made_and_the_request_is_answered(
    appliance: RunningAppliance,
) -> None:
    async with unharmed(appliance):
        for upgrade in UPGRADES:
            async with Wire.open(appliance) as wire:
                # The byte behind it is the attack (hypercorn issue 225).
                await wire.send(LIVE[:-2] + upgrade + b"\r\n" + b"x")
                assert (await wire.read_until(LIVE_BODY)).startswith(b"HTTP/1.1 200 ")


class Faulty(dict[str, object]):
    """What every connection copies, once it has shaken hands."""

    def copy(self) -> Any:
        raise ZeroDivisionError("a prompt, say")


class FaultyContext(ssl.SSLContext):
    """A context that has no memory for one more connection."""

    def wrap_bio(self, *_arguments: Any, **_options: Any) -> ssl.SSLObject:
        raise MemoryError("a prompt, say")


@pytest.mark.parametrize(
    ("context", "state", "error"),
    [
        (ssl.SSLContext, Faulty(), "ZeroDivisionError"),
        (FaultyContext, {}, "MemoryError"),
    ],
    ids=["when it is served", "when it is taken over"],
)
async def test_what_goes_wrong_in_a_connection_ends_there_and_is_told_by_type(
    nursery: trio.Nursery,
    tmp_path: Path,
    context: type[ssl.SSLContext],
    state: dict[str, object],
    error: str,
) -> None:
    """Every known way is closed; so the next unknown one is made up."""
    ca = trustme.CA()
    server_context = context(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(server_context)
    told = io.StringIO()
    limits = parse_config(config_text(tmp_path), folder=tmp_path).limits
    lifecycle = Lifecycle(wall_clock=time.time, clock=trio.current_time)
    metrics = Metrics(lifecycle, clock=trio.current_time)
    connections = Connections(
        limits, metrics, configure_log(format="json", level="debug", stream=told)
    )
    service = Service(
        app=wrap_app(QuartTrio("test"), 0, "asgi"),
        config=HypercornConfig(),
        worker=WorkerContext(None),
        state=state,
        tls=server_context,
        connections=connections,
        headers=list,
    )

    async def handle(stream: trio.SocketStream) -> None:
        await Connection(service, stream).run()

    listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
    port: int = listeners[0].socket.getsockname()[1]
    trust = ssl.create_default_context()
    ca.configure_trust(trust)
    before = open_descriptors()
    for _ in range(2):
        tcp = await connect_tcp(port)
        tls = trio.SSLStream(tcp, trust, server_hostname="127.0.0.1")
        with contextlib.suppress(trio.BrokenResourceError):
            await tls.send_all(LIVE)
            assert await tls.receive_some(1) == b""
        tcp.socket.close()
    lines = [json.loads(line) for line in told.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["connection_error_contained"] * 2
    assert lines[0]["errors"] == [error]
    assert "prompt" not in told.getvalue()
    with trio.fail_after(PATIENCE_S):
        await connections.wait_none()
        while open_descriptors() > before:
            await trio.sleep(0.02)
    metrics_port = await nursery.start(partial(serve_metrics, 0, metrics.exposition))
    async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        told_metrics = (await client.get(f"http://127.0.0.1:{metrics_port}/metrics")).text
    assert "dcv_contained_errors_total 2.0" in told_metrics


async def test_connections_that_cannot_be_taken_over_end_no_other(
    appliance: RunningAppliance,
) -> None:
    """Reset before they are accepted, then accepted while there is no descriptor left."""
    async with unharmed(appliance), Wire.open(appliance) as other:
        await other.send(post(CHAT, slow_chat(tokens=100), "Connection: close"))
        await other.read_until(b"data: ")
        for _ in range(200):
            reset(await connect_tcp(appliance.port))
        waiting = [socket.socket() for _ in range(20)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))
        try:
            for late in waiting:
                late.connect(("127.0.0.1", appliance.port))
            await trio.sleep(0.3)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for late in waiting:
            late.close()
        assert b"[DONE]" in await other.read_to_end()


# Readers that stall.


async def test_a_stalled_http1_reader_is_given_up_and_buffers_nothing(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start(nursery, tmp_path, write_s=0.5)
    async with unharmed(appliance), Wire.open(appliance, receive_bytes=4096) as wire:
        before = resident_bytes()
        await wire.send(post(CHAT, endless_chat()))
        await wire.receive()
        await aborted(appliance)
        assert resident_bytes() - before < 15 * MIB
    assert any(line["event"] == "write_timeout" for line in appliance.log_lines)


@pytest.mark.parametrize("drip", [0, 1], ids=["nothing", "a-byte-now-and-then"])
async def test_an_http2_reader_without_window_is_given_up_and_buffers_nothing(
    nursery: trio.Nursery, tmp_path: Path, drip: int
) -> None:
    appliance = await start(nursery, tmp_path, write_s=0.8)
    async with unharmed(appliance), FrameWire.open(appliance) as wire:
        await wire.greet()
        before = resident_bytes()
        await wire.send_frames(*wire.post(1, CHAT, endless_chat()))

        async def open_a_little() -> None:
            while drip:
                await trio.sleep(0.2)
                await wire.send_frames(WindowUpdateFrame(1, window_increment=drip))
                await wire.send_frames(WindowUpdateFrame(0, window_increment=drip))

        async with trio.open_nursery() as dripping:
            dripping.start_soon(open_a_little)
            ended = await wire.wait_for(RstStreamFrame, 1)
            dripping.cancel_scope.cancel()
        assert ended.error_code == ErrorCodes.CANCEL
        assert WINDOW <= len(wire.body(1)) < WINDOW + 100
        await aborted(appliance)
        assert resident_bytes() - before < 15 * MIB
        await wire.send_frames(WindowUpdateFrame(0, window_increment=WINDOW))
        await assert_connection_serves(wire, 3)


async def test_an_http2_peer_that_does_not_read_tcp_is_given_up(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start(nursery, tmp_path, write_s=0.5)
    async with unharmed(appliance), FrameWire.open(appliance, receive_bytes=4096) as wire:
        await wire.greet({SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1})
        await wire.send_frames(WindowUpdateFrame(0, window_increment=2**31 - 1 - WINDOW))
        before = resident_bytes()
        for stream_id in (1, 3, 5):
            await wire.send_frames(*wire.post(stream_id, CHAT, endless_chat()))
        await aborted(appliance, 3)
        assert resident_bytes() - before < 15 * MIB


async def test_a_window_that_shrinks_below_zero_only_makes_the_answer_wait(
    appliance: RunningAppliance,
) -> None:
    async with unharmed(appliance), FrameWire.open(appliance) as wire:
        await wire.greet()
        await wire.send_frames(*wire.post(1, CHAT, slow_chat(tokens=30, ms=5)))
        await wire.wait_for(DataFrame, 1)
        await wire.send_frames(SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: 0}))
        await wire.send_frames(
            SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: WINDOW})
        )
        assert (await wire.wait_for_end(1)).endswith(b"data: [DONE]\n\n")


async def test_a_reader_of_every_frame_is_not_taken_for_a_flood(
    appliance: RunningAppliance,
) -> None:
    tokens = int(CONTROL_BURST)
    async with unharmed(appliance), FrameWire.open(appliance) as wire:
        await wire.greet()
        body = chat("[[mode:slow:1]] Go", stream=True, max_tokens=tokens, ignore_eos=True)
        await wire.send_frames(*wire.post(1, CHAT, body))
        with trio.fail_after(PATIENCE_S):
            while True:
                frame = await wire.wait_for(DataFrame, 1)
                if "END_STREAM" in frame.flags:
                    break
                size = max(1, len(frame.data))
                await wire.send_frames(
                    WindowUpdateFrame(1, window_increment=size),
                    WindowUpdateFrame(0, window_increment=size),
                )
        assert wire.body(1).endswith(b"data: [DONE]\n\n")


# Stopping.


async def stall_http1(appliance: RunningAppliance, hold: trio.Event, held: trio.Event) -> None:
    async with Wire.open(appliance, receive_bytes=4096) as wire:
        await wire.send(post(CHAT, endless_chat()))
        await wire.receive()
        held.set()
        await hold.wait()


async def stall_http2(
    appliance: RunningAppliance, hold: trio.Event, held: trio.Event, *, reads_tcp: bool
) -> None:
    async with FrameWire.open(appliance, receive_bytes=4096) as wire:
        await wire.greet({} if reads_tcp else {SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1})
        if not reads_tcp:
            await wire.send_frames(WindowUpdateFrame(0, window_increment=2**31 - 1 - WINDOW))
        await wire.send_frames(*wire.post(1, CHAT, endless_chat()))
        while reads_tcp and len(wire.body(1)) < WINDOW:
            await wire.wait_for(DataFrame, 1)
        held.set()
        await hold.wait()


@pytest.mark.parametrize(
    "stall",
    [stall_http1, partial(stall_http2, reads_tcp=True), partial(stall_http2, reads_tcp=False)],
    ids=["http1", "http2-window", "http2-tcp"],
)
@pytest.mark.parametrize("signals", [1, 2])
async def test_a_stalled_reader_does_not_keep_the_appliance_from_stopping(
    nursery: trio.Nursery,
    tmp_path: Path,
    stall: Callable[[RunningAppliance, trio.Event, trio.Event], Awaitable[None]],
    signals: int,
) -> None:
    appliance = await start(nursery, tmp_path, drain_s=0.3 if signals == 1 else 60.0, write_s=60.0)
    hold, held = trio.Event(), trio.Event()
    nursery.start_soon(stall, appliance, hold, held)
    await held.wait()
    await generating(appliance)
    began = trio.current_time()
    os.kill(os.getpid(), signal.SIGTERM)
    if signals == 2:
        await trio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
    with trio.fail_after(PATIENCE_S):
        await appliance.ended.wait()
    assert trio.current_time() - began < 12
    hold.set()


async def test_draining_lets_http2_streams_end_refuses_new_ones_and_says_goodbye(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start(nursery, tmp_path, drain_s=1.0)
    async with FrameWire.open(appliance) as busy, FrameWire.open(appliance) as idle:
        await busy.greet()
        await idle.greet()
        await assert_connection_serves(idle, 1)
        await busy.send_frames(*busy.post(1, CHAT, slow_chat(tokens=15)))
        await busy.send_frames(*busy.post(3, CHAT, slow_chat()))
        await busy.wait_for(DataFrame, 3)
        os.kill(os.getpid(), signal.SIGTERM)
        goodbye = await idle.wait_for(GoAwayFrame)
        assert (goodbye.error_code, goodbye.last_stream_id) == (ErrorCodes.NO_ERROR, 1)
        assert await idle.next_frame() is None
        await busy.send_frames(busy.get(5))
        refused = await busy.wait_for(RstStreamFrame, 5)
        assert refused.error_code == ErrorCodes.REFUSED_STREAM
        assert (await busy.wait_for_end(1)).endswith(b"data: [DONE]\n\n")
        broken = await busy.wait_for(RstStreamFrame, 3)
        assert broken.error_code == ErrorCodes.INTERNAL_ERROR
        assert b'"code":"not_serving"' in busy.body(3)
        assert b"[DONE]" not in busy.body(3)
        goodbye = await busy.wait_for(GoAwayFrame)
        assert goodbye.error_code == ErrorCodes.NO_ERROR
        assert await busy.next_frame() is None
    with trio.fail_after(PATIENCE_S):
        await appliance.ended.wait()
    assert appliance.result == [None]


# Caps and deadlines.


async def connect_from(appliance: RunningAppliance, host: str) -> trio.SocketStream:
    stream_socket = trio.socket.socket()
    await stream_socket.bind((host, 0))
    await stream_socket.connect(("127.0.0.1", appliance.port))
    return trio.SocketStream(stream_socket)


async def is_closed(stream: trio.SocketStream, *, within_s: float = PATIENCE_S) -> bool:
    with trio.move_on_after(within_s):
        try:
            while await stream.receive_some(4096):
                pass
        except trio.BrokenResourceError:
            pass
        return True
    return False


async def test_connections_are_capped_per_peer_and_in_all_before_their_handshake(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start(nursery, tmp_path, max_connections=3, max_connections_per_peer=2)
    async with unharmed(appliance):
        first, second, third = [await connect_from(appliance, "127.0.0.1") for _ in range(3)]
        assert await is_closed(third)
        other, last = [await connect_from(appliance, "127.0.0.2") for _ in range(2)]
        assert await is_closed(last)  # one more from there, but too many in all
        for stream in (first, second, other):
            assert not await is_closed(stream, within_s=0.05)
        first.socket.close()
        await trio.testing.wait_all_tasks_blocked(0.05)
        await assert_serving(appliance)
        for stream in (second, third, other, last):
            stream.socket.close()
    assert any(line["event"] == "connection_refused" for line in appliance.log_lines)


@pytest.mark.parametrize(
    ("host", "site"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_peer_is_an_ipv4_address_or_an_ipv6_network(host: str, site: str) -> None:
    assert site_of(host) == site


def client_hello(appliance: RunningAppliance) -> bytes:
    outgoing = ssl.MemoryBIO()
    tls = appliance.trust.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


async def test_whoever_takes_too_long_is_closed(nursery: trio.Nursery, tmp_path: Path) -> None:
    appliance = await start(
        nursery, tmp_path, handshake_s=1.5, header_s=1.0, body_s=1.0, idle_s=1.8
    )
    hello = client_hello(appliance)

    async def say(tcp_bytes: bytes) -> None:
        stream = await connect_tcp(appliance.port)
        await stream.send_all(tcp_bytes)
        assert await is_closed(stream)
        stream.socket.close()

    async def trickle_hello() -> None:
        stream = await connect_tcp(appliance.port)
        with pytest.raises(trio.BrokenResourceError):
            for byte in hello[:200]:
                await stream.send_all(bytes([byte]))
                await trio.sleep(0.02)
        stream.socket.close()

    async def idle_http1() -> None:
        async with Wire.open(appliance) as wire:
            await wire.send(LIVE)
            assert (await wire.read_to_end()).endswith(LIVE_BODY)

    async def trickle_head() -> None:
        async with Wire.open(appliance) as wire, trio.open_nursery() as reading:
            reading.start_soon(wire.read_to_end)
            began = trio.current_time()
            while await wire.send(b"GET"[:1]) and trio.current_time() - began < PATIENCE_S:
                await trio.sleep(0.05)
            assert trio.current_time() - began < 5

    async def trickle_body() -> None:
        async with Wire.open(appliance) as wire, trio.open_nursery() as sending:

            async def drip() -> None:
                await wire.send(post(CHAT, b"{}").replace(b"Length: 2", b"Length: 9999"))
                while await wire.send(b" "):
                    await trio.sleep(0.05)

            sending.start_soon(drip)
            assert (await wire.read_until(b"request_timeout")).startswith(b"HTTP/1.1 408 ")
            wire.drop()

    async def trickle_body_http2() -> None:
        async with FrameWire.open(appliance) as wire:
            await wire.greet()
            await wire.send_frames(wire.head(1, request_headers("POST", CHAT)))
            await wire.send_frames(DataFrame(1, data=b"{"))
            assert await wire.status(1) == 408
            await wire.read_frames_to_end()

    async def say_http2(*frames: Frame, greet: bool = True) -> None:
        async with FrameWire.open(appliance) as wire:
            if greet:
                await wire.greet()
            await wire.send_frames(*frames)
            await wire.read_frames_to_end()
            if greet:
                assert any(isinstance(frame, GoAwayFrame) for frame in wire.frames)

    async def ping_http2() -> None:
        async with FrameWire.open(appliance) as wire, trio.open_nursery() as pinging:
            await wire.greet()

            async def ping() -> None:
                while await wire.send_frames(PingFrame(0, opaque_data=b"12345678")):
                    await trio.sleep(0.05)

            pinging.start_soon(ping)
            await wire.read_frames_to_end()

    half_block = HeadersFrame(1, data=b"\x82", flags=["END_STREAM"])
    async with unharmed(appliance):
        began = trio.current_time()
        async with trio.open_nursery() as attacks:
            attacks.start_soon(say, b"")
            attacks.start_soon(say, hello[:40])
            attacks.start_soon(trickle_hello)
            attacks.start_soon(idle_http1)
            attacks.start_soon(trickle_head)
            attacks.start_soon(trickle_body)
            attacks.start_soon(trickle_body_http2)
            attacks.start_soon(partial(say_http2, greet=False))
            attacks.start_soon(say_http2)
            attacks.start_soon(say_http2, half_block)
            attacks.start_soon(say_http2, half_block, ContinuationFrame(1, data=b"\x84"))
            attacks.start_soon(ping_http2)
        assert trio.current_time() - began < 12


async def test_a_client_that_closes_its_half_is_gone(appliance: RunningAppliance) -> None:
    async with unharmed(appliance), Wire.open(appliance) as wire:
        await wire.send(post(CHAT, slow_chat()))
        await wire.read_until(b"data: ")
        wire.stream.transport_stream.socket.shutdown(socket.SHUT_WR)
        await aborted(appliance)


# Bombs and garbage.


TO_CHUNKED = post(CHAT, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
BOMBS: dict[str, bytes] = {
    "value": b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2 * HEAD_BYTES,
    "many": b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * HEAD_BYTES,
    "target": b"GET /" + b"a" * 2 * HEAD_BYTES,
    "chunk extension": TO_CHUNKED + b"5;" + b"e" * 2 * HEAD_BYTES,
    "trailers": TO_CHUNKED + b"0\r\n" + b"t: x\r\n" * HEAD_BYTES,
}


async def test_an_http1_head_that_does_not_end_is_refused(appliance: RunningAppliance) -> None:
    async with unharmed(appliance):
        for name, bomb in BOMBS.items():
            async with Wire.open(appliance) as wire:
                await wire.send(bomb)
                assert (await wire.read_until(b"\r\n")).split()[1] in {b"431", b"400"}, name
                await wire.read_to_end()


def huge_list(wire: FrameWire) -> list[Frame]:
    more = [(f"x-{n}", "a" * 1000) for n in range(20)]
    return [wire.head(3, [*request_headers("GET", "/health"), *more], end_stream=True)]


def hpack_bomb(wire: FrameWire) -> list[Frame]:
    """One entry of 4 KB, referred to thousands of times in as many bytes."""
    entry = wire.head(3, [*request_headers("GET", "/health"), ("x", "a" * 4000)])
    entry.data += b"\xbe" * 8000
    return [entry]


def continuation_flood(wire: FrameWire) -> list[Frame]:
    return [HeadersFrame(1, data=b"\x82"), *[ContinuationFrame(1) for _ in range(200)]]


def rapid_reset(wire: FrameWire) -> list[Frame]:
    return [
        frame
        for stream_id in range(3, 4 * RESET_BURST, 2)
        for frame in (wire.get(stream_id), RstStreamFrame(stream_id, error_code=8))
    ]


def made_resets(wire: FrameWire) -> list[Frame]:
    """Streams that the server has to reset itself (MadeYouReset, CVE-2025-8671)."""
    return [
        frame
        for stream_id in range(3, 4 * RESET_BURST, 2)
        for frame in (wire.head(stream_id, request_headers("POST", CHAT)), overflow(stream_id))
    ]


def frames_behind_a_reset(wire: FrameWire) -> list[Frame]:
    """Each is answered with one more RST_STREAM."""
    data = DataFrame(3, data=b"x")
    return [
        wire.head(3, request_headers("POST", CHAT)),
        overflow(3),
        *[data] * (2 * RESET_BURST),
    ]


def requests_that_cannot_be_meant(wire: FrameWire) -> list[Frame]:
    """Of a size at which fewer than `MAX_STREAMS` are in one read."""
    return [
        wire.head(
            stream_id,
            [*request_headers("GET", "/a b"), ("x", f"{stream_id:03}" * 400)],
            end_stream=True,
        )
        for stream_id in range(3, 4 * RESET_BURST, 2)
    ]


def flood_of(frame: Frame) -> Callable[[FrameWire], list[Frame]]:
    return lambda _wire: [frame] * (2 * CONTROL_BURST)


def empty_data_flood(wire: FrameWire) -> list[Frame]:
    return [wire.head(3, request_headers("POST", CHAT)), *[DataFrame(3)] * (2 * CONTROL_BURST)]


def priority_flood(wire: FrameWire) -> list[Frame]:
    return [
        PriorityFrame(stream_id, depends_on=stream_id + 2, stream_weight=3)
        for stream_id in range(5, 4 * CONTROL_BURST, 2)
    ]


FLOODS: dict[str, Callable[[FrameWire], list[Frame]]] = {
    "header list": huge_list,
    "HPACK bomb": hpack_bomb,
    "rapid reset": rapid_reset,
    "resets made by us": made_resets,
    "DATA behind a reset": frames_behind_a_reset,
    "requests that cannot be meant": requests_that_cannot_be_meant,
    "empty DATA": empty_data_flood,
    "PRIORITY": priority_flood,
    "SETTINGS": flood_of(SettingsFrame(0, settings={SettingCodes.HEADER_TABLE_SIZE: MAX_U32})),
    "PING": flood_of(PingFrame(0, opaque_data=b"12345678")),
    "WINDOW_UPDATE": flood_of(WindowUpdateFrame(0, window_increment=1)),
    "WINDOW_UPDATE of a closed stream": flood_of(WindowUpdateFrame(1, window_increment=1)),
}


async def test_a_flood_of_frames_is_told_to_calm_down(appliance: RunningAppliance) -> None:
    async with unharmed(appliance):
        for name, flood in [*FLOODS.items(), ("unknown", flood_of(raw_frame(0xBE, 0, b"?")))]:
            async with FrameWire.open(appliance) as wire, trio.open_nursery() as sending:
                await wire.greet()
                await assert_connection_serves(wire, 1)
                sending.start_soon(wire.send_frames, *flood(wire))
                goodbye = await wire.wait_for(GoAwayFrame)
                assert goodbye.error_code == ErrorCodes.ENHANCE_YOUR_CALM, name
                wire.drop()


def overflow(stream_id: int) -> Frame:
    return WindowUpdateFrame(stream_id, window_increment=2**31 - 1)


FRAMES: dict[str, Callable[[FrameWire], list[Frame]]] = {
    "CONTINUATION without end": continuation_flood,
    "window overflow": lambda wire: [WindowUpdateFrame(0, window_increment=2**31 - 1)],
    "window overflow of a stream": lambda wire: [
        wire.head(1, request_headers("POST", CHAT)),
        overflow(1),
    ],
    "window by zero": lambda wire: [raw_frame(0x8, 0, b"\0\0\0\0")],
    "window of a stream by zero": lambda wire: [
        wire.head(1, request_headers("POST", CHAT)),
        raw_frame(0x8, 1, b"\0\0\0\0"),
    ],
    "DATA on an idle stream": lambda wire: [DataFrame(1, data=b"x")],
    "DATA on stream 0": lambda wire: [raw_frame(0x0, 0, b"x")],
    "RST_STREAM on an idle stream": lambda wire: [RstStreamFrame(1, error_code=8)],
    "CONTINUATION of nothing": lambda wire: [
        ContinuationFrame(1, data=b"\x82", flags=["END_HEADERS"])
    ],
    "an even stream": lambda wire: [wire.get(2)],
    "a stream lower than the last": lambda wire: [wire.get(3), wire.get(1)],
    "an upper-case name": lambda wire: [
        wire.head(1, [*request_headers("GET", "/"), ("X-Upper", "1")])
    ],
    "no path": lambda wire: [wire.head(1, request_headers("GET", "/")[:3])],
    "CONNECT with a path": lambda wire: [wire.head(1, request_headers("CONNECT", "/"))],
    "two paths": lambda wire: [wire.head(1, [*request_headers("GET", "/"), (":path", "/two")])],
    "pseudo-header last": lambda wire: [wire.head(1, [("x", "1"), *request_headers("GET", "/")])],
    "extended CONNECT": lambda wire: [
        wire.head(1, [*request_headers("GET", "/"), (":protocol", "websocket")])
    ],
    "connection header": lambda wire: [
        wire.head(1, [*request_headers("GET", "/"), ("connection", "close")])
    ],
    "transfer-encoding": lambda wire: [
        wire.head(1, [*request_headers("GET", "/"), ("transfer-encoding", "x")])
    ],
    "CRLF in a value": lambda wire: [
        wire.head(1, [*request_headers("GET", "/"), ("x", "a\r\nb: c")])
    ],
    "HPACK garbage": lambda wire: [
        HeadersFrame(1, data=b"\xff\xff\xff\xff", flags=["END_HEADERS"])
    ],
    "longer than its length": lambda wire: wire.post(1, CHAT, b"{}", ("content-length", "1")),
    "shorter than its length": lambda wire: wire.post(1, CHAT, b"{}", ("content-length", "3")),
    "length with a plus": lambda wire: wire.post(1, CHAT, b"{}", ("content-length", "+2")),
    "two lengths": lambda wire: wire.post(
        1, CHAT, b"{}", ("content-length", "2"), ("content-length", "3")
    ),
    "initial window too large": lambda wire: [
        SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: 2**31})
    ],
    "frame size too small": lambda wire: [
        SettingsFrame(0, settings={SettingCodes.MAX_FRAME_SIZE: 1})
    ],
    "push neither on nor off": lambda wire: [
        SettingsFrame(0, settings={SettingCodes.ENABLE_PUSH: 2})
    ],
    "SETTINGS of odd size": lambda wire: [raw_frame(0x4, 0, b"12345")],
    "PING of odd size": lambda wire: [raw_frame(0x6, 0, b"1")],
    "padding longer than the frame": lambda wire: [raw_frame(0x0, 1, b"\xff" + b"x", flags=0x8)],
    "frame too large": lambda wire: [raw_frame(0x0, 1, b"x" * 20_000)],
    "depends on itself": lambda wire: [PriorityFrame(1, depends_on=1)],
    "too many streams": lambda wire: [
        wire.head(2 * n + 1, request_headers("POST", CHAT)) for n in range(200)
    ],
    "GOAWAY": lambda wire: [GoAwayFrame(0, error_code=0, last_stream_id=0)],
}


async def test_a_frame_that_may_not_be_ends_its_stream_or_connection(
    appliance: RunningAppliance,
) -> None:
    async with unharmed(appliance):
        for name, frames in FRAMES.items():
            async with FrameWire.open(appliance) as wire:
                await wire.greet()
                await wire.wait_for(SettingsFrame)
                await wire.send_frames(*frames(wire))
                with trio.fail_after(PATIENCE_S):
                    while (frame := await wire.next_frame()) is not None:
                        if isinstance(frame, RstStreamFrame | GoAwayFrame):
                            assert frame.error_code != ErrorCodes.INTERNAL_ERROR, name
                            break
                        assert not isinstance(frame, DataFrame), name


async def test_a_client_may_change_its_header_table_as_it_likes(
    appliance: RunningAppliance,
) -> None:
    async with unharmed(appliance), FrameWire.open(appliance) as wire:
        await wire.greet()
        for number, size in enumerate([MAX_U32, 0, 100, 4096, 100_000, 4096, 4096]):
            wire._decoder.max_allowed_table_size = max(size, 4096)
            await wire.send_frames(
                SettingsFrame(0, settings={SettingCodes.HEADER_TABLE_SIZE: size})
            )
            await assert_connection_serves(wire, 2 * number + 1)
            assert wire._decoder.header_table_size <= min(size, 4096)


async def test_no_more_streams_are_open_than_were_offered(appliance: RunningAppliance) -> None:
    async with unharmed(appliance), FrameWire.open(appliance) as wire:
        await wire.greet()
        settings = await wire.wait_for(SettingsFrame)
        assert settings.settings[SettingCodes.MAX_CONCURRENT_STREAMS] == MAX_STREAMS
        assert not settings.settings.get(SettingCodes.ENABLE_CONNECT_PROTOCOL)
        # As many as that are served, over and over.
        for first in (0, MAX_STREAMS):
            ids = [2 * n + 1 for n in range(first, first + MAX_STREAMS)]
            await wire.send_frames(*[wire.get(stream_id, "/health/live") for stream_id in ids])
            await wire.send_frames(WindowUpdateFrame(0, window_increment=WINDOW))
            for stream_id in ids:
                assert await wire.wait_for_end(stream_id) == LIVE_BODY


NOT_TLS = (
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x00\x05hello",
    b"\x16\x03\x01\xff\xff" + b"\x01" * 200,
    b"\0" * 1000,
    b"\x15\x03\x03\x00\x02\x02\x28",
    bytes(range(256)) * 64,
)


async def test_what_is_not_tls_is_closed(appliance: RunningAppliance) -> None:
    async with unharmed(appliance):
        for said in NOT_TLS:
            stream = await connect_tcp(appliance.port)
            await stream.send_all(said)
            stream.socket.shutdown(socket.SHUT_WR)
            assert await is_closed(stream)
            stream.socket.close()


async def test_garbage_inside_tls_or_instead_of_it_ends_the_connection(
    appliance: RunningAppliance,
) -> None:
    async with unharmed(appliance):
        for kind in (Wire, FrameWire):
            async with kind.open(appliance) as wire:
                await wire.send(b"\x00\xffgarbage\r\n\r\n" * 100)
                await wire.read_to_end()
            async with kind.open(appliance) as wire:
                await wire.stream.transport_stream.send_all(b"no record of TLS" * 100)
                await wire.read_to_end()


async def test_resets_at_any_moment_leave_nothing(appliance: RunningAppliance) -> None:
    hello = client_hello(appliance)
    async with unharmed(appliance):
        for said in (b"", hello[:50], hello):
            stream = await connect_tcp(appliance.port)
            await stream.send_all(said)
            reset(stream)
        request = post(CHAT, slow_chat())
        for end in (0, 30, request.index(b"{") + 5):
            async with Wire.open(appliance) as wire:
                await wire.send(request[:end])
                wire.reset()
        async with Wire.open(appliance) as wire:
            await wire.send(request)
            await wire.read_until(b"data: ")
            wire.reset()
        async with Wire.open(appliance) as wire:  # the answer is on its way to nobody
            await wire.send(LIVE)
            wire.reset()
        async with FrameWire.open(appliance) as frames:
            await frames.greet()
            frames.reset()
        async with FrameWire.open(appliance) as frames:
            await frames.greet()
            await frames.send_frames(HeadersFrame(1, data=b"\x82"))
            frames.reset()
        async with FrameWire.open(appliance) as frames:
            await frames.greet()
            await frames.send_frames(frames.head(1, request_headers("POST", CHAT)))
            await frames.send_frames(DataFrame(1, data=b"{"))
            frames.reset()
        async with FrameWire.open(appliance) as frames:
            await frames.greet()
            for stream_id in (1, 3, 5):
                await frames.send_frames(*frames.post(stream_id, CHAT, slow_chat()))
            await frames.wait_for(DataFrame)
            frames.reset()


async def test_every_stream_hears_of_the_connections_end_whoever_notices_it(
    appliance: RunningAppliance,
) -> None:
    """An answer's own task may meet the closed socket first; found by test_h2_fuzz."""
    async with unharmed(appliance):
        for _ in range(15):
            async with FrameWire.open(appliance) as wire:
                await wire.greet()
                asking = [wire.get(n, "/health/live") for n in range(1, 121, 2)]
                waiting = [wire.head(n, request_headers("POST", CHAT)) for n in (121, 123, 125)]
                await wire.send_frames(*asking, *waiting)
                await wire.wait_for(HeadersFrame)
                wire.reset()


async def test_a_reset_stream_aborts_its_generation_alone(appliance: RunningAppliance) -> None:
    async with unharmed(appliance), FrameWire.open(appliance) as wire:
        await wire.greet()
        await wire.send_frames(*wire.post(1, CHAT, slow_chat()))
        await wire.send_frames(*wire.post(3, CHAT, slow_chat(tokens=30)))
        await wire.wait_for(DataFrame, 1)
        await wire.send_frames(RstStreamFrame(1, error_code=ErrorCodes.CANCEL))
        await aborted(appliance)
        assert (await wire.wait_for_end(3)).endswith(b"data: [DONE]\n\n")


async def test_a_closed_connection_does_not_wait_for_the_garbage_collector(
    appliance: RunningAppliance,
) -> None:
    """Which does not see that each holds 30 KB of OpenSSL's memory, and so does not hurry."""

    def alive(*kinds: type) -> int:
        return sum(isinstance(thing, kinds) for thing in gc.get_objects())

    await assert_serving(appliance)
    gc.collect()
    gc.disable()
    try:
        async with unharmed(appliance):
            for _ in range(5):
                async with FrameWire.open(appliance) as wire:
                    await wire.greet()
                    await assert_connection_serves(wire, 1)
                await assert_serving(appliance)
        assert alive(Connection, Http1Protocol, Http2Protocol) == 0
    finally:
        gc.enable()


# Where a request ends.

HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = chat()
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


def framed(*headers: bytes, body: bytes = BODY, line: bytes = b"HTTP/1.1") -> bytes:
    first = b"POST " + CHAT.encode() + b" " + line
    return b"\r\n".join([first, b"Host: localhost", *headers, b"", body])


LENGTH = b"Content-Length: %d" % len(BODY)
TE = b"Transfer-Encoding: chunked"

# What is sent, and whether the request may be served; each is followed by LAST_LIVE.
SHAPES: dict[str, tuple[bytes, bool]] = {
    "plain": (framed(LENGTH), True),
    "chunked": (framed(TE, body=CHUNKED), True),
    "length and chunked": (framed(LENGTH, TE, body=b"0\r\n\r\n" + HIDDEN), False),
    "chunked and length": (framed(TE, LENGTH, body=CHUNKED), False),
    "chunked and a short length": (framed(b"Content-Length: 4", TE, body=CHUNKED), False),
    "two lengths": (framed(b"Content-Length: 0", LENGTH, body=HIDDEN), False),
    "two lengths in one": (framed(b"Content-Length: 0, %d" % len(BODY)), False),
    "the same length twice": (framed(LENGTH, LENGTH), True),
    "length with a plus": (framed(b"Content-Length: +%d" % len(BODY)), False),
    "length with a minus": (framed(b"Content-Length: -1", body=HIDDEN), False),
    "length in hex": (framed(b"Content-Length: 0x10", body=HIDDEN), False),
    "length with an underscore": (framed(b"Content-Length: 1_0", body=HIDDEN), False),
    "length with inner space": (framed(b"Content-Length: 1 0", body=HIDDEN), False),
    "length with outer space": (framed(b"Content-Length:  %d \t" % len(BODY)), True),
    "length of many digits": (framed(b"Content-Length: " + b"9" * 500, body=HIDDEN), False),
    "empty length": (framed(b"Content-Length: ", body=HIDDEN), False),
    "space before the colon": (framed(b"Content-Length : 0", body=HIDDEN), False),
    "space before the name": (framed(b" Content-Length: 0", body=HIDDEN), False),
    "folded length": (framed(b"Content-Length:\r\n %d" % len(BODY)), False),
    "folded coding": (framed(b"Transfer-Encoding:\r\n chunked", body=CHUNKED), False),
    "folded into another": (framed(b"X: y\r\n\tContent-Length: 0", LENGTH), False),
    "other coding": (framed(b"Transfer-Encoding: xchunked", body=CHUNKED), False),
    "identity": (framed(b"Transfer-Encoding: identity", body=CHUNKED), False),
    "two codings": (framed(b"Transfer-Encoding: gzip, chunked", body=CHUNKED), False),
    "coding twice": (framed(TE, TE, body=CHUNKED), False),
    "coding with a control": (framed(b"Transfer-Encoding: \x0bchunked", body=CHUNKED), False),
    "coding and HTTP/1.0": (framed(TE, body=CHUNKED, line=b"HTTP/1.0"), False),
    "bare LF": (framed(LENGTH).replace(b"\r\n", b"\n"), False),
    "bare LF once": (framed(LENGTH).replace(b"\r\n", b"\n", 1), False),
    "bare LF at the end of the head": (framed(LENGTH).replace(b"\r\n\r\n", b"\r\n\n"), False),
    "bare LF in a value": (framed(b"X: y\nContent-Length: 0", body=HIDDEN), False),
    "bare CR in a value": (framed(b"X: y\rContent-Length: 0", LENGTH), False),
    "NUL in a value": (framed(b"X: \0", LENGTH), False),
    "chunk extension": (framed(TE, body=CHUNKED.replace(b"\r\n", b";a=b\r\n", 1)), True),
    "LF after a chunk's size": (framed(TE, body=CHUNKED.replace(b"\r\n", b"\n", 1)), False),
    "LF in a chunk extension": (framed(TE, body=b"0;\n" + CHUNKED), False),
    "chunk size with 0x": (framed(TE, body=b"0x" + CHUNKED), False),
    "chunk size with a sign": (framed(TE, body=b"-" + CHUNKED), False),
    "chunk size with a space": (framed(TE, body=b" " + CHUNKED), False),
    "chunk size of many digits": (framed(TE, body=b"F" * 30 + b"\r\n" + HIDDEN), False),
    "no CRLF after a chunk": (framed(TE, body=b"1\r\n{0\r\n\r\n" + HIDDEN), False),
    "a length in the trailers": (
        framed(TE, body=CHUNKED[:-2] + b"Content-Length: 0\r\n\r\n"),
        True,
    ),
    "HTTP/2.0": (framed(LENGTH, line=b"HTTP/2.0"), False),
    "HTTP/0.9": (framed(LENGTH, line=b"HTTP/0.9"), False),
    "preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", False),
    "two spaces": (framed(LENGTH).replace(b" HTTP/", b"  HTTP/", 1), False),
    "no host": (framed(LENGTH).replace(b"Host: localhost\r\n", b""), False),
    "two hosts": (framed(b"Host: other", LENGTH), False),
}


def answers(data: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each answer on one HTTP/1.1 connection."""
    found = list[tuple[int, bytes]]()
    while data:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        status, body = 0, b""
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                raise AssertionError(f"half an answer: {event} in {data!r}")
        found.append((status, body))
        data = client.trailing_data[0]
    return found


async def test_no_shape_of_a_request_hides_another(appliance: RunningAppliance) -> None:
    seen = 0
    async with unharmed(appliance):
        for name, (request, may_pass) in SHAPES.items():
            async with Wire.open(appliance) as wire:
                await wire.send(request + LAST_LIVE)
                found = answers(await wire.read_to_end())
            reached = len(await appliance.engine_seen()) - seen
            seen += reached
            statuses = [status for status, _ in found]
            if may_pass:
                assert reached == 1, name
                assert statuses == [200, 200], name
                assert found[1][1] == LIVE_BODY, name
            else:
                assert reached == 0, name
                assert len(statuses) == 1, name
                assert statuses[0] in {400, 431, 501, 505}, (name, statuses)


TARGETS = {
    "http://localhost/health/live": 200,
    "HTTPS://localhost:1/health/live?x=http://y": 200,
    "http://[/health/live": 200,
    "//health/live": 200,
    "http://localhost": 404,
    "http://[": 404,
    "*": 400,
    "?x": 400,
    "localhost:443": 400,
    "/%ff%fe?%zz": 404,
    "/%00": 404,
    "/../../etc/passwd": 404,
    "/health/live/": 404,
    "/health/live#x": 404,
}


async def test_a_target_is_served_or_refused_but_never_a_defect(
    appliance: RunningAppliance,
) -> None:
    async def ask(method: str, target: str, host: bytes) -> int:
        async with Wire.open(appliance) as wire:
            request = LAST_LIVE.replace(b"GET /health/live", f"{method} {target}".encode())
            await wire.send(request.replace(b"localhost\r", host + b"\r"))
            [(status, _)] = answers(await wire.read_to_end())
            return status

    async with unharmed(appliance):
        for target, status in TARGETS.items():
            assert await ask("GET", target, b"localhost") == status, target
            assert await ask("CONNECT", target, b"localhost") in {400, 404, 405}, target
        for host in (b"\xff", b"a b", b"a/b", b"x@y", b"[", b"::", b"a:b:c", b""):
            assert await ask("GET", "/health/live", host) in {200, 400}, host


# Early answers and pipelines.


async def test_a_client_that_waits_to_be_told_is_told_to_go_on(
    appliance: RunningAppliance,
) -> None:
    async with unharmed(appliance), Wire.open(appliance) as wire:
        request = post(CHAT, BODY, "Expect: 100-continue", "Connection: close")
        await wire.send(request[: -len(BODY)])
        assert await wire.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 \r\n\r\n"
        await wire.send(BODY)
        [(status, _)] = answers(await wire.read_to_end())
        assert status == 200


@pytest.mark.parametrize("path", [CHAT, "/nowhere"])
async def test_an_http1_client_gets_its_early_answer_while_it_still_uploads(
    nursery: trio.Nursery, tmp_path: Path, path: str
) -> None:
    appliance = await start(nursery, tmp_path, max_body_bytes=65_536)
    async with unharmed(appliance):
        async with Wire.open(appliance) as wire, trio.open_nursery() as sending:

            async def upload() -> None:
                head = post(path, b"").replace(b"Length: 0", b"Length: %d" % (100 * MIB))
                await wire.send(head)
                for _ in range(100):
                    if not await wire.send(bytes(MIB)):
                        break

            sending.start_soon(upload)
            answer = await wire.read_to_end()
            wire.drop()
        [(status, _)] = answers(answer)
        assert status == (413 if path == CHAT else 404)


async def test_an_http2_client_gets_its_early_answer_and_is_stopped_later(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start(nursery, tmp_path, max_body_bytes=65_536)
    async with unharmed(appliance), FrameWire.open(appliance) as wire:
        await wire.greet()
        headers = [*request_headers("POST", CHAT), ("content-length", str(100 * MIB))]
        await wire.send_frames(wire.head(1, headers))
        assert await wire.status(1) == 413
        assert b"request_too_large" in await wire.wait_for_end(1)
        sent, window, stopped = 0, WINDOW, None
        with trio.fail_after(PATIENCE_S):
            while stopped is None:
                while window >= 16_384:
                    await wire.send_frames(DataFrame(1, data=bytes(16_384)))
                    sent, window = sent + 16_384, window - 16_384
                frame = await wire.next_frame()
                assert frame is not None
                if isinstance(frame, WindowUpdateFrame) and frame.stream_id == 1:
                    window += frame.window_increment
                elif isinstance(frame, RstStreamFrame):
                    stopped = frame.error_code
        assert stopped == ErrorCodes.NO_ERROR
        assert DISCARD_BYTES < sent < DISCARD_BYTES + 2 * WINDOW
        # What was on its way is dropped, and the connection serves on.
        await wire.send_frames(DataFrame(1, data=bytes(100)))
        await assert_connection_serves(wire, 3)


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_a_common_client_reads_the_413_it_was_sent_early(
    nursery: trio.Nursery, tmp_path: Path, *, http2: bool
) -> None:
    appliance = await start(nursery, tmp_path, max_body_bytes=2 * MIB)
    async with (
        unharmed(appliance),
        appliance.client(http1=not http2, http2=http2) as client,
    ):
        response = await client.post(CHAT, content=bytes(3 * MIB))
        assert response.status_code == 413
        assert (await client.get("/health/live")).status_code == 200


async def test_pipelined_requests_are_answered_in_order(appliance: RunningAppliance) -> None:
    async with unharmed(appliance), Wire.open(appliance) as wire:
        await wire.send(LIVE * 3 + post(CHAT, chat()) + LIVE.replace(b"live", b"none") + LAST_LIVE)
        found = answers(await wire.read_to_end())
        assert [status for status, _ in found] == [200, 200, 200, 200, 404, 200]
        assert [found[n][1] for n in (0, 1, 2, 5)] == [LIVE_BODY] * 4


async def test_many_pipelined_requests_wait_in_the_clients_buffers(
    appliance: RunningAppliance,
) -> None:
    request = LIVE.replace(b"Host", b"X: " + b"x" * 8000 + b"\r\nHost")
    count = 20  # 160 KB: more than is taken in while an answer runs
    async with unharmed(appliance), Wire.open(appliance) as wire, trio.open_nursery() as sending:
        await wire.send(post(CHAT, slow_chat(tokens=10)))
        sending.start_soon(wire.send, request * count + LAST_LIVE)
        found = answers(await wire.read_to_end())
        assert [body for _, body in found[1:]] == [LIVE_BODY] * (count + 1)


async def test_a_client_that_pipelines_and_goes_away_aborts_its_generation(
    appliance: RunningAppliance,
) -> None:
    async with unharmed(appliance):
        for count, behind in enumerate((b"x", LIVE, LIVE * 100), start=1):
            async with RawConnection.open(appliance) as connection:
                slow = post(CHAT, chat("[[mode:slow:60000]] Go"))
                await connection.stream.send_all(slow + behind)
                await generating(appliance)
                connection.drop()
                await aborted(appliance, count)


async def test_http1_and_http2_clients_share_the_port(appliance: RunningAppliance) -> None:
    async with unharmed(appliance):
        for options in ({"http2": True, "http1": False}, {"http1": True}):
            async with appliance.client(**options) as client:
                responses: list[httpx2.Response] = []
                async with trio.open_nursery() as asking:
                    for _ in range(20):

                        async def ask() -> None:
                            responses.append(await client.get("/health/live"))  # noqa: B023

                        asking.start_soon(ask)
                assert [response.status_code for response in responses] == [200] * 20
