"""Hypotheses about the optimizer's step.

    u = w_after - w_before = -lr (decay w + direction)

Another decay, another factor, a direction that was computed from a shard.
"""

import math

from torch import Tensor

from parity.case import Case, Finding
from parity.compare import rms


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


HYPOTHESES = (decay, factor, shard_as_matrix)
