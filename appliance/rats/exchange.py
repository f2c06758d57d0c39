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
from appliance.rats.appraise import MAX_KEYSET_S, Context, check_instance
from appliance.rats.checkpoints import check_checkpoints
from appliance.rats.forwarded import check_forwarded, check_rewrites, read_request
from appliance.rats.gpus import GpuStatement, appraise_gpus, named, summary, together
from appliance.rats.result import SEVERITY, AttestationResult, Finding, Tier, conclude
from appliance.wire.canonical import (
    JsonObject,
    JsonValue,
    canonical_json,
    parse_json_object,
)
from appliance.wire.commitments import (
    NO_GPU_EVIDENCE,
    completion_commitment_of,
    request_commitment,
)
from appliance.wire.encoding import format_sha256
from appliance.wire.epoch import EpochEvidence
from appliance.wire.evidence import GpuEvidence
from appliance.wire.identity import PublicKey, split_subject
from appliance.wire.openai import Endpoint, InferenceRequest, endpoint_of
from appliance.wire.output import (
    Output,
    embeddings_of_answer,
    output_of_answer,
    read_stream,
)
from appliance.wire.receipt import (
    MAX_BODY_NESTING,
    EventLog,
    GpuAttested,
    OutputComplete,
    Receipt,
    read_events,
    verify_signature,
)
from appliance.wire.report import GpuSection, Report
from appliance.wire.sse import DONE_EVENT

SCHEME = "receipt"

CLOCK_SKEW_S = 5 * 60
"""Of two clocks, or of one that was set meanwhile; that of section 9, step 7."""

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
    endpoint = _check_envelope(receipt, log, report)
    _check_times(receipt, log, report, context.at)
    # 10.2 What was asked and what was answered, byte for byte.
    _check_bodies(exchange, log)
    # 10.3 What the engine got follows from what was asked by the published rules, and the engine
    #      is the one that the report proves.
    wanted = _check_asked(exchange, log, endpoint, report)
    # 10.4 What the answer says, however it was cut into events, and that it is all of it.
    _check_answer(exchange, log, endpoint, wanted)
    # 10.5 The request is committed to, and so is the nonce of whoever asked.
    _check_commitment(exchange, log)
    # 10.6 Evidence: the commitment is in an epoch of this keyset, and the GPUs of the instance
    #      document signed that epoch's nonce. So they reported after the request had arrived.
    cited = [one for one in (log.admission, log.completion) if one is not None]
    epochs = _by_digest(exchange.epochs, cited)
    parts: dict[str, AttestationResult] = {}
    findings = [*_missing(exchange, log, endpoint, cited), *_contradicted(cited)]
    for event in cited:
        _check_inclusion(event, log, report)
        epoch = epochs.get(event.evidence_digest)
        if event.evidence_digest == NO_GPU_EVIDENCE:
            epoch = _epoch_without_gpus(event)
        if epoch is None:
            continue
        gpus = _appraise_epoch(event, epoch, report, context)
        findings += together(gpus)
        findings += _better_word(event, summary(gpus).verdict)
        parts |= {f"{event.phase} {name}": result for name, result in named(gpus).items()}
    # 10.7 What the answer says of itself: signed by the other key, about the same bytes.
    claims = _claims(receipt, log)
    if exchange.response is not None:
        claims["checkpoints"] = check_checkpoints(
            exchange.response, receipt=receipt, log=log, report=report
        )
    # 10.8 How it ended, by the appliance's word.
    findings += _outcome_findings(log)
    return conclude(claims, findings, parts)


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


def _check_envelope(receipt: Receipt, log: EventLog, report: Report) -> Endpoint:
    """What every answer is: a POST to a path that is served, from the model that is. Returns what
    is served there."""
    if receipt.method != "POST":
        raise Unbound(f"receipt.method: expected POST, got {receipt.method[:64]}")
    endpoint = endpoint_of(receipt.endpoint)
    if endpoint is None:
        raise Unbound("receipt.endpoint: expected the path of an inference endpoint")
    # Both are known from the moment when a request was understood, and it is not forwarded before.
    if log.forwarded is not None and (receipt.model is None or receipt.chat_id is None):
        raise Unbound("receipt: expected model and chat_id of a request that was forwarded")
    served = _manifest(report, "model").get("id")
    if receipt.model is not None and receipt.model != served:
        raise Unbound(f"receipt.model: expected {served}, got {receipt.model}")
    return endpoint


def _check_times(receipt: Receipt, log: EventLog, report: Report, at: datetime.datetime) -> None:
    """Word of the appliance, but not any: nothing happens before its keyset, the answer not before
    its evidence, and not later than it is looked at.

    A stream may outlive its keyset's `not_after`; what was collected before it was, see
    `_check_inclusion`.
    """
    since = report.keyset.not_after - MAX_KEYSET_S
    collected = [one.collected_at for one in (log.admission, log.completion) if one is not None]
    if min([receipt.served_at, *collected]) < since:
        raise Stale(f"receipt: expected times of its keyset, which is not older than {since}")
    if max(collected, default=0) > receipt.served_at + CLOCK_SKEW_S:
        raise Stale(
            f"receipt.served_at: expected after its evidence of {max(collected)}, "
            f"got {receipt.served_at}"
        )
    if receipt.served_at > at.timestamp() + CLOCK_SKEW_S:
        raise Stale(
            f"receipt.served_at: expected not after {at.timestamp():.0f}, got {receipt.served_at}"
        )


def _check_asked(
    exchange: Exchange, log: EventLog, endpoint: Endpoint, report: Report
) -> InferenceRequest | None:
    """Returns what was asked; None where nothing was forwarded, or the request is not at hand."""
    receipt, engine = exchange.receipt, log.engine
    if engine is None or log.forwarded is None:
        return None
    workload, _ = split_subject(report.keyset.subject)
    _same("dcv.engine.workload_digest", workload, engine.workload_digest)
    promised = _manifest(report, "engine").get("deterministic") is True
    if engine.deterministic is not promised:
        raise Unbound(
            f"dcv.engine.deterministic: expected the manifest's {promised}, "
            f"got {engine.deterministic}"
        )
    response_id = str(receipt.chat_id)  # a text, see `_check_envelope`
    check_rewrites(engine, endpoint, response_id)
    if exchange.request is None:
        return None
    wanted = read_request(exchange.request, endpoint)
    if wanted.model != receipt.model:
        raise Unbound(f"receipt.model: expected {wanted.model}, got {receipt.model}")
    check_forwarded(wanted, engine, response_id, log.forwarded.body_hash)
    return wanted


def _manifest(report: Report, name: str) -> JsonObject:
    part = report.workload.get(name)
    return part if isinstance(part, dict) else {}


def _check_answer(
    exchange: Exchange, log: EventLog, endpoint: Endpoint, wanted: InferenceRequest | None
) -> None:
    """There is an output only of an answer that is complete."""
    response, told = exchange.response, log.output
    if told is None or log.engine is None:
        return
    if endpoint is Endpoint.EMBEDDINGS:
        _check_embeddings(response, told, wanted)
        return
    choices = len(log.engine.rewrite)
    if told.output_digest is not None and len(told.finish_reasons) != choices:
        raise Unbound(
            f"dcv.output.finish_reasons: expected {choices}, one per choice, "
            f"got {len(told.finish_reasons)}"
        )
    if response is None:
        return
    streamed = _is_stream(response)
    if wanted is not None and wanted.stream is not streamed:
        expected, got = ("a stream", "none") if wanted.stream else ("no stream", "one")
        raise Unbound(f"response: expected {expected}, as it was asked for, got {got}")
    ended = response.endswith(DONE_EVENT) and response.count(DONE_EVENT) == 1
    if streamed and log.ended.outcome == "complete" and not ended:
        raise Unbound("response: expected [DONE] once and last in a stream that is complete")
    if told.output_digest is None:
        return
    try:
        answer = read_answer(response)
        digest = answer.output.digest
    except Malformed as error:
        raise Unbound(f"dcv.output: the response is no answer: {error.message}") from None
    _same("dcv.output.output_digest", digest, told.output_digest)
    if answer.output.finish_reasons != told.finish_reasons:
        raise Unbound(
            f"dcv.output.finish_reasons: expected {list(answer.output.finish_reasons)}, "
            f"got {list(told.finish_reasons)}"
        )
    _check_form(answer, exchange.receipt, endpoint)


def _check_embeddings(
    response: bytes | None, told: OutputComplete, wanted: InferenceRequest | None
) -> None:
    """They have no output digest, so what they say is held to the receipt by the response's hash
    alone; here, that it is as many embeddings as were asked for."""
    if told.output_digest is not None or told.finish_reasons:
        raise Unbound("dcv.output: expected no output_digest and no finish_reasons of embeddings")
    if response is None:
        return
    try:
        answer = parse_json_object(response, max_nesting=MAX_BODY_NESTING)
        embeddings = embeddings_of_answer(answer)
        count = len(embeddings.vectors())
    except Malformed as error:
        raise Unbound(f"dcv.output: the response is no answer: {error.message}") from None
    if "error" in answer:
        raise Unbound("response: expected no error in an answer that is complete")
    if wanted is not None and count != wanted.inputs:
        raise Unbound(f"response: expected {wanted.inputs} embeddings, got {count}")
    if embeddings.usage != told.usage:
        raise Unbound("dcv.output.usage: expected that of the answer")


def _check_form(answer: Answer, receipt: Receipt, endpoint: Endpoint) -> None:
    """A whole answer of this endpoint, under the receipt's name for it."""
    if not answer.ended:
        raise Unbound("response: expected no error in an answer that is complete")
    member = "message" if endpoint is Endpoint.CHAT else "text"
    if not all(member in choice for choice in answer.output.choices):
        raise Unbound(f"response: expected choices with a {member}, as {receipt.endpoint} gives")
    if answer.ids - {receipt.chat_id}:
        raise Unbound(f"receipt.chat_id: expected the id of the answer, got {receipt.chat_id}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the content bytes of an answer say.

    Attributes:
        ids: every `id` that it names itself by.
        ended: it tells no error; a stream ends with `[DONE]`, which is there once.
    """

    output: Output
    ids: frozenset[str]
    ended: bool


def read_answer(response: bytes) -> Answer:
    """Of a stream or of a whole answer.

    Raises:
        Malformed: they are no answer.
    """
    bound = len(response)  # a text is no longer than its JSON
    if _is_stream(response):
        read = read_stream(response, max_bytes=bound)
        return Answer(read.output, read.ids, read.ended)
    answer = parse_json_object(response, max_nesting=MAX_BODY_NESTING)
    ids = frozenset([str(answer["id"])] if "id" in answer else [])
    return Answer(output_of_answer(answer, max_bytes=bound), ids, "error" not in answer)


def output_of_response(response: bytes) -> Output:
    """What the content bytes of an answer say.

    Raises:
        Malformed: they are no answer.
    """
    return read_answer(response).output


def _is_stream(response: bytes) -> bool:
    """An event never begins with a brace."""
    return not response.lstrip().startswith(b"{")


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
    commitment, keyset_digest = log.committed.commitment, report.keyset_digest
    not_after: int | None = report.keyset.not_after
    if event.core_sha256 is not None:
        commitment = completion_commitment_of(event.core_sha256)
        if event.inclusion.keyset_digest != keyset_digest:
            keyset_digest = event.inclusion.keyset_digest
            not_after = _renewed_not_after(report, keyset_digest, event.collected_at)
    if not_after is None:
        raise Unbound(
            f"inclusion.keyset_digest: expected {format_sha256(report.keyset_digest)} or a later "
            f"keyset with its subject and keys, got {format_sha256(keyset_digest)}"
        )
    binding.check_inclusion(event.inclusion, commitment, keyset_digest)
    if not event.collected_at < not_after:
        raise Stale(
            f"dcv.gpu.attested.collected_at: expected before the keyset's not_after "
            f"{not_after}, got {event.collected_at}"
        )


def _renewed_not_after(report: Report, digest: bytes, collected_at: int) -> int | None:
    """`not_after` of the keyset of this digest, if that is the report's renewed: with the same
    subject and keys (section 2). None if there is no such keyset.

    A renewed keyset differs in nothing but `not_after`, a whole second within a day of when it was
    current (section 9, step 7). So it needs not be at hand: one of the seconds has its digest.
    """
    document = report.keyset_document
    head = {name: value for name, value in document.items() if name < "not_after"}
    tail = {name: value for name, value in document.items() if name > "not_after"}
    before = hashlib.sha256(canonical_json(head)[:-1] + b',"not_after":')
    after = b"," + canonical_json(tail)[1:]
    first = max(report.keyset.not_after, collected_at) + 1
    for not_after in range(first, collected_at + MAX_KEYSET_S + 1):
        tried = before.copy()
        tried.update(b"%d" % not_after + after)
        if tried.digest() == digest:
            return not_after
    return None


def _by_digest(
    epochs: Sequence[EpochEvidence], cited: Sequence[GpuAttested]
) -> dict[bytes, EpochEvidence]:
    """The epochs by the digest under which they are cited.

    Raises:
        Unbound: one is not cited, such as another exchange's, or is there twice, such as once
            forged: of two only one would be looked at.
    """
    digests = [event.evidence_digest for event in cited]
    for epoch in epochs:
        if epoch.evidence_digest not in digests:
            expected = " or ".join(map(format_sha256, digests)) or "none"
            got = format_sha256(epoch.evidence_digest)
            raise Unbound(f"evidence_digest: expected {expected}, got {got}")
    found = {epoch.evidence_digest: epoch for epoch in epochs}
    if len(found) != len(epochs):
        raise Unbound("evidence_digest: expected every epoch once, got one twice")
    return found


def _epoch_without_gpus(event: GpuAttested) -> EpochEvidence:
    """All there is to say of one, the receipt says. Whether no GPUs are enough is policy's to say,
    as it is with the report's."""
    inclusion = event.inclusion
    return EpochEvidence(
        evidence_digest=event.evidence_digest,
        keyset_digest=inclusion.keyset_digest,
        tree_size=inclusion.tree_size,
        root=inclusion.root,
        collected_at=event.collected_at,
        gpus=(),
    )


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


def _missing(
    exchange: Exchange, log: EventLog, endpoint: Endpoint, cited: list[GpuAttested]
) -> Iterator[Finding]:
    """What could have been compared and was not there."""
    if exchange.request is None:
        yield _not_compared("request", format_sha256(log.received.body_hash), CONTENT_ADVICE)
    if exchange.response is None:
        yield _not_compared("response", format_sha256(log.returned.body_hash), CONTENT_ADVICE)
    known = {NO_GPU_EVIDENCE, *(one.evidence_digest for one in exchange.epochs)}
    for event in cited:
        if event.evidence_digest not in known:
            digest = format_sha256(event.evidence_digest)
            yield _not_compared(f"{event.phase}_evidence", digest, EPOCH_ADVICE)
    digestible = endpoint is not Endpoint.EMBEDDINGS  # section 5: "null for embeddings"
    if digestible and log.output is not None and log.output.output_digest is None:
        yield Finding(
            Tier.WARNING,
            "receipt.output_digest",
            "a digest of what the answer says",
            "none",
            "Rely on the response's bytes: the appliance could not read this answer again.",
        )


def _not_compared(what: str, expected: str, advice: str) -> Finding:
    return Finding(Tier.WARNING, f"receipt.{what}", expected, "not compared", advice)


def _contradicted(cited: Sequence[GpuAttested]) -> Iterator[Finding]:
    """Evidence that the appliance itself found contraindicated admits nothing, and proves nothing
    that was finished."""
    for event in cited:
        if event.verdict == Tier.CONTRAINDICATED:
            yield Finding(
                Tier.CONTRAINDICATED,
                f"receipt.{event.phase}_verdict",
                "evidence that the appliance let through",
                event.verdict,
                "Do not rely on this answer: the appliance went on against its own verdict.",
            )


def _better_word(event: GpuAttested, ours: Tier) -> Iterator[Finding]:
    """The appliance had another policy, or says more than there is."""
    if SEVERITY[Tier(event.verdict)] < SEVERITY[ours]:
        yield Finding(
            Tier.WARNING,
            f"receipt.{event.phase}_verdict",
            ours.value,
            event.verdict,
            "Rely on the findings about the evidence, not on the appliance's word about it.",
        )


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
    if log.completion is not None:
        claims["completion_evidence_digest"] = format_sha256(log.completion.evidence_digest)
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
