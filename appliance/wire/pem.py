"""Certificates as PEM text, in one spelling: blocks, line ends, and nothing else.

Source: RFC 7468. Its lax grammar passes over text around the blocks and over what does not end;
a reader that does so says of a text that was cut or altered that it is whole (OpenSSL's drops an
unfinished last certificate). So the section 3 grammar is read here, `stricttextualmsg`, but with
lines of any length and empty lines: tools write both.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable

from appliance.errors import Malformed
from appliance.wire.encoding import decode_base64

BEGIN = b"-----BEGIN CERTIFICATE-----"
END = b"-----END CERTIFICATE-----"

MAX_CERTIFICATES = 16
"""Of one chain; NVIDIA's have five, AMD's three."""

MAX_CERTIFICATE_BYTES = 64 << 10

MAX_PEM_BYTES = MAX_CERTIFICATES * MAX_CERTIFICATE_BYTES

_LINE = re.compile(rb".{1,64}")


def split_pem(pem: bytes, *, field: str) -> tuple[bytes, ...]:
    """The certificates of a PEM text, DER, in its order: nothing in them was looked at.

    Raises:
        Malformed: none, more than 16, too large, one that does not end or is not base64 in its
            canonical spelling, or something beside them.
    """
    if len(pem) > MAX_PEM_BYTES:
        raise Malformed(f"{field}: expected at most 1 MiB of certificates", field=field)
    found: list[bytes] = []
    body: list[bytes] | None = None
    for line in pem.replace(b"\r\n", b"\n").split(b"\n"):
        if body is None:
            if line == BEGIN:
                body = []
            elif line:
                raise Malformed(f"{field}: expected PEM certificates and nothing else", field=field)
        elif line == END:
            found.append(_decoded(b"".join(body), field))
            body = None
        else:
            body.append(line)
    if body is not None:
        raise Malformed(f"{field}: expected PEM certificates that end", field=field)
    if not 0 < len(found) <= MAX_CERTIFICATES:
        raise Malformed(
            f"{field}: expected 1 to {MAX_CERTIFICATES} certificates, got {len(found)}", field=field
        )
    return tuple(found)


def join_pem(certificates: Iterable[bytes]) -> bytes:
    """DER certificates as one PEM text."""
    lines: list[bytes] = []
    for der in certificates:
        lines += [BEGIN, *_LINE.findall(b64encode(der)), END]
    return b"".join(line + b"\n" for line in lines)


def _decoded(body: bytes, field: str) -> bytes:
    # Latin-1 has a character for every byte; those that are not of the alphabet are refused next.
    text = body.decode("latin-1")
    return decode_base64(text, field=field, max_bytes=MAX_CERTIFICATE_BYTES)
