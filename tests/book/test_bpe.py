"""BPE from scratch: the ids of the book, and those of GPT-2."""

from hypothesis import example, given
from hypothesis import strategies as st

from gptjax.book import bpe
from gptjax.tokenizer.tokenizer import ENDOFTEXT, load_tokenizer

SENTENCE = "Jack embraced beauty through art and life."
TEXT = "Hello, world. Is this-- a test?"
TEXT_IDS = [15496, 11, 995, 13, 1148, 428, 438, 257, 1332, 30]


def test_the_verdict_gives_the_merges_and_ids_of_the_book(verdict):
    table = bpe.train_merges(verdict, 1_000)

    assert (len(table.symbols), len(table.ranks)) == (1_000, 742)
    assert table.symbols[256:258] == (bpe.SPACE_MARK, ENDOFTEXT)
    words = bpe.spaced_words(SENTENCE)
    start, end = [74, 361, 310, 109, 98], [121, 519, 699, 299, 808, 534]
    by_sweeps = [420, 397, 100, 300, 428, 116]
    assert bpe.encode_words(words, table, bpe.merge_by_sweeps) == [*start, *by_sweeps, *end]
    # Merges in the order of training split two of the words differently.
    by_rank = [114, 305, 272, 300, 97, 317]
    assert bpe.encode_words(words, table) == [*start, *by_rank, *end]


@example(TEXT)
@given(st.text())
def test_gpt2_has_the_ids_of_the_book_and_of_tiktoken(text):
    table = bpe.gpt2_merge_table()

    ids = bpe.encode_words(bpe.gpt2_words(text), table)

    assert ids == load_tokenizer("gpt2").encode(text)
    assert ids == TEXT_IDS or text != TEXT
    assert bpe.gpt2_text(bpe.decode_ids(ids, table)) == text
