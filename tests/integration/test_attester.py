"""The collector as a process of its own: as the gateway's child, and as a unit on a socket."""

from __future__ import annotations

import datetime
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import trio
from structlog.testing import capture_logs

from appliance.attester import messages
from appliance.attester.client import Attester, connect_attester, run_attester_child
from appliance.attester.messages import FrameStream, Request
from appliance.config import Attestation
from appliance.endorsements.anchors import load_anchors, load_simulated_anchors
from appliance.errors import (
    ApplianceError,
    AttesterUnavailable,
    ConfigError,
    DeviceFault,
    Stale,
)
from appliance.rats.schemes import nvidia_gpu, simulated
from tests.processes import children_of, collectors

ANCHORS = load_simulated_anchors(load_anchors())
NOW = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)
NONCE = bytes(range(32))
DATA = b"\x5a" * 32
SIMULATED = Attestation(cpu="simulated", gpu="simulated", gpu_count=2)
PATIENCE_S = 20.0
"""Far more than any step takes; only a hang reaches it."""


def faulty(fault: str) -> Attestation:
    return msgspec.structs.replace(SIMULATED, simulated_fault=fault)


def unexpected(error: AttesterUnavailable) -> None:
    raise AssertionError(error.message)


@dataclass
class Child:
    """A collector that runs as our child, and how it ended."""

    attester: Attester
    pid: int
    scope: trio.CancelScope
    lost: list[AttesterUnavailable] = field(default_factory=list)
    error: ApplianceError | None = None
    ended: trio.Event = field(default_factory=trio.Event)

    async def wait(self) -> None:
        with trio.fail_after(PATIENCE_S):
            await self.ended.wait()


async def start_child(nursery: trio.Nursery, settings: Attestation = SIMULATED) -> Child:
    before = collectors()
    lost: list[AttesterUnavailable] = []
    scope = trio.CancelScope()
    found: list[Child] = []

    async def stay(task_status: trio.TaskStatus[Attester]) -> None:
        run = partial(run_attester_child, settings, log=structlog.get_logger(), lost=lost.append)
        with scope:
            try:
                await run(task_status=task_status)
            except ApplianceError as error:
                if not found:
                    raise
                found[0].error = error
        if found:
            found[0].ended.set()

    with trio.fail_after(PATIENCE_S):
        attester = await nursery.start(stay)
    (pid,) = collectors() - before
    found.append(Child(attester, pid, scope, lost))
    return found[0]


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


# -------------------------------------------------------------------------------------- the child


async def test_a_childs_evidence_authenticates_and_matches_its_reference_values(
    nursery: trio.Nursery,
) -> None:
    child = await start_child(nursery)
    for evidence in await child.attester.gpu_evidence(NONCE):
        claims = simulated.authenticate_gpu(evidence, anchors=ANCHORS, at=NOW, nonce=NONCE)
        root = ANCHORS.simulated_nvidia_rim
        rims = [nvidia_gpu.authenticate_rim(one, root=root, at=NOW) for one in evidence.rims]
        assert nvidia_gpu.compare(claims, rims) == ()
    quote = await child.attester.cpu_evidence(DATA)
    quoted = simulated.authenticate_cpu(quote, anchors=ANCHORS, at=NOW)
    assert quoted.report_data == DATA.ljust(64, b"\0")
    child.scope.cancel()
    await child.wait()
    assert not is_alive(child.pid)
    assert child.lost == []


async def test_a_report_about_another_nonce_is_seen(nursery: trio.Nursery) -> None:
    child = await start_child(nursery, faulty("gpu_wrong_nonce"))
    (evidence, _other) = await child.attester.gpu_evidence(NONCE)
    with pytest.raises(Stale, match="nonce"):
        simulated.authenticate_gpu(evidence, anchors=ANCHORS, at=NOW, nonce=NONCE)
    child.scope.cancel()


async def test_a_gpu_that_hangs_costs_a_deadline_and_then_the_process(
    nursery: trio.Nursery,
) -> None:
    child = await start_child(nursery, faulty("gpu_hang"))
    with trio.move_on_after(0.1) as deadline:
        await child.attester.gpu_evidence(NONCE)
    assert deadline.cancelled_caught
    await child.attester.cpu_evidence(DATA)
    child.scope.cancel()
    await child.wait()
    assert not is_alive(child.pid)


async def test_a_driver_that_crashes_takes_only_the_collector(nursery: trio.Nursery) -> None:
    child = await start_child(nursery, faulty("gpu_crash"))
    with trio.fail_after(PATIENCE_S), pytest.raises(AttesterUnavailable, match="status 139"):
        await child.attester.gpu_evidence(NONCE)
    await child.wait()
    assert isinstance(child.error, AttesterUnavailable)
    assert [one.message for one in child.lost] == ["the collector exited with status 139"]
    with pytest.raises(AttesterUnavailable):
        await child.attester.cpu_evidence(DATA)


@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGKILL, "was ended by signal 9"), (signal.SIGTERM, "status 0")]
)
async def test_a_child_that_somebody_ends_is_noticed_at_once(
    nursery: trio.Nursery, number: signal.Signals, how: str
) -> None:
    child = await start_child(nursery)
    os.kill(child.pid, number)
    await child.wait()
    assert child.error is not None
    assert how in child.error.message
    assert len(child.lost) == 1


async def test_a_child_that_does_not_react_is_killed(nursery: trio.Nursery) -> None:
    child = await start_child(nursery)
    os.kill(child.pid, signal.SIGSTOP)
    with trio.move_on_after(0.1) as deadline:
        await child.attester.cpu_evidence(DATA)
    assert deadline.cancelled_caught
    child.scope.cancel()
    await child.wait()
    assert not is_alive(child.pid)


async def test_a_start_that_is_cancelled_leaves_no_child() -> None:
    """At any moment: the first of them is inside the thread that forks."""
    run = partial(run_attester_child, SIMULATED, log=structlog.get_logger(), lost=unexpected)
    for delay_s in (0, 0.001, 0.01, 0.1, 0.3):
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await trio.testing.wait_all_tasks_blocked()
                await trio.sleep(delay_s)
                nursery.cancel_scope.cancel()
        assert collectors() == set()


async def test_settings_stay_off_the_command_line_and_out_of_the_environment(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCV_SECRET", "in the gateway's environment")
    child = await start_child(nursery)
    words = Path(f"/proc/{child.pid}/cmdline").read_bytes().split(b"\0")[:-1]
    assert words[1:4] == [b"-I", b"-m", b"appliance.attester.main"]
    assert words[4].isdigit()
    assert len(words) == 5
    environment = Path(f"/proc/{child.pid}/environ").read_bytes()
    assert environment.startswith(b"PATH=")
    assert environment.count(b"\0") == 1
    child.scope.cancel()


async def test_what_the_child_says_is_in_our_log(nursery: trio.Nursery) -> None:
    with capture_logs() as lines:
        child = await start_child(nursery)
        child.scope.cancel()
        await child.wait()
    said = [one["line"] for one in lines if one["event"] == "attester_log"]
    assert any('"attester_ready"' in line for line in said)
    assert lines[-1]["event"] in {"attester_stopped", "attester_log"}
    assert any(one.get("how") == "exited with status 0" for one in lines)


async def test_settings_that_the_child_refuses_are_errors_of_the_configuration() -> None:
    settings = faulty("gpu_meltdown")
    with (
        trio.fail_after(PATIENCE_S),
        pytest.raises(ConfigError, match="simulated_fault: unknown `gpu_meltdown`"),
    ):
        await run_attester_child(settings, log=structlog.get_logger(), lost=unexpected)
    assert collectors() == set()


PARENT = """
import os, sys, structlog, trio
from appliance.attester.client import run_attester_child
from appliance.config import Attestation

structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))

async def main():
    settings = Attestation(cpu="simulated", gpu="simulated", simulated_fault="gpu_hang")
    async with trio.open_nursery() as nursery:
        async def stay(task_status):
            await run_attester_child(
                settings, log=structlog.get_logger(), lost=print, task_status=task_status
            )
        attester = await nursery.start(stay)
        print("started", flush=True)
        await attester.gpu_evidence(bytes(32))

trio.run(main)
"""


def test_no_child_outlives_a_parent_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"started\n"
            (child,) = children_of(parent.pid)
            handle = os.pidfd_open(child)
            try:
                assert not select.select([handle], [], [], 0.2)[0]
                parent.kill()
                assert select.select([handle], [], [], PATIENCE_S)[0]
            finally:
                os.close(handle)
        finally:
            parent.kill()


# --------------------------------------------------------------------------------------- the unit

UNIT = """
import sys, trio, msgspec
from functools import partial
from pathlib import Path
from appliance.attester.main import run_attester
from appliance.config import Attestation
from appliance.log import configure_log

where = int(sys.argv[1]) if sys.argv[1].isdigit() else Path(sys.argv[1])
settings = msgspec.json.decode(sys.argv[3], type=Attestation)
log = configure_log(format="json", level="info")
sys.exit(trio.run(partial(run_attester, where, settings, gateway=sys.argv[2], log=log)))
"""


@dataclass
class Unit:
    """A collector on its own socket."""

    process: trio.Process
    path: Path
    said: list[dict[str, Any]] = field(default_factory=list)
    changed: trio.Event = field(default_factory=trio.Event)

    async def read_log(self) -> None:
        assert self.process.stderr is not None
        buffer = b""
        async for data in self.process.stderr:
            *lines, buffer = (buffer + data).split(b"\n")
            self.said += [msgspec.json.decode(line) for line in lines]
            self.changed.set()
            self.changed = trio.Event()

    async def hears(self, event: str) -> dict[str, Any]:
        with trio.fail_after(PATIENCE_S):
            while True:
                for line in self.said:
                    if line["event"] == event:
                        return line
                await self.changed.wait()

    async def wait(self) -> int:
        with trio.fail_after(PATIENCE_S):
            return await self.process.wait()


async def start_unit(
    nursery: trio.Nursery,
    folder: Path,
    settings: Attestation = SIMULATED,
    *,
    gateway: str = "",
    descriptor: int | None = None,
) -> Unit:
    path = folder / "attester.sock"
    where = str(path) if descriptor is None else str(descriptor)
    who = gateway or str(os.getuid())
    text = msgspec.json.encode(settings).decode()
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", UNIT, where, who, text],
        stderr=subprocess.PIPE,
        pass_fds=() if descriptor is None else (descriptor,),
    )
    unit = Unit(process, path)
    nursery.start_soon(_owned, unit)
    with trio.fail_after(PATIENCE_S):
        while descriptor is None and process.returncode is None and not path.exists():
            await trio.sleep(0.01)
    return unit


async def _owned(unit: Unit) -> None:
    try:
        await unit.read_log()
    finally:
        unit.process.kill()
        with trio.CancelScope(shield=True):
            await unit.process.wait()


async def connect(
    nursery: trio.Nursery, unit: Unit, settings: Attestation = SIMULATED
) -> tuple[Attester, trio.CancelScope]:
    async def stay(scope: trio.CancelScope, task_status: trio.TaskStatus[Attester]) -> None:
        with scope:
            await connect_attester(
                str(unit.path), settings, lost=lambda _error: None, task_status=task_status
            )

    with trio.fail_after(PATIENCE_S):
        while True:
            scope = trio.CancelScope()
            try:
                return await nursery.start(stay, scope), scope
            except AttesterUnavailable as error:
                if "refused" not in error.message.lower():  # bound, and not listening yet
                    raise
                await trio.sleep(0.01)


async def dial(unit: Unit) -> trio.SocketStream:
    while True:
        try:
            return await trio.open_unix_socket(str(unit.path))
        except ConnectionRefusedError:  # bound, and not listening yet
            await trio.sleep(0.01)


async def test_a_unit_serves_one_gateway_and_ends_with_it(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    unit = await start_unit(nursery, tmp_path)
    attester, scope = await connect(nursery, unit)
    mode = unit.path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert len(await attester.gpu_evidence(NONCE)) == 2
    scope.cancel()
    assert await unit.wait() == 0
    assert not unit.path.exists()


async def test_a_second_gateway_is_refused_and_logged(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    unit = await start_unit(nursery, tmp_path)
    attester, scope = await connect(nursery, unit)
    with trio.fail_after(PATIENCE_S):
        with pytest.raises(AttesterUnavailable, match="closed its connection"):
            await connect_attester(str(unit.path), SIMULATED, lost=unexpected)
    refused = await unit.hears("connection_refused")
    assert refused["pid"] == os.getpid()
    await attester.cpu_evidence(DATA)
    scope.cancel()
    assert await unit.wait() == 0


async def test_another_user_than_the_gateways_is_refused(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    unit = await start_unit(nursery, tmp_path, gateway="nobody-of-this-name")
    with trio.fail_after(PATIENCE_S):
        with pytest.raises(AttesterUnavailable, match="closed its connection"):
            await connect(nursery, unit)
    assert (await unit.hears("connection_refused"))["reason"] == "KeyError"
    unit.process.terminate()
    assert await unit.wait() == 0


async def test_sigterm_ends_a_unit_whatever_hangs(nursery: trio.Nursery, tmp_path: Path) -> None:
    settings = faulty("gpu_hang")
    unit = await start_unit(nursery, tmp_path, settings)
    with pytest.RaisesGroup(AttesterUnavailable, AttesterUnavailable):
        async with trio.open_nursery() as asking:
            attester, _scope = await connect(asking, unit, settings)
            asking.start_soon(attester.gpu_evidence, NONCE)
            await trio.sleep(0.05)
            unit.process.terminate()
    assert await unit.wait() == 0
    assert not unit.path.exists()


async def test_a_unit_takes_the_listening_socket_of_systemd(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    path = tmp_path / "attester.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        unit = await start_unit(nursery, tmp_path, descriptor=listening.fileno())
    attester, scope = await connect(nursery, unit)
    await attester.cpu_evidence(DATA)
    scope.cancel()
    assert await unit.wait() == 0
    assert path.exists()  # it is systemd's


async def test_a_unit_replaces_the_socket_of_one_that_was_killed(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    first = await start_unit(nursery, tmp_path)
    first.process.kill()
    await first.wait()
    assert first.path.exists()
    second = await start_unit(nursery, tmp_path)
    _attester, scope = await connect(nursery, second)
    scope.cancel()
    assert await second.wait() == 0


async def test_a_file_in_the_sockets_place_is_left_alone(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    (tmp_path / "attester.sock").write_text("somebody's")
    unit = await start_unit(nursery, tmp_path)
    assert await unit.wait() == ConfigError.exit_status
    assert "cannot listen" in (await unit.hears("attester_failed"))["error"]
    assert (tmp_path / "attester.sock").read_text() == "somebody's"


async def test_a_unit_that_cannot_work_says_so_before_anybody_connects(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    unit = await start_unit(nursery, tmp_path, faulty("gpu_meltdown"))
    assert await unit.wait() == ConfigError.exit_status
    assert not unit.path.exists()


async def test_a_unit_takes_no_settings_from_the_gateway(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    unit = await start_unit(nursery, tmp_path)
    with trio.fail_after(PATIENCE_S):
        async with await dial(unit) as stream:
            frames = FrameStream(stream)
            settings = messages.settings_to_json(SIMULATED)
            await frames.send(Request(0, "hello", {"settings": settings}).to_json())
            answer = await frames.receive()
            assert answer is not None
            error = messages.parse_response(answer).error
            assert isinstance(error, ConfigError)
            assert "takes no other" in error.message
            assert await frames.receive() is None
    assert await unit.wait() == 0


async def test_a_gateway_that_speaks_nonsense_ends_a_unit_with_a_status(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    unit = await start_unit(nursery, tmp_path)
    with trio.fail_after(PATIENCE_S):
        async with await dial(unit) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            assert await unit.wait() == AttesterUnavailable.exit_status
    assert "protocol" in (await unit.hears("attester_failed"))["error"]


async def test_a_unit_and_a_gateway_of_two_configurations_do_not_serve(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    unit = await start_unit(nursery, tmp_path)
    other = msgspec.structs.replace(SIMULATED, gpu_count=8)
    with pytest.raises(AttesterUnavailable, match="gpu_count=8"):
        await connect(nursery, unit, other)


async def test_a_fault_of_a_unit_arrives_as_itself(nursery: trio.Nursery, tmp_path: Path) -> None:
    settings = faulty("gpu_error_once")
    unit = await start_unit(nursery, tmp_path, settings)
    attester, scope = await connect(nursery, unit, settings)
    with pytest.raises(DeviceFault):
        await attester.gpu_evidence(NONCE)
    assert len(await attester.gpu_evidence(NONCE)) == 2
    scope.cancel()
