"""Appraisal of a whole appliance: the numbered steps of protocol.md section 9.

The relying party runs this on what it fetched, the appliance on its own report before it serves
(boot stage 9), so that what we check is what we claim. A step that finds a lie raises at once, as
nothing after it would mean anything; what is true and not to the policy's liking is collected as
findings. Step 1, fetching with a fresh nonce, and step 10, receipts, are elsewhere.
"""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from appliance.config import Policy
from appliance.errors import Contraindicated, Stale, Unauthentic, Unbound
from appliance.rats import binding
from appliance.rats.gpus import GpuStatement, Memory, appraise_gpus, named, together
from appliance.rats.model import Anchors, CpuClaims
from appliance.rats.policy.cpu import NOT_COMPARED
from appliance.rats.policy.sev_snp import appraise_sev_snp
from appliance.rats.policy.tdx import appraise_tdx
from appliance.rats.policy.tpm import appraise_azure_vtpm, appraise_tpm2
from appliance.rats.reference import ImageReference, ReferenceValues
from appliance.rats.result import AttestationResult, Finding, Tier, conclude
from appliance.rats.schemes import azure_vtpm, sev_snp, tdx, tpm2
from appliance.wire.canonical import JsonObject, JsonValue
from appliance.wire.commitments import report_commitment
from appliance.wire.encoding import format_sha256
from appliance.wire.evidence import CpuEvidence
from appliance.wire.report import Report

MAX_KEYSET_S = 24 * 3600 + 5 * 60
"""A keyset ends at most this much later: a day, and what clocks differ by (protocol.md 9.7)."""

SIMULATED_TEE_TYPE = "unsafe_simulated"


@dataclass(frozen=True, slots=True)
class Context:
    """What an appraisal is made with: everything that is not evidence.

    Attributes:
        reference: None when the relying party has none; then nothing is affirmed.
        at: timezone-aware.
        memory: of one thread.
        claimed_image: what it means that an image of `[policy] images` is claimed and no
            measurement backs it. The appliance, which has no reference values for itself, makes
            it a warning in its self-check.
    """

    policy: Policy
    anchors: Anchors
    reference: ReferenceValues | None
    at: datetime.datetime
    memory: Memory = field(default_factory=Memory)
    claimed_image: Tier = Tier.CONTRAINDICATED


def appraise_report(
    report: Report, *, nonce: bytes | None, spki_sha256: bytes | None, context: Context
) -> AttestationResult:
    """Steps 2 to 9.

    Args:
        nonce: the 32 bytes that were asked with; None for the null form.
        spki_sha256: of the TLS key at the other end of the connection, 32 bytes; None where there
            was no connection (a bundle, or the appliance itself), and then not compared.

    Raises:
        Malformed: evidence inside does not parse.
        Unauthentic, Revoked, Stale, Unbound: a lie, or something out of its time.
    """
    # 2. W, I, subject, keyset digest, statement, report_data.
    binding.check_documents(report, nonce)
    # 3. CPU evidence: signed by the vendor's key, and about this keyset.
    image = _image(report, context.reference)
    cpu = _appraise_cpu(report, image, context)
    # 4. Provenance: step 3 compared what was quoted with the reference values of `image_digest`;
    #    here the documents must name that image, and the report the commit that they name.
    _check_commit(report)
    provenance = _provenance_findings(report, image, context.reference)
    # 5. Custody: that the keys were born in RAM and never left it follows from 3 and 4, because
    #    that is what the measured code does. There is nothing to compute.
    # 6. GPUs: fresh evidence in an epoch of this keyset, of the GPUs that the instance names.
    inclusion = report.gpu.inclusion
    if inclusion.kind != "report":
        raise Unbound(f"inclusion.kind: expected report, got {inclusion.kind}")
    binding.check_inclusion(inclusion, report_commitment(nonce), report.keyset_digest)
    binding.check_evidence_digest(report.gpu)
    gpus = appraise_gpus(
        report.gpu.gpus,
        nonce=inclusion.nonce,
        policy=context.policy,
        anchors=context.anchors,
        at=context.at,
        memory=context.memory,
    )
    check_instance(report, gpus)
    # 7. The keyset is in its time.
    _check_lifetime(report, context.at)
    # 8. The connection ends in the machine that holds a key of the keyset.
    if spki_sha256 is not None and spki_sha256 not in report.keyset.tls:
        raise Unbound(
            f"TLS key: expected {' or '.join(one.hex() for one in report.keyset.tls)}, "
            f"got {spki_sha256.hex()}: somebody stands between"
        )
    # 9. The workload is one that the policy accepts.
    workload = _workload_findings(report, context.policy)
    corroboration = _corroboration_findings(report, cpu, context)
    parts = {"CPU": cpu, **named(gpus)}
    findings = (
        *provenance,
        *workload,
        *corroboration,
        *_gpu_findings(gpus, context.policy),
        *_not_asked(nonce, spki_sha256),
    )
    return conclude(_claims(report), findings, parts)


def _appraise_cpu(
    report: Report, image: ImageReference | None, context: Context
) -> AttestationResult:
    evidence, accepted = report.cpu, context.policy.tee_types
    tee_type = SIMULATED_TEE_TYPE if evidence.scheme == "simulated" else evidence.scheme
    if report.tee_type != tee_type:
        raise Unbound(f"tee_type: expected {tee_type}, got {report.tee_type[:64]}")
    _refuse_simulation(tee_type, accepted)
    claims = authenticate_cpu(evidence, anchors=context.anchors, at=context.at)
    binding.check_report_data(claims.report_data, report.report_data, what=evidence.scheme)
    result = judge_cpu(claims, image, context.policy)
    findings = (*result.findings, *_tee_type_findings(tee_type, accepted))
    return conclude(result.claims, findings, result.submods)


def _refuse_simulation(tee_type: str, accepted: tuple[str, ...]) -> None:
    """Said plainly, before its root is not found among the pinned ones."""
    if tee_type == SIMULATED_TEE_TYPE and tee_type not in accepted:
        raise Contraindicated(
            "tee_type: expected evidence of a vendor's, got simulated hardware: anyone can make it"
        )


def _tee_type_findings(tee_type: str, accepted: tuple[str, ...]) -> Iterator[Finding]:
    if tee_type not in accepted:
        yield Finding(
            Tier.CONTRAINDICATED,
            "report.tee_type",
            " or ".join(accepted) or "none",
            tee_type,
            "Use a machine with one of these; `[policy] tee_types` lists them.",
        )


def authenticate_cpu(
    evidence: CpuEvidence, *, anchors: Anchors, at: datetime.datetime
) -> CpuClaims:
    """What the vendor's key signed, by the scheme that the evidence names.

    Raises:
        Malformed, Unauthentic, Revoked, Stale, Unbound.
    """
    match evidence.scheme:
        case "sev_snp":
            return sev_snp.authenticate(evidence, roots=anchors.amd, at=at)
        case "simulated":
            scheme = _simulated("appliance.rats.schemes.simulated")
            return cast(CpuClaims, scheme.authenticate_cpu(evidence, anchors=anchors, at=at))
        case "tdx":
            return tdx.authenticate(evidence, intel_root=anchors.intel_root, at=at)
        case "azure_vtpm":
            return azure_vtpm.authenticate(evidence, anchors=anchors, at=at)
        case "tpm2":
            return tpm2.authenticate(evidence, roots=anchors.tpm, at=at)
        case unknown:
            raise Unauthentic(f"CPU evidence: no such scheme: {unknown[:64]}")


def _simulated(module: str) -> Any:
    """A module for simulated hardware; the production image has none of them."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise Unauthentic("CPU evidence: no such scheme: simulated") from None


def _image(report: Report, reference: ReferenceValues | None) -> ImageReference | None:
    digest = report.provenance.get("image_digest")
    if reference is None or not isinstance(digest, str):
        return None
    return reference.of(digest)


def _check_commit(report: Report) -> None:
    claimed, named = report.provenance.get("repo_commit"), _member(report.workload, "image")
    if claimed != named.get("commit"):
        raise Unbound(
            f"source_provenance.repo_commit: expected {named.get('commit')}, "
            f"got {str(claimed)[:80]}"
        )


def _provenance_findings(
    report: Report, image: ImageReference | None, reference: ReferenceValues | None
) -> Iterator[Finding]:
    """That reference values are missing altogether is a finding on the CPU evidence already."""
    if reference is None:
        return
    if image is None:
        yield Finding(
            Tier.CONTRAINDICATED,
            "report.image_digest",
            "an image of the reference values",
            str(report.provenance.get("image_digest"))[:80],
            "Get the reference values of this release, or run a release that is known.",
        )
        return
    manifest = report.workload.get("image")
    claimed = manifest if isinstance(manifest, dict) else {}
    for name, known in (
        ("version", image.version),
        ("commit", image.commit),
        ("roothash", image.roothash),
    ):
        if known is not None and claimed.get(name) != known:
            yield Finding(
                Tier.CONTRAINDICATED,
                f"report.image.{name}",
                known,
                str(claimed.get(name))[:80],
                "The manifest names another build than the image digest: do not trust it.",
            )


def check_instance(report: Report, gpus: tuple[GpuStatement, ...]) -> None:
    """The GPUs that gave evidence are those of the instance document, one to one, in its order."""
    listed = report.instance.get("gpus")
    expected = [
        (one.get("scheme"), one.get("device_cert_sha256"), one.get("ueid"))
        for one in (listed if isinstance(listed, list) else [])
        if isinstance(one, dict)
    ]
    got = [
        (one.claims.scheme, one.claims.device_certificate_sha256, one.claims.ueid) for one in gpus
    ]
    if expected != got or not isinstance(listed, list) or len(listed) != len(gpus):
        raise Unbound(
            f"instance.gpus: expected the {len(expected)} GPUs of the instance document, "
            f"got evidence of {len(got)} others"
        )
    if len(set(got)) != len(got):
        raise Unbound("instance.gpus: expected every GPU once")


def _check_lifetime(report: Report, at: datetime.datetime) -> None:
    now, not_after = at.timestamp(), report.keyset.not_after
    if not now < not_after:
        raise Stale(f"keyset: expected not_after later than {now:.0f}, got {not_after}")
    if not_after > now + MAX_KEYSET_S:
        raise Stale(f"keyset: expected not_after within a day of {now:.0f}, got {not_after}")


def _workload_findings(report: Report, policy: Policy) -> Iterator[Finding]:
    model, engine = (_member(report.workload, name) for name in ("model", "engine"))
    rows = (
        ("image_digest", policy.images, report.provenance.get("image_digest")),
        ("model.digest", policy.models, model.get("digest")),
        ("engine.settings_digest", policy.engine_settings, engine.get("settings_digest")),
    )
    for name, accepted, got in rows:
        if accepted and got not in accepted:
            yield Finding(
                Tier.CONTRAINDICATED,
                f"report.{name}",
                " or ".join(accepted),
                str(got)[:80],
                "Use an appliance with one of these, or change the policy.",
            )
    if policy.deterministic == "required" and engine.get("deterministic") is not True:
        yield Finding(
            Tier.CONTRAINDICATED,
            "report.engine.deterministic",
            "true",
            str(engine.get("deterministic"))[:80],
            "Use an appliance whose engine is set to be deterministic.",
        )


def _corroboration_findings(
    report: Report, cpu: AttestationResult, context: Context
) -> Iterator[Finding]:
    """An image that the policy names must be the one that was measured: "a provenance claim no
    measurement backs MUST NOT satisfy this check" (aci/1 section 9.1, 4). One is backed when every
    measurement that step 3 needs was compared with what the reference values have for it. What the
    report says besides is told to be no more than that."""
    accepted, claimed = context.policy.images, report.provenance.get("image_digest")
    image = _image(report, context.reference)
    backed = image is not None and all(one.got != NOT_COMPARED for one in cpu.all_findings())
    if claimed in accepted and not backed:  # another one is a finding already
        yield Finding(
            context.claimed_image,
            "report.image_digest.claimed",
            "measurements that the reference values give for this image",
            f"{str(claimed)[:80]}, claimed and not compared",
            "Give the reference values of the images that the policy accepts.",
        )
    told = ["repo_url", "image_provenance"]
    if not accepted and not backed:
        told.append("image_digest")
    if words := [name for name in told if report.provenance.get(name) is not None]:
        yield Finding(
            Tier.AFFIRMING,
            "report.source_provenance",
            "what measurements back",
            f"{', '.join(words)}: the word of whoever made the report",
            "Look for it in the reference values of the release, and not in the report.",
        )


def _not_asked(nonce: bytes | None, spki_sha256: bytes | None) -> Iterator[Finding]:
    """What no verdict on this report covers, whatever the report says: the caller had nothing to
    compare with. A bundle's verdict stays what it is, and says so."""
    if nonce is None:
        yield Finding(
            Tier.AFFIRMING,
            "report.freshness",
            "evidence over a nonce of the asker's",
            "the null form, which may be as old as its keyset",
            "Ask with a fresh nonce where it matters that the evidence is new.",
        )
    if spki_sha256 is None:
        yield Finding(
            Tier.AFFIRMING,
            "report.tls",
            "the TLS key of the connection",
            "no connection to compare with",
            "Verify the appliance itself before anything is sent to it.",
        )


def _gpu_findings(gpus: tuple[GpuStatement, ...], policy: Policy) -> Iterator[Finding]:
    yield from together(gpus)
    if len(gpus) >= policy.min_gpus:
        return
    if gpus:
        yield Finding(
            Tier.CONTRAINDICATED,
            "report.gpus",
            f"at least {policy.min_gpus} GPUs",
            str(len(gpus)),
            "Use an appliance with more GPUs, or lower `[policy] min_gpus`.",
        )
        return
    allowed = policy.gpus == "unsafe_none"
    yield Finding(
        Tier.WARNING if allowed else Tier.CONTRAINDICATED,
        "report.gpus",
        "at least one GPU",
        "none",
        "Without a GPU the engine computes on the CPU: only its evidence says anything."
        if allowed
        else 'Use an appliance with GPUs; only `gpus = "unsafe_none"` accepts one without.',
    )


def _claims(report: Report) -> JsonObject:
    """The documents that the evidence binds, and their digests."""
    receipt_keys: list[JsonValue] = [key.to_json() for key in report.keyset.receipt_keys]
    return {
        "workload_keyset_digest": format_sha256(report.keyset_digest),
        "subject": report.keyset.subject,
        "not_after": report.keyset.not_after,
        "tee_type": report.tee_type,
        "source_provenance": report.provenance,
        "workload": report.workload,
        "instance": report.instance,
        "receipt_signing_keys": receipt_keys,
    }


def _member(document: JsonObject, name: str) -> JsonObject:
    value = document.get(name)
    return value if isinstance(value, dict) else {}


def judge_cpu(claims: CpuClaims, image: ImageReference | None, policy: Policy) -> AttestationResult:
    """Hold authentic CPU claims to the policy and to the reference values of an image."""
    match claims:
        case sev_snp.SevSnpClaims():
            reference = None if image is None else image.sev_snp.get("measurement", frozenset())
            return appraise_sev_snp(claims, policy, reference=reference, report_data=None)
        case tdx.TdxClaims():
            table = None if image is None else image.tdx
            return appraise_tdx(claims, policy, reference=table, report_data=None)
        case azure_vtpm.AzureVtpmClaims():
            return appraise_azure_vtpm(claims, policy, reference=image, report_data=None)
        case tpm2.TpmClaims():
            pcrs = None if image is None else image.pcrs
            return appraise_tpm2(claims, policy, reference=pcrs, report_data=None)
        case simulated if simulated.scheme == "simulated":
            reference = None if image is None else image.sev_snp.get("measurement", frozenset())
            rules = _simulated("appliance.rats.policy.simulated")
            result = rules.appraise_simulated_cpu(claims, policy, reference=reference)
            return cast(AttestationResult, result)
        case other:
            raise TypeError(f"no policy for {type(other).__name__}")
