"""Build an image twice, in two folders, and compare: `python image/reproduce.py [PROFILE]`.

Both builds are whole ones, from the same commit, lock and tools tree; nothing but the cache is shared.
Exit status 0 when every file is the same, 1 when one differs or a build failed.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

BUILD: Final = Path(__file__).with_name("build.py")

COMPARED: Final = {
    "UKI": "dcv-{profile}.efi",
    "root": "dcv-{profile}.root-x86-64.raw",
    "verity": "dcv-{profile}.root-x86-64-verity.raw",
    "ESP": "dcv-{profile}.esp.raw",
    "disk": "dcv-{profile}.raw",
    "reference values": "reference-values.json",
}


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="image/reproduce.py", description=__doc__)
    parser.add_argument("profile", nargs="?", default="test")
    profile = parser.parse_args().profile
    differ = 0
    with tempfile.TemporaryDirectory(prefix="dcv-reproduce-") as name:
        outs = [Path(name) / one / "out" for one in ("first", "second")]
        for out in outs:
            command = [sys.executable, BUILD, profile, "--out", out, "--work", out.parent / "work"]
            if subprocess.run(command, check=False).returncode:
                return 1
        for what, file in COMPARED.items():
            first, second = (sha256(out / file.format(profile=profile)) for out in outs)
            print(f"{what:17} {first} {'same' if first == second else f'differs: {second}'}")
            differ += first != second
    return 1 if differ else 0


def sha256(path: Path) -> str:
    """In hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
