"""Keys born at boot, in memory, one role each: TLS, receipts, checkpoints.

The certificate is self-signed: what makes the key trustworthy is evidence that binds it, never a
name. It names hosts only so that ordinary TLS clients can be told to trust it. An operator who
wants another certificate around the same key gets a request for one (`csr`); what comes back is
judged in `serving.certificates`, not here.
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import ipaddress
import os
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.wire.identity import PublicKey

LIFETIME = datetime.timedelta(days=397)
"""What TLS clients still accept; the process hardly lives as long, and the key dies with it."""

CLOCK_SKEW = datetime.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """The TLS key and its certificate.

    Attributes:
        certificate: PEM, public.
        csr: PEM of a PKCS #10 request (RFC 2986) for the same key and names, public.
        spki: DER SubjectPublicKeyInfo.
        spki_sha256: its lowercase hex SHA-256.
    """

    certificate: bytes
    csr: bytes
    spki: bytes
    spki_sha256: str
    _key: bytes = field(repr=False)

    def server_context(self, *, client_cas: bytes | None = None) -> ssl.SSLContext:
        """A TLS server context, HTTP/2 and HTTP/1.1 by ALPN: TLS 1.3, and 1.2 without client
        certificates.

        Args:
            client_cas: PEM of the authorities one of which must have issued the certificate of
                every client; None asks for none.

        Raises:
            ssl.SSLError: OpenSSL does not take `client_cas`.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # RFC 9113 section 9.2.2 forbids most of TLS 1.2's suites for HTTP/2.
        context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["h2", "http/1.1"])
        if client_cas is not None:
            # TLS 1.2 shows the client's certificate to the network. A resumed session would not
            # be asked for it again, and so outlive it.
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0
            context.load_verify_locations(cadata=client_cas.decode("ascii"))
            context.verify_mode = ssl.CERT_REQUIRED
        self.install(context, self.certificate)
        return context

    def install(self, context: ssl.SSLContext, chain: bytes) -> None:
        """Make `context` show `chain` in handshakes that begin from now on.

        A handshake takes its copy of the certificate when its connection object is made, so what
        is open or under way stays as it is. Call it in the thread that makes those objects.

        OpenSSL's Python binding only loads keys from files: an anonymous memory file serves, so
        the key never touches a disk.

        Args:
            chain: PEM, a certificate for this key first.

        Raises:
            ssl.SSLError: OpenSSL does not take it; the context may hold half of it.
        """
        descriptor = os.memfd_create("dcv-tls", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, self._key + chain)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)


PR_SET_DUMPABLE = 4  # linux/prctl.h


def close_memory() -> None:
    """Keep other processes of this user from this one's memory and descriptors, from now on.

    Not dumpable (prctl(2)): no ptrace, no /proc/PID/mem, no core file, but for who has
    CAP_SYS_PTRACE. A child that executes a program begins dumpable again. Call it before there is
    a key.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An Ed25519 key of one role.

    Attributes:
        public: its public half under its `key_id`, which begins with the role.
    """

    public: PublicKey
    _key: Ed25519PrivateKey = field(repr=False)

    def sign(self, data: bytes) -> bytes:
        """A signature over `data`, 64 bytes (RFC 8032 section 5.1.6)."""
        return self._key.sign(data)


def create_signing_key(role: str) -> SigningKey:
    """A new key; `role` is `receipt` or `checkpoint`. No key ever has two roles."""
    key = Ed25519PrivateKey.generate()
    raw = key.public_key().public_bytes_raw()
    return SigningKey(PublicKey(f"{role}-{hashlib.sha256(raw).hexdigest()[:16]}", raw), key)


def create_tls_identity(names: Iterable[str], *, now: datetime.datetime) -> TlsIdentity:
    """A new P-256 key, a self-signed certificate and a certificate request for `names`.

    Args:
        names: DNS names and IP addresses, at least one.
        now: timezone-aware; the certificate is valid from five minutes earlier.
    """
    names = list(names)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    alternatives = x509.SubjectAlternativeName(map(_general_name, names))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
        .add_extension(alternatives, critical=False)
        # CA false: trusting this certificate must not mean trusting what its key could issue.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(alternatives, critical=False)
        .sign(key, hashes.SHA256())
    )
    spki = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return TlsIdentity(
        certificate=certificate.public_bytes(serialization.Encoding.PEM),
        csr=csr.public_bytes(serialization.Encoding.PEM),
        spki=spki,
        spki_sha256=hashlib.sha256(spki).hexdigest(),
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
