"""The gateway beside others, TLS on: what a token costs, and how soon the first one comes.

Rounds are interleaved and begin each time with another target; every round asks the engine
directly, too, which is what the others are compared with. A target's processor time is that of
all its processes, engine and client left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

import trio
from rich.table import Table

from tests.bench.load import PATIENCE_S, Answer, Connection, chat_body
from tests.bench.processes import NotMeasuredError, Target, cpu_s
from tests.bench.results import Bound, Number, Weight, console, median_ratio, percentile

STREAMS: Final = 64
MS_PER_TOKEN: Final = 20
STAGGER_S: Final = 1.0
SETTLE_S: Final = 0.5
WINDOW_S: Final = 3.0
PAUSE_S: Final = 0.4
"""For the engine to forget the streams of the target before."""

ROUNDS: Final = 6
ALONE: Final = 10
"""Requests of one round that are asked one at a time, with nothing else going on."""

GOALS: Final = {
    "FastAPI, uvicorn, uvloop, aiohttp": 1.0,
    "FastAPI, uvicorn, uvloop, httpx": 0.33,
    "sglang-router": 2.0,
    "nginx": 3.3,
}
"""Ours by theirs, processor time for each token, at most."""


@dataclass(slots=True)
class Measured:
    """One target, over all rounds."""

    target: Target
    us_per_event: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    alone_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)


async def measure(targets: Sequence[Target], direct: Target) -> list[Number]:
    """Measure, print the table, and return our ratios.

    Args:
        targets: the first one is ours.

    Raises:
        NotMeasuredError: a target did not answer well.
    """
    everybody = [Measured(target) for target in (*targets, direct)]
    for number in range(ROUNDS):
        turn = number % len(everybody)
        for one in everybody[turn:] + everybody[:turn]:
            console.print(
                f"side by side: round {number + 1}/{ROUNDS}, {one.target.name}", style="dim"
            )
            with trio.fail_after(STAGGER_S + SETTLE_S + WINDOW_S + 2 * PATIENCE_S):
                await _one_at_a_time(one)
                await _many_at_once(one)
            await trio.sleep(PAUSE_S)
    _print(everybody)
    ours, *others = everybody[:-1]
    return [
        Number(
            f"processor time for each event, dcv by {other.target.name}",
            median_ratio(ours.us_per_event, other.us_per_event),
            "",
            Bound(GOALS[other.target.name], Weight.GOAL),
            digits=2,
        )
        for other in others
    ]


async def _one_at_a_time(one: Measured) -> None:
    body = chat_body(tokens=1)
    async with Connection.open(one.target.address) as line:
        for number in range(ALONE + 1):
            answer = await line.ask(body)
            _check(one, answer)
            if number:  # the first makes connections that are kept
                one.alone_s.append(answer.first_s)


async def _many_at_once(one: Measured) -> None:
    """Streams that begin one after the other, then a window in which all of them run."""
    seconds = STAGGER_S + SETTLE_S + WINDOW_S + 1.0
    body = chat_body(tokens=round(1000 * seconds / MS_PER_TOKEN), ms_per_token=MS_PER_TOKEN)
    events = 0
    watching = False

    async def stream(line: Connection, begin: float) -> None:
        asked, begun, last = 0.0, False, 0.0

        def arrived(count: int) -> None:
            nonlocal events, begun, last
            now = trio.current_time()
            if not begun:
                begun = True
                one.first_s.append(now - asked)
            if watching:
                events += count
                one.gaps_s.append(now - last)
            last = now

        await trio.sleep_until(begin)
        asked = trio.current_time()
        _check(one, await line.ask(body, on_event=arrived))
        raise NotMeasuredError(f"{one.target.name}: a stream ended within the window")

    async with AsyncExitStack() as stack:
        lines = [
            await stack.enter_async_context(Connection.open(one.target.address))
            for _ in range(STREAMS)
        ]
        async with trio.open_nursery() as nursery:
            now = trio.current_time()
            for number, line in enumerate(lines):
                nursery.start_soon(stream, line, now + STAGGER_S * number / STREAMS)
            await trio.sleep_until(now + STAGGER_S + SETTLE_S)
            watching, before, begun = True, cpu_s(one.target.pids), trio.current_time()
            await trio.sleep(WINDOW_S)
            took, spent = trio.current_time() - begun, cpu_s(one.target.pids) - before
            nursery.cancel_scope.cancel()
    if not events:
        raise NotMeasuredError(f"{one.target.name}: no event came")
    one.us_per_event.append(1e6 * spent / events)
    one.per_s.append(events / took)


def _check(one: Measured, answer: Answer) -> None:
    if not answer.ended_well:
        raise NotMeasuredError(f"{one.target.name}: expected a whole stream, got {answer.status}")


def _print(everybody: Sequence[Measured]) -> None:
    """What was measured, the engine asked directly in the last row."""
    ours, direct = everybody[0], everybody[-1]
    offered = STREAMS * 1000 // MS_PER_TOKEN
    table = Table(
        title=f"{STREAMS} streams, a token every {MS_PER_TOKEN} ms, TLS 1.3, HTTP/1.1;"
        f" {ROUNDS} rounds",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("")
    for heading in (
        "CPU us/event",
        "dcv by it",
        f"events/s of {offered}",
        "first token added, alone p50 / p99 ms",
        f"in {STREAMS} streams p50 / p99 ms",
        "gap p99 ms",
    ):
        table.add_column(heading, justify="right")
    for one in everybody:
        is_direct = one is direct
        table.add_row(
            one.target.name,
            "" if is_direct else f"{statistics.median(one.us_per_event):.0f}",
            "" if is_direct else f"{median_ratio(ours.us_per_event, one.us_per_event):.2f}",
            f"{statistics.median(one.per_s):.0f}",
            _added(one.alone_s, direct.alone_s, is_direct=is_direct),
            _added(one.first_s, direct.first_s, is_direct=is_direct),
            f"{1000 * percentile(one.gaps_s, 99):.1f}",
        )
    console.print(table)


def _added(values: Sequence[float], without: Sequence[float], *, is_direct: bool) -> str:
    """Milliseconds beyond the engine's own; of the engine itself, all of them in brackets."""
    if is_direct:
        return f"({1000 * percentile(values, 50):.1f} / {1000 * percentile(values, 99):.1f})"
    p50, p99 = (1000 * (percentile(values, p) - percentile(without, p)) for p in (50, 99))
    return f"{p50:.1f} / {p99:.1f}"
