"""Which providers there are: literal tables, because what can attest is part of what is measured.

Modules are imported when they are asked for, so that the collector of one machine does not carry
the drivers of another, and so that the simulated hardware can be left out of an image: what is
not there is not known.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from typing import Any

from appliance.attester.collect import Collector
from appliance.attester.provider import CpuProvider, GpuProvider
from appliance.config import Attestation
from appliance.errors import ConfigError
from appliance.wire.evidence import CpuEvidence

GPU_PROVIDERS: dict[str, tuple[str, str]] = {
    # [attestation] gpu: module, class with a `from_settings`
    "nvidia": ("appliance.attester.nvidia_gpu", "NvidiaGpus"),
    "simulated": ("appliance.attester.simulated.provider", "SimulatedGpus"),
}

CPU_PROVIDERS: dict[str, tuple[str, str]] = {
    # [attestation] cpu: module, class with a `from_settings`
    "sev_snp": ("appliance.attester.configfs_tsm", "ConfigfsTsm"),
    "tdx": ("appliance.attester.configfs_tsm", "ConfigfsTsm"),
    "simulated": ("appliance.attester.simulated.provider", "SimulatedCpu"),
}

CPU_COLLECTORS: dict[str, tuple[str, str]] = {
    # [attestation] cpu: module, coroutine function of settings and report data
    "azure_vtpm": ("appliance.attester.azure", "collect_azure"),
    "tpm2": ("appliance.attester.vtpm", "collect_tpm2"),
}


def open_collector(settings: Attestation) -> Collector:
    """A collector with the configured providers. Nothing is asked of a device yet.

    Raises:
        ConfigError: a provider that is not there, or settings that it does not take.
    """
    gpus: GpuProvider | None = None
    if settings.gpu != "unsafe_none":
        gpus = _find(GPU_PROVIDERS, settings.gpu).from_settings(settings)
    cpu: CpuProvider
    if settings.cpu in CPU_COLLECTORS:
        cpu = _Function(settings.cpu, _find(CPU_COLLECTORS, settings.cpu), settings)
    else:
        cpu = _find(CPU_PROVIDERS, settings.cpu).from_settings(settings)
    return Collector(cpu, gpus, gpu_count=settings.gpu_count)


class _Function:
    """A CPU provider that keeps no state between two quotes."""

    def __init__(
        self,
        scheme: str,
        collect: Callable[[Attestation, bytes], Awaitable[CpuEvidence]],
        settings: Attestation,
    ) -> None:
        self.scheme = scheme
        self._collect = collect
        self._settings = settings

    async def collect(self, report_data: bytes) -> CpuEvidence:
        return await self._collect(self._settings, report_data)


def _find(table: dict[str, tuple[str, str]], name: str) -> Any:
    module, attribute = table[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        # Only the provider itself, or its package, may be missing; what it imports may not.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"[attestation]: unknown provider `{name}`") from None
