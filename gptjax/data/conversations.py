"""Conversations and preference pairs from tables of `gptjax.data.readers`.

The columns of the first row determine the format, which all rows must share. A message
maps "role" (system, user or assistant) and "content" to strings; a user message may
also have an "input" (Alpaca's second field). After an optional system message, user and
assistant alternate; the last message is the assistant's. Texts are not stripped; null
and blank inputs or system messages count as absent.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gptjax.config import did_you_mean
from gptjax.data.datasets import WORD_TASKS, word_tasks
from gptjax.data.readers import (
    TABLE_FORMATS,
    check_object,
    find_table,
    get_text,
    read_rows,
    require_text,
    table_suffix,
)
from gptjax.data.splits import split_indices, split_shares
from gptjax.data.text import ALL_SPLITS, TRAIN_SPLIT, VALIDATION_SPLIT
from gptjax.errors import DataError
from gptjax.plugins import load_plugin
from gptjax.tokenizer.template_worker import ChatMessage

CONVERSATION_DATASETS = ("instructions", "preferences", WORD_TASKS)
RowFormats = dict[tuple[str, ...], str]  # required columns: name of the format
CONVERSATION_FORMATS: RowFormats = {  # the first match wins
    ("messages",): "chat",
    ("conversations",): "ShareGPT",
    ("instruction", "output"): "Alpaca",
    **{("prompt", answer): "prompts" for answer in ("completion", "response", "output")},
    **{("question", answer): "questions" for answer in ("answer", "output")},
}
PROMPT_COLUMNS = ("instruction", "prompt", "question")
PREFERENCE_COLUMNS = ("chosen", "rejected")
PREFERENCE_FORMATS: RowFormats = {
    (prompt, *PREFERENCE_COLUMNS): "preferences" for prompt in PROMPT_COLUMNS
}
# Lists of messages that include the prompt.
PREFERENCE_FORMATS |= {PREFERENCE_COLUMNS: "preferences"}
ROLE_ALIASES = {"system": "system", "user": "user", "human": "user"}
ROLE_ALIASES |= dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant")
SPLIT_ALIASES = {name: name for name in ALL_SPLITS}
SPLIT_ALIASES |= dict.fromkeys(("val", "valid"), VALIDATION_SPLIT)
OPTIONAL_COLUMNS = dict.fromkeys(("system", "input", "split", "task"), "")
EXPECTED_TEXT = {"user": "a prompt", "assistant": "a response"}
ROW_ADVICE = "All rows need the same columns."
MESSAGE_ADVICE = 'Write each message as {"role": "user", "content": "..."}.'


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages that end with an assistant response."""

    messages: tuple[ChatMessage, ...]
    source_row: Mapping[str, Any]  # unmodified
    location: str  # such as "file:line"
    split: str = ""  # one of ALL_SPLITS; "" = not specified in the file
    task: str = ""


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """Prompt with a chosen and a rejected response."""

    prompt: tuple[ChatMessage, ...]  # ends with a user message
    chosen: str
    rejected: str
    source_row: Mapping[str, Any]  # unmodified
    location: str  # such as "file:line"
    split: str = ""  # one of ALL_SPLITS; "" = not specified in the file


ConversationOrPair = TypeVar("ConversationOrPair", Conversation, PreferencePair)


def read_conversations(path: Path | str) -> tuple[list[Conversation], str]:
    """Reads conversations; returns them with a one-line description.

    In preference files, the response is "output" if there is one, else "chosen".
    """
    description, columns, rows = read_conversation_rows(
        str(path), CONVERSATION_FORMATS | PREFERENCE_FORMATS
    )
    answer_column = "chosen" if "chosen" in columns else columns[-1]
    conversations, turns = [], 0
    for location, source_row, row in rows:
        messages = to_messages(row, columns, answer_column, location)
        split, task = get_split(row, location), get_text(row, "task", location)
        conversations.append(Conversation(messages, source_row, location, split, task))
        turns += sum(message["role"] == "assistant" for message in messages)
    return conversations, (
        f"{description}; conversations: {len(conversations):,}, turns: {turns:,}, "
        f"{summarize_conversations(conversations)}."
    )


def read_preference_pairs(path: Path | str) -> tuple[list[PreferencePair], str]:
    """Reads preference pairs; returns them with a one-line description.

    "chosen" and "rejected" may be lists of messages that include the prompt.
    """
    description, columns, rows = read_conversation_rows(str(path), PREFERENCE_FORMATS)
    pairs = []
    for location, source_row, row in rows:
        chosen, rejected = (to_messages(row, columns, c, location) for c in PREFERENCE_COLUMNS)
        if chosen[:-1] != rejected[:-1]:
            raise DataError(
                f"{location}: 'chosen' and 'rejected' differ before their last "
                "message. Make all messages before it equal, or remove the row."
            )
        prompt, split = chosen[:-1], get_split(row, location)
        answers = (chosen[-1]["content"], rejected[-1]["content"])
        pairs.append(PreferencePair(prompt, *answers, source_row, location, split))
    num_equal = sum(pair.chosen == pair.rejected for pair in pairs)
    return pairs, (
        f"{description}; pairs: {len(pairs):,}, with identical responses: "
        f"{num_equal:,}, {summarize_conversations(pairs)}."
    )


def read_conversation_rows(
    path: str, formats: RowFormats
) -> tuple[str, tuple[str, ...], list[tuple[str, Any, dict[str, Any]]]]:
    """Returns (description, required columns, [(location, row, its columns), ...])."""
    if path == WORD_TASKS:
        source, file_format = path, "built in"
        rows = [(f"{path}:{n}", row) for n, row in enumerate(word_tasks(), 1)]
    else:
        source = find_table(path, CONVERSATION_DATASETS, "conversations")
        file_format = TABLE_FORMATS[table_suffix(source)]
        rows = list(read_rows(source))
    if not rows:
        raise DataError(f"{source} has no rows. Pass a file with a conversation per row.")
    location, row = rows[0]
    present_columns = [name for name in check_columns(row, (), location, ROW_ADVICE) if name in row]
    for columns, name in formats.items():
        if set(columns) <= set(present_columns):
            checked = [(at, x, check_columns(x, columns, at, ROW_ADVICE)) for at, x in rows]
            return f"{source}: {file_format}; {name} ({', '.join(columns)})", columns, checked
    expected = "a preference pair" if formats == PREFERENCE_FORMATS else "a conversation"
    raise DataError(
        f"{location}: the columns {', '.join(present_columns) or '(none)'} do not form "
        f"{expected}. Rename them to one of: {'; '.join(map(', '.join, formats))}."
    )


def check_columns(row: Any, columns: Sequence[str], location: str, advice: str) -> dict[str, Any]:
    """Checks for required columns; returns the row with "" for optional nulls."""
    row = check_object(row, location, advice)
    row = {name: value for name, value in row.items() if value is not None}
    for name in columns:
        if name not in row:
            raise DataError(
                f"{location}: {name!r} is missing or null; present: "
                f"{', '.join(row) or 'nothing'}. {advice}"
            )
    return OPTIONAL_COLUMNS | row


def to_messages(
    row: dict[str, Any], columns: tuple[str, ...], answer_column: str, location: str
) -> tuple[ChatMessage, ...]:
    """Returns the conversation of a row with the response in column `answer_column`."""
    prompt_column = columns[0] if columns[0] in PROMPT_COLUMNS else ""
    messages = read_messages(row, answer_column, location, "assistant" if prompt_column else "")
    if prompt_column and len(messages) == 1:
        messages = [*read_messages(row, prompt_column, location, "user"), *messages]
    elif prompt_column and answer_column not in PREFERENCE_COLUMNS:
        raise DataError(
            f"{location}: {answer_column!r} has {len(messages)} messages, but a response "
            f"is a single message. Move the messages before it to {prompt_column!r}."
        )
    check_turn_order(messages, location)
    if messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    system = get_text(row, "system", location)
    if system.strip():
        if messages[0]["role"] == "system":
            raise DataError(
                f"{location}: two system messages, in column 'system' and as the first "
                "message. Remove one."
            )
        messages = [{"role": "system", "content": system}, *messages]
    return tuple(messages)


def optional_input(row: dict[str, Any], location: str) -> dict[str, str]:
    """Returns {"input": text}, or {} if the input is blank."""
    text = get_text(row, "input", location)
    return {"input": text} if text.strip() else {}


def read_messages(
    row: dict[str, Any], column: str, location: str, role: str = ""
) -> list[ChatMessage]:
    """Returns the messages of a column: a list, or with a `role`, also a single text.

    Their order is not checked.
    """
    value = row[column]
    if column == "instruction" or (role and not isinstance(value, list)):
        content = require_text(row, column, location, EXPECTED_TEXT[role])
        input_field = optional_input(row, location) if column == "instruction" else {}
        return [{"role": role, "content": content, **input_field}]
    if not isinstance(value, list) or not value:
        prompt_advice = "Plain text requires a column 'prompt'. " * (column in PREFERENCE_COLUMNS)
        raise DataError(
            f"{location}: {column!r} is {value!r:.40}, not a list of messages. "
            f"{prompt_advice}{MESSAGE_ADVICE}"
        )
    return [read_message(m, f"{location}, message {n}") for n, m in enumerate(value, 1)]


def read_message(fields: Any, location: str) -> ChatMessage:
    """Parses a message in chat (role, content) or ShareGPT format (from, value)."""
    is_sharegpt = isinstance(fields, dict) and "from" in fields
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    fields = check_columns(fields, (role_key, content_key), location, MESSAGE_ADVICE)
    role = ROLE_ALIASES.get(str(fields[role_key]))
    if role is None:
        raise DataError(
            f"{location}: unknown role {fields[role_key]!r:.40}. Use one of "
            f"{', '.join(ROLE_ALIASES)}, or remove the row."
        )
    if isinstance(fields[content_key], list):
        advice = 'Write each part as {"type": "text", "text": "..."}, or remove the row.'
        parts = [check_columns(part, ("text",), location, advice) for part in fields[content_key]]
        fields[content_key] = "".join(get_text(part, "text", location) for part in parts)
    if role == "system":
        return {"role": role, "content": get_text(fields, content_key, location)}
    content = require_text(fields, content_key, location, EXPECTED_TEXT[role])
    message = {"role": role, "content": content}
    return message | optional_input(fields, location) if role == "user" else message


def check_turn_order(messages: Sequence[ChatMessage], location: str) -> None:
    """Checks that roles alternate and the last message is the assistant's."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise DataError(
            f"{location}: the roles are {', '.join(roles):.80}. After an optional system "
            "message, user and assistant must alternate, and the last message must be "
            "the assistant's. Merge, add or remove messages."
        )


def get_split(row: dict[str, Any], location: str) -> str:
    """Returns the split of a row, or "" if it has none."""
    name = get_text(row, "split", location)
    if name and name not in SPLIT_ALIASES:
        raise DataError(
            f"{location}: unknown split {name!r}.{did_you_mean(name, SPLIT_ALIASES)} "
            f"Use one of {', '.join(SPLIT_ALIASES)}, or rename the column 'split'."
        )
    return SPLIT_ALIASES[name] if name else ""


def splits_from_column(items: list[ConversationOrPair]) -> dict[str, list[ConversationOrPair]]:
    """Groups rows by their "split" column; {} if no row has one."""
    without_split = [item.location for item in items if not item.split]
    if without_split and len(without_split) < len(items):
        raise DataError(
            f"{without_split[0]}: no 'split', but other rows have one. Set it in all "
            "rows or in none."
        )
    parts = {name: [item for item in items if item.split == name] for name in ALL_SPLITS}
    return {name: part for name, part in parts.items() if part}


def split_conversations(
    items: list[ConversationOrPair],
    strategy: str,
    *,
    val_fraction: int | float,
    test_fraction: int | float,
    seed: int,
) -> dict[str, list[ConversationOrPair]]:
    """Splits conversations or pairs; omits splits with a fraction of 0.

    Splits of the rows themselves have priority. A `strategy` other than "stratified" is
    that of a plugin, which uses no other argument.
    """
    if parts := splits_from_column(items):
        if TRAIN_SPLIT not in parts:
            raise DataError(
                f"no row has split 'train', only {' and '.join(parts)}. Add training "
                "rows, or remove the column 'split'."
            )
        return parts
    if strategy != "stratified":
        return load_plugin("data.split_strategy", strategy)(items)
    order = np.random.default_rng(seed).permutation(len(items))
    parts = split_indices(order, split_shares(val_fraction, test_fraction), "the data")
    return {name: [items[i] for i in indices] for name, indices in parts.items()}


def summarize_conversations(items: list[ConversationOrPair]) -> str:
    """Returns counts of inputs, system messages and rows per split as one line."""
    prompts = [i.messages if isinstance(i, Conversation) else i.prompt for i in items]
    num_inputs = sum(any("input" in m for m in messages) for messages in prompts)
    num_system = sum(messages[0]["role"] == "system" for messages in prompts)
    sizes = [f"{name} {len(part):,}" for name, part in splits_from_column(items).items()]
    split_note = "; splits in the file: " * bool(sizes) + ", ".join(sizes)
    return f"with an input: {num_inputs:,}, with a system message: {num_system:,}{split_note}"
