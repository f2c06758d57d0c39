"""The report parser: AMD's layout, byte for byte, and nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import Malformed
from appliance.wire.sev_snp import (
    REPORT_BYTES,
    AttestationReport,
    GuestPolicy,
    PlatformInfo,
    SigningKey,
    Tcb,
    parse_report,
    parse_tcb,
    product_of,
)
from tests.fakes.amd_evidence import CHIP, Guest
from tests.vectors_dir import VECTORS, needs_vectors

REPORTS = sorted((VECTORS / "snp").glob("*report*.bin"))


def test_every_field_is_where_the_specification_puts_it() -> None:
    report = parse_report(Guest(version=5).raw_report())
    assert (report.version, report.guest_svn, report.vmpl) == (5, 7, 0)
    assert report.policy == GuestPolicy.SMT | GuestPolicy.RESERVED_ONE | 0x1F
    assert report.family_id == b"f" * 16
    assert report.image_id == b"i" * 16
    assert PlatformInfo.ALIAS_CHECK_COMPLETE in report.platform_info
    assert PlatformInfo.TSME_EN not in report.platform_info
    assert report.signing_key is SigningKey.VCEK
    assert (report.author_key_en, report.mask_chip_key) == (False, False)
    assert report.report_data == b"d" * 64
    assert report.measurement == b"m" * 48
    assert report.host_data == b"h" * 32
    assert report.id_key_digest == b"k" * 48
    assert report.author_key_digest == b"a" * 48
    assert report.report_id == b"r" * 32
    assert report.report_id_ma == b"\xff" * 32
    assert report.cpuid == (0x19, 0x01, 1)
    assert report.chip_id == CHIP
    assert str(report.current_version) == str(report.committed_version) == "1.55.29"
    assert (report.launch_mit_vector, report.current_mit_vector) == (0b1011, 0b1111)
    assert 0 < report.signature_r < 2**384
    assert 0 < report.signature_s < 2**384


def test_the_key_word_has_three_meanings() -> None:
    report = parse_report(Guest(report={0x048: (0b00111).to_bytes(4, "little")}).raw_report())
    assert report.author_key_en
    assert report.mask_chip_key
    assert report.signing_key is SigningKey.VLEK


@pytest.mark.parametrize("version", [0, 1, 6, 0x10002])
def test_an_unknown_version_is_refused(version: int) -> None:
    data = Guest(report={0: version.to_bytes(4, "little")}).raw_report()
    with pytest.raises(Malformed, match="version") as refusal:
        parse_report(data)
    assert (refusal.value.field, refusal.value.offset) == ("version", 0)


@pytest.mark.parametrize("length", [0, 1, 672, 1183, 1185, 4000])
def test_a_report_has_1184_bytes_and_none_more(length: int) -> None:
    data = Guest().raw_report() + b"\0" * 4000
    with pytest.raises(Malformed, match="1184"):
        parse_report(data[:length])


RESERVED = {
    # version: ranges that must be zero
    2: [(0x04C, 0x050), (0x188, 0x1A0), (0x1EB, 0x1EC), (0x1EF, 0x1F0), (0x1F8, 0x2A0)],
    3: [(0x04C, 0x050), (0x18B, 0x1A0), (0x1EB, 0x1EC), (0x1EF, 0x1F0), (0x1F8, 0x2A0)],
    4: [(0x04C, 0x050), (0x18B, 0x1A0), (0x1EB, 0x1EC), (0x1EF, 0x1F0), (0x208, 0x2A0)],
    5: [(0x04C, 0x050), (0x18B, 0x1A0), (0x1EB, 0x1EC), (0x1EF, 0x1F0), (0x208, 0x2A0)],
}
SIGNATURE_PADDING = [(0x2A0 + 48, 0x2A0 + 72), (0x2E8 + 48, 0x2E8 + 72), (0x2A0 + 144, 0x4A0)]


@pytest.mark.parametrize("version", RESERVED)
def test_every_reserved_byte_must_be_zero_and_no_other(version: int) -> None:
    whole = Guest(version=version).raw_report()
    reserved = {
        offset
        for start, end in RESERVED[version] + SIGNATURE_PADDING
        for offset in range(start, end)
    }
    # These have values of their own that are checked: version, bit 17, algorithm, key word.
    checked = {*range(0x004), 0x00A, *range(0x034, 0x038), *range(0x048, 0x04C)}
    for offset in range(REPORT_BYTES):
        changed = bytearray(whole)
        changed[offset] ^= 0x82
        if offset in reserved:
            with pytest.raises(Malformed) as refusal:
                parse_report(bytes(changed))
            assert refusal.value.offset is not None
            assert refusal.value.offset <= offset
        elif offset not in checked:
            parse_report(bytes(changed))


@pytest.mark.parametrize("version", [2, 3])
def test_mitigation_vectors_are_reserved_before_version_4(version: int) -> None:
    with pytest.raises(Malformed, match="reserved_1f8"):
        parse_report(Guest(version=version, report={0x200: b"\1"}).raw_report())


def test_version_4_may_have_mitigation_vectors() -> None:
    report = parse_report(Guest(version=4, report={0x1F8: b"\1"}).raw_report())
    assert (report.launch_mit_vector, report.current_mit_vector) == (1, 0)


@pytest.mark.parametrize(
    ("offset", "value", "field"),
    [
        (0x00A, b"\1", "policy"),  # bit 17 is gone
        (0x034, b"\2", "signature_algo"),
        (0x048, b"\x20", "key_info"),
        (0x04B, b"\x80", "key_info"),
        (0x048, bytes([2 << 2]), "signing_key"),
        (0x048, bytes([6 << 2]), "signing_key"),
    ],
)
def test_a_word_that_means_nothing_is_refused_by_name(
    offset: int, value: bytes, field: str
) -> None:
    with pytest.raises(Malformed, match=field) as refusal:
        parse_report(Guest(report={offset: value}).raw_report())
    assert refusal.value.field == field


def test_policy_and_platform_bits_of_tomorrow_are_kept() -> None:
    report = parse_report(Guest(report={0x00F: b"\x80", 0x047: b"\x80"}).raw_report())
    assert report.policy >> 63 == 1
    assert report.platform_info >> 63 == 1


@pytest.mark.parametrize(
    ("cpuid", "product"),
    [
        ((0x19, 0x00, 0), "Milan"),
        ((0x19, 0x0F, 2), "Milan"),
        ((0x19, 0x10, 0), "Genoa"),
        ((0x19, 0x1F, 0), "Genoa"),
        ((0x19, 0xA0, 0), "Genoa"),  # Bergamo, Siena
        ((0x19, 0xAF, 0), "Genoa"),
        ((0x1A, 0x02, 0), "Turin"),
        ((0x1A, 0x11, 0), "Turin"),  # Turin dense
        ((0x19, 0x20, 0), None),
        ((0x19, 0xB0, 0), None),
        ((0x1A, 0x20, 0), None),
        ((0x17, 0x01, 0), None),
    ],
)
def test_the_cpu_names_its_product_line(cpuid: tuple[int, int, int], product: str | None) -> None:
    assert product_of(cpuid) == product


def test_milan_and_genoa_lay_out_a_tcb_alike() -> None:
    raw = bytes([3, 1, 0, 0, 0, 0, 8, 115])
    for product in ("Milan", "Genoa"):
        tcb = parse_tcb(raw, product=product, field="reported_tcb")
        assert tcb == Tcb(bootloader=3, tee=1, snp=8, microcode=115)


def test_turin_lays_out_a_tcb_with_fmc_first() -> None:
    tcb = parse_tcb(bytes([1, 2, 3, 4, 0, 0, 0, 9]), product="Turin", field="reported_tcb")
    assert tcb == Tcb(fmc=1, bootloader=2, tee=3, snp=4, microcode=9)


@pytest.mark.parametrize(
    ("product", "byte"), [("Milan", 2), ("Genoa", 5), ("Turin", 4), ("Turin", 6)]
)
def test_a_reserved_byte_of_a_tcb_must_be_zero(product: str, byte: int) -> None:
    raw = bytearray(8)
    raw[byte] = 1
    with pytest.raises(Malformed, match=r"launch_tcb\.reserved"):
        parse_tcb(bytes(raw), product=product, field="launch_tcb")


@pytest.mark.parametrize("length", [0, 7, 9])
def test_a_tcb_has_eight_bytes(length: int) -> None:
    with pytest.raises(Malformed):
        parse_tcb(bytes(length), product="Milan", field="launch_tcb")


@given(st.data())
@settings(max_examples=200)
def test_whatever_is_changed_it_parses_or_is_malformed(data: st.DataObject) -> None:
    changed = bytearray(Guest(version=data.draw(st.integers(2, 5))).raw_report())
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, REPORT_BYTES - 1))] = data.draw(st.integers(0, 255))
    outcome = parsed_or_refused(bytes(changed))
    if isinstance(outcome, Malformed):
        assert outcome.offset is not None
        assert outcome.field != "$"
    else:
        assert outcome.signed == bytes(changed[:0x2A0])


def parsed_or_refused(data: bytes) -> AttestationReport | Malformed:
    try:
        return parse_report(data)
    except Malformed as refusal:
        return refusal


def test_ten_thousand_random_blobs_are_malformed() -> None:
    source = random.Random(56860)
    for _ in range(10_000):
        blob = source.randbytes(source.choice([0, 8, 672, REPORT_BYTES, REPORT_BYTES]))
        with pytest.raises(Malformed):
            parse_report(blob)


@needs_vectors
@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.name)
def test_a_real_report_parses_at_every_byte_and_at_no_other_length(path: Path) -> None:
    data = path.read_bytes()
    assert parse_report(data).signed == data[:0x2A0]
    for length in range(0, REPORT_BYTES, 37):
        with pytest.raises(Malformed):
            parse_report(data[:length])
