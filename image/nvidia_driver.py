"""NVIDIA's driver, from the operator's file into the root: libraries, programs, firmware, modules.

The file is what NVIDIA publishes as `NVIDIA-Linux-x86_64-VERSION.run`: a shell script that ends at
the line before `skip=N`, then a compressed tar (their fork of makeself). It is never run. What this
image needs is taken out of the tar by name, and the open kernel modules are compiled here, against
the headers of the image's own kernel: nothing is compiled or fetched at boot.

Not in Debian: its newest driver is of a branch that the engine's CUDA does not take.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Final

from image.common import BuildError, copy, run, sha256

BRANCHES: Final = range(580, 596)
"""From the first one for CUDA 13, which the engine's lock has, to the last one whose evidence was
verified (docs/limitations.md): from CUDA 13.5 on it is in a format that is refused (`NVDAOD`)."""

PROGRAMS: Final = ("nvidia-modprobe", "nvidia-persistenced", "nvidia-smi")

LIBRARIES: Final = {
    "libcuda.so": ("libcuda.so.1", "libcuda.so"),
    "libnvidia-cfg.so": ("libnvidia-cfg.so.1",),
    "libnvidia-ml.so": ("libnvidia-ml.so.1",),
    "libnvidia-nvvm.so": ("libnvidia-nvvm.so.4",),
    # With confidential computing on, CUDA encrypts what goes over the bus, by OpenSSL.
    "libnvidia-pkcs11-openssl3.so": (),
    "libnvidia-ptxjitcompiler.so": ("libnvidia-ptxjitcompiler.so.1",),
}
"""Each is `NAME.VERSION` in the tar; the names are those by which others ask for it."""

LATER_LIBRARIES: Final = {
    "libnvidia-gpucomp.so": (),
    "libnvidia-nvvm70.so": ("libnvidia-nvvm70.so.4",),
    "libnvidia-tileiras.so": (),
}
"""Not every branch has these."""

FIRMWARE: Final = ("firmware/gsp_ga10x.bin", "firmware/gsp_tu10x.bin")
"""Of the GPU's own processor, without which the open modules do nothing."""

SOURCES: Final = "kernel-open/"
MANIFEST: Final = ".manifest"
"""NVIDIA's installer goes by it; its second line is the version (nvidia-installer, parse_manifest)."""

MODULES: Final = ("nvidia", "nvidia-uvm")
"""Not built: modeset and drm, which are for screens, and peermem, which is for InfiniBand."""

MAX_HEAD_BYTES: Final = 1 << 20
"""The script, about a thousand lines."""

MAX_UNPACKED_BYTES: Final = 4 << 30

DECOMPRESSORS: Final = {
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x1f\x8b": "gzip",
}
"""By the first bytes of what they made."""


@dataclass(frozen=True, slots=True)
class DriverLock:
    """Which driver the image is to have, as the operator says.

    Attributes:
        version: as NVIDIA writes it, e.g. `580.0.0`.
        sha256: of the whole file, in hexadecimal.
    """

    version: str
    sha256: str


def read_lock(path: Path | None) -> DriverLock:
    """The operator's `--nvidia-driver-lock`.

    Raises:
        BuildError: there is none, it is another kind of file, or of a branch that is not taken.
    """
    if path is None or not path.is_file():
        raise BuildError("the gpu profile needs --nvidia-driver-lock FILE (image/README.md)")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BuildError(f"--nvidia-driver-lock: not TOML: {error}") from error
    version, digest = str(found.get("version", "")), str(found.get("sha256", ""))
    if set(found) != {"version", "sha256"}:
        raise BuildError("--nvidia-driver-lock: expected `version` and `sha256`, and nothing else")
    if not re.fullmatch(r"[0-9]{3}(\.[0-9]{1,3}){1,2}", version):
        raise BuildError(f"--nvidia-driver-lock: {version!r} is no version of a driver")
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise BuildError("--nvidia-driver-lock: sha256 is not 64 hexadecimal digits")
    if int(version[:3]) not in BRANCHES:
        raise BuildError(
            f"--nvidia-driver-lock: expected a driver of branch {BRANCHES.start} to"
            f" {BRANCHES.stop - 1}, got {version} (docs/limitations.md)"
        )
    return DriverLock(version, digest)


# 1. Out of the file.


def unpack(file: Path | None, lock: DriverLock, into: Path) -> None:
    """What the image needs of the driver, below `into`, by the names that it has in the tar.

    Raises:
        BuildError: it is not the locked file, cut short, of another version, lacks something, or
            names a place outside of where it is unpacked.
    """
    if file is None or not file.is_file():
        raise BuildError("the gpu profile needs --nvidia-driver FILE (image/README.md)")
    if (got := sha256(file)) != lock.sha256:
        raise BuildError(f"--nvidia-driver: expected SHA-256 {lock.sha256}, got {got}")
    into.mkdir(parents=True)
    required = {MANIFEST, *PROGRAMS, *FIRMWARE, *(f"{one}.{lock.version}" for one in LIBRARIES)}
    wanted = required | {f"{one}.{lock.version}" for one in LATER_LIBRARIES}
    with _payload(file) as payload:
        try:
            _extract(payload, wanted, into)
        except (tarfile.TarError, EOFError) as error:
            raise BuildError(f"--nvidia-driver: the archive is damaged: {error}") from error
    manifest = into / MANIFEST
    lines = manifest.read_text("utf-8", "replace").splitlines() if manifest.exists() else []
    if lines[1:2] != [lock.version]:
        raise BuildError(
            f"--nvidia-driver: expected driver {lock.version}, got {(lines[1:2] or ['none'])[0]}"
        )
    required |= {f"{SOURCES}Makefile"}
    if missing := sorted(name for name in required if not (into / name).is_file()):
        raise BuildError(f"--nvidia-driver: {', '.join(missing)} is not in it")


@contextmanager
def _payload(file: Path) -> Iterator[IO[bytes]]:
    """The tar inside of it, decompressed as it is read."""
    with file.open("rb") as opened:
        head = opened.read(MAX_HEAD_BYTES)
        start = _payload_offset(head)
        program = next(
            (name for magic, name in DECOMPRESSORS.items() if head.startswith(magic, start)), None
        )
        if program is None:
            raise BuildError("--nvidia-driver: compressed by nothing that is known here")
        os.lseek(opened.fileno(), start, os.SEEK_SET)
        with subprocess.Popen(
            [program, "-dc"], stdin=opened, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            try:
                yield process.stdout
                while process.stdout.read(1 << 20):
                    pass  # what pads the tar
            finally:
                process.stdout.close()
        if process.returncode:
            raise BuildError(
                f"--nvidia-driver: {program} ended with {process.returncode}: cut short?"
            )


def _payload_offset(head: bytes) -> int:
    """`skip=N` in the script: line N, counted from one, is where the payload begins."""
    found = re.search(rb'^skip="?([0-9]{1,5})"?$', head, re.MULTILINE)
    if not head.startswith(b"#!") or found is None:
        raise BuildError("--nvidia-driver: not NVIDIA's self-extracting file")
    offset = 0
    for _ in range(int(found[1]) - 1):
        offset = head.find(b"\n", offset) + 1
        if not offset:
            raise BuildError("--nvidia-driver: the archive is cut short")
    return offset


def _extract(payload: IO[bytes], wanted: set[str], into: Path) -> None:
    """Files by name, and everything below kernel-open/; no links, and nothing outside of `into`."""
    total = 0
    with tarfile.open(fileobj=payload, mode="r|") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise BuildError(f"--nvidia-driver: {member.name} would be outside of the archive")
            name = str(path)
            if member.isdir() or (name not in wanted and not name.startswith(SOURCES)):
                continue
            contents = archive.extractfile(member) if member.isreg() else None
            if contents is None:
                raise BuildError(f"--nvidia-driver: {name} is not a plain file")
            total += member.size
            if total > MAX_UNPACKED_BYTES:
                raise BuildError("--nvidia-driver: more than 4 GiB are in it")
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                shutil.copyfileobj(contents, file)
            target.chmod(0o755 if member.mode & 0o100 else 0o644)


# 2. Into the root.


def install(unpacked: Path, version: str, stage: Path) -> None:
    """Libraries with the names that others ask for, programs without setuid, and firmware."""
    libraries = stage / "usr/lib/x86_64-linux-gnu"
    for name, links in (LIBRARIES | LATER_LIBRARIES).items():
        file = f"{name}.{version}"
        if (unpacked / file).exists():
            copy(unpacked / file, libraries / file)
            for link in links:
                (libraries / link).symlink_to(file)
    for program in PROGRAMS:
        copy(unpacked / program, stage / "usr/bin" / program)
    for blob in FIRMWARE:
        # Where the module asks for it.
        copy(unpacked / blob, stage / "usr/lib/firmware/nvidia" / version / Path(blob).name)


# 3. The modules.


def compile_modules(unpacked: Path, *, tree: Path, kernel: str, epoch: int, stage: Path) -> None:
    """The open kernel modules, into `updates/` of the image's kernel.

    Everything in sight is the same on every machine: a tree of locked packages at `/`, the sources at
    `/build`, names and times that are given, no network.

    Args:
        unpacked: what `unpack` made.
        tree: compiler and kernel headers, read only.
        kernel: its release, as in /usr/lib/modules.
        epoch: seconds since 1970, for what would else say when it was built.

    Raises:
        BuildError: they do not compile, or came out for another kernel.
    """
    source = unpacked / SOURCES
    environment = {
        "PATH": "/usr/bin:/usr/sbin",
        "LC_ALL": "C",
        "SOURCE_DATE_EPOCH": str(epoch),
        "KBUILD_BUILD_TIMESTAMP": f"@{epoch}",
        "KBUILD_BUILD_USER": "dcv",
        "KBUILD_BUILD_HOST": "dcv",
        "NV_BUILD_USER": "dcv",
        "NV_BUILD_HOST": "dcv",
    }
    inside: tuple[str | Path, ...] = (
        *("bwrap", "--unshare-all", "--die-with-parent", "--hostname", "dcv", "--clearenv"),
        *("--ro-bind", tree, "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
        *("--bind", source, "/build", "--chdir", "/build"),
        *(word for name, value in environment.items() for word in ("--setenv", name, value)),
    )
    run(
        *(*inside, "make", f"-j{os.cpu_count() or 1}", "--silent", "modules"),
        *(f"KERNEL_UNAME={kernel}", f"NV_KERNEL_MODULES={' '.join(MODULES)}"),
    )
    files = [f"{name}.ko" for name in MODULES]
    if missing := [name for name in files if not (source / name).is_file()]:
        raise BuildError(f"{missing[0]} did not come out of the driver's kernel-open")
    run(*inside, "strip", "--strip-debug", *files)
    folder = stage / "usr/lib/modules" / kernel / "updates/nvidia"
    for name in files:
        # Before it is shipped: the kernel would say it at boot.
        if f"vermagic={kernel} ".encode() not in (source / name).read_bytes():
            raise BuildError(f"{name} is not for kernel {kernel}")
        copy(source / name, folder / name)
