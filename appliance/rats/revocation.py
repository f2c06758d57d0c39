"""Was a certificate taken back: OCSP responses and CRLs as pure checks.

Sources: RFC 6960 section 3.2 (the six things a response is accepted for), section 4.2.2.2
(who may answer), RFC 9654 (the nonce, formerly RFC 8954); RFC 5280 section 5 (CRLs).

Nobody is asked anything here: the bytes, the certificates and the time are arguments. A
certificate and its issuer must have come out of `chain.authenticate_path`; what is said about a
certificate that nobody authenticated means nothing.

Of NVIDIA's responder (measured by others in 2026, and read from NVIDIA's own verifiers): each CA
names its own responder's certificate, which comes with the answer; the nonce is echoed among the
extensions of the whole response; an answer lasts a day; the per-device leaf is not served, so
nobody asks about it, its issuer's answer stands for it.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, SignatureAlgorithmOID

from appliance.errors import (
    EndorsementsUnavailable,
    EvidenceError,
    Malformed,
    Stale,
    Unauthentic,
    Unbound,
)
from appliance.rats.chain import (
    UNREADABLE,
    authenticate_path,
    der_of,
    parse_der_certificate,
)
from appliance.rats.result import Finding, Tier
from appliance.wire.pem import MAX_CERTIFICATES

MAX_OCSP_BYTES = 64 << 10
"""Of one response; NVIDIA's have some 2 KiB."""

MAX_CRL_BYTES = 1 << 20

MAX_SINGLE_RESPONSES = 16
"""In one response; one is asked about at a time."""

CLOCK_SKEW = datetime.timedelta(minutes=5)
"""How far ahead of `at` an answer's thisUpdate may be: clocks differ."""

MAX_AGE = datetime.timedelta(days=7)
"""How old an answer may be whatever its nextUpdate says; NVIDIA's last a day."""

Path: TypeAlias = Sequence[x509.Certificate]

_SIGNATURE_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)

_CERT_ID_HASHES = (hashes.SHA1, hashes.SHA256, hashes.SHA384, hashes.SHA512)
"""SHA-1 only names the issuer here, in bytes the issuer itself signs: a collision gains nothing."""

_RSA_PKCS1_V15 = (
    SignatureAlgorithmOID.RSA_WITH_SHA256,
    SignatureAlgorithmOID.RSA_WITH_SHA384,
    SignatureAlgorithmOID.RSA_WITH_SHA512,
)


class Revocation(StrEnum):
    """What an issuer says about a certificate."""

    GOOD = "good"
    REVOKED = "revoked"
    UNKNOWN = "unknown"
    """The responder does not know the certificate (RFC 6960 section 2.2)."""


@dataclass(frozen=True, slots=True)
class RevocationStatus:
    """An issuer's signed statement about one certificate.

    Attributes:
        status: the statement.
        reason: RFC 5280's name (`keyCompromise`, `certificateHold`), where one was given.
        this_update: the statement was true then.
        expires: it may be used until then.
    """

    status: Revocation
    reason: str | None
    this_update: datetime.datetime
    expires: datetime.datetime

    def __str__(self) -> str:
        return f"{self.status} ({self.reason})" if self.reason else self.status


OcspStatus: TypeAlias = RevocationStatus


def device_part(path: Path) -> tuple[Path, Path]:
    """Of an authenticated device path, the certificates to ask about and the issuer of each.

    Not the leaf, which NVIDIA's responder does not serve; not the root, which is pinned.
    """
    return path[1:-1], path[2:]


def signer_part(path: Path) -> tuple[Path, Path]:
    """Of an authenticated signer's path (reference values), all but the root."""
    return path[:-1], path[1:]


def check_ocsp(
    response_der: bytes,
    *,
    certificate: x509.Certificate,
    issuer: x509.Certificate,
    at: datetime.datetime,
    nonce: bytes | None,
    max_age: datetime.timedelta = MAX_AGE,
) -> OcspStatus:
    """What an OCSP response says about `certificate`, once it is established who says it and when.

    Args:
        response_der: an OCSPResponse, DER.
        certificate, issuer: authenticated by the caller.
        at: timezone-aware.
        nonce: what was asked with; None for an answer that was kept, whose own times bound it.
        max_age: the most that may lie between thisUpdate and `at`.

    Raises:
        Malformed: it does not parse.
        EndorsementsUnavailable: the responder declined (`tryLater`, `unauthorized`): such a
            response is unsigned and says nothing.
        Unauthentic: signed by somebody whom the issuer did not charge with answering.
        Unbound: it is about other certificates.
        Stale: another nonce, or outside of its time.
    """
    # 1. It parses, and is a response rather than an excuse (section 2.3: "not signed").
    response = _parse_response(response_der)
    # 2. Signed by the issuer, or by whom the issuer charged with it (section 3.2, 2 to 4).
    responder = _responder(response, issuer=issuer, at=at)
    _check_signature(response, responder)
    _check_extensions(response)
    # 3. "The certificate identified in a received response corresponds to the certificate that
    #    was identified in the corresponding request" (section 3.2, 1).
    single = next(_about(response, certificate, issuer), None)
    if single is None:
        raise Unbound("OCSP response: expected one about the certificate that was asked about")
    # 4. The answer to this question, not to an older one (RFC 9654 section 2.1).
    if nonce is not None and _nonce_of(response) != nonce:
        raise Stale("OCSP response: expected the nonce of the request")
    # 5. Its time (section 3.2, 5 and 6).
    status = _status_of(single, max_age)
    _check_time(status, at)
    return status


def check_crl(
    crl_der: bytes,
    *,
    certificate: x509.Certificate,
    issuer: x509.Certificate,
    at: datetime.datetime,
) -> RevocationStatus:
    """What the issuer's own, complete CRL says about `certificate` (RFC 5280 section 6.3.3).

    AMD's lists are such (signed by the ARK, RSA-PSS), and Intel's. Partial and indirect lists
    are refused: they carry a critical extension nobody here reads.

    Raises:
        Malformed: it does not parse.
        Unauthentic: not the issuer's signature, or a critical extension.
        Stale: it has no end, or `at` is outside of its time and it does not revoke for good.
    """
    crl = parse_crl(crl_der)
    _check_crl_signature(crl, issuer)
    try:
        entry = crl.get_revoked_certificate_by_serial_number(certificate.serial_number)
        reason = None if entry is None else _crl_reason(entry)
    except UNREADABLE:
        raise Malformed("CRL: expected entries that parse", field="crl") from None
    status = Revocation.GOOD if entry is None else Revocation.REVOKED
    found = RevocationStatus(status, reason, crl.last_update_utc, crl_expiry(crl))
    if not _is_final(found):
        _check_crl_time(crl, at)
    return found


def parse_crl(crl_der: bytes) -> x509.CertificateRevocationList:
    """One DER CRL. It is not trustworthy yet.

    Raises:
        Malformed: too large, or does not parse.
    """
    if len(crl_der) > MAX_CRL_BYTES:
        raise Malformed("CRL: expected at most 1 MiB", field="crl")
    try:
        return x509.load_der_x509_crl(crl_der)
    except UNREADABLE:
        raise Malformed("CRL: expected a DER certificate revocation list", field="crl") from None


def authenticate_crl(
    crl: x509.CertificateRevocationList, *, issuer: x509.Certificate, at: datetime.datetime
) -> None:
    """Check that `issuer`, which the caller authenticated, signed this list for this time.

    Raises:
        Malformed: an extension that does not parse.
        Unauthentic: another issuer, a bad or weak signature, or a partial or indirect list.
        Stale: `at` is outside of its time, or it has no end.
    """
    _check_crl_signature(crl, issuer)
    _check_crl_time(crl, at)


def _check_crl_signature(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> None:
    try:
        signed = (
            crl.issuer == issuer.subject
            and isinstance(crl.signature_hash_algorithm, _SIGNATURE_HASHES)
            and _may(issuer, "crl_sign")
            and crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
        )
        critical = [one.oid.dotted_string for one in crl.extensions if one.critical]
    except UNREADABLE:
        raise Malformed("CRL: expected extensions that parse", field="crl") from None
    if not signed:
        raise Unauthentic(f"CRL: expected the signature of {issuer.subject.rfc4514_string()}")
    if critical:
        raise Unauthentic(f"CRL: expected a complete list, got critical extension {critical[0]}")


def _check_crl_time(crl: x509.CertificateRevocationList, at: datetime.datetime) -> None:
    start, end = crl.last_update_utc, crl_expiry(crl)
    if not start - CLOCK_SKEW <= at < end:
        raise Stale(f"CRL: valid from {start:%Y-%m-%d} to {end:%Y-%m-%d}, not at {at:%Y-%m-%d}")


def crl_expiry(crl: x509.CertificateRevocationList) -> datetime.datetime:
    """Its nextUpdate, which RFC 5280 section 5.1.2.5 demands.

    Raises:
        Stale: it has none.
    """
    if crl.next_update_utc is None:
        raise Stale("CRL: expected a time of its next update")
    return crl.next_update_utc


def revocation_findings(
    chain: Path,
    responses: Iterable[bytes],
    issuers: Path,
    policy: Literal["required", "warn"],
    at: datetime.datetime,
    *,
    scheme: str = "nvidia_gpu",
    max_age: datetime.timedelta = MAX_AGE,
) -> tuple[Finding, ...]:
    """One finding for every certificate that is not known to be good; none if all are.

    A hold is a revocation: the issuer says not to trust the certificate now. NVIDIA's tools have
    a switch that accepts it; this has none.

    Args:
        chain: the certificates to ask about, authenticated (`device_part`, `signer_part`).
        responses: DER OCSP responses, in any order; what is not about these is passed over.
        issuers: the issuer of each, in the order of `chain`.
        policy: what a missing or unknown answer is, `[policy] revocation`.
        at: timezone-aware.
        scheme: of the finding's name, `nvidia_gpu.revocation`.
        max_age: as for `check_ocsp`.
    """
    bag = tuple(responses)
    findings = (
        _finding(certificate, issuer, bag, policy, at, scheme, max_age)
        for certificate, issuer in zip(chain, issuers, strict=True)
    )
    return tuple(one for one in findings if one is not None)


def _finding(
    certificate: x509.Certificate,
    issuer: x509.Certificate,
    responses: Sequence[bytes],
    policy: Literal["required", "warn"],
    at: datetime.datetime,
    scheme: str,
    max_age: datetime.timedelta,
) -> Finding | None:
    name = certificate.subject.rfc4514_string()
    said: list[OcspStatus] = []
    refused: str | None = None
    for response in responses:
        if not is_about(response, certificate, issuer):
            continue
        try:
            said.append(
                check_ocsp(
                    response,
                    certificate=certificate,
                    issuer=issuer,
                    at=at,
                    nonce=None,
                    max_age=max_age,
                )
            )
        except (Malformed, EvidenceError) as error:
            refused = error.message
    # Of several answers the worst counts: whoever collected them chose which ones to show.
    for status in said:
        if status.status is Revocation.REVOKED:
            return Finding(
                Tier.CONTRAINDICATED,
                f"{scheme}.revocation",
                f"good for {name}",
                str(status),
                "The issuer took this certificate back: update the firmware or replace the device.",
            )
    if said and all(status.status is Revocation.GOOD for status in said):
        return None
    got = Revocation.UNKNOWN.value if said else refused or "no answer"
    return Finding(
        Tier.CONTRAINDICATED if policy == "required" else Tier.WARNING,
        f"{scheme}.revocation",
        f"good for {name}",
        got,
        "Let the appliance reach [attestation] ocsp_url, or put an answer into its store.",
    )


def is_about(response_der: bytes, certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether a response claims to be about this certificate; nothing of it is checked."""
    try:
        response = _parse_response(response_der)
        return any(True for _ in _about(response, certificate, issuer))
    except (Malformed, EndorsementsUnavailable):
        return False


def _parse_response(der: bytes) -> ocsp.OCSPResponse:
    if len(der) > MAX_OCSP_BYTES:
        raise Malformed("OCSP response: expected at most 64 KiB", field="ocsp")
    try:
        response = ocsp.load_der_ocsp_response(der)
        status = response.response_status
    except UNREADABLE:
        raise Malformed("OCSP response: expected DER of RFC 6960", field="ocsp") from None
    if status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
        raise EndorsementsUnavailable(f"OCSP response: the responder answered {status.name}")
    return response


def _responder(
    response: ocsp.OCSPResponse, *, issuer: x509.Certificate, at: datetime.datetime
) -> x509.Certificate:
    """Whose key must have signed, of those who may (section 4.2.2.2).

    A delegate "MUST be issued directly by the CA" and carry id-kp-OCSPSigning. Whether the
    delegate itself was revoked is not asked: NVIDIA's are short-lived, and the issuer could only
    answer through the same delegate (section 4.2.2.2.1).
    """
    try:
        by_name, by_key = response.responder_name, response.responder_key_hash
        ders = [der_of(one) for one in response.certificates]
    except UNREADABLE:
        raise Malformed("OCSP response: expected a responder that parses", field="ocsp") from None
    if _answers_to(issuer, by_name, by_key):
        return issuer
    for der in ders[:MAX_CERTIFICATES]:
        candidate = parse_der_certificate(der, field="ocsp")
        if not _answers_to(candidate, by_name, by_key):
            continue
        what = "OCSP responder"
        authenticate_path(
            [candidate],
            roots=[issuer],
            at=at,
            what=what,
            purpose=ExtendedKeyUsageOID.OCSP_SIGNING,
        )
        if not _has_purpose(candidate, ExtendedKeyUsageOID.OCSP_SIGNING):
            raise Unauthentic(f"{what}: expected a certificate for OCSP signing")
        if not _may(candidate, "digital_signature"):
            raise Unauthentic(f"{what}: expected a key that may sign")
        return candidate
    raise Unauthentic("OCSP response: expected the issuer or its delegate to answer")


def _answers_to(
    certificate: x509.Certificate, by_name: x509.Name | None, by_key: bytes | None
) -> bool:
    """ResponderID: the subject's name, or the SHA-1 of its key's bits (section 4.2.1)."""
    if by_name is not None:
        return certificate.subject == by_name
    try:
        digest = x509.SubjectKeyIdentifier.from_public_key(certificate.public_key()).digest
    except UNREADABLE:
        return False
    return digest == by_key


def _check_signature(response: ocsp.OCSPResponse, responder: x509.Certificate) -> None:
    try:
        algorithm = response.signature_hash_algorithm
        key = responder.public_key()
        if not isinstance(algorithm, _SIGNATURE_HASHES):
            raise Unauthentic("OCSP response: expected a signature over SHA-256, 384 or 512")
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(response.signature, response.tbs_response_bytes, ec.ECDSA(algorithm))
        elif (
            isinstance(key, rsa.RSAPublicKey) and response.signature_algorithm_oid in _RSA_PKCS1_V15
        ):
            key.verify(
                response.signature, response.tbs_response_bytes, padding.PKCS1v15(), algorithm
            )
        else:
            raise Unauthentic("OCSP response: expected an ECDSA or RSA PKCS #1 v1.5 signature")
    except (*UNREADABLE, InvalidSignature):
        raise Unauthentic("OCSP response: expected the signature of its responder") from None


def _check_extensions(response: ocsp.OCSPResponse) -> None:
    """Unrecognised critical ones "MUST" not be ignored (section 4.4, RFC 5280 section 4.2)."""
    try:
        critical = [
            one.oid.dotted_string
            for one in (*response.extensions, *_single_extensions(response))
            if one.critical and one.oid != x509.OCSPNonce.oid
        ]
    except UNREADABLE:
        raise Malformed("OCSP response: expected extensions that parse", field="ocsp") from None
    if critical:
        raise Unauthentic(f"OCSP response: unknown critical extension {critical[0]}")


def _single_extensions(response: ocsp.OCSPResponse) -> Iterator[x509.Extension[x509.ExtensionType]]:
    """Those of the one statement; of several, `cryptography` does not give them."""
    if len(list(response.responses)) == 1:
        yield from response.single_extensions


def _nonce_of(response: ocsp.OCSPResponse) -> bytes | None:
    try:
        return response.extensions.get_extension_for_class(x509.OCSPNonce).value.nonce
    except x509.ExtensionNotFound:
        return None


def _about(
    response: ocsp.OCSPResponse, certificate: x509.Certificate, issuer: x509.Certificate
) -> Iterator[ocsp.OCSPSingleResponse]:
    """The statements whose CertID is that of `certificate` (section 4.1.1)."""
    try:
        singles = list(response.responses)
        if len(singles) > MAX_SINGLE_RESPONSES:
            raise Malformed("OCSP response: expected at most 16 statements", field="ocsp")
        for single in singles:
            if _is_named(single, certificate, issuer):
                yield single
    except UNREADABLE:
        raise Malformed("OCSP response: expected statements that parse", field="ocsp") from None


def _is_named(
    single: ocsp.OCSPSingleResponse, certificate: x509.Certificate, issuer: x509.Certificate
) -> bool:
    algorithm = single.hash_algorithm
    if single.serial_number != certificate.serial_number or not isinstance(
        algorithm, _CERT_ID_HASHES
    ):
        return False
    # The CertID a request would carry: it hashes the issuer's own bytes, never a re-encoding.
    asked = ocsp.OCSPRequestBuilder().add_certificate(certificate, issuer, algorithm).build()
    return (
        single.issuer_name_hash == asked.issuer_name_hash
        and single.issuer_key_hash == asked.issuer_key_hash
    )


def _status_of(single: ocsp.OCSPSingleResponse, max_age: datetime.timedelta) -> OcspStatus:
    try:
        status, this_update = single.certificate_status, single.this_update_utc
        next_update, reason = single.next_update_utc, single.revocation_reason
        oldest = this_update + max_age
    except UNREADABLE:
        raise Malformed("OCSP response: expected times that parse", field="ocsp") from None
    return RevocationStatus(
        Revocation(status.name.lower()),
        None if reason is None else reason.value,
        this_update,
        oldest if next_update is None else min(next_update, oldest),
    )


def _check_time(status: OcspStatus, at: datetime.datetime) -> None:
    if status.this_update > at + CLOCK_SKEW:
        raise Stale(f"OCSP response: made at {status.this_update:%Y-%m-%dT%H:%MZ}, in the future")
    if not _is_final(status) and at >= status.expires:
        raise Stale(f"OCSP response: usable until {status.expires:%Y-%m-%dT%H:%MZ}")


def _is_final(status: RevocationStatus) -> bool:
    """A revocation does not lapse; only a hold may be lifted, so only that one ages."""
    return status.status is Revocation.REVOKED and status.reason != "certificateHold"


def _crl_reason(entry: x509.RevokedCertificate) -> str | None:
    for extension in entry.extensions:
        if extension.critical and extension.oid != x509.CRLReason.oid:
            raise Unauthentic("CRL: expected entries of its own issuer")
    try:
        return entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.value
    except x509.ExtensionNotFound:
        return None


def _may(certificate: x509.Certificate, use: Literal["crl_sign", "digital_signature"]) -> bool:
    """Whether its key usage, if it has one, names this use (RFC 5280 section 4.2.1.3)."""
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return True
    return usage.crl_sign if use == "crl_sign" else usage.digital_signature


def _has_purpose(certificate: x509.Certificate, purpose: x509.ObjectIdentifier) -> bool:
    try:
        purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return purpose in purposes
