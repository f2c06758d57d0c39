"""A front that holds the appliance's own TLS key, and lies: what only receipts can find out.

It speaks HTTP/1.1 to the client and to the appliance behind it, reads each answer whole, and hands
on what `lie` makes of it.
"""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import h11
import httpx2
import pytest
import trio

from appliance import boot
from appliance.serving.keys import TlsIdentity, create_tls_identity
from tests.integration.appliance import RunningAppliance


@dataclass(frozen=True)
class Answer:
    """What is handed on.

    Attributes:
        clean: whether the body ends as HTTP has it.
        pause_s: before each byte of the body.
        hangs: whether nothing more comes after the body, not even its end.
        raw: what is written in place of all of it, byte for byte; the connection stays open behind
            it where it is `clean`.
        endless: what is written behind `raw` for ever.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    clean: bool = True
    pause_s: float = 0.0
    hangs: bool = False
    raw: bytes | None = None
    endless: bytes = b""

    def saying(self, body: bytes) -> Answer:
        return replace(self, body=body)

    def heading(self, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return replace(self, headers=self.headers | named)


Lie: TypeAlias = Callable[[str, Answer], Answer]
"""Of a path, with its query, and the truth."""


@dataclass
class Front:
    """Attributes: asked: method and path of every request, in their order."""

    port: int
    lie: Lie
    asked: list[tuple[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def posts(self) -> int:
        return sum(method == "POST" for method, _ in self.asked)


def steal_tls_key(monkeypatch: pytest.MonkeyPatch) -> list[TlsIdentity]:
    """Where the appliance's TLS key will be once it has booted."""
    stolen: list[TlsIdentity] = []

    def created(names: Iterable[str], *, now: datetime.datetime) -> TlsIdentity:
        identity = create_tls_identity(names, now=now)
        stolen.append(identity)
        return identity

    monkeypatch.setattr(boot, "create_tls_identity", created)
    return stolen


def honest(_path: str, answer: Answer) -> Answer:
    return answer


@asynccontextmanager
async def front(appliance: RunningAppliance, key: TlsIdentity) -> AsyncIterator[Front]:
    context = key.server_context()
    context.set_alpn_protocols(["http/1.1"])
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    it = Front(listener.socket.getsockname()[1], honest)

    async def serve(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        try:
            async with tls, appliance.client() as inside:
                await _converse(it, tls, inside)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, serve, [listener]))
        yield it
        nursery.cancel_scope.cancel()


async def _converse(
    it: Front, tls: trio.SSLStream[trio.SocketStream], inside: httpx2.AsyncClient
) -> None:
    http = h11.Connection(h11.SERVER)
    while True:
        asked, body = await _request(http, tls)
        if asked is None:
            return
        path = asked.target.decode()
        it.asked.append((asked.method.decode(), path))
        it.headers.append({name.decode(): value.decode() for name, value in asked.headers})
        content = b""
        async with inside.stream(
            asked.method.decode(),
            path,
            content=body,
            headers=[(k, v) for k, v in asked.headers if k not in (b"host", b"connection")],
        ) as truth:
            try:
                async for part in truth.aiter_raw():
                    content += part
            except httpx2.RemoteProtocolError:
                pass  # it broke off; from here on it looks whole
        kept = {
            name: value
            for name, value in truth.headers.items()
            if name not in ("content-length", "transfer-encoding", "connection", "date")
        }
        told = it.lie(path, Answer(truth.status_code, kept, content))
        if not await _tell(http, tls.send_all, told):
            return
        if told.raw is None:
            http.start_next_cycle()
        else:
            http = h11.Connection(h11.SERVER)  # which knows of nothing that was written


async def _request(
    http: h11.Connection, tls: trio.SSLStream[trio.SocketStream]
) -> tuple[h11.Request | None, bytes]:
    asked, body = None, b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(bytes(await tls.receive_some(65536)))
        elif isinstance(event, h11.Request):
            asked = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return asked, body
        else:
            return None, b""


async def _tell(
    http: h11.Connection, send: Callable[[bytes], Awaitable[None]], told: Answer
) -> bool:
    """Chunked, and whether there is more to come on this connection."""
    if told.raw is not None:
        await send(told.raw)
        while told.endless:
            await send(told.endless)
        return told.clean
    headers = [*told.headers.items(), ("transfer-encoding", "chunked")]
    await send(http.send(h11.Response(status_code=told.status, headers=headers)) or b"")
    parts = (
        [told.body] if not told.pause_s else [told.body[i : i + 1] for i in range(len(told.body))]
    )
    for part in parts:
        await trio.sleep(told.pause_s)
        await send(http.send(h11.Data(data=part)) or b"")
    if told.hangs:
        await trio.sleep_forever()
    if not told.clean:
        return False
    await send(http.send(h11.EndOfMessage()) or b"")
    return True
