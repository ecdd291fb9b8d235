"""Hypotheses about right numbers in a wrong place or of a wrong time.

stale      what A has of an earlier step
order      each slice of B along one dimension is some slice of A: which one says what happened
rotary     q and k after their rotation: pairs of the right length that point elsewhere
missing    samples that nobody has, or that have no gradient
"""

import re

import torch
from torch import Tensor

from parity.case import Case, Finding
from parity.compare import rms
from parity.rotary import rotary

# Words by which a module or a weight is known to belong to attention.
ATTENTION = re.compile(
    r"(^|[._])(attn|attention|heads|attended|c_attn|qkv|w?[qkvo]|query|key|value)($|[._])"
)


# ---- missing -------------------------------------------------------------------------------------
def incomplete(case: Case) -> Finding | None:
    """Entries of the tensor that no rank has."""
    wrong = case.b.entries[case.key]
    if any(piece.shape != tuple(case.right.shape) for piece in wrong):
        return None
    covered = torch.zeros(case.right.shape, dtype=torch.bool)
    for piece in wrong:
        covered[piece.where(tuple(piece.load().shape))] = True
    if covered.ndim < 2:
        return None
    rows = covered.flatten(1).any(1)
    lacking = (~rows).nonzero().flatten().tolist()
    if lacking and case.kind in ("input", "output", "output_gradient"):
        return Finding("micro_batch", f"nobody computes the samples {lacking} of the batch")
    return None


def other_samples(case: Case) -> Finding | None:
    """Inputs that are the inputs of other rows."""
    if case.kind != "input":
        return None
    return Finding("wrong_samples", f"{case.ranks_of(case.bad)} is given other token ids")


def rows_without_gradient(case: Case) -> Finding | None:
    """Rows of the batch whose gradient is zero."""
    if case.kind != "output_gradient" or case.right.ndim < 2:
        return None
    lacking = []
    for i, (x, y) in enumerate(zip(case.wrong, case.right)):
        if rms(x - y) <= case.tolerance * rms(y):
            continue
        if rms(x) != 0 or rms(y) == 0:
            return None
        lacking.append(i)
    if lacking:
        return Finding("micro_batch", f"the samples {lacking} of the batch have no gradient")
    return None


# ---- stale ---------------------------------------------------------------------------------------
def stale(case: Case) -> Finding | None:
    """B's blocks are what A had some steps before."""
    if case.kind == "input":
        return None
    for step in range(case.step - 1, -1, -1):
        earlier = case.of(case.a, step, case.kind, case.name)
        if earlier is None:
            continue
        if all(case.same(earlier[b.where], b.x, b.gap) for b in case.bad):
            when = f"after step {step}" if case.kind == "weight" else f"of step {step}"
            return Finding("stale", f"{case.ranks_of(case.bad)} still has the numbers {when}")
        if case.kind in ("gradient", "clipped"):
            if all(case.same(earlier[b.where] + b.y, b.x, b.gap) for b in case.bad):
                return Finding(
                    "stale", f"the gradient of step {step} is still in it: it was not cleared"
                )
    return stale_weight(case)


def stale_weight(case: Case) -> Finding | None:
    """A linear or embedding module whose output is that of an earlier step's weight."""
    if case.kind != "output" or case.step < 2 or case.right.ndim < 3:
        return None
    name = f"{case.name}.weight"
    now = case.of(case.a, case.step - 1, "weight", name)
    if now is None or now.ndim != 2:
        return None
    bias = f"{case.name}.bias"
    has_bias = (case.step - 1, "weight", bias) in case.a.entries
    for x in inputs_of(case, now):
        if not case.same(
            applied(x, now, case, bias if has_bias else None, case.step - 1), case.right, 9e9
        ):
            continue
        for step in range(case.step - 2, -1, -1):
            before = case.of(case.a, step, "weight", name)
            y = applied(x, before, case, bias if has_bias else None, step)
            if all(case.same(y[b.where], b.x, b.gap) for b in case.bad):
                return Finding(
                    "stale",
                    f"{case.ranks_of(case.bad)} uses the weight as it was after step {step}",
                )
    return None


def applied(x: Tensor, weight: Tensor, case, bias: str | None, step: int) -> Tensor:
    if not x.is_floating_point():
        return weight[x.clamp(min=0)]
    y = x @ weight.mT
    if bias is not None:
        y = y + case.a.whole((step, "weight", bias))
    return y


def inputs_of(case, weight: Tensor):
    """A's tensors from which this module may have been computed."""
    order = case.comparison.order
    at = order.index(case.key)
    for key in reversed(order[:at]):
        if key[0] != case.step or key[1] not in ("output", "input"):
            break
        x = case.a.whole(key)
        if x.shape[:2] == case.right.shape[:2]:
            is_ids = key[1] == "input" and int(x.max()) < len(weight)
            if is_ids or (x.ndim == 3 and x.shape[-1] == weight.shape[1]):
                yield x


# ---- order ---------------------------------------------------------------------------------------
def order(case: Case) -> Finding | None:
    """Every slice along one dimension is a slice of A, some at other places."""
    x, y = case.wrong, case.right
    if case.kind in ("norm", "input") or x.shape != y.shape or not x.isfinite().all():
        return None
    for dim in range(x.ndim):
        found = mapping(x.movedim(dim, 0), y.movedim(dim, 0), case.tolerance)
        if found is not None and found != list(range(len(found))):
            return described(case, dim, found)
    return shuffled(case, x, y)


def mapping(x: Tensor, y: Tensor, tolerance: float) -> list[int] | None:
    """For each slice of x the number of the slice of y that it is; None where one is none.

    A slice that equals several (zeros, say) is taken to be its own where that fits.
    """
    n = len(x)
    if n < 2 or n > 100000:
        return None
    x = x.reshape(n, -1).double()
    y = y.reshape(n, -1).double()
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(x.shape[1], 2, generator=generator, dtype=torch.float64) / x.shape[1] ** 0.5
    size = rms(y)
    if size == 0:
        return None
    fx, fy = x @ r, y @ r
    values, where = fy[:, 0].sort()
    found = []
    for i in range(n):
        own = rms(x[i] - y[i]) <= tolerance * size
        if own:
            found.append(i)
            continue
        near = 10 * tolerance * size
        low = int(torch.searchsorted(values, fx[i, 0] - near))
        high = int(torch.searchsorted(values, fx[i, 0] + near))
        match = None
        for j in where[low : min(high, low + 50)].tolist():
            if rms(x[i] - y[j]) <= tolerance * max(rms(y[j]), 1e-3 * size) and rms(y[j]) > 0:
                match = j
                break
        if match is None:
            return None
        found.append(match)
    return found


def shuffled(case, x: Tensor, y: Tensor):
    """The same values at other places, with no dimension that tells how."""
    if x.numel() < 16:
        return None
    a = x.flatten().sort().values
    b = y.flatten().sort().values
    if case.same(a, b, rms(x - y)) and rms(x - y) > 100 * rms(a - b):
        return Finding("wrong_order", "it has the right values at other places")
    return None


def described(case, dim: int, m: list[int]):
    n = len(m)
    moved = [i for i in range(n) if m[i] != i]
    text = f"along dimension {dim}, {spans(m)}"
    shards = shard_sizes(case, dim)
    is_activation = case.kind in ("output", "output_gradient")
    if is_activation and dim == 0 and case.right.ndim > 2:
        return Finding("wrong_samples", f"samples of the batch have changed places: {text}")
    one_to_one = sorted(m) == list(range(n))
    token_dim = is_activation and (dim == 1 if case.right.ndim == 3 else dim == 2)
    token_dim = token_dim or (is_activation and case.right.ndim == 2 and dim == 0)
    run = run_length(m)
    by_shards = one_to_one and any(run % size == 0 for size in shards)
    if token_dim:
        if by_shards:
            return Finding("wrong_order", f"shards of the sequence have changed places: {text}")
        return Finding("position", f"tokens have what belongs to others: {text}")
    if by_shards:
        return Finding("wrong_order", f"the shards of the ranks have changed places: {text}")
    if not one_to_one:
        return Finding("wrong_order", f"{len(moved)} of {n} slices are copies of others: {text}")
    group = group_size(m)
    if group < n or case.right.ndim == 4:
        within = m[:group]
        same = all(
            [j - start for j in m[start : start + group]] == within for start in range(0, n, group)
        )
        last_of_heads = case.right.ndim == 4 and dim == 3
        if same and group % 2 == 0 and (is_half_swap(within) or transposed(within)):
            if group < n or last_of_heads:
                return Finding(
                    "rotary", f"within each head of {group} its halves have changed: {text}"
                )
    if case.right.ndim == 4 and dim == 1:
        return Finding("heads", f"heads have changed places: {text}")
    # Permuted heads would be in the outputs and weights too, before any gradient.
    is_first = case.kind in ("output", "weight")
    if is_first and ATTENTION.search(case.name) and (run > 1 or transposed(m)):
        grid = transposed(m)
        what = f"as in a transposed {grid[0]} x {grid[1]} grid" if grid else f"in blocks of {run}"
        return Finding("heads", f"slices have changed places {what}: {text}")
    return Finding("wrong_order", f"blocks of {run} have changed places: {text}")


def shard_sizes(case, dim: int) -> set[int]:
    """How long the shards of B are along this dimension, where it is divided."""
    found = set()
    for block in case.blocks:
        size = block.x.shape[dim]
        if size < case.right.shape[dim]:
            found.add(size)
    for axis, n in case.axes.items():
        if axis in ("tp", "cp", "sp") and case.right.shape[dim] % n == 0 and case.kind != "weight":
            if dim == 1:
                found.add(case.right.shape[dim] // n)
    return found


def run_length(m: list[int]) -> int:
    """The largest block size in which the mapping moves slices."""
    n = len(m)
    for size in range(n // 2, 0, -1):
        if n % size:
            continue
        blocks = [m[i : i + size] for i in range(0, n, size)]
        if all(b[0] % size == 0 and b == list(range(b[0], b[0] + size)) for b in blocks):
            return size
    return 1


def group_size(m: list[int]) -> int:
    """The smallest size of aligned groups that the mapping does not leave."""
    n = len(m)
    for size in range(1, n + 1):
        if n % size == 0 and all(j // size == i // size for i, j in enumerate(m)):
            return size
    return n


def is_half_swap(m: list[int]) -> bool:
    half = len(m) // 2
    return m == list(range(half, 2 * half)) + list(range(half))


def transposed(m: list[int]) -> tuple[int, int] | None:
    """(p, q) where m is what transposing a p x q grid does."""
    n = len(m)
    for p in range(2, n):
        if n % p == 0 and n // p > 1:
            q = n // p
            if m == [(i % p) * q + i // p for i in range(n)]:
                return p, q
    return None


def spans(m: list[int]) -> str:
    """The mapping in words: "[0..3] has [4..7]", at most three."""
    runs = []
    for i, j in enumerate(m):
        if runs and j == runs[-1][1] + i - runs[-1][0]:
            runs[-1][2] += 1
        else:
            runs.append([i, j, 1])
    runs = [run for run in runs if run[0] != run[1]]
    words = [f"[{i}..{i + n - 1}] has [{j}..{j + n - 1}]" for i, j, n in runs[:3]]
    return ", ".join(words) + (", ..." if len(runs) > 3 else "")


HYPOTHESES = (other_samples, rows_without_gradient, stale, order, rotary)
