"""Where `just setup` puts things, for the scripts beside this file.

    from paths import ENGINE_CPU_PATH, ENGINE_PYTHON, model_digests, model_directory

Nothing here installs, creates or checks anything.
"""

from __future__ import annotations

import hashlib
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = [
    "ENGINE_CPU_PATH",
    "ENGINE_PYTHON",
    "LAYOUT",
    "Layout",
    "ModelLock",
    "model_digests",
    "model_directory",
]


@dataclass(frozen=True, slots=True)
class ModelLock:
    """What image/locks/model-*.toml says: which wheel, and what it has to become."""

    name: str
    requirement: str  # "project==version"
    wheel_sha256: str
    files: dict[str, str]  # file name -> sha256 in hexadecimal, of every file there must be

    @classmethod
    def read(cls, path: Path) -> ModelLock:
        """Decode the lock at `path`."""
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
        return cls(fields["name"], fields["requirement"], fields["wheel_sha256"], fields["files"])

    @property
    def digest(self) -> str:
        """sha256 over all names and digests: it tells two conversions of one wheel apart."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Layout:
    """One clone of the repository and the cache that all clones of one user share."""

    root: Path
    cache: Path  # ${XDG_CACHE_HOME:-~/.cache}/dcv

    @classmethod
    def of(cls, root: Path) -> Layout:
        """The clone at `root`, with this user's cache."""
        # A relative XDG_CACHE_HOME is to be ignored (XDG base directory specification, 0.8).
        configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return cls(
            root, (configured if configured.is_absolute() else Path.home() / ".cache") / "dcv"
        )

    @property
    def locks(self) -> Path:
        """What the environments and the model are made from."""
        return self.root / "image" / "locks"

    @property
    def run(self) -> Path:
        """Logs and state of development runs; setup's are `setup-<environment>.log`."""
        return self.root / ".run"

    @property
    def engine_cpu(self) -> Path:
        """Ours for the engine's interpreter: convert.py, and path/ for its PYTHONPATH."""
        return self.root / "appliance" / "engine" / "cpu"

    @property
    def model_lock(self) -> ModelLock:
        """What the embedded model has to be."""
        return ModelLock.read(self.locks / "model-smollm2.toml")

    @property
    def model(self) -> Path:
        """The embedded model, shared by all clones whose lock asks for the same bytes."""
        lock = self.model_lock
        return self.cache / "models" / f"{lock.name}-{lock.digest[:16]}"


LAYOUT: Final = Layout.of(Path(__file__).resolve().parent.parent.parent)

ENGINE_PYTHON: Final = LAYOUT.root / ".engine" / "bin" / "python"
ENGINE_CPU_PATH: Final = LAYOUT.engine_cpu / "path"  # on the engine's PYTHONPATH, without a GPU


def model_directory() -> Path:
    """The embedded model's directory. It exists once `just setup` has run without a GPU."""
    return LAYOUT.model


def model_digests() -> dict[str, str]:
    """File name -> sha256 (hexadecimal) of every file that the model's directory has to hold."""
    return dict(LAYOUT.model_lock.files)
