"""Hypotheses about what comes after backward: the norm, clipping, the optimizer's step.

norm       of this rank's gradients alone, or with copies counted N times
clipped    by another factor on each rank
weight     the step u = w_after - w_before = -lr (decay w + direction): another decay, another
           factor, a direction that was computed from a shard
"""

import itertools
import math

from torch import Tensor

from parity.case import Case, Finding
from parity.compare import rms


# ---- norm and clipping ---------------------------------------------------------------------------
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


# ---- the step ------------------------------------------------------------------------------------
class Step:
    """One block's step, right and wrong."""

    def __init__(self, case, block):
        before = case.a.whole((case.step - 1, "weight", case.name))
        self.w = before[block.where]
        self.right = block.y - self.w
        self.wrong = block.x - self.w
        self.gap = block.gap
        self.group = group_of(case.a, case.step, case.name) or group_of(
            case.b, case.step, case.name
        )
        self.b_group = group_of(case.b, case.step, case.name) or self.group
        self.lr = self.group.get("lr", 0.0)
        self.decay = self.lr * (self.group.get("weight_decay") or 0.0)
        # What the step is without its decay.
        self.direction = self.right + self.decay * self.w


def group_of(recording, step: int, name: str) -> dict:
    groups = recording.groups.get(step, [])
    for group in groups:
        if name in (group.get("names") or []):
            return group
    return groups[0] if len(groups) == 1 else {}


def steps(case) -> list:
    if case.kind != "weight" or case.step == 0:
        return []
    if (case.step - 1, "weight", case.name) not in case.a.entries:
        return []
    return [(block, Step(case, block)) for block in case.bad]


def fits(x: Tensor, y: Tensor, gap: float, tolerance: float = 1e-5) -> bool:
    """Steps are small beside weights, whose rounding is in them."""
    return rms(x - y) <= 0.02 * gap and rms(x - y) <= max(tolerance * rms(y), 0.0) + 0.001 * gap


def decay(case: Case) -> Finding | None:
    """The two steps differ by a multiple of the weight itself."""
    for block, s in steps(case):
        size = rms(s.w)
        if size == 0:
            continue
        d = s.wrong - s.right
        k = float((d * s.w).sum() / s.w.square().sum())
        if fits(k * s.w, d, s.gap) and k != 0:
            if s.decay:
                times = round(1 - k / s.decay, 6) + 0.0
                return Finding(
                    "weight_decay",
                    f"the step decays the weight by {times:.4g} times lr x weight_decay",
                )
            return Finding("weight_decay", f"the step adds {k:.3g} times the weight")
        late = -s.decay * s.direction
        if s.decay and fits(late, d, s.gap, 1e-3):
            return Finding("weight_decay", "the weight decays after its update, not before")
    return None


def factor(case: Case) -> Finding | None:
    """The step is a number times the right one, but for its decay."""
    ratios = []
    for _, s in steps(case):
        wrong = s.wrong + s.decay * s.w
        size = float(s.direction.square().sum())
        if size == 0:
            return None
        c = float((wrong * s.direction).sum()) / size
        if not fits(c * s.direction, wrong, s.gap, 1e-3):
            # The decay too is multiplied, by another learning rate.
            c = float((s.wrong * s.right).sum()) / float(s.right.square().sum())
            if not fits(c * s.right, s.wrong, s.gap, 1e-3):
                return None
        ratios.append(c)
    if not ratios:
        return None
    if max(ratios) - min(ratios) > 1e-3 * abs(max(ratios)):
        if len({b.piece.place for b in case.bad}) > 1:
            text = ", ".join(f"{c:.4g}" for c in ratios)
            return Finding(
                "shard_as_matrix", f"the step of each shard has a factor of its own: {text}"
            )
        return None
    return named_factor(case, steps(case)[0][1], sum(ratios) / len(ratios))


def named_factor(case, s: Step, c: float):
    if abs(c) < 1e-6:
        return Finding("stale", "the weight is not updated in this step")
    b_lr = s.b_group.get("lr")
    if s.lr and b_lr and abs(b_lr / s.lr - c) < 1e-3 * abs(c) and b_lr != s.lr:
        return Finding("learning_rate", f"lr is {b_lr:g}, not {s.lr:g}")
    for what, ratio in bias_corrections(s.group, case.step).items():
        if abs(ratio - c) < 2e-3 * abs(ratio) and abs(ratio - 1) > 5e-3:
            return Finding("bias_correction", f"the step is {c:.4g} times the right one: {what}")
    for other in (case.step - 1, case.step + 1):
        group = group_of(case.a, other, case.name)
        if group.get("lr") and s.lr and abs(group["lr"] / s.lr - c) < 1e-3 * c and c != 1:
            return Finding("learning_rate", f"the step has the learning rate of step {other}")
    return None


def bias_corrections(group: dict, t: int) -> dict[str, float]:
    """What wrong step counts make of Adam's step, as factors."""
    betas = group.get("betas")
    if not betas:
        return {}
    b1, b2 = betas

    def size(t1: int | None, t2: int | None) -> float:
        """The step is proportional to it: its corrections for step counts t1 and t2."""
        first = 1.0 if t1 is None else 1 - b1**t1
        second = 1.0 if t2 is None else math.sqrt(1 - b2**t2)
        return second / first

    right = size(t, t)
    found = {}
    for other in (t + 1, t - 1):
        if other > 0:
            word = "bias correction of step"
            found[f"{word} {other} in step {t}"] = size(other, other) / right
            found[f"{word} {other} in step {t}, of the first moment"] = size(other, t) / right
            found[f"{word} {other} in step {t}, of the second moment"] = size(t, other) / right
    found["no bias correction"] = size(None, None) / right
    found["no bias correction of the first moment"] = size(None, t) / right
    found["no bias correction of the second moment"] = size(t, None) / right
    return found


def shard_as_matrix(case: Case) -> Finding | None:
    """The shard's step has the singular vectors of the shard's gradient, not of the full one's.

    A step made of whole matrices (Muon, Shampoo) is f(G G^T) G: U G^T is symmetric. B's is so for
    the shards, A's for the full matrix alone.
    """
    found = steps(case)
    if not found or case.right.ndim != 2:
        return None
    g = case.of(case.a, case.step, "clipped", case.name)
    if g is None:
        g = case.of(case.a, case.step, "gradient", case.name)
    if g is None or rms(g) == 0:
        return None
    # Momentum mixes older gradients in.
    if case.step > 1:
        return None
    for block, s in found:
        if block.x.shape == case.right.shape or min(block.x.shape) < 2:
            return None
        mine = g[block.where]
        wrong = asymmetry(s.wrong + s.decay * s.w, mine)
        right = asymmetry(s.direction, mine)
        if wrong > 1e-3 or right < 100 * wrong:
            return None
    block = found[0][0]
    return Finding(
        "shard_as_matrix",
        f"each rank's {list(block.x.shape)} of {list(case.right.shape)} is stepped as a matrix of"
        " its own: its step has the singular vectors of the shard's gradient",
    )


def asymmetry(u: Tensor, g: Tensor) -> float:
    """How far u g^T and u^T g are from symmetric: 0 where u and g share singular vectors."""
    left = u @ g.mT
    right = u.mT @ g
    a = rms(left - left.mT) / max(rms(left), 1e-300)
    b = rms(right - right.mT) / max(rms(right), 1e-300)
    return max(a, b)


FIRST = (norm, clipping)
HYPOTHESES = (decay, factor, shard_as_matrix)
