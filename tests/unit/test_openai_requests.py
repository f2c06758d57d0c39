"""Request bodies: what is accepted, what is refused and how, and what the engine gets.

Which keys there are is read from the declarations themselves, so a field added tomorrow is covered
the same day: every declared place is tried with values it takes and with values it does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec.inspect as declared
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.config import REFUSED_REQUEST_KEYS
from appliance.errors import (
    InvalidRequest,
    InvalidSeed,
    RequestError,
    SessionNotAccepted,
    UnknownParameter,
    UnsupportedFeature,
)
from appliance.wire.canonical import (
    MAX_SAFE_INTEGER,
    JsonObject,
    JsonValue,
    canonical_json,
    parse_json_object,
)
from appliance.wire.openai import (
    GATEWAY_KEYS,
    IGNORED_KEYS,
    MAX_MODEL_NAME_BYTES,
    NOT_TEMPLATE_VARIABLES,
    ChatRequest,
    ChoicePlan,
    CompletionRequest,
    Endpoint,
    InferenceRequest,
    Proof,
    convert,
    forwarded_body,
    parse_request,
    plan_choices,
)

ENDPOINTS = {Endpoint.CHAT: ChatRequest, Endpoint.COMPLETION: CompletionRequest}

TEXT = "data:text/plain,x"
"""A string that every declared string takes, a media URL included."""

# ------------------------------------------------------------- the declarations, as values to try


@dataclass(frozen=True)
class Place:
    """A declared field somewhere in a body, and how to make a body with a value there."""

    endpoint: Endpoint
    path: str
    type: declared.Type
    body: Callable[[JsonValue], JsonObject] = field(repr=False)

    @property
    def id(self) -> str:
        return f"{self.endpoint.name.lower()}.{self.path}"


def valid(kind: declared.Type) -> Iterator[JsonValue]:
    """Values of every shape a declared type takes, the smallest first."""
    match kind:
        case declared.NoneType():
            yield None
        case declared.BoolType():
            yield False
        case declared.IntType(ge=low, le=high):
            yield from (0 if low is None else low, 1 if high is None else high)
        case declared.FloatType(gt=above, ge=low, le=high):
            bounded = 0.5 if high is None else high
            yield bounded
            yield min(1, int(bounded))  # an integer is a number
            yield min((above or low or 0) + 0.25, bounded)
        case declared.StrType(pattern=None):
            yield TEXT
        case declared.StrType():
            yield "123"
        case declared.LiteralType(values=values):
            yield from values
        case declared.ListType(item_type=item, min_length=shortest):
            for value in valid(item):
                yield [value]
            if not shortest:
                yield []
        case declared.DictType(key_type=key, value_type=value_type):
            for value in valid(value_type):
                yield {str(next(valid(key))): value}
            yield {}
        case declared.StructType():
            yield minimal(kind)
        case declared.UnionType(types=types):
            for alternative in types:
                yield from valid(alternative)
        case declared.AnyType():
            yield None
            yield [1, {"a": None}]
            yield {"a": TEXT}
        case _:
            raise NotImplementedError(kind)


def minimal(kind: declared.StructType) -> JsonObject:
    found: JsonObject = {str(kind.tag_field): str(kind.tag)} if kind.tag_field else {}
    required = (item for item in kind.fields if item.required)
    return found | {item.encode_name: next(valid(item.type)) for item in required}


SAMPLES: dict[str, JsonValue] = {
    "null": None,
    "bool": True,
    "int": 1,
    "float": 1.5,
    "str": "text",
    "array": [[[]]],
    "object": {"nobody": {}},
}


def json_types(kind: declared.Type) -> set[str]:
    match kind:
        case declared.NoneType():
            return {"null"}
        case declared.BoolType():
            return {"bool"}
        case declared.IntType():
            return {"int"}
        case declared.FloatType():
            return {"int", "float"}
        case declared.StrType() | declared.LiteralType():
            return {"str"}
        case declared.ListType():
            return {"array"}
        case declared.DictType() | declared.StructType():
            return {"object"}
        case declared.UnionType(types=types):
            return set().union(*map(json_types, types))
        case declared.AnyType():
            return set(SAMPLES)
        case _:
            raise NotImplementedError(kind)


def wrong(kind: declared.Type) -> Iterator[JsonValue]:
    """Values of every JSON type that a declared type does not take, and those out of its bounds."""
    for name in SAMPLES.keys() - json_types(kind):
        yield SAMPLES[name]
    yield from out_of_bounds(kind)


def out_of_bounds(kind: declared.Type) -> Iterator[JsonValue]:
    match kind:
        case declared.IntType(ge=low, le=high):
            yield from () if low is None else (low - 1,)
            yield from () if high is None else (high + 1,)
        case declared.FloatType(gt=above, ge=low, le=high):
            yield from () if above is None else (above,)
            yield from () if low is None else (low - 0.5,)
            yield from () if high is None else (high + 0.5,)
        case declared.StrType(min_length=shortest, max_length=longest, pattern=pattern):
            yield from ("",) if shortest else ()
            yield from ("x" * (longest + 1),) if longest else ()
            yield from ("12x", "1\n") if pattern else ()
        case declared.LiteralType():
            yield "none of these"
        case declared.ListType(item_type=item, min_length=shortest, max_length=longest):
            yield from ([],) if shortest else ()
            yield from ([next(valid(item))] * (longest + 1),) if longest else ()
            yield from ([value] for value in wrong(item))
        case declared.DictType(key_type=key, value_type=value_type):
            yield from ({str(next(valid(key))): value} for value in wrong(value_type))
            yield from ({str(value): next(valid(value_type))} for value in out_of_bounds(key))
        case declared.StructType():
            yield from (
                {key: value for key, value in minimal(kind).items() if key != name}
                for name in minimal(kind)
            )
            yield from ({**minimal(kind), str(kind.tag_field): "?"},) if kind.tag_field else ()
        case declared.UnionType(types=types):
            yield from (value for one in types for value in out_of_bounds(one))


def structs_in(
    kind: declared.Type,
) -> Iterator[tuple[declared.StructType, str, Callable[[JsonValue], JsonValue]]]:
    """The objects a declared type can hold: their path from it, and how to put one there."""
    match kind:
        case declared.StructType():
            yield kind, "", lambda value: value
        case declared.ListType(item_type=item):
            for found, path, put in structs_in(item):
                yield found, f"[0]{path}", lambda value, put=put: [put(value)]  # type: ignore[misc]
        case declared.UnionType(types=types):
            for alternative in types:
                yield from structs_in(alternative)


def places(
    endpoint: Endpoint,
    kind: declared.StructType,
    wrap: Callable[[JsonObject], JsonObject],
    prefix: str = "",
) -> Iterator[Place]:
    for item in kind.fields:

        def body(value: JsonValue, name: str = item.encode_name) -> JsonObject:
            return wrap({**minimal(kind), name: value})

        path = f"{prefix}{item.encode_name}"
        yield Place(endpoint, path, item.type, body)
        for found, inner, put in structs_in(item.type):

            def around(
                value: JsonObject,
                body: Callable[[JsonValue], JsonObject] = body,
                put: Callable[[JsonValue], JsonValue] = put,
            ) -> JsonObject:
                return body(put(value))

            yield from places(endpoint, found, around, f"{path}{inner}.")


def struct(kind: type) -> declared.StructType:
    found = declared.type_info(kind)
    assert isinstance(found, declared.StructType)
    return found


PLACES = [
    place
    for endpoint, kind in ENDPOINTS.items()
    for place in places(endpoint, struct(kind), lambda body: body)
]

# What these take is decided beyond their declaration; they have tests of their own below.
CHECKED_BY_HAND = {"seed", "provider", "prompt"}


def of_any_type(place: Place) -> bool:
    return json_types(place.type) == set(SAMPLES)


def parse(endpoint: Endpoint, body: JsonObject) -> InferenceRequest:
    """As the gateway does: through bytes."""
    return parse_request(endpoint, parse_json_object(json.dumps(body).encode(), max_nesting=16))


def refusal(endpoint: Endpoint, body: JsonObject) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(endpoint, body)
    return caught.value


def chat(**keys: JsonValue) -> JsonObject:
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}], **keys}


def completion(**keys: JsonValue) -> JsonObject:
    return {"model": "m", "prompt": "hello", **keys}


def smallest(endpoint: Endpoint, **keys: JsonValue) -> JsonObject:
    return chat(**keys) if endpoint is Endpoint.CHAT else completion(**keys)


both_endpoints = pytest.mark.parametrize("endpoint", ENDPOINTS)
every_place = pytest.mark.parametrize("place", PLACES, ids=lambda place: place.id)


# --------------------------------------------------------------------------- the allow-list


def test_the_declarations_were_found() -> None:
    paths = {place.id for place in PLACES}
    assert {"chat.messages[0].content[0].image_url.url", "completion.prompt"} <= paths
    assert {"chat.tools[0].function.parameters", "chat.tool_choice.function.name"} <= paths
    assert {
        "completion.response_format.json_schema.schema",
        "chat.stream_options.include_usage",
    } <= paths


@every_place
def test_every_declared_key_is_accepted_with_every_valid_value(place: Place) -> None:
    for value in valid(place.type):
        if place.path not in CHECKED_BY_HAND:
            parse(place.endpoint, place.body(value))


@pytest.mark.parametrize(
    "place", [place for place in PLACES if not of_any_type(place)], ids=lambda place: place.id
)
def test_every_declared_key_refuses_wrong_types_and_bounds_and_is_named(place: Place) -> None:
    tried = 0
    for value in wrong(place.type):
        error = refusal(place.endpoint, place.body(value))
        assert isinstance(error, InvalidRequest | UnknownParameter), value
        assert error.param is not None
        assert error.param.startswith(place.path), value
        assert error.message.startswith(error.param)
        assert error.http_status == 400
        tried += 1
    assert tried > 0


@every_place
def test_an_undeclared_key_is_refused_beside_every_declared_one(place: Place) -> None:
    for found, inner, put in structs_in(place.type):
        error = refusal(place.endpoint, place.body(put({**minimal(found), "nobody": 1})))
        assert isinstance(error, UnknownParameter)
        assert error.param == f"{place.path}{inner}.nobody"


# What SGLang 0.5.23 has in its request classes and we do not offer.
ENGINE_KEYS = sorted(
    REFUSED_REQUEST_KEYS
    | {
        "ebnf",
        "images_config",
        "json_schema",
        "max_dynamic_patch",
        "min_dynamic_patch",
        "mm_processor_kwargs",
        "regex",
        "return_cached_tokens_details",
        "return_hidden_states",
        "return_input_ids_in_sglext",
        "return_meta_info",
        "return_output_ids_in_sglext",
        "return_prompt_token_ids",
        "return_routed_experts",
        "return_sampling_mask",
        "return_spec_tokens_details",
        "routed_experts_start_len",
        "sampling_logprobs_mode",
        "stop_regex",
        "task",
        "thinking",
        "use_audio_in_video",
        "video_config",
    }
)


@both_endpoints
@pytest.mark.parametrize("key", ENGINE_KEYS)
@pytest.mark.parametrize("value", [None, "x", 1, {}])
def test_keys_that_reach_into_the_engine_are_refused_by_name(
    endpoint: Endpoint, key: str, value: JsonValue
) -> None:
    error = refusal(endpoint, smallest(endpoint, **{key: value}))
    assert isinstance(error, UnknownParameter)
    assert error.param == key
    assert error.message == f"{key}: this parameter is not known here"


@both_endpoints
@pytest.mark.parametrize("key", ["", "a\nb", "a`b", "x` - at `$.model", "ü", "k" * 500])
def test_an_unknown_key_of_any_spelling_is_refused(endpoint: Endpoint, key: str) -> None:
    error = refusal(endpoint, smallest(endpoint, **{key: 1}))
    assert len(error.message) < 128


def test_the_keys_of_one_endpoint_are_unknown_at_the_other() -> None:
    assert isinstance(refusal(Endpoint.COMPLETION, completion(messages=[])), UnknownParameter)
    assert isinstance(refusal(Endpoint.CHAT, chat(prompt="x")), UnknownParameter)


def test_extra_keys_pass_unchecked_where_they_are_not_declared() -> None:
    body = chat(regex={"any": ["thing"]})
    request = parse_request(Endpoint.CHAT, body, extra_keys=("regex",))
    (only,) = plan(request)
    assert parse_json_object(forwarded_body(body, only), max_nesting=8)["regex"] == {
        "any": ["thing"]
    }
    with pytest.raises(UnknownParameter):
        parse_request(Endpoint.CHAT, body, extra_keys=("ebnf",))


@pytest.mark.parametrize("key", ["model", "seed", "stream", "provider", "messages", "n"])
def test_an_extra_key_that_is_declared_keeps_its_checks(key: str) -> None:
    parse_request(Endpoint.CHAT, chat(), extra_keys=(key,))
    with pytest.raises(RequestError):
        parse_request(Endpoint.CHAT, chat(**{key: 0.5}), extra_keys=(key,))


# ---------------------------------------------------------------------- errors never quote input

CANARY = "canary7f3a"
SHAPES = [
    "{}",
    "x' - at `{}`",
    "x` - at `$.{}",
    "' - at `$.{}`",
    "Expected `{}`",
    "Object contains unknown field `{}`",
    "{}\n - at `$`",
]


def assert_says_nothing(error: RequestError) -> None:
    told = f"{error} {error!r} {error.message} {error.param} {error.args} {error.__dict__}"
    assert CANARY not in told
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


def values_with(canary: str) -> list[JsonValue]:
    return [
        canary,
        [canary],
        [[canary]],
        {"type": canary},
        {canary: 1},
        [{"type": canary}],
        {"role": canary},
    ]


@every_place
def test_no_error_quotes_a_value_wherever_it_stands(place: Place) -> None:
    for shape in SHAPES:
        for value in values_with(shape.format(CANARY)):
            try:
                request = parse(place.endpoint, place.body(value))
            except UnknownParameter:
                assert CANARY in str(value)  # a key is named, as the protocol says
                assert isinstance(value, dict | list)
            except RequestError as error:
                assert_says_nothing(error)
            else:
                assert place.path == "model" or CANARY not in repr(request)


any_json: st.SearchStrategy[JsonValue] = st.recursive(
    st.sampled_from([shape.format(CANARY) for shape in SHAPES])
    | st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(-3, 3),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "url", "function", "name", "1"]),
            children,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@both_endpoints
@given(data=st.data())
@settings(deadline=None)
def test_no_error_quotes_a_value_of_a_random_body(endpoint: Endpoint, data: st.DataObject) -> None:
    keys = st.sampled_from(sorted(ENDPOINTS[endpoint].__struct_fields__))
    body = data.draw(st.dictionaries(keys, any_json, max_size=4))
    try:
        request = parse(endpoint, {**smallest(endpoint), **body})
    except RequestError as error:
        assert_says_nothing(error)
    else:
        assert CANARY in request.model or CANARY not in repr(request)
        assert CANARY not in repr(plan(request))


def test_the_types_that_hold_a_prompt_do_not_show_it() -> None:
    body = chat(messages=[{"role": "user", "content": CANARY}])
    assert CANARY not in repr(convert(body, ChatRequest))
    assert CANARY not in repr(convert(completion(prompt=CANARY), CompletionRequest))
    request = parse(Endpoint.COMPLETION, completion(prompt=[CANARY, CANARY]))
    assert CANARY not in repr(request)
    assert CANARY not in repr(plan(request))


# ------------------------------------------------------------------------------------- nulls


@both_endpoints
def test_a_null_is_as_good_as_an_absent_key(endpoint: Endpoint) -> None:
    required = set(smallest(endpoint))
    optional = set(ENDPOINTS[endpoint].__struct_fields__) - required
    body = smallest(endpoint, **dict.fromkeys(sorted(optional)))
    (with_nulls,), (without,) = (
        plan(parse(endpoint, body)),
        plan(parse(endpoint, smallest(endpoint))),
    )
    assert with_nulls.unset == tuple(sorted(optional))
    assert forwarded_body(body, with_nulls) == forwarded_body(smallest(endpoint), without)


@both_endpoints
def test_a_required_key_may_be_neither_absent_nor_null(endpoint: Endpoint) -> None:
    for key in smallest(endpoint):
        absent = {name: value for name, value in smallest(endpoint).items() if name != key}
        assert refusal(endpoint, absent).message == f"{key}: required and missing"
        assert refusal(endpoint, smallest(endpoint, **{key: None})).param == key


# ---------------------------------------------------------------------------------- provider


@both_endpoints
@pytest.mark.parametrize(
    "provider",
    [
        None,
        {},
        {"aci_verified": True},
        {"aci_verified": False},
        {"order": ["a"], "allow_fallbacks": False, "only": None},
        {"aci": 1, "ACI_session_ids": []},
    ],
)
def test_a_provider_that_demands_what_this_service_is_anyway_is_accepted_and_not_forwarded(
    endpoint: Endpoint, provider: JsonValue
) -> None:
    body = smallest(endpoint, provider=provider)
    assert b"provider" not in forwarded_body(body, plan(parse(endpoint, body))[0])


@both_endpoints
@pytest.mark.parametrize(
    "provider", [{"aci_session_ids": ["s"]}, {"aci_session_ids": ["s", "t"], "aci_verified": True}]
)
def test_a_session_cannot_be_pinned(endpoint: Endpoint, provider: JsonValue) -> None:
    error = refusal(endpoint, smallest(endpoint, provider=provider))
    assert isinstance(error, SessionNotAccepted)
    assert (error.http_status, error.code) == (412, "session_not_accepted")


@both_endpoints
@pytest.mark.parametrize(
    ("provider", "param"),
    [
        ("x", "provider"),
        ([], "provider"),
        (True, "provider"),
        (0, "provider"),
        ({"aci_verified": None}, "provider.aci_verified"),
        ({"aci_verified": "true"}, "provider.aci_verified"),
        ({"aci_verified": 1}, "provider.aci_verified"),
        ({"aci_session_ids": []}, "provider.aci_session_ids"),
        ({"aci_session_ids": None}, "provider.aci_session_ids"),
        ({"aci_session_ids": "s"}, "provider.aci_session_ids"),
        ({"aci_session_ids": {"s": 1}}, "provider.aci_session_ids"),
        ({"aci_session_ids": ["s", 1]}, "provider.aci_session_ids"),
        ({"aci_session_ids": ["s"], "aci_verified": False}, "provider.aci_session_ids"),
        ({"aci_": 1}, "provider.aci_"),
        ({"aci_pin": True, "aci_session_ids": ["s"]}, "provider.aci_pin"),
        ({"aci_" + "k" * 500: 1}, "provider.aci_" + "k" * 60),
    ],
)
def test_other_demands_on_the_provider_are_refused_with_400(
    endpoint: Endpoint, provider: JsonValue, param: str
) -> None:
    error = refusal(endpoint, smallest(endpoint, provider=provider))
    assert (error.http_status, error.param) == (400, param)


# ----------------------------------------------------------------------------------- receipts


@both_endpoints
@pytest.mark.parametrize(
    ("keys", "proof"),
    [
        ({}, Proof()),
        ({"tee": True}, Proof(tee=True)),
        ({"tee": False, "stream_options": None}, Proof(tee=False)),
        ({"stream_options": {"include_receipt": True}}, Proof(receipt=True)),
        ({"stream": False, "stream_options": {"include_receipt": True}}, Proof(receipt=True)),
        ({"stream_options": {"include_checkpoints": True}}, Proof(checkpoints=True)),
    ],
)
def test_what_is_to_be_proven_is_understood_and_not_forwarded(
    endpoint: Endpoint, keys: dict[str, JsonValue], proof: Proof
) -> None:
    body = smallest(endpoint, **{"stream": True, **keys})
    understood = parse_request(endpoint, body)
    assert understood.proof == proof
    assert understood.proof.at_end == (proof.tee is True or proof.receipt)
    assert understood.proof.wanted == (proof.tee is True or proof.receipt or proof.checkpoints)
    sent = forwarded(endpoint, body)
    assert "tee" not in sent
    assert sent.get("stream_options", {}) == {}


@both_endpoints
@pytest.mark.parametrize("stream", [False, None])
def test_checkpoints_on_the_way_are_for_streams_only(
    endpoint: Endpoint, stream: bool | None
) -> None:
    options: JsonObject = {"include_checkpoints": True}
    error = refusal(endpoint, smallest(endpoint, stream=stream, stream_options=options))
    assert isinstance(error, InvalidRequest)
    assert error.param == "stream_options.include_checkpoints"


@pytest.mark.parametrize(
    ("body", "query", "tee"),
    [
        (None, [], None),
        (None, ["true"], True),
        (None, ["false"], False),
        (True, [], True),
        (True, ["true"], True),
        (False, ["false"], False),
        (True, ["false"], "contradicts"),
        (False, ["true"], "contradicts"),
        (None, ["yes"], "expected true or false"),
        (None, ["True"], "expected true or false"),
        (None, [""], "expected true or false"),
        (None, ["true", "true"], "once"),
        (True, ["true", "false"], "once"),
    ],
)
def test_the_query_says_tee_once_and_nothing_contrary_to_the_body(
    body: bool | None, query: list[str], tee: bool | str | None
) -> None:
    if not isinstance(tee, str):
        assert Proof(tee=body).with_query(query) == Proof(tee=tee)
        return
    with pytest.raises(InvalidRequest, match=tee) as caught:
        Proof(tee=body).with_query(query)
    assert caught.value.param == "tee"


@both_endpoints
def test_not_asking_for_a_receipt_is_accepted_and_not_forwarded(endpoint: Endpoint) -> None:
    options: JsonObject = {"include_receipt": False, "include_checkpoints": False}
    body = smallest(endpoint, tee=False, stream=True, stream_options=options)
    sent = forwarded(endpoint, body)
    assert "tee" not in sent
    assert sent["stream_options"] == {}


# ----------------------------------------------------------------------- what the engine dies of


@both_endpoints
@pytest.mark.parametrize("min_p", [5e-324, 0.1, 1])
def test_min_p_is_refused_because_the_engine_dies_of_it_beside_a_seed(
    endpoint: Endpoint, min_p: float
) -> None:
    assert refusal(endpoint, smallest(endpoint, min_p=min_p)).param == "min_p"


@both_endpoints
@pytest.mark.parametrize("min_p", [None, 0, 0.0, -0.0])
def test_min_p_that_asks_for_nothing_is_accepted(endpoint: Endpoint, min_p: float | None) -> None:
    parse(endpoint, smallest(endpoint, min_p=min_p))


@pytest.mark.parametrize("name", sorted(NOT_TEMPLATE_VARIABLES))
def test_a_template_variable_that_is_none_is_refused_by_name(name: str) -> None:
    """`messages` made the engine answer 500, `return_tensors` would reach its scheduler."""
    error = refusal(Endpoint.CHAT, chat(chat_template_kwargs={"thinking": True, name: True}))
    assert isinstance(error, UnsupportedFeature)
    assert error.param == f"chat_template_kwargs.{name}"


def test_variables_of_a_template_are_accepted() -> None:
    parse(Endpoint.CHAT, chat(chat_template_kwargs={"enable_thinking": False, "x": {"y": [1]}}))


# ------------------------------------------------------------------------------------- media


MEDIA = ["image_url", "video_url", "audio_url"]


def with_media(kind: str, url: str) -> JsonObject:
    part: JsonObject = {"type": kind, kind: {"url": url}}
    content: list[JsonValue] = [{"type": "text", "text": "look"}, part]
    return chat(messages=[{"role": "system", "content": "s"}, {"role": "user", "content": content}])


@pytest.mark.parametrize("kind", MEDIA)
def test_media_in_the_request_itself_are_accepted(kind: str) -> None:
    parse(Endpoint.CHAT, with_media(kind, "data:image/png;base64,AAAA"))


@pytest.mark.parametrize("kind", MEDIA)
@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a.png",
        "http://127.0.0.1:1/",
        "file:///etc/passwd",
        "/etc/passwd",
        "",
        " data:,x",
        "DATA:,x",
        "data",
        "s3://bucket/key",
        "AAAA",
    ],
)
def test_media_from_anywhere_else_are_refused(kind: str, url: str) -> None:
    error = refusal(Endpoint.CHAT, with_media(kind, url))
    assert isinstance(error, UnsupportedFeature)
    assert error.param == "messages[1].content[1]"


def test_an_image_may_say_its_detail() -> None:
    image: JsonObject = {"url": "data:,x", "detail": "low"}
    content: list[JsonValue] = [{"type": "image_url", "image_url": image}]
    parse(Endpoint.CHAT, chat(messages=[{"role": "user", "content": content}]))


# ------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("text", ["text"]),
        ("", [""]),
        (["text"], ["text"]),
        (["a", "", "a"], ["a", "", "a"]),
        ([0, 1, 2**31 - 1], [[0, 1, 2**31 - 1]]),
        ([[1, 2]], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_is_a_text_token_ids_or_a_list_of_either(
    prompt: JsonValue, prompts: list[JsonValue]
) -> None:
    body = completion(prompt=prompt)
    request = parse(Endpoint.COMPLETION, body)
    assert list(request.prompts) == prompts
    plans = plan(request)
    assert [plan.prompt_index for plan in plans] == list(range(len(prompts)))
    sent = [parse_json_object(forwarded_body(body, each), max_nesting=4) for each in plans]
    assert [each["prompt"] for each in sent] == prompts


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        1,
        1.5,
        True,
        {},
        [],
        [[]],
        ["a", 1],
        [1, [2]],
        ["a", ["b"]],
        [[1], []],
        [["a"]],
        [1.0],
        [-1],
        [2**31],
        [True],
        [None],
        [[True]],
        [[[1]]],
        [{}],
    ],
)
def test_any_other_prompt_is_refused(prompt: JsonValue) -> None:
    error = refusal(Endpoint.COMPLETION, completion(prompt=prompt))
    assert (error.param or "").startswith("prompt")


# ------------------------------------------------------------------------- seed, model, options


@both_endpoints
@pytest.mark.parametrize("seed", [0, 1, 2**31, MAX_SAFE_INTEGER])
def test_a_seed_is_an_integer_up_to_the_largest_safe_one(endpoint: Endpoint, seed: int) -> None:
    assert parse(endpoint, smallest(endpoint, seed=seed)).seed == seed


@both_endpoints
@pytest.mark.parametrize("seed", [-1, -0.5, 1.5, True, False, "1", "", [], [1], {}])
def test_any_other_seed_is_invalid_seed(endpoint: Endpoint, seed: JsonValue) -> None:
    error = refusal(endpoint, smallest(endpoint, seed=seed))
    assert isinstance(error, InvalidSeed)
    assert (error.code, error.param) == ("invalid_seed", "seed")


@pytest.mark.parametrize("seed", [MAX_SAFE_INTEGER + 1, 2**64, 1.0])
def test_a_seed_that_the_json_parser_does_not_give_is_refused_all_the_same(seed: float) -> None:
    with pytest.raises(InvalidSeed):
        parse_request(Endpoint.CHAT, chat(seed=seed))


@both_endpoints
def test_a_model_name_is_bounded_in_bytes_not_characters(endpoint: Endpoint) -> None:
    longest = "é" * (MAX_MODEL_NAME_BYTES // 2)
    assert parse(endpoint, smallest(endpoint, model=longest)).model == longest
    error = refusal(endpoint, smallest(endpoint, model=longest + "x"))
    assert (type(error), error.param) == (InvalidRequest, "model")


@both_endpoints
def test_streaming_is_off_unless_asked_for(endpoint: Endpoint) -> None:
    request = parse(endpoint, smallest(endpoint))
    assert not request.stream
    assert not request.include_usage
    options: JsonObject = {"include_usage": True}
    request = parse(endpoint, smallest(endpoint, stream=True, stream_options=options))
    assert request.stream
    assert request.include_usage


# ------------------------------------------------------------------------------------ the plan


def plan(
    request: InferenceRequest, *, seed: int = 5, max_choices: int = 128
) -> tuple[ChoicePlan, ...]:
    return plan_choices(
        request, response_id="chatcmpl-1", seed=seed, cache_salt="salt", max_choices=max_choices
    )


def forwarded(endpoint: Endpoint, body: JsonObject) -> JsonObject:
    """What the engine gets for a request of one choice."""
    (only,) = plan(parse(endpoint, body))
    return parse_json_object(forwarded_body(body, only), max_nesting=16)


OURS: JsonObject = {"rid": "chatcmpl-1", "seed": 5, "cache_salt": "salt"}
"""What a request of one choice gets from the gateway."""


def test_one_choice_is_one_engine_request_with_our_id_a_seed_and_the_tenants_salt() -> None:
    assert forwarded(Endpoint.CHAT, chat()) == {**chat(), **OURS}
    assert forwarded(Endpoint.CHAT, chat(seed=9, n=1)) == {**chat(n=1), **OURS, "seed": 9}


@both_endpoints
def test_n_choices_are_n_engine_requests_with_ids_and_seeds_of_their_own(
    endpoint: Endpoint,
) -> None:
    body = smallest(endpoint, n=3, seed=7)
    plans = plan(parse(endpoint, body))
    assert [each.index for each in plans] == [0, 1, 2]
    assert {each.prompt_index for each in plans} == {0}
    sent = [parse_json_object(forwarded_body(body, each), max_nesting=4) for each in plans]
    assert [each["rid"] for each in sent] == ["chatcmpl-1-0", "chatcmpl-1-1", "chatcmpl-1-2"]
    assert [each["seed"] for each in sent] == [7, 8, 9]
    assert [each["cache_salt"] for each in sent] == ["salt"] * 3
    assert [each["n"] for each in sent] == [1, 1, 1]


def test_prompts_times_n_choices_are_in_openais_order() -> None:
    body = completion(prompt=["a", "b"], n=2)
    plans = plan(parse(Endpoint.COMPLETION, body))
    assert [(each.index, each.prompt_index) for each in plans] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert [each.set["prompt"] for each in plans] == ["a", "a", "b", "b"]
    assert [each.set["seed"] for each in plans] == [5, 6, 7, 8]
    assert all(each.set["n"] == 1 for each in plans)


def test_seeds_wrap_around_past_the_largest_safe_integer() -> None:
    plans = plan(parse(Endpoint.CHAT, chat(n=3, seed=MAX_SAFE_INTEGER - 1)))
    assert [each.set["seed"] for each in plans] == [MAX_SAFE_INTEGER - 1, MAX_SAFE_INTEGER, 0]
    plans = plan(parse(Endpoint.CHAT, chat(n=2)), seed=MAX_SAFE_INTEGER)
    assert [each.set["seed"] for each in plans] == [MAX_SAFE_INTEGER, 0]


@pytest.mark.parametrize(
    ("keys", "count"),
    [({"n": 4}, 4), ({"prompt": ["a"] * 4}, 4), ({"prompt": ["a", "b"], "n": 2}, 4)],
)
def test_choices_are_bounded_over_prompts_and_n(keys: dict[str, JsonValue], count: int) -> None:
    request = parse(Endpoint.COMPLETION, completion(**keys))
    assert len(plan(request, max_choices=count)) == count
    with pytest.raises(InvalidRequest, match="at most 3 choices") as caught:
        plan(request, max_choices=3)
    assert caught.value.param == "n"


@both_endpoints
def test_ignored_and_gateway_keys_are_not_forwarded(endpoint: Endpoint) -> None:
    kind = struct(ENDPOINTS[endpoint])
    keys = {
        item.encode_name: next(value for value in valid(item.type) if value is not None)
        for item in kind.fields
        if item.encode_name in IGNORED_KEYS | GATEWAY_KEYS - {"provider"}
    }
    assert {"user", "store", "metadata", "service_tier", "tee"} <= keys.keys()
    body = smallest(endpoint, **keys)
    assert forwarded(endpoint, body) == {**smallest(endpoint), **OURS}


@both_endpoints
@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, {}),
        ({"include_usage": True}, {"include_usage": True}),
        (
            {"include_usage": None, "continuous_usage_stats": False},
            {"continuous_usage_stats": False},
        ),
        ({"include_obfuscation": True, "include_usage": False}, {"include_usage": False}),
        ({"include_receipt": False, "include_checkpoints": None}, {}),
    ],
)
def test_stream_options_reach_the_engine_without_ours_and_only_while_streaming(
    endpoint: Endpoint, options: JsonObject, sent: JsonObject
) -> None:
    streamed = forwarded(endpoint, smallest(endpoint, stream=True, stream_options=options))
    assert streamed["stream_options"] == sent
    for stream in (False, None):
        body = smallest(endpoint, stream=stream, stream_options=options)
        assert "stream_options" not in forwarded(endpoint, body)


bodies = st.fixed_dictionaries(
    {"model": st.just("m")},
    optional={
        "n": st.none() | st.integers(1, 3),
        "seed": st.none() | st.integers(0, MAX_SAFE_INTEGER),
        "temperature": st.none() | st.floats(0, 2),
        "user": st.text(max_size=3),
        "stream": st.none() | st.booleans(),
        "stream_options": st.none()
        | st.fixed_dictionaries({}, optional={"include_usage": st.none() | st.booleans()}),
        "stop": st.none() | st.lists(st.text(max_size=3), max_size=2),
        "metadata": st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2),
        "provider": st.sampled_from([None, {"aci_verified": True}]),
    },
)
prompts = st.text(max_size=5) | st.lists(st.text(max_size=5), min_size=1, max_size=3)


@given(bodies, prompts)
@settings(deadline=None)
def test_forwarded_bytes_are_jcs_of_the_body_with_the_change_and_can_be_recomputed(
    keys: dict[str, Any], prompt: str | list[str]
) -> None:
    body: JsonObject = {**keys, "prompt": list(prompt) if isinstance(prompt, list) else prompt}
    body = parse_json_object(canonical_json(body), max_nesting=8)
    before = canonical_json(body)
    for each in plan(parse_request(Endpoint.COMPLETION, body)):
        sent = forwarded_body(body, each)
        recomputed = dict(body)
        for key in each.unset:
            del recomputed[key]
        recomputed.update(each.set)
        assert sent == canonical_json(recomputed)
        assert sent == canonical_json(parse_json_object(sent, max_nesting=8))
        assert None not in recomputed.values()
        assert not recomputed.keys() & (GATEWAY_KEYS | IGNORED_KEYS)
    assert canonical_json(body) == before


def test_an_endpoint_names_its_response_ids_as_openai_does() -> None:
    assert Endpoint.CHAT.id_prefix == "chatcmpl-"
    assert Endpoint.COMPLETION.id_prefix == "cmpl-"
