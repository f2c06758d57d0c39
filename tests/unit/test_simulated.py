"""Simulated hardware makes the vendors' real formats, and nothing of it is ever affirmed."""

from __future__ import annotations

import dataclasses
import datetime
import re

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.attester.provider import GpuInventory
from appliance.attester.simulated import nvidia, pki
from appliance.attester.simulated.faults import MEANING, Fault, parse_fault
from appliance.attester.simulated.provider import SimulatedCpu, SimulatedGpus
from appliance.config import Attestation
from appliance.endorsements.anchors import load_anchors, load_simulated_anchors
from appliance.errors import (
    ConfigError,
    DeviceFault,
    EvidenceError,
    Malformed,
    ProviderAbsent,
    Stale,
    Unauthentic,
)
from appliance.rats.model import Anchors
from appliance.rats.result import Tier, conclude
from appliance.rats.schemes import nvidia_gpu, sev_snp, simulated
from appliance.wire.evidence import CpuEvidence, GpuEvidence
from appliance.wire.nvidia_gpu import GpuIdentity, driver_rim_id, vbios_rim_id
from appliance.wire.rim import parse_rim
from appliance.wire.sev_snp import GuestPolicy
from tests.vectors_dir import VECTORS, needs_vectors

NOW = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)
NONCE = bytes(range(32))
REPORT_DATA = b"\x5a" * 32
H100 = VECTORS / "nvidia" / "h100_595.71.05"

REAL = load_anchors()
ANCHORS = load_simulated_anchors(REAL)


async def one_gpu(fault: Fault = Fault.NONE) -> GpuEvidence:
    (evidence,) = await SimulatedGpus(count=1, fault=fault).collect(NONCE)
    return evidence


async def cpu(fault: Fault = Fault.NONE) -> CpuEvidence:
    return await SimulatedCpu(fault=fault).collect(REPORT_DATA)


def authenticate_gpu(
    evidence: GpuEvidence, anchors: Anchors = ANCHORS
) -> nvidia_gpu.NvidiaGpuClaims:
    return simulated.authenticate_gpu(evidence, anchors=anchors, at=NOW, nonce=NONCE)


def authenticate_cpu(
    evidence: CpuEvidence, anchors: Anchors = ANCHORS
) -> simulated.SimulatedCpuClaims:
    return simulated.authenticate_cpu(evidence, anchors=anchors, at=NOW)


def rims_of(evidence: GpuEvidence) -> list[nvidia_gpu.AuthenticatedRim]:
    root = ANCHORS.simulated_nvidia_rim
    return [nvidia_gpu.authenticate_rim(one, root=root, at=NOW) for one in evidence.rims]


# ------------------------------------------------------------------------------------------ GPU


async def test_a_simulated_gpu_authenticates_under_the_test_root_and_matches_its_rims() -> None:
    evidence = await one_gpu()
    claims = authenticate_gpu(evidence)
    assert nvidia_gpu.compare(claims, rims_of(evidence)) == ()
    assert claims.scheme == "simulated"
    assert claims.nonce == NONCE
    assert claims.chip == "GH100"
    assert claims.fwid == nvidia.FWID
    assert claims.driver_version == nvidia.DRIVER_VERSION
    assert claims.vbios_version == nvidia.VBIOS_VERSION


async def test_the_rims_carry_the_names_that_the_report_asks_for() -> None:
    claims = authenticate_gpu(await one_gpu())
    asked = [one.rim_id for one in claims.rims_wanted]
    assert asked == [nvidia.DRIVER_RIM.name, nvidia.VBIOS_RIM.name]


async def test_simulated_evidence_never_authenticates_under_the_vendors_roots() -> None:
    evidence = await one_gpu()
    with pytest.raises(Unauthentic, match="pinned"):
        authenticate_gpu(evidence, REAL)
    with pytest.raises(Unauthentic, match="pinned"):
        nvidia_gpu.authenticate(evidence, root=REAL.nvidia_device, at=NOW, nonce=NONCE)
    with pytest.raises(Unauthentic, match="pinned"):
        nvidia_gpu.authenticate_rim(evidence.rims[0], root=REAL.nvidia_rim, at=NOW)
    quote = await cpu()
    with pytest.raises(Unauthentic):
        authenticate_cpu(quote, REAL)
    with pytest.raises(Unauthentic):
        sev_snp.authenticate(quote, roots=REAL.amd, at=NOW)


async def test_evidence_of_another_scheme_is_not_looked_at() -> None:
    renamed = dataclasses.replace(await one_gpu(), scheme="nvidia_gpu")
    with pytest.raises(Unauthentic, match="`simulated`, got `nvidia_gpu`"):
        authenticate_gpu(renamed)
    quote = dataclasses.replace(await cpu(), scheme="sev_snp")
    with pytest.raises(Unauthentic, match="`simulated`, got `sev_snp`"):
        authenticate_cpu(quote)


def test_a_result_with_the_finding_about_the_test_root_is_at_best_a_warning() -> None:
    assert conclude({}, [simulated.TEST_ROOT]).verdict is Tier.WARNING
    assert simulated.TEST_ROOT.check == "simulated.test_root"


async def test_each_gpu_has_a_device_key_of_its_own() -> None:
    found = await SimulatedGpus(count=3).collect(NONCE)
    claims = [authenticate_gpu(one) for one in found]
    assert len({one.device_certificate_sha256 for one in claims}) == 3
    assert len({one.ueid for one in claims}) == 3
    swapped = dataclasses.replace(found[0], certificate_chain=found[1].certificate_chain)
    with pytest.raises(Unauthentic):
        authenticate_gpu(swapped)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault.GPU_WRONG_NONCE, Stale),
        (Fault.GPU_SHORT_REPORT, Malformed),
        (Fault.GPU_GARBAGE, Malformed),
        (Fault.GPU_BAD_SIGNATURE, Unauthentic),
        (Fault.GPU_EXPIRED_CHAIN, Stale),
    ],
)
async def test_a_faulty_gpu_report_is_refused(fault: Fault, error: type[Exception]) -> None:
    with pytest.raises(error):
        authenticate_gpu(await one_gpu(fault))


async def test_a_measurement_that_differs_is_authentic_and_found() -> None:
    evidence = await one_gpu(Fault.GPU_MEASUREMENT_MISMATCH)
    (finding,) = nvidia_gpu.compare(authenticate_gpu(evidence), rims_of(evidence))
    assert finding.tier is Tier.CONTRAINDICATED
    assert str(nvidia.DRIVER_INDEXES[0]) in str(finding)


REPORT_BITS = 8 * 4129


@settings(max_examples=60, deadline=None)
@given(bit=st.integers(0, REPORT_BITS - 1))
def test_a_flipped_bit_of_a_simulated_report_never_authenticates(bit: int) -> None:
    report = bytearray(SHARED.report)
    report[bit // 8] ^= 1 << bit % 8
    with pytest.raises((EvidenceError, Malformed)):
        authenticate_gpu(dataclasses.replace(SHARED, report=bytes(report)))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_of_simulated_reference_values_never_authenticates(
    data: st.DataObject,
) -> None:
    document = bytearray(SHARED.rims[0])
    signed = document.index(b"<ds:KeyInfo>")  # beyond are certificates, which are not signed here
    document[data.draw(st.integers(0, signed - 1))] ^= 1
    with pytest.raises((EvidenceError, Malformed)):
        nvidia_gpu.authenticate_rim(bytes(document), root=ANCHORS.simulated_nvidia_rim, at=NOW)


def _shared() -> GpuEvidence:
    gpu = SimulatedGpus(count=1)
    (one,) = gpu._gpus
    return GpuEvidence("simulated", gpu._report(one, NONCE), one.chain, gpu._rims)


SHARED = _shared()


@needs_vectors
def test_a_simulated_report_has_the_shape_of_a_real_one() -> None:
    real = (H100 / "report.bin").read_bytes()
    assert len(SHARED.report) == len(real)
    # The request, the headers, every block's head and every opaque field's head: the same bytes.
    assert SHARED.report[:4] == real[:4]
    assert SHARED.report[36:45] == real[36:45]
    for block in range(nvidia.MEASUREMENTS):
        start = 45 + block * 55
        assert SHARED.report[start : start + 7] == real[start : start + 7]
    opaque = 45 + nvidia.MEASUREMENTS * 55 + 32
    assert heads(SHARED.report[opaque:-96]) == heads(real[opaque:-96])


def heads(opaque: bytes) -> list[tuple[int, int]]:
    found, at = [], 2
    while at < len(opaque):
        kind = int.from_bytes(opaque[at : at + 2], "little")
        length = int.from_bytes(opaque[at + 2 : at + 4], "little")
        found.append((kind, length))
        at += 4 + length
    return found


@needs_vectors
@pytest.mark.parametrize(
    ("name", "simulated_rim"),
    [
        ("NV_GPU_DRIVER_GH100_595.71.05.xml", 0),
        ("NV_GPU_VBIOS_1010_0210_886_96009F0004.xml", 1),
    ],
)
def test_simulated_reference_values_have_the_shape_of_real_ones(
    name: str, simulated_rim: int
) -> None:
    real = (H100 / name).read_bytes()
    ours = SHARED.rims[simulated_rim]
    assert elements(ours) == elements(real)
    indexes = parse_rim(ours).rim.measurements.keys()
    assert indexes == parse_rim(real).rim.measurements.keys()


def elements(document: bytes) -> list[tuple[bytes, list[bytes]]]:
    """Tags with the names of their attributes, in order, without alternatives' hashes."""
    found = []
    for tag, rest in re.findall(rb"<([\w:]+)((?:\s+[\w:]+=\"[^\"]*\")*)\s*/?>", document):
        names = re.findall(rb"([\w:]+)=", rest)
        found.append((tag, [one for one in names if not re.fullmatch(rb"ns2:Hash[1-9]", one)]))
    return found


@needs_vectors
def test_a_simulated_chain_has_the_shape_of_a_real_one() -> None:
    real = x509.load_pem_x509_certificates((H100 / "chain.pem").read_bytes())
    ours = x509.load_pem_x509_certificates(SHARED.certificate_chain)
    assert len(ours) == len(real)
    for mine, theirs in zip(ours, real, strict=True):
        assert common_name(mine) == common_name(theirs)
        assert mine.signature_algorithm_oid == theirs.signature_algorithm_oid
        assert mine.not_valid_after_utc == theirs.not_valid_after_utc
        left_out = {x509.CRLDistributionPoints.oid}  # there is no list of worthless certificates
        assert extension_oids(mine) == extension_oids(theirs) - left_out


def common_name(certificate: x509.Certificate) -> str:
    (attribute,) = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(attribute.value)


def extension_oids(certificate: x509.Certificate) -> set[x509.ObjectIdentifier]:
    return {one.oid for one in certificate.extensions}


# ------------------------------------------------------------------------------------------ CPU


async def test_a_simulated_cpu_authenticates_under_the_test_root() -> None:
    claims = authenticate_cpu(await cpu())
    assert claims.scheme == "simulated"
    assert claims.report_data == REPORT_DATA.ljust(64, b"\0")
    assert claims.to_json()["scheme"] == "simulated"
    assert claims.sev_snp.product == "Milan"
    assert not claims.sev_snp.report.policy & GuestPolicy.DEBUG
    assert set(claims.measurements) == {"measurement"}


async def test_a_report_of_another_chip_is_refused() -> None:
    one, other = await cpu(), await cpu()
    with pytest.raises(Unauthentic):
        authenticate_cpu(dataclasses.replace(one, endorsements=other.endorsements))


async def test_a_bad_signature_of_the_cpu_is_refused() -> None:
    with pytest.raises(Unauthentic):
        authenticate_cpu(await cpu(Fault.CPU_BAD_SIGNATURE))


async def test_a_report_about_other_data_is_authentic_and_says_so() -> None:
    claims = authenticate_cpu(await cpu(Fault.CPU_WRONG_REPORT_DATA))
    assert claims.report_data != REPORT_DATA.ljust(64, b"\0")


async def test_a_guest_that_may_be_debugged_says_so() -> None:
    claims = authenticate_cpu(await cpu(Fault.CPU_DEBUG))
    assert claims.sev_snp.report.policy & GuestPolicy.DEBUG


# ------------------------------------------------------------------------------- roots and faults


def test_the_published_certificates_belong_to_the_published_keys() -> None:
    names = sorted(path.stem for path in pki.KEYS.glob("*.key"))
    assert names == sorted(path.stem for path in pki.KEYS.glob("*.pem"))
    for name in names:
        identity = pki.fixed(name)
        assert identity.certificate.public_key() == identity.key.public_key()
        assert pki.WORTHLESS in identity.certificate.subject.rfc4514_string().replace("\\", "")


def test_the_pinned_test_roots_are_the_published_ones() -> None:
    assert ANCHORS.simulated_nvidia_device == (pki.fixed("nvidia_device_root").certificate,)
    assert ANCHORS.simulated_nvidia_rim == (pki.fixed("nvidia_rim_root").certificate,)
    (line,) = ANCHORS.simulated_amd
    names = ("amd_ark", "amd_ask", "amd_asvk")
    assert [line.ark, line.ask, line.asvk] == [pki.fixed(name).certificate for name in names]


async def inventory(fault: Fault) -> GpuInventory:
    return await SimulatedGpus(count=2, fault=fault).inventory()


async def test_the_inventory_says_what_a_driver_would() -> None:
    found = await inventory(Fault.NONE)
    assert found.cc_state.is_production
    assert [gpu.index for gpu in found.gpus] == [0, 1]
    assert len({gpu.ueid for gpu in found.gpus}) == 2
    assert not found.ready


@pytest.mark.parametrize("fault", [Fault.GPU_CC_OFF, Fault.GPU_DEV_TOOLS])
async def test_a_gpu_out_of_production_mode_says_so(fault: Fault) -> None:
    assert not (await inventory(fault)).cc_state.is_production


async def test_the_ready_state_is_kept() -> None:
    gpus = SimulatedGpus(count=1)
    await gpus.set_ready(True)
    assert (await gpus.inventory()).ready
    await gpus.set_ready(False)
    assert not (await gpus.inventory()).ready


async def test_absent_hardware_is_absent_in_every_way() -> None:
    gpus = SimulatedGpus(count=1, fault=Fault.GPU_ABSENT)
    for ask in (gpus.inventory(), gpus.collect(NONCE), gpus.set_ready(True)):
        with pytest.raises(ProviderAbsent):
            await ask
    with pytest.raises(ProviderAbsent):
        await cpu(Fault.CPU_ABSENT)


async def test_an_error_that_comes_once_is_gone_the_second_time() -> None:
    gpus = SimulatedGpus(count=1, fault=Fault.GPU_ERROR_ONCE)
    with pytest.raises(DeviceFault):
        await gpus.collect(NONCE)
    (evidence,) = await gpus.collect(NONCE)
    authenticate_gpu(evidence)


def test_every_fault_is_described_and_can_be_configured() -> None:
    assert set(MEANING) == set(Fault)
    assert [parse_fault(fault.value) for fault in Fault] == list(Fault)


def test_an_unknown_fault_is_an_error_of_the_configuration() -> None:
    attestation = Attestation(cpu="simulated", gpu="simulated", simulated_fault="gpu_meltdown")
    with pytest.raises(ConfigError, match="simulated_fault: unknown `gpu_meltdown`"):
        SimulatedGpus.from_settings(attestation)
    with pytest.raises(ConfigError, match="simulated_fault"):
        SimulatedCpu.from_settings(attestation)


def test_the_names_of_simulated_reference_values_are_those_of_the_service() -> None:
    claims = authenticate_gpu(SHARED)
    assert isinstance(claims.identity, GpuIdentity)
    assert driver_rim_id("GH100", claims.identity) == nvidia.DRIVER_RIM.name
    assert vbios_rim_id(claims.identity) == nvidia.VBIOS_RIM.name
