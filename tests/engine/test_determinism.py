"""What receipts claim, on the real SGLang: the same request and seed, another start, the same text.

docs/determinism.md has what else was measured, and how to measure it again.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
from serve import MODEL_ID

from appliance.verifier.bundle import Bundle, parse_bundle
from appliance.verifier.check import Rules, load_rules
from appliance.verifier.replay import Form, replay
from tests.engine.conftest import RealAppliance, require_engine, start_real_appliance, stop
from tests.integration.test_replay import CHAT, COMPLETION, saved

pytestmark = pytest.mark.engine

OTHERS = 7
PATIENCE_S = 300.0
SAMPLED: dict[str, Any] = {"model": MODEL_ID, "temperature": 1, "max_tokens": 32}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": (CHAT, {"messages": [{"role": "user", "content": "Tell me a story."}]}),
    "stream": (
        CHAT,
        {"messages": [{"role": "user", "content": "Tell me of the sea."}], "stream": True},
    ),
    "two choices of a longer prompt": (
        COMPLETION,
        {"prompt": "The river and the road and the sea. " * 40, "n": 2},
    ),
}


@asynccontextmanager
async def one_start(folder: Path) -> AsyncIterator[RealAppliance]:
    """An appliance for a while. It ends in order, or the test fails."""
    appliance = await trio.to_thread.run_sync(start_real_appliance, folder)
    try:
        yield appliance
    finally:
        with trio.CancelScope(shield=True):
            status = await trio.to_thread.run_sync(stop, appliance)
    assert status == 0, appliance.log()[-3000:]


@asynccontextmanager
async def company(appliance: RealAppliance) -> AsyncIterator[list[bool]]:
    """Seven other generations, each of its own length so far, that go on meanwhile.

    Yields whether each still runs.
    """
    runs = [False] * OTHERS
    async with (
        httpx2.AsyncClient(base_url=appliance.url, verify=appliance.trust, timeout=120) as client,
        trio.open_nursery() as nursery,
    ):

        async def keep_busy(number: int, started: trio.Event) -> None:
            body = SAMPLED | {
                "prompt": "Once upon a time there was a fox. " * (1 + 3 * number),
                "seed": number,
                "max_tokens": 1500,  # minutes of company; with room in the KV cache for us
                "ignore_eos": True,
                "stream": True,
            }
            async with client.stream("POST", COMPLETION, json=body) as response:
                assert response.status_code == 200
                async for _ in response.aiter_raw():
                    runs[number] = True
                    started.set()
            runs[number] = False

        events = [trio.Event() for _ in range(OTHERS)]
        for number, started in enumerate(events):
            nursery.start_soon(keep_busy, number, started)
        for started in events:
            await started.wait()
        yield runs
        nursery.cancel_scope.cancel()


async def reproduced(
    bundles: dict[str, Bundle], appliance: RealAppliance, rules: Rules, form: Form
) -> dict[str, str | None]:
    """The result of each replay, all at once."""
    results: dict[str, str | None] = {}

    async def one(name: str, bundle: Bundle) -> None:
        replayed = await replay(bundle, appliance.url, rules, form=form)
        results[name] = f"{replayed.result} {replayed.difference or ''}".strip()

    async with trio.open_nursery() as nursery:
        for name, bundle in bundles.items():
            nursery.start_soon(one, name, bundle)
    return results


def self_test_digest(appliance: RealAppliance) -> str:
    lines = map(json.loads, appliance.log().splitlines())
    [digest] = [line["output"] for line in lines if line["event"] == "deterministic"]
    return str(digest)


async def test_answers_are_reproduced_by_another_start_alone_and_among_seven_others(
    tmp_path: Path,
) -> None:
    require_engine()
    everything = dict.fromkeys(REQUESTS, "reproduced")
    bundles: dict[str, Bundle] = {}
    # 1. One start of the appliance, whose answers are kept.
    async with one_start(tmp_path / "first") as first:
        rules = load_rules(first.folder / "policy.toml", None)
        with trio.fail_after(PATIENCE_S):
            for name, (path, body) in REQUESTS.items():
                bundle = await saved(first.url, path, SAMPLED | body, read_s=PATIENCE_S)
                bundles[name] = parse_bundle(bundle.to_bytes())
        digest = self_test_digest(first)
    # 2. Another, with other keys and another engine process.
    async with one_start(tmp_path / "second") as second:
        assert self_test_digest(second) == digest
        with trio.fail_after(PATIENCE_S):
            # 3. One after the other, each in the form that it did not have.
            other_form: dict[str, Form] = {"whole": "stream", "stream": "whole"}
            for name, form in other_form.items():
                alone = await reproduced({name: bundles[name]}, second, rules, form)
                assert alone == {name: "reproduced"}
            # 4. In one batch with each other, and with seven others all the time.
            async with company(second) as others:
                among = await reproduced(bundles, second, rules, "recorded")
                assert all(others)
    assert among == everything
