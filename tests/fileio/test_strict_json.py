"""JSON is taken where the standard allows it, and where nothing in it surprises."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.fileio.strict_json import MAX_DEPTH, decode_json_at, parse_json, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(-1e300, 1e300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_what_python_writes_comes_back(value):
    text = json.dumps(value)

    assert parse_json(text) == parse_json(text.encode()) == value
    assert decode_json_at(f"  {text} rest", 2) == (value, 2 + len(text))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ("1 2", "Extra data"),
        (b"\xff\xfe1\x00", "codec can't decode"),
        ("NaN", "NaN is not a JSON"),
        ("[-Infinity]", "-Infinity is not a JSON"),
        ("1e999", "1e999 is out of range"),
        ("9" * 5000, "Exceeds the limit"),
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "duplicate keys"),
        ('{"a\\ud800": 1}', "surrogates not allowed"),
        ("[" * 100_000, "more than 64 levels"),
        ('{"a":' * 100_000, "more than 64 levels"),
    ],
)
def test_what_is_not_json_is_a_value_error(text, why):
    with pytest.raises(ValueError, match=why):
        parse_json(text)


@pytest.mark.parametrize("pair", ["[]", '{"a":}'])
def test_depth_is_counted_exactly(pair):
    middle = len(pair) - 1
    opening, closing = pair[:middle], pair[middle:]

    parse_json(opening * MAX_DEPTH + "1" + closing * MAX_DEPTH)
    with pytest.raises(ValueError, match="more than 64 levels"):
        parse_json(opening * (MAX_DEPTH + 1) + "1" + closing * (MAX_DEPTH + 1))


def test_a_file_is_read_up_to_a_size(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")

    assert read_json(path, 6) == [1, 2]
    with pytest.raises(ValueError, match="it has more than 5 bytes"):
        read_json(path, 5)
