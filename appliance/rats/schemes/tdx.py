"""Intel TDX: a quote and Intel's collateral to claims.

The verification itself is `dcap-qvl` 0.7: the quote's signature, the quoting enclave's identity,
the platform's certificates and both revocation lists, the TCB level, all under the root that is
given here and at the time that is given here. The quote is parsed a second time by `wire.tdx`,
and both readings must agree in every field, so that what is appraised is what was verified.

Sources: Intel TDX DCAP Quoting Library API (what a quote is signed with), Intel PCS API version 4
(collateral).

`dcap-qvl` says why it refuses in English only. The sentences below are those of the pinned
release; one that is not known is Unauthentic. It also applies a policy of its own that cannot be
switched off, after everything else: a TD whose attributes it calls unsafe (debug, profiling,
migration, no SEPT_VE_DISABLE) or that has a service TD is refused here as Contraindicated, by
name.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass

import dcap_qvl  # type: ignore[import-untyped]

from appliance.errors import Contraindicated, EvidenceError, Malformed, Revoked, Stale, Unauthentic
from appliance.wire.canonical import JsonObject, JsonValue, parse_json
from appliance.wire.evidence import CpuEvidence
from appliance.wire.tdx import Quote, TdAttributes, TdReport, parse_quote

MAX_COLLATERAL_BYTES = 1 << 20
"""The largest part is the revocation list of the platform's issuer, some 200 KiB of hex."""

_COLLATERAL_KEYS = frozenset(
    {
        "pck_crl_issuer_chain",
        "root_ca_crl",
        "pck_crl",
        "tcb_info_issuer_chain",
        "tcb_info",
        "tcb_info_signature",
        "qe_identity_issuer_chain",
        "qe_identity",
        "qe_identity_signature",
    }
)
_OPTIONAL_COLLATERAL_KEY = "pck_certificate_chain"

# What `dcap-qvl` says once everything else has been verified: (check, expected, got).
_REFUSED_ATTRIBUTES = {
    "Debug mode is enabled": "tdx.debug: expected td_attributes.debug 0, got 1",
    "TD migration is enabled": "tdx.migratable: expected td_attributes.migratable 0, got 1",
    "TD profiling is enabled": "tdx.profiling: expected no profiling in td_attributes",
    "SERVTD_EXT is enabled": "tdx.servtd_ext: expected td_attributes.servtd_ext 0, got 1",
    "SEPT_VE_DISABLE is not enabled": (
        "tdx.sept_ve_disable: expected td_attributes.sept_ve_disable 1, got 0"
    ),
    "Reserved bits in TD attributes are set": (
        "tdx.td_attributes: expected reserved bits of td_attributes to be zero"
    ),
    "Invalid MR service TD": "tdx.mr_service_td: expected no service TD",
}
_REVOKED = ("CertRevoked", "TCB status is invalid: Revoked")
_STALE = (
    "CrlExpired",
    "CertExpired",
    "CertNotValidYet",
    "TCBInfo expired",
    "TCBInfo issue date is in the future",
    "QE Identity expired",
    "QE Identity issue date is in the future",
)


@dataclass(frozen=True, slots=True)
class TdxClaims:
    """What Intel's quoting enclave signed about one TD, and what Intel says about the platform.

    Attributes:
        quote: as it was verified.
        report: its body.
        tcb_status: Intel's word on platform and quoting enclave together, such as `UpToDate`.
        advisory_ids: Intel's security advisories that apply, `INTEL-SA-…`.
        fmspc: the kind of platform, lowercase hex.
        tcb_evaluation_data_number: the edition of Intel's TCB table.
        collateral_until: when the TCB table expires, as Intel wrote it.
    """

    quote: Quote
    report: TdReport
    tcb_status: str
    advisory_ids: tuple[str, ...]
    fmspc: str
    tcb_evaluation_data_number: int
    collateral_until: str

    @property
    def scheme(self) -> str:
        """The name of the kind of evidence."""
        return "tdx"

    @property
    def report_data(self) -> bytes:
        """REPORTDATA, 64 bytes."""
        return self.report.report_data

    @property
    def measurements(self) -> dict[str, str]:
        """`mrtd` and `rtmr0` to `rtmr3`."""
        report = self.report
        return {
            "mrtd": report.mr_td.hex(),
            "rtmr0": report.rt_mr0.hex(),
            "rtmr1": report.rt_mr1.hex(),
            "rtmr2": report.rt_mr2.hex(),
            "rtmr3": report.rt_mr3.hex(),
        }

    def to_json(self) -> JsonObject:
        """Every claim; byte strings as lowercase hex, in the quote's own order of bytes."""
        advisories: list[JsonValue] = list(self.advisory_ids)
        attributes: JsonObject = {
            bit.name.lower(): bit in self.report.attributes
            for bit in TdAttributes
            if bit.name is not None
        }
        body: JsonObject = {name: value.hex() for name, value in self.report.items().items()}
        return {
            "scheme": self.scheme,
            "quote_version": self.quote.header.version,
            "tcb_status": self.tcb_status,
            "advisory_ids": advisories,
            "fmspc": self.fmspc,
            "tcb_evaluation_data_number": self.tcb_evaluation_data_number,
            "collateral_until": self.collateral_until,
            "attributes": attributes,
            **body,
        }


def authenticate(evidence: CpuEvidence, *, intel_root: bytes, at: datetime.datetime) -> TdxClaims:
    """Hold a quote to Intel's pinned root.

    Args:
        evidence: part `quote`; endorsement `collateral`.
        intel_root: Intel SGX Root CA, DER.
        at: timezone-aware.

    Raises:
        Malformed: a part does not parse.
        Unauthentic, Revoked, Stale, Contraindicated: as for `authenticate_quote`; Unauthentic
            also when there is no collateral.
    """
    collateral = evidence.endorsements.get("collateral")
    if collateral is None:
        raise Unauthentic("tdx: expected Intel's collateral for this platform (`collateral`)")
    return authenticate_quote(evidence.parts["quote"], collateral, intel_root=intel_root, at=at)


def authenticate_quote(
    quote: bytes, collateral: bytes, *, intel_root: bytes, at: datetime.datetime
) -> TdxClaims:
    """Hold one quote to Intel's pinned root.

    Args:
        quote: a TD's, format 4 or 5, with any padding.
        collateral: JSON in the shape of `QuoteCollateralV3`: certificate chains as PEM, lists and
            signatures as hex, TCB info and QE identity as the texts that Intel signed.
        intel_root: Intel SGX Root CA, DER.
        at: timezone-aware; seconds count.

    Raises:
        Malformed: the quote or the collateral does not parse.
        Unauthentic: a signature, a chain or an identity does not hold, the quote is not a TD's,
            or the two readings of it differ.
        Revoked: Intel revoked a certificate or the TCB level.
        Stale: `at` is outside the validity of the collateral or a certificate.
        Contraindicated: an authentic TD that `dcap-qvl` refuses to vouch for, debug by name.
    """
    # 1. Our own reading.
    parsed = parse_quote(quote)
    report = parsed.body
    if not isinstance(report, TdReport):
        raise Unauthentic("tdx: expected the quote of a TD, got that of an SGX enclave")
    document = _parse_collateral(collateral)
    # 2. Theirs, with every signature. It gets what we parsed: no padding, no second spelling.
    verified = _verify(parsed.raw, document, intel_root, at)
    # 3. Both must have read the same.
    _check_agreement(parsed, report, verified)
    # 4. The TCB table that was matched is authentic now; what names it is taken from it.
    table = json.loads(document["tcb_info"])
    return TdxClaims(
        quote=parsed,
        report=report,
        tcb_status=verified.status,
        advisory_ids=tuple(verified.advisory_ids),
        fmspc=str(table["fmspc"]).lower(),
        tcb_evaluation_data_number=int(table["tcbEvaluationDataNumber"]),
        collateral_until=str(table["nextUpdate"]),
    )


def _parse_collateral(data: bytes) -> dict[str, str]:
    if len(data) > MAX_COLLATERAL_BYTES:
        raise Malformed(
            f"collateral: expected at most {MAX_COLLATERAL_BYTES} bytes", field="collateral"
        )
    document = parse_json(data, max_nesting=2)
    if not isinstance(document, dict):
        raise Malformed("collateral: expected an object", field="collateral")
    texts: dict[str, str] = {}
    for key, value in document.items():
        if key == _OPTIONAL_COLLATERAL_KEY and value is None:
            continue
        if key not in _COLLATERAL_KEYS | {_OPTIONAL_COLLATERAL_KEY}:
            raise Malformed("collateral: unknown key", field=f"collateral.{key[:64]}")
        if not isinstance(value, str):
            raise Malformed("collateral: expected a text", field=f"collateral.{key}")
        texts[key] = value
    if missing := sorted(_COLLATERAL_KEYS - texts.keys()):
        raise Malformed(f"collateral: expected {missing[0]}", field=f"collateral.{missing[0]}")
    return texts


def _verify(
    raw: bytes, document: dict[str, str], intel_root: bytes, at: datetime.datetime
) -> dcap_qvl.VerifiedReport:
    try:
        collateral = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(document))
    except ValueError:
        raise Malformed("collateral: expected hex where bytes stand", field="collateral") from None
    # No collateral is older than 1970; a clock that says so makes all of it invalid.
    seconds = max(0, int(at.timestamp()))
    try:
        return dcap_qvl.verify_with_root_ca(raw, collateral, intel_root, seconds)
    except ValueError as error:
        raise _refusal(str(error)) from None


def _refusal(message: str) -> EvidenceError:
    """Which class of failure an explanation of `dcap-qvl` is about.

    The first line is the step that failed. Only the lines after it can hold text from the
    evidence, and what they decide is under which name it is refused.
    """
    reason = message.removeprefix("Verification failed: ")
    step = reason.partition("\n")[0]
    if step in _REFUSED_ATTRIBUTES:
        return Contraindicated(_REFUSED_ATTRIBUTES[step])
    if any(one in reason for one in _REVOKED):
        return Revoked("tdx: Intel revoked a certificate or the TCB level of this platform")
    if any(one in reason for one in _STALE):
        return Stale("tdx: expected collateral and certificates that are valid at this time")
    return Unauthentic(f"tdx: expected a quote that verifies: {step[:200]}")


def _check_agreement(parsed: Quote, report: TdReport, verified: dcap_qvl.VerifiedReport) -> None:
    header = dcap_qvl.parse_quote(parsed.raw).header
    theirs = _flatten(json.loads(verified.to_json())["report"])
    ours = {name: value.hex() for name, value in report.items().items()}
    same_header = all(
        getattr(header, name) == getattr(parsed.header, name)
        for name in ("version", "attestation_key_type", "tee_type", "qe_svn", "pce_svn")
    )
    same_header &= bytes(header.qe_vendor_id) == parsed.header.qe_vendor_id
    same_header &= bytes(header.user_data) == parsed.header.user_data
    if theirs != ours or not same_header:
        raise Unauthentic("tdx: expected two readings of the quote to agree, they do not")


def _flatten(value: JsonValue) -> dict[str, str]:
    """The texts of nested objects by their own name: `{"TD15": {"base": {…}, …}}`."""
    texts: dict[str, str] = {}
    if isinstance(value, dict):
        for name, item in value.items():
            texts |= {name: item} if isinstance(item, str) else _flatten(item)
    return texts
