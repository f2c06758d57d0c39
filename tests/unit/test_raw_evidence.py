"""Files and arguments of `dcv appraise`, what is made of them, and how an outcome is told."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from appliance.errors import (
    ConfigError,
    Malformed,
    Stale,
    Unauthentic,
    VerificationIncomplete,
)
from appliance.rats.result import AttestationResult, Finding, Tier, conclude
from appliance.verifier.raw_evidence import (
    MAX_FILE_BYTES,
    decode,
    parse_hex,
    parse_time,
    read_file,
    split_certificates,
)
from appliance.verifier.render import render
from appliance.verifier.verdict import Outcome, of_error, of_parts, of_result
from appliance.wire.canonical import JsonObject
from appliance.wire.pem import join_pem
from tests.fakes import nvidia_evidence as fake

DER = tuple(
    one.certificate.public_bytes(Encoding.DER) for one in (fake.hopper().leaf, fake.hopper().device)
)


# --- files -----------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_says_nothing_about_evidence(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(VerificationIncomplete, match="--report"):
            read_file(path, option="--report")


def test_reading_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES)
    assert len(read_file(file, option="--quote")) == MAX_FILE_BYTES
    with file.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(Malformed, match="16 MiB"):
        read_file(file, option="--quote")
    with pytest.raises(Malformed, match="16 MiB"):
        read_file(Path("/dev/zero"), option="--quote")


# --- binary, hex, base64 -----------------------------------------------------------------------


@settings(max_examples=200)
@given(
    data=st.binary(max_size=200).map(lambda one: b"\x00\xff" + one),  # base64 begins with AP
    width=st.sampled_from([16, 60, 64, 76, 1000]),
    newline=st.sampled_from(["\n", "\r\n", " \n\t"]),
    spelling=st.sampled_from(["hex", "HEX", "base64", "base64url", "unpadded", "binary"]),
)
def test_every_spelling_of_the_same_bytes_decodes_to_them(
    data: bytes, width: int, newline: str, spelling: str
) -> None:
    text = {
        "hex": data.hex(),
        "HEX": data.hex().upper(),
        "base64": base64.b64encode(data).decode(),
        "base64url": base64.urlsafe_b64encode(data).decode(),
        "unpadded": base64.b64encode(data).decode().rstrip("="),
        "binary": "",
    }[spelling]
    lines = newline.join(text[at : at + width] for at in range(0, len(text), width)) + newline
    given_bytes = data if spelling == "binary" else lines.encode()
    assert decode(given_bytes, field="report") == data


def test_base64_of_nothing_but_hex_digits_is_hex_by_the_rule() -> None:
    """Two or three bytes can be spelled so, evidence cannot."""
    assert decode(b"AAAA", field="report") == b"\xaa\xaa"


@pytest.mark.parametrize("data", [b"", b" \n\t\r\n"])
def test_a_file_without_content_stays_as_it_is(data: bytes) -> None:
    assert decode(data, field="report") == data


@pytest.mark.parametrize(
    "text", [b"abc", b"abcde\n", b"0123 4", b"Zm9v=", b"Zm9vZ", b"==", b"Zm=9"]
)
def test_text_that_does_not_decode_is_malformed_and_not_taken_for_binary(text: bytes) -> None:
    with pytest.raises(Malformed) as refused:
        decode(text, field="report")
    assert refused.value.field == "report"


def test_pem_is_never_taken_for_base64url() -> None:
    pem = join_pem(DER)
    assert decode(pem, field="chain") == pem
    assert decode(base64.b64encode(pem), field="chain") == pem
    assert decode(pem.hex().encode(), field="chain") == pem


@pytest.mark.parametrize("form", ["der", "pem", "crlf", "hex", "base64", "base64 of pem"])
def test_certificates_come_in_every_form_and_keep_their_order(form: str) -> None:
    der, pem = b"".join(DER), join_pem(DER)
    file = {
        "der": der,
        "pem": b"\n" + pem + b"\n",
        "crlf": pem.replace(b"\n", b"\r\n"),
        "hex": der.hex().encode(),
        "base64": base64.encodebytes(der),
        "base64 of pem": base64.encodebytes(pem),
    }[form]
    assert split_certificates(file, field="chain") == DER


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x30",
        b"\x30\x80\x00\x00",
        b"\x30\x84\x00\x00\x00\x01\x00",
        b"\x30\x82\xff",
        b"\x30\x83\x02\x00\x00" + bytes(0x20000),
        DER[0][:-1],
        DER[0] + b"\x00",
        DER[0] + b"\n",
        b"\x31" + DER[0][1:],
        b"\x30\x01\x00" * 17,
        b"-----BEGIN CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n",
        b"leaf first\n" + join_pem(DER),
        join_pem(DER) + b"-",
        join_pem(DER)[:-2],
        join_pem(DER).replace(b"\n", b"\v", 2),
        join_pem(DER).replace(b"-----\n", b"----- \n"),
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
    ],
)
def test_what_is_no_row_of_certificates_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        split_certificates(data, field="chain")


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_decode_or_are_malformed(data: bytes) -> None:
    for read in (decode, split_certificates):
        with contextlib.suppress(Malformed):
            read(data, field="x")


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-23T12:00:00Z", "2026-11-23T12:00:00+00:00"),
        ("2026-11-23t12:00:00z", "2026-11-23T12:00:00+00:00"),
        ("2026-11-23T12:00:00+02:00", "2026-11-23T10:00:00+00:00"),
        ("2026-11-23T00:30:00.5-01:30", "2026-11-23T02:00:00.500000+00:00"),
        ("2026-11-23T12:00:00.123456789Z", "2026-11-23T12:00:00.123456+00:00"),
    ],
)
def test_times_are_rfc_3339_with_their_offset(text: str, expected: str) -> None:
    assert parse_time(text, option="--at").isoformat() == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2026-11-23",
        "2026-11-23T12:00:00",
        "2026-11-23 12:00:00Z",
        "2026-11-23T12:00Z",
        "2026-11-23T12:00:00+0200",
        "2026-11-23T12:00:00+02",
        "20261123T120000Z",
        "2026-W48-1T12:00:00Z",
        "2026-02-30T12:00:00Z",
        "2026-11-23T24:00:00Z",
        "2026-11-23T12:60:00Z",
        "2026-11-23T12:00:00,5Z",
        "2026-11-23T12:00:00+25:00",
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00+23:00",
        "2026-11-23T12:00:00Z\n",
        "\u0662\u0660\u0662\u0666-11-23T12:00:00Z",
        "1790000000",
    ],
)
def test_another_time_is_a_bad_argument(text: str) -> None:
    with pytest.raises(VerificationIncomplete, match="--at: expected an RFC 3339 time"):
        parse_time(text, option="--at")


def test_hex_arguments_have_the_lengths_they_may_have() -> None:
    assert parse_hex("00fF", option="--nonce", lengths=(2,)) == b"\x00\xff"
    assert parse_hex("", option="--nonce", lengths=range(67)) == b""
    for text in ("0", "0x00", "00 ff", "zz", "\u0660\u0660", "00ff00", ""):
        with pytest.raises(VerificationIncomplete, match="--nonce"):
            parse_hex(text, option="--nonce", lengths=(2,))


# --- outcomes ----------------------------------------------------------------------------------


def finding(tier: Tier, check: str = "x.rule", got: str = "that") -> Finding:
    return Finding(tier, check, "this", got, "Do something about it.")


def test_exit_statuses_and_the_json_form_are_stable() -> None:
    affirmed = of_result(conclude({"a": 1}, ()))
    assert affirmed.exit_status == 0
    assert affirmed.to_json() == {
        "verdict": "affirming",
        "error": None,
        "claims": {"a": 1},
        "findings": [],
    }
    assert of_result(conclude({}, [finding(Tier.WARNING)])).exit_status == 3
    assert of_result(conclude({}, [finding(Tier.CONTRAINDICATED)])).exit_status == 1
    refused = of_error(Stale("too old"))
    assert (refused.exit_status, refused.to_json()) == (
        1,
        {
            "verdict": "contraindicated",
            "error": {"code": "stale", "message": "too old"},
            "claims": {},
            "findings": [],
        },
    )
    assert of_error(Malformed("what is this")).exit_status == 1
    for error in (VerificationIncomplete("no such file"), ConfigError("a root is missing")):
        assert (of_error(error).exit_status, of_error(error).to_json()["verdict"]) == (2, None)


def test_nothing_asked_for_is_never_told_as_affirmed() -> None:
    assert of_result(AttestationResult(Tier.NONE, {})).exit_status == 3


def test_findings_name_the_part_that_they_are_on() -> None:
    hardware = conclude({}, [finding(Tier.CONTRAINDICATED, "sev_snp.debug")])
    result = conclude({}, [finding(Tier.WARNING)], {"hardware": hardware})
    document = of_parts({"CPU": of_result(result)}).to_json()
    assert [one.get("submod") for one in document["findings"]] == ["CPU", "CPU.hardware"]  # type: ignore[union-attr]
    assert "submod" not in of_result(result).to_json()["findings"][0]  # type: ignore[index,operator]
    assert document["verdict"] == "contraindicated"


def test_claims_of_parts_are_told_once() -> None:
    part = conclude({"vmpl": 0}, ())
    assert of_result(conclude({"a": 1}, (), {"CPU": part})).claims == {
        "a": 1,
        "submods": {"CPU": {"vmpl": 0}},
    }
    told: JsonObject = {"a": 1, "hardware": {"vmpl": 0}}
    assert of_result(conclude(told, (), {"hardware": part})).claims == told


def test_of_several_the_worst_verdict_and_the_first_error_count() -> None:
    good = of_result(conclude({"ueid": "1"}, ()))
    warned = of_result(conclude({"ueid": "2"}, [finding(Tier.WARNING)]))
    bad, unread = of_error(Unauthentic("forged")), of_error(VerificationIncomplete("gone"))
    assert of_parts({"GPU-0": good, "GPU-1": good}).verdict is Tier.AFFIRMING
    assert of_parts({"GPU-0": warned, "GPU-1": good}).verdict is Tier.WARNING
    assert of_parts({"GPU-0": good, "GPU-1": unread}).verdict is None
    whole = of_parts({"GPU-0": warned, "GPU-1": bad, "GPU-2": unread}).to_json()
    assert whole["verdict"] == "contraindicated"
    assert whole["error"] == {"code": "unauthentic", "message": "GPU-1: forged"}
    assert whole["claims"] == {"submods": {"GPU-0": {"ueid": "2"}, "GPU-1": {}, "GPU-2": {}}}


# --- what people see -----------------------------------------------------------------------------


def shown(outcome: Outcome, *, width: int = 100, terminal: bool = False) -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=terminal, highlight=False, markup=False, emoji=False
    )
    render(outcome, console)
    return file.getvalue()


CLAIMS: JsonObject = {
    "scheme": "sev_snp",
    "product": "Milan",
    "measurement": "ab" * 48,
    "policy": {"debug": True},
    "reported_tcb": {"bootloader": 3, "snp": 8},
    "csp_id": None,
}


def test_the_verdict_comes_first_then_claims_then_findings() -> None:
    text = shown(of_result(conclude({**CLAIMS}, [finding(Tier.CONTRAINDICATED, "sev_snp.debug")])))
    places = [
        text.index(one)
        for one in ("CONTRAINDICATED", "Milan", "sev_snp.debug", "expected", "got", "Do something")
    ]
    assert places == sorted(places)
    assert places[0] == 0
    assert "policy debug" in text
    assert "yes" in text
    assert "bootloader 3, snp 8" in text
    assert "csp id" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("scheme", ["sev_snp", "simulated"])
def test_a_cpu_is_shown_with_what_it_says_simulated_or_not(scheme: str) -> None:
    cpu = conclude({**CLAIMS, "scheme": scheme, "report_data": "cd" * 64}, [])
    lines = shown(of_result(conclude({}, [], {"CPU": cpu})), width=200).splitlines()
    below = lines[lines.index("CPU") + 1 :]
    for value in ("Milan", "ab" * 48, "cd" * 64):
        assert any(value in line for line in below)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_nothing_is_lost_or_too_wide_at_any_width(width: int) -> None:
    outcome = of_result(conclude({**CLAIMS}, [finding(Tier.WARNING, got="cd" * 48)]))
    text = shown(outcome, width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    together = "".join(text.split())
    assert "ab" * 48 in together
    assert "cd" * 48 in together


def test_colour_is_for_terminals() -> None:
    outcome = of_result(conclude({}, ()))
    assert "\x1b[" in shown(outcome, terminal=True)
    assert "\x1b" not in shown(outcome, terminal=False)


def test_text_of_the_evidence_cannot_write_on_the_terminal() -> None:
    hostile = "\x1b[2J\x1b]0;x\x07[bold red]AFFIRMING[/]\r\n\u202eevil\x9b1m"
    claims = {**CLAIMS, "product": hostile, "scheme": "sev_snp"}
    outcomes = (
        of_result(conclude({**claims}, [finding(Tier.WARNING, hostile, got=hostile)])),
        of_error(Unauthentic(hostile)),
        of_parts({hostile: of_result(conclude({**claims}, ()))}),
    )
    for outcome in outcomes:
        text = shown(outcome, width=200)
        assert not any(one in text for one in "\x1b\x07\r\x9b\u202e")
        assert "[bold red]AFFIRMING[/]" in text  # as text, not as markup
        assert "\\x1b[2J" in text


def test_an_error_says_what_to_do() -> None:
    text = shown(of_error(VerificationIncomplete("--report gone.bin: No such file or directory")))
    assert text.startswith("COULD NOT BE CHECKED")
    assert "gone.bin" in text
    assert VerificationIncomplete.advice in text


def test_the_json_form_is_ascii_whatever_the_evidence_says() -> None:
    outcome = of_error(Unauthentic("\x1b\u202e"))
    assert json.dumps(outcome.to_json()).isascii()
