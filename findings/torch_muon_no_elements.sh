#!/usr/bin/env bash
# torch.optim.Muon and torch.optim.AdamW with a (4, 0) matrix.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""A layer without inputs (a pruned one, an empty expert) is a valid parameter.

Seen: AdamW steps; Muon: ZeroDivisionError, division by zero, out of the ratio of rows to columns."""
import torch

said = {}
for cls in (torch.optim.AdamW, torch.optim.Muon):
    weight = torch.zeros(4, 0, requires_grad=True)
    weight.grad = torch.zeros(4, 0)
    try:
        cls([weight]).step()
        said[cls.__name__] = "steps"
    except Exception as error:
        said[cls.__name__] = f"{type(error).__name__}: {error}"
print(said)
assert said == {"AdamW": "steps", "Muon": "ZeroDivisionError: division by zero"}
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
