"""Muon for the hidden matrices of somebody's CNN, AdamW for the rest, in one process.

Type at the root:

    python -m examples.muon_alone
"""

import torch
from torch import nn

from optim.muon import Muon


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, 64), nn.GELU(), nn.Linear(64, 10)),
    )
    # Not for the first layer, the last one, or biases. A convolution's kernel counts as a matrix.
    hidden = [model[3].weight, model[7].weight]
    others = [p for p in model.parameters() if all(p is not q for q in hidden)]
    adamw = {"params": others, "use_muon": False, "lr": 3e-3}
    optimizer = Muon([{"params": hidden, "lr": 0.02}, adamw])

    digits = torch.randn(10, 1, 8, 8)  # each class is one picture, seen through noise
    losses = []
    for _ in range(60):
        labels = torch.randint(10, (64,))
        images = digits[labels] + torch.randn(64, 1, 8, 8)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print("loss", *(f"{loss:.2f}" for loss in losses[::10]), f"{losses[-1]:.2f}")
    assert losses[-1] < losses[0] / 2


if __name__ == "__main__":
    main()
