"""The appliance goes on proving itself while it serves, to itself.

Every interval, a little later at random so that a fleet spreads, it asks for its own report with
a fresh nonce and appraises it as a relying party would. What does not hold withdraws it at once;
what cannot be had withdraws it after as many times in a row as are configured. In between, the
keyset is renewed in time, and vendors are asked again about what they vouch for.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import trio

from appliance.config import Attestation
from appliance.errors import (
    ApplianceError,
    AttesterError,
    AttesterUnavailable,
    CapacityError,
    EvidenceError,
)
from appliance.log import Log
from appliance.rats.result import AttestationResult
from appliance.serving.epochs import Epoch, Epochs
from appliance.serving.reports import Reports
from appliance.wire.canonical import JsonObject, JsonValue

JITTER = 0.1
"""Of the interval."""

REPORT_S = 120.0
"""One report and its appraisal: an epoch or two, a quote, arithmetic."""

REFRESH_S = 3600.0
"""Between two rounds of questions to vendors; revocation is told for a day."""

VENDORS_S = 600.0
"""For one round: a dozen questions for each of sixteen GPUs, if each takes its time."""

AGAIN_S = 1.0
"""Until the next try where so many wait for evidence that there is no place in line."""

NONCE_BYTES = 32


class Reattestation:
    """Asks for reports, appraises them, and knows the last verdict.

    Args:
        appraise: a report's bytes and the nonce asked with, to the verdict.
        refresh: asks vendors again, about an epoch's GPUs and the CPU.
        withdraw: told when the appliance must not go on.
        now: Unix seconds.
    """

    def __init__(
        self,
        settings: Attestation,
        reports: Reports,
        epochs: Epochs,
        *,
        appraise: Callable[[bytes, bytes | None], Awaitable[AttestationResult]],
        refresh: Callable[[Epoch], Awaitable[None]],
        withdraw: Callable[[ApplianceError], None],
        random_bytes: Callable[[int], bytes],
        now: Callable[[], float],
        log: Log,
    ) -> None:
        self._settings = settings
        self._reports = reports
        self._epochs = epochs
        self._appraise = appraise
        self._refresh = refresh
        self._refreshed_at = now()
        self._withdraw = withdraw
        self._random_bytes = random_bytes
        self._now = now
        self._log = log
        self._failures = 0
        self._at = -math.inf
        self.result: AttestationResult | None = None

    async def once(self) -> AttestationResult:
        """One report with a fresh nonce, appraised.

        Raises:
            AttesterError: evidence could not be had. EvidenceError: it does not hold.
            CapacityError: too many wait for evidence.
        """
        nonce = self._random_bytes(NONCE_BYTES)
        try:
            with trio.fail_after(REPORT_S):
                result = await self._appraise(await self._reports.own_report(nonce), nonce)
        except trio.TooSlowError:
            raise AttesterUnavailable(f"expected a report within {REPORT_S:g} s") from None
        result.require()
        self.result, self._at = result, self._now()
        return result

    async def run(self) -> None:
        """Go on until cancelled, or until the appliance must withdraw."""
        busy = False
        while True:
            await trio.sleep(AGAIN_S if busy else self._pause_s())
            busy = False
            if self._reports.renew_in_s <= 0:
                self._reports.renew()
            try:
                result = await self.once()
                await self._reports.null_form()
                await self._ask_vendors()
            except AttesterError as error:
                self._failures += 1
                self._log.warning("reattestation_failed", code=error.code, error=error.message)
                if self._failures >= self._settings.failures:
                    self._withdraw(error)
                    return
            except EvidenceError as error:
                self._withdraw(error)
                return
            except CapacityError as error:  # nobody's fault, and no reason to end
                busy = True
                self._log.warning("reattestation_postponed", code=error.code, error=error.message)
            else:
                self._failures = 0
                self._log.info("reattested", verdict=result.verdict.value)

    async def _ask_vendors(self) -> None:
        """Now and then. What cannot be had is in the log; what was had before still counts."""
        epoch, now = self._epochs.last, self._now()
        if epoch is None or now - self._refreshed_at < REFRESH_S:
            return
        self._refreshed_at = now
        with trio.move_on_after(VENDORS_S) as deadline:
            await self._refresh(epoch)
        self._log.info("vendors_asked", in_time=not deadline.cancelled_caught)

    def health(self) -> JsonObject:
        """`attestation` of the health document."""
        newest = max(self._at, self._now() - self._epochs.age_s())
        age = self._now() - newest
        schemes: list[JsonValue] = [self._settings.cpu]
        if self._settings.gpu != "unsafe_none":
            schemes.append("nvidia_gpu" if self._settings.gpu == "nvidia" else "simulated")
        return {
            "verdict": "none" if self.result is None else self.result.verdict.value,
            "schemes": schemes,
            "age_s": None if math.isinf(age) else int(age),
        }

    def _pause_s(self) -> float:
        share = int.from_bytes(self._random_bytes(2), "big") / 0x10000
        interval = self._settings.interval_s * (1 + JITTER * share)
        return max(0.0, min(interval, self._reports.renew_in_s))
