"""What a SEV-SNP report must say.

Not judged: MASK_CHIP_KEY and a masked CHIP_ID (they hide which chip it is, the signature still
tells that it is one), SMT and the other options that a guest's owner chooses for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from appliance.config import Policy, TcbFloor
from appliance.rats.policy.cpu import ReferenceValues, ReportData
from appliance.rats.result import AttestationResult, Finding, Tier, conclude
from appliance.rats.schemes.sev_snp import SevSnpClaims
from appliance.wire.sev_snp import POLICY_KNOWN_BITS, GuestPolicy, Tcb


def appraise_sev_snp(
    claims: SevSnpClaims,
    policy: Policy,
    *,
    reference: frozenset[str] | None,
    report_data: bytes | None,
) -> AttestationResult:
    """Hold authentic claims to the policy.

    Args:
        claims: from `rats.schemes.sev_snp.authenticate`.
        policy: the relying party's.
        reference: launch digests that are accepted, lowercase hex; None when there are none to
            compare with, which is a warning.
        report_data: what REPORT_DATA must be, up to 64 bytes, zero-padded; None where the caller
            compares it by other means.
    """
    allowed = None if reference is None else {"measurement": reference}
    findings = [
        *NotDebuggable().check(claims),
        *NotMigratable().check(claims),
        *KnownPolicyBits().check(claims),
        *ProductLine(policy.snp_products).check(claims),
        *PrivilegeLevel(policy.vmpl).check(claims),
        *TcbAtLeast(policy.minimum_tcb).check(claims),
        *RevocationKnown(policy.revocation).check(claims),
        *(() if report_data is None else ReportData(report_data).check(claims)),
        *ReferenceValues(allowed, needed=("measurement",)).check(claims),
    ]
    return conclude(claims.to_json(), findings)


@dataclass(frozen=True, slots=True)
class NotDebuggable:
    """The host may not read the guest's memory (guest policy, bit 19)."""

    def check(self, claims: SevSnpClaims) -> Iterator[Finding]:
        """One finding when it may."""
        if GuestPolicy.DEBUG in claims.report.policy:
            yield Finding(
                Tier.CONTRAINDICATED,
                "sev_snp.debug",
                expected="policy.debug 0",
                got="1",
                advice="Launch the guest with a policy that forbids debugging.",
            )


@dataclass(frozen=True, slots=True)
class NotMigratable:
    """No agent may move the guest, with its memory, to another machine (guest policy, bit 18)."""

    def check(self, claims: SevSnpClaims) -> Iterator[Finding]:
        """One finding when one may."""
        if GuestPolicy.MIGRATE_MA in claims.report.policy:
            yield Finding(
                Tier.CONTRAINDICATED,
                "sev_snp.migrate_ma",
                expected="policy.migrate_ma 0",
                got="1",
                advice="Launch the guest with a policy that forbids a migration agent.",
            )


@dataclass(frozen=True, slots=True)
class KnownPolicyBits:
    """Every option of the guest is one whose meaning is known here: the next one could be as
    harmful as debugging."""

    def check(self, claims: SevSnpClaims) -> Iterator[Finding]:
        """One finding when there are others."""
        unknown = claims.report.policy & ~POLICY_KNOWN_BITS
        if unknown:
            yield Finding(
                Tier.CONTRAINDICATED,
                "sev_snp.policy",
                expected=f"no policy bits beyond {POLICY_KNOWN_BITS:#x}",
                got=f"{int(unknown):#x}",
                advice="Launch the guest without these options, or verify with a newer release.",
            )


@dataclass(frozen=True, slots=True)
class ProductLine:
    """The chip is of a product line that the relying party accepts: a flaw in one line's hardware
    is in every chip of it, whatever its firmware."""

    allowed: tuple[str, ...]

    def check(self, claims: SevSnpClaims) -> Iterator[Finding]:
        """One finding for another line."""
        if claims.product not in self.allowed:
            yield Finding(
                Tier.CONTRAINDICATED,
                "sev_snp.product",
                expected=" or ".join(self.allowed) or "none",
                got=claims.product,
                advice="Use a machine of an accepted line; `[policy] snp_products` lists them.",
            )


@dataclass(frozen=True, slots=True)
class PrivilegeLevel:
    """The report was asked for from a level (VMPL) that the policy trusts."""

    allowed: tuple[int, ...]

    def check(self, claims: SevSnpClaims) -> Iterator[Finding]:
        """One finding when it was not."""
        if claims.report.vmpl not in self.allowed:
            yield Finding(
                Tier.CONTRAINDICATED,
                "sev_snp.vmpl",
                expected=" or ".join(str(one) for one in self.allowed) or "none",
                got=str(claims.report.vmpl),
                advice="Ask for the report from a trusted level, or list this one in [policy] vmpl.",
            )


@dataclass(frozen=True, slots=True)
class TcbAtLeast:
    """The firmware is new enough.

    REPORTED_TCB is what the key is derived from, and below the floor it is contraindicated. A
    launch under older firmware, or firmware that the host may still roll back to (COMMITTED_TCB),
    is a warning: what runs now is what the floor asks for, what ran before may not have been.
    """

    floor: TcbFloor

    def check(self, claims: SevSnpClaims) -> Iterator[Finding]:
        """One finding for each version that has a component below the floor."""
        tcbs = (
            ("reported_tcb", claims.reported_tcb, Tier.CONTRAINDICATED),
            ("committed_tcb", claims.committed_tcb, Tier.WARNING),
            ("launch_tcb", claims.launch_tcb, Tier.WARNING),
        )
        for name, tcb, tier in tcbs:
            low = [(part, floor, svn) for part, floor, svn in self._pairs(tcb) if svn < floor]
            if low:
                yield Finding(
                    tier,
                    f"sev_snp.{name}",
                    expected=", ".join(f"{part} >= {floor}" for part, floor, _ in low),
                    got=", ".join(f"{part} {svn}" for part, _, svn in low),
                    advice="Have the host's firmware and microcode updated, then launch again.",
                )

    def _pairs(self, tcb: Tcb) -> Iterator[tuple[str, int, int]]:
        if tcb.fmc is not None:
            yield "fmc", self.floor.fmc, tcb.fmc
        yield "bootloader", self.floor.bootloader, tcb.bootloader
        yield "tee", self.floor.tee, tcb.tee
        yield "snp", self.floor.snp, tcb.snp
        yield "microcode", self.floor.microcode, tcb.microcode


@dataclass(frozen=True, slots=True)
class RevocationKnown:
    """AMD's revocation list was looked at. A revoked issuer never comes this far."""

    rule: Literal["required", "warn"]

    def check(self, claims: SevSnpClaims) -> Iterator[Finding]:
        """One finding when there was none, or an old one."""
        if not claims.revocation_checked:
            yield Finding(
                Tier.CONTRAINDICATED if self.rule == "required" else Tier.WARNING,
                "sev_snp.revocation",
                expected="AMD's revocation list",
                got=claims.revocation_lapsed or "none",
                advice="Let the present revocation list of the product line travel with the evidence.",
            )
