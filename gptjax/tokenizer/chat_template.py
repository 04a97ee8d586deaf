"""Chat templates: render conversations and locate the assistant's replies.

A template is a Jinja file in Hugging Face's format. Its variables are `messages`,
`add_generation_prompt`, `bos_token` and `eos_token` (names of the tokenizer's tokens,
for GPT-2 both <|endoftext|>), `enable_thinking` (false) and `raise_exception`. There is
no `strftime_now`: prompts do not depend on the day. Training, generation, chat and
export all use the chat_template.jinja of the model folder.

Message texts are wrapped in marks while the template runs, to separate them from the
template's own text. Only the latter can contain the end token; in a message, text that
looks like a marker of the template ("### Response:") gets a zero-width space inserted.
"""

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptjax.config import did_you_mean
from gptjax.errors import ConfigError
from gptjax.fileio.paths import user_path
from gptjax.fileio.strict_json import read_small_file
from gptjax.tokenizer.template_worker import (
    CLOSE_MARK,
    EOT_MARK,
    EOT_TEXT,
    MARK_REPLACEMENTS,
    MAX_MEMORY_BYTES,
    REPLY_MARK,
    TEXT_MARK,
    ChatMessage,
    render,
)

CHAT_TEMPLATE_FILE = "chat_template.jinja"  # in a model folder
TEMPLATE_DIR = Path(__file__).parent / "templates"
BUILTIN_TEMPLATES = ("alpaca", "phi3", "chatml", "qa", "single")
MAX_TEMPLATE_CHARS = 100_000  # of its source, and of what it prints for a short conversation
MAX_MARKERS = 1000  # control tokens and lines of a template
RENDER_TIMEOUT_SECONDS = 20  # of the worker, for one conversation
MAX_RENDERED_BYTES = 1 << 26  # of a reply of the worker
WORKER_ENV_VARS = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT", "LANG")
WORKER_LOCK = threading.Lock()  # one request at a time
# Marks do not nest; a search from each of many that are not closed would take long.
MARKED_REPLY = f"{REPLY_MARK}[^{TEXT_MARK}-{CLOSE_MARK}]*{CLOSE_MARK}"
MARKED_TEXT_PATTERN = re.compile(
    f"[{TEXT_MARK}{REPLY_MARK}]([^{TEXT_MARK}-{CLOSE_MARK}]*){CLOSE_MARK}"
)
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
    control_tokens: frozenset[str] = frozenset()  # of the template, where the text has them


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Validated chat template, from `compile_template` or `load_chat_template`."""

    source: str = dataclasses.field(repr=False)
    suffix: str  # after each reply; EOT_MARK represents <|endoftext|>
    stop_strings: tuple[str, ...]  # end a reply besides <|endoftext|>
    special_markers: re.Pattern[str] = dataclasses.field(repr=False)  # escaped in messages
    control_tokens: frozenset[str]  # markers that may be special tokens, such as <|user|>
    bos_token: str = EOT_TEXT  # variables
    eos_token: str = EOT_TEXT

    def segments(
        self, messages: Sequence[ChatMessage], add_generation_prompt: bool = False
    ) -> list[TemplateSegment]:
        """Renders a conversation; optionally with the header of the next reply."""
        variables = add_generation_prompt, self.bos_token, self.eos_token
        text = render_template(self.source, messages, *variables)
        parts = re.split(f"({MARKED_REPLY}{re.escape(self.suffix)})", text)
        segments: list[TemplateSegment] = []
        for n, part in enumerate(parts):
            if n % 2:
                segments += self.split_segments(part, "answer")
                continue
            if reply := re.search(MARKED_REPLY, part):
                other_suffix = part[reply.end() :][: len(self.suffix)]
                raise ConfigError(
                    f"the chat template puts {quote_rendered(other_suffix)} after one "
                    f"reply and {quote_rendered(self.suffix)} after others. Use the same "
                    "suffix for all, so that a model learns when to stop."
                )
            has_header = n + 1 < len(parts) or add_generation_prompt
            split_at = part.rfind(CLOSE_MARK) + 1 if has_header else len(part)
            segments += self.split_segments(part[:split_at], "prompt")
            segments += self.split_segments(part[split_at:], "header")
        return segments

    def split_segments(self, text: str, kind: SegmentKind) -> Iterator[TemplateSegment]:
        """Splits marked text into segments of one kind and removes the marks."""
        for n, part in enumerate(text.split(EOT_MARK)):
            if n:
                yield TemplateSegment(EOT_TEXT, kind, is_eot=True)
            plain = MARKED_TEXT_PATTERN.sub(lambda match: self.escape(match[1]), part)
            if plain != plain.translate(MARK_REPLACEMENTS):
                raise ConfigError(
                    "the chat template splits or changes the text of a message, so "
                    "its role cannot be determined. Print `content` unchanged."
                )
            if plain:
                yield TemplateSegment(plain, kind, control_tokens=self.control_tokens)

    def escape(self, message: str) -> str:
        """Breaks control tokens, then other markers, in the text of a message."""
        for token in self.control_tokens:
            message = message.replace(token, f"{token[0]}{ZERO_WIDTH_SPACE}{token[1:]}")
        return self.special_markers.sub(break_marker, message)


def break_marker(match: re.Match[str]) -> str:
    """Inserts a zero-width space after the first visible character of a marker."""
    return re.sub(r"^(\s*\S)", rf"\1{ZERO_WIDTH_SPACE}", match[0])


def load_chat_template(
    name: str, bos_token: str = EOT_TEXT, eos_token: str = EOT_TEXT
) -> ChatTemplate:
    """Loads a built-in template by name, or a template file by path."""
    path = TEMPLATE_DIR / f"{name}.jinja" if name in BUILTIN_TEMPLATES else user_path(name)
    if not path.is_file():
        raise ConfigError(
            f"there is no chat template {name!r}."
            f"{did_you_mean(name, BUILTIN_TEMPLATES)} Use one of "
            f"{', '.join(BUILTIN_TEMPLATES)}, or the path of a Jinja file."
        )
    try:
        source = read_small_file(path, 4 * MAX_TEMPLATE_CHARS).decode("utf-8")
        return compile_template(source, bos_token, eos_token)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use the chat template {path}: {error}") from error


def render_template(
    source: str,
    messages: Sequence[ChatMessage],
    add_generation_prompt: bool = False,
    bos_token: str = EOT_TEXT,
    eos_token: str = EOT_TEXT,
) -> str:
    """Renders a conversation, in the worker unless the template is a built-in one."""
    check_messages(messages)
    if source in builtin_sources():
        return render(source, messages, add_generation_prompt, bos_token, eos_token)
    arguments = source, list(map(dict, messages)), add_generation_prompt, bos_token, eos_token
    request = json.dumps([RENDER_TIMEOUT_SECONDS, *arguments])
    with WORKER_LOCK:
        worker, reply = start_worker(), b""
        try:
            worker.stdin.write(request.encode() + b"\n")
            worker.stdin.flush()
            reply = worker.stdout.readline(MAX_RENDERED_BYTES)
        except BrokenPipeError:  # the worker ended
            pass
        finally:
            if not reply.endswith(b"\n"):
                worker.kill()
                worker.communicate()
                start_worker.cache_clear()
    if not reply.endswith(b"\n"):
        raise ConfigError(
            f"the chat template needs more than {RENDER_TIMEOUT_SECONDS} seconds or "
            f"{MAX_MEMORY_BYTES >> 20} MB for one conversation. Correct it, or use one of "
            f"{', '.join(BUILTIN_TEMPLATES)}."
        )
    text, error = json.loads(reply)
    if error:
        raise ConfigError(error)
    return text


def check_messages(messages: Any) -> None:
    """Raises ConfigError unless messages are dicts of texts with role and content."""
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
    for message in messages if is_list else [messages]:
        match message:
            case {"role": str(), "content": str(), **others} if is_list and all(
                isinstance(value, str) for value in others.values()
            ):
                continue
        raise ConfigError(
            f"{message!r:.60} is not a message of a list. Write "
            '[{"role": "user", "content": "Hi"}].'
        )


@functools.cache
def builtin_sources() -> frozenset[str]:
    """Sources of the built-in templates."""
    files = [TEMPLATE_DIR / f"{name}.jinja" for name in BUILTIN_TEMPLATES]
    return frozenset(file.read_bytes().decode() for file in files)


@functools.cache
def start_worker() -> Any:
    """Starts the worker process, which ends when its stdin is closed."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    env = {name: os.environ[name] for name in WORKER_ENV_VARS if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "gptjax.tokenizer.template_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=env | {"PYTHONPATH": paths},
    )
    atexit.register(process.kill)
    return process


if hasattr(os, "register_at_fork"):  # a fork must not share the pipes of the worker
    os.register_at_fork(after_in_child=start_worker.cache_clear)


@functools.lru_cache(maxsize=16)
def compile_template(
    source: str, bos_token: str = EOT_TEXT, eos_token: str = EOT_TEXT
) -> ChatTemplate:
    """Validates a template by rendering small conversations."""
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ConfigError(
            f"the chat template is longer than {MAX_TEMPLATE_CHARS:,} characters. "
            "Check that it is the right file."
        )
    if "\0" in source:
        raise ConfigError("the chat template contains a NUL character. Remove it.")
    variables = {"bos_token": bos_token, "eos_token": eos_token}
    render_small = functools.partial(render_short, source, **variables)
    user, reply = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    text = render_small([user, reply])
    replies = [*re.finditer(MARKED_REPLY, text)]
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
    generation_prompt = render_small([user], add_generation_prompt=True)
    if generation_prompt != text[:reply_start]:
        raise ConfigError(
            "the chat template's generation prompt is "
            f"{quote_rendered(generation_prompt)}, but it puts "
            f"{quote_rendered(text[:reply_start])} before a reply. Make them equal."
        )
    system, with_input = {**user, "role": "system"}, {**user, "input": "i"}
    texts = [text]
    for messages in ([user, reply, user], [system, user, reply], [with_input, reply]):
        with contextlib.suppress(ConfigError):  # not every template supports these
            texts.append(render_small(messages))
    stop_strings = [suffix.split(EOT_MARK)[0].strip()]
    # The start of the next turn ends a reply too.
    next_turn = next((t[len(text) :] for t in texts[1:] if t.startswith(text)), "")
    lines = next_turn.split(TEXT_MARK)[0].split("\n")
    stop_strings += [f"\n{line.rstrip()}" for line in lines if line][:1]
    stop = tuple(filter(None, stop_strings))
    return ChatTemplate(source, suffix, stop, *find_markers(texts), bos_token, eos_token)


def render_short(source: str, messages: Sequence[ChatMessage], **options: Any) -> str:
    """Renders a short conversation, to a text that is not long."""
    text = render_template(source, messages, **options)
    if len(text) > MAX_TEMPLATE_CHARS:
        raise ConfigError(
            f"the chat template prints {len(text):,} characters for a conversation of a few, "
            f"more than {MAX_TEMPLATE_CHARS:,}. Shorten it."
        )
    return text


def find_markers(texts: Sequence[str]) -> tuple[re.Pattern[str], frozenset[str]]:
    """Pattern of the template's control tokens and own lines, and the former."""
    lines = [line for text in texts for line in MARKED_TEXT_PATTERN.sub(EOT_MARK, text).split("\n")]
    literals = {part.strip() for line in lines for part in line.split(EOT_MARK)} - {""}
    control_tokens = {x for literal in literals for x in CONTROL_TOKEN_PATTERN.findall(literal)}
    lines = [literal for literal in literals if len(literal) > 1]
    if len(control_tokens) + len(lines) > MAX_MARKERS:
        raise ConfigError(
            f"the chat template prints {len(lines):,} lines and {len(control_tokens):,} control "
            f"tokens of its own, more than {MAX_MARKERS:,}. Shorten it."
        )
    anywhere, at_line_start = ("|".join(map(re.escape, sorted(x))) for x in (control_tokens, lines))
    # At the start of a line; "*+" takes all blanks, so that none is tried twice.
    at_line_start = rf"(?<![^{LINE_BREAKS}])[^\S{LINE_BREAKS}]*+(?:{at_line_start or '(?!)'})"
    pattern = re.compile(f"{anywhere}|{at_line_start}" if anywhere else at_line_start)
    return pattern, frozenset(control_tokens)


def quote_rendered(text: str) -> str:
    """Quotes rendered text for an error message."""
    marks = dict.fromkeys(map(ord, TEXT_MARK + REPLY_MARK + CLOSE_MARK))
    return repr(text.translate(marks).replace(EOT_MARK, EOT_TEXT))
