"""Somebody in between whose certificate the client's trust store accepts: he fools an ordinary
client, and no verified one sends him a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import httpx2
import pytest
import trio
from openai import AsyncOpenAI, InternalServerError

from appliance.errors import Unbound
from tests.integration.appliance import RunningAppliance
from tests.integration.proxies import proxy
from tests.integration.test_transport import (
    QUESTION,
    asked,
    asked_async,
    in_thread,
    streamed,
    streamed_async,
    verified,
    verified_async,
)
from tests.integration.test_verify_receipts import Between, between, chat

PROMPT = QUESTION[0]["content"]

Attempt: TypeAlias = Callable[[str, Path], Awaitable[None]]


async def thread(url: str, folder: Path) -> None:
    with verified(url, folder) as client:
        for call in (asked, streamed):
            with pytest.raises(Unbound, match="somebody stands between"):
                await in_thread(partial(call, client))


async def trio_task(url: str, folder: Path) -> None:
    async with verified_async(url, folder) as client:
        for call in (asked_async, streamed_async):
            with trio.fail_after(60), pytest.raises(Unbound, match="somebody stands between"):
                await call(client)


async def asyncio_task(url: str, folder: Path) -> None:
    async def converse() -> None:
        async with verified_async(url, folder) as client:
            with pytest.raises(Unbound, match="somebody stands between"):
                await asked_async(client)

    await in_thread(lambda: asyncio.run(converse()))


async def dcv_chat(url: str, folder: Path) -> None:
    done = await chat(url, folder, PROMPT)
    assert (done.status, done.out) == (1, "")
    assert "somebody stands between" in done.err


async def dcv_proxy(url: str, folder: Path) -> None:
    async with proxy(url, folder, "--unsafe-accept-warning") as it, it.openai() as client:
        for call in (asked_async, streamed_async):
            with pytest.raises(InternalServerError, match="somebody stands between"):
                await call(client)


ATTEMPTS = [thread, trio_task, asyncio_task, dcv_chat, dcv_proxy]


async def fooled(he: Between) -> str:
    http = httpx2.AsyncClient(verify=he.trust, timeout=60)
    async with AsyncOpenAI(base_url=f"{he.url}/v1", api_key="unused", http_client=http) as client:
        return await asked_async(client)


@pytest.mark.parametrize("attempt", ATTEMPTS)
async def test_he_reads_an_ordinary_clients_prompt_and_no_verified_ones(
    appliance: RunningAppliance, tmp_path: Path, attempt: Attempt
) -> None:
    async with between(appliance, lambda _: True) as he:
        assert await fooled(he)
        assert PROMPT.encode() in he.read
        he.read.clear()
        before = len(await appliance.engine_seen())
        await attempt(he.url, tmp_path)
    assert b"GET /v1/aci/attestation" in he.read
    assert PROMPT.encode() not in he.read
    assert b"POST" not in he.read
    assert len(await appliance.engine_seen()) == before


@pytest.mark.parametrize("attempt", ATTEMPTS)
async def test_he_who_lets_the_report_pass_is_not_sent_a_request_line(
    appliance: RunningAppliance, tmp_path: Path, attempt: Attempt
) -> None:
    async with between(appliance, lambda number: number > 0) as he:
        await attempt(he.url, tmp_path)
    assert b"POST" not in he.read
    assert PROMPT.encode() not in he.read
    assert await appliance.engine_seen() == []


async def test_he_who_steps_in_between_two_questions_gets_neither(
    appliance: RunningAppliance, tmp_path: Path
) -> None:
    steps_in = [False]
    async with between(appliance, lambda _: steps_in[0]) as he:
        with verified(he.url, tmp_path) as client:
            assert await in_thread(lambda: asked(client))
            steps_in[0] = True
            he.drop()
            with pytest.raises(Unbound, match="somebody stands between"):
                await in_thread(lambda: asked(client))
            # And once he has gone, everything is as it was.
            steps_in[0] = False
            assert await in_thread(lambda: asked(client))
        async with verified_async(he.url, tmp_path) as patient:
            assert await asked_async(patient)
            steps_in[0] = True
            he.drop()
            with trio.fail_after(60), pytest.raises(Unbound, match="somebody stands between"):
                await asked_async(patient)
    assert b"POST" not in he.read
    assert len(await appliance.engine_seen()) == 3
