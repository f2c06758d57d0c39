"""A stand-in for the SGLang server process: same command line, same wire dialect, chosen faults.

    python tests/fakes/sglang_engine.py --config FILE.yaml [--key value …] [--fake-mode MODE …]

The configuration is SGLang's, written as JSON (which is YAML). Unknown keys are accepted. Besides
SGLang's routes it serves three of its own, without authentication, for tests:

    GET  /_seen      the generation requests' bodies, in order, without their headers
    GET  /_state     pid, modes, running request ids, child pids, extra ports, left-over files
    POST /_control   {"set": {mode: argument}, "clear": [mode], "settings": {key: value}}

A mode comes from `--fake-mode`, from `/_control`, or, for one request, from the opening of its
prompt: `[[mode:slow:50]][[mode:crash_stream:3]] Hello`. The table `MODES` says what there is.
`[[think]]` makes the model reason first, `[[tool]]` makes it call the first tool.

This process deliberately behaves like a foreign program: it does not import the appliance.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import random
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import Final, NoReturn

import h11
import trio

# Run by path, so the first entry of sys.path is this directory and not the repository's.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fakes import sglang_dialect as dialect
from tests.fakes import sglang_model as model
from tests.fakes import sglang_request as asked
from tests.fakes.sglang_modes import Modes
from tests.fakes.sglang_request import Endpoint, JsonObject, JsonValue, Refused

_LOG_TRACEBACK: Final = """\
post-warmup freeze_gc failed
Traceback (most recent call last):
  File "/opt/engine/lib/python3.11/site-packages/requests/adapters.py", line 729, in send
    raise ConnectionError(e, request=request)
requests.exceptions.ConnectionError: HTTPConnectionPool(host='127.0.0.1', port=30000): refused"""
"""A traceback of every start with --skip-server-warmup, and nothing to worry about."""

# What a fault can do to an answer that has begun. The first five end it, streamed or whole.
_BREAKS: Final = (
    "hang_stream",
    "crash_stream",
    "reset_stream",
    "truncate_stream",
    "half_chunk",
)
_STREAM_FAULTS: Final = (*_BREAKS, "error_event", "garbage_event")


def log(message: str) -> None:
    """One line of SGLang's log."""
    print(time.strftime("[%Y-%m-%d %H:%M:%S]"), message, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------- command line


@dataclass(frozen=True, slots=True)
class CommandLine:
    """SGLang's settings under its own names (`api_key`), and the modes the process starts with."""

    settings: JsonObject
    modes: Modes


def parse_command_line(argv: list[str]) -> CommandLine:
    """Merge like SGLang: the file first, then the command line, which wins.

    Raises:
        ValueError: with SGLang's own text where the file is not what SGLang accepts.
    """
    settings: JsonObject = {}
    modes, rest = list[str](), list(argv)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        if key == "config":
            settings = {**_read_config(Path(value)), **settings}
        elif key == "fake_mode":
            modes.append(value)
        else:
            settings[key] = value or True
    return CommandLine(settings, Modes.parse(modes))


def _read_config(path: Path) -> JsonObject:
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"Config file must be YAML format, got: {path.suffix}")
    if not path.exists():
        raise ValueError(f"Config file not found: {path}")
    parsed: JsonValue = json.loads(path.read_text())
    if not isinstance(parsed, dict):
        raise ValueError("Config file must contain a dictionary at root level")
    return {key.replace("-", "_"): value for key, value in parsed.items()}


def wire_settings(settings: JsonObject) -> asked.Settings:
    """What of the launch settings shows on the wire."""

    def text(key: str) -> str | None:
        value = settings.get(key)
        return value if isinstance(value, str) and value else None

    return asked.Settings(
        served_model_name=text("served_model_name") or text("model_path") or "fake",
        context_length=int(str(settings.get("context_length") or 8192)),
        deterministic=str(settings.get("enable_deterministic_inference")).lower() == "true",
        tool_call_parser=text("tool_call_parser"),
        reasoning_parser=text("reasoning_parser"),
        model_path=text("model_path") or "fake",
        is_embedding=str(settings.get("is_embedding")).lower() == "true",
        is_matryoshka="is_matryoshka" in (text("json_model_override_args") or ""),
    )


# ----------------------------------------------------------------------------------- the process


@dataclass(slots=True)
class Running:
    """One generation: who may abort it, whether that happened, and whether the model is done.

    The model is done before the client has the end of the answer: from then on the request's id
    may be used again, and a disconnect aborts nothing.
    """

    rids: frozenset[str]
    aborted: trio.Event = field(default_factory=trio.Event)
    finished: bool = False


@dataclass(slots=True)
class Engine:
    """Everything the server remembers."""

    launch: JsonObject
    modes: Modes
    counters: dialect.Counters = field(default_factory=lambda: dialect.Counters(processed={}))
    running: list[Running] = field(default_factory=list)
    seen: list[JsonValue] = field(default_factory=list)
    children: list[JsonValue] = field(default_factory=list)
    left_over: list[JsonValue] = field(default_factory=list)
    mapped: list[mmap.mmap] = field(default_factory=list)
    extra_ports: list[JsonValue] = field(default_factory=list)
    draining: bool = False
    changed: trio.Event = field(default_factory=trio.Event)

    @property
    def settings(self) -> asked.Settings:
        return wire_settings(self.launch)

    def key(self, name: str) -> str | None:
        value = self.launch.get(name)
        return str(value) if value else None

    @property
    def active(self) -> list[Running]:
        return [running for running in self.running if not running.finished]

    def abort(self, rid: str, *, everything: bool) -> None:
        """SGLang matches whole ids, counts an id it knows once, and `abort_all` always."""
        chosen = [running for running in self.active if everything or rid in running.rids]
        fresh = [running for running in chosen if not running.aborted.is_set()]
        self.counters.aborted += 1 if everything or fresh else 0
        for running in fresh:
            running.aborted.set()

    def count_disconnect(self, running: Running) -> None:
        if not (running.finished or running.aborted.is_set()):
            self.counters.aborted += 1

    @contextlib.contextmanager
    def generating(self, rids: frozenset[str], *, stream: bool) -> Iterator[Running]:
        """Register a generation until its answer is on the wire.

        Raises:
            Refused: an id that is in use already.
        """
        if duplicate := {rid for other in self.active for rid in other.rids} & rids:
            raise asked.bad_request(f"Duplicate request ID detected: {min(duplicate)}")
        running = Running(rids)
        self.running.append(running)
        try:
            yield running
        finally:
            self.running.remove(running)
            self.counters.processed[stream] = self.counters.processed.get(stream, 0) + 1
            self.changed.set()
            self.changed = trio.Event()

    async def drained(self) -> None:
        """Wait, without a deadline, until nothing is being generated; new requests count too."""
        while self.running:
            await self.changed.wait()


def main() -> None:
    try:
        command_line = parse_command_line(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"ValueError: {error}")
    engine = Engine(launch=command_line.settings, modes=command_line.modes)
    trio.run(_run, engine)


async def _run(engine: Engine) -> None:
    """Load, bind, serve until SIGTERM, drain, exit. Before the port is bound SIGTERM just kills."""
    log(f"server_args={engine.launch!r}")
    async with trio.open_nursery() as nursery:
        for name in engine.modes.as_dict():
            await act(engine, nursery, name)
        await _load(engine)
        host, port = engine.launch.get("host", "127.0.0.1"), engine.launch.get("port", 30000)
        listeners = await trio.open_tcp_listeners(int(str(port)), host=str(host), backlog=2048)
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            nursery.start_soon(_serve, engine, nursery, listeners)
            log("The server is fired up and ready to roll!")
            nursery.start_soon(_exit_after, engine)
            async for _ in signals:
                _on_sigterm(engine, nursery)


def _on_sigterm(engine: Engine, nursery: trio.Nursery) -> None:
    """Begin to drain. Any further SIGTERM is only logged, as in SGLang."""
    if "late_sigterm" in engine.modes and not engine.seen:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    log("SIGTERM received. signum=None frame=None. Draining requests and shutting down...")
    if not (engine.draining or "ignore_sigterm" in engine.modes):
        engine.draining = True
        nursery.start_soon(_drain, engine, nursery.cancel_scope)


async def _drain(engine: Engine, process: trio.CancelScope) -> None:
    await engine.drained()
    log("Gracefully exiting... Remaining number of requests 0. Remaining requests []")
    process.cancel()


async def _load(engine: Engine) -> None:
    """Log what SGLang logs while it loads, over the time that was asked for."""
    pause = engine.modes.default("load") / 4
    log("Init torch distributed begin.")
    log("Load weight begin. avail mem=21.79 GB")
    bar = "Multi-thread loading shards: {:3d}% Completed | {}/2 [00:00<00:00, 4.00it/s]"
    for shard in range(3):
        await trio.sleep(pause)
        # tqdm redraws its line with carriage returns: progress has no newline until it ends.
        print("\r" + bar.format(shard * 50, shard), end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if "crash_start" in engine.modes:
        raise RuntimeError("Not enough memory. Please try to increase --mem-fraction-static.")
    log("Load weight end. elapsed=0.02 s, type=LlamaForCausalLM, avail mem=21.53 GB.")
    log("KV Cache is allocated. dtype: torch.bfloat16, #tokens: 16384, K size: 0.01 GB")
    log("Capture target decode CUDA graph begin. backend=full, num_tokens_per_req=1")
    await trio.sleep(pause)
    log("Capture target decode CUDA graph end. elapsed=0.1 s, mem usage=0.1 GB, avail mem=9.0 GB.")
    log(f"max_total_num_tokens=16384, context_len={engine.settings.context_length}")
    log(_LOG_TRACEBACK)
    if "hang_start" in engine.modes:
        await trio.sleep_forever()


async def act(engine: Engine, nursery: trio.Nursery, name: str) -> None:
    """Carry out a mode that is a deed rather than a condition."""
    match name:
        case "bind_all":
            [listener] = await trio.open_tcp_listeners(0, host="0.0.0.0")
            engine.extra_ports.append(int(listener.socket.getsockname()[1]))
            nursery.start_soon(trio.serve_listeners, trio.aclose_forcefully, [listener])
        case "spawn_children":
            engine.children += [_sleeper(own_session=own) for own in (False, True)]
        case "leak_shm":
            names = f"{secrets.token_hex(6)}_{secrets.token_hex(4)}"
            path = Path("/dev/shm") / f"sglang_loads_{names}.shm"
            path.write_bytes(bytes(16396))
            with path.open("r+b") as file:  # mapped for life, as by the real scheduler
                engine.mapped.append(mmap.mmap(file.fileno(), 0))
            engine.left_over.append(str(path))
        case "log_long_line":
            log("x" * int(engine.modes.number(name)))
        case "log_binary":
            sys.stdout.buffer.write(b"\xff\xfe not text \x80\x00\n")
            sys.stdout.flush()


def _sleeper(*, own_session: bool) -> int:
    """The pid of a child that outlives us."""
    return subprocess.Popen(["/bin/sleep", "600"], start_new_session=own_session).pid


async def _exit_after(engine: Engine) -> None:
    if "exit_after" in engine.modes:
        await trio.sleep(engine.modes.number("exit_after"))
        log("Scheduler hit an exception")
        os._exit(1)


async def _serve(
    engine: Engine, nursery: trio.Nursery, listeners: list[trio.SocketListener]
) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        await Server(engine, nursery, Connection(stream)).run()

    await trio.serve_listeners(handle, listeners)


# ------------------------------------------------------------------------------------------ HTTP


class Hangup(Exception):  # noqa: N818 - an instruction, not a mistake
    """Stop working on this connection; the socket is closed without another word."""


class EngineFaultError(Exception):
    """The scheduler gives up on this request."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request as read from the wire."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "")


class Connection:
    """One client's TCP stream and its HTTP/1.1 state."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.http = h11.Connection(h11.SERVER)
        self.modes = Modes()

    async def receive(self, *, idle_s: float) -> Call | None:
        """The next request; None when the client has gone, or begins none in `idle_s` seconds."""
        head: h11.Event | None = None
        with trio.move_on_after(idle_s):
            head = await self._event()
        if not isinstance(head, h11.Request):
            return None
        if self.http.they_are_waiting_for_100_continue:
            await self._send(
                h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            )
        body = bytearray()
        while isinstance(part := await self._event(), h11.Data):
            body += part.data
        headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
        path = head.target.decode("latin-1").partition("?")[0]
        return Call(head.method.decode(), path, headers, bytes(body))

    async def _event(self) -> h11.Event:
        while True:
            event = self.http.next_event()
            if isinstance(event, h11.Event):
                return event
            self.http.receive_data(await self.stream.receive_some(65536))

    async def disconnected(self) -> None:
        """Return when the client closes; what it pipelines meanwhile is kept for later."""
        try:
            while data := await self.stream.receive_some(65536):
                self.http.receive_data(data)
        except trio.BrokenResourceError:
            return

    async def respond(self, status: int, body: JsonValue | bytes, *, kind: str = "") -> None:
        """A whole response. Bytes go out as they are, anything else as JSON."""
        content = body if isinstance(body, bytes) else dialect.encode(body)
        kind = kind or ("" if isinstance(body, bytes) else "application/json")
        await self.head(status, kind, length=len(content))
        await self._send(h11.Data(data=content))
        await self.end()

    async def head(self, status: int, kind: str, *, length: int | None = None) -> None:
        headers = [("date", formatdate(usegmt=True)), ("server", "uvicorn")]
        headers += [("content-length", str(length))] if length is not None else []
        headers += [("content-type", kind)] if kind else []
        # The middleware that checks keys sits outside the one that knows of origins.
        headers += [("vary", "Origin")] if status != 401 else []
        reason = HTTPStatus(status).phrase
        response = h11.Response(status_code=status, headers=headers, reason=reason)
        if "slow_header" not in self.modes:
            await self._send(response)
            return
        for byte in self.http.send(response):
            await self.raw(bytes([byte]))
            await trio.sleep(self.modes.number("slow_header") / 1000)

    async def chunk(self, data: bytes) -> None:
        await self._send(h11.Data(data=data))

    async def end(self) -> None:
        await self._send(h11.EndOfMessage())

    async def _send(self, event: h11.Event) -> None:
        if data := self.http.send(event):
            await self.raw(data)

    async def raw(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def refuse_protocol(self) -> None:
        """What uvicorn says to bytes that are not HTTP; the client may well have gone."""
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\n"
        text = "Connection: close\r\n\r\nInvalid HTTP request received."
        with contextlib.suppress(trio.BrokenResourceError):
            await self.raw(f"{head}{text}".encode())

    async def reset(self) -> NoReturn:
        linger = struct.pack("ii", 1, 0)
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        raise Hangup


class Server:
    """The requests of one connection, one after another."""

    def __init__(self, engine: Engine, nursery: trio.Nursery, connection: Connection) -> None:
        self.engine = engine
        self.nursery = nursery
        self.connection = connection

    async def run(self) -> None:
        idle_s = math.inf
        async with self.connection.stream:
            try:
                while call := await self.connection.receive(idle_s=idle_s):
                    await self._answer(call)
                    if self.connection.http.our_state is h11.MUST_CLOSE:
                        return
                    self.connection.http.start_next_cycle()
                    # Uvicorn gives up on silence only after the connection's first request.
                    idle_s = self.engine.modes.default("keep_alive")
            except h11.RemoteProtocolError:
                await self.connection.refuse_protocol()
            except (Hangup, trio.BrokenResourceError):
                return

    async def _answer(self, call: Call) -> None:
        self.connection.modes = self.engine.modes
        try:
            self._authorize(call)
            await self._route(call)
        except Refused as refused:
            await self._refuse(refused)
        except ValueError as error:
            await self._refuse(asked.bad_request(str(error)))

    async def _refuse(self, refused: Refused) -> None:
        if isinstance(refused.body, str):
            kind = "text/plain; charset=utf-8"
            await self.connection.respond(refused.status, refused.body.encode(), kind=kind)
        else:
            await self.connection.respond(refused.status, refused.body)

    def _authorize(self, call: Call) -> None:
        """SGLang's rules: prefixes that are always open, one key for all, one for the admin."""
        if call.method == "OPTIONS" or re.match(r"/(health|ready|metrics|_)", call.path):
            return
        key, admin = self.engine.key("api_key"), self.engine.key("admin_api_key")
        expected = admin if admin and call.path == "/abort_request" else key
        scheme, _, token = call.headers.get("authorization", "").partition(" ")
        if expected and not (
            scheme.lower() == "bearer" and secrets.compare_digest(token, expected)
        ):
            raise Refused(401, {"error": "Unauthorized"})

    async def _route(self, call: Call) -> None:
        methods = self._routes(call).get(call.path)
        if methods is None:
            if call.path.startswith("/v1/models/"):
                raise asked.unknown_model(call.path.removeprefix("/v1/models/"))
            raise Refused(404, {"detail": "Not Found"})
        if call.method not in methods:
            raise Refused(405, {"detail": "Method Not Allowed"})
        await methods[call.method]()

    def _routes(self, call: Call) -> Mapping[str, Mapping[str, Callable[[], Awaitable[None]]]]:
        respond, engine, settings = self.connection.respond, self.engine, self.engine.settings
        created = int(time.time())
        card = dialect.model_card(settings, created=created)
        text = "text/plain; version=0.0.4; charset=utf-8"
        numbers = dialect.metrics(engine.counters, settings, running=len(engine.active)).encode()
        return {
            "/ready": {"GET": self._ready},
            "/ping": {"GET": lambda: respond(503 if engine.draining else 200, b"")},
            "/health": {"GET": self._health},
            "/health_generate": {"GET": self._health},
            "/metrics": {"GET": lambda: respond(200, numbers, kind=text)},
            "/model_info": {
                "GET": lambda: respond(
                    200, dialect.model_info(settings, settings.served_model_name)
                )
            },
            "/server_info": {
                "GET": lambda: respond(200, {**engine.launch, "version": dialect.VERSION})
            },
            "/v1/models": {"GET": lambda: respond(200, {"object": "list", "data": [card]})},
            f"/v1/models/{settings.served_model_name}": {"GET": lambda: respond(200, card)},
            "/v1/tokenize": {"POST": lambda: respond(200, dialect.tokenized(call.body, settings))},
            "/abort_request": {"POST": lambda: self._abort(call)},
            Endpoint.CHAT.path: {"POST": lambda: self._generate(Endpoint.CHAT, call)},
            Endpoint.COMPLETIONS.path: {"POST": lambda: self._generate(Endpoint.COMPLETIONS, call)},
            Endpoint.EMBEDDINGS.path: {"POST": lambda: self._generate(Endpoint.EMBEDDINGS, call)},
            "/_seen": {"GET": lambda: respond(200, engine.seen)},
            "/_state": {"GET": lambda: respond(200, self._state())},
            "/_control": {"POST": lambda: self._control(call)},
        }

    # - state -

    async def _ready(self) -> None:
        if "stop_health" in self.engine.modes:
            await trio.sleep_forever()
        await self.connection.respond(503 if self.engine.draining else 200, b"")

    async def _health(self) -> None:
        if "stop_health" in self.engine.modes:
            await trio.sleep_forever()
        if not self.engine.draining:
            await trio.sleep(self.engine.modes.default("health_delay"))
        await self.connection.respond(503 if self.engine.draining else 200, b"")

    async def _abort(self, call: Call) -> None:
        wanted = _object(call.body)
        everything = wanted.get("abort_all") is True
        self.engine.abort(str(wanted.get("rid") or ""), everything=everything)
        await self.connection.respond(200, b"")

    def _state(self) -> JsonObject:
        return {
            "pid": os.getpid(),
            "modes": dict[str, JsonValue](self.engine.modes.as_dict()),
            "running": list[JsonValue](sorted(r for run in self.engine.active for r in run.rids)),
            "children": self.engine.children,
            "extra_ports": self.engine.extra_ports,
            "left_over": self.engine.left_over,
        }

    async def _control(self, call: Call) -> None:
        wanted = _object(call.body)
        chosen, cleared, settings = (wanted.get(name) for name in ("set", "clear", "settings"))
        for name in cleared if isinstance(cleared, list) else []:
            self.engine.modes.clear(str(name))
        if isinstance(settings, dict):
            self.engine.launch |= {key.replace("-", "_"): value for key, value in settings.items()}
        for name, argument in chosen.items() if isinstance(chosen, dict) else []:
            self.engine.modes.set(name, "" if argument is None else str(argument))
            await act(self.engine, self.nursery, name)
            if name == "exit_after":
                self.nursery.start_soon(_exit_after, self.engine)
        await self.connection.respond(200, self._state())

    # - generation -

    async def _generate(self, endpoint: Endpoint, call: Call) -> None:
        """Parse, decide the whole answer, then say it for as long as the client listens."""
        settings = self.engine.settings
        with contextlib.suppress(ValueError):
            self.engine.seen.append(json.loads(call.body))
        request = asked.parse_request(
            endpoint, call.body, content_type=call.content_type, settings=settings
        )
        marked = (mark.removeprefix("mode:") for mark in request.marks if mark.startswith("mode:"))
        modes = self.connection.modes = Modes.parse(marked).over(self.engine.modes)
        if "log_prompt" in modes:
            log(f"Receive: prompt={request.prompts!r}")
        choices = model.generate(
            request,
            replace(settings, deterministic=False) if "not_deterministic" in modes else settings,
            entropy=secrets.randbits(64),
            new_id=lambda: secrets.token_hex(16),
            length=int(modes.number("long")) if "long" in modes else None,
        )
        if "huge_body" in modes:
            choices = [_huge(choice, int(modes.number("huge_body"))) for choice in choices]
        answer = Answer(self.connection, modes, settings, request, choices)
        rids = frozenset(choice.rid for choice in choices)
        with self.engine.generating(rids, stream=request.stream) as running:
            await self._while_connected(answer, running)

    async def _while_connected(self, answer: Answer, running: Running) -> None:
        """Say the answer; stop at once, and count an abort, when the client closes."""
        gone, failure = False, None

        async def watch(scope: trio.CancelScope) -> None:
            nonlocal gone
            await self.connection.disconnected()
            if not answer.request.stream:
                # The real one polls only every 4 s while a request that does not stream runs.
                await trio.sleep(answer.modes.number("lazy_disconnect") / 1000)
            gone = True
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            try:
                await answer.say(running)
            except trio.BrokenResourceError:
                gone = True
            except (Hangup, Refused) as error:
                failure = error
            nursery.cancel_scope.cancel()
        if gone:
            self.engine.count_disconnect(running)
        if gone or failure:
            raise failure or Hangup


def _object(body: bytes) -> JsonObject:
    parsed: JsonValue = json.loads(body or b"{}")
    return parsed if isinstance(parsed, dict) else {}


def _huge(choice: model.Choice, mebibytes: int) -> model.Choice:
    text = "x" * (mebibytes << 20)
    piece = model.Piece(model.Part.CONTENT, text, text)
    return replace(choice, pieces=(piece,))


# --------------------------------------------------------------------------------- saying answers


class Answer:
    """One answer on its way out, at the pace and with the faults that its modes ask for."""

    def __init__(
        self,
        connection: Connection,
        modes: Modes,
        settings: asked.Settings,
        request: asked.Request,
        choices: list[model.Choice],
    ) -> None:
        self.connection = connection
        self.modes = modes
        self.settings = settings
        self.request = request
        self.choices = choices
        self._created = int(time.time())
        self._sent = 0
        self._faults = [name for name in _STREAM_FAULTS if name in modes]
        self._joined = bytearray()
        self._cuts = random.Random(modes.number("split"))

    async def say(self, running: Running) -> None:
        await self._misbehave()
        if error := asked.grammar_error(self.request):
            await self._refuse_late(error)
        elif self.request.stream:
            await self._say_events(running)
        else:
            await self._say_whole(running)

    async def _refuse_late(self, error: str) -> None:
        if not self.request.stream:
            raise asked.bad_request(error)
        await self.connection.head(200, "text/event-stream; charset=utf-8")
        await self.connection.chunk(dialect.error_event(error, kind="BAD_REQUEST", code=400))
        await self.connection.chunk(dialect.DONE)
        await self.connection.end()

    async def _misbehave(self) -> None:
        """The faults that come instead of any answer."""
        prompt = self.request.prompts[0]
        if "http_400" in self.modes:
            raise asked.bad_request(f"Failed to compile json grammar for {prompt!r}")
        if "http_500" in self.modes:
            traceback = 'Traceback (most recent call last):\n  File "/opt/engine/scheduler.py"'
            raise asked.internal_error(f"{traceback}\nRuntimeError: failed on {prompt!r}")
        if "garbage" in self.modes:
            await self.connection.raw(b"\x16\x03\x01\x02\x00 this is not HTTP \xff\xfe\r\n\r\n")
            raise Hangup
        if "endless_header" in self.modes:
            await self.connection.raw(b"HTTP/1.1 200 OK\r\n")
            while True:
                await self.connection.raw(b"x-filler: " + b"a" * 4096 + b"\r\n")
                await trio.sleep(0.001)

    async def _say_whole(self, running: Running) -> None:
        spoken = 0
        longest = max(len(choice.pieces) for choice in self.choices)
        while spoken < longest and not await self._pause(spoken, running.aborted):
            spoken += 1
        choices = [choice.cut(spoken) for choice in self.choices]
        body = dialect.encode(
            dialect.answer(self.request, choices, created=self._created, settings=self.settings)
        )
        await self._spoil_whole(body)
        running.finished = True
        await self.connection.respond(200, body, kind="application/json")

    async def _spoil_whole(self, body: bytes) -> None:
        """The stream faults that have a meaning for a whole answer."""
        if "error_event" in self.modes:
            raise asked.internal_error(f"generation failed for {self.request.prompts[0]!r}")
        for name in _BREAKS:
            if name in self.modes:
                await self.connection.head(200, "application/json", length=len(body))
                await self.connection.raw(body[: len(body) // 2])
                await self._strike(name)

    async def _say_events(self, running: Running) -> None:
        events = dialect.EventStream(
            self.request, self.choices, created=self._created, settings=self.settings
        )
        # Like the real one, wait for the first token before saying 200.
        stopped, spoken = await self._pause(0, running.aborted), 0
        await self.connection.head(200, "text/event-stream; charset=utf-8")
        try:
            while not (stopped or events.exhausted()):
                for event in events.step():
                    await self._event(event)
                spoken += 1
                stopped = not events.exhausted() and await self._pause(spoken, running.aborted)
            running.finished = True
            for event in events.finish():
                await self._event(event)
        except EngineFaultError as fault:
            for event in events.fail(str(fault)):
                await self._write(event)
        await self._flush()
        await self.connection.end()

    async def _pause(self, spoken: int, aborted: trio.Event) -> bool:
        """Take the time of one token; True when the request was aborted meanwhile."""
        delay = self.modes.number("slow")
        delay += self.modes.number("first_token_delay") if spoken == 0 else 0
        if delay == 0:
            # Still a checkpoint once in a while, so that 256 streams share one thread fairly.
            if self.request.stream or spoken % 256 == 0:
                await trio.lowlevel.checkpoint()
            return aborted.is_set()
        with trio.move_on_after(delay / 1000):
            await aborted.wait()
        return aborted.is_set()

    async def _event(self, event: bytes) -> None:
        if event == dialect.DONE and "no_done" in self.modes:
            return
        for name in self._faults:
            # An answer that is shorter than the test thought still does not end well.
            if self._sent >= self.modes.number(name) or event == dialect.DONE:
                self._faults.remove(name)
                await self._flush()
                await self._strike(name)
                break
        self._sent += 1
        await self._write(event)

    async def _strike(self, name: str) -> None:
        """One fault. Only `garbage_event` returns."""
        match name:
            case "hang_stream":
                await trio.sleep_forever()
            case "crash_stream":
                os.kill(os.getpid(), signal.SIGKILL)
            case "reset_stream":
                await self.connection.reset()
            case "truncate_stream":
                raise Hangup
            case "half_chunk":
                await self.connection.raw(b'400\r\ndata: {"id":"cut')
                raise Hangup
            case "error_event":
                raise EngineFaultError(f"Scheduler failed on {self.request.prompts[0]!r}")
            case "garbage_event":
                await self._write(b'data: {"id": not json\n\n')

    async def _write(self, event: bytes) -> None:
        if "split" not in self.modes:
            await self.connection.chunk(event)
            return
        self._joined += event
        while len(self._joined) > 600:
            await self._write_cut(self._cuts.randrange(1, 500))

    async def _flush(self) -> None:
        while self._joined:
            await self._write_cut(self._cuts.randrange(1, 200))

    async def _write_cut(self, size: int) -> None:
        """One chunk that begins and ends anywhere, in several writes that do so too."""
        data, self._joined = bytes(self._joined[:size]), self._joined[size:]
        wire = self.connection.http.send(h11.Data(data=data)) or b""
        while wire:
            cut = self._cuts.randrange(1, 90)
            await self.connection.raw(wire[:cut])
            wire = wire[cut:]
            await trio.lowlevel.checkpoint()


if __name__ == "__main__":
    main()
