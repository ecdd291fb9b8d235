#!/usr/bin/env bash
# torch.optim.lr_scheduler: SequentialLR of a constant rate for 5 steps and OneCycleLR or CyclicLR after it.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""The constructor of a later phase overwrites what the first phase runs with: initial_lr and momentum.

Seen, lr and momentum of the first 5 steps, given 1.0 and 0.8: with StepLR as second phase 1.0 and 0.8,
with CyclicLR 1.0 and 0.9, with OneCycleLR 0.4 and 0.95 (max_lr over div_factor)."""
import torch
from torch.optim import lr_scheduler as schedules

SECOND = {
    "StepLR": lambda optimizer: schedules.StepLR(optimizer, 10),
    "CyclicLR": lambda optimizer: schedules.CyclicLR(optimizer, 0.1, 10.0),
    "OneCycleLR": lambda optimizer: schedules.OneCycleLR(optimizer, 10.0, total_steps=20),
}
found = {}
for name, make in SECOND.items():
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.8)
    first = schedules.ConstantLR(optimizer, factor=1.0, total_iters=5)
    schedule = schedules.SequentialLR(optimizer, [first, make(optimizer)], milestones=[5])
    seen = set()
    for _ in range(5):
        seen.add((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        schedule.step()
    found[name] = seen
    print(f"{name}: the first phase has (lr, momentum) {seen}")
assert found == {"StepLR": {(1.0, 0.8)}, "CyclicLR": {(1.0, 0.9)}, "OneCycleLR": {(0.4, 0.95)}}
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
