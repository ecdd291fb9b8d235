#!/usr/bin/env bash
# torch.distributed.checkpoint: a dict with integers as keys, such as rows read of each shard, saved and loaded.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""The docstring of load() says that what is no tensor is modified in place. Under a key that is no string
it stays as it was, and a new key, its string, gets what was saved.

Seen: {0: 17, "a": 18} loaded into {0: 0, "a": 0} is {0: 0, "a": 18, "0": 17}. A tensor under 0 is loaded
in place. The milestones of MultiStepLR, a Counter, come back with 3 and "3" in them."""
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp


def schedule():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
saved = {"rows": {0: 17, "a": 18}, "x": {0: torch.ones(1)}, "lr": schedule().state_dict()}
loaded = {"rows": {0: 0, "a": 0}, "x": {0: torch.zeros(1)}, "lr": schedule().state_dict()}
with tempfile.TemporaryDirectory() as folder:
    dcp.save(saved, checkpoint_id=folder)
    dcp.load(loaded, checkpoint_id=folder)
dist.destroy_process_group()
print(loaded["rows"], loaded["x"], loaded["lr"]["milestones"])
assert loaded["rows"] == {0: 0, "a": 18, "0": 17}
assert loaded["x"][0].item() == 1 and dict(loaded["lr"]["milestones"]) == {3: 1, "3": 1}
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
