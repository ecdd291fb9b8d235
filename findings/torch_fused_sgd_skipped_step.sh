#!/usr/bin/env bash
# torch.optim.SGD, foreach and fused, on a CPU: GradScaler skips the first step, as it mostly does in float16.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""The fused step makes its momentum buffer without filling it, skips, and then takes it for a momentum.

Memory that is not filled is set to NaN here, so that the outcome does not depend on what lay there.
Seen, weight after a skipped step and one of gradient 1 with lr 0.1: foreach 0.9, fused nan. Without
a skipped step both 0.9. torch.optim.AdamW fills its state: 0.9 in all cases."""
import torch

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True


def train(cls, skip_first: bool, **flags) -> float:
    weight = torch.ones(4, requires_grad=True)
    optimizer = cls([weight], lr=0.1, **flags)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in [True] * skip_first + [False]:
        scaler.scale(torch.ones(1))
        weight.grad = torch.full((4,), float("inf") if overflow else scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    return round(weight[0].item(), 3)


found = {}
for cls, flags in (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"weight_decay": 0.0}):
    for way in "foreach", "fused":
        for skip_first in False, True:
            found[cls.__name__, way, skip_first] = train(cls, skip_first, **flags, **{way: True})
for (name, way, skip_first), weight in found.items():
    print(f"{name} {way}: {weight}{' after a skipped first step' if skip_first else ''}")
lost = found.pop(("SGD", "fused", True))
assert lost != lost and set(found.values()) == {0.9}
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
