"""One exchange, from its body to its receipt.

An `ExchangeRecord` is opened once the body is there, told what happens, and ended once: its
receipt says what was asked, under which evidence, what the engine got, and every byte that was
answered, whichever way it ended (protocol.md section 5). Ending is synchronous, so that it also
works while the exchange's task is being cancelled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from appliance.errors import (
    ApplianceError,
    AttestationFailed,
    AttesterError,
    EngineError,
    EvidenceError,
    Malformed,
    NotServing,
)
from appliance.serving.auth import Tenant
from appliance.serving.epochs import Attested
from appliance.serving.identity import Identity
from appliance.serving.receipts import ReceiptStore, SignedReceipt
from appliance.serving.shown_evidence import shown_evidence
from appliance.serving.transcript import Transcript
from appliance.wire.canonical import JsonObject, canonical_json
from appliance.wire.checkpoint import RESOLVED_MODEL, Core, sign_checkpoint
from appliance.wire.commitments import request_commitment
from appliance.wire.openai import ChoicePlan, InferenceRequest
from appliance.wire.output import Output, output_of_answer
from appliance.wire.receipt import (
    MAX_TEXT,
    NO_SEED,
    Ended,
    EngineUsed,
    EventLog,
    GpuAttested,
    Outcome,
    OutputComplete,
    Phase,
    RequestCommitted,
    RequestForwarded,
    RequestReceived,
    ResponseReturned,
    is_usage,
    receipt_document,
    rewrite_of,
    sign_receipt,
)

RECEIPT_ID_BYTES = 16
BLIND_BYTES = 32


@dataclass(frozen=True, slots=True)
class ReceiptDesk:
    """Where records are opened.

    Attributes:
        keyset_digest: the current one, 32 bytes.
        max_bytes: of one answer's text that is read again for its output digest.
        random: so many random bytes. now: Unix seconds.
    """

    identity: Identity
    store: ReceiptStore
    keyset_digest: Callable[[], bytes]
    max_bytes: int
    random: Callable[[int], bytes]
    now: Callable[[], float]

    def open(
        self, tenant: Tenant, *, endpoint: str, raw: bytes, client_nonce: bytes | None
    ) -> ExchangeRecord:
        """A record for a request whose body has been read.

        Args:
            endpoint: the path as received, without query; ASCII.
            raw: the wire body.
            client_nonce: 32 bytes from `X-DCV-Nonce`, if it came.
        """
        return ExchangeRecord(self, tenant, endpoint=endpoint, raw=raw, client_nonce=client_nonce)


class ExchangeRecord:
    """What becomes one exchange's receipt. Its `repr` shows no content, and it holds none but the
    text of a stream until that has been digested.

    Attributes:
        receipt_id: 32 hex digits.
        commitment: 32 bytes, the leaf of this request in its epoch.
    """

    def __init__(
        self,
        desk: ReceiptDesk,
        tenant: Tenant,
        *,
        endpoint: str,
        raw: bytes,
        client_nonce: bytes | None,
    ) -> None:
        self._desk = desk
        self._tenant = tenant
        self._endpoint = endpoint
        self.receipt_id = desk.random(RECEIPT_ID_BYTES).hex()
        body_sha256, blind = hashlib.sha256(raw).digest(), desk.random(BLIND_BYTES)
        self.commitment = request_commitment(
            self.receipt_id,
            endpoint,
            client_nonce=client_nonce,
            body_sha256=body_sha256,
            blind=blind,
        )
        self._received = RequestReceived(body_sha256)
        self._committed = RequestCommitted(self.commitment, client_nonce, blind)
        self._keyset_digest = desk.keyset_digest()
        self._model: str | None = None
        self._chat_id: str | None = None
        self._attested: Attested | None = None
        self._forwarded: RequestForwarded | None = None
        self._engine: EngineUsed | None = None
        self._output: Output | None = None
        self._completion: Attested | None = None
        self._core_sha256: bytes | None = None
        self._checkpoints = 0
        self._streams = False
        self._transcript = Transcript(max_bytes=desk.max_bytes, streams=False)
        self._ended = False

    def understood(self, wanted: InferenceRequest, chat_id: str) -> None:
        """The request was read; a stream's events are followed from here on."""
        self._model = wanted.model
        self._chat_id = chat_id
        self._streams = wanted.stream
        self._transcript = Transcript(max_bytes=self._desk.max_bytes, streams=wanted.stream)

    def begin(self) -> None:
        """Its receipt may be asked for from now on. Early: while evidence is collected it comes to
        disk, mostly before the client hears the receipt's id. Nothing waits for that."""
        self._desk.store.begin(self.receipt_id, chat_id=self._chat_id, tenant=self._tenant.id)

    def forget(self) -> None:
        """It leaves no receipt after all."""
        self._ended = True
        self._desk.store.forget(self.receipt_id)

    def admitted(self, attested: Attested) -> None:
        """Evidence that covers the request was appraised; its keyset is the exchange's."""
        self._attested = attested
        self._keyset_digest = attested.epoch.keyset_digest
        self._desk.store.add_epoch(attested.epoch)

    def forwarded(self, body_hash: bytes, plans: Sequence[ChoicePlan]) -> None:
        """The engine is about to get these requests.

        Args:
            body_hash: over all of them, 32 bytes (`relay.prepare`).
        """
        identity = self._desk.identity
        engine = identity.manifest["engine"]
        assert isinstance(engine, dict)
        self._forwarded = RequestForwarded(body_hash)
        self._engine = EngineUsed(
            workload_digest=identity.workload_digest,
            seed=int(str(plans[0].set.get("seed", NO_SEED))),
            deterministic=engine["deterministic"] is True,
            rewrite=tuple(rewrite_of(plan) for plan in plans),
        )

    def write(self, data: bytes) -> None:
        """Content bytes go out."""
        self._transcript.write(data)

    def answered(self, answer: JsonObject) -> None:
        """This is the whole answer, to be written in one piece."""
        try:
            self._output = output_of_answer(answer, max_bytes=self._desk.max_bytes)
        except Malformed:  # handed on all the same: it is the client's to judge
            self._output = None

    def running_checkpoint(self) -> JsonObject:
        """A signed checkpoint of a stream so far; what is written next is the event it is in."""
        return self._sign(self._core(final=False), None)

    def final_core(self) -> Core:
        """The core of the last checkpoint: the whole answer is there, in a stream all but this
        checkpoint's own event was written. What is written from now on is no answer any more."""
        if self._streams:
            self._output = self._transcript.output()
        return self._core(final=True)

    def final_members(self, core: Core, attested: Attested | None) -> JsonObject:
        """What the answer ends with: `dcv`, the signed checkpoint; with completion evidence also
        `attestation` and `resolved_model`.

        Args:
            core: as `final_core` made it.
            attested: the epoch that covers its commitment; None unless that was asked for.
        """
        if attested is None:
            return {"dcv": self._sign(core, None)}
        raw = canonical_json(core.to_json())
        self._completion, self._core_sha256 = attested, hashlib.sha256(raw).digest()
        self._desk.store.add_epoch(attested.epoch)
        identity = self._desk.identity
        model = identity.manifest["model"]
        assert isinstance(model, dict)
        return {
            "dcv": self._sign(core, self._completion_event()),
            "attestation": {
                "raw": raw.decode("utf-8"),
                **shown_evidence(attested, identity, issued_at=int(self._desk.now())),
            },
            "resolved_model": {name: model[name] for name in RESOLVED_MODEL},
        }

    def _core(self, *, final: bool) -> Core:
        assert self._attested is not None
        prefix = self._transcript.prefix() if self._streams else None
        output = self._output_event(self._output) if final else None
        core = Core(
            seq=self._checkpoints,
            final=final,
            receipt_id=self.receipt_id,
            keyset_digest=self._keyset_digest,
            request_body_hash=self._received.body_hash,
            prefix_bytes=None if prefix is None else prefix.size,
            prefix_sha256=None if prefix is None else prefix.sha256,
            output_digest=None if output is None else output.output_digest,
            gpu=_event(self._attested, "admission"),
            key_id=self._desk.identity.checkpoint_key.public.key_id,
        )
        self._checkpoints += 1
        return core

    def _sign(self, core: Core, completion: GpuAttested | None) -> JsonObject:
        return sign_checkpoint(core, completion, sign=self._desk.identity.checkpoint_key.sign)

    def _completion_event(self) -> GpuAttested | None:
        if self._completion is None:
            return None
        return _event(self._completion, "completion", self._core_sha256)

    def complete(self) -> None:
        """The last byte of a whole answer has gone out."""
        self._end("complete", None)

    def failed(self, error: ApplianceError) -> None:
        """It was ended, or refused, for this reason. No effect on an exchange that has ended."""
        self._end(self._outcome_of(error), error.code)

    def abandoned(self) -> None:
        """The client went away. No effect on an exchange that has ended."""
        self._end("client_disconnected", None)

    def _outcome_of(self, error: ApplianceError) -> Outcome:
        if self._forwarded is None:
            return "refused"
        match error:
            case EngineError():
                return "engine_failed"
            case NotServing():
                return "drained"
            case AttestationFailed():
                # Of the finished answer, which is kept back or left without its end. Evidence that
                # does not hold withdraws the appliance, a device that fails once does not.
                withdrawn = isinstance(error.__cause__, EvidenceError)
                return "withdrawn" if withdrawn else "refused"
            case AttesterError() | EvidenceError():
                return "withdrawn"
            case _:  # a defect of ours, too: the appliance would not go on
                return "refused"

    def _output_event(self, output: Output | None) -> OutputComplete:
        """An answer that cannot be read again has no digest; its bytes are in the response's hash.

        What the engine tells must never keep an exchange from its receipt. So an answer with usage
        that no receipt can have, such as a number beyond 2^53, counts as one that cannot be read:
        a verifier, who reads strictly, could not. So does one without a choice for every request.
        """
        if output is None or not is_usage(output.usage):
            return OutputComplete(None, (), None)
        reasons = output.finish_reasons
        fits = all(one is None or 0 < len(one) <= MAX_TEXT for one in reasons)
        if self._engine is None or len(reasons) != len(self._engine.rewrite) or not fits:
            return OutputComplete(None, (), output.usage)
        try:
            digest = output.digest
        except Malformed:
            digest = None
        return OutputComplete(digest, reasons, output.usage)

    def _end(self, outcome: Outcome, code: str | None) -> None:
        if self._ended:
            return
        self._ended = True
        desk, attested, written = self._desk, self._attested, self._transcript.prefix()
        complete = completion = None
        if outcome == "complete":
            complete = self._output_event(self._output or self._transcript.output())
            completion = self._completion
        document = receipt_document(
            receipt_id=self.receipt_id,
            chat_id=self._chat_id,
            model=self._model,
            keyset_digest=self._keyset_digest,
            endpoint=self._endpoint,
            method="POST",
            served_at=int(desk.now()),
            events=EventLog(
                received=self._received,
                committed=self._committed,
                admission=None if attested is None else _event(attested, "admission"),
                forwarded=self._forwarded,
                engine=self._engine,
                output=complete,
                completion=None if completion is None else self._completion_event(),
                ended=Ended(outcome, code, written.size),
                returned=ResponseReturned(written.sha256),
            ),
        )
        key = desk.identity.receipt_key
        desk.store.add(
            SignedReceipt(
                receipt_id=self.receipt_id,
                chat_id=self._chat_id,
                tenant=self._tenant.id,
                keyset_digest=self._keyset_digest,
                evidence=tuple(
                    one.epoch.evidence_digest for one in (attested, completion) if one is not None
                ),
                data=sign_receipt(document, key_id=key.public.key_id, sign=key.sign),
            )
        )


def _event(attested: Attested, phase: Phase, core_sha256: bytes | None = None) -> GpuAttested:
    epoch = attested.epoch
    return GpuAttested(
        phase=phase,
        evidence_digest=epoch.evidence_digest,
        inclusion=attested.inclusion,
        verdict=epoch.result.verdict.value,
        collected_at=int(epoch.collected_at),
        core_sha256=core_sha256,
    )
