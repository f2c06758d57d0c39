"""Work in a thread: in turn, with a deadline, and never waited for when nobody wants it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import trio
import trio.testing

from appliance.errors import Malformed, Overloaded
from appliance.serving.turns import RETRY_AFTER_S
from appliance.serving.workers import LARGE_BYTES, Workers

PATIENCE_S = 5.0


class Busy:
    """A piece of work that goes on until it is let go."""

    def __init__(self) -> None:
        self.begun, self._over = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self._over.wait(PATIENCE_S)
        return threading.current_thread().name

    def let_go(self) -> None:
        self._over.set()


@pytest.fixture
def busy() -> Iterator[Busy]:
    work = Busy()
    yield work
    work.let_go()


def workers(*, max_waiting: int = 10, max_wait_s: float = PATIENCE_S) -> Workers:
    return Workers("sums", max_waiting=max_waiting, max_wait_s=max_wait_s)


async def until(event: threading.Event) -> None:
    with trio.fail_after(PATIENCE_S):
        while not event.is_set():
            await trio.sleep(0.001)


async def test_what_the_work_returns_or_raises_comes_back(busy: Busy) -> None:
    sums = workers()
    busy.let_go()
    assert await sums.do("alice", busy) != threading.current_thread().name

    def refuse() -> None:
        raise Malformed("no")

    with pytest.raises(Malformed, match="no"):
        await sums.do("alice", refuse)


async def test_only_a_large_input_goes_to_the_thread() -> None:
    sums = workers()
    here = threading.current_thread().name
    name = lambda: threading.current_thread().name  # noqa: E731
    assert await sums.for_size("alice", LARGE_BYTES - 1)(name) == here
    assert await sums.for_size("alice", LARGE_BYTES)(name) != here


async def test_the_parties_take_turns(nursery: trio.Nursery, busy: Busy) -> None:
    sums, done = workers(), list[str]()
    nursery.start_soon(sums.do, "alice", busy)
    await until(busy.begun)
    for name in ("alice-1", "alice-2", "bob-1"):
        nursery.start_soon(sums.do, name.partition("-")[0], partial(done.append, name))
        await trio.testing.wait_all_tasks_blocked()
    busy.let_go()
    with trio.fail_after(PATIENCE_S):
        while len(done) < 3:
            await trio.sleep(0.001)
    assert done == ["alice-1", "bob-1", "alice-2"]


async def test_a_wait_has_a_deadline(nursery: trio.Nursery, busy: Busy) -> None:
    sums = workers(max_wait_s=0.1)

    async def hold() -> None:
        with pytest.raises(Overloaded, match=r"sums took longer than 0\.1 s"):
            await sums.do("bob", busy)

    nursery.start_soon(hold)
    await until(busy.begun)
    with pytest.raises(Overloaded) as caught:
        await sums.do("alice", lambda: None)
    assert caught.value.retry_after_s == RETRY_AFTER_S


async def test_the_line_has_an_end(nursery: trio.Nursery, busy: Busy) -> None:
    sums = workers(max_waiting=0)
    nursery.start_soon(sums.do, "bob", busy)
    await until(busy.begun)
    with pytest.raises(Overloaded, match="the line is full"):
        await sums.do("alice", lambda: None)
    busy.let_go()


async def test_who_goes_away_waits_for_nothing_and_the_next_for_the_thread(busy: Busy) -> None:
    sums = workers()
    with trio.fail_after(1):
        async with trio.open_nursery() as going:
            going.start_soon(sums.do, "alice", busy)
            await until(busy.begun)
            going.cancel_scope.cancel()
    # The thread still works, and there is only one.
    done = threading.Event()
    async with trio.open_nursery() as waiting:
        waiting.start_soon(sums.do, "bob", done.set)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not done.is_set()
        busy.let_go()
    assert done.is_set()
