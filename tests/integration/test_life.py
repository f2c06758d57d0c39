"""The appliance's life: boot, drain, withdrawal, and what is left of it afterwards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx2
import pytest
import trio
import trio.testing

from appliance.config import parse_config
from appliance.engine.command import EngineKeys, engine_command
from appliance.engine.process import supervise
from appliance.errors import (
    EX_CONFIG,
    EX_OSERR,
    EX_SOFTWARE,
    EX_UNAVAILABLE,
    EngineDied,
    EngineHung,
    InternalError,
)
from appliance.log import configure_log
from appliance.notify import Notifier
from appliance.run import run
from tests.integration.appliance import (
    MODEL,
    RawConnection,
    RunningAppliance,
    config_text,
    start_appliance,
)

DCV = [sys.executable, "-m", "appliance"]
CHAT = "/v1/chat/completions"


def slow_chat(tokens: int = 1000, ms: int = 20) -> bytes:
    return json.dumps(
        {
            "model": MODEL,
            "stream": True,
            "max_tokens": tokens,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": f"[[mode:slow:{ms}]] Go on"}],
        }
    ).encode()


async def ended(appliance: RunningAppliance) -> None:
    with trio.fail_after(20):
        await appliance.ended.wait()


async def test_sigterm_lets_a_running_stream_end_and_refuses_new_requests(
    appliance: RunningAppliance,
) -> None:
    async with RawConnection.open(appliance) as running, RawConnection.open(appliance) as other:
        await running.post(CHAT, slow_chat(tokens=20))
        await running.read_some(1)
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep(0.1)
        await other.post(CHAT, slow_chat())
        with pytest.raises(OSError):  # the port is closed
            await trio.open_tcp_stream("127.0.0.1", appliance.port)
        response = await running.read_response()
        assert response.clean
        assert response.body.endswith(b"data: [DONE]\n\n")
    await ended(appliance)
    assert appliance.result == [None]


async def test_a_stream_longer_than_the_drain_ends_with_an_error_event(
    appliance: RunningAppliance,
) -> None:
    async with RawConnection.open(appliance) as running:
        await running.post(CHAT, slow_chat())
        await running.read_some(1)
        os.kill(os.getpid(), signal.SIGTERM)
        response = await running.read_response()
        assert not response.clean
        assert b'"code":"not_serving"' in response.body
        assert b"[DONE]" not in response.body
    await ended(appliance)
    assert appliance.result == [None]


async def test_sigterm_aborts_what_the_drain_did_not_wait_for(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(
        nursery, tmp_path, sections={"limits": {"drain_s": 0.2}, "engine": {"stop_grace_s": 10.0}}
    )
    async with RawConnection.open(appliance) as running:
        await running.post(CHAT, slow_chat(tokens=5000, ms=50))
        await running.read_some(1)
        os.kill(os.getpid(), signal.SIGTERM)
        began = trio.current_time()
        await ended(appliance)
    # The engine drains without a deadline of its own; 5000 slow tokens would take minutes.
    assert trio.current_time() - began < 8
    events = [line["event"] for line in appliance.log_lines]
    assert "engine_killed" not in events


async def test_an_engine_killed_in_mid_stream_withdraws_the_appliance(
    appliance: RunningAppliance,
) -> None:
    pid = next(line["pid"] for line in appliance.log_lines if line["event"] == "engine_ready")
    async with RawConnection.open(appliance) as running:
        await running.post(CHAT, slow_chat())
        await running.read_some(1)
        os.kill(pid, signal.SIGKILL)
        response = await running.read_response()
        assert not response.clean
        last = json.loads(response.body.rstrip().rpartition(b"data: ")[2])
        assert last["error"]["code"] in {"engine_failed", "engine_died"}
    await ended(appliance)
    [error] = appliance.result
    assert isinstance(error, EngineDied)
    assert error.exit_status == EX_SOFTWARE


async def test_an_engine_that_hangs_withdraws_the_appliance(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(
        nursery,
        tmp_path,
        sections={
            "engine": {"health_interval_s": 0.2, "health_deadline_s": 0.3, "health_failures": 2}
        },
        modes=("health_delay:0.01",),
    )
    await appliance.engine_control({"set": {"stop_health": ""}})
    await ended(appliance)
    [error] = appliance.result
    assert isinstance(error, EngineHung)


async def test_a_hung_engine_ends_streams_before_it_is_stopped(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(
        nursery,
        tmp_path,
        sections={
            "engine": {
                "health_interval_s": 0.2,
                "health_deadline_s": 0.3,
                "health_failures": 2,
                "stop_grace_s": 8.0,
            }
        },
        modes=("health_delay:0.01", "ignore_sigterm"),
    )
    async with RawConnection.open(appliance) as running:
        await running.post(CHAT, slow_chat(tokens=5000))
        await running.read_some(1)
        await appliance.engine_control({"set": {"stop_health": ""}})
        began = trio.current_time()
        response = await running.read_response()
        assert trio.current_time() - began < 5
    assert not response.clean
    assert b'"code":"engine_hung"' in response.body
    await ended(appliance)
    assert isinstance(appliance.result[0], EngineHung)


async def test_a_sigterm_between_boot_and_serving_is_not_lost(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    calls = 0

    def random(size: int) -> bytes:
        """The fifth secret or nonce, the cache's, is drawn after the boot and before the listener:
        two engine keys and the nonces of stages 4 and 9 come first. Jitter, which tasks draw when
        they get to it, is shorter."""
        nonlocal calls
        calls += size == 32
        if size == 32 and calls == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return secrets.token_bytes(size)

    appliance = await start_appliance(nursery, tmp_path, random=random)
    assert calls == 5
    await ended(appliance)
    assert appliance.result == [None]


async def test_a_supervision_that_is_cancelled_while_it_starts_leaves_nothing(
    tmp_path: Path,
) -> None:
    """At any moment: the first of them is inside the thread that forks."""
    config = parse_config(config_text(tmp_path), folder=tmp_path)
    log = configure_log(format="json", level="error", stream=io.StringIO())
    keys = EngineKeys(api="a", admin="b")
    for delay_s in (0, 0.001, 0.01, 0.1, 0.3):
        command = engine_command(config.engine, config.model, port=1, keys=keys, threads=1)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    partial(
                        supervise,
                        command,
                        keys,
                        config.engine,
                        log=log,
                        progress=lambda _: None,
                        failed=lambda _: None,
                    )
                )
                await trio.testing.wait_all_tasks_blocked()
                await trio.sleep(delay_s)
                nursery.cancel_scope.cancel()
        assert not command.settings_file.exists()
        left = ["pgrep", "-f", str(command.settings_file)]
        assert (await trio.run_process(left, capture_stdout=True, check=False)).stdout == b""


async def test_waiting_requests_get_an_answer_when_the_engine_dies(
    appliance: RunningAppliance,
) -> None:
    pid = next(line["pid"] for line in appliance.log_lines if line["event"] == "engine_ready")
    responses: list[httpx2.Response] = []

    async def ask() -> None:
        responses.append(await appliance.chat("[[mode:slow:50]] Go", max_tokens=1000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        with trio.fail_after(5):
            while await appliance.engine_counter("sglang:num_running_reqs") < 1:
                await trio.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
    assert responses[0].status_code in {502, 503}
    assert responses[0].json()["error"]["code"] in {"engine_failed", "engine_died"}


async def test_a_stalled_reader_does_not_keep_the_appliance_from_stopping(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(
        nursery, tmp_path, sections={"limits": {"drain_s": 0.5, "write_s": 60.0}}
    )
    body = json.dumps(
        {
            "model": MODEL,
            "stream": True,
            "messages": [{"role": "user", "content": "[[mode:long:400000]] Go"}],
        }
    ).encode()
    async with RawConnection.open(appliance) as stalled:
        await stalled.post(CHAT, body)
        await stalled.read_some(1)
        await trio.sleep(1)  # let every buffer on the way fill
        os.kill(os.getpid(), signal.SIGTERM)
        await ended(appliance)
    assert appliance.result == [None]


async def test_systemd_hears_stages_ready_watchdog_and_stopping(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    messages: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify.sock"))
        manager.settimeout(5)

        def read() -> None:
            while not messages or messages[-1] != "STOPPING=1":
                messages.append(manager.recv(4096).decode())

        reader = threading.Thread(target=read)
        reader.start()
        appliance = await start_appliance(
            nursery,
            tmp_path,
            notifier=Notifier(address=str(tmp_path / "notify.sock"), watchdog_s=0.3),
        )
        await trio.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        await ended(appliance)
        await trio.to_thread.run_sync(reader.join)
    order = [
        "STATUS=booting",
        "STATUS=booting, stage 7 (engine)",
        "READY=1",
        "STATUS=serving stand-in at https://127.0.0.1:",
        "STATUS=draining",
        "STOPPING=1",
    ]
    found = [next(i for i, text in enumerate(messages) if text.startswith(o)) for o in order]
    assert found == sorted(found), messages
    assert messages.count("WATCHDOG=1") >= 2


async def test_the_engines_own_progress_shows_while_it_boots(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(nursery, tmp_path, modes=("load:0.5",))
    lines = [line["line"] for line in appliance.log_lines if line["event"] == "engine_log"]
    assert any("Load weight begin" in line for line in lines)
    assert any("Traceback" in line for line in lines)  # harmless, and the boot went on
    assert not any("server_args" in line for line in lines)


async def test_long_and_binary_engine_output_is_bounded(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(
        nursery, tmp_path, modes=("log_long_line:300000", "log_binary")
    )
    assert max(len(line) for line in appliance.log_stream.getvalue().splitlines()) < 20_000


# From outside: the `dcv` command as a process.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(folder: Path, *modes: str, **sections: dict[str, object]) -> Path:
    path = folder / "dcv.toml"
    path.write_text(config_text(folder, modes, sections), encoding="utf-8")
    return path


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def serve(
    folder: Path, processes: list[subprocess.Popen[bytes]], *, open_files: str = ""
) -> subprocess.Popen[bytes]:
    """`open_files`: options of `ulimit -n` for it."""
    command = [*DCV, "serve", "--config", str(folder / "dcv.toml")]
    if open_files:
        command = ["sh", "-c", f'ulimit {open_files} && exec "$@"', "sh", *command]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    processes.append(process)
    return process


def wait_for(condition: str, folder: Path, *, deadline_s: float = 60) -> dict[str, object]:
    """Wait for a log event by name."""
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        for line in (folder / "log").read_text(errors="replace").splitlines():
            if f'"event": "{condition}"' in line:
                found: dict[str, object] = json.loads(line)
                return found
        time.sleep(0.05)
    raise AssertionError(f"no {condition} in {(folder / 'log').read_text()[-2000:]}")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def engine_state(folder: Path) -> dict[str, object]:
    port = wait_for("engine_ready", folder)["port"]
    state: dict[str, object] = httpx2.get(f"http://127.0.0.1:{port}/_state").json()
    return state


def test_a_killed_gateway_leaves_no_process_and_no_shared_memory(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    write(folder, "spawn_children", "leak_shm")
    gateway = serve(folder, processes)
    wait_for("serving", folder)
    state = engine_state(folder)
    children, shm = state["children"], state["left_over"]
    assert isinstance(children, list)
    assert isinstance(shm, list)
    engine = wait_for("engine_ready", folder)["pid"]
    assert isinstance(engine, int)
    family = [engine, *children]
    assert len(family) == 3
    assert all(alive(pid) for pid in family)
    assert Path(shm[0]).exists()
    gateway.kill()
    gateway.wait()
    until = time.monotonic() + 10
    while any(alive(pid) for pid in family) or Path(shm[0]).exists():
        assert time.monotonic() < until, [pid for pid in family if alive(pid)]
        time.sleep(0.05)


def test_a_stopped_gateway_leaves_nothing_either(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    write(folder, "spawn_children", "leak_shm")
    gateway = serve(folder, processes)
    wait_for("serving", folder)
    state = engine_state(folder)
    children = state["children"]
    shm = state["left_over"]
    assert isinstance(children, list)
    assert isinstance(shm, list)
    gateway.terminate()
    assert gateway.wait(20) == 0
    assert not any(alive(pid) for pid in children)
    assert not Path(shm[0]).exists()
    assert not (folder / "status.sock").exists()
    assert not any((folder / "engine").glob("*.yaml"))


def test_an_engine_that_ignores_sigterm_is_killed_after_its_grace(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    write(folder, "ignore_sigterm", engine={"stop_grace_s": 0.5})
    gateway = serve(folder, processes)
    wait_for("serving", folder)
    gateway.terminate()
    assert gateway.wait(20) == 0
    wait_for("engine_killed", folder, deadline_s=1)


def test_the_keys_are_on_no_command_line_and_off_the_disk_once_ready(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    write(folder, "load:0.6")
    gateway = serve(folder, processes)
    settings = folder / "engine" / "settings.yaml"
    until = time.monotonic() + 10
    while not settings.exists() or not settings.read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert settings.stat().st_mode & 0o777 == 0o600
    assert settings.parent.stat().st_mode & 0o777 == 0o700
    values = json.loads(settings.read_text())
    keys = [values["api-key"], values["admin-api-key"]]
    wait_for("serving", folder)
    assert not settings.exists()
    log = (folder / "log").read_text()
    for key in keys:
        assert key not in log
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command_line = entry.read_bytes()
        except OSError:
            continue
        assert not any(key.encode() in command_line for key in keys)
    gateway.terminate()
    assert gateway.wait(20) == 0


@pytest.mark.parametrize(
    ("modes", "sections", "status", "says"),
    [
        (("crash_start",), {}, EX_UNAVAILABLE, "exited with status 1 before it was ready"),
        (("hang_start",), {"engine": {"ready_deadline_s": 0.5}}, EX_UNAVAILABLE, "within 0.5 s"),
        (("bind_all",), {}, EX_UNAVAILABLE, "loopback only"),
        ((), {"model.files": {"config.json": "0" * 64}}, EX_CONFIG, "to have sha256"),
        ((), {"model.files": {"gone.safetensors": "0" * 64}}, EX_CONFIG, "is missing"),
        ((), {"engine": {"unsafe_command": ["/nonexistent"]}}, EX_UNAVAILABLE, "status 127"),
        ((), {"engine": {"extra_args": ["log-requests"]}}, EX_CONFIG, "may not be set"),
        ((), {"listen": {"hots": "x"}}, EX_CONFIG, "did you mean `host`"),
    ],
    ids=["crash", "hang", "exposed", "digest", "missing", "no-program", "extra", "unknown-key"],
)
def test_a_boot_that_fails_says_why_and_never_opens_the_port(
    folder: Path,
    processes: list[subprocess.Popen[bytes]],
    modes: tuple[str, ...],
    sections: dict[str, dict[str, object]],
    status: int,
    says: str,
) -> None:
    write(folder, *modes, **sections)
    gateway = serve(folder, processes)
    assert gateway.wait(30) == status
    log = (folder / "log").read_text()
    assert says in log
    assert '"serving"' not in log


def test_more_open_files_are_allowed_than_clients_can_take(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    """One address with idle connections took the descriptors that the engine is asked with, and the
    appliance ended."""
    write(folder, limits={"max_connections": 1500, "max_concurrent": 16})
    gateway = serve(folder, processes, open_files="-S -n 256")
    wait_for("serving", folder)
    limits = Path(f"/proc/{gateway.pid}/limits").read_text().splitlines()
    (allowed,) = [line.split()[3] for line in limits if line.startswith("Max open files")]
    assert int(allowed) >= 1500 + 2 * 16
    gateway.terminate()
    assert gateway.wait(20) == 0


def test_clients_that_could_take_every_open_file_are_refused_at_boot(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    write(folder, limits={"max_connections": 1500, "max_concurrent": 16})
    gateway = serve(folder, processes, open_files="-n 1024")
    assert gateway.wait(30) == EX_CONFIG
    assert "they need 1660 open files, this process may have 1024" in (folder / "log").read_text()


def test_a_taken_port_is_stage_10s_error(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        write(folder, listen={"port": taken.getsockname()[1]})
        gateway = serve(folder, processes)
        assert gateway.wait(30) == EX_OSERR
    assert "stage 10 (listener): cannot listen" in (folder / "log").read_text()


async def test_a_defect_is_logged_by_type_and_place_without_what_it_quotes(folder: Path) -> None:
    canary = secrets.token_hex(16)

    def random(size: int) -> bytes:
        """Fails at the fifth call, the cache secret: the engine runs by then."""
        calls.append(size)
        if len(calls) == 5:
            raise ZeroDivisionError(canary)
        return secrets.token_bytes(size)

    calls = list[int]()
    config = parse_config(config_text(folder), folder=folder)
    stream = io.StringIO()
    log = configure_log(format="json", level="debug", stream=stream)
    ended_by = await run(config, log=log, notifier=Notifier(), random=random)
    assert isinstance(ended_by, InternalError)
    assert ended_by.exit_status == EX_SOFTWARE
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert "engine_stopped" in [line["event"] for line in lines]
    assert lines[-1]["event"] == "appliance_ended"
    assert lines[-1]["code"] == "internal_error"
    [defect] = lines[-1]["defects"]
    assert defect["error"] == "ZeroDivisionError"
    assert any(place.startswith("appliance.run:") for place in defect["where"])
    assert defect["where"][-1].startswith(f"{__name__}:")
    assert canary not in stream.getvalue()


def test_a_log_that_cannot_be_written_ends_the_appliance_as_a_defect(folder: Path) -> None:
    write(folder)
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [*DCV, "serve", "--config", folder / "dcv.toml"],
            stdout=subprocess.PIPE,
            stderr=full,
            timeout=60,
        )
    assert ended.returncode == EX_SOFTWARE
    assert ended.stdout == b""


def test_sigterm_during_the_boot_stops_it_in_order(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    write(folder, "hang_start")
    gateway = serve(folder, processes)
    wait_for("engine_log", folder)
    gateway.terminate()
    assert gateway.wait(20) == 0


def test_a_second_appliance_on_the_same_state_is_refused(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    write(folder)
    first = serve(folder, processes)
    wait_for("serving", folder)
    second = subprocess.run(
        [*DCV, "serve", "--config", folder / "dcv.toml"], capture_output=True, timeout=20
    )
    assert second.returncode == EX_CONFIG
    assert b"another appliance is running" in second.stderr
    assert first.poll() is None


def test_dcv_status_shows_the_stage_while_it_boots_and_the_state_after(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    def status(*arguments: str) -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [*DCV, "status", "--socket", folder / "status.sock", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20)

    assert status().returncode == 2
    write(folder, "load:3600")
    gateway = serve(folder, processes)
    wait_for("engine_log", folder)
    booting = status("--json")
    assert booting.returncode == 1
    assert json.loads(booting.stdout)["stage"]["name"] == "engine"
    gateway.terminate()
    assert gateway.wait(20) == 0
    write(folder)
    gateway = serve(folder, processes)
    wait_for("serving", folder)
    serving = status()
    assert serving.returncode == 0
    assert "serving" in serving.stdout
    gateway.terminate()
    assert gateway.wait(20) == 0


def test_check_prints_the_effective_configuration_and_starts_nothing(folder: Path) -> None:
    path = write(folder)
    checked = subprocess.run(
        [*DCV, "serve", "--config", path, "--check"], capture_output=True, text=True, timeout=20
    )
    assert checked.returncode == 0
    assert json.loads(checked.stdout)["limits"]["max_nesting"] == 64
    path.write_text("[listen]\nport = 99999\n")
    refused = subprocess.run(
        [*DCV, "serve", "--config", path, "--check"], capture_output=True, text=True, timeout=20
    )
    assert refused.returncode == EX_CONFIG
    assert "[listen] port" in refused.stderr


def test_the_operators_input_tightens_the_configuration_or_is_refused(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    path = write(folder, operator={"domains": ["example.com"]})
    given = folder / "input.toml"
    arguments: list[str | Path] = [*DCV, "serve", "--config", path, "--operator-input", given]
    given.write_text('[tls]\nnames = ["a.example.com"]\n[limits]\nmax_nesting = 8\n')
    checked = subprocess.run([*arguments, "--check"], capture_output=True, text=True, timeout=20)
    assert checked.returncode == 0, checked.stderr
    effective = json.loads(checked.stdout)
    assert (effective["tls"]["names"], effective["limits"]["max_nesting"]) == (["a.example.com"], 8)
    given.write_text("[limits]\nmax_nesting = 65\n")
    for refused_arguments in (arguments, [*arguments, "--check"]):
        refused = subprocess.run(refused_arguments, capture_output=True, text=True, timeout=20)
        assert refused.returncode == EX_CONFIG
        assert "the operator's input: [limits] max_nesting: expected at most 64" in refused.stderr


def test_the_digest_of_the_operators_input_is_in_the_status(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    path = write(folder)
    given = folder / "input.toml"
    given.write_bytes(b"[limits]\nmax_concurrent = 1\n")
    with (folder / "log").open("wb") as log:
        processes.append(
            subprocess.Popen(
                [*DCV, "serve", "--config", path, "--operator-input", given], stderr=log
            )
        )
    wait_for("serving", folder)
    shown = subprocess.run(
        [*DCV, "status", "--json", "--socket", folder / "status.sock"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    expected = "sha256:" + hashlib.sha256(given.read_bytes()).hexdigest()
    assert json.loads(shown.stdout)["operator_input_digest"] == expected


def test_an_image_that_leaves_the_keys_to_its_operator_does_not_start_without_them(
    folder: Path,
) -> None:
    path = write(folder, auth={"mode": "keys"}, operator={"max_keys": 1})
    arguments: list[str | Path] = [*DCV, "serve", "--config", path]
    checked = subprocess.run([*arguments, "--check"], capture_output=True, timeout=20)
    assert checked.returncode == 0
    refused = subprocess.run(arguments, capture_output=True, text=True, timeout=20)
    assert refused.returncode == EX_CONFIG
    assert "[auth] keys: missing" in refused.stderr


def test_many_clients_that_hang_up_leave_no_exchange_behind(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    write(folder)
    gateway = serve(folder, processes)
    url = str(wait_for("serving", folder)["urls"]).strip("[]'")

    def hang_up() -> None:
        with httpx2.Client(verify=False, timeout=10) as client:
            for _ in range(5):
                with client.stream("POST", url + CHAT, content=slow_chat()) as response:
                    next(response.iter_raw())

    threads = [threading.Thread(target=hang_up) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    until = time.monotonic() + 5
    with socket.socket(socket.AF_UNIX) as _unused:
        while True:
            document = json.loads(
                subprocess.run(
                    [*DCV, "status", "--json", "--socket", folder / "status.sock"],
                    capture_output=True,
                    timeout=20,
                ).stdout
            )
            if document["running"] == 0:
                break
            assert time.monotonic() < until, document
    gateway.terminate()
    assert gateway.wait(20) == 0


CANARY = "nvapi-CANARY-0123456789"


def start_with_credentials(
    folder: Path, processes: list[subprocess.Popen[bytes]], *more: str
) -> subprocess.Popen[bytes]:
    """With one, as systemd would hand it over."""
    credentials = folder / "credentials"
    credentials.mkdir(mode=0o700, exist_ok=True)
    (credentials / "sealed_nvidia").write_text(CANARY)
    with (folder / "log").open("wb") as log:
        processes.append(
            subprocess.Popen(
                [*DCV, "serve", "--config", folder / "dcv.toml", *more],
                env={**os.environ, "CREDENTIALS_DIRECTORY": str(credentials)},
                stdout=log,
                stderr=log,
            )
        )
    return processes[-1]


def test_a_vendors_key_is_in_nothing_that_the_appliance_says_or_writes(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    write(folder, attestation={"nvidia_service_key": "sealed_nvidia"})
    gateway = start_with_credentials(folder, processes)
    wait_for("serving", folder)
    shown = subprocess.run(
        [*DCV, "status", "--json", "--socket", folder / "status.sock"],
        capture_output=True,
        timeout=20,
    )
    assert shown.returncode == 0
    command_line = Path(f"/proc/{gateway.pid}/cmdline").read_bytes()
    gateway.terminate()
    assert gateway.wait(20) == 0
    written = [
        path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "credentials"
    ]
    assert len(written) > 3
    for said in (shown.stdout, command_line, *written):
        assert CANARY.encode() not in said


def test_check_looks_for_no_credential_and_shows_none(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    path = write(folder, attestation={"nvidia_service_key": "sealed_nvidia"})
    checked = start_with_credentials(folder, processes, "--check")
    assert checked.wait(20) == 0
    with_it = (folder / "log").read_text()
    without = subprocess.run(
        [*DCV, "serve", "--config", path, "--check"], capture_output=True, text=True, timeout=20
    )
    assert without.stdout == with_it
    assert CANARY not in with_it
    assert json.loads(with_it)["attestation"]["nvidia_service_key"] == "sealed_nvidia"


def test_a_credential_that_is_named_and_not_there_keeps_it_down(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    write(folder, attestation={"nvidia_service_key": "sealed_other"})
    gateway = start_with_credentials(folder, processes)
    assert gateway.wait(20) == EX_CONFIG
    said = (folder / "log").read_text()
    assert "[attestation] nvidia_service_key: the credential `sealed_other`: No such file" in said
    assert CANARY not in said
