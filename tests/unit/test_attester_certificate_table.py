"""The certificate table of a SEV-SNP host, who may write into it whatever it likes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import Malformed
from appliance.wire.certificate_table import (
    MAX_ENTRIES,
    MAX_TABLE_BYTES,
    CertificateTable,
    parse_certificate_table,
)

# As hosts write them: the digits of the published text, in their order.
ARK_GUID = bytes.fromhex("c0b406a4a80349529743 3fb6014cd0ae")
ASK_GUID = bytes.fromhex("4ab7b379bbac4fe4a02f 05aef327c782")
VCEK_GUID = bytes.fromhex("63da758de6644564adc5 f4b93be8accd")
VLEK_GUID = bytes.fromhex("a8074bc2a25a483eaae6 39c045a0b8a1")
CRL_GUID = bytes.fromhex("92f81bc358114d3d97ff d19f88dc67ea")
OTHER_GUID = bytes(range(16))


def entry(guid: bytes, offset: int, length: int) -> bytes:
    return guid + offset.to_bytes(4, "little") + length.to_bytes(4, "little")


def table(*certificates: tuple[bytes, bytes]) -> bytes:
    at = 24 * (len(certificates) + 1)
    head = body = b""
    for guid, certificate in certificates:
        head += entry(guid, at + len(body), len(certificate))
        body += certificate
    return head + bytes(24) + body


def test_every_known_certificate_is_found() -> None:
    data = table(
        (VCEK_GUID, b"vcek"),
        (ARK_GUID, b"ark"),
        (ASK_GUID, b"ask"),
        (VLEK_GUID, b"vlek"),
        (CRL_GUID, b"crl"),
    )
    assert parse_certificate_table(data) == CertificateTable(
        ark=b"ark", ask=b"ask", vcek=b"vcek", vlek=b"vlek", crl=b"crl"
    )


@pytest.mark.parametrize("data", [b"", bytes(24), bytes(4096)], ids=["none", "end", "page"])
def test_a_host_without_certificates_has_an_empty_table(data: bytes) -> None:
    assert parse_certificate_table(data) == CertificateTable()


def test_entries_that_nobody_knows_are_passed_over() -> None:
    data = table((OTHER_GUID, b"?"), (VCEK_GUID, b"vcek"), (OTHER_GUID, b"?"))
    assert parse_certificate_table(data) == CertificateTable(vcek=b"vcek")


def test_an_entry_of_no_bytes_is_no_certificate() -> None:
    assert parse_certificate_table(table((VCEK_GUID, b""))) == CertificateTable()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(entry(VCEK_GUID, 48, 4) + b"cert", id="no end"),
        pytest.param(bytes(23), id="half an end"),
        pytest.param(entry(VCEK_GUID, 24, 4) + bytes(24), id="in the head"),
        pytest.param(entry(VCEK_GUID, 48, 5) + bytes(24) + b"cert", id="beyond the table"),
        pytest.param(entry(VCEK_GUID, 2**32 - 1, 2) + bytes(24), id="offset that wraps at 32 bits"),
        pytest.param(entry(VCEK_GUID, 48, 2**32 - 40) + bytes(24), id="length that wraps"),
        pytest.param(table((VCEK_GUID, b"a"), (VCEK_GUID, b"b")), id="twice"),
        pytest.param(table(*[(OTHER_GUID, b"")] * (MAX_ENTRIES + 1)), id="too many entries"),
        pytest.param(bytes(MAX_TABLE_BYTES + 1), id="too large"),
    ],
)
def test_a_table_that_lies_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        parse_certificate_table(data)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_table_or_malformed(data: bytes) -> None:
    try:
        found = parse_certificate_table(data)
    except Malformed:
        return
    for certificate in (found.ark, found.ask, found.vcek, found.vlek, found.crl):
        assert certificate is None or certificate in data


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_table_cut_anywhere_is_never_read_past_its_end(data: st.DataObject) -> None:
    whole = table((VCEK_GUID, b"certificate of the chip"), (ASK_GUID, b"its issuer"))
    cut = whole[: data.draw(st.integers(1, len(whole) - 1))]
    with pytest.raises(Malformed):
        parse_certificate_table(cut)
