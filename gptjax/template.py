"""Chat templates: how a conversation becomes text, and which of it is an answer.

A template is a Jinja file as Hugging Face's tokenizers have them. It is given
`messages`, `add_generation_prompt`, `bos_token`, `eos_token` (both <|endoftext|>) and
`raise_exception`, and runs as `gptjax.rendering` says. The file in a model's folder,
chat_template.jinja, is what training, generation, chat and export all use.

The texts of the messages are marked while the template runs, so that it is known which
characters it wrote itself. Only those can be the end token, and texts that look like
its own marks ("### Response:") get a zero-width space inside them.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from gptjax.config import suggestion
from gptjax.errors import ConfigError
from gptjax.rendering import (
    ANSWER,
    BUILT_IN,
    CLOSE,
    END,
    ENDOFTEXT,
    FOLDER,
    MARKS,
    TEXT,
    Message,
    render,
)

FILE = "chat_template.jinja"  # in a model folder
MOST_CHARACTERS = 100_000  # of a template
ANSWERS = re.compile(f"{ANSWER}[^{CLOSE}]*{CLOSE}")
TEXTS = re.compile(f"[{TEXT}{ANSWER}]([^{CLOSE}]*){CLOSE}")
CONTROL = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z]{2,20}\]")  # <|user|>, </s>, [INST]
BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
ZERO_WIDTH_SPACE = "\u200b"

Kind = Literal["prompt", "header", "answer"]


class Piece(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    kind: Kind  # header: between a user's text and the answer to it
    end: bool = False  # it is the control token <|endoftext|>, not these characters


@dataclasses.dataclass(frozen=True)
class Template:
    """A template that was tried out; made by `compiled` and `read_template`."""

    source: str = dataclasses.field(repr=False)
    closing: str  # what follows an answer; END stands for the end token
    stops: tuple[str, ...]  # texts that end an answer where the end token does not
    marks: re.Pattern[str] = dataclasses.field(repr=False)  # not allowed in messages

    def pieces(
        self, messages: Sequence[Message], answering: bool = False
    ) -> list[Piece]:
        """The conversation as text, in order.

        Args:
            messages: of the roles "system", "user" and "assistant".
            answering: whether the text goes on to where the next answer starts.

        Raises:
            ConfigError: the template cannot render these messages, or takes their
                texts apart.
        """
        text = render(self.source, messages, answering)
        found = []
        at = 0
        for answer in ANSWERS.finditer(text):
            stop = answer.end() + len(self.closing)
            if text[answer.end() : stop] != self.closing:
                raise ConfigError(
                    f"the chat template puts {shown(text[answer.end() : stop])} after "
                    f"an answer, and elsewhere {shown(self.closing)}. Write the same "
                    "after each, so that a model learns how to stop."
                )
            found += [*before(text[at : answer.start()]), (text[answer.start() : stop])]
            at = stop
        rest = text[at:]
        found += before(rest) if answering else [rest]
        kinds: list[Kind] = ["prompt", "header", "answer"] * len(found)
        return [
            piece
            for part, kind in zip(found, kinds, strict=False)
            for piece in self.split(part, kind)
        ]

    def split(self, text: str, kind: Kind) -> Iterator[Piece]:
        """The marked text as pieces of one kind, without marks."""
        for number, part in enumerate(text.split(END)):
            if number:
                yield Piece(ENDOFTEXT, kind, end=True)
            plain = TEXTS.sub(lambda match: self.harmless(match[1]), part)
            if plain != plain.translate(MARKS):
                raise ConfigError(
                    "the chat template takes the text of a message apart, so it is "
                    "unknown which of it is whose. Let it print `content` whole."
                )
            if plain:
                yield Piece(plain, kind)

    def harmless(self, text: str) -> str:
        """A message's text, with nothing that looks like a mark of the template."""
        return self.marks.sub(broken, text)


def broken(match: re.Match[str]) -> str:
    """A mark with a character of no width behind its first one."""
    first = len(match[0]) - len(match[0].lstrip()) + 1
    return match[0][:first] + ZERO_WIDTH_SPACE + match[0][first:]


def before(text: str) -> list[str]:
    """What stands before an answer: up to the user's last text, and the header."""
    cut = text.rfind(CLOSE) + 1
    return [text[:cut], text[cut:]]


def read_template(name: str) -> Template:
    """A template by its name among those of gptjax, or by the path of its file.

    Raises:
        ConfigError: there is none, or it is not one to train with.
    """
    path = FOLDER / f"{name}.jinja" if name in BUILT_IN else Path(name)
    if name not in BUILT_IN and not path.is_file():
        raise ConfigError(
            f"there is no chat template {name!r}.{suggestion(name, BUILT_IN)} Name one "
            f"of {', '.join(BUILT_IN)}, or a Jinja file."
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            source = file.read(MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {path}: {error}.") from error
    return compiled(source)


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> Template:
    """The template with this text, tried out on small conversations.

    Raises:
        ConfigError: it is too long, no Jinja, or does not close answers; or it asks
            for an answer with other words than it puts before one.
    """
    if len(source) > MOST_CHARACTERS:
        raise ConfigError(
            f"the chat template has more than {MOST_CHARACTERS:,} characters. Is it "
            "the right file?"
        )
    user = {"role": "user", "content": "u"}
    answer = {"role": "assistant", "content": "a"}
    text = render(source, [user, answer])
    answers = [*ANSWERS.finditer(text)]
    if len(answers) != 1:
        raise ConfigError(
            f"the chat template prints an answer {len(answers)} times instead of once. "
            "Let it print `content` of each message."
        )
    start, closing = answers[0].start(), text[answers[0].end() :]
    if not closing.strip():
        raise ConfigError(
            "the chat template puts nothing after an answer, so no model could learn "
            "to stop. Write {{ eos_token }} after it."
        )
    if (asked := render(source, [user], answering=True)) != text[:start]:
        raise ConfigError(
            f"the chat template asks for an answer with {shown(asked)}, but puts "
            f"{shown(text[:start])} before one. Write the same for both."
        )
    more = [
        [user, answer, user],
        [{**user, "role": "system"}, user, answer],
        [{**user, "input": "i"}, answer],
    ]
    texts = [text]
    for messages in more:
        with contextlib.suppress(ConfigError):  # not every template takes these
            texts.append(render(source, messages))
    own = closing.split(END)[0].strip()
    stops = [own] if own else []
    # Where the next turn starts, the answer has ended too.
    again = next((t[len(text) :] for t in texts[1:] if t.startswith(text)), "")
    stops += [
        f"\n{line.rstrip()}" for line in again.split(TEXT)[0].split("\n") if line
    ][:1]
    return Template(source, closing, tuple(stops), marks_of(texts))


def marks_of(texts: Sequence[str]) -> re.Pattern[str]:
    """What messages must not hold: control words, and the template's own lines."""
    own = [line for text in texts for line in TEXTS.sub(END, text).split("\n")]
    literals = {part.strip() for line in own for part in line.split(END)} - {""}
    words = {word for literal in literals for word in CONTROL.findall(literal)}
    anywhere = [re.escape(word) for word in sorted(words)]
    starting = [
        rf"(?<![^{BREAKS}])[^\S{BREAKS}]*{re.escape(literal)}"
        for literal in sorted(literals)
        if len(literal) > 1
    ]
    return re.compile("|".join([*anywhere, *starting]) or "(?!)")


def shown(text: str) -> str:
    """A rendered text for a message about it."""
    marks = dict.fromkeys(map(ord, TEXT + ANSWER + CLOSE))
    return repr(text.translate(marks).replace(END, ENDOFTEXT))
