"""TDX evidence from Intel's root to the verdict.

Collateral and quotes made here are shaped as Intel's are (tests/fakes/intel_evidence.py).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import random
import re
import struct
from typing import Any

import dcap_qvl  # type: ignore[import-untyped]
import pytest

from appliance.config import Policy
from appliance.endorsements.anchors import load_intel
from appliance.errors import (
    ApplianceError,
    Contraindicated,
    EvidenceError,
    Malformed,
    Revoked,
    Stale,
    Unauthentic,
)
from appliance.rats.model import CpuClaims
from appliance.rats.policy.tdx import NEEDED_MEASUREMENTS, appraise_tdx
from appliance.rats.result import AttestationResult, Tier
from appliance.rats.schemes.tdx import (
    MAX_COLLATERAL_BYTES,
    TdxClaims,
    authenticate,
    authenticate_quote,
)
from appliance.wire.evidence import CpuEvidence
from appliance.wire.tdx import TdAttributes
from tests.fakes.intel_evidence import (
    CERTIFICATES_END,
    FMSPC,
    NOW,
    PCK_SERIAL,
    START,
    Platform,
    root_der,
)
from tests.vectors_dir import VECTORS, needs_vectors

TDX = VECTORS / "tdx"
DAY = datetime.timedelta(days=1)
SAFE = 1 << 28


def claims_of(platform: Platform, at: datetime.datetime = NOW) -> TdxClaims:
    return authenticate_quote(platform.quote(), platform.collateral(), intel_root=root_der(), at=at)


@pytest.mark.parametrize(
    "platform",
    [Platform(), Platform(version=5), Platform(version=5, body_type=3)],
    ids=["4", "5 with TD 1.0", "5 with TD 1.5"],
)
def test_a_quote_under_the_root_is_authentic(platform: Platform) -> None:
    claims: CpuClaims = claims_of(platform)
    assert isinstance(claims, TdxClaims)
    assert claims.scheme == "tdx"
    assert claims.report_data == b"d" * 64
    assert claims.measurements == {
        "mrtd": (b"m" * 48).hex(),
        "rtmr0": (b"0" * 48).hex(),
        "rtmr1": (b"1" * 48).hex(),
        "rtmr2": (b"2" * 48).hex(),
        "rtmr3": (b"3" * 48).hex(),
    }
    assert (claims.tcb_status, claims.advisory_ids) == ("UpToDate", ())
    assert claims.fmspc == FMSPC.hex()
    assert claims.tcb_evaluation_data_number == 17
    document = json.loads(json.dumps(claims.to_json()))
    assert document["mr_td"] == (b"m" * 48).hex()
    assert document["attributes"]["sept_ve_disable"] is True
    assert document["attributes"]["debug"] is False
    assert ("mr_service_td" in document) == (platform.body_type == 3)


def test_evidence_brings_quote_and_collateral() -> None:
    platform = Platform()
    evidence = CpuEvidence(
        "tdx", {"quote": platform.quote()}, {"collateral": platform.collateral()}
    )
    assert authenticate(evidence, intel_root=root_der(), at=NOW).tcb_status == "UpToDate"
    bare = CpuEvidence("tdx", {"quote": platform.quote()})
    with pytest.raises(Unauthentic, match="collateral"):
        authenticate(bare, intel_root=root_der(), at=NOW)


def test_padding_changes_nothing() -> None:
    platform = Platform()
    padded = authenticate_quote(
        platform.quote() + bytes(70), platform.collateral(), intel_root=root_der(), at=NOW
    )
    assert padded.report == claims_of(platform).report


# What is not authentic, and why.


def test_only_the_pinned_root_counts() -> None:
    elsewhere = Platform(realm="somebody else's")
    with pytest.raises(Unauthentic):
        claims_of(elsewhere)
    for root in (load_intel(), b"", b"x"):
        with pytest.raises(Unauthentic):
            authenticate_quote(Platform().quote(), Platform().collateral(), intel_root=root, at=NOW)


def test_collateral_of_another_root_does_not_vouch() -> None:
    with pytest.raises(Unauthentic):
        authenticate_quote(
            Platform().quote(),
            Platform(realm="somebody else's").collateral(),
            intel_root=root_der(),
            at=NOW,
        )


@pytest.mark.parametrize("at", [START - DAY, datetime.datetime(1960, 1, 1, tzinfo=datetime.UTC)])
def test_collateral_from_the_future_is_stale(at: datetime.datetime) -> None:
    with pytest.raises(Stale):
        claims_of(Platform(), at)


@pytest.mark.parametrize("at", [NOW + 60 * DAY, CERTIFICATES_END + DAY])
def test_collateral_that_has_expired_is_stale(at: datetime.datetime) -> None:
    with pytest.raises(Stale):
        claims_of(Platform(), at)


@pytest.mark.parametrize("serial", [1, 2, PCK_SERIAL])
def test_a_certificate_that_intel_took_back_is_revoked(serial: int) -> None:
    with pytest.raises(Revoked):
        claims_of(Platform(revoked=(serial,)))


def test_a_tcb_level_that_intel_took_back_is_revoked() -> None:
    with pytest.raises(Revoked):
        claims_of(Platform(status="Revoked"))


REFUSED: dict[str, tuple[Platform, type[EvidenceError], str]] = {
    "debug": (Platform(attributes=SAFE | 1), Contraindicated, "debug"),
    "debug, TD 1.5": (
        Platform(version=5, body_type=3, attributes=SAFE | 1),
        Contraindicated,
        "debug",
    ),
    "migration": (Platform(attributes=SAFE | 1 << 29), Contraindicated, "migratable"),
    "profiling": (Platform(attributes=SAFE | 1 << 5), Contraindicated, "profiling"),
    "#VE": (Platform(attributes=0), Contraindicated, "sept_ve_disable"),
    "a reserved bit": (Platform(attributes=SAFE | 1 << 40), Contraindicated, "reserved"),
    "a service TD": (
        Platform(version=5, body_type=3, body={"mr_service_td": b"x" * 48}),
        Contraindicated,
        "service TD",
    ),
    "a debuggable quoting enclave": (
        Platform(qe_attributes=bytes([0x17]) + bytes(15)),
        Unauthentic,
        "verifies",
    ),
    "an older platform than any level": (Platform(required_svn=4), Unauthentic, "No matching"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_dcap_qvl_refuses_is_refused_under_its_name(name: str) -> None:
    platform, kind, message = REFUSED[name]
    with pytest.raises(EvidenceError, match=message) as refusal:
        claims_of(platform)
    assert type(refusal.value) is kind


def test_an_enclaves_quote_is_no_tds() -> None:
    data = bytearray(Platform(version=5).quote())
    struct.pack_into("<I", data, 4, 0)
    struct.pack_into("<HI", data, 48, 1, 384)
    enclave = bytes(data[:54]) + bytes(data[54 : 54 + 384]) + bytes(data[54 + 584 :])
    with pytest.raises(Unauthentic, match="SGX"):
        authenticate_quote(enclave, Platform().collateral(), intel_root=root_der(), at=NOW)


BAD_COLLATERAL: dict[str, Any] = {
    "not JSON": b"{",
    "no object": b"[]",
    "a key twice": b'{"tcb_info": "", "tcb_info": ""}',
    "a key too few": {"tcb_info": ...},
    "a key too many": {"tcb_level": "UpToDate"},
    "no text": {"tcb_info": {}},
    "no hex": {"pck_crl": "xx"},
    "too long": b" " * (MAX_COLLATERAL_BYTES + 1),
}


@pytest.mark.parametrize("name", BAD_COLLATERAL)
def test_collateral_has_one_shape(name: str) -> None:
    data = BAD_COLLATERAL[name]
    if isinstance(data, dict):
        document = json.loads(Platform().collateral()) | data
        data = json.dumps({key: value for key, value in document.items() if value is not ...})
        data = data.encode()
    with pytest.raises(Malformed):
        authenticate_quote(Platform().quote(), data, intel_root=root_der(), at=NOW)


@pytest.mark.parametrize("chain", [None, ""])
def test_the_optional_key_of_collateral_may_be_null_but_not_wrong(chain: str | None) -> None:
    platform = Platform(collateral_changes={"pck_certificate_chain": chain})
    if chain is None:
        assert claims_of(platform).tcb_status == "UpToDate"
    else:
        with pytest.raises(Unauthentic):
            claims_of(platform)


# Two readings.


def test_a_reading_that_differs_from_what_was_verified_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`dcap-qvl` is made to vouch for another quote than the one that is appraised."""
    other = Platform(body={"mr_td": b"x" * 48})
    verify = dcap_qvl.verify_with_root_ca

    def verify_other(raw: bytes, collateral: Any, root: bytes, at: int) -> Any:
        return verify(other.quote(), collateral, root, at)

    monkeypatch.setattr(dcap_qvl, "verify_with_root_ca", verify_other)
    with pytest.raises(Unauthentic, match="agree"):
        claims_of(Platform())


@pytest.mark.parametrize(
    "platform", [Platform(), Platform(version=5, body_type=3)], ids=["TD 1.0", "TD 1.5"]
)
def test_a_flipped_bit_never_changes_a_claim(platform: Platform) -> None:
    """Bytes that nothing depends on exist in a quote: line ends of its certificates, and the root
    among them, in whose place the pinned one stands."""
    quote, collateral = platform.quote(), platform.collateral()
    signed = len(platform.signed())
    truth = claims_of(platform)
    source = random.Random(4300)
    bits = [*source.sample(range(signed * 8), 150), *source.sample(range(len(quote) * 8), 250)]
    for bit in bits:
        changed = bytearray(quote)
        changed[bit // 8] ^= 1 << bit % 8
        outcome = claims_or_refusal(bytes(changed), collateral)
        if isinstance(outcome, TdxClaims):
            assert bit // 8 > signed + 4 + 128
            assert outcome.to_json() == truth.to_json()


def test_a_flipped_bit_in_collateral_never_changes_a_claim() -> None:
    platform = Platform()
    quote, collateral = platform.quote(), platform.collateral()
    truth = claims_of(platform)
    source = random.Random(16072)
    for bit in source.sample(range(len(collateral) * 8), 400):
        changed = bytearray(collateral)
        changed[bit // 8] ^= 1 << bit % 8
        outcome = claims_or_refusal(quote, bytes(changed))
        if isinstance(outcome, TdxClaims):
            assert outcome.to_json() == truth.to_json()


def claims_or_refusal(quote: bytes, collateral: bytes) -> TdxClaims | ApplianceError:
    try:
        return authenticate_quote(quote, collateral, intel_root=root_der(), at=NOW)
    except ApplianceError as refusal:
        return refusal


# Policy.

REFERENCE = {
    "mrtd": frozenset({(b"m" * 48).hex()}),
    "rtmr1": frozenset({(b"1" * 48).hex(), "an older one"}),
    "rtmr2": frozenset({(b"2" * 48).hex()}),
}


def appraised(claims: TdxClaims, policy: Policy | None = None) -> AttestationResult:
    return appraise_tdx(claims, policy or Policy(), reference=REFERENCE, report_data=b"d" * 64)


def test_what_the_policy_asks_for_is_affirmed() -> None:
    result = appraised(claims_of(Platform()))
    assert result.verdict is Tier.AFFIRMING
    assert result.claims["scheme"] == "tdx"


@pytest.mark.parametrize(
    ("status", "tier"),
    [
        ("SWHardeningNeeded", Tier.WARNING),
        ("ConfigurationNeeded", Tier.WARNING),
        ("ConfigurationAndSWHardeningNeeded", Tier.WARNING),
        ("OutOfDate", Tier.CONTRAINDICATED),
        ("OutOfDateConfigurationNeeded", Tier.CONTRAINDICATED),
    ],
)
def test_a_platform_that_is_not_up_to_date_is_what_its_status_makes_it(
    status: str, tier: Tier
) -> None:
    claims = claims_of(Platform(status=status, advisories=("INTEL-SA-00615",)))
    result = appraised(claims)
    assert result.verdict is tier
    assert [one.check for one in result.findings] == ["tdx.tcb_status"]
    assert result.findings[0].got == f"{status} (INTEL-SA-00615)"
    accepted = appraised(claims, Policy(tdx_statuses=("UpToDate", status)))
    assert accepted.verdict is Tier.AFFIRMING


@pytest.mark.parametrize("status", ["Revoked", "TDRelaunchAdvised", "SomethingNew"])
def test_a_status_that_dcap_qvl_may_report_one_day_is_refused(status: str) -> None:
    claims = dataclasses.replace(claims_of(Platform()), tcb_status=status)
    assert appraised(claims).verdict is Tier.CONTRAINDICATED
    listed = appraised(claims, Policy(tdx_statuses=("UpToDate", status))).verdict
    assert listed is (Tier.CONTRAINDICATED if status == "Revoked" else Tier.AFFIRMING)


@pytest.mark.parametrize(
    ("attributes", "check", "tier"),
    [
        (SAFE | TdAttributes.DEBUG, "tdx.debug", Tier.CONTRAINDICATED),
        (SAFE | TdAttributes.PERF_PROF, "tdx.debug", Tier.CONTRAINDICATED),
        (SAFE | TdAttributes.MIGRATABLE, "tdx.migratable", Tier.CONTRAINDICATED),
        (0, "tdx.sept_ve_disable", Tier.WARNING),
    ],
)
def test_attributes_are_judged_here_too(attributes: int, check: str, tier: Tier) -> None:
    """`dcap-qvl` refuses such a TD before it comes to this; a later release may not."""
    claims = claims_of(Platform())
    report = dataclasses.replace(claims.report, td_attributes=attributes.to_bytes(8, "little"))
    result = appraised(dataclasses.replace(claims, report=report))
    assert [one.check for one in result.findings] == [check]
    assert result.verdict is tier


def test_the_binding_is_compared_whole() -> None:
    claims = claims_of(Platform(body={"report_data": b"d" * 32 + bytes(32)}))
    for expected, tier in {
        b"d" * 32: Tier.AFFIRMING,
        b"d" * 64: Tier.CONTRAINDICATED,
        b"": Tier.CONTRAINDICATED,
    }.items():
        result = appraise_tdx(claims, Policy(), reference=REFERENCE, report_data=expected)
        assert result.verdict is tier


@pytest.mark.parametrize("name", [*NEEDED_MEASUREMENTS, "rtmr0", "rtmr3"])
def test_a_measurement_that_differs_is_contraindicated(name: str) -> None:
    reference = {**REFERENCE, name: frozenset({"another"})}
    result = appraise_tdx(claims_of(Platform()), Policy(), reference=reference, report_data=None)
    assert [one.check for one in result.findings] == [f"tdx.{name}"]
    assert result.verdict is Tier.CONTRAINDICATED


@pytest.mark.parametrize("name", NEEDED_MEASUREMENTS)
def test_a_measurement_that_is_not_compared_is_a_warning(name: str) -> None:
    reference = {key: value for key, value in REFERENCE.items() if key != name}
    result = appraise_tdx(claims_of(Platform()), Policy(), reference=reference, report_data=None)
    assert [one.check for one in result.findings] == [f"tdx.{name}"]
    assert result.verdict is Tier.WARNING


def test_without_reference_values_the_best_verdict_is_a_warning() -> None:
    result = appraise_tdx(claims_of(Platform()), Policy(), reference=None, report_data=None)
    assert result.verdict is Tier.WARNING
    assert [one.got for one in result.findings] == ["authentic, not compared"]


def test_a_measurement_that_does_not_exist_is_contraindicated() -> None:
    reference = {**REFERENCE, "pcr4": frozenset({"00"})}
    result = appraise_tdx(claims_of(Platform()), Policy(), reference=reference, report_data=None)
    assert result.verdict is Tier.CONTRAINDICATED


# What Intel signed.

ISSUED = datetime.datetime(2025, 6, 19, 11, 16, 3, tzinfo=datetime.UTC)
TODAY = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)


@needs_vectors
def test_a_real_quote_is_up_to_date_at_its_time_and_stale_today() -> None:
    quote = (TDX / "phala_tdx_quote_v4.bin").read_bytes()
    collateral = (TDX / "phala_tdx_quote_collateral.json").read_bytes()
    root = load_intel()
    claims = authenticate_quote(quote, collateral, intel_root=root, at=ISSUED)
    assert (claims.tcb_status, claims.advisory_ids) == ("UpToDate", ())
    result = appraise_tdx(claims, Policy(), reference=None, report_data=claims.report_data)
    assert result.verdict is Tier.WARNING
    with pytest.raises(Stale):
        authenticate_quote(quote, collateral, intel_root=root, at=TODAY)
    with pytest.raises(Unauthentic):
        authenticate_quote(quote, collateral, intel_root=root_der(), at=ISSUED)


@needs_vectors
def test_a_real_enclaves_quote_is_refused_by_name() -> None:
    with pytest.raises(Unauthentic, match="SGX"):
        authenticate_quote(
            (TDX / "phala_sgx_quote_v3.bin").read_bytes(),
            (TDX / "phala_sgx_quote_collateral.json").read_bytes(),
            intel_root=load_intel(),
            at=ISSUED,
        )


def platform_collateral(tcb_info: str) -> bytes:
    """Collateral from the parts as Intel's service answers them."""
    folder = TDX / "ars_collateral"
    issuers = json.loads((TDX / "phala_tdx_quote_collateral.json").read_bytes())
    table = (folder / tcb_info).read_text()
    identity = (folder / "td_qe_identity.json").read_text()
    return json.dumps(
        {
            "pck_crl_issuer_chain": issuers["pck_crl_issuer_chain"],
            "root_ca_crl": (folder / "root_ca_crl.der").read_bytes().hex(),
            "pck_crl": (folder / "pck_crl_platform.der").read_bytes().hex(),
            "tcb_info_issuer_chain": (folder / "tcb_signing_chain.pem").read_text(),
            "tcb_info": signed_part(table, "tcbInfo"),
            "tcb_info_signature": json.loads(table)["signature"],
            "qe_identity_issuer_chain": (folder / "qe_identity_signing_chain.pem").read_text(),
            "qe_identity": signed_part(identity, "enclaveIdentity"),
            "qe_identity_signature": json.loads(identity)["signature"],
        }
    ).encode()


def signed_part(text: str, name: str) -> str:
    """The member as it is spelled: that is what the signature is over."""
    found = re.search(rf'"{name}"\s*:\s*', text)
    assert found is not None
    _, end = json.JSONDecoder().raw_decode(text, found.end())
    return text[found.end() : end]


@needs_vectors
@pytest.mark.parametrize(
    ("quote", "table", "kind", "message"),
    [
        ("ars_tdx_quote_4.dat", "tcb_info_50806f000000.json", Contraindicated, "debug"),
        ("ars_tdx_quote_4.dat", "tcb_info_90c06f000000.json", Unauthentic, "Fmspc"),
        ("ars_tdx_quote_5.dat", "tcb_info_90c06f000000.json", Unauthentic, "No matching TCB"),
    ],
)
def test_real_quotes_that_must_not_pass(
    quote: str, table: str, kind: type[EvidenceError], message: str
) -> None:
    at = datetime.datetime(2026, 3, 17, 12, tzinfo=datetime.UTC)
    with pytest.raises(EvidenceError, match=message) as refusal:
        authenticate_quote(
            (TDX / quote).read_bytes(), platform_collateral(table), intel_root=load_intel(), at=at
        )
    assert type(refusal.value) is kind


@needs_vectors
def test_a_flipped_bit_in_a_real_quote_never_changes_a_claim() -> None:
    quote = (TDX / "phala_tdx_quote_v4.bin").read_bytes()
    collateral = (TDX / "phala_tdx_quote_collateral.json").read_bytes()
    root = load_intel()
    truth = authenticate_quote(quote, collateral, intel_root=root, at=ISSUED).to_json()
    source = random.Random(5006)
    for bit in source.sample(range(len(quote) * 8), 300):
        changed = bytearray(quote)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            claims = authenticate_quote(bytes(changed), collateral, intel_root=root, at=ISSUED)
        except ApplianceError:
            continue
        assert bit // 8 > 48 + 584
        assert claims.to_json() == truth
