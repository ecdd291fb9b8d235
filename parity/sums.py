"""Hypotheses about sums: over too few, over too many, with wrong weights.

parts     what each backward of each rank adds to a parameter's gradient, where it was recorded.
          Where parts add up to A's gradient, forward and backward are right on all ranks, and
          B's gradient is sum c_i part_i: the c_i say what the reduction did.
copies    what several ranks hold in one place. Where they differ, and add up to the right one,
          nobody has added them up.
ratio     each block is a number times the right one.
"""

import math

import torch
from torch import Tensor

from parity.case import Case, Finding
from parity.compare import rms


# ---- parts ---------------------------------------------------------------------------------------
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
        matrix = torch.stack([parts[label][block.where].flatten() for label in labels], 1)
        used = matrix.norm(dim=0) > 0
        some = [label for label, is_used in zip(labels, used.tolist()) if is_used]
        columns = matrix[:, used]
        if columns.shape[1] < 2 or torch.linalg.matrix_rank(columns) < columns.shape[1]:
            continue
        c = torch.linalg.lstsq(columns, block.x.reshape(-1, 1), driver="gelsd").solution.flatten()
        fit = (columns @ c).view(block.x.shape)
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
    import itertools

    return list(itertools.combinations(items, n))


def weighted(case, block, c: dict):
    """What the weights c of the parts say about the reduction."""
    near = {label: round(x, 4) for label, x in c.items()}
    values = sorted(set(near.values()))
    missing = [label for label, x in near.items() if abs(x) < 1e-3]
    kept = [label for label in near if label not in missing]
    if missing and all(abs(near[label] - 1) < 1e-3 for label in kept):
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
                if not alike and case.same(total, block.y, block.gap):
                    ranks = named_ranks([b.rank for b in mine])
                    return along(case, list(axes), f"what {ranks} hold adds up to the right one")
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
    for times in (1, len(pieces)):
        if total and abs(weighted_sum / total * times - right) <= case.tolerance * abs(right):
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
