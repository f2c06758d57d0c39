"""The sample configurations: one per platform, valid, and unsafe in nothing but the one for trying."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from appliance.config import MeasuredConfig, parse_config
from appliance.operator_input import parse_operator_input, tighten

SAMPLES = Path(__file__).parent.parent.parent / "image" / "config"
CPU_EVIDENCE = {
    "azure": "azure_vtpm",
    "cpu": "tpm2",
    "gcp": "tdx",
    "metal-snp": "sev_snp",
    "metal-tdx": "tdx",
}
CONFIDENTIAL = sorted(CPU_EVIDENCE.keys() - {"cpu"})


def text(name: str) -> str:
    return (SAMPLES / f"{name}.toml").read_text(encoding="utf-8")


def parse(name: str) -> MeasuredConfig:
    return parse_config(text(name), folder=SAMPLES)


def words(value: object) -> Iterator[str]:
    """Every key and text of a configuration."""
    if isinstance(value, dict):
        for key, item in value.items():
            # A key that names a danger is harmless while it is at its harmless value.
            if item:
                yield key
            yield from words(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from words(item)
    elif isinstance(value, str):
        yield value


def test_there_is_one_sample_for_each_platform() -> None:
    assert {path.stem for path in SAMPLES.iterdir()} == CPU_EVIDENCE.keys()


@pytest.mark.parametrize("name", sorted(CPU_EVIDENCE))
def test_a_sample_is_valid_and_asks_for_its_platforms_evidence(name: str) -> None:
    attestation = parse(name).attestation
    assert attestation.cpu == CPU_EVIDENCE[name]
    assert attestation.nvidia_sdk != "require"  # its environment is not in every image
    assert "not tried on hardware" in text(name)


@pytest.mark.parametrize("name", CONFIDENTIAL)
def test_a_sample_for_confidential_hardware_has_nothing_unsafe(name: str) -> None:
    config = parse(name)
    found = [word for word in words(msgspec.to_builtins(config)) if word.startswith("unsafe")]
    assert found == []
    assert config.policy.tee_types == (config.attestation.cpu,)
    assert (config.attestation.gpu, config.policy.gpus) == ("nvidia", "nvidia")
    assert config.auth.mode == "keys"


def test_the_sample_for_trying_says_that_it_is_unsafe() -> None:
    found = {word for word in words(msgspec.to_builtins(parse("cpu"))) if word.startswith("unsafe")}
    assert found == {"unsafe_none"}


@pytest.mark.parametrize("name", CONFIDENTIAL)
def test_a_sample_takes_an_operators_input(name: str) -> None:
    given = parse_operator_input(
        b'[tls]\nnames = ["a.example.com"]\nchain_file = "/run/dcv/chain.pem"\n'
        b"[limits]\nmax_concurrent = 8\n"
        b'[auth]\nkeys = [{name = "a", sha256 = "' + b"1e" * 32 + b'"}]\n',
        folder=SAMPLES,
    )
    config = tighten(parse(name), given)
    assert [key.name for key in config.auth.keys] == ["example", "a"]
    assert config.limits.max_concurrent == 8
