"""OpenAI's endpoints: read, understand, admit, forward, relay, in that order; attested between
the reading, when a request stands in line for its evidence, and the forwarding, which waits for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated

import trio
from msgspec import Meta, Struct
from quart import Response, after_this_request, request
from quart_trio import QuartTrio

from appliance.config import MeasuredConfig
from appliance.engine.client import EngineAddress, EngineResponse
from appliance.errors import (
    ApplianceError,
    EngineError,
    EngineStreamFailed,
    InternalError,
    InvalidRequest,
    Malformed,
    ModelNotFound,
    RateLimited,
    RouteNotFound,
    UnsupportedFeature,
)
from appliance.serving.aborts import Aborts
from appliance.serving.admission import Admission, Exchange
from appliance.serving.auth import Authenticator, Tenant, cache_salt, known
from appliance.serving.epochs import Epochs
from appliance.serving.exchanges import ExchangeRecord, ReceiptDesk
from appliance.serving.metrics import (
    CLIENT_DISCONNECTED,
    ExchangeMetrics,
    Metrics,
)
from appliance.serving.relay import (
    EventSource,
    collect_answer,
    collect_embeddings,
    connect,
    event_source,
    forward,
    prepare,
)
from appliance.serving.tokenizing import ModelTokenizer
from appliance.serving.workers import Work, Workers
from appliance.web.bodies import read_body
from appliance.web.evidence import RequestEvidence, evidence_or_refusal
from appliance.web.problem import defect, error_body, problem
from appliance.web.stream import EventStreamBody, ProvenStreamBody, StreamProof, WholeAnswerBody
from appliance.wire.canonical import (
    MAX_SAFE_INTEGER,
    JsonObject,
    JsonValue,
    canonical_json,
    parse_json_object,
)
from appliance.wire.checkpoint import checkpoint_chunk
from appliance.wire.commitments import completion_commitment
from appliance.wire.encoding import decode_hex
from appliance.wire.openai import (
    PREFIXES,
    ChoicePlan,
    Endpoint,
    InferenceRequest,
    Token,
    convert,
    parse_body,
    parse_request,
    plan_choices,
)
from appliance.wire.output import encode_answer

NONCE_BYTES = 32

MAX_TOKENIZED_CHARACTERS = 1 << 20
"""Of one request, all its texts together: some seconds of work, and at most four tokens each."""

CLEANUP = "dcv.cleanup"
"""Key in the ASGI scope of the ExitStack that `web.app` closes when the request is over."""

TENANT = "dcv.tenant"
"""Key in the ASGI scope of the tenant that `web.app` found in the head; None where one is missing."""


@dataclass(frozen=True, slots=True)
class InferenceServices:
    """What the endpoints work with.

    Attributes:
        engine: where the engine answers.
        cache_secret: of this boot, for the salts that keep tenants' prefixes apart.
        random: so many random bytes.
        created: Unix seconds told as the model's creation: when this appliance booted.
        tokenizer: None when the model has no usable tokenizer file.
        parsing: of large bodies and answers, and putting them in canonical form. tokenizing: of
            any.
        vocabulary_size: token ids are below it; None when the model does not say: none are taken.
        evidence_s: seconds that a request may wait for its evidence.
    """

    config: MeasuredConfig
    admission: Admission
    engine: EngineAddress
    aborts: Aborts
    tokenizer: ModelTokenizer | None
    parsing: Workers
    tokenizing: Workers
    vocabulary_size: int | None
    authenticator: Authenticator
    cache_secret: bytes = field(repr=False)
    metrics: Metrics
    random: Callable[[int], bytes]
    created: int
    epochs: Epochs
    evidence_s: float
    receipts: ReceiptDesk


class TokenizeRequest(Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    prompt: str | Annotated[list[str], Meta(min_length=1, max_length=4096)]
    add_special_tokens: bool = True


class DetokenizeRequest(Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    tokens: list[Token | list[Token]]
    skip_special_tokens: bool = True


def add_inference_routes(app: QuartTrio, services: InferenceServices) -> None:
    """Every path of protocol §4, under each prefix."""

    async def chat() -> Response:
        return await infer(Endpoint.CHAT, services)

    async def completion() -> Response:
        return await infer(Endpoint.COMPLETION, services)

    async def embeddings() -> Response:
        return await infer(Endpoint.EMBEDDINGS, services)

    async def models() -> Response:
        _tenant()
        return _json({"object": "list", "data": [_model_object(services)]})

    async def model(model_id: str) -> Response:
        _tenant()
        _check_model(model_id, services)
        return _json(_model_object(services))

    async def tokenize() -> Response:
        return await encode_tokens(services)

    async def detokenize() -> Response:
        return await decode_tokens(services)

    for prefix in PREFIXES:
        for method, path, view in (
            ("POST", "/chat/completions", chat),
            ("POST", "/completions", completion),
            ("POST", "/embeddings", embeddings),
            ("GET", "/models", models),
            ("GET", "/models/<path:model_id>", model),
            ("POST", "/tokenize", tokenize),
            ("POST", "/detokenize", detokenize),
        ):
            app.add_url_rule(prefix + path, prefix + path, view, methods=[method])


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A request whose body was read, and what goes with it to its end.

    Attributes:
        raw: the wire body.
        work_for: how to do what takes as long as something of so many bytes is large. work: the
            body.
        cleanup: run when the request is over, however it ended.
    """

    endpoint: Endpoint
    tenant: Tenant
    raw: bytes = field(repr=False)
    work_for: Callable[[int], Work]
    work: Work
    cleanup: ExitStack
    observed: ExchangeMetrics
    record: ExchangeRecord


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A request that was understood and admitted, and forwarded under evidence that covers it.

    Attributes:
        responses: the engine's, one for each plan.
        deadline: on Trio's clock, of a stream's first event or of a whole answer.
    """

    arrival: _Arrival
    wanted: InferenceRequest
    plans: tuple[ChoicePlan, ...]
    exchange: Exchange
    response_id: str
    responses: list[EngineResponse]
    deadline: float


async def infer(endpoint: Endpoint, services: InferenceServices) -> Response:
    """One inference request, from its bytes to the beginning of its answer; counted, and once its
    body is there recorded, whatever becomes of it."""
    _check_path()
    observed = services.metrics.observe(endpoint.value)
    cleanup: ExitStack = request.scope[CLEANUP]  # type: ignore[literal-required]
    # Only counts if nothing else ended it: then it was the client who left.
    cleanup.callback(observed.end, CLIENT_DISCONNECTED)
    try:
        # 1. Authenticate and charge, from the headers: nobody else's body is worth reading.
        tenant = _charged_tenant(services)
        # 2. Read; the raw bytes are what the receipt names.
        raw = await read_body()
    except ApplianceError as error:
        observed.end(error.code)
        raise
    record = _open_record(services, tenant, raw)
    cleanup.callback(record.abandoned)
    try:
        work_for = partial(services.parsing.for_size, tenant.id)
        arrival = _Arrival(
            endpoint, tenant, raw, work_for, work_for(len(raw)), cleanup, observed, record
        )
        response = await _infer(services, arrival)
    except ApplianceError as error:
        observed.end(error.code)
        if isinstance(error, RateLimited):  # it was not looked at, and leaves no receipt
            record.forget()
            raise
        response = problem(error)
        record.write(canonical_json(error_body(error)))
        record.failed(error)
    except Exception:  # a defect, which the application logs and answers; it was not the client
        after_this_request(partial(_record_defect, observed, record))
        raise
    response.headers["X-Receipt-Id"] = record.receipt_id
    return response


async def _infer(services: InferenceServices, arrival: _Arrival) -> Response:
    """The other steps of `infer`."""
    record = arrival.record
    limits = services.config.limits
    # 3. Stand in line for evidence that covers this request. What follows is done while the device
    #    works.
    _client_nonce()
    evidence = RequestEvidence(
        services.epochs,
        record.commitment,
        within_s=services.evidence_s,
        unsafe_max_age_s=services.config.attestation.unsafe_max_evidence_age_s,
    )
    arrival.cleanup.callback(evidence.leave)
    await evidence.make_way()
    # 4. Understand, every key or none.
    response_id = arrival.endpoint.id_prefix + services.random(16).hex()
    wanted = await arrival.work(partial(_understand, services, arrival.endpoint, arrival.raw))
    _check_transport(wanted)
    wanted = replace(wanted, proof=wanted.proof.with_query(request.args.getlist("tee")))
    record.understood(wanted, response_id)
    plans = plan_choices(
        wanted,
        response_id=response_id,
        seed=int.from_bytes(services.random(7), "big") & MAX_SAFE_INTEGER,
        cache_salt=cache_salt(services.cache_secret, arrival.tenant),
        max_choices=limits.max_choices,
    )
    outgoing = await arrival.work(partial(prepare, wanted.body, plans))
    # 5. Admit, in turn. From here on the request's end, whatever it is, releases the exchange.
    exchange = await services.admission.admit(arrival.tenant, places=len(plans))
    arrival.cleanup.callback(exchange.release)
    arrival.cleanup.callback(_tell_interrupted, arrival.observed, record, exchange)
    record.begin()
    try:
        connections = connect(services.engine, exchange, count=len(plans))
        # 6. The evidence is fresh, and was appraised before anything of the request is forwarded.
        attested = await evidence.attested(exchange)
        record.admitted(attested)
        # 7. Forward and relay.
        record.forwarded(outgoing.body_hash, plans)
        patience_s = limits.engine_first_event_s if wanted.stream else limits.generation_s
        deadline = trio.current_time() + patience_s
        responses = await forward(
            connections,
            wanted,
            plans,
            outgoing,
            exchange,
            services.aborts,
            work=arrival.work,
            until=deadline,
        )
        admitted = _Admitted(arrival, wanted, plans, exchange, response_id, responses, deadline)
        if wanted.stream:
            return await _stream(services, admitted)
        return await _complete(services, admitted)
    except EngineError as error:
        raise exchange.interrupted or error from error


def _understand(services: InferenceServices, endpoint: Endpoint, raw: bytes) -> InferenceRequest:
    """What a body asks for, if it is something that this appliance does."""
    limits = services.config.limits
    body = parse_body(raw, max_nesting=limits.max_nesting, max_values=limits.max_json_values)
    extra_keys = services.config.engine.extra_request_keys
    wanted = parse_request(endpoint, body, extra_keys=extra_keys)
    _check_model(wanted.model, services)
    _check_task(wanted.endpoint, services)
    _check_token_ids(wanted, services)
    return wanted


def _tell_interrupted(
    observed: ExchangeMetrics, record: ExchangeRecord, exchange: Exchange
) -> None:
    """Where the end came before anything could be told to the client, it was still not the client
    who left. No effect on what has ended already."""
    if exchange.interrupted is not None:
        observed.end(exchange.interrupted.code)
        record.failed(exchange.interrupted)


async def _record_defect(
    observed: ExchangeMetrics, record: ExchangeRecord, response: Response
) -> Response:
    """What the application answers a defect with is what the receipt has."""
    observed.end(InternalError.code)
    record.write(await response.get_data(as_text=False))
    record.failed(defect())
    response.headers["X-Receipt-Id"] = record.receipt_id
    return response


def _check_path() -> None:
    """A receipt names the path as it was received, so there is one way to write each.

    Raises:
        RouteNotFound: it is percent-encoded.
    """
    if request.scope["raw_path"] != request.path.encode("utf-8"):
        raise RouteNotFound("there is nothing at this path; write it without percent-encoding")


def _open_record(services: InferenceServices, tenant: Tenant, raw: bytes) -> ExchangeRecord:
    try:
        nonce = _client_nonce()
    except InvalidRequest:  # refused once the record is open, so that the refusal has a receipt
        nonce = None
    return services.receipts.open(tenant, endpoint=request.path, raw=raw, client_nonce=nonce)


def _client_nonce() -> bytes | None:
    """`X-DCV-Nonce`: 64 lowercase hex digits, once, or nothing."""
    given = request.headers.getlist("X-DCV-Nonce")
    if not given:
        return None
    try:
        if len(given) == 1:
            return decode_hex(given[0], field="X-DCV-Nonce", length=NONCE_BYTES)
    except Malformed:
        pass
    raise InvalidRequest("X-DCV-Nonce: expected 64 lowercase hex digits, once")


async def _complete(services: InferenceServices, one: _Admitted) -> Response:
    limits, record, wanted = services.config.limits, one.arrival.record, one.wanted
    work_for = one.arrival.work_for
    try:
        with trio.fail_at(one.deadline):
            if wanted.endpoint is Endpoint.EMBEDDINGS:
                answer = await collect_embeddings(
                    one.responses[0], wanted, limits, work_for=work_for
                )
            else:
                answer = await collect_answer(
                    one.responses,
                    one.plans,
                    limits,
                    response_id=one.response_id,
                    work_for=work_for,
                )
        one.exchange.complete()
    except trio.TooSlowError:
        raise EngineStreamFailed("the engine took too long to answer") from None
    one.arrival.observed.usage(answer.value.get("usage"))
    record.answered(answer.value)
    data = answer.data
    if wanted.proof.at_end:
        encode = encode_answer if wanted.endpoint is Endpoint.EMBEDDINGS else canonical_json
        proven = {**answer.value, **await _proof(services, one)}
        data = await work_for(len(data))(partial(encode, proven))
    response = Response(
        WholeAnswerBody(data, one.arrival.observed, record), content_type="application/json"
    )
    response.content_length = len(data)
    return response


async def _proof(services: InferenceServices, one: _Admitted) -> JsonObject:
    """The members that prove a whole answer.

    Raises:
        AttestationFailed: evidence that covers it was wanted, and could not be had or does not
            hold; nothing of the answer goes out.
        ApplianceError: the exchange was interrupted; this is the reason.
    """
    record, exchange = one.arrival.record, one.exchange
    core = record.final_core()
    if not one.wanted.proof.tee:
        return record.final_members(core, None)
    join = partial(services.epochs.join, "completion", completion_commitment(core.to_json()))
    attested = await exchange.unless_interrupted(
        partial(evidence_or_refusal, services.evidence_s, join)
    )
    return record.final_members(core, attested)


async def _stream(services: InferenceServices, one: _Admitted) -> Response:
    """The head waits for the engine's, so that its refusals keep their status; but no longer than
    a heartbeat, after which the client hears pings."""
    limits = services.config.limits
    source = event_source(one.responses, one.plans, limits, response_id=one.response_id)
    with trio.move_on_after(limits.heartbeat_s) as silence:
        await source.start()
    begun = not silence.cancelled_caught
    response = Response(
        _stream_body(services, one, source, begun=begun),
        content_type="text/event-stream",
        headers={"Cache-Control": "no-cache"},
    )
    response.timeout = None  # Quart would cut the stream after 60 s, silently
    return response


def _stream_body(
    services: InferenceServices,
    one: _Admitted,
    source: EventSource,
    *,
    begun: bool,
) -> EventStreamBody:
    wanted, arrival, limits = one.wanted, one.arrival, services.config.limits
    parts = (source, one.exchange, limits, arrival.observed, arrival.record)
    if not wanted.proof.wanted:
        return EventStreamBody(
            *parts,
            begun=begun,
            first_deadline=one.deadline,
            usage_asked=wanted.include_usage,
        )

    last_chunk = partial(  # without the request, which nobody needs while its answer runs
        _last_chunk, services.receipts, wanted.endpoint, one.response_id, wanted.model
    )

    return ProvenStreamBody(
        *parts,
        begun=begun,
        first_deadline=one.deadline,
        usage_asked=wanted.include_usage,
        proof=StreamProof(wanted.proof, last_chunk, services.epochs, services.evidence_s),
    )


def _last_chunk(
    receipts: ReceiptDesk, endpoint: Endpoint, response_id: str, model: str, members: JsonObject
) -> JsonObject:
    return checkpoint_chunk(
        object=endpoint.chunk_object,
        response_id=response_id,
        created=int(receipts.now()),
        model=model,
        members=members,
    )


async def encode_tokens(services: InferenceServices) -> Response:
    """`/v1/tokenize`: token ids of a text or of several."""
    return await _tokenizing(services, _encoded)


async def decode_tokens(services: InferenceServices) -> Response:
    """`/v1/detokenize`: the text of token ids, or of several lists of them."""
    return await _tokenizing(services, _decoded)


async def _tokenizing(
    services: InferenceServices, answer: Callable[[InferenceServices, ModelTokenizer, bytes], bytes]
) -> Response:
    """Parsing, tokenizing and writing the answer are one piece of work, away from the loop."""
    tenant = _charged_tenant(services)
    tokenizer = _tokenizer(services)
    raw = await read_body()
    data = await services.tokenizing.do(tenant.id, partial(answer, services, tokenizer, raw))
    return Response(data, content_type="application/json")


def _encoded(services: InferenceServices, tokenizer: ModelTokenizer, raw: bytes) -> bytes:
    wanted = convert(_parsed(services, raw), TokenizeRequest)
    _check_model(wanted.model, services)
    many = isinstance(wanted.prompt, list)
    texts = wanted.prompt if isinstance(wanted.prompt, list) else [wanted.prompt]
    if sum(map(len, texts)) > MAX_TOKENIZED_CHARACTERS:
        raise InvalidRequest(
            f"prompt: expected at most {MAX_TOKENIZED_CHARACTERS} characters in all", param="prompt"
        )
    tokens = tokenizer.encode(texts, add_special_tokens=wanted.add_special_tokens)
    counts: list[JsonValue] = [len(ids) for ids in tokens]
    lists: list[JsonValue] = [list(ids) for ids in tokens]
    return canonical_json(
        {
            "tokens": lists if many else lists[0],
            "count": counts if many else counts[0],
            "max_model_len": services.config.model.max_model_len,
        }
    )


def _decoded(services: InferenceServices, tokenizer: ModelTokenizer, raw: bytes) -> bytes:
    wanted = convert(_parsed(services, raw), DetokenizeRequest)
    _check_model(wanted.model, services)
    batches = [item for item in wanted.tokens if isinstance(item, list)]
    ids = [item for item in wanted.tokens if isinstance(item, int)]
    if batches and ids:
        raise InvalidRequest("tokens: expected token ids or lists of them", param="tokens")
    many = bool(batches)
    texts = tokenizer.decode(
        batches if many else [ids], skip_special_tokens=wanted.skip_special_tokens
    )
    decoded: list[JsonValue] = list(texts)
    return canonical_json({"text": decoded if many else decoded[0]})


def _parsed(services: InferenceServices, raw: bytes) -> JsonObject:
    limits = services.config.limits
    return parse_json_object(raw, max_nesting=limits.max_nesting, max_values=limits.max_json_values)


def _tenant() -> Tenant:
    return known(request.scope[TENANT])  # type: ignore[literal-required]


def _charged_tenant(services: InferenceServices) -> Tenant:
    """Who asks for work; it counts whatever becomes of it, else refusals would cost nothing."""
    tenant = _tenant()
    services.admission.charge(tenant)
    return tenant


def _check_model(name: str, services: InferenceServices) -> None:
    if name != services.config.model.id:
        raise ModelNotFound(
            "this model is not served here; GET /v1/models names the one that is", param="model"
        )


def _check_task(endpoint: Endpoint, services: InferenceServices) -> None:
    """The engine was started for one of the two; it would refuse the other in words of its own."""
    embeds = services.config.model.task == "embed"
    if embeds and endpoint is not Endpoint.EMBEDDINGS:
        raise UnsupportedFeature(
            "model: this one embeds texts and generates none; ask POST /v1/embeddings",
            param="model",
        )
    if endpoint is Endpoint.EMBEDDINGS and not embeds:
        raise UnsupportedFeature(
            "model: this one generates texts and embeds none; ask POST /v1/chat/completions",
            param="model",
        )


TOKEN_ID_KEYS = ("prompt", "input", "stop_token_ids")
"""Where a body may name tokens by number; the engine itself looks at those in `logit_bias`."""


def _check_token_ids(wanted: InferenceRequest, services: InferenceServices) -> None:
    """SGLang 0.5.23 computes with any id, and its scheduler dies of one that the model has not: where
    the model does not say how many it has, none is let through."""
    for key in TOKEN_ID_KEYS:
        given = wanted.body.get(key)
        items = given if isinstance(given, list) else []
        ids = [one for item in items for one in (item if isinstance(item, list) else (item,))]
        largest = max((one for one in ids if isinstance(one, int)), default=None)
        if largest is None:
            continue
        if services.vocabulary_size is None:
            raise UnsupportedFeature(f"{key}: this model takes no token ids, only text", param=key)
        if largest >= services.vocabulary_size:
            raise InvalidRequest(
                f"{key}: expected token ids below {services.vocabulary_size}", param=key
            )


def _check_transport(wanted: InferenceRequest) -> None:
    if wanted.stream and request.http_version == "1.0":
        # Without chunks the end of a broken stream looks like the end of a whole one.
        raise UnsupportedFeature("stream: expected HTTP/1.1 or HTTP/2", param="stream")


def _tokenizer(services: InferenceServices) -> ModelTokenizer:
    if services.tokenizer is None:
        raise UnsupportedFeature("this model has no tokenizer file to tokenize with")
    return services.tokenizer


def _model_object(services: InferenceServices) -> JsonObject:
    model = services.config.model
    return {
        "id": model.id,
        "object": "model",
        "created": services.created,
        "owned_by": "dcv",
        "root": model.id,
        "max_model_len": model.max_model_len,
    }


def _json(value: JsonObject) -> Response:
    return Response(canonical_json(value), content_type="application/json")


__all__ = [
    "CLEANUP",
    "MAX_TOKENIZED_CHARACTERS",
    "PREFIXES",
    "TENANT",
    "InferenceServices",
    "add_inference_routes",
    "infer",
]
