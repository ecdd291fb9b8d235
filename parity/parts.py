"""A parameter's gradient as a sum of recorded parts: which of them are in it, with which weights?

A part is what one backward of one rank adds to the gradient. Where the parts of all ranks add up to
A's gradient, forward and backward are right everywhere, and B's gradient is sum c_i part_i: the c_i
say what the reduction did.

    1, 0                one rank's part alone: not summed over the axis in which the others differ
    1, 1, 0, 1          one backward is missing
    1/N, 1/N            a mean where the sum is due        N, N, or 2, 1     summed twice
    uneven              a mean of means, or each part clipped by its own norm
"""

import itertools
import math

import torch
from torch import Tensor

from parity.case import Case, Finding
from parity.compare import rms


def by_parts(case: Case) -> Finding | None:
    if case.kind not in ("gradient", "clipped"):
        return None
    parts = parts_of(case)
    if len(parts) < 2:
        return None
    labels = summands(case, parts)
    if labels is None:
        return None
    for block in case.bad:
        # Some of the entries find the weights, all of them confirm them.
        some_of = slice(None, None, 1 + block.x.numel() // 10**5)
        here = {label: parts[label][block.where].flatten() for label in labels}
        matrix = torch.stack([here[label][some_of] for label in labels], 1)
        used = matrix.norm(dim=0) > 0
        some = [label for label, is_used in zip(labels, used.tolist()) if is_used]
        columns = matrix[:, used]
        if columns.shape[1] < 2 or torch.linalg.matrix_rank(columns) < columns.shape[1]:
            continue
        right_hand = block.x.flatten()[some_of].unsqueeze(1)
        c = torch.linalg.lstsq(columns, right_hand, driver="gelsd").solution.flatten()
        fit = sum(x * here[label] for x, label in zip(c, some)).view(block.x.shape)
        if case.same(fit, block.x, block.gap):
            return weighted(case, block, dict(zip(some, c.tolist())))
    return None


def parts_of(case) -> dict[tuple[int, int], Tensor]:
    """(rank, number of its backward in this step) -> what it adds, in the full shape."""
    found = {}
    key = (case.step, "part", case.name)
    for piece in case.b.entries.get(key, []):
        words = piece.part.replace(",", "").split()
        label = (int(words[-3]), int(words[-1]))
        full = torch.zeros(piece.shape, dtype=torch.float64)
        x = piece.load()
        full[piece.where(tuple(x.shape))] = x.double()
        found[label] = full
    return found


def summands(case, parts: dict) -> list | None:
    """Which parts add up to the right gradient: those of all ranks, or of one along some axes."""
    axes = list(case.axes)
    for n_fixed in range(len(axes) + 1):
        for fixed in subsets(axes, n_fixed):
            labels = [
                label for label in parts if all(case.b.coordinates(label[0])[a] == 0 for a in fixed)
            ]
            total = sum(parts[label] for label in labels)
            if rms(total - case.right) <= case.tolerance * rms(case.right):
                return labels
    return None


def subsets(items: list, n: int) -> list[tuple]:

    return list(itertools.combinations(items, n))


def weighted(case, block, c: dict):
    """What the weights c of the parts say about the reduction."""
    near = {label: round(x, 4) for label, x in c.items()}
    values = sorted(set(near.values()))
    missing = [label for label, x in near.items() if abs(x) < 1e-3]
    kept = [label for label in near if label not in missing]
    # Where each rank has a mean of its own, what it has alone counts as often as there are ranks.
    times = {near[label] for label in kept}
    if missing and len(times) == 1 and times <= {1.0, float(len(case.b.ranks))}:
        return left_out(case, block, missing, kept)
    if len(values) == 1:
        return constant(case, values[0], "every part")
    text = ", ".join(f"{x:g} x rank {r}'s backward {i}" for (r, i), x in near.items())
    if missing:
        return None
    if all(abs(x - round(x)) < 1e-3 and x >= 1 for x in values):
        return Finding("summed_twice", f"the gradient is {text}")
    if clipped_parts(case, c):
        return Finding("local_norm", f"each rank's part is clipped by its own norm: {text}")
    if all(x > 0 for x in values):
        return Finding("mean_of_means", f"parts have different weights: {text}")
    return None


def clipped_parts(case: Case, c: dict) -> bool:
    """Are the weights one over the norm of all that each rank adds?"""
    squares = {}
    for (step, kind, name), pieces in case.b.entries.items():
        if step == case.step and kind == "part":
            for piece in pieces:
                words = piece.part.replace(",", "").split()
                label = (int(words[-3]), int(words[-1]))
                square = float(piece.load().double().square().sum())
                squares[label] = squares.get(label, 0.0) + square
    scaled = [c[label] * math.sqrt(squares[label]) for label in c if c[label] < 1 - 1e-6]
    return len(scaled) > 1 and max(scaled) - min(scaled) < 1e-4 * max(scaled)


def left_out(case, block, missing: list, kept: list):
    missing_ranks = {rank for rank, _ in missing}
    kept_ranks = {rank for rank, _ in kept}
    if missing_ranks & kept_ranks or len(case.b.ranks) == 1:
        numbers = sorted({i for _, i in missing})
        who = "every rank" if len(missing_ranks) > 1 else f"rank {min(missing_ranks)}"
        return Finding(
            "micro_batch",
            f"the gradient lacks backward {', '.join(map(str, numbers))} of {who}; the others add"
            " up to it",
        )
    axes = axes_between(case, kept_ranks, missing_ranks)
    sentence = (
        f"rank {block.rank} has what {named_ranks(kept_ranks)} adds alone; with what"
        f" {named_ranks(missing_ranks)} adds it is the right one"
    )
    return along(case, axes, sentence)


def along(case, axes: list[str], sentence: str):
    """Not summed along these axes: a tied or a replicated weight has a name of its own."""
    over = f"not summed over {' x '.join(axes)}: " if axes else ""
    if case.kind in ("gradient", "clipped"):
        if axes == ["pp"]:
            return Finding("half_tied", f"{over}{sentence}")
        if axes in (["tp"], ["sp"]):
            return Finding("sp_partial", f"{over}{sentence}")
    return Finding("not_summed", f"{over}{sentence}")


def axes_between(case, ranks, others) -> list[str]:
    """The axes in which two sets of ranks differ."""
    found = []
    for axis in case.axes:
        a = {case.b.coordinates(rank)[axis] for rank in ranks}
        b = {case.b.coordinates(rank)[axis] for rank in others}
        if a != b or len(a | b) > len(a):
            found.append(axis)
    return found


def named_ranks(ranks) -> str:
    ranks = sorted(ranks)
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def constant(case, ratio: float, who: str):
    """One factor for all: is it a number of ranks or of micro-batches?"""
    if abs(ratio - 1) < 1e-3:
        return None
    n = round(1 / ratio) if 0 < ratio < 1 else round(ratio)
    exact = n >= 2 and min(abs(ratio - n), abs(1 / ratio - n) if ratio else 9) < 1e-3 * n
    if not exact:
        return None
    what = counts(case).get(n)
    if what is None:
        return None
    if ratio < 1:
        return Finding(
            "not_summed",
            f"{who} is 1/{n} of the right one, and there are {what}: a mean where the sum is due,"
            " or copies that nobody added up",
        )
    return Finding("summed_twice", f"{who} is {n} times the right one, and there are {what}")


def counts(case) -> dict[int, str]:
    """Numbers that a sum may have too much or too little of, and what there are so many of."""
    found = {2: "two terms if something is added twice"}
    backwards = {}
    for (step, kind, _), pieces in case.b.entries.items():
        if kind == "part" and step == case.step:
            for piece in pieces:
                words = piece.part.split()
                backwards[piece.rank] = max(backwards.get(piece.rank, 0), int(words[-1]))
    micro = max(backwards.values(), default=1)
    sizes = {**case.axes, "micro-batches": micro}
    sizes = {axis: n for axis, n in sizes.items() if n > 1}
    if not case.axes and len(case.b.ranks) > 1:
        sizes["all"] = len(case.b.ranks)
    for n in range(1, len(sizes) + 1):
        for axes in subsets(list(sizes), n):
            product = math.prod(sizes[axis] for axis in axes)
            words = " x ".join(
                f"{sizes[axis]} {axis}" + ("" if axis == "micro-batches" else " ranks")
                for axis in axes
            )
            found[product] = words if product not in found or n == 1 else found[product]
    return found
