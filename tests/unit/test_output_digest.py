"""One answer has one output digest, however it is sent."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json, parse_json_object
from appliance.wire.output import (
    MAX_CHOICES,
    OutputJoiner,
    output_of_answer,
    output_of_stream,
    read_stream,
)
from appliance.wire.sse import DONE_EVENT, PING, encode_event
from tests.fakes.sglang_dialect import EventStream, answer, encode
from tests.fakes.sglang_model import generate
from tests.fakes.sglang_request import Endpoint, Settings, parse_request

MAX = 1 << 20


def digest_of(choices: str) -> bytes:
    """Of the text that is hashed, spelled out."""
    return hashlib.sha256(choices.encode()).digest()


def whole(*choices: JsonObject, **more: JsonValue) -> JsonObject:
    listed: list[JsonValue] = list(choices)
    return {"id": "chatcmpl-1", "created": 1, "choices": listed, **more}


def streamed(*chunks: JsonObject) -> bytes:
    return b"".join(map(encode_event, chunks)) + DONE_EVENT


# --------------------------------------------------------------------------------- worked bytes


def test_a_completion_is_index_text_and_finish_reason() -> None:
    answer = whole(
        {"index": 0, "text": "a\n", "logprobs": {"tokens": ["a"]}, "finish_reason": "length"}
    )
    expected = digest_of('{"choices":[{"finish_reason":"length","index":0,"text":"a\\n"}]}')
    assert output_of_answer(answer, max_bytes=MAX).digest == expected
    stream = streamed(
        whole({"index": 0, "text": "a", "finish_reason": None}),
        whole({"index": 0, "text": "\n", "finish_reason": "length", "matched_stop": None}),
    )
    assert output_of_stream(stream, max_bytes=MAX).digest == expected


def test_a_chat_leaves_out_what_is_null_or_empty_and_ids() -> None:
    call: JsonObject = {
        "id": "call_1",
        "index": 0,
        "type": "function",
        "function": {"name": "f", "arguments": '{ "b": 1.0, "a": "é" }'},
    }
    message: JsonObject = {
        "role": "assistant",
        "content": "",
        "reasoning_content": "why",
        "refusal": None,
        "tool_calls": [call, {**call, "id": "call_2", "function": {"name": "g", "arguments": "{"}}],
    }
    answer = whole({"index": 0, "message": message, "finish_reason": "tool_calls"})
    assert output_of_answer(answer, max_bytes=MAX).digest == digest_of(
        '{"choices":[{"finish_reason":"tool_calls","index":0,"message":{"reasoning_content":"why",'
        '"tool_calls":[{"arguments":{"a":"é","b":1},"name":"f"},{"arguments":"{","name":"g"}]}}]}'
    )


def test_a_chat_that_says_nothing_has_an_empty_message() -> None:
    answer = whole({"index": 0, "message": {"content": None, "tool_calls": []}})
    expected = digest_of('{"choices":[{"finish_reason":null,"index":0,"message":{}}]}')
    assert output_of_answer(answer, max_bytes=MAX).digest == expected


@pytest.mark.parametrize(
    "arguments",
    ['{"a":1,"a":2}', "9007199254740993", "NaN", "[" * 200 + "]" * 200, '"\\ud800"', ""],
)
def test_arguments_that_parsers_read_differently_stay_the_text_they_are(arguments: str) -> None:
    call: JsonObject = {"function": {"name": "f", "arguments": arguments}}
    answer = whole({"index": 0, "message": {"tool_calls": [call]}})
    assert output_of_answer(answer, max_bytes=MAX).choices[0]["message"] == {
        "tool_calls": [{"name": "f", "arguments": arguments}]
    }


def test_an_answer_without_choices_has_a_digest_of_none() -> None:
    output = output_of_stream(PING + DONE_EVENT, max_bytes=MAX)
    assert (output.choices, output.finish_reasons, output.usage) == ((), (), None)
    assert output.digest == digest_of('{"choices":[]}')


# ----------------------------------------------------------------------- any answer, any chunking

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = st.text("fg_", min_size=1, max_size=3)
arguments = st.one_of(
    st.dictionaries(texts, st.none() | st.booleans() | st.integers(-9, 9) | texts, max_size=3).map(
        json.dumps
    ),
    texts,
)
finish = st.sampled_from(["stop", "length", "tool_calls", "abort", None])
chats = st.fixed_dictionaries(
    {
        "content": st.none() | texts,
        "reasoning_content": st.none() | texts,
        "refusal": st.none() | texts,
        "calls": st.lists(st.tuples(names, arguments), max_size=3),
        "finish": finish,
    }
)
completions = st.fixed_dictionaries({"text": texts, "finish": finish})


def pieces(data: st.DataObject, text: str) -> list[str]:
    """The text, cut anywhere."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=3)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def chat_choice(index: int, said: dict[str, Any]) -> JsonObject:
    calls: list[JsonValue] = [
        # SGLang numbers the calls of a whole answer 0; the order says which is which.
        {"id": f"call_{place}", "index": 0, "function": {"name": name, "arguments": text}}
        for place, (name, text) in enumerate(said["calls"])
    ]
    message: JsonObject = {
        "role": "assistant",
        "content": said["content"],
        "reasoning_content": said["reasoning_content"],
        "refusal": said["refusal"],
        "tool_calls": calls or None,
    }
    return {"index": index, "message": message, "logprobs": None, "finish_reason": said["finish"]}


def chat_deltas(data: st.DataObject, said: dict[str, Any]) -> list[list[JsonObject]]:
    """The deltas of each part of a message, in order within the part."""
    parts: list[list[JsonObject]] = [
        [{member: piece} for piece in pieces(data, said[member])]
        for member in ("content", "reasoning_content", "refusal")
        if said[member] is not None
    ]
    for place, (name, text) in enumerate(said["calls"]):
        opening: JsonObject = {"index": place, "id": f"other_{place}", "type": "function"}
        first: JsonObject = {**opening, "function": {"name": name, "arguments": ""}}
        rest: list[JsonObject] = [
            {"index": place, "function": {"name": None, "arguments": piece}}
            for piece in pieces(data, text)
        ]
        parts.append([{"tool_calls": [call], "content": None} for call in (first, *rest)])
    return parts


def interleaved(data: st.DataObject, lanes: list[list[JsonObject]]) -> list[JsonObject]:
    """All items, each lane in its order."""
    merged: list[JsonObject] = []
    lanes = [list(lane) for lane in lanes if lane]
    while lanes:
        lane = lanes[data.draw(st.integers(0, len(lanes) - 1))]
        merged.append(lane.pop(0))
        lanes = [lane for lane in lanes if lane]
    return merged


def as_stream(data: st.DataObject, lanes: list[list[JsonObject]], usage: JsonValue) -> bytes:
    """Chunks of one or more choices, with heartbeats and other members in between."""
    choices = interleaved(data, lanes)
    events = []
    while choices:
        count = data.draw(st.integers(1, 2))
        listed: list[JsonValue] = list(choices[:count])
        del choices[:count]
        chunk: JsonObject = {"id": "x", "choices": listed, "usage": None}
        ascii_only = data.draw(st.booleans())
        text = json.dumps(chunk, ensure_ascii=ascii_only).encode()
        events.append(b"data: " + text + b"\n\n")
        events.append(data.draw(st.sampled_from([b"", b"", PING, b": dcv-checkpoint eyJ9\n\n"])))
    if usage is not None:
        events.append(encode_event({"choices": [], "usage": usage}))
    events.append(encode_event({"choices": [], "dcv": {"seq": 1}}))
    return b"".join(events) + DONE_EVENT


@given(st.data(), st.lists(chats, min_size=1, max_size=3), st.sampled_from([None, {"t": 3}]))
@settings(max_examples=150)
def test_a_chat_has_the_digest_of_any_stream_of_it(
    data: st.DataObject, said: list[dict[str, Any]], usage: JsonValue
) -> None:
    choices = [chat_choice(index, one) for index, one in enumerate(said)]
    answer = output_of_answer(whole(*choices, usage=usage), max_bytes=MAX)
    lanes = []
    for index, one in enumerate(said):
        deltas: list[JsonObject] = [
            {"role": "assistant", "content": ""},
            *interleaved(data, chat_deltas(data, one)),
        ]
        lane: list[JsonObject] = [
            {"index": index, "delta": delta, "finish_reason": None} for delta in deltas
        ]
        lanes.append([*lane, {"index": index, "delta": {}, "finish_reason": one["finish"]}])
    stream = output_of_stream(as_stream(data, lanes, usage), max_bytes=MAX)
    assert stream == answer
    assert stream.digest == answer.digest
    assert stream.finish_reasons == tuple(one["finish"] for one in said)
    assert stream.usage == usage


@given(st.data(), st.lists(completions, min_size=1, max_size=3))
@settings(max_examples=75)
def test_a_completion_has_the_digest_of_any_stream_of_it(
    data: st.DataObject, said: list[dict[str, Any]]
) -> None:
    answer = output_of_answer(
        whole(
            *(
                {"index": index, "text": one["text"], "finish_reason": one["finish"]}
                for index, one in enumerate(said)
            )
        ),
        max_bytes=MAX,
    )
    lanes: list[list[JsonObject]] = []
    for index, one in enumerate(said):
        lane: list[JsonObject] = [
            {"index": index, "text": piece, "finish_reason": None}
            for piece in pieces(data, one["text"])
        ]
        lanes.append([*lane, {"index": index, "text": "", "finish_reason": one["finish"]}])
    assert output_of_stream(as_stream(data, lanes, None), max_bytes=MAX) == answer
    assert [one["text"] for one in answer.choices] == [one["text"] for one in said]


@given(chats, chats)
def test_different_answers_have_different_digests(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    outputs = [
        output_of_answer(whole(chat_choice(0, said)), max_bytes=MAX) for said in (one, other)
    ]
    assert (outputs[0].digest == outputs[1].digest) == (outputs[0].choices == outputs[1].choices)
    said = [
        (chat["content"] or "", [call[0] for call in chat["calls"]], chat["finish"])
        for chat in (one, other)
    ]
    if said[0] != said[1]:
        assert outputs[0].digest != outputs[1].digest


DIALECT = Settings(
    "m", 4096, deterministic=True, tool_call_parser="hermes", reasoning_parser="qwen3"
)
TOOL: JsonObject = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (Endpoint.COMPLETIONS, {"prompt": "Say it.", "logprobs": 1}),
        (Endpoint.COMPLETIONS, {"prompt": ["One.", "Two."], "n": 2, "echo": True}),
        (Endpoint.CHAT, {"n": 3, "logprobs": True}),
        (Endpoint.CHAT, {"stream_options": {"continuous_usage_stats": True}}),
        (Endpoint.CHAT, {"tools": [TOOL], "tool_choice": "required"}),
    ],
)
def test_what_sglang_streams_and_what_it_answers_have_one_digest(
    endpoint: Endpoint, body: JsonObject
) -> None:
    """In its own chunks: null members, empty deltas, a finish apart, calls from another
    serializer."""
    if endpoint is Endpoint.CHAT:
        body = {"messages": [{"role": "user", "content": "Say it."}], **body}
    options = {"include_usage": True, **(body.get("stream_options") or {})}  # type: ignore[dict-item]
    asked = {"model": "m", "max_tokens": 40, **body, "stream": True, "stream_options": options}
    request = parse_request(
        endpoint, canonical_json(asked), content_type="application/json", settings=DIALECT
    )
    choices = generate(request, DIALECT, entropy=7, new_id=lambda: "0" * 32)
    events = EventStream(request, choices, created=1, settings=DIALECT)
    content = b""
    while not events.exhausted():
        content += b"".join(events.step())
    content += b"".join(events.finish())
    value = answer(request, choices, created=1, settings=DIALECT)
    expected = output_of_answer(parse_json_object(encode(value), max_nesting=16), max_bytes=MAX)
    streamed_output = output_of_stream(content, max_bytes=MAX)
    assert streamed_output.digest == expected.digest
    assert streamed_output.finish_reasons == expected.finish_reasons
    assert len(expected.choices) == len(choices)
    assert streamed_output.usage is not None
    assert expected.usage is not None
    assert streamed_output.usage["total_tokens"] == expected.usage["total_tokens"]


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "content",
    [
        b"data: {",
        b"data: {}\n",
        b"data: {\n\n",
        b"data: [1]\n\n",
        b'data: {"choices":[{}]}\n\n',
        b'data: {"choices":[{"index":-1}]}\n\n',
        b'data: {"choices":[{"index":%d}]}\n\n' % MAX_CHOICES,
        b'data: {"choices":[{"index":1,"text":"a"}]}\n\n',
        b'data: {"choices":[{"index":0,"text":1}]}\n\n',
        b'data: {"choices":[{"index":0,"text":"\\ud800"}]}\n\n',
        b'data: {"choices":[{"index":0,"text":"\xff"}]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":9999}]}}]}\n\n',
        b'data: {"choices":[]},{"choices":[]}\n\n',
        b"event: x\n\n",
        b": a comment\ndata: {}\n\n",
    ],
)
def test_a_stream_that_is_not_ours_is_malformed(content: bytes) -> None:
    with pytest.raises(Malformed):
        output_of_stream(content, max_bytes=MAX)


DEEP = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    "chunk",
    [
        DEEP,
        b'{"usage":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
        b'{"choices":[{"index":0,"delta":{"content":"a"},"text":"b"}]}',
        b'{"choices":[{"index":0,"delta":{"content":"a"},"message":{"content":"b"}}]}',
    ],
)
def test_what_is_not_read_is_refused_by_the_appliance_too(chunk: bytes) -> None:
    content = b"data: " + chunk + b"\n\n"
    with pytest.raises(Malformed):
        OutputJoiner(max_bytes=MAX).add_events(content)
    with pytest.raises(Malformed):
        output_of_stream(content, max_bytes=MAX)


@pytest.mark.parametrize(
    "chunk",
    [
        b'{"choices":[{"index":0,"text":"a","text":"b"}]}',
        b'{"choices":[{"index":0,"text":"a"}],"choices":[]}',
        b'{"choices":[{"index":0,"message":{"content":"a"}}]}',
        b'{"choices":[{"index":0,"text":"a"},{"index":0,"delta":{"content":"b"}}]}',
        b'{"choices":[{"index":0,"delta":{"content":"b"}},{"index":0,"text":"a"}]}',
        b'{"choices":[{"index":0,"text":"a"}],"x":9007199254740993}',
        b'{"choices":[{"index":0,\r"text":"a"}]}',
    ],
)
def test_a_verifier_reads_no_chunk_that_a_client_could_read_otherwise(chunk: bytes) -> None:
    with pytest.raises(Malformed):
        output_of_stream(b"data: " + chunk + b"\n\n" + DONE_EVENT, max_bytes=MAX)


@pytest.mark.parametrize(
    "choices",
    [
        [{"index": 0, "text": "a"}, {"index": 0, "text": "b"}],
        [{"index": 1, "text": "a"}, {"index": 0, "text": "b"}],
        [{"index": 0, "delta": {"content": "a"}}],
    ],
)
def test_a_whole_answer_has_each_choice_once_in_order_and_whole(choices: list[JsonValue]) -> None:
    with pytest.raises(Malformed):
        output_of_answer({"choices": choices}, max_bytes=MAX)


@pytest.mark.parametrize(
    ("end", "ended"),
    [
        (DONE_EVENT, True),
        (PING + DONE_EVENT, True),
        (PING, False),
        (DONE_EVENT + PING, False),
        (DONE_EVENT + DONE_EVENT, False),
        (encode_event({"error": {}}) + DONE_EVENT, False),
    ],
)
def test_a_stream_has_ended_where_done_is_once_and_last_and_no_error_is_told(
    end: bytes, ended: bool
) -> None:
    said = b'data: {"id":"c-1","choices":[{"index":0,"text":"CANARY"}]}\n\n'
    read = read_stream(said + end, max_bytes=MAX)
    assert (read.ended, read.ids) == (ended, frozenset({"c-1"}))
    assert "CANARY" not in repr(read)


def test_an_error_event_says_nothing_of_the_answer() -> None:
    content = streamed(whole({"index": 0, "text": "a"})).removesuffix(DONE_EVENT)
    with_error = content + encode_event({"error": {"code": "engine_failed"}})
    assert output_of_stream(with_error, max_bytes=MAX) == output_of_stream(content, max_bytes=MAX)


@pytest.mark.parametrize("answer", [{"choices": 1}, {"choices": [{"index": 0, "message": "x"}]}])
def test_an_answer_of_another_shape_is_malformed(answer: JsonObject) -> None:
    with pytest.raises(Malformed):
        output_of_answer(answer, max_bytes=MAX)


def test_text_is_bounded_over_all_choices() -> None:
    answer = whole({"index": 0, "text": "aaa"}, {"index": 1, "text": "aaa"})
    assert output_of_answer(answer, max_bytes=6).finish_reasons == (None, None)
    with pytest.raises(Malformed, match="less text"):
        output_of_answer(answer, max_bytes=5)


def test_an_output_does_not_show_what_it_says() -> None:
    assert "CANARY" not in repr(
        output_of_answer(whole({"index": 0, "text": "CANARY"}), max_bytes=9)
    )
