"""A bundle: what was verified, in one JSON file that can be verified again, offline, later.

    {"api_version": "dcv/1", "type": "bundle", "url", "fetched_at", "nonce", "spki_sha256",
     "report": {…}, "receipt": {…} | null, "epochs": [{…}], "request_b64", "response_b64"}

Every member is there; what is not at hand is null, and `epochs` is empty. The request and the
response are in it only where whoever saved it wanted their content there.

The report is kept as it was understood: every hash over it is taken of canonical forms, and a
file whose report says more than that is refused, as nobody would have looked at it. Endorsements
are inside the report. `url` and `fetched_at` are the word of whoever made the file.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.errors import Malformed
from appliance.rats.exchange import Exchange
from appliance.wire.canonical import (
    MAX_SAFE_INTEGER,
    JsonObject,
    JsonValue,
    canonical_json,
    parse_json_object,
)
from appliance.wire.encoding import decode_base64, decode_hex, encode_base64
from appliance.wire.epoch import EpochEvidence, read_epoch
from appliance.wire.identity import API_VERSION
from appliance.wire.receipt import MAX_NESTING, parse_receipt
from appliance.wire.report import MAX_BYTES, Report, read_report

TYPE = "bundle"
MAX_BUNDLE_BYTES = 4 * MAX_BYTES
MAX_CONTENT_BYTES = 16 << 20
"""Of a request, and of a response."""

MAX_EPOCHS = 2
"""A receipt cites one on admission, and one on completion where that was asked for."""

MEMBERS = frozenset(
    {
        "api_version",
        "type",
        "url",
        "fetched_at",
        "nonce",
        "spki_sha256",
        "report",
        "receipt",
        "epochs",
        "request_b64",
        "response_b64",
    }
)


@dataclass(frozen=True, slots=True)
class Bundle:
    """What was fetched.

    Attributes:
        fetched_at: Unix seconds.
        nonce: 32 bytes, None for the null form.
        spki_sha256: 32 bytes, of the TLS key that was seen; None where the report did not come
            over a connection.
        exchange: None where only the appliance was asked about.
    """

    url: str
    fetched_at: int
    nonce: bytes | None
    spki_sha256: bytes | None
    report: Report
    exchange: Exchange | None = None

    def to_bytes(self) -> bytes:
        """The file."""
        document: JsonObject = {
            "api_version": API_VERSION,
            "type": TYPE,
            "url": self.url,
            "fetched_at": self.fetched_at,
            "nonce": None if self.nonce is None else self.nonce.hex(),
            "spki_sha256": None if self.spki_sha256 is None else self.spki_sha256.hex(),
            "report": self.report.to_json(),
        }
        return canonical_json(document | _exchange_json(self.exchange))


def parse_bundle(data: bytes) -> Bundle:
    """Read a bundle; nothing in it is believed.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    if len(data) > MAX_BUNDLE_BYTES:
        raise Malformed(f"bundle: expected at most {MAX_BUNDLE_BYTES} bytes")
    return read_bundle(parse_json_object(data, max_nesting=MAX_NESTING + 1))


def read_bundle(document: JsonObject) -> Bundle:
    """Read a bundle that is already JSON.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    if document.keys() != MEMBERS:
        odd = min(document.keys() ^ MEMBERS)[:64]
        raise Malformed(f"bundle: missing or unknown member `{odd}`", field=f"$.{odd}")
    if (document["api_version"], document["type"]) != (API_VERSION, TYPE):
        raise Malformed(f"bundle: expected type {TYPE} of {API_VERSION}", field="$.type")
    fetched_at, url = document["fetched_at"], document["url"]
    if (
        isinstance(fetched_at, bool)
        or not isinstance(fetched_at, int)
        or not 0 <= fetched_at <= MAX_SAFE_INTEGER
    ):
        raise Malformed("fetched_at: expected Unix seconds", field="$.fetched_at")
    if not isinstance(url, str):
        raise Malformed("url: expected text", field="$.url")
    return Bundle(
        url=url,
        fetched_at=fetched_at,
        nonce=_hex(document, "nonce"),
        spki_sha256=_hex(document, "spki_sha256"),
        report=_report(document["report"]),
        exchange=_exchange(document),
    )


def _report(value: JsonValue) -> Report:
    if not isinstance(value, dict):
        raise Malformed("report: expected an object", field="$.report")
    report = read_report(value)
    if report.to_json() != value:
        raise Malformed("report: expected it as it was understood, no more", field="$.report")
    return report


def _exchange_json(exchange: Exchange | None) -> JsonObject:
    if exchange is None:
        return {"receipt": None, "epochs": [], "request_b64": None, "response_b64": None}
    epochs: list[JsonValue] = [one.to_json() for one in exchange.epochs]
    return {
        "receipt": exchange.receipt.document,
        "epochs": epochs,
        "request_b64": None if exchange.request is None else encode_base64(exchange.request),
        "response_b64": None if exchange.response is None else encode_base64(exchange.response),
    }


def _exchange(document: JsonObject) -> Exchange | None:
    receipt, epochs = document["receipt"], _epochs(document["epochs"])
    request, response = (_content(document, name) for name in ("request_b64", "response_b64"))
    if receipt is None:
        if epochs or request is not None or response is not None:
            raise Malformed("receipt: expected one beside what it is about", field="$.receipt")
        return None
    if not isinstance(receipt, dict):
        raise Malformed("receipt: expected an object", field="$.receipt")
    return Exchange(parse_receipt(canonical_json(receipt)), epochs, request, response)


def _epochs(value: JsonValue) -> tuple[EpochEvidence, ...]:
    if not isinstance(value, list) or len(value) > MAX_EPOCHS:
        raise Malformed(f"epochs: expected at most {MAX_EPOCHS}", field="$.epochs")
    return tuple(read_epoch(one, where=f"$.epochs[{i}]") for i, one in enumerate(value))


def _content(document: JsonObject, name: str) -> bytes | None:
    value = document[name]
    if value is None:
        return None
    if not isinstance(value, str):
        raise Malformed(f"{name}: expected base64 text", field=f"$.{name}")
    return decode_base64(value, field=f"$.{name}", max_bytes=MAX_CONTENT_BYTES)


def _hex(document: JsonObject, name: str) -> bytes | None:
    value = document[name]
    if value is None:
        return None
    if not isinstance(value, str):
        raise Malformed(f"{name}: expected hex text", field=f"$.{name}")
    return decode_hex(value, field=f"$.{name}", length=32)
