"""GPUs through nvidia-ml-py's real wrappers, over a stand-in for the library below them."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator

import pynvml  # type: ignore[import-untyped]  # it ships no types
import pytest
import trio

from appliance.attester.nvidia_gpu import NvidiaGpus
from appliance.attester.simulated import nvidia, pki
from appliance.endorsements.anchors import load_anchors
from appliance.errors import DeviceFault, ProviderAbsent
from appliance.rats.schemes.nvidia_gpu import authenticate
from tests.fakes.nvml import GPU_IS_LOST, NO_PERMISSION, FakeNvml, installed
from tests.vectors_dir import VECTORS, needs_vectors

NOW = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)
NONCE = bytes(range(32))
H100 = VECTORS / "nvidia" / "h100_595.71.05"


@pytest.fixture
def library() -> Iterator[FakeNvml]:
    with installed(FakeNvml()) as library:
        yield library


async def test_the_nonce_reaches_every_gpu_and_its_report_comes_back(library: FakeNvml) -> None:
    library.count = 3
    library.report = lambda index, nonce: b"report %d " % index + nonce
    found = await NvidiaGpus(count=3).collect(NONCE)
    assert [one.report for one in found] == [b"report %d " % index + NONCE for index in range(3)]
    assert {one.certificate_chain for one in found} == {library.chain}
    assert {one.scheme for one in found} == {"nvidia_gpu"}
    assert all(one.rims == one.ocsp == () for one in found)


async def test_a_report_of_a_simulated_device_passes_through_unchanged(library: FakeNvml) -> None:
    key, library.chain = pki.make_gpu_chain(serial="0123456789ABCDEF", fwid=nvidia.FWID)
    library.report = lambda _index, nonce: nvidia.encode_report(
        key, nonce=nonce, responder_nonce=bytes(32)
    )
    (evidence,) = await NvidiaGpus(count=1).collect(NONCE)
    root = (pki.fixed("nvidia_device_root").certificate,)
    assert authenticate(evidence, root=root, at=NOW, nonce=NONCE).nonce == NONCE


@needs_vectors
async def test_a_real_h100s_evidence_passes_through_unchanged(library: FakeNvml) -> None:
    nonce = bytes.fromhex((H100 / "nonce.hex").read_text().strip())
    answers = {nonce: (H100 / "report.bin").read_bytes()}
    library.report = lambda _index, asked: answers[asked]
    library.chain = (H100 / "chain.pem").read_bytes()
    (evidence,) = await NvidiaGpus(count=1).collect(nonce)
    root = load_anchors().nvidia_device
    assert authenticate(evidence, root=root, at=NOW, nonce=nonce).chip == "GH100"


async def test_the_inventory_is_what_the_driver_says(library: FakeNvml) -> None:
    library.count = 2
    found = await NvidiaGpus(count=2).inventory()
    assert found.cc_state.is_production
    assert found.driver_version == "595.71.05"
    assert [(gpu.index, gpu.uuid) for gpu in found.gpus] == [(0, "GPU-0"), (1, "GPU-1")]
    assert found.gpus[0].name == "NVIDIA H100 NVL"
    assert found.gpus[0].vbios_version == "96.00.9F.00.04"
    assert not found.ready


@needs_vectors
async def test_the_inventory_names_a_gpu_as_its_evidence_does(library: FakeNvml) -> None:
    library.report = lambda _index, _asked: (H100 / "report.bin").read_bytes()
    library.chain = (H100 / "chain.pem").read_bytes()
    gpus = NvidiaGpus(count=1)
    (device,), (evidence,) = (await gpus.inventory()).gpus, await gpus.collect(NONCE)
    root = load_anchors().nvidia_device
    assert device.ueid == authenticate(evidence, root=root, at=NOW, nonce=None).ueid


async def test_a_driver_that_has_no_certificate_for_a_gpu_is_at_fault(library: FakeNvml) -> None:
    library.chain = b"PEM"
    with pytest.raises(DeviceFault, match="GPU 0: chain"):
        await NvidiaGpus(count=1).inventory()


@pytest.mark.parametrize(
    "state", [(0, 1, 0), (1, 1, 0), (2, 0, 0), (2, 1, 1)], ids=["none", "test", "off", "devtools"]
)
async def test_anything_but_production_shows(
    library: FakeNvml, state: tuple[int, int, int]
) -> None:
    library.state = state
    if state[1] == 0:
        library.errors["nvmlDeviceGetConfComputeGpuCertificate"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    found = await NvidiaGpus(count=1).inventory()
    assert not found.cc_state.is_production
    assert (found.gpus[0].ueid is None) == (state[1] == 0)


async def test_the_ready_state_is_set_and_read_back(library: FakeNvml) -> None:
    gpus = NvidiaGpus(count=1)
    await gpus.set_ready(True)
    assert library.ready == 1
    assert (await gpus.inventory()).ready
    await gpus.set_ready(False)
    assert library.ready == 0


async def test_a_machine_without_the_driver_has_no_gpus() -> None:
    """Nothing stands in here: this is nvidia-ml-py looking for its library."""
    if pynvml.nvmlLib is not None:
        pytest.skip("this machine has NVIDIA's driver")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        with pytest.raises(ProviderAbsent, match="NVMLError_LibraryNotFound"):
            await NvidiaGpus(count=1).inventory()
    else:
        pytest.skip("this machine has NVIDIA's driver")


async def test_fewer_gpus_than_configured_are_not_enough(library: FakeNvml) -> None:
    with pytest.raises(ProviderAbsent, match="expected 2 GPUs, the driver has 1"):
        await NvidiaGpus(count=2).inventory()
    with pytest.raises(DeviceFault, match="GPU 1: NVMLError_InvalidArgument"):
        await NvidiaGpus(count=2).collect(NONCE)


REPORT = "nvmlDeviceGetConfComputeGpuAttestationReport"
CERTIFICATE = "nvmlDeviceGetConfComputeGpuCertificate"


@pytest.mark.parametrize(
    ("function", "number", "error", "named"),
    [
        (REPORT, GPU_IS_LOST, DeviceFault, "GPU 0: NVMLError_GpuIsLost: GPU is lost"),
        (REPORT, pynvml.NVML_ERROR_TIMEOUT, DeviceFault, "NVMLError_Timeout"),
        (REPORT, pynvml.NVML_ERROR_NOT_SUPPORTED, ProviderAbsent, "NVMLError_NotSupported"),
        (CERTIFICATE, pynvml.NVML_ERROR_UNKNOWN, DeviceFault, "NVMLError_Unknown"),
        ("nvmlInitWithFlags", pynvml.NVML_ERROR_DRIVER_NOT_LOADED, ProviderAbsent, "DriverNotLoad"),
        ("nvmlDeviceGetHandleByIndex_v2", GPU_IS_LOST, DeviceFault, "NVMLError_GpuIsLost"),
    ],
)
async def test_an_nvml_error_keeps_its_name(
    library: FakeNvml, function: str, number: int, error: type[Exception], named: str
) -> None:
    library.errors[function] = number
    with pytest.raises(error, match=named):
        await NvidiaGpus(count=1).collect(NONCE)


async def test_without_root_the_ready_state_stays(library: FakeNvml) -> None:
    library.errors["nvmlSystemSetConfComputeGpusReadyState"] = NO_PERMISSION
    with pytest.raises(DeviceFault, match="NVMLError_NoPermission"):
        await NvidiaGpus(count=1).set_ready(True)


async def test_a_library_that_could_not_start_is_started_again(library: FakeNvml) -> None:
    gpus = NvidiaGpus(count=1)
    library.errors["nvmlInitWithFlags"] = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    with pytest.raises(ProviderAbsent):
        await gpus.inventory()
    del library.errors["nvmlInitWithFlags"]
    await gpus.inventory()
    await gpus.inventory()
    assert library.calls.count("nvmlInitWithFlags") == 2


@pytest.mark.parametrize(
    ("what", "size"), [("report", 0), ("report", 8193), ("chain", 0), ("chain", 5121)]
)
async def test_a_size_beyond_the_buffer_is_a_fault(library: FakeNvml, what: str, size: int) -> None:
    library.sizes[what] = size
    with pytest.raises(DeviceFault, match=rf"GPU 0: {what}: expected 1 to \d+ bytes"):
        await NvidiaGpus(count=1).collect(NONCE)


async def test_a_name_in_no_known_encoding_is_a_fault(library: FakeNvml) -> None:
    library.name = b"H100 \xff"
    with pytest.raises(DeviceFault, match="encoding"):
        await NvidiaGpus(count=1).inventory()


async def test_two_callers_are_never_inside_the_driver_at_once(library: FakeNvml) -> None:
    library.count = 2
    gpus = NvidiaGpus(count=2)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(gpus.collect, NONCE)
            nursery.start_soon(gpus.inventory)
    assert library.calls.count(REPORT) == 8
    assert library.overlapping == 0


async def test_a_driver_that_hangs_costs_its_caller_only_the_deadline(library: FakeNvml) -> None:
    library.hang = threading.Event()
    gpus = NvidiaGpus(count=1)
    try:
        for _ in range(2):  # the second waits behind the first, and is let go as well
            with trio.move_on_after(0.05) as deadline:
                await gpus.collect(NONCE)
            assert deadline.cancelled_caught
        assert library.calls.count(REPORT) == 1
    finally:
        library.hang.set()
    with trio.fail_after(10):
        (evidence,) = await gpus.collect(NONCE)
    assert evidence.report == NONCE
