"""The model behind the stand-in engine: a checked request in, every token of its answer out.

Pure: the same prompt, temperature and effective seed give the same tokens. As in SGLang, `seed`
means something only in deterministic mode, and there its default is 42; `n > 1` gives every choice
the same seed, so the same text, and loses `rid`; tool calls and reasoning are told apart from
content only if the server was started with their parsers.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, NamedTuple

from tests.fakes.sglang_request import (
    JsonObject,
    JsonText,
    JsonValue,
    Prose,
    Request,
    Settings,
    ToolCall,
    count_tokens,
    list_of,
    object_of,
    tokens_of,
    whole_of,
)

DEFAULT_SEED: Final = 42
"""What deterministic mode samples with when the request has no seed (sampling_batch_info.py)."""
EOS_ID: Final = 2
"""SmolLM2's `<|im_end|>`: a natural stop reports it as `matched_stop`, a number among strings."""
EOS_TEXT: Final = "<|im_end|>"
# Some words are not ASCII, so that a careless split of a stream breaks a character.
_WORDS: Final = (  # noqa: SIM905 - forty words on three lines, not on forty
    "the river city house sun moon light and in to was that he she it for on with as sea wind small "
    "old bright quiet road stone green early often never between under café naïve Zürich 東京 "
    "Ελλάδα мир 🌊"
).split()


class Part(Enum):
    """Where a token belongs in the answer."""

    CONTENT = "content"
    REASONING = "reasoning"
    ARGUMENTS = "arguments"


class Piece(NamedTuple):
    """One generated token: what it adds to the answer, and its own text in log probabilities.

    They differ where SGLang trims: at the end-of-sequence token and around a stop string.
    """

    part: Part
    text: str
    token: str


class Finish(NamedTuple):
    """Why generation ended; `matched` is the stop string, or the end token's number."""

    reason: str
    matched: int | str | None


ABORTED: Final = Finish("abort", None)


@dataclass(frozen=True, slots=True)
class Choice:
    """One generated answer, decided in full before its first token is sent."""

    index: int
    rid: str
    call_id: str
    prompt: str
    pieces: tuple[Piece, ...]
    finish: Finish

    def text(self, part: Part) -> str:
        return "".join(piece.text for piece in self.pieces if piece.part is part)

    def cut(self, count: int) -> Choice:
        """What is left when it is aborted after `count` tokens."""
        if count >= len(self.pieces):
            return self
        return replace(self, pieces=self.pieces[:count], finish=ABORTED)


def generate(
    request: Request,
    settings: Settings,
    *,
    entropy: int,
    new_id: Callable[[], str],
    length: int | None = None,
) -> list[Choice]:
    """Every choice of every prompt, in SGLang's order: all of the first prompt's, then the next's.

    Args:
        entropy: what sampling depends on without deterministic mode; 64 random bits.
        new_id: a fresh hexadecimal id for each call.
        length: a test's own answer length in tokens, whatever the request says.
    """
    sequence = [prompt for prompt in request.prompts for _ in range(request.n)]
    return [
        Choice(
            index=index,
            rid=_rid(request, index) or new_id(),
            call_id=f"call_{new_id()[:24]}",
            prompt=prompt,
            pieces=pieces,
            finish=finish,
        )
        for index, prompt in enumerate(sequence)
        for pieces, finish in [_run(request, settings, prompt, entropy + index, length)]
    ]


def _rid(request: Request, index: int) -> str | None:
    """`rid` is the answer's id only for one answer; a list of prompts numbers it, `n` drops it."""
    if request.rid is None or request.n > 1:
        return None
    return request.rid if len(request.prompts) == 1 else f"{request.rid}_{index}"


def _run(
    request: Request, settings: Settings, prompt: str, entropy: int, length: int | None
) -> tuple[tuple[Piece, ...], Finish]:
    room = settings.context_length - count_tokens(prompt)
    limit = room if request.max_tokens is None else request.max_tokens
    seed = DEFAULT_SEED if request.seed is None else request.seed
    # Greedy decoding has no seed; without deterministic mode SGLang drops the request's silently.
    effective = 0 if not request.temperature else seed if settings.deterministic else entropy
    source = random.Random(digest(prompt, str(request.temperature), str(effective)))
    if length is not None:
        return tuple(_prose_pieces(source, length)), Finish("length", None)
    pieces = [
        *_thoughts(request, settings, source),
        *_answer_pieces(request, settings, prompt, source),
    ]
    if request.ignore_eos:
        pieces += _prose_pieces(source, limit - len(pieces))
    else:
        pieces.append(Piece(Part.CONTENT, "", EOS_TEXT))
    limited = pieces[:limit]
    finish = Finish("length", None) if len(limited) < len(pieces) or request.ignore_eos else None
    return _stopped(limited, request.stop, finish or Finish("stop", EOS_ID))


def digest(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode(errors="replace")).digest(), "big")


def _answer_pieces(
    request: Request, settings: Settings, prompt: str, source: random.Random
) -> list[Piece]:
    match request.output:
        case ToolCall(name, parameters) if settings.tool_call_parser:
            return _split(json.dumps(example_of(parameters, source)), Part.ARGUMENTS)
        case ToolCall(name, parameters):
            call: JsonObject = {"name": name, "parameters": example_of(parameters, source)}
            return _split(json.dumps([call]))
        case JsonText(schema):
            return _split(json.dumps(example_of(schema, source), ensure_ascii=False))
        case Prose():
            opening = (
                "The capital of France is Paris." if "capital of france" in prompt.lower() else ""
            )
            count = source.randrange(8, 24)
            return [*_split(opening), *_prose_pieces(source, count), *_split(".")]


def _thoughts(request: Request, settings: Settings, source: random.Random) -> list[Piece]:
    if "think" not in request.marks:
        return []
    count = source.randrange(4, 9)
    if settings.reasoning_parser and request.separate_reasoning:
        return _prose_pieces(source, count, Part.REASONING)
    return [*_split("<think>\n"), *_prose_pieces(source, count), *_split("\n</think>\n\n")]


def _prose_pieces(source: random.Random, count: int, part: Part = Part.CONTENT) -> list[Piece]:
    words = source.choices(_WORDS, k=max(count, 0))
    return [Piece(part, f" {word}", f" {word}") for word in words]


def _split(text: str, part: Part = Part.CONTENT) -> list[Piece]:
    return [Piece(part, token, token) for token in tokens_of(text)]


def _stopped(
    pieces: list[Piece], stops: tuple[str, ...], finish: Finish
) -> tuple[tuple[Piece, ...], Finish]:
    """Cut at the first stop string: its token counts, its text and what follows it do not."""
    text = "".join(piece.text for piece in pieces)
    hits = [(text.index(stop) + len(stop), stop) for stop in stops if stop in text]
    if not hits:
        return tuple(pieces), finish
    end, stop = min(hits)
    room, kept, seen = end - len(stop), list[Piece](), 0
    for piece in pieces:
        kept.append(piece._replace(text=piece.text[:room]))
        room, seen = max(room - len(piece.text), 0), seen + len(piece.text)
        if seen >= end:
            break
    return tuple(kept), Finish("stop", stop)


def example_of(schema: JsonValue, source: random.Random) -> JsonValue:
    """A value that the schema admits, for the JSON Schema words that tests use."""
    rules = object_of(schema)
    if options := list_of(rules.get("enum")):
        return source.choice(options)
    if options := list_of(rules.get("anyOf")) or list_of(rules.get("oneOf")):
        return example_of(source.choice(options), source)
    if "const" in rules:
        return rules["const"]
    match rules.get("type", "object"):
        case "object":
            properties = object_of(rules.get("properties"))
            return {name: example_of(rule, source) for name, rule in properties.items()}
        case "array":
            items = rules.get("items", {"type": "string"})
            return [example_of(items, source) for _ in range(whole_of(rules.get("minItems"), 1))]
        case "integer" | "number":
            least = whole_of(rules.get("minimum"), 0)
            return source.randint(least, whole_of(rules.get("maximum"), least + 100))
        case "boolean":
            return source.random() < 0.5
        case "null":
            return None
        case _:
            return source.choice(_WORDS)


def token_id(token: str) -> int:
    """A stable number for a token, inside SmolLM2's vocabulary and above its special tokens."""
    return 3 + digest("token", token) % 49149


def runners_up(token: str, count: int) -> list[str]:
    """The token itself and its runners-up."""
    return [token, *(word for word in _WORDS if word != token)][:count]
