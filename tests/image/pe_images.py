"""PE images as linkers and ukify write them, by hand and small."""

from __future__ import annotations

import struct
from collections.abc import Mapping

FILE_ALIGNMENT = 512
HEADERS = 1024


def pe_image(
    sections: Mapping[str, bytes],
    *,
    magic: int = 0x20B,
    checksum: int = 0,
    certificates: bytes = b"",
    trailer: bytes = b"",
) -> bytes:
    """Headers of 1024 bytes, each section padded to 512, then `trailer` and the certificates."""
    directories = 112 if magic == 0x20B else 96
    optional = bytearray(directories + 16 * 8)
    struct.pack_into("<H", optional, 0, magic)
    struct.pack_into("<II", optional, 32, 4096, FILE_ALIGNMENT)
    struct.pack_into("<II", optional, 60, HEADERS, checksum)
    struct.pack_into("<I", optional, directories - 4, 16)
    table, bodies, offset, address = b"", b"", HEADERS, 4096
    for name, contents in sections.items():
        padded = contents.ljust(-(-len(contents) // FILE_ALIGNMENT) * FILE_ALIGNMENT, b"\xcc")
        table += struct.pack(
            "<8sIIIIIIHHI", name.encode(), len(contents), address, len(padded), offset, *[0] * 5
        )
        bodies += padded
        offset, address = offset + len(padded), address + 65536
    if certificates:
        struct.pack_into(
            "<II", optional, directories + 32, offset + len(trailer), len(certificates)
        )
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, len(sections), 0, 0, 0, len(optional), 0x22)
    headers = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40) + coff + bytes(optional) + table
    assert len(headers) <= HEADERS
    return headers.ljust(HEADERS, b"\0") + bodies + trailer + certificates
