"""Hypercorn on Trio, contained: one connection's trouble is never another's.

Hypercorn 0.18 parses HTTP well and supervises connections badly: any exception in its protocol
code ends the whole server, writes have no deadline, a client that stops reading HTTP/2 makes it
buffer without bound, and there is no hook for a serve loop of one's own. So we keep its protocol
classes and replace what is around them:

    serve            our accept loop: trio.serve_listeners, drain, end (Hypercorn's worker_serve)
    Connections      all that are open: caps, draining
    Connection       one of them: handshake, deadlines, containment, writing, closing
                     (Hypercorn's TCPServer)
    web.http1, web.http2   the protocol on a connection

No module global of Hypercorn is replaced. All of it leans on Hypercorn's internals, therefore the
version is pinned exactly and a test fails when it changes (docs/adr/0003).
"""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h2 import BufferCompleteError
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import (
    AppWrapper,
    ASGIReceiveEvent,
    ASGISendEvent,
    ConnectionState,
    LifespanState,
    Scope,
)
from hypercorn.utils import parse_socket_addr, wrap_app
from quart_trio import QuartTrio

from appliance.config import Limits, Listen
from appliance.errors import ApplianceError, InternalError, ListenError, NotServing, leaves
from appliance.log import Log
from appliance.serving.admission import Admission
from appliance.serving.lifecycle import Lifecycle, State
from appliance.serving.metrics import Metrics
from appliance.web.http1 import Http1Protocol, OwnHeaders
from appliance.web.http2 import MAX_STREAMS, Http2Protocol
from appliance.web.peers import site_of
from appliance.web.stream import WRITE_NOW, ClientGone, UncleanEnd
from appliance.web.tls import TlsStream

BACKLOG = 1024

HEAD_BYTES = 1 << 14
"""Of one request's head. Hypercorn's default for HTTP/1.1; nginx takes 32 KiB, Apache 8 KiB a
line."""

READ_BYTES = 1 << 16

WRITE_BYTES = 1 << 16
"""The write deadline counts for so much at a time: a long answer may take long, a stalled one may
not, and a client has to read 3 KiB a second with the default of 20 s."""

READING_TURNS = 4
"""For the reading task: to see that there is something, to read it, and as many to hand it on."""

FLUSH_S = 2.0
"""For the last bytes of ended connections, and for a TLS goodbye, to leave our buffers."""

LINGER_S = 10.0
"""How long we go on reading, to drop it, what a client sends after its answer. nginx takes 30 s."""

REFUSAL_LOG_S = 1.0
"""Refused connections are logged this often at most."""

TCP_OPTIONS = (
    # A peer that vanished without a word is noticed within a minute, also where an answer is
    # computed for long and nothing is written.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class Connections:
    """Every open connection, and how many each peer holds."""

    def __init__(self, limits: Limits, metrics: Metrics, log: Log) -> None:
        self.limits = limits
        self.metrics = metrics
        self.log = log
        self.draining = False
        metrics.gauge("dcv_connections_open", "Open connections", lambda: len(self._open))
        self._open = set[Connection]()
        self._per_peer = Counter[str]()
        self._changed = trio.Event()
        self._refused = 0
        self._told_at = -math.inf

    def enter(self, connection: Connection, site: str) -> bool:
        """Count a new connection; False when it is one too many."""
        if (
            len(self._open) >= self.limits.max_connections
            or self._per_peer[site] >= self.limits.max_connections_per_peer
        ):
            self._tell_refused()
            return False
        self._open.add(connection)
        self._per_peer[site] += 1
        return True

    def leave(self, connection: Connection, site: str) -> None:
        """Forget a connection."""
        self._open.discard(connection)
        self._per_peer[site] -= 1
        if not self._per_peer[site]:
            del self._per_peer[site]
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def drain(self) -> None:
        """Connections end as soon as they have nothing to do."""
        self.draining = True
        for connection in tuple(self._open):
            connection.end_when_idle()

    async def wait_none(self) -> None:
        """Wait until none is open."""
        while self._open:
            await self._changed.wait()

    def close_all(self) -> None:
        """Close every socket now, which also ends writes that are shielded."""
        for connection in tuple(self._open):
            connection.close_now()

    def _tell_refused(self) -> None:
        self._refused += 1
        self.metrics.connections_refused.inc()
        if trio.current_time() - self._told_at >= REFUSAL_LOG_S:
            self.log.warning("connection_refused", open=len(self._open), refused=self._refused)
            self._told_at, self._refused = trio.current_time(), 0


async def open_listeners(listen: Listen) -> list[trio.SocketListener]:
    """Open the public port; connections queue in the kernel until `serve` takes them.

    Raises:
        ListenError: it cannot be opened.
    """
    try:
        return await trio.open_tcp_listeners(listen.port, host=listen.host, backlog=BACKLOG)
    except OSError as error:
        raise ListenError(
            f"cannot listen on {listen.host} port {listen.port}: {error.strerror}"
        ) from error


def url_of(listener: trio.SocketListener) -> str:
    """The base URL of a listener."""
    host, port, *_ = listener.socket.getsockname()
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


async def serve(
    app: QuartTrio,
    listeners: list[trio.SocketListener],
    context: ssl.SSLContext,
    *,
    limits: Limits,
    lifecycle: Lifecycle,
    admission: Admission,
    metrics: Metrics,
    headers: OwnHeaders,
    log: Log,
) -> None:
    """Serve until the appliance leaves `serving`, then drain and return.

    Draining lets running exchanges go on for `drain_s` and then ends them with an error event;
    when the appliance was withdrawn they are ended at once. The listeners are closed as soon as
    draining begins. Cancellation ends every exchange with the appliance's reason and closes every
    connection.

    Args:
        context: the TLS server context.
        headers: of answers that the application does not see, to what is not HTTP as we read it.
    """
    config = _hypercorn_config(log)
    wrapped = wrap_app(app, config.wsgi_max_body_size, "asgi")
    lifespan_state: LifespanState = {}
    lifespan = Lifespan(wrapped, config, lifespan_state)
    service = Service(
        app=wrapped,
        config=config,
        worker=WorkerContext(None),
        state=lifespan_state,
        tls=context,
        connections=Connections(limits, metrics, log),
        headers=headers,
    )

    async def handle(stream: trio.SocketStream) -> None:
        await Connection(service, stream).run()

    async with trio.open_nursery() as lifespan_nursery:
        await lifespan_nursery.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        async with trio.open_nursery() as owner:
            handlers = await owner.start(_keep_handlers)
            try:
                # So that cancellation comes here first, and exchanges hear the reason.
                handlers.cancel_scope.shield = True
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(
                        partial(trio.serve_listeners, handle, listeners, handler_nursery=handlers)
                    )
                    await lifecycle.wait_until_not(State.SERVING)
                    accepting.cancel_scope.cancel()
                await service.worker.terminated.set()  # protocols take no more requests
                service.connections.drain()
                await _drain(lifecycle, admission, service.connections)
            finally:
                # However we came here, it was not the clients who ended what is still running.
                admission.interrupt_all(_reason(lifecycle))
                handlers.cancel_scope.cancel()
                # A write to a client that does not read is shielded; without its socket it ends.
                service.connections.close_all()
        await lifespan.wait_for_shutdown()
        lifespan_nursery.cancel_scope.cancel()


async def _keep_handlers(task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """The nursery of the connections; `serve` cancels it."""
    async with trio.open_nursery() as handlers:
        task_status.started(handlers)
        await trio.sleep_forever()


async def _drain(lifecycle: Lifecycle, admission: Admission, connections: Connections) -> None:
    """Let running exchanges end, then end them; then let the last bytes leave."""
    limits = connections.limits
    connections.log.info("draining", state=lifecycle.state.value, running=admission.running)
    if lifecycle.state is State.DRAINING:
        with trio.move_on_after(limits.drain_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when_withdrawn, lifecycle, nursery.cancel_scope)
                await admission.wait_idle()
                nursery.cancel_scope.cancel()
    admission.interrupt_all(_reason(lifecycle))
    with trio.move_on_after(FLUSH_S):
        await connections.wait_none()


def _reason(lifecycle: Lifecycle) -> ApplianceError:
    """Why exchanges are ended now."""
    if lifecycle.error is not None:
        return lifecycle.error
    if lifecycle.state is State.SERVING:  # a part of ours fell down, and takes us along
        return InternalError("a defect ended the appliance")
    return NotServing(f"the appliance is {lifecycle.state.value}")


async def _cancel_when_withdrawn(lifecycle: Lifecycle, scope: trio.CancelScope) -> None:
    await lifecycle.wait_until_not(State.DRAINING)
    scope.cancel()


@dataclass(frozen=True, slots=True)
class Service:
    """What every connection works with."""

    app: AppWrapper
    config: HypercornConfig
    worker: WorkerContext
    state: LifespanState
    tls: ssl.SSLContext
    connections: Connections
    headers: OwnHeaders


class Connection:
    """One TLS connection. Nothing but cancellation ever leaves `run`.

    One task reads and feeds the protocol; the application's tasks write through the protocol.
    Whoever wants the connection to end tells the reading task, and only that one tells the
    protocol: an application's task that did (Hypercorn's does) is cancelled by its own doing, and
    the streams it had not come to yet would never hear of it.
    """

    protocol: Http1Protocol | Http2Protocol

    def __init__(self, service: Service, transport: trio.SocketStream) -> None:
        self._service = service
        self._limits = service.connections.limits
        self._log = service.connections.log
        self._transport = transport
        self._write_lock = trio.Lock()
        self._reading = trio.CancelScope()
        self._idle = True
        self._idle_until = math.inf
        self._head_until = math.inf
        self._ending = False
        self._woken = False
        self._late = False
        self._peer_gone = False

    async def run(self) -> None:
        """Serve the connection to its end and close it."""
        try:
            await self._run()
        except BaseExceptionGroup as group:
            cancelled, failures = group.split(trio.Cancelled)
            if failures is not None:
                self._contain(failures)
            if cancelled is not None:
                raise cancelled from None
        except Exception as error:  # the point of this class: it ends here, not the server
            self._contain(error)

    async def _run(self) -> None:
        connections = self._service.connections
        with _take_over(self._transport) as peer:
            try:
                client = parse_socket_addr(peer.family, peer.getpeername())
                server = parse_socket_addr(peer.family, peer.getsockname())
                for option in TCP_OPTIONS:
                    peer.setsockopt(*option)
                unacknowledged_ms = round((self._limits.write_s + FLUSH_S) * 1000)
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unacknowledged_ms)
            except OSError:  # reset between accept and here
                return
            site = site_of(client[0]) if client else ""
            self._tls = TlsStream(peer, self._service.tls)
            if not connections.enter(self, site):
                return
            try:
                await self._serve(client, server)
            finally:
                connections.leave(self, site)
                self._tls.close()
                # The protocol holds us. Left to the garbage collector, which does not see the
                # buffers of OpenSSL, thousands of them would pile up.
                vars(self).pop("protocol", None)

    def end_when_idle(self) -> None:
        """End the connection now if nothing is being served on it; else when that has ended."""
        if self._idle:
            self._end()

    def close_now(self) -> None:
        """Close the socket, whoever uses it."""
        self._tls.close()

    async def _serve(self, client: tuple[str, int] | None, server: tuple[str, int] | None) -> None:
        try:
            with trio.fail_after(self._limits.handshake_s):
                await self._tls.do_handshake()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            return
        tasks = AppTasks(lost=lambda: self._peer_gone)
        async with tasks:
            arguments = (
                self._service.app,
                self._service.config,
                self._service.worker,
                tasks,
                ConnectionState(self._service.state.copy()),
                True,
                client,
                server,
                self._protocol_send,
            )
            if self._tls.selected_alpn_protocol() == "h2":
                self.protocol = Http2Protocol(*arguments, write_s=self._limits.write_s)
            else:
                self.protocol = Http1Protocol(
                    *arguments,
                    wake=self._wake,
                    write_now=self._write_now,
                    headers=self._service.headers,
                )
                tasks.extensions[WRITE_NOW] = {"write": self._write_body}
            await self.protocol.initiate()
            self._idle_until = trio.current_time() + self._limits.idle_s
            await self._read()
            if not self._peer_gone:
                await self.protocol.goodbye()
            await self.protocol.handle(Closed())
        await self._close()

    async def _read(self) -> None:
        """Feed the protocol until the peer goes, time is up, or somebody wants it to end."""
        while not self._ending:
            if self._woken:
                self._woken = False
                await self.protocol.resume()
                continue
            if not self.protocol.within_head:
                self._head_until = math.inf
            elif self._head_until == math.inf:
                self._head_until = trio.current_time() + self._limits.header_s
            data = await self._receive()
            if data is not None:
                await self.protocol.handle(RawData(data))
                if not data:
                    self._peer_gone = self._ending = True
            elif trio.current_time() >= self._deadline:
                self._ending = self._late = True

    async def _receive(self) -> bytes | None:
        """What the peer sends; b"" when it is gone, in whatever way; None if interrupted."""
        with trio.CancelScope(deadline=self._deadline) as self._reading:
            if self.protocol.full:
                await trio.sleep_forever()
            try:
                return await self._tls.receive_some(READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return b""
        return None

    @property
    def _deadline(self) -> float:
        return min(self._idle_until, self._head_until)

    def _wake(self) -> None:
        self._woken = True
        self._reading.cancel()

    def _end(self) -> None:
        self._ending = True
        self._reading.cancel()

    async def _protocol_send(self, event: Event) -> None:
        """What the protocol wants done with the connection."""
        if isinstance(event, RawData):
            await self._write(event.data)
        elif isinstance(event, Closed):
            self._end()
        elif isinstance(event, Updated):
            self._idle = event.idle
            if event.idle and self._service.connections.draining:
                self._end()
            self._idle_until = trio.current_time() + self._limits.idle_s if event.idle else math.inf
            self._reading.deadline = self._deadline

    def _write_body(self, data: bytes) -> Awaitable[None] | None:
        """The application's `web.stream.Write`. Ours and not the protocol's: whoever keeps it must
        not keep the protocol.

        Raises:
            ClientGone: at once, or from what it returns.
        """
        assert isinstance(self.protocol, Http1Protocol)
        waiting = self.protocol.write_now(data)
        if waiting is not None:
            return self._taken(waiting)
        if self._peer_gone:
            raise ClientGone
        return None

    async def _taken(self, waiting: Awaitable[None]) -> None:
        await waiting
        if self._peer_gone:
            raise ClientGone

    async def _write(self, data: bytes) -> None:
        """Write, shielded (half of what a protocol says would break the connection for other
        streams) but within a deadline; what the kernel takes at once needs neither."""
        waiting = self._write_now(data)
        if waiting is not None:
            await waiting

    def _write_now(self, data: bytes) -> Awaitable[None] | None:
        """Write as `_write`; None where the kernel took it at once, else what to await."""
        at_once = len(data) <= WRITE_BYTES and not self.protocol.unread
        if not at_once or self._write_lock.locked():
            return self._write_in_turn(data)
        try:
            if self._tls.send_now(data):
                return None
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._give_up()
            return None
        return self._write_rest()

    async def _write_in_turn(self, data: bytes) -> None:
        # Whoever comes later writes later: HTTP/2 frames must not overtake one another.
        await self._write_lock.acquire()
        await self._write_slowly(data)

    async def _write_rest(self) -> None:
        """What is left is encrypted, in its place; what is left to do is to wait."""
        self._write_lock.acquire_nowait()
        await self._write_slowly(b"")

    async def _write_slowly(self, data: bytes) -> None:
        """Write behind what is on its way already; lets go of the lock, which the caller took."""
        try:
            if self.protocol.unread:
                # An answer that overtakes the end of its request's body ends the connection, which
                # a client may have counted on, and mostly that end is there to be read.
                for _ in range(READING_TURNS):
                    await trio.lowlevel.cancel_shielded_checkpoint()
            for start in range(0, max(1, len(data)), WRITE_BYTES):
                with trio.move_on_after(self._limits.write_s, shield=True) as deadline:
                    await self._tls.send_all(data[start : start + WRITE_BYTES])
                if deadline.cancelled_caught:
                    self._log.info("write_timeout", after_s=self._limits.write_s)
                    self._give_up()
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._give_up()
        finally:
            self._write_lock.release()

    def _give_up(self) -> None:
        """The peer does not take what we write, or is gone."""
        self._peer_gone = True
        self.close_now()
        self._end()

    async def _close(self) -> None:
        """Say goodbye in TLS, then close.

        Closing a socket while there is something to read makes the kernel send a reset, which
        overtakes the answer. So where the peer may still be sending, it is told that we are done,
        and what it sends is dropped for a while.
        """
        gone = (trio.BrokenResourceError, trio.ClosedResourceError)
        with contextlib.suppress(*gone), trio.move_on_after(FLUSH_S):
            await self._tls.goodbye()
        if self._peer_gone or self._late or not self.protocol.unread:
            return
        with contextlib.suppress(*gone), trio.move_on_after(LINGER_S):
            await self._tls.drop_rest()

    def _contain(self, error: BaseException) -> None:
        """Log what ended the connection by type only: its text may quote what the peer sent."""
        found = leaves(error)
        if not all(isinstance(leaf, Exception) for leaf in found):
            raise error  # KeyboardInterrupt, SystemExit: not this connection's business
        if any(not isinstance(leaf, OSError) for leaf in found):
            names = sorted({type(leaf).__name__ for leaf in found})
            self._log.warning("connection_error_contained", errors=names)
            self._service.connections.metrics.contained_errors.inc()


def _take_over(transport: trio.SocketStream) -> socket.socket:
    """The socket, ours from here on: Trio's object knows it no more, and would close it with
    itself. Nothing is asked of the kernel, which could fail and leave the descriptor to nobody."""
    theirs = transport.socket
    ours = socket.socket(theirs.family, theirs.type, theirs.proto, fileno=theirs.detach())
    ours.setblocking(False)
    return ours


class AppTasks(TaskGroup):
    """The application's tasks on one connection.

    Hypercorn's leaves what is told to a finished application in a queue that fills up, and then
    whoever tells it something waits for ever. And what an application says to a client that does
    not take it returns there as if it had been taken; here it raises.

    Args:
        lost: whether the connection is.

    Attributes:
        extensions: what the server offers the application beyond ASGI.
    """

    def __init__(self, *, lost: Callable[[], bool]) -> None:
        super().__init__()
        self._lost = lost
        self.extensions: dict[str, dict[Any, Any]] = {}

    async def spawn_app(
        self,
        app: AppWrapper,
        config: HypercornConfig,
        scope: Scope,
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
    ) -> Callable[[ASGIReceiveEvent], Awaitable[None]]:
        if scope["type"] == "http":
            scope["extensions"].update(self.extensions)
        tell, told = trio.open_memory_channel[ASGIReceiveEvent](config.max_app_queue_size)

        async def say(message: ASGISendEvent | None) -> None:
            try:
                await send(message)
            except BufferCompleteError:
                raise ClientGone from None
            # Not after the last message: a client may go as soon as it has all of an answer.
            if message is not None and message.get("more_body") and self._lost():
                raise ClientGone

        async def run_app() -> None:
            try:
                with told:
                    await app(
                        scope, told.receive, say, trio.to_thread.run_sync, trio.from_thread.run
                    )
            except* Exception:
                await config.log.exception("application")
            finally:
                with contextlib.suppress(ClientGone):
                    await say(None)

        async def tell_app(event: ASGIReceiveEvent) -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await tell.send(event)

        self.spawn(run_app)
        return tell_app


class HypercornLog:
    """Hypercorn's logger interface on ours. Its lines may quote requests: only types pass."""

    def __init__(self, log: Log) -> None:
        self._log = log

    async def access(self, scope: Any, response: Any, request_time: float) -> None:
        """One line per answered request, without query, headers or body."""
        self._log.debug(
            "http_request",
            method=scope.get("method"),
            status=response["status"] if response else None,
            ms=round(request_time * 1000, 1),
        )

    async def exception(self, message: str, *_args: object, **_kwargs: object) -> None:
        """Called while an exception that left the application is handled."""
        found = leaves(sys.exc_info()[1])
        if not all(isinstance(leaf, UncleanEnd | ClientGone) for leaf in found):
            names = sorted({type(leaf).__name__ for leaf in found})
            self._log.error("application_error", where=message, errors=names)

    async def critical(self, message: str, *_args: object, **_kwargs: object) -> None:
        self._log.critical("http_server", text=message)

    async def error(self, message: str, *_args: object, **_kwargs: object) -> None:
        self._log.error("http_server", text=message)

    async def warning(self, message: str, *_args: object, **_kwargs: object) -> None:
        self._log.warning("http_server", text=message)

    async def info(self, message: str, *_args: object, **_kwargs: object) -> None:
        self._log.debug("http_server", text=message)

    async def debug(self, message: str, *_args: object, **_kwargs: object) -> None:
        self._log.debug("http_server", text=message)

    async def log(self, _level: int, message: str, *_args: object, **_kwargs: object) -> None:
        self._log.debug("http_server", text=message)


def _hypercorn_log(log: Log, _config: HypercornConfig) -> HypercornLog:
    return HypercornLog(log)


def _hypercorn_config(log: Log) -> HypercornConfig:
    config = HypercornConfig()
    config.logger_class = partial(_hypercorn_log, log)  # type: ignore[assignment]
    config.include_server_header = False
    config.keep_alive_max_requests = sys.maxsize
    config.h11_max_incomplete_size = HEAD_BYTES
    config.h2_max_header_list_size = HEAD_BYTES
    config.h2_max_concurrent_streams = MAX_STREAMS
    return config
