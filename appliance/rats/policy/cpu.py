"""Rules that are the same for every kind of CPU evidence."""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from appliance.rats.model import CpuClaims
from appliance.rats.result import Finding, Tier

REPORT_DATA_BYTES = 64

NOT_COMPARED = "authentic, not compared"
"""What a finding got whose measurement had no reference value."""


@dataclass(frozen=True, slots=True)
class ReportData:
    """The evidence is bound to what the verifier expects it to be bound to.

    Attributes:
        expected: up to 64 bytes; fewer stand for themselves followed by zeros.
    """

    expected: bytes

    def check(self, claims: CpuClaims) -> Iterator[Finding]:
        """One finding when it is bound to something else."""
        expected = self.expected.ljust(REPORT_DATA_BYTES, b"\0")
        if not hmac.compare_digest(expected, claims.report_data):
            yield Finding(
                Tier.CONTRAINDICATED,
                f"{claims.scheme}.report_data",
                expected=expected.hex(),
                got=claims.report_data.hex(),
                advice="Ask for evidence about this key and this nonce; this is about another.",
            )


@dataclass(frozen=True, slots=True)
class ReferenceValues:
    """What was started is what the relying party knows.

    Attributes:
        allowed: by the measurement's name, the values that are accepted; None when there are no
            reference values at all.
        needed: measurements that must be compared for evidence to be affirmed.
    """

    allowed: Mapping[str, frozenset[str]] | None
    needed: tuple[str, ...]

    def check(self, claims: CpuClaims) -> Iterator[Finding]:
        """One finding for each measurement that is not known, or was not compared."""
        if self.allowed is None:
            yield Finding(
                Tier.WARNING,
                f"{claims.scheme}.reference",
                expected="reference values",
                got=NOT_COMPARED,
                advice="Give the reference values of the image that should be running.",
            )
            return
        for name in dict.fromkeys((*self.needed, *self.allowed)):
            yield from self._compare(claims, name)

    def _compare(self, claims: CpuClaims, name: str) -> Iterator[Finding]:
        assert self.allowed is not None
        allowed = self.allowed.get(name)
        got = claims.measurements.get(name, "nothing")
        if allowed is None:
            yield Finding(
                Tier.WARNING,
                f"{claims.scheme}.{name}",
                expected="a reference value",
                got=NOT_COMPARED,
                advice="Give the reference values of the image that should be running.",
            )
        elif got not in allowed:
            yield Finding(
                Tier.CONTRAINDICATED,
                f"{claims.scheme}.{name}",
                expected=" or ".join(sorted(allowed)) or "nothing",
                got=got,
                advice="Boot the image that the reference values describe, or obtain its own.",
            )
