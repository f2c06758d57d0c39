"""Keys born at boot, in memory, one role each. So far: TLS.

The certificate is self-signed: what makes the key trustworthy is evidence that binds it, never a
name. It names hosts only so that ordinary TLS clients can be told to trust it.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = datetime.timedelta(days=397)
"""What TLS clients still accept; the process hardly lives as long, and the key dies with it."""

CLOCK_SKEW = datetime.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """The TLS key and its certificate.

    Attributes:
        certificate: PEM, public.
        spki_sha256: lowercase hex SHA-256 of the DER SubjectPublicKeyInfo.
    """

    certificate: bytes
    spki_sha256: str
    _key: bytes = field(repr=False)

    def server_context(self) -> ssl.SSLContext:
        """A TLS 1.2+ server context, HTTP/2 and HTTP/1.1 by ALPN.

        OpenSSL's Python binding only loads keys from files: an anonymous memory file serves, so
        the key never touches a disk.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # RFC 9113 section 9.2.2 forbids most of TLS 1.2's suites for HTTP/2.
        context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["h2", "http/1.1"])
        descriptor = os.memfd_create("dcv-tls", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, self._key + self.certificate)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return context


def create_tls_identity(names: Iterable[str], *, now: datetime.datetime) -> TlsIdentity:
    """A new P-256 key and a self-signed certificate for `names`.

    Args:
        names: DNS names and IP addresses, at least one.
        now: timezone-aware; the certificate is valid from five minutes earlier.
    """
    names = list(names)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName(map(_general_name, names)), critical=False)
        # CA false: trusting this certificate must not mean trusting what its key could issue.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    spki = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    digest = hashes.Hash(hashes.SHA256())
    digest.update(spki)
    return TlsIdentity(
        certificate=certificate.public_bytes(serialization.Encoding.PEM),
        spki_sha256=digest.finalize().hex(),
        _key=key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
