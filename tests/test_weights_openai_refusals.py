"""What an index may not say, though its checksums are right."""

import tracemalloc

import pytest

from gptjax.errors import ModelError
from gptjax.weights.openai import AXES, LENGTH, PAIRS, Checkpoint, open_checkpoint
from tests.tensor_bundle import (
    HEADER,
    RESTARTS,
    entry,
    folder_of,
    index_of,
    pair,
    proto,
    shape,
    table,
    varint,
)

DATA = "model.ckpt.data-00000-of-00001"
AGAIN = r"Copy the folder again, or download the model again\.$"

FOUR, BIG = entry(shape(4), 16), varint(1 << 62)
BAD = {
    "no rank": (entry(proto((3, 1)), 4), r"cannot have 4 bytes and the shape \(\)"),
    "another size": (entry(shape(3), 16), r"cannot have 16 bytes and the shape \(3,\)"),
    "no values": (entry(shape(0, 1 << 62), 0), "cannot have 0 bytes and the shape"),
    "many axes": (
        entry(shape(*[1] * (AXES + 1)), 4),
        r"4 bytes and the shape \(1, 1, ",
    ),
    "less than none": (entry(shape(-1, -1), 4), "cannot have 4 bytes and the shape"),
    "another file": (entry(shape(4), 16, shard=1), "'a' is in data file 1 of 0 to 0"),
    "no file": (entry(shape(4), 16, shard=-1), "'a' is in data file 184467440737095"),
    "too much": (entry(shape(1 << 40), 1 << 42), "has 64 bytes instead of 4,398,046,"),
    "too far": (entry(shape(4), 16, offset=49), f"{DATA} has 64 bytes instead of 65"),
    "far too far": (entry(shape(4), 16, offset=-1), "64 bytes instead of 18,446,744"),
    "half a field": (FOUR + b"\x0a\x02a", "it ends in the middle of an entry"),
    "a long field": (FOUR + b"\x0a" + varint(-1), "it ends in the middle of an entry"),
    "a long integer": (
        FOUR + b"\x08" + b"\x80" * 10,
        "an integer has more than ten by",
    ),
    "a group": (FOUR + b"\x0b", "a field has the unknown wire type 3"),
    "a long entry": (FOUR + proto((9, bytes(LENGTH))), "its entry has more than 1,000"),
}


@pytest.mark.parametrize(("value", "message"), BAD.values(), ids=BAD)
def test_an_entry_that_cannot_be_read_is_refused_without_taking_memory(
    tmp_path, value, message
):
    folder = folder_of(tmp_path, index_of((b"a", value)), bytes(64))

    tracemalloc.start()
    with pytest.raises(ModelError, match=rf"ckpt\.index cannot .*{message}.*{AGAIN}"):
        open_checkpoint(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 1 << 20


UNREAD = {
    "an integer": (entry(shape(4), 16, dtype=3), HEADER, "'a' in TensorFlow's type 3,"),
    "texts": (
        entry(shape(4), 16, dtype=7),
        HEADER,
        r"7, and gptjax reads 1 \(float32\)",
    ),
    "slices": (FOUR + proto((7, b"")), HEADER, "'a' only in slices"),
    "big-endian": (FOUR, proto((1, 1), (2, 1)), "is of a big-endian machine"),
    "new": (
        FOUR,
        proto((1, 1), (3, proto((2, 2)))),
        "a reader of version 2, and gptjax",
    ),
}


@pytest.mark.parametrize(("value", "header", "message"), UNREAD.values(), ids=UNREAD)
def test_what_gptjax_does_not_read_is_refused(tmp_path, value, header, message):
    folder_of(tmp_path, index_of((b"a", value), header=header), bytes(64))

    with pytest.raises(
        ModelError, match=rf"ckpt\.index .*{message}.*of one saved like it\.$"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("files", [0, 100_000, -1])
def test_an_impossible_number_of_files_is_refused(tmp_path, files):
    folder_of(tmp_path, index_of((b"a", FOUR), header=proto((1, files))), bytes(64))

    with pytest.raises(ModelError, match=f"it describes [0-9,]+ data files. {AGAIN}"):
        open_checkpoint(tmp_path)


ONE, TWO = (pair(*p) + RESTARTS for p in ((b"", HEADER), (b"a", FOUR)))
BLOCKS = {
    "no pairs": ([RESTARTS], "it has no header"),
    "no header": ([TWO], "it has no header"),
    "a name twice": ([ONE, TWO, TWO], "its names are not sorted, or one is there twi"),
    "a name too late": ([TWO, ONE], "its names are not sorted, or one is there twice"),
    "no text": ([ONE, TWO.replace(b"a", b"\xff")], "'utf-8' codec can't decode byte"),
    "no end": ([b""], "a block has no end"),
    "many restarts": ([ONE[:-4] + b"\xff" * 4], "a block has no end"),
    "half a pair": ([b"\0\2\2ab" + RESTARTS], "it ends in the middle of an entry"),
    "shared with none": ([b"\1\1\0a" + RESTARTS], "a name or its entry has more than"),
    "a long name": ([pair(b"a" * 1001, b"") + RESTARTS], "has more than 1,000 bytes"),
    "a huge name": ([b"\0" + BIG + b"\0" + RESTARTS], "has more than 1,000 bytes"),
    "a huge entry": ([b"\0\1" + BIG + b"a" + RESTARTS], "has more than 1,000 bytes"),
}


@pytest.mark.parametrize(("blocks", "message"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_that_are_no_sound_table_are_refused(tmp_path, blocks, message):
    folder_of(tmp_path, table(*blocks), bytes(64))

    with pytest.raises(ModelError, match=f"cannot be used: .*{message}.*{AGAIN}"):
        open_checkpoint(tmp_path)


PLACES = {
    "twice": ([b"\0" + varint(len(ONE))] * 2, "its blocks do not lie one behind the"),
    "outside": ([BIG + b"\1"], "its block at 4,611,686,018,427,387,904 is cut off"),
    "huge": ([b"\0" + BIG], "its block at 0 is cut off"),
    "elsewhere": ([b"\1\4"], "the checksum of its block at 1 does not match"),
    "half": ([b"\1"], "it ends in the middle of an entry"),
}


@pytest.mark.parametrize(("places", "message"), PLACES.values(), ids=PLACES)
def test_blocks_where_there_are_none_are_refused(tmp_path, places, message):
    folder_of(tmp_path, table(ONE, places=places), bytes(64))

    with pytest.raises(ModelError, match=f"cannot be used: {message}.*{AGAIN}"):
        open_checkpoint(tmp_path)


def test_compressed_blocks_and_tensors_in_one_place_are_refused(tmp_path):
    folder_of(tmp_path, table(ONE, TWO, kind=b"\1"), bytes(64))
    with pytest.raises(ModelError, match=f"it is compressed, which Tensor.*{AGAIN}"):
        open_checkpoint(tmp_path)

    other = entry(shape(4), 16, offset=15)
    folder_of(tmp_path, index_of((b"a", FOUR), (b"b", other)), bytes(64))
    with pytest.raises(ModelError, match=f"'b' begins inside of another ten.*{AGAIN}"):
        open_checkpoint(tmp_path)


def test_pairs_that_share_the_start_of_a_name_are_read_and_counted(tmp_path):
    def opened(*counts: int) -> Checkpoint:
        first, offset, blocks = pair(b"", HEADER), 0, []
        for block, count in enumerate(counts):
            for number in range(count):
                key = b"%d/%06d" % (block, number)
                made = entry(shape(1), 4, offset=offset)
                first += pair(key[2:], made, 2) if number else pair(key, made)
                offset += 4
            odd = b"\x80" if count > PAIRS else b""  # would be noticed if it were read
            blocks.append(first + odd + RESTARTS)
            first = b""
        return open_checkpoint(folder_of(tmp_path, table(*blocks), bytes(offset)))

    assert list(opened(2, 3).tensors) == [
        *("0/000000", "0/000001", "1/000000", "1/000001", "1/000002")
    ]
    for counts in ((PAIRS + 1,), (PAIRS // 2, PAIRS // 2)):
        with pytest.raises(ModelError, match=r"it has more than 10,000 entries\. Copy"):
            opened(*counts)
