"""The other side of `bench.py layouts`: torch's own data parallel layouts, and DeepSpeed's ZeRO.

A function takes the job of one rank (layouts_job.py) and returns its step(i). Each is set up as its
documentation has it for speed; gradients are views of DDP's buckets, and fused AdamW steps DTensors
too. These libraries average gradients over replicas, so each loss is a mean over the rank's tokens.
What cuts up a model or a sequence is in layouts_peers_split.py.
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.layouts_job import OPTIONS, Job, adamw
from parallel.compression import first_q

Step = Callable[[int], torch.Tensor]


def replicated(job: Job, model: nn.Module, optimizer, is_last=lambda flag: None) -> Step:
    """Every rank has samples of its own. is_last(flag): before each micro-batch."""

    def step(i: int) -> torch.Tensor:
        total = 0.0
        batches = job.replicas_batches(i)
        for k, (ids, targets) in enumerate(batches):
            is_last(k + 1 == len(batches))
            loss = model(ids, targets) / job.tokens
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total / job.world

    return step


def in_ddp(job: Job) -> nn.Module:
    model = job.model()
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def ddp(job: Job) -> Step:
    model = in_ddp(job)

    def is_last(flag: bool) -> None:
        # What its no_sync() does.
        model.require_backward_grad_sync = flag

    return replicated(job, model, adamw(model.parameters()), is_last)


def zero_redundancy(job: Job) -> Step:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = in_ddp(job)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, **OPTIONS
    )
    return replicated(job, model, optimizer)


def fully_sharded(job: Job, reshard: bool = True) -> Step:
    from torch.distributed.fsdp import fully_shard

    model = job.model()
    for block in model.blocks.values():
        fully_shard(block, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=False)
    return replicated(job, model, adamw(model.parameters()), model.set_requires_gradient_sync)


def shard_grad_op(job: Job) -> Step:
    return fully_sharded(job, reshard=False)


# ---- DeepSpeed -----------------------------------------------------------------------------------
def deepspeed(job: Job, stage: int) -> Step:
    place = {"RANK": job.rank, "LOCAL_RANK": job.rank, "WORLD_SIZE": job.world}
    os.environ |= {name: str(value) for name, value in place.items()}
    import deepspeed

    model = job.model()
    config = {
        "train_micro_batch_size_per_gpu": job.sequences,
        "gradient_accumulation_steps": job.micro_batches,
        # The default buckets are 2 GB. These are 25 MiB, as everybody else's.
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 25 * 2**20 // 4,
            "allgather_bucket_size": 25 * 2**20 // 4,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adamw(model.parameters()), config=config, dist_init_required=False
    )

    def step(i: int) -> torch.Tensor:
        total = 0.0
        for ids, targets in job.replicas_batches(i):
            # It divides by the number of micro-batches itself.
            loss = engine(ids, targets) / (job.sequences * job.block_size)
            engine.backward(loss)
            engine.step()
            total = total + loss.detach() / job.micro_batches
        return total / job.world

    return step


def deepspeed1(job: Job) -> Step:
    return deepspeed(job, 1)


def deepspeed2(job: Job) -> Step:
    return deepspeed(job, 2)


def deepspeed3(job: Job) -> Step:
    return deepspeed(job, 3)


# ---- compressed gradients ------------------------------------------------------------------------
def hooked(job: Job, hook, state) -> Step:
    model = in_ddp(job)
    if hasattr(state, "q_memory_dict"):
        hook = from_our_q(hook, model.module)
    model.register_comm_hook(state, hook)
    return replicated(job, model, adamw(model.parameters()))


def fp16_hook(job: Job) -> Step:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return hooked(job, default_hooks.fp16_compress_hook, dist.group.WORLD)


def bf16_hook(job: Job) -> Step:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return hooked(job, default_hooks.bf16_compress_hook, dist.group.WORLD)


def powersgd_hook(job: Job) -> Step:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    state = powerSGD_hook.PowerSGDState(
        dist.group.WORLD, matrix_approximation_rank=4, start_powerSGD_iter=2
    )
    return hooked(job, powerSGD_hook.powerSGD_hook, state)


def from_our_q(hook, model: nn.Module):
    """PowerSGD's hook with the first Q of parallel/compression.py, for the same numbers."""
    names = {p: name for name, p in model.named_parameters()}

    def begin(state, bucket):
        if state.iter == state.start_powerSGD_iter:
            rank = state.matrix_approximation_rank
            matrices = [p for p in bucket.parameters() if p.ndim > 1]
            qs = [first_q(0, names[p], p.shape[1], rank).flatten() for p in matrices]
            state.q_memory_dict[bucket.index()] = torch.cat(qs)
            state.p_memory_dict[bucket.index()] = torch.empty(rank * sum(map(len, matrices)))
        return hook(state, bucket)

    return begin
