"""The worked example of docs/protocol.md, recomputed from the document alone.

Twice: by a few lines of `hashlib`, `json` and Ed25519, which share nothing with the project, and
by the project's own functions. Both read their inputs from the document, never from the script
that wrote it. Every value in it is checked: one that no test knows fails.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from appliance.errors import Unauthentic
from appliance.rats import binding
from appliance.wire import checkpoint, commitments, identity, merkle, output, receipt
from appliance.wire.canonical import JsonObject, canonical_json
from appliance.wire.evidence import GpuEvidence
from appliance.wire.receipt import Rewrite

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"

_BLOCK = re.compile(
    r"^`(?P<name>\w+)`:\n\n```(?P<kind>json|text|lines)\n(?P<body>.*?)^```$"
    r"|^```values\n(?P<values>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_VALUE = re.compile(r"^(\w+) += ([0-9a-f]+)$")


def example() -> dict[str, Any]:
    """Values as bytes, `json` blocks parsed, `text` and `lines` blocks as bytes; each name once."""
    region = DOCUMENT.read_text(encoding="utf-8").split("## 11. Worked example")[1]
    found: list[tuple[str, Any]] = []
    for block in _BLOCK.finditer(region):
        match block["kind"]:
            case "json":
                found.append((block["name"], json.loads(block["body"])))
            case "text":
                found.append((block["name"], block["body"].removesuffix("\n").encode()))
            case "lines":
                found.append((block["name"], block["body"].encode()))
            case _:
                for line in block["values"].splitlines():
                    value = _VALUE.match(line)
                    assert value, line
                    found.append((value[1], bytes.fromhex(value[2])))
    assert region.count("\n```") == 2 * sum(1 for _ in _BLOCK.finditer(region))
    assert len({name for name, _ in found}) == len(found)
    return dict(found)


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    return example()


# ------------------------------------------------------------- a few lines that share nothing


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def jcs(value: object) -> bytes:
    """RFC 8785 of documents with ASCII texts and integers."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert text.isascii()
    return text.encode()


def H(label: str, *parts: bytes) -> bytes:  # noqa: N802  # its name in the document
    return sha(label.encode() + b"\0" + b"".join(parts))


def prefixed(data: bytes, size: int) -> bytes:
    return len(data).to_bytes(size, "big") + data


def tree_hash(leaves: list[bytes]) -> bytes:
    """RFC 9162 section 2.1.1, by its recursive definition."""
    if len(leaves) == 1:
        return sha(b"\0" + leaves[0])
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    return sha(b"\1" + tree_hash(leaves[:split]) + tree_hash(leaves[split:]))


def audit_path(index: int, leaves: list[bytes]) -> list[str]:
    """RFC 9162 section 2.1.3.1, by its recursive definition."""
    if len(leaves) == 1:
        return []
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    if index < split:
        return [*audit_path(index, leaves[:split]), tree_hash(leaves[split:]).hex()]
    return [*audit_path(index - split, leaves[split:]), tree_hash(leaves[:split]).hex()]


def seed_of(label: str) -> bytes:
    return sha(f"dcv/1 example {label}".encode())


def key_of(label: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(seed_of(label))


def forwarded(body: bytes, rewrite: dict[str, Any]) -> bytes:
    document = {k: v for k, v in json.loads(body).items() if k not in rewrite["unset"]}
    if "prompt_index" in rewrite:
        document["prompt"] = document["prompt"][rewrite["prompt_index"]]
    return jcs(document | rewrite["set"])


def streamed_choice(stream: bytes) -> dict[str, Any]:
    """The one choice of the example's stream, in the form that is hashed."""
    events = [one for one in stream.split(b"\n\n") if one.startswith(b"data: {")]
    chunks = [json.loads(one.removeprefix(b"data: "))["choices"][0] for one in events]
    reasons = [one["finish_reason"] for one in chunks if one["finish_reason"]]
    text = "".join(one["delta"].get("content", "") for one in chunks)
    return {"index": 0, "finish_reason": reasons[-1], "message": {"content": text}}


def by_hand(shown: dict[str, Any]) -> dict[str, Any]:
    """Every value that follows from others, from the inputs in the document."""
    made: dict[str, Any] = {"W": sha(jcs(shown["manifest"])), "I": sha(jcs(shown["instance"]))}
    digest = made["keyset_digest"] = sha(jcs(shown["keyset"]))
    named = "sha256:" + digest.hex()
    for name, nonce in (("", f'"{shown["nonce"].hex()}"'), ("_null", "null")):
        text = f'{{"keyset_digest":"{named}","nonce":{nonce},"purpose":"aci.report_data.v1"}}'
        made[f"statement{name}"] = text.encode()
        made[f"report_data{name}"] = sha(text.encode())
    made["nonce"], made["blind"] = seed_of("nonce"), seed_of("blind")
    made["receipt_id"] = seed_of("receipt id")[:16].hex().encode()
    some = b"\1" + shown["nonce"]
    leaves = [
        H("dcv/1 report", some),
        H(
            "dcv/1 request",
            prefixed(shown["receipt_id"], 2),
            prefixed(b"/v1/chat/completions", 2),
            some,
            sha(shown["request"]),
            shown["blind"],
        ),
        H("dcv/1 generate", shown["nonce"]),
    ]
    for kind, leaf in zip(("report", "request", "generate"), leaves, strict=True):
        made[f"commitment_{kind}"] = leaf
    made["root"] = tree_hash(leaves)
    made["path_1"], made["path_2"] = audit_path(1, leaves), audit_path(2, leaves)
    made["epoch_nonce"] = H("dcv/1 gpu epoch", digest, (3).to_bytes(8, "big"), made["root"])
    blobs = b"".join(prefixed(one.encode(), 4) for one in shown["evidence"])
    made["evidence_digest"] = H("dcv/1 gpu evidence", (2).to_bytes(4, "big"), blobs)
    made["forwarded"] = forwarded(shown["request"], shown["rewrite"][0])
    made["forwarded_hash"] = sha(made["forwarded"])
    several = [forwarded(shown["list_request"], one) for one in shown["list_rewrite"]]
    made["list_forwarded"] = b"".join(one + b"\n" for one in several)
    made["list_forwarded_hash"] = sha(b"".join(several))
    made["response_hash"] = sha(shown["stream"])
    made["output"] = jcs({"choices": [streamed_choice(shown["stream"])]})
    made["output_digest"] = sha(made["output"])
    unsigned = {k: v for k, v in shown["receipt"].items() if k != "signature"}
    made["receipt_signing_input"] = sha(jcs(unsigned))
    made["core_sha256"] = sha(jcs(shown["core"]))
    made["commitment_completion"] = H("dcv/1 completion", made["core_sha256"])
    unfinished = jcs(shown["core"] | {"completion": None})
    made["checkpoint_signature"] = key_of("checkpoint key").sign(unfinished)
    encoded = base64.urlsafe_b64encode(jcs(shown["running"])).rstrip(b"=")
    made["comment"] = b": dcv-checkpoint " + encoded
    header = {"alg": "EdDSA", "kid": "checkpoint-1", "typ": "eat+jwt"}
    signed = b".".join(
        base64.urlsafe_b64encode(jcs(part)).rstrip(b"=") for part in (header, shown["eat_claims"])
    )
    signature = base64.urlsafe_b64encode(key_of("checkpoint key").sign(signed)).rstrip(b"=")
    made["eat"] = signed + b"." + signature
    return made


INPUTS = {
    "policy",
    "manifest",
    "instance",
    "keyset",
    "request",
    "evidence",
    "rewrite",
    "list_request",
    "list_rewrite",
    "stream",
    "answer",
    "receipt",
    "running",
    "core",
    "eat_claims",
}


def test_every_value_of_the_example_follows_from_its_inputs(shown: dict[str, Any]) -> None:
    made = by_hand(shown)
    assert shown.keys() == made.keys() | INPUTS
    for name, value in made.items():
        assert shown[name] == value, name


def test_the_documents_of_the_example_agree(shown: dict[str, Any]) -> None:
    """What stands in one document because it follows from another."""
    policy = "sha256:" + sha(jcs(shown["policy"])).hex()
    assert shown["manifest"]["policy_digest"] == policy
    subject = f"dcv:workload:{shown['W'].hex()}:instance:{shown['I'].hex()}"
    assert shown["keyset"]["subject"] == shown["eat_claims"]["sub"] == subject
    [receipt_key], [tls] = (
        shown["keyset"]["receipt_signing_keys"],
        shown["keyset"]["tls_public_keys"],
    )
    raw = {name: key_of(f"{name} key").public_key().public_bytes_raw() for name in KEYS}
    assert receipt_key["public_key"] == raw["receipt"].hex()
    assert shown["instance"]["keys"][0]["public_key"] == raw["checkpoint"].hex()
    # RFC 8410 section 4: a SubjectPublicKeyInfo of Ed25519 is this and the key.
    assert tls["spki_sha256"] == sha(bytes.fromhex("302a300506032b6570032100") + raw["tls"]).hex()
    assert len(set(raw.values())) == len(KEYS)
    assert shown["eat_claims"]["eat_nonce"] == shown["epoch_nonce"].hex()


KEYS = ("receipt", "checkpoint", "tls")


def test_the_receipt_says_what_the_example_computes(shown: dict[str, Any]) -> None:
    document, named = shown["receipt"], "sha256:" + shown["keyset_digest"].hex()
    events = {one["type"]: one for one in document["event_log"]}

    def digest(name: str) -> str:
        return f"sha256:{shown[name].hex()}"

    assert document["workload_keyset_digest"] == named
    assert document["receipt_id"].encode() == shown["receipt_id"]
    assert [one["type"] for one in document["event_log"]] == [
        "request.received",
        "dcv.request",
        "dcv.gpu.attested",
        "request.forwarded",
        "dcv.engine",
        "dcv.output",
        "dcv.ended",
        "response.returned",
    ]
    assert events["request.received"]["body_hash"] == "sha256:" + sha(shown["request"]).hex()
    assert events["dcv.request"]["commitment"] == shown["commitment_request"].hex()
    assert events["dcv.request"]["blind"] == shown["blind"].hex()
    assert events["dcv.request"]["client_nonce"] == shown["nonce"].hex()
    assert events["dcv.gpu.attested"]["evidence_digest"] == digest("evidence_digest")
    assert events["dcv.gpu.attested"]["inclusion"] == {
        "kind": "request",
        "keyset_digest": named,
        "tree_size": 3,
        "leaf_index": 1,
        "path": shown["path_1"],
        "root": shown["root"].hex(),
    }
    assert events["request.forwarded"]["body_hash"] == digest("forwarded_hash")
    assert events["dcv.engine"]["workload_digest"] == digest("W")
    assert events["dcv.engine"]["rewrite"] == shown["rewrite"]
    assert events["dcv.engine"]["seed"] == str(json.loads(shown["request"])["seed"])
    assert events["dcv.output"]["output_digest"] == digest("output_digest")
    assert events["dcv.ended"]["bytes"] == len(shown["stream"])
    assert events["response.returned"]["body_hash"] == digest("response_hash")
    key = Ed25519PublicKey.from_public_bytes(key_of("receipt key").public_key().public_bytes_raw())
    unsigned = jcs({k: v for k, v in document.items() if k != "signature"})
    key.verify(bytes.fromhex(document["signature"]), unsigned)
    with pytest.raises(InvalidSignature):
        key.verify(bytes.fromhex(document["signature"]), unsigned + b" ")


def test_the_checkpoints_are_about_the_example_s_stream(shown: dict[str, Any]) -> None:
    stream, running, core = (shown[name] for name in ("stream", "running", "core"))
    for said, prefix in (
        (running, stream[: stream.index(b": ping")]),
        (core, stream.removesuffix(b"data: [DONE]\n\n")),
    ):
        assert said["prefix_bytes"] == len(prefix) < len(stream)
        assert said["prefix_sha256"] == sha(prefix).hex()
        assert said["request_body_hash"] == "sha256:" + sha(shown["request"]).hex()
        assert said["gpu"] == shown["receipt"]["event_log"][2]
    assert (running["seq"], running["final"], running["output_digest"]) == (0, False, None)
    assert (core["seq"], core["final"]) == (1, True)
    assert core["output_digest"] == "sha256:" + shown["output_digest"].hex()
    unsigned = {k: v for k, v in running.items() if k != "signature"}
    assert running["signature"] == key_of("checkpoint key").sign(jcs(unsigned)).hex()
    assert running.keys() == core.keys() | {"completion", "signature"}


# ----------------------------------------------------------------------- the project's own code


def test_the_project_computes_the_same_identity(shown: dict[str, Any]) -> None:
    keyset = identity.parse_keyset(shown["keyset"], where="$")
    workload, instance = (identity.digest_of(shown[name]) for name in ("manifest", "instance"))
    assert (workload, instance) == (shown["W"], shown["I"])
    assert identity.subject_of(workload, instance) == keyset.subject
    assert keyset.to_json() == shown["keyset"]
    assert keyset.digest == shown["keyset_digest"]
    for name, nonce in (("", shown["nonce"]), ("_null", None)):
        assert identity.statement(keyset.digest, nonce) == shown[f"statement{name}"]
        assert identity.report_data_of(keyset.digest, nonce) == shown[f"report_data{name}"]
    key = identity.parse_checkpoint_key(shown["instance"], where="$")
    assert key.key_id == shown["core"]["key_id"]


def test_the_project_computes_the_same_epoch(shown: dict[str, Any]) -> None:
    attested = read_log(shown).admission
    assert attested is not None
    binding.check_inclusion(attested.inclusion, shown["commitment_request"], shown["keyset_digest"])
    assert attested.inclusion.nonce == shown["epoch_nonce"]
    path = [bytes.fromhex(item) for item in shown["path_2"]]
    assert merkle.root_of(shown["commitment_generate"], 2, 3, path) == shown["root"]
    reports = [text.encode() for text in shown["evidence"]]
    gpus = [GpuEvidence("nvidia_gpu", reports[i], reports[i + 1]) for i in (0, 2)]
    assert commitments.gpu_evidence_digest(gpus) == shown["evidence_digest"]
    assert commitments.report_commitment(shown["nonce"]) == shown["commitment_report"]
    assert commitments.generate_commitment(shown["nonce"]) == shown["commitment_generate"]
    committed = read_log(shown).committed
    made = commitments.request_commitment(
        shown["receipt_id"].decode(),
        "/v1/chat/completions",
        client_nonce=committed.client_nonce,
        body_sha256=sha(shown["request"]),
        blind=committed.blind,
    )
    assert made == committed.commitment == shown["commitment_request"]


def test_the_project_computes_the_same_forwarded_bodies(shown: dict[str, Any]) -> None:
    engine = read_log(shown).engine
    assert engine is not None
    [rewrite] = engine.rewrite
    assert receipt.forwarded_bytes(shown["request"], rewrite) == shown["forwarded"]
    assert receipt.forwarded_hash([shown["forwarded"]]) == shown["forwarded_hash"]
    bodies = [
        receipt.forwarded_bytes(
            shown["list_request"], Rewrite(one["set"], tuple(one["unset"]), one["prompt_index"])
        )
        for one in shown["list_rewrite"]
    ]
    assert b"".join(body + b"\n" for body in bodies) == shown["list_forwarded"]
    assert receipt.forwarded_hash(bodies) == shown["list_forwarded_hash"]


@pytest.mark.parametrize(
    "read",
    [
        lambda shown: output.output_of_stream(shown["stream"], max_bytes=1000),
        lambda shown: output.output_of_answer(shown["answer"], max_bytes=1000),
    ],
    ids=["stream", "whole"],
)
def test_a_stream_and_a_whole_answer_have_one_output_digest(
    read: Callable[[dict[str, Any]], output.Output], shown: dict[str, Any]
) -> None:
    said = read(shown)
    assert canonical_json({"choices": list(said.choices)}) == shown["output"]
    assert said.digest == shown["output_digest"]


def test_the_project_verifies_the_receipt_and_no_other(shown: dict[str, Any]) -> None:
    parsed = receipt.parse_receipt(canonical_json(shown["receipt"]))
    key = identity.parse_keyset(shown["keyset"], where="$").receipt_keys[0]
    receipt.verify_signature(parsed.document, key)
    assert sha(receipt.signing_input(parsed.document)) == shown["receipt_signing_input"]
    with pytest.raises(Unauthentic):
        receipt.verify_signature({**parsed.document, "served_at": parsed.served_at + 1}, key)


def test_the_project_reads_and_verifies_the_same_checkpoints(shown: dict[str, Any]) -> None:
    key = identity.parse_checkpoint_key(shown["instance"], where="$")
    running = checkpoint.parse_comment(shown["comment"])
    assert running.document == shown["running"]
    checkpoint.verify_checkpoint(running, key)
    final = {
        **shown["core"],
        "completion": None,
        "signature": shown["checkpoint_signature"].hex(),
    }
    last = checkpoint.read_checkpoint(final, where="$")
    checkpoint.verify_checkpoint(last, key)
    assert last.core_sha256 == shown["core_sha256"]
    core: JsonObject = last.core.to_json()
    assert commitments.completion_commitment(core) == shown["commitment_completion"]
    altered = checkpoint.read_checkpoint(final | {"seq": 2}, where="$")
    with pytest.raises(Unauthentic):
        checkpoint.verify_checkpoint(altered, key)


def read_log(shown: dict[str, Any]) -> receipt.EventLog:
    return receipt.read_events(receipt.parse_receipt(canonical_json(shown["receipt"])))
