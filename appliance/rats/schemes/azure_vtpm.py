"""An Azure confidential VM to authentic claims: the hardware vouches for the vTPM, the vTPM quotes.

    AMD or Intel ── signs ──> hardware report ── its REPORT_DATA is the hash of ──> claims
    claims ── name ──> HCLAkPub ── signs ──> quote: our data, PCRs ── replay to ──> event log

Between the VM and the hardware stands Microsoft's paravisor (the HCL), which runs the vTPM: its
launch measurement is the hardware report's, and it is trusted to tell of the VM.

Of a TDX machine the HCL report holds a TDREPORT, whose MAC only that machine could check. The TD
quote says the same under Intel's key; both must say the same.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from appliance.errors import Unauthentic, Unbound
from appliance.rats.chain import parse_pem_chain
from appliance.rats.model import Anchors
from appliance.rats.schemes import sev_snp, tdx, tpm2
from appliance.rats.schemes.sev_snp import SevSnpClaims
from appliance.rats.schemes.tdx import TdxClaims
from appliance.rats.schemes.tpm2 import TpmClaims
from appliance.wire.azure_hcl import HclReport, RuntimeClaims, parse_hcl_report
from appliance.wire.canonical import JsonObject
from appliance.wire.evidence import CpuEvidence
from appliance.wire.tdx import parse_td_report


@dataclass(frozen=True, slots=True)
class AzureVtpmClaims:
    """All that the three layers say.

    Attributes:
        hardware: the SEV-SNP report's or TD quote's, about the paravisor.
        runtime: what the paravisor says of the VM, secure boot and user data among it.
        bound: 64 bytes: the hash of the paravisor's statement, which is the hardware's report data.
        tpm: the quote's.
    """

    hardware: SevSnpClaims | TdxClaims
    runtime: RuntimeClaims
    bound: bytes
    tpm: TpmClaims

    @property
    def scheme(self) -> str:
        """Its name."""
        return "azure_vtpm"

    @property
    def report_data(self) -> bytes:
        """The quote's qualifying data."""
        return self.tpm.report_data

    @property
    def measurements(self) -> dict[str, str]:
        """The paravisor's, by the hardware's names, and the VM's PCRs."""
        return {**self.hardware.measurements, **self.tpm.measurements}

    @property
    def overrides(self) -> tuple[str, ...]:
        """What the VM's image was given beside itself, see `TpmClaims.overrides`."""
        return self.tpm.overrides

    def to_json(self) -> JsonObject:
        """All of them, the layers nested."""
        return {
            "scheme": self.scheme,
            "report_data": self.report_data.hex(),
            "measurements": {**self.measurements},
            "secure_boot": self.runtime.secure_boot,
            "user_data": self.runtime.user_data.hex(),
            "vm_configuration": self.runtime.configuration,
            "tpm": self.tpm.to_json(),
            "hardware": self.hardware.to_json(),
        }


def authenticate(
    evidence: CpuEvidence, *, anchors: Anchors, at: datetime.datetime
) -> AzureVtpmClaims:
    """An Azure confidential VM's evidence, SEV-SNP or TDX.

    Raises:
        Malformed: a part that does not parse.
        Unauthentic, Revoked, Stale: as the hardware's scheme; also an endorsement that is missing,
            and a quote that HCLAkPub has not signed.
        Unbound: the hardware report is about other claims, a TD quote is of another TDREPORT than
            the one that came with it, the PCR values are not those that were
            quoted, or the log does not give them.
    """
    hcl = parse_hcl_report(evidence.parts["hcl_report"])
    # 1. The hardware's word on the claims.
    hardware = _hardware(hcl, evidence, anchors, at)
    if hardware.report_data != hcl.bound:
        raise Unbound(
            f"azure_vtpm: hardware report data: expected the claims' hash {hcl.bound.hex()}, got "
            f"{hardware.report_data.hex()}"
        )
    if isinstance(hardware, TdxClaims):
        _check_same_td(hcl, hardware)
    # 2. The vTPM's, by the key that the claims name.
    claims = tpm2.authenticate_parts(evidence.parts, hcl.claims.attestation_key)
    return AzureVtpmClaims(hardware, hcl.claims, hcl.bound, claims)


def _check_same_td(hcl: HclReport, hardware: TdxClaims) -> None:
    told, quoted = parse_td_report(hcl.td_report).items(), hardware.report.items()
    for name, value in quoted.items():
        if told[name] != value:
            raise Unbound(
                f"azure_vtpm: {name} of the TD quote: expected the TDREPORT's {told[name].hex()}, "
                f"got {value.hex()}"
            )


def _hardware(
    hcl: HclReport, evidence: CpuEvidence, anchors: Anchors, at: datetime.datetime
) -> SevSnpClaims | TdxClaims:
    endorsements = evidence.endorsements
    if hcl.kind == "tdx":
        if "td_quote" not in evidence.parts or "collateral" not in endorsements:
            raise Unauthentic("azure_vtpm: expected a TD quote and Intel's collateral for it")
        return tdx.authenticate_quote(
            evidence.parts["td_quote"],
            endorsements["collateral"],
            intel_root=anchors.intel_root,
            at=at,
        )
    if "vek" not in endorsements:
        raise Unauthentic("azure_vtpm: expected the certificate of the chip's key (VCEK)")
    authorities = endorsements.get("authorities", b"")
    return sev_snp.authenticate_report(
        hcl.hardware_report,
        vek=sev_snp.load_vek(endorsements["vek"]),
        authorities=parse_pem_chain(authorities, field="authorities") if authorities else (),
        crl=endorsements.get("crl"),
        roots=anchors.amd,
        at=at,
    )
