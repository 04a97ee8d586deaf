"""Conversations and preference pairs of every format, their splits, rejected rows."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.conversations import (
    Conversation,
    PreferencePair,
    read_conversations,
    read_preference_pairs,
    split_conversations,
)
from gptjax.data.text import ALL_SPLITS
from gptjax.errors import ConfigError, DataError
from tests.data.tables import csv_text, quick, write

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Is it green?"}
LEAF = USER | {"input": "A leaf"}
YES = {"role": "assistant", "content": " Yes.\n"}
NO = {"role": "assistant", "content": "No!"}
TALK = [SYSTEM, USER, NO, USER, YES]
AB = {"prompt": "a", "completion": "b"}
DEFAULTS = {"strategy": "stratified", "val_fraction": 0.1, "test_fraction": 0.2, "seed": 0}


def sharegpt(messages):
    """Messages in ShareGPT's format."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    fields = {"role": "from", "content": "value", "input": "input"}
    return [{fields[k]: names.get(m[k], m[k]) for k in m} for m in messages]


def write_rows(path, *rows):
    """Writes a table in the format of its name."""
    if ".json" in path.name:
        is_array = ".jsonl" not in path.name
        return write(path, json.dumps(rows) if is_array else "\n\n".join(map(json.dumps, rows)))
    delimiter = "\t" if ".tsv" in path.name else ","
    return write(path, csv_text([list(rows[0]), *(row.values() for row in rows)], delimiter))


def messages(path):
    """Messages of a file's only conversation."""
    [found] = read_conversations(path)[0]
    return list(found.messages)


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
    ({"question": "Is it green?", "output": " Yes.\n"}, [USER, YES]),
]
PARTS = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "green?"}]
NAMES = [{"role": "human", "content": PARTS}, YES | {"role": "model", "name": "M"}]
LISTS = [
    ({"prompt": [SYSTEM, LEAF], "completion": [YES]}, [SYSTEM, LEAF, YES]),
    ({"prompt": TALK[:4], "response": " Yes.\n"}, TALK),
    ({"prompt": "Is it green?", "completion": " Yes.\n"} | NULLS, [USER, YES]),
    ({"messages": TALK, "prompt": "?", "chosen": "?"}, TALK),
    ({"messages": TALK[1:], "system": "Be brief."}, TALK),
    ({"messages": [SYSTEM | {"content": " "}, *TALK[1:]]}, TALK[1:]),
    ({"messages": NAMES}, [USER, YES]),
    ({"conversations": sharegpt(TALK)}, TALK),
    ({"conversations": sharegpt(TALK[1:]), "system": "Be brief."}, TALK),
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
@pytest.mark.parametrize(("row", "expected"), TEXTS + LISTS)
def test_each_format_gives_the_same_messages(tmp_path, row, expected):
    suffixes = ("json", "jsonl.gz", "csv", "tsv") if (row, expected) in TEXTS else ("jsonl",)
    for suffix in suffixes:
        found, _ = read_conversations(write_rows(tmp_path / f"a.{suffix}", row, row))

        assert [list(one.messages) for one in found] == [expected, expected]
        assert [one.source_row for one in found] == [row, row]


@pytest.mark.fast
@pytest.mark.parametrize(("row", "prompt"), PAIRS)
def test_pairs_have_a_prompt_and_two_responses(tmp_path, row, prompt):
    path = write_rows(tmp_path / "a.json", row)
    pair = PreferencePair(tuple(prompt), " Yes.\n", "No!", row, f"{path}:1")

    assert read_preference_pairs(path)[0] == [pair]
    assert messages(path) == [*prompt, YES]
    if set(row) & {"instruction", "question"}:  # a conversation ends with the output
        path = write_rows(tmp_path / "b.json", row | {"output": "No!"})
        assert messages(path) == [*prompt, NO]


def test_the_description_names_the_format_and_counts_the_rows(tmp_path):
    one = {"messages": TALK, "split": "train"}
    path = write_rows(tmp_path / "a.jsonl", one, {"messages": [LEAF, YES], "split": "val"})

    assert read_conversations(path)[1] == (
        f"{path}: JSON lines; chat (messages); conversations: 2, turns: 3, with an "
        "input: 1, with a system message: 1; splits in the file: train 1, "
        "validation 1."
    )


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
    ({"messages": TALK}, "'prompt' is missing or null; present: messages"),
    (AB | {"completion": None}, "'completion'"),
    ("hello", "'hello'"),
    (AB | {"completion": " "}, "'completion'"),
    (AB | {"prompt": ""}, "'prompt'"),
    (AB | {"completion": 5}, "column 'completion' is 5"),
    (AB | {"prompt": {}}, "column 'prompt' is {}"),
    (AB | {"system": 1}, "column 'system' is 1"),
    (AB | {"task": 1}, "column 'task' is 1"),
    (AB | {"completion": "\ud800"}, "unpaired surrogate"),
    (AB | {"completion": TALK[2:]}, "'completion' has 3"),
    (AB | {"prompt": []}, "'prompt' is []"),
    (AB | {"prompt": [USER, NO]}, "message 3 has role assistant, expected user"),
    (AB | {"split": "trian"}, "unknown split 'trian'. Did you mean train?"),
]
INVALID_MESSAGES = [
    ("hello", ": 'messages' is 'hello'"),
    ([], ": 'messages' is []"),
    ([USER, 5], ", message 2: 5 "),
    ([{"role": "user"}], ", message 1: 'content' is missing or null; present: role"),
    ([{"content": "a"}], ", message 1: 'role'"),
    ([{"from": "gpt"}], ", message 1: 'value'"),
    ([NO | {"role": "tool"}], ", message 1: unknown role 'tool'"),
    ([NO | {"role": []}], ", message 1: unknown role []"),
    ([NO | {"content": 5}], ", message 1: column 'content' is 5"),
    ([USER | {"input": 5}], ", message 1: column 'input' is 5"),
    ([NO | {"content": ""}], ", message 1: 'content'"),
    ([{"from": "gpt", "value": " "}], ", message 1: 'value'"),
    ([USER | {"content": [{"type": "image_url"}]}], ", message 1: 'text'"),
    ([USER | {"content": ["a"]}], ", message 1: 'a'"),
    (TALK[:4], ": the last message has role user, expected assistant"),
    ([SYSTEM], ": the last message has role system, expected assistant"),
    ([NO], ": message 1 has role assistant, expected user"),
    ([SYSTEM, NO], ": message 2 has role assistant, expected user"),
    ([USER, USER], ": message 2 has role user, expected assistant"),
    ([USER, SYSTEM], ": message 2 has role system, expected assistant"),
]
INVALID_PAIRS = [
    ({"chosen": TALK, "rejected": [USER, NO]}, "'chosen' and 'rejected'"),
    ({"chosen": "Human: a", "rejected": "b"}, "'chosen' is 'Human: a'"),
    (AB | BOTH | {"rejected": ""}, "'rejected'"),
    (ASKED | BOTH | {"instruction": []}, "column 'instruction' is []"),
    (HIDDEN | {"chosen": TALK}, "two system messages, in column 'system'"),
    (AB, "the columns prompt, completion "),
    ({}, "the columns (none) "),
]


def test_invalid_rows_are_named(tmp_path):
    cases = [(read_conversations, [AB, row], f":3: {value}") for row, value in INVALID_ROWS]
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
    other = write_rows(tmp_path / "b.json", {"text": "a"})
    for path, value in {
        tmp_path: f"{tmp_path} ",
        write(tmp_path / "a.txt", "a"): "a.txt",
        write(tmp_path / "a.json", "[]"): "a.json",
        other: f"{other}:1: the columns text ",
        mixed: f"{mixed}:3: no 'split'",
        "sms-spam": "sms-spam",
        write(tmp_path / "SMSSpamCollection", "ham\thi\n"): "SMSSpamCollection",
    }.items():
        with pytest.raises(DataError, match=re.escape(value)):
            read_conversations(path)


def make_rows(count):
    """As many conversations, each at another location."""
    return [Conversation((USER, YES), {}, f"a.csv:{n:04}") for n in range(count)]


@pytest.mark.fast
@quick
@given(
    st.integers(3, 60),
    st.sampled_from([0, 0.0, 0.01, 0.1, 0.45]),
    st.sampled_from([0, 0.05, 1 / 3, 0.5]),
    st.integers(0, 8),
)
def test_each_row_is_in_one_split_of_the_right_size(count, val, test, seed):
    rows = make_rows(count)
    options = DEFAULTS | {"val_fraction": val, "test_fraction": test}

    splits, again, other = (
        split_conversations(rows, **options | {"seed": n}) for n in (seed, seed, 9)
    )

    assert again == splits
    assert other != splits or count < 20
    found = [row for part in splits.values() for row in part]
    assert sorted(found, key=lambda row: row.location) == rows
    fractions = dict(zip(ALL_SPLITS, (1 - val - test, val, test), strict=True))
    assert list(splits) == [name for name in ALL_SPLITS if fractions[name]]
    assert all(splits.values())
    if min(fractions[name] * count for name in splits) >= 1:
        assert all(abs(len(splits[n]) - fractions[n] * count) < 1 for n in splits)


def test_impossible_splits_are_rejected():
    held_out = [Conversation((USER, YES), {}, "a", split) for split in ("test", "test")]
    for rows, options, kind, value in [
        (make_rows(9), {"strategy": "bok"}, ConfigError, "data.split_strategy='bok'"),
        (make_rows(9), {"val_fraction": 0.8}, ConfigError, "data.val_fraction=0.8"),
        (make_rows(2), {}, DataError, "data.test_fraction"),
        (held_out, {}, DataError, "'train'"),
    ]:
        with pytest.raises(kind, match=re.escape(value)):
            split_conversations(rows, **DEFAULTS | options)


def test_the_books_preferences_are_pairs_and_conversations(shared_data):
    path = shared_data / "instruction-data-with-preference.json"

    pairs, description = read_preference_pairs("preferences")
    found, _ = read_conversations(path)

    assert description.startswith(f"{path}: JSON list; preferences (instruction, chosen, reje")
    assert "pairs: 1,100, with identical responses: 6, with an input: 325" in description
    for pair, one in zip(pairs, found, strict=True):
        answer = {"role": "assistant", "content": pair.source_row["output"]}
        assert one.messages == (*pair.prompt, answer)
        assert (pair.chosen, pair.rejected) == tuple(
            one.source_row[name] for name in ("chosen", "rejected")
        )
