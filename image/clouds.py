"""The disk in the forms in which clouds take it: a fixed VHD for Azure, a tar for Google Cloud.

Both are larger than the disk was, by rule of the cloud. The partition table says where a disk ends, so
its second copy moves along.
"""

from __future__ import annotations

import datetime
import shutil
import struct
import uuid
import zlib
from pathlib import Path
from typing import BinaryIO, Final

from image.common import BuildError, run

MIB: Final = 1 << 20
GIB: Final = 1 << 30
SECTOR: Final = 512

VHD_EPOCH: Final = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
FIXED: Final = 2
CREATOR: Final = b"win "
"""The tool that Azure's own are, which makes it read the size and not the geometry."""


def write_vhd(disk: Path, vhd: Path, *, epoch: int) -> None:
    """A fixed VHD: the disk, up to whole MiB as Azure wants it, and a footer.

    Args:
        epoch: seconds since 1970, for the footer's time.
    """
    size = enlarged(disk, vhd, unit=MIB)
    with vhd.open("r+b") as file:
        file.seek(size)
        file.write(vhd_footer(size, epoch=epoch))


def write_gcp_tar(disk: Path, archive: Path, *, epoch: int) -> None:
    """A tar with one sparse member, `disk.raw`, of whole GiB: names and forms are Google's."""
    folder = archive.with_suffix(".partial")
    folder.mkdir()
    try:
        enlarged(disk, folder / "disk.raw", unit=GIB)
        run(
            *("tar", "--format=oldgnu", "--owner=0", "--group=0", "--numeric-owner", "--mode=0644"),
            *(f"--mtime=@{epoch}", "--sparse", "--use-compress-program=gzip --no-name"),
            *("--create", "--file", archive, "--directory", folder, "disk.raw"),
        )
    finally:
        shutil.rmtree(folder)


def enlarged(disk: Path, copy: Path, *, unit: int) -> int:
    """A copy of the disk of the next whole number of units, in bytes; returns its size."""
    run("cp", "--sparse=always", disk, copy)
    size = -(-disk.stat().st_size // unit) * unit
    with copy.open("r+b") as file:
        move_second_table(file, size)
        file.truncate(size)
    return size


def move_second_table(file: BinaryIO, size: int) -> None:
    """To the end of a disk of so many bytes, and the first one points to it (UEFI 2.10, 5.3.2).

    Raises:
        BuildError: there is no partition table.
    """
    file.seek(SECTOR)
    first = bytearray(file.read(SECTOR))
    if first[:8] != b"EFI PART":
        raise BuildError("the disk has no partition table")
    (old,) = struct.unpack_from("<Q", first, 32)
    (entries_at,) = struct.unpack_from("<Q", first, 72)
    count, entry_size = struct.unpack_from("<II", first, 80)
    length = -(-count * entry_size // SECTOR) * SECTOR
    last = size // SECTOR - 1
    if old == last:
        return
    file.seek(entries_at * SECTOR)
    entries = file.read(length)
    file.seek(old * SECTOR - length)
    file.write(bytes(length + SECTOR))  # what was the second one
    usable = last - length // SECTOR - 1
    second = bytearray(first)
    for header, itself, other in ((first, 1, last), (second, last, 1)):
        struct.pack_into("<QQ", header, 24, itself, other)
        struct.pack_into("<Q", header, 48, usable)
    struct.pack_into("<Q", second, 72, usable + 1)
    for header, at in ((first, SECTOR), (second, last * SECTOR)):
        (header_size,) = struct.unpack_from("<I", header, 12)
        struct.pack_into("<I", header, 16, 0)
        struct.pack_into("<I", header, 16, zlib.crc32(header[:header_size]))
        file.seek(at)
        file.write(header)
    file.seek((usable + 1) * SECTOR)
    file.write(entries)


def vhd_footer(size: int, *, epoch: int) -> bytes:
    """The last 512 bytes (Virtual Hard Disk Image Format Specification, version 1.0).

    The identifier follows from size and time: nobody looks at it, and two builds are the same.
    """
    cylinders, heads, sectors = vhd_geometry(size // SECTOR)
    made = int(epoch - VHD_EPOCH.timestamp())
    footer = bytearray(
        struct.pack(
            ">8sIIQI4sI4sQQHBBII16sB427x",
            *(b"conectix", 2, 0x00010000, 0xFFFFFFFFFFFFFFFF, made),
            *(CREATOR, 0x000A0000, b"Wi2k", size, size, cylinders, heads, sectors),
            *(FIXED, 0, uuid.uuid5(uuid.NAMESPACE_OID, f"dcv {size} {epoch}").bytes, 0),
        )
    )
    struct.pack_into(">I", footer, 64, ~sum(footer) & 0xFFFFFFFF)
    return bytes(footer)


def vhd_geometry(sectors: int) -> tuple[int, int, int]:
    """Cylinders, heads, sectors of a track: the appendix of the specification, word for word."""
    total = min(sectors, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        return total // 255 // 16, 16, 255
    per_track, heads = 17, max((total // 17 + 1023) // 1024, 4)
    if total // 17 >= heads * 1024 or heads > 16:
        per_track, heads = 31, 16
        if total // 31 >= heads * 1024:
            per_track = 63
    return total // per_track // heads, heads, per_track
