"""The first difference as hypotheses see it: B's pieces beside what A has in their places."""

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from parity.compare import TOLERANCE, Comparison, Difference, rms
from parity.recording import Key, Piece


@dataclass
class Finding:
    """cause: a key of CAUSES in parity/diagnose.py; sentence: what was found, for people."""

    cause: str
    sentence: str


class Block:
    """A piece of B and what A has in its place, both in float64."""

    def __init__(self, piece: Piece, x: Tensor, a: Tensor):
        self.piece = piece
        self.rank = piece.rank
        self.dtype = x.dtype
        self.where = piece.where(tuple(x.shape))
        self.x = x.double()
        self.y = a[self.where].double()
        self.gap = rms(self.x - self.y)


class Case:
    """The first difference, and what hypotheses need to know about it."""

    def __init__(self, comparison: Comparison, difference: Difference):
        self.comparison = comparison
        self.a = comparison.a
        self.b = comparison.b
        self.difference = difference
        self.key = difference.key
        self.step, self.kind, self.name = difference.key
        self.right = self.a.whole(self.key)
        self.tolerance = 10 * TOLERANCE[self.a.coarsest][0]

    @cached_property
    def blocks(self) -> list[Block]:
        return [Block(piece, x, self.right) for piece, x in self.b.blocks(self.key)]

    @cached_property
    def bad(self) -> list[Block]:
        """The blocks that differ."""
        return [block for block in self.blocks if block.piece in self.difference.pieces]

    @cached_property
    def wrong(self) -> Tensor:
        """B's full tensor."""
        return self.b.whole(self.key)

    @property
    def axes(self) -> dict[str, int]:
        """Axes of B with more than one rank."""
        return {axis: n for axis, (n, _) in self.b.axes.items() if n > 1}

    def same(self, x: Tensor, y: Tensor, gap: float) -> bool:
        """Is a hypothesis, x, the tensor y? gap: how far y is from the right one."""
        size = rms(y)
        if x.shape != y.shape or size == 0 or not math.isfinite(gap):
            return False
        off = rms(x - y)
        return off <= self.tolerance * size and off <= 0.05 * gap

    def of(self, recording, step: int, kind: str, name: str) -> Tensor | None:
        key: Key = (step, kind, name)
        return recording.whole(key) if key in recording.entries else None

    def ranks_of(self, blocks: list[Block]) -> str:
        ranks = sorted({block.rank for block in blocks})
        if len(ranks) == len(self.b.ranks):
            return "every rank" if len(ranks) > 1 else "the only rank"
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
