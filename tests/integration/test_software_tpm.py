"""Evidence from a real TPM in software: collected with tpm2-tools, authenticated, appraised."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.attester.azure import USER_DATA_INDEX, collect_azure
from appliance.attester.vtpm import Tpm, collect_tpm2
from appliance.config import Attestation, Policy
from appliance.errors import DeviceFault, ProviderAbsent, Unauthentic, Unbound
from appliance.rats.chain import der_of
from appliance.rats.model import Anchors
from appliance.rats.policy.tpm import appraise_azure_vtpm, appraise_tpm2
from appliance.rats.reference import ImageReference
from appliance.rats.result import Tier
from appliance.rats.schemes import azure_vtpm, tpm2
from appliance.wire.tpm import parse_pcrs, parse_quote
from tests.fakes.amd_evidence import NOW, Guest
from tests.fakes.authority import Authority
from tests.fakes.azure_evidence import (
    REPORT_DATA,
    certification,
    hcl_report,
    runtime_claims,
    serve_imds,
)
from tests.fakes.software_tpm import (
    RESTRICTED,
    Firmware,
    SoftwareTpm,
    needs_software_tpm,
    software_tpm,
)

pytestmark = needs_software_tpm

AK = 0x81010001
CERTIFICATE = 0x01C10000  # Google's index for the certificate of its RSA key
TEMPLATE = 0x01C10001
NONCE = hashlib.sha256(b"statement").digest()
OTHER_NONCE = hashlib.sha256(b"another statement").digest()


@pytest.fixture
def tpm() -> Iterator[SoftwareTpm]:
    with software_tpm() as started:
        yield started


@pytest.fixture
def authority() -> Authority:
    return Authority("TPM vendor", now=NOW)


@pytest.fixture
def log_file(tpm: SoftwareTpm, tmp_path: Path) -> Path:
    """A measured boot: PCRs and the log that explains them."""
    path = tmp_path / "binary_bios_measurements"
    path.write_bytes(Firmware(tpm).boot().log)
    return path


def settings(tpm: SoftwareTpm, **changes: object) -> Attestation:
    base = Attestation(cpu="tpm2", tpm=tpm.tcti, tpm_ak_handle=AK)
    return msgspec.structs.replace(base, **changes)


def certify(tpm: SoftwareTpm, authority: Authority, *, padding: int = 0) -> None:
    """The vendor's certificate of the key that was made last, in its NV index."""
    certificate = authority.issue(tpm.public_key(), ["ak"], purposes=None)
    tpm.nv_write(CERTIFICATE, der_of(certificate) + b"\xff" * padding)


@pytest.fixture
def certified(tpm: SoftwareTpm, authority: Authority) -> Attestation:
    tpm.key(AK)
    certify(tpm, authority)
    return settings(tpm)


async def test_a_real_quote_is_collected_and_authenticated(
    certified: Attestation, authority: Authority, log_file: Path
) -> None:
    with trio.fail_after(30):
        evidence = await collect_tpm2(certified, NONCE, event_log=log_file)
    claims = tpm2.authenticate(evidence, roots=(authority.certificate,), at=NOW)
    assert claims.report_data == NONCE
    assert sorted(claims.pcrs) == list(range(16))
    assert claims.replayed == (0, 1, 2, 3, 4, 5, 6, 7, 11)
    assert claims.pcrs[12] == bytes(32)
    reference = {f"pcr{pcr}": frozenset({claims.pcrs[pcr].hex()}) for pcr in (4, 7, 11)}
    result = appraise_tpm2(claims, Policy(), reference=reference, report_data=NONCE)
    assert result.verdict is Tier.WARNING  # a TPM protects no memory
    assert [one.check for one in result.findings] == ["tpm2.memory"]


async def test_without_a_log_the_quote_stands_for_itself(
    certified: Attestation, authority: Authority, tmp_path: Path
) -> None:
    evidence = await collect_tpm2(certified, NONCE, event_log=tmp_path / "none")
    claims = tpm2.authenticate(evidence, roots=(authority.certificate,), at=NOW)
    assert "event_log" not in evidence.parts
    assert claims.replayed == ()


async def test_a_wrong_nonce_is_refused(
    certified: Attestation, authority: Authority, log_file: Path
) -> None:
    evidence = await collect_tpm2(certified, OTHER_NONCE, event_log=log_file)
    claims = tpm2.authenticate(evidence, roots=(authority.certificate,), at=NOW)
    result = appraise_tpm2(claims, Policy(), reference=None, report_data=NONCE)
    assert result.verdict is Tier.CONTRAINDICATED
    assert "tpm2.report_data" in {one.check for one in result.findings}


async def test_a_pcr_that_changed_after_the_log_is_refused_by_name(
    tpm: SoftwareTpm, certified: Attestation, authority: Authority, log_file: Path
) -> None:
    tpm.extend(4, hashlib.sha256(b"another boot loader").digest())
    evidence = await collect_tpm2(certified, NONCE, event_log=log_file)
    with pytest.raises(Unbound, match="PCR 4"):
        tpm2.authenticate(evidence, roots=(authority.certificate,), at=NOW)


async def test_a_pcr_that_changed_after_the_reference_is_refused(
    tpm: SoftwareTpm, certified: Attestation, authority: Authority, tmp_path: Path
) -> None:
    roots = (authority.certificate,)
    before = tpm2.authenticate(await collect_tpm2(certified, NONCE), roots=roots, at=NOW)
    reference = {f"pcr{pcr}": frozenset({before.pcrs[pcr].hex()}) for pcr in (4, 7, 11)}
    tpm.extend(11, hashlib.sha256(b"another kernel").digest())
    tpm.extend(12, hashlib.sha256(b"a credential").digest())
    evidence = await collect_tpm2(certified, NONCE, event_log=tmp_path / "none")
    after = tpm2.authenticate(evidence, roots=roots, at=NOW)
    result = appraise_tpm2(after, Policy(), reference=reference, report_data=NONCE)
    assert result.verdict is Tier.CONTRAINDICATED
    assert {"tpm2.pcr11", "tpm2.pcr12"} <= {one.check for one in result.findings}


async def test_the_phases_that_systemd_measures_are_known(
    tpm: SoftwareTpm, certified: Attestation, authority: Authority, log_file: Path
) -> None:
    for phase in (b"enter-initrd", b"leave-initrd", b"sysinit"):
        tpm.extend(11, hashlib.sha256(phase).digest())
    roots = (authority.certificate,)
    evidence = await collect_tpm2(certified, NONCE, event_log=log_file)
    assert 11 in tpm2.authenticate(evidence, roots=roots, at=NOW).replayed
    tpm.extend(11, hashlib.sha256(b"sysinit").digest())  # not twice
    evidence = await collect_tpm2(certified, NONCE, event_log=log_file)
    with pytest.raises(Unbound, match="PCR 11"):
        tpm2.authenticate(evidence, roots=roots, at=NOW)


async def test_another_attestation_key_is_refused(
    tpm: SoftwareTpm, certified: Attestation, authority: Authority, log_file: Path
) -> None:
    """A key of the same TPM that the vendor did not certify signs in place of the one it did."""
    unique = (256).to_bytes(2, "little") + b"\x07" * 256
    tpm.key(AK + 1, unique=unique)
    other = settings(tpm, tpm_ak_handle=AK + 1)
    evidence = await collect_tpm2(other, NONCE, event_log=log_file)
    with pytest.raises(Unauthentic, match="signature"):
        tpm2.authenticate(evidence, roots=(authority.certificate,), at=NOW)


async def test_a_certificate_of_another_vendor_is_refused(
    certified: Attestation, log_file: Path
) -> None:
    evidence = await collect_tpm2(certified, NONCE, event_log=log_file)
    other = Authority("TPM vendor", now=NOW)  # the same name, another key
    with pytest.raises(Unauthentic):
        tpm2.authenticate(evidence, roots=(other.certificate,), at=NOW)
    with pytest.raises(Unauthentic, match="tpm_roots_file"):
        tpm2.authenticate(evidence, roots=(), at=NOW)


async def test_the_key_is_made_from_googles_template(
    tpm: SoftwareTpm, authority: Authority, log_file: Path
) -> None:
    """No persistent handle: the template behind the certificate's index makes the same key."""
    public = tpm.key(None)
    template = bytearray(public.read_bytes())
    template[-256:] = bytes(256)  # what Google leaves in `unique`
    tpm.key(None, unique=(256).to_bytes(2, "little") + bytes(256))
    certify(tpm, authority, padding=100)
    tpm.nv_write(TEMPLATE, bytes(template))
    for _ in range(4):  # more often than a TPM has places for keys
        evidence = await collect_tpm2(settings(tpm), NONCE, event_log=log_file)
        claims = tpm2.authenticate(evidence, roots=(authority.certificate,), at=NOW)
        assert claims.report_data == NONCE


async def test_the_same_with_a_key_on_a_curve(
    tpm: SoftwareTpm, authority: Authority, log_file: Path
) -> None:
    blank = 2 * ((32).to_bytes(2, "little") + bytes(32))
    public = tpm.key(None, algorithm="ecc256:ecdsa-sha256:null", unique=blank)
    key = tpm2.parse_public_key(public.read_bytes())
    certificate = authority.issue(key, ["ak"], purposes=None)
    template = public.read_bytes()[:-68] + 2 * ((32).to_bytes(2) + bytes(32))
    tpm.nv_write(CERTIFICATE + 2, der_of(certificate).ljust(700, b"\0"))
    tpm.nv_write(CERTIFICATE + 3, template)
    configured = settings(tpm, tpm_ak_certificate_index=CERTIFICATE + 2)
    evidence = await collect_tpm2(configured, NONCE, event_log=log_file)
    claims = tpm2.authenticate(evidence, roots=(authority.certificate,), at=NOW)
    assert claims.report_data == NONCE


async def test_what_is_not_there_is_named(tpm: SoftwareTpm, certified: Attestation) -> None:
    with pytest.raises(ProviderAbsent, match="tpm2_quote"):
        await collect_tpm2(msgspec.structs.replace(certified, tpm_ak_handle=AK + 5), NONCE)
    with pytest.raises(ProviderAbsent, match="tpm2_nvread"):
        absent = msgspec.structs.replace(certified, tpm_ak_certificate_index=0x01C10020)
        await collect_tpm2(absent, NONCE)
    with pytest.raises(ProviderAbsent, match="cannot be reached"):
        await collect_tpm2(msgspec.structs.replace(certified, tpm="swtpm:path=/nowhere"), NONCE)
    with pytest.raises(ProviderAbsent, match="tpm2_nvread"):
        await collect_azure(certified, NONCE)  # the TPM is there and is not Azure's
    tpm.nv_write(0x01C10040, b"no certificate")
    nonsense = msgspec.structs.replace(certified, tpm_ak_certificate_index=0x01C10040)
    with pytest.raises(DeviceFault, match="certificate"):
        await collect_tpm2(nonsense, NONCE)


async def test_a_tpm_that_hangs_ends_with_the_callers_deadline(tmp_path: Path) -> None:
    """Nobody answers at the other end; the tool is gone when the collector is."""
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        for name in (str(path), f"{path}.ctrl"):
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(name)
            server.listen()
        silent = Attestation(cpu="tpm2", tpm=f"swtpm:path={path}")
        started = trio.current_time()
        with trio.move_on_after(0.5) as scope:
            await collect_tpm2(silent, NONCE, event_log=tmp_path / "none")
        assert scope.cancelled_caught
        assert trio.current_time() - started < 5


def test_a_key_that_signs_anything_is_no_attestation_key(tpm: SoftwareTpm) -> None:
    """tpm2_readpublic's own bytes of a restricted key, and of one that is not."""
    restricted = tpm.key(None).read_bytes()
    assert tpm2.parse_public_key(restricted) == tpm.public_key()
    in_tpm2b = len(restricted).to_bytes(2) + restricted
    assert tpm2.parse_public_key(in_tpm2b) == tpm.public_key()
    free = tpm.key(None, attributes=RESTRICTED.replace("|restricted", "")).read_bytes()
    with pytest.raises(Unauthentic, match="restricted"):
        tpm2.parse_public_key(free)


def test_every_form_of_tpm2_tools_pcr_values_reads_the_same(tpm: SoftwareTpm) -> None:
    Firmware(tpm).boot()
    tpm.key(AK)
    quote = ("tpm2_quote", "-c", f"{AK:#x}", "-q", NONCE.hex(), "-m", "message", "-s", "signature")
    tpm.tool(*quote, "-l", "sha256:4,7,11,12", "-o", "serialized")
    message = (tpm.folder / "message").read_bytes()
    serialized = parse_pcrs((tpm.folder / "serialized").read_bytes())
    tpm.tool(*quote, "-l", "sha256:4,7,11,12", "-o", "values", "-F", "values")
    selected = parse_quote(message).selections[0].pcrs
    assert selected == (4, 7, 11, 12)
    values = parse_pcrs((tpm.folder / "values").read_bytes(), selected=selected)
    text = parse_pcrs(tpm.tool("tpm2_pcrread", "sha1:0,1+sha256:4,7,11,12"))
    assert serialized == values == text
    tpm.tool(*quote, "-l", "sha1:0,1,2+sha256:4,7,11,12", "-o", "both")
    assert parse_pcrs((tpm.folder / "both").read_bytes()) == serialized
    tpm.tool("tpm2_pcrread", "sha256:all", "-o", "all")
    whole = parse_pcrs((tpm.folder / "all").read_bytes())
    assert {pcr: whole[pcr] for pcr in selected} == serialized
    document = {"sha256": {str(pcr): value.hex() for pcr, value in serialized.items()}}
    assert parse_pcrs(json.dumps(document).encode()) == serialized


@pytest.mark.parametrize(
    ("algorithm", "form", "hash"),
    [
        ("rsa2048:rsassa-sha256:null", "tss", "sha256"),
        ("rsa2048:rsassa-sha256:null", "plain", "sha256"),
        ("rsa2048:rsapss-sha256:null", "tss", "sha256"),
        ("rsa3072:rsassa-sha384:null", "tss", "sha384"),
        ("ecc256:ecdsa-sha256:null", "tss", "sha256"),
        ("ecc256:ecdsa-sha256:null", "plain", "sha256"),
        ("ecc384:ecdsa-sha384:null", "tss", "sha384"),
    ],
)
def test_every_kind_of_signature_is_checked(
    tpm: SoftwareTpm, algorithm: str, form: str, hash: str
) -> None:
    key = tpm2.parse_public_key(tpm.key(AK, algorithm=algorithm).read_bytes())
    tpm.extend(4, hashlib.sha256(b"uki").digest())
    tpm.tool(
        *("tpm2_quote", "-c", f"{AK:#x}", "-l", "sha256:0,4", "-q", NONCE.hex(), "-g", hash),
        *("-m", "message", "-s", "signature", "-f", form, "-o", "pcrs", "-F", "values"),
        *("--scheme", algorithm.split(":")[1].partition("-")[0]),
    )
    message, signature, values = (
        (tpm.folder / name).read_bytes() for name in ("message", "signature", "pcrs")
    )
    pcrs = parse_pcrs(values, selected=(0, 4))
    claims = tpm2.authenticate_quote(message, signature, key, pcrs)
    assert claims.report_data == NONCE
    assert claims.reset_count == 1
    with pytest.raises(Unbound, match="PCR values"):
        tpm2.authenticate_quote(message, signature, key, pcrs | {4: bytes(32)})
    with pytest.raises(Unbound, match="PCR 4"):
        tpm2.authenticate_quote(message, signature, key, {0: pcrs[0]})
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(Unauthentic):
        tpm2.authenticate_quote(message, signature, stranger, pcrs)


class AzureMachine:
    """A software TPM with what Azure's paravisor would have put into it."""

    def __init__(self, tpm: SoftwareTpm) -> None:
        tpm.key(0x81000003)
        claims = runtime_claims(tpm.public_key())
        bound = hashlib.sha256(claims).digest().ljust(64, b"\0")
        self.guest = Guest(report={REPORT_DATA: bound})
        self.anchors = Anchors(amd=(self.guest.roots,))
        # A software TPM's indexes have at most 2048 bytes, as Azure's once had.
        tpm.nv_write(0x01400001, hcl_report(self.guest.raw_report(), claims, length=2048))

    def answer(self, line: bytes, body: bytes) -> tuple[int, bytes]:
        if line == b"GET /metadata/THIM/amd/certification HTTP/1.1":
            return 200, certification(self.guest)
        return 404, b"{}"


async def test_an_azure_machine_is_collected_authenticated_and_affirmed(
    tpm: SoftwareTpm, log_file: Path
) -> None:
    machine = AzureMachine(tpm)
    async with trio.open_nursery() as nursery:
        url = await nursery.start(serve_imds, machine.answer)
        configured = settings(tpm, cpu="azure_vtpm", imds_url=url)
        with trio.fail_after(30):
            evidence = await collect_azure(configured, NONCE, event_log=log_file)
            again = await collect_azure(configured, OTHER_NONCE, event_log=log_file)
        nursery.cancel_scope.cancel()
    assert tpm.nv_read(USER_DATA_INDEX) == OTHER_NONCE.ljust(64, b"\0")
    claims = azure_vtpm.authenticate(evidence, anchors=machine.anchors, at=NOW)
    assert claims.report_data == NONCE
    assert claims.tpm.replayed == (0, 1, 2, 3, 4, 5, 6, 7, 11)
    assert (
        azure_vtpm.authenticate(again, anchors=machine.anchors, at=NOW).report_data == OTHER_NONCE
    )
    image = ImageReference(
        "sha256:" + "0" * 64,
        pcrs={f"pcr{pcr}": frozenset({claims.tpm.pcrs[pcr].hex()}) for pcr in (4, 7, 11)},
        azure={"paravisor_measurement": frozenset({claims.hardware.measurements["measurement"]})},
    )
    result = appraise_azure_vtpm(claims, Policy(), reference=image, report_data=NONCE)
    # The machine's part is all as it should be; nobody has asked AMD about revocation yet.
    assert [one.check for one in result.all_findings()] == ["sev_snp.revocation"]


async def test_a_quote_by_a_key_that_the_paravisor_does_not_name_is_refused(
    tpm: SoftwareTpm, log_file: Path
) -> None:
    machine = AzureMachine(tpm)
    tpm.tool("tpm2_evictcontrol", "-C", "o", "-c", "0x81000003")
    tpm.key(0x81000003, unique=(256).to_bytes(2, "little") + b"\x07" * 256)
    async with trio.open_nursery() as nursery:
        url = await nursery.start(serve_imds, machine.answer)
        configured = settings(tpm, cpu="azure_vtpm", imds_url=url)
        evidence = await collect_azure(configured, NONCE, event_log=log_file)
        nursery.cancel_scope.cancel()
    with pytest.raises(Unauthentic, match="signature"):
        azure_vtpm.authenticate(evidence, anchors=machine.anchors, at=NOW)


async def test_the_hosts_silence_only_leaves_out_the_certificate(
    tpm: SoftwareTpm, log_file: Path
) -> None:
    machine = AzureMachine(tpm)
    async with trio.open_nursery() as nursery:
        url = await nursery.start(serve_imds, lambda line, body: (503, b"{}"))
        configured = settings(tpm, cpu="azure_vtpm", imds_url=url)
        evidence = await collect_azure(configured, NONCE, event_log=log_file)
        nursery.cancel_scope.cancel()
    assert evidence.endorsements == {}
    with pytest.raises(Unauthentic, match="VCEK"):
        azure_vtpm.authenticate(evidence, anchors=machine.anchors, at=NOW)


async def test_a_tdreport_is_exchanged_for_a_quote(tpm: SoftwareTpm, log_file: Path) -> None:
    tpm.key(0x81000003)
    td_report = b"\x81" + bytes(1022) + b"\x01"
    claims = runtime_claims(tpm.public_key())
    tpm.nv_write(0x01400001, hcl_report(td_report, claims, report_type=4, length=2048))
    asked: list[bytes] = []

    def answer(line: bytes, body: bytes) -> tuple[int, bytes]:
        asked.append(line + b" " + body)
        return 200, b'{"quote":"BAACAIEA_w"}'

    async with trio.open_nursery() as nursery:
        url = await nursery.start(serve_imds, answer)
        configured = settings(tpm, cpu="azure_vtpm", imds_url=url)
        evidence = await collect_azure(configured, NONCE, event_log=log_file)
        nursery.cancel_scope.cancel()
    assert evidence.parts["td_quote"] == bytes.fromhex("040002008100ff")
    (question,) = asked
    assert question.startswith(b"POST /acc/tdquote HTTP/1.1 ")
    sent = json.loads(question.partition(b"HTTP/1.1 ")[2])
    assert len(sent["report"]) == 1366  # 1024 bytes, unpadded
    assert sent["report"].startswith("gQAA")


@pytest.mark.parametrize(
    "reply",
    [
        (500, b"{}"),
        (200, b"<html>"),
        (200, b"[]"),
        (200, b"{}"),
        (200, b'{"quote":5}'),
        (200, b'{"quote":"A"}'),
        (200, b" " * (2 << 20)),
    ],
    ids=["error", "no JSON", "no object", "no quote", "a number", "no base64", "too long"],
)
async def test_without_a_td_quote_there_is_no_evidence(
    tpm: SoftwareTpm, tmp_path: Path, reply: tuple[int, bytes]
) -> None:
    tpm.key(0x81000003)
    report = hcl_report(bytes(1024), runtime_claims(tpm.public_key()), report_type=4)
    tpm.nv_write(0x01400001, report)
    async with trio.open_nursery() as nursery:
        url = await nursery.start(serve_imds, lambda line, body: reply)
        configured = settings(tpm, cpu="azure_vtpm", imds_url=url)
        with pytest.raises(DeviceFault):
            await collect_azure(configured, NONCE, event_log=tmp_path / "none")
        nursery.cancel_scope.cancel()


async def test_a_host_that_says_nothing_is_given_up(tpm: SoftwareTpm, tmp_path: Path) -> None:
    """It takes the connection and is silent; and it is not there at all."""
    tpm.key(0x81000003)
    report = hcl_report(bytes(1024), runtime_claims(tpm.public_key()), report_type=4)
    tpm.nv_write(0x01400001, report)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        configured = settings(tpm, cpu="azure_vtpm", imds_url=url, endorsement_s=0.2)
        with pytest.raises(DeviceFault, match=r"no answer in 0\.2 s"):
            await collect_azure(configured, NONCE, event_log=tmp_path / "none")
    with pytest.raises(DeviceFault, match="ConnectError"):
        await collect_azure(configured, NONCE, event_log=tmp_path / "none")


async def test_what_the_tpm_holds_must_be_what_belongs_there(
    tpm: SoftwareTpm, authority: Authority, tmp_path: Path
) -> None:
    free = tpm.key(
        0x81000003, algorithm="rsa2048:null:null", attributes=RESTRICTED.replace("|restricted", "")
    )
    certify(tpm, authority)
    tpm.nv_write(0x01400001, b"HCLA" + bytes(2000))
    with pytest.raises(DeviceFault, match="HCL report"):
        await collect_azure(settings(tpm), NONCE, event_log=tmp_path / "none")
    tpm.nv_write(TEMPLATE, free.read_bytes())
    with pytest.raises(DeviceFault, match="signing scheme"):
        await collect_tpm2(settings(tpm), NONCE)
    tpm.tool("tpm2_nvundefine", "-C", "o", f"{TEMPLATE:#x}")
    tpm.nv_write(TEMPLATE, b"no template")
    with pytest.raises(DeviceFault, match="template"):
        await collect_tpm2(settings(tpm), NONCE)


async def test_a_log_or_a_tool_that_is_not_usable_is_named(
    tpm: SoftwareTpm, certified: Attestation, tmp_path: Path
) -> None:
    with pytest.raises(DeviceFault, match="Is a directory"):
        await collect_tpm2(certified, NONCE, event_log=tmp_path)
    (tmp_path / "log").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(DeviceFault, match="at most"):
        await collect_tpm2(certified, NONCE, event_log=tmp_path / "log")
    one = Tpm(tpm.tcti, tmp_path)
    with pytest.raises(ProviderAbsent, match="not installed"):
        await one.run("tpm2_nosuchtool")
    with pytest.raises(DeviceFault, match="exit status"):
        await one.run("tpm2_quote", "--no-such-option")
    with pytest.raises(DeviceFault, match="wrote none"):
        one.read("quote")
