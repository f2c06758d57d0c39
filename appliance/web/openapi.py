"""The OpenAPI 3.1 document of the public API, and `GET /openapi.json`.

It is computed from what decides about a request, so that the two cannot drift apart: bodies from
the msgspec declarations, which forbid every key they do not name; codes and statuses from
`appliance.errors`; the model, the bounds and the extra keys from the configuration. What a
declaration cannot say, because code decides it, stands in `_decided_by_code`.

The document knows nothing of this boot: the same configuration gives the same bytes. It names no
status 500, which would be a defect of ours and not a behaviour to program against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from quart import Response
from quart_trio import QuartTrio

from appliance import __version__, errors
from appliance.config import MeasuredConfig
from appliance.errors import ApplianceError
from appliance.serving.lifecycle import State
from appliance.web.attestation import PREFIXES as ATTESTATION_PREFIXES
from appliance.web.attestation import GenerateRequest, VerifyRequest
from appliance.web.openai import (
    MAX_TOKENIZED_CHARACTERS,
    PREFIXES,
    DetokenizeRequest,
    TokenizeRequest,
)
from appliance.wire.canonical import MAX_SAFE_INTEGER, JsonObject, JsonValue, canonical_json
from appliance.wire.openai import (
    MAX_INPUT_CHARACTERS,
    MAX_INPUT_TOKENS,
    MAX_INPUTS,
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    Sampling,
)

_BODIES = (
    ChatRequest, CompletionRequest, EmbeddingsRequest, TokenizeRequest, DetokenizeRequest, GenerateRequest,
    VerifyRequest,
)  # fmt: skip
_TAKING_MORE = (Sampling, EmbeddingsRequest)
"""Bodies that the configuration may add keys to."""

_KEY = "api_key"

# Which errors an operation meets; their statuses are their own.
_ASKING_A_KEY = (errors.Unauthorized,)
_NAMING = (*_ASKING_A_KEY, errors.ModelNotFound)
_READING = (
    *_NAMING, errors.Malformed, errors.InvalidRequest, errors.UnknownParameter,
    errors.UnsupportedFeature, errors.BodyTooSlow, errors.BodyTooLarge,
)  # fmt: skip
_GENERATING = (
    *_READING, errors.InvalidSeed, errors.SessionNotAccepted, errors.RateLimited,
    errors.Overloaded, errors.NotServing, errors.EngineRefused, errors.EngineUnavailable,
    errors.EngineDied, errors.EngineHung, errors.EngineStreamFailed, errors.EngineProtocolError,
    errors.AttestationFailed,
)  # fmt: skip
_TOKENIZING = (*_READING, errors.RateLimited, errors.Overloaded)
_EMBEDDING = tuple(error for error in _GENERATING if error is not errors.InvalidSeed)
_PROVING = (errors.RateLimited, errors.Overloaded, errors.AttestationFailed)
_SHOWING = (
    *_ASKING_A_KEY, errors.Malformed, errors.InvalidRequest, errors.UnknownParameter,
    errors.UnsupportedFeature, errors.BodyTooSlow, errors.BodyTooLarge, errors.RateLimited,
    errors.Overloaded,
)  # fmt: skip
_LOOKING_UP = (
    *_ASKING_A_KEY, errors.RouteNotFound, errors.ReceiptLost, errors.Overloaded,
)  # fmt: skip
_ONLY_WITH_KEYS = frozenset({errors.Unauthorized, errors.RateLimited})


@dataclass(frozen=True, slots=True)
class _Operation:
    """One thing the API does.

    Attributes:
        paths: where; all but the first are aliases.
        answers: content of each status that is not an error, by content type.
        body: name of the request body's schema; empty for a GET.
    """

    name: str
    summary: str
    paths: tuple[str, ...]
    answers: dict[str, JsonObject]
    body: str = ""
    errors: tuple[type[ApplianceError], ...] = ()
    parameters: tuple[JsonObject, ...] = ()


def openapi_document(config: MeasuredConfig) -> JsonObject:
    """The document for a configuration."""
    paths: JsonObject = {}
    for operation in _OPERATIONS:
        method = "post" if operation.body else "get"
        for path in operation.paths:
            first = operation.paths[0]
            about: JsonObject = (
                {"operationId": operation.name}
                if path == first
                else {"description": f"An alias of {first}."}
            )
            paths[path] = {method: {**about, **_operation(operation, path, config)}}
    components: JsonObject = {"schemas": _schemas(config), "responses": _error_responses(config)}
    if config.auth.mode == "keys":
        components["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "DCV appliance",
            "version": __version__,
            "description": "Confidential inference behind an OpenAI-compatible API.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": components,
    }


def add_openapi_route(app: QuartTrio, config: MeasuredConfig) -> None:
    """`GET /openapi.json`. It asks for no key: it is made of code and of measured configuration,
    which are public, and holds nothing of any client."""
    data = canonical_json(openapi_document(config))

    async def document() -> Response:
        return Response(data, content_type="application/json")

    app.add_url_rule("/openapi.json", "openapi", document, methods=["GET"])


def _operation(operation: _Operation, path: str, config: MeasuredConfig) -> JsonObject:
    responses: JsonObject = {
        status: {"description": HTTPStatus(int(status)).phrase, "content": content}
        for status, content in operation.answers.items()
    }
    met = _met(operation, config)
    responses |= {str(_status(error)): _ref("responses", str(_status(error))) for error in met}
    found: JsonObject = {"summary": operation.summary, "responses": responses}
    parameters: list[JsonValue] = list(operation.parameters)
    if "{model_id}" in path:
        model: JsonObject = {"enum": [config.model.id]}
        parameters.append({"name": "model_id", "in": "path", "required": True, "schema": model})
    if errors.SessionNotAccepted in operation.errors:
        tee: JsonObject = {
            "enum": ["false", "true"],
            "description": "As in the body, which must not say the contrary.",
        }
        parameters.append({"name": "tee", "in": "query", "schema": tee})
    if parameters:
        found["parameters"] = parameters
    if operation.body:
        content = _json(_ref("schemas", operation.body))
        found["requestBody"] = {"required": True, "content": content}
    if errors.Unauthorized in met:
        found["security"] = [{_KEY: []}]
    return found


def _met(operation: _Operation, config: MeasuredConfig) -> set[type[ApplianceError]]:
    if config.auth.mode == "keys":
        return set(operation.errors)
    # A peer's rate is bounded whether there are keys or not.
    asking_for_work = (_GENERATING, _EMBEDDING, _TOKENIZING)
    by_key = _ONLY_WITH_KEYS if operation.errors in asking_for_work else _ASKING_A_KEY
    return set(operation.errors) - set(by_key)


def _schemas(config: MeasuredConfig) -> JsonObject:
    """Every schema: the bodies as declared, and what code adds to them."""
    template = "#/components/schemas/{name}"
    _, declared = msgspec.json.schema_components(_BODIES, ref_template=template)
    schemas: dict[str, Any] = _with_ecma_regexes(declared)
    decided = _decided_by_code(config)
    for body in _BODIES:
        properties = schemas[body.__name__]["properties"]
        properties.update({key: decided[key] for key in properties if key in decided})
        for key in config.engine.extra_request_keys if issubclass(body, _TAKING_MORE) else ():
            properties.setdefault(key, {"description": "Judged by the engine alone."})
    schemas["DataUrl"]["properties"]["url"]["pattern"] = "^data:"  # _check_media
    schemas["CompletionRequest"]["properties"]["prompt"] = {  # _prompts
        "anyOf": [
            _TEXT,
            *(_list(item, minItems=1) for item in (_TEXT, _TOKEN, _list(_TOKEN, minItems=1))),
        ]
    }
    text: JsonObject = {"type": "string", "minLength": 1, "maxLength": MAX_INPUT_CHARACTERS}
    tokens = _list(_TOKEN, minItems=1, maxItems=MAX_INPUT_TOKENS)
    schemas["EmbeddingsRequest"]["properties"]["input"] = {  # _count_inputs
        "anyOf": [
            text,
            tokens,
            *(_list(item, minItems=1, maxItems=MAX_INPUTS) for item in (text, tokens)),
        ],
        "description": "More than white space.",
    }
    schemas["TokenizeRequest"]["properties"]["prompt"]["description"] = (  # _encoded
        f"At most {MAX_TOKENIZED_CHARACTERS} characters in all."
    )
    schemas["DetokenizeRequest"]["properties"]["tokens"] = {  # _decoded
        "anyOf": [_list(_TOKEN), _list(_list(_TOKEN))]
    }
    return {**schemas, **_ANSWERS}


def _decided_by_code(config: MeasuredConfig) -> JsonObject:
    """Schemas of keys of which the declaration says less than is checked, by name."""
    seed: JsonObject = {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_SAFE_INTEGER}
    sessions = _list(_TEXT, minItems=1, description="Refused: this service has no upstream.")
    return {
        "model": {"enum": [config.model.id]},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": config.limits.max_choices},
        "seed": {**seed, "description": "A random one where there is none."},  # _check_seed
        "tee": {
            "type": ["boolean", "null"],
            "description": "The answer ends with a signed checkpoint and GPU evidence over it.",
        },
        "provider": {  # _check_provider
            "type": ["object", "null"],
            "properties": {"aci_verified": _BOOLEAN, "aci_session_ids": sessions},
            "patternProperties": {"^aci_(?!verified$|session_ids$)": False},
        },
    }


def _with_ecma_regexes(schema: Any) -> Any:
    r"""The schema with `\Z` of Python's patterns as `$`, which in JSON Schema is the very end."""
    if isinstance(schema, list):
        return [_with_ecma_regexes(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _with_ecma_regexes(value) for key, value in schema.items()}
    if isinstance(pattern := found.get("pattern"), str):
        found["pattern"] = pattern.replace(r"\Z", "$")
    return found


def _error_responses(config: MeasuredConfig) -> JsonObject:
    """One response per status, naming the codes that come with it."""
    codes: dict[str, set[str]] = {}
    headers: dict[str, JsonObject] = {}
    for error in {error for operation in _OPERATIONS for error in _met(operation, config)}:
        status = str(_status(error))
        codes.setdefault(status, set()).add(error.code)
        if issubclass(error, errors.CapacityError):
            headers[status] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}}
        if error is errors.Unauthorized:
            headers[status] = {"WWW-Authenticate": {"schema": {"const": "Bearer"}}}
    return {
        status: {
            "description": HTTPStatus(int(status)).phrase,
            "headers": headers.get(status, {}),
            "content": _json(_error(sorted(names))),
        }
        for status, names in codes.items()
    }


def _error(codes: Sequence[str]) -> JsonObject:
    """OpenAI's error object, closed: nothing of a request is ever in it."""
    members = _object(
        message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"enum": list(codes)}
    )
    error = _object(error={**members, "additionalProperties": False})
    return {**error, "additionalProperties": False}


def _status(error: type[ApplianceError]) -> int:
    # What the engine refuses has the status of each refusal, and that is always this one.
    return 400 if error is errors.EngineRefused else error.http_status


def _ref(kind: str, name: str) -> JsonObject:
    return {"$ref": f"#/components/{kind}/{name}"}


def _json(schema: JsonObject) -> JsonObject:
    return {"application/json": {"schema": schema}}


def _list(items: JsonObject, **more: JsonValue) -> JsonObject:
    return {"type": "array", "items": items, **more}


def _object(**properties: JsonValue) -> JsonObject:
    """An object with all of these; an answer may gain members, so it is open."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _one_or_many(schema: JsonObject) -> JsonObject:
    return {"anyOf": [schema, _list(schema)]}


def _generated(what: str) -> JsonObject:
    """The engine's own words, in one piece or as they come (`stream: true`), and what proves them
    where that was asked for."""
    stream = (
        f"Server-sent events, each the JSON of a {what} chunk, then `[DONE]`; `: ping` between. "
        "With `tee` or `stream_options.include_receipt` the last chunk has no choices and a `dcv` "
        "member; with `stream_options.include_checkpoints` there are comments "
        "`: dcv-checkpoint BASE64URL` on the way."
    )
    answer = _object(id=_TEXT, choices=_list({}))
    answer["properties"] = {**_properties(answer), **_PROOF}
    return {
        **_json({**answer, "description": f"OpenAI's {what}."}),
        "text/event-stream": {"schema": {"description": stream}},
    }


def _properties(schema: JsonObject) -> JsonObject:
    found = schema["properties"]
    assert isinstance(found, dict)
    return found


_TEXT: JsonObject = {"type": "string"}
_WHOLE: JsonObject = {"type": "integer"}
_BOOLEAN: JsonObject = {"type": "boolean"}
_TOKEN: JsonObject = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_LENGTH: JsonObject = {"type": ["integer", "null"]}
_PROOF: JsonObject = {
    "dcv": {"type": "object", "description": "A signed checkpoint, where it was asked for."},
    "attestation": {"type": "object", "description": "GPU evidence over it, with `tee`."},
    "resolved_model": _object(id=_TEXT, revision={"type": ["string", "null"]}, digest=_TEXT),
}

_EMBEDDED = _object(
    object={"const": "list"}, model=_TEXT, usage={"type": ["object", "null"]},
    data=_list(
        _object(
            object={"const": "embedding"}, index=_WHOLE,
            embedding={"anyOf": [_list({"type": "number"}), _TEXT]},
        )
    ),
)  # fmt: skip
_EMBEDDED["properties"] = {**_properties(_EMBEDDED), **_PROOF}

_ANSWERS: JsonObject = {
    "Model": _object(
        id=_TEXT, object={"const": "model"}, created=_WHOLE, owned_by=_TEXT, max_model_len=_LENGTH
    ),
    "Health": _object(
        status={"enum": [state.value for state in State]}, stage=_object(number=_WHOLE, name=_TEXT),
        engine=_object(name=_TEXT, version=_TEXT, ready=_BOOLEAN), model=_TEXT, version=_TEXT,
        uptime_s=_WHOLE, running=_WHOLE, attestation={"type": ["object", "null"]},
    ),
    "Receipt": _object(
        api_version={"const": "aci/1"}, receipt_id=_TEXT, workload_keyset_digest=_TEXT,
        event_log=_list({"type": "object"}), key_id=_TEXT, signature=_TEXT,
    ),
    "Report": _object(
        api_version={"const": "aci/1"}, workload_keyset_digest=_TEXT,
        attestation=_object(
            tee_type=_TEXT, workload_keyset={"type": "object"}, report_data=_TEXT,
            evidence={"type": "object"},
        ),
    ),
}  # fmt: skip


def _everywhere(path: str) -> tuple[str, ...]:
    return tuple(prefix + path for prefix in PREFIXES)


def _attestation(path: str) -> tuple[str, ...]:
    return tuple(prefix + path for prefix in ATTESTATION_PREFIXES)


_NONCE: JsonObject = {
    "name": "nonce", "in": "query",
    "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    "description": "Of your choice; without one the null form, which anybody may have asked for.",
}  # fmt: skip
_DIGEST: JsonObject = {
    "name": "digest", "in": "path", "required": True,
    "schema": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
}  # fmt: skip
_RECEIPT_ID: JsonObject = {
    "name": "receipt_id", "in": "path", "required": True,
    "schema": {"type": "string", "pattern": "^((chatcmpl|cmpl)-)?[0-9a-f]{32}$"},
    "description": "From `X-Receipt-Id`, or the answer's `id`.",
}  # fmt: skip
_GENERATED = _object(
    verified=_BOOLEAN, evidences=_list({}), claims=_list({}), eat=_TEXT, client_nonce=_TEXT,
    nonce=_TEXT, inclusion={"type": "object"}, keyset_digest=_TEXT,
)  # fmt: skip
_VERIFIED = _object(
    verified=_BOOLEAN, claims=_list({}), findings=_list({}), error={"type": ["object", "null"]}
)
_HEALTH = _json(_ref("schemas", "Health"))
_MODELS = _object(object={"const": "list"}, data=_list(_ref("schemas", "Model")))
_TOKENS = _object(
    tokens=_one_or_many(_list(_WHOLE)), count=_one_or_many(_WHOLE), max_model_len=_LENGTH
)

_OPERATIONS = (
    _Operation("chat", "Answer a conversation", _everywhere("/chat/completions"),
               {"200": _generated("chat completion")}, "ChatRequest", _GENERATING),
    _Operation("completion", "Continue a text", _everywhere("/completions"),
               {"200": _generated("completion")}, "CompletionRequest", _GENERATING),
    _Operation("embeddings", "Embed texts, where the model is for that",
               _everywhere("/embeddings"), {"200": _json(_EMBEDDED)}, "EmbeddingsRequest",
               _EMBEDDING),
    _Operation("models", "The model that is served, in a list", _everywhere("/models"),
               {"200": _json(_MODELS)}, errors=_ASKING_A_KEY),
    _Operation("model", "The model that is served", _everywhere("/models/{model_id}"),
               {"200": _json(_ref("schemas", "Model"))}, errors=_NAMING),
    _Operation("tokenize", "Token ids of a text or of several", _everywhere("/tokenize"),
               {"200": _json(_TOKENS)}, "TokenizeRequest", _TOKENIZING),
    _Operation("detokenize", "Texts of token ids", _everywhere("/detokenize"),
               {"200": _json(_object(text=_one_or_many(_TEXT)))}, "DetokenizeRequest",
               _TOKENIZING),
    _Operation("health", "Whether it serves", ("/health", "/health/ready", "/~inference@1.0/health",
                                               "/~inference@1.0/v1/health"),
               {"200": _HEALTH, "503": _HEALTH}),
    _Operation("live", "Whether the process answers", ("/health/live",),
               {"200": _json(_object(status={"const": "live"}))}),
    _Operation("report", "Evidence about this appliance", ("/v1/aci/attestation",),
               {"200": _json(_ref("schemas", "Report"))},
               errors=(errors.InvalidRequest, *_PROVING), parameters=(_NONCE,)),
    _Operation("archived", "The null-form report of a keyset", ("/v1/dcv/reports/{digest}",),
               {"200": _json(_ref("schemas", "Report"))},
               errors=(errors.InvalidRequest, errors.RouteNotFound, *_PROVING),
               parameters=(_DIGEST,)),
    _Operation("generate", "GPU evidence over a nonce", _attestation("/generate"),
               {"200": _json(_GENERATED)}, "GenerateRequest", (*_SHOWING, *_PROVING)),
    _Operation("verify", "A verdict on GPU evidence", _attestation("/verify"),
               {"200": _json(_VERIFIED)}, "VerifyRequest", _SHOWING),
    _Operation("receipt", "The receipt of an exchange", ("/v1/aci/receipts/{receipt_id}",),
               {"200": _json(_ref("schemas", "Receipt"))}, errors=_LOOKING_UP,
               parameters=(_RECEIPT_ID,)),
    _Operation("epoch", "The GPU evidence that receipts cite", ("/v1/dcv/epochs/{digest}",),
               {"200": _json({"type": "object"})},
               errors=(*_LOOKING_UP, errors.InvalidRequest), parameters=(_DIGEST,)),
    _Operation("info", "What the GPU attestation device does", ("/~sev_gpu@1.0/info",),
               {"200": _json(_object(exports=_list(_TEXT), version=_TEXT))}),
    _Operation("well_known", "Versions and endpoints", ("/.well-known/dcv",),
               {"200": _json(_object(api_versions=_list(_TEXT), endpoints={"type": "object"}))}),
    _Operation("csr", "A certificate request for the TLS key", ("/.well-known/dcv/csr",),
               {"200": {"text/plain": {"schema": _TEXT}}}),
    _Operation("storage_key", "The TPM's key that secrets are sealed to",
               ("/.well-known/dcv/storage-key",),
               {"200": {"application/octet-stream": {"schema": {"type": "string",
                                                                "format": "binary"}}}},
               errors=(errors.RouteNotFound,)),
    _Operation("openapi", "This document", ("/openapi.json",), {"200": _json({"type": "object"})}),
)  # fmt: skip

__all__ = ["add_openapi_route", "openapi_document"]
