"""Cautious decay: weights shrink where the step moves them towards 0 anyway.

    W′ ← W − D − lr·λ·W·[D·W > 0]             element by element

    W `before`   D `before - p`, whatever the optimizer did   λ `weight_decay`

Ordinary decay pulls at all weights, also at those that the gradient is pushing outward: Chen et al.
2025 (arXiv 2510.12402) leave these alone. optim/muon.py has it built in (`cautious`), on the same
mask. The optimizer's own decay would come on top, and its pull would count as part of the step: set
it to 0. λ is in units of 1/lr, as AdamW's; record 46 of modded-nanogpt's track 3 takes .025 at
Muon's lr, with the mask of the step before hooks/radius_pin.py: after the pin 1 % of the entries
decay otherwise. State: none.

In float32 or float64. Half-precision weights: hand over float32 copies, as hooks/wear.py does.

Example:
    import torch
    from hooks.cautious_decay import CautiousDecay
    w = torch.nn.Parameter(torch.tensor([[1.0, 1.0]]))
    before = w.detach().clone()
    with torch.no_grad():
        w += torch.tensor([[0.1, -0.1]])
    CautiousDecay(weight_decay=0.5)(w, before, lr=0.1)
    assert torch.allclose(w, torch.tensor([[1.1, 0.85]]))  # only the second moved towards 0
"""

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class CautiousDecay:
    """weight_decay: what goes of a weight, in units of 1/lr. Raises ValueError unless above 0."""

    needs_decay_off = True  # two decays, of which one is not cautious

    weight_decay: float = 0.1

    def __post_init__(self):
        if not 0 < self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay={self.weight_decay} is not allowed; it must be above 0, 0.1 say"
            )

    @torch.no_grad()
    def __call__(self, p: torch.Tensor, before: torch.Tensor, lr: float) -> None:
        """In place on `p`, weights of any shape that a step at `lr` has moved from `before`."""
        is_inward = (before - p).mul_(before).sign_().clamp_(min=0)  # 1 there, else 0
        p.addcmul_(before, is_inward, value=-lr * self.weight_decay)


if __name__ == "__main__":
    print(__doc__)
