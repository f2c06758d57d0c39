"""End to end on the real SGLang: what OpenAI's clients do, and what becomes of them."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import trio
from openai.types.chat import ChatCompletionMessageParam
from serve import MODEL_ID

from appliance.engine.confine import landlock_abi
from appliance.verifier.answers import Answered, collect_exchange
from appliance.verifier.check import fetch
from appliance.verifier.session import pinned_client
from tests.engine.conftest import RealAppliance

pytestmark = pytest.mark.engine

QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "What is the capital of France?"}
]
STORY: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a story."}]
EXIT_WARNING = 3
"""Of `dcv verify` and `dcv replay`: simulated hardware is never more."""

CANARY = "xylograph-quixotry-7781"


def test_a_whole_answer_and_a_streamed_one_are_the_same(real: RealAppliance) -> None:
    with real.openai() as client:
        whole = client.chat.completions.create(
            model=MODEL_ID, messages=QUESTION, temperature=0, max_tokens=24
        )
        stream = client.chat.completions.create(
            model=MODEL_ID,
            messages=QUESTION,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        for chunk in stream:
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert "Paris" in (whole.choices[0].message.content or "")
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_whole_answer_and_a_streamed_one_have_one_output_digest(real: RealAppliance) -> None:
    digests = []
    with real.openai() as client, real.client() as http:
        for stream in (False, True):
            raw = client.chat.completions.with_raw_response.create(
                model=MODEL_ID, messages=QUESTION, temperature=0, max_tokens=24, stream=stream
            )
            answer = raw.http_response.read()
            receipt = http.get(f"/v1/aci/receipts/{raw.headers['x-receipt-id']}").json()
            events = {event["type"]: event for event in receipt["event_log"]}
            assert events["dcv.ended"]["outcome"] == "complete"
            returned = events["response.returned"]["body_hash"]
            assert returned == "sha256:" + hashlib.sha256(answer).hexdigest()
            assert events["dcv.gpu.attested"]["verdict"] == "warning"  # simulated hardware
            assert events["dcv.engine"]["deterministic"] is True
            digests.append(events["dcv.output"]["output_digest"])
    assert digests[0] == digests[1] is not None


def test_every_process_of_the_engine_is_confined(real: RealAppliance) -> None:
    """SGLang starts more processes; what was given up is inherited."""
    if landlock_abi():
        assert '"line": "confined by Landlock, ABI ' in real.log()
    for pid in (real.engine_pid, *children(real.engine_pid)):
        status = Path(f"/proc/{pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status, status


def children(pid: int) -> list[int]:
    """Of every thread of it, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *children(child)]
    return found


class Recording(httpx2.BaseTransport):
    """Hands on what goes through it, and keeps the content bytes of both ways."""

    def __init__(self, inner: httpx2.BaseTransport) -> None:
        self.inner = inner
        self.request, self.response = b"", b""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.request, self.response = request.read(), b""
        answer = self.inner.handle_request(request)
        assert isinstance(answer.stream, httpx2.SyncByteStream)
        return httpx2.Response(
            answer.status_code,
            headers=answer.headers,
            stream=Kept(self, answer.stream),
            extensions=answer.extensions,
        )

    def close(self) -> None:
        self.inner.close()


class Kept(httpx2.SyncByteStream):
    def __init__(self, record: Recording, parts: httpx2.SyncByteStream) -> None:
        self.record, self.parts = record, parts

    def __iter__(self) -> Iterator[bytes]:
        for part in self.parts:
            self.record.response += part
            yield part

    def close(self) -> None:
        self.parts.close()


async def test_a_stream_proves_itself_offline_and_is_reproduced(
    real: RealAppliance, tmp_path: Path
) -> None:
    """What an auditor does: the unmodified openai package asked, and what it sent and got was
    kept; the receipt, the epochs and the report make it a bundle, which is all that is needed."""
    # 1. Ask, sampled, so that a replay has something to show, and for the answer's own proof.
    recording = Recording(httpx2.HTTPTransport(verify=real.trust))
    http = httpx2.Client(transport=recording, timeout=120)
    with (
        openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", http_client=http) as client,
        client.chat.completions.create(
            model=MODEL_ID,
            messages=STORY,
            temperature=1,
            max_tokens=32,
            stream=True,
            extra_body={"tee": True},
        ) as stream,
    ):
        last = list(stream)[-1]
    assert last.model_extra is not None
    assert last.model_extra["attestation"]["verified"] is True
    # 2. Keep what proves it.
    receipt_id = last.model_extra["dcv"]["receipt_id"]
    bundle = await fetch(real.url, os.urandom(32), now=datetime.datetime.now(datetime.UTC))
    assert bundle.spki_sha256 is not None
    async with pinned_client(real.url, (bundle.spki_sha256,), read_s=120) as relying:
        answered = Answered(receipt_id, None, recording.response)
        bundle = await collect_exchange(relying, bundle, answered, recording.request)
    path = tmp_path / "bundle.json"
    path.write_bytes(bundle.to_bytes())
    # 3. Verify it offline: it is as good as simulated hardware can be.
    verdict = await told("verify", str(path), real)
    assert (verdict.status, verdict.told["verdict"]) == (EXIT_WARNING, "warning")
    receipt = verdict.told["claims"]["submods"]["receipt"]
    assert (receipt["outcome"], receipt["checkpoints"]) == ("complete", 1)
    assert "completion GPU-0" in receipt["submods"]
    assert not [one for one in verdict.told["findings"] if one["check"].startswith("receipt.")]
    # 4. Have it answered again.
    replayed = await told("replay", str(path), real, "--against", real.url)
    assert (replayed.status, replayed.told["result"]) == (EXIT_WARNING, "reproduced")
    # 5. A byte of the answer that differs is noticed.
    document = json.loads(path.read_text())
    document["response_b64"] = base64.b64encode(recording.response.replace(b"a", b"e", 1)).decode()
    path.write_text(json.dumps(document))
    verdict = await told("verify", str(path), real)
    assert (verdict.status, verdict.told["error"]["code"]) == (1, "unbound")


@dataclass
class Told:
    status: int
    told: dict[str, Any]


async def told(command: str, bundle: str, real: RealAppliance, *more: str) -> Told:
    policy = str(real.folder / "policy.toml")
    with trio.fail_after(300):
        done = await trio.run_process(
            [
                sys.executable,
                "-m",
                "appliance",
                command,
                bundle,
                "--policy",
                policy,
                "--json",
                *more,
            ],
            capture_stdout=True,
            check=False,
        )
    return Told(done.returncode, json.loads(done.stdout))


async def test_the_asynchronous_client_works_too(real: RealAppliance) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{real.url}/v1",
        api_key="unused",
        http_client=httpx2.AsyncClient(verify=real.trust, timeout=120),
    ) as client:
        text = ""
        async for chunk in await client.chat.completions.create(
            model=MODEL_ID, messages=QUESTION, temperature=0, max_tokens=24, stream=True
        ):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        completion = await client.completions.create(
            model=MODEL_ID, prompt="The capital of France is", temperature=0, max_tokens=4
        )
    assert "Paris" in text
    assert "Paris" in completion.choices[0].text


def test_one_seed_gives_one_text_and_other_seeds_other_texts(real: RealAppliance) -> None:
    def ask(seed: int) -> str:
        with real.openai() as client:
            answer = client.chat.completions.create(
                model=MODEL_ID, messages=STORY, temperature=1, seed=seed, max_tokens=24
            )
        return answer.choices[0].message.content or ""

    texts = [ask(seed) for seed in (11, 11, 12, 13)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_requests_without_a_seed_differ(real: RealAppliance) -> None:
    with real.openai() as client:
        texts = {
            client.chat.completions.create(
                model=MODEL_ID, messages=STORY, temperature=1, max_tokens=24
            )
            .choices[0]
            .message.content
            for _ in range(2)
        }
    assert len(texts) == 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_two_choices_are_two_different_texts(real: RealAppliance, *, stream: bool) -> None:
    with real.openai() as client:
        if stream:
            texts = ["", ""]
            for chunk in client.chat.completions.create(
                model=MODEL_ID,
                messages=STORY,
                temperature=1,
                seed=5,
                n=2,
                max_tokens=16,
                stream=True,
            ):
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        else:
            answer = client.chat.completions.create(
                model=MODEL_ID, messages=STORY, temperature=1, seed=5, n=2, max_tokens=16
            )
            texts = [choice.message.content or "" for choice in answer.choices]
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 32
    assert texts[0]
    assert texts[1]
    assert texts[0] != texts[1]


def test_stop_ends_the_text_and_length_is_named(real: RealAppliance) -> None:
    with real.openai() as client:
        stopped = client.completions.create(
            model=MODEL_ID, prompt="1, 2, 3, 4,", temperature=0, max_tokens=32, stop=" 7"
        )
        cut = client.completions.create(
            model=MODEL_ID, prompt="1, 2, 3, 4,", temperature=0, max_tokens=3
        )
    assert "7" not in stopped.choices[0].text
    assert stopped.choices[0].finish_reason == "stop"
    assert cut.choices[0].finish_reason == "length"


def test_logprobs_come_with_their_alternatives(real: RealAppliance) -> None:
    with real.openai() as client:
        answer = client.chat.completions.create(
            model=MODEL_ID,
            messages=QUESTION,
            temperature=0,
            max_tokens=4,
            logprobs=True,
            top_logprobs=2,
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    first = logprobs.content[0]
    assert first.logprob <= 0
    assert len(first.top_logprobs) == 2


def test_a_json_schema_is_kept(real: RealAppliance) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Lyon"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    with real.openai() as client:
        answer = client.chat.completions.create(
            model=MODEL_ID,
            messages=QUESTION,
            temperature=0,
            max_tokens=32,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema},
            },
        )
    assert json.loads(answer.choices[0].message.content or "") in (
        {"city": "Paris"},
        {"city": "Lyon"},
    )


def test_a_required_tool_is_called(real: RealAppliance) -> None:
    tools: list[Any] = [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "The weather in a city",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "enum": ["Paris", "Lyon"]}},
                    "required": ["city"],
                },
            },
        }
    ]
    with real.openai() as client:
        answer = client.chat.completions.create(
            model=MODEL_ID,
            messages=[{"role": "user", "content": "How is the weather in Paris?"}],
            tools=tools,
            tool_choice="required",
            temperature=0,
            max_tokens=96,
        )
    calls = answer.choices[0].message.tool_calls
    assert calls, answer
    call = calls[0]
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in {"Paris", "Lyon"}


def test_tokens_are_counted_as_the_engine_counts_them(real: RealAppliance) -> None:
    prompt = "Tokens are counted, naïvely or not: 東京."
    with real.client() as client:
        tokenized = client.post("/v1/tokenize", json={"model": MODEL_ID, "prompt": prompt}).json()
        text = client.post(
            "/v1/detokenize", json={"model": MODEL_ID, "tokens": tokenized["tokens"]}
        ).json()["text"]
        answer = client.post(
            "/v1/completions", json={"model": MODEL_ID, "prompt": prompt, "max_tokens": 1}
        ).json()
    assert tokenized["count"] == len(tokenized["tokens"]) == answer["usage"]["prompt_tokens"]
    assert text == prompt


def test_a_prompt_beyond_the_context_is_refused_with_its_numbers(real: RealAppliance) -> None:
    with real.client() as client:
        response = client.post(
            "/v1/completions",
            json={"model": MODEL_ID, "prompt": f"{CANARY} " * 4000, "max_tokens": 1},
        )
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "engine_refused"
    assert "context" in error["message"]
    assert CANARY not in response.text


def test_a_broken_json_schema_is_refused_without_an_echo(real: RealAppliance) -> None:
    body = {
        "model": MODEL_ID,
        "messages": QUESTION,
        "max_tokens": 4,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": CANARY}},
        },
    }
    with real.client() as client:
        for stream in (False, True):
            response = client.post("/v1/chat/completions", json={**body, "stream": stream})
            assert response.status_code == 400, response.text
            assert CANARY not in response.text


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl_streams_over_both_protocols(real: RealAppliance, version: str) -> None:
    result = subprocess.run(
        [
            "curl",
            "--silent",
            "--show-error",
            "--no-buffer",
            version,
            "--cacert",
            real.folder / "tls.pem",
            "--write-out",
            "%{http_version} %{http_code}",
            "--json",
            json.dumps(
                {
                    "model": MODEL_ID,
                    "messages": QUESTION,
                    "stream": True,
                    "temperature": 0,
                    "max_tokens": 16,
                }
            ),
            f"{real.url}/v1/chat/completions",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    body, _, status = result.stdout.rpartition("\n")
    assert status == ("2 200" if version == "--http2" else "1.1 200")
    assert body.endswith("data: [DONE]\n")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_away_aborts_the_generation(
    real: RealAppliance, *, stream: bool
) -> None:
    before = real.engine_counter("sglang:num_aborted_requests_total")
    body = json.dumps(
        {
            "model": MODEL_ID,
            "messages": STORY,
            "stream": stream,
            "max_tokens": 2000,
            "ignore_eos": True,
        }
    ).encode()
    port = int(real.url.rpartition(":")[2])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=60) as tcp,
        real.trust.wrap_socket(tcp, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        if stream:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        while real.engine_counter("sglang:num_running_reqs") < 1:
            time.sleep(0.05)
    gone = time.monotonic()
    while real.engine_counter("sglang:num_aborted_requests_total") <= before:
        assert time.monotonic() - gone < 10
        time.sleep(0.01)
    took = time.monotonic() - gone
    print(f"aborted {took * 1000:.0f} ms after the client went away")
    # The target is 100 ms (measured on an idle machine: docs/development.md). Scraping the
    # engine's metrics takes part of that and the engine's event loop is shared with the
    # generation, so the bound here only tells our abort from SGLang's own: 2 s, or 4 s.
    assert took < 1.0


def test_a_canary_prompt_is_in_no_log_and_no_file(real: RealAppliance) -> None:
    with real.client() as client:
        client.post(
            "/v1/chat/completions",
            json={
                "model": MODEL_ID,
                "max_tokens": 8,
                "messages": [{"role": "user", "content": f"Repeat: {CANARY}"}],
            },
        )
    for path in real.folder.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


def test_the_engine_listens_on_loopback_only(real: RealAppliance) -> None:
    from appliance.engine.sockets import refuse_exposed

    sockets = refuse_exposed(real.engine_pid)
    assert any(entry.port == real.engine_port for entry in sockets)
