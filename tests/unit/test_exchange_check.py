"""Step 10: one exchange held to its receipt, and everything that could be wrong with it, named.

Evidence is simulated hardware's, in the vendors' formats; documents, receipts and bundles are made
with the same encoders as the appliance's.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Iterator
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
from appliance.errors import ApplianceError, EvidenceError, Malformed, Stale, Unauthentic, Unbound
from appliance.rats.checkpoints import appraise_cut_stream, check_cut_stream
from appliance.rats.exchange import Exchange
from appliance.rats.forwarded import check_forwarded, check_rewrites, read_request
from appliance.rats.presented import present
from appliance.rats.result import AttestationResult, Tier
from appliance.rats.schemes import simulated
from appliance.verifier.bundle import Bundle, parse_bundle
from appliance.verifier.check import Rules, check
from appliance.wire.canonical import MAX_SAFE_INTEGER, JsonObject, JsonValue, canonical_json
from appliance.wire.checkpoint import (
    COMMENT,
    RESOLVED_MODEL,
    Core,
    checkpoint_chunk,
    checkpoint_comment,
    find_checkpoints,
    sign_checkpoint,
)
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
from appliance.wire.openai import Endpoint, forwarded_bodies, parse_request, plan_choices
from appliance.wire.output import output_of_answer, output_of_stream
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
    read_events,
    receipt_document,
    rewrite_of,
    sign_receipt,
)
from appliance.wire.report import GpuSection, Report
from appliance.wire.sse import DONE_EVENT, PING, PING_LINE, encode_event

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

IMAGE: JsonObject = {"version": "0.1.0", "commit": None, "roothash": None}
MODEL: JsonObject = {
    "id": "m",
    "revision": None,
    "digest": None,
    "tokenizer_digest": None,
    "chat_template_digest": None,
}
ENGINE: JsonObject = {
    "name": "sglang",
    "version": None,
    "settings_digest": None,
    "dtype": None,
    "deterministic": True,
    "random_seed": None,
}

CHAT = "/v1/chat/completions"
REQUEST = b'{"messages":[{"role":"user","content":"What is up?"}],"model":"m"}'
STREAM_REQUEST = REQUEST.replace(b"}],", b'}],"stream":true,')
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
SALT = "5a" * 32
REWRITE = Rewrite({"seed": 7, "rid": "c-1", "cache_salt": SALT}, ())
RESOLVED = {name: MODEL[name] for name in RESOLVED_MODEL}
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
        self,
        kind: Kind,
        commitments: list[bytes],
        index: int,
        *,
        at: int = AT,
        keyset: Keyset | None = None,
    ) -> tuple[EpochEvidence, Inclusion]:
        """Real evidence over these leaves, without endorsements, and one leaf's inclusion."""
        tree = MerkleTree.over(commitments)
        current = self.digest if keyset is None else keyset.digest
        gpus = collect(self.gpus, epoch_nonce(current, tree.size, tree.root))
        bare = tuple(replace(one, rims=()) for one in gpus)
        digest = gpu_evidence_digest(bare)
        epoch = EpochEvidence(digest, current, tree.size, tree.root, at, bare)
        return epoch, Inclusion(kind, current, tree.size, index, tree.path(index), tree.root)


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
    workload = workload_manifest(image=IMAGE, model=MODEL, engine=ENGINE, policy={})
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
        provenance={
            "repo_url": "https://example.org/dcv",
            "repo_commit": None,
            "image_digest": "sha256:" + "d1" * 32,
            "image_provenance": None,
        },
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


@dataclass(frozen=True)
class Proof:
    """How an answer is proven in band; each part can be made a lie.

    Attributes:
        content: the whole stream, changed before the receipt is signed over it.
        keyset: that was current when the completion's evidence was collected.
    """

    core: Callable[[Core], Core] = lambda core: core
    members: Callable[[JsonObject], JsonObject] = lambda members: members
    content: Callable[[bytes], bytes] = lambda content: content
    secret: Ed25519PrivateKey = CHECKPOINT_SECRET
    keyset: Keyset | None = None


def members_of(
    core: Core, event: GpuAttested, epoch: EpochEvidence, secret: Ed25519PrivateKey
) -> JsonObject:
    """What an answer with `tee` ends with."""
    nonce = event.inclusion.nonce
    return {
        "dcv": sign_checkpoint(core, event, sign=secret.sign),
        "attestation": {
            "raw": canonical_json(core.to_json()).decode(),
            "evidences": [present(one, chip="GH100", nonce=nonce) for one in epoch.gpus],
            "nonce": nonce.hex(),
            "inclusion": event.inclusion.to_json(),
            "claims": [],
            "eat": "",
            "verified": True,
        },
        "resolved_model": dict(RESOLVED),
    }


def streamed(core: Core, proof: Proof) -> bytes:
    """The stream up to its end: two chunks, and a checkpoint between them."""
    chunks: list[JsonObject] = [
        {"choices": [{"index": 0, "delta": {"content": "The "}}]},
        {"choices": [{"index": 0, "delta": {"content": "sky."}, "finish_reason": "stop"}]},
    ]
    content = PING + encode_event(chunks[0])
    running = replace(
        core,
        seq=0,
        final=False,
        output_digest=None,
        prefix_bytes=len(content),
        prefix_sha256=hashlib.sha256(content).digest(),
    )
    content += checkpoint_comment(sign_checkpoint(running, None, sign=proof.secret.sign))
    return content + encode_event(chunks[1])


def made(
    where: Machine = HERE,
    *,
    request: bytes | None = None,
    response: bytes | None = None,
    change: Callable[[EventLog], EventLog] = lambda log: log,
    envelope: Callable[[JsonObject], JsonObject] = lambda document: document,
    client_nonce: bytes | None = b"\x0c" * 32,
    key: tuple[PublicKey, Ed25519PrivateKey] = (RECEIPT_KEY, RECEIPT_SECRET),
    completion: bool = False,
    stream: bool = False,
    proof: Proof | None = None,
    endpoint: str = CHAT,
) -> Exchange:
    """An exchange as an appliance leaves it, with one thing changed before it is signed.

    Args:
        request: other than the one that asks for such a response.
        response: other content than `ANSWER`'s.
        completion: asked for with `tee`, so that the response ends with a checkpoint.
        stream: that response is a stream, with a checkpoint on the way too.
        proof: what it ends with, changed.
    """
    if request is None:
        streams = stream or not (response or b"{").startswith(b"{")
        request = STREAM_REQUEST if streams else REQUEST
    body_hash, blind = hashlib.sha256(request).digest(), b"\x0b" * 32
    commitment = request_commitment(
        RECEIPT_ID, endpoint, client_nonce=client_nonce, body_sha256=body_hash, blind=blind
    )
    epoch, inclusion = where.epoch("request", [b"\x00" * 32, commitment, b"\x01" * 32], 1)
    admission = GpuAttested("admission", epoch.evidence_digest, inclusion, "warning", AT)
    output = output_of_answer(ANSWER, max_bytes=1000)
    epochs, last = [epoch], None
    if completion:
        proof = proof or Proof()
        core = proof.core(
            Core(
                seq=int(stream),
                final=True,
                receipt_id=RECEIPT_ID,
                keyset_digest=where.digest,
                request_body_hash=body_hash,
                prefix_bytes=None,
                prefix_sha256=None,
                output_digest=output.digest,
                gpu=admission,
                key_id=CHECKPOINT_KEY.key_id,
            )
        )
        before = streamed(core, proof) if stream else b""
        if stream:
            prefix = hashlib.sha256(before).digest()
            core = replace(core, prefix_bytes=len(before), prefix_sha256=prefix)
            core = proof.core(core)
        commitments = [b"\x02" * 32, completion_commitment(core.to_json())]
        end, place = where.epoch("completion", commitments, 1, keyset=proof.keyset)
        epochs.append(end)
        digest = digest_of(core.to_json())
        last = GpuAttested("completion", end.evidence_digest, place, "warning", AT, digest)
        members = proof.members(members_of(core, last, end, proof.secret))
        response = canonical_json({**ANSWER, **members})
        if stream:
            chunk = checkpoint_chunk(
                object="o", response_id="c-1", created=AT, model="m", members=members
            )
            response = before + 2 * PING_LINE + encode_event(chunk) + DONE_EVENT
            response = proof.content(response)
            output = output_of_stream(response, max_bytes=1 << 20)
    response = canonical_json(ANSWER) if response is None else response
    log = EventLog(
        received=RequestReceived(body_hash),
        committed=RequestCommitted(commitment, client_nonce, blind),
        admission=admission,
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
        endpoint=endpoint,
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


@pytest.mark.parametrize(
    ("completion", "stream", "checkpoints"), [(False, False, 0), (True, False, 1), (True, True, 2)]
)
def test_an_exchange_as_it_was_has_no_finding_of_its_own(
    completion: bool, stream: bool, checkpoints: int
) -> None:
    result = verdict(made(completion=completion, stream=stream))
    assert result.verdict is Tier.WARNING  # simulated hardware
    assert own_checks(result) == []
    part = receipt_part(result)
    names = {f"{phase} GPU-{n}" for phase in ("admission", "completion") for n in (0, 1)}
    assert set(part.submods) == {n for n in names if completion or n.startswith("admission")}
    assert part.claims["seed"] == "7"
    assert part.claims["deterministic"] is True
    assert part.claims["outcome"] == "complete"
    assert part.claims["checkpoints"] == checkpoints


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
    ("dcv.engine.rewrite", other_engine(rewrite=(Rewrite({"seed": 8}, ()),))),
    ("dcv.engine.rewrite", other_engine(rewrite=(replace(REWRITE, prompt_index=3),))),
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
    ("served_at", other_admission(collected_at=AT + 301)),
    ("times of its keyset", other_admission(collected_at=AT - 24 * 3600)),
]


@pytest.mark.parametrize(("named", "change"), SIGNED_LIES)
def test_a_signed_lie_is_refused_and_named(
    named: str, change: Callable[[EventLog], EventLog]
) -> None:
    with pytest.raises(EvidenceError, match=named):
        verdict(made(change=change))


def test_evidence_from_after_the_end_of_its_keyset_is_refused() -> None:
    ending = machine(not_after=AT + 100)
    with pytest.raises(Stale, match="not_after"):
        verdict(made(ending, change=other_admission(collected_at=AT + 100)), ending)


def other_envelope(**changed: Any) -> Callable[[JsonObject], JsonObject]:
    return lambda document: {**document, **changed}


@pytest.mark.parametrize(
    ("named", "changed"),
    [
        ("receipt.method", {"method": "GET"}),
        ("dcv.engine.rewrite", {"endpoint": "/v1/embeddings"}),
        ("receipt.endpoint", {"endpoint": CHAT + "/embeddings"}),
        ("receipt.endpoint", {"endpoint": "/v2/chat/completions"}),
        ("receipt.model", {"model": "n"}),
        ("expected model and chat_id", {"model": None}),
        ("expected model and chat_id", {"chat_id": None}),
        ("rid", {"chat_id": "c-2"}),
        ("receipt.served_at", {"served_at": AT + 301}),
        ("receipt.served_at", {"served_at": AT - 301}),
        ("times of its keyset", {"served_at": 0}),
        ("times of its keyset", {"served_at": AT + 3600 - (24 * 3600 + 300) - 1}),
    ],
)
def test_a_lie_in_the_envelope_is_refused_and_named(named: str, changed: dict[str, Any]) -> None:
    with pytest.raises(EvidenceError, match=named.replace(".", r"\.")):
        verdict(made(envelope=other_envelope(**changed)))


@pytest.mark.parametrize("served_at", [AT + 300, AT - 300])
def test_a_clock_that_was_set_meanwhile_is_no_lie(served_at: int) -> None:
    assert own_checks(verdict(made(envelope=other_envelope(served_at=served_at)))) == []


def forwarding(request: bytes, *rewrites: Rewrite) -> Callable[[EventLog], EventLog]:
    """The engine got, and was said to get, whatever these rewrites make of the request."""

    def change(log: EventLog) -> EventLog:
        assert log.engine is not None
        made = forwarded_hash(forwarded_bytes(request, one) for one in rewrites)
        changed = replace(log, forwarded=RequestForwarded(made))
        seed = rewrites[0].set.get("seed")
        engine = replace(log.engine, rewrite=rewrites)
        if isinstance(seed, int):
            engine = replace(engine, seed=seed)
        return replace(changed, engine=engine)

    return change


def setting(**changed: Any) -> Rewrite:
    return replace(REWRITE, set={**REWRITE.set, **changed})


OTHER_MESSAGES: JsonValue = [{"role": "user", "content": "Something else."}]
OUTSIDE_THE_RULES: list[tuple[str, tuple[Rewrite, ...]]] = [
    ("set.messages", (setting(messages=OTHER_MESSAGES),)),
    ("set.model", (setting(model="other"),)),
    ("set.temperature", (setting(temperature=2),)),
    ("set.stream_options", (setting(stream_options={}),)),
    ("set.stream_options", (setting(stream_options={"include_receipt": True}),)),
    ("set.n", (setting(n=1),)),
    ("set.n", (setting(n=True),)),
    ("set.rid", (setting(rid="c-1-0"),)),
    ("set.cache_salt", (setting(cache_salt=1),)),
    ("set.cache_salt", (Rewrite({"rid": "c-1", "seed": 7}, ()),)),
    ("unset", (replace(REWRITE, unset=("messages",)),)),
    ("unset", (replace(REWRITE, unset=("user",)),)),
    ("unset", (replace(REWRITE, unset=("b", "a")),)),
    ("as many choices", (replace(REWRITE, prompt_index=0),)),
    ("set.n", (REWRITE, REWRITE)),
    ("dcv.engine.rewrite", (setting(rid="c-1-0", n=1), setting(rid="c-1-1", seed=8, n=1))),
]


@pytest.mark.parametrize(("named", "rewrites"), OUTSIDE_THE_RULES)
def test_a_rewrite_that_the_published_rules_do_not_make_is_refused_and_named(
    named: str, rewrites: tuple[Rewrite, ...]
) -> None:
    """Signed, and with the hash of what it leads to, so that nothing else finds it."""
    change = forwarding(REQUEST, *(replace(one, prompt_index=None) for one in rewrites))
    lie = made(change=lambda log: replace_rewrites(change(log), rewrites))
    with pytest.raises(Unbound, match=named.replace(".", r"\.")):
        verdict(lie)


def replace_rewrites(log: EventLog, rewrites: tuple[Rewrite, ...]) -> EventLog:
    assert log.engine is not None
    return replace(log, engine=replace(log.engine, rewrite=rewrites))


@pytest.mark.parametrize(
    "rewrite",
    [setting(messages=OTHER_MESSAGES), setting(n=1), setting(rid="c-2"), setting(seed=8)],
)
def test_the_form_of_a_rewrite_is_checked_without_the_request(rewrite: Rewrite) -> None:
    lie = made(change=lambda log: replace_rewrites(log, (rewrite,)))
    with pytest.raises(Unbound, match=r"dcv\.engine\.rewrite"):
        verdict(replace(lie, request=None))


SEEDED = REQUEST.replace(b"}],", b'}],"seed":99,')


def test_the_seed_that_the_client_asked_for_is_the_engines() -> None:
    honoured = forwarding(SEEDED, setting(seed=99))
    assert own_checks(verdict(made(request=SEEDED, change=honoured))) == []
    with pytest.raises(Unbound, match=r"dcv\.engine\.seed"):
        verdict(made(request=SEEDED, change=forwarding(SEEDED, REWRITE)))


def test_the_engines_seed_is_that_of_the_first_choice() -> None:
    with pytest.raises(Unbound, match=r"rewrite\[0\]\.set\.seed"):
        verdict(made(change=other_engine(seed=8)))


def test_determinism_is_what_the_manifest_promises() -> None:
    with pytest.raises(Unbound, match=r"dcv\.engine\.deterministic"):
        verdict(made(change=other_engine(deterministic=False)))


FANNED = b'{"model":"m","n":2,"prompt":["One","Two"],"seed":9007199254740990,"user":null}'


def fanned(path: str = "/~inference@1.0/completions", **changed: Any) -> Exchange:
    """Two choices of two prompts, at an alias of the endpoint."""
    last = MAX_SAFE_INTEGER
    rewrites = tuple(
        Rewrite(
            {"cache_salt": SALT, "n": 1, "rid": f"c-1-{index}", "seed": seed},
            ("user",),
            prompt_index=prompt,
        )
        for index, (prompt, seed) in enumerate(((0, last - 1), (0, last), (1, 0), (1, 1)))
    )
    rewrites = changed.get("rewrites", lambda one: one)(rewrites)
    choices: list[JsonValue] = [
        {"index": index, "text": "x", "finish_reason": "stop"} for index in range(4)
    ]
    answer: JsonObject = {"id": "c-1", "choices": choices[: changed.get("choices", 4)]}
    output = output_of_answer(answer, max_bytes=100)

    def change(log: EventLog) -> EventLog:
        told = OutputComplete(output.digest, output.finish_reasons, None)
        return replace(forwarding(FANNED, *rewrites)(log), output=told)

    return made(request=FANNED, response=canonical_json(answer), change=change, endpoint=path)


def test_several_choices_of_several_prompts_are_held_to_the_rules() -> None:
    assert own_checks(verdict(fanned())) == []
    assert own_checks(verdict(replace(fanned(), request=None))) == ["receipt.request"]


@pytest.mark.parametrize(
    "lie",
    [
        lambda told: told[:2],
        lambda told: told[:3],
        lambda told: (told[0], told[0], *told[2:]),
        lambda told: (told[1], told[0], *told[2:]),
        lambda told: (*told[:2], replace(told[2], prompt_index=0), told[3]),
        lambda told: (*told[:3], replace(told[3], prompt_index=7)),
        lambda told: (*told[:3], replace(told[3], unset=())),
        lambda told: (*told[:3], replace(told[3], set={**told[3].set, "cache_salt": "other"})),
        lambda told: (*told[:3], replace(told[3], set={**told[3].set, "seed": 2})),
        lambda told: tuple(replace(one, set={**one.set, "n": 2}) for one in told),
    ],
)
@pytest.mark.parametrize("with_request", [True, False])
def test_a_choice_that_is_not_its_prompts_or_has_another_seed_is_refused(
    lie: Callable[[tuple[Rewrite, ...]], tuple[Rewrite, ...]], with_request: bool
) -> None:
    honest = fanned()
    receipt = honest.receipt
    log = read_events(receipt)
    assert log.engine is not None
    told = replace(log, engine=replace(log.engine, rewrite=lie(log.engine.rewrite)))
    document = {**receipt.document, "event_log": told.to_json()}
    unsigned = {key: one for key, one in document.items() if key not in ("key_id", "signature")}
    data = sign_receipt(unsigned, key_id=RECEIPT_KEY.key_id, sign=RECEIPT_SECRET.sign)
    request = honest.request if with_request else None
    with pytest.raises(Unbound, match=r"dcv\.engine|finish_reasons"):
        verdict(replace(honest, receipt=parse_receipt(data), request=request))


def test_a_prompt_that_is_not_named_is_missed_where_the_request_is_there() -> None:
    def unnamed(told: tuple[Rewrite, ...]) -> tuple[Rewrite, ...]:
        return tuple(replace(one, prompt_index=None) for one in told)

    with pytest.raises(Unbound, match="prompt_index: expected 0, got None"):
        verdict(fanned(rewrites=unnamed))


def test_there_is_a_choice_for_every_request_that_the_engine_got() -> None:
    with pytest.raises(Unbound, match="one per choice"):
        verdict(fanned(choices=3))


def test_many_choices_take_little_longer_than_one() -> None:
    """The request is parsed once, and what its choices share is put in canonical form once."""
    turns: list[JsonValue] = [{"role": "user", "content": "x"}] * 5_000

    def taken(count: int) -> float:
        body: JsonObject = {"model": "m", "messages": turns, "n": count}
        request = parse_request(Endpoint.CHAT, body)
        plans = plan_choices(request, response_id="c-1", seed=7, cache_salt=SALT, max_choices=count)
        rewrites = tuple(rewrite_of(plan) for plan in plans)
        engine = EngineUsed(Z, 7, deterministic=True, rewrite=rewrites)
        body_hash = forwarded_hash(forwarded_bodies(body, plans))
        began = time.process_time()
        check_rewrites(engine, Endpoint.CHAT, "c-1")
        wanted = read_request(canonical_json(body), Endpoint.CHAT)
        check_forwarded(wanted, engine, "c-1", body_hash)
        return time.process_time() - began

    one = min(taken(1) for _ in range(3))
    assert taken(128) < 20 * one


def test_as_many_rewrites_as_choices_are_looked_for_before_any_is_made() -> None:
    request = REQUEST.replace(b"}],", b'}],"n":128,')
    with pytest.raises(Unbound, match="expected 128, one per choice, got 1"):
        verdict(made(request=request, change=forwarding(request, REWRITE)))


def test_a_request_that_the_gateway_refuses_was_not_forwarded() -> None:
    request = REQUEST.replace(b"}],", b'}],"n":0,')
    with pytest.raises(Unbound, match="such a request is not"):
        verdict(made(request=request, change=forwarding(request, REWRITE)))


def test_a_key_that_the_configuration_adds_changes_nothing_of_a_rewrite() -> None:
    request = REQUEST.replace(b"}],", b'}],"added":{"a":1},')
    assert own_checks(verdict(made(request=request, change=forwarding(request, REWRITE)))) == []


def test_an_answer_has_the_form_of_its_endpoint() -> None:
    choice: JsonObject = {"index": 0, "text": "The sky.", "finish_reason": "stop"}
    chat: JsonObject = {**ANSWER, "choices": [choice]}
    output = output_of_answer(chat, max_bytes=100)
    with pytest.raises(Unbound, match="choices with a message"):
        verdict(
            made(
                response=canonical_json(chat),
                change=other_output(output_digest=output.digest),
            )
        )


def test_an_answer_under_another_id_than_the_receipts_is_refused() -> None:
    with pytest.raises(Unbound, match=r"receipt\.chat_id"):
        verdict(made(response=canonical_json({**ANSWER, "id": "c-2"})))


SAID = encode_event(
    {
        "id": "c-1",
        "choices": [{"index": 0, "delta": {"content": "The sky."}, "finish_reason": "stop"}],
    }
)
ERROR = encode_event({"error": {"message": "x", "code": "engine_failed"}})


@pytest.mark.parametrize(
    "stream",
    [
        SAID,
        SAID + ERROR,
        SAID + ERROR + DONE_EVENT,
        SAID + DONE_EVENT + DONE_EVENT,
        DONE_EVENT + SAID,
        SAID + DONE_EVENT + PING,
        SAID + PING_LINE + DONE_EVENT + DONE_EVENT,
        SAID.replace(b"c-1", b"c-2") + DONE_EVENT,
        SAID.replace(b'"delta"', b'"text":"no","delta"') + DONE_EVENT,
        SAID.replace(b'"delta"', b'"message":{"content":"no"},"delta"') + DONE_EVENT,
        SAID.replace(b'"delta"', b'"delta":{"content":"no"},"delta"') + DONE_EVENT,
        SAID.replace(b'"delta"', b'"message"') + DONE_EVENT,
        SAID.replace(b"{", b"{\r", 1) + DONE_EVENT,
        SAID + b'data: {"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n" + DONE_EVENT,
    ],
)
@pytest.mark.parametrize("digest", [True, False])
def test_a_complete_stream_that_a_client_could_read_otherwise_is_refused(
    stream: bytes, digest: bool
) -> None:
    assert own_checks(verdict(made(response=SAID + DONE_EVENT))) == []
    change = (lambda log: log) if digest else other_output(output_digest=None)
    lie = made(response=stream, change=change)
    if digest:
        with pytest.raises(Unbound, match=r"response|receipt\.chat_id"):
            verdict(lie)
    elif stream.count(DONE_EVENT) != 1 or not stream.endswith(DONE_EVENT):
        with pytest.raises(Unbound, match="response"):
            verdict(lie)


def test_an_answer_is_a_stream_exactly_where_one_was_asked_for() -> None:
    with pytest.raises(Unbound, match="expected a stream"):
        verdict(made(request=STREAM_REQUEST))
    with pytest.raises(Unbound, match="expected no stream"):
        verdict(made(request=REQUEST, response=SAID + DONE_EVENT))


@pytest.mark.parametrize(
    "told",
    [
        b'"dcv":{"final":true}',
        b'"dcv" :{"final":true}',
        b'"d\\u0063v":{"final":true}',
        b'"attestation":{"verified":true}',
        b'"\\u0061ttestation":{"verified":true}',
        b'"resolved_model":{"id":"m"}',
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_no_spelling_hides_a_forged_proof(told: bytes, stream: bool) -> None:
    content = canonical_json(ANSWER)[:-1] + b"," + told + b"}"
    if stream:
        content = SAID + b'data: {"choices":[],' + told + b"}\n\n" + DONE_EVENT
    with pytest.raises(Unbound, match="the response has one that is none"):
        verdict(made(response=content))


def test_an_appliances_own_bad_verdict_is_ours() -> None:
    result = verdict(made(change=other_admission(verdict="contraindicated")))
    assert result.verdict is Tier.CONTRAINDICATED
    assert own_checks(result) == ["receipt.admission_verdict"]


def test_a_better_word_of_the_appliance_than_the_evidence_allows_is_a_finding() -> None:
    result = verdict(made(change=other_admission(verdict="affirming")))
    assert result.verdict is Tier.WARNING
    assert own_checks(result) == ["receipt.admission_verdict"]


def test_an_epoch_is_there_once() -> None:
    exchange = made()
    forged = replace(exchange.epochs[0], root=Z)
    for epochs in ((forged, *exchange.epochs), (*exchange.epochs, forged)):
        with pytest.raises(Unbound, match="every epoch once"):
            verdict(replace(exchange, epochs=epochs))


def test_no_digest_is_a_finding_at_every_endpoint() -> None:
    result = verdict(made(change=other_output(output_digest=None, finish_reasons=())))
    assert own_checks(result) == ["receipt.output_digest"]


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


# ------------------------------------------------------------------------------- checkpoints


def other_core(**changed: Any) -> Proof:
    return Proof(core=lambda core: replace(core, **changed))


def other_dcv(**changed: Any) -> Proof:
    """Changed after it was signed."""

    def change(members: JsonObject) -> JsonObject:
        dcv = members["dcv"]
        assert isinstance(dcv, dict)
        return {**members, "dcv": {**dcv, **changed}}

    return Proof(members=change)


def other_shown(**changed: Any) -> Proof:
    def change(members: JsonObject) -> JsonObject:
        attestation = members["attestation"]
        assert isinstance(attestation, dict)
        return {**members, "attestation": {**attestation, **changed}}

    return Proof(members=change)


def without(name: str) -> Proof:
    return Proof(members=lambda members: {key: one for key, one in members.items() if key != name})


def other_model(**changed: Any) -> Proof:
    return Proof(members=lambda members: {**members, "resolved_model": {**RESOLVED, **changed}})


PROOF_LIES: list[tuple[str, Proof]] = [
    ("checkpoint.seq", other_core(seq=7)),
    ("checkpoint.receipt_id", other_core(receipt_id="cd" * 16)),
    ("checkpoint.workload_keyset_digest", other_core(keyset_digest=Z)),
    ("checkpoint.request_body_hash", other_core(request_body_hash=Z)),
    ("checkpoint.prefix_bytes", other_core(prefix_bytes=3, prefix_sha256=Z)),
    ("checkpoint.output_digest", other_core(output_digest=Z)),
    ("checkpoint.output_digest", other_core(output_digest=None)),
    (
        "checkpoint.gpu",
        Proof(core=lambda core: replace(core, gpu=replace(core.gpu, verdict="none"))),
    ),
    ("checkpoint: expected a signature", other_core(key_id="receipt-1")),
    ("checkpoint: its signature", Proof(secret=RECEIPT_SECRET)),
    ("checkpoint: its signature", other_dcv(seq=1)),
    ("expected it only beside a checkpoint", other_dcv(completion=None)),
    ("checkpoint: its signature", other_dcv(signature="00" * 64)),
    ("the response has one that is none", other_dcv(signature="00")),
    ("the response has one that is none", other_dcv(more=1)),
    ("expected it only beside a checkpoint", without("dcv")),
    ("attestation: expected it", without("attestation")),
    ("attestation: it does not parse", other_shown(evidences=[])),
    ("attestation.raw", other_shown(raw="{}")),
    ("attestation.raw", other_shown(raw=None)),
    ("attestation.nonce", other_shown(nonce="00" * 32)),
    ("attestation.inclusion", other_shown(inclusion=None)),
    ("attestation.evidences", other_shown(evidences=[{"evidence": "AAAA", "certificate": "AAAA"}])),
    ("resolved_model", without("resolved_model")),
    ("resolved_model.id", other_model(id="n")),
    ("resolved_model.revision", other_model(revision="main")),
    ("resolved_model.digest", Proof(members=lambda one: {**one, "resolved_model": {"id": "m"}})),
    ("resolved_model.x", other_model(x=None)),
]


@pytest.mark.parametrize(("named", "proof"), PROOF_LIES)
def test_a_lie_in_an_answers_own_proof_is_refused_and_named(named: str, proof: Proof) -> None:
    with pytest.raises(EvidenceError, match=named.replace(".", r"\.")):
        verdict(made(completion=True, proof=proof))


@pytest.mark.parametrize(
    ("named", "content"),
    [
        ("checkpoint.prefix_bytes", lambda content: PING + content),
        ("checkpoint.prefix_sha256", lambda content: content.replace(b"The ", b"Thy ")),
        ("checkpoint.prefix_sha256", lambda content: content.replace(b"sky.", b"sea.")),
        ("checkpoint.final", lambda content: content.replace(DONE_EVENT, PING + DONE_EVENT)),
        (
            "checkpoint.final",
            lambda content: content[: -len(DONE_EVENT)] + content[content.index(COMMENT) :],
        ),
        ("got none", lambda content: content[: content.index(PING_LINE + PING_LINE)] + DONE_EVENT),
    ],
)
def test_a_stream_whose_bytes_are_not_those_before_a_checkpoint_is_refused(
    named: str, content: Callable[[bytes], bytes]
) -> None:
    """The receipt is signed over the changed stream, so that nothing else finds it."""
    with pytest.raises(EvidenceError, match=named.replace(".", r"\.")):
        verdict(made(completion=True, stream=True, proof=Proof(content=content)))


def test_completion_evidence_may_be_of_a_renewed_keyset_with_the_same_keys() -> None:
    keyset = HERE.report.keyset
    for later in (keyset.not_after + 1, AT + 24 * 3600):
        renewed = replace(keyset, not_after=later)
        result = verdict(made(completion=True, proof=Proof(keyset=renewed)))
        assert own_checks(result) == []


@pytest.mark.parametrize(
    "keyset",
    [
        replace(HERE.report.keyset, not_after=AT + 1800),  # an earlier one
        replace(HERE.report.keyset, not_after=AT + 25 * 3600),  # no keyset lasts so long
        replace(HERE.report.keyset, not_after=AT + 7200, tls=(Z,)),
        replace(HERE.report.keyset, not_after=AT + 7200, receipt_keys=(CHECKPOINT_KEY,)),
        replace(HERE.report.keyset, not_after=AT + 7200, subject=ELSEWHERE.report.keyset.subject),
        ELSEWHERE.report.keyset,
    ],
)
def test_completion_evidence_of_any_other_keyset_is_refused(keyset: Keyset) -> None:
    with pytest.raises(Unbound, match="a later keyset with its subject and keys"):
        verdict(made(completion=True, proof=Proof(keyset=keyset)))


@pytest.mark.parametrize("leave", [0, 1])
def test_completion_evidence_is_verified_like_the_admissions(leave: int) -> None:
    whole = made(completion=True)
    less = replace(whole, epochs=whole.epochs[leave : leave + 1])
    missing = ("completion", "admission")[leave]
    assert own_checks(verdict(less)) == [f"receipt.{missing}_evidence"]
    # GPUs that are not those of the instance document, or another nonce's evidence.
    epoch = whole.epochs[1]
    old, _ = HERE.epoch("completion", [Z], 0)
    forged = replace(epoch, gpus=old.gpus)
    with pytest.raises(Unbound, match="evidence_digest"):
        verdict(replace(whole, epochs=(whole.epochs[0], forged)))


def test_an_exchange_that_broke_off_behind_its_checkpoint_is_held_to_what_came() -> None:
    def broke_off(log: EventLog) -> EventLog:
        return replace(
            log,
            output=None,
            completion=None,
            ended=replace(log.ended, outcome="client_disconnected"),
        )

    cut = made(completion=True, stream=True, change=broke_off)
    assert own_checks(verdict(replace(cut, epochs=cut.epochs[:1]))) == ["receipt.outcome"]


# ---------------------------------------------------------------------------------- cut streams


CUT = made(completion=True, stream=True).response or b""


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(CUT)))
def test_a_cut_stream_is_proven_up_to_its_last_whole_checkpoint(cut: int) -> None:
    starts = [one.start for one in find_checkpoints(CUT[:cut])]
    if not starts:
        with pytest.raises(Unbound, match="got none"):
            check_cut_stream(CUT[:cut], report=HERE.report)
        return
    found = check_cut_stream(CUT[:cut], report=HERE.report, request=STREAM_REQUEST)
    assert found.core.prefix_bytes == starts[-1]
    assert found.core.prefix_sha256 == hashlib.sha256(CUT[: starts[-1]]).digest()


FIRST_END = CUT.index(b"\n\n", CUT.index(COMMENT)) + 2


@settings(max_examples=150, deadline=None)
@given(st.integers(0, FIRST_END - 1), st.integers(0, 7))
def test_no_byte_of_a_cut_stream_up_to_its_checkpoint_can_be_changed(place: int, bit: int) -> None:
    changed = bytearray(CUT[:FIRST_END])
    changed[place] ^= 1 << bit
    with pytest.raises((EvidenceError, Malformed)):
        check_cut_stream(bytes(changed), report=HERE.report, request=STREAM_REQUEST)


def test_a_cut_stream_of_another_request_appliance_or_keyset_is_refused() -> None:
    content = CUT[:FIRST_END]
    with pytest.raises(Unbound, match="request_body_hash"):
        check_cut_stream(content, report=HERE.report, request=STREAM_REQUEST + b" ")
    renewed = replace(HERE.report, keyset_digest=Z)
    with pytest.raises(Unbound, match="workload_keyset_digest"):
        check_cut_stream(content, report=renewed)
    other = made(ELSEWHERE, completion=True, stream=True).response or b""
    with pytest.raises(Unbound, match="workload_keyset_digest"):
        check_cut_stream(other, report=HERE.report)


def test_a_cut_stream_is_a_warning_that_says_what_is_open() -> None:
    content = CUT[:FIRST_END]
    result = appraise_cut_stream(content, report=HERE.report, request=STREAM_REQUEST)
    assert result.verdict is Tier.WARNING
    checks = [finding.check for finding in result.findings]
    assert checks == ["checkpoint.stream", "checkpoint.admission_evidence"]
    assert result.claims["proven_bytes"] == CUT.index(COMMENT)
    assert result.claims["received_bytes"] == len(content)
    less = appraise_cut_stream(content, report=HERE.report)
    assert less.findings[-1].check == "checkpoint.request"


def test_a_cut_streams_evidence_is_of_its_keysets_time() -> None:
    keyset = HERE.report.keyset
    collected_at = check_cut_stream(CUT, report=HERE.report).core.gpu.collected_at
    for not_after in (collected_at, collected_at + 25 * 3600):
        other = replace(HERE.report, keyset=replace(keyset, not_after=not_after))
        with pytest.raises(Stale, match="collected_at"):
            appraise_cut_stream(CUT, report=other)


def test_a_cut_stream_that_went_on_against_its_own_verdict_is_contraindicated() -> None:
    went_on = Proof(
        core=lambda core: replace(core, gpu=replace(core.gpu, verdict="contraindicated"))
    )
    content = made(completion=True, stream=True, proof=went_on).response or b""
    result = appraise_cut_stream(content, report=HERE.report, request=STREAM_REQUEST)
    assert result.verdict is Tier.CONTRAINDICATED
    assert result.findings[-1].check == "checkpoint.admission_verdict"


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


THE_MAKERS_WORD = {
    "url": "where it was fetched: whoever made the file says so",
    "fetched_at": "as `url`; the receipt has a time of the appliance's",
    "report.attestation.source_provenance.repo_url": "no measurement says where source lies",
    "report.attestation.source_provenance.image_provenance": "as `repo_url`; ours is null",
    "report.attestation.source_provenance.image_digest": "until reference values are given",
    # Nobody vouches for simulated hardware; of NVIDIA's, tests/unit/test_revocation.py.
    "report.attestation.evidence.gpu.gpus.0.ocsp_b64": "simulated",
    "report.attestation.evidence.gpu.gpus.1.ocsp_b64": "simulated",
    **{f"epochs.{epoch}.gpus.{gpu}.ocsp_b64": "simulated" for epoch in (0, 1) for gpu in (0, 1)},
}
"""What an altered bundle may say, and why."""

COVERED_BY = {
    # The beginning of a member's place, to what is said not to hold where the member does not.
    "api_version": "of dcv/1",
    "nonce": "report_data",
    "spki_sha256": "TLS key",
    "receipt": "receipt: its signature",
    "report.service_capabilities": "report: expected it as it was understood",
    "report.attestation.workload_keyset": "workload_keyset_digest",
    "report.attestation.workload_keyset.receipt_signing_keys": "receipt_signing_keys",
    "report.attestation.evidence.cpu.report_b64": "the report's signature",
    "report.attestation.evidence.instance": "subject",
    "report.attestation.evidence.instance.keys": "instance.keys",
    "report.attestation.evidence.workload": "subject",
    "report.attestation.evidence.policy": "policy_digest",
    "report.attestation.evidence.gpu.inclusion": "inclusion.",
    "report.attestation.evidence.gpu.gpus": "evidence_digest",
    "epochs": "evidence_digest",
}


def members(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a document that has nothing below it."""
    if value and isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from members(item, f"{place}.{name}" if place else str(name))
    else:
        yield place, value


def altered(value: Any, place: str) -> Any:
    """Another value of the same form."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str():
            middle = len(value) // 3
            return value[:middle] + ("1" if value[middle] == "0" else "0") + value[middle + 1 :]
        case None:
            return "sha256:" + "00" * 32 if place.endswith("digest") else "x"
        case []:
            return ["AAAA"] if place.endswith("b64") else ["00" * 32]
        case _:
            return {"x": 1}


@pytest.mark.parametrize("place", [place for place, _ in members(json.loads(FILE))])
def test_every_member_of_a_bundle_is_held_to_something_that_is_named(place: str) -> None:
    document: Any = json.loads(FILE)
    *above, last = (int(name) if name.isdecimal() else name for name in place.split("."))
    inside = document
    for name in above:
        inside = inside[name]
    inside[last] = altered(inside[last], place)
    error = refusal(json.dumps(document).encode())
    if place in THE_MAKERS_WORD:
        assert error is None
        return
    assert error is not None
    named = next(name for name in reversed(place.split(".")) if not name.isdecimal())
    covers = [text for start, text in COVERED_BY.items() if place.startswith(start)]
    words = [named.removesuffix("_b64").removesuffix("s"), *covers]
    assert any(word.lower() in error.message.lower() for word in words), error.message


def test_what_no_measurement_backs_is_said_to_be_the_makers_word() -> None:
    result = check(parse_bundle(FILE), RULES, at=NOW)
    [told] = [one for one in result.findings if one.check == "report.source_provenance"]
    assert told.tier is Tier.AFFIRMING
    assert told.got == "repo_url, image_digest: the word of whoever made the report"


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


# ------------------------------------------------------------------------------------- embeddings

EMBEDDINGS = "/v1/embeddings"
TEXTS = b'{"input":["What is up?","What else?"],"model":"m"}'
USAGE: JsonObject = {"prompt_tokens": 7, "total_tokens": 7}
VECTORS: JsonObject = {
    "object": "list",
    "data": [
        {"object": "embedding", "index": 0, "embedding": [0.5, -0.25]},
        {"object": "embedding", "index": 1, "embedding": "AACAPwAAIMA="},
    ],
    "model": "m",
    "usage": USAGE,
}


def embedded(
    change: Callable[[EventLog], EventLog] = lambda log: log,
    *,
    response: JsonObject = VECTORS,
    request: bytes = TEXTS,
    rewrites: tuple[Rewrite, ...] = (Rewrite({}, ()),),
) -> Exchange:
    def truth(log: EventLog) -> EventLog:
        log = forwarding(request, *rewrites)(log)
        assert log.engine is not None
        output = OutputComplete(None, (), USAGE)
        return change(replace(log, engine=replace(log.engine, seed=0), output=output))

    data = canonical_json(response)
    return made(request=request, response=data, change=truth, endpoint=EMBEDDINGS)


def test_embeddings_as_they_were_have_no_finding_of_their_own() -> None:
    result = verdict(embedded())
    assert result.verdict is Tier.WARNING  # simulated hardware
    assert own_checks(result) == []
    ignored = TEXTS.replace(b'"model"', b'"user":"u","model"')
    result = verdict(embedded(request=ignored, rewrites=(Rewrite({}, ("user",)),)))
    assert own_checks(result) == []


def of_output(**changed: Any) -> Callable[[EventLog], EventLog]:
    def change(log: EventLog) -> EventLog:
        assert log.output is not None
        return replace(log, output=replace(log.output, **changed))

    return change


def of_engine(**changed: Any) -> Callable[[EventLog], EventLog]:
    def change(log: EventLog) -> EventLog:
        assert log.engine is not None
        return replace(log, engine=replace(log.engine, **changed))

    return change


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("no output_digest", of_output(output_digest=b"\x01" * 32)),
        ("no finish_reasons", of_output(finish_reasons=("stop",))),
        ("dcv.output.usage", of_output(usage=None)),
        ("dcv.output.usage", of_output(usage={"prompt_tokens": 8, "total_tokens": 8})),
        ("dcv.engine.seed", of_engine(seed=1)),
        ("sets nothing", of_engine(rewrite=(Rewrite({"rid": "c-1"}, ()),))),
        ("sets nothing", of_engine(rewrite=(Rewrite({}, ()), Rewrite({}, ())))),
        ("sets nothing", of_engine(rewrite=(Rewrite({}, (), 0),))),
        ("unset", of_engine(rewrite=(Rewrite({}, ("input",)),))),
        ("unset", of_engine(rewrite=(Rewrite({}, ("user", "tee")),))),
        ("unset", of_engine(rewrite=(Rewrite({}, ("user",)),))),
        ("request.forwarded", lambda log: replace(log, forwarded=RequestForwarded(b"\x01" * 32))),
    ],
)
def test_a_signed_lie_about_embeddings_is_refused_and_named(
    named: str, change: Callable[[EventLog], EventLog]
) -> None:
    with pytest.raises(EvidenceError, match=named.replace(".", r"\.")):
        verdict(embedded(change))


@pytest.mark.parametrize(
    ("named", "changed"),
    [
        ("no answer", {"data": None}),
        ("no answer", {"data": [{"index": 1, "embedding": [1]}]}),
        ("no answer", {"data": [{"index": 0, "embedding": [0.1]}]}),
        ("expected 2 embeddings, got 1", {"data": [{"index": 0, "embedding": [0.5]}]}),
        ("expected no error", {"error": {"message": "m"}}),
        ("dcv.output.usage", {"usage": None}),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused_and_named(
    named: str, changed: JsonObject
) -> None:
    """Signed, with the hash of the bytes."""
    with pytest.raises(EvidenceError, match=named.replace(".", r"\.")):
        verdict(embedded(response={**VECTORS, **changed}))


def test_another_number_is_another_response() -> None:
    exchange = embedded()
    assert exchange.response is not None
    changed = exchange.response.replace(b"-0.25", b"-0.26")
    with pytest.raises(Unbound, match=r"response\.returned"):
        verdict(replace(exchange, response=changed))
