"""What is bound to what: the hashes that tie keys, documents, nonces and evidence together.

Each function recomputes one and raises `Unbound` when it is not the one that was claimed. They
compare digests that an attacker may know, so nothing here needs constant time; it costs nothing
and is done anyway.
"""

from __future__ import annotations

import hmac

from appliance.errors import Unbound
from appliance.wire.commitments import Inclusion, gpu_evidence_digest
from appliance.wire.encoding import format_sha256
from appliance.wire.identity import (
    check_manifest,
    check_roles,
    digest_of,
    parse_checkpoint_key,
    report_data_of,
    subject_of,
)
from appliance.wire.merkle import root_of
from appliance.wire.report import GpuSection, Report

REPORT_DATA_FIELD = 64
"""Bytes of REPORT_DATA and REPORTDATA; a 32-byte digest is followed by zeros there."""


def check_documents(report: Report, nonce: bytes | None) -> None:
    """Manifest, instance document, keyset, statement and report_data follow from each other, and
    no key has two roles.

    Args:
        nonce: the 32 bytes asked with; None for the null form.

    Raises:
        Malformed: manifest or instance document is not dcv/1's, or a key is there twice.
        Unbound: one does not follow.
    """
    # A document's digest says nothing of what is in it: both are read before they are hashed.
    check_manifest(report.workload, where="workload")
    checkpoint_key = parse_checkpoint_key(report.instance, where="instance")
    check_roles(report.keyset, checkpoint_key, where="instance.keys")
    workload, instance = digest_of(report.workload), digest_of(report.instance)
    _same("subject", subject_of(workload, instance), report.keyset.subject)
    _same(
        "workload_keyset_digest",
        format_sha256(digest_of(report.keyset_document)),
        format_sha256(report.keyset_digest),
    )
    policy = report.workload.get("policy_digest")
    _same("policy_digest", format_sha256(digest_of(report.policy)), str(policy))
    _same(
        "report_data",
        report_data_of(report.keyset_digest, nonce).hex(),
        report.report_data.hex(),
    )


def check_report_data(quoted: bytes, expected: bytes, *, what: str) -> None:
    """The evidence carries the 32-byte digest, alone or followed by zeros.

    Raises:
        Unbound: it carries something else.
    """
    padded = expected.ljust(REPORT_DATA_FIELD, b"\x00")
    if not (hmac.compare_digest(quoted, expected) or hmac.compare_digest(quoted, padded)):
        raise Unbound(
            f"{what}: expected report_data {expected.hex()}, got {quoted.hex() or 'none'}"
        )


def check_inclusion(inclusion: Inclusion, commitment: bytes, keyset_digest: bytes) -> None:
    """The epoch's root covers the commitment, under this keyset.

    Raises:
        Unbound: it does not, or the inclusion names no leaf.
    """
    _same(
        "inclusion.keyset_digest",
        format_sha256(keyset_digest),
        format_sha256(inclusion.keyset_digest),
    )
    if inclusion.leaf_index is None or inclusion.path is None:
        raise Unbound("inclusion: expected a leaf of its own, the evidence is an earlier epoch's")
    root = root_of(commitment, inclusion.leaf_index, inclusion.tree_size, inclusion.path)
    _same("inclusion.root", "none" if root is None else root.hex(), inclusion.root.hex())


def check_evidence_digest(section: GpuSection) -> None:
    """`evidence_digest` is that of the reports and chains given.

    Raises:
        Unbound: it is not.
    """
    _same(
        "evidence_digest",
        format_sha256(gpu_evidence_digest(section.gpus)),
        format_sha256(section.evidence_digest),
    )


def _same(what: str, expected: str, got: str) -> None:
    if not hmac.compare_digest(expected.encode(), got.encode()):
        raise Unbound(f"{what}: expected {expected}, got {got}")
