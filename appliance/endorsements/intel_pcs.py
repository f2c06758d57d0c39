"""Intel's collateral for TDX quotes: from the store, from Intel's PCS, or from a PCCS.

Source: "Intel SGX and TDX Provisioning Certification Service" API version 4, and the caching
service of Intel's DCAP, which answers the same requests. One platform's collateral is

    its TCB's security versions        /tdx/certification/v4/tcb?fmspc=…
    the quoting enclave's identity     /tdx/certification/v4/qe/identity
    revoked PCKs                       /sgx/certification/v4/pckcrl?ca=…&encoding=der
    revoked CAs                        /sgx/certification/v4/rootcacrl (PCCS), or where the root
                                       certificate says (PCS)

each signed, and the issuers of all but the last in a header, PEM, percent-encoded. What is signed
is the exact text of a member of the JSON answer, so it is cut out and never written anew.

All of it is checked before it is kept, up to the pinned root. Whether it fits a quote, and what it
says about the platform, is asked by `rats.schemes.tdx`.
"""

from __future__ import annotations

import binascii
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import unquote

import dcap_qvl  # type: ignore[import-untyped]  # it has stubs, but does not say so
import msgspec
import trio
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from appliance.endorsements.http import Answer, Patience, Vendors
from appliance.endorsements.nvidia_rim import Clock
from appliance.endorsements.store import EndorsementStore
from appliance.errors import EndorsementsUnavailable, EvidenceError, Malformed, Stale, Unauthentic
from appliance.log import Log
from appliance.rats import chain
from appliance.rats.revocation import (
    MAX_CRL_BYTES,
    Revocation,
    authenticate_crl,
    check_crl,
    crl_expiry,
    parse_crl,
)
from appliance.wire.encoding import decode_hex

MAX_COLLATERAL_BYTES = 1 << 20
"""Real ones have 20 KiB."""

_MAX_JSON_BYTES = 256 << 10
_SIGNATURE_BYTES = 64
PATIENCE_S = 300.0

_PCK_CRL_CHAIN = ("sgx-pck-crl-issuer-chain",)
_TCB_CHAIN = ("tcb-info-issuer-chain", "sgx-tcb-info-issuer-chain")
_QE_CHAIN = ("sgx-enclave-identity-issuer-chain",)

Window: TypeAlias = tuple[datetime.datetime, datetime.datetime]


@dataclass(frozen=True, slots=True)
class Platform:
    """What collateral is asked for by.

    Attributes:
        fmspc: family, model, stepping, platform type and custom SKU; 12 lowercase hex digits.
        ca: which of Intel's two CAs issued the platform's PCK: `platform` or `processor`.
    """

    fmspc: str
    ca: str

    @property
    def name(self) -> str:
        """In the store."""
        return f"{self.fmspc}-{self.ca}"


class Collateral(msgspec.Struct, frozen=True):
    """As Intel's tools exchange it (`QuoteCollateralV3` of dcap-qvl). CRLs and signatures are hex,
    chains PEM, the two JSON documents the exact text that was signed."""

    pck_crl_issuer_chain: str
    root_ca_crl: str
    pck_crl: str
    tcb_info_issuer_chain: str
    tcb_info: str
    tcb_info_signature: str
    qe_identity_issuer_chain: str
    qe_identity: str
    qe_identity_signature: str

    def __repr__(self) -> str:
        return "Collateral()"


class _TcbReply(msgspec.Struct, frozen=True):
    tcb_info: msgspec.Raw = msgspec.field(name="tcbInfo")
    signature: str


class _QeReply(msgspec.Struct, frozen=True):
    enclave_identity: msgspec.Raw = msgspec.field(name="enclaveIdentity")
    signature: str


class _Dates(msgspec.Struct, frozen=True, rename="camel"):
    issue_date: datetime.datetime
    next_update: datetime.datetime
    fmspc: str = ""


def platform_of(quote: bytes) -> Platform:
    """Which platform a TDX quote comes from, by the PCK certificate in it, unproven.

    Raises:
        Malformed: no quote with a PCK certificate chain.
    """
    try:
        parsed = dcap_qvl.Quote.parse(quote)
        fmspc, ca = str(parsed.fmspc()), str(parsed.ca())
    except (ValueError, RuntimeError):
        raise Malformed("quote: expected one with a PCK certificate", field="quote") from None
    if len(fmspc) != 12 or ca not in ("platform", "processor"):
        raise Malformed("quote: expected a PCK certificate of Intel's", field="quote")
    return Platform(fmspc.lower(), ca)


def authenticate_collateral(
    document: bytes, *, platform: Platform, root: x509.Certificate, at: datetime.datetime
) -> Window:
    """Check every signature of a collateral up to the pinned root.

    Returns:
        Since when and until when all of its parts may be used.

    Raises:
        Malformed: it does not parse.
        Unauthentic: a signature, or it is about another platform.
        Stale: `at` is outside of a part's time.
    """
    collateral = _parse(document)
    pck_crl = parse_crl(_unhex(collateral.pck_crl, "pck_crl"))
    root_crl_der = _unhex(collateral.root_ca_crl, "root_ca_crl")
    root_crl = parse_crl(root_crl_der)
    # 1. The root's own list, then three chains up to that root with nothing on the list.
    authenticate_crl(root_crl, issuer=root, at=at)
    pck_ca, tcb_signer, qe_signer = (
        _leaf_of(pem, field, root=root, root_crl=root_crl_der, at=at)
        for field, pem in (
            ("pck_crl_issuer_chain", collateral.pck_crl_issuer_chain),
            ("tcb_info_issuer_chain", collateral.tcb_info_issuer_chain),
            ("qe_identity_issuer_chain", collateral.qe_identity_issuer_chain),
        )
    )
    # 2. The list of PCKs, by the CA that issues the platform's.
    if platform.ca not in pck_ca.subject.rfc4514_string().lower():
        raise Unauthentic(f"collateral: expected the list of Intel's {platform.ca} CA")
    authenticate_crl(pck_crl, issuer=pck_ca, at=at)
    # 3. The two documents, by the exact bytes of their text.
    tcb = _check_signed(
        collateral.tcb_info, collateral.tcb_info_signature, tcb_signer, "tcb_info", at
    )
    qe = _check_signed(
        collateral.qe_identity, collateral.qe_identity_signature, qe_signer, "qe_identity", at
    )
    if tcb.fmspc.lower() != platform.fmspc:
        raise Unauthentic(f"collateral: expected TCB info of {platform.fmspc}")
    starts = (tcb.issue_date, qe.issue_date, pck_crl.last_update_utc, root_crl.last_update_utc)
    ends = (tcb.next_update, qe.next_update, crl_expiry(pck_crl), crl_expiry(root_crl))
    return max(starts), min(ends)


class IntelSource:
    """Finds the collateral of one platform.

    Args:
        url: of Intel's PCS or of a PCCS.
        root: Intel SGX Root CA, pinned.
        seconds: for one question; there are four or five.
        now: the wall clock.
        patience_s: until the same thing is asked again.
    """

    def __init__(
        self,
        *,
        store: EndorsementStore,
        vendors: Vendors,
        url: str,
        root: x509.Certificate,
        seconds: float,
        now: Clock,
        log: Log,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._store = store
        self._vendors = vendors
        self._url = url.rstrip("/")
        self._root = root
        self._seconds = seconds
        self._now = now
        self._log = log
        self._one_at_a_time = trio.Lock()
        self._patience = Patience(patience_s)

    async def collateral(self, platform: Platform) -> bytes:
        """JSON of `Collateral`, authentic and in its time; fetched anew in the second half of it.

        Raises:
            EndorsementsUnavailable: not on disk, and not to be had.
        """
        async with self._one_at_a_time:
            at = self._now()
            kept: bytes | None = None
            for stored in await self._store.find("intel", platform.name, at=at):
                try:
                    start, end = await self._check(stored.value, platform, at)
                except (Malformed, EvidenceError) as error:
                    self._log.warning(
                        "collateral_refused",
                        name=platform.name,
                        source=stored.origin,
                        why=error.message,
                    )
                    continue
                if at < start + (end - start) / 2:
                    return stored.value
                kept = stored.value
            try:
                document, end = await self._fetched(platform)
            except EndorsementsUnavailable as error:
                if kept is None:
                    raise
                self._log.info("collateral_not_refreshed", name=platform.name, why=error.message)
                return kept
            await self._store.put("intel", platform.name, document, expires=end)
            return document

    async def _fetched(self, platform: Platform) -> tuple[bytes, datetime.datetime]:
        what = f"collateral of {platform.name}"
        self._patience.spend(what)
        try:
            document = await self._fetch(platform)
            _, end = await self._check(document, platform, self._now())
        except (Malformed, EvidenceError) as error:
            raise EndorsementsUnavailable(
                f"{what}: Intel's answer is refused: {error.message}"
            ) from error
        return document, end

    async def _fetch(self, platform: Platform) -> bytes:
        tcb = await self._get(
            f"{self._url}/tdx/certification/v4/tcb?fmspc={platform.fmspc}", "TCB info"
        )
        qe = await self._get(f"{self._url}/tdx/certification/v4/qe/identity", "QE identity")
        pck_crl = await self._get(
            f"{self._url}/sgx/certification/v4/pckcrl?ca={platform.ca}&encoding=der",
            "list of revoked PCKs",
        )
        root_ca_crl = await self._root_crl()
        try:
            tcb_reply = msgspec.json.decode(tcb.body, type=_TcbReply)
            qe_reply = msgspec.json.decode(qe.body, type=_QeReply)
            return msgspec.json.encode(
                Collateral(
                    pck_crl_issuer_chain=_header(pck_crl.headers, _PCK_CRL_CHAIN),
                    root_ca_crl=_crl_der(root_ca_crl.body).hex(),
                    pck_crl=_crl_der(pck_crl.body).hex(),
                    tcb_info_issuer_chain=_header(tcb.headers, _TCB_CHAIN),
                    tcb_info=bytes(tcb_reply.tcb_info).decode(),
                    tcb_info_signature=tcb_reply.signature,
                    qe_identity_issuer_chain=_header(qe.headers, _QE_CHAIN),
                    qe_identity=bytes(qe_reply.enclave_identity).decode(),
                    qe_identity_signature=qe_reply.signature,
                )
            )
        except (msgspec.DecodeError, ValueError, RecursionError):
            raise Malformed("expected JSON as its API documents", field="collateral") from None

    async def _root_crl(self) -> Answer:
        """A PCCS has its own copy; Intel's PCS has none, its root says where the list is."""
        what = "list of revoked CAs"
        try:
            return await self._get(f"{self._url}/sgx/certification/v4/rootcacrl", what)
        except EndorsementsUnavailable:
            url = _distribution_point(self._root)
            if url is None:
                raise
            return await self._get(url, what)

    async def _get(self, url: str, what: str) -> Answer:
        return await self._vendors.get(
            url, what=what, seconds=self._seconds, max_bytes=max(_MAX_JSON_BYTES, MAX_CRL_BYTES)
        )

    async def _check(self, document: bytes, platform: Platform, at: datetime.datetime) -> Window:
        """Ten signatures are some milliseconds, so in a thread."""

        def check() -> Window:
            return authenticate_collateral(document, platform=platform, root=self._root, at=at)

        return await trio.to_thread.run_sync(check)


def _parse(document: bytes) -> Collateral:
    if len(document) > MAX_COLLATERAL_BYTES:
        raise Malformed("collateral: expected at most 1 MiB", field="collateral")
    try:
        return msgspec.json.decode(document, type=Collateral)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise Malformed(
            "collateral: expected JSON as Intel's tools exchange it", field="collateral"
        ) from None


def _leaf_of(
    pem: str, field: str, *, root: x509.Certificate, root_crl: bytes, at: datetime.datetime
) -> x509.Certificate:
    """The first certificate of a chain, once the chain holds and no CA of it was revoked.

    Intel's have two certificates, so the root's list covers all that can be revoked.
    """
    presented: Sequence[x509.Certificate] = chain.parse_pem_chain(pem.encode(), field=field)
    path = chain.authenticate_path(presented, roots=[root], at=at, what=field)
    if len(path) != 2:
        raise Unauthentic(f"{field}: expected a certificate that the root issued")
    if check_crl(root_crl, certificate=path[0], issuer=root, at=at).status is Revocation.REVOKED:
        raise Unauthentic(f"{field}: Intel revoked its signer")
    return path[0]


def _check_signed(
    text: str, signature: str, signer: x509.Certificate, field: str, at: datetime.datetime
) -> _Dates:
    """The dates of a document that `signer` signed: ECDSA on P-256 over SHA-256 of the text, r
    and s big-endian, 32 bytes each."""
    raw = decode_hex(signature.lower(), field=f"{field}_signature", length=_SIGNATURE_BYTES)
    half = _SIGNATURE_BYTES // 2
    der = encode_dss_signature(*(int.from_bytes(part, "big") for part in (raw[:half], raw[half:])))
    key = signer.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise Unauthentic(f"{field}: expected a signer with a key on P-256")
    try:
        key.verify(der, text.encode(), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise Unauthentic(f"{field}: expected the signature of its issuer") from None
    try:
        dates = msgspec.json.decode(text, type=_Dates)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise Malformed(f"{field}: expected issueDate and nextUpdate", field=field) from None
    if dates.issue_date.tzinfo is None or dates.next_update.tzinfo is None:
        raise Malformed(f"{field}: expected times with a zone", field=field)
    if not dates.issue_date <= at < dates.next_update:
        raise Stale(f"{field}: valid from {dates.issue_date} to {dates.next_update}, not at {at}")
    return dates


def _header(headers: Mapping[str, str], names: Sequence[str]) -> str:
    for name in names:
        if name in headers:
            return unquote(headers[name], errors="strict")
    raise Malformed(f"expected header {names[0]}", field=names[0])


def _crl_der(body: bytes) -> bytes:
    """Intel's PCS sends DER, or PEM where it does not know `encoding`; a PCCS hex of DER."""
    if body.startswith(b"-----BEGIN"):
        return x509.load_pem_x509_crl(body).public_bytes(Encoding.DER)
    if body[:2] == b"30":
        try:
            return binascii.unhexlify(body.strip())
        except binascii.Error:
            raise Malformed("CRL: expected hex", field="crl") from None
    return body


def _unhex(text: str, field: str) -> bytes:
    return decode_hex(text.lower(), field=field)


def _distribution_point(root: x509.Certificate) -> str | None:
    """Where a certificate says that its issuer's list is (RFC 5280 section 4.2.1.13)."""
    try:
        points = root.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    except x509.ExtensionNotFound:
        return None
    for point in points:
        for name in point.full_name or ():
            if isinstance(name, x509.UniformResourceIdentifier):
                return name.value
    return None
