#!/usr/bin/env bash
# Prodigy on two ranks of fully_shard and in one process, the same batch everywhere, float64, 20 steps.
# Packages: prodigyopt==1.1.2 torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" prodigyopt==1.1.2 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""Its step size d comes from sums over all parameters, and on DTensors those sums are no longer the same.

Seen: d is 0.026672 in one process; on two ranks 0.033367 and 0.026960. No error, no warning."""
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from prodigyopt import Prodigy
from torch import nn
from torch.distributed.fsdp import fully_shard


def run(rank: int, world: int, store: str, found) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    if world > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
        fully_shard(model)
    optimizer = Prodigy(model.parameters())
    for step in range(20):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.double)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found[rank] = float(optimizer.param_groups[0]["d"])
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        one, two = manager.dict(), manager.dict()
        run(0, 1, "", one)
        mp.start_processes(run, (2, f"{folder}/store", two), nprocs=2, start_method="fork")
        print(f"d in one process {one[0]:.6f}, on two ranks {two[0]:.6f} {two[1]:.6f}")
        assert max(abs(two[0] / one[0] - 1), abs(two[1] / one[0] - 1)) > 0.01
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
