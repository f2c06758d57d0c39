"""Adds to evidence what its vendors vouch for: at boot, and at every re-attestation.

    async with Endorsements(config.attestation, anchors, authenticate_rim=…, log=log) as endorsements:
        gpu = await endorsements.for_gpu(gpu, rim_ids=claims.rim_ids, device_path=path)
        cpu = await endorsements.for_cpu(cpu, chip=chip)

No request waits for any of this. What cannot be had is left out and named in the log, once: what
follows from that is for the policy to say, here and at the relying party's. With `[attestation]
endorsements = "offline"` only the disk is read, and there is no code path to a socket.

Everything that is added has been authenticated against the pinned roots; whoever appraises the
evidence does so again, because it may have come from anywhere by then.
"""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509

from appliance.config import Attestation
from appliance.credentials import NO_KEYS, Secret, VendorKeys
from appliance.endorsements.amd_kds import AmdChip, AmdSource
from appliance.endorsements.http import Offline, ServiceKey, VendorClient, Vendors
from appliance.endorsements.intel_pcs import IntelSource, platform_of
from appliance.endorsements.nvidia_rim import AuthenticateRim, Clock, RimSource
from appliance.endorsements.ocsp import OcspSource, Question
from appliance.endorsements.store import EndorsementStore
from appliance.errors import ConfigError, EndorsementsUnavailable, EvidenceError, Malformed
from appliance.log import Log
from appliance.rats import chain
from appliance.rats.model import Anchors
from appliance.rats.revocation import device_part, signer_part
from appliance.wire.evidence import MAX_OCSP, MAX_RIMS, CpuEvidence, GpuEvidence


def utc_now() -> datetime.datetime:
    """The wall clock."""
    return datetime.datetime.now(datetime.UTC)


class Endorsements:
    """All vendors' sources over one store and one client; an asynchronous context manager.

    Args:
        attestation: the configuration's section.
        anchors: the pinned roots; of a vendor without one nothing is found.
        authenticate_rim: what makes a manifest trustworthy (`rats.schemes.nvidia_gpu`).
        keys: of vendors' services.
        now: the wall clock.
        tls: whom to believe; None for the operating system's authorities.
    """

    def __init__(
        self,
        attestation: Attestation,
        anchors: Anchors,
        *,
        authenticate_rim: AuthenticateRim,
        log: Log,
        keys: VendorKeys = NO_KEYS,
        now: Clock = utc_now,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._client = None
        if attestation.endorsements == "online":
            self._client = VendorClient(tls=tls, keys=service_keys(attestation, keys))
        vendors: Vendors = self._client or Offline()
        store = EndorsementStore(Path(attestation.endorsements_dir), log=log)
        seconds = attestation.endorsement_s
        self._log = log
        self._now = now
        self._said: set[str] = set()
        self._imds_url = attestation.imds_url
        self._authenticate_rim = authenticate_rim
        self.rims = RimSource(
            folders=[Path(folder) for folder in attestation.rim_dirs],
            store=store,
            vendors=vendors,
            url=attestation.rim_url,
            authenticate=authenticate_rim,
            seconds=seconds,
            now=now,
            log=log,
        )
        self.ocsp = OcspSource(
            store=store,
            vendors=vendors,
            url=attestation.ocsp_url,
            seconds=seconds,
            now=now,
            log=log,
        )
        self.amd = AmdSource(
            store=store,
            vendors=vendors,
            url=attestation.kds_url,
            roots=anchors.amd,
            seconds=seconds,
            now=now,
            log=log,
        )
        self.intel = None
        if anchors.intel_root:
            self.intel = IntelSource(
                store=store,
                vendors=vendors,
                url=attestation.pcs_url,
                root=_intel_root(anchors.intel_root),
                seconds=seconds,
                now=now,
                log=log,
            )

    async def __aenter__(self) -> Self:
        if self._client is not None:
            await self._client.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._client is not None:
            await self._client.__aexit__(kind, error, traceback)

    async def for_gpu(
        self,
        evidence: GpuEvidence,
        *,
        rim_ids: Sequence[str],
        device_path: Sequence[x509.Certificate],
    ) -> GpuEvidence:
        """With its manifests, if it has none yet, and what is known about revocation now.

        Args:
            evidence: of scheme `nvidia_gpu`; of another one it comes back as it is.
            rim_ids: of the manifests that its claims call for.
            device_path: its authenticated path, leaf first, the pinned root last.
        """
        if evidence.scheme != "nvidia_gpu":
            return evidence
        # 1. The manifests, and with each the path of its signer.
        signers: list[Sequence[x509.Certificate]] = []
        rims = evidence.rims
        if rims:
            signers += [path for rim in rims if (path := self._signer_of(rim))]
        else:
            found: list[bytes] = []
            for rim_id in dict.fromkeys(rim_ids[:MAX_RIMS]):
                try:
                    rim = await self.rims.find(rim_id)
                except (EndorsementsUnavailable, Malformed) as error:
                    self._missing(f"RIM {rim_id[:200]}", error.message)
                    continue
                self._said.discard(f"RIM {rim_id}")
                found.append(rim.document)
                signers += [rim.signer] if rim.signer else []
            rims = tuple(found)
        # 2. Every certificate that its issuer answers about.
        parts = [device_part(device_path), *(signer_part(path) for path in signers)]
        questions: dict[str, Question] = {
            chain.sha256_of(certificate): (certificate, issuer)
            for certificates, issuers in parts
            for certificate, issuer in zip(certificates, issuers, strict=True)
        }
        answers = await self.ocsp.answers(tuple(questions.values()))
        for digest, (certificate, _) in questions.items():
            what = f"revocation of {certificate.subject.rfc4514_string()}"
            if digest in answers:
                self._said.discard(what)
            else:
                self._missing(what, "no answer that holds")
        return replace(evidence, rims=rims, ocsp=tuple(answers.values())[:MAX_OCSP])

    async def for_cpu(self, evidence: CpuEvidence, *, chip: AmdChip | None = None) -> CpuEvidence:
        """With the endorsements that its scheme may have and that it does not have yet.

        Args:
            evidence: of any scheme.
            chip: what the VCEK of an SEV-SNP report is asked for by; None where a VLEK signed, or
                where the cloud hands the certificate out.
        """
        if (quote := _td_quote(evidence)) is not None:
            return await self._with_collateral(evidence, quote)
        if evidence.scheme in ("sev_snp", "azure_vtpm"):
            return await self._with_amd(evidence, chip)
        return evidence

    async def _with_collateral(self, evidence: CpuEvidence, quote: bytes) -> CpuEvidence:
        if "collateral" in evidence.endorsements:
            return evidence
        what = "Intel's collateral"
        if self.intel is None:
            self._missing(what, "no root is pinned")
            return evidence
        try:
            collateral = await self.intel.collateral(platform_of(quote))
        except (EndorsementsUnavailable, Malformed) as error:
            self._missing(what, error.message)
            return evidence
        self._said.discard(what)
        return replace(evidence, endorsements={**evidence.endorsements, "collateral": collateral})

    async def _with_amd(self, evidence: CpuEvidence, chip: AmdChip | None) -> CpuEvidence:
        endorsements = dict(evidence.endorsements)
        # 1. The certificate of the key that signed the report.
        what = "AMD's certificate of the report's key"
        try:
            if "vek" not in endorsements:
                endorsements["vek"] = await self._vek(evidence.scheme, chip)
            vek = await self.amd.authenticate(endorsements["vek"])
        except (EndorsementsUnavailable, Malformed, EvidenceError) as error:
            self._missing(what, error.message)
            return evidence
        self._said.discard(what)
        endorsements.setdefault("authorities", vek.authorities)
        # 2. The list that its issuer could be on.
        what = f"AMD's revocation list of {vek.roots.product}"
        if "crl" not in endorsements:
            try:
                endorsements["crl"] = await self.amd.crl(vek)
            except EndorsementsUnavailable as error:
                self._missing(what, error.message)
            else:
                self._said.discard(what)
        return replace(evidence, endorsements=endorsements)

    async def _vek(self, scheme: str, chip: AmdChip | None) -> bytes:
        """From AMD, by chip; or from the metadata service of the cloud it runs in."""
        if chip is not None:
            try:
                return await self.amd.vcek(chip)
            except (EndorsementsUnavailable, Malformed):
                if scheme != "azure_vtpm":
                    raise
        if scheme != "azure_vtpm":
            raise EndorsementsUnavailable("the host handed out none, and no chip is known")
        return await self.amd.from_azure(self._imds_url)

    def _signer_of(self, rim: bytes) -> Sequence[x509.Certificate]:
        try:
            return self._authenticate_rim(rim, self._now())
        except (Malformed, EvidenceError):
            return ()  # whoever appraises it says so

    def _missing(self, what: str, why: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._log.warning(
                "endorsement_missing", what=what, why=why, advice=EndorsementsUnavailable.advice
            )


def service_keys(attestation: Attestation, keys: VendorKeys) -> list[ServiceKey]:
    """Which service gets which key, and how."""
    found = []
    if keys.nvidia is not None:
        bearer = Secret(f"Bearer {keys.nvidia.reveal()}")
        urls = (attestation.rim_url, attestation.ocsp_url)
        found += [ServiceKey(url, "authorization", bearer) for url in urls]
    if keys.intel is not None:
        found.append(ServiceKey(attestation.pcs_url, "ocp-apim-subscription-key", keys.intel))
    return found


def _td_quote(evidence: CpuEvidence) -> bytes | None:
    if evidence.scheme == "tdx":
        return evidence.parts["quote"]
    return evidence.parts.get("td_quote") if evidence.scheme == "azure_vtpm" else None


def _intel_root(der: bytes) -> x509.Certificate:
    try:
        return chain.parse_der_certificate(der, field="intel_root")
    except Malformed as error:
        raise ConfigError(f"Intel's pinned root: {error.message}") from error
