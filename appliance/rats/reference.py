"""Reference values of images: what a measured machine must show when it runs one of ours.

`image/measure` writes them beside the image, `dcv verify --reference FILE` reads them:

    {"api_version": "dcv/1",
     "images": [{"image_digest": "sha256:…", "version": "0.1.0", "commit": "…", "roothash": "…",
                 "pcrs": {"4": ["…"], "11": ["…"]},
                 "sev_snp": {"measurement": ["…"]},
                 "tdx": {"mrtd": ["…"], "rtmr1": ["…"], "rtmr2": ["…"]},
                 "azure": {"paravisor_measurement": ["…"]}}]}

Values are lowercase hex, any one of a list will do. A table that is missing says nothing about
that kind of evidence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from appliance.errors import Malformed
from appliance.wire.canonical import JsonObject, JsonValue, parse_json_object
from appliance.wire.encoding import parse_sha256

MAX_BYTES = 1 << 20
MAX_IMAGES = 256
MAX_ALTERNATIVES = 64

_HEX = re.compile(r"(?:[0-9a-f]{2}){1,64}\Z")
_PCR = re.compile(r"(?:[0-9]|1[0-9]|2[0-3])\Z")

Allowed = Mapping[str, frozenset[str]]
"""Name of a measurement to the values that will do."""


@dataclass(frozen=True, slots=True)
class ImageReference:
    """What is expected of one image.

    Attributes:
        pcrs: `pcr4` and the like. sev_snp: `measurement`. tdx: `mrtd`, `rtmr1`, `rtmr2`.
        azure: `paravisor_measurement`.
    """

    image_digest: str
    version: str | None = None
    commit: str | None = None
    roothash: str | None = None
    pcrs: Allowed = field(default_factory=dict)
    sev_snp: Allowed = field(default_factory=dict)
    tdx: Allowed = field(default_factory=dict)
    azure: Allowed = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReferenceValues:
    """Every image that is known."""

    images: tuple[ImageReference, ...]

    def of(self, image_digest: str) -> ImageReference | None:
        """The image of that digest, `sha256:…`."""
        return next((one for one in self.images if one.image_digest == image_digest), None)


def parse_reference_values(data: bytes) -> ReferenceValues:
    """Read a file of reference values.

    Raises:
        Malformed: not that form, or out of bounds.
    """
    if len(data) > MAX_BYTES:
        raise Malformed("reference values: expected at most 1 MiB")
    document = parse_json_object(data, max_nesting=6)
    _only(document, {"api_version", "images"}, "$")
    if document.get("api_version") != "dcv/1":
        raise Malformed("api_version: expected dcv/1", field="$.api_version")
    images = document.get("images")
    if not isinstance(images, list) or not 0 < len(images) <= MAX_IMAGES:
        raise Malformed(f"images: expected 1 to {MAX_IMAGES}", field="$.images")
    parsed = tuple(_image(one, f"$.images[{index}]") for index, one in enumerate(images))
    if len({one.image_digest for one in parsed}) != len(parsed):
        raise Malformed("images: expected every image_digest once", field="$.images")
    return ReferenceValues(parsed)


def _image(value: JsonValue, where: str) -> ImageReference:
    item = _object(value, where)
    tables = {"pcrs", "sev_snp", "tdx", "azure"}
    _only(item, tables | {"image_digest", "version", "commit", "roothash", "provenance"}, where)
    digest = item.get("image_digest")
    if not isinstance(digest, str):
        raise Malformed(f"{where}.image_digest: missing", field=f"{where}.image_digest")
    parse_sha256(digest, field=f"{where}.image_digest")
    pcrs = _table(item.get("pcrs", {}), f"{where}.pcrs")
    for name in pcrs:
        if not _PCR.match(name):
            raise Malformed(f"{where}.pcrs: expected PCR 0 to 23", field=f"{where}.pcrs")
    return ImageReference(
        image_digest=digest,
        version=_text(item.get("version"), f"{where}.version"),
        commit=_text(item.get("commit"), f"{where}.commit"),
        roothash=_text(item.get("roothash"), f"{where}.roothash"),
        pcrs={f"pcr{name}": values for name, values in pcrs.items()},
        sev_snp=_table(item.get("sev_snp", {}), f"{where}.sev_snp"),
        tdx=_table(item.get("tdx", {}), f"{where}.tdx"),
        azure=_table(item.get("azure", {}), f"{where}.azure"),
    )


def _table(value: JsonValue, where: str) -> dict[str, frozenset[str]]:
    return {
        name: _values(item, f"{where}.{name[:32]}") for name, item in _object(value, where).items()
    }


def _values(value: JsonValue, where: str) -> frozenset[str]:
    """One value, or a list of which any will do."""
    values = value if isinstance(value, list) else [value]
    if not 0 < len(values) <= MAX_ALTERNATIVES:
        raise Malformed(f"{where}: expected 1 to {MAX_ALTERNATIVES} values", field=where)
    found = [one for one in values if isinstance(one, str) and _HEX.match(one)]
    if len(found) != len(values):
        raise Malformed(f"{where}: expected lowercase hex", field=where)
    return frozenset(found)


def _object(value: JsonValue, where: str) -> JsonObject:
    if not isinstance(value, dict):
        raise Malformed(f"{where}: expected an object", field=where)
    return value


def _only(item: JsonObject, known: set[str], where: str) -> None:
    if unknown := item.keys() - known:
        raise Malformed(f"{where}: unknown key", field=f"{where}.{min(unknown)[:64]}")


def _text(value: JsonValue, where: str) -> str | None:
    if value is None or (isinstance(value, str) and len(value) <= 256):
        return value
    raise Malformed(f"{where}: expected text", field=where)
