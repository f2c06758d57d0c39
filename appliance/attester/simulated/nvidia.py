"""NVIDIA's formats, written: an H100's attestation report, and the reference values that fit it.

The report is an SPDM 1.1 GET_MEASUREMENTS request and its MEASUREMENTS response (DSP0274 1.1.0
section 10.11) with NVIDIA's opaque fields; the reference values are SWID tags with an enveloped
XML signature. Both are byte for byte of the shape of a real H100's with driver 595.71.05, down
to the order of the opaque fields and the namespaces; the values are made up, and the versions
begin with 99.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from lxml import etree  # type: ignore[import-untyped]  # it ships no types

from appliance.attester.simulated.pki import Identity

MEASUREMENTS = 64
MEASUREMENT_BYTES = 48
SCALAR_BYTES = 48
"""Of r and s on P-384."""

DRIVER_VERSION = "999.00.01"
VBIOS_VERSION = "99.00.00.00.01"
PROJECT, PROJECT_SKU, CHIP_SKU = "1010", "0999", "999"

FWID = hashlib.sha384(b"simulated GPU firmware").digest()
"""Of the firmware that the leaf certificate belongs to; also in the report."""

DRIVER_INDEXES = (7, *range(21, 42))
VBIOS_INDEXES = (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12)
"""Which measurements a real driver's and a real VBIOS's reference values cover; the rest are
zero. Counted from 0, while the blocks of the report count from 1."""

GOLDEN: Mapping[int, bytes] = {
    index: hashlib.sha384(b"simulated measurement %d" % index).digest()
    for index in (*DRIVER_INDEXES, *VBIOS_INDEXES)
}

_OPAQUE: tuple[tuple[int, bytes], ...] = (
    # type, value; in a real report's order
    (6, bytes.fromhex("00000099 01000000")),  # VBIOS version, its dots and digits turned around
    (14, bytes.fromhex("08050000")),  # board id
    (15, CHIP_SKU.encode().ljust(9, b"\0")),
    (16, b"0".ljust(5, b"\0")),  # chip SKU modifier
    (17, PROJECT.encode().ljust(5, b"\0")),
    (18, PROJECT_SKU.encode().ljust(5, b"\0")),
    (19, bytes(2)),  # project SKU modifier
    (3, DRIVER_VERSION.encode() + b"\0"),
    (4, bytes.fromhex("8001000000000000")),  # GPU info
    (12, b"".join(number.to_bytes(4, "little") for number in [0] * 64)),  # measurement counts
    (13, bytes.fromhex("00c00100")),  # CPR info
    (11, b"\x55"),  # NVDEC0 is disabled: measurement 35 is not compared
    (20, FWID),
    (21, b"\x55"),  # protected PCIe is off
    (34, (1).to_bytes(2, "little")),  # opaque data version
    (36, bytes(2)),  # feature flag: a single GPU, passed through
)

_HEADER = """<SoftwareIdentity xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" \
xmlns:ns0="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" \
xmlns:ns2="http://www.w3.org/2001/04/xmlenc#sha384" corpus="false" name="GH100" patch="false" \
supplemental="false" tagId="{tag_id}" version="1.0" tagVersion="0">
    <ns0:Entity name="NVIDIA Corporation" role="softwareCreator tagCreator"/>
    <ns0:Meta xmlns:ns1="https://trustedcomputinggroup.org/resource/\
tcg-reference-integrity-manifest-rim-information-model/" colloquialVersion="{version}" \
edition="GPU" product="GH100" revision="r1" PayloadType="direct" ns1:BindingSpec="RIMIM" \
ns1:BindingSpecVersion="1.01" ns1:PlatformManufacturerId="5703" \
ns1:PlatformManufacturerStr="NVIDIA Corporation" ns1:PlatformModel="GH100" \
ns1:FirmwareManufacturer="NVIDIA Corporation" ns1:FirmwareManufacturerId="5703"/>
    <ns0:Payload xmlns:SHA384="http://www.w3.org/2001/04/xmlenc#sha384">
"""

_RESOURCE = """        <ns0:Resource type="Measurement" index="{index}" active="{active}" \
alternatives="1" ns2:Hash0="{digest}" name="Measurement_{index}" size="48"/>
"""

_FOOTER = """    </ns0:Payload>
{signature}</SoftwareIdentity>
"""

_SIGNATURE = """<ds:Signature xmlns:ds="http://www.w3.org/2000/09/xmldsig#"><ds:SignedInfo>\
<ds:CanonicalizationMethod Algorithm="http://www.w3.org/2006/12/xml-c14n11"/>\
<ds:SignatureMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"/>\
<ds:Reference URI=""><ds:Transforms>\
<ds:Transform Algorithm="http://www.w3.org/2000/09/xmldsig#enveloped-signature"/>\
<ds:Transform Algorithm="http://www.w3.org/2006/12/xml-c14n11"/></ds:Transforms>\
<ds:DigestMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#sha384"/>\
<ds:DigestValue>{digest}</ds:DigestValue></ds:Reference></ds:SignedInfo>\
<ds:SignatureValue>{value}</ds:SignatureValue><ds:KeyInfo><ds:X509Data>{certificates}\
</ds:X509Data></ds:KeyInfo></ds:Signature>"""

_SIGNED_INFO = "{http://www.w3.org/2000/09/xmldsig#}SignedInfo"


@dataclass(frozen=True, slots=True)
class ReferenceValues:
    """Which reference values to write.

    Attributes:
        name: what NVIDIA's service would file them under.
        version: of the driver or the VBIOS. indexes: of the measurements they cover.
    """

    name: str
    version: str
    indexes: tuple[int, ...]


DRIVER_RIM = ReferenceValues(
    f"NV_GPU_DRIVER_GH100_{DRIVER_VERSION}", DRIVER_VERSION, DRIVER_INDEXES
)
VBIOS_RIM = ReferenceValues(
    f"NV_GPU_VBIOS_{PROJECT}_{PROJECT_SKU}_{CHIP_SKU}_{VBIOS_VERSION.replace('.', '')}",
    VBIOS_VERSION,
    VBIOS_INDEXES,
)


def encode_report(
    key: ec.EllipticCurvePrivateKey,
    *,
    nonce: bytes,
    responder_nonce: bytes,
    measurements: Mapping[int, bytes] = GOLDEN,
) -> bytes:
    """The request's 37 bytes and the signed response.

    Args:
        key: P-384, of the leaf certificate. nonce, responder_nonce: 32 bytes.
        measurements: SHA-384 values by index, counted from 0; the others are zero.
    """
    assert len(nonce) == len(responder_nonce) == 32
    # 1. GET_MEASUREMENTS: SPDM 1.1, signature wanted, all blocks, slot 0.
    request = b"\x11\xe0\x01\xff" + nonce + b"\0"
    # 2. The measurement record: DMTF blocks, index from 1, type 1 (mutable firmware) as H100's are.
    record = b"".join(
        _block(index + 1, measurements.get(index, bytes(MEASUREMENT_BYTES)))
        for index in range(MEASUREMENTS)
    )
    opaque = b"".join(_u16(kind) + _u16(len(value)) + value for kind, value in _OPAQUE)
    # 3. MEASUREMENTS: header, record, the responder's nonce, opaque data, raw r and s over all
    #    of both messages.
    response = b"\x11\x60\0\0" + bytes([MEASUREMENTS]) + len(record).to_bytes(3, "little")
    transcript = request + response + record + responder_nonce + _u16(len(opaque)) + opaque
    return transcript + _raw_signature(key, transcript)


def encode_rim(rim: ReferenceValues, signers: Sequence[Identity]) -> bytes:
    """A signed SWID tag with the golden measurements.

    Args:
        signers: of its X509Data, the one that signs first.
    """
    resources = "".join(
        _RESOURCE.format(
            index=index,
            active=index in rim.indexes,
            digest=(GOLDEN[index] if index in rim.indexes else bytes(MEASUREMENT_BYTES)).hex(),
        )
        for index in range(MEASUREMENTS)
    )
    tag_id = hashlib.sha384(rim.name.encode()).hexdigest()
    text = _HEADER.format(tag_id=tag_id, version=rim.version) + resources + _FOOTER
    # 1. The digest is over the document without the signature element (enveloped transform).
    unsigned = text.format(signature="")
    digest = base64.b64encode(hashlib.sha384(_canonical(etree.fromstring(unsigned))).digest())
    # 2. SignedInfo is made canonical where it stands: it inherits the document's namespaces.
    certificates = "".join(
        f"<ds:X509Certificate>{_certificate(one)}</ds:X509Certificate>" for one in signers
    )
    fields = {"digest": digest.decode(), "certificates": certificates}
    around = etree.fromstring(text.format(signature=_SIGNATURE.format(value="", **fields)))
    signed_info = next(around.iter(_SIGNED_INFO))
    key = signers[0].key
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    value = base64.b64encode(_raw_signature(key, _canonical(signed_info))).decode()
    return text.format(signature=_SIGNATURE.format(value=value, **fields)).encode("utf-8")


def _canonical(element: Any) -> bytes:
    """C14N 1.1. lxml knows 1.0, which differs only for `xml:` attributes, and there are none."""
    form: bytes = etree.tostring(element, method="c14n", exclusive=False, with_comments=False)
    return form


def _certificate(identity: Identity) -> str:
    der = identity.certificate.public_bytes(Encoding.DER)
    return base64.encodebytes(der).decode("ascii")


def _block(number: int, digest: bytes) -> bytes:
    """DSP0274 1.1.0 table 39 and 40: index, DMTF, size; value type, value size, value."""
    return bytes([number, 1]) + _u16(len(digest) + 3) + b"\1" + _u16(len(digest)) + digest


def _raw_signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """Signature as r and s, big-endian, 48 bytes each, of ECDSA with SHA-384."""
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA384())))
    return r.to_bytes(SCALAR_BYTES, "big") + s.to_bytes(SCALAR_BYTES, "big")


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "little")
