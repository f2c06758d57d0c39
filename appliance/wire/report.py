"""The attestation report: `GET /v1/aci/attestation` (protocol.md section 3).

A report is evidence and the documents that the evidence binds. Reading one checks its form and
nothing else: what it says becomes true, if it does, in `rats.appraise`.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, JsonValue, parse_json_object
from appliance.wire.commitments import Inclusion, parse_inclusion
from appliance.wire.encoding import decode_hex, format_sha256, parse_sha256
from appliance.wire.evidence import (
    CpuEvidence,
    GpuEvidence,
    parse_cpu_evidence,
    parse_gpu_evidence,
)
from appliance.wire.identity import Keyset, parse_keyset

ACI_VERSION = "aci/1"
MAX_BYTES = 16 << 20
"""Of one report: sixteen GPUs with everything that endorses them have some 3 MB."""

MAX_NESTING = 12
MAX_GPUS = 16


@dataclass(frozen=True, slots=True)
class GpuSection:
    """`evidence.gpu`: one epoch's evidence, and where this report's commitment stands in it.

    Attributes:
        evidence_digest: 32 bytes, as claimed.
    """

    evidence_digest: bytes
    inclusion: Inclusion
    gpus: tuple[GpuEvidence, ...]

    def to_json(self) -> JsonObject:
        """Its form in a report."""
        gpus: list[JsonValue] = [gpu.to_json() for gpu in self.gpus]
        return {
            "evidence_digest": format_sha256(self.evidence_digest),
            "inclusion": self.inclusion.to_json(),
            "gpus": gpus,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """A report, read and not yet believed.

    Attributes:
        keyset_digest, report_data: 32 bytes, as claimed.
        keyset_document, workload, instance, policy: as received, to be hashed.
        keyset: `keyset_document` read.
        provenance: `source_provenance`.
    """

    keyset_digest: bytes
    tee_type: str
    keyset_document: JsonObject
    keyset: Keyset
    report_data: bytes
    provenance: JsonObject
    cpu: CpuEvidence
    gpu: GpuSection
    workload: JsonObject
    instance: JsonObject
    policy: JsonObject

    def to_json(self) -> JsonObject:
        """The document itself."""
        return {
            "api_version": ACI_VERSION,
            "workload_keyset_digest": format_sha256(self.keyset_digest),
            "attestation": {
                "tee_type": self.tee_type,
                "workload_keyset": self.keyset_document,
                "report_data": self.report_data.hex(),
                "source_provenance": self.provenance,
                "evidence": {
                    "cpu": self.cpu.to_json(),
                    "gpu": self.gpu.to_json(),
                    "workload": self.workload,
                    "instance": self.instance,
                    "policy": self.policy,
                },
            },
            "service_capabilities": {"supported_e2ee_versions": [], "serving": "direct"},
        }


def parse_report(data: bytes) -> Report:
    """Read a report's bytes.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    if len(data) > MAX_BYTES:
        raise Malformed(f"report: expected at most {MAX_BYTES} bytes")
    return read_report(parse_json_object(data, max_nesting=MAX_NESTING))


def read_report(document: JsonObject) -> Report:
    """Read a report that is already JSON.

    Members that aci/1 may add are read over; those of dcv/1 are exact.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    if document.get("api_version") != ACI_VERSION:
        raise Malformed(f"api_version: expected {ACI_VERSION}", field="$.api_version")
    attestation = _object(document, "attestation", "$")
    evidence = _object(attestation, "evidence", "$.attestation")
    keyset = _object(attestation, "workload_keyset", "$.attestation")
    where = "$.attestation.evidence"
    return Report(
        keyset_digest=parse_sha256(
            _text(document, "workload_keyset_digest", "$"), field="$.workload_keyset_digest"
        ),
        tee_type=_text(attestation, "tee_type", "$.attestation"),
        keyset_document=keyset,
        keyset=parse_keyset(keyset, where="$.attestation.workload_keyset"),
        report_data=decode_hex(
            _text(attestation, "report_data", "$.attestation"),
            field="$.attestation.report_data",
            length=32,
        ),
        provenance=_object(attestation, "source_provenance", "$.attestation"),
        cpu=parse_cpu_evidence(evidence.get("cpu"), where=f"{where}.cpu"),
        gpu=_gpu_section(_object(evidence, "gpu", where), f"{where}.gpu"),
        workload=_object(evidence, "workload", where),
        instance=_object(evidence, "instance", where),
        policy=_object(evidence, "policy", where),
    )


def _gpu_section(item: JsonObject, where: str) -> GpuSection:
    gpus = item.get("gpus")
    if not isinstance(gpus, list) or len(gpus) > MAX_GPUS:
        raise Malformed(f"{where}.gpus: expected at most {MAX_GPUS}", field=f"{where}.gpus")
    digest = _text(item, "evidence_digest", where)
    return GpuSection(
        evidence_digest=parse_sha256(digest, field=f"{where}.evidence_digest"),
        inclusion=parse_inclusion(item.get("inclusion"), where=f"{where}.inclusion"),
        gpus=tuple(
            parse_gpu_evidence(one, where=f"{where}.gpus[{index}]")
            for index, one in enumerate(gpus)
        ),
    )


def _object(item: JsonObject, name: str, where: str) -> JsonObject:
    value = item.get(name)
    if not isinstance(value, dict):
        raise Malformed(f"{where}.{name}: expected an object", field=f"{where}.{name}")
    return value


def _text(item: JsonObject, name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise Malformed(f"{where}.{name}: expected text", field=f"{where}.{name}")
    return value
