"""Attestation reports about this appliance, and the keyset they prove.

A report is made of an epoch's GPU evidence and a CPU quote over the keyset's digest. The keyset
is renewed in time with the same keys, which gives it another digest; an exchange keeps the digest
that was current when it was admitted, so every keyset that was ever current stays known here
together with its null-form report (protocol.md sections 1 and 3).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from appliance.errors import RateLimited
from appliance.serving.epochs import Attested, Epochs
from appliance.serving.identity import Identity
from appliance.wire.canonical import JsonObject, canonical_json
from appliance.wire.commitments import report_commitment
from appliance.wire.evidence import CpuEvidence
from appliance.wire.identity import Keyset, report_data_of
from appliance.wire.report import GpuSection, Report

TEE_TYPES = {"simulated": "unsafe_simulated"}
"""`tee_type` where it is not the scheme's own name: nobody should take it for a TEE."""

MAX_WAITING_REPORTS = 16
"""Of clients', from the moment they are asked for; one more is told to come back."""

RENEW_AFTER = 0.75
"""Of a keyset's lifetime; what is left is for clients that hold the old one."""


@dataclass(slots=True)
class _Issue:
    """One keyset that was current, and its null-form report once somebody asked for it."""

    keyset: Keyset
    null_form: bytes | None = None
    making: trio.Lock = field(default_factory=trio.Lock)


class Reports:
    """Makes reports; one CPU quote at a time.

    Clients stand in a bounded line of their own. The appliance's own report and the null form, of
    which there is one each, wait behind no more than the quote being made and each other, so that
    nobody can keep the appliance from proving itself.

    Args:
        quote: CPU evidence over 32 bytes, with what endorses it; raises AttesterError.
        lifetime_s: of a keyset.
        now: Unix seconds.
        publish: told every null form, with its keyset's digest: receipts cite the keyset.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        quote: Callable[[bytes], Awaitable[CpuEvidence]],
        lifetime_s: float,
        now: Callable[[], float],
        publish: Callable[[bytes, bytes], None],
    ) -> None:
        self._identity = identity
        self._epochs: Epochs | None = None
        self._quote = quote
        self._lifetime_s = lifetime_s
        self._now = now
        self._publish = publish
        self._issued: dict[bytes, _Issue] = {}
        self._clients = 0
        self._client_turn = trio.Lock()
        self._quoting = trio.Lock()
        self.keyset_digest = b""
        self.renew()

    def use(self, epochs: Epochs) -> None:
        """Whose GPU evidence goes into reports; epochs ask for the keyset, which is here."""
        self._epochs = epochs

    @property
    def keyset(self) -> Keyset:
        """The current one."""
        return self._issued[self.keyset_digest].keyset

    @property
    def renew_in_s(self) -> float:
        """Seconds until the current keyset should be renewed; negative when late."""
        return self.keyset.not_after - (1 - RENEW_AFTER) * self._lifetime_s - self._now()

    def renew(self) -> None:
        """Issue a keyset that ends a lifetime from now, with the same keys."""
        keyset = self._identity.keyset(not_after=int(self._now() + self._lifetime_s))
        self.keyset_digest = keyset.digest
        self._issued.setdefault(keyset.digest, _Issue(keyset))

    async def report(self, nonce: bytes) -> bytes:
        """A fresh report for a client as its JSON bytes; its deadline is the caller's.

        Args:
            nonce: 32 bytes.

        Raises:
            RateLimited: too many are being made for clients.
            Overloaded, AttesterError, EvidenceError: as for `Epochs.join`; the quote could not be
                had.
        """
        # Counted before the epoch: all that wait for one leave it at the same moment.
        if self._clients >= MAX_WAITING_REPORTS:
            raise RateLimited("too many reports are being made", retry_after_s=1)
        self._clients += 1
        try:
            return (await self._make(nonce, self._quote_in_turn))[1]
        finally:
            self._clients -= 1

    async def own_report(self, nonce: bytes) -> bytes:
        """As `report`, for the appliance itself: it is never told to come back for the line."""
        return (await self._make(nonce, self._quote_next))[1]

    async def _make(
        self, nonce: bytes | None, quote: Callable[[bytes], Awaitable[CpuEvidence]]
    ) -> tuple[bytes, bytes]:
        """A report, and the digest of the keyset in it."""
        assert self._epochs is not None
        attested = await self._epochs.join("report", report_commitment(nonce))
        # The epoch's keyset, should it have been renewed meanwhile: all parts must say the same.
        digest = attested.epoch.keyset_digest
        report_data = report_data_of(digest, nonce)
        cpu = await quote(report_data)
        keyset = self._issued[digest].keyset
        return digest, canonical_json(self._assemble(keyset, attested, cpu, report_data))

    async def _quote_in_turn(self, report_data: bytes) -> CpuEvidence:
        async with self._client_turn:
            return await self._quote_next(report_data)

    async def _quote_next(self, report_data: bytes) -> CpuEvidence:
        async with self._quoting:
            return await self._quote(report_data)

    async def null_form(self, keyset_digest: bytes | None = None) -> bytes | None:
        """The null-form report of a keyset, made once; None for a digest never issued.

        Args:
            keyset_digest: 32 bytes; None for the current one. A null form that nobody asked for
                while its keyset was current can no longer be made, so it is made as soon as one is issued.
        """
        digest = self.keyset_digest if keyset_digest is None else keyset_digest
        issue = self._issued.get(digest)
        if issue is None:
            return None
        async with issue.making:
            if issue.null_form is None and digest == self.keyset_digest:
                made, report = await self._make(None, self._quote_next)
                self._issued[made].null_form = report
                self._publish(made, report)
        return issue.null_form

    def _assemble(
        self, keyset: Keyset, attested: Attested, cpu: CpuEvidence, report_data: bytes
    ) -> JsonObject:
        identity, image = self._identity, self._identity.image
        return Report(
            keyset_digest=attested.epoch.keyset_digest,
            tee_type=TEE_TYPES.get(cpu.scheme, cpu.scheme),
            keyset_document=keyset.to_json(),
            keyset=keyset,
            report_data=report_data,
            provenance={
                "repo_url": image.repo_url,
                "repo_commit": image.commit,
                "image_digest": image.uki_digest,
                "image_provenance": None,
            },
            cpu=cpu,
            gpu=GpuSection(attested.epoch.evidence_digest, attested.inclusion, attested.epoch.gpus),
            workload=identity.manifest,
            instance=identity.instance,
            policy=identity.policy,
        ).to_json()
