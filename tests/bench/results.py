"""What the benchmarks do with their measurements: percentiles, bounds and tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from rich.console import Console
from rich.table import Table

console: Final = Console(highlight=False, soft_wrap=True)


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent of the values do not exceed, interpolated between neighbours.

    Args:
        values: at least one, in any order.
        percent: 1 to 99.
    """
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of what was measured in the same rounds.

    Rounds are interleaved, so a busy moment of the machine meets both sides of one ratio.
    """
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


class Weight(Enum):
    """What it means to be over a bound."""

    ASKED = "asked"  # the run fails
    GOAL = "goal"  # the table says so


@dataclass(frozen=True, slots=True)
class Bound:
    """What a number may be at most."""

    most: float
    weight: Weight = Weight.ASKED


@dataclass(frozen=True, slots=True)
class Number:
    """One measured number.

    Attributes:
        unit: printed behind it, and behind its bound.
        bound: None where nothing was asked.
    """

    name: str
    value: float
    unit: str
    bound: Bound | None = None
    digits: int = 1

    @property
    def over(self) -> bool:
        """Whether it is more than it may be."""
        return self.bound is not None and self.value > self.bound.most

    @property
    def missed(self) -> bool:
        """Whether the run fails for it."""
        return self.over and self.bound is not None and self.bound.weight is Weight.ASKED

    @property
    def remark(self) -> str:
        """What the table says of it."""
        if not self.over or self.bound is None:
            return ""
        return "MISSED" if self.missed else "not reached"

    def cells(self) -> tuple[str, str, str, str]:
        """As a row: name, value, bound, remark."""
        bound = "" if self.bound is None else f"{self.bound.most:g} {self.unit}"
        return self.name, f"{self.value:.{self.digits}f} {self.unit}", bound, self.remark


def print_numbers(title: str, numbers: Sequence[Number]) -> None:
    """A table of numbers and what they may be."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("measured")
    for heading in ("", "at most"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for number in numbers:
        table.add_row(*number.cells(), style="red" if number.missed else None)
    console.print(table)


def missed(numbers: Sequence[Number]) -> int:
    """How many the run fails for."""
    return sum(number.missed for number in numbers)
