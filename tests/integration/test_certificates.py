"""The operator's certificates on a running appliance: request, chain, client certificates."""

from __future__ import annotations

import datetime
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from appliance.errors import EX_CONFIG
from appliance.serving.auth import create_key, hash_key
from appliance.web.status import serve_status
from tests.fakes.authority import Authority, pem
from tests.integration.appliance import (
    MODEL,
    RawConnection,
    RunningAppliance,
    Sections,
    config_text,
    start_appliance,
)

DCV = [sys.executable, "-m", "appliance"]
CHAT = "/v1/chat/completions"
CSR = "/.well-known/dcv/csr"
INTERVAL_S = 0.1
WATCHING: Sections = {"tls": {"chain_file": "chain.pem", "chain_interval_s": INTERVAL_S}}

protocols = pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])


@pytest.fixture
def authority() -> Authority:
    return Authority(now=datetime.datetime.now(tz=datetime.UTC).replace(microsecond=0))


@pytest.fixture
async def watching(nursery: trio.Nursery, tmp_path: Path) -> RunningAppliance:
    return await start_appliance(nursery, tmp_path, sections=WATCHING)


def spki(key: object) -> bytes:
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def trusting(authority: Authority) -> ssl.SSLContext:
    """A client that trusts this authority and nothing else."""
    return ssl.create_default_context(cadata=pem(authority.certificate).decode())


async def request_of(appliance: RunningAppliance) -> bytes:
    async with appliance.client() as client:
        return (await client.get(CSR)).content


def put(appliance: RunningAppliance, chain: bytes) -> None:
    new = appliance.folder / "chain.new"
    new.write_bytes(chain)
    new.replace(appliance.folder / "chain.pem")


async def said(appliance: RunningAppliance, event: str) -> dict[str, object]:
    """The log line of this event, once there is one."""
    with trio.fail_after(20):
        while True:
            for line in appliance.log_lines:
                if line["event"] == event:
                    return line
            await trio.sleep(INTERVAL_S / 5)


async def shown(appliance: RunningAppliance) -> x509.Certificate:
    """The certificate that a new connection sees."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    tcp = await trio.open_tcp_stream("127.0.0.1", appliance.port)
    async with trio.SSLStream(tcp, context, https_compatible=True) as stream:
        await stream.do_handshake()
        return x509.load_der_x509_certificate(stream.getpeercert(binary_form=True))


def slow_chat(tokens: int, ms: int) -> bytes:
    return json.dumps(
        {
            "model": MODEL,
            "stream": True,
            "max_tokens": tokens,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": f"[[mode:slow:{ms}]] Go on"}],
        }
    ).encode()


# ---------------------------------------------------------------------------------- the request


async def test_the_request_is_there_for_anybody_and_for_the_key_of_the_connection(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    key = {"name": "k", "sha256": hash_key(create_key(lambda count: b"k" * count))}
    appliance = await start_appliance(
        nursery,
        tmp_path,
        sections={
            "auth": {"mode": "keys", "keys": [key]},
            "tls": {"names": ["localhost", "127.0.0.1", "api.example.org"]},
        },
    )
    async with appliance.client() as client:
        assert (await client.get("/v1/models")).status_code == 401
        response = await client.get(CSR)
        assert (await client.post(CSR)).status_code == 405
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; charset=us-ascii"
    assert response.headers["cache-control"] == "no-store"
    request = x509.load_pem_x509_csr(response.content)
    assert request.is_signature_valid
    names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "api.example.org"]
    assert spki(request.public_key()) == spki((await shown(appliance)).public_key())


# ------------------------------------------------------------------------------------- the chain


@protocols
async def test_a_chain_for_the_request_is_shown_while_a_stream_goes_on(
    watching: RunningAppliance, authority: Authority, *, http2: bool
) -> None:
    own = await shown(watching)
    async with RawConnection.open(watching) as running:
        await running.post(CHAT, slow_chat(tokens=100, ms=20))
        await running.read_some(1)
        issuer = Authority("Intermediate", now=authority.now, parent=authority)
        leaf = issuer.answer(await request_of(watching))
        put(watching, pem(leaf, issuer.certificate))
        await said(watching, "tls_chain_shown")
        assert await shown(watching) == leaf != own
        async with httpx2.AsyncClient(
            base_url=watching.url, verify=trusting(authority), http1=not http2, http2=http2
        ) as client:
            response = await client.get("/health")
        assert response.status_code == 200
        assert response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        assert response.json()["running"] == 1  # it was all while the stream went on
        rest = await running.read_response()
        assert rest.clean
        assert rest.body.endswith(b"data: [DONE]\n\n")
    assert spki(leaf.public_key()) == spki(own.public_key())
    with pytest.raises(httpx2.ConnectError):  # who trusts the self-signed one must now trust the CA
        await request_of(watching)


async def test_a_wrong_chain_keeps_the_certificate_and_is_said_once(
    watching: RunningAppliance, authority: Authority
) -> None:
    leaf = authority.answer(await request_of(watching))
    put(watching, pem(leaf))
    await said(watching, "tls_chain_shown")
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()
    put(watching, pem(authority.issue(stranger)))
    line = await said(watching, "tls_chain_refused")
    assert "expected the key of this boot" in str(line["error"])
    assert await shown(watching) == leaf
    await trio.sleep(3 * INTERVAL_S)
    events = [line["event"] for line in watching.log_lines]
    assert events.count("tls_chain_refused") == 1


async def test_a_chain_of_an_earlier_boot_is_a_warning_and_the_appliance_serves(
    nursery: trio.Nursery, tmp_path: Path, authority: Authority
) -> None:
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()
    (tmp_path / "chain.pem").write_bytes(pem(authority.issue(stranger)))
    appliance = await start_appliance(nursery, tmp_path, sections=WATCHING)
    events = [line["event"] for line in appliance.log_lines]
    assert events.index("tls_chain_refused") < events.index("serving")
    assert (await appliance.chat()).status_code == 200


# --------------------------------------------------------------------------- client certificates


@protocols
async def test_only_clients_with_a_certificate_of_the_authority_are_served(
    nursery: trio.Nursery, tmp_path: Path, authority: Authority, *, http2: bool
) -> None:
    (tmp_path / "clients.pem").write_bytes(pem(authority.certificate))
    appliance = await start_appliance(
        nursery, tmp_path, sections={"tls": {"client_ca_file": "clients.pem"}}
    )

    async def health(certificate: bytes | None) -> httpx2.Response:
        context = appliance.trust
        if certificate is not None:
            (tmp_path / "client.pem").write_bytes(certificate)
            context.load_cert_chain(tmp_path / "client.pem")
        async with httpx2.AsyncClient(
            base_url=appliance.url, verify=context, http1=not http2, http2=http2
        ) as client:
            return await client.get("/health")

    stranger = Authority(now=authority.now)  # of the same name
    for certificate in (None, stranger.client()):
        with pytest.raises(httpx2.TransportError):
            await health(certificate)
    response = await health(authority.client())
    assert response.status_code == 200
    assert response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")


async def test_with_client_certificates_tls_is_1_3_and_sessions_are_not_resumed(
    nursery: trio.Nursery, tmp_path: Path, authority: Authority
) -> None:
    (tmp_path / "clients.pem").write_bytes(pem(authority.certificate))
    (tmp_path / "client.pem").write_bytes(authority.client())
    appliance = await start_appliance(
        nursery, tmp_path, sections={"tls": {"client_ca_file": "clients.pem"}}
    )

    def talk(context: ssl.SSLContext) -> tuple[str | None, bool]:
        """The protocol, and whether the answer came with a session ticket."""
        with (
            socket.create_connection(("127.0.0.1", appliance.port), timeout=10) as tcp,
            context.wrap_socket(tcp, server_hostname="localhost") as stream,
        ):
            stream.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert stream.recv(4096).startswith(b"HTTP/1.1 200")
            return stream.version(), stream.session is not None and stream.session.has_ticket

    context = appliance.trust
    context.load_cert_chain(tmp_path / "client.pem")
    assert await trio.to_thread.run_sync(talk, context) == ("TLSv1.3", False)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        await trio.to_thread.run_sync(talk, context)


# ------------------------------------------------------------------------- from outside: `dcv csr`


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def serve(folder: Path, *modes: str) -> subprocess.Popen[bytes]:
    (folder / "dcv.toml").write_text(config_text(folder, modes))
    command: list[str | Path] = [*DCV, "serve", "--config", folder / "dcv.toml"]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stderr=log)


async def dcv_csr(folder: Path) -> subprocess.CompletedProcess[bytes]:
    with trio.fail_after(20):
        return await trio.run_process(
            [*DCV, "csr", "--socket", folder / "status.sock"],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )


async def test_dcv_csr_prints_the_request_of_the_running_appliance(
    appliance: RunningAppliance,
) -> None:
    printed = await dcv_csr(appliance.folder)
    assert (printed.returncode, printed.stderr) == (0, b"")
    assert printed.stdout == await request_of(appliance)
    request = x509.load_pem_x509_csr(printed.stdout)
    assert spki(request.public_key()) == spki((await shown(appliance)).public_key())


async def test_dcv_csr_works_while_the_engine_starts(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    processes.append(serve(tmp_path, "hang_start"))
    with trio.fail_after(20):
        while b'"engine_log"' not in (tmp_path / "log").read_bytes():
            await trio.sleep(0.05)
    printed = await dcv_csr(tmp_path)
    assert printed.returncode == 0
    own = x509.load_pem_x509_certificate((tmp_path / "tls.pem").read_bytes())
    assert spki(x509.load_pem_x509_csr(printed.stdout).public_key()) == spki(own.public_key())


async def test_dcv_csr_says_when_there_is_no_appliance_or_no_key_yet(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    nobody = await dcv_csr(tmp_path)
    assert (nobody.returncode, nobody.stdout) == (2, b"")
    assert b"no appliance at" in nobody.stderr
    await nursery.start(serve_status, tmp_path / "status.sock", lambda: {"tls": None})
    early = await dcv_csr(tmp_path)
    assert (early.returncode, early.stdout) == (1, b"")
    assert b"no TLS key yet" in early.stderr


async def test_dcv_status_shows_the_key_on_one_line(appliance: RunningAppliance) -> None:
    command = [*DCV, "status", "--socket", str(appliance.folder / "status.sock")]
    whole = await trio.run_process([*command, "--json"], capture_stdout=True)
    tls = json.loads(whole.stdout)["tls"]
    assert tls.keys() == {"spki_sha256", "csr"}
    short = await trio.run_process(
        command, capture_stdout=True, env={"COLUMNS": "200", "PATH": "/usr/bin"}
    )
    assert tls["spki_sha256"].encode() in short.stdout
    assert b"BEGIN" not in short.stdout


# -------------------------------------------------------------------------- a boot that must fail


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"garbage", "expected 1 to 10 certificates, got 0"),
        ("leaf", "certificate 1: expected an authority's"),
    ],
    ids=["missing", "garbage", "no-authority"],
)
def test_without_readable_client_authorities_the_appliance_does_not_boot(
    tmp_path: Path, authority: Authority, data: bytes | str | None, says: str
) -> None:
    if data == "leaf":
        data = authority.client().partition(b"-----END PRIVATE KEY-----\n")[2]
    if isinstance(data, bytes):
        (tmp_path / "clients.pem").write_bytes(data)
    text = config_text(tmp_path, (), {"tls": {"client_ca_file": "clients.pem"}})
    (tmp_path / "dcv.toml").write_text(text)
    command: list[str | Path] = [*DCV, "serve", "--config", tmp_path / "dcv.toml"]
    ended = subprocess.run(command, capture_output=True, timeout=30)
    assert ended.returncode == EX_CONFIG
    assert f"stage 2 (keys): [tls] client_ca_file: {says}".encode() in ended.stderr
