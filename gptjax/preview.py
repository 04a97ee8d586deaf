"""What a file of instructions becomes: each row, its text, and the learned tokens.

Made by the same functions as the examples of a training run, and shown as JSON lines,
in a terminal or as a page. Texts of the data are shown, never acted on.
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
from gptjax.data.examples import ANSWERS, EVERYTHING, encode, fitted
from gptjax.data.labelling import new_file
from gptjax.errors import ConfigError
from gptjax.template import read_template
from gptjax.terminal import printable
from gptjax.tokenizer import Tokenizer, load

State = Literal["learned", "given", "cut"]  # what training does with a token

CODES: dict[State, str] = {"learned": "32;4", "given": "2", "cut": "2;9"}  # of ANSI
MARKS: dict[State, str] = {"learned": "⟦⟧", "given": "", "cut": "⟪⟫"}
OTHERS = dict.fromkeys(map(ord, "⟦⟧⟪⟫"), "\ufffd")  # marks in the data itself
TAGS: dict[State, str] = {"learned": "mark", "given": "span", "cut": "s"}
RAW_CHARACTERS = 1_500  # shown of a row as it was read
DIGITS = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80)  # that round sizes of bins start with
SIZES = [1, 2, 3, 4, 5, 6, 8, *(d * 10**n for n in range(12) for d in DIGITS)]
EIGHTHS = ("", *"▏▎▍▌▋▊▉")


class Row(NamedTuple):
    """A conversation and what becomes of it."""

    conversation: Conversation
    text: str  # of all its tokens, also those that are cut off
    ids: list[int]
    learned: list[bool]  # of each token, whether its prediction counts in training
    cut: int  # tokens at the front that do not fit
    skipped: bool  # its last answer alone does not fit


@dataclasses.dataclass(frozen=True)
class Preview:
    """The rows of a file as training sees them; made by `preview_rows`."""

    detected: str  # what was taken for what
    asked: str  # template, tokenizer, context, what is learned
    rows: tuple[Row, ...]
    tokenizer: Tokenizer
    context: int  # [T]

    @property
    def most(self) -> int:
        """Tokens that fit: the inputs, and one more that is only predicted."""
        return self.context + 1

    @property
    def truncated(self) -> int:
        """How many rows lose tokens at their front."""
        return sum(row.cut > 0 for row in self.rows)

    @property
    def skipped(self) -> int:
        """How many rows are left out."""
        return sum(row.skipped for row in self.rows)

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return sum(sum(row.learned) for row in self.rows)

    @property
    def tokens(self) -> int:
        """How many tokens there are to train on, learned or not."""
        return sum(len(row.ids) - row.cut for row in self.rows if not row.skipped)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row before any is cut off."""
        return [len(row.ids) for row in self.rows]


def preview_rows(
    path: Path | str,
    *,
    template: str = "alpaca",
    tokenizer: str = "gpt2",
    context: int = 1024,
    mask_prompt: bool = True,
) -> Preview:
    """What training makes of the conversations in a file.

    Args:
        path: of the file, or the name of a data set.
        template: its name, or the path of a Jinja file.
        tokenizer: "gpt2", "bytes" or a folder.
        context: [T] tokens that the model reads at most.
        mask_prompt: whether only answers are learned.

    Raises:
        GptjaxError: file, template or tokenizer cannot be used.
    """
    if context < 1:
        raise ConfigError(f"context={context} holds no text. Choose 1 or more.")
    shape, known = read_template(template), load(tokenizer)
    conversations, detected = read_conversations(path)
    kinds = ANSWERS if mask_prompt else EVERYTHING
    rows = []
    for one in conversations:
        ids, _, _ = example = encode(known, shape.pieces(one.messages), kinds)
        fit = fitted(example, context + 1)
        kept = fit.learned if fit else []
        lost = len(ids) - len(kept)
        learned = [False] * lost + kept
        cut = lost if fit else 0
        rows.append(Row(one, known.decode(ids), ids, learned, cut, fit is None))
    asked = (
        f"template {template}, tokenizer {tokenizer}, context {context:,}, "
        f"learned: {'answers' if mask_prompt else 'everything'}"
    )
    return Preview(detected, asked, tuple(rows), known, context)


def json_objects(preview: Preview) -> Iterator[dict[str, Any]]:
    """Each row as training sees it; "loss" is 1 for tokens whose prediction counts."""
    for row in preview.rows:
        tokens = row.ids[row.cut :]
        yield {
            "text": preview.tokenizer.decode(tokens),
            "tokens": tokens,
            "loss": list(map(int, row.learned[row.cut :])),
            "cut": row.cut,
            "skipped": row.skipped,
        }


class Part(NamedTuple):
    """The fewest tokens in a row whose text is whole characters."""

    text: str
    ids: list[int]
    state: State  # of the first of them
    end: bool  # it is the control token <|endoftext|>, not these characters


def parts(tokenizer: Tokenizer, row: Row) -> Iterator[Part]:
    """The row's text by tokens; those that share a character stay together."""
    start = 0
    for text, ids in tokenizer.characters(row.ids):
        state: State = "learned" if row.learned[start] else "given"
        if start < row.cut:
            state = "cut"
        yield Part(text, ids, state, ids[-1] == tokenizer.eot)
        start += len(ids)


def shown(preview: Preview, rows: int, colour: bool, width: int) -> str:
    """The first `rows` rows and the numbers of all, for a terminal of that width.

    What is learned is green and underlined, or between marks.
    """
    legend = " ".join(painted(state, state, False, colour) for state in CODES)
    lines = [printable(preview.detected), printable(preview.asked), legend]
    for number, row in enumerate(preview.rows[:rows], 1):
        lines += ["", title(preview, number), printable(raw(row)), ""]
        lines += [rendered(preview.tokenizer, row, colour), "", status(preview, row)]
    lines += ["", *summary(preview), "", *histogram(preview, width)]
    return "\n".join(lines)


def rendered(tokenizer: Tokenizer, row: Row, colour: bool) -> str:
    """The row's text with what is learned told apart."""
    found = parts(tokenizer, row)
    return "".join(
        painted("".join(part.text for part in run), state, end, colour)
        for (state, end), run in groupby(found, lambda x: (x.state, x.end and colour))
    )


def painted(text: str, state: State, end: bool, colour: bool) -> str:
    """A harmless text with the codes or marks of its state."""
    text = printable(text).translate(OTHERS)
    if colour:  # each line by itself, as pagers want it
        code = f"\x1b[{CODES[state]}{';7' * end}m"
        lines = text.split("\n")
        text = "\n".join(f"{code}{line}\x1b[0m" if line else "" for line in lines)
    marks = "" if colour and state == "learned" else MARKS[state]
    return marks[:1] + text + marks[1:]


def raw(row: Row) -> str:
    """The row as it was read, as JSON; the rest of a long one is counted."""
    try:
        text = json.dumps(row.conversation.row, ensure_ascii=False, indent=2)
    except RecursionError:
        return "(nested too deeply to be shown)"
    rest = len(text[RAW_CHARACTERS:])
    return text[:RAW_CHARACTERS] + f"... ({rest:,} more characters)" * (rest > 0)


def title(preview: Preview, number: int) -> str:
    """Which row it is, and where it stands."""
    place = preview.rows[number - 1].conversation.place
    return printable(f"row {number:,} of {len(preview.rows):,}, {place}")


def status(preview: Preview, row: Row) -> str:
    """What becomes of a row, in numbers."""
    ends = row.ids.count(preview.tokenizer.eot)
    line = f"tokens: {len(row.ids):,}, learned: {sum(row.learned):,}, ends: {ends:,}"
    if row.skipped:
        return f"{line}; skipped, as its last answer does not fit {preview.most:,}"
    why = f"; the first {row.cut:,} are cut off, to fit {preview.most:,}"
    return line + why * (row.cut > 0)


def summary(preview: Preview) -> list[str]:
    """The numbers of all rows, as lines."""
    lengths, tokens = preview.lengths, preview.tokens
    share = f" ({preview.learned / tokens:.1%})" if tokens else ""
    return [
        f"rows     {len(lengths):,}; cut at their front: {preview.truncated:,}, "
        f"skipped as the last answer does not fit: {preview.skipped:,}",
        f"tokens   {tokens:,} to train on, learned: {preview.learned:,}{share}",
        f"lengths  {min(lengths):,} to {max(lengths):,} tokens, median "
        f"{statistics.median(lengths):,.0f}; cut at {preview.most:,}, the context and "
        "one that is only predicted",
    ]


class Bin(NamedTuple):
    """Rows of similar length."""

    start: int  # tokens
    stop: int  # tokens, the first number that is too many
    count: int  # rows

    @property
    def label(self) -> str:
        """Its lengths."""
        last = self.stop - 1
        return f"{self.start:,}" + f"–{last:,}" * (last > self.start)


def bins(lengths: Sequence[int], most: int) -> list[Bin]:
    """The rows by length, in at most twelve steps of a round size.

    Args:
        lengths: tokens of each row.
        most: tokens that fit. Much longer rows all go into the last bin, so that they
            leave room for the others.
    """
    longest, shortest = max(lengths), min(lengths)
    last = min(longest, 2 * max(most, shortest))
    width = next(w for w in SIZES if last // w - shortest // w < 12)
    numbers = range(shortest // width, last // width + 1)
    count = Counter(min(length // width, numbers[-1]) for length in lengths)
    found = [Bin(n * width, (n + 1) * width, count[n]) for n in numbers]
    found[-1] = found[-1]._replace(stop=max(found[-1].stop, longest + 1))
    return found


def cut_note(found: Sequence[Bin], most: int) -> str:
    """Where the cut is if it is in no bin, else nothing."""
    if found[0].start <= most < found[-1].stop:
        return ""
    side = "before" if most < found[0].start else "beyond"
    return f"The cut at {most:,} is {side} all of these."


def histogram(preview: Preview, width: int) -> list[str]:
    """How many rows have which length, as lines of bars."""
    found = bins(preview.lengths, preview.most)
    mark = f"  <- cut at {preview.most:,}"
    longest = max(len(one.label) for one in found)
    top = max(one.count for one in found)
    room = max(8, width - longest - len(f"{top:,}") - len(mark) - 3)
    lines = ["tokens   rows"]
    for one in found:
        filled, rest = divmod(max(8 * room * one.count // top, one.count > 0), 8)
        line = f"{one.label:>{longest}} {'█' * filled}{EIGHTHS[rest]} {one.count:,}"
        lines.append(line + mark * (one.start <= preview.most < one.stop))
    note = cut_note(found, preview.most)
    return [*lines, note] if note else lines


STYLE = """
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
HEAD = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the data become</title>
<style>{STYLE}</style></head>
<body><h1>What the data become</h1>"""
LEGEND = (
    '<p class="tokens"><mark>learned</mark> <span>given</span> <s>cut</s> '
    '<span class="end">end token</span></p>\n<p>A box is a token, with its id as '
    "tooltip; tokens that share a character share a box. ↵ is a line break.</p>"
)


def html(preview: Preview, rows: int) -> str:
    """The first `rows` rows and the numbers of all, as a page that loads nothing."""
    sections = [
        f"<h2>{safe(title(preview, number))}</h2>\n"
        f"<h3>Row of the file</h3>\n<pre>\n{safe(raw(row))}</pre>\n"
        f'<h3>Rendered, as tokens</h3>\n<pre class="tokens">\n'
        f"{''.join(boxes(parts(preview.tokenizer, row)))}</pre>\n"
        f"<p>{safe(status(preview, row))}</p>"
        for number, row in enumerate(preview.rows[:rows], 1)
    ]
    about = f"<p>{safe(preview.detected)}</p>\n<p>{safe(preview.asked)}</p>"
    every = ["<h2>All rows</h2>\n<pre>", *map(safe, summary(preview)), "</pre>"]
    page = [HEAD, about, LEGEND, *sections, *every, *picture(preview)]
    return "\n".join([*page, "</body></html>\n"])


def safe(text: str) -> str:
    """Text for a page."""
    return escape(printable(text))


def boxes(found: Iterable[Part]) -> Iterator[str]:
    """An element for each part of a row's text."""
    for part in found:
        tag, kind = TAGS[part.state], ' class="end"' * part.end
        ids = " ".join(map(str, part.ids))
        text = safe(part.text).replace("\n", "↵\n")
        yield f'<{tag}{kind} title="{ids}">{text}</{tag}>'


def picture(preview: Preview) -> list[str]:
    """The histogram as SVG."""
    found = bins(preview.lengths, preview.most)
    width, height, top = 640, 170, max(one.count for one in found)
    step = width / len(found)
    note = cut_note(found, preview.most)
    lines = [
        f'<svg viewBox="-35 0 {width + 70} {height + 10}" role="img" '
        'aria-label="How many rows have how many tokens">'
    ]
    for n, one in enumerate(found):
        tall = (height - 55) * one.count / top
        left, upper = n * step, height - 15 - tall
        lines += [
            f'<rect x="{left + 2:.1f}" y="{upper:.1f}" width="{step - 4:.1f}" '
            f'height="{tall:.1f}"><title>{one.label}: {one.count:,}</title></rect>',
            f'<text x="{left + step / 2:.1f}" y="{upper - 4:.1f}">{one.count:,}</text>',
            f'<text x="{left:.1f}" y="{height}">{one.start:,}</text>',
        ]
    if not note:
        size = found[0].stop - found[0].start
        x = min((preview.most + 1 - found[0].start) / size * step, width)
        lines += [
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="16" y2="{height - 12}"/>',
            f'<text class="cut" x="{x:.1f}" y="11">cut at {preview.most:,}</text>',
        ]
    return [*lines, "</svg>", f"<p>Tokens of each row. {note}</p>"]


def write_html(preview: Preview, path: Path | str, rows: int) -> None:
    """Writes the page, all of it or none.

    Raises:
        DataError: the file cannot be written.
    """
    with new_file(Path(path)) as file:
        file.write(html(preview, rows))
