"""The HTTP/1.1 response reader against hand-made bytes, every chunking, and h11 as an oracle."""

from __future__ import annotations

from dataclasses import dataclass

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import Malformed
from appliance.wire.http1 import (
    MAX_CHUNK_LINE_BYTES,
    MAX_HEAD_BYTES,
    MAX_TRAILER_BYTES,
    ResponseHead,
    ResponseReader,
)
from tests.unit.chunking import borders, cut, in_steps

SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    """A response that was read to its end."""

    head: ResponseHead
    body: bytes


def read(parts: list[bytes]) -> Answer:
    """Read a response from its pieces and the connection's end, as the engine client does."""
    reader, body = ResponseReader(), b""
    for part in [*parts, b""]:
        reader.feed(part)
        while data := reader.take():
            body += data
    assert reader.complete
    assert reader.head is not None
    return Answer(reader.head, body)


# ------------------------------------------------------------------- valid responses, generated

tokens = st.text("abcXYZ019-_", min_size=1, max_size=12).map(str.encode)
values = st.text("abc XYZ;=/\"'\t09\xe9", max_size=20).map(
    lambda text: text.strip().encode("latin-1")
)
framing = {b"content-length", b"transfer-encoding"}
fields = st.lists(
    st.tuples(tokens, values).filter(lambda f: f[0].lower() not in framing), max_size=4
)
extensions = st.sampled_from([b"", b";a", b"; a=b", b';q="x;y"'])
trailers = st.lists(
    st.tuples(tokens, values).filter(lambda f: f[0].lower() not in framing), max_size=3
)


@dataclass(frozen=True)
class Sent:
    """A valid response's bytes and what they mean."""

    stream: bytes
    status: int
    headers: dict[bytes, bytes]
    body: bytes


def lines(headers: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(name + b": " + value + b"\r\n" for name, value in headers)


@st.composite
def responses(draw: st.DrawFn, *, chunked: bool) -> Sent:
    # 204 and 304 never have a body, and 1xx are not final: other framing rules, not of this engine.
    status = draw(st.integers(200, 599).filter(lambda status: status not in (204, 304)))
    reason = draw(st.sampled_from([b" OK", b" ", b" Not  Found", b" \xe9"]))
    others = draw(fields)
    parts = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=5))
    body = b"".join(parts)
    if chunked:
        frame = (b"Transfer-Encoding", draw(st.sampled_from([b"chunked", b"Chunked"])))
        size = draw(st.sampled_from(["%x", "%X", "%06x"]))
        framed = b"".join(
            (size % len(part)).encode() + draw(extensions) + b"\r\n" + part + b"\r\n"
            for part in parts
        )
        framed += b"0" + draw(extensions) + b"\r\n" + lines(draw(trailers)) + b"\r\n"
    else:
        frame = (b"Content-Length", str(len(body)).encode())
        framed = body
    at = draw(st.integers(0, len(others)))
    headers = [*others[:at], frame, *others[at:]]
    stream = f"HTTP/1.1 {status}".encode() + reason + b"\r\n" + lines(headers) + b"\r\n" + framed
    return Sent(stream, status, {name.lower(): value for name, value in headers}, body)


@pytest.mark.parametrize("chunked", [False, True])
@given(data=st.data(), at=borders)
def test_any_chunking_gives_the_same_head_and_body(
    data: st.DataObject, at: list[int], chunked: bool
) -> None:
    sent = data.draw(responses(chunked=chunked))
    expected = Answer(ResponseHead(sent.status, sent.headers), sent.body)
    assert read(cut(sent.stream, at)) == expected
    assert read(in_steps(sent.stream, 1)) == expected


@pytest.mark.parametrize("chunked", [False, True])
@given(data=st.data())
def test_h11_reads_the_same(data: st.DataObject, chunked: bool) -> None:
    sent = data.draw(responses(chunked=chunked))
    oracle = h11.Connection(h11.CLIENT)
    oracle.send(h11.Request(method="GET", target="/", headers=[("host", "engine")]))
    oracle.send(h11.EndOfMessage())
    oracle.receive_data(sent.stream)
    head = oracle.next_event()
    assert isinstance(head, h11.Response)
    body = b""
    while isinstance(event := oracle.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    answer = read([sent.stream])
    assert (answer.head.status, answer.body) == (head.status_code, body)
    # h11 lower-cases the coding as well; the later of duplicate fields wins in both dicts.
    assert {**answer.head.headers, b"transfer-encoding": b""} == {
        **dict(head.headers),
        b"transfer-encoding": b"",
    }


@pytest.mark.parametrize("chunked", [False, True])
@given(data=st.data(), at=st.integers(0, 1 << 20), border=borders)
def test_a_response_cut_off_anywhere_is_malformed(
    data: st.DataObject, at: int, border: list[int], chunked: bool
) -> None:
    sent = data.draw(responses(chunked=chunked))
    kept = sent.stream[: at % len(sent.stream)]
    with pytest.raises(Malformed, match="the connection ended"):
        read(cut(kept, border))


@pytest.mark.parametrize("chunked", [False, True])
@given(data=st.data(), extra=st.binary(min_size=1, max_size=5))
def test_bytes_behind_the_response_are_malformed(
    data: st.DataObject, extra: bytes, chunked: bool
) -> None:
    sent = data.draw(responses(chunked=chunked))
    for parts in ([sent.stream + extra], [sent.stream, extra]):
        with pytest.raises(Malformed, match="nothing after"):
            read(parts)


@given(st.binary(max_size=60), st.sampled_from([b"", SIZED[:-2], SIZED, CHUNKED]), borders)
def test_arbitrary_bytes_are_a_response_or_malformed_and_nothing_else(
    data: bytes, front: bytes, at: list[int]
) -> None:
    outcomes: list[bytes | None] = []
    for parts in (cut(front + data, at), [front + data]):
        try:
            outcomes.append(read(parts).body)
        except Malformed:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]


# ------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"HTTP/1.0 200 OK\r\nContent-Length: 0", id="HTTP/1.0"),
        pytest.param(b"HTTP/2 200\r\nContent-Length: 0", id="HTTP/2"),
        pytest.param(b"ICY 200 OK\r\nContent-Length: 0", id="no HTTP"),
        pytest.param(b"http/1.1 200 OK\r\nContent-Length: 0", id="lower-case version"),
        pytest.param(b"HTTP/1.1  200 OK\r\nContent-Length: 0", id="two spaces"),
        pytest.param(b"HTTP/1.1 20 OK\r\nContent-Length: 0", id="short status"),
        pytest.param(b"HTTP/1.1 2000 OK\r\nContent-Length: 0", id="long status"),
        pytest.param(b"HTTP/1.1 abc OK\r\nContent-Length: 0", id="status in letters"),
        pytest.param(b"HTTP/1.1\r\nContent-Length: 0", id="no status"),
        pytest.param(b"HTTP/1.1 200 OK\nA: b\r\nContent-Length: 0", id="LF in the reason"),
        pytest.param(b"HTTP/1.1 100 Continue\r\nContent-Length: 0", id="interim status"),
        pytest.param(b"HTTP/1.1 101 Switching\r\nContent-Length: 0", id="upgrade"),
        pytest.param(b"HTTP/1.1 199 X\r\nContent-Length: 0", id="status below 200"),
        pytest.param(b"HTTP/1.1 600 X\r\nContent-Length: 0", id="status above 599"),
        pytest.param(b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 0", id="an empty line first"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length 0", id="no colon"),
        pytest.param(b"HTTP/1.1 200 OK\r\n: x\r\nContent-Length: 0", id="no name"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length : 0", id="space before the colon"),
        pytest.param(b"HTTP/1.1 200 OK\r\n Content-Length: 0", id="space before the name"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 0", id="folded line"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA B: c\r\nContent-Length: 0", id="space in a name"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: b\nContent-Length: 0", id="bare LF"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: b\rc\r\nContent-Length: 0", id="bare CR"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: b\x00c\r\nContent-Length: 0", id="NUL"),
    ],
)
def test_a_head_that_is_not_of_http_1_1_is_malformed(head: bytes) -> None:
    for parts in ([head + b"\r\n\r\n"], in_steps(head + b"\r\n\r\n", 1)):
        with pytest.raises(Malformed, match="expected"):
            read(parts)


@pytest.mark.parametrize(
    "framing",
    [
        pytest.param(b"X: y", id="none: until the connection ends"),
        pytest.param(b"Content-Length: 5\r\nTransfer-Encoding: chunked", id="both"),
        pytest.param(b"Transfer-Encoding: chunked\r\nContent-Length: 5", id="both, other order"),
        pytest.param(b"Transfer-Encoding: gzip, chunked", id="another coding too"),
        pytest.param(b"Transfer-Encoding: identity", id="another coding"),
        pytest.param(b"Transfer-Encoding: chunked, chunked", id="chunked twice"),
        pytest.param(b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked", id="in two lines"),
        pytest.param(b"Transfer-Encoding:", id="empty coding"),
        pytest.param(b"Content-Length: 5\r\ncontent-length: 6", id="two lengths"),
        pytest.param(b"Content-Length: 5, 5", id="a list of lengths"),
        pytest.param(b"Content-Length: -1", id="negative"),
        pytest.param(b"Content-Length: +5", id="signed"),
        pytest.param(b"Content-Length: 5 5", id="spaced"),
        pytest.param(b"Content-Length: 0x5", id="hexadecimal"),
        pytest.param(b"Content-Length: 5.0", id="fraction"),
        pytest.param(b"Content-Length:", id="empty length"),
        pytest.param(b"Content-Length: \xb2", id="not an ASCII digit"),
        pytest.param(b"Content-Length: " + b"1" * 16, id="sixteen digits"),
    ],
)
def test_a_body_that_is_not_framed_by_exactly_one_rule_is_malformed(framing: bytes) -> None:
    with pytest.raises(Malformed, match="expected"):
        read([b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\nhello"])


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\r\nhello\r\n0\r\n\r\n", id="no size"),
        pytest.param(b" 5\r\nhello\r\n0\r\n\r\n", id="space before the size"),
        pytest.param(b"5h\r\nhello\r\n0\r\n\r\n", id="not hexadecimal"),
        pytest.param(b"0x5\r\nhello\r\n0\r\n\r\n", id="a prefix"),
        pytest.param(b"-5\r\nhello\r\n0\r\n\r\n", id="negative"),
        pytest.param(b"+5\r\nhello\r\n0\r\n\r\n", id="signed"),
        pytest.param(b"5_0\r\nhello\r\n0\r\n\r\n", id="an underscore"),
        pytest.param(b"000000005\r\nhello\r\n0\r\n\r\n", id="nine digits"),
        pytest.param(b"5\nhello\r\n0\r\n\r\n", id="bare LF behind the size"),
        pytest.param(b"5;a\nb\r\nhello\r\n0\r\n\r\n", id="bare LF in an extension"),
        pytest.param(b"5;a\rb\r\nhello\r\n0\r\n\r\n", id="bare CR in an extension"),
        pytest.param(b"5\r\nhello\n0\r\n\r\n", id="LF behind the chunk"),
        pytest.param(b"5\r\nhelloX\n0\r\n\r\n", id="another byte for the CR"),
        pytest.param(b"5\r\nhello\rX0\r\n\r\n", id="another byte for the LF"),
        pytest.param(b"5\r\nhello!\r\n0\r\n\r\n", id="a chunk longer than it says"),
        pytest.param(b"6\r\nhello\r\n0\r\n\r\n", id="a chunk shorter than it says"),
        pytest.param(b"5\r\nhello\r\n\r\n", id="no last chunk"),
    ],
)
def test_broken_chunks_are_malformed_in_any_chunking(body: bytes) -> None:
    for parts in ([CHUNKED + body], [CHUNKED, body], in_steps(CHUNKED + body, 1)):
        with pytest.raises(Malformed, match="expected"):
            read(parts)


def test_names_are_lower_case_values_are_stripped_and_the_later_duplicate_wins() -> None:
    head = b"HTTP/1.1 201\r\nX-A:\t one \t\r\nx-a: two\r\nEmpty:\r\nCONTENT-LENGTH:0\r\n\r\n"
    assert read([head]) == Answer(
        ResponseHead(201, {b"x-a": b"two", b"empty": b"", b"content-length": b"0"}), b""
    )


def test_space_before_an_extension_is_skipped() -> None:
    assert read([CHUNKED + b"5 \t; a=b\r\nhello\r\n0 \r\n\r\n"]).body == b"hello"


def test_body_bytes_are_given_as_soon_as_they_are_there() -> None:
    reader = ResponseReader()
    reader.feed(CHUNKED + b"5\r\nhe")
    assert reader.take() == b"he"
    assert reader.take() == b""
    reader.feed(b"llo\r")
    assert reader.take() == b"llo"
    reader.feed(b"\n1\r\n!\r\n2\r\n??")
    assert reader.take() == b"!??"
    reader.feed(b"\r\n0\r\n\r\n")
    assert reader.take() == b""
    assert reader.complete
    assert reader.take() == b""


def test_nothing_can_be_taken_before_the_head_is_whole() -> None:
    reader = ResponseReader()
    reader.feed(SIZED[:-1])
    assert reader.head is None
    assert reader.take() == b""
    reader.feed(SIZED[-1:])
    assert reader.head == ResponseHead(200, {b"content-length": b"5"})


# ------------------------------------------------------------------------------------- bounds


def head_of(size: int) -> bytes:
    """A head of `size` bytes, not counting the empty line."""
    front = SIZED.removesuffix(b"\r\n\r\n") + b"\r\nX: "
    return front + b"x" * (size - len(front))


STEPS = [1, 1000, 1 << 20]


@pytest.mark.parametrize("step", [1021, 1 << 20])
def test_a_head_may_be_as_long_as_the_bound_and_no_longer(step: int) -> None:
    fits = head_of(MAX_HEAD_BYTES) + b"\r\n\r\nhello"
    assert read(in_steps(fits, step)).body == b"hello"
    with pytest.raises(Malformed, match="head of at most"):
        read(in_steps(head_of(MAX_HEAD_BYTES + 1) + b"\r\n\r\nhello", step))


def test_an_endless_head_is_refused() -> None:
    with pytest.raises(Malformed, match="head of at most"):
        read([SIZED[:-2], *[b"X: y\r\n"] * MAX_HEAD_BYTES])


@pytest.mark.parametrize("step", STEPS)
def test_a_chunk_line_may_be_as_long_as_the_bound_and_no_longer(step: int) -> None:
    longest = b"5;" + b"x" * (MAX_CHUNK_LINE_BYTES - 2)
    rest = b"\r\nhello\r\n0\r\n\r\n"
    assert read(in_steps(CHUNKED + longest + rest, step)).body == b"hello"
    with pytest.raises(Malformed, match="chunk size line"):
        read(in_steps(CHUNKED + longest + b"x" + rest, step))


def test_an_endless_chunk_line_is_refused() -> None:
    with pytest.raises(Malformed, match="chunk size line"):
        read([CHUNKED, *[b"0" * 100] * 100])


@pytest.mark.parametrize("step", STEPS)
def test_a_trailer_may_be_as_long_as_the_bound_and_no_longer(step: int) -> None:
    line = b"X: " + b"x" * 95 + b"\r\n"
    full = line * (MAX_TRAILER_BYTES // len(line))
    last = MAX_TRAILER_BYTES - len(full) - len(b"\r\n")
    longest = full + b"Y:" + b"x" * (last - 4) + b"\r\n"
    assert read(in_steps(CHUNKED + b"0\r\n" + longest + b"\r\n", step)).body == b""
    with pytest.raises(Malformed, match="trailer of at most"):
        read(in_steps(CHUNKED + b"0\r\nZ" + longest + b"\r\n", step))


@pytest.mark.parametrize("endless", [b"X: y\r\n", b"xxxxxx", b"X: y"])
def test_an_endless_trailer_is_refused(endless: bytes) -> None:
    with pytest.raises(Malformed, match="trailer of at most"):
        read([CHUNKED + b"0\r\n", *[endless] * MAX_TRAILER_BYTES])
