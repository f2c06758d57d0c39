"""A whole report of simulated hardware, as an appliance would publish it."""

from __future__ import annotations

import datetime
import hashlib

import trio

from appliance.attester.simulated.provider import SimulatedCpu, SimulatedGpus
from appliance.config import Policy
from appliance.rats.chain import parse_pem_chain, sha256_of
from appliance.wire.canonical import JsonObject, canonical_json
from appliance.wire.commitments import Inclusion, gpu_evidence_digest, report_commitment
from appliance.wire.encoding import format_sha256
from appliance.wire.identity import (
    Keyset,
    PublicKey,
    digest_of,
    instance_document,
    report_data_of,
    subject_of,
    workload_manifest,
)
from appliance.wire.merkle import leaf_hash
from appliance.wire.report import GpuSection, Report

AT = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)
NONCE = bytes(range(32))
SPKI = hashlib.sha256(b"a TLS key").digest()
POLICY = Policy(tee_types=("unsafe_simulated",), gpus="unsafe_simulated")


def simulated_report(*, gpus: int = 1) -> bytes:
    """Its bytes, in answer to `NONCE`, by so many GPUs."""
    return canonical_json(trio.run(_make, gpus).to_json())


async def _make(count: int) -> Report:
    devices = SimulatedGpus(count=count)
    policy: JsonObject = {"gpus": POLICY.gpus}
    manifest = workload_manifest(
        image={"version": "0", "commit": None, "roothash": None},
        model={
            "id": "m",
            "revision": None,
            "digest": None,
            "tokenizer_digest": None,
            "chat_template_digest": None,
        },
        engine={
            "name": "sglang",
            "version": None,
            "settings_digest": None,
            "dtype": None,
            "deterministic": True,
            "random_seed": None,
        },
        policy=policy,
    )
    # A device and its leaf are the same whatever it reports.
    known = [
        parse_pem_chain(one.certificate_chain, field="chain")
        for one in await devices.collect(NONCE)
    ]
    instance = instance_document(
        gpus=[
            {
                "scheme": "simulated",
                "device_cert_sha256": sha256_of(device),
                "ueid": str(leaf.serial_number),
            }
            for leaf, device, *_ in known
        ],
        checkpoint_key=PublicKey("checkpoint", bytes(31) + b"\x01"),
        operator_input_digest=None,
    )
    keyset = Keyset(
        subject=subject_of(digest_of(manifest), digest_of(instance)),
        not_after=int(AT.timestamp()) + 3600,
        receipt_keys=(PublicKey("receipt", bytes(32)),),
        tls=(SPKI,),
    )
    root = leaf_hash(report_commitment(NONCE))
    inclusion = Inclusion("report", keyset.digest, 1, 0, (), root)
    evidence = await devices.collect(inclusion.nonce)
    report_data = report_data_of(keyset.digest, NONCE)
    return Report(
        keyset_digest=keyset.digest,
        tee_type="unsafe_simulated",
        keyset_document=keyset.to_json(),
        keyset=keyset,
        report_data=report_data,
        provenance={"image_digest": format_sha256(bytes(32))},
        cpu=await SimulatedCpu().collect(report_data),
        gpu=GpuSection(gpu_evidence_digest(evidence), inclusion, evidence),
        workload=manifest,
        instance=instance,
        policy=policy,
    )
