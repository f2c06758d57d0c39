"""TCG event logs: parsing within bounds, and the registers that follow."""

from __future__ import annotations

import hashlib
import random
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import Malformed
from appliance.wire.event_log import MAX_EVENTS, MAX_LOG_BYTES, parse_event_log, replay
from tests.fakes.software_tpm import (
    EV_NO_ACTION,
    EV_SEPARATOR,
    Firmware,
    event2,
    spec_id_event,
    startup_locality,
)

LOG = Firmware(algorithms=(4, 11)).boot().log


def extend(value: bytes, data: bytes, algorithm: str = "sha256") -> bytes:
    return hashlib.new(algorithm, value + hashlib.new(algorithm, data).digest()).digest()


def test_a_log_replays_to_the_registers() -> None:
    events = parse_event_log(LOG)
    registers = replay(events)
    assert sorted(registers) == [0, 1, 2, 3, 4, 5, 6, 7, 11]
    assert registers[4] == extend(extend(bytes(32), bytes(4)), b"uki")
    assert replay(events, "sha1")[5] == extend(bytes(20), bytes(4), "sha1")
    assert events[0].to_json() == {
        "register": 0,
        "type": "EV_S_CRTM_VERSION",
        "digests": {
            "sha1": hashlib.sha1(b"firmware").hexdigest(),
            "sha256": hashlib.sha256(b"firmware").hexdigest(),
        },
        "data": b"firmware".hex(),
        "data_bytes": 8,
    }


def test_a_ccel_replays_to_rtmrs() -> None:
    """The same form, SHA-384, index 1 is RTMR0."""
    firmware = Firmware(algorithms=(12,))
    firmware.measure(1, b"td hob")
    firmware.measure(2, b"uki")
    registers = replay(parse_event_log(firmware.log + b"\xff" * 4096), "sha384")
    assert registers[2] == extend(bytes(48), b"uki", "sha384")


@pytest.mark.parametrize("locality", [0, 3, 4])
def test_pcr_0_begins_with_the_locality_of_the_start(locality: int) -> None:
    log = spec_id_event() + startup_locality(locality)
    log += event2(0, 8, {11: hashlib.sha256(b"crtm").digest()}, b"crtm")
    registers = replay(parse_event_log(log))
    assert registers[0] == extend(bytes(31) + bytes([locality]), b"crtm")


@pytest.mark.parametrize(
    "events",
    [
        event2(0, 8, {11: bytes(32)}, b"") + startup_locality(3),
        startup_locality(3) + startup_locality(3),
        event2(1, EV_NO_ACTION, {11: bytes(32)}, b"StartupLocality\0\x03"),
        event2(0, EV_NO_ACTION, {11: bytes(32)}, b"StartupLocality\0"),
    ],
    ids=["too late", "twice", "another PCR", "too short"],
)
def test_a_locality_that_is_no_initial_value_is_refused(events: bytes) -> None:
    parsed = parse_event_log(spec_id_event() + events)
    with pytest.raises(Malformed, match="locality"):
        replay(parsed)


def test_events_that_act_on_nothing_extend_nothing() -> None:
    log = spec_id_event() + event2(0xFFFFFFFF, EV_NO_ACTION, {11: b"x" * 32}, b"SP800-155 Event3\0")
    assert replay(parse_event_log(log)) == {}


def test_an_event_without_the_banks_digest_is_refused_when_replayed() -> None:
    log = spec_id_event((4, 11)) + event2(4, EV_SEPARATOR, {4: bytes(20)}, b"")
    with pytest.raises(Malformed, match="sha256 digest"):
        replay(parse_event_log(log))


def test_a_register_that_no_tpm_has_is_refused() -> None:
    log = spec_id_event() + event2(32, EV_SEPARATOR, {11: bytes(32)}, b"")
    with pytest.raises(Malformed, match="register"):
        replay(parse_event_log(log))


@pytest.mark.parametrize("filler", [b"\0", b"\xff"])
@pytest.mark.parametrize("length", [1, 7, 8, 15, 16, 17, 32, 60_000])
def test_padding_of_zeros_or_ones_ends_the_log(filler: bytes, length: int) -> None:
    assert parse_event_log(LOG + filler * length) == parse_event_log(LOG)


@pytest.mark.parametrize("tail", [b"\0\0\0\x01", b"\xff\0", b"\0" * 40 + b"x", b"\x01" * 64])
def test_another_tail_is_refused(tail: bytes) -> None:
    with pytest.raises(Malformed):
        parse_event_log(LOG + tail)


def test_an_event_whose_data_end_with_padding_bytes_is_whole() -> None:
    for filler in (b"\0", b"\xff"):
        firmware = Firmware()
        firmware.measure(4, b"uki" + filler * 100)
        (event,) = parse_event_log(firmware.log + filler * 100)
        assert event.data == b"uki" + filler * 100


@pytest.mark.parametrize(
    "log",
    [
        b"",
        bytes(1000),
        struct.pack("<II20sI", 0, 8, bytes(20), 4) + b"CRTM",  # a log of the SHA-1 era
        spec_id_event().replace(b"Event03", b"Event00"),
        spec_id_event(())[: -1 - 0],
        spec_id_event((11, 11)),
        spec_id_event().replace(struct.pack("<HH", 11, 32), struct.pack("<HH", 11, 20)),
        spec_id_event().replace(struct.pack("<HH", 11, 32), struct.pack("<HH", 0x999, 65)),
        spec_id_event() + event2(4, 4, {11: bytes(32), 12: bytes(48)}, b""),
        spec_id_event((4, 11)) + event2(4, 4, {12: bytes(48)}, b""),
        b"x" * (MAX_LOG_BYTES + 1),
    ],
)
def test_what_is_no_log_is_refused(log: bytes) -> None:
    with pytest.raises(Malformed):
        parse_event_log(log)


def test_bombs_are_refused_quickly() -> None:
    """Sizes and counts that promise more than there is, and more events than any machine has."""
    huge = 0xFFFFFFFF
    promise_digests = spec_id_event() + struct.pack("<III", 4, 4, huge)
    promise_data = spec_id_event() + event2(4, 4, {}, b"")[:-4] + struct.pack("<I", huge)
    promise_algorithms = spec_id_event().replace(
        struct.pack("<IHH", 1, 11, 32), struct.pack("<IHH", huge, 11, 32)
    )
    smallest = event2(1, 4, {}, b"")
    crowd = spec_id_event() + smallest * (MAX_EVENTS + 1)
    # Each event begins like padding: a parser that looks ahead at each is quadratic.
    like_padding = spec_id_event() + event2(0, 0, {}, bytes(230)) * MAX_EVENTS + b"\x01"
    started = time.monotonic()
    for log in (promise_digests, promise_data, promise_algorithms, crowd, like_padding):
        with pytest.raises(Malformed):
            parse_event_log(log)
    assert time.monotonic() - started < 2
    assert len(parse_event_log(spec_id_event() + smallest * MAX_EVENTS)) == MAX_EVENTS


def test_every_truncation_is_refused_or_a_shorter_log() -> None:
    whole = parse_event_log(LOG)
    shorter = 0
    for length in range(len(LOG)):
        try:
            events = parse_event_log(LOG[:length])
        except Malformed:
            continue
        assert events == whole[: len(events)]
        assert len(events) < len(whole)
        shorter += 1
    assert shorter >= len(whole)  # at each boundary, and where zeros are left of an event


def test_every_flipped_bit_of_a_digest_changes_the_replay() -> None:
    registers = replay(parse_event_log(LOG))
    digest = hashlib.sha256(b"uki").digest()
    at = LOG.index(digest)
    for bit in range(256):
        changed = bytearray(LOG)
        changed[at + bit // 8] ^= 1 << bit % 8
        assert replay(parse_event_log(bytes(changed)))[4] != registers[4]


def test_ten_thousand_random_inputs_are_refused() -> None:
    source = random.Random(2)
    head = spec_id_event()
    for _ in range(10_000):
        data = source.randbytes(source.randrange(200))
        with pytest.raises(Malformed):
            parse_event_log(data)
        try:
            replay(parse_event_log(head + data))
        except Malformed:
            continue


@given(st.lists(st.tuples(st.integers(0, 23), st.binary(max_size=40)), max_size=20))
@settings(max_examples=100, deadline=None)
def test_what_is_measured_is_what_is_replayed(measured: list[tuple[int, bytes]]) -> None:
    firmware = Firmware()
    expected: dict[int, bytes] = {}
    for pcr, data in measured:
        firmware.measure(pcr, data)
        expected[pcr] = extend(expected.get(pcr, bytes(32)), data)
    assert replay(parse_event_log(firmware.log)) == expected
