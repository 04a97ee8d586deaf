"""Conversations and preference pairs of every format, and their splits."""

import json
import tracemalloc

import pytest

from gptjax.data import readers
from gptjax.data.classification import read_labeled_texts
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


BRIEF = {"system_prompt": "Be brief.", "system": None}
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
    (BRIEF | {"question": "Is it green?", "response": " Yes.\n"}, [SYSTEM, USER, YES]),
    ({"prompt": "Is it green?", "input": "A leaf", "response": " Yes.\n"}, [LEAF, YES]),
    ({"question": "Is it green?", "context": "A leaf", "answer": " Yes.\n"}, [LEAF, YES]),
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

        assert list(read_preference_pairs(write_rows(path, row))[0]) == [pair]
        assert read_conversations(path)[0][0].messages == (*prompt, YES)


def test_keys_that_are_not_read_are_counted(tmp_path):
    path, answer = tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}
    user = USER | {"content": [PARTS[0] | {"lang": "en"}], "name": "M"}
    talk = {"messages": [user, YES | {"weight": 1, "tools": []}], "prompt": " "}
    known = {"system": "s", "input": "i", "task": "t", "split": "test"}
    for row, keys in [
        (answer | {"id": 1, "a": " ", "b": 0}, "id (1), b (1)"),
        (answer | {"weight": "1.0", "train": True, "label": "x", "tools": "[]"}, "label (1)"),
        (talk, "messages[].content[].lang (1), messages[].name (1), messages[].weight (1)"),
        (answer | {f"k{n:02}": n for n in range(23)}, "k18 (1), k19 (1), 3 more"),
        ({"prompt": "a"} | BOTH, "rejected (1)"),
        (answer | known, ""),
        ({"messages": [USER | {"value": "v"}, YES]}, "messages[].value (1)"),
        ({"messages": [USER, YES | {"text": "t"}]}, "messages[].text (1)"),
        ({"messages": [USER, YES | GPT]}, "messages[].role (1), messages[].content (1)"),
        ({"messages": [USER | {"content": [PARTS[0] | {"content": "c"}]}, YES]}, "[].content (1)"),
    ]:
        _, description = read_conversations(write_rows(path, row))
        assert ("not read: " in description) == bool(keys)
        assert f"{keys}; conversations" in description
    pairs = write_rows(path, *[{"prompt": "a", "task": "t"} | BOTH] * 2)
    assert "not read: task (2);" in read_preference_pairs(pairs)[1]


def test_a_prompt_beside_messages_that_lack_it_is_counted_as_not_read(tmp_path):
    talk = {"chosen": TALK[1:], "rejected": [*TALK[1:4], NO]}
    for prompt, is_read in [
        (USER["content"], True),
        ([USER], True),
        (TALK[1:4], True),
        ("", True),
        ("Is it blue?", False),
        ([SYSTEM, USER], False),
        (5, False),
    ]:
        path = write_rows(tmp_path / "a.jsonl", talk | {"prompt": prompt})
        for read in (read_conversations, read_preference_pairs):
            assert ("prompt (1)" in read(path)[1]) == (not is_read)


def test_rows_in_memory_take_a_few_times_the_size_of_their_file(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "READ_BLOCK_BYTES", 1 << 12)
    rows = [("ab"[n % 2], f"the text of row {n}") for n in range(10_000)]
    talks = [{"prompt": text, "response": text} for _, text in rows]
    for read, path in [
        (read_labeled_texts, write(tmp_path / "a.csv", csv_text([("label", "text"), *rows]))),
        (read_conversations, write_rows(tmp_path / "a.jsonl", *talks)),
    ]:
        tracemalloc.start()
        read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5 * path.stat().st_size


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
        expected = {"train": items[:1], "validation": items[1:4], "test": items[4:]}
        assert {n: list(x) for n, x in splits.items()} == {n: list(x) for n, x in expected.items()}


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
