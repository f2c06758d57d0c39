"""The worked example at the end of docs/protocol.md: every value of it, computed by the project.

    python docs/generate.py            # writes it, with the reference pages

Nothing in it is secret or random: keys, nonces and ids are SHA-256 of the labels below. A test
reads the document and computes every value again, without this file.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from appliance.wire.canonical import JsonObject, JsonValue, canonical_json, parse_json_object
from appliance.wire.checkpoint import Core, checkpoint_comment, sign_checkpoint
from appliance.wire.commitments import (
    Inclusion,
    Kind,
    completion_commitment,
    epoch_nonce,
    generate_commitment,
    gpu_evidence_digest,
    report_commitment,
    request_commitment,
)
from appliance.wire.eat import eat_claims, sign_eat
from appliance.wire.encoding import format_sha256
from appliance.wire.evidence import GpuEvidence
from appliance.wire.identity import (
    Keyset,
    PublicKey,
    digest_of,
    instance_document,
    report_data_of,
    statement,
    subject_of,
    workload_manifest,
)
from appliance.wire.merkle import MerkleTree
from appliance.wire.openai import ChoicePlan, Endpoint, parse_request, plan_choices
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
    forwarded_bytes,
    forwarded_hash,
    receipt_document,
    rewrite_of,
    sign_receipt,
    signing_input,
)
from appliance.wire.sse import DONE_EVENT, PING, encode_event

BEGIN = "<!-- Worked example, written by docs/protocol_example.py; `just docs` writes it again. -->"
END = "<!-- End of the worked example. -->"

NOW = 1_767_225_600
MODEL = "example/model"
MAX_BYTES = 1 << 16


def secret(label: str) -> bytes:
    """32 bytes that everybody knows."""
    return hashlib.sha256(f"dcv/1 example {label}".encode("ascii")).digest()


def private_key(label: str) -> Ed25519PrivateKey:
    """A key that is worthless because its seed is published."""
    return Ed25519PrivateKey.from_private_bytes(secret(label))


def public_key(label: str) -> PublicKey:
    """Its public half, under the label's first word."""
    raw = private_key(label).public_key().public_bytes_raw()
    return PublicKey(f"{label.partition(' ')[0]}-1", raw)


@dataclass(frozen=True, slots=True)
class Identity:
    """Section 1 of the document."""

    policy: JsonObject
    manifest: JsonObject
    instance: JsonObject
    keyset: Keyset


def example_identity() -> Identity:
    """The documents of one boot; two GPUs."""
    policy: JsonObject = {"gpus": "nvidia", "tee_types": ["sev_snp"]}
    manifest = workload_manifest(
        image={"version": "1.0.0", "commit": None, "roothash": None},
        model={
            "id": MODEL,
            "revision": "main",
            "digest": format_sha256(secret("model files")),
            "tokenizer_digest": format_sha256(secret("tokenizer")),
            "chat_template_digest": None,
        },
        engine={
            "name": "sglang",
            "version": "0.5.23",
            "settings_digest": format_sha256(secret("engine settings")),
            "dtype": "bfloat16",
            "deterministic": True,
            "random_seed": 42,
        },
        policy=policy,
    )
    gpus: list[JsonObject] = [
        {
            "scheme": "nvidia_gpu",
            "device_cert_sha256": secret(f"device certificate {index}").hex(),
            "ueid": str(1000 + index),
        }
        for index in range(2)
    ]
    instance = instance_document(
        gpus=gpus, checkpoint_key=public_key("checkpoint key"), operator_input_digest=None
    )
    spki = private_key("tls key").public_key()
    der = spki.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    keyset = Keyset(
        subject=subject_of(digest_of(manifest), digest_of(instance)),
        not_after=NOW + 86_400,
        receipt_keys=(public_key("receipt key"),),
        tls=(hashlib.sha256(der).digest(),),
    )
    return Identity(policy, manifest, instance, keyset)


CHAT_REQUEST = (
    b'{"model": "example/model", "messages": [{"role": "user", "content": "Say hi."}],'
    b' "stream": true, "seed": 7, "user": "u-1"}'
)
LIST_REQUEST = b'{"model":"example/model","prompt":["One","Two"],"max_tokens":4,"seed":7}'


def plans_of(endpoint: Endpoint, raw: bytes, response_id: str) -> tuple[ChoicePlan, ...]:
    """What the gateway makes of a request."""
    wanted = parse_request(endpoint, parse_json_object(raw, max_nesting=64))
    return plan_choices(
        wanted,
        response_id=response_id,
        seed=0,  # the client sent one
        cache_salt=secret("cache salt").hex(),
        max_choices=16,
    )


def chat_stream(chat_id: str) -> bytes:
    """An answer in events, a heartbeat between two of them."""
    deltas: list[tuple[JsonObject, str | None]] = [
        ({"role": "assistant", "content": "Hi"}, None),
        ({"content": "!"}, None),
        ({}, "stop"),
    ]
    events = []
    for delta, reason in deltas:
        chunk: JsonObject = {
            "id": chat_id,
            "object": "chat.completion.chunk",
            "created": NOW,
            "model": MODEL,
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
        }
        events.append(encode_event(chunk))
    events.insert(2, PING)
    return b"".join((*events, DONE_EVENT))


def whole_answer(chat_id: str) -> JsonObject:
    """The same answer, not streamed."""
    return {
        "id": chat_id,
        "object": "chat.completion",
        "created": NOW,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi!", "tool_calls": None},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
    }


def inclusion_of(kind: Kind, tree: MerkleTree, index: int, keyset_digest: bytes) -> Inclusion:
    """Where a leaf of the example's epoch stands."""
    return Inclusion(kind, keyset_digest, tree.size, index, tree.path(index), tree.root)


def worked_example() -> str:
    """The region of the document, markers included."""
    made = example_identity()
    keyset_digest = made.keyset.digest
    nonce = secret("nonce")
    page = _Page()
    _identity(page, made, nonce)
    receipt_id, blind = secret("receipt id")[:16].hex(), secret("blind")
    body_sha256 = hashlib.sha256(CHAT_REQUEST).digest()
    request_leaf = request_commitment(
        receipt_id,
        "/v1/chat/completions",
        client_nonce=nonce,
        body_sha256=body_sha256,
        blind=blind,
    )
    leaves = (report_commitment(nonce), request_leaf, generate_commitment(nonce))
    tree = MerkleTree.over(leaves)
    inclusion = inclusion_of("request", tree, 1, keyset_digest)
    gpus = tuple(
        GpuEvidence(
            "nvidia_gpu", f"report of GPU {index}".encode(), f"chain of GPU {index}".encode()
        )
        for index in range(2)
    )
    evidence_digest = gpu_evidence_digest(gpus)
    _epoch(page, receipt_id, blind, leaves, tree, keyset_digest, gpus)
    chat_id = "chatcmpl-" + secret("response id")[:16].hex()
    plans = plans_of(Endpoint.CHAT, CHAT_REQUEST, chat_id)
    _forwarded(page, plans)
    stream = chat_stream(chat_id)
    _output(page, stream, whole_answer(chat_id))
    output = output_of_stream(stream, max_bytes=MAX_BYTES)
    admission = GpuAttested("admission", evidence_digest, inclusion, "affirming", NOW + 1)
    document = receipt_document(
        receipt_id=receipt_id,
        chat_id=chat_id,
        model=MODEL,
        keyset_digest=keyset_digest,
        endpoint="/v1/chat/completions",
        method="POST",
        served_at=NOW + 3,
        events=EventLog(
            received=RequestReceived(body_sha256),
            committed=RequestCommitted(request_leaf, nonce, blind),
            admission=admission,
            forwarded=RequestForwarded(
                forwarded_hash(forwarded_bytes(CHAT_REQUEST, rewrite_of(plan)) for plan in plans)
            ),
            engine=EngineUsed(
                digest_of(made.manifest),
                seed=7,
                deterministic=True,
                rewrite=tuple(rewrite_of(plan) for plan in plans),
            ),
            output=OutputComplete(output.digest, output.finish_reasons, output.usage),
            completion=None,
            ended=Ended("complete", None, len(stream)),
            returned=ResponseReturned(hashlib.sha256(stream).digest()),
        ),
    )
    _receipt(page, document)
    first_events = stream[: stream.index(PING)]
    running = Core(
        seq=0,
        final=False,
        receipt_id=receipt_id,
        keyset_digest=keyset_digest,
        request_body_hash=body_sha256,
        prefix_bytes=len(first_events),
        prefix_sha256=hashlib.sha256(first_events).digest(),
        output_digest=None,
        gpu=admission,
        key_id=public_key("checkpoint key").key_id,
    )
    prefix = stream.removesuffix(DONE_EVENT)
    final = replace(
        running,
        seq=1,
        final=True,
        prefix_bytes=len(prefix),
        prefix_sha256=hashlib.sha256(prefix).digest(),
        output_digest=output.digest,
    )
    _checkpoints(page, running, final)
    _token(page, inclusion.nonce, made.keyset.subject)
    return page.text()


# ------------------------------------------------------------------------------- its sections


def _identity(page: _Page, made: Identity, nonce: bytes) -> None:
    digest = made.keyset.digest
    page.say(
        "### Identity",
        "The private keys: Ed25519, the seed of each is `sha256` of the text in the left column. The "
        "TLS key's `spki_sha256` is of the 44-byte SubjectPublicKeyInfo (RFC 8410).",
        "| seed | role |\n|---|---|\n"
        "| `dcv/1 example receipt key` | receipts |\n"
        "| `dcv/1 example checkpoint key` | checkpoints, EAT |\n"
        "| `dcv/1 example tls key` | TLS |",
        "The report's `policy`, shortened here to two keys, and the documents that lead to the "
        "keyset. A document may be served in any spelling: its digest is that of the JCS form.",
    )
    page.document("policy", made.policy)
    page.document("manifest", made.manifest)
    page.hex("W", digest_of(made.manifest))
    page.document("instance", made.instance)
    page.hex("I", digest_of(made.instance))
    page.document("keyset", made.keyset.to_json())
    page.hex("keyset_digest", digest)
    page.say("For the nonce below, and for the null form:")
    page.hex("nonce", nonce)
    page.line("statement", statement(digest, nonce))
    page.hex("report_data", report_data_of(digest, nonce))
    page.line("statement_null", statement(digest, None))
    page.hex("report_data_null", report_data_of(digest, None))


def _epoch(
    page: _Page,
    receipt_id: str,
    blind: bytes,
    leaves: tuple[bytes, ...],
    tree: MerkleTree,
    keyset_digest: bytes,
    gpus: tuple[GpuEvidence, ...],
) -> None:
    page.say(
        "### One epoch",
        "Three parties wait: leaf 0 is a report asked for with the nonce above, leaf 1 the chat "
        "request, leaf 2 a call of `generate` with that nonce. The request is these bytes, blanks "
        "included, sent to `/v1/chat/completions` with the nonce in `X-DCV-Nonce`:",
    )
    page.line("request", CHAT_REQUEST)
    page.line("receipt_id", receipt_id.encode())
    page.hex("blind", blind)
    for name, leaf in zip(("report", "request", "generate"), leaves, strict=True):
        page.hex(f"commitment_{name}", leaf)
    page.hex("root", tree.root)
    page.say(
        "The request's path is a leaf and a leaf; that of leaf 2, which has no sibling, is one node:"
    )
    for index in (1, 2):
        page.document(f"path_{index}", [item.hex() for item in tree.path(index)])
    page.say("What both GPUs are given:")
    page.hex("epoch_nonce", epoch_nonce(keyset_digest, tree.size, tree.root))
    page.say(
        "Evidence digest, over stand-ins for what the GPUs and the driver give. In this order, as "
        "ASCII: the report and the chain of the first, then of the second."
    )
    blobs = [blob for gpu in gpus for blob in (gpu.report, gpu.certificate_chain)]
    page.document("evidence", [blob.decode() for blob in blobs])
    page.hex("evidence_digest", gpu_evidence_digest(gpus))


def _forwarded(page: _Page, plans: tuple[ChoicePlan, ...]) -> None:
    page.say("### What the engine got", "The rewrite of the chat request, and what it leads to:")
    page.document("rewrite", [rewrite_of(plan).to_json() for plan in plans])
    page.line("forwarded", forwarded_bytes(CHAT_REQUEST, rewrite_of(plans[0])))
    page.hex(
        "forwarded_hash", forwarded_hash([forwarded_bytes(CHAT_REQUEST, rewrite_of(plans[0]))])
    )
    page.say(
        "A completion with two prompts becomes two requests; the rewrite names the prompts by their "
        "number. `body_hash` is over both bodies, one directly after the other."
    )
    several = plans_of(
        Endpoint.COMPLETION, LIST_REQUEST, "cmpl-" + secret("response id")[:16].hex()
    )
    rewrites = [rewrite_of(plan) for plan in several]
    bodies = [forwarded_bytes(LIST_REQUEST, one) for one in rewrites]
    page.line("list_request", LIST_REQUEST)
    page.document("list_rewrite", [one.to_json() for one in rewrites])
    page.lines("list_forwarded", b"".join(body + b"\n" for body in bodies))
    page.hex("list_forwarded_hash", forwarded_hash(bodies))


def _output(page: _Page, stream: bytes, answer: JsonObject) -> None:
    digest = output_of_stream(stream, max_bytes=MAX_BYTES).digest
    same = output_of_answer(answer, max_bytes=MAX_BYTES)
    assert same.digest == digest
    hashed: JsonObject = {"choices": list[JsonValue](same.choices)}
    page.say(
        "### What was answered",
        "The stream: the block's lines, each with its LF, the blank last one included.",
    )
    page.lines("stream", stream)
    page.hex("response_hash", hashlib.sha256(stream).digest())
    page.say("The same answer had it not been streamed, and the output that both have:")
    page.document("answer", answer)
    page.line("output", canonical_json(hashed))
    page.hex("output_digest", digest)


def _receipt(page: _Page, document: JsonObject) -> None:
    key = private_key("receipt key")
    signed = parse_json_object(
        sign_receipt(document, key_id=public_key("receipt key").key_id, sign=key.sign),
        max_nesting=64,
    )
    page.say("### The receipt", "As served, but for line breaks and blanks:")
    page.document("receipt", signed)
    page.say("SHA-256 of what the signature is over:")
    page.hex("receipt_signing_input", hashlib.sha256(signing_input(signed)).digest())


def _checkpoints(page: _Page, running: Core, final: Core) -> None:
    sign = private_key("checkpoint key").sign
    page.say(
        "### Checkpoints",
        "What could have stood in this stream. First a comment in place of the heartbeat, about the "
        "two events before it; below it the same, decoded. Its line feeds are not shown.",
    )
    signed = sign_checkpoint(running, None, sign=sign)
    page.line("comment", checkpoint_comment(signed).removesuffix(b"\n\n"))
    page.document("running", signed)
    page.say(
        "Then the core of the last one, right before `[DONE]`: what it commits the completion epoch "
        "to, and the signature of the checkpoint where `tee` was not asked for, which is over the JCS "
        'of the core and `"completion":null`. (The prefix is that of the stream as it is above.)',
    )
    page.document("core", final.to_json())
    page.hex("core_sha256", digest_of(final.to_json()))
    page.hex("commitment_completion", completion_commitment(final.to_json()))
    signature = sign_checkpoint(final, None, sign=sign)["signature"]
    page.hex("checkpoint_signature", bytes.fromhex(str(signature)))


def _token(page: _Page, nonce: bytes, subject: str) -> None:
    page.say(
        "### A token",
        "An EAT about the epoch above; the claims of its GPUs are shortened to one each.",
    )
    claims = eat_claims(
        nonce=nonce,
        issued_at=NOW + 3,
        verdict="affirming",
        gpus=[{"ueid": str(1000 + index)} for index in range(2)],
        subject=subject,
    )
    page.document("eat_claims", claims)
    sign = private_key("checkpoint key").sign
    token = sign_eat(claims, key_id=public_key("checkpoint key").key_id, sign=sign)
    page.line("eat", token.encode())


class _Page:
    """Markdown: paragraphs, byte strings by name, and other values in a fenced block below theirs."""

    def __init__(self) -> None:
        self._parts = [BEGIN]
        self._values: list[tuple[str, str]] = []

    def say(self, *paragraphs: str) -> None:
        """Text; a table and a heading stay as they are."""
        self._flush()
        self._parts += [
            one if one[0] in "|#" else textwrap.fill(one, 118, break_on_hyphens=False)
            for one in paragraphs
        ]

    def hex(self, name: str, value: bytes) -> None:
        """A byte string, in lowercase hex; those in a row share a block."""
        self._values.append((name, value.hex()))

    def document(self, name: str, value: JsonValue) -> None:
        """JSON whose bytes do not count: hashes of it are of its JCS form."""
        self._fence("json", name, json.dumps(value, indent=2))

    def line(self, name: str, value: bytes) -> None:
        """Bytes that count: one line without its line feed."""
        assert b"\n" not in value
        self._fence("text", name, value.decode("ascii"))

    def lines(self, name: str, value: bytes) -> None:
        """Bytes that count: every line with its line feed."""
        self._fence("lines", name, value.decode("ascii").removesuffix("\n"))

    def text(self) -> str:
        """All of it, the markers included."""
        self._flush()
        return "\n\n".join((*self._parts, END))

    def _fence(self, kind: str, name: str, text: str) -> None:
        self._flush()
        self._parts.append(f"`{name}`:\n\n```{kind}\n{text}\n```")

    def _flush(self) -> None:
        if not self._values:
            return
        width = max(len(name) for name, _ in self._values)
        block = "\n".join(f"{name:{width}} = {value}" for name, value in self._values)
        self._parts.append(f"```values\n{block}\n```")
        self._values.clear()
