"""The life of the appliance, as a table and as something to wait for."""

from __future__ import annotations

from itertools import product

import pytest
import trio
import trio.testing

from appliance.errors import EngineDied, EngineHung
from appliance.serving.lifecycle import TRANSITIONS, Lifecycle, Stage, State

WAYS: dict[State, list[State]] = {
    State.BOOTING: [],
    State.SERVING: [State.SERVING],
    State.DRAINING: [State.SERVING, State.DRAINING],
    State.WITHDRAWN: [State.SERVING, State.WITHDRAWN],
    State.FAILED: [State.FAILED],
    State.STOPPED: [State.STOPPED],
}
"""A way to every state, from booting."""

ALLOWED = {
    (State.BOOTING, State.SERVING),
    (State.BOOTING, State.FAILED),
    (State.BOOTING, State.STOPPED),
    (State.SERVING, State.DRAINING),
    (State.SERVING, State.WITHDRAWN),
    (State.DRAINING, State.STOPPED),
    (State.DRAINING, State.WITHDRAWN),
}


def lifecycle(*, wall: float = 1_000.0) -> Lifecycle:
    return Lifecycle(wall_clock=lambda: wall, clock=lambda: 0.0)


def reached(state: State) -> Lifecycle:
    life = lifecycle()
    for step in WAYS[state]:
        life.enter(step)
    assert life.state is state
    return life


@pytest.mark.parametrize(("before", "after"), list(product(State, State)))
def test_the_allowed_transitions_are_these_and_no_others(before: State, after: State) -> None:
    life = reached(before)
    if (before, after) in ALLOWED:
        life.enter(after)
        assert life.state is after
    else:
        with pytest.raises(ValueError, match=f"no transition from {before.value} to {after.value}"):
            life.enter(after)
        assert life.state is before


def test_the_table_names_every_state_and_nothing_leaves_the_last_ones() -> None:
    assert set(TRANSITIONS) == set(State)
    final = {state for state, following in TRANSITIONS.items() if not following}
    assert final == {State.WITHDRAWN, State.FAILED, State.STOPPED}


def test_the_first_error_given_stays_until_another_is_given() -> None:
    life = reached(State.SERVING)
    died, hung = EngineDied("died"), EngineHung("hung")
    life.enter(State.DRAINING, error=died)
    life.enter(State.STOPPED)
    assert life.error is died
    life = reached(State.DRAINING)
    life.enter(State.WITHDRAWN, error=hung)
    assert life.error is hung


def test_uptime_is_measured_by_the_clock_and_not_by_the_wall() -> None:
    now = 50.0
    life = Lifecycle(wall_clock=lambda: -1.0, clock=lambda: now)
    now = 62.5
    assert life.uptime_s == 12.5


def test_a_stage_begins_without_detail_and_keeps_its_beginning_when_described() -> None:
    now = 1.0
    life = Lifecycle(wall_clock=lambda: now, clock=lambda: 0.0)
    assert life.stage == Stage(0, "start", 1.0)
    now = 2.0
    life.begin_stage(7, "engine")
    now = 3.0
    life.describe("loading weights 50%")
    assert life.stage == Stage(7, "engine", 2.0, "loading weights 50%")
    life.begin_stage(10, "listener")
    assert life.stage == Stage(10, "listener", 3.0, "")


# ------------------------------------------------------------------------------------- waiting


async def watch(life: Lifecycle, seen: list[tuple[State, str]]) -> None:
    """Read first, then wait: as everybody who reports changes does."""
    while True:
        seen.append((life.state, life.stage.detail))
        await life.wait_changed()


async def test_every_change_wakes_whoever_waits(nursery: trio.Nursery) -> None:
    life, seen, also = lifecycle(), list[tuple[State, str]](), list[tuple[State, str]]()
    nursery.start_soon(watch, life, seen)
    nursery.start_soon(watch, life, also)
    await trio.testing.wait_all_tasks_blocked()
    life.describe("a")
    await trio.testing.wait_all_tasks_blocked()
    life.begin_stage(1, "x")
    await trio.testing.wait_all_tasks_blocked()
    life.enter(State.SERVING)
    await trio.testing.wait_all_tasks_blocked()
    booting = State.BOOTING
    assert seen == [(booting, ""), (booting, "a"), (booting, ""), (State.SERVING, "")]
    assert also == seen
    nursery.cancel_scope.cancel()


async def test_changes_while_the_watcher_is_busy_are_seen_as_the_last_one(
    nursery: trio.Nursery,
) -> None:
    life, seen = lifecycle(), list[tuple[State, str]]()
    nursery.start_soon(watch, life, seen)
    await trio.testing.wait_all_tasks_blocked()
    life.describe("a")
    life.describe("b")
    life.enter(State.SERVING)
    await trio.testing.wait_all_tasks_blocked()
    assert seen[-1] == (State.SERVING, "b")
    nursery.cancel_scope.cancel()


async def test_two_tasks_that_answer_each_others_changes_never_miss_one() -> None:
    life = lifecycle()
    life.describe("0")

    async def answer(parity: int) -> None:
        while (count := int(life.stage.detail)) < 100:
            if count % 2 == parity:
                life.describe(str(count + 1))
            else:
                await life.wait_changed()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, 0)
            nursery.start_soon(answer, 1)
    assert life.stage.detail == "100"


async def test_the_same_detail_again_is_no_change(nursery: trio.Nursery) -> None:
    life, seen = lifecycle(), list[tuple[State, str]]()
    life.describe("a")
    nursery.start_soon(watch, life, seen)
    await trio.testing.wait_all_tasks_blocked()
    life.describe("a")
    await trio.testing.wait_all_tasks_blocked()
    assert len(seen) == 1
    nursery.cancel_scope.cancel()


async def test_waiting_until_not_in_a_state_one_is_not_in_returns_at_once() -> None:
    with trio.fail_after(5):
        await reached(State.SERVING).wait_until_not(State.BOOTING)
        await reached(State.SERVING).wait_until_not()


async def test_waiting_until_not_in_several_states_outlasts_moves_between_them(
    nursery: trio.Nursery,
) -> None:
    life, woken = lifecycle(), trio.Event()

    async def wait() -> None:
        await life.wait_until_not(State.BOOTING, State.SERVING)
        woken.set()

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    life.describe("still")
    life.enter(State.SERVING)
    await trio.testing.wait_all_tasks_blocked()
    assert not woken.is_set()
    life.enter(State.DRAINING)
    with trio.fail_after(5):
        await woken.wait()
