"""Chapter 2: tokenization, training windows and embeddings, one step at a time.

The letters in array names are those of `gptjax.model.gpt`. The production versions are
`gptjax.tokenizer` and `gptjax.data`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer.tokenizer import ENDOFTEXT, Tokenizer

UNKNOWN_TOKEN = "<|unk|>"
# Section 2.2: punctuation marks, double dashes, and the text between them and white
# space are tokens.
SIMPLE_TOKEN = re.compile(r"""--|[,.:;?_!"()']|(?:(?!--)[^\s,.:;?_!"()'])+""")
SPACE_BEFORE_PUNCTUATION = re.compile(r"""\s+(?=[,.?!"()'])""")


class Windows(NamedTuple):
    """Input rows and target rows, which are shifted by one token."""

    input_BT: Int32[np.ndarray, "B T"]
    target_BT: Int32[np.ndarray, "B T"]


# Words (sections 2.2 to 2.4)


def split_simple_tokens(text: str) -> list[str]:
    """Splits text into words and punctuation, without white space.

    >>> split_simple_tokens("Hello, world. Is this-- a test?")
    ['Hello', ',', 'world', '.', 'Is', 'this', '--', 'a', 'test', '?']
    """
    return SIMPLE_TOKEN.findall(text)


def make_vocabulary(tokens: Iterable[str], special_tokens: Sequence[str] = ()) -> dict[str, int]:
    """Maps the sorted distinct tokens, then the special tokens, to ids.

    >>> make_vocabulary(["to", "be", "or", "not", "to", "be"], [UNKNOWN_TOKEN])
    {'be': 0, 'not': 1, 'or': 2, 'to': 3, '<|unk|>': 4}
    """
    names = [*sorted(set(tokens)), *special_tokens]
    return {name: i for i, name in enumerate(names)}


def simple_encode(text: str, ids: Mapping[str, int]) -> list[int]:
    """Encodes text; unknown tokens become <|unk|> if the vocabulary has it.

    >>> simple_encode("be or see", {"be": 0, "or": 1, UNKNOWN_TOKEN: 2})
    [0, 1, 2]

    Raises:
        DataError: a token and <|unk|> are not in the vocabulary.
    """
    tokens = split_simple_tokens(text)
    if UNKNOWN_TOKEN in ids:
        return [ids.get(token, ids[UNKNOWN_TOKEN]) for token in tokens]
    for token in tokens:
        if token not in ids:
            raise DataError(
                f"the word {token!r} is not in the vocabulary of {len(ids)} tokens. "
                f"Add {UNKNOWN_TOKEN}, or build the vocabulary from text with this "
                "word."
            )
    return [ids[token] for token in tokens]


def simple_decode(token_ids: Iterable[int], ids: Mapping[str, int]) -> str:
    """Joins tokens with spaces, but without a space before punctuation.

    The white space of the original text is not restored.

    >>> simple_decode([0, 1, 2], {"Well": 0, ",": 1, "yes": 2})
    'Well, yes'

    Raises:
        DataError: an id is not in the vocabulary.
    """
    tokens = {i: token for token, i in ids.items()}
    try:
        joined = " ".join(tokens[token_id] for token_id in token_ids)
    except KeyError as error:
        raise DataError(
            f"the id {error} is not in the vocabulary of {len(ids)} tokens. Decode "
            "with the vocabulary that encoded the text."
        ) from error
    return SPACE_BEFORE_PUNCTUATION.sub("", joined)


# Ids (section 2.5)


def encode_with_eot(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encodes text with <|endoftext|> as a special token.

    >>> from gptjax.tokenizer import load
    >>> encode_with_eot("tea? <|endoftext|> In", load("gpt2"))
    [660, 64, 30, 220, 50256, 554]
    """
    first, *others = map(tokenizer.encode, text.split(ENDOFTEXT))
    return first + [i for ids in others for i in (tokenizer.eot_token, *ids)]


# Windows (section 2.6)


def context_target_pairs(ids: Sequence[int], max_length: int) -> Iterator[tuple[list[int], int]]:
    """Yields (context, next id) for contexts of 1 to `max_length` ids.

    >>> list(context_target_pairs([290, 4920, 2241, 287], 3))
    [([290], 4920), ([290, 4920], 2241), ([290, 4920, 2241], 287)]
    """
    for length in range(1, min(max_length, len(ids) - 1) + 1):
        yield list(ids[:length]), ids[length]


def make_windows(ids: Sequence[int], max_length: int, stride: int) -> Windows:
    """Splits ids into rows of `max_length` ids that start `stride` ids apart.

    Rows overlap if `stride` is smaller than `max_length`.

    >>> print(make_windows(range(8), max_length=3, stride=2).input_BT)
    [[0 1 2]
     [2 3 4]
     [4 5 6]]

    Raises:
        ConfigError: `max_length` or `stride` is below 1.
        DataError: there are too few ids for one row.
    """
    if min(max_length, stride) < 1:
        raise ConfigError(
            f"max_length={max_length} and stride={stride} must be at least 1. Use 4 "
            "and 4, for example."
        )
    if len(ids) <= max_length:
        raise DataError(
            f"{len(ids)} ids are too few for a row of max_length={max_length} and its "
            "target. Use a smaller max_length or a longer text."
        )
    array = np.asarray(ids, np.int32)
    rows = np.lib.stride_tricks.sliding_window_view(array, max_length + 1)[::stride]
    return Windows(rows[:, :-1], rows[:, 1:])


def batch_windows(rows: Windows, batch_size: int, drop_last: bool = True) -> list[Windows]:
    """Groups rows into batches, in order.

    Args:
        rows: all windows of the text.
        batch_size: rows per batch.
        drop_last: drop the last batch if it is not full.

    Raises:
        ConfigError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"the batch size {batch_size} must be at least 1.")
    count = len(rows.input_BT)
    stop = count - count % batch_size if drop_last else count
    starts = range(0, stop, batch_size)
    return [Windows(*(x[start : start + batch_size] for x in rows)) for start in starts]


def split_text(text: str, fraction: float = 0.9) -> tuple[str, str]:
    """Splits text after a fraction of its characters (section 5.1.3).

    >>> split_text("abcdefghij", 0.75)
    ('abcdefg', 'hij')

    Raises:
        ConfigError: the fraction is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"the fraction {fraction} must be between 0 and 1.")
    split_at = int(fraction * len(text))
    return text[:split_at], text[split_at:]


# Embeddings (sections 2.7 and 2.8)


def embed_tokens(
    ids_BT: Int[Array | np.ndarray, "B T"],
    token_VD: Float[Array, "V D"],
    position_table: Float[Array, "context D"],
) -> Float[Array, "B T D"]:
    """Sums token and position embeddings.

    Ids outside the table give NaN; plain indexing in JAX would clamp to the last row.

    Raises:
        DataError: the rows are longer than the position table.
    """
    length, num_positions = ids_BT.shape[1], len(position_table)
    if length > num_positions:
        raise DataError(
            f"rows of {length} ids are longer than the position table, which has "
            f"{num_positions} rows. Truncate the ids, or use a larger table."
        )
    token_BTD = jnp.take(token_VD, jnp.asarray(ids_BT), axis=0, mode="fill")
    return token_BTD + position_table[None, :length]
