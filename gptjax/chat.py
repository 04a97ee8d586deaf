"""The assistant in the terminal: messages in, answers out while they are written.

A line is a message, or a command where it starts with "/". `step_of` says what a line
leads to, as a value; only `chat` and what it hands on touch the terminal.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptjax.answering import prompt_ids, stream_answer
from gptjax.config import suggestion
from gptjax.errors import ConfigError, DataError, GptjaxError, ModelError
from gptjax.generation import Sampling, stream
from gptjax.template import Message
from gptjax.terminal import printable
from gptjax.weights.folder import Model

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Session:
    """A conversation as it is between two lines."""

    sampling: Mapping[str, Any]  # fields of `Sampling`
    messages: tuple[Message, ...] = ()  # the last may be a question without an answer
    forgotten: tuple[Message, ...] = ()  # what no longer fits the context
    answers: int = 0  # asked for so far; each draws with a seed of its own


class Step(NamedTuple):
    """What a line leads to."""

    session: Session
    says: str = ""
    then: Literal["read", "answer", "leave"] = "read"


class Command(NamedTuple):
    """A row of the table of commands."""

    argument: str
    help: str
    run: "Run"
    messages: bool = False  # whether it is about them, which a base model has none of


Run = Callable[[Model, Session, str], Step]  # the last is what follows the name


def chat(model: Model, name: str, sampling: dict[str, Any]) -> None:
    """Answers what is typed until /quit or the end of the input.

    On a terminal, Ctrl-C stops an answer and never the program. Elsewhere each line of
    stdin is a message, answers go to stdout and remarks to stderr.

    Args:
        model: an assistant, or a base model, which goes on from each line.
        name: of the model, for the first line.
        sampling: fields of `Sampling`.

    Raises:
        ModelError: the model is a classifier.
        ConfigError: a field of `sampling` cannot be used.
        DataError: stdin is no text.
    """
    if model.labels:
        raise ModelError(
            f"{name} is a classifier: it labels texts and writes none. Use gptjax "
            "classify."
        )
    Sampling(**sampling)
    person = sys.stdin.isatty() and sys.stdout.isatty()
    put, remark = writer(sys.stdout), writer(sys.stdout if person else sys.stderr)

    def say(text: str) -> None:
        remark(f"{text}\n")

    say(f"{name}: {model}. /help shows the commands; /quit or Ctrl-D leaves.")
    if not model.template:
        say(
            "This model completes text rather than answers: each line is a prompt of "
            "its own."
        )
    with interrupts() if person else contextlib.nullcontext([]) as pressed:
        lines = typed_lines(say) if person else piped_lines()
        converse(model, Session(sampling), lines, put, say, pressed)


def writer(file: Any) -> Say:
    """A function that writes text at once, without what a terminal would act on."""
    encoding = file.encoding or "utf-8"

    def write(text: str) -> None:
        file.write(printable(text).encode(encoding, "replace").decode(encoding))
        file.flush()

    return write


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Yields a list that grows with each Ctrl-C, which then does nothing else."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def typed_lines(say: Say) -> Iterator[str]:
    """What a person types and edits, until Ctrl-D; a paste is one line."""
    from prompt_toolkit import PromptSession

    prompt: PromptSession[str] = PromptSession()
    told = False
    while True:
        try:
            line = prompt.prompt("> ")
        except KeyboardInterrupt:
            if not told:
                say("(/quit or Ctrl-D leaves)")
            told = True
        except EOFError:
            return
        else:
            yield line


def piped_lines() -> Iterator[str]:
    """The lines of stdin as they come."""
    try:
        for line in sys.stdin:
            yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the messages on stdin are no text: {error}. Convert them to UTF-8."
        ) from error


def converse(
    model: Model,
    session: Session,
    lines: Iterable[str],
    put: Say,
    say: Say,
    pressed: list[int],
) -> Session:
    """Does what each line leads to; a mistake is said, and the next line read."""
    for line in lines:
        pressed.clear()
        try:
            step = step_of(model, session, line)
            session = step.session
            if step.says:
                say(step.says)
            if step.then == "leave":
                break
            if step.then == "answer":
                session = answered(model, session, put, say, pressed)
        except GptjaxError as error:
            say(str(error))
    return session


def step_of(model: Model, session: Session, line: str) -> Step:
    """What a line leads to: nothing, a command, or an answer.

    Raises:
        GptjaxError: an unknown command or wrong value; a message that does not fit.
    """
    if not line.strip():
        return Step(session)
    if not line.startswith("/"):
        return asked(model, session, line[1:] if line.startswith(" /") else line)
    name, *rest = line.split(maxsplit=1)
    known = commands(model)
    if name not in known:
        raise ConfigError(
            f"there is no command {name}.{suggestion(name, known)} /help lists them; "
            "with a blank before it, a line that starts with / is a message."
        )
    return known[name].run(model, session, "".join(rest).strip())


def asked(model: Model, session: Session, text: str) -> Step:
    """The step to an answer; a question that got none makes way.

    Raises:
        DataError: the message alone does not fit, or cannot be encoded.
    """
    message = {"role": "user", "content": text}
    begun = dataclasses.replace(session, answers=session.answers + 1)
    if not model.template:
        return Step(dataclasses.replace(begun, messages=(message,)), then="answer")
    system, turns = parts(session.messages)
    if turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
    context = model.config.context_length
    reserve = min(Sampling(**session.sampling).max_new_tokens, context // 2)
    rest, count = kept(model, [*system, *turns, message], reserve)
    forgotten = (*session.forgotten, *turns[: 2 * count])
    begun = dataclasses.replace(begun, messages=tuple(rest), forgotten=forgotten)
    what = f"the first {count} turn{'s' * (count > 1)}"
    says = f"(forgot {what}: the context of {context:,} tokens is full)"
    return Step(begun, says if count else "", "answer")


def parts(
    messages: Sequence[Message],
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The system message, if there is one, and all others."""
    first = int(bool(messages) and messages[0]["role"] == "system")
    return tuple(messages[:first]), tuple(messages[first:])


def kept(
    model: Model, messages: Sequence[Message], reserve: int
) -> tuple[list[Message], int]:
    """The messages that leave `reserve` tokens free, and how many turns were dropped.

    A turn is a question and its answer. The oldest go first; the system message and
    the last question stay.

    Raises:
        DataError: these two alone do not fit.
    """
    system, turns = parts(messages)
    room = model.config.context_length - reserve
    tokens = 0
    for count in range((len(turns) + 1) // 2):
        rest = [*system, *turns[2 * count :]]
        tokens = len(prompt_ids(model, rest))
        if tokens <= room:
            return rest, count
    raise DataError(
        f"the message takes {tokens:,} tokens with the template"
        f"{' and the system message' * bool(system)}, but there is room for {room:,}: "
        f"{reserve:,} of the context's {room + reserve:,} are kept for the answer. "
        "Shorten it."
    )


def answered(
    model: Model, session: Session, put: Say, say: Say, pressed: Sequence[int]
) -> Session:
    """The session with the answer to its last message, which is put as it comes."""
    seed = session.sampling.get("seed", 0) + session.answers - 1
    options = {**session.sampling, "seed": seed}
    if model.template:
        pieces = stream_answer(model, list(session.messages), **options)
    else:
        pieces = stream(model, session.messages[-1]["content"], **options)
    text = ""
    try:
        for piece in pieces:
            if not pressed:
                put(piece)
                text += piece
            if pressed:  # meanwhile, so that no further piece is computed
                break
    finally:
        if text:
            put("\n")
    if pressed:
        say("(stopped)")
    elif not text.strip():
        say("(the answer is empty)")
    if not model.template or not text.strip():
        return session
    answer = {"role": "assistant", "content": text.strip()}
    return dataclasses.replace(session, messages=(*session.messages, answer))


def commands(model: Model) -> dict[str, Command]:
    """Those that there are for this model."""
    rows = COMMANDS.items()
    return {name: row for name, row in rows if model.template or not row.messages}


def show_help(model: Model, session: Session, argument: str) -> Step:
    """The step that lists the commands."""
    rows = commands(model).items()
    lines = [f"{name} {row.argument}".ljust(16) + row.help for name, row in rows]
    lines += ["Ctrl-C stops an answer. A paste of several lines is one message. With a"]
    lines += ["blank before it, a line that starts with / is a message."]
    return Step(session, "\n".join(lines))


def leave(model: Model, session: Session, argument: str) -> Step:
    """The last step."""
    return Step(session, then="leave")


def reset(model: Model, session: Session, argument: str) -> Step:
    """The step that leaves only the system message."""
    system, _ = parts(session.messages)
    session = dataclasses.replace(session, messages=system, forgotten=())
    return Step(session, "(forgot all turns)")


def set_system(model: Model, session: Session, argument: str) -> Step:
    """The step that puts another system message before the turns, or none."""
    _, turns = parts(session.messages)
    system = [{"role": "system", "content": argument}] if argument else []
    session = dataclasses.replace(session, messages=(*system, *turns))
    return Step(session, f"(the system message is {'set' if system else 'removed'})")


def retry(model: Model, session: Session, argument: str) -> Step:
    """The step that asks the last question once more."""
    _, turns = parts(session.messages)
    texts = [turn["content"] for turn in turns if turn["role"] == "user"]
    if not texts:
        raise ConfigError("there is no message to ask again. Write one.")
    if turns[-1]["role"] == "assistant":
        session = dataclasses.replace(session, messages=session.messages[:-1])
    return asked(model, session, texts[-1])


def setting(field: str, example: int | float) -> Run:
    """The command that changes a field of `Sampling` to a number like the example."""

    def run(model: Model, session: Session, argument: str) -> Step:
        try:
            value: Any = type(example)(argument)
        except ValueError:
            value = math.inf
        if abs(value) == math.inf:
            raise ConfigError(
                f"{field} cannot be {argument!r}. Give it a number, such as {example}."
            )
        sampling: dict[str, Any] = {**session.sampling, field: value}
        Sampling(**sampling)
        session = dataclasses.replace(session, sampling=sampling)
        return Step(session, f"({field} is {value})")

    return run


def save(model: Model, session: Session, argument: str) -> Step:
    """Writes all messages, forgotten ones too, to a file that is not there yet."""
    if not argument:
        raise ConfigError("/save needs the name of a file, such as /save talk.json.")
    path = Path(os.path.expanduser(argument))  # Path.expanduser can fail
    if os.path.lexists(path):
        raise ConfigError(f"{path} is there already. Name another file.")
    system, turns = parts(session.messages)
    messages = [*system, *session.forgotten, *turns]
    text = json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
    try:
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {path}: {error}.") from error
    return Step(session, f"(saved {len(messages)} messages in {path})")


COMMANDS = {
    "/help": Command("", "show these lines", show_help),
    "/retry": Command("", "ask the last message again", retry),
    "/reset": Command("", "forget all turns, not the system message", reset, True),
    "/system": Command(
        "TEXT", "set the system message, or remove it", set_system, True
    ),
    "/temperature": Command(
        "X", "0 = the likeliest token", setting("temperature", 0.7)
    ),
    "/top-k": Command("N", "draw from the N likeliest; 0 = all", setting("top_k", 40)),
    "/save": Command("FILE", "write the messages as JSON", save, True),
    "/quit": Command("", "leave, as Ctrl-D does", leave),
}
