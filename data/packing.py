"""Packing: a training sample holds whole documents, and begins with one (--pack).

A document is the token D and what follows, up to before the next D; what lies before the first D is
one, too. data/dataset.py cuts the corpus every T tokens, wherever that is. Here a sequence of T + 1
tokens, one sample, holds whole documents, and the last of them is cut where the sequence ends:

    corpus       D a b c d e | D f g | D h i j | D k        T = 5
    sequences    D f g D h -> i                 what is cut: i j
                 D a b c d -> e                 e and, as no sequence is left for it, D k

Targets are the inputs moved by one, as ever. A whole document is followed by the D of the next one,
here as in the corpus, and the last target (after the arrow) is what the corpus has there. So every
target is the true next token. The one exception: the corpus's last token is never an input, and
where the last document is not the last of its sequence, it gives way to a D.

What is cut is lost, in every epoch. It is of three kinds: rests of documents longer than T; what is
cut off to fill sequences; documents left over in the end, too few for another one. Empty documents,
a D before a D, are left out.

The plan. Only lengths matter, and of these there are T. So documents are counted by length, and
sequences by what is in them, a "pattern": millions of documents are some thousand patterns.

    1. best_fit: from the longest on, each document goes where the least space is that it fits in,
       or else into a new sequence.
    2. fill: of the sequences that are not full, the emptier half is taken apart. In each of the
       others a longer document takes the place of a document, or is added, and is cut where the
       sequence ends: the pair that cuts the least. What is left is packed again, from 1.

Which of the documents of a length goes where is the order of a hash of (seed, document): sequences
mix the whole corpus, and are a function of (tokens, seed). Each epoch visits them in an order of
its own, as data/dataset.py does.

Others: nanochat packs while it reads. From a buffer of documents the longest that fits goes in;
where none fits, the shortest is cut: nearly every sequence ends with a cut one, and 35 % of the
tokens are lost. Ding et al. (2024, "Fewer Truncations Improve Language Modeling", 2404.10830) cut
long documents into pieces of T, and pack all pieces by best fit decreasing: nothing is lost, but a
sequence may begin inside a document, and what is not full is padded. Here every token counts.
"""

import bisect
import hashlib

import numpy as np

from data.dataset import Dataset, Tokens

CHUNK = 2**22  # tokens that are searched at once


class Packed(Dataset):
    """Sample ids -> tokens, as Dataset, of sequences that begin where a document begins.

    token: D, with which a document begins; the other arguments are Dataset's. A document takes 10
    bytes here, and a sequence 8. Raises ValueError where the tokens are too few, or one document.

    n_tokens: those that can be an input; rests, filling, left, empty: how many of these are lost,
    because a document is longer than a sequence, to fill sequences, in the end, and as documents of
    D alone; fitting: block_size, doubled as often as it takes to make rests a quarter at most.
    """

    def __init__(
        self,
        tokens: Tokens,
        block_size: int,
        seed: int | None,
        vocab_size: int,
        ahead: int = 0,
        *,
        token: int,
    ):
        super().__init__(tokens, block_size, seed, vocab_size, ahead)
        T = block_size
        starts = document_starts(tokens, token)
        self.n_tokens = len(tokens) - 1
        if len(starts) < 2:
            raise ValueError(
                f"{tokens.name} is one document, for token {token} is nowhere inside it: give the "
                "id that is between its documents as --document_token=, data of several documents "
                "as --data=, or leave --pack= out"
            )
        lengths = np.diff(starts, append=self.n_tokens)
        # A D before a D: there is nothing to learn from it but that.
        self.empty = int((lengths == 1).sum())
        starts, lengths = starts[lengths > 1], lengths[lengths > 1]
        self.n_documents = len(starts)
        if lengths.clip(max=T).sum() < T:
            raise ValueError(
                f"{tokens.name} has {len(starts)} documents, together shorter than a sequence: "
                "give a smaller --block_size=, more data, or leave --pack= out"
            )
        self.rests = rests(lengths, T)
        self.fitting = T
        while rests(lengths, self.fitting) > self.n_tokens // 4:
            self.fitting *= 2
        lengths = np.minimum(lengths, T).astype(np.min_scalar_type(T))
        patterns, left = plan(np.bincount(lengths, minlength=T + 1).tolist(), T)
        self.left = sum(length * n for length, n in enumerate(left))
        # Sequence i has the pieces borders[i] .. borders[i + 1] - 1.
        self.borders, documents = assign(patterns, lengths, seed, T)
        self.per_epoch = len(self.borders) - 1
        self.piece_starts = starts[documents]
        self.piece_lengths = lengths[documents]
        # What a sequence has too much is cut off its last document.
        ends = self.borders[1:] - 1
        excess = np.add.reduceat(self.piece_lengths, self.borders[:-1], dtype=np.int64) - T
        self.piece_lengths[ends] -= excess.astype(lengths.dtype)
        self.filling = int(excess.sum())
        if tokens.slice(0, 1)[0] != token:
            self.begin_with_first(int(lengths[0]))

    def begin_with_first(self, length: int) -> None:
        """Puts the first document in front of its sequence: alone of all, it may lack its D.

        length: of it, T at most. Inside a sequence nobody could tell where it begins.
        """
        place = np.flatnonzero(self.piece_starts == 0)
        if not len(place):
            return
        sequence = int(np.searchsorted(self.borders, place[0], "right")) - 1
        start, stop = self.borders[sequence], self.borders[sequence + 1]
        order = np.r_[place[0], start : place[0], place[0] + 1 : stop]
        starts = self.piece_starts[order]
        lengths = self.piece_lengths[order].astype(np.int64)
        # If it was cut, now another one is, or some are left out, by as much.
        lengths[0] = length
        room = self.block_size - (np.cumsum(lengths) - lengths)
        lengths = np.minimum(lengths, room)
        kept = lengths > 0
        self.piece_starts[start:stop][: kept.sum()] = starts[kept]
        self.piece_lengths[start:stop][: kept.sum()] = lengths[kept]
        gone = np.arange(start + kept.sum(), stop)
        self.piece_starts = np.delete(self.piece_starts, gone)
        self.piece_lengths = np.delete(self.piece_lengths, gone)
        self.borders[sequence + 1 :] -= len(gone)

    def pieces(self, i: int) -> list[tuple[int, int]]:
        """(start, stop) of the tokens that sequence i is made of, T + 1 in all."""
        here = slice(self.borders[i], self.borders[i + 1])
        starts = self.piece_starts[here]
        stops = starts + self.piece_lengths[here]
        stops[-1] += 1  # the last target
        return list(zip(starts.tolist(), stops.tolist()))


def document_starts(tokens: Tokens, token: int) -> np.ndarray:
    """(documents,) int64: where documents begin, 0 first.

    A token at the very end begins none, for it is never an input.
    """
    found = [np.zeros(1, np.int64)]
    for start in range(1, len(tokens) - 1, CHUNK):
        stop = min(start + CHUNK, len(tokens) - 1)
        found.append(np.flatnonzero(tokens.slice(start, stop) == token) + start)
    return np.concatenate(found)


def rests(lengths: np.ndarray, T: int) -> int:
    """How many tokens of documents lie behind their first T. lengths: (documents,)"""
    return int(np.maximum(lengths - T, 0).sum())


class Lengths:
    """Documents by length: how many there are of each, and which lengths there are, in order."""

    def __init__(self, T: int):
        self.counts = [0] * (T + 1)
        self.present = []

    def add(self, length: int, n: int) -> None:
        """n below 0 takes them out."""
        if n and not self.counts[length]:
            bisect.insort(self.present, length)
        self.counts[length] += n
        if n and not self.counts[length]:
            del self.present[bisect.bisect_left(self.present, length)]

    def shortest(self, least: int) -> int | None:
        """The shortest length from `least` on."""
        i = bisect.bisect_left(self.present, least)
        return self.present[i] if i < len(self.present) else None


def plan(counts: list[int], T: int) -> tuple[list[tuple[int, tuple]], list[int]]:
    """(patterns of full sequences, how many documents of each length are left over).

    counts: (T + 1) how many documents have each length. A pattern is (sequences, ((length, how
    many), ...)). The lengths are the documents' own: the last one is cut where the sequence ends.
    """
    full = []
    # Documents that were given back are packed again, as long as there are enough for a sequence.
    while sum(length * n for length, n in enumerate(counts)) >= T:
        open_ones = best_fit(counts, T)
        full += open_ones.pop(0, [])
        more, counts = fill(open_ones, T)
        full += more
    return full, counts


def best_fit(counts: list[int], T: int) -> dict[int, list[tuple[int, tuple]]]:
    """Space -> patterns with that space, by best fit decreasing. counts: as plan()'s."""
    sequences = {T: []}
    spaces = [T]  # the keys, in order
    for length in range(T, 0, -1):
        todo = counts[length]
        while todo:
            i = bisect.bisect_left(spaces, length)
            space = spaces[i]
            n, content = sequences[space].pop() if sequences[space] else (todo, ())
            # A sequence that was begun has the least space now, so it goes on with it.
            each = min(space // length, todo)
            used = min(n, todo // each)
            todo -= used * each
            if content and n > used:
                sequences[space].append((n - used, content))
            if not sequences[space] and space < T:
                del sequences[space]
                del spaces[i]
            space -= each * length
            if space not in sequences:
                sequences[space] = []
                bisect.insort(spaces, space)
            sequences[space].append((used, (*content, (length, each))))
    del sequences[T]
    return sequences


def fill(
    open_ones: dict[int, list[tuple[int, tuple]]], T: int
) -> tuple[list[tuple[int, tuple]], list[int]]:
    """plan()'s answer, of some of the sequences; the documents of the others are left over.

    The emptier half of the sequences is taken apart, to fill the fuller half.
    """
    pool = Lengths(T)
    todo = []
    n_apart = sum(n for some in open_ones.values() for n, _ in some) // 2
    for space in sorted(open_ones, reverse=True):
        for n, content in open_ones[space]:
            apart = min(n, n_apart)
            n_apart -= apart
            for length, k in content:
                pool.add(length, k * apart)
            if n > apart:
                todo.append((space, n - apart, content))
    full = []
    while todo:
        space, n, content = todo.pop()
        if not pool.present:
            for length, k in content:
                pool.add(length, k * n)
            continue
        old, new = exchange(space, content, pool)
        used = min(n, pool.counts[new])
        pool.add(new, -used)
        if old:
            pool.add(old, used)
        if n > used:
            todo.append((space, n - used, content))
        space -= new - old
        content = exchanged(content, old, new)
        if space > 0:
            todo.append((space, used, content))
        else:
            full.append((used, content))
    return full, pool.counts


def exchange(space: int, content: tuple, pool: Lengths) -> tuple[int, int]:
    """(old, new): the document of a sequence to give back, or 0, and the one of the pool to take.

    They fill the space, and cut the least. Where none does, the longest of the pool is added.
    """
    found = []
    for old in (0, *dict(content)):
        new = pool.shortest(old + space)
        if new is not None:
            found.append((new - old, old, new))
    return min(found)[1:] if found else (0, pool.present[-1])


def exchanged(content: tuple, old: int, new: int) -> tuple:
    """The content with a new document, the last one, in place of an old one (0: of none)."""
    found = list(content)
    if old:
        i = [length for length, _ in found].index(old)
        found[i] = (old, found[i][1] - 1)
    return (*((length, k) for length, k in found if k), (new, 1))


def assign(
    patterns: list[tuple[int, tuple]], lengths: np.ndarray, seed: int | None, T: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which documents each sequence has: (the first piece of each, and the end; a document each).

    lengths: (documents,) T at most. Of equal ones, the order of a hash says which goes where.
    """
    by_length = shuffled(lengths, seed)
    # Where the next document of each length is in by_length.
    n_of = np.bincount(lengths)
    following = (np.cumsum(n_of) - n_of).tolist()
    widths = [sum(k for _, k in content) for _, content in patterns]
    borders = np.repeat(np.array([0, *widths], np.int64), [1, *(n for n, _ in patterns)]).cumsum()
    documents = np.empty(borders[-1], np.int64)
    at = 0
    for (n, content), width in zip(patterns, widths):
        block = documents[at : at + n * width].reshape(n, width)  # a sequence each
        column = 0
        for length, k in content:
            some = by_length[following[length] : following[length] + n * k]
            block[:, column : column + k] = some.reshape(n, k)
            following[length] += n * k
            column += k
        # Turned, so that the longest is not always in front, nor the cut one always short. But what
        # is cut off must be less than the last document.
        excess = sum(length * k for length, k in content) - T
        free = width if excess < min(length for length, _ in content) else width - 1
        turned = np.arange(n)[:, None] + np.arange(free)
        block[:, :free] = np.take_along_axis(block[:, :free], turned % free, 1)
        at += n * width
    return borders, documents


def shuffled(lengths: np.ndarray, seed: int | None) -> np.ndarray:
    """(documents,) their numbers, by length, and those of one length in the order of a hash."""
    key = int.from_bytes(hashlib.sha256(f"pack {seed}".encode()).digest()[:8], "little")
    # Two rounds of multiplying and shifting mix the number of a document with the key, modulo 2^64.
    h = np.arange(len(lengths), dtype=np.uint64)
    for factor in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93):
        h += np.uint64(key)
        h *= np.uint64(factor)
        h ^= h >> np.uint64(32)
    # Numbers of 16 bits are sorted in linear time; equal ones stay in the order of the corpus.
    order = np.argsort((h >> np.uint64(48)).astype(np.uint16), kind="stable")
    return order[np.argsort(lengths[order], kind="stable")]
