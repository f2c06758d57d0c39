"""How the stand-in engine can misbehave: the table of modes, and sets of them.

A mode is written `NAME` or `NAME:ARGUMENT`: after `--fake-mode`, in `/_control`, or, for one
request, in the opening of its prompt as `[[mode:NAME:ARGUMENT]]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

MODES: Final[Mapping[str, str]] = {
    # name: default argument; the comment says what the argument is.
    # - the process -
    "load": "0.05",  # seconds until the port is bound
    "hang_start": "",  # loads for ever and never binds
    "crash_start": "",  # a traceback and exit status 1, before binding
    "exit_after": "1",  # seconds of life once ready, then exit status 1
    "health_delay": "1.0",  # seconds that /health takes; the real one sleeps for one
    "stop_health": "",  # /health and /ready never answer, everything else does
    "ignore_sigterm": "",  # logs it and goes on
    "late_sigterm": "",  # dies of it until the first generation, as with --skip-server-warmup
    "keep_alive": "5",  # seconds an idle connection is kept (SGLANG_TIMEOUT_KEEP_ALIVE)
    "bind_all": "",  # one more listener, on every interface, like torch's TCPStore
    "spawn_children": "",  # two sleeping children, one in its own session; never stopped by us
    "leak_shm": "",  # a file in /dev/shm that is never removed
    "log_long_line": "1000000",  # bytes in one line on stderr
    "log_binary": "",  # bytes that are not UTF-8 on stdout
    "log_prompt": "",  # every prompt on stderr
    # - generation -
    "slow": "50",  # milliseconds per token
    "first_token_delay": "500",  # milliseconds before the first token
    "long": "100000",  # tokens in the answer, whatever the request says
    "not_deterministic": "",  # samples as without --enable-deterministic-inference
    "huge_body": "64",  # mebibytes in one token
    "lazy_disconnect": "4000",  # milliseconds until a non-streamed request's disconnect is noticed
    # - instead of an answer -
    "http_400": "",  # a validation error that echoes the prompt
    "http_500": "",  # an internal error that echoes the prompt
    "garbage": "",  # bytes that are not HTTP
    "endless_header": "",  # a response head without an end
    "slow_header": "20",  # milliseconds between the bytes of the response head
    # - in a stream, after so many events; in a plain answer, before or in the body -
    "hang_stream": "3",  # nothing more, connection open
    "crash_stream": "3",  # SIGKILL to ourselves
    "reset_stream": "3",  # TCP RST
    "truncate_stream": "3",  # TCP FIN without the terminal chunk
    "half_chunk": "3",  # a chunk's size and part of its data, then TCP FIN
    "error_event": "3",  # SGLang's in-stream error, and what SGLang sends after it
    "garbage_event": "3",  # one event that is not JSON, then on
    "no_done": "",  # a clean end without [DONE]
    "split": "1",  # seed of where events are cut and joined, over chunks and writes
}


class Modes:
    """Active modes and their arguments; an unknown name is a mistake in a test, so it raises."""

    def __init__(self, active: Mapping[str, str] | None = None) -> None:
        self._active = dict[str, str]()
        for name, argument in (active or {}).items():
            self.set(name, argument)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Modes:
        return cls({name: argument for name, _, argument in (t.partition(":") for t in texts)})

    def set(self, name: str, argument: str = "") -> None:
        if name not in MODES:
            raise ValueError(f"unknown mode {name!r}")
        self._active[name] = argument or MODES[name]

    def clear(self, name: str) -> None:
        self._active.pop(name, None)

    def over(self, base: Modes) -> Modes:
        return Modes({**base.as_dict(), **self._active})

    def as_dict(self) -> dict[str, str]:
        return dict(self._active)

    def __contains__(self, name: str) -> bool:
        return name in self._active

    def number(self, name: str, otherwise: float = 0.0) -> float:
        return float(self._active[name]) if name in self._active else otherwise

    def default(self, name: str) -> float:
        """The argument, or the table's if the mode is not set: for what always has a value."""
        return self.number(name, float(MODES[name]))
