"""Two thousand idle connections and sixty-four streams: nothing grows, nothing is left.

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
    def descriptors(self) -> int:
        return int(self.metric("process_open_fds"))

    @property
    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

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

    gateway_trust = gateway.trust
    open_connections: list[trio.SSLStream[trio.SocketStream]] = []
    limiter = trio.CapacityLimiter(64)
    # 1. Warm: what is allocated once is allocated now.
    async with trio.open_nursery() as nursery:
        for _ in range(STREAMS):
            nursery.start_soon(stream, trio.current_time() + 0.1)
    cold = (gateway.resident_kib, gateway.descriptors, gateway.threads)
    # 2. Idle connections, then streams beside them.
    async with trio.open_nursery() as nursery:
        for _ in range(IDLE_CONNECTIONS):
            nursery.start_soon(idle)
    held = (gateway.resident_kib, gateway.descriptors)
    assert held[1] >= IDLE_CONNECTIONS
    async with trio.open_nursery() as nursery:
        for _ in range(STREAMS):
            nursery.start_soon(stream, trio.current_time() + soak_seconds)
    after_streams = gateway.resident_kib
    # 3. They go; everything they held goes with them.
    for tls in open_connections:
        tls.transport_stream.socket.close()
    with trio.fail_after(30):
        while gateway.descriptors > cold[1] + 5:
            await trio.sleep(0.1)
    assert gateway.metric("dcv_exchanges_running") == 0
    assert gateway.metric("dcv_requests_waiting") == 0
    assert gateway.threads <= cold[2] + 2
    print(
        f"\n{streamed} streams in {soak_seconds:g} s; resident MiB: warm {cold[0] >> 10}, "
        f"{IDLE_CONNECTIONS} idle {held[0] >> 10}, after the streams {after_streams >> 10}, "
        f"after all left {gateway.resident_kib >> 10}"
    )
    # The streams added nothing beside the idle connections, beyond the allocator's noise.
    assert after_streams - held[0] < 20 << 10
    assert streamed >= STREAMS
