"""The HTTP/1.1 response side that our one upstream needs (RFC 9112), without I/O.

h11 does this and more; it costs about 20 µs a chunk, which is most of what a relayed token may
cost altogether (docs/adr/0004). The subset: one response per connection, a body framed by
`Content-Length` or by `chunked`, trailers skipped, no upgrade, no interim (1xx) response, which
a server may only send to clients that asked for one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from appliance.errors import Malformed

MAX_HEAD_BYTES = 65_536
MAX_CHUNK_LINE_BYTES = 256
MAX_TRAILER_BYTES = 4_096

# RFC 9112 sections 4 and 5, 9110 section 5.6.2; a bare CR or LF would be a line break to some parsers.
_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([0-9]{3})(?: [^\0\r\n]*)?")
_FIELD_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\0\r\n]*)")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\0\r\n]*)?")
_FRAMING = (b"content-length", b"transfer-encoding")


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status line and headers; names lower-case, values stripped. Of duplicates the later wins,
    except that those which frame the body must not repeat."""

    status: int
    headers: Mapping[bytes, bytes]


class ResponseReader:
    """Incremental parser of one response: feed bytes, take the head once, then body bytes.

    Contract: `feed` bytes as they come; `head` is None until it is whole; `take` returns the body
    bytes decodable now, b"" for "need more" (or for the end, see `complete`).
    """

    def __init__(self) -> None:
        self.head: ResponseHead | None = None
        self.complete = False
        self._buffer = b""
        self._chunked = False
        self._remaining = 0  # of the body, or of the current chunk
        self._at_chunk_end = False  # its CRLF comes next
        self._in_trailer = False
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> None:
        """Take bytes from the connection; b"" is its end.

        Raises:
            Malformed: not an HTTP/1.1 response, over a bound, or cut off.
        """
        if not data:
            if not self.complete:
                raise Malformed("expected more of the response, the connection ended")
            return
        if self.complete:
            raise Malformed("expected nothing after the response")
        self._buffer = self._buffer + data if self._buffer else data
        if self.head is None:
            self._read_head()

    def take(self) -> bytes:
        """The body bytes that can be decoded from what was fed.

        Raises:
            Malformed: broken framing.
        """
        if not self._buffer or self.head is None or self.complete:
            return b""
        return self._take_chunked() if self._chunked else self._take_sized()

    def _read_head(self) -> None:
        end = self._buffer.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES + 4)
        if end < 0:
            if len(self._buffer) >= MAX_HEAD_BYTES + 4:
                raise Malformed(f"expected a response head of at most {MAX_HEAD_BYTES} bytes")
            return
        head = _parse_head(self._buffer[:end])
        self._buffer = self._buffer[end + 4 :]
        self._frame(head.headers)
        self.head = head

    def _frame(self, headers: Mapping[bytes, bytes]) -> None:
        coding = headers.get(b"transfer-encoding")
        length = headers.get(b"content-length")
        if coding is not None:
            # Both at once is how responses are smuggled, RFC 9112 section 6.3.
            if coding.lower() != b"chunked" or length is not None:
                raise Malformed("expected `chunked` alone as the transfer coding")
            self._chunked = True
        elif length is not None:
            if not (length.isdigit() and len(length) <= 15):
                raise Malformed("expected digits as Content-Length")
            self._remaining = int(length)
            if not self._remaining:
                self._finish()
        else:
            raise Malformed("expected Content-Length or chunked")

    def _finish(self) -> None:
        if self._buffer:
            raise Malformed("expected nothing after the response")
        self.complete = True

    def _take_sized(self) -> bytes:
        data, self._buffer = self._buffer[: self._remaining], self._buffer[self._remaining :]
        self._remaining -= len(data)
        if not self._remaining:
            self._finish()
        return data

    def _take_chunked(self) -> bytes:
        buffer, position, size = self._buffer, 0, len(self._buffer)
        parts: list[bytes] = []
        ended = False
        while True:
            if self._in_trailer:
                position, ended = self._skip_trailer(position)
                break
            if self._remaining:
                part = buffer[position : position + self._remaining]
                if part:
                    parts.append(part)
                position += len(part)
                self._remaining -= len(part)
                if self._remaining:
                    break
                self._at_chunk_end = True
            if self._at_chunk_end:
                if not b"\r\n".startswith(buffer[position : position + 2]):
                    raise Malformed("expected CRLF after a chunk")
                if size - position < 2:
                    break
                position += 2
                self._at_chunk_end = False
            line_end = buffer.find(b"\r\n", position, position + MAX_CHUNK_LINE_BYTES + 2)
            if line_end < 0:
                if size - position >= MAX_CHUNK_LINE_BYTES + 2:
                    raise Malformed("expected a chunk size line")
                break
            length = _chunk_size(buffer[position:line_end])
            position = line_end + 2
            self._remaining = length
            self._in_trailer = length == 0
        self._buffer = buffer[position:]
        if ended:
            self._finish()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _skip_trailer(self, position: int) -> tuple[int, bool]:
        """Skip trailer lines; returns where to go on, and whether the empty line was reached."""
        buffer, start = self._buffer, position
        ended = False
        while not ended and (line_end := buffer.find(b"\r\n", position)) >= 0:
            ended = line_end == position
            position = line_end + 2
        self._trailer_bytes += position - start
        if self._trailer_bytes + (0 if ended else len(buffer) - position) > MAX_TRAILER_BYTES:
            raise Malformed(f"expected a trailer of at most {MAX_TRAILER_BYTES} bytes")
        return position, ended


def _parse_head(data: bytes) -> ResponseHead:
    lines = data.split(b"\r\n")
    status_line = _STATUS_LINE.fullmatch(lines[0])
    if status_line is None:
        raise Malformed("expected an HTTP/1.1 status line")
    status = int(status_line[1])
    if not 200 <= status <= 599:
        raise Malformed("expected a final status, 200 to 599")
    headers: dict[bytes, bytes] = {}
    for line in lines[1:]:
        field = _FIELD_LINE.fullmatch(line)
        if field is None:
            raise Malformed("expected `name: value` in the response head")
        name = field[1].lower()
        if name in headers and name in _FRAMING:
            raise Malformed("expected one Content-Length or Transfer-Encoding")
        headers[name] = field[2].strip(b" \t")
    return ResponseHead(status=status, headers=headers)


def _chunk_size(line: bytes) -> int:
    found = _CHUNK_LINE.fullmatch(line)
    if found is None:
        raise Malformed("expected a chunk size in hexadecimal")
    return int(found[1], 16)
