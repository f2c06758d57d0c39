"""Raw CPU and TPM evidence, from files to a verdict, offline.

The policy is neutral: any privilege level and firmware, and whether somebody was asked about
revocation is not judged, as there is no argument to say so with. What never passes is what makes
all else meaningless: debugging, migration, a status of Intel's that says that the platform is out
of date. Only `tpm` has reference values to compare with; of the rest the best verdict is a warning.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace

from appliance.config import Policy
from appliance.rats import chain
from appliance.rats.model import Anchors
from appliance.rats.policy.sev_snp import appraise_sev_snp
from appliance.rats.policy.tdx import appraise_tdx
from appliance.rats.policy.tpm import appraise_azure_vtpm, appraise_tpm2
from appliance.rats.reference import ReferenceValues
from appliance.rats.result import SEVERITY, AttestationResult, conclude
from appliance.rats.schemes import azure_vtpm, sev_snp, tdx, tpm2
from appliance.verifier.raw_evidence import decode, split_certificates
from appliance.wire.azure_json import parse_azure_json
from appliance.wire.canonical import JsonObject
from appliance.wire.tpm import PCRS, parse_pcrs, parse_quote

NEUTRAL = Policy(vmpl=(0, 1, 2, 3), secure_boot="unsafe_any")
"""A VM without Secure Boot is told of, as a warning."""

REPORT_DATA_BYTES = (32, 48, 64)
"""A digest by SHA-256, SHA-384 or SHA-512; zeros behind it up to 64 bytes."""

QUALIFYING_DATA_BYTES = range(67)

NOT_ASKED = frozenset({"sev_snp.revocation"})
"""Findings on what no argument of these commands could have given. A list that is there (Azure
evidence may hold one) has been looked at before any finding is made."""


def appraise_sev_snp_files(
    report: bytes,
    vek: bytes,
    authorities: Sequence[bytes],
    report_data: bytes | None,
    *,
    anchors: Anchors,
    at: datetime.datetime,
) -> AttestationResult:
    """One SEV-SNP report, of 1184 bytes.

    Args:
        vek: the file of the VCEK's or VLEK's certificate; issuers may follow it, as clouds hand
            it out.
        authorities: files of issuers' certificates. AMD's are pinned, so none is needed.
        report_data: that REPORT_DATA must be.

    Raises:
        Malformed, Unauthentic, Revoked, Stale.
    """
    own, *others = split_certificates(vek, field="vek")
    for data in authorities:
        others += split_certificates(data, field="ca")
    claims = sev_snp.authenticate_report(
        decode(report, field="report"),
        vek=sev_snp.load_vek(own),
        # A chain as clouds hand it out begins with the VEK, also where only its issuers are meant.
        authorities=[chain.parse_der_certificate(one, field="ca") for one in others if one != own],
        crl=None,
        roots=anchors.amd,
        at=at,
    )
    result = appraise_sev_snp(claims, NEUTRAL, reference=None, report_data=report_data)
    return _told(result, report_data_compared=report_data is not None)


def appraise_tdx_files(
    quote: bytes,
    collateral: bytes,
    report_data: bytes | None,
    *,
    anchors: Anchors,
    at: datetime.datetime,
) -> AttestationResult:
    """One TD quote, under Intel's collateral: JSON in the shape of `QuoteCollateralV3`.

    Raises:
        Malformed, Unauthentic, Revoked, Stale, Contraindicated.
    """
    claims = tdx.authenticate_quote(
        decode(quote, field="quote"), collateral, intel_root=anchors.intel_root, at=at
    )
    result = appraise_tdx(claims, NEUTRAL, reference=None, report_data=report_data)
    return _told(result, report_data_compared=report_data is not None)


def appraise_azure_file(
    evidence: bytes,
    collateral: bytes | None,
    nonce: bytes | None,
    *,
    anchors: Anchors,
    at: datetime.datetime,
) -> AttestationResult:
    """An Azure machine's evidence in one JSON file, see `wire.azure_json`.

    Args:
        collateral: Intel's, which the shapes that other tools write have no place for; of a TDX
            machine it must be here or in the file.
        nonce: that the TPM quote's qualifying data must be, all of them.

    Raises:
        Malformed, Unauthentic, Revoked, Stale, Unbound, Contraindicated.
    """
    parsed = parse_azure_json(evidence)
    if collateral is not None:
        parsed = replace(parsed, endorsements={**parsed.endorsements, "collateral": collateral})
    claims = azure_vtpm.authenticate(parsed, anchors=anchors, at=at)
    result = appraise_azure_vtpm(claims, NEUTRAL, reference=None, report_data=nonce)
    return _told(result, nonce_compared=nonce is not None)


def appraise_tpm_files(
    files: Mapping[str, bytes], reference: ReferenceValues | None
) -> AttestationResult:
    """A TPM's quote, by a key that the caller vouches for.

    Args:
        files: `quote`, `signature`, `ak`, `pcrs`, and `event_log` where there is one.
        reference: values of images; the quote is compared with each and the best result counts.

    Raises:
        Malformed, Unauthentic, Unbound.
    """
    decoded = {name: decode(data, field=name) for name, data in files.items()}
    # 1. The key, and its signature over the quote.
    key = tpm2.parse_public_key(decoded["ak"])
    pcrs = _pcrs(decoded["pcrs"], decoded["quote"])
    claims = tpm2.authenticate_quote(decoded["quote"], decoded["signature"], key, pcrs)
    # 2. The log, which must give the quoted values.
    if "event_log" in decoded:
        claims = tpm2.with_event_log(claims, decoded["event_log"])
    # 3. The reference values.
    if reference is None:
        return _told(appraise_tpm2(claims, NEUTRAL, reference=None, report_data=None))
    results = [
        _told(
            appraise_tpm2(claims, NEUTRAL, reference=one.pcrs, report_data=None),
            image_digest=one.image_digest,
        )
        for one in reference.images
    ]
    return min(results, key=lambda one: (SEVERITY[one.verdict], len(one.findings)))


def _pcrs(data: bytes, quote: bytes) -> dict[int, bytes]:
    """The values of a file. In a row they name no PCR: then they are the quoted ones, or all 24
    where there are as many. What the quote says is used for this before it is authenticated, and
    compared after that."""
    selected = tpm2.selected_pcrs(parse_quote(quote))
    return parse_pcrs(data, selected=range(PCRS) if len(data) == 32 * PCRS else selected)


def _told(result: AttestationResult, **context: bool | str) -> AttestationResult:
    """Without what was not asked, and with what the evidence was held to."""
    claims: JsonObject = result.claims | dict(context)
    return conclude(
        claims,
        [one for one in result.findings if one.check not in NOT_ASKED],
        {name: _told(part) for name, part in result.submods.items()},
    )
