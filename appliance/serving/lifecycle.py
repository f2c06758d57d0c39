"""Where the appliance is in its life, as data.

    booting ──> serving ──> draining ──> stopped
       │  │        │            │
       │  │        └────────────┴──> withdrawn     the engine failed, or (later) its evidence
       │  └──> stopped                             told to stop before it served
       └──> failed

Only `run` and `boot` move it; everybody else reads it or waits for it. A withdrawn appliance
never serves again in this process: what it had proved no longer describes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import trio

from appliance.errors import ApplianceError


class State(Enum):
    """A station of the appliance's life; the values are what health reports."""

    BOOTING = "booting"
    SERVING = "serving"
    DRAINING = "draining"
    WITHDRAWN = "withdrawn"
    FAILED = "failed"
    STOPPED = "stopped"


TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.BOOTING: frozenset({State.SERVING, State.FAILED, State.STOPPED}),
    State.SERVING: frozenset({State.DRAINING, State.WITHDRAWN}),
    State.DRAINING: frozenset({State.STOPPED, State.WITHDRAWN}),
    State.WITHDRAWN: frozenset(),
    State.FAILED: frozenset(),
    State.STOPPED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """A numbered boot stage. `since` is Unix seconds, `detail` a few words of progress."""

    number: int
    name: str
    since: float
    detail: str = ""


class Lifecycle:
    """The current state and boot stage, and a way to wait for the next change.

    Args:
        wall_clock: Unix seconds, for people. `clock`: monotonic seconds, for durations.
    """

    def __init__(self, *, wall_clock: Callable[[], float], clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._clock = clock
        self._started = clock()
        self._changed = trio.Event()
        self.state = State.BOOTING
        self.stage = Stage(number=0, name="start", since=wall_clock())
        self.error: ApplianceError | None = None

    @property
    def uptime_s(self) -> float:
        """Seconds since the process began to boot."""
        return self._clock() - self._started

    def enter(self, state: State, *, error: ApplianceError | None = None) -> None:
        """Move to `state`; a move that is not in the table is a defect.

        Raises:
            ValueError: the table has no such transition.
        """
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"no transition from {self.state.value} to {state.value}")
        self.state = state
        self.error = error or self.error
        self._announce()

    def begin_stage(self, number: int, name: str) -> None:
        """A boot stage begins."""
        self.stage = Stage(number=number, name=name, since=self._wall_clock())
        self._announce()

    def describe(self, detail: str) -> None:
        """What the current stage is doing, in a few words."""
        stage = self.stage
        if detail != stage.detail:
            self.stage = Stage(stage.number, stage.name, stage.since, detail)
            self._announce()

    async def wait_changed(self) -> None:
        """Wait for the next change of state, stage or detail. Read first, then wait."""
        await self._changed.wait()

    async def wait_until_not(self, *states: State) -> None:
        """Wait until the state is none of these."""
        while self.state in states:
            await self._changed.wait()

    def _announce(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()
