#!/usr/bin/env bash
# torch.optim on a CPU, foreach and fused: a convolution goes to channels_last between two runs, and its optimizer state is loaded.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""The fused step pairs weight, gradient and averages by their place in memory, not by their index.

Seen, largest distance to the run that stayed in one memory format: foreach 0.0, fused 0.1 (lr 0.1).
Only the averages lie otherwise: they come as they were saved. No error, no warning."""
import copy

import torch
from torch import nn


def train(way: str, switch: bool) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 2, bias=False).double()
    inputs = torch.randn(5, 8, 3, 4, 4, dtype=torch.double)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **{way: True})
    for step, x in enumerate(inputs):
        if step == 4 and switch:
            saved = copy.deepcopy(optimizer.state_dict())
            model = model.to(memory_format=torch.channels_last)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **{way: True})
            optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    return model.weight.detach()


found = {way: (train(way, True) - train(way, False)).abs().max().item() for way in ("foreach", "fused")}
print({way: f"{x:.1e}" for way, x in found.items()})
assert found["foreach"] < 1e-9 and found["fused"] > 1e-2
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
