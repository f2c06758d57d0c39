"""Strict JSON in, canonical JSON out: the vectors are RFC 8785's own."""

from __future__ import annotations

import json
import struct
import traceback
from enum import StrEnum
from http import HTTPStatus
from time import perf_counter

import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from appliance.errors import Malformed
from appliance.wire.canonical import (
    MAX_SAFE_INTEGER,
    JsonValue,
    canonical_json,
    parse_json,
    parse_json_object,
)

NESTING = 16


class Weekday(StrEnum):
    MONDAY = "monday"


texts = st.text(st.characters(exclude_categories=["Cs"]))
numbers = (
    st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER)
    | st.floats(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER)
    | st.floats(min_value=1e21, allow_infinity=False)
    | st.floats(max_value=-1e21, allow_infinity=False)
)
json_values: st.SearchStrategy[JsonValue] = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(texts, children, max_size=4),
    max_leaves=20,
)


def parse(text: str | bytes, *, max_nesting: int = NESTING) -> JsonValue:
    return parse_json(text.encode() if isinstance(text, str) else text, max_nesting=max_nesting)


def refusal(text: str | bytes, *, max_nesting: int = NESTING) -> Malformed | None:
    try:
        parse(text, max_nesting=max_nesting)
    except Malformed as error:
        return error
    return None


def float_of(bits: str) -> float:
    number: float = struct.unpack(">d", bytes.fromhex(bits))[0]
    return number


# ------------------------------------------------------------------------------ out: RFC 8785


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("0000000000000000", "0"),
        ("8000000000000000", "0"),
        ("0000000000000001", "5e-324"),
        ("8000000000000001", "-5e-324"),
        ("7fefffffffffffff", "1.7976931348623157e+308"),
        ("ffefffffffffffff", "-1.7976931348623157e+308"),
        ("4340000000000000", "9007199254740992"),
        ("c340000000000000", "-9007199254740992"),
        ("4430000000000000", "295147905179352830000"),
        ("44b52d02c7e14af5", "9.999999999999997e+22"),
        ("44b52d02c7e14af6", "1e+23"),
        ("44b52d02c7e14af7", "1.0000000000000001e+23"),
        ("444b1ae4d6e2ef4e", "999999999999999700000"),
        ("444b1ae4d6e2ef4f", "999999999999999900000"),
        ("444b1ae4d6e2ef50", "1e+21"),
        ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
        ("3eb0c6f7a0b5ed8d", "0.000001"),
        ("41b3de4355555553", "333333333.3333332"),
        ("41b3de4355555554", "333333333.33333325"),
        ("41b3de4355555555", "333333333.3333333"),
        ("41b3de4355555556", "333333333.3333334"),
        ("41b3de4355555557", "333333333.33333343"),
        ("becbf647612f3696", "-0.0000033333333333333333"),
        ("43143ff3c1cb0959", "1424953923781206.2"),
    ],
)
def test_numbers_are_written_as_in_appendix_b(bits: str, expected: str) -> None:
    assert canonical_json(float_of(bits)) == expected.encode()


@pytest.mark.parametrize("bits", ["7fffffffffffffff", "7ff0000000000000", "fff0000000000000"])
def test_nan_and_infinities_of_appendix_b_have_no_canonical_form(bits: str) -> None:
    with pytest.raises(Malformed, match="no canonical JSON form"):
        canonical_json(float_of(bits))


def test_the_sample_of_section_3_2_is_canonicalized_byte_for_byte() -> None:
    sample = r"""{
      "numbers": [333333333.33333329, 4.50, 2e-3, 0.000000000000000000000000001],
      "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
      "literals": [null, true, false]
    }"""
    assert (
        canonical_json(parse(sample))
        == (
            '{"literals":[null,true,false],'
            '"numbers":[333333333.3333333,4.5,0.002,1e-27],'
            r'"string":"€$\u000f\nA' + "'" + r'B\"\\\\\"/"}'
        ).encode()
    )


def test_keys_are_sorted_by_utf_16_code_units_as_in_section_3_2_3() -> None:
    sample = r"""{
      "\u20ac": "Euro Sign",
      "\r": "Carriage Return",
      "\ufb33": "Hebrew Letter Dalet With Dagesh",
      "1": "One",
      "\ud83d\ude00": "Emoji: Grinning Face",
      "\u0080": "Control",
      "\u00f6": "Latin Small Letter O With Diaeresis"
    }"""
    canonical = canonical_json(parse(sample))
    assert list(json.loads(canonical).values()) == [
        "Carriage Return",
        "One",
        "Control",
        "Latin Small Letter O With Diaeresis",
        "Euro Sign",
        "Emoji: Grinning Face",
        "Hebrew Letter Dalet With Dagesh",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\b\t\n\f\r", r'"\b\t\n\f\r"'),
        ("\x00\x1f", r'"\u0000\u001f"'),
        ('"\\/', r'"\"\\/"'),
        ("\x7f\u0080\u2028\U0001f600", '"\x7f\u0080\u2028\U0001f600"'),
    ],
)
def test_strings_are_escaped_as_in_section_3_2_2_2(text: str, expected: str) -> None:
    assert canonical_json(text) == expected.encode()


@pytest.mark.parametrize("value", [2**53, -(2**53), "\ud800", {"\udfff": 1}, float("nan")])
def test_a_value_without_canonical_form_is_malformed_and_not_quoted(value: JsonValue) -> None:
    with pytest.raises(Malformed, match=r"^no canonical JSON form: \w+$"):
        canonical_json(value)


# --------------------------------------------------------------------------------- properties

# Beside what JSON has: what Python's encoder would take for it, or write otherwise.
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3).map(lambda exponent: 2**53 + exponent)
    | st.floats()
    | st.integers(-30, 30).map(lambda exponent: 10.0**exponent)
    | st.floats(-3, 3).map(lambda exponent: 7 * 10.0 ** (5 * exponent))
    | st.text(st.characters())
    | st.sampled_from([b"", HTTPStatus.OK, Weekday.MONDAY, {1}]),
    lambda children: (
        st.lists(children, max_size=4)
        | st.tuples(children)
        | st.dictionaries(
            st.text(st.characters()) | st.text("aAzZ") | st.sampled_from([1, True, None, 0.5]),
            children,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(anything)
@example({"\ufb33": 1, "\U0001f600": 2})
def test_the_canonical_form_is_that_of_the_reference_or_there_is_none(value: JsonValue) -> None:
    try:
        expected = rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError):
        with pytest.raises(Malformed):
            canonical_json(value)
    else:
        assert canonical_json(value) == expected


@given(json_values)
def test_parsing_the_canonical_form_gives_the_value_back(value: JsonValue) -> None:
    assert parse(canonical_json(value), max_nesting=256) == value


@given(json_values)
def test_the_canonical_form_of_any_spelling_is_the_same(value: JsonValue) -> None:
    spelled = json.dumps(value, indent=2, ensure_ascii=True)
    assert canonical_json(parse(spelled, max_nesting=256)) == canonical_json(value)


@given(json_values)
def test_the_canonical_form_is_a_fixed_point(value: JsonValue) -> None:
    once = canonical_json(value)
    assert canonical_json(parse(once, max_nesting=256)) == once


json_like_bytes = st.lists(
    st.sampled_from([*(bytes([n]) for n in b'[]{}:,"\\ \n0123456789.eE+-tfnu'), b"true", b"null"])
    | st.binary(max_size=3)
    | texts.map(lambda text: json.dumps(text).encode()),
    max_size=30,
).map(b"".join)


@given(st.binary() | json_like_bytes)
def test_arbitrary_bytes_parse_or_are_malformed_and_nothing_else(data: bytes) -> None:
    refused = refusal(data)
    if refused is None:
        assert parse(data) == json.loads(data)
    else:
        assert refused.offset is None or 0 <= refused.offset <= len(data)


CANARY = "canary7f3a"


@given(
    before=st.sampled_from(["", "[", '{"a":', '{"a":1,', '["', "[1e", '{"', "[[[[", "tru"]),
    after=st.sampled_from(
        ["", "]", '":1}', '"]', ",", "999", '\\ud800"', '":1,"' + CANARY + '":1}']
    ),
)
def test_no_message_holds_any_of_the_input(before: str, after: str) -> None:
    refused = refusal(before + CANARY + after, max_nesting=3)
    if refused is not None:
        assert CANARY not in f"{refused} {refused!r} {refused.param} {refused.field}"
        assert CANARY not in "".join(traceback.format_exception_only(refused))
        assert refused.__cause__ is None  # a chained parser error would quote the document


# ------------------------------------------------------------------------------- in: strictness


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":1}',
        '{"a":1,"b":2,"a":3}',
        '[{"b":{"a":null,"a":null}}]',
        r'{"a":1,"\u0061":2}',
        '{"":1,"":2}',
    ],
)
def test_a_repeated_key_is_refused_at_any_depth_and_in_any_spelling(text: str) -> None:
    with pytest.raises(Malformed, match="key is repeated"):
        parse(text)


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e309", "9" * 400 + ".0"]
)
def test_numbers_that_are_not_finite_are_refused(number: str) -> None:
    with pytest.raises(Malformed, match="finite"):
        parse(f'{{"a":[{number}]}}')


@pytest.mark.parametrize("number", [MAX_SAFE_INTEGER, -MAX_SAFE_INTEGER, 0, -1])
def test_integers_up_to_the_largest_safe_one_are_kept(number: int) -> None:
    assert parse(str(number)) == number


@pytest.mark.parametrize(
    "number",
    [
        "9007199254740992",
        "-9007199254740992",
        "99999999999999999",
        "-99999999999999999",
        "9223372036854775807",
        "9007199254740992.0",
        "1e16",
        "-1e20",
        "999999999999999900000.0",
    ],
)
def test_a_number_whose_canonical_form_is_an_unsafe_integer_is_refused(number: str) -> None:
    with pytest.raises(Malformed, match="within"):
        parse(number)


@pytest.mark.parametrize("number", ["9007199254740991.0", "1e21", "-1e21", "1.5e300", "1e-400"])
def test_a_float_that_has_a_canonical_form_we_read_is_accepted(number: str) -> None:
    assert parse(number) == float(number)


@pytest.mark.parametrize(
    "digits",
    ["9" * 4_000_000, "-" + "9" * 4_000_000, "0." + "7" * 4_000_000, "1e" + "9" * 4_000_000],
)
def test_megabytes_of_digits_cost_no_more_than_reading_them(digits: str) -> None:
    began = perf_counter()
    refusal(digits)
    assert perf_counter() - began < 2  # int() of as many digits takes minutes


@pytest.mark.parametrize(
    "text",
    [
        r'"\ud800"',
        r'"\udfff"',
        r'"\ude00\ud83d"',
        r'["fine", {"a": "x\ud800y"}]',
        r'{"\ud800": 1}',
        r'[[{"a": {"\udc00": null}}]]',
    ],
)
def test_unpaired_surrogates_are_refused_in_keys_and_values(text: str) -> None:
    with pytest.raises(Malformed, match="surrogate"):
        parse(text)


def test_a_surrogate_pair_is_one_character() -> None:
    assert parse(r'{"\ud83d\ude00": "\ud83d\ude00"}') == {"😀": "😀"}


def test_a_byte_order_mark_is_refused() -> None:
    with pytest.raises(Malformed) as caught:
        parse(b"\xef\xbb\xbf{}")
    assert caught.value.offset == 0


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"\xff", 0),
        (b'{"a": "\xc3\xa9\xff"}', 9),
        (b'"\xed\xa0\x80"', 1),  # a surrogate, encoded
        (b'"\xc0\xaf"', 1),  # an overlong slash
        (b'"\xe2\x82', 1),  # cut off
        ("{}".encode("utf-16"), 0),
    ],
)
def test_bytes_that_are_not_utf_8_are_refused_where_they_stand(data: bytes, offset: int) -> None:
    with pytest.raises(Malformed, match="UTF-8") as caught:
        parse(data)
    assert caught.value.offset == offset


@pytest.mark.parametrize(
    ("text", "offset"),
    [
        ("{} {}", 3),
        ("1 2", 2),
        ('"é" x', 5),
        ("[]\x00", 2),
        ("null,", 4),
        ("", 0),
        (" ", 1),
        ('"é', 0),
        ('{"é": tru}', 7),
        ("[1,]", 3),
        ('{"a":1,}', 7),
        ("'a'", 0),
        ("01", 1),
        ("[1\x0b]", 2),
        ('"\t"', 1),
    ],
)
def test_what_is_not_json_is_refused_with_its_byte_offset(text: str, offset: int) -> None:
    with pytest.raises(Malformed, match="expected JSON") as caught:
        parse(text)
    assert caught.value.offset == offset


# ----------------------------------------------------------------------------------- nesting


def nested(kind: str, depth: int, innermost: str = "") -> str:
    """`depth` arrays or objects around each other; the innermost is empty or holds a value."""
    if kind == "array":
        return "[" * depth + innermost + "]" * depth
    inner = f'{{"a":{innermost}}}' if innermost else "{}"
    return '{"a":' * (depth - 1) + inner + "}" * (depth - 1)


@pytest.mark.parametrize("kind", ["array", "object"])
@pytest.mark.parametrize("innermost", ["", "1", '"x"'])
@pytest.mark.parametrize("bound", [1, 4, 256])
def test_nesting_is_accepted_at_the_bound_and_refused_one_past_it(
    kind: str, innermost: str, bound: int
) -> None:
    parse(nested(kind, bound, innermost), max_nesting=bound)
    with pytest.raises(Malformed, match=f"at most {bound} nested"):
        parse(nested(kind, bound + 1, innermost), max_nesting=bound)


@pytest.mark.parametrize("kind", ["array", "object"])
def test_a_scalar_beside_the_deepest_container_does_not_hide_it(kind: str) -> None:
    with pytest.raises(Malformed, match="nested"):
        parse(f"[1, {nested(kind, 2)}, 2]", max_nesting=2)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_a_hundred_thousand_levels_are_refused_without_exhausting_the_stack(text: str) -> None:
    with pytest.raises(Malformed, match="nested"):
        parse(text)


# ------------------------------------------------------------------------------------ objects


def test_an_object_is_what_parse_json_object_gives() -> None:
    assert parse_json_object(b'{"a": [1, null]}', max_nesting=2) == {"a": [1, None]}


@pytest.mark.parametrize("text", ["[]", "1", '"{}"', "null", "true"])
def test_parse_json_object_refuses_any_other_value(text: str) -> None:
    with pytest.raises(Malformed, match="expected a JSON object"):
        parse_json_object(text.encode(), max_nesting=2)


# ------------------------------------------------------------------------------ how many values


def values_of(value: JsonValue) -> int:
    """Strings, commas and opening brackets of a value's text, counted from the value."""
    if isinstance(value, str):
        return 1
    if isinstance(value, list):
        return 1 + max(0, len(value) - 1) + sum(map(values_of, value))
    if isinstance(value, dict):
        return 1 + max(0, len(value) - 1) + len(value) + sum(map(values_of, value.values()))
    return 0


JSON: st.SearchStrategy[JsonValue] = st.recursive(
    st.none() | st.integers(0, 9) | st.text(alphabet='a"\\,[{', max_size=6),
    lambda items: st.lists(items) | st.dictionaries(st.text('a"\\,[{', max_size=3), items),
    max_leaves=20,
)


@given(value=JSON, indent=st.sampled_from([None, 1]))
def test_a_text_has_as_many_values_as_its_value(value: JsonValue, indent: int | None) -> None:
    data, count = json.dumps(value, indent=indent).encode(), values_of(value)
    assert parse_json(data, max_nesting=64, max_values=count) == value
    if count:
        with pytest.raises(Malformed, match=f"at most {count - 1} .*max_json_values"):
            parse_json(data, max_nesting=64, max_values=count - 1)


@pytest.mark.parametrize(
    "data",
    [
        b'"' + b'\\"' * (1 << 22),
        b'\\"' * (1 << 22),
        b'",' * (1 << 22),
        b'"' * (1 << 23),
        b"[" * (1 << 23),
        b"[" + b"[]," * (1 << 21),
        b'{"' * (1 << 21),
    ],
    ids=lambda data: repr(data[:6]),
)
def test_counting_takes_no_longer_than_the_text_is(data: bytes) -> None:
    """A string that does not end, tried anew from each of its quotes, would take hours."""
    began = perf_counter()
    with pytest.raises(Malformed):
        parse_json(data, max_nesting=64, max_values=1000)
    assert perf_counter() - began < 10
