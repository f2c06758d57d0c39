"""What a source of evidence is to the collector, and what it says about itself.

What must be there comes from the configuration, never from probing: a provider whose device is
missing raises ProviderAbsent, and does not make a shorter answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from appliance.wire.evidence import CpuEvidence, GpuEvidence

NONCE_BYTES = 32
"""Of the nonce that every GPU report carries (SPDM 1.1)."""

MAX_REPORT_DATA_BYTES = 64

ENVIRONMENT_PRODUCTION = 2
"""NVML_CC_SYSTEM_ENVIRONMENT_PROD."""

CC_FEATURE_ENABLED = 1
"""NVML_CC_SYSTEM_FEATURE_ENABLED."""

DEV_TOOLS_OFF = 0
"""NVML_CC_SYSTEM_DEVTOOLS_MODE_OFF."""


@dataclass(frozen=True, slots=True)
class ConfidentialComputeState:
    """What the driver says about confidential computing: unsigned, a first look only.

    Attributes:
        environment: 0 unavailable, 1 simulation, 2 production.
        cc_feature: 0 off, 1 on.
        dev_tools_mode: 0 off, 1 on.
    """

    environment: int
    cc_feature: int
    dev_tools_mode: int

    @property
    def is_production(self) -> bool:
        """Confidential computing is on, for production, with developer tools off."""
        return (
            self.environment == ENVIRONMENT_PRODUCTION
            and self.cc_feature == CC_FEATURE_ENABLED
            and self.dev_tools_mode == DEV_TOOLS_OFF
        )


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """One GPU as the driver names it; unsigned.

    Attributes:
        index: the driver's. uuid: `GPU-…`, the driver's name for it.
        ueid: its name in evidence: the serial number of its leaf certificate in decimal. None
            where confidential computing is off and there is no certificate.
    """

    index: int
    name: str
    uuid: str
    vbios_version: str
    ueid: str | None


@dataclass(frozen=True, slots=True)
class GpuInventory:
    """Which GPUs are there. All of it is the driver's word and nothing is signed: it names
    devices for people and ends a boot early; what counts is the evidence.

    Attributes:
        ready: may the GPUs take work? In confidential mode they refuse it until told so.
        gpus: by index.
    """

    cc_state: ConfidentialComputeState
    ready: bool
    driver_version: str
    gpus: tuple[GpuDevice, ...]


class GpuProvider(Protocol):
    """The machine's GPUs. The collector asks one thing at a time."""

    scheme: str

    async def inventory(self) -> GpuInventory:
        """Which GPUs are there.

        Raises:
            ProviderAbsent: none, fewer than configured, or no driver. DeviceFault: it failed.
        """
        ...

    async def collect(self, nonce: bytes) -> tuple[GpuEvidence, ...]:
        """A fresh report of every GPU, in the order of their index.

        Args:
            nonce: 32 bytes.

        Raises:
            ProviderAbsent, DeviceFault: as `inventory`.
        """
        ...

    async def set_ready(self, ready: bool) -> None:
        """Let the GPUs take work, or not. Needs root.

        Raises:
            ProviderAbsent, DeviceFault: as `inventory`.
        """
        ...


class CpuProvider(Protocol):
    """The machine's TEE or TPM."""

    scheme: str

    async def collect(self, report_data: bytes) -> CpuEvidence:
        """A fresh quote over these data.

        Args:
            report_data: at most 64 bytes.

        Raises:
            ProviderAbsent: it is not there. DeviceFault: it failed.
        """
        ...
