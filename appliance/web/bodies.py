"""Reading request bodies: raw bytes first, then strict JSON."""

from __future__ import annotations

from functools import partial

from quart import request

from appliance.config import Limits
from appliance.errors import UnsupportedFeature
from appliance.serving.workers import Workers
from appliance.wire.canonical import JsonObject, parse_json_object


async def read_body() -> bytes:
    """The raw body, whole. Its size and time are bounded by Quart from our limits."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedFeature("expected a body without content encoding")
    data = await request.get_data(cache=False, as_text=False)
    assert isinstance(data, bytes)
    return data


async def read_object(limits: Limits, workers: Workers, party: str) -> JsonObject:
    """The body as a JSON object; a large one is parsed in a thread, in its party's turn."""
    raw = await read_body()
    parse = partial(
        parse_json_object,
        raw,
        max_nesting=limits.max_nesting,
        max_values=limits.max_json_values,
    )
    return await workers.for_size(party, len(raw))(parse)
