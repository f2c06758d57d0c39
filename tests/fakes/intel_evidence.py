"""TDX quotes and collateral in Intel's own formats, under a test root.

The chain is shaped as Intel's: Root CA above the PCK platform CA (above the platform's PCK
certificate, with the SGX extension) and above the TCB signing certificate; two revocation lists;
TCB info and QE identity as signed JSON. Quotes are laid out here field by field, and not with the
parser under test.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import struct
from dataclasses import dataclass, field, replace
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

UTC = datetime.UTC
START = datetime.datetime(2026, 5, 1, tzinfo=UTC)
END = datetime.datetime(2026, 7, 1, tzinfo=UTC)
NOW = datetime.datetime(2026, 6, 1, tzinfo=UTC)
CERTIFICATES_END = datetime.datetime(2040, 1, 1, tzinfo=UTC)

SGX_EXTENSION = "1.2.840.113741.1.13.1"
FMSPC = bytes.fromhex("b0c06f000000")
QE_SIGNER = b"q" * 32
INTEL_VENDOR_ID = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
PCK_SERIAL = 4711


@functools.cache
def key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def raw_signature(name: str, data: bytes) -> bytes:
    r, s = decode_dss_signature(key(name).sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def raw_public_key(name: str) -> bytes:
    numbers = key(name).public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


@functools.cache
def certificate(name: str, issuer: str, serial: int, realm: str = "test") -> x509.Certificate:
    """Names as Intel's; `realm` is in the keys only, so that another root has the same name."""
    is_ca = name.endswith("CA")
    issuer_key = key(f"{realm} {issuer}")
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key(f"{realm} {name}").public_key())
        .serial_number(serial)
        .not_valid_before(START - datetime.timedelta(days=3000))
        .not_valid_after(CERTIFICATES_END)
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
        .add_extension(_usage(ca=is_ca), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key(f"{realm} {name}").public_key()),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    if name == "Intel SGX PCK Certificate":
        oid = x509.ObjectIdentifier(SGX_EXTENSION)
        builder = builder.add_extension(
            x509.UnrecognizedExtension(oid, _sgx_extension()), critical=False
        )
    return builder.sign(issuer_key, hashes.SHA256())


ROOT, PLATFORM = "Intel SGX Root CA", "Intel SGX PCK Platform CA"
PCK, TCB_SIGNER = "Intel SGX PCK Certificate", "Intel SGX TCB Signing"


def root_der(realm: str = "test") -> bytes:
    return certificate(ROOT, ROOT, 1, realm).public_bytes(Encoding.DER)


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests of DCV"),
        ]
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = bytes([size]) if size < 0x80 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + length + content


def _entry(end: str, value: bytes) -> bytes:
    """One { OID, value } of the SGX extension."""
    first, second, *rest = [int(one) for one in f"{SGX_EXTENSION}.{end}".split(".")]
    content = bytes([first * 40 + second])
    for arc in rest:
        digits = [arc & 0x7F]
        while arc := arc >> 7:
            digits.append(arc & 0x7F | 0x80)
        content += bytes(reversed(digits))
    return _der(0x30, _der(0x06, content) + value)


def _integer(value: int) -> bytes:
    return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _sgx_extension() -> bytes:
    svns = b"".join(_entry(f"2.{index}", _integer(3)) for index in range(1, 17))
    svns += _entry("2.17", _integer(11)) + _entry("2.18", _der(0x04, bytes([3] * 16)))
    return _der(
        0x30,
        _entry("1", _der(0x04, b"p" * 16))
        + _entry("2", _der(0x30, svns))
        + _entry("3", _der(0x04, bytes(2)))
        + _entry("4", _der(0x04, FMSPC))
        + _entry("5", _der(0x0A, b"\0")),
    )


@dataclass(frozen=True)
class Platform:
    """A TD on a platform: what its quote says, and what Intel says about the platform."""

    version: int = 4
    body_type: int = 2
    attributes: int = 1 << 28
    body: dict[str, bytes] = field(default_factory=dict)
    """Fields of the TD report that differ, by name."""
    status: str = "UpToDate"
    advisories: tuple[str, ...] = ()
    required_svn: int = 3
    """Of every component, for `status`."""
    realm: str = "test"
    revoked: tuple[int, ...] = ()
    collateral_end: datetime.datetime = END
    qe_attributes: bytes = bytes([0x15]) + bytes(15)
    collateral_changes: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Platform:
        return replace(self, **changes)

    def report(self) -> bytes:
        """The body: names, sizes and order of the TD report."""
        values: dict[str, bytes] = {
            "tee_tcb_svn": bytes([3, 0, *[3] * 14]),
            "mr_seam": b"s" * 48,
            "mr_signer_seam": bytes(48),
            "seam_attributes": bytes(8),
            "td_attributes": self.attributes.to_bytes(8, "little"),
            "xfam": bytes.fromhex("e702060000000000"),
            "mr_td": b"m" * 48,
            "mr_config_id": b"c" * 48,
            "mr_owner": b"o" * 48,
            "mr_owner_config": b"w" * 48,
            "rt_mr0": b"0" * 48,
            "rt_mr1": b"1" * 48,
            "rt_mr2": b"2" * 48,
            "rt_mr3": b"3" * 48,
            "report_data": b"d" * 64,
        }
        if self.body_type == 3:
            values |= {"tee_tcb_svn2": bytes([3, 0, *[3] * 14]), "mr_service_td": bytes(48)}
        values |= self.body
        return b"".join(values.values())

    def td_report(self) -> bytes:
        """The TDREPORT that the quote is made of; a TD 1.0's."""
        body = self.report()
        module, td, report_data = body[:120], body[120:520], body[520:584]
        tcb_info = (bytes.fromhex("ff01030000000000") + module).ljust(239, b"\0")
        td_info = td.ljust(512, b"\0")
        digests = b"".join(hashlib.sha384(one).digest() for one in (tcb_info, td_info))
        mac = hashlib.sha256(b"mac" + body).digest()
        head = b"\x81" + bytes(15) + b"v" * 16 + digests + report_data + bytes(32) + mac
        return head + tcb_info + bytes(17) + td_info

    def signed(self) -> bytes:
        header = struct.pack("<HHIHH", self.version, 2, 0x81, 5, 6) + INTEL_VENDOR_ID + b"u" * 20
        body = self.report()
        if self.version == 5:
            header += struct.pack("<HI", self.body_type, len(body))
        return header + body

    def quote(self) -> bytes:
        """The whole quote, without padding."""
        signed = self.signed()
        authentication = bytes(range(32))
        attestation_key = raw_public_key(f"{self.realm} attestation")
        binding = hashlib.sha256(attestation_key + authentication).digest()
        qe_report = _enclave_report(self.qe_attributes, binding + bytes(32))
        chain = pem_chain(PCK, PLATFORM, ROOT, realm=self.realm) + b"\0"
        certification = (
            qe_report
            + raw_signature(f"{self.realm} {PCK}", qe_report)
            + struct.pack("<H", len(authentication))
            + authentication
            + struct.pack("<HI", 5, len(chain))
            + chain
        )
        signature = (
            raw_signature(f"{self.realm} attestation", signed)
            + attestation_key
            + struct.pack("<HI", 6, len(certification))
            + certification
        )
        return signed + struct.pack("<I", len(signature)) + signature

    def tcb_info(self) -> dict[str, Any]:
        components = [{"svn": self.required_svn}] * 16
        level = {
            "tcb": {
                "sgxtcbcomponents": components,
                "pcesvn": 11,
                "tdxtcbcomponents": [components[0], {"svn": 0}, *components[2:]],
            },
            "tcbDate": "2024-03-13T00:00:00Z",
            "tcbStatus": self.status,
            "advisoryIDs": list(self.advisories),
        }
        return {
            "id": "TDX",
            "version": 3,
            "issueDate": _stamp(START),
            "nextUpdate": _stamp(self.collateral_end),
            "fmspc": FMSPC.hex().upper(),
            "pceId": "0000",
            "tcbType": 0,
            "tcbEvaluationDataNumber": 17,
            "tdxModule": {
                "mrsigner": "00" * 48,
                "attributes": "00" * 8,
                "attributesMask": "FF" * 8,
            },
            "tcbLevels": [level],
        }

    def qe_identity(self) -> dict[str, Any]:
        return {
            "id": "TD_QE",
            "version": 2,
            "issueDate": _stamp(START),
            "nextUpdate": _stamp(self.collateral_end),
            "tcbEvaluationDataNumber": 17,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": "11" + "00" * 15,
            "attributesMask": "FB" + "FF" * 7 + "00" * 8,
            "mrsigner": QE_SIGNER.hex().upper(),
            "isvprodid": 2,
            "tcbLevels": [
                {
                    "tcb": {"isvsvn": 4},
                    "tcbDate": "2024-03-13T00:00:00Z",
                    "tcbStatus": "UpToDate",
                }
            ],
        }

    def collateral(self) -> bytes:
        """JSON as `QuoteCollateralV3` has it."""
        tcb_info, qe_identity = json.dumps(self.tcb_info()), json.dumps(self.qe_identity())
        signer = f"{self.realm} {TCB_SIGNER}"
        document = {
            "pck_crl_issuer_chain": pem_chain(PLATFORM, ROOT, realm=self.realm).decode(),
            "root_ca_crl": self._revocation_list(ROOT).hex(),
            "pck_crl": self._revocation_list(PLATFORM).hex(),
            "tcb_info_issuer_chain": pem_chain(TCB_SIGNER, ROOT, realm=self.realm).decode(),
            "tcb_info": tcb_info,
            "tcb_info_signature": raw_signature(signer, tcb_info.encode()).hex(),
            "qe_identity_issuer_chain": pem_chain(TCB_SIGNER, ROOT, realm=self.realm).decode(),
            "qe_identity": qe_identity,
            "qe_identity_signature": raw_signature(signer, qe_identity.encode()).hex(),
        }
        return json.dumps(document | self.collateral_changes).encode()

    def _revocation_list(self, issuer: str) -> bytes:
        issuer_key = key(f"{self.realm} {issuer}")
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(_name(issuer))
            .last_update(START)
            .next_update(self.collateral_end)
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
                critical=False,
            )
        )
        for serial in self.revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(START)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.DER)


def pem_chain(*names: str, realm: str) -> bytes:
    """Leaf first."""
    issuers = {PCK: (PLATFORM, PCK_SERIAL), PLATFORM: (ROOT, 2), TCB_SIGNER: (ROOT, 3)}
    certificates = (certificate(name, *issuers.get(name, (ROOT, 1)), realm=realm) for name in names)
    return b"".join(one.public_bytes(Encoding.PEM) for one in certificates)


def _enclave_report(attributes: bytes, report_data: bytes) -> bytes:
    return (
        bytes([3] * 16)
        + bytes(4 + 28)
        + attributes
        + b"e" * 32
        + bytes(32)
        + QE_SIGNER
        + bytes(96)
        + struct.pack("<HH", 2, 6)
        + bytes(60)
        + report_data
    )


def _stamp(at: datetime.datetime) -> str:
    return f"{at:%Y-%m-%dT%H:%M:%SZ}"
