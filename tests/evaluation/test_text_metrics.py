"""Answers are compared with references as the papers and rouge_score do it."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.evaluation.metrics import exact_match, lcs_length, normalize_answer, rouge_l, token_f1

# Few words, so that they meet, with all that can stand between them.
texts = st.text("aB1c _-.'\n", max_size=30)
ascii_texts = texts | st.text(st.characters(max_codepoint=127), max_size=30)
letters = st.text("abc", max_size=8)

# (answer, reference, what rouge_score 0.1.2 says: rougeL's fmeasure, no stemmer)
ROUGE_SCORE = [
    ("the gunman kill police", "police killed the gunman", 0.5),
    ("The quick brown fox jumps", "a quick fox: it jumps over", 0.5454545454545454),
    ("Jane Austen", "Jane Austen wrote 'Pride and Prejudice'.", 0.5),
    ("GPT_2 has 12 layers", "gpt 2 has 12 layers", 1.0),
    ("...", "words", 0.0),
    ("", "", 0.0),
]


@pytest.mark.fast
@pytest.mark.parametrize(("answer", "reference", "expected"), ROUGE_SCORE)
def test_rouge_l_is_what_rouge_score_says(answer, reference, expected):
    assert rouge_l(answer, reference) == expected


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_rouge_l_is_that_of_rouge_score_for_all_ascii_texts():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])

    @settings(max_examples=500)
    @given(ascii_texts, ascii_texts)
    def same(answer, reference):
        expected = scorer.score(reference, answer)["rougeL"].fmeasure
        assert rouge_l(answer, reference) == expected

    same()


@given(letters, letters)
def test_no_longer_subsequence_is_common(one, other):
    def subsequences(text):
        sizes = range(len(text) + 1)
        return {s for n in sizes for s in itertools.combinations(text, n)}

    expected = max(map(len, subsequences(one) & subsequences(other)))

    assert lcs_length(one, other) == expected


@pytest.mark.parametrize("measure", [exact_match, token_f1, rouge_l])
@given(texts, texts)
def test_measures_go_from_0_to_1_and_do_not_tell_the_two_apart(measure, one, other):
    found = measure(one, other)

    assert 0 <= found <= 1
    assert measure(other, one) == found
    assert measure(f"\n {one}", f"{other}\t") == found


@pytest.mark.parametrize("measure", [exact_match, token_f1, rouge_l])
@given(texts.map("a{}".format))
def test_a_text_with_words_is_wholly_like_itself(measure, text):
    assert measure(text, text) == pytest.approx(1, abs=1e-15)


@given(texts, texts)
def test_order_counts_for_the_subsequence_and_not_for_the_bag(one, other):
    turned = " ".join(reversed(normalize_answer(one)))

    assert token_f1(turned, other) == token_f1(one, other)
    assert rouge_l(one, other) <= token_f1(one, other) + 1e-15


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat", "a cat", 1 / 2),  # articles count
        ("a a b", "a b b", 2 / 3),  # each word as often as both have it
        ("Zürich, ÉTÉ", "zürich été", 1.0),
        ("猫 42", "猫", 2 / 3),
        ("n_layers", "n layers", 1.0),
        ("", "", 1.0),
        ("?!", "", 1.0),
        ("cat", "", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_token_f1_compares_bags_of_words(answer, reference, expected):
    assert token_f1(answer, reference) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        (" Jane Austen.\n", "Jane Austen.", 1),
        ("jane austen.", "Jane Austen.", 0),
        ("Jane  Austen.", "Jane Austen.", 0),
        ("", " ", 1),
    ],
)
def test_exact_match_forgives_outer_white_space_alone(answer, reference, expected):
    assert exact_match(answer, reference) == expected
