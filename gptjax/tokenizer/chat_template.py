"""Chat templates: render conversations and locate the assistant's replies.

A template is a Jinja file in Hugging Face's format. Its variables are `messages`,
`add_generation_prompt`, `bos_token` and `eos_token` (both <|endoftext|>), and
`raise_exception`; `gptjax.tokenizer.template_worker` renders it in a sandbox. Training,
generation, chat and export all use the chat_template.jinja of the model folder.

Message texts are wrapped in marks while the template runs, to separate them from the
template's own text. Only the latter can contain the end token; in a message, text that
looks like a marker of the template ("### Response:") gets a zero-width space inserted.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from gptjax.config import did_you_mean
from gptjax.errors import ConfigError
from gptjax.tokenizer.template_worker import (
    BUILTIN_TEMPLATES,
    CLOSE_MARK,
    EOT_MARK,
    EOT_TEXT,
    MARK_REPLACEMENTS,
    REPLY_MARK,
    TEMPLATE_DIR,
    TEXT_MARK,
    ChatMessage,
    render_template,
)

CHAT_TEMPLATE_FILE = "chat_template.jinja"  # in a model folder
MAX_TEMPLATE_CHARS = 100_000  # in a template file
MARKED_REPLY_PATTERN = re.compile(f"{REPLY_MARK}[^{CLOSE_MARK}]*{CLOSE_MARK}")
MARKED_TEXT_PATTERN = re.compile(f"[{TEXT_MARK}{REPLY_MARK}]([^{CLOSE_MARK}]*){CLOSE_MARK}")
# <|user|>, </s>, [INST]
CONTROL_TOKEN_PATTERN = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z]{2,20}\]")
LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
ZERO_WIDTH_SPACE = "\u200b"

SegmentKind = Literal["prompt", "header", "answer"]


class TemplateSegment(NamedTuple):
    """Segment of a rendered conversation."""

    text: str
    kind: SegmentKind  # header: between the user's text and the reply
    is_eot: bool = False  # the control token <|endoftext|>, not its characters


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Validated chat template, from `compile_template` or `load_chat_template`."""

    source: str = dataclasses.field(repr=False)
    suffix: str  # after each reply; EOT_MARK represents <|endoftext|>
    stop_strings: tuple[str, ...]  # end a reply besides <|endoftext|>
    # Escaped in messages.
    special_markers: re.Pattern[str] = dataclasses.field(repr=False)

    def segments(
        self, messages: Sequence[ChatMessage], add_generation_prompt: bool = False
    ) -> list[TemplateSegment]:
        """Renders a conversation into segments, in order.

        Args:
            messages: with roles "system", "user" and "assistant".
            add_generation_prompt: also renders the header of the next reply.

        Raises:
            ConfigError: the template cannot render these messages, or splits their
                texts.
        """
        text = render_template(self.source, messages, add_generation_prompt)
        parts = []
        position = 0
        for reply in MARKED_REPLY_PATTERN.finditer(text):
            end = reply.end() + len(self.suffix)
            if text[reply.end() : end] != self.suffix:
                raise ConfigError(
                    f"the chat template puts {quote_rendered(text[reply.end() : end])} "
                    f"after one reply and {quote_rendered(self.suffix)} after others. "
                    "Use the same suffix for all, so that a model learns when to stop."
                )
            parts += [*split_header(text[position : reply.start()]), text[reply.start() : end]]
            position = end
        rest = text[position:]
        parts += split_header(rest) if add_generation_prompt else [rest]
        kinds: list[SegmentKind] = ["prompt", "header", "answer"] * len(parts)
        return [
            segment
            for part, kind in zip(parts, kinds, strict=False)
            for segment in self.split_segments(part, kind)
        ]

    def split_segments(self, text: str, kind: SegmentKind) -> Iterator[TemplateSegment]:
        """Splits marked text into segments of one kind and removes the marks."""
        for index, part in enumerate(text.split(EOT_MARK)):
            if index:
                yield TemplateSegment(EOT_TEXT, kind, is_eot=True)
            plain = MARKED_TEXT_PATTERN.sub(lambda match: self.escape_markers(match[1]), part)
            if plain != plain.translate(MARK_REPLACEMENTS):
                raise ConfigError(
                    "the chat template splits or changes the text of a message, so "
                    "its role cannot be determined. Print `content` unchanged."
                )
            if plain:
                yield TemplateSegment(plain, kind)

    def escape_markers(self, text: str) -> str:
        """Breaks up text in a message that looks like a marker of the template."""
        return self.special_markers.sub(break_marker, text)


def break_marker(match: re.Match[str]) -> str:
    """Inserts a zero-width space after the first character of a marker."""
    split_at = len(match[0]) - len(match[0].lstrip()) + 1
    return match[0][:split_at] + ZERO_WIDTH_SPACE + match[0][split_at:]


def split_header(text: str) -> list[str]:
    """Splits the text before a reply into prompt and header."""
    header_start = text.rfind(CLOSE_MARK) + 1
    return [text[:header_start], text[header_start:]]


def load_chat_template(name: str) -> ChatTemplate:
    """Loads a built-in template by name, or a template file by path.

    Raises:
        ConfigError: there is no such template, or it is invalid.
    """
    path = TEMPLATE_DIR / f"{name}.jinja" if name in BUILTIN_TEMPLATES else Path(name)
    if name not in BUILTIN_TEMPLATES and not path.is_file():
        raise ConfigError(
            f"there is no chat template {name!r}."
            f"{did_you_mean(name, BUILTIN_TEMPLATES)} Use one of "
            f"{', '.join(BUILTIN_TEMPLATES)}, or the path of a Jinja file."
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            source = file.read(MAX_TEMPLATE_CHARS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {path}: {error}.") from error
    return compile_template(source)


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> ChatTemplate:
    """Validates a template by rendering small conversations.

    Raises:
        ConfigError: it is too long, not valid Jinja, puts nothing after replies, or
            its generation prompt differs from the header of a reply.
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ConfigError(
            f"the chat template is longer than {MAX_TEMPLATE_CHARS:,} characters. "
            "Check that it is the right file."
        )
    user = {"role": "user", "content": "u"}
    reply = {"role": "assistant", "content": "a"}
    text = render_template(source, [user, reply])
    replies = [*MARKED_REPLY_PATTERN.finditer(text)]
    if len(replies) != 1:
        raise ConfigError(
            f"the chat template prints a reply {len(replies)} times instead of once. "
            "Print the `content` of each message once."
        )
    reply_start, suffix = replies[0].start(), text[replies[0].end() :]
    if not suffix.strip():
        raise ConfigError(
            "the chat template puts nothing after a reply, so a model cannot learn to "
            "stop. Put {{ eos_token }} after it."
        )
    generation_prompt = render_template(source, [user], add_generation_prompt=True)
    if generation_prompt != text[:reply_start]:
        raise ConfigError(
            "the chat template's generation prompt is "
            f"{quote_rendered(generation_prompt)}, but it puts "
            f"{quote_rendered(text[:reply_start])} before a reply. Make them equal."
        )
    variants = [
        [user, reply, user],
        [{**user, "role": "system"}, user, reply],
        [{**user, "input": "i"}, reply],
    ]
    texts = [text]
    for messages in variants:
        with contextlib.suppress(ConfigError):  # not every template supports these
            texts.append(render_template(source, messages))
    suffix_text = suffix.split(EOT_MARK)[0].strip()
    stop_strings = [suffix_text] if suffix_text else []
    # The start of the next turn ends a reply too.
    next_turn = next((t[len(text) :] for t in texts[1:] if t.startswith(text)), "")
    stop_strings += [
        f"\n{line.rstrip()}" for line in next_turn.split(TEXT_MARK)[0].split("\n") if line
    ][:1]
    return ChatTemplate(source, suffix, tuple(stop_strings), find_markers(texts))


def find_markers(texts: Sequence[str]) -> re.Pattern[str]:
    """Pattern of the template's markers: control tokens and its own lines."""
    lines = [line for text in texts for line in MARKED_TEXT_PATTERN.sub(EOT_MARK, text).split("\n")]
    literals = {part.strip() for line in lines for part in line.split(EOT_MARK)} - {""}
    control_tokens = {
        word for literal in literals for word in CONTROL_TOKEN_PATTERN.findall(literal)
    }
    anywhere = [re.escape(word) for word in sorted(control_tokens)]
    at_line_start = [
        rf"(?<![^{LINE_BREAKS}])[^\S{LINE_BREAKS}]*{re.escape(literal)}"
        for literal in sorted(literals)
        if len(literal) > 1
    ]
    return re.compile("|".join([*anywhere, *at_line_start]) or "(?!)")


def quote_rendered(text: str) -> str:
    """Quotes rendered text for an error message."""
    marks = dict.fromkeys(map(ord, TEXT_MARK + REPLY_MARK + CLOSE_MARK))
    return repr(text.translate(marks).replace(EOT_MARK, EOT_TEXT))
