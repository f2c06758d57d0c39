"""libnvidia-ml.so.1, as far as attestation needs it, for nvidia-ml-py to call through ctypes.

nvidia-ml-py keeps its loaded library in `pynvml.nvmlLib`; `installed` puts this one there, so
that its real wrappers run against C function pointers. The structures are written here once more,
from NVIDIA's nvml.h (driver 580), so that a wrapper with another layout would be noticed.

Not imitated: the driver, its timing, its locking, and that the setters need root.
"""

# ruff: noqa: N802  # the functions carry NVML's names
from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pynvml  # type: ignore[import-untyped]  # it ships no types

from appliance.attester.simulated import pki
from appliance.attester.simulated.nvidia import FWID

SUCCESS = 0
INVALID_ARGUMENT = 2
NO_PERMISSION = 4
GPU_IS_LOST = 15

NUMBERS = frozenset({"flags", "index", "length", "ready"})
"""Parameters that are `unsigned int`; the others are pointers."""

HANDLES = 0x1000
"""A device's handle is this and its index."""


class Report(ctypes.Structure):
    """nvmlConfComputeGpuAttestationReport_t."""

    _fields_ = (
        ("isCecAttestationReportPresent", ctypes.c_uint),
        ("attestationReportSize", ctypes.c_uint),
        ("cecAttestationReportSize", ctypes.c_uint),
        ("nonce", ctypes.c_ubyte * 32),
        ("attestationReport", ctypes.c_ubyte * 8192),
        ("cecAttestationReport", ctypes.c_ubyte * 4096),
    )


class Certificate(ctypes.Structure):
    """nvmlConfComputeGpuCertificate_t."""

    _fields_ = (
        ("certChainSize", ctypes.c_uint),
        ("attestationCertChainSize", ctypes.c_uint),
        ("certChain", ctypes.c_ubyte * 4096),
        ("attestationCertChain", ctypes.c_ubyte * 5120),
    )


class State(ctypes.Structure):
    """nvmlConfComputeSystemState_t."""

    _fields_ = (
        ("environment", ctypes.c_uint),
        ("ccFeature", ctypes.c_uint),
        ("devToolsMode", ctypes.c_uint),
    )


@dataclass
class FakeNvml:
    """The library, loaded into a process.

    Attributes:
        report: makes a GPU's report from its index and the nonce. chain: PEM.
        errors: NVML's error number, by the name of the function that returns it.
        sizes: what a function says it filled, instead of the truth.
        hang: a report waits for this.
        calls: names, in order. overlapping: how often two threads were inside at once.
    """

    count: int = 1
    report: Callable[[int, bytes], bytes] = lambda index, nonce: nonce
    chain: bytes = field(default_factory=lambda: pki.make_gpu_chain(serial="01", fwid=FWID)[1])
    name: bytes = b"NVIDIA H100 NVL"
    state: tuple[int, int, int] = (2, 1, 0)
    ready: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    hang: threading.Event | None = None
    entered: threading.Event = field(default_factory=threading.Event)
    calls: list[str] = field(default_factory=list)
    overlapping: int = 0
    _inside: int = 0
    _kept: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        """A C function pointer, as `ctypes.CDLL` has it."""
        if not name.startswith("nvml"):
            raise AttributeError(name)
        if name not in self._kept:
            implementation = getattr(self, f"_{name}", None)
            if implementation is None:
                raise AttributeError(name)
            code = implementation.__code__
            kinds = [
                ctypes.c_uint if one in NUMBERS else ctypes.c_void_p
                for one in code.co_varnames[1 : code.co_argcount]
            ]
            self._kept[name] = ctypes.CFUNCTYPE(ctypes.c_uint, *kinds)(
                self._guard(name, implementation)
            )
        return self._kept[name]

    def _guard(self, name: str, implementation: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: int | None) -> int:
            self.calls.append(name)
            self.overlapping += self._inside
            self._inside += 1
            try:
                if name in self.errors:
                    return self.errors[name]
                return implementation(*(one or 0 for one in arguments))
            finally:
                self._inside -= 1

        return call

    def _nvmlInitWithFlags(self, flags: int) -> int:
        return SUCCESS

    def _nvmlDeviceGetCount_v2(self, out: int) -> int:
        ctypes.c_uint.from_address(out).value = self.count
        return SUCCESS

    def _nvmlDeviceGetHandleByIndex_v2(self, index: int, out: int) -> int:
        if index >= self.count:
            return INVALID_ARGUMENT
        ctypes.c_void_p.from_address(out).value = HANDLES + index
        return SUCCESS

    def _nvmlDeviceGetName(self, handle: int, out: int, length: int) -> int:
        return _string(out, length, self.name)

    def _nvmlDeviceGetUUID(self, handle: int, out: int, length: int) -> int:
        return _string(out, length, b"GPU-%d" % (handle - HANDLES))

    def _nvmlDeviceGetVbiosVersion(self, handle: int, out: int, length: int) -> int:
        return _string(out, length, b"96.00.9F.00.04")

    def _nvmlSystemGetDriverVersion(self, out: int, length: int) -> int:
        return _string(out, length, b"595.71.05")

    def _nvmlSystemGetConfComputeState(self, out: int) -> int:
        state = State.from_address(out)
        state.environment, state.ccFeature, state.devToolsMode = self.state
        return SUCCESS

    def _nvmlSystemGetConfComputeGpusReadyState(self, out: int) -> int:
        ctypes.c_uint.from_address(out).value = self.ready
        return SUCCESS

    def _nvmlSystemSetConfComputeGpusReadyState(self, ready: int) -> int:
        self.ready = ready
        return SUCCESS

    def _nvmlDeviceGetConfComputeGpuAttestationReport(self, handle: int, out: int) -> int:
        self.entered.set()
        if self.hang is not None:
            self.hang.wait()
        found = Report.from_address(out)
        data = self.report(handle - HANDLES, bytes(found.nonce))
        found.attestationReportSize = self.sizes.get("report", len(data))
        ctypes.memmove(found.attestationReport, data, len(data))
        return SUCCESS

    def _nvmlDeviceGetConfComputeGpuCertificate(self, handle: int, out: int) -> int:
        found = Certificate.from_address(out)
        found.attestationCertChainSize = self.sizes.get("chain", len(self.chain))
        ctypes.memmove(found.attestationCertChain, self.chain, len(self.chain))
        return SUCCESS


@contextmanager
def installed(library: FakeNvml) -> Iterator[FakeNvml]:
    """Have nvidia-ml-py believe that it loaded this one."""
    before = pynvml.nvmlLib
    pynvml.nvmlLib = library
    pynvml._nvmlGetFunctionPointer_cache.clear()
    try:
        yield library
    finally:
        pynvml.nvmlLib = before
        pynvml._nvmlGetFunctionPointer_cache.clear()


def _string(out: int, length: int, text: bytes) -> int:
    ctypes.memmove(out, text[: length - 1] + b"\0", min(len(text) + 1, length))
    return SUCCESS
