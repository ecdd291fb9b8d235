"""Tokens -> training samples, each a function of (seed, sample id) alone.

A corpus (data/corpora.py) is one long sequence of token ids in shards. Training reads it in
sequences of T + 1 tokens: the inputs are the first T of them, the targets the last T, so neighbours
share one token.

    tokens       0 1 2 3 4 5 6 7 8 9 ...        T = 3, per_epoch = (number of tokens - 1) // T
    sequence 0   0 1 2 3
    sequence 1         3 4 5 6
    sequence 2               6 7 8 9

A sample id counts sequences since training began. Sample i lies in epoch i // per_epoch, where a
keyed permutation of 0 .. per_epoch - 1 says which sequence of the corpus it is. Nothing is shuffled
or stored: any rank computes any sample, the data position of a run is one integer, and each epoch
visits every sequence once, in an order of its own. The permutation is a balanced Feistel network
(Luby and Rackoff, 1988) on pairs below a = ceil(sqrt(n)):

    left, right  <-  right, (left + hash(right, key)) mod a     eight rounds, a key for each

Whatever the hash does, a round can be undone, so the network permutes the a * a pairs. There are
slightly more pairs than n. A result outside 0 .. n - 1 is sent through again until it is inside
(cycle walking, Black and Rogaway, 2002), which keeps the map one to one. The keys are the sha256 of
seed and epoch.
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

    shards: 1-D arrays of ids; files: a name for each shard, for messages.

    A mapped file that somebody cuts short kills whoever reads it next, without a word (SIGBUS). So
    its size is checked before each read, and ValueError raised. Other ids written over the old ones
    are not noticed.
    """

    def __init__(self, shards: list[np.ndarray], name: str = "the data", files: list[str] = ()):
        self.name = name
        kept = [i for i, shard in enumerate(shards) if len(shard)]
        files = files or [""] * len(shards)
        self.shards = [shards[i] for i in kept]
        self.files = [files[i] for i in kept]
        self.ends = list(itertools.accumulate(map(len, self.shards)))
        # Only a memmap has a `filename`. check_size compares later sizes with the present one.
        self.mapped = {}
        for i, shard in enumerate(self.shards):
            path = getattr(shard, "filename", None)
            if path is not None:
                self.mapped[i] = (path, os.stat(path))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def slice(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) the tokens start .. stop - 1, across the borders of shards."""
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        first_shard = bisect_right(self.ends, start)
        last_shard = bisect_right(self.ends, stop - 1)
        pieces = []
        for i in range(first_shard, last_shard + 1):
            first = self.ends[i] - len(self.shards[i])
            self.check_size(i)
            pieces.append(self.shards[i][max(start - first, 0) : stop - first])
        # Nearly always one shard has all of it, and nothing is copied.
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def check_size(self, i: int) -> None:
        """Raises ValueError if the file behind shard i is shorter now.

        Another file put in its place does no harm: the old one stays mapped.
        """
        if i not in self.mapped:
            return
        path, before = self.mapped[i]
        try:
            now = os.stat(path)
        except OSError:
            # A file that was deleted stays mapped: it can be read to the end of the run.
            return
        if now.st_ino == before.st_ino and now.st_size < before.st_size:
            raise ValueError(
                f"{path} was cut to {now.st_size} bytes while a run read it: put it back, and start"
                " the run again"
            )

    def check(self, ids: np.ndarray, start: int, vocab_size: int) -> None:
        """Raises ValueError, which names the first bad id, unless all ids are in the vocabulary.

        ids: (N,) the tokens from `start` on.
        """
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
    """Sample ids -> tokens: a pure function of (seed, sample id).

    block_size: T; seed: of the order of the sequences, None keeps the corpus order; vocab_size:
    every id must be below it. ahead: how many samples later this rank's share of the next step
    begins, which is the batch size. That share is read in a thread while the model computes. It is
    a guess: where the batch size grows or samples are skipped, they are read when they are asked
    for. Raises ValueError where the tokens are too few for one sequence.
    """

    def __init__(
        self, tokens: Tokens, block_size: int, seed: int | None, vocab_size: int, ahead: int = 0
    ):
        self.tokens = tokens
        self.block_size = block_size
        self.seed = seed
        self.vocab_size = vocab_size
        self.ahead = ahead
        self.coming = {}  # sample ids -> their tokens, as a future
        self.pool = ThreadPoolExecutor(1, "samples") if ahead else None
        self.per_epoch = (len(tokens) - 1) // block_size
        if self.per_epoch < 1:
            raise ValueError(
                f"{tokens.name} has {len(tokens)} tokens, and one sequence needs {block_size + 1}: "
                f"use --block_size={max(len(tokens) - 1, 1)} or smaller, or a larger --data="
            )

    def sequence_numbers(self, sample_ids: Iterable[int]) -> np.ndarray:
        """(N,) for each sample its sequence of the corpus, in 0 .. per_epoch - 1."""
        epoch, index = np.divmod(np.fromiter(sample_ids, np.int64), self.per_epoch)
        if self.seed is None:
            return index
        # Eight keys of 32 bits for each epoch. The word "rows" decides the order, too: with another
        # one, a resumed run would see other samples.
        epochs, which = np.unique(epoch, return_inverse=True)
        digests = b"".join(
            hashlib.sha256(f"rows {self.seed} {e}".encode()).digest() for e in epochs
        )
        keys = np.frombuffer(digests, "<u4").astype(np.uint64).reshape(-1, 8)  # (epochs, 8)
        return permute(index, self.per_epoch, keys[which].T)

    def __call__(self, sample_ids: Iterable[int]) -> torch.Tensor:
        """(N, T + 1) int64: inputs are [:, :-1], targets [:, 1:].

        Raises ValueError for an id outside the vocabulary.
        """
        if not self.ahead:
            return self.read(sample_ids)
        sample_ids = tuple(sample_ids)
        first = sample_ids[0]
        # Not taken out of `coming`: a pipeline rank asks for the same samples for each chunk.
        read = self.coming.get(sample_ids)
        later = tuple(i + self.ahead for i in sample_ids)
        # Forget what this step has passed, and what a rollback has left far ahead.
        self.coming = {
            ids: tokens
            for ids, tokens in self.coming.items()
            if first <= ids[0] <= first + self.ahead
        }
        if later not in self.coming:
            self.coming[later] = self.pool.submit(self.read, later)
        if read is None:
            return self.read(sample_ids)
        return read.result()

    def read(self, sample_ids: Iterable[int]) -> torch.Tensor:
        """As __call__, now and in this thread."""
        T = self.block_size
        numbers = self.sequence_numbers(sample_ids).tolist()
        samples = np.empty((len(numbers), T + 1), np.int64)
        for sample, i in zip(samples, numbers):
            at = 0
            for start, stop in self.pieces(i):
                sample[at : at + stop - start] = self.tokens.slice(start, stop)
                at += stop - start
        # One comparison for all; only where it fails, look for the bad id.
        if samples.size and not (samples.min() >= 0 and samples.max() < self.vocab_size):
            for i in numbers:
                for start, stop in self.pieces(i):
                    self.tokens.check(self.tokens.slice(start, stop), start, self.vocab_size)
        return torch.from_numpy(samples)

    def pieces(self, i: int) -> list[tuple[int, int]]:
        """(start, stop) of the tokens that sequence i is made of, T + 1 in all."""
        return [(i * self.block_size, (i + 1) * self.block_size + 1)]


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """(N,) the image of each index (N,) under a keyed permutation of 0 .. n - 1.

    keys: (8, N) uint64, a column for each index.
    """
    side = np.uint64(math.isqrt(n - 1) + 1)
    x = index.astype(np.uint64)
    todo = np.arange(len(index))
    # Cycle walking: only what is still outside 0 .. n - 1 is sent through again.
    while len(todo):
        left, right = np.divmod(x[todo], side)
        # Any hash permutes. The two large odd numbers mix the bits; with other ones a resumed run
        # would see other samples.
        for key in keys[:, todo]:
            h = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps modulo 2^64
            h = (h ^ (h >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, (left + (h >> np.uint64(32))) % side
        x[todo] = left * side + right
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)
