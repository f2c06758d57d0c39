"""What of the engine's own output may enter our log, and what it tells about its progress.

SGLang does not log prompts as we configure it, but its exceptions can quote input, and its start
line holds both keys. So:

- the start line with `server_args=` is dropped, always;
- until the engine is ready nobody has sent it a prompt, and every other line passes;
- afterwards a line passes only if it has one of the shapes below, which hold numbers and names of
  code; of a traceback that leaves where it happened and the type, not the message.

The rest is counted, not shown. All of it is bounded in length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LINE_BYTES = 2_048

_SECRET = re.compile(r"server_args=|api[_-]key", re.IGNORECASE)

_SAFE_WHEN_SERVING = (
    re.compile(r"^\[[^]]{0,64}\] (?:Prefill|Decode) batch[\w ,:#.()%/=-]*$"),
    re.compile(
        r"^\[[^]]{0,64}\] (?:The server is fired up|Cache flushed|Gracefully exiting)[\w .!]*$"
    ),
    re.compile(r"^\[[^]]{0,64}\] SIGTERM received[\w .,:'#-]*$"),
    re.compile(r"^\[[^]]{0,64}\] Health check failed\."),
    re.compile(r"^Traceback \(most recent call last\):$"),
    re.compile(r'^  File "[^"]{1,512}", line \d+, in [\w<>.]+$'),
)
_EXCEPTION = re.compile(r"^(?P<type>[A-Za-z_][\w.]{0,127}(?:Error|Exception|Interrupt|Exit))\b:?")

_SHARDS = re.compile(
    r"loading (?:safetensors checkpoint )?shards:\s+(?P<percent>\d{1,3})% Completed", re.IGNORECASE
)
_STEPS = (
    (re.compile(r"\bLoad weight begin\b"), "loading weights"),
    (re.compile(r"\bLoad weight end\b"), "weights loaded"),
    (re.compile(r"\bCapture .{0,40}begin\b", re.IGNORECASE), "capturing graphs"),
    (re.compile(r"\bCapturing batches\b"), "capturing graphs"),
    (re.compile(r"\bMemory pool end\b"), "memory pool ready"),
    (re.compile(r"\bThe server is fired up\b"), "fired up"),
)


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line fit for our log, and the step of the start it announces, if any."""

    text: str
    progress: str | None


def read_log_line(raw: bytes, *, serving: bool) -> LogLine | None:
    """Decide about one line of the engine's output, without its line end.

    Args:
        raw: the bytes; anything that is not UTF-8 is shown escaped.
        serving: whether the engine may have seen a prompt by now.

    Returns:
        What may be logged, or None when the line is withheld.
    """
    text = raw[:MAX_LINE_BYTES].decode("utf-8", errors="backslashreplace").rstrip()
    if len(raw) > MAX_LINE_BYTES:
        text += "…"
    if not text or _SECRET.search(text):
        return None
    if not serving:
        return LogLine(text=text, progress=_progress(text))
    if any(shape.match(text) for shape in _SAFE_WHEN_SERVING):
        return LogLine(text=text, progress=None)
    if exception := _EXCEPTION.match(text):
        return LogLine(text=exception["type"], progress=None)
    return None


def _progress(text: str) -> str | None:
    if shards := _SHARDS.search(text):
        return f"loading weights {shards['percent']}%"
    return next((step for shape, step in _STEPS if shape.search(text)), None)
