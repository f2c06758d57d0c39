"""The published test roots, and what is issued below them: chains in the vendors' shape.

Subjects, extensions, algorithms and path lengths are those of the real chains, but that every
organisation reads `DCV test root, worthless`. One difference is forced: AMD's certificates have
serial number 0, which our certificate builder refuses to write.

`python -m appliance.attester.simulated.pki` writes the fixed certificates from the fixed keys,
and the roots into `rats/anchors/`.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import AuthorityInformationAccessOID, NameOID

import appliance.rats

KEYS = Path(__file__).parent / "keys"
ANCHORS = Path(appliance.rats.__file__).parent / "anchors"

WORTHLESS = "DCV test root, worthless"

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

FOREVER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
EXPIRED = datetime.datetime(2021, 10, 17, tzinfo=datetime.UTC)
"""What the chain of `gpu_expired_chain` ran until."""

DEVICE_SINCE = datetime.datetime(2020, 10, 17, tzinfo=datetime.UTC)
RIM_SINCE = datetime.datetime(2023, 3, 16, tzinfo=datetime.UTC)
RIM_UNTIL = datetime.datetime(2053, 3, 8, tzinfo=datetime.UTC)
AMD_SINCE = datetime.datetime(2020, 10, 22, tzinfo=datetime.UTC)
AMD_UNTIL = datetime.datetime(2045, 10, 22, tzinfo=datetime.UTC)

PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
"""How AMD's keys sign: RSASSA-PSS, SHA-384, a salt of 48 bytes."""

TCG_DICE_FWID = x509.ObjectIdentifier("2.23.133.5.4.1")
"""CompositeDeviceID of the TCG's DICE draft, as it stands in NVIDIA's leaves."""

DMTF_DEVICE_INFO = x509.ObjectIdentifier("1.3.6.1.4.1.412.274.1")
"""`Manufacturer:Product:Serial` (DSP0274 section 10.8.2, leaf certificate's otherName)."""

SHA384_OID = bytes.fromhex("0609608648016503040202")

AMD = "1.3.6.1.4.1.3704.1"
"""AMD's arc; 57230 (VCEK Certificate and KDS Interface Specification) section 3.1."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A key with its certificate."""

    key: PrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        """Its certificate."""
        return self.certificate.public_bytes(Encoding.PEM)


@cache
def fixed(name: str) -> Identity:
    """One of the published identities in `keys/`."""
    certificate = x509.load_pem_x509_certificate((KEYS / f"{name}.pem").read_bytes())
    return Identity(fixed_key(name), certificate)


@cache
def fixed_key(name: str) -> PrivateKey:
    """One of the published private keys in `keys/`."""
    data = (KEYS / f"{name}.key").read_bytes()
    # Its numbers came with this package; checking them would take a quarter of a second.
    key = load_pem_private_key(data, password=None, unsafe_skip_rsa_key_validation=True)
    assert isinstance(key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey))
    return key


def make_gpu_chain(
    *, serial: str, fwid: bytes, until: datetime.datetime = FOREVER
) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """A GPU's own attestation key, and its chain: PEM, leaf first, five certificates.

    Args:
        serial: 16 hex digits, the device's. fwid: SHA-384 of its firmware, 48 bytes.
        until: end of validity of the two certificates that are the device's own.
    """
    provisioner = fixed("nvidia_provisioner")
    brom_key, leaf_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    # 1. Boot ROM: the key that is burnt in.
    brom = _builder(
        _nvidia("GH100 A01 GSP BROM", serial=serial[:18]),
        provisioner.certificate.subject,
        brom_key,
        (DEVICE_SINCE, until),
    )
    brom = _authority(brom, path_length=None, crl_sign=False)
    brom_certificate = _sign(brom, provisioner)
    # 2. Firmware: follows from the boot ROM's key and what was loaded, which it names.
    name = _nvidia("GH100 A01 GSP FMC LF", serial=_ski(leaf_key).digest.hex().upper())
    leaf = _builder(name, brom_certificate.subject, leaf_key, (DEVICE_SINCE, until))
    leaf = leaf.add_extension(_usage(digital_signature=True), critical=True)
    info = f"NVIDIA:GH100:{serial}".encode("ascii")
    other = x509.OtherName(DMTF_DEVICE_INFO, b"\x0c" + bytes([len(info)]) + info)
    leaf = leaf.add_extension(x509.SubjectAlternativeName([other]), critical=False)
    spki = leaf_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    hashed = _der(0x30, SHA384_OID + _der(0x04, fwid))
    dice = _der(0x30, b"\x02\x01\x01" + spki + hashed)
    leaf = leaf.add_extension(x509.UnrecognizedExtension(TCG_DICE_FWID, dice), critical=False)
    leaf_certificate = _sign(leaf, Identity(brom_key, brom_certificate))
    # 3. As the driver hands it out, the root included.
    upper = [fixed(one).pem for one in ("nvidia_provisioner", "nvidia_identity")]
    own = [one.public_bytes(Encoding.PEM) for one in (leaf_certificate, brom_certificate)]
    return leaf_key, b"".join((*own, *upper, fixed("nvidia_device_root").pem))


def make_vcek(
    *, chip_id: bytes, tcb: Sequence[int]
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A CPU's key and its certificate, for these security versions.

    Args:
        chip_id: 64 bytes.
        tcb: boot loader, TEE, SNP, microcode.
    """
    ask = fixed("amd_ask")
    key = ec.generate_private_key(ec.SECP384R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(_amd("SEV-VCEK"))
        .issuer_name(ask.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(AMD_SINCE)
        .not_valid_after(AMD_UNTIL)
    )
    bootloader, tee, snp, microcode = tcb
    values = {
        "1": _der(0x02, b"\0"),  # structVersion
        "2": _der(0x16, b"Milan-B0"),  # productName1
        "3.1": _der_integer(bootloader),
        "3.2": _der_integer(tee),
        "3.4": _der_integer(0),
        "3.5": _der_integer(0),
        "3.6": _der_integer(0),
        "3.7": _der_integer(0),
        "3.3": _der_integer(snp),
        "3.8": _der_integer(microcode),
        "4": chip_id,  # hwID: 64 bytes, not wrapped in anything
    }
    for arc, value in values.items():
        oid = x509.ObjectIdentifier(f"{AMD}.{arc}")
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), critical=False)
    return key, builder.sign(ask.key, hashes.SHA384(), rsa_padding=PSS)


def write_fixed() -> None:
    """Write every fixed certificate, from its key, and the pinned roots."""
    device_root = _root("nvidia_device_root", "NVIDIA Device Identity CA", DEVICE_SINCE, FOREVER)
    identity = _issued("nvidia_identity", "NVIDIA GH100 Identity", device_root, FOREVER)
    _issued("nvidia_provisioner", "NVIDIA GH100 Provisioner ICA 1", identity, FOREVER)

    rim_root = _root("nvidia_rim_root", "NVIDIA CoRIM signing Root CA", RIM_SINCE, RIM_UNTIL)
    rim_ca = _issued("nvidia_rim_ca", "NVIDIA Reference Value GH100 CA", rim_root, RIM_UNTIL)
    name = "NVIDIA Reference Value L3 GH100 001"
    issuer = _issued("nvidia_rim_issuer", name, rim_ca, RIM_UNTIL, path_length=0)
    key = fixed_key("nvidia_rim_signer")
    signer = _builder(
        _nvidia("HCC RIM L4 Signer"), issuer.certificate.subject, key, (RIM_SINCE, RIM_UNTIL)
    )
    signer = signer.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    signer = signer.add_extension(_usage(digital_signature=True), critical=True)
    _store(
        "nvidia_rim_signer",
        Identity(key, _sign(signer.add_extension(_ocsp(), critical=False), issuer)),
    )

    ark = _amd_authority("amd_ark", "ARK-Milan", 0x10000, None, path_length=None)
    ask = _amd_authority("amd_ask", "SEV-Milan", 0x10001, ark, path_length=0)
    asvk = _amd_authority("amd_asvk", "SEV-VLEK-Milan", 0x20001, ark, path_length=0)

    (ANCHORS / "simulated_nvidia_device.pem").write_bytes(device_root.pem)
    (ANCHORS / "simulated_nvidia_rim.pem").write_bytes(rim_root.pem)
    (ANCHORS / "simulated_amd.pem").write_bytes(ark.pem + ask.pem + asvk.pem)


def _root(name: str, common: str, since: datetime.datetime, until: datetime.datetime) -> Identity:
    key = fixed_key(name)
    builder = _builder(_nvidia(common), _nvidia(common), key, (since, until))
    builder = _authority(builder, path_length=None, crl_sign=True)
    above = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(_ski(key))
    builder = builder.add_extension(above, critical=False)
    return _store(name, Identity(key, builder.sign(key, hashes.SHA384())))


def _issued(
    name: str,
    common: str,
    issuer: Identity,
    until: datetime.datetime,
    *,
    path_length: int | None = None,
) -> Identity:
    key = fixed_key(name)
    since = issuer.certificate.not_valid_before_utc
    builder = _builder(_nvidia(common), issuer.certificate.subject, key, (since, until))
    builder = _authority(builder, path_length=path_length, crl_sign=True)
    return _store(
        name, Identity(key, _sign(builder.add_extension(_ocsp(), critical=False), issuer))
    )


def _amd_authority(
    name: str, common: str, serial: int, issuer: Identity | None, *, path_length: int | None
) -> Identity:
    key = fixed_key(name)
    assert isinstance(key, rsa.RSAPrivateKey)
    signer = key if issuer is None else issuer.key
    builder = (
        x509.CertificateBuilder()
        .subject_name(_amd(common))
        .issuer_name(_amd(common) if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(AMD_SINCE)
        .not_valid_after(AMD_UNTIL)
    )
    builder = _authority(builder, path_length=path_length, crl_sign=issuer is None)
    certificate = builder.sign(signer, hashes.SHA384(), rsa_padding=PSS)
    return _store(name, Identity(key, certificate))


def _store(name: str, identity: Identity) -> Identity:
    (KEYS / f"{name}.pem").write_bytes(identity.pem)
    return identity


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: PrivateKey,
    validity: tuple[datetime.datetime, datetime.datetime],
) -> x509.CertificateBuilder:
    """The serial number follows from the key, so that fixed keys have fixed ones."""
    ski = _ski(key)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(ski.digest[:16], "big") >> 1 or 1)
        .not_valid_before(validity[0])
        .not_valid_after(validity[1])
        .add_extension(ski, critical=False)
    )


def _sign(builder: x509.CertificateBuilder, issuer: Identity) -> x509.Certificate:
    """Sign as NVIDIA's issuers do, P-384 with SHA-384."""
    above = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(_ski(issuer.key))
    return builder.add_extension(above, critical=False).sign(issuer.key, hashes.SHA384())


def _authority(
    builder: x509.CertificateBuilder, *, path_length: int | None, crl_sign: bool
) -> x509.CertificateBuilder:
    return builder.add_extension(
        x509.BasicConstraints(ca=True, path_length=path_length), critical=True
    ).add_extension(_usage(key_cert_sign=True, crl_sign=crl_sign), critical=True)


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _ocsp() -> x509.AuthorityInformationAccess:
    """A responder that can never be reached (RFC 2606): nobody answers for worthless keys."""
    where = x509.UniformResourceIdentifier("http://ocsp.invalid")
    return x509.AuthorityInformationAccess(
        [x509.AccessDescription(AuthorityInformationAccessOID.OCSP, where)]
    )


def _ski(key: PrivateKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key.public_key())


def _nvidia(common: str, *, serial: str | None = None) -> x509.Name:
    parts = [] if serial is None else [x509.NameAttribute(NameOID.SERIAL_NUMBER, serial)]
    return x509.Name(
        [
            *parts,
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, WORTHLESS),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _amd(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Engineering"),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
            x509.NameAttribute(NameOID.LOCALITY_NAME, "Santa Clara"),
            x509.NameAttribute(NameOID.STATE_OR_PROVINCE_NAME, "CA"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, WORTHLESS),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _der(tag: int, value: bytes) -> bytes:
    """One DER element (X.690 section 8.1), of at most 64 KiB."""
    length = len(value)
    if length < 0x80:
        return bytes([tag, length]) + value
    digits = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(digits)]) + digits + value


def _der_integer(value: int) -> bytes:
    """From 0 to 255; DER integers are signed, so from 128 on there is a leading zero."""
    return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


if __name__ == "__main__":
    write_fixed()
