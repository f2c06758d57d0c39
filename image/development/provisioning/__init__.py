"""What `just setup` does, once setup.py has found a CPython 3.11 to run it with.

    environments  the three virtual environments: what is in each, and how it gets there
    model         the embedded model: downloaded, converted, checked
    pip           runs pip and says in one line what its failures mean
    progress      what the person watching sees

It goes in two steps. The first makes .venv with nothing but the standard library; the second
runs in .venv, where rich can draw progress.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from paths import LAYOUT, Layout

from provisioning.environments import APPLIANCE, BENCH, NVIDIA_SDK, engine, ensure_environment
from provisioning.errors import SetupError
from provisioning.machine import exclusively, has_nvidia_gpu
from provisioning.model import ensure_model
from provisioning.progress import Reporter, choose_reporter

SETUP = Path(__file__).resolve().parent.parent / "setup.py"

Part = Callable[[Layout, Reporter], None]


def main(arguments: list[str]) -> int:
    """Set up what `arguments` ask for. Returns the exit status that setup.py documents."""
    parts = _wanted(_parse(arguments).only)
    try:
        # Two pips in one environment would spoil it.
        with exclusively(LAYOUT.run / "setup.lock", "of this clone is running"):
            # First, and here: the rest is nicer to watch with what this installs.
            if "appliance" in parts:
                PARTS["appliance"](LAYOUT, choose_reporter())
                parts.remove("appliance")
            if _runs_in_venv() or not _venv_python().exists():
                _set_up(parts, choose_reporter())
                parts.clear()
        if parts:
            _go_on_in_venv(parts)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="setup.py", description="Set up a clone for development.")
    parser.add_argument(
        "--only",
        action="append",
        choices=tuple(PARTS),
        help="set up this alone (may be given more than once); default: all that the machine needs",
    )
    return parser.parse_args(arguments)


def _wanted(only: list[str] | None) -> list[str]:
    """The parts to set up, in the order in which they need each other."""
    if only:
        return [name for name in PARTS if name in only]
    # On a GPU the development config names a model of its own: the embedded one is a CPU's.
    left_out = ON_REQUEST | ({"model"} if has_nvidia_gpu() else set())
    return [name for name in PARTS if name not in left_out]


def _set_up_appliance(layout: Layout, reporter: Reporter) -> None:
    ensure_environment(APPLIANCE, layout, reporter)


def _set_up_engine(layout: Layout, reporter: Reporter) -> None:
    ensure_environment(engine(gpu=has_nvidia_gpu()), layout, reporter)


def _set_up_nvidia_sdk(layout: Layout, reporter: Reporter) -> None:
    ensure_environment(NVIDIA_SDK, layout, reporter)


def _set_up_bench(layout: Layout, reporter: Reporter) -> None:
    ensure_environment(BENCH, layout, reporter)


PARTS: dict[str, Part] = {
    "appliance": _set_up_appliance,
    "engine": _set_up_engine,
    "nvidia-sdk": _set_up_nvidia_sdk,
    "model": ensure_model,
    "bench": _set_up_bench,
}

ON_REQUEST = frozenset({"bench"})
"""What nobody needs who does not ask for it by name."""


def _set_up(parts: list[str], reporter: Reporter) -> None:
    for part in parts:
        PARTS[part](LAYOUT, reporter)


def _venv_python() -> Path:
    return LAYOUT.root / APPLIANCE.folder / "bin" / "python"


def _runs_in_venv() -> bool:
    return Path(sys.prefix) == LAYOUT.root / APPLIANCE.folder


def _go_on_in_venv(parts: list[str]) -> NoReturn:
    """Replace this process by the second step."""
    only = [argument for part in parts for argument in ("--only", part)]
    python = str(_venv_python())
    sys.stdout.flush()
    os.execv(python, [python, "-E", "-s", str(SETUP), *only])
