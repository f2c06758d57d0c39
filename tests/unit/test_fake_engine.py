"""The stand-in engine itself: what the other tests lean on when they say "SGLang does this"."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import h11
import pytest
import trio

from tests.fakes.sglang_request import JsonObject, JsonValue

pytestmark = pytest.mark.trio

SCRIPT: Final = Path(__file__).parents[1] / "fakes" / "sglang_engine.py"
KEY: Final = "engine-key-7d1f"
ADMIN_KEY: Final = "admin-key-52c0"
CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
PATIENCE_S: Final = 10.0
"""Far more than any step takes; only a hang reaches it."""

TOOL: Final[JsonObject] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris"]}}},
    },
}


# ------------------------------------------------------------------------------------ the client


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole response; `clean` is whether its body ended as HTTP says it must."""

    status: int
    headers: dict[str, str]
    body: bytes
    clean: bool = True

    @property
    def json(self) -> JsonObject:
        parsed: JsonObject = json.loads(self.body)
        return parsed

    @property
    def events(self) -> list[str]:
        """The data of each server-sent event."""
        return [block.removeprefix("data: ") for block in self.body.decode().split("\n\n") if block]

    @property
    def chunks(self) -> list[JsonObject]:
        return [json.loads(event) for event in self.events if event != "[DONE]"]


@dataclass(frozen=True, slots=True)
class FakeEngine:
    """A running stand-in, and raw HTTP to it."""

    process: trio.Process
    port: int
    log: Path

    async def open(
        self, method: str, path: str, body: JsonValue = None, key: str = KEY
    ) -> Exchange:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        http = h11.Connection(h11.CLIENT)
        content = b"" if body is None else json.dumps(body).encode()
        headers = [("Host", "engine"), ("Content-Length", str(len(content)))]
        headers += [("Content-Type", "application/json")] if content else []
        headers += [("Authorization", f"Bearer {key}")] if key else []
        wire = http.send(h11.Request(method=method, target=path, headers=headers)) or b""
        wire += http.send(h11.Data(data=content)) or b""
        await stream.send_all(wire + (http.send(h11.EndOfMessage()) or b""))
        return Exchange(stream, http)

    async def get(self, path: str, key: str = KEY) -> Reply:
        return await (await self.open("GET", path, key=key)).reply()

    async def post(self, path: str, body: JsonValue, key: str = KEY) -> Reply:
        return await (await self.open("POST", path, body, key)).reply()

    async def counter(self, name: str) -> float:
        """A metric's value over all labels; one that was never counted is absent, so zero."""
        lines = (await self.get("/metrics")).body.decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


@dataclass(slots=True)
class Exchange:
    """A request that was sent, and as much of its response as the test wants to read."""

    stream: trio.SocketStream
    http: h11.Connection

    async def event(self) -> h11.Event:
        while True:
            event = self.http.next_event()
            if isinstance(event, h11.Event):
                return event
            self.http.receive_data(await self.stream.receive_some(65536))

    async def reply(self) -> Reply:
        async with self.stream:
            head = await self.event()
            assert isinstance(head, h11.Response)
            body, clean = bytearray(), True
            try:
                while isinstance(part := await self.event(), h11.Data):
                    body += part.data
            except (h11.RemoteProtocolError, trio.BrokenResourceError):
                clean = False
            headers = {name.decode(): value.decode() for name, value in head.headers}
            return Reply(head.status_code, headers, bytes(body), clean)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def launched(
    directory: Path, *modes: str, settings: JsonObject | None = None
) -> AsyncIterator[FakeEngine]:
    """The process as the supervisor would start it, without waiting for anything."""
    config = directory / "engine.yaml"
    port = free_port()
    config.write_text(
        json.dumps(
            {
                "model-path": "/models/smollm2",
                "served-model-name": "smollm2",
                "host": "127.0.0.1",
                "port": port,
                "api-key": KEY,
                "admin-api-key": ADMIN_KEY,
                "enable-deterministic-inference": True,
                "a-setting-of-tomorrow": [1, 2],
                **(settings or {}),
            }
        )
    )
    arguments = [part for mode in modes for part in ("--fake-mode", mode)]
    log = directory / "engine.log"
    with log.open("wb") as sink:
        process = await trio.lowlevel.open_process(
            [sys.executable, str(SCRIPT), "--config", str(config), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    try:
        with trio.fail_after(PATIENCE_S):
            yield FakeEngine(process, port, log)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@asynccontextmanager
async def running(
    directory: Path, *modes: str, settings: JsonObject | None = None
) -> AsyncIterator[FakeEngine]:
    async with launched(directory, *modes, settings=settings) as engine:
        while True:
            try:
                assert (await engine.get("/ready")).status == 200
            except OSError:
                await trio.sleep(0.02)
            else:
                break
        yield engine


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Poll: what is waited for happens in another process."""
    while not await condition():
        await trio.sleep(0.005)


def chat(prompt: str, **fields: JsonValue) -> JsonObject:
    return {"model": "smollm2", "messages": [{"role": "user", "content": prompt}], **fields}


def dig(value: JsonValue, *path: str | int) -> JsonValue:
    """What lies at a path of keys and indexes."""
    for step in path:
        if isinstance(step, int):
            assert isinstance(value, list)
            value = value[step]
        else:
            assert isinstance(value, dict)
            value = value[step]
    return value


def content(reply: Reply) -> str:
    return str(dig(reply.json, "choices", 0, "message", "content"))


def finish(reply: Reply) -> tuple[JsonValue, JsonValue]:
    last = dig(reply.json, "choices", 0)
    return dig(last, "finish_reason"), dig(last, "matched_stop")


def streamed(reply: Reply, field: str = "content") -> str:
    """A chat stream's deltas, joined."""
    deltas = [dig(chunk, "choices", 0, "delta") for chunk in reply.chunks if chunk["choices"]]
    return "".join(
        str(delta[field]) for delta in deltas if isinstance(delta, dict) and delta.get(field)
    )


# -------------------------------------------------------------------------------- life and death


async def test_it_refuses_connections_while_it_loads_and_is_ready_soon_after(
    tmp_path: Path,
) -> None:
    async with launched(tmp_path, "load:0.6") as engine:
        await trio.sleep(0.3)
        with pytest.raises(OSError, match="connect"):
            await engine.get("/ready")
        await until(lambda: _logged(engine, "fired up"))
        assert (await engine.get("/ready", key="")).status == 200


async def test_its_log_leaks_the_key_and_shows_progress_and_a_harmless_traceback(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, "log_long_line:70000", "log_binary") as engine:
        log = engine.log.read_bytes()
    assert f"'api_key': '{KEY}'".encode() in log
    assert b"] server_args={" in log
    assert b"\rMulti-thread loading shards: 100% Completed | 2/2" in log
    assert b"Traceback (most recent call last):" in log
    assert b"\xff\xfe" in log
    assert max(len(line) for line in log.splitlines()) > 70_000


async def test_it_can_hang_or_crash_instead_of_starting(tmp_path: Path) -> None:
    async with launched(tmp_path, "crash_start", "load:0") as engine:
        assert await engine.process.wait() == 1
        assert "Not enough memory" in engine.log.read_text()
    async with launched(tmp_path, "hang_start", "load:0") as engine:
        await until(lambda: _logged(engine, "Capture target decode CUDA graph end"))
        with pytest.raises(OSError, match="connect"):
            await engine.get("/ready")


async def test_sigterm_drains_what_runs_and_what_still_comes_then_exits_with_zero(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, "health_delay:0") as engine:
        slow = await engine.open("POST", CHAT, chat("[[mode:slow:40]]", max_tokens=15, stream=True))
        await slow.event()
        assert (await engine.get("/health")).status == 200
        engine.process.send_signal(signal.SIGTERM)
        await until(lambda: _answers(engine, "/ready", 503))
        assert (await engine.get("/health")).status == 503
        engine.process.send_signal(signal.SIGTERM)
        assert (await engine.post(CHAT, chat("new"))).status == 200
        assert (await _rest(slow)).endswith(b"data: [DONE]\n\n")
        assert await engine.process.wait() == 0


async def test_sigterm_before_the_first_request_can_kill_it(tmp_path: Path) -> None:
    async with running(tmp_path, "late_sigterm") as engine:
        engine.process.send_signal(signal.SIGTERM)
        assert await engine.process.wait() == -signal.SIGTERM


async def test_it_can_ignore_sigterm_and_stop_answering_health(tmp_path: Path) -> None:
    async with running(tmp_path, "ignore_sigterm") as engine:
        engine.process.send_signal(signal.SIGTERM)
        await until(lambda: _logged(engine, "SIGTERM received"))
        await engine.post("/_control", {"set": {"stop_health": None}}, key="")
        for path in ("/health", "/ready"):
            with trio.move_on_after(0.1) as scope:
                await engine.get(path)
            assert scope.cancelled_caught
        assert (await engine.post(CHAT, chat("alive"))).status == 200


async def test_it_can_leave_children_ports_and_shared_memory_behind(tmp_path: Path) -> None:
    async with running(tmp_path, "spawn_children", "bind_all", "leak_shm") as engine:
        state = (await engine.get("/_state", key="")).json
        children, ports, files = (state[k] for k in ("children", "extra_ports", "left_over"))
        assert isinstance(children, list)
        assert isinstance(ports, list)
        assert isinstance(files, list)
        try:
            groups = [os.getpgid(int(str(pid))) for pid in children]
            assert groups == [os.getpgid(engine.process.pid), children[1]]
            await (await trio.open_tcp_stream("127.0.0.2", int(str(ports[0])))).aclose()
        finally:
            for pid in children:
                os.kill(int(str(pid)), signal.SIGKILL)
            await trio.Path(str(files[0])).unlink()


# ------------------------------------------------------------------------------------ the dialect


async def test_every_route_but_the_open_ones_wants_the_key(tmp_path: Path) -> None:
    async with running(tmp_path, "health_delay:0") as engine:
        for path in ("/health", "/health_generate", "/ready", "/metrics"):
            assert (await engine.get(path, key="")).status == 200
        for path in ("/ping", "/model_info", "/server_info", "/v1/models", "/nowhere"):
            reply = await engine.get(path, key="wrong")
            assert (reply.status, reply.body) == (401, b'{"error":"Unauthorized"}')
        missing = await engine.get("/nowhere")
        assert (missing.status, missing.body) == (404, b'{"detail":"Not Found"}')
        # With an admin key set, the ordinary one cannot abort.
        assert (await engine.post("/abort_request", {"rid": "x"})).status == 401
        assert (await engine.post("/abort_request", {"rid": "x"}, key=ADMIN_KEY)).status == 200


async def test_errors_are_flat_and_echo_the_input(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        for fields in ({"temperature": "CANARY"}, {"response_format": {"type": "CANARY"}}):
            reply = await engine.post(CHAT, chat("x", **fields))
            assert (reply.status, reply.json["object"]) == (400, "error")
            assert "CANARY" in str(reply.json["message"])
            assert "http_server.py" in str(reply.json["message"])
        crashed = await engine.post(CHAT, chat("[[mode:http_500]] CANARY"))
        assert (crashed.status, "CANARY" in str(crashed.json["message"])) == (500, True)
        # A null is fine where SGLang declared the field optional, and only there.
        assert (await engine.post(CHAT, chat("x", temperature=None))).status == 200
        assert (await engine.post(CHAT, chat("x", stream=None))).status == 400
        assert (await engine.post(CHAT, chat("x", model="another"))).json["model"] == "another"


async def test_a_stream_says_what_the_plain_answer_says(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        body = chat("What is the capital of France?", temperature=0, rid="request-1")
        whole = await engine.post(CHAT, body)
        assert "Paris" in content(whole)
        assert whole.json["id"] == "request-1"
        assert finish(whole) == ("stop", 2)
        for extra in ("", "[[mode:split:7]]"):
            options: JsonObject = {"stream": True, "stream_options": {"include_usage": True}}
            plain = content(await engine.post(CHAT, chat(f"{extra}France", temperature=0)))
            reply = await engine.post(CHAT, chat(f"{extra}France", temperature=0, **options))
            assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert (streamed(reply), reply.events[-1], reply.clean) == (plain, "[DONE]", True)
            assert reply.chunks[-1]["choices"] == []
            assert isinstance(reply.chunks[-1]["usage"], dict)


async def test_completions_stream_echo_and_lists_of_prompts_agree_with_the_plain_answer(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as engine:
        body: JsonObject = {
            "prompt": ["one", "two"],
            "echo": True,
            "temperature": 0,
            "rid": "r",
        }
        whole = await engine.post(COMPLETIONS, body)
        reply = await engine.post(COMPLETIONS, {**body, "stream": True})
        texts = ["", ""]
        for chunk in reply.chunks:
            texts[int(str(dig(chunk, "choices", 0, "index")))] += str(
                dig(chunk, "choices", 0, "text")
            )
        assert texts == [dig(whole.json, "choices", i, "text") for i in (0, 1)]
        assert [text[:3] for text in texts] == ["one", "two"]
        assert whole.json["id"] == "r_0"


async def test_the_seed_matters_only_when_sampling(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:

        async def text(**fields: JsonValue) -> str:
            return content(await engine.post(CHAT, chat("Tell me", **fields)))

        assert await text(temperature=0, seed=1) == await text(temperature=0, seed=2)
        assert await text(temperature=1, seed=1) == await text(temperature=1, seed=1)
        assert await text(temperature=1, seed=1) != await text(temperature=1, seed=2)
        # Unseeded sampling is not random in deterministic mode: it is seed 42.
        assert await text(temperature=1) == await text(seed=42)
        both = await engine.post(CHAT, chat("Tell me", seed=5, n=2, rid="r"))
        assert dig(both.json, "choices", 0, "message") == dig(both.json, "choices", 1, "message")
        assert both.json["id"] != "r"


async def test_limits_stops_and_log_probabilities_have_their_shapes(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        question = "What is the capital of France?"
        short = await engine.post(CHAT, chat(question, max_tokens=3, logprobs=True, top_logprobs=2))
        assert (content(short), finish(short)) == ("The capital of", ("length", None))
        entries = dig(short.json, "choices", 0, "logprobs", "content")
        assert isinstance(entries, list)
        assert [dig(entry, "token") for entry in entries] == ["The", " capital", " of"]
        stopped = await engine.post(CHAT, chat(question, stop=["France"]))
        assert (content(stopped), finish(stopped)) == ("The capital of ", ("stop", "France"))


async def test_tools_and_reasoning_need_their_parsers(tmp_path: Path) -> None:
    forced = chat("[[think]] Weather?", tools=[TOOL], tool_choice="required")
    async with running(tmp_path) as engine:
        raw = content(await engine.post(CHAT, forced))
        assert raw.startswith("<think>")
        assert '[{"name": "get_weather", "parameters": {"city": "Paris"}}]' in raw
    parsers: JsonObject = {"tool-call-parser": "qwen25", "reasoning-parser": "qwen3"}
    async with running(tmp_path, settings=parsers) as engine:
        whole = await engine.post(CHAT, forced)
        assert (content(whole), finish(whole)) == ("", ("tool_calls", None))
        message = dig(whole.json, "choices", 0, "message")
        assert dig(message, "tool_calls", 0, "function", "arguments") == '{"city": "Paris"}'
        reply = await engine.post(CHAT, {**forced, "stream": True})
        assert streamed(reply, "reasoning_content") == dig(message, "reasoning_content")
        calls = [
            dig(chunk, "choices", 0, "delta", "tool_calls", 0)
            for chunk in reply.chunks
            if "tool_calls" in json.dumps(dig(chunk, "choices", 0, "delta"))
        ]
        names = [dig(call, "function", "name") for call in calls]
        assert names == ["get_weather"] + [None] * (len(calls) - 1)
        arguments = "".join(str(dig(call, "function", "arguments")) for call in calls)
        assert arguments == '{"city": "Paris"}'
        shape: JsonObject = {"type": "object", "properties": {"n": {"type": "integer"}}}
        schema: JsonObject = {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": shape},
        }
        written = json.loads(content(await engine.post(CHAT, chat("x", response_format=schema))))
        assert isinstance(written["n"], int)


async def test_it_remembers_bodies_and_never_headers(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        body = chat("remember", rid="r-1", cache_salt="salt", seed=9)
        await engine.post(CHAT, body)
        seen = await engine.get("/_seen", key="")
        assert json.loads(seen.body) == [body]
        assert KEY not in seen.body.decode()


# ------------------------------------------------------------------------------ aborts and faults


async def test_a_disconnect_aborts_within_milliseconds_and_is_counted(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        for stream in (True, False):
            before = await engine.counter("sglang:num_aborted_requests_total")
            body = chat("[[mode:slow:1000]]", stream=stream)
            exchange = await engine.open("POST", CHAT, body)
            await until(lambda: _running(engine, 1))
            await exchange.stream.aclose()
            with trio.fail_after(0.5):
                await until(lambda: _running(engine, 0))
            assert await engine.counter("sglang:num_aborted_requests_total") == before + 1
        lazy = await engine.open("POST", CHAT, chat("[[mode:slow:1000]][[mode:lazy_disconnect]]"))
        await until(lambda: _running(engine, 1))
        await lazy.stream.aclose()
        await trio.sleep(0.1)
        assert await _running(engine, 1)


async def test_an_abort_ends_the_answer_in_the_ordinary_way(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        for stream in (True, False):
            body = chat("[[mode:slow:500]]", stream=stream, rid="r-1")
            exchange = await engine.open("POST", CHAT, body)
            await until(lambda: _running(engine, 1))
            await engine.post("/abort_request", {"rid": "r-1"}, key=ADMIN_KEY)
            reply = await exchange.reply()
            assert (reply.status, b'"finish_reason":"abort"' in reply.body) == (200, True)


async def test_an_error_inside_a_stream_is_followed_by_usage_and_done(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        options: JsonObject = {"stream": True, "stream_options": {"include_usage": True}}
        reply = await engine.post(CHAT, chat("[[mode:error_event:2]] CANARY", **options))
        _role, _first, error, usage, done = reply.events
        assert error.startswith('{"error": {"object": "error", "message": ')
        assert "CANARY" in error
        assert (json.loads(usage)["choices"], done, reply.clean) == ([], "[DONE]", True)
        # A grammar that cannot be compiled: the client's mistake, and yet a 200.
        schema: JsonObject = {"name": "x", "schema": {"type": "CANARY"}}
        bad: JsonObject = {"response_format": {"type": "json_schema", "json_schema": schema}}
        assert (await engine.post(CHAT, chat("x", **bad))).status == 400
        late = await engine.post(CHAT, chat("x", stream=True, **bad))
        assert (late.status, len(late.events), "CANARY" in late.events[0]) == (200, 2, True)


async def test_streams_break_in_every_way_that_tcp_and_http_allow(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:

        async def broken(mode: str) -> Reply:
            return await engine.post(CHAT, chat(f"[[mode:{mode}]]", stream=True))

        for mode in ("truncate_stream:2", "reset_stream:2", "half_chunk:2"):
            reply = await broken(mode)
            assert (reply.clean, b"[DONE]" in reply.body) == (False, False), mode
        quiet = await broken("no_done")
        assert (quiet.clean, b"[DONE]" in quiet.body) == (True, False)
        assert b'\n\ndata: {"id": not json\n\n' in (await broken("garbage_event:1")).body
        with pytest.raises(h11.RemoteProtocolError):
            await broken("garbage")
        with pytest.raises(h11.RemoteProtocolError):
            await broken("endless_header")
        with trio.move_on_after(0.2) as scope:
            await broken("hang_stream:1")
        assert scope.cancelled_caught
        long = await broken("long:3000")
        assert len(long.events) == 3003
        huge = await engine.post(CHAT, chat("[[mode:huge_body:2]]"))
        assert len(huge.body) > 2 << 20


async def test_it_can_kill_itself_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        reply = await engine.post(CHAT, chat("[[mode:crash_stream:3]]", stream=True))
        assert (len(reply.events), reply.clean) == (3, False)
        assert await engine.process.wait() == -signal.SIGKILL


async def test_it_serves_256_streams_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        done = 0

        async def one(number: int) -> None:
            nonlocal done
            body = chat(f"[[mode:slow:20]] {number}", stream=True, max_tokens=10, ignore_eos=True)
            reply = await engine.post(CHAT, body)
            done += reply.events[-1] == "[DONE]"

        async with trio.open_nursery() as nursery:
            for number in range(256):
                nursery.start_soon(one, number)
        assert done == 256


async def _answers(engine: FakeEngine, path: str, status: int) -> bool:
    return (await engine.get(path)).status == status


async def _logged(engine: FakeEngine, text: str) -> bool:
    await trio.lowlevel.checkpoint()
    return text in engine.log.read_text()


async def _running(engine: FakeEngine, count: int) -> bool:
    return await engine.counter("sglang:num_running_reqs") == count


async def _rest(exchange: Exchange) -> bytes:
    body = bytearray()
    while isinstance(part := await exchange.event(), h11.Data):
        body += part.data
    await exchange.stream.aclose()
    return bytes(body)
