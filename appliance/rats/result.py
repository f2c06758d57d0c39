"""The verdict: trust tiers as AR4SI has them, and findings that say what to do.

Sources: draft-ietf-rats-ar4si-09 section 2.3.2 (trust tiers), RFC 9334 section 8.4 (attestation
results).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from appliance.errors import Contraindicated
from appliance.wire.canonical import JsonObject, JsonValue


class Tier(StrEnum):
    """How far the evidence may be trusted."""

    AFFIRMING = "affirming"
    WARNING = "warning"
    CONTRAINDICATED = "contraindicated"
    NONE = "none"
    """No evidence was asked for (`unsafe_none`): nothing is claimed."""


SEVERITY = {Tier.AFFIRMING: 0, Tier.NONE: 1, Tier.WARNING: 2, Tier.CONTRAINDICATED: 3}
"""Of several verdicts the one with the highest number is the verdict on all of them."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that keeps evidence from being affirmed, or one that was not asked of it.

    Attributes:
        tier: the best verdict that is possible with this finding; affirming where it only says
            what a verdict does not cover.
        check: stable name of the rule, `scheme.rule`, for scripts.
        expected, got: as the evidence spells values.
        advice: what to do, one sentence.
    """

    tier: Tier
    check: str
    expected: str
    got: str
    advice: str

    def __str__(self) -> str:
        return f"{self.check}: expected {self.expected}, got {self.got}"

    def to_json(self) -> JsonObject:
        """As `dcv` prints it with `--json`."""
        return {
            "tier": self.tier.value,
            "check": self.check,
            "expected": self.expected,
            "got": self.got,
            "advice": self.advice,
        }


@dataclass(frozen=True, slots=True)
class AttestationResult:
    """What the verifier concludes about one body of evidence.

    Attributes:
        claims: what was signed, as JSON; trustworthy as far as the verdict goes.
        findings: none is worse than the verdict; with an affirming one they say what was not
            checked.
        submods: results on the parts, by name (RFC 9711 section 4.2.18).
    """

    verdict: Tier
    claims: JsonObject
    findings: tuple[Finding, ...] = ()
    submods: dict[str, AttestationResult] = field(default_factory=dict)

    def require(self) -> None:
        """Go on only with evidence that is not contraindicated.

        Raises:
            Contraindicated: its message names every finding that makes it so.
        """
        if self.verdict is Tier.CONTRAINDICATED:
            bad = [str(one) for one in self.all_findings() if one.tier is Tier.CONTRAINDICATED]
            raise Contraindicated("; ".join(bad))

    def all_findings(self) -> tuple[Finding, ...]:
        """Its own and those of its parts, in order."""
        inner = [one for part in self.submods.values() for one in part.all_findings()]
        return (*self.findings, *inner)

    def to_json(self) -> JsonObject:
        """As `dcv` prints it with `--json`."""
        findings: list[JsonValue] = [one.to_json() for one in self.all_findings()]
        return {"verdict": self.verdict.value, "claims": self.claims, "findings": findings}


def worst(tiers: Iterable[Tier]) -> Tier:
    """The verdict on a whole whose parts have these; affirming for no part at all."""
    return max(tiers, key=SEVERITY.__getitem__, default=Tier.AFFIRMING)


def conclude(
    claims: JsonObject,
    findings: Iterable[Finding],
    submods: dict[str, AttestationResult] | None = None,
) -> AttestationResult:
    """A result whose verdict follows from its findings and its parts."""
    found, parts = tuple(findings), submods or {}
    tiers = [one.tier for one in found] + [part.verdict for part in parts.values()]
    return AttestationResult(worst(tiers), claims, found, parts)
