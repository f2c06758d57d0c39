"""Guest firmware as EDK2 builds it, as far as a virtual machine monitor reads it: small files with the
real table of GUIDs, SEV metadata and TDX metadata."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping, Sequence

FOOTER = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
SEV_METADATA = uuid.UUID("dc886566-984a-4798-a75e-5585a7bf67cc")
SEV_HASHES = uuid.UUID("7255371f-3a3b-4b04-927b-1da6efa8d454")
SEV_RESET = uuid.UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
TDX_METADATA = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2")

SIZE = 0x4000
METADATA_BEFORE_END = 0x800
"""Where the encoders below put their list of sections."""

# Those of OvmfPkg/AmdSev: memory of the firmware's start, secrets, CPUID, more memory, hashes.
SEV_SECTIONS = (
    (0x80_0000, 0x9000, 1),
    (0x80_A000, 0x3000, 1),
    (0x80_D000, 0x1000, 2),
    (0x80_E000, 0x1000, 3),
    (0x81_1000, 0xF000, 1),
    (0x81_0000, 0x1000, 0x10),
)
HASHES_AT = 0x81_0C00
RESET_AT = 0x80_B004

# Data's offset and size, address and size, type, attributes: code, variables, TD_HOB, TEMP_MEM.
TDX_SECTIONS = (
    (0x1000, 0x3000, 0xFFFF_D000, 0x3000, 0, 1),
    (0, 0x1000, 0xFFFF_C000, 0x1000, 1, 0),
    (0, 0, 0x80_9000, 0x2000, 2, 0),
    (0, 0, 0x81_0000, 0x4000, 3, 0),
)


def firmware_file(
    entries: Mapping[uuid.UUID, bytes], metadata: bytes = b"", *, size: int = SIZE
) -> bytes:
    """Bytes that differ from page to page, the list of sections, the table, the reset vector."""
    table = b"".join(_entry(guid, data) for guid, data in entries.items())
    table += struct.pack("<H", len(table) + 18) + FOOTER.bytes_le
    body = b"".join(index.to_bytes(4, "big") for index in range(size // 4))
    start = size - METADATA_BEFORE_END
    assert len(metadata) + len(table) + 32 <= METADATA_BEFORE_END
    body = body[:start] + metadata + body[start + len(metadata) :]
    return body[: size - 32 - len(table)] + table + body[size - 32 :]


def sev_firmware(
    sections: Sequence[tuple[int, int, int]] = SEV_SECTIONS,
    *,
    without: uuid.UUID | None = None,
    hashes_at: int = HASHES_AT,
    size: int = SIZE,
) -> bytes:
    """One for SEV-SNP; `without` an entry of its table."""
    entries = {
        SEV_RESET: struct.pack("<I", RESET_AT),
        SEV_HASHES: struct.pack("<II", hashes_at, 0x400),
        SEV_METADATA: struct.pack("<I", METADATA_BEFORE_END),
    }
    entries.pop(without or FOOTER, None)
    listed = b"".join(struct.pack("<III", *section) for section in sections)
    head = struct.pack("<4sIII", b"ASEV", 16 + len(listed), 1, len(sections))
    return firmware_file(entries, head + listed, size=size)


def tdx_firmware(
    sections: Sequence[tuple[int, int, int, int, int, int]] = TDX_SECTIONS, *, version: int = 1
) -> bytes:
    """One for TDX."""
    listed = b"".join(struct.pack("<IIQQII", *section) for section in sections)
    head = struct.pack("<4sIII", b"TDVF", 16 + len(listed), version, len(sections))
    return firmware_file({TDX_METADATA: struct.pack("<I", METADATA_BEFORE_END)}, head + listed)


def _entry(guid: uuid.UUID, data: bytes) -> bytes:
    return data + struct.pack("<H", len(data) + 18) + guid.bytes_le
