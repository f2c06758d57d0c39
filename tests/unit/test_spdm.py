"""`wire.spdm`: the transcript, byte by byte."""

from __future__ import annotations

import contextlib
import random
import time

import pytest

from appliance.errors import Malformed
from appliance.wire.spdm import MAX_TRANSCRIPT_BYTES, parse_transcript
from tests.fakes.nvidia_evidence import GOOD, NONCE, Report, encode_block, encode_report

SIGNATURE = bytes(range(96))
DIGEST = GOOD[0]


def transcript(report: Report | None = None) -> bytes:
    return encode_report(report) + SIGNATURE


def test_a_transcript_comes_apart_into_what_it_was_made_of() -> None:
    data = transcript(Report(opaque=b"vendor"))
    parsed = parse_transcript(data)
    assert parsed.nonce == NONCE
    assert parsed.responder_nonce == bytes(range(100, 132))
    assert {index - 1: block.value for index, block in parsed.blocks.items()} == GOOD
    assert parsed.opaque == b"vendor"
    assert data[parsed.opaque_offset :].startswith(b"vendor")
    assert parsed.signed + parsed.signature == data
    assert parsed.signature == SIGNATURE


def test_blocks_may_come_in_any_order() -> None:
    blocks = [encode_block(index, DIGEST) for index in (9, 254, 1)]
    assert list(parse_transcript(transcript(Report(blocks=blocks))).blocks) == [9, 254, 1]


def test_a_raw_bit_stream_may_have_any_length_and_a_digest_has_48_bytes() -> None:
    raw = encode_block(1, b"\x01\x02", value_type=0x82)
    assert parse_transcript(transcript(Report(blocks=[raw]))).blocks[1].value == b"\x01\x02"
    short = encode_block(1, DIGEST[:47])
    with pytest.raises(Malformed, match="48 bytes") as caught:
        parse_transcript(transcript(Report(blocks=[short])))
    assert caught.value.field == "response.record.value"


def test_one_measurement_that_was_asked_for_is_the_one_that_must_come() -> None:
    asked = Report(request=b"\x11\xe0\x01\x07", blocks=[encode_block(7, DIGEST)])
    assert list(parse_transcript(transcript(asked)).blocks) == [7]
    other = Report(request=b"\x11\xe0\x01\x07", blocks=[encode_block(8, DIGEST)])
    with pytest.raises(Malformed, match="asked for"):
        parse_transcript(transcript(other))


@pytest.mark.parametrize(
    ("report", "field"),
    [
        (Report(request=b"\x12\xe0\x01\xff"), "request.version_and_code"),
        (Report(request=b"\x11\xe1\x01\xff"), "request.version_and_code"),
        (Report(request=b"\x11\xe0\x00\xff"), "request.attributes"),
        (Report(response=b"\x12\x60\x00\x00"), "response.version_and_code"),
        (Report(response=b"\x11\x7f\x00\x00"), "response.version_and_code"),
        (Report(slot=1), "response.slot"),
        (Report(response=b"\x11\x60\x00\x02"), "response.slot"),
        (Report(blocks=[]), "response.number_of_blocks"),
        (Report(count=63), "response.record"),
        (Report(count=65), "response.record.index"),
        (Report(record_length=0xFFFFFF), "response.record"),
        (Report(blocks=[encode_block(3, DIGEST)] * 2), "response.record.index"),
        (Report(blocks=[encode_block(0, DIGEST)]), "response.record.index"),
        (Report(blocks=[encode_block(255, DIGEST)]), "response.record.index"),
        (
            Report(blocks=[encode_block(1, DIGEST, specification=2)]),
            "response.record.specification",
        ),
        (Report(opaque_length=0xFFFF), "response.opaque"),
        (Report(opaque_length=0), "report"),
    ],
)
def test_what_the_specification_does_not_allow_is_named(report: Report, field: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse_transcript(transcript(report))
    assert caught.value.field == field
    assert caught.value.offset is not None


def test_a_block_whose_two_lengths_disagree_is_refused() -> None:
    block = bytearray(encode_block(1, DIGEST))
    block[5] += 1
    with pytest.raises(Malformed):
        parse_transcript(transcript(Report(blocks=[bytes(block), encode_block(2, DIGEST)])))
    block[5] -= 2
    with pytest.raises(Malformed):
        parse_transcript(transcript(Report(blocks=[bytes(block), encode_block(2, DIGEST)])))


def test_a_block_with_more_in_it_than_its_value_is_refused() -> None:
    block = encode_block(1, DIGEST) + b"\0"
    longer = block[:2] + (len(block) - 4).to_bytes(2, "little") + block[4:]
    with pytest.raises(Malformed, match="expected its end") as caught:
        parse_transcript(transcript(Report(blocks=[longer])))
    assert caught.value.field == "response.record.measurement"


def test_no_shorter_or_longer_text_is_a_transcript() -> None:
    data = transcript()
    for length in range(len(data)):
        with pytest.raises(Malformed):
            parse_transcript(data[:length])
    with pytest.raises(Malformed, match="expected its end"):
        parse_transcript(data + b"\0")


def test_a_transcript_beyond_its_bound_is_not_read() -> None:
    started = time.perf_counter()
    with pytest.raises(Malformed, match="at most"):
        parse_transcript(bytes(100 << 20))
    assert time.perf_counter() - started < 1
    with pytest.raises(Malformed, match="at most"):
        parse_transcript(transcript() + bytes(MAX_TRANSCRIPT_BYTES))


def test_ten_thousand_random_inputs_raise_nothing_but_malformed() -> None:
    chance = random.Random(20261123)
    data = transcript()
    head = len(data) - len(data) % 100
    for round_ in range(10_000):
        if round_ % 2:
            blob = chance.randbytes(chance.randrange(0, 400))
        else:
            changed = bytearray(data)
            for _ in range(chance.randrange(1, 8)):
                changed[chance.randrange(0, head)] = chance.randrange(256)
            blob = bytes(changed[: chance.randrange(1, len(changed) + 1)])
        with contextlib.suppress(Malformed):
            parse_transcript(blob)
