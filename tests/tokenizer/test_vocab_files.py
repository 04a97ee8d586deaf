"""Tokenizers of Llama 3, Qwen and SmolLM2: ids, files, and rejected files."""

import dataclasses
import json
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.errors import DataError
from gptjax.tokenizer import tokenizer
from gptjax.tokenizer.tokenizer import RARE_BYTES, tokenizer_from_vocab
from gptjax.tokenizer.vocab_files import tokenizer_json

# As published; of the Hugging Face repositories of Llama 3, Qwen 3 and SmolLM2.
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(digits):
    pattern = {"Regex": LETTERS + digits + OTHERS}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def byte_level(use_regex):
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **flags}


STEPS = {
    "gpt-2": [byte_level(True)],
    "llama-bpe": [split(r"\p{N}{1,3}"), byte_level(False)],
    "qwen2": [split(r"\p{N}"), byte_level(False)],
    "smollm": [{"type": "Digits", "individual_digits": True}, byte_level(True)],
}
BOS = "<|begin_of_text|>"
ADD_BOS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": BOS, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
}
SPECIAL = [BOS, "<|end_of_text|>", "<|eot_id|>"]
WORDS = [
    *("the", "don't", "DON'T", "'ſ", "x'Re", "3.14", "12345", " 1", "½²", "٣", *SPECIAL),
    *(
        " ",
        "  ",
        "\n",
        "!\n",
        "\n \n",
        "\r\n",
        "\t",
        "\x1c",
        "\u3000",
        "e\u0301",
        "\u212b",
        "你好",
        "👩‍👧",
    ),
]
mixed_texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=12).map("".join)
OWN = tokenizer.train_tokenizer(["low lower lowest slow slower slowest"] * 2, 264)
LLAMA = dataclasses.replace(
    OWN,
    name="llama",
    eot_name="<|end_of_text|>",
    added_tokens={BOS: 264, "<|eot_id|>": 265},
    pre_tokenizer="llama-bpe",
    bos_token=264,
    add_bos=True,
    stop_tokens=(265,),
)


@pytest.mark.parametrize("has_all_bytes", [True, False])
@pytest.mark.parametrize("pre_tokenizer", STEPS)
def test_ids_are_those_of_another_implementation(pre_tokenizer, has_all_bytes, tmp_path):
    peers = pytest.importorskip("tokenizers")
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if pre_tokenizer == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": STEPS[pre_tokenizer]},
        "post_processor": {"type": "Sequence", "processors": [byte_level(False), ADD_BOS]},
        "model": {"type": "BPE", "vocab": {BOS: 0}, "merges": []},
    }
    peer = peers.Tokenizer.from_str(json.dumps(content))
    common_bytes = set(range(256)) - (set() if has_all_bytes else RARE_BYTES)
    alphabet = [tokenizer.BYTE_TO_CHAR[byte] for byte in common_bytes]
    trainer = peers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    peer.train_from_iterator([text[:3000] for text in topics.values()], trainer)
    peer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": {"content": "<|end_of_text|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ends = {"eos_token_id": [1, 2]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))

    ours = tokenizer.load_tokenizer(tmp_path)

    assert (ours.pre_tokenizer, ours.prefix_ids, ours.stop_ids) == (pre_tokenizer, [0], [1, 2])
    assert len(ours.missing_bytes) == (0 if has_all_bytes else len(RARE_BYTES))
    ours.save(tmp_path / "again")
    again = tokenizer.load_tokenizer(tmp_path / "again")
    assert (again.hash, again.stop_ids) == (ours.hash, [1, 2])
    saved_peer = peers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    peer.encode_special_tokens = saved_peer.encode_special_tokens = True

    @given(mixed_texts)
    def compare(text):
        if not has_all_bytes:
            kept = {chr(byte) for byte in RARE_BYTES if byte < 128}
            text = "".join(c for c in text if c not in kept and not 0x40000 <= ord(c) < 0xC0000)
        ids = peer.encode(text).ids
        assert ids == saved_peer.encode(text).ids == ours.encode_prompt(text)
        assert ours.decode(ids[1:]) == text or pre_tokenizer == "qwen2"

    compare()


def from_gguf(kind, **changes):
    """The tokenizer from the values in a GGUF file."""
    vocab = kind.vocab
    arguments = {
        "tokens": list(vocab.ids),
        "merges": vocab.merges,
        "special": {name: vocab.ids[name] for name in vocab.special},
        "pre": kind.pre_tokenizer,
        "bos": kind.bos_token,
        "eos": [kind.eot_token],
        "add_bos": kind.add_bos,
    }
    return tokenizer_from_vocab("gguf", **arguments | changes)


def test_a_vocabulary_of_gguf_gives_the_same_tokenizer_and_stops_at_all_ends():
    kind = from_gguf(LLAMA)
    other = from_gguf(LLAMA, eos=[265], bos=None)

    assert dataclasses.replace(kind, name="llama") == LLAMA
    assert (kind.hash, kind.stop_ids) == (LLAMA.hash, [263, 265])
    assert (other.eot_name, other.stop_ids, other.prefix_ids) == ("<|eot_id|>", [265, 263], [])


def test_the_hash_includes_what_changes_ids_and_prompts_but_no_end_tokens():
    changes = [{}, {"pre_tokenizer": "qwen2"}, {"add_bos": False}, {"bos_token": None}]
    changes += [{"eot_name": "</s>"}]
    kinds = [dataclasses.replace(LLAMA, **change) for change in changes]

    assert len({kind.hash for kind in kinds}) == len(changes)
    assert dataclasses.replace(LLAMA, stop_tokens=()).hash == LLAMA.hash


def test_words_that_no_merge_creates_are_tokens_where_merges_are_ignored(tmp_path):
    ranks = {**OWN.ranks, b" xyz": 263}
    kind = dataclasses.replace(LLAMA, ranks=ranks, eot_token=266)
    kind.save(tmp_path)

    loaded = tokenizer.load_tokenizer(tmp_path)

    assert loaded.encode(" xyz xyz! xyzw") == [263, 263, 33, *b" xyzw"]
    assert loaded.hash == kind.hash
    extra_merges = [*kind.vocab.merges[:-1], "Ġ x", "s low", kind.vocab.merges[-1]]
    assert from_gguf(kind, merges=extra_merges).hash == kind.hash
    with pytest.raises(DataError, match="token 263, 'Ġxyz'"):
        from_gguf(kind, pre="qwen2")


def test_a_token_may_have_a_smaller_id_than_its_parts_as_in_llama_3(tmp_path):
    ranks = {**OWN.ranks, b"xyz": 263, b"xy": 264}
    kind = dataclasses.replace(OWN, ranks=ranks, eot_token=265, pre_tokenizer="llama-bpe")
    kind.save(tmp_path)
    peers = pytest.importorskip("tokenizers")
    peer = peers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    assert kind.vocab.merges[-2:] == ["xy z", "x y"]
    assert peer.encode("wxyz").ids == kind.encode("wxyz") == [119, 263]
    assert tokenizer.load_tokenizer(tmp_path).hash == kind.hash


def test_missing_bytes_are_dropped():
    ranks = {token: n for n, token in enumerate(t for t in OWN.ranks if t[0] not in b"\x00\x04")}
    kind = dataclasses.replace(OWN, ranks=ranks, eot_token=len(ranks), pre_tokenizer="smollm")

    assert kind.decode(kind.encode("a\x00b \x04low\x05")) == "ab low\x05"
    assert kind.vocab_size == OWN.vocab_size - 2


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


DAMAGES = [  # text of tokenizer.json or of its config, its replacement, value in the message
    ("{1,3}", "{1,2}", "pre_tokenizer"),
    ('"normalizer": null', '"normalizer": {"type": "NFC"}', "normalizer"),
    ('"add_prefix_space": false', '"add_prefix_space": true', "pre_tokenizer"),
    ('"dropout": null', '"dropout": 0.1', "dropout"),
    ('"byte_fallback": false', '"byte_fallback": true', "byte_fallback"),
    ('"type": "BPE"', '"type": "Unigram"', "BPE"),
    ('"single": [', '"single": [{"SpecialToken": {"id": "x"}}, ', "post_processor"),
    ('"type": "TemplateProcessing"', '"type": "BertProcessing"', "post_processor"),
    (f'{{"id": "{BOS}"', '{"id": "<s>"', "<s> is missing"),
    ('"content": "<|eot_id|>"', '"content": "eot"', "<|eot_id|>"),
    ('"eos_token": "<|end_of_text|>"', '"eos_token": "<|end|>"', "<|end|> is missing"),
    ('"eos_token"', '"add_eos_token": true, "eos_token"', "add_eos_token=True"),
    ('"l o"', '"o l"', "merge 1"),
    ('"l o", ', "", "merge 1"),
]


@pytest.mark.parametrize(("old", "new", "match"), DAMAGES)
def test_other_tokenizers_are_rejected(old, new, match, tmp_path):
    LLAMA.save(tmp_path)
    is_config = "eos_token" in old
    replace(tmp_path / ("tokenizer_config.json" if is_config else "tokenizer.json"), old, new)

    with pytest.raises(DataError) as caught:
        tokenizer.load_tokenizer(tmp_path)

    assert match in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pre": "deepseek-llm"}, "'deepseek-llm'"),
        ({"tokens": [*LLAMA.vocab.ids, "a"]}, "'a'"),
        ({"tokens": [*LLAMA.vocab.ids, "a b"]}, "' '"),
        ({"bos": 97}, "^a is missing"),
        ({"special": {BOS: 264}, "eos": []}, "ends a text"),
        ({"merges": []}, "merge 1"),
    ],
)
def test_unusable_vocabularies_of_gguf_are_rejected(changes, match):
    with pytest.raises(DataError, match=match):
        from_gguf(LLAMA, **changes)


def test_tokens_in_the_form_of_control_tokens_are_special_even_if_they_are_not_marked(tmp_path):
    kind = dataclasses.replace(LLAMA, added_tokens={**LLAMA.added_tokens, "<think>": 266})
    kind.save(tmp_path)
    text = json.dumps(tokenizer_json(kind.vocab)).rsplit('"special": true', 1)
    (tmp_path / "tokenizer.json").write_text('"special": false'.join(text))

    loaded = tokenizer.load_tokenizer(tmp_path)

    assert loaded.special_tokens == kind.special_tokens
    assert 266 not in loaded.encode("<think>")
    assert loaded.encode("<think>", ["<think>"]) == [266]


@pytest.mark.parametrize("ids", [[9, 263, 265], 265, [263, *range(264, 280)]])
def test_ends_that_a_model_names_are_kept_if_they_are_special(ids, tmp_path):
    kind = dataclasses.replace(LLAMA, stop_tokens=())
    kind.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": ids}))
    (tmp_path / "generation_config.json").write_text("{}")

    assert 265 in tokenizer.load_tokenizer(tmp_path).stop_ids


def test_more_ends_than_generation_checks_are_rejected():
    added = {f"<|{n}|>": 264 + n for n in range(8)}
    kind = dataclasses.replace(LLAMA, added_tokens=added, bos_token=None, add_bos=False)

    with pytest.raises(DataError, match="9 tokens"):
        from_gguf(kind, eos=[263, *added.values()])
    assert len(from_gguf(kind, eos=[263, *range(264, 271)]).stop_ids) == 8


def test_special_tokens_without_a_row_of_the_model_are_removed_everywhere():
    kept, shorter = LLAMA.truncate(266), LLAMA.truncate(264)

    assert kept == LLAMA
    assert (shorter.vocab_size, shorter.added_tokens) == (264, {})
    assert (shorter.prefix_ids, shorter.stop_ids) == ([], [263])
    assert shorter.template_tokens == ("", "<|end_of_text|>")


def test_vocab_json_of_qwen_has_its_own_split(tmp_path):
    OWN.save(tmp_path)
    replace(tmp_path / "tokenizer_config.json", "GPT2Tokenizer", "Qwen2TokenizerFast")

    assert tokenizer.load_tokenizer(tmp_path).pre_tokenizer == "qwen2"
