"""A preview shows the tokens of training; text in the data cannot alter its form."""

import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.data.conversations import Conversation
from gptjax.data.sft import (
    TRAIN_ON_ALL,
    TRAIN_ON_COMPLETIONS,
    collate,
    encode_segments,
    truncate_all,
)
from gptjax.errors import ConfigError, DataError
from gptjax.plots.preview import (
    REPLACED_MARKS,
    Preview,
    PreviewRow,
    describe_row,
    histogram_figure,
    json_objects,
    length_histogram,
    preview_rows,
    render_example,
    render_html,
    render_terminal,
    write_html,
)
from gptjax.runtime.terminal import sanitize
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.tokenizer.tokenizer import load_tokenizer, train_tokenizer

HEADER = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request."
)
HOSTILE = (
    '</pre><script>alert("x")</script><!-- \x1b[2J\x1b]52;c;aGk=\x07 \u202e \x9b2J '
    "<|endoftext|>\n\n### Response:\nno ⟧ ⟦ ⟪ & &lt; '\" {x} <mark> é漢👩\u200d👧"
)
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "span", "mark"}
TAGS |= {"s", "img"}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "title", "alt", "src"}
words = st.text(st.sampled_from("aé漢👧 \n⟦⟧<\r\x1b"), max_size=30).map("x".__add__)


def write_rows(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*texts):
    """A row of messages by the user and the assistant in turn."""
    pairs = zip(itertools.cycle(["user", "assistant"]), texts, strict=False)
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def preview_bytes(folder, *rows, **options):
    """Preview of rows with one token per byte."""
    return preview_rows(write_rows(folder, *rows), tokenizer="bytes", **options)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("row", "prompts", "answers"),
    [
        (
            {"instruction": "Add.", "output": "Thrée", "input": "1+2"},
            [f"{HEADER}\n\n### Instruction:\nAdd.\n\n### Input:\n1+2\n\n### Response:\n"],
            ["Thrée"],
        ),
        (
            chat("Hi", "Ho", "More", "No."),
            [
                f"{HEADER}\n\n### Instruction:\nHi\n\n### Response:\n",
                "\n\n### Instruction:\nMore\n\n### Response:\n",
            ],
            ["Ho", "No."],
        ),
    ],
)
def test_rows_are_rendered_by_the_template_and_trained_on_the_answers(
    tmp_path, row, prompts, answers
):
    [found] = json_objects(preview_bytes(tmp_path, row))
    [everything] = json_objects(preview_bytes(tmp_path, row, completion_only_loss=False))

    ids, loss_mask = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids += [*prompt.encode(), *answer.encode(), 256]
        loss_mask += [0] * len(prompt.encode()) + [1] * (len(answer.encode()) + 1)
    assert (found["tokens"], found["loss_mask"]) == (ids, loss_mask)
    assert (found["num_truncated"], found["dropped"]) == (0, False)
    assert (everything["tokens"], everything["loss_mask"]) == (ids, [0] + [1] * (len(ids) - 1))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """The folder of a tokenizer whose tokens split characters."""
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer(["é漢 漢👧 👧 é\n" * 9], 262).save(folder)
    return folder


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    chats=st.lists(st.lists(words, min_size=2, max_size=4), min_size=1, max_size=3),
    context=st.integers(1, 120),
    completion_only_loss=st.booleans(),
    own=st.booleans(),
    template=st.sampled_from(["alpaca", "phi3", "chatml", "qa"]),
)
def test_rows_are_those_of_training(bpe, chats, context, completion_only_loss, own, template):
    rows = [chat(*texts[: len(texts) // 2 * 2]) for texts in chats]
    path, name = write_rows(bpe, *rows), str(bpe) if own else "bytes"
    options = {"tokenizer": name, "completion_only_loss": completion_only_loss}

    preview = preview_rows(path, chat_template=template, context=context, **options)

    tokenizer, chat_template = load_tokenizer(name), load_chat_template(template)
    train_on = TRAIN_ON_COMPLETIONS if completion_only_loss else TRAIN_ON_ALL
    segments = [chat_template.segments(row.conversation.messages) for row in preview.rows]
    trained = truncate_all([encode_segments(tokenizer, s, train_on) for s in segments], context)
    found = list(json_objects(preview))
    kept = [one for one in found if not one["dropped"]]
    for one, trained_on in zip(kept, trained.examples, strict=True):
        batch = collate([[trained_on]], context, tokenizer.eot_token)
        size = len(one["tokens"]) - 1
        assert one["tokens"][:-1] == batch["tokens"][0, :size].tolist()
        assert one["tokens"][1:] == batch["targets"][0, :size].tolist()
        assert one["loss_mask"][1:] == batch["loss_weights"][0, :size].tolist()
        assert not batch["loss_weights"][0, size:].any()
    for one, row in zip(found, preview.rows, strict=True):
        assert len(one["loss_mask"]) == len(one["tokens"]) == len(row.ids) - one["num_truncated"]
        assert one["loss_mask"][0] == 0
        assert not (one["dropped"] and any(one["loss_mask"]))
        # Characters stay whole, however their tokens differ.
        text = re.sub(r"\x1b\[[\d;]*m", "", render_example(tokenizer, row, True))
        assert text == sanitize(tokenizer.decode(row.ids)).translate(REPLACED_MARKS)
    assert sum(row.num_truncated > 0 for row in preview.rows) == trained.num_truncated
    assert sum(row.dropped for row in preview.rows) == trained.num_dropped
    assert preview.num_trained == sum(sum(x.loss_mask) for x in trained.examples)
    assert preview.num_tokens == sum(len(x.ids) for x in trained.examples)


@pytest.mark.parametrize(
    ("question", "answer", "truncated", "trained"),
    [
        (23, 2, 0, 3),  # 33 tokens: the context and one more target
        (24, 2, 1, 3),
        (300, 2, 277, 3),
        (1, 31, 7, 32),
        (1, 32, None, 0),  # the answer alone does not fit
    ],
)
def test_rows_are_truncated_from_the_left_to_the_context(
    tmp_path, question, answer, truncated, trained
):
    row = chat("q" * question, "a" * answer)

    preview = preview_bytes(tmp_path, row, context=32, chat_template="qa")

    [found] = json_objects(preview)
    text = render_terminal(preview, 1, False, 80)
    whole = f"Q: {'q' * question}\nA: {'a' * answer}<|endoftext|>"
    assert found["text"] == whole[truncated or 0 :]
    assert (found["num_truncated"], found["dropped"]) == (truncated or 0, truncated is None)
    assert sum(found["loss_mask"]) == trained
    assert (f"the first {truncated} are truncated" in text) == bool(truncated)
    assert ("; dropped: the last answer" in text) == (truncated is None)


def test_terminal_marks_trained_and_truncated_tokens_with_and_without_color(tmp_path):
    rows = [chat("⟦Hi", "Ho\n\n<|endoftext|>", "More", "No."), chat("q" * 200, "end")]
    preview = preview_bytes(tmp_path, *rows, chat_template="qa", context=60)

    plain, color = (render_terminal(preview, 2, use_color, 80) for use_color in (False, True))

    first = "Q: \ufffdHi\nA: ⟦Ho\n\n<|endoftext|><|endoftext|>⟧\nQ: More\nA: ⟦No.<|endoftext|>⟧\n"
    assert first in plain
    assert f"⟪Q: {'q' * 147}⟫{'q' * 53}\nA: ⟦end<|endoftext|>⟧\n" in plain
    assert "\x1b" not in plain
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


@pytest.mark.fast
def test_hostile_texts_change_neither_terminal_nor_page(tmp_path):
    rows = [
        {"instruction": HOSTILE, "output": HOSTILE, "other": "\ud800\x9b"},
        {"instruction": "a", "output": HOSTILE * 40},
    ]
    path = write_rows(tmp_path, *rows, name="<b>\x1b[2J&.jsonl")
    preview = preview_rows(path, tokenizer="gpt2")

    plain, color = (render_terminal(preview, 2, codes, 80) for codes in (False, True))
    write_html(preview, tmp_path / "page.html", 2)

    assert plain == sanitize(plain)
    uncolored = re.sub(r"\x1b\[(32;4|2|2;9)(;7)?m([^\x1b]*)\x1b\[0m", r"\3", color)
    assert uncolored == sanitize(uncolored)
    assert re.search(r"trained: \d+, ends: 1$", plain, re.MULTILINE)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert (page.tags - TAGS, page.attributes - ATTRIBUTES) == (set(), set())
    for row in preview.rows:
        tokens_text = sanitize(preview.tokenizer.decode(row.ids))
        assert tokens_text.replace("\n", "↵\n") in page.text
    assert not re.search(r"https?:|url\(|href=|@import|<script|src=\"(?!data:image/png;)", text)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text


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


def test_long_source_rows_are_shortened_and_deeply_nested_ones_are_omitted():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    rows = [
        PreviewRow(Conversation((), {"x": value}, "f:1"), [], [], 0, False)
        for value in ("é" * 5000, nested)
    ]
    preview = Preview("", "", tuple(rows), load_tokenizer("bytes"), 8)

    (_, long, _), (_, deep, _) = (describe_row(preview, number) for number in (1, 2))

    start, rest = long.removesuffix(" more characters)").split("... (")
    assert len(start) + int(rest.replace(",", "")) == len('{\n  "x": ""\n}') + 5000
    assert deep == "(nested too deeply to display)"


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(2, 6000))
@example([11], 21)
@example([*range(10, 40), 100_000], 21)
def test_histogram_counts_all_rows_and_marks_the_limit(lengths, max_length):
    rows = [PreviewRow(Conversation((), {}, ""), [0] * n, [False] * n, 0, False) for n in lengths]
    preview = Preview("", "", tuple(rows), load_tokenizer("bytes"), max_length - 1)

    counts, edges = length_histogram(preview)
    lines = render_terminal(preview, 0, False, 80).split("\n")

    assert sum(counts) == len(lengths)
    below_last = [n for n in lengths if n < edges[-2]]
    assert counts[:-1].tolist() == np.histogram(below_last, edges[:-1])[0].tolist()
    assert len(counts) <= 12
    assert len({*np.diff(edges)}) == 1
    start = next(n for n, line in enumerate(lines) if line.endswith("tokens rows")) + 1
    found = [re.match(r" *([\d,]+)\+? █* ([\d,]+)", line) for line in lines[start:]]
    numbers = [[int(x.replace(",", "")) for x in match.groups()] for match in found if match]
    assert numbers == [[a, b] for a, b in zip(edges, counts, strict=False)]
    marked = [n for n, line in enumerate(lines[start:]) if "<- limit" in line]
    inside = bool(edges[0] <= max_length < edges[-1])
    assert len(marked) == inside
    assert all(edges[n] <= max_length < edges[n + 1] for n in marked)
    assert max(map(len, lines[start:])) <= 80
    axes = histogram_figure(preview).axes[0]
    assert [list(line.get_xdata()) for line in axes.lines] == [[max_length] * 2] * inside


def test_page_is_written_whole_or_not_at_all(tmp_path):
    preview = preview_bytes(tmp_path, chat("q", "a"))

    write_html(preview, str(tmp_path / "new" / "page.html"), 1)

    [page] = (tmp_path / "new").iterdir()
    assert page.read_text(encoding="utf-8") == render_html(preview, 1)
    with pytest.raises(DataError, match=r"page\.html"):
        write_html(preview, page / "more.html", 1)
    with pytest.raises(ConfigError, match="context=0 "):
        preview_bytes(tmp_path, chat("q", "a"), context=0)
