"""GPU evidence that somebody shows, in the form in which NVIDIA's tools exchange it.

    {"arch": "HOPPER", "nonce": hex, "evidence": base64 of the report, "certificate": base64 of PEM}

What binds it to a nonce of the asker's, or to an answer, comes beside it or does not; what does
not is a finding, because evidence of any time and of anybody is authentic too.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from appliance.config import Policy
from appliance.errors import Malformed, Stale, Unbound
from appliance.rats import binding
from appliance.rats.gpus import GpuStatement, Memory, appraise_gpus, named, together
from appliance.rats.model import Anchors
from appliance.rats.result import AttestationResult, Finding, Tier, conclude
from appliance.wire.canonical import JsonObject, JsonValue
from appliance.wire.checkpoint import parse_core
from appliance.wire.commitments import (
    Inclusion,
    completion_commitment,
    generate_commitment,
    parse_inclusion,
)
from appliance.wire.encoding import (
    decode_base64,
    decode_hex,
    encode_base64,
    format_sha256,
    parse_sha256,
)
from appliance.wire.evidence import GpuEvidence
from appliance.wire.report import MAX_GPUS

ARCHITECTURES = {"GH": "HOPPER", "GB": "BLACKWELL", "LS": "LS10"}
"""NVIDIA's name of an architecture, by the first letters of its chips."""

MAX_CHAIN_BYTES = 128 << 10
MAX_RAW_BYTES = 64 << 10
NONCE_BYTES = 32

KEYS = frozenset({"evidences", "client_nonce", "nonce", "inclusion", "keyset_digest", "raw"})


@dataclass(frozen=True, slots=True)
class Label:
    """What stands beside a report, None where nothing does: `arch`, and `nonce`, 32 bytes."""

    arch: str | None
    nonce: bytes | None


@dataclass(frozen=True, slots=True)
class Presented:
    """What was shown; nothing of it is believed.

    Attributes:
        evidences: report and chain of each GPU. labels: what each says of itself beside them.
        nonce: the epoch's. client_nonce: what `generate` was asked with. 32 bytes each.
        keyset_digest: 32 bytes. raw: the text of a checkpoint's core.
    """

    evidences: tuple[tuple[bytes, bytes], ...]
    labels: tuple[Label, ...] = ()
    nonce: bytes | None = None
    client_nonce: bytes | None = None
    inclusion: Inclusion | None = None
    keyset_digest: bytes | None = None
    raw: bytes | None = None


def present(evidence: GpuEvidence, *, chip: str, nonce: bytes) -> JsonObject:
    """One GPU's evidence in NVIDIA's form."""
    return {
        "arch": ARCHITECTURES.get(chip[:2], chip),
        "nonce": nonce.hex(),
        "evidence": encode_base64(evidence.report),
        "certificate": encode_base64(evidence.certificate_chain),
    }


def parse_presented(document: JsonObject) -> Presented:
    """Read what was shown.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    if unknown := document.keys() - KEYS:
        raise Malformed("unknown key", field=f"$.{min(unknown)[:64]}")
    evidences = document.get("evidences")
    if not isinstance(evidences, list) or not 0 < len(evidences) <= MAX_GPUS:
        raise Malformed(f"evidences: expected 1 to {MAX_GPUS}", field="$.evidences")
    inclusion = document.get("inclusion")
    raw = _text(document, "raw")
    digest = _text(document, "keyset_digest")
    if raw is not None and len(raw) > MAX_RAW_BYTES:
        raise Malformed(f"raw: expected at most {MAX_RAW_BYTES} bytes", field="$.raw")
    return Presented(
        evidences=tuple(_evidence(one, f"$.evidences[{i}]") for i, one in enumerate(evidences)),
        labels=tuple(_label(one, f"$.evidences[{i}]") for i, one in enumerate(evidences)),
        nonce=_nonce(document, "nonce"),
        client_nonce=_nonce(document, "client_nonce"),
        inclusion=None if inclusion is None else parse_inclusion(inclusion, where="$.inclusion"),
        keyset_digest=None if digest is None else parse_sha256(digest, field="$.keyset_digest"),
        raw=None if raw is None else raw.encode("utf-8"),
    )


def appraise_presented(
    presented: Presented,
    *,
    scheme: str,
    rims_of: Callable[[bytes], tuple[bytes, ...]],
    policy: Policy,
    anchors: Anchors,
    at: datetime.datetime,
    memory: Memory,
) -> AttestationResult:
    """The verdict on evidence that somebody shows.

    Args:
        scheme: to whose roots it is held.
        rims_of: a certificate chain's bytes to the reference values that are at hand for it.

    Raises:
        Malformed: the report, a certificate or `raw` does not parse.
        Unauthentic, Revoked, Stale, Unbound: it does not hold.
    """
    # 1. What the epoch committed to, as far as it was shown.
    unbound = tuple(_binding_findings(presented))
    # 2. The nonce that the reports must carry: recomputed where it can be.
    nonce = presented.nonce if presented.inclusion is None else presented.inclusion.nonce
    if nonce is None:
        raise Stale("nonce: expected the epoch's nonce, or an inclusion to compute it from")
    stated = (presented.nonce, *(label.nonce for label in presented.labels))
    if any(one not in (None, nonce) for one in stated):
        raise Unbound("nonce: expected the one that follows from the inclusion")
    # 3. The evidence, of every GPU once.
    gpus = tuple(
        GpuEvidence(scheme, report, chain, rims=rims_of(chain))
        for report, chain in presented.evidences
    )
    statements = appraise_gpus(
        gpus, nonce=nonce, policy=policy, anchors=anchors, at=at, memory=memory
    )
    _check_labels(presented.labels, statements)
    if len({one.claims.device_certificate_sha256 for one in statements}) != len(statements):
        raise Unbound("evidences: expected every GPU once")
    findings = (*unbound, *together(statements))
    return conclude({"nonce": nonce.hex()}, findings, named(statements))


def _check_labels(labels: tuple[Label, ...], statements: tuple[GpuStatement, ...]) -> None:
    """What the evidence calls itself is what its report says.

    Raises:
        Unbound: it is not.
    """
    for index, (label, statement) in enumerate(zip(labels, statements, strict=False)):
        chip = statement.claims.chip
        expected = ARCHITECTURES.get(chip[:2], chip)
        if label.arch is not None and label.arch.upper() != expected:
            got = label.arch[:64]
            raise Unbound(f"evidences[{index}].arch: expected {expected}, got {got}")


def _binding_findings(presented: Presented) -> Iterator[Finding]:
    """One finding for each thing that nothing binds, because it is missing or because what would
    bind it is.

    Raises:
        Malformed: `raw` is no checkpoint's core.
        Unbound: what can be compared differs.
    """
    inclusion, keyset_digest = presented.inclusion, presented.keyset_digest
    given = {
        "keyset_digest": keyset_digest,
        "client_nonce": presented.client_nonce,
        "raw": presented.raw,
    }
    core = None if presented.raw is None else parse_core(presented.raw)
    if inclusion is None:
        yield _missing("inclusion", "where the commitment stands in its epoch")
        for name, value in given.items():
            if value is not None:
                yield _unused(name, "an inclusion")
        return
    # Whatever was committed to, the epoch was one of this keyset.
    if keyset_digest is None:
        yield _missing("keyset_digest", "the keyset of the appliance that was asked")
    elif keyset_digest != inclusion.keyset_digest:
        raise Unbound(
            f"inclusion.keyset_digest: expected {format_sha256(keyset_digest)}, "
            f"got {format_sha256(inclusion.keyset_digest)}"
        )
    commitment = None
    if inclusion.kind == "generate" and presented.client_nonce is not None:
        commitment = generate_commitment(presented.client_nonce)
    elif inclusion.kind == "completion" and core is not None:
        commitment = completion_commitment(core.to_json())
    if commitment is None:
        yield _missing(inclusion.kind, "the client_nonce or the raw text that was committed to")
    else:
        binding.check_inclusion(inclusion, commitment, inclusion.keyset_digest)
    for name, kind in (("client_nonce", "generate"), ("raw", "completion")):
        if given[name] is not None and inclusion.kind != kind:
            yield _unused(name, f"an inclusion of kind {kind}")


def _missing(rule: str, expected: str) -> Finding:
    return _unbound(rule, expected, "nothing")


def _unused(name: str, expected: str) -> Finding:
    """Something was given that the inclusion says nothing about."""
    return _unbound(f"{name}_not_bound", f"{expected}, which binds {name}", f"{name} alone")


def _unbound(rule: str, expected: str, got: str) -> Finding:
    return Finding(
        Tier.WARNING,
        f"presented.{rule}",
        expected,
        got,
        "Give what the evidence came with; without it, it may be of any time or about anything.",
    )


def _evidence(value: JsonValue, where: str) -> tuple[bytes, bytes]:
    if not isinstance(value, dict):
        raise Malformed(f"{where}: expected an object", field=where)
    found = []
    for name, most in (("evidence", MAX_CHAIN_BYTES), ("certificate", MAX_CHAIN_BYTES)):
        text = value.get(name)
        if not isinstance(text, str):
            raise Malformed(f"{where}.{name}: expected base64 text", field=f"{where}.{name}")
        found.append(decode_base64(text, field=f"{where}.{name}", max_bytes=most))
    return found[0], found[1]


def _label(value: JsonValue, where: str) -> Label:
    assert isinstance(value, dict)  # `_evidence` read it
    arch, nonce = (value.get(name) for name in ("arch", "nonce"))
    for name, text in (("arch", arch), ("nonce", nonce)):
        if text is not None and not isinstance(text, str):
            raise Malformed(f"{where}.{name}: expected text", field=f"{where}.{name}")
    if isinstance(nonce, str):
        raw = decode_hex(nonce.lower(), field=f"{where}.nonce", length=NONCE_BYTES)
    else:
        raw = None
    return Label(arch if isinstance(arch, str) else None, raw)


def _nonce(document: JsonObject, name: str) -> bytes | None:
    text = _text(document, name)
    return None if text is None else decode_hex(text, field=f"$.{name}", length=NONCE_BYTES)


def _text(document: JsonObject, name: str) -> str | None:
    value = document.get(name)
    if value is None or isinstance(value, str):
        return value
    raise Malformed(f"{name}: expected text", field=f"$.{name}")
