"""What `dcv chat` reads of an answer before that is checked: whatever comes, it does not break."""

from __future__ import annotations

import pytest

from appliance.verifier.chat import _message, _texts
from appliance.wire.sse import encode_event

DEEP = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize("event", [b"data: " + DEEP, b"data: {", b": ping", b"data: [DONE]"])
def test_an_event_that_is_no_chunk_says_nothing(event: bytes) -> None:
    said = encode_event({"choices": [{"index": 0, "delta": {"content": "Hi"}}]}).rstrip()
    assert list(_texts([event, said, event])) == ["Hi"]


@pytest.mark.parametrize("content", [DEEP, b"{", b"", b'{"error":{}}'])
def test_a_refusal_that_is_no_error_object_has_no_message(content: bytes) -> None:
    assert _message(content) == ""
