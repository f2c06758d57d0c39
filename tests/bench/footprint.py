"""What the gateway takes: time from the engine's readiness to its own, memory under streams."""

from __future__ import annotations

import datetime
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import trio

from tests.bench.load import PATIENCE_S, Connection, chat_body
from tests.bench.processes import Gateway, NotMeasuredError
from tests.bench.results import Bound, Number, console

STREAMS: Final = 256
HELD_S: Final = 1.0
"""For so long all of them run before the memory is read."""


async def measure(gateway: Gateway) -> list[Number]:
    """Both, of a gateway with default limits.

    Raises:
        NotMeasuredError: a stream ended early.
    """
    console.print(f"footprint: {STREAMS} streams", style="dim")
    begun = 0
    all_begun = trio.Event()
    body = chat_body(tokens=1000, ms_per_token=100)

    async def stream(line: Connection) -> None:
        seen = False

        def arrived(_count: int) -> None:
            nonlocal begun, seen
            begun += not seen
            seen = True
            if begun == STREAMS:
                all_begun.set()

        await line.ask(body, on_event=arrived)
        raise NotMeasuredError("a stream ended early")

    async with AsyncExitStack() as stack:
        lines = [
            await stack.enter_async_context(Connection.open(gateway.target.address))
            for _ in range(STREAMS)
        ]
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                for line in lines:
                    nursery.start_soon(stream, line)
                await all_begun.wait()
                await trio.sleep(HELD_S)
                resident = _resident_mb(gateway.target.pids[0])
                nursery.cancel_scope.cancel()
    return [
        Number("serving after the engine was ready", _ready_s(gateway), "s", Bound(1), digits=2),
        Number(f"resident memory under {STREAMS} streams", resident, "MB", Bound(120), digits=0),
    ]


def _resident_mb(pid: int) -> float:
    """Of the gateway's main process; in megabytes of 10^6 bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise NotMeasuredError("the gateway is gone")


def _ready_s(gateway: Gateway) -> float:
    """Self-test, self-check and the listener: what is between the two lines of the log."""
    at = dict[str, datetime.datetime]()
    for line in (gateway.folder / "log").read_text().splitlines():
        entry = json.loads(line)
        at[entry["event"]] = datetime.datetime.fromisoformat(entry["timestamp"])
    return (at["serving"] - at["engine_ready"]).total_seconds()
