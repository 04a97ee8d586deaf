"""A preview shows the tokens of training; text in the data cannot alter its form."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.data.conversations import Conversation
from gptjax.data.sft import TRAIN_ON_ALL, encode_conversations, truncate_all
from gptjax.errors import ConfigError, DataError
from gptjax.plots.preview import (
    Preview,
    PreviewRow,
    describe_row,
    histogram_figure,
    json_objects,
    preview_rows,
    render_html,
    render_terminal,
    write_html,
)
from gptjax.runtime.terminal import sanitize
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.tokenizer.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
HOSTILE = (
    '</pre><script>alert("x")</script><!-- \x1b[2J\x1b]52;c;aGk=\x07 \u202e \x9b2J '
    "<|endoftext|>\n\n### Response:\nno ⟧ ⟦ ⟪ & &lt; '\" {x} <mark> é漢👩\u200d👧"
)
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "span", "mark"}
TAGS |= {"s", "img"}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "title", "alt", "src"}


def write_rows(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*texts):
    """A row of messages by the user and the assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


def preview_bytes(folder, *rows, **options):
    """Preview of rows with one token per byte in short prompts."""
    options = {"tokenizer": "bytes", "chat_template": "qa"} | options
    return preview_rows(write_rows(folder, *rows), **options)


def test_rows_are_those_of_training(tmp_path):
    row = chat("Hi", "Hö", "More", "No.")
    prompts, answers = ["Q: Hi\nA: ", "\nQ: More\nA: "], ["Hö", "No."]
    ids, loss_mask = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids += [*prompt.encode(), *answer.encode(), 256]
        loss_mask += [0] * len(prompt) + [1] * (len(answer.encode()) + 1)

    [found] = json_objects(preview_bytes(tmp_path, row))

    assert (found["tokens"], found["loss_mask"]) == (ids, loss_mask)
    assert (found["num_truncated"], found["dropped"]) == (0, False)
    for context in range(1, 40):
        options = {"context": context, "completion_only_loss": False}
        preview = preview_bytes(tmp_path, row, chat("a", "b" * 30), chat("c", "d"), **options)
        conversations = [row.conversation for row in preview.rows]
        examples = encode_conversations(
            BYTES, load_chat_template("qa"), conversations, TRAIN_ON_ALL
        )
        trained = truncate_all(examples, context)
        rows = list(json_objects(preview))
        assert [(x["tokens"], x["loss_mask"]) for x in rows if not x["dropped"]] == [
            (x.ids, x.loss_mask) for x in trained.examples
        ]
        assert not any(sum(x["loss_mask"]) for x in rows if x["dropped"])
        assert sum(x["num_truncated"] > 0 for x in rows) == trained.num_truncated
        assert preview.num_trained == sum(sum(x.loss_mask) for x in trained.examples)
        assert preview.num_tokens == sum(len(x.ids) for x in trained.examples)


def test_terminal_marks_trained_and_truncated_tokens_with_and_without_color(tmp_path):
    rows = [chat("⟦Hi", "Ho\n\n<|endoftext|>", "More", "No."), chat("q" * 200, "end")]
    preview = preview_bytes(tmp_path, *rows, chat("q", "a" * 60), context=60)

    plain, color = (render_terminal(preview, 3, use_color) for use_color in (False, True))

    first = "Q: \ufffdHi\nA: ⟦Ho\n\n<|endoftext|><|endoftext|>⟧\nQ: More\nA: ⟦No.<|endoftext|>⟧\n"
    assert first in plain
    assert f"⟪Q: {'q' * 147}⟫{'q' * 53}\nA: ⟦end<|endoftext|>⟧\n" in plain
    assert "the first 150 are truncated" in plain
    assert "; dropped: the last answer" in plain
    # Each line has a code of its own, and only the end token is inverted.
    green, inverted = "\x1b[32;4m{}\x1b[0m".format, "\x1b[32;4;7m<|endoftext|>\x1b[0m"
    assert f"{green('Ho')}\n\n{green('<|endoftext|>')}{inverted}\n\x1b[2mQ: More" in color
    assert f"\x1b[2;9mQ: {'q' * 147}\x1b[0m\x1b[2m" in color


class Page(HTMLParser):
    """Elements, attributes and text of a page whose elements are all closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = set(), set(), [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_hostile_texts_change_neither_terminal_nor_page(tmp_path):
    rows = [
        {"instruction": HOSTILE, "output": HOSTILE, "other": "\ud800\x9b"},
        {"instruction": "a", "output": HOSTILE * 40},
    ]
    preview = preview_rows(write_rows(tmp_path, *rows, name="<b>\x1b[2J&.jsonl"), tokenizer="gpt2")

    plain, color = (render_terminal(preview, 2, codes) for codes in (False, True))
    write_html(preview, tmp_path / "page.html", 2)

    assert plain == sanitize(plain)
    uncolored = re.sub(r"\x1b\[(32;4|2|2;9)(;7)?m([^\x1b]*)\x1b\[0m", r"\3", color)
    assert uncolored == sanitize(uncolored)
    assert re.search(r"trained: \d+, ends: 1$", plain, re.MULTILINE)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert (page.tags - TAGS, page.attributes - ATTRIBUTES) == (set(), set())
    for row in preview.rows:
        assert sanitize(preview.tokenizer.decode(row.ids)).replace("\n", "↵\n") in page.text
    assert not re.search(r"https?:|url\(|href=|@import|<script|src=\"(?!data:image/png;)", text)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
    with pytest.raises(DataError, match=r"page\.html"):
        write_html(preview, tmp_path / "page.html" / "more.html", 1)


def test_page_shows_each_token_with_its_id_and_state(tmp_path):
    row = {"instruction": "Name it.", "output": "漢 tea<|endoftext|>", "input": "cup"}
    preview = preview_rows(write_rows(tmp_path, row, row), context=60)

    page = render_html(preview, 1)

    boxes = re.findall(r'<(mark|span|s)(?: class="end")? title="([\d ]+)">([^<]*)<', page)
    assert [int(i) for _, ids, _ in boxes for i in ids.split()] == preview.rows[0].ids
    trained = "".join(text for tag, _, text in boxes if tag == "mark")
    assert trained == "漢 tea" + 2 * "&lt;|endoftext|&gt;"
    assert page.count(' class="end" title="50256"') == page.count("<h2>row ") == 1
    assert "&quot;instruction&quot;: &quot;Name it.&quot;" in page
    with pytest.raises(ConfigError, match="context=0 "):
        preview_bytes(tmp_path, chat("q", "a"), context=0)


def make_preview(lengths, max_length, source=None):
    """A preview of rows with these numbers of tokens."""
    conversation = Conversation((), source or {}, "f:1")
    rows = [PreviewRow(conversation, [0] * n, [False] * n, 0, False) for n in lengths]
    return Preview("", "", tuple(rows), BYTES, max_length - 1)


def test_long_source_rows_are_shortened():
    _, source, _ = describe_row(make_preview([1], 8, {"x": "é" * 5000}), 1)

    start, rest = source.removesuffix(" more characters)").split("... (")
    assert len(start) + int(rest.replace(",", "")) == len('{\n  "x": ""\n}') + 5000


@settings(max_examples=10, derandomize=True)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(2, 6000))
@example([11], 21)
@example([*range(10, 40), 100_000], 21)
def test_histogram_counts_all_rows_and_marks_the_limit(lengths, max_length):
    axes = histogram_figure(make_preview(lengths, max_length)).axes[0]

    counts, edges, _ = axes.patches[0].get_data()
    below_last = [n for n in lengths if n < edges[-2]]
    assert counts[:-1].tolist() == np.histogram(below_last, edges[:-1])[0].tolist()
    assert sum(counts) == len(lengths)
    assert len(counts) <= 12
    assert len({*np.diff(edges)}) == 1
    is_inside = bool(edges[0] <= max_length < edges[-1])
    assert [list(line.get_xdata()) for line in axes.lines] == [[max_length] * 2] * is_inside
