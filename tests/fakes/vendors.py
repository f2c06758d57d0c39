"""Vendors' servers on loopback, speaking the vendors' protocols, honestly or not.

Each server is a real one: a socket, HTTP/1.1 through h11, its own task per connection. What it
answers is signed by authorities of the tests' own, or is a vendor-signed vector. How it misbehaves
is a `Fault`, set per server and changed at any time.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs, quote, urlsplit

import h11
import msgspec
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)
HOUR = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Request], Reply]


@dataclass
class Fault:
    """How the next answers go wrong.

    Attributes:
        statuses: sent instead of an answer, one per request, then the answers are right.
        headers: sent with those.
        silent: requests are read and never answered.
        drip: the answer comes one byte every this many seconds.
        endless: the body has no end and no announced length.
        garbage: what is sent is not HTTP.
        hang_up: connections are closed after the request, so many times.
    """

    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    silent: bool = False
    drip: float = 0.0
    endless: bool = False
    garbage: bool = False
    hang_up: int = 0


class VendorServer:
    """One server in a nursery of the test's. `connections` and `requests` are what it has seen."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.fault = Fault()
        self.connections = 0
        self.requests: list[Request] = []
        self.url = ""

    async def start(self, nursery: trio.Nursery, tls: ssl.SSLContext | None = None) -> VendorServer:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}" if tls is None else f"https://localhost:{port}"

        async def serve(stream: trio.SocketStream) -> None:
            self.connections += 1
            channel: trio.abc.Stream = stream
            if tls is not None:
                channel = trio.SSLStream(stream, tls, server_side=True)
            try:
                await self._serve(channel)
            except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
                pass
            finally:
                await trio.aclose_forcefully(stream)

        nursery.start_soon(trio.serve_listeners, serve, [listener])
        return self

    async def _serve(self, stream: trio.abc.Stream) -> None:
        connection = h11.Connection(h11.SERVER)
        while (request := await _receive(stream, connection)) is not None:
            self.requests.append(request)
            if self.fault.silent:
                await trio.sleep_forever()
            if self.fault.hang_up:
                self.fault.hang_up -= 1
                return
            if self.fault.garbage:
                await stream.send_all(
                    b"\x00\xff these are not the bytes you are looking for\r\n\r\n"
                )
                return
            await self._answer(stream, connection, request)
            if connection.our_state is not h11.DONE:
                return
            connection.start_next_cycle()

    async def _answer(
        self, stream: trio.abc.Stream, connection: h11.Connection, request: Request
    ) -> None:
        if self.fault.statuses:
            reply = Reply(b"no", self.fault.statuses.pop(0), self.fault.headers)
        else:
            reply = self.handler(request)
        headers = [(name, value) for name, value in reply.headers.items()]
        if not self.fault.endless:
            headers.append(("content-length", str(len(reply.body))))
        head = connection.send(h11.Response(status_code=reply.status, headers=headers, reason=b""))
        assert head is not None
        await stream.send_all(head)
        while self.fault.endless:
            chunk = connection.send(h11.Data(data=bytes(65536)))
            assert chunk is not None
            await stream.send_all(chunk)
        step = 1 if self.fault.drip else max(1, len(reply.body))
        for start in range(0, len(reply.body), step):
            await trio.sleep(self.fault.drip)
            chunk = connection.send(h11.Data(data=reply.body[start : start + step]))
            assert chunk is not None
            await stream.send_all(chunk)
        end = connection.send(h11.EndOfMessage())
        if end:
            await stream.send_all(end)


async def _receive(stream: trio.abc.Stream, connection: h11.Connection) -> Request | None:
    head: h11.Request | None = None
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some()))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            target = urlsplit(head.target.decode())
            query = {key: values[0] for key, values in parse_qs(target.query).items()}
            headers = {name.decode(): value.decode() for name, value in head.headers}
            return Request(head.method.decode(), target.path, query, headers, body)
        else:
            return None


# --- certificates ---------------------------------------------------------------------------------


@dataclass
class Issuer:
    """A CA and its key, to sign certificates, OCSP responses and CRLs."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

    def issue(
        self,
        common: str,
        *,
        now: datetime.datetime,
        key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
        ca: bool = False,
        purposes: tuple[x509.ObjectIdentifier, ...] = (),
        usage: x509.KeyUsage | None = None,
        lifetime: datetime.timedelta = 1000 * DAY,
        extensions: tuple[x509.ExtensionType, ...] = (),
        serial: int | None = None,
    ) -> Issuer:
        key = key or ec.generate_private_key(ec.SECP384R1())
        return _issue(common, key, self, now, ca, purposes, usage, lifetime, extensions, serial)


def root(
    common: str,
    *,
    now: datetime.datetime,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
    extensions: tuple[x509.ExtensionType, ...] = (),
) -> Issuer:
    key = key or ec.generate_private_key(ec.SECP384R1())
    return _issue(common, key, None, now, True, (), None, 10_000 * DAY, extensions, None)


def key_usage(**allowed: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _issue(
    common: str,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    issuer: Issuer | None,
    now: datetime.datetime,
    ca: bool,
    purposes: tuple[x509.ObjectIdentifier, ...],
    usage: x509.KeyUsage | None,
    lifetime: datetime.timedelta,
    extensions: tuple[x509.ExtensionType, ...],
    serial: int | None,
) -> Issuer:
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(common))
        .issuer_name(_name(common) if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(now - 100 * DAY)
        .not_valid_after(now + lifetime)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if usage is not None:
        builder = builder.add_extension(usage, critical=True)
    for one in extensions:
        builder = builder.add_extension(one, critical=False)
    signer: CertificateIssuerPrivateKeyTypes = key if issuer is None else issuer.key
    return Issuer(builder.sign(signer, hashes.SHA384(), rsa_padding=_pss(signer)), key)


def _pss(signer: CertificateIssuerPrivateKeyTypes) -> padding.PSS | None:
    """AMD signs with RSA-PSS; its salt is as long as the digest."""
    if isinstance(signer, rsa.RSAPrivateKey):
        return padding.PSS(padding.MGF1(hashes.SHA384()), hashes.SHA384.digest_size)
    return None


def make_crl(
    issuer: Issuer,
    *,
    now: datetime.datetime,
    revoked: Mapping[int, x509.ReasonFlags | None] | None = None,
    lifetime: datetime.timedelta = 30 * DAY,
    extensions: tuple[x509.ExtensionType, ...] = (),
) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(now - HOUR)
        .next_update(now + lifetime)
    )
    for serial, reason in (revoked or {}).items():
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - DAY)
        if reason is not None:
            entry = entry.add_extension(x509.CRLReason(reason), critical=False)
        builder = builder.add_revoked_certificate(entry.build())
    for one in extensions:
        builder = builder.add_extension(one, critical=True)
    crl = builder.sign(issuer.key, hashes.SHA384(), rsa_padding=_pss(issuer.key))
    return crl.public_bytes(Encoding.DER)


# --- NVIDIA ---------------------------------------------------------------------------------------


@dataclass
class RimService:
    """`GET /v1/rim/<id>`: the manifest in base64 and the SHA-256 of its bytes, in JSON."""

    documents: dict[str, bytes]
    damage: Callable[[dict[str, str]], dict[str, str]] = lambda reply: reply

    def __call__(self, request: Request) -> Reply:
        rim_id = request.path.removeprefix("/v1/rim/")
        document = self.documents.get(rim_id)
        if document is None or request.method != "GET":
            return Reply(b'{"message":"not found"}', 404)
        reply = {
            "id": rim_id,
            "rim": base64.b64encode(document).decode(),
            "sha256": hashlib.sha256(document).hexdigest(),
            "last_updated": "2026-04-30T03:33:17.102Z",
            "request_id": "00000000-0000-0000-0000-000000000000",
            "rim_format": "TCG",
        }
        body = msgspec.json.encode(self.damage(reply))
        return Reply(body, headers={"content-type": "application/json"})


@dataclass
class OcspResponder:
    """`POST /` with a DER request: answers for the CAs it was charged by, as NVIDIA's does: a
    delegate per CA, its certificate in the answer, the nonce in the response's extensions.

    Attributes:
        issuers: the CAs; of each the delegate is made on first use.
        revoked: serial numbers, with the reason if one is given.
        unknown: serial numbers it does not know.
        echo: what becomes of the nonce.
        purposes: of the delegates' certificates.
        forger: signs in place of the delegate.
        direct: the CA answers itself.
        encoding: how the signer is named.
        replayed: sent whatever is asked.
    """

    issuers: list[Issuer]
    now: Callable[[], datetime.datetime]
    revoked: dict[int, x509.ReasonFlags | None] = field(default_factory=dict)
    unknown: set[int] = field(default_factory=set)
    echo: Callable[[bytes], bytes | None] = lambda nonce: nonce
    purposes: tuple[x509.ObjectIdentifier, ...] = (ExtendedKeyUsageOID.OCSP_SIGNING,)
    lifetime: datetime.timedelta | None = DAY
    age: datetime.timedelta = datetime.timedelta()
    forger: Issuer | None = None
    direct: bool = False
    encoding: ocsp.OCSPResponderEncoding = ocsp.OCSPResponderEncoding.NAME
    replayed: bytes | None = None
    delegates: dict[bytes, Issuer] = field(default_factory=dict)

    def __call__(self, request: Request) -> Reply:
        assert request.headers["content-type"] == "application/ocsp-request"
        body = self.replayed or self.respond(request.body)
        return Reply(body, headers={"content-type": "application/ocsp-response"})

    def respond(self, request_der: bytes) -> bytes:
        asked = ocsp.load_der_ocsp_request(request_der)
        issuer = next((one for one in self.issuers if _named(asked, one)), None)
        if issuer is None:
            refusal = ocsp.OCSPResponseBuilder.build_unsuccessful(
                ocsp.OCSPResponseStatus.UNAUTHORIZED
            )
            return refusal.public_bytes(Encoding.DER)
        try:
            nonce = asked.extensions.get_extension_for_class(x509.OCSPNonce).value.nonce
        except x509.ExtensionNotFound:
            nonce = None
        return self.sign(asked, issuer, None if nonce is None else self.echo(nonce))

    def sign(self, asked: ocsp.OCSPRequest, issuer: Issuer, nonce: bytes | None) -> bytes:
        now = self.now() - self.age
        signer = issuer if self.direct else self.delegate_of(issuer)
        serial = asked.serial_number
        status = ocsp.OCSPCertStatus.GOOD
        if serial in self.revoked:
            status = ocsp.OCSPCertStatus.REVOKED
        elif serial in self.unknown:
            status = ocsp.OCSPCertStatus.UNKNOWN
        is_revoked = status is ocsp.OCSPCertStatus.REVOKED
        builder = (
            ocsp.OCSPResponseBuilder()
            .add_response_by_hash(
                issuer_name_hash=asked.issuer_name_hash,
                issuer_key_hash=asked.issuer_key_hash,
                serial_number=serial,
                algorithm=asked.hash_algorithm,
                cert_status=status,
                this_update=now,
                next_update=None if self.lifetime is None else now + self.lifetime,
                revocation_time=now - DAY if is_revoked else None,
                revocation_reason=self.revoked.get(serial) if is_revoked else None,
            )
            .responder_id(self.encoding, signer.certificate)
        )
        if not self.direct:
            builder = builder.certificates([signer.certificate])
        if nonce is not None:
            builder = builder.add_extension(x509.OCSPNonce(nonce), critical=False)
        response = builder.sign(signer.key, hashes.SHA384())
        der = response.public_bytes(Encoding.DER)
        return der if self.forger is None else _resigned(der, response, self.forger)

    def delegate_of(self, issuer: Issuer) -> Issuer:
        name = issuer.certificate.subject.public_bytes()
        if name not in self.delegates:
            self.delegates[name] = issuer.issue(
                "OCSP responder", now=self.now(), purposes=self.purposes
            )
        return self.delegates[name]


def _resigned(der: bytes, response: ocsp.OCSPResponse, forger: Issuer) -> bytes:
    """The same answer with another key's signature, of the same length so that the DER holds."""
    assert isinstance(forger.key, ec.EllipticCurvePrivateKey)
    forged = b""
    while len(forged) != len(response.signature):
        forged = forger.key.sign(response.tbs_response_bytes, ec.ECDSA(hashes.SHA384()))
    return der.replace(response.signature, forged)


def _named(asked: ocsp.OCSPRequest, issuer: Issuer) -> bool:
    """Whether the question is for this CA: the hashes of its name and of its key's bits."""
    key = issuer.certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    bits = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    name = issuer.certificate.subject.public_bytes()
    return (asked.issuer_name_hash, asked.issuer_key_hash) == tuple(
        hashlib.new(asked.hash_algorithm.name, data).digest() for data in (name, bits)
    )


# --- AMD ------------------------------------------------------------------------------------------

AMD_SVN_OIDS = {
    "blSPL": "1.3.6.1.4.1.3704.1.3.1",
    "teeSPL": "1.3.6.1.4.1.3704.1.3.2",
    "snpSPL": "1.3.6.1.4.1.3704.1.3.3",
    "ucodeSPL": "1.3.6.1.4.1.3704.1.3.8",
    "fmcSPL": "1.3.6.1.4.1.3704.1.3.9",
}


@dataclass
class AmdKds:
    """`/vcek/v1/<product>/<hwid>?…`, `…/crl`, and the metadata service's THIM.

    Attributes:
        certificates: by path and query; `cert_chain` too.
        crls: by path.
        thim: PEM of a VCEK, for the metadata service.
    """

    certificates: dict[tuple[str, tuple[tuple[str, str], ...]], bytes]
    crls: dict[str, bytes] = field(default_factory=dict)
    thim: bytes | None = None

    def __call__(self, request: Request) -> Reply:
        if request.path == "/metadata/THIM/amd/certification":
            if request.headers.get("metadata") != "true" or self.thim is None:
                return Reply(b"", 400)
            reply = {
                "vcekCert": self.thim.decode(),
                "tcbm": "DB16000000000004",
                "certificateChain": "",
                "cacheControl": "86400",
            }
            return Reply(msgspec.json.encode(reply))
        if request.path in self.crls:
            return Reply(self.crls[request.path])
        der = self.certificates.get((request.path, tuple(sorted(request.query.items()))))
        return Reply(b"", 404) if der is None else Reply(der)


def vek_extensions(
    hwid: bytes, svns: Mapping[str, int], *, product: str
) -> tuple[x509.ExtensionType, ...]:
    """57230 table 8, as DER."""

    def unrecognized(oid: str, value: bytes) -> x509.ExtensionType:
        return x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)

    integers = tuple(
        unrecognized(AMD_SVN_OIDS[name], b"\x02\x01" + bytes((svn,)))
        if svn < 0x80
        else unrecognized(AMD_SVN_OIDS[name], b"\x02\x02\x00" + bytes((svn,)))
        for name, svn in svns.items()
    )
    name = product.encode()
    return (
        *integers,
        unrecognized("1.3.6.1.4.1.3704.1.2", b"\x16" + bytes((len(name),)) + name),
        unrecognized("1.3.6.1.4.1.3704.1.4", hwid),
    )


# --- Intel ----------------------------------------------------------------------------------------


@dataclass
class IntelPcs:
    """Version 4's requests, answered out of one collateral as Intel's tools exchange it.

    Attributes:
        fmspc, ca: of the platforms it knows; others are 404.
        caching: as a PCCS: it serves the root's list, and lists are hex.
    """

    collateral: dict[str, str]
    fmspc: str
    ca: str = "platform"
    caching: bool = False

    def __call__(self, request: Request) -> Reply:
        collateral = self.collateral
        path = request.path
        if path == "/tdx/certification/v4/tcb" and request.query == {"fmspc": self.fmspc}:
            return self._document(
                "tcbInfo", "tcb_info", {"TCB-Info-Issuer-Chain": "tcb_info_issuer_chain"}
            )
        if path == "/tdx/certification/v4/qe/identity":
            return self._document(
                "enclaveIdentity",
                "qe_identity",
                {"SGX-Enclave-Identity-Issuer-Chain": "qe_identity_issuer_chain"},
            )
        if path == "/sgx/certification/v4/pckcrl" and request.query.get("ca") == self.ca:
            headers = {"SGX-PCK-CRL-Issuer-Chain": quote(collateral["pck_crl_issuer_chain"])}
            return Reply(self._list("pck_crl"), headers=headers)
        if path == "/sgx/certification/v4/rootcacrl" and self.caching:
            return Reply(self._list("root_ca_crl"))
        if path == "/IntelSGXRootCA.der" and not self.caching:
            return Reply(bytes.fromhex(collateral["root_ca_crl"]))
        return Reply(b"", 404)

    def _list(self, name: str) -> bytes:
        text = self.collateral[name]
        return text.encode() if self.caching else bytes.fromhex(text)

    def _document(self, member: str, name: str, chain: Mapping[str, str]) -> Reply:
        # Intel's own text between the braces: what was signed is what is sent.
        body = f'{{"{member}":{self.collateral[name]},"signature":"{self.collateral[name + "_signature"]}"}}'
        headers = {header: quote(self.collateral[key]) for header, key in chain.items()}
        return Reply(body.encode(), headers=headers)
