"""How many tokens a model has, by its `config.json`."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.errors import ModelError
from appliance.serving.tokenizing import vocabulary_size


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ('{"vocab_size": 49152}', 49152),
        ('{"text_config": {"vocab_size": 7}, "step": Infinity}', 7),
        ('{"vocab_size": 9, "text_config": {"vocab_size": 7}}', 7),
        ("{}", None),
        ('{"vocab_size": null}', None),
        ('{"vocab_size": "9"}', None),
        ('{"vocab_size": -1}', None),
    ],
)
def test_it_is_what_the_model_reads_texts_with(tmp_path: Path, config: str, size: int) -> None:
    (tmp_path / "config.json").write_text(config)
    assert vocabulary_size(tmp_path) == size


def test_a_model_without_that_file_does_not_say(tmp_path: Path) -> None:
    assert vocabulary_size(tmp_path) is None


@pytest.mark.parametrize("config", [b"", b"\xff", b"[]", b"{", b"[" * 100_000])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, config: bytes) -> None:
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ModelError, match=r"config\.json"):
        vocabulary_size(tmp_path)
