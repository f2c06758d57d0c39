"""A bundle: what was verified, in one JSON file that can be verified again, offline, later.

    {"api_version": "dcv/1", "type": "bundle", "url", "fetched_at", "nonce", "spki_sha256",
     "report": {…}}

The report is kept as it was understood: every hash over it is taken of canonical forms. Endorsements
are inside the report. `fetched_at` is the word of whoever made the file.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, canonical_json, parse_json_object
from appliance.wire.encoding import decode_hex
from appliance.wire.identity import API_VERSION
from appliance.wire.report import MAX_BYTES, MAX_NESTING, Report, read_report

TYPE = "bundle"
MAX_BUNDLE_BYTES = 4 * MAX_BYTES
MEMBERS = frozenset({"api_version", "type", "url", "fetched_at", "nonce", "spki_sha256", "report"})


@dataclass(frozen=True, slots=True)
class Bundle:
    """What was fetched.

    Attributes:
        fetched_at: Unix seconds.
        nonce: 32 bytes, None for the null form.
        spki_sha256: 32 bytes, of the TLS key that was seen.
    """

    url: str
    fetched_at: int
    nonce: bytes | None
    spki_sha256: bytes
    report: Report

    def to_bytes(self) -> bytes:
        """The file."""
        return canonical_json(
            {
                "api_version": API_VERSION,
                "type": TYPE,
                "url": self.url,
                "fetched_at": self.fetched_at,
                "nonce": None if self.nonce is None else self.nonce.hex(),
                "spki_sha256": self.spki_sha256.hex(),
                "report": self.report.to_json(),
            }
        )


def parse_bundle(data: bytes) -> Bundle:
    """Read a bundle; nothing in it is believed.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    if len(data) > MAX_BUNDLE_BYTES:
        raise Malformed(f"bundle: expected at most {MAX_BUNDLE_BYTES} bytes")
    document = parse_json_object(data, max_nesting=MAX_NESTING + 1)
    if document.keys() != MEMBERS:
        odd = min(document.keys() ^ MEMBERS)[:64]
        raise Malformed(f"bundle: missing or unknown member `{odd}`", field=f"$.{odd}")
    if (document["api_version"], document["type"]) != (API_VERSION, TYPE):
        raise Malformed(f"bundle: expected type {TYPE} of {API_VERSION}", field="$.type")
    report, fetched_at = document["report"], document["fetched_at"]
    if not isinstance(report, dict):
        raise Malformed("report: expected an object", field="$.report")
    if isinstance(fetched_at, bool) or not isinstance(fetched_at, int) or fetched_at < 0:
        raise Malformed("fetched_at: expected Unix seconds", field="$.fetched_at")
    nonce = None if document["nonce"] is None else _hex(document, "nonce")
    url = document["url"]
    if not isinstance(url, str):
        raise Malformed("url: expected text", field="$.url")
    return Bundle(url, fetched_at, nonce, _hex(document, "spki_sha256"), read_report(report))


def _hex(document: JsonObject, name: str) -> bytes:
    value = document[name]
    if not isinstance(value, str):
        raise Malformed(f"{name}: expected hex text", field=f"$.{name}")
    return decode_hex(value, field=f"$.{name}", length=32)
