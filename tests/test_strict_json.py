"""JSON of strangers: what Python's own parser lets pass and would bite later is refused, with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracli.system.strict_json import StrictJsonError, parse_json

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
)


@given(VALUES)
def test_ordinary_json_has_the_value_that_python_gives_it(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert parse_json(text) == parse_json(text.encode()) == json.loads(text) == value


@given(VALUES.map(json.dumps), st.integers(0, 200), st.binary(min_size=1, max_size=3))
def test_damaged_json_is_refused_with_a_reason_or_has_the_value_that_python_gives_it(
    text: str, place: int, other: bytes
) -> None:
    data = text.encode()
    data = data[:place] + other + data[place + 1 :]
    try:
        value = parse_json(data)
    except StrictJsonError as error:
        assert str(error)
    else:
        assert value == json.loads(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1, "a": 1}', "the key 'a' appears twice in one object"),
        (b'[{"x": {"b": 1, "a": 2, "b": 3}}]', "the key 'b' appears twice in one object"),
        (b'{"a": 1, "\\u0061": 2}', "the key 'a' appears twice in one object"),
        (b"NaN", "NaN is not a JSON number"),
        (b'{"a": Infinity}', "Infinity is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"1e999", "1e999 is too large for a number"),
        (b"[-1e400]", "-1e400 is too large for a number"),
        (b'{"a": \xff}', "not UTF-8: byte 0xff at offset 6"),
        (b'"\xed\xa0\x80"', "not UTF-8: byte 0xed at offset 1"),
        (b'"\\ud800"', "a lone surrogate (\\ud800 to \\udfff) in a string"),
        (b'{"\\udfff": 1}', "a lone surrogate (\\ud800 to \\udfff) in a string"),
        (b'{"a": }', "not valid JSON: Expecting value (column 7)"),
        (b'{\n"a": }', "not valid JSON: Expecting value (line 2 column 6)"),
        (b"", "not valid JSON: Expecting value (column 1)"),
        (b"{} {}", "not valid JSON: Extra data (column 4)"),
        (b"{'a': 1}", "not valid JSON: Expecting property name enclosed in double quotes (column 2)"),
    ],
)
def test_what_would_bite_later_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(StrictJsonError) as caught:
        parse_json(data)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"[" * 3000 + b"]" * 3000]
)
def test_nesting_that_exhausts_the_stack_is_refused(data: bytes) -> None:
    with pytest.raises(StrictJsonError, match="nested too deeply|not valid JSON"):
        parse_json(data)


@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}")])
def test_a_hundred_levels_are_read_and_one_more_is_refused(left: str, right: str) -> None:
    """So that what is done with the value later, by recursion, cannot exhaust the stack either."""
    for depth, inner in ((100, "1"), (99, "[]")):
        text = left * depth + inner + right * depth
        assert parse_json(text) == json.loads(text)
        for deeper in (f"[{text}]", f'{{"x": 0, "y": {text}}}'):
            with pytest.raises(StrictJsonError, match="^nested too deeply$"):
                parse_json(deeper)


def test_an_integer_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(StrictJsonError, match="digits"):
        parse_json(b"1" + b"0" * 5000)


def test_a_surrogate_pair_is_one_character() -> None:
    assert parse_json(b'"\\ud83d\\udc08"') == "\U0001f408"


def test_equal_keys_in_different_objects_are_fine() -> None:
    assert parse_json('[{"a": 1}, {"a": {"a": 2}}]') == [{"a": 1}, {"a": {"a": 2}}]


def test_the_largest_float_is_a_number() -> None:
    assert parse_json("1.7976931348623157e308") == 1.7976931348623157e308
