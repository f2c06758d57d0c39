"""What a replay compares, and how it says where two answers part."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx2
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import NotComparable, VerificationIncomplete
from appliance.rats.result import Tier
from appliance.verifier.replay import (
    COMPARED,
    GENERATION_S,
    Difference,
    Form,
    Recorded,
    Replayed,
    Result,
    Side,
    ask,
    first_difference,
    request_again,
    require_same_workload,
)
from appliance.wire.canonical import JsonObject, JsonValue
from appliance.wire.openai import Endpoint
from appliance.wire.output import Output, output_of_answer

WORKLOAD: JsonObject = {
    "image": {"version": "1", "commit": None, "roothash": None},
    "model": {
        "id": "m",
        "revision": None,
        "digest": "sha256:aa",
        "tokenizer_digest": "sha256:bb",
        "chat_template_digest": None,
    },
    "engine": {
        "name": "sglang",
        "version": "0.5.23",
        "settings_digest": "sha256:cc",
        "dtype": "bfloat16",
        "deterministic": True,
        "random_seed": 1,
    },
    "policy_digest": "sha256:dd",
}
SIDE = Side(
    "https://one",
    "ab" * 16,
    datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC),
    b"\x01" * 32,
    Tier.AFFIRMING,
)


def completions(*texts: str, reason: str = "stop") -> Output:
    choices: list[JsonValue] = [
        {"index": index, "text": text, "finish_reason": reason} for index, text in enumerate(texts)
    ]
    return output_of_answer({"choices": choices}, max_bytes=10_000)


def chat(reason: str = "stop", **message: JsonValue) -> Output:
    choice: JsonObject = {"index": 0, "message": message, "finish_reason": reason}
    return output_of_answer({"choices": [choice]}, max_bytes=10_000)


def call(city: str) -> list[JsonValue]:
    arguments = json.dumps({"city": city})
    return [{"function": {"name": "weather", "arguments": arguments}}]


# ------------------------------------------------------------------------------ the difference


@given(st.text(max_size=40), st.text(max_size=40), st.text(min_size=1, max_size=5))
def test_the_character_is_the_first_that_differs(same: str, one: str, other: str) -> None:
    first, second = same + one, same + other
    found = first_difference(completions("x", first), completions("x", second))
    if first == second:
        assert found is None
        return
    assert found is not None
    assert (found.choice, found.member) == (1, "text")
    assert found.character is not None
    place = found.character - 1
    assert first[:place] == second[:place]
    assert first[place : place + 1] != second[place : place + 1]


@pytest.mark.parametrize(
    ("one", "other", "expected", "words"),
    [
        (
            completions("ab"),
            completions("ab", "c"),
            Difference(None, "choices", None),
            "in the num",
        ),
        (
            completions("ab"),
            completions("ab", reason="length"),
            Difference(0, "finish_reason", None),
            "in finish_reason of choice 0",
        ),
        (
            # A text that ends early parts from the other behind its end, whatever the reasons say.
            completions("ab", reason="length"),
            completions("abc"),
            Difference(0, "text", 3),
            "at character 3 of choice 0 (text)",
        ),
        (
            chat(content="yes", reasoning_content="hm"),
            chat(content="no", reasoning_content="h!"),
            Difference(0, "message.reasoning_content", 2),
            "at character 2 of choice 0 (message.reasoning_content)",
        ),
        (chat(content="a"), chat(), Difference(0, "message.content", 1), "at character 1 of"),
        (
            chat(tool_calls=call("Paris")),
            chat(tool_calls=call("Lyon")),
            Difference(0, "message.tool_calls", None),
            "in message.tool_calls of choice 0",
        ),
        (
            chat(tool_calls=call("Paris")),
            chat(content="Paris"),
            Difference(0, "message.content", 1),
            "at character 1",
        ),
        (chat(content="a"), completions("a"), Difference(0, "text", 1), "at character 1 of"),
    ],
)
def test_every_kind_of_difference_is_placed(
    one: Output, other: Output, expected: Difference, words: str
) -> None:
    assert first_difference(one, other) == expected
    assert str(expected).startswith(words)
    back = first_difference(other, one)
    assert back == expected


@given(st.lists(st.text(max_size=20), max_size=4))
def test_equal_digests_and_no_difference_are_one_thing(texts: list[str]) -> None:
    one, other = completions(*texts), completions(*texts)
    assert first_difference(one, other) is None
    assert one.digest == other.digest


# ------------------------------------------------------------------------------- the workload


@pytest.mark.parametrize(("section", "member"), COMPARED)
def test_what_an_answer_follows_from_must_be_the_same(section: str, member: str) -> None:
    other = copy.deepcopy(WORKLOAD)
    part = other[section]
    assert isinstance(part, dict)
    part[member] = "another"
    with pytest.raises(NotComparable) as refused:
        require_same_workload(WORKLOAD, other)
    assert refused.value.message.startswith(f"{section}.{member}: expected ")
    assert refused.value.message.endswith("got another")


def test_the_first_member_that_differs_is_named() -> None:
    other = copy.deepcopy(WORKLOAD)
    assert isinstance(other["engine"], dict)
    # A changed setting changes the digest over all of them; the setting says more.
    other["engine"] |= {"random_seed": 2, "settings_digest": "sha256:ee"}
    with pytest.raises(NotComparable, match=r"engine\.random_seed: expected 1, got 2"):
        require_same_workload(WORKLOAD, other)
    with pytest.raises(NotComparable, match=r"model\.digest: expected sha256:aa, got null"):
        require_same_workload(WORKLOAD, {})


def test_the_release_of_the_appliance_and_its_policy_may_differ() -> None:
    require_same_workload(
        WORKLOAD, WORKLOAD | {"image": {"version": "2"}, "policy_digest": "sha256:ff"}
    )


# -------------------------------------------------------------------------------- the request


@pytest.mark.parametrize("form", ["recorded", "stream", "whole"])
@pytest.mark.parametrize("streamed", [True, False, None])
def test_what_is_asked_again_has_the_seed_and_says_only_what_matters(
    form: Form, *, streamed: bool | None
) -> None:
    body: JsonObject = {
        "model": "m",
        "n": 2,
        "temperature": 0.5,
        "seed": None,
        "tee": True,
        "provider": {"aci_verified": True},
        "stream_options": {"include_usage": True},
    }
    if streamed is not None:
        body["stream"] = streamed
    recorded = Recorded(Endpoint.CHAT, body, 2**53 - 1, b"", None)
    asked = json.loads(request_again(recorded, form))
    streams = form == "stream" or (form == "recorded" and streamed is True)
    assert asked.pop("stream", False) == streams
    assert asked == {"model": "m", "n": 2, "temperature": 0.5, "seed": 2**53 - 1}


# ------------------------------------------------------------------------------- what is told


@pytest.mark.parametrize(
    ("result", "first", "second", "status"),
    [
        ("reproduced", Tier.AFFIRMING, Tier.AFFIRMING, 0),
        ("reproduced", Tier.WARNING, Tier.AFFIRMING, 3),
        ("reproduced", Tier.AFFIRMING, Tier.WARNING, 3),
        ("differs", Tier.AFFIRMING, Tier.AFFIRMING, 1),
        ("differs", Tier.WARNING, Tier.WARNING, 1),
    ],
)
def test_the_exit_status_is_the_result_and_then_the_verdicts(
    result: Result, first: Tier, second: Tier, status: int
) -> None:
    replayed = Replayed(
        result, seed=7, original=replace(SIDE, verdict=first), again=replace(SIDE, verdict=second)
    )
    assert replayed.exit_status == status
    assert replayed.to_json()["result"] == result


@pytest.mark.parametrize("result", ["not_comparable", None])
def test_without_two_answers_nothing_is_learnt(result: Result | None) -> None:
    assert Replayed(result).exit_status == 2
    assert Replayed(result).to_json() == {
        "result": result,
        "error": None,
        "difference": None,
        "seed": None,
        "original": None,
        "replay": None,
    }


async def test_an_answer_that_trickles_is_given_up_in_time(
    autojump_clock: trio.abc.Clock,
) -> None:
    """A deadline for each read alone is none: an appliance may write a byte within each."""

    class Trickle(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                await trio.sleep(GENERATION_S / 10)
                yield b" "

    class Appliance(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, _request: httpx2.Request) -> httpx2.Response:
            return httpx2.Response(200, stream=Trickle())

    async with httpx2.AsyncClient(transport=Appliance(), base_url="https://one") as client:
        with pytest.raises(VerificationIncomplete, match="the whole answer within 3600 s"):
            await ask(client, "/v1/completions", b"{}")
    assert trio.current_time() == pytest.approx(GENERATION_S)
