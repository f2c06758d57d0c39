"""TPM structures: what real TPMs and tpm2-tools wrote, and what nobody should have."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import Malformed
from appliance.wire.tpm import (
    DIGEST_BYTES,
    PcrSelection,
    parse_pcrs,
    parse_public,
    parse_quote,
    parse_signature,
)
from tests.fakes.amd_evidence import rsa_key
from tests.fakes.azure_evidence import quote_message
from tests.vectors_dir import VECTORS, needs_vectors

PCRS = {pcr: hashlib.sha256(bytes([pcr])).digest() for pcr in range(24)}
QUOTE = quote_message(b"nonce", PCRS)

# Of swtpm 0.7.1, by tpm2_quote 5.4 over sha256:0,4,7.
SWTPM_QUOTE = bytes.fromhex(
    "ff54434780180022000bd67134e009e32abcab750c84242aa7acdc8ee828c6a9c773968be6383eb705020002aabb"
    "000000000000037e00000001000000000120191023001636360000000100"
    "0b03910000"
    "0020451c137033f0ea4b1bd098598c51c54df7a8c2ffa6f6d50970b3f5c2106b1403"
)


def template(modulus: bytes, *, attributes: int = 0x00050072, exponent: int = 0) -> bytes:
    """A TPMT_PUBLIC of an RSA key, as `tpm2_readpublic -f tpmt` writes it."""
    head = struct.pack(">HHIH", 1, 0x000B, attributes, 0)
    parameters = struct.pack(">HHHHI", 0x0010, 0x0014, 0x000B, 2048, exponent)
    return head + parameters + struct.pack(">H", len(modulus)) + modulus


MODULUS = rsa_key("test AK").public_key().public_numbers().n.to_bytes(256)
PUBLIC = template(MODULUS)
TAGGED = struct.pack(">HHH", 0x0014, 0x000B, 256) + b"s" * 256
ECDSA = struct.pack(">HHH", 0x0018, 0x000C, 48) + b"r" * 48 + struct.pack(">H", 48) + b"s" * 48


def serialized(banks: dict[int, dict[int, bytes]]) -> bytes:
    """As `tpm2_quote -F serialized` writes it on a little-endian machine."""
    data = struct.pack("<I", len(banks))
    for index in range(16):
        bank, values = list(banks.items())[index] if index < len(banks) else (0, {})
        bits = sum(1 << pcr for pcr in values)
        data += struct.pack("<HB", bank, 3 if values else 0) + struct.pack("<I", bits) + b"\0"
    digests = [value for values in banks.values() for _, value in sorted(values.items())]
    lists = [digests[at : at + 8] for at in range(0, len(digests), 8)]
    data += struct.pack("<I", len(lists))
    for one in lists:
        data += struct.pack("<I", len(one))
        for place in range(8):
            value = one[place] if place < len(one) else b""
            data += struct.pack("<H", len(value)) + value.ljust(64, b"\0")
    return data


def text(banks: dict[str, dict[int, bytes]]) -> bytes:
    lines = []
    for bank, values in banks.items():
        lines.append(f"  {bank}:")
        lines += [f"    {pcr:<2}: 0x{value.hex().upper()}" for pcr, value in values.items()]
    return ("\n".join(lines) + "\n").encode()


def test_a_software_tpms_quote_reads_as_tpm2_print_prints_it() -> None:
    quote = parse_quote(SWTPM_QUOTE)
    assert quote.extra_data == bytes.fromhex("aabb")
    assert (quote.clock, quote.reset_count, quote.restart_count, quote.safe) == (894, 1, 0, True)
    assert quote.firmware_version == 0x2019102300163636
    assert quote.selections == (PcrSelection("sha256", (0, 4, 7)),)
    assert quote.pcr_digest.hex().startswith("451c1370")
    assert quote.qualified_signer[:2] == b"\x00\x0b"


@needs_vectors
def test_every_quote_of_a_real_vtpm_parses() -> None:
    message = (VECTORS / "azure" / "trustee_snp_tpm-quote.msg").read_bytes()
    assert parse_quote(message).extra_data == b"challenge"
    signature = (VECTORS / "azure" / "trustee_snp_tpm-quote.sig").read_bytes()
    assert parse_signature(signature).algorithm == "rsassa"


def test_signatures_are_read_in_both_forms() -> None:
    assert parse_signature(TAGGED).value == parse_signature(b"s" * 256).value
    found = parse_signature(ECDSA)
    assert (found.algorithm, found.hash) == ("ecdsa", "sha384")
    assert found.value[0] == 0x30
    assert parse_signature(struct.pack(">HHH", 0x0016, 0x0004, 256) + bytes(256)).hash == "sha1"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        TAGGED + b"\0",
        struct.pack(">HHH", 0x0005, 0x000B, 32) + bytes(32),  # HMAC
        struct.pack(">HHH", 0x0014, 0x0099, 256) + bytes(256),
        struct.pack(">HHH", 0x0014, 0x000B, 128) + bytes(128),
        struct.pack(">HHH", 0x0018, 0x000B, 0x1000) + bytes(0x1000),
    ],
)
def test_what_is_no_signature_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        parse_signature(data)


def test_a_public_area_is_read_alone_and_in_its_tpm2b() -> None:
    alone = parse_public(PUBLIC)
    assert parse_public(struct.pack(">H", len(PUBLIC)) + PUBLIC) == alone
    assert alone.public_key() == rsa_key("test AK").public_key()
    assert alone.is_restricted_signing_key
    assert parse_public(template(b"")).unique == (b"",)
    for data in (template(b""), template(bytes(256))):
        with pytest.raises(Malformed, match="expected a key"):
            parse_public(data).public_key()


@pytest.mark.parametrize(
    ("attributes", "what"),
    [
        (0x00040072, "not restricted"),
        (0x00030072, "decrypts, does not sign"),
        (0x00070072, "decrypts too"),
        (0x00050070, "may leave its TPM"),
    ],
)
def test_only_a_restricted_signing_key_is_one(attributes: int, what: str) -> None:
    public = parse_public(template(MODULUS, attributes=attributes))
    assert not public.is_restricted_signing_key, what


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"\x00\x08"),  # a keyed hash
        (2, b"\x00\x99"),  # a name algorithm nobody knows
        (14, b"\x07\xd0"),  # 2000 bits
    ],
)
def test_other_objects_are_refused(offset: int, value: bytes) -> None:
    changed = PUBLIC[:offset] + value + PUBLIC[offset + len(value) :]
    with pytest.raises(Malformed):
        parse_public(struct.pack(">H", len(changed)) + changed)


def ecc(curve: int, *, kdf: bytes = b"\x00\x10", scheme: bytes = b"\x00\x18\x00\x0b") -> bytes:
    head = struct.pack(">HHIHH", 0x23, 0x000B, 0x00050072, 0, 0x0010)
    point = struct.pack(">H", 32) + bytes(32)
    return head + scheme + struct.pack(">H", curve) + kdf + point + point


def test_ecc_keys_and_their_schemes_are_read() -> None:
    public = parse_public(ecc(3))
    assert (public.key_bits, public.scheme_hash) == (256, "sha256")
    assert parse_public(ecc(3, kdf=b"\x00\x20\x00\x0b")).unique == public.unique
    assert parse_public(ecc(3, scheme=b"\x00\x10")).scheme_hash == ""
    assert parse_public(ecc(3, scheme=b"\x00\x1a\x00\x0b\x00\x00")).scheme == 0x1A
    with pytest.raises(Malformed, match="P-256"):
        parse_public(ecc(1))
    with pytest.raises(Malformed, match="expected a key"):
        public.public_key()  # not on the curve
    sealing = PUBLIC[:10] + b"\x00\x06\x00\x80\x00\x43" + PUBLIC[12:]  # AES-128 in CFB
    assert parse_public(sealing).unique == parse_public(PUBLIC).unique


def test_the_four_forms_of_pcr_values_read_the_same() -> None:
    some = {pcr: PCRS[pcr] for pcr in (0, 4, 7, 11, 12, 13, 14, 15, 16)}
    sha1 = {0: bytes(20), 1: bytes(20)}
    assert parse_pcrs(b"".join(PCRS.values())) == PCRS
    assert parse_pcrs(b"".join(some.values()), selected=tuple(some)) == some
    assert parse_pcrs(serialized({4: sha1, 11: some})) == some
    assert parse_pcrs(serialized({11: PCRS})) == PCRS
    assert parse_pcrs(text({"sha1": sha1, "sha256": some})) == some
    assert parse_pcrs(b"pcrs:\n\n" + text({"sha256": some})) == some
    document = {"sha256": {str(pcr): value.hex() for pcr, value in some.items()}}
    assert parse_pcrs(json.dumps(document).encode()) == some


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"".join(list(PCRS.values())[:3]),  # which three?
        serialized({11: PCRS}) + b"\0",
        serialized({11: PCRS})[:-1],
        serialized({4: {0: bytes(20)}}),  # no SHA-256
        b"\x11" + serialized({11: PCRS})[1:],  # 17 banks
        serialized({11: PCRS}).replace(b"\x0b\x00\x03", b"\x0b\x00\x05", 1),
        serialized({11: PCRS}).replace(b"\x03\0\0\0\x08", b"\x03\0\0\0\x09", 1),
        serialized({11: PCRS}).replace(b"\x08\0\0\0\x20\0", b"\x08\0\0\0\x41\0", 1),
        serialized({11: PCRS}).replace(b"\x08\0\0\0\x20\0", b"\x07\0\0\0\x20\0", 1),
        serialized({11: {0: bytes(20)}}),  # 20 bytes of SHA-256
        text({"sha1": {0: bytes(20)}}),
        text({"sha256": {0: bytes(32)}}) + b"    0 : 0x" + b"0" * 64,  # twice
        text({"sha256": {0: bytes(32)}}) + b"and more",
        text({"sha256": {77: bytes(32)}}),
        b'{"sha256":{}}',
        b'{"sha256":{"04":"' + b"0" * 64 + b'"}}',
        b'{"sha256":{"4":"' + b"0" * 62 + b'"}}',
        b'{"sha256":{"4":"' + b"A" * 64 + b'"}}',
        b'{"sha256":{"4":4}}',
        b'{"md5":{"4":"00"}}',
        b'{"sha256":[]}',
        b"{" + b"x" * 100,
        b"x" * (1 << 20),
    ],
)
def test_what_are_no_pcr_values_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        parse_pcrs(data)


@pytest.mark.parametrize("count", [17, 0x7FFFFFFF])
def test_a_selection_that_claims_more_banks_than_there_are_is_refused(count: int) -> None:
    at = QUOTE.index(struct.pack(">IHB", 1, 11, 3))
    with pytest.raises(Malformed, match="at most 16"):
        parse_quote(QUOTE[:at] + struct.pack(">I", count) + QUOTE[at + 4 :])


PARSERS: tuple[tuple[Callable[[bytes], object], bytes], ...] = (
    (parse_quote, QUOTE),
    (parse_quote, SWTPM_QUOTE),
    (parse_signature, TAGGED),
    (parse_signature, ECDSA),
    (parse_public, PUBLIC),
    (parse_public, struct.pack(">H", len(PUBLIC)) + PUBLIC),
    (parse_pcrs, serialized({11: {0: bytes(32)}})),
)


@pytest.mark.parametrize(("parse", "whole"), PARSERS)
def test_every_truncation_and_every_trailing_byte_is_refused(
    parse: Callable[[bytes], object], whole: bytes
) -> None:
    parse(whole)
    for length in range(len(whole)):
        if parse is parse_signature and length == 256:
            continue  # then it is a bare one
        with pytest.raises(Malformed):
            parse(whole[:length])
    with pytest.raises(Malformed):
        parse(whole + b"\0")


@pytest.mark.parametrize(("parse", "whole"), PARSERS)
def test_a_changed_byte_is_read_or_refused_and_nothing_else(
    parse: Callable[[bytes], object], whole: bytes
) -> None:
    fields = set()
    for at in range(len(whole)):
        for flip in (0x01, 0x80, 0xFF):
            changed = whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]
            try:
                parse(changed)
            except Malformed as error:
                fields.add(error.field)
    assert fields
    assert "$" not in fields  # every refusal says what was being read


def test_ten_thousand_random_inputs_are_refused_or_read() -> None:
    source = random.Random(1)
    parsers = (parse_quote, parse_signature, parse_public, parse_pcrs)
    read = 0
    for _ in range(10_000):
        data = source.randbytes(source.randrange(700))
        for parse in parsers:
            try:
                parse(data)
            except Malformed:
                continue
            read += 1
    assert read < 200  # bare signatures and 24 values are any bytes of that length


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_a_quote_with_any_end_is_read_or_refused(end: bytes) -> None:
    for cut in (6, 42, 60, 80):
        offsets: list[int | None] = [0]
        try:
            parse_quote(QUOTE[:cut] + end)
        except Malformed as error:
            offsets.append(error.offset)
        assert None not in offsets


def test_digest_sizes_are_those_of_the_algorithms() -> None:
    for name, size in DIGEST_BYTES.items():
        assert hashlib.new(name).digest_size == size
