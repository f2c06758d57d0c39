"""`just bench` and `just bench-quick`: every number that was asked for, and the gateway beside others.

    python tests/bench/run.py [--quick]

It starts the appliance and everything else it needs itself, on loopback and in a temporary folder,
and ends what it started. `--quick` leaves the other gateways out and takes less than a minute.

Exit status: 0 done, 1 a number that was asked for was missed, 2 something could not be measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench import epochs, footprint, receipts, side_by_side, verification
from tests.bench.load import Address
from tests.bench.processes import (
    NotMeasuredError,
    Target,
    running_engine,
    running_gateway,
    running_peers,
)
from tests.bench.results import Number, console, missed, print_numbers


async def main(folder: Path, *, quick: bool) -> int:
    """The gateway's numbers, one table after the other; how many were missed."""
    numbers = list[Number]()
    # 1. Epochs, at the pace of a device that takes its time.
    with running_gateway(folder / "epochs", epochs.SECTIONS) as gateway:
        found = await epochs.measure(gateway, steady_s=4 if quick else 10)
    with running_gateway(folder / "floor", epochs.FLOOR_SECTIONS) as gateway:
        found += await epochs.measure_floor(gateway)
    with running_engine(folder) as engine:
        found += await epochs.measure_engine(Address(engine, None))
    numbers += _show("Epochs, a report takes 150 ms", found)
    # 2. Receipts.
    found = await receipts.finishing(folder / "finishing")
    found += await receipts.storing(folder / "storing", seconds=1.5 if quick else 6)
    with running_gateway(folder / "receipts", {}) as gateway:
        found += await receipts.verifying(gateway)
        if not quick:
            found += await receipts.beside_requests(gateway, seconds=5)
    numbers += _show("Receipts", found)
    # 3. A fresh process, whose memory nothing else has grown.
    with running_gateway(folder / "footprint", {}) as gateway:
        numbers += _show("Footprint", await footprint.measure(gateway))
    # 4. Beside others.
    if not quick:
        numbers += _show("Ratios", await beside_others(folder / "peers"))
    return missed(numbers)


async def beside_others(folder: Path) -> list[Number]:
    """The gateway, every peer there is, and the engine asked directly."""
    folder.mkdir()
    with (
        running_engine(folder) as engine,
        running_peers(folder, engine) as (peers, absent),
        running_gateway(folder / "dcv", {}) as gateway,
    ):
        for line in absent:
            console.print(f"left out: {line}", style="yellow")
        direct = Target("the engine itself", Address(engine, None), ())
        return await side_by_side.measure([gateway.target, *peers], direct)


def _show(title: str, numbers: list[Number]) -> list[Number]:
    print_numbers(title, numbers)
    return numbers


def run() -> int:
    """From the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="just bench", description="Measure, beside what was asked."
    )
    parser.add_argument("--quick", action="store_true", help="no other gateways; under a minute")
    quick: bool = parser.parse_args().quick
    warnings.simplefilter("error")
    try:
        with tempfile.TemporaryDirectory(prefix="dcv-bench-") as scratch:
            over = missed(verification.measure_all(seconds=0.3 if quick else 1.0))
            over += trio.run(partial(main, Path(scratch), quick=quick))
            return 1 if over else 0
    except NotMeasuredError as error:
        console.print(f"not measured: {error}", style="red")
        return 2


if __name__ == "__main__":
    sys.exit(run())
