"""A unified kernel image as bytes: its PE sections, and the hash that firmware takes of it.

Only what prediction needs of PE/COFF (Microsoft, "PE Format") and of the Authenticode hash
("Windows Authenticode Portable Executable Signature Format", 2008, "Calculating the PE Image
Hash"). All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

MAX_SECTIONS = 96
"""The Windows loader's own bound."""

CHECKSUM_OFFSET = 64
"""Of CheckSum in the optional header, PE32 and PE32+ alike."""

CERTIFICATE_TABLE = 4
"""Its index among the data directories."""

DIRECTORIES = {0x10B: 96, 0x20B: 112}
"""Optional header's magic (PE32, PE32+) to where its data directories begin."""


class PeError(ValueError):
    """Bytes that are not a PE image; the message says what was expected where."""


@dataclass(frozen=True, slots=True)
class Section:
    """One entry of the section table.

    Attributes:
        memory_size: bytes that count once it is loaded. file_offset, file_size: in the file, padded
            to the file alignment.
    """

    name: str
    memory_size: int
    file_offset: int
    file_size: int


@dataclass(frozen=True, slots=True)
class PeImage:
    """A PE image and where its parts lie.

    Attributes:
        checksum_at, certificates_at: offsets of CheckSum and of the certificate table's directory
            entry; None where the image has no such entry. headers_size: SizeOfHeaders.
    """

    data: bytes
    checksum_at: int
    certificates_at: int | None
    headers_size: int
    sections: tuple[Section, ...]

    def section(self, name: str) -> bytes | None:
        """Contents of the first section of this name as loaded: without padding, or padded with
        zeros up to its size in memory."""
        for one in self.sections:
            if one.name == name:
                held = self.data[one.file_offset : one.file_offset + one.file_size]
                return held[: one.memory_size].ljust(one.memory_size, b"\0")
        return None


def parse_pe(data: bytes) -> PeImage:
    """Find the parts.

    Raises:
        PeError: not a PE image, or it points outside of itself.
    """
    if data[:2] != b"MZ" or len(data) < 0x40:
        raise PeError("expected MZ at 0")
    header = _unpack(data, 0x3C, "<I")[0]
    if data[header : header + 4] != b"PE\0\0":
        raise PeError(f"expected PE at {header}")
    count, optional_size = _unpack(data, header + 6, "<H")[0], _unpack(data, header + 20, "<H")[0]
    optional = header + 24
    magic = _unpack(data, optional, "<H")[0]
    if magic not in DIRECTORIES or count > MAX_SECTIONS:
        raise PeError(f"expected PE32 or PE32+ with at most {MAX_SECTIONS} sections")
    directories = DIRECTORIES[magic]
    directory_count = _unpack(data, optional + directories - 4, "<I")[0]
    has_certificates = directory_count > CERTIFICATE_TABLE
    headers_size = _unpack(data, optional + 60, "<I")[0]
    if headers_size > len(data):
        raise PeError("expected headers within the file")
    sections = []
    for at in range(optional + optional_size, optional + optional_size + 40 * count, 40):
        memory_size, _, file_size, file_offset = _unpack(data, at + 8, "<IIII")
        if file_size and file_offset + file_size > len(data):
            raise PeError("expected every section within the file")
        text = data[at : at + 8].rstrip(b"\0").decode("ascii", "replace")
        sections.append(Section(text, memory_size, file_offset, file_size))
    return PeImage(
        data,
        optional + CHECKSUM_OFFSET,
        optional + directories + 8 * CERTIFICATE_TABLE if has_certificates else None,
        headers_size,
        tuple(sections),
    )


def authenticode(data: bytes, algorithm: str = "sha256") -> bytes:
    """The Authenticode hash: what LoadImage measures into PCR 4, and with SHA-384 into RTMR 1.

    Raises:
        PeError: as `parse_pe`.
    """
    image = parse_pe(data)
    digest = hashlib.new(algorithm)
    # 1. The headers without the checksum and the certificate table's entry.
    digest.update(data[: image.checksum_at])
    certificates_size = 0
    if image.certificates_at is None:
        digest.update(data[image.checksum_at + 4 : image.headers_size])
    else:
        digest.update(data[image.checksum_at + 4 : image.certificates_at])
        digest.update(data[image.certificates_at + 8 : image.headers_size])
        start, size = _unpack(data, image.certificates_at, "<II")
        certificates_size = size if start else 0
    # 2. The sections in the order of the file, with their padding.
    hashed = image.headers_size
    for one in sorted(image.sections, key=lambda one: one.file_offset):
        if one.file_size:
            digest.update(data[one.file_offset : one.file_offset + one.file_size])
            hashed += one.file_size
    # 3. What follows them, up to the certificates, which come last.
    end = len(data) - certificates_size
    if end < hashed:
        raise PeError("expected the certificate table behind the sections")
    digest.update(data[hashed:end])
    return digest.digest()


def _unpack(data: bytes, offset: int, form: str) -> tuple[int, ...]:
    try:
        return struct.unpack_from(form, data, offset)
    except struct.error:
        raise PeError(f"expected {struct.calcsize(form)} bytes at {offset}") from None
