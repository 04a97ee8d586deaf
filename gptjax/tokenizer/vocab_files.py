"""Vocabulary files of Hugging Face: tokenizer.json, or vocab.json and merges.txt.

A byte string is written in the notation of GPT-2's files, a special token as it is.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.errors import DataError
from gptjax.fileio import strict_json
from gptjax.fileio.atomic import write_atomic
from gptjax.tokenizer.pre_tokenizer import BYTE_LEVEL, PRE_TOKENIZERS

ENDOFTEXT = "<|endoftext|>"
TOKENIZER_JSON = "tokenizer.json"  # vocabulary and merges in one file [HF tokenizers]
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"  # of earlier versions of transformers
ADDED_TOKENS = "added_tokens.json"  # beside vocab.json
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIGS = ("config.json", GENERATION_CONFIG)  # with the ids of end tokens
# In tokenizer.json, not set for byte-level BPE.
BPE_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
MERGES_HEADER = "#version: 0.2"  # first line of a merges.txt
MAX_TOKENIZER_BYTES = 64_000_000  # GPT-2's files are 1.0 and 0.5 MB, Llama 3's has 9 MB
CONTROL_TOKEN = re.compile(r"<[^<>\s]+>")
# Their vocab.json is like GPT-2's, but not the split into words.
PRE_TOKENIZER_OF_CLASS = {"Qwen2Tokenizer": "qwen2"}


class Vocab(NamedTuple):
    """Vocabulary of a tokenizer as files represent it."""

    ids: Mapping[str, Any]  # of all tokens
    merges: Sequence[str]  # "left right"
    special: Sequence[str]  # tokens that are no byte strings
    eot_name: str = ENDOFTEXT
    pre_tokenizer: str = "gpt-2"
    ignore_merges: bool = False  # a word that is a token needs no merges
    bos_name: str = ""
    add_bos: bool = False  # bos_name precedes each text
    stop_names: Sequence[str] = ()  # special tokens that end a reply besides eot_name


def read_vocab(folder: Path) -> Vocab:
    """Reads the files of a tokenizer; they are untrusted, and may raise any error.

    Files: tokenizer.json, or vocab.json and merges.txt; and tokenizer_config.json.
    """
    config = read_optional_json(folder / TOKENIZER_CONFIG)
    named = config | read_optional_json(folder / SPECIAL_TOKENS_MAP)
    for name in ("add_prefix_space", "add_eos_token"):
        if config.get(name):
            raise DataError(f"{name}={config[name]!r:.60}, but gptjax adds nothing like it")
    read = read_tokenizer_json if (folder / TOKENIZER_JSON).exists() else read_vocab_and_merges
    vocab, added = read(folder, named)
    ids = {**vocab.ids, **{token["content"]: token["id"] for token in added}}
    # A byte that also pads, for example, is still ordinary text.
    added = [token for token in added if len(token["content"]) > 1]
    for token in added:
        if token.get("special") is not True and not (
            token["content"] == ENDOFTEXT or CONTROL_TOKEN.fullmatch(token["content"])
        ):
            raise DataError(
                f"the added token {token['content']!r:.80} is not special: it would be encoded "
                "where it occurs in a text, which gptjax does not support"
            )
    if not isinstance(add_bos := config.get("add_bos_token", vocab.add_bos), bool | None):
        raise DataError(f"add_bos_token={add_bos!r:.60} is not true or false")
    eos_names = token_names(named.get("eos_token"))
    special = {ENDOFTEXT, *eos_names, *(token["content"] for token in added)} & ids.keys()
    stop_ids = read_end_ids(folder)
    stop_names = [name for name in special if ids[name] in stop_ids]
    eot_name = (*eos_names, *({ENDOFTEXT} & special), *sorted(stop_names), ENDOFTEXT)[0]
    bos_name = vocab.bos_name or (*token_names(named.get("bos_token")), "")[0]
    return vocab._replace(
        ids=ids,
        special=sorted(special, key=ids.__getitem__),
        eot_name=eot_name,
        bos_name=bos_name,
        add_bos=add_bos is True,
        stop_names=[*token_names(config.get("stop_tokens")), *stop_names],
    )


def read_end_ids(folder: Path) -> list[int]:
    """Reads the ids of tokens that end a text from the configs of a model."""
    end_ids = []
    for name in MODEL_CONFIGS:
        value = read_optional_json(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [value] * (value is not None)
        if not all(type(i) is int for i in ids):
            raise DataError(f"eos_token_id={value!r:.60} of {name} is no id or list of ids")
        end_ids += ids
    return end_ids


def read_optional_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; {} if there is no such file."""
    value = strict_json.read_json(path, MAX_TOKENIZER_BYTES) if path.exists() else {}
    return require_object(value, path.name)


def require_object(value: Any, name: str) -> dict[str, Any]:
    """Returns a JSON value that must be an object."""
    if not isinstance(value, dict):
        raise DataError(f"{name} is {value!r:.40}, not an object")
    return value


def read_vocab_and_merges(folder: Path, named: Mapping[str, Any]) -> tuple[Vocab, list[Any]]:
    """Reads vocab.json and merges.txt; returns the added tokens as well."""
    vocab_json = strict_json.read_json(folder / "vocab.json", MAX_TOKENIZER_BYTES)
    ids = require_object(vocab_json, "vocab.json")
    data = strict_json.read_small_file(folder / "merges.txt", MAX_TOKENIZER_BYTES)
    lines = data.decode("utf-8").removesuffix("\n").split("\n")
    lines = lines[lines[0].startswith("#version") :]
    values = [v for k, v in named.items() if k.endswith(("_token", "_tokens"))]
    special = [name for value in values for name in token_names(value)]
    decoder = require_object(named.get("added_tokens_decoder", {}), "added_tokens_decoder")
    added = [
        {**require_object(x, f"added_tokens_decoder {n:.40}"), "id": int(n)}
        for n, x in decoder.items()
    ] or [
        {"content": name, "id": token_id, "special": name in special}
        for name, token_id in read_optional_json(folder / ADDED_TOKENS).items()
    ]
    added += [{"content": x, "id": ids[x], "special": True} for x in special if x in ids]
    tokenizer_class = str(named.get("tokenizer_class")).removesuffix("Fast")
    pre_tokenizer = PRE_TOKENIZER_OF_CLASS.get(tokenizer_class, "gpt-2")
    return Vocab(ids, lines, [], pre_tokenizer=pre_tokenizer), added


def token_names(value: Any) -> list[str]:
    """Names of the tokens in a value of tokenizer_config.json."""
    match value:
        case str(name) | {"content": str(name)}:
            return [name]
        case list():
            return [name for item in value for name in token_names(item)]
    return []


def read_tokenizer_json(folder: Path, named: Mapping[str, Any]) -> tuple[Vocab, list[Any]]:
    """Reads a tokenizer.json; returns the added tokens as well."""
    match strict_json.read_json(folder / TOKENIZER_JSON, MAX_TOKENIZER_BYTES):
        case {
            "pre_tokenizer": dict(pre_tokenizer),
            "model": {"type": "BPE", "vocab": dict(ids), "merges": list(pairs), **options},
            "added_tokens": list(added),
            **rest,
        }:
            pre = find_pre_tokenizer(pre_tokenizer, rest.get("normalizer"))
            if changed := [name for name in BPE_OPTIONS if options.get(name)]:
                raise DataError(f"{changed[0]} of {TOKENIZER_JSON} is not supported")
            lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
            bos_name = find_bos(rest.get("post_processor"))
            return Vocab(
                ids,
                lines,
                [],
                pre_tokenizer=pre,
                ignore_merges=options.get("ignore_merges") is True,
                bos_name=bos_name,
                add_bos=bool(bos_name),
            ), added
    raise DataError("not a byte-level BPE like GPT-2's")


def find_pre_tokenizer(pre_tokenizer: Mapping[str, Any], normalizer: Any) -> str:
    """Finds the name of the pre-tokenizer and normalizer in a tokenizer.json."""
    steps = [
        {**(BYTE_LEVEL if step.get("type") == "ByteLevel" else {}), **step}
        for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    ]
    for step in steps:
        step.pop("trim_offsets", None)  # of character offsets
    for name, known in PRE_TOKENIZERS.items():
        if (steps, normalizer) == ([*known.hf_steps], known.hf_normalizer):
            return name
    raise DataError(
        f"the pre_tokenizer and normalizer of {TOKENIZER_JSON} are not those of "
        f"{', '.join(PRE_TOKENIZERS)}"
    )


def find_bos(processor: Any) -> str:
    """Finds the token that a post-processor adds before each text; "" if none."""
    match processor:
        case None | {"type": "ByteLevel"}:
            return ""
        case {"type": "Sequence", "processors": [*steps]}:
            return "".join(map(find_bos, steps))
        case {"type": "TemplateProcessing", "single": [*start, {"Sequence": {"id": "A"}}]}:
            match start:
                case []:
                    return ""
                case [{"SpecialToken": {"id": str(name)}}]:
                    return name
    raise DataError(f"post_processor of {TOKENIZER_JSON} adds more than one token before a text")


def write_vocab(vocab: Vocab, folder: Path) -> None:
    """Writes the files of a tokenizer: vocab.json and merges.txt if they are enough."""
    files = {"vocab.json": json.dumps(vocab.ids)}
    files["merges.txt"] = "\n".join([MERGES_HEADER, *vocab.merges, ""])
    bos_name, eot_name = vocab.bos_name, vocab.eot_name
    config: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer"}
    config |= {"bos_token": bos_name or eot_name, "eos_token": eot_name, "unk_token": eot_name}
    is_like_gpt2 = vocab.pre_tokenizer == "gpt-2" and eot_name == ENDOFTEXT
    if not is_like_gpt2 or vocab.add_bos or vocab.ignore_merges:
        files = {TOKENIZER_JSON: json.dumps(tokenizer_json(vocab), ensure_ascii=False)}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eot_name}
        config |= {"bos_token": bos_name} if bos_name else {}
    added = [name for name in vocab.special if name != eot_name]
    config |= {"additional_special_tokens": added} if added else {}
    config |= {"stop_tokens": vocab.stop_names} if vocab.stop_names else {}
    files[TOKENIZER_CONFIG] = json.dumps(config, indent=2) + "\n"
    for name, text in files.items():
        write_atomic(folder / name, text, MAX_TOKENIZER_BYTES)


def tokenizer_json(vocab: Vocab) -> dict[str, Any]:
    """Content of a tokenizer.json."""
    known = PRE_TOKENIZERS[vocab.pre_tokenizer]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = dict.fromkeys(("dropout", "unk_token", *BPE_OPTIONS[1:3]))
    model |= {"fuse_unk": False, "byte_fallback": False}
    byte_level = {**BYTE_LEVEL, "add_prefix_space": True, "trim_offsets": True}
    processor: dict[str, Any] = {**byte_level, "trim_offsets": False}
    if vocab.add_bos:
        bos, (a, b) = vocab.bos_name, ({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
        start = {"SpecialToken": {"id": bos, "type_id": 0}}
        processor = {
            "type": "TemplateProcessing",
            "single": [start, a],
            "pair": [start, a, start, b],
            "special_tokens": {bos: {"id": bos, "ids": [vocab.ids[bos]], "tokens": [bos]}},
        }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocab.ids[name], "content": name, **flags, "special": True}
            for name in vocab.special
        ],
        "normalizer": known.hf_normalizer,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {**step, **({"trim_offsets": True} if step["type"] == "ByteLevel" else {})}
                for step in known.hf_steps
            ],
        },
        "post_processor": processor,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            **model,
            "ignore_merges": vocab.ignore_merges,
            "vocab": vocab.ids,
            "merges": vocab.merges,
        },
    }
