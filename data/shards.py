"""Token shards, `.bin` and `.npy`: which ids they hold, of which width, and from which byte on.

    headerless   ids one after another: nanoGPT's train.bin and val.bin
    headered     256 int32 (magic, version, number of ids), then the ids, as llm.c and
                 modded-nanogpt do: (20240520, 1) is uint16, (20240801, 7) is uint32, which we write
                 for n_vocab > 65536. The fourth int32 holds the upper half of a count beyond 32
                 bits, and is zero otherwise.
    indexed      headerless, with Megatron's NAME.idx beside NAME.bin: it says the type of the ids,
                 and where sequences and documents begin (data/megatron.py)
    NAME.npy     NumPy's array of one dimension, uint16, int32 or uint32

A headerless file does not say how wide an id is. Its pairs of bytes do:

    uint16   a b c d e f        int32, uint32   a 0 b 0 c 0        int64   a 0 0 0 b 0 0 0

In ids of 2 bytes all places look alike. In wider ids each second pair is an upper half: 0, or below
16, for no vocabulary has more than a million words. A file that fits both (zeros alone, a handful
of ids) has 2 bytes an id, or 4 where the vocabulary needs them. A file of anything else is refused
(data/foreign.py).
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.foreign import foreign, is_text, one_byte, unknown_header
from data.megatron import indexed

# Magic number -> version, type of the ids.
HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
ARRAYS = ("<u2", "<i4", "<u4")  # of .npy
# Larger shards are judged by a sample of their bytes.
SAMPLED = 2**22  # bytes
# So many ids must agree before a headerless file counts as one with wider ids.
EVIDENCE = 16
WRITE = "write its ids by shards.write_shard(path, [ids], n_vocab)"


# ---- what a file holds ---------------------------------------------------------------------------
def layout(path: Path, n_vocab: int) -> tuple[int, str | None, int | None]:
    """(byte where the ids begin, their type, their number) of a shard.

    The number is None where the file has no header. So is the type where 2 and 4 bytes an id fit.
    Raises ValueError where it holds no ids, or none that we can read.
    """
    if path.suffix.lower() == ".npy":
        return _array(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8192)
    words = np.frombuffer(head[: len(head) // 4 * 4], "<u4")

    # A known magic number with another version is not read: `unknown_header` names it below.
    magic = int(words[0]) if len(words) else 0
    if magic in HEADERS and len(words) < 256:
        raise ValueError(f"{path} has a header that is cut short: copy it again")
    if magic in HEADERS and words[1] == HEADERS[magic][0]:
        return 1024, HEADERS[magic][1], int(words[2]) + (int(words[3]) << 32)
    index = path.with_suffix(".idx")
    if index.exists():
        return 0, *indexed(path, index)

    # Neither a header nor an index: the bytes must show that these are ids, and how wide.
    kind = foreign(path)
    if kind:
        raise ValueError(f"{path} {kind}")
    pairs = lanes(path)
    each = width(pairs, n_vocab)
    header = unknown_header(words, size, pairs, each if each in (4, 8) else 0, HEADERS)
    if header:
        known = ", ".join(
            f"{magic} of version {version}" for magic, (version, _) in HEADERS.items()
        )
        raise ValueError(
            f"{path} begins with a header that is unknown here, {header} (known are {known}):"
            f" {WRITE}"
        )
    if is_text(head) or one_byte(pairs):
        raise ValueError(
            f"{path} holds text, or ids of one byte, and a shard's ids have 2 or 4: give text "
            f"as a file, --data=FILE.txt; of ids, {WRITE}"
        )
    if each == 0:
        raise ValueError(
            f"{path} holds no ids that we can read, for low bytes are zero where high ones are "
            f"not: they are big-endian, or begin behind another tool's header; {WRITE}"
        )
    if each == 2 and n_vocab > 2**16:
        raise ValueError(
            f"{path} has no header and holds no ids of 4 bytes, as a vocabulary of {n_vocab} "
            "needs: use the --tokenizer= or --vocab_size= that these ids were made with"
        )
    return 0, {None: None, 2: "<u2", 4: "<i4", 8: "<i8"}[each], None


def lanes(path: Path) -> np.ndarray:
    """(N, 4) uint16: in a row 8 bytes of the file, as four pairs.

    A large file is sampled: its first 64 KiB, and some 256 stretches of 4 KiB.
    """
    size = path.stat().st_size
    if size <= SAMPLED:
        return np.fromfile(path, "<u2", size // 8 * 4).reshape(-1, 4)
    with open(path, "rb") as file:
        stretches = [file.read(2**16)]
        # Each begins at a multiple of 8 bytes, so that upper halves stay in their lane.
        for start in range(2**16, size - 4096, size // 256 // 8 * 8):
            file.seek(start)
            stretches.append(file.read(4096))
    return np.frombuffer(b"".join(stretches), "<u2").reshape(-1, 4)


def width(x: np.ndarray, n_vocab: int) -> int | None:
    """Bytes of an id, by lanes (N, 4): 2, 4 or 8; None where 2 and 4 fit; 0 where none does.

    Negative ids are ids: whoever reads them names the first one.
    """
    low = x[:, 0::2]  # (N, 2)
    high = x[:, 1::2]  # (N, 2)
    # Zeros where lower halves should be: another byte order, or a header that shifts the ids.
    if np.count_nonzero(high) >= max(EVIDENCE, 20 * np.count_nonzero(low)):
        return 0
    # Big-endian ids of 2 bytes: the small ones that every text is full of are multiples of 256.
    swapped = x[(x & 255 == 0) & (x > 0)]
    small = np.count_nonzero((x < 256) & (x > 0))
    if len(swapped) > max(4 * small, x.size // 20) and len(np.unique(swapped)) >= EVIDENCE:
        return 0

    # An upper half is small or, in a negative id, all ones. `larger`: the pairs in the lower place
    # that are too large for an upper half.
    most = max(15, n_vocab >> 16)
    upper = (high <= most) | (high == 2**16 - 1)
    top = high[high <= most].max(initial=0)
    larger = low[(low > top) & (low < 2**16 - 1)]
    strange = np.count_nonzero(~upper)
    # Were the ids wide, nearly no pair in the upper place would be strange.
    if 50 * strange > len(larger):
        return 2
    # Ids below 65536 have zeros as upper halves. If some have more, lower halves use all 16 bits.
    if top and larger.max(initial=0) < 4096:
        alike = 4 * np.count_nonzero(high) > np.count_nonzero(low)
        return 2 if alike and n_vocab > 2**16 else None
    if len(larger) < EVIDENCE:
        return None
    if strange:
        return 0
    # Ids of 8 bytes repeat their sign: the upper four bytes are all zeros or all ones.
    sign = (x[:, 2] == x[:, 3]) & ((x[:, 2] == 0) | (x[:, 2] == 2**16 - 1))
    return 8 if sign.all() else 4


def _array(path: Path) -> tuple[int, str, int]:
    """(byte where the ids begin, their type, their number) of a .npy, by its header."""
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): "read_array_header_1_0"}.get(version, "read_array_header_2_0")
            shape, _, dtype = getattr(np.lib.format, read)(file)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{path} is no .npy array ({' '.join(str(error).split())[:100]}): copy it again, "
                f"or {WRITE}"
            ) from error
        start = file.tell()
    if len(shape) != 1 or dtype.str not in ARRAYS:
        raise ValueError(
            f"{path} is an array of {dtype} of shape {shape}, and a shard is one of uint16, int32 "
            "or uint32 of one dimension: numpy.save(path, ids.astype(numpy.uint16))"
        )
    return start, dtype.str, shape[0]


# ---- reading and writing -------------------------------------------------------------------------
def read_shard(path: Path, n_vocab: int = 2**16, in_memory: bool = False) -> np.ndarray:
    """(N,) the ids of one file, as read_shards."""
    return read_shards([path], n_vocab, in_memory)[0]


def read_shards(
    paths: list[Path], n_vocab: int = 2**16, in_memory: bool = False
) -> list[np.ndarray]:
    """(N,) the ids of each file, memory-mapped or read.

    Where nothing in a file tells its type, it has the type of the other headerless files, if these
    agree, or else the narrowest type that holds the vocabulary. Raises ValueError for a wrong size
    or header, or a file of something else.
    """
    layouts = [layout(path, n_vocab) for path in paths]
    types = {dtype for _, dtype, count in layouts if dtype is not None and count is None}
    usual = "<u2" if n_vocab <= 2**16 else "<i4"
    if len(types) == 1:
        usual = types.pop()
    found = []
    for path, (start, dtype, count) in zip(paths, layouts):
        dtype = np.dtype(dtype or usual)
        size = path.stat().st_size
        if count is None:
            # At least 1: an empty file must not pass the next check.
            count = max(size // dtype.itemsize, 1)
        # An odd byte, or a header that counts other ids than there are: a copy that broke off.
        expected = start + count * dtype.itemsize
        if size != expected:
            raise ValueError(
                f"{path} has {size} bytes where {expected} are expected, {count} ids of "
                f"{dtype.itemsize} bytes from byte {start} on: copy it again, or delete it "
                "if it can be made again"
            )
        # The system refuses to map 0 bytes.
        if in_memory or not count:
            found.append(np.fromfile(path, dtype, offset=start))
        else:
            found.append(np.memmap(path, dtype, "r", offset=start))
    return found


def write_shard(path: Path, pieces: Iterable[np.ndarray], n_vocab: int) -> None:
    """Writes a shard of ids to `path`, which gets its name when the file is whole.

    pieces: arrays of ids, one after another. Raises ValueError for an id outside the vocabulary,
    for it might not fit into the type.
    """
    magic = 20240520 if n_vocab <= 2**16 else 20240801
    version, dtype = HEADERS[magic]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    count = 0
    with open(unfinished, "wb") as file:
        # Room for the header, which is written last: only then the number of ids is known.
        file.write(bytes(1024))
        for piece in pieces:
            if len(piece) and not (0 <= piece.min() and piece.max() < n_vocab):
                raise ValueError(
                    f"{path}: ids from {piece.min()} to {piece.max()} are not all in "
                    f"0 .. n_vocab - 1, and n_vocab is {n_vocab}"
                )
            file.write(piece.astype(dtype).tobytes())
            count += len(piece)
        file.seek(0)
        file.write(np.array([magic, version, count % 2**32, count >> 32], "<u4").tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
