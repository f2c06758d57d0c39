"""Evidence for a request, or an answer that says there is none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import trio

from appliance.errors import ApplianceError, AttestationFailed, AttesterError, EvidenceError
from appliance.serving.admission import Exchange
from appliance.serving.epochs import Attested, Epochs, Member

T = TypeVar("T")


FRESH_S = 1.0
"""Between a collection and the moment when a request that stood in line has its place."""


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


class RequestEvidence:
    """A request's place in line for evidence.

    It is taken as soon as the request's commitment is known: while the device works, the request
    is read and a place at the engine found. Where that place is long in coming, or the device has
    failed meanwhile, the request stands in line again.
    """

    def __init__(
        self, epochs: Epochs, commitment: bytes, *, within_s: float, unsafe_max_age_s: float
    ) -> None:
        """Stand in line.

        Args:
            commitment: 32 bytes, the leaf.
            within_s: how long `attested` waits.
            unsafe_max_age_s: up to which evidence is used that was not made for this request, as
                its receipt will say; 0 never.
        """
        self._epochs = epochs
        self._commitment = commitment
        self._within_s = within_s
        self._unsafe_max_age_s = unsafe_max_age_s
        self._member: Member | None = None
        if unsafe_max_age_s == 0:
            with suppress(ApplianceError):  # told where it matters: `attested` tries again
                self._member = epochs.enter("request", commitment)

    async def make_way(self) -> None:
        """Let those who come in the same moment stand in line first, if the device is about to be
        asked; bounded by `Epochs.make_way`."""
        if self._member is not None:
            await self._epochs.make_way()

    async def attested(self, exchange: Exchange) -> Attested:
        """Wait for evidence; none is used that was collected longer than `FRESH_S` ago when this is
        called.

        Raises:
            AttestationFailed: it could not be had in time, or it does not hold.
            Overloaded: too many wait.
            ApplianceError: the exchange was interrupted; this is the reason.
        """
        if self._unsafe_max_age_s > 0:
            earlier = self._epochs.reuse("request", unsafe_max_age_s=self._unsafe_max_age_s)
            if earlier is not None and exchange.interrupted is None:
                return earlier
        try:
            if self._member is None or self._past(self._member):
                self._member = self._epochs.enter("request", self._commitment)
            until = trio.current_time() + self._within_s
            attested = await exchange.unless_interrupted(self._member.wait, until=until)
            if self._epochs.ended is not None:  # after it was settled
                raise self._epochs.ended
        except (AttesterError, EvidenceError) as error:
            raise _refusal(error) from error
        except trio.TooSlowError:
            raise evidence_late(self._within_s) from None
        return attested

    def _past(self, member: Member) -> bool:
        """Whether its wait ended with nothing, or too long ago."""
        if member.attested is None:
            return member.error is not None
        return self._epochs.age_of_s(member.attested.epoch) > FRESH_S

    def leave(self) -> None:
        """Wait no longer. Idempotent."""
        if self._member is not None:
            self._epochs.leave(self._member)


@contextmanager
def evidence_refusals() -> Iterator[None]:
    """What is wrong with evidence, as it is told; for whoever has a deadline of his own.

    Raises:
        AttestationFailed: it could not be had, or it does not hold.
    """
    try:
        yield
    except (AttesterError, EvidenceError) as error:
        raise _refusal(error) from error


def _refusal(error: AttesterError | EvidenceError) -> AttestationFailed:
    return AttestationFailed(f"no evidence that holds: {error.code}")


def evidence_late(seconds: float) -> AttestationFailed:
    """What is told after so many seconds."""
    return AttestationFailed(f"expected evidence within {seconds:g} s")
