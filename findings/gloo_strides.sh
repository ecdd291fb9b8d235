#!/usr/bin/env bash
# torch.distributed, gloo: ranks hold a matrix of one shape and one dtype, on one of them as the transpose of a contiguous one.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""broadcast and all_reduce go through the memory of each rank, whatever order the elements lie in.

Seen: broadcast of 0 1 2, 3 4 5 gives 0 2 4, 1 3 5 on the other rank. all_reduce of it with itself gives
0 4 3, 7 6 10 on one rank and 0 3 6, 4 7 10 on the other, where 0 2 4, 6 8 10 is right on both."""
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MATRIX = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def run(rank: int, world: int, store: str, found) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    matrix = torch.tensor(MATRIX)
    if rank == 1:
        matrix = matrix.t().contiguous().t()
    sent = matrix.clone() if rank == 0 else torch.zeros_like(matrix)
    dist.broadcast(sent, src=0)
    total = matrix.clone()
    dist.all_reduce(total)
    found[rank] = sent.tolist(), total.tolist()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        found = manager.dict()
        mp.start_processes(run, (2, f"{folder}/store", found), nprocs=2, start_method="fork")
        (sent0, total0), (sent1, total1) = found[0], found[1]
    print(f"broadcast: {sent0} and {sent1}")
    print(f"all_reduce: {total0} and {total1}")
    assert sent0 == MATRIX and sent1 == [[0, 2, 4], [1, 3, 5]]
    assert total0 == [[0, 4, 3], [7, 6, 10]] and total1 == [[0, 3, 6], [4, 7, 10]]
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
