"""What an answer says of itself: its checkpoints, held to the receipt and to the bytes around them.

A checkpoint is signed by the checkpoint key, which the instance document names and the CPU
evidence so binds. With the receipt it says the same thing twice, under two keys; where a stream
was cut and no receipt can be had, it is all there is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from appliance.errors import Malformed, Stale, Unbound
from appliance.rats.appraise import MAX_KEYSET_S
from appliance.rats.presented import parse_presented
from appliance.rats.result import AttestationResult, Finding, Tier, conclude
from appliance.wire.canonical import JsonObject, JsonValue, parse_json_object
from appliance.wire.checkpoint import (
    MAX_ANSWER_NESTING,
    RESOLVED_MODEL,
    Checkpoint,
    Core,
    Placed,
    checkpoint_of_answer,
    find_checkpoints,
    verify_checkpoint,
)
from appliance.wire.commitments import gpu_evidence_digest
from appliance.wire.encoding import format_sha256
from appliance.wire.evidence import GpuEvidence
from appliance.wire.identity import parse_checkpoint_key
from appliance.wire.receipt import EventLog, GpuAttested, Receipt
from appliance.wire.report import Report
from appliance.wire.sse import DONE_EVENT

SCHEME = "checkpoint"

SHOWN = ("evidences", "nonce", "inclusion", "raw")
"""What of `attestation` can be held to something; the rest is the appliance's reading of it."""


def check_checkpoints(response: bytes, *, receipt: Receipt, log: EventLog, report: Report) -> int:
    """Every checkpoint in a response is signed by the checkpoint key, is about the bytes before
    it, and says what the receipt says. Returns how many there are.

    Args:
        response: all content bytes; their hash is the receipt's.
        report: steps 2 to 9 have been taken on it.

    Raises:
        Unauthentic: one is not signed by that key.
        Unbound: one is about something else, or one that the receipt cites is not there.
    """
    key = parse_checkpoint_key(report.instance, where="instance")
    placed = _checkpoints_in(response)
    prefix = _Prefix(response)
    for number, one in enumerate(placed):
        checkpoint = one.checkpoint
        verify_checkpoint(checkpoint, key)
        _equal("seq", number, checkpoint.core.seq)
        _check_prefix(one, prefix)
        _check_envelope(checkpoint.core, receipt, log)
        _check_final(checkpoint, log, last=one is placed[-1], after=response[one.end :])
        if checkpoint.completion is not None:
            _same("completion.core_sha256", checkpoint.core_sha256, _core_of(checkpoint.completion))
            _check_attestation(one.chunk, checkpoint, checkpoint.completion, report)
    if log.completion is not None and not (placed and placed[-1].checkpoint.core.final):
        raise Unbound(
            "checkpoint: expected the one that the receipt's completion event is about, got none"
        )
    return len(placed)


def check_cut_stream(content: bytes, *, report: Report, request: bytes | None = None) -> Checkpoint:
    """The last whole checkpoint of a stream that broke off: up to its `prefix_bytes` the content is
    what this appliance wrote in answer to that request. Of what came after it nothing is said, and
    of the GPU evidence that it cites nothing is looked at here.

    Args:
        content: every content byte that came, in order.
        report: of the keyset that the checkpoint names; steps 2 to 9 have been taken on it.
        request: the body that was sent, where it is at hand.

    Raises:
        Malformed: a checkpoint in it is not of this form.
        Unauthentic: the last is not signed by the checkpoint key.
        Unbound: there is none, or it is about other bytes, another keyset or another request.
    """
    placed = list(find_checkpoints(content))
    if not placed:
        raise Unbound("checkpoint: expected one in what came of the stream, got none")
    last = placed[-1]
    core = last.checkpoint.core
    verify_checkpoint(last.checkpoint, parse_checkpoint_key(report.instance, where="instance"))
    _check_prefix(last, _Prefix(content))
    _same("workload_keyset_digest", report.keyset_digest, core.keyset_digest)
    _same("gpu.inclusion.keyset_digest", report.keyset_digest, core.gpu.inclusion.keyset_digest)
    if request is not None:
        _same("request_body_hash", hashlib.sha256(request).digest(), core.request_body_hash)
    return last.checkpoint


def appraise_cut_stream(
    content: bytes, *, report: Report, request: bytes | None = None
) -> AttestationResult:
    """`check_cut_stream` as a result, with what it leaves open as findings. It is never more than a
    warning: a part of an answer is not the answer.

    Raises:
        Stale: the evidence that it cites is not of the keyset's time.
        What `check_cut_stream` raises.
    """
    core = check_cut_stream(content, report=report, request=request).core
    not_after, collected_at = report.keyset.not_after, core.gpu.collected_at
    if not not_after - MAX_KEYSET_S <= collected_at < not_after:
        raise Stale(
            f"checkpoint.gpu.collected_at: expected in the keyset's time, which ends at "
            f"{not_after}, got {collected_at}"
        )
    assert core.prefix_bytes is not None  # it stands in a stream, see `_check_prefix`
    claims: JsonObject = {
        "scheme": SCHEME,
        "receipt_id": core.receipt_id,
        "seq": core.seq,
        "final": core.final,
        "proven_bytes": core.prefix_bytes,
        "received_bytes": len(content),
        "request_hash": format_sha256(core.request_body_hash),
        "prefix_hash": _spelled(core.prefix_sha256),
        "output_digest": _spelled(core.output_digest),
        "workload_keyset_digest": format_sha256(core.keyset_digest),
        "evidence_digest": format_sha256(core.gpu.evidence_digest),
        "collected_at": collected_at,
        "key_id": core.key_id,
    }
    return conclude(claims, list(_open_ends(core, len(content), request)), {})


def _open_ends(core: Core, received: int, request: bytes | None) -> Iterator[Finding]:
    yield Finding(
        Tier.WARNING,
        "checkpoint.stream",
        "a whole answer, with its receipt",
        f"{core.prefix_bytes} of {received} bytes that are proven",
        "Rely on nothing behind those bytes; fetch the receipt, which says how the answer ended.",
    )
    yield Finding(
        Tier.WARNING,
        "checkpoint.admission_evidence",
        format_sha256(core.gpu.evidence_digest),
        "not compared",
        "Fetch the receipt: only that proves that the request is in the epoch which it cites.",
    )
    if request is None:
        yield Finding(
            Tier.WARNING,
            "checkpoint.request",
            format_sha256(core.request_body_hash),
            "not compared",
            "Give the bytes that were sent: --request FILE.",
        )
    if core.gpu.verdict == Tier.CONTRAINDICATED:
        yield Finding(
            Tier.CONTRAINDICATED,
            "checkpoint.admission_verdict",
            "evidence that the appliance let through",
            core.gpu.verdict,
            "Do not rely on this answer: the appliance went on against its own verdict.",
        )


class _Prefix:
    """SHA-256 of longer and longer beginnings of a content, which is read once."""

    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)
        self._hash = hashlib.sha256()
        self._end = 0

    def sha256(self, end: int) -> bytes:
        self._hash.update(self._content[self._end : end])
        self._end = end
        return self._hash.digest()


def _checkpoints_in(response: bytes) -> list[Placed]:
    """Of a stream or of a whole answer: an event never begins with a brace."""
    try:
        if not response.lstrip().startswith(b"{"):
            return list(find_checkpoints(response))
        answer = parse_json_object(response, max_nesting=MAX_ANSWER_NESTING)
        checkpoint = checkpoint_of_answer(answer)
    except Malformed as error:  # the hash is the receipt's, so the appliance would have written it
        raise Unbound(f"checkpoint: the response has one that is none: {error.message}") from None
    return [] if checkpoint is None else [Placed(checkpoint, None, len(response), answer)]


def _check_prefix(one: Placed, prefix: _Prefix) -> None:
    core = one.checkpoint.core
    _equal("prefix_bytes", one.start, core.prefix_bytes)
    if one.start is None:
        return
    assert core.prefix_sha256 is not None  # both or neither, see `wire.checkpoint`
    _same("prefix_sha256", prefix.sha256(one.start), core.prefix_sha256)


def _check_envelope(core: Core, receipt: Receipt, log: EventLog) -> None:
    _equal("receipt_id", receipt.receipt_id, core.receipt_id)
    _same("workload_keyset_digest", receipt.keyset_digest, core.keyset_digest)
    _same("request_body_hash", log.received.body_hash, core.request_body_hash)
    _equal_events("gpu", log.admission, core.gpu)


def _check_final(checkpoint: Checkpoint, log: EventLog, *, last: bool, after: bytes) -> None:
    """A final checkpoint is the last and says what the answer says; before it none is final."""
    core = checkpoint.core
    if not core.final:
        return
    if not last or after not in (b"", DONE_EVENT):
        raise Unbound("checkpoint.final: expected nothing but [DONE] behind a final checkpoint")
    if log.ended.outcome != "complete":  # it broke off behind the checkpoint, before the end
        return
    assert log.output is not None  # a complete exchange has one, see `wire.receipt`
    expected, got = log.output.output_digest, core.output_digest
    _equal("output_digest", _spelled(expected), _spelled(got))
    _equal_events("completion", log.completion, checkpoint.completion)


def _check_attestation(
    chunk: JsonObject, checkpoint: Checkpoint, completion: GpuAttested, report: Report
) -> None:
    """What `tee` puts beside a checkpoint is the core, the epoch and the evidence that it cites."""
    attestation = chunk.get("attestation")
    if not isinstance(attestation, dict):
        raise Unbound("attestation: expected it beside a checkpoint with a completion event")
    try:
        shown = parse_presented({name: attestation.get(name) for name in SHOWN})
    except Malformed as error:
        raise Unbound(f"attestation: it does not parse: {error.message}") from None
    if shown.raw != checkpoint.raw:
        raise Unbound("attestation.raw: expected the canonical form of the checkpoint's core")
    if shown.inclusion != completion.inclusion:
        raise Unbound("attestation.inclusion: expected the completion event's")
    if shown.nonce != completion.inclusion.nonce:
        raise Unbound("attestation.nonce: expected the one that follows from the inclusion")
    digest = gpu_evidence_digest(GpuEvidence("", *blobs) for blobs in shown.evidences)
    _same("attestation.evidences", completion.evidence_digest, digest)
    model, resolved = report.workload.get("model"), chunk.get("resolved_model")
    if not isinstance(model, dict) or not isinstance(resolved, dict):
        raise Unbound("resolved_model: expected what the workload manifest names")
    for name in sorted({*RESOLVED_MODEL, *resolved}):
        told = name in RESOLVED_MODEL and name in model and name in resolved
        if not told or model[name] != resolved[name]:
            raise Unbound(f"resolved_model.{name[:64]}: expected the workload manifest's")


def _core_of(completion: GpuAttested) -> bytes:
    assert completion.core_sha256 is not None  # one of the phase completion has it
    return completion.core_sha256


def _spelled(digest: bytes | None) -> str | None:
    return None if digest is None else format_sha256(digest)


def _equal_events(what: str, expected: GpuAttested | None, got: GpuAttested | None) -> None:
    if expected != got:
        raise Unbound(f"checkpoint.{what}: expected the receipt's event")


def _equal(what: str, expected: JsonValue, got: JsonValue) -> None:
    if expected != got:
        raise Unbound(f"checkpoint.{what}: expected {expected}, got {got}")


def _same(what: str, expected: bytes, got: bytes) -> None:
    if expected != got:
        raise Unbound(
            f"checkpoint.{what}: expected {format_sha256(expected)}, got {format_sha256(got)}"
        )
