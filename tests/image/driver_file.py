"""A file in the shape of NVIDIA's: a shell script, then a compressed tar with the names of theirs."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

from image.nvidia_driver import DriverLock

VERSION = "580.0.1"
"""No driver has this one."""

HEAD = """\
#!/bin/sh
# This script was generated using Makeself
label="NVIDIA Accelerated Graphics Driver for Linux-x86_64 {version}"
targetdir=NVIDIA-Linux-x86_64-{version}
skip={skip}
tail -n +$skip "$0" | decompress | tar xf -
exit 0
"""

MANIFEST = """\
NVIDIA Accelerated Graphics Driver for Linux-x86_64
{version}
nvidia
nvidia nvidia-uvm nvidia-modeset nvidia-drm nvidia-peermem
"""

LIBRARIES = (
    *("libcuda.so", "libnvidia-cfg.so", "libnvidia-ml.so", "libnvidia-nvvm.so"),
    *("libnvidia-pkcs11-openssl3.so", "libnvidia-ptxjitcompiler.so", "libnvidia-gpucomp.so"),
)

MAKEFILE = """\
obj-m := $(addsuffix .o,$(NV_KERNEL_MODULES))
modules:
\t$(MAKE) -C /lib/modules/$(KERNEL_UNAME)/build M=$(CURDIR) modules
"""

MODULE = """\
#include <linux/module.h>
MODULE_DESCRIPTION("built by " __FILE__);
MODULE_LICENSE("Dual MIT/GPL");
"""


def contents(version: str = VERSION) -> dict[str, bytes]:
    """Name to bytes; among them what no image needs."""
    files = {
        ".manifest": MANIFEST.format(version=version).encode(),
        "kernel-open/Makefile": MAKEFILE.encode(),
        "kernel-open/nvidia.c": MODULE.encode(),
        "kernel-open/nvidia-uvm.c": MODULE.encode(),
        "kernel/Makefile": b"the proprietary modules",
        "nvidia-installer": b"#!/bin/sh\nexit 1\n",
        f"32/libcuda.so.{version}": b"for 32 bits",
        f"libGLX_nvidia.so.{version}": b"for a screen",
    }
    for name in (*LIBRARIES, "nvidia-smi", "nvidia-persistenced", "nvidia-modprobe"):
        files[f"{name}.{version}" if name.endswith(".so") else name] = f"ELF {name}".encode()
    for name in ("gsp_ga10x.bin", "gsp_tu10x.bin"):
        files[f"firmware/{name}"] = name.encode() * 1000
    return files


def member(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    """As their tar has it."""
    info = tarfile.TarInfo(f"./{name}")
    info.size = len(data)
    info.mode = 0o4755 if name.startswith("nvidia-") or ".so" in name else 0o444
    return info, data


def driver_file(
    path: Path,
    members: list[tuple[tarfile.TarInfo, bytes]] | None = None,
    *,
    program: str = "xz",
) -> DriverLock:
    """Write it, and say what it is.

    Args:
        members: of the tar; what a driver has, if not given.
        program: what compresses it.
    """
    if members is None:
        members = [member(name, data) for name, data in contents().items()]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    packed = subprocess.run(
        [program, "-c"], input=buffer.getvalue(), stdout=subprocess.PIPE, check=True
    ).stdout
    head = HEAD.format(version=VERSION, skip=HEAD.count("\n") + 1)
    path.write_bytes(head.encode() + packed)
    return lock_of(path)


def lock_of(path: Path) -> DriverLock:
    """For the file as it is now."""
    return DriverLock(VERSION, hashlib.sha256(path.read_bytes()).hexdigest())
