"""What an index may not say, though its checksums are right."""

import tracemalloc

import pytest

from gptjax.errors import ModelError
from gptjax.weights.tf_checkpoint import (
    MAX_ENTRY_BYTES,
    MAX_INDEX_ENTRIES,
    MAX_TF_AXES,
    TFCheckpoint,
    open_tf_checkpoint,
)
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
    "no rank": (entry(proto((3, 1)), 4), r"has 4 bytes and the invalid shape \(\)"),
    "another size": (entry(shape(3), 16), r"has 16 bytes and the invalid shape \(3,\)"),
    "no values": (entry(shape(0, 1 << 62), 0), "has 0 bytes and the invalid shape"),
    "many axes": (
        entry(shape(*[1] * (MAX_TF_AXES + 1)), 4),
        r"4 bytes and the invalid shape \(1, 1, ",
    ),
    "less than none": (entry(shape(-1, -1), 4), "has 4 bytes and the invalid shape"),
    "another file": (entry(shape(4), 16, shard=1), "'a' is in data file 1 of only 1"),
    "no file": (entry(shape(4), 16, shard=-1), "'a' is in data file 184467440737095"),
    "too much": (entry(shape(1 << 40), 1 << 42), "has 64 bytes instead of 4,398,046,"),
    "too far": (entry(shape(4), 16, offset=49), f"{DATA} has 64 bytes instead of 65"),
    "far too far": (entry(shape(4), 16, offset=-1), "64 bytes instead of 18,446,744"),
    "half a field": (FOUR + b"\x0a\x02a", "it ends inside an entry"),
    "a long field": (FOUR + b"\x0a" + varint(-1), "it ends inside an entry"),
    "a long integer": (FOUR + b"\x08" + b"\x80" * 10, "an integer has more than ten by"),
    "a group": (FOUR + b"\x0b", "a field has the unknown wire type 3"),
    "a long entry": (FOUR + proto((9, bytes(MAX_ENTRY_BYTES))), "its value has more than 1,000"),
}


@pytest.mark.parametrize(("value", "message"), BAD.values(), ids=BAD)
def test_an_entry_that_cannot_be_read_is_refused_without_taking_memory(tmp_path, value, message):
    folder = folder_of(tmp_path, index_of((b"a", value)), bytes(64))

    tracemalloc.start()
    with pytest.raises(ModelError, match=rf"ckpt\.index cannot .*{message}.*{AGAIN}"):
        open_tf_checkpoint(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 1 << 20


UNREAD = {
    "an integer": (entry(shape(4), 16, dtype=3), HEADER, "TensorFlow's dtype 3;"),
    "texts": (entry(shape(4), 16, dtype=7), HEADER, r"7; supported: 1 \(float32\)"),
    "slices": (FOUR + proto((7, b"")), HEADER, "'a' in slices"),
    "big-endian": (FOUR, proto((1, 1), (2, 1)), "big-endian"),
    "new": (FOUR, proto((1, 1), (3, proto((2, 2)))), "a reader of version 2, but gptjax"),
}


@pytest.mark.parametrize(("value", "header", "message"), UNREAD.values(), ids=UNREAD)
def test_what_gptjax_does_not_read_is_refused(tmp_path, value, header, message):
    folder_of(tmp_path, index_of((b"a", value), header=header), bytes(64))

    with pytest.raises(ModelError, match=rf"ckpt\.index .*{message}.*in the same format\.$"):
        open_tf_checkpoint(tmp_path)


@pytest.mark.parametrize("files", [0, 100_000, -1])
def test_an_impossible_number_of_files_is_refused(tmp_path, files):
    folder_of(tmp_path, index_of((b"a", FOUR), header=proto((1, files))), bytes(64))

    with pytest.raises(ModelError, match=f"it refers to [0-9,]+ data files. {AGAIN}"):
        open_tf_checkpoint(tmp_path)


ONE, TWO = (pair(*p) + RESTARTS for p in ((b"", HEADER), (b"a", FOUR)))
BLOCKS = {
    "no pairs": ([RESTARTS], "it has no header"),
    "no header": ([TWO], "it has no header"),
    "a name twice": ([ONE, TWO, TWO], "its names are not sorted and unique"),
    "a name too late": ([TWO, ONE], "its names are not sorted and unique"),
    "no text": ([ONE, TWO.replace(b"a", b"\xff")], "'utf-8' codec can't decode byte"),
    "no end": ([b""], "no valid restart array"),
    "many restarts": ([ONE[:-4] + b"\xff" * 4], "no valid restart array"),
    "half a pair": ([b"\0\2\2ab" + RESTARTS], "it ends inside an entry"),
    "shared with none": ([b"\1\1\0a" + RESTARTS], "a name or its value has more than"),
    "a long name": ([pair(b"a" * 1001, b"") + RESTARTS], "has more than 1,000 bytes"),
    "a huge name": ([b"\0" + BIG + b"\0" + RESTARTS], "has more than 1,000 bytes"),
    "a huge entry": ([b"\0\1" + BIG + b"a" + RESTARTS], "has more than 1,000 bytes"),
}


@pytest.mark.parametrize(("blocks", "message"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_that_are_no_sound_table_are_refused(tmp_path, blocks, message):
    folder_of(tmp_path, table(*blocks), bytes(64))

    with pytest.raises(ModelError, match=f"cannot be used: .*{message}.*{AGAIN}"):
        open_tf_checkpoint(tmp_path)


PLACES = {
    "twice": ([b"\0" + varint(len(ONE))] * 2, "its blocks are not in order"),
    "outside": ([BIG + b"\1"], "its block at 4,611,686,018,427,387,904 is truncated"),
    "huge": ([b"\0" + BIG], "its block at 0 is truncated"),
    "elsewhere": ([b"\1\4"], "the checksum of its block at 1 does not match"),
    "half": ([b"\1"], "it ends inside an entry"),
}


@pytest.mark.parametrize(("places", "message"), PLACES.values(), ids=PLACES)
def test_blocks_where_there_are_none_are_refused(tmp_path, places, message):
    folder_of(tmp_path, table(ONE, places=places), bytes(64))

    with pytest.raises(ModelError, match=f"cannot be used: {message}.*{AGAIN}"):
        open_tf_checkpoint(tmp_path)


def test_compressed_blocks_and_tensors_in_one_place_are_refused(tmp_path):
    folder_of(tmp_path, table(ONE, TWO, kind=b"\1"), bytes(64))
    with pytest.raises(ModelError, match=f"it is compressed.*{AGAIN}"):
        open_tf_checkpoint(tmp_path)

    other = entry(shape(4), 16, offset=15)
    folder_of(tmp_path, index_of((b"a", FOUR), (b"b", other)), bytes(64))
    with pytest.raises(ModelError, match=f"'b' overlaps another ten.*{AGAIN}"):
        open_tf_checkpoint(tmp_path)


def test_pairs_that_share_the_start_of_a_name_are_read_and_counted(tmp_path):
    def opened(*counts: int) -> TFCheckpoint:
        first, offset, blocks = pair(b"", HEADER), 0, []
        for block, count in enumerate(counts):
            for number in range(count):
                key = b"%d/%06d" % (block, number)
                made = entry(shape(1), 4, offset=offset)
                first += pair(key[2:], made, 2) if number else pair(key, made)
                offset += 4
            odd = b"\x80" if count > MAX_INDEX_ENTRIES else b""  # would be noticed if it were read
            blocks.append(first + odd + RESTARTS)
            first = b""
        return open_tf_checkpoint(folder_of(tmp_path, table(*blocks), bytes(offset)))

    assert list(opened(2, 3).tensors) == [
        *("0/000000", "0/000001", "1/000000", "1/000001", "1/000002")
    ]
    for counts in ((MAX_INDEX_ENTRIES + 1,), (MAX_INDEX_ENTRIES // 2, MAX_INDEX_ENTRIES // 2)):
        with pytest.raises(ModelError, match=r"it has more than 10,000 entries\. Copy"):
            opened(*counts)
