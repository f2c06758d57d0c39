"""The model's own tokenizer, in the gateway: `/v1/tokenize` and `/v1/detokenize` need no engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from appliance.errors import ModelError

_CONFIG_FILE = "config.json"
_FILE = "tokenizer.json"


class ModelTokenizer:
    """Encodes and decodes. Long texts take a while: not for the event loop's own thread.

    In batches of one: what the library has for a single text holds Python's lock all the while,
    from any thread, and a batch of several would take every processor.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""
        return [
            encoding.ids
            for text in texts
            for encoding in self._tokenizer.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        ]

    def decode(self, batches: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        """The text of each sequence of token ids; ids the model does not have are left out."""
        return [
            text
            for ids in batches
            for text in self._tokenizer.decode_batch(
                [list(ids)], skip_special_tokens=skip_special_tokens
            )
        ]


def load_tokenizer(model_path: Path) -> ModelTokenizer | None:
    """Load `tokenizer.json` of a model folder; None when the model has none.

    Raises:
        ModelError: the file is there and cannot be used.
    """
    path = model_path / _FILE
    if not path.exists():
        return None
    try:
        return ModelTokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception for anything it cannot read
        raise ModelError(f"cannot use {_FILE}: {type(error).__name__}") from error


def vocabulary_size(model_path: Path) -> int | None:
    """How many tokens the model has, by its `config.json`; None where that does not say.

    The engine looks no id up before it computes with it, and does not survive one that is beyond.

    Raises:
        ModelError: the file is there and cannot be used.
    """
    path = model_path / _CONFIG_FILE
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not strict: some have Infinity in them
        raise ModelError(f"cannot use {_CONFIG_FILE}: {type(error).__name__}") from None
    if not isinstance(config, dict):
        raise ModelError(f"cannot use {_CONFIG_FILE}: expected an object")
    text = config.get("text_config")  # where a model sees and reads, this is what it reads with
    sizes = [part.get("vocab_size") for part in (config, text) if isinstance(part, dict)]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)
