"""Hypotheses about q and k after their rotation by positions: which rotation was it?

A pair z = (x_i, x_{i + D/2}) of a head is turned by e^{i f_i p} at position p. Where B's pairs are
as long as A's, each hypothesis turns A's back and again, otherwise.
"""

import torch
from torch import Tensor

from parity.case import Case, Finding
from parity.compare import rms

BASES = (10000.0, 500000.0, 1000000.0)  # of the frequencies f_i = base^(-2i/D)


def rotary(case: Case) -> Finding | None:
    """q or k (B, H, T, D) after the rotation by their positions: which rotation was it?"""
    x, y = case.wrong, case.right
    if case.kind != "output" or x.ndim != 4 or x.shape != y.shape or x.shape[3] % 2:
        return None
    a, b = as_complex(x), as_complex(y)  # (B, H, T, D/2)
    gap = rms(x - y)
    T, half = a.shape[2:]
    t = torch.arange(T, dtype=torch.float64)
    for base in BASES:
        f = base ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(T, half, dtype=torch.float64), t[:, None] * f)
        start = b * turn.conj()  # before the rotation
        swapped = as_real(1j * start.conj() * turn)
        if case.same(swapped, x, gap):
            return Finding("rotary", "the two halves of each head change places before rotating")
        pairs = start.real.new_empty(*start.shape[:-1], half, 2)
        flat = as_real(start)
        z = torch.complex(flat[..., 0::2].contiguous(), flat[..., 1::2].contiguous()) * turn
        pairs[..., 0], pairs[..., 1] = z.real, z.imag
        if case.same(pairs.flatten(-2), x, gap):
            return Finding("rotary", "neighbours are rotated, (x0 x1), instead of halves")
        if case.same(as_real(start), x, gap):
            return Finding("position", "nothing is rotated: all are at position 0")
        found = positions(case, a, b, f, x, gap)
        if found is not None:
            return found
    return None


def positions(case: Case, a: Tensor, b: Tensor, f: Tensor, x: Tensor, gap: float):
    """Each token rotated by another position: found by trying all of them.

    a, b: (B, H, T, D/2) complex, B's and A's; f: (D/2,).
    """
    T = a.shape[2]
    tried = torch.arange(-2 * T, 2 * T + 1)
    tried = tried[tried.abs().argsort(stable=True)]  # of several that fit the nearest
    angles = tried[:, None] * f
    turns = torch.polar(torch.ones_like(angles), angles)  # (4T + 1, D/2)
    moved = torch.zeros(T, dtype=torch.int64)
    for t in range(T):
        # One head of one sample finds the candidate, all of them confirm it.
        off = (b[0, 0, t] * turns - a[0, 0, t]).abs().square().sum(1)
        best = int((off <= off.min() + 1e-12 * off.max()).nonzero()[0])
        if rms(as_real(b[:, :, t] * turns[best] - a[:, :, t])) > case.tolerance * rms(x):
            return None
        moved[t] = tried[best]
    if not moved.any():
        return None
    used = (torch.arange(T) + moved).tolist()
    if all(i == -t for t, i in enumerate(used)):
        return Finding("rotary", "it turns the other way: the sine has the wrong sign")
    wrong = [t for t in range(T) if used[t] != t]
    at = shorter([used[t] for t in wrong])
    return Finding("position", f"the tokens {shorter(wrong)} are rotated as if at {at}")


def shorter(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:8]))
    return f"{text}, ..." if len(numbers) > 8 else text


def as_complex(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.complex(first.contiguous(), second.contiguous())


def as_real(z: Tensor) -> Tensor:
    return torch.cat([z.real, z.imag], -1)
