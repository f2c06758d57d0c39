"""Who may use the engine now: bounded places, a bounded line, and fairness between tenants.

The engine has so many places; one generation takes one. `Turns` hands them out, so that no tenant
can keep another from one. A tenant's own rate is charged before anything of its request is read,
its own number of generations when it asks for places. Who must not wait is told so at once: 429
when it is the tenant's own limit, 503 when it is the appliance's.

An exchange holds its places until it is released, whatever way it ended; ending is synchronous, so
that it also works while its task is being cancelled.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from appliance.config import Limits
from appliance.errors import ApplianceError, InvalidRequest, NotServing, Overloaded, RateLimited
from appliance.serving.auth import Tenant
from appliance.serving.lifecycle import Lifecycle, State
from appliance.serving.turns import RETRY_AFTER_S, Turns

T = TypeVar("T")


class Exchange:
    """One admitted request, from admission to release.

    Attributes:
        places: how many it holds.
        interrupted: the error it was ended with from outside, if it was.
    """

    def __init__(self, tenant: Tenant, places: int, release: Callable[[Exchange], None]) -> None:
        self.tenant = tenant
        self.places = places
        self.interrupted: ApplianceError | None = None
        self._release = release
        self._closers: list[Callable[[], None]] = []
        self._abandoners: list[Callable[[], None]] = []
        self._complete = False
        self._released = False

    def on_close(self, closer: Callable[[], None]) -> None:
        """Have `closer` called when the exchange is interrupted or released; it may be both.

        At once, where that has happened already: what is opened late must not stay open.
        """
        self._closers.append(closer)
        if self.interrupted is not None or self._released:
            closer()

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

    async def unless_interrupted(
        self, step: Callable[[], Awaitable[T]], *, until: float = math.inf
    ) -> T:
        """What `step` comes to; it is cancelled when the exchange is interrupted, and is not begun,
        nor its result used, where it was.

        Args:
            until: when it is cancelled, too, on Trio's clock.

        Raises:
            ApplianceError: the exchange was interrupted; this is the reason.
            trio.TooSlowError: it was not done in time.
        """
        with trio.CancelScope(deadline=until) as running:
            self.on_close(running.cancel)
            result = await step()
            if self.interrupted is None:
                return result
        if self.interrupted is None:  # it is released only when its task is over
            raise trio.TooSlowError
        raise self.interrupted

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


@dataclass(slots=True)
class _Rate:
    """A tenant's token bucket.

    Attributes:
        allowance: requests it may send right now, refilled with time.
    """

    allowance: float = 0.0
    refilled_at: float = -math.inf


class Admission:
    """Admits exchanges up to a number of places; knows all that are running.

    Args:
        tenants: how many there can be.
        clock: monotonic seconds, Trio's unless a test says otherwise.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        limits: Limits,
        *,
        tenants: int = 1,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._lifecycle = lifecycle
        self._clock = clock
        self._turns = Turns(
            limits.max_concurrent,
            shared=tenants > 1,
            max_waiting=limits.max_waiting,
            max_wait_s=limits.max_wait_s,
            what="at the engine",
        )
        # One for each tenant: they come from the configuration, so this does not grow.
        self._rates: dict[str, _Rate] = {}
        self._running: set[Exchange] = set()

    @property
    def running(self) -> int:
        """Exchanges that are not released yet."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return self._turns.waiting

    def charge(self, tenant: Tenant) -> None:
        """Count a request against its tenant's rate, before anything is done for it.

        Raises:
            RateLimited: the tenant's rate is used up.
        """
        if tenant.requests_per_minute is None:
            return
        per_minute, now = tenant.requests_per_minute, self._clock()
        rate = self._rates.setdefault(tenant.id, _Rate())
        elapsed = now - rate.refilled_at
        rate.refilled_at = now
        # A minute's worth may come at once; then one every 60/per_minute seconds.
        rate.allowance = min(float(per_minute), rate.allowance + elapsed * per_minute / 60)
        if rate.allowance < 1:
            wait_s = math.ceil((1 - rate.allowance) * 60 / per_minute)
            raise RateLimited(
                f"this API key may send {per_minute} requests a minute", retry_after_s=wait_s
            )
        rate.allowance -= 1

    async def admit(self, tenant: Tenant, *, places: int) -> Exchange:
        """Take places for one exchange, waiting in line for them; the caller releases it.

        Cancellation gives up the place in line, and places that were just granted.

        Raises:
            InvalidRequest: there will never be so many places.
            NotServing: the appliance is not, or no longer, serving.
            RateLimited: the tenant's own number of generations is used up.
            Overloaded: the line is full, or no place came free in time.
        """
        self._refuse_unless_serving()
        ever = min(self._turns.places, tenant.max_concurrent or places)
        if places > ever:
            raise InvalidRequest(f"n: expected at most {ever} choices at once", param="n")
        limit = tenant.max_concurrent
        if limit is not None and self._turns.wanted(tenant.id) + places > limit:
            raise RateLimited(
                f"this API key may have {limit} generations at once", retry_after_s=RETRY_AFTER_S
            )
        try:
            await self._turns.take(tenant.id, places)
        except Overloaded:
            self._refuse_unless_serving()
            raise
        try:
            self._refuse_unless_serving()  # it may have changed since
        except NotServing:
            self._turns.give_back(tenant.id, places)
            raise
        exchange = Exchange(tenant, places, self._forget)
        self._running.add(exchange)
        return exchange

    def interrupt_all(self, error: ApplianceError) -> None:
        """End every running exchange from outside, with this reason."""
        for exchange in tuple(self._running):
            exchange.interrupt(error)

    def refuse_waiting(self) -> None:
        """Empty the line: everybody in it is told now what the appliance's new state is."""
        self._turns.refuse_waiting()

    async def wait_idle(self) -> None:
        """Wait until no exchange is running, nor about to with places it was just granted."""
        await self._turns.wait_none_taken()

    def _refuse_unless_serving(self) -> None:
        if self._lifecycle.state is not State.SERVING:
            raise NotServing(
                f"the appliance is {self._lifecycle.state.value}", retry_after_s=RETRY_AFTER_S
            )

    def _forget(self, exchange: Exchange) -> None:
        self._running.discard(exchange)
        self._turns.give_back(exchange.tenant.id, exchange.places)
