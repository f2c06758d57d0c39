"""The collector's side of the socket: one connection, the gateway's, for the process's life.

Whoever holds that connection may have evidence made about data of its choice, so there is never a
second one: the gateway connects before the engine exists, and a broken engine that finds the
socket is turned away. The process ends with its connection, and so does what hangs in it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from socket import SO_PEERCRED, SOL_SOCKET
from typing import Protocol

import trio

from appliance.attester import messages
from appliance.attester.collect import Collector
from appliance.attester.messages import FrameStream, Request, Response
from appliance.config import Attestation
from appliance.errors import (
    AttesterError,
    AttesterUnavailable,
    ConfigError,
    EndorsementsUnavailable,
    Malformed,
    leaves,
)
from appliance.log import Log
from appliance.wire.canonical import JsonValue

HELLO_S = 30.0
"""From the connection to the gateway's first question."""

SEND_S = 30.0
"""For one answer to be taken; the gateway reads all the time."""

MAX_REQUESTS = 32
"""At once; past this nothing is read until one is answered."""

PEER_CREDENTIALS = struct.Struct("3i")
"""`struct ucred`: pid, uid, gid (unix(7))."""


class OpenCollector(Protocol):
    """Makes the collector of a `hello`: from the settings in it, or from the process's own."""

    def __call__(self, settings: Attestation | None, /) -> Collector:
        """Raises ConfigError where the settings do not make one."""
        ...


async def serve_attester(
    listener: trio.SocketListener,
    open_collector: OpenCollector,
    *,
    expected_uid: Callable[[], int],
    log: Log,
) -> None:
    """Serve the first connection of the right user, until it ends.

    Args:
        listener: of a Unix stream socket; the caller closes it.
        expected_uid: asked when somebody connects, because a unit's dynamic user exists only as
            long as the unit.

    Raises:
        AttesterUnavailable: the gateway does not speak this protocol.
    """
    stream = await _accept_the_one(listener, expected_uid, log)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_refuse_others, listener, log)
        error = await _outcome(stream, open_collector, log)
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error


async def serve_connection(
    stream: trio.abc.Stream, open_collector: OpenCollector, *, log: Log
) -> None:
    """Answer one gateway until it closes the connection or dies; closes our end.

    Raises:
        AttesterUnavailable: it does not speak this protocol.
    """
    error = await _outcome(stream, open_collector, log)
    if error is not None:
        raise error


async def _outcome(
    stream: trio.abc.Stream, open_collector: OpenCollector, log: Log
) -> AttesterUnavailable | None:
    frames = FrameStream(stream)
    malformed: list[Malformed] = []
    try:
        await _converse(frames, open_collector, log)
    except* Malformed as group:
        malformed = [leaf for leaf in leaves(group) if isinstance(leaf, Malformed)]
    except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
        log.warning("gateway_gone")
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await frames.aclose()
    if malformed:
        return AttesterUnavailable(f"the gateway does not speak this protocol: {malformed[0]}")
    return None


async def _converse(frames: FrameStream, open_collector: OpenCollector, log: Log) -> None:
    # 1. Who we are, and with the gateway's settings where the process has none of its own.
    with trio.fail_after(HELLO_S):
        document = await frames.receive()
    if document is None:
        return
    hello = messages.parse_request(document)
    if hello.op != "hello":
        raise Malformed("expected `hello` first", field="op")
    try:
        collector = open_collector(messages.parse_settings(hello.arguments))
    except ConfigError as error:
        await frames.send(Response(hello.id, error=error).to_json())
        return
    await frames.send(Response(hello.id, result=collector.hello().to_json()).to_json())
    log.info("attester_ready", **collector.hello().to_json())
    # 2. Questions, several at once: the devices have lines of their own.
    sending, places = trio.Lock(), trio.Semaphore(MAX_REQUESTS)
    async with trio.open_nursery() as nursery:
        while (document := await frames.receive()) is not None:
            request = messages.parse_request(document)
            await places.acquire()
            nursery.start_soon(_answer, request, collector, frames, sending, places, log)
        # 3. Nobody is left to answer to; what hangs in a device is left behind.
        nursery.cancel_scope.cancel()


async def _answer(
    request: Request,
    collector: Collector,
    frames: FrameStream,
    sending: trio.Lock,
    places: trio.Semaphore,
    log: Log,
) -> None:
    started = trio.current_time()
    try:
        response = Response(request.id, result=await _result(request, collector))
    except (AttesterError, EndorsementsUnavailable) as error:
        response = Response(request.id, error=error)
        log.warning("collection_failed", op=request.op, code=error.code, error=error.message)
    took_ms = round((trio.current_time() - started) * 1000, 1)
    log.debug("collected", op=request.op, took_ms=took_ms)
    with trio.fail_after(SEND_S):
        async with sending:
            await frames.send(response.to_json())
    places.release()


async def _result(request: Request, collector: Collector) -> JsonValue:
    arguments = request.arguments
    match request.op:
        case "inventory":
            messages.parse_nothing(arguments)
            return messages.inventory_to_json(await collector.inventory())
        case "gpu_evidence":
            found = await collector.gpu_evidence(messages.parse_nonce(arguments))
            return [one.to_json() for one in found]
        case "cpu_evidence":
            quoted = await collector.cpu_evidence(messages.parse_report_data(arguments))
            return quoted.to_json()
        case "set_gpus_ready":
            await collector.set_gpus_ready(messages.parse_ready(arguments))
            return None
        case _:
            raise Malformed("expected `hello` once", field="op")


async def _accept_the_one(
    listener: trio.SocketListener, expected_uid: Callable[[], int], log: Log
) -> trio.SocketStream:
    while True:
        stream = await listener.accept()
        try:
            pid, uid, _gid = _peer(stream)
            if uid == expected_uid():
                log.info("gateway_connected", pid=pid, uid=uid)
                return stream
        except (OSError, KeyError) as error:
            log.warning("connection_refused", reason=type(error).__name__)
        else:
            log.warning("connection_refused", reason="not the gateway's user", pid=pid, uid=uid)
        await _close(stream)


async def _refuse_others(listener: trio.SocketListener, log: Log) -> None:
    while True:
        stream = await listener.accept()
        pid, uid, _gid = _peer(stream)
        log.warning("connection_refused", reason="the gateway is connected", pid=pid, uid=uid)
        await _close(stream)


async def _close(stream: trio.SocketStream) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
        await stream.aclose()


def _peer(stream: trio.SocketStream) -> tuple[int, int, int]:
    """Of whoever called connect(2): pid, uid, gid, as the kernel saw them then."""
    raw = stream.socket.getsockopt(SOL_SOCKET, SO_PEERCRED, PEER_CREDENTIALS.size)
    pid, uid, gid = PEER_CREDENTIALS.unpack(raw)
    return pid, uid, gid


__all__ = ["OpenCollector", "serve_attester", "serve_connection"]
