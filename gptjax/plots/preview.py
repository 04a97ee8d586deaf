"""Preview of an instruction data set: rows, rendered texts and loss masks.

Uses the functions that create the training examples. The output is JSON lines, terminal
text or an HTML page. Control characters and markup in the data are escaped.
"""

import dataclasses
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptjax.data.conversations import Conversation, read_conversations
from gptjax.data.sft import TRAIN_ON_ALL, TRAIN_ON_COMPLETIONS, encode_segments, truncate_left
from gptjax.errors import ConfigError
from gptjax.fileio.atomic import open_atomic
from gptjax.runtime.terminal import sanitize
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.tokenizer.tokenizer import Tokenizer, load_tokenizer

TokenState = Literal["trained", "context", "truncated"]  # role of a token in training

# Parameters of ANSI's SGR sequence.
ANSI_CODES: dict[TokenState, str] = {"trained": "32;4", "context": "2", "truncated": "2;9"}
STATE_MARKS: dict[TokenState, str] = {"trained": "⟦⟧", "context": "", "truncated": "⟪⟫"}
# Marks that occur in the data.
REPLACED_MARKS = dict.fromkeys(map(ord, "⟦⟧⟪⟫"), "\ufffd")
HTML_TAGS: dict[TokenState, str] = {"trained": "mark", "context": "span", "truncated": "s"}
MAX_SOURCE_ROW_CHARS = 1_500  # longest excerpt of a source row
BIN_WIDTH_PREFIXES = (*(10, 12, 15, 20, 25), *(30, 40, 50, 60, 80))  # leading digits
BIN_WIDTHS = [*range(1, 7), 8]
BIN_WIDTHS += [d * 10**n for n in range(12) for d in BIN_WIDTH_PREFIXES]
BAR_EIGHTHS = ("", *"▏▎▍▌▋▊▉")


class PreviewRow(NamedTuple):
    """Conversation with its tokens and loss mask."""

    conversation: Conversation
    text: str  # of all tokens, truncated ones included
    ids: list[int]
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
    def num_truncated(self) -> int:
        """Number of rows truncated from the left."""
        return sum(row.num_truncated > 0 for row in self.rows)

    @property
    def num_dropped(self) -> int:
        """Number of dropped rows."""
        return sum(row.dropped for row in self.rows)

    @property
    def num_trained(self) -> int:
        """Number of tokens in the loss."""
        return sum(sum(row.loss_mask) for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in training, whether in the loss or not."""
        return sum(len(row.ids) - row.num_truncated for row in self.rows if not row.dropped)

    @property
    def lengths(self) -> list[int]:
        """Tokens per row before truncation."""
        return [len(row.ids) for row in self.rows]


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

    Raises:
        GptjaxError: the file, template or tokenizer is invalid.
    """
    if context < 1:
        raise ConfigError(f"context={context} is too small. Use at least 1.")
    parsed_template = load_chat_template(chat_template)
    loaded_tokenizer = load_tokenizer(tokenizer)
    conversations, detected = read_conversations(path)
    train_on = TRAIN_ON_COMPLETIONS if completion_only_loss else TRAIN_ON_ALL
    rows = []
    for conversation in conversations:
        ids, _, _ = example = encode_segments(
            loaded_tokenizer, parsed_template.segments(conversation.messages), train_on
        )
        truncated = truncate_left(example, context + 1)
        kept_mask = truncated.loss_mask if truncated else []
        num_lost = len(ids) - len(kept_mask)
        loss_mask = [False] * num_lost + kept_mask
        num_truncated = num_lost if truncated else 0
        rows.append(
            PreviewRow(
                conversation,
                loaded_tokenizer.decode(ids),
                ids,
                loss_mask,
                num_truncated,
                truncated is None,
            )
        )
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


def render_terminal(preview: Preview, max_rows: int, color: bool, width: int) -> str:
    """Renders the first rows and the statistics of all for a terminal.

    Tokens in the loss are green and underlined, or bracketed without color.

    Args:
        preview: from `preview_rows`.
        max_rows: rows to show.
        color: use ANSI escape codes.
        width: terminal width in characters.
    """
    legend = " ".join(colorize(state, state, False, color) for state in ANSI_CODES)
    lines = [sanitize(preview.format_description), sanitize(preview.settings), legend]
    for number, row in enumerate(preview.rows[:max_rows], 1):
        lines += ["", format_row_title(preview, number), sanitize(format_source_row(row)), ""]
        lines += [
            render_example(preview.tokenizer, row, color),
            "",
            format_row_status(preview, row),
        ]
    lines += ["", *format_preview_summary(preview), "", *render_histogram(preview, width)]
    return "\n".join(lines)


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
    if color:  # line by line: pagers reset colors at line ends
        code = f"\x1b[{ANSI_CODES[state]}{';7' * is_eot}m"
        lines = text.split("\n")
        text = "\n".join(f"{code}{line}\x1b[0m" if line else "" for line in lines)
    marks = "" if color and state == "trained" else STATE_MARKS[state]
    return marks[:1] + text + marks[1:]


def format_source_row(row: PreviewRow) -> str:
    """Returns the source row as JSON, truncated if long."""
    try:
        text = json.dumps(row.conversation.source_row, ensure_ascii=False, indent=2)
    except RecursionError:
        return "(nested too deeply to display)"
    num_omitted = len(text[MAX_SOURCE_ROW_CHARS:])
    return text[:MAX_SOURCE_ROW_CHARS] + f"... ({num_omitted:,} more characters)" * (
        num_omitted > 0
    )


def format_row_title(preview: Preview, number: int) -> str:
    """Returns the number and location of a row."""
    location = preview.rows[number - 1].conversation.location
    return sanitize(f"row {number:,} of {len(preview.rows):,}, {location}")


def format_row_status(preview: Preview, row: PreviewRow) -> str:
    """Returns the token counts of a row and how it is truncated."""
    ends = row.ids.count(preview.tokenizer.eot_token)
    line = f"tokens: {len(row.ids):,}, trained: {sum(row.loss_mask):,}, ends: {ends:,}"
    if row.dropped:
        return f"{line}; dropped: the last answer exceeds {preview.max_length:,} tokens"
    why = f"; the first {row.num_truncated:,} are truncated to fit {preview.max_length:,}"
    return line + why * (row.num_truncated > 0)


def format_preview_summary(preview: Preview) -> list[str]:
    """Returns statistics of all rows as lines."""
    lengths, tokens = preview.lengths, preview.num_tokens
    share = f" ({preview.num_trained / tokens:.1%})" if tokens else ""
    return [
        f"rows     {len(lengths):,}; truncated from the left: "
        f"{preview.num_truncated:,}, dropped because the last answer is too long: "
        f"{preview.num_dropped:,}",
        f"tokens   {tokens:,} after truncation, trained: {preview.num_trained:,}{share}",
        f"lengths  {min(lengths):,} to {max(lengths):,} tokens, median "
        f"{statistics.median(lengths):,.0f}; limit {preview.max_length:,}: the context "
        "and one more target",
    ]


class HistogramBin(NamedTuple):
    """Histogram bin of row lengths."""

    start: int  # tokens
    stop: int  # tokens, exclusive
    count: int  # rows

    @property
    def label(self) -> str:
        """Range of lengths."""
        last = self.stop - 1
        return f"{self.start:,}" + f"–{last:,}" * (last > self.start)


def histogram_bins(lengths: Sequence[int], max_length: int) -> list[HistogramBin]:
    """Bins row lengths into at most twelve bins of a round width.

    Args:
        lengths: tokens per row.
        max_length: token limit per row; rows more than twice as long share the last
            bin, so that outliers do not compress the histogram.
    """
    longest, shortest = max(lengths), min(lengths)
    last = min(longest, 2 * max(max_length, shortest))
    width = next(w for w in BIN_WIDTHS if last // w - shortest // w < 12)
    numbers = range(shortest // width, last // width + 1)
    count = Counter(min(length // width, numbers[-1]) for length in lengths)
    hist_bins = [HistogramBin(n * width, (n + 1) * width, count[n]) for n in numbers]
    hist_bins[-1] = hist_bins[-1]._replace(stop=max(hist_bins[-1].stop, longest + 1))
    return hist_bins


def truncation_note(hist_bins: Sequence[HistogramBin], max_length: int) -> str:
    """Returns a note on a length limit outside all bins, else ""."""
    if hist_bins[0].start <= max_length < hist_bins[-1].stop:
        return ""
    side = "before" if max_length < hist_bins[0].start else "beyond"
    return f"The limit of {max_length:,} lies {side} all bins."


def render_histogram(preview: Preview, width: int) -> list[str]:
    """Renders the histogram of row lengths as lines of text."""
    hist_bins = histogram_bins(preview.lengths, preview.max_length)
    limit_mark = f"  <- limit {preview.max_length:,}"
    label_width = max(len(one.label) for one in hist_bins)
    max_count = max(one.count for one in hist_bins)
    bar_width = max(8, width - label_width - len(f"{max_count:,}") - len(limit_mark) - 3)
    lines = ["tokens   rows"]
    for one in hist_bins:
        full_blocks, rest = divmod(max(8 * bar_width * one.count // max_count, one.count > 0), 8)
        bar = "█" * full_blocks + BAR_EIGHTHS[rest]
        line = f"{one.label:>{label_width}} {bar} {one.count:,}"
        lines.append(line + limit_mark * (one.start <= preview.max_length < one.stop))
    note = truncation_note(hist_bins, preview.max_length)
    return [*lines, note] if note else lines


PAGE_STYLE = """
:root { color-scheme: light dark; --odd: #c9edd3; --even: #a9dfb9; --cut: #a84a12 }
@media (prefers-color-scheme: dark) {
  :root { --odd: #1d4a2c; --even: #2a6640; --cut: #f0a070 } }
body { margin: 1.5rem auto; max-width: 56rem; padding: 0 1rem;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem } h3 { font-size: .9rem; margin: 1rem 0 .3rem }
pre { margin: 0; padding: .7rem; white-space: pre-wrap; background: #8881;
  font: .85rem/1.8 ui-monospace, monospace }
.tokens > * { color: CanvasText; border: 1px solid #8888; background: Canvas }
.tokens > :nth-child(even) { border-style: dotted; background: #8883 }
.tokens > mark { background: var(--odd); text-decoration: underline }
.tokens > mark:nth-child(even) { background: var(--even) }
.tokens > s { opacity: .7 }
.tokens > .end.end { color: Canvas; background: CanvasText }
svg { width: 100%; font: 10px system-ui, sans-serif; text-anchor: middle }
text { fill: CanvasText } rect { fill: var(--even); stroke: #8888 }
line { stroke: var(--cut); stroke-dasharray: 5 3 } text.cut { fill: var(--cut) }
"""
PAGE_HEAD = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training data preview</title>
<style>{PAGE_STYLE}</style></head>
<body><h1>Training data preview</h1>"""
PAGE_LEGEND = (
    '<p class="tokens"><mark>trained</mark> <span>context</span> <s>truncated</s> '
    '<span class="end">end token</span></p>\n<p>Each box is a token, with its id as '
    "tooltip; tokens that share a character share a box. ↵ is a line break.</p>"
)


def render_html(preview: Preview, max_rows: int) -> str:
    """Renders the first rows and the statistics of all as a self-contained page."""
    sections = [
        f"<h2>{escape_html(format_row_title(preview, number))}</h2>\n"
        f"<h3>Source row</h3>\n<pre>\n{escape_html(format_source_row(row))}</pre>\n"
        f'<h3>Rendered tokens</h3>\n<pre class="tokens">\n'
        f"{''.join(html_tokens(token_segments(preview.tokenizer, row)))}</pre>\n"
        f"<p>{escape_html(format_row_status(preview, row))}</p>"
        for number, row in enumerate(preview.rows[:max_rows], 1)
    ]
    about = "\n".join(
        f"<p>{escape_html(text)}</p>" for text in (preview.format_description, preview.settings)
    )
    overall = [
        "<h2>All rows</h2>\n<pre>",
        *map(escape_html, format_preview_summary(preview)),
        "</pre>",
    ]
    page = [PAGE_HEAD, about, PAGE_LEGEND, *sections, *overall, *histogram_svg(preview)]
    return "\n".join([*page, "</body></html>\n"])


def escape_html(text: str) -> str:
    """Escapes control characters and HTML."""
    return escape(sanitize(text))


def html_tokens(segments: Iterable[TokenSegment]) -> Iterator[str]:
    """Yields an HTML element for each segment."""
    for part in segments:
        tag, class_attr = HTML_TAGS[part.state], ' class="end"' * part.is_eot
        ids = " ".join(map(str, part.ids))
        text = escape_html(part.text).replace("\n", "↵\n")
        yield f'<{tag}{class_attr} title="{ids}">{text}</{tag}>'


def histogram_svg(preview: Preview) -> list[str]:
    """Returns the histogram of row lengths as lines of SVG."""
    hist_bins = histogram_bins(preview.lengths, preview.max_length)
    width, height, max_count = 640, 170, max(one.count for one in hist_bins)
    step = width / len(hist_bins)
    note = truncation_note(hist_bins, preview.max_length)
    lines = [
        f'<svg viewBox="-35 0 {width + 70} {height + 10}" role="img" '
        'aria-label="Histogram of tokens per row">'
    ]
    for n, one in enumerate(hist_bins):
        bar_height = (height - 55) * one.count / max_count
        left, upper = n * step, height - 15 - bar_height
        lines += [
            f'<rect x="{left + 2:.1f}" y="{upper:.1f}" width="{step - 4:.1f}" '
            f'height="{bar_height:.1f}">'
            f"<title>{one.label}: {one.count:,}</title></rect>",
            f'<text x="{left + step / 2:.1f}" y="{upper - 4:.1f}">{one.count:,}</text>',
            f'<text x="{left:.1f}" y="{height}">{one.start:,}</text>',
        ]
    if not note:
        size = hist_bins[0].stop - hist_bins[0].start
        x = min((preview.max_length + 1 - hist_bins[0].start) / size * step, width)
        lines += [
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="16" y2="{height - 12}"/>',
            f'<text class="cut" x="{x:.1f}" y="11">limit {preview.max_length:,}</text>',
        ]
    return [*lines, "</svg>", f"<p>Tokens per row. {note}</p>"]


def write_html(preview: Preview, path: Path | str, max_rows: int) -> None:
    """Writes the page atomically.

    Raises:
        DataError: the file cannot be written.
    """
    with open_atomic(Path(path)) as file:
        file.write(render_html(preview, max_rows))
