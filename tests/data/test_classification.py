"""Which rows become labelled texts, which columns are guessed, what is refused."""

import csv
import gzip
import hashlib
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.data.classification import LabeledTexts, read_labeled_texts
from gptjax.data.readers import read_csv_records
from gptjax.errors import DataError

quiet = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
    derandomize=True,
    max_examples=100,
)
PAIRS = [("ham", "see you"), ("spam", "Win £9!"), ("ham", "ok, later"), ("spam", "Hi")]


def write(path: Path, content: str | bytes) -> Path:
    """The file, with that content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pairs(data: LabeledTexts) -> list[tuple[str, str]]:
    """(label, text) of each row."""
    return [(data.class_names[n], t) for n, t in zip(data.labels, data.texts, strict=True)]


def table(rows: list[tuple[str, ...]], delimiter: str = ",") -> str:
    """The rows as a file of fields."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue()


FORMATS = {
    "a.csv": table([("label", "text"), *PAIRS]),
    "a.tsv": table([("label", "text"), *PAIRS], "\t"),
    "a.jsonl": "".join(json.dumps({"label": n, "text": t}) + "\n\n" for n, t in PAIRS),
    "a.json": json.dumps([{"text": t, "label": n} for n, t in PAIRS]),
    "b.csv": table([("id", "Review", "Sentiment"), *(("7", t, n) for n, t in PAIRS)]),
    "b.tsv": table(PAIRS, "\t"),  # no header: ham comes again
    "SMSSpamCollection": table(PAIRS[:2], "\t"),  # nothing has to come again
}


@pytest.mark.fast
@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_same_rows_also_compressed(tmp_path, name):
    content = FORMATS[name].encode()
    plain = write(tmp_path / name, content)
    packed = write(tmp_path / f"{name}.gz", gzip.compress(content))

    data, line = read_labeled_texts(plain)

    assert pairs(data) == pairs(read_labeled_texts(packed)[0]) == PAIRS[: len(data)]
    assert (data.class_names, data.labels[:2]) == (("ham", "spam"), [0, 1])
    assert line.startswith(f"{plain}: ")
    assert "texts in 2 classes: ham (" in line
    assert line.endswith("--data.text_column NAME --data.label_column NAME.")


def test_the_line_says_what_was_taken_for_what(tmp_path):
    lines = {
        name: read_labeled_texts(write(tmp_path / name, FORMATS[name]))[1].split(": ", 1)[1]
        for name in FORMATS
    }

    assert lines["b.csv"].startswith(
        "comma-separated, with a header; text in column 'Review', label in column "
        "'Sentiment'; 4 texts"
    )
    assert lines["b.tsv"].startswith(
        "tab-separated, no header; text in column '2', label in column '1'; "
    )
    assert lines["a.jsonl"].startswith("JSON lines; text in column 'text', label in")


def test_many_classes_are_not_all_listed(tmp_path):
    content = "".join(f'{{"text": "t", "label": {n}}}\n' for n in range(30))

    _, line = read_labeled_texts(write(tmp_path / "a.jsonl", content))

    assert "30 texts in 30 classes: 0 (1), " in line
    assert "7 (1) and 22 more" in line


def test_places_are_the_lines_that_rows_start_in(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\n"a\n\nb",x\n\nc,y\n')

    data, _ = read_labeled_texts(path)

    assert data.texts == ["a\n\nb", "c"]
    assert data.locations == [f"{path}:2", f"{path}:6"]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["spam", "ham", "spam"], ("ham", "spam")),
        ([10, 9, -1], ("-1", "9", "10")),
        (["2", "10", "1.5"], ("1.5", "2", "10")),
        ([True, False], ("false", "true")),
        ([" b ", "b", "a\t"], ("a", "b")),
        (["b", "10", "a", "9", "nan", "²"], ("9", "10", "a", "b", "nan", "²")),
        ([1, "1", 2], ("1", "2")),
    ],
)
def test_names_are_sorted_numbers_by_their_value(tmp_path, labels, names):
    content = "\n".join(json.dumps({"text": "t", "label": n}) for n in labels)

    data, _ = read_labeled_texts(write(tmp_path / "a.jsonl", content))

    assert data.class_names == names


GUESSES = {  # header: (text, label)
    "text,label": ("text", "label"),
    "label,text": ("text", "label"),
    "Class,MESSAGE": ("MESSAGE", "Class"),
    "id,text,title,label": ("text", "label"),
    "content,text,category,label": ("text", "label"),
    "idx,sentence,label": ("sentence", "label"),
    "url,review,rating": ("review", "rating"),
    "words,target": ("words", "target"),
    "y,tweet": ("tweet", "y"),
    "v1,v2": ("v2", "v1"),
    "v2,v1": ("v1", "v2"),
}


@pytest.mark.parametrize("header", GUESSES)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_columns_are_guessed(tmp_path, header, kind):
    names, (text, label) = header.split(","), GUESSES[header]
    rows = [
        dict.fromkeys(names, f"{n}") | {text: f"some words {n}", label: "ab"[n % 2]}
        for n in range(6)
    ]
    files = {
        "csv": table([tuple(names), *(tuple(row.values()) for row in rows)]),
        "jsonl": "\n".join(json.dumps(row) for row in rows),
    }

    data, line = read_labeled_texts(write(tmp_path / f"a.{kind}", files[kind]))

    assert data.texts == [f"some words {n}" for n in range(6)]
    assert data.class_names == ("a", "b")
    assert f"text in column {text!r}, label in column {label!r}" in line


AMBIGUOUS = {
    "a,b,c\n1,2,3\n": "columns: a, b, c. Choose with --data.text_column NAME",
    "review,comment,label\na,b,c\n": "columns: review, comment, label.",
    "text,class,category\na,b,c\n": "columns: text, class, category.",
    "text,other\na,b\nc,d\n": "columns: text, other.",  # nothing comes again
    "v1,v2\na,b\nc,d\n": "numbers from 1",
    "text;label\na;b\n": "columns: text;label.",
    "a,b\nx,y\nx,y\nx,z\nx,z\n": "columns: a, b.",  # both are short and come again
    "a,b\nx,some\nx,more\nz,words\n": "columns: a, b.",  # too seldom
    "a,b\nx,words\ny,words\nx,words\ny,words\n": "columns: a, b.",  # fewer texts
    f"a,b\n{'x' * 51},{'y' * 60}\n{'x' * 51},{'z' * 60}\n": "columns: a, b.",  # long
}


@pytest.mark.parametrize("content", AMBIGUOUS)
def test_ambiguous_columns_have_to_be_named(tmp_path, content):
    path = write(tmp_path / "a.csv", content)

    with pytest.raises(DataError, match=rf"{path}:\d: ambiguous") as error:
        read_labeled_texts(path)

    assert AMBIGUOUS[content] in str(error.value)


def test_json_columns_are_not_to_be_counted(tmp_path):
    with pytest.raises(DataError, match=r"jsonl:1: .* --data.label_column NAME\.$"):
        read_labeled_texts(write(tmp_path / "a.jsonl", '{"a": "b", "c": "d"}'))


@pytest.mark.fast
def test_named_columns_are_taken(tmp_path):
    path = write(tmp_path / "a.csv", "text,body,label,mood\na,b,x,1\nc,d,y,2\nc,d,y,2\n")

    assert pairs(read_labeled_texts(path)[0])[0] == ("x", "a")
    assert pairs(read_labeled_texts(path, "body")[0])[0] == ("x", "b")
    assert pairs(read_labeled_texts(path, "body", "mood")[0])[0] == ("1", "b")


def test_columns_without_a_header_are_counted(tmp_path):
    path = write(tmp_path / "a.csv", "1,good,pos\n2,bad,neg\n")

    data, line = read_labeled_texts(path, "2", "3")

    assert pairs(data) == [("pos", "good"), ("neg", "bad")]
    assert "comma-separated, no header; text in column '2', label in column '3'" in line


def test_a_first_row_that_has_a_given_name_is_a_header(tmp_path):
    path = write(tmp_path / "a.csv", "pos,words\npos,good\nneg,bad\nneg,so bad\n")

    assert len(read_labeled_texts(path)[0]) == 4
    assert len(read_labeled_texts(path, "words", "pos")[0]) == 3


def test_a_first_row_whose_label_comes_again_is_no_header(tmp_path):
    rows = [("neg", "so bad"), ("pos", "very good"), ("pos", "fine"), ("neg", "dull")]

    bare, _ = read_labeled_texts(write(tmp_path / "a.csv", table(rows)))
    headed, _ = read_labeled_texts(write(tmp_path / "b.csv", table([("v1", "v2"), *rows])))

    assert pairs(bare) == pairs(headed) == rows


BAD = {
    ("a.csv", "text,label\na,x\n ,y\n"): ":3: the text is empty.",
    ("a.csv", "text,label\na,x\nb, \n"): ":3: no label in column 'label'.",
    ("a.csv", "text,label\na,x\nb\n"): ":3: 1 fields, but 2 in the first row. Quote",
    ("a.tsv", "text\tlabel\na\tx\nb\tc\ty"): ":3: 3 fields, but 2 in the first row. Tab",
    ("a.csv", "text,label, text\na,x,b\n"): ":1: duplicate column name in ['text'",
    ("a.csv", b"text,label\na,x\n\xff,y\n"): ":3: not UTF-8 (byte 0xff: invalid start",
    ("a.csv", 'text,label\na,x\n"b"c,y\n'): ":3: not CSV: ',' expected after '\"'.",
    ("a.csv", 'text,label\na,x\n"b,y\n'): ":3: not CSV: unexpected end of data.",
    ("a.tsv", 'text\tlabel\na\tx\n"b\ty\n'): ":3: not CSV: quote is never closed",
    ("a.tsv", 'text\tlabel\na\tx\ny\t"b'): ":3: not CSV: quote is never closed",
    ("a.csv", ""): " has no rows.",
    ("a.json", "[]"): " has no rows.",
    ("a.csv", "text,label\n"): " has no rows.",
    ("a.json", "{}"): ":1: not a JSON array.",
    ("a.jsonl", "{}"): ":1: ambiguous text and label columns",
    ("a.jsonl", '{"text": "a", "label": 1}\n"b"'): ":2: 'b' has no columns. Write each",
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}'): (
        ":2: no column 'label'. Columns: text. Choose with --data.label_column NAME."
    ),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"txt": "b", "label": 1}'): (
        ":2: no column 'text'. Did you mean txt? Columns: txt, label. Choose with "
        "--data.text_column NAME."
    ),
    ("a.jsonl", '{"text": "a", "label": null}'): ":1: no label in column 'label'.",
    ("a.jsonl", '{"text": "a", "label": [1]}'): (
        ":1: the label in column 'label' is [1], not a string or a number."
    ),
    ("a.jsonl", '{"text": 5, "label": 1}'): ":1: column 'text' is 5, not a string.",
    ("a.jsonl", '{"text": "\\ud800", "label": 1}'): ":1: unpaired surrogate",
    ("a.jsonl", '{"text": "a", "label": "\\u0000"}'): ":1: NUL character",
    ("a.csv", "text,label\na,ham\nb,ham\n"): (", column 'label': the only label is 'ham'"),
}


@pytest.mark.parametrize(("name", "content"), BAD)
def test_bad_rows_are_told_with_their_line(tmp_path, name, content):
    path = write(tmp_path / name, content)

    with pytest.raises(DataError) as error:
        read_labeled_texts(path)

    assert str(error.value).startswith(f"{path}{BAD[name, content]}")


def test_unknown_columns_and_one_column_for_both_are_refused(tmp_path):
    path = write(tmp_path / "a.csv", "message,label\na,x\nb,y\n")

    with pytest.raises(DataError, match=r"csv:2: no column 'mesage'\. Did you mean me"):
        read_labeled_texts(path, text_column="mesage")
    with pytest.raises(DataError, match=r"no column 'id'\..* --data\.label_column "):
        read_labeled_texts(path, label_column="id")
    with pytest.raises(DataError, match=r"data\.label_column are both 'label'"):
        read_labeled_texts(path, "label", "label")


def test_paths_without_labelled_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv does not exist\. .* \.csv, "):
        read_labeled_texts(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"a\.parquet: unsupported .* \.csv, "):
        read_labeled_texts(write(tmp_path / "a.parquet", "PAR1"))
    with pytest.raises(DataError, match=r"set verdict has no labels\. .*sms-spam"):
        read_labeled_texts("verdict")
    with pytest.raises(DataError, match=r"cannot read .*a\.csv\.gz.*is complete"):
        read_labeled_texts(write(tmp_path / "a.csv.gz", "text,label\n"))


def test_a_folder_of_folders_is_read_in_the_order_of_names(tmp_path):
    for name in ("pos/2.txt", "pos/10.txt", "neg/1.txt", "neg/.no.txt", "neg/a.png"):
        write(tmp_path / name, f"text of\n{name}\n")
    write(tmp_path / "neg/9.txt.gz", gzip.compress(b"packed"))
    write(tmp_path / "README.txt", "not a text")
    write(tmp_path / ".git/a.txt", "not a text")

    data, line = read_labeled_texts(tmp_path)

    assert pairs(data) == [
        ("neg", "text of\nneg/1.txt\n"),
        ("neg", "packed"),
        ("pos", "text of\npos/10.txt\n"),
        ("pos", "text of\npos/2.txt\n"),
    ]
    assert data.locations[0] == f"{tmp_path / 'neg' / '1.txt'}:1"
    assert line == (
        f"{tmp_path}: .txt files in one folder per label; 4 texts in 2 classes: neg (2), pos (2)."
    )


def test_folders_that_are_not_of_labels_are_refused(tmp_path):
    write(tmp_path / "set/train/pos/1.txt", "good")
    write(tmp_path / "set/train/urls.txt", "http")
    write(tmp_path / "flat/1.txt", "good")
    write(tmp_path / "empty/pos/1.txt", "")
    write(tmp_path / "single/pos/1.txt", "good")

    for name, message in {
        "set": r"set contains train, .* such as .*set.train\.$",
        "flat": r"flat has no folders of \.txt files\. .*spam",
        "empty": r"pos.1\.txt:1: the text is empty",
        "single": r"single: the only label is 'pos'",
    }.items():
        with pytest.raises(DataError, match=message):
            read_labeled_texts(tmp_path / name)
    with pytest.raises(DataError, match=r"flat is a folder .* data\.text_column and"):
        read_labeled_texts(tmp_path / "flat", "text")


letters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
words = st.text(letters, min_size=1).filter(str.strip)


@quiet
@given(st.lists(st.tuples(words, words), min_size=1), st.sampled_from([",", "\t"]))
def test_what_is_written_is_read(tmp_path, rows, delimiter):
    rows = [("one", "a"), *rows, ("two", "b")]
    name = {",": "a.csv", "\t": "a.tsv"}[delimiter]
    content = table([("label", "text"), *rows], delimiter)

    data, _ = read_labeled_texts(write(tmp_path / name, content))

    assert pairs(data) == [(label.strip(), text) for label, text in rows]


@quiet
@given(st.text(st.sampled_from('ab\t"\n'), max_size=30), st.booleans())
def test_fields_are_those_of_pythons_csv_unless_a_quote_is_open(content, strict):
    def read() -> list[list[str]]:
        file = io.BytesIO(content.encode())
        return [f for _, f in read_csv_records(file, Path("a.tsv"), "\t", strict=strict)]

    # A row after the last one is swallowed where a quote is open.
    ended = content if content.endswith("\n") or not content else content + "\n"
    lines = io.StringIO(ended + "end", newline="")
    try:
        *expected, last = csv.reader(lines, delimiter="\t", strict=strict)
    except csv.Error:
        expected, last = [], []

    if last == ["end"]:
        assert read() == expected
    else:
        with pytest.raises(DataError, match=r"a\.tsv:\d+: not CSV: "):
            read()


def test_the_sms_collection_is_read_as_pandas_reads_it(tmp_path, shared_data):
    path = shared_data / "SMSSpamCollection"

    data, line = read_labeled_texts("sms-spam")

    assert data.class_names == ("ham", "spam")
    assert Counter(data.labels) == {0: 4825, 1: 747}
    assert "1 with quoted line breaks, first at line 5082" in line
    assert data.texts[5081].count("\nham\t") == 2
    assert data.locations[5081:5083] == [f"{path}:5082", f"{path}:5085"]
    # The rows of pandas 3.1.1: read_csv(path, sep="\t", header=None).values.
    rows = "\0".join(f"{label}\t{text}" for label, text in pairs(data))
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "f408737e705aea94"
    # Under another name, the columns are guessed from the values.
    copy = shutil.copy(path, tmp_path / "messages.tsv")
    assert pairs(read_labeled_texts(copy)[0]) == pairs(data)
