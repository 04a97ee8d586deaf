"""Chapter 2, text to arrays: words, ids, windows of ids, embeddings.

The letters in array names are those of `gptjax.model`. What gptjax itself reads text
with is `gptjax.tokenizer` and `gptjax.data`; here each step stands alone.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer import ENDOFTEXT, Tokenizer

UNKNOWN = "<|unk|>"
# Section 2.2: these signs and a double dash are tokens of their own, and so is what
# stands between them and white space.
TOKEN = re.compile(r"""--|[,.:;?_!"()']|(?:(?!--)[^\s,.:;?_!"()'])+""")
SPACE_BEFORE_SIGN = re.compile(r"""\s+(?=[,.?!"()'])""")


class Windows(NamedTuple):
    """Rows of ids, and the same rows one id later: what a model is to predict."""

    input_BT: Int32[np.ndarray, "B T"]
    target_BT: Int32[np.ndarray, "B T"]


# Words (sections 2.2 to 2.4)


def simple_tokens(text: str) -> list[str]:
    """The words and signs of a text, without its white space.

    >>> simple_tokens("Hello, world. Is this-- a test?")
    ['Hello', ',', 'world', '.', 'Is', 'this', '--', 'a', 'test', '?']
    """
    return TOKEN.findall(text)


def vocabulary(tokens: Iterable[str], control: Sequence[str] = ()) -> dict[str, int]:
    """An id for each different token, in their order, then for the control tokens.

    >>> vocabulary(["to", "be", "or", "not", "to", "be"], [UNKNOWN])
    {'be': 0, 'not': 1, 'or': 2, 'to': 3, '<|unk|>': 4}
    """
    names = [*sorted(set(tokens)), *control]
    return {name: i for i, name in enumerate(names)}


def encode_simply(text: str, ids: Mapping[str, int]) -> list[int]:
    """The ids of a text's tokens; an unknown one gets that of <|unk|>, if there is one.

    >>> encode_simply("be or see", {"be": 0, "or": 1, UNKNOWN: 2})
    [0, 1, 2]

    Raises:
        DataError: a token has no id, and the vocabulary no <|unk|>.
    """
    tokens = simple_tokens(text)
    if UNKNOWN in ids:
        return [ids.get(token, ids[UNKNOWN]) for token in tokens]
    for token in tokens:
        if token not in ids:
            raise DataError(
                f"the word {token!r} is not among the {len(ids)} of the vocabulary. "
                f"Make the vocabulary with {UNKNOWN}, or from a text that has the word."
            )
    return [ids[token] for token in tokens]


def decode_simply(numbers: Iterable[int], ids: Mapping[str, int]) -> str:
    """The tokens with a space between two, but none before a sign that ends words.

    So the text does not come back as it was: where white space stood is not kept.

    >>> decode_simply([0, 1, 2], {"Well": 0, ",": 1, "yes": 2})
    'Well, yes'

    Raises:
        DataError: a number is no id of the vocabulary.
    """
    tokens = {i: token for token, i in ids.items()}
    try:
        joined = " ".join(tokens[number] for number in numbers)
    except KeyError as error:
        raise DataError(
            f"the id {error} is not among the {len(ids)} of the vocabulary. Decode "
            "with the vocabulary that made the ids."
        ) from error
    return SPACE_BEFORE_SIGN.sub("", joined)


# Ids (section 2.5)


def encode_with_ends(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text in which <|endoftext|> is the control token.

    >>> from gptjax.tokenizer import load
    >>> encode_with_ends("tea? <|endoftext|> In", load("gpt2"))
    [660, 64, 30, 220, 50256, 554]
    """
    first, *others = map(tokenizer.encode, text.split(ENDOFTEXT))
    return first + [i for ids in others for i in (tokenizer.eot, *ids)]


# Windows (section 2.6)


def contexts(ids: Sequence[int], longest: int) -> Iterator[tuple[list[int], int]]:
    """(the first ids, the one that follows), for 1 up to `longest` first ids.

    >>> list(contexts([290, 4920, 2241, 287], 3))
    [([290], 4920), ([290, 4920], 2241), ([290, 4920, 2241], 287)]
    """
    for length in range(1, min(longest, len(ids) - 1) + 1):
        yield list(ids[:length]), ids[length]


def windows(ids: Sequence[int], max_length: int, stride: int) -> Windows:
    """All rows of `max_length` ids that begin `stride` apart and have a next id.

    A stride of `max_length` uses each id once; a smaller one lets rows overlap.

    >>> print(windows(range(8), max_length=3, stride=2).input_BT)
    [[0 1 2]
     [2 3 4]
     [4 5 6]]

    Raises:
        ConfigError: a length or stride below 1.
        DataError: there are not enough ids for one row.
    """
    if min(max_length, stride) < 1:
        raise ConfigError(
            f"max_length={max_length} and stride={stride} need to be 1 or more. "
            "Choose 4 and 4, for example."
        )
    if len(ids) <= max_length:
        raise DataError(
            f"{len(ids)} ids have no row of max_length={max_length} with a next id. "
            "Choose a smaller max_length, or a longer text."
        )
    array = np.asarray(ids, np.int32)
    rows = np.lib.stride_tricks.sliding_window_view(array, max_length + 1)[::stride]
    return Windows(rows[:, :-1], rows[:, 1:])


def batches(rows: Windows, size: int, drop_last: bool = True) -> list[Windows]:
    """The rows in their order, `size` at a time.

    Args:
        rows: of the whole text.
        size: rows of a batch.
        drop_last: whether a last batch that is not full is left out.

    Raises:
        ConfigError: a size below 1.
    """
    if size < 1:
        raise ConfigError(
            f"a batch of size={size} has no rows. Choose a size of 1 or more."
        )
    count = len(rows.input_BT)
    stop = count - count % size if drop_last else count
    starts = range(0, stop, size)
    return [Windows(*(x[start : start + size] for x in rows)) for start in starts]


def split_text(text: str, share: float = 0.9) -> tuple[str, str]:
    """The first `share` of the characters, and the rest (section 5.1.3).

    >>> split_text("abcdefghij", 0.75)
    ('abcdefg', 'hij')

    Raises:
        ConfigError: a share that is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(
            f"share={share} of a text is none. Choose a number from 0 to 1."
        )
    cut = int(share * len(text))
    return text[:cut], text[cut:]


# Embeddings (sections 2.7 and 2.8)


def embedded(
    ids_BT: Int[Array | np.ndarray, "B T"],
    token_VD: Float[Array, "V D"],
    positions: Float[Array, "context D"],
) -> Float[Array, "B T D"]:
    """For each id its row of the token table, plus the row of its position.

    An id beyond the table gives NaN: plain indexing in JAX would take the last row.

    Args:
        ids_BT: rows of ids.
        token_VD: a row for each id.
        positions: a row for each position, as many as the longest row of ids or more.

    Raises:
        DataError: the rows of ids are longer than the table of positions.
    """
    length, context = ids_BT.shape[1], len(positions)
    if length > context:
        raise DataError(
            f"rows of {length} ids are longer than the {context} positions of the "
            "table. Cut the rows, or make a longer table."
        )
    token_BTD = jnp.take(token_VD, jnp.asarray(ids_BT), axis=0, mode="fill")
    return token_BTD + positions[None, :length]
