"""What an attack must leave behind: nothing, and an appliance that serves on."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.integration.appliance import RunningAppliance
from tests.integration.wire import PATIENCE_S, Wire

LIVE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
LIVE_BODY = b'{"status":"live"}'
LAST_LIVE = LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
DEFECTS = {"connection_error_contained", "application_error", "request_defect"}


def living_tasks() -> Counter[str]:
    """Every task of this run by name, the appliance's and the test's."""
    found, waiting = Counter[str](), [trio.lowlevel.current_root_task()]
    while waiting:
        task = waiting.pop()
        if task is not None:
            found[task.name] += 1
            waiting += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return found


def open_descriptors() -> int:
    """Of this process, the appliance's and the test's."""
    return len(list(Path("/proc/self/fd").iterdir()))


@asynccontextmanager
async def unharmed(appliance: RunningAppliance) -> AsyncIterator[None]:
    """What happens inside leaves no exchange, connection or task, and the appliance serves on."""
    await assert_serving(appliance)
    tasks, descriptors = living_tasks(), open_descriptors()
    yield
    assert not appliance.ended.is_set()
    await assert_serving(appliance)
    with trio.move_on_after(PATIENCE_S):
        while living_tasks() - tasks or open_descriptors() > descriptors:
            await trio.sleep(0.02)
    left = living_tasks() - tasks
    assert not left, left
    assert open_descriptors() <= descriptors
    async with appliance.client() as client:
        assert (await client.get("/health")).json()["running"] == 0
    assert await appliance.engine_counter("sglang:num_running_reqs") == 0
    assert not [line for line in appliance.log_lines if line["event"] in DEFECTS]


async def assert_serving(appliance: RunningAppliance) -> None:
    async with Wire.open(appliance) as wire:
        assert await wire.send(LAST_LIVE)
        answer = await wire.read_to_end()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(LIVE_BODY)


async def aborted(appliance: RunningAppliance, count: int = 1) -> None:
    with trio.fail_after(PATIENCE_S):
        while await appliance.engine_counter("sglang:num_aborted_requests_total") < count:
            await trio.sleep(0.02)


async def generating(appliance: RunningAppliance) -> None:
    with trio.fail_after(PATIENCE_S):
        while not await appliance.engine_counter("sglang:num_running_reqs"):
            await trio.sleep(0.02)
