"""What Hypercorn 0.18.0 does without `appliance.web`: dies, hangs and hoards.

Each is a reason for something in `web.server`, `web.http1` or `web.http2`, and its counterpart in
test_server shows that the appliance does not. A test that fails here is good news: a release fixed
something, and what we do about it can be looked at again, and perhaps go.
"""

from __future__ import annotations

import importlib.metadata
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trustme
from h2.settings import SettingCodes

from tests.fakes import plain_hypercorn
from tests.integration.wire import (
    PATIENCE_S,
    WINDOW,
    DataFrame,
    FrameWire,
    Header,
    SettingsFrame,
    WindowUpdateFrame,
    Wire,
    request_headers,
)

LIVE = b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
LONG = b"POST /long HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
ANSWER_BYTES = plain_hypercorn.EVENTS * len(plain_hypercorn.EVENT)


@dataclass
class PlainServer:
    port: int
    process: trio.Process
    authority: trustme.CA

    @property
    def trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")

    async def has_ended(self, *, within_s: float) -> bool:
        """Whether the process ends in that time."""
        with trio.move_on_after(within_s):
            await self.process.wait()
        return self.process.returncode is not None

    async def serves(self) -> bool:
        async with Wire.open(self) as wire:
            await wire.send(LIVE)
            return b" 200 " in await wire.read_to_end()


async def read_line(stream: trio.abc.ReceiveStream) -> bytes:
    line = b""
    while (byte := await stream.receive_some(1)) not in {b"", b"\n"}:
        line += byte
    return line


@pytest.fixture
async def plain(tmp_path: Path) -> AsyncIterator[PlainServer]:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    process = await trio.lowlevel.open_process(
        [sys.executable, plain_hypercorn.__file__, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        with trio.fail_after(PATIENCE_S):
            port = int(await read_line(process.stdout))
        server = PlainServer(port, process, authority)
        assert await server.serves()
        yield server
    finally:
        process.kill()
        await process.wait()
        await process.stdout.aclose()


def test_the_release_is_the_one_that_was_read() -> None:
    """`web.server`, `web.http1` and `web.http2` override methods that nobody promised to keep."""
    versions = {name: importlib.metadata.version(name) for name in ("hypercorn", "h11", "h2")}
    assert versions["hypercorn"] == "0.18.0", (
        "Hypercorn changed. Read its changes to trio/{tcp_server,run,task_group,worker_context,"
        "lifespan}.py, protocol/{h11,h2,http_stream,events}.py and events.py; compare each method "
        "overridden in appliance/web/{server,http1,http2}.py with its new original; run "
        "tests/integration/test_{plain_hypercorn,server,h2_fuzz}.py; then change the version here, "
        "in pyproject.toml and in docs/adr/0003."
    )
    assert versions["h11"].startswith("0.16."), (
        "h11 changed. Check what it lets pass (test_server.SHAPES), `trailing_data`, and that its "
        "states are still those `web.http1` asks for."
    )
    assert versions["h2"].startswith("4.4."), (
        "h2 changed. `web.http2.GuardedConnection` overrides `_receive_frame`, reads "
        "`incoming_buffer._headers_buffer` and relies on 64 CONTINUATIONs at most, on a "
        "ProtocolError becoming a GOAWAY, and on `MAX_CLOSED_STREAMS`."
    )


async def test_data_after_an_early_answer_ends_the_process(plain: PlainServer) -> None:
    async with FrameWire.open(plain) as wire:
        await wire.greet()
        await wire.send_frames(wire.head(1, request_headers("POST", "/nowhere")))
        assert await wire.status(1) == 404
        await wire.wait_for_end(1)
        await wire.send_frames(DataFrame(1, data=b"x"))
        assert await plain.has_ended(within_s=PATIENCE_S)
    assert plain.process.returncode != 0


@pytest.mark.parametrize(
    "headers",
    [
        [*request_headers("GET", "/")[:3], (":path", b"/\xff")],
        request_headers("CONNECT", "/")[::2],  # :method and :authority alone
    ],
    ids=["non-ascii-path", "connect-without-path"],
)
async def test_a_head_it_does_not_expect_ends_the_process(
    plain: PlainServer, headers: list[Header]
) -> None:
    async with FrameWire.open(plain) as wire:
        await wire.greet()
        await wire.send_frames(wire.head(1, headers, end_stream=True))
        assert await plain.has_ended(within_s=PATIENCE_S)
    assert plain.process.returncode != 0


async def test_a_websocket_upgrade_with_a_byte_behind_it_ends_the_process(
    plain: PlainServer,
) -> None:
    async with Wire.open(plain) as wire:
        await wire.send(
            b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: bKdPyn3u98cTfZJSh4TNeQ==\r\n\r\nx"
        )
        assert await plain.has_ended(within_s=PATIENCE_S)
    assert plain.process.returncode != 0


async def test_an_http2_reader_without_window_makes_it_hold_the_whole_answer(
    plain: PlainServer,
) -> None:
    before = plain.resident_bytes()
    async with FrameWire.open(plain) as wire:
        await wire.greet()
        headers = request_headers("POST", "/long")
        await wire.send_frames(wire.head(1, headers, end_stream=True))
        while len(wire.body(1)) < WINDOW:
            await wire.wait_for(DataFrame, 1)
        assert plain.process.stdout is not None
        with trio.fail_after(PATIENCE_S):
            said = await read_line(plain.process.stdout)
        assert said == b"sent"  # the application was told that all is well
        assert plain.resident_bytes() - before > 0.8 * ANSWER_BYTES


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_a_stalled_reader_is_never_given_up_and_keeps_it_from_stopping(
    plain: PlainServer, *, http2: bool
) -> None:
    """There is no write deadline to wait for: `TCPServer.protocol_send` has none, and a shield."""
    kind = FrameWire if http2 else Wire
    async with kind.open(plain, receive_bytes=4096) as wire:
        if isinstance(wire, FrameWire):
            huge = 2**31 - 1
            await wire.greet({SettingCodes.INITIAL_WINDOW_SIZE: huge})
            await wire.send_frames(
                WindowUpdateFrame(0, window_increment=huge - WINDOW),
                wire.head(1, request_headers("POST", "/long"), end_stream=True),
            )
            await wire.wait_for(SettingsFrame)
        else:
            await wire.send(LONG)
            await wire.receive()
        await trio.sleep(1)  # the buffers between here and there fill
        plain.process.terminate()
        assert not await plain.has_ended(within_s=plain_hypercorn.GRACEFUL_S + 2)
        wire.reset()
        assert await plain.has_ended(within_s=PATIENCE_S)
