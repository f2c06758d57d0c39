"""Partitions of a disk image: enough of GPT (UEFI 2.10, 5.3) to change one bit of one, or its name, and
to make a small disk."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SECTOR = 512
PER_MIB = (1 << 20) // SECTOR
HEADER_BYTES = 92
ENTRIES, ENTRY_BYTES = 128, 128
LINUX_DATA = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
NAME = slice(56, 128)
"""Of an entry: UTF-16, padded with zeros."""


@dataclass
class Table:
    """The header at one sector, and the entries that it points to."""

    sector: int
    header: bytearray
    entries: bytearray

    @property
    def entry_size(self) -> int:
        (size,) = struct.unpack_from("<I", self.header, 84)
        assert isinstance(size, int)
        return size


def read_table(file: BinaryIO, sector: int = 1) -> Table:
    """The table whose header lies there."""
    file.seek(sector * SECTOR)
    header = bytearray(file.read(SECTOR))
    assert header[:8] == b"EFI PART"
    entries_at, count, size = struct.unpack_from("<QII", header, 72)
    file.seek(entries_at * SECTOR)
    return Table(sector, header, bytearray(file.read(count * size)))


def write_table(file: BinaryIO, table: Table) -> None:
    """Back to where it was, with the checksums that it has now."""
    struct.pack_into("<I", table.header, 88, zlib.crc32(table.entries))
    (size,) = struct.unpack_from("<I", table.header, 12)
    struct.pack_into("<I", table.header, 16, 0)
    struct.pack_into("<I", table.header, 16, zlib.crc32(table.header[:size]))
    (entries_at,) = struct.unpack_from("<Q", table.header, 72)
    for at, data in ((table.sector, table.header), (entries_at, table.entries)):
        file.seek(at * SECTOR)
        file.write(data)


def partitions(disk: Path) -> dict[str, tuple[int, int]]:
    """Name to offset and size, in bytes."""
    found = {}
    with disk.open("rb") as file:
        table = read_table(file)
    for at in range(0, len(table.entries), table.entry_size):
        entry = table.entries[at : at + table.entry_size]
        first, last = struct.unpack_from("<QQ", entry, 32)
        if first:
            name = entry[NAME].decode("utf-16-le").rstrip("\0")
            found[name] = (first * SECTOR, (last + 1 - first) * SECTOR)
    return found


def rename_partition(disk: Path, old: str, new: str) -> None:
    """In place, in both tables: the first one, and the second at the end of the disk."""
    with disk.open("r+b") as file:
        (second,) = struct.unpack_from("<Q", read_table(file).header, 32)
        for sector in (1, second):
            table = read_table(file, sector)
            names = range(NAME.start, len(table.entries), table.entry_size)
            held = [table.entries[at : at + 72].decode("utf-16-le").rstrip("\0") for at in names]
            at = names[held.index(old)]
            table.entries[at : at + 72] = new.encode("utf-16-le").ljust(72, b"\0")
            write_table(file, table)


def flip_one_bit(disk: Path, offset: int) -> None:
    """In place."""
    with disk.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def make_disk(disk: Path, contents: Mapping[str, bytes], *, more_sectors: int = 0) -> None:
    """A disk of partitions of 1 MiB each: their names, and what lies at their beginning; whole MiB,
    and as much more as is asked for."""
    sectors = (len(contents) + 2) * PER_MIB + more_sectors
    entries, disk_id = bytearray(ENTRIES * ENTRY_BYTES), uuid.uuid4().bytes_le
    with disk.open("wb") as file:
        file.truncate(sectors * SECTOR)
        for index, (name, data) in enumerate(contents.items()):
            first = (index + 1) * PER_MIB
            place = struct.pack("<QQQ", first, first + PER_MIB - 1, 0)
            entry = LINUX_DATA.bytes_le + uuid.uuid4().bytes_le + place
            entry += name.encode("utf-16-le").ljust(72, b"\0")
            entries[index * ENTRY_BYTES : (index + 1) * ENTRY_BYTES] = entry
            file.seek(first * SECTOR)
            file.write(data)
        # The protective MBR (5.2.3): one partition of type 0xEE over all of the disk.
        protective = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff" * 3, 1, sectors - 1)
        file.seek(446)
        file.write(protective + bytes(48) + b"\x55\xaa")
        taken = len(entries) // SECTOR
        for here, other, entries_at in (
            (1, sectors - 1, 2),
            (sectors - 1, 1, sectors - 1 - taken),
        ):
            header = bytearray(SECTOR)
            struct.pack_into("<8sIIII", header, 0, b"EFI PART", 0x10000, HEADER_BYTES, 0, 0)
            usable = (2 + taken, sectors - 2 - taken)
            struct.pack_into("<QQQQ", header, 24, here, other, *usable)
            header[56:72] = disk_id
            struct.pack_into("<QII", header, 72, entries_at, ENTRIES, ENTRY_BYTES)
            write_table(file, Table(here, header, entries))
