"""This appliance's own evidence: collected, endorsed, and held to its own policy.

The collector gives raw evidence, the endorsements what vendors say about it, `rats` the verdict;
here the three meet. What vendors say is fetched at boot and at re-attestations (`refresh`) and
remembered, so that no request waits for a vendor.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import trio
from cryptography import x509

from appliance.attester.client import Attester
from appliance.config import MeasuredConfig
from appliance.endorsements.amd_kds import AmdChip
from appliance.endorsements.collect import Endorsements
from appliance.errors import AttesterUnavailable, Malformed, Unauthentic
from appliance.rats.appraise import Context, appraise_report
from appliance.rats.gpus import GpuStatement, Memory, appraise_gpus
from appliance.rats.model import Anchors
from appliance.rats.presented import Presented, appraise_presented
from appliance.rats.result import AttestationResult, Tier
from appliance.rats.schemes.nvidia_gpu import authenticate_rim
from appliance.wire.evidence import CpuEvidence, GpuEvidence
from appliance.wire.report import parse_report
from appliance.wire.sev_snp import parse_report as parse_sev_snp_report
from appliance.wire.sev_snp import parse_tcb, product_of

T = TypeVar("T")

PROBE = b"\x00" * 32
"""Report data of the quote that is only made to learn what endorses this machine's quotes."""

RENEWED = ("crl", "collateral")
"""Endorsements that lapse while the machine runs. The vendors are asked for them even where the host
hands one out, and theirs counts; what certifies the machine's keys is the host's where it has it."""


class OwnEvidence:
    """Evidence of this machine.

    Args:
        anchors: the pinned roots, those of the simulated hardware only where it is configured.
        now: Unix seconds.
    """

    def __init__(
        self,
        config: MeasuredConfig,
        attester: Attester,
        endorsements: Endorsements,
        anchors: Anchors,
        *,
        now: Callable[[], float],
    ) -> None:
        self._config = config
        self._attester = attester
        self._endorsements = endorsements
        self._anchors = anchors
        self._now = now
        self._memory = Memory()
        self._one_thread = trio.CapacityLimiter(1)  # Memory's
        self._gpu_endorsements: list[GpuEvidence] = []
        self._cpu_endorsements: dict[str, bytes] = {}

    async def gpus(
        self, nonce: bytes, asked: Callable[[], None] | None = None
    ) -> tuple[GpuEvidence, ...]:
        """Fresh evidence of every GPU over 32 bytes, with what endorses it as far as is known.

        Args:
            asked: called once the device has been asked.

        Raises:
            AttesterError: it could not be had.
        """
        if self._config.attestation.gpu == "unsafe_none":
            return ()
        raw = await self._attester.gpu_evidence(nonce, asked=asked)
        known = self._gpu_endorsements
        return tuple(
            replace(one, rims=known[index].rims or one.rims, ocsp=known[index].ocsp)
            if index < len(known)
            else one
            for index, one in enumerate(raw)
        )

    async def appraise_gpus(
        self, gpus: Sequence[GpuEvidence], nonce: bytes
    ) -> tuple[GpuStatement, ...]:
        """The verdict on each GPU.

        Raises:
            Unauthentic, Revoked, Stale, Unbound: one does not hold; also what does not parse.
        """
        return await self._think(
            partial(
                appraise_gpus,
                gpus,
                nonce=nonce,
                policy=self._config.policy,
                anchors=self._anchors,
                at=self._at(),
                memory=self._memory,
            )
        )

    async def quote(self, report_data: bytes) -> CpuEvidence:
        """CPU evidence over 32 bytes, with what endorses it as far as is known.

        Raises:
            AttesterError: it could not be had.
        """
        raw = await self._raw_quote(report_data)
        known = self._cpu_endorsements
        renewed = {name: known[name] for name in RENEWED if name in known}
        return replace(raw, endorsements={**known, **raw.endorsements, **renewed})

    async def appraise_report(self, data: bytes, nonce: bytes | None) -> AttestationResult:
        """Steps 2 to 9 of protocol.md section 9 on a report of our own.

        Raises:
            Unauthentic, Revoked, Stale, Unbound: it does not hold; also what does not parse.
        """

        def check() -> AttestationResult:
            context = Context(
                self._config.policy,
                self._anchors,
                None,  # nobody vouches for our own image to us: what it is claimed to be, we claim
                self._at(),
                self._memory,
                claimed_image=Tier.WARNING,
            )
            return appraise_report(
                parse_report(data), nonce=nonce, spki_sha256=None, context=context
            )

        return await self._think(check)

    async def appraise_presented(self, presented: Presented) -> AttestationResult:
        """The verdict on evidence that somebody shows, held to the roots of our own GPUs and, if
        it is of one of them, to its reference values.

        Raises:
            Unauthentic, Revoked, Stale, Unbound: it does not hold; also what does not parse.
        """
        rims = {one.certificate_chain: one.rims for one in self._gpu_endorsements}
        simulated = self._config.attestation.gpu == "simulated"
        return await self._think(
            partial(
                appraise_presented,
                presented,
                scheme="simulated" if simulated else "nvidia_gpu",
                rims_of=lambda chain: rims.get(chain, ()),
                policy=self._config.policy,
                anchors=self._anchors,
                at=self._at(),
                memory=self._memory,
            )
        )

    async def refresh_gpus(
        self, gpus: Sequence[GpuEvidence], nonce: bytes
    ) -> tuple[GpuEvidence, ...]:
        """Ask the vendors about these GPUs and remember the answers; returns them endorsed.

        Args:
            gpus: fresh, over `nonce`.

        Raises:
            As `appraise_gpus`: nobody is asked about evidence that does not hold.
        """
        statements = await self.appraise_gpus(gpus, nonce)
        self._gpu_endorsements = [
            await self._endorsements.for_gpu(
                replace(evidence, rims=_own_rims(evidence), ocsp=()),
                rim_ids=[one.rim_id for one in statement.claims.rims_wanted],
                device_path=statement.claims.path,
            )
            for evidence, statement in zip(gpus, statements, strict=True)
        ]
        return tuple(self._gpu_endorsements)

    async def refresh_cpu(self) -> None:
        """Ask the vendors about this machine's CPU and remember the answers.

        Raises:
            AttesterError: there is no CPU evidence to ask about.
            Unauthentic: it does not parse.
        """
        raw = await self._raw_quote(PROBE)
        chip = await self._think(partial(_chip, raw))
        kept = {name: one for name, one in raw.endorsements.items() if name not in RENEWED}
        endorsed = await self._endorsements.for_cpu(replace(raw, endorsements=kept), chip=chip)
        self._cpu_endorsements = dict(endorsed.endorsements)

    async def _raw_quote(self, report_data: bytes) -> CpuEvidence:
        try:
            with trio.fail_after(self._config.attestation.collect_s):
                return await self._attester.cpu_evidence(report_data)
        except trio.TooSlowError:
            raise AttesterUnavailable("expected CPU evidence in time") from None

    async def _think(self, step: Callable[[], T]) -> T:
        """Off the event loop, one at a time; evidence that does not parse is evidence that lies.

        Cancelled, it is left to end by itself, and whoever thinks next waits for that.
        """
        try:
            return await trio.to_thread.run_sync(
                step, abandon_on_cancel=True, limiter=self._one_thread
            )
        except Malformed as error:
            raise Unauthentic(f"expected evidence that parses: {error.message}") from error

    def _at(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self._now(), tz=datetime.UTC)


def rim_authenticator(
    root: tuple[x509.Certificate, ...],
) -> Callable[[bytes, datetime.datetime], Sequence[x509.Certificate]]:
    """What `Endorsements` holds a manifest to before it keeps it."""

    def authenticate(document: bytes, at: datetime.datetime) -> Sequence[x509.Certificate]:
        return authenticate_rim(document, root=root, at=at).path

    return authenticate


def _own_rims(evidence: GpuEvidence) -> tuple[bytes, ...]:
    """Simulated hardware brings its manifests along; NVIDIA's come from NVIDIA, asked anew."""
    return evidence.rims if evidence.scheme == "simulated" else ()


def _chip(evidence: CpuEvidence) -> AmdChip | None:
    """What AMD is asked about; None where its report does not say which product line it is."""
    if evidence.scheme != "sev_snp":
        return None
    report = parse_sev_snp_report(evidence.parts["report"])
    product = None if report.cpuid is None else product_of(report.cpuid)
    if product is None:
        return None
    tcb = parse_tcb(report.reported_tcb, product=product, field="reported_tcb")
    return AmdChip(
        product=product,
        chip_id=report.chip_id,
        bootloader=tcb.bootloader,
        tee=tcb.tee,
        snp=tcb.snp,
        microcode=tcb.microcode,
        fmc=tcb.fmc,
    )


__all__ = ["OwnEvidence", "rim_authenticator"]
