"""Who may use the engine now: bounded places, a bounded queue, and fairness between tenants.

The engine has so many places; one generation takes one. Who finds none free waits in line, each
tenant in a line of its own, and places that become free go round the tenants in turn. So a tenant
who sends a thousand requests waits for his own, and another's first request waits for at most one
of his. Who must not wait is told so at once: 429 when it is the tenant's own limit, 503 when it
is the appliance's.

An exchange holds its places until it is released, whatever way it ended; ending is synchronous, so
that it also works while its task is being cancelled.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from appliance.config import Limits
from appliance.errors import ApplianceError, InvalidRequest, NotServing, Overloaded, RateLimited
from appliance.serving.auth import Tenant
from appliance.serving.lifecycle import Lifecycle, State

RETRY_AFTER_S = 1
"""Places free up at the pace of generations, so soon."""


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


@dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody in line. `ready` is set once it has its places, or will never have them."""

    places: int
    ready: trio.Event = field(default_factory=trio.Event)
    granted: bool = False


@dataclass(slots=True)
class _Account:
    """What one tenant uses.

    Attributes:
        taken: places it holds. line: its waiters, first come first served.
        allowance: requests it may send right now, refilled with time (a token bucket).
    """

    taken: int = 0
    line: deque[_Waiter] = field(default_factory=deque)
    allowance: float = 0.0
    refilled_at: float = -math.inf

    @property
    def wanted(self) -> int:
        """Places held and waited for."""
        return self.taken + sum(waiter.places for waiter in self.line)


class Admission:
    """Admits exchanges up to a number of places; knows all that are running.

    Args:
        clock: monotonic seconds, Trio's unless a test says otherwise.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        limits: Limits,
        *,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._lifecycle = lifecycle
        self._limits = limits
        self._clock = clock
        self._taken = 0
        self._accounts: dict[str, _Account] = {}
        self._turns: deque[str] = deque()  # tenants with a line, next first
        self._running: set[Exchange] = set()
        self._released = trio.Event()

    @property
    def running(self) -> int:
        """Exchanges that are not released yet."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return sum(len(account.line) for account in self._accounts.values())

    async def admit(self, tenant: Tenant, *, places: int) -> Exchange:
        """Take places for one exchange, waiting in line for them; the caller releases it.

        Cancellation gives up the place in line, and places that were just granted.

        Raises:
            InvalidRequest: there will never be so many places.
            NotServing: the appliance is not, or no longer, serving.
            RateLimited: the tenant's own rate or number of generations is used up.
            Overloaded: the line is full, or no place came free in time.
        """
        self._refuse_unless_serving()
        ever = min(self._limits.max_concurrent, tenant.max_concurrent or places)
        if places > ever:
            raise InvalidRequest(f"n: expected at most {ever} choices at once", param="n")
        # One account per tenant: they come from the configuration, so this does not grow.
        account = self._accounts.setdefault(tenant.id, _Account())
        self._check_tenant(tenant, account, places)
        if self._taken + places <= self._limits.max_concurrent and not self._turns:
            self._take(account, places)
        else:
            await self._wait_in_line(tenant, account, places)
        exchange = Exchange(tenant, places, self._forget)
        self._running.add(exchange)
        return exchange

    def interrupt_all(self, error: ApplianceError) -> None:
        """End every running exchange from outside, with this reason."""
        for exchange in tuple(self._running):
            exchange.interrupt(error)

    def refuse_waiting(self) -> None:
        """Empty the line: everybody in it is told now what the appliance's new state is."""
        for account in self._accounts.values():
            for waiter in account.line:
                waiter.ready.set()
            account.line.clear()
        self._turns.clear()

    async def wait_idle(self) -> None:
        """Wait until no exchange is running, nor about to with places it was just granted."""
        while self._taken:
            await self._released.wait()

    async def _wait_in_line(self, tenant: Tenant, account: _Account, places: int) -> None:
        if self.waiting >= self._limits.max_waiting:
            raise Overloaded("every place at the engine is taken", retry_after_s=RETRY_AFTER_S)
        waiter = _Waiter(places)
        account.line.append(waiter)
        if tenant.id not in self._turns:
            self._turns.append(tenant.id)
        try:
            with trio.move_on_after(self._limits.max_wait_s):
                await waiter.ready.wait()
        except trio.Cancelled:
            self._leave_line(tenant, account, waiter)
            raise
        if self._lifecycle.state is not State.SERVING or not waiter.granted:
            self._leave_line(tenant, account, waiter)
            self._refuse_unless_serving()
            raise Overloaded(
                f"no place at the engine came free within {self._limits.max_wait_s:g} s",
                retry_after_s=RETRY_AFTER_S,
            )

    def _leave_line(self, tenant: Tenant, account: _Account, waiter: _Waiter) -> None:
        """Undo a wait: the place in line, or the places that were granted meanwhile."""
        if waiter.granted:
            self._give_back(account, waiter.places)
        elif waiter in account.line:
            account.line.remove(waiter)
            if not account.line:
                self._turns.remove(tenant.id)
            self._dispatch()  # it may have been the one that the others waited behind

    def _dispatch(self) -> None:
        """Hand out free places, one waiter per tenant and turn.

        The next in turn is waited for even if a smaller request behind it would fit: else a
        request for many places would never get them.
        """
        while self._turns:
            tenant_id = self._turns[0]
            account = self._accounts[tenant_id]
            waiter = account.line[0]
            if self._taken + waiter.places > self._limits.max_concurrent:
                return
            account.line.popleft()
            self._turns.popleft()
            if account.line:
                self._turns.append(tenant_id)
            self._take(account, waiter.places)
            waiter.granted = True
            waiter.ready.set()

    def _check_tenant(self, tenant: Tenant, account: _Account, places: int) -> None:
        limit = tenant.max_concurrent
        if limit is not None and account.wanted + places > limit:
            raise RateLimited(
                f"this API key may have {limit} generations at once", retry_after_s=RETRY_AFTER_S
            )
        rate = tenant.requests_per_minute
        if rate is None:
            return
        now = self._clock()
        elapsed = now - account.refilled_at
        account.refilled_at = now
        # A minute's worth may come at once; then one every 60/rate seconds.
        account.allowance = min(float(rate), account.allowance + elapsed * rate / 60)
        if account.allowance < 1:
            wait_s = math.ceil((1 - account.allowance) * 60 / rate)
            raise RateLimited(
                f"this API key may send {rate} requests a minute", retry_after_s=wait_s
            )
        account.allowance -= 1

    def _refuse_unless_serving(self) -> None:
        if self._lifecycle.state is not State.SERVING:
            raise NotServing(
                f"the appliance is {self._lifecycle.state.value}", retry_after_s=RETRY_AFTER_S
            )

    def _take(self, account: _Account, places: int) -> None:
        account.taken += places
        self._taken += places

    def _give_back(self, account: _Account, places: int) -> None:
        account.taken -= places
        self._taken -= places
        self._dispatch()
        released, self._released = self._released, trio.Event()
        released.set()

    def _forget(self, exchange: Exchange) -> None:
        self._running.discard(exchange)
        self._give_back(self._accounts[exchange.tenant.id], exchange.places)
