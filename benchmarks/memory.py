"""Peak bytes of a training step, and of what: GPT-2 124M and the default job, by layout.

    python bench.py memory [--quick] [--job=gpt2_124m] [--ranks=2] [--loss_chunk=none]

In bfloat16 on the CPU, by memory/meter.py, which adds up the sizes of all living tensors: a second
step of one micro-batch a rank, without evaluation. On one rank ddp, on more (2 is usual for the
default job) each layout. --job: one of the two; --loss_chunk: tokens, or none, in place of what
train.py would choose. tp and cp: every rank has a part of each matrix, or of each sequence. A row,
in MB (1e6 bytes) on the rank that holds most:

    weights, gradients, state    between the steps; gradients: just before the optimizer's
    rest                         of the peak: activations, logits, buffers, temporaries
    peak                         the most at any moment of the step
    predicted                    the same by memory/ranks.py (not of tp and cp), and the ratio

--quick: models a hundredth as large.
"""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import runs
from memory.activations import activation_bytes
from memory.meter import measure
from memory.ranks import LAYOUTS, bytes_per_rank, find_optimizer
from memory.shapes import gpt_shapes
from model import GPT, GPTConfig, initial_weight
from optim.param_groups import kinds, param_groups
from parallel import context, tensor
from parallel.adapter import Adapter
from parallel.autocast_linear import keep_no_copies
from parallel.ddp import DDP
from parallel.fsdp import FSDP
from parallel.zero import ZeRO
from run.auto import resolve_loss_chunk
from run.build import stepped_by_rows
from settings.fields import ARCHS, Config

FLAGS = {
    "--quick": "",
    "--job": "gpt2_124m|default",
    "--ranks": "[1-8]",
    "--loss_chunk": "none|\\d+",
}


@dataclasses.dataclass(frozen=True)
class Job:
    name: str
    arch: str
    optim: str
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    sequences: int  # of a rank's micro-batch
    block_size: int


JOBS = (
    Job("gpt2_124m", "gpt2", "adamw", 12, 12, 768, 50304, 4, 1024),
    Job("default", "modern", "muon", 4, 4, 256, 256, 16, 256),
)
SMALL = (
    Job("gpt2_124m", "gpt2", "adamw", 2, 2, 32, 8192, 2, 512),
    Job("default", "modern", "muon", 2, 2, 32, 256, 4, 128),
)
COLUMNS = ("job", "layout", "ranks", "loss_chunk", "weights", "gradients", "state", "rest", "peak",
           "predicted", "ratio")  # fmt: skip


def layout_of(name: str, group: dist.ProcessGroup | None, by_rows: set[str]):
    """The replicas. by_rows: the parameters that the optimizer steps element by element."""
    cpu = torch.device("cpu")
    if name in ("ddp", "cp"):
        return DDP(group, cpu)
    if name == "tp":
        return DDP(None, cpu)
    if name == "fsdp":
        return FSDP(group, cpu)
    return ZeRO(group, cpu, int(name[-1]), by_rows=by_rows)


def step(job: Job, layout: str, loss_chunk: int | None, rank: int = 0, world: int = 1) -> list:
    """Bytes on this rank: weights, gradients, state, and the peak of a step."""
    traits = {f.name for f in dataclasses.fields(GPTConfig)} & ARCHS[job.arch].keys()
    config = GPTConfig(
        n_layer=job.n_layer,
        n_head=job.n_head,
        n_kv_head=job.n_head,
        n_embd=job.n_embd,
        block_size=job.block_size,
        vocab_size=job.vocab_size,
        **{name: ARCHS[job.arch][name] for name in traits},
    )
    with torch.device("meta"):
        model = GPT(config)
    model.loss_chunk = loss_chunk
    keep_no_copies(model)
    optimizer_class = find_optimizer(job.optim)
    by_rows = stepped_by_rows(optimizer_class, kinds(model))
    group = dist.group.WORLD if world > 1 else None
    tokens = job.block_size
    if layout == "tp":
        tp = dict(tp_shards=tensor.split(model, group), tp_group=group)
        plain_class = optimizer_class

        def optimizer_class(groups: list[dict]) -> torch.optim.Optimizer:
            return Adapter(plain_class, groups, **tp).optimizer

    if layout == "cp":
        context.split(model, group)
        tokens //= world
    lrs = dict.fromkeys(("embedding", "head", "matrix", "scalar"), 1e-3)
    groups = functools.partial(param_groups, lrs=lrs, weight_decay=0.0, muon=job.optim == "muon")
    found = measure(
        layout_of(layout, group, by_rows),
        model,
        functools.partial(initial_weight, config),
        optimizer_class,
        groups,
        tokens=tokens,
        sequences=job.sequences,
        rank=rank,
        world=world,
        steps=2,
        autocast=torch.bfloat16,
    )
    return [found[name] for name in ("parameters", "gradients", "state", "peak")]


def on_rank(
    rank: int, store: str, world: int, job: Job, layout: str, loss_chunk, file: str
) -> None:
    """One of several ranks: the fullest one's figures go to a file."""
    torch.set_num_threads(1)
    method = Path(store).as_uri()
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
    found = torch.tensor(step(job, layout, loss_chunk, rank, world), dtype=torch.float64)
    of_ranks = [torch.empty_like(found) for _ in range(world)]
    dist.all_gather(of_ranks, found)
    if rank == 0:
        fullest = max(of_ranks, key=lambda bytes_of: bytes_of[-1])
        Path(file).write_text(json.dumps(fullest.tolist()), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def predicted(job: Job, layout: str, loss_chunk: int | None, world: int) -> float:
    tokens = job.sequences * job.block_size
    shapes = gpt_shapes(
        job.n_layer, job.n_embd, job.vocab_size, job.block_size, job.arch, job.n_head
    )
    sizes = job.n_layer, job.n_embd, job.vocab_size, job.arch
    count = functools.partial(activation_bytes, "bf16", tokens, *sizes, loss_chunk=loss_chunk)
    activations = count()
    return bytes_per_rank(
        shapes,
        job.optim,
        layout,
        world,
        "bf16",
        activations=activations,
        inside=activations - count(in_backward=False),
        logits=tokens * job.vocab_size,
        loss_chunk=loss_chunk,
    )["total"]


def row(job: Job, layout: str, loss_chunk: int | None, world: int) -> str:
    if world == 1:
        found = step(job, layout, loss_chunk)
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments = f"{folder}/store", world, job, layout, loss_chunk, f"{folder}/found"
            torch.multiprocessing.spawn(on_rank, arguments, nprocs=world)
            found = json.loads(Path(folder, "found").read_text(encoding="utf-8"))
    weights, gradients, state, peak = found
    rest = peak - weights - gradients - state
    cells = [job.name, layout, world, loss_chunk or "none"]
    cells += [f"{x / 1e6:.4g}" for x in (weights, gradients, state, rest, peak)]
    if layout in LAYOUTS:
        told = predicted(job, layout, loss_chunk, world)
        cells += [f"{told / 1e6:.4g}", f"{told / peak:.2f}"]
    else:
        cells += ["-", "-"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(argv: list[str]) -> int:
    given = runs.flags(argv, FLAGS, __doc__)
    jobs = SMALL if "--quick" in given else JOBS
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for job in jobs:
        if job.name != given.get("--job", job.name):
            continue
        loss_chunk = resolve_loss_chunk(Config(vocab_size=job.vocab_size, device="cpu"))
        if "--loss_chunk" in given:
            words = given["--loss_chunk"]
            loss_chunk = None if words == "none" else int(words)
        usual = 1 if job.name == "gpt2_124m" else 2
        world = int(given.get("--ranks", usual))
        print(row(job, "ddp", loss_chunk, 1), flush=True)
        if world > 1:
            for layout in (*LAYOUTS, "tp", "cp"):
                print(row(job, layout, loss_chunk, world), flush=True)
    return 0
