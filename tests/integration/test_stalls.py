"""Requests that take long to compute hold up nobody else, nor the appliance's end."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from appliance.web.openai import MAX_TOKENIZED_CHARACTERS
from appliance.wire.receipt import parse_receipt, read_events
from tests.integration.aftermath import LIVE, LIVE_BODY
from tests.integration.appliance import (
    MODEL,
    QUESTION,
    RunningAppliance,
    start_appliance,
    with_tokenizer,
)
from tests.integration.wire import Wire

CHAT = "/v1/chat/completions"
BOUND_S = 1.0
"""Of one answer to /health/live. On an idle machine it is 50 ms, and without threads 6 s."""

MAX_VALUES = 1 << 19


def with_parameters(item: bytes, count: int) -> bytes:
    """A chat whose one tool has a list of so many items where a schema belongs."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": ["HERE"]}}}
    body = json.dumps({"model": MODEL, "messages": QUESTION, "tools": [tool], "max_tokens": 1})
    return body.encode().replace(b'"HERE"', b",".join([item] * count))


def to_tokenize(text: str) -> bytes:
    return json.dumps({"model": MODEL, "prompt": text}, ensure_ascii=False).encode()


def with_logprobs(tokens: int, **more: object) -> bytes:
    """A chat whose answer is mostly about the tokens that it did not say."""
    content = f"[[mode:long:{tokens}]] Go on"
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    return json.dumps({**body, "logprobs": True, "top_logprobs": 20, **more}).encode()


HEAVY: dict[str, tuple[str, bytes, int]] = {
    "more values than are read": (CHAT, with_parameters(b"[]", (8 << 20) // 3 - 200), 400),
    "as many empty lists": (CHAT, with_parameters(b"[]", MAX_VALUES // 2 - 50), 200),
    "as many numbers": (CHAT, with_parameters(b"1.5", MAX_VALUES - 100), 200),
    "text to tokenize": ("/v1/tokenize", to_tokenize("漢 " * (MAX_TOKENIZED_CHARACTERS // 2)), 200),
    "more of it": ("/v1/tokenize", to_tokenize("漢" * (MAX_TOKENIZED_CHARACTERS + 1)), 400),
    "tokens": (
        "/v1/detokenize",
        json.dumps({"model": MODEL, "tokens": [0] * (MAX_VALUES - 100)}).encode(),
        200,
    ),
    "an answer of 20 MiB": (CHAT, with_logprobs(12_000), 200),
    "the same, proven": (CHAT, with_logprobs(12_000, tee=True), 200),
}


@asynccontextmanager
async def always_live(appliance: RunningAppliance) -> AsyncIterator[None]:
    """While what is inside goes on, /health/live answers within the bound."""
    slowest = 0.0

    async def look() -> None:
        nonlocal slowest
        async with Wire.open(appliance) as wire:
            due = trio.current_time()
            while True:
                await wire.send(LIVE)
                await wire.read_until(LIVE_BODY)
                # From when it should have been asked: who asks here is held up as well.
                slowest = max(slowest, trio.current_time() - due)
                due = trio.current_time() + 0.01
                await trio.sleep_until(due)

    async with trio.open_nursery() as looking:
        looking.start_soon(look)
        yield
        looking.cancel_scope.cancel()
    print(f"slowest answer {slowest:.3f} s")
    assert slowest < BOUND_S


@pytest.fixture
async def appliance(nursery: trio.Nursery, tmp_path: Path) -> RunningAppliance:
    return await start_appliance(nursery, tmp_path, sections=with_tokenizer(tmp_path))


@pytest.mark.parametrize("name", HEAVY)
async def test_a_heavy_body_holds_up_nobody_else(appliance: RunningAppliance, name: str) -> None:
    path, body, status = HEAVY[name]
    async with appliance.client() as client, always_live(appliance):
        response = await client.post(path, content=body)
    assert response.status_code == status, response.text[:300]
    if status == 400 and path == CHAT:
        assert response.json()["error"]["code"] == "malformed"
        assert "max_json_values" in response.json()["error"]["message"]


async def test_an_answer_that_takes_too_long_to_read_is_refused_and_its_receipt_says_so(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(nursery, tmp_path, sections={"limits": {"max_wait_s": 0.1}})
    async with appliance.client() as client:
        response = await client.post(CHAT, content=with_logprobs(12_000))
        assert response.status_code == 503, response.text[:300]
        assert response.json()["error"]["code"] == "overloaded"
        assert len(response.content) < 1000  # nothing of the answer
        receipt = await client.get(f"/v1/aci/receipts/{response.headers['x-receipt-id']}")
        log = read_events(parse_receipt(receipt.content))
        assert log.forwarded is not None
        assert log.output is None
        assert (log.ended.outcome, log.ended.code) == ("refused", "overloaded")
        assert log.returned.body_hash == hashlib.sha256(response.content).digest()
        small = {"model": MODEL, "messages": QUESTION}
        assert (await client.post(CHAT, json=small)).status_code == 200


async def test_the_end_of_the_appliance_waits_for_no_tokenizer(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    sections = {**with_tokenizer(tmp_path), "limits": {"drain_s": 1.0}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    body = to_tokenize("Hello " * (MAX_TOKENIZED_CHARACTERS // 6))
    head = f"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"

    async def ask() -> None:
        async with Wire.open(appliance) as wire:
            await wire.send(head.encode() + body)
            await wire.read_to_end()

    for _ in range(12):
        nursery.start_soon(ask)
    await trio.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    with trio.fail_after(10):
        await appliance.ended.wait()
    assert appliance.result == [None]
