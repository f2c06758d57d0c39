"""Simulated hardware: the vendors' formats, under the published test root.

The same code authenticates it as authenticates the real thing; only the pinned roots differ, and
they are in fields of `Anchors` of their own, empty in production. The keys below them are public:
what is authentic here proves nothing, and the claims say so under a scheme name of their own.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from appliance.errors import Unauthentic
from appliance.rats.model import Anchors
from appliance.rats.result import Finding, Tier
from appliance.rats.schemes import nvidia_gpu, sev_snp
from appliance.rats.schemes.nvidia_gpu import ChainCache, NvidiaGpuClaims
from appliance.rats.schemes.sev_snp import SevSnpClaims
from appliance.wire.canonical import JsonObject
from appliance.wire.evidence import CpuEvidence, GpuEvidence

SCHEME = "simulated"

TEST_ROOT = Finding(
    Tier.WARNING,
    "simulated.test_root",
    "evidence under a vendor's root",
    "evidence under the published test root",
    "Expect no protection: anyone can make this evidence.",
)
"""Stands beside every result on simulated evidence."""


@dataclass(frozen=True, slots=True)
class SimulatedCpuClaims:
    """What a simulated SEV-SNP guest says, in the words of a real one.

    Attributes:
        sev_snp: the claims, as the scheme that is imitated reads them.
    """

    sev_snp: SevSnpClaims

    @property
    def scheme(self) -> str:
        """Not `sev_snp`: a policy for that never sees these."""
        return SCHEME

    @property
    def report_data(self) -> bytes:
        """64 bytes."""
        return self.sev_snp.report_data

    @property
    def measurements(self) -> dict[str, str]:
        """Made up, under the imitated names."""
        return self.sev_snp.measurements

    def to_json(self) -> JsonObject:
        """Every claim; byte strings as lowercase hex."""
        return self.sev_snp.to_json() | {"scheme": SCHEME}


def authenticate_gpu(
    evidence: GpuEvidence,
    *,
    anchors: Anchors,
    at: datetime.datetime,
    nonce: bytes | None,
    chains: ChainCache | None = None,
) -> NvidiaGpuClaims:
    """As `nvidia_gpu.authenticate`, under the test root; the claims' scheme is `simulated`.

    Raises:
        Malformed, Stale, Unauthentic, Unbound: as there; Unauthentic also for another scheme.
    """
    _require_scheme(evidence.scheme)
    return nvidia_gpu.authenticate(
        evidence, root=anchors.simulated_nvidia_device, at=at, nonce=nonce, chains=chains
    )


def authenticate_cpu(
    evidence: CpuEvidence, *, anchors: Anchors, at: datetime.datetime
) -> SimulatedCpuClaims:
    """As `sev_snp.authenticate`, under the test root.

    Raises:
        Malformed, Stale, Unauthentic: as there; Unauthentic also for another scheme.
    """
    _require_scheme(evidence.scheme)
    return SimulatedCpuClaims(sev_snp.authenticate(evidence, roots=anchors.simulated_amd, at=at))


def _require_scheme(scheme: str) -> None:
    if scheme != SCHEME:
        raise Unauthentic(f"expected evidence of scheme `{SCHEME}`, got `{scheme[:64]}`")
