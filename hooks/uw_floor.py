"""u/w floor: no step is smaller than a share of the weights that it moves.

    D ← D·max(1, lr·φ·‖W‖/‖D‖)                        the whole matrix
    Dᵢ ← Dᵢ·max(1, lr·φ·‖Wᵢ‖/‖Dᵢ‖)                    each row by itself, with `rows`

    W `before`   D `before - p`, whatever the optimizer did   φ `floor`   Wᵢ a neuron's weights

Matrices grow in training, so a step of constant size turns them less and less; with the floor the
relative step is lr·φ at least. From the records 9 (the matrix, φ = .35) and 46 (rows, φ = .3825) of
modded-nanogpt's track 3 (2026), around Muon, whose rows have a norm near 1 before lr. Longer steps
stay as they are. A row without a step, or of zeros, is left alone. State: none.

In float32 or float64. Half-precision weights: hand over float32 copies, as hooks/wear.py does.

Example:
    import torch
    from hooks.uw_floor import UWFloor
    w = torch.nn.Parameter(torch.tensor([[30.0, 40.0], [0.1, 0.0]]))
    before = w.detach().clone()
    with torch.no_grad():
        w -= 0.01  # a step that is small for the first row alone
    UWFloor(floor=0.5, rows=True)(w, before, lr=0.1)
    step = before - w
    assert torch.allclose(step[0].norm(), torch.tensor(0.1 * 0.5 * 50))
    assert torch.allclose(step[1], torch.tensor(0.01))
"""

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class UWFloor:
    """floor: ‖step‖/(lr·‖weights‖) at least; rows: of each row. Raises ValueError for another."""

    floor: float = 0.35
    rows: bool = False

    def __post_init__(self):
        if not 0 < self.floor < math.inf:
            raise ValueError(f"floor={self.floor} is not allowed; it must be above 0, 0.35 say")

    @torch.no_grad()
    def __call__(self, p: torch.Tensor, before: torch.Tensor, lr: float) -> None:
        """In place on `p`, a matrix that a step at `lr` has moved from `before`.

        Both have the shape (rows, ...).
        """
        dims = tuple(range(1 if self.rows else 0, p.ndim))
        wanted = lr * self.floor * torch.linalg.vector_norm(before, dim=dims, keepdim=True)
        step = torch.linalg.vector_norm(before - p, dim=dims, keepdim=True)
        # A step of nothing has no direction to be made longer in.
        factor = (wanted / step.clamp(min=1e-30)).clamp(min=1)
        torch.lerp(before, p, factor, out=p)  # at 1 exactly p


if __name__ == "__main__":
    print(__doc__)
