"""NVIDIA's own verifier, really run: its environment, its code, real evidence, local endpoints.

No test asks a host outside: what is not answered by a server of the test's own is a closed port.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509 import ocsp

from appliance.config import Attestation, Policy
from appliance.credentials import Secret
from appliance.endorsements import nvidia_sdk
from appliance.endorsements.anchors import load_anchors
from appliance.endorsements.nvidia_sdk import CHILD, consult, second_opinion
from appliance.errors import (
    EndorsementsUnavailable,
    EvidenceError,
    Malformed,
    SecondOpinionFailed,
)
from appliance.log import Log
from appliance.rats.policy.nvidia_gpu import appraise_gpu
from appliance.rats.result import AttestationResult, Finding, Tier, conclude
from appliance.rats.schemes import nvidia_gpu
from appliance.wire.evidence import GpuEvidence
from tests.vectors_dir import VECTORS, needs_vectors

ROOT = Path(__file__).resolve().parents[2]
SDK_PYTHON = ROOT / ".nvidia-sdk" / "bin" / "python"
HARNESS = ROOT / "tests" / "fakes" / "nvidia_sdk_harness.py"
H100 = VECTORS / "nvidia" / "h100_595.71.05"

CLOSED = "http://127.0.0.1:1"
"""Port 1 is below the ephemeral range and nothing here listens on it."""

PATIENCE_S = 60.0

needs_sdk = pytest.mark.skipif(
    not SDK_PYTHON.is_file(), reason="the SDK's environment is not here: `just setup`"
)
pytestmark = [needs_sdk, needs_vectors]

LOG: Log = structlog.get_logger()


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made, and nothing else."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def sdk(scratch: Path) -> Attestation:
    """The SDK as it is shipped, with nobody to ask."""
    return Attestation(
        cpu="tdx",
        nvidia_sdk="require",
        nvidia_sdk_python=str(SDK_PYTHON),
        nvidia_sdk_s=PATIENCE_S,
        rim_url=CLOSED,
        ocsp_url=CLOSED,
        nras_url=f"{CLOSED}/v3/attest/gpu",
    )


@pytest.fixture
def harnessed(sdk: Attestation, tmp_path: Path) -> Attestation:
    """The same with revocation answered: `[attestation] nvidia_sdk_python` is a script that runs
    the harness with the child it was asked to run."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {SDK_PYTHON} -I {HARNESS} "$2"\n')
    script.chmod(0o755)
    return msgspec.structs.replace(sdk, nvidia_sdk_python=str(script))


@pytest.fixture
def evidence() -> GpuEvidence:
    return GpuEvidence(
        scheme="nvidia_gpu",
        report=(H100 / "report.bin").read_bytes(),
        certificate_chain=(H100 / "chain.pem").read_bytes(),
    )


@pytest.fixture
def nonce() -> bytes:
    return bytes.fromhex((H100 / "nonce.hex").read_text().strip())


@dataclass
class Vendor:
    """A local HTTP server in the vendor's place; `answer` None accepts and stays silent."""

    url: str
    requests: list[tuple[str, bytes]] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    asked: trio.Event = field(default_factory=trio.Event)


@asynccontextmanager
async def vendor(
    answer: Callable[[str, bytes], tuple[int, bytes]] | None,
) -> AsyncIterator[Vendor]:
    async def serve(stream: trio.SocketStream) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += await stream.receive_some(65_536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        while length and len(body) < int(length[1]):
            body += await stream.receive_some(65_536)
        path = head.split()[1].decode()
        here.requests.append((path, body))
        here.heads.append(head)
        here.asked.set()
        if answer is None:
            await trio.sleep_forever()
        else:
            status, content = answer(path, body)
            await stream.send_all(
                b"HTTP/1.1 %d Said\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
                % (status, len(content), content)
            )
            await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        here = Vendor(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        try:
            yield here
        finally:
            nursery.cancel_scope.cancel()


def serve_rims(path: str, _body: bytes) -> tuple[int, bytes]:
    """As rim.attestation.nvidia.com: JSON with the file in base64, 404 for an unknown id."""
    file = H100 / f"{path.removeprefix('/v1/rim/')}.xml"
    if not file.is_file():
        return 404, b"{}"
    return 200, json.dumps({"rim": base64.b64encode(file.read_bytes()).decode()}).encode()


def ours_on(evidence: GpuEvidence, nonce: bytes) -> AttestationResult:
    """Our own verifier's result, now: the SDK reads the clock, and the vectors' reference values
    are signed by certificates that are valid until 2028-03-11."""
    anchors, at = load_anchors(), datetime.now(UTC)
    try:
        claims = nvidia_gpu.authenticate(evidence, root=anchors.nvidia_device, at=at, nonce=nonce)
    except (EvidenceError, Malformed) as error:
        lie = Finding(Tier.CONTRAINDICATED, "nvidia_gpu.authentic", "it", error.code, error.advice)
        return conclude({}, [lie])
    rims = [
        nvidia_gpu.authenticate_rim(path.read_bytes(), root=anchors.nvidia_rim, at=at)
        for path in sorted(H100.glob("*.xml"))
    ]
    return appraise_gpu(claims, rims, Policy())


def flipped(evidence: GpuEvidence, position: int) -> GpuEvidence:
    report = bytearray(evidence.report)
    report[position] ^= 0x01
    return GpuEvidence(evidence.scheme, bytes(report), evidence.certificate_chain)


def processes_of(scratch: Path) -> list[int]:
    """Every process whose HOME lies there; the children's does, and is inherited."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOME={scratch}/".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def nothing_is_left(scratch: Path) -> bool:
    return processes_of(scratch) == [] and list(scratch.iterdir()) == []


# ---- local mode -----------------------------------------------------------------------------


async def test_the_vendors_verifier_accepts_real_evidence_and_agrees(
    harnessed: Attestation, evidence: GpuEvidence, nonce: bytes, scratch: Path
) -> None:
    ours = ours_on(evidence, nonce)
    assert ours.verdict is Tier.AFFIRMING
    async with vendor(serve_rims) as service:
        settings = msgspec.structs.replace(harnessed, rim_url=f"{service.url}/v1/rim")
        opinion = await consult(settings, (evidence,), nonce, ours, log=LOG)
    assert opinion is not None
    assert opinion.verdict
    assert opinion.reason == ""
    assert [path for path, _ in service.requests] == [
        "/v1/rim/NV_GPU_DRIVER_GH100_595.71.05",
        "/v1/rim/NV_GPU_VBIOS_1010_0210_886_96009F0004",
    ]
    gpu: Any = opinion.claims[0]["gpus"]
    assert gpu["GPU-0"]["measres"] == "success"
    assert gpu["GPU-0"]["x-nvidia-gpu-driver-version"] == "595.71.05"
    assert gpu["GPU-0"]["hwmodel"] == "GH100 A01 GSP BROM"
    assert nothing_is_left(scratch)


@pytest.mark.parametrize(
    ("position", "why"),
    [
        (10, "nonce"),
        (200, "signature|Signature"),  # inside a measurement
        (-1, "signature|Signature"),
    ],
)
async def test_a_changed_report_byte_is_refused_by_both(
    harnessed: Attestation, evidence: GpuEvidence, nonce: bytes, position: int, why: str
) -> None:
    changed = flipped(evidence, position)
    ours = ours_on(changed, nonce)
    assert ours.verdict is Tier.CONTRAINDICATED
    async with vendor(serve_rims) as service:
        settings = msgspec.structs.replace(harnessed, rim_url=f"{service.url}/v1/rim")
        opinion = await consult(settings, (changed,), nonce, ours, log=LOG)
    assert opinion is not None
    assert not opinion.verdict
    assert re.search(why, opinion.reason)


async def test_a_boot_that_requires_agreement_ends_where_the_two_differ(
    harnessed: Attestation, evidence: GpuEvidence, nonce: bytes
) -> None:
    """Here because the policy asks for another driver, which is no matter of the SDK's."""
    refused = conclude(
        {}, [Finding(Tier.CONTRAINDICATED, "nvidia_gpu.driver", "580.95", "595.71.05", "Install.")]
    )
    async with vendor(serve_rims) as service:
        settings = msgspec.structs.replace(harnessed, rim_url=f"{service.url}/v1/rim")
        with pytest.raises(SecondOpinionFailed, match=r"nvidia_gpu\.driver.*accepts"):
            await consult(settings, (evidence,), nonce, refused, log=LOG)


async def test_the_service_key_is_sent_and_is_in_no_argument_no_variable_and_no_line(
    harnessed: Attestation, evidence: GpuEvidence, nonce: bytes, scratch: Path
) -> None:
    canary = "nvapi-CANARY"
    seen: list[bytes] = []

    def look(path: str, body: bytes) -> tuple[int, bytes]:
        for pid in processes_of(scratch):
            seen.extend(
                (Path(f"/proc/{pid}") / name).read_bytes() for name in ("cmdline", "environ")
            )
        return serve_rims(path, body)

    async with vendor(look) as service:
        settings = msgspec.structs.replace(harnessed, rim_url=f"{service.url}/v1/rim")
        with structlog.testing.capture_logs() as lines:
            opinion = await consult(
                *(settings, (evidence,), nonce, ours_on(evidence, nonce)),
                log=structlog.get_logger(),
                service_key=Secret(canary),
            )
    assert opinion is not None
    assert opinion.verdict
    assert service.heads
    assert all(b"Authorization: Bearer " + canary.encode() in head for head in service.heads)
    assert seen
    assert not any(canary.encode() in one for one in seen)
    assert canary not in repr(lines)
    assert canary not in repr((opinion.claims, opinion.tokens))


async def test_another_nonce_is_refused(harnessed: Attestation, evidence: GpuEvidence) -> None:
    async with vendor(serve_rims) as service:
        settings = msgspec.structs.replace(harnessed, rim_url=f"{service.url}/v1/rim")
        opinion = await second_opinion(settings, (evidence,), bytes(32), log=LOG)
    assert not opinion.verdict
    assert "nonce" in opinion.reason


async def test_a_bad_second_gpu_is_not_hidden_by_a_good_first_one(
    harnessed: Attestation, evidence: GpuEvidence, nonce: bytes, scratch: Path
) -> None:
    """In one call of the SDK it would be: the exception leaves the first verdict standing."""
    async with vendor(serve_rims) as service:
        settings = msgspec.structs.replace(harnessed, rim_url=f"{service.url}/v1/rim")
        opinion = await second_opinion(settings, (evidence, flipped(evidence, -1)), nonce, log=LOG)
    assert not opinion.verdict
    assert len(opinion.claims) == 2
    assert nothing_is_left(scratch)


async def test_other_reference_values_than_the_measured_ones_are_refused(
    harnessed: Attestation, evidence: GpuEvidence, nonce: bytes
) -> None:
    def serve_altered(path: str, body: bytes) -> tuple[int, bytes]:
        status, content = serve_rims(path, body)
        rim = base64.b64decode(json.loads(content)["rim"])
        changed = re.sub(rb'(Hash0=")(.)', lambda m: m[1] + (b"1" if m[2] != b"1" else b"2"), rim)
        return status, json.dumps({"rim": base64.b64encode(changed).decode()}).encode()

    async with vendor(serve_altered) as service:
        settings = msgspec.structs.replace(harnessed, rim_url=f"{service.url}/v1/rim")
        opinion = await second_opinion(settings, (evidence,), nonce, log=LOG)
    assert not opinion.verdict
    assert "RIM signature verification failed" in opinion.reason


async def test_a_blackwell_is_verified_as_one(harnessed: Attestation) -> None:
    """Its reference values are not among the vectors: that they are asked for, under Blackwell's
    kind of name, shows that chain, firmware digest, nonce and signature were accepted. (This early
    report does not name its chip, which the SDK puts into the id unseen.)"""
    folder = VECTORS / "nvidia" / "nvat_unit"
    report = bytes.fromhex(
        re.sub(r"0x|\\x|\s", "", (folder / "blackwellAttestationReport.txt").read_text())
    )
    evidence = GpuEvidence("nvidia_gpu", report, (folder / "blackwellCertChain.txt").read_bytes())
    async with vendor(serve_rims) as service:
        settings = msgspec.structs.replace(harnessed, rim_url=f"{service.url}/v1/rim")
        with pytest.raises(EndorsementsUnavailable, match=r"NV_GPU_CC_DRIVER_.*_575\.32"):
            await second_opinion(settings, (evidence,), report[4:36], log=LOG)
    assert len(service.requests) == 1


# ---- endpoints that do not answer -----------------------------------------------------------


async def test_without_revocation_answers_there_is_no_opinion(
    sdk: Attestation, evidence: GpuEvidence, nonce: bytes, scratch: Path
) -> None:
    with trio.fail_after(PATIENCE_S), pytest.raises(EndorsementsUnavailable, match="OCSP"):
        await second_opinion(sdk, (evidence,), nonce, log=LOG)
    assert nothing_is_left(scratch)


@pytest.mark.parametrize(
    "answer", [lambda *_: (500, b""), lambda *_: (404, b"{}"), lambda *_: (200, b"<html>")]
)
async def test_without_reference_values_there_is_no_opinion(
    harnessed: Attestation,
    evidence: GpuEvidence,
    nonce: bytes,
    answer: Callable[[str, bytes], tuple[int, bytes]],
) -> None:
    async with vendor(answer) as service:
        settings = msgspec.structs.replace(harnessed, rim_url=service.url)
        with pytest.raises(EndorsementsUnavailable, match="RIM"):
            await second_opinion(settings, (evidence,), nonce, log=LOG)


async def test_an_ocsp_responder_that_says_try_later_gives_no_opinion(
    sdk: Attestation, evidence: GpuEvidence, nonce: bytes
) -> None:
    try_later = ocsp.OCSPResponseBuilder.build_unsuccessful(
        ocsp.OCSPResponseStatus.TRY_LATER
    ).public_bytes(serialization.Encoding.DER)
    async with vendor(lambda *_: (200, try_later)) as service:
        settings = msgspec.structs.replace(sdk, ocsp_url=service.url)
        with pytest.raises(EndorsementsUnavailable, match="not successful"):
            await second_opinion(settings, (evidence,), nonce, log=LOG)


# ---- the process ----------------------------------------------------------------------------


async def test_a_hanging_child_is_killed_at_the_deadline(
    sdk: Attestation, evidence: GpuEvidence, nonce: bytes, scratch: Path
) -> None:
    """The SDK itself gives up on an endpoint after 10 s."""
    async with vendor(None) as service:
        settings = msgspec.structs.replace(sdk, ocsp_url=service.url, nvidia_sdk_s=3.0)
        started = trio.current_time()
        with pytest.raises(SecondOpinionFailed, match="no verdict within 3 s"):
            await second_opinion(settings, (evidence,), nonce, log=LOG)
        assert trio.current_time() - started < 6.0
        assert service.asked.is_set()
    assert nothing_is_left(scratch)


async def test_what_the_sdk_writes_stays_in_its_folder_and_goes_with_it(
    sdk: Attestation, evidence: GpuEvidence, nonce: bytes, scratch: Path
) -> None:
    async with vendor(None) as service, trio.open_nursery() as nursery:
        settings = msgspec.structs.replace(sdk, ocsp_url=service.url)
        nursery.start_soon(partial(second_opinion, settings, (evidence,), nonce, log=LOG))
        with trio.fail_after(PATIENCE_S):
            await service.asked.wait()
        [folder] = scratch.iterdir()
        assert folder.stat().st_mode & 0o077 == 0
        assert {file.name for file in folder.iterdir()} >= {"attestation_sdk.log", "verifier.log"}
        assert len(processes_of(scratch)) == 1
        cancelled_at = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - cancelled_at < 3.0
    assert nothing_is_left(scratch)
    assert not Path("verifier.log").exists()
    assert not Path("attestation_sdk.log").exists()


async def test_a_child_whose_parent_is_gone_ends(
    sdk: Attestation, evidence: GpuEvidence, nonce: bytes, tmp_path: Path
) -> None:
    async with vendor(None) as service:
        settings = msgspec.structs.replace(sdk, ocsp_url=service.url)
        process = await trio.lowlevel.open_process(
            [str(SDK_PYTHON), "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=tmp_path,
        )
        assert process.stdin is not None
        with trio.fail_after(PATIENCE_S):
            await process.stdin.send_all(nvidia_sdk._request(settings, evidence, nonce, None))
            await service.asked.wait()
            asked_at = trio.current_time()
            await process.stdin.aclose()  # what the kernel does when a parent dies
            assert await process.wait() == -9
        assert trio.current_time() - asked_at < 3.0  # the SDK alone would wait 10 s


async def test_nothing_of_nonce_or_evidence_reaches_the_log(
    sdk: Attestation, evidence: GpuEvidence, nonce: bytes
) -> None:
    with structlog.testing.capture_logs() as entries, pytest.raises(EndorsementsUnavailable):
        await second_opinion(sdk, (evidence,), nonce, log=LOG)
    said = repr(entries)
    assert "discarded_bytes" in said  # there was something to discard
    assert nonce.hex() not in said
    assert base64.b64encode(evidence.report).decode()[:64] not in said


async def test_an_environment_without_the_sdk_gives_no_opinion(
    sdk: Attestation, evidence: GpuEvidence, nonce: bytes, scratch: Path
) -> None:
    settings = msgspec.structs.replace(sdk, nvidia_sdk_python=sys.executable)
    with pytest.raises(SecondOpinionFailed, match="No module named 'nv_attestation_sdk'"):
        await second_opinion(settings, (evidence,), nonce, log=LOG)
    assert nothing_is_left(scratch)


# ---- remote mode: against local servers only, not tried against NVIDIA's service -------------


class Nras:
    """Speaks NRAS v3: a detached EAT, its overall claims signed with ES384, and a JWKS."""

    def __init__(self, nonce: bytes, *, verdict: bool = True) -> None:
        self._key = ec.generate_private_key(ec.SECP384R1())
        self._nonce, self._verdict = nonce, verdict

    def __call__(self, path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/.well-known/jwks.json":
            key = {"kid": "one", "x5c": [base64.b64encode(self._certificate()).decode()]}
            return 200, json.dumps({"keys": [key]}).encode()
        gpu = self._sign({"measres": "success", "x-nvidia-gpu-arch-check": self._verdict})
        overall = {
            "eat_nonce": self._nonce.hex(),
            "x-nvidia-overall-att-result": self._verdict,
            "exp": int(datetime.now(UTC).timestamp()) + 600,
        }
        return 200, json.dumps([["JWT", self._sign(overall)], {"GPU-0": gpu}]).encode()

    def _certificate(self) -> bytes:
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "NRAS of this test")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(1)
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .sign(self._key, hashes.SHA384())
        )
        return certificate.public_bytes(serialization.Encoding.DER)

    def _sign(self, claims: dict[str, object]) -> str:
        def encode(data: bytes) -> str:
            return base64.urlsafe_b64encode(data).decode().rstrip("=")

        header = {"alg": "ES384", "kid": "one", "typ": "JWT"}
        text = f"{encode(json.dumps(header).encode())}.{encode(json.dumps(claims).encode())}"
        r, s = decode_dss_signature(self._key.sign(text.encode(), ec.ECDSA(hashes.SHA384())))
        return f"{text}.{encode(r.to_bytes(48, 'big') + s.to_bytes(48, 'big'))}"


def remote(sdk: Attestation, service: Vendor) -> Attestation:
    return msgspec.structs.replace(
        sdk, nvidia_sdk_mode="remote", nras_url=f"{service.url}/v3/attest/gpu"
    )


@pytest.mark.parametrize("verdict", [True, False])
async def test_the_remote_mode_asks_the_configured_service_for_the_verdict(
    sdk: Attestation, evidence: GpuEvidence, nonce: bytes, verdict: bool
) -> None:
    async with vendor(Nras(nonce, verdict=verdict)) as service:
        opinion = await second_opinion(
            remote(sdk, service), (evidence,), nonce, log=LOG, service_key=Secret("nvapi-CANARY")
        )
    assert opinion.verdict is verdict
    assert b"Authorization: Bearer nvapi-CANARY" in service.heads[0]
    path, body = service.requests[0]
    asked = json.loads(body)
    assert path == "/v3/attest/gpu"
    assert asked["nonce"] == nonce.hex()
    assert asked["arch"] == "HOPPER"
    [item] = asked["evidence_list"]
    assert base64.b64decode(item["evidence"]) == evidence.report
    chain = x509.load_pem_x509_certificates(base64.b64decode(item["certificate"]))
    assert chain == x509.load_pem_x509_certificates(evidence.certificate_chain)


async def test_a_token_for_another_nonce_is_no_opinion(
    sdk: Attestation, evidence: GpuEvidence, nonce: bytes
) -> None:
    async with vendor(Nras(bytes(32))) as service:
        with pytest.raises(SecondOpinionFailed, match="another nonce"):
            await second_opinion(remote(sdk, service), (evidence,), nonce, log=LOG)


async def test_a_token_with_a_bad_signature_is_no_opinion(
    sdk: Attestation, evidence: GpuEvidence, nonce: bytes
) -> None:
    signer, publisher = Nras(nonce), Nras(nonce)

    def answer(path: str, body: bytes) -> tuple[int, bytes]:
        return (publisher if path.endswith("jwks.json") else signer)(path, body)

    async with vendor(answer) as service:
        with pytest.raises(SecondOpinionFailed, match="no token of NVIDIA's service verified"):
            await second_opinion(remote(sdk, service), (evidence,), nonce, log=LOG)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, SecondOpinionFailed),
        (429, EndorsementsUnavailable),
        (503, EndorsementsUnavailable),
    ],
)
async def test_a_service_that_refuses_gives_no_opinion(
    sdk: Attestation,
    evidence: GpuEvidence,
    nonce: bytes,
    status: int,
    error: type[Exception],
) -> None:
    async with vendor(lambda *_: (status, b'{"error": "no"}')) as service:
        with pytest.raises(error, match=f"status {status}"):
            await second_opinion(remote(sdk, service), (evidence,), nonce, log=LOG)


async def test_a_service_that_is_not_there_gives_no_opinion(
    sdk: Attestation, evidence: GpuEvidence, nonce: bytes
) -> None:
    settings = msgspec.structs.replace(sdk, nvidia_sdk_mode="remote")
    with pytest.raises(EndorsementsUnavailable, match=r"Max retries exceeded"):
        await second_opinion(settings, (evidence,), nonce, log=LOG)
