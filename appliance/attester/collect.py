"""The collector: the configured providers, one thing at a time per device, nothing else out.

It holds providers to their interface: what they hand out has the number of GPUs that is
configured and the scheme that was announced, and what a device says in a form that nobody knows
is a DeviceFault, not a parser's error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import trio

from appliance.attester.messages import Hello
from appliance.attester.provider import CpuProvider, GpuInventory, GpuProvider
from appliance.errors import DeviceFault, Malformed, ProviderAbsent
from appliance.wire.evidence import CpuEvidence, GpuEvidence

MAX_WAITING = 4
"""Behind one that is being answered. Callers give up after their deadline, and the device is
still busy with what they asked: past this nobody is helped by one more in line."""


class Collector:
    """What this machine can prove.

    Args:
        cpu: the configured provider. gpus: likewise; None where the configuration wants none.
        gpu_count: so many GPUs must be there.
    """

    def __init__(self, cpu: CpuProvider, gpus: GpuProvider | None, *, gpu_count: int) -> None:
        self._cpu = cpu
        self._gpus = gpus
        self._gpu_count = gpu_count
        self._cpu_turn = _Turn("the TEE")
        self._gpu_turn = _Turn("the GPUs")

    def hello(self) -> Hello:
        """What it is set up for."""
        if self._gpus is None:
            return Hello(self._cpu.scheme, None, 0)
        return Hello(self._cpu.scheme, self._gpus.scheme, self._gpu_count)

    async def inventory(self) -> GpuInventory:
        """Which GPUs are there.

        Raises:
            ProviderAbsent: none, or not as many as configured. DeviceFault: it failed.
        """
        async with self._gpu_turn:
            found = await self._configured_gpus().inventory()
        if len(found.gpus) != self._gpu_count:
            raise ProviderAbsent(f"expected {self._gpu_count} GPUs, found {len(found.gpus)}")
        return found

    async def gpu_evidence(self, nonce: bytes) -> tuple[GpuEvidence, ...]:
        """A fresh report of every configured GPU.

        Raises:
            ProviderAbsent, DeviceFault: as `inventory`; a GPU that is missing is a fault.
        """
        async with self._gpu_turn:
            provider = self._configured_gpus()
            with _device_speaks("GPU evidence"):
                found = await provider.collect(nonce)
        if len(found) != self._gpu_count:
            raise DeviceFault(f"expected evidence of {self._gpu_count} GPUs, got {len(found)}")
        return found

    async def cpu_evidence(self, report_data: bytes) -> CpuEvidence:
        """A fresh quote over these data, at most 64 bytes.

        Raises:
            ProviderAbsent: it is not there. DeviceFault: it failed.
        """
        async with self._cpu_turn:
            with _device_speaks("CPU evidence"):
                return await self._cpu.collect(report_data)

    async def set_gpus_ready(self, ready: bool) -> None:
        """Let the GPUs take work, or not.

        Raises:
            ProviderAbsent, DeviceFault: as `inventory`.
        """
        async with self._gpu_turn:
            await self._configured_gpus().set_ready(ready)

    def _configured_gpus(self) -> GpuProvider:
        if self._gpus is None:
            raise ProviderAbsent("[attestation] gpu is `unsafe_none`: there are no GPUs to ask")
        return self._gpus


class _Turn:
    """One at a time, first come first served, and a short line."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._lock = trio.Lock()

    async def __aenter__(self) -> None:
        if self._lock.statistics().tasks_waiting >= MAX_WAITING:
            raise DeviceFault(f"{self._device}: still busy with {MAX_WAITING + 1} earlier requests")
        await self._lock.acquire()

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._lock.release()


@contextmanager
def _device_speaks(what: str) -> Iterator[None]:
    try:
        yield
    except Malformed as error:
        raise DeviceFault(f"{what}: {error.message}") from error
