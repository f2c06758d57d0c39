"""What was written to a client, as a digest, a count and, at the end, an output.

Every content byte passes through `write`, before transfer coding or HTTP/2 framing, heartbeats
and `[DONE]` included. That happens for every token of every stream, so a write only puts the
bytes aside; every 16 KiB of them are hashed in one go, and decoded in one go where the output is
wanted. What is put aside is all that is kept of the bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from appliance.errors import Malformed
from appliance.wire.output import Output, OutputJoiner

SETTLE_BYTES = 16 << 10
"""Put aside before they are hashed and decoded: some 60 events, a tenth of a millisecond of work."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The content bytes written so far: how many, and their SHA-256, 32 bytes."""

    size: int
    sha256: bytes


class Transcript:
    """The bytes of one answer, in the order they are written.

    Attributes:
        size: content bytes written so far.
    """

    __slots__ = ("_aside", "_aside_bytes", "_hash", "_joiner", "size")

    def __init__(self, *, max_bytes: int, streams: bool) -> None:
        """Begin with nothing written.

        Args:
            max_bytes: of text that `output` may take; past it there is no output.
            streams: whether these are events; otherwise `output` has nothing to say.
        """
        self.size = 0
        self._hash = hashlib.sha256()
        self._joiner = OutputJoiner(max_bytes=max_bytes) if streams else None
        self._aside: list[bytes] = []
        self._aside_bytes = 0

    def write(self, data: bytes) -> None:
        """Take the next content bytes: whole events, where these are events."""
        self._aside.append(data)
        self._aside_bytes += len(data)
        self.size += len(data)
        if self._aside_bytes >= SETTLE_BYTES:
            self._settle()

    def prefix(self) -> Prefix:
        """What was written so far; later writes do not change it."""
        self._settle()
        return Prefix(self.size, self._hash.digest())

    def output(self) -> Output | None:
        """What the events written so far say; None where they cannot be read or are too long,
        and where these are no events."""
        self._settle()
        try:
            return None if self._joiner is None else self._joiner.output()
        except Malformed:
            return None

    def _settle(self) -> None:
        data = b"".join(self._aside)
        self._aside.clear()
        self._aside_bytes = 0
        self._hash.update(data)
        if self._joiner is None:
            return
        try:
            self._joiner.add_events(data)
            self._joiner.compact()
        except Malformed:  # handed on all the same: it is the client's to judge
            self._joiner = None
