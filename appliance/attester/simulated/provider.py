"""GPUs and a CPU that do not exist, behind the interface of those that do."""

from __future__ import annotations

import datetime
import os
import secrets
from dataclasses import dataclass
from typing import NoReturn

import trio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from appliance.attester.provider import (
    CC_FEATURE_ENABLED,
    DEV_TOOLS_OFF,
    ENVIRONMENT_PRODUCTION,
    ConfidentialComputeState,
    GpuDevice,
    GpuInventory,
)
from appliance.attester.simulated import nvidia, pki, sev_snp
from appliance.attester.simulated.faults import Fault, parse_fault
from appliance.config import Attestation
from appliance.errors import DeviceFault, ProviderAbsent
from appliance.rats.chain import parse_pem_chain
from appliance.wire.evidence import CpuEvidence, GpuEvidence

CRASH_STATUS = 139
"""Of the collector when a simulated driver takes it along: as a shell tells a SIGSEGV."""


@dataclass(frozen=True, slots=True)
class _Gpu:
    device: GpuDevice
    key: ec.EllipticCurvePrivateKey
    chain: bytes


class SimulatedGpus:
    """So many H100s in one machine, each with a device key of its own, made now.

    Args:
        latency_s: how long a report of all of them takes. fault: what goes wrong.
    """

    scheme = "simulated"

    def __init__(self, *, count: int, latency_s: float = 0.0, fault: Fault = Fault.NONE) -> None:
        self._latency_s = latency_s
        self._fault = fault
        self._ready = False
        self._collections = 0
        until = pki.EXPIRED if fault is Fault.GPU_EXPIRED_CHAIN else pki.FOREVER
        self._gpus = tuple(_make_gpu(index, until=until) for index in range(count))
        names = ("nvidia_rim_signer", "nvidia_rim_issuer", "nvidia_rim_ca", "nvidia_rim_root")
        signers = [pki.fixed(name) for name in names]
        self._rims = tuple(
            nvidia.encode_rim(rim, signers) for rim in (nvidia.DRIVER_RIM, nvidia.VBIOS_RIM)
        )

    @classmethod
    def from_settings(cls, settings: Attestation) -> SimulatedGpus:
        """As configured.

        Raises:
            ConfigError: an unknown fault.
        """
        return cls(
            count=settings.gpu_count,
            latency_s=settings.simulated_latency_s,
            fault=parse_fault(settings.simulated_fault),
        )

    async def inventory(self) -> GpuInventory:
        """What a driver would say."""
        self._must_be_there()
        state = ConfidentialComputeState(
            environment=ENVIRONMENT_PRODUCTION,
            cc_feature=0 if self._fault is Fault.GPU_CC_OFF else CC_FEATURE_ENABLED,
            dev_tools_mode=1 if self._fault is Fault.GPU_DEV_TOOLS else DEV_TOOLS_OFF,
        )
        gpus = tuple(gpu.device for gpu in self._gpus)
        return GpuInventory(state, self._ready, nvidia.DRIVER_VERSION, gpus)

    async def collect(self, nonce: bytes) -> tuple[GpuEvidence, ...]:
        """A report of each, with the reference values that fit."""
        self._must_be_there()
        self._collections += 1
        first = self._collections == 1
        match self._fault:
            case Fault.GPU_HANG:
                await trio.sleep_forever()
            case Fault.GPU_CRASH:
                _crash()
            case Fault.GPU_ERROR:
                raise DeviceFault("simulated: the device reports an error")
            case Fault.GPU_ERROR_ONCE if first:
                raise DeviceFault("simulated: the device reports an error, this once")
            case _:
                pass
        await trio.sleep(self._latency_s)
        gone = self._fault is Fault.GPU_VANISHES and not first
        gpus = self._gpus[:-1] if gone else self._gpus
        return tuple(
            GpuEvidence(self.scheme, self._report(gpu, nonce), gpu.chain, self._rims)
            for gpu in gpus
        )

    async def set_ready(self, ready: bool) -> None:
        """Remembered, and shown in the inventory."""
        self._must_be_there()
        self._ready = ready

    def _must_be_there(self) -> None:
        if self._fault is Fault.GPU_ABSENT:
            raise ProviderAbsent("simulated: there is no GPU")

    def _report(self, gpu: _Gpu, nonce: bytes) -> bytes:
        measurements = dict(nvidia.GOLDEN)
        if self._fault is Fault.GPU_MEASUREMENT_MISMATCH:
            measurements[nvidia.DRIVER_INDEXES[0]] = b"\xff" * nvidia.MEASUREMENT_BYTES
        if self._fault is Fault.GPU_WRONG_NONCE:
            nonce = secrets.token_bytes(len(nonce))
        report = nvidia.encode_report(
            gpu.key,
            nonce=nonce,
            responder_nonce=secrets.token_bytes(32),
            measurements=measurements,
        )
        match self._fault:
            case Fault.GPU_GARBAGE:
                return secrets.token_bytes(len(report))
            case Fault.GPU_SHORT_REPORT:
                return report[:-1]
            case Fault.GPU_BAD_SIGNATURE:
                return report[:-1] + bytes([report[-1] ^ 1])
            case _:
                return report


class SimulatedCpu:
    """A SEV-SNP guest at VMPL 0 on a Milan, with a chip key made now."""

    scheme = "simulated"

    def __init__(self, *, fault: Fault = Fault.NONE) -> None:
        self._fault = fault
        self._chip_id = secrets.token_bytes(64)
        self._report_id = secrets.token_bytes(32)
        self._key, vcek = pki.make_vcek(chip_id=self._chip_id, tcb=sev_snp.TCB)
        self._endorsements = {
            "vek": vcek.public_bytes(Encoding.DER),
            "authorities": pki.fixed("amd_ask").pem,
        }

    @classmethod
    def from_settings(cls, settings: Attestation) -> SimulatedCpu:
        """As configured.

        Raises:
            ConfigError: an unknown fault.
        """
        return cls(fault=parse_fault(settings.simulated_fault))

    async def collect(self, report_data: bytes) -> CpuEvidence:
        """A report, with its VCEK and ASK as a host would hand them out."""
        match self._fault:
            case Fault.CPU_ABSENT:
                raise ProviderAbsent("simulated: there is no TEE")
            case Fault.CPU_ERROR:
                raise DeviceFault("simulated: the device reports an error")
            case Fault.CPU_HANG:
                await trio.sleep_forever()
            case Fault.CPU_WRONG_REPORT_DATA:
                report_data = secrets.token_bytes(32)
            case _:
                pass
        debug = sev_snp.POLICY_DEBUG if self._fault is Fault.CPU_DEBUG else 0
        report = sev_snp.encode_report(
            self._key,
            report_data=report_data.ljust(64, b"\0"),
            chip_id=self._chip_id,
            report_id=self._report_id,
            policy=sev_snp.POLICY | debug,
        )
        if self._fault is Fault.CPU_BAD_SIGNATURE:
            flipped = bytes([report[sev_snp.SIGNED_BYTES] ^ 1])
            start = sev_snp.SIGNED_BYTES
            report = report[:start] + flipped + report[start + 1 :]
        return CpuEvidence(self.scheme, {"report": report}, self._endorsements)


def _make_gpu(index: int, *, until: datetime.datetime) -> _Gpu:
    serial = secrets.token_hex(8).upper()
    key, chain = pki.make_gpu_chain(serial=serial, fwid=nvidia.FWID, until=until)
    tail = secrets.token_hex(16)
    uuid = "-".join((tail[:8], tail[8:12], tail[12:16], tail[16:20], tail[20:]))
    name, ueid = "Simulated H100", str(parse_pem_chain(chain, field="chain")[0].serial_number)
    device = GpuDevice(index, name, f"GPU-{uuid}", nvidia.VBIOS_VERSION, ueid)
    return _Gpu(device, key, chain)


def _crash() -> NoReturn:
    """End the process as a driver's fault does: no cleanup, no last words."""
    os._exit(CRASH_STATUS)
