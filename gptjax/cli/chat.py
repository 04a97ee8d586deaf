"""Chat in the terminal, with streamed replies.

A line is a message, or a command if it starts with "/". `handle_line` maps a line to an
`Action`; only `run_chat` and the functions it passes on use the terminal.
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

from gptjax.config import did_you_mean
from gptjax.errors import ConfigError, DataError, GptjaxError, ModelError
from gptjax.fileio.atomic import write_atomic
from gptjax.inference.assistant import encode_chat, stream_answer
from gptjax.inference.generate import GenerationConfig, stream
from gptjax.runtime.terminal import sanitize
from gptjax.tokenizer.template_worker import ChatMessage
from gptjax.weights.model_folder import Model

PrintFn = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ChatSession:
    """State of a conversation between two lines."""

    sampling: Mapping[str, Any]  # fields of `GenerationConfig`
    history: tuple[ChatMessage, ...] = ()  # the last may be an unanswered question
    dropped_messages: tuple[ChatMessage, ...] = ()  # no longer fit the context
    num_replies: int = 0  # replies requested so far; offsets the seed


class Action(NamedTuple):
    """Result of handling a line."""

    session: ChatSession
    output: str = ""
    then: Literal["continue", "reply", "quit"] = "continue"


class ChatCommand(NamedTuple):
    """Chat command."""

    argument: str
    help: str
    run: "CommandFn"
    needs_template: bool = False  # needs a conversation, which base models do not have


CommandFn = Callable[[Model, ChatSession, str], Action]  # last: the argument


def run_chat(model: Model, name: str, sampling: dict[str, Any]) -> None:
    """Chats until /quit or the end of the input.

    On a terminal, Ctrl-C stops a reply but not the program. Otherwise each line of
    stdin is a message; replies go to stdout and notices to stderr.

    Args:
        model: an assistant, or a base model, which completes each line.
        name: name of the model, shown in the first line.
        sampling: fields of `GenerationConfig`.

    Raises:
        ModelError: the model is a classifier.
        ConfigError: a field of `sampling` is invalid.
        DataError: stdin is not UTF-8 text.
    """
    if model.labels:
        raise ModelError(
            f"{name} is a classifier, which cannot generate text. Use gptjax classify."
        )
    GenerationConfig(**sampling)
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    print_reply = make_printer(sys.stdout)
    write_notice = make_printer(sys.stdout if is_interactive else sys.stderr)

    def print_notice(text: str) -> None:
        write_notice(f"{text}\n")

    print_notice(f"{name}: {model}. /help lists the commands; /quit or Ctrl-D quits.")
    if not model.chat_template:
        print_notice("This base model completes text: each line is a separate prompt.")
    with handle_interrupts() if is_interactive else contextlib.nullcontext([]) as interrupts:
        lines = prompt_lines(print_notice) if is_interactive else stdin_lines()
        run_repl(model, ChatSession(sampling), lines, print_reply, print_notice, interrupts)


def make_printer(stream: Any) -> PrintFn:
    """Makes a function that writes sanitized text and flushes."""
    encoding = stream.encoding or "utf-8"

    def write(text: str) -> None:
        stream.write(sanitize(text).encode(encoding, "replace").decode(encoding))
        stream.flush()

    return write


@contextlib.contextmanager
def handle_interrupts() -> Iterator[list[int]]:
    """Collects SIGINTs in the list it yields, instead of raising."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous_handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def prompt_lines(print_notice: PrintFn) -> Iterator[str]:
    """Prompts for lines until Ctrl-D; a paste is one line."""
    from prompt_toolkit import PromptSession

    prompt: PromptSession[str] = PromptSession()
    hint_shown = False
    while True:
        try:
            line = prompt.prompt("> ")
        except KeyboardInterrupt:
            if not hint_shown:
                print_notice("(/quit or Ctrl-D quits)")
            hint_shown = True
        except EOFError:
            return
        else:
            yield line


def stdin_lines() -> Iterator[str]:
    """Yields the lines of stdin as they arrive."""
    try:
        for line in sys.stdin:
            yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the messages on stdin are not UTF-8: {error}. Convert them to UTF-8."
        ) from error


def run_repl(
    model: Model,
    session: ChatSession,
    lines: Iterable[str],
    print_reply: PrintFn,
    print_notice: PrintFn,
    interrupts: list[int],
) -> ChatSession:
    """Handles each line; prints errors and continues. Returns the last session."""
    for line in lines:
        interrupts.clear()
        try:
            action = handle_line(model, session, line)
            session = action.session
            if action.output:
                print_notice(action.output)
            if action.then == "quit":
                break
            if action.then == "reply":
                session = stream_reply(model, session, print_reply, print_notice, interrupts)
        except GptjaxError as error:
            print_notice(str(error))
    return session


def handle_line(model: Model, session: ChatSession, line: str) -> Action:
    """Handles an empty line, a command or a message.

    Raises:
        GptjaxError: an unknown command, an invalid value or a message that is too long.
    """
    if not line.strip():
        return Action(session)
    if not line.startswith("/"):
        return start_turn(model, session, line[1:] if line.startswith(" /") else line)
    name, *rest = line.split(maxsplit=1)
    available = available_commands(model)
    if name not in available:
        raise ConfigError(
            f"there is no command {name}.{did_you_mean(name, available)} /help lists "
            "them. To send a message that starts with /, put a space before it."
        )
    return available[name].run(model, session, "".join(rest).strip())


def start_turn(model: Model, session: ChatSession, text: str) -> Action:
    """Starts a turn; drops an unanswered question.

    Raises:
        DataError: the message alone exceeds the context, or cannot be encoded.
    """
    message = {"role": "user", "content": text}
    updated = dataclasses.replace(session, num_replies=session.num_replies + 1)
    if not model.chat_template:
        return Action(dataclasses.replace(updated, history=(message,)), then="reply")
    system, turns = split_system_message(session.history)
    if turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
    context = model.config.context_length
    reserved_tokens = min(GenerationConfig(**session.sampling).max_new_tokens, context // 2)
    remaining, num_dropped = truncate_history(model, [*system, *turns, message], reserved_tokens)
    dropped_messages = (*session.dropped_messages, *turns[: 2 * num_dropped])
    updated = dataclasses.replace(
        updated, history=tuple(remaining), dropped_messages=dropped_messages
    )
    dropped_turns = f"the first {num_dropped} turn{'s' * (num_dropped > 1)}"
    notice = f"(dropped {dropped_turns}: the context of {context:,} tokens is full)"
    return Action(updated, notice if num_dropped else "", "reply")


def split_system_message(
    messages: Sequence[ChatMessage],
) -> tuple[tuple[ChatMessage, ...], tuple[ChatMessage, ...]]:
    """Splits off the system message, if there is one."""
    num_system = int(bool(messages) and messages[0]["role"] == "system")
    return tuple(messages[:num_system]), tuple(messages[num_system:])


def truncate_history(
    model: Model, messages: Sequence[ChatMessage], reserved_tokens: int
) -> tuple[list[ChatMessage], int]:
    """Drops the oldest turns until `reserved_tokens` of the context are free.

    A turn is a question and its reply. The system message and the last question are
    kept. Also returns the number of dropped turns.

    Raises:
        DataError: the system message and the last question alone do not fit.
    """
    system, turns = split_system_message(messages)
    max_tokens = model.config.context_length - reserved_tokens
    num_tokens = 0
    for num_dropped in range((len(turns) + 1) // 2):
        remaining = [*system, *turns[2 * num_dropped :]]
        num_tokens = len(encode_chat(model, remaining))
        if num_tokens <= max_tokens:
            return remaining, num_dropped
    raise DataError(
        f"the message is {num_tokens:,} tokens long with the template"
        f"{' and the system message' * bool(system)}, but at most {max_tokens:,} fit: "
        f"{reserved_tokens:,} of the context's {max_tokens + reserved_tokens:,} are "
        "reserved for the reply. Shorten it."
    )


def stream_reply(
    model: Model,
    session: ChatSession,
    print_reply: PrintFn,
    print_notice: PrintFn,
    interrupts: Sequence[int],
) -> ChatSession:
    """Streams the reply to the last message; returns the session with it."""
    seed = session.sampling.get("seed", 0) + session.num_replies - 1
    options = {**session.sampling, "seed": seed}
    if model.chat_template:
        chunks = stream_answer(model, list(session.history), **options)
    else:
        chunks = stream(model, session.history[-1]["content"], **options)
    text = ""
    try:
        for chunk in chunks:
            if not interrupts:
                print_reply(chunk)
                text += chunk
            if interrupts:  # also after printing, before the next chunk is computed
                break
    finally:
        if text:
            print_reply("\n")
    if interrupts:
        print_notice("(stopped)")
    elif not text.strip():
        print_notice("(the reply is empty)")
    if not model.chat_template or not text.strip():
        return session
    reply = {"role": "assistant", "content": text.strip()}
    return dataclasses.replace(session, history=(*session.history, reply))


def available_commands(model: Model) -> dict[str, ChatCommand]:
    """Commands available for this model."""
    rows = CHAT_COMMANDS.items()
    return {name: row for name, row in rows if model.chat_template or not row.needs_template}


def show_help(model: Model, session: ChatSession, argument: str) -> Action:
    """Lists the commands."""
    rows = available_commands(model).items()
    lines = [f"{name} {row.argument}".ljust(16) + row.help for name, row in rows]
    lines += ["Ctrl-C stops a reply. A paste of several lines is one message. To send"]
    lines += ["a message that starts with /, put a space before it."]
    return Action(session, "\n".join(lines))


def quit_chat(model: Model, session: ChatSession, argument: str) -> Action:
    """Ends the chat."""
    return Action(session, then="quit")


def reset(model: Model, session: ChatSession, argument: str) -> Action:
    """Drops everything but the system message."""
    system, _ = split_system_message(session.history)
    session = dataclasses.replace(session, history=system, dropped_messages=())
    return Action(session, "(dropped all turns)")


def set_system(model: Model, session: ChatSession, argument: str) -> Action:
    """Sets or removes the system message."""
    _, turns = split_system_message(session.history)
    system = [{"role": "system", "content": argument}] if argument else []
    session = dataclasses.replace(session, history=(*system, *turns))
    return Action(session, f"(the system message is {'set' if system else 'removed'})")


def retry(model: Model, session: ChatSession, argument: str) -> Action:
    """Regenerates the last reply."""
    _, turns = split_system_message(session.history)
    questions = [turn["content"] for turn in turns if turn["role"] == "user"]
    if not questions:
        raise ConfigError("there is no message to send again. Write one first.")
    if turns[-1]["role"] == "assistant":
        session = dataclasses.replace(session, history=session.history[:-1])
    return start_turn(model, session, questions[-1])


def make_option_setter(field: str, example: int | float) -> CommandFn:
    """Makes a command that sets a numeric field of `GenerationConfig`."""

    def run(model: Model, session: ChatSession, argument: str) -> Action:
        try:
            value: Any = type(example)(argument)
        except ValueError:
            value = math.inf
        if abs(value) == math.inf:
            raise ConfigError(f"{field} cannot be {argument!r}. Use a number, such as {example}.")
        sampling: dict[str, Any] = {**session.sampling, field: value}
        GenerationConfig(**sampling)
        session = dataclasses.replace(session, sampling=sampling)
        return Action(session, f"({field} is {value})")

    return run


def save_conversation(model: Model, session: ChatSession, argument: str) -> Action:
    """Writes all messages, including dropped ones, to a new file."""
    if not argument:
        raise ConfigError("/save needs a file name, such as /save talk.json.")
    path = Path(os.path.expanduser(argument))  # Path.expanduser can fail
    if os.path.lexists(path):
        raise ConfigError(f"{path} already exists. Use another name.")
    system, turns = split_system_message(session.history)
    messages = [*system, *session.dropped_messages, *turns]
    text = json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
    try:
        write_atomic(path, text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {path}: {error}.") from error
    return Action(session, f"(saved {len(messages)} messages to {path})")


CHAT_COMMANDS = {
    "/help": ChatCommand("", "show this help", show_help),
    "/retry": ChatCommand("", "regenerate the last reply", retry),
    "/reset": ChatCommand("", "drop all turns; keep the system message", reset, True),
    "/system": ChatCommand("TEXT", "set the system message, or remove it", set_system, True),
    "/temperature": ChatCommand(
        "X", "sampling temperature; 0 = greedy", make_option_setter("temperature", 0.7)
    ),
    "/top-k": ChatCommand(
        "N", "sample from the top N tokens; 0 = all", make_option_setter("top_k", 40)
    ),
    "/save": ChatCommand("FILE", "write the messages as JSON", save_conversation, True),
    "/quit": ChatCommand("", "quit (or Ctrl-D)", quit_chat),
}
