"""TPM and Azure evidence: authentic or refused, and judged."""

from __future__ import annotations

import datetime
import hashlib
import random
import struct
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from appliance.config import Policy
from appliance.endorsements.anchors import load_anchors
from appliance.errors import EvidenceError, Malformed, Stale, Unauthentic, Unbound
from appliance.rats.chain import authenticate_path, der_of, parse_der_certificate
from appliance.rats.model import Anchors
from appliance.rats.policy.tpm import appraise_azure_vtpm, appraise_tpm2
from appliance.rats.reference import ImageReference
from appliance.rats.result import AttestationResult, Tier
from appliance.rats.schemes import azure_vtpm, tpm2
from appliance.rats.schemes.tpm2 import TpmClaims
from appliance.wire.azure_hcl import parse_hcl_report
from appliance.wire.azure_json import parse_azure_json
from appliance.wire.event_log import parse_event_log, replay
from appliance.wire.evidence import CpuEvidence
from appliance.wire.tdx import TdReport, parse_td_report
from appliance.wire.tdx import parse_quote as parse_td_quote
from tests.fakes.amd_evidence import NOW, Guest, revocation_list, rsa_key
from tests.fakes.authority import DAY, Authority, name, pem
from tests.fakes.azure_evidence import AzureGuest, hcl_report, quote_message, runtime_claims
from tests.fakes.intel_evidence import Platform, root_der
from tests.fakes.software_tpm import Firmware
from tests.vectors_dir import VECTORS, needs_vectors

AZURE = VECTORS / "azure"
FILES = sorted(AZURE.glob("*.json"))
VECTORS_AT = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)
NONCE = b"n" * 32
EV_IPL = 0x0D
BOOT = Firmware().boot()
BOOTED = {pcr: bytes(32) for pcr in range(16)} | replay(parse_event_log(BOOT.log))

AUTHORITY = Authority("TPM vendor", now=NOW)
INTERMEDIATE = Authority("TPM vendor's regional CA", now=NOW, parent=AUTHORITY)
AK = rsa_key("test AK")


def signed(message: bytes, *, key: str = "test AK") -> bytes:
    return rsa_key(key).sign(message, padding.PKCS1v15(), hashes.SHA256())


def tpm_evidence(
    *,
    pcrs: Mapping[int, bytes] = BOOTED,
    extra_data: bytes = NONCE,
    log: bytes = b"",
    authority: Authority = AUTHORITY,
    parts: Mapping[str, bytes] | None = None,
) -> CpuEvidence:
    message = quote_message(extra_data, dict(pcrs))
    made = {
        "quote": message,
        "signature": signed(message),
        "pcrs": b"".join(pcrs[pcr] for pcr in sorted(pcrs)),
        "ak_certificate": der_of(authority.issue(AK.public_key(), ["ak"], purposes=None)),
    }
    if log:
        made["event_log"] = log
    return CpuEvidence("tpm2", made | dict(parts or {}))


def authentic(evidence: CpuEvidence) -> TpmClaims:
    return tpm2.authenticate(evidence, roots=(AUTHORITY.certificate,), at=NOW)


def checks(result: AttestationResult) -> dict[str, Tier]:
    return {one.check: one.tier for one in result.all_findings()}


def test_a_quote_under_a_pinned_root_is_authentic() -> None:
    claims = authentic(tpm_evidence(log=BOOT.log))
    assert claims.report_data == NONCE
    assert claims.measurements["pcr4"] == BOOTED[4].hex()
    assert claims.replayed == (0, 1, 2, 3, 4, 5, 6, 7, 11)
    document = claims.to_json()
    assert document["event_log"] == {
        "events": len(claims.events),
        "replayed_pcrs": list(claims.replayed),
    }


def test_intermediates_come_with_the_evidence() -> None:
    evidence = tpm_evidence(authority=INTERMEDIATE)
    with pytest.raises(Unauthentic):
        authentic(evidence)
    whole = replace(evidence, endorsements={"authorities": pem(INTERMEDIATE.certificate)})
    assert authentic(whole).report_data == NONCE


def test_without_a_pinned_root_the_setting_is_named() -> None:
    with pytest.raises(Unauthentic, match="tpm_roots_file"):
        tpm2.authenticate(tpm_evidence(), roots=(), at=NOW)


def test_certificates_have_their_time() -> None:
    with pytest.raises(Stale):
        tpm2.authenticate(tpm_evidence(), roots=(AUTHORITY.certificate,), at=NOW + 2 * DAY)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"signature": signed(b"another message")}, Unauthentic),
        ({"signature": signed(quote_message(NONCE, BOOTED), key="other")}, Unauthentic),
        ({"signature": b"\x30" + bytes(70)}, Unauthentic),
        ({"quote": quote_message(b"o" * 32, BOOTED)}, Unauthentic),
        ({"pcrs": bytes(32 * 16)}, Unbound),
        ({"pcrs": bytes(32)}, Unbound),
        ({"pcrs": b""}, Unbound),
        ({"ak_certificate": b""}, Malformed),
    ],
)
def test_a_replaced_part_is_refused(changes: dict[str, bytes], error: type[Exception]) -> None:
    with pytest.raises(error):
        authentic(tpm_evidence(parts=changes))


def test_sha1_is_refused() -> None:
    message = quote_message(NONCE, BOOTED)
    tagged = struct.pack(">HHH", 0x0014, 0x0004, 256) + signed(message)
    with pytest.raises(Unauthentic, match="sha1"):
        authentic(tpm_evidence(parts={"signature": tagged}))


@pytest.mark.parametrize("bank", [4, 12, 0x12])
def test_another_bank_is_refused(bank: int) -> None:
    message = quote_message(NONCE, BOOTED, bank=bank)
    with pytest.raises(Unauthentic, match="SHA-256"):
        authentic(tpm_evidence(parts={"quote": message, "signature": signed(message)}))


def test_a_quote_over_nothing_is_refused() -> None:
    with pytest.raises(Unauthentic, match="none"):
        authentic(tpm_evidence(pcrs={}))


def test_a_log_of_another_boot_is_refused_by_the_pcrs_name() -> None:
    other = Firmware().boot()
    other.measure(11, b"another kernel")
    with pytest.raises(Unbound, match="PCR 11"):
        authentic(tpm_evidence(log=other.log))


def test_registers_that_the_system_extends_by_itself_are_not_compared() -> None:
    firmware = Firmware().boot()
    for pcr in (10, 15):
        firmware.measure(pcr, b"measured after the firmware's log")
    claims = authentic(tpm_evidence(log=firmware.log))
    assert not {10, 15} & set(claims.replayed)


def test_the_phases_of_systemd_are_a_prefix_or_nothing() -> None:
    value = BOOTED[11]
    for phase in tpm2.PHASES:
        value = hashlib.sha256(value + hashlib.sha256(phase).digest()).digest()
        claims = authentic(tpm_evidence(pcrs=BOOTED | {11: value}, log=BOOT.log))
        assert 11 in claims.replayed
    skipped = hashlib.sha256(BOOTED[11] + hashlib.sha256(b"leave-initrd").digest()).digest()
    with pytest.raises(Unbound, match="PCR 11"):
        authentic(tpm_evidence(pcrs=BOOTED | {11: skipped}, log=BOOT.log))


def test_every_form_of_an_attestation_keys_file_is_read() -> None:
    key = AK.public_key()
    certificate = AUTHORITY.issue(key, ["ak"], purposes=None)
    files = (
        key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        pem(certificate),
        der_of(certificate),
    )
    for data in files:
        assert tpm2.parse_public_key(data) == key


def test_keys_that_sign_no_quotes_are_refused() -> None:
    small = rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key()
    for key in (small, ed25519.Ed25519PrivateKey.generate().public_key()):
        data = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        with pytest.raises(Unauthentic, match="2048"):
            tpm2.parse_public_key(data)


def test_a_certificate_whose_key_is_on_an_unknown_curve_is_refused() -> None:
    p256 = bytes.fromhex("06082a8648ce3d030107")
    der = der_of(AUTHORITY.certificate).replace(p256, p256[:-1] + b"\x77")
    with pytest.raises(Malformed, match="public key"):
        tpm2.parse_public_key(der)


@pytest.mark.parametrize("signs", [True, False])
def test_a_certified_key_must_be_one_for_signatures(signs: bool) -> None:
    usage = {
        "digital_signature": signs,
        "content_commitment": False,
        "key_encipherment": True,
        "data_encipherment": False,
        "key_agreement": False,
        "key_cert_sign": False,
        "crl_sign": False,
        "encipher_only": False,
        "decipher_only": False,
    }
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name("ak"))
        .issuer_name(AUTHORITY.name)
        .public_key(AK.public_key())
        .serial_number(7)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .sign(AUTHORITY.key, hashes.SHA256())
    )
    evidence = tpm_evidence(parts={"ak_certificate": der_of(certificate)})
    if signs:
        assert authentic(evidence).report_data == NONCE
    else:
        with pytest.raises(Unauthentic, match="digitalSignature"):
            authentic(evidence)


def ak_certificate(*extensions: tuple[x509.ExtensionType, bool]) -> bytes:
    builder = (
        x509.CertificateBuilder()
        .subject_name(name("ak"))
        .issuer_name(AUTHORITY.name)
        .public_key(AK.public_key())
        .serial_number(7)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return der_of(builder.sign(AUTHORITY.key, hashes.SHA256()))


@pytest.mark.parametrize("critical", [False, True])
@pytest.mark.parametrize(
    ("purposes", "accepted"),
    [
        ((tpm2.AK_PURPOSE,), True),
        ((ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,), True),
        ((ExtendedKeyUsageOID.SERVER_AUTH, tpm2.AK_PURPOSE), True),
        ((ExtendedKeyUsageOID.SERVER_AUTH,), False),
        ((x509.ObjectIdentifier("2.23.133.8.1"),), False),  # tcg-kp-EKCertificate
    ],
)
def test_a_certificate_that_names_purposes_must_name_the_attestation_keys(
    purposes: tuple[x509.ObjectIdentifier, ...], accepted: bool, critical: bool
) -> None:
    certificate = ak_certificate((x509.ExtendedKeyUsage(purposes), critical))
    evidence = tpm_evidence(parts={"ak_certificate": certificate})
    if accepted:
        assert authentic(evidence).report_data == NONCE
    else:
        with pytest.raises(Unauthentic, match=r"expected extended key usage 2\.23\.133\.8\.3"):
            authentic(evidence)


@pytest.mark.parametrize("ca", [True, False])
def test_a_certificate_authoritys_key_signs_no_quotes(ca: bool) -> None:
    constraints = x509.BasicConstraints(ca=ca, path_length=None)
    evidence = tpm_evidence(parts={"ak_certificate": ak_certificate((constraints, True))})
    if ca:
        with pytest.raises(Unauthentic, match="no CA's"):
            authentic(evidence)
    else:
        assert authentic(evidence).report_data == NONCE


@pytest.mark.parametrize("critical", [False, True])
def test_an_issuers_purposes_count_only_where_they_are_critical(critical: bool) -> None:
    """Google's TPM CAs name tcg-kp-EKCertificate and issue attestation keys' certificates too."""
    other = x509.ExtendedKeyUsage([x509.ObjectIdentifier("2.23.133.8.1")])
    issuer = (
        x509.CertificateBuilder()
        .subject_name(INTERMEDIATE.name)
        .issuer_name(AUTHORITY.name)
        .public_key(INTERMEDIATE.key.public_key())
        .serial_number(7)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(other, critical=critical)
        .sign(AUTHORITY.key, hashes.SHA256())
    )
    evidence = replace(
        tpm_evidence(authority=INTERMEDIATE), endorsements={"authorities": pem(issuer)}
    )
    if critical:
        with pytest.raises(Unauthentic, match="expected extended key usage"):
            authentic(evidence)
    else:
        assert authentic(evidence).report_data == NONCE


@pytest.mark.parametrize("critical", [False, True])
def test_a_purpose_that_nobody_reads_may_not_be_critical(critical: bool) -> None:
    certificate = ak_certificate((x509.ExtendedKeyUsage([tpm2.AK_PURPOSE]), critical))
    path = [parse_der_certificate(certificate, field="ak")]
    roots = [AUTHORITY.certificate]
    if critical:
        with pytest.raises(Unauthentic, match=r"unknown critical extension 2\.5\.29\.37"):
            authenticate_path(path, roots=roots, at=NOW, what="test")
    else:
        assert len(authenticate_path(path, roots=roots, at=NOW, what="test")) == 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x30\x82\x01\x00",
        b"-----BEGIN PUBLIC KEY-----\n",
        b"-----BEGIN PUBLIC KEY-----\n!\n-----END PUBLIC KEY-----\n",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        b"\0" * 100,
        b"x" * 100_000,
    ],
)
def test_what_is_no_key_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        tpm2.parse_public_key(data)


def test_ten_thousand_random_keys_are_refused() -> None:
    source = random.Random(5)
    for _ in range(10_000):
        with pytest.raises((Malformed, Unauthentic)):
            tpm2.parse_public_key(source.randbytes(source.randrange(100)))


def test_a_tpm_is_at_best_a_warning() -> None:
    claims = authentic(tpm_evidence())
    reference = {f"pcr{pcr}": frozenset({BOOTED[pcr].hex()}) for pcr in (4, 7, 11)}
    result = appraise_tpm2(claims, Policy(), reference=reference, report_data=NONCE)
    assert checks(result) == {"tpm2.memory": Tier.WARNING}
    result = appraise_tpm2(claims, Policy(), reference=None, report_data=None)
    assert checks(result) == {"tpm2.memory": Tier.WARNING, "tpm2.reference": Tier.WARNING}


@pytest.mark.parametrize(
    ("pcrs", "check"),
    [
        (BOOTED | {4: bytes(32)}, "tpm2.pcr4"),
        (BOOTED | {7: bytes(32)}, "tpm2.pcr7"),
        (BOOTED | {11: bytes(32)}, "tpm2.pcr11"),
        (BOOTED | {12: b"\x01" * 32}, "tpm2.pcr12"),
        ({pcr: value for pcr, value in BOOTED.items() if pcr != 12}, "tpm2.pcr12"),
        ({pcr: value for pcr, value in BOOTED.items() if pcr != 4}, "tpm2.pcr4"),
    ],
)
def test_another_image_is_refused(pcrs: dict[int, bytes], check: str) -> None:
    reference = {f"pcr{pcr}": frozenset({BOOTED[pcr].hex()}) for pcr in (4, 7, 11)}
    claims = authentic(tpm_evidence(pcrs=pcrs))
    result = appraise_tpm2(claims, Policy(), reference=reference, report_data=NONCE)
    assert checks(result)[check] is Tier.CONTRAINDICATED


def overridden(*measured: bytes, forge: bool = False) -> TpmClaims:
    """Of a machine whose image was given these beside itself."""
    firmware = Firmware().boot()
    for data in measured:
        firmware.measure(12, data, EV_IPL)
    log, pcrs = firmware.log, dict(BOOTED)
    pcrs.update(replay(parse_event_log(log)))
    if forge:
        log = log.replace(measured[0], bytes(len(measured[0])))
    return authentic(tpm_evidence(pcrs=pcrs, log=log))


def said_of_pcr12(claims: TpmClaims) -> str:
    reference = {f"pcr{pcr}": frozenset({BOOTED[pcr].hex()}) for pcr in (4, 7, 11)}
    result = appraise_tpm2(claims, Policy(), reference=reference, report_data=NONCE)
    (finding,) = [one for one in result.all_findings() if one.check == "tpm2.pcr12"]
    assert finding.tier is Tier.CONTRAINDICATED
    return finding.got.removeprefix(claims.measurements["pcr12"])


def test_an_argument_that_was_added_is_named() -> None:
    argument = "dcv.extra=1\0".encode("utf-16-le")
    assert said_of_pcr12(overridden(argument)) == ", which is 'dcv.extra=1'"
    both = overridden(argument, b"odd")
    assert said_of_pcr12(both) == ", which is 'dcv.extra=1', EV_IPL"


def test_text_that_was_not_extended_is_not_told() -> None:
    argument = "dcv.extra=1\0".encode("utf-16-le")
    assert said_of_pcr12(overridden(argument, forge=True)) == ", which is EV_IPL"


def test_what_was_added_is_told_in_bounds_and_without_control_characters() -> None:
    claims = overridden(*["\n\x1b[2J".encode("utf-16-le") + b"a\0" * 999] * 20)
    assert len(claims.overrides) == tpm2.MAX_OVERRIDES
    assert claims.overrides[0].isascii()
    assert claims.overrides[0].isprintable()
    assert len(said_of_pcr12(claims)) < 8 * 4 * tpm2.MAX_TOLD


def test_without_a_log_nothing_is_named() -> None:
    claims = authentic(tpm_evidence(pcrs=BOOTED | {12: b"\x01" * 32}))
    assert said_of_pcr12(claims) == ""


@pytest.mark.parametrize("got", [b"o" * 32, NONCE + bytes(32), NONCE[:31], b""])
def test_other_qualifying_data_are_refused(got: bytes) -> None:
    claims = authentic(tpm_evidence(extra_data=got))
    result = appraise_tpm2(claims, Policy(), reference=None, report_data=NONCE)
    assert checks(result)["tpm2.report_data"] is Tier.CONTRAINDICATED


# Azure.

GUEST = AzureGuest(pcrs={pcr: BOOTED.get(pcr, bytes(32)) for pcr in range(24)})
IMAGE = ImageReference(
    "sha256:" + "0" * 64,
    pcrs={f"pcr{pcr}": frozenset({BOOTED[pcr].hex()}) for pcr in (4, 7, 11)},
    azure={"paravisor_measurement": frozenset({(b"m" * 48).hex()})},
)


def azure(evidence: CpuEvidence, anchors: Anchors = GUEST.anchors) -> azure_vtpm.AzureVtpmClaims:
    return azure_vtpm.authenticate(evidence, anchors=anchors, at=NOW)


def test_an_azure_machine_that_is_all_it_should_be_is_affirmed() -> None:
    evidence = GUEST.evidence(event_log=BOOT.log)
    crl = revocation_list(GUEST.guest.roots)
    evidence = replace(evidence, endorsements={**evidence.endorsements, "crl": crl})
    claims = azure(evidence)
    assert claims.report_data == NONCE
    assert claims.measurements["measurement"] == (b"m" * 48).hex()
    assert claims.measurements["pcr4"] == BOOTED[4].hex()
    result = appraise_azure_vtpm(claims, Policy(), reference=IMAGE, report_data=NONCE)
    assert checks(result) == {}
    assert result.verdict is Tier.AFFIRMING
    document = result.claims
    assert document["secure_boot"] is True
    assert document["user_data"] == "00" * 64


@pytest.mark.parametrize("hash_type", [1, 2, 3])
@pytest.mark.parametrize("version", [1, 2])
def test_every_version_and_hash_is_bound(hash_type: int, version: int) -> None:
    guest = replace(GUEST, hash_type=hash_type, version=version)
    assert azure(guest.evidence()).bound != bytes(64)


def test_claims_that_the_hardware_does_not_vouch_for_are_refused() -> None:
    """The paravisor's statement names an attacker's key; the report is a real one."""
    hardware = parse_hcl_report(GUEST.evidence().parts["hcl_report"]).hardware_report
    message = quote_message(NONCE, GUEST.pcrs)
    evidence = GUEST.evidence(
        hcl_report=hcl_report(hardware, runtime_claims(rsa_key("attacker").public_key())),
        signature=signed(message, key="attacker"),
    )
    with pytest.raises(Unbound, match="hash"):
        azure(evidence)


def test_a_hash_with_more_behind_it_is_not_the_hash() -> None:
    claims = runtime_claims(AK.public_key())
    bound = hashlib.sha256(claims).digest() + bytes(31) + b"\x01"
    hardware = GUEST.guest.but(report={0x50: bound}).raw_report()
    with pytest.raises(Unbound):
        azure(GUEST.evidence(hcl_report=hcl_report(hardware, claims)))


def test_an_azure_machines_revocation_list_of_another_version_is_malformed() -> None:
    crl = revocation_list(GUEST.guest.roots)
    place = crl.index(b"\x02\x01\x01")
    evidence = GUEST.evidence()
    altered = {"crl": crl[: place + 2] + b"\x02" + crl[place + 3 :]}
    with pytest.raises(Malformed, match="CRL"):
        azure(replace(evidence, endorsements={**evidence.endorsements, **altered}))


def test_what_is_missing_is_named() -> None:
    bare = replace(GUEST.evidence(), endorsements={})
    with pytest.raises(Unauthentic, match="VCEK"):
        azure(bare)
    td = hcl_report(bytes(1024), runtime_claims(AK.public_key()), report_type=4)
    with pytest.raises(Unauthentic, match="TD quote"):
        azure(GUEST.evidence(hcl_report=td))
    with pytest.raises(Unauthentic):
        azure(GUEST.evidence(), Anchors())
    stranger = replace(GUEST, guest=Guest(realm="stranger"))
    with pytest.raises(Unauthentic):
        azure(stranger.evidence())


def td_machine(report_data: bytes | None = None, **body: bytes) -> tuple[CpuEvidence, Anchors]:
    """An Azure VM on TDX: the paravisor's statement, and a TD quote about it or something else."""
    claims = runtime_claims(AK.public_key())
    bound = hashlib.sha256(claims).digest().ljust(64, b"\0")
    own = Platform(body={"report_data": bound})
    platform = own.but(body={"report_data": report_data or bound, **body})
    evidence = GUEST.evidence(
        hcl_report=hcl_report(own.td_report(), claims, report_type=4),
        td_quote=platform.quote(),
    )
    evidence = replace(evidence, endorsements={"collateral": platform.collateral()})
    return evidence, Anchors(intel_root=root_der())


def test_a_tdx_machine_is_authentic_through_its_td_quote() -> None:
    evidence, anchors = td_machine()
    claims = azure(evidence, anchors)
    assert claims.report_data == NONCE
    paravisor = {
        "paravisor_measurement": frozenset({claims.hardware.measurements["mrtd"]}),
        "rtmr1": frozenset({claims.hardware.measurements["rtmr1"]}),
        "rtmr2": frozenset({claims.hardware.measurements["rtmr2"]}),
    }
    image = replace(IMAGE, azure=paravisor)
    result = appraise_azure_vtpm(claims, Policy(), reference=image, report_data=NONCE)
    assert checks(result) == {}
    other = replace(IMAGE, azure=paravisor | {"paravisor_measurement": frozenset({"00" * 48})})
    result = appraise_azure_vtpm(claims, Policy(), reference=other, report_data=NONCE)
    assert checks(result) == {"tdx.mrtd": Tier.CONTRAINDICATED}
    result = appraise_azure_vtpm(claims, Policy(), reference=None, report_data=NONCE)
    assert checks(result)["tdx.reference"] is Tier.WARNING


def test_a_td_quote_about_other_claims_is_refused() -> None:
    evidence, anchors = td_machine(report_data=b"x" * 64)
    with pytest.raises(Unbound, match="hash"):
        azure(evidence, anchors)


@pytest.mark.parametrize("name", ["tee_tcb_svn", "mr_td", "rt_mr2", "mr_owner_config"])
def test_a_td_quote_of_another_td_report_is_refused(name: str) -> None:
    length = 16 if name == "tee_tcb_svn" else 48
    evidence, anchors = td_machine(**{name: bytes([3, 0, *[3] * (length - 3), 4])})
    with pytest.raises(Unbound, match=f"{name} of the TD quote"):
        azure(evidence, anchors)


@needs_vectors
def test_a_real_td_report_says_what_its_quote_says() -> None:
    told = parse_hcl_report((AZURE / "trustee_tdx_hcl-report.bin").read_bytes()).td_report
    quoted = parse_td_quote((AZURE / "trustee_tdx_td-quote.bin").read_bytes()).body
    assert isinstance(quoted, TdReport)
    assert quoted.items().items() <= parse_td_report(told).items().items()


@needs_vectors
def test_a_real_td_quote_of_another_machine_is_refused() -> None:
    """A real HCL report and quote, and Intel-signed evidence of somebody else's TD."""
    tdx = VECTORS / "tdx"
    report = (AZURE / "trustee_tdx_hcl-report.bin").read_bytes()
    signature, message, pcrs = _bincode((AZURE / "trustee_tdx_quote.bin").read_bytes())
    parts = {
        "hcl_report": report,
        "quote": message,
        "signature": signature,
        "pcrs": b"".join(pcrs.values()),
        "td_quote": (tdx / "phala_tdx_quote_v4.bin").read_bytes(),
    }
    (collateral,) = tdx.glob("phala_tdx*collateral*.json")
    evidence = CpuEvidence("azure_vtpm", parts, {"collateral": collateral.read_bytes()})
    at = datetime.datetime.fromtimestamp(1750331763 + 3600, datetime.UTC)
    with pytest.raises(Unbound, match="hash"):
        azure_vtpm.authenticate(evidence, anchors=load_anchors(), at=at)


@pytest.mark.parametrize(
    ("guest", "policy", "check", "tier"),
    [
        (replace(GUEST, secure_boot=False), Policy(), "azure_vtpm.secure_boot", "contraindicated"),
        (replace(GUEST, secure_boot=None), Policy(), "azure_vtpm.secure_boot", "contraindicated"),
        (
            replace(GUEST, secure_boot=False),
            Policy(secure_boot="unsafe_any"),
            "azure_vtpm.secure_boot",
            "warning",
        ),
        (
            replace(GUEST, guest=Guest(report={0x90: b"x" * 48})),
            Policy(),
            "sev_snp.measurement",
            "contraindicated",
        ),
        (
            replace(GUEST, pcrs=GUEST.pcrs | {12: b"x" * 32}),
            Policy(),
            "azure_vtpm.pcr12",
            "contraindicated",
        ),
        (
            replace(GUEST, pcrs=GUEST.pcrs | {11: b"x" * 32}),
            Policy(),
            "azure_vtpm.pcr11",
            "contraindicated",
        ),
        (
            replace(GUEST, extra_data=b"o" * 32),
            Policy(),
            "azure_vtpm.report_data",
            "contraindicated",
        ),
        (GUEST, Policy(revocation="required"), "sev_snp.revocation", "contraindicated"),
    ],
)
def test_what_the_policy_refuses_is_named(
    guest: AzureGuest, policy: Policy, check: str, tier: str
) -> None:
    result = appraise_azure_vtpm(
        azure(guest.evidence()), policy, reference=IMAGE, report_data=NONCE
    )
    assert checks(result)[check] == tier
    assert result.verdict == tier


def test_a_flipped_bit_never_affirms() -> None:
    source = random.Random(6)
    evidence = GUEST.evidence(event_log=BOOT.log)
    passed = 0
    for _ in range(600):
        name = source.choice(sorted(evidence.parts))
        part = bytearray(evidence.parts[name])
        at = source.randrange(8 * len(part))
        part[at // 8] ^= 1 << at % 8
        try:
            claims = azure(replace(evidence, parts={**evidence.parts, name: bytes(part)}))
        except (Malformed, EvidenceError):
            continue
        # What is left says nothing: comments in the log.
        assert name == "event_log"
        assert claims.measurements == azure(evidence).measurements
        passed += 1
    assert passed < 200


# Evidence that real machines made.


@needs_vectors
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_real_evidence_is_authentic_and_not_compared(path: Path) -> None:
    evidence = parse_azure_json(path.read_bytes())
    claims = azure_vtpm.authenticate(evidence, anchors=load_anchors(), at=VECTORS_AT)
    assert len(claims.tpm.pcrs) == 24
    assert claims.runtime.secure_boot is True
    result = appraise_azure_vtpm(claims, Policy(), reference=None, report_data=claims.report_data)
    assert result.verdict is Tier.WARNING
    assert {"azure_vtpm.reference", "sev_snp.reference"} <= checks(result).keys()
    assert "not compared" in {one.got.rpartition(", ")[2] for one in result.all_findings()}


@needs_vectors
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_flipped_bit_of_real_evidence_is_refused(path: Path) -> None:
    source = random.Random(7)
    evidence = parse_azure_json(path.read_bytes())
    anchors = load_anchors()
    for _ in range(150):
        name = source.choice(["hcl_report", "quote", "signature", "pcrs"])
        part = bytearray(evidence.parts[name])
        at = source.randrange(8 * len(part))
        part[at // 8] ^= 1 << at % 8
        with pytest.raises((Malformed, EvidenceError)):
            azure_vtpm.authenticate(
                replace(evidence, parts={**evidence.parts, name: bytes(part)}),
                anchors=anchors,
                at=VECTORS_AT,
            )


def accepted(evidence: CpuEvidence, anchors: Anchors, at: datetime.datetime) -> list[int]:
    """The bytes of the HCL report of which a bit may be flipped, drawn of each, and the lengths to
    which it may be cut."""
    report, source, found = evidence.parts["hcl_report"], random.Random(8), []
    flips = [
        report[:place] + bytes([report[place] ^ 1 << source.randrange(8)]) + report[place + 1 :]
        for place in range(len(report))
    ]
    cuts = [report[:length] for length in range(len(report))]
    for place, changed in enumerate([*flips, *cuts]):
        other = replace(evidence, parts={**evidence.parts, "hcl_report": changed})
        try:
            azure_vtpm.authenticate(other, anchors=anchors, at=at)
        except (Malformed, EvidenceError):
            continue
        found.append(place % len(report))
    return found


@needs_vectors
def test_no_byte_of_a_real_hcl_report_may_be_changed_or_missing() -> None:
    evidence = parse_azure_json((AZURE / "trustee_snp_evidence-v2.json").read_bytes())
    report = evidence.parts["hcl_report"]
    used = int.from_bytes(report[8:12], "little")
    # The NV index is padded with zeros: they may be missing, and may not be anything else.
    assert not any(report[used:])
    assert accepted(evidence, load_anchors(), VECTORS_AT) == [*range(used, len(report))]


def test_of_a_tdx_machines_hcl_report_only_what_the_machine_alone_could_check_is_free() -> None:
    evidence, anchors = td_machine()
    cpu_svn, mac = range(32 + 16, 32 + 32), range(32 + 224, 32 + 256)
    version = [32 + 2]  # of a TD 1.0 as of a TD 1.5, whose fields are zeros in the former
    free = accepted(evidence, anchors, NOW)
    assert set(free) <= {*cpu_svn, *mac, *version}
    assert {*cpu_svn, *mac} <= set(free)


def _bincode(data: bytes) -> tuple[bytes, bytes, dict[int, bytes]]:
    """Signature, message and PCRs of az-cvm-vtpm's own file form: lengths of 8 bytes, LE."""
    fields = []
    for _ in range(2):
        length = int.from_bytes(data[:8], "little")
        fields.append(data[8 : 8 + length])
        data = data[8 + length :]
    values = data[8:]
    return fields[0], fields[1], {pcr: values[32 * pcr : 32 * pcr + 32] for pcr in range(24)}


@needs_vectors
@pytest.mark.parametrize(
    ("report", "quote"),
    [
        ("trustee_snp_hcl-report.bin", "trustee_snp_quote.bin"),
        ("trustee_tdx_hcl-report.bin", "trustee_tdx_quote.bin"),
    ],
)
def test_real_quotes_hold_under_the_key_of_their_report_only(report: str, quote: str) -> None:
    key = parse_hcl_report((AZURE / report).read_bytes()).claims.attestation_key
    signature, message, pcrs = _bincode((AZURE / quote).read_bytes())
    claims = tpm2.authenticate_quote(message, signature, key, pcrs)
    assert claims.report_data == b"challenge"
    # The third machine's report is of another boot than its quote.
    other = parse_hcl_report((AZURE / "kinvolk_hcl-report-snp.bin").read_bytes())
    with pytest.raises(Unauthentic):
        tpm2.authenticate_quote(message, signature, other.claims.attestation_key, pcrs)


def test_nothing_here_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert azure(GUEST.evidence()).scheme == "azure_vtpm"
