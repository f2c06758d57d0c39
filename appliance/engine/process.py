"""Supervision of the engine: start it, know when it is ready, notice when it is not, end it.

    supervise ─┬─ guardian process (engine/guardian.py) ── SGLang and its children, confined
               │                                          (engine/confine.py)
               ├─ listen: the guardian's reports, and the output, line by line, into our log
               └─ run ─┬─ the watch for its exit
                       └─ poll /ready, look at its sockets; then the health watch

The task that calls `supervise` owns all of it. It never returns of itself: the engine's end, its
silence and a failed start are errors, and cancellation is how it is stopped. Whatever the way
out, the engine and everything it started are gone afterwards, within a bound.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import trio

from appliance.config import Engine
from appliance.engine import client, confine, guardian
from appliance.engine.client import EngineAddress
from appliance.engine.command import EngineCommand, EngineKeys
from appliance.engine.log_lines import MAX_LINE_BYTES, read_log_line
from appliance.engine.sockets import refuse_exposed
from appliance.errors import EngineDied, EngineError, EngineHung, EngineStartFailed, leaves
from appliance.log import Log

READY_POLL_S = 0.25
"""Between two looks at /ready; the gateway is to be ready 1 s after the engine (design)."""

READY_PROBE_S = 5.0
"""For one look: SGLang answers /ready at once or not at all."""

KILL_S = 20.0
"""From SIGKILL to everything being gone; a process can be stuck in the kernel that long while
the driver tears down a GPU context. Past it the guardian itself is killed and we go on."""

LAST_WORDS_S = 2.0
"""For the rest of its output after it is gone; the pipes are at their end by then."""

GUARDIAN_S = 5.0
"""For the guardian to end after everything it guards has, and again after it was killed."""

GUARDIAN = Path(guardian.__file__)
CONFINE = Path(confine.__file__)
ISOLATED_PYTHON = (sys.executable, "-I", "-S")
"""For the two programs of ours that stand on the standard library alone."""


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """An engine that is ready, until `supervise` ends.

    Attributes:
        address, admin: where it answers, with the ordinary and the administrative key.
        pid: of its main process.
    """

    address: EngineAddress
    admin: EngineAddress
    pid: int


class _Guardian:
    """Our end of the guardian: its control socket and its process."""

    def __init__(self, process: trio.Process, control: trio.SocketStream) -> None:
        self.process = process
        self._control = control
        self.started = trio.Event()
        self._exited = trio.Event()
        self.serving = False  # may the engine have seen a prompt? its log is filtered from then on
        self.pid = 0
        self.exit_status: int | None = None
        self.withheld_lines = 0

    async def command(self, letter: bytes) -> None:
        """Send a one-letter command; a guardian that is gone has nothing left to command."""
        try:
            await self._control.send_all(letter)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    async def read_reports(self) -> None:
        """Take the guardian's lines until it closes its end."""
        buffer = b""
        while data := await self._receive():
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                word, _, number = line.partition(b" ")
                if word == b"pid":
                    self.pid = int(number)
                    self.started.set()
                elif word == b"exit":
                    self.exit_status = int(number)
        self.started.set()
        self._exited.set()

    async def wait_exited(self) -> None:
        """Wait until nothing of the engine is left."""
        await self._exited.wait()

    async def _receive(self) -> bytes:
        try:
            return bytes(await self._control.receive_some(4096))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def aclose(self) -> None:
        await self._control.aclose()


async def supervise(
    command: EngineCommand,
    keys: EngineKeys,
    config: Engine,
    *,
    log: Log,
    progress: Callable[[str], None],
    failed: Callable[[EngineError], None],
    task_status: trio.TaskStatus[RunningEngine] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Run the engine until cancelled.

    Args:
        command: what to start. keys: the ones in its settings.
        progress: told in a few words what the starting engine is doing.
        failed: told the engine's error at once, before the engine is stopped, which may take long.
        task_status: started with the engine once it is ready and listens on loopback only.

    Raises:
        EngineStartFailed: it exited, or was not ready in time.
        EngineExposed: it listens beyond loopback.
        EngineDied: it exited after it was ready. EngineHung: it stopped answering.

    On any way out the engine gets SIGTERM and `stop_grace_s` to finish, then SIGKILL; this wait
    is shielded from cancellation and bounded.
    """
    _prepare_files(command)
    try:
        guarded = await _start_guardian(command)
        try:
            async with trio.open_nursery() as nursery:
                # Not `nursery.start`: cancelled at that moment, it would wait for the shielded
                # task to end, which ends by what follows here.
                listening = trio.CancelScope(shield=True)
                nursery.start_soon(_listen, guarded, log, progress, listening)
                try:
                    await _run(guarded, command, keys, config, log, task_status)
                except BaseExceptionGroup as group:  # looked at, and raised again
                    for error in _engine_errors(group)[:1]:
                        failed(error)
                    raise
                finally:
                    await _stop(guarded, config, log)
                    listening.deadline = trio.current_time() + LAST_WORDS_S
        finally:
            await _dismiss(guarded, log)
    except BaseExceptionGroup as group:
        _raise_the_leaf(group)
    finally:
        _remove_files(command)
    raise AssertionError("supervision ends only with an error or cancellation")


async def _listen(
    guarded: _Guardian,
    log: Log,
    progress: Callable[[str], None],
    scope: trio.CancelScope,
) -> None:
    """Read everything the guardian and the engine say, until they close their ends.

    `scope` is shielded, because a cancelled supervisor still has to hear the engine stop, and an
    engine whose output nobody reads blocks on it. Our owner ends it through the scope.
    """
    with scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guarded.read_reports)
            nursery.start_soon(_pump, guarded.process.stdout, guarded, log, progress)
            nursery.start_soon(_pump, guarded.process.stderr, guarded, log, progress)


def _raise_the_leaf(group: BaseExceptionGroup[BaseException]) -> NoReturn:
    """One engine, one reason: of several tasks failing at once the engine's error is the story."""
    errors = _engine_errors(group)
    others = [leaf for leaf in leaves(group) if not isinstance(leaf, EngineError | trio.Cancelled)]
    if others or not errors:
        raise group
    raise errors[0]


def _engine_errors(group: BaseExceptionGroup[BaseException]) -> list[EngineError]:
    return [leaf for leaf in leaves(group) if isinstance(leaf, EngineError)]


async def _run(
    guarded: _Guardian,
    command: EngineCommand,
    keys: EngineKeys,
    config: Engine,
    log: Log,
    task_status: trio.TaskStatus[RunningEngine],
) -> None:
    address = EngineAddress(port=command.port, key=keys.api)
    admin = EngineAddress(port=command.port, key=keys.admin)
    await guarded.started.wait()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_exit, guarded)
        # 1. It says that it is ready.
        await _wait_ready(address, config)
        # 2. What it was told is not what counts: look at what it does.
        sockets = refuse_exposed(guarded.pid) if config.nodes == 1 else []
        log.info(
            "engine_ready",
            pid=guarded.pid,
            port=command.port,
            sockets=[f"{s.address}:{s.port}" for s in sockets],
        )
        # 3. It has read its settings; the keys need not stay on disk. Its shared memory exists
        #    by now, and the guardian must know it to remove it after a SIGKILL.
        command.settings_file.unlink(missing_ok=True)
        await guarded.command(b"S")
        guarded.serving = True
        task_status.started(RunningEngine(address=address, admin=admin, pid=guarded.pid))
        # 4. Until the end.
        await _watch_health(address, config, log)


async def _wait_ready(address: EngineAddress, config: Engine) -> None:
    """Poll /ready: the port opens last, and a traceback in the log is no failure by itself."""
    with trio.move_on_after(config.ready_deadline_s) as deadline:
        while True:
            with trio.move_on_after(READY_PROBE_S):
                try:
                    if await client.fetch_status(address, "/ready") == 200:
                        return
                except EngineError:
                    pass
            await trio.sleep(READY_POLL_S)
    if deadline.cancelled_caught:
        raise EngineStartFailed(
            f"expected the engine to be ready within {config.ready_deadline_s:g} s"
        )


async def _watch_exit(guarded: _Guardian) -> NoReturn:
    await guarded.wait_exited()
    how = describe_exit(guarded.exit_status)
    if guarded.serving:
        raise EngineDied(f"the engine {how}")
    raise EngineStartFailed(f"the engine {how} before it was ready")


async def _watch_health(address: EngineAddress, config: Engine, log: Log) -> NoReturn:
    """Ask for a token now and then; a busy engine answers from what it is doing anyway."""
    failures = 0
    while True:
        await trio.sleep(config.health_interval_s)
        healthy = False
        with trio.move_on_after(config.health_deadline_s):
            try:
                healthy = await client.fetch_status(address, "/health") == 200
            except EngineError:
                healthy = False
        failures = 0 if healthy else failures + 1
        if failures:
            log.warning("engine_unhealthy", failures=failures, limit=config.health_failures)
        if failures >= config.health_failures:
            raise EngineHung(f"the engine failed {failures} health probes in a row")


async def _stop(guarded: _Guardian, config: Engine, log: Log) -> None:
    """End the engine and everything it started: ask, wait, kill. Bounded and shielded."""
    with trio.CancelScope(shield=True):
        await guarded.command(b"T")
        with trio.move_on_after(config.stop_grace_s) as grace:
            await guarded.wait_exited()
        if grace.cancelled_caught:
            log.warning("engine_killed", after_s=config.stop_grace_s)
            await guarded.command(b"K")
            with trio.move_on_after(KILL_S) as killing:
                await guarded.wait_exited()
            if killing.cancelled_caught:
                log.error("engine_unkillable", after_s=KILL_S)
                guarded.process.kill()
    log.info(
        "engine_stopped",
        how=describe_exit(guarded.exit_status),
        withheld_log_lines=guarded.withheld_lines,
    )


async def _dismiss(guarded: _Guardian, log: Log) -> None:
    """Let go of the guardian, which ends by itself once it hears nothing more from us. Shielded
    and bounded: one that waits for a process stuck in the kernel is killed, and left if even that
    does not end it."""
    with trio.CancelScope(shield=True):
        await guarded.aclose()
        with trio.move_on_after(GUARDIAN_S):
            await guarded.process.wait()
            return
        guarded.process.kill()
        with trio.move_on_after(GUARDIAN_S):
            await guarded.process.wait()
            return
        log.error("guardian_unkillable", pid=guarded.process.pid)


async def _start_guardian(command: EngineCommand) -> _Guardian:
    ours, theirs = socket.socketpair()
    with ExitStack() as unless_started:
        unless_started.callback(ours.close)
        with theirs:
            try:
                process = await trio.lowlevel.open_process(
                    [
                        *(*ISOLATED_PYTHON, str(GUARDIAN), str(theirs.fileno())),
                        *(*ISOLATED_PYTHON, str(CONFINE), confinement(command)),
                        *command.argv,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=dict(command.environment),
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # a Ctrl-C in the terminal is for us alone
                )
            except OSError as error:
                raise EngineStartFailed(
                    f"cannot start the engine's guardian: {error.strerror}"
                ) from error
        unless_started.pop_all()
    return _Guardian(process, trio.SocketStream(trio.socket.from_stdlib_socket(ours)))


def confinement(command: EngineCommand) -> str:
    """The rules for `engine/confine.py`: what the command names, and the installation of Python that
    its environment's interpreter is a link into."""
    interpreter = Path(os.path.realpath(command.argv[0]))
    return json.dumps(
        {
            "read": [*command.readable, str(interpreter.parent.parent)],
            "write": list(command.writable),
        }
    )


async def _pump(
    stream: trio.abc.ReceiveStream | None,
    guarded: _Guardian,
    log: Log,
    progress: Callable[[str], None],
) -> None:
    """Move the engine's output into our log, by lines, however long or broken they are."""
    assert stream is not None
    buffer = bytearray()
    skipping = False  # inside a line already cut at the bound
    async with stream:
        async for data in stream:
            buffer += data.replace(b"\r", b"\n")  # progress bars rewrite their line
            *lines, rest = bytes(buffer).split(b"\n")
            for line in lines:
                if not skipping:
                    _log_line(line, guarded, log, progress)
                skipping = False
            if len(rest) > MAX_LINE_BYTES:
                if not skipping:
                    _log_line(rest, guarded, log, progress)
                rest, skipping = b"", True
            buffer = bytearray(rest)
    if buffer and not skipping:
        _log_line(bytes(buffer), guarded, log, progress)


def _log_line(raw: bytes, guarded: _Guardian, log: Log, progress: Callable[[str], None]) -> None:
    line = read_log_line(raw, serving=guarded.serving)
    if line is None:
        guarded.withheld_lines += bool(raw.strip())
        return
    log.info("engine_log", line=line.text)
    if line.progress:
        progress(line.progress)


def describe_exit(status: int | None) -> str:
    """An exit status in words; negative is a signal, as in `subprocess`."""
    if status is None:
        return "went away without a status"
    return f"exited with status {status}" if status >= 0 else f"was ended by signal {-status}"


def choose_port() -> int:
    """A TCP port that is free on loopback now. The engine is told to take it; if another process
    is faster, its start fails and says so."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((client.LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def available_threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


def _prepare_files(command: EngineCommand) -> None:
    folder = command.settings_file.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        _remove_files(command)  # of a run that was killed; a stale init file hangs torch
        descriptor = os.open(
            command.settings_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(command.settings_text)
    except OSError as error:
        raise EngineStartFailed(
            f"cannot write below [engine] runtime_dir: {error.strerror}"
        ) from error


def _remove_files(command: EngineCommand) -> None:
    command.settings_file.unlink(missing_ok=True)
    command.init_file.unlink(missing_ok=True)


__all__ = ["RunningEngine", "available_threads", "choose_port", "describe_exit", "supervise"]
