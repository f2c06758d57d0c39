"""The example policies are read by what `dcv verify` reads them with, and say what they are for."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
import trustme

from appliance.config import Policy
from appliance.errors import Contraindicated, EvidenceError, Malformed
from appliance.rats.reference import ReferenceValues, parse_reference_values
from appliance.rats.result import Tier
from appliance.verifier.check import Rules, check, fetch, load_rules
from tests.integration.appliance import start_appliance

FOLDER = Path(__file__).parent.parent.parent / "docs" / "policies"
REFERENCE = FOLDER / "reference-values.json"
TEE_TYPES = {
    "azure": ("azure_vtpm",),
    "gcp-tdx": ("tdx",),
    "metal-snp": ("sev_snp",),
    "tpm-test": ("tpm2",),
    "simulated": ("unsafe_simulated",),
}
CONFIDENTIAL = ("azure", "gcp-tdx", "metal-snp")
NONCE = b"\x2a" * 32
TEST_ROOT = "evidence under the published test root"
BYTES = {"sha256": 32, "sha384": 48, "sha1": 20}


def rules(name: str, folder: Path = FOLDER) -> Rules:
    return load_rules(folder / f"{name}.toml", REFERENCE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The examples, and beside them the one file that they do not bring along."""
    copied = tmp_path / "policies"
    shutil.copytree(FOLDER, copied)
    trustme.CA().cert_pem.write_to_path(str(copied / "ca.pem"))
    return copied


def texts(value: object) -> Iterator[str]:
    """Every text in a policy."""
    if isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        yield value


def test_there_is_one_policy_for_each_kind_of_machine() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == TEE_TYPES.keys()
    listed = (FOLDER / "README.md").read_text()
    for name in TEE_TYPES:
        assert f"`{name}.toml`" in listed


@pytest.mark.parametrize("name", sorted(TEE_TYPES))
def test_an_example_accepts_its_machine_only(folder: Path, name: str) -> None:
    assert rules(name, folder).policy.tee_types == TEE_TYPES[name]


@pytest.mark.parametrize("name", CONFIDENTIAL)
def test_an_example_for_confidential_hardware_weakens_nothing(name: str) -> None:
    policy, strict = rules(name).policy, Policy()
    assert not [text for text in texts(msgspec.to_builtins(policy)) if text.startswith("unsafe")]
    assert policy.gpus == "nvidia"
    assert policy.gpu_architectures == strict.gpu_architectures
    assert policy.revocation == "required"
    for same in ("expired_rims", "secure_boot", "vmpl", "tdx_statuses"):
        assert getattr(policy, same) == getattr(strict, same), same


@pytest.mark.parametrize("name", ["azure", "metal-snp"])
def test_an_example_for_amd_has_a_floor_for_what_amd_counts(name: str) -> None:
    floor = rules(name).policy.minimum_tcb
    assert min(floor.bootloader, floor.snp, floor.microcode) > 0


def test_only_the_simulated_policy_trusts_the_test_root(folder: Path) -> None:
    for name in TEE_TYPES:
        anchors = rules(name, folder).anchors
        assert bool(anchors.simulated_amd) == (name == "simulated")
        assert bool(anchors.simulated_nvidia_device) == (name == "simulated")


def test_the_tpms_root_is_the_file_beside_the_policy(folder: Path) -> None:
    (root,) = rules("tpm-test", folder).anchors.tpm
    assert "trustme" in root.subject.rfc4514_string()
    assert rules("azure", folder).anchors.tpm == ()


@pytest.mark.parametrize("name", sorted(TEE_TYPES))
def test_an_example_says_how_it_is_used(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text()
    assert f"--policy {name}.toml" in text
    assert name not in CONFIDENTIAL or "Not tried on hardware" in text


def reference() -> ReferenceValues:
    return parse_reference_values(REFERENCE.read_bytes())


def test_the_reference_values_have_the_size_of_what_they_are_compared_with() -> None:
    (image,) = reference().images
    assert image.commit is not None
    assert len(bytes.fromhex(image.commit)) == BYTES["sha1"]
    assert set(image.pcrs) == {"pcr4", "pcr7", "pcr11", "pcr12"}
    for table, size in (
        (image.pcrs, BYTES["sha256"]),
        (image.sev_snp, BYTES["sha384"]),
        (image.tdx, BYTES["sha384"]),
        (image.azure, BYTES["sha384"]),
    ):
        assert table
        for values in table.values():
            assert {len(bytes.fromhex(one)) for one in values} == {size}


def test_a_wrong_key_in_the_reference_values_is_named() -> None:
    document = json.loads(REFERENCE.read_bytes())
    document["images"][0]["measurement"] = "00"
    with pytest.raises(Malformed, match="unknown key"):
        parse_reference_values(json.dumps(document).encode())


async def test_the_simulated_appliance_is_a_warning_to_its_policy_and_refused_by_every_other(
    nursery: trio.Nursery, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "appliance").mkdir()
    appliance = await start_appliance(nursery, tmp_path / "appliance")
    now = datetime.datetime.now(datetime.UTC)
    bundle = await fetch(appliance.url, NONCE, now=now)

    trusting = load_rules(folder / "simulated.toml", None)
    result = check(bundle, trusting, at=now)
    assert result.verdict is Tier.WARNING
    for name, part in result.submods.items():
        assert TEST_ROOT in {one.got for one in part.all_findings()}, name
    # The image that made-up reference values describe is not the one that runs.
    with pytest.raises(Contraindicated, match="image_digest"):
        check(bundle, rules("simulated", folder), at=now).require()
    for name in TEE_TYPES.keys() - {"simulated"}:
        with pytest.raises(EvidenceError):
            check(bundle, rules(name, folder), at=now)
