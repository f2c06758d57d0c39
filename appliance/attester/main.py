"""The collector's process.

`run_attester` is what `dcv attester` calls. `python -m appliance.attester.main FD` is how the
gateway starts a child: it imports no web server, and takes its settings from the connection that
it inherits.
"""

from __future__ import annotations

import os
import pwd
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import trio

from appliance.attester.collect import Collector
from appliance.attester.registry import open_collector
from appliance.attester.server import serve_attester, serve_connection
from appliance.config import Attestation
from appliance.errors import ApplianceError, AttesterUnavailable, ConfigError
from appliance.log import Log, configure_log

SOCKET_MODE = 0o600


async def run_attester(where: Path | int, settings: Attestation, *, gateway: str, log: Log) -> int:
    """Collect for one gateway, until it is gone or SIGTERM.

    Args:
        where: path of the socket to make, mode 0600; or the descriptor of one that listens
            already, which systemd hands over (sd_listen_fds(3): 3).
        gateway: user name or number of the only one who may connect. A name is looked up at each
            connection: a unit's dynamic user exists while it runs.

    Returns:
        The process's exit status: 0 after an orderly end, else that of the error, which is logged.
    """
    try:
        open_collector(settings)  # what cannot work is said now, not to the gateway
        listener = _listen(where)
    except ApplianceError as error:
        return _failed(error, log)
    open_again = partial(_open_with_own, settings)
    try:
        serve = partial(
            serve_attester, listener, open_again, expected_uid=partial(_uid, gateway), log=log
        )
        return await _until_sigterm(serve, log)
    finally:
        listener.socket.close()
        if isinstance(where, Path):
            _remove_socket(where)


async def run_inherited(descriptor: int, *, log: Log) -> int:
    """Collect for the parent, at the other end of this socket; its settings come over it.

    Returns:
        As `run_attester`.
    """
    os.set_inheritable(descriptor, False)
    ours = socket.socket(fileno=descriptor)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    return await _until_sigterm(partial(serve_connection, stream, _open_with_given, log=log), log)


async def _until_sigterm(serve: Callable[[], Awaitable[None]], log: Log) -> int:
    status = 0
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_signal, signals, nursery.cancel_scope)
            try:
                await serve()
            except AttesterUnavailable as error:
                status = _failed(error, log)
            nursery.cancel_scope.cancel()
    log.info("attester_ended", status=status)
    return status


async def _cancel_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for number in signals:
        scope.cancel(f"signal {number}")


def _listen(where: Path | int) -> trio.SocketListener:
    if isinstance(where, int):
        listening = socket.socket(fileno=where)
        if listening.family != socket.AF_UNIX or listening.type != socket.SOCK_STREAM:
            raise ConfigError(f"descriptor {where}: expected a Unix stream socket")
        os.set_inheritable(where, False)
        return trio.SocketListener(trio.socket.from_stdlib_socket(listening))
    try:
        _remove_socket(where)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The mode comes from the umask, so that there is no moment in which it is another one.
        before = os.umask(0o777 & ~SOCKET_MODE)
        try:
            listening.bind(str(where))
        finally:
            os.umask(before)
        listening.listen(8)
    except OSError as error:
        raise ConfigError(f"cannot listen at {where}: {error.strerror}") from error
    return trio.SocketListener(trio.socket.from_stdlib_socket(listening))


def _remove_socket(path: Path) -> None:
    """A socket, ours or what a killed collector left; anything else in its place stays."""
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    except FileNotFoundError:
        return


def _uid(gateway: str) -> int:
    """Raises KeyError for a user that does not exist."""
    return int(gateway) if gateway.isdecimal() else pwd.getpwnam(gateway).pw_uid


def _open_with_own(own: Attestation, given: Attestation | None) -> Collector:
    """In a unit of its own the collector has its own configuration, and takes none."""
    if given is not None:
        raise ConfigError("this collector has its own configuration and takes no other")
    return open_collector(own)


def _open_with_given(given: Attestation | None) -> Collector:
    if given is None:
        raise ConfigError("this collector has no configuration; `hello` must bring one")
    return open_collector(given)


def _failed(error: ApplianceError, log: Log) -> int:
    log.error("attester_failed", code=error.code, error=error.message, advice=error.advice)
    return error.exit_status


def main(argv: list[str]) -> int:
    """The child's: one argument, the descriptor of its end of the socket pair."""
    log = configure_log(format="json", level="info")
    return trio.run(partial(run_inherited, int(argv[0]), log=log))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
