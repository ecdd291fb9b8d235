#!/usr/bin/env bash
# parallelize_module on a model whose head has the embedding's weight: the two are tied no longer, without a word.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""The plan shards both modules by words, as for an untied head; each gets a Parameter of its own.

Seen: its gradient has a norm of 478, in one process 858: it is the embedding's half, and the head learns apart from then on.
Tied again by hand, model.head.weight = model.tokens.weight after parallelize_module, all is right."""
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(self.tokens(ids))


def gradient(model):
    model(torch.arange(8)).square().sum().backward()
    g = model.tokens.weight.grad
    return g.full_tensor() if hasattr(g, "full_tensor") else g


def run(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    mesh = init_device_mesh("cpu", (world,))
    right = gradient(Model())
    untied = parallelize_module(Model(), mesh, plan)
    still_tied = untied.head.weight is untied.tokens.weight
    found = gradient(untied)
    tied = parallelize_module(Model(), mesh, plan)
    tied.head.weight = tied.tokens.weight
    again = gradient(tied)
    if rank == 0:
        print(f"one process {right.norm():.3f}, {world} ranks {found.norm():.3f} (tied: {still_tied}), "
              f"tied again by hand {again.norm():.3f}")
    assert not still_tied and not torch.allclose(found, right) and torch.allclose(again, right, rtol=1e-4)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run, (2, f"{folder}/store"), nprocs=2, start_method="fork")
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
