"""Files that are neither text nor token ids, though somebody gave them as data.

Training on such a file gives no error, and a loss that means nothing. So it is recognised by its
first bytes, by a header before its ids, or by the statistics of its bytes, and refused in one
sentence:

    foreign          a file of another kind: packed, a table, an array, a model, a pickle
    unknown_header   ids behind a header that no tool we know writes
    one_byte         text, or ids of one byte, in a file of ids
    not_text         text in another encoding than UTF-8

Nothing here opens, unpacks or runs a file: bytes are compared, no more.
"""

import codecs
import re
import unicodedata
from pathlib import Path

import numpy as np

# Bytes that no text has: control characters other than white space and ESC.
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
# A wrong encoding shows in the beginning of a text; what lies behind these bytes is not checked.
TEXT = 2**28  # bytes

# How the sentence about a file of another kind ends.
PACKED = "unpack it, and give what was in it"
TABLE = "write its text column to a file in UTF-8, and give that"
OBJECTS = "it is no data to train on, take it out of --data="
IDS = "write its ids by shards.write_shard(path, [ids], n_vocab), and give those"
# What such a file begins with, what it is, and what to do with it.
KINDS = (
    (b"\x1f\x8b\x08", "a gzip file", PACKED),
    (b"BZh", "a bzip2 file", PACKED),
    (b"\xfd7zXZ\x00", "an xz file", PACKED),
    (b"\x28\xb5\x2f\xfd", "a zstd file", PACKED),
    (b"\x04\x22\x4d\x18", "an lz4 file", PACKED),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", PACKED),
    (b"Rar!\x1a\x07", "a rar archive", PACKED),
    (b"PK\x03\x04", "a zip archive, as .npz and .docx are too", PACKED),
    (b"PK\x05\x06", "an empty zip archive", PACKED),
    (b"PAR1", "a Parquet table", TABLE),
    (b"ARROW1", "an Arrow table", TABLE),
    (b"FEA1", "a Feather table", TABLE),
    (b"ORC", "an ORC table", TABLE),
    (b"Obj\x01", "an Avro table", TABLE),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", TABLE),
    (b"SQLite format 3\x00", "an SQLite database", TABLE),
    (b"%PDF-", "a PDF", "write its text to a file in UTF-8, and give that"),
    (b"\x93NUMPY", "a NumPy array with its header", IDS),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a pickle of torch.save's", OBJECTS),
    (b"LITPKDS", "a packed file of LitGPT", IDS),
    (b"MMIDIDX\x00", "an index of Megatron's", "give the folder of the .bin file beside it"),
    (b"TNTIDX\x00", "an index of fairseq's", IDS),
    (b"GGUF", "a GGUF model", OBJECTS),
    (b"lmgg", "a ggml model", OBJECTS),
    (b"\x89PNG\r\n", "a PNG picture", OBJECTS),
    (b"\xff\xd8\xff\xe0", "a JPEG picture", OBJECTS),
    (b"\x7fELF", "a program", OBJECTS),
)


def foreign(path: Path) -> str | None:
    """What the file is and what to do with it, if its bytes say that it is of another kind.

    The middle of a sentence; None where it may be text or ids.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(1024)
        file.seek(max(size - 1, 0))
        last = file.read(1)
    for magic, kind, advice in KINDS:
        # A text may begin with "ORC" or "BZh"; a PDF looks like text for a while.
        if head.startswith(magic) and (magic == b"%PDF-" or not is_text(head)):
            # A .pt of torch.save is a zip archive, but nothing to unpack.
            if b"/data.pkl" in head:
                advice = OBJECTS
            return f"is {kind}: {advice}"
    # Kinds that no fixed beginning gives away.
    if head[257:262] == b"ustar":
        return f"is a tar archive: {PACKED}"
    # Arrow: four bytes 0xff, then the length of its schema. safetensors: the length of its JSON.
    length = int.from_bytes(head[:8], "little")
    if head[:4] == b"\xff\xff\xff\xff" and 0 < length >> 32 < size:
        return f"is an Arrow stream: {TABLE}"
    if head[8:10] in (b'{"', b"{}") and 2 <= length < size:
        return f"is a safetensors file: {OBJECTS}"
    # A pickle: its protocol, an opcode that may come first, and the full stop at its end.
    if head[:1] == b"\x80" and len(head) > 2 and 2 <= head[1] <= 5 and last == b".":
        first_opcodes = b"\x95" if head[1] >= 4 else b"}]()cXUKMJ\x8a"
        if head[2:3] in first_opcodes:
            return f"is a pickle, which is never opened, for that runs code: {OBJECTS}"
    return None


# ---- in a file of ids ----------------------------------------------------------------------------
def unknown_header(
    words: np.ndarray, size: int, lanes: np.ndarray, wide: int, known: dict
) -> str | None:
    """What shows that a file begins with a header that is not `known`; None where nothing does.

    words: (n,) the beginning of the file as uint32; size: the bytes of the file; lanes: (N, 4) see
    shards.lanes; wide: 4 or 8, where its ids have so many bytes, else 0; known: the headers that we
    read, by their first number.
    """
    if len(words) < 3:
        return None
    # A header as llm.c writes it begins with a date, such as 20240520, and ends in zeros. It may be
    # in the other byte order.
    for magic in (int(words[0]), int(words[0].byteswap())):
        year = magic // 10000
        month = magic // 100 % 100
        day = magic % 100
        is_date = 2015 <= year <= 2049 and 1 <= month <= 12 and 1 <= day <= 31
        if magic in known or (is_date and not words[8:256].any()):
            return f"{magic} of version {words[1]}"
    # Other headers count what follows them. But a small number may be an id, unless zeros follow,
    # and among wide ids any number may be one.
    for start in (4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        if start > 32 and words[8 : start // 4].any():
            continue
        counts = [int(word) for word in words[: min(start // 4, 8)]]
        long = [low + (high << 32) for low, high in zip(counts, counts[1:])]
        # Among wide ids only a header of one number, or a number as wide as two ids, is evidence.
        if wide and start <= 32:
            if start != 4:
                counts = []
            long = long[:1] if wide == 4 else []
        least = 1 if start > 32 else 1024
        for count in counts + long:
            if count >= least and (size - start) / count in (1, 2, 4, 8):
                return f"{start} bytes with the number {count}, which counts what follows them"
    # A few numbers, then zeros up to a round place, then ids without such a stretch of zeros.
    filled = np.flatnonzero(words[:2048])
    later = filled[filled >= 8]
    if not len(later) or filled[0] >= 8:
        return None
    start = 4 * int(later[0])
    dense = lanes[start // 8 :].any(1)
    if start in (256, 512, 1024, 2048, 4096) and len(dense) >= 16 and dense.mean() > 0.9:
        return f"{start} bytes, a few numbers and then zeros"
    return None


def one_byte(lanes: np.ndarray) -> bool:
    """Are lower and upper bytes alike, as they are in text and in ids of one byte?

    lanes: (N, 4) uint16, see shards.lanes.
    """
    pairs = np.ascontiguousarray(lanes).view(np.uint8).reshape(-1, 2)
    if len(pairs) < 64:
        return False
    # Text has the same values in both places of a pair. Ids of 2 bytes have others in the upper
    # place, unless they fill all 256 of both.
    lower = np.flatnonzero(np.bincount(pairs[:, 0]))
    upper = np.flatnonzero(np.bincount(pairs[:, 1]))
    if np.array_equal(lower, upper):
        return 1 < len(lower) < 256
    # A short text lacks some letters in one of the places, but is ASCII in both.
    return max(lower[-1], upper[-1]) < 128 and len(upper) >= 16


# ---- in a file of text ---------------------------------------------------------------------------
def is_text(head: bytes) -> bool:
    """Does a file with this beginning hold text?

    Text has several kinds of bytes, none a control character, and is long or UTF-8. In ids a
    control character comes soon.
    """
    kinds = len(set(head))
    if kinds < 8 or CONTROL.search(head):
        return False
    if kinds >= 20 and len(head) >= 1024:
        return True
    # A short one must be UTF-8 to the last byte; a long one may be cut within a character.
    try:
        head.decode()
    except UnicodeDecodeError:
        return False
    return True


def not_text(text: np.ndarray, any_bytes: bool) -> str | None:
    """Why these bytes are no text in UTF-8, and what to do; None where they are text.

    text: (N,) uint8; any_bytes: also take what is no text in any encoding, such as music.
    """
    head = text[: 2**16].tobytes()
    convert = "convert it: iconv -f {} -t UTF-8 FILE > NEW"
    control = CONTROL.search(head)
    # UTF-32 comes first: its byte order mark begins with the mark of UTF-16.
    for mark, name in (
        (b"\xff\xfe\0\0", "UTF-32"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ):
        if head.startswith(mark):
            return f"is text in {name}: {convert.format(name)}"
    # Without a mark, the zeros in it are control characters.
    if control:
        for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
            if _is_written(head, name):
                return f"is text in {name}: {convert.format(name)}"
    # Latin-1 and the like: most characters beyond ASCII are wrong in UTF-8.
    good, bad = _characters(text[:TEXT])
    if bad > good and not control:
        how = convert.format("ENCODING")
        return f"is text, but not in UTF-8 ({bad} places are not): {how}, with its own encoding"
    if bad and not any_bytes:
        return (
            f"is not text in UTF-8, {bad} places are not: convert it, or use --tokenizer=bytes, "
            "which takes any bytes"
        )
    return None


def _is_written(head: bytes, encoding: str) -> bool:
    """Are nearly all characters, read in this encoding, such as people write?"""
    try:
        text = head[: len(head) // 4 * 4].decode(encoding)
    except UnicodeDecodeError:
        return False
    written = sum(c in "\t\n\r" or unicodedata.category(c)[0] in "LMNPSZ" for c in text)
    return len(text) >= 16 and written >= 0.99 * len(text)


def _characters(text: np.ndarray) -> tuple[int, int]:
    """(characters beyond ASCII, places that are not UTF-8)"""
    # In pieces, so that a large file needs little memory; a character may lie in two of them.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    good = 0
    bad = 0
    for start in range(0, len(text), 2**20):
        raw = text[start : start + 2**20].tobytes()
        decoded = decoder.decode(raw, final=start + 2**20 >= len(text))
        n_wide = len(decoded) - len(decoded.encode("ascii", "ignore"))
        # The decoder puts U+FFFD for what is wrong; a text may hold that character, too.
        n_wrong = max(decoded.count("\ufffd") - raw.count("\ufffd".encode()), 0)
        good += n_wide - n_wrong
        bad += n_wrong
    return good, bad
