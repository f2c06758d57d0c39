"""The three virtual environments: what is in each, and how it gets there and stays right.

An environment is right if its stamp says so: the last thing written into it, with the digest of
every lock it was made from. Without a valid stamp it is repaired: what the lock does not name and
what an interruption left half-written goes, pip installs what is missing, and the result is
checked against the lock before the stamp is written.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from paths import Layout

from provisioning.errors import NoMatchingDistributionError, SetupError
from provisioning.machine import GB, free_bytes, require_space
from provisioning.pip import run_pip
from provisioning.progress import Reporter, Step

STAMP = "dcv-setup.json"

# To be raised when this module makes something else of the same locks.
STAMP_FORMAT = 1

# How much to let pip fetch before it unpacks, on the average.
BATCH_BYTES = 250 * 10**6

# What `venv` puts into every environment. Not in the locks, unless something asks for it.
BOOTSTRAP = frozenset({"pip", "setuptools"})


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to fill an environment: locks, installed in this order, and the room they take."""

    locks: tuple[str, ...]
    needs_bytes: int  # on disk, pip's temporary files included


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment of the clone.

    The first variant whose first lock the machine's package index can serve is the one that is
    installed.
    """

    name: str
    folder: str
    variants: tuple[Variant, ...]
    has_project: bool = False  # the clone itself is installed there too, editable


APPLIANCE = Environment(
    "appliance", ".venv", (Variant(("appliance", "dev"), needs_bytes=GB // 2),), has_project=True
)
NVIDIA_SDK = Environment(
    "nvidia-sdk", ".nvidia-sdk", (Variant(("nvidia-sdk",), needs_bytes=GB // 2),)
)

BENCH = Environment("bench", ".bench", (Variant(("bench",), needs_bytes=GB // 4),))

_ENGINE_CPU = Environment(
    "engine",
    ".engine",
    (
        Variant(("torch-cpu", "engine-cpu"), needs_bytes=4 * GB),
        # No CPU build in reach: the CUDA build works on a CPU too, it is only large.
        Variant(("torch-pypi", "engine-cpu"), needs_bytes=10 * GB),
    ),
)
_ENGINE_GPU = Environment("engine", ".engine", (Variant(("engine-gpu",), needs_bytes=16 * GB),))


def engine(*, gpu: bool) -> Environment:
    """SGLang's environment, for a machine with an NVIDIA GPU or without."""
    return _ENGINE_GPU if gpu else _ENGINE_CPU


def ensure_environment(environment: Environment, layout: Layout, reporter: Reporter) -> None:
    """Make the environment what its locks say, unless its stamp says that it is.

    Raises:
        SetupError: it could not be. What was downloaded or installed so far is kept for the
            next run.
    """
    folder = layout.root / environment.folder
    if _stamped(folder, [_stamp(environment, variant, layout) for variant in environment.variants]):
        reporter.say(environment.name, f"up to date ({environment.folder})")
        return
    (folder / STAMP).unlink(missing_ok=True)
    for variant, alternative in _with_next(environment.variants):
        try:
            _install(environment, variant, layout, reporter)
        except NoMatchingDistributionError:
            # Only the first lock is a question; what the variants share must be there.
            if alternative is None or _is_installed(folder, layout, variant.locks[0]):
                raise
            size = Lock.read(layout, alternative.locks[0]).download_bytes
            text = f"no {variant.locks[0]} on this machine's index: {alternative.locks[0]} downloads {_gb(size)}"
            reporter.say(environment.name, text)
        else:
            _write_stamp(folder, _stamp(environment, variant, layout))
            return


def _with_next(variants: tuple[Variant, ...]) -> Iterator[tuple[Variant, Variant | None]]:
    return zip(variants, (*variants[1:], None), strict=True)


# --- locks --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock of image/locks: the pins in it and what fetching all of them would download."""

    name: str
    versions: dict[str, str]  # normalised project name -> version
    entries: dict[str, str]  # normalised project name -> its lines, for a requirements file
    download_bytes: int

    @classmethod
    def read(cls, layout: Layout, name: str) -> Lock:
        """Decode a lock. Raises SetupError if it is not one that image/locks/compile made."""
        path = layout.locks / f"{name}.txt"
        text = path.read_text(encoding="utf-8")
        pins = list(_ENTRY.finditer(text))
        size = re.search(r"^# download: (\d+) bytes$", text, re.MULTILINE)
        if not pins or size is None:
            raise SetupError(f"{path}: not a lock: make it again with image/locks/compile {name}")
        versions = {normalise(pin["project"]): pin["version"] for pin in pins}
        entries = {normalise(pin["project"]): pin[0] for pin in pins}
        return cls(name, versions, entries, int(size[1]))


# A pin at the margin and its hashes, indented.
_ENTRY = re.compile(r"^(?P<project>[\w.-]+)==(?P<version>[^\s;\\]+).*\n(?: .*\n)*", re.MULTILINE)


def normalise(project: str) -> str:
    """A project name as an index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", project).lower()


# --- the stamp ----------------------------------------------------------------------------------


def _stamp(environment: Environment, variant: Variant, layout: Layout) -> dict[str, object]:
    """What the stamp of a right environment says: all that its content follows from."""
    stamp: dict[str, object] = {
        "format": STAMP_FORMAT,
        "python": platform.python_version(),
        "locks": {name: _sha256(layout.locks / f"{name}.txt") for name in variant.locks},
    }
    if environment.has_project:
        stamp["project"] = _project_digest(layout)
    return stamp


def _project_digest(layout: Layout) -> str:
    """Digest of what an editable installation copies out of pyproject.toml, and of nothing else."""
    pyproject = tomllib.loads((layout.root / "pyproject.toml").read_text(encoding="utf-8"))
    copied = [pyproject["build-system"], pyproject["project"], pyproject["tool"].get("hatch")]
    return hashlib.sha256(json.dumps(copied, sort_keys=True).encode()).hexdigest()


def _stamped(folder: Path, expected: Iterable[dict[str, object]]) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # The stamp travels with a copied clone, but an environment is tied to its path.
    return stamp in [{**wanted, "folder": str(folder)} for wanted in expected]


def _write_stamp(folder: Path, stamp: dict[str, object]) -> None:
    """By a rename, so that there is never half a stamp."""
    scratch = folder / f"{STAMP}.new"
    scratch.write_text(
        json.dumps({**stamp, "folder": str(folder)}, indent=2) + "\n", encoding="utf-8"
    )
    scratch.replace(folder / STAMP)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- installing ---------------------------------------------------------------------------------


def _install(
    environment: Environment, variant: Variant, layout: Layout, reporter: Reporter
) -> None:
    folder = layout.root / environment.folder
    locks = [Lock.read(layout, name) for name in variant.locks]
    require_space(folder, variant.needs_bytes, free=free_bytes)
    log = layout.run / f"setup-{environment.name}.log"
    log.unlink(missing_ok=True)
    # 1. An interpreter.
    _make_venv(folder)
    # 2. Away with what does not belong there, so that pip sees only what is whole and wanted.
    wanted = {project: version for lock in locks for project, version in lock.versions.items()}
    _remove_damaged(folder)
    _remove_unwanted(folder, wanted, log)
    # 3. What is missing.
    for lock in locks:
        if missing := lock.entries.keys() - _installed(folder).keys():
            text = f"installing {len(missing)} packages from {lock.name}.txt"
            with reporter.step(
                environment.name, f"{text} ({_gb(lock.download_bytes)} in all)"
            ) as step:
                _install_missing(folder, lock, sorted(missing), log, step)
    if environment.has_project:
        with reporter.step(environment.name, "installing this clone, editable"):
            _install_project(folder, layout, log)
    # 4. Is it what the locks say?
    _verify(folder, wanted)


def _make_venv(folder: Path) -> None:
    """A virtual environment of the Python that runs this, unless there is one that works."""
    if _works(folder / "bin" / "python"):
        return
    shutil.rmtree(folder, ignore_errors=True)
    # Not sys.executable: that may itself be in a virtual environment, even in this one.
    base = Path(sys.base_prefix, "bin", "python3.11")
    done = subprocess.run(
        [base, "-I", "-m", "venv", folder], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no reason given"]
        raise SetupError(f"{folder}: {base} cannot make it: {reason[0]}")


def _works(python: Path) -> bool:
    """This interpreter exists, is 3.11 and has pip."""
    probe = "import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))"
    return (
        python.exists() and subprocess.run([python, "-I", "-c", probe], check=False).returncode == 0
    )


def _install_missing(folder: Path, lock: Lock, missing: list[str], log: Path, step: Step) -> None:
    """Have pip install these projects of a lock, some at a time.

    pip fetches all that it is given before it unpacks any of it, and what it has fetched is lost
    with it, unless the index lets it be cached. So after an interruption of several gigabytes it
    is only the batches that are there again.

    --no-compile: to compile all of the engine's 22 000 modules takes pip 39 s of 77 s, on two
    cores; to compile the few that are imported makes the first start of the engine 7 s longer
    and the conversion of the model 3 s. The next start is the same either way.
    """
    progress = _Progress(folder, len(missing), step)
    batches = max(1, round(lock.download_bytes / BATCH_BYTES))
    for batch in filter(None, (missing[first::batches] for first in range(batches))):
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as requirements:
            requirements.writelines(lock.entries[project] for project in batch)
            requirements.flush()
            run_pip(
                folder / "bin" / "python",
                [
                    "install", "--progress-bar", "off", "--require-hashes", "--no-deps",
                    "--no-compile", "--requirement", requirements.name,
                ],
                log=log,
                on_line=progress.on_line,
                on_tick=progress.on_tick,
            )  # fmt: skip


class _Progress:
    """How far a pip is: half for having found and fetched everything, half for unpacking it.

    While it unpacks pip says nothing. But it writes each package's metadata last, so those that
    are there can be counted.
    """

    def __init__(self, folder: Path, count: int, step: Step) -> None:
        self._site = site_packages(folder)
        self._count = count
        self._step = step
        self._fetched = 0
        self._note = "asking the index"
        self._before = self._there()

    def on_line(self, line: str) -> None:
        match line.split():
            case ["Collecting", what, *_]:
                self._fetched += 1
                self._note = what
            case ["Processing", path, *_]:
                self._fetched += 1
                self._note = path.rpartition("/")[2]
            case ["Installing", "collected", *_]:
                self._note = "unpacking"
        self.on_tick()

    def on_tick(self) -> None:
        done = self._fetched + self._there() - self._before
        self._step.update(max(0.0, min(1.0, done / (2 * self._count))), self._note)

    def _there(self) -> int:
        return sum(1 for _ in self._site.glob("*.dist-info"))


def _install_project(folder: Path, layout: Layout, log: Path) -> None:
    run_pip(
        folder / "bin" / "python",
        [
            "install", "--no-deps", "--no-build-isolation", "--no-index",
            "--editable", str(layout.root),
        ],
        log=log,
    )  # fmt: skip


# --- what is installed --------------------------------------------------------------------------


def site_packages(folder: Path) -> Path:
    """Where the environment in `folder` has its packages."""
    return folder / "lib" / "python3.11" / "site-packages"


def _installed(folder: Path) -> dict[str, str]:
    """Normalised project name -> version, as the environment's own metadata says."""
    found = importlib.metadata.distributions(path=[str(site_packages(folder))])
    return {normalise(each.name): each.version for each in found}


def _is_installed(folder: Path, layout: Layout, lock: str) -> bool:
    return Lock.read(layout, lock).versions.items() <= _installed(folder).items()


def _remove_unwanted(folder: Path, wanted: dict[str, str], log: Path) -> None:
    """Uninstall what the locks do not name, or name in another version.

    The version is compared here as a string, because for pip torch 2.13.0+cpu is a torch 2.13.0.
    The clone itself, which no lock names, goes too: it is installed again at the end.
    """
    surplus = [
        name
        for name, version in _installed(folder).items()
        if wanted.get(name) != version and (name in wanted or name not in BOOTSTRAP)
    ]
    if surplus:
        run_pip(folder / "bin" / "python", ["uninstall", "--yes", *surplus], log=log)


def _remove_damaged(folder: Path) -> None:
    """Make pip forget what was unpacked only in part: it goes by the metadata alone."""
    for metadata in site_packages(folder).glob("*.dist-info"):
        if not _is_whole(metadata):
            shutil.rmtree(metadata)


def _is_whole(metadata: Path) -> bool:
    """Every file that RECORD lists is there in the size it says.

    Not its digest: an interruption leaves files out or short, and reading several gigabytes takes
    longer than pip does to see that there is nothing to do.
    """
    try:
        with (metadata / "RECORD").open(encoding="utf-8", newline="") as file:
            rows = [(row[0], row[2]) for row in csv.reader(file) if row[2:] and row[2]]
        return all((metadata.parent / name).stat().st_size == int(size) for name, size in rows)
    except (OSError, ValueError):
        return False


def _verify(folder: Path, wanted: dict[str, str]) -> None:
    """Raise SetupError unless every pin of the locks is there, whole and in that version."""
    _remove_damaged(folder)
    found = _installed(folder)
    for project, version in wanted.items():
        if found.get(project) != version:
            came = found.get(project, "missing")
            raise SetupError(
                f"{folder}: {project} is {came}, the lock says {version}: remove {folder} and run it again"
            )


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 10**6:.0f} MB"
