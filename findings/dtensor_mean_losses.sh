#!/usr/bin/env bash
# DTensor: mse_loss and its kin on a batch that is sharded over 2 and over 4 ranks, and on one that does not divide.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""The docstring of DTensor promises what a single device gives.

Seen, gradient over that of one process: on 2 ranks mse 2, huber 2, smooth_l1 2, binary_cross_entropy
2, l1 1, bce with logits 1; on 4 ranks 4 and 1. The losses themselves are right. With 3 rows on 2
ranks mse_loss is 0.1875 (the mean of the ranks' means), where 0.1667 is right. No error, no warning."""
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

KINDS = ("mse_loss", "huber_loss", "smooth_l1_loss", "binary_cross_entropy", "l1_loss",
         "binary_cross_entropy_with_logits")


def run(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))

    def loss_and_gradient(kind: str, x, y, cut: bool):
        if cut:
            x, y = (distribute_tensor(t, mesh, [Shard(0)]) for t in (x, y))
        x = x.detach().requires_grad_()
        loss = getattr(F, kind)(x, y)
        loss.backward()
        whole = (lambda t: t.full_tensor()) if cut else (lambda t: t)
        return whole(loss.detach()).item(), whole(x.grad)

    x = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.double)
    y = torch.tensor([0.3, 0.8, 0.1, 0.7], dtype=torch.double)
    for kind in KINDS:
        loss, gradient = loss_and_gradient(kind, x, y, cut=False)
        cut_loss, cut_gradient = loss_and_gradient(kind, x, y, cut=True)
        ratio = (cut_gradient / gradient).mean().item()
        if rank == 0:
            print(f"{world} ranks, {kind}: gradient {ratio:.3f} times that of one process")
        assert abs(cut_loss - loss) < 1e-12
        assert abs(ratio - (1 if kind in KINDS[4:] else world)) < 1e-9
    if world == 2:
        x, y = torch.tensor([0.0, 0.5, 0.5], dtype=torch.double), torch.zeros(3, dtype=torch.double)
        right, found = (loss_and_gradient("mse_loss", x, y, cut)[0] for cut in (False, True))
        if rank == 0:
            print(f"3 rows on 2 ranks: mse_loss {found:.4f}, in one process {right:.4f}")
        assert abs(found - 0.1875) < 1e-9 and abs(right - 1 / 6) < 1e-9
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    for world in 2, 4:
        with tempfile.TemporaryDirectory() as folder:
            arguments = world, f"{folder}/store"
            mp.start_processes(run, arguments, nprocs=world, start_method="fork")
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
