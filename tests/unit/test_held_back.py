"""The end of a stream waits for its proof, and nothing else of it does."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from appliance.verifier.verified import HeldBack
from tests.unit.chunking import borders, cut, in_steps

EVENT = b'data: {"choices":[{"delta":{"content":"%b"}}]}'
TEXTS = (
    b"one",
    b"data: [DONE]",
    b" data: [DONE]\\n\\ndata: [DONE]\\n\\n",
    b"[DONE]",
    "é data:[DONE]".encode(),
)
ENDS = (b"\n", b"\r\n", b"\r")
DONES = (b"data: [DONE]", b"data:[DONE]", b"data:\t[DONE]", b"data:  [DONE]", b"data: [DONE] ")

events = st.one_of(
    st.sampled_from(TEXTS).map(lambda text: EVENT % text),
    st.sampled_from((b": ping", b": data: [DONE]", b"event: x\ndata: [DONE", b"id: data: [DONE]")),
)


def fed(parts: list[bytes]) -> tuple[list[bytes], HeldBack]:
    """What was handed on after each part."""
    held = HeldBack()
    return [held.feed(part) for part in parts], held


@settings(max_examples=300)
@given(st.lists(events, max_size=6), st.sampled_from(ENDS[:2]), st.sampled_from(DONES), borders)
@example([EVENT % TEXTS[1]], b"\n", DONES[0], list(range(80)))
def test_all_but_the_end_is_handed_on_however_it_is_cut(
    told: list[bytes], end: bytes, done: bytes, at: list[int]
) -> None:
    before = b"".join(event + end * 2 for event in told)
    stream = before + done + end * 2
    parts = cut(stream, at)
    ready, held = fed(parts)
    # In order, all of it, and not a byte of the end before there is proof.
    assert b"".join(ready) == before
    assert held.rest() == stream[len(before) :]
    # At once: after each part every line that is whole was handed on.
    seen = given_on = b""
    for part, handed in zip(parts, ready, strict=True):
        seen, given_on = seen + part, given_on + handed
        assert given_on == seen[: min(seen.rfind(b"\n") + 1, len(before))]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("done", DONES)
@pytest.mark.parametrize("step", range(1, 24))
def test_no_line_that_a_client_may_take_for_the_end_is_handed_on(
    end: bytes, done: bytes, step: int
) -> None:
    before = b'data: {"a":1}' + end * 2
    stream = before + done + end * 2 + b'data: {"b":2}\n\n'
    ready, held = fed(in_steps(stream, step))
    assert before.startswith(b"".join(ready))
    assert b"".join(ready) + held.rest() == stream


@pytest.mark.parametrize(
    "border", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
)
def test_what_any_client_takes_for_a_lines_end_is_one(border: str) -> None:
    """`str.splitlines`, which some read events with, knows more of them than SSE does."""
    assert len(f"a{border}b".splitlines()) == 2
    stream = f"data: x{border}data: [DONE]\n\n".encode()
    for step in range(1, len(stream) + 1):
        ready, held = fed(in_steps(stream, step))
        assert b"[DONE]" not in b"".join(ready)
        assert b"".join(ready) + held.rest() == stream


def test_a_byte_order_mark_hides_no_end() -> None:
    for before in (b"", b"data: x\n\n"):
        ready, held = fed([before + codecs.BOM_UTF8 + b"data: [DONE]\n\n"])
        assert (ready, held.rest()) == ([before], codecs.BOM_UTF8 + b"data: [DONE]\n\n")


@pytest.mark.parametrize("text", TEXTS)
def test_an_end_inside_a_text_holds_nothing(text: bytes) -> None:
    event = EVENT % text + b"\n\n"
    ready, held = fed([event] * 50)
    assert ready == [event] * 50
    assert held.rest() == b""


def test_behind_the_end_everything_is_held() -> None:
    ready, held = fed([b"data: [DONE]\n\n", b'data: {"more":1}\n\n', b"data: [DONE]\n\n"])
    assert ready == [b""] * 3
    assert held.rest() == b'data: [DONE]\n\ndata: {"more":1}\n\ndata: [DONE]\n\n'


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_of_any_bytes_no_more_is_held_than_the_last_line(parts: list[bytes]) -> None:
    assume(b"[DONE]" not in b"".join(parts))  # what is held behind it, others test
    held, seen, handed = HeldBack(), b"", b""
    for part in parts:
        seen, handed = seen + part, handed + held.feed(part)
        assert seen == handed + held.rest()
        assert len(held.rest()) == len(seen) - seen.rfind(b"\n") - 1
