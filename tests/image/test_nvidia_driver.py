"""NVIDIA's driver file, taken apart: one in its shape, and ones that are not."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from image import build, nvidia_driver
from image.common import BuildError
from tests.image.driver_file import (
    HEAD,
    VERSION,
    contents,
    driver_file,
    lock_of,
    member,
)

TREE = build.module_tree(build.plan("gpu", "metal"))

needs_compiler = pytest.mark.skipif(
    not TREE.exists(), reason="no tree with the kernel's headers: `image/build.py gpu` makes it"
)


@pytest.mark.parametrize("program", ["xz", "zstd", "gzip"])
def test_what_the_image_needs_has_the_names_that_others_ask_for(
    tmp_path: Path, program: str
) -> None:
    file = tmp_path / "driver.run"
    lock = driver_file(file, program=program)
    nvidia_driver.unpack(file, lock, tmp_path / "unpacked")
    stage = tmp_path / "stage"
    nvidia_driver.install(tmp_path / "unpacked", VERSION, stage)
    libraries = stage / "usr/lib/x86_64-linux-gnu"
    for name in ("libcuda.so.1", "libcuda.so", "libnvidia-ml.so.1", "libnvidia-nvvm.so.4"):
        assert (libraries / name).readlink().name == f"{name.partition('.so')[0]}.so.{VERSION}"
        assert (libraries / name).read_bytes().startswith(b"ELF lib")
    assert (libraries / f"libnvidia-pkcs11-openssl3.so.{VERSION}").is_file()
    firmware = stage / "usr/lib/firmware/nvidia" / VERSION
    assert sorted(path.name for path in firmware.iterdir()) == ["gsp_ga10x.bin", "gsp_tu10x.bin"]
    assert (stage / "usr/bin/nvidia-modprobe").stat().st_mode & 0o7777 == 0o755  # not setuid
    names = {path.name for path in stage.rglob("*")}
    assert not {"32", "nvidia-installer", f"libGLX_nvidia.so.{VERSION}", ".manifest"} & names


def test_sources_of_the_open_modules_come_out_and_the_proprietary_ones_do_not(
    tmp_path: Path,
) -> None:
    file = tmp_path / "driver.run"
    nvidia_driver.unpack(file, driver_file(file), tmp_path / "unpacked")
    assert (tmp_path / "unpacked/kernel-open/nvidia.c").is_file()
    assert not (tmp_path / "unpacked/kernel").exists()


def test_a_file_that_is_not_the_locked_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "driver.run"
    lock = driver_file(file)
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(BuildError, match=f"expected SHA-256 {lock.sha256}, got"):
        nvidia_driver.unpack(file, lock, tmp_path / "unpacked")
    with pytest.raises(BuildError, match="needs --nvidia-driver FILE"):
        nvidia_driver.unpack(None, lock, tmp_path / "unpacked")


@pytest.mark.parametrize("program", ["xz", "zstd", "gzip"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_an_archive_that_is_cut_short_is_refused(tmp_path: Path, program: str, kept: float) -> None:
    file = tmp_path / "driver.run"
    driver_file(file, program=program)
    whole, head = file.read_bytes(), len(HEAD.format(version=VERSION, skip=8))
    file.write_bytes(whole[: head + int((len(whole) - head) * kept)])
    with pytest.raises(BuildError, match="--nvidia-driver: "):
        nvidia_driver.unpack(file, lock_of(file), tmp_path / "unpacked")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x7fELF", "not NVIDIA's self-extracting file"),
        (b"#!/bin/sh\nexit 0\n", "not NVIDIA's self-extracting file"),
        (b"#!/bin/sh\nskip=99999\n", "cut short"),
        (b"#!/bin/sh\nskip=3\nPK\x03\x04", "compressed by nothing that is known"),
    ],
)
def test_what_is_no_driver_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "driver.run"
    file.write_bytes(data)
    with pytest.raises(BuildError, match=message):
        nvidia_driver.unpack(file, lock_of(file), tmp_path / "unpacked")


@pytest.mark.parametrize(
    "name",
    [
        f"libcuda.so.{VERSION}",
        f"libnvidia-pkcs11-openssl3.so.{VERSION}",
        "nvidia-persistenced",
        "firmware/gsp_ga10x.bin",
        "kernel-open/Makefile",
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / "driver.run"
    lock = driver_file(file, [member(*one) for one in contents().items() if one[0] != name])
    with pytest.raises(BuildError, match=f"{name} is not in it"):
        nvidia_driver.unpack(file, lock, tmp_path / "unpacked")


def test_a_library_that_not_every_branch_has_may_be_missing(tmp_path: Path) -> None:
    file = tmp_path / "driver.run"
    lock = driver_file(
        file, [member(*one) for one in contents().items() if "gpucomp" not in one[0]]
    )
    nvidia_driver.unpack(file, lock, tmp_path / "unpacked")
    nvidia_driver.install(tmp_path / "unpacked", VERSION, tmp_path / "stage")


@pytest.mark.parametrize("name", ["../outside", "/outside", "kernel-open/../../outside"])
def test_a_member_that_would_be_outside_stops_the_build(tmp_path: Path, name: str) -> None:
    file = tmp_path / "driver.run"
    hostile = tarfile.TarInfo(name)
    lock = driver_file(file, [(hostile, b""), *(member(*one) for one in contents().items())])
    with pytest.raises(BuildError, match="outside of the archive"):
        nvidia_driver.unpack(file, lock, tmp_path / "unpacked/driver")
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("name", ["nvidia-smi", "kernel-open/nvidia.c"])
def test_a_link_in_place_of_a_file_stops_the_build(tmp_path: Path, name: str, kind: bytes) -> None:
    file = tmp_path / "driver.run"
    link = tarfile.TarInfo(name)
    link.type, link.linkname = kind, "/etc/passwd"
    lock = driver_file(file, [(link, b""), *(member(*one) for one in contents().items())])
    with pytest.raises(BuildError, match=f"{name} is not a plain file"):
        nvidia_driver.unpack(file, lock, tmp_path / "unpacked")


def test_a_driver_of_another_version_than_the_lock_says_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "driver.run"
    files = contents() | {".manifest": contents("580.0.2")[".manifest"]}
    lock = driver_file(file, [member(*one) for one in files.items()])
    with pytest.raises(BuildError, match=r"expected driver 580\.0\.1, got 580\.0\.2"):
        nvidia_driver.unpack(file, lock, tmp_path / "unpacked")


DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'version = "550.163.01"\nsha256 = "{DIGEST}"\n', "branch 580 to 595, got 550"),
        (f'version = "615.71.05"\nsha256 = "{DIGEST}"\n', "branch 580 to 595, got 615"),
        ('version = "580.0.1"\nsha256 = "abc"\n', "not 64 hexadecimal digits"),
        (f'version = "../580"\nsha256 = "{DIGEST}"\n', "is no version"),
        (f'sha256 = "{DIGEST}"\n', "expected `version` and `sha256`"),
        (f'version = "580.0.1"\nsha256 = "{DIGEST}"\nurl = "x"\n', "and nothing else"),
        ("version =", "not TOML"),
    ],
)
def test_a_lock_that_names_no_driver_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "nvidia-driver.toml"
    path.write_text(text)
    with pytest.raises(BuildError, match=message):
        nvidia_driver.read_lock(path)


def test_a_lock_names_version_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "nvidia-driver.toml"
    path.write_text(f'version = "595.71.05"\nsha256 = "{DIGEST}"\n')
    assert nvidia_driver.read_lock(path) == nvidia_driver.DriverLock("595.71.05", DIGEST)
    with pytest.raises(BuildError, match="needs --nvidia-driver-lock FILE"):
        nvidia_driver.read_lock(None)


def compiled(folder: Path, kernel: str) -> dict[str, bytes]:
    """The modules of a file in the shape of NVIDIA's, as they would be in the root."""
    file = folder / "driver.run"
    folder.mkdir()
    nvidia_driver.unpack(file, driver_file(file), folder / "unpacked")
    nvidia_driver.compile_modules(
        folder / "unpacked", tree=TREE, kernel=kernel, epoch=1, stage=folder / "stage"
    )
    made = folder / "stage/usr/lib/modules" / kernel / "updates/nvidia"
    return {path.name: path.read_bytes() for path in made.iterdir()}


@needs_compiler
def test_modules_are_for_the_locked_kernel_and_the_same_wherever_they_are_built(
    tmp_path: Path,
) -> None:
    kernel = build.locked_kernel(build.plan("gpu", "metal").lock, "linux-image-")
    first, second = compiled(tmp_path / "one", kernel), compiled(tmp_path / "two", kernel)
    assert set(first) == {"nvidia.ko", "nvidia-uvm.ko"}
    assert first == second
    assert b"built by /build/" in first["nvidia.ko"]
    assert str(tmp_path).encode() not in first["nvidia.ko"]


@needs_compiler
def test_modules_for_a_kernel_without_headers_stop_the_build(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="bwrap ended with"):
        compiled(tmp_path / "one", "6.0.0-none")
