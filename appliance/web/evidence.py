"""Evidence for a request, or an answer that says there is none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
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
        with trio.fail_after(seconds):
            return await step()
    except trio.TooSlowError:
        raise AttestationFailed(f"expected evidence within {seconds:g} s") from None
    except (AttesterError, EvidenceError) as error:
        raise AttestationFailed(f"no evidence that holds: {error.code}") from error
