"""Text to token ids and back: GPT-2's byte-pair encoding, one's own, or plain bytes.

    tokenizer = load("gpt2")             # ships with gptjax
    tokenizer = load("bytes")            # 256 bytes and <|endoftext|>
    tokenizer = load("runs/mine/model")  # a folder with vocab.json and merges.txt
    tokenizer = train(texts, 2048)       # learned from text

All are one table of byte strings, run by one engine (tiktoken). Any text can be
encoded and comes back unchanged. `<|endoftext|>` separates documents; it exists as an
id only, and the same characters inside a text are ordinary text.
"""

import codecs
import dataclasses
import functools
import hashlib
import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import regex
import tiktoken
from jaxtyping import Int32, UInt32

from gptjax import strict_json
from gptjax.bpe import MAX_TOKEN_BYTES, PATTERN, halves, learn, utf8
from gptjax.errors import ConfigError, DataError

ENDOFTEXT = "<|endoftext|>"
GPT2_MERGES = Path(__file__).parent / "tokenizers" / "gpt2-merges.txt"
BOTH = "tokenizer.json"  # one file for both, as newer libraries write
VERSION = "#version: 0.2"  # first line of a merges.txt
MAX_FILE_BYTES = 64_000_000  # GPT-2's two files have 1.0 and 0.5 MB

# GPT-2's files write a byte as one visible character: most as themselves, the others
# as the characters from 256 on. The ids 0 to 255 follow the same order.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
CHARACTER = {byte: chr(byte) for byte in VISIBLE}
CHARACTER |= {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}
BYTE = {character: byte for byte, character in CHARACTER.items()}

# tiktoken's regex engine panics where a million blanks precede a word. From 2 * MANY
# on, they are handed over without the last one, before which a word ends anyway.
MANY = 100_000
MANY_BLANKS = regex.compile(rf"(?<!\s)\s{{{MANY},}}(?=\s\S)")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A table of tokens; ids run from 0 to vocab_size - 1, <|endoftext|> included."""

    name: str  # what load() or the training was asked for
    ranks: Mapping[bytes, int] = dataclasses.field(repr=False)  # token: id
    eot: int  # id of <|endoftext|>

    @property
    def vocab_size(self) -> int:
        """How many ids there are, <|endoftext|> included."""
        return len(self.ranks) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without <|endoftext|> even where it is spelled out.

        >>> load("gpt2").encode("Hello, do you like tea?")
        [15496, 11, 466, 345, 588, 8887, 30]

        Raises:
            DataError: the text holds a lone surrogate.
        """
        return [i for part in parts_of(text) for i in self.engine.encode_ordinary(part)]

    def encode_array(self, text: str) -> UInt32[np.ndarray, " L"]:
        """The same ids in an array, made without the interpreter's lock.

        Raises:
            DataError: as `encode`.
        """
        options: Any = {"disallowed_special": ()}  # none is special
        arrays = [self.engine.encode_to_numpy(x, **options) for x in parts_of(text)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def characters(self, ids: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
        """Text and ids of the fewest tokens each whose text is whole characters.

        A character that the last ids only begin is left out.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        start, text = 0, ""
        for n, token in enumerate(ids, 1):
            text += decoder.decode(self.decode_bytes([token]))
            if not decoder.getstate()[0]:
                yield text, list(ids[start:n])
                start, text = n, ""

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes of the ids, which may begin or end inside a character.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        numbers, size = list(map(operator.index, ids)), self.vocab_size
        for number in numbers:
            if not 0 <= number < size:
                raise DataError(
                    f"token id {number} is outside the tokenizer {self.name!r}, whose "
                    f"vocab_size={size} allows 0 to {size - 1}. Use the tokenizer "
                    "that made the ids."
                )
        return self.engine.decode_bytes(numbers)

    @functools.cached_property
    def engine(self) -> tiktoken.Encoding:
        """The machine that applies the table."""
        return tiktoken.Encoding(
            self.name,
            pat_str=PATTERN,
            mergeable_ranks=dict(self.ranks),
            special_tokens={ENDOFTEXT: self.eot},
        )

    @functools.cached_property
    def byte_lengths(self) -> Int32[np.ndarray, " V"]:
        """Bytes of text that each id stands for; 0 for <|endoftext|>."""
        length_V = np.zeros(self.vocab_size, np.int32)
        length_V[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return length_V

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of what decides the ids of a text; the name does not."""
        digest = hashlib.sha256(f"{PATTERN}\n{self.eot}\n".encode())
        for token in sorted(self.ranks, key=self.ranks.__getitem__):
            digest.update(f"{self.ranks[token]} {token.hex()}\n".encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes vocab.json and merges.txt as GPT-2 has them, which load() reads.

        Hugging Face's GPT2Tokenizer reads the folder too.
        """
        folder.mkdir(parents=True, exist_ok=True)
        ids = {visible(token): i for token, i in self.ranks.items()}
        ids[ENDOFTEXT] = self.eot
        vocab = json.dumps(dict(sorted(ids.items(), key=operator.itemgetter(1))))
        merges = "\n".join([VERSION, *merge_lines(self.ranks), ""])
        special = dict.fromkeys(["bos_token", "eos_token", "unk_token"], ENDOFTEXT)
        about = json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}, indent=2)
        (folder / "vocab.json").write_text(vocab, encoding="utf-8")
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(about + "\n", encoding="utf-8")


def parts_of(text: str) -> list[str]:
    """The text, cut where tiktoken could not take it whole.

    Raises:
        DataError: it holds a lone surrogate.
    """
    utf8(text)  # tiktoken would replace what has no UTF-8 form
    blocks = (text[i : i + MANY] for i in range(0, len(text), MANY))
    if not any(block.isspace() for block in blocks):
        return [text]
    ends = (match.end() for match in MANY_BLANKS.finditer(text))
    cuts = pairwise([0, *ends, len(text)])
    return [text[a:b] for a, b in cuts]


def load(name: str | Path) -> Tokenizer:
    """The tokenizer `gpt2`, `bytes`, or the one in a folder.

    Raises:
        ConfigError: there is no tokenizer of that name.
        DataError: the files in the folder do not describe a tokenizer.
    """
    if name == "gpt2":
        return gpt2()
    if name == "bytes":
        return numbered("bytes", range(256), [])
    if str(name).startswith("bpe:"):
        raise ConfigError(
            f"the tokenizer {str(name)!r} has to be learned from text first. Run "
            f"gptjax data prepare with --tokenizer {name}, then name the folder "
            "tokenizer/ in what it writes."
        )
    if is_folder(Path(name)):
        return read_folder(Path(name))
    raise ConfigError(
        f"there is no tokenizer {str(name)!r}: it needs to be gpt2, bytes or a folder "
        "with vocab.json and merges.txt, or tokenizer.json. Correct the name, or use "
        "gpt2."
    )


@functools.cache  # a command asks for it several times
def gpt2() -> Tokenizer:
    """The tokenizer of GPT-2."""
    return numbered("gpt2", VISIBLE + HIDDEN, [merged(x) for x in gpt2_lines()])


def is_folder(folder: Path) -> bool:
    """Whether the files of a tokenizer are there."""
    there = [(folder / name).is_file() for name in ("vocab.json", "merges.txt", BOTH)]
    return all(there[:2]) or there[2]


def train(texts: Iterable[str], vocab_size: int, name: str = "") -> Tokenizer:
    """A tokenizer learned from texts; see `gptjax.bpe.learn` for the rule.

    Args:
        texts: read once, one at a time.
        vocab_size: ids in all: 256 bytes, the merges, and <|endoftext|>, the last.
        name: of the tokenizer; "bpe:" and the size where none is given.

    Raises:
        ConfigError: the size leaves no room for the bytes.
        DataError: the texts do not have that many pairs that occur twice.
    """
    if vocab_size < 257:
        raise ConfigError(
            f"a vocabulary of {vocab_size} ids is too small: 256 bytes and {ENDOFTEXT} "
            "need 257. Ask for 257 or more, for example bpe:2048."
        )
    tokens = learn(texts, vocab_size - 257)
    if (most := 257 + len(tokens)) < vocab_size:
        raise DataError(
            f"the text is too short for a vocabulary of {vocab_size} ids: its repeated "
            f"pairs give {most}. Use bpe:{most} or smaller, or add text."
        )
    return numbered(name or f"bpe:{vocab_size}", range(256), tokens)


def numbered(name: str, order: Iterable[int], merges: list[bytes]) -> Tokenizer:
    """The tokenizer with the bytes in this order, then the merges, then the end."""
    tokens = [*(bytes([byte]) for byte in order), *merges]
    return Tokenizer(name, {token: i for i, token in enumerate(tokens)}, len(tokens))


def visible(token: bytes) -> str:
    """A token as GPT-2's files write it.

    >>> visible(b" tea")
    'Ġtea'
    """
    return "".join(map(CHARACTER.__getitem__, token))


def merged(line: str) -> bytes:
    """The token that one line of a merges.txt makes."""
    return bytes(map(BYTE.__getitem__, line.replace(" ", "")))


def gpt2_lines() -> list[str]:
    """The merges of GPT-2, as OpenAI's vocab.bpe has them."""
    return GPT2_MERGES.read_text(encoding="utf-8").split("\n")[1:-1]


def merge_lines(ranks: Mapping[bytes, int]) -> list[str]:
    """The lines of merges.txt that the ranks imply.

    Raises:
        DataError: a token is not made by merging two others.
    """
    if len(ranks) == 50_256 and ranks == load("gpt2").ranks:
        return gpt2_lines()  # known; finding them again takes a second
    lines = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        pair = halves(token, ranks)
        if pair is None:
            raise DataError(
                f"token {ranks[token]}, {visible(token)!r}, cannot be merged from two "
                "tokens with smaller ids"
            )
        lines.append(" ".join(map(visible, pair)))
    return lines


def read_folder(folder: Path) -> Tokenizer:
    """The tokenizer in a folder, whose files nobody vouches for."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    both = not (vocab.is_file() and merges.is_file())
    if both:
        vocab = merges = folder / BOTH
    try:
        table: Any = strict_json.parse(read_text(vocab))
        table, given = parts(table) if both else (table, [])
        ids = checked_ids(table)
        eot = ids.pop(ENDOFTEXT)
        ranks = checked_ranks(ids)
        implied = merge_lines(ranks)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise unusable(vocab, error) from error
    if not both:
        try:
            given = read_text(merges).removesuffix("\n").split("\n")
        except (OSError, ValueError) as error:
            raise unusable(merges, error) from error
        if given[0].startswith("#version"):
            given = given[1:]
    for number, (line, need) in enumerate(zip_longest(given, implied), start=1):
        if line != need:
            have, due = (line or "missing")[:80], need or "absent"
            why = f"merge {number} is {have!r}, but {vocab.name} needs it {due!r}"
            raise unusable(merges, why)
    return Tokenizer(str(folder), ranks, eot)


def parts(table: Any) -> tuple[Any, list[str]]:
    """The ids and the lines of merges in a tokenizer.json of the library tokenizers."""
    match table:
        case {
            "pre_tokenizer": {"type": "ByteLevel", **split},
            "model": {"type": "BPE", "vocab": dict(ids), "merges": list(merges)},
            **rest,
        } if not split.get("add_prefix_space") and not rest.get("normalizer"):
            added = {token["content"]: token["id"] for token in rest["added_tokens"]}
            lines = [m if isinstance(m, str) else " ".join(m) for m in merges]
            return ids | added, lines
    raise DataError("it is not a byte-level BPE like GPT-2's")


def unusable(file: Path, why: Any) -> DataError:
    """The error for a file that describes no tokenizer."""
    return DataError(
        f"the tokenizer file {file} cannot be used: {why}. Copy the folder again, or "
        "name another."
    )


def read_text(file: Path) -> str:
    """The text of a file of bounded size."""
    with file.open("rb") as stream:
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"it has more than {MAX_FILE_BYTES:,} bytes")
    return data.decode("utf-8")


def checked_ids(ids: Any) -> dict[str, int]:
    """The content of a vocab.json as token: id, with ids 0, 1, 2, ... in some order."""
    if not isinstance(ids, dict):
        raise DataError("it is not a JSON object of tokens and their ids")
    for token, i in ids.items():
        if type(i) is not int:
            raise DataError(f"the id of token {token[:80]!r} is no integer")
    if missing := set(range(len(ids))) - set(ids.values()):
        raise DataError(f"its {len(ids)} tokens leave the id {min(missing)} free")
    if ENDOFTEXT not in ids:
        raise DataError(f"it has no {ENDOFTEXT}")
    return ids


def checked_ranks(ids: Mapping[str, int]) -> dict[bytes, int]:
    """The tokens as bytes, among them every single byte."""
    ranks = {}
    for text, i in ids.items():
        if not 0 < len(text) <= MAX_TOKEN_BYTES:
            raise DataError(
                f"token {i} has {len(text)} bytes, not 1 to {MAX_TOKEN_BYTES}"
            )
        try:
            ranks[bytes(map(BYTE.__getitem__, text))] = i
        except KeyError as error:
            raise DataError(
                f"token {i} has the character {error}, which stands for no byte"
            ) from error
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise DataError(f"the byte {byte}, {CHARACTER[byte]!r}, is not in it")
    return ranks
