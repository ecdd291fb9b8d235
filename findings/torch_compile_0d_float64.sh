#!/usr/bin/env bash
# torch.compile (inductor, CPU): a step of torch.optim on parameters of 0 and 1 dimensions. Needs a C++ compiler.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""What a compiled function does in place to a float64 tensor of 0 dimensions on the CPU is lost.

Seen, after a step of 0.1 from 1: float32 () 0.9, float32 (1,) 0.9, float64 () 1.0, float64 (1,) 0.9; SGD and AdamW."""
import torch

for cls in torch.optim.SGD, torch.optim.AdamW:
    for dtype in torch.float32, torch.float64:
        for shape in (), (1,):
            weight = torch.ones(shape, dtype=dtype, requires_grad=True)
            weight.grad = torch.ones_like(weight)
            optimizer = cls([weight], lr=0.1)
            torch.compile(optimizer.step)()
            lost = dtype == torch.float64 and shape == ()
            print(cls.__name__, dtype, shape, f"{weight.item():.2f}")
            assert (weight.item() == 1) == lost
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
