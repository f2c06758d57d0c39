"""Raw evidence as it travels: from the attester to the gateway, in reports and in bundles.

Nothing is interpreted here: an item is a scheme's name and named byte strings. Nothing in it is
trustworthy before `rats.schemes` has authenticated it. In JSON every byte string is strict
base64 under its name and `_b64` (protocol.md section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, JsonValue
from appliance.wire.encoding import decode_base64, encode_base64

MAX_PART_BYTES = 1 << 20
"""Of one byte string; the largest real one, a TCG event log, has some 100 KiB."""

MAX_RIMS = 8
MAX_OCSP = 16

GPU_SCHEMES = ("nvidia_gpu", "simulated")

CPU_PARTS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    # scheme: (parts that must be there, parts and endorsements that may be there)
    "sev_snp": (frozenset({"report"}), frozenset({"vek", "authorities", "crl"})),
    "tdx": (frozenset({"quote"}), frozenset({"collateral"})),
    "azure_vtpm": (
        frozenset({"hcl_report", "quote", "signature", "pcrs"}),
        frozenset({"td_quote", "event_log", "vek", "authorities", "crl", "collateral"}),
    ),
    "tpm2": (
        frozenset({"quote", "signature", "pcrs", "ak_certificate"}),
        frozenset({"event_log", "authorities"}),
    ),
    "simulated": (frozenset({"report"}), frozenset({"vek", "authorities"})),
}
ENDORSEMENTS = frozenset({"vek", "authorities", "crl", "collateral"})
"""What a vendor, not the machine, made: `vek` one DER certificate; `authorities` PEM, the
issuers below the pinned root, in order; `crl` DER; `collateral` JSON as Intel's tools exchange it.
`pcrs` is the SHA-256 values that were quoted, 32 bytes each, in the order of the selection."""


@dataclass(frozen=True, slots=True, repr=False)
class GpuEvidence:
    """One GPU's.

    Attributes:
        report: the SPDM transcript: the request's 37 bytes and the response.
        certificate_chain: PEM, leaf first, as the driver hands it out.
        rims: NVIDIA's reference values that fit its driver and VBIOS, XML.
        ocsp: DER OCSP responses about the chains' certificates.
    """

    scheme: str
    report: bytes
    certificate_chain: bytes
    rims: tuple[bytes, ...] = ()
    ocsp: tuple[bytes, ...] = ()

    def __repr__(self) -> str:
        return f"GpuEvidence({self.scheme}, {len(self.report)} bytes)"

    def to_json(self) -> JsonObject:
        """Its form in a report."""
        rims: list[JsonValue] = [encode_base64(one) for one in self.rims]
        ocsp: list[JsonValue] = [encode_base64(one) for one in self.ocsp]
        return {
            "scheme": self.scheme,
            "report_b64": encode_base64(self.report),
            "cert_chain_b64": encode_base64(self.certificate_chain),
            "rims_b64": rims,
            "ocsp_b64": ocsp,
        }


@dataclass(frozen=True, slots=True, repr=False)
class CpuEvidence:
    """The CPU TEE's, or the TPM's.

    Attributes:
        parts: what the machine made, by the names of `CPU_PARTS`.
        endorsements: what vendors made, by the names of `ENDORSEMENTS`.
    """

    scheme: str
    parts: Mapping[str, bytes]
    endorsements: Mapping[str, bytes] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"CpuEvidence({self.scheme}, {', '.join(self.parts)})"

    def to_json(self) -> JsonObject:
        """Its form in a report."""
        document: JsonObject = {"scheme": self.scheme}
        document |= {f"{name}_b64": encode_base64(part) for name, part in self.parts.items()}
        document["endorsements"] = {
            f"{name}_b64": encode_base64(part) for name, part in self.endorsements.items()
        }
        return document


def parse_gpu_evidence(value: JsonValue, *, where: str) -> GpuEvidence:
    """One item of `gpus`.

    Raises:
        Malformed: not that form, an unknown scheme or key, or a bound exceeded.
    """
    item = _object(value, where)
    known = {"scheme", "report_b64", "cert_chain_b64", "rims_b64", "ocsp_b64"}
    _only(item, known, where)
    return GpuEvidence(
        scheme=_scheme(item, GPU_SCHEMES, where),
        report=_bytes(item.get("report_b64"), f"{where}.report_b64"),
        certificate_chain=_bytes(item.get("cert_chain_b64"), f"{where}.cert_chain_b64"),
        rims=_list(item.get("rims_b64", []), f"{where}.rims_b64", MAX_RIMS),
        ocsp=_list(item.get("ocsp_b64", []), f"{where}.ocsp_b64", MAX_OCSP),
    )


def parse_cpu_evidence(value: JsonValue, *, where: str) -> CpuEvidence:
    """The `cpu` member.

    Raises:
        Malformed: not that form, an unknown scheme or key, a missing part, or a bound exceeded.
    """
    item = _object(value, where)
    scheme = _scheme(item, tuple(CPU_PARTS), where)
    needed, allowed = CPU_PARTS[scheme]
    own = {f"{name}_b64" for name in (needed | allowed) - ENDORSEMENTS}
    _only(item, {"scheme", "endorsements"} | own, where)
    parts = {
        key.removesuffix("_b64"): _bytes(item[key], f"{where}.{key}") for key in item if key in own
    }
    if missing := sorted(needed - parts.keys()):
        raise Malformed(f"{where}: expected {missing[0]}_b64", field=f"{where}.{missing[0]}_b64")
    given = _object(item.get("endorsements", {}), f"{where}.endorsements")
    _only(given, {f"{name}_b64" for name in allowed & ENDORSEMENTS}, f"{where}.endorsements")
    endorsements = {
        key.removesuffix("_b64"): _bytes(given[key], f"{where}.endorsements.{key}") for key in given
    }
    return CpuEvidence(scheme, parts, endorsements)


def _object(value: JsonValue, where: str) -> JsonObject:
    if not isinstance(value, dict):
        raise Malformed(f"{where}: expected an object", field=where)
    return value


def _only(item: JsonObject, known: set[str], where: str) -> None:
    if unknown := sorted(item.keys() - known):
        raise Malformed(f"{where}: unknown key", field=f"{where}.{unknown[0][:64]}")


def _scheme(item: JsonObject, known: tuple[str, ...], where: str) -> str:
    scheme = item.get("scheme")
    if not isinstance(scheme, str) or scheme not in known:
        raise Malformed(
            f"{where}.scheme: expected one of {', '.join(known)}", field=f"{where}.scheme"
        )
    return scheme


def _bytes(value: JsonValue, where: str) -> bytes:
    if not isinstance(value, str):
        raise Malformed(f"{where}: expected base64 text", field=where)
    return decode_base64(value, field=where, max_bytes=MAX_PART_BYTES)


def _list(value: JsonValue, where: str, most: int) -> tuple[bytes, ...]:
    if not isinstance(value, list) or len(value) > most:
        raise Malformed(f"{where}: expected at most {most} items", field=where)
    return tuple(_bytes(one, f"{where}[{index}]") for index, one in enumerate(value))
