"""Step 10: one exchange held to its receipt, and everything that could be wrong with it, named.

Evidence is simulated hardware's, in the vendors' formats; documents, receipts and bundles are made
with the same encoders as the appliance's.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.attester.simulated.provider import SimulatedCpu, SimulatedGpus
from appliance.config import Policy
from appliance.endorsements.anchors import load_anchors, load_simulated_anchors
from appliance.errors import ApplianceError, EvidenceError, Malformed, Unauthentic, Unbound
from appliance.rats.exchange import Exchange
from appliance.rats.result import AttestationResult, Tier
from appliance.rats.schemes import simulated
from appliance.verifier.bundle import Bundle, parse_bundle
from appliance.verifier.check import Rules, check
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json
from appliance.wire.commitments import (
    Inclusion,
    Kind,
    completion_commitment,
    epoch_nonce,
    gpu_evidence_digest,
    report_commitment,
    request_commitment,
)
from appliance.wire.encoding import encode_base64
from appliance.wire.epoch import EpochEvidence
from appliance.wire.evidence import GpuEvidence
from appliance.wire.identity import (
    Keyset,
    PublicKey,
    digest_of,
    instance_document,
    report_data_of,
    subject_of,
    workload_manifest,
)
from appliance.wire.merkle import MerkleTree
from appliance.wire.output import output_of_answer
from appliance.wire.receipt import (
    Ended,
    EngineUsed,
    EventLog,
    GpuAttested,
    OutputComplete,
    RequestCommitted,
    RequestForwarded,
    RequestReceived,
    ResponseReturned,
    Rewrite,
    forwarded_bytes,
    forwarded_hash,
    parse_receipt,
    receipt_document,
    sign_receipt,
)
from appliance.wire.report import GpuSection, Report

NOW = datetime.datetime(2026, 11, 23, 12, tzinfo=datetime.UTC)
AT = int(NOW.timestamp())
NONCE = b"\x0a" * 32
SPKI = b"\x11" * 32
RULES = Rules(
    Policy(tee_types=("unsafe_simulated",), gpus="unsafe_simulated"),
    load_simulated_anchors(load_anchors()),
    None,
)

RECEIPT_SECRET = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
CHECKPOINT_SECRET = Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)
RECEIPT_KEY = PublicKey("receipt-1", RECEIPT_SECRET.public_key().public_bytes_raw())
CHECKPOINT_KEY = PublicKey("checkpoint-1", CHECKPOINT_SECRET.public_key().public_bytes_raw())

CHAT = "/v1/chat/completions"
REQUEST = b'{"messages":[{"role":"user","content":"What is up?"}],"model":"m"}'
ANSWER: JsonObject = {
    "id": "c-1",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "The sky."},
            "finish_reason": "stop",
        }
    ],
}
REWRITE = Rewrite({"seed": 7, "rid": "c-1"}, ("user",))
RECEIPT_ID = "ab" * 16


@dataclass(frozen=True)
class Machine:
    """A simulated appliance's hardware, documents and report."""

    gpus: SimulatedGpus
    report: Report

    @property
    def digest(self) -> bytes:
        return self.report.keyset_digest

    def epoch(
        self, kind: Kind, commitments: list[bytes], index: int, *, at: int = AT
    ) -> tuple[EpochEvidence, Inclusion]:
        """Real evidence over these leaves, without endorsements, and one leaf's inclusion."""
        tree = MerkleTree.over(commitments)
        gpus = collect(self.gpus, epoch_nonce(self.digest, tree.size, tree.root))
        bare = tuple(replace(one, rims=()) for one in gpus)
        digest = gpu_evidence_digest(bare)
        epoch = EpochEvidence(digest, self.digest, tree.size, tree.root, at, bare)
        return epoch, Inclusion(kind, self.digest, tree.size, index, tree.path(index), tree.root)


def collect(gpus: SimulatedGpus, nonce: bytes) -> tuple[GpuEvidence, ...]:
    async def asked() -> tuple[GpuEvidence, ...]:
        return tuple(await gpus.collect(nonce))

    return trio.run(asked)


def machine(*, not_after: int = AT + 3600) -> Machine:
    gpus, cpu = SimulatedGpus(count=2), SimulatedCpu()
    listed: list[JsonObject] = []
    for one in collect(gpus, NONCE):
        claims = simulated.authenticate_gpu(one, anchors=RULES.anchors, at=NOW, nonce=NONCE)
        listed.append(
            {
                "scheme": claims.scheme,
                "device_cert_sha256": claims.device_certificate_sha256,
                "ueid": claims.ueid,
            }
        )
    engine: JsonObject = {"name": "sglang", "deterministic": True}
    workload = workload_manifest(image={}, model={"id": "m"}, engine=engine, policy={})
    instance = instance_document(
        gpus=listed, checkpoint_key=CHECKPOINT_KEY, operator_input_digest=None
    )
    subject = subject_of(digest_of(workload), digest_of(instance))
    keyset = Keyset(subject, not_after, (RECEIPT_KEY,), (SPKI,))
    tree = MerkleTree.over([report_commitment(NONCE)])
    evidence = collect(gpus, epoch_nonce(keyset.digest, tree.size, tree.root))
    report_data = report_data_of(keyset.digest, NONCE)

    async def quote() -> Any:
        return await cpu.collect(report_data)

    report = Report(
        keyset_digest=keyset.digest,
        tee_type="unsafe_simulated",
        keyset_document=keyset.to_json(),
        keyset=keyset,
        report_data=report_data,
        provenance={"image_digest": None},
        cpu=trio.run(quote),
        gpu=GpuSection(
            gpu_evidence_digest(evidence),
            Inclusion("report", keyset.digest, 1, 0, (), tree.root),
            evidence,
        ),
        workload=workload,
        instance=instance,
        policy={},
    )
    return Machine(gpus, report)


HERE = machine()
ELSEWHERE = machine()


def made(
    where: Machine = HERE,
    *,
    request: bytes = REQUEST,
    response: bytes | None = None,
    change: Callable[[EventLog], EventLog] = lambda log: log,
    envelope: Callable[[JsonObject], JsonObject] = lambda document: document,
    client_nonce: bytes | None = b"\x0c" * 32,
    key: tuple[PublicKey, Ed25519PrivateKey] = (RECEIPT_KEY, RECEIPT_SECRET),
    completion: bool = False,
) -> Exchange:
    """An exchange as an appliance leaves it, with one thing changed before it is signed."""
    response = canonical_json(ANSWER) if response is None else response
    body_hash, blind = hashlib.sha256(request).digest(), b"\x0b" * 32
    commitment = request_commitment(
        RECEIPT_ID, CHAT, client_nonce=client_nonce, body_sha256=body_hash, blind=blind
    )
    epoch, inclusion = where.epoch("request", [b"\x00" * 32, commitment, b"\x01" * 32], 1)
    epochs, last = [epoch], None
    if completion:
        core: JsonObject = {"type": "checkpoint", "receipt_id": RECEIPT_ID}
        end, place = where.epoch("completion", [completion_commitment(core)], 0)
        epochs.append(end)
        last = GpuAttested("completion", end.evidence_digest, place, "warning", AT, digest_of(core))
    output = output_of_answer(ANSWER, max_bytes=1000)
    log = EventLog(
        received=RequestReceived(body_hash),
        committed=RequestCommitted(commitment, client_nonce, blind),
        admission=GpuAttested("admission", epoch.evidence_digest, inclusion, "warning", AT),
        forwarded=RequestForwarded(forwarded_hash([forwarded_bytes(request, REWRITE)])),
        engine=EngineUsed(digest_of(where.report.workload), 7, True, (REWRITE,)),
        output=OutputComplete(output.digest, output.finish_reasons, None),
        completion=last,
        ended=Ended("complete", None, len(response)),
        returned=ResponseReturned(hashlib.sha256(response).digest()),
    )
    document = receipt_document(
        receipt_id=RECEIPT_ID,
        chat_id="c-1",
        model="m",
        keyset_digest=where.digest,
        endpoint=CHAT,
        method="POST",
        served_at=AT,
        events=change(log),
    )
    public, secret = key
    data = sign_receipt(envelope(document), key_id=public.key_id, sign=secret.sign)
    return Exchange(parse_receipt(data), tuple(epochs), request, response, client_nonce)


def verdict(exchange: Exchange, where: Machine = HERE) -> AttestationResult:
    bundle = Bundle("https://here", AT, NONCE, SPKI, where.report, exchange)
    return check(bundle, RULES, at=NOW)


def receipt_part(result: AttestationResult) -> AttestationResult:
    return result.submods["receipt"]


def own_checks(result: AttestationResult) -> list[str]:
    return [finding.check for finding in receipt_part(result).findings]


# --------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("completion", [False, True])
def test_an_exchange_as_it_was_has_no_finding_of_its_own(completion: bool) -> None:
    result = verdict(made(completion=completion))
    assert result.verdict is Tier.WARNING  # simulated hardware
    assert own_checks(result) == []
    part = receipt_part(result)
    names = {f"{phase} GPU-{n}" for phase in ("admission", "completion") for n in (0, 1)}
    assert set(part.submods) == {n for n in names if completion or n.startswith("admission")}
    assert part.claims["seed"] == "7"
    assert part.claims["deterministic"] is True
    assert part.claims["outcome"] == "complete"


def test_a_stream_is_held_to_the_same_output_digest() -> None:
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": "The "}}]},
        {"choices": [{"index": 0, "delta": {"content": "sky."}, "finish_reason": "stop"}]},
    ]
    stream = b": ping\n\n" + b"".join(
        b"data: " + json.dumps(one).encode() + b"\n\n" for one in chunks
    )
    assert own_checks(verdict(made(response=stream + b"data: [DONE]\n\n"))) == []


@pytest.mark.parametrize(
    ("without", "check_name"),
    [
        ({"request": None}, "receipt.request"),
        ({"response": None}, "receipt.response"),
        ({"epochs": ()}, "receipt.admission_evidence"),
    ],
)
def test_what_is_not_at_hand_is_said_not_to_be_compared(
    without: dict[str, Any], check_name: str
) -> None:
    result = verdict(replace(made(), **without))
    assert result.verdict is Tier.WARNING
    assert own_checks(result) == [check_name]
    assert receipt_part(result).findings[0].got == "not compared"


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        ("client_disconnected", None),
        ("engine_failed", "engine_died"),
        ("withdrawn", "unauthentic"),
        ("drained", "not_serving"),
        ("refused", "overloaded"),
    ],
)
def test_an_exchange_that_did_not_complete_is_a_warning_that_says_how_it_ended(
    outcome: Any, code: str | None
) -> None:
    exchange = made(
        change=lambda log: replace(
            log, output=None, ended=replace(log.ended, outcome=outcome, code=code)
        )
    )
    result = verdict(exchange)
    assert result.verdict is Tier.WARNING
    assert own_checks(result) == ["receipt.outcome"]
    assert outcome in receipt_part(result).findings[0].got


# -------------------------------------------------------------------------- signed, and not right


def other_admission(**changed: Any) -> Callable[[EventLog], EventLog]:
    def change(log: EventLog) -> EventLog:
        assert log.admission is not None
        return replace(log, admission=replace(log.admission, **changed))

    return change


def other_inclusion(**changed: Any) -> Callable[[EventLog], EventLog]:
    def change(log: EventLog) -> EventLog:
        assert log.admission is not None
        return other_admission(inclusion=replace(log.admission.inclusion, **changed))(log)

    return change


def other_engine(**changed: Any) -> Callable[[EventLog], EventLog]:
    def change(log: EventLog) -> EventLog:
        assert log.engine is not None
        return replace(log, engine=replace(log.engine, **changed))

    return change


def other_output(**changed: Any) -> Callable[[EventLog], EventLog]:
    def change(log: EventLog) -> EventLog:
        assert log.output is not None
        return replace(log, output=replace(log.output, **changed))

    return change


def swapped_path(log: EventLog) -> EventLog:
    assert log.admission is not None
    path = log.admission.inclusion.path
    assert path is not None
    return other_inclusion(path=path[::-1])(log)


Z = b"\x00" * 32
SIGNED_LIES: list[tuple[str, Callable[[EventLog], EventLog]]] = [
    ("request.received.body_hash", lambda log: replace(log, received=RequestReceived(Z))),
    ("response.returned.body_hash", lambda log: replace(log, returned=ResponseReturned(Z))),
    ("dcv.ended.bytes", lambda log: replace(log, ended=replace(log.ended, bytes=1))),
    ("request.forwarded.body_hash", lambda log: replace(log, forwarded=RequestForwarded(Z))),
    ("request.forwarded.body_hash", other_engine(rewrite=(Rewrite({"seed": 8}, ()),))),
    ("dcv.engine.rewrite", other_engine(rewrite=(Rewrite({}, (), prompt_index=3),))),
    ("dcv.engine.workload_digest", other_engine(workload_digest=Z)),
    ("dcv.output.output_digest", other_output(output_digest=Z)),
    ("dcv.output.finish_reasons", other_output(finish_reasons=("length",))),
    (
        "dcv.request.commitment",
        lambda log: replace(log, committed=replace(log.committed, blind=Z)),
    ),
    (
        "dcv.request.commitment",
        lambda log: replace(log, committed=replace(log.committed, client_nonce=None)),
    ),
    ("inclusion.root", other_inclusion(root=Z)),
    ("inclusion.root", other_inclusion(leaf_index=0)),
    ("inclusion.root", other_inclusion(leaf_index=3)),
    ("inclusion.root", other_inclusion(path=())),
    ("inclusion.root", other_inclusion(path=(Z,) * 7)),
    ("inclusion.root", swapped_path),
    ("inclusion.keyset_digest", other_inclusion(keyset_digest=Z)),
    ("expected a leaf", other_inclusion(leaf_index=None, path=None)),
    ("evidence_digest", other_admission(evidence_digest=Z)),
    ("epoch.collected_at", other_admission(collected_at=AT - 1)),
    ("not_after", other_admission(collected_at=AT + 3600)),
]


@pytest.mark.parametrize(("named", "change"), SIGNED_LIES)
def test_a_signed_lie_is_refused_and_named(
    named: str, change: Callable[[EventLog], EventLog]
) -> None:
    with pytest.raises(EvidenceError, match=named):
        verdict(made(change=change))


def test_a_receipt_of_another_request_is_refused() -> None:
    other = made(request=REQUEST.replace(b"up", b"on"))
    with pytest.raises(Unbound, match=r"request\.received\.body_hash"):
        verdict(replace(made(), receipt=other.receipt, epochs=other.epochs))


def test_a_receipt_of_the_same_request_asked_at_another_time_is_refused() -> None:
    with pytest.raises(Unbound, match="client_nonce"):
        verdict(replace(made(), client_nonce=b"\x0d" * 32))
    with pytest.raises(Unbound, match="got none"):
        verdict(replace(made(client_nonce=None), client_nonce=b"\x0d" * 32))


def test_a_receipt_of_another_keyset_is_refused() -> None:
    with pytest.raises(Unbound, match="workload_keyset_digest"):
        verdict(made(ELSEWHERE))


def test_evidence_of_another_appliance_is_refused() -> None:
    """GPUs of another machine, made to sign this epoch's nonce: the relay that is named by the
    instance document."""
    with pytest.raises(Unbound, match=r"instance\.gpus"):
        verdict(made(Machine(ELSEWHERE.gpus, HERE.report)))


def test_evidence_of_another_epoch_is_refused() -> None:
    other, _ = HERE.epoch("request", [Z], 0)
    with pytest.raises(Unbound, match="evidence_digest"):
        verdict(replace(made(), epochs=(other,)))
    with pytest.raises(Unbound, match="evidence_digest"):
        verdict(replace(made(), epochs=(*made().epochs, other)))


def test_a_replayed_report_of_a_gpu_does_not_carry_the_epochs_nonce() -> None:
    old, _ = HERE.epoch("request", [Z], 0)
    exchange = made(change=other_admission(evidence_digest=old.evidence_digest))
    replayed = replace(exchange.epochs[0], evidence_digest=old.evidence_digest, gpus=old.gpus)
    with pytest.raises(EvidenceError, match="nonce"):
        verdict(replace(exchange, epochs=(replayed,)))


def test_only_a_receipt_key_signs_receipts() -> None:
    with pytest.raises(Unbound, match="expected a receipt key"):
        verdict(made(key=(CHECKPOINT_KEY, CHECKPOINT_SECRET)))
    disguised = PublicKey(RECEIPT_KEY.key_id, CHECKPOINT_KEY.raw)
    with pytest.raises(Unauthentic, match="signature"):
        verdict(made(key=(disguised, CHECKPOINT_SECRET)))


def test_a_receipt_of_another_service_is_refused_by_its_log() -> None:
    def drop(document: JsonObject) -> JsonObject:
        events = document["event_log"]
        assert isinstance(events, list)
        return {**document, "event_log": events[::-1]}

    with pytest.raises(Malformed, match="event_log"):
        verdict(made(envelope=drop))


def test_a_receipt_is_refused_where_its_report_is() -> None:
    bundle = Bundle("https://here", AT, None, SPKI, HERE.report, made())
    with pytest.raises(Unbound, match="report_data"):
        check(bundle, RULES, at=NOW)


# ------------------------------------------------------------------------------------- any byte

WHOLE = Bundle("https://here", AT, NONCE, SPKI, HERE.report, made(completion=True))
FILE = WHOLE.to_bytes()


def refusal(data: bytes) -> ApplianceError | None:
    try:
        check(parse_bundle(data), RULES, at=NOW).require()
    except (EvidenceError, Malformed) as error:
        return error
    return None


def span(name: str) -> range:
    """Where a member's value is in the file."""
    value = canonical_json(json.loads(FILE)[name])
    start = FILE.index(b'"%s":' % name.encode() + value) + len(name) + 3
    return range(start, start + len(value))


def test_a_bundle_is_read_as_it_was_written() -> None:
    assert refusal(FILE) is None
    assert parse_bundle(FILE).to_bytes() == FILE
    assert parse_bundle(replace(WHOLE, exchange=None).to_bytes()).exchange is None


@pytest.mark.parametrize("name", ["receipt", "epochs", "request_b64", "response_b64", "nonce"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_byte_of_an_exchange_can_be_changed(name: str, data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(span(name)))
    bit = data.draw(st.integers(0, 7))
    changed = bytearray(FILE)
    changed[place] ^= 1 << bit
    error = refusal(bytes(changed))
    assert error is not None
    assert error.message


BOUND = [
    "$.workload_keyset_digest",
    "$.attestation.tee_type",
    "$.attestation.workload_keyset",
    "$.attestation.report_data",
    "$.attestation.evidence.cpu.report_b64",
    "$.attestation.evidence.gpu.evidence_digest",
    "$.attestation.evidence.gpu.inclusion",
    "$.attestation.evidence.gpu.gpus.0.report_b64",
    "$.attestation.evidence.gpu.gpus.0.cert_chain_b64",
    "$.attestation.evidence.workload",
    "$.attestation.evidence.instance",
    "$.attestation.evidence.policy",
    "$.service_capabilities",
]


@pytest.mark.parametrize("path", BOUND)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_byte_of_what_the_report_binds_can_be_changed(path: str, data: st.DataObject) -> None:
    document: dict[str, Any] = json.loads(FILE)
    *above, last = path.removeprefix("$.").split(".")
    item: Any = document["report"]
    for name in above:
        item = item[int(name)] if isinstance(item, list) else item[name]
    text = bytearray(canonical_json(item[last]))
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] ^= 1 << data.draw(st.integers(0, 6))
    item[last] = "\x01"
    whole = json.dumps(document).encode().replace(b'"\\u0001"', bytes(text))
    assert refusal(whole) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("type", "report"),
        ("api_version", "dcv/2"),
        ("fetched_at", -1),
        ("fetched_at", True),
        ("fetched_at", 2**60),
        ("url", 1),
        ("nonce", "ab"),
        ("spki_sha256", 7),
        ("report", []),
        ("receipt", []),
        ("receipt", None),
        ("epochs", None),
        ("epochs", [1]),
        ("epochs", [{}] * 3),
        ("request_b64", 1),
        ("request_b64", "ab"),
    ],
)
def test_a_bundle_out_of_form_is_malformed(name: str, value: JsonValue) -> None:
    document = json.loads(FILE) | {name: value}
    with pytest.raises(Malformed):
        parse_bundle(json.dumps(document).encode())


@pytest.mark.parametrize("name", sorted(json.loads(FILE)))
def test_a_bundle_has_every_member_and_no_other(name: str) -> None:
    document = json.loads(FILE)
    value = document.pop(name)
    for changed in (document, {**document, f"{name}2": value}):
        with pytest.raises(Malformed, match="bundle"):
            parse_bundle(json.dumps(changed).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_version", "dcv/2"),
        ("root", 1),
        ("root", "ab"),
        ("tree_size", 0),
        ("tree_size", True),
        ("collected_at", -1),
        ("evidence_digest", "ab"),
        ("gpus", {}),
        ("gpus", [{}] * 17),
        ("more", 1),
    ],
)
def test_an_epoch_out_of_form_is_malformed(name: str, value: JsonValue) -> None:
    document = json.loads(FILE)
    document["epochs"][0][name] = value
    with pytest.raises(Malformed, match=r"epochs\[0\]"):
        parse_bundle(json.dumps(document).encode())


def test_nothing_of_the_content_is_in_a_bundle_without_it() -> None:
    bare = replace(WHOLE, exchange=replace(made(), request=None, response=None)).to_bytes()
    for content in (b"What is up", b"The sky", REQUEST, canonical_json(ANSWER)):
        assert content not in bare
        assert encode_base64(content).rstrip("=").encode()[:8] not in bare
