"""Files of documents -> the text of one document after another, or why it cannot be had.

    .jsonl  .jsonl.gz  .jsonl.zst       a JSON object in each line, its text in one field. C4's
            .json.gz   .json.zst        .json.gz are such files; .zst needs the package zstandard
    .parquet                            a document in each row, its text in one column; pyarrow
    any other file                      is one document

A large file is read in parts, by several processes at once: of .jsonl the lines that begin between
two bytes, of .parquet some row groups. Packed files are read from their beginning to their end.

Damaged is whatever holds no text where one should be: a line that is no JSON, a field that is
missing, null or a number, bytes that are not UTF-8, a packed file that is cut short. Each is said
with its file and line; who reads decides whether that is the end. An empty text is no damage.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data import texts
from data.files import holds_documents

# A longer line is refused: it would have to fit in memory several times.
LINE = 2**26  # bytes
ROWS = 256  # of .parquet, at a time
PACKED = {".gz": "gzip", ".zst": "zstd"}


class Damage(str):
    """A sentence about a document, or the rest of a file, that cannot be read."""


class Broken(Exception):
    """A packed file is cut short, or its checksum is wrong."""


@dataclass(frozen=True)
class Part:
    """Some of a file's documents.

    start, stop: bytes of a .jsonl, row groups of a .parquet; of other files 0 and None, all of it.
    size: the bytes of the file that it stands for.
    """

    path: Path
    start: int
    stop: int | None
    size: int


# ---- parts ---------------------------------------------------------------------------------------
def parts_of(path: Path, size: int) -> Iterator[Part]:
    """The parts of one file, in its order, each of about `size` bytes where it can be divided."""
    total = path.stat().st_size
    name = path.name.lower()
    if name.endswith(".jsonl") and total:
        for start in range(0, total, size):
            stop = min(start + size, total)
            yield Part(path, start, stop, stop - start)
        return
    if name.endswith(".parquet"):
        try:
            n_groups = _parquet(path).num_row_groups
        except Broken:  # said when it is read
            n_groups = 0
        each = max(1, n_groups * size // max(total, 1))
        for start in range(0, n_groups, each):
            stop = min(start + each, n_groups)
            yield Part(path, start, stop, total * stop // n_groups - total * start // n_groups)
        if n_groups:
            return
    yield Part(path, 0, None, total)


class Documents:
    """Iterates over the documents of one part: bytes, its text in UTF-8; or a Damage.

    field: where the text is; any_bytes: a file that is one document may hold anything. `done`: how
    many of the part's bytes have been read so far. Raises ValueError where a package is missing.
    """

    def __init__(self, part: Part, field: str, any_bytes: bool = False):
        self.part = part
        self.field = field
        self.any_bytes = any_bytes
        self.done = 0

    def __iter__(self) -> Iterator[bytes | Damage]:
        path = self.part.path
        if not holds_documents(path):
            yield from self._whole()
        elif path.name.lower().endswith(".parquet"):
            yield from self._rows()
        else:
            yield from self._lines()
        self.done = self.part.size

    def _whole(self) -> Iterator[bytes | Damage]:
        text = texts.bytes_of(self.part.path, self.part.size > LINE)
        fault = texts.fault_of(self.part.path, text, self.any_bytes)
        # Not copied: a large text is mapped.
        yield Damage(f"{self.part.path} {fault}") if fault else memoryview(text)

    # ---- lines
    def _lines(self) -> Iterator[bytes | Damage]:
        path = self.part.path
        packed = PACKED.get(path.suffix.lower())
        if packed and not self.part.size:
            yield Damage(f"{path} is empty, which no {packed} file is: copy it again")
            return
        number = 0  # of lines of this part
        try:
            with open(path, "rb", 2**20) as raw:
                for number, line in enumerate(self._raw_lines(raw, packed), 1):
                    if isinstance(line, Damage):
                        text = line
                    elif line.isspace():
                        continue
                    else:
                        text = text_of(line, self.field)
                    if isinstance(text, Damage):
                        text = Damage(f"{path}, line {self._lines_before() + number}: {text}")
                    yield text
        except Broken as error:
            yield Damage(
                f"{path}, behind line {number}: this {packed} file is cut short or damaged "
                f"({error}): copy it again"
            )

    def _raw_lines(self, raw, packed: str | None) -> Iterator[bytes | Damage]:
        """The lines of a part. One that is too long is a Damage."""
        at = self.part.start
        file = raw
        if packed == "gzip":
            file = gzip.GzipFile(fileobj=raw)
        elif packed == "zstd":
            file = io.BufferedReader(_Zstd(raw, self.part.path), 2**17)
        elif at:
            # The line over this byte belongs to the part before.
            raw.seek(at - 1)
            at -= 1
            line = b""
            while not line.endswith(b"\n"):
                line = raw.readline(LINE)
                at += len(line)
                if not line:
                    return
        stop = None if packed else self.part.stop
        is_first = at == 0
        while stop is None or at < stop:
            line = _readline(file)
            if not line:
                return
            at += len(line)
            is_long = len(line) > LINE
            while is_long and line and not line.endswith(b"\n"):
                line = _readline(file)
                at += len(line)
            self.done = raw.tell() if packed else at - self.part.start
            if is_first:
                line = line.removeprefix(texts.BYTE_ORDER_MARK)
                is_first = False
            yield Damage(f"is longer than {LINE >> 20} MiB: cut its text") if is_long else line

    def _lines_before(self) -> int:
        """How many lines of the file begin before this part does."""
        n = 0
        missing = self.part.start
        with open(self.part.path, "rb") as file:
            while missing and (block := file.read(min(missing, 2**20))):
                n += block.count(b"\n")
                missing -= len(block)
            # A part that begins within a line begins with the next one.
            if self.part.start and not block.endswith(b"\n"):
                n += 1
        return n

    # ---- rows
    def _rows(self) -> Iterator[bytes | Damage]:
        path = self.part.path
        number = 0  # of rows of the file
        try:
            file = _parquet(path)
            fault = _column_fault(file.schema_arrow, self.field)
            if fault:
                yield Damage(f"{path} {fault}")
                return
            stop = file.num_row_groups if self.part.stop is None else self.part.stop
            groups = range(self.part.start, stop)
            number = sum(file.metadata.row_group(i).num_rows for i in range(self.part.start))
            n_rows = max(sum(file.metadata.row_group(i).num_rows for i in groups), 1)
            first = number
            for column in _batches(file, groups, self.field):
                for text in _values(column):
                    number += 1
                    text = utf8(text, self.field)
                    if isinstance(text, Damage):
                        text = Damage(f"{path}, row {number}: {text}")
                    yield text
                self.done = self.part.size * (number - first) // n_rows
        except Broken as error:
            yield Damage(f"{path}, behind row {number}: cannot be read ({error}): copy it again")


# ---- a line --------------------------------------------------------------------------------------
def text_of(line: bytes, field: str) -> bytes | Damage:
    """The text in one line of .jsonl; the end of a sentence where there is none."""
    try:
        # Not json.loads(bytes), which guesses other encodings and lets lone surrogates pass.
        found = json.loads(line.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        return Damage(f"is not UTF-8 ({error.reason} at byte {error.start + 1})")
    except json.JSONDecodeError as error:
        return Damage(f"is no JSON ({error.msg} at character {error.pos + 1})")
    except (ValueError, RecursionError) as error:
        return Damage(f"is no JSON that can be read ({type(error).__name__})")
    if not isinstance(found, dict):
        return Damage(f'is {_kind(found)}, and {{"{field}": "..."}} is expected')
    if field not in found:
        names = ", ".join(sorted(map(repr, found))[:5])[:200] or "no field"
        return Damage(f"has no field {field!r}, but {names}")
    return utf8(found[field], field)


def utf8(value, field: str) -> bytes | Damage:
    """The bytes of a text; the end of a sentence where the value is none."""
    try:
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, bytes):
            value.decode()
            return value
    except UnicodeEncodeError:
        return Damage(f"has half a character in {field!r}, a lone surrogate, which no UTF-8 has")
    except UnicodeDecodeError as error:
        return Damage(f"has bytes in {field!r} that are not UTF-8 ({error.reason})")
    return Damage(f"has {_kind(value)} in {field!r}, and a string is expected")


def _kind(value) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _readline(file) -> bytes:
    try:
        return file.readline(LINE + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Broken(str(error)[:100]) from error


class _Zstd(io.RawIOBase):
    """What a .zst file unpacks to, all of its frames. Raises Broken for one that is cut short.

    The reader of the package, zstandard.open, ends at a cut without a word.
    """

    def __init__(self, raw, path: Path):
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path} needs `pip install zstandard`") from None
        self.raw = raw
        self.package = zstandard
        self.frame = None
        self.rest = b""  # read, but not unpacked
        self.unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.unpacked:
            self.rest = self.rest or self.raw.read(2**14)
            if not self.rest:
                if self.frame is not None:
                    raise Broken("the last frame has no end")
                return 0
            if self.frame is None:
                self.frame = self.package.ZstdDecompressor().decompressobj()
            try:
                self.unpacked = memoryview(self.frame.decompress(self.rest))
            except self.package.ZstdError as error:
                raise Broken(str(error)[:100]) from error
            self.rest = b""
            if self.frame.eof:
                self.rest = self.frame.unused_data
                self.frame = None
        n = min(len(buffer), len(self.unpacked))
        buffer[:n] = self.unpacked[:n]
        self.unpacked = self.unpacked[n:]
        return n


# ---- a row ---------------------------------------------------------------------------------------
def _parquet(path: Path):
    """pyarrow's ParquetFile. Raises Broken, and ValueError without pyarrow."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs `pip install pyarrow`") from None
    return _guarded(
        lambda: pyarrow.parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
    )


def _guarded(read: Callable):
    """What read() returns; pyarrow's many errors are Broken."""
    import pyarrow

    try:
        return read()
    except (pyarrow.ArrowException, OSError, EOFError, ValueError) as error:
        raise Broken(" ".join(str(error).split())[:100]) from error


def _column_fault(schema, field: str) -> str | None:
    """Why this column has no texts, as the middle of a sentence; None where it may have some."""
    import pyarrow

    if field not in schema.names:
        return f"has no column {field!r}, but {', '.join(map(repr, schema.names[:5]))}"
    kind = schema.field(field).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) in ("string", "large_string", "string_view", "binary", "large_binary", "null"):
        return None
    return f"has {kind} in the column {field!r}, and strings are expected"


def _batches(file, groups: range, field: str) -> Iterator:
    """The column of a few rows at a time. Raises Broken."""
    batches = _guarded(
        lambda: file.iter_batches(ROWS, row_groups=groups, columns=[field], use_threads=False)
    )
    while (batch := _guarded(lambda: next(batches, None))) is not None:
        yield batch.column(0)


def _values(column) -> list:
    """A column's texts as str, bytes where they are not UTF-8, or None."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [value.as_buffer().to_pybytes() if value.is_valid else None for value in column]
