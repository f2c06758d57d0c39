"""Set up a clone for development: ``python3 image/development/setup.py [--only NAME]...``.

Makes, from the locks in image/locks, three environments and the embedded model:

    appliance   .venv         the appliance, editable, with what its tests need
    engine      .engine       SGLang: the CPU build, or the CUDA build where there is a GPU
    nvidia-sdk  .nvidia-sdk   NVIDIA's attestation SDK
    model       the cache     SmolLM2-135M-Instruct, for machines without a GPU

It can be run again at any time: what is there and right is left alone, what was interrupted
goes on. `provisioning` does the work and says how.

This file alone must run on any Python from 3.8, because its one task is to find the CPython
3.11 that every environment is made of, and to go on in that.

Exit status: 0 done, 1 failed with one line on stderr, 2 bad arguments, 130 interrupted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

WANTED = (3, 11)

# The environments are made with `venv` and filled with pip. Debian ships ensurepip, without
# which a new environment has no pip, in a package of its own.
PROBE = (
    "import sys, ensurepip, venv;"
    "sys.exit(sys.implementation.name != 'cpython' or sys.version_info[:2] != (3, 11))"
)

ADVICE = (
    "setup: needs CPython 3.11 with venv and found none: install python3.11 and python3.11-venv"
    " with your system's package manager, or uv, which can fetch one"
)


def main() -> int:
    """Go on in a CPython 3.11, this one or another. Returns the exit status."""
    python = find_python()
    if python is None:
        print(ADVICE, file=sys.stderr)
        return 1
    if not is_running(python):
        # -E, -s: no PYTHON* variable and nothing in the home directory may change what is installed.
        os.execv(python, [python, "-E", "-s", str(Path(__file__).resolve()), *sys.argv[1:]])
    # Only now: these modules are written for 3.11.
    from provisioning import main as provision  # noqa: PLC0415

    return provision(sys.argv[1:])


def find_python() -> str | None:
    """The path of a CPython 3.11: the one running, else python3.11 from PATH, else uv's."""
    running = sys.executable
    for candidate in (running, shutil.which("python3.11")):
        if candidate and is_usable(candidate):
            return candidate
    return find_with_uv()


def find_with_uv() -> str | None:
    """The 3.11 that uv manages, downloaded if need be. None without uv, or if it cannot get one."""
    uv = shutil.which("uv")
    if uv is None:
        return None
    # --system: not the .venv of this very clone, which is made from the answer.
    find = [uv, "python", "find", "--quiet", "--system", "--no-project", "3.11"]
    for command in (find, [uv, "python", "install", "3.11"], find):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
        )
        candidate = done.stdout.decode().strip()
        if candidate and is_usable(candidate):
            return candidate
    return None


def is_usable(python: str) -> bool:
    """It starts, is a CPython 3.11 and can make environments with pip in them."""
    if is_running(python) and sys.version_info[:2] != WANTED:
        return False
    try:
        done = subprocess.run(
            [python, "-E", "-s", "-c", PROBE], stderr=subprocess.DEVNULL, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


def is_running(python: str) -> bool:
    """`python` is the interpreter that runs this."""
    return python == sys.executable


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("setup: stopped. Run it again to go on.", file=sys.stderr)
        sys.exit(130)
