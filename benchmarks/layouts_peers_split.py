"""The other side of `bench.py layouts`: how torch cuts up matrices, sequences and layers.

A function takes the job of one rank (layouts_job.py) and returns its step(i). All ranks share one
batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.layouts_job import Job, adamw
from benchmarks.layouts_peers import in_ddp

Step = Callable[[int], torch.Tensor]


# ---- matrices and sequences ----------------------------------------------------------------------
def parallelized(job: Job, sequence: bool = False) -> Step:
    """parallelize_module, with the loss over shards of the words by loss_parallel.

    sequence: between the products each rank has its share of the tokens. q, k and v share one
    PrepareModuleInput, so that their input is gathered, and its gradient summed, once.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    between = Shard(1) if sequence else Replicate()
    column = ColwiseParallel()
    row = RowwiseParallel(output_layouts=between)
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "blocks.*.attn": PrepareModuleInput(
            input_layouts=(between, None), desired_input_layouts=(Replicate(), None)
        ),
        **{f"blocks.*.attn.{name}": column for name in "qkv"},
        "blocks.*.attn.proj": row,
        "blocks.*.mlp": PrepareModuleInput(
            input_layouts=(between,), desired_input_layouts=(Replicate(),)
        ),
        "blocks.*.mlp.fc": column,
        "blocks.*.mlp.proj": row,
        "head": ColwiseParallel(
            input_layouts=between, output_layouts=Shard(-1), use_local_output=False
        ),
    }
    if job.norm != "rmsnorm":
        norm = SequenceParallel(sequence_dim=1, use_local_output=True)
        names = ("blocks.*.attn_norm", "blocks.*.mlp_norm", "final_norm")
        plan |= dict.fromkeys(names, norm)
    model = job.model()
    parallelize_module(model, init_device_mesh("cpu", (job.world,)), plan)
    optimizer = adamw(model.parameters())

    def step(i: int) -> torch.Tensor:
        with loss_parallel():
            loss = model(*job.batch(i)) / job.tokens
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().to_local() / job.world

    return step


def parallelized_sequence(job: Job) -> Step:
    return parallelized(job, sequence=True)


def context_parallel(job: Job) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cpu", (job.world,))
    model = in_ddp(job)
    optimizer = adamw(model.parameters())

    def step(i: int) -> torch.Tensor:
        ids, targets = (x.clone() for x in job.batch(i))
        positions = torch.arange(job.block_size)
        with context_parallel(mesh, buffers=[ids, targets, positions], buffer_seq_dims=[1, 1, 0]):
            loss = model(ids, targets, positions) / job.tokens
            # DDP averages.
            (loss * job.world).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# ---- pipelines -----------------------------------------------------------------------------------
def pipelined(job: Job, name: str, chunks: int = 1) -> Step:
    """A schedule of torch.distributed.pipelining, with `chunks` stages a rank."""
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules

    n_stages = chunks * job.world
    mine = [job.rank + chunk * job.world for chunk in range(chunks)]
    if name == "ScheduleZBVZeroBubble":
        mine = [job.rank, n_stages - 1 - job.rank]
    layers = torch.arange(job.n_layer).chunk(n_stages)
    shape = job.sequences, job.block_size
    stages = []
    models = nn.ModuleList()
    for number in mine:
        model = job.model(layers[number].tolist())
        models.append(model)
        # Examples of what goes in and out: else the stage finds the shapes by a forward of its own.
        hidden = torch.zeros(*shape, job.n_embd, requires_grad=True)
        x = torch.zeros(shape, dtype=torch.int64) if number == 0 else hidden
        y = torch.zeros(*shape, job.vocab_size) if number == n_stages - 1 else hidden
        device = torch.device("cpu")
        stages.append(
            pipelining.PipelineStage(model, number, n_stages, device, input_args=x, output_args=y)
        )

    def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    made = getattr(schedules, name)
    schedule = made(stages if chunks > 1 else stages[0], job.micro_batches, loss_fn=loss_fn)
    optimizer = adamw(models.parameters())
    has_first = 0 in mine
    has_last = n_stages - 1 in mine

    def step(i: int) -> torch.Tensor:
        ids, targets = (torch.cat(parts) for parts in zip(*job.all_batches(i)))
        losses = []
        inputs = [ids] if has_first else []
        loss_of = {"target": targets, "losses": losses} if has_last else {}
        schedule.step(*inputs, **loss_of)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().detach() if losses else torch.tensor(0.0)

    return step


def gpipe(job: Job) -> Step:
    return pipelined(job, "ScheduleGPipe")


def one_f_one_b(job: Job) -> Step:
    return pipelined(job, "Schedule1F1B")


def interleaved(job: Job) -> Step:
    return pipelined(job, "ScheduleInterleaved1F1B", 2)


def interleaved_zero_bubble(job: Job) -> Step:
    return pipelined(job, "ScheduleInterleavedZeroBubble", 2)


def zbv(job: Job) -> Step:
    return pipelined(job, "ScheduleZBVZeroBubble", 2)
