"""Our side of `bench.py layouts`: each layout of parallel/, as train.py drives it.

A function takes the job of one rank (layouts_job.py) and returns its step(i).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from benchmarks.layouts_job import OPTIONS, Job, adamw
from parallel import compression, context, pipeline, sequence, tensor
from parallel.ddp import DDP
from parallel.fsdp import FSDP
from parallel.replicas import allocate
from parallel.zero import ZeRO

CPU = torch.device("cpu")
Step = Callable[[int], torch.Tensor]


def replicated(job: Job, replicas) -> Step:
    """Every rank has samples of its own."""
    model = replicas.parallelize(job.empty_model())
    replicas.init_weights(job.source)
    optimizer = replicas.make_optimizer(torch.optim.AdamW, [*model.named_parameters()], **OPTIONS)

    def step(i: int) -> torch.Tensor:
        total = 0.0
        batches = job.replicas_batches(i)
        for k, (ids, targets) in enumerate(batches):
            replicas.last_micro_batch(k + 1 == len(batches))
            loss = model(ids, targets) / (job.tokens * job.world)
            loss.backward()
            total = total + loss.detach()
        replicas.finish_gradients()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return total

    return step


def ddp(job: Job) -> Step:
    return replicated(job, DDP(dist.group.WORLD, CPU))


def zero1(job: Job) -> Step:
    return replicated(job, ZeRO(dist.group.WORLD, CPU, 1))


def zero2(job: Job) -> Step:
    return replicated(job, ZeRO(dist.group.WORLD, CPU, 2))


def zero3(job: Job) -> Step:
    return replicated(job, ZeRO(dist.group.WORLD, CPU, 3))


def fsdp(job: Job) -> Step:
    return replicated(job, FSDP(dist.group.WORLD, CPU))


# ---- compressed gradients ------------------------------------------------------------------------
def compress_fp16(job: Job) -> Step:
    # torch's hook has no error feedback.
    reduce = compression.fp16(error_feedback=False)
    return replicated(job, DDP(dist.group.WORLD, CPU, reduce=reduce))


def compress_bf16(job: Job) -> Step:
    reduce = compression.bf16(error_feedback=False)
    return replicated(job, DDP(dist.group.WORLD, CPU, reduce=reduce))


def compress_powersgd(job: Job) -> Step:
    replicas = DDP(dist.group.WORLD, CPU)
    step = replicated(job, replicas)
    reduce = compression.powersgd(rank=4)

    def plain_at_first(i: int) -> torch.Tensor:
        # As torch's hook, which compresses from the third step on.
        if i == 2:
            replicas.reduce = reduce
        return step(i)

    return plain_at_first


# ---- one batch, which all ranks share ------------------------------------------------------------
def tp(job: Job, split=tensor.split) -> Step:
    group = dist.group.WORLD
    model = job.empty_model()
    shards = split(model, group)
    allocate(model, CPU)
    for name, p in model.named_parameters():
        shape, offsets = shards.get(name, (tuple(p.shape), (0,) * p.ndim))
        full = job.source(name, shape)
        place = tuple(slice(a, a + n) for a, n in zip(offsets, p.shape))
        p.data.copy_(full[place])
    optimizer = adamw(model.parameters())

    def step(i: int) -> torch.Tensor:
        loss = model(*job.batch(i)) / job.tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # All ranks have the loss of all tokens.
        return loss.detach() / job.world

    return step


def tp_sp(job: Job) -> Step:
    return tp(job, sequence.split)


def cp(job: Job) -> Step:
    group = dist.group.WORLD
    replicas = DDP(group, CPU)
    model = job.empty_model()
    context.split(model, group)
    model = replicas.parallelize(model)
    replicas.init_weights(job.source)
    optimizer = adamw(model.parameters())
    mine = context.position_ids(job.block_size, job.world, job.rank)

    def step(i: int) -> torch.Tensor:
        ids, targets = job.batch(i)
        loss = model(ids[:, mine], targets[:, mine], mine) / job.tokens
        loss.backward()
        replicas.finish_gradients()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# ---- pipelines -----------------------------------------------------------------------------------
def pipelined(job: Job, name: str, chunks: int = 1) -> Step:
    pipe = pipeline.Pipeline(dist.group.WORLD, name, job.n_layer, chunks)
    model = job.model(pipe.stage_layers)
    if name == "zerobubble":
        pipe.deferred = pipeline.defer_weight_gradients(model)
    optimizer = adamw(model.parameters())
    like = (job.sequences, job.block_size, job.n_embd), torch.float32, CPU

    def step(i: int) -> torch.Tensor:
        batches = job.all_batches(i)

        def forward(k: int, layers: list[int], x: torch.Tensor | None) -> torch.Tensor:
            ids, targets = batches[k]
            return model(ids if x is None else x, targets, layers=layers)

        losses = pipe.run(len(batches), forward, lambda k: like, 1 / job.tokens)
        optimizer.step()
        optimizer.zero_grad()
        return torch.as_tensor(sum(losses) / job.tokens)

    return step


def gpipe(job: Job) -> Step:
    return pipelined(job, "gpipe")


def one_f_one_b(job: Job) -> Step:
    return pipelined(job, "1f1b")


def interleaved(job: Job) -> Step:
    return pipelined(job, "interleaved", 2)


def zerobubble(job: Job) -> Step:
    return pipelined(job, "zerobubble")
