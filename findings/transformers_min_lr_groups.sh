#!/usr/bin/env bash
# transformers.get_scheduler with a floor for the rate, and two groups with rates of their own.
# Packages: transformers==5.24.0 torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" transformers==5.24.0 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""`min_lr` and `lr_end` become a factor of the optimizer's default rate; a group with another rate ends elsewhere.

Seen, rates of the groups 1.0 and 0.01 after the last step, for a floor of 0.005 (docstrings: the rate
to reach, the end rate): cosine_with_min_lr 0.005 and 0.00005, polynomial (lr_end) 0.005 and 0.00005.
torch's CosineAnnealingLR with eta_min: 0.005 and 0.005."""
import torch
from transformers import get_scheduler


def floor(make) -> list[float]:
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.01}], lr=1.0)
    schedule = make(optimizer)
    for _ in range(8):
        optimizer.step()
        schedule.step()
    return [round(group["lr"], 8) for group in optimizer.param_groups]


found = {"torch": floor(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8, eta_min=0.005))}
for name, argument in ("cosine_with_min_lr", "min_lr"), ("polynomial", "lr_end"):
    options = {"num_warmup_steps": 0, "num_training_steps": 8}
    options["scheduler_specific_kwargs"] = {argument: 0.005}
    found[name] = floor(lambda o: get_scheduler(name, o, **options))
print(found)
assert found.pop("torch") == [0.005, 0.005] and all(x == [0.005, 0.00005] for x in found.values())
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
