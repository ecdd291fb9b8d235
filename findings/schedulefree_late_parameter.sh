#!/usr/bin/env bash
# A parameter that gets its first gradient at step 1000 (unfrozen, an idle expert): how far does its z move in its first step?
# Packages: schedulefree==1.4.1 torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" schedulefree==1.4.1 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""The bias correction of the second moment uses the count of the group, not of the parameter.

Seen: joined at step 1: 1.0 lr; joined at step 1000: 25.1 lr. torch.optim.AdamW moves 1.0 lr in both cases."""
import schedulefree
import torch


def first_step(joined: int) -> float:
    torch.manual_seed(0)
    old, new = (torch.zeros(64, dtype=torch.double, requires_grad=True) for _ in range(2))
    optimizer = schedulefree.AdamWScheduleFree([old, new], lr=1e-3)
    optimizer.train()
    for step in range(1, joined + 1):
        old.grad = 1 + 0.1 * torch.randn(64, dtype=torch.double)
        new.grad = 1 + 0.1 * torch.randn(64, dtype=torch.double) if step == joined else None
        optimizer.step()
    return optimizer.state[new]["z"].abs().mean().item() / 1e-3


early, late = first_step(1), first_step(1000)
print(f"joined at step 1: {early:.1f} lr; joined at step 1000: {late:.1f} lr")
assert abs(early - 1) < 0.01 and 20 < late < 32
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
