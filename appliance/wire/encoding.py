"""Strict base64 and hex: one spelling for every value, or `Malformed`.

Two texts that decode to the same bytes would give one receipt two digests, so padding must be
there, unused bits must be zero, and nothing but the alphabet may appear (RFC 4648 sections 3.2
to 3.5 and 4).
"""

from __future__ import annotations

import base64
import binascii
import re

from appliance.errors import Malformed

_LOWER_HEX = re.compile(r"(?:[0-9a-f]{2})*\Z")
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}\Z")


def encode_base64(data: bytes) -> str:
    """Padded standard base64."""
    return base64.b64encode(data).decode("ascii")


def decode_base64(text: str, *, field: str, max_bytes: int) -> bytes:
    """Padded standard base64, in its one canonical spelling.

    Raises:
        Malformed: not that, or more than `max_bytes` of decoded bytes.
    """
    if len(text) > (max_bytes + 2) // 3 * 4:
        raise Malformed(f"{field}: expected at most {max_bytes} bytes of base64", field=field)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Malformed(f"{field}: expected padded standard base64", field=field) from None
    if len(data) > max_bytes:
        raise Malformed(f"{field}: expected at most {max_bytes} bytes of base64", field=field)
    if encode_base64(data) != text:
        raise Malformed(f"{field}: expected canonical base64, unused bits are set", field=field)
    return data


def decode_hex(text: str, *, field: str, length: int | None = None) -> bytes:
    """Lowercase hex, of exactly `length` bytes if that is given.

    Raises:
        Malformed: not that.
    """
    if (length is not None and len(text) != 2 * length) or not _LOWER_HEX.match(text):
        size = "" if length is None else f" of {length} bytes"
        raise Malformed(f"{field}: expected lowercase hex{size}", field=field)
    return bytes.fromhex(text)


def parse_sha256(text: str, *, field: str) -> bytes:
    """The 32 bytes of a `sha256:<lowercase hex>`.

    Raises:
        Malformed: not that.
    """
    if not _SHA256.match(text):
        raise Malformed(f"{field}: expected sha256: and 64 lowercase hex digits", field=field)
    return bytes.fromhex(text.removeprefix("sha256:"))


def format_sha256(digest: bytes) -> str:
    """`sha256:<lowercase hex>` of a digest's 32 bytes."""
    return "sha256:" + digest.hex()
