"""Lines of sealed secrets, what is sealed in them, and which storage key they are for."""

from __future__ import annotations

import hashlib
import hmac
import json
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import Malformed
from appliance.rats.reference import ImageReference
from appliance.wire.sealed import (
    MAX_BYTES,
    MAX_SEALED_BYTES,
    PCRS,
    SealedSecret,
    pack,
    parse_sealed,
    parse_storage_key,
    unpack,
)
from image.seal import expected_pcrs, kdfa, policy_digest, seal

ONE = SealedSecret("nvidia", b"public", b"duplicate", b"seed")
IMAGE = "sha256:" + "11" * 32
PREDICTED = {"pcr4": frozenset({"44" * 32}), "pcr11": frozenset({"bb" * 32})}


def storage_key() -> bytes:
    """As a TPM writes one, of a key that is nobody's."""
    numbers = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    template = bytes.fromhex("0023000b00030472000000060080004300100003" + "0010")
    point = b"".join(struct.pack(">H", 32) + n.to_bytes(32) for n in (numbers.x, numbers.y))
    return struct.pack(">H", len(template + point)) + template + point


def test_lines_are_read_as_they_are_written() -> None:
    other = SealedSecret("intel", b"", b"\0" * 300, b"x")
    assert parse_sealed(ONE.to_line() + other.to_line()) == (ONE, other)
    assert parse_sealed(b"") == ()


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"\n",
        b"[]",
        ONE.to_line() * 2,
        ONE.to_line().replace(b"nvidia", b"../x"),
        ONE.to_line().replace(b'"seed":', b'"sead":'),
        ONE.to_line().replace(b"{", b'{"more":1,', 1),
        ONE.to_line().replace(b'"c2VlZA=="', b"1"),
        ONE.to_line().replace(b"c2VlZA==", b"c2VlZA"),
        SealedSecret("nvidia", bytes(1025), b"", b"").to_line(),
        b"".join(SealedSecret(f"n{i}", b"", b"", b"").to_line() for i in range(17)),
        b" " * (MAX_BYTES + 1),
    ],
)
def test_what_is_not_such_lines_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        parse_sealed(data)


@given(st.binary(max_size=300))
def test_nothing_but_malformed_comes_of_any_bytes(data: bytes) -> None:
    for parse in (parse_sealed, parse_storage_key):
        with pytest.raises(Malformed):
            parse(data or b"x")


def test_a_secret_is_bound_to_its_name() -> None:
    packed = pack("nvidia", b"a=b")
    assert unpack("nvidia", packed) == b"a=b"
    with pytest.raises(Malformed, match="another name"):
        unpack("intel", packed)
    with pytest.raises(Malformed, match="no secret"):
        unpack("nvidia", b"nvidia=a\nb")
    longest = MAX_SEALED_BYTES - len("nvidia=")
    assert len(pack("nvidia", b"x" * longest)) == MAX_SEALED_BYTES
    for secret in (b"", b"a b", b"a\n", b"x" * (longest + 1)):
        with pytest.raises(Malformed, match="expected 1 to 121 printable"):
            pack("nvidia", secret)
    for name in ("", "Nvidia", "a" * 17, "a=b", "a.b"):
        with pytest.raises(Malformed, match="name: expected"):
            pack(name, b"x")


def test_only_a_storage_key_of_the_template_is_sealed_to() -> None:
    key = storage_key()
    assert [len(one) for one in parse_storage_key(key)] == [32, 32]
    # One flipped bit of the template is another kind of key; of the size, none at all.
    for at in (*range(26), 58, 59):
        changed = bytearray(key)
        changed[at] ^= 1
        with pytest.raises(Malformed):
            parse_storage_key(bytes(changed))
    for wrong in (key + b"\0", key[:-1], key[2:]):
        with pytest.raises(Malformed):
            parse_storage_key(wrong)
    with pytest.raises(Malformed, match="point of P-256"):
        seal("nvidia", b"x", pcrs={}, storage_key=key[:-1] + bytes([key[-1] ^ 1]))


def test_what_is_sealed_does_not_show_and_is_new_each_time() -> None:
    key = storage_key()
    pcrs = dict.fromkeys(PCRS, bytes(32))
    first, second = (seal("nvidia", b"CANARY", pcrs=pcrs, storage_key=key) for _ in range(2))
    assert b"CANARY" not in first.to_line() + b"".join((first.public, first.duplicate, first.seed))
    assert (first.public, first.duplicate, first.seed) != (
        second.public,
        second.duplicate,
        second.seed,
    )
    assert len(first.to_line()) < 1024


def test_the_policy_is_over_the_values_of_exactly_these_pcrs() -> None:
    pcrs = {pcr: bytes([pcr]) * 32 for pcr in PCRS}
    values = hashlib.sha256(b"".join(pcrs[pcr] for pcr in (4, 7, 11, 12))).digest()
    selected = bytes.fromhex("00000001000b03901800")  # bits 4, 7, 11 and 12
    command = bytes.fromhex("0000017f")
    expected = hashlib.sha256(bytes(32) + command + selected + values).digest()
    assert policy_digest(pcrs) == expected
    assert policy_digest(dict(reversed(pcrs.items()))) == expected


def test_kdfa_is_one_block_of_sp_800_108() -> None:
    block = bytes.fromhex("00000001") + b"STORAGE\0" + b"name" + bytes.fromhex("00000080")
    assert kdfa(b"key", b"STORAGE", b"name", bits=128) == hmac.digest(b"key", block, "sha256")[:16]


def test_every_pcr_has_one_expected_value() -> None:
    image = ImageReference(IMAGE, pcrs={**PREDICTED, "pcr7": frozenset({"77" * 32})})
    values = expected_pcrs((image,), image=None, given=[])
    assert values == {
        4: b"\x44" * 32,
        7: b"\x77" * 32,
        11: b"\xbb" * 32,
        12: bytes(32),  # nobody predicts what must not be there
    }
    own = expected_pcrs((image,), image=IMAGE, given=[f"7={'aa' * 32}"])
    assert own[7] == b"\xaa" * 32


@pytest.mark.parametrize(
    ("pcrs", "given_", "problem"),
    [
        ({}, [], "PCR 7: expected one SHA-256 value; say which with --pcr 7=HEX"),
        ({"pcr7": frozenset({"77" * 32, "78" * 32})}, [], "PCR 7: expected one"),
        ({"pcr7": frozenset({"77" * 20})}, [], "PCR 7: expected one"),
        ({}, ["7=AA"], "--pcr: expected"),
        ({}, [f"8={'aa' * 32}"], "--pcr: expected"),
    ],
)
def test_a_pcr_without_one_is_named(
    pcrs: dict[str, frozenset[str]], given_: list[str], problem: str
) -> None:
    image = ImageReference(IMAGE, pcrs={**PREDICTED, **pcrs})
    with pytest.raises(Malformed, match=problem):
        expected_pcrs((image,), image=None, given=given_)


def test_the_image_is_named_where_there_are_several() -> None:
    images = (ImageReference(IMAGE), ImageReference("sha256:" + "22" * 32))
    for image in (None, "sha256:" + "33" * 32):
        with pytest.raises(Malformed, match="--image: expected one"):
            expected_pcrs(images, image=image, given=[])


def test_a_line_is_json_of_one_line() -> None:
    line = ONE.to_line()
    assert line.endswith(b"}\n")
    assert set(json.loads(line)) == {"name", "public", "duplicate", "seed"}
