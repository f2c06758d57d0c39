"""How many bytes of request bodies are held at once, and who gives way when it is too many.

One request's body is bounded, and so is the number of connections; their product is not a bound
that a machine could keep. So every byte of a body that arrives is counted here, over all requests,
until the request is answered, and for each party: an API key, or where there is none a peer.

A body gives way as long as it is not whole; a whole one is about to be answered. Two rules keep
one party's bodies, sent half or whole, from being another's refusal:

1. Who holds several bodies may hold `FREE_SHARE` bytes for each one that stays free, so at most
   three quarters of all; then the one he began first gives way. What he leaves is for others, by
   the same rule, so that there is room for who holds nothing (`serving.turns` has it for places).
2. When there is no room all the same, of the parties with an unfinished body the one that holds
   most loses the one it began first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

FREE_SHARE = 3
"""Bytes that a party may hold for each one that stays free."""


class HeldBody:
    """What one request's body takes of the budget, from its first byte until `release`.

    Attributes:
        size: bytes counted so far.
        party: who sends it.
    """

    __slots__ = ("_budget", "_over", "give_way", "party", "size")

    def __init__(self, budget: BodyBudget, party: str, give_way: Callable[[], None]) -> None:
        self.party = party
        self.size = 0
        self.give_way = give_way
        self._budget = budget
        self._over = False

    def grow(self, size: int) -> bool:
        """Count `size` more bytes, before they are kept.

        Returns:
            False when they must not be kept: there was no room (`give_way` was called), or it is
            released already.
        """
        if size and not self._over:
            self._budget.take(self, size)
        return not self._over

    def finish(self) -> None:
        """The body is whole: it no longer gives way to others, but counts until `release`."""
        if not self._over:
            self._budget.settle(self)

    def release(self) -> None:
        """The bytes are gone. Idempotent; callable while a task is being cancelled."""
        if not self._over:
            self._over = True
            self._budget.give_back(self)


@dataclass(slots=True)
class _Party:
    """What one party holds.

    Attributes:
        held: bytes, of unfinished and of whole bodies.
        bodies: how many these are.
        unfinished: in the order they began. The keys of a dict are a set that keeps its order.
    """

    held: int = 0
    bodies: int = 0
    unfinished: dict[HeldBody, None] = field(default_factory=dict)


class BodyBudget:
    """All bodies that are held.

    Attributes:
        held: bytes, of unfinished and of whole bodies.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held = 0
        self._parties: dict[str, _Party] = {}

    def hold(self, party: str, give_way: Callable[[], None]) -> HeldBody:
        """Begin to count a body; the caller releases it.

        Args:
            party: who sends it.
            give_way: called, at most once, when the body has to go; it is released by then.
        """
        return HeldBody(self, party, give_way)

    def take(self, body: HeldBody, size: int) -> None:
        """Count bytes for a body, making room if there is none; for `HeldBody` alone."""
        mine = self._parties.setdefault(body.party, _Party())
        if not body.size:
            mine.bodies += 1
        mine.unfinished[body] = None
        body.size += size
        mine.held += size
        self.held += size
        # `body` is unfinished until it is the one that gives way, so there always is one.
        while mine.bodies > 1 and mine.held > FREE_SHARE * (self._max_bytes - self.held):
            if _give_way(mine) is body:
                return
        while self.held > self._max_bytes:
            holding = [party for party in self._parties.values() if party.unfinished]
            if _give_way(max(holding, key=lambda party: party.held)) is body:
                return

    def settle(self, body: HeldBody) -> None:
        """A body is whole; for `HeldBody` alone."""
        if body.size:
            self._parties[body.party].unfinished.pop(body, None)

    def give_back(self, body: HeldBody) -> None:
        """A body is gone; for `HeldBody` alone."""
        if not body.size:
            return
        mine = self._parties[body.party]
        mine.unfinished.pop(body, None)
        mine.held -= body.size
        mine.bodies -= 1
        self.held -= body.size
        if not mine.bodies:
            del self._parties[body.party]


def _give_way(party: _Party) -> HeldBody:
    """Let the body go that a party began first of those that are not whole."""
    first = next(iter(party.unfinished))
    first.release()
    first.give_way()
    return first
