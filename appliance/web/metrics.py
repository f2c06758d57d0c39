"""The private listener for Prometheus: plain HTTP, loopback only, `GET /metrics` and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import h11
import trio

from appliance.errors import ListenError
from appliance.serving.metrics import CONTENT_TYPE

REQUEST_S = 5.0
"""For one scrape, from connect to the last byte."""

MAX_SCRAPES = 8
_LOOPBACK = "127.0.0.1"


async def serve_metrics(
    port: int,
    exposition: Callable[[], bytes],
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled.

    Args:
        port: on loopback; 0 takes a free one. task_status: started with the port.

    Raises:
        ListenError: the port cannot be opened.
    """
    try:
        listeners = await trio.open_tcp_listeners(port, host=_LOOPBACK, backlog=MAX_SCRAPES)
    except OSError as error:
        raise ListenError(
            f"cannot listen on {_LOOPBACK} port {port} for metrics: {error.strerror}"
        ) from error
    task_status.started(int(listeners[0].socket.getsockname()[1]))
    scrapes = trio.CapacityLimiter(MAX_SCRAPES)
    await trio.serve_listeners(partial(_answer, exposition, scrapes), listeners)


async def _answer(
    exposition: Callable[[], bytes], scrapes: trio.CapacityLimiter, stream: trio.SocketStream
) -> None:
    """One request per connection; whatever goes wrong ends this connection only."""
    async with stream:
        with trio.move_on_after(REQUEST_S):
            try:
                async with scrapes:
                    await _exchange(exposition, stream)
            except (h11.ProtocolError, trio.BrokenResourceError):
                return


async def _exchange(exposition: Callable[[], bytes], stream: trio.SocketStream) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=8192)
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(bytes(await stream.receive_some(4096)))
    if not isinstance(event, h11.Request):
        return
    found = event.method == b"GET" and event.target == b"/metrics"
    body = exposition() if found else b"not found\n"
    response = h11.Response(
        status_code=200 if found else 404,
        headers=[
            ("content-type", CONTENT_TYPE if found else "text/plain"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ],
    )
    for part in (response, h11.Data(data=body), h11.EndOfMessage()):
        await stream.send_all(connection.send(part) or b"")
