"""What a TPM's quote must say, alone (`tpm2`) or under an Azure paravisor (`azure_vtpm`).

Not judged: `safe`, and whether an event log is there. A log that is there has already been held
to the quoted PCRs.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from appliance.config import Policy
from appliance.rats.model import CpuClaims
from appliance.rats.policy.cpu import ReferenceValues
from appliance.rats.policy.sev_snp import appraise_sev_snp
from appliance.rats.policy.tdx import appraise_tdx
from appliance.rats.reference import Allowed, ImageReference
from appliance.rats.result import AttestationResult, Finding, Tier, conclude
from appliance.rats.schemes.azure_vtpm import AzureVtpmClaims
from appliance.rats.schemes.sev_snp import SevSnpClaims
from appliance.rats.schemes.tpm2 import TpmClaims

NEEDED_PCRS = ("pcr4", "pcr7", "pcr11")
"""The boot loader and UKI (4), Secure Boot's state and keys (7), what is inside the UKI (11)."""

ZERO = bytes(32).hex()


def appraise_tpm2(
    claims: TpmClaims, policy: Policy, *, reference: Allowed | None, report_data: bytes | None
) -> AttestationResult:
    """Hold a TPM's authentic claims to the policy. At best a warning: no memory is protected.

    Args:
        claims: from `rats.schemes.tpm2`.
        policy: the relying party's; nothing in it is about PCRs.
        reference: by `pcr4` and so on, the values that are accepted, lowercase hex; None when
            there are none to compare with, which is a warning, as is a missing one of
            `NEEDED_PCRS`.
        report_data: what the qualifying data must be, byte for byte; None where the caller
            compares it by other means.
    """
    del policy
    findings = [
        *NoMemoryProtection().check(claims),
        *_pcr_findings(claims, reference),
        *(() if report_data is None else QualifyingData(report_data).check(claims)),
    ]
    return conclude(claims.to_json(), findings)


def appraise_azure_vtpm(
    claims: AzureVtpmClaims,
    policy: Policy,
    *,
    reference: ImageReference | None,
    report_data: bytes | None,
) -> AttestationResult:
    """Hold an Azure machine's authentic claims to the policy; its hardware is the submod
    `hardware`.

    Args:
        claims: from `rats.schemes.azure_vtpm.authenticate`.
        policy: the relying party's.
        reference: `pcrs` of the image, and in `azure` the `paravisor_measurement` (MEASUREMENT of
            SEV-SNP, MRTD of TDX), of TDX also `rtmr0` to `rtmr3`; None when there are none to
            compare with.
        report_data: as for `appraise_tpm2`.
    """
    findings = [
        *SecureBoot(policy.secure_boot).check(claims),
        *_pcr_findings(claims, None if reference is None else reference.pcrs),
        *(() if report_data is None else QualifyingData(report_data).check(claims)),
    ]
    paravisor = {} if reference is None else reference.azure
    return conclude(claims.to_json(), findings, {"hardware": _hardware(claims, policy, paravisor)})


def _hardware(claims: AzureVtpmClaims, policy: Policy, paravisor: Allowed) -> AttestationResult:
    """Its report data is the hash of the paravisor's statement, which `authenticate` compared."""
    measurement = paravisor.get("paravisor_measurement")
    if isinstance(claims.hardware, SevSnpClaims):
        return appraise_sev_snp(
            claims.hardware, policy, reference=measurement, report_data=claims.bound
        )
    table = {name: values for name, values in paravisor.items() if name.startswith("rtmr")}
    if measurement is not None:
        table["mrtd"] = measurement
    return appraise_tdx(claims.hardware, policy, reference=table or None, report_data=claims.bound)


def _pcr_findings(
    claims: TpmClaims | AzureVtpmClaims, reference: Allowed | None
) -> Iterator[Finding]:
    yield from ReferenceValues(reference, needed=NEEDED_PCRS).check(claims)
    yield from NoOverrides(reference).check(claims)


@dataclass(frozen=True, slots=True)
class NoMemoryProtection:
    """A TPM says what was started, and protects nothing of it."""

    def check(self, claims: CpuClaims) -> Iterator[Finding]:
        """Always one finding."""
        yield Finding(
            Tier.WARNING,
            f"{claims.scheme}.memory",
            expected="memory that the host cannot read",
            got="no memory protection",
            advice="Use a machine with SEV-SNP or TDX; a TPM alone shows only what was started.",
        )


@dataclass(frozen=True, slots=True)
class NoOverrides:
    """PCR 12 is zero: nothing was added to the UKI's command line and no credential came with it.

    systemd-stub measures what overrides the image into PCR 12 (systemd-stub(7)), so a value there
    is a machine that does not run the image as it was built. Of an image that is not known this is
    only a warning: other images use PCR 12 otherwise.
    """

    reference: Mapping[str, frozenset[str]] | None

    def check(self, claims: TpmClaims | AzureVtpmClaims) -> Iterator[Finding]:
        """One finding when it is something else, or was not quoted. It names what was added, where
        the event log does."""
        got = claims.measurements.get("pcr12", "nothing")
        if got == ZERO or (self.reference is not None and "pcr12" in self.reference):
            return
        if claims.overrides:
            got = f"{got}, which is {', '.join(claims.overrides)}"
        yield Finding(
            Tier.WARNING if self.reference is None else Tier.CONTRAINDICATED,
            f"{claims.scheme}.pcr12",
            expected=ZERO,
            got=got,
            advice="Boot the image without credentials, addons or a changed command line.",
        )


@dataclass(frozen=True, slots=True)
class QualifyingData:
    """The quote is about what the verifier expects it to be about.

    Attributes:
        expected: all of it; a quote's data have a length of their own, so nothing is padded.
    """

    expected: bytes

    def check(self, claims: CpuClaims) -> Iterator[Finding]:
        """One finding when it is about something else."""
        if not hmac.compare_digest(self.expected, claims.report_data):
            yield Finding(
                Tier.CONTRAINDICATED,
                f"{claims.scheme}.report_data",
                expected=self.expected.hex() or "nothing",
                got=claims.report_data.hex() or "nothing",
                advice="Ask for evidence about this key and this nonce; this is about another.",
            )


@dataclass(frozen=True, slots=True)
class SecureBoot:
    """The paravisor says that the VM was started with Secure Boot."""

    rule: Literal["required", "unsafe_any"]

    def check(self, claims: AzureVtpmClaims) -> Iterator[Finding]:
        """One finding when it does not."""
        if claims.runtime.secure_boot is not True:
            yield Finding(
                Tier.CONTRAINDICATED if self.rule == "required" else Tier.WARNING,
                "azure_vtpm.secure_boot",
                expected="true",
                got={False: "false", None: "nothing"}[claims.runtime.secure_boot],
                advice="Create the VM with Secure Boot on.",
            )
