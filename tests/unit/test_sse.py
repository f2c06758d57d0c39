"""Blocks of events are the same however the network cuts the stream."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, parse_json_object
from appliance.wire.sse import DONE_EVENT, PING, Block, BlockReader, encode_event, split_events
from tests.unit.chunking import borders, cut, in_steps

MAX_EVENT = 4096

# Text that an event's JSON may hold and that must not be taken for the stream's own structure.
TREACHEROUS = [
    "data: [DONE]",
    "\n\ndata: [DONE]\n\n",
    '\ndata: {"error": {"message": "no"}}\n\n',
    'data: {"error"',
    "}\n\n",
    "\r\n\r",
    ": ping",
    "é😀\u2028",
]


def chunk(text: str, **fields: object) -> bytes:
    """An event as SGLang writes one: `data: `, pydantic's compact JSON, a blank line."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    event = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice], **fields}
    return (
        b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


ERROR_TEXT = b'{"error": {"object": "error", "message": "canary", "code": 400}}'
ERROR_EVENT = b"data: " + ERROR_TEXT + b"\n\n"

event_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    TREACHEROUS
)
events = st.lists(event_texts.map(chunk), max_size=6)


@dataclass
class Heard:
    """What a reader made of a stream."""

    data: bytes = b""
    done: bool = False
    error: bytes | None = None


def read(parts: list[bytes]) -> Heard:
    """Feed a stream as the relay does: until the terminator, an error or the end of input."""
    reader, heard = BlockReader(max_event_bytes=MAX_EVENT), Heard()
    for part in parts:
        block = reader.feed(part)
        if block is not None:
            assert block.data or block.done or block.error is not None
            heard.data += block.data
            heard.done, heard.error = block.done, block.error
            assert reader.done is block.done
            if heard.done or heard.error is not None:
                return heard
    return heard


def feed_all(parts: list[bytes]) -> None:
    reader = BlockReader(max_event_bytes=MAX_EVENT)
    for part in parts:
        reader.feed(part)


# ------------------------------------------------------------------------------- any chunking


@given(events, borders)
def test_any_chunking_gives_the_same_events_and_the_terminator(
    sent: list[bytes], at: list[int]
) -> None:
    stream = b"".join(sent) + DONE_EVENT
    assert read(cut(stream, at)) == Heard(data=b"".join(sent), done=True)


@given(events, st.lists(event_texts.map(chunk), max_size=2), st.booleans(), borders)
def test_any_chunking_cuts_the_stream_right_before_an_error_event(
    sent: list[bytes], behind: list[bytes], terminated: bool, at: list[int]
) -> None:
    stream = b"".join(sent) + ERROR_EVENT + b"".join(behind) + DONE_EVENT * terminated
    assert read(cut(stream, at)) == Heard(data=b"".join(sent), error=ERROR_TEXT)


@pytest.mark.parametrize("tail", [DONE_EVENT, ERROR_EVENT, ERROR_EVENT + DONE_EVENT])
def test_every_single_cut_gives_the_same(tail: bytes) -> None:
    stream = b"".join(map(chunk, TREACHEROUS)) + tail
    whole = read([stream])
    for border in range(len(stream)):
        assert read(cut(stream, [border])) == whole
    assert read(in_steps(stream, 1)) == whole


@given(events, borders)
def test_a_stream_without_terminator_is_never_done(sent: list[bytes], at: list[int]) -> None:
    assert read(cut(b"".join(sent), at)) == Heard(data=b"".join(sent))


def test_a_block_ends_with_the_last_whole_event_and_keeps_the_rest() -> None:
    reader = BlockReader(max_event_bytes=MAX_EVENT)
    assert reader.feed(chunk("one") + b"dat") == Block(data=chunk("one"), done=False)
    assert reader.feed(b"") is None
    assert reader.feed(chunk("two")[3:]) == Block(data=chunk("two"), done=False)
    assert not reader.done


def test_the_terminator_alone_is_a_block_without_data() -> None:
    assert BlockReader(max_event_bytes=MAX_EVENT).feed(DONE_EVENT) == Block(data=b"", done=True)


def test_an_error_is_not_the_end_even_when_the_terminator_came_with_it() -> None:
    reader = BlockReader(max_event_bytes=MAX_EVENT)
    block = reader.feed(ERROR_EVENT + DONE_EVENT)
    assert block == Block(data=b"", done=False, error=ERROR_TEXT)
    assert not reader.done


# ------------------------------------------------------------------------------- the profile


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"data: hello\n\n", id="no object"),
        pytest.param(b"data: [1]\n\n", id="an array"),
        pytest.param(b'data:{"a":1}\n\n', id="no space"),
        pytest.param(b'data: {"a":1\n\n', id="object not closed"),
        pytest.param(b'event: x\ndata: {"a":1}\n\n', id="another field"),
        pytest.param(b'data: {"a":1}\nid: 7\n\n', id="a field behind"),
        pytest.param(b'data: {"a":\ndata: 1}\n\n', id="data over two lines"),
        pytest.param(b'data: {"a":1}\n\n\n', id="a blank line too many"),
        pytest.param(b'\n\ndata: {"a":1}\n\n', id="a blank line in front"),
        pytest.param(b'data: {"a":1}\r\n\r\ndata: {"b":1}\n\n', id="CRLF"),
        pytest.param(b'data: {"a":"\rdata: [DONE]\r\r"}\n\n', id="CR ends lines for clients"),
        pytest.param(PING, id="a comment"),
        pytest.param(b'\xef\xbb\xbfdata: {"a":1}\n\n', id="byte order mark"),
        pytest.param(b'data: {"a":1}' + DONE_EVENT, id="terminator inside an event"),
        pytest.param(b'data: {"a":1}\n' + DONE_EVENT, id="terminator as a second line"),
        pytest.param(DONE_EVENT + DONE_EVENT, id="two terminators"),
        pytest.param(DONE_EVENT + chunk("late"), id="an event behind the terminator"),
        pytest.param(DONE_EVENT + b"d", id="half an event behind the terminator"),
        pytest.param(b"data: [DONE] \n\n", id="a terminator with a space"),
        pytest.param(b"data: [DONE]\n\n\n", id="a terminator with a line too many"),
    ],
)
@pytest.mark.parametrize("front", [b"", chunk("before")])
def test_what_is_not_sglangs_profile_is_malformed_in_any_chunking(
    front: bytes, stream: bytes
) -> None:
    for parts in ([front + stream], [front, stream], in_steps(front + stream, 1)):
        with pytest.raises(Malformed):
            feed_all([*parts, chunk("after")])


def test_bytes_behind_the_terminator_are_malformed_in_a_later_chunk_too() -> None:
    reader = BlockReader(max_event_bytes=MAX_EVENT)
    reader.feed(DONE_EVENT)
    with pytest.raises(Malformed, match="after"):
        reader.feed(b"\n")


# --------------------------------------------------------------------------------- the bound


def sized(length: int) -> bytes:
    event = chunk("x" * (length - len(chunk(""))))
    assert len(event) == length
    return event


@pytest.mark.parametrize("step", [1, 7, 1000, MAX_EVENT, 10 * MAX_EVENT])
def test_an_event_may_be_as_long_as_the_bound_and_no_longer(step: int) -> None:
    stream = chunk("a") + sized(MAX_EVENT) + sized(MAX_EVENT) + DONE_EVENT
    assert read(in_steps(stream, step)).done
    with pytest.raises(Malformed, match=f"at most {MAX_EVENT} bytes"):
        read(in_steps(chunk("a") + sized(MAX_EVENT + 1) + DONE_EVENT, step))


def test_an_endless_event_is_refused_before_its_end() -> None:
    with pytest.raises(Malformed, match="at most"):
        feed_all([b'data: {"a'] * MAX_EVENT)


# ------------------------------------------------------------------------------ the other way


@given(st.lists(st.dictionaries(event_texts, event_texts, max_size=3), max_size=4))
def test_encoded_events_are_read_back_as_their_values(values: list[dict[str, str]]) -> None:
    sent: list[JsonObject] = [{"data": dict(value)} for value in values]
    heard = read([b"".join(map(encode_event, sent)) + DONE_EVENT])
    assert heard.done
    parsed = [parse_json_object(text, max_nesting=3) for text in split_events(heard.data)]
    assert parsed == sent


def test_equal_values_are_equal_events() -> None:
    assert encode_event({"b": 1, "a": 2.0}) == encode_event({"a": 2, "b": 1})
    assert encode_event({"a": "\n\n"}) == b'data: {"a":"\\n\\n"}\n\n'
