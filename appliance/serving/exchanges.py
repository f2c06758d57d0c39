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
from appliance.serving.transcript import Transcript
from appliance.wire.canonical import JsonObject
from appliance.wire.commitments import request_commitment
from appliance.wire.openai import ChoicePlan, InferenceRequest, forwarded_body
from appliance.wire.output import Output, output_of_answer
from appliance.wire.receipt import (
    Ended,
    EngineUsed,
    EventLog,
    GpuAttested,
    Outcome,
    OutputComplete,
    RequestCommitted,
    RequestForwarded,
    RequestReceived,
    ResponseReturned,
    forwarded_hash,
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
        self._transcript = Transcript(max_bytes=desk.max_bytes, streams=False)
        self._ended = False

    def understood(self, wanted: InferenceRequest, chat_id: str) -> None:
        """The request was read; a stream's events are followed from here on."""
        self._model = wanted.model
        self._chat_id = chat_id
        self._transcript = Transcript(max_bytes=self._desk.max_bytes, streams=wanted.stream)

    def begin(self) -> None:
        """Its receipt may be asked for from now on. Early, so that it is on disk before the client
        hears the receipt's id."""
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

    def forwarded(self, body: JsonObject, plans: Sequence[ChoicePlan]) -> None:
        """The engine is about to get these requests."""
        identity = self._desk.identity
        engine = identity.manifest["engine"]
        assert isinstance(engine, dict)
        self._forwarded = RequestForwarded(
            forwarded_hash(forwarded_body(body, plan) for plan in plans)
        )
        self._engine = EngineUsed(
            workload_digest=identity.workload_digest,
            seed=int(str(plans[0].set["seed"])),
            deterministic=engine["deterministic"] is True,
            rewrite=tuple(rewrite_of(plan) for plan in plans),
        )

    def write(self, data: bytes) -> None:
        """Content bytes go out."""
        self._transcript.write(data)

    def answered(self, data: bytes, answer: JsonObject) -> None:
        """The whole answer goes out in one piece."""
        self._transcript.write(data)
        try:
            self._output = output_of_answer(answer, max_bytes=self._desk.max_bytes)
        except Malformed:  # handed on all the same: it is the client's to judge
            self._output = None

    def complete(self) -> None:
        """The last byte of a whole answer has gone out."""
        self._end("complete", None)

    def failed(self, error: ApplianceError) -> None:
        """It was ended, or refused, for this reason."""
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
            case AttesterError() | EvidenceError():
                return "withdrawn"
            case _:
                return "refused"

    def _end(self, outcome: Outcome, code: str | None) -> None:
        if self._ended:
            return
        self._ended = True
        desk, attested, written = self._desk, self._attested, self._transcript.prefix()
        complete = None
        if outcome == "complete":
            complete = _output_event(self._output or self._transcript.output())
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
                admission=None if attested is None else _admission_event(attested),
                forwarded=self._forwarded,
                engine=self._engine,
                output=complete,
                completion=None,
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
                evidence=() if attested is None else (attested.epoch.evidence_digest,),
                data=sign_receipt(document, key_id=key.public.key_id, sign=key.sign),
            )
        )


def _admission_event(attested: Attested) -> GpuAttested:
    epoch = attested.epoch
    return GpuAttested(
        phase="admission",
        evidence_digest=epoch.evidence_digest,
        inclusion=attested.inclusion,
        verdict=epoch.result.verdict.value,
        collected_at=int(epoch.collected_at),
    )


def _output_event(output: Output | None) -> OutputComplete:
    """An answer that cannot be read again has no digest; its bytes are in the response's hash."""
    if output is None:
        return OutputComplete(None, (), None)
    try:
        digest = output.digest
    except Malformed:
        digest = None
    return OutputComplete(digest, output.finish_reasons, output.usage)
