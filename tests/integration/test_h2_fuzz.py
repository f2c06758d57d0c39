"""Random HTTP/2 at one running appliance: it serves on after each example, and nothing is left."""

from __future__ import annotations

import json
from dataclasses import dataclass

import hypothesis
import trio
from hpack import Encoder
from hypothesis import strategies as st

from tests.integration.aftermath import assert_serving, unharmed
from tests.integration.appliance import MODEL, QUESTION, RunningAppliance
from tests.integration.wire import PREFACE, FrameWire, SettingsFrame, raw_frame

BUDGET_S = 15.0
ANSWER_S = 0.02  # how long an example listens to what it gets

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE = range(6)
PING, GOAWAY, WINDOW_UPDATE, CONTINUATION, ALTSVC = range(6, 11)
UNKNOWN = 0xBE
END_STREAM, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x4, 0x8, 0x20

CHAT = b"/v1/chat/completions"
CHAT_BODY = json.dumps({"model": MODEL, "messages": QUESTION, "stream": True}).encode()


Numbers = st.SearchStrategy[int]


@dataclass(frozen=True)
class Said:
    """One frame: header lists are encoded late, in the order in which they are sent."""

    kind: int
    flags: int
    stream_id: int
    body: bytes | tuple[tuple[bytes, bytes], ...]


def mostly(likely: st.SearchStrategy[int], other: st.SearchStrategy[int]) -> Numbers:
    return st.one_of(*[likely] * 7, other)


any_ids = st.sampled_from([0, 1, 2, 3, 5, 7, 9, 2**31 - 1])
on_connection = mostly(st.just(0), any_ids)
on_stream = mostly(st.sampled_from([1, 3, 5]), any_ids)
any_flags = st.integers(0, 255)
no_flags = mostly(st.just(0), any_flags)
numbers = st.sampled_from(
    [0, 1, 2, 100, 16_383, 16_384, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
)
noise = st.binary(max_size=40)

good_heads = st.builds(
    lambda method, path: (
        (b":method", method),
        (b":scheme", b"https"),
        (b":authority", b"x"),
        (b":path", path),
    ),
    st.sampled_from([b"GET", b"POST", b"POST"]),
    st.sampled_from([*[CHAT] * 3, b"/health/live", b"/nowhere", b"/\xff", b"*"]),
)
fields = st.tuples(
    st.sampled_from(
        b":method :path :protocol :status te Upper host cookie content-length connection upgrade "
        b"expect transfer-encoding x".split()
    ),
    st.sampled_from([b"", b"CONNECT", b"HEAD", b"/", b"0", b"5", b"trailers", b"100-continue"])
    | noise,
)
heads = st.builds(
    lambda head, more, first: (*more, *head) if first else (*head, *more),
    good_heads,
    st.lists(fields, max_size=2).map(tuple),
    st.booleans(),
)


def frames(
    kind: int,
    ids: Numbers,
    bodies: st.SearchStrategy[bytes],
    *,
    flags: Numbers = no_flags,
) -> st.SearchStrategy[Said]:
    return st.builds(Said, st.just(kind), flags, ids, bodies)


number_bodies = numbers.map(lambda number: number.to_bytes(4, "big"))
settings = st.lists(st.tuples(st.integers(0, 10), numbers), max_size=4).map(
    lambda items: b"".join(n.to_bytes(2, "big") + value.to_bytes(4, "big") for n, value in items)
)
whole = mostly(st.sampled_from([END_HEADERS, END_HEADERS | END_STREAM]), any_flags)
one_frame = st.one_of(
    st.builds(Said, st.just(HEADERS), whole, st.sampled_from([7, 9, 11]), good_heads),
    st.builds(Said, st.just(HEADERS), whole, any_ids, heads),
    frames(DATA, on_stream, st.just(CHAT_BODY), flags=st.sampled_from([0, END_STREAM])),
    frames(DATA, on_stream, noise | st.just(b"x" * 16_384)),
    frames(DATA, on_stream, noise, flags=any_flags),
    frames(SETTINGS, on_connection, settings),
    frames(WINDOW_UPDATE, on_connection | on_stream, number_bodies),
    frames(RST_STREAM, on_stream, number_bodies),
    frames(PRIORITY, on_stream, st.binary(min_size=5, max_size=5)),
    frames(PING, on_connection, st.binary(min_size=8, max_size=8)),
    frames(GOAWAY, on_connection, st.binary(min_size=8, max_size=20)),
    frames(CONTINUATION, on_stream, noise),
    frames(PUSH_PROMISE, on_stream, noise),
    frames(ALTSVC, any_ids, noise),
    frames(UNKNOWN, any_ids, noise, flags=any_flags),
    st.builds(Said, any_flags, any_flags, any_ids, noise),
)


def opening(stream_id: int) -> st.SearchStrategy[list[Said]]:
    """A request that may be right to its end, so that an example gets somewhere."""
    return st.builds(
        lambda head, end: [Said(HEADERS, END_HEADERS, stream_id, head), *end],
        good_heads,
        st.sampled_from(
            [
                [],
                [Said(DATA, 0, stream_id, CHAT_BODY)],
                [Said(DATA, END_STREAM, stream_id, CHAT_BODY)],
                [Said(DATA, END_STREAM, stream_id, CHAT_BODY)],
            ]
        ),
    )


conversations = st.builds(
    lambda window, first, second, third, rest: [*window, *first, *second, *third, *rest],
    st.sampled_from([[], [], [Said(SETTINGS, 0, 0, b"\0\4\0\0\0\0")]]),  # no window at first
    opening(1),
    st.just([]) | opening(3),
    st.just([]) | opening(5),
    st.lists(one_frame, max_size=10),
)


@dataclass(frozen=True)
class Example:
    """A connection: what is said, what becomes of it on the way, and how it ends."""

    frames: list[Said]
    flips: list[tuple[int, int]]  # place and mask
    keep: int | None  # bytes, where it breaks off
    pieces: list[int]
    greets: bool
    ending: str

    def encode(self) -> bytes:
        encoder = Encoder()
        data = bytearray()
        for said in self.frames:
            body = said.body if isinstance(said.body, bytes) else encoder.encode(said.body)
            data += raw_frame(said.kind, said.stream_id, body, said.flags).serialize()
        for place, mask in self.flips:
            if data:
                data[place % len(data)] ^= mask
        greeting = PREFACE + SettingsFrame(0).serialize() if self.greets else b""
        return greeting + bytes(data if self.keep is None else data[: self.keep])


examples = st.builds(
    Example,
    conversations,
    st.just([]) | st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 255)), max_size=3),
    st.one_of(st.none(), st.none(), st.none(), st.integers(0, 2000)),
    st.lists(st.integers(1, 200), max_size=3),
    st.sampled_from([True] * 9 + [False]),
    st.sampled_from(["listen"] * 4 + ["drop", "reset", "half-close"]),
)


async def play(appliance: RunningAppliance, example: Example) -> None:
    data = example.encode()
    async with FrameWire.open(appliance) as wire:
        for size in example.pieces:
            await wire.send(data[:size])
            data = data[size:]
        await wire.send(data)
        if example.ending == "reset":
            wire.reset()
        elif example.ending != "drop":
            if example.ending == "half-close":
                await wire.stream.transport_stream.send_eof()
            with trio.move_on_after(ANSWER_S):
                while await wire.receive():
                    pass
    with trio.fail_after(5):
        await assert_serving(appliance)


async def test_random_http2_harms_nobody(appliance: RunningAppliance) -> None:
    until = trio.current_time() + BUDGET_S
    played, failed = 0, False

    @hypothesis.settings(
        max_examples=1000,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(examples)
    def attack(example: Example) -> None:
        nonlocal played, failed
        # Shrinking what failed may take longer.
        if failed or trio.from_thread.run_sync(trio.current_time) < until:
            try:
                trio.from_thread.run(play, appliance, example)
            except BaseException:
                failed = True
                raise
            played += 1

    async with unharmed(appliance):
        await trio.to_thread.run_sync(attack)
    assert played > 100
    assert await appliance.engine_seen()
