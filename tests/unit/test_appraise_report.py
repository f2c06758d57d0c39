"""A report's documents, and what a verdict on it does not cover.

Each report here is quoted and attested anew, so nothing but what the test is about is a lie.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
import trio

from appliance.attester.simulated.provider import SimulatedCpu
from appliance.config import MeasuredConfig
from appliance.errors import Malformed, Unbound
from appliance.rats.appraise import appraise_report, authenticate_cpu
from appliance.rats.reference import ImageReference, ReferenceValues
from appliance.rats.result import AttestationResult, Tier, conclude
from appliance.serving.own_evidence import OwnEvidence
from appliance.verifier.check import Rules
from appliance.wire.canonical import JsonObject, canonical_json
from appliance.wire.commitments import Inclusion, epoch_nonce, gpu_evidence_digest
from appliance.wire.commitments import report_commitment as commitment
from appliance.wire.identity import (
    Keyset,
    PublicKey,
    digest_of,
    instance_document,
    report_data_of,
    subject_of,
)
from appliance.wire.merkle import MerkleTree
from appliance.wire.report import GpuSection, Report, read_report
from tests.unit.test_exchange_check import (
    AT,
    CHECKPOINT_KEY,
    HERE,
    NONCE,
    NOW,
    RECEIPT_KEY,
    RULES,
    SPKI,
    collect,
)

IMAGE = "sha256:" + "ab" * 32
OTHER_IMAGE = "sha256:" + "cd" * 32
WORKLOAD, INSTANCE = HERE.report.workload, HERE.report.instance


def remade(
    *,
    workload: JsonObject = WORKLOAD,
    instance: JsonObject = INSTANCE,
    keys: tuple[PublicKey, ...] = (RECEIPT_KEY,),
    tls: tuple[bytes, ...] = (SPKI,),
    nonce: bytes | None = NONCE,
    image: str | None = None,
) -> Report:
    """The same appliance's report on other documents, with real evidence over them."""
    subject = subject_of(digest_of(workload), digest_of(instance))
    keyset = Keyset(subject, AT + 3600, keys, tls)
    tree = MerkleTree.over([commitment(nonce)])
    gpus = collect(HERE.gpus, epoch_nonce(keyset.digest, tree.size, tree.root))
    report_data = report_data_of(keyset.digest, nonce)

    async def quote() -> Any:
        return await SimulatedCpu().collect(report_data)

    return replace(
        HERE.report,
        keyset_digest=keyset.digest,
        keyset_document=keyset.to_json(),
        keyset=keyset,
        report_data=report_data,
        cpu=trio.run(quote),
        workload=workload,
        instance=instance,
        provenance={"image_digest": image},
        gpu=GpuSection(
            gpu_evidence_digest(gpus),
            Inclusion("report", keyset.digest, 1, 0, (), tree.root),
            gpus,
        ),
    )


def verdict(
    report: Report,
    *,
    nonce: bytes | None = NONCE,
    spki: bytes | None = SPKI,
    rules: Rules = RULES,
    claimed_image: Tier = Tier.CONTRAINDICATED,
) -> AttestationResult:
    context = replace(rules.context(NOW), claimed_image=claimed_image)
    # As it comes over the wire: what was written is what is read.
    read = read_report(report.to_json())
    return appraise_report(read, nonce=nonce, spki_sha256=spki, context=context)


def checks(result: AttestationResult) -> dict[str, Tier]:
    return {one.check: one.tier for one in result.findings}


# ------------------------------------------------------------------------------------- documents


def test_a_report_on_the_documents_as_they_are_holds() -> None:
    assert checks(verdict(remade())) == {}


@pytest.mark.parametrize(
    "workload",
    [
        {"api_version": "evil/9", "policy_digest": WORKLOAD["policy_digest"]},
        {**WORKLOAD, "api_version": "dcv/2"},
        {**WORKLOAD, "model": None},
        {**WORKLOAD, "more": None},
        {name: WORKLOAD[name] for name in WORKLOAD if name != "model"},
    ],
    ids=["another version, no model", "dcv/2", "model null", "a member more", "no model"],
)
def test_a_quoted_manifest_of_another_form_is_refused(workload: JsonObject) -> None:
    with pytest.raises(Malformed, match="workload"):
        verdict(remade(workload=workload))


@pytest.mark.parametrize(
    "instance",
    [
        {**INSTANCE, "api_version": "x/1"},
        {**INSTANCE, "keys": []},
        {name: INSTANCE[name] for name in INSTANCE if name != "keys"},
        {name: INSTANCE[name] for name in INSTANCE if name != "operator_input_digest"},
    ],
    ids=["another version", "no key", "keys left out", "unknown left out"],
)
def test_a_quoted_instance_document_of_another_form_is_refused(instance: JsonObject) -> None:
    with pytest.raises(Malformed, match="instance"):
        verdict(remade(instance=instance))


def test_a_keyset_without_a_receipt_key_is_refused() -> None:
    with pytest.raises(Malformed, match="at least one ed25519 key"):
        verdict(remade(keys=()))


@pytest.mark.parametrize(
    "keys",
    [
        (PublicKey("receipt-1", CHECKPOINT_KEY.raw),),
        (PublicKey(CHECKPOINT_KEY.key_id, RECEIPT_KEY.raw),),
        (RECEIPT_KEY, PublicKey(RECEIPT_KEY.key_id, b"\x0c" * 32)),
        (RECEIPT_KEY, PublicKey("receipt-2", RECEIPT_KEY.raw)),
    ],
    ids=["the checkpoint key", "its name", "one name twice", "one key twice"],
)
def test_a_key_with_two_roles_or_names_is_refused(keys: tuple[PublicKey, ...]) -> None:
    with pytest.raises(Malformed, match="every key once, in one role"):
        verdict(remade(keys=keys))


def test_a_tls_key_that_signs_checkpoints_is_refused() -> None:
    with pytest.raises(Malformed, match="every key once, in one role"):
        verdict(remade(tls=(SPKI, CHECKPOINT_KEY.spki_sha256)))


def test_the_gpus_of_an_instance_document_are_those_that_gave_evidence() -> None:
    gpus = INSTANCE["gpus"]
    assert isinstance(gpus, list)
    first: Any = gpus[0]
    fewer = instance_document(
        gpus=[first], checkpoint_key=CHECKPOINT_KEY, operator_input_digest=None
    )
    with pytest.raises(Unbound, match=r"instance\.gpus"):
        verdict(remade(instance=fewer))


# --------------------------------------------------------------------- what was not compared at all


def test_the_null_form_is_usable_and_said_not_to_be_fresh() -> None:
    fresh, null_form = verdict(remade()), verdict(remade(nonce=None), nonce=None)
    assert checks(null_form) == {"report.freshness": Tier.AFFIRMING}
    assert null_form.verdict is fresh.verdict


def test_a_report_without_a_connection_is_usable_and_said_not_to_be_held_to_one() -> None:
    with_tls, without = verdict(remade()), verdict(remade(), spki=None)
    assert checks(without) == {"report.tls": Tier.AFFIRMING}
    assert without.verdict is with_tls.verdict


def test_what_was_not_asked_does_not_make_an_affirming_verdict_less() -> None:
    findings = verdict(remade(nonce=None), nonce=None, spki=None).findings
    assert [one.check for one in findings] == ["report.freshness", "report.tls"]
    assert conclude({}, findings).verdict is Tier.AFFIRMING


# -------------------------------------------------------------------------------- claimed images


def rules_with(*images: str, reference: ReferenceValues | None = None) -> Rules:
    policy = msgspec.structs.replace(RULES.policy, images=images)
    return replace(RULES, policy=policy, reference=reference)


def measured() -> str:
    claims = authenticate_cpu(HERE.report.cpu, anchors=RULES.anchors, at=NOW)
    return claims.measurements["measurement"]


def known(measurement: str) -> ReferenceValues:
    values = {"measurement": frozenset({measurement})}
    return ReferenceValues((ImageReference(IMAGE, sev_snp=values),))


def test_an_image_that_is_only_claimed_does_not_satisfy_a_policy_that_names_it() -> None:
    result = verdict(remade(image=IMAGE), rules=rules_with(IMAGE))
    assert checks(result) == {"report.image_digest.claimed": Tier.CONTRAINDICATED}
    assert result.verdict is Tier.CONTRAINDICATED


def test_an_image_that_is_measured_satisfies_a_policy_that_names_it() -> None:
    rules = rules_with(IMAGE, reference=known(measured()))
    assert checks(verdict(remade(image=IMAGE), rules=rules)) == {}


def test_an_image_that_is_measured_to_be_another_is_refused() -> None:
    rules = rules_with(IMAGE, reference=known("00" * 48))
    assert verdict(remade(image=IMAGE), rules=rules).verdict is Tier.CONTRAINDICATED


def test_an_image_that_no_policy_names_needs_no_measurement_and_is_said_to_have_none() -> None:
    assert checks(verdict(remade(image=IMAGE))) == {"report.source_provenance": Tier.AFFIRMING}


@pytest.mark.parametrize("claimed", ["abc124", "", None])
def test_a_commit_that_the_measured_documents_do_not_name_is_refused(claimed: str | None) -> None:
    """It was printed among what was verified, and compared with nothing."""
    image: JsonObject = {"version": "1", "commit": "abc123", "roothash": None}
    report = remade(workload={**WORKLOAD, "image": image})
    same = replace(report, provenance={**report.provenance, "repo_commit": "abc123"})
    assert verdict(same).verdict is Tier.WARNING
    other = replace(report, provenance={**report.provenance, "repo_commit": claimed})
    with pytest.raises(Unbound, match="repo_commit: expected abc123"):
        verdict(other)


def test_another_image_is_refused_by_its_name() -> None:
    result = verdict(remade(image=OTHER_IMAGE), rules=rules_with(IMAGE))
    assert checks(result) == {"report.image_digest": Tier.CONTRAINDICATED}


def test_the_self_check_passes_with_a_policy_that_names_our_image() -> None:
    """Boot stage 9: nobody gives an appliance reference values for itself."""
    config = msgspec.convert(
        {
            "model": {"id": "m", "path": "/m", "files": {}},
            "attestation": {"cpu": "simulated", "gpu": "simulated"},
            "policy": msgspec.to_builtins(rules_with(IMAGE).policy),
        },
        MeasuredConfig,
        strict=False,
    )
    # Neither attester nor vendors are asked for the verdict on a report that is there already.
    nobody: Any = None
    own = OwnEvidence(config, nobody, nobody, RULES.anchors, now=NOW.timestamp)
    written = canonical_json(remade(image=IMAGE, nonce=None).to_json())
    result = trio.run(own.appraise_report, written, None)
    assert checks(result) == {
        "report.image_digest.claimed": Tier.WARNING,
        "report.freshness": Tier.AFFIRMING,
        "report.tls": Tier.AFFIRMING,
    }
    result.require()


def test_the_appliance_itself_is_warned_of_an_image_that_it_only_claims() -> None:
    rules = rules_with(IMAGE)
    result = verdict(remade(image=IMAGE), rules=rules, claimed_image=Tier.WARNING)
    assert checks(result) == {"report.image_digest.claimed": Tier.WARNING}
    result.require()
