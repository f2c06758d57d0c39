"""The golden self-test: the claim that receipts make, tried before anybody relies on it.

    one seeded, sampled request ──┬── streamed, nothing cached yet ── output digest ──┐
                                  └── whole, its prefix perhaps cached ── output digest ┴── equal

Sampled at temperature 1, so that the seed decides every token; `ignore_eos`, so that there are
always as many. The engine is asked directly, over loopback: nothing public is open yet, no
receipt is written and no client's text is involved.

A model that embeds samples nothing. There the claim is that a text has one vector: the same text is
embedded twice, written as numbers and as base64, and both must say the same binary32 numbers.

What it cannot show is that a text does not depend on who else is served (docs/determinism.md has
that, measured), nor that another machine computes the same; for the latter the digest is logged:
appliances with equal workloads should log the same one.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from appliance.config import Limits
from appliance.engine.client import EngineAddress, open_exchange, read_refusal
from appliance.errors import EngineNotDeterministic, EngineProtocolError, Malformed
from appliance.serving.relay import EngineStream
from appliance.wire.canonical import JsonObject, canonical_json, parse_json_object
from appliance.wire.encoding import format_sha256
from appliance.wire.openai import Endpoint
from appliance.wire.output import Output, decode_embeddings, output_of_answer, output_of_stream

PROMPT = "Once upon a time, in a town by the sea,"
SEED = 20_480_731
TOKENS = 24

CACHE_SALT = "self-test"
"""No tenant's. Both requests have it: the second may find the first one's prefix in the engine's
cache, and that must not change a token either."""

REQUEST_IDS = "self-test-"
"""What the engine's ids of these requests begin with; a client's answer begins otherwise."""


Task: TypeAlias = Literal["generate", "embed"]


async def self_test(
    address: EngineAddress, limits: Limits, *, model: str, task: Task = "generate"
) -> bytes:
    """Ask the engine twice, and compare.

    Args:
        model: the name it is served under.
        task: what it is for.

    Returns:
        The output digest, or that of the embedding, 32 bytes.

    Raises:
        EngineNotDeterministic: the two differ.
        EngineError: the engine does not answer as it should.
    """
    if task == "embed":
        return await _embed_twice(address, limits, model)
    streamed = _digest(await _ask(address, limits, _request(model, stream=True)))
    whole = _digest(await _ask(address, limits, _request(model, stream=False)))
    if streamed != whole:
        raise EngineNotDeterministic(
            f"expected one output for one request of {TOKENS} tokens with seed {SEED}; got "
            f"{format_sha256(streamed)} streamed and {format_sha256(whole)} whole"
        )
    return whole


async def _embed_twice(address: EngineAddress, limits: Limits, model: str) -> bytes:
    first = await _embedding(address, limits, model, "float")
    second = await _embedding(address, limits, model, "base64")
    if first != second:
        raise EngineNotDeterministic(
            f"expected one embedding of one text; got {format_sha256(first)} as numbers and "
            f"{format_sha256(second)} as base64"
        )
    return second


async def warm_up(
    address: EngineAddress, limits: Limits, *, model: str, task: Task = "generate"
) -> None:
    """One of these requests, where nothing is claimed: no client waits for what only the first
    one has to.

    Raises:
        EngineError: the engine does not answer as it should.
    """
    if task == "embed":
        await _embedding(address, limits, model, "base64")
        return
    _digest(await _ask(address, limits, _request(model, stream=True)))


async def _embedding(
    address: EngineAddress, limits: Limits, model: str, form: Literal["float", "base64"]
) -> bytes:
    """The digest of one text's embedding, which the engine writes in this form."""
    body: JsonObject = {
        "model": model,
        "input": PROMPT,
        "encoding_format": form,
        "rid": f"{REQUEST_IDS}{form}",
    }
    path = Endpoint.EMBEDDINGS.value
    response = await open_exchange(address, "POST", path, canonical_json(body))
    try:
        if (await response.head()).status != 200:
            raise await read_refusal(response)
        answer = await response.read_all(limit_bytes=limits.max_response_bytes)
        embeddings = decode_embeddings(answer)
        digest = embeddings.digest
    except Malformed as error:
        raise EngineProtocolError(f"the engine's answer: {error.message}") from error
    finally:
        response.close()
    if [type(one) for one in embeddings.told] != [str if form == "base64" else list]:
        raise EngineProtocolError(f"expected one embedding, as {form}")
    return digest


def _request(model: str, *, stream: bool) -> JsonObject:
    return {
        "model": model,
        "prompt": PROMPT,
        "seed": SEED,
        "temperature": 1,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": stream,
        "cache_salt": CACHE_SALT,
        "rid": f"{REQUEST_IDS}{'streamed' if stream else 'whole'}",
    }


async def _ask(address: EngineAddress, limits: Limits, body: JsonObject) -> Output:
    response = await open_exchange(address, "POST", Endpoint.COMPLETION.value, canonical_json(body))
    try:
        if body["stream"]:
            stream, events = EngineStream(response, limits), bytearray()
            while data := await stream.receive():
                events += data
            return output_of_stream(bytes(events), max_bytes=limits.max_response_bytes)
        if (await response.head()).status != 200:
            raise await read_refusal(response)
        answer = await response.read_all(limit_bytes=limits.max_response_bytes)
        return output_of_answer(
            parse_json_object(answer, max_nesting=limits.max_nesting),
            max_bytes=limits.max_response_bytes,
        )
    except Malformed as error:
        raise EngineProtocolError(f"the engine's answer: {error.message}") from error
    finally:
        response.close()


def _digest(output: Output) -> bytes:
    """Of an answer that says something.

    Raises:
        EngineProtocolError: it has no choice, or other ends than the request allows; or its text
            has no canonical form.
    """
    if output.finish_reasons != ("length",):
        raise EngineProtocolError(f"expected one choice that ends after {TOKENS} tokens")
    try:
        return output.digest
    except Malformed as error:
        raise EngineProtocolError(f"the engine's answer: {error.message}") from error
