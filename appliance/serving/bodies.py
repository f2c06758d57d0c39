"""How many bytes of request bodies are held at once, and who gives way when it is too many.

One request's body is bounded, and so is the number of connections; their product is not a bound
that a machine could keep. So every byte of a body that arrives is counted here, over all requests,
until the request is answered. When there is no room, whoever holds most of what is still arriving
gives way: the peer with the most bytes of unfinished bodies loses the one it began first. So
bodies that are sent half and kept so, however many, cost their sender, and leave room for others.
"""

from __future__ import annotations

from collections.abc import Callable


class HeldBody:
    """What one request's body takes of the budget, from its first byte until `release`.

    Attributes:
        size: bytes counted so far.
        site: the peer it comes from.
    """

    __slots__ = ("_budget", "_over", "give_way", "site", "size")

    def __init__(self, budget: BodyBudget, site: str, give_way: Callable[[], None]) -> None:
        self.site = site
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
        if not self._over:
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


class BodyBudget:
    """All bodies that are held.

    Attributes:
        held: bytes, of arriving and of whole bodies.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held = 0
        # Bytes that are still arriving, per peer; and its bodies, in the order they began. The
        # keys of a dict are a set that keeps its order.
        self._arriving: dict[str, int] = {}
        self._bodies: dict[str, dict[HeldBody, None]] = {}

    def hold(self, site: str, give_way: Callable[[], None]) -> HeldBody:
        """Begin to count a body; the caller releases it.

        Args:
            site: what counts as one peer.
            give_way: called, at most once, when the body has to go; it is released by then.
        """
        return HeldBody(self, site, give_way)

    def take(self, body: HeldBody, size: int) -> None:
        """Count bytes for a body, making room if there is none; for `HeldBody` alone."""
        self._count(body, size)
        while self.held > self._max_bytes:
            # Never empty: `body` is in it until it is the one that gives way.
            most = max(self._arriving, key=self._arriving.__getitem__)
            first = next(iter(self._bodies[most]))
            first.release()
            first.give_way()
            if first is body:
                return

    def settle(self, body: HeldBody) -> None:
        """A body is whole; for `HeldBody` alone."""
        bodies = self._bodies.get(body.site, {})
        if body in bodies:
            del bodies[body]
            self._arriving[body.site] -= body.size
            if not bodies:
                del self._bodies[body.site], self._arriving[body.site]

    def give_back(self, body: HeldBody) -> None:
        """A body is gone; for `HeldBody` alone."""
        self.settle(body)
        self.held -= body.size

    def _count(self, body: HeldBody, size: int) -> None:
        self._bodies.setdefault(body.site, {})[body] = None
        self._arriving[body.site] = self._arriving.get(body.site, 0) + size
        body.size += size
        self.held += size
