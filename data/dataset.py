"""Tokens -> rows that depend on (seed, row number) alone.

A corpus (data/corpora.py) is one long sequence of token ids in shards. Training reads it in rows of
T + 1 tokens: the inputs are the first T of them, the targets the last T, so neighbours share one.

    tokens   0 1 2 3 4 5 6 7 8 9 ...        T = 3, per_epoch = (number of tokens - 1) // T
    row 0    0 1 2 3
    row 1          3 4 5 6
    row 2                6 7 8 9

Row number r counts sequences since training began. It lies in epoch r // per_epoch, where a keyed
permutation of 0 .. per_epoch - 1 says which row of the corpus it is. Nothing is shuffled or stored:
any rank computes any row, the data position of a run is one integer, and each epoch visits every
row once, in an order of its own. The permutation is a balanced Feistel network (Luby and Rackoff,
1988) on pairs below a = ceil(sqrt(n)):

    left, right  <-  right, (left + hash(right, key)) mod a     eight rounds, a key for each

Whatever the hash does, a round can be undone, so the network permutes the a * a pairs. They are
slightly more than n; what lands outside is sent through again until it is inside (cycle walking,
Black and Rogaway, 2002), which keeps the map one to one. The keys are the sha256 of seed and epoch.
"""

import hashlib
import itertools
import math
import os
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


class Tokens:
    """One logical sequence of token ids over one or many shards, in memory or mapped from files.

    A mapped file that somebody cuts kills whoever reads it next, without a word (SIGBUS). So its
    size is looked at before each read, and ValueError raised. Other ids written over the old ones
    are not noticed.
    files: a name for each shard, for messages.
    """

    def __init__(self, shards: list[np.ndarray], name: str = "the data", files: list[str] = ()):
        kept = [i for i, shard in enumerate(shards) if len(shard)]
        self.name = name
        self.shards = [shards[i] for i in kept]
        self.files = [files[i] for i in kept] if files else [""] * len(kept)
        self.ends = list(itertools.accumulate(map(len, self.shards)))
        paths = [getattr(shard, "filename", None) for shard in self.shards]
        self.mapped = [None if path is None else (path, os.stat(path)) for path in paths]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1, across the borders of shards."""
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        pieces = []
        for i in range(bisect_right(self.ends, start), bisect_right(self.ends, stop - 1) + 1):
            first = self.ends[i] - len(self.shards[i])
            self.still_there(i)
            pieces.append(self.shards[i][max(start - first, 0) : stop - first])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def still_there(self, i: int) -> None:
        """ValueError if the file behind shard i is shorter now. One put in its place is no harm."""
        if self.mapped[i] is None:
            return
        path, before = self.mapped[i]
        try:
            now = os.stat(path)
        except OSError:  # taken away: what is mapped stays
            return
        if now.st_ino == before.st_ino and now.st_size < before.st_size:
            raise ValueError(
                f"{path} was cut to {now.st_size} bytes while a run read it: put it back, and start"
                " the run again"
            )

    def check(self, ids: np.ndarray, start: int, vocab_size: int) -> None:
        """ValueError naming the first of these ids (N,), the tokens from `start` on, that is
        outside the vocabulary."""
        if not ids.size or (ids.min() >= 0 and ids.max() < vocab_size):
            return
        at = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        i = bisect_right(self.ends, start + at)
        place = start + at - (self.ends[i] - len(self.shards[i]))
        file = f" of {self.files[i]}" if self.files[i] else ""
        raise ValueError(
            f"{self.name} holds token id {ids[at]}, and vocab_size is {vocab_size} (token"
            f" {place}{file}): use the --tokenizer= that made these ids, or the size of its"
            " vocabulary as --vocab_size="
        )


class Dataset:
    """Row number -> tokens: a pure function of (seed, row number). seed=None keeps the corpus
    order.

    ahead: how many rows later this rank's share of the next step begins, the batch size. That is
    read in a thread while this one is computed on: a guess; after a ramp or a ban rows are read
    when they are asked for.
    """

    def __init__(
        self, tokens: Tokens, block_size: int, seed: int | None, vocab_size: int, ahead: int = 0
    ):
        self.tokens, self.block_size, self.seed, self.vocab_size = (
            tokens,
            block_size,
            seed,
            vocab_size,
        )
        self.ahead, self.coming = ahead, {}  # numbers -> their rows, as a future
        self.pool = ThreadPoolExecutor(1, "rows") if ahead else None
        self.per_epoch = (len(tokens) - 1) // block_size
        if self.per_epoch < 1:
            raise ValueError(
                f"{tokens.name} has {len(tokens)} tokens, and one row needs {block_size + 1}: "
                f"use --block_size={max(len(tokens) - 1, 1)} or smaller, or a larger --data="
            )

    def places(self, numbers: Iterable[int]) -> np.ndarray:
        """Row numbers -> rows of the corpus, each in 0 .. per_epoch - 1."""
        epoch, index = np.divmod(np.fromiter(numbers, np.int64), self.per_epoch)
        if self.seed is None:
            return index
        epochs, which = np.unique(epoch, return_inverse=True)
        digests = b"".join(
            hashlib.sha256(f"rows {self.seed} {e}".encode()).digest() for e in epochs
        )
        keys = np.frombuffer(digests, "<u4").astype(np.uint64).reshape(-1, 8)
        return permute(index, self.per_epoch, keys[which].T)

    def __call__(self, numbers: Iterable[int]) -> torch.Tensor:
        """(n, block_size + 1) int64: inputs are [:, :-1], targets [:, 1:]. ValueError for a bad
        id."""
        if not self.ahead:
            return self.read(numbers)
        numbers = tuple(numbers)
        # Kept: stages of a pipeline ask once more
        read, first = self.coming.get(numbers), numbers[0]
        later = tuple(i + self.ahead for i in numbers)
        self.coming = {k: x for k, x in self.coming.items() if first <= k[0] <= first + self.ahead}
        if later not in self.coming:
            self.coming[later] = self.pool.submit(self.read, later)
        return self.read(numbers) if read is None else read.result()

    def read(self, numbers: Iterable[int]) -> torch.Tensor:
        T, places = self.block_size, self.places(numbers).tolist()
        rows = np.empty((len(places), T + 1), np.int64)
        for row, i in zip(rows, places):
            row[:] = self.tokens.slice(i * T, i * T + T + 1)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.vocab_size):
            for row, i in zip(rows, places):
                self.tokens.check(row, i * T, self.vocab_size)
        return torch.from_numpy(rows)


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The image of each index (N,) under a keyed permutation of 0 .. n - 1; keys (8, N), a column
    each."""
    side = np.uint64(math.isqrt(n - 1) + 1)
    x, todo = index.astype(np.uint64), np.arange(len(index))
    while len(todo):
        left, right = np.divmod(x[todo], side)
        for key in keys[:, todo]:
            h = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps modulo 2^64
            h = (h ^ (h >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, (left + (h >> np.uint64(32))) % side
        x[todo] = left * side + right
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)
