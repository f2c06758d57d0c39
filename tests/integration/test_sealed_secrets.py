"""Sealed without the machine, given out by a real TPM in software after the right boot, and only then."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import trio

from appliance.attester.unseal import run_unseal, unseal
from appliance.config import Attestation
from appliance.errors import EX_NOPERM, Malformed, SealRefused
from appliance.log import configure_log
from appliance.wire.sealed import PCRS, SealedSecret, parse_storage_key
from image.seal import seal
from tests.fakes.software_tpm import Firmware, SoftwareTpm, needs_software_tpm, software_tpm
from tests.integration.test_software_tpm import settings as tpm_settings

pytestmark = needs_software_tpm

ROOT = Path(__file__).resolve().parents[2]
SECRET = b"nvapi-CANARY_0123456789-abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def tpm() -> Iterator[SoftwareTpm]:
    """After a measured boot."""
    with software_tpm() as started:
        Firmware(started).boot()
        yield started


def pcrs_of(tpm: SoftwareTpm) -> dict[int, bytes]:
    names = ",".join(str(pcr) for pcr in PCRS)
    tpm.tool("tpm2_pcrread", f"sha256:{names}", "-o", "pcrs")
    data = (tpm.folder / "pcrs").read_bytes()
    return {pcr: data[32 * at : 32 * at + 32] for at, pcr in enumerate(PCRS)}


async def storage_key_of(tpm: SoftwareTpm) -> bytes:
    storage_key, _ = await unseal(tpm_settings(tpm), ())
    return storage_key


async def sealed_for(tpm: SoftwareTpm, name: str = "nvidia") -> SealedSecret:
    return seal(name, SECRET, pcrs=pcrs_of(tpm), storage_key=await storage_key_of(tpm))


async def given_out(tpm: SoftwareTpm, *sealed: SealedSecret) -> dict[str, bytes]:
    _, found = await unseal(tpm_settings(tpm), sealed)
    return found


async def refusal(tpm: SoftwareTpm, sealed: SealedSecret) -> str:
    with pytest.raises(SealRefused) as caught:
        await given_out(tpm, sealed)
    assert SECRET.decode() not in caught.value.message
    return caught.value.message


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


async def test_the_machine_that_booted_this_is_given_its_secrets(tpm: SoftwareTpm) -> None:
    sealed = await sealed_for(tpm), await sealed_for(tpm, "intel")
    assert pcrs_of(tpm)[12] == bytes(32)
    assert await given_out(tpm, *sealed) == {"nvidia": SECRET, "intel": SECRET}
    # The TPM keeps nothing: the same again.
    assert await given_out(tpm, *sealed) == {"nvidia": SECRET, "intel": SECRET}


async def test_the_longest_secret_fits(tpm: SoftwareTpm) -> None:
    key, pcrs = await storage_key_of(tpm), pcrs_of(tpm)
    longest = seal("n", b"x" * 126, pcrs=pcrs, storage_key=key)
    assert await given_out(tpm, longest) == {"n": b"x" * 126}


async def test_a_machines_storage_key_is_the_same_at_every_boot(tpm: SoftwareTpm) -> None:
    first = await storage_key_of(tpm)
    parse_storage_key(first)
    tpm.tool("tpm2_shutdown", "-c")
    assert await storage_key_of(tpm) == first


@pytest.mark.parametrize("pcr", PCRS)
async def test_after_another_boot_it_is_not_given_out(tpm: SoftwareTpm, pcr: int) -> None:
    """Another UKI (4, 11), other Secure Boot keys (7), a changed command line (12)."""
    sealed = await sealed_for(tpm)
    tpm.extend(pcr, b"\x01" * 32)
    message = await refusal(tpm, sealed)
    assert message.startswith(
        "nvidia: sealed for another image or boot: one of PCR 4, 7, 11, 12 differs"
    )


async def test_what_is_measured_elsewhere_does_not_matter(tpm: SoftwareTpm) -> None:
    sealed = await sealed_for(tpm)
    for pcr in (0, 1, 5, 9):
        tpm.extend(pcr, b"\x01" * 32)
    assert await given_out(tpm, sealed) == {"nvidia": SECRET}


async def test_another_tpm_does_not_give_it_out(tpm: SoftwareTpm) -> None:
    sealed = await sealed_for(tpm)
    with software_tpm() as other:
        Firmware(other).boot()
        assert pcrs_of(other) == pcrs_of(tpm)
        assert "not sealed to this machine, or damaged" in await refusal(other, sealed)


@pytest.mark.parametrize("part", ["public", "duplicate", "seed"])
async def test_one_flipped_bit_is_refused_wherever_it_is(tpm: SoftwareTpm, part: str) -> None:
    sealed = await sealed_for(tpm)
    whole: bytes = getattr(sealed, part)
    for at in {0, 2, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
        parts = {name: getattr(sealed, name) for name in ("public", "duplicate", "seed")}
        parts[part] = flipped(whole, at)
        message = await refusal(tpm, SealedSecret("nvidia", **parts))
        assert message.startswith("nvidia: not sealed to this machine, or damaged (tpm2_")


async def test_a_host_cannot_give_a_secret_another_name(tpm: SoftwareTpm) -> None:
    sealed = await sealed_for(tpm)
    renamed = SealedSecret("intel", sealed.public, sealed.duplicate, sealed.seed)
    with pytest.raises(Malformed, match="another name"):
        await given_out(tpm, renamed)


async def test_it_cannot_be_taken_out_with_a_password(tpm: SoftwareTpm) -> None:
    sealed = await sealed_for(tpm)
    for name in ("public", "duplicate", "seed"):
        (tpm.folder / name).write_bytes(getattr(sealed, name))
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt"
    algorithm = ("-g", "sha256", "-G", "ecc256:null:aes128cfb")
    for tool in (
        ("tpm2_createprimary", "-C", "o", *algorithm, "-a", attributes, "-c", "parent"),
        (
            *("tpm2_import", "-C", "parent", "-u", "public", "-i", "duplicate", "-s", "seed"),
            *("-r", "private"),
        ),
        ("tpm2_load", "-C", "parent", "-u", "public", "-r", "private", "-c", "loaded"),
    ):
        tpm.tool(*tool)
        tpm.tool("tpm2_flushcontext", "-t")
    with pytest.raises(AssertionError, match="0x12F"):  # TPM_RC_AUTH_UNAVAILABLE
        tpm.tool("tpm2_unseal", "-c", "loaded")


# ---- the two programs ---------------------------------------------------------------------------


@pytest.fixture
def reference(tpm: SoftwareTpm, tmp_path: Path) -> Path:
    """As `image/measure` writes it."""
    pcrs = pcrs_of(tpm)
    image = {
        "image_digest": "sha256:" + "11" * 32,
        "pcrs": {str(pcr): [pcrs[pcr].hex()] for pcr in (4, 7, 11)},
    }
    path = tmp_path / "reference-values.json"
    path.write_text(json.dumps({"api_version": "dcv/1", "images": [image]}))
    return path


def seal_command(
    storage_key: bytes, reference: Path, secret: bytes
) -> subprocess.CompletedProcess[bytes]:
    key = reference.with_name("key")
    key.write_bytes(storage_key)
    return subprocess.run(
        [
            *(sys.executable, ROOT / "image/seal.py", "nvidia"),
            *("--storage-key", key, "--reference", reference),
        ],
        input=secret,
        capture_output=True,
        timeout=60,
    )


async def unseal_command(tpm: SoftwareTpm, folder: Path) -> tuple[int, str]:
    """Exit status and log."""
    log = folder / "log"
    with log.open("w") as stream:
        status = await run_unseal(
            tpm_settings(tpm),
            folder / "sealed",
            folder,
            log=configure_log(format="json", level="debug", stream=stream),
        )
    structlog.reset_defaults()
    return status, log.read_text()


async def test_from_a_key_on_standard_input_to_files_that_root_alone_reads(
    tpm: SoftwareTpm, reference: Path, tmp_path: Path
) -> None:
    done = seal_command(await storage_key_of(tpm), reference, SECRET + b"\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert SECRET not in done.stdout
    (tmp_path / "sealed").write_bytes(done.stdout)
    status, log = await unseal_command(tpm, tmp_path)
    assert status == 0
    assert json.loads(log)["names"] == ["nvidia"]
    assert SECRET.decode() not in log
    secrets = tmp_path / "secrets"
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert [one.name for one in secrets.iterdir()] == ["nvidia"]
    assert stat.S_IMODE((secrets / "nvidia").stat().st_mode) == 0o400
    assert (secrets / "nvidia").read_bytes() == SECRET
    assert (tmp_path / "storage-key").read_bytes() == await storage_key_of(tpm)


async def test_one_bad_secret_and_none_is_written(
    tpm: SoftwareTpm, reference: Path, tmp_path: Path
) -> None:
    good = await sealed_for(tpm, "intel")
    bad = seal_command(await storage_key_of(tpm), reference, SECRET)
    tpm.extend(11, b"\x01" * 32)
    late = await sealed_for(tpm, "late")
    (tmp_path / "sealed").write_bytes(late.to_line() + bad.stdout + good.to_line())
    status, log = await unseal_command(tpm, tmp_path)
    assert status == EX_NOPERM
    line = json.loads(log)
    assert (line["event"], line["code"]) == ("unseal_failed", "seal_refused")
    assert line["error"].startswith("nvidia: sealed for another image")
    assert SECRET.decode() not in log
    assert not (tmp_path / "secrets").exists()


async def test_nothing_sealed_is_nothing_to_do(tpm: SoftwareTpm, tmp_path: Path) -> None:
    assert (await unseal_command(tpm, tmp_path))[0] == 0
    assert list((tmp_path / "secrets").iterdir()) == []
    assert (tmp_path / "storage-key").exists()


async def test_without_a_tpm_only_what_is_sealed_is_missed(
    tpm: SoftwareTpm, tmp_path: Path
) -> None:
    sealed = await sealed_for(tpm)
    nowhere = Attestation(cpu="tdx", tpm=f"swtpm:path={tmp_path / 'nowhere'}")
    log = structlog.get_logger()
    with trio.fail_after(30):
        assert await run_unseal(nowhere, tmp_path / "sealed", tmp_path, log=log) == 0
        (tmp_path / "sealed").write_bytes(sealed.to_line())
        assert await run_unseal(nowhere, tmp_path / "sealed", tmp_path, log=log) != 0
    assert not (tmp_path / "storage-key").exists()


async def test_what_cannot_be_sealed_is_said_in_one_line(tpm: SoftwareTpm, reference: Path) -> None:
    key = await storage_key_of(tpm)
    for storage_key, secret, problem in (
        (key, b"", b"seal: secret: expected 1 to 121 printable"),
        (key, b"x" * 122, b"seal: secret: expected 1 to 121 printable"),
        (key, SECRET + b"\n\n", b"seal: secret: expected 1 to 121 printable"),
        (key[:-1], SECRET, b"seal: storage key: expected"),
    ):
        done = seal_command(storage_key, reference, secret)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(problem)
        assert done.stderr.count(b"\n") == 1
        assert SECRET not in done.stderr
