"""`POST /v1/embeddings`: the gate and the receipt of every route, where the model embeds."""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from appliance.errors import EvidenceError, VerificationIncomplete
from appliance.rats.result import Tier
from appliance.serving.receipt_database import FILE
from appliance.serving.self_test import PROMPT
from appliance.verifier.check import load_rules
from appliance.verifier.verify_command import outcome_of, source_of, time_of
from appliance.wire.openai import MAX_INPUT_TOKENS, MAX_INPUTS, PREFIXES
from appliance.wire.receipt import EventLog, forwarded_bytes, parse_receipt, read_events
from tests.fakes.sglang_dialect import HIDDEN_SIZE
from tests.integration.appliance import (
    MODEL,
    RawConnection,
    RunningAppliance,
    Sections,
    start_appliance,
)
from tests.integration.front import Answer, front, steal_tls_key
from tests.integration.proxies import proxy
from tests.integration.test_exchange_receipts import checked
from tests.integration.test_replay import replay, saved
from tests.integration.test_transport import Seen, in_thread, verified, verified_async
from tests.integration.test_verify_receipts import policy

PATH = "/v1/embeddings"
TEXTS = ["The cat is called Tom.", "Where is the dog?"]
EMBEDS: Sections = {"model": {"task": "embed"}}
PATIENCE_S = 60.0


@pytest.fixture
async def embedding(nursery: trio.Nursery, tmp_path: Path) -> RunningAppliance:
    return await start_appliance(nursery, tmp_path, sections=EMBEDS)


def body(given: Any = TEXTS, **more: Any) -> bytes:
    return json.dumps({"model": MODEL, "input": given, **more}).encode()


async def post(appliance: RunningAppliance, data: bytes, path: str = PATH) -> Any:
    async with appliance.client() as client:
        return await client.post(path, content=data)


async def log_of(appliance: RunningAppliance, receipt_id: str) -> EventLog:
    with trio.fail_after(PATIENCE_S):
        while True:
            async with appliance.client() as client:
                response = await client.get(f"/v1/aci/receipts/{receipt_id}")
            if response.status_code == 200:
                return read_events(parse_receipt(response.content))
            await trio.sleep(0.02)


def newest_receipt(appliance: RunningAppliance) -> str:
    """Of an exchange that may still run: its answer has no id of which the client would know."""
    [path] = appliance.folder.rglob(FILE)
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        [row] = database.execute("SELECT receipt_id FROM receipt ORDER BY id DESC LIMIT 1")
    return str(row[0])


# ------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("given", "count"),
    [("one text", 1), (["one"], 1), (TEXTS, 2), ([7, 8, 9], 1), ([[7, 8], [9]], 2)],
)
async def test_each_input_has_an_embedding_under_the_models_public_name(
    embedding: RunningAppliance, given: Any, count: int
) -> None:
    response = await post(embedding, body(given))
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer.keys() == {"object", "data", "model", "usage"}
    assert (answer["object"], answer["model"]) == ("list", MODEL)
    assert [one["index"] for one in answer["data"]] == list(range(count))
    assert {one["object"] for one in answer["data"]} == {"embedding"}
    assert {len(one["embedding"]) for one in answer["data"]} == {HIDDEN_SIZE}
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0
    assert str(embedding.folder) not in response.text


async def test_numbers_and_base64_say_the_same(embedding: RunningAppliance) -> None:
    numbers = (await post(embedding, body(encoding_format="float"))).json()["data"]
    texts = (await post(embedding, body(encoding_format="base64"))).json()["data"]
    for one, other in zip(numbers, texts, strict=True):
        raw = base64.b64decode(other["embedding"])
        assert list(struct.unpack(f"<{HIDDEN_SIZE}f", raw)) == one["embedding"]


async def test_the_openai_package_asks_and_reads(embedding: RunningAppliance) -> None:
    def ask() -> list[list[float]]:
        with embedding.openai() as client:
            default = client.embeddings.create(model=MODEL, input=TEXTS)
            floats = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
        assert [one.embedding for one in default.data] == [one.embedding for one in floats.data]
        assert default.usage == floats.usage
        return [one.embedding for one in default.data]

    vectors = await in_thread(ask)
    async with embedding.async_openai() as client:
        answer = await client.embeddings.create(model=MODEL, input=TEXTS)
    assert [one.embedding for one in answer.data] == vectors
    forms = [one.get("encoding_format") for one in await embedding.engine_seen()]
    assert forms == ["base64", "float", "base64"]  # the package's default is base64


async def test_every_alias_answers_the_same(embedding: RunningAppliance) -> None:
    answers = {(await post(embedding, body(), f"{one}/embeddings")).content for one in PREFIXES}
    assert len(answers) == 1


async def test_dimensions_are_for_models_that_have_them(
    nursery: trio.Nursery, tmp_path: Path, embedding: RunningAppliance
) -> None:
    refused = await post(embedding, body(dimensions=4))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "engine_refused")
    assert str(embedding.folder) not in refused.text
    (tmp_path / "other").mkdir()
    option = 'json-model-override-args={"is_matryoshka": true}'
    able = await start_appliance(
        nursery, tmp_path / "other", sections={**EMBEDS, "engine": {"extra_args": [option]}}
    )
    answer = (await post(able, body(dimensions=4))).json()
    assert [len(one["embedding"]) for one in answer["data"]] == [4, 4]


# ---------------------------------------------------------------------------------- gate and receipt


async def test_the_receipt_says_what_was_asked_forwarded_and_answered(
    embedding: RunningAppliance,
) -> None:
    request = body(user="me", tee=False, provider={"order": []}, dimensions=None)
    response = await post(embedding, request)
    log = await checked(embedding, response.headers["x-receipt-id"], request, response.content)
    assert log.admission is not None
    assert log.engine is not None
    assert log.output is not None
    assert (log.ended.outcome, log.ended.code) == ("complete", None)
    assert log.output.output_digest is None  # protocol.md section 5: "null for embeddings"
    assert log.output.finish_reasons == ()
    assert log.output.usage == response.json()["usage"]
    [rewrite] = log.engine.rewrite
    assert (dict(rewrite.set), rewrite.prompt_index, log.engine.seed) == ({}, None, 0)
    assert rewrite.unset == ("dimensions", "provider", "tee", "user")
    [seen] = await embedding.engine_seen()
    assert seen == json.loads(forwarded_bytes(request, rewrite)) == {"model": MODEL, "input": TEXTS}


async def test_an_answer_that_ends_with_gpu_evidence_verifies(
    embedding: RunningAppliance, tmp_path: Path
) -> None:
    seen = Seen()
    with verified(embedding.url, tmp_path, seen) as client:
        answer = await in_thread(
            lambda: client.embeddings.create(model=MODEL, input=TEXTS, extra_body={"tee": True})
        )
    assert answer.model_extra is not None
    assert answer.model_extra["dcv"]["completion"]["phase"] == "completion"
    assert answer.model_extra["resolved_model"]["id"] == MODEL
    assert [one["outcome"] for one in seen.receipts] == ["complete"]


async def test_the_boot_embeds_a_text_before_anybody_may_ask(embedding: RunningAppliance) -> None:
    asked = (await embedding.engine_get("/_seen")).json()
    assert {one["input"] for one in asked} == {PROMPT}
    assert [one["rid"] for one in asked] == ["self-test-base64"]  # a stand-in promises nothing


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changed", "param", "code"),
    [
        ({"input": None}, "input", "invalid_request"),
        ({"input": ""}, "input", "invalid_request"),
        ({"input": " \n\t"}, "input", "invalid_request"),
        ({"input": []}, "input", "invalid_request"),
        ({"input": ["a", ""]}, "input", "invalid_request"),
        ({"input": ["a", "  "]}, "input", "invalid_request"),
        ({"input": ["a", 1]}, "input", "invalid_request"),
        ({"input": [1, [1]]}, "input", "invalid_request"),
        ({"input": [[]]}, "input", "invalid_request"),
        ({"input": [-1]}, "input", "invalid_request"),
        ({"input": [1.5]}, "input", "invalid_request"),
        ({"input": [True]}, "input", "invalid_request"),
        ({"input": {"text": "a"}}, "input", "invalid_request"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input", "invalid_request"),
        ({"input": [1] * (MAX_INPUT_TOKENS + 1)}, "input", "invalid_request"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_request"),
        ({"encoding_format": 1}, "encoding_format", "invalid_request"),
        ({"dimensions": 0}, "dimensions", "invalid_request"),
        ({"dimensions": 1.5}, "dimensions", "invalid_request"),
        ({"user": 7}, "user", "invalid_request"),
        ({"tee": "yes"}, "tee", "invalid_request"),
        ({"provider": {"aci_other": 1}}, "provider.aci_other", "unknown_parameter"),
        ({"stream": True}, "stream", "unknown_parameter"),
        ({"seed": 1}, "seed", "unknown_parameter"),
        ({"rid": "x"}, "rid", "unknown_parameter"),
        ({"embed_overrides": [[[1.0]]]}, "embed_overrides", "unknown_parameter"),
        ({"lora_path": "x"}, "lora_path", "unknown_parameter"),
    ],
)
async def test_what_is_no_request_is_refused_and_named(
    embedding: RunningAppliance, changed: dict[str, Any], param: str, code: str
) -> None:
    response = await post(embedding, body(**{"input": TEXTS, **changed}))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, code), error
    assert error["param"].startswith(param)
    assert (await log_of(embedding, response.headers["x-receipt-id"])).ended.outcome == "refused"
    assert await embedding.engine_seen() == []


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"stand-in","input":[NaN]}',
        b'{"model":"stand-in","input":"a","input":"b"}',
        b'{"model":"stand-in","input":"\\ud800"}',
        b'{"model":"stand-in","input":[9007199254740993]}',
        b'{"model":"stand-in","input":' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"model":"stand-in"}',
        b'{"input":"a"}',
        b'["input"]',
        b"",
    ],
)
async def test_what_is_no_json_of_ours_is_refused(embedding: RunningAppliance, raw: bytes) -> None:
    response = await post(embedding, raw)
    assert response.status_code == 400, response.text
    assert await embedding.engine_seen() == []


async def test_an_unknown_model_is_not_found(embedding: RunningAppliance) -> None:
    response = await post(embedding, body(model="another"))
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_model_that_embeds_generates_nothing(
    embedding: RunningAppliance, path: str
) -> None:
    question = {"messages": [{"role": "user", "content": "Hello"}], "prompt": "Hello"}
    key = "messages" if "chat" in path else "prompt"
    request = json.dumps({"model": MODEL, key: question[key]}).encode()
    response = await post(embedding, request, path)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unsupported_feature")
    assert error["param"] == "model"
    assert PATH in error["message"]
    assert await embedding.engine_seen() == []


async def test_a_model_that_generates_embeds_nothing(appliance: RunningAppliance) -> None:
    response = await post(appliance, body())
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unsupported_feature")
    assert error["param"] == "model"
    assert (await log_of(appliance, response.headers["x-receipt-id"])).ended.outcome == "refused"
    assert await appliance.engine_seen() == []


@pytest.mark.parametrize(
    ("path", "key", "given"),
    [
        (PATH, "input", [100]),
        (PATH, "input", [[1], [1, 100]]),
        ("/v1/completions", "prompt", [100]),
        ("/v1/completions", "prompt", [[1], [100]]),
        ("/v1/completions", "stop_token_ids", [1, 100]),
    ],
)
async def test_a_token_that_the_model_has_not_never_reaches_the_engine(
    nursery: trio.Nursery, tmp_path: Path, path: str, key: str, given: list[Any]
) -> None:
    """The real engine dies of it."""
    config = b'{"vocab_size": 100, "rope": Infinity}'
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(config)
    sections: Sections = {
        "model": {"task": "embed" if key == "input" else "generate"},
        "model.files": {"config.json": hashlib.sha256(config).hexdigest()},
    }
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    asked: dict[str, Any] = {"model": MODEL, key: given}
    if key == "stop_token_ids":
        asked |= {"prompt": "x", "min_tokens": 5}  # what the real engine forbids until then
    response = await post(appliance, json.dumps(asked).encode(), path)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, key)
    assert error["message"] == f"{key}: expected token ids below 100"
    assert await appliance.engine_seen() == []


async def test_a_model_that_does_not_say_how_many_tokens_it_has_is_given_none(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(b"{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    sections: Sections = {"model.files": {"config.json": digest}}
    appliance = await start_appliance(nursery, tmp_path, sections=sections)
    request = json.dumps({"model": MODEL, "prompt": [1]}).encode()
    response = await post(appliance, request, "/v1/completions")
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unsupported_feature")
    assert error["message"] == "prompt: this model takes no token ids, only text"
    assert await appliance.engine_seen() == []


# ----------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("mode", "status"),
    [("http_500", 502), ("garbage", 502), ("truncate_stream", 502), ("reset_stream", 502)],
)
async def test_an_engine_that_fails_is_in_the_receipt(
    embedding: RunningAppliance, mode: str, status: int
) -> None:
    request = body(f"[[mode:{mode}]] secret words")
    response = await post(embedding, request)
    assert response.status_code == status, response.text
    assert "secret" not in response.text
    log = await checked(embedding, response.headers["x-receipt-id"], request, response.content)
    assert (log.ended.outcome, log.output) == ("engine_failed", None)
    assert log.ended.code == response.json()["error"]["code"]


async def test_a_client_that_leaves_is_in_the_receipt(embedding: RunningAppliance) -> None:
    async with RawConnection.open(embedding) as connection:
        await connection.post(PATH, body("[[mode:slow:60000]] secret words"))
        with trio.fail_after(PATIENCE_S):
            while not await embedding.engine_seen():
                await trio.sleep(0.02)
        connection.drop()
    log = await log_of(embedding, newest_receipt(embedding))
    assert (log.ended.outcome, log.ended.code, log.output) == ("client_disconnected", None, None)
    with trio.fail_after(PATIENCE_S):
        while (await embedding.engine_get("/_state")).json()["running"]:
            await trio.sleep(0.02)


# ------------------------------------------------------------------------------------- who relies on it


async def test_the_verified_transport_hands_on_embeddings_that_are_proven(
    embedding: RunningAppliance, tmp_path: Path
) -> None:
    seen = Seen()
    with verified(embedding.url, tmp_path, seen) as client:
        first = await in_thread(lambda: client.embeddings.create(model=MODEL, input=TEXTS))
    async with verified_async(embedding.url, tmp_path, seen) as others:
        second = await others.embeddings.create(model=MODEL, input=TEXTS)
    assert [one.embedding for one in first.data] == [one.embedding for one in second.data]
    assert [one["outcome"] for one in seen.receipts] == ["complete", "complete"]


async def test_the_proxy_hands_on_embeddings_that_are_proven(
    embedding: RunningAppliance, tmp_path: Path
) -> None:
    async with proxy(embedding.url, tmp_path, "--unsafe-accept-warning") as it:
        async with it.openai() as client:
            answer = await client.embeddings.create(model=MODEL, input=TEXTS)
        [said] = await it.said("answer_verified")
    assert len(answer.data[0].embedding) == HIDDEN_SIZE
    assert said["outcome"] == "complete"


def another_float(answer: Answer) -> Answer:
    told = json.loads(answer.body)
    raw = bytearray(base64.b64decode(told["data"][1]["embedding"]))
    raw[0] ^= 1  # one bit of one number
    told["data"][1]["embedding"] = base64.b64encode(raw).decode()
    return answer.saying(json.dumps(told, separators=(",", ":")).encode())


def swapped(answer: Answer) -> Answer:
    told = json.loads(answer.body)
    one, other = told["data"]
    one["embedding"], other["embedding"] = other["embedding"], one["embedding"]
    return answer.saying(json.dumps(told, separators=(",", ":")).encode())


def without_receipt(answer: Answer) -> Answer:
    headers = {name: value for name, value in answer.headers.items() if name != "x-receipt-id"}
    return Answer(answer.status, headers, answer.body)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (another_float, EvidenceError),
        (swapped, EvidenceError),
        (without_receipt, VerificationIncomplete),
    ],
)
async def test_whoever_changes_a_number_is_found_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Answer], Answer],
    error: type[Exception],
) -> None:
    stolen = steal_tls_key(monkeypatch)

    def lie(path: str, answer: Answer) -> Answer:
        return change(answer) if path.startswith(PATH) else answer

    def ask(url: str) -> None:
        with verified(url, tmp_path, max_retries=0) as client, pytest.raises(error):
            client.embeddings.create(model=MODEL, input=TEXTS)

    async with trio.open_nursery() as nursery:
        appliance = await start_appliance(nursery, tmp_path, sections=EMBEDS)
        async with front(appliance, stolen[0]) as it:
            it.lie = lie
            await in_thread(partial(ask, it.url))
        nursery.cancel_scope.cancel()


async def test_a_bundle_verifies_again_offline_and_its_replay_is_not_comparable(
    embedding: RunningAppliance, tmp_path: Path
) -> None:
    bundle = await saved(embedding.url, PATH, {"model": MODEL, "input": TEXTS})
    outcome = outcome_of(
        bundle, load_rules(policy(tmp_path), None), at=time_of(bundle), source=source_of(bundle)
    )
    assert outcome.verdict is Tier.WARNING
    status, told = await replay(bundle, embedding, tmp_path)
    assert (status, told["result"]) == (2, "not_comparable")
    assert "embeddings have none" in told["error"]["message"]
    assert len(await embedding.engine_seen()) == 1  # nobody was asked again
