"""Whole documents packed into training samples: each begins where a document begins (--pack).

A document is the token D and what follows, up to before the next D; what lies before the first D is
one, too. data/dataset.py cuts the corpus every T tokens, wherever that is. Here a row, which is one
sample of T + 1 tokens, is filled by whole documents, and the last of them is cut where the row ends:

    corpus   D a b c d e | D f g | D h i j | D k        T = 5
    rows     D f g D h -> i        what is cut: i j
             D a b c d -> e                     e       and D k, which found no place

The targets are the inputs moved by one, as ever. A whole document is followed by the D of the next
one, in the row as in the corpus, and a row's last target (after the arrow) is what the corpus has
there. So every target is the true next token, with one exception: the corpus ends with a token that
is only a target, and where its last document does not end a row, that token gives way to a D.

What is cut is lost, in every epoch. It is of three kinds: rests of documents longer than T, what is
cut off to fill rows, and a few documents at the end that are too short for another row.

The plan of rows. Only lengths matter, and of these there are T. So it counts documents by length,
and rows by what is in them, a "pattern": millions of documents are some thousand patterns.

    1. Best fit decreasing: from the longest on, each document goes into the row with the least
       space that it fits in, or else into a new row.
    2. Rows that are not full, the fullest first: the shortest document that is long enough is cut to
       fill it. Such documents come from the emptiest rows, which are taken apart.

Which of the documents of a length goes where is the order of a hash of (seed, document): rows mix
the whole corpus, and are a function of (tokens, seed). Each epoch visits them in an order of its
own, as data/dataset.py does.

Others: nanochat packs while it reads. The longest document of a buffer that fits goes in, and where
none fits the shortest is cut, so nearly every row has a cut one. Ding et al. (2024, "Fewer
Truncations Improve Language Modeling", arXiv 2404.10830) divide long documents into pieces of T and
pack pieces by best fit decreasing over a table of spaces: nothing is lost, but rows may begin inside
a document, and what is not full is padded. The plan here is theirs, with whole documents alone, and
cut documents in place of padding: every sample is T tokens of loss.
"""

import bisect
import hashlib

import numpy as np

from data.dataset import Dataset, Tokens

CHUNK = 2**22  # tokens that are searched at once


class Packed(Dataset):
    """Sample ids -> tokens, as Dataset, of rows that begin where a document begins.

    token: D, with which a document begins; the other arguments are Dataset's. A document takes 12
    bytes here, and a row 8. Raises ValueError where the tokens are too few, or one document.

    n_tokens: those that can be an input; rests, filling, left: how many of these are lost, because
    a document is longer than a row, to fill rows, and at the end.
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
        self.n_documents = len(starts)
        if len(starts) < 2:
            raise ValueError(
                f"{tokens.name} is one document, for token {token} is nowhere inside it: give the "
                "id that is between its documents as --document_token=, data of several documents "
                "as --data=, or leave --pack= out"
            )
        lengths = np.diff(starts, append=self.n_tokens)
        self.rests = int(np.maximum(lengths - T, 0).sum())
        lengths = np.minimum(lengths, T).astype(np.int32)
        patterns, left = plan(np.bincount(lengths, minlength=T + 1).tolist(), T)
        self.left = sum(length * n for length, n in enumerate(left))
        # Row i has the pieces first[i] .. first[i + 1] - 1.
        self.first, documents = assign(patterns, lengths, seed)
        self.per_epoch = len(self.first) - 1
        self.piece_starts = starts[documents]
        self.piece_lengths = lengths[documents]
        # What a row has too much is cut off its last document.
        ends = self.first[1:] - 1
        excess = np.add.reduceat(self.piece_lengths, self.first[:-1], dtype=np.int64) - T
        self.piece_lengths[ends] -= excess.astype(np.int32)
        self.filling = int(excess.sum())
        if tokens.slice(0, 1)[0] != token:
            self.begin_with_first(int(lengths[0]))

    def begin_with_first(self, length: int) -> None:
        """Puts the first document in front of its row: alone of all, it may lack its D.

        length: of it, T at most. Inside a row nobody could tell where it begins.
        """
        place = np.flatnonzero(self.piece_starts == 0)
        if not len(place):
            return
        row = int(np.searchsorted(self.first, place[0], "right")) - 1
        start, stop = self.first[row], self.first[row + 1]
        order = np.r_[place[0], start : place[0], place[0] + 1 : stop]
        starts = self.piece_starts[order]
        lengths = self.piece_lengths[order]
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
        self.first[row + 1 :] -= len(gone)

    def pieces(self, i: int) -> list[tuple[int, int]]:
        """(start, stop) of the tokens that sequence i is made of, T + 1 in all."""
        here = slice(self.first[i], self.first[i + 1])
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


class Rows:
    """Patterns of rows that are not full: (rows, the documents in each) by their space.

    The documents of a row are ((length, how many), ...).
    """

    def __init__(self):
        self.by_space = {}
        self.spaces = []  # the keys, in order

    def add(self, space: int, n: int, content: tuple) -> None:
        if space not in self.by_space:
            self.by_space[space] = []
            bisect.insort(self.spaces, space)
        self.by_space[space].append((n, content))

    def pop(self, i: int) -> tuple[int, int, tuple]:
        """(space, rows, content) of one of the i-th space's patterns."""
        space = self.spaces[i]
        n, content = self.by_space[space].pop()
        if not self.by_space[space]:
            del self.by_space[space]
            del self.spaces[i]
        return space, n, content


def plan(counts: list[int], T: int) -> tuple[list[tuple[int, tuple]], list[int]]:
    """(patterns of full rows, how many documents of each length are left over).

    counts: (T + 1) how many documents have each length. A pattern is (rows, ((length, how many),
    ...)). The lengths are the documents' own: the last one is cut where the row ends.
    """
    rows = best_fit(counts, T)
    full = rows.by_space.pop(0, [])
    rows.spaces = sorted(rows.by_space)
    return fill(rows, full, T)


def best_fit(counts: list[int], T: int) -> Rows:
    """All documents in rows, full (space 0) or not, by best fit decreasing. counts: as plan()'s."""
    rows = Rows()
    for length in range(T, 0, -1):
        todo = counts[length]
        while todo:
            i = bisect.bisect_left(rows.spaces, length)
            if i < len(rows.spaces):
                space, n, content = rows.pop(i)
            else:
                space, n, content = T, -(-todo // (T // length)), ()
            # A row that was begun now has the least space, so it goes on with it.
            each = min(space // length, todo)
            used = min(n, todo // each)
            rows.add(space - each * length, used, (*content, (length, each)))
            todo -= used * each
            if n > used:
                rows.add(space, n - used, content)
    return rows


def fill(rows: Rows, full: list, T: int) -> tuple[list[tuple[int, tuple]], list[int]]:
    """plan()'s answer: rows that are not full are filled by documents of others. full: patterns."""
    pool = [0] * (T + 1)  # the documents of rows that were taken apart, by length
    lengths = []  # of these, in order
    while rows.spaces:
        space, n, content = rows.pop(0)
        if lengths:
            # The shortest that fills the space; if none does, the longest, whole.
            i = bisect.bisect_left(lengths, space)
            length = lengths[min(i, len(lengths) - 1)]
            used = min(n, pool[length])
            if length < space:
                rows.add(space - length, used, (*content, (length, 1)))
            else:
                full.append((used, (*content, (length, 1))))
            pool[length] -= used
            if not pool[length]:
                lengths.remove(length)
        else:
            # Nothing is there to fill with: take rows apart, as many as this pattern needs.
            used = 0
            is_last = not rows.spaces
            other_space, others, other = (space, n, content) if is_last else rows.pop(-1)
            fitting = sum(k for length, k in other if length >= space)
            if fitting:
                needed = -(-n // (fitting + is_last))
            else:
                needed = -(-n * space // (T - other_space + is_last * space))
            apart = min(needed, others)
            for length, k in other:
                if not pool[length]:
                    bisect.insort(lengths, length)
                pool[length] += k * apart
            if is_last:
                used = apart
            elif others > apart:
                rows.add(other_space, others - apart, other)
        if n > used:
            rows.add(space, n - used, content)
    return full, pool


def assign(
    patterns: list[tuple[int, tuple]], lengths: np.ndarray, seed: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Which documents each row has: (first piece of each row and the end, documents of all pieces).

    lengths: (documents,) T at most. Of equal ones, the order of a hash says which goes where.
    """
    by_length = shuffled(lengths, seed)
    # The next document of each length, in by_length.
    n_of = np.bincount(lengths)
    following = (np.cumsum(n_of) - n_of).tolist()
    n_pieces = [sum(k for _, k in content) for _, content in patterns]
    first = np.repeat(n_pieces, [n for n, _ in patterns])
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(first)])
    documents = np.empty(first[-1], np.int64)
    at = 0
    for (n, content), width in zip(patterns, n_pieces):
        block = documents[at : at + n * width].reshape(n, width)
        column = 0
        for length, k in content:
            some = by_length[following[length] : following[length] + n * k]
            block[:, column : column + k] = some.reshape(n, k)
            following[length] += n * k
            column += k
        # The longest is not always the first one, but what may be cut is always the last one.
        if width > 2:
            turned = np.arange(n)[:, None] + np.arange(width - 1)
            block[:, :-1] = np.take_along_axis(block[:, :-1], turned % (width - 1), 1)
        at += n * width
    return first, documents


def shuffled(lengths: np.ndarray, seed: int | None) -> np.ndarray:
    """(documents,) their numbers, by length, and those of one length in the order of a hash."""
    key = int.from_bytes(hashlib.sha256(f"pack {seed}".encode()).digest()[:8], "little")
    # Two rounds of multiplying and shifting mix the number of a document with the key, modulo 2^64.
    h = np.arange(len(lengths), dtype=np.uint64)
    for factor in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93):
        h += np.uint64(key)
        h *= np.uint64(factor)
        h ^= h >> np.uint64(32)
    # The length above, 40 bits of the hash below. A block of 2^24 tokens is far away.
    h >>= np.uint64(24)
    h |= lengths.astype(np.uint64) << np.uint64(40)
    return np.argsort(h, kind="stable")
