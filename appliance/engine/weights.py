"""The model's files are the ones the configuration names, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from appliance.config import Model
from appliance.errors import ModelError

_BLOCK_BYTES = 4 << 20


def verify_model_files(model: Model, *, progress: Callable[[str], None]) -> None:
    """Hash every file of the model folder and compare with the configuration.

    Blocking, at the speed of the disk: call it in a thread.

    Args:
        progress: told a line now and then.

    Raises:
        ModelError: a file is missing, differs, cannot be read, or is there without being named
            (the engine would read it).
    """
    root = Path(model.path)
    # A link to a folder counts as a file nobody named: `rglob` does not look behind it.
    present = {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    if missing := sorted(model.files.keys() - present):
        raise ModelError(f"expected {missing[0]} in the model folder, it is missing")
    if unnamed := sorted(present - model.files.keys()):
        raise ModelError(f"expected only files named in [model] files, found {unnamed[0]}")
    for number, (name, expected) in enumerate(sorted(model.files.items()), start=1):
        progress(f"checking model file {number} of {len(model.files)}")
        try:
            found = sha256_file(root / name)
        except OSError as error:
            raise ModelError(f"cannot read model file {name}: {error.strerror}") from error
        if found != expected:
            raise ModelError(f"expected {name} to have sha256 {expected}, it has {found}")


def sha256_file(path: Path) -> str:
    """Lowercase hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
