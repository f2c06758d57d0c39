"""Every parameter with every wrong type and beyond every bound, over the wire.

What there is to try comes from the document that clients get, so a parameter added tomorrow is
tried the same day, nested ones included. `tests/unit/test_openai_requests.py` asks the same of the
declarations; this asks the appliance, and that neither the engine nor anybody hears of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import trio

from appliance.wire.canonical import MAX_SAFE_INTEGER
from tests.integration.appliance import (
    MODEL,
    QUESTION,
    RunningAppliance,
    start_appliance,
    with_tokenizer,
)

CANARY = "CANARY-5e1d"
AT_LEAST = {
    "chat/completions": 1000,
    "completions": 500,
    "embeddings": 60,
    "tokenize": 20,
    "detokenize": 20,
    "dcv/attestation/generate": 8,
    "dcv/attestation/verify": 40,
}

Json: TypeAlias = Any
Schema: TypeAlias = dict[str, Any]

SAMPLES: dict[str, list[Json]] = {
    "null": [None],
    "boolean": [True, False],
    "integer": [7],
    "number": [7.5, -1e300],
    "string": [CANARY, "", "7"],
    "array": [[], [CANARY], [[[CANARY]]]],
    "object": [{}, {CANARY: CANARY}],
}


@dataclass(frozen=True)
class Place:
    """Where a value goes: the parameter's path, what it must be, and the body around it."""

    path: str
    schema: Schema = field(repr=False)
    body: Callable[[Json], Json] = field(repr=False)


class Document:
    """The OpenAPI document, as what to try."""

    def __init__(self, document: Schema) -> None:
        self.document = document

    def bodies(self) -> Iterator[tuple[str, Schema]]:
        """Every path that takes a body, with the body's schema."""
        for path, item in self.document["paths"].items():
            if "post" in item and path.startswith("/v1/"):
                content = item["post"]["requestBody"]["content"]["application/json"]
                yield path, self.resolved(content["schema"])

    def resolved(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            schema = self.document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return schema

    def alternatives(self, schema: Schema) -> list[Schema]:
        schema = self.resolved(schema)
        if "anyOf" in schema:
            return [found for one in schema["anyOf"] for found in self.alternatives(one)]
        if isinstance(schema.get("type"), list):
            return [{**schema, "type": one} for one in schema["type"]]
        return [schema]

    def types(self, schema: Schema) -> set[str]:
        """JSON types that a schema takes; an integer is a number."""
        found = set[str]()
        for one in self.alternatives(schema):
            if "enum" in one:
                found.add("string")
            elif "type" not in one:
                found |= SAMPLES.keys()
            else:
                found |= {"integer", "number"} if one["type"] == "number" else {one["type"]}
        return found

    def smallest(self, schema: Schema) -> Json:
        """A value that a schema takes."""
        one = self.alternatives(schema)[0]
        if "enum" in one:
            return one["enum"][0]
        match one["type"]:
            case "string":
                return "data:,x" if "pattern" in one else "x"
            case "null":
                return None
            case "boolean":
                return False
            case "integer" | "number":
                return one.get("minimum", 0)
            case "array":
                return [self.smallest(one["items"])] * one.get("minItems", 0)
            case "object":
                properties = one.get("properties", {})
                return {key: self.smallest(properties[key]) for key in one.get("required", ())}
            case other:
                raise NotImplementedError(other)

    def places(
        self, schema: Schema, body: Callable[[Json], Json], prefix: str = ""
    ) -> Iterator[Place]:
        """Every parameter of a schema's objects, at any depth."""
        for one in self.alternatives(schema):
            if one.get("type") == "array" and "items" in one:
                yield from self.places(
                    one["items"], lambda value: body([value]), f"{prefix.rstrip('.')}[0]."
                )
            if one.get("type") != "object":
                continue
            for name, inner in one.get("properties", {}).items():

                def around(value: Json, one: Schema = one, name: str = name) -> Json:
                    return body({**self.smallest(one), name: value})

                yield Place(prefix + name, inner, around)
                yield from self.places(inner, around, f"{prefix}{name}.")

    def wrong(self, schema: Schema) -> Iterator[Json]:
        """Values that a schema does not take: of every other type, and beyond its bounds."""
        for name in sorted(SAMPLES.keys() - self.types(schema)):
            yield from SAMPLES[name]
        alternatives = self.alternatives(schema)
        for one in alternatives:
            if "minimum" in one:
                yield one["minimum"] - 1
            if "exclusiveMinimum" in one:
                yield one["exclusiveMinimum"]
            if "maximum" in one:
                yield one["maximum"] + 1
            if "enum" in one or "pattern" in one:
                yield from ("", CANARY, MODEL + CANARY)
            if one.get("minLength"):
                yield ""
            if "maxLength" in one:
                yield CANARY * one["maxLength"]
            if one.get("minItems"):
                yield []
            if "maxItems" in one:
                yield [self.smallest(one["items"])] * (one["maxItems"] + 1)
            if isinstance(one.get("additionalProperties"), dict):
                yield from ({"1": value} for value in self.wrong(one["additionalProperties"]))
            if "propertyNames" in one:
                yield {CANARY: self.smallest(one["additionalProperties"])}
        # Of several kinds of list, what the one refuses another may take.
        if items := [one["items"] for one in alternatives if "items" in one]:
            yield from ([value] for value in self.wrong({"anyOf": items}))


def expected_error(place: Place, value: Json) -> tuple[int, str | None]:
    """The status, and how `param` begins."""
    if isinstance(value, int) and abs(value) > MAX_SAFE_INTEGER:
        # No JSON that we read; whose value it was is known on the first level only.
        return 400, place.path if place.path.isidentifier() else None
    if place.path == "model" and isinstance(value, str):
        return 404, "model"
    # Where media come from is judged with the part they are in.
    return 400, re.sub(r"\.\w+_url\.url\Z", "", place.path)


async def test_every_parameter_refuses_every_wrong_type_and_is_named(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(nursery, tmp_path, sections=with_tokenizer(tmp_path))
    heard: list[str] = []
    tried = Counter[str]()
    async with appliance.client() as client:
        document = Document((await client.get("/openapi.json")).json())
        for path, schema in document.bodies():
            for place in document.places(schema, lambda value: value):
                for value in document.wrong(place.schema):
                    response = await client.post(path, json=place.body(value))
                    about = f"{path} {place.path} = {str(value)[:80]}: {response.text[:300]}"
                    status, param = expected_error(place, value)
                    error = response.json()["error"]
                    assert response.status_code == status, about
                    assert error.keys() == {"message", "type", "param", "code"}, about
                    assert (error["param"] or "").startswith(param or ""), about
                    assert (error["param"] is None) == (param is None), about
                    heard.append(f"{response.headers!r} {response.text}")
                    tried[path] += 1
    # All of them, not a few: a document that lost its schemas would make this an empty test.
    assert tried.keys() == {f"/v1/{name}" for name in AT_LEAST}
    assert all(tried[f"/v1/{name}"] >= count for name, count in AT_LEAST.items()), tried
    assert CANARY not in "\n".join(heard)
    assert CANARY not in appliance.log_stream.getvalue()
    assert await appliance.engine_seen() == []


async def test_the_query_is_judged_like_the_body(appliance: RunningAppliance) -> None:
    async with appliance.client() as client:
        for value in ("yes", "False", "1", "", "null", CANARY, ["false", "true"], ["true", "true"]):
            response = await client.post(
                "/v1/chat/completions",
                params={"tee": value},
                json={"model": MODEL, "messages": QUESTION},
            )
            assert response.status_code == 400, value
            assert response.json()["error"]["param"] == "tee"
            assert CANARY not in response.text
        for query, body in (("true", False), ("false", True)):
            response = await client.post(
                "/v1/chat/completions",
                params={"tee": query},
                json={"model": MODEL, "messages": QUESTION, "tee": body},
            )
            assert (response.status_code, response.json()["error"]["param"]) == (400, "tee")
    assert await appliance.engine_seen() == []
