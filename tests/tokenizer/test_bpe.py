"""Learning merges: the rule is followed, and ranks alone tell the merges again."""

import itertools
import random
from collections import Counter
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.tokenizer import bpe, tokenizer

# A busy machine is slow now and then: no deadline for a single example.
any_text = settings(deadline=None, max_examples=100)


def naive_training(texts, merges):
    """The rule of bpe.learn, counted anew for each merge."""
    counts = Counter(word for text in texts for word in bpe.SPLIT_REGEX.findall(text))
    words = [([bytes([b]) for b in w.encode()], n) for w, n in counts.items()]
    ids = {bytes([byte]): byte for byte in range(256)}
    for _ in range(merges):
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
@any_text
@given(st.lists(st.text("ab c."), max_size=5), st.integers(0, 12))
def test_training_finds_the_merges_of_a_naive_trainer(texts, merges):
    assert bpe.train_bpe(texts, merges) == naive_training(texts, merges)


def test_training_on_real_text_finds_the_merges_of_a_naive_trainer():
    texts = [text[:1000] for text in topics.values()][:20]

    assert bpe.train_bpe(texts, 150) == naive_training(texts, 150)


def test_training_finds_the_merges_of_another_implementation():
    peers = pytest.importorskip("tokenizers")
    start = 0x4E00  # one letter per byte, in their order: its ties are then ours
    words = bpe.count_words(topics.values())
    letters = {byte: chr(start + byte) for byte in range(256)}
    peer = peers.Tokenizer(peers.models.BPE())
    trainer = peers.trainers.BpeTrainer(
        vocab_size=2047, initial_alphabet=list(letters.values()), show_progress=False
    )
    repeated = (w.translate(letters) for w, n in words.items() for _ in range(n))
    peer.train_from_iterator(repeated, trainer)
    theirs = sorted(peer.get_vocab().items(), key=lambda item: item[1])[256:]

    ours = bpe.train_bpe(topics.values(), 2047 - 256)

    assert ours == [bytes(ord(c) - start for c in token) for token, _ in theirs]


def test_training_does_not_depend_on_the_order_of_the_texts():
    texts = list(topics.values())
    shuffled = random.Random(0).sample(texts, len(texts))

    assert bpe.train_bpe(iter(shuffled), 300) == bpe.train_bpe(texts, 300)


@any_text
@given(st.lists(st.text("abc ", min_size=20), min_size=1, max_size=5))
def test_every_token_that_is_learned_is_the_merge_of_its_halves(texts):
    tokens = bpe.train_bpe(texts, 100)
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate(tokens)}

    assert len(ranks) == 256 + len(tokens)
    assert all(bpe.split_merge(token, ranks) for token in tokens)


def test_no_token_is_longer_than_a_file_may_hold():
    tokens = bpe.train_bpe(["a" * 10_000], 20)

    assert max(map(len, tokens)) == bpe.MAX_TOKEN_BYTES


def test_the_merges_of_gpt2_follow_from_its_ranks():
    ranks = tokenizer.load_tokenizer("gpt2").ranks

    pairs = (bpe.split_merge(token, ranks) for token in list(ranks)[256:])

    lines = [" ".join(map(tokenizer.bytes_to_unicode, pair)) for pair in pairs]
    assert lines == tokenizer.read_gpt2_merges()
