"""Hypotheses about the gradients' norm, and about clipping by it.

norm       of this rank's gradients alone, or with copies counted N times
clipped    by another factor on each rank
"""

import itertools
import math

from parity.case import Case, Finding
from parity.compare import rms


def squares(case, kind: str = "gradient") -> list[tuple]:
    """(rank, name, place, sum of squares) of each piece of B's gradients in this step."""
    found = []
    for (step, k, name), pieces in case.b.entries.items():
        if step == case.step and k == kind:
            for piece in pieces:
                found.append(
                    (piece.rank, name, piece.place, float(piece.load().double().square().sum()))
                )
    return found


def norm(case: Case) -> Finding | None:
    """The norm of what? Of one rank's gradients, of some ranks', with copies counted twice."""
    if case.kind != "norm":
        return None
    pieces = squares(case)
    right = float(case.right)
    for block in case.bad:
        value = float(block.x)
        if near(value, local_norm(pieces, {block.rank})):
            return Finding(
                "local_norm", f"rank {block.rank}'s norm is that of its own gradients alone"
            )
        for axes in some_axes(case):
            ranks = {r for r in case.b.ranks if agree(case, r, block.rank, axes)}
            if near(value, local_norm(pieces, ranks)):
                return Finding(
                    "local_norm", f"the norm is summed over the ranks {sorted(ranks)} alone"
                )
            if near(value, counted_norm(pieces, ranks)):
                return Finding(
                    "summed_twice",
                    f"the norm counts what several of the ranks {sorted(ranks)} hold several times",
                )
        largest = {}
        for rank, name, place, square in pieces:
            largest[name] = max(largest.get(name, 0.0), square)
        if near(value, math.sqrt(sum(largest.values()))):
            return Finding("local_norm", "the norm has one shard of each gradient")
        ratio = value / right
        if abs(ratio**2 - round(ratio**2)) < 1e-6 and round(ratio**2) > 1:
            return Finding(
                "summed_twice", f"the squared norm is {round(ratio**2)} times the right one"
            )
    return None


def near(x: float, y: float) -> bool:
    return y > 0 and abs(x - y) <= 1e-6 * y


def some_axes(case) -> list[tuple]:
    axes = list(case.axes)
    found = []
    for n in range(1, len(axes) + 1):
        found += itertools.combinations(axes, n)
    return found


def agree(case, rank: int, other: int, axes: tuple) -> bool:
    a, b = case.b.coordinates(rank), case.b.coordinates(other)
    return all(a[axis] == b[axis] for axis in a if axis not in axes)


def local_norm(pieces: list, ranks: set) -> float:
    """Each place that these ranks hold counted once."""
    once = {(name, place): s for rank, name, place, s in pieces if rank in ranks}
    return math.sqrt(sum(once.values()))


def counted_norm(pieces: list, ranks: set) -> float:
    return math.sqrt(sum(s for rank, _, _, s in pieces if rank in ranks))


def clipping(case: Case) -> Finding | None:
    """Clipped by the norm of this rank's gradients, or not at all."""
    if case.kind != "clipped":
        return None
    before = case.of(case.a, case.step, "gradient", case.name)
    if before is None or rms(before) == 0:
        return None
    right = float((case.right * before).sum() / before.square().sum())
    pieces = squares(case)
    limit = None
    if right < 1:
        limit = right * local_norm(pieces, set(case.b.ranks))
    for block in case.bad:
        g = before[block.where]
        c = float((block.x * g).sum() / g.square().sum())
        if not case.same(c * g, block.x, block.gap):
            return None
        own = local_norm(pieces, {block.rank})
        if limit is not None and (abs(c * own - limit) < 1e-3 * limit or (c == 1 and own < limit)):
            return Finding(
                "local_norm",
                f"rank {block.rank} clips by {c:.4g}, where {right:.4g} is right: by the norm of"
                " its own gradients",
            )
        one = math.sqrt(float(g.square().sum()))
        if limit is not None and abs(c * one - limit) < 1e-3 * limit:
            return Finding("local_norm", f"it is clipped by its own norm, by {c:.4g}")
        if limit is None and abs(c * own - round(c * own, 3)) < 1e-4 and c < 1:
            return Finding("local_norm", f"rank {block.rank} clips by {c:.4g}, where nothing is")
    return None


HYPOTHESES = (norm, clipping)
