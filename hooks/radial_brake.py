"""Radial brake: the part of a step that lengthens a matrix is halved; turning is left alone.

    c = ⟨D, W⟩/‖W‖²                           the step along W; it shrinks W where c > 0
    D ← D − (1 − outward)·c·W   if c < 0      else   D − (1 − inward)·c·W

    W `before`   D `before - p`, whatever the optimizer did

A matrix whose steps are orthogonal to it grows as √t by turning alone; what the brake takes is the
growth that the gradient asks for. From record 46 of modded-nanogpt's track 3 (2026), where outward
is .5. NVIDIA's Emerging-Optimizers has another brake of this name, on the norm after the step: it
halves the growth by turning too, which record 46 takes away with hooks/radius_pin.py. State: none.

In float32 or float64. Half-precision weights: hand over float32 copies, as hooks/wear.py does.

Example:
    import torch
    from hooks.radial_brake import RadialBrake
    w = torch.nn.Parameter(torch.tensor([[2.0, 0.0]]))
    before = w.detach().clone()
    with torch.no_grad():
        w += torch.tensor([[1.0, 3.0]])
    RadialBrake()(w, before, lr=0.1)
    assert torch.allclose(w, torch.tensor([[2.5, 3.0]]))  # 1 outward becomes 0.5
"""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class RadialBrake:
    """outward, inward: the share, 0 to 1, of a step along W that stays. Raises ValueError."""

    takes_dtensors = False  # torch does not flatten uneven shards

    outward: float = 0.5
    inward: float = 1.0

    def __post_init__(self):
        for name, x in vars(self).items():
            if not 0 <= x <= 1:
                raise ValueError(f"{name}={x} is not allowed; it must lie in [0, 1]")

    @torch.no_grad()
    def __call__(self, p: torch.Tensor, before: torch.Tensor, lr: float) -> None:
        """In place on `p`, a matrix that a step has moved from `before`; `lr` plays no part."""
        old = before.flatten()
        along = (before - p).flatten().dot(old) / old.dot(old).clamp(min=1e-12)
        braked = torch.where(along < 0, (1 - self.outward) * along, (1 - self.inward) * along)
        p.addcmul_(before, braked)


if __name__ == "__main__":
    print(__doc__)
