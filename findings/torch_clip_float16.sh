#!/usr/bin/env bash
# torch.nn.utils.clip_grad_norm_: finite float16 gradients of 300, in 100000 elements, clipped to norm 1.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""The norm, 94868, is more than float16 holds, so it is inf, and every gradient is divided by it.

Seen: norm inf, all gradients 0.0; in float32 and bfloat16 a norm near 94868, gradients of 0.0032.
error_if_nonfinite, off unless asked for, is documented for gradients that are not finite; these are."""
import torch

found = {}
for dtype in torch.float32, torch.bfloat16, torch.float16:
    weight = torch.zeros(100_000, dtype=dtype, requires_grad=True)
    weight.grad = torch.full_like(weight, 300)
    norm = torch.nn.utils.clip_grad_norm_([weight], 1.0)
    found[dtype] = norm.item(), weight.grad.abs().max().item()
    print(dtype, f"norm {found[dtype][0]:.0f}, largest gradient {found[dtype][1]:.4f}")
assert found.pop(torch.float16) == (float("inf"), 0.0)
assert all(abs(largest - 0.0032) < 1e-4 for _, largest in found.values())
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
