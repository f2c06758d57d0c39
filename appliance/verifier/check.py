"""The relying party's check of an appliance: protocol.md section 9, all ten steps.

The policy and the reference values are the relying party's own; what the appliance says about
its policy is only a document that its evidence binds.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct

from appliance.config import Policy, parse_toml
from appliance.endorsements.anchors import load_anchors, load_simulated_anchors
from appliance.errors import ConfigError, Malformed, VerificationIncomplete
from appliance.rats.appraise import SIMULATED_TEE_TYPE, Context, appraise_report
from appliance.rats.exchange import appraise_exchange
from appliance.rats.model import Anchors
from appliance.rats.reference import ReferenceValues, parse_reference_values
from appliance.rats.result import AttestationResult, conclude
from appliance.verifier.bundle import Bundle
from appliance.verifier.session import Fetched, base_url, fetch_report
from appliance.wire.report import parse_report

MAX_FILE_BYTES = 1 << 20


class PolicyFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A relying party's policy: a `[policy]` table, as in the appliance's configuration.

    Attributes:
        tpm_roots_file: PEM of the roots above TPMs' attestation keys, for `tpm2`; a relative path
            is taken from the folder of the file.
    """

    policy: Policy = Policy()
    tpm_roots_file: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a relying party verifies with.

    Attributes:
        anchors: the pinned roots; the published test roots only where the policy names them.
        reference: None without any: then nothing is affirmed.
    """

    policy: Policy
    anchors: Anchors
    reference: ReferenceValues | None

    def context(self, at: datetime.datetime) -> Context:
        """For one appraisal."""
        return Context(self.policy, self.anchors, self.reference, at)


def load_rules(policy_file: Path | None, reference_file: Path | None) -> Rules:
    """Read a policy and reference values; without a policy the strict default holds.

    Raises:
        VerificationIncomplete: a file cannot be read or does not say what it should.
    """
    try:
        given = PolicyFile()
        tpm_roots = b""
        if policy_file is not None:
            given = parse_toml(_read(policy_file).decode("utf-8"), PolicyFile)
            if given.tpm_roots_file:
                tpm_roots = _read(policy_file.parent / given.tpm_roots_file)
        anchors = load_anchors(tpm_roots=tpm_roots)
        policy = given.policy
        if SIMULATED_TEE_TYPE in policy.tee_types or policy.gpus == SIMULATED_TEE_TYPE:
            anchors = load_simulated_anchors(anchors)
        reference = (
            None if reference_file is None else parse_reference_values(_read(reference_file))
        )
    except UnicodeDecodeError:
        raise VerificationIncomplete(f"{policy_file}: expected UTF-8 text") from None
    except (ConfigError, Malformed) as error:
        raise VerificationIncomplete(error.message) from error
    return Rules(policy, anchors, reference)


async def fetch(url: str, nonce: bytes, *, now: datetime.datetime) -> Bundle:
    """Step 1: a report with a fresh nonce, and the TLS key that it came with.

    Raises:
        VerificationIncomplete: it cannot be had. Malformed: what came is no report.
    """
    fetched = await fetch_report(url, nonce)
    return as_bundle(fetched, url, nonce, now=now)


def as_bundle(fetched: Fetched, url: str, nonce: bytes, *, now: datetime.datetime) -> Bundle:
    """What step 1 brought.

    Raises:
        Malformed: it is no report. VerificationIncomplete: not an https URL.
    """
    return Bundle(
        url=base_url(url),
        fetched_at=int(now.timestamp()),
        nonce=nonce,
        spki_sha256=fetched.spki_sha256,
        report=parse_report(fetched.report),
    )


def check(bundle: Bundle, rules: Rules, *, at: datetime.datetime) -> AttestationResult:
    """Steps 2 to 9 on what was fetched, now or once, and step 10 where there is a receipt.

    The result on the exchange is the part `receipt`.

    Args:
        at: timezone-aware; when certificates and keyset must be valid.

    Raises:
        Malformed, Unauthentic, Revoked, Stale, Unbound: it does not hold.
    """
    context = rules.context(at)
    report = bundle.report
    result = appraise_report(
        report, nonce=bundle.nonce, spki_sha256=bundle.spki_sha256, context=context
    )
    if bundle.exchange is None:
        return result
    exchange = appraise_exchange(bundle.exchange, report=report, context=context)
    return conclude(result.claims, result.findings, {**result.submods, "receipt": exchange})


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise VerificationIncomplete(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise VerificationIncomplete(f"{path}: expected at most {MAX_FILE_BYTES} bytes")
    return data
