"""Evidence for a request, or an answer that says there is none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

from appliance.errors import AttestationFailed, AttesterError, EvidenceError

T = TypeVar("T")


async def evidence_or_refusal(seconds: float, step: Callable[[], Awaitable[T]]) -> T:
    """Wait for evidence. What exactly is wrong with a device is for the operator's log.

    Raises:
        AttestationFailed: it could not be had in time, or it does not hold.
        Overloaded, RateLimited: too many wait.
    """
    try:
        with evidence_refusals(), trio.fail_after(seconds):
            return await step()
    except trio.TooSlowError:
        raise evidence_late(seconds) from None


@contextmanager
def evidence_refusals() -> Iterator[None]:
    """What is wrong with evidence, as it is told; for whoever has a deadline of his own.

    Raises:
        AttestationFailed: it could not be had, or it does not hold.
    """
    try:
        yield
    except (AttesterError, EvidenceError) as error:
        raise AttestationFailed(f"no evidence that holds: {error.code}") from error


def evidence_late(seconds: float) -> AttestationFailed:
    """What is told after so many seconds."""
    return AttestationFailed(f"expected evidence within {seconds:g} s")
