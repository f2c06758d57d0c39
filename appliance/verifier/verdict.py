"""What a relying party is told: a verdict, the error that ended the check, claims and findings.

The JSON form and the exit statuses are stable: auditors script them (docs: `dcv appraise`).

    {"verdict": "affirming" | "warning" | "contraindicated" | null,
     "error": null | {"code", "message"}, "claims": {…}, "findings": [{"tier", "check", …}]}

The verdict is null exactly when nothing could be learnt about the evidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from appliance.errors import ApplianceError, EvidenceError, Malformed
from appliance.rats.result import SEVERITY, AttestationResult, Finding, Tier
from appliance.wire.canonical import JsonObject, JsonValue

EXIT_NOT_CHECKED = 2
EXIT_STATUS = {Tier.AFFIRMING: 0, Tier.CONTRAINDICATED: 1, Tier.WARNING: 3}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why there is no result.

    Attributes:
        code: of the error's class, stable: `malformed`, `unauthentic`, `stale`, `revoked`,
            `unbound`, `contraindicated`, or what could not be checked.
        advice: what to do, one sentence; for people, not in the JSON form.
    """

    code: str
    message: str
    advice: str


@dataclass(frozen=True, slots=True)
class Placed:
    """A finding, and the part of the evidence that it is on, `GPU-0` or `hardware`; empty for the
    whole."""

    submod: str
    finding: Finding

    def to_json(self) -> JsonObject:
        """`submod` is there only where the finding is on a part."""
        where: JsonObject = {"submod": self.submod} if self.submod else {}
        return where | self.finding.to_json()


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check, however it ended.

    Attributes:
        verdict: None when nothing could be checked.
        error: the first one, which ended the check of its part; None for a result.
        claims: what was signed; of what was refused there are none.
    """

    verdict: Tier | None
    error: Problem | None = None
    claims: JsonObject = field(default_factory=dict)
    findings: tuple[Placed, ...] = ()

    @property
    def exit_status(self) -> int:
        """0 affirming, 1 contraindicated, 2 could not be checked, 3 warning."""
        return EXIT_NOT_CHECKED if self.verdict is None else EXIT_STATUS[self.verdict]

    def to_json(self) -> JsonObject:
        """The stable form."""
        error: JsonObject | None = None
        if self.error is not None:
            error = {"code": self.error.code, "message": self.error.message}
        findings: list[JsonValue] = [one.to_json() for one in self.findings]
        return {
            "verdict": None if self.verdict is None else self.verdict.value,
            "error": error,
            "claims": self.claims,
            "findings": findings,
        }


def of_result(result: AttestationResult) -> Outcome:
    """A check that came to its end.

    `none` (no evidence was asked for) affirms nothing: it is told as a warning.
    """
    verdict = Tier.WARNING if result.verdict is Tier.NONE else result.verdict
    return Outcome(verdict, None, _claims(result), tuple(_placed(result, "")))


def of_error(error: ApplianceError) -> Outcome:
    """A check that an error ended. Evidence that does not parse or does not hold is
    contraindicated; everything else (a bad argument, a file that cannot be read) says nothing
    about the evidence."""
    refused = isinstance(error, EvidenceError | Malformed)
    verdict = Tier.CONTRAINDICATED if refused else None
    return Outcome(verdict, Problem(error.code, error.message, error.advice))


def of_parts(parts: Mapping[str, Outcome]) -> Outcome:
    """One outcome on several devices: the worst verdict, the first error, all claims by name
    (`submods`, RFC 9711 section 4.2.18).

    A part that could not be checked leaves the whole unchecked, unless another is refused.
    """
    verdicts = [one.verdict for one in parts.values()]
    known = [one for one in verdicts if one is not None]
    worst = max(known, key=SEVERITY.__getitem__, default=None)
    errors = [(name, one.error) for name, one in parts.items() if one.error is not None]
    error: Problem | None = None
    if errors:
        name, first = errors[0]
        error = Problem(first.code, f"{name}: {first.message}", first.advice)
    submods: JsonObject = {name: one.claims for name, one in parts.items()}
    return Outcome(
        verdict=worst if len(known) == len(verdicts) or worst is Tier.CONTRAINDICATED else None,
        error=error,
        claims={"submods": submods},
        findings=tuple(
            Placed(_join(name, each.submod), each.finding)
            for name, one in parts.items()
            for each in one.findings
        ),
    )


def _claims(result: AttestationResult) -> JsonObject:
    """Its own, and those of its parts by name (RFC 9711 section 4.2.18), but for parts that it
    tells of itself, as Azure's claims do of the hardware."""
    submods: JsonObject = {
        name: _claims(part) for name, part in result.submods.items() if name not in result.claims
    }
    return {**result.claims, "submods": submods} if submods else result.claims


def _placed(result: AttestationResult, where: str) -> Iterator[Placed]:
    """Its own findings and then those of its parts."""
    for finding in result.findings:
        yield Placed(where, finding)
    for name, part in result.submods.items():
        yield from _placed(part, _join(where, name))


def _join(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer and inner else outer or inner
