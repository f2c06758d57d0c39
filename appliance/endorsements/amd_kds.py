"""AMD's certificates and revocation lists: from the store, or from its Key Distribution Service.

Source: AMD publication 57230 revision 1.01, section 4 (requests). A chip's key changes with its
firmware, so a VCEK is asked for by chip and by TCB, and is the same for ever. The service answers
429 when it is asked often; an appliance asks once in the life of its firmware.

A VLEK is not to be had here: AMD gives it to the cloud provider, who hands it out with the report.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias
from urllib.parse import urlencode

import msgspec
import trio
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from appliance.endorsements.http import Patience, Vendors
from appliance.endorsements.nvidia_rim import Clock
from appliance.endorsements.store import EndorsementStore
from appliance.errors import EndorsementsUnavailable, EvidenceError, Malformed, Unauthentic
from appliance.log import Log
from appliance.rats import chain
from appliance.rats.model import AmdRoots
from appliance.rats.revocation import (
    MAX_CRL_BYTES,
    authenticate_crl,
    crl_expiry,
    parse_crl,
)
from appliance.rats.schemes.sev_snp import load_vek, split_vek_pem
from appliance.wire.pem import MAX_CERTIFICATE_BYTES, MAX_PEM_BYTES

KeyKind: TypeAlias = Literal["vcek", "vlek"]

# 57230 section 3, tables 8 and 9: the extensions of a VCEK's certificate.
_SVN_OIDS = {
    "fmcSPL": "1.3.6.1.4.1.3704.1.3.9",
    "blSPL": "1.3.6.1.4.1.3704.1.3.1",
    "teeSPL": "1.3.6.1.4.1.3704.1.3.2",
    "snpSPL": "1.3.6.1.4.1.3704.1.3.3",
    "ucodeSPL": "1.3.6.1.4.1.3704.1.3.8",
}
_HWID_OID = "1.3.6.1.4.1.3704.1.4"

_CHIP_ID_BYTES = 64
_SHORT_CHIP_ID_BYTES = 8
"""Of Turin; the rest of CHIP_ID is zero (57230 section 3.1)."""

PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class AmdChip:
    """What a VCEK is asked for by.

    Attributes:
        product: line: `Milan`, `Genoa` or `Turin`.
        chip_id: CHIP_ID of a report, 64 bytes.
        bootloader, tee, snp, microcode: the parts of REPORTED_TCB.
        fmc: of Turin's; None for earlier lines.
    """

    product: str
    chip_id: bytes
    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None

    @property
    def hwid(self) -> bytes:
        """CHIP_ID as the service and the certificate spell it.

        Raises:
            EndorsementsUnavailable: the host masks it, so nobody can ask.
            Malformed: it has another length.
        """
        if len(self.chip_id) != _CHIP_ID_BYTES:
            raise Malformed(f"chip id: expected {_CHIP_ID_BYTES} bytes", field="chip_id")
        if not any(self.chip_id):
            raise EndorsementsUnavailable(
                "VCEK: the host masks the chip id; it must hand out the certificate itself"
            )
        return self.chip_id if self.fmc is None else self.chip_id[:_SHORT_CHIP_ID_BYTES]

    def svns(self) -> dict[str, int]:
        """The security versions, by the names of the request's parameters, in their order."""
        fmc = {} if self.fmc is None else {"fmcSPL": self.fmc}
        return fmc | {
            "blSPL": self.bootloader,
            "teeSPL": self.tee,
            "snpSPL": self.snp,
            "ucodeSPL": self.microcode,
        }


@dataclass(frozen=True, slots=True)
class Vek:
    """A certificate of a key that signs reports, under a pinned root.

    Attributes:
        certificate: its own.
        issuer: the one certificate between it and the root.
        roots: of its product line.
        kind: the chip's own key, or one that AMD lent to a cloud provider.
    """

    certificate: x509.Certificate
    issuer: x509.Certificate
    roots: AmdRoots
    kind: KeyKind

    @property
    def authorities(self) -> bytes:
        """PEM of what is between it and the root."""
        return self.issuer.public_bytes(Encoding.PEM)


class AmdSource:
    """Finds AMD's endorsements of one machine.

    Args:
        url: of the Key Distribution Service.
        roots: the pinned ones; of another product line nothing is found.
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
        roots: Sequence[AmdRoots],
        seconds: float,
        now: Clock,
        log: Log,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._store = store
        self._vendors = vendors
        self._url = url.rstrip("/")
        self._roots = {line.product: line for line in roots}
        self._seconds = seconds
        self._now = now
        self._log = log
        self._one_at_a_time = trio.Lock()
        self._patience = Patience(patience_s)

    async def authenticate(self, vek_der: bytes) -> Vek:
        """Find the way from a VEK to a pinned root: through the pinned intermediate, or through
        one that AMD issued since, which is on disk or asked for.

        Raises:
            Malformed: it does not parse.
            Unauthentic, Stale: it leads to no pinned root, or not at this time.
            EndorsementsUnavailable: AMD's new intermediate is needed and not to be had.
        """
        async with self._one_at_a_time:
            return await self._authenticate(vek_der)

    async def vcek(self, chip: AmdChip) -> bytes:
        """The chip's certificate, DER, under the pinned root and for this very chip and TCB.

        Raises:
            Malformed: a chip id that is none.
            EndorsementsUnavailable: not on disk, and not to be had.
        """
        if chip.product not in self._roots:
            raise EndorsementsUnavailable(f"VCEK: no root is pinned for {chip.product}")
        hwid, svns = chip.hwid.hex(), chip.svns()
        name = f"{chip.product}/{hwid}-{'-'.join(str(svn) for svn in svns.values())}"
        async with self._one_at_a_time:
            at = self._now()
            for stored in await self._store.find("amd", name, at=at):
                try:
                    _check_names(await self._authenticate(stored.value), chip)
                except (EndorsementsUnavailable, Malformed, EvidenceError) as error:
                    self._log.warning("amd_refused", name=name, source="disk", why=error.message)
                else:
                    return stored.value
            query = urlencode({parameter: f"{svn:02}" for parameter, svn in svns.items()})
            der = await self._get(
                f"{self._url}/vcek/v1/{chip.product}/{hwid}?{query}",
                what=f"VCEK of a {chip.product}",
                max_bytes=MAX_CERTIFICATE_BYTES,
            )
            try:
                vek = await self._authenticate(der)
                _check_names(vek, chip)
            except (Malformed, EvidenceError) as error:
                raise EndorsementsUnavailable(
                    f"VCEK: AMD's answer is refused: {error.message}"
                ) from error
            expires = vek.certificate.not_valid_after_utc
            await self._store.put("amd", name, der, expires=expires)
            return der

    async def crl(self, vek: Vek) -> bytes:
        """The revocation list of a product line's intermediates, DER, by the pinned root, in its
        time.

        Raises:
            EndorsementsUnavailable: not on disk, and not to be had.
        """
        product, ark = vek.roots.product, vek.roots.ark
        name = f"{product}/{vek.kind}-crl"
        async with self._one_at_a_time:
            kept: bytes | None = None
            at = self._now()
            for stored in await self._store.find("amd", name, at=at):
                try:
                    start, end = _check_crl(stored.value, ark, at)
                except (Malformed, EvidenceError) as error:
                    self._log.warning("amd_refused", name=name, source="disk", why=error.message)
                    continue
                if at < start + (end - start) / 2:
                    return stored.value
                kept = stored.value
            # In the second half of its life a list is asked for again, and does if it must.
            try:
                der = await self._get(
                    f"{self._url}/{vek.kind}/v1/{product}/crl",
                    what=f"revocation list of {product}",
                    max_bytes=MAX_CRL_BYTES,
                )
                _, end = _check_crl(der, ark, self._now())
            except (EndorsementsUnavailable, Malformed, EvidenceError) as error:
                if kept is not None:
                    return kept
                if isinstance(error, EndorsementsUnavailable):
                    raise
                raise EndorsementsUnavailable(
                    f"revocation list of {product}: AMD's answer is refused: {error.message}"
                ) from error
            await self._store.put("amd", name, der, expires=end)
            return der

    async def from_azure(self, imds_url: str) -> bytes:
        """The certificate of the machine's key, as Azure hands it to a guest.

        Source: Azure's "Trusted Hardware Identity Management", the metadata service's
        `/metadata/THIM/amd/certification`: JSON with `vcekCert`, PEM, and its chain.

        Returns:
            DER, under a pinned root.

        Raises:
            EndorsementsUnavailable: not to be had, or not under a pinned root.
        """
        what = "VCEK from Azure"
        body = await self._get(
            f"{imds_url.rstrip('/')}/metadata/THIM/amd/certification",
            what=what,
            max_bytes=MAX_PEM_BYTES,
            headers={"Metadata": "true"},
        )
        try:
            reply = msgspec.json.decode(body, type=_ThimReply)
            vek, _ = split_vek_pem(reply.vcek_cert.encode())
            await self.authenticate(vek)
        except (msgspec.DecodeError, ValueError, Malformed, EvidenceError) as error:
            why = getattr(error, "message", "not what Azure documents")
            raise EndorsementsUnavailable(f"{what}: the answer is refused: {why}") from None
        return vek

    async def _authenticate(self, vek_der: bytes) -> Vek:
        vek = load_vek(vek_der)
        line, kind = self._issuer_of(vek)
        # 1. The pinned intermediate, unless AMD has another of that name by now.
        pinned = line.ask if kind == "vcek" else line.asvk
        if _issued(pinned, vek):
            return await self._under_root(vek, pinned, line, kind)
        # 2. One that was kept.
        name = f"{line.product}/{kind}-issuer"
        for stored in await self._store.find("amd", name, at=self._now()):
            try:
                kept = chain.parse_der_certificate(stored.value, field=name)
            except Malformed:
                continue
            if _issued(kept, vek):
                return await self._under_root(vek, kept, line, kind)
        # 3. AMD's present one: PEM, the intermediate and the root.
        pem = await self._get(
            f"{self._url}/{kind}/v1/{line.product}/cert_chain",
            what=f"issuer of a {line.product}'s {kind.upper()}",
            max_bytes=MAX_PEM_BYTES,
        )
        issuer = chain.parse_pem_chain(pem, field="cert_chain")[0]
        found = await self._under_root(vek, issuer, line, kind)
        expires = issuer.not_valid_after_utc
        await self._store.put("amd", name, chain.der_of(issuer), expires=expires)
        return found

    async def _under_root(
        self, vek: x509.Certificate, issuer: x509.Certificate, line: AmdRoots, kind: KeyKind
    ) -> Vek:
        """RSA-PSS with 4096 bits takes a millisecond, so in a thread."""
        at = self._now()

        def check() -> None:
            chain.authenticate_path([vek, issuer], roots=[line.ark], at=at, what=kind)

        await trio.to_thread.run_sync(check)
        return Vek(vek, issuer, line, kind)

    def _issuer_of(self, vek: x509.Certificate) -> tuple[AmdRoots, KeyKind]:
        """By the name that its certificate gives.

        Raises:
            Unauthentic: no such one is pinned.
        """
        for line in self._roots.values():
            if vek.issuer == line.ask.subject:
                return line, "vcek"
            if vek.issuer == line.asvk.subject:
                return line, "vlek"
        name = vek.issuer.rfc4514_string()
        raise Unauthentic(f"vek: expected an issuer that is pinned, got {name}")

    async def _get(
        self, url: str, *, what: str, max_bytes: int, headers: dict[str, str] | None = None
    ) -> bytes:
        self._patience.spend(what)
        answer = await self._vendors.get(
            url, what=what, seconds=self._seconds, max_bytes=max_bytes, headers=headers
        )
        return answer.body


class _ThimReply(msgspec.Struct, frozen=True, rename="camel"):
    vcek_cert: str


def _issued(issuer: x509.Certificate, subject: x509.Certificate) -> bool:
    try:
        subject.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _check_names(vek: Vek, chip: AmdChip) -> None:
    """It is kept for ever, so it must be about the chip and the TCB that were asked for.

    Raises:
        Unauthentic: it is not.
    """
    if (vek.roots.product, vek.kind) != (chip.product, "vcek"):
        raise Unauthentic(f"vcek: expected the certificate of a {chip.product}")
    values = {
        one.oid.dotted_string: one.value.value
        for one in vek.certificate.extensions
        if isinstance(one.value, x509.UnrecognizedExtension)
    }
    # The identifier stands there bare, or as a DER OCTET STRING.
    if values.get(_HWID_OID) not in (chip.hwid, bytes((0x04, len(chip.hwid))) + chip.hwid):
        raise Unauthentic("vcek: expected the certificate of another chip")
    for parameter, svn in chip.svns().items():
        if values.get(_SVN_OIDS[parameter]) != _der_integer(svn):
            raise Unauthentic(f"vcek: expected a certificate for {parameter} {svn}")


def _der_integer(value: int) -> bytes:
    """0 to 255 as DER; one byte more where the sign bit would be set (X.690 section 8.3)."""
    content = value.to_bytes(1 + (value > 0x7F), "big")
    return bytes((0x02, len(content))) + content


def _check_crl(
    der: bytes, ark: x509.Certificate, at: datetime.datetime
) -> tuple[datetime.datetime, datetime.datetime]:
    """When a list was made and when it ends.

    Raises:
        Malformed, Unauthentic, Stale: it does not hold.
    """
    crl = parse_crl(der)
    authenticate_crl(crl, issuer=ark, at=at)
    return crl.last_update_utc, crl_expiry(crl)
