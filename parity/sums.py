"""Hypotheses about sums: over too few, over too many, with wrong weights.

parts     B's gradient as a sum of recorded parts: parity/parts.py
copies    what several ranks hold in one place: where they differ and add up to the right one,
          nobody has added them up
ratio     each block is a number times the right one
tied      an embedding's gradient without the head's part, or the head's without it
bias      an output with its module's bias several times
losses    means over each rank's own tokens
"""

import math

import torch

from parity.case import Case, Finding
from parity.compare import rms
from parity.parts import along, by_parts, constant, named_ranks, subsets


# ---- copies --------------------------------------------------------------------------------------
def by_copies(case: Case) -> Finding | None:
    """Copies that differ between ranks, and add up to the right one along an axis."""
    if case.kind in ("norm", "input"):
        return None
    by_place = {}
    for block in case.blocks:
        by_place.setdefault(block.piece.place, []).append(block)
    for blocks in by_place.values():
        wrong = [block for block in blocks if block in case.bad]
        if len(blocks) < 2 or not wrong:
            continue
        block = wrong[0]
        for n in range(len(case.axes), 0, -1):
            for axes in subsets(list(case.axes), n):
                mine = [b for b in blocks if differs_only(case, b.rank, block.rank, axes)]
                expected = math.prod(case.axes[axis] for axis in axes)
                if len(mine) < 2 or len(mine) > expected:
                    continue
                total = sum(b.x for b in mine)
                alike = all(rms(b.x - mine[0].x) <= case.tolerance * rms(b.x) for b in mine)
                if alike:
                    continue
                ranks = named_ranks([b.rank for b in mine])
                if case.same(total, block.y, block.gap):
                    return along(case, list(axes), f"what {ranks} hold adds up to the right one")
                if case.same(total / len(mine), block.y, block.gap):
                    return along(case, list(axes), f"the mean of what {ranks} hold is right")
    return None


def differs_only(case, rank: int, other: int, axes) -> bool:
    a = case.b.coordinates(rank)
    b = case.b.coordinates(other)
    return all(a[axis] == b[axis] for axis in a if axis not in axes)


# ---- ratio ---------------------------------------------------------------------------------------
def by_ratio(case: Case) -> Finding | None:
    """Each block that differs is a number times the right one."""
    if case.kind in ("norm", "input") or (case.kind == "weight" and case.step > 0):
        return None
    ratios = {}
    for block in case.bad:
        size = float(block.y.square().sum())
        if size == 0:
            return None
        ratio = float((block.x * block.y).sum()) / size
        if not case.same(ratio * block.y, block.x, block.gap):
            return None
        if block.x.numel() == 1 and abs(ratio * count(ratio) - round(ratio * count(ratio))) > 1e-9:
            return None
        ratios.setdefault(round(ratio, 5), []).append(block)
    if len(ratios) == 1:
        ratio, blocks = next(iter(ratios.items()))
        return constant(case, ratio, f"on {case.ranks_of(blocks)} all")
    return uneven(case, ratios)


def count(ratio: float) -> int:
    """N where the ratio is near 1/N, else 1."""
    return max(1, round(1 / ratio)) if 0 < ratio < 1 else 1


def uneven(case, ratios: dict):
    """Different factors: are they one over the tokens that each rank's loss counts?"""
    if case.kind not in ("output_gradient", "gradient", "output"):
        return None
    tokens = tokens_of(case)
    products = []
    for ratio, blocks in ratios.items():
        for block in blocks:
            n = tokens.get((block.rank, first_of(block.piece.index[0])))
            if n:
                products.append(ratio * n)
    text = ", ".join(
        f"{ratio:.4g} on {named_ranks({b.rank for b in blocks})}"
        for ratio, blocks in ratios.items()
    )
    if len(products) > 1 and max(products) - min(products) < 1e-3 * max(products):
        return Finding(
            "mean_of_means",
            f"the factors are one over the tokens that each loss counts: {text}",
        )
    return None


def tokens_of(case: Case) -> dict[tuple[int, int], int]:
    """(rank, first sample) of each forward -> how many of its targets count."""
    found = {}
    for (step, kind, _), pieces in case.b.entries.items():
        if kind == "input" and step == case.step:
            for piece in pieces:
                x = piece.load()
                label = (piece.rank, first_of(piece.index[0]))
                found[label] = min(found.get(label, x.numel()), int((x >= 0).sum()))
    return found


def first_of(index) -> int:
    return index if isinstance(index, int) else index[0]


def mean_losses(case: Case) -> Finding | None:
    """The loss: weighted by the tokens of each forward, its summands give the right one."""
    if case.kind != "output" or case.right.ndim or len(case.b.entries[case.key]) < 2:
        return None
    tokens = tokens_of(case)
    weighted_sum = 0.0
    total = 0
    pieces = case.b.entries[case.key]
    for piece in pieces:
        words = piece.part.replace(",", "").split()
        n = tokens.get((piece.rank, int(words[1]))) if len(words) > 1 else None
        if n is None:
            return None
        weighted_sum += n * float(piece.load())
        total += n
    # The summands are means, and their sum is a mean, or they are divided by their number.
    right = float(case.right)
    if total == 0:
        return None
    for times in (1, len(pieces)):
        off = abs(weighted_sum / total * times - right)
        if off <= case.tolerance * abs(right) and off <= 0.05 * abs(float(case.wrong) - right):
            return Finding(
                "mean_of_means",
                f"each of {len(pieces)} losses is a mean over its own tokens; weighted by their"
                " tokens they give the right one",
            )
    return None


# ---- tied weights --------------------------------------------------------------------------------
def tied(case: Case) -> Finding | None:
    """An embedding's gradient that lacks what its use as the head adds, or the other way round."""
    if case.kind not in ("gradient", "clipped") or case.right.ndim != 2:
        return None
    key = next((k for k in case.a.entries if k[0] == case.step and k[1] == "input"), None)
    if key is None:
        return None
    tokens = case.a.whole(key)
    rows = torch.zeros(case.right.shape[0], dtype=torch.bool)
    if int(tokens.max()) >= len(rows):
        return None
    rows[tokens[tokens >= 0]] = True
    x, y = case.wrong, case.right
    if rows.all() or rms(y[~rows]) == 0 or x.shape != y.shape:
        return None
    from_output = case.of(case.a, case.step, "output_gradient", case.name.removesuffix(".weight"))
    if from_output is None or from_output.shape != (*tokens.shape, y.shape[1]):
        return None
    embedding = torch.zeros_like(y).index_add_(0, tokens.flatten(), from_output.flatten(0, 1))
    gap = rms(x - y)
    if case.same(embedding, x, gap):
        return Finding("half_tied", "it is the embedding's gradient; the head's part is missing")
    if case.same(y - embedding, x, gap):
        return Finding("half_tied", "it is the head's gradient; the embedding's part is missing")
    return None


# ---- a bias that counts N times ------------------------------------------------------------------
def bias(case: Case) -> Finding | None:
    """A module's output with its own bias too often: once for each rank of a sum."""
    if case.kind != "output":
        return None
    b = case.of(case.a, case.step - 1, "weight", f"{case.name}.bias")
    if b is None or b.shape[0] != case.right.shape[-1]:
        return None
    off = case.wrong - case.right
    if not off.isfinite().all() or rms(b) == 0:
        return None
    times = float((off.flatten(0, -2).mean(0) * b).sum() / b.square().sum())
    if case.same(times * b.expand_as(off), off, rms(off)) and abs(times - round(times)) < 1e-3:
        if times > 0:
            n = round(times) + 1
            return Finding("summed_twice", f"its bias is in it {n} times: it is added before a sum")
    return None


HYPOTHESES = (tied, mean_losses, by_copies, by_parts, bias, by_ratio)
