"""The model's tokenizer, as the gateway uses it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import tokenizers

from appliance.serving.tokenizing import ModelTokenizer, load_tokenizer

TEXTS = ["", "Hello", "Hello there, who?", "nothing of it is known", "Hello " * 50]


@pytest.fixture
def library(tmp_path: Path) -> tokenizers.Tokenizer:
    words = {"Hello": 0, "there": 1, "?": 2, "[BEGIN]": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["[BEGIN]"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BEGIN] $A", special_tokens=[("[BEGIN]", 3)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return made


@pytest.fixture
def ours(library: tokenizers.Tokenizer, tmp_path: Path) -> ModelTokenizer:
    made = load_tokenizer(tmp_path)
    assert made is not None
    return made


@pytest.mark.parametrize("special", [True, False])
def test_it_says_what_the_library_says_of_each_text(
    library: tokenizers.Tokenizer, ours: ModelTokenizer, special: bool
) -> None:
    expected = [library.encode(text, add_special_tokens=special).ids for text in TEXTS]
    assert ours.encode(TEXTS, add_special_tokens=special) == expected
    told = ours.decode(expected, skip_special_tokens=special)
    assert told == [library.decode(ids, skip_special_tokens=special) for ids in expected]


def test_a_long_text_leaves_python_to_other_threads(ours: ModelTokenizer) -> None:
    """From its thread it once stopped the event loop for as long as it took."""
    text = "漢 " * (1 << 18)
    began = time.perf_counter()
    thread = threading.Thread(
        target=ours.encode, args=([text],), kwargs={"add_special_tokens": True}
    )
    longest, last = 0.0, began
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert longest < (last - began) / 2
