"""Megatron's `.idx`, which says what the `.bin` beside it holds; the ids are read in place.

    bytes of NAME.idx
    0 .. 8      MMIDIDX and two zeros          18 .. 25    S, the number of sequences
    9 .. 16     1, the version                 26 .. 33    D, the number of borders of documents
    17          the type of an id: INDEX       34 ..       S int32, ids of each sequence
                                               then        S int64, the byte where each begins
    all are little-endian                      then        D int64, the sequences that begin a
                                                           document: 0, ..., S
                                               then        perhaps S int8, modes (several media)

A sequence is a document, or a sentence of one. We train on the ids of NAME.bin from its first byte
to its last, so sequences must follow one another without gaps. `--append-eod` of Megatron's
preprocess_data.py sets an end token behind each document; without it nothing separates them.

The format is that of megatron/core/datasets/indexed_dataset.py (NVIDIA, Megatron-LM).
"""

from pathlib import Path

import numpy as np

# Megatron's code -> type of the ids; its codes 6 and 7 are floats.
INDEX = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
WRITE = "write its ids by shards.write_shard(path, [ids], n_vocab)"


def indexed(path: Path, index: Path) -> tuple[str, int]:
    """(type, number) of the ids in `path`, as its index says.

    Raises ValueError, a sentence, for an index that is damaged or contradicts itself.
    """
    with open(index, "rb") as file:
        head = file.read(34)
        is_magic = head[:9] == b"MMIDIDX\0\0"
        if len(head) < 34 or not is_magic or int.from_bytes(head[9:17], "little") != 1:
            raise ValueError(
                f"{index} is no index of Megatron's, version 1, so nobody knows what {path} "
                f"beside it holds: {WRITE}"
            )
        code = head[17]
        n_sequences = int.from_bytes(head[18:26], "little")
        n_borders = int.from_bytes(head[26:34], "little")
        if code not in INDEX:
            kind = "floats" if code in (6, 7) else "unknown"
            raise ValueError(
                f"{index} says that {path} holds numbers of type {code}, which is {kind}; ids "
                f"are of type {', '.join(map(str, INDEX))}"
            )
        size = index.stat().st_size
        expected = 34 + 12 * n_sequences + 8 * n_borders
        if size not in (expected, expected + n_sequences):
            raise ValueError(
                f"{index} is cut short or damaged: it has {size} bytes, and {expected} are "
                f"expected for {n_sequences} sequences and {n_borders} borders: copy it again"
            )
        lengths = np.fromfile(file, "<i4", n_sequences)
        starts = np.fromfile(file, "<i8", n_sequences)
        borders = np.fromfile(file, "<i8", n_borders)
    _check(path, index, lengths, starts, borders, np.dtype(INDEX[code]).itemsize)
    return INDEX[code], int(lengths.sum(dtype=np.int64))


def _check(path, index, lengths, starts, borders, itemsize: int) -> None:
    """Raises ValueError where the index contradicts itself.

    lengths, starts: (S,) of the sequences, in ids and in bytes; borders: (D,) of the documents.
    """
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    if (lengths < 0).any():
        raise ValueError(f"{index} has a sequence of {lengths.min()} ids: copy it again")
    wrong = np.flatnonzero(starts != ends - lengths.astype(np.int64) * itemsize)
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"{index} says that sequence {i} of {path} begins at byte {starts[i]}, and the ones "
            f"before it end at {ends[i] - int(lengths[i]) * itemsize}: copy it again; if there are "
            f"gaps on purpose, {WRITE}"
        )
    # An empty file may have no border at all.
    if len(borders) and (
        borders[0] != 0 or borders[-1] != len(lengths) or (np.diff(borders) < 0).any()
    ):
        raise ValueError(
            f"{index} has borders of documents that do not run from 0 to {len(lengths)}, its "
            "number of sequences: copy it again"
        )
