"""What every step of a build uses: its errors, other programs, files."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path


class BuildError(Exception):
    """What is missing or wrong, in one line for whoever builds."""


class PackagesGoneError(BuildError):
    """Locked packages that neither the cache nor a mirror has."""


def run(
    *command: str | Path,
    stdin: str | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> None:
    """To its end. Raises BuildError when that is not 0."""
    done = subprocess.run(
        [str(one) for one in command],
        input=stdin,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if done.returncode:
        raise BuildError(f"{Path(command[0]).name} ended with {done.returncode}")


def said(*command: str | Path) -> str:
    """What it wrote, stripped. Raises BuildError when it failed or is not there."""
    try:
        done = subprocess.run(
            [str(one) for one in command], stdout=subprocess.PIPE, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{Path(command[0]).name}: {error}") from error
    return done.stdout.strip()


def sha256(path: Path) -> str:
    """In hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: str | Path) -> str:
    """As text."""
    return Path(path).read_text(encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    """A file or a whole folder, with the folders above. Raises BuildError when it is missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        shutil.copy(source, target)
    else:
        raise BuildError(f"{source.name} is missing")


def remove(path: Path) -> None:
    """A file, a link or a whole folder, or nothing."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
