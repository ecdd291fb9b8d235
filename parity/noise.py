"""Hypotheses about chance: another dtype, masks and weights drawn anew, the size of rounding."""

import torch
from torch import Tensor

from parity.case import Case, Finding
from parity.compare import TOLERANCE, rms

NARROW = (torch.bfloat16, torch.float16, torch.float32)
WORD = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# The largest relative error of rounding once.
ROUNDOFF = {"bf16": 2.0**-8, "fp16 or tf32": 2.0**-11, "fp32": 2.0**-24}
# The rms of rounding once to each format, relative, and what two or three roundings make of it.
BANDS = {
    "bf16": (5e-4, 2e-2),
    "tf32 or fp16": (6e-5, 5e-4),
    "fp32": (3e-9, 3e-7),
}


def representable(case: Case) -> Finding | None:
    """Are B's numbers numbers of a narrower format, and A's not?"""
    if case.kind not in ("output", "output_gradient", "gradient", "clipped", "weight"):
        return None
    for dtype in NARROW:
        narrow = all(torch.equal(b.x.to(dtype).double(), b.x) for b in case.bad)
        wide = not any(torch.equal(b.y.to(dtype).double(), b.y) for b in case.bad)
        rounded = all(b.gap <= 20 * rms(b.y.to(dtype).double() - b.y) for b in case.bad)
        if narrow and wide and rounded and min(b.x.numel() for b in case.bad) > 1:
            where = case.ranks_of(case.bad)
            return Finding(
                "low_precision",
                f"on {where} the numbers are {WORD[dtype]} numbers, and A's are not",
            )
    return None


def drawn_masks(case: Case) -> Finding | None:
    """Dropout: zeros at other places, and where neither has one they agree."""
    if case.kind not in ("output", "output_gradient"):
        return None
    for b in case.bad:
        zero_x = b.x == 0
        zero_y = b.y == 0
        share_x = float(zero_x.double().mean())
        share_y = float(zero_y.double().mean())
        # A share that is zero in one and not in the other is no mask but a missing part.
        if not (0.005 < share_x < 0.95 and 0.005 < share_y < 0.95):
            return None
        if not 0.5 < share_x / share_y < 2 or float((zero_x != zero_y).double().mean()) < 0.003:
            return None
        both = ~zero_x & ~zero_y
        if not both.any() or rms((b.x - b.y)[both]) > case.tolerance * rms(b.y[both]):
            return None
        # Zeros by rows or samples are no mask: they are parts that are missing.
        by_row = zero_x.flatten(0, -2).all(-1)
        if by_row.any():
            return None
    return Finding(
        "random", f"on {case.ranks_of(case.bad)} other entries are dropped; the rest agrees"
    )


def drawn_weights(case: Case) -> Finding | None:
    """Initial weights of the right size that have nothing to do with the right ones."""
    if case.kind != "weight" or case.step != 0:
        return None
    for b in case.bad:
        if b.x.numel() < 32 or b.x.std() == 0 or b.y.std() == 0:
            return None
        if not 0.7 < float(b.x.std() / b.y.std()) < 1.4:
            return None
        if abs(correlation(b.x, b.y)) > 6 / b.x.numel() ** 0.5:
            return None
        if rms(b.x.flatten().sort().values - b.y.flatten().sort().values) < 1e-9 * rms(b.y):
            return None  # the same numbers elsewhere
    return Finding(
        "random",
        f"on {case.ranks_of(case.bad)} the weights are as large, but others: drawn in another"
        " state of the generator",
    )


def rounded_once(case: Case) -> Finding | None:
    """Each entry off by its own rounding: what was added up, sent or stored was narrow."""
    if case.kind not in ("output", "output_gradient", "gradient", "clipped"):
        return None
    off = []
    for b in case.bad:
        if abs(correlation(b.x - b.y, b.y)) > 0.3 or has_pattern((b.x - b.y).sign()):
            return None
        used = b.y.abs() > 1e-6 * rms(b.y)
        off.append(((b.x - b.y)[used] / b.y[used]).flatten())
    off = torch.cat(off)
    if off.numel() < 16 or abs(float(off.mean())) > 0.4 * rms(off):
        return None
    size = off.abs()[:: 1 + off.numel() // 10**6]
    for word, u in ROUNDOFF.items():
        middle = float(size[size > 0].median()) if (size > 0).any() else 0.0
        # Sums of rounded numbers are off by more where they cancel.
        if u / 12 < middle < 1.5 * u and float(size.quantile(0.95)) < 5 * u:
            return Finding(
                "low_precision",
                f"on {case.ranks_of(case.bad)} the entries are off by {middle:.0e} of themselves,"
                f" as what was rounded to {word}",
            )
    return None


def precision(case: Case) -> Finding | None:
    """A difference that looks like rounding, of a size that the dtype does not explain."""
    if case.kind not in ("output", "output_gradient", "gradient", "clipped"):
        return None
    blocks = [b for b in case.bad if b.x.numel() > 1]
    if not blocks or not all(looks_random(b.x - b.y, b.y) for b in blocks):
        return None
    size = max(b.gap / max(rms(b.y), 1e-300) for b in blocks)
    for word, (low, high) in BANDS.items():
        if low <= size <= high:
            return Finding(
                "low_precision",
                f"on {case.ranks_of(case.bad)} the difference has no pattern and the size of"
                f" {word}'s rounding ({size:.0e} of the tensor)",
            )
    return None


def rounding(case: Case) -> Finding | None:
    """Has the difference grown to the bound in small steps, from that of the modules before?"""
    bound = TOLERANCE[case.a.coarsest][0]
    if case.kind not in ("output", "output_gradient") or case.difference.error > 30 * bound:
        return None
    order = case.comparison.order
    at = order.index(case.key)
    errors = [case.comparison.errors.get(key, 0.0) for key in order[max(0, at - 12) : at]]
    errors = [e for e in errors if e > 0]
    if len(errors) < 6 or errors[-1] < bound / 30:
        return None
    grows = all(after < 6 * max(errors[: i + 1]) for i, after in enumerate(errors[1:]))
    if grows and all(looks_random(b.x - b.y, b.y) for b in case.bad):
        return Finding(
            "rounding",
            "the difference grows from module to module up to the bound: no fault so far; compare"
            " in float64 to see what comes after",
        )
    return None


def correlation(x: Tensor, y: Tensor) -> float:
    x = x.flatten() - x.mean()
    y = y.flatten() - y.mean()
    return float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-300))


def looks_random(e: Tensor, y: Tensor) -> bool:
    """No outliers, nothing in common with the tensor itself, no pattern in rows or columns."""
    size = rms(e)
    if size == 0 or e.numel() < 16:
        return False
    if float(e.abs().max()) > 12 * size or abs(correlation(e, y)) > 0.3:
        return False
    return not has_pattern(e) and not has_pattern(e.sign())


def has_pattern(e: Tensor) -> bool:
    """Do rows or columns have means that chance does not give?"""
    if e.ndim < 2:
        return False
    size = rms(e)
    rows = e.flatten(0, -2)
    by_column = rms(rows.mean(0)) / size * rows.shape[0] ** 0.5
    by_row = rms(rows.mean(1)) / size * rows.shape[1] ** 0.5
    return by_column > 2.5 or by_row > 2.5


EXACT = (representable, drawn_masks)
LAST = (drawn_weights, rounding, rounded_once, precision)
