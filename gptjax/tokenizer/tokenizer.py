"""Byte-level BPE tokenizers: GPT-2's, trained ones, plain bytes, and those of Llamas.

Each is a table of byte strings and ids, applied by tiktoken to the words of a
pre-tokenizer. Encoding is lossless, except that some foreign vocabularies lack bytes
that are rare in text, and that some normalize Unicode. The end-of-text token separates
documents. Like other special tokens, it exists only as an id: the same characters in a
text are encoded as ordinary text.
"""

import codecs
import dataclasses
import functools
import hashlib
import operator
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tiktoken
from jaxtyping import Int32, UInt

from gptjax.errors import ConfigError, DataError, check_type
from gptjax.fileio.paths import user_path
from gptjax.tokenizer.bpe import MAX_TOKEN_BYTES, encode_utf8, split_merge, train_bpe
from gptjax.tokenizer.pre_tokenizer import PRE_TOKENIZERS
from gptjax.tokenizer.vocab_files import ENDOFTEXT, TOKENIZER_JSON, Vocab, read_vocab, write_vocab

MIN_TRAINED_VOCAB_SIZE = 257
MAX_STOP_IDS = 8  # tokens that end a text
GPT2_MERGES = Path(__file__).parent / "gpt2" / "gpt2-merges.txt"
# Control tokens that end a text or a reply in Llama 3, Qwen and SmolLM2. A GGUF file
# names only one of them; llama.cpp stops at all of them, too.
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")
# Not in UTF-8, only in unassigned characters (U+40000 to U+BFFFF), or ASCII control
# characters but tab and line breaks. Vocabularies such as SmolLM2's lack some of them.
RARE_BYTES = {0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100), *range(32), 127} - {*b"\t\n\r"}

# GPT-2's files represent each byte by one printable character: itself where it is
# printable, else a character from 256 upwards. Ids 0 to 255 follow the same order.
PRINTABLE_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNPRINTABLE_BYTES = [byte for byte in range(256) if byte not in PRINTABLE_BYTES]
BYTE_TO_CHAR = {byte: chr(byte) for byte in PRINTABLE_BYTES}
BYTE_TO_CHAR |= {byte: chr(256 + i) for i, byte in enumerate(UNPRINTABLE_BYTES)}
CHAR_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHAR.items()}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Byte-level BPE tokenizer; ids are 0 to vocab_size - 1."""

    name: str  # name or path it was loaded from
    ranks: Mapping[bytes, int] = dataclasses.field(repr=False)  # token -> id
    eot_token: int  # id of the end-of-text token
    # Ids of other special tokens, such as [PAD].
    added_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict, repr=False)
    _: dataclasses.KW_ONLY
    eot_name: str = ENDOFTEXT  # the `eos_token` of transformers
    pre_tokenizer: str = "gpt-2"  # one of PRE_TOKENIZERS
    bos_token: int | None = None  # id of the token that chat templates call bos_token
    add_bos: bool = False  # the model expects bos_token before each text
    stop_tokens: tuple[int, ...] = ()  # end a reply like eot_token, such as <|eot_id|>

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of all tokens that no text is encoded to."""
        return {self.eot_name: self.eot_token, **self.added_tokens}

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a generated text."""
        return list(dict.fromkeys([self.eot_token, *self.stop_tokens]))

    @property
    def template_tokens(self) -> tuple[str, str]:
        """Variables `bos_token` and `eos_token` of chat templates."""
        if self.bos_token is None:
            return ENDOFTEXT if self.eot_name == ENDOFTEXT else "", self.eot_name
        names = {token_id: name for name, token_id in self.special_tokens.items()}
        return names[self.bos_token], self.eot_name

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.ranks) + 1 + len(self.added_tokens)

    def encode(self, text: str, special: Collection[str] = ()) -> list[int]:
        """Encodes text; special tokens are ordinary text, except those in `special`.

        >>> load_tokenizer("gpt2").encode("Hello, do you like tea?")
        [15496, 11, 466, 345, 588, 8887, 30]
        """
        return self.encode_array(text, special).tolist()

    @property
    def prefix_ids(self) -> list[int]:
        """Tokens that the model expects before each text: `bos_token`, or none."""
        return [self.bos_token] if self.add_bos and self.bos_token is not None else []

    def encode_prompt(self, text: str) -> list[int]:
        """Encodes the start of a text, after `prefix_ids`."""
        return self.prefix_ids + self.encode(text)

    @property
    def is_bytewise(self) -> bool:
        """True if the tokens of text are the 256 bytes, with the ids 0 to 255."""
        return len(self.ranks) == self.eot_token == 256

    def encode_array(self, text: str, special: Collection[str] = ()) -> UInt[np.ndarray, " L"]:
        """Encodes text to an array; releases the GIL unless `is_bytewise`."""
        check_type("text", text, str, "Pass one text.")
        splitter = PRE_TOKENIZERS[self.pre_tokenizer]
        text = splitter.normalize(text)
        data = encode_utf8(text)  # raises: tiktoken would silently replace lone surrogates
        if self.is_bytewise and not special:
            return np.frombuffer(data.translate(self.byte_table), np.uint8)
        options: Any = {"allowed_special": set(special), "disallowed_special": ()}
        parts = splitter.split_long_whitespace(text)
        ids = np.concatenate([self.encoding.encode_to_numpy(part, **options) for part in parts])
        return ids[ids < self.vocab_size] if self.missing_bytes else ids

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
        try:
            token_ids, vocab_size = list(map(operator.index, ids)), self.vocab_size
        except TypeError:
            raise DataError(
                f"ids={ids!r:.60} are no list of token ids, which are integers."
            ) from None
        if wrong := [n for n in token_ids if not 0 <= n < vocab_size]:
            raise DataError(
                f"token id {wrong[0]} is out of range for tokenizer {self.name!r}: "
                f"vocab_size={vocab_size} allows 0 to {vocab_size - 1}. Use the tokenizer "
                "that encoded the text."
            )
        return self.encoding.decode_bytes(token_ids)

    def truncate(self, vocab_size: int) -> "Tokenizer":
        """Removes special tokens with ids from `vocab_size` upwards."""
        return dataclasses.replace(
            self,
            added_tokens={name: i for name, i in self.added_tokens.items() if i < vocab_size},
            bos_token=self.bos_token if (self.bos_token or 0) < vocab_size else None,
            stop_tokens=tuple(i for i in self.stop_tokens if i < vocab_size),
        )

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """Tiktoken encoding with the same table; missing bytes have ids after it."""
        missing = {byte: self.vocab_size + n for n, byte in enumerate(self.missing_bytes)}
        return tiktoken.Encoding(
            self.name,
            pat_str=PRE_TOKENIZERS[self.pre_tokenizer].pattern,
            mergeable_ranks={**self.ranks, **missing},
            special_tokens=self.special_tokens,
        )

    @functools.cached_property
    def missing_bytes(self) -> list[bytes]:
        """Bytes without a token, which encoding drops."""
        return [byte for byte in map(bytes, zip(range(256))) if byte not in self.ranks]

    @functools.cached_property
    def byte_table(self) -> bytes:
        """Id of each byte, if the tokenizer `is_bytewise`."""
        return bytes(self.ranks[bytes([byte])] for byte in range(256))

    @functools.cached_property
    def byte_lengths(self) -> Int32[np.ndarray, " V"]:
        """Length of each token in bytes; 0 for special tokens."""
        length_V = np.zeros(self.vocab_size, np.int32)
        length_V[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return length_V

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of all that determines ids; independent of the name."""
        pattern = PRE_TOKENIZERS[self.pre_tokenizer].pattern
        digest = hashlib.sha256(f"{pattern}\n{self.eot_token}\n".encode())
        for token in sorted(self.ranks, key=self.ranks.__getitem__):
            digest.update(f"{self.ranks[token]} {token.hex()}\n".encode())
        for name, token_id in sorted(self.added_tokens.items()):
            digest.update(f"{token_id} {name!r}\n".encode())
        extras = (self.eot_name, self.pre_tokenizer, self.bos_token, self.add_bos)
        if extras != (ENDOFTEXT, "gpt-2", None, False):
            digest.update(f"{extras}\n".encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the files that `load_tokenizer` and Hugging Face's AutoTokenizer read.

        They are vocab.json and merges.txt in GPT-2's format, or tokenizer.json.
        """
        write_vocab(self.vocab, folder)

    @property
    def vocab(self) -> Vocab:
        """Vocabulary in the notation of Hugging Face's files."""
        special = self.special_tokens
        names = {token_id: name for name, token_id in special.items()}
        ids = {bytes_to_unicode(token): i for token, i in self.ranks.items()} | special
        merges = derive_merge_lines(self.ranks, ignore_merges=True)
        return Vocab(
            ids=dict(sorted(ids.items(), key=operator.itemgetter(1))),
            merges=merges,
            special=list(special),
            eot_name=self.eot_name,
            pre_tokenizer=self.pre_tokenizer,
            ignore_merges=len(merges) < sum(len(token) > 1 for token in self.ranks),
            bos_name="" if self.bos_token is None else names[self.bos_token],
            add_bos=self.add_bos,
            stop_names=[names[token_id] for token_id in self.stop_tokens],
        )


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Loads the tokenizer `gpt2`, `bytes`, or one from a folder."""
    if name == "gpt2":
        return gpt2_tokenizer()
    if name == "bytes":
        return from_merges("bytes", range(256), [])
    if is_tokenizer_dir(user_path(name)):
        return read_tokenizer_dir(user_path(name))
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
    has_pair = all((folder / name).exists() for name in ("vocab.json", "merges.txt"))
    return has_pair or (folder / TOKENIZER_JSON).exists()


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
            f"allows at most {max_vocab_size}. Use the tokenizer bpe:{max_vocab_size} or "
            "bytes, or add text."
        )
    return from_merges(name or f"bpe:{vocab_size}", range(256), tokens)


def untrained_vocab_size(name: str) -> int:
    """Vocabulary size of "bpe:SIZE", which is to be trained; 0 for other names."""
    if not name.startswith("bpe:"):
        return 0
    if not re.fullmatch(r"bpe:\d{1,9}", name, re.ASCII) or int(name[4:]) < MIN_TRAINED_VOCAB_SIZE:
        raise ConfigError(
            f"the tokenizer {name!r:.60} needs a size of {MIN_TRAINED_VOCAB_SIZE} or more: 256 "
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


def derive_merge_lines(ranks: Mapping[bytes, int], ignore_merges: bool = False) -> list[str]:
    """Derives the lines of merges.txt from the ranks.

    With `ignore_merges`, a token may also be a whole word that no merge creates.
    """
    if len(ranks) == 50_256 and ranks == load_tokenizer("gpt2").ranks:
        return read_gpt2_merges()  # deriving them takes a second
    lines = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        pair = split_merge(token, ranks)
        if pair is not None:
            lines.append(" ".join(map(bytes_to_unicode, pair)))
        elif not ignore_merges:
            raise DataError(
                f"token {ranks[token]}, {bytes_to_unicode(token)!r}, cannot be merged "
                "from two tokens"
            )
    return lines


def tokenizer_from_vocab(
    name: str,
    tokens: Sequence[str],
    merges: Sequence[str],
    *,
    special: Mapping[str, int],
    pre: str,
    bos: int | None,
    eos: Sequence[int],
    add_bos: bool,
) -> Tokenizer:
    """Builds a tokenizer from the untrusted vocabulary of a GGUF file.

    Args:
        name: of the tokenizer.
        tokens: by id; byte strings in the notation of GPT-2's files.
        merges: "left right" in the same notation.
        special: ids of tokens that are no byte strings.
        pre: name of the pre-tokenizer.
        bos: id of the token before a text, if any.
        eos: ids of the tokens that end a text.
        add_bos: the model expects `bos` before each text.
    """
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise DataError(f"its pre-tokenizer is {pre!r:.60}, but gptjax only knows {known}")
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        first = next(token for token_id, token in enumerate(tokens) if ids[token] != token_id)
        raise DataError(f"its token {first!r:.80} occurs twice")
    names = {token_id: token for token, token_id in special.items()}
    ends = [names[n] for n in eos if n in names] + [n for n in END_NAMES if n in special]
    if not ends:
        raise DataError("it names no token that ends a text")
    vocab = Vocab(
        ids,
        merges,
        list(special),
        ends[0],
        pre,
        ignore_merges=pre == "llama-bpe",
        bos_name="" if bos is None else tokens[bos],
        add_bos=add_bos,
        stop_names=ends[1:],
    )
    return build_tokenizer(name, vocab)


def build_tokenizer(name: str, vocab: Vocab) -> Tokenizer:
    """Validates an untrusted vocabulary; returns the tokenizer."""
    special = {token: vocab.ids[token] for token in vocab.special}
    bos_names = [vocab.bos_name] if vocab.bos_name and vocab.add_bos else []
    for token in (vocab.eot_name, *bos_names, *vocab.stop_names):
        if token not in special:
            raise DataError(f"{token[:80]} is missing among its special tokens")
    stop_tokens = {special[token] for token in vocab.stop_names} - {special[vocab.eot_name]}
    if len(stop_tokens) >= MAX_STOP_IDS:
        raise DataError(f"{len(stop_tokens) + 1} tokens end a text, more than {MAX_STOP_IDS}")
    ranks = ids_to_ranks(vocab.ids, special)
    check_merges(ranks, vocab.merges, vocab.ignore_merges)
    bos_token, eot_token = special.get(vocab.bos_name), special.pop(vocab.eot_name)
    if vocab.bos_name == ENDOFTEXT == vocab.eot_name and not vocab.add_bos:
        bos_token = None  # of GPT-2
    return Tokenizer(
        name,
        ranks,
        eot_token,
        special,
        eot_name=vocab.eot_name,
        pre_tokenizer=vocab.pre_tokenizer,
        bos_token=bos_token,
        add_bos=bool(bos_names),
        stop_tokens=tuple(sorted(stop_tokens)),
    )


def check_merges(ranks: Mapping[bytes, int], merges: Sequence[str], ignore_merges: bool) -> None:
    """Rejects merges that are not those that the ranks imply."""
    implied_merges = derive_merge_lines(ranks, ignore_merges)
    if ignore_merges:  # Llama 3 lists other pairs as well, which merging never reaches
        known = set(implied_merges)
        merges = [line for line in merges if line in known]
    pairs = zip_longest(merges, implied_merges)
    for number, (actual, implied) in enumerate(pairs, start=1):
        if actual != implied:
            raise DataError(
                f"merge {number} is {(actual or 'missing')[:80]!r}, but the vocabulary "
                f"implies {implied or 'absent'!r}"
            )


def read_tokenizer_dir(folder: Path) -> Tokenizer:
    """Reads a tokenizer from a folder of untrusted files."""
    try:
        return build_tokenizer(str(folder), read_vocab(folder))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"invalid tokenizer files in {folder}: {error}. Copy the folder again, or use "
            "another tokenizer."
        ) from error


def ids_to_ranks(ids: Mapping[str, Any], special: Collection[str]) -> dict[bytes, int]:
    """Validates the ids of all tokens; returns those of the byte strings.

    Tokens have the ids 0, 1, 2, ... in any order.
    """
    ranks = {}
    for token, token_id in ids.items():
        if type(token_id) is not int:
            raise DataError(f"the id of token {token[:80]!r} is not an integer")
        if not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise DataError(f"token {token_id} has {len(token)} bytes, not 1 to {MAX_TOKEN_BYTES}")
        encode_utf8(token)
        if token in special:
            continue
        if others := set(token) - CHAR_TO_BYTE.keys():
            raise DataError(f"token {token_id} has {min(others)!r}, which represents no byte")
        ranks[unicode_to_bytes(token)] = token_id
    if missing := set(range(len(ids))) - set(ids.values()):
        raise DataError(f"none of its {len(ids)} tokens has the id {min(missing)}")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing := [byte for byte in missing if byte not in RARE_BYTES]:
        raise DataError(f"byte {missing[0]} ({BYTE_TO_CHAR[missing[0]]!r}) is missing")
    return ranks
