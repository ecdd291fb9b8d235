"""Fully sharded data parallel by torch's `fully_shard` (FSDP2): weights, gradients and optimizer
state in shards, one unit for each block and one for the rest (embedding, last norm, head).

                            rank 0             rank 1
    between steps           W[:half]           W[half:]
    forward of a block      W  -> y, drop W    W  -> y, drop W          all-gather before
    backward of a block     W  -> g0, drop W   W  -> g1, drop W         all-gather before
    after it                (g0+g1)[:half]     (g0+g1)[half:]           reduce-scatter
    optimizer               W[:half], state    W[half:], state          none, or parallel/adapter.py

Bytes sent per rank and step, B those of the weights, N ranks, m micro-batches; three ways to trade
them for memory:

    reshard=True   FULL_SHARD     a block is forgotten after forward and backward: (2m+1) (N-1)/N B
    reshard=False  SHARD_GRAD_OP  gathered once a step, forgotten after the last backward:
                                  2 (N-1)/N B
    shard=S < N    hybrid         sharded over S neighbours, N/S replicas of that: the same with S
                                  for N, and an all-reduce of 2 (N-S)/N B/S; shard=1 is NO_SHARD,
                                  that is DDP

Embedding and head are needed first and last, so their unit is gathered once a step in any case.
Gradients are reduced once, after the last micro-batch; until then each rank keeps them whole. While
one unit computes, the next one is already being gathered. To all this come 2 (N-1)/N bytes a
parameter tensor, the roll call of parallel/roll_call.py.

FSDP2 leaves a missing gradient out of what it reduces, and a rank that has it waits in vain for the
others; here zeros stand for it. One that is missing on all ranks is None in the end. What cannot be
mended: one rank skips a whole block, its output, or a backward. Then gathers no longer match, and
all ranks hang or abort.

FSDP2 means to average gradients; here they are sums, for the loss is already divided by the
constant count of the global batch's tokens. It also leaves weights unsharded that were gathered for
a forward without a backward, as in evaluation, and would train on with them although the shards
have changed since: here they are resharded after every forward under no_grad.

The optimizer never sees a DTensor: parallel/adapter.py. offload_params keeps the shards in the
CPU's memory (`cpu`) or in memory-mapped files (`disk`), the optimizer's step and its state too on
the CPU; gradients are brought there. References: Zhao et al. 2023 (2304.11277), Rajbhandari et al.
2019 (1910.02054).
"""

import functools
import itertools
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from parallel.adapter import Adapter
from parallel.allocate import allocate, mapped_file
from parallel.mesh import new_group
from parallel.roll_call import drop_stand_ins, finished_first
from parallel.shard import Shard, shard_of


class FSDP:
    """A data-parallel layout, see parallel/protocol.py. With group=None (one replica) it is the
    identity.

    group: the replicas; shard: over how many of them a weight is spread, None = all; reduce_dtype:
    in which gradients are summed, None = their own; param_dtype: in which weights are gathered and
    used, None = their own; offload_params: None, "cpu" or "disk", the latter in files in `folder`.
    tp_shards, tp_group: parameters that already are shards, see parallel/adapter.py. Raises
    ValueError for a shard that does not divide the group, and for offloading that cannot be.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        shard: int | None = None,
        reshard: bool = True,
        reduce_dtype: torch.dtype | None = None,
        param_dtype: torch.dtype | None = None,
        offload_params: str | None = None,
        folder: str | os.PathLike | None = None,
        tp_shards: dict[str, Shard] | None = None,
        tp_group: dist.ProcessGroup | None = None,
    ):
        n = 1 if group is None else dist.get_world_size(group)
        shard = n if shard is None else shard
        if shard < 1 or n % shard:
            fitting = ", ".join(str(s) for s in range(1, n + 1) if n % s == 0)
            raise ValueError(
                f"--fsdp_shard={shard} does not divide the {n} data-parallel ranks; take {fitting}"
            )
        if offload_params not in (None, "cpu", "disk"):
            raise ValueError(
                f"--offload_params={offload_params} is not known; take cpu, disk or none"
            )
        if offload_params and group is None:
            raise ValueError(
                "--offload_params with --data_parallel=fsdp needs two or more replicas; start "
                "more ranks than tp*cp*pp, or leave it out"
            )
        if offload_params == "disk" and folder is None:
            raise ValueError("--offload_params=disk needs a folder for its files")
        self.group, self.device, self.n, self.reshard = group, device, n, reshard
        self.shard_ranks = shard
        self.reduce_dtype, self.param_dtype = reduce_dtype, param_dtype
        self.offload_params, self.folder = offload_params, folder
        self.tp = {"tp_shards": tp_shards, "tp_group": tp_group} if tp_shards else {}
        self.units, self.params, self.adapter, self.micro_batches = [], {}, None, 0
        self.is_primary = True  # no lower rank holds the same gradients and state
        self.backward_is_collective = group is not None  # gathers, in forward too
        self.got = set()  # parameters that got a gradient here since the last step
        self.pending = False  # are there gradients that finish_gradients has not seen?
        self.sent_bytes = 0  # by this rank in a step
        self.shards = {}  # name -> Shard of each parameter of which the optimizer here has one

    def parallelize(self, model: nn.Module) -> nn.Module:
        """Shards `model`, whose parameters are on the meta device, and allocates the shards
        alone."""
        self.model = model
        if self.group is None:
            self.params = dict(allocate(model, self.device).named_parameters())
            return model
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        on_gpu, on_disk = self.device.type == "cuda", self.offload_params == "disk"
        policies = dict(
            mesh=self.make_mesh(),
            mp_policy=MixedPrecisionPolicy(self.param_dtype, self.reduce_dtype),
            offload_policy=(
                CPUOffloadPolicy(pin_memory=on_gpu and not on_disk)
                if self.offload_params
                else OffloadPolicy()
            ),
        )
        blocks = [*model.blocks.values()]
        self.units = [*blocks, model]
        for unit in self.units:
            fully_shard(unit, reshard_after_forward=self.reshard and unit is not model, **policies)
            unit.set_gradient_divide_factor(1.0)
            # A factor of 1 by PREMUL_SUM is NCCL's alone
            unit.set_force_sum_reduction_for_comms(True)
            state = unit._get_fsdp_state()  # private, and named otherwise before torch 2.13
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for shards in filter(None, groups):
                shards.post_backward = functools.partial(self.reduce, shards, shards.post_backward)
        numbers = [int(name) for name in model.blocks]
        if numbers[-1] - numbers[0] == len(numbers) - 1:  # and not several stretches of a pipeline
            for unit, following in itertools.pairwise([model, *blocks]):
                unit.set_modules_to_forward_prefetch([following])
            for unit, following in itertools.pairwise([model, *blocks[::-1]]):
                unit.set_modules_to_backward_prefetch([following])
        model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else self.forget())
        if on_disk:
            self.map_files(model)
        else:
            model.to_empty(device="cpu" if self.offload_params else self.device)
        self.params = dict(model.named_parameters())
        return model

    def make_mesh(self):
        """torch's description of the group: (shard,) or, if hybrid, (replicate, shard)."""
        from torch.distributed.device_mesh import DeviceMesh

        ranks = torch.tensor(dist.get_process_group_ranks(self.group)).view(-1, self.shard_ranks)
        kind, (row,), (column,) = (
            self.device.type,
            *(i for i in (ranks == dist.get_rank()).nonzero().T),
        )
        if self.shard_ranks == self.n:
            return DeviceMesh.from_group(self.group, kind, mesh_dim_names=("shard",))
        neighbours, replicas = (
            new_group(members.tolist(), self.device) for members in (ranks[row], ranks[:, column])
        )
        self.is_primary = int(row) == 0
        names = "replicate", "shard"
        return DeviceMesh.from_group([replicas, neighbours], kind, ranks, mesh_dim_names=names)

    def map_files(self, model: nn.Module) -> None:
        """Every shard's memory is a file in `folder`, which the system writes out when it needs the
        room."""
        numbers, me = itertools.count(), dist.get_rank(self.group) % self.shard_ranks

        def with_memory(p: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
            new = torch.empty_like(p, device="cpu")
            new.to_local().set_(shard)
            return new

        def mapped(p: torch.Tensor) -> torch.Tensor:
            # FSDP2 gathers equal parts, padded
            shape = math.ceil(p.shape[0] / self.shard_ranks), *p.shape[1:]
            path = Path(self.folder) / f"shard-{dist.get_rank()}-{next(numbers)}.bin"
            flat = mapped_file(path, math.prod(shape), p.dtype)
            return with_memory(p, flat.view(shape))

        def without_padding(p: torch.Tensor) -> torch.Tensor:
            start = me * math.ceil(p.shape[0] / self.shard_ranks)
            return with_memory(p, p.to_local()[: max(0, p.shape[0] - start)])

        model._apply(mapped)
        model._apply(without_padding)  # now that FSDP2 has seen the whole of the memory

    def reduce(self, shards, reduce: Callable, *args) -> None:
        """FSDP2's `reduce` of one unit's gradients, with zeros for those that are missing here."""
        if shards.reduce_grads:
            self.pending = True
            params = [
                p
                for p in shards.fsdp_params
                if p.sharded_param.requires_grad and hasattr(p, "_unsharded_param")
            ]  # it has been gathered once
            for p in params:
                if p.unsharded_param.grad is not None or p.unsharded_accumulated_grad is not None:
                    self.got.add(p.sharded_param)
                else:
                    p.unsharded_param.grad = torch.zeros_like(p.unsharded_param)
            if any(p.unsharded_accumulated_grad is not None for p in params):
                for p in params:  # in reduce_dtype, all of them
                    if p.unsharded_accumulated_grad is None:
                        p.to_accumulated_grad_if_needed()
        reduce(*args)

    def forget(self) -> None:
        for unit in self.units:
            unit.reshard()

    @torch.no_grad()
    def init_weights(self, source: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
        """Every parameter from source(its name, its full shape), a full tensor on the CPU."""
        self.forget()
        for name, p in self.params.items():
            full = source(name, tuple(p.shape))
            if self.group is None:
                p.copy_(full)
            else:
                here = p.to_local()
                here.copy_(shard_of(p).narrow(full, here.shape))
        if self.adapter is not None:
            self.adapter.gather_weights()

    def last_micro_batch(self, flag: bool) -> None:
        """Before each micro-batch (in a pipeline, its backward): does backward now complete the
        gradients?"""
        self.micro_batches += 1
        if self.group is not None:
            self.model.set_requires_gradient_sync(flag)
            self.model.set_reshard_after_backward(flag, recurse=not self.reshard)

    def finish_gradients(self) -> None:
        """After the last backward, which has already summed the gradients: what no rank has is
        None. Counts what was sent."""
        gathers, self.micro_batches = 2 * self.micro_batches if self.reshard else 1, 0
        s, replicas, bytes_ = self.shard_ranks, self.n // self.shard_ranks, 0
        for name, p in self.params.items():
            times = gathers if name.startswith("blocks.") else 1
            dtype = self.param_dtype or p.dtype
            bytes_ += (s - 1) * p.numel() * dtype.itemsize * times // s
            gradient = p.numel() * (self.reduce_dtype or dtype).itemsize
            bytes_ += (s - 1) * gradient // s + 2 * (replicas - 1) * gradient // (replicas * s)
        params, self.pending = list(self.params.values()), False
        self.sent_bytes = bytes_ + drop_stand_ins(params, self.got, self.group, self.device)

    @torch.no_grad()
    def gradients(self) -> dict[str, torch.Tensor]:
        """After finish_gradients: by name, the summed gradients' shards that this rank holds."""
        grads = {n: p.grad for n, p in self.params.items() if p.grad is not None}
        return grads if self.group is None else {n: grad.to_local() for n, grad in grads.items()}

    def make_optimizer(self, cls, groups: list[dict], **arguments) -> torch.optim.Optimizer:
        """The optimizer whose step() takes the gradients held here and moves the weights of all
        ranks. It raises RuntimeError before finish_gradients()."""
        if self.group is None and not self.tp:
            return cls(groups, **arguments)
        self.adapter = Adapter(cls, groups, **self.tp, **arguments)
        self.shards = self.adapter.shards
        return finished_first(self.adapter.optimizer, self)

    def broadcast_weights(self) -> None:
        """After something else than step() changed the optimizer's parameters: the other ranks see
        it too."""
        if self.adapter is not None:
            self.adapter.broadcast_weights()

    def discard_step(self) -> None:
        """Nothing is kept of a step whose gradients are not used."""

    def state_dict(self, optimizer_state: dict) -> dict | None:
        """Weights and optimizer state are all there is: no entry of its own in a checkpoint."""

    def load_state_dict(self, read: Callable[[str], dict | int]) -> dict:
        """Takes up nothing; no replica saved a state of its own."""
        return {}

    def outer_weights(self) -> AbstractContextManager:
        """`with` this: the model holds the weights to evaluate, as it always does."""
        return nullcontext()

    def weights(self) -> dict[str, torch.Tensor]:
        """By name, what this rank has to put into a checkpoint: DTensors, which know what shard
        this is."""
        return self.params
