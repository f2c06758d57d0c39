"""Who may use the engine now: bounded places, and a handle on every running exchange.

An exchange is admitted only while the appliance serves. It holds one place per engine
generation until it is released, whatever way it ended; ending is synchronous, so that it also
works while its task is being cancelled.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from appliance.errors import ApplianceError, NotServing, Overloaded
from appliance.serving.lifecycle import Lifecycle, State

RETRY_AFTER_S = 1
"""Places free up at the pace of generations, so soon."""


class Exchange:
    """One admitted request, from admission to release.

    Attributes:
        interrupted: the error it was ended with from outside, if it was.
    """

    def __init__(self, places: int, release: Callable[[Exchange], None]) -> None:
        self.places = places
        self.interrupted: ApplianceError | None = None
        self._release = release
        self._closers: list[Callable[[], None]] = []
        self._abandoners: list[Callable[[], None]] = []
        self._complete = False
        self._released = False

    def on_close(self, closer: Callable[[], None]) -> None:
        """Have `closer` called when the exchange is interrupted or released; it may be both."""
        self._closers.append(closer)

    def on_abandon(self, abandon: Callable[[], None]) -> None:
        """Have `abandon` called if the exchange is released before it is complete."""
        self._abandoners.append(abandon)

    def complete(self) -> None:
        """The answer has been read to its end: nothing is left to abandon."""
        self._complete = True

    def interrupt(self, error: ApplianceError) -> None:
        """End the exchange from outside: its reads fail, and this is the reason to give."""
        if self.interrupted is None:
            self.interrupted = error
            self._close()

    def release(self) -> None:
        """Give the places back and close everything. Idempotent."""
        if not self._released:
            self._released = True
            self._close()
            if not self._complete:
                for abandon in self._abandoners:
                    abandon()
            self._release(self)

    def _close(self) -> None:
        for closer in self._closers:
            closer()


class Admission:
    """Admits exchanges up to a number of places; knows all that are running."""

    def __init__(self, lifecycle: Lifecycle, *, places: int) -> None:
        self._lifecycle = lifecycle
        self._places = places
        self._taken = 0
        self._running: set[Exchange] = set()
        self._released = trio.Event()

    @property
    def running(self) -> int:
        """Exchanges that are not released yet."""
        return len(self._running)

    def admit(self, *, places: int) -> Exchange:
        """Take places for one exchange; the caller releases it.

        Raises:
            NotServing: the appliance is not, or no longer, serving.
            Overloaded: not enough places are free.
        """
        if self._lifecycle.state is not State.SERVING:
            raise NotServing(
                f"the appliance is {self._lifecycle.state.value}", retry_after_s=RETRY_AFTER_S
            )
        if self._taken + places > self._places:
            raise Overloaded("every place at the engine is taken", retry_after_s=RETRY_AFTER_S)
        self._taken += places
        exchange = Exchange(places, self._forget)
        self._running.add(exchange)
        return exchange

    def interrupt_all(self, error: ApplianceError) -> None:
        """End every running exchange from outside, with this reason."""
        for exchange in tuple(self._running):
            exchange.interrupt(error)

    async def wait_idle(self) -> None:
        """Wait until no exchange is running."""
        while self._running:
            await self._released.wait()

    def _forget(self, exchange: Exchange) -> None:
        self._running.discard(exchange)
        self._taken -= exchange.places
        released, self._released = self._released, trio.Event()
        released.set()
