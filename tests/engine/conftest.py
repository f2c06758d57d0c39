"""The real SGLang on this machine's CPU behind the real `dcv serve`, once per module."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
import paths
import pytest
import serve

BOOT_S = 600.0
STOP_S = 60.0


@dataclass
class RealAppliance:
    """A `dcv serve` process with the real engine."""

    folder: Path
    process: subprocess.Popen[bytes]
    url: str
    engine_pid: int
    engine_port: int

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.folder / "tls.pem")

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="unused",
            max_retries=0,
            http_client=openai.DefaultHttpxClient(verify=self.trust, timeout=120),
        )

    def client(self, *, http2: bool = False) -> httpx2.Client:
        return httpx2.Client(
            base_url=self.url, verify=self.trust, timeout=120, http1=not http2, http2=http2
        )

    def engine_counter(self, name: str) -> float:
        """A counter of the engine's own; SGLang leaves one out until it first counts."""
        text = httpx2.get(f"http://127.0.0.1:{self.engine_port}/metrics", timeout=20).text
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith((name + "{", name + " "))
        )

    def log(self) -> str:
        return (self.folder / "dcv.log").read_text(errors="replace")


def start_real_appliance(folder: Path, *, task: str = "generate") -> RealAppliance:
    """Start one and wait until it serves."""
    config = serve.write_config(folder, engine="real", port=0)
    config.write_text(config.read_text().replace("[model]\n", f'[model]\n"task" = "{task}"\n'))
    with (folder / "dcv.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "appliance", "serve", "--config", config], stderr=log
        )
    until = time.monotonic() + BOOT_S
    while True:
        lines = (folder / "dcv.log").read_text(errors="replace").splitlines()
        serving = [line for line in lines if '"event": "serving"' in line]
        if serving:
            break
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            process.wait()
            raise AssertionError("the appliance did not serve:\n" + "\n".join(lines[-20:]))
        time.sleep(0.1)
    ready = json.loads(next(line for line in lines if '"event": "engine_ready"' in line))
    return RealAppliance(
        folder=folder,
        process=process,
        url=json.loads(serving[0])["urls"][0],
        engine_pid=ready["pid"],
        engine_port=ready["port"],
    )


def stop(appliance: RealAppliance) -> int:
    """Stop it in order; returns the exit status."""
    if appliance.process.poll() is None:
        appliance.process.send_signal(signal.SIGTERM)
    try:
        return appliance.process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        appliance.process.kill()
        return appliance.process.wait()


def require_engine() -> None:
    """Skip where the engine's environment was not set up."""
    if not paths.ENGINE_PYTHON.exists() or not paths.model_directory().exists():
        pytest.skip("the real engine is not installed here: run `just setup`")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealAppliance]:
    require_engine()
    appliance = start_real_appliance(tmp_path_factory.mktemp("real"))
    yield appliance
    status = stop(appliance)
    assert status == 0, appliance.log()[-3000:]


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[RealAppliance]:
    """One that a test may break; it takes another boot."""
    require_engine()
    appliance = start_real_appliance(tmp_path)
    yield appliance
    stop(appliance)
