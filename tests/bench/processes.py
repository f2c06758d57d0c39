"""The processes that are measured, started and ended here, and the processor time they take."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2
import trustme

from tests.bench.load import PATIENCE_S, Address
from tests.integration.appliance import FAKE_ENGINE, config_text
from tests.processes import children_of

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).parent / "peers"
PEERS_PYTHON = ROOT / ".bench" / "bin" / "python"
STOP_S = 20.0

CPUCLOCK_SCHED = 2  # linux/posix-timers.h


class NotMeasuredError(Exception):
    """A process did not come up or did not stay; the text is for the person watching."""


def cpu_s(pids: Sequence[int]) -> float:
    """Processor seconds that these processes took so far, all their threads, to the nanosecond.

    The clock is clock_getcpuclockid(3)'s, which Python has for threads only: the kernel keeps the
    process id, inverted, above the three bits of the kind of clock.
    """
    return sum(time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED) for pid in pids)


def queued_s(pid: int) -> float:
    """Seconds that a process's main thread was ready to run and others had the processors.

    The second field of /proc/PID/schedstat, nanoseconds (the kernel's Documentation/scheduler/sched-stats.rst).
    """
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def descendants(pid: int, *, without: int | None = None) -> list[int]:
    """A process and everything below it, but for one branch."""
    found = [pid]
    for child in sorted(children_of(pid)):
        if child != without:
            found += descendants(child, without=without)
    return found


@dataclass(frozen=True, slots=True)
class Target:
    """Something that answers chat requests.

    Attributes:
        pids: the processes whose time counts; empty where none stands between client and engine.
    """

    name: str
    address: Address
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Gateway:
    """`dcv serve`, with a stand-in engine of its own as its child.

    Attributes:
        receipts: its database.
    """

    target: Target
    folder: Path
    url: str
    receipts: Path


@contextmanager
def running_gateway(
    folder: Path, sections: Mapping[str, Mapping[str, object]]
) -> Iterator[Gateway]:
    """The appliance as an operator starts it, with simulated hardware.

    Raises:
        NotMeasuredError: it does not serve.
    """
    folder.mkdir()
    quiet: dict[str, Mapping[str, object]] = {"log": {"level": "info"}}
    (folder / "dcv.toml").write_text(config_text(folder, (), {**quiet, **sections}))
    command = [sys.executable, "-m", "appliance", "serve", "--config", str(folder / "dcv.toml")]
    log = folder / "log"
    with started("dcv", command, log) as process:
        _wait(process, "dcv", log, lambda: '"serving"' in log.read_text())
        lines = {line["event"]: line for line in map(json.loads, log.read_text().splitlines())}
        url = str(lines["serving"]["urls"][0])
        engine = httpx2.get(f"http://127.0.0.1:{lines['engine_ready']['port']}/_state", timeout=10)
        trust = ssl.create_default_context(cafile=folder / "tls.pem")
        target = Target(
            "dcv",
            Address(int(url.rpartition(":")[2]), trust),
            tuple(descendants(process.pid, without=engine.json()["pid"])),
        )
        [receipts] = folder.rglob("receipts.sqlite3")
        yield Gateway(target, folder, url, receipts)


@contextmanager
def running_engine(folder: Path) -> Iterator[int]:
    """A stand-in engine for the peers; its port."""
    port, log = free_port(), folder / "engine.log"
    command = [sys.executable, str(FAKE_ENGINE), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "stand-in"]
    with started("engine", command, log) as process:
        _wait(process, "the stand-in engine", log, lambda: _listens(port))
        yield port


@contextmanager
def running_peers(folder: Path, engine: int) -> Iterator[tuple[list[Target], list[str]]]:
    """Every other gateway that this machine has, over TLS; and in words, which it has not."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    files = {"key": folder / "peer.key", "certificate": folder / "peer.pem"}
    certificate.private_key_pem.write_to_path(files["key"])
    for part in certificate.cert_chain_pems:
        part.write_to_path(files["certificate"], append=True)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    targets, absent = list[Target](), list[str]()
    with ExitStack() as stack:
        for name, script in (
            ("FastAPI, uvicorn, uvloop, aiohttp", "fastapi_aiohttp.py"),
            ("FastAPI, uvicorn, uvloop, httpx", "fastapi_httpx.py"),
        ):
            if not PEERS_PYTHON.exists():
                absent.append(f"{name}: no .bench environment (`just bench` makes it)")
                continue
            port = free_port()
            command = [
                str(PEERS_PYTHON), str(PEERS / script), str(port), str(engine),
                str(files["certificate"]), str(files["key"]),
            ]  # fmt: skip
            targets.append(_peer(stack, folder, name, command, port, trust))
        if PEERS_PYTHON.exists():
            port, metrics = free_port(), free_port()
            command = [
                str(PEERS_PYTHON.with_name("sglang-router")), "launch",
                "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics),
                "--worker-urls", f"http://127.0.0.1:{engine}", "--policy", "round_robin",
                "--tls-cert-path", str(files["certificate"]), "--tls-key-path", str(files["key"]),
                "--log-level", "error",
            ]  # fmt: skip
            # It listens before it has seen that its worker is healthy.
            ready = partial(_says_yes, f"https://127.0.0.1:{port}/readiness", trust)
            targets.append(_peer(stack, folder, "sglang-router", command, port, trust, ready=ready))
        else:
            absent.append("sglang-router: no .bench environment (`just bench` makes it)")
        nginx = shutil.which("nginx")
        if nginx is None:
            absent.append("nginx: not installed")
        else:
            port = free_port()
            template = (PEERS / "nginx.conf").read_text()
            values = {"PORT": port, "ENGINE": engine, "FOLDER": folder}
            for key, value in {**values, **files}.items():
                template = template.replace(f"@{key}@", str(value))
            (folder / "nginx.conf").write_text(template)
            command = [nginx, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
            targets.append(_peer(stack, folder, "nginx", command, port, trust))
        yield targets, absent


def _peer(
    stack: ExitStack,
    folder: Path,
    name: str,
    command: Sequence[str],
    port: int,
    trust: ssl.SSLContext,
    *,
    ready: Callable[[], bool] | None = None,
) -> Target:
    log = folder / f"{port}.log"
    process = stack.enter_context(started(name, command, log))
    _wait(process, name, log, ready or partial(_listens, port))
    return Target(name, Address(port, trust), tuple(descendants(process.pid)))


@contextmanager
def started(name: str, command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child, ended by SIGTERM and, if that is not enough, by SIGKILL."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=ROOT,
            env=_environment(),
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment() -> dict[str, str]:
    # No bytecode of the peers in the checkout.
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


def _wait(
    process: subprocess.Popen[bytes], name: str, log: Path, ready: Callable[[], bool]
) -> None:
    until = time.monotonic() + PATIENCE_S
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise NotMeasuredError(f"{name} did not come up: {' '.join(last)}")
        time.sleep(0.05)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _says_yes(url: str, trust: ssl.SSLContext) -> bool:
    try:
        return httpx2.get(url, verify=trust, trust_env=False, timeout=1).status_code == 200
    except httpx2.TransportError:
        return False
