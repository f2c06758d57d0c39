"""The golden self-test, asked of the stand-in engine over its real socket."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from appliance.boot import run_stage
from appliance.config import Limits
from appliance.engine.client import EngineAddress, fetch_status
from appliance.engine.process import choose_port
from appliance.errors import (
    EX_UNAVAILABLE,
    BootError,
    EngineError,
    EngineNotDeterministic,
    EngineProtocolError,
    EngineUnavailable,
)
from appliance.log import configure_log
from appliance.serving.lifecycle import Lifecycle
from appliance.serving.self_test import PROMPT, REQUEST_IDS, TOKENS, self_test, warm_up

SCRIPT = Path(__file__).parents[1] / "fakes" / "sglang_engine.py"
KEY = "a-key-of-this-start"
MODEL = "stand-in"
PATIENCE_S = 60.0


@asynccontextmanager
async def engine(
    folder: Path, *modes: str, deterministic: bool = True, is_embedding: bool = False
) -> AsyncIterator[EngineAddress]:
    """A stand-in that answers."""
    address = EngineAddress(choose_port(), KEY)
    settings = {
        "served-model-name": MODEL,
        "port": address.port,
        "api-key": KEY,
        "enable-deterministic-inference": deterministic,
        "is-embedding": is_embedding,
    }
    config = folder / "engine.yaml"
    config.write_text(json.dumps(settings))
    arguments = [part for mode in modes for part in ("--fake-mode", mode)]
    process = await trio.lowlevel.open_process(
        [sys.executable, str(SCRIPT), "--config", str(config), *arguments],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with trio.fail_after(PATIENCE_S):
            while True:
                try:
                    assert await fetch_status(address, "/ready") == 200
                except EngineUnavailable:
                    await trio.sleep(0.02)
                else:
                    break
            yield address
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def seen(address: EngineAddress) -> list[dict[str, Any]]:
    async with httpx2.AsyncClient() as client:
        bodies: list[dict[str, Any]] = (
            await client.get(f"http://127.0.0.1:{address.port}/_seen")
        ).json()
    return bodies


async def test_an_engine_that_is_deterministic_gives_one_digest_whenever_it_is_started(
    tmp_path: Path,
) -> None:
    digests = []
    for _ in range(2):
        async with engine(tmp_path) as address:
            digests.append(await self_test(address, Limits(), model=MODEL))
            asked = await seen(address)
    assert digests[0] == digests[1]
    assert len(digests[0]) == 32
    # Once streamed and once not, sampled, and else the same.
    streamed, whole = asked
    assert (streamed.pop("stream"), whole.pop("stream")) == (True, False)
    assert all(one.pop("rid").startswith(REQUEST_IDS) for one in (streamed, whole))
    assert streamed == whole
    assert streamed["temperature"] > 0
    assert streamed["max_tokens"] == TOKENS


@pytest.mark.parametrize("deterministic", [True, False], ids=["a fault", "a setting"])
async def test_an_engine_that_samples_otherwise_each_time_is_refused(
    tmp_path: Path, *, deterministic: bool
) -> None:
    modes = ["not_deterministic"] if deterministic else []
    async with engine(tmp_path, *modes, deterministic=deterministic) as address:
        with pytest.raises(EngineNotDeterministic) as refused:
            await self_test(address, Limits(), model=MODEL)
        # Where nothing is claimed, it may.
        await warm_up(address, Limits(), model=MODEL)
    message = refused.value.message
    assert message.count("sha256:") == 2
    assert "streamed" in message
    assert PROMPT not in message
    assert "deterministic = false" in refused.value.advice
    assert refused.value.exit_status == EX_UNAVAILABLE


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("http_400", EngineError),
        ("http_500", EngineError),
        ("error_event:2", EngineError),
        ("truncate_stream:2", EngineError),
        ("garbage", EngineProtocolError),
        ("garbage_event:2", EngineProtocolError),
        ("no_done", EngineError),
    ],
)
async def test_an_engine_that_does_not_answer_as_it_should_is_an_engine_error(
    tmp_path: Path, mode: str, expected: type[EngineError]
) -> None:
    async with engine(tmp_path, mode) as address:
        with pytest.raises(expected) as failed:
            await self_test(address, Limits(), model=MODEL)
        assert not isinstance(failed.value, EngineNotDeterministic)
        assert PROMPT not in failed.value.message


async def test_an_answer_of_another_length_is_no_answer_to_this(tmp_path: Path) -> None:
    # An aborted generation ends with the text so far and its own reason.
    async with engine(tmp_path, "slow:50") as address, trio.open_nursery() as nursery:

        async def abort() -> None:
            async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as client:
                while not await seen(address):
                    await trio.sleep(0.01)
                await client.post(
                    f"http://127.0.0.1:{address.port}/abort_request", json={"abort_all": True}
                )

        nursery.start_soon(abort)
        with pytest.raises(EngineProtocolError, match="one choice"):
            await self_test(address, Limits(), model=MODEL)


async def test_an_engine_that_hangs_fails_the_stage_in_time(tmp_path: Path) -> None:
    lifecycle = Lifecycle(wall_clock=lambda: 0.0, clock=trio.current_time)

    async with engine(tmp_path, "hang_stream:3") as address:

        async def step() -> bytes:
            return await self_test(address, Limits(), model=MODEL)

        with pytest.raises(BootError) as failed:
            await run_stage(
                8,
                "self-test",
                step,
                deadline_s=0.5,
                lifecycle=lifecycle,
                log=configure_log(format="json", level="error"),
            )
    assert failed.value.message.startswith("stage 8 (self-test): expected it to end within")


# ------------------------------------------------------------------------------------- embeddings


async def test_a_text_is_embedded_twice_as_numbers_and_as_base64(tmp_path: Path) -> None:
    digests = []
    for _ in range(2):
        async with engine(tmp_path, is_embedding=True) as address:
            digests.append(await self_test(address, Limits(), model=MODEL, task="embed"))
            asked = await seen(address)
    assert len(set(digests)) == 1
    assert [one["encoding_format"] for one in asked] == ["float", "base64"]
    assert {one["input"] for one in asked} == {PROMPT}
    assert all(one["rid"].startswith(REQUEST_IDS) for one in asked)


async def test_an_engine_that_embeds_one_text_in_two_ways_is_found_out(tmp_path: Path) -> None:
    async with engine(tmp_path, "not_deterministic", is_embedding=True) as address:
        with pytest.raises(EngineNotDeterministic, match="as numbers and sha256:"):
            await self_test(address, Limits(), model=MODEL, task="embed")


async def test_a_model_that_generates_does_not_embed_and_says_so(tmp_path: Path) -> None:
    async with engine(tmp_path) as address:
        for ask in (self_test, warm_up):
            with pytest.raises(EngineError):
                await ask(address, Limits(), model=MODEL, task="embed")


async def test_warming_up_embeds_one_text(tmp_path: Path) -> None:
    async with engine(tmp_path, is_embedding=True) as address:
        await warm_up(address, Limits(), model=MODEL, task="embed")
        assert [one["encoding_format"] for one in await seen(address)] == ["base64"]
