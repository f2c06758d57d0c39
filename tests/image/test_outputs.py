"""The disk as clouds take it, held to what their documentation asks for, on a small disk."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import tarfile
import zlib
from pathlib import Path

import pytest

from image import clouds
from image.common import BuildError
from tests.image.disk import SECTOR, make_disk, partitions, read_table

EPOCH = 1_764_000_000
DATA = b"root" * 1000

needs_qemu_img = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="qemu-img is not installed (image/build-packages.txt)"
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Three and a half MiB with one partition, and its second table at the end."""
    path = tmp_path / "disk.raw"
    make_disk(path, {"root": DATA}, more_sectors=clouds.MIB // 2 // SECTOR)
    return path


def holds_up(disk: Path, size: int) -> None:
    """Both tables are whole, point to each other, and the disk has what it had."""
    assert disk.stat().st_size == size
    assert partitions(disk) == {"root": (clouds.MIB, clouds.MIB)}
    last = size // SECTOR - 1
    with disk.open("rb") as file:
        file.seek(clouds.MIB)
        assert file.read(len(DATA)) == DATA
        tables = [read_table(file, sector) for sector in (1, last)]
    for table, other in zip(tables, (last, 1), strict=True):
        itself, alternate, _, usable = struct.unpack_from("<QQQQ", table.header, 24)
        assert (itself, alternate) == (table.sector, other)
        assert usable == last - 33
        (checksum,) = struct.unpack_from("<I", table.header, 16)
        assert zlib.crc32(bytes(table.header[:16]) + bytes(4) + bytes(table.header[20:92])) == (
            checksum
        )
        assert zlib.crc32(table.entries) == struct.unpack_from("<I", table.header, 88)[0]


def test_a_vhd_is_whole_mib_and_a_footer(disk: Path, tmp_path: Path) -> None:
    vhd = tmp_path / "disk.vhd"
    before = disk.read_bytes()
    clouds.write_vhd(disk, vhd, epoch=EPOCH)
    assert vhd.stat().st_size == 4 * clouds.MIB + SECTOR
    footer = vhd.read_bytes()[-SECTOR:]
    assert footer[:8] == b"conectix"
    original, current = struct.unpack_from(">QQ", footer, 40)
    assert original == current == 4 * clouds.MIB
    assert struct.unpack_from(">I", footer, 60) == (2,)  # fixed
    assert struct.unpack_from(">Q", footer, 16) == (0xFFFFFFFFFFFFFFFF,)  # and so no header
    (checksum,) = struct.unpack_from(">I", footer, 64)
    assert checksum == ~sum(footer[:64] + footer[68:]) & 0xFFFFFFFF
    assert disk.read_bytes() == before


@needs_qemu_img
def test_qemu_reads_the_vhd_as_the_disk_that_it_was(disk: Path, tmp_path: Path) -> None:
    vhd, back = tmp_path / "disk.vhd", tmp_path / "back.raw"
    clouds.write_vhd(disk, vhd, epoch=EPOCH)
    told = subprocess.run(
        ["qemu-img", "info", "--output=json", "-f", "vpc", vhd], capture_output=True, check=True
    )
    assert json.loads(told.stdout)["virtual-size"] == 4 * clouds.MIB
    subprocess.run(["qemu-img", "convert", "-f", "vpc", "-O", "raw", vhd, back], check=True)
    holds_up(back, 4 * clouds.MIB)


@pytest.mark.parametrize("mib", [1, 243, 1024, 30_000, 130_000])
def test_the_geometry_of_a_vhd_covers_no_more_than_the_disk(mib: int) -> None:
    sectors = mib * clouds.MIB // SECTOR
    cylinders, heads, per_track = clouds.vhd_geometry(sectors)
    assert cylinders * heads * per_track <= sectors
    assert cylinders <= 65535
    assert heads <= 16
    assert per_track in {17, 31, 63, 255}


def test_a_tar_for_google_holds_one_sparse_disk_of_whole_gib(disk: Path, tmp_path: Path) -> None:
    archive = tmp_path / "disk.tar.gz"
    clouds.write_gcp_tar(disk, archive, epoch=EPOCH)
    assert archive.stat().st_size < clouds.MIB
    with tarfile.open(archive) as tar:
        (member,) = tar.getmembers()
        assert member.name == "disk.raw"
        assert member.issparse()
        assert (member.size, member.mtime, member.uid) == (clouds.GIB, EPOCH, 0)
    head = subprocess.run(["gzip", "-dc", archive], capture_output=True, check=True).stdout[:512]
    assert head[257:265] == b"ustar  \0"  # GNU's old format
    subprocess.run(["tar", "--sparse", "-xf", archive, "-C", tmp_path], check=True)
    holds_up(tmp_path / "disk.raw", clouds.GIB)


def test_two_conversions_are_the_same_bytes(disk: Path, tmp_path: Path) -> None:
    for write in (clouds.write_vhd, clouds.write_gcp_tar):
        first, second = tmp_path / "first", tmp_path / "second"
        for path in (first, second):
            write(disk, path, epoch=EPOCH)
        assert first.read_bytes() == second.read_bytes()


def test_a_disk_that_fits_stays_as_it_is(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    make_disk(disk, {"root": DATA})
    clouds.write_vhd(disk, tmp_path / "disk.vhd", epoch=EPOCH)
    assert (tmp_path / "disk.vhd").read_bytes()[:-SECTOR] == disk.read_bytes()


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(clouds.MIB))
    with pytest.raises(BuildError, match="no partition table"):
        clouds.write_vhd(disk, tmp_path / "disk.vhd", epoch=EPOCH)
