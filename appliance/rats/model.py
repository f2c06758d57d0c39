"""The values that pass between the steps of an appraisal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from cryptography import x509

from appliance.wire.canonical import JsonObject


@dataclass(frozen=True, slots=True)
class AmdRoots:
    """AMD's certificates for one product line (`Milan`, `Genoa`, `Turin`).

    Attributes:
        ark: the AMD root key, pinned.
        ask: issues chips' keys (VCEK). asvk: issues cloud providers' loaded keys (VLEK).
    """

    product: str
    ark: x509.Certificate
    ask: x509.Certificate
    asvk: x509.Certificate


@dataclass(frozen=True, slots=True)
class Anchors:
    """The pinned roots. Whoever calls says what is pinned; an empty field trusts nothing.

    Attributes:
        nvidia_device: NVIDIA Device Identity CA, above every GPU and switch.
        nvidia_rim: NVIDIA CoRIM signing Root CA, above every reference integrity manifest.
        amd: by product line.
        intel_root: Intel SGX Root CA, DER.
        tpm: the vendor roots above attestation keys' certificates.
        simulated_*: the published test roots; empty outside development.
    """

    nvidia_device: tuple[x509.Certificate, ...] = ()
    nvidia_rim: tuple[x509.Certificate, ...] = ()
    amd: tuple[AmdRoots, ...] = ()
    intel_root: bytes = b""
    tpm: tuple[x509.Certificate, ...] = ()
    simulated_nvidia_device: tuple[x509.Certificate, ...] = ()
    simulated_nvidia_rim: tuple[x509.Certificate, ...] = ()
    simulated_amd: tuple[AmdRoots, ...] = field(default=())


class Claims(Protocol):
    """What a scheme's `authenticate` returns: signed statements, nothing judged yet."""

    @property
    def scheme(self) -> str:
        """The name of the kind of evidence."""
        ...

    def to_json(self) -> JsonObject:
        """Every claim, for people and scripts; byte strings as lowercase hex."""
        ...


class CpuClaims(Claims, Protocol):
    """What every kind of CPU evidence says."""

    @property
    def report_data(self) -> bytes:
        """What the evidence is bound to: 64 bytes, or up to 64 where a TPM quote carries it."""
        ...

    @property
    def measurements(self) -> dict[str, str]:
        """What was started, lowercase hex by the vendor's name (`measurement`, `mrtd`, `rtmr1`,
        `pcr11`): what reference values are compared with."""
        ...
