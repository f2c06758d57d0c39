"""What vendors vouch for, fetched from servers on loopback that speak the vendors' protocols."""

from __future__ import annotations

import base64
import datetime
import json
import os
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import dcap_qvl  # type: ignore[import-untyped]
import msgspec
import pytest
import structlog
import trio
import trustme
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from structlog.testing import capture_logs

from appliance.config import Attestation
from appliance.credentials import Secret, VendorKeys
from appliance.endorsements.amd_kds import AmdChip, AmdSource
from appliance.endorsements.anchors import load_anchors
from appliance.endorsements.collect import Endorsements, service_keys
from appliance.endorsements.http import Offline, ServiceKey, VendorClient, Vendors
from appliance.endorsements.intel_pcs import (
    Collateral,
    IntelSource,
    Platform,
    authenticate_collateral,
    platform_of,
)
from appliance.endorsements.nvidia_rim import RimSource
from appliance.endorsements.ocsp import OcspSource
from appliance.endorsements.store import EndorsementStore
from appliance.errors import EndorsementsUnavailable, Malformed, Stale, Unauthentic
from appliance.rats import chain
from appliance.rats.model import AmdRoots, Anchors
from appliance.rats.result import Tier
from appliance.rats.revocation import Revocation, check_ocsp, device_part, revocation_findings
from appliance.rats.schemes.nvidia_gpu import authenticate_rim
from appliance.rats.schemes.sev_snp import load_vek
from appliance.wire.evidence import CpuEvidence, GpuEvidence
from tests.fakes.vendors import (
    DAY,
    HOUR,
    AmdKds,
    IntelPcs,
    Issuer,
    OcspResponder,
    Reply,
    Request,
    RimService,
    VendorServer,
    make_crl,
    root,
    vek_extensions,
)
from tests.vectors_dir import VECTORS, needs_vectors

START = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)
SECONDS = 5.0
RIM_ID = "NV_GPU_DRIVER_GH100_595.71.05"


class Clock:
    """The wall clock of a test."""

    def __init__(self, now: datetime.datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime.datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> EndorsementStore:
    return EndorsementStore(tmp_path / "endorsements", log=structlog.get_logger())


def cached(tmp_path: Path) -> list[str]:
    folder = tmp_path / "endorsements" / "cache"
    return sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file())


def anything(request: Request) -> Reply:
    return Reply(b"an answer")


# --- one question ---------------------------------------------------------------------------------


async def ask(
    server: VendorServer, *, seconds: float = SECONDS, max_bytes: int = 100, path: str = "/secret/x"
) -> bytes:
    async with VendorClient() as client:
        url = server.url + path
        answer = await client.get(url, what="a thing", seconds=seconds, max_bytes=max_bytes)
        return answer.body


async def test_an_answer_is_read_whole(nursery: trio.Nursery) -> None:
    server = await VendorServer(anything).start(nursery)
    assert await ask(server) == b"an answer"
    (request,) = server.requests
    assert (request.headers["user-agent"], request.headers["accept-encoding"]) == (
        "dcv",
        "identity",
    )


async def test_tls_is_verified_against_the_authority_that_is_given(nursery: trio.Nursery) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    server = await VendorServer(anything).start(nursery, context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with VendorClient(tls=trusting) as client:
        answer = await client.get(server.url, what="x", seconds=SECONDS, max_bytes=100)
    assert answer.body == b"an answer"
    with pytest.raises(EndorsementsUnavailable, match="cannot be asked"):
        await ask(server)
    assert len(server.requests) == 1


KEY = "nvapi-CANARY"


async def tls_servers(nursery: trio.Nursery) -> tuple[ssl.SSLContext, VendorServer, VendorServer]:
    """Two that a client can believe, at different ports, and how."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    first = await VendorServer(anything).start(nursery, context)
    return trusting, first, await VendorServer(anything).start(nursery, context)


async def test_a_service_gets_its_key_and_nobody_else_does(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    trusting, service, other = await tls_servers(nursery)
    plain = await VendorServer(anything).start(nursery)
    keys = [
        ServiceKey(service.url + "/v1/rim", "authorization", Secret(f"Bearer {KEY}")),
        # A configuration with this URL is refused; the client would not send it either.
        ServiceKey(plain.url, "authorization", Secret(f"Bearer {KEY}")),
    ]
    async with VendorClient(tls=trusting, keys=keys) as client:
        for url in (service.url + "/v1/rim/x", other.url, plain.url):
            await client.get(url, what="x", seconds=SECONDS, max_bytes=100)
        await client.post(
            service.url, b"", what="x", seconds=SECONDS, max_bytes=100, type="text/plain"
        )
        service.fault.statuses = [307]
        service.fault.headers = {"location": other.url}
        with pytest.raises(EndorsementsUnavailable) as caught:
            await client.get(service.url, what="x", seconds=SECONDS, max_bytes=100)
    assert [one.headers.get("authorization") for one in service.requests] == [f"Bearer {KEY}"] * 3
    assert not any(KEY in repr(one) for one in (*other.requests, *plain.requests))
    assert KEY not in str(caught.value)
    assert KEY not in repr(keys)
    assert KEY not in caplog.text


def test_each_vendor_gets_its_own_key_in_its_own_header() -> None:
    settings = Attestation(cpu="tdx")
    keys = VendorKeys(nvidia=Secret(KEY), intel=Secret("subscription"))
    sent = [(one.url, one.header, one.value.reveal()) for one in service_keys(settings, keys)]
    assert sent == [
        (settings.rim_url, "authorization", f"Bearer {KEY}"),
        (settings.ocsp_url, "authorization", f"Bearer {KEY}"),
        (settings.pcs_url, "ocp-apim-subscription-key", "subscription"),
    ]
    assert service_keys(settings, VendorKeys()) == []


async def test_no_environment_variable_changes_what_is_asked(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await VendorServer(anything).start(nursery)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv(name.lower(), proxy.url)
    server = await VendorServer(anything).start(nursery)
    assert await ask(server) == b"an answer"
    assert proxy.connections == 0


@pytest.mark.parametrize("fault", ["silent", "drip"])
async def test_a_slow_server_costs_no_more_than_the_time_given(
    nursery: trio.Nursery, fault: str
) -> None:
    server = await VendorServer(anything).start(nursery)
    if fault == "silent":
        server.fault.silent = True
    else:
        server.fault.drip = 0.2
    start = trio.current_time()
    with pytest.raises(EndorsementsUnavailable, match=r"a thing: 127\.0\.0\.1 gave no answer in"):
        await ask(server, seconds=0.5)
    assert 0.4 < trio.current_time() - start < 2


@pytest.mark.parametrize("endless", [False, True])
async def test_an_answer_over_the_bound_is_not_read_further(
    nursery: trio.Nursery, endless: bool
) -> None:
    server = await VendorServer(lambda _: Reply(bytes(1 << 20))).start(nursery)
    server.fault.endless = endless
    with pytest.raises(EndorsementsUnavailable, match="more than 100 bytes"):
        await ask(server)
    assert len(server.requests) == 1


async def test_a_redirect_is_not_followed(nursery: trio.Nursery) -> None:
    elsewhere = await VendorServer(anything).start(nursery)
    server = await VendorServer(
        lambda _: Reply(b"", 302, {"location": elsewhere.url + "/x"})
    ).start(nursery)
    with pytest.raises(EndorsementsUnavailable, match="sends elsewhere"):
        await ask(server)
    assert elsewhere.connections == 0


async def test_a_compressed_answer_is_refused(nursery: trio.Nursery) -> None:
    server = await VendorServer(
        lambda _: Reply(b"\x1f\x8b", headers={"content-encoding": "gzip"})
    ).start(nursery)
    with pytest.raises(EndorsementsUnavailable, match="compressed"):
        await ask(server)


@pytest.mark.parametrize("statuses", [[500], [503, 502], [429, 500]])
async def test_a_passing_failure_is_asked_again(nursery: trio.Nursery, statuses: list[int]) -> None:
    server = await VendorServer(anything).start(nursery)
    server.fault.statuses = list(statuses)
    assert await ask(server) == b"an answer"
    assert len(server.requests) == 1 + len(statuses)


async def test_a_lasting_failure_is_asked_three_times(nursery: trio.Nursery) -> None:
    server = await VendorServer(anything).start(nursery)
    server.fault.statuses = [500] * 10
    with pytest.raises(EndorsementsUnavailable, match="answered 500"):
        await ask(server)
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
async def test_a_refusal_is_not_asked_again(nursery: trio.Nursery, status: int) -> None:
    server = await VendorServer(anything).start(nursery)
    server.fault.statuses = [status] * 10
    with pytest.raises(EndorsementsUnavailable):
        await ask(server)
    assert len(server.requests) == 1


async def test_a_broken_connection_is_asked_again(nursery: trio.Nursery) -> None:
    server = await VendorServer(anything).start(nursery)
    server.fault.hang_up = 2
    assert await ask(server) == b"an answer"


async def test_garbage_is_no_answer(nursery: trio.Nursery) -> None:
    server = await VendorServer(anything).start(nursery)
    server.fault.garbage = True
    with pytest.raises(EndorsementsUnavailable, match="cannot be asked"):
        await ask(server)


async def test_retry_after_is_waited_for_when_the_time_allows_it(nursery: trio.Nursery) -> None:
    server = await VendorServer(anything).start(nursery)
    server.fault.statuses, server.fault.headers = [429], {"retry-after": "1"}
    start = trio.current_time()
    assert await ask(server) == b"an answer"
    assert trio.current_time() - start >= 1


@pytest.mark.parametrize("wish", ["3600", "999999999", "Fri, 31 Dec 9999 23:59:59 GMT"])
async def test_a_longer_retry_after_is_passed_on_and_not_waited_for(
    nursery: trio.Nursery, wish: str
) -> None:
    server = await VendorServer(anything).start(nursery)
    server.fault.statuses, server.fault.headers = [429] * 3, {"retry-after": wish}
    start = trio.current_time()
    with pytest.raises(EndorsementsUnavailable, match="answered 429") as caught:
        await ask(server)
    assert caught.value.retry_after_s == 3600
    assert trio.current_time() - start < 1
    assert len(server.requests) == 1


@pytest.mark.parametrize("wish", ["soon", "-1", "1.5", "Fri, 31 Dec", "9" * 5000])
async def test_a_retry_after_that_is_none_is_passed_over(nursery: trio.Nursery, wish: str) -> None:
    server = await VendorServer(anything).start(nursery)
    server.fault.statuses = [503]
    server.fault.headers = {"retry-after": wish}
    assert await ask(server) == b"an answer"


async def test_messages_name_the_thing_and_the_host_and_nothing_of_the_path(
    nursery: trio.Nursery,
) -> None:
    server = await VendorServer(anything).start(nursery)
    for fault in ([500] * 3, [404], [302], [418]):
        server.fault.statuses = list(fault)
        with pytest.raises(EndorsementsUnavailable) as caught:
            await ask(server, path="/secret/x?token=secret")
        assert caught.value.message.startswith("a thing: 127.0.0.1 ")
        assert "secret" not in caught.value.message


@pytest.mark.parametrize("url", ["", "x", "ftp://localhost/", "http://", "http://[", "http://a b/"])
async def test_a_url_that_is_none_is_named(url: str) -> None:
    async with VendorClient() as client:
        with pytest.raises(EndorsementsUnavailable, match="a thing"):
            await client.get(url, what="a thing", seconds=1, max_bytes=1)


# --- NVIDIA's reference values --------------------------------------------------------------------


@dataclass
class Signer:
    """Signs documents in a form of the tests' own; `authenticate` is what boot hands over."""

    root: Issuer
    leaf: Issuer

    def sign(self, body: str) -> bytes:
        assert isinstance(self.leaf.key, ec.EllipticCurvePrivateKey)
        signature = self.leaf.key.sign(body.encode(), ec.ECDSA(hashes.SHA384()))
        pem = self.leaf.certificate.public_bytes(Encoding.PEM)
        return json.dumps([body, base64.b64encode(signature).decode(), pem.decode()]).encode()

    def authenticate(self, document: bytes, at: datetime.datetime) -> Sequence[x509.Certificate]:
        try:
            body, signature, pem = json.loads(document)
        except ValueError:
            raise Malformed("document: expected JSON") from None
        presented = chain.parse_pem_chain(pem.encode(), field="chain")
        key = presented[0].public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        try:
            key.verify(base64.b64decode(signature), body.encode(), ec.ECDSA(hashes.SHA384()))
        except InvalidSignature:
            raise Unauthentic("document: expected its signature") from None
        return chain.authenticate_path(
            presented, roots=[self.root.certificate], at=at, what="document"
        )


@pytest.fixture(scope="module")
def rim_root() -> Issuer:
    return root("RIM root", now=START)


def signer(rim_root: Issuer, lifetime: datetime.timedelta = 700 * DAY) -> Signer:
    return Signer(rim_root, rim_root.issue("RIM signer", now=START, lifetime=lifetime))


def rim_source(
    store: EndorsementStore,
    vendors: Vendors,
    url: str,
    by: Signer,
    clock: Clock,
    *,
    folders: Sequence[Path] = (),
    patience_s: float = 0.0,
) -> RimSource:
    return RimSource(
        folders=folders,
        store=store,
        vendors=vendors,
        url=url + "/v1/rim",
        authenticate=by.authenticate,
        seconds=SECONDS,
        now=clock,
        log=structlog.get_logger(),
        patience_s=patience_s,
    )


async def test_a_manifest_is_fetched_once(
    nursery: trio.Nursery,
    store: EndorsementStore,
    clock: Clock,
    rim_root: Issuer,
    tmp_path: Path,
) -> None:
    by = signer(rim_root)
    server = await VendorServer(RimService({RIM_ID: by.sign("values")})).start(nursery)
    async with VendorClient() as client:
        for _ in range(2):
            rim = await rim_source(store, client, server.url, by, clock).find(RIM_ID)
            assert json.loads(rim.document)[0] == "values"
            assert [one.subject.rfc4514_string() for one in rim.signer] == [
                "CN=RIM signer",
                "CN=RIM root",
            ]
    assert len(server.requests) == 1
    assert cached(tmp_path) == [f"rim/{RIM_ID}.entry"]
    offline = await rim_source(store, Offline(), "", by, clock).find(RIM_ID)
    assert offline == rim


async def test_a_manifest_of_the_image_is_not_asked_for(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, rim_root: Issuer, tmp_path: Path
) -> None:
    by = signer(rim_root)
    (tmp_path / f"{RIM_ID}.xml").write_bytes(by.sign("baked"))
    server = await VendorServer(RimService({})).start(nursery)
    async with VendorClient() as client:
        source = rim_source(store, client, server.url, by, clock, folders=[tmp_path])
        rim = await source.find(RIM_ID)
    assert json.loads(rim.document)[0] == "baked"
    assert server.connections == 0


async def test_a_manifest_that_another_signed_is_neither_used_nor_kept(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, rim_root: Issuer, tmp_path: Path
) -> None:
    by, stranger = signer(rim_root), signer(root("RIM root", now=START))
    server = await VendorServer(RimService({RIM_ID: stranger.sign("values")})).start(nursery)
    async with VendorClient() as client:
        source = rim_source(store, client, server.url, by, clock)
        with pytest.raises(EndorsementsUnavailable, match="document is refused"):
            await source.find(RIM_ID)
    assert cached(tmp_path) == []
    # Neither from the operator's folder nor from the image's.
    for folder in (tmp_path, tmp_path / "endorsements" / "rim"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{RIM_ID}.xml").write_bytes(stranger.sign("values"))
    source = rim_source(store, Offline(), "", by, clock, folders=[tmp_path])
    with capture_logs() as lines, pytest.raises(EndorsementsUnavailable):
        await source.find(RIM_ID)
    assert [line["event"] for line in lines] == ["rim_refused", "rim_refused"]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ({"id": "NV_GPU_DRIVER_GH100_1"}, "another one"),
        ({"sha256": "00" * 32}, "damaged"),
        ({"rim": "!"}, "not what it documents"),
        ({"rim": 5}, "not what it documents"),
        ({"rim": None}, "not what it documents"),
    ],
)
async def test_an_answer_unlike_the_services_is_refused(
    nursery: trio.Nursery,
    store: EndorsementStore,
    clock: Clock,
    rim_root: Issuer,
    tmp_path: Path,
    damage: dict[str, str],
    why: str,
) -> None:
    by = signer(rim_root)
    service = RimService({RIM_ID: by.sign("values")}, damage=lambda reply: reply | damage)
    server = await VendorServer(service).start(nursery)
    async with VendorClient() as client:
        with pytest.raises(EndorsementsUnavailable, match=why):
            await rim_source(store, client, server.url, by, clock).find(RIM_ID)
    assert cached(tmp_path) == []


@pytest.mark.parametrize("body", [b"", b"[]", b"[" * 100_000, b"\xff", b"<html>", b"null"])
async def test_an_answer_that_is_no_object_is_refused(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, rim_root: Issuer, body: bytes
) -> None:
    server = await VendorServer(lambda _: Reply(body)).start(nursery)
    async with VendorClient() as client:
        source = rim_source(store, client, server.url, signer(rim_root), clock)
        with pytest.raises(EndorsementsUnavailable, match="not what it documents"):
            await source.find(RIM_ID)


async def test_an_id_that_is_a_path_is_never_asked_for(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, rim_root: Issuer
) -> None:
    server = await VendorServer(RimService({})).start(nursery)
    async with VendorClient() as client:
        source = rim_source(store, client, server.url, signer(rim_root), clock)
        for bad in ("../../admin", "a?b", "a b", "x" * 500):
            with pytest.raises(Malformed):
                await source.find(bad)
    assert server.connections == 0


async def test_a_signer_about_to_expire_is_an_alarm_and_replaced_when_there_is_a_newer(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, rim_root: Issuer, tmp_path: Path
) -> None:
    old, new = signer(rim_root, 20 * DAY), signer(rim_root, 800 * DAY)
    (tmp_path / f"{RIM_ID}.xml").write_bytes(old.sign("old"))
    service = RimService({})
    server = await VendorServer(service).start(nursery)
    async with VendorClient() as client:
        source = rim_source(store, client, server.url, old, clock, folders=[tmp_path])
        # 1. Nothing newer: the old one does, and the log says until when.
        with capture_logs() as lines:
            for _ in range(2):
                assert json.loads((await source.find(RIM_ID)).document)[0] == "old"
        alarms = [line for line in lines if line["event"] == "rim_expires"]
        assert [alarm["expires"] for alarm in alarms] == ["2026-06-21T12:00:00+00:00"]
        # 2. A newer one.
        service.documents[RIM_ID] = new.sign("new")
        with capture_logs() as lines:
            assert json.loads((await source.find(RIM_ID)).document)[0] == "new"
        assert [line["event"] for line in lines] == ["rim_fetched"]
        # 3. And no further question.
        before = len(server.requests)
        await source.find(RIM_ID)
        assert len(server.requests) == before


async def test_an_expired_manifest_is_the_last_resort_and_says_so(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, rim_root: Issuer, tmp_path: Path
) -> None:
    old = signer(rim_root, 20 * DAY)
    (tmp_path / f"{RIM_ID}.xml").write_bytes(old.sign("old"))
    clock.now += 21 * DAY
    source = rim_source(store, Offline(), "", old, clock, folders=[tmp_path])
    with capture_logs() as lines:
        rim = await source.find(RIM_ID)
    assert (rim.signer, rim.expires) == ((), None)
    assert "rim_expires" in [line["event"] for line in lines]
    # The service has the same expired one: it is not kept.
    server = await VendorServer(RimService({RIM_ID: old.sign("old")})).start(nursery)
    async with VendorClient() as client:
        rim = await rim_source(store, client, server.url, old, clock).find(RIM_ID)
    assert rim.signer == ()
    assert cached(tmp_path) == []


async def test_the_same_thing_is_not_asked_for_again_at_once(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, rim_root: Issuer
) -> None:
    server = await VendorServer(RimService({})).start(nursery)
    async with VendorClient() as client:
        source = rim_source(store, client, server.url, signer(rim_root), clock, patience_s=3600)
        for why in ("does not have it", "asked less than 3600 s ago"):
            with pytest.raises(EndorsementsUnavailable, match=why):
                await source.find(RIM_ID)
    assert len(server.requests) == 1


async def test_freshness_is_kept_in_the_background(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, rim_root: Issuer, tmp_path: Path
) -> None:
    by = signer(rim_root)
    service = RimService({})
    server = await VendorServer(service).start(nursery)
    async with VendorClient() as client, trio.open_nursery() as inner:
        source = rim_source(store, client, server.url, by, clock)

        async def keep_fresh() -> None:
            await source.keep_fresh([RIM_ID], every_s=0.02)

        inner.start_soon(keep_fresh)
        with trio.fail_after(SECONDS):
            while len(server.requests) < 2:  # what is missing is looked for again
                await trio.sleep(0.01)
            service.documents[RIM_ID] = by.sign("values")
            while not cached(tmp_path):
                await trio.sleep(0.01)
        inner.cancel_scope.cancel()


@needs_vectors
async def test_nvidias_own_manifest_is_fetched_checked_and_kept(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, tmp_path: Path
) -> None:
    folder = VECTORS / "nvidia"
    genuine = (folder / "h100_595.71.05" / f"{RIM_ID}.xml").read_bytes()
    forged = (folder / "rims" / "incorrect_signature_driver_rim.xml").read_bytes()
    anchors = load_anchors()

    def authenticate(document: bytes, at: datetime.datetime) -> Sequence[x509.Certificate]:
        return authenticate_rim(document, root=anchors.nvidia_rim, at=at).path

    service = RimService({RIM_ID: genuine, "forged": forged})
    server = await VendorServer(service).start(nursery)
    async with VendorClient() as client:
        source = RimSource(
            folders=[],
            store=store,
            vendors=client,
            url=server.url + "/v1/rim",
            authenticate=authenticate,
            seconds=SECONDS,
            now=clock,
            log=structlog.get_logger(),
        )
        rim = await source.find(RIM_ID)
        assert rim.document == genuine
        assert rim.expires is not None
        assert rim.expires.date() == datetime.date(2028, 4, 23)
        with pytest.raises(EndorsementsUnavailable, match="document is refused"):
            await source.find("forged")
    assert cached(tmp_path) == [f"rim/{RIM_ID}.entry"]


# --- revocation -----------------------------------------------------------------------------------


@dataclass
class Device:
    """A device's path, and everybody who issued something in it."""

    issuers: list[Issuer]
    path: tuple[x509.Certificate, ...]

    @property
    def questions(self) -> list[tuple[x509.Certificate, x509.Certificate]]:
        return list(zip(*device_part(self.path), strict=True))


@pytest.fixture(scope="module")
def device() -> Device:
    top = root("Device CA", now=START)
    identity = top.issue("Identity", now=START, ca=True)
    ica = identity.issue("Provisioner ICA", now=START, ca=True)
    brom = ica.issue("GSP BROM", now=START, ca=True)
    leaf = brom.issue("GSP FMC", now=START)
    issuers = [brom, ica, identity, top]
    return Device(issuers, tuple(one.certificate for one in (leaf, *issuers)))


def ocsp_source(
    store: EndorsementStore, vendors: Vendors, url: str, clock: Clock, seconds: float = SECONDS
) -> OcspSource:
    return OcspSource(
        store=store,
        vendors=vendors,
        url=url,
        seconds=seconds,
        now=clock,
        log=structlog.get_logger(),
        patience_s=0.0,
    )


def statuses(device: Device, answers: dict[str, bytes], clock: Clock) -> list[Revocation]:
    return [
        check_ocsp(
            answers[chain.sha256_of(certificate)],
            certificate=certificate,
            issuer=issuer,
            at=clock(),
            nonce=None,
        ).status
        for certificate, issuer in device.questions
        if chain.sha256_of(certificate) in answers
    ]


async def test_answers_are_asked_for_once_and_kept_by_certificate(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, device: Device, tmp_path: Path
) -> None:
    server = await VendorServer(OcspResponder(device.issuers, clock)).start(nursery)
    async with VendorClient() as client:
        source = ocsp_source(store, client, server.url, clock)
        first = await source.answers(device.questions + device.questions)
        assert statuses(device, first, clock) == [Revocation.GOOD] * 3
        assert await source.answers(device.questions) == first
    assert len(server.requests) == 3
    assert {request.method for request in server.requests} == {"POST"}
    names = sorted(f"ocsp/{digest}.entry" for digest in first)
    assert cached(tmp_path) == names
    assert await ocsp_source(store, Offline(), "", clock).answers(device.questions) == first


async def test_an_answer_is_asked_for_again_after_half_of_its_life_and_used_for_all_of_it(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, device: Device
) -> None:
    server = await VendorServer(OcspResponder(device.issuers, clock)).start(nursery)
    async with VendorClient() as client:
        source = ocsp_source(store, client, server.url, clock)
        first = await source.answers(device.questions)
        clock.now = START + 11 * HOUR
        assert await source.answers(device.questions) == first
        assert len(server.requests) == 3
        clock.now = START + 13 * HOUR
        second = await source.answers(device.questions)
        assert len(server.requests) == 6
        assert not set(second.values()) & set(first.values())
        # The responder is gone: what was kept does until it lapses.
        server.fault.statuses = [404] * 100
        clock.now = START + 30 * HOUR
        assert await source.answers(device.questions) == second
        clock.now = START + 38 * HOUR
        assert await source.answers(device.questions) == {}


@pytest.mark.parametrize(
    "reason", [x509.ReasonFlags.key_compromise, x509.ReasonFlags.certificate_hold]
)
async def test_a_bad_answer_is_handed_on_and_not_kept(
    nursery: trio.Nursery,
    store: EndorsementStore,
    clock: Clock,
    device: Device,
    tmp_path: Path,
    reason: x509.ReasonFlags,
) -> None:
    responder = OcspResponder(device.issuers, clock)
    responder.revoked[device.path[1].serial_number] = reason
    responder.unknown.add(device.path[2].serial_number)
    server = await VendorServer(responder).start(nursery)
    async with VendorClient() as client:
        answers = await ocsp_source(store, client, server.url, clock).answers(device.questions)
    said = [Revocation.REVOKED, Revocation.UNKNOWN, Revocation.GOOD]
    assert statuses(device, answers, clock) == said
    assert len(cached(tmp_path)) == 1
    findings = revocation_findings(
        device.path[1:-1], answers.values(), device.path[2:], "warn", clock()
    )
    assert [one.tier for one in findings] == [Tier.CONTRAINDICATED, Tier.WARNING]


@pytest.mark.parametrize(
    "spoil",
    [
        "replayed",
        "no nonce",
        "stale",
        "from the future",
        "wrong purpose",
        "forged",
        "other cas",
        "garbage",
        "oversized",
        "status",
        "html",
    ],
)
async def test_an_answer_that_does_not_hold_is_missing_and_not_kept(
    nursery: trio.Nursery,
    store: EndorsementStore,
    clock: Clock,
    device: Device,
    tmp_path: Path,
    spoil: str,
) -> None:
    responder = OcspResponder(device.issuers, clock)
    server = await VendorServer(responder).start(nursery)
    if spoil == "replayed":
        # A genuine answer of a minute ago about the same certificate, with its nonce.
        async with VendorClient() as client:
            other = EndorsementStore(tmp_path / "other", log=structlog.get_logger())
            (genuine,) = (
                await ocsp_source(other, client, server.url, clock).answers(device.questions[:1])
            ).values()
        responder.replayed = genuine
    elif spoil == "no nonce":
        responder.echo = lambda _: None
    elif spoil == "stale":
        responder.age = 2 * DAY
    elif spoil == "from the future":
        responder.age = -HOUR
    elif spoil == "wrong purpose":
        responder.purposes = (ExtendedKeyUsageOID.SERVER_AUTH,)
    elif spoil == "forged":
        responder.forger = root("Device CA", now=START)
    elif spoil == "other cas":
        responder.issuers = []
    elif spoil == "garbage":
        server.fault.garbage = True
    elif spoil == "oversized":
        server.fault.endless = True
    elif spoil == "status":
        server.fault.statuses = [403] * 10
    else:
        server.handler = lambda _: Reply(b"<html>login</html>")
    async with VendorClient() as client:
        source = ocsp_source(store, client, server.url, clock)
        assert await source.answers(device.questions[:1]) == {}
    assert cached(tmp_path) == []


async def test_a_hanging_responder_costs_a_few_deadlines_not_one_per_certificate(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock
) -> None:
    top = root("CA", now=START)
    questions = [
        (top.issue(f"c{number}", now=START).certificate, top.certificate) for number in range(9)
    ]
    server = await VendorServer(anything).start(nursery)
    server.fault.silent = True
    start = trio.current_time()
    async with VendorClient() as client:
        source = ocsp_source(store, client, server.url, clock, seconds=0.3)
        assert await source.answers(questions) == {}
    assert trio.current_time() - start < 1.8  # three rounds of four, not nine


async def test_an_answer_the_operator_put_there_is_used_until_it_lapses(
    store: EndorsementStore, clock: Clock, device: Device, nursery: trio.Nursery, tmp_path: Path
) -> None:
    responder = OcspResponder(device.issuers, clock)
    server = await VendorServer(responder).start(nursery)
    async with VendorClient() as client:
        other = EndorsementStore(tmp_path / "other", log=structlog.get_logger())
        answers = await ocsp_source(other, client, server.url, clock).answers(device.questions)
    folder = tmp_path / "endorsements" / "ocsp"
    folder.mkdir(parents=True)
    for digest, answer in answers.items():
        (folder / f"{digest}.der").write_bytes(answer)
    offline = ocsp_source(store, Offline(), "", clock)
    assert await offline.answers(device.questions) == answers
    clock.now += DAY
    assert await offline.answers(device.questions) == {}


# --- AMD ------------------------------------------------------------------------------------------


@dataclass
class Amd:
    """A product line of the tests' own, shaped as AMD's: RSA-PSS above, P-384 below."""

    ark: Issuer
    ask: Issuer
    asvk: Issuer

    def roots(self, product: str = "Milan") -> AmdRoots:
        return AmdRoots(product, self.ark.certificate, self.ask.certificate, self.asvk.certificate)

    def vcek(self, chip: AmdChip, *, by: Issuer | None = None) -> bytes:
        extensions = vek_extensions(chip.hwid, chip.svns(), product=chip.product + "-B0")
        made = (by or self.ask).issue("SEV-VCEK", now=START, extensions=extensions)
        return chain.der_of(made.certificate)


@pytest.fixture(scope="module")
def amd() -> Amd:
    keys = [rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(3)]
    ark = root("ARK-Milan", now=START, key=keys[0])
    ask_ = ark.issue("SEV-Milan", now=START, ca=True, key=keys[1])
    asvk = ark.issue("SEV-VLEK-Milan", now=START, ca=True, key=keys[2])
    return Amd(ark, ask_, asvk)


CHIP = AmdChip("Milan", bytes(range(1, 65)), bootloader=4, tee=0, snp=24, microcode=217)
QUERY = {"blSPL": "04", "teeSPL": "00", "snpSPL": "24", "ucodeSPL": "217"}


def kds(amd: Amd, chip: AmdChip, der: bytes, query: dict[str, str]) -> AmdKds:
    path = f"/vcek/v1/{chip.product}/{chip.hwid.hex()}"
    return AmdKds(
        {(path, tuple(sorted(query.items()))): der},
        crls={f"/vcek/v1/{chip.product}/crl": make_crl(amd.ark, now=START)},
    )


def amd_source(
    store: EndorsementStore, vendors: Vendors, url: str, roots: AmdRoots, clock: Clock
) -> AmdSource:
    return AmdSource(
        store=store,
        vendors=vendors,
        url=url,
        roots=[roots],
        seconds=SECONDS,
        now=clock,
        log=structlog.get_logger(),
        patience_s=0.0,
    )


async def test_a_chips_certificate_is_asked_for_once_in_the_life_of_its_firmware(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, amd: Amd, tmp_path: Path
) -> None:
    der = amd.vcek(CHIP)
    server = await VendorServer(kds(amd, CHIP, der, QUERY)).start(nursery)
    async with VendorClient() as client:
        source = amd_source(store, client, server.url, amd.roots(), clock)
        assert await source.vcek(CHIP) == der
        clock.now += 900 * DAY
        assert await source.vcek(CHIP) == der
    assert len(server.requests) == 1
    name = f"{CHIP.chip_id.hex()}-4-0-24-217"
    assert cached(tmp_path) == [f"amd/Milan/{name}.entry"]
    theirs = tmp_path / "endorsements" / "amd" / "Milan" / f"{name}.der"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(der)
    (tmp_path / "endorsements" / "cache" / "amd" / "Milan" / f"{name}.entry").unlink()
    assert await amd_source(store, Offline(), "", amd.roots(), clock).vcek(CHIP) == der


async def test_a_turin_is_asked_for_by_its_short_id_and_its_fmc(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, amd: Amd
) -> None:
    chip_id = bytes.fromhex("1e550a8ee5cf9f4d") + bytes(56)
    turin = AmdChip("Turin", chip_id, bootloader=1, tee=1, snp=2, microcode=76, fmc=3)
    der = amd.vcek(turin)
    query = {"fmcSPL": "03", "blSPL": "01", "teeSPL": "01", "snpSPL": "02", "ucodeSPL": "76"}
    server = await VendorServer(kds(amd, turin, der, query)).start(nursery)
    async with VendorClient() as client:
        source = amd_source(store, client, server.url, amd.roots("Turin"), clock)
        assert await source.vcek(turin) == der
    (request,) = server.requests
    assert request.path == "/vcek/v1/Turin/1e550a8ee5cf9f4d"


@pytest.mark.parametrize("wrong", ["chip", "tcb", "issuer", "garbage", "empty"])
async def test_another_certificate_than_the_one_asked_for_is_not_kept(
    nursery: trio.Nursery,
    store: EndorsementStore,
    clock: Clock,
    amd: Amd,
    tmp_path: Path,
    wrong: str,
) -> None:
    spoilt: dict[str, Callable[[], bytes]] = {
        "chip": lambda: amd.vcek(replace(CHIP, chip_id=bytes(range(2, 66)))),
        "tcb": lambda: amd.vcek(replace(CHIP, microcode=216)),
        "issuer": lambda: amd.vcek(CHIP, by=amd.asvk),
        "garbage": lambda: b"<html>",
        "empty": lambda: b"",
    }
    der = spoilt[wrong]()
    server = await VendorServer(kds(amd, CHIP, der, QUERY)).start(nursery)
    async with VendorClient() as client:
        source = amd_source(store, client, server.url, amd.roots(), clock)
        with pytest.raises(EndorsementsUnavailable, match="AMD's answer is refused"):
            await source.vcek(CHIP)
    assert cached(tmp_path) == []


async def test_nobody_is_asked_about_a_masked_chip_or_an_unpinned_product(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, amd: Amd
) -> None:
    server = await VendorServer(anything).start(nursery)
    async with VendorClient() as client:
        source = amd_source(store, client, server.url, amd.roots(), clock)
        with pytest.raises(EndorsementsUnavailable, match="masks the chip id"):
            await source.vcek(replace(CHIP, chip_id=bytes(64)))
        with pytest.raises(EndorsementsUnavailable, match="no root is pinned for Genoa"):
            await source.vcek(replace(CHIP, product="Genoa"))
        with pytest.raises(Malformed):
            await source.vcek(replace(CHIP, chip_id=bytes(8)))
    assert server.connections == 0


async def test_a_polite_pause_is_made_when_amd_asks_for_it(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, amd: Amd
) -> None:
    server = await VendorServer(kds(amd, CHIP, amd.vcek(CHIP), QUERY)).start(nursery)
    server.fault.statuses, server.fault.headers = [429], {"retry-after": "1"}
    start = trio.current_time()
    async with VendorClient() as client:
        await amd_source(store, client, server.url, amd.roots(), clock).vcek(CHIP)
    assert trio.current_time() - start >= 1


async def test_a_revocation_list_is_kept_and_asked_for_again_in_its_second_half(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, amd: Amd, tmp_path: Path
) -> None:
    service = kds(amd, CHIP, amd.vcek(CHIP), QUERY)
    server = await VendorServer(service).start(nursery)
    first = service.crls["/vcek/v1/Milan/crl"]
    async with VendorClient() as client:
        source = amd_source(store, client, server.url, amd.roots(), clock)
        vek = await source.authenticate(amd.vcek(CHIP))
        assert vek.kind == "vcek"
        for _ in range(2):
            assert await source.crl(vek) == first
        assert len(server.requests) == 1
        assert cached(tmp_path) == ["amd/Milan/vcek-crl.entry"]
        # A forged one does not take its place, a newer one does.
        clock.now += 20 * DAY
        forger = root("ARK-Milan", now=START)
        service.crls["/vcek/v1/Milan/crl"] = make_crl(forger, now=clock())
        assert await source.crl(vek) == first
        newer = service.crls["/vcek/v1/Milan/crl"] = make_crl(amd.ark, now=clock())
        assert await source.crl(vek) == newer
        # Nothing after its end.
        service.crls.clear()
        clock.now += 31 * DAY
        with pytest.raises(EndorsementsUnavailable):
            await source.crl(vek)


async def test_an_intermediate_that_amd_issued_since_is_asked_for_and_kept(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, amd: Amd, tmp_path: Path
) -> None:
    newer = amd.ark.issue("SEV-Milan", now=START, ca=True)
    der = amd.vcek(CHIP, by=newer)
    service = kds(amd, CHIP, der, QUERY)
    path = "/vcek/v1/Milan/cert_chain"
    service.certificates[path, ()] = _pem(newer, amd.ark).encode()
    server = await VendorServer(service).start(nursery)
    async with VendorClient() as client:
        source = amd_source(store, client, server.url, amd.roots(), clock)
        assert await source.vcek(CHIP) == der
        vek = await source.authenticate(der)
        assert vek.authorities == _pem(newer).encode()
        assert [request.path for request in server.requests].count(path) == 1
        assert "amd/Milan/vcek-issuer.entry" in cached(tmp_path)
        # One of the right name that the pinned root did not issue is neither used nor kept.
        forged = root("ARK-Milan", now=START).issue("SEV-Milan", now=START, ca=True)
        service.certificates[path, ()] = _pem(forged).encode()
        with pytest.raises(Unauthentic):
            await source.authenticate(amd.vcek(CHIP, by=forged))
        assert (await source.authenticate(der)).issuer == newer.certificate


@needs_vectors
async def test_amds_own_certificate_passes_from_the_service_to_the_store(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock
) -> None:
    der = (VECTORS / "snp" / "google_milan_vcek.der").read_bytes()
    hwid = load_vek(der).extensions.get_extension_for_oid(
        x509.ObjectIdentifier("1.3.6.1.4.1.3704.1.4")
    )
    assert isinstance(hwid.value, x509.UnrecognizedExtension)
    chip = AmdChip("Milan", hwid.value.value, bootloader=2, tee=0, snp=5, microcode=68)
    query = {"blSPL": "02", "teeSPL": "00", "snpSPL": "05", "ucodeSPL": "68"}
    path = f"/vcek/v1/Milan/{chip.hwid.hex()}"
    service = AmdKds({(path, tuple(sorted(query.items()))): der})
    server = await VendorServer(service).start(nursery)
    milan = next(line for line in load_anchors().amd if line.product == "Milan")
    async with VendorClient() as client:
        source = amd_source(store, client, server.url, milan, clock)
        for _ in range(2):
            assert await source.vcek(chip) == der
    assert len(server.requests) == 1


# --- Intel ----------------------------------------------------------------------------------------

QUOTED_AT = datetime.datetime(2025, 6, 20, tzinfo=datetime.UTC)
FMSPC = "b0c06f000000"


def intel_vector() -> tuple[bytes, dict[str, str]]:
    folder = VECTORS / "tdx"
    collateral = json.loads((folder / "phala_tdx_quote_collateral.json").read_text())
    return (folder / "phala_tdx_quote_v4.bin").read_bytes(), collateral


def intel_root() -> x509.Certificate:
    return chain.parse_der_certificate(load_anchors().intel_root, field="root")


def intel_source(
    store: EndorsementStore,
    vendors: Vendors,
    url: str,
    clock: Clock,
    anchor: x509.Certificate | None = None,
) -> IntelSource:
    return IntelSource(
        store=store,
        vendors=vendors,
        url=url,
        root=anchor or intel_root(),
        seconds=SECONDS,
        now=clock,
        log=structlog.get_logger(),
        patience_s=0.0,
    )


@needs_vectors
async def test_collateral_from_a_pccs_is_what_intels_verifier_needs(
    nursery: trio.Nursery, store: EndorsementStore, tmp_path: Path
) -> None:
    clock = Clock(QUOTED_AT)
    quote, collateral = intel_vector()
    server = await VendorServer(IntelPcs(collateral, FMSPC, caching=True)).start(nursery)
    async with VendorClient() as client:
        source = intel_source(store, client, server.url, clock)
        assert platform_of(quote) == Platform(FMSPC, "platform")
        document = await source.collateral(platform_of(quote))
        assert await source.collateral(platform_of(quote)) == document
    assert len(server.requests) == 4
    fetched = json.loads(document)
    assert fetched == collateral
    report = dcap_qvl.verify(
        quote, dcap_qvl.QuoteCollateralV3.from_json(document.decode()), int(clock().timestamp())
    )
    assert report.status == "UpToDate"
    assert cached(tmp_path) == [f"intel/{FMSPC}-platform.entry"]
    # Until the first of its parts lapses, then not at all.
    offline = intel_source(store, Offline(), "", clock)
    clock.now = datetime.datetime(2025, 7, 19, 10, tzinfo=datetime.UTC)
    assert await offline.collateral(platform_of(quote)) == document
    clock.now += HOUR
    with pytest.raises(EndorsementsUnavailable):
        await offline.collateral(platform_of(quote))


def intel_of_our_own(now: datetime.datetime, crl_url: str) -> tuple[Issuer, dict[str, str]]:
    """A collateral shaped as Intel's, whose root says where its list is."""
    point = x509.DistributionPoint([x509.UniformResourceIdentifier(crl_url)], None, None, None)
    key = ec.generate_private_key(ec.SECP256R1())
    top = root("SGX Root CA", now=now, key=key, extensions=(x509.CRLDistributionPoints([point]),))
    pck_ca = top.issue("SGX PCK Platform CA", now=now, ca=True, key=_p256())
    tcb_signer = top.issue("SGX TCB Signing", now=now, key=_p256())

    def signed(document: dict[str, object]) -> tuple[str, str]:
        text = json.dumps(document)
        assert isinstance(tcb_signer.key, ec.EllipticCurvePrivateKey)
        der = tcb_signer.key.sign(text.encode(), ec.ECDSA(hashes.SHA256()))
        r, s = _decode(der)
        return text, (r.to_bytes(32, "big") + s.to_bytes(32, "big")).hex()

    dates = {"issueDate": _z(now - HOUR), "nextUpdate": _z(now + 30 * DAY)}
    tcb_info, tcb_signature = signed({"id": "TDX", "fmspc": FMSPC.upper(), **dates})
    qe_identity, qe_signature = signed({"id": "TD_QE", **dates})
    pem = _pem(tcb_signer, top)
    return top, {
        "pck_crl_issuer_chain": _pem(pck_ca, top),
        "root_ca_crl": make_crl(top, now=now, lifetime=300 * DAY).hex(),
        "pck_crl": make_crl(pck_ca, now=now).hex(),
        "tcb_info_issuer_chain": pem,
        "tcb_info": tcb_info,
        "tcb_info_signature": tcb_signature,
        "qe_identity_issuer_chain": pem,
        "qe_identity": qe_identity,
        "qe_identity_signature": qe_signature,
    }


def _p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _decode(signature: bytes) -> tuple[int, int]:
    r, s = decode_dss_signature(signature)
    return r, s


def _z(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _pem(*issuers: Issuer) -> str:
    return b"".join(one.certificate.public_bytes(Encoding.PEM) for one in issuers).decode()


PLATFORM = Platform(FMSPC, "platform")


async def test_intels_own_service_has_no_root_list_so_the_root_is_asked_where_it_is(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock
) -> None:
    server = await VendorServer(anything).start(nursery)
    top, collateral = intel_of_our_own(START, server.url + "/IntelSGXRootCA.der")
    server.handler = IntelPcs(collateral, FMSPC)
    async with VendorClient() as client:
        source = intel_source(store, client, server.url, clock, top.certificate)
        assert json.loads(await source.collateral(PLATFORM)) == collateral
        # In the second half of its life it is asked for again; what is there does meanwhile.
        clock.now += 16 * DAY
        before = len(server.requests)
        server.fault.statuses = [404] * 10
        assert json.loads(await source.collateral(PLATFORM)) == collateral
        assert len(server.requests) > before


SPOILED = ("tcb_info", "tcb_info_signature", "qe_identity", "qe_identity_signature", "pck_crl")


@pytest.mark.parametrize("part", [*SPOILED, "root_ca_crl", "tcb_info_issuer_chain"])
async def test_collateral_with_one_altered_part_is_not_kept(
    nursery: trio.Nursery, store: EndorsementStore, clock: Clock, tmp_path: Path, part: str
) -> None:
    top, collateral = intel_of_our_own(START, "http://127.0.0.1:9/")
    _, other = intel_of_our_own(START, "http://127.0.0.1:9/")
    text = collateral[part]
    collateral[part] = {
        "tcb_info": text.replace('"TDX"', '"SGX"'),
        "qe_identity": text.replace('"TD_QE"', '"QE"'),
    }.get(part, other[part])
    assert collateral[part] != text
    server = await VendorServer(IntelPcs(collateral, FMSPC, caching=True)).start(nursery)
    async with VendorClient() as client:
        source = intel_source(store, client, server.url, clock, top.certificate)
        with pytest.raises(EndorsementsUnavailable, match="Intel's answer is refused"):
            await source.collateral(PLATFORM)
    assert cached(tmp_path) == []


def test_collateral_is_held_to_platform_time_and_revocation() -> None:
    top, collateral = intel_of_our_own(START, "http://127.0.0.1:9/")

    def check(
        document: object, at: datetime.datetime = START, platform: Platform = PLATFORM
    ) -> None:
        authenticate_collateral(
            json.dumps(document).encode(), platform=platform, root=top.certificate, at=at
        )

    check(collateral)
    with pytest.raises(Unauthentic, match="TCB info of"):
        check(collateral, platform=Platform("000000000000", "platform"))
    with pytest.raises(Unauthentic, match="processor CA"):
        check(collateral, platform=Platform(FMSPC, "processor"))
    for at in (START - 2 * HOUR, START + 30 * DAY):
        with pytest.raises(Stale):
            check(collateral, at)
    signing = x509.load_pem_x509_certificate(collateral["tcb_info_issuer_chain"].encode())
    revoked = make_crl(top, now=START, revoked={signing.serial_number: None}).hex()
    with pytest.raises(Unauthentic, match="revoked"):
        check(collateral | {"root_ca_crl": revoked})
    junk: object
    for junk in ({}, [], collateral | {"pck_crl": "zz"}, collateral | {"pck_crl": 5}):
        with pytest.raises(Malformed):
            check(junk)


def test_what_is_no_quote_names_no_platform() -> None:
    for junk in (b"", bytes(48), bytes(5000), os.urandom(5000)):
        with pytest.raises(Malformed):
            platform_of(junk)


def test_a_collateral_shows_nothing_in_a_log() -> None:
    _, collateral = intel_of_our_own(START, "http://127.0.0.1:9/")
    assert repr(msgspec.convert(collateral, Collateral)) == "Collateral()"


# --- all of them ----------------------------------------------------------------------------------


@dataclass
class World:
    """Every vendor's server, and what they serve."""

    rim: VendorServer
    ocsp: VendorServer
    kds: VendorServer
    pcs: VendorServer
    imds: VendorServer
    by: Signer
    anchors: Anchors

    @property
    def servers(self) -> list[VendorServer]:
        return [self.rim, self.ocsp, self.kds, self.pcs, self.imds]

    def attestation(self, tmp_path: Path, *, offline: bool = False) -> Attestation:
        return Attestation(
            cpu="sev_snp",
            endorsements_dir=str(tmp_path / "endorsements"),
            endorsements="offline" if offline else "online",
            rim_url=self.rim.url + "/v1/rim",
            ocsp_url=self.ocsp.url,
            kds_url=self.kds.url,
            pcs_url=self.pcs.url,
            imds_url=self.imds.url,
            endorsement_s=SECONDS,
        )


@pytest.fixture
async def world(
    nursery: trio.Nursery, clock: Clock, device: Device, amd: Amd, rim_root: Issuer
) -> World:
    by = signer(rim_root)
    pcs = await VendorServer(anything).start(nursery)
    top, collateral = intel_of_our_own(START, pcs.url + "/IntelSGXRootCA.der")
    pcs.handler = IntelPcs(collateral, FMSPC)
    vcek = amd.vcek(CHIP)
    thim = x509.load_der_x509_certificate(vcek).public_bytes(Encoding.PEM)
    return World(
        await VendorServer(RimService({RIM_ID: by.sign("values")})).start(nursery),
        await VendorServer(OcspResponder([*device.issuers, rim_root], clock)).start(nursery),
        await VendorServer(kds(amd, CHIP, vcek, QUERY)).start(nursery),
        pcs,
        await VendorServer(AmdKds({}, thim=thim)).start(nursery),
        by,
        Anchors(amd=(amd.roots(),), intel_root=chain.der_of(top.certificate)),
    )


def endorsements(
    world: World, tmp_path: Path, clock: Clock, *, offline: bool = False
) -> Endorsements:
    return Endorsements(
        world.attestation(tmp_path, offline=offline),
        world.anchors,
        authenticate_rim=world.by.authenticate,
        log=structlog.get_logger(),
        now=clock,
    )


GPU = GpuEvidence("nvidia_gpu", b"report", b"chain")


async def test_a_gpus_evidence_gets_its_manifests_and_every_answer(
    world: World, tmp_path: Path, clock: Clock, device: Device
) -> None:
    async with endorsements(world, tmp_path, clock) as all_:
        with capture_logs() as lines:
            gpu = await all_.for_gpu(GPU, rim_ids=[RIM_ID, RIM_ID], device_path=device.path)
    assert [line["log_level"] for line in lines if line["log_level"] != "info"] == []
    assert [json.loads(rim)[0] for rim in gpu.rims] == ["values"]
    assert (gpu.report, gpu.certificate_chain) == (b"report", b"chain")
    assert len(gpu.ocsp) == 4  # three of the device's path, one of the manifest's signer
    asked = device_part(device.path)
    assert revocation_findings(asked[0], gpu.ocsp, asked[1], "required", clock()) == ()
    assert world.kds.connections == world.pcs.connections == world.imds.connections == 0


async def test_the_second_time_everything_comes_from_disk(
    world: World, tmp_path: Path, clock: Clock, device: Device
) -> None:
    async with endorsements(world, tmp_path, clock) as all_:
        first = await all_.for_gpu(GPU, rim_ids=[RIM_ID], device_path=device.path)
    before = [server.connections for server in world.servers]
    for offline in (False, True):
        async with endorsements(world, tmp_path, clock, offline=offline) as all_:
            assert await all_.for_gpu(GPU, rim_ids=[RIM_ID], device_path=device.path) == first
    assert [server.connections for server in world.servers] == before


async def test_offline_opens_no_socket_and_says_once_what_is_missing(
    world: World, tmp_path: Path, clock: Clock, device: Device
) -> None:
    tdx = CpuEvidence("tdx", {"quote": b""})
    snp = CpuEvidence("sev_snp", {"report": b""})
    with capture_logs() as lines:
        async with endorsements(world, tmp_path, clock, offline=True) as all_:
            for _ in range(2):
                assert await all_.for_gpu(GPU, rim_ids=[RIM_ID], device_path=device.path) == GPU
                assert await all_.for_cpu(snp, chip=CHIP) == snp
                assert await all_.for_cpu(tdx) == tdx
    assert [server.connections for server in world.servers] == [0] * 5
    said = [line["what"] for line in lines if line["event"] == "endorsement_missing"]
    assert sorted(said) == [
        "AMD's certificate of the report's key",
        "Intel's collateral",
        f"RIM {RIM_ID}",
        "revocation of CN=GSP BROM",
        "revocation of CN=Identity",
        "revocation of CN=Provisioner ICA",
    ]


async def test_vendors_that_are_down_leave_evidence_as_it_is(
    world: World, tmp_path: Path, clock: Clock, device: Device
) -> None:
    for server in world.servers:
        server.fault.garbage = True
    async with endorsements(world, tmp_path, clock) as all_:
        with capture_logs():
            assert await all_.for_gpu(GPU, rim_ids=[RIM_ID], device_path=device.path) == GPU
            snp = CpuEvidence("sev_snp", {"report": b""})
            assert await all_.for_cpu(snp, chip=CHIP) == snp


async def test_a_chips_report_gets_its_certificate_its_issuer_and_the_list(
    world: World, tmp_path: Path, clock: Clock, amd: Amd
) -> None:
    async with endorsements(world, tmp_path, clock) as all_:
        snp = await all_.for_cpu(CpuEvidence("sev_snp", {"report": b"r"}), chip=CHIP)
        azure = await all_.for_cpu(CpuEvidence("azure_vtpm", {"hcl_report": b"h"}))
    for evidence in (snp, azure):
        assert sorted(evidence.endorsements) == ["authorities", "crl", "vek"]
        (ask_,) = chain.parse_pem_chain(evidence.endorsements["authorities"], field="x")
        assert ask_ == amd.ask.certificate
    assert snp.endorsements["vek"] == azure.endorsements["vek"]
    assert len(world.imds.requests) == 1


async def test_a_loaded_keys_certificate_gets_the_other_intermediate_and_its_list(
    world: World, tmp_path: Path, clock: Clock, amd: Amd
) -> None:
    assert isinstance(world.kds.handler, AmdKds)
    vlek_crl = world.kds.handler.crls["/vlek/v1/Milan/crl"] = make_crl(amd.ark, now=START)
    vlek = amd.vcek(CHIP, by=amd.asvk)
    async with endorsements(world, tmp_path, clock) as all_:
        snp = await all_.for_cpu(CpuEvidence("sev_snp", {"report": b"r"}, {"vek": vlek}))
    assert snp.endorsements["authorities"] == _pem(amd.asvk).encode()
    assert snp.endorsements["crl"] == vlek_crl
    assert [request.path for request in world.kds.requests] == ["/vlek/v1/Milan/crl"]


@pytest.mark.parametrize("thim", [b"", b"-----BEGIN CERTIFICATE-----", None, "stranger"])
async def test_what_azure_hands_out_must_lead_to_a_pinned_root(
    world: World, tmp_path: Path, clock: Clock, amd: Amd, thim: bytes | str | None
) -> None:
    assert isinstance(world.imds.handler, AmdKds)
    if thim == "stranger":
        forged = root("ARK-Milan", now=START).issue("SEV-Genoa", now=START, ca=True)
        der = amd.vcek(CHIP, by=forged)
        thim = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
    assert not isinstance(thim, str)
    world.imds.handler.thim = thim
    azure = CpuEvidence("azure_vtpm", {"hcl_report": b"h"})
    async with endorsements(world, tmp_path, clock) as all_:
        with capture_logs() as lines:
            assert await all_.for_cpu(azure) == azure
    assert [line["event"] for line in lines] == ["endorsement_missing"]


async def test_endorsements_that_came_with_the_evidence_stay(
    world: World, tmp_path: Path, clock: Clock, amd: Amd, device: Device
) -> None:
    given = {"vek": amd.vcek(CHIP), "authorities": b"a", "crl": b"c"}
    snp = CpuEvidence("sev_snp", {"report": b""}, given)
    tdx = CpuEvidence("tdx", {"quote": b"q"}, {"collateral": b"c"})
    async with endorsements(world, tmp_path, clock) as all_:
        assert await all_.for_cpu(snp, chip=CHIP) == snp
        assert await all_.for_cpu(tdx) == tdx
        assert [server.connections for server in world.servers] == [0] * 5
        rim = world.by.sign("theirs")
        gpu = await all_.for_gpu(
            replace(GPU, rims=(rim,)), rim_ids=[RIM_ID], device_path=device.path
        )
    assert gpu.rims == (rim,)
    assert len(gpu.ocsp) == 4
    assert world.rim.connections == 0


@needs_vectors
@pytest.mark.parametrize("scheme", ["tdx", "azure_vtpm"])
async def test_a_td_quote_gets_intels_collateral(
    nursery: trio.Nursery, world: World, tmp_path: Path, scheme: str
) -> None:
    quote, collateral = intel_vector()
    world.pcs.handler = IntelPcs(collateral, FMSPC, caching=True)
    world.anchors = load_anchors()
    part = "quote" if scheme == "tdx" else "td_quote"
    async with endorsements(world, tmp_path, Clock(QUOTED_AT)) as all_:
        evidence = await all_.for_cpu(CpuEvidence(scheme, {part: quote}))
    assert json.loads(evidence.endorsements["collateral"]) == collateral


async def test_simulated_evidence_asks_no_vendor(
    world: World, tmp_path: Path, clock: Clock, device: Device
) -> None:
    gpu = GpuEvidence("simulated", b"", b"")
    cpu = CpuEvidence("simulated", {"report": b""})
    async with endorsements(world, tmp_path, clock) as all_:
        assert await all_.for_gpu(gpu, rim_ids=["x"], device_path=device.path) == gpu
        assert await all_.for_cpu(cpu) == cpu
    assert [server.connections for server in world.servers] == [0] * 5


async def test_a_cancelled_caller_waits_for_no_vendor(
    world: World, tmp_path: Path, clock: Clock, device: Device
) -> None:
    for server in world.servers:
        server.fault.silent = True
    start = trio.current_time()
    async with endorsements(world, tmp_path, clock) as all_:
        with trio.move_on_after(0.2) as scope:
            await all_.for_gpu(GPU, rim_ids=[RIM_ID], device_path=device.path)
    assert scope.cancelled_caught
    assert trio.current_time() - start < 2
