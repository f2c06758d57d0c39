"""NVIDIA's reference values: from the image, from the store, or from NVIDIA's RIM service.

The service answers `GET {rim_url}/{RIM id}` with JSON: `id`, `rim` (the signed document, base64),
`sha256` (of the document), and more that nobody needs. The document is authenticated, by a
function of the caller's, before it is kept; the JSON around it and the TLS below it are not what
makes it trustworthy.

A manifest's signer has a certificate for some two years, and NVIDIA signs anew in place, under
the same id. So a manifest that came with the image expires, and is asked for again before it does.
"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import msgspec
import trio
from cryptography import x509

from appliance.endorsements.http import Patience, Vendors
from appliance.endorsements.store import MAX_VALUE_BYTES, EndorsementStore
from appliance.errors import EndorsementsUnavailable, EvidenceError, Malformed, Stale
from appliance.log import Log
from appliance.wire.encoding import decode_base64

AuthenticateRim: TypeAlias = Callable[[bytes, datetime.datetime], Sequence[x509.Certificate]]
"""A document and a time to its signer's path, leaf first, the pinned root last; raises Malformed
or an EvidenceError, Stale when only the time is wrong."""

Clock: TypeAlias = Callable[[], datetime.datetime]

REFRESH_BEFORE = datetime.timedelta(days=30)
"""A signer that expires sooner is an alarm, and the manifest is asked for again."""

_MAX_ANSWER_BYTES = 2 * MAX_VALUE_BYTES
"""Base64 and JSON around a document."""

PATIENCE_S = 3600.0


@dataclass(frozen=True, slots=True, repr=False)
class Rim:
    """A manifest.

    Attributes:
        id: what it was asked for by. Whether it is for this driver is appraised elsewhere.
        document: XML, as NVIDIA signed it.
        signer: its signer's path, leaf first, the pinned root last; empty when the time of one of
            them is over, which policy may accept.
    """

    id: str
    document: bytes
    signer: tuple[x509.Certificate, ...]

    def __repr__(self) -> str:
        return f"Rim({self.id})"

    @property
    def expires(self) -> datetime.datetime | None:
        """When the first of its signer's certificates does; None when one has."""
        return min((one.not_valid_after_utc for one in self.signer), default=None)


class _Reply(msgspec.Struct, frozen=True):
    id: str
    rim: str
    sha256: str | None = None


def refresh_due(rim: Rim, at: datetime.datetime) -> bool:
    """Whether its signer has expired, or will within 30 days."""
    return rim.expires is None or at >= rim.expires - REFRESH_BEFORE


class RimSource:
    """Finds manifests by id.

    Args:
        folders: with the manifests that came with the image, `<RIM id>.xml`.
        authenticate: what makes a document trustworthy.
        seconds: for one question.
        now: the wall clock.
        patience_s: until the same thing is asked again.
    """

    def __init__(
        self,
        *,
        folders: Iterable[Path],
        store: EndorsementStore,
        vendors: Vendors,
        url: str,
        authenticate: AuthenticateRim,
        seconds: float,
        now: Clock,
        log: Log,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._folders = tuple(folders)
        self._store = store
        self._vendors = vendors
        self._url = url.rstrip("/")
        self._authenticate = authenticate
        self._seconds = seconds
        self._now = now
        self._log = log
        self._one_at_a_time = trio.Lock()
        self._patience = Patience(patience_s)
        self._alarmed: set[tuple[str, datetime.datetime | None]] = set()

    async def find(self, rim_id: str) -> Rim:
        """The manifest with this id whose signer is valid longest.

        Raises:
            Malformed: no id of NVIDIA's.
            EndorsementsUnavailable: there is none on disk that holds, and none could be had.
        """
        async with self._one_at_a_time:
            at = self._now()
            best = await self._on_disk(rim_id, at)
            if best is None or refresh_due(best, at):
                best = await self._refreshed(rim_id, best)
            if refresh_due(best, at):
                self._alarm(best)
            return best

    async def keep_fresh(self, rim_ids: Sequence[str], *, every_s: float = 86_400.0) -> None:
        """Look for newer manifests for ever, in the caller's nursery.

        What is found lies in the store for the next `find`; what is not is an alarm in the log,
        once, and looked for again.

        Args:
            every_s: between two looks, up to a tenth more or less, so that a fleet spreads.
        """
        while True:
            await trio.sleep(every_s * random.SystemRandom().uniform(0.9, 1.1))
            for rim_id in rim_ids:
                try:
                    await self.find(rim_id)
                except (EndorsementsUnavailable, Malformed) as error:
                    self._log.warning("rim_missing", id=rim_id, why=error.message)

    async def _on_disk(self, rim_id: str, at: datetime.datetime) -> Rim | None:
        documents = [one.value for one in await self._store.find("rim", rim_id, at=at)]
        # The store has checked that the id is a file's name and no path.
        documents += await trio.to_thread.run_sync(_baked, self._folders, rim_id)
        best: Rim | None = None
        for document in documents:
            try:
                rim = self._judge(rim_id, document, at)
            except (Malformed, EvidenceError) as error:
                self._log.warning("rim_refused", id=rim_id, source="disk", why=error.message)
                continue
            if best is None or _lasts_longer(rim, best):
                best = rim
        return best

    async def _refreshed(self, rim_id: str, known: Rim | None) -> Rim:
        """A manifest from the service if it lasts longer than the known one.

        Raises:
            EndorsementsUnavailable: none is known, and none could be had.
        """
        try:
            document = await self._fetch(rim_id)
            fetched = self._judge(rim_id, document, self._now())
        except EndorsementsUnavailable as error:
            if known is None:
                raise
            self._log.info("rim_not_refreshed", id=rim_id, why=error.message)
            return known
        except (Malformed, EvidenceError) as error:
            self._log.warning("rim_refused", id=rim_id, source="service", why=error.message)
            if known is None:
                raise EndorsementsUnavailable(
                    f"RIM {rim_id}: the service's document is refused: {error.message}"
                ) from error
            return known
        if fetched.signer:
            await self._store.put("rim", rim_id, document, expires=None)
            self._log.info("rim_fetched", id=rim_id, expires=str(fetched.expires))
        if known is not None and not _lasts_longer(fetched, known):
            return known
        return fetched

    async def _fetch(self, rim_id: str) -> bytes:
        what = f"RIM {rim_id}"
        self._patience.spend(what)
        answer = await self._vendors.get(
            f"{self._url}/{rim_id}",
            what=what,
            seconds=self._seconds,
            max_bytes=_MAX_ANSWER_BYTES,
            headers={"accept": "application/json"},
        )
        try:
            reply = msgspec.json.decode(answer.body, type=_Reply)
            document = decode_base64(reply.rim, field="rim", max_bytes=MAX_VALUE_BYTES)
        except (msgspec.DecodeError, ValueError, RecursionError, Malformed):
            raise EndorsementsUnavailable(
                f"{what}: the service's answer is not what it documents"
            ) from None
        if reply.id != rim_id:
            raise EndorsementsUnavailable(f"{what}: the service answered with another one")
        # No proof of anything, but it tells a damaged answer from a forged one.
        if reply.sha256 not in (None, hashlib.sha256(document).hexdigest()):
            raise EndorsementsUnavailable(f"{what}: the service's answer is damaged")
        return document

    def _judge(self, rim_id: str, document: bytes, at: datetime.datetime) -> Rim:
        try:
            return Rim(rim_id, document, tuple(self._authenticate(document, at)))
        except Stale:
            return Rim(rim_id, document, ())

    def _alarm(self, rim: Rim) -> None:
        if (rim.id, rim.expires) not in self._alarmed:
            self._alarmed.add((rim.id, rim.expires))
            self._log.warning(
                "rim_expires",
                id=rim.id,
                expires=None if rim.expires is None else rim.expires.isoformat(),
                advice="Let the appliance reach [attestation] rim_url, or put a newer one into "
                "its store, before the manifest's signer expires.",
            )


def _lasts_longer(rim: Rim, other: Rim) -> bool:
    if rim.expires is None or other.expires is None:
        return rim.expires is not None
    return rim.expires > other.expires


def _baked(folders: Iterable[Path], rim_id: str) -> list[bytes]:
    """The files of this id; what cannot be read is as good as absent, the image is measured."""
    found = []
    for folder in folders:
        try:
            with (folder / f"{rim_id}.xml").open("rb") as file:
                found.append(file.read(MAX_VALUE_BYTES))
        except OSError:
            continue
    return found
