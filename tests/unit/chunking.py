"""How a network may cut a stream of bytes into pieces."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st

borders = st.lists(st.integers(0, 1 << 20), max_size=12)
"""Where to cut; `cut` takes them modulo the length of the stream."""


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    """The stream in pieces with borders at these places, none of them empty."""
    ends = sorted({0, len(stream), *(border % (len(stream) + 1) for border in at)})
    return [stream[begin:end] for begin, end in pairwise(ends)]


def in_steps(stream: bytes, step: int) -> list[bytes]:
    """The stream in pieces of `step` bytes; the last may be shorter."""
    return [stream[begin : begin + step] for begin in range(0, len(stream), step)]
