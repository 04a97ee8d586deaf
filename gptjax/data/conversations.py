"""Conversations and preferences out of .json, .jsonl and .csv files, also .gz.

The columns of the first row say which format a file has; all other rows must have it
too. A message is a mapping of a role (system, user or assistant) and its content, of a
user's message also an "input" where there is one: Alpaca's second field. After an
optional system message, user and assistant alternate, and the assistant ends. Texts
stay as they are written; null and a blank input or system text count as absent.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gptjax.config import suggestion
from gptjax.data import labelled, named
from gptjax.data.folds import SPLITS, split_sizes
from gptjax.data.python_lines import PYTHON_LINES
from gptjax.data.rows import ROWS, opened
from gptjax.data.text import row_text, suffix
from gptjax.data.word_tasks import WORD_TASKS, word_tasks
from gptjax.errors import ConfigError, DataError

SETS = ("instructions", "preferences", WORD_TASKS)
KINDS = {f".{kind}": labelled.KINDS[f".{kind}"] for kind in ROWS}
Formats = dict[tuple[str, ...], str]  # columns that a row must have: what it is called
CONVERSATIONS: Formats = {  # the first that fits is it
    ("messages",): "chat",
    ("conversations",): "ShareGPT",
    ("instruction", "output"): "Alpaca",
    ("prompt", "completion"): "prompts",
    ("prompt", "response"): "prompts",
    ("prompt", "output"): "prompts",
    ("question", "answer"): "questions",
    ("question", "output"): "questions",
}
PROMPTS = ("instruction", "prompt", "question")
PREFERRED = ("chosen", "rejected")
PAIRS: Formats = {(prompt, *PREFERRED): "preferences" for prompt in PROMPTS}
PAIRS |= {PREFERRED: "preferences"}  # lists of messages that hold the prompt
ROLES = {"system": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant")
SPLIT_NAMES = {n: n for n in SPLITS} | {"val": "validation", "valid": "validation"}
HOW = ("stratified", "book")
OPTIONAL = dict.fromkeys(("system", "input", "split", "task"), "")
ROW_FIX = "Give all rows the same columns."
MESSAGE_FIX = 'Write a message as {"role": "user", "content": "..."}.'

Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer of the assistant."""

    messages: tuple[Message, ...]
    row: Mapping[str, Any]  # as it was read
    place: str  # "file:line"
    split: str = ""  # of SPLITS; "" where the rows name none
    task: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Messages that end with one of the user, and a better and a worse answer."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    row: Mapping[str, Any]  # as it was read
    place: str  # "file:line"
    split: str = ""  # of SPLITS; "" where the rows name none


Item = TypeVar("Item", Conversation, Pair)


def read_conversations(path: Path | str) -> tuple[list[Conversation], str]:
    """(the conversations, a line that says what was taken for what).

    Of a file of preferences, the answer is in "output" where there is one, else in
    "chosen".

    Raises:
        DataError: there are no such rows, or one of them cannot be used.
    """
    line, columns, rows = read_rows(str(path), CONVERSATIONS | PAIRS)
    answer = "chosen" if "chosen" in columns else columns[-1]
    found = []
    for place, raw in rows:
        row = checked(raw, columns, place, ROW_FIX)
        messages = messages_of(row, columns, answer, place)
        split, task = split_of(row, place), row_text(row, "task", place)
        found.append(Conversation(messages, raw, place, split, task))
    turns = sum(m["role"] == "assistant" for one in found for m in one.messages)
    return found, (
        f"{line}; conversations: {len(found):,}, turns: {turns:,}, {summary(found)}."
    )


def read_pairs(path: Path | str) -> tuple[list[Pair], str]:
    """(prompts with a chosen and a rejected answer, a line that says what was read).

    Lists of several messages in "chosen" and "rejected" hold the prompt themselves.

    Raises:
        DataError: there are no such rows, or one of them cannot be used.
    """
    line, columns, rows = read_rows(str(path), PAIRS)
    found = []
    for place, raw in rows:
        row = checked(raw, columns, place, ROW_FIX)
        chosen, rejected = (messages_of(row, columns, c, place) for c in PREFERRED)
        if chosen[:-1] != rejected[:-1]:
            raise DataError(
                f"{place}: 'chosen' and 'rejected' differ before their last message. "
                "Give both the same ones up to the answer, or leave the row out."
            )
        answers = (chosen[-1]["content"], rejected[-1]["content"])
        found.append(Pair(chosen[:-1], *answers, raw, place, split_of(row, place)))
    equal = sum(pair.chosen == pair.rejected for pair in found)
    return found, (
        f"{line}; pairs: {len(found):,}, of equal answers: {equal:,}, {summary(found)}."
    )


def read_rows(
    path: str, formats: Formats
) -> tuple[str, tuple[str, ...], list[tuple[str, Any]]]:
    """(what is read, for people; columns that a row must have; place, row of each)."""
    if path == WORD_TASKS:
        where, kind = path, "built in"
        rows = [(f"{path}:{n}", row) for n, row in enumerate(word_tasks(), 1)]
    else:
        where = find(path)
        kind = KINDS[suffix(where)]
        with opened(where) as (file, _):
            read = ROWS[suffix(where).removeprefix(".")](file, where)
            rows = [(f"{where}:{line}", row) for line, row in read]
    if not rows:
        raise DataError(f"{where} has no rows. Give a file with a conversation a row.")
    place, row = rows[0]
    names = [name for name in checked(row, (), place, ROW_FIX) if name in row]
    for columns, name in formats.items():
        if set(columns) <= set(names):
            return f"{where}: {kind}; {name} ({', '.join(columns)})", columns, rows
    what = "a pair of answers" if formats == PAIRS else "a conversation"
    raise DataError(
        f"{place}: cannot tell {what} from the columns {', '.join(names) or '(none)'}. "
        f"Rename them to one of: {'; '.join(map(', '.join, formats))}."
    )


def find(path: str) -> Path:
    """The file that the user's argument stands for."""
    file = Path(path).expanduser()
    if path in SETS:
        return named.find(path)
    if path in (named.PYTHON_HELP, PYTHON_LINES, *named.NAMED):
        problem = f"the data set {path} has no conversations"
    elif not file.is_file():
        problem = f"no file is at {path}"
    elif suffix(file) not in KINDS:
        problem = f"cannot tell what {path} holds from its name"
    else:
        return file
    raise DataError(
        f"{problem}. Give a file that ends in one of {', '.join(KINDS)} (also .gz), or "
        f"one of the data sets {', '.join(SETS)}."
    )


def checked(row: Any, columns: Sequence[str], place: str, fix: str) -> dict[str, Any]:
    """The row, which must have these columns; the optional ones are "" for null."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: {row!r:.40} has no columns. {fix}")
    row = {name: value for name, value in row.items() if value is not None}
    for name in columns:
        if name not in row:
            raise DataError(
                f"{place}: no {name!r}, or it is null; there is "
                f"{', '.join(row) or 'nothing'}. {fix}"
            )
    return OPTIONAL | row


def messages_of(
    row: dict[str, Any], columns: tuple[str, ...], answer: str, place: str
) -> tuple[Message, ...]:
    """The conversation that ends with the row's answer in this column."""
    asked = columns[0] if columns[0] in PROMPTS else ""
    if asked and not isinstance(row[answer], list):
        content = filled(row, answer, "an answer", place)
        messages: list[Message] = [{"role": "assistant", "content": content}]
    else:
        messages = read_messages(row, answer, place)
    if asked and len(messages) == 1:
        messages = [*prompt_of(row, asked, place), *messages]
    elif asked and answer not in PREFERRED:
        raise DataError(
            f"{place}: {answer!r} holds {len(messages)} messages, but an answer is "
            f"one. Put those before it into {asked!r}."
        )
    check_order(messages, place)
    if messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    system = row_text(row, "system", place)
    if system.strip():
        if messages[0]["role"] == "system":
            raise DataError(
                f"{place}: two system messages, in the column 'system' and as the "
                "first message. Remove one."
            )
        messages = [{"role": "system", "content": system}, *messages]
    return tuple(messages)


def prompt_of(row: dict[str, Any], column: str, place: str) -> list[Message]:
    """The messages before the answer: one of the user, or a list."""
    if column != "instruction" and isinstance(row[column], list):
        return read_messages(row, column, place)
    content = filled(row, column, "a prompt", place)
    second = input_of(row, place) if column == "instruction" else {}
    return [{"role": "user", "content": content, **second}]


def input_of(row: dict[str, Any], place: str) -> dict[str, str]:
    """The input under its name, nothing where it is blank."""
    text = row_text(row, "input", place)
    return {"input": text} if text.strip() else {}


def filled(row: dict[str, Any], column: str, what: str, place: str) -> str:
    """The text in a column, which is not blank."""
    text = row_text(row, column, place)
    if not text.strip():
        raise DataError(
            f"{place}: {column!r} is empty. Leave the row out, or give it {what}."
        )
    return text


def read_messages(row: dict[str, Any], column: str, place: str) -> list[Message]:
    """The messages in a column, in whatever order, at least one."""
    value = row[column]
    if not isinstance(value, list) or not value:
        more = "A text needs a column 'prompt'. " * (column in PREFERRED)
        raise DataError(
            f"{place}: {column!r} is {value!r:.40}, not a list of messages. "
            f"{more}{MESSAGE_FIX}"
        )
    return [read_message(m, f"{place}, message {n}") for n, m in enumerate(value, 1)]


def read_message(item: Any, place: str) -> Message:
    """One message, as chats or as ShareGPT name its fields."""
    sharegpt = isinstance(item, dict) and "from" in item
    by, column = ("from", "value") if sharegpt else ("role", "content")
    item = checked(item, (by, column), place, MESSAGE_FIX)
    role = ROLES.get(item[by]) if isinstance(item[by], str) else None
    if role is None:
        raise DataError(
            f"{place}: unknown role {item[by]!r:.40}. Known: {', '.join(ROLES)}. Leave "
            "the row out, or name one of these."
        )
    if isinstance(item[column], list):
        item[column] = join_parts(item[column], place)
    if role == "system":
        return {"role": role, "content": row_text(item, column, place)}
    what = "an answer" if role == "assistant" else "a prompt"
    message = {"role": role, "content": filled(item, column, what, place)}
    return message | input_of(item, place) if role == "user" else message


def join_parts(parts: list[Any], place: str) -> str:
    """The text of a content that is a list of parts."""
    fix = 'Leave the row out, or write a part as {"type": "text", "text": "..."}.'
    items = [checked(part, ("text",), place, fix) for part in parts]
    return "".join(row_text(item, "text", place) for item in items)


def check_order(messages: Sequence[Message], place: str) -> None:
    """Refuses messages that do not alternate up to an answer."""
    roles = [message["role"] for message in messages]
    first = 1 + (roles[0] == "system")
    for n, role in enumerate(roles[first - 1 :]):
        due = ("user", "assistant")[n % 2]
        if role != due:
            raise DataError(
                f"{place}: message {first + n} is by the {role}, where the {due}'s "
                "turn is. Only the first may be by the system; then user and assistant "
                "alternate. Join or remove messages."
            )
    if roles[-1] != "assistant":
        raise DataError(
            f"{place}: the last message is by the {roles[-1]}, so that there is no "
            "answer to it. Add one, or remove the message."
        )


def split_of(row: dict[str, Any], place: str) -> str:
    """The split that the row names, or ""."""
    name = row_text(row, "split", place)
    if name and name not in SPLIT_NAMES:
        raise DataError(
            f"{place}: unknown split {name!r}.{suggestion(name, SPLIT_NAMES)} Name one "
            f"of {', '.join(SPLIT_NAMES)}, or rename the column 'split'."
        )
    return SPLIT_NAMES[name] if name else ""


def own_splits(items: list[Item]) -> dict[str, list[Item]]:
    """The rows of the splits that they name, {} where none does."""
    unnamed = [item.place for item in items if not item.split]
    if unnamed and len(unnamed) < len(items):
        raise DataError(
            f"{unnamed[0]}: no 'split', which other rows have. Name it in all rows or "
            "in none."
        )
    parts = {name: [item for item in items if item.split == name] for name in SPLITS}
    return {name: part for name, part in parts.items() if part}


def split_conversations(
    items: list[Item],
    how: str,
    *,
    val_fraction: int | float,
    test_fraction: int | float,
    seed: int,
) -> dict[str, list[Item]]:
    """The conversations or pairs of each split; one whose fraction is 0 is left out.

    Args:
        items: all of them; where they name their splits, these are taken.
        how: "stratified", or "book", which has fractions of its own and no lot.
        val_fraction: of the rows, held out; at least one row.
        test_fraction: of the rows, held out; at least one row.
        seed: of the lot that picks and orders the rows.

    Raises:
        ConfigError: the way is unknown, or the fractions leave nothing to train on.
        DataError: there are too few rows, or only some of them name a split.
    """
    if how not in HOW:
        raise ConfigError(
            f"data.split={how!r} is unknown.{suggestion(how, HOW)} Choose stratified "
            "or book."
        )
    if parts := own_splits(items):
        if "train" not in parts:
            raise DataError(
                f"no row's 'split' is train, only {' and '.join(parts)}. Add rows to "
                "train on, or remove the column."
            )
        return parts
    if how == "book":
        return book_splits(items)
    if val_fraction + test_fraction >= 1:
        raise ConfigError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} "
            "leave nothing to train on. Choose fractions whose sum is below 1."
        )
    fractions = (1.0 - val_fraction - test_fraction, val_fraction, test_fraction)
    shares = {n: share for n, share in zip(SPLITS, fractions, strict=True) if share}
    if len(items) < len(shares):
        raise DataError(
            f"rows: {len(items)}, but each of {len(shares)} splits needs one. Add "
            "some, or set data.test_fraction or data.val_fraction to 0."
        )
    order = np.random.default_rng(seed).permutation(len(items))
    sizes = split_sizes(len(items), list(shares.values()), "")
    lots = np.split(order, np.cumsum(sizes)[:-1])
    return {n: [items[i] for i in lot] for n, lot in zip(shares, lots, strict=True)}


def book_splits(items: list[Item]) -> dict[str, list[Item]]:
    """In the order of the file, 85 : 10 : 5 (Raschka 2024, chapter 7)."""
    if len(items) < 10:
        raise DataError(
            f"data.split=book leaves no test rows of {len(items)}. Give 10 or more, or "
            "choose data.split=stratified."
        )
    train = int(len(items) * 0.85)
    test = train + int(len(items) * 0.1)
    parts = (items[:train], items[test:], items[train:test])
    return dict(zip(SPLITS, parts, strict=True))


def summary(items: list[Item]) -> str:
    """How many have an input and a system message, and the splits that all name."""
    prompts = [i.messages if isinstance(i, Conversation) else i.prompt for i in items]
    inputs = sum(any("input" in m for m in messages) for messages in prompts)
    system = sum(messages[0]["role"] == "system" for messages in prompts)
    sizes = [f"{name} {len(part):,}" for name, part in own_splits(items).items()]
    own = "; splits of their own: " * bool(sizes) + ", ".join(sizes)
    return f"with an input: {inputs:,}, with a system message: {system:,}{own}"
