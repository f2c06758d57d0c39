"""`dcv proxy`, full: who has no place is told so in time, and who leaves stops waiting."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import pytest
import trio

from appliance.log import configure_log
from appliance.verifier import proxy as proxy_module
from appliance.verifier.proxy import _Proxy

GET = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"


class Body(httpx2.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"{}"


class Appliance(httpx2.AsyncBaseTransport):
    """Takes as long as it is told to."""

    def __init__(self) -> None:
        self.goes_on = trio.Event()
        self.asked = 0

    async def handle_async_request(self, _request: httpx2.Request) -> httpx2.Response:
        self.asked += 1
        await self.goes_on.wait()
        return httpx2.Response(200, stream=Body())


@asynccontextmanager
async def one_place(
    monkeypatch: pytest.MonkeyPatch, appliance: Appliance, *, place_s: float
) -> AsyncIterator[int]:
    """The port of a proxy that forwards one request at a time."""
    monkeypatch.setattr(proxy_module, "MAX_AT_ONCE", 1)
    monkeypatch.setattr(proxy_module, "PLACE_S", place_s)
    log = configure_log(format="json", level="error")
    async with (
        httpx2.AsyncClient(transport=appliance, base_url="https://appliance") as client,
        trio.open_nursery() as nursery,
    ):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy = _Proxy(client, {}, log)
        nursery.start_soon(trio.serve_listeners, proxy.serve, listeners)
        with trio.fail_after(20):
            yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def answer_on(stream: trio.SocketStream) -> bytes:
    """Head and body, which is of one part or an error's."""
    answer = b""
    while not answer.endswith((b"}}", b"0\r\n\r\n")):
        data = await stream.receive_some(4096)
        assert data, answer
        answer += data
    return answer


async def until_asked(appliance: Appliance, times: int) -> None:
    while appliance.asked < times:
        await trio.sleep(0.01)


async def test_who_finds_no_place_in_time_may_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It once waited without a word for a stream to end."""
    appliance = Appliance()
    async with one_place(monkeypatch, appliance, place_s=0.2) as port:
        running = await trio.open_tcp_stream("127.0.0.1", port)
        await running.send_all(GET)
        await until_asked(appliance, 1)
        waiting = await trio.open_tcp_stream("127.0.0.1", port)
        await waiting.send_all(GET)
        answer = await answer_on(waiting)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"x-should-retry" not in answer
        appliance.goes_on.set()
        assert (await answer_on(running)).startswith(b"HTTP/1.1 200")
        await waiting.send_all(GET)  # on the same connection
        assert (await answer_on(waiting)).startswith(b"HTTP/1.1 200")
        await running.aclose()
        await waiting.aclose()


async def test_who_leaves_while_it_waits_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    appliance = Appliance()
    async with one_place(monkeypatch, appliance, place_s=20) as port:
        running = await trio.open_tcp_stream("127.0.0.1", port)
        await running.send_all(GET)
        await until_asked(appliance, 1)
        waiting = await trio.open_tcp_stream("127.0.0.1", port)
        await waiting.send_all(GET)
        await trio.sleep(0.1)
        await waiting.aclose()
        await trio.sleep(0.1)
        appliance.goes_on.set()
        assert (await answer_on(running)).startswith(b"HTTP/1.1 200")
        await running.aclose()
        await trio.sleep(0.1)
    assert appliance.asked == 1
