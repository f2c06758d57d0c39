"""The quote parser: Intel's formats 3, 4 and 5, and nothing behind them but zeros."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import Malformed
from appliance.wire.tdx import (
    MAX_QUOTE_BYTES,
    Quote,
    SgxReport,
    TdAttributes,
    TdReport,
    parse_quote,
)
from tests.fakes.intel_evidence import Platform, raw_public_key
from tests.vectors_dir import VECTORS, needs_vectors

KINDS = {
    "4": Platform(),
    "5 with TD 1.0": Platform(version=5),
    "5 with TD 1.5": Platform(version=5, body_type=3),
}
BODY_AT = {"4": 48, "5 with TD 1.0": 54, "5 with TD 1.5": 54}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_where_the_format_puts_it(kind: str) -> None:
    data = KINDS[kind].quote()
    quote = parse_quote(data)
    assert (quote.raw, quote.padding) == (data, 0)
    assert quote.header.version == int(kind[0])
    assert (quote.header.attestation_key_type, quote.header.tee_type) == (2, 0x81)
    assert (quote.header.qe_svn, quote.header.pce_svn) == (5, 6)
    assert quote.header.user_data == b"u" * 20
    report = quote.body
    assert isinstance(report, TdReport)
    assert report.mr_seam == b"s" * 48
    assert report.mr_td == b"m" * 48
    assert (report.mr_config_id, report.mr_owner) == (b"c" * 48, b"o" * 48)
    assert report.mr_owner_config == b"w" * 48
    assert (report.rt_mr0, report.rt_mr1) == (b"0" * 48, b"1" * 48)
    assert (report.rt_mr2, report.rt_mr3) == (b"2" * 48, b"3" * 48)
    assert report.report_data == b"d" * 64
    assert report.attributes == TdAttributes.SEPT_VE_DISABLE
    assert (report.mr_service_td is None) == ("1.5" not in kind)
    assert b"".join(report.items().values()) == KINDS[kind].report()
    assert quote.signature.attestation_key == raw_public_key("test attestation")
    assert len(quote.signature.qe_report) == 384
    assert quote.signature.qe_authentication_data == bytes(range(32))
    assert quote.signature.certification_data.type == 5
    assert quote.signature.certification_data.data.startswith(b"-----BEGIN CERTIFICATE-----")


@pytest.mark.parametrize("padding", [1, 70, 3000])
def test_zeros_behind_a_quote_are_padding(padding: int) -> None:
    data = Platform().quote()
    quote = parse_quote(data + bytes(padding))
    assert (quote.raw, quote.padding) == (data, padding)


@pytest.mark.parametrize("tail", [b"\1", bytes(69) + b"\1", b"\0\1\0"])
def test_anything_else_behind_a_quote_is_refused(tail: bytes) -> None:
    data = Platform().quote()
    with pytest.raises(Malformed, match="padding") as refusal:
        parse_quote(data + tail)
    assert refusal.value.offset == len(data)


def test_padding_is_bounded() -> None:
    data = Platform().quote()
    parse_quote(data.ljust(MAX_QUOTE_BYTES, b"\0"))
    with pytest.raises(Malformed, match=str(MAX_QUOTE_BYTES)):
        parse_quote(data.ljust(MAX_QUOTE_BYTES + 1, b"\0"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_shorter_quote_is_malformed_at_every_length(kind: str) -> None:
    data = KINDS[kind].quote()
    for length in range(len(data)):
        with pytest.raises(Malformed):
            parse_quote(data[:length])


def changed(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


@pytest.mark.parametrize(
    ("kind", "offset", "value", "field"),
    [
        ("4", 0, struct.pack("<H", 2), "version"),
        ("4", 0, struct.pack("<H", 6), "version"),
        ("4", 0, struct.pack("<H", 3), "tee_type"),  # format 3 knows no TD
        ("4", 2, struct.pack("<H", 3), "attestation_key_type"),
        ("4", 4, struct.pack("<I", 0x82), "tee_type"),
        ("5 with TD 1.5", 48, struct.pack("<H", 1), "body_type"),  # an enclave's, in a TD's quote
        ("5 with TD 1.5", 48, struct.pack("<H", 4), "body_type"),  # TD 1.5 extended
        ("5 with TD 1.5", 50, struct.pack("<I", 647), "body_size"),
        ("5 with TD 1.0", 50, struct.pack("<I", 648), "body_size"),
        ("4", 48 + 584, struct.pack("<I", 0), "signature"),
        ("4", 48 + 584, struct.pack("<I", 0xFFFFFFFF), "signature_data"),
        ("4", 48 + 584 + 4 + 128, struct.pack("<H", 5), "certification_data_type"),
        ("4", 48 + 584 + 4 + 130, struct.pack("<I", 1), "signature_data"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    kind: str, offset: int, value: bytes, field: str
) -> None:
    with pytest.raises(Malformed) as refusal:
        parse_quote(changed(KINDS[kind].quote(), offset, value))
    assert refusal.value.field == field
    assert refusal.value.offset is not None


@pytest.mark.parametrize("longer", [1, -1])
def test_inner_lengths_must_fill_the_outer_ones(longer: int) -> None:
    data = Platform().quote()
    at = 48 + 584 + 4 + 128 + 6 + 384 + 64 + 2 + 32 + 2
    (length,) = struct.unpack_from("<I", data, at)
    with pytest.raises(Malformed):
        parse_quote(changed(data, at, struct.pack("<I", length + longer)))


@given(st.data())
@settings(max_examples=200)
def test_whatever_is_changed_it_parses_or_is_malformed(data: st.DataObject) -> None:
    quote = bytearray(data.draw(st.sampled_from([*KINDS.values()])).quote())
    for _ in range(data.draw(st.integers(1, 4))):
        quote[data.draw(st.integers(0, 1200))] = data.draw(st.integers(0, 255))
    outcome = parsed_or_refused(bytes(quote))
    if isinstance(outcome, Malformed):
        assert outcome.offset is not None
        assert outcome.field != "$"
    else:
        assert outcome.raw + bytes(outcome.padding) == bytes(quote)


def parsed_or_refused(data: bytes) -> Quote | Malformed:
    try:
        return parse_quote(data)
    except Malformed as refusal:
        return refusal


def test_ten_thousand_random_blobs_are_malformed() -> None:
    source = random.Random(348551)
    for _ in range(10_000):
        head = source.choice([b"", struct.pack("<HHI", source.choice([3, 4, 5]), 2, 0x81)])
        with pytest.raises(Malformed):
            parse_quote(head + source.randbytes(source.choice([0, 40, 600, 5000])))


REAL = {
    # file: format, kind of body, zeros behind it
    "tdx/phala_tdx_quote_v4.bin": (4, TdReport, 70),
    "tdx/ars_tdx_quote_4.dat": (4, TdReport, 0),
    "tdx/ars_tdx_quote_5.dat": (5, TdReport, 0),
    "tdx/phala_sgx_quote_v3.bin": (3, SgxReport, 0),
    "azure/trustee_tdx_td-quote.bin": (4, TdReport, 70),
}


@needs_vectors
@pytest.mark.parametrize("name", REAL)
def test_real_quotes_parse(name: str) -> None:
    version, kind, padding = REAL[name]
    quote = parse_quote((VECTORS / name).read_bytes())
    assert quote.header.version == version
    assert isinstance(quote.body, kind)
    assert quote.padding == padding
    assert quote.signature.certification_data.type == 5


@needs_vectors
def test_a_real_debug_td_is_read_as_one() -> None:
    body = parse_quote((VECTORS / "tdx/ars_tdx_quote_4.dat").read_bytes()).body
    assert isinstance(body, TdReport)
    assert body.attributes == TdAttributes.DEBUG | TdAttributes.SEPT_VE_DISABLE
