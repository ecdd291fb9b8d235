"""Radius pin: a matrix grows by what its step adds along it, and not by being turned.

    R = max(‖W‖ − ⟨D, W⟩/‖W‖, 1e-8)           the norm to first order in the step
    W′ ← (W − D)·R/‖W − D‖

    W `before`   D `before - p`, whatever the optimizer did   W′ `p`

A step orthogonal to W makes it longer, by ‖D‖²/(2‖W‖); over many steps that is most of the growth,
and it makes later steps turn it less. From record 46 of modded-nanogpt's track 3 (2026), whose code
calls the norm its target radius. A matrix of zeros keeps only the direction of its first step, at
norm 1e-8, and grows from the second one on. State: none.

In float32 or float64. Half-precision weights: hand over float32 copies, as hooks/wear.py does.

Example:
    import torch
    from hooks.radius_pin import RadiusPin
    w = torch.nn.Parameter(torch.tensor([[3.0, 0.0]]))
    before = w.detach().clone()
    with torch.no_grad():
        w += torch.tensor([[1.0, 3.0]])  # 1 along w, 3 across
    RadiusPin()(w, before, lr=0.1)
    assert torch.allclose(w.norm(), torch.tensor(4.0))  # without the pin 5
"""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class RadiusPin:
    takes_dtensors = False  # torch does not flatten uneven shards

    @torch.no_grad()
    def __call__(self, p: torch.Tensor, before: torch.Tensor, lr: float) -> None:
        """In place on `p`, a matrix that a step has moved from `before`; `lr` plays no part."""
        old = before.flatten()
        new = p.flatten()
        # ‖W‖² − ⟨D, W⟩ is ⟨W − D, W⟩. Products are quicker than norms on a CPU, and no less exact.
        radius = new.dot(old) / old.dot(old).sqrt().clamp(min=1e-12)
        p.mul_(radius.clamp(min=1e-8) / new.dot(new).sqrt().clamp(min=1e-30))


if __name__ == "__main__":
    print(__doc__)
