"""What of the engine's own output may enter our log, and what it tells about its progress.

SGLang does not log prompts as we configure it, but its exceptions can quote input, over several
lines and with whatever a prompt holds; and its start line holds both keys. So:

- a line with `server_args=`, the name of a key or what looks like one is dropped, always;
- until the engine is ready nobody has sent it a prompt, and every other line passes;
- afterwards only what matches one of the shapes below passes, and nothing around it. A prompt can
  imitate every shape, so a shape has no room for words: fixed text, numbers, the path of a source
  file that is really there, and names of exceptions from a closed list.

The rest is counted, not shown. All of it is bounded in length.
"""

from __future__ import annotations

import builtins
import os
import re
from dataclasses import dataclass

MAX_LINE_BYTES = 2_048

# The keys are 64 hexadecimal digits; of one that is cut by the bound, no more than half is shown.
_SECRET = re.compile(r"server_args=|api[_-]key|[0-9a-f]{32}", re.IGNORECASE)

_STAMP = (
    r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{3})?"
    r"(?: (?:DP|PP|ATTN_CP|MOE_DP|TP|EP)\d{1,4})*\] "
)
# srt/managers/scheduler_components/metrics_reporter.py
_COUNT = (
    r"(?:#(?:new-seq|new-token|cached-token|running-req|queue-req|pending-token|replay-token"
    r"|retracted-req|(?:full |swa |gpu |cpu )?token)"
    r"|(?:full |swa |gpu |cpu )?token usage|mamba num|mamba usage"
    r"|(?:input|gen) throughput \(token/s\)|(?:block )?accept len|accept rate|cap len"
    r"|(?:cuda|cpu|npu|musa) graph): (?:True|False|-?\d{1,12}(?:\.\d{1,6})?)"
)
_SAFE_WHEN_SERVING = (
    re.compile(rf"{_STAMP}(?:Prefill|Decode) batch(?: \[\d{{1,12}}\])?(?:, {_COUNT})+", re.ASCII),
    re.compile(
        rf"{_STAMP}(?:The server is fired up and ready to roll!|Cache flushed successfully!"
        r"|Gracefully exiting\.\.\. Remaining number of requests \d{1,9}"
        r"|SIGTERM received|Health check failed)",
        re.ASCII,
    ),
    re.compile(r"Traceback \(most recent call last\):\Z"),
)
_FRAME = re.compile(r'  File "(?P<path>/[^"\0]{1,512}\.py)", line \d{1,7}(?=, in )', re.ASCII)
_EXCEPTION = re.compile(r"(?P<type>[A-Za-z_][A-Za-z0-9_.]{0,127})(?=:|\Z)")
_EXCEPTION_TYPES = frozenset(
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
) | {
    "asyncio.exceptions.CancelledError",
    "asyncio.exceptions.TimeoutError",
    "jinja2.exceptions.TemplateError",
    "jinja2.exceptions.UndefinedError",
    "json.decoder.JSONDecodeError",
    "pydantic_core._pydantic_core.ValidationError",
    "torch.AcceleratorError",
    "torch.OutOfMemoryError",
    "torch.cuda.OutOfMemoryError",
    "torch.distributed.DistBackendError",
    "torch.distributed.DistNetworkError",
    "torch.distributed.DistStoreError",
    "zmq.error.Again",
    "zmq.error.ZMQError",
}

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
    safe = _safe_part(text)
    return None if safe is None else LogLine(text=safe, progress=None)


def _safe_part(text: str) -> str | None:
    for shape in _SAFE_WHEN_SERVING:
        if found := shape.match(text):
            return found[0]
    if (frame := _FRAME.match(text)) and _is_source_file(frame["path"]):
        return frame[0]
    if (exception := _EXCEPTION.match(text)) and exception["type"] in _EXCEPTION_TYPES:
        return exception["type"]
    return None


def _is_source_file(path: str) -> bool:
    """Whether a path says nothing but which of the files on this disk is meant."""
    # Path.is_file raises where a name is longer than the disk has them.
    return os.path.normpath(path) == path and os.path.isfile(path)  # noqa: PTH113


def _progress(text: str) -> str | None:
    if shards := _SHARDS.search(text):
        return f"loading weights {shards['percent']}%"
    return next((step for shape, step in _STEPS if shape.search(text)), None)
