"""Somebody's model in torch's own layouts, recorded, and compared with one process.

Type at the root, with any of ddp, fsdp2, tp, pipeline:

    python -m examples.parity_torch ddp fsdp2 tp pipeline

tp is parallelize_module with sequence parallelism; pipeline is torch.distributed.pipelining, 1F1B.
Each layout is two forked processes on gloo, three steps in float64.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from parity.compare import Comparison
from parity.diagnose import diagnose, report
from parity.record import Place, record
from parity.recording import Recording

VOCAB, WIDTH, HEADS, LAYERS, BATCH, LENGTH, STEPS = 64, 32, 4, 4, 8, 16, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential()
        self.mlp.add_module("up", nn.Linear(WIDTH, 4 * WIDTH))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("down", nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        heads = (f(x).unflatten(-1, (-1, WIDTH // HEADS)) for f in (self.q, self.k, self.v))
        q, k, v = (y.transpose(1, 2) for y in heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """A stage of a pipeline lacks some of it."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(LAYERS)})
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, x):
        if self.tokens is not None:
            x = self.tokens(x)
        for block in self.layers.values():
            x = block(x)
        return x if self.head is None else self.head(self.norm(x))


def make() -> Model:
    torch.manual_seed(0)
    return Model().double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


def loss_fn(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def optimizer_of(model: nn.Module):
    # Fused and foreach kernels want no mix of DTensors and others.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6, foreach=False)


def train(model, recorder, optimizer, rank: int = 0, replicas: int = 1) -> None:
    """Each of `replicas` ranks has its share of each batch, and the mean loss of that."""
    n = BATCH // replicas
    rows = range(rank * n, rank * n + n)
    for ids, targets in batches():
        recorder.batch(rows, of=BATCH)
        loss_fn(model(ids[rows.start : rows.stop]), targets[rows.start : rows.stop]).backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.close()


# ---- the layouts ---------------------------------------------------------------------------------
def ddp(rank: int, world: int, folder: Path) -> None:
    model = nn.parallel.DistributedDataParallel(make())
    optimizer = optimizer_of(model)
    axes = {"dp": (world, rank)}
    recorder = record(
        model.module, folder, optimizer, rank=rank, axes=axes, backward_scale=1 / world
    )
    train(model, recorder, optimizer, rank, world)


def fsdp2(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = make()
    for block in model.layers.values():
        fully_shard(block)
    fully_shard(model)
    optimizer = optimizer_of(model)
    axes = {"dp": (world, rank)}
    recorder = record(model, folder, optimizer, rank=rank, axes=axes, backward_scale=1 / world)
    train(model, recorder, optimizer, rank, world)


def tp(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    model = make()
    mesh = init_device_mesh("cpu", (world,))
    gather = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
    column = ColwiseParallel()
    row = RowwiseParallel(output_layouts=Shard(1))
    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "layers.*.norm1": SequenceParallel(),
        "layers.*.attn": PrepareModuleInput(**gather),
        **{f"layers.*.attn.{name}": column for name in "qkv"},
        "layers.*.attn.out": row,
        "layers.*.norm2": SequenceParallel(),
        "layers.*.mlp": PrepareModuleInput(**gather),
        "layers.*.mlp.up": column,
        "layers.*.mlp.down": row,
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)

    def place(kind: str, name: str, x: torch.Tensor):
        """DTensors know their place; the plan hands out plain tensors in most modules."""
        if kind == "parameter" or hasattr(x, "placements") or name in ("head", "(model)"):
            return None
        dim = 2 if name.split(".")[-1] in ("q", "k", "v", "up", "gelu") else 1
        if kind == "input":
            return None
        shape, index = list(x.shape), [0] * x.ndim
        shape[dim] *= world
        index[dim] = rank * x.shape[dim]
        return Place(tuple(shape), tuple(index))

    optimizer = optimizer_of(model)
    axes = {"tp": (world, rank)}
    recorder = record(model, folder, optimizer, rank=rank, axes=axes, place=place)
    train(model, recorder, optimizer)


def pipeline(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    model = make()
    n_micro = 4
    per_stage = LAYERS // world
    for i in range(LAYERS):
        if i // per_stage != rank:
            del model.layers[str(i)]
    if rank > 0:
        model.tokens = None
    if rank < world - 1:
        model.norm = model.head = None
    optimizer = optimizer_of(model)
    axes = {"pp": (world, rank)}
    skip_root = lambda kind, name, x: Place((), None) if name == "(model)" else None  # noqa: E731
    recorder = record(
        model,
        folder,
        optimizer,
        rank=rank,
        axes=axes,
        place=skip_root,
        backward_scale=1 / n_micro,
    )
    n = BATCH // n_micro
    recorder.batch(lambda call: range(call * n, call * n + n), of=BATCH)
    # Without examples the stage finds shapes by a forward of its own, which would be recorded too.
    ids = torch.zeros(n, LENGTH, dtype=torch.int64)
    hidden = torch.zeros(n, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    logits = torch.zeros(n, LENGTH, VOCAB, dtype=torch.float64)
    x = ids if rank == 0 else hidden
    y = logits if rank == world - 1 else hidden
    stage = PipelineStage(model, rank, world, torch.device("cpu"), input_args=x, output_args=y)
    schedule = Schedule1F1B(stage, n_micro, loss_fn=loss_fn)
    for ids, targets in batches():
        if rank == 0:
            schedule.step(ids)
        else:
            schedule.step(target=targets)
        optimizer.step()
        optimizer.zero_grad()
    recorder.close()


LAYOUTS = {"ddp": ddp, "fsdp2": fsdp2, "tp": tp, "pipeline": pipeline}


def one_rank(rank: int, world: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store_{name}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    LAYOUTS[name](rank, world, Path(folder, name))
    dist.barrier()
    dist.destroy_process_group()


def compared(names: list[str], folder: str) -> dict[str, str]:
    """Layout -> what parity says of it."""
    model = make()
    optimizer = optimizer_of(model)
    train(model, record(model, Path(folder, "alone"), optimizer), optimizer)
    said = {}
    for name in names:
        mp.start_processes(one_rank, (2, name, folder), nprocs=2, start_method="fork")
        comparison = Comparison(Recording(Path(folder, "alone")), Recording(Path(folder, name)))
        first = comparison.first()
        if first is None:
            said[name] = f"all {len(comparison.order)} tensors agree"
        else:
            said[name] = report(comparison, first, diagnose(comparison, first))
    return said


def main(names: list[str]) -> None:
    torch.set_num_threads(1)  # before the forks
    with tempfile.TemporaryDirectory() as folder:
        for name, said in compared(names or list(LAYOUTS), folder).items():
            print(f"{name}: {said}")


if __name__ == "__main__":
    main(sys.argv[1:])
