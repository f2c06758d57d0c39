"""Certificates that the operator gives us: a chain for our own key, and the authorities of clients.

Each step is a function of its own, and the first that is not satisfied raises:

    read          at most 64 KiB of a regular file
    parse         PEM to certificates; anything else in the file is refused, a private key above all
    authenticate  the chain is for our key, and each certificate is signed by the next
    appraise      it is good for a TLS server, now
    act           rehearsed on a context of its own, then put into the one in use

What is not judged: whether a client trusts the last certificate, and whether the names are the ones
clients use. Both are the clients' to say; a wrong answer shuts out those who would have refused
anyway, and evidence binds the key, not the certificate.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import os
import ssl
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import trio
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID

from appliance.errors import CertificateRefused
from appliance.log import Log
from appliance.serving.keys import TlsIdentity

MAX_BYTES = 64 << 10
MAX_CERTIFICATES = 10
"""Real chains have two to four."""

_BEGIN = b"-----BEGIN"
_BEGIN_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"  # RFC 7468 section 5.1

_UNREADABLE = (
    ValueError,
    CryptographyDeprecationWarning,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises on the bytes of a certificate, some of it only when a part is asked
for."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """One certificate, decoded and not yet believed.

    Attributes:
        spki: DER SubjectPublicKeyInfo, as we would write it.
        is_authority: whether it may issue others (BasicConstraints).
        purposes: its extended key usage; None when it has none, which allows every purpose.
    """

    decoded: x509.Certificate
    spki: bytes
    is_authority: bool
    purposes: frozenset[x509.ObjectIdentifier] | None

    @property
    def not_before(self) -> datetime.datetime:
        """The first moment it is valid."""
        return self.decoded.not_valid_before_utc

    @property
    def not_after(self) -> datetime.datetime:
        """The last moment it is valid."""
        return self.decoded.not_valid_after_utc


Chain: TypeAlias = tuple[Certificate, ...]


def read_certificates(path: Path) -> bytes:
    """The bytes of a file of certificates.

    Blocking, as long as it takes to read 64 KiB; never on a pipe or a device.

    Raises:
        CertificateRefused: it cannot be read, is no regular file, or is larger.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CertificateRefused("expected a regular file")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CertificateRefused(f"cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise CertificateRefused(f"expected at most {MAX_BYTES} bytes, got more")
    return data


def parse_certificates(data: bytes) -> Chain:
    """Decode a file of PEM certificates. What it returns nobody vouches for yet.

    Text outside of the blocks is ignored (RFC 7468 section 2: explanatory text).

    Raises:
        CertificateRefused: no certificate, too many, one that does not decode, or another kind of
            block.
    """
    if b"PRIVATE KEY" in data:
        raise CertificateRefused(
            "expected certificates only, got a private key; ours never leaves the appliance, so "
            "this is another's: remove it from this file"
        )
    blocks = data.count(_BEGIN)
    if others := blocks - data.count(_BEGIN_CERTIFICATE):
        raise CertificateRefused(f"expected CERTIFICATE blocks only, got {others} of other kinds")
    if not 1 <= blocks <= MAX_CERTIFICATES:
        raise CertificateRefused(f"expected 1 to {MAX_CERTIFICATES} certificates, got {blocks}")
    try:
        with warnings.catch_warnings():
            # Bytes against RFC 5280 that it still reads, with a warning.
            warnings.simplefilter("error", CryptographyDeprecationWarning)
            chain = tuple(map(_certificate, x509.load_pem_x509_certificates(data)))
    except _UNREADABLE as error:
        raise CertificateRefused(
            "expected PEM certificates, got one that does not decode"
        ) from error
    if len(chain) != blocks:
        raise CertificateRefused(f"expected {blocks} certificates, {len(chain)} of them decode")
    return chain


def authenticate_chain(chain: Chain, *, spki: bytes) -> None:
    """Check that the chain is for the key `spki` and that each certificate is signed by the next.

    The signature of the last one is its authority's, and not looked at.

    Raises:
        CertificateRefused: it is not.
    """
    leaf = chain[0]
    # An equal key written in another way (a compressed point) would not match what clients pin, so
    # the leaf must also hold our very bytes.
    if leaf.spki != spki or spki not in leaf.decoded.tbs_certificate_bytes:
        raise CertificateRefused(
            f"certificate 1: expected the key of this boot, spki_sha256 {_sha256_hex(spki)}, "
            f"got {_sha256_hex(leaf.spki)}"
        )
    for number, (issued, issuer) in enumerate(itertools.pairwise(chain), start=1):
        try:
            issued.decoded.verify_directly_issued_by(issuer.decoded)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
            raise CertificateRefused(
                f"certificate {number}: expected it to be issued and signed by certificate "
                f"{number + 1}, it is not"
            ) from error


def appraise_chain(chain: Chain, *, now: datetime.datetime) -> None:
    """Check that an authenticated chain is one for a TLS server, and valid now.

    Args:
        now: timezone-aware.

    Raises:
        CertificateRefused: it is not.
    """
    leaf = chain[0]
    for number, certificate in enumerate(chain, start=1):
        if now < certificate.not_before:
            raise CertificateRefused(
                f"certificate {number}: expected it to be valid now, "
                f"got one from {certificate.not_before.isoformat()} on"
            )
        if now > certificate.not_after:
            raise CertificateRefused(
                f"certificate {number}: expected it to be valid now, "
                f"got one until {certificate.not_after.isoformat()}"
            )
        if certificate.is_authority != (certificate is not leaf):
            # With an authority's certificate around it, our key could issue others.
            raise CertificateRefused(
                f"certificate {number}: expected "
                + ("a server's, got an authority's" if certificate is leaf else "an authority's")
            )
    if leaf.purposes is not None and ExtendedKeyUsageOID.SERVER_AUTH not in leaf.purposes:
        raise CertificateRefused(
            "certificate 1: expected the extended key usage serverAuth or none, got others"
        )


def parse_client_authorities(data: bytes) -> bytes:
    """The authorities of client certificates in a PEM file, as PEM of nothing else.

    Raises:
        CertificateRefused: as `parse_certificates`, or one may not issue certificates.
    """
    authorities = parse_certificates(data)
    for number, certificate in enumerate(authorities, start=1):
        if not certificate.is_authority:
            raise CertificateRefused(f"certificate {number}: expected an authority's")
    return _pem(authorities)


class ChainFile:
    """The operator's chain on its way from a file into the TLS context in use.

    A file that is refused is judged again every time, because time alone may make it good, and
    said once. The file is read in the event loop: it is small, local and rarely new.
    """

    def __init__(
        self,
        path: Path,
        identity: TlsIdentity,
        context: ssl.SSLContext,
        *,
        now: Callable[[], datetime.datetime],
        log: Log,
    ) -> None:
        self._path = path
        self._identity = identity
        self._context = context
        self._now = now
        self._log = log
        self._shown: _Stamp | None = None
        self._until: datetime.datetime | None = None
        self._said: tuple[_Stamp | None, str] | None = None

    async def watch(
        self, interval_s: float, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Look at the file every `interval_s` until cancelled; started after the first look."""
        self.look()
        task_status.started()
        while True:
            await trio.sleep(interval_s)
            self.look()

    def look(self) -> None:
        """Show the file's chain if it is new and acceptable; else what is shown stays."""
        stamp = _stamp(self._path)
        if stamp is None:
            self._say(None, "there is no such file")
            return
        if stamp == self._shown and self._until is not None and self._now() <= self._until:
            return
        try:
            chain = parse_certificates(read_certificates(self._path))
            authenticate_chain(chain, spki=self._identity.spki)
            appraise_chain(chain, now=self._now())
            self._show(_pem(chain))
        except CertificateRefused as error:
            self._say(stamp, error.message)
            return
        self._shown, self._said = stamp, None
        self._until = min(certificate.not_after for certificate in chain)
        self._log.info(
            "tls_chain_shown", certificates=len(chain), not_after=self._until.isoformat()
        )

    def _show(self, chain: bytes) -> None:
        """Put it into the context in use; OpenSSL may refuse it halfway, so not there first."""
        try:
            self._identity.install(self._identity.server_context(), chain)
            self._identity.install(self._context, chain)
        except ssl.SSLError as error:
            raise CertificateRefused(
                f"expected a chain that OpenSSL takes, it says {error.reason}"
            ) from error
        except OSError as error:  # no descriptor to hand it over in
            raise CertificateRefused(f"it cannot be handed to OpenSSL: {error.strerror}") from error

    def _say(self, stamp: _Stamp | None, reason: str) -> None:
        if self._said == (stamp, reason):
            return
        self._said = (stamp, reason)
        shown = "self-signed" if self._shown is None else "operator"
        if stamp is None:
            self._log.info("tls_chain_missing", still_shown=shown)
        else:
            self._log.warning(
                "tls_chain_refused",
                error=reason,
                advice=CertificateRefused.advice,
                still_shown=shown,
            )


_Stamp: TypeAlias = tuple[int, ...]


def _stamp(path: Path) -> _Stamp | None:
    """What differs once a file was replaced or written; None when there is none."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return ()  # reading it will say why
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,  # a copy may keep the time of the original, this one it cannot
    )


def _certificate(decoded: x509.Certificate) -> Certificate:
    extensions = decoded.extensions
    try:
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        is_authority = constraints.ca
    except x509.ExtensionNotFound:
        is_authority = False  # RFC 5280 section 4.2.1.9: such a key may not sign certificates
    try:
        purposes = frozenset(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        purposes = None
    return Certificate(
        decoded=decoded,
        spki=decoded.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        is_authority=is_authority,
        purposes=purposes,
    )


def _sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _pem(chain: Chain) -> bytes:
    return b"".join(certificate.decoded.public_bytes(Encoding.PEM) for certificate in chain)
