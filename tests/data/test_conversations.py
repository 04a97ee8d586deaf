"""Conversations and preference pairs of every format, their splits, rejected rows."""

import json
import re

import pytest

from gptjax.data.conversations import (
    Conversation,
    PreferencePair,
    read_conversations,
    read_preference_pairs,
    split_conversations,
)
from gptjax.data.text import ALL_SPLITS
from gptjax.errors import ConfigError, DataError
from tests.data.tables import csv_text, write

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Is it green?"}
LEAF = USER | {"input": "A leaf"}
YES = {"role": "assistant", "content": " Yes.\n"}
NO = {"role": "assistant", "content": "No!"}
TALK = [SYSTEM, USER, NO, USER, YES]
AB = {"prompt": "a", "completion": "b"}
DEFAULTS = {"strategy": "stratified", "val_fraction": 0.1, "test_fraction": 0.2, "seed": 0}


def write_rows(path, *rows):
    """Writes a table as JSON lines or CSV."""
    if path.suffix == ".jsonl":
        return write(path, "\n".join(map(json.dumps, rows)))
    return write(path, csv_text([list(rows[0]), *(row.values() for row in rows)]))


ASKED = {"instruction": "Is it green?", "input": "A leaf"}
BOTH = {"chosen": " Yes.\n", "rejected": "No!"}
NULLS = dict.fromkeys(("messages", "input", "system", "split", "task", "chosen"))
TEXTS = [  # row, its messages
    (ASKED | {"output": " Yes.\n"}, [LEAF, YES]),
    (ASKED | {"output": " Yes.\n", "input": " \n", "system": " "}, [USER, YES]),
    (ASKED | {"output": " Yes.\n", "system": "Be brief."}, [SYSTEM, LEAF, YES]),
    ({"prompt": "Is it green?", "completion": " Yes.\n"}, [USER, YES]),
    ({"prompt": "Is it green?", "response": " Yes.\n"}, [USER, YES]),
    ({"prompt": "Is it green?", "output": " Yes.\n"} | BOTH, [USER, YES]),
    ({"question": "Is it green?", "answer": " Yes.\n"}, [USER, YES]),
]
PARTS = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "green?"}]
NAMES = [{"role": "human", "content": PARTS}, YES | {"role": "model", "name": "M"}]
GPT = {"from": "gpt", "value": " Yes.\n"}
LISTS = [
    ({"prompt": [SYSTEM, LEAF], "completion": [YES]}, [SYSTEM, LEAF, YES]),
    ({"prompt": "Is it green?", "completion": " Yes.\n"} | NULLS, [USER, YES]),
    ({"messages": TALK, "prompt": "?", "chosen": "?"}, TALK),
    ({"messages": TALK[1:], "system": "Be brief."}, TALK),
    ({"messages": [SYSTEM | {"content": " "}, *TALK[1:]]}, TALK[1:]),
    ({"messages": NAMES}, [USER, YES]),
    ({"conversations": [{"from": "human", "value": "Is it green?"}, GPT]}, [USER, YES]),
    ({"conversations": [*NAMES, USER, YES | {"role": "bot"}]}, [USER, YES] * 2),
]
HIDDEN = {"chosen": TALK[1:], "rejected": [*TALK[1:4], NO], "system": "Be brief."}
PAIRS = [  # row, its prompt
    (ASKED | BOTH | {"system": "Be brief."}, [SYSTEM, LEAF]),
    ({"question": "Is it green?"} | BOTH, [USER]),
    ({"prompt": TALK[:4]} | BOTH, TALK[:4]),
    ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, [USER]),
    ({"chosen": [LEAF, YES], "rejected": [LEAF, NO]}, [LEAF]),
    (HIDDEN, TALK[:4]),
    (HIDDEN | {"prompt": "Is it"}, TALK[:4]),  # the lists include it
]


@pytest.mark.fast
def test_each_format_gives_the_same_messages(tmp_path):
    for row, expected in TEXTS + LISTS:
        for name in ("a.jsonl", "a.csv") if (row, expected) in TEXTS else ("a.jsonl",):
            found, description = read_conversations(write_rows(tmp_path / name, row, row))

            assert [list(one.messages) for one in found] == [expected, expected]
            assert [one.source_row for one in found] == [row, row]
            turns = 2 * sum(message["role"] == "assistant" for message in expected)
            assert f"conversations: 2, turns: {turns}, " in description


@pytest.mark.fast
def test_pairs_have_a_prompt_and_two_responses(tmp_path):
    path = tmp_path / "a.jsonl"
    for row, prompt in PAIRS:
        pair = PreferencePair(tuple(prompt), " Yes.\n", "No!", row, f"{path}:1")

        assert read_preference_pairs(write_rows(path, row))[0] == [pair]
        [found] = read_conversations(path)[0]
        assert found.messages == (*prompt, YES)
    # A conversation ends with the output.
    [found] = read_conversations(write_rows(path, ASKED | BOTH | {"output": "No!"}))[0]
    assert found.messages == (LEAF, NO)


def test_tasks_splits_and_locations_are_those_of_the_rows(tmp_path):
    names = ["train", "validation", "val", "valid", "test"]
    rows = [AB | BOTH | {"prompt": "a\nb", "split": n, "task": n} for n in names]
    path = write_rows(tmp_path / "a.csv", *rows)

    found, pairs = read_conversations(path)[0], read_preference_pairs(path)[0]

    assert [one.task for one in found] == names
    assert [one.location for one in found] == [f"{path}:{n}" for n in (2, 5, 8, 11, 14)]
    for items in (found, pairs):
        splits = split_conversations(items, **DEFAULTS)
        assert splits == {"train": items[:1], "validation": items[1:4], "test": items[4:]}


INVALID_ROWS = [  # second row of a file, value that the message names
    ({}, "'prompt'"),
    ("hello", "'hello'"),
    (AB | {"completion": 5}, "column 'completion' is 5"),
    (AB | {"system": 1}, "column 'system' is 1"),
    (AB | {"completion": TALK[2:]}, "'completion' has 3"),
    (AB | {"split": "trian"}, "unknown split 'trian'. Did you mean train?"),
]
INVALID_MESSAGES = [
    ("hello", ": 'messages' is 'hello'"),
    ([USER, 5], ", message 2: 5 "),
    ([{"role": "user"}], ", message 1: 'content' is missing or null; present: role"),
    ([NO | {"role": "tool"}], ", message 1: unknown role 'tool'"),
    ([NO | {"content": 5}], ", message 1: column 'content' is 5"),
    ([NO | {"content": ""}], ", message 1: 'content'"),
    ([USER | {"content": [{"type": "image_url"}]}], ", message 1: 'text'"),
    (TALK[:4], ": the last message has role user, expected assistant"),
    ([SYSTEM, NO], ": message 2 has role assistant, expected user"),
]
INVALID_PAIRS = [
    ({"chosen": TALK, "rejected": [USER, NO]}, "'chosen' and 'rejected'"),
    ({"chosen": "Human: a", "rejected": "b"}, "'chosen' is 'Human: a'"),
    (AB | BOTH | {"rejected": ""}, "'rejected'"),
    (ASKED | BOTH | {"instruction": []}, "column 'instruction' is []"),
    (HIDDEN | {"chosen": TALK}, "two system messages, in column 'system'"),
]


def test_invalid_rows_are_named(tmp_path):
    cases = [(read_conversations, [AB, row], f":2: {value}") for row, value in INVALID_ROWS]
    cases += [
        (read_conversations, [{"messages": found}], f":1{value}")
        for found, value in INVALID_MESSAGES
    ]
    cases += [(read_preference_pairs, [row], f":1: {value}") for row, value in INVALID_PAIRS]
    for read, rows, value in cases:
        path = write_rows(tmp_path / "a.jsonl", *rows)
        with pytest.raises(DataError, match=re.escape(f"{path}{value}")):
            read(path)


def test_files_without_conversations_are_rejected(tmp_path):
    mixed = write_rows(tmp_path / "a.csv", *(AB | {"split": n} for n in ("test", "")))
    for path, value in {
        write(tmp_path / "a.txt", "a"): "a.txt",
        write(tmp_path / "a.json", "[]"): "a.json",
        mixed: f"{mixed}:3: no 'split'",
        "sms-spam": "sms-spam",
    }.items():
        with pytest.raises(DataError, match=re.escape(value)):
            read_conversations(path)


def make_rows(count):
    return [Conversation((USER, YES), {}, f"a.csv:{n:04}") for n in range(count)]


@pytest.mark.fast
def test_each_row_is_in_one_split_of_the_right_size():
    rows = make_rows(40)
    for val, test, sizes in [(0.1, 0.2, [28, 4, 8]), (0.01, 0, [39, 1]), (0, 0, [40])]:
        options = DEFAULTS | {"val_fraction": val, "test_fraction": test}

        splits = split_conversations(rows, **options)

        found = [row for part in splits.values() for row in part]
        assert sorted(found, key=lambda row: row.location) == rows != found
        assert [len(part) for part in splits.values()] == sizes
        assert list(splits) == [
            name for name, n in zip(ALL_SPLITS, (1, val, test), strict=True) if n
        ]
        assert split_conversations(rows, **options) == splits
        assert split_conversations(rows, **options | {"seed": 9}) != splits


def test_impossible_splits_are_rejected():
    held_out = [Conversation((USER, YES), {}, "a", split) for split in ("test", "test")]
    for rows, options, kind, value in [
        (make_rows(9), {"strategy": "bok"}, ConfigError, "data.split_strategy='bok'"),
        (make_rows(2), {}, DataError, "data.test_fraction"),
        (held_out, {}, DataError, "'train'"),
    ]:
        with pytest.raises(kind, match=re.escape(value)):
            split_conversations(rows, **DEFAULTS | options)


def test_the_books_preferences_are_pairs_and_conversations(shared_data):
    pairs, description = read_preference_pairs("preferences")
    found, _ = read_conversations(shared_data / "instruction-data-with-preference.json")

    assert "pairs: 1,100, with identical responses: 6, with an input: 325" in description
    for pair, one in zip(pairs, found, strict=True):
        row = pair.source_row
        assert one.messages == (*pair.prompt, {"role": "assistant", "content": row["output"]})
        assert (pair.chosen, pair.rejected) == (row["chosen"], row["rejected"])
