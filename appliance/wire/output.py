"""What an answer says, whichever way it was sent: `output_digest` (protocol.md section 5).

    a whole answer ───────────┐
    chunks of a stream, joined ┴── choices by index ── sha256(JCS({"choices": […]}))

A stream, a whole answer and a replay of the same generation have one digest: deltas are joined,
null and empty members of a message are left out, and so is what differs from run to run (ids) or
is bound elsewhere (log probabilities: the response hash has them).

Embeddings have no `output_digest`: it is null. Their own digest is for comparing two answers, and
does not depend on how the vectors are written (`Embeddings.digest`).

Chunks are decoded into a few typed members and nothing else, because this runs for every token,
if not at once. That is the appliance's reading of its own engine. Whoever verifies an answer reads
it strictly (`output_of_answer`, `read_stream`): what a client could read otherwise is refused.
"""

from __future__ import annotations

import hashlib
import math
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import Struct

from appliance.errors import Malformed
from appliance.wire.canonical import (
    JsonObject,
    JsonValue,
    canonical_json,
    parse_json,
    parse_json_object,
)
from appliance.wire.encoding import decode_base64, encode_base64
from appliance.wire.sse import DONE_EVENT, PING_LINE, behind_pings

MAX_CHOICES = 128
MAX_TOOL_CALLS = 1024
MAX_ARGUMENT_NESTING = 64
MAX_DIMENSIONS = 1 << 20
"""Of one embedding, in numbers."""
MAX_CHUNK_NESTING = 256
"""Of a chunk that is read strictly, as deep as any answer may be."""

_DATA = b"data: "
_DONE = DONE_EVENT.removesuffix(b"\n\n")


@dataclass(frozen=True, slots=True, repr=False)
class Output:
    """What an answer says. Its `repr` does not.

    Attributes:
        choices: by index, in the form that is hashed.
        finish_reasons: of each.
        usage: the last that was told; None when none was.
    """

    choices: tuple[JsonObject, ...]
    finish_reasons: tuple[str | None, ...]
    usage: JsonObject | None

    def __repr__(self) -> str:
        return f"Output({len(self.choices)} choices)"

    @property
    def digest(self) -> bytes:
        """`output_digest`, 32 bytes.

        Raises:
            Malformed: a text has no canonical form.
        """
        choices: list[JsonValue] = list(self.choices)
        return hashlib.sha256(canonical_json({"choices": choices})).digest()


class _Function(Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(Struct, gc=False):
    index: int | None = None
    function: _Function | None = None


class _Message(Struct, gc=False):
    """A message, or the delta of one."""

    content: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(Struct, gc=False):
    """A choice of either endpoint, whole or in part: a chat's has `message` or `delta`."""

    index: int
    text: str | None = None
    delta: _Message | None = None
    message: _Message | None = None
    finish_reason: str | None = None


class _Chunk(Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: dict[str, Any] | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(frozen=True, slots=True, repr=False)
class ReadStream:
    """A whole event stream, read strictly.

    Attributes:
        ids: every `id` that an event has.
        ended: it ends with `[DONE]`, which is there once, and tells no error.
    """

    output: Output
    ids: frozenset[str]
    ended: bool

    def __repr__(self) -> str:
        return f"ReadStream({self.output!r})"


def output_of_answer(answer: JsonObject, *, max_bytes: int) -> Output:
    """The output of an answer that was not streamed.

    Raises:
        Malformed: not shaped as one, or over the bound.
    """
    chunk = _chunk_of(answer)
    for place, choice in enumerate(chunk.choices or ()):
        # Joined they would be one text, and a client takes the first: one list, one order.
        if choice.index != place or choice.delta is not None:
            raise Malformed("expected whole choices, 0 to n-1 in order", field="$.choices")
    joined = OutputJoiner(max_bytes=max_bytes)
    joined.add(chunk)
    return joined.output()


def output_of_stream(content: bytes, *, max_bytes: int) -> Output:
    """The output of a whole event stream: its content bytes, heartbeats and `[DONE]` included.

    Raises:
        Malformed: not events as this appliance writes them, or over the bound.
    """
    return read_stream(content, max_bytes=max_bytes).output


def read_stream(content: bytes, *, max_bytes: int) -> ReadStream:
    """Read a whole event stream strictly: every event as JSON that every parser reads alike.

    Raises:
        Malformed: not events as this appliance writes them, or over the bound.
    """
    if b"\r" in content:  # it ends a line for clients (WHATWG HTML section 9.2.5), and not for us
        raise _unreadable()
    ids: set[str] = set()
    errors = 0

    def decode(event: bytes) -> _Chunk:
        nonlocal errors
        value = parse_json_object(event, max_nesting=MAX_CHUNK_NESTING)
        chunk = _chunk_of(value)
        if any(choice.message is not None for choice in chunk.choices or ()):
            raise Malformed("expected deltas in a stream", field="$.choices")
        if "id" in value:
            ids.add(str(value["id"]))
        errors += "error" in value
        return chunk

    joiner = OutputJoiner(max_bytes=max_bytes, decode=decode)
    joiner.add_events(content)
    # A raw line feed is in no JSON, so these bytes are the terminator wherever they are.
    done_last = content.endswith(DONE_EVENT) and content.count(DONE_EVENT) == 1
    return ReadStream(joiner.output(), frozenset(ids), done_last and not errors)


def _chunk_of(value: JsonObject) -> _Chunk:
    try:
        return msgspec.convert(value, _Chunk)
    except msgspec.ValidationError:
        raise _unreadable() from None


class OutputJoiner:
    """Joins the chunks of a stream, in any number of goes.

    Args:
        max_bytes: of all texts together, counted in characters.
        decode: of an event's JSON text; the default looks at nothing that it does not need.
    """

    def __init__(
        self, *, max_bytes: int, decode: Callable[[bytes], _Chunk] = _decode_chunk
    ) -> None:
        self._decode = decode
        self._left = max_bytes
        self._choices: dict[int, _Joined] = {}
        self._usage: JsonObject | None = None

    def add_events(self, events: bytes) -> None:
        """Take whole events: chunks, comments, errors, `[DONE]`.

        Raises:
            Malformed: not events as this appliance writes them, or over the bound.
        """
        if events and not events.endswith(b"\n\n"):
            raise Malformed("expected whole events")
        add, decode = self.add, self._decode
        try:
            for block in events.split(b"\n\n"):
                event = behind_pings(block) if block.startswith(PING_LINE) else block
                if event.startswith(_DATA) and event != _DONE:
                    add(decode(event[len(_DATA) :]))
                elif (
                    event and event != _DONE and not (event.startswith(b":") and b"\n" not in event)
                ):
                    raise _unreadable()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise _unreadable() from None

    def add(self, chunk: _Chunk) -> None:
        """Take one chunk, or a whole answer.

        Raises:
            Malformed: too many choices or calls, or over the bound.
        """
        if chunk.usage is not None:
            self._usage = chunk.usage
        for choice in chunk.choices or ():
            joined = self._choices.get(choice.index)
            if joined is None:
                joined = self._choices[choice.index] = _Joined(_bounded(choice.index, MAX_CHOICES))
            self._left -= joined.add(choice)
        if self._left < 0:
            raise Malformed("expected less text in one answer")

    def output(self) -> Output:
        """All that was said so far.

        Raises:
            Malformed: a choice is missing.
        """
        choices = [self._choices[index] for index in sorted(self._choices)]
        if [one.index for one in choices] != list(range(len(choices))):
            raise Malformed("expected the choices 0 to n-1", field="$.choices")
        return Output(
            choices=tuple(one.to_json() for one in choices),
            finish_reasons=tuple(one.finish_reason for one in choices),
            usage=self._usage,
        )

    def compact(self) -> None:
        """Join the fragments of late: one of a token takes ten times its length."""
        for one in self._choices.values():
            one.compact()


class _Text:
    """A text in fragments: `joined` are long ones, `fresh` are those of the last few tokens."""

    __slots__ = ("fresh", "joined")

    def __init__(self) -> None:
        self.joined: list[str] = []
        self.fresh: list[str] = []

    def add(self, part: str | None) -> int:
        """Take the next fragment; how many characters it has."""
        if not part:
            return 0
        self.fresh.append(part)
        return len(part)

    def compact(self) -> None:
        if self.fresh:
            self.joined.append("".join(self.fresh))
            self.fresh.clear()

    def __bool__(self) -> bool:
        return bool(self.joined or self.fresh)

    def __str__(self) -> str:
        return "".join(self.joined) + "".join(self.fresh)


class _Joined:
    """One choice so far."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.chat = False
        self.finish_reason: str | None = None
        self._text, self._content, self._reasoning, self._refusal = (_Text() for _ in range(4))
        self._calls: dict[int, tuple[_Text, _Text]] = {}  # names and arguments, by number

    def add(self, choice: _Choice) -> int:
        """Take a part of it; how many characters it has.

        Raises:
            Malformed: it says something in two forms, of which only one would be hashed.
        """
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
        message = choice.delta
        if message is None:
            message = choice.message
        elif choice.message is not None:
            raise _two_forms()
        if message is None:
            if self.chat and choice.text:
                raise _two_forms()
            return self._text.add(choice.text)
        if choice.text:
            raise _two_forms()
        if not self.chat:
            if self._text:
                raise _two_forms()
            self.chat = True
        size = self._content.add(message.content)
        if message.reasoning_content:
            size += self._reasoning.add(message.reasoning_content)
        if message.refusal:
            size += self._refusal.add(message.refusal)
        for position, call in enumerate(message.tool_calls or ()):
            # The calls of a whole message are all there, so their order says which is which; some
            # engines number each of them 0.
            index = position if choice.delta is None or call.index is None else call.index
            size += self._add_call(_bounded(index, MAX_TOOL_CALLS), call.function or _Function())
        return size

    def _add_call(self, index: int, function: _Function) -> int:
        call = self._calls.get(index)
        if call is None:
            call = self._calls[index] = (_Text(), _Text())
        return call[0].add(function.name) + call[1].add(function.arguments)

    def compact(self) -> None:
        for text in (self._text, self._content, self._reasoning, self._refusal):
            text.compact()
        for _, arguments in self._calls.values():
            arguments.compact()

    def to_json(self) -> JsonObject:
        choice: JsonObject = {"index": self.index, "finish_reason": self.finish_reason}
        if not self.chat:
            return {**choice, "text": str(self._text)}
        message: JsonObject = {
            "content": str(self._content),
            "reasoning_content": str(self._reasoning),
            "refusal": str(self._refusal),
            "tool_calls": [
                {"name": str(name), "arguments": _arguments(str(arguments))}
                for _, (name, arguments) in sorted(self._calls.items())
            ],
        }
        return {**choice, "message": {name: value for name, value in message.items() if value}}


def _arguments(text: str) -> JsonValue:
    """Parsed, so that spacing does not count; the text where it is not JSON that every parser
    reads alike."""
    try:
        return parse_json(text.encode("utf-8"), max_nesting=MAX_ARGUMENT_NESTING)
    except (Malformed, UnicodeEncodeError):
        return text


def _bounded(index: int, most: int) -> int:
    if not 0 <= index < most:
        raise Malformed(f"expected an index from 0 to {most - 1}", field="$.choices")
    return index


def _two_forms() -> Malformed:
    return Malformed("expected one of text, delta and message", field="$.choices")


def _unreadable() -> Malformed:
    return Malformed("expected an answer, or the events of one")


# ------------------------------------------------------------------------------------ embeddings


class _Embedding(Struct, frozen=True):
    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class _EmbeddingsAnswer(Struct, frozen=True):
    data: list[_Embedding]
    object: Literal["list"]
    usage: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Embeddings:
    """What an answer with embeddings says. Its `repr` does not.

    Attributes:
        told: by index, as it was written: numbers, or base64 of binary32.
        usage: None when none was told.
    """

    told: tuple[list[float] | str, ...]
    usage: JsonObject | None

    def __repr__(self) -> str:
        return f"Embeddings({len(self.told)})"

    def vectors(self) -> tuple[bytes, ...]:
        """Each as IEEE 754 binary32 numbers, little-endian, four bytes each.

        An engine computes no wider ones, so writing them in decimal loses nothing: a number that
        is not exactly a binary32 is none of its.

        Raises:
            Malformed: a number is no binary32, or not finite; not base64 of whole numbers; none,
                too many, or not as many in each.
        """
        vectors = tuple(_binary32(told, place) for place, told in enumerate(self.told))
        if any(len(vector) != len(vectors[0]) for vector in vectors):
            raise Malformed("expected embeddings of one length", field="$.data")
        return vectors

    @property
    def digest(self) -> bytes:
        """`sha256(JCS({"data": [{"embedding", "index"}, …]}))`, 32 bytes; each `embedding` is the
        base64 of its binary32 numbers, whichever way it was written.

        Raises:
            Malformed: as for `vectors`.
        """
        data: list[JsonValue] = [
            {"index": index, "embedding": encode_base64(vector)}
            for index, vector in enumerate(self.vectors())
        ]
        return hashlib.sha256(canonical_json({"data": data})).digest()

    def answer(self, *, model: str) -> JsonObject:
        """OpenAI's answer with them."""
        data: list[JsonValue] = [
            {"object": "embedding", "index": index, "embedding": list(told)}
            if isinstance(told, list)
            else {"object": "embedding", "index": index, "embedding": told}
            for index, told in enumerate(self.told)
        ]
        return {"object": "list", "data": data, "model": model, "usage": self.usage}


def decode_embeddings(data: bytes) -> Embeddings:
    """The appliance's reading of its own engine: quick, and of nothing that is not handed on.

    Raises:
        Malformed: not shaped as embeddings.
    """
    try:
        return _embeddings(msgspec.json.decode(data, type=_EmbeddingsAnswer))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _no_embeddings() from None


def embeddings_of_answer(answer: JsonObject) -> Embeddings:
    """Of an answer that was parsed strictly.

    Raises:
        Malformed: not shaped as embeddings.
    """
    try:
        return _embeddings(msgspec.convert(answer, _EmbeddingsAnswer))
    except msgspec.ValidationError:
        raise _no_embeddings() from None


def encode_answer(answer: JsonObject) -> bytes:
    """An answer with many numbers as JSON, each in the fewest digits that give it back."""
    return msgspec.json.encode(answer)


def _embeddings(answer: _EmbeddingsAnswer) -> Embeddings:
    if [one.index for one in answer.data] != list(range(len(answer.data))):
        raise Malformed("expected embeddings 0 to n-1 in order", field="$.data")
    return Embeddings(tuple(one.embedding for one in answer.data), answer.usage)


def _binary32(told: list[float] | str, place: int) -> bytes:
    where = f"$.data[{place}].embedding"
    if isinstance(told, str):
        data = decode_base64(told, field=where, max_bytes=4 * MAX_DIMENSIONS)
        if not data or len(data) % 4:
            raise Malformed(f"{where}: expected base64 of binary32 numbers", field=where)
        numbers = array("f", data)
        _little_endian(numbers)
        if not all(map(math.isfinite, numbers)):
            raise Malformed(f"{where}: expected finite numbers", field=where)
        return data
    if not 0 < len(told) <= MAX_DIMENSIONS:
        raise Malformed(f"{where}: expected 1 to {MAX_DIMENSIONS} numbers", field=where)
    numbers = array("f", told)
    if numbers.tolist() != told:
        raise Malformed(f"{where}: expected binary32 numbers", field=where)
    _little_endian(numbers)
    return numbers.tobytes()


def _little_endian(numbers: array[float]) -> None:
    """Between this machine's byte order and that."""
    if sys.byteorder == "big":
        numbers.byteswap()


def _no_embeddings() -> Malformed:
    return Malformed("expected a list of embeddings")
