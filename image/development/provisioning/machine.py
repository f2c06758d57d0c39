"""What setup has to know about the machine."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from provisioning.errors import SetupError

GB = 10**9

# The unit of st_blocks, whatever the file system's own (stat(2)).
BLOCK = 512


def has_nvidia_gpu() -> bool:
    """The NVIDIA driver is loaded. Whether the GPU works is for the engine to find out."""
    return Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists()


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write to the file system of `path`, which need not exist."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(path: Path, needed: int, *, free: Callable[[Path], int] = free_bytes) -> None:
    """Raise SetupError unless `needed` bytes can be written below `path`, less what is there.

    An installation that was interrupted needs only the rest.
    """
    missing = needed - tree_bytes(path)
    if missing > (available := free(path)):
        raise SetupError(
            f"{path}: needs {missing / GB:.1f} GB more, {available / GB:.1f} GB are free:"
            " make room on that disk and run it again"
        )


def tree_bytes(root: Path) -> int:
    """Bytes that the files below `root` take on disk; 0 if there is no `root`."""
    total = 0
    for folder, _, files in os.walk(root):
        total += sum(Path(folder, name).lstat().st_blocks for name in files) * BLOCK
    return total


@contextmanager
def exclusively(lock: Path, what: str) -> Iterator[None]:
    """Hold `lock`, a file made here, or raise SetupError if another setup holds it.

    The kernel lets go of it when the process ends or execs: a crash leaves nothing to clean up.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupError(f"another setup {what}: wait for it to end and run it again") from None
        yield
