"""A whole appliance in the test's own Trio run, with the stand-in engine as its real child."""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import httpx2
import tokenizers
import trio
from openai import AsyncOpenAI, DefaultHttpxClient, OpenAI

from appliance.config import MeasuredConfig, parse_config
from appliance.errors import ApplianceError
from appliance.log import configure_log
from appliance.notify import Notifier
from appliance.run import run
from appliance.serving.self_test import REQUEST_IDS

MODEL_CONFIG = b'{"vocab_size": 49152}'
FAKE_ENGINE = Path(__file__).parent.parent / "fakes" / "sglang_engine.py"
MODEL = "stand-in"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

Sections = Mapping[str, Mapping[str, object]]


@dataclass
class RunningAppliance:
    """An appliance that serves.

    Attributes:
        ended: set when `run` has returned; `result` is then what it returned.
    """

    folder: Path
    config: MeasuredConfig
    url: str
    engine_port: int
    log_stream: io.StringIO
    ended: trio.Event
    result: list[ApplianceError | None]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.folder / "tls.pem")

    @property
    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_stream.getvalue().splitlines()]

    def client(self, **options: Any) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=self.url, verify=self.trust, timeout=20, **options)

    def openai(self) -> OpenAI:
        return OpenAI(
            base_url=f"{self.url}/v1",
            api_key="unused",
            max_retries=0,
            http_client=DefaultHttpxClient(verify=self.trust),
        )

    def async_openai(self) -> AsyncOpenAI:
        return AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key="unused",
            max_retries=0,
            http_client=httpx2.AsyncClient(verify=self.trust, timeout=20),
        )

    async def chat(self, prompt: str = "", **body: Any) -> httpx2.Response:
        messages = [{"role": "user", "content": prompt}] if prompt else QUESTION
        async with self.client() as client:
            return await client.post(
                "/v1/chat/completions", json={"model": MODEL, "messages": messages, **body}
            )

    async def engine_get(self, path: str) -> httpx2.Response:
        async with httpx2.AsyncClient(timeout=20) as client:
            return await client.get(f"http://127.0.0.1:{self.engine_port}{path}")

    async def engine_control(self, change: Mapping[str, object]) -> None:
        """Change the stand-in engine's behaviour, see tests/fakes/sglang_modes.py."""
        async with httpx2.AsyncClient(timeout=20) as client:
            response = await client.post(
                f"http://127.0.0.1:{self.engine_port}/_control", json=change
            )
        response.raise_for_status()

    async def engine_seen(self) -> list[dict[str, Any]]:
        """What it was asked since the boot, whose own requests are left out."""
        seen: list[dict[str, Any]] = (await self.engine_get("/_seen")).json()
        return [one for one in seen if not str(one.get("rid")).startswith(REQUEST_IDS)]

    async def engine_counter(self, name: str) -> float:
        """A counter of the engine's own, summed over labels."""
        text = (await self.engine_get("/metrics")).text
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith(name) and line[len(name)] in "{ "
        )


def config_text(folder: Path, modes: tuple[str, ...] = (), sections: Sections | None = None) -> str:
    """A configuration for the stand-in engine on free ports, with sections overridden."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    if not (model / "config.json").exists():
        (model / "config.json").write_bytes(MODEL_CONFIG)
    command = [sys.executable, str(FAKE_ENGINE)]
    for mode in modes:
        command += ["--fake-mode", mode]
    merged: dict[str, dict[str, object]] = {
        "model": {"id": MODEL, "path": "model"},
        "model.files": {"config.json": hashlib.sha256(MODEL_CONFIG).hexdigest()},
        "listen": {"port": 0},
        "tls": {"certificate_file": "tls.pem"},
        "engine": {
            "unsafe_command": command,
            "device": "cpu",
            "stop_grace_s": 3.0,
            "ready_deadline_s": 30.0,
        },
        "auth": {"mode": "loopback"},
        "attestation": {"cpu": "simulated", "gpu": "simulated"},
        "policy": {"tee_types": ["unsafe_simulated"], "gpus": "unsafe_simulated"},
        "limits": {"drain_s": 2.0},
        "log": {"format": "json", "level": "debug"},
    }
    for name, values in (sections or {}).items():
        merged.setdefault(name, {}).update(values)
    return "\n".join(
        f"[{name}]\n" + "\n".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in values.items())
        for name, values in merged.items()
    )


def with_tokenizer(folder: Path) -> Sections:
    """Give the model a tokenizer of three words; the sections that declare its file."""
    path = folder / "model" / "tokenizer.json"
    path.parent.mkdir()
    words = tokenizers.models.WordLevel({"Hello": 0, "there": 1, "?": 2}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return {"model.files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}}


def _toml(value: object) -> str:
    """A TOML value; JSON's own but for objects, which are inline tables."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


async def start_appliance(
    nursery: trio.Nursery,
    folder: Path,
    *,
    modes: tuple[str, ...] = (),
    sections: Sections | None = None,
    notifier: Notifier | None = None,
    random: Callable[[int], bytes] = secrets.token_bytes,
    wall_clock: Callable[[], float] = time.time,
) -> RunningAppliance:
    """Start an appliance in the nursery and wait until it serves."""
    config = parse_config(config_text(folder, modes, sections), folder=folder)
    stream = io.StringIO()
    log = configure_log(format="json", level="debug", stream=stream)
    ended, result = trio.Event(), list[ApplianceError | None]()

    async def live() -> None:
        result.append(
            await run(
                config,
                log=log,
                notifier=notifier or Notifier(),
                random=random,
                wall_clock=wall_clock,
            )
        )
        ended.set()

    nursery.start_soon(live)
    with trio.fail_after(30):
        while True:
            lines = [json.loads(line) for line in stream.getvalue().splitlines()]
            serving = next((line for line in lines if line["event"] == "serving"), None)
            if serving is not None:
                break
            if ended.is_set():
                raise AssertionError(f"the appliance did not serve: {lines[-1]}")
            await trio.sleep(0.02)
    ready = next(line for line in lines if line["event"] == "engine_ready")
    return RunningAppliance(
        folder=folder,
        config=config,
        url=str(serving["urls"][0]),
        engine_port=int(ready["port"]),
        log_stream=stream,
        ended=ended,
        result=result,
    )


@dataclass
class RawResponse:
    """What came over the wire, to its very end."""

    status: int
    headers: dict[str, str]
    body: bytes
    clean: bool  # whether HTTP said that the body is whole


class RawConnection:
    """HTTP/1.1 over TLS by hand, for what a well-behaved client would not do or show."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream
        self.http = h11.Connection(h11.CLIENT)

    @classmethod
    @asynccontextmanager
    async def open(cls, appliance: RunningAppliance) -> AsyncIterator[RawConnection]:
        context = appliance.trust
        context.set_alpn_protocols(["http/1.1"])
        tcp = await trio.open_tcp_stream("127.0.0.1", appliance.port)
        stream = trio.SSLStream(tcp, context, server_hostname="127.0.0.1", https_compatible=True)
        try:
            await stream.do_handshake()
            yield cls(stream)
        finally:
            stream.transport_stream.socket.close()

    async def post(self, path: str, body: bytes, *headers: tuple[str, str]) -> None:
        request = h11.Request(
            method="POST",
            target=path,
            headers=[("host", "localhost"), ("content-length", str(len(body))), *headers],
        )
        data = self.http.send(request) or b""
        data += self.http.send(h11.Data(data=body)) or b""
        data += self.http.send(h11.EndOfMessage()) or b""
        await self.stream.send_all(data)

    async def read_some(self, at_least: int) -> bytes:
        """At least so many body bytes, or all there are."""
        body = b""
        while len(body) < at_least:
            event = await self.next_event()
            if isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                break
        return body

    async def read_response(self) -> RawResponse:
        status, headers, body = 0, dict[str, str](), b""
        while True:
            try:
                event = await self.next_event()
            except h11.RemoteProtocolError:
                return RawResponse(status, headers, body, clean=False)
            if isinstance(event, h11.Response):
                status = event.status_code
                headers = {name.decode(): value.decode() for name, value in event.headers}
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return RawResponse(status, headers, body, clean=True)
            elif isinstance(event, h11.ConnectionClosed):
                return RawResponse(status, headers, body, clean=False)

    async def next_event(self) -> Any:
        while True:
            event = self.http.next_event()
            if event is not h11.NEED_DATA:
                return event
            try:
                self.http.receive_data(bytes(await self.stream.receive_some(65_536)))
            except trio.BrokenResourceError:
                self.http.receive_data(b"")

    def drop(self) -> None:
        """Go away without a word."""
        self.stream.transport_stream.socket.close()
