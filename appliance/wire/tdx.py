"""Intel TDX quotes: bytes to frozen values.

Sources: Intel TDX DCAP Quoting Library API, quote formats 4 and 5; Intel SGX ECDSA
QuoteLibReference, quote format 3; Intel TDX Module ABI Specification, ATTRIBUTES and
TDREPORT_STRUCT. Integers are little-endian.

Three formats are read: 3 (SGX only), 4 (SGX, TD 1.0) and 5 (SGX, TD 1.0, TD 1.5). A quote is a
header, a body that the attestation key signs together with the header, and the signature data:
signature, key, and what vouches for the key.

Intel's quoting service reserves room for the largest body and hands out shorter quotes with zeros
behind the signature data (a TD 1.0 quote of format 4 has 70 of them, other services fill up to
8000 bytes). The length of the quote is in the quote, so this parser reads them as padding: zeros
only, and bounded. `Quote.raw` is the quote without them. Anything else behind a quote is refused.

Nothing here is trustworthy before `rats.schemes.tdx` has had it verified.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from enum import IntFlag

from appliance.errors import Malformed
from appliance.wire.cursor import Cursor

MAX_QUOTE_BYTES = 64 << 10
"""Of a quote with its padding; real ones have 5 to 8 KiB."""

ECDSA_P256 = 2
TEE_SGX = 0x00000000
TEE_TDX = 0x00000081

QE_REPORT_CERTIFICATION_DATA = 6
"""The type of certification data that holds the quoting enclave's report."""

TD_REPORT_BYTES = 1024
LAST_TD_REPORT_VERSION = 1
"""Of REPORTTYPE: 0 is TD 1.0's, 1 is TD 1.5's."""

_TCB_INFO_BYTES, _TD_INFO_BYTES = 239, 512
_SGX_BODY_BYTES = 384
_BODY_SGX, _BODY_TD10, _BODY_TD15 = 1, 2, 3
_BODY_BYTES = {_BODY_SGX: _SGX_BODY_BYTES, _BODY_TD10: 584, _BODY_TD15: 648}
"""Format 5 has the type of its body in it; 1.5 with its extension (type 4) is not read here."""


class TdAttributes(IntFlag):
    """TDATTRIBUTES. Bits 7:0 (TUD) are those under which nothing about the TD can be trusted."""

    DEBUG = 1 << 0
    """The host may read and write the TD's memory."""
    HGS_PLUS_PROF = 1 << 4
    PERF_PROF = 1 << 5
    PMT_PROF = 1 << 6
    LASS = 1 << 27
    SEPT_VE_DISABLE = 1 << 28
    """A page that the host takes away ends the TD instead of telling it."""
    MIGRATABLE = 1 << 29
    """A migration TD may move it, with its memory, to another machine."""
    PKS = 1 << 30
    KL = 1 << 31
    TPA = 1 << 62
    PERFMON = 1 << 63


TUD_BITS = 0xFF


@dataclass(frozen=True, slots=True)
class QuoteHeader:
    """The first 48 bytes."""

    version: int
    attestation_key_type: int
    tee_type: int
    qe_svn: int
    pce_svn: int
    qe_vendor_id: bytes
    user_data: bytes


@dataclass(frozen=True, slots=True)
class TdReport:
    """The body of a TD's quote; TD 1.0, and with the last two fields TD 1.5.

    Attributes:
        tee_tcb_svn: security versions of the TDX module, 16 bytes.
        mr_seam, mr_signer_seam: the TDX module and who signed it, SHA-384.
        td_attributes: 8 bytes, as `TdAttributes` names them.
        mr_td: what the TD was built from.
        mr_config_id, mr_owner, mr_owner_config: what the host attached to it.
        rt_mr0, rt_mr1, rt_mr2, rt_mr3: run-time measurements.
        report_data: what the TD says, 64 bytes.
        tee_tcb_svn2, mr_service_td: None in TD 1.0.
    """

    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    td_attributes: bytes
    xfam: bytes
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rt_mr0: bytes
    rt_mr1: bytes
    rt_mr2: bytes
    rt_mr3: bytes
    report_data: bytes
    tee_tcb_svn2: bytes | None = None
    mr_service_td: bytes | None = None

    @property
    def attributes(self) -> TdAttributes:
        """TDATTRIBUTES as flags; bits that are not named are kept."""
        return TdAttributes(int.from_bytes(self.td_attributes, "little"))

    def items(self) -> dict[str, bytes]:
        """Every field that is there, by name."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class SgxReport:
    """The body of an enclave's quote: read so that it can be refused by name."""

    cpu_svn: bytes
    attributes: bytes
    mr_enclave: bytes
    mr_signer: bytes
    isv_prod_id: int
    isv_svn: int
    report_data: bytes


@dataclass(frozen=True, slots=True)
class CertificationData:
    """What vouches for a key; type 5 is a PEM chain, leaf first."""

    type: int
    data: bytes


@dataclass(frozen=True, slots=True)
class QuoteSignature:
    """The signature data.

    Attributes:
        signature: of header and body by `attestation_key`; r and s, 32 bytes each, big-endian.
        attestation_key: x and y on P-256, 32 bytes each, big-endian.
        qe_report: the quoting enclave's own, 384 bytes, which binds `attestation_key`.
        qe_report_signature: of `qe_report` by the platform's certified key.
        qe_authentication_data: what `qe_report` binds beside the key.
        certification_data: the certificates of the platform's key.
    """

    signature: bytes
    attestation_key: bytes
    qe_report: bytes
    qe_report_signature: bytes
    qe_authentication_data: bytes
    certification_data: CertificationData


@dataclass(frozen=True, slots=True)
class Quote:
    """One quote.

    Attributes:
        raw: its bytes, without padding.
        padding: how many zeros followed.
    """

    raw: bytes
    padding: int
    header: QuoteHeader
    body: TdReport | SgxReport
    signature: QuoteSignature


def parse_quote(data: bytes) -> Quote:
    """Read one quote, with any padding. It is not trustworthy yet.

    Raises:
        Malformed: too long or too short, an unknown format, TEE, body or key type, a length that
            does not fit, or a byte behind the quote that is not zero.
    """
    if len(data) > MAX_QUOTE_BYTES:
        raise Malformed(
            f"quote: expected at most {MAX_QUOTE_BYTES} bytes, got {len(data)}",
            field="quote",
            offset=0,
        )
    cursor = Cursor(data, "little")
    header = _header(cursor)
    body = _body(cursor, header)
    signature_bytes = cursor.unsigned(4, "signature_data_len")
    signature = _signature(cursor.sub(signature_bytes, "signature_data"), header.version)
    raw, padding = data[: cursor.offset], cursor.remaining
    cursor.zeros(padding, "padding")
    return Quote(raw, padding, header, body, signature)


def parse_td_report(data: bytes) -> TdReport:
    """Read a TDREPORT_STRUCT, which a TD gets from its module and has a quote made of: as a quote
    says it, TD 1.5's fields too.

    What it is worth is the quote's to say: only the machine that made it can check its MAC, and
    of that and of the machine's CPUSVN nothing is read.

    Raises:
        Malformed: another length, type or version, a reserved byte that is not zero, or a part
            that has not the digest that stands beside it.
    """
    cursor = Cursor(data, "little")
    # 1. REPORTMACSTRUCT.
    cursor.expect(bytes((TEE_TDX, 0)), "report_type")
    version = cursor.unsigned(1, "report_version")
    if version > LAST_TD_REPORT_VERSION:
        raise _at(2, "report_version", f"expected 0 or 1, got {version}")
    cursor.zeros(1 + 12, "reserved")
    cursor.take(16, "cpu_svn")
    tcb_info_hash = cursor.take(48, "tee_tcb_info_hash")
    td_info_hash = cursor.take(48, "tee_info_hash")
    report_data = cursor.take(64, "report_data")
    cursor.zeros(32, "reserved")
    cursor.take(32, "mac")
    # 2. TEE_TCB_INFO and TDINFO_STRUCT, whose digests the MAC is over.
    at = cursor.offset
    tcb_info = cursor.take(_TCB_INFO_BYTES, "tee_tcb_info")
    cursor.zeros(17, "reserved")
    td_info = cursor.take(_TD_INFO_BYTES, "td_info")
    cursor.end("td_report")
    if hashlib.sha384(tcb_info).digest() != tcb_info_hash:
        raise _at(at, "tee_tcb_info", "expected the digest beside it")
    if hashlib.sha384(td_info).digest() != td_info_hash:
        raise _at(at, "td_info", "expected the digest beside it")
    # 3. In the order of a quote: module, TD, report data, then what TD 1.5 adds to the first two.
    body = tcb_info[8:128] + td_info[:400] + report_data + tcb_info[128:144] + td_info[400:448]
    return _td_report(Cursor(body, "little"), _BODY_TD15)


def _header(cursor: Cursor) -> QuoteHeader:
    header = QuoteHeader(
        version=cursor.unsigned(2, "version"),
        attestation_key_type=cursor.unsigned(2, "attestation_key_type"),
        tee_type=cursor.unsigned(4, "tee_type"),
        qe_svn=cursor.unsigned(2, "qe_svn"),
        pce_svn=cursor.unsigned(2, "pce_svn"),
        qe_vendor_id=cursor.take(16, "qe_vendor_id"),
        user_data=cursor.take(20, "user_data"),
    )
    if header.version not in (3, 4, 5):
        raise _at(0, "version", f"expected 3, 4 or 5, got {header.version}")
    if header.attestation_key_type != ECDSA_P256:
        raise _at(
            2, "attestation_key_type", f"expected 2 (P-256), got {header.attestation_key_type}"
        )
    tees = (TEE_SGX,) if header.version == 3 else (TEE_SGX, TEE_TDX)
    if header.tee_type not in tees:
        raise _at(4, "tee_type", f"unknown to format {header.version}: {header.tee_type:#x}")
    return header


def _body(cursor: Cursor, header: QuoteHeader) -> TdReport | SgxReport:
    """Format 5 says which body follows and how long it is, the others by the TEE alone."""
    kind = _BODY_SGX if header.tee_type == TEE_SGX else _BODY_TD10
    if header.version == 5:
        at = cursor.offset
        kind = cursor.unsigned(2, "body_type")
        tee = {_BODY_SGX: TEE_SGX, _BODY_TD10: TEE_TDX, _BODY_TD15: TEE_TDX}.get(kind)
        if tee != header.tee_type:
            raise _at(at, "body_type", f"expected one of this TEE (1, 2 or 3), got {kind}")
        at = cursor.offset
        size = cursor.unsigned(4, "body_size")
        if size != _BODY_BYTES[kind]:
            raise _at(at, "body_size", f"expected {_BODY_BYTES[kind]}, got {size}")
    body = cursor.sub(_BODY_BYTES[kind], "body")
    return _sgx_report(body) if kind == _BODY_SGX else _td_report(body, kind)


def _td_report(cursor: Cursor, kind: int) -> TdReport:
    later = kind == _BODY_TD15
    report = TdReport(
        tee_tcb_svn=cursor.take(16, "tee_tcb_svn"),
        mr_seam=cursor.take(48, "mr_seam"),
        mr_signer_seam=cursor.take(48, "mr_signer_seam"),
        seam_attributes=cursor.take(8, "seam_attributes"),
        td_attributes=cursor.take(8, "td_attributes"),
        xfam=cursor.take(8, "xfam"),
        mr_td=cursor.take(48, "mr_td"),
        mr_config_id=cursor.take(48, "mr_config_id"),
        mr_owner=cursor.take(48, "mr_owner"),
        mr_owner_config=cursor.take(48, "mr_owner_config"),
        rt_mr0=cursor.take(48, "rt_mr0"),
        rt_mr1=cursor.take(48, "rt_mr1"),
        rt_mr2=cursor.take(48, "rt_mr2"),
        rt_mr3=cursor.take(48, "rt_mr3"),
        report_data=cursor.take(64, "report_data"),
        tee_tcb_svn2=cursor.take(16, "tee_tcb_svn2") if later else None,
        mr_service_td=cursor.take(48, "mr_service_td") if later else None,
    )
    cursor.end("body")
    return report


def _sgx_report(cursor: Cursor) -> SgxReport:
    cpu_svn = cursor.take(16, "cpu_svn")
    cursor.take(4 + 28, "misc_select")
    attributes = cursor.take(16, "attributes")
    mr_enclave = cursor.take(32, "mr_enclave")
    cursor.take(32, "reserved")
    mr_signer = cursor.take(32, "mr_signer")
    cursor.take(96, "reserved")
    report = SgxReport(
        cpu_svn=cpu_svn,
        attributes=attributes,
        mr_enclave=mr_enclave,
        mr_signer=mr_signer,
        isv_prod_id=cursor.unsigned(2, "isv_prod_id"),
        isv_svn=cursor.unsigned(2, "isv_svn"),
        report_data=cursor.take(60 + 64, "report_data")[60:],
    )
    cursor.end("body")
    return report


def _signature(cursor: Cursor, version: int) -> QuoteSignature:
    signature = cursor.take(64, "signature")
    attestation_key = cursor.take(64, "attestation_key")
    inner = cursor
    if version >= 4:
        # Formats 4 and 5 put what vouches for the key into certification data of its own type.
        at = cursor.offset
        kind = cursor.unsigned(2, "certification_data_type")
        if kind != QE_REPORT_CERTIFICATION_DATA:
            raise _at(at, "certification_data_type", f"expected 6, got {kind}")
        inner = cursor.sub(cursor.unsigned(4, "certification_data_len"), "certification_data")
        cursor.end("signature_data")
    qe_report = inner.take(_SGX_BODY_BYTES, "qe_report")
    qe_report_signature = inner.take(64, "qe_report_signature")
    authentication = inner.take(inner.unsigned(2, "qe_auth_data_len"), "qe_auth_data")
    certification = CertificationData(
        inner.unsigned(2, "pck_data_type"),
        inner.take(inner.unsigned(4, "pck_data_len"), "pck_data"),
    )
    inner.end("signature_data")
    return QuoteSignature(
        signature, attestation_key, qe_report, qe_report_signature, authentication, certification
    )


def _at(offset: int, field: str, what: str) -> Malformed:
    return Malformed(f"{field}: {what} at byte {offset}", field=field, offset=offset)
