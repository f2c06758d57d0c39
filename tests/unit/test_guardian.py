"""The guardian as a real process, with small programs in the engine's place.

Every wait is bounded. Whatever a test does, closing the control socket ends all that it started.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
import trio
import trio.testing

from appliance.engine import guardian
from appliance.engine.process import GUARDIAN_S, _dismiss, _Guardian
from appliance.log import configure_log

PATIENCE_S = 20.0
"""Far more than any step takes; only a hang reaches it."""

WAIT = "import signal\nsignal.pause()\n"
SAY = "import os, sys\ndef say(*words): os.write(1, (' '.join(map(str, words)) + '\\n').encode())\n"


@dataclass
class Guarded:
    """A running guardian: its process and our end of the control socket."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    reports: IO[bytes]
    pid: int = 0

    def report(self) -> str:
        """The next line the guardian reports; "" once it closed its end."""
        return self.reports.readline().decode().rstrip("\n")

    def said(self) -> list[str]:
        """The next line the engine or one of its descendants said, in words."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
        assert ready, "nothing was said"
        return self.process.stdout.readline().decode().split()

    def command(self, letters: bytes) -> None:
        self.control.sendall(letters)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)


@contextmanager
def guarded(*command: str) -> Iterator[Guarded]:
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE_S)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", guardian.__file__, str(theirs.fileno()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    with process, ours, ours.makefile("rb") as reports:
        try:
            found = Guarded(process, ours, reports)
            word, pid = found.report().split()
            assert word == "pid"
            found.pid = int(pid)
            yield found
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def program(code: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", SAY + code)


@contextmanager
def watched(*pids: str | int) -> Iterator[list[int]]:
    """Handles on processes that are alive now; unlike their numbers these are never reused."""
    handles = [os.pidfd_open(int(pid)) for pid in pids]
    try:
        yield handles
    finally:
        for handle in handles:
            os.close(handle)


def ended(handle: int, *, within_s: float = PATIENCE_S) -> bool:
    return bool(select.select([handle], [], [], within_s)[0])


# ------------------------------------------------------------------------------------- reports


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(7)", 7),
        ("os.kill(os.getpid(), 9)", -9),
        ("os.kill(os.getpid(), 15)", -15),
    ],
)
def test_the_engines_pid_and_the_way_it_ended_are_reported(code: str, status: int) -> None:
    with guarded(*program(f"say(os.getpid())\n{code}")) as engine:
        assert engine.said() == [str(engine.pid)]
        assert engine.report() == f"exit {status}"
        assert engine.report() == ""
        assert engine.wait() == 0


@pytest.mark.parametrize("missing", ["/nonexistent/engine", "no-such-engine-anywhere"])
def test_a_program_that_is_missing_is_said_to_be_so(missing: str) -> None:
    with guarded(missing, "--config", "x") as engine:
        assert engine.report() == "exit 127"
        assert engine.wait() == 0
        assert engine.process.stderr is not None
        assert engine.process.stderr.read() == (
            b"cannot start the engine: No such file or directory\n"
        )


@pytest.mark.parametrize("attempt", range(10))
def test_a_term_command_right_after_the_start_is_not_lost(attempt: int) -> None:
    with guarded(*program(WAIT)) as engine:
        engine.command(b"T")
        assert engine.report() == "exit -15"


def test_an_unknown_command_does_nothing() -> None:
    with guarded(*program(WAIT)) as engine:
        engine.command(b"?x\n")
        engine.command(b"T")
        assert engine.report() == "exit -15"


# --------------------------------------------------------------------------------- the engine


def test_the_engine_has_a_session_of_its_own_and_ordinary_signals() -> None:
    code = (
        "import signal\n"
        "kinds = [signal.getsignal(number) for number in (15, 1, 17)]\n"
        "say(os.getsid(0) == os.getpid(), kinds.count(signal.SIG_DFL), os.getppid())\n"
    )
    with guarded(*program(code)) as engine:
        assert engine.said() == ["True", "3", str(engine.process.pid)]


def test_the_engine_inherits_nothing_but_its_three_standard_descriptors() -> None:
    code = (
        "found = [n for n in os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd/' + n)]\n"
        "say(*sorted(found))\n"
    )
    with guarded(*program(code)) as engine:
        assert engine.said() == ["0", "1", "2"]


def test_the_term_command_reaches_the_main_process_only() -> None:
    """SIGTERM to SGLang's whole group makes it crash instead of drain."""
    code = (
        "import signal, subprocess\n"
        "echo = 'import sys\\nfor line in sys.stdin: print(line, end=str(), flush=True)'\n"
        "child = subprocess.Popen([sys.executable, '-I', '-S', '-c', echo],\n"
        "    stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)\n"
        "def ask(word):\n"
        "    child.stdin.write(word + b'\\n')\n"
        "    return child.stdout.readline().decode().strip()\n"
        "def drain(number, frame):\n"
        "    say('term', ask(b'echo'))\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, drain)\n"
        "say('ready', ask(b'go'))\n"
        "while True: signal.pause()\n"
    )
    with guarded(*program(code)) as engine:
        assert engine.said() == ["ready", "go"]
        engine.command(b"T")
        assert engine.said() == ["term", "echo"]
        assert engine.report() == "exit 0"


# ------------------------------------------------------------------- nothing outlives the engine

FAMILY = (
    "import signal, subprocess\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "generation = int(os.environ.get('GENERATION', '0'))\n"
    "if generation < 2:\n"
    "    os.environ['GENERATION'] = str(generation + 1)\n"
    "    subprocess.Popen([sys.executable, '-I', '-S', '-c', os.environ['CODE']],\n"
    "        start_new_session=True)\n"
    "say(generation, os.getpid())\n"
    "while True: signal.pause()\n"
)
"""A main process, its child and its grandchild, each in a session of its own and deaf to SIGTERM."""


@contextmanager
def family(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Guarded, list[int]]]:
    monkeypatch.setenv("CODE", SAY + FAMILY)
    with guarded(*program(FAMILY)) as engine:
        pids = dict(engine.said() for _ in range(3))
        assert pids["0"] == str(engine.pid)
        with watched(*pids.values()) as handles:
            yield engine, handles


def test_the_kill_command_ends_descendants_in_sessions_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with family(monkeypatch) as (engine, handles):
        engine.command(b"T")
        assert not any(ended(handle, within_s=0) for handle in handles)
        engine.command(b"K")
        assert engine.report() == "exit -9"
        assert all(ended(handle, within_s=0) for handle in handles)
        assert engine.wait() == 0


def test_the_end_of_the_gateway_ends_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    with family(monkeypatch) as (engine, handles):
        engine.control.shutdown(socket.SHUT_RDWR)  # what our SIGKILL would do to the socket
        assert all(ended(handle) for handle in handles)
        assert engine.wait() == 0


def test_the_end_of_the_main_process_ends_its_descendants(monkeypatch: pytest.MonkeyPatch) -> None:
    with family(monkeypatch) as (engine, handles):
        os.kill(engine.pid, signal.SIGKILL)
        assert engine.report() == "exit -9"
        assert all(ended(handle, within_s=0) for handle in handles)


def test_an_orphan_that_left_by_a_double_fork_is_ended() -> None:
    code = (
        "import signal\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "        os.read(read, 1)\n"  # our main process reaped the one between
        "        say(os.getpid(), os.getppid())\n"
        "        while True: signal.pause()\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "os.write(write, b'x')\n"
        "signal.pause()\n"
    )
    with guarded(*program(code)) as engine:
        orphan, parent = engine.said()
        assert parent == str(engine.process.pid)  # it is the guardian's child now
        with watched(orphan) as (handle,):
            engine.command(b"T")
            assert engine.report() == "exit -15"
            assert ended(handle, within_s=0)


def test_a_killed_guardian_takes_the_main_process_with_it() -> None:
    with guarded(*program(f"say('ready')\n{WAIT}")) as engine:
        engine.said()
        with watched(engine.pid) as (handle,):
            engine.process.kill()
            assert ended(handle)


def test_the_guardian_is_deaf_to_the_signals_of_a_terminal_and_of_systemd() -> None:
    with guarded(*program(f"say('ready')\n{WAIT}")) as engine:
        engine.said()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            engine.process.send_signal(number)
        engine.command(b"T")
        assert engine.report() == "exit -15"
        assert engine.wait() == 0


# ------------------------------------------------------------------------------ shared memory


@pytest.fixture
def shared() -> Iterator[Path]:
    path = Path(guardian.SHARED_MEMORY) / f"dcv test {secrets.token_hex(8)}"
    yield path
    path.unlink(missing_ok=True)


MAPPING = (
    "import mmap, signal\n"
    "file = open(os.environ['SHARED'], 'w+b')\n"
    "file.truncate(4096)\n"
    "held = mmap.mmap(file.fileno(), 4096)\n"
    "file.close()\n"
    "say('mapped')\n"
    "while True: signal.pause()\n"
)


@contextmanager
def mapping(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    monkeypatch.setenv("SHARED", str(shared))
    with guarded(*program(MAPPING)) as engine:
        assert engine.said() == ["mapped"]
        assert shared.exists()
        yield engine


def test_shared_memory_that_a_killed_engine_had_mapped_is_removed(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mapping(shared, monkeypatch) as engine:
        engine.command(b"K")
        assert engine.report() == "exit -9"
        assert not shared.exists()


def test_shared_memory_is_removed_after_the_engine_died_by_itself(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mapping(shared, monkeypatch) as engine:
        engine.command(b"S")  # what is mapped can be seen only while it lives
        engine.command(b"T")
        assert engine.report() == "exit -15"
        assert not shared.exists()


def test_shared_memory_is_removed_when_the_gateway_is_gone(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mapping(shared, monkeypatch) as engine:
        engine.control.shutdown(socket.SHUT_RDWR)
        assert engine.wait() == 0
        assert not shared.exists()


def test_shared_memory_of_others_is_left_alone(shared: Path) -> None:
    shared.write_bytes(b"not the engine's")
    with guarded(*program(WAIT)) as engine:
        engine.command(b"SK")
        assert engine.report() == "exit -9"
    assert shared.read_bytes() == b"not the engine's"


SEMAPHORE = (
    "import multiprocessing, signal\n"
    "held = multiprocessing.get_context('spawn').Lock()\n"
    "say('made', held._semlock.name)\n"
    "while True: signal.pause()\n"
)


def test_semaphores_of_a_killed_engine_are_removed_and_those_of_others_are_not() -> None:
    other = multiprocessing.get_context("spawn").Lock()
    others_name = str(other._semlock.name)  # type: ignore[attr-defined]
    with guarded(*program(SEMAPHORE)) as engine:
        _, name = engine.said()
        semaphore = Path(f"{guardian.SHARED_MEMORY}sem.{name.removeprefix('/')}")
        assert semaphore.exists()
        engine.command(b"K")
        assert engine.report() == "exit -9"
        assert not semaphore.exists()
    assert Path(f"{guardian.SHARED_MEMORY}sem.{others_name.removeprefix('/')}").exists()


# ------------------------------------------------------------------------- a guardian that hangs


async def test_a_guardian_that_does_not_end_is_killed_within_a_bound(
    mock_clock: trio.testing.MockClock,
) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        stuck = await trio.lowlevel.open_process(["sleep", "1000"], start_new_session=True)
        control = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        output = io.StringIO()
        log = configure_log(format="json", level="debug", stream=output)
        mock_clock.rate = 20
        began = trio.current_time()
        await _dismiss(_Guardian(stuck, control), log)
    assert GUARDIAN_S <= trio.current_time() - began < 2 * GUARDIAN_S
    assert stuck.returncode == -signal.SIGKILL
    assert output.getvalue() == ""
