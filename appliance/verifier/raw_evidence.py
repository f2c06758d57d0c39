"""Evidence from files and arguments: read within bounds, decoded by rules that leave no choice.

A `FILE` holds binary data, or those as text. Which of them is decided by its bytes alone, never by
what would parse (`decode`), so that one file means one thing to whoever checks it.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path

from appliance.errors import Malformed, VerificationIncomplete
from appliance.wire.azure_json import decode_any_base64
from appliance.wire.pem import MAX_CERTIFICATE_BYTES, MAX_CERTIFICATES, split_pem

MAX_FILE_BYTES = 16 << 20

PEM_BEGIN = b"-----BEGIN "

_HEX_DIGITS = b"0123456789abcdefABCDEF"
_BASE64_DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_="
_DER_SEQUENCE = 0x30

# RFC 3339 section 5.6. The rest (no 30th of February) is datetime's to know.
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?"
    r"(?:[Zz]|[+-][0-9]{2}:[0-9]{2})\Z"
)


def read_file(path: Path, *, option: str) -> bytes:
    """The bytes of a file that was named on the command line.

    Args:
        option: that named it, for messages.

    Raises:
        VerificationIncomplete: it cannot be read.
        Malformed: more than 16 MiB, which no evidence is.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise VerificationIncomplete(f"{option} {path}: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise Malformed(f"{option}: expected at most 16 MiB", field=option)
    return data


def decode(data: bytes, *, field: str) -> bytes:
    """Binary data, or hex or base64 text of them. PEM is left as it is.

    In this order: data that have a PEM label are PEM; nothing but hex digits and white space is
    hex, of either case; nothing but digits of base64 (either alphabet, padded or not) and white
    space is base64; everything else is binary. Base64 may hold PEM, as NVIDIA's tools write it.

    Raises:
        Malformed: hex or base64 that does not decode.
    """
    if PEM_BEGIN in data:
        return data
    text = b"".join(data.split())
    if not text:
        return data
    if not text.translate(None, _HEX_DIGITS):
        if len(text) % 2:
            raise Malformed(f"{field}: expected hex, an odd number of digits is none", field=field)
        return bytes.fromhex(text.decode("ascii"))
    if not text.translate(None, _BASE64_DIGITS):
        return decode_any_base64(text.decode("ascii"), field=field)
    return data


def split_certificates(data: bytes, *, field: str) -> tuple[bytes, ...]:
    """The certificates of a file, DER, in its order: PEM or DER, one after the other.

    Nothing in them is looked at.

    Raises:
        Malformed: none, more than 16, or something else between them.
    """
    decoded = decode(data, field=field)
    if PEM_BEGIN in decoded:
        return split_pem(decoded, field=field)
    found: list[bytes] = []
    rest = decoded
    while rest or not found:
        if len(found) == MAX_CERTIFICATES:
            raise Malformed(
                f"{field}: expected at most {MAX_CERTIFICATES} certificates", field=field
            )
        length = _der_length(rest, field)
        found.append(rest[:length])
        rest = rest[length:]
    return tuple(found)


def parse_hex(text: str, *, option: str, lengths: range | tuple[int, ...]) -> bytes:
    """Hex of either case, as an argument.

    Args:
        lengths: in bytes, the ones that will do.

    Raises:
        VerificationIncomplete: not that.
    """
    if not text.isascii() or text.strip("0123456789abcdefABCDEF") or len(text) % 2:
        raise VerificationIncomplete(f"{option}: expected hex")
    data = bytes.fromhex(text)
    if len(data) not in lengths:
        wanted = (
            f"at most {lengths[-1]}"
            if isinstance(lengths, range)
            else " or ".join(map(str, lengths))
        )
        raise VerificationIncomplete(f"{option}: expected {wanted} bytes of hex, got {len(data)}")
    return data


def parse_time(text: str, *, option: str) -> datetime.datetime:
    """An RFC 3339 date and time, with its offset, in UTC.

    Raises:
        VerificationIncomplete: not that.
    """
    try:
        if not _RFC3339.match(text):
            raise ValueError("form")  # noqa: TRY301  # told in one place, below
        return datetime.datetime.fromisoformat(text.upper()).astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        raise VerificationIncomplete(
            f"{option}: expected an RFC 3339 time such as 2026-11-23T12:00:00Z"
        ) from None


def _der_length(data: bytes, field: str) -> int:
    """Of the DER SEQUENCE that data begin with, its header included (X.690 section 8.1.3)."""
    problem = Malformed(f"{field}: expected PEM or DER certificates", field=field)
    if len(data) < 2 or data[0] != _DER_SEQUENCE:
        raise problem
    length, header = data[1], 2
    if length >= 0x80:
        size = length & 0x7F
        header += size
        if not 0 < size <= 3 or len(data) < header:
            raise problem
        length = int.from_bytes(data[2:header])
    if length > MAX_CERTIFICATE_BYTES or header + length > len(data):
        raise problem
    return header + length
