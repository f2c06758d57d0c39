"""What `dcv chat` reads of an answer before that is checked: whatever comes, it does not break."""

from __future__ import annotations

import argparse
import io
import json
from contextlib import redirect_stdout

import pytest
from hypothesis import given

from appliance.errors import VerificationIncomplete
from appliance.verifier.chat import MAX_EVENT_BYTES, _message, _Printer, _seconds, _texts
from appliance.wire.sse import encode_event
from tests.unit.chunking import borders, cut

DEEP = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize("event", [b"data: " + DEEP, b"data: {", b": ping", b"data: [DONE]"])
def test_an_event_that_is_no_chunk_says_nothing(event: bytes) -> None:
    said = encode_event({"choices": [{"index": 0, "delta": {"content": "Hi"}}]}).rstrip()
    assert list(_texts([event, said, event])) == ["Hi"]


@pytest.mark.parametrize("content", [DEEP, b"{", b"", b'{"error":{}}'])
def test_a_refusal_that_is_no_error_object_has_no_message(content: bytes) -> None:
    assert _message(content) == ""


@given(borders)
def test_what_is_printed_does_not_depend_on_how_the_network_cuts_it(at: list[int]) -> None:
    texts = ["Hé", "", " data: [DONE]\n\n", "\x1b[31mred", "!"]
    chunks = [{"choices": [{"delta": {"content": text}}]} for text in texts]
    stream = b"".join(
        b": ping\n\ndata: " + json.dumps(one, ensure_ascii=False).encode() + b"\n\n"
        for one in chunks
    )
    printer, out = _Printer(), io.StringIO()
    with redirect_stdout(out):
        for part in cut(stream + b"data: [DONE]\n\n", at):
            printer.feed(part)
        printer.end()
    assert out.getvalue() == "Hé data: [DONE]\n\n\\x1b[31mred!\n"


@pytest.mark.parametrize("size", [1, 1 << 16])
def test_an_event_that_does_not_end_is_not_kept_for_ever(size: int) -> None:
    printer = _Printer()
    printer.feed(b"data: " + b"x" * (MAX_EVENT_BYTES - 100))
    with pytest.raises(VerificationIncomplete, match="events of at most"):
        for _ in range(101):
            printer.feed(b"x" * size)


def test_a_deadline_is_a_number_of_seconds_up_to_a_day() -> None:
    assert _seconds("0.5") == 0.5
    for text in ("0", "-1", "nan", "inf", "1e9", "soon"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected seconds"):
            _seconds(text)
