#!/usr/bin/env bash
# torch.nn.functional.grouped_mm: the gradient that a sum gives.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""Backward refuses an expanded gradient, as .sum() makes it; matmul takes it.

Seen: RuntimeError, "Invalid strides/sizes, got [0, 0] for strides and [40, 64] for sizes"; a contiguous copy of that
gradient goes through. Nothing in the forward says so."""
import torch
import torch.nn.functional as F

torch.manual_seed(0)
x = torch.randn(40, 64, requires_grad=True)
w = torch.randn(3, 64, 64)
offs = torch.tensor([10, 20, 40], dtype=torch.int32)
(x[:10] @ w[0]).sum().backward()
F.grouped_mm(x, w, offs=offs).backward(torch.ones(40, 64))
try:
    F.grouped_mm(x, w, offs=offs).sum().backward()
except RuntimeError as error:
    print(error)
    assert "strides" in str(error)
else:
    raise SystemExit("it is taken")
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
