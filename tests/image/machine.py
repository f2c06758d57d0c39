"""The image of the `test` profile in QEMU: started by image/boot.py, heard on its serial console."""

from __future__ import annotations

import contextlib
import http.client
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
OUT = ROOT / "image/out/test"
DISK = OUT / "dcv-test.raw"
UKI = OUT / "dcv-test.efi"
REFERENCE = OUT / "reference-values.json"
PACKAGES = OUT / "packages.txt"
POLICY = ROOT / "image/policies/test.toml"

BOOT_S = 1200.0
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
    host: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_UNIX))
    """The other end of the port that dcv-test-words.service reads."""

    @property
    def url(self) -> str:
        """Of the appliance in it, as the host reaches it."""
        return f"https://127.0.0.1:{self.port}"

    def get(self, path: str) -> bytes:
        """What it answers, from whoever has a key: for documents that are verified by themselves.

        Raises:
            OSError: nobody listens yet, or not 2xx.
        """
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with urllib.request.urlopen(self.url + path, timeout=60, context=context) as response:
            body: bytes = response.read()
        return body

    def wait_until_it_serves(self, seconds: float = BOOT_S) -> None:
        """Until /health says so; fails when the machine ends before."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.get("/health")
            except (OSError, http.client.HTTPException):  # the port is open before anybody listens
                assert self.process.poll() is None, self.console[-3000:]
                assert time.monotonic() < deadline, self.console[-3000:]
                time.sleep(POLL_S)
            else:
                return

    def say(self, word: str) -> None:
        """A word to dcv-test-words.service."""
        with contextlib.suppress(OSError):  # it is connected once
            self.host.connect(str(self.log.with_name("words")))
        self.host.sendall(word.encode() + b"\n")

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
    command += ["--port", str(port), "--words", str(folder / "words"), *options]
    with (folder / "boot.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        machine = Machine(process, log, port)
        try:
            yield machine
        finally:
            machine.host.close()
            process.terminate()
            process.wait(30)
