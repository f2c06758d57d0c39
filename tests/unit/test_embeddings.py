"""Requests for embeddings, and what their answers say however they are written."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import InvalidRequest, Malformed, RequestError, UnknownParameter
from appliance.wire.canonical import JsonObject, JsonValue, canonical_json, parse_json_object
from appliance.wire.openai import (
    MAX_INPUT_CHARACTERS,
    MAX_INPUTS,
    PREFIXES,
    Endpoint,
    endpoint_of,
    forwarded_body,
    parse_request,
    plan_choices,
)
from appliance.wire.output import (
    Embeddings,
    decode_embeddings,
    embeddings_of_answer,
    encode_answer,
)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = st.integers(1, 8).flatmap(
    lambda size: st.lists(st.lists(floats, min_size=size, max_size=size), min_size=1, max_size=5)
)


def base64_of(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def told(*embeddings: Any, **more: Any) -> dict[str, Any]:
    """As SGLang 0.5.23 answers."""
    data = [
        {"embedding": one, "index": index, "object": "embedding"}
        for index, one in enumerate(embeddings)
    ]
    return {"data": data, "model": "/models/m", "object": "list", "usage": None, **more}


def read(*embeddings: Any, **more: Any) -> Embeddings:
    return decode_embeddings(json.dumps(told(*embeddings, **more)).encode())


# ----------------------------------------------------------------------------------------- answers


def test_the_digest_is_that_of_the_binary32_numbers_in_base64() -> None:
    # 1.0 is 00 00 80 3f, and -2.5 is 00 00 20 c0 (IEEE 754 section 3.4, least byte first).
    text = '{"data":[{"embedding":"AACAPwAAIMA=","index":0}]}'
    expected = hashlib.sha256(text.encode()).digest()
    assert read([1.0, -2.5]).digest == read([1, -2.5]).digest == expected
    assert read("AACAPwAAIMA=").digest == expected


@given(vectors)
def test_numbers_and_base64_have_one_digest(given: list[list[float]]) -> None:
    numbers, texts = read(*given), read(*map(base64_of, given))
    assert numbers.vectors() == texts.vectors()
    assert numbers.digest == texts.digest


@given(vectors)
def test_what_the_client_gets_is_what_the_engine_told(given: list[list[float]]) -> None:
    answer = read(*given, usage={"prompt_tokens": 3}).answer(model="m")
    data = encode_answer(answer)
    again = json.loads(data)
    assert [one["embedding"] for one in again["data"]] == given
    assert (again["object"], again["model"], again["usage"]) == ("list", "m", {"prompt_tokens": 3})
    assert decode_embeddings(data).digest == read(*given).digest


@given(vectors, st.data())
def test_another_bit_is_another_digest(given: list[list[float]], data: st.DataObject) -> None:
    raw = bytearray(base64.b64decode(base64_of(given[0])))
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    texts = [base64.b64encode(raw).decode(), *map(base64_of, given[1:])]
    try:
        digest = read(*texts).digest
    except Malformed:  # it has become infinite, or no number
        return
    assert digest != read(*given).digest


@pytest.mark.parametrize(
    "embeddings",
    [
        ([],),
        ("",),
        ([0.1],),  # no binary32
        ([1e39],),
        ("AACAPw",),  # not padded
        ("AACA",),  # three bytes
        ("AACAfw==",),  # infinity
        ("AADAfw==",),  # not a number
        ([1.0], [1.0, 2.0]),
        ("AACAPw==", [1.0, 2.0]),
    ],
)
def test_what_is_no_vector_has_no_digest(embeddings: tuple[Any, ...]) -> None:
    with pytest.raises(Malformed):
        _ = read(*embeddings).digest


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"object":"list"}',
        b'{"object":"error","message":"m","type":"t","code":400}',
        json.dumps(told([1.0], object="other")).encode(),
        json.dumps(told([None])).encode(),
        json.dumps(told(["1"])).encode(),
        json.dumps(told([True])).encode(),
        json.dumps(told([[1.0]])).encode(),
        json.dumps(told([math.nan])).encode(),
        json.dumps(told([math.inf])).encode(),
        json.dumps({**told(), "data": [{"index": 1, "embedding": [1.0]}]}).encode(),
        json.dumps({**told(), "data": [{"index": 0, "embedding": [1.0]}] * 2}).encode(),
        json.dumps({**told(), "data": [{"index": 0}]}).encode(),
        json.dumps({**told(), "data": [{"index": 0, "object": "x", "embedding": [1]}]}).encode(),
    ],
)
def test_what_is_no_answer_is_refused(answer: bytes) -> None:
    with pytest.raises(Malformed):
        decode_embeddings(answer)
    with pytest.raises(Malformed):
        embeddings_of_answer(parse_json_object(answer, max_nesting=8))


def test_a_repr_shows_no_number() -> None:
    assert repr(read([0.25], [0.5])) == "Embeddings(2)"


# ---------------------------------------------------------------------------------------- requests


def body(given: JsonValue, **more: JsonValue) -> JsonObject:
    return {"model": "m", "input": given, **more}


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", 1),
        (["a"], 1),
        (["a", "b"], 2),
        ([0], 1),
        ([1, 2, 3], 1),
        ([[1, 2], [3]], 2),
        (["a"] * MAX_INPUTS, MAX_INPUTS),
        ("a" * MAX_INPUT_CHARACTERS, 1),
    ],
)
def test_inputs_are_counted_as_they_are_embedded(given: JsonValue, inputs: int) -> None:
    assert parse_request(Endpoint.EMBEDDINGS, body(given)).inputs == inputs


@pytest.mark.parametrize(
    "given", ["", " ", [], ["a", 1], ["a", [1]], [[1], 1], [""], ["\n"], [[]], [-1], [2**31], [1.5]]
)
def test_what_is_no_input_is_refused_and_named(given: JsonValue) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_request(Endpoint.EMBEDDINGS, body(given))
    assert str(refused.value.param).startswith("input")


@pytest.mark.parametrize("given", ["a" * (MAX_INPUT_CHARACTERS + 1), ["a"] * (MAX_INPUTS + 1)])
def test_too_much_is_refused_without_being_quoted(given: JsonValue) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_request(Endpoint.EMBEDDINGS, body(given))
    assert "aa" not in refused.value.message


@pytest.mark.parametrize("key", ["stream", "n", "seed", "rid", "cache_salt", "lora_path", "x"])
def test_other_keys_are_not_known_here(key: str) -> None:
    with pytest.raises(UnknownParameter) as refused:
        parse_request(Endpoint.EMBEDDINGS, body("a", **{key: 1}))
    assert refused.value.param == key


def test_the_engine_gets_the_texts_in_one_request_and_nothing_is_set_in_it() -> None:
    asked = body(
        ["a", "b"], encoding_format="base64", dimensions=None, user="u", tee=True, provider={}
    )
    request = parse_request(Endpoint.EMBEDDINGS, asked)
    assert request.proof.tee is True
    [plan] = plan_choices(request, response_id="r", seed=7, cache_salt="s", max_choices=1)
    assert (dict(plan.set), plan.unset) == ({}, ("dimensions", "provider", "tee", "user"))
    expected: JsonObject = {"model": "m", "input": ["a", "b"], "encoding_format": "base64"}
    assert forwarded_body(asked, plan) == canonical_json(expected)


def test_a_measured_configuration_may_add_a_key() -> None:
    asked = body("a", priority=3)
    request = parse_request(Endpoint.EMBEDDINGS, asked, extra_keys=["priority"])
    assert request.body["priority"] == 3


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_any_input_is_understood_or_refused(given: Any) -> None:
    try:
        request = parse_request(Endpoint.EMBEDDINGS, body(given))
    except RequestError as error:
        assert str(error.param).startswith("input")  # noqa: PT017 - either way is right
    else:
        assert request.inputs >= 1


def test_the_aliases_are_served_too() -> None:
    assert {endpoint_of(f"{prefix}/embeddings") for prefix in PREFIXES} == {Endpoint.EMBEDDINGS}
