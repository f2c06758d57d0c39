"""Reading request bodies: raw bytes first, then strict JSON."""

from __future__ import annotations

from quart import request

from appliance.errors import UnsupportedFeature
from appliance.wire.canonical import JsonObject, parse_json_object


async def read_body() -> bytes:
    """The raw body, whole. Its size and time are bounded by Quart from our limits."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedFeature("expected a body without content encoding")
    data = await request.get_data(cache=False, as_text=False)
    assert isinstance(data, bytes)
    return data


async def read_object(*, max_nesting: int) -> JsonObject:
    """The body as a JSON object, at most so deep."""
    return parse_json_object(await read_body(), max_nesting=max_nesting)
