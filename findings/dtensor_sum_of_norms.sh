#!/usr/bin/env bash
# DTensor: the norms of the columns of a matrix whose rows are sharded, added up (a group lasso, a sum over units).
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""norm(dim=0) waits to be put together over the ranks; .sum() adds up before that, though roots do not add.

The docstring of DTensor promises what a single device gives.
Seen: 8.0 (3 + 5) in one process; on 2 ranks 5.83. norm(dim=0).full_tensor().sum() is right."""
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def run(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    x = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    cut = distribute_tensor(x, init_device_mesh("cpu", (world,)), [Shard(0)])
    right = x.norm(dim=0).sum().item()
    found = cut.norm(dim=0).sum().full_tensor().item()
    first_whole = cut.norm(dim=0).full_tensor().sum().item()
    if rank == 0:
        print(f"one process {right:.2f}, {world} ranks {found:.2f}, made whole first {first_whole:.2f}")
    assert right == first_whole == 8 and abs(found - 34**0.5) < 1e-5
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run, (2, f"{folder}/store"), nprocs=2, start_method="fork")
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
