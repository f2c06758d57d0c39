"""The image of the `test` profile in QEMU: started by image/boot.py, heard on its serial console."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
OUT = ROOT / "image/out/test"
DISK = OUT / "dcv-test.raw"
REFERENCE = OUT / "reference-values.json"
POLICY = ROOT / "image/policies/test.toml"

BOOT_S = 600.0
"""Without KVM and beside other work; alone it takes one."""

POLL_S = 0.5

needs_image = pytest.mark.skipif(
    not DISK.exists()
    or any(shutil.which(tool) is None for tool in ("qemu-system-x86_64", "swtpm")),
    reason="no image: `python3 image/build.py test`, with image/build-packages.txt installed",
)

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\r")


@dataclass
class Machine:
    """A machine that was switched on."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int

    @property
    def console(self) -> str:
        """What the serial line said until now."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return _CONTROL.sub("", text)

    def wait_for(self, text: str, *, times: int = 1, seconds: float = BOOT_S) -> str:
        """The console, once it has said this so often; fails when the machine ends before."""
        deadline = time.monotonic() + seconds
        while (console := self.console).count(text) < times:
            assert self.process.poll() is None, console[-3000:]
            assert time.monotonic() < deadline, console[-3000:]
            time.sleep(POLL_S)
        return console

    def wait_for_end(self, seconds: float = BOOT_S) -> str:
        """The console, once the machine is off."""
        self.process.wait(seconds)
        return self.console

    def facts(self, *, block: int = 1) -> dict[str, str]:
        """The so-manieth block of dcv-facts.service: title to text."""
        console = self.wait_for("DCV-FACTS-END\n", times=block)
        text = console.split("DCV-FACTS-BEGIN\n")[block].partition("DCV-FACTS-END\n")[0]
        parts = [part.partition("\n") for part in text.split("DCV-FACT ")[1:]]
        return {title: body.strip() for title, _, body in parts}


@contextlib.contextmanager
def booted(disk: Path, folder: Path, *options: str) -> Iterator[Machine]:
    """Switch a machine on; it is off at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "serial.log"
    command = [sys.executable, str(ROOT / "image/boot.py"), str(disk), "--log", str(log)]
    with (folder / "boot.log").open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options], stdout=output, stderr=output
        )
        try:
            yield Machine(process, log, port)
        finally:
            process.terminate()
            process.wait(30)
