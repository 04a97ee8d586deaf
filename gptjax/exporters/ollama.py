"""Modelfile of Ollama: the chat template in Go's syntax, stop texts and context length.

https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx. Ollama renders no Jinja,
so the text between messages is found by rendering conversations. It may depend on the
roles of both neighbors; a template that does more is rejected.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gptjax.errors import ConfigError, ModelError
from gptjax.tokenizer.chat_template import ChatTemplate, compile_template
from gptjax.weights.model_folder import Model

START, END = "start", "end"  # neighbors of the first and the last message
CONTENTS = {"system": "Csystem", "user": "Cuser", "assistant": "Cassistant"}
SYSTEM, USER, ASSISTANT = CONTENTS
PROBES = (
    (USER,),
    (SYSTEM, USER),
    (USER, ASSISTANT, USER),
    (SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER),
)


class TurnTexts(NamedTuple):
    """Texts of a template between messages, by the roles before and after."""

    between: Mapping[tuple[str, str], str]

    def without_start(self, added_text: str) -> "TurnTexts":
        """Removes a text that is added to each conversation anyway."""
        return TurnTexts(
            {
                pair: text.removeprefix(added_text) if pair[0] == START else text
                for pair, text in self.between.items()
            }
        )

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Renders a conversation that ends with a question, as the Go template does."""
        roles = [START, *(message["role"] for message in messages), END]
        contents = [*(message["content"] for message in messages), ""]
        pairs = zip(itertools.pairwise(roles), contents, strict=True)
        return "".join(self.between[pair] + content for pair, content in pairs)


def find_turn_texts(template: ChatTemplate) -> TurnTexts:
    """Finds the texts between messages; ModelError if more than two roles matter."""
    between: dict[tuple[str, str], str] = {}
    for roles in PROBES:
        messages = [{"role": role, "content": CONTENTS[role]} for role in roles]
        try:
            segments = template.segments(messages, add_generation_prompt=True)
        except ConfigError as error:
            raise ModelError(f"{error} Ollama needs a template of several turns.") from error
        rest, names = "".join(segment.text for segment in segments), [START, *roles, END]
        contents = [*map(CONTENTS.get, roles), ""]
        for pair, content in zip(itertools.pairwise(names), contents, strict=True):
            text, _, rest = rest.partition(content) if content else (rest, "", "")
            if between.setdefault(pair, text) != text:
                raise ModelError(
                    f"the chat template writes {between[pair]!r} or {text!r} between {pair[0]} and "
                    f"{pair[1]}, which a template of Ollama does not express. Use --to gguf."
                )
    return TurnTexts(between)


def go_template(texts: TurnTexts) -> str:
    """Returns the template in Go's syntax.

    https://pkg.go.dev/text/template; `.Messages` are those of Ollama.
    """
    parts = ['{{ $last := "start" }}{{ range .Messages }}']
    for (before, after), text in texts.between.items():
        if after != END and text:
            condition = f'and (eq $last "{before}") (eq .Role "{after}")'
            parts.append(f"{{{{ if {condition} }}}}{{{{ {quote_go(text)} }}}}{{{{ end }}}}")
    parts.append("{{ .Content }}{{ $last = .Role }}{{ end }}")
    header = quote_go(texts.between[USER, END])
    parts.append(f'{{{{ if eq $last "user" }}}}{{{{ {header} }}}}{{{{ end }}}}')
    return "".join(parts)


def quote_go(text: str) -> str:
    r"""Quotes a text as a string of Go; Ollama drops characters that are not printable.

    >>> print(quote_go('<"\n>'))
    "<\"\n>"
    """
    escapes = {c: f"\\U{ord(c):08x}" for c in text if not c.isprintable()}
    escapes |= {'"': r"\"", "\\": r"\\", "\n": r"\n"}
    return '"' + "".join(escapes.get(c, c) for c in text) + '"'


def modelfile(model: Model, gguf_name: str) -> str:
    """Returns the Modelfile that runs a GGUF file beside it."""
    tokenizer = model.tokenizer
    values: list[tuple[str, Any]] = [("num_ctx", model.config.context_length)]
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    source, stops = "{{ .Prompt }}", [names[token_id] for token_id in tokenizer.stop_ids]
    if model.chat_template:
        template = compile_template(model.chat_template, *tokenizer.template_tokens)
        # Ollama adds the BOS token even to a prompt that starts with it.
        added_text = template.bos_token if tokenizer.add_bos else ""
        source = go_template(find_turn_texts(template).without_start(added_text))
        stops += template.stop_strings
    values += [("stop", f'"""{stop}"""') for stop in dict.fromkeys(stops)]
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{source}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in values]
    return "\n".join(lines) + "\n"
