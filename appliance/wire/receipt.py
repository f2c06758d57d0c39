"""Receipts: what one exchange was, signed (protocol.md section 5; aci/1 section 7).

    document ── events, in their order ── JCS without `signature` ── Ed25519, the receipt key

Two readers, because other services of aci/1 log other events: `parse_receipt` reads any receipt
as far as its envelope and signature go; `read_events` reads the log by the rules of dcv/1. A
receipt holds digests, never a prompt or a completion; that is why a rewrite that picks one of
several prompts names it by its number.

Nothing read here is trustworthy before `verify_signature`, with a key from a keyset that a quote
binds; and what is signed is the appliance's word, to be held against the bodies themselves
(`forwarded_bytes`, `wire.output`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from appliance.errors import Malformed, Unauthentic
from appliance.wire.canonical import (
    MAX_SAFE_INTEGER,
    JsonObject,
    JsonValue,
    canonical_json,
    parse_json,
    parse_json_object,
)
from appliance.wire.commitments import Inclusion, Kind, parse_inclusion
from appliance.wire.encoding import decode_hex, format_sha256, parse_sha256
from appliance.wire.identity import PublicKey
from appliance.wire.openai import ChoicePlan

API_VERSION = "aci/1"

MAX_RECEIPT_BYTES = 1 << 20
MAX_EVENTS = 64
"""Of any service's log; one of ours has nine at most."""
MAX_REWRITES = 128
NO_SEED = 0
"""`seed` in `dcv.engine` where nothing is sampled: for embeddings, whose engine request has none."""

MAX_TEXT = 512
MAX_NESTING = 64
MAX_USAGE_BYTES = 64 << 10
MAX_USAGE_NESTING = 16
MAX_BODY_NESTING = 256
"""The deepest body that any configuration lets through (`[limits] max_nesting`)."""

EMPTY_SHA256 = hashlib.sha256().digest()

Phase: TypeAlias = Literal["admission", "completion"]
Outcome: TypeAlias = Literal[
    "complete", "client_disconnected", "engine_failed", "withdrawn", "drained", "refused"
]
OUTCOMES: tuple[Outcome, ...] = (
    "complete",
    "client_disconnected",
    "engine_failed",
    "withdrawn",
    "drained",
    "refused",
)
KIND_OF_PHASE: Mapping[Phase, Kind] = {"admission": "request", "completion": "completion"}
"""Whose commitment the epoch of an event covers."""
VERDICTS = ("affirming", "warning", "contraindicated", "none")

# ------------------------------------------------------------------------------------ the events


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """`request.received`; `body_hash` is 32 bytes, of the wire body."""

    body_hash: bytes

    def to_json(self) -> JsonObject:
        """Its form in the log."""
        return {"type": "request.received", "body_hash": format_sha256(self.body_hash)}


@dataclass(frozen=True, slots=True)
class RequestCommitted:
    """`dcv.request`: what the request's leaf in an epoch's tree is made of.

    Attributes:
        commitment: 32 bytes, `wire.commitments.request_commitment`.
        client_nonce: 32 bytes from `X-DCV-Nonce`, if it came.
        blind: 32 random bytes.
    """

    commitment: bytes
    client_nonce: bytes | None
    blind: bytes

    def to_json(self) -> JsonObject:
        """Its form in the log."""
        return {
            "type": "dcv.request",
            "commitment": self.commitment.hex(),
            "client_nonce": None if self.client_nonce is None else self.client_nonce.hex(),
            "blind": self.blind.hex(),
        }


@dataclass(frozen=True, slots=True)
class GpuAttested:
    """`dcv.gpu.attested`: the epoch that covers the request, or the finished answer.

    Attributes:
        evidence_digest: 32 bytes, `wire.commitments.gpu_evidence_digest`.
        verdict: the appliance's own, one of `VERDICTS`.
        collected_at: Unix seconds.
        core_sha256: 32 bytes, of the checkpoint's core; None in the admission phase.
    """

    phase: Phase
    evidence_digest: bytes
    inclusion: Inclusion
    verdict: str
    collected_at: int
    core_sha256: bytes | None = None

    def to_json(self) -> JsonObject:
        """Its form in the log, and in a checkpoint's `gpu` and `completion`."""
        document: JsonObject = {
            "type": "dcv.gpu.attested",
            "phase": self.phase,
            "evidence_digest": format_sha256(self.evidence_digest),
            "inclusion": self.inclusion.to_json(),
            "verdict": self.verdict,
            "collected_at": self.collected_at,
        }
        if self.core_sha256 is not None:
            document["core_sha256"] = self.core_sha256.hex()
        return document


@dataclass(frozen=True, slots=True)
class RequestForwarded:
    """`request.forwarded`; `body_hash` is 32 bytes, of the forwarded bodies one after the other."""

    body_hash: bytes

    def to_json(self) -> JsonObject:
        """Its form in the log."""
        return {"type": "request.forwarded", "body_hash": format_sha256(self.body_hash)}


@dataclass(frozen=True, slots=True)
class Rewrite:
    """How one forwarded body came out of the client's.

    Attributes:
        set: members added or replaced. unset: members removed.
        prompt_index: which item of the client's `prompt` the forwarded `prompt` is; None where it
            is forwarded as it came. The item itself would be plaintext in a stored receipt.
    """

    set: Mapping[str, JsonValue]
    unset: tuple[str, ...]
    prompt_index: int | None = None

    def to_json(self) -> JsonObject:
        """Its form in `dcv.engine`; `prompt_index` is there only where it says something."""
        unset: list[JsonValue] = list(self.unset)
        document: JsonObject = {"set": dict(self.set), "unset": unset}
        if self.prompt_index is not None:
            document["prompt_index"] = self.prompt_index
        return document


@dataclass(frozen=True, slots=True)
class EngineUsed:
    """`dcv.engine`: what was asked to answer, and how.

    Attributes:
        workload_digest: W, 32 bytes.
        seed: of choice 0; `NO_SEED` for embeddings.
        deterministic: whether the engine's settings make it answer the same again.
        rewrite: one per forwarded body, in index order.
    """

    workload_digest: bytes
    seed: int
    deterministic: bool
    rewrite: tuple[Rewrite, ...]

    def to_json(self) -> JsonObject:
        """Its form in the log."""
        rewrite: list[JsonValue] = [one.to_json() for one in self.rewrite]
        return {
            "type": "dcv.engine",
            "workload_digest": format_sha256(self.workload_digest),
            "seed": str(self.seed),
            "deterministic": self.deterministic,
            "rewrite": rewrite,
        }


@dataclass(frozen=True, slots=True)
class OutputComplete:
    """`dcv.output`: the answer, independent of how it was cut into events.

    Attributes:
        output_digest: 32 bytes, `wire.output`; None where the answer cannot be read so.
        finish_reasons: by index; empty where there is no digest.
        usage: as the engine told it, see `is_usage`; None in a stream that did not ask for it.
    """

    output_digest: bytes | None
    finish_reasons: tuple[str | None, ...]
    usage: JsonObject | None

    def to_json(self) -> JsonObject:
        """Its form in the log."""
        digest, reasons = self.output_digest, list[JsonValue](self.finish_reasons)
        return {
            "type": "dcv.output",
            "output_digest": None if digest is None else format_sha256(digest),
            "finish_reasons": reasons,
            "usage": self.usage,
        }


@dataclass(frozen=True, slots=True)
class Ended:
    """`dcv.ended`.

    Attributes:
        code: of the error that ended it, as in an error body; None when nothing did.
        bytes: content bytes written.
    """

    outcome: Outcome
    code: str | None
    bytes: int

    def to_json(self) -> JsonObject:
        """Its form in the log."""
        return {
            "type": "dcv.ended",
            "outcome": self.outcome,
            "code": self.code,
            "bytes": self.bytes,
        }


@dataclass(frozen=True, slots=True)
class ResponseReturned:
    """`response.returned`; `body_hash` is 32 bytes, of the content bytes written."""

    body_hash: bytes

    def to_json(self) -> JsonObject:
        """Its form in the log."""
        return {"type": "response.returned", "body_hash": format_sha256(self.body_hash)}


@dataclass(frozen=True, slots=True)
class EventLog:
    """The events of one exchange, in the order of their fields; None where one is not present."""

    received: RequestReceived
    committed: RequestCommitted
    admission: GpuAttested | None
    forwarded: RequestForwarded | None
    engine: EngineUsed | None
    output: OutputComplete | None
    completion: GpuAttested | None
    ended: Ended
    returned: ResponseReturned

    def to_json(self) -> list[JsonValue]:
        """`event_log`.

        Raises:
            Malformed: it breaks a presence rule: such a log must not be signed.
        """
        _check_presence(self, "event_log")
        events = (
            self.received,
            self.committed,
            self.admission,
            self.forwarded,
            self.engine,
            self.output,
            self.completion,
            self.ended,
            self.returned,
        )
        return [one.to_json() for one in events if one is not None]


# ----------------------------------------------------------------------------------- the receipt


@dataclass(frozen=True, slots=True)
class Receipt:
    """A receipt as received; only its form was checked.

    Attributes:
        chat_id: the answer's `id`; None where a refusal came before there was one.
        model: as asked for; None where that could not be told.
        keyset_digest: 32 bytes.
        served_at: Unix seconds.
        signature: 64 bytes, over `signing_input(document)`.
        document: all of it, the log included.
    """

    receipt_id: str
    chat_id: str | None
    model: str | None
    keyset_digest: bytes
    endpoint: str
    method: str
    served_at: int
    key_id: str
    signature: bytes
    document: JsonObject


def receipt_document(
    *,
    receipt_id: str,
    chat_id: str | None,
    model: str | None,
    keyset_digest: bytes,
    endpoint: str,
    method: str,
    served_at: int,
    events: EventLog,
) -> JsonObject:
    """A receipt that is not signed yet.

    Args:
        chat_id, model, keyset_digest, served_at: as `Receipt` has them.
        endpoint: the path as received, without query.

    Raises:
        Malformed: the events break a presence rule.
    """
    return {
        "api_version": API_VERSION,
        "receipt_id": receipt_id,
        "chat_id": chat_id,
        "model": model,
        "workload_keyset_digest": format_sha256(keyset_digest),
        "endpoint": endpoint,
        "method": method,
        "served_at": served_at,
        "event_log": events.to_json(),
    }


def signing_input(document: JsonObject) -> bytes:
    """What is signed: JCS without `signature`; begins with `{`."""
    return canonical_json({key: value for key, value in document.items() if key != "signature"})


def sign_receipt(document: JsonObject, *, key_id: str, sign: Callable[[bytes], bytes]) -> bytes:
    """The signed receipt's bytes, in canonical form.

    Args:
        sign: Ed25519 over the signing input, 64 bytes.
    """
    unsigned: JsonObject = {**document, "key_id": key_id}
    # The signature's place is between two members, so that they are put in canonical form once.
    before = canonical_json({key: unsigned[key] for key in unsigned if key < "signature"})[:-1]
    after = canonical_json({key: unsigned[key] for key in unsigned if key > "signature"})[1:]
    signature = sign(before + b"," + after)
    return before + b',"signature":"' + signature.hex().encode("ascii") + b'",' + after


def verify_signature(document: JsonObject, key: PublicKey, *, what: str = "receipt") -> None:
    """The receipt was signed by this key, under its name.

    Args:
        document: as `Receipt.document`.
        key: from the keyset that the receipt names.
        what: is verified, for messages; a checkpoint is signed in the same way.

    Raises:
        Unauthentic: it was not.
        Malformed: `signature` is not 64 bytes of lowercase hex.
    """
    if document.get("key_id") != key.key_id:
        raise Unauthentic(f"{what}: expected a signature by the key {key.key_id}")
    signature = decode_hex(
        read_text(document.get("signature"), "signature"), field="signature", length=64
    )
    try:
        Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, signing_input(document))
    except (InvalidSignature, ValueError):  # ValueError: 32 bytes that are no key
        raise Unauthentic(f"{what}: its signature does not verify") from None


def parse_receipt(data: bytes) -> Receipt:
    """Read the envelope of a receipt of aci/1, whichever service it is from.

    The log is only looked at so far as every event must be an object with a `type`.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    if len(data) > MAX_RECEIPT_BYTES:
        raise Malformed(f"receipt: expected at most {MAX_RECEIPT_BYTES} bytes")
    document = parse_json_object(data, max_nesting=MAX_NESTING)
    read_members(
        document,
        [
            "api_version",
            "receipt_id",
            "chat_id",
            "model",
            "workload_keyset_digest",
            "endpoint",
            "method",
            "served_at",
            "event_log",
            "key_id",
            "signature",
        ],
        "receipt",
    )
    if document["api_version"] != API_VERSION:
        raise Malformed(f"api_version: expected {API_VERSION}", field="api_version")
    for event in _list(document["event_log"], "event_log", MAX_EVENTS):
        if not isinstance(event, dict) or not isinstance(event.get("type"), str):
            raise Malformed("event_log: expected objects with a type", field="event_log")
    return Receipt(
        receipt_id=read_text(document["receipt_id"], "receipt_id"),
        chat_id=_optional_text(document["chat_id"], "chat_id"),
        model=_optional_text(document["model"], "model"),
        keyset_digest=read_sha256(document["workload_keyset_digest"], "workload_keyset_digest"),
        endpoint=read_text(document["endpoint"], "endpoint"),
        method=read_text(document["method"], "method"),
        served_at=read_count(document["served_at"], "served_at"),
        key_id=read_text(document["key_id"], "key_id"),
        signature=read_hex(document["signature"], "signature", 64),
        document=document,
    )


def read_events(receipt: Receipt) -> EventLog:
    """Read the log by the rules of dcv/1: these events, these members, this order, no others.

    Raises:
        Malformed: it breaks one of them, such as where another service of aci/1 wrote it.
    """
    log = _Log(receipt.document["event_log"])
    read = EventLog(
        received=log.need("request.received", _received),
        committed=log.need("dcv.request", _committed),
        admission=log.take("dcv.gpu.attested", _admission),
        forwarded=log.take("request.forwarded", _forwarded),
        engine=log.take("dcv.engine", _engine),
        output=log.take("dcv.output", _output),
        completion=log.take("dcv.gpu.attested", _completion),
        ended=log.need("dcv.ended", _ended),
        returned=log.need("response.returned", _returned),
    )
    log.end()
    _check_presence(read, "event_log")
    return read


def is_usage(usage: JsonObject | None) -> bool:
    """Whether a receipt can have this `usage`: it is short, and every parser reads its canonical
    form alike. An engine's own may hold a number that they do not."""
    try:
        data = canonical_json(usage)
        if len(data) <= MAX_USAGE_BYTES:
            parse_json(data, max_nesting=MAX_USAGE_NESTING)
            return True
    except (Malformed, RecursionError):
        pass
    return False


# ------------------------------------------------------------------------------ forwarded bodies


def rewrite_of(plan: ChoicePlan) -> Rewrite:
    """What the receipt says of a planned engine request: everything but a prompt's text."""
    changed = {key: value for key, value in plan.set.items() if key != "prompt"}
    chosen = plan.prompt_index if "prompt" in plan.set else None
    return Rewrite(changed, plan.unset, chosen)


def forwarded_bytes(raw_body: bytes, rewrite: Rewrite) -> bytes:
    """The exact bytes the engine got: JCS of the client's body with the rewrite applied.

    Args:
        raw_body: the wire body, whose hash is in `request.received`.

    Raises:
        Malformed: the body is not one that was ever forwarded, or has no such prompt.
    """
    body = parse_json_object(raw_body, max_nesting=MAX_BODY_NESTING)
    forwarded = {key: value for key, value in body.items() if key not in rewrite.unset}
    if rewrite.prompt_index is not None:
        prompts = body.get("prompt")
        if not isinstance(prompts, list) or rewrite.prompt_index >= len(prompts):
            raise Malformed(
                f"prompt: expected a list with an item {rewrite.prompt_index}", field="prompt"
            )
        forwarded["prompt"] = prompts[rewrite.prompt_index]
    return canonical_json({**forwarded, **rewrite.set})


def forwarded_hash(bodies: Iterable[bytes]) -> bytes:
    """`body_hash` of `request.forwarded`, 32 bytes: over the bodies, concatenated in index order."""
    digest = hashlib.sha256()
    for body in bodies:
        digest.update(body)
    return digest.digest()


# -------------------------------------------------------------------------------------- reading


_Event = TypeVar("_Event")


class _Log:
    """Takes the events of a log one after the other; the order is that of the calls."""

    def __init__(self, value: JsonValue) -> None:
        self._events = _list(value, "event_log", MAX_EVENTS)
        self._next = 0

    def take(self, type: str, read: Callable[[JsonObject, str], _Event | None]) -> _Event | None:
        """The next event if it is of this type, and if `read` takes it for its own."""
        where = f"event_log[{self._next}]"
        event = self._events[self._next] if self._next < len(self._events) else None
        if not isinstance(event, dict) or event.get("type") != type:
            return None
        found = read(event, where)
        if found is not None:
            self._next += 1
        return found

    def need(self, type: str, read: Callable[[JsonObject, str], _Event | None]) -> _Event:
        found = self.take(type, read)
        if found is None:
            where = f"event_log[{self._next}]"
            raise Malformed(f"{where}: expected {type}", field=where)
        return found

    def end(self) -> None:
        if self._next != len(self._events):
            where = f"event_log[{self._next}]"
            raise Malformed(f"{where}: expected no event after response.returned", field=where)


def _check_presence(log: EventLog, where: str) -> None:
    """Which events an exchange that ended so must have, and which it cannot have."""
    ended = log.ended
    rules: list[tuple[bool, str]] = [
        # "forwarded" is two events or none, and nothing is forwarded before it is admitted.
        ((log.forwarded is None) == (log.engine is None), "request.forwarded with dcv.engine"),
        (log.forwarded is None or log.admission is not None, "admission before forwarding"),
        (log.output is None or log.forwarded is not None, "an output only of a forwarded request"),
        (log.completion is None or log.output is not None, "completion only after an output"),
        (ended.outcome != "complete" or log.output is not None, "dcv.output when complete"),
        (ended.outcome != "refused" or log.output is None, "no dcv.output when refused"),
        (ended.outcome != "complete" or ended.code is None, "no code when complete"),
        (
            ended.code is not None or ended.outcome in ("complete", "client_disconnected"),
            "a code for this outcome",
        ),
        (
            (ended.bytes == 0) == (log.returned.body_hash == EMPTY_SHA256),
            "the empty string's hash exactly when no byte was written",
        ),
        (log.admission is None or log.admission.phase == "admission", "phase admission"),
        (log.completion is None or log.completion.phase == "completion", "phase completion"),
    ]
    for holds, rule in rules:
        if not holds:
            raise Malformed(f"{where}: expected {rule}", field=where)


def _received(event: JsonObject, where: str) -> RequestReceived:
    read_members(event, ("type", "body_hash"), where)
    return RequestReceived(read_sha256(event["body_hash"], f"{where}.body_hash"))


def _committed(event: JsonObject, where: str) -> RequestCommitted:
    read_members(event, ("type", "commitment", "client_nonce", "blind"), where)
    nonce = event["client_nonce"]
    return RequestCommitted(
        commitment=read_hex(event["commitment"], f"{where}.commitment", 32),
        client_nonce=None if nonce is None else read_hex(nonce, f"{where}.client_nonce", 32),
        blind=read_hex(event["blind"], f"{where}.blind", 32),
    )


def _admission(event: JsonObject, where: str) -> GpuAttested | None:
    return read_gpu_attested(event, where, "admission") if _in(event, "admission") else None


def _completion(event: JsonObject, where: str) -> GpuAttested | None:
    return read_gpu_attested(event, where, "completion") if _in(event, "completion") else None


def _in(event: JsonObject, phase: Phase) -> bool:
    return event.get("phase") == phase


def read_gpu_attested(value: JsonValue, where: str, phase: Phase) -> GpuAttested:
    """Read a `dcv.gpu.attested` of this phase, of a log or of a checkpoint.

    Raises:
        Malformed: not that form, or of another phase.
    """
    if not isinstance(value, dict):
        raise Malformed(f"{where}: expected an object", field=where)
    members = ["type", "phase", "evidence_digest", "inclusion", "verdict", "collected_at"]
    if phase == "completion":
        members.append("core_sha256")
    read_members(value, members, where)
    if (value["type"], value["phase"]) != ("dcv.gpu.attested", phase):
        raise Malformed(f"{where}: expected dcv.gpu.attested in the phase {phase}", field=where)
    inclusion = parse_inclusion(value["inclusion"], where=f"{where}.inclusion")
    kind = KIND_OF_PHASE[phase]
    if inclusion.kind != kind:
        raise Malformed(f"{where}.inclusion.kind: expected {kind}", field=f"{where}.inclusion.kind")
    verdict = value["verdict"]
    if not isinstance(verdict, str) or verdict not in VERDICTS:
        raise Malformed(
            f"{where}.verdict: expected one of {', '.join(VERDICTS)}", field=f"{where}.verdict"
        )
    return GpuAttested(
        phase=phase,
        evidence_digest=read_sha256(value["evidence_digest"], f"{where}.evidence_digest"),
        inclusion=inclusion,
        verdict=verdict,
        collected_at=read_count(value["collected_at"], f"{where}.collected_at"),
        core_sha256=(
            read_hex(value["core_sha256"], f"{where}.core_sha256", 32)
            if phase == "completion"
            else None
        ),
    )


def _forwarded(event: JsonObject, where: str) -> RequestForwarded:
    read_members(event, ("type", "body_hash"), where)
    return RequestForwarded(read_sha256(event["body_hash"], f"{where}.body_hash"))


def _engine(event: JsonObject, where: str) -> EngineUsed:
    read_members(event, ("type", "workload_digest", "seed", "deterministic", "rewrite"), where)
    rewrites = _list(event["rewrite"], f"{where}.rewrite", MAX_REWRITES)
    if not rewrites:
        raise Malformed(f"{where}.rewrite: expected at least one", field=f"{where}.rewrite")
    deterministic = event["deterministic"]
    if not isinstance(deterministic, bool):
        raise Malformed(
            f"{where}.deterministic: expected true or false", field=f"{where}.deterministic"
        )
    return EngineUsed(
        workload_digest=read_sha256(event["workload_digest"], f"{where}.workload_digest"),
        seed=_seed(event["seed"], f"{where}.seed"),
        deterministic=deterministic,
        rewrite=tuple(
            _rewrite(one, f"{where}.rewrite[{index}]") for index, one in enumerate(rewrites)
        ),
    )


def _rewrite(value: JsonValue, where: str) -> Rewrite:
    if not isinstance(value, dict):
        raise Malformed(f"{where}: expected an object", field=where)
    chosen = value.get("prompt_index")
    read_members(
        value, ("set", "unset", *(("prompt_index",) if "prompt_index" in value else ())), where
    )
    changed = value["set"]
    if not isinstance(changed, dict):
        raise Malformed(f"{where}.set: expected an object", field=f"{where}.set")
    unset = _list(value["unset"], f"{where}.unset", MAX_TEXT)
    return Rewrite(
        set=changed,
        unset=tuple(read_text(one, f"{where}.unset") for one in unset),
        prompt_index=(
            read_count(chosen, f"{where}.prompt_index") if "prompt_index" in value else None
        ),
    )


def _output(event: JsonObject, where: str) -> OutputComplete:
    read_members(event, ("type", "output_digest", "finish_reasons", "usage"), where)
    digest, usage = event["output_digest"], event["usage"]
    if usage is not None and not isinstance(usage, dict):
        raise Malformed(f"{where}.usage: expected an object or null", field=f"{where}.usage")
    reasons = _list(event["finish_reasons"], f"{where}.finish_reasons", MAX_REWRITES)
    return OutputComplete(
        output_digest=None if digest is None else read_sha256(digest, f"{where}.output_digest"),
        finish_reasons=tuple(_optional_text(one, f"{where}.finish_reasons") for one in reasons),
        usage=usage,
    )


def _ended(event: JsonObject, where: str) -> Ended:
    read_members(event, ("type", "outcome", "code", "bytes"), where)
    outcome = next((known for known in OUTCOMES if known == event["outcome"]), None)
    if outcome is None:
        raise Malformed(
            f"{where}.outcome: expected one of {', '.join(OUTCOMES)}", field=f"{where}.outcome"
        )
    return Ended(
        outcome=outcome,
        code=_optional_text(event["code"], f"{where}.code"),
        bytes=read_count(event["bytes"], f"{where}.bytes"),
    )


def _returned(event: JsonObject, where: str) -> ResponseReturned:
    read_members(event, ("type", "body_hash"), where)
    return ResponseReturned(read_sha256(event["body_hash"], f"{where}.body_hash"))


# What reading an event is made of; `wire.checkpoint` reads with them too.


def read_members(item: JsonObject, names: Sequence[str], where: str) -> None:
    """An object has exactly these members.

    Raises:
        Malformed: as do the others, naming `where`.
    """
    if odd := item.keys() ^ set(names):
        raise Malformed(
            f"{where}: expected exactly {', '.join(names)}", field=f"{where}.{min(odd)[:64]}"
        )


def _list(value: JsonValue, where: str, most: int) -> list[JsonValue]:
    if not isinstance(value, list) or len(value) > most:
        raise Malformed(f"{where}: expected a list of at most {most}", field=where)
    return value


def read_text(value: JsonValue, where: str) -> str:
    """A short text that is not empty."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
        raise Malformed(f"{where}: expected 1 to {MAX_TEXT} characters", field=where)
    return value


def _optional_text(value: JsonValue, where: str) -> str | None:
    return None if value is None else read_text(value, where)


def read_hex(value: JsonValue, where: str, length: int) -> bytes:
    """Bare lowercase hex of so many bytes."""
    if not isinstance(value, str):
        raise Malformed(f"{where}: expected lowercase hex of {length} bytes", field=where)
    return decode_hex(value, field=where, length=length)


def read_sha256(value: JsonValue, where: str) -> bytes:
    """The 32 bytes of a `sha256:<hex>`."""
    return parse_sha256(read_text(value, where), field=where)


def read_count(value: JsonValue, where: str) -> int:
    """An integer from 0 to 2^53-1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SAFE_INTEGER:
        raise Malformed(f"{where}: expected an integer from 0 to 2^53-1", field=where)
    return value


def _seed(value: JsonValue, where: str) -> int:
    text = read_text(value, where)
    # One spelling only: no sign, no leading zero, ASCII digits.
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and str(int(text)) == text):
        raise Malformed(f"{where}: expected a decimal number", field=where)
    return read_count(int(text), where)
