"""Secrets the appliance is handed: read strictly, shown nowhere."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import msgspec
import pytest

from appliance.config import Attestation, effective_config, parse_config
from appliance.credentials import MAX_SECRET_BYTES, NO_KEYS, Secret, VendorKeys, read_vendor_keys
from appliance.errors import EX_CONFIG, ConfigError
from tests.unit.test_config import FOLDER, SMALLEST, parse

CANARY = "nvapi-CANARY"
NAMED = Attestation(cpu="tdx", nvidia_service_key="sealed_nvidia", intel_pcs_key="sealed_intel")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("nvidia", "intel"):
        (tmp_path / f"sealed_{name}").write_text(f"{CANARY}-{name}")
    return tmp_path


def refused(folder: Path | None) -> str:
    with pytest.raises(ConfigError) as caught:
        read_vendor_keys(NAMED, folder)
    assert caught.value.exit_status == EX_CONFIG
    assert CANARY not in caught.value.message
    return caught.value.message


def test_a_secret_is_given_out_by_its_name_alone() -> None:
    secret = Secret(CANARY)
    keys = VendorKeys(nvidia=secret)
    for shown in (repr(secret), str(secret), f"{secret!s:>40}", repr(keys), repr([secret])):
        assert CANARY not in shown
    assert secret.reveal() == CANARY
    assert secret != Secret(CANARY)
    for write in (json.dumps, pickle.dumps, msgspec.json.encode):
        with pytest.raises(TypeError):
            write(secret)
    with pytest.raises(TypeError):
        json.dumps(dataclasses.asdict(keys))


def test_only_what_is_named_is_read(folder: Path) -> None:
    keys = read_vendor_keys(NAMED, folder)
    assert keys.nvidia is not None
    assert keys.intel is not None
    assert (keys.nvidia.reveal(), keys.intel.reveal()) == (f"{CANARY}-nvidia", f"{CANARY}-intel")
    assert read_vendor_keys(Attestation(cpu="tdx"), folder) == NO_KEYS
    assert read_vendor_keys(Attestation(cpu="tdx"), None) == NO_KEYS


def test_a_credential_that_is_named_and_missing_is_named(folder: Path) -> None:
    assert refused(None).startswith("[attestation] nvidia_service_key: the credential `sealed_nvid")
    (folder / "sealed_intel").unlink()
    assert refused(folder).startswith("[attestation] intel_pcs_key: the credential `sealed_intel`")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        CANARY.encode() + b"\n",
        CANARY.encode() + b"\r\nx: y",
        CANARY.encode() + b" x",
        CANARY.encode() + b"\0",
        CANARY.encode() + "ö".encode(),
        b"x" * (MAX_SECRET_BYTES + 1),
    ],
)
def test_what_no_header_could_carry_is_refused_unseen(folder: Path, data: bytes) -> None:
    (folder / "sealed_nvidia").write_bytes(data)
    assert "expected 1 to 512 printable characters" in refused(folder)


def test_a_folder_or_a_link_is_no_credential(folder: Path) -> None:
    (folder / "sealed_nvidia").unlink()
    (folder / "sealed_nvidia").mkdir()
    assert refused(folder).endswith("expected a file")
    (folder / "sealed_nvidia").rmdir()
    (folder / "sealed_nvidia").symlink_to(folder / "sealed_intel")
    assert refused(folder).endswith("expected a file")


def test_a_key_is_sent_over_https_only() -> None:
    for key, url in (
        ("nvidia_service_key", "rim_url"),
        ("nvidia_service_key", "ocsp_url"),
        ("nvidia_service_key", "nras_url"),
        ("intel_pcs_key", "pcs_url"),
    ):
        line = f'{url} = "http://127.0.0.1:1"'
        message = refusal_of(f'{key} = "a"', line)
        assert message == f"[attestation] {url}: expected https, because {key} is sent there"
        assert refusal_of(line) == ""


@pytest.mark.parametrize("name", ["a/b", "..", ".a", "a\\n", "x" * 65])
def test_a_credential_has_a_files_name(name: str) -> None:
    assert refusal_of(f'nvidia_service_key = "{name}"').startswith(
        "[attestation] nvidia_service_key: "
    )


def test_the_effective_configuration_names_the_credential(folder: Path) -> None:
    config = parse()
    config = msgspec.structs.replace(config, attestation=NAMED)
    shown = json.dumps(effective_config(config))
    assert "sealed_nvidia" in shown
    assert CANARY not in shown


def refusal_of(*lines: str) -> str:
    """Of these keys in `[attestation]`; empty where they are taken."""
    text = SMALLEST.replace('cpu = "sev_snp"', "\n".join(['cpu = "sev_snp"', *lines]))
    try:
        parse_config(text, folder=FOLDER)
    except ConfigError as error:
        return error.message
    return ""
