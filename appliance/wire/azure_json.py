"""Azure evidence as other tools write it to JSON files, brought into our form.

    trustee, version 1 and 2   {"version", "tpm_quote": {"message", "signature", "pcrs"},
                                "hcl_report", "vcek" | "td_quote"}: quote in hex, the rest base64url
    trustee, before versions   {"quote" | "tpm_quote": the same as arrays of numbers,
                                "report" | "hcl_report": an array, "vcek": PEM | "td_quote": array}
    attestation-rs             {"platform": "az-snp" | "az-tdx", "evidence": as version 1}
    ours                       {"scheme": "azure_vtpm", …_b64, "endorsements"} (protocol.md 3)

`pcrs` are the 24 values of the SHA-256 bank; those that the quote selects are kept, in its order,
the others were not signed by anybody and are dropped. Base64 may be padded or not, of either
alphabet. `vcek` is DER or PEM; certificates behind it in a PEM become the authorities.

What such a file lacks cannot be checked from it: a TDX file has no collateral of Intel's and no
file has a revocation list or an event log. Nothing here is trustworthy.
"""

from __future__ import annotations

import re

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, JsonValue, parse_json_object
from appliance.wire.encoding import decode_base64
from appliance.wire.evidence import MAX_PART_BYTES, CpuEvidence, parse_cpu_evidence
from appliance.wire.pem import join_pem, split_pem
from appliance.wire.tpm import PCRS, Quote, parse_quote

MAX_FILE_BYTES = 8 << 20
MAX_NESTING = 6
MAX_QUOTE_BYTES = 4096
PCR_BYTES = 32
PLATFORMS = ("az-snp", "az-tdx")
VERSIONS = (1, 2)

_HEX = re.compile(r"(?:[0-9a-fA-F]{2})*\Z")


def decode_any_base64(text: str, *, field: str) -> bytes:
    """Base64 of either alphabet, padded or not, of at most 1 MiB; unused bits are zero.

    Raises:
        Malformed: not that.
    """
    bare = text.rstrip("=")
    if text not in {bare, bare + "=" * (-len(bare) % 4)}:
        raise Malformed(f"{field}: expected base64", field=field)
    standard = bare.replace("-", "+").replace("_", "/") + "=" * (-len(bare) % 4)
    return decode_base64(standard, field=field, max_bytes=MAX_PART_BYTES)


def parse_azure_json(data: bytes) -> CpuEvidence:
    """One file, in whichever of these shapes, as evidence of scheme `azure_vtpm`.

    Raises:
        Malformed: none of them, an unknown or missing member, a bound exceeded, or a quote that
            does not parse (what it selects says which PCR values are kept).
    """
    if len(data) > MAX_FILE_BYTES:
        raise Malformed("evidence: expected at most 8 MiB", field="evidence")
    document = parse_json_object(data, max_nesting=MAX_NESTING)
    if "scheme" in document:
        evidence = parse_cpu_evidence(document, where="evidence")
        if evidence.scheme != "azure_vtpm":
            raise Malformed("evidence.scheme: expected azure_vtpm", field="evidence.scheme")
        return evidence
    if "platform" in document:
        _members(document, {"platform", "evidence"}, set())
        if document["platform"] not in PLATFORMS:
            raise Malformed("evidence.platform: expected az-snp or az-tdx", field="platform")
        document = _object(document["evidence"], "evidence")
    if "version" in document:
        if document["version"] not in VERSIONS:
            raise Malformed("evidence.version: expected 1 or 2", field="version")
        document = {name: value for name, value in document.items() if name != "version"}
    elif "quote" in document and "report" in document:
        renamed = {"quote": "tpm_quote", "report": "hcl_report"}
        document = {renamed.get(name, name): value for name, value in document.items()}
    return _evidence(document)


def _evidence(document: JsonObject) -> CpuEvidence:
    """The shapes differ in how a byte string is written, which each shows by itself."""
    _members(document, {"tpm_quote", "hcl_report"}, {"vcek", "td_quote"})
    quote = _object(document["tpm_quote"], "tpm_quote")
    _members(quote, {"message", "signature", "pcrs"}, set())
    message = _hex(quote["message"], "tpm_quote.message", MAX_QUOTE_BYTES)
    parts = {
        "hcl_report": _base64(document["hcl_report"], "hcl_report"),
        "quote": message,
        "signature": _hex(quote["signature"], "tpm_quote.signature", MAX_QUOTE_BYTES),
        "pcrs": _selected(quote["pcrs"], parse_quote(message)),
    }
    if "td_quote" in document:
        parts["td_quote"] = _base64(document["td_quote"], "td_quote")
    endorsements = _certificates(document["vcek"]) if "vcek" in document else {}
    return CpuEvidence("azure_vtpm", parts, endorsements)


def _selected(value: JsonValue, quote: Quote) -> bytes:
    if not isinstance(value, list) or len(value) != PCRS:
        raise Malformed(f"tpm_quote.pcrs: expected {PCRS} values", field="tpm_quote.pcrs")
    values = []
    for index, item in enumerate(value):
        field = f"tpm_quote.pcrs[{index}]"
        values.append(_hex(item, field, PCR_BYTES))
        if len(values[-1]) != PCR_BYTES:
            raise Malformed(f"{field}: expected {PCR_BYTES} bytes", field=field)
    numbers = [number for one in quote.selections for number in one.pcrs]
    if any(number >= PCRS for number in numbers):
        raise Malformed(f"tpm_quote: expected PCRs below {PCRS}", field="tpm_quote.message")
    return b"".join(values[number] for number in numbers)


def _certificates(value: JsonValue) -> dict[str, bytes]:
    """`vek`, and `authorities` where more than one certificate is there."""
    if isinstance(value, str) and "-----BEGIN" in value:
        data = value.encode("utf-8")
    else:
        data = _base64(value, "vcek")
        if not data.lstrip().startswith(b"-----BEGIN"):
            return {"vek": data}
    own, *others = split_pem(data, field="vcek")
    return {"vek": own} | ({"authorities": join_pem(others)} if others else {})


def _hex(value: JsonValue, field: str, most: int) -> bytes:
    """Hex of either case, or an array of numbers."""
    if not isinstance(value, str):
        return _array(value, field, most)
    if len(value) > 2 * most or not _HEX.match(value):
        raise Malformed(f"{field}: expected at most {most} bytes of hex", field=field)
    return bytes.fromhex(value)


def _base64(value: JsonValue, field: str) -> bytes:
    """Base64 of either alphabet, padded or not, or an array of numbers."""
    if not isinstance(value, str):
        return _array(value, field, MAX_PART_BYTES)
    return decode_any_base64(value, field=field)


def _array(value: JsonValue, field: str, most: int) -> bytes:
    if not isinstance(value, list) or len(value) > most:
        raise Malformed(f"{field}: expected at most {most} bytes", field=field)
    found = bytearray()
    for item in value:
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < 256:
            raise Malformed(f"{field}: expected numbers from 0 to 255", field=field)
        found.append(item)
    return bytes(found)


def _object(value: JsonValue, field: str) -> JsonObject:
    if not isinstance(value, dict):
        raise Malformed(f"{field}: expected an object", field=field)
    return value


def _members(document: JsonObject, needed: set[str], allowed: set[str]) -> None:
    if missing := sorted(needed - document.keys()):
        raise Malformed(f"evidence: expected {missing[0]}", field=missing[0])
    if document.keys() - needed - allowed:
        raise Malformed("evidence: unknown member", field="evidence")
