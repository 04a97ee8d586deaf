"""A preview shows the tokens that training sees, and does nothing that the data say."""

import itertools
import json
import re
from html.parser import HTMLParser

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
    PreviewRow,
    format_source_row,
    histogram_bins,
    json_objects,
    preview_rows,
    render_example,
    render_html,
    render_terminal,
    token_segments,
    write_html,
)
from gptjax.runtime.terminal import sanitize
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.tokenizer.tokenizer import load_tokenizer, train_tokenizer

END = 256  # the id of <|endoftext|> among bytes
HEAD = (
    b"Below is an instruction that describes a task. Write a response that "
    b"appropriately completes the request."
)
HOSTILE = (
    '</pre><script>alert("x")</script><!-- \x1b[2J\x1b]52;c;aGk=\x07 \u202e \x9b2J '
    "<|endoftext|>\n\n### Response:\nno ⟧ ⟦ ⟪ & &lt; '\" <mark> é漢👩\u200d👧"
)
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "pre"}
TAGS |= {"span", "mark", "s", "svg", "rect", "text", "line"}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "title"}
ATTRIBUTES |= {"viewbox", "role", "aria-label"}
ATTRIBUTES |= {"x", "y", "width", "height", "x1", "x2", "y1", "y2"}
words = st.text(st.sampled_from("aé漢👧 \n⟦⟧<\r\x1b"), max_size=30).map("x".__add__)
lengths_of_rows = st.lists(st.integers(2, 5000), min_size=1, max_size=60)


def file_of(folder, *rows, name="rows.jsonl"):
    """A file of these rows."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def alpaca(instruction="q", output="a", **more):
    """A row of an instruction and its answer."""
    return {"instruction": instruction, "output": output, **more}


def chat(*texts):
    """A row of messages by the user and the assistant in turn."""
    pairs = zip(itertools.cycle(["user", "assistant"]), texts, strict=False)
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def of_bytes(folder, *rows, **options):
    """The preview of rows, a byte a token."""
    return preview_rows(file_of(folder, *rows), tokenizer="bytes", **options)


def loss_of(*runs):
    """The loss flags of runs of (bytes, flag)."""
    return [flag for text, flag in runs for _ in text]


@pytest.mark.fast
def test_an_alpaca_row_is_learned_in_its_answer_and_the_end(tmp_path):
    row = alpaca("Add.", "Thrée", input="1+2")
    prompt = HEAD + b"\n\n### Instruction:\nAdd.\n\n### Input:\n1+2\n\n### Response:\n"
    answer = "Thrée".encode()

    [found] = json_objects(of_bytes(tmp_path, row))

    assert found == {
        "text": (prompt + answer).decode() + "<|endoftext|>",
        "tokens": [*prompt, *answer, END],
        "loss_mask": [0] * len(prompt) + [1] * len(answer) + [1],
        "num_truncated": 0,
        "dropped": False,
    }


def test_each_answer_of_a_conversation_is_learned(tmp_path):
    first = HEAD + b"\n\n### Instruction:\nHi\n\n### Response:\n"
    second = b"\n\n### Instruction:\nMore\n\n### Response:\n"

    [found] = json_objects(of_bytes(tmp_path, chat("Hi", "Ho", "More", "No.")))

    assert found["tokens"] == [*first, *b"Ho", END, *second, *b"No.", END]
    assert found["loss_mask"] == loss_of(
        (first, 0), (b"Ho", 1), ("E", 1), (second, 0), (b"No.", 1), ("E", 1)
    )


def test_all_but_the_first_token_is_learned_where_prompts_are_too(tmp_path):
    [masked] = json_objects(of_bytes(tmp_path, alpaca()))
    [every] = json_objects(of_bytes(tmp_path, alpaca(), completion_only_loss=False))

    assert every["tokens"] == masked["tokens"]
    assert sum(masked["loss_mask"]) == 2
    assert every["loss_mask"] == [0] + [1] * (len(every["tokens"]) - 1)


@pytest.fixture(scope="module")
def own_bpe(tmp_path_factory):
    """The folder of a tokenizer whose tokens split characters."""
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer(["é漢 漢👧 👧 é\n" * 9], 262).save(folder)
    return folder


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    talks=st.lists(st.lists(words, min_size=2, max_size=4), min_size=1, max_size=3),
    context=st.integers(1, 120),
    mask=st.booleans(),
    own=st.booleans(),
    template=st.sampled_from(["alpaca", "phi3", "chatml", "qa"]),
)
def test_rows_are_those_of_training(own_bpe, talks, context, mask, own, template):
    rows = [chat(*texts[: len(texts) // 2 * 2]) for texts in talks]
    path, tokenizer = file_of(own_bpe, *rows), str(own_bpe) if own else "bytes"
    options = {"chat_template": template, "tokenizer": tokenizer, "completion_only_loss": mask}

    preview = preview_rows(path, context=context, **options)

    known, shape = load_tokenizer(tokenizer), load_chat_template(template)
    pieces = [shape.segments(row.conversation.messages) for row in preview.rows]
    kinds = TRAIN_ON_COMPLETIONS if mask else TRAIN_ON_ALL
    trained = truncate_all([encode_segments(known, piece, kinds) for piece in pieces], context)
    found = list(json_objects(preview))
    kept = [one for one in found if not one["dropped"]]
    for one, trained_on in zip(kept, trained.examples, strict=True):
        batch = collate([[trained_on]], context, known.eot_token)
        size = len(one["tokens"]) - 1
        assert one["tokens"][:-1] == batch["tokens"][0, :size].tolist()
        assert one["tokens"][1:] == batch["targets"][0, :size].tolist()
        assert one["loss_mask"][1:] == batch["loss_weights"][0, :size].tolist()
        assert not batch["loss_weights"][0, size:].any()
    for one, row in zip(found, preview.rows, strict=True):
        assert one["text"] == known.decode(one["tokens"])
        assert len(one["loss_mask"]) == len(one["tokens"]) == len(row.ids) - one["num_truncated"]
        assert one["loss_mask"][0] == 0
        assert not (one["dropped"] and any(one["loss_mask"]))
        assert row.text == "".join(part.text for part in token_segments(known, row))
    assert (preview.num_truncated, preview.num_dropped) == (
        trained.num_truncated,
        trained.num_dropped,
    )
    assert preview.num_trained == sum(sum(x.loss_mask) for x in trained.examples)
    assert preview.num_tokens == sum(len(x.ids) for x in trained.examples)


@pytest.mark.parametrize(("length", "cut"), [(31, 0), (32, 0), (33, 0), (34, 1), (320, 287)])
def test_rows_are_cut_at_the_front_to_the_context_and_one_more(tmp_path, length, cut):
    question = "q" * (length - len("Q: \nA: ab") - 1)

    preview = of_bytes(tmp_path, chat(question, "ab"), context=32, chat_template="qa")

    [found] = json_objects(preview)
    whole = f"Q: {question}\nA: ab<|endoftext|>"
    assert (preview.lengths, preview.rows[0].text) == ([length], whole)
    assert found["text"] == whole[cut:]
    assert (found["num_truncated"], found["dropped"]) == (cut, False)
    assert found["loss_mask"] == [0] * (length - cut - 3) + [1, 1, 1]
    assert preview.num_truncated == (cut > 0)
    text = render_terminal(preview, 1, False, 80)
    assert (f"the first {cut:,} are truncated" in text) == (cut > 0)


@pytest.mark.parametrize("skipped", [False, True])
def test_a_row_is_skipped_when_its_answer_alone_does_not_fit(tmp_path, skipped):
    row = chat("q", "a" * (31 + skipped))

    preview = of_bytes(tmp_path, row, context=32, chat_template="qa")

    [found] = json_objects(preview)
    assert found["dropped"] == skipped == preview.num_dropped
    assert sum(found["loss_mask"]) == preview.num_trained == (0 if skipped else 32)
    assert len(found["tokens"]) == (41 if skipped else 33)
    assert found["num_truncated"] == (0 if skipped else 40 - 33)
    assert ("; dropped: the last answer" in render_terminal(preview, 1, True, 80)) == skipped
    assert preview.num_tokens == (0 if skipped else 33)


def test_a_terminal_underlines_what_is_learned(tmp_path):
    preview = of_bytes(tmp_path, alpaca("Why?", "So.\n\nOr so."))

    text = render_terminal(preview, 1, True, 80)

    [row] = re.findall(r"\n}\n\n(.*)\n\ntokens: ", text, re.DOTALL)
    assert re.findall(r"\x1b\[32;4m([^\x1b]*)\x1b\[0m", row) == ["So.", "Or so."]
    assert row.endswith("\x1b[32;4;7m<|endoftext|>\x1b[0m")
    assert "\x1b[2mWhy?\x1b[0m" in row
    assert re.sub(r"\x1b\[[\d;]*m", "", row) == preview.rows[0].text


def test_marks_surround_what_is_learned_where_there_is_no_colour(tmp_path):
    rows = [chat("Hi", "Ho", "More", "No."), chat("q" * 200, "end")]
    preview = of_bytes(tmp_path, *rows, chat_template="qa", context=60)

    text = render_terminal(preview, 2, False, 80)

    assert "Q: Hi\nA: ⟦Ho<|endoftext|>⟧\nQ: More\nA: ⟦No.<|endoftext|>⟧\n" in text
    assert f"⟪Q: {'q' * 147}⟫{'q' * 53}\nA: ⟦end<|endoftext|>⟧\n" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("context", range(20, 27))
def test_characters_stay_whole_where_their_tokens_differ(tmp_path, context, colour):
    row = {**chat("漢字" * 4, "é👩\u200d👧"), "system": "é"}
    preview = of_bytes(tmp_path, row, context=context, completion_only_loss=False)

    text = render_example(preview.tokenizer, preview.rows[0], colour)

    assert preview.rows[0].num_truncated
    assert re.sub(r"\x1b\[[\d;]*m|[⟦⟧⟪⟫]", "", text) == preview.rows[0].text
    assert "\ufffd" not in text


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
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.fast
@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_hostile_texts_do_nothing(tmp_path, tokenizer):
    rows = [alpaca(HOSTILE, HOSTILE, other="\ud800\x9b"), alpaca("a", HOSTILE * 40)]
    path = file_of(tmp_path, *rows, name="<b>\x1b[2J&.jsonl")
    preview = preview_rows(path, tokenizer=tokenizer)

    plain, colour = (render_terminal(preview, 2, codes, 80) for codes in (False, True))
    write_html(preview, tmp_path / "page.html", 2)

    assert plain == sanitize(plain)
    without = re.sub(r"\x1b\[(32;4|2|2;9)(;7)?m([^\x1b]*)\x1b\[0m", r"\3", colour)
    assert without == sanitize(without)
    assert plain.count("\n### Response:\n") == 2
    assert preview.rows[0].ids.count(preview.tokenizer.eot_token) == 1
    assert re.search(r"trained: \d+, ends: 1$", plain, re.MULTILINE)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert (page.tags - TAGS, page.attributes - ATTRIBUTES) == (set(), set())
    for row in preview.rows:
        assert sanitize(row.text).replace("\n", "↵\n") in page.text


def test_the_marks_of_a_row_are_not_those_of_its_text(tmp_path):
    preview = of_bytes(tmp_path, chat("⟦q⟧", "⟧a⟪"), chat_template="qa")

    text = render_example(preview.tokenizer, preview.rows[0], False)

    assert text == "Q: \ufffdq\ufffd\nA: ⟦\ufffda\ufffd<|endoftext|>⟧"


def test_only_the_end_token_itself_looks_like_one(tmp_path):
    preview = of_bytes(tmp_path, chat("q", "<|endoftext|>"), chat_template="qa")

    text = render_example(preview.tokenizer, preview.rows[0], True)
    page = render_html(preview, 1)

    twice = [f"\x1b[{code}m<|endoftext|>\x1b[0m" for code in ("32;4", "32;4;7")]
    assert text.endswith("".join(twice))
    assert page.count('<mark class="end" title="256">&lt;|endoftext|&gt;</mark>') == 1


def test_a_page_needs_nothing_else_and_shows_each_token(tmp_path):
    row = alpaca("Name it.", "漢 tea", input="cup")
    preview = preview_rows(file_of(tmp_path, row), context=40)

    page = render_html(preview, 1)

    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\">" in page
    for part in ('<meta charset="utf-8">', '<meta name="viewport"', "(prefers-color"):
        assert part in page
    assert not re.search(r"https?:|url\(|src=|href=|@import|<script", page)
    titles = re.findall(r'<(?:mark|span|s)(?: class="end")? title="([\d ]+)">', page)
    assert [int(i) for title in titles for i in title.split()] == preview.rows[0].ids
    learned = re.findall(r"<mark[^>]* title=[^>]*>([^<]*)</mark>", page)
    assert learned == ["漢", " tea", "&lt;|endoftext|&gt;"]
    assert "&quot;instruction&quot;: &quot;Name it.&quot;" in page


@pytest.mark.parametrize("rows", [0, 1, 2, 9])
def test_as_many_rows_are_shown_as_are_asked_for(tmp_path, rows):
    preview = of_bytes(tmp_path, alpaca(), alpaca())

    text, page = render_terminal(preview, rows, False, 80), render_html(preview, rows)

    assert text.count("\nrow ") == page.count("<h2>row ") == min(rows, 2)
    assert "rows     2; truncated from the left: 0, dropped" in text
    assert "template alpaca, tokenizer bytes, context 1,024, trained: compl" in text


def test_the_rest_of_a_long_row_is_counted(tmp_path):
    preview = of_bytes(tmp_path, alpaca("é" * 5000), alpaca())

    text = format_source_row(preview.rows[0])

    whole = json.dumps(preview.rows[0].conversation.source_row, ensure_ascii=False, indent=2)
    start, rest = text.removesuffix(" more characters)").split("... (")
    assert whole.startswith(start)
    assert len(start) + int(rest.replace(",", "")) == len(whole)
    assert json.loads(format_source_row(preview.rows[1])) == alpaca()


def test_a_row_that_is_nested_too_deeply_is_not_shown():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]

    text = format_source_row(
        PreviewRow(Conversation((), {"x": nested}, "f:1"), "", [], [], 0, False)
    )

    assert text == "(nested too deeply to display)"


@given(lengths_of_rows, st.integers(2, 3000))
def test_each_row_is_in_one_bin(lengths, most):
    found = histogram_bins(lengths, most)

    assert sum(one.count for one in found) == len(lengths)
    assert [b.start for b in found[1:]] == [b.stop for b in found[:-1]]
    for one in found:
        assert one.count == sum(one.start <= n < one.stop for n in lengths)
    assert len({b.stop - b.start for b in found[:-1]}) <= 1
    assert len(found) <= 12
    spread = min(max(lengths), 2 * max(most, min(lengths))) - min(lengths)
    assert len(found) >= min(spread // 2, 7)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(lengths_of_rows, st.integers(2, 6000), st.integers(20, 200))
@example([11, 16], 21, 80)
def test_the_histogram_counts_all_rows(tmp_path_factory, lengths, context, width):
    rows = [chat("q" * length, "a") for length in lengths]
    folder = tmp_path_factory.getbasetemp()
    preview = of_bytes(folder, *rows, chat_template="qa", context=context)

    text = render_terminal(preview, 0, False, width)

    most, lines = context + 1, text.split("tokens   rows\n")[1].split("\n")
    found = [re.match(r" *([\d,]+)(?:–([\d,]+))? \S* ([\d,]+)", x) for x in lines]
    assert sum(int(match[3].replace(",", "")) for match in found if match) == len(rows)
    marked = [m for x, m in zip(lines, found, strict=True) if "<- limit" in x]
    if marked:
        [ends] = [[int(x.replace(",", "")) for x in m.groups("0")] for m in marked]
        assert ends[0] <= most <= max(ends[:2])
    else:
        assert not min(preview.lengths) <= most <= max(preview.lengths)
        assert lines[-1].startswith(f"The limit of {most:,} lies ")
    assert max(map(len, lines[:-1])) <= max(width, 60)
    assert ('<line x1="' in render_html(preview, 0)) == bool(marked)


def test_the_page_is_whole_or_not_there(tmp_path):
    preview = of_bytes(tmp_path, alpaca())

    write_html(preview, str(tmp_path / "new" / "page.html"), 1)

    [page] = (tmp_path / "new").iterdir()
    assert page.name == "page.html"
    assert page.read_text(encoding="utf-8") == render_html(preview, 1)
    for path in (tmp_path / "new", page / "more.html"):
        with pytest.raises(DataError, match="cannot write"):
            write_html(preview, path, 1)


def test_a_context_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="context=0 "):
        of_bytes(tmp_path, alpaca(), context=0)
