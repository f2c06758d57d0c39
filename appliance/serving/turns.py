"""Places that several parties share: a bounded line, and fairness between them.

A party is whoever must not starve another: an API key. Four rules, in this order of weight:

1. A free place goes to the party that has fewest. Among equals to the one whose turn is longest
   ago, so that one who sends a thousand requests waits for his own. What a party that has none
   asks for is waited for, even if something smaller behind it would fit: else a request for many
   places would never get them.
2. Where several share, a party that has places gets more only while `FREE_SHARE` of what it would
   then have stays free: one alone gets 15 of 16 places, two together 30 of 31, and who has none
   finds one without waiting for the end of somebody's long answer. Places cannot be taken back, so
   the alternative is to wait for that end. The rule is that of shared packet buffers (Choudhury
   and Hahne, "Dynamic queue length thresholds", 1998): it needs no number of parties, and the
   more are active the less stays idle.
3. When the line is full, the newest request of the party that has and wants most gives way to one
   of a party that would still have less.
4. A wait ends after `max_wait_s`.

What is remembered is what parties have and want now; nothing of one that has and wants nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import trio

from appliance.errors import Overloaded

RETRY_AFTER_S = 1
"""Places free up at the pace of generations, so soon."""

FREE_SHARE = 15
"""Places that a party may have for each one that stays free."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody in line. `ready` is set once it has its places, or will never have them."""

    places: int
    ready: trio.Event = field(default_factory=trio.Event)
    granted: bool = False
    refused: bool = False


@dataclass(slots=True)
class _Party:
    """What one party has and wants.

    Attributes:
        name: its own.
        taken: places it has. line: its waiters, first come first served.
        turn: when it last was given something or began to wait; smaller is earlier.
    """

    name: str
    taken: int = 0
    line: deque[_Waiter] = field(default_factory=deque)
    turn: int = 0

    @property
    def wanted(self) -> int:
        """Places held and waited for."""
        return self.taken + sum(waiter.places for waiter in self.line)


class Turns:
    """So many places.

    Args:
        shared: whether there can be more than one party; a single one may take all places.
        what: they are, for messages.
    """

    def __init__(
        self, places: int, *, shared: bool, max_waiting: int, max_wait_s: float, what: str
    ) -> None:
        self.places = places
        self.taken = 0
        self.waiting = 0
        self._shared = shared
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._what = what
        self._parties: dict[str, _Party] = {}
        self._in_line: list[_Party] = []
        self._turn = 0
        self._given_back = trio.Event()

    def wanted(self, name: str) -> int:
        """Places that a party has and waits for."""
        party = self._parties.get(name)
        return 0 if party is None else party.wanted

    async def take(self, name: str, places: int = 1) -> None:
        """Take places, in turn; the caller gives them back.

        Cancellation gives up the place in line, and places that were just granted.

        Args:
            name: of the party. places: no more than there are.

        Raises:
            Overloaded: the line is full, or no place came free in time.
        """
        party = self._parties.setdefault(name, _Party(name))
        waiter = _Waiter(places)
        self._join(party, waiter)
        self._dispatch()
        if self.waiting > self._max_waiting and not waiter.ready.is_set():
            self._make_room(party, waiter)
        if not waiter.ready.is_set():
            try:
                with trio.move_on_after(self._max_wait_s):
                    await waiter.ready.wait()
            except trio.Cancelled:
                self._leave(party, waiter)
                raise
        if waiter.granted:
            return
        self._leave(party, waiter)
        if waiter.refused:
            raise Overloaded(
                f"every place {self._what} is taken, and the line is full",
                retry_after_s=RETRY_AFTER_S,
            )
        raise Overloaded(
            f"no place {self._what} came free within {self._max_wait_s:g} s",
            retry_after_s=RETRY_AFTER_S,
        )

    def give_back(self, name: str, places: int = 1) -> None:
        """Give places back; those in line get them."""
        self._free(self._parties[name], places)

    def refuse_waiting(self) -> None:
        """Empty the line; everybody in it is refused."""
        for party in tuple(self._in_line):
            for waiter in tuple(party.line):
                self._refuse(party, waiter)

    async def wait_none_taken(self) -> None:
        """Wait until every place is free and nobody was just granted one."""
        while self.taken:
            await self._given_back.wait()

    def _join(self, party: _Party, waiter: _Waiter) -> None:
        if not party.line:
            self._in_line.append(party)
            self._turn += 1
            party.turn = self._turn
        party.line.append(waiter)
        self.waiting += 1

    def _remove(self, party: _Party, waiter: _Waiter) -> None:
        party.line.remove(waiter)
        self.waiting -= 1
        if not party.line:
            self._in_line.remove(party)
        self._forget_idle(party)

    def _forget_idle(self, party: _Party) -> None:
        if not party.line and not party.taken:
            del self._parties[party.name]

    def _leave(self, party: _Party, waiter: _Waiter) -> None:
        """Undo a wait: the place in line, or the places that were granted meanwhile."""
        if waiter.granted:
            self._free(party, waiter.places)
        elif not waiter.refused:
            self._remove(party, waiter)
            self._dispatch()  # it may have been the one that the others waited behind

    def _refuse(self, party: _Party, waiter: _Waiter) -> None:
        self._remove(party, waiter)
        waiter.refused = True
        waiter.ready.set()

    def _make_room(self, newcomer: _Party, waiter: _Waiter) -> None:
        """The line is one too long: who has and wants most gives way, or the newcomer himself."""
        most = max(self._in_line, key=lambda party: party.wanted)
        if most.wanted <= newcomer.wanted:
            self._refuse(newcomer, waiter)
        else:
            self._refuse(most, most.line[-1])
            self._dispatch()

    def _free(self, party: _Party, places: int) -> None:
        party.taken -= places
        self.taken -= places
        self._forget_idle(party)
        self._dispatch()
        given_back, self._given_back = self._given_back, trio.Event()
        given_back.set()

    def _dispatch(self) -> None:
        """Hand out free places until nobody in line may have one."""
        while (party := self._next()) is not None:
            waiter = party.line[0]
            self._turn += 1
            party.turn = self._turn
            party.taken += waiter.places
            self.taken += waiter.places
            self._remove(party, waiter)
            waiter.granted = True
            waiter.ready.set()

    def _next(self) -> _Party | None:
        for party in sorted(self._in_line, key=lambda party: (party.taken, party.turn)):
            if self._may_take(party, party.line[0].places):
                return party
            if not party.taken:
                return None
        return None

    def _may_take(self, party: _Party, places: int) -> bool:
        free = self.places - self.taken - places
        if free < 0:
            return False
        return not self._shared or not party.taken or party.taken + places <= FREE_SHARE * free
