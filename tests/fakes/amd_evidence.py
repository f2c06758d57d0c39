"""SEV-SNP evidence in AMD's own formats, under test roots.

Certificates are made as AMD makes them: RSASSA-PSS with SHA-384, names, extensions and the serial
number 0 of publication 57230. Reports are laid out here by offset, from the table in publication
56860, and not with the parser under test. Only the RSA keys are shorter (2048 bits: 4096 take
seconds each).
"""

from __future__ import annotations

import datetime
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from appliance.rats.model import AmdRoots
from appliance.wire.evidence import CpuEvidence

UTC = datetime.UTC
START = datetime.datetime(2024, 1, 1, tzinfo=UTC)
END = datetime.datetime(2031, 1, 1, tzinfo=UTC)
NOW = datetime.datetime(2026, 6, 1, tzinfo=UTC)

PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
AMD_OID = "1.3.6.1.4.1.3704.1"

CPUID = {"Milan": (0x19, 0x01, 1), "Genoa": (0x19, 0x11, 1), "Turin": (0x1A, 0x02, 1)}
CHIP = bytes(range(1, 65))
TURIN_CHIP = bytes(range(1, 9))


@functools.cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    """One key by each name, for the whole run."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@functools.cache
def chip_key(name: str = "chip") -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


@functools.cache
def amd_roots(product: str, realm: str = "test") -> AmdRoots:
    """ARK, ASK and ASVK of a product line; another realm has the same names and other keys."""
    ark = authority(f"ARK-{product}", f"{realm} ARK-{product}", 0x10000)
    ask, asvk = (
        authority(name, f"{realm} {name}", serial, issuer=ark, issuer_key=f"{realm} ARK-{product}")
        for name, serial in ((f"SEV-{product}", 0x10001), (f"SEV-VLEK-{product}", 0x10101))
    )
    return AmdRoots(product, ark, ask, asvk)


def authority(
    name: str,
    key: str,
    serial: int,
    *,
    issuer: x509.Certificate | None = None,
    issuer_key: str | None = None,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(amd_name(name))
        .issuer_name(amd_name(name) if issuer is None else issuer.subject)
        .public_key(rsa_key(key).public_key())
        .serial_number(serial)
        .not_valid_before(START)
        .not_valid_after(END)
        .add_extension(x509.BasicConstraints(True, None if issuer is None else 0), critical=True)
        .add_extension(_may_sign(crl=issuer is None), critical=True)
    )
    return builder.sign(rsa_key(issuer_key or key), hashes.SHA384(), rsa_padding=PSS)


def amd_name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Engineering"),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
            x509.NameAttribute(NameOID.LOCALITY_NAME, "Santa Clara"),
            x509.NameAttribute(NameOID.STATE_OR_PROVINCE_NAME, "CA"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests of DCV"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _may_sign(*, crl: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=crl,
        encipher_only=False,
        decipher_only=False,
    )


@dataclass(frozen=True)
class Guest:
    """A guest on a machine: what its report and its VEK's certificate say."""

    product: str = "Milan"
    version: int = 3
    vlek: bool = False
    svns: tuple[int, int, int, int] = (4, 1, 24, 219)
    """bootloader, tee, snp, microcode: what is certified."""
    fmc: int = 2
    report: dict[int, bytes] = field(default_factory=dict)
    """Bytes that are written over the report, by offset, before it is signed."""
    extensions: dict[str, bytes | None] = field(default_factory=dict)
    """Extensions of the certificate, by the end of their OID; None leaves one out."""
    realm: str = "test"
    start: datetime.datetime = START
    end: datetime.datetime = END
    serial: int = 0

    @property
    def roots(self) -> AmdRoots:
        return amd_roots(self.product, self.realm)

    @property
    def chip(self) -> bytes:
        return TURIN_CHIP if self.product == "Turin" else CHIP

    def tcb(self) -> bytes:
        bootloader, tee, snp, microcode = self.svns
        if self.product == "Turin":
            return bytes([self.fmc, bootloader, tee, snp, 0, 0, 0, microcode])
        return bytes([bootloader, tee, 0, 0, 0, 0, snp, microcode])

    def raw_report(self) -> bytes:
        """The signed report, 1184 bytes."""
        data = bytearray(0x4A0)
        struct.pack_into("<IIQ", data, 0x000, self.version, 7, 0x3001F)
        data[0x010:0x020], data[0x020:0x030] = b"f" * 16, b"i" * 16
        struct.pack_into("<II", data, 0x030, 0, 1)
        struct.pack_into("<QII", data, 0x040, 0x25, int(self.vlek) << 2, 0)
        data[0x050:0x090] = b"d" * 64
        data[0x090:0x0C0] = b"m" * 48
        data[0x0C0:0x0E0] = b"h" * 32
        data[0x0E0:0x110], data[0x110:0x140] = b"k" * 48, b"a" * 48
        data[0x140:0x160], data[0x160:0x180] = b"r" * 32, b"\xff" * 32
        if self.version >= 3:
            data[0x188:0x18B] = bytes(CPUID[self.product])
        if not self.vlek:
            data[0x1A0 : 0x1A0 + len(self.chip)] = self.chip
        for offset in (0x038, 0x180, 0x1E0, 0x1F0):
            data[offset : offset + 8] = self.tcb()
        data[0x1E8:0x1EB] = data[0x1EC:0x1EF] = bytes([29, 55, 1])
        if self.version >= 5:
            struct.pack_into("<QQ", data, 0x1F8, 0b1011, 0b1111)
        for offset, value in self.report.items():
            data[offset : offset + len(value)] = value
        return sign_report(bytes(data))

    def vek(self) -> bytes:
        """Its certificate, DER."""
        product_name = (
            self.product if self.vlek or self.product == "Turin" else f"{self.product}-B1"
        )
        bootloader, tee, snp, microcode = self.svns
        values: dict[str, bytes | None] = {
            "1": der_integer(1),
            "2": b"\x16" + bytes([len(product_name)]) + product_name.encode(),
            "3.1": der_integer(bootloader),
            "3.2": der_integer(tee),
            "3.3": der_integer(snp),
            "3.8": der_integer(microcode),
        }
        if self.product == "Turin":
            values["3.9"] = der_integer(self.fmc)
        if self.vlek:
            values["5"] = b"\x16\x0bcloud.tests"
        else:
            values["4"] = self.chip
        values |= self.extensions
        issuer = self.roots.asvk if self.vlek else self.roots.ask
        builder = (
            x509.CertificateBuilder()
            .subject_name(amd_name("SEV-VLEK" if self.vlek else "SEV-VCEK"))
            .issuer_name(issuer.subject)
            .public_key(chip_key().public_key())
            .serial_number(1)
            .not_valid_before(self.start)
            .not_valid_after(self.end)
        )
        for end, value in values.items():
            if value is not None:
                oid = x509.ObjectIdentifier(f"{AMD_OID}.{end}")
                builder = builder.add_extension(
                    x509.UnrecognizedExtension(oid, value), critical=False
                )
        name = f"{'SEV-VLEK' if self.vlek else 'SEV'}-{self.product}"
        key = rsa_key(f"{self.realm} {name}")
        return with_serial(builder.sign(key, hashes.SHA384(), rsa_padding=PSS), self.serial, key)

    def evidence(self, **endorsements: bytes) -> CpuEvidence:
        return CpuEvidence(
            "sev_snp", {"report": self.raw_report()}, {"vek": self.vek(), **endorsements}
        )

    def but(self, **changes: object) -> Guest:
        return replace(self, **changes)  # type: ignore[arg-type]


def sign_report(report: bytes, key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    """ECDSA P-384 over the first 0x2A0 bytes; r and s little-endian, 72 bytes each."""
    signer = key or chip_key()
    r, s = decode_dss_signature(signer.sign(report[:0x2A0], ec.ECDSA(hashes.SHA384())))
    signature = r.to_bytes(72, "little") + s.to_bytes(72, "little")
    return report[:0x2A0] + signature + report[0x2A0 + 144 :]


def revocation_list(
    roots: AmdRoots,
    revoked: Sequence[int] = (),
    *,
    realm: str = "test",
    start: datetime.datetime = START,
    end: datetime.datetime | None = END,
    name: x509.Name | None = None,
) -> bytes:
    """AMD's list for a product line, DER."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(name or roots.ark.subject)
        .last_update(start)
        .next_update(end or END)
    )
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(start)
        builder = builder.add_revoked_certificate(entry.build())
    key = rsa_key(f"{realm} ARK-{roots.product}")
    return builder.sign(key, hashes.SHA384(), rsa_padding=PSS).public_bytes(Encoding.DER)


def der_integer(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "big")
    return bytes([0x02, len(content)]) + content


def with_serial(certificate: x509.Certificate, serial: int, key: rsa.RSAPrivateKey) -> bytes:
    """The certificate with a serial number that no builder would give it, signed again, DER."""
    tbs = certificate.tbs_certificate_bytes
    before = bytes.fromhex("a003020102") + bytes.fromhex("020101")
    assert tbs.count(before) == 1
    tbs = tbs.replace(before, bytes.fromhex("a003020102") + bytes([0x02, 1, serial]))
    whole = certificate.public_bytes(Encoding.DER)
    algorithm = whole[whole.index(certificate.tbs_certificate_bytes) :]
    algorithm = algorithm[len(certificate.tbs_certificate_bytes) :]
    algorithm = algorithm[: 2 + algorithm[1]]
    signature = key.sign(tbs, PSS, hashes.SHA384())
    return _sequence(tbs + algorithm + b"\x03" + _length(len(signature) + 1) + b"\0" + signature)


def _sequence(content: bytes) -> bytes:
    return b"\x30" + _length(len(content)) + content


def _length(size: int) -> bytes:
    assert 0x100 <= size < 0x10000
    return b"\x82" + size.to_bytes(2, "big")
