"""Every generated vector (tests/vectors) gets the verdict, the error and the findings it names."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.errors import EvidenceError, Malformed
from appliance.rats.result import Tier
from tests.vectors.case import SUFFIX, Case, expected, files, judge, read, write

FILES = files()
CASES = [read(path) for path in FILES]
MAX_BYTES = 1_500_000
WHOLE = ("report", "quote", "signature", "td_quote", "pcrs")
"""Parts of which no byte may be cut off; padding of a quote may."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_gets_its_verdict(case: Case) -> None:
    assert judge(case) == expected(case)


def test_every_scheme_has_good_cases_and_every_kind_of_refusal() -> None:
    errors = {
        scheme: {case.error for case in CASES if case.scheme == scheme}
        for scheme in ("nvidia_gpu", "sev_snp", "tdx", "tpm2", "azure_vtpm")
    }
    assert errors["nvidia_gpu"] == {"", "malformed", "unauthentic", "stale", "unbound"}
    assert errors["sev_snp"] == {"", "malformed", "unauthentic", "stale", "unbound", "revoked"}
    assert errors["tdx"] >= {"", "malformed", "unauthentic", "stale", "revoked", "contraindicated"}
    assert errors["tpm2"] >= {"", "malformed", "unauthentic", "stale", "unbound"}
    assert errors["azure_vtpm"] >= {"", "malformed", "unauthentic", "unbound"}
    for scheme in ("nvidia_gpu", "sev_snp", "tdx", "azure_vtpm"):
        assert any(case.expect is Tier.AFFIRMING for case in CASES if case.scheme == scheme)
    # A TPM protects no memory: there is nothing to affirm.
    assert all(case.expect is not Tier.AFFIRMING for case in CASES if case.scheme == "tpm2")


def test_a_case_is_about_one_failure() -> None:
    codes = {one.code for one in EvidenceError.__subclasses__()} | {Malformed.code, ""}
    for case in CASES:
        assert case.error in codes
        assert case.comment, case.name
        if case.error:
            assert (case.expect, case.findings) == (Tier.CONTRAINDICATED, frozenset()), case.name
        else:
            assert (case.expect is Tier.AFFIRMING) == (not case.findings), case.name
    evidence = Counter(
        str((sorted(case.parts.items()), case.at, case.bound_to, case.policy, case.reference))
        for case in CASES
    )
    assert max(evidence.values()) == 1, "two files are the same case"


def test_no_case_survives_without_its_last_byte() -> None:
    for case in CASES:
        for name in WHOLE:
            if case.all(name) and not case.error and "padded" not in case.name:
                parts = {**case.parts, name: (case.one(name)[:-1],)}
                assert judge(replace(case, parts=parts)).error, f"{case.name}: {name}"


def test_no_case_is_affirmed_for_somebody_else() -> None:
    for case in CASES:
        other = bytes([case.bound_to[0] ^ 1]) + case.bound_to[1:]
        outcome = judge(replace(case, bound_to=other))
        assert outcome.error, case.name


def test_the_files_are_read_as_they_are_written(tmp_path: Path) -> None:
    # Those that others are based on first.
    for path, case in sorted(zip(FILES, CASES, strict=True), key=lambda pair: pair[1].base != ""):
        write(case, tmp_path)
        assert (tmp_path / f"{case.name}{SUFFIX}").read_bytes() == path.read_bytes()


def test_they_stay_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < MAX_BYTES
