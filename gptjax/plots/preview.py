"""Preview of an instruction data set: rows, rendered texts and loss masks.

Uses the functions that create the training examples. The output is JSON lines, terminal
text or an HTML page. Control characters and markup in the data are escaped.
"""

import base64
import dataclasses
import io
import json
import statistics
from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gptjax.data.conversations import Conversation, read_conversations
from gptjax.data.sft import TRAIN_ON_ALL, TRAIN_ON_COMPLETIONS, encode_segments, truncate_left
from gptjax.errors import ConfigError
from gptjax.fileio.atomic import open_atomic
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

    format_description: str  # file format and columns
    settings: str  # template, tokenizer, context and loss mask
    rows: tuple[PreviewRow, ...]
    tokenizer: Tokenizer
    context: int  # [T]

    @property
    def max_length(self) -> int:
        """Maximum tokens per row: the context and one more that is only a target."""
        return self.context + 1

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

    Args:
        path: a file, or the name of a built-in data set.
        chat_template: a name, or the path of a Jinja file.
        tokenizer: "gpt2", "bytes" or a folder.
        context: [T] maximum input tokens.
        completion_only_loss: train on assistant responses only.
    """
    if context < 1:
        raise ConfigError(f"context={context} is too small. Use at least 1.")
    template, loaded_tokenizer = load_chat_template(chat_template), load_tokenizer(tokenizer)
    conversations, detected = read_conversations(path)
    train_on = TRAIN_ON_COMPLETIONS if completion_only_loss else TRAIN_ON_ALL
    rows = []
    for conversation in conversations:
        example = encode_segments(
            loaded_tokenizer, template.segments(conversation.messages), train_on
        )
        kept = truncate_left(example, context + 1)
        num_lost = len(example.ids) - (len(kept.ids) if kept else 0)
        loss_mask = [False] * num_lost + (kept.loss_mask if kept else [])
        num_truncated = num_lost if kept else 0
        rows.append(PreviewRow(conversation, example.ids, loss_mask, num_truncated, not kept))
    settings = (
        f"template {chat_template}, tokenizer {tokenizer}, context {context:,}, "
        f"trained: {'completions' if completion_only_loss else 'all tokens'}"
    )
    return Preview(detected, settings, tuple(rows), loaded_tokenizer, context)


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
    if len(source) > MAX_SOURCE_ROW_CHARS:
        num_omitted = len(source) - MAX_SOURCE_ROW_CHARS
        source = f"{source[:MAX_SOURCE_ROW_CHARS]}... ({num_omitted:,} more characters)"
    ends = row.ids.count(preview.tokenizer.eot_token)
    status = f"tokens: {len(row.ids):,}, trained: {sum(row.loss_mask):,}, ends: {ends:,}"
    if row.dropped:
        status += f"; dropped: the last answer exceeds {preview.max_length:,} tokens"
    elif row.num_truncated:
        status += f"; the first {row.num_truncated:,} are truncated to fit {preview.max_length:,}"
    return sanitize(title), sanitize(source), status


def describe_all_rows(preview: Preview) -> list[str]:
    """Statistics of all rows as lines."""
    lengths, tokens = [len(row.ids) for row in preview.rows], preview.num_tokens
    share = f" ({preview.num_trained / tokens:.1%})" if tokens else ""
    truncated = sum(row.num_truncated > 0 for row in preview.rows)
    dropped = sum(row.dropped for row in preview.rows)
    return [
        f"rows     {len(lengths):,}; truncated from the left: {truncated:,}, dropped "
        f"because the last answer is too long: {dropped:,}",
        f"tokens   {tokens:,} after truncation, trained: {preview.num_trained:,}{share}",
        f"lengths  {min(lengths):,} to {max(lengths):,} tokens, median "
        f"{statistics.median(lengths):,.0f}; limit {preview.max_length:,}: the context "
        "and one more target",
    ]


def histogram_figure(preview: Preview) -> Figure:
    """Plots the histogram of row lengths, with the length limit.

    Rows more than twice as long as the limit or the shortest row share the last bin, so
    that they do not compress the others.
    """
    lengths = np.array([len(row.ids) for row in preview.rows])
    longest = min(lengths.max(), 2 * max(preview.max_length, lengths.min()))
    locator = MaxNLocator(11, integer=True, steps=[1, 2, 2.5, 5, 10])
    edges = np.array(locator.tick_values(lengths.min(), longest + 1), int)
    counts, _ = np.histogram(np.minimum(lengths, edges[-1] - 1), edges)
    figure, axes = new_figure(f"tokens per row, at most {lengths.max():,}", "rows")
    axes.stairs(counts, edges, fill=True, color=BLUE)
    limit = f"limit {preview.max_length:,}"
    if edges[0] <= preview.max_length < edges[-1]:
        axes.axvline(preview.max_length, color=ORANGE, linestyle="--", label=limit)
        axes.legend(frameon=False)
    else:
        axes.set_title(f"{limit}, outside the figure", fontsize=9, color=ORANGE)
    return figure


def render_terminal(preview: Preview, max_rows: int, color: bool) -> str:
    """Renders the first rows and the statistics of all for a terminal.

    Tokens in the loss are green and underlined, or bracketed without color.
    """
    legend = " ".join(colorize(state, state, False, color) for state in STATE_STYLES)
    lines = [sanitize(preview.format_description), sanitize(preview.settings), legend]
    for number, row in enumerate(preview.rows[:max_rows], 1):
        title, source, status = describe_row(preview, number)
        example = render_example(preview.tokenizer, row, color)
        lines += ["", title, source, "", example, "", status]
    return "\n".join([*lines, "", *describe_all_rows(preview)])


def render_example(tokenizer: Tokenizer, row: PreviewRow, color: bool) -> str:
    """Renders the text of a row with its loss mask highlighted."""
    segments = token_segments(tokenizer, row)
    return "".join(
        colorize("".join(part.text for part in run), state, end, color)
        for (state, end), run in groupby(segments, lambda x: (x.state, x.is_eot and color))
    )


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
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training data preview</title>
<style>
:root {{ color-scheme: light dark }}
body {{ margin: 1.5rem auto; max-width: 56rem; padding: 0 1rem;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }}
h2 {{ margin-top: 2.5rem }}
pre {{ padding: .7rem; white-space: pre-wrap; background: #8881;
  font: .85rem/1.8 ui-monospace, monospace }}
.tokens > * {{ color: inherit; border: 1px solid #8888 }}
.tokens > mark {{ background: #4a64; text-decoration: underline }}
.tokens > s {{ opacity: .7 }}
.tokens > .end {{ color: Canvas; background: CanvasText }}
img {{ max-width: 100% }}
</style></head>
<body><h1>Training data preview</h1>
<p>{description}</p>
<p>{settings}</p>
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


def render_html(preview: Preview, max_rows: int) -> str:
    """Renders the first rows and the statistics of all as a self-contained page."""
    rows = []
    for number, row in enumerate(preview.rows[:max_rows], 1):
        title, source, status = map(escape, describe_row(preview, number))
        tokens = "".join(html_tokens(token_segments(preview.tokenizer, row)))
        rows.append(PAGE_ROW.format(title=title, source=source, tokens=tokens, status=status))
    image = io.BytesIO()
    histogram_figure(preview).savefig(image, format="png")
    return PAGE.format(
        description=escape(sanitize(preview.format_description)),
        settings=escape(sanitize(preview.settings)),
        rows="\n".join(rows),
        summary="\n".join(map(escape, describe_all_rows(preview))),
        histogram=base64.b64encode(image.getvalue()).decode(),
    )


def html_tokens(segments: Iterable[TokenSegment]) -> Iterator[str]:
    """Yields an HTML element for each segment."""
    for part in segments:
        tag, class_attr = STATE_STYLES[part.state][2], ' class="end"' * part.is_eot
        ids = " ".join(map(str, part.ids))
        text = escape(sanitize(part.text)).replace("\n", "↵\n")
        yield f'<{tag}{class_attr} title="{ids}">{text}</{tag}>'


def write_html(preview: Preview, path: Path | str, max_rows: int) -> None:
    """Writes the page atomically."""
    with open_atomic(Path(path)) as file:
        file.write(render_html(preview, max_rows))
