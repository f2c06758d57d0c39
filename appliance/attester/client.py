"""The gateway's side of the socket: evidence from this machine, asked for with a deadline.

    connect_attester      to the unit's socket, in the image
    run_attester_child    in development: the collector as a child, over a socket pair

Both are tasks of the caller's nursery. They hand an `Attester` to whoever started them and then
stay: they read the answers. They never return of themselves; the collector's end is an
AttesterUnavailable, and cancelling them is how it is told to go.

Deadlines are the caller's (`trio.fail_after`). A call that is given up while the device works
leaves the connection as it is: the late answer is recognised and dropped. One that is given up
while its question is half sent leaves the collector with half a frame, and the connection ends.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import NoReturn, TypeVar

import trio

from appliance.attester import messages
from appliance.attester.messages import FrameStream, Hello, Request, Response
from appliance.attester.provider import GpuInventory
from appliance.config import Attestation
from appliance.errors import (
    ApplianceError,
    AttesterUnavailable,
    ConfigError,
    DeviceFault,
    Malformed,
)
from appliance.log import Log
from appliance.wire.canonical import JsonObject, JsonValue
from appliance.wire.evidence import CpuEvidence, GpuEvidence

_T = TypeVar("_T")

HELLO_S = 30.0
"""For the collector to start and say what it is: a Python interpreter and a few modules."""

STOP_S = 2.0
"""From closing the connection to SIGTERM, and from that to SIGKILL. It holds nothing that needs
longer; a call into a driver that does not return needs the latter."""

KILL_S = 10.0
"""From SIGKILL to its end; a process can be stuck in the kernel. Past it we go on."""

LAST_WORDS_S = 1.0
"""For the rest of its output after it is gone."""

EXPLAIN_S = 1.0
"""For its exit status, after its end of the connection closed."""

MAX_ABANDONED = 64
"""Late answers that are still waited for; past this nobody is at the other end."""

MAX_LINE_BYTES = 8192

CHILD_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
"""Fixed, so that no variable changes what is collected; tpm2-tools are found by it."""


class Attester:
    """The collector, as the rest of the gateway sees it. Made by the tasks of this module.

    Every method raises, besides what it says:

    - AttesterUnavailable: the collector is gone, or speaks nonsense (which ends the connection).
    - ProviderAbsent, DeviceFault: what the collector says of its device.

    Callers of the same device take turns. Any call may be cancelled.

    Attributes:
        hello: what the collector is set up for.
    """

    def __init__(self, frames: FrameStream, hello: Hello) -> None:
        self.hello = hello
        self._frames = frames
        self._next_id = 1  # 0 was the hello
        self._pending: dict[int, _Call] = {}
        self._abandoned: set[int] = set()
        self._lost: AttesterUnavailable | None = None
        self._reading = trio.CancelScope()
        self._sending = trio.Lock()
        self._gpu_turn = trio.Lock()
        self._cpu_turn = trio.Lock()

    async def inventory(self) -> GpuInventory:
        """Which GPUs are there, by the driver's unsigned word; as many as configured."""
        async with self._gpu_turn:
            result = await self._ask("inventory", {})
        return self._parse(messages.parse_inventory, result)

    async def gpu_evidence(
        self, nonce: bytes, *, asked: Callable[[], None] | None = None
    ) -> tuple[GpuEvidence, ...]:
        """A fresh report of every GPU, as many as configured; nothing in it is checked yet.

        Args:
            nonce: 32 bytes.
            asked: called once the question has been sent.
        """
        async with self._gpu_turn:
            result = await self._ask("gpu_evidence", {"nonce": nonce.hex()}, asked=asked)
        found = self._parse(messages.parse_gpu_list, result)
        if len(found) != self.hello.gpu_count:
            raise DeviceFault(f"expected evidence of {self.hello.gpu_count} GPUs, got {len(found)}")
        if any(one.scheme != self.hello.gpu for one in found):
            raise self._give_up(f"the collector announced {self.hello.gpu} and sent another scheme")
        return found

    async def cpu_evidence(self, report_data: bytes) -> CpuEvidence:
        """A fresh quote; nothing in it is checked yet.

        Args:
            report_data: at most 64 bytes.
        """
        async with self._cpu_turn:
            result = await self._ask("cpu_evidence", {"report_data": report_data.hex()})
        found = self._parse(messages.parse_cpu, result)
        if found.scheme != self.hello.cpu:
            raise self._give_up(f"the collector announced {self.hello.cpu} and sent another scheme")
        return found

    async def set_gpus_ready(self, ready: bool) -> None:
        """Let the GPUs take work, or not."""
        async with self._gpu_turn:
            await self._ask("set_gpus_ready", {"ready": ready})

    async def _ask(
        self, op: str, arguments: JsonObject, *, asked: Callable[[], None] | None = None
    ) -> JsonValue:
        call = _Call()
        number = await self._send(op, arguments, call)
        if asked is not None:
            asked()
        try:
            await call.answered.wait()
        except trio.Cancelled:
            self._abandon(number)
            raise
        finally:
            self._pending.pop(number, None)
        if call.response is None:
            raise self._unavailable()
        if call.response.error is not None:
            raise call.response.error
        return call.response.result

    async def _send(self, op: str, arguments: JsonObject, call: _Call) -> int:
        async with self._sending:
            # A caller that is cancelled by now has sent nothing; from here on it may have.
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._lost is not None:
                raise self._unavailable()
            number, self._next_id = self._next_id, self._next_id + 1
            self._pending[number] = call
            whole = False
            try:
                await self._frames.send(Request(number, op, arguments).to_json())
                whole = True
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise self._give_up("the collector closed its connection") from None
            finally:
                if not whole:
                    self._pending.pop(number, None)
                    self._give_up("a question was given up while it was sent")
            return number

    async def read(self, explain: Callable[[], Awaitable[str]]) -> NoReturn:
        """Hand answers to those who wait, until the connection ends. For the module's own tasks.

        Args:
            explain: why it ended, as far as can be known.

        Raises:
            AttesterUnavailable: always, unless cancelled.
        """
        try:
            with self._reading:
                try:
                    while (document := await self._frames.receive()) is not None:
                        self._deliver(messages.parse_response(document))
                except Malformed as error:
                    raise self._give_up(f"the collector speaks nonsense: {error}") from error
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
                if self._lost is None:
                    raise self._give_up(await explain())
            raise self._unavailable()
        finally:
            self._give_up("the collector was told to go")

    def _deliver(self, response: Response) -> None:
        if response.id in self._abandoned:
            self._abandoned.remove(response.id)
            return
        call = self._pending.get(response.id)
        if call is None or call.response is not None:
            raise Malformed("an answer to nothing that was asked", field="id")
        call.response = response
        call.answered.set()

    def _abandon(self, number: int) -> None:
        """Nobody waits for this answer any more; it may still come."""
        call = self._pending[number]
        if call.response is None and self._lost is None:
            self._abandoned.add(number)
            if len(self._abandoned) > MAX_ABANDONED:
                self._give_up(f"the collector left {MAX_ABANDONED} questions unanswered")

    def _give_up(self, why: str) -> AttesterUnavailable:
        """End the connection, once; everybody who waits learns the first reason."""
        if self._lost is None:
            self._lost = AttesterUnavailable(why)
            for call in self._pending.values():
                call.answered.set()
            self._reading.cancel()
        return self._unavailable()

    def _unavailable(self) -> AttesterUnavailable:
        """An error of its own for each caller: a traceback belongs to one task."""
        assert self._lost is not None
        return AttesterUnavailable(self._lost.message)

    def _parse(self, parse: Callable[[JsonValue], _T], result: JsonValue) -> _T:
        try:
            return parse(result)
        except Malformed as error:
            raise self._give_up(f"the collector speaks nonsense: {error}") from error


class _Call:
    """One question that waits for its answer; `answered` without one means that none comes."""

    __slots__ = ("answered", "response")

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.response: Response | None = None


async def connect_attester(
    path: str,
    settings: Attestation,
    *,
    lost: Callable[[AttesterUnavailable], None],
    task_status: trio.TaskStatus[Attester] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Connect to a collector that runs by itself, and keep the connection.

    Args:
        path: of its socket. settings: the gateway's; the collector must have the same providers.
        lost: told the error at once when the connection ends by itself; afterwards it is raised.

    Raises:
        AttesterUnavailable: nobody answers, or not the configured collector; or it is gone.
        ConfigError: its configuration names a provider that is not there.
    """
    try:
        with trio.move_on_after(HELLO_S) as deadline:
            stream = await trio.open_unix_socket(path)
    except OSError as error:
        raise AttesterUnavailable(
            f"cannot connect to [attestation] attester_socket: {error.strerror}"
        ) from error
    if deadline.cancelled_caught:
        raise AttesterUnavailable(f"expected a connection within {HELLO_S:g} s")
    try:
        await _keep(stream, settings, None, lost, _closed, task_status)
    finally:
        await _close(stream)


async def run_attester_child(
    settings: Attestation,
    *,
    log: Log,
    lost: Callable[[AttesterUnavailable], None],
    task_status: trio.TaskStatus[Attester] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Run a collector as a child, and keep the connection to it.

    The connection is one end of a socket pair, so nobody else can have it, and the child, which
    ends with its connection, cannot outlive us. Its settings go over it, not on a command line.

    Args:
        settings: `[attestation]`, paths made absolute.
        lost: as for `connect_attester`.

    Raises:
        AttesterUnavailable: it did not start, or is gone.
        ConfigError: the settings name a provider that is not there.

    On any way out the child is told to go, then killed; this wait is shielded and bounded.
    """
    process, stream = await _start_child()
    error: ApplianceError | None = None
    # Shielded: a cancelled parent still hears its last words. And not `nursery.start`, which waits
    # for a shielded task to end, here for ever, when it is cancelled at that moment.
    output = trio.CancelScope(shield=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_pump, process.stderr, log, output)
        try:
            await _keep(stream, settings, settings, lost, _exit_of(process), task_status)
        except (AttesterUnavailable, ConfigError) as caught:
            error = caught  # out of the nursery as itself, not in a group
        finally:
            await _stop(process, stream, log)
            output.deadline = trio.current_time() + LAST_WORDS_S
    assert error is not None  # otherwise the nursery was cancelled
    raise error


async def _keep(
    stream: trio.abc.Stream,
    settings: Attestation,
    sent: Attestation | None,
    lost: Callable[[AttesterUnavailable], None],
    explain: Callable[[], Awaitable[str]],
    task_status: trio.TaskStatus[Attester],
) -> NoReturn:
    """`sent` are the settings that the collector is to take; None if it has its own."""
    frames = FrameStream(stream)
    hello = await _greet(frames, sent, explain)
    _must_fit(hello, settings)
    attester = Attester(frames, hello)
    task_status.started(attester)
    try:
        await attester.read(explain)
    except AttesterUnavailable as error:
        lost(error)
        raise


async def _greet(
    frames: FrameStream, sent: Attestation | None, explain: Callable[[], Awaitable[str]]
) -> Hello:
    plain = None if sent is None else messages.settings_to_json(sent)
    document = None
    try:
        with trio.fail_after(HELLO_S):
            await frames.send(Request(0, "hello", {"settings": plain}).to_json())
            document = await frames.receive()
        if document is not None:
            response = messages.parse_response(document)
            if response.error is not None:
                raise response.error
            return messages.parse_hello(response.result)
    except trio.TooSlowError:
        raise AttesterUnavailable(
            f"expected the collector to answer within {HELLO_S:g} s"
        ) from None
    except Malformed as error:
        raise AttesterUnavailable(f"the collector speaks nonsense: {error}") from error
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    raise AttesterUnavailable(await explain())


def _must_fit(hello: Hello, settings: Attestation) -> None:
    """Two configurations that do not agree are one that nobody meant.

    Raises:
        AttesterUnavailable: the collector collects something else than what we appraise.
    """
    gpu = {"nvidia": "nvidia_gpu", "simulated": "simulated", "unsafe_none": None}[settings.gpu]
    expected = Hello(settings.cpu, gpu, 0 if gpu is None else settings.gpu_count)
    if hello != expected:
        raise AttesterUnavailable(f"expected a collector of {expected}, got one of {hello}")


async def _closed() -> str:
    return "the collector closed its connection"


def _exit_of(process: trio.Process) -> Callable[[], Awaitable[str]]:
    async def explain() -> str:
        with trio.move_on_after(EXPLAIN_S):
            return f"the collector {_describe(await process.wait())}"
        return await _closed()

    return explain


def _describe(status: int) -> str:
    """An exit status in words; negative is a signal, as in `subprocess`."""
    return f"exited with status {status}" if status >= 0 else f"was ended by signal {-status}"


async def _start_child() -> tuple[trio.Process, trio.SocketStream]:
    ours, theirs = socket.socketpair()
    with ExitStack() as unless_started:
        unless_started.callback(ours.close)
        with theirs:
            try:
                process = await trio.lowlevel.open_process(
                    [sys.executable, "-I", "-m", "appliance.attester.main", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env=CHILD_ENVIRONMENT,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # a Ctrl-C in the terminal is for us alone
                )
            except OSError as error:
                raise AttesterUnavailable(
                    f"cannot start the collector: {error.strerror}"
                ) from error
        unless_started.pop_all()
    return process, trio.SocketStream(trio.socket.from_stdlib_socket(ours))


async def _stop(process: trio.Process, stream: trio.SocketStream, log: Log) -> None:
    """End the child: hang up, ask, kill. Bounded and shielded."""
    with trio.CancelScope(shield=True):
        await stream.aclose()
        for signal in (None, process.terminate, process.kill):
            if signal is not None:
                signal()
            with trio.move_on_after(KILL_S if signal == process.kill else STOP_S):
                log.info("attester_stopped", how=_describe(await process.wait()))
                return
            log.warning("attester_does_not_end")
    log.error("attester_unkillable", after_s=KILL_S)


async def _pump(stream: trio.abc.ReceiveStream | None, log: Log, scope: trio.CancelScope) -> None:
    """Move the child's output into our log, by lines, however long."""
    assert stream is not None
    buffer = b""
    with scope:
        async with stream:
            async for data in stream:
                *lines, buffer = (buffer + data).split(b"\n")
                if len(buffer) > MAX_LINE_BYTES:
                    lines, buffer = [*lines, buffer], b""
                for line in lines:
                    _log_line(line, log)
    _log_line(buffer, log)


def _log_line(line: bytes, log: Log) -> None:
    text = line[:MAX_LINE_BYTES].decode("utf-8", errors="replace").strip()
    if text:
        log.info("attester_log", line=text)


async def _close(stream: trio.abc.Stream) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
        await stream.aclose()


__all__ = ["Attester", "connect_attester", "run_attester_child"]
