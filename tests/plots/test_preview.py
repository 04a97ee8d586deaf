"""A preview shows the tokens of training; text in the data cannot alter its form."""

import html
import itertools
import json
import re

from gptjax.data.sft import TRAIN_ON_ALL, encode_conversations, truncate_all
from gptjax.plots.preview import json_objects, preview_rows, render_terminal, write_html
from gptjax.runtime.terminal import sanitize
from gptjax.tokenizer.chat_template import load_chat_template

HOSTILE = (
    '</pre><script>alert("x")</script><!-- \x1b[2J\x1b]52;c;aGk=\x07 \u202e \x9b2J '
    "<|endoftext|>\n\n### Response:\nno ⟧ ⟦ ⟪ & &lt; '\" {x} <mark> é漢👩\u200d👧"
)
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "span", "mark"}
TAGS |= {"s", "img"}


def preview_of(folder, *rows, name="rows.jsonl", **options):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return preview_rows(path, **options)


def preview_chats(folder, *chats, **options):
    """Preview of messages by user and assistant in turn, one token per byte."""
    rows = []
    for texts in chats:
        roles = itertools.cycle(["user", "assistant"])
        messages = [{"role": next(roles), "content": text} for text in texts]
        rows.append({"messages": messages})
    return preview_of(folder, *rows, **{"tokenizer": "bytes", "chat_template": "qa"} | options)


def test_rows_are_those_of_training(tmp_path):
    chats = [("Hi", "Hö", "More", "No."), ("a", "b" * 30), ("c", "d")]
    for context in range(1, 40, 2):
        options = {"context": context, "completion_only_loss": False}
        preview = preview_chats(tmp_path, *chats, **options)
        conversations = [row.conversation for row in preview.rows]
        template = load_chat_template("qa")
        examples = encode_conversations(preview.tokenizer, template, conversations, TRAIN_ON_ALL)
        trained = truncate_all(examples, context)
        rows = list(json_objects(preview))
        assert [(x["tokens"], x["loss_mask"]) for x in rows if not x["dropped"]] == [
            (x.ids, x.loss_mask) for x in trained.examples
        ]
        assert not any(sum(x["loss_mask"]) for x in rows if x["dropped"])
        assert preview.num_trained == sum(sum(x.loss_mask) for x in trained.examples)


def test_terminal_marks_trained_and_truncated_tokens(tmp_path):
    chats = [("⟦Hi", "Ho\n\n<|endoftext|>", "More", "No."), ("q" * 200, "end"), ("q", "a" * 60)]
    preview = preview_chats(tmp_path, *chats, context=60)

    plain = render_terminal(preview, 3, color=False)

    first = "Q: \ufffdHi\nA: ⟦Ho\n\n<|endoftext|><|endoftext|>⟧\nQ: More\nA: ⟦No.<|endoftext|>⟧\n"
    assert first in plain
    assert f"⟪Q: {'q' * 147}⟫{'q' * 53}\nA: ⟦end<|endoftext|>⟧\n" in plain
    assert "; dropped: the last answer" in plain


def test_hostile_texts_change_neither_terminal_nor_page(tmp_path):
    rows = [
        {"instruction": HOSTILE, "output": HOSTILE, "other": "\ud800\x9b"},
        {"instruction": "a", "output": HOSTILE * 40},
    ]
    preview = preview_of(tmp_path, *rows, name="<b>\x1b[2J&.jsonl")

    plain = render_terminal(preview, 2, color=False)
    write_html(preview, tmp_path / "page.html", 2)

    assert plain == sanitize(plain)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert {tag.lower() for tag in re.findall(r"<[/!]?([^\s>]*)", text)} - TAGS == {"doctype"}
    content = html.unescape(re.sub(r"<[^>]*>", "", text))
    for row in preview.rows:
        assert sanitize(preview.tokenizer.decode(row.ids)).replace("\n", "↵\n") in content
    boxes = re.findall(r'<(mark|span|s)(?: class="end")? title="([\d ]+)">', text)
    found = [(int(i), tag == "mark") for tag, title in boxes for i in title.split()]
    tokens = [zip(row.ids, row.loss_mask, strict=True) for row in preview.rows]
    assert found == list(itertools.chain(*tokens))
    assert not re.search(r"https?:|url\(|href=|@import|src=\"(?!data:image/png;)", text)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
