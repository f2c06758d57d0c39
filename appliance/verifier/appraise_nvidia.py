"""Raw evidence of NVIDIA GPUs and NVSwitches, from files to a verdict, offline.

The policy is neutral: any chip that NVIDIA's root vouches for, any driver, and nobody is asked
about revocation. What is held to account is what the files hold: reports, chains, reference values
and nonces.

NVIDIA's tools exchange evidence as JSON in these shapes, all of which are read:

    [{"evidence": b64, "certificate": b64 of PEM, "nonce": hex, "arch": …}, …]    verifier, NVAT
    {"evidence": …, "certificate": …, "nonce": …}                                  one of them
    {"evidences": […], …}                                                          `nvattest`
    {"evidence_list": […], "nonce": hex, "arch": …}                                NRAS requests

`arch` and what else stands beside the evidence is not signed by anybody and not looked at: which
chip it is, the device's certificate says.
"""

from __future__ import annotations

import datetime
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cryptography import x509

from appliance.config import Policy
from appliance.errors import EvidenceError, Malformed, Stale
from appliance.rats import chain
from appliance.rats.policy.nvidia_gpu import appraise_gpu, appraise_switch
from appliance.rats.result import AttestationResult, conclude
from appliance.rats.schemes.nvidia_gpu import (
    AuthenticatedRim,
    NvidiaGpuClaims,
    authenticate,
    authenticate_rim_even_if_expired,
)
from appliance.verifier.raw_evidence import PEM_BEGIN, decode, split_certificates
from appliance.verifier.verdict import Outcome, of_error, of_parts, of_result
from appliance.wire.azure_json import decode_any_base64
from appliance.wire.canonical import JsonObject, JsonValue, parse_json, parse_json_object
from appliance.wire.evidence import GpuEvidence
from appliance.wire.pem import join_pem

NONCE_BYTES = 32
MAX_DEVICES = 64
"""Of one file; an HGX board has 8 GPUs and 4 switches."""

MAX_JSON_BYTES = 8 << 20
MAX_NESTING = 6
ENVELOPES = ("evidences", "evidence_list")

Appraise: TypeAlias = Callable[
    [NvidiaGpuClaims, Sequence[AuthenticatedRim], Policy], AttestationResult
]


@dataclass(frozen=True, slots=True)
class Kind:
    """GPUs or switches.

    Attributes:
        appraise: by `rats.policy.nvidia_gpu`. name: of several, `GPU-0` and so on.
    """

    name: str
    appraise: Appraise


GPU = Kind("GPU", appraise_gpu)
SWITCH = Kind("SWITCH", appraise_switch)


@dataclass(frozen=True, slots=True)
class Device:
    """One device's report, and the nonces that it must carry."""

    evidence: GpuEvidence
    nonces: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Roots:
    """Trusted certificates.

    Attributes:
        device: above the devices. pinned: whether they are ours; else the caller named them.
        rim: above the reference values; always NVIDIA's pinned one.
    """

    device: tuple[x509.Certificate, ...]
    rim: tuple[x509.Certificate, ...]
    pinned: bool = True


def device_of(report: bytes, certificates: bytes, nonce: bytes | None) -> Device:
    """From the files of `--report` and `--chain`.

    Raises:
        Malformed: text that does not decode, or no certificates.
    """
    pem = decode(certificates, field="chain")
    if PEM_BEGIN not in pem:
        pem = join_pem(split_certificates(pem, field="chain"))
    evidence = GpuEvidence("nvidia_gpu", decode(report, field="report"), pem)
    return Device(evidence, () if nonce is None else (nonce,))


def parse_devices(data: bytes, nonce: bytes | None) -> tuple[Device, ...]:
    """From the file of `--evidence`, in one of the shapes above.

    Args:
        nonce: that every report must carry besides the one that the file names for it; None
            when only the file's own is known.

    Raises:
        Malformed: none of the shapes, no device, or too many.
    """
    if len(data) > MAX_JSON_BYTES:
        raise Malformed("evidence: expected at most 8 MiB", field="evidence")
    document = parse_json(data, max_nesting=MAX_NESTING)
    shared: JsonValue = None
    items: JsonValue = document
    if isinstance(document, dict):
        envelope = next((name for name in ENVELOPES if name in document), None)
        items = [document] if envelope is None else document[envelope]
        shared = None if envelope is None else document.get("nonce")
    if not isinstance(items, list) or not 0 < len(items) <= MAX_DEVICES:
        raise Malformed(f"evidence: expected 1 to {MAX_DEVICES} devices", field="evidence")
    return tuple(
        _device(one, shared, nonce, f"evidence[{index}]") for index, one in enumerate(items)
    )


def parse_rim_file(data: bytes) -> bytes:
    """From a file of `--rim`: the signed document, or the JSON that NVIDIA's RIM service wraps it
    in (`{"id", "rim": b64, …}`).

    Raises:
        Malformed: JSON or text that is not that.
    """
    document = decode(data, field="rim")
    if document.lstrip()[:1] != b"{":
        return document
    wrapped = parse_json_object(document, max_nesting=MAX_NESTING).get("rim")
    return _base64(wrapped, "rim.rim")


def appraise_devices(
    kind: Kind,
    devices: Sequence[Device],
    documents: Sequence[bytes],
    *,
    roots: Roots,
    at: datetime.datetime,
) -> Outcome:
    """The verdict on one device, or on several together: then the worst, and claims by name.

    Args:
        documents: reference values, XML.
        at: timezone-aware.

    Raises:
        Malformed, Unauthentic, Stale: reference values that do not hold. Of a device that does
            not hold, the outcome tells.
    """
    # 1. Every report, to the trusted root.
    found = [_authenticate(one, roots, at) for one in devices]
    known = [one for one in found if isinstance(one, NvidiaGpuClaims)]
    # 2. Reference values, once there is something to compare them with. Whether expired ones will
    #    do is the policy's.
    rims = [
        authenticate_rim_even_if_expired(one, root=roots.rim, at=at)
        for one in (documents if known else ())
    ]
    # 3. The policy: any chip that the root vouches for.
    outcomes: dict[str, Outcome] = {}
    for index, (device, one) in enumerate(zip(devices, found, strict=True)):
        name = f"{kind.name}-{index}"
        if not isinstance(one, NvidiaGpuClaims):
            outcomes[name] = of_error(one)
            continue
        own = _rims_for(one, rims, known)
        result = kind.appraise(one, own, Policy(gpu_architectures=(one.chip,)))
        claims = result.claims | _context(device, one, own, roots)
        outcomes[name] = of_result(conclude(claims, result.findings, result.submods))
    return next(iter(outcomes.values())) if len(outcomes) == 1 else of_parts(outcomes)


def _authenticate(
    device: Device, roots: Roots, at: datetime.datetime
) -> NvidiaGpuClaims | EvidenceError | Malformed:
    """What it signed, or why it is not to be believed: the next device is looked at all the same."""
    try:
        claims = authenticate(device.evidence, root=roots.device, at=at, nonce=None)
        for nonce in device.nonces:
            if not hmac.compare_digest(claims.nonce, nonce):
                raise Stale(f"report: expected nonce {nonce.hex()}, got {claims.nonce.hex()}")
    except (EvidenceError, Malformed) as error:
        return error
    return claims


def _rims_for(
    claims: NvidiaGpuClaims, rims: Sequence[AuthenticatedRim], all_claims: Sequence[NvidiaGpuClaims]
) -> list[AuthenticatedRim]:
    """Those for this device, and those for none of them: a manifest for its neighbour is no
    finding on it, one that nothing calls for is."""
    wanted = _wanted(claims)
    others = set().union(*(_wanted(one) for one in all_claims)) - wanted
    return [one for one in rims if one.rim.colloquial_version.lower() not in others]


def _wanted(claims: NvidiaGpuClaims) -> set[str]:
    return {one.version.lower() for one in claims.rims_wanted}


def _context(
    device: Device, claims: NvidiaGpuClaims, rims: Sequence[AuthenticatedRim], roots: Roots
) -> JsonObject:
    """What it was held to: so that a verdict can be read without the command line."""
    manifests: list[JsonValue] = [
        {
            "product": one.rim.product,
            "version": one.rim.colloquial_version,
            "sha256": one.sha256,
            "signer_valid_until": f"{one.valid_until:%Y-%m-%dT%H:%M:%SZ}",
        }
        for one in rims
    ]
    return {
        "nonce_compared": bool(device.nonces),
        "trusted_root": {"sha256": chain.sha256_of(claims.path[-1]), "pinned": roots.pinned},
        "rims": manifests,
    }


def _device(value: JsonValue, shared: JsonValue, nonce: bytes | None, where: str) -> Device:
    if not isinstance(value, dict):
        raise Malformed(f"{where}: expected an object", field=where)
    report = _base64(value.get("evidence"), f"{where}.evidence")
    certificates = _base64(value.get("certificate"), f"{where}.certificate")
    own = value.get("nonce", shared)
    nonces = [] if own is None else [_nonce(own, f"{where}.nonce")]
    if nonce is not None:
        nonces.append(nonce)
    return Device(GpuEvidence("nvidia_gpu", report, certificates), tuple(nonces))


def _base64(value: JsonValue, where: str) -> bytes:
    if not isinstance(value, str):
        raise Malformed(f"{where}: expected base64 text", field=where)
    return decode_any_base64("".join(value.split()), field=where)


def _nonce(value: JsonValue, where: str) -> bytes:
    try:
        nonce = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        nonce = b""
    if len(nonce) != NONCE_BYTES:
        raise Malformed(f"{where}: expected {NONCE_BYTES} bytes of hex", field=where)
    return nonce
