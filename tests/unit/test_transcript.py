"""Transcripts: every byte counted once, an output at the end, and next to nothing per chunk."""

from __future__ import annotations

import hashlib
import sys
import timeit
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.serving.transcript import SETTLE_BYTES, Prefix, Transcript
from appliance.wire.canonical import JsonObject, JsonValue
from appliance.wire.output import output_of_stream
from appliance.wire.sse import DONE_EVENT, PING, encode_event

MAX = 1 << 20


def chunk(number: int, text: str = " word") -> bytes:
    return encode_event(
        {
            "id": "chatcmpl-0123456789abcdef0123456789abcdef",
            "object": "chat.completion.chunk",
            "created": 1_760_000_000,
            "model": "smollm2-135m-instruct",
            "choices": [
                {
                    "index": 0,
                    "delta": {"content": f"{text}{number}", "reasoning_content": None},
                    "logprobs": None,
                    "finish_reason": None,
                    "matched_stop": None,
                }
            ],
            "usage": None,
        }
    )


@given(st.lists(st.binary(max_size=SETTLE_BYTES // 2), max_size=8))
@settings(max_examples=50, deadline=None)
def test_a_prefix_is_the_digest_of_all_that_was_written_at_any_moment(writes: list[bytes]) -> None:
    looked, never_looked = (Transcript(max_bytes=MAX, streams=False) for _ in range(2))
    content, prefixes = b"", []
    for data in writes:
        looked.write(data)
        never_looked.write(data)
        content += data
        prefixes.append((looked.prefix(), Prefix(len(content), hashlib.sha256(content).digest())))
    assert all(got == expected for got, expected in prefixes)
    assert never_looked.prefix() == looked.prefix()
    assert never_looked.size == len(content)
    assert never_looked.output() is None


def test_nothing_written_is_the_empty_string() -> None:
    assert Transcript(max_bytes=MAX, streams=True).prefix() == Prefix(0, hashlib.sha256().digest())


@given(st.integers(1, 200), st.lists(st.integers(0, 200), max_size=4), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_the_output_is_that_of_the_whole_content_whatever_is_looked_at_meanwhile(
    count: int, looks: list[int], together: int
) -> None:
    events = [*(chunk(number) for number in range(count)), PING, DONE_EVENT]
    transcript = Transcript(max_bytes=MAX, streams=True)
    for number in range(0, len(events), together):
        transcript.write(b"".join(events[number : number + together]))
        if number in looks:
            transcript.prefix()
            transcript.output()
    content = b"".join(events)
    assert transcript.output() == output_of_stream(content, max_bytes=MAX)
    assert transcript.prefix() == Prefix(len(content), hashlib.sha256(content).digest())


@pytest.mark.parametrize("content", [b"data: {\n\n", b"not events", chunk(0, "x" * MAX)])
def test_content_that_cannot_be_read_is_digested_all_the_same(content: bytes) -> None:
    transcript = Transcript(max_bytes=MAX, streams=True)
    transcript.write(content)
    transcript.write(chunk(1))
    assert transcript.output() is None
    assert transcript.prefix().sha256 == hashlib.sha256(content + chunk(1)).digest()


def test_long_arguments_of_several_calls_are_joined_over_many_goes() -> None:
    transcript = Transcript(max_bytes=MAX, streams=True)
    parts = [f"{number}," for number in range(600)]
    for part in ["[", *parts, "0]"]:
        calls: list[JsonValue] = [
            {
                "index": index,
                "function": {"name": "fg"[index] if part == "[" else None, "arguments": part},
            }
            for index in (0, 1)
        ]
        choice: JsonObject = {"index": 0, "delta": {"tool_calls": calls}}
        transcript.write(encode_event({"choices": [choice]}))
    output = transcript.output()
    assert output is not None
    assert transcript.size > 3 * SETTLE_BYTES
    arguments = [*range(600), 0]
    assert output.choices[0]["message"] == {
        "tool_calls": [{"name": "f", "arguments": arguments}, {"name": "g", "arguments": arguments}]
    }


def test_bytes_are_not_kept() -> None:
    events = [chunk(number) for number in range(1000)]
    transcript = Transcript(max_bytes=MAX, streams=True)
    tracemalloc.start()
    try:
        for _ in range(10):
            for event in events:
                transcript.write(event)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert transcript.size > 2_500_000
    assert kept < 10 * 8_000 + 2 * SETTLE_BYTES + 32_768  # the text, a few KiB of lists, the rest


def best(work: Callable[[], object]) -> float:
    return min(timeit.repeat(work, number=1, repeat=7))


@pytest.mark.skipif(sys.gettrace() is not None, reason="tracing costs more than what is measured")
def test_a_chunk_costs_little_more_than_its_hash() -> None:
    """Against one `sha256.update` per chunk, so that a busy machine slows both: measured 6 times
    as long with decoding (1.4 µs to 0.24 µs), once as long without."""
    events = [chunk(number) for number in range(2000)]

    def hash_alone() -> None:
        digest = hashlib.sha256()
        for event in events:
            digest.update(event)

    def written(*, streams: bool) -> None:
        transcript = Transcript(max_bytes=MAX, streams=streams)
        for event in events:
            transcript.write(event)

    assert best(lambda: written(streams=False)) < 4 * best(hash_alone)
    assert best(lambda: written(streams=True)) < 20 * best(hash_alone)
