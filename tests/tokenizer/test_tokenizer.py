"""Encoding is lossless, GPT-2's ids are OpenAI's, and bad files are rejected."""

import dataclasses
import hashlib
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer import bpe, tokenizer, vocab_files
from gptjax.tokenizer.pre_tokenizer import PRE_TOKENIZERS
from gptjax.tokenizer.tokenizer import ENDOFTEXT

GPT2 = tokenizer.load_tokenizer("gpt2")
BYTES = tokenizer.load_tokenizer("bytes")
OWN = tokenizer.train_tokenizer(topics.values(), 700)
ADDED = dataclasses.replace(OWN, name="added", added_tokens={"[PAD]": 700, "<|é |>": 701})
PERMUTED = tokenizer.from_merges("permuted", range(255, -1, -1), [])
ALL = (GPT2, BYTES, PERMUTED, OWN, ADDED)
# Of encoder.json and vocab.bpe, as tiktoken_ext/openai_public.py pins them.
PUBLISHED = {
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
WORDS = [
    *(
        "the",
        "Python",
        "I'll",
        "don't",
        "'re",
        "_x",
        ENDOFTEXT,
        "[PAD]",
        "<|é |>",
        "3.14",
        " ",
        "  ",
        "\n",
        "\n\n",
    ),
    *("\r\n", "\t", "\x00", "\x1c", "\u3000", "\xa0", "👩‍👩‍👧", "🇩🇪", "½", "²", "\ufeff"),
]
mixed_texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=12).map("".join)


@given(text=mixed_texts)
def test_decoding_inverts_encoding_and_text_never_becomes_the_control_token(text):
    for kind in ALL:
        ids = kind.encode(text)

        assert kind.decode(ids) == text
        assert ids == kind.encoding.encode(text, disallowed_special=())
        assert not set(ids) & set(kind.special_tokens.values())
        assert kind.byte_lengths[ids].sum() == len(text.encode())


def test_bytes_are_encoded_without_pairs():
    kind = dataclasses.replace(PERMUTED)
    vars(kind)["encoding"] = None  # would fail if it were used

    assert kind.encode_array("aé" * 100_000).tolist() == [255 - n for n in "aé".encode()] * 100_000


def test_ids_are_those_of_another_implementation(tmp_path):
    peer = pytest.importorskip("tokenizers").ByteLevelBPETokenizer
    for name in ("one", "two", "gpt2"):
        (tmp_path / name).mkdir()
    trained = peer()
    trained.train_from_iterator(list(topics.values())[::4], 600, special_tokens=[ENDOFTEXT])
    trained.save(str(tmp_path / "one" / "tokenizer.json"))
    trained.save_model(str(tmp_path / "two"))
    GPT2.save(tmp_path / "gpt2")
    two, gpt2 = (
        peer.from_file(f"{tmp_path}/{name}/vocab.json", f"{tmp_path}/{name}/merges.txt")
        for name in ("two", "gpt2")
    )
    ours, same = (tokenizer.load_tokenizer(tmp_path / name) for name in ("one", "two"))
    assert ours.ranks == same.ranks
    assert (ours.eot_token, same.eot_token, same.vocab_size) == (0, 0, 600)

    @given(mixed_texts | st.sampled_from(list(topics.values())))
    def compare(text):
        assert GPT2.encode(text) == gpt2.encode(text).ids
        assert ours.encode(text) == two.encode(text).ids

    compare()


@pytest.mark.fast
def test_gpt2_is_the_published_tokenizer(tmp_path):
    GPT2.save(tmp_path)

    for name, published in PUBLISHED.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == published
    assert GPT2.encode("Hello, do you like tea?") == [15496, 11, 466, 345, 588, 8887, 30]
    assert GPT2.eot_token == 50256
    # Data, runs and models contain the hash: a change makes all of them unusable.
    assert GPT2.hash.startswith("2a551909b8891192")


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_a_million_spaces_are_encoded_and_splitting_changes_no_id(pre_tokenizer):
    kind = dataclasses.replace(GPT2, pre_tokenizer=pre_tokenizer)
    for text in ("!" + "\n \u3000" * 333_333 + "\tb", " \u3000" * 500_000 + "1"):
        assert kind.decode(kind.encode(text)) == text

    splitter = PRE_TOKENIZERS[pre_tokenizer]
    for end in (" b", "\tb", "\nb", "  1", "\n1", " .", "\n!", " ", "\n"):
        text = f"a   b!\n \u3000\n{end}  1   \x1c ab \n\n x  {end}"
        parts = splitter.split_long_whitespace(text, limit=2)
        assert len(parts) > 2
        assert [i for part in parts for i in kind.encode(part)] == kind.encode(text)


def test_loading_inverts_saving_and_the_hash_includes_all_but_the_name(tmp_path):
    for kind in ALL:
        kind.save(tmp_path / kind.name)
        loaded = tokenizer.load_tokenizer(tmp_path / kind.name)
        assert (loaded.ranks, loaded.special_tokens) == (kind.ranks, kind.special_tokens)
        assert (loaded.hash, loaded.name) == (kind.hash, str(tmp_path / kind.name))
    first, second, *_ = [token for token in OWN.ranks if len(token) > 1]
    swapped = {**OWN.ranks, first: OWN.ranks[second], second: OWN.ranks[first]}
    for change in ({"ranks": swapped}, {"eot_token": 0}, {"added_tokens": {"[PAD]": 700}}):
        assert dataclasses.replace(OWN, **change).hash != OWN.hash


def test_invalid_arguments_are_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = np.array(BYTES.encode("é"), np.uint16)

    assert (BYTES.decode(ids), BYTES.decode(ids[:1])) == ("é", "\ufffd")
    for wrong in (-1, 257):
        with pytest.raises(DataError, match=f"{wrong} .*vocab_size=257 "):
            BYTES.decode([0, wrong])
    with pytest.raises(DataError, match="character 2 "):
        GPT2.encode("ab\ud83d\ude00")
    for name in ("gpt3", Path("gpt2"), "a\0b"):
        with pytest.raises(ConfigError, match=r"tokenizer|NUL"):
            tokenizer.load_tokenizer(name)


DAMAGES = [  # file, text in it, its replacement, value in the message
    ("vocab.json", b"{", b'["', "line 1"),
    ("vocab.json", b"{", b" " * 9000 + b"{", "9,000"),  # too large
    ("vocab.json", b'"a": 97', b'"a": "97"', "'a'"),
    ("vocab.json", b'"a": 97', b'"a": 999', "id 97"),
    ("vocab.json", b'"<|endoftext|>"', b'"ll"', r"<\|endoftext\|>"),
    ("vocab.json", b'"a": 97', b'"ab": 97', "byte 97"),
    ("vocab.json", b'"lo"', b'"%s"' % (b"a" * 257), "257 bytes"),
    ("vocab.json", b'"lo"', b'"xyz"', "'xyz'"),
    ("merges.txt", b"l o\n", b"l o\na b\n", "2 is 'a b'"),
    ("tokenizer_config.json", b"{", b'{"add_prefix_space": true, ', "add_prefix_space=True"),
    ("tokenizer_config.json", b"{", b'{"pad_token": "lo", ', "merge"),
    ("tokenizer_config.json", b"{", b'{"added_tokens_decoder": [1], ', r"decoder is \[1\]"),
    ("tokenizer_config.json", b"{", b'{"added_tokens_decoder": {"3": 1}, ', "decoder 3 is 1"),
]


def test_damaged_folders_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(vocab_files, "MAX_TOKENIZER_BYTES", 9_000)
    small = tokenizer.train_tokenizer(["low lower lowest slow slower slowest"], 264)
    for name, old, new, match in DAMAGES:
        small.save(tmp_path)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data.replace(old, new, 1))
        with pytest.raises(DataError, match=f"{tmp_path}: .*{match}"):
            tokenizer.load_tokenizer(tmp_path)


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


@pytest.mark.peers
@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_transformers_reads_a_saved_folder(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind.save(tmp_path)

    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)

    assert type(peer).__name__.startswith("GPT2Tokenizer")
    assert peer(topics["assert"])["input_ids"] == kind.encode(topics["assert"])
    assert (peer.eos_token_id, len(peer)) == (kind.eot_token, kind.vocab_size)
    assert peer.encode("".join(kind.special_tokens)) == [*kind.special_tokens.values()]
    peer.save_pretrained(tmp_path / "again")  # as tokenizer.json
    assert tokenizer.load_tokenizer(tmp_path / "again").hash == kind.hash
    peer.add_tokens(["word"])
    peer.save_pretrained(tmp_path / "again")
    with pytest.raises(DataError, match="'word'"):
        tokenizer.load_tokenizer(tmp_path / "again")
