"""Work that would hold up the event loop, done in a thread: in turn, with a deadline.

A parser or encoder that runs in the event loop's own thread holds everybody up until it is done;
from another thread Python takes turns every 5 ms. So what may take long, by its size, goes here.
Who asks waits in line with the others of his kind (`serving.turns`), no longer than the deadline,
and stops waiting when his client goes or the appliance ends. The thread itself cannot be stopped:
the next one waits until it is done, and the bounds of its input are those of its time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import trio

from appliance.errors import Overloaded
from appliance.serving.turns import RETRY_AFTER_S, Turns

LARGE_BYTES = 1 << 16
"""From here on a body is handled in a thread. The worst of a smaller one takes some 20 ms."""

_Result = TypeVar("_Result")


class Work(Protocol):
    """Has a function called, here or in a thread."""

    async def __call__(self, function: Callable[[], _Result]) -> _Result:
        """What `function` returns or raises.

        Raises:
            Overloaded: there are too many in line, or it took too long.
        """


class Workers:
    """One thread for one kind of work.

    Args:
        what: the thread does, for messages.
        max_wait_s: from asking to the result.
    """

    def __init__(self, what: str, *, max_waiting: int, max_wait_s: float) -> None:
        self._what = what
        self._max_wait_s = max_wait_s
        self._turns = Turns(
            1, shared=False, max_waiting=max_waiting, max_wait_s=max_wait_s, what=f"for {what}"
        )
        self._limiter = trio.CapacityLimiter(1)

    async def do(self, party: str, function: Callable[[], _Result]) -> _Result:
        """What `function`, called in the thread, returns or raises.

        Args:
            party: whose turn it takes.

        Raises:
            Overloaded: there are too many in line, or it took too long.
        """
        with trio.move_on_after(self._max_wait_s):
            await self._turns.take(party)
            try:
                return await trio.to_thread.run_sync(
                    function, limiter=self._limiter, abandon_on_cancel=True
                )
            finally:
                self._turns.give_back(party)
        raise Overloaded(
            f"{self._what} took longer than {self._max_wait_s:g} s", retry_after_s=RETRY_AFTER_S
        )

    def for_size(self, party: str, size: int) -> Work:
        """How to do work on an input of so many bytes: at once where it is small."""
        return _at_once if size < LARGE_BYTES else partial(self.do, party)


async def _at_once(function: Callable[[], _Result]) -> _Result:
    return function()
