"""Step 10 of protocol.md section 9: one exchange, as its receipt has it.

A receipt is the appliance's word, signed by a key that the CPU evidence binds. Held against what
the relying party sent and got, and against the GPU evidence that it cites, most of it stops being
a word: which bytes were asked and answered, what the engine was given, and that the GPUs reported
after the request had arrived. What stays a word is said in the claims: the outcome, the times,
usage, and that the engine's settings make it answer the same again.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from appliance.errors import Malformed, Stale, Unbound
from appliance.rats import binding
from appliance.rats.appraise import Context, check_instance
from appliance.rats.gpus import GpuStatement, appraise_gpus, named, together
from appliance.rats.result import AttestationResult, Finding, Tier, conclude
from appliance.wire.canonical import JsonObject, JsonValue, parse_json_object
from appliance.wire.commitments import labelled_hash, request_commitment
from appliance.wire.encoding import format_sha256
from appliance.wire.epoch import EpochEvidence
from appliance.wire.evidence import GpuEvidence
from appliance.wire.identity import PublicKey, split_subject
from appliance.wire.output import Output, output_of_answer, output_of_stream
from appliance.wire.receipt import (
    MAX_BODY_NESTING,
    EventLog,
    GpuAttested,
    Receipt,
    forwarded_bytes,
    forwarded_hash,
    read_events,
    verify_signature,
)
from appliance.wire.report import GpuSection, Report

SCHEME = "receipt"

CONTENT_ADVICE = "Give the bytes themselves: save the bundle with its content."
EPOCH_ADVICE = "Ask the appliance for the epoch that the receipt cites, and keep it."


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is known of one exchange; nothing of it is believed.

    Attributes:
        epochs: the evidence that the receipt cites, in any order; those not at hand are left out.
        request, response: the content bytes that were sent and received; None where they are not
            at hand.
        client_nonce: the 32 bytes that were sent as `X-DCV-Nonce`, where the caller remembers.
    """

    receipt: Receipt
    epochs: tuple[EpochEvidence, ...] = ()
    request: bytes | None = None
    response: bytes | None = None
    client_nonce: bytes | None = None


def appraise_exchange(exchange: Exchange, *, report: Report, context: Context) -> AttestationResult:
    """Step 10.

    Args:
        report: of the keyset that the receipt names. Steps 2 to 9 have been taken on it, or the
            result here means nothing.

    Raises:
        Malformed: the log is not one of dcv/1, or evidence does not parse.
        Unauthentic, Revoked, Stale, Unbound: it does not hold.
    """
    receipt = exchange.receipt
    # 10.1 It is about the keyset of the report, and signed by one of its receipt keys.
    _same("receipt.workload_keyset_digest", report.keyset_digest, receipt.keyset_digest)
    verify_signature(receipt.document, _receipt_key(report, receipt.key_id))
    log = read_events(receipt)
    # 10.2 What was asked and what was answered, byte for byte.
    _check_bodies(exchange, log)
    # 10.3 What the engine got follows from what was asked, and the engine is the one that the
    #      report proves.
    _check_forwarded(exchange, log, report)
    # 10.4 What the answer says, however it was cut into events.
    _check_output(exchange, log)
    # 10.5 The request is committed to, and so is the nonce of whoever asked.
    _check_commitment(exchange, log)
    # 10.6 Evidence: the commitment is in an epoch of this keyset, and the GPUs of the instance
    #      document signed that epoch's nonce. So they reported after the request had arrived.
    cited = [one for one in (log.admission, log.completion) if one is not None]
    epochs = _by_digest(exchange.epochs, cited)
    parts: dict[str, AttestationResult] = {}
    findings = list(_missing(exchange, log, cited))
    for event in cited:
        _check_inclusion(event, log, report)
        epoch = epochs.get(event.evidence_digest)
        if epoch is None:
            continue
        gpus = _appraise_epoch(event, epoch, report, context)
        findings += together(gpus)
        parts |= {f"{event.phase} {name}": result for name, result in named(gpus).items()}
    # 10.7 How it ended, by the appliance's word.
    findings += _outcome_findings(log)
    return conclude(_claims(receipt, log), findings, parts)


def _receipt_key(report: Report, key_id: str) -> PublicKey:
    """By its name; a key with another role, such as the checkpoint key, is not in the list."""
    for key in report.keyset.receipt_keys:
        if key.key_id == key_id:
            return key
    known = " or ".join(key.key_id for key in report.keyset.receipt_keys) or "none"
    raise Unbound(f"receipt.key_id: expected a receipt key of the keyset ({known}), got {key_id}")


def _check_bodies(exchange: Exchange, log: EventLog) -> None:
    if exchange.request is not None:
        got = hashlib.sha256(exchange.request).digest()
        _same("request.received.body_hash", got, log.received.body_hash)
    if exchange.response is not None:
        got = hashlib.sha256(exchange.response).digest()
        _same("response.returned.body_hash", got, log.returned.body_hash)
        if len(exchange.response) != log.ended.bytes:
            raise Unbound(
                f"dcv.ended.bytes: expected {len(exchange.response)}, got {log.ended.bytes}"
            )


def _check_forwarded(exchange: Exchange, log: EventLog, report: Report) -> None:
    if log.engine is None or log.forwarded is None:
        return
    workload, _ = split_subject(report.keyset.subject)
    _same("dcv.engine.workload_digest", workload, log.engine.workload_digest)
    if exchange.request is None:
        return
    request = exchange.request
    try:
        made = forwarded_hash(forwarded_bytes(request, one) for one in log.engine.rewrite)
    except Malformed as error:  # the request's hash is right, so this log cannot be about it
        raise Unbound(f"dcv.engine.rewrite: it does not fit the request: {error.message}") from None
    _same("request.forwarded.body_hash", made, log.forwarded.body_hash)


def _check_output(exchange: Exchange, log: EventLog) -> None:
    if exchange.response is None or log.output is None or log.output.output_digest is None:
        return
    try:
        output = _output_of(exchange.response)
        digest = output.digest
    except Malformed as error:
        raise Unbound(f"dcv.output: the response is no answer: {error.message}") from None
    _same("dcv.output.output_digest", digest, log.output.output_digest)
    if output.finish_reasons != log.output.finish_reasons:
        raise Unbound(
            f"dcv.output.finish_reasons: expected {list(output.finish_reasons)}, "
            f"got {list(log.output.finish_reasons)}"
        )


def _output_of(response: bytes) -> Output:
    """Of a stream or of a whole answer: an event never begins with a brace."""
    bound = len(response)  # a text is no longer than its JSON
    if response.lstrip().startswith(b"{"):
        answer = parse_json_object(response, max_nesting=MAX_BODY_NESTING)
        return output_of_answer(answer, max_bytes=bound)
    return output_of_stream(response, max_bytes=bound)


def _check_commitment(exchange: Exchange, log: EventLog) -> None:
    receipt, committed = exchange.receipt, log.committed
    try:
        made = request_commitment(
            receipt.receipt_id,
            receipt.endpoint,
            client_nonce=committed.client_nonce,
            body_sha256=log.received.body_hash,
            blind=committed.blind,
        )
    except UnicodeEncodeError:
        raise Malformed("receipt: expected receipt_id and endpoint in ASCII") from None
    _same("dcv.request.commitment", made, committed.commitment)
    if exchange.client_nonce is not None and exchange.client_nonce != committed.client_nonce:
        got = "none" if committed.client_nonce is None else committed.client_nonce.hex()
        raise Unbound(
            f"dcv.request.client_nonce: expected {exchange.client_nonce.hex()}, got {got}"
        )


def _check_inclusion(event: GpuAttested, log: EventLog, report: Report) -> None:
    commitment = log.committed.commitment
    if event.core_sha256 is not None:
        commitment = labelled_hash("dcv/1 completion", event.core_sha256)
    binding.check_inclusion(event.inclusion, commitment, report.keyset_digest)
    if not event.collected_at < report.keyset.not_after:
        raise Stale(
            f"dcv.gpu.attested.collected_at: expected before the keyset's not_after "
            f"{report.keyset.not_after}, got {event.collected_at}"
        )


def _by_digest(
    epochs: Sequence[EpochEvidence], cited: Sequence[GpuAttested]
) -> dict[bytes, EpochEvidence]:
    """The epochs by the digest under which they are cited.

    Raises:
        Unbound: one is not cited, such as another exchange's.
    """
    digests = [event.evidence_digest for event in cited]
    for epoch in epochs:
        if epoch.evidence_digest not in digests:
            expected = " or ".join(map(format_sha256, digests)) or "none"
            got = format_sha256(epoch.evidence_digest)
            raise Unbound(f"evidence_digest: expected {expected}, got {got}")
    return {epoch.evidence_digest: epoch for epoch in epochs}


def _appraise_epoch(
    event: GpuAttested, epoch: EpochEvidence, report: Report, context: Context
) -> tuple[GpuStatement, ...]:
    inclusion = event.inclusion
    # The epoch says again what the receipt says; two that differ are not of one exchange.
    _same("epoch.keyset_digest", inclusion.keyset_digest, epoch.keyset_digest)
    _same("epoch.root", inclusion.root, epoch.root)
    for name, expected, got in (
        ("tree_size", inclusion.tree_size, epoch.tree_size),
        ("collected_at", event.collected_at, epoch.collected_at),
    ):
        if expected != got:
            raise Unbound(f"epoch.{name}: expected {expected}, got {got}")
    binding.check_evidence_digest(GpuSection(event.evidence_digest, inclusion, epoch.gpus))
    gpus = appraise_gpus(
        [_endorsed(one, report) for one in epoch.gpus],
        nonce=inclusion.nonce,
        policy=context.policy,
        anchors=context.anchors,
        at=context.at,
        memory=context.memory,
    )
    check_instance(report, gpus)
    return gpus


def _endorsed(gpu: GpuEvidence, report: Report) -> GpuEvidence:
    """With the reference values and revocation answers that the report has for this device: an
    epoch is kept without them. They are the vendor's, whoever hands them over."""
    for known in report.gpu.gpus:
        if known.certificate_chain == gpu.certificate_chain:
            return replace(gpu, rims=gpu.rims or known.rims, ocsp=gpu.ocsp or known.ocsp)
    return gpu


def _missing(exchange: Exchange, log: EventLog, cited: list[GpuAttested]) -> Iterator[Finding]:
    """What could have been compared and was not there."""
    if exchange.request is None:
        yield _not_compared("request", format_sha256(log.received.body_hash), CONTENT_ADVICE)
    if exchange.response is None:
        yield _not_compared("response", format_sha256(log.returned.body_hash), CONTENT_ADVICE)
    known = {one.evidence_digest for one in exchange.epochs}
    for event in cited:
        if event.evidence_digest not in known:
            digest = format_sha256(event.evidence_digest)
            yield _not_compared(f"{event.phase}_evidence", digest, EPOCH_ADVICE)
    output = log.output
    if (
        output is not None
        and output.output_digest is None
        and "embeddings" not in (exchange.receipt.endpoint)
    ):
        yield Finding(
            Tier.WARNING,
            "receipt.output_digest",
            "a digest of what the answer says",
            "none",
            "Rely on the response's bytes: the appliance could not read this answer again.",
        )


def _not_compared(what: str, expected: str, advice: str) -> Finding:
    return Finding(Tier.WARNING, f"receipt.{what}", expected, "not compared", advice)


def _outcome_findings(log: EventLog) -> Iterator[Finding]:
    if log.ended.outcome != "complete":
        code = "" if log.ended.code is None else f" ({log.ended.code})"
        yield Finding(
            Tier.WARNING,
            "receipt.outcome",
            "complete",
            f"{log.ended.outcome}{code}",
            "Do not take this answer for a whole one; ask again.",
        )


def _claims(receipt: Receipt, log: EventLog) -> JsonObject:
    """What was signed, as far as it is for people and scripts; digests as the receipt spells them."""
    claims: JsonObject = {
        "scheme": SCHEME,
        "receipt_id": receipt.receipt_id,
        "chat_id": receipt.chat_id,
        "model": receipt.model,
        "endpoint": receipt.endpoint,
        "served_at": {"time": _time(receipt.served_at), "word_of": "the appliance"},
        "workload_keyset_digest": format_sha256(receipt.keyset_digest),
        "key_id": receipt.key_id,
        "request_hash": format_sha256(log.received.body_hash),
        "response_hash": format_sha256(log.returned.body_hash),
        "outcome": log.ended.outcome,
        "code": log.ended.code,
        "bytes": log.ended.bytes,
    }
    if log.admission is not None:
        claims["evidence_digest"] = format_sha256(log.admission.evidence_digest)
    if log.engine is not None:
        claims["workload_digest"] = format_sha256(log.engine.workload_digest)
        claims["seed"] = str(log.engine.seed)
        claims["deterministic"] = log.engine.deterministic
    if log.output is not None:
        reasons: list[JsonValue] = list(log.output.finish_reasons)
        digest = log.output.output_digest
        claims["output_digest"] = None if digest is None else format_sha256(digest)
        claims["finish_reasons"] = reasons
        claims["usage"] = log.output.usage
    return claims


def _time(seconds: int) -> str:
    """RFC 3339, UTC; a number that is no time as it stands."""
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def _same(what: str, expected: bytes, got: bytes) -> None:
    if expected != got:
        raise Unbound(f"{what}: expected {format_sha256(expected)}, got {format_sha256(got)}")
