"""Answers about certificates' revocation: asked for, checked, kept until they lapse.

Every question carries a nonce and is about one certificate; an answer without the nonce is not
accepted from the network, so a recorded one cannot be played back (RFC 9654). Once it was accepted
it is kept, and its own times bound it from then on: what relying parties see, and what re-attesting
reads from disk, is the answer without its question.

An answer is asked for again after half of its life, so that a responder may be away for the other
half. Only good answers are kept: a hold may be lifted, and a revocation is worth hearing again.
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Sequence
from typing import TypeAlias

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from appliance.endorsements.http import Patience, Vendors
from appliance.endorsements.nvidia_rim import Clock
from appliance.endorsements.store import EndorsementStore
from appliance.errors import EndorsementsUnavailable, EvidenceError, Malformed
from appliance.log import Log
from appliance.rats.chain import sha256_of
from appliance.rats.revocation import MAX_OCSP_BYTES, OcspStatus, Revocation, check_ocsp

Question: TypeAlias = tuple[x509.Certificate, x509.Certificate]
"""A certificate and its issuer, both authenticated."""

NONCE_BYTES = 32
"""What RFC 9654 section 2.1 asks of clients."""

_CONCURRENT = 4
PATIENCE_S = 300.0


def build_request(question: Question, nonce: bytes) -> bytes:
    """A DER OCSPRequest about one certificate, with a nonce; the CertID as NVIDIA's verifier
    makes it (SHA-384)."""
    builder = ocsp.OCSPRequestBuilder().add_certificate(*question, hashes.SHA384())
    # RFC 6960 section 4.4: "The critical flag SHOULD NOT be set for any of them."
    builder = builder.add_extension(x509.OCSPNonce(nonce), critical=False)
    return builder.build().public_bytes(Encoding.DER)


class OcspSource:
    """Gets answers from disk, or from one responder.

    Args:
        url: of the responder; the ones that certificates name are not asked.
        seconds: for one question.
        now: the wall clock.
        patience_s: until the same thing is asked again.
    """

    def __init__(
        self,
        *,
        store: EndorsementStore,
        vendors: Vendors,
        url: str,
        seconds: float,
        now: Clock,
        log: Log,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._store = store
        self._vendors = vendors
        self._url = url
        self._seconds = seconds
        self._now = now
        self._log = log
        self._one_batch_at_a_time = trio.Lock()
        self._patience = Patience(patience_s)

    async def answers(self, questions: Sequence[Question]) -> dict[str, bytes]:
        """DER responses by SHA-256 of the certificate they are about; what is missing is missing.

        Each is authentic and in its time now, and may be a bad answer.
        """
        wanted = {
            sha256_of(certificate): (certificate, issuer) for certificate, issuer in questions
        }
        found: dict[str, bytes] = {}
        limit = trio.CapacityLimiter(_CONCURRENT)

        async def ask(digest: str, question: Question) -> None:
            async with limit:
                answer = await self._answer(digest, question)
            if answer is not None:
                found[digest] = answer

        async with self._one_batch_at_a_time, trio.open_nursery() as nursery:
            for digest, question in wanted.items():
                nursery.start_soon(ask, digest, question)
        return {digest: found[digest] for digest in wanted if digest in found}

    async def _answer(self, digest: str, question: Question) -> bytes | None:
        kept = await self._on_disk(digest, question)
        if kept is not None and kept[1].status is Revocation.GOOD and self._is_young(kept[1]):
            return kept[0]
        name = question[0].subject.rfc4514_string()
        try:
            response, status = await self._ask(digest, question)
        except (EndorsementsUnavailable, Malformed, EvidenceError) as error:
            self._log.info("ocsp_not_answered", certificate=name, why=error.message)
            return None if kept is None else kept[0]
        if status.status is Revocation.GOOD:
            await self._store.put("ocsp", digest, response, expires=status.expires)
        else:
            self._log.warning("ocsp_not_good", certificate=name, status=str(status))
        return response

    async def _on_disk(self, digest: str, question: Question) -> tuple[bytes, OcspStatus] | None:
        best: tuple[bytes, OcspStatus] | None = None
        at = self._now()
        for stored in await self._store.find("ocsp", digest, at=at):
            try:
                status = check_ocsp(
                    stored.value, certificate=question[0], issuer=question[1], at=at, nonce=None
                )
            except (EndorsementsUnavailable, Malformed, EvidenceError) as error:
                self._log.info("ocsp_refused", certificate=digest, why=error.message)
                continue
            if best is None or status.this_update > best[1].this_update:
                best = stored.value, status
        return best

    async def _ask(self, digest: str, question: Question) -> tuple[bytes, OcspStatus]:
        """Ask the responder.

        Raises:
            EndorsementsUnavailable, Malformed, EvidenceError: no answer that holds.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)
        what = f"OCSP of {digest[:16]}"
        self._patience.spend(what)
        answer = await self._vendors.post(
            self._url,
            build_request(question, nonce),
            what=what,
            seconds=self._seconds,
            max_bytes=MAX_OCSP_BYTES,
            type="application/ocsp-request",
        )
        certificate, issuer = question
        status = check_ocsp(
            answer.body, certificate=certificate, issuer=issuer, at=self._now(), nonce=nonce
        )
        return answer.body, status

    def _is_young(self, status: OcspStatus) -> bool:
        half: datetime.timedelta = (status.expires - status.this_update) / 2
        return self._now() < status.this_update + half
