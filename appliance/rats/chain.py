"""X.509 paths to a pinned root, at a given time.

RFC 5280 section 6.1, narrowed to what attestation chains are: the path is given in order, leaf
first, nobody searches for another one; the root is the pinned one, and no other may be presented in
its place; names must chain; every issuer is a CA whose path length allows its place. Revocation is
asked elsewhere (`rats.revocation`), name constraints do not occur, and an extended key usage is
held to the purpose that the caller names.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from appliance.errors import Malformed, Stale, Unauthentic
from appliance.wire.pem import MAX_CERTIFICATE_BYTES, MAX_CERTIFICATES, split_pem

_E = TypeVar("_E", bound=x509.ExtensionType)

KNOWN_CRITICAL = frozenset({x509.BasicConstraints.oid, x509.KeyUsage.oid})
"""Extensions that may be critical, because this module or its caller reads them (RFC 5280 4.2). An
extended key usage may be where the caller names the purpose: only then is it read."""

UNREADABLE = (
    ValueError,
    TypeError,
    OverflowError,
    NotImplementedError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises on bytes that somebody else chose, some of it only when a part is
asked for. Half of them are no ValueError, so every reader of such bytes catches all of these."""


def parse_pem_chain(pem: bytes, *, field: str) -> tuple[x509.Certificate, ...]:
    """The certificates of a PEM text, in its order. None of them is trustworthy yet.

    Raises:
        Malformed: no certificate, too many, too large, one that does not parse, or something else
            beside them.
    """
    return tuple(parse_der_certificate(one, field=field) for one in split_pem(pem, field=field))


def parse_der_certificate(der: bytes, *, field: str) -> x509.Certificate:
    """One DER certificate. It is not trustworthy yet.

    Raises:
        Malformed: too large, or does not parse.
    """
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise Malformed(f"{field}: expected at most 64 KiB", field=field)
    try:
        certificate = _read_whole(x509.load_der_x509_certificate(der))
    except UNREADABLE:
        raise Malformed(f"{field}: expected a DER certificate", field=field) from None
    # It ends with its signature, a BIT STRING of whole bytes. How many bits of the last one are
    # unused (X.690 section 8.6.2.2) nobody signs and `cryptography` does not look at.
    if not der.endswith(b"\0" + certificate.signature):
        raise Malformed(f"{field}: expected a signature of whole bytes", field=field)
    return certificate


def authenticate_path(
    presented: Sequence[x509.Certificate],
    *,
    roots: Iterable[x509.Certificate],
    at: datetime.datetime,
    what: str,
    purpose: x509.ObjectIdentifier | None = None,
) -> tuple[x509.Certificate, ...]:
    """Check a path and return it, leaf first, ending with the pinned root.

    Args:
        presented: leaf first, each issued by the next; the root may be left out. A self-signed
            last certificate must be a pinned one: evidence has no part that may say anything.
        roots: the pinned ones; trusted without their own signature, held to their validity.
        at: timezone-aware.
        what: whose chain, for messages.
        purpose: what the leaf's key is used for. A leaf that names purposes must name this one or
            any; one that names none may be used for all. None where no purpose has a name: then
            a critical extended key usage is refused like everything that nobody reads.

    Raises:
        Malformed: an extension that does not parse.
        Unauthentic: no pinned root or another than it, a bad signature, a name that does not
            chain, an issuer that is no CA or too far up, a leaf for another purpose, a critical
            extension nobody here knows.
        Stale: `at` is outside the validity of one of them.
    """
    if not 0 < len(presented) <= MAX_CERTIFICATES:
        raise Unauthentic(f"{what}: expected 1 to {MAX_CERTIFICATES} certificates")
    # 1. The pinned root, presented or not.
    below, candidates = list(presented), list(roots)
    if len(below) > 1 and below[-1].subject == below[-1].issuer:
        shown = below.pop()
        candidates = [root for root in candidates if root == shown]
        if not candidates:
            raise Unauthentic(f"{what}: expected the pinned root, got {_name(shown)}, another one")
    candidates = [root for root in candidates if root.subject == below[-1].issuer]
    if not candidates:
        got = below[-1].issuer.rfc4514_string()
        raise Unauthentic(f"{what}: expected an issuer that is pinned, got {got}")
    # 2. Signatures and names: each by the next; of several pinned roots of one name (AMD reissues
    #    under the same one) the one that fits.
    path = (*below, _issuer_of(below[-1], candidates, what))
    for subject, issuer in itertools.pairwise(below):
        _check_issued_by(subject, issuer, what)
    # 3. Validity, CA flags, path lengths, extensions: of every certificate, the root's too.
    for depth, certificate in enumerate(path):
        named = f"{what}: {_name(certificate)}"
        _check_validity(certificate, at, named)
        _check_extensions(certificate, depth, named, purpose)
    return path


def sha256_of(certificate: x509.Certificate) -> str:
    """Lowercase hex SHA-256 of its DER bytes."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def der_of(certificate: x509.Certificate) -> bytes:
    """Its DER bytes."""
    return certificate.public_bytes(Encoding.DER)


def _read_whole(certificate: x509.Certificate) -> x509.Certificate:
    """Certificates are decoded lazily; what every caller reads is decoded here, where ValueError
    means that it does not parse."""
    for name in ("subject", "issuer", "not_valid_before_utc", "not_valid_after_utc"):
        getattr(certificate, name)
    return certificate


def _issuer_of(
    certificate: x509.Certificate, candidates: Sequence[x509.Certificate], what: str
) -> x509.Certificate:
    for candidate in candidates[:-1]:
        try:
            _check_issued_by(certificate, candidate, what)
        except Unauthentic:
            continue
        return candidate
    _check_issued_by(certificate, candidates[-1], what)
    return candidates[-1]


def _check_issued_by(subject: x509.Certificate, issuer: x509.Certificate, what: str) -> None:
    try:
        subject.verify_directly_issued_by(issuer)
    except (*UNREADABLE, InvalidSignature):
        raise Unauthentic(
            f"{what}: {_name(subject)}: expected the signature of {_name(issuer)}"
        ) from None


def _check_validity(certificate: x509.Certificate, at: datetime.datetime, name: str) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not start <= at <= end:
        raise Stale(f"{name}: valid from {start:%Y-%m-%d} to {end:%Y-%m-%d}, not at {at:%Y-%m-%d}")


def _check_extensions(
    certificate: x509.Certificate, depth: int, name: str, purpose: x509.ObjectIdentifier | None
) -> None:
    """`depth` is 0 for the leaf; an issuer at depth n has n - 1 intermediates below it."""
    try:
        extensions = certificate.extensions
    except UNREADABLE:
        raise Malformed(f"{name}: expected extensions that parse", field="extensions") from None
    for extension in extensions:
        if isinstance(extension.value, x509.ExtendedKeyUsage) and purpose is not None:
            _check_purpose(extension, depth, name, purpose)
        elif extension.critical and extension.oid not in KNOWN_CRITICAL:
            raise Unauthentic(f"{name}: unknown critical extension {extension.oid.dotted_string}")
    if depth == 0:
        return
    constraints = _value(extensions, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise Unauthentic(f"{name}: expected a CA certificate")
    if constraints.path_length is not None and constraints.path_length < depth - 1:
        raise Unauthentic(
            f"{name}: expected at most {constraints.path_length} CAs below it, got {depth - 1}"
        )
    usage = _value(extensions, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        raise Unauthentic(f"{name}: expected a key that may sign certificates")


def _check_purpose(
    extension: x509.Extension[x509.ExtendedKeyUsage],
    depth: int,
    name: str,
    purpose: x509.ObjectIdentifier,
) -> None:
    """RFC 5280 section 4.2.1.12: "the certificate MUST only be used for one of the purposes
    indicated". That is said of the certified key, and an issuer's signs certificates whatever it
    names (Google's TPM CAs name another purpose than what they certify), so of an issuer it
    counts only where it is critical."""
    accepted = {purpose, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    if (depth == 0 or extension.critical) and accepted.isdisjoint(extension.value):
        raise Unauthentic(
            f"{name}: expected extended key usage {purpose.dotted_string}, "
            f"got {', '.join(one.dotted_string for one in extension.value)}"
        )


def _value(extensions: x509.Extensions, kind: type[_E]) -> _E | None:
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _name(certificate: x509.Certificate) -> str:
    return f"`{certificate.subject.rfc4514_string()}`"
