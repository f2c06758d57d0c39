"""SEV-SNP reports and TDX quotes, from the kernel's configfs-tsm.

Source: Documentation/ABI/testing/configfs-tsm-report and drivers/virt/coco/tsm.c (Linux 6.7 to
6.18). Not tried on hardware; tested with an imitation of the
kernel's behaviour in its place.

A report is a folder. What is written to its `inblob` (up to 64 bytes) stands in what is then read
from `outblob`. `generation` counts the writes: if it grew by more than ours, what was read may be
about somebody else's data. The kernel takes `inblob` when the file is closed and cannot say there
that it refused: that too shows in `generation`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from appliance.config import Attestation
from appliance.errors import AttesterError, DeviceFault, ProviderAbsent
from appliance.wire.certificate_table import CertificateTable, parse_certificate_table
from appliance.wire.encoding import encode_base64
from appliance.wire.evidence import MAX_PART_BYTES, CpuEvidence

INBLOB_BYTES = 64
SNP_REPORT_BYTES = 0x4A0

ATTEMPTS = 5
RETRY_S = 0.1
"""Between two attempts, and as much longer each time. A TDX quote is made by a service of the
host, which may be busy."""

TRY_AGAIN = frozenset({errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT})
ABSENT = frozenset({errno.ENOENT, errno.ENXIO, errno.ENOTDIR, errno.ENODEV})


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a scheme reads from the kernel: the provider's name there, the part in the evidence."""

    provider: str
    part: str


KINDS: Mapping[str, _Kind] = {
    "sev_snp": _Kind("sev_guest", "report"),
    "tdx": _Kind("tdx_guest", "quote"),
}


class Folder(Protocol):
    """What of `pathlib.Path` is used here. A plain folder cannot stand in for configfs in tests:
    in configfs files appear with their folder and go with it, and reading one runs the firmware."""

    def __truediv__(self, name: str, /) -> Folder:
        """What is in it."""
        ...

    def mkdir(self) -> None:
        """Make it."""
        ...

    def rmdir(self) -> None:
        """Remove it, in configfs with its files."""
        ...

    def read_bytes(self) -> bytes:
        """Of a file, all of it."""
        ...

    def write_bytes(self, data: bytes, /) -> int:
        """Write a file, here always in one write(2): the kernel takes it at close(2)."""
        ...


class _Disturbed(Exception):  # noqa: N818  # says what happened; caught in this module
    """Somebody else wrote to our report, or the kernel did not take what we wrote."""


class ConfigfsTsm:
    """This guest's TEE.

    Args:
        scheme: `sev_snp` or `tdx`; the kernel's provider must be that one.
        root: where the folders are made: a Path; `/sys/kernel/config/tsm/report` on a real machine.
    """

    def __init__(self, scheme: str, *, root: Folder) -> None:
        self.scheme = scheme
        self._kind = KINDS[scheme]
        self._root = root

    @classmethod
    def from_settings(cls, settings: Attestation) -> ConfigfsTsm:
        """As configured."""
        return cls(settings.cpu, root=Path(settings.tsm_dir))

    async def collect(self, report_data: bytes) -> CpuEvidence:
        """A fresh report or quote over these data, zero-padded to 64 bytes.

        Raises:
            ProviderAbsent: no configfs-tsm, or another provider in it.
            DeviceFault: busy or disturbed several times in a row, or failing.
            Malformed: a certificate table from the host that does not parse.
        """
        assert len(report_data) <= INBLOB_BYTES
        inblob = report_data.ljust(INBLOB_BYTES, b"\0")
        outblob, auxblob = await self._read(inblob)
        if self.scheme == "sev_snp":
            if len(outblob) != SNP_REPORT_BYTES:
                raise DeviceFault(
                    f"outblob: expected {SNP_REPORT_BYTES} bytes of SEV-SNP, got {len(outblob)}"
                )
            return CpuEvidence(
                self.scheme,
                {self._kind.part: outblob},
                _endorsements(parse_certificate_table(auxblob)),
            )
        return CpuEvidence(self.scheme, {self._kind.part: outblob})

    async def _read(self, inblob: bytes) -> tuple[bytes, bytes]:
        """Ask until nobody disturbed us. `outblob` and `auxblob`."""
        why = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await trio.sleep(RETRY_S * attempt)
            try:
                # The thread is not interrupted when its caller is cancelled: it removes its
                # folder, and what it read is dropped.
                return await trio.to_thread.run_sync(
                    partial(_report, self._root, self._kind, inblob), abandon_on_cancel=True
                )
            except _Disturbed as error:
                why = str(error)
            except OSError as error:
                if error.errno not in TRY_AGAIN:
                    raise _translate(error) from error
                why = os.strerror(error.errno or 0)
        raise DeviceFault(f"configfs-tsm: {ATTEMPTS} attempts failed, the last one: {why}")


def _report(root: Folder, kind: _Kind, inblob: bytes) -> tuple[bytes, bytes]:
    """One report in a folder of its own, which is gone afterwards. Blocks."""
    entry = root / f"dcv-{secrets.token_hex(8)}"
    entry.mkdir()
    try:
        # 1. The TEE that is configured, and no other.
        provider = _text(entry / "provider")
        if provider != kind.provider:
            raise ProviderAbsent(f"configfs-tsm: expected {kind.provider}, got `{provider[:64]}`")
        # 2. Ask.
        before = _generation(entry)
        (entry / "inblob").write_bytes(inblob)
        # 3. Take what came, and what the host put beside it.
        outblob = _blob(entry / "outblob")
        auxblob = b""
        with contextlib.suppress(FileNotFoundError):  # TDX has none; SEV-SNP's may be empty
            auxblob = (entry / "auxblob").read_bytes()
        # 4. One write, ours.
        after = _generation(entry)
        if after != before + 1:
            raise _Disturbed(f"generation: expected {before + 1}, got {after}")
        return outblob, auxblob
    finally:
        entry.rmdir()


def _blob(path: Folder) -> bytes:
    data = path.read_bytes()  # the kernel's own bound is 16 MiB
    if not 0 < len(data) <= MAX_PART_BYTES:
        raise DeviceFault(
            f"configfs-tsm: expected a blob of 1 to {MAX_PART_BYTES} bytes, got {len(data)}"
        )
    return data


def _text(path: Folder) -> str:
    return path.read_bytes()[:256].decode("ascii", errors="replace").strip()


def _generation(entry: Folder) -> int:
    text = _text(entry / "generation")
    if not (text.isascii() and text.isdigit()):
        raise DeviceFault(f"generation: expected a number, got `{text[:64]}`")
    return int(text)


def _endorsements(table: CertificateTable) -> dict[str, bytes]:
    """What the host knows of AMD's word for this chip; the rest is fetched elsewhere."""
    found: dict[str, bytes] = {}
    vek = table.vlek or table.vcek
    if vek is not None:
        found["vek"] = vek
    if table.ask is not None:
        found["authorities"] = _pem(table.ask)
    if table.crl is not None:
        found["crl"] = table.crl
    return found


def _pem(der: bytes) -> bytes:
    text = encode_base64(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return "\n".join(
        ("-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", "")
    ).encode("ascii")


def _translate(error: OSError) -> AttesterError:
    message = f"configfs-tsm: {os.strerror(error.errno or 0)}"
    return ProviderAbsent(message) if error.errno in ABSENT else DeviceFault(message)
