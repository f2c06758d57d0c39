"""What a TDX guest measures that QEMU starts from a firmware and a UKI.

    qemu-system-x86_64 -machine q35,confidential-guest-support=tdx -bios FIRMWARE -kernel UKI
        -object tdx-guest,id=tdx … (no option ROM, no TPM)

MRTD is the firmware's, added and extended page by page before the guest starts (Intel TDX Module
Base Specification, 348549, "Build-Time Measurement Register"). RTMR 1 is what the firmware measures
of the programs that it starts, RTMR 2 what the stub and the kernel measure of their inputs: what a
TPM has in PCR 2 to 6, and in PCR 8 to 15 (UEFI 2.10, 38.4.1). RTMR 0 has the machine's memory map, its
ACPI tables and the firmware's variables; it is not predicted.

Not tried on hardware. The events are those that a machine with the same stub and kernel logs with a
TPM, in a direct start: tests/image/test_boot.py compares them, one by one.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from dataclasses import dataclass

from image.measure.events import (
    CALLING_APPLICATION,
    EXIT_INVOKED,
    EXIT_SUCCEEDED,
    SEPARATOR,
    extend,
    hashed,
    kernel_events,
    program_events,
    section_events,
)
from image.measure.firmware import (
    MAX_PAGES,
    MAX_SECTIONS,
    PAGE_BYTES,
    FirmwareError,
    numbers,
    pointer,
    table,
)

BANK = "sha384"

METADATA = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2")
"""How far before the file's end the sections are listed (OvmfPkg/ResetVector/X64/OvmfMetadata.asm)."""

BFV, CFV, TD_HOB, TEMP_MEM = 0, 1, 2, 3
"""Code, variables, and memory for the list of what the guest has and for the firmware's start: the
types that QEMU knows (hw/i386/tdvf.c). The last two are the host's to fill."""

EXTENDED = 0x1
"""Attribute: contents are measured, not only that there is a page."""

CHUNK_BYTES = 256
"""TDH.MR.EXTEND."""


@dataclass(frozen=True, slots=True)
class Section:
    """One entry of the metadata.

    Attributes:
        data: what is put there, of the file. address, size: where, in bytes.
        measured: its contents, too.
    """

    data: bytes
    address: int
    size: int
    measured: bool


def mrtd(firmware: bytes) -> bytes:
    """48 bytes; in the order of Linux's KVM, which extends each page right after it was added.

    Raises:
        FirmwareError: no firmware for TDX, or none whose measurement follows from the file.
    """
    digest = hashlib.sha384()
    for section in _sections(firmware):
        for offset in range(0, section.size, PAGE_BYTES):
            digest.update(_record(b"MEM.PAGE.ADD", section.address + offset))
            if section.measured:
                for at in range(offset, offset + PAGE_BYTES, CHUNK_BYTES):
                    digest.update(_record(b"MR.EXTEND", section.address + at))
                    digest.update(section.data[at : at + CHUNK_BYTES])
    return digest.digest()


def rtmr1(uki: bytes) -> bytes:
    """48 bytes.

    Raises:
        PeError: the UKI, or the kernel in it, is not a PE image.
    """
    return extend(rtmr1_events(uki), BANK)


def rtmr2(uki: bytes) -> bytes:
    """48 bytes.

    Raises:
        PeError: the UKI is not a PE image, or has no command line or no initrd.
    """
    return extend(rtmr2_events(uki), BANK)


def rtmr1_events(uki: bytes, bank: str = BANK) -> tuple[bytes, ...]:
    """Of PCR 4 and 5. In a direct start the firmware loads the UKI before it is ready to boot."""
    program, kernel = program_events(uki, bank)
    ready = (hashed(CALLING_APPLICATION, bank), hashed(SEPARATOR, bank))
    exits = (hashed(EXIT_INVOKED, bank), hashed(EXIT_SUCCEEDED, bank))
    return program, *ready, kernel, *exits


def rtmr2_events(uki: bytes, bank: str = BANK) -> tuple[bytes, ...]:
    """Of PCR 11 and then 9: each section, command line and initrd as the kernel gets them."""
    return *section_events(uki, bank), *kernel_events(uki, bank)


def _sections(firmware: bytes) -> list[Section]:
    """In the order of the metadata, which is QEMU's.

    Raises:
        FirmwareError: as `mrtd`.
    """
    entries = table(firmware)
    if METADATA not in entries:
        raise FirmwareError("expected TDX metadata: it is no firmware for TDX")
    start = len(firmware) - pointer(entries[METADATA], "the place of the TDX metadata")
    signature, _, version, count = numbers(firmware, start, "<4sIII", "TDX metadata")
    if (signature, version) != (b"TDVF", 1) or not 0 < count <= MAX_SECTIONS:
        raise FirmwareError(f"expected TDX metadata, version 1, 1 to {MAX_SECTIONS} sections")
    return [_section(firmware, start + 16 + 32 * index) for index in range(count)]


def _section(firmware: bytes, start: int) -> Section:
    offset, length, address, size, kind, attributes = numbers(
        firmware, start, "<IIQQII", "TDX metadata"
    )
    if kind not in (BFV, CFV, TD_HOB, TEMP_MEM) or attributes & ~EXTENDED:
        raise FirmwareError(f"expected TDX sections that QEMU knows, got type {kind}")
    if address % PAGE_BYTES or size % PAGE_BYTES or size > MAX_PAGES * PAGE_BYTES:
        raise FirmwareError("expected TDX sections of whole pages")
    if address + size > 1 << 52:
        raise FirmwareError("expected TDX sections within the guest's memory")
    measured = bool(attributes & EXTENDED)
    if measured and (kind not in (BFV, CFV) or length != size or offset + length > len(firmware)):
        raise FirmwareError("expected what is measured to be in the file")
    return Section(firmware[offset : offset + length], address, size, measured)


def _record(name: bytes, address: int) -> bytes:
    """What the TDX module hashes of a page or a chunk: 128 bytes, the address at 16."""
    return (name.ljust(16, b"\0") + struct.pack("<Q", address)).ljust(128, b"\0")
