"""A certificate authority of our own, to issue what an operator's or an attacker's would."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HOUR = datetime.timedelta(hours=1)
DAY = 24 * HOUR
SERVER = (ExtendedKeyUsageOID.SERVER_AUTH,)
CLIENT = (ExtendedKeyUsageOID.CLIENT_AUTH,)

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


class Authority:
    """A root, or below `parent` an intermediate."""

    def __init__(
        self,
        common: str = "Test CA",
        *,
        now: datetime.datetime,
        parent: Authority | None = None,
        key: PrivateKey | None = None,
        lifetime: datetime.timedelta = 100 * DAY,
        is_authority: bool | None = True,
    ) -> None:
        self.now = now
        self.name = name(common)
        self.key = key or ec.generate_private_key(ec.SECP256R1())
        signer = parent or self
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(signer.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + lifetime)
        )
        if is_authority is not None:
            builder = builder.add_extension(
                x509.BasicConstraints(ca=is_authority, path_length=None), critical=True
            )
        self.certificate = builder.sign(signer.key, hashes.SHA256())

    def issue(
        self,
        key: PublicKey,
        names: Sequence[str] = ("localhost", "127.0.0.1"),
        *,
        not_before: datetime.datetime | None = None,
        not_after: datetime.datetime | None = None,
        purposes: Sequence[x509.ObjectIdentifier] | None = SERVER,
        is_authority: bool = False,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(names[0]))
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before or self.now - HOUR)
            .not_valid_after(not_after or self.now + DAY)
            .add_extension(x509.SubjectAlternativeName(map(_alternative, names)), critical=False)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if purposes is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def answer(self, csr: bytes, **options: object) -> x509.Certificate:
        """What an authority makes of a request: its key and its names."""
        request = x509.load_pem_x509_csr(csr)
        assert request.is_signature_valid
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = request.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return self.issue(key, [str(item.value) for item in names], **options)  # type: ignore[arg-type]

    def client(self, common: str = "client") -> bytes:
        """A client's certificate and its key, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.issue(key.public_key(), [common], purposes=CLIENT)
        return key_pem(key) + pem(certificate)


def _alternative(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        return x509.DNSName(text)
