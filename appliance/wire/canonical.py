"""JSON in: strictly. JSON out: canonically (RFC 8785, JCS).

The parser exists because what we forward is re-serialised from what we parsed (docs/protocol:
the receipt lets anyone recompute the forwarded bytes). Anything on which two JSON parsers could
disagree is therefore refused: duplicate keys, unpaired surrogates, NaN and infinities, integers
beyond 2^53-1, a byte order mark, a value nested too deep.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from types import NoneType
from typing import NoReturn, TypeAlias

import rfc8785

from appliance.errors import Malformed

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
JsonObject: TypeAlias = dict[str, JsonValue]

MAX_SAFE_INTEGER = 2**53 - 1
"""The largest integer that every JSON implementation keeps (RFC 8259 section 6)."""

MAX_INTEGER_DIGITS = 400
"""Of an integer that is still read, to be refused by name; a float has at most 309."""

_STRING_OR_SEPARATOR = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+|[,\[{]', re.DOTALL)
"""A string without its end is one too, and nothing is tried twice: any text takes linear time."""

FIRST_EXPONENT = 1e21
"""From here on JCS writes numbers with an exponent (ECMA-262, Number::toString)."""


def parse_json(data: bytes, *, max_nesting: int, max_values: int | None = None) -> JsonValue:
    """Parse one JSON text, refusing everything two parsers could read differently.

    Args:
        data: the UTF-8 text, whole; its length is the caller's bound.
        max_nesting: the deepest allowed array or object; 1 is a flat object.
        max_values: of its strings, commas and opening brackets, about how many values it has; what
            a text is parsed into costs by these more than by its length. None where the length is
            bound enough.

    Raises:
        Malformed: with the byte offset where the text stops being JSON, or the path of the value
            that is refused. The message never quotes the input.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed("expected UTF-8 text", offset=error.start) from None
    if max_values is not None:
        _check_values(data, max_values)
    try:
        value: JsonValue = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode("utf-8"))
        raise Malformed(
            f"expected JSON, it ends being so at byte {offset}", offset=offset
        ) from None
    except RecursionError:
        raise _too_deep(max_nesting) from None
    _check_depth_and_text(value, max_nesting)
    return value


def parse_json_object(
    data: bytes, *, max_nesting: int, max_values: int | None = None
) -> JsonObject:
    """Parse a JSON text whose value is an object; otherwise as `parse_json`."""
    value = parse_json(data, max_nesting=max_nesting, max_values=max_values)
    if not isinstance(value, dict):
        raise Malformed("expected a JSON object")
    return value


def canonical_json(value: JsonValue) -> bytes:
    """Serialise to RFC 8785 canonical form.

    Raises:
        Malformed: the value has no canonical form (only possible for values that did not come
            from `parse_json`).
    """
    try:
        if _is_plain(value):
            return _PLAIN_ENCODER.encode(value).encode("utf-8")
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        raise Malformed(f"no canonical JSON form: {type(error).__name__}") from None


_PLAIN_ENCODER = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, sort_keys=True, separators=(",", ":")
)

_STRING = frozenset({str})
_PLAIN_SCALARS = frozenset({str, bool, NoneType})


def _is_plain(value: JsonValue) -> bool:
    """Whether Python's own encoder, which is compiled, writes a value's canonical form.

    It escapes strings as RFC 8785 section 3.2.2.2 wants it. But it sorts keys by code points, which
    beyond ASCII may be another order than by UTF-16 code units (section 3.2.3); writes 1.0 and
    1e-05 where JCS has 1 and 0.00001; takes integers of any size; and makes strings of keys that
    are none. A value with any of these is left to `rfc8785`.
    """
    if type(value) is dict:
        if not (_STRING.issuperset(map(type, value)) and all(map(str.isascii, value))):
            return False
        items = value.values()
        return _PLAIN_SCALARS.issuperset(map(type, items)) or all(map(_is_plain, items))
    if type(value) is list:
        return _PLAIN_SCALARS.issuperset(map(type, value)) or all(map(_is_plain, value))
    if type(value) is int:
        return -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER
    if type(value) is float:
        return 1e-4 <= abs(value) < 1e16 and not value.is_integer()
    return type(value) in _PLAIN_SCALARS


def _check_values(data: bytes, max_values: int) -> None:
    """Before anything is built of them. Inside of a string nothing counts; but mostly all that
    there is, counted without looking, is not too much."""
    separators = sum(data.count(one) for one in (b",", b"[", b"{"))
    if separators + data.count(b'"') // 2 <= max_values:
        return
    found = _STRING_OR_SEPARATOR.finditer(data)
    if next(itertools.islice(found, max_values, None), None) is not None:
        raise Malformed(
            f"expected at most {max_values} strings, commas and opening brackets, "
            "which is [limits] max_json_values"
        )


def _object_without_duplicates(pairs: list[tuple[str, JsonValue]]) -> JsonObject:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("expected every key of an object once, a key is repeated")
    return found


def _refuse_constant(_name: str) -> NoReturn:
    raise Malformed("expected a finite number (JSON has no NaN or Infinity)")


def _bounded_integer(digits: str) -> int:
    # Bounded first: int() of a megabyte of digits is quadratic. The range is checked once the
    # value's place is known.
    if len(digits) > MAX_INTEGER_DIGITS:
        raise _unsafe_integer("$")
    return int(digits)


def _unsafe_integer(field: str) -> Malformed:
    return Malformed("expected an integer within ±(2^53-1)", field=field)


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise Malformed("expected a finite number, its exponent is too large")
    # JCS writes 1e20 as 100000000000000000000: what we forward would be what we refuse.
    if MAX_SAFE_INTEGER < abs(number) < FIRST_EXPONENT:
        raise _unsafe_integer("$")
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object_without_duplicates,
    parse_constant=_refuse_constant,
    parse_int=_bounded_integer,
    parse_float=_finite_float,
)


def _too_deep(max_nesting: int) -> Malformed:
    return Malformed(f"expected at most {max_nesting} nested arrays and objects")


def _check_depth_and_text(value: JsonValue, max_nesting: int) -> None:
    """Walk level by level: recursion is what a deeply nested body aims at."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_integer(item, f"$.{key}")
    level: list[JsonValue] = [value]
    depth = 0
    while level:
        depth += 1
        deeper: list[JsonValue] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, int):
                _check_integer(item, "$")
            elif isinstance(item, (dict, list)):
                if depth > max_nesting:
                    raise _too_deep(max_nesting)
                deeper.extend(item)
                if isinstance(item, dict):
                    deeper.extend(item.values())
        level = deeper


def _check_integer(item: JsonValue, field: str) -> None:
    if isinstance(item, int) and abs(item) > MAX_SAFE_INTEGER:
        raise _unsafe_integer(field)


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Malformed("expected Unicode text, a surrogate is unpaired") from None
