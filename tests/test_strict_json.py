"""JSON is taken where the standard allows it, and where nothing in it surprises."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.strict_json import DEPTH, parse, parse_at, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(-1e300, 1e300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_what_python_writes_comes_back(value):
    text = json.dumps(value)

    assert parse(text) == parse(text.encode()) == value
    assert parse_at(f"  {text} rest", 2) == (value, 2 + len(text))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ("1 2", "Extra data"),
        (b"\xff\xfe1\x00", "codec can't decode"),
        ("NaN", "NaN is no JSON number"),
        ("[-Infinity]", "-Infinity is no JSON number"),
        ("1e999", "1e999 is too large a number"),
        ("9" * 5000, "Exceeds the limit"),
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "a name appears twice"),
        ('{"a\\ud800": 1}', "surrogates not allowed"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"a":' * 100_000, "nested more than 64 deep"),
    ],
)
def test_what_is_not_json_is_a_value_error(text, why):
    with pytest.raises(ValueError, match=why):
        parse(text)


@pytest.mark.parametrize("pair", ["[]", '{"a":}'])
def test_depth_is_counted_exactly(pair):
    middle = len(pair) - 1
    opening, closing = pair[:middle], pair[middle:]

    parse(opening * DEPTH + "1" + closing * DEPTH)
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        parse(opening * (DEPTH + 1) + "1" + closing * (DEPTH + 1))


def test_a_file_is_read_up_to_a_size(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")

    assert read_json(path, 6) == [1, 2]
    with pytest.raises(ValueError, match="it has more than 5 bytes"):
        read_json(path, 5)
