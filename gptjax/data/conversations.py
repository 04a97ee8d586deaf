"""Conversations and preference pairs from tables of `gptjax.data.readers`.

The columns of the first row determine the format, which all rows must share. A message
maps "role" (system, user or assistant) and "content" to strings; a user message may
also have an "input" (Alpaca's second field). After an optional system message, user and
assistant alternate; the last message is the assistant's. Texts are not stripped; null
and blank inputs or system messages count as absent. Keys that are not read are counted
in the description; those that other programs train on are an error.
"""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gptjax.config import did_you_mean
from gptjax.data.datasets import WORD_TASKS, word_tasks
from gptjax.data.packed_rows import encode_text, pack_columns, take_rows
from gptjax.data.readers import (
    EXCLUDING_VALUES,
    FALSE_VALUE,
    check_object,
    describe_unread,
    find_table,
    get_text,
    read_rows,
    require_text,
    table_format,
    unread_columns,
)
from gptjax.data.splits import split_indices, split_shares
from gptjax.data.text import ALL_SPLITS, TRAIN_SPLIT, VALIDATION_SPLIT
from gptjax.errors import DataError
from gptjax.plugins import load_plugin
from gptjax.runtime.timing import log_progress
from gptjax.tokenizer.template_worker import ChatMessage

CONVERSATION_DATASETS = ("instructions", "preferences", WORD_TASKS)
RowFormats = dict[tuple[str, ...], str]  # required columns: name of the format
CONVERSATION_FORMATS: RowFormats = {  # the first match wins
    ("messages",): "chat",
    ("conversations",): "ShareGPT",
    **{("instruction", answer): "Alpaca" for answer in ("output", "response")},
    **{("prompt", answer): "prompts" for answer in ("completion", "response", "output")},
    **{("question", answer): "questions" for answer in ("answer", "output", "response")},
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
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
INPUT_COLUMNS = ("input", "context")  # second field of a prompt
OPTIONAL_COLUMNS = dict.fromkeys((*SYSTEM_COLUMNS, *INPUT_COLUMNS, "split", "task"), "")
CHAT_KEYS, SHAREGPT_KEYS = ("role", "content"), ("from", "value")  # of messages
PART_KEYS = ("type", "text")  # of a part of a message
TEXT_TYPES = ("text", "input_text", "output_text")
# Patterns as in `EXCLUDING_VALUES`, with those of keys that other programs train on, or
# that are read only in some formats. KTO's label of a bad response is false.
UNSUPPORTED_KEYS = ("tools", "functions", "tool_calls", "function_call", "documents", "history")
UNSUPPORTED_KEYS += ("image", "images", "video", "videos", "audio", "audios", "thinking")
UNSUPPORTED_KEYS += ("reasoning_content", "chat_template_kwargs", "passage", "choices", "suffix")
UNSUPPORTED_KEYS += (*SYSTEM_COLUMNS, *INPUT_COLUMNS)
UNSUPPORTED_VALUES = dict.fromkeys(UNSUPPORTED_KEYS, ".*") | {"label": FALSE_VALUE}
UNSUPPORTED_VALUES |= EXCLUDING_VALUES
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


def read_conversations(path: Path | str) -> tuple[Sequence[Conversation], str]:
    """Reads conversations; returns them with a one-line description.

    In preference files, the response is "output" if there is one, else "chosen".
    """
    description, columns, rows = read_conversation_rows(
        str(path), CONVERSATION_FORMATS | PREFERENCE_FORMATS
    )
    answer_column = "chosen" if "chosen" in columns else columns[-1]
    used, unread, turns = {*columns, "task"} - {"rejected"}, Counter[str](), 0

    def parse_rows() -> Iterator[Conversation]:
        nonlocal turns
        for location, source_row, row in rows:
            messages = to_messages(row, columns, answer_column, location)
            unread.update(unread_keys(row, read_keys(row, used, messages), location))
            split, task = get_split(row, location), get_text(row, "task", location)
            turns += sum(message["role"] == "assistant" for message in messages)
            yield Conversation(messages, source_row, location, split, task)

    conversations = pack_items(parse_rows(), Conversation)
    return conversations, (
        f"{description}{describe_unread(unread)}; conversations: {len(conversations):,}, "
        f"turns: {turns:,}, {summarize_conversations(conversations)}."
    )


def read_preference_pairs(path: Path | str) -> tuple[Sequence[PreferencePair], str]:
    """Reads preference pairs; returns them with a one-line description.

    "chosen" and "rejected" may be lists of messages that include the prompt.
    """
    description, columns, rows = read_conversation_rows(str(path), PREFERENCE_FORMATS)
    unread = Counter[str]()

    def parse_rows() -> Iterator[PreferencePair]:
        for location, source_row, row in rows:
            chosen, rejected = (to_messages(row, columns, c, location) for c in PREFERENCE_COLUMNS)
            if chosen[:-1] != rejected[:-1]:
                raise DataError(
                    f"{location}: 'chosen' and 'rejected' differ before their last "
                    "message. Make all messages before it equal, or remove the row."
                )
            unread.update(unread_keys(row, read_keys(row, {*columns}, chosen), location))
            answers = (chosen[-1]["content"], rejected[-1]["content"])
            split = get_split(row, location)
            yield PreferencePair(chosen[:-1], *answers, source_row, location, split)

    pairs = pack_items(parse_rows(), PreferencePair)
    num_equal = sum(pair.chosen == pair.rejected for pair in pairs)
    return pairs, (
        f"{description}{describe_unread(unread)}; pairs: {len(pairs):,}, with identical "
        f"responses: {num_equal:,}, {summarize_conversations(pairs)}."
    )


def pack_items(
    items: Iterable[ConversationOrPair], kind: type[ConversationOrPair]
) -> Sequence[ConversationOrPair]:
    """Packs conversations or pairs as JSON."""

    def decode(encoded: bytearray) -> ConversationOrPair:
        messages, *fields = json.loads(encoded)
        return kind(tuple(messages), *fields)

    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    return pack_columns(((encode_text(encode([*vars(x).values()])),) for x in items), decode)[0]


def read_conversation_rows(
    path: str, formats: RowFormats
) -> tuple[str, tuple[str, ...], Iterator[tuple[str, Any, dict[str, Any]]]]:
    """Returns (description, required columns, rows of (location, row, its columns))."""
    if path == WORD_TASKS:
        source, file_format = path, "built in"
        rows = ((f"{path}:{n}", row) for n, row in enumerate(word_tasks(), 1))
    else:
        source = find_table(path, CONVERSATION_DATASETS, "conversations")
        file_format = table_format(source)
        rows = log_progress(read_rows(source), None, "reading", "rows")
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source} has no rows. Pass a file with a conversation per row.")
    location, row = first
    present_columns = [name for name in check_columns(row, (), location, ROW_ADVICE) if name in row]
    for columns, name in formats.items():
        if set(columns) <= set(present_columns):
            rows = itertools.chain([first], rows)
            checked = ((at, x, check_columns(x, columns, at, ROW_ADVICE)) for at, x in rows)
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


def read_keys(row: dict[str, Any], columns: set[str], messages: Sequence[ChatMessage]) -> set[str]:
    """Returns the keys of which `messages` have the text, in a row with these columns.

    Where "chosen" includes the prompt, a prompt beside it is read only if it is equal.
    """
    prompts, chosen = {name: row[name] for name in columns & {*PROMPT_COLUMNS}}, row.get("chosen")
    read = {*columns, *SYSTEM_COLUMNS, "split"}
    if "chosen" in columns and isinstance(chosen, list) and len(chosen) > 1:
        included = [message["content"] for message in messages]
        included += [chosen[:count] for count in range(len(chosen))]
        return read - {name for name, prompt in prompts.items() if prompt not in included}
    has_text_prompt = any(isinstance(prompt, str) for prompt in prompts.values())
    return read | {*INPUT_COLUMNS * has_text_prompt}


def unread_keys(
    fields: dict[str, Any], read: Collection[str], location: str, path: str = ""
) -> Iterator[str]:
    """Yields the keys of a row and of its messages, as `unread_columns` does."""
    for name, value in fields.items():
        for item in value if name in read and isinstance(value, list) else ():
            if isinstance(item, dict):
                keys = PART_KEYS if path else (*message_keys(item), *INPUT_COLUMNS)
                yield from unread_keys(item, keys, location, f"{path}{name}[].")
    yield from unread_columns(fields, read, location, UNSUPPORTED_VALUES, path)


def message_keys(fields: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the keys of the role and the content of a message."""
    return SHAREGPT_KEYS if "from" in fields else CHAT_KEYS


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
    if system := get_optional_text(row, SYSTEM_COLUMNS, location):
        if messages[0]["role"] == "system":
            raise DataError(
                f"{location}: two system messages, in column 'system' and as the first "
                "message. Remove one."
            )
        messages = [{"role": "system", "content": system}, *messages]
    return tuple(messages)


def get_optional_text(row: dict[str, Any], columns: Sequence[str], location: str) -> str:
    """Returns the text of the one of these columns that is not blank, else ""."""
    texts = {name: get_text(row, name, location) for name in columns if name in row}
    filled = [name for name, text in texts.items() if text.strip()]
    if len(filled) > 1:
        raise DataError(f"{location}: both {filled[0]!r} and {filled[1]!r} have text. Merge them.")
    return texts[filled[0]] if filled else ""


def read_messages(
    row: dict[str, Any], column: str, location: str, role: str = ""
) -> list[ChatMessage]:
    """Returns the messages of a column: a list, or with a `role`, also a single text.

    Their order is not checked.
    """
    value = row[column]
    if column == "instruction" or (role and not isinstance(value, list)):
        content = require_text(row, column, location, EXPECTED_TEXT[role])
        second = get_optional_text(row, INPUT_COLUMNS, location) if role == "user" else ""
        return [{"role": role, "content": content, **({"input": second} if second else {})}]
    if not isinstance(value, list) or not value:
        prompt_advice = "Plain text requires a column 'prompt'. " * (column in PREFERENCE_COLUMNS)
        raise DataError(
            f"{location}: {column!r} is {value!r:.40}, not a list of messages. "
            f"{prompt_advice}{MESSAGE_ADVICE}"
        )
    return [read_message(m, f"{location}, message {n}") for n, m in enumerate(value, 1)]


def read_message(fields: Any, location: str) -> ChatMessage:
    """Parses a message in chat (role, content) or ShareGPT format (from, value)."""
    role_key, content_key = message_keys(check_object(fields, location, MESSAGE_ADVICE))
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
        for kind in (part.get("type", "text") for part in parts):
            if kind not in TEXT_TYPES:
                raise DataError(f"{location}: a part of type {kind!r:.40}, not a text. {advice}")
        fields[content_key] = "".join(get_text(part, "text", location) for part in parts)
    second = get_optional_text(fields, INPUT_COLUMNS, location)
    if second and role != "user":
        raise DataError(f"{location}: an input, but from {role}. Move it to a user message.")
    if role == "system":
        return {"role": role, "content": get_text(fields, content_key, location)}
    content = require_text(fields, content_key, location, EXPECTED_TEXT[role])
    return {"role": role, "content": content, **({"input": second} if second else {})}


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


def splits_from_column(
    items: Sequence[ConversationOrPair],
) -> dict[str, Sequence[ConversationOrPair]]:
    """Groups rows by their "split" column; {} if no row has one."""
    names = [item.split for item in items]
    if "" in names and any(names):
        raise DataError(
            f"{items[names.index('')].location}: no 'split', but other rows have one. Set it in "
            "all rows or in none."
        )
    indices = {name: [n for n, split in enumerate(names) if split == name] for name in ALL_SPLITS}
    return {name: take_rows(items, chosen) for name, chosen in indices.items() if chosen}


def split_conversations(
    items: Sequence[ConversationOrPair],
    strategy: str,
    *,
    val_fraction: int | float,
    test_fraction: int | float,
    seed: int,
) -> dict[str, Sequence[ConversationOrPair]]:
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
    return {name: take_rows(items, indices) for name, indices in parts.items()}


def summarize_conversations(items: Sequence[ConversationOrPair]) -> str:
    """Returns counts of inputs, system messages and rows per split as one line."""
    num_inputs = num_system = 0
    for item in items:
        prompt = item.messages if isinstance(item, Conversation) else item.prompt
        num_inputs += any("input" in message for message in prompt)
        num_system += prompt[0]["role"] == "system"
    sizes = [f"{name} {len(part):,}" for name, part in splits_from_column(items).items()]
    split_note = "; splits in the file: " * bool(sizes) + ", ".join(sizes)
    return f"with an input: {num_inputs:,}, with a system message: {num_system:,}{split_note}"
