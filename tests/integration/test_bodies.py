"""Bodies that are begun and not ended: what they may take together, and who pays for it."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path

import httpx2
import pytest
import trio

from appliance.serving.bodies import FREE_SHARE
from tests.integration.aftermath import unharmed
from tests.integration.appliance import MODEL, QUESTION, RunningAppliance, start_appliance
from tests.integration.test_metrics import scrape
from tests.integration.wire import (
    PATIENCE_S,
    WINDOW,
    DataFrame,
    FrameWire,
    RstStreamFrame,
    WindowUpdateFrame,
    Wire,
    request_headers,
)

CHAT = "/v1/chat/completions"
TOTAL = 1 << 18
PART = TOTAL * FREE_SHARE // (FREE_SHARE + 1)
"""Of one party, here an address: there are no keys."""

HALF_BODY = 12_000  # 128 of them are six times the total, and one is never whole
STREAMS = 64


async def start(nursery: trio.Nursery, folder: Path, *, body_s: float = 60.0) -> RunningAppliance:
    return await start_appliance(
        nursery,
        folder,
        sections={
            "listen": {"metrics_port": 0},
            "limits": {
                "max_body_bytes": 1 << 16,
                "max_body_bytes_total": TOTAL,
                "body_s": body_s,
            },
        },
    )


async def held(appliance: RunningAppliance) -> float:
    return (await scrape(appliance))["dcv_body_bytes_held", ()]


async def none_held(appliance: RunningAppliance) -> None:
    with trio.fail_after(PATIENCE_S):
        while await held(appliance):
            await trio.sleep(0.02)


async def send_halves(wire: FrameWire) -> None:
    """Begin a body on every stream and stop; keeps to the window of the connection."""
    room = WINDOW
    for number in range(STREAMS):
        stream_id = 2 * number + 1
        while room < HALF_BODY:
            room += (await wire.wait_for(WindowUpdateFrame, 0)).window_increment
        room -= HALF_BODY
        await wire.send_frames(
            wire.head(stream_id, request_headers("POST", CHAT)),
            DataFrame(stream_id, data=b"{" + b" " * (HALF_BODY - 1)),
        )


async def honest_chat(appliance: RunningAppliance) -> httpx2.Response:
    """From another address, so another peer."""
    transport = httpx2.AsyncHTTPTransport(verify=appliance.trust, local_address="127.0.0.2")
    async with httpx2.AsyncClient(transport=transport, timeout=20) as client:
        return await client.post(
            f"{appliance.url}{CHAT}", json={"model": MODEL, "messages": QUESTION}
        )


async def test_half_sent_bodies_stay_within_the_budget_and_lock_nobody_out(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start(nursery, tmp_path)
    async with unharmed(appliance):
        async with FrameWire.open(appliance) as one, FrameWire.open(appliance) as other:
            for wire in (one, other):
                await wire.greet()
                await send_halves(wire)
            with trio.fail_after(PATIENCE_S):
                while not (now := await held(appliance)) > PART - HALF_BODY:
                    assert now <= PART
                    await trio.sleep(0.02)
            assert await held(appliance) <= PART
            # 1. An honest peer is served at once; the hoarder pays for it.
            with trio.fail_after(5):
                assert (await honest_chat(appliance)).status_code == 200
            assert await held(appliance) <= TOTAL
            # 2. What gave way was told so, and when to come again.
            assert await one.status(1) == 503
            assert b"overloaded" in await one.wait_for_end(1)
            assert dict(one._headers[1])["retry-after"] == "1"
            # 3. Resets give back what the rest held.
            for wire in (one, other):
                await wire.send_frames(*(RstStreamFrame(2 * n + 1) for n in range(STREAMS)))
            await none_held(appliance)
        assert (await honest_chat(appliance)).status_code == 200


@pytest.mark.parametrize("ending", ["timeout", "drop", "reset"])
async def test_every_ending_of_an_upload_gives_its_bytes_back(
    nursery: trio.Nursery, tmp_path: Path, ending: str
) -> None:
    appliance = await start(nursery, tmp_path, body_s=1.0 if ending == "timeout" else 60.0)
    body = json.dumps({"model": MODEL, "messages": QUESTION}).encode() + b" " * 30_000
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    async with unharmed(appliance), Wire.open(appliance) as wire:
        assert await wire.send(head.encode() + body[:-1])
        with trio.fail_after(PATIENCE_S):
            while await held(appliance) != len(body) - 1:
                await trio.sleep(0.02)
        if ending == "timeout":
            assert b" 408 " in await wire.read_until(b"\r\n")
        elif ending == "drop":
            wire.drop()
        else:
            wire.reset()
        await none_held(appliance)


async def test_a_body_counts_while_its_request_waits_and_no_longer(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start(nursery, tmp_path)
    content = "[[mode:slow:20]] Go" + " " * 30_000
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "stream": True,
        "max_tokens": 50,
        "ignore_eos": True,
    }
    async with (
        unharmed(appliance),
        appliance.client() as client,
        client.stream("POST", CHAT, json=body) as answer,
    ):
        assert answer.status_code == 200
        assert await held(appliance) == 0
        lines = [line async for line in answer.aiter_lines()]
    assert lines[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize("proven", [False, True])
async def test_a_running_stream_keeps_nothing_of_its_request(
    nursery: trio.Nursery, tmp_path: Path, proven: bool
) -> None:
    """Each kept its raw body, what that was parsed into, and what was sent, until its end."""
    appliance = await start_appliance(nursery, tmp_path)
    size = 1 << 20
    question = {"role": "user", "content": "[[mode:slow:50]] Go " + "o" * size}
    body = {"model": MODEL, "messages": [question], "stream": True, "max_tokens": 1000}
    raw = json.dumps({**body, "tee": proven, "ignore_eos": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
    tracemalloc.start()
    try:
        async with Wire.open(appliance) as wire:
            before, _ = tracemalloc.get_traced_memory()
            await wire.send(head + raw)
            await wire.read_until(b"data: ")
            await wire.read_until(b"data: ")
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < size / 2
