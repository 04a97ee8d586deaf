"""Which rows become conversations and pairs, how they are divided, what is refused."""

import csv
import gzip
import io
import json
import re

import pytest
from hypothesis import given, settings
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

quiet = settings(deadline=None, derandomize=True, max_examples=100)
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Is it green?"}
LEAF = USER | {"input": "A leaf"}
YES = {"role": "assistant", "content": " Yes.\n"}
NO = {"role": "assistant", "content": "No!"}
TALK = [SYSTEM, USER, NO, USER, YES]
AB = {"prompt": "a", "completion": "b"}
DEFAULTS = {"strategy": "stratified", "val_fraction": 0.1, "test_fraction": 0.2, "seed": 0}


def sharegpt(messages):
    """The messages as ShareGPT has them."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    fields = {"role": "from", "content": "value", "input": "input"}
    return [{fields[k]: names.get(m[k], m[k]) for k in m} for m in messages]


def written(path, *rows):
    """The file of these rows, in the way that its name says."""
    content = json.dumps(rows)
    if ".jsonl" in path.name:
        content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    elif ".csv" in path.name:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([list(rows[0]), *(row.values() for row in rows)])
        content = text.getvalue()
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def messages(path):
    """The messages of a file's only conversation."""
    [found] = read_conversations(path)[0]
    return list(found.messages)


def refused(match, kind=DataError):
    """What raises an error with these characters."""
    return pytest.raises(kind, match=re.escape(match))


ASKED = {"instruction": "Is it green?", "input": "A leaf"}
BOTH = {"chosen": " Yes.\n", "rejected": "No!"}
NULLS = dict.fromkeys(("messages", "input", "system", "split", "task", "chosen"))
TEXTS = [  # row, its messages
    (ASKED | {"output": " Yes.\n"}, [LEAF, YES]),
    (ASKED | {"output": " Yes.\n", "input": " \n", "system": " "}, [USER, YES]),
    (ASKED | {"output": " Yes.\n", "system": "Be brief."}, [SYSTEM, LEAF, YES]),
    ({"instruction": "Is it green?", "output": " Yes.\n"}, [USER, YES]),
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
    (ASKED | BOTH, [LEAF]),
    (ASKED | BOTH | {"system": "Be brief."}, [SYSTEM, LEAF]),
    ({"prompt": "Is it green?"} | BOTH, [USER]),
    ({"question": "Is it green?", "system": "Be brief."} | BOTH, [SYSTEM, USER]),
    ({"prompt": TALK[:4]} | BOTH, TALK[:4]),
    ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, [USER]),
    ({"chosen": [LEAF, YES], "rejected": [LEAF, NO]}, [LEAF]),
    (HIDDEN, TALK[:4]),
    (HIDDEN | {"prompt": "Is it"}, TALK[:4]),  # the lists hold it too
]


@pytest.mark.fast
@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "json.gz", "csv.gz"])
@pytest.mark.parametrize(("row", "expected"), TEXTS)
def test_each_format_gives_the_same_messages(tmp_path, row, expected, ending):
    found, _ = read_conversations(written(tmp_path / f"a.{ending}", row, row))

    assert [list(one.messages) for one in found] == [expected, expected]
    assert [one.source_row for one in found] == [row, row]


@pytest.mark.fast
@pytest.mark.parametrize(("row", "expected"), LISTS)
def test_lists_of_messages_are_read_in_each_spelling(tmp_path, row, expected):
    assert messages(written(tmp_path / "a.jsonl", row)) == expected


@pytest.mark.fast
@pytest.mark.parametrize(("row", "prompt"), PAIRS)
def test_pairs_have_a_prompt_and_two_answers(tmp_path, row, prompt):
    path = written(tmp_path / "a.json", row)
    pair = PreferencePair(tuple(prompt), " Yes.\n", "No!", row, f"{path}:1")

    assert read_preference_pairs(path)[0] == [pair]
    assert messages(path) == [*prompt, YES]
    if set(row) & {"instruction", "question"}:
        path = written(tmp_path / "b.json", row | {"output": "No!"})
        assert messages(path) == [*prompt, NO]


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
words = words.filter(str.strip)


@st.composite
def talks(draw):
    """A conversation that may have a system message and inputs."""
    found = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        second = {"input": draw(words)} if draw(st.booleans()) else {}
        found.append({"role": "user", "content": draw(words)} | second)
        found.append({"role": "assistant", "content": draw(words)})
    return found


@pytest.mark.fast
@quiet
@given(talks())
def test_what_is_written_is_read_again(tmp_path_factory, talk):
    folder = tmp_path_factory.mktemp("talks")
    system = talk[0]["content"] if talk[0]["role"] == "system" else ""
    asked, *rest = talk[1:] if system else talk
    for row in (
        {"messages": talk},
        {"conversations": sharegpt(talk)},
        {"prompt": talk[:-1], "completion": talk[-1]["content"]},
        {"messages": [asked, *rest], "system": system},
    ):
        for name in ("a.jsonl", "a.json", "a.jsonl.gz"):
            assert messages(written(folder / name, row)) == talk
    if len(rest) == 1:
        row = {"instruction": asked["content"], "input": asked.get("input", "")}
        row |= {"output": rest[0]["content"], "system": system}
        assert messages(written(folder / "a.csv", row)) == talk


def test_the_line_says_what_was_taken_and_counts_it(tmp_path):
    one = {"messages": TALK, "split": "train"}
    talk = written(tmp_path / "a.jsonl", one, {"messages": [LEAF, YES], "split": "val"})

    assert read_conversations(talk)[1] == (
        f"{talk}: JSON lines; chat (messages); conversations: 2, turns: 3, with an "
        "input: 1, with a system message: 1; splits in the file: train 1, "
        "validation 1."
    )


def test_tasks_splits_and_places_are_those_of_the_rows(tmp_path):
    names = ["train", "validation", "val", "valid", "test"]
    rows = [AB | BOTH | {"prompt": "a\nb", "split": n, "task": n} for n in names]
    path = written(tmp_path / "a.csv", *rows)

    found, pairs = read_conversations(path)[0], read_preference_pairs(path)[0]

    assert [one.task for one in found] == names
    assert [one.location for one in found] == [f"{path}:{n}" for n in (2, 5, 8, 11, 14)]
    for items in (found, pairs):
        for how in ("stratified", "book"):
            splits = split_conversations(items, **DEFAULTS | {"strategy": how})
            assert list(splits) == list(ALL_SPLITS)
            assert list(splits.values()) == [items[:1], items[1:4], items[4:]]


def test_word_tasks_are_built_in(monkeypatch):
    rows = [AB | {"task": "case", "split": name} for name in ("train", "test")]
    monkeypatch.setattr("gptjax.data.conversations.word_tasks", lambda: rows)

    found, line = read_conversations("word-tasks")

    assert [(one.source_row, one.task) for one in found] == [(row, "case") for row in rows]
    assert [one.location for one in found] == ["word-tasks:1", "word-tasks:2"]
    assert line.startswith("word-tasks: built in; prompts (prompt, completion); ")


BAD_ROWS = {
    "'prompt' is missing or null; present: nothing.": {},
    "'prompt' is missing or null; present: messages.": {"messages": TALK},
    "'completion' is missing or null; present: prompt.": AB | {"completion": None},
    "'hello' has no columns. All rows need the same columns.": "hello",
    "'completion' is empty. Add a response": AB | {"completion": " "},
    "'prompt' is empty. Add a prompt": AB | {"prompt": ""},
    "column 'completion' is 5, not a string.": AB | {"completion": 5},
    "column 'prompt' is {}, not a string.": AB | {"prompt": {}},
    "column 'system' is 1, not a string.": AB | {"system": 1},
    "column 'task' is 1, not a string.": AB | {"task": 1},
    "unpaired surrogate": AB | {"completion": "\ud800"},
    "NUL character": AB | {"completion": "\0"},
    "'completion' has 3 messages": AB | {"completion": TALK[2:]},
    "'prompt' is [], not a list of messages. Write each message": AB | {"prompt": []},
    "message 3 has role assistant, expected user": AB | {"prompt": [USER, NO]},
    "unknown split 'trian'. Did you mean train? Use one of train, validation, test, "
    "val, valid, or rename the column 'split'.": AB | {"split": "trian"},
}


@pytest.mark.parametrize("error", BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named(tmp_path, error):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(map(json.dumps, [AB, BAD_ROWS[error]])))

    with refused(f"{path}:3: {error}"):
        read_conversations(path)


BAD_MESSAGES = {
    ": 'messages' is 'hello', not a list of messages. Write each message as {": "hello",
    ": 'messages' is [], not a list of messages.": [],
    ', message 2: 5 has no columns. Write each message as {"role": "user",': [USER, 5],
    ", message 1: 'content' is missing or null; present: role.": [{"role": "user"}],
    ", message 1: 'role' is missing or null; present: content.": [{"content": "a"}],
    ", message 1: 'value' is missing or null; present: from.": [{"from": "gpt"}],
    ", message 1: unknown role 'tool'. Use one of system, user, human, assistant, gpt, "
    "model, bot": [NO | {"role": "tool"}],
    ", message 1: unknown role []. Use one of": [NO | {"role": []}],
    ", message 1: column 'content' is 5, not a string.": [NO | {"content": 5}],
    ", message 1: column 'input' is 5, not a string.": [USER | {"input": 5}],
    ", message 1: 'content' is empty.": [NO | {"content": ""}],
    ", message 1: 'value' is empty.": [{"from": "gpt", "value": " "}],
    ", message 1: 'text' is missing or null; present: type. Write each part as "
    '{"type": "text", "text"': [USER | {"content": [{"type": "image_url"}]}],
    ", message 1: 'a' has no columns. Write each part": [USER | {"content": ["a"]}],
    ": the last message has role user, expected assistant": TALK[:4],
    ": the last message has role system, expected assistant": [SYSTEM],
    ": message 1 has role assistant, expected user": [NO],
    ": message 2 has role assistant, expected user": [SYSTEM, NO],
    ": message 2 has role user, expected assistant": [USER, USER],
    ": message 2 has role system, expected assistant": [USER, SYSTEM],
}


@pytest.mark.parametrize("error", BAD_MESSAGES)
def test_messages_that_are_no_conversation_are_named(tmp_path, error):
    path = written(tmp_path / "a.jsonl", {"messages": BAD_MESSAGES[error]})

    with refused(f"{path}:1{error}"):
        read_conversations(path)


BAD_PAIRS = {
    "'chosen' and 'rejected' differ": {"chosen": TALK, "rejected": [USER, NO]},
    "'chosen' is 'Human: a', not a list of messages. Plain text requires a column "
    "'prompt'. Write each message as {": {"chosen": "Human: a", "rejected": "b"},
    "'rejected' is empty.": AB | BOTH | {"rejected": ""},
    "column 'instruction' is [], not a string.": ASKED | BOTH | {"instruction": []},
    "two system messages, in column 'system' and as the": HIDDEN | {"chosen": TALK},
    "the columns prompt, completion do not form a preference pair. Rename them to one "
    "of: instruction, chosen, rejected; prompt, chosen, rejected; question, ": AB,
    "the columns (none) do not form a preference pair.": {},
    "'hello' has no columns.": "hello",
}


@pytest.mark.parametrize("error", BAD_PAIRS)
def test_rows_that_are_no_pair_are_named(tmp_path, error):
    path = written(tmp_path / "a.json", BAD_PAIRS[error])

    with refused(f"{path}:1: {error}"):
        read_preference_pairs(path)


def test_files_that_hold_no_conversations_are_refused(tmp_path):
    mixed = written(tmp_path / "a.csv", *(AB | {"split": n} for n in ("test", "")))
    other = written(tmp_path / "b.json", {"text": "a"})
    errors = {
        tmp_path: f"{tmp_path} is not a file. Pass a .jsonl, .json, .csv file (also "
        ".gz) or one of the data sets instructions, preferences, ",
        written(tmp_path / "a.txt"): "a.txt: unsupported file suffix. Pass a .jsonl, ",
        written(tmp_path / "a.json"): "a.json has no rows.",
        other: f"{other}:1: the columns text do not form a conversation. Rename them "
        "to one of: messages; conversations; instruction, output; prompt, ",
        mixed: f"{mixed}:3: no 'split'",
        "sms-spam": "the data set sms-spam has no conversations.",
    }
    for path, error in errors.items():
        with refused(error):
            read_conversations(path)


def rows_of(count):
    """As many conversations, each at another place."""
    return [Conversation((USER, YES), {}, f"a.csv:{n:04}") for n in range(count)]


@pytest.mark.fast
@quiet
@given(
    st.integers(3, 60),
    st.sampled_from([0, 0.0, 0.01, 0.1, 0.45]),
    st.sampled_from([0, 0.05, 1 / 3, 0.5]),
    st.integers(0, 8),
)
def test_each_row_is_in_one_split_that_has_its_share(count, val, test, seed):
    rows = rows_of(count)
    options = DEFAULTS | {"val_fraction": val, "test_fraction": test}

    splits, again, other = (
        split_conversations(rows, **options | {"seed": n}) for n in (seed, seed, 9)
    )

    assert again == splits
    assert other != splits or count < 20
    found = [row for part in splits.values() for row in part]
    assert sorted(found, key=lambda row: row.location) == rows
    shares = dict(zip(ALL_SPLITS, (1 - val - test, val, test), strict=True))
    assert list(splits) == [name for name in ALL_SPLITS if shares[name]]
    assert all(splits.values())
    if min(shares[name] * count for name in splits) >= 1:
        assert all(abs(len(splits[n]) - shares[n] * count) < 1 for n in splits)


BAD_SPLITS = {
    "data.split_strategy='bok' must be one of stratified, book.": (9, {"strategy": "bok"}),
    "data.val_fraction=0.8 and data.test_fraction=0.2 ": (9, {"val_fraction": 0.8}),
    "2 rows, but each of 3 splits needs one. Add rows, or set data.test": (2, {}),
}


@pytest.mark.parametrize("error", BAD_SPLITS)
def test_a_division_that_cannot_be_made_says_why(error):
    count, options = BAD_SPLITS[error]
    held = [Conversation((USER, YES), {}, "a", split) for split in ("test", "test")]

    with refused(error, DataError if "rows" in error else ConfigError):
        split_conversations(rows_of(count), **DEFAULTS | options)
    with refused("no row has split 'train', only test."):
        split_conversations(held, **DEFAULTS)


def test_the_books_preferences_are_pairs_and_conversations(shared_data):
    path = shared_data / "instruction-data-with-preference.json"

    pairs, line = read_preference_pairs("preferences")
    found, _ = read_conversations(path)

    assert line == (
        f"{path}: JSON list; preferences (instruction, chosen, rejected); pairs: "
        "1,100, with identical responses: 6, with an input: 325, with a system "
        "message: 0."
    )
    for pair, one in zip(pairs, found, strict=True):
        answer = {"role": "assistant", "content": pair.source_row["output"]}
        assert one.messages == (*pair.prompt, answer)
        assert (pair.chosen, pair.rejected) == (
            one.source_row["chosen"],
            one.source_row["rejected"],
        )
