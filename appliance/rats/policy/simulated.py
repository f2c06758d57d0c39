"""What simulated hardware must say: what the imitated one must, and never more than a warning."""

from __future__ import annotations

from appliance.config import Policy
from appliance.rats.policy.sev_snp import appraise_sev_snp
from appliance.rats.result import AttestationResult, conclude
from appliance.rats.schemes.simulated import TEST_ROOT, SimulatedCpuClaims


def appraise_simulated_cpu(
    claims: SimulatedCpuClaims, policy: Policy, *, reference: frozenset[str] | None
) -> AttestationResult:
    """As `appraise_sev_snp`, and that it is under the published test root."""
    imitated = appraise_sev_snp(claims.sev_snp, policy, reference=reference, report_data=None)
    return conclude(claims.to_json(), (*imitated.findings, TEST_ROOT))
