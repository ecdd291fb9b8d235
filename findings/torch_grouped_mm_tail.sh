#!/usr/bin/env bash
# torch.nn.functional.grouped_mm where offs ends before the last row, as with a buffer of a fixed size.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""Rows beyond offs[-1] "are ignored", says the documentation. Their outputs, and their gradients, are whatever lay in
memory: NaN here, where memory of that size was just given back. A gradient of zeros for them does not help.

Seen in float32 and bfloat16: rows 30 to 39 of y and of x.grad are NaN; what gathered x gets NaN too, for 0 x NaN is
NaN. pytorch #154557 says that it is meant so; index_select's backward adds these rows to real ones all the same."""
import torch
import torch.nn.functional as F


def leave_nan_behind(like):
    freed = [torch.full_like(like, float("nan")) for _ in range(50)]
    del freed


torch.manual_seed(0)
for dtype in torch.float32, torch.bfloat16:
    tokens = torch.randn(30, 64, dtype=dtype, requires_grad=True)
    w = torch.randn(3, 64, 64, dtype=dtype)
    rows = torch.cat([torch.arange(30), torch.zeros(10, dtype=torch.int64)])  # filled up with token 0
    offs = torch.tensor([10, 20, 30], dtype=torch.int32)
    x = tokens[rows]
    x.retain_grad()
    leave_nan_behind(x)
    y = F.grouped_mm(x, w, offs=offs)
    gradient = torch.cat([torch.ones(30, 64, dtype=dtype), torch.zeros(10, 64, dtype=dtype)])
    leave_nan_behind(x)
    y.backward(gradient)
    nans = [int(t.isnan().any(1).sum()) for t in (y, x.grad, tokens.grad)]
    print(dtype, "rows with NaN: {} of y, {} of x.grad, {} of the tokens' gradient".format(*nans))
    assert nans == [10, 10, 1]
    assert y[:30].isfinite().all() and tokens.grad[1:].isfinite().all()
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
