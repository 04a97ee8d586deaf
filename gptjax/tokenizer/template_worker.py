"""Rendering of chat templates in Jinja's sandbox; as a process, of untrusted ones.

    python -m gptjax.tokenizer.template_worker

A template is a program: it can loop forever or expand to gigabytes. Templates that do
not ship with gptjax are rendered by this process, within limits on time and memory.
"""

import contextlib
import faulthandler
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from gptjax.errors import ConfigError

MAX_MEMORY_BYTES = 1 << 30  # address space of the process
EOT_TEXT = "<|endoftext|>"
# Unicode noncharacters, which are not meant to occur in text.
TEXT_MARK, REPLY_MARK, CLOSE_MARK, EOT_MARK = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARK_REPLACEMENTS = str.maketrans(
    dict.fromkeys((TEXT_MARK, REPLY_MARK, CLOSE_MARK, EOT_MARK), "\ufffd")
)

# "role", "content" and, from a user, optionally "input".
ChatMessage = Mapping[str, str]


def serve_requests() -> None:
    """Replies to each JSON line on stdin with a line of [text, error]."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # where supported
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        timeout_seconds, *arguments = json.loads(line)
        faulthandler.dump_traceback_later(timeout_seconds, exit=True)
        try:
            reply = [render(*arguments), ""]
        except ConfigError as error:
            reply = ["", str(error)]
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()
        faulthandler.cancel_dump_traceback_later()


def render(
    source: str,
    messages: Sequence[ChatMessage],
    add_generation_prompt: bool,
    bos_token: str,
    eos_token: str,
) -> str:
    """Renders a conversation without limits, with marks around message texts."""
    try:
        template, reads_input = compile_jinja(source)
        if not reads_input:
            messages = [join_input(message) for message in messages]
        marked_messages = [
            {
                name: value if name == "role" else MarkedText.wrap(value, message["role"])
                for name, value in message.items()
            }
            for message in messages
        ]
        return template.render(
            messages=marked_messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token.replace(EOT_TEXT, EOT_MARK),
            eos_token=eos_token.replace(EOT_TEXT, EOT_MARK),
            enable_thinking=False,  # Qwen 3: answers follow the prompt directly
            raise_exception=raise_exception,
        )
    except Exception as error:  # a template can raise anything
        raise ConfigError(
            f"the chat template failed: {type(error).__name__}: {error!s:.500}. Correct it, "
            "or use a built-in template."
        ) from error


def join_input(message: ChatMessage) -> ChatMessage:
    """Returns the message with its input, if any, at the end of its content."""
    if "input" not in message:
        return message
    return {"role": message["role"], "content": f"{message['content']}\n\n{message['input']}"}


def raise_exception(message: str) -> None:
    """Implements `raise_exception` for templates."""
    raise jinja2.TemplateError(message)


class MarkedText(str):
    """Message text between two marks that stripping preserves."""

    @classmethod
    def wrap(cls, text: str, role: str) -> "MarkedText":
        """Marks the text of a message of this role."""
        mark = REPLY_MARK if role == "assistant" else TEXT_MARK
        return cls(mark + text.translate(MARK_REPLACEMENTS) + CLOSE_MARK)

    def __bool__(self) -> bool:
        return len(self) > 2

    def strip_text(self, strip: Callable[..., str], chars: str | None = None, /) -> "MarkedText":
        """Strips inside the marks."""
        return MarkedText(self[0] + strip(self[1:-1], chars) + self[-1])

    strip: Any = functools.partialmethod(strip_text, str.strip)
    lstrip: Any = functools.partialmethod(strip_text, str.lstrip)
    rstrip: Any = functools.partialmethod(strip_text, str.rstrip)


class GenerationTag(jinja2.ext.Extension):
    """Ignores the tag {% generation %}, which newer templates put around replies."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        """Returns the statements inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without operators that can create huge strings or integers."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Allows * and % between integers only, and no **."""
        if operator == "**" or not (type(left) is type(right) is int):
            raise jinja2.sandbox.SecurityError(f"{left!r:.20} {operator} {right!r:.20}")
        return super().call_binop(context, operator, left, right)


@functools.lru_cache(maxsize=16)
def compile_jinja(source: str) -> tuple[jinja2.Template, bool]:
    """Compiles a template; says whether it reads the inputs of messages.

    <|endoftext|> in its source is the end token.
    """
    sandbox = TemplateSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    text = source.translate(MARK_REPLACEMENTS).replace(EOT_TEXT, EOT_MARK)
    template, syntax = sandbox.from_string(text), sandbox.parse(text)
    keys = [node.attr for node in syntax.find_all(jinja2.nodes.Getattr)]
    keys += [node.value for node in syntax.find_all(jinja2.nodes.Const)]
    return template, "input" in keys


if __name__ == "__main__":
    serve_requests()
