"""What the GPUs are made to sign: the labelled hashes of protocol.md section 2.

Every hash begins with a label of its own and every variable field with its length, so that no
two of them can have the same input. No caller's bytes reach a device unhashed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json
from appliance.wire.encoding import decode_hex, format_sha256, parse_sha256
from appliance.wire.evidence import GpuEvidence
from appliance.wire.merkle import HASH_BYTES, MAX_LEAVES

Kind: TypeAlias = Literal["request", "completion", "report", "generate"]
KINDS: tuple[Kind, ...] = ("request", "completion", "report", "generate")

MAX_PATH = MAX_LEAVES.bit_length() - 1


def labelled_hash(label: str, *parts: bytes) -> bytes:
    """`H(label, parts…) = sha256(label || 0x00 || parts…)`, 32 bytes."""
    return hashlib.sha256(b"\x00".join((label.encode("ascii"), b"".join(parts)))).digest()


def optional(value: bytes | None) -> bytes:
    """`opt(x)` of 32 bytes: 0x00 when absent, else 0x01 and the value."""
    return b"\x00" if value is None else b"\x01" + _exactly(value)


def request_commitment(
    receipt_id: str,
    endpoint: str,
    *,
    client_nonce: bytes | None,
    body_sha256: bytes,
    blind: bytes,
) -> bytes:
    """The commitment of an inference request.

    Args:
        receipt_id, endpoint: as in the receipt; ASCII, at most 65 535 bytes.
        client_nonce: 32 bytes from `X-DCV-Nonce`, if it came.
        body_sha256: 32 bytes, of the request's raw body.
        blind: 32 random bytes, so that a leaf tells nothing about a guessable prompt.
    """
    return labelled_hash(
        "dcv/1 request",
        _sized(receipt_id.encode("ascii")),
        _sized(endpoint.encode("ascii")),
        optional(client_nonce),
        _exactly(body_sha256),
        _exactly(blind),
    )


def completion_commitment(core: JsonObject) -> bytes:
    """The commitment of a finished answer; `core` is that of protocol.md section 6."""
    return completion_commitment_of(hashlib.sha256(canonical_json(core)).digest())


def completion_commitment_of(core_sha256: bytes) -> bytes:
    """The same, of a core whose 32-byte digest is known, such as from a receipt."""
    return labelled_hash("dcv/1 completion", _exactly(core_sha256))


def report_commitment(nonce: bytes | None) -> bytes:
    """The commitment of a report; `nonce` is the 32 bytes asked with, None for the null form."""
    return labelled_hash("dcv/1 report", optional(nonce))


def generate_commitment(nonce: bytes) -> bytes:
    """The commitment of a call to `generate`; 32 bytes."""
    return labelled_hash("dcv/1 generate", _exactly(nonce))


def epoch_nonce(keyset_digest: bytes, tree_size: int, root: bytes) -> bytes:
    """The nonce that every GPU of an epoch is given, 32 bytes."""
    return labelled_hash(
        "dcv/1 gpu epoch", _exactly(keyset_digest), struct.pack(">Q", tree_size), _exactly(root)
    )


def gpu_evidence_digest(gpus: Iterable[GpuEvidence]) -> bytes:
    """Over the reports and chains of an epoch, in the order of the instance document; 32 bytes."""
    items = tuple(gpus)
    parts = [struct.pack(">I", len(items))]
    for one in items:
        for blob in (one.report, one.certificate_chain):
            parts += [struct.pack(">I", len(blob)), blob]
    return labelled_hash("dcv/1 gpu evidence", *parts)


NO_GPU_EVIDENCE = gpu_evidence_digest(())
"""Of every epoch without GPUs, so it names none of them: there is nothing to be fetched by it."""


@dataclass(frozen=True, slots=True)
class Inclusion:
    """`inclusion`: where a commitment stands in an epoch.

    Attributes:
        leaf_index, path: both None where the epoch is an earlier one that was used again
            (`unsafe_max_evidence_age_s`).
        keyset_digest, root: 32 bytes each.
    """

    kind: Kind
    keyset_digest: bytes
    tree_size: int
    leaf_index: int | None
    path: tuple[bytes, ...] | None
    root: bytes

    @property
    def nonce(self) -> bytes:
        """The nonce that the epoch's GPU reports must carry."""
        return epoch_nonce(self.keyset_digest, self.tree_size, self.root)

    def to_json(self) -> JsonObject:
        """Its form in receipts, reports and bundles."""
        path: JsonValue = None
        if self.path is not None:
            path = [item.hex() for item in self.path]
        return {
            "kind": self.kind,
            "keyset_digest": format_sha256(self.keyset_digest),
            "tree_size": self.tree_size,
            "leaf_index": self.leaf_index,
            "path": path,
            "root": self.root.hex(),
        }


def parse_inclusion(value: JsonValue, *, where: str) -> Inclusion:
    """Read an `inclusion`. That it includes anything is for `rats.binding` to say.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    members = {"kind", "keyset_digest", "tree_size", "leaf_index", "path", "root"}
    if not isinstance(value, dict) or value.keys() != members:
        raise Malformed(f"{where}: expected an object of {', '.join(sorted(members))}", field=where)
    kind = next((known for known in KINDS if known == value["kind"]), None)
    if kind is None:
        raise Malformed(f"{where}.kind: expected one of {', '.join(KINDS)}", field=f"{where}.kind")
    index, path = value["leaf_index"], value["path"]
    if (index is None) != (path is None):
        raise Malformed(f"{where}: expected leaf_index and path both, or both null", field=where)
    return Inclusion(
        kind=kind,
        keyset_digest=parse_sha256(
            _text(value["keyset_digest"], f"{where}.keyset_digest"), field=f"{where}.keyset_digest"
        ),
        tree_size=_count(value["tree_size"], f"{where}.tree_size", least=1),
        leaf_index=None if index is None else _count(index, f"{where}.leaf_index", least=0),
        path=None if path is None else _path(path, f"{where}.path"),
        root=decode_hex(
            _text(value["root"], f"{where}.root"), field=f"{where}.root", length=HASH_BYTES
        ),
    )


def _path(value: JsonValue, where: str) -> tuple[bytes, ...]:
    if not isinstance(value, list) or len(value) > MAX_PATH:
        raise Malformed(f"{where}: expected at most {MAX_PATH} items", field=where)
    return tuple(decode_hex(_text(item, where), field=where, length=HASH_BYTES) for item in value)


def _count(value: JsonValue, where: str, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_LEAVES:
        raise Malformed(f"{where}: expected {least} to {MAX_LEAVES}", field=where)
    return value


def _text(value: JsonValue, where: str) -> str:
    if not isinstance(value, str):
        raise Malformed(f"{where}: expected text", field=where)
    return value


def _sized(value: bytes) -> bytes:
    return struct.pack(">H", len(value)) + value


def _exactly(value: bytes) -> bytes:
    """The 32 bytes that were promised: a shorter one would shift what follows it."""
    if len(value) != HASH_BYTES:
        raise ValueError(f"expected {HASH_BYTES} bytes, got {len(value)}")
    return value
