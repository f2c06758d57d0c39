"""What SGLang 0.5.23 says: answers, stream events and the other routes' bodies.

Pure. Shapes, key order and null members were recorded from a running server. Three serializers
take part, so chat chunks leave out what completions and tool calls send as null; an error inside a
stream *is* nested and spaced, unlike any other error, and `[DONE]` follows it.
"""

from __future__ import annotations

import base64
import json
import math
import random
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from tests.fakes.sglang_model import (
    ABORTED,
    Choice,
    Finish,
    Part,
    Piece,
    digest,
    runners_up,
    token_id,
)
from tests.fakes.sglang_request import (
    Endpoint,
    JsonObject,
    JsonValue,
    Request,
    Settings,
    ToolCall,
    count_tokens,
    error_body,
    object_of,
    texts_of,
    tokens_of,
)

VERSION: Final = "0.5.23"
HIDDEN_SIZE: Final = 16
"""Of this model's embeddings; SmolLM2's have 576 numbers."""
DONE: Final = b"data: [DONE]\n\n"


# --------------------------------------------------------------------------------------- answers


def answer(
    request: Request, choices: list[Choice], *, created: int, settings: Settings
) -> JsonObject:
    """The body of a request that did not stream. Aborted choices are ordinary ones: 200."""
    if request.endpoint is Endpoint.EMBEDDINGS:
        return _embeddings(request, choices, settings)
    chat = request.endpoint is Endpoint.CHAT
    rendered: list[JsonValue] = [
        _chat_choice(request, choice) if chat else _text_choice(request, choice)
        for choice in choices
    ]
    span: JsonObject = {"version": "default", "start": 0, "end": len(choices[0].pieces)}
    return {
        "id": choices[0].rid,
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": request.model,
        "choices": rendered,
        "usage": _usage(request, choices, settings),
        "metadata": {"weight_version": "default", "weight_versions": [span]},
    }


def _embeddings(request: Request, choices: list[Choice], settings: Settings) -> JsonObject:
    """Decimal digits that give back each binary32, or base64 of them; and the model's folder."""
    data: list[JsonValue] = []
    for index, choice in enumerate(choices):
        # What was sampled stands for what the model computes: of one text the same again.
        seed = digest(choice.prompt + choice.text(Part.CONTENT))
        size = request.dimensions or HIDDEN_SIZE
        raw = struct.pack(f"<{size}f", *_direction(seed, size))
        numbers: list[JsonValue] = list(struct.unpack(f"<{size}f", raw))
        encoded = base64.b64encode(raw).decode()
        told = encoded if request.encoding_format == "base64" else numbers
        data.append({"embedding": told, "index": index, "object": "embedding"})
    count = sum(count_tokens(choice.prompt) for choice in choices)
    usage: JsonObject = {
        "prompt_tokens": count,
        "total_tokens": count,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
        "reasoning_tokens": 0,
        "completion_tokens_details": None,
    }
    return {"data": data, "model": settings.model_path, "object": "list", "usage": usage}


def _direction(seed: object, size: int) -> list[float]:
    """A vector of length 1 (normalize=True)."""
    chance = random.Random(str(seed))
    numbers = [chance.gauss() for _ in range(size)]
    length = math.hypot(*numbers)
    return [number / length for number in numbers]


def _chat_choice(request: Request, choice: Choice) -> JsonObject:
    message: JsonObject = {
        "role": "assistant",
        "content": choice.text(Part.CONTENT),
        "reasoning_content": choice.text(Part.REASONING) or None,
    }
    finish = choice.finish
    if isinstance(request.output, ToolCall) and (arguments := choice.text(Part.ARGUMENTS)):
        message["tool_calls"] = [_call(choice.call_id, request.output.name, arguments)]
        finish = _call_finish(finish)
    return {
        "index": choice.index,
        "message": message,
        "logprobs": _chat_logprobs(request, choice.pieces),
        "finish_reason": finish.reason,
        "matched_stop": finish.matched,
    }


def _call(call_id: str | None, name: str | None, arguments: str) -> JsonObject:
    function: JsonObject = {"name": name, "arguments": arguments}
    return {"id": call_id, "index": 0, "type": "function", "function": function}


def _call_finish(finish: Finish) -> Finish:
    return Finish("tool_calls", None) if finish.reason == "stop" else finish


def _text_choice(request: Request, choice: Choice) -> JsonObject:
    return {
        "index": choice.index,
        "text": (choice.prompt if request.echo else "") + choice.text(Part.CONTENT),
        "logprobs": _text_logprobs(request, choice, choice.pieces),
        "finish_reason": choice.finish.reason,
        "matched_stop": choice.finish.matched,
    }


def _usage(request: Request, choices: list[Choice], settings: Settings) -> JsonObject:
    """Prompt tokens count once a prompt, however many choices it has."""
    prompt = sum(count_tokens(choice.prompt) for choice in choices[:: request.n])
    completion = sum(len(choice.pieces) for choice in choices)
    thought = sum(1 for c in choices for piece in c.pieces if piece.part is Part.REASONING)
    thought = thought if settings.reasoning_parser else 0
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": None,
        "reasoning_tokens": thought,
        "completion_tokens_details": {"reasoning_tokens": thought} if thought else None,
    }


def _logprob(token: str, rank: int = 0) -> float:
    return -(digest("logprob", token) % 1000) / 4000 - rank * 1.5


def _chat_logprobs(request: Request, pieces: Iterable[Piece]) -> JsonObject | None:
    if request.logprobs is None:
        return None
    content: list[JsonValue] = []
    for piece in pieces:
        top: list[JsonValue] = [
            _token_logprob(token, _logprob(piece.token, rank))
            for rank, token in enumerate(runners_up(piece.token, request.logprobs))
        ]
        content.append({**_token_logprob(piece.token, _logprob(piece.token)), "top_logprobs": top})
    return {"content": content}


def _token_logprob(token: str, logprob: float) -> JsonObject:
    return {"token": token, "bytes": list(token.encode()), "logprob": logprob}


def _text_logprobs(request: Request, choice: Choice, pieces: Iterable[Piece]) -> JsonObject | None:
    """The legacy shape. With `echo`, a count above 0 adds the prompt's tokens; offsets are -1."""
    if request.logprobs is None:
        return None
    tokens = [piece.token for piece in pieces]
    known: list[JsonValue] = [_logprob(token) for token in tokens]
    if request.echo and request.logprobs:
        prompt = tokens_of(choice.prompt)
        known = [None, *(_logprob(token) for token in prompt[1:]), *known]
        tokens = [*prompt, *tokens]
    top: list[JsonValue] = [
        None if logprob is None else _top_map(token, request.logprobs)
        for token, logprob in zip(tokens, known, strict=True)
    ]
    return {
        "text_offset": [-1] * len(tokens),
        "token_logprobs": known,
        "tokens": list[JsonValue](tokens),
        "top_logprobs": top if request.logprobs else [],
    }


def _top_map(token: str, count: int) -> JsonObject:
    return {other: _logprob(token, rank) for rank, other in enumerate(runners_up(token, count))}


# ---------------------------------------------------------------------------------------- events


def error_event(message: str, *, kind: str = "INTERNAL_SERVER_ERROR", code: int = 500) -> bytes:
    """An error inside a stream: nested, unlike everywhere else, and not the end of the stream."""
    text = json.dumps({"error": error_body(message, kind=kind, code=code)})
    return f"data: {text}\n\n".encode()


class EventStream:
    """The server-sent events of one answer, one token of every choice at a time.

    `step` until `exhausted`, then `finish`; or `finish` early, and what was not yet said is
    reported as aborted. Chunks of one answer carry their own choice's id; whatever is sent after
    the last token carries the id that happened to come last.
    """

    def __init__(
        self, request: Request, choices: list[Choice], *, created: int, settings: Settings
    ) -> None:
        self._request = request
        self._choices = choices
        self._created = created
        self._settings = settings
        self._position = 0
        self._opened: set[int] = set()
        self._called: set[int] = set()
        self._last_id = choices[0].rid

    def exhausted(self) -> bool:
        return all(self._position >= len(choice.pieces) for choice in self._choices)

    def step(self) -> Iterator[bytes]:
        chat = self._request.endpoint is Endpoint.CHAT
        for choice in self._choices:
            if self._position < len(choice.pieces):
                self._last_id = choice.rid
                yield from self._chat_chunks(choice) if chat else self._text_chunk(choice)
        self._position += 1

    def finish(self) -> Iterator[bytes]:
        choices = [choice.cut(self._position) for choice in self._choices]
        for choice in choices:
            if self._request.endpoint is Endpoint.CHAT:
                yield from self._chat_finish(choice)
            elif choice.finish is ABORTED or not choice.pieces:
                yield self._chunk([self._text_delta(choice, "", None, choice.finish)])
        yield from self._ending(choices)

    def fail(self, message: str) -> Iterator[bytes]:
        """What SGLang sends when the scheduler gives up on a request: an error, then business as
        usual: the usage if it was asked for, and `[DONE]`."""
        yield error_event(message)
        yield from self._ending([choice.cut(self._position) for choice in self._choices])

    def _ending(self, choices: list[Choice]) -> Iterator[bytes]:
        if self._request.include_usage:
            usage = _usage(self._request, choices, self._settings)
            if self._request.endpoint is Endpoint.COMPLETIONS:
                usage = {name: value for name, value in usage.items() if value is not None}
            yield self._chunk([], usage=usage)
        yield DONE

    def _chat_chunks(self, choice: Choice) -> Iterator[bytes]:
        piece = choice.pieces[self._position]
        logprobs = _chat_logprobs(self._request, [piece])
        if choice.index not in self._opened:
            yield self._open(choice)
        delta: JsonObject = {"reasoning_content": None}
        match piece.part:
            case Part.ARGUMENTS:
                yield from self._call_chunks(choice, piece)
            case Part.REASONING:
                delta = {"reasoning_content": piece.text}
            case Part.CONTENT:
                delta |= {"content": piece.text} if piece.text else {}
        said = piece.text and piece.part is not Part.ARGUMENTS
        # A token that said nothing has no chunk, and its log probability is lost, unless the
        # server runs a parser: then an empty delta carries it.
        parsed = self._settings.tool_call_parser or self._settings.reasoning_parser
        if said or (logprobs and parsed):
            yield self._chunk([_delta(choice, delta, logprobs)], usage=self._running_usage(choice))

    def _open(self, choice: Choice) -> bytes:
        self._opened.add(choice.index)
        delta: JsonObject = {"reasoning_content": None, "role": "assistant", "content": ""}
        return self._chunk([_delta(choice, delta, None)])

    def _call_chunks(self, choice: Choice, piece: Piece) -> Iterator[bytes]:
        """Tool calls come from another serializer: every member is there, null or not."""
        calls = [_call(None, None, piece.text)]
        if choice.index not in self._called and isinstance(self._request.output, ToolCall):
            self._called.add(choice.index)
            calls.insert(0, _call(choice.call_id, self._request.output.name, ""))
        for call in calls:
            delta: JsonObject = {"role": None, "content": None, "reasoning_content": None}
            chunk = _delta(choice, delta | {"tool_calls": [call]}, None)
            yield self._chunk([chunk], null_usage=True)

    def _chat_finish(self, choice: Choice) -> Iterator[bytes]:
        if choice.index not in self._opened:
            yield self._open(choice)
        finish = _call_finish(choice.finish) if choice.index in self._called else choice.finish
        rendered = _delta(choice, {"reasoning_content": None}, None)
        matched = choice.finish.matched
        rendered |= {"finish_reason": finish.reason, "matched_stop": matched}
        yield self._chunk([rendered])

    def _text_chunk(self, choice: Choice) -> Iterator[bytes]:
        piece, last = choice.pieces[self._position], self._position + 1 == len(choice.pieces)
        first_with_echo = self._position == 0 and self._request.echo
        logprobs = _text_logprobs(
            self._request if first_with_echo else replace(self._request, echo=False),
            choice,
            [piece],
        )
        text = (choice.prompt if first_with_echo else "") + piece.text
        rendered = self._text_delta(choice, text, logprobs, choice.finish if last else None)
        yield self._chunk([rendered], usage=self._running_usage(choice), null_usage=True)

    def _text_delta(
        self, choice: Choice, text: str, logprobs: JsonObject | None, finish: Finish | None
    ) -> JsonObject:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish.reason if finish else None,
            "matched_stop": finish.matched if finish else None,
        }

    def _running_usage(self, choice: Choice) -> JsonObject | None:
        if not self._request.continuous_usage:
            return None
        so_far = choice.cut(self._position + 1)
        return _usage(replace(self._request, n=1), [so_far], self._settings)

    def _chunk(
        self,
        choices: list[JsonValue] | list[JsonObject],
        *,
        usage: JsonObject | None = None,
        null_usage: bool = False,
    ) -> bytes:
        chat = self._request.endpoint is Endpoint.CHAT
        chunk: JsonObject = {
            "id": self._last_id,
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": self._created,
            "model": self._request.model,
            "choices": list[JsonValue](choices),
        }
        if usage is not None or null_usage:
            chunk["usage"] = usage
        return b"data: " + encode(chunk) + b"\n\n"


def _delta(choice: Choice, delta: JsonObject, logprobs: JsonObject | None) -> JsonObject:
    return {
        "index": choice.index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": None,
        "matched_stop": None,
    }


# ------------------------------------------------------------------------------------ the others


def encode(value: JsonValue) -> bytes:
    """SGLang's JSON: compact, and UTF-8 rather than escapes."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def model_card(settings: Settings, *, created: int) -> JsonObject:
    return {
        "id": settings.served_model_name,
        "object": "model",
        "created": created,
        "owned_by": "sglang",
        "root": settings.served_model_name,
        "parent": None,
        "max_model_len": settings.context_length,
    }


def model_info(settings: Settings, model_path: str) -> JsonObject:
    return {
        "model_path": model_path,
        "served_model_name": settings.served_model_name,
        "tokenizer_path": model_path,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "load_format": "auto",
        "reasoning_parser": settings.reasoning_parser,
        "tool_call_parser": settings.tool_call_parser,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }


def tokenized(body: bytes, settings: Settings) -> JsonObject:
    """`/v1/tokenize` of a string or of a list of them."""
    prompt = object_of(json.loads(body)).get("prompt")
    rows = [[token_id(t) for t in tokens_of(text)] for text in texts_of(prompt)]
    single = isinstance(prompt, str)
    return {
        "tokens": list[JsonValue](rows[0]) if single else [list[JsonValue](row) for row in rows],
        "count": len(rows[0]) if single else [len(row) for row in rows],
        "max_model_len": settings.context_length,
    }


@dataclass(slots=True)
class Counters:
    """What `/metrics` adds up. SGLang counts an aborted request as processed, too."""

    processed: dict[bool, int]
    aborted: int = 0


def metrics(counters: Counters, settings: Settings, *, running: int) -> str:
    """Prometheus text. A counter that never counted is not there at all, not even as zero."""
    model = f'model_name="{settings.served_model_name}"'
    ranked = f'engine_type="unified",{model},moe_ep_rank="0",pp_rank="0",tp_rank="0"'
    lines = [
        "# HELP sglang:num_running_reqs The number of running requests.",
        "# TYPE sglang:num_running_reqs gauge",
        f"sglang:num_running_reqs{{{ranked}}} {float(running)}",
    ]
    if counters.processed:
        lines += [
            "# HELP sglang:num_requests_total Number of requests processed.",
            "# TYPE sglang:num_requests_total counter",
        ]
    for streaming, count in sorted(counters.processed.items()):
        labels = f'engine_type="unified",is_streaming="{str(streaming).lower()}",{model}'
        lines.append(f"sglang:num_requests_total{{{labels}}} {float(count)}")
    if counters.aborted:
        lines += [
            "# HELP sglang:num_aborted_requests_total Number of requests aborted.",
            "# TYPE sglang:num_aborted_requests_total counter",
            f'sglang:num_aborted_requests_total{{engine_type="unified",{model}}} {float(counters.aborted)}',
        ]
    return "\n".join(lines) + "\n"
