"""A file of rows becomes the same file with labels, or nothing at all."""

import csv
import gzip
import io
import json
import sys
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.data.readers import read_csv_records
from gptjax.errors import DataError
from gptjax.inference import label_file as labelling
from gptjax.inference.label_file import label_file

quiet = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
    derandomize=True,
    max_examples=50,
)
cell = st.text(
    st.sampled_from("\r\n\t,\"'\\ é🙂a1")
    | st.characters(exclude_characters="\0", exclude_categories=["Cs"]),
    max_size=6,
)
CSV = 'id,text,note\n1,"a, ""b""\nc",\n\n2,d e,"x\ty"\n'


def predict(texts):
    """The label and the "probability" say which text it was."""
    return [(text.upper(), len(text) / 1000) for text in texts]


def label(source, out, **options):
    """The number of rows, and what was said."""
    said = []
    count = label_file(source, out, predict, log=said.append, **options)
    return count, said


def write(path, content):
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def fields(path, mark=","):
    return [row for _, row in read_csv_records(io.BytesIO(path.read_bytes()), path, mark)]


@pytest.mark.fast
def test_a_table_keeps_its_columns_and_gets_two_more(tmp_path):
    for name in ("a.csv", "b.csv.gz"):
        out = tmp_path / f"{name}.labelled.csv"
        count, said = label(write(tmp_path / name, CSV), out)

        assert count == 2
        assert out.read_bytes() == (
            b"id,text,note,label,probability\n"
            b'1,"a, ""b""\nc",,"A, ""B""\nC",0.008\n'
            b"2,d e,x\ty,D E,0.003\n"
        )
        assert "text in column 'text'" in said[0]
        assert said[-1].startswith(f"wrote {out}: 2 rows")


def test_every_kind_of_file_becomes_every_kind_that_holds_it(tmp_path):
    objects = [{"text": "a", "n": "1"}, {"text": "b c", "n": "é"}]
    lists = [list(objects[0]), *(list(row.values()) for row in objects)]
    files = {
        "a.csv": "".join(",".join(row) + "\r\n" for row in lists),
        "a.tsv": "".join("\t".join(row) + "\n" for row in lists),
        "a.jsonl": "\n\n".join(map(json.dumps, objects)),
        "a.txt": "a\r\n \nb c",
    }
    for name, content in files.items():
        source = write(tmp_path / name, content)
        width = 1 if name == "a.txt" else 2
        for kind, mark in {"csv": ",", "tsv": "\t", "jsonl": ""}.items():
            out = tmp_path / f"{name}.{kind}"
            if (name, kind) in (("a.jsonl", "csv"), ("a.jsonl", "tsv")):
                with pytest.raises(DataError, match=r"unsupported .* suffix \.jsonl\."):
                    label(source, out)
                continue
            assert label(source, out)[0] == 2
            if kind == "jsonl":
                rows = [json.loads(line) for line in out.read_text().splitlines()]
                found = [list(rows[0]), *(list(map(str, r.values())) for r in rows)]
            else:
                found = fields(out, mark)
            assert found == [
                [*lists[0][:width], "label", "probability"],
                [*lists[1][:width], "A", "0.001"],
                [*lists[2][:width], "B C", "0.003"],
            ]


@quiet
@given(
    st.lists(cell.map(str.strip), unique=True, max_size=3),
    st.lists(st.lists(cell, min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from([".csv", ".tsv"]),
    st.integers(1, 3),
)
def test_fields_come_back_as_they_were(tmp_path, names, rows, kind, batch):
    names = ["text", *(f"{name}_" for name in names)]
    rows = [["x" + row[0], *row[1 : len(names)]] for row in rows]
    mark = labelling.DELIMITERS[kind]
    table = io.StringIO(newline="")
    csv.writer(table, delimiter=mark).writerows([names, *rows])
    source = write(tmp_path / f"a{kind}", table.getvalue())
    out = tmp_path / f"out{kind}"
    out.unlink(missing_ok=True)

    count, _ = label(source, out, text_column="text", batch_size=batch)

    head, *found = fields(out, mark)
    assert head == [*names, "label", "probability"]
    assert [row[: len(names)] for row in found] == rows
    assert [row[-2] for row in found] == [row[0].upper() for row in rows]
    assert count == len(rows)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.text("a\ud800")
    | st.floats(-1e9, 1e9),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=4,
)


@quiet
@given(st.lists(st.dictionaries(st.text("abé\n"), json_values, max_size=3), min_size=1))
def test_objects_come_back_as_they_were(tmp_path, objects):
    objects = [row | {"text": "x"} for row in objects]
    source = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, objects)))
    out = tmp_path / "out.jsonl"
    out.unlink(missing_ok=True)

    label(source, out)

    found = [json.loads(line) for line in out.read_bytes().decode().split("\n")[:-1]]
    assert found == [row | {"label": "X", "probability": 0.001} for row in objects]
    assert [list(row) for row in found] == [[*row, "label", "probability"] for row in objects]


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_batches_are_full_and_in_order(tmp_path, batch):
    source = write(tmp_path / "a.txt", "".join(f"{n}\n" for n in range(12)))
    sizes = []

    def noted(texts):
        sizes.append(len(texts))
        return predict(texts)

    count = label_file(source, tmp_path / "out.csv", noted, batch_size=batch, log=len)

    texts = [str(n) for n in range(12)]
    assert count == 12
    assert [row[:2] for row in fields(tmp_path / "out.csv")[1:]] == [[text, text] for text in texts]
    assert sizes == [min(batch, 12 - n) for n in range(0, 12, batch)]


def test_tabs_may_separate_fields_that_go_on_after_a_quote(tmp_path):
    source = write(tmp_path / "a.tsv", 'text\n"a" b "c"\n')

    label(source, tmp_path / "b.csv")

    assert fields(tmp_path / "b.csv")[1] == ['a b "c"', 'A B "C"', "0.007"]


def test_columns_that_are_taken_are_not_lost(tmp_path):
    source = write(tmp_path / "a.csv", "text,label\na,spam\n")

    label(source, tmp_path / "b.csv")

    assert fields(tmp_path / "b.csv") == [
        ["text", "label", "predicted_label", "predicted_probability"],
        ["a", "spam", "A", "0.001"],
    ]
    with pytest.raises(DataError, match=r"b\.csv:2: the column 'predicted_label' "):
        label(tmp_path / "b.csv", tmp_path / "c.csv")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"id": "1", "Review": "a"}, "Review"),
        ({"sentence": "a", "text": "b"}, "text"),
        ({"id": 1, "story": "a"}, "story"),
        ({"sentiment": "pos", "story": "a"}, "story"),
    ],
)
def test_the_column_is_guessed_from_the_first_row(tmp_path, row, column):
    source = write(tmp_path / "a.jsonl", json.dumps(row))

    _, said = label(source, tmp_path / "out.jsonl")

    assert f"column {column!r}. Override with --text NAME" in said[0]
    assert json.loads((tmp_path / "out.jsonl").read_text())["label"] == (row[column].upper())


BAD = [
    ("a.csv", "id,words\n1,a\n", "", ":2: ambiguous .*: id, words.* --text NAME"),
    ("a.csv", "id,text\n1,a\n", "txt", ":2: no column 'txt'. Columns: id, text. .*--"),
    ("a.csv", "id,text\n1,a\n\n2\n", "", ":4: 1 fields under 2 .* Quote text"),
    ("a.csv", "id,text\n1,a\n2, \n", "", ":3: the text is empty. "),
    ("a.csv", 'id,text\n1,a\n2,"b', "", ":3: not CSV"),
    ("a.csv", 'id,text\n1,"a" b\n', "", ":2: not CSV"),
    ("a.csv", "text,text\na,b\n", "", ":1: duplicate column name"),
    ("a.csv", "id,text\n", "", " has no rows. "),
    ("a.tsv", "id\ttext\n1\ta\tb\n", "", ":2: 3 fields under 2 .* Tabs separate"),
    ("a.txt", "\n\n", "", " has no rows. "),
    ("a.txt", "a\n\n\0", "", ":3: NUL"),
    ("a.jsonl", '{"text": "a"}\n"b"\n', "", ":2: 'b' has no columns. Write"),
    ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', "", ":2: no column 'text'. Columns: txt"),
    ("a.jsonl", '{"text": "a"}\n{"text": 3}', "", ":2: column 'text' is 3, not a str"),
    ("a.jsonl", '{"text": "a"}\n{"text": "b", "label": 1}', "", ":2: .* 'label' alr"),
    ("a.jsonl", '{"text": "a", "n": 1e999}', "", ":1: not JSON: .*1e999"),
    ("a.jsonl", '{"n": 1}', "", ":1: ambiguous .* columns: none"),
    ("a.csv.gz", None, "", "cannot read .*is complete"),
]


@pytest.mark.parametrize(("name", "content", "text", "message"), BAD)
def test_a_row_that_cannot_be_used_is_told_and_leaves_no_file(
    tmp_path, name, content, text, message
):
    source = tmp_path / name
    source.write_bytes((content or "no gzip").encode())
    out = tmp_path / "out.jsonl"

    with pytest.raises(DataError, match=rf"{name}{message}" if content else message):
        label(source, out, text_column=text, batch_size=1)

    assert list(tmp_path.iterdir()) == [source]


def test_names_that_say_nothing_and_files_that_are_there_are_refused(tmp_path):
    source, out = write(tmp_path / "a.txt", "a\n"), write(tmp_path / "b.csv", "mine")

    with pytest.raises(DataError, match=r"b\.csv already exists"):
        label(source, out)
    with pytest.raises(DataError, match=r"c\.md: unsupported .* suffix \.csv or \.tsv"):
        label(source, tmp_path / "c.md")
    with pytest.raises(DataError, match=r"a\.pdf: unsupported .* \.jsonl, \.txt"):
        label(tmp_path / "a.pdf", tmp_path / "c.csv")
    with pytest.raises(DataError, match=r"cannot read .*none\.txt"):
        label(tmp_path / "none.txt", tmp_path / "c.csv")
    with pytest.raises(DataError, match=r"cannot write .*c\.csv: .* free space"):
        label(source, out / "c.csv")
    assert out.read_text() == "mine"


def test_the_file_has_its_name_only_when_it_is_whole(tmp_path):
    source = write(tmp_path / "a.txt", "a\nb\nc\n")
    out = tmp_path / "new" / "out.csv"
    there = []

    def noted(texts):
        there.append(out.exists())
        if len(there) == 3:
            raise KeyboardInterrupt
        return predict(texts)

    with pytest.raises(KeyboardInterrupt):
        label_file(source, out, noted, batch_size=1, log=len)

    assert there == [False] * 3
    assert list(out.parent.iterdir()) == []


def test_as_many_labels_as_texts_are_needed(tmp_path):
    source = write(tmp_path / "a.txt", "a\nb\n")

    with pytest.raises(ValueError, match="zip"):
        label_file(source, tmp_path / "out.csv", lambda texts: [("a", 1.0)], log=len)
    assert not (tmp_path / "out.csv").exists()


def test_a_terminal_shows_how_much_of_the_file_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(labelling, "PROGRESS_BAR_SECONDS", -1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    source = write(tmp_path / "a.txt", 4 * f"{'x' * 99}\n")

    label(source, tmp_path / "out.csv", batch_size=1)

    shown = capsys.readouterr().err
    for share in ("25%", "50%", "75%", "100%"):
        assert f"classifying a.txt [{'#' * (30 * int(share[:-1]) // 100)}" in shown
        assert share in shown
    assert shown.endswith("\r\033[K")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_labelling_takes_memory_for_a_batch_only(tmp_path, kind):
    words = "All work and no play. " * 100
    head, line = ("text\n", words) if kind == "csv" else ("", json.dumps({"text": words}))
    source = write(tmp_path / f"a.{kind}", head + f"{line}\n" * 1_500)
    tracemalloc.start()

    label(source, tmp_path / f"b.{kind}", batch_size=32)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 < source.stat().st_size // 3
