"""The volume with the weights: what is made of a folder, and that its root hash speaks for all of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from image import build, model_volume
from image.common import BuildError
from tests.image.disk import flip_one_bit, partitions
from tests.image.test_image import TOOLS, a_gpu_build

needs_tools = pytest.mark.skipif(
    not (TOOLS / "usr/bin/systemd-repart").exists()
    or any(shutil.which(one) is None for one in ("bwrap", "veritysetup")),
    reason="no tools tree (`image/build.py test` makes it), or image/build-packages.txt is missing",
)

WEIGHTS = bytes(range(256)) * 4000


def a_model(folder: Path) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "tokenizer/merges.txt").write_text("a b\n")
    return folder


def verified(disk: Path, volume: Path) -> bool:
    """Whether data, tree and root hash belong together, by veritysetup in user space."""
    root = volume.read_text().split("ROOT=")[1].strip()
    parts = []
    for name in ("dcv-model", "dcv-model-verity"):
        offset, size = partitions(disk)[name]
        with disk.open("rb") as file:
            file.seek(offset)
            parts.append(disk.with_name(name))
            parts[-1].write_bytes(file.read(size))
    done = subprocess.run(["veritysetup", "verify", *parts, root], capture_output=True, check=False)
    return done.returncode == 0


@needs_tools
def test_the_root_hash_speaks_for_every_byte(tmp_path: Path) -> None:
    disk = tmp_path / "model.raw"
    volume = model_volume.make_volume(TOOLS, a_model(tmp_path / "model"), disk)
    assert verified(disk, volume)
    offset, size = partitions(disk)["dcv-model"]
    flip_one_bit(disk, offset + size // 2)
    assert not verified(disk, volume)


@needs_tools
def test_the_same_files_are_the_same_volume_whoever_made_them_when(tmp_path: Path) -> None:
    first, second = a_model(tmp_path / "first"), a_model(tmp_path / "second")
    for path in (second, *second.rglob("*")):
        os.utime(path, (1, 1))
    disks = [tmp_path / "first.raw", tmp_path / "second.raw"]
    volumes = [
        model_volume.make_volume(TOOLS, folder, disk)
        for folder, disk in zip((first, second), disks, strict=True)
    ]
    assert volumes[0].read_text() == volumes[1].read_text()
    assert disks[0].read_bytes() == disks[1].read_bytes()


@needs_tools
def test_what_is_written_beside_the_disk_is_what_the_image_takes(tmp_path: Path) -> None:
    one = a_gpu_build(tmp_path)
    assert one.model_volume is not None
    written = model_volume.make_volume(TOOLS, a_model(tmp_path / "m"), tmp_path / "model.raw")
    assert written == one.model_volume
    assert build.model_volume(one) == written.read_text()


def test_a_folder_without_a_model_or_with_links_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"there is no config\.json"):
        model_volume.make_volume(TOOLS, tmp_path, tmp_path / "model.raw")
    folder = a_model(tmp_path / "model")
    (folder / "more.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(BuildError, match="give a folder of plain files"):
        model_volume.make_volume(TOOLS, folder, tmp_path / "model.raw")
