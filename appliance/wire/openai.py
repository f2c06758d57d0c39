"""OpenAI's request bodies, strictly, and what we change before the engine sees one.

Three questions, three functions, in this order:

1. `parse_request`: is this a request we know, every key and every type?
2. `plan_choices`: which engine requests does it become, and what does each one change?
3. `forwarded_body`: the exact bytes the engine gets: JCS of the parsed body with the change
   applied, so that whoever holds the body and the change recomputes them.

The declarations below are the allow-list: OpenAI's keys that SGLang serves, the sampling keys of
the original DCV interface and SGLang's own harmless ones. A key that is not declared is refused
by name, because the engine knows keys that reach into other requests (`rid`, `session_id`,
`cache_salt`, `lora_path`, …) and pydantic would let them through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, assert_never

import msgspec
from msgspec import Meta, Struct

from appliance.errors import (
    InvalidRequest,
    InvalidSeed,
    Malformed,
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

MAX_MODEL_NAME_BYTES = 256

MAX_INPUTS = 2048
"""Of one request for embeddings; OpenAI's own bound."""

MAX_INPUT_CHARACTERS = 1 << 18
MAX_INPUT_TOKENS = 1 << 16
"""Of one text to embed. How many tokens the model takes is the engine's to say."""

PREFIXES = ("/v1", "/~inference@1.0", "/~inference@1.0/v1")
"""Under which the endpoints are served: OpenAI's own, and those of the original DCV interface."""

# JSON that only has to be JSON: `parse_json` has bounded it already, the engine judges the rest.
AnyJson: TypeAlias = Any
AnyObject: TypeAlias = dict[str, Any]
Token: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Tokens: TypeAlias = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Stop: TypeAlias = "str | Annotated[list[str], Meta(max_length=64)] | None"
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
LogitBias: TypeAlias = dict[
    Annotated[str, Meta(pattern=r"^[0-9]{1,10}\Z")], Annotated[float, Meta(ge=-100, le=100)]
]


class Endpoint(Enum):
    """Where a request arrived; the value is the engine's path."""

    CHAT = "/v1/chat/completions"
    COMPLETION = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"

    @property
    def id_prefix(self) -> str:
        """What OpenAI's response ids of this endpoint begin with; embeddings have none, so theirs
        is SGLang's."""
        return _ID_PREFIXES[self]

    @property
    def chunk_object(self) -> str:
        """What the chunks of a stream from here name themselves."""
        return "chat.completion.chunk" if self is Endpoint.CHAT else "text_completion"


_ID_PREFIXES = {
    Endpoint.CHAT: "chatcmpl-",
    Endpoint.COMPLETION: "cmpl-",
    Endpoint.EMBEDDINGS: "embd-",
}


def endpoint_of(path: str) -> Endpoint | None:
    """Which endpoint is served at a path, its aliases among them; None at any other path."""
    for endpoint in Endpoint:
        if path in [prefix + endpoint.value.removeprefix("/v1") for prefix in PREFIXES]:
            return endpoint
    return None


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    include_receipt: bool | None = None
    include_checkpoints: bool | None = None


class TextPart(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str


class DataUrl(Struct, frozen=True, forbid_unknown_fields=True):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="image_url"):
    image_url: DataUrl


class VideoPart(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="video_url"):
    video_url: DataUrl


class AudioPart(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="audio_url"):
    audio_url: DataUrl


ContentPart: TypeAlias = TextPart | ImagePart | VideoPart | AudioPart


class CalledFunction(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: str | AnyObject | None = None


class ToolCall(Struct, frozen=True, forbid_unknown_fields=True):
    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """One message of any role; what a role requires is the model's chat template's affair."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # What the openai package echoes when an assistant's answer is sent back as it came.
    refusal: str | None = None
    annotations: list[AnyJson] | None = None
    audio: None = None
    function_call: None = None


class FunctionDefinition(Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: AnyObject | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True, forbid_unknown_fields=True):
    function: FunctionDefinition
    type: Literal["function"] = "function"


class NamedFunction(Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class NamedTool(Struct, frozen=True, forbid_unknown_fields=True):
    function: NamedFunction
    type: Literal["function"] = "function"


class TextFormat(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    pass


class JsonFormat(
    Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"
):
    pass


class JsonSchema(Struct, frozen=True, forbid_unknown_fields=True):
    schema: AnyObject
    name: str = "response"
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(
    Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"
):
    json_schema: JsonSchema


ResponseFormat: TypeAlias = TextFormat | JsonFormat | JsonSchemaFormat


class Sampling(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The keys both endpoints take."""

    model: str
    # OpenAI
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    max_tokens: Tokens | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    presence_penalty: Penalty | None = None
    response_format: ResponseFormat | None = None
    seed: AnyJson = None  # its own error code, see `_check_seed`
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    # OpenAI's that have no meaning here: accepted, not forwarded
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None
    # The original DCV interface's; the last two belong to beam search, which is not offered
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    # SGLang's. Release 0.5.23 asserts that nothing in a batch wants `min_p` beside a seed, which every
    # request has here, and its scheduler dies of the assertion (srt/layers/sampler.py).
    min_p: Annotated[float, Meta(ge=0, le=0)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop_token_ids: Annotated[list[Token], Meta(max_length=64)] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    # Consumed by the gateway
    tee: bool | None = None
    provider: AnyJson = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"  # the prompt is in it


class ChatRequest(Sampling, frozen=True, forbid_unknown_fields=True, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=16_384)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    max_completion_tokens: Tokens | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    tools: Annotated[list[Tool], Meta(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    chat_template_kwargs: AnyObject | None = None
    continue_final_message: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None


class CompletionRequest(Sampling, frozen=True, forbid_unknown_fields=True, kw_only=True):
    prompt: str | list[str | Token | list[Token]]
    best_of: Annotated[int, Meta(ge=1, le=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    suffix: str | None = None


class EmbeddingsRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: str
    input: (
        Annotated[str, Meta(min_length=1, max_length=MAX_INPUT_CHARACTERS)]
        | list[
            Annotated[str, Meta(min_length=1, max_length=MAX_INPUT_CHARACTERS)]
            | Token
            | Annotated[list[Token], Meta(min_length=1, max_length=MAX_INPUT_TOKENS)]
        ]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    # OpenAI's that has no meaning here: accepted, not forwarded
    user: str | None = None
    # Consumed by the gateway
    tee: bool | None = None
    provider: AnyJson = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"  # the texts are in it


GATEWAY_KEYS = frozenset({"tee", "provider"})
"""Consumed here; never forwarded."""

IGNORED_KEYS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "length_penalty",
        "early_stopping",
        "modalities",
        "best_of",
    }
)
"""Accepted because clients send them, without effect here; never forwarded."""

NOT_TEMPLATE_VARIABLES = frozenset(
    {
        *("self", "conversation", "messages", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "processor_kwargs"),
    }
)
"""Parameters of what renders the template (`apply_chat_template` of transformers) and of what it
renders: SGLang hands `chat_template_kwargs` over beside its own, so these would change what becomes
of the prompt, or collide."""

_GATEWAY_STREAM_OPTIONS = frozenset(
    {"include_obfuscation", "include_receipt", "include_checkpoints"}
)

FORWARDED_STREAM_OPTIONS = frozenset(StreamOptions.__struct_fields__) - _GATEWAY_STREAM_OPTIONS

RequestBody: TypeAlias = ChatRequest | CompletionRequest

_BODIES: Mapping[Endpoint, type[RequestBody | EmbeddingsRequest]] = {
    Endpoint.CHAT: ChatRequest,
    Endpoint.COMPLETION: CompletionRequest,
    Endpoint.EMBEDDINGS: EmbeddingsRequest,
}

_Struct = TypeVar("_Struct", bound=Struct)


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """One engine request: what it changes in the client's body, and where its answer belongs.

    Attributes:
        index: of the choice in the client's answer.
        prompt_index: which of the client's prompts it answers.
        set: keys to add or replace. `unset`: keys to remove.
    """

    index: int
    prompt_index: int
    set: Mapping[str, JsonValue] = field(repr=False)  # may hold a prompt
    unset: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """What the client wants to be proven inside the answer (protocol.md section 6).

    Attributes:
        tee: evidence that covers the finished answer; None where the body does not say.
        receipt: a signed checkpoint at the end.
        checkpoints: signed checkpoints while the stream runs.
    """

    tee: bool | None = None
    receipt: bool = False
    checkpoints: bool = False

    @property
    def at_end(self) -> bool:
        """Whether the answer ends with a checkpoint."""
        return bool(self.tee) or self.receipt

    @property
    def wanted(self) -> bool:
        """Whether anything is."""
        return self.at_end or self.checkpoints

    def with_query(self, given: Sequence[str]) -> Proof:
        """With what the query says of `tee`, once and as JSON spells it.

        Raises:
            InvalidRequest: it says something else, or the contrary of the body.
        """
        if not given:
            return self
        if len(given) > 1 or given[0] not in ("true", "false"):
            raise InvalidRequest("tee: expected true or false in the query, once", param="tee")
        tee = given[0] == "true"
        if self.tee is not None and self.tee is not tee:
            raise InvalidRequest("tee: the query contradicts the body", param="tee")
        return replace(self, tee=tee)


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A request that was understood, with nothing decided yet.

    Attributes:
        inputs: how many embeddings are asked for; 0 elsewhere.
        body: the parsed JSON.
    """

    endpoint: Endpoint
    model: str
    stream: bool
    include_usage: bool
    choices_per_prompt: int
    prompts: tuple[JsonValue, ...] = field(repr=False)
    seed: int | None
    proof: Proof
    body: JsonObject = field(repr=False)
    inputs: int = 0


def parse_body(raw: bytes, *, max_nesting: int, max_values: int | None = None) -> JsonObject:
    """The parsed body of a request.

    Raises:
        InvalidSeed: the seed is an integer no JSON implementation is sure to keep.
        Malformed: as `parse_json_object`.
    """
    try:
        return parse_json_object(raw, max_nesting=max_nesting, max_values=max_values)
    except Malformed as error:
        if error.field == "$.seed":
            raise _invalid_seed() from None
        raise


def parse_request(
    endpoint: Endpoint, body: JsonObject, *, extra_keys: Iterable[str] = ()
) -> InferenceRequest:
    """Check a parsed body against the allow-list, every key and type.

    Args:
        extra_keys: request keys the measured configuration adds; their values pass unchecked.
            A key declared above keeps its checks.

    Raises:
        RequestError: the leaf says what; the message names the key and never quotes a value.
    """
    kind = _BODIES[endpoint]
    extra = frozenset(extra_keys).difference(kind.__struct_fields__)
    checked = {key: value for key, value in body.items() if key not in extra}
    if endpoint is Endpoint.EMBEDDINGS:
        return _embeddings_request(convert(checked, EmbeddingsRequest), body)
    request: RequestBody
    if endpoint is Endpoint.CHAT:
        request = convert(checked, ChatRequest)
        _check_media(request.messages)
        _check_template_variables(request.chat_template_kwargs or {})
        prompts: tuple[JsonValue, ...] = (None,)
    else:
        request = convert(checked, CompletionRequest)
        prompts = _prompts(request.prompt)
    _check_model_name(request.model)
    _check_provider(request.provider)
    options = request.stream_options or StreamOptions()
    return InferenceRequest(
        endpoint=endpoint,
        model=request.model,
        stream=bool(request.stream),
        include_usage=bool(options.include_usage),
        choices_per_prompt=request.n or 1,
        prompts=prompts,
        seed=_check_seed(request.seed),
        proof=_proof(request),
        body=body,
    )


def _check_template_variables(given: AnyObject) -> None:
    if refused := NOT_TEMPLATE_VARIABLES.intersection(given):
        param = f"chat_template_kwargs.{min(refused)}"
        raise UnsupportedFeature(
            f"{param}: expected variables of the model's template", param=param
        )


def _embeddings_request(request: EmbeddingsRequest, body: JsonObject) -> InferenceRequest:
    inputs = _count_inputs(request.input)
    _check_model_name(request.model)
    _check_provider(request.provider)
    return InferenceRequest(
        endpoint=Endpoint.EMBEDDINGS,
        model=request.model,
        stream=False,
        include_usage=False,
        choices_per_prompt=1,
        prompts=(None,),
        seed=None,
        proof=Proof(tee=request.tee),
        body=body,
        inputs=inputs,
    )


def plan_choices(
    request: InferenceRequest, *, response_id: str, seed: int, cache_salt: str, max_choices: int
) -> tuple[ChoicePlan, ...]:
    """Decide the engine requests: one, or one per choice where there are several.

    The engine answers `n` choices of one request with one seed, so all would be the same; and a
    list of prompts shares it too. Each choice `i` therefore becomes a request of its own with
    seed `(seed + i) mod 2^53`.

    Embeddings are one engine request, however many texts there are, and nothing is set in it: no
    token is sampled, nothing is cached, and a batch would need an id for every text.

    Args:
        response_id: the id the client's answer will carry; becomes the engine's request id.
        seed: used when the client sent none; 0 to 2^53-1.
        cache_salt: keeps the engine from sharing prefixes between tenants.
        max_choices: prompts times `n` beyond which the request is refused.

    Raises:
        InvalidRequest: too many choices.
    """
    if request.endpoint is Endpoint.EMBEDDINGS:
        return (ChoicePlan(0, 0, {}, _unset_keys(request.body)),)
    count = request.choices_per_prompt * len(request.prompts)
    if count > max_choices:
        raise InvalidRequest(f"n: expected at most {max_choices} choices in all", param="n")
    base = seed if request.seed is None else request.seed
    unset = _unset_keys(request.body)
    options = _forwarded_stream_options(request)
    plans = []
    for index in range(count):
        prompt_index = index // request.choices_per_prompt
        changes = choice_changes(
            index,
            count=count,
            choices_per_prompt=request.choices_per_prompt,
            response_id=response_id,
            seed=base,
            cache_salt=cache_salt,
            stream_options=options,
        )
        if request.prompts[prompt_index] != request.body.get("prompt"):
            changes["prompt"] = request.prompts[prompt_index]
        plans.append(ChoicePlan(index, prompt_index, changes, unset))
    return tuple(plans)


def choice_changes(
    index: int,
    *,
    count: int,
    choices_per_prompt: int,
    response_id: str,
    seed: int,
    cache_salt: str,
    stream_options: JsonObject | None,
) -> JsonObject:
    """What is set for choice `index` of `count`, its prompt aside.

    Args:
        seed: of choice 0.
        stream_options: those that go to the engine; None where there are none.
    """
    changes: JsonObject = {
        "cache_salt": cache_salt,
        "rid": response_id if count == 1 else f"{response_id}-{index}",
        "seed": (seed + index) % (MAX_SAFE_INTEGER + 1),
    }
    if stream_options is not None:
        changes["stream_options"] = stream_options
    if choices_per_prompt > 1:
        changes["n"] = 1
    return changes


def _forwarded_stream_options(request: InferenceRequest) -> JsonObject | None:
    options = request.body.get("stream_options")
    if options is None or not request.stream:
        return None
    assert isinstance(options, dict)
    return {
        key: value
        for key, value in options.items()
        if key in FORWARDED_STREAM_OPTIONS and value is not None
    }


def forwarded_body(body: JsonObject, plan: ChoicePlan) -> bytes:
    """The exact bytes the engine gets: JCS of the client's body with the plan's change applied."""
    forwarded = {key: value for key, value in body.items() if key not in plan.unset}
    return canonical_json({**forwarded, **plan.set})


def forwarded_bodies(body: JsonObject, plans: Sequence[ChoicePlan]) -> Iterator[bytes]:
    """`forwarded_body` of each plan. What several of them share is put in canonical form once:
    128 choices of a long conversation hold it 128 times."""
    if len(plans) == 1:
        yield forwarded_body(body, plans[0])
        return
    replaced = frozenset[str]().union(*(plan.unset for plan in plans))
    if all("prompt" in plan.set for plan in plans):
        replaced |= {"prompt"}
    shared = {key: _member(key, value) for key, value in body.items() if key not in replaced}
    prompts: dict[int, bytes] = {}
    for plan in plans:
        members = {
            key: shared[key] if key in shared else _member(key, body[key])
            for key in body
            if key not in plan.unset and key not in plan.set
        }
        for key, value in plan.set.items():
            if key != "prompt":
                members[key] = _member(key, value)
                continue
            if plan.prompt_index not in prompts:
                prompts = {plan.prompt_index: _member(key, value)}
            members[key] = prompts[plan.prompt_index]
        # RFC 8785 section 3.2.3: "sorted … as arrays of UTF-16 code units".
        names = sorted(members, key=lambda name: name.encode("utf-16-be"))
        yield b"{" + b",".join([members[name] for name in names]) + b"}"


def _member(key: str, value: JsonValue) -> bytes:
    return canonical_json({key: value})[1:-1]


def _unset_keys(body: JsonObject) -> tuple[str, ...]:
    """Keys the engine must not see, and nulls: OpenAI reads null as absent, SGLang refuses it."""
    streaming = body.get("stream") is True
    return tuple(
        sorted(
            key
            for key, value in body.items()
            if key in GATEWAY_KEYS
            or key in IGNORED_KEYS
            or value is None
            or (key == "stream_options" and not streaming)
        )
    )


def convert(body: JsonObject, kind: type[_Struct]) -> _Struct:
    """A parsed body as one of the declared shapes.

    Raises:
        InvalidRequest, UnknownParameter: naming the key, never quoting a value.
    """
    try:
        return msgspec.convert(body, kind, strict=True)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None


# `what` is greedy and `where` holds names of ours only: a quoted value could hold ` - at `, too.
_LOCATED = re.compile(
    r"^(?P<what>.*) - at `(?:key` in `)?\$\.?(?P<where>[\w.\[\]]*)`\Z", re.DOTALL | re.ASCII
)
_FIELD = re.compile(
    r"^Object (?:contains unknown field|missing required field) `(?P<field>.*)`\Z", re.DOTALL
)


def _explain(message: str) -> RequestError:
    """An error of our own from msgspec's message.

    msgspec says types and bounds, which may be repeated, but also quotes the value of an
    unexpected string, which may not: a prompt never appears in an error.
    """
    located = _LOCATED.match(message)
    what, where = (located["what"], located["where"]) if located else (message, "")
    if named := _FIELD.match(what):
        name = named["field"][:64]
        path = f"{where}.{name}" if where else name
        if "unknown" in what:
            return UnknownParameter(f"{path}: this parameter is not known here", param=path)
        return InvalidRequest(f"{path}: required and missing", param=path)
    if not what.startswith("Expected `"):
        what = "not one of the accepted values"
    return InvalidRequest(f"{where or 'body'}: {what[0].lower()}{what[1:]}", param=where or None)


def _check_model_name(name: str) -> None:
    if len(name.encode("utf-8")) > MAX_MODEL_NAME_BYTES:
        raise InvalidRequest(f"model: expected at most {MAX_MODEL_NAME_BYTES} bytes", param="model")


def _check_seed(seed: JsonValue) -> int | None:
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SAFE_INTEGER:
        raise _invalid_seed()
    return seed


def _invalid_seed() -> InvalidSeed:
    return InvalidSeed("seed: expected an integer from 0 to 2^53-1", param="seed")


def _check_provider(provider: JsonValue) -> None:
    """`provider` carries aci/1's demands on the service; other keys in it are routers' affairs."""
    if provider is None:
        return
    if not isinstance(provider, dict):
        raise InvalidRequest("provider: expected an object", param="provider")
    verified = provider.get("aci_verified")
    if "aci_verified" in provider and not isinstance(verified, bool):
        raise InvalidRequest(
            "provider.aci_verified: expected a boolean", param="provider.aci_verified"
        )
    for key in provider:
        if key.startswith("aci_") and key not in ("aci_verified", "aci_session_ids"):
            path = f"provider.{key[:64]}"
            raise UnknownParameter(f"{path}: this parameter is not known here", param=path)
    if "aci_session_ids" not in provider:
        return
    sessions, path = provider["aci_session_ids"], "provider.aci_session_ids"
    well_formed = isinstance(sessions, list) and all(isinstance(item, str) for item in sessions)
    if not well_formed or not sessions:
        raise InvalidRequest(f"{path}: expected a non-empty list of strings", param=path)
    if verified is False:
        raise InvalidRequest(f"{path}: contradicts aci_verified: false", param=path)
    raise SessionNotAccepted(
        "this service answers itself: it has no upstream session to pin", param=path
    )


def _proof(request: RequestBody) -> Proof:
    options = request.stream_options or StreamOptions()
    if options.include_checkpoints and not request.stream:
        raise InvalidRequest(
            "stream_options.include_checkpoints: expected stream: true beside it",
            param="stream_options.include_checkpoints",
        )
    return Proof(
        tee=request.tee,
        receipt=bool(options.include_receipt),
        checkpoints=bool(options.include_checkpoints),
    )


def _check_media(messages: Sequence[Message]) -> None:
    """Media come in the request itself: the engine must never fetch an address for a client."""
    for number, message in enumerate(messages):
        if not isinstance(message.content, list):
            continue
        for part_number, part in enumerate(message.content):
            url = _media_url(part)
            if url is not None and not url.startswith("data:"):
                path = f"messages[{number}].content[{part_number}]"
                raise UnsupportedFeature(f"{path}: expected a data: URL", param=path)


def _media_url(part: ContentPart) -> str | None:
    match part:
        case TextPart():
            return None
        case (
            ImagePart(image_url=source) | VideoPart(video_url=source) | AudioPart(audio_url=source)
        ):
            return source.url
        case _:
            assert_never(part)


def _prompts(prompt: str | list[str | int | list[int]]) -> tuple[JsonValue, ...]:
    """The prompts of a completion: a text, token ids, or a list of either (never mixed)."""
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise InvalidRequest("prompt: expected at least one prompt", param="prompt")
    if all(isinstance(item, int) for item in prompt):
        return (list(prompt),)  # type: ignore[arg-type]
    if all(isinstance(item, str) for item in prompt) or all(
        isinstance(item, list) and item for item in prompt
    ):
        return tuple(prompt)  # type: ignore[arg-type]
    raise InvalidRequest(
        "prompt: expected a string, token ids, or a list of only strings or only token ids",
        param="prompt",
    )


def _count_inputs(given: str | list[str | int | list[int]]) -> int:
    """How many texts are to be embedded: a text, token ids, or a list of either (never mixed).

    Raises:
        InvalidRequest: none or too many; or a text without a character, which no engine embeds.
    """
    if isinstance(given, str):
        texts = [given]
    elif given and all(isinstance(item, int) for item in given):
        if len(given) > MAX_INPUT_TOKENS:
            raise _invalid_input(f"expected at most {MAX_INPUT_TOKENS} token ids")
        return 1
    elif not 0 < len(given) <= MAX_INPUTS:
        raise _invalid_input(f"expected 1 to {MAX_INPUTS} texts")
    elif all(isinstance(item, list) for item in given):
        return len(given)
    else:
        texts = [item for item in given if isinstance(item, str)]
        if len(texts) != len(given):
            raise _invalid_input(
                "expected a string, token ids, or a list of only strings or only token ids"
            )
    if not all(text.strip() for text in texts):
        raise _invalid_input("expected texts that are more than white space")
    return len(texts)


def _invalid_input(what: str) -> InvalidRequest:
    return InvalidRequest(f"input: {what}", param="input")
