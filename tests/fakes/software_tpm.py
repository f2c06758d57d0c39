"""A real TPM 2.0 in software (swtpm), and the log that a firmware would keep of it.

The TPM is a process of its own behind a Unix socket in a private folder; whoever starts it here
ends it by its own process id.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

TOOLS = ("swtpm", "tpm2_createprimary", "tpm2_quote", "tpm2_nvread", "tpm2_pcrread")

needs_software_tpm = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS),
    reason="swtpm and tpm2-tools are not installed",
)

RESTRICTED = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"
START_S = 10.0

EV_NO_ACTION = 3
EV_SEPARATOR = 4
EV_EFI_BOOT_SERVICES_APPLICATION = 0x80000003
SIZES = {4: 20, 11: 32, 12: 48, 13: 64}
NAMES = {4: "sha1", 11: "sha256", 12: "sha384", 13: "sha512"}


class SoftwareTpm:
    """A running one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tcti = f"swtpm:path={folder / 'socket'}"

    def tool(self, name: str, *arguments: str, stdin: bytes = b"") -> bytes:
        """Run one of tpm2-tools; what it prints."""
        done = subprocess.run(
            [name, "-T", self.tcti, *arguments],
            input=stdin,
            capture_output=True,
            check=False,
            timeout=30,
            cwd=self.folder,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def key(
        self,
        handle: int | None,
        *,
        algorithm: str = "rsa2048:rsassa-sha256:null",
        attributes: str = RESTRICTED,
        unique: bytes = b"",
    ) -> Path:
        """A primary key of the endorsement hierarchy, made persistent; its TPMT_PUBLIC."""
        public = self.folder / "key.tpmt"
        more: tuple[str, ...] = ()
        if unique:
            (self.folder / "unique").write_bytes(unique)
            more = ("-u", "unique")
        self.tool(
            "tpm2_createprimary",
            *("-C", "e", "-G", algorithm, "-g", "sha256", "-a", attributes, "-c", "key.ctx"),
            *more,
        )
        # Without a resource manager every tool leaves what it loaded, and there are three places.
        self.tool("tpm2_flushcontext", "-t")
        self.tool("tpm2_readpublic", "-c", "key.ctx", "-f", "tpmt", "-o", "key.tpmt")
        self.tool("tpm2_flushcontext", "-t")
        self.tool("tpm2_readpublic", "-c", "key.ctx", "-f", "der", "-o", "key.der")
        self.tool("tpm2_flushcontext", "-t")
        if handle is not None:
            self.tool("tpm2_evictcontrol", "-C", "o", "-c", "key.ctx", f"{handle:#x}")
            self.tool("tpm2_flushcontext", "-t")
        return public

    def public_key(self) -> rsa.RSAPublicKey:
        """Of the last key that was made."""
        key = load_der_public_key((self.folder / "key.der").read_bytes())
        assert isinstance(key, rsa.RSAPublicKey)
        return key

    def nv_write(self, index: int, data: bytes) -> None:
        """Define an index of this size and fill it."""
        self.tool("tpm2_nvdefine", "-C", "o", "-s", str(len(data)), f"{index:#x}")
        self.tool("tpm2_nvwrite", "-C", "o", "-i", "-", f"{index:#x}", stdin=data)

    def nv_read(self, index: int) -> bytes:
        return self.tool("tpm2_nvread", "-C", "o", f"{index:#x}")

    def extend(self, pcr: int, digest: bytes) -> None:
        self.tool("tpm2_pcrextend", f"{pcr}:sha256={digest.hex()}")


@contextlib.contextmanager
def software_tpm() -> Iterator[SoftwareTpm]:
    """A fresh TPM, started and with all PCRs as after power-on."""
    with tempfile.TemporaryDirectory(prefix="swtpm-") as name:
        folder = Path(name)
        socket = folder / "socket"
        process = subprocess.Popen(
            [
                *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}"),
                *("--server", f"type=unixio,path={socket}"),
                *("--ctrl", f"type=unixio,path={socket}.ctrl"),  # where the TCTI looks for it
                *("--flags", "not-need-init,startup-clear"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + START_S
            while not (socket.exists() and Path(f"{socket}.ctrl").exists()):
                assert process.poll() is None, "swtpm ended"
                assert time.monotonic() < deadline, "swtpm did not start"
                time.sleep(0.01)
            yield SoftwareTpm(folder)
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Firmware:
    """Measures into a TPM and keeps the log, as UEFI does; without a TPM just the log."""

    def __init__(self, tpm: SoftwareTpm | None = None, algorithms: tuple[int, ...] = (11,)) -> None:
        self._tpm = tpm
        self._algorithms = algorithms
        self.log = spec_id_event(algorithms)

    def measure(self, pcr: int, data: bytes, type: int = EV_EFI_BOOT_SERVICES_APPLICATION) -> None:
        digests = {one: hashlib.new(NAMES[one], data).digest() for one in self._algorithms}
        self.log += event2(pcr, type, digests, data)
        if self._tpm is not None:
            self._tpm.extend(pcr, digests[11])

    def boot(self) -> Firmware:
        """What a machine with a UKI would measure, in outline."""
        self.measure(0, b"firmware", 8)
        self.measure(7, b"SecureBoot=1", 0x80000001)
        for pcr in range(8):
            self.measure(pcr, bytes(4), EV_SEPARATOR)
        self.measure(4, b"uki")
        for section in (b".linux", b".initrd", b".cmdline"):
            self.measure(11, section, 13)
        return self


def spec_id_event(algorithms: tuple[int, ...] = (11,)) -> bytes:
    """The TCG_PCR_EVENT that begins the log."""
    event = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(algorithms))
    event += b"".join(struct.pack("<HH", one, SIZES[one]) for one in algorithms) + b"\0"
    return struct.pack("<II20sI", 0, EV_NO_ACTION, bytes(20), len(event)) + event


def event2(register: int, type: int, digests: dict[int, bytes], data: bytes) -> bytes:
    """A TCG_PCR_EVENT2."""
    head = struct.pack("<III", register, type, len(digests))
    body = b"".join(struct.pack("<H", one) + digest for one, digest in digests.items())
    return head + body + struct.pack("<I", len(data)) + data


def startup_locality(locality: int, algorithms: tuple[int, ...] = (11,)) -> bytes:
    digests = {one: bytes(SIZES[one]) for one in algorithms}
    return event2(0, EV_NO_ACTION, digests, b"StartupLocality\0" + bytes([locality]))
