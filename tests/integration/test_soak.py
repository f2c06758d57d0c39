"""Two thousand idle connections and sixty-four streams, twice: nothing grows, nothing is left.

A minute in CI; longer by hand: `just test tests/integration/test_soak.py --soak-seconds 300`.
"""

from __future__ import annotations

import json
import resource
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import trio

from tests.integration.appliance import config_text
from tests.integration.test_life import CHAT, slow_chat

IDLE_CONNECTIONS = 2000
STREAMS = 64
DESCRIPTORS = 2 * IDLE_CONNECTIONS + 1000

NOISE_KIB = 8 << 10
"""Of the allocator and of what is kept of 1200 receipts, between two cycles that leave the same; as
much as 4 KiB of each of the idle connections."""

PASSING = 2
"""Descriptors of an engine connection and a database, which come and go."""


@dataclass(frozen=True)
class Footprint:
    """What the appliance holds at one moment."""

    resident_kib: int
    descriptors: int
    threads: int
    tasks: int


@dataclass
class Gateway:
    """The appliance as a process, looked at from outside."""

    folder: Path
    process: subprocess.Popen[bytes]
    port: int
    metrics: str

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.folder / "tls.pem")

    @property
    def resident_kib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(
            next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]
        )

    @property
    def footprint(self) -> Footprint:
        return Footprint(
            self.resident_kib,
            int(self.metric("process_open_fds")),
            len(list(Path(f"/proc/{self.process.pid}/task").iterdir())),
            int(self.metric("dcv_tasks")),
        )

    def metric(self, name: str) -> float:
        text = httpx2.get(self.metrics, timeout=10).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < DESCRIPTORS:
        pytest.skip(f"needs {DESCRIPTORS} descriptors, this machine allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    sections: dict[str, dict[str, object]] = {
        "listen": {"metrics_port": 0},
        "limits": {
            "max_connections": 4096,
            "max_connections_per_peer": 4096,
            "idle_s": 3600.0,
            "handshake_s": 60.0,
        },
        "log": {"level": "info"},
    }
    (tmp_path / "dcv.toml").write_text(config_text(tmp_path, (), sections))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "appliance", "serve", "--config", tmp_path / "dcv.toml"],
            stderr=log,
        )
    try:
        until = time.monotonic() + 30
        while '"serving"' not in (text := (tmp_path / "log").read_text()):
            assert process.poll() is None, text
            assert time.monotonic() < until, text
            time.sleep(0.05)
        lines = {line["event"]: line for line in map(json.loads, text.splitlines())}
        port = int(lines["serving"]["urls"][0].rpartition(":")[2])
        yield Gateway(tmp_path, process, port, lines["metrics"]["url"])
    finally:
        process.terminate()
        assert process.wait(60) == 0
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_two_thousand_idle_connections_and_64_streams_leave_nothing(
    gateway: Gateway, soak_seconds: float
) -> None:
    streamed = 0

    async def connect() -> trio.SSLStream[trio.SocketStream]:
        tcp = await trio.open_tcp_stream("127.0.0.1", gateway.port)
        tls = trio.SSLStream(tcp, gateway_trust, server_hostname="127.0.0.1")
        await tls.do_handshake()
        return tls

    async def idle() -> None:
        async with limiter:
            open_connections.append(await connect())

    async def stream(until: float) -> None:
        nonlocal streamed
        body = slow_chat(tokens=50, ms=20)
        while trio.current_time() < until:
            tls = await connect()
            await tls.send_all(
                b"POST %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s"
                % (CHAT.encode(), len(body), body)
            )
            data = b""
            while part := await tls.receive_some(65_536):
                data = (data + part)[-64:]
            assert b"[DONE]" in data
            await trio.aclose_forcefully(tls)
            streamed += 1

    async def run_streams(seconds: float) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(STREAMS):
                nursery.start_soon(stream, trio.current_time() + seconds)

    async def cycle() -> Footprint:
        """Idle connections, then streams beside them; they go, and what they held with them."""
        async with trio.open_nursery() as nursery:
            for _ in range(IDLE_CONNECTIONS):
                nursery.start_soon(idle)
        held = gateway.footprint
        assert held.descriptors >= IDLE_CONNECTIONS
        assert held.tasks >= cold.tasks + IDLE_CONNECTIONS
        await run_streams(soak_seconds / 2)
        after_streams = gateway.footprint
        for tls in open_connections:
            tls.transport_stream.socket.close()
        open_connections.clear()
        with trio.fail_after(30):
            while gateway.metric("dcv_connections_open"):
                await trio.sleep(0.1)
        left = gateway.footprint
        print(f"\nheld {held}, after the streams {after_streams}, left {left}")
        # The streams added nothing beside the idle connections, beyond the allocator's noise.
        assert after_streams.resident_kib - held.resident_kib < 20 << 10
        return left

    gateway_trust = gateway.trust
    open_connections: list[trio.SSLStream[trio.SocketStream]] = []
    limiter = trio.CapacityLimiter(64)
    # 1. Warm: what is allocated once is allocated now.
    await run_streams(0.1)
    cold = gateway.footprint
    # 2. Twice the same: the first cycle may leave a heap with holes, the second must find them.
    first = await cycle()
    second = await cycle()
    print(f"cold {cold}; {streamed} streams in {soak_seconds:g} s")
    assert gateway.metric("dcv_exchanges_running") == 0
    assert gateway.metric("dcv_requests_waiting") == 0
    assert cold.tasks == first.tasks == second.tasks
    assert first.descriptors <= cold.descriptors + PASSING
    assert second.descriptors <= first.descriptors + PASSING
    assert second.threads <= first.threads <= cold.threads + 2
    assert second.resident_kib - first.resident_kib < NOISE_KIB
    assert streamed >= 2 * STREAMS
