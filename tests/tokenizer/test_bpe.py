"""BPE training agrees with another implementation."""

from pydoc_data.topics import topics

import pytest

from gptjax.tokenizer import bpe


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


def test_ties_go_to_smaller_ids_and_tokens_have_a_maximum_length():
    # "bc" and "ab" occur twice each; then "abc"; no other pair occurs twice.
    assert bpe.train_bpe(["abc abc"], 9) == [b"ab", b"abc"]
    assert max(map(len, bpe.train_bpe(["a" * 10_000], 20))) == bpe.MAX_TOKEN_BYTES
