"""A bounded reader over bytes: every read is checked, and says what it was reading when it fails.

The binary parsers of this layer are written with it, so that none of them can read past its
input, keep what it did not look at, or fail in any other way than `Malformed` with field and
offset.
"""

from __future__ import annotations

from typing import Literal

from appliance.errors import Malformed

ByteOrder = Literal["little", "big"]


class Cursor:
    """Reads `data` from front to back.

    Args:
        data: the input; never copied.
        byteorder: of the integers in it.
        at: offset of `data` in the whole, for messages (a structure inside another).
    """

    __slots__ = ("_at", "_byteorder", "_data", "_offset")

    def __init__(self, data: bytes, byteorder: ByteOrder, *, at: int = 0) -> None:
        self._data = data
        self._byteorder: ByteOrder = byteorder
        self._offset = 0
        self._at = at

    @property
    def offset(self) -> int:
        """Of the next byte, in the whole."""
        return self._at + self._offset

    @property
    def remaining(self) -> int:
        """How many bytes are left."""
        return len(self._data) - self._offset

    def take(self, length: int, field: str) -> bytes:
        """The next `length` bytes.

        Raises:
            Malformed: fewer are left.
        """
        if not 0 <= length <= self.remaining:
            raise self.malformed(f"expected {length} bytes, {self.remaining} are left", field)
        start = self._offset
        self._offset += length
        return self._data[start : self._offset]

    def unsigned(self, length: int, field: str) -> int:
        """The next `length` bytes as an unsigned integer."""
        return int.from_bytes(self.take(length, field), self._byteorder)

    def expect(self, value: bytes, field: str) -> None:
        """Read exactly this constant.

        Raises:
            Malformed: something else is there.
        """
        start = self.offset
        got = self.take(len(value), field)
        if got != value:
            raise Malformed(
                f"{field}: expected {value.hex()}, got {got.hex()} at byte {start}",
                field=field,
                offset=start,
            )

    def zeros(self, length: int, field: str) -> None:
        """Read reserved bytes, which must be zero.

        Raises:
            Malformed: one is not.
        """
        start = self.offset
        if any(self.take(length, field)):
            raise Malformed(
                f"{field}: expected {length} zero bytes at byte {start}", field=field, offset=start
            )

    def sub(self, length: int, field: str) -> Cursor:
        """A reader over just the next `length` bytes; offsets stay those of the whole."""
        at = self.offset
        return Cursor(self.take(length, field), self._byteorder, at=at)

    def rest(self) -> bytes:
        """Everything that is left."""
        return self.take(self.remaining, "rest")

    def end(self, field: str) -> None:
        """Nothing may be left.

        Raises:
            Malformed: there is.
        """
        if self.remaining:
            raise self.malformed(f"expected its end, {self.remaining} bytes are left", field)

    def malformed(self, what: str, field: str) -> Malformed:
        """An error about the next byte, for the caller to raise."""
        return Malformed(f"{field}: {what} at byte {self.offset}", field=field, offset=self.offset)
