"""NVIDIA's reference integrity manifests: SWID tags with golden measurements, signed as XML.

Sources: ISO/IEC 19770-2:2015 (SWID), TCG "Reference Integrity Manifest Information Model" 1.01,
W3C "XML Signature Syntax and Processing" 1.1 and "Canonical XML" 1.1, narrowed to what NVIDIA
signs; NVIDIA's RIM guide. A manifest names the versions it is for and, per index, the SHA-384
digests that a device of that version may report.

XML signatures are known for verifiers that check one part of a document and believe another. Here
one tree is parsed, that tree is digested, and only what was digested is read:

- exactly one `Signature`, a child of the root, whose one reference covers the whole document but
  the signature itself; nothing of the signature's own namespace lies outside it;
- no declarations, entities, comments, processing instructions and CDATA sections, which hide text
  from one reader and show it to another: of `<!` and `<?` only the XML declaration may appear;
- no `xml:` attributes: without them Canonical XML 1.0, which libxml2 offers through lxml, and 1.1,
  which NVIDIA names, give the same bytes (they differ in how a subset inherits such attributes;
  Canonical XML 1.1, section 2.4).

Nothing here is trustworthy before `rats.schemes.nvidia_gpu` checked digest, signature and chain.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from lxml import etree  # type: ignore[import-untyped]  # it ships no types

from appliance.errors import Malformed
from appliance.wire.encoding import encode_base64

MAX_RIM_BYTES = 1 << 20
"""Real ones have 20 to 26 KiB."""

MAX_DEPTH = 8
"""Real ones have six levels."""

MAX_TAGS = 4096
"""That begin or end an element, or both: at most as many elements. Real ones have 99."""

MAX_NAMESPACES = 32
"""Declarations in all; real ones have six. Canonical XML puts those in scope in order at every
element, so that many of both cost far more than their bytes (Canonical XML 1.1, section 2.3)."""

MAX_ALTERNATIVES = 64

MAX_ATTRIBUTES = MAX_ALTERNATIVES + 32
"""Of one element; real ones have twelve. Canonical XML puts these in order, too."""

MAX_CERTIFICATES = 16
LAST_DIGEST_INDEX = 63
"""Of the 64 SPDM blocks; higher indices are numeric values ("Opaque Data RIM Attributes")."""

DIGEST_HEX = re.compile(r"[0-9A-Fa-f]{96}\Z")
DIGEST_BYTES = 48
SIGNATURE_BYTES = 96

SWID = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
DSIG = "http://www.w3.org/2000/09/xmldsig#"
SHA384_HASHES = "http://www.w3.org/2001/04/xmlenc#sha384"
OPAQUE_DATA = "https://docs.nvidia.com/attestation/specs/latest/opaque-data.html"
XML = "http://www.w3.org/XML/1998/namespace"

C14N_1_1 = "http://www.w3.org/2006/12/xml-c14n11"
ENVELOPED = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
ECDSA_SHA384 = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
DIGESTS = {
    "http://www.w3.org/2001/04/xmlenc#sha256": "sha256",
    "http://www.w3.org/2001/04/xmldsig-more#sha384": "sha384",
    "http://www.w3.org/2001/04/xmlenc#sha512": "sha512",
}
"""By hashlib's name. NVIDIA uses SHA-384."""

_DECLARATION = re.compile(
    rb"""(?:\xef\xbb\xbf)?<\?xml\s+version=["']1\.0["'](?:\s+encoding=["'][Uu][Tt][Ff]-8["'])?"""
    rb"""(?:\s+standalone=["'](?:yes|no)["'])?\s*\?>"""
)
_SMALL_NUMBER = re.compile(r"(?:0|[1-9][0-9]{0,3})\Z")
_WHITESPACE = str.maketrans("", "", " \t\r\n")


class Element(Protocol):
    """As much of lxml's elements as is used here."""

    tag: str
    text: str | None
    tail: str | None
    attrib: Mapping[str, str]

    def __iter__(self) -> Iterator[Element]: ...

    def __len__(self) -> int: ...

    def iter(self, tag: str, /) -> Iterator[Element]:
        """Itself and what is below it, of that name."""
        ...

    def getparent(self) -> Element | None:
        """The element it is in."""
        ...

    def getprevious(self) -> Element | None:
        """The element before it in the same parent."""
        ...

    def remove(self, element: Element, /) -> None:
        """Take out a child, with the text after it."""
        ...


@dataclass(frozen=True, slots=True)
class Rim:
    """What a manifest says.

    Attributes:
        tag_id: its own name, unique per manifest.
        colloquial_version: of the driver or the VBIOS it is for.
        product: the chip, such as `GH100`. edition: `GPU` or `SWITCH`.
        measurements: index, counted from 0, to the digests that are good; active ones only.
    """

    tag_id: str
    colloquial_version: str
    product: str
    edition: str
    measurements: dict[int, tuple[bytes, ...]]


@dataclass(frozen=True, slots=True, repr=False)
class SignedRim:
    """A manifest and what is needed to check its signature.

    Attributes:
        signed_info: canonical bytes that `signature` (r || s, 96 bytes) is over.
        digest_algorithm: of `digest`, by hashlib's name.
        content: canonical bytes of the document without its signature, that `digest` is of.
        certificates: DER, the signer's first.
    """

    rim: Rim
    signed_info: bytes
    signature: bytes
    digest_algorithm: str
    digest: bytes
    content: bytes
    certificates: tuple[bytes, ...]

    def __repr__(self) -> str:
        return f"SignedRim({self.rim.product} {self.rim.colloquial_version})"


def parse_rim(document: bytes) -> SignedRim:
    """Parse a manifest and its signature.

    Raises:
        Malformed: not XML without extras, not NVIDIA's profile of a signature, or a measurement
            that has not its form.
    """
    # 1. The one tree.
    root = _parse_tree(document)
    # 2. The signature's parts, and the bytes that it is over, while it is still in its place:
    #    canonical XML writes the namespaces that are in scope there.
    signature = _only_signature(root)
    _check_bare(signature)
    info, value, key_info = _children(signature, "SignedInfo", "SignatureValue", "KeyInfo")
    digest_algorithm, digest = _parse_signed_info(info)
    signed_info = _canonical(info)
    certificates = _parse_key_info(key_info)
    raw_signature = _base64(value, SIGNATURE_BYTES)
    # 3. The enveloped-signature transform; what is left is what was digested, and what is read.
    _remove(signature)
    content = _canonical(root)
    return SignedRim(
        _parse_swid(root),
        signed_info,
        raw_signature,
        digest_algorithm,
        digest,
        content,
        certificates,
    )


def _parse_tree(document: bytes) -> Element:
    if len(document) > MAX_RIM_BYTES:
        raise Malformed(f"rim: expected at most {MAX_RIM_BYTES} bytes", field="rim")
    try:
        document.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed("rim: expected UTF-8", field="rim", offset=error.start) from None
    declared = _DECLARATION.match(document)
    body = document[declared.end() :] if declared else document
    # In well-formed XML these two can begin nothing but what is not wanted.
    for forbidden in (b"<!", b"<?"):
        if (at := body.find(forbidden)) >= 0:
            raise Malformed(
                "rim: expected no declaration, comment, CDATA section or processing instruction",
                field="rim",
                offset=len(document) - len(body) + at,
            )
    # Before libxml2 reads a name. Here `<` begins a tag and nothing else (XML 1.0, section 2.4:
    # "MUST NOT appear in their literal form" elsewhere), and without entities a name is spelled out.
    _check_count(body.count(b"<"), MAX_TAGS, "tags")
    _check_count(body.count(b"xmlns"), MAX_NAMESPACES, "namespace declarations")
    # The encoding is given: a declared one would let libxml2 see other characters than the search.
    parser = etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        attribute_defaults=False,
        huge_tree=False,
        recover=False,
        remove_blank_text=False,
    )
    try:
        root: Element = etree.fromstring(body, parser)
    except (etree.XMLSyntaxError, ValueError):
        # libxml2's own text quotes the document.
        raise Malformed("rim: expected well-formed XML", field="rim") from None
    _check_tree(root)
    return root


def _check_count(count: int, most: int, what: str) -> None:
    if count > most:
        raise Malformed(f"rim: expected at most {most} {what}, got {count}", field="rim")


def _check_tree(root: Element) -> None:
    """Elements only, few attributes, none of `xml:`, not too deep; by level, without recursion."""
    level, depth = [root], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise Malformed(f"rim: expected at most {MAX_DEPTH} levels", field="rim")
        for element in level:
            # Comments and the like have no name. None gets past the search; none would be read.
            if not isinstance(element.tag, str):
                raise Malformed("rim: expected elements and text only", field="rim")
            _check_count(len(element.attrib), MAX_ATTRIBUTES, "attributes of an element")
            if any(name.startswith(f"{{{XML}}}") for name in element.attrib):
                raise Malformed("rim: expected no xml: attribute", field="rim")
        level = [child for element in level for child in element]


def _only_signature(root: Element) -> Element:
    found = list(root.iter(f"{{{DSIG}}}Signature"))
    if len(found) != 1 or found[0].getparent() is not root:
        raise Malformed(
            f"Signature: expected one, directly in the root, got {len(found)}", field="Signature"
        )
    inside = sum(1 for _ in found[0].iter(f"{{{DSIG}}}*"))
    if sum(1 for _ in root.iter(f"{{{DSIG}}}*")) != inside:
        raise Malformed("Signature: expected none of its parts elsewhere", field="Signature")
    return found[0]


def _parse_signed_info(info: Element) -> tuple[str, bytes]:
    """The digest's algorithm and value, once everything else is as NVIDIA has it."""
    canonicalization, method, reference = _children(
        info, "CanonicalizationMethod", "SignatureMethod", "Reference"
    )
    _check_algorithm(canonicalization, C14N_1_1)
    _check_algorithm(method, ECDSA_SHA384)
    # The empty URI is the whole document (XML Signature 1.1, section 4.4.3.2).
    if dict(reference.attrib) != {"URI": ""}:
        raise Malformed('Reference: expected URI="" and nothing else', field="Reference")
    transforms, digest_method, digest_value = _children(
        reference, "Transforms", "DigestMethod", "DigestValue"
    )
    enveloped, canonical = _children(transforms, "Transform", "Transform")
    _check_algorithm(enveloped, ENVELOPED)
    _check_algorithm(canonical, C14N_1_1)
    digest_algorithm = DIGESTS.get(digest_method.attrib.get("Algorithm", ""))
    if digest_algorithm is None or len(digest_method):
        raise Malformed("DigestMethod: expected SHA-256, SHA-384 or SHA-512", field="DigestMethod")
    return digest_algorithm, _base64(digest_value, int(digest_algorithm.removeprefix("sha")) // 8)


def _parse_key_info(key_info: Element) -> tuple[bytes, ...]:
    _check_bare(key_info)
    (data,) = _children(key_info, "X509Data")
    _check_bare(data)
    certificates = list(data)
    if not 0 < len(certificates) <= MAX_CERTIFICATES:
        raise Malformed(
            f"X509Data: expected 1 to {MAX_CERTIFICATES} certificates", field="X509Data"
        )
    _children(data, *("X509Certificate" for _ in certificates))
    return tuple(_base64(one, None) for one in certificates)


def _children(parent: Element, *names: str) -> list[Element]:
    """The child elements, which must be exactly these of the signature's namespace, in order."""
    children = list(parent)
    if [child.tag for child in children] != [f"{{{DSIG}}}{name}" for name in names]:
        own = _local(parent)
        raise Malformed(f"{own}: expected {', '.join(names)} and nothing else", field=own)
    return children


def _check_bare(element: Element) -> None:
    """Of what the signature does not cover, nothing may say anything: no attributes, no text."""
    texts = (element.text, *(child.tail for child in element))
    if element.attrib or any((text or "").translate(_WHITESPACE) for text in texts):
        own = _local(element)
        raise Malformed(f"{own}: expected its elements and nothing else", field=own)


def _check_algorithm(element: Element, expected: str) -> None:
    if dict(element.attrib) != {"Algorithm": expected} or len(element):
        own = _local(element)
        raise Malformed(f"{own}: expected {expected} without parameters", field=own)


def _base64(element: Element, length: int | None) -> bytes:
    """Its text, of so many bytes. Line breaks may be in it (XML Signature 1.1, section 4.1)."""
    own = _local(element)
    text = (element.text or "").translate(_WHITESPACE)
    try:
        data = b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise Malformed(f"{own}: expected base64", field=own) from None
    bare = not element.attrib and not len(element)
    if not bare or encode_base64(data) != text or len(data) != (length or len(data)):
        raise Malformed(f"{own}: expected {length or 'some'} bytes of base64", field=own)
    return data


def _canonical(element: Element) -> bytes:
    """Inclusive Canonical XML without comments, with the namespaces that are in scope."""
    try:
        text: bytes = etree.tostring(element, method="c14n", exclusive=False, with_comments=False)
    except etree.C14NError:
        # "Implementations … MUST report an operation failure on documents containing relative
        # namespace URIs" (Canonical XML 1.1, section 1.3).
        raise Malformed("rim: expected XML that has a canonical form", field="rim") from None
    return text


def _remove(signature: Element) -> None:
    """Take the element out and leave the text that follows it, which lxml counts as its own."""
    parent, before, tail = signature.getparent(), signature.getprevious(), signature.tail or ""
    if parent is None:
        raise Malformed("Signature: expected a parent", field="Signature")
    if before is None:
        parent.text = (parent.text or "") + tail
    else:
        before.tail = (before.tail or "") + tail
    parent.remove(signature)


def _parse_swid(root: Element) -> Rim:
    if root.tag != f"{{{SWID}}}SoftwareIdentity":
        raise Malformed("rim: expected a SoftwareIdentity of 2015", field="SoftwareIdentity")
    meta, payload = _single(root, "Meta"), _single(root, "Payload")
    return Rim(
        tag_id=_attribute(root, "tagId"),
        colloquial_version=_attribute(meta, "colloquialVersion"),
        product=_attribute(meta, "product"),
        edition=meta.attrib.get("edition", ""),
        measurements=_parse_payload(payload),
    )


def _single(root: Element, name: str) -> Element:
    found = list(root.iter(f"{{{SWID}}}{name}"))
    if len(found) != 1 or found[0].getparent() is not root:
        raise Malformed(f"{name}: expected one, directly in the root", field=name)
    return found[0]


def _parse_payload(payload: Element) -> dict[int, tuple[bytes, ...]]:
    measurements: dict[int, tuple[bytes, ...]] = {}
    seen: set[int] = set()
    for resource in payload:
        if resource.tag != f"{{{SWID}}}Resource" or len(resource):
            raise Malformed("Payload: expected Resources only", field="Payload")
        index = _number(resource, "index")
        if index in seen:
            raise Malformed(f"Resource: index {index} twice", field="Resource.index")
        seen.add(index)
        if _is_active(resource):
            measurements[index] = _parse_measurement(resource, index)
    if not seen:
        raise Malformed("Payload: expected at least one Resource", field="Payload")
    return measurements


def _is_active(resource: Element) -> bool:
    # NVIDIA's two verifiers read any third word differently, so there is none.
    active = _attribute(resource, "active")
    if active not in ("True", "False"):
        raise Malformed("Resource: expected active to be True or False", field="Resource.active")
    return active == "True"


def _parse_measurement(resource: Element, index: int) -> tuple[bytes, ...]:
    """The digests of one active record."""
    count = _number(resource, "alternatives")
    if not 0 < count <= MAX_ALTERNATIVES:
        raise Malformed(
            f"Resource: expected 1 to {MAX_ALTERNATIVES} alternatives",
            field="Resource.alternatives",
        )
    names = [f"{{{SHA384_HASHES}}}Hash{number}" for number in range(count)]
    namespaced = {name for name in resource.attrib if name.startswith("{")}
    if any(name.startswith(f"{{{OPAQUE_DATA}}}") for name in namespaced):
        raise Malformed(
            "Resource: numeric reference values (opaque-data.html) are not read here: they are "
            "for drivers of CUDA 13.5 and later",
            field="Resource",
        )
    # More hashes than alternatives, or hashes of another kind, would be conditions left unread.
    if namespaced != set(names):
        raise Malformed(
            f"Resource: expected the SHA-384 hashes of {count} alternatives and no others",
            field="Resource.Hash",
        )
    if resource.attrib.get("type") != "Measurement" or index > LAST_DIGEST_INDEX:
        raise Malformed(
            f"Resource: expected a Measurement of index 0 to {LAST_DIGEST_INDEX}", field="Resource"
        )
    if _number(resource, "size") != DIGEST_BYTES:
        raise Malformed(f"Resource: expected size {DIGEST_BYTES}", field="Resource.size")
    return tuple(_digest(_attribute(resource, name)) for name in names)


def _digest(text: str) -> bytes:
    if not DIGEST_HEX.match(text):
        raise Malformed(f"Resource: expected {DIGEST_BYTES} bytes of hex", field="Resource.Hash")
    return bytes.fromhex(text)


def _attribute(element: Element, name: str) -> str:
    value = element.attrib.get(name)
    if not value:
        own = f"{_local(element)}.{name.rpartition('}')[2]}"
        raise Malformed(f"{own}: expected it, it is missing or empty", field=own)
    return value


def _local(element: Element) -> str:
    return element.tag.rpartition("}")[2]


def _number(element: Element, name: str) -> int:
    text = _attribute(element, name)
    if not _SMALL_NUMBER.match(text):
        own = f"{_local(element)}.{name}"
        raise Malformed(f"{own}: expected a small number", field=own)
    return int(text)
