#!/usr/bin/env bash
# fully_shard: a forward under no_grad, then new weights, then a forward: which weights does it use?
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""The root keeps what it gathered for a forward without backward, and the next forward uses that again.

Seen: output before 1.0, with new weights 1.0; after reshard() 2.0. A unit that is no root gathers anew."""
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = fully_shard(nn.Linear(1, 1, bias=False))
with torch.no_grad():
    model.weight.fill_(1)
    sharded = model.weight
    before = model(torch.ones(1, 1)).item()
    sharded.fill_(2)  # what an optimizer, an average of weights or a loaded checkpoint does
    after = model(torch.ones(1, 1)).item()
    model.reshard()
    resharded = model(torch.ones(1, 1)).item()
print(f"before {before}, with new weights {after}, after reshard() {resharded}")
dist.destroy_process_group()
assert (before, after, resharded) == (1.0, 1.0, 2.0)
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
