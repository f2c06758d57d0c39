"""Hypercorn on Trio, contained: one connection's trouble is never another's.

Hypercorn 0.18 parses HTTP well and supervises connections badly: any exception in its protocol
code ends the whole server, writes have no deadline, a client that stops reading HTTP/2 makes it
buffer without bound, and there is no hook for a serve loop of one's own. So we keep its protocol
classes and replace what is around them:

    serve            our accept loop: trio.serve_listeners, drain, end (Hypercorn's worker_serve)
    Connection       one connection: caps, handshake deadline, containment, write deadline
    Http1Protocol    no upgrades: neither websockets nor cleartext HTTP/2 are offered
    Http2Protocol    malformed requests reset their stream; answers end truly or are reset
    StreamBuffer     back-pressure that blocks until the client reads, with a deadline

No module global of Hypercorn is replaced. All of it leans on Hypercorn's internals, therefore the
version is pinned exactly and a test fails when it changes (docs/adr/0003).
"""

from __future__ import annotations

import contextlib
import ssl
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import h2.errors
import h2.events
import h2.exceptions
import h11
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BufferCompleteError, H2Protocol
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState, LifespanState
from hypercorn.utils import parse_socket_addr, wrap_app
from priority.priority import MissingStreamError
from quart_trio import QuartTrio

from appliance.config import Limits, Listen
from appliance.errors import ListenError, NotServing
from appliance.log import Log
from appliance.serving.admission import Admission
from appliance.serving.lifecycle import Lifecycle, State
from appliance.web.stream import UncleanEnd

BACKLOG = 1024

FLUSH_S = 2.0
"""For the last events of interrupted streams, and for a TLS goodbye, to leave our buffers."""

TlsStream = trio.SSLStream[trio.SocketStream]


@dataclass(slots=True)
class Connections:
    """Every open connection, and how many each peer holds."""

    limits: Limits
    log: Log
    open: set[TlsStream] = field(default_factory=set)
    per_peer: Counter[str] = field(default_factory=Counter)

    def enter(self, stream: TlsStream, peer: str) -> bool:
        """Count a new connection; False when it is one too many."""
        if (
            len(self.open) >= self.limits.max_connections
            or self.per_peer[peer] >= self.limits.max_connections_per_peer
        ):
            self.log.warning("connection_refused", open=len(self.open))
            return False
        self.open.add(stream)
        self.per_peer[peer] += 1
        return True

    def leave(self, stream: TlsStream, peer: str) -> None:
        """Forget a connection."""
        self.open.discard(stream)
        self.per_peer[peer] -= 1
        if not self.per_peer[peer]:
            del self.per_peer[peer]

    def close_all(self) -> None:
        """Close every socket now, which also ends writes that are shielded."""
        for stream in tuple(self.open):
            stream.transport_stream.socket.close()


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
    log: Log,
) -> None:
    """Serve until the appliance leaves `serving`, then drain and return.

    Draining lets running exchanges go on for `drain_s` and then ends them with an error event;
    when the appliance was withdrawn they are ended at once. The listeners are closed as soon as
    draining begins. Cancellation closes every connection.

    Args:
        context: the TLS server context.
    """
    config = _hypercorn_config(limits, log)
    worker = WorkerContext(None)
    wrapped = wrap_app(app, config.wsgi_max_body_size, "asgi")
    lifespan_state: LifespanState = {}
    lifespan = Lifespan(wrapped, config, lifespan_state)
    connections = Connections(limits, log)

    async def handle(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        state = ConnectionState(lifespan_state.copy())
        await Connection(wrapped, config, worker, state, tls, connections).run()

    async with trio.open_nursery() as lifespan_nursery:
        await lifespan_nursery.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        try:
            async with trio.open_nursery() as handlers:
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(
                        partial(trio.serve_listeners, handle, listeners, handler_nursery=handlers)
                    )
                    await lifecycle.wait_until_not(State.SERVING)
                    accepting.cancel_scope.cancel()
                await worker.terminated.set()  # idle connections close, busy ones do not go on
                await _drain(lifecycle, admission, limits, log)
                handlers.cancel_scope.cancel()
                # A write to a client that does not read is shielded; without its socket it ends.
                connections.close_all()
        finally:
            connections.close_all()
        await lifespan.wait_for_shutdown()
        lifespan_nursery.cancel_scope.cancel()


async def _drain(lifecycle: Lifecycle, admission: Admission, limits: Limits, log: Log) -> None:
    """Let running exchanges end, then end them."""
    log.info("draining", state=lifecycle.state.value, running=admission.running)
    if lifecycle.state is State.DRAINING:
        with trio.move_on_after(limits.drain_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when_withdrawn, lifecycle, nursery.cancel_scope)
                await admission.wait_idle()
                nursery.cancel_scope.cancel()
    reason = lifecycle.error or NotServing(f"the appliance is {lifecycle.state.value}")
    admission.interrupt_all(reason)
    with trio.move_on_after(FLUSH_S):
        await admission.wait_idle()


async def _cancel_when_withdrawn(lifecycle: Lifecycle, scope: trio.CancelScope) -> None:
    await lifecycle.wait_until_not(State.DRAINING)
    scope.cancel()


class Connection(TCPServer):
    """One TLS connection. Nothing but cancellation ever leaves `run`."""

    def __init__(
        self,
        app: AppWrapper,
        config: HypercornConfig,
        context: WorkerContext,
        state: ConnectionState,
        stream: TlsStream,
        connections: Connections,
    ) -> None:
        super().__init__(app, config, context, state, stream)
        self._connections = connections
        self._limits = connections.limits
        self._log = connections.log
        self._ended = False

    async def run(self) -> None:
        """Serve the connection to its end and close it."""
        socket = self.stream.transport_stream.socket
        try:
            client = parse_socket_addr(socket.family, socket.getpeername())
            server = parse_socket_addr(socket.family, socket.getsockname())
        except OSError:  # reset between accept and here
            socket.close()
            return
        peer = client[0] if client else ""
        if not self._connections.enter(self.stream, peer):
            socket.close()
            return
        try:
            await self._serve(client, server)
        except BaseExceptionGroup as group:
            cancelled, failures = group.split(trio.Cancelled)
            if failures is not None:
                self._contain(failures)
            if cancelled is not None:
                raise cancelled from None
        except Exception as error:  # the point of this class: it ends here, not the server
            self._contain(error)
        finally:
            self._connections.leave(self.stream, peer)
            socket.close()

    async def _serve(self, client: tuple[str, int] | None, server: tuple[str, int] | None) -> None:
        try:
            with trio.fail_after(self._limits.handshake_s):
                await self.stream.do_handshake()
        except (trio.BrokenResourceError, trio.TooSlowError):
            return
        http2 = self.stream.selected_alpn_protocol() == "h2"
        async with TaskGroup() as task_group:
            self._task_group = task_group
            # Hypercorn declares its ProtocolWrapper here, which only adds the upgrades we refuse.
            self.protocol = (Http2Protocol if http2 else Http1Protocol)(  # type: ignore[assignment]
                self.app,
                self.config,
                self.context,
                task_group,
                ConnectionState(self.state),
                True,
                client,
                server,
                self.protocol_send,
            )
            if isinstance(self.protocol, Http2Protocol):
                self.protocol.write_s = self._limits.write_s
            await self.protocol.initiate()
            await self.idle_task.restart(task_group, self._idle_timeout)
            await self._read_data()
            # Hypercorn leaves the idle timer running: the closed connection, its socket and its
            # tasks would stay until it fires.
            self._ended = True
            await self.idle_task.stop()
        await self._close()

    async def protocol_send(self, event: Event) -> None:
        """What the protocol wants done with the connection."""
        if isinstance(event, RawData):
            await self._write(event.data)
        elif not (isinstance(event, Updated) and self._ended):
            await super().protocol_send(event)

    async def _write(self, data: bytes) -> None:
        """Write, shielded (half a TLS record would break the connection for other streams) but
        within a deadline."""
        async with self.send_lock:
            try:
                with trio.move_on_after(self._limits.write_s, shield=True) as deadline:
                    await self.stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                await self.protocol.handle(Closed())
                return
        if deadline.cancelled_caught:
            self._log.info("write_timeout", after_s=self._limits.write_s)
            self.stream.transport_stream.socket.close()
            await self.protocol.handle(Closed())

    async def _close(self) -> None:
        """Say goodbye in TLS if the peer takes it, then close."""
        with trio.move_on_after(FLUSH_S):
            await self.stream.aclose()

    def _contain(self, error: BaseException) -> None:
        """Log what ended the connection by type only: its text may quote what the peer sent."""
        leaves = _leaves(error)
        if not all(isinstance(leaf, Exception) for leaf in leaves):
            raise error  # KeyboardInterrupt, SystemExit: not this connection's business
        if any(not isinstance(leaf, OSError) for leaf in leaves):
            names = sorted({type(leaf).__name__ for leaf in leaves})
            self._log.warning("connection_error_contained", errors=names)


class Http1Protocol(H11Protocol):
    """HTTP/1.1 without upgrades."""

    async def _check_protocol(self, event: h11.Request) -> None:
        """Hypercorn switches to HTTP/2 here on `Upgrade: h2c` and on a cleartext preface; over TLS
        the protocol was agreed by ALPN and stays (RFC 9113 section 3.2)."""

    async def _create_stream(self, request: h11.Request) -> None:
        """Treat a websocket upgrade as the plain request it also is (RFC 9110 section 7.8)."""
        headers = [item for item in request.headers.raw_items() if item[0].lower() != b"upgrade"]
        await super()._create_stream(
            h11.Request(
                method=request.method,
                target=request.target,
                headers=headers,
                http_version=request.http_version,
            )
        )


class StreamBuffer:
    """Bytes of one HTTP/2 answer on their way to the client; Hypercorn's interface.

    Hypercorn's own lets a writer pass as soon as anything was sent, so a client that opens no
    window makes it hold the whole answer. Here a writer waits until there is room again, and a
    client that takes nothing for `write_s` is given up.
    """

    def __init__(self, *, write_s: float, on_stalled: Callable[[], Awaitable[None]]) -> None:
        self._buffer = bytearray()
        self._write_s = write_s
        self._on_stalled = on_stalled
        self._moved = trio.Event()
        self.finished = False  # the application has said all it will say
        self._closed = False

    @property
    def complete(self) -> bool:
        """Whether nothing more will be sent."""
        return self._closed or (self.finished and not self._buffer)

    def set_complete(self) -> None:
        """The application has sent its last byte."""
        self.finished = True

    async def close(self) -> None:
        """The stream or the connection is gone: let go of everything that waits."""
        self._closed = True
        self._buffer.clear()
        self._wake()

    async def push(self, data: bytes) -> None:
        """Add bytes; returns once there is room for more.

        Raises:
            BufferCompleteError: the client is gone, or has not read for too long.
        """
        if self._closed or self.finished:
            raise BufferCompleteError
        self._buffer += data
        await self._wait_below(BUFFER_HIGH_WATER)

    async def drain(self) -> None:
        """Wait until everything was handed to the connection.

        Raises:
            BufferCompleteError: as for `push`.
        """
        await self._wait_below(1)

    async def pop(self, max_length: int) -> bytes:
        """Take at most so many bytes, for sending now."""
        data = bytes(self._buffer[:max_length])
        if data:
            del self._buffer[:max_length]
            self._wake()
        return data

    async def _wait_below(self, size: int) -> None:
        while len(self._buffer) >= size and not self._closed:
            with trio.move_on_after(self._write_s) as deadline:
                await self._moved.wait()
            if deadline.cancelled_caught:
                await self._on_stalled()
                raise BufferCompleteError
        if self._closed:
            raise BufferCompleteError

    def _wake(self) -> None:
        moved, self._moved = self._moved, trio.Event()
        moved.set()


class _Streams(dict[int, Any]):
    """Open streams. Events for one that is gone (an early answer, a reset) go nowhere; Hypercorn
    looks them up without asking and dies of the KeyError."""

    def __missing__(self, _stream_id: int) -> _ClosedStream:
        return _ClosedStream()


class _ClosedStream:
    idle = True

    async def handle(self, _event: StreamEvent) -> None:
        return


class Http2Protocol(H2Protocol):
    """HTTP/2 that bounds what it holds and never takes the connection down for one stream."""

    write_s = 20.0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.streams = _Streams()
        self.buffers: dict[int, StreamBuffer] = {}
        self.stream_buffers = self.buffers  # type: ignore[assignment]  # same interface, ours

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        """Open a stream for a well-formed request; reset one for anything else.

        Hypercorn assumes an ASCII `:path` and a method other than CONNECT.
        """
        stream_id = request.stream_id
        assert stream_id is not None
        pseudo = {name: value for name, value in request.headers or [] if name[:1] == b":"}
        path, method = pseudo.get(b":path", b""), pseudo.get(b":method", b"")
        if method == b"CONNECT" or not path.startswith(b"/") or not path.isascii():
            await self._reset(stream_id, h2.errors.ErrorCodes.REFUSED_STREAM)
            return
        await super()._create_stream(request)
        # Nothing has run since: the application task starts at the next checkpoint.
        self.buffers[stream_id] = StreamBuffer(
            write_s=self.write_s, on_stalled=partial(self._give_up, stream_id)
        )

    async def stream_send(self, event: StreamEvent) -> None:
        """As Hypercorn's, but an answer that was broken off is reset instead of left open."""
        if isinstance(event, StreamClosed):
            buffer = self.buffers.get(event.stream_id)
            if buffer is not None and not buffer.finished:
                with contextlib.suppress(BufferCompleteError):
                    await buffer.drain()  # what was said before it broke off still goes out
                await self._reset(event.stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
                await self._forget(event.stream_id)
        await super().stream_send(event)

    async def _give_up(self, stream_id: int) -> None:
        """The client has not read for too long: end the stream and tell the application."""
        await self._reset(stream_id, h2.errors.ErrorCodes.CANCEL)
        await self._forget(stream_id)
        await self._close_stream(stream_id)

    async def _reset(self, stream_id: int, code: h2.errors.ErrorCodes) -> None:
        try:
            self.connection.reset_stream(stream_id, code)
        except h2.exceptions.ProtocolError:
            return  # the stream or the connection is closed already
        await self._flush()

    async def _forget(self, stream_id: int) -> None:
        buffer = self.buffers.pop(stream_id, None)
        if buffer is not None:
            await buffer.close()
            try:
                self.priority.remove_stream(stream_id)
            except MissingStreamError:
                return


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
        leaves = _leaves(sys.exc_info()[1])
        if not all(isinstance(leaf, UncleanEnd) for leaf in leaves):
            names = sorted({type(leaf).__name__ for leaf in leaves})
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


def _leaves(error: BaseException | None) -> list[BaseException]:
    """The exceptions that a group, however nested, consists of."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [] if error is None else [error]


def _hypercorn_log(log: Log, _config: HypercornConfig) -> HypercornLog:
    return HypercornLog(log)


def _hypercorn_config(limits: Limits, log: Log) -> HypercornConfig:
    config = HypercornConfig()
    config.logger_class = partial(_hypercorn_log, log)  # type: ignore[assignment]
    config.include_server_header = False
    config.keep_alive_timeout = limits.idle_s
    config.keep_alive_max_requests = sys.maxsize
    config.ssl_handshake_timeout = limits.handshake_s
    # None: it would count while we stream to a client that rightly says nothing.
    config.read_timeout = None
    config.h2_max_concurrent_streams = 128
    return config
