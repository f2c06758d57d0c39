"""What the person watching sees: a bar per step on a terminal, a line per step anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import rich.progress


# Beside the bar and the time, on a terminal of 80 columns.
NOTE_WIDTH = 28


class Step(Protocol):
    """Something under way."""

    def update(self, done: float, note: str) -> None:
        """Show how far it is (0 to 1) and, in a few words, what it is doing."""


class Reporter(Protocol):
    """Where setup says what it does."""

    def say(self, part: str, text: str) -> None:
        """One line about a part that needs no step."""

    def step(self, part: str, text: str) -> AbstractContextManager[Step]:
        """Something that takes a while. Leaving it by an exception does not call it done."""


def choose_reporter() -> Reporter:
    """Bars, if someone is looking and rich is there to draw them; else lines."""
    if sys.stdout.isatty():
        try:
            return _RichReporter()
        except ImportError:
            # The first step runs before anything is installed.
            pass
    return PlainReporter()


def _line(part: str, text: str) -> str:
    return f"{part:<11} {text}"


class PlainReporter:
    """A line when a step begins and one when it is done, with the seconds it took."""

    def say(self, part: str, text: str) -> None:
        """Print it."""
        print(_line(part, text), flush=True)

    @contextmanager
    def step(self, part: str, text: str) -> Iterator[Step]:
        """Print `text` now, and the time it took if it succeeds."""
        started = time.monotonic()
        self.say(part, f"{text} ...")
        yield _Silent()
        self.say(part, f"done in {time.monotonic() - started:.1f} s")


class _Silent:
    def update(self, done: float, note: str) -> None:
        """A log wants no moving parts."""


class _RichReporter:
    def __init__(self) -> None:
        # Imported here: it is only in .venv, and takes longer than a run with nothing to do.
        import rich.progress  # noqa: PLC0415

        self._rich = rich.progress

    def say(self, part: str, text: str) -> None:
        print(_line(part, text), flush=True)

    @contextmanager
    def step(self, part: str, text: str) -> Iterator[Step]:
        started = time.monotonic()
        self.say(part, f"{text} ...")
        columns = (
            self._rich.TextColumn(_line("", ""), markup=False),
            self._rich.BarColumn(bar_width=24),
            self._rich.TimeElapsedColumn(),
            self._rich.TextColumn("{task.fields[note]}", markup=False),
        )
        # Transient: the bar goes, and what remains is the same as in a log.
        with self._rich.Progress(*columns, transient=True) as progress:
            yield _Bar(progress, progress.add_task(text, total=1.0, note=""))
        self.say(part, f"done in {time.monotonic() - started:.1f} s")


class _Bar:
    def __init__(self, progress: rich.progress.Progress, task: rich.progress.TaskID) -> None:
        self._progress = progress
        self._task = task

    def update(self, done: float, note: str) -> None:
        self._progress.update(self._task, completed=done, note=note[:NOTE_WIDTH])
