"""`wire.rim`: one document, one signature over all of it, nothing hidden."""

from __future__ import annotations

import contextlib
import random
import time
from functools import cache

import pytest

from appliance.errors import Malformed
from appliance.wire.rim import MAX_RIM_BYTES, parse_rim
from tests.fakes.nvidia_evidence import (
    DRIVER,
    GOOD,
    SIGNED_INFO,
    driver_rim,
    encode_resource,
    encode_swid,
    rim_authority,
)
from tests.vectors_dir import VECTORS, needs_vectors


@cache
def signed(*resources: str) -> bytes:
    return rim_authority().sign(encode_swid(DRIVER, resources or [encode_resource(1, GOOD[1])]))


def altered(old: str, new: str, document: bytes | None = None) -> bytes:
    """The document with one text replaced, which must be there."""
    text = signed() if document is None else document
    assert old.encode("utf-8") in text
    return text.replace(old.encode("utf-8"), new.encode("utf-8"), 1)


def test_a_manifest_says_what_is_good_at_which_index() -> None:
    rim = parse_rim(
        signed(
            encode_resource(3, GOOD[3], GOOD[4]),
            encode_resource(0, GOOD[0]),
            encode_resource(7, GOOD[7], active="False"),
        )
    ).rim
    assert rim.measurements == {3: (GOOD[3], GOOD[4]), 0: (GOOD[0],)}
    assert (rim.tag_id, rim.colloquial_version) == (f"tag-{DRIVER}", DRIVER)
    assert (rim.product, rim.edition) == ("GH100", "GPU")


def test_inactive_records_need_no_digests() -> None:
    numeric = '<ns0:Resource type="Measurement" index="64" active="False" name="floor"/>'
    assert parse_rim(signed(numeric, encode_resource(1, GOOD[1]))).rim.measurements.keys() == {1}


def test_what_was_digested_is_the_document_without_its_signature() -> None:
    parsed = parse_rim(signed())
    assert b"Signature" not in parsed.content
    assert GOOD[1].hex().encode() in parsed.content
    assert parsed.content.startswith(b"<SoftwareIdentity")
    # The text around the signature is the document's, and stays.
    assert parse_rim(altered("</ds:Signature>", "</ds:Signature>\n  ")).content.endswith(
        b"  </SoftwareIdentity>"
    )


def test_an_xml_declaration_of_utf8_may_be_there() -> None:
    plain = parse_rim(signed()).content
    for declaration in (
        b'<?xml version="1.0"?>\n',
        b"<?xml version='1.0' encoding='UTF-8'?>",
        b'<?xml version="1.0" encoding="utf-8" standalone="yes"?>\n',
        b"\xef\xbb\xbf<?xml version='1.0' encoding='utf-8'?>\n",
    ):
        assert parse_rim(declaration + signed()).content == plain


BOMB = "<!DOCTYPE SoftwareIdentity [" + "".join(
    f'<!ENTITY l{n} "' + f"&l{n - 1};" * 10 + '">' if n else '<!ENTITY l0 "lol">' for n in range(10)
)


@pytest.mark.parametrize(
    "document",
    [
        (BOMB + "]>").encode() + altered("Nobody", "&l9;"),
        b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]>' + altered("Nobody", "&e;"),
        b'<!DOCTYPE x SYSTEM "http://127.0.0.1:1/x.dtd">' + signed(),
        b'<!DOCTYPE x [<!ENTITY % p SYSTEM "http://127.0.0.1:1/p">%p;]>' + signed(),
        b'<!DOCTYPE SoftwareIdentity [<!ATTLIST Meta colloquialVersion CDATA "1">]>' + signed(),
        b"<!---->" + signed(),
        signed() + b"<!-- after -->",
        signed() + b"<?after it?>",
        b'<?xml-stylesheet href="x.xsl"?>' + signed(),
        altered("</ds:SignatureValue>", "<!---->AA</ds:SignatureValue>"),
        altered("<ns0:Payload>", "<ns0:Payload><?x y?>"),
        altered("<ns0:Payload>", "<ns0:Payload><![CDATA[x]]>"),
        b'<?xml version="1.1"?>' + signed(),
        b'<?xml version="1.0" encoding="UTF-7"?>' + signed(),
        b'<?xml version="1.0" encoding="UTF-16"?>' + signed(),
        signed().decode().encode("utf-16"),
        signed().decode().encode("utf-16-le"),
        signed().decode().encode("utf-32"),
        # With a declaration libxml2 recognises these by themselves, and no `<!` is seen in them.
        ('<?xml version="1.0"?>' + signed().decode()).encode("utf-16-le"),
        ('<?xml version="1.0"?>' + signed().decode()).encode("utf-16-be"),
        b"\xff" + signed(),
        signed() + b"\0",
        signed() + b"<x/>",
        signed()[:-1],
        b"",
        b"   ",
        altered("<ns0:Payload>", "<ns0:Payload>&undefined;"),
        altered('name="GH100"', 'name="GH100" name="GH100"'),
        altered('name="GH100"', 'name="GH100" xml:id="a"'),
        altered("<ns0:Payload>", '<ns0:Payload xml:space="preserve">'),
        altered("<ds:SignedInfo>", '<ds:SignedInfo xml:lang="en">'),
        altered("<ns0:Payload>", '<ns0:Payload xmlns:relative="a/b">'),
        altered("<ns0:Payload>", '<ns0:Payload undeclared:a="b">'),
    ],
)
def test_declarations_entities_and_everything_hidden_are_refused(document: bytes) -> None:
    started = time.perf_counter()
    with pytest.raises(Malformed):
        parse_rim(document)
    assert time.perf_counter() - started < 1


def test_size_and_depth_are_bounded() -> None:
    for document in (
        bytes(100 << 20),
        signed() + b" " * MAX_RIM_BYTES,
        b"<a>" * 100_000,
        b"<a>" * 9 + b"</a>" * 9,
        altered("<ns0:Payload>", "<ns0:Payload>" + "<ns0:Resource>" * 8 + "</ns0:Resource>" * 8),
        b"<a " + b" ".join(b"a%d='1'" % n for n in range(60_000)) + b"/>",
    ):
        started = time.perf_counter()
        with pytest.raises(Malformed):
            parse_rim(document)
        assert time.perf_counter() - started < 2


def namespaces(count: int) -> str:
    return "".join(f' xmlns:a{number}="u:"' for number in range(count))


def attributes(count: int) -> str:
    return "".join(f' b{number}=""' for number in range(count))


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        # 42 KiB of these took libxml2 seven seconds, 53 KiB 37 s, 330 KiB of attributes six.
        ("<ns0:Payload>", f"<ns0:Payload{namespaces(700)}>" + "<a/>" * 2_500, "namespace"),
        ("<ns0:Payload>", f"<ns0:Payload{namespaces(40_000)}>", "namespace"),
        ("<ns0:Payload>", "<ns0:Payload>" + '<a xmlns:a="u:"/>' * 30, "namespace"),
        ("<ns0:Payload>", f"<ns0:Payload{attributes(32_000)}>", "attr"),
        ("<ns0:Payload>", f"<ns0:Payload{attributes(97)}>", "attributes"),
        ("<ns0:Payload>", "<ns0:Payload>" + "<a/>" * 200_000, "tags"),
        ("<ns0:Payload>", "<ns0:Payload>" + "<a></a>" * 2_048, "tags"),
    ],
)
def test_what_makes_canonical_xml_slow_is_refused_before_it_is_made(
    old: str, new: str, what: str
) -> None:
    document = altered(old, new)
    assert len(document) < MAX_RIM_BYTES
    started = time.process_time()
    with pytest.raises(Malformed, match=f"at most .* {what}"):
        parse_rim(document)
    assert time.process_time() - started < 0.5


def test_the_largest_manifest_that_is_read_is_read_in_little_time() -> None:
    # As many namespaces, attributes and elements as are allowed, each element ordering them all.
    room = "<a/>" * 2_450 + f"<a{attributes(96)}/>" * 1_540
    document = altered("<ns0:Payload>", f"<ns0:Link{namespaces(28)}>{room}</ns0:Link><ns0:Payload>")
    assert document.count(b"xmlns") == 32
    assert 0.9 * MAX_RIM_BYTES < len(document) < MAX_RIM_BYTES
    started = time.process_time()
    parse_rim(document)
    assert time.process_time() - started < 2


SIGNATURE = signed()[signed().index(b"<ds:Signature") : -len("</SoftwareIdentity>")].decode()
SHA256 = "http://www.w3.org/2001/04/xmlenc#sha256"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # None, two, one somewhere else, or parts of one somewhere else.
        (SIGNATURE, ""),
        (SIGNATURE, SIGNATURE * 2),
        (SIGNATURE, f"<ns0:Link>{SIGNATURE}</ns0:Link>"),
        ("<ns0:Payload>", '<ns0:Payload><Signature xmlns="http://www.w3.org/2000/09/xmldsig#"/>'),
        (
            "<ns0:Payload>",
            '<ns0:Link><x:KeyInfo xmlns:x="http://www.w3.org/2000/09/xmldsig#"/></ns0:Link><ns0:Payload>',
        ),
        # Its parts: missing, doubled, foreign, in another order.
        ("</ds:KeyInfo>", "</ds:KeyInfo><ds:Object/>"),
        ("</ds:KeyInfo>", "</ds:KeyInfo><ns0:Payload/>"),
        ("<ds:SignatureValue>", "<ds:SignatureValue>AA==</ds:SignatureValue><ds:SignatureValue>"),
        ("<ds:KeyInfo>", "<ds:KeyInfo><ds:KeyName>me</ds:KeyName>"),
        ("<ds:X509Data>", "<ds:X509Data><ds:X509SubjectName>me</ds:X509SubjectName>"),
        # One reference, to all of it, through exactly two transforms.
        ('<ds:Reference URI="">', '<ds:Reference URI="#part">'),
        ('<ds:Reference URI="">', "<ds:Reference>"),
        ('<ds:Reference URI="">', '<ds:Reference URI="" Type="x">'),
        ("</ds:Reference>", '</ds:Reference><ds:Reference URI=""/>'),
        ("<ds:Transforms>", '<ds:Transforms><ds:Transform Algorithm="x"/>'),
        ("#enveloped-signature", "#base64"),
        ('"http://www.w3.org/2006/12/xml-c14n11"/></ds:Transforms>', '"x"/></ds:Transforms>'),
        (
            '<ds:CanonicalizationMethod Algorithm="http://www.w3.org/2006/12/xml-c14n11"/>',
            '<ds:CanonicalizationMethod Algorithm="http://www.w3.org/2001/10/xml-exc-c14n#"/>',
        ),
        ("#ecdsa-sha384", "#ecdsa-sha1"),
        ("#ecdsa-sha384", "#hmac-sha384"),
        ("http://www.w3.org/2001/04/xmldsig-more#sha384", "http://www.w3.org/2000/09/xmldsig#sha1"),
        ("http://www.w3.org/2001/04/xmldsig-more#sha384", SHA256),
        ("<ds:DigestValue>", "<ds:DigestValue>AAAA"),
        ("<ds:DigestValue>", "<ds:DigestValue>*"),
        ("<ds:DigestValue>", "<ds:DigestValue><ds:x/>"),
        ("<ds:SignatureValue>", "<ds:SignatureValue>AAAA"),
        ("<ds:X509Certificate>", "<ds:X509Certificate></ds:X509Certificate><ds:X509Certificate>*"),
    ],
)
def test_only_nvidias_profile_of_a_signature_is_read(old: str, new: str) -> None:
    with pytest.raises(Malformed):
        parse_rim(altered(old, new))


def test_a_signature_carries_one_to_sixteen_certificates() -> None:
    one = "<ds:X509Certificate>AAAA</ds:X509Certificate>"
    for count in (17, 1_000):
        with pytest.raises(Malformed, match="1 to 16"):
            parse_rim(altered("<ds:X509Data>", "<ds:X509Data>" + one * count))
    start, end = SIGNATURE.index("<ds:X509Certificate>"), SIGNATURE.index("</ds:X509Data>")
    with pytest.raises(Malformed, match="1 to 16"):
        parse_rim(altered(SIGNATURE[start:end], ""))


def test_line_breaks_in_base64_mean_nothing() -> None:
    document = altered("<ds:SignatureValue>", "<ds:SignatureValue>\n \t")
    assert parse_rim(document).signature == parse_rim(signed()).signature


RESOURCE = encode_resource(1, GOOD[1])


@pytest.mark.parametrize(
    "resources",
    [
        [encode_resource(1, GOOD[1]), encode_resource(1, GOOD[2])],
        [encode_resource(1, GOOD[1]), encode_resource(1, GOOD[1], active="False")],
        [RESOURCE.replace('alternatives="1"', 'alternatives="2"')],
        [encode_resource(1, GOOD[1], GOOD[2]).replace('alternatives="2"', 'alternatives="1"')],
        [RESOURCE.replace('alternatives="1"', 'alternatives="0"')],
        [RESOURCE.replace('alternatives="1"', 'alternatives="-1"')],
        [RESOURCE.replace('alternatives="1"', 'alternatives="99999"')],
        [RESOURCE.replace('alternatives="1"', 'alternatives=""')],
        [RESOURCE.replace("Hash0", "Hash1")],
        [RESOURCE.replace("ns2:Hash0", "Hash0")],
        [RESOURCE.replace('"True"', '"true"')],
        [RESOURCE.replace('"True"', '"yes"')],
        [RESOURCE.replace('active="True"', "")],
        [RESOURCE.replace('index="1"', "")],
        [RESOURCE.replace('index="1"', 'index="01"')],
        [RESOURCE.replace('index="1"', 'index="+1"')],
        [RESOURCE.replace('index="1"', 'index=" 1"')],
        [RESOURCE.replace('index="1"', 'index="64"')],
        [RESOURCE.replace('index="1"', 'index="\u0661"')],
        [RESOURCE.replace('size="48"', 'size="32"')],
        [RESOURCE.replace('type="Measurement"', 'type="Floor"')],
        [encode_resource(1, GOOD[1][:47])],
        [encode_resource(1, GOOD[1] + b"\0")],
        [RESOURCE.replace(GOOD[1].hex(), "z" * 96)],
        [RESOURCE.replace("/>", "><ns0:File/></ns0:Resource>")],
        [RESOURCE, '<ns0:File name="x"/>'],
        [RESOURCE.replace("ns0:", "")[:-2] + 'xmlns="urn:other"/>'],
        [],
    ],
)
def test_measurements_that_could_be_read_in_two_ways_are_refused(resources: list[str]) -> None:
    text = encode_swid(DRIVER, resources)
    document = rim_authority().sign(text.encode("ascii", "xmlcharrefreplace").decode())
    with pytest.raises(Malformed) as caught:
        parse_rim(document)
    assert caught.value.field.startswith(("Resource", "Payload"))


def test_numeric_reference_values_are_refused_by_name() -> None:
    floor = RESOURCE.replace(
        "/>",
        'xmlns:ns3="https://docs.nvidia.com/attestation/specs/latest/opaque-data.html" '
        'ns3:minSvn="2"/>',
    )
    with pytest.raises(Malformed, match="numeric reference values"):
        parse_rim(signed(floor))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("schema.xsd", "schema-2009.xsd"),
        ("<ns0:Meta ", "<ns0:Meta/><ns0:Meta "),
        ("<ns0:Meta ", "<ns0:Beta "),
        ("<ns0:Payload>", "<ns0:Payload/><ns0:Payload>"),
        ("<ns0:Payload>", "<ns0:Link><ns0:Meta/></ns0:Link><ns0:Payload>"),
        (f'colloquialVersion="{DRIVER}"', 'colloquialVersion=""'),
        (f'tagId="tag-{DRIVER}"', ""),
        ('product="GH100"', ""),
    ],
)
def test_a_tag_that_is_not_nvidias_kind_is_refused(old: str, new: str) -> None:
    text = signed().decode().replace(old, new)
    assert text != signed().decode()
    with pytest.raises(Malformed):
        parse_rim(text.encode())


def test_two_thousand_damaged_documents_raise_nothing_but_malformed() -> None:
    chance = random.Random(5)
    good = signed()
    for _ in range(2_000):
        changed = bytearray(good)
        for _ in range(chance.randrange(1, 6)):
            changed[chance.randrange(len(changed))] = chance.randrange(32, 127)
        with contextlib.suppress(Malformed):
            parse_rim(bytes(changed))
    for _ in range(8_000):
        with contextlib.suppress(Malformed):
            parse_rim(chance.randbytes(chance.randrange(0, 64)))


def test_the_digest_may_be_sha256_too() -> None:
    info = SIGNED_INFO.replace("http://www.w3.org/2001/04/xmldsig-more#sha384", SHA256)
    with pytest.raises(Malformed, match="32 bytes"):
        parse_rim(rim_authority().sign(encode_swid(DRIVER, [RESOURCE]), signed_info=info))
    digest = "A" * 43 + "="
    document = rim_authority().sign(
        encode_swid(DRIVER, [RESOURCE]), signed_info=info.replace("{digest}", digest)
    )
    assert parse_rim(document).digest_algorithm == "sha256"


@needs_vectors
def test_nvidias_own_manifests_are_read() -> None:
    folder = VECTORS / "nvidia"
    counts = {
        path.name: len(parse_rim(path.read_bytes()).rim.measurements)
        for path in [*folder.glob("rims/*"), *folder.glob("h100_595.71.05/*.xml")]
    }
    assert counts["NV_GPU_DRIVER_GH100_595.71.05.xml"] == 22
    assert counts["NV_GPU_VBIOS_1010_0210_886_96009F0004.xml"] == 12
    assert counts["switchVBIOSRim_NV_SWITCH_BIOS_5612_0002_890_9610550001.xml"] == 31
    assert len(counts) == 10


def test_the_drivers_manifest_of_these_tests_is_one() -> None:
    assert parse_rim(driver_rim()).rim.measurements.keys() == set(range(12, 40))
