"""Appraisal of an appliance's GPUs: each by its scheme, with what endorses it.

A report every time, the rest remembered: a device's chain and NVIDIA's reference values change
with firmware and driver, so `Memory` keeps those that were authenticated. What is remembered is
held to the time of each appraisal again.
"""

from __future__ import annotations

import datetime
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from appliance.config import Policy
from appliance.errors import Contraindicated, Unauthentic
from appliance.rats import revocation
from appliance.rats.model import Anchors
from appliance.rats.policy.nvidia_gpu import appraise_gpu
from appliance.rats.result import AttestationResult, Finding, Tier, conclude
from appliance.rats.schemes.nvidia_gpu import (
    AuthenticatedRim,
    ChainCache,
    NvidiaGpuClaims,
    authenticate,
    authenticate_rim_even_if_expired,
)
from appliance.wire.evidence import GpuEvidence

MAX_RIMS = 64
"""Remembered; a GPU has two."""


class RimCache:
    """Reference values that were authenticated, least recently used out first.

    A key is the hash of the document and of the pinned roots. The time is not part of it: their
    window comes along and is judged at every use. One thread uses it.
    """

    __slots__ = ("_rims",)

    def __init__(self) -> None:
        self._rims: OrderedDict[bytes, AuthenticatedRim] = OrderedDict()

    def authenticate(
        self, document: bytes, *, root: tuple[x509.Certificate, ...], at: datetime.datetime
    ) -> AuthenticatedRim:
        """As `authenticate_rim_even_if_expired`; a document that fails is never kept."""
        pinned = b"".join(one.fingerprint(hashes.SHA256()) for one in root)
        key = hashlib.sha256(hashlib.sha256(document).digest() + pinned).digest()
        found = self._rims.get(key)
        if found is None:
            found = authenticate_rim_even_if_expired(document, root=root, at=at)
        self._rims[key] = found
        self._rims.move_to_end(key)
        while len(self._rims) > MAX_RIMS:
            self._rims.popitem(last=False)
        return found


@dataclass(frozen=True, slots=True)
class Memory:
    """What earlier appraisals authenticated. One thread uses it."""

    chains: ChainCache = field(default_factory=ChainCache)
    rims: RimCache = field(default_factory=RimCache)


@dataclass(frozen=True, slots=True)
class GpuStatement:
    """What one GPU signed, and the verdict on it."""

    claims: NvidiaGpuClaims
    result: AttestationResult


def appraise_gpus(
    gpus: Iterable[GpuEvidence],
    *,
    nonce: bytes,
    policy: Policy,
    anchors: Anchors,
    at: datetime.datetime,
    memory: Memory,
) -> tuple[GpuStatement, ...]:
    """Authenticate and appraise each GPU, in the order given.

    Args:
        nonce: 32 bytes, the epoch's; every report must carry it.
        at: timezone-aware.

    Raises:
        Malformed, Unauthentic, Revoked, Stale, Unbound: of the first that does not hold.
    """
    return tuple(_appraise(one, nonce, policy, anchors, at, memory) for one in gpus)


def summary(statements: tuple[GpuStatement, ...]) -> AttestationResult:
    """One result on all GPUs of an epoch; without any the verdict is `none`."""
    if not statements:
        return AttestationResult(Tier.NONE, {})
    return conclude({}, together(statements), named(statements))


def together(statements: tuple[GpuStatement, ...]) -> Iterator[Finding]:
    """What only shows in all of them: GPUs that work together are in one mode. One that thinks
    itself alone (SPT) does not encrypt what it sends to its neighbours."""
    features = sorted({str(one.claims.feature) for one in statements})
    if len(features) > 1:
        yield Finding(
            Tier.CONTRAINDICATED,
            "gpus.feature",
            "the same mode on every GPU",
            ", ".join(features),
            "Set all GPUs to one confidential-computing mode.",
        )


def named(statements: tuple[GpuStatement, ...]) -> dict[str, AttestationResult]:
    """Results by the submodule's name, `GPU-0` and on (RFC 9711 section 4.2.18)."""
    return {f"GPU-{index}": one.result for index, one in enumerate(statements)}


def _appraise(
    evidence: GpuEvidence,
    nonce: bytes,
    policy: Policy,
    anchors: Anchors,
    at: datetime.datetime,
    memory: Memory,
) -> GpuStatement:
    # 1. The report, to the pinned root of its scheme.
    device_roots, rim_roots = _roots(evidence.scheme, anchors)
    if evidence.scheme == "simulated" and policy.gpus != "unsafe_simulated":
        raise Contraindicated(
            "GPU evidence: expected NVIDIA's, got simulated hardware: anyone can make it"
        )
    claims = authenticate(evidence, root=device_roots, at=at, nonce=nonce, chains=memory.chains)
    # 2. The reference values. Whether expired ones will do is the policy's.
    rims = tuple(memory.rims.authenticate(one, root=rim_roots, at=at) for one in evidence.rims)
    # 3. The policy, and whether an issuer took something back.
    result = appraise_gpu(claims, rims, policy)
    findings = (*result.findings, *_revocation(claims, rims, evidence.ocsp, policy, at))
    return GpuStatement(claims, conclude(result.claims, findings, result.submods))


def _roots(
    scheme: str, anchors: Anchors
) -> tuple[tuple[x509.Certificate, ...], tuple[x509.Certificate, ...]]:
    """Above the devices and above the reference values."""
    match scheme:
        case "nvidia_gpu":
            return anchors.nvidia_device, anchors.nvidia_rim
        case "simulated":
            return anchors.simulated_nvidia_device, anchors.simulated_nvidia_rim
        case unknown:
            raise Unauthentic(f"GPU evidence: no such scheme: {unknown[:64]}")


def _revocation(
    claims: NvidiaGpuClaims,
    rims: tuple[AuthenticatedRim, ...],
    responses: tuple[bytes, ...],
    policy: Policy,
    at: datetime.datetime,
) -> Iterator[Finding]:
    """Nobody answers for the published test root, so nobody is asked about it."""
    if claims.scheme == "simulated":
        return
    parts = [revocation.device_part(claims.path)]
    parts += [revocation.signer_part(rim.path) for rim in rims]
    seen: set[Finding] = set()
    for chain, issuers in parts:
        for finding in revocation.revocation_findings(
            chain, responses, issuers, policy.revocation, at
        ):
            if finding not in seen:  # the manifests' signers share their upper certificates
                seen.add(finding)
                yield finding
