"""HCL reports and the JSON files that carry them."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import struct
from pathlib import Path

import pytest

from appliance.errors import Malformed
from appliance.wire.azure_hcl import HclReport, parse_hcl_report
from appliance.wire.azure_json import parse_azure_json
from appliance.wire.evidence import CpuEvidence
from tests.fakes.amd_evidence import rsa_key
from tests.fakes.azure_evidence import (
    AzureGuest,
    base64url,
    hcl_report,
    quote_message,
    runtime_claims,
)
from tests.vectors_dir import VECTORS, needs_vectors

KEY = rsa_key("test AK").public_key()
CLAIMS = runtime_claims(KEY, user_data=b"u" * 64)
HARDWARE = b"\x02" + bytes(1183)
REPORT = hcl_report(HARDWARE, CLAIMS)

AZURE = VECTORS / "azure"
REPORTS = sorted(AZURE.glob("*hcl-report*.bin"))
FILES = sorted(AZURE.glob("*.json"))


def test_a_report_is_taken_apart() -> None:
    report = parse_hcl_report(REPORT)
    assert (report.version, report.kind) == (2, "sev_snp")
    assert report.hardware_report == HARDWARE
    assert report.bound == hashlib.sha256(CLAIMS).digest() + bytes(32)
    assert report.claims.attestation_key == KEY
    assert report.claims.secure_boot is True
    assert report.claims.user_data == b"u" * 64


@needs_vectors
@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.name)
def test_every_real_report_parses_and_is_bound(path: Path) -> None:
    report = parse_hcl_report(path.read_bytes())
    offset = 128 if report.kind == "tdx" else 0x50
    assert report.hardware_report[offset : offset + 64] == report.bound
    assert report.claims.secure_boot is True
    assert report.kind == ("tdx" if "tdx" in path.name else "sev_snp")
    if report.kind == "tdx":
        assert report.td_report[0] == 0x81


@pytest.mark.parametrize(("hash_type", "algorithm"), [(1, "sha256"), (2, "sha384"), (3, "sha512")])
def test_the_hash_is_the_one_that_is_named(hash_type: int, algorithm: str) -> None:
    report = parse_hcl_report(hcl_report(HARDWARE, CLAIMS, hash_type=hash_type))
    digest = hashlib.new(algorithm, CLAIMS).digest()
    assert report.bound == digest.ljust(64, b"\0")


def test_zeros_behind_the_end_are_the_indexs() -> None:
    assert parse_hcl_report(REPORT.ljust(2600, b"\0")) == parse_hcl_report(REPORT)
    for tail in (b"\x01", bytes(100) + b"x", b"\xff" * 16):
        with pytest.raises(Malformed):
            parse_hcl_report(REPORT + tail)


def _set(offset: int, value: int) -> bytes:
    return REPORT[:offset] + struct.pack("<I", value) + REPORT[offset + 4 :]


@pytest.mark.parametrize(
    "report",
    [
        b"HCLB" + REPORT[4:],
        _set(4, 0),
        _set(4, 3),
        _set(8, len(REPORT) - 1),
        _set(8, len(REPORT) + 1),
        _set(1216, 20),
        _set(1220, 2),
        _set(1224, 0),
        _set(1224, 3),
        _set(1228, 0),
        _set(1228, 4),
        _set(1232, len(CLAIMS) + 1),
        _set(1232, 0xFFFFFFFF),
        hcl_report(HARDWARE, CLAIMS + bytes(10)),  # a size that takes in padding
        hcl_report(b"x" * 1184, CLAIMS, report_type=4),  # a TDREPORT has 1024 bytes
        hcl_report(HARDWARE, b"x" * 40_000),
        bytes(70_000),
    ],
)
def test_a_header_that_does_not_fit_is_refused(report: bytes) -> None:
    with pytest.raises(Malformed):
        parse_hcl_report(report)


def _claims(**changes: object) -> bytes:
    document = json.loads(CLAIMS)
    document.update(changes)
    return json.dumps({name: value for name, value in document.items() if value != "-"}).encode()


def _key(**changes: object) -> dict[str, object]:
    key: dict[str, object] = json.loads(CLAIMS)["keys"][0]
    return key | changes


@pytest.mark.parametrize(
    "claims",
    [
        b"",
        b"[]",
        CLAIMS[:-1],
        b'{"keys":[],' + CLAIMS[1:],  # a key twice
        _claims(keys="-"),
        _claims(keys=[]),
        _claims(keys=[_key(), _key()]),
        _claims(keys=[_key(kid="HCLEkPub")]),
        _claims(keys=[_key()] * 9),
        _claims(keys=[_key(kty="EC")]),
        _claims(keys=[_key(n=base64url(bytes(256)))]),
        _claims(keys=[_key(n=base64url(b"\xff" * 128))]),
        _claims(keys=[_key(n=_key()["n"], e="AQAB====")]),
        _claims(keys=[_key(n=str(_key()["n"]) + "==")]),
        _claims(keys=[_key(e=4)]),
        _claims(**{"vm-configuration": []}),
        _claims(**{"vm-configuration": {"secure-boot": "true"}}),
        _claims(**{"user-data": 5}),
        _claims(**{"user-data": "0g"}),
        _claims(**{"user-data": "000"}),
        _claims(**{"user-data": "00" * 65}),
    ],
)
def test_claims_that_are_not_the_paravisors_are_refused(claims: bytes) -> None:
    with pytest.raises(Malformed):
        parse_hcl_report(hcl_report(HARDWARE, claims))


def test_claims_may_leave_out_what_older_firmware_did_not_say() -> None:
    old = _claims(**{"user-data": "-", "vm-configuration": {"current-time": 1678652405}})
    claims = parse_hcl_report(hcl_report(HARDWARE, old)).claims
    assert (claims.user_data, claims.secure_boot, claims.tpm_enabled) == (b"", None, None)


def test_every_truncation_is_refused() -> None:
    for length in range(len(REPORT)):
        with pytest.raises(Malformed):
            parse_hcl_report(REPORT[:length])


def test_ten_thousand_random_inputs_are_refused() -> None:
    source = random.Random(3)
    for _ in range(10_000):
        with pytest.raises(Malformed):
            parse_hcl_report(source.randbytes(source.randrange(1500)))
        with pytest.raises(Malformed):
            parse_azure_json(source.randbytes(source.randrange(300)))


def test_a_flipped_bit_is_refused_or_another_report() -> None:
    source = random.Random(4)
    whole = parse_hcl_report(REPORT)
    same = 0
    for _ in range(2_000):
        at = source.randrange(8 * len(REPORT))
        changed = bytearray(REPORT)
        changed[at // 8] ^= 1 << at % 8
        try:
            report: HclReport | None = parse_hcl_report(bytes(changed))
        except Malformed:
            continue
        if report == whole:  # only the header's twenty bytes that are Azure's own say nothing
            assert 12 <= at // 8 < 32
            same += 1
    assert same < 60


EVIDENCE = AzureGuest().evidence()


def _quote(*, numbers: bool = False) -> dict[str, object]:
    values = [EVIDENCE.parts["pcrs"][32 * pcr : 32 * pcr + 32] for pcr in range(24)]
    message, signature = EVIDENCE.parts["quote"], EVIDENCE.parts["signature"]
    if numbers:
        return {
            "message": list(message),
            "signature": list(signature),
            "pcrs": [list(value) for value in values],
        }
    return {
        "message": message.hex(),
        "signature": signature.hex(),
        "pcrs": [value.hex() for value in values],
    }


def _pem(der: bytes) -> str:
    body = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n"


HCL, VEK = EVIDENCE.parts["hcl_report"], EVIDENCE.endorsements["vek"]
PADDED = {
    "hcl_report": base64.urlsafe_b64encode(HCL).decode(),
    "vcek": base64.urlsafe_b64encode(VEK).decode(),
}
SHAPES: dict[str, dict[str, object]] = {
    "trustee 1": {"version": 1, "tpm_quote": _quote(), **PADDED},
    "trustee 2": {"version": 2, "tpm_quote": _quote(), **PADDED},
    "trustee 0": {"quote": _quote(numbers=True), "report": list(HCL), "vcek": _pem(VEK)},
    "attestation-rs": {
        "platform": "az-snp",
        "evidence": {
            "version": 1,
            "tpm_quote": _quote(),
            "hcl_report": base64url(HCL),
            "vcek": base64url(VEK),
        },
    },
    "PEM in base64": {
        "version": 1,
        "tpm_quote": _quote(),
        "hcl_report": PADDED["hcl_report"],
        "vcek": base64.b64encode(_pem(VEK).encode()).decode(),
    },
    "ours": dict(EVIDENCE.to_json()),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_evidence(shape: str) -> None:
    found = parse_azure_json(json.dumps(SHAPES[shape]).encode())
    assert found.scheme == "azure_vtpm"
    assert dict(found.parts) == dict(EVIDENCE.parts)
    assert dict(found.endorsements) == dict(EVIDENCE.endorsements)


def test_a_tdx_machine_has_a_quote_in_place_of_a_certificate() -> None:
    """In the versioned shape, and in the one of numbers."""
    named = {"version": 1, "tpm_quote": _quote(), "hcl_report": base64url(HCL), "td_quote": "BAAC"}
    numbers = {"tpm_quote": _quote(numbers=True), "hcl_report": list(HCL), "td_quote": [4, 0, 2]}
    for document in (named, {"platform": "az-tdx", "evidence": named}, numbers):
        found = parse_azure_json(json.dumps(document).encode())
        assert found.parts["td_quote"] == b"\x04\x00\x02"
        assert found.endorsements == {}


def test_values_that_were_not_quoted_are_dropped() -> None:
    guest = AzureGuest()
    some = {pcr: guest.pcrs[pcr] for pcr in (4, 7)}
    quote = _quote() | {"message": quote_message(b"n", some).hex()}
    quote["pcrs"] = [bytes([pcr] * 32).hex() for pcr in range(24)]
    document = {"version": 1, "tpm_quote": quote, **PADDED}
    found = parse_azure_json(json.dumps(document).encode())
    assert found.parts["pcrs"] == b"\x04" * 32 + b"\x07" * 32


def test_certificates_behind_the_first_are_its_issuers() -> None:
    roots = AzureGuest().guest.roots
    from appliance.rats.chain import der_of, parse_pem_chain

    bundle = _pem(VEK) + _pem(der_of(roots.ask)) + _pem(der_of(roots.ark))
    document = SHAPES["trustee 0"] | {"vcek": bundle}
    found = parse_azure_json(json.dumps(document).encode())
    assert found.endorsements["vek"] == VEK
    issuers = parse_pem_chain(found.endorsements["authorities"], field="authorities")
    assert issuers == (roots.ask, roots.ark)


V1 = SHAPES["trustee 1"]


@pytest.mark.parametrize(
    "document",
    [
        {},
        V1 | {"version": 3},
        V1 | {"version": "1"},
        V1 | {"more": 1},
        {name: value for name, value in V1.items() if name != "hcl_report"},
        {name: value for name, value in V1.items() if name != "tpm_quote"},
        V1 | {"tpm_quote": []},
        V1 | {"tpm_quote": _quote() | {"pcrs": _quote()["pcrs"], "extra": 1}},
        V1 | {"tpm_quote": {**_quote(), "pcrs": []}},
        V1 | {"tpm_quote": {**_quote(), "pcrs": ["00" * 32] * 23}},
        V1 | {"tpm_quote": {**_quote(), "pcrs": ["00" * 31] * 24}},
        V1 | {"tpm_quote": {**_quote(), "message": "00"}},
        V1 | {"tpm_quote": {**_quote(), "message": "0"}},
        V1 | {"tpm_quote": {**_quote(), "message": quote_message(b"", {24: b""}).hex()}},
        V1 | {"tpm_quote": {**_quote(), "signature": [256]}},
        V1 | {"tpm_quote": {**_quote(), "signature": [True]}},
        V1 | {"tpm_quote": {**_quote(), "signature": [0] * 5000}},
        V1 | {"hcl_report": "===="},
        V1 | {"hcl_report": "A"},
        V1 | {"hcl_report": "AB"},  # unused bits
        V1 | {"hcl_report": None},
        V1 | {"vcek": "-----BEGIN CERTIFICATE-----"},
        V1 | {"vcek": _pem(VEK) * 17},
        {"platform": "az-sgx", "evidence": V1},
        {"platform": "az-snp", "evidence": []},
        {"platform": "az-snp", "evidence": V1, "more": 1},
        {"scheme": "sev_snp", "report_b64": ""},  # evidence, of another machine
        {"scheme": "azure_vtpm"},
    ],
)
def test_another_shape_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(Malformed):
        parse_azure_json(json.dumps(document).encode())


def test_a_file_that_is_too_large_is_refused() -> None:
    with pytest.raises(Malformed):
        parse_azure_json(b" " * (9 << 20))


@needs_vectors
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_real_file_is_read(path: Path) -> None:
    found: CpuEvidence = parse_azure_json(path.read_bytes())
    assert len(found.parts["pcrs"]) == 24 * 32
    assert len(found.parts["hcl_report"]) == 2600
    assert found.endorsements["vek"][:2] == b"\x30\x82"
