"""NVIDIA-shaped evidence under roots of one's own: reports, chains and reference manifests.

Made here from the formats alone, so that the verifier's tests do not depend on the vendor's
vectors, and so that every part can be made wrong on its own.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from lxml import etree  # type: ignore[import-untyped]

from appliance.wire.encoding import encode_base64
from appliance.wire.evidence import GpuEvidence

SINCE = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
UNTIL = datetime.datetime(2028, 1, 1, tzinfo=datetime.UTC)
AT = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)

NONCE = bytes(range(32))
FWID = hashlib.sha384(b"firmware").digest()
DRIVER = "595.71.05"
VBIOS = "96.00.9F.00.04"
GOOD = {index: hashlib.sha384(bytes([index])).digest() for index in range(64)}
"""What every GPU here measures."""

COMPOSITE_DEVICE_ID = "2.23.133.5.4.1"
DICE_TCB_INFO = "2.23.133.5.4.1.1"


@dataclass(frozen=True)
class Issued:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """As drivers hand it out."""
        return self.certificate.public_bytes(Encoding.PEM)


@cache
def key_of(name: str, curve: type[ec.EllipticCurve] = ec.SECP384R1) -> ec.EllipticCurvePrivateKey:
    """One key per name."""
    del name
    return ec.generate_private_key(curve())


def issue(
    name: str,
    issuer: Issued | None,
    *,
    ca: bool = True,
    since: datetime.datetime = SINCE,
    until: datetime.datetime = UNTIL,
    extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
    key: ec.EllipticCurvePrivateKey | None = None,
) -> Issued:
    """A certificate; `issuer` None signs it with its own key."""
    own = key or key_of(name)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(since)
        .not_valid_after(until)
    )
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    signer = issuer.key if issuer else own
    return Issued(builder.sign(signer, hashes.SHA384()), own)


def der(tag: int, *values: bytes) -> bytes:
    """One DER element."""
    value = b"".join(values)
    length = len(value)
    if length < 0x80:
        return bytes((tag, length)) + value
    size = (length.bit_length() + 7) // 8
    return bytes((tag, 0x80 | size)) + length.to_bytes(size, "big") + value


def der_fwid(digest: bytes, algorithm: str = "608648016503040202") -> bytes:
    """A FWID."""
    return der(0x30, der(0x06, bytes.fromhex(algorithm)), der(0x04, digest))


def composite_device_id(digest: bytes = FWID) -> bytes:
    """The form that Hopper has."""
    spki = key_of("dice").public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return der(0x30, der(0x02, b"\x01"), spki, der_fwid(digest))


def dice_tcb_info(*digests: bytes) -> bytes:
    """The form that Blackwell has."""
    return der(
        0x30,
        der(0x80, b"NVIDIA"),
        der(0x81, b"GB100 A01 GSP"),
        der(0x83, b"\x01"),
        der(0xA6, *(der_fwid(one) for one in digests)),
        der(0x87, bytes.fromhex("0080000001")),
    )


def dice_extension(value: bytes, oid: str = COMPOSITE_DEVICE_ID) -> x509.UnrecognizedExtension:
    """As it stands in a leaf."""
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)


@dataclass
class Device:
    """A GPU: its certificates and what it would report."""

    root: Issued
    intermediate: Issued
    device: Issued
    leaf: Issued

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        """To pin."""
        return (self.root.certificate,)

    @property
    def pem(self) -> bytes:
        """Its chain, leaf first, root last."""
        return b"".join(one.pem for one in (self.leaf, self.device, self.intermediate, self.root))

    def evidence(self, report: bytes | None = None, pem: bytes | None = None) -> GpuEvidence:
        """Its report, or another one, with its chain, or another one."""
        signed = self.sign(encode_report()) if report is None else report
        return GpuEvidence("nvidia_gpu", signed, self.pem if pem is None else pem)

    def sign(self, unsigned: bytes) -> bytes:
        """The report with its signature."""
        return unsigned + sign(self.leaf.key, unsigned)


def make_device(
    name: str = "GH100 A01 GSP BROM",
    *,
    dice: x509.UnrecognizedExtension | None = None,
    until: datetime.datetime = UNTIL,
    leaf_key: ec.EllipticCurvePrivateKey | None = None,
) -> Device:
    """A GPU under a root of its own."""
    root = issue("device root", None)
    intermediate = issue("provisioner", root)
    device = issue(name, intermediate)
    extension = dice or dice_extension(composite_device_id())
    leaf = issue(
        "leaf", device, ca=False, until=until, extensions=((extension, False),), key=leaf_key
    )
    return Device(root, intermediate, device, leaf)


@cache
def hopper() -> Device:
    """The GPU that most tests use."""
    return make_device()


def sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """ECDSA with SHA-384 as r || s, 96 bytes."""
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA384())))
    return r.to_bytes(48, "big") + s.to_bytes(48, "big")


def gpu_fields(**changed: bytes | None) -> list[tuple[int, bytes]]:
    """Opaque data of a Hopper GPU; a changed value None leaves the field out."""
    numbers = {
        "vbios_version": 6,
        "board_id": 14,
        "chip_sku": 15,
        "project": 17,
        "project_sku": 18,
        "driver_version": 3,
        "nvdec0_status": 11,
        "fwid": 20,
        "protected_pcie_status": 21,
        "switch_pdi": 22,
        "opaque_data_version": 34,
        "chip_info": 35,
        "feature_flag": 36,
    }
    values: dict[str, bytes | None] = {
        "vbios_version": bytes.fromhex("009f009604000000"),
        "board_id": bytes.fromhex("08050000"),
        "chip_sku": b"886\0\0\0",
        "project": b"1010\0",
        "project_sku": b"0210\0",
        "driver_version": DRIVER.encode("ascii") + b"\0",
        "nvdec0_status": b"\x55",
        "fwid": FWID,
        "protected_pcie_status": b"\x55",
        "opaque_data_version": b"\x01\0",
        "feature_flag": b"\0\0",
        **changed,
    }
    return [(numbers[name], value) for name, value in values.items() if value is not None]


def encode_fields(fields: Sequence[tuple[int, bytes]]) -> bytes:
    """Type, length, value."""
    return b"".join(
        number.to_bytes(2, "little") + len(value).to_bytes(2, "little") + value
        for number, value in fields
    )


def encode_block(index: int, value: bytes, *, value_type: int = 1, specification: int = 1) -> bytes:
    """A measurement block."""
    measurement = bytes((value_type,)) + len(value).to_bytes(2, "little") + value
    return bytes((index, specification)) + len(measurement).to_bytes(2, "little") + measurement


@dataclass(frozen=True)
class Report:
    """The parts of a report, for `encode_report`."""

    nonce: bytes = NONCE
    request: bytes = b"\x11\xe0\x01\xff"
    slot: int = 0
    response: bytes = b"\x11\x60\x00\x00"
    blocks: Sequence[bytes] | None = None
    count: int | None = None
    record_length: int | None = None
    opaque: bytes | None = None
    opaque_length: int | None = None
    measurements: Mapping[int, bytes] = field(default_factory=lambda: GOOD)


def encode_report(report: Report | None = None) -> bytes:
    """A report without its signature."""
    parts = report or Report()
    blocks = parts.blocks
    if blocks is None:
        blocks = [encode_block(index + 1, value) for index, value in parts.measurements.items()]
    record = b"".join(blocks)
    opaque = encode_fields(gpu_fields()) if parts.opaque is None else parts.opaque
    count = len(blocks) if parts.count is None else parts.count
    record_length = len(record) if parts.record_length is None else parts.record_length
    opaque_length = len(opaque) if parts.opaque_length is None else parts.opaque_length
    return b"".join(
        (
            parts.request,
            parts.nonce,
            bytes((parts.slot,)),
            parts.response,
            bytes((count,)),
            record_length.to_bytes(3, "little"),
            record,
            bytes(range(100, 132)),
            opaque_length.to_bytes(2, "little"),
            opaque,
        )
    )


SWID = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
DSIG = "http://www.w3.org/2000/09/xmldsig#"
HASHES = "http://www.w3.org/2001/04/xmlenc#sha384"
SIGNED_INFO = (
    "<ds:SignedInfo>"
    '<ds:CanonicalizationMethod Algorithm="http://www.w3.org/2006/12/xml-c14n11"/>'
    '<ds:SignatureMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"/>'
    '<ds:Reference URI=""><ds:Transforms>'
    '<ds:Transform Algorithm="http://www.w3.org/2000/09/xmldsig#enveloped-signature"/>'
    '<ds:Transform Algorithm="http://www.w3.org/2006/12/xml-c14n11"/></ds:Transforms>'
    '<ds:DigestMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#sha384"/>'
    "<ds:DigestValue>{digest}</ds:DigestValue></ds:Reference></ds:SignedInfo>"
)


@dataclass
class RimAuthority:
    """Who signs manifests."""

    root: Issued
    issuer: Issued
    signer: Issued

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        """To pin."""
        return (self.root.certificate,)

    def sign(self, unsigned: str, *, signed_info: str = SIGNED_INFO, extra: str = "") -> bytes:
        """Put an enveloped signature at the end of the root element.

        Args:
            unsigned: the document. signed_info: with a place for the digest.
            extra: more content of the Signature element, after KeyInfo.
        """
        head, end = unsigned.rsplit("</", 1)
        digest = hashlib.sha384(canonical(etree.fromstring(unsigned))).digest()
        info = signed_info.format(digest=encode_base64(digest))
        draft = f'{head}<ds:Signature xmlns:ds="{DSIG}">{info}</ds:Signature></{end}'
        placed = etree.fromstring(draft).find(f".//{{{DSIG}}}SignedInfo")
        value = encode_base64(sign(self.signer.key, canonical(placed)))
        certificates = "".join(
            f"<ds:X509Certificate>{self._base64(one)}</ds:X509Certificate>"
            for one in (self.signer, self.issuer, self.root)
        )
        return (
            f'{head}<ds:Signature xmlns:ds="{DSIG}">{info}'
            f"<ds:SignatureValue>{value}</ds:SignatureValue>"
            f"<ds:KeyInfo><ds:X509Data>{certificates}</ds:X509Data></ds:KeyInfo>{extra}"
            f"</ds:Signature></{end}"
        ).encode("ascii")

    @staticmethod
    def _base64(one: Issued) -> str:
        return encode_base64(one.certificate.public_bytes(Encoding.DER))


def make_rim_authority(
    *,
    since: datetime.datetime = SINCE,
    until: datetime.datetime = UNTIL,
    key: ec.EllipticCurvePrivateKey | None = None,
) -> RimAuthority:
    """A signer under a root of its own."""
    root = issue("rim root", None, until=UNTIL + datetime.timedelta(days=3650))
    issuer = issue("rim issuer", root, until=UNTIL + datetime.timedelta(days=3000))
    signer = issue("rim signer", issuer, ca=False, since=since, until=until, key=key)
    return RimAuthority(root, issuer, signer)


@cache
def rim_authority() -> RimAuthority:
    """The signer that most tests use."""
    return make_rim_authority()


def canonical(element: object) -> bytes:
    """Inclusive Canonical XML."""
    text: bytes = etree.tostring(element, method="c14n", exclusive=False, with_comments=False)
    return text


def encode_resource(index: int, *digests: bytes, active: str = "True", more: str = "") -> str:
    """One record of a manifest."""
    hashed = " ".join(f'ns2:Hash{n}="{one.hex()}"' for n, one in enumerate(digests))
    return (
        f'<ns0:Resource type="Measurement" index="{index}" active="{active}" '
        f'alternatives="{len(digests)}" {hashed} name="Measurement_{index}" size="48" {more}/>'
    )


def encode_swid(
    version: str, resources: Sequence[str], *, product: str = "GH100", edition: str = "GPU"
) -> str:
    """A manifest without its signature."""
    lines = "\n        ".join(resources)
    return (
        f'<SoftwareIdentity xmlns="{SWID}" xmlns:ns0="{SWID}" xmlns:ns2="{HASHES}" '
        f'name="{product}" tagId="tag-{version}" version="1.0" tagVersion="0">\n'
        '    <ns0:Entity name="Nobody" role="softwareCreator tagCreator"/>\n'
        f'    <ns0:Meta colloquialVersion="{version}" edition="{edition}" product="{product}"/>\n'
        f"    <ns0:Payload>\n        {lines}\n    </ns0:Payload>\n"
        "</SoftwareIdentity>"
    )


DRIVER_INDICES = range(12, 40)
VBIOS_INDICES = range(12)


def driver_rim(**changed: bytes) -> bytes:
    """The driver's manifest; `i9=digest` changes an index's value."""
    return _rim(DRIVER, DRIVER_INDICES, changed)


def vbios_rim(**changed: bytes) -> bytes:
    """The VBIOS's manifest."""
    return _rim(VBIOS, VBIOS_INDICES, changed)


def _rim(version: str, indices: Sequence[int], changed: Mapping[str, bytes]) -> bytes:
    resources = [encode_resource(one, changed.get(f"i{one}", GOOD[one])) for one in indices]
    resources += [
        encode_resource(one, bytes(48), active="False") for one in GOOD if one not in indices
    ]
    return rim_authority().sign(encode_swid(version, resources))
