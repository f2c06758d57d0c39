"""An epoch's evidence as it is served: `GET /v1/dcv/epochs/{evidence_digest}`.

    {"api_version": "dcv/1", "evidence_digest", "keyset_digest", "tree_size", "root",
     "collected_at", "gpus": [{"scheme", "report_b64", "cert_chain_b64", "rims_b64", "ocsp_b64"}]}

Reading one checks its form. What it says becomes true, if it does, in `rats.exchange`: the
receipt that cites it says every one of these values again, under a signature.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.errors import Malformed
from appliance.wire.canonical import MAX_SAFE_INTEGER, JsonObject, JsonValue, parse_json_object
from appliance.wire.encoding import decode_hex, format_sha256, parse_sha256
from appliance.wire.evidence import GpuEvidence, parse_gpu_evidence
from appliance.wire.identity import API_VERSION
from appliance.wire.merkle import HASH_BYTES, MAX_LEAVES
from appliance.wire.report import MAX_GPUS

MAX_BYTES = 16 << 20
MAX_NESTING = 4

MEMBERS = frozenset(
    {
        "api_version",
        "evidence_digest",
        "keyset_digest",
        "tree_size",
        "root",
        "collected_at",
        "gpus",
    }
)


@dataclass(frozen=True, slots=True)
class EpochEvidence:
    """One epoch, read and not yet believed.

    Attributes:
        evidence_digest, keyset_digest, root: 32 bytes each, as claimed.
        collected_at: Unix seconds.
        gpus: in the order of the instance document; endorsements may be left out of it.
    """

    evidence_digest: bytes
    keyset_digest: bytes
    tree_size: int
    root: bytes
    collected_at: int
    gpus: tuple[GpuEvidence, ...]

    def to_json(self) -> JsonObject:
        """The document itself."""
        gpus: list[JsonValue] = [gpu.to_json() for gpu in self.gpus]
        return {
            "api_version": API_VERSION,
            "evidence_digest": format_sha256(self.evidence_digest),
            "keyset_digest": format_sha256(self.keyset_digest),
            "tree_size": self.tree_size,
            "root": self.root.hex(),
            "collected_at": self.collected_at,
            "gpus": gpus,
        }


def parse_epoch(data: bytes) -> EpochEvidence:
    """Read an epoch's bytes.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    if len(data) > MAX_BYTES:
        raise Malformed(f"epoch: expected at most {MAX_BYTES} bytes")
    return read_epoch(parse_json_object(data, max_nesting=MAX_NESTING), where="$")


def read_epoch(value: JsonValue, *, where: str) -> EpochEvidence:
    """Read an epoch that is already JSON.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    if not isinstance(value, dict) or value.keys() != MEMBERS:
        raise Malformed(f"{where}: expected an object of {', '.join(sorted(MEMBERS))}", field=where)
    if value["api_version"] != API_VERSION:
        raise Malformed(
            f"{where}.api_version: expected {API_VERSION}", field=f"{where}.api_version"
        )
    gpus = value["gpus"]
    if not isinstance(gpus, list) or len(gpus) > MAX_GPUS:
        raise Malformed(f"{where}.gpus: expected at most {MAX_GPUS}", field=f"{where}.gpus")
    return EpochEvidence(
        evidence_digest=_digest(value, "evidence_digest", where),
        keyset_digest=_digest(value, "keyset_digest", where),
        tree_size=_count(value, "tree_size", where, least=1, most=MAX_LEAVES),
        root=decode_hex(_text(value, "root", where), field=f"{where}.root", length=HASH_BYTES),
        collected_at=_count(value, "collected_at", where, least=0, most=MAX_SAFE_INTEGER),
        gpus=tuple(
            parse_gpu_evidence(one, where=f"{where}.gpus[{index}]")
            for index, one in enumerate(gpus)
        ),
    )


def _digest(item: JsonObject, name: str, where: str) -> bytes:
    return parse_sha256(_text(item, name, where), field=f"{where}.{name}")


def _count(item: JsonObject, name: str, where: str, *, least: int, most: int) -> int:
    value = item[name]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Malformed(f"{where}.{name}: expected {least} to {most}", field=f"{where}.{name}")
    return value


def _text(item: JsonObject, name: str, where: str) -> str:
    value = item[name]
    if not isinstance(value, str):
        raise Malformed(f"{where}.{name}: expected text", field=f"{where}.{name}")
    return value
