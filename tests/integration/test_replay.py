"""`dcv replay` between real appliances: an answer saved from one, asked of another again.

The engine is the stand-in, as an installed SGLang, because only of SGLang anything is claimed.
"""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from appliance.config import parse_config
from appliance.errors import EX_UNAVAILABLE, BootError, EngineNotDeterministic
from appliance.log import configure_log
from appliance.notify import Notifier
from appliance.run import run
from appliance.verifier.answers import Answered, collect_exchange
from appliance.verifier.bundle import Bundle
from appliance.verifier.check import fetch, load_rules
from appliance.verifier.replay import Form
from appliance.verifier.replay import replay as replay_here
from appliance.verifier.session import pinned_client
from tests.fakes.sglang_package import sglang_section
from tests.integration.appliance import (
    MODEL,
    QUESTION,
    RunningAppliance,
    Sections,
    config_text,
    start_appliance,
)
from tests.integration.test_verify_receipts import Done, dcv, policy

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SAMPLED: dict[str, Any] = {"model": MODEL, "temperature": 1, "max_tokens": 12}
STORY = [{"role": "user", "content": "Tell me a story."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Lyon"]}}},
    },
}


FORMS: tuple[Form, ...] = ("recorded", "stream", "whole")


async def start(
    nursery: trio.Nursery, folder: Path, *modes: str, **engine: object
) -> RunningAppliance:
    """An appliance whose receipts say that it is deterministic."""
    folder.mkdir(exist_ok=True)
    sections: Sections = {
        "engine": {**sglang_section(folder, *modes), "tool_call_parser": "pythonic", **engine}
    }
    return await start_appliance(nursery, folder, sections=sections)


async def saved(url: str, path: str, body: dict[str, Any], *, read_s: float = 30) -> Bundle:
    """An answer with everything that proves it, content included."""
    now = datetime.datetime.now(datetime.UTC)
    bundle = await fetch(url, secrets.token_bytes(32), now=now)
    assert bundle.spki_sha256 is not None
    request, nonce = json.dumps(body).encode(), secrets.token_bytes(32)
    async with pinned_client(bundle.url, (bundle.spki_sha256,), read_s=read_s) as client:
        response = await client.post(path, content=request, headers={"X-DCV-Nonce": nonce.hex()})
        assert response.status_code == 200, response.text
        answered = Answered(response.headers["x-receipt-id"], nonce, response.content)
        return await collect_exchange(client, bundle, answered, request)


async def replay(
    bundle: Bundle | Path, against: RunningAppliance | str, folder: Path, *more: str
) -> tuple[int, dict[str, Any]]:
    """The exit status and the JSON."""
    done = await replay_in_words(bundle, against, folder, "--json", *more)
    told: dict[str, Any] = json.loads(done.out)
    return done.status, told


async def replay_in_words(
    bundle: Bundle | Path, against: RunningAppliance | str, folder: Path, *more: str
) -> Done:
    path = bundle if isinstance(bundle, Path) else folder / "saved.json"
    if isinstance(bundle, Bundle):
        path.write_bytes(bundle.to_bytes())
    url = against if isinstance(against, str) else against.url
    arguments = ["--against", url, "--policy", str(policy(folder)), *more]
    return await dcv("replay", str(path), *arguments)


@asynccontextmanager
async def two(folder: Path, **engine: object) -> AsyncIterator[tuple[RunningAppliance, ...]]:
    """Two appliances; `engine` is what the second one's settings have besides."""
    async with trio.open_nursery() as life:
        first = await start(life, folder / "first")
        second = await start(life, folder / "second", **engine)
        yield first, second
        life.cancel_scope.cancel()


# ------------------------------------------------------------------------------------ reproduced


async def test_a_chat_is_reproduced_by_another_start_of_the_appliance(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.json"
    async with trio.open_nursery() as life:
        appliance = await start(life, tmp_path / "first")
        asked = ["--policy", str(policy(tmp_path)), "--save", str(bundle), "--with-content"]
        done = await dcv("chat", appliance.url, *asked, "Tell me a story.")
        assert done.status == 3, done.err
        life.cancel_scope.cancel()
    async with trio.open_nursery() as life:
        appliance = await start(life, tmp_path / "second")
        words = await replay_in_words(bundle, appliance, tmp_path)
        status, told = await replay(bundle, appliance, tmp_path)
        [first, _] = await appliance.engine_seen()
        life.cancel_scope.cancel()
    assert (status, words.status) == (3, 3)  # reproduced, on simulated hardware
    assert words.out.startswith("REPRODUCED  both answers say the same")
    assert "Tell me" not in words.out
    assert told["result"] == "reproduced"
    assert told["error"] is told["difference"] is None
    assert told["original"]["output_digest"] == told["replay"]["output_digest"]
    assert told["original"]["receipt_id"] != told["replay"]["receipt_id"]
    assert told["original"]["url"] != told["replay"]["url"]
    # Nobody chose a seed: it is the one that the gateway drew, and the receipt recorded.
    assert str(first["seed"]) == told["seed"]


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sampled": (CHAT, {"messages": STORY}),
    "with a seed": (CHAT, {"messages": STORY, "seed": 7}),
    "streamed, with usage": (
        CHAT,
        {"messages": STORY, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "three choices": (CHAT, {"messages": STORY, "n": 3}),
    "three choices, streamed": (CHAT, {"messages": STORY, "n": 3, "stream": True}),
    "the largest seed, two choices": (CHAT, {"messages": STORY, "n": 2, "seed": 2**53 - 1}),
    "log probabilities": (CHAT, {"messages": STORY, "logprobs": True, "top_logprobs": 2}),
    "a tool": (CHAT, {"messages": QUESTION, "tools": [TOOL], "tool_choice": "required"}),
    "two prompts, twice each": (COMPLETION, {"prompt": ["One", "Two"], "n": 2}),
    "by an alias": ("/~inference@1.0/completions", {"prompt": "Once", "user": "me"}),
}


async def test_every_kind_of_request_is_reproduced_streamed_and_whole(tmp_path: Path) -> None:
    rules = load_rules(policy(tmp_path), None)
    digests = set()
    async with two(tmp_path) as (first, second):
        for name, (path, body) in REQUESTS.items():
            bundle = await saved(first.url, path, SAMPLED | body)
            for form in FORMS:
                replayed = await replay_here(bundle, second.url, rules, form=form)
                assert (replayed.result, replayed.exit_status) == ("reproduced", 3), (name, form)
                streams = form == "stream" or (form == "recorded" and "stream" in body)
                assert bool((await second.engine_seen())[-1].get("stream")) == streams
            assert replayed.again is not None
            digests.add(replayed.again.output_digest)
    # Each was about something: no two requests have one answer.
    assert len(digests) == len(REQUESTS)


async def test_the_new_answer_can_be_kept_and_replayed_in_turn(tmp_path: Path) -> None:
    async with two(tmp_path) as (first, second):
        bundle = await saved(first.url, CHAT, SAMPLED | {"messages": STORY})
        kept = tmp_path / "kept.json"
        status, told = await replay(bundle, second, tmp_path, "--save", str(kept))
        assert status == 3
        status, again = await replay(kept, first, tmp_path)
    assert status == 3
    assert again["original"]["receipt_id"] == told["replay"]["receipt_id"]
    assert again["seed"] == told["seed"]


# --------------------------------------------------------------------------------------- differs


async def test_an_appliance_that_answers_otherwise_is_found_out_at_a_character(
    tmp_path: Path,
) -> None:
    async with two(tmp_path) as (first, second):
        bundle = await saved(first.url, CHAT, SAMPLED | {"messages": STORY, "n": 2})
        await second.engine_control({"set": {"not_deterministic": None}})
        status, told = await replay(bundle, second, tmp_path)
        words = await replay_in_words(bundle, second, tmp_path)
        assert bundle.exchange is not None
        assert bundle.exchange.request is not None
        # Without its content a bundle needs the request from elsewhere, and can tell less.
        (tmp_path / "request.json").write_bytes(bundle.exchange.request)
        bare = replace(bundle, exchange=replace(bundle.exchange, request=None, response=None))
        less = await replay(bare, second, tmp_path, "--request", str(tmp_path / "request.json"))
        (tmp_path / "other.json").write_bytes(bundle.exchange.request + b" ")
        wrong = await replay(bare, second, tmp_path, "--request", str(tmp_path / "other.json"))
        missing = await replay(bare, second, tmp_path)
    assert (status, told["result"]) == (1, "differs")
    assert told["difference"]["choice"] == 0
    assert told["difference"]["member"] == "message.content"
    assert told["difference"]["character"] >= 1
    assert told["original"]["output_digest"] != told["replay"]["output_digest"]
    assert words.status == 1
    assert words.out.startswith("DIFFERS  at character ")
    assert "of choice 0" in words.out
    assert (less[0], less[1]["result"], less[1]["difference"]) == (1, "differs", None)
    for status, told in (wrong, missing):
        assert (status, told["result"], told["error"]["code"]) == (2, None, "could_not_verify")
        assert "--request" in told["error"]["message"]


# -------------------------------------------------------------------------------- not comparable


async def test_other_settings_are_named_and_nothing_is_asked(tmp_path: Path) -> None:
    async with two(tmp_path, extra_args=["max-prefill-tokens=8192"]) as (first, second):
        bundle = await saved(first.url, CHAT, SAMPLED | {"messages": STORY})
        status, told = await replay(bundle, second, tmp_path)
        assert await second.engine_seen() == []
    assert (status, told["result"]) == (2, "not_comparable")
    assert told["error"]["code"] == "not_comparable"
    assert told["error"]["message"].startswith("engine.settings_digest: expected sha256:")


async def test_an_answer_of_which_nothing_is_claimed_is_not_comparable(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    # Neither with the setting off, nor of a program that is not SGLang.
    (tmp_path / "off").mkdir()
    (tmp_path / "other").mkdir()
    off = await start(nursery, tmp_path / "off", deterministic=False)
    other = await start_appliance(nursery, tmp_path / "other")
    for appliance in (off, other):
        bundle = await saved(appliance.url, CHAT, SAMPLED | {"messages": STORY})
        words = await replay_in_words(bundle, appliance, tmp_path)
        assert words.status == 2
        assert words.out.startswith("NOT COMPARABLE  dcv.engine.deterministic: expected true")


async def test_nothing_is_asked_of_whom_or_about_what_the_policy_refuses(tmp_path: Path) -> None:
    async with two(tmp_path) as (first, second):
        bundle = await saved(first.url, CHAT, SAMPLED | {"messages": STORY})
        assert bundle.exchange is not None
        altered = replace(bundle.exchange, response=b"{}")
        status, told = await replay(replace(bundle, exchange=altered), second, tmp_path)
        assert (status, told["result"]) == (2, "not_comparable")
        assert "the bundle is contraindicated: response.returned" in told["error"]["message"]
        # The strict policy: simulated hardware is neither of them.
        (tmp_path / "saved.json").write_bytes(bundle.to_bytes())
        arguments = ["--against", second.url, "--json"]
        strict = await dcv("replay", str(tmp_path / "saved.json"), *arguments)
        assert strict.status == 2
        assert json.loads(strict.out)["result"] == "not_comparable"
        # A bundle of an appliance alone has no answer in it.
        status, told = await replay(replace(bundle, exchange=None), second, tmp_path)
        assert (status, told["result"]) == (2, None)
        assert await second.engine_seen() == []
    # Nobody answers there any more.
    status, told = await replay(bundle, second, tmp_path)
    assert (status, told["result"], told["error"]["code"]) == (2, None, "could_not_verify")


async def test_an_answer_that_breaks_off_again_is_no_replay(tmp_path: Path) -> None:
    async with two(tmp_path) as (first, second):
        bundle = await saved(first.url, CHAT, SAMPLED | {"messages": STORY, "stream": True})
        await second.engine_control({"set": {"error_event": None}})
        for form in ("stream", "whole"):
            status, told = await replay(bundle, second, tmp_path, "--as", form)
            assert (status, told["result"]) == (2, None), told
            assert "engine_failed" in told["error"]["message"]
        broken = tmp_path / "broken.json"
        asked = ["--policy", str(policy(tmp_path)), "--save", str(broken), "--with-content"]
        assert (await dcv("chat", second.url, *asked, "Hello")).status == 3
        status, told = await replay(broken, first, tmp_path)
    assert (status, told["result"]) == (2, "not_comparable")
    assert "dcv.ended.outcome: expected complete" in told["error"]["message"]


# ------------------------------------------------------------------------------ the boot's part


async def test_an_appliance_whose_engine_is_not_deterministic_does_not_serve(
    tmp_path: Path,
) -> None:
    sections: Sections = {"engine": sglang_section(tmp_path, "not_deterministic")}
    config = parse_config(config_text(tmp_path, sections=sections), folder=tmp_path)
    with trio.fail_after(60):
        ended = await run(
            config, log=configure_log(format="json", level="error"), notifier=Notifier()
        )
    assert isinstance(ended, BootError)
    assert (ended.stage, ended.exit_status) == (8, EX_UNAVAILABLE)
    assert isinstance(ended.cause, EngineNotDeterministic)


async def test_equal_appliances_log_one_digest_of_the_self_test(tmp_path: Path) -> None:
    async with two(tmp_path) as both:
        lines = [[one for one in a.log_lines if one["event"] == "deterministic"] for a in both]
    assert [len(one) for one in lines] == [1, 1]
    assert lines[0][0]["output"] == lines[1][0]["output"]
