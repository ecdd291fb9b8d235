#!/usr/bin/env bash
# A small regression with bf16 weights: the evaluated loss before and during training.
# Packages: schedulefree==1.4.1 torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" schedulefree==1.4.1 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""The train weights y are rounded to bf16 at every step, and the evaluated x is extrapolated from them.

Seen, loss at steps 0, 500, 1000, 1500: float32 7.297 4.080 2.123 0.992, bfloat16 7.290 7.227 7.291 7.366."""
import schedulefree
import torch


def losses(dtype: torch.dtype) -> list[float]:
    torch.manual_seed(0)
    inputs, teacher = torch.randn(512, 32), torch.randn(1, 32)
    targets = inputs @ teacher.T
    noise = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    weight = (teacher + 0.5 * noise).to(dtype).requires_grad_()
    optimizer, found = schedulefree.AdamWScheduleFree([weight], lr=1e-3), []
    for step in range(1501):
        if step % 500 == 0:
            optimizer.eval()
            found.append((inputs @ weight.detach().float().T - targets).square().mean().item())
        optimizer.train()
        rows = torch.randint(0, 512, (16,), generator=torch.Generator().manual_seed(step))
        weight.grad = None
        error = inputs[rows].to(dtype) @ weight.T - targets[rows].to(dtype)
        error.float().square().mean().backward()
        optimizer.step()
    return found


full, half = losses(torch.float32), losses(torch.bfloat16)
print("float32 ", *(f"{x:.3f}" for x in full))
print("bfloat16", *(f"{x:.3f}" for x in half))
assert full[-1] < 0.5 * full[0] and half[-1] > half[0]
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
