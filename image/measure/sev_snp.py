"""The launch digest of a SEV-SNP guest that QEMU starts from a firmware and a UKI.

    qemu-system-x86_64 -machine q35,confidential-guest-support=snp -bios FIRMWARE -kernel UKI
        -object sev-snp-guest,id=snp,kernel-hashes=on,… -cpu EPYC-v4 -smp N …

The processor chains every page that the host puts into the guest before it starts (SEV Secure
Nested Paging Firmware ABI, 1.55, 8.17.2, PAGE_INFO). In QEMU's order: the firmware, the pages that
the firmware's metadata ask for, the first state of each virtual processor. With `kernel-hashes=on` one
page of the metadata holds the SHA-256 of the kernel file, here the UKI, and the firmware starts no
other.

Not tried on hardware. The tests hold it to the package `sev-snp-measure`, for every processor type.
"""

from __future__ import annotations

import hashlib
import re
import struct
import uuid
from dataclasses import dataclass

from image.measure.firmware import (
    MAX_PAGES,
    MAX_SECTIONS,
    PAGE_BYTES,
    TOP,
    FirmwareError,
    numbers,
    pages,
    pointer,
    table,
)

METADATA = uuid.UUID("dc886566-984a-4798-a75e-5585a7bf67cc")
"""How far before the file's end the sections are listed (OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm)."""

HASHES = uuid.UUID("7255371f-3a3b-4b04-927b-1da6efa8d454")
"""Address of the table of hashes in the guest."""

RESET = uuid.UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
"""Where every processor but the first begins."""

NORMAL, VMSA, ZERO, SECRETS, CPUID = 1, 2, 3, 5, 6
"""PAGE_TYPE. The last two have contents that are not measured."""

KERNEL_HASHES = 0x10
SECTIONS = {1: ZERO, 2: SECRETS, 3: CPUID, 4: ZERO, KERNEL_HASHES: NORMAL}
"""Type of a section in the metadata to that of its pages, as QEMU has it (target/i386/sev.c)."""

HASH_TABLE = uuid.UUID("9438d606-4f22-4cc9-b479-a793d411fd21")
HASH_OF_CMDLINE = uuid.UUID("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
HASH_OF_INITRD = uuid.UUID("44baf731-3a2f-4bd7-9af1-41e29169781d")
HASH_OF_KERNEL = uuid.UUID("4de79437-abd2-427f-b835-d5b172d2045b")

VMSA_ADDRESS = 0xFFFF_FFFF_F000
"""Of the page that holds a processor's state, for the digest."""

FIRST_INSTRUCTION = 0xFFFF_FFF0

SNP_ACTIVE = 0x1
"""SEV_FEATURES of a guest that asks for nothing more. Some kernels of the host add 0x20, DebugSwap."""

SIGNATURES = {
    "EPYC": (23, 1, 2),
    "EPYC-Rome": (23, 49, 0),
    "EPYC-Milan": (25, 1, 1),
    "EPYC-Genoa": (25, 17, 0),
    "EPYC-Turin": (26, 0, 0),
}
"""`-cpu` of QEMU to family, model, stepping (target/i386/cpu.c); a version (`-v4`) changes none."""

MAX_VCPUS = 4096
"""QEMU's own bound."""


@dataclass(frozen=True, slots=True)
class Guest:
    """How the operator starts it, as far as it is measured.

    Attributes:
        vcpus: processors of the guest (`-smp`).
        vcpu_type: QEMU's name (`-cpu`), as `EPYC-v4` or `EPYC-Genoa`.
        features: SEV_FEATURES, a mask.
    """

    vcpus: int
    vcpu_type: str
    features: int = SNP_ACTIVE


def launch_digest(firmware: bytes, uki: bytes, guest: Guest) -> bytes:
    """MEASUREMENT of the attestation report, 48 bytes; neither initrd nor command line beside the UKI.

    Raises:
        FirmwareError: the firmware has not what such a start needs, or there is no such guest.
    """
    if not 0 < guest.vcpus <= MAX_VCPUS:
        raise FirmwareError(f"expected 1 to {MAX_VCPUS} virtual processors")
    if not 0 <= guest.features < 1 << 64:
        raise FirmwareError("expected SEV_FEATURES of 64 bits")
    entries = table(firmware)
    digest = bytes(48)
    for address, page in pages(firmware, TOP - len(firmware)):
        digest = _extended(digest, NORMAL, address, page)
    for address, size, kind in _sections(firmware, entries):
        if kind == KERNEL_HASHES:
            digest = _extended(digest, NORMAL, address, _hashes_page(entries, address, size, uki))
            continue
        for offset in range(0, size, PAGE_BYTES):
            digest = _extended(digest, SECTIONS[kind], address + offset, None)
    for start in _starts(entries, guest.vcpus):
        digest = _extended(digest, VMSA, VMSA_ADDRESS, _processor_page(start, guest))
    return digest


def _starts(entries: dict[uuid.UUID, bytes], vcpus: int) -> list[int]:
    """Address of each processor's first instruction."""
    if vcpus == 1:
        return [FIRST_INSTRUCTION]
    if RESET not in entries:
        raise FirmwareError("expected an SEV-ES reset block: it starts one processor only")
    return [FIRST_INSTRUCTION] + [pointer(entries[RESET], "the reset address")] * (vcpus - 1)


def _extended(digest: bytes, kind: int, address: int, page: bytes | None) -> bytes:
    """PAGE_INFO of one page: neither an IMI page nor open to another VMPL."""
    contents = bytes(48) if page is None else hashlib.sha384(page).digest()
    return hashlib.sha384(
        digest + contents + struct.pack("<HBBIQ", 0x70, kind, 0, 0, address)
    ).digest()


def _sections(firmware: bytes, entries: dict[uuid.UUID, bytes]) -> list[tuple[int, int, int]]:
    """Address, size and type of each, in the file's order."""
    if METADATA not in entries:
        raise FirmwareError("expected SEV metadata: it is no firmware for SEV-SNP")
    start = len(firmware) - pointer(entries[METADATA], "the place of the SEV metadata")
    signature, _, version, count = numbers(firmware, start, "<4sIII", "SEV metadata")
    if (signature, version) != (b"ASEV", 1) or count > MAX_SECTIONS:
        raise FirmwareError(f"expected SEV metadata, version 1, at most {MAX_SECTIONS} sections")
    found = []
    for index in range(count):
        address, size, kind = numbers(firmware, start + 16 + 12 * index, "<III", "SEV metadata")
        if kind not in SECTIONS:
            raise FirmwareError(f"expected known SEV sections, got type {kind}")
        if address % PAGE_BYTES or size % PAGE_BYTES or size > MAX_PAGES * PAGE_BYTES:
            raise FirmwareError("expected SEV sections of whole pages")
        found.append((address, size, kind))
    if [kind for _, _, kind in found].count(KERNEL_HASHES) != 1:
        raise FirmwareError("expected one SNP_KERNEL_HASHES section: it would start any kernel")
    return found


def _hashes_page(entries: dict[uuid.UUID, bytes], address: int, size: int, uki: bytes) -> bytes:
    """The page of the table of hashes, as QEMU fills it (sev_add_kernel_loader_hashes)."""
    hashed = (
        (HASH_OF_CMDLINE, b"\0"),  # an empty one has its zero
        (HASH_OF_INITRD, b""),
        (HASH_OF_KERNEL, uki),
    )
    inner = b"".join(_entry(guid, hashlib.sha256(data).digest()) for guid, data in hashed)
    whole = _entry(HASH_TABLE, inner)
    whole += bytes(-len(whole) % 16)
    offset = pointer(entries.get(HASHES, b""), "the address of the table of hashes") - address
    if size != PAGE_BYTES or not 0 <= offset <= size - len(whole):
        raise FirmwareError("expected the table of hashes within its own page")
    return (bytes(offset) + whole).ljust(size, b"\0")


def _entry(guid: uuid.UUID, data: bytes) -> bytes:
    return guid.bytes_le + struct.pack("<H", 18 + len(data)) + data


def _processor_page(start: int, guest: Guest) -> bytes:
    """A processor's state before its first instruction, as KVM makes it from QEMU's reset.

    The save area of AMD64 Architecture Programmer's Manual, volume 2, 24593, table B-4.
    """
    page = bytearray(PAGE_BYTES)
    segments = {  # selector, attributes, limit, base
        0x000: (0, 0x93, 0xFFFF, 0),  # ES
        0x010: (0xF000, 0x9B, 0xFFFF, start & 0xFFFF_0000),  # CS
        0x020: (0, 0x93, 0xFFFF, 0),  # SS
        0x030: (0, 0x93, 0xFFFF, 0),  # DS
        0x040: (0, 0x93, 0xFFFF, 0),  # FS
        0x050: (0, 0x93, 0xFFFF, 0),  # GS
        0x060: (0, 0, 0xFFFF, 0),  # GDTR
        0x070: (0, 0x82, 0xFFFF, 0),  # LDTR
        0x080: (0, 0, 0xFFFF, 0),  # IDTR
        0x090: (0, 0x8B, 0xFFFF, 0),  # TR
    }
    for offset, segment in segments.items():
        struct.pack_into("<HHIQ", page, offset, *segment)
    registers = {
        0x0D0: 0x1000,  # EFER: SVME, which KVM sets
        0x148: 0x40,  # CR4: MCE, likewise
        0x158: 0x10,  # CR0
        0x160: 0x400,  # DR7
        0x168: 0xFFFF_0FF0,  # DR6
        0x170: 0x2,  # RFLAGS
        0x178: start & 0xFFFF,  # RIP
        0x268: 0x0007_0406_0007_0406,  # G_PAT
        0x310: _signature(guest.vcpu_type),  # RDX
        0x3B0: guest.features,  # SEV_FEATURES
        0x3E8: 0x1,  # XCR0
    }
    for offset, value in registers.items():
        struct.pack_into("<Q", page, offset, value)
    struct.pack_into("<I", page, 0x408, 0x1F80)  # MXCSR
    struct.pack_into("<H", page, 0x410, 0x37F)  # X87_FCW
    return bytes(page)


def _signature(vcpu_type: str) -> int:
    """CPUID Fn0000_0001_EAX: family, model, stepping."""
    name = re.sub(r"-v[0-9]+\Z|-IBPB\Z", "", vcpu_type)
    if name not in SIGNATURES:
        raise FirmwareError(f"expected a processor type of {', '.join(SIGNATURES)}")
    family, model, stepping = SIGNATURES[name]
    extended_family = family - 0xF
    return extended_family << 20 | (model >> 4) << 16 | 0xF << 8 | (model & 0xF) << 4 | stepping
