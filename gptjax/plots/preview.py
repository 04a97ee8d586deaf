"""Preview of an instruction data set: rows, rendered texts and loss masks.

Uses the functions that create the training examples. The output is JSON lines, terminal
text or an HTML page. Control characters and markup in the data are escaped.
"""

import base64
import dataclasses
import io
import json
import statistics
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from gptjax.data.conversations import Conversation, read_conversations
from gptjax.data.sft import TRAIN_ON_ALL, TRAIN_ON_COMPLETIONS, encode_segments, truncate_left
from gptjax.errors import ConfigError
from gptjax.fileio.atomic import open_atomic
from gptjax.fileio.paths import user_path
from gptjax.plots.curves import BLUE, ORANGE, new_figure
from gptjax.runtime.terminal import sanitize
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.tokenizer.tokenizer import Tokenizer, load_tokenizer

TokenState = Literal["trained", "context", "truncated"]  # role of a token in training

# Parameters of ANSI's SGR sequence, marks without color, HTML element.
STATE_STYLES: dict[TokenState, tuple[str, str, str]] = {
    "trained": ("32;4", "⟦⟧", "mark"),
    "context": ("2", "", "span"),
    "truncated": ("2;9", "⟪⟫", "s"),
}
REPLACED_MARKS = dict.fromkeys(map(ord, "⟦⟧⟪⟫"), "\ufffd")  # in the data
MAX_SOURCE_ROW_CHARS = 1_500  # longest excerpt of a source row


class PreviewRow(NamedTuple):
    """Conversation with its tokens and loss mask."""

    conversation: Conversation
    ids: list[int]  # truncated tokens included
    loss_mask: list[bool]  # True for tokens that are trained on
    num_truncated: int  # tokens truncated from the left
    dropped: bool  # True if the last answer alone does not fit


@dataclasses.dataclass(frozen=True)
class Preview:
    """Rows of a file as used in training; created by `preview_rows`."""

    format_description: str  # file format, columns and settings
    rows: tuple[PreviewRow, ...]
    tokenizer: Tokenizer
    context: int  # [T]

    @property
    def num_trained(self) -> int:
        """Number of tokens in the loss."""
        return sum(sum(row.loss_mask) for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in training, whether in the loss or not."""
        return sum(len(row.ids) - row.num_truncated for row in self.rows if not row.dropped)


def preview_rows(
    path: Path | str,
    *,
    chat_template: str = "alpaca",
    tokenizer: str = "gpt2",
    context: int = 1024,
    completion_only_loss: bool = True,
) -> Preview:
    """Tokenizes the conversations of a file as training does.

    The options are those of `DataConfig`; `context` [T] is the maximum of input tokens.
    """
    if context < 1:
        raise ConfigError(f"context={context} is too small. Use at least 1.")
    loaded_tokenizer = load_tokenizer(tokenizer)
    template = load_chat_template(chat_template, *loaded_tokenizer.template_tokens)
    conversations, detected = read_conversations(path)
    train_on = TRAIN_ON_COMPLETIONS if completion_only_loss else TRAIN_ON_ALL
    rows = []
    for conversation in conversations:
        segments = template.segments(conversation.messages)
        example = encode_segments(loaded_tokenizer, segments, train_on)
        kept = truncate_left(example, context + 1)
        num_lost = len(example.ids) - (len(kept.ids) if kept else 0)
        loss_mask = [False] * num_lost + (kept.loss_mask if kept else [])
        num_truncated = num_lost if kept else 0
        rows.append(PreviewRow(conversation, example.ids, loss_mask, num_truncated, not kept))
    description = f"{detected} Template {chat_template}, tokenizer {tokenizer}."
    return Preview(description, tuple(rows), loaded_tokenizer, context)


def json_objects(preview: Preview) -> Iterator[dict[str, Any]]:
    """Yields each row as used in training, with its loss mask."""
    for row in preview.rows:
        tokens = row.ids[row.num_truncated :]
        yield {
            "text": preview.tokenizer.decode(tokens),
            "tokens": tokens,
            "loss_mask": list(map(int, row.loss_mask[row.num_truncated :])),
            "num_truncated": row.num_truncated,
            "dropped": row.dropped,
        }


class TokenSegment(NamedTuple):
    """Shortest run of tokens that decodes to complete characters."""

    text: str
    ids: list[int]
    state: TokenState  # of the first token
    is_eot: bool  # the control token <|endoftext|>, not the same characters as text


def token_segments(tokenizer: Tokenizer, row: PreviewRow) -> Iterator[TokenSegment]:
    """Yields segments of the row; tokens that share a character stay together."""
    start = 0
    for text, ids in tokenizer.iter_characters(row.ids):
        state: TokenState = "trained" if row.loss_mask[start] else "context"
        if start < row.num_truncated:
            state = "truncated"
        yield TokenSegment(text, ids, state, ids[-1] == tokenizer.eot_token)
        start += len(ids)


def describe_row(preview: Preview, number: int) -> tuple[str, str, str]:
    """Location of a row, its source as JSON, and its token counts."""
    row = preview.rows[number - 1]
    title = f"row {number:,} of {len(preview.rows):,}, {row.conversation.location}"
    source = json.dumps(row.conversation.source_row, ensure_ascii=False, indent=2)
    if num_omitted := len(source[MAX_SOURCE_ROW_CHARS:]):
        source = f"{source[:MAX_SOURCE_ROW_CHARS]}... ({num_omitted:,} more characters)"
    ends = row.ids.count(preview.tokenizer.eot_token)
    status = f"tokens: {len(row.ids):,}, trained: {sum(row.loss_mask):,}, ends: {ends:,}"
    if row.dropped:
        status += f"; dropped: the last answer exceeds {preview.context + 1:,} tokens"
    elif row.num_truncated:
        status += f"; the first {row.num_truncated:,} are truncated to fit {preview.context + 1:,}"
    return sanitize(title), sanitize(source), status


def describe_all_rows(preview: Preview) -> list[str]:
    """Statistics of all rows as lines."""
    rows, lengths = preview.rows, [len(row.ids) for row in preview.rows]
    share = preview.num_trained / max(preview.num_tokens, 1)
    return [
        f"rows     {len(rows):,}; truncated from the left: "
        f"{sum(row.num_truncated > 0 for row in rows):,}, dropped because the last answer "
        f"is too long: {sum(row.dropped for row in rows):,}",
        f"tokens   {preview.num_tokens:,} after truncation, trained: {preview.num_trained:,} "
        f"({share:.1%})",
        f"lengths  {min(lengths):,} to {max(lengths):,} tokens, median "
        f"{statistics.median(lengths):,.0f}; limit {preview.context + 1:,}: the context "
        "and one more target",
    ]


def histogram_figure(preview: Preview) -> Figure:
    """Plots the histogram of row lengths, with the length limit.

    Rows of more than twice the limit are counted in the last bin.
    """
    limit, lengths = preview.context + 1, [len(row.ids) for row in preview.rows]
    figure, axes = new_figure(f"tokens per row, at most {max(lengths):,}", "rows")
    axes.hist(np.minimum(lengths, 2 * limit), bins=20, color=BLUE)
    axes.axvline(limit, color=ORANGE, linestyle="--", label=f"limit {limit:,}")
    axes.legend(frameon=False)
    return figure


def render_terminal(preview: Preview, max_rows: int, color: bool) -> str:
    """Renders the first rows and the statistics of all for a terminal.

    Tokens in the loss are green and underlined, or bracketed without color.
    """
    legend = " ".join(colorize(state, state, False, color) for state in STATE_STYLES)
    lines = [sanitize(preview.format_description), legend]
    for number, row in enumerate(preview.rows[:max_rows], 1):
        title, source, status = describe_row(preview, number)
        segments = token_segments(preview.tokenizer, row)
        runs = groupby(segments, lambda x: (x.state, x.is_eot and color))
        parts = [colorize("".join(x.text for x in run), *key, color) for key, run in runs]
        lines += ["", title, source, "", "".join(parts), "", status]
    return "\n".join([*lines, "", *describe_all_rows(preview)])


def colorize(text: str, state: TokenState, is_eot: bool, color: bool) -> str:
    """Escapes a text and adds the ANSI codes or marks of its state."""
    text = sanitize(text).translate(REPLACED_MARKS)
    code, marks, _ = STATE_STYLES[state]
    if not color:
        return marks[:1] + text + marks[1:]
    # Line by line: pagers reset colors at line ends.
    lines = text.split("\n")
    return "\n".join(f"\x1b[{code}{';7' * is_eot}m{x}\x1b[0m" if x else "" for x in lines)


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width">
<title>Training data preview</title>
<style>
:root {{ color-scheme: light dark }}
body {{ margin: auto; max-width: 56rem; font: 1rem/1.5 sans-serif; overflow-wrap: anywhere }}
pre {{ white-space: pre-wrap; font: .85rem/1.8 monospace }}
.tokens > * {{ color: inherit; border: 1px solid #8888 }}
.tokens > mark {{ background: #4a64; text-decoration: underline }}
.tokens > .end {{ color: Canvas; background: CanvasText }}
img {{ max-width: 100% }}
</style></head>
<body><h1>Training data preview</h1>
<p>{description}</p>
<p class="tokens"><mark>trained</mark> <span>context</span> <s>truncated</s>
<span class="end">end token</span></p>
<p>Each box is a token, with its id as tooltip; tokens that share a character share a
box. ↵ is a line break.</p>
{rows}
<h2>All rows</h2>
<pre>
{summary}</pre>
<img alt="histogram of tokens per row" src="data:image/png;base64,{histogram}">
</body></html>
"""
PAGE_ROW = """<h2>{title}</h2>
<pre>
{source}</pre>
<pre class="tokens">
{tokens}</pre>
<p>{status}</p>"""


def write_html(preview: Preview, path: Path | str, max_rows: int) -> None:
    """Writes the first rows and the statistics of all as a self-contained page."""
    rows = []
    for number, row in enumerate(preview.rows[:max_rows], 1):
        title, source, status = map(escape, describe_row(preview, number))
        tokens = "".join(map(html_token, token_segments(preview.tokenizer, row)))
        rows.append(PAGE_ROW.format(title=title, source=source, tokens=tokens, status=status))
    image = io.BytesIO()
    histogram_figure(preview).savefig(image, format="png")
    page = PAGE.format(
        description=escape(sanitize(preview.format_description)),
        rows="\n".join(rows),
        summary="\n".join(map(escape, describe_all_rows(preview))),
        histogram=base64.b64encode(image.getvalue()).decode(),
    )
    with open_atomic(user_path(path)) as file:
        file.write(page)


def html_token(segment: TokenSegment) -> str:
    """HTML element of a segment."""
    tag, class_attr = STATE_STYLES[segment.state][2], ' class="end"' * segment.is_eot
    ids = " ".join(map(str, segment.ids))
    text = escape(sanitize(segment.text)).replace("\n", "↵\n")
    return f'<{tag}{class_attr} title="{ids}">{text}</{tag}>'
