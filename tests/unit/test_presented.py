"""Evidence that somebody shows: what binds it is compared, what nothing binds is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from appliance.attester.simulated import nvidia
from appliance.errors import Malformed, Unbound
from appliance.rats.gpus import Memory
from appliance.rats.presented import appraise_presented, parse_presented, present
from appliance.rats.result import AttestationResult
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json
from appliance.wire.checkpoint import Core
from appliance.wire.commitments import (
    Inclusion,
    completion_commitment,
    generate_commitment,
    report_commitment,
)
from appliance.wire.encoding import format_sha256
from appliance.wire.epoch import EpochEvidence
from appliance.wire.receipt import GpuAttested
from tests.unit.test_exchange_check import AT, HERE, NOW, RULES

FEATURE_FLAG = 36
CLIENT_NONCE = b"\x05" * 32
GENERATED, GENERATED_AT = HERE.epoch("generate", [generate_commitment(CLIENT_NONCE)], 0)


def a_core() -> Core:
    inclusion = Inclusion("request", HERE.digest, 1, 0, (), b"\x07" * 32)
    admission = GpuAttested(
        phase="admission",
        evidence_digest=b"\x08" * 32,
        inclusion=inclusion,
        verdict="affirming",
        collected_at=AT,
        core_sha256=None,
    )
    return Core(
        seq=0,
        final=True,
        receipt_id="ab" * 16,
        keyset_digest=HERE.digest,
        request_body_hash=b"\x09" * 32,
        prefix_bytes=None,
        prefix_sha256=None,
        output_digest=b"\x0b" * 32,
        gpu=admission,
        key_id="checkpoint-1",
    )


CORE = a_core()
RAW = canonical_json(CORE.to_json()).decode()
COMPLETED, COMPLETED_AT = HERE.epoch("completion", [completion_commitment(CORE.to_json())], 0)


def shown_by(epoch: EpochEvidence, inclusion: Inclusion, /, **changed: JsonValue) -> JsonObject:
    """What the asker has; a member that is None is left out."""
    evidences: list[JsonValue] = [
        present(one, chip="GH100", nonce=inclusion.nonce) for one in epoch.gpus
    ]
    document: JsonObject = {
        "evidences": evidences,
        "inclusion": inclusion.to_json(),
        "keyset_digest": format_sha256(HERE.digest),
        **changed,
    }
    return {name: value for name, value in document.items() if value is not None}


def generated(**changed: JsonValue) -> JsonObject:
    whole: JsonObject = {"client_nonce": CLIENT_NONCE.hex(), **changed}
    return shown_by(GENERATED, GENERATED_AT, **whole)


def completed(**changed: JsonValue) -> JsonObject:
    whole: JsonObject = {"raw": RAW, **changed}
    return shown_by(COMPLETED, COMPLETED_AT, **whole)


def verdict(document: JsonObject) -> AttestationResult:
    return appraise_presented(
        parse_presented(document),
        scheme="simulated",
        rims_of=lambda chain: (),
        policy=RULES.policy,
        anchors=RULES.anchors,
        at=NOW,
        memory=Memory(),
    )


def unbound(document: JsonObject) -> list[str]:
    return [one.check for one in verdict(document).findings]


def test_what_comes_with_all_that_binds_it_has_no_finding() -> None:
    assert unbound(generated()) == []
    assert unbound(completed()) == []


def test_a_core_beside_a_generate_inclusion_is_said_not_to_be_bound() -> None:
    assert unbound(generated(raw=RAW)) == ["presented.raw_not_bound"]


def test_a_nonce_beside_a_completion_inclusion_is_said_not_to_be_bound() -> None:
    document = completed(client_nonce=CLIENT_NONCE.hex())
    assert unbound(document) == ["presented.client_nonce_not_bound"]


def test_without_an_inclusion_all_that_was_given_is_said_not_to_be_bound() -> None:
    document = generated(inclusion=None, nonce=GENERATED_AT.nonce.hex(), raw=RAW)
    assert unbound(document) == [
        "presented.inclusion",
        "presented.keyset_digest_not_bound",
        "presented.client_nonce_not_bound",
        "presented.raw_not_bound",
    ]


@pytest.mark.parametrize("kind", ["report", "request"])
def test_a_commitment_that_nothing_shown_gives_is_said_not_to_be_bound(kind: str) -> None:
    epoch, inclusion = HERE.epoch("report", [report_commitment(None)], 0)
    given: JsonObject = {**inclusion.to_json(), "kind": kind}
    document = shown_by(epoch, inclusion, inclusion=given, client_nonce=CLIENT_NONCE.hex(), raw=RAW)
    assert unbound(document) == [
        f"presented.{kind}",
        "presented.client_nonce_not_bound",
        "presented.raw_not_bound",
    ]


@pytest.mark.parametrize("client_nonce", [None, CLIENT_NONCE.hex()])
def test_another_keyset_is_refused_with_and_without_the_askers_nonce(
    client_nonce: str | None,
) -> None:
    other = format_sha256(b"\0" * 32)
    with pytest.raises(Unbound, match=r"inclusion\.keyset_digest"):
        verdict(generated(keyset_digest=other, client_nonce=client_nonce))


@pytest.mark.parametrize("document", [generated, completed])
@pytest.mark.parametrize(
    "raw",
    ['{"a":1}', "[]", "", "{", RAW[:-1] + ',"x":1}', RAW.replace("dcv/1", "dcv/2"), "[" * 30_000],
    ids=lambda raw: raw[:12],
)
def test_a_raw_text_that_is_no_core_is_malformed_whatever_it_stands_beside(
    document: object, raw: str
) -> None:
    assert callable(document)
    with pytest.raises(Malformed):
        verdict(document(raw=raw))


def test_another_core_than_the_one_committed_to_is_refused() -> None:
    other = canonical_json(replace(CORE, seq=1).to_json()).decode()
    with pytest.raises(Unbound, match=r"inclusion\.root"):
        verdict(completed(raw=other))


def labelled(**changed: JsonValue) -> JsonObject:
    """The second GPU's evidence says something else of itself."""
    document = generated()
    evidences = document["evidences"]
    assert isinstance(evidences, list)
    first, second = evidences
    assert isinstance(second, dict)
    kept: JsonObject = {
        name: value for name, value in {**second, **changed}.items() if value is not None
    }
    return {**document, "evidences": [first, kept]}


def test_evidence_may_not_contradict_the_nonce_it_is_shown_for() -> None:
    with pytest.raises(Unbound, match="nonce"):
        verdict(labelled(nonce="00" * 32))
    with pytest.raises(Malformed, match="nonce"):
        verdict(labelled(nonce="00"))


def test_evidence_may_not_call_itself_another_architecture() -> None:
    with pytest.raises(Unbound, match=r"evidences\[1\]\.arch: expected HOPPER, got BLACKWELL"):
        verdict(labelled(arch="BLACKWELL"))


@pytest.mark.parametrize("name", ["arch", "nonce"])
def test_evidence_needs_not_say_what_its_report_says(name: str) -> None:
    assert unbound(labelled(**{name: None})) == []
    with pytest.raises(Malformed, match=name):
        verdict(labelled(**{name: 1}))


@pytest.mark.parametrize("count", [2, 16])
def test_one_gpu_is_not_shown_for_many(count: int) -> None:
    document = generated()
    evidences = document["evidences"]
    assert isinstance(evidences, list)
    with pytest.raises(Unbound, match="every GPU once"):
        verdict({**document, "evidences": evidences[:1] * count})


def test_gpus_that_are_shown_together_are_in_one_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that thinks itself alone does not encrypt what it sends to its neighbours."""
    multiple = tuple(
        (kind, b"\x01\0" if kind == FEATURE_FLAG else value) for kind, value in nvidia._OPAQUE
    )
    monkeypatch.setattr(nvidia, "_OPAQUE", multiple)
    other, _ = HERE.epoch("generate", [generate_commitment(CLIENT_NONCE)], 0)
    mixed = replace(GENERATED, gpus=(GENERATED.gpus[0], other.gpus[1]))
    document = shown_by(mixed, GENERATED_AT, client_nonce=CLIENT_NONCE.hex())
    assert "gpus.feature" in unbound(document)
    same = shown_by(other, GENERATED_AT, client_nonce=CLIENT_NONCE.hex())
    assert "gpus.feature" not in unbound(same)
