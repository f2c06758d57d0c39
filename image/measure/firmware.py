"""A guest firmware file as bytes, and the table that it describes itself in.

A virtual machine monitor reads the table to know where the firmware wants its pages; what it puts
there is then measured. Last in the file lies the reset vector, 32 bytes, and before it a list of
entries that is read backwards, each `data, length of all of it (2), GUID (16)` (EDK2,
OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm). All numbers are little-endian.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator
from typing import Any

TABLE = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
"""The last entry: its length is the table's."""

RESET_VECTOR_BYTES = 32
ENTRY_BYTES = 18
PAGE_BYTES = 4096
TOP = 1 << 32
"""The file ends here in the guest's memory, where a processor starts."""

MAX_BYTES = 64 << 20
"""Real ones have 2 to 16 MiB."""

MAX_SECTIONS = 64
"""Real ones declare at most a dozen."""

MAX_PAGES = MAX_BYTES // PAGE_BYTES
"""Of one section; declared ones have at most a few hundred."""


class FirmwareError(ValueError):
    """A firmware that cannot be measured; the message says what was expected of it."""


def table(firmware: bytes) -> dict[uuid.UUID, bytes]:
    """The entries' data, by GUID; of two with one GUID, the one nearer to the end.

    Raises:
        FirmwareError: no table, or not a firmware's size.
    """
    if not 0 < len(firmware) <= MAX_BYTES or len(firmware) % PAGE_BYTES:
        raise FirmwareError("expected whole pages of 4 KiB, at most 64 MiB")
    end = len(firmware) - RESET_VECTOR_BYTES
    length, guid = _entry(firmware, end)
    if guid != TABLE or not ENTRY_BYTES <= length <= end:
        raise FirmwareError("expected a table of GUIDs before the reset vector")
    start, at = end - length, end - ENTRY_BYTES
    found: dict[uuid.UUID, bytes] = {}
    while at > start:
        length, guid = _entry(firmware, at)
        if not ENTRY_BYTES <= length <= at - start:
            raise FirmwareError("expected every entry within the table of GUIDs")
        found.setdefault(guid, firmware[at - length : at - ENTRY_BYTES])
        at -= length
    return found


def pointer(data: bytes, what: str) -> int:
    """An entry that is one number of 32 bits.

    Raises:
        FirmwareError: it is shorter.
    """
    value: int
    (value,) = numbers(data, 0, "<I", what)
    return value


def numbers(data: bytes, offset: int, form: str, what: str) -> tuple[Any, ...]:
    """`struct.unpack_from`, bounded.

    Raises:
        FirmwareError: the data end before.
    """
    if not 0 <= offset <= len(data) - struct.calcsize(form):
        raise FirmwareError(f"expected {what} within the firmware")
    return struct.unpack_from(form, data, offset)


def pages(data: bytes, address: int) -> Iterator[tuple[int, bytes]]:
    """Address and contents of each page of data that begin at an address."""
    for offset in range(0, len(data), PAGE_BYTES):
        yield address + offset, data[offset : offset + PAGE_BYTES]


def _entry(firmware: bytes, end: int) -> tuple[int, uuid.UUID]:
    """Length and GUID of the entry that ends here."""
    (length,) = struct.unpack_from("<H", firmware, end - ENTRY_BYTES)
    return length, uuid.UUID(bytes_le=firmware[end - 16 : end])
