"""What of the engine's output gets into our log: never a key, and once it serves never a prompt."""

from __future__ import annotations

import builtins
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.engine.log_lines import MAX_LINE_BYTES, LogLine, read_log_line

STAMP = "[2026-11-23 16:01:14] "
SOURCE = os.path.realpath(__file__)


def shown(line: str | bytes, *, serving: bool) -> str | None:
    raw = line.encode() if isinstance(line, str) else line
    read = read_log_line(raw, serving=serving)
    return None if read is None else read.text


# --------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize(
    "line",
    [
        STAMP + "server_args={'model_path': '/m', 'api_key': 'K', 'admin_api_key': 'A'}",
        STAMP + "server_args=ServerArgs(model_path='/m')",
        STAMP + "SERVER_ARGS=x",
        "  '--api-key', 'K',",
        "api_key: K",
        'admin-api-key = "K"',
        "x" * 1000 + "api-key",
        "authorization: Bearer " + "0f" * 32,
        "a key without its name " + "0F" * 32,
        "and half of one " + "0f" * 16,
    ],
)
def test_a_line_that_may_hold_a_key_is_dropped_always(line: str, serving: bool) -> None:
    assert shown(line, serving=serving) is None


@given(st.integers(0, 2 * MAX_LINE_BYTES))
def test_a_key_that_the_line_bound_cuts_is_not_shown_by_more_than_half(before: int) -> None:
    key = "0123456789abcdef" * 4
    text = shown(("-" * before + key).encode(), serving=False) or ""
    assert key[:32] not in text


# ------------------------------------------------------------------------- until it is ready


@pytest.mark.parametrize(
    ("line", "progress"),
    [
        (STAMP + "Load weight begin. avail mem=15.77 GB", "loading weights"),
        (
            "Multi-thread loading shards:  50% Completed | 1/2 [00:00<00:00,  4.00it/s]",
            "loading weights 50%",
        ),
        (
            "Loading safetensors checkpoint shards: 100% Completed | 2/2 [00:01<00:00,  1.9it/s]",
            "loading weights 100%",
        ),
        (STAMP + "Load weight end. elapsed=1.08 s, type=LlamaForCausalLM", "weights loaded"),
        (STAMP + "Memory pool end. avail mem=14.71 GB", "memory pool ready"),
        (
            STAMP + "Capture target decode CUDA graph begin. This can take up to several minutes.",
            "capturing graphs",
        ),
        (
            "Capturing batches (bs=8 avail_mem=30.1 GB):  25%|██▌       | 1/4 [00:00<00:01]",
            "capturing graphs",
        ),
        (STAMP + "The server is fired up and ready to roll!", "fired up"),
        (STAMP + "Init torch distributed begin.", None),
        ("  warnings.warn(", None),
        ("Traceback (most recent call last):", None),
    ],
)
def test_a_starting_engines_lines_pass_and_tell_its_progress(
    line: str, progress: str | None
) -> None:
    assert read_log_line(line.encode(), serving=False) == LogLine(text=line, progress=progress)


@pytest.mark.parametrize("line", ["", " ", "\t \r"])
@pytest.mark.parametrize("serving", [False, True])
def test_an_empty_line_is_no_line(line: str, serving: bool) -> None:
    assert shown(line, serving=serving) is None


def test_bytes_that_are_no_text_are_shown_escaped() -> None:
    assert shown(b"\x80\xff weights\xfe ", serving=False) == r"\x80\xff weights\xfe"


@given(st.binary(max_size=3 * MAX_LINE_BYTES), st.booleans())
def test_whatever_comes_is_bounded_and_one_line_of_text(raw: bytes, serving: bool) -> None:
    text = shown(raw.replace(b"\n", b"").replace(b"\r", b""), serving=serving)
    if text is not None:
        assert 0 < len(text) <= 4 * MAX_LINE_BYTES + 1
        text.encode()


def test_a_long_line_is_cut_and_says_so() -> None:
    assert shown("x" * MAX_LINE_BYTES, serving=False) == "x" * MAX_LINE_BYTES
    assert shown("x" * (MAX_LINE_BYTES + 1), serving=False) == "x" * MAX_LINE_BYTES + "…"


# ------------------------------------------------------------------------------ when it serves

COUNTS = (
    "#new-seq: 1, #new-token: 36, #cached-token: 0, token usage: 0.00, #running-req: 0, "
    "#queue-req: 0, #pending-token: 0, cpu graph: False, input throughput (token/s): 1.18"
)
DECODE_COUNTS = (
    "#running-req: 2, #token: 80, token usage: 0.00, accept len: 2.50, accept rate: 0.80, "
    "cuda graph: True, gen throughput (token/s): 26.53, #queue-req: 0"
)
SAFE = [
    f"{STAMP}Prefill batch, {COUNTS}",
    "[2026-11-23 16:01:14 DP0 TP3 EP3] Prefill batch [17], " + COUNTS,
    f"[2026-11-23 16:01:14.123 TP0] Decode batch, {DECODE_COUNTS}",
    STAMP + "The server is fired up and ready to roll!",
    STAMP + "Cache flushed successfully!",
    "Traceback (most recent call last):",
]


@pytest.mark.parametrize("line", SAFE)
def test_lines_of_numbers_pass_whole(line: str) -> None:
    assert read_log_line(line.encode(), serving=True) == LogLine(text=line, progress=None)


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (
            STAMP + "Gracefully exiting... Remaining number of requests 2. "
            "Remaining requests remaining_rids=['chatcmpl-1', 'x'].",
            STAMP + "Gracefully exiting... Remaining number of requests 2",
        ),
        (
            STAMP + "SIGTERM received. signum=15 frame=<frame at 0x7f, file 'x'>. Draining",
            STAMP + "SIGTERM received",
        ),
        (
            STAMP + "Health check failed. Server couldn't get a response from detokenizer",
            STAMP + "Health check failed",
        ),
        (f'  File "{SOURCE}", line 12, in handle_request', f'  File "{SOURCE}", line 12'),
        ("ValueError: prompt 'secret' is odd", "ValueError"),
        ("KeyError", "KeyError"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "torch.OutOfMemoryError"),
        (
            STAMP + "Decode batch, #running-req: 1, secret: 5",
            STAMP + "Decode batch, #running-req: 1",
        ),
    ],
)
def test_of_a_line_with_words_only_the_safe_part_passes(line: str, kept: str) -> None:
    assert shown(line, serving=True) == kept


SECRET = "canaryfa3e"

IMITATIONS = [
    f"{STAMP}Prefill batch {SECRET}",
    f"{STAMP}Prefill batch, {SECRET}: 1",
    f"{STAMP}Prefill batch, #new-seq: {SECRET}",
    f"{STAMP}Prefill batch, #new-seq: 1 {SECRET}",
    f"{STAMP}Prefill batch, #new-seq: 1, {SECRET}",
    f"{STAMP}Decode batch [{SECRET}], #token: 1",
    f"[{SECRET}] Prefill batch, #new-seq: 1",
    f"[2026-11-23 16:01:14 {SECRET}] Prefill batch, #new-seq: 1",
    f"[2026-11-23 16:01:14 TP{SECRET}] Decode batch, #token: 1",
    f"{SECRET} {STAMP}Prefill batch, #new-seq: 1",
    f"{STAMP}The server is fired up {SECRET}",
    f"{STAMP}The server is fired up and ready to roll! {SECRET}",
    f"{STAMP}Cache flushed {SECRET}",
    f"{STAMP}Gracefully exiting {SECRET}",
    f"{STAMP}Gracefully exiting... Remaining number of requests {SECRET}",
    f"{STAMP}Health check failed. {SECRET}",
    f"{STAMP}SIGTERM received {SECRET}",
    f"Traceback (most recent call last): {SECRET}",
    f'  File "{SECRET}", line 1, in x',
    f'  File "/{SECRET}.py", line 1, in x',
    f'  File "/usr/lib/{SECRET}/x.py", line 1, in x',
    f'  File "{SOURCE}", line 1, in {SECRET}',
    f'  File "{SOURCE}{SECRET}", line 1, in x',
    f'  File "{SOURCE}", line {SECRET}, in x',
    f'  File "/{"x" * 300}{SECRET}.py", line 1, in x',
    f"{SECRET}Error: x",
    f"{SECRET}.ValueError: x",
    f"torch.{SECRET}Error",
    f"ValueError: {SECRET}",
    f"ValueError {SECRET}",
    f"    raise ValueError({SECRET!r})",
    f"INFO: {SECRET}",
    f"{SECRET}",
]


@pytest.mark.parametrize("line", IMITATIONS)
@pytest.mark.parametrize(
    "around", ["{}", "{}\x00", "\x1b[0m{}", "{} ", "\ufeff{}", "{}\x0b{}", "{}\u2028{}"]
)
def test_a_prompt_that_imitates_a_safe_line_shows_nothing_of_its_own(
    line: str, around: str
) -> None:
    assert SECRET not in (shown(around.format(line, line), serving=True) or "")


words = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), min_size=1, max_size=12
)


@given(
    line=st.sampled_from([*SAFE, *IMITATIONS, f'  File "{SOURCE}", line 1, in x', "ValueError: x"]),
    start=st.integers(0, 200),
    end=st.integers(0, 200),
    inserted=words,
)
def test_nothing_that_is_put_anywhere_into_a_safe_line_is_shown(
    line: str, start: int, end: int, inserted: str
) -> None:
    begin, finish = sorted((start % (len(line) + 1), end % (len(line) + 1)))
    canary = f"{inserted}{SECRET}{inserted}"
    text = shown(line[:begin] + canary + line[finish:], serving=True)
    assert SECRET not in (text or "")


SKELETON_WORDS = {
    word
    for line in [
        *SAFE,
        *(
            f"{STAMP}{text}"
            for text in (
                "Gracefully exiting... Remaining number of",
                "requests",
                "SIGTERM received",
                "Health check failed",
                "Decode batch",
            )
        ),
    ]
    for word in line.replace(",", " ").replace(":", " ").split()
} | {"retracted-req", "File", "line"}


@given(st.lists(words | st.sampled_from(sorted(SKELETON_WORDS)), max_size=8).map(" ".join))
def test_random_lines_show_fixed_words_and_numbers_only(line: str) -> None:
    text = shown(line, serving=True)
    if text is not None and not hasattr(builtins, text):
        rest = "".join(" " if c in ",:" else c for c in text).split()
        assert set(rest) <= SKELETON_WORDS | {
            word for word in rest if word.strip("-.[]0123456789") == ""
        }


def test_the_frame_of_a_file_that_does_not_exist_is_withheld(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    line = f'  File "{source}", line 3, in run'
    assert shown(line, serving=True) is None
    source.touch()
    assert shown(line, serving=True) == f'  File "{source}", line 3'


def test_a_detour_to_a_file_that_exists_is_withheld() -> None:
    folder, _, name = SOURCE.rpartition("/")
    assert shown(f'  File "{folder}/./{name}", line 3, in run', serving=True) is None
    assert shown(f'  File "{folder}/../unit/{name}", line 3, in run', serving=True) is None
