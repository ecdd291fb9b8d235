"""Hyperball: a matrix keeps its norm, and every step has the same size relative to it.

    r = ‖W‖                                   as it was before the step
    D ← D·lr·r/‖D‖                            the step, now lr of the matrix's norm long
    W′ ← (W − D)·r/‖W − D‖                    back onto the sphere

    W `before`   D `before - p`, whatever the optimizer did   W′ `p`   ‖·‖ Frobenius

Wen et al. 2026 (arXiv 2606.16899). lr is the size of a step relative to the weights, so it no
longer depends on the optimizer's own scale; .01 to .03 is usual for a peak. Only the direction of
the optimizer's step counts, and weight decay, which shrinks W, would be undone: leave it out. A
matrix of zeros stays zero, so nothing may start there. r is read off before each step, not stored:
it moves by rounding alone. State: none.

In float32 or float64. Half-precision weights: hand over float32 copies, as hooks/wear.py does.

Example:
    import torch
    from hooks.hyperball import Hyperball
    w = torch.nn.Parameter(torch.randn(8, 4))
    optimizer, hook, norm = torch.optim.AdamW([w], lr=0.02, weight_decay=0), Hyperball(), w.norm()
    for _ in range(300):
        (w - 1).square().sum().backward()
        before = w.detach().clone()
        optimizer.step()
        hook(w, before, lr=0.02)
        optimizer.zero_grad()
    assert torch.allclose(w.norm(), norm)
    assert torch.cosine_similarity(w.flatten(), torch.ones(32), dim=0) > 0.9
"""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Hyperball:
    starts_at_zero = False  # zeros have no direction to keep
    needs_decay_off = True  # what decay takes away comes back at once

    @torch.no_grad()
    def __call__(self, p: torch.Tensor, before: torch.Tensor, lr: float) -> None:
        """In place on `p`, a matrix that a step at `lr` has moved from `before`, of any shape."""
        r = before.norm()
        step = (before - p).norm()
        torch.lerp(before, p, lr * r / step.clamp(min=1e-30), out=p)
        p.mul_(r / p.norm().clamp(min=1e-30))


if __name__ == "__main__":
    print(__doc__)
