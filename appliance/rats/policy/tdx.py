"""What a TDX quote must say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from appliance.config import Policy
from appliance.rats.policy.cpu import ReferenceValues, ReportData
from appliance.rats.result import AttestationResult, Finding, Tier, conclude
from appliance.rats.schemes.tdx import TdxClaims
from appliance.wire.tdx import TUD_BITS, TdAttributes

NEEDED_MEASUREMENTS = ("mrtd", "rtmr1", "rtmr2")
"""MRTD is the firmware, RTMR1 and RTMR2 are kernel, initrd and command line. RTMR0 is what the
host configured and RTMR3 what runs later: both are compared where reference values name them."""

ACCEPTED_WITH_WARNING = frozenset(
    {"SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded"}
)
"""Statuses of a platform whose microcode is current: the rest is in the hands of who runs it
(Intel PCS API 4, `tcbStatus`). Every other status but the ones that the policy lists is refused,
also one that Intel has not invented yet."""

NEVER_ACCEPTED = frozenset({"Revoked"})


def appraise_tdx(
    claims: TdxClaims,
    policy: Policy,
    *,
    reference: Mapping[str, frozenset[str]] | None,
    report_data: bytes | None,
) -> AttestationResult:
    """Hold authentic claims to the policy.

    Args:
        claims: from `rats.schemes.tdx.authenticate`.
        policy: the relying party's.
        reference: values that are accepted, lowercase hex, by measurement (`mrtd`, `rtmr0` to
            `rtmr3`); None when there are none to compare with, which is a warning, as is one of
            `NEEDED_MEASUREMENTS` that it lacks.
        report_data: what REPORTDATA must be, up to 64 bytes, zero-padded; None where the caller
            compares it by other means.
    """
    findings = [
        *NotDebuggable().check(claims),
        *NotMigratable().check(claims),
        *SeptVeDisabled().check(claims),
        *TcbStatus(policy.tdx_statuses).check(claims),
        *(() if report_data is None else ReportData(report_data).check(claims)),
        *ReferenceValues(reference, NEEDED_MEASUREMENTS).check(claims),
    ]
    return conclude(claims.to_json(), findings)


@dataclass(frozen=True, slots=True)
class NotDebuggable:
    """No bit is set under which nothing about the TD can be trusted (TDATTRIBUTES 7:0, TUD)."""

    def check(self, claims: TdxClaims) -> Iterator[Finding]:
        """One finding when one is."""
        under_debug = claims.report.attributes & TUD_BITS
        if under_debug:
            yield Finding(
                Tier.CONTRAINDICATED,
                "tdx.debug",
                expected="td_attributes 7:0 zero (debug, profiling)",
                got=f"{int(under_debug):#04x}",
                advice="Launch the TD without debugging and profiling.",
            )


@dataclass(frozen=True, slots=True)
class NotMigratable:
    """No migration TD may move it, with its memory, to another machine (TDATTRIBUTES 29)."""

    def check(self, claims: TdxClaims) -> Iterator[Finding]:
        """One finding when one may."""
        if TdAttributes.MIGRATABLE in claims.report.attributes:
            yield Finding(
                Tier.CONTRAINDICATED,
                "tdx.migratable",
                expected="td_attributes.migratable 0",
                got="1",
                advice="Launch the TD without migration.",
            )


@dataclass(frozen=True, slots=True)
class SeptVeDisabled:
    """A page that the host takes away ends the TD, instead of raising an exception in it that an
    unprepared kernel may handle badly (TDATTRIBUTES 28)."""

    def check(self, claims: TdxClaims) -> Iterator[Finding]:
        """One finding when it raises one."""
        if TdAttributes.SEPT_VE_DISABLE not in claims.report.attributes:
            yield Finding(
                Tier.WARNING,
                "tdx.sept_ve_disable",
                expected="td_attributes.sept_ve_disable 1",
                got="0",
                advice="Launch the TD with SEPT_VE_DISABLE.",
            )


@dataclass(frozen=True, slots=True)
class TcbStatus:
    """Intel says that firmware and microcode of the platform are good enough."""

    accepted: tuple[str, ...]

    def check(self, claims: TdxClaims) -> Iterator[Finding]:
        """One finding when it says something that the policy does not list."""
        status = claims.tcb_status
        if status in self.accepted and status not in NEVER_ACCEPTED:
            return
        advisories = ", ".join(claims.advisory_ids)
        yield Finding(
            Tier.WARNING if status in ACCEPTED_WITH_WARNING else Tier.CONTRAINDICATED,
            "tdx.tcb_status",
            expected=" or ".join(self.accepted) or "none",
            got=f"{status} ({advisories})" if advisories else status,
            advice="Update the platform, or list its status in [policy] tdx_statuses.",
        )
