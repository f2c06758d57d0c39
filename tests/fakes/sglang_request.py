"""What SGLang 0.5.23 makes of a request body: a checked `Request`, or the error it answers.

Pure. The checks, their order and their answers were recorded from a running server; what a gateway
must not pass on is deliberately kept: errors are `{"object":"error",…}` rather than nested, they
echo the input, and they name the server's source files. The wrong model name is accepted, and
unknown keys are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, TypeAlias

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
JsonObject: TypeAlias = dict[str, JsonValue]

COMPLETIONS_MAX_TOKENS: Final = 16
"""The completions default; chat has none and runs to the end of the context."""
_INSTALLED: Final = "/opt/engine/lib/python3.11/site-packages/sglang/srt/entrypoints/http_server.py"
"""Validation errors name the server's own source file; a gateway must not pass that on."""
_PIECE: Final = re.compile(r"\s*\w+|\s*[^\w\s]+|\s+")
"""A token: a word or a run of signs, with the space before it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The launch settings that change what is said on the wire."""

    served_model_name: str
    context_length: int
    deterministic: bool
    tool_call_parser: str | None
    reasoning_parser: str | None
    model_path: str = ""
    is_embedding: bool = False
    is_matryoshka: bool = False


class Endpoint(Enum):
    """A generating route: its path, its handler and that handler's line in http_server.py."""

    CHAT = ("/v1/chat/completions", "openai_v1_chat_completions", 1870)
    COMPLETIONS = ("/v1/completions", "openai_v1_completions", 1860)
    EMBEDDINGS = ("/v1/embeddings", "openai_v1_embeddings", 1887)

    @property
    def path(self) -> str:
        return self.value[0]

    @property
    def source(self) -> str:
        """The lines FastAPI adds under its validation errors."""
        path, handler, line = self.value
        return f'\n\n  File "{_INSTALLED}", line {line}, in {handler}\n    POST {path}'


class Refused(Exception):  # noqa: N818 - an answer, not a mistake of ours
    """An HTTP error answer: a JSON object, or a plain text body."""

    def __init__(self, status: int, body: JsonObject | str) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.body = body


def error_body(message: str, *, kind: str = "BadRequestError", code: int = 400) -> JsonObject:
    return {"object": "error", "message": message, "type": kind, "param": None, "code": code}


def bad_request(message: str) -> Refused:
    return Refused(400, error_body(message))


def internal_error(message: str) -> Refused:
    body = error_body(f"Internal server error: {message}", kind="InternalServerError", code=500)
    return Refused(500, body)


def unknown_model(name: str) -> Refused:
    """`GET /v1/models/{name}`, the one error that is shaped like OpenAI's."""
    return Refused(
        404,
        {
            "error": {
                "message": f"The model '{name}' does not exist",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }
        },
    )


def validation_error(errors: list[JsonObject], source: str = "") -> Refused:
    """FastAPI's `str(exc)` plus `str(exc.errors())`: Python reprs, input and file path included."""
    plural = "" if len(errors) == 1 else "s"
    lines = "".join(f"\n  {error!r}" for error in errors)
    message = f"{len(errors)} validation error{plural}:{lines}{source} {errors!r}"
    return Refused(400, error_body(message, kind="Bad Request"))


def _invalid(kind: str, place: Iterable[object], message: str, value: JsonValue) -> JsonObject:
    # `loc` is a tuple in pydantic, and reaches the client as a Python repr, so it stays one.
    loc: JsonValue = tuple(place)  # type: ignore[assignment]
    return {"type": kind, "loc": loc, "msg": message, "input": value}


class Pattern(NamedTuple):
    """What pydantic's lax mode accepts for a field, and whether null is one of it."""

    kind: str
    nullable: bool


_COMMON: Final = {
    "model": Pattern("string", nullable=False),
    "n": Pattern("int", nullable=False),
    "stream": Pattern("bool", nullable=False),
    "stream_options": Pattern("dict", nullable=True),
    "seed": Pattern("int", nullable=True),
    "frequency_penalty": Pattern("float", nullable=False),
    "presence_penalty": Pattern("float", nullable=False),
    "logit_bias": Pattern("dict", nullable=True),
    "ignore_eos": Pattern("bool", nullable=False),
    "response_format": Pattern("dict", nullable=True),
    "cache_salt": Pattern("string", nullable=True),
    "rid": Pattern("string", nullable=True),
}
# Null is a value only where SGLang declared the field Optional: chat takes `"temperature": null`
# (the model's default, else 1.0), completions answers 400; `n`, `stream` and the penalties never.
_FIELDS: Final = {
    Endpoint.CHAT: _COMMON
    | {
        "messages": Pattern("list", nullable=False),
        "temperature": Pattern("float", nullable=True),
        "top_p": Pattern("float", nullable=True),
        "max_tokens": Pattern("int", nullable=True),
        "max_completion_tokens": Pattern("int", nullable=True),
        "logprobs": Pattern("bool", nullable=False),
        "top_logprobs": Pattern("int", nullable=True),
        "tools": Pattern("list", nullable=True),
        "separate_reasoning": Pattern("bool", nullable=False),
    },
    Endpoint.COMPLETIONS: _COMMON
    | {
        "temperature": Pattern("float", nullable=False),
        "top_p": Pattern("float", nullable=False),
        "max_tokens": Pattern("int", nullable=False),
        "logprobs": Pattern("int", nullable=True),
        "echo": Pattern("bool", nullable=False),
    },
    Endpoint.EMBEDDINGS: {
        "model": Pattern("string", nullable=False),
        "encoding_format": Pattern("string", nullable=False),
        "dimensions": Pattern("int", nullable=True),
        "user": Pattern("string", nullable=True),
    },
}
_REQUIRED: Final = {
    Endpoint.CHAT: "messages",
    Endpoint.COMPLETIONS: "prompt",
    Endpoint.EMBEDDINGS: "input",
}
_NOUNS: Final = {
    "string": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "list",
    "dict": "dictionary",
}
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "string": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
}


@dataclass(frozen=True, slots=True)
class Prose:
    """Free text."""


@dataclass(frozen=True, slots=True)
class JsonText:
    """Text that a grammar holds to a JSON schema."""

    schema: JsonValue


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of one function, its arguments held to the function's parameters."""

    name: str
    parameters: JsonValue


Output: TypeAlias = Prose | JsonText | ToolCall


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request. `marks` are the `[[…]]` words that open the prompt, for tests."""

    endpoint: Endpoint
    model: str
    prompts: tuple[str, ...]
    marks: tuple[str, ...]
    n: int
    seed: int | None
    temperature: float
    max_tokens: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    logprobs: int | None
    echo: bool
    rid: str | None
    output: Output
    separate_reasoning: bool
    encoding_format: str = "float"
    dimensions: int | None = None


def parse_request(
    endpoint: Endpoint, body: bytes, *, content_type: str, settings: Settings
) -> Request:
    """Check a body as SGLang does, in its order: content type, JSON, field types, meaning, length.

    Raises:
        Refused: with SGLang's own answer, echoes included.
    """
    fields = _typed_fields(endpoint, _json_object(endpoint, body, content_type))
    if endpoint is Endpoint.EMBEDDINGS:
        _check_embeddings(fields, settings)
    prompts = _prompts(endpoint, fields)
    output = _output(fields, endpoint)
    _check_meaning(fields, settings)
    _check_media(endpoint, fields)
    options = object_of(fields.get("stream_options"))
    request = Request(
        endpoint=endpoint,
        model=text_of(fields.get("model")) or "default",
        prompts=prompts,
        marks=_marks(_last_text(endpoint, fields, prompts)),
        n=whole_of(fields.get("n"), 1),
        seed=_whole_or_none(fields.get("seed")),
        temperature=_number(fields.get("temperature"), 1.0),
        max_tokens=_max_tokens(endpoint, fields),
        stop=texts_of(fields.get("stop")),
        ignore_eos=fields.get("ignore_eos") is True,
        stream=fields.get("stream") is True,
        include_usage=options.get("include_usage") is True,
        continuous_usage=options.get("continuous_usage_stats") is True,
        logprobs=_logprobs(endpoint, fields),
        echo=fields.get("echo") is True,
        rid=text_of(fields.get("rid")) or None,
        output=output,
        separate_reasoning=fields.get("separate_reasoning") is not False,
        encoding_format=text_of(fields.get("encoding_format")) or "float",
        dimensions=_whole_or_none(fields.get("dimensions")),
    )
    _check_length(request, settings)
    return request


def _json_object(endpoint: Endpoint, body: bytes, content_type: str) -> JsonObject:
    if content_type.lower().split(";", 1)[0] != "application/json":
        message = "Unsupported Media Type: Only 'application/json' is allowed"
        place: list[JsonValue] = ["header", "content-type"]
        raise validation_error([{"loc": place, "msg": message, "type": "value_error"}])
    if not body:
        missing = _invalid("missing", ["body"], "Field required", None)
        raise validation_error([missing], endpoint.source)
    try:
        parsed: JsonValue = json.loads(body)
    except ValueError as error:
        offset = error.pos if isinstance(error, json.JSONDecodeError) else 0
        invalid = _invalid("json_invalid", ["body", offset], "JSON decode error", {})
        raise validation_error(
            [invalid | {"ctx": {"error": str(error)}}], endpoint.source
        ) from None
    if not isinstance(parsed, dict):
        # Its own validators call `.get` on whatever came, so this one is an unhandled exception.
        raise Refused(500, "Internal Server Error")
    return parsed


def _typed_fields(endpoint: Endpoint, body: JsonObject) -> JsonObject:
    errors: list[JsonObject] = []
    fields = dict(body)
    if (required := _REQUIRED[endpoint]) not in body:
        errors.append(_invalid("missing", ["body", required], "Field required", dict(body)))
    for name, pattern in _FIELDS[endpoint].items():
        if name in body and not (body[name] is None and pattern.nullable):
            value, error = _coerce(name, body[name], pattern.kind)
            fields[name] = value
            errors += [error] if error else []
    if endpoint is Endpoint.CHAT and isinstance(messages := body.get("messages"), list):
        errors += [e for i, message in enumerate(messages) for e in _message_errors(i, message)]
    if errors:
        raise validation_error(errors, endpoint.source)
    return fields


def _coerce(name: str, value: JsonValue, kind: str) -> tuple[JsonValue, JsonObject | None]:
    """Pydantic's lax mode, as far as OpenAI clients can meet it: numbers may come as strings."""
    place, noun = ["body", name], _NOUNS[kind]
    if isinstance(value, _TYPES[kind]):
        return value, None
    if isinstance(value, str) and kind in ("int", "float"):
        try:
            return (int(value) if kind == "int" else float(value)), None
        except ValueError:
            message = f"Input should be a valid {noun}, unable to parse string as "
            message += "an integer" if kind == "int" else "a number"
            return None, _invalid(f"{kind}_parsing", place, message, value)
    if kind == "int" and isinstance(value, float):
        message = "Input should be a valid integer, got a number with a fractional part"
        return None, _invalid("int_from_float", place, message, value)
    return None, _invalid(f"{kind}_type", place, f"Input should be a valid {noun}", value)


def _message_errors(index: int, message: JsonValue) -> Iterator[JsonObject]:
    place = ["body", "messages", index, "ChatCompletionMessageUserParam"]
    if not isinstance(message, dict):
        text = "Input should be a valid dictionary or object to extract fields from"
        yield _invalid("model_attributes_type", place, text, message)
        return
    roles = ("system", "user", "assistant", "tool", "function", "developer")
    if message.get("role") not in roles:
        yield _invalid(
            "literal_error", [*place, "role"], "Input should be 'user'", message.get("role")
        )
    if message.get("role") == "user" and not isinstance(message.get("content"), str | list):
        text = "Input should be a valid string"
        yield _invalid("string_type", [*place, "content", "str"], text, message.get("content"))


def _check_meaning(fields: JsonObject, settings: Settings) -> None:
    # Any model name is good, except that what follows a colon asks for a LoRA adapter.
    model = text_of(fields.get("model"))
    if ":" in model and model != settings.served_model_name:
        adapter = model.removeprefix(f"{settings.served_model_name}:")
        adapter = model.split(":", 1)[1] if adapter == model else adapter
        raise bad_request(
            f"LoRA adapter '{adapter}' was requested, but LoRA is not enabled. Please launch the "
            "server with --enable-lora flag and preload adapters using --lora-paths or "
            "/load_lora_adapter endpoint."
        )
    temperature, top_p = (
        _number(fields.get("temperature"), 1.0),
        _number(fields.get("top_p"), 1.0),
    )
    if not 0 <= temperature < float("inf"):
        raise bad_request(f"temperature must be a non-negative finite number, got {temperature}.")
    if not 0 < top_p <= 1:
        raise bad_request(f"top_p must be in (0, 1], got {top_p}.")
    seed = whole_of(fields.get("seed"), 0)
    if not -(2**63) <= seed < 2**63:
        raise bad_request(f"sampling_seed must be in [-2**63, 2**63 - 1], got {seed}.")
    if whole_of(fields.get("n"), 1) < 1:
        raise bad_request("range() arg 3 must not be zero")


def _check_embeddings(fields: JsonObject, settings: Settings) -> None:
    """What serving_embedding.py and tokenizer_manager.py refuse, in their words."""
    form, given = fields.get("encoding_format", "float"), fields.get("input")
    if form not in ("float", "base64"):
        raise bad_request(f"encoding_format must be either 'float' or 'base64', got {form!r}")
    if not given:
        raise bad_request("Input cannot be empty")
    if isinstance(given, str) and not given.strip():
        raise bad_request("Input cannot be empty or whitespace only")
    for index, item in enumerate(list_of(given)):
        if isinstance(item, str) and not item.strip():
            raise bad_request(f"Input at index {index} cannot be empty or whitespace only")
    if isinstance(fields.get("rid"), str) and isinstance((list_of(given) or [0])[0], str | list):
        raise internal_error("The rid should be a list.")
    if not settings.is_embedding:
        raise bad_request(
            "This model does not appear to be an embedding model by default. "
            "Please add `--is-embedding` when launching the server or try another model."
        )
    if fields.get("dimensions") is not None and not settings.is_matryoshka:
        raise bad_request(
            f"Model '{settings.model_path}' does not support matryoshka representation, "
            f"changing output dimensions will lead to poor results."
        )


def _check_media(endpoint: Endpoint, fields: JsonObject) -> None:
    if endpoint is not Endpoint.CHAT:
        return
    for message in list_of(fields.get("messages")):
        for part in list_of(object_of(message).get("content")):
            kind = object_of(part).get("type")
            if kind in ("image_url", "video_url", "audio_url"):
                raise bad_request(
                    f"Model only supports text input; received unsupported content type '{kind}'."
                )


def _check_length(request: Request, settings: Settings) -> None:
    limit = settings.context_length
    longest = max(count_tokens(prompt) for prompt in request.prompts)
    if longest >= limit:
        raise bad_request(
            f"The input ({longest} tokens) is longer than the model's context length "
            f"({limit} tokens)."
        )
    if request.max_tokens is not None and longest + request.max_tokens > limit:
        raise bad_request(
            f"Requested token count exceeds the model's maximum context length of {limit} tokens. "
            f"You requested a total of {longest + request.max_tokens} tokens: {longest} tokens "
            f"from the input messages and {request.max_tokens} tokens for the completion. Please "
            "reduce the number of tokens in the input messages or the completion to fit within "
            "the limit."
        )


def _prompts(endpoint: Endpoint, fields: JsonObject) -> tuple[str, ...]:
    if endpoint is Endpoint.CHAT:
        messages = [object_of(message) for message in list_of(fields.get("messages"))]
        if not messages:
            raise bad_request("Messages cannot be empty.")
        turns = (f"<|im_start|>{m.get('role')}\n{_content_text(m)}<|im_end|>\n" for m in messages)
        return ("".join(turns) + "<|im_start|>assistant\n",)
    prompt = fields.get("input" if endpoint is Endpoint.EMBEDDINGS else "prompt")
    if not prompt:
        raise bad_request("Prompt cannot be empty")
    if isinstance(prompt, str):
        return (prompt,)
    entries = list_of(prompt)
    if all(isinstance(entry, int) for entry in entries):
        return (_decode_ids(entries),)
    return tuple(e if isinstance(e, str) else _decode_ids(list_of(e)) for e in entries)


def _last_text(endpoint: Endpoint, fields: JsonObject, prompts: tuple[str, ...]) -> str:
    if endpoint is not Endpoint.CHAT:
        return prompts[0]
    messages = [object_of(message) for message in list_of(fields.get("messages"))]
    return next((_content_text(m) for m in reversed(messages) if m.get("role") == "user"), "")


def _content_text(message: JsonObject) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(text_of(object_of(part).get("text")) for part in content)
    return text_of(content)


def _marks(text: str) -> tuple[str, ...]:
    opening = re.match(r"(?:\s*\[\[[^\[\]]*\]\])+", text)
    return tuple(re.findall(r"\[\[([^\[\]]*)\]\]", opening.group())) if opening else ()


def _output(fields: JsonObject, endpoint: Endpoint) -> Output:
    chosen = _chosen_tool(fields) if endpoint is Endpoint.CHAT else None
    if chosen is not None:
        return chosen
    wanted = object_of(fields.get("response_format"))
    if wanted and wanted.get("type") not in ("text", "json_object", "json_schema"):
        text = "Input should be 'text', 'json_object' or 'json_schema'"
        place = ["body", "response_format", "ResponseFormat", "type"]
        invalid = _invalid("literal_error", place, text, wanted.get("type"))
        raise validation_error([invalid], endpoint.source)
    if wanted.get("type") == "json_object":
        return JsonText({"type": "object"})
    if wanted.get("type") == "json_schema":
        schema = object_of(wanted.get("json_schema")).get("schema")
        if schema is None:
            raise bad_request("schema_ is required for json_schema response format request.")
        return JsonText(schema)
    return Prose()


def _chosen_tool(fields: JsonObject) -> ToolCall | None:
    """The call a grammar forces, or the one a test asks the model for with `[[tool]]`."""
    functions = [
        object_of(object_of(tool).get("function")) for tool in list_of(fields.get("tools"))
    ]
    choice = fields.get("tool_choice")
    if choice == "required" and not functions:
        raise bad_request("Tools cannot be empty if tool choice is set to required.")
    if isinstance(choice, dict):
        if not functions:
            raise bad_request("Tools cannot be empty if tool choice is set to a specific tool.")
        name = object_of(choice.get("function")).get("name")
        functions = [function for function in functions if function.get("name") == name]
        if not functions:
            raise bad_request(f"Tool '{name}' not found in tools list.")
    asked = "tool" in _marks(_last_text(Endpoint.CHAT, fields, ()))
    if not functions or choice == "none" or (choice in (None, "auto") and not asked):
        return None
    return ToolCall(text_of(functions[0].get("name")), functions[0].get("parameters"))


def _max_tokens(endpoint: Endpoint, fields: JsonObject) -> int | None:
    if endpoint is Endpoint.CHAT:
        newer = _whole_or_none(fields.get("max_completion_tokens"))
        return newer or _whole_or_none(fields.get("max_tokens"))
    if endpoint is Endpoint.EMBEDDINGS:
        return 1  # nothing is generated; a token's time is what an embedding takes here
    limit = whole_of(fields.get("max_tokens"), COMPLETIONS_MAX_TOKENS)
    if limit <= 0:
        text = "Value error, max_tokens must be positive"
        invalid = _invalid("value_error", ["body", "max_tokens"], text, limit)
        cause: JsonValue = ValueError("max_tokens must be positive")  # type: ignore[assignment]
        invalid["ctx"] = {"error": cause}
        raise validation_error([invalid], endpoint.source)
    return limit


def _logprobs(endpoint: Endpoint, fields: JsonObject) -> int | None:
    if endpoint is Endpoint.CHAT:
        return whole_of(fields.get("top_logprobs"), 0) if fields.get("logprobs") is True else None
    return _whole_or_none(fields.get("logprobs"))


def text_of(value: JsonValue) -> str:
    return value if isinstance(value, str) else ""


def texts_of(value: JsonValue) -> tuple[str, ...]:
    entries = value if isinstance(value, list) else [value]
    return tuple(entry for entry in entries if isinstance(entry, str) and entry)


def object_of(value: JsonValue) -> JsonObject:
    return value if isinstance(value, dict) else {}


def list_of(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else []


def whole_of(value: JsonValue, default: int) -> int:
    return int(value) if isinstance(value, int) else default


def _whole_or_none(value: JsonValue) -> int | None:
    return int(value) if isinstance(value, int) else None


def _number(value: JsonValue, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default


def grammar_error(request: Request) -> str | None:
    """Why the scheduler cannot compile the request's grammar, echoing the schema; None if it can.

    It finds out late: a stream has its 200 by then, and the client's mistake is an error event.
    """
    if isinstance(request.output, JsonText) and (kind := _unsupported_type(request.output.schema)):
        return (
            f'Failed to compile json grammar: json_schema_converter.cc: Unsupported type "{kind}"\n'
        )
    return None


def _unsupported_type(schema: JsonValue) -> str | None:
    kinds = ("object", "array", "string", "integer", "number", "boolean", "null")
    rules = object_of(schema)
    if isinstance(kind := rules.get("type"), str) and kind not in kinds:
        return kind
    below = [
        *object_of(rules.get("properties")).values(),
        *([rules["items"]] if "items" in rules else []),
    ]
    return next((found for rule in below if (found := _unsupported_type(rule))), None)


def tokens_of(text: str) -> list[str]:
    """The text cut into tokens; joined, they are the text again."""
    return _PIECE.findall(text)


def count_tokens(text: str) -> int:
    return len(tokens_of(text))


def _decode_ids(ids: list[JsonValue]) -> str:
    return "".join(f" #{number}" for number in ids)
