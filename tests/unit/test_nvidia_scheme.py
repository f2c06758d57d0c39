"""`rats.schemes.nvidia_gpu` and its policy: what is believed, what is not, and what is wrong."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.config import Policy
from appliance.errors import EvidenceError, Malformed, Stale, Unauthentic, Unbound
from appliance.rats import chain
from appliance.rats.policy.nvidia_gpu import appraise_gpu, appraise_switch
from appliance.rats.result import AttestationResult, Tier
from appliance.rats.schemes.nvidia_gpu import (
    AuthenticatedRim,
    ChainCache,
    NvidiaGpuClaims,
    authenticate,
    authenticate_chain,
    authenticate_rim,
    authenticate_rim_even_if_expired,
    compare,
)
from appliance.wire.canonical import canonical_json
from appliance.wire.evidence import GpuEvidence
from appliance.wire.nvidia_gpu import SwitchIdentity
from appliance.wire.rim import parse_rim
from tests.fakes import nvidia_evidence as fake
from tests.fakes.nvidia_evidence import AT, GOOD, NONCE, Report
from tests.vectors_dir import VECTORS, needs_vectors

NVIDIA = VECTORS / "nvidia"
ROOT = Path(__file__).resolve().parents[2]
ANCHORS = ROOT / "appliance" / "rats" / "anchors"
NOW = datetime.datetime(2026, 11, 23, 12, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
GPU = fake.hopper()


def pinned(name: str) -> tuple[x509.Certificate, ...]:
    return (x509.load_pem_x509_certificate((ANCHORS / name).read_bytes()),)


DEVICE_ROOT = pinned("nvidia_device_identity_ca.pem")
RIM_ROOT = pinned("nvidia_corim_signing_root_ca.pem")


# --- what a device of our own says -----------------------------------------------------------


def believe(
    evidence: GpuEvidence | None = None, *, nonce: bytes | None = NONCE, gpu: fake.Device = GPU
) -> NvidiaGpuClaims:
    return authenticate(evidence or gpu.evidence(), root=gpu.roots, at=AT, nonce=nonce)


def reporting(**changed: bytes | None) -> NvidiaGpuClaims:
    """Claims of a report whose fields are changed so."""
    opaque = fake.encode_fields(fake.gpu_fields(**changed))
    return believe(GPU.evidence(GPU.sign(fake.encode_report(Report(opaque=opaque)))))


def rims(*documents: bytes) -> list[AuthenticatedRim]:
    return [authenticate_rim(one, root=fake.rim_authority().roots, at=AT) for one in documents]


def verdict(
    claims: NvidiaGpuClaims, *documents: bytes, policy: Policy | None = None
) -> AttestationResult:
    return appraise_gpu(claims, rims(*documents), policy or Policy())


def checks(result: AttestationResult) -> list[str]:
    return [one.check for one in result.findings]


def test_a_good_report_with_its_reference_values_is_affirmed_without_findings() -> None:
    result = verdict(believe(), fake.driver_rim(), fake.vbios_rim())
    assert (result.verdict, result.findings) == (Tier.AFFIRMING, ())


def test_claims_name_the_device_by_the_certificate_above_the_leaf() -> None:
    claims = believe()
    assert claims.device_certificate_sha256 == chain.sha256_of(GPU.device.certificate)
    assert claims.ueid == str(GPU.leaf.certificate.serial_number)
    assert (claims.chip, claims.hwmodel) == ("GH100", "GH100 A01 GSP BROM")
    assert (claims.feature, claims.driver_version) == ("SPT", fake.DRIVER)
    assert claims.fwid == fake.FWID
    assert claims.measurements == GOOD
    assert claims.path[-1] == GPU.root.certificate


def test_claims_are_json_that_has_a_canonical_form() -> None:
    document = json.loads(canonical_json(believe().to_json()))
    assert document["scheme"] == "nvidia_gpu"
    assert document["nonce"] == NONCE.hex()
    assert document["measurements"]["35"] == GOOD[35].hex()
    assert document["rim_ids"][0] == f"NV_GPU_DRIVER_GH100_{fake.DRIVER}"
    assert document["opaque"]["board_id"] == "08050000"


def test_another_nonce_is_stale_and_none_leaves_it_to_the_caller() -> None:
    with pytest.raises(Stale, match="nonce"):
        believe(nonce=bytes(32))
    with pytest.raises(Stale):
        believe(nonce=NONCE[:-1])
    assert believe(nonce=None).nonce == NONCE


def test_a_signature_by_another_key_is_not_believed() -> None:
    unsigned = fake.encode_report()
    for key in (GPU.device.key, fake.key_of("stranger")):
        with pytest.raises(Unauthentic, match="signature"):
            believe(GPU.evidence(unsigned + fake.sign(key, unsigned)))
    for signature in (bytes(96), b"\xff" * 96, bytes(48) + b"\1" * 48):
        with pytest.raises(Unauthentic, match="signature"):
            believe(GPU.evidence(unsigned + signature))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_bit_never_authenticates(data: st.DataObject) -> None:
    report = GPU.evidence().report
    bit = data.draw(st.integers(0, 8 * len(report) - 1))
    flipped = bytearray(report)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises((Malformed, EvidenceError)):
        believe(GPU.evidence(bytes(flipped)), nonce=None)


def test_no_truncated_report_authenticates() -> None:
    report = GPU.evidence().report
    for length in range(0, len(report), 7):
        with pytest.raises(Malformed):
            believe(GPU.evidence(report[:length]))


def test_another_root_of_the_same_name_is_not_trusted() -> None:
    stranger = fake.make_device()
    foreign = ec.generate_private_key(ec.SECP384R1())
    forged_root = fake.issue("device root", None, key=foreign)
    with pytest.raises(Unauthentic):
        authenticate(GPU.evidence(), root=(forged_root.certificate,), at=AT, nonce=NONCE)
    with pytest.raises(Unauthentic, match="pinned"):
        authenticate(GPU.evidence(), root=(), at=AT, nonce=NONCE)
    # The chain's own copy may say nothing of its own, not even where it is not needed.
    reissued = fake.issue("device root", None, until=fake.UNTIL + datetime.timedelta(days=9))
    assert reissued.certificate.public_key() == GPU.root.certificate.public_key()
    for copy in (forged_root, reissued):
        pem = GPU.pem.replace(GPU.root.pem, copy.pem)
        with pytest.raises(Unauthentic, match="another one"):
            believe(GPU.evidence(pem=pem))
    without = GPU.pem.replace(GPU.root.pem, b"")
    assert believe(GPU.evidence(pem=without)).path[-1] == GPU.root.certificate
    assert stranger.device.certificate != GPU.device.certificate


def test_a_whole_chain_under_a_root_of_ones_own_is_not_trusted() -> None:
    def forged(name: str, issuer: fake.Issued | None, *, ca: bool = True) -> fake.Issued:
        return fake.issue(name, issuer, ca=ca, key=ec.generate_private_key(ec.SECP384R1()))

    root = forged("device root", None)
    intermediate = forged("provisioner", root)
    device = forged("GH100 A01 GSP BROM", intermediate)
    gpu = fake.Device(root, intermediate, device, forged("leaf", device, ca=False))
    with pytest.raises(Unauthentic):
        authenticate(gpu.evidence(), root=GPU.roots, at=AT, nonce=NONCE)


def test_certificates_that_do_not_chain_are_refused() -> None:
    parts = [one.pem for one in (GPU.leaf, GPU.device, GPU.intermediate, GPU.root)]
    shuffled = (
        parts[1:],
        [parts[0], *parts[2:]],
        [parts[1], parts[0], *parts[2:]],
        [parts[0], parts[0], *parts[1:]],
        [parts[0], parts[2], parts[1], parts[3]],
        [parts[3]],
        [fake.issue("leaf", GPU.leaf, ca=False).pem, *parts],
    )
    for certificates in shuffled:
        with pytest.raises((Unauthentic, Unbound)):
            believe(GPU.evidence(pem=b"".join(certificates)))


def test_a_leaf_of_another_device_is_not_the_signer() -> None:
    other = fake.make_device(leaf_key=fake.key_of("other leaf"))
    with pytest.raises(Unauthentic, match="signature"):
        believe(GPU.evidence(pem=GPU.pem.replace(GPU.leaf.pem, other.leaf.pem)))


def test_a_leaf_right_below_the_root_is_no_devices() -> None:
    leaf = fake.issue("leaf", GPU.root, ca=False)
    with pytest.raises(Unauthentic, match="above the leaf"):
        authenticate_chain(leaf.pem, root=GPU.roots, at=AT)


def test_a_device_is_named_after_its_chip() -> None:
    for name in ("nobody", "GH100A01", "../GH100", "gh100 A01"):
        gpu = fake.make_device(name)
        with pytest.raises(Unauthentic, match="chip"):
            believe(gpu.evidence(), gpu=gpu)


def test_keys_that_are_not_p384_or_may_not_sign_are_refused() -> None:
    p256 = fake.issue("leaf", GPU.device, ca=False, key=fake.key_of("p256", ec.SECP256R1))
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=True,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    agreeing = fake.issue("leaf", GPU.device, ca=False, extensions=((usage, True),))
    for leaf, why in ((p256, "P-384"), (agreeing, "may sign")):
        with pytest.raises(Unauthentic, match=why):
            believe(GPU.evidence(pem=GPU.pem.replace(GPU.leaf.pem, leaf.pem)))


def test_a_chain_outside_its_time_is_stale() -> None:
    for at in (fake.SINCE - DAY, fake.UNTIL + DAY):
        with pytest.raises(Stale, match="valid from"):
            authenticate(GPU.evidence(), root=GPU.roots, at=at, nonce=NONCE)


def test_huge_chains_are_refused_at_once() -> None:
    body = base64.encodebytes(bytes(75 << 20))
    begin, end = b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n"
    for pem in (
        begin + body + end,
        GPU.leaf.pem * 10_000,
        begin * 10_000,
        GPU.pem + b" " * (100 << 20),
        b"",
        b"no certificate",
        begin + b"AAAA\n" + end,
    ):
        started = time.perf_counter()
        with pytest.raises(Malformed):
            believe(GPU.evidence(pem=pem))
        assert time.perf_counter() - started < 1


def test_firmware_that_is_not_the_certificates_is_unbound() -> None:
    with pytest.raises(Unbound, match="firmware"):
        reporting(fwid=bytes(48))
    with pytest.raises(Unbound, match="none"):
        plain = fake.make_device()
        plain.leaf = fake.issue("leaf", plain.device, ca=False)
        believe(plain.evidence(), gpu=plain)


def test_a_driver_that_does_not_send_the_firmwares_digest_is_still_believed() -> None:
    assert reporting(fwid=None).fwid == fake.FWID


def test_blackwells_certificates_have_the_digest_elsewhere() -> None:
    extension = fake.dice_extension(fake.dice_tcb_info(fake.FWID, bytes(48)), fake.DICE_TCB_INFO)
    gpu = fake.make_device("GB100 A01 GSP BROM", dice=extension)
    claims = believe(gpu.evidence(), gpu=gpu)
    assert (claims.chip, claims.fwid) == ("GB100", fake.FWID)
    second = fake.dice_extension(fake.dice_tcb_info(bytes(48), fake.FWID), fake.DICE_TCB_INFO)
    other = fake.make_device("GB100 A01 GSP BROM", dice=second)
    with pytest.raises(Unbound):
        believe(other.evidence(), gpu=other)


def test_a_digest_that_only_stands_somewhere_in_the_extension_does_not_bind() -> None:
    hidden = fake.der(0x30, fake.der(0x81, fake.FWID), fake.der(0xA6, fake.der_fwid(bytes(48))))
    gpu = fake.make_device(dice=fake.dice_extension(hidden))
    with pytest.raises(Unbound):
        believe(gpu.evidence(), gpu=gpu)


def test_opaque_data_of_cuda_13_5_is_refused_by_name() -> None:
    report = fake.encode_report(Report(opaque=b"NVDAOD\0\0\2\0\0\0"))
    with pytest.raises(Malformed, match="NVDAOD"):
        believe(GPU.evidence(GPU.sign(report)))


# --- the cache of chains ---------------------------------------------------------------------


def test_a_cached_chain_answers_as_the_chain_itself_and_is_checked_for_time_again() -> None:
    chains = ChainCache()
    first = chains.authenticate(GPU.pem, root=GPU.roots, at=AT)
    assert chains.authenticate(GPU.pem, root=GPU.roots, at=AT + DAY) is first
    with pytest.raises(Stale):
        chains.authenticate(GPU.pem, root=GPU.roots, at=fake.UNTIL + DAY)
    claims = authenticate(GPU.evidence(), root=GPU.roots, at=AT, nonce=NONCE, chains=chains)
    assert claims == believe()


def test_a_cached_chain_is_no_chain_to_another_root() -> None:
    chains = ChainCache()
    chains.authenticate(GPU.pem, root=GPU.roots, at=AT)
    forged_root = fake.issue("device root", None, key=ec.generate_private_key(ec.SECP384R1()))
    for roots in ((), (forged_root.certificate,)):
        with pytest.raises(Unauthentic):
            chains.authenticate(GPU.pem, root=roots, at=AT)


def test_the_cache_is_bounded_and_keeps_nothing_that_failed() -> None:
    chains = ChainCache(capacity=2)
    for padding in (b"", b"\n", b"\n\n", b""):
        chains.authenticate(GPU.pem + padding, root=GPU.roots, at=AT)
    assert len(chains) == 2
    with pytest.raises(Unauthentic):
        chains.authenticate(GPU.device.pem + GPU.leaf.pem, root=GPU.roots, at=AT)
    assert len(chains) == 2


def test_a_cached_chain_does_not_excuse_a_bad_signature() -> None:
    chains = ChainCache()
    chains.authenticate(GPU.pem, root=GPU.roots, at=AT)
    unsigned = fake.encode_report()
    evidence = GPU.evidence(unsigned + fake.sign(fake.key_of("stranger"), unsigned))
    with pytest.raises(Unauthentic):
        authenticate(evidence, root=GPU.roots, at=AT, nonce=NONCE, chains=chains)


# --- reference values ------------------------------------------------------------------------


def test_an_altered_manifest_is_unauthentic_and_an_altered_measurement_contraindicated() -> None:
    document = fake.driver_rim()
    good = GOOD[20].hex().encode()
    digit = b"0" if good[:1] != b"0" else b"1"
    with pytest.raises(Unauthentic, match="not the one that was signed"):
        rims(document.replace(good, digit + good[1:]))
    result = verdict(believe(), fake.driver_rim(i20=bytes(48)), fake.vbios_rim())
    assert (result.verdict, checks(result)) == (Tier.CONTRAINDICATED, ["nvidia_gpu.measurement"])
    assert "index 20" in result.findings[0].expected


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_altered_manifest_says_anything_else(data: st.DataObject) -> None:
    document = fake.driver_rim()
    genuine = parse_rim(document).rim
    at = data.draw(st.integers(0, len(document) - 1))
    changed = bytearray(document)
    changed[at] = data.draw(st.integers(32, 126).filter(lambda byte: byte != document[at]))
    try:
        (believed,) = rims(bytes(changed))
    except (Malformed, EvidenceError):
        return
    # White space in base64 or inside the signature may change; nothing it says may.
    assert believed.rim == genuine


def test_a_forged_payload_cannot_be_wrapped_around_a_genuine_signature() -> None:
    genuine = fake.driver_rim().decode()
    start = genuine.index("<ds:Signature ")
    signature = genuine[start : genuine.index("</SoftwareIdentity>")]
    forged = fake.encode_swid(fake.DRIVER, [fake.encode_resource(20, bytes(48))])
    head = forged.removesuffix("</SoftwareIdentity>")
    inner = genuine.replace(signature, "")
    attempts = (
        # the signature of one over another
        f"{head}{signature}</SoftwareIdentity>",
        # the genuine document inside the forged one, beside the signature or in it
        f"{head}<ns0:Link>{inner}</ns0:Link>{signature}</SoftwareIdentity>",
        f"{head}<ns0:Link>{genuine}</ns0:Link></SoftwareIdentity>",
        head
        + signature.replace("</ds:KeyInfo>", f"</ds:KeyInfo><ds:Object>{inner}</ds:Object>")
        + "</SoftwareIdentity>",
        # a second payload, before, after, or within the signature
        genuine.replace("<ns0:Payload>", "<ns0:Payload></ns0:Payload><ns0:Payload>"),
        genuine.replace("</ds:KeyInfo>", "</ds:KeyInfo><ns0:Payload></ns0:Payload>"),
        genuine.replace("<ds:X509Data>", "<ds:X509Data><ns0:Payload></ns0:Payload>"),
        # the reference to a part
        genuine.replace('URI=""', 'URI="#genuine"').replace("<ns0:Payload", '<ns0:Payload Id="x"'),
        # two signatures
        genuine.replace(signature, signature + signature),
        # a namespace that means something else further in
        genuine.replace("<ns0:Payload>", '<ns0:Payload xmlns:ns2="urn:other">'),
    )
    for attempt in attempts:
        with pytest.raises((Malformed, Unauthentic)):
            rims(attempt.encode())


def test_a_manifest_under_another_root_or_by_a_key_that_may_not_is_unauthentic() -> None:
    swid = fake.encode_swid(fake.DRIVER, [fake.encode_resource(20, GOOD[20])])
    foreign = fake.make_rim_authority()
    foreign.root = fake.issue("rim root", None, key=ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(Unauthentic):
        authenticate_rim(fake.rim_authority().sign(swid), root=foreign.roots, at=AT)
    with pytest.raises(Unauthentic, match="pinned"):
        authenticate_rim(fake.rim_authority().sign(swid), root=GPU.roots, at=AT)
    p256 = fake.make_rim_authority(key=fake.key_of("p256 signer", ec.SECP256R1))
    with pytest.raises((Unauthentic, Malformed)):
        authenticate_rim(p256.sign(swid), root=p256.roots, at=AT)


def test_an_expired_signer_is_told_apart_and_left_to_the_policy() -> None:
    authority = fake.make_rim_authority(until=AT - DAY)
    document = authority.sign(
        fake.encode_swid(
            fake.DRIVER, [fake.encode_resource(one, GOOD[one]) for one in fake.DRIVER_INDICES]
        )
    )
    with pytest.raises(Stale, match="valid until"):
        authenticate_rim(document, root=authority.roots, at=AT)
    expired = authenticate_rim_even_if_expired(document, root=authority.roots, at=AT)
    assert expired.valid_until == AT - DAY
    both = [expired, *rims(fake.vbios_rim())]
    for word, tier in (("refuse", Tier.CONTRAINDICATED), ("warn", Tier.WARNING)):
        result = appraise_gpu(believe(), both, Policy(expired_rims=word))  # type: ignore[arg-type]
        assert (result.verdict, checks(result)) == (tier, ["nvidia_gpu.rim_expired"])
    # Forgiven is the time alone.
    digest = GOOD[20].hex().encode()
    with pytest.raises(Unauthentic):
        authenticate_rim_even_if_expired(
            document.replace(digest, digest[::-1]), root=authority.roots, at=AT
        )


def test_a_signer_that_is_not_valid_yet_is_stale_in_any_case() -> None:
    authority = fake.make_rim_authority(since=AT + DAY)
    document = authority.sign(fake.encode_swid(fake.DRIVER, [fake.encode_resource(1, GOOD[1])]))
    for check in (authenticate_rim, authenticate_rim_even_if_expired):
        with pytest.raises(Stale):
            check(document, root=authority.roots, at=AT)


def test_reference_values_remembered_from_later_are_not_forgiven() -> None:
    remembered = rims(fake.driver_rim(), fake.vbios_rim())
    claims = dataclasses.replace(believe(), at=fake.SINCE - DAY)
    result = appraise_gpu(claims, remembered, Policy(expired_rims="warn"))
    assert result.verdict is Tier.CONTRAINDICATED
    assert checks(result) == ["nvidia_gpu.rim_not_yet_valid"] * 2


def test_reference_values_for_another_chip_of_the_same_version_are_at_best_a_warning() -> None:
    resources = [fake.encode_resource(one, GOOD[one]) for one in fake.DRIVER_INDICES]
    other = fake.rim_authority().sign(fake.encode_swid(fake.DRIVER, resources, product="GB100"))
    result = verdict(believe(), other, fake.vbios_rim())
    assert (result.verdict, checks(result)) == (Tier.WARNING, ["nvidia_gpu.rim_product"])


def test_without_reference_values_the_best_is_a_warning_that_names_them() -> None:
    result = verdict(believe())
    assert (result.verdict, checks(result)) == (Tier.WARNING, ["nvidia_gpu.reference_values"])
    assert "authentic, not compared" in result.findings[0].got
    for rim_id in ("NV_GPU_DRIVER_GH100_595.71.05", "NV_GPU_VBIOS_1010_0210_886_96009F0004"):
        assert rim_id in result.findings[0].expected


@pytest.mark.parametrize(
    ("given_rim", "missing"),
    [
        (fake.driver_rim(), "NV_GPU_VBIOS_1010_0210_886_96009F0004"),
        (fake.vbios_rim(), "NV_GPU_DRIVER_GH100_595.71.05"),
    ],
)
def test_half_of_the_reference_values_is_a_warning_that_names_the_other_half(
    given_rim: bytes, missing: str
) -> None:
    result = verdict(believe(), given_rim)
    assert (result.verdict, checks(result)) == (Tier.WARNING, ["nvidia_gpu.rim_missing"])
    assert result.findings[0].expected == missing


def test_reference_values_for_something_else_are_contraindicated() -> None:
    other = fake.rim_authority().sign(
        fake.encode_swid("595.71.06", [fake.encode_resource(20, GOOD[20])])
    )
    result = verdict(believe(), fake.driver_rim(), fake.vbios_rim(), other)
    assert (result.verdict, checks(result)) == (Tier.CONTRAINDICATED, ["nvidia_gpu.rim_version"])
    alone = verdict(believe(), other)
    assert alone.verdict is Tier.CONTRAINDICATED
    assert checks(alone).count("nvidia_gpu.rim_missing") == 2


def test_a_measurement_that_is_missing_does_not_match() -> None:
    partial = {index: value for index, value in GOOD.items() if index != 20}
    report = GPU.sign(fake.encode_report(Report(measurements=partial)))
    result = verdict(believe(GPU.evidence(report)), fake.driver_rim(), fake.vbios_rim())
    assert (result.verdict, checks(result)) == (Tier.CONTRAINDICATED, ["nvidia_gpu.measurement"])
    assert result.findings[0].got == "no such measurement"


def test_any_alternative_is_good() -> None:
    resources = [fake.encode_resource(20, bytes(48), GOOD[20], bytes(48))]
    rim = fake.rim_authority().sign(fake.encode_swid(fake.DRIVER, resources))
    assert verdict(believe(), rim, fake.vbios_rim()).verdict is Tier.AFFIRMING


def test_index_35_is_skipped_exactly_when_the_decoder_is_reported_off() -> None:
    rim = fake.driver_rim(i35=bytes(48))
    assert verdict(believe(), rim, fake.vbios_rim()).verdict is Tier.AFFIRMING
    for status in (b"\xaa", b"\x00", b"\x55\x00", b"", None):
        result = verdict(reporting(nvdec0_status=status), rim, fake.vbios_rim())
        assert checks(result) == ["nvidia_gpu.measurement"]
        assert "index 35" in result.findings[0].expected


def test_no_index_may_be_claimed_by_driver_and_vbios_both() -> None:
    overlapping = fake.rim_authority().sign(
        fake.encode_swid(fake.VBIOS, [fake.encode_resource(20, GOOD[20])])
    )
    result = verdict(believe(), fake.driver_rim(), overlapping)
    assert (result.verdict, checks(result)) == (Tier.CONTRAINDICATED, ["nvidia_gpu.rim_conflict"])


def test_of_two_manifests_for_one_version_the_chips_own_counts_and_two_differing_conflict() -> None:
    def rim(product: str, digest: bytes) -> bytes:
        resources = [fake.encode_resource(20, digest)]
        return fake.rim_authority().sign(fake.encode_swid(fake.DRIVER, resources, product=product))

    vbios = fake.vbios_rim()
    both = verdict(believe(), rim("GB100", bytes(48)), rim("GH100", GOOD[20]), vbios)
    assert both.verdict is Tier.AFFIRMING
    twice = verdict(believe(), rim("GH100", GOOD[20]), rim("GH100", GOOD[20]), vbios)
    assert twice.verdict is Tier.AFFIRMING
    differing = verdict(believe(), rim("GH100", bytes(48)), rim("GH100", GOOD[20]), vbios)
    assert checks(differing) == ["nvidia_gpu.rim_conflict"]


def test_a_manifest_that_measures_nothing_compares_nothing() -> None:
    empty = fake.rim_authority().sign(
        fake.encode_swid(fake.DRIVER, [fake.encode_resource(20, GOOD[20], active="False")])
    )
    result = verdict(believe(), empty, fake.vbios_rim())
    assert (result.verdict, checks(result)) == (Tier.WARNING, ["nvidia_gpu.reference_values"])


# --- policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "check"),
    [
        (Policy(gpu_architectures=("GB100",)), "nvidia_gpu.architecture"),
        (Policy(gpu_architectures=()), "nvidia_gpu.architecture"),
        (Policy(gpu_drivers=("580.00",)), "nvidia_gpu.driver"),
        (Policy(gpu_vbios=("96.00.9F.00.05",)), "nvidia_gpu.vbios"),
    ],
)
def test_what_the_policy_does_not_name_is_contraindicated(policy: Policy, check: str) -> None:
    result = verdict(believe(), fake.driver_rim(), fake.vbios_rim(), policy=policy)
    assert (result.verdict, checks(result)) == (Tier.CONTRAINDICATED, [check])


def test_exact_versions_that_the_policy_names_are_affirmed() -> None:
    policy = Policy(gpu_drivers=("1", fake.DRIVER), gpu_vbios=("96.00.9f.00.04",))
    result = verdict(believe(), fake.driver_rim(), fake.vbios_rim(), policy=policy)
    assert result.verdict is Tier.AFFIRMING


@pytest.mark.parametrize(
    ("changed", "tier", "feature"),
    [
        ({"feature_flag": b"\0\0"}, Tier.AFFIRMING, "SPT"),
        ({"feature_flag": b"\1\0"}, Tier.AFFIRMING, "MPT"),
        ({"feature_flag": b"\2\0"}, Tier.WARNING, "PPCIE"),
        ({"feature_flag": b"\3\0"}, Tier.CONTRAINDICATED, "3"),
        ({"feature_flag": None}, Tier.AFFIRMING, None),
        ({"feature_flag": None, "protected_pcie_status": b"\xaa"}, Tier.WARNING, "PPCIE"),
    ],
)
def test_how_the_gpu_is_passed_through_is_judged(
    changed: dict[str, bytes | None], tier: Tier, feature: str | None
) -> None:
    claims = reporting(**changed)
    assert claims.feature == feature
    assert verdict(claims, fake.driver_rim(), fake.vbios_rim()).verdict is tier


def test_simulated_evidence_is_a_warning_where_it_is_asked_for_and_refused_elsewhere() -> None:
    genuine = GPU.evidence()
    simulated = GpuEvidence("simulated", genuine.report, genuine.certificate_chain)
    claims = believe(simulated)
    documents = fake.driver_rim(), fake.vbios_rim()
    assert claims.scheme == "simulated"
    assert checks(verdict(claims, *documents)) == ["nvidia_gpu.simulated"]
    assert verdict(claims, *documents).verdict is Tier.CONTRAINDICATED
    accepting = Policy(gpus="unsafe_simulated")
    assert verdict(claims, *documents, policy=accepting).verdict is Tier.WARNING


def test_a_switch_is_a_switch_and_never_a_gpu() -> None:
    fields = fake.encode_fields([(6, b"96.10.55.00.01"), (22, bytes(range(8)))])
    device = fake.make_device("LS_10 A01 FSP BROM")
    report = device.sign(fake.encode_report(Report(opaque=fields)))
    claims = believe(device.evidence(report), gpu=device)
    assert isinstance(claims.identity, SwitchIdentity)
    assert (claims.chip, claims.driver_version, claims.feature) == ("LS10", None, None)
    resources = [fake.encode_resource(one, GOOD[one]) for one in range(31)]
    swid = fake.encode_swid("96.10.55.00.01", resources, product="LS10", edition="SWITCH")
    rim = rims(fake.rim_authority().sign(swid))
    assert appraise_switch(claims, rim, Policy()).findings == ()
    policy = Policy(gpu_architectures=("GH100", "LS10"))
    assert checks(appraise_gpu(claims, rim, policy)) == ["nvidia_gpu.architecture"]
    assert "nvidia_gpu.architecture" in checks(appraise_switch(believe(), [], Policy()))


# --- NVIDIA's own ----------------------------------------------------------------------------

H100 = NVIDIA / "h100_595.71.05"
UNIT = NVIDIA / "nvat_unit"
UNIT_CHAINS = {
    "blackwellAttestationReport.txt": "blackwellCertChain.txt",
    "hopperAttestationReport.txt": "hopperCertChain.txt",
    "hopperAttestationReportExpired.txt": "hopperCertChainExpired.txt",
    "hopperAttestationReportInvalidSignature.txt": "hopperCertChain.txt",
    "hopper_580.159.03_report.txt": "hopper_580.159.03_chain.txt",
    "switchAttestationReport.txt": "switchCertChain.txt",
    "wheel_550.90.07_report.txt": "wheel_550.90.07_chain.txt",
}


def h100() -> GpuEvidence:
    report, pem = (H100 / "report.bin").read_bytes(), (H100 / "chain.pem").read_bytes()
    return GpuEvidence("nvidia_gpu", report, pem)


def unit(name: str) -> GpuEvidence:
    report = bytes.fromhex((UNIT / name).read_text())
    return GpuEvidence("nvidia_gpu", report, (UNIT / UNIT_CHAINS[name]).read_bytes())


def exchanged(name: str) -> Iterator[tuple[GpuEvidence, bytes]]:
    document = json.loads((NVIDIA / name).read_text())
    for one in document if isinstance(document, list) else [document]:
        report, pem = (base64.b64decode(one[key]) for key in ("evidence", "certificate"))
        yield GpuEvidence("nvidia_gpu", report, pem), bytes.fromhex(one["nonce"])


def genuine(evidence: GpuEvidence, nonce: bytes | None = None) -> NvidiaGpuClaims:
    return authenticate(evidence, root=DEVICE_ROOT, at=NOW, nonce=nonce)


def nvidia_rim(path: str) -> AuthenticatedRim:
    document = (NVIDIA / path).read_bytes()
    return authenticate_rim_even_if_expired(document, root=RIM_ROOT, at=NOW)


def h100_rims() -> list[AuthenticatedRim]:
    return [
        authenticate_rim((H100 / name).read_bytes(), root=RIM_ROOT, at=NOW)
        for name in (
            "NV_GPU_DRIVER_GH100_595.71.05.xml",
            "NV_GPU_VBIOS_1010_0210_886_96009F0004.xml",
        )
    ]


@needs_vectors
def test_an_h100_with_nvidias_reference_values_is_affirmed_without_findings() -> None:
    nonce = bytes.fromhex((H100 / "nonce.hex").read_text().strip())
    claims = genuine(h100(), nonce)
    result = appraise_gpu(claims, h100_rims(), Policy())
    assert (result.verdict, result.findings) == (Tier.AFFIRMING, ())
    assert (claims.chip, claims.driver_version) == ("GH100", "595.71.05")
    assert (claims.vbios_version, claims.feature) == ("96.00.9F.00.04", "SPT")
    assert [one.rim_id for one in claims.rims_wanted] == [
        "NV_GPU_DRIVER_GH100_595.71.05",
        "NV_GPU_VBIOS_1010_0210_886_96009F0004",
    ]
    canonical_json(result.to_json())


def accepted(variants: Iterable[tuple[int, bytes]], judge: Callable[[bytes], object]) -> list[int]:
    """Where a file was changed without anything being said about it."""
    found = []
    for place, data in variants:
        try:
            judge(data)
        except (Malformed, EvidenceError):
            continue
        found.append(place)
    return found


def flips(data: bytes, places: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """With one bit of each of these bytes flipped; which one is drawn."""
    rng = random.Random(len(data))
    for place in places:
        yield place, data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def cuts(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Cut off before each of its bytes."""
    return ((place, data[:place]) for place in range(len(data)))


def believe_h100(chain: bytes) -> NvidiaGpuClaims:
    evidence = GpuEvidence("nvidia_gpu", h100().report, chain)
    return authenticate(evidence, root=DEVICE_ROOT, at=NOW, nonce=None)


@needs_vectors
@pytest.mark.filterwarnings("ignore:Attribute's length", "ignore:Parsed a serial number")
def test_no_byte_of_an_h100s_chain_may_be_changed_or_missing() -> None:
    chain_pem = h100().certificate_chain
    assert accepted(flips(chain_pem, range(len(chain_pem))), believe_h100) == []
    # The root may be left out, which is pinned, and so may a last line's end: four certificates
    # with and without it, five without.
    below = chain_pem.rindex(b"-----BEGIN")
    assert accepted(cuts(chain_pem), believe_h100) == [below - 1, below, len(chain_pem) - 1]


@needs_vectors
@pytest.mark.filterwarnings("ignore:Attribute's length", "ignore:Parsed a serial number")
def test_no_byte_of_a_manifest_may_be_changed_or_missing() -> None:
    document = (H100 / "NV_GPU_DRIVER_GH100_595.71.05.xml").read_bytes()

    def judge(changed: bytes) -> None:
        authenticate_rim_even_if_expired(changed, root=RIM_ROOT, at=NOW)

    # All of what the signature does not cover, and some of what it covers.
    unsigned = document.index(b"</ds:SignedInfo>")
    places = [*range(0, unsigned, 41), *range(unsigned, len(document))]
    assert accepted(flips(document, places), judge) == []
    # White space behind the root element is outside of every canonical form.
    assert document.endswith(b">\n")
    assert accepted(list(cuts(document))[unsigned::7], judge) == []
    assert accepted(list(cuts(document))[-40:], judge) == [len(document) - 1]


@needs_vectors
def test_an_h100s_flipped_bits_truncations_and_other_nonces_are_refused() -> None:
    evidence, chance = h100(), random.Random(595)
    chains = ChainCache()
    report = evidence.report
    for bit in [*range(8 * 48), *chance.sample(range(8 * len(report)), 400)]:
        flipped = bytearray(report)
        flipped[bit // 8] ^= 1 << bit % 8
        changed = GpuEvidence("nvidia_gpu", bytes(flipped), evidence.certificate_chain)
        with pytest.raises((Malformed, EvidenceError)):
            authenticate(changed, root=DEVICE_ROOT, at=NOW, nonce=None, chains=chains)
    for length in range(0, len(report), 41):
        with pytest.raises(Malformed):
            genuine(GpuEvidence("nvidia_gpu", report[:length], evidence.certificate_chain))
    with pytest.raises(Stale):
        genuine(evidence, bytes(32))


@needs_vectors
def test_one_changed_digit_in_nvidias_manifest_is_unauthentic() -> None:
    document = (H100 / "NV_GPU_DRIVER_GH100_595.71.05.xml").read_bytes()
    for index, values in parse_rim(document).rim.measurements.items():
        digest = values[0].hex().encode()
        changed = document.replace(digest, (b"1" if digest[:1] == b"0" else b"0") + digest[1:])
        with pytest.raises(Unauthentic):
            authenticate_rim(changed, root=RIM_ROOT, at=NOW)
        assert changed != document, index


@needs_vectors
@pytest.mark.parametrize(
    "name",
    ["hopper_evidence.json", "evidence_hopper_590_12.json", "hopper_evidence_cert_hold.json"],
)
def test_gpu_evidence_as_nvidias_tools_exchange_it_is_authentic(name: str) -> None:
    items = list(exchanged(name))
    assert items
    for evidence, nonce in items:
        claims = genuine(evidence, nonce)
        assert claims.chip == "GH100"
        result = appraise_gpu(claims, [], Policy())
        assert result.verdict is Tier.WARNING
        assert "nvidia_gpu.reference_values" in checks(result)


@needs_vectors
def test_an_nvswitch_with_its_reference_values_is_affirmed_without_findings() -> None:
    rim = nvidia_rim("rims/switchVBIOSRim_NV_SWITCH_BIOS_5612_0002_890_9610550001.xml")
    items = list(exchanged("switch_evidence_ls10.json"))
    assert items
    for evidence, nonce in items:
        claims = genuine(evidence, nonce)
        assert (claims.chip, claims.vbios_version) == ("LS10", "96.10.55.00.01")
        assert claims.rims_wanted[0].rim_id == "NV_SWITCH_BIOS_5612_0002_890_9610550001"
        result = appraise_switch(claims, [rim], Policy())
        assert (result.verdict, result.findings) == (Tier.AFFIRMING, ())


@needs_vectors
@pytest.mark.parametrize("name", sorted(UNIT_CHAINS))
def test_nvidias_sample_reports_are_authentic_but_for_the_one_made_wrong(name: str) -> None:
    if "InvalidSignature" in name:
        with pytest.raises(Unauthentic, match="signature"):
            genuine(unit(name))
        return
    claims = genuine(unit(name))
    chips = {"blackwellAttestationReport.txt": "GB100", "switchAttestationReport.txt": "LS10"}
    assert claims.chip == chips.get(name, "GH100")


@needs_vectors
def test_a_blackwell_is_refused_by_a_policy_for_hopper_and_by_no_other() -> None:
    claims = genuine(unit("blackwellAttestationReport.txt"))
    assert claims.driver_version == "575.32"
    assert "nvidia_gpu.architecture" in checks(appraise_gpu(claims, [], Policy()))
    accepting = Policy(gpu_architectures=("GB100",))
    assert checks(appraise_gpu(claims, [], accepting)) == ["nvidia_gpu.reference_values"]


@needs_vectors
@pytest.mark.parametrize(
    ("sample", "report", "member"),
    [
        ("hopperClaimsv3_decoded.json", "wheel_550.90.07_report.txt", "GPU-0"),
        ("switch_decoded.json", "switchAttestationReport.txt", "SWITCH-0"),
    ],
)
def test_identities_are_spelt_as_nvidias_service_spells_them(
    sample: str, report: str, member: str
) -> None:
    theirs = json.loads((UNIT / sample).read_text())[member]
    ours = genuine(unit(report)).to_json()
    assert ours["ueid"] == theirs["ueid"]
    assert ours["hwmodel"] == theirs["hwmodel"]
    versions = {value for name, value in theirs.items() if name.endswith("bios-version")}
    assert versions == {ours["vbios_version"]}


@needs_vectors
def test_nvidias_altered_manifests_are_unauthentic() -> None:
    for name in (
        "incorrect_signature_driver_rim.xml",
        "NV_GPU_DRIVER_GH100_535.86.09_measurement_mismatch.xml",
        "NV_SWITCH_BIOS_5612_0002_890_9610550001_measurement_mismatch.xml",
    ):
        with pytest.raises(Unauthentic):
            nvidia_rim(f"rims/{name}")


@needs_vectors
def test_nvidias_expired_manifests_are_stale_and_match_all_the_same() -> None:
    path = "rims/1010_0200_882_96005E0001_PROD.swidtag"
    with pytest.raises(Stale, match="2025-06-22"):
        authenticate_rim((NVIDIA / path).read_bytes(), root=RIM_ROOT, at=NOW)
    claims = genuine(unit("hopperAttestationReport.txt"))
    findings = compare(claims, [nvidia_rim(path)])
    assert [one.check for one in findings] == ["nvidia_gpu.rim_missing"]
    driver = (NVIDIA / "rims/NV_GPU_DRIVER_GH100_550.144.03.xml").read_bytes()
    for at in (NOW, datetime.datetime(2026, 12, 30, tzinfo=datetime.UTC)):
        authenticate_rim(driver, root=RIM_ROOT, at=at)
    with pytest.raises(Stale):
        authenticate_rim(
            driver, root=RIM_ROOT, at=datetime.datetime(2027, 1, 1, tzinfo=datetime.UTC)
        )


@needs_vectors
def test_a_genuine_mismatch_names_its_index() -> None:
    claims = genuine(unit("hopper_580.159.03_report.txt"))
    findings = compare(claims, [nvidia_rim("rims/1010_0205_862_9600740020_PROD.swidtag")])
    mismatches = [one for one in findings if one.check == "nvidia_gpu.measurement"]
    assert [one.expected.split(":")[0] for one in mismatches] == ["index 9 of vbios 96.00.74.00.20"]


@needs_vectors
def test_a_chain_of_one_gpu_does_not_vouch_for_the_report_of_another() -> None:
    pem = unit("hopper_580.159.03_report.txt").certificate_chain
    with pytest.raises(Unauthentic, match="signature"):
        genuine(GpuEvidence("nvidia_gpu", h100().report, pem))
    with pytest.raises(Unauthentic):
        authenticate(h100(), root=RIM_ROOT, at=NOW, nonce=None)


def test_the_pinned_roots_are_the_ones_that_were_looked_up() -> None:
    readme = (ANCHORS / "README.md").read_text()
    for (root,) in (DEVICE_ROOT, RIM_ROOT):
        assert chain.sha256_of(root) in readme
        root.verify_directly_issued_by(root)


def other_sources() -> list[Path]:
    packaged = ROOT.glob(".nvidia-sdk/lib/python*/site-packages/verifier/certs")
    return [NVIDIA / "roots", *packaged]


@pytest.mark.parametrize("folder", other_sources(), ids=lambda folder: folder.name)
def test_the_pinned_roots_are_nvidias(folder: Path) -> None:
    if not folder.is_dir():
        pytest.skip("NVIDIA's own copies of its roots are not here")
    for (root,), name in (
        (DEVICE_ROOT, "verifier_device_root.pem"),
        (RIM_ROOT, "verifier_RIM_root.pem"),
    ):
        assert x509.load_pem_x509_certificate((folder / name).read_bytes()) == root


@needs_vectors
def test_a_report_is_verified_in_time() -> None:
    """Bounds of design.md section 11, on the best of some runs: the machine does other things."""
    evidence, chains = h100(), ChainCache()
    document = (H100 / "NV_GPU_DRIVER_GH100_595.71.05.xml").read_bytes()

    def best_of(runs: int, name: str) -> float:
        times = []
        for _ in range(runs):
            started = time.perf_counter()
            if name == "rim":
                authenticate_rim(document, root=RIM_ROOT, at=NOW)
            else:
                kept = chains if name == "cached" else None
                authenticate(evidence, root=DEVICE_ROOT, at=NOW, nonce=None, chains=kept)
            times.append(time.perf_counter() - started)
        return min(times)

    assert best_of(10, "cold") < 0.010
    assert best_of(10, "cached") < 0.002
    assert best_of(10, "rim") < 0.015
