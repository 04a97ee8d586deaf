"""BPE training follows its rule, and ranks determine the merges."""

import itertools
from collections import Counter
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.tokenizer import bpe, tokenizer


def train_naively(texts, num_merges):
    """Counts all pairs again for each merge."""
    counts = Counter(word for text in texts for word in bpe.SPLIT_REGEX.findall(text))
    words = [([bytes([b]) for b in w.encode()], n) for w, n in counts.items()]
    ids = {bytes([byte]): byte for byte in range(256)}
    for _ in range(num_merges):
        pairs = Counter()
        for word, n in words:
            for pair in itertools.pairwise(word):
                pairs[pair] += n
        order = {(-n, ids[a], ids[b]): (a, b) for (a, b), n in pairs.items() if n > 1}
        if not order:
            break
        a, b = order[min(order)]
        ids[a + b] = len(ids)
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if word[i : i + 2] == [a, b]:
                    word[i : i + 2] = [a + b]
                i += 1
    return list(ids)[256:]


@pytest.mark.fast
@given(st.lists(st.text("ab c."), max_size=5), st.integers(0, 12))
def test_training_finds_the_merges_of_a_naive_trainer(texts, num_merges):
    tokens = bpe.train_bpe(texts, num_merges)

    assert tokens == train_naively(texts, num_merges)
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate(tokens)}
    assert all(bpe.split_merge(token, ranks) for token in tokens)


def test_training_finds_the_merges_of_another_implementation():
    tokenizers = pytest.importorskip("tokenizers")
    texts, start = [text[:2000] for text in topics.values()], 0x4E00
    letters = {byte: chr(start + byte) for byte in range(256)}  # in order: the same ties
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=list(letters.values()), show_progress=False
    )
    repeated = (w.translate(letters) for w, n in bpe.count_words(texts).items() for _ in range(n))
    peer.train_from_iterator(repeated, trainer)
    theirs = sorted(peer.get_vocab().items(), key=lambda item: item[1])[256:]

    ours = bpe.train_bpe(texts, 1024 - 256)

    assert ours == [bytes(ord(c) - start for c in token) for token, _ in theirs]


def test_tokens_have_at_most_the_length_that_a_file_may_contain():
    assert max(map(len, bpe.train_bpe(["a" * 10_000], 20))) == bpe.MAX_TOKEN_BYTES


def test_merges_of_gpt2_follow_from_its_ranks():
    ranks = tokenizer.load_tokenizer("gpt2").ranks

    pairs = (bpe.split_merge(token, ranks) for token in list(ranks)[256:])

    lines = [" ".join(map(tokenizer.bytes_to_unicode, pair)) for pair in pairs]
    assert lines == tokenizer.read_gpt2_merges()
