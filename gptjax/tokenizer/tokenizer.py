"""Byte-level BPE tokenizers: GPT-2's, trained ones and plain bytes.

Each is a table of byte strings and ids, applied by tiktoken. Encoding is lossless for
any text. `<|endoftext|>` separates documents; it exists only as an id: the same
characters in a text are encoded as ordinary text.
"""

import codecs
import dataclasses
import functools
import hashlib
import json
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import regex
import tiktoken
from jaxtyping import Int32, UInt32

from gptjax.errors import ConfigError, DataError
from gptjax.fileio import strict_json
from gptjax.fileio.atomic import write_atomic
from gptjax.tokenizer.bpe import MAX_TOKEN_BYTES, SPLIT_PATTERN, encode_utf8, split_merge, train_bpe

ENDOFTEXT = "<|endoftext|>"
MIN_TRAINED_VOCAB_SIZE = 257
GPT2_MERGES = Path(__file__).parent / "gpt2" / "gpt2-merges.txt"
TOKENIZER_JSON = "tokenizer.json"  # vocabulary and merges in one file [HF tokenizers]
MERGES_HEADER = "#version: 0.2"  # first line of a merges.txt
MAX_TOKENIZER_BYTES = 64_000_000  # GPT-2's files are 1.0 and 0.5 MB

# GPT-2's files represent each byte by one printable character: itself where it is
# printable, else a character from 256 upwards. Ids 0 to 255 follow the same order.
PRINTABLE_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNPRINTABLE_BYTES = [byte for byte in range(256) if byte not in PRINTABLE_BYTES]
BYTE_TO_CHAR = {byte: chr(byte) for byte in PRINTABLE_BYTES}
BYTE_TO_CHAR |= {byte: chr(256 + i) for i, byte in enumerate(UNPRINTABLE_BYTES)}
CHAR_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHAR.items()}

# tiktoken's regex engine panics on a million whitespace characters before a word.
# Longer runs are encoded separately, without their last character: the regex splits
# there anyway.
MAX_WHITESPACE_RUN = 100_000
LONG_WHITESPACE_PATTERN = regex.compile(rf"(?<!\s)\s{{{MAX_WHITESPACE_RUN},}}(?=\s\S)")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Byte-level BPE tokenizer; ids are 0 to vocab_size - 1."""

    name: str  # name or path it was loaded from
    ranks: Mapping[bytes, int] = dataclasses.field(repr=False)  # token -> id
    eot_token: int  # id of <|endoftext|>

    @property
    def vocab_size(self) -> int:
        """Number of ids, <|endoftext|> included."""
        return len(self.ranks) + 1

    def encode(self, text: str) -> list[int]:
        """Encodes text; a literal "<|endoftext|>" is encoded as ordinary text.

        >>> load_tokenizer("gpt2").encode("Hello, do you like tea?")
        [15496, 11, 466, 345, 588, 8887, 30]
        """
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> UInt32[np.ndarray, " L"]:
        """Encodes text to an array; releases the GIL."""
        encode_utf8(text)  # raises: tiktoken would silently replace lone surrogates
        # Special tokens in the text are text.
        encode = functools.partial(self.encoding.encode_to_numpy, disallowed_special=())
        return np.concatenate([encode(part) for part in split_long_whitespace(text)])

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Decodes ids; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def iter_characters(self, ids: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
        """Yields the text and ids of the shortest runs of complete characters.

        An incomplete character at the end is dropped.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        start, text = 0, ""
        for n, token in enumerate(ids, 1):
            text += decoder.decode(self.decode_bytes([token]))
            if not decoder.getstate()[0]:
                yield text, list(ids[start:n])
                start, text = n, ""

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """Decodes ids to bytes, which may start or end inside a character."""
        token_ids, vocab_size = list(map(operator.index, ids)), self.vocab_size
        if wrong := [n for n in token_ids if not 0 <= n < vocab_size]:
            raise DataError(
                f"token id {wrong[0]} is out of range for tokenizer {self.name!r}: "
                f"vocab_size={vocab_size} allows 0 to {vocab_size - 1}. Use the tokenizer "
                "that encoded the text."
            )
        return self.encoding.decode_bytes(token_ids)

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """Tiktoken encoding with the same table."""
        return tiktoken.Encoding(
            self.name,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=dict(self.ranks),
            special_tokens={ENDOFTEXT: self.eot_token},
        )

    @functools.cached_property
    def byte_lengths(self) -> Int32[np.ndarray, " V"]:
        """Length of each token in bytes; 0 for <|endoftext|>."""
        length_V = np.zeros(self.vocab_size, np.int32)
        length_V[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return length_V

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the split pattern and all tokens; independent of the name."""
        digest = hashlib.sha256(f"{SPLIT_PATTERN}\n{self.eot_token}\n".encode())
        for token in sorted(self.ranks, key=self.ranks.__getitem__):
            digest.update(f"{self.ranks[token]} {token.hex()}\n".encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes vocab.json and merges.txt in GPT-2's format.

        `load_tokenizer` and Hugging Face's GPT2Tokenizer read the folder.
        """
        ids = {bytes_to_unicode(token): i for token, i in self.ranks.items()}
        ids[ENDOFTEXT] = self.eot_token
        special_tokens = dict.fromkeys(["bos_token", "eos_token", "unk_token"], ENDOFTEXT)
        config = {"tokenizer_class": "GPT2Tokenizer", **special_tokens}
        for name, text in {
            "vocab.json": json.dumps(dict(sorted(ids.items(), key=operator.itemgetter(1)))),
            "merges.txt": "\n".join([MERGES_HEADER, *derive_merge_lines(self.ranks), ""]),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }.items():
            write_atomic(folder / name, text, MAX_TOKENIZER_BYTES)


def split_long_whitespace(text: str) -> list[str]:
    """Splits text inside whitespace runs too long for tiktoken."""
    blocks = (text[i : i + MAX_WHITESPACE_RUN] for i in range(0, len(text), MAX_WHITESPACE_RUN))
    if not any(block.isspace() for block in blocks):
        return [text]
    ends = (match.end() for match in LONG_WHITESPACE_PATTERN.finditer(text))
    return [text[a:b] for a, b in pairwise([0, *ends, len(text)])]


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Loads the tokenizer `gpt2`, `bytes`, or one from a folder."""
    if name == "gpt2":
        return gpt2_tokenizer()
    if name == "bytes":
        return from_merges("bytes", range(256), [])
    if is_tokenizer_dir(Path(name)):
        return read_tokenizer_dir(Path(name))
    raise ConfigError(
        f"there is no tokenizer {str(name)!r}: expected gpt2, bytes or a folder with "
        "vocab.json and merges.txt, or tokenizer.json. Correct the name; for bpe:N, run "
        "gptjax data prepare and use the tokenizer/ folder in its output."
    )


@functools.cache  # a command loads it several times
def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer."""
    merges = [unicode_to_bytes(line.replace(" ", "")) for line in read_gpt2_merges()]
    return from_merges("gpt2", PRINTABLE_BYTES + UNPRINTABLE_BYTES, merges)


def is_tokenizer_dir(folder: Path) -> bool:
    """True if the folder contains the files of a tokenizer."""
    has_pair = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    return has_pair or (folder / TOKENIZER_JSON).is_file()


def train_tokenizer(texts: Iterable[str], vocab_size: int, name: str = "") -> Tokenizer:
    """Trains a byte-level BPE tokenizer; see `gptjax.tokenizer.bpe.train_bpe`.

    `vocab_size` counts 256 bytes, the merges and <|endoftext|>, whose id is the last.
    `name` is "bpe:" and the size by default.
    """
    untrained_vocab_size(f"bpe:{vocab_size}")
    tokens = train_bpe(texts, vocab_size - 257)
    if (max_vocab_size := 257 + len(tokens)) < vocab_size:
        raise DataError(
            f"the text is too short to learn a vocabulary of {vocab_size} tokens: it "
            f"allows at most {max_vocab_size}. Use --data.tokenizer "
            f"bpe:{max_vocab_size} or bytes, or add text."
        )
    return from_merges(name or f"bpe:{vocab_size}", range(256), tokens)


def untrained_vocab_size(name: str) -> int:
    """Vocabulary size of "bpe:SIZE", which is to be trained; 0 for other names."""
    if not name.startswith("bpe:"):
        return 0
    if not re.fullmatch(r"bpe:\d{1,9}", name, re.ASCII) or int(name[4:]) < MIN_TRAINED_VOCAB_SIZE:
        raise ConfigError(
            f"data.tokenizer={name!r:.60} needs a size of {MIN_TRAINED_VOCAB_SIZE} or more: 256 "
            f"bytes and {ENDOFTEXT}. Write, for example, bpe:2048."
        )
    return int(name[4:])


def from_merges(name: str, byte_values: Iterable[int], merges: list[bytes]) -> Tokenizer:
    """Numbers the bytes in this order, then the merges, then <|endoftext|>."""
    tokens = [*(bytes([byte]) for byte in byte_values), *merges]
    return Tokenizer(name, {token: i for i, token in enumerate(tokens)}, len(tokens))


def bytes_to_unicode(token: bytes) -> str:
    """Writes a token in the notation of GPT-2's files.

    >>> bytes_to_unicode(b" tea")
    'Ġtea'
    """
    return "".join(map(BYTE_TO_CHAR.__getitem__, token))


def unicode_to_bytes(token: str) -> bytes:
    """Reads a token in the notation of GPT-2's files."""
    return bytes(map(CHAR_TO_BYTE.__getitem__, token))


def read_gpt2_merges() -> list[str]:
    """Reads GPT-2's merges (OpenAI's vocab.bpe)."""
    return GPT2_MERGES.read_text(encoding="utf-8").split("\n")[1:-1]


def derive_merge_lines(ranks: Mapping[bytes, int]) -> list[str]:
    """Derives the lines of merges.txt from the ranks."""
    if len(ranks) == 50_256 and ranks == load_tokenizer("gpt2").ranks:
        return read_gpt2_merges()  # deriving them takes a second
    lines = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        pair = split_merge(token, ranks)
        if pair is None:
            raise DataError(
                f"token {ranks[token]}, {bytes_to_unicode(token)!r}, cannot be merged "
                "from two tokens with smaller ids"
            )
        lines.append(" ".join(map(bytes_to_unicode, pair)))
    return lines


def read_tokenizer_dir(folder: Path) -> Tokenizer:
    """Reads a tokenizer from a folder of untrusted files."""
    try:
        vocab, merge_lines = read_tokenizer_files(folder)
        ranks, eot_token = vocab_to_ranks(vocab)
        pairs = zip_longest(merge_lines, derive_merge_lines(ranks))
        for number, (actual, expected) in enumerate(pairs, start=1):
            if actual != expected:
                raise DataError(
                    f"merge {number} is {(actual or 'missing')[:80]!r}, but the vocabulary "
                    f"implies {expected or 'absent'!r}"
                )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"invalid tokenizer files in {folder}: {error}. Copy the folder again, or use "
            "another tokenizer."
        ) from error
    return Tokenizer(str(folder), ranks, eot_token)


def read_tokenizer_files(folder: Path) -> tuple[Any, list[str]]:
    """Reads vocabulary and merges: vocab.json and merges.txt, or tokenizer.json."""
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    if vocab_file.is_file() and merges_file.is_file():
        merges = strict_json.read_small_file(merges_file, MAX_TOKENIZER_BYTES).decode("utf-8")
        lines = merges.removesuffix("\n").split("\n")
        start = lines[0].startswith("#version")
        return strict_json.read_json(vocab_file, MAX_TOKENIZER_BYTES), lines[start:]
    match strict_json.read_json(folder / TOKENIZER_JSON, MAX_TOKENIZER_BYTES):
        case {
            "pre_tokenizer": {"type": "ByteLevel", **split},
            "model": {"type": "BPE", "vocab": dict(ids), "merges": list(pairs)},
            **rest,
        } if not split.get("add_prefix_space") and not rest.get("normalizer"):
            added_tokens = {token["content"]: token["id"] for token in rest["added_tokens"]}
            lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
            return ids | added_tokens, lines
    raise DataError("not a byte-level BPE like GPT-2's")


def vocab_to_ranks(vocab: Any) -> tuple[dict[bytes, int], int]:
    """Validates a vocab.json; returns the id of each byte string and of <|endoftext|>.

    The file maps tokens to the ids 0, 1, 2, ... in any order.
    """
    if not isinstance(vocab, dict):
        raise DataError("not a JSON object of tokens and ids")
    ranks = {}
    for token, token_id in vocab.items():
        if type(token_id) is not int:
            raise DataError(f"the id of token {token[:80]!r} is not an integer")
        if token == ENDOFTEXT:
            continue
        if not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise DataError(f"token {token_id} has {len(token)} bytes, not 1 to {MAX_TOKEN_BYTES}")
        if others := set(token) - CHAR_TO_BYTE.keys():
            raise DataError(f"token {token_id} has {min(others)!r}, which represents no byte")
        ranks[unicode_to_bytes(token)] = token_id
    if missing := set(range(len(vocab))) - set(vocab.values()):
        raise DataError(f"none of its {len(vocab)} tokens has the id {min(missing)}")
    if ENDOFTEXT not in vocab:
        raise DataError(f"{ENDOFTEXT} is missing")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"byte {missing[0]} ({BYTE_TO_CHAR[missing[0]]!r}) is missing")
    return ranks, vocab[ENDOFTEXT]
