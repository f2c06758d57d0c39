"""The local status socket: one JSON document to whoever connects, then the end.

It answers from the first moment of the boot on, when the public port is still closed. Access is
by file permission (0600); it says nothing that `/health` and `/.well-known/dcv/csr` would not.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from appliance.errors import ConfigError
from appliance.wire.canonical import JsonObject, canonical_json

WRITE_S = 5.0
"""For one reader to take a few kilobytes."""

MAX_READERS = 16


async def serve_status(
    path: Path,
    snapshot: Callable[[], JsonObject],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; the socket file is removed then.

    Raises:
        ConfigError: the socket cannot be made, or another appliance is answering on it.
    """
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(_bind(path)))
    readers = trio.CapacityLimiter(MAX_READERS)
    try:
        await trio.serve_listeners(
            partial(_answer, snapshot, readers), [listener], task_status=_Started(task_status)
        )
    finally:
        path.unlink(missing_ok=True)  # noqa: ASYNC240  # one directory entry, at our end


class _Started:
    """Tells our starter that the listener is up, without the listeners it is told."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, _listeners: object = None) -> None:
        self._task_status.started()


async def _answer(
    snapshot: Callable[[], JsonObject], readers: trio.CapacityLimiter, stream: trio.SocketStream
) -> None:
    async with stream, readers:
        with trio.move_on_after(WRITE_S):
            try:
                await stream.send_all(canonical_json(snapshot()) + b"\n")
            except trio.BrokenResourceError:
                return


def _bind(path: Path) -> socket.socket:
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        previous = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(previous)
        listener.listen(MAX_READERS)
    except OSError as error:
        raise ConfigError(
            f"[listen] status_socket: cannot listen at {path}: {error.strerror or error}"
        ) from error
    return listener


def _remove_stale(path: Path) -> None:
    """Remove what a killed appliance left; one that answers is another appliance at work."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigError(f"[listen] status_socket: another appliance is running at {path}")
