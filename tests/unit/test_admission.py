"""Places at the engine: who gets one and when, who waits, and how an exchange is ended."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from appliance.config import Limits
from appliance.engine.client import EngineAddress
from appliance.errors import (
    ApplianceError,
    EngineDied,
    EngineStreamFailed,
    InvalidRequest,
    NotServing,
    Overloaded,
    RateLimited,
)
from appliance.log import configure_log
from appliance.serving.aborts import Aborts
from appliance.serving.admission import Admission, Exchange
from appliance.serving.auth import ANONYMOUS, Tenant
from appliance.serving.lifecycle import Lifecycle, State
from appliance.serving.relay import connect, forward, prepare
from appliance.serving.turns import FREE_SHARE, RETRY_AFTER_S
from appliance.serving.workers import Workers
from appliance.wire.openai import Endpoint, parse_request, plan_choices

ALICE, BOB, CAROL = (Tenant(name=name, id=name * 2) for name in ("alice", "bob", "carol"))
PATIENCE_S = 5.0
LOG = configure_log(format="json", level="error")


def lifecycle(*steps: State) -> Lifecycle:
    life = Lifecycle(wall_clock=lambda: 0.0, clock=lambda: 0.0)
    for step in steps:
        life.enter(step)
    return life


def serving(
    places: int = 4, life: Lifecycle | None = None, *, tenants: int = 1, **limits: Any
) -> Admission:
    limits = {"max_concurrent": places, "max_wait_s": 30.0, **limits}
    return Admission(life or lifecycle(State.SERVING), Limits(**limits), tenants=tenants)


async def admit(admission: Admission, tenant: Tenant = ANONYMOUS, *, places: int = 1) -> Exchange:
    """Admit somebody who gets a place at once, or is refused at once."""
    with trio.fail_after(PATIENCE_S):
        return await admission.admit(tenant, places=places)


def recorded(calls: list[str], name: str) -> Callable[[], None]:
    return lambda: calls.append(name)


class Line:
    """Tasks that ask for places, and what became of them in which order."""

    def __init__(self, nursery: trio.Nursery, admission: Admission) -> None:
        self.nursery = nursery
        self.admission = admission
        self.admitted: list[str] = []
        self.exchanges: dict[str, Exchange] = {}
        self.errors: dict[str, ApplianceError] = {}

    async def join(
        self, name: str, tenant: Tenant = ANONYMOUS, *, places: int = 1
    ) -> trio.CancelScope:
        """Ask for places in a task of its own; cancelling the scope gives up."""
        scope = trio.CancelScope()

        async def ask() -> None:
            with scope:
                try:
                    self.exchanges[name] = await self.admission.admit(tenant, places=places)
                    self.admitted.append(name)
                except ApplianceError as error:
                    self.errors[name] = error

        self.nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        return scope

    async def release(self, name: str) -> None:
        self.exchanges.pop(name).release()
        await trio.testing.wait_all_tasks_blocked()


# -------------------------------------------------------------------------------------- places


async def test_places_are_taken_until_there_are_none_and_given_back() -> None:
    admission = serving(places=4, max_waiting=0)
    first, second = await admit(admission, places=3), await admit(admission)
    assert admission.running == 2
    with pytest.raises(Overloaded) as caught:
        await admit(admission)
    assert caught.value.retry_after_s == RETRY_AFTER_S
    second.release()
    with pytest.raises(Overloaded):
        await admit(admission, places=2)
    await admit(admission)
    first.release()
    assert admission.running == 1
    await admit(admission, places=3)


async def test_more_places_than_there_are_is_the_clients_mistake() -> None:
    admission = serving(places=2)
    with pytest.raises(InvalidRequest) as caught:
        await admit(admission, places=3)
    assert caught.value.param == "n"
    assert admission.running == 0
    await admit(admission, places=2)


async def test_releasing_twice_gives_back_once() -> None:
    admission = serving(places=2, max_waiting=0)
    exchange = await admit(admission)
    exchange.release()
    exchange.release()
    await admit(admission, places=2)
    with pytest.raises(Overloaded):
        await admit(admission)


@pytest.mark.parametrize(
    "steps",
    [
        (),
        (State.SERVING, State.DRAINING),
        (State.SERVING, State.WITHDRAWN),
        (State.FAILED,),
        (State.STOPPED,),
    ],
)
async def test_nobody_is_admitted_unless_the_appliance_serves(steps: tuple[State, ...]) -> None:
    life = lifecycle(*steps)
    with pytest.raises(NotServing, match=life.state.value) as caught:
        await admit(serving(life=life))
    assert (caught.value.http_status, caught.value.retry_after_s) == (503, RETRY_AFTER_S)


async def test_an_exchange_that_runs_when_draining_begins_keeps_its_places() -> None:
    life = lifecycle(State.SERVING)
    admission = serving(places=1, life=life)
    exchange = await admit(admission)
    life.enter(State.DRAINING)
    assert exchange.interrupted is None
    assert admission.running == 1
    exchange.release()
    assert admission.running == 0


# ------------------------------------------------------------------------------------ the line


async def test_who_finds_no_place_waits_and_is_served_first_come_first_served(
    nursery: trio.Nursery,
) -> None:
    line = Line(nursery, serving(places=1))
    for name in ("a", "b", "c"):
        await line.join(name)
    assert (line.admitted, line.admission.waiting) == (["a"], 2)
    await line.release("a")
    assert (line.admitted, line.admission.waiting) == (["a", "b"], 1)
    await line.release("b")
    assert (line.admitted, line.admission.waiting) == (["a", "b", "c"], 0)


async def test_places_go_round_the_tenants_however_long_their_lines(nursery: trio.Nursery) -> None:
    line = Line(nursery, serving(places=1))
    await line.join("first", ALICE)
    for number in range(3):
        await line.join(f"alice-{number}", ALICE)
    await line.join("bob-0", BOB)
    await line.join("bob-1", BOB)
    await line.join("carol-0", CAROL)
    for _ in range(7):
        await line.release(line.admitted[-1])
    assert line.admitted == [
        "first", "alice-0", "bob-0", "carol-0", "alice-1", "bob-1", "alice-2",
    ]  # fmt: skip


async def test_nobody_overtakes_a_request_for_many_places(nursery: trio.Nursery) -> None:
    line = Line(nursery, serving(places=3))
    await line.join("a", CAROL, places=2)
    await line.join("wide", ALICE, places=3)
    await line.join("narrow", BOB)  # it would fit
    assert line.admitted == ["a"]
    await line.release("a")
    assert line.admitted == ["a", "wide"]
    await line.release("wide")
    assert line.admitted == ["a", "wide", "narrow"]


async def test_who_gives_up_frees_the_way_for_those_behind(nursery: trio.Nursery) -> None:
    line = Line(nursery, serving(places=3))
    await line.join("a", CAROL, places=2)
    wide = await line.join("wide", ALICE, places=3)
    await line.join("narrow", BOB)
    wide.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert line.admitted == ["a", "narrow"]
    assert line.admission.waiting == 0


async def test_places_granted_to_somebody_who_is_cancelled_in_that_moment_go_on(
    nursery: trio.Nursery,
) -> None:
    line = Line(nursery, serving(places=1))
    await line.join("a")
    cancelled = await line.join("b")
    await line.join("c")
    line.exchanges["a"].release()  # grants b
    cancelled.cancel()  # before b's task has run
    await trio.testing.wait_all_tasks_blocked()
    assert line.admitted in (["a", "c"], ["a", "b"])
    assert line.admission.running == 1


async def test_the_line_is_bounded(nursery: trio.Nursery) -> None:
    line = Line(nursery, serving(places=1, max_waiting=1))
    for name in ("a", "b", "c"):
        await line.join(name)
    assert isinstance(line.errors["c"], Overloaded)
    await line.release("a")
    assert line.admitted == ["a", "b"]


async def test_a_full_line_costs_the_tenant_with_most_in_it(nursery: trio.Nursery) -> None:
    line = Line(nursery, serving(places=1, tenants=3, max_waiting=3))
    for number in range(4):
        await line.join(f"alice-{number}", ALICE)
    await line.join("bob", BOB)
    assert list(line.errors) == ["alice-3"]  # the newest
    assert line.errors["alice-3"].retry_after_s == RETRY_AFTER_S
    await line.join("alice-4", ALICE)
    await line.join("carol", CAROL)
    assert list(line.errors) == ["alice-3", "alice-4", "alice-2"]
    await line.join("bob-1", BOB)  # Alice has one running and one in line, so would he have two
    assert list(line.errors)[3:] == ["bob-1"]
    for name in ("alice-0", "alice-1", "bob"):
        await line.release(name)
    assert line.admitted == ["alice-0", "alice-1", "bob", "carol"]


async def test_a_free_place_goes_to_the_tenant_with_fewest(nursery: trio.Nursery) -> None:
    line = Line(nursery, serving(places=4))
    for name in ("a", "b", "c", "d", "e"):
        await line.join(name, ALICE)
    await line.join("bob-0", BOB)
    await line.join("bob-1", BOB)
    await line.release("a")
    await line.release("b")
    await line.release("c")
    assert line.admitted == ["a", "b", "c", "d", "bob-0", "bob-1", "e"]


async def test_one_tenant_never_holds_every_place_where_there_are_several(
    nursery: trio.Nursery,
) -> None:
    places = 2 * (FREE_SHARE + 1)
    line = Line(nursery, serving(places, tenants=3))
    for number in range(places):
        await line.join(f"alice-{number}", ALICE)
    assert len(line.admitted) == 2 * FREE_SHARE
    await line.join("bob", BOB)
    await line.join("carol", CAROL)
    assert line.admitted[2 * FREE_SHARE :] == ["bob", "carol"]


async def test_a_single_tenant_may_hold_every_place(nursery: trio.Nursery) -> None:
    line = Line(nursery, serving(16, tenants=1))
    for number in range(16):
        await line.join(str(number), ALICE)
    assert line.admission.running == 16


async def test_who_asks_for_more_than_his_share_leaves_holds_up_nobody_else(
    nursery: trio.Nursery,
) -> None:
    line = Line(nursery, serving(16, tenants=2))
    await line.join("alice", ALICE)
    await line.join("wide", ALICE, places=15)
    await line.join("bob-0", BOB)
    await line.join("bob-1", BOB)
    assert line.admitted == ["alice", "bob-0", "bob-1"]
    await line.release("alice")
    await line.join("bob-2", BOB)  # now she has none, and is waited for
    await line.release("bob-0")
    assert "bob-2" not in line.admitted
    await line.release("bob-1")
    assert line.admitted[3:] == ["wide", "bob-2"]


async def test_waiting_is_bounded_in_time(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    admission = serving(places=1, max_wait_s=30.0)
    await admission.admit(ALICE, places=1)
    began = trio.current_time()
    with pytest.raises(Overloaded, match="within 30 s") as caught:
        await admission.admit(BOB, places=1)
    assert trio.current_time() - began == pytest.approx(30)
    assert caught.value.retry_after_s == RETRY_AFTER_S
    assert admission.waiting == 0


async def test_who_waits_when_draining_begins_is_not_served_any_more(nursery: trio.Nursery) -> None:
    life = lifecycle(State.SERVING)
    line = Line(nursery, serving(places=1, life=life))
    await line.join("a")
    await line.join("b")
    life.enter(State.DRAINING)
    await line.release("a")
    assert isinstance(line.errors["b"], NotServing)
    assert line.admission.running == 0
    with trio.fail_after(PATIENCE_S):
        await line.admission.wait_idle()


async def test_a_withdrawal_empties_the_line(nursery: trio.Nursery) -> None:
    life = lifecycle(State.SERVING)
    line = Line(nursery, serving(places=1, life=life))
    for name, tenant in (("a", ALICE), ("b", ALICE), ("c", BOB)):
        await line.join(name, tenant)
    life.enter(State.WITHDRAWN)
    line.admission.refuse_waiting()
    line.admission.interrupt_all(EngineDied("it died"))
    await trio.testing.wait_all_tasks_blocked()
    assert {name: type(error) for name, error in line.errors.items()} == {
        "b": NotServing,
        "c": NotServing,
    }
    assert line.admission.waiting == 0
    await line.release("a")
    assert line.admission.running == 0


@given(
    places=st.integers(1, 4),
    steps=st.lists(
        st.tuples(st.sampled_from("abcr"), st.integers(1, 4), st.integers(0, 5)), max_size=25
    ),
)
def test_places_are_never_given_twice_and_never_lost(
    places: int, steps: list[tuple[str, int, int]]
) -> None:
    tenants = dict(zip("abc", (ALICE, BOB, CAROL), strict=True))

    async def scenario() -> None:
        admission = serving(places=places)
        async with trio.open_nursery() as nursery:
            line, scopes = Line(nursery, admission), list[trio.CancelScope]()
            for number, (kind, wanted, choice) in enumerate(steps):
                if kind in tenants:
                    wide = min(wanted, places)
                    scopes.append(await line.join(str(number), tenants[kind], places=wide))
                elif choice % 2 and scopes:
                    scopes.pop(choice % len(scopes)).cancel()
                    await trio.testing.wait_all_tasks_blocked()
                elif line.exchanges:
                    await line.release(sorted(line.exchanges)[choice % len(line.exchanges)])
                held = sum(exchange.places for exchange in line.exchanges.values())
                assert held <= places
                assert held > 0 or admission.waiting == 0
            while line.exchanges:
                await line.release(next(iter(line.exchanges)))
            assert (admission.waiting, admission.running) == (0, 0)
            assert Counter(line.admitted).most_common(1)[0][1] == 1 if line.admitted else True
            await admission.wait_idle()
            (await admission.admit(ALICE, places=places)).release()

    trio.run(scenario)


@given(
    places=st.integers(16, 40),
    max_waiting=st.integers(4, 20),
    steps=st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=120),
)
def test_who_has_nothing_and_asks_for_one_place_is_never_refused_by_the_others_greed(
    places: int, max_waiting: int, steps: list[tuple[int, bool]]
) -> None:
    """Alice, Bob and Carol ask as much as they like; Dave, who comes at any moment, is served."""

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            line = Line(nursery, serving(places, tenants=4, max_waiting=max_waiting))
            greedy, dave = (ALICE, BOB, CAROL), Tenant(name="dave", id="dave")
            for number, (who, ends) in enumerate(steps):
                if ends and line.exchanges:
                    await line.release(next(iter(line.exchanges)))
                else:
                    await line.join(str(number), greedy[who])
                name = f"dave-{number}"
                await line.join(name, dave)
                for _ in greedy:  # each of whom may have had nothing, and have come before him
                    if name not in line.exchanges:
                        await line.release(next(iter(line.exchanges)))
                assert name not in line.errors
                await line.release(name)
            nursery.cancel_scope.cancel()

    trio.run(scenario)


# ---------------------------------------------------------------------------- a tenant's bounds


async def test_a_tenants_generations_are_bounded_waiting_ones_included(
    nursery: trio.Nursery,
) -> None:
    bounded = Tenant(name="t", id="t", max_concurrent=2)
    line = Line(nursery, serving(places=2))
    await line.join("other", BOB)
    await line.join("running", bounded)
    await line.join("waiting", bounded)
    await line.join("refused", bounded)
    assert isinstance(line.errors["refused"], RateLimited)
    assert line.errors["refused"].http_status == 429
    await line.release("running")
    assert line.admitted == ["other", "running", "waiting"]
    await line.join("again", bounded)
    assert "again" not in line.errors


def test_a_minutes_worth_may_come_at_once_and_then_one_at_a_time() -> None:
    now = 100.0
    tenant = Tenant(name="t", id="t", requests_per_minute=6)
    admission = Admission(lifecycle(State.SERVING), Limits(), clock=lambda: now)
    for _ in range(6):
        admission.charge(tenant)
    with pytest.raises(RateLimited) as caught:
        admission.charge(tenant)
    assert caught.value.retry_after_s == 10
    now += 10
    admission.charge(tenant)
    with pytest.raises(RateLimited):
        admission.charge(tenant)
    now += 3600
    for _ in range(6):
        admission.charge(tenant)
    with pytest.raises(RateLimited):
        admission.charge(tenant)


def test_one_tenants_rate_is_not_anothers() -> None:
    admission = Admission(lifecycle(State.SERVING), Limits(), clock=lambda: 0.0)
    first, second = (Tenant(name=name, id=name, requests_per_minute=1) for name in "ab")
    admission.charge(first)
    with pytest.raises(RateLimited):
        admission.charge(first)
    admission.charge(second)
    for _ in range(100):
        admission.charge(BOB)  # no rate of his own


# ---------------------------------------------------------------------------- ending an exchange


@pytest.fixture
async def exchange() -> Exchange:
    return await admit(serving())


async def test_release_closes_everything_in_order(exchange: Exchange) -> None:
    calls: list[str] = []
    exchange.on_close(recorded(calls, "first"))
    exchange.on_close(recorded(calls, "second"))
    exchange.release()
    exchange.release()
    assert calls == ["first", "second"]
    assert exchange.interrupted is None


async def test_interrupting_closes_and_keeps_the_first_reason(exchange: Exchange) -> None:
    calls: list[str] = []
    exchange.on_close(recorded(calls, "closed"))
    reason = EngineDied("it died")
    exchange.interrupt(reason)
    exchange.interrupt(NotServing("draining"))
    assert calls == ["closed"]
    assert exchange.interrupted is reason


async def test_an_interrupted_exchange_holds_its_places_until_it_is_released() -> None:
    admission = serving(places=1)
    exchange = await admit(admission)
    exchange.interrupt(EngineDied("it died"))
    assert admission.running == 1
    exchange.release()
    assert admission.running == 0


async def test_what_is_opened_after_the_interruption_is_closed_at_once(exchange: Exchange) -> None:
    """A connection made while its exchange was being ended would else stay open and be read."""
    calls: list[str] = []
    exchange.interrupt(EngineDied("it died"))
    exchange.on_close(recorded(calls, "late"))
    assert calls == ["late"]


async def test_what_is_opened_after_the_release_is_closed_at_once(exchange: Exchange) -> None:
    calls: list[str] = []
    exchange.release()
    exchange.on_close(recorded(calls, "late"))
    assert calls == ["late"]


async def test_an_exchange_released_before_it_is_complete_is_abandoned_once(
    exchange: Exchange,
) -> None:
    calls: list[str] = []
    exchange.on_close(recorded(calls, "closed"))
    exchange.on_abandon(recorded(calls, "abandoned"))
    exchange.release()
    exchange.release()
    assert calls == ["closed", "abandoned"]


async def test_a_complete_exchange_is_not_abandoned(exchange: Exchange) -> None:
    calls: list[str] = []
    exchange.on_abandon(recorded(calls, "abandoned"))
    exchange.complete()
    exchange.release()
    assert calls == []


async def test_interrupting_abandons_only_when_the_exchange_is_released(exchange: Exchange) -> None:
    calls: list[str] = []
    exchange.on_abandon(recorded(calls, "abandoned"))
    exchange.interrupt(EngineDied("it died"))
    assert calls == []
    exchange.release()
    assert calls == ["abandoned"]


async def test_all_running_exchanges_are_interrupted_with_one_reason() -> None:
    admission = serving(places=3)
    done, *running = [await admit(admission) for _ in range(3)]
    done.release()
    reason = EngineDied("it died")
    for exchange in running:
        exchange.on_close(exchange.release)  # a closer may release, while all are being ended
    admission.interrupt_all(reason)
    assert [exchange.interrupted for exchange in running] == [reason, reason]
    assert done.interrupted is None
    assert admission.running == 0


# ---------------------------------------------------------------------------------- being idle


async def waiting_for_idleness(nursery: trio.Nursery, admission: Admission) -> trio.Event:
    idle = trio.Event()

    async def wait() -> None:
        await admission.wait_idle()
        idle.set()

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    return idle


async def test_waiting_for_idleness_ends_with_the_last_release(nursery: trio.Nursery) -> None:
    admission = serving()
    first, second = await admit(admission), await admit(admission, places=2)
    idle = await waiting_for_idleness(nursery, admission)
    first.release()
    await trio.testing.wait_all_tasks_blocked()
    assert not idle.is_set()
    second.release()
    with trio.fail_after(PATIENCE_S):
        await idle.wait()


async def test_an_idle_admission_is_not_waited_for() -> None:
    with trio.fail_after(PATIENCE_S):
        await serving().wait_idle()


async def test_an_exchange_admitted_in_time_is_waited_for_too(nursery: trio.Nursery) -> None:
    admission = serving()
    first = await admit(admission)
    idle = await waiting_for_idleness(nursery, admission)
    first.release()
    second = await admit(admission)
    await trio.testing.wait_all_tasks_blocked()
    assert not idle.is_set()
    second.release()
    with trio.fail_after(PATIENCE_S):
        await idle.wait()


@pytest.mark.parametrize("attempt", range(10))
async def test_places_that_pass_to_the_next_in_line_are_no_idleness(
    nursery: trio.Nursery, attempt: int
) -> None:
    """Between the grant and the waiter's own turn nobody runs; Trio's order of tasks is random."""
    line = Line(nursery, serving(places=1))
    await line.join("a")
    await line.join("b")
    idle = await waiting_for_idleness(nursery, line.admission)
    await line.release("a")
    assert line.admitted == ["a", "b"]
    assert not idle.is_set()
    await line.release("b")
    assert idle.is_set()


# --- what is done for an exchange ends with it --------------------------------------------------


@pytest.mark.parametrize("when", ["before", "while it waits", "as it ends"])
async def test_a_step_of_an_interrupted_exchange_has_no_result(when: str) -> None:
    exchange = await admit(serving())
    reached: list[str] = []
    begun, goes_on = trio.Event(), trio.Event()

    async def step() -> str:
        await trio.lowlevel.checkpoint()
        begun.set()
        await goes_on.wait()
        reached.append("end")
        return "result"

    async def interrupt() -> None:
        await begun.wait()
        if when == "as it ends":
            goes_on.set()  # its task is on the way already: cancelling it comes too late
        exchange.interrupt(EngineDied("gone"))

    if when == "before":
        exchange.interrupt(EngineDied("gone"))
        begun.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupt)
        with pytest.raises(EngineDied):
            await exchange.unless_interrupted(step)
    assert reached == (["end"] if when == "as it ends" else [])
    exchange.release()


async def test_a_step_of_an_exchange_that_goes_on_has_its_result_and_its_own_errors() -> None:
    exchange = await admit(serving())

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise Overloaded("full")

    async def succeed() -> int:
        await trio.lowlevel.checkpoint()
        return 7

    assert await exchange.unless_interrupted(succeed) == 7
    with pytest.raises(Overloaded):
        await exchange.unless_interrupted(fail)
    exchange.release()


@pytest.mark.parametrize("why", ["interrupted", "late"])
async def test_what_may_not_be_sent_any_more_does_not_reach_the_engine(why: str) -> None:
    exchange = await admit(serving())
    if why == "interrupted":
        exchange.interrupt(NotServing("draining"))
    until = trio.current_time() if why == "late" else math.inf
    asked = b""

    async def engine(stream: trio.SocketStream) -> None:
        nonlocal asked
        asked += await stream.receive_some()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, engine, listeners)
        address = EngineAddress(listeners[0].socket.getsockname()[1], "key")
        request = parse_request(Endpoint.COMPLETION, {"model": "m", "prompt": "p"})
        plans = plan_choices(request, response_id="r", seed=1, cache_salt="s", max_choices=1)
        work = Workers("bodies", max_waiting=1, max_wait_s=1).for_size("alice", size=1)
        connections = connect(address, exchange, count=len(plans))
        aborts = Aborts(address, log=LOG)
        outgoing = prepare(request.body, plans)
        with pytest.raises(NotServing if why == "interrupted" else EngineStreamFailed):
            await forward(
                connections, request, plans, outgoing, exchange, aborts, work=work, until=until
            )
        await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()
    assert not asked  # not one byte, though it may have been connected to
    exchange.release()
