#!/usr/bin/env bash
# torch.compile (inductor, CPU): a product added in place with an alpha. Needs a C++ compiler.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""The factor is lost: p.add_(a @ b, alpha=s) adds the whole product. p.sub_((a @ b) * -s) is right.

Seen: eager and compiled differ by 5.6e+00 in float32 and 2.6e+00 in float64, for s = 0.01."""
import torch


def update(p, a, b, s):
    p.add_(a @ b, alpha=s)


torch.manual_seed(0)
for dtype in torch.float32, torch.float64:
    a, b, p = (torch.randn(4, 4, dtype=dtype) for _ in range(3))
    eager, compiled = p.clone(), p.clone()
    update(eager, a, b, 0.01)
    torch.compile(update)(compiled, a, b, 0.01)
    print(f"{dtype}: eager and compiled differ by {(eager - compiled).abs().max():.1e}")
    assert torch.allclose(compiled, p + a @ b) and torch.allclose(eager, p + 0.01 * (a @ b))
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
