"""Fresh GPU evidence for everybody, over HTTP: many at once, and many one after another.

The simulated GPU takes `REPORT_S` for a report and makes one at a time, as a real one does. What
is counted are epochs, each one collection from the device, as the receipts cite them.
"""

from __future__ import annotations

import gc
import json
import math
import random
import secrets
import sqlite3
import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from tests.bench.load import PATIENCE_S, Address, Answer, Connection, chat_body
from tests.bench.processes import Gateway, NotMeasuredError, cpu_s, queued_s
from tests.bench.results import Bound, Number, console, percentile

EVIDENCE: Final = "/~sev_gpu@1.0/generate"
REPORT_S: Final = 0.15
AT_ONCE: Final = 256
BURSTS: Final = 7
RATE_PER_S: Final = 200
LINES: Final = 160
"""Kept connections of the steady load; each waits for its answer, 200 a second for 0.3 s need 60."""

PROBES: Final = 5
"""Clients beside the steady load that ask for evidence alone, one question after the other: they
wait in the same line, and for nothing else."""

LIMITS: Final = {"max_concurrent": 1024, "idle_s": 600.0, "reports_per_minute": 100_000}
SECTIONS: Final = {
    "attestation": {"simulated_latency_s": REPORT_S, "interval_s": 3600.0},
    "limits": LIMITS,
}
FLOOR_SECTIONS: Final = {"attestation": {"interval_s": 3600.0}, "limits": LIMITS}


async def measure(gateway: Gateway, *, steady_s: float) -> list[Number]:
    """Both loads on a gateway that was started with `SECTIONS`.

    Raises:
        NotMeasuredError: an answer did not come, or not well.
    """
    async with AsyncExitStack() as stack:
        console.print(f"epochs: opening {AT_ONCE} connections", style="dim")
        lines = [
            await stack.enter_async_context(Connection.open(gateway.target.address))
            for _ in range(AT_ONCE)
        ]
        await _burst(gateway, lines[:16])  # what is made once is made now
        bursts = list[_Load]()
        for number in range(BURSTS):
            console.print(f"epochs: {AT_ONCE} requests at once, {number + 1}/{BURSTS}", style="dim")
            bursts.append(await _burst(gateway, lines))
        console.print(f"epochs: {RATE_PER_S} requests/s for {steady_s:g} s", style="dim")
        steady = await _steady(gateway, lines[:LINES], lines[LINES : LINES + PROBES], steady_s)
    last = statistics.median(load.last_first_token_s for load in bursts)
    return [
        Number(
            f"{AT_ONCE} at once: last first token (median of {BURSTS} bursts)",
            last / REPORT_S,
            "report times",
            Bound(2.5),
            digits=2,
        ),
        Number(
            f"{AT_ONCE} at once: device reports (most of {BURSTS})",
            max(load.reports for load in bursts),
            "",
            Bound(4),
            digits=0,
        ),
        Number(
            f"{AT_ONCE} at once: gateway's processor time for each request",
            1000 * statistics.median(load.cpu_s for load in bursts) / AT_ONCE,
            "ms",
            digits=2,
        ),
        Number(
            f"{RATE_PER_S}/s for {steady_s:g} s: device reports",
            steady.reports / steady.took_s,
            "reports/s",
            Bound(7),
            digits=2,
        ),
        Number(
            f"{RATE_PER_S}/s: p99 wait for evidence, asked for on its own beside them",
            percentile(steady.evidence_s, 99) / REPORT_S,
            "report times",
            Bound(2.2),
            digits=2,
        ),
        *(
            Number(
                f"{RATE_PER_S}/s: p{percent} time to the head, the engine's share included",
                percentile([answer.head_s for answer in steady.answers], percent) / REPORT_S,
                "report times",
                digits=2,
            )
            for percent in (50, 99)
        ),
        Number("the rate that was reached", len(steady.answers) / steady.took_s, "requests/s"),
        Number(
            "the gateway's share of one processor meanwhile",
            100 * steady.cpu_s / steady.took_s,
            "%",
            digits=0,
        ),
        Number(
            "and the time it was ready to run while others had the processors",
            100 * steady.queued_s / steady.took_s,
            "%",
            digits=0,
        ),
    ]


async def measure_floor(gateway: Gateway) -> list[Number]:
    """The same burst where a report takes no time: what is left is computing, on this machine.

    Raises:
        NotMeasuredError: as `measure`.
    """
    console.print(f"epochs: {AT_ONCE} requests at once, reports at once", style="dim")
    async with AsyncExitStack() as stack:
        lines = [
            await stack.enter_async_context(Connection.open(gateway.target.address))
            for _ in range(AT_ONCE)
        ]
        await _burst(gateway, lines[:16])
        loads = [await _burst(gateway, lines) for _ in range(BURSTS)]
    last = statistics.median(load.last_first_token_s for load in loads)
    name = f"{AT_ONCE} at once where a report takes no time: last first token"
    return [Number(name, last / REPORT_S, "report times", digits=2)]


async def measure_engine(address: Address) -> list[Number]:
    """The same burst at the stand-in engine itself: what no gateway can be faster than here."""
    console.print(f"epochs: {AT_ONCE} requests at once, at the engine itself", style="dim")
    lasts = list[float]()
    async with AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(Connection.open(address)) for _ in range(AT_ONCE)]
        for _ in range(BURSTS):
            lasts.append(max(answer.first_s for answer in await _ask_all(lines)))
    name = f"{AT_ONCE} at once at the engine itself: last first token"
    return [Number(name, statistics.median(lasts) / REPORT_S, "report times", digits=2)]


async def _burst(gateway: Gateway, lines: Sequence[Connection]) -> _Load:
    watch = _Watch(gateway)
    return await watch.end(await _ask_all(lines))


async def _ask_all(lines: Sequence[Connection]) -> list[Answer]:
    """One short stream on every line, asked in the same moment."""
    body = chat_body(tokens=2)
    answers = list[Answer]()

    async def ask(line: Connection) -> None:
        answers.append(await line.ask(body))

    # The client's own garbage is collected before: within a burst it kept it from asking for 50 ms.
    gc.collect()
    gc.disable()
    try:
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                for line in lines:
                    nursery.start_soon(ask, line)
    finally:
        gc.enable()
    return answers


async def _steady(
    gateway: Gateway, lines: Sequence[Connection], probes: Sequence[Connection], seconds: float
) -> _Load:
    """Requests that begin at even intervals, whether the earlier ones have ended or not.

    The clock of one that finds no free line runs from the moment it should have been sent.
    """
    body = chat_body(tokens=2)
    count = round(RATE_PER_S * seconds)
    watch = _Watch(gateway)
    give, take = trio.open_memory_channel[Connection](math.inf)
    for line in lines:
        give.send_nowait(line)
    answers = list[Answer]()

    async def ask(due: float) -> None:
        line = await take.receive()
        late = trio.current_time() - due
        answer = await line.ask(body)
        answer.head_s += late
        answer.first_s += late
        answers.append(answer)
        give.send_nowait(line)

    evidence = list[float]()

    async def ask_for_evidence(line: Connection) -> None:
        while trio.current_time() < watch.begun + seconds:
            nonce = secrets.token_hex(32)
            answer = await line.ask(json.dumps({"nonce": nonce}).encode(), path=EVIDENCE)
            if answer.status != 200:
                raise NotMeasuredError(f"expected evidence, got status {answer.status}")
            evidence.append(answer.head_s)
            # Not in step with the device, which has just become free.
            await trio.sleep(REPORT_S * random.random())

    with trio.fail_after(seconds + PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for line in probes:
                nursery.start_soon(ask_for_evidence, line)
            for number in range(count):
                due = watch.begun + number / RATE_PER_S
                await trio.sleep_until(due)
                nursery.start_soon(ask, due)
    return await watch.end(answers, evidence)


@dataclass(frozen=True, slots=True)
class _Load:
    answers: Sequence[Answer]
    reports: int
    took_s: float
    cpu_s: float
    queued_s: float
    evidence_s: Sequence[float] = ()

    @property
    def last_first_token_s(self) -> float:
        return max(answer.first_s for answer in self.answers)


class _Watch:
    """What a load takes from its beginning, now, to its end."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._before = _kept(gateway.receipts)
        self._queued_s = queued_s(gateway.target.pids[0])
        self._cpu_s = cpu_s(gateway.target.pids)
        self.begun = trio.current_time()

    async def end(self, answers: Sequence[Answer], evidence_s: Sequence[float] = ()) -> _Load:
        """All answers have come.

        Raises:
            NotMeasuredError: one of them is not whole, or has no receipt.
        """
        for answer in answers:
            if not answer.ended_well:
                raise NotMeasuredError(f"expected a whole stream, got status {answer.status}")
        return _Load(
            answers=answers,
            took_s=trio.current_time() - self.begun,
            cpu_s=cpu_s(self._gateway.target.pids) - self._cpu_s,
            queued_s=queued_s(self._gateway.target.pids[0]) - self._queued_s,
            reports=await self._reports(len(answers)),
            evidence_s=evidence_s,
        )

    async def _reports(self, answers: int) -> int:
        """The epochs that these answers' receipts cite, once all are on disk."""
        with trio.move_on_after(PATIENCE_S):
            while (now := _kept(self._gateway.receipts)).receipts < self._before.receipts + answers:
                await trio.sleep(0.05)
            return now.epochs - self._before.epochs
        raise NotMeasuredError(f"expected {answers} receipts on disk")


@dataclass(frozen=True, slots=True)
class _Kept:
    epochs: int
    receipts: int


def _kept(database: Path) -> _Kept:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as connection:
        [(epochs, receipts)] = connection.execute(
            "SELECT (SELECT count(*) FROM evidence),"
            " (SELECT count(*) FROM receipt WHERE body IS NOT NULL)"
        )
        return _Kept(epochs, receipts)
