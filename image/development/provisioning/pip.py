"""Runs pip as a child: its lines for progress, all of them in a log, its failures in one line.

pip is left to its ordinary configuration and cache: where a machine's packages come from is the
machine's business. What is taken from there is the lock's, which has a hash for every file.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from provisioning.errors import NoMatchingDistributionError, SetupError

# How often `on_tick` is called while pip says nothing, in seconds (250 ms).
TICK_S = 0.25

# How long a child gets to end by itself after an interrupt, in seconds.
INTERRUPT_GRACE_S = 10.0


def run_pip(
    python: Path,
    arguments: Sequence[str],
    *,
    log: Path,
    on_line: Callable[[str], None] = lambda _: None,
    on_tick: Callable[[], None] = lambda: None,
) -> None:
    """Run ``PYTHON -m pip ARGUMENTS``, appending all that it prints to `log`.

    Raises:
        NoMatchingDistributionError: the index has no such file for this platform.
        SetupError: pip failed otherwise. The message says why and what to do.
    """
    # -I: no PYTHON* variable, no user site. PIP_* variables are pip's configuration, and count.
    options = ("--no-input", "--disable-pip-version-check")
    command = [str(python), "-I", "-m", "pip", *options, *arguments]
    status, output = run_logged(command, log=log, on_line=on_line, on_tick=on_tick)
    if status != 0:
        raise explain(output, log=log)


def run_logged(
    command: Sequence[str],
    *,
    log: Path,
    on_line: Callable[[str], None] = lambda _: None,
    on_tick: Callable[[], None] = lambda: None,
) -> tuple[int, str]:
    """Run `command` without input. Returns its exit status and all it printed, also in `log`.

    If this is interrupted, so is the child, and it has ended when the exception goes on.
    """
    printed: list[str] = []
    with log.open("a", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            for line in _lines(child, on_tick):
                print(line, file=file, flush=True)
                printed.append(line)
                on_line(line)
            return child.wait(), "\n".join(printed)
        except BaseException:
            _stop(child)
            raise


def _lines(child: subprocess.Popen[bytes], on_tick: Callable[[], None]) -> Iterator[str]:
    assert child.stdout is not None  # Popen was given PIPE
    pending = b""
    with child.stdout, selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(TICK_S):
                on_tick()
                continue
            if not (chunk := os.read(child.stdout.fileno(), 65536)):
                break
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
    if pending:
        yield pending.decode(errors="replace")


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Interrupt, wait, kill. On Ctrl-C the terminal has interrupted the child already."""
    child.send_signal(signal.SIGINT)
    try:
        child.wait(INTERRUPT_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


# --- what pip's failures mean -------------------------------------------------------------------

# All of them in pip's or urllib3's own words, as tests/unit/test_setup.py has them.
_NO_SPACE = re.compile(r"\[Errno 28\]|No space left on device")
_WRONG_HASH = re.compile(
    r"^ *(?P<what>\S+)[^\n]*:\n +Expected sha256 (?P<expected>\w+)\n(?: +Expected +or \w+\n)*"
    r" +Got +(?P<got>\w+)",
    re.MULTILINE,
)
_NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError"
    r"|Read timed out|Connection aborted|Connection reset|IncompleteRead|SSLError"
)
_WRONG_PYTHON = re.compile(r"requires a different Python: (?P<reason>.+)")
_NO_PROJECT = re.compile(r"satisfies the requirement (?P<what>\S+) \(from versions: none\)")
_NO_MATCH = re.compile(r"No matching distribution found for (?P<what>\S+)")
# pip's last word, or the exception of a build that it ran.
_ANY_ERROR = re.compile(r"^ *(?:ERROR: |(?=\w+Error: ))(?P<text>.+)$", re.MULTILINE)


def explain(output: str, *, log: Path) -> SetupError:
    """Turn what a failed pip printed into the one line that says what to do.

    The order counts: pip reports a full disk among other errors, and says "no matching
    distribution" also when it could not reach any index.
    """
    if _NO_SPACE.search(output):
        return SetupError("the disk is full: make room and run it again")
    if found := _WRONG_HASH.search(output):
        # A download that was cut short is one too: pip 23 only notices by the hash.
        return SetupError(
            f"{found['what']} came as another file than the lock names (sha256 {found['got'][:16]}...,"
            f" expected {found['expected'][:16]}...), and was not installed: run it again, and if that"
            " does not help ask whoever runs your package index"
        )
    if _NO_NETWORK.search(output):
        return SetupError(
            f"no connection to the package index: check the network and run it again ({log})"
        )
    if found := _WRONG_PYTHON.search(output):
        return SetupError(f"wrong Python ({found['reason']}): the locks are for CPython 3.11")
    if found := _NO_PROJECT.search(output):
        return SetupError(
            f"no package index that pip is configured for has {found['what']}, in any version:"
            f" check `pip config list` and the network, and run it again ({log})"
        )
    if found := _NO_MATCH.search(output):
        return NoMatchingDistributionError(
            f"the package index has no {found['what']} for this machine (x86-64, glibc 2.28 or"
            f" later): check `pip config list` for an index that is complete ({log})"
        )
    last = [found["text"] for found in _ANY_ERROR.finditer(output)][-1:] or ["pip failed"]
    return SetupError(f"{last[0]} (all of it: {log})")
