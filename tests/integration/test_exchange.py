"""Requests through the whole appliance: clients outside, the stand-in engine inside."""

from __future__ import annotations

import json
from pathlib import Path

import h11
import httpx2
import openai
import pytest
import trio

from tests.integration.appliance import (
    MODEL,
    QUESTION,
    RawConnection,
    RunningAppliance,
    start_appliance,
)

CHAT = "/v1/chat/completions"


def chat_body(prompt: str = "", **more: object) -> bytes:
    messages = [{"role": "user", "content": prompt}] if prompt else QUESTION
    return json.dumps({"model": MODEL, "messages": messages, **more}).encode()


async def test_an_answer_comes_whole_and_keeps_the_engines_bytes(
    appliance: RunningAppliance,
) -> None:
    response = await appliance.chat(temperature=0)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["id"].startswith("chatcmpl-")
    assert answer["usage"]["completion_tokens"] > 0


async def test_the_openai_package_streams_and_reads_usage(appliance: RunningAppliance) -> None:
    async with appliance.async_openai() as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in stream:
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert "Paris" in text
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_the_synchronous_openai_package_works_too(appliance: RunningAppliance) -> None:
    def ask() -> tuple[str, list[str]]:
        with appliance.openai() as client:
            models = [model.id for model in client.models.list()]
            answer = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=8)
            return answer.choices[0].text, models

    text, models = await trio.to_thread.run_sync(ask)
    assert text
    assert models == [MODEL]


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_streams_and_whole_answers_agree_on_both_protocols(
    appliance: RunningAppliance, *, http2: bool
) -> None:
    async with appliance.client(http1=not http2, http2=http2) as client:
        body = {"model": MODEL, "messages": QUESTION, "temperature": 1, "seed": 5}
        whole = await client.post(CHAT, json=body)
        streamed = await client.post(CHAT, json={**body, "stream": True})
    assert whole.http_version == streamed.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
    assert streamed.headers["content-type"] == "text/event-stream"
    assert streamed.headers["cache-control"] == "no-cache"
    assert "content-encoding" not in streamed.headers
    assert streamed.content.endswith(b"data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if "{" in line]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole.json()["choices"][0]["message"]["content"]


async def test_the_engine_gets_an_id_and_a_seed_and_no_key_of_the_gateways(
    appliance: RunningAppliance,
) -> None:
    response = await appliance.chat(
        user="somebody",
        store=False,
        metadata={"a": "b"},
        provider={"aci_verified": True},
        tee=False,
        n=None,
    )
    [seen] = await appliance.engine_seen()
    assert seen["rid"] == response.json()["id"]
    assert 0 <= seen["seed"] < 2**53
    assert not seen.keys() & {"user", "store", "metadata", "provider", "tee", "n"}


async def test_a_given_seed_reaches_the_engine_and_two_requests_get_two_random_ones(
    appliance: RunningAppliance,
) -> None:
    await appliance.chat(seed=0)
    await appliance.chat()
    await appliance.chat()
    seeds = [seen["seed"] for seen in await appliance.engine_seen()]
    assert seeds[0] == 0
    assert seeds[1] != seeds[2]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_n_choices_are_different_and_counted_by_index(
    appliance: RunningAppliance, *, stream: bool
) -> None:
    async with appliance.async_openai() as client:
        if stream:
            texts = ["", "", ""]
            usage = None
            async for chunk in await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Tell me something"}],
                temperature=1,
                seed=7,
                n=3,
                stream=True,
                stream_options={"include_usage": True},
            ):
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        else:
            answer = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Tell me something"}],
                temperature=1,
                seed=7,
                n=3,
            )
            assert [choice.index for choice in answer.choices] == [0, 1, 2]
            texts = [choice.message.content or "" for choice in answer.choices]
            usage = answer.usage
    assert len(set(texts)) == 3
    assert usage is not None
    seen = await appliance.engine_seen()
    assert sorted(body["seed"] for body in seen) == [7, 8, 9]
    assert len({body["rid"] for body in seen}) == 3
    assert all(body["n"] == 1 for body in seen)


async def test_a_list_of_prompts_is_answered_by_index(appliance: RunningAppliance) -> None:
    async with appliance.client() as client:
        response = await client.post(
            "/v1/completions",
            json={"model": MODEL, "prompt": ["one", "two"], "n": 2, "temperature": 1, "seed": 1},
        )
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    prompts = [seen["prompt"] for seen in await appliance.engine_seen()]
    assert sorted(prompts) == ["one", "one", "two", "two"]


async def test_events_pass_as_they_come_however_the_engine_cuts_them(
    appliance: RunningAppliance,
) -> None:
    def events(content: bytes) -> list[bytes]:
        return [event for event in content.split(b"\n\n") if b"content" in event]

    def text(content: bytes) -> str:
        deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in events(content)]
        return "".join(delta.get("content") or "" for delta in deltas)

    plain = await appliance.chat("Say something long", stream=True, seed=3, max_tokens=40)
    await appliance.engine_control({"set": {"split": "9"}})
    split = await appliance.chat("Say something long", stream=True, seed=3, max_tokens=40)
    assert text(plain.content) == text(split.content) != ""
    assert len(events(plain.content)) == len(events(split.content))
    assert split.content.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/~inference@1.0/models",
        "/~inference@1.0/v1/models",
        f"/v1/models/{MODEL}",
        "/health",
        "/health/ready",
        "/health/live",
        "/~inference@1.0/health",
        "/~inference@1.0/v1/health",
    ],
)
async def test_every_path_answers_under_each_prefix(appliance: RunningAppliance, path: str) -> None:
    async with appliance.client() as client:
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("prefix", ["/~inference@1.0", "/~inference@1.0/v1"])
async def test_the_original_interface_answers_as_the_openai_one(
    appliance: RunningAppliance, prefix: str
) -> None:
    async with appliance.client() as client:
        for path, body in (
            ("/chat/completions", {"messages": QUESTION}),
            ("/completions", {"prompt": "Once"}),
        ):
            response = await client.post(prefix + path, json={"model": MODEL, **body})
            assert response.status_code == 200, response.text


async def test_health_says_what_runs_and_what_our_evidence_is_worth(
    appliance: RunningAppliance,
) -> None:
    async with appliance.client() as client:
        health = (await client.get("/health")).json()
    assert health["status"] == "serving"
    assert health["stage"]["number"] == 10
    assert health["engine"]["ready"] is True
    attestation = health["attestation"]
    assert attestation["verdict"] == "warning"
    assert attestation["schemes"] == ["simulated", "simulated"]
    assert 0 <= attestation["age_s"] <= 60
    assert health["model"] == MODEL


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "malformed", None),
        (b"[]", 400, "malformed", None),
        (b'{"model": "stand-in", "model": "x"}', 400, "malformed", None),
        (b'{"model": NaN}', 400, "malformed", None),
        (b"[" * 100_000, 400, "malformed", None),
        (b'{"messages": [{"role": "user"}]}', 400, "invalid_request", "model"),
        (chat_body(rid="x"), 400, "unknown_parameter", "rid"),
        (chat_body(cache_salt="x"), 400, "unknown_parameter", "cache_salt"),
        (chat_body(temperature="hot"), 400, "invalid_request", "temperature"),
        (chat_body(seed=-1), 400, "invalid_seed", "seed"),
        (chat_body(n=17), 400, "invalid_request", "n"),
        (chat_body(tee="yes"), 400, "invalid_request", "tee"),
        (
            chat_body(stream_options={"include_checkpoints": True}),
            400,
            "invalid_request",
            "stream_options.include_checkpoints",
        ),
        (
            chat_body(provider={"aci_session_ids": ["s"]}),
            412,
            "session_not_accepted",
            "provider.aci_session_ids",
        ),
        (chat_body(provider={"aci_new": 1}), 400, "unknown_parameter", "provider.aci_new"),
        (chat_body().replace(b"stand-in", b"gpt-9"), 404, "model_not_found", "model"),
    ],
)
async def test_a_bad_request_is_refused_in_openais_shape(
    appliance: RunningAppliance, body: bytes, status: int, code: str, param: str | None
) -> None:
    async with appliance.client() as client:
        response = await client.post(CHAT, content=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert await appliance.engine_seen() == []


async def test_an_unknown_path_and_a_wrong_method_are_named(appliance: RunningAppliance) -> None:
    async with appliance.client() as client:
        assert (await client.get("/v2/none")).json()["error"]["code"] == "not_found"
        assert (await client.get(CHAT)).json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("http2", [False, True])
async def test_an_inference_path_is_written_in_one_way(
    appliance: RunningAppliance, http2: bool
) -> None:
    """One with percent-encoding was served, and its receipt named another than was received."""
    async with appliance.client(http2=http2) as client:
        response = await client.post("/v1/ch%61t/completions", content=chat_body())
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
        assert "x-receipt-id" not in response.headers
        assert (await client.post(f"{CHAT}?a=%61", content=chat_body())).status_code == 200
    assert len(await appliance.engine_seen()) == 1


async def test_a_compressed_body_is_refused(appliance: RunningAppliance) -> None:
    async with appliance.client() as client:
        response = await client.post(
            CHAT, content=chat_body(), headers={"Content-Encoding": "gzip"}
        )
    assert response.json()["error"]["code"] == "unsupported_feature"


async def test_streaming_over_http_1_0_is_refused(appliance: RunningAppliance) -> None:
    async with RawConnection.open(appliance) as connection:
        body = chat_body(stream=True)
        await connection.stream.send_all(
            b"POST %s HTTP/1.0\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s"
            % (CHAT.encode(), len(body), body)
        )
        connection.http = _sent_client()
        response = await connection.read_response()
        assert response.status == 400
        assert b"HTTP/1.1 or HTTP/2" in response.body


FAILS_EARLY = [
    ("http_500", 502, "engine_failed"),
    ("http_400", 400, "engine_refused"),
    ("garbage", 502, "engine_protocol_error"),
    ("endless_header", 502, "engine_protocol_error"),
]


@pytest.mark.parametrize(
    ("mode", "status", "code", "stream"),
    [
        *((*case, stream) for case in FAILS_EARLY for stream in (False, True)),
        ("half_chunk:0", 502, "engine_failed", False),  # a stream has its head by then; see below
    ],
)
async def test_an_engine_that_fails_before_its_answer_is_an_error_with_a_status(
    appliance: RunningAppliance, mode: str, status: int, code: str, *, stream: bool
) -> None:
    canary = "canary-7c1f"
    response = await appliance.chat(f"[[mode:{mode}]] {canary}", stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert canary not in response.text


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "mode",
    [
        "error_event:2",
        "reset_stream:2",
        "truncate_stream:2",
        "no_done",
        "half_chunk:2",
        "garbage_event:2",
    ],
)
async def test_a_stream_that_breaks_ends_with_an_error_event_and_uncleanly(
    appliance: RunningAppliance, mode: str, n: int
) -> None:
    async with RawConnection.open(appliance) as connection:
        await connection.post(
            CHAT, chat_body(f"[[mode:slow:20]][[mode:{mode}]] Go", stream=True, n=n, temperature=1)
        )
        response = await connection.read_response()
        assert b"[DONE]" not in response.body
        if mode == "garbage_event:2" and response.status == 502:
            return  # the garbage came with the first events: nothing had been said yet
        assert response.status == 200
        assert not response.clean
        last = json.loads(response.body.rstrip().rpartition(b"data: ")[2])
        assert last["error"]["code"] in {"engine_failed", "engine_protocol_error"}


async def test_over_http2_a_broken_stream_is_reset(appliance: RunningAppliance) -> None:
    async with appliance.client(http1=False, http2=True) as client:
        body = b""
        with pytest.raises(httpx2.RemoteProtocolError):
            async with client.stream(
                "POST", CHAT, content=chat_body("[[mode:error_event:2]] Go", stream=True)
            ) as response:
                async for data in response.aiter_bytes():
                    body += data
        assert b'"error"' in body
        assert b"[DONE]" not in body
        # The connection serves on.
        assert (await client.get("/health")).status_code == 200


async def test_the_openai_package_raises_on_a_broken_stream(appliance: RunningAppliance) -> None:
    async with appliance.async_openai() as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "[[mode:error_event:2]] Go"}],
            stream=True,
        )
        with pytest.raises(openai.APIError):
            async for _chunk in stream:
                pass


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_client_that_goes_away_aborts_the_generation_within_100_ms(
    appliance: RunningAppliance, *, stream: bool, n: int
) -> None:
    async with RawConnection.open(appliance) as connection:
        await connection.post(
            CHAT,
            chat_body("[[mode:slow:50]] Go on", stream=stream, n=n, max_tokens=1000, temperature=1),
        )
        if stream:
            assert await connection.read_some(1)
        with trio.fail_after(5):
            while await appliance.engine_counter("sglang:num_running_reqs") < n:
                await trio.sleep(0.01)
        before = await appliance.engine_counter("sglang:num_aborted_requests_total")
        connection.drop()
        gone = trio.current_time()
        with trio.fail_after(5):
            while await appliance.engine_counter("sglang:num_aborted_requests_total") < before + n:
                await trio.sleep(0.005)
        assert trio.current_time() - gone < 0.1 + 0.1  # the second tenth is this test's own polling
        assert await appliance.engine_counter("sglang:num_running_reqs") == 0


async def test_a_finished_answer_aborts_nothing(appliance: RunningAppliance) -> None:
    await appliance.chat()
    await appliance.chat(stream=True)
    await trio.sleep(0.1)
    assert await appliance.engine_counter("sglang:num_aborted_requests_total") == 0


async def test_tokenizing_needs_a_tokenizer_file(appliance: RunningAppliance) -> None:
    async with appliance.client() as client:
        response = await client.post("/v1/tokenize", json={"model": MODEL, "prompt": "hello"})
    assert response.json()["error"]["code"] == "unsupported_feature"


async def test_a_canary_prompt_is_in_no_log_error_or_file(appliance: RunningAppliance) -> None:
    canary = "CANARY-a94f-never-anywhere"
    for mode in ("log_prompt", "http_500", "http_400", "error_event:1", "crash_stream:1"):
        for stream in (False, True):
            try:
                response = await appliance.chat(f"[[mode:{mode}]] {canary}", stream=stream)
                text = response.text
            except httpx2.HTTPError as error:
                text = str(error)
            if mode != "log_prompt":
                assert canary not in text, mode
    await trio.sleep(0.1)
    assert canary not in appliance.log_stream.getvalue()
    for path in appliance.folder.rglob("*"):
        if path.is_file():
            assert canary.encode() not in path.read_bytes(), path


def _sent_client() -> h11.Connection:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    return connection


async def test_silence_is_filled_with_pings_before_and_between_events(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(nursery, tmp_path, sections={"limits": {"heartbeat_s": 0.1}})
    late = await appliance.chat("[[mode:first_token_delay:500]] Go", stream=True, max_tokens=3)
    slow = await appliance.chat("[[mode:slow:300]] Go", stream=True, max_tokens=3)
    for response in (late, slow):
        assert response.status_code == 200
        assert response.content.count(b": ping\n\n") >= 3
        assert response.content.endswith(b"data: [DONE]\n\n")


async def test_the_head_leaves_with_the_first_event_but_waits_no_longer_than_a_heartbeat(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(nursery, tmp_path, sections={"limits": {"heartbeat_s": 1.0}})
    for opening, first_part in (("", b"data: {"), ("[[mode:first_token_delay:60000]] ", b"")):
        async with RawConnection.open(appliance) as connection:
            await connection.post(CHAT, chat_body(opening + "Go", stream=True, max_tokens=3))
            record = await connection.stream.receive_some(1 << 16)
            head, _, rest = record.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert rest.partition(b"\r\n")[2].startswith(first_part)
            assert bool(rest) == bool(first_part)


async def test_an_engine_that_falls_silent_is_given_up_after_a_while(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(
        nursery,
        tmp_path,
        sections={"limits": {"heartbeat_s": 0.1, "engine_idle_s": 0.5, "generation_s": 1.0}},
    )
    async with RawConnection.open(appliance) as connection:
        await connection.post(CHAT, chat_body("[[mode:hang_stream:2]] Go", stream=True))
        response = await connection.read_response()
    assert not response.clean
    assert b"silent for too long" in response.body
    whole = await appliance.chat("[[mode:hang_stream:0]] Go")
    assert whole.status_code == 502


async def test_places_are_bounded_and_a_fan_out_takes_several(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    appliance = await start_appliance(
        nursery, tmp_path, sections={"limits": {"max_concurrent": 2, "max_wait_s": 0.3}}
    )
    async with RawConnection.open(appliance) as first:
        await first.post(CHAT, chat_body("[[mode:slow:50]] Go", stream=True, ignore_eos=True))
        await first.read_some(1)
        refused = await appliance.chat(n=2, temperature=1)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert (await appliance.chat()).status_code == 200
    with trio.fail_after(5):
        while (await appliance.chat(n=2, temperature=1)).status_code != 200:
            await trio.sleep(0.05)


async def test_an_error_event_behind_a_200_still_gets_a_status(
    appliance: RunningAppliance,
) -> None:
    response = await appliance.chat("[[mode:error_event:0]] Go", stream=True)
    assert response.status_code in {400, 502}
    assert response.json()["error"]["code"] in {"engine_refused", "engine_failed"}
