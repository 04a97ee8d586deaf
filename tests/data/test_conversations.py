"""Conversations and preference pairs of every format, and their splits."""

import json

import pytest

from gptjax.data.conversations import (
    Conversation,
    PreferencePair,
    read_conversations,
    read_preference_pairs,
    split_conversations,
)
from gptjax.errors import DataError
from tests.data.tables import csv_text, write

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Is it green?"}
LEAF = USER | {"input": "A leaf"}
YES = {"role": "assistant", "content": " Yes.\n"}
NO = {"role": "assistant", "content": "No!"}
TALK = [SYSTEM, USER, NO, USER, YES]
DEFAULTS = {"strategy": "stratified", "val_fraction": 0.1, "test_fraction": 0.2, "seed": 0}


def write_rows(path, *rows):
    return write(path, "\n".join(map(json.dumps, rows)))


ASKED = {"instruction": "Is it green?", "input": "A leaf"}
BOTH = {"chosen": " Yes.\n", "rejected": "No!"}
NULLS = dict.fromkeys(("messages", "input", "system", "split", "task", "chosen"))
PARTS = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "green?"}]
NAMES = [{"role": "human", "content": PARTS}, YES | {"role": "model", "name": "M"}]
GPT = {"from": "gpt", "value": " Yes.\n"}
ROWS = [  # row, its messages
    (ASKED | {"output": " Yes.\n"}, [LEAF, YES]),
    (ASKED | {"output": " Yes.\n", "input": " \n", "system": " "}, [USER, YES]),
    (ASKED | {"output": " Yes.\n", "system": "Be brief."}, [SYSTEM, LEAF, YES]),
    ({"prompt": "Is it green?", "completion": " Yes.\n"}, [USER, YES]),
    ({"question": "Is it green?", "answer": " Yes.\n"}, [USER, YES]),
    ({"prompt": [SYSTEM, LEAF], "completion": [YES]}, [SYSTEM, LEAF, YES]),
    ({"prompt": "Is it green?", "completion": " Yes.\n"} | NULLS, [USER, YES]),
    ({"messages": TALK, "prompt": "?", "chosen": "?"}, TALK),
    ({"messages": TALK[1:], "system": "Be brief."}, TALK),
    ({"messages": [SYSTEM | {"content": " "}, *TALK[1:]]}, TALK[1:]),
    ({"conversations": [{"from": "human", "value": "Is it green?"}, GPT]}, [USER, YES]),
    ({"conversations": [*NAMES, USER, YES | {"role": "bot"}]}, [USER, YES] * 2),
]
HIDDEN = {"chosen": TALK[1:], "rejected": [*TALK[1:4], NO], "system": "Be brief."}
PAIRS = [  # row, its prompt
    (ASKED | BOTH | {"system": "Be brief."}, [SYSTEM, LEAF]),
    ({"question": "Is it green?"} | BOTH, [USER]),
    ({"prompt": TALK[:4]} | BOTH, TALK[:4]),
    ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, [USER]),
    (HIDDEN, TALK[:4]),
    (HIDDEN | {"prompt": "Is it"}, TALK[:4]),  # the lists include it
]


def test_each_format_gives_the_same_messages_and_pairs(tmp_path):
    path = tmp_path / "a.jsonl"
    for row, expected in ROWS:
        found, _ = read_conversations(write_rows(path, row, row))

        assert [list(one.messages) for one in found] == [expected, expected]
        assert [one.source_row for one in found] == [row, row]
    for row, prompt in PAIRS:
        pair = PreferencePair(tuple(prompt), " Yes.\n", "No!", row, f"{path}:1")

        assert read_preference_pairs(write_rows(path, row))[0] == [pair]
        assert read_conversations(path)[0][0].messages == (*prompt, YES)


def test_tasks_splits_and_locations_are_those_of_the_rows(tmp_path):
    names = ["train", "validation", "val", "valid", "test"]
    row = {"prompt": "a\nb", "completion": "c"} | BOTH
    rows = [[*row, "split", "task"], *([*row.values(), name, name] for name in names)]
    path = write(tmp_path / "a.csv", csv_text(rows))

    found, pairs = read_conversations(path)[0], read_preference_pairs(path)[0]

    assert [one.task for one in found] == names
    assert [one.location for one in found] == [f"{path}:{n}" for n in (2, 5, 8, 11, 14)]
    for items in (found, pairs):
        splits = split_conversations(items, **DEFAULTS)
        assert splits == {"train": items[:1], "validation": items[1:4], "test": items[4:]}


def make_rows(count, split=""):
    return [Conversation((USER, YES), {}, f"a.csv:{n:04}", split) for n in range(count)]


def test_each_row_is_in_one_split_of_the_right_size():
    rows = make_rows(40)
    splits = split_conversations(rows, **DEFAULTS)

    found = [row for part in splits.values() for row in part]
    assert sorted(found, key=lambda row: row.location) == rows != found
    sizes = {name: len(part) for name, part in splits.items()}
    assert sizes == {"train": 28, "validation": 4, "test": 8}
    assert split_conversations(rows, **DEFAULTS) == splits
    with pytest.raises(DataError, match="'train'"):
        split_conversations(make_rows(2, "test"), **DEFAULTS)
