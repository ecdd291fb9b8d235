#!/usr/bin/env bash
# torch.nn.functional.grouped_mm where offs ends before the last row, as with a buffer of a fixed size.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""Rows beyond offs[-1] "are ignored", says the documentation. Their outputs and their gradients are whatever lay in
memory, here what a tensor of that size has just given back. A gradient of zeros for them does not help.

Seen in float32 and bfloat16: NaN in the last 10 rows of y, and of x.grad; from there in the gradient of the token that
fills the buffer up, though its own row is fine. pytorch #154557 says that it is meant so."""
import torch
import torch.nn.functional as F


def leave_nan_behind(x):
    freed = [torch.full_like(x, float("nan")) for _ in range(50)]
    del freed


def rows_with_nan(x):
    return int(x.isnan().any(1).sum())


torch.manual_seed(0)
rows = torch.cat([torch.arange(30), torch.zeros(10, dtype=torch.int64)])  # filled up with token 0
offs = torch.tensor([10, 20, 30], dtype=torch.int32)
for dtype in torch.float32, torch.bfloat16:
    tokens = torch.randn(30, 64, dtype=dtype, requires_grad=True)
    w = torch.randn(3, 64, 64, dtype=dtype)
    gradient = torch.cat([torch.ones(30, 64, dtype=dtype), torch.zeros(10, 64, dtype=dtype)])
    most = [0, 0, 0]
    for _ in range(20):
        tokens.grad = None
        x = tokens[rows]
        x.retain_grad()
        leave_nan_behind(x)
        y = F.grouped_mm(x, w, offs=offs)
        leave_nan_behind(x)
        y.backward(gradient)
        assert y[:30].isfinite().all() and tokens.grad[1:].isfinite().all()
        found = map(rows_with_nan, (y, x.grad, tokens.grad))
        most = [max(pair) for pair in zip(most, found)]
    print(dtype, "rows with NaN: {} of y, {} of x.grad, {} of the tokens' gradient".format(*most))
    assert most == [10, 10, 1]
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
