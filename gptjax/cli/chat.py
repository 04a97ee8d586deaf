"""Chat in the terminal, with streamed replies.

A line is a message, or a command of `CHAT_COMMANDS` if it starts with "/".
"""

import dataclasses
import functools
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from gptjax.config import MAX_SEED, did_you_mean, load_config
from gptjax.errors import ConfigError, DataError, GptjaxError, ResourceError
from gptjax.fileio.atomic import write_atomic
from gptjax.fileio.paths import user_path
from gptjax.inference.assistant import encode_chat, stream_answer
from gptjax.inference.generate import GenerationConfig, check_language_model, stream
from gptjax.runtime.terminal import (
    is_terminal,
    print_message,
    print_progress,
    print_result,
    stdin_lines,
)
from gptjax.tokenizer.template_worker import ChatMessage
from gptjax.weights.model_folder import Model

FEW_TOKENS = 10**9  # about as many as GPT-2 small needs to write sentences that make sense
MAX_STAGES = 10  # of runs that start from each other


@dataclasses.dataclass
class Chat:
    """A conversation, which the commands change, and its input and output."""

    model: Model
    sampling: dict[str, Any]  # fields of `GenerationConfig`
    print_reply: Callable[[str], None]
    print_notice: Callable[[str], None]
    interrupts: list[int] = dataclasses.field(default_factory=list)  # signals received
    system: list[ChatMessage] = dataclasses.field(default_factory=list)  # at most one
    messages: list[ChatMessage] = dataclasses.field(default_factory=list)
    num_dropped: int = 0  # first messages, which no longer fit the context
    num_replies: int = 0  # requested so far; offsets the seed

    def history(self) -> list[ChatMessage]:
        """Messages that the model sees."""
        return [*self.system, *self.messages[self.num_dropped :]]


def run_chat(model: Model, name: str, sampling: dict[str, Any]) -> None:
    """Chats with an assistant, or completes each line with a base model, until /quit.

    On a terminal, Ctrl-C stops a reply but not the program. Otherwise each line of
    stdin is a message; replies go to stdout and notices to stderr.
    """
    check_language_model(model)
    GenerationConfig(**sampling)
    is_interactive = is_terminal(sys.stdin) and is_terminal(sys.stdout)
    chat = Chat(
        model,
        sampling,
        print_reply=functools.partial(print_result, end=""),
        print_notice=print_progress if is_interactive else print_message,
    )
    chat.print_notice(f"{name}: {model}. /help lists the commands; /quit or Ctrl-D quits.")
    if not model.chat_template:
        chat.print_notice("This base model completes text: each line is a separate prompt.")
    if expectation := describe_expectation(name):
        chat.print_notice(expectation)
    if not is_interactive:
        run_repl(chat, (line.removesuffix("\n") for line in stdin_lines()))
        return
    handler = signal.signal(signal.SIGINT, lambda number, _: chat.interrupts.append(number))
    try:
        run_repl(chat, prompt_lines(chat.print_notice))
    finally:
        signal.signal(signal.SIGINT, handler)


def describe_expectation(name: str) -> str:
    """Warning about a model trained from random initialization on few tokens, or "".

    A run that starts from another one has seen the tokens of both.
    """
    num_tokens = 0
    for _ in range(MAX_STAGES):
        path = user_path(name)
        config_path = (path.parent if path.name == "model" else path) / "config.toml"
        try:
            config = load_config(config_path)
        except ConfigError:  # not a run
            return ""
        num_tokens += config.train.steps * config.data.batch_size * config.model.context_length
        name = config.finetune.init_from
        if not name:
            break
    if name or num_tokens > FEW_TOKENS:
        return ""
    return (
        f"This model was trained from random initialization on at most {num_tokens:,} tokens, "
        "public models on billions: expect the form and the words of its data, not knowledge."
    )


def prompt_lines(print_notice: Callable[[str], None]) -> Iterator[str]:
    """Prompts for lines until Ctrl-D; a paste is one line."""
    from prompt_toolkit import PromptSession

    prompt: PromptSession[str] = PromptSession()
    while True:
        try:
            yield prompt.prompt("> ")
        except KeyboardInterrupt:
            print_notice("(/quit or Ctrl-D quits)")
        except EOFError:
            return


def run_repl(chat: Chat, lines: Iterable[str]) -> None:
    """Handles each line until /quit; prints errors and continues."""
    for line in lines:
        chat.interrupts.clear()
        try:
            handle_line(chat, line)
        except ResourceError:  # the replies cannot be written
            raise
        except GptjaxError as error:
            chat.print_notice(str(error))
        except EOFError:
            return


def handle_line(chat: Chat, line: str) -> None:
    """Handles an empty line, a command or a message."""
    if not line.strip():
        return
    if not line.startswith("/"):
        reply(chat, line[1:] if line.startswith(" /") else line)
        return
    name, *rest = line.split(maxsplit=1)
    available = available_commands(chat)
    if name not in available:
        raise ConfigError(
            f"there is no command {name}.{did_you_mean(name, available)} /help lists "
            "them. To send a message that starts with /, put a space before it."
        )
    available[name].run(chat, "".join(rest).strip())


def reply(chat: Chat, text: str) -> None:
    """Streams the reply to a message; an unanswered question before it is dropped."""
    model, question = chat.model, {"role": "user", "content": text}
    seed = (chat.sampling.get("seed", 0) + chat.num_replies) % (MAX_SEED + 1)
    options = {**chat.sampling, "seed": seed}
    if model.chat_template:
        add_question(chat, question)
        chunks = stream_answer(model, chat.history(), **options)
    else:
        chat.messages = [question]  # for /retry
        chunks = stream(model, text, **options)
    chat.num_replies += 1
    answer = ""
    try:
        for chunk in chunks:
            if not chat.interrupts:
                chat.print_reply(chunk)
                answer += chunk
            if chat.interrupts:  # also after printing, before the next chunk is computed
                break
    finally:
        if answer:
            chat.print_reply("\n")
    if chat.interrupts:
        chat.print_notice("(stopped)")
    elif not answer.strip():
        chat.print_notice("(the reply is empty)")
    if model.chat_template and answer.strip():
        chat.messages.append({"role": "assistant", "content": answer.strip()})


def add_question(chat: Chat, question: ChatMessage) -> None:
    """Adds a question; drops the oldest turns until the reply fits the context."""
    is_unanswered = bool(chat.messages) and chat.messages[-1]["role"] == "user"
    messages = [*chat.messages[: len(chat.messages) - is_unanswered], question]
    context = chat.model.config.context_length
    reserved_tokens = min(GenerationConfig(**chat.sampling).max_new_tokens, context // 2)
    max_tokens = context - reserved_tokens
    num_tokens = 0
    for num_dropped in range(chat.num_dropped, len(messages), 2):  # of turns
        history = [*chat.system, *messages[num_dropped:]]
        num_tokens = len(encode_chat(chat.model, history))
        if num_tokens <= max_tokens:
            break
    else:
        raise DataError(
            f"the message is {num_tokens:,} tokens long with the template"
            f"{' and the system message' * bool(chat.system)}, but at most "
            f"{max_tokens:,} fit: {reserved_tokens:,} of the context's {context:,} are "
            "reserved for the reply. Shorten it."
        )
    if turns := (num_dropped - chat.num_dropped) // 2:
        dropped_turns = f"the first {turns} turn{'s' * (turns > 1)}"
        chat.print_notice(f"(dropped {dropped_turns}: the context of {context:,} tokens is full)")
    chat.messages, chat.num_dropped = messages, num_dropped


class ChatCommand(NamedTuple):
    """Chat command."""

    argument: str
    help: str
    run: Callable[[Chat, str], None]
    needs_template: bool = False  # needs a conversation, which base models do not have


def available_commands(chat: Chat) -> dict[str, ChatCommand]:
    """Commands available for the model."""
    rows = CHAT_COMMANDS.items()
    return {name: row for name, row in rows if chat.model.chat_template or not row.needs_template}


def show_help(chat: Chat, argument: str) -> None:
    """Lists the commands."""
    for name, row in available_commands(chat).items():
        chat.print_notice(f"{name} {row.argument}".ljust(16) + row.help)
    chat.print_notice(
        "Ctrl-C stops a reply. A paste of several lines is one message. To send\n"
        "a message that starts with /, put a space before it."
    )


def quit_chat(chat: Chat, argument: str) -> None:
    """Ends the chat."""
    raise EOFError


def reset(chat: Chat, argument: str) -> None:
    """Drops everything but the system message."""
    chat.messages, chat.num_dropped = [], 0
    chat.print_notice("(dropped all turns)")


def set_system(chat: Chat, argument: str) -> None:
    """Sets or removes the system message."""
    chat.system = [{"role": "system", "content": argument}] if argument else []
    chat.print_notice(f"(the system message is {'set' if argument else 'removed'})")


def retry(chat: Chat, argument: str) -> None:
    """Regenerates the last reply."""
    if not chat.messages:
        raise ConfigError("there is no message to send again. Write one first.")
    before = list(chat.messages)
    if chat.messages[-1]["role"] == "assistant":
        chat.messages.pop()
    try:
        reply(chat, chat.messages[-1]["content"])
    except GptjaxError:
        chat.messages = before
        raise


def set_option(field: str, example: int | float, chat: Chat, argument: str) -> None:
    """Sets a numeric field of `GenerationConfig`."""
    try:
        sampling: dict[str, Any] = {**chat.sampling, field: type(example)(argument)}
    except ValueError as error:
        raise ConfigError(
            f"{field} cannot be {argument!r}. Use a number, such as {example}."
        ) from error
    GenerationConfig(**sampling)
    chat.sampling = sampling
    chat.print_notice(f"({field} is {sampling[field]})")


set_temperature = functools.partial(set_option, "temperature", 0.7)
set_top_k = functools.partial(set_option, "top_k", 40)


def save_conversation(chat: Chat, argument: str) -> None:
    """Writes all messages, including dropped ones, to a new file."""
    if not argument:
        raise ConfigError("/save needs a file name, such as /save talk.json.")
    path = user_path(argument)
    messages = [*chat.system, *chat.messages]
    try:
        text = json.dumps(messages, ensure_ascii=False, indent=2)
        if path.exists():
            raise FileExistsError("it exists")
        path.parent.resolve(strict=True)  # a mistyped folder is not created
        write_atomic(path, text + "\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {path}: {error}. Use another file.") from error
    chat.print_notice(f"(saved {len(messages)} messages to {path})")


CHAT_COMMANDS = {
    "/help": ChatCommand("", "show this help", show_help),
    "/retry": ChatCommand("", "regenerate the last reply", retry),
    "/reset": ChatCommand("", "drop all turns; keep the system message", reset, True),
    "/system": ChatCommand("TEXT", "set the system message, or remove it", set_system, True),
    "/temperature": ChatCommand("X", "sampling temperature; 0 = greedy", set_temperature),
    "/top-k": ChatCommand("N", "sample from the top N tokens; 0 = all", set_top_k),
    "/save": ChatCommand("FILE", "write the messages as JSON", save_conversation, True),
    "/quit": ChatCommand("", "quit (or Ctrl-D)", quit_chat),
}
