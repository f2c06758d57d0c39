"""Where the partitions of a disk image lie: enough of GPT (UEFI 2.10, 5.3) to change one byte of one."""

from __future__ import annotations

import struct
from pathlib import Path

SECTOR = 512


def partitions(disk: Path) -> dict[str, tuple[int, int]]:
    """Name to offset and size, in bytes."""
    found = {}
    with disk.open("rb") as file:
        file.seek(SECTOR)
        header = file.read(SECTOR)
        assert header[:8] == b"EFI PART"
        entries_at, count, size = struct.unpack_from("<QII", header, 72)
        file.seek(entries_at * SECTOR)
        for _ in range(count):
            entry = file.read(size)
            first, last = struct.unpack_from("<QQ", entry, 32)
            if first:
                name = entry[56:128].decode("utf-16-le").rstrip("\0")
                found[name] = (first * SECTOR, (last + 1 - first) * SECTOR)
    return found


def flip_one_bit(disk: Path, offset: int) -> None:
    """In place."""
    with disk.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
