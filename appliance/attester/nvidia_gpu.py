"""NVIDIA GPUs, through NVML: a fresh SPDM attestation report and the device's certificate chain.

Not tried on hardware: written from nvidia-ml-py's structures and NVIDIA's published use of them
(nvtrust, `nvidia_gpu_tools`), tested against a stand-in for the library.

NVML's calls block, for as long as the driver likes. Each runs in a worker thread, one at a time.
A call that hangs keeps its thread and every later one waits behind it, within the caller's
deadline; what ends it is the end of this process, which the gateway can always bring about.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import pynvml  # type: ignore[import-untyped]  # it ships no types
import trio

from appliance.attester.provider import (
    CC_FEATURE_ENABLED,
    ConfidentialComputeState,
    GpuDevice,
    GpuInventory,
)
from appliance.config import Attestation
from appliance.errors import AttesterError, DeviceFault, Malformed, ProviderAbsent
from appliance.rats.chain import parse_pem_chain
from appliance.wire.evidence import GpuEvidence

T = TypeVar("T")

ABSENT = frozenset(
    {
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_NOT_FOUND,
    }
)
"""What means that the machine is not the configured one: no driver, or no GPU that can attest.
Everything else is a device that fails."""


class NvidiaGpus:
    """The GPUs of this machine, by the driver's index.

    Args:
        count: so many must be there.
    """

    scheme = "nvidia_gpu"

    def __init__(self, *, count: int) -> None:
        self._count = count
        self._one_at_a_time = trio.CapacityLimiter(1)
        self._initialised = False

    @classmethod
    def from_settings(cls, settings: Attestation) -> NvidiaGpus:
        """As configured."""
        return cls(count=settings.gpu_count)

    async def inventory(self) -> GpuInventory:
        """What the driver says; nothing of it is signed."""
        return await self._call("inventory", self._inventory)

    async def collect(self, nonce: bytes) -> tuple[GpuEvidence, ...]:
        """A report of each GPU over this nonce, one GPU after the other."""
        # nvidia-ml-py pads and cuts nothing: ctypes refuses an array of another length.
        assert len(nonce) == pynvml.NVML_CC_GPU_CEC_NONCE_SIZE
        found = [
            await self._call(f"GPU {index}", partial(self._evidence, index, nonce))
            for index in range(self._count)
        ]
        return tuple(found)

    async def set_ready(self, ready: bool) -> None:
        """Needs root. A GPU in confidential mode refuses work until it is ready."""
        await self._call("ready state", partial(self._set_ready, ready))

    async def _call(self, what: str, function: Callable[[], T]) -> T:
        try:
            return await trio.to_thread.run_sync(
                partial(self._initialised_call, function),
                abandon_on_cancel=True,
                limiter=self._one_at_a_time,
            )
        except pynvml.NVMLError as error:
            raise _translate(what, error) from error
        except UnicodeDecodeError as error:
            raise DeviceFault(f"{what}: the driver names something in no known encoding") from error

    def _initialised_call(self, function: Callable[[], T]) -> T:
        if not self._initialised:
            pynvml.nvmlInit()
            self._initialised = True
        return function()

    def _inventory(self) -> GpuInventory:
        count = pynvml.nvmlDeviceGetCount()
        if count < self._count:
            raise ProviderAbsent(f"expected {self._count} GPUs, the driver has {count}")
        state = pynvml.nvmlSystemGetConfComputeState()
        certified = state.ccFeature == CC_FEATURE_ENABLED
        return GpuInventory(
            cc_state=ConfidentialComputeState(
                environment=state.environment,
                cc_feature=state.ccFeature,
                dev_tools_mode=state.devToolsMode,
            ),
            ready=bool(pynvml.nvmlSystemGetConfComputeGpusReadyState()),
            driver_version=pynvml.nvmlSystemGetDriverVersion(),
            gpus=tuple(_device(index, certified=certified) for index in range(count)),
        )

    def _evidence(self, index: int, nonce: bytes) -> GpuEvidence:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        report = pynvml.nvmlDeviceGetConfComputeGpuAttestationReport(handle, nonce)
        return GpuEvidence(
            self.scheme,
            _used(report.attestationReport, report.attestationReportSize, f"GPU {index}: report"),
            _chain(handle, index),
        )

    def _set_ready(self, ready: bool) -> None:
        pynvml.nvmlSystemSetConfComputeGpusReadyState(
            pynvml.NVML_CC_ACCEPTING_CLIENT_REQUESTS_TRUE
            if ready
            else pynvml.NVML_CC_ACCEPTING_CLIENT_REQUESTS_FALSE
        )


def _device(index: int, *, certified: bool) -> GpuDevice:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return GpuDevice(
        index=index,
        name=pynvml.nvmlDeviceGetName(handle),
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        vbios_version=pynvml.nvmlDeviceGetVbiosVersion(handle),
        ueid=_ueid(handle, index) if certified else None,
    )


def _ueid(handle: object, index: int) -> str:
    # Nobody checks the certificate here; it is written as NVIDIA's claims write it.
    try:
        leaf, *_ = parse_pem_chain(_chain(handle, index), field="chain")
    except Malformed as error:
        raise DeviceFault(f"GPU {index}: {error.message}") from error
    return str(leaf.serial_number)


def _chain(handle: object, index: int) -> bytes:
    chain = pynvml.nvmlDeviceGetConfComputeGpuCertificate(handle)
    return _used(chain.attestationCertChain, chain.attestationCertChainSize, f"GPU {index}: chain")


def _used(buffer: bytes, size: int, what: str) -> bytes:
    """The part of a buffer that the driver says it filled."""
    whole = bytes(buffer)
    if not 0 < size <= len(whole):
        raise DeviceFault(f"{what}: expected 1 to {len(whole)} bytes, the driver says {size}")
    return whole[:size]


def _translate(what: str, error: pynvml.NVMLError) -> AttesterError:
    message = f"{what}: {type(error).__name__}: {error}"
    return ProviderAbsent(message) if error.value in ABSENT else DeviceFault(message)
