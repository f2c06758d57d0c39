"""The model folder is what the configuration says it is, byte for byte and file for file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest

from appliance.config import Model
from appliance.engine.weights import sha256_file, verify_model_files
from appliance.errors import EX_CONFIG, ModelError

CONTENT = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"weights" * 1000,
    "nested/tokenizer.json": b"",
}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A folder with the files above and the declaration that names them."""
    root = tmp_path / "model"
    for name, content in CONTENT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    return Model(id="m", path=str(root), files=digests)


def verify(model: Model) -> list[str]:
    told: list[str] = []
    verify_model_files(model, progress=told.append)
    return told


def test_the_files_that_the_configuration_names_pass(model: Model) -> None:
    assert verify(model) == [f"checking model file {number} of 3" for number in (1, 2, 3)]


def test_a_missing_file_is_named(model: Model) -> None:
    (Path(model.path) / "config.json").unlink()
    with pytest.raises(ModelError, match=r"expected config\.json in the model folder"):
        verify(model)


def test_a_missing_folder_is_a_missing_file(model: Model) -> None:
    with pytest.raises(ModelError, match="missing"):
        verify(msgspec.structs.replace(model, path=model.path + "-elsewhere"))


@pytest.mark.parametrize("name", ["extra.bin", ".hidden", "nested/deep/code.py"])
def test_a_file_that_nobody_named_is_refused(model: Model, name: str) -> None:
    path = Path(model.path) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with pytest.raises(ModelError, match=f"found {name}"):
        verify(model)


def test_an_empty_folder_inside_is_no_file(model: Model) -> None:
    (Path(model.path) / "empty").mkdir()
    verify(model)


def test_a_changed_byte_is_found_and_both_digests_are_told(model: Model) -> None:
    path = Path(model.path) / "model-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        verify(model)
    assert model.files[path.name] in caught.value.message
    assert hashlib.sha256(content).hexdigest() in caught.value.message
    assert caught.value.exit_status == EX_CONFIG


def test_a_linked_file_is_checked_as_what_it_points_to(model: Model, tmp_path: Path) -> None:
    path = Path(model.path) / "config.json"
    target = path.rename(tmp_path / "config.json")
    path.symlink_to(target)
    verify(model)
    target.write_bytes(b"[]")
    with pytest.raises(ModelError, match=r"config\.json to have sha256"):
        verify(model)


def test_a_linked_folder_does_not_hide_what_is_in_it(model: Model, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "code.py").touch()
    (Path(model.path) / "code").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="found code"):
        verify(model)


def test_a_link_to_nowhere_is_refused(model: Model) -> None:
    (Path(model.path) / "dangling").symlink_to("nowhere")
    with pytest.raises(ModelError, match="found dangling"):
        verify(model)


def test_a_named_file_that_cannot_be_read_is_said_to_be_so(model: Model) -> None:
    (Path(model.path) / "config.json").unlink()
    (Path(model.path) / "config.json").symlink_to("nowhere")
    with pytest.raises(ModelError, match=r"cannot read model file config\.json: No such file"):
        verify(model)


@pytest.mark.parametrize("size", [0, 1, 4 << 20, (4 << 20) + 1])
def test_a_digest_is_that_of_the_whole_file_however_long(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()
