"""Strict JSON: what the standard allows, without surprises."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.fileio.strict_json import MAX_DEPTH, parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(-1e300, 1e300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=50)
@given(VALUES)
def test_what_python_writes_comes_back(value):
    text = json.dumps(value)

    assert parse_json(text) == parse_json(text.encode()) == value
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        (b"\xff\xfe1\x00", "utf-8"),
        ("[-Infinity]", "-Infinity"),
        ("1e999", "1e999"),
        ("9" * 5000, "9999... has 5,000 digits"),
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "duplicate"),
        ('{"a\\ud800": 1}', "surrogates"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "64"),
    ],
)
def test_other_text_is_a_value_error(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)
