"""AMD SEV-SNP: a report and AMD's certificates to claims.

Sources: AMD publications 56860 (SEV-SNP firmware ABI) and 57230 ("Versioned Chip Endorsement Key
(VCEK) Certificate and KDS Interface Specification": the certificates' extensions). A report is signed by a VEK: the chip's own key (VCEK, under the
ASK) or one that AMD lent to a cloud provider (VLEK, under the ASVK); both intermediates are under
the product line's root, the ARK, which is pinned.
"""

from __future__ import annotations

import datetime
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning

from appliance.errors import Revoked, Stale, Unauthentic
from appliance.rats import chain, revocation
from appliance.rats.model import AmdRoots
from appliance.wire.canonical import JsonObject, JsonValue
from appliance.wire.evidence import CpuEvidence
from appliance.wire.sev_snp import (
    AttestationReport,
    GuestPolicy,
    PlatformInfo,
    SigningKey,
    Tcb,
    parse_report,
    parse_tcb,
    product_of,
)

# 57230: the extensions of a VEK's certificate.
_PRODUCT_NAME = "1.3.6.1.4.1.3704.1.2"
_SVN = {
    "bootloader": "1.3.6.1.4.1.3704.1.3.1",
    "tee": "1.3.6.1.4.1.3704.1.3.2",
    "snp": "1.3.6.1.4.1.3704.1.3.3",
    "microcode": "1.3.6.1.4.1.3704.1.3.8",
}
_SVN_FMC = "1.3.6.1.4.1.3704.1.3.9"
_HWID = "1.3.6.1.4.1.3704.1.4"
_CSP_ID = "1.3.6.1.4.1.3704.1.5"

_PRODUCT_NAMES = {
    # product line: what a certificate's product name begins with, before the stepping
    "Milan": ("Milan",),
    "Genoa": ("Genoa", "Bergamo", "Siena"),
    "Turin": ("Turin",),
}
_HWID_BYTES = {"Milan": 64, "Genoa": 64, "Turin": 8}
"""Of a chip's identifier; CHIP_ID has 64, the rest of it zero."""

_CHIP_ID_BYTES = 64
_INTEGER, _OCTET_STRING, _IA5_STRING = 0x02, 0x04, 0x16

SERIAL_WARNING = "Parsed a serial number which wasn't positive"
"""How `cryptography` begins its complaint about AMD's certificates."""
_quiet = threading.Lock()


@dataclass(frozen=True, slots=True)
class SevSnpClaims:
    """What AMD's firmware signed about one guest.

    Attributes:
        product: the product line whose root signed: `Milan`, `Genoa` or `Turin`.
        report: the report, as it was signed.
        current_tcb, reported_tcb, committed_tcb, launch_tcb: in the product line's layout.
            REPORTED_TCB is the one that the certificate vouches for.
        csp_id: the cloud provider whose VLEK signed; None for a VCEK.
        revocation_checked: AMD's list was there, in time, and did not name the issuer.
        revocation_lapsed: why a list that was there does not count, which is its time.
    """

    product: str
    report: AttestationReport
    current_tcb: Tcb
    reported_tcb: Tcb
    committed_tcb: Tcb
    launch_tcb: Tcb
    csp_id: str | None
    revocation_checked: bool
    revocation_lapsed: str | None = None

    @property
    def scheme(self) -> str:
        """The name of the kind of evidence."""
        return "sev_snp"

    @property
    def report_data(self) -> bytes:
        """REPORT_DATA, 64 bytes."""
        return self.report.report_data

    @property
    def measurements(self) -> dict[str, str]:
        """The launch digest, as `measurement`."""
        return {"measurement": self.report.measurement.hex()}

    def to_json(self) -> JsonObject:
        """Every claim; byte strings as lowercase hex."""
        report = self.report
        cpuid: JsonObject | None = None
        if report.cpuid is not None:
            family, model, stepping = report.cpuid
            cpuid = {"family": family, "model": model, "stepping": stepping}
        return {
            "scheme": self.scheme,
            "product": self.product,
            "version": report.version,
            "guest_svn": report.guest_svn,
            "policy": _policy_json(report.policy),
            "family_id": report.family_id.hex(),
            "image_id": report.image_id.hex(),
            "vmpl": report.vmpl,
            "platform_info": _platform_json(report.platform_info),
            "author_key_en": report.author_key_en,
            "mask_chip_key": report.mask_chip_key,
            "signing_key": report.signing_key.name,
            "csp_id": self.csp_id,
            "report_data": report.report_data.hex(),
            "measurement": report.measurement.hex(),
            "host_data": report.host_data.hex(),
            "id_key_digest": report.id_key_digest.hex(),
            "author_key_digest": report.author_key_digest.hex(),
            "report_id": report.report_id.hex(),
            "report_id_ma": report.report_id_ma.hex(),
            "current_tcb": _tcb_json(self.current_tcb),
            "reported_tcb": _tcb_json(self.reported_tcb),
            "committed_tcb": _tcb_json(self.committed_tcb),
            "launch_tcb": _tcb_json(self.launch_tcb),
            "cpuid": cpuid,
            "chip_id": report.chip_id.hex(),
            "current_version": str(report.current_version),
            "committed_version": str(report.committed_version),
            "launch_mit_vector": _hex64(report.launch_mit_vector),
            "current_mit_vector": _hex64(report.current_mit_vector),
            "revocation_checked": self.revocation_checked,
        }


def authenticate(
    evidence: CpuEvidence, *, roots: tuple[AmdRoots, ...], at: datetime.datetime
) -> SevSnpClaims:
    """Hold a report to AMD's pinned roots.

    Args:
        evidence: part `report`; endorsements `vek` (one DER certificate), and where there are any
            `authorities` (PEM, issuers below the root) and `crl` (DER).
        roots: the pinned ones.
        at: timezone-aware.

    Raises:
        Malformed: a part does not parse.
        Unauthentic, Revoked, Stale: as for `authenticate_report`; Unauthentic also when there is
            no VEK certificate.
    """
    vek = evidence.endorsements.get("vek")
    if vek is None:
        raise Unauthentic("sev_snp: expected the certificate of the key that signed (`vek`)")
    pem = evidence.endorsements.get("authorities")
    return authenticate_report(
        evidence.parts["report"],
        vek=load_vek(vek),
        authorities=() if pem is None else chain.parse_pem_chain(pem, field="authorities"),
        crl=evidence.endorsements.get("crl"),
        roots=roots,
        at=at,
    )


def authenticate_report(
    report: bytes,
    *,
    vek: x509.Certificate,
    authorities: Sequence[x509.Certificate],
    crl: bytes | None,
    roots: tuple[AmdRoots, ...],
    at: datetime.datetime,
) -> SevSnpClaims:
    """Hold one report, 1184 bytes, to AMD's pinned roots.

    Args:
        report: as the firmware wrote it.
        vek: certificate of the key that signed, from `load_vek`.
        authorities: issuers that came with the evidence. Each must be a pinned certificate or be
            issued by a pinned ARK; the pinned ones are used where they fit.
        crl: AMD's revocation list for the product line, DER.
        roots: the pinned ones.
        at: timezone-aware.

    Raises:
        Malformed: the report, an extension or the revocation list does not parse.
        Unauthentic: the certificate is not AMD's, is about another product, chip, firmware or
            kind of key than the report, the signature is bad, or the list is not the ARK's.
        Revoked: AMD took the issuer of the certificate back.
        Stale: `at` is outside the validity of a certificate.
    """
    parsed = parse_report(report)
    # 1. Whose key: a path from the VEK to the ARK of one product line.
    line, path = _authenticate_vek(vek, authorities, roots, at)
    # 2. Revocation, where AMD's list is at hand. Whether it must be, and in time, is policy: whoever
    #    could hand out an old list could as well hand out none.
    lapsed = None if crl is None else _check_revocation(path, crl, at)
    # 3. The signature, before anything that the report says is used.
    _check_signature(parsed, vek)
    # 4. The certificate is about this product, kind of key, chip and firmware.
    extensions = _VekExtensions.of(vek, line.product)
    _check_product(parsed, extensions, line.product)
    _check_signing_key(parsed, extensions)
    _check_chip(parsed, extensions)
    reported = parse_tcb(parsed.reported_tcb, product=line.product, field="reported_tcb")
    if reported != extensions.tcb:
        raise Unauthentic(
            f"sev_snp: expected REPORTED_TCB as certified, {_spell(extensions.tcb)}, "
            f"got {_spell(reported)}"
        )
    return SevSnpClaims(
        product=line.product,
        report=parsed,
        current_tcb=parse_tcb(parsed.current_tcb, product=line.product, field="current_tcb"),
        reported_tcb=reported,
        committed_tcb=parse_tcb(parsed.committed_tcb, product=line.product, field="committed_tcb"),
        launch_tcb=parse_tcb(parsed.launch_tcb, product=line.product, field="launch_tcb"),
        csp_id=extensions.csp_id,
        revocation_checked=crl is not None and lapsed is None,
        revocation_lapsed=lapsed,
    )


def load_vek(der: bytes) -> x509.Certificate:
    """The certificate of a VEK. It is not trustworthy yet.

    AMD gives every VEK the serial number 0, which RFC 5280 section 4.1.2.2 forbids. `cryptography`
    50 loads such a certificate with a warning, which is silenced here and nowhere else; a later
    release will refuse it, which is why its version is pinned.

    Raises:
        Malformed: it does not parse.
    """
    # The filters belong to the whole process: one thread at a time may replace and restore them.
    with _quiet, warnings.catch_warnings():
        warnings.filterwarnings("ignore", SERIAL_WARNING, CryptographyDeprecationWarning)
        return chain.parse_der_certificate(der, field="vek")


def split_vek_pem(pem: bytes) -> tuple[bytes, bytes]:
    """A PEM text that begins with a VEK's certificate, as clouds hand it out, in the two forms
    that evidence has: `vek` (DER) and `authorities` (PEM of the rest, empty where there is none).

    Raises:
        Malformed: no certificate, too many, or one that does not parse.
    """
    with _quiet, warnings.catch_warnings():
        warnings.filterwarnings("ignore", SERIAL_WARNING, CryptographyDeprecationWarning)
        vek, *others = chain.parse_pem_chain(pem, field="vek")
    return chain.der_of(vek), b"".join(one.public_bytes(Encoding.PEM) for one in others)


@dataclass(frozen=True, slots=True)
class _VekExtensions:
    """What AMD certifies about a VEK: exactly one of `hwid` and `csp_id` is there."""

    product_name: str
    tcb: Tcb
    hwid: bytes | None
    csp_id: str | None

    @classmethod
    def of(cls, vek: x509.Certificate, product: str) -> _VekExtensions:
        """Read them from a certificate whose path has been checked.

        Raises:
            Unauthentic: one is missing, or not what the specification makes it.
        """
        values = {
            one.oid.dotted_string: one.value.value
            for one in vek.extensions
            if isinstance(one.value, x509.UnrecognizedExtension)
        }
        svns = {name: _svn(values, oid) for name, oid in _SVN.items()}
        fmc = _svn(values, _SVN_FMC) if product == "Turin" else None
        hwid = None
        if _HWID in values:
            hwid = _octets(values[_HWID], _HWID_BYTES.get(product, _CHIP_ID_BYTES))
        csp_id = _text(values, _CSP_ID) if _CSP_ID in values else None
        if (hwid is None) == (csp_id is None):
            raise Unauthentic(
                "sev_snp: expected the certificate to name either a chip or a cloud provider"
            )
        return cls(_text(values, _PRODUCT_NAME), Tcb(**svns, fmc=fmc), hwid, csp_id)


def _authenticate_vek(
    vek: x509.Certificate,
    authorities: Sequence[x509.Certificate],
    roots: tuple[AmdRoots, ...],
    at: datetime.datetime,
) -> tuple[AmdRoots, tuple[x509.Certificate, ...]]:
    for one in authorities:
        _check_authority(one, roots)
    # AMD's own intermediates come first; one that was presented is used only when it is new.
    refused: Unauthentic | None = None
    for line in roots:
        for issuer in dict.fromkeys((line.ask, line.asvk, *authorities)):
            if issuer.subject != vek.issuer or issuer.issuer != line.ark.subject:
                continue
            try:
                path = chain.authenticate_path([vek, issuer], roots=[line.ark], at=at, what="vek")
            except Unauthentic as error:
                refused = refused or error
            else:
                return line, path
    if refused is not None:
        raise refused
    raise Unauthentic(f"vek: expected an issuer that is pinned, got {vek.issuer.rfc4514_string()}")


def _check_authority(authority: x509.Certificate, roots: tuple[AmdRoots, ...]) -> None:
    pinned = {one for line in roots for one in (line.ark, line.ask, line.asvk)}
    if authority in pinned:
        return
    for line in roots:
        try:
            authority.verify_directly_issued_by(line.ark)
        except (*chain.UNREADABLE, InvalidSignature):
            continue
        return
    name = authority.subject.rfc4514_string()
    raise Unauthentic(f"authorities: expected certificates under a pinned root, got {name}")


def _check_signature(report: AttestationReport, vek: x509.Certificate) -> None:
    key = vek.public_key()  # it parses: AMD's signature on the certificate has been checked
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise Unauthentic("sev_snp: expected a certificate for a key on P-384")
    signature = encode_dss_signature(report.signature_r, report.signature_s)
    if report.signing_key is SigningKey.NONE:
        raise Unauthentic("sev_snp: expected a signed report, SIGNING_KEY says it is not")
    try:
        key.verify(signature, report.signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise Unauthentic("sev_snp: expected the report's signature by its VEK") from None


def _check_product(report: AttestationReport, extensions: _VekExtensions, product: str) -> None:
    # "Milan-B0" of a VCEK, "Milan" of a VLEK: the stepping says nothing about trust.
    name = extensions.product_name.partition("-")[0]
    if name not in _PRODUCT_NAMES.get(product, (product,)):
        raise Unauthentic(f"sev_snp: expected a certificate for {product}, got {name}")
    if report.cpuid is not None and product_of(report.cpuid) != product:
        family, model, _ = report.cpuid
        raise Unauthentic(
            f"sev_snp: expected a CPU of {product}, got family {family:#x} model {model:#x}"
        )


def _check_signing_key(report: AttestationReport, extensions: _VekExtensions) -> None:
    certified = SigningKey.VCEK if extensions.csp_id is None else SigningKey.VLEK
    if report.signing_key is not certified:
        raise Unauthentic(
            f"sev_snp: expected the certificate of a {report.signing_key.name}, "
            f"got that of a {certified.name}"
        )


def _check_chip(report: AttestationReport, extensions: _VekExtensions) -> None:
    # "If MaskChipId is set to 0, identifier unique to the chip. Otherwise set to 0h." The bit is
    # not in the report (MASK_CHIP_KEY is another), the zeros are. The signature is the chip's
    # own either way.
    if extensions.hwid is None or not any(report.chip_id):
        return
    if report.chip_id != extensions.hwid.ljust(_CHIP_ID_BYTES, b"\0"):
        raise Unauthentic("sev_snp: expected CHIP_ID as certified, got another chip's")


def _check_revocation(
    path: tuple[x509.Certificate, ...], der: bytes, at: datetime.datetime
) -> str | None:
    """AMD's lists name intermediates: every VEK has the serial number 0, none can be named.

    Returns why the list does not count, if it is out of its time.
    """
    _, issuer, ark = path
    try:
        status = revocation.check_crl(der, certificate=issuer, issuer=ark, at=at)
    except Stale as error:
        return error.message
    if status.status is revocation.Revocation.REVOKED:
        raise Revoked(f"vek: AMD revoked its issuer `{issuer.subject.rfc4514_string()}`")
    return None


def _svn(values: dict[str, bytes], oid: str) -> int:
    """A DER INTEGER, 0 to 255."""
    value = _primitive(values.get(oid), _INTEGER)
    svn = -1 if value is None else int.from_bytes(value, "big", signed=True)
    if not 0 <= svn <= 0xFF:
        raise Unauthentic(f"sev_snp: expected the certificate's extension {oid}, a small integer")
    return svn


def _text(values: dict[str, bytes], oid: str) -> str:
    """A DER IA5String."""
    value = _primitive(values.get(oid), _IA5_STRING)
    if not value or not value.isascii():
        raise Unauthentic(f"sev_snp: expected the certificate's extension {oid}, a text")
    return value.decode("ascii")


def _octets(value: bytes, length: int) -> bytes:
    """The hardware identifier. AMD writes it bare; wrapped as an OCTET STRING it means the same."""
    if len(value) == length:
        return value
    inner = _primitive(value, _OCTET_STRING)
    if inner is None or len(inner) != length:
        raise Unauthentic(f"sev_snp: expected the certificate's chip of {length} bytes")
    return inner


def _primitive(value: bytes | None, tag: int) -> bytes | None:
    """The content of a DER value with this tag and a short length; None if it is not that."""
    if value is None or len(value) < 2 or value[0] != tag or value[1] != len(value) - 2:
        return None
    return value[2:] if value[1] < 0x80 else None


def _spell(tcb: Tcb) -> str:
    return ", ".join(f"{name} {svn}" for name, svn in _tcb_json(tcb).items())


def _tcb_json(tcb: Tcb) -> JsonObject:
    svns: JsonObject = {} if tcb.fmc is None else {"fmc": tcb.fmc}
    return svns | {
        "bootloader": tcb.bootloader,
        "tee": tcb.tee,
        "snp": tcb.snp,
        "microcode": tcb.microcode,
    }


def _policy_json(policy: GuestPolicy) -> JsonObject:
    document: JsonObject = {
        "value": _hex64(policy),
        "abi_minor": policy & 0xFF,
        "abi_major": policy >> 8 & 0xFF,
    }
    flags: dict[str, JsonValue] = {
        bit.name.lower(): bit in policy
        for bit in GuestPolicy
        if bit.name is not None and bit is not GuestPolicy.RESERVED_ONE
    }
    return document | flags


def _platform_json(info: PlatformInfo) -> JsonObject:
    document: JsonObject = {"value": _hex64(info)}
    flags: dict[str, JsonValue] = {
        bit.name.lower(): bit in info for bit in PlatformInfo if bit.name is not None
    }
    return document | flags


def _hex64(value: int | None) -> str | None:
    """64 bits do not fit a JSON number."""
    return None if value is None else f"{value:#018x}"
