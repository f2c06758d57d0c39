"""The certificates that a SEV-SNP host hands to its guest beside a report.

Source: 56421 (Guest-Hypervisor Communication Block Standardization) revision 2.03,
section 4.1.8.1: entries of a GUID, an offset and a length, both little-endian and counted from
the start of the table, ended by an entry of zeros. GUIDs stand in the order in which they are
written (RFC 4122), as AMD's own tools and every host do it.

The host, whom nobody trusts, wrote all of it: the certificates are worth what their signatures
are, and entries that nobody here knows are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from appliance.errors import Malformed
from appliance.wire.cursor import Cursor

MAX_TABLE_BYTES = 1 << 20
"""Far above what a kernel passes on (TSM_REPORT_OUTBLOB_MAX was 32 KiB, and is 16 MiB later)."""

MAX_ENTRIES = 64

ENTRY_BYTES = 24

GUIDS = {
    UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"): "ark",
    UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"): "ask",
    UUID("63da758d-e664-4564-adc5-f4b93be8accd"): "vcek",
    UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1"): "vlek",
    UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea"): "crl",
}


@dataclass(frozen=True, slots=True)
class CertificateTable:
    """What was in the table, DER as the host has it; None where it was not.

    Attributes:
        ark, ask: the issuers. With a VLEK, `ask` holds its issuer, AMD's ASVK.
        vcek, vlek: the key that signed the report; a host hands out the one it uses.
        crl: AMD's revocation list.
    """

    ark: bytes | None = None
    ask: bytes | None = None
    vcek: bytes | None = None
    vlek: bytes | None = None
    crl: bytes | None = None


def parse_certificate_table(data: bytes) -> CertificateTable:
    """Read a table; empty input is an empty table, which a host that has none hands out.

    Raises:
        Malformed: no end, an entry that lies outside the table or in its head, a GUID twice, or
            too large.
    """
    if not data:
        return CertificateTable()
    if len(data) > MAX_TABLE_BYTES:
        raise Malformed(f"expected at most {MAX_TABLE_BYTES} bytes", field="certificate_table")
    entries = _entries(Cursor(data, "little"))
    head = (len(entries) + 1) * ENTRY_BYTES
    found: dict[str, bytes] = {}
    for number, (guid, offset, length) in enumerate(entries):
        field = f"entries[{number}]"
        if offset < head or offset + length > len(data):
            raise Malformed(
                f"{field}: expected a place from {head} to {len(data)}, got {offset} + {length}",
                field=field,
                offset=number * ENTRY_BYTES,
            )
        name = GUIDS.get(guid)
        if name in found:
            raise Malformed(
                f"{field}: {name} is there twice", field=field, offset=number * ENTRY_BYTES
            )
        # An entry of no bytes is how some hosts say that they have none.
        if name is not None and length:
            found[name] = data[offset : offset + length]
    return CertificateTable(**found)


def _entries(cursor: Cursor) -> list[tuple[UUID, int, int]]:
    entries: list[tuple[UUID, int, int]] = []
    while len(entries) <= MAX_ENTRIES:
        field = f"entries[{len(entries)}]"
        guid = UUID(bytes=cursor.take(16, f"{field}.guid"))
        offset = cursor.unsigned(4, f"{field}.offset")
        length = cursor.unsigned(4, f"{field}.length")
        if guid.int == offset == length == 0:
            return entries
        entries.append((guid, offset, length))
    raise cursor.malformed(f"expected at most {MAX_ENTRIES} entries", "entries")
