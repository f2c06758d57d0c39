"""A TPM's quote, with tpm2-tools: the machine's own TPM, a cloud's vTPM, or a software TPM.

Tried with a software TPM (swtpm 0.7, tpm2-tools 5.4); not tried on hardware, nor on Google's vTPM.

    1. key: Google hands out the template of its attestation key in the NV index behind the
       certificate's, and the key is made anew from it; elsewhere it has a persistent handle
    2. certificate, from its NV index
    3. quote: PCR 0 to 15 of the SHA-256 bank, over the caller's data
    4. event log, from the kernel

Each tool is a process of its own that writes into a private folder, which is gone afterwards. A
cancelled caller ends the process. What the tools are told is public: handles, PCRs, report data.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from appliance.config import Attestation
from appliance.errors import AttesterError, DeviceFault, Malformed, ProviderAbsent
from appliance.wire.event_log import MAX_LOG_BYTES
from appliance.wire.evidence import CpuEvidence
from appliance.wire.tpm import PublicArea, parse_public

EVENT_LOG = Path("/sys/kernel/security/tpm0/binary_bios_measurements")

QUOTED = "sha256:" + ",".join(str(pcr) for pcr in range(16))
"""16 and up are for debugging, dynamic launches and applications."""

TOOLS_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

MAX_EXTRA_DATA_BYTES = 64
MAX_FILE_BYTES = 64 << 10
"""Of what a tool writes: an NV index has at most some KiB."""

MAX_COMPLAINT_BYTES = 8 << 10

_NO_SUCH_HANDLE = frozenset({"0x18B", "0x28B", "0x18b"})
"""TPM_RC_HANDLE of the first or second handle: nothing is there (Part 2, 6.6)."""

_CODE = re.compile(r"\((0x[0-9A-Fa-f]+)\) - ([\x20-\x7e]{1,200})")


class Tpm:
    """One TPM and a private folder.

    Args:
        tcti: as tpm2-tools spell how to reach it.
        folder: for this one use; nothing else writes there.
    """

    def __init__(self, tcti: str, folder: Path) -> None:
        self._tcti = tcti
        self._folder = folder

    def path(self, name: str) -> Path:
        """Of a file in the folder."""
        return self._folder / name

    async def run(self, tool: str, *arguments: str) -> None:
        """Run one of tpm2-tools to its end.

        Raises:
            ProviderAbsent: the tool is not installed, the TPM cannot be reached, or the handle
                holds nothing.
            DeviceFault: it failed otherwise.
        """
        program = shutil.which(tool, path=TOOLS_PATH)
        if program is None:
            raise ProviderAbsent(f"{tool} is not installed")
        complaint = self.path("complaint")
        with complaint.open("wb") as stderr:
            done = await trio.run_process(
                [program, "-T", self._tcti, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={"PATH": TOOLS_PATH, "LC_ALL": "C"},
                check=False,
            )
        if done.returncode:
            raise _explain(tool, done.returncode, _tail(complaint))

    async def nv_read(self, index: int) -> bytes:
        """All of an NV index.

        Raises:
            ProviderAbsent: it is not defined, or as `run`. DeviceFault: as `run`.
        """
        await self.run("tpm2_nvread", "-C", "o", "-o", str(self.path("nv")), f"{index:#010x}")
        return self.read("nv")

    async def quote(self, key: str, extra_data: bytes) -> dict[str, bytes]:
        """`quote`, `signature` and `pcrs`.

        Args:
            key: a handle or the name of a context file. extra_data: at most 64 bytes.

        Raises:
            ProviderAbsent, DeviceFault: as `run`.
        """
        await self.run(
            "tpm2_quote",
            *("-c", key, "-l", QUOTED, "-q", extra_data.hex(), "-g", "sha256"),
            *("-m", str(self.path("quote")), "-s", str(self.path("signature"))),
            *("-o", str(self.path("pcrs")), "-F", "values"),
        )
        return {name: self.read(name) for name in ("quote", "signature", "pcrs")}

    async def flush(self) -> None:
        """Empty the TPM's few places for keys, which a tool leaves taken.

        The kernel's resource manager (/dev/tpmrm0) does so by itself, and gives each process places
        of its own; a software TPM has none.
        """
        await self.run("tpm2_flushcontext", "-t")

    def read(self, name: str) -> bytes:
        """A file that a tool has just written.

        Raises:
            DeviceFault: it is not there or too large.
        """
        data = _bounded(self.path(name), MAX_FILE_BYTES)
        if data is None:
            raise DeviceFault(f"TPM: expected {name}, the tool wrote none")
        return data


@contextmanager
def open_tpm(tcti: str) -> Iterator[Tpm]:
    """A TPM with a folder (0700) that is removed at the end. Nothing is asked of it yet."""
    with tempfile.TemporaryDirectory(prefix="dcv-tpm-") as folder:
        yield Tpm(tcti, Path(folder))


async def collect_tpm2(
    settings: Attestation, report_data: bytes, *, event_log: Path = EVENT_LOG
) -> CpuEvidence:
    """A fresh quote over these data, the key's certificate and the firmware's log.

    Args:
        settings: `tpm`, `tpm_ak_handle`, `tpm_ak_certificate_index`.
        report_data: at most 64 bytes. event_log: left out of the evidence where there is none.

    Raises:
        ProviderAbsent: no tools, no TPM, no key or no certificate where they are configured.
        DeviceFault: the TPM failed, or what it holds is not what belongs there.

    There is no deadline in here: the caller sets one, and a tool that still runs then is ended.
    """
    assert len(report_data) <= MAX_EXTRA_DATA_BYTES
    with open_tpm(settings.tpm) as tpm:
        certificate = _der(await tpm.nv_read(settings.tpm_ak_certificate_index))
        key = await _key(tpm, settings)
        parts = await tpm.quote(key, report_data)
        await tpm.flush()
    parts["ak_certificate"] = certificate
    if (log := await read_event_log(event_log)) is not None:
        parts["event_log"] = log
    return CpuEvidence("tpm2", parts)


async def read_event_log(path: Path) -> bytes | None:
    """The firmware's log; None where the kernel has none.

    Raises:
        DeviceFault: it cannot be read, or is larger than any log is.
    """
    return await trio.to_thread.run_sync(_bounded, path, MAX_LOG_BYTES)


async def _key(tpm: Tpm, settings: Attestation) -> str:
    """What `tpm2_quote -c` takes: the key made from Google's template, or the handle.

    Google's vTPM keeps a template (TPMT_PUBLIC) right behind the certificate: 0x01C10001 for RSA,
    0x01C10003 for ECC (go-tpm-tools, client/handles.go). A primary key follows from its hierarchy
    and template, so the one that is made here is the one that was certified.
    """
    try:
        template = await tpm.nv_read(settings.tpm_ak_certificate_index + 1)
    except ProviderAbsent:
        return f"{settings.tpm_ak_handle:#010x}"
    try:
        public = parse_public(template)
    except Malformed as error:
        raise DeviceFault(f"TPM: the attestation key's template: {error.message}") from error
    tpm.path("policy").write_bytes(public.policy)
    tpm.path("unique").write_bytes(_unique(public))
    policy = ("-L", str(tpm.path("policy"))) if public.policy else ()
    await tpm.run(
        "tpm2_createprimary",
        *("-C", "e", "-G", _algorithm(public), "-g", public.name_hash),
        *("-a", f"{public.attributes:#x}", *policy),
        *("-u", str(tpm.path("unique")), "-c", str(tpm.path("key"))),
    )
    await tpm.flush()  # the key lives on in its file
    return str(tpm.path("key"))


def _algorithm(public: PublicArea) -> str:
    """As tpm2-tools spell it: `rsa2048:rsassa-sha256:null`."""
    schemes = {0x0014: "rsassa", 0x0016: "rsapss", 0x0018: "ecdsa"}
    if public.scheme not in schemes:
        raise DeviceFault(f"TPM: expected a template with a signing scheme, got {public.scheme:#x}")
    family = "rsa" if public.curve is None else "ecc"
    return f"{family}{public.key_bits}:{schemes[public.scheme]}-{public.scheme_hash}:null"


def _unique(public: PublicArea) -> bytes:
    """`unique` as `tpm2_createprimary -u` wants it: each TPM2B as in memory, little-endian."""
    return b"".join(len(one).to_bytes(2, "little") + one for one in public.unique)


def _der(data: bytes) -> bytes:
    """The certificate at the beginning of an NV index, which may be longer than it.

    Raises:
        DeviceFault: no DER sequence is there.
    """
    if len(data) > 4 and data[:2] == b"\x30\x82":
        length = 4 + int.from_bytes(data[2:4])
        if length <= len(data):
            return data[:length]
    raise DeviceFault("TPM: expected a certificate of the attestation key in its NV index")


def _bounded(path: Path, most: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DeviceFault(f"TPM: {path.name}: {error.strerror}") from error
    if len(data) > most:
        raise DeviceFault(f"TPM: {path.name}: expected at most {most} bytes")
    return data


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_COMPLAINT_BYTES))
        return file.read(MAX_COMPLAINT_BYTES).decode("ascii", errors="replace")


def _explain(tool: str, status: int, complaint: str) -> AttesterError:
    """The TPM's own code and words; the rest of the output names paths and is not passed on."""
    if "Could not load tcti" in complaint:
        return ProviderAbsent(f"{tool}: the TPM of [attestation] tpm cannot be reached")
    if found := _CODE.findall(complaint):
        code, words = found[-1]
        kind = ProviderAbsent if code in _NO_SUCH_HANDLE else DeviceFault
        return kind(f"{tool}: the TPM answers {code}: {words.strip()}")
    return DeviceFault(f"{tool}: exit status {status}")
