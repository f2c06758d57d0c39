"""Server-sent events (WHATWG HTML section 9.2), as SGLang writes them and as we pass them on.

The relay hands bytes through: it needs to know where events end and whether one of them is the
terminator or an error, not what a token says. SGLang's profile is narrow, and holding it to that
profile is what makes the checks cheap: every event is one `data:` line followed by a blank line,
LF only, and its JSON never holds a raw newline. So counting line beginnings in C replaces
decoding, whatever the text inside says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, canonical_json

DONE_EVENT = b"data: [DONE]\n\n"
PING = b": ping\n\n"
PING_LINE = b": ping\n"
"""A heartbeat that is the beginning of the next event: where what that event says about the bytes
before it is settled already, and the event itself is not there yet."""

_OPEN = b"data: {"
_ERROR = b'data: {"error"'


@dataclass(frozen=True, slots=True)
class Block:
    """One or more whole events, in the bytes they came in.

    Attributes:
        data: the events, the terminator or an error excluded; may be empty.
        done: the terminator `data: [DONE]` came right behind them.
        error: the JSON text of SGLang's in-stream error that came right behind them; it may echo
            input. What follows it in the stream means nothing (SGLang ends it with [DONE]).
    """

    data: bytes = field(repr=False)
    done: bool
    error: bytes | None = field(default=None, repr=False)


class BlockReader:
    """Cuts a byte stream, chunked however the network likes, into blocks of whole events."""

    def __init__(self, *, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = b""
        self._done = False

    @property
    def done(self) -> bool:
        """Whether the terminator came: only then may the stream end."""
        return self._done

    def feed(self, data: bytes) -> Block | None:
        """Take bytes; return every event that is now whole, or None while none is.

        Raises:
            Malformed: not SGLang's profile of SSE, an event over the bound, or bytes after the
                terminator.
        """
        if self._done:
            raise Malformed("expected the end of the stream after [DONE]")
        if self._rest:
            data = self._rest + data
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            self._keep(data)
            return None
        self._keep(data[end:])
        whole = data if end == len(data) else data[:end]
        done = whole.endswith(DONE_EVENT)
        if done:
            if self._rest:
                raise Malformed("expected the end of the stream after [DONE]")
            whole = whole[: -len(DONE_EVENT)]
        if whole:
            _check_profile(whole)
            self._check_size(whole)
        if (error_at := _find_error(whole)) is not None:
            error = split_events(whole[error_at:])[0]
            return Block(data=whole[:error_at], done=False, error=error)
        self._done = done
        return Block(data=whole, done=done)

    def _check_size(self, whole: bytes) -> None:
        # Splitting is what this reader avoids; only a block over the bound can hold an event that is.
        if len(whole) > self._max_event_bytes:
            for event in whole.split(b"\n\n"):
                self._check_length(len(event) + 2)

    def _keep(self, rest: bytes) -> None:
        self._check_length(len(rest))
        self._rest = rest

    def _check_length(self, length: int) -> None:
        if length > self._max_event_bytes:
            raise Malformed(f"expected an event of at most {self._max_event_bytes} bytes")


def split_events(data: bytes) -> list[bytes]:
    """The JSON texts of a block's events, without `data: ` and the blank line."""
    return [event.removeprefix(b"data: ") for event in data.split(b"\n\n") if event]


def behind_pings(event: bytes) -> bytes:
    """An event without the heartbeats at its beginning."""
    start = 0
    while event.startswith(PING_LINE, start):
        start += len(PING_LINE)
    return event[start:]


def encode_event(value: JsonObject) -> bytes:
    """One `data:` event holding a JSON object, canonical so that equal values are equal bytes."""
    return b"data: " + canonical_json(value) + b"\n\n"


def _find_error(whole: bytes) -> int | None:
    if whole.startswith(_ERROR):
        return 0
    found = whole.find(b"\n" + _ERROR)
    return None if found < 0 else found + 1


def _check_profile(whole: bytes) -> None:
    events = whole.count(b"\n\n")
    opened = whole.startswith(_OPEN) + whole.count(b"\n\n" + _OPEN)
    # Equal only when every event begins `data: {` and ends `}`. A lone newline would be a second
    # field line, and so would a carriage return, which ends a line for clients (section 9.2.5).
    # Whether what is between is JSON, only decoding could tell.
    one_line = whole.count(b"\n") == 2 * events and b"\r" not in whole
    if not (events == opened == whole.count(b"}\n\n") and one_line):
        raise Malformed("expected every event to be one data line with a JSON object")
