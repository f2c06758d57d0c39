"""What the appliance proves about itself, over HTTP (protocol.md sections 3 and 7).

Reports need no API key: whoever is about to send a prompt has to be able to ask first. They are
bounded per peer instead, and past a short line for the CPU's quote by 429.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypeAlias, TypeVar

import trio
from msgspec import Meta, Struct
from quart import Response, request
from quart_trio import QuartTrio

from appliance import __version__
from appliance.config import MeasuredConfig, Sha256Digest
from appliance.errors import (
    EvidenceError,
    InvalidRequest,
    Malformed,
    Overloaded,
    RateLimited,
    RouteNotFound,
)
from appliance.rats.presented import parse_presented
from appliance.rats.result import AttestationResult, Tier
from appliance.serving.auth import Authenticator
from appliance.serving.epochs import Attested, Epochs
from appliance.serving.identity import Identity
from appliance.serving.own_evidence import OwnEvidence
from appliance.serving.receipts import ReceiptStore
from appliance.serving.reports import Reports
from appliance.serving.shown_evidence import shown_evidence
from appliance.serving.workers import Workers
from appliance.web.bodies import read_object
from appliance.web.evidence import evidence_or_refusal
from appliance.web.peers import site_of
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json
from appliance.wire.commitments import generate_commitment
from appliance.wire.encoding import decode_hex, format_sha256, parse_sha256
from appliance.wire.openai import convert
from appliance.wire.report import ACI_VERSION, MAX_GPUS

NONCE_BYTES = 32

DISK_S = 5.0
"""To find something in the receipts' store, behind what is written to it."""

T = TypeVar("T")

PREFIXES = ("/v1/dcv/attestation", "/~sev_gpu@1.0")
"""Ours, and that of the original device."""

MAX_PEERS = 4096
"""Whose rate is remembered; the one that was quiet longest is forgotten first."""


NonceHex: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class GenerateRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `generate`. There is no default nonce: evidence for one would be anybody's."""

    nonce: NonceHex


class ShownEvidence(Struct, frozen=True, forbid_unknown_fields=True):
    """One GPU's evidence, as NVIDIA's tools exchange it."""

    evidence: str
    certificate: str
    arch: str = ""
    nonce: str = ""


class VerifyRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `verify`; what is bound to the evidence beside it, as far as it is known."""

    evidences: Annotated[list[ShownEvidence], Meta(min_length=1, max_length=MAX_GPUS)]
    nonce: NonceHex | None = None
    client_nonce: NonceHex | None = None
    inclusion: dict[str, Any] | None = None
    keyset_digest: Sha256Digest | None = None
    raw: str | None = None


@dataclass(frozen=True, slots=True)
class AttestationServices:
    """What the endpoints work with. `now` is Unix seconds."""

    config: MeasuredConfig
    identity: Identity
    own: OwnEvidence
    epochs: Epochs
    reports: Reports
    receipts: ReceiptStore
    authenticator: Authenticator
    now: Callable[[], float]
    rate: PeerRate
    parsing: Workers


@dataclass(slots=True)
class PeerRate:
    """A token bucket for every peer: `per_minute` at once, then as many a minute.

    Args:
        clock: monotonic seconds.
    """

    per_minute: int
    clock: Callable[[], float] = trio.current_time
    _peers: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def take(self, peer: str) -> None:
        """Count one request.

        Raises:
            RateLimited: this peer has used up its share.
        """
        now = self.clock()
        allowance, at = self._peers.pop(peer, (float(self.per_minute), now))
        allowance = min(float(self.per_minute), allowance + (now - at) * self.per_minute / 60)
        self._peers[peer] = (max(0.0, allowance - 1), now) if allowance >= 1 else (allowance, now)
        if len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        if allowance < 1:
            raise RateLimited(
                f"this address may ask for {self.per_minute} reports a minute",
                retry_after_s=math.ceil((1 - allowance) * 60 / self.per_minute),
            )


def add_attestation_routes(app: QuartTrio, services: AttestationServices) -> None:
    """Reports, the GPU attestation device, and what tells clients where they are."""
    limits = services.config.limits
    deadline_s = 4 * services.config.attestation.collect_s

    async def report() -> Response:
        nonce = _query_nonce()
        _count(services)
        reports = services.reports
        step = reports.null_form if nonce is None else partial(reports.report, nonce)
        made = await evidence_or_refusal(deadline_s, step)
        assert made is not None  # the current keyset's
        return _json_bytes(made)

    async def archived(digest: str) -> Response:
        try:
            wanted = parse_sha256(digest, field="keyset_digest")
        except Malformed as error:
            raise InvalidRequest(error.message, param="keyset_digest") from None
        _count(services)
        made = await evidence_or_refusal(deadline_s, partial(services.reports.null_form, wanted))
        if made is None:
            made = await _from_disk(partial(services.receipts.find_report, wanted))
        if made is None:
            raise RouteNotFound("no keyset of this digest was ever current here")
        return _json_bytes(made)

    async def generated() -> Response:
        services.authenticator.authenticate(request.headers.get("Authorization"))
        peer = _count(services)
        wanted = convert(await read_object(limits, services.parsing, peer), GenerateRequest)
        nonce = bytes.fromhex(wanted.nonce)
        join = partial(services.epochs.join, "generate", generate_commitment(nonce))
        attested = await evidence_or_refusal(deadline_s, join)
        return _json(generated_document(services, attested, nonce))

    async def verified() -> Response:
        services.authenticator.authenticate(request.headers.get("Authorization"))
        peer = _count(services)
        document = await read_object(limits, services.parsing, peer)
        convert(document, VerifyRequest)
        presented = parse_presented(document)
        try:
            result = await services.own.appraise_presented(presented)
        except EvidenceError as error:
            return _json(
                {
                    "verified": False,
                    "claims": [],
                    "findings": [],
                    "error": {"code": error.code, "message": error.message},
                }
            )
        return _json(_verified_document(result))

    async def receipt(receipt_id: str) -> Response:
        tenant = services.authenticator.authenticate(request.headers.get("Authorization"))
        find = partial(services.receipts.find, receipt_id, tenant.id)
        return _json_bytes(await _from_disk(find))

    async def epoch(digest: str) -> Response:
        tenant = services.authenticator.authenticate(request.headers.get("Authorization"))
        try:
            wanted = parse_sha256(digest, field="evidence_digest")
        except Malformed as error:
            raise InvalidRequest(error.message, param="evidence_digest") from None
        find = partial(services.receipts.find_epoch, wanted, tenant.id)
        return _json_bytes(await _from_disk(find))

    async def info() -> Response:
        return _json({"exports": ["generate", "verify", "info"], "version": "1.0"})

    async def well_known() -> Response:
        return _json(well_known_document(services))

    app.add_url_rule("/v1/aci/attestation", "report", report, methods=["GET"])
    app.add_url_rule("/v1/dcv/reports/<digest>", "archived_report", archived, methods=["GET"])
    app.add_url_rule("/v1/aci/receipts/<receipt_id>", "receipt", receipt, methods=["GET"])
    app.add_url_rule("/v1/dcv/epochs/<digest>", "epoch", epoch, methods=["GET"])
    app.add_url_rule("/.well-known/dcv", "well_known", well_known, methods=["GET"])
    for prefix in PREFIXES:
        app.add_url_rule(f"{prefix}/generate", f"{prefix}g", generated, methods=["POST"])
        app.add_url_rule(f"{prefix}/verify", f"{prefix}v", verified, methods=["POST"])
    app.add_url_rule("/~sev_gpu@1.0/info", "sev_gpu_info", info, methods=["GET"])

    async def add_headers(response: Response) -> Response:
        response.headers.update(aci_headers(services.reports))
        return response

    app.after_request(add_headers)


def aci_headers(reports: Reports) -> dict[str, str]:
    """What every response has."""
    return {
        "X-ACI-Version": ACI_VERSION,
        "X-ACI-Keyset-Digest": format_sha256(reports.keyset_digest),
    }


def generated_document(
    services: AttestationServices, attested: Attested, client_nonce: bytes
) -> JsonObject:
    """The answer of `generate`."""
    return {
        **shown_evidence(attested, services.identity, issued_at=int(services.now())),
        "client_nonce": client_nonce.hex(),
        "keyset_digest": format_sha256(attested.epoch.keyset_digest),
    }


def well_known_document(services: AttestationServices) -> JsonObject:
    """`/.well-known/dcv`: versions and endpoints."""
    return {
        "api_versions": [ACI_VERSION, "dcv/1"],
        "version": __version__,
        "keyset_digest": format_sha256(services.reports.keyset_digest),
        "endpoints": {
            "attestation": "/v1/aci/attestation",
            "reports": "/v1/dcv/reports/{keyset_digest}",
            "receipts": "/v1/aci/receipts/{receipt_id}",
            "epochs": "/v1/dcv/epochs/{evidence_digest}",
            "generate": "/v1/dcv/attestation/generate",
            "verify": "/v1/dcv/attestation/verify",
            "csr": "/.well-known/dcv/csr",
            "storage_key": "/.well-known/dcv/storage-key",
            "openapi": "/openapi.json",
            "health": "/health",
        },
    }


def _verified_document(result: AttestationResult) -> JsonObject:
    claims: list[JsonValue] = [part.claims for part in result.submods.values()]
    findings: list[JsonValue] = [one.to_json() for one in result.all_findings()]
    return {
        "verified": result.verdict in (Tier.AFFIRMING, Tier.WARNING),
        "claims": claims,
        "findings": findings,
        "error": None,
    }


def _count(services: AttestationServices) -> str:
    """Count a request against its peer's rate, before anything is done for it; who that is."""
    peer = site_of(request.remote_addr) if request.remote_addr else ""
    services.rate.take(peer)
    return peer


async def _from_disk(find: Callable[[], Awaitable[T]]) -> T:
    """What the receipts' store finds.

    Raises:
        Overloaded: not in time; a disk that hangs answers nobody.
    """
    try:
        with trio.fail_after(DISK_S):
            return await find()
    except trio.TooSlowError:
        raise Overloaded("receipts cannot be read from disk now", retry_after_s=5) from None


def _query_nonce() -> bytes | None:
    """`?nonce=`: 64 lowercase hex digits, once; or nothing for the null form."""
    given = request.args.getlist("nonce")
    if not given:
        return None
    if len(given) != 1:
        raise InvalidRequest("nonce: expected it once", param="nonce")
    try:
        return decode_hex(given[0], field="nonce", length=NONCE_BYTES)
    except Malformed as error:
        raise InvalidRequest(error.message, param="nonce") from None


def _json(value: JsonObject) -> Response:
    return _json_bytes(canonical_json(value))


def _json_bytes(data: bytes) -> Response:
    return Response(data, content_type="application/json", headers={"Cache-Control": "no-store"})
