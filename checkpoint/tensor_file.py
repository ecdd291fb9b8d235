"""Reading one safetensors file: boxes of its tensors, straight into the memory where they belong.

    8 bytes    n, the length of the header
    n bytes    {"w": {"dtype": "F32", "shape": [4, 6], "data_offsets": [begin, end]}, ...}
    the rest   the tensors' numbers, row by row; begin and end count from here

A box whose rows lie one after another in the file, and where it is to go, is read as one piece:

    in the file  . . a a a a b b b b . .     rows a, b        1 read, no copy
                 . a . . . b . . . c . .     a column         the library, from the mapped file

The library (safetensors) opens the file first, and checks its header.
"""

import hashlib
import json
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open

from checkpoint.slices import DTYPES

PIECE = 2**21  # bytes hashed at once: about a millisecond, much longer than a thread's answer


class TensorFile:
    """The file at `path`.

    Raises SafetensorError where it is of another kind, ValueError for a header that says something
    twice, OSError where there is no file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.library = safe_open(path, framework="pt")
        self.file = open(path, "rb", buffering=0)
        self.lock = threading.Lock()
        weakref.finalize(self, self.file.close)
        n = int.from_bytes(self.file.read(8), "little")
        self.begin = 8 + n
        self.header = json.loads(self.file.read(n), object_pairs_hook=as_dict)

    def facts(self, name: str) -> tuple[list[int], str]:
        """The shape and the dtype's name of a tensor. Raises SafetensorError where it is not."""
        stored = self.library.get_slice(name)
        return stored.get_shape(), stored.get_dtype()

    def read(self, name: str, box: tuple[slice, ...], out: torch.Tensor) -> None:
        """Fills `out` with the box of the tensor `name`. Raises OSError where the file is short."""
        shape, dtype = self.facts(name)
        run = first_number(shape, box)
        is_like_the_file = out.is_contiguous() and out.is_cpu and out.dtype == DTYPES[dtype]
        if run is None or not is_like_the_file:
            out.copy_(self.library.get_slice(name)[box])
            return
        begin = self.header[name]["data_offsets"][0] + run * DTYPES[dtype].itemsize
        # As bytes, for numpy has no bfloat16.
        self.read_bytes(self.begin + begin, memoryview(out.view(-1).view(torch.uint8).numpy()))

    def box(self, name: str, box: tuple[slice, ...]) -> torch.Tensor:
        """The box of a tensor, in new memory. Raises OSError where the file is short.

        Row by row: of the file no other byte is read, or mapped.
        """
        shape, dtype = self.facts(name)
        out = torch.empty([part.stop - part.start for part in box], dtype=DTYPES[dtype])
        if first_number(shape, box) is not None:
            self.read(name, box, out)
            return out
        for i in range(len(out)):
            row = box[0].start + i
            self.read(name, (slice(row, row + 1), *box[1:]), out[i : i + 1])
        return out

    def read_bytes(self, begin: int, out: memoryview) -> None:
        while len(out):
            n = self.read_at(begin, out)
            if not n:
                raise OSError(f"{self.path} ends early")
            begin += n
            out = out[n:]

    def read_at(self, begin: int, out: memoryview) -> int:
        # Threads and forked processes share the file's own position.
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [out], begin)
        with self.lock:  # Windows
            self.file.seek(begin)
            return self.file.readinto(out)


def as_dict(pairs: list[tuple]) -> dict:
    """The pairs of a JSON object as a dict. Raises ValueError for a key that is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def first_number(shape: list[int], box: tuple[slice, ...]) -> int | None:
    """Where in a tensor's numbers the box begins, if it is one run of them; else None."""
    first = 0
    n_inner = 1  # numbers behind one index of this dimension
    is_whole = True  # the box has all of every later dimension
    for n, part in zip(reversed(shape), reversed(box)):
        size = part.stop - part.start
        # Of what comes before a part, a run has one index alone.
        if not is_whole and size != 1:
            return None
        first += part.start * n_inner
        n_inner *= n
        is_whole = is_whole and size == n
    return first


def sha256_of(file) -> str:
    """The sha256 of an open, unbuffered file, in hexadecimal: a thread reads while this one hashes.

    In memory are two pieces of the file.
    """
    if os.fstat(file.fileno()).st_size <= PIECE:
        return hashlib.sha256(file.read()).hexdigest()
    digest = hashlib.sha256()
    now, later = memoryview(bytearray(PIECE)), memoryview(bytearray(PIECE))
    with ThreadPoolExecutor(1) as reader:
        n = file.readinto(now)
        while n:
            reading = reader.submit(file.readinto, later)
            digest.update(now[:n])
            n = reading.result()
            now, later = later, now
    return digest.hexdigest()
