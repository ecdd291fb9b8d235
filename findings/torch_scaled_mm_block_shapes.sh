#!/usr/bin/env bash
# torch.nn.functional.scaled_mm with scales for 1 x 128 and 128 x 128 blocks: which scales the compiler lets pass.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11; no GPU is needed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""The shapes that torch.compile checks round N/128 down; the kernel, and torch's own message, round it up.

K = 512, N = 192: a weight has 4 x 2 blocks of 128 x 128, the last ones cut off at the edge. The CUDA kernel
(ScaledBlas.cpp) wants scales (4, 2) and refuses others. Fake tensors, as the compiler uses them, refuse (4, 2)
and take (4, 1). So no such product can be compiled, and N must be a multiple of 128 there."""
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

M, N, K = 64, 192, 512
kinds = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128


def passes(columns: int) -> bool:
    with FakeTensorMode():
        a = torch.empty(M, K, dtype=torch.float8_e4m3fn, device="cuda")
        b = torch.empty(N, K, dtype=torch.float8_e4m3fn, device="cuda")
        scale_a = torch.empty(K // 128, M, device="cuda").t()
        scale_b = torch.empty(columns, K // 128, device="cuda").t()
        try:
            F.scaled_mm(a, b.t(), scale_a, kinds[0], scale_b, kinds[1])
        except RuntimeError as error:
            print(f"scales (4, {columns}): refused, {str(error)[:60]}...")
            return False
    print(f"scales (4, {columns}): taken")
    return True


assert passes(1) and not passes(2)
PY
PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
