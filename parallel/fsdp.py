"""Fully sharded data parallel by torch's `fully_shard` (FSDP2): all that a step needs, in shards.

Weights, gradients and optimizer state are sharded unit by unit: a unit for each block, and one for
the rest (embedding, last norm, head).

                            rank 0             rank 1
    between steps           W[:half]           W[half:]
    forward of a block      W  -> y, drop W    W  -> y, drop W          all-gather before
    backward of a block     W  -> g0, drop W   W  -> g1, drop W         all-gather before
    after it                (g0+g1)[:half]     (g0+g1)[half:]           reduce-scatter
    optimizer               W[:half], state    W[half:], state          none, or see below

Three ways to trade bytes for memory. Bytes sent per rank and step, with B the bytes of the weights,
N ranks and m micro-batches:

    reshard=True   FULL_SHARD     a block is freed after forward and after backward:
                                  (2m+1) (N-1)/N B
    reshard=False  SHARD_GRAD_OP  a block is gathered once a step and freed after the last backward:
                                  2 (N-1)/N B
    shard=S < N    hybrid         sharded over S neighbours, with N/S replicas of them: the same
                                  with S for N, and an all-reduce of 2 (N-S)/N B/S. shard=1 is
                                  NO_SHARD, that is DDP

The roll call of parallel/replicas.py adds 2 (N-1)/N bytes for each parameter tensor. Embedding and
head are needed first and last, so their unit is gathered once a step in any case. Gradients are
reduced once, after the last micro-batch; until then each rank keeps full ones. While one unit
computes, the next one is already being gathered.

What we changed:
- FSDP2 leaves a missing gradient out of what it reduces, and a rank that has it waits in vain for
  the others. Here zeros take its place, and one that is missing on all ranks is None in the end. We
  cannot repair a rank that skips a whole block, its output, or a backward: then gathers no longer
  match, and all ranks hang or abort.
- FSDP2 averages gradients. Here they are summed, for the loss is already divided by the number of
  tokens in the global batch.
- gloo gathers into a copy: up to 8 ranks, broadcasts straight into place take half of the CPU time.
- After a forward without a backward, as in evaluation, FSDP2 leaves weights gathered. It would
  train on with them although the shards have changed since. Here every forward under no_grad ends
  with resharding.

The optimizer never sees a DTensor. One that works element by element (SGD, AdamW, Lion) steps plain
tensors in the very memory of the shards, and nothing is sent. For one that needs a whole matrix,
row or norm (Muon, SOAP), parallel/adapter.py gathers each weight at one rank; that takes a class
without `elementwise = True` that is not one of torch's. offload_params keeps the shards in host
memory ("cpu") or in memory-mapped files ("disk"). Then gradients come to the host, and the
optimizer steps there and keeps its state there.

parallelize(model) keeps the model's own weights and gives every replica those of rank 0, and its
buffers. For parameters on the meta device nothing is sent: init_weights(source) gives each rank its
shards. A step() before finish_gradients(), and a last_micro_batch(False) that no True follows, are
RuntimeErrors. Where last_micro_batch() is forgotten, each backward reduces, and the sums are right.
Whoever drops micro-batches before the last one calls discard_step() and zero_grad().

References: Zhao et al. 2023 (2304.11277), Rajbhandari et al. 2019 (1910.02054).

Neighbours: parallel/replicas.py

(With tensor parallelism and with optimizers that are not elementwise, copy parallel/adapter.py,
owners.py, shard.py and mesh.py too; hybrid needs mesh.py.)

Example:
    import tempfile, torch
    import torch.distributed as dist, torch.multiprocessing as mp
    from parallel.fsdp import FSDP

    def train(rank, file):
        dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
        torch.manual_seed(rank)  # rank 0's weights count
        replicas = FSDP(dist.group.WORLD, torch.device("cpu"), blocks="")
        layers = [torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)]
        model = replicas.parallelize(torch.nn.Sequential(*layers))  # the blocks are its children
        optimizer = replicas.make_optimizer(torch.optim.AdamW, model.named_parameters(), lr=0.01)
        for step in range(60):
            x = torch.randn(16, 8)  # this rank's own samples
            loss = (model(x) - x.mean(1, keepdim=True)).square().sum() / 32
            loss.backward()  # 32: the samples of both ranks
            replicas.finish_gradients()
            optimizer.step()
            model.zero_grad()
        held = sum(p.to_local().numel() for p in model.parameters())
        print(f"rank {rank} holds {held} of 354 numbers, loss {loss.item():.4f}")
        assert held == 354 / 2 and loss < 0.1
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(train, (f"{folder}/store",), nprocs=2, start_method="fork")
"""

import functools
import inspect
import itertools
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from parallel.replicas import (
    StepGuard,
    allocate,
    blocks_of,
    broadcast_start,
    drop_stand_ins,
    fill,
    is_elementwise,
    is_gloo,
    mapped_file,
    named_groups,
    refuse_coupled,
)


class Broadcasts:
    """An all-gather for FSDP2: each rank broadcasts its shard straight into everybody's output."""

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op: bool = False) -> None:
        """input_tensor is this rank's part of output_tensor (n,), where FSDP2 has put it."""
        works = []
        for rank, part in enumerate(output_tensor.chunk(group.size())):
            works.append(dist.broadcast(part, group=group, group_src=rank, async_op=True))
        # Also with async_op, which is a hint: None says that all is there.
        for work in works:
            work.wait()


class FSDP:
    """A data-parallel layout (parallel/protocol.py).

    group: the replicas; None is one replica, for which this layout is the identity
    device: where the weights are used
    shard: over how many ranks of the group a weight is sharded, None = all
    reshard: whether blocks are freed after forward, see above
    reduce_dtype: gradients are summed in it, None = their own
    param_dtype: weights are gathered and used in it, None = their own
    offload_params: None, "cpu", or "disk" with files in `folder`
    tp_shards, tp_group: parameters that are shards already (parallel/adapter.py)
    blocks: where the model has its layers, a ModuleDict, ModuleList or Sequential; "": itself
    others: name -> the group over which this parameter is sharded, where it is not `group`: experts
        that some ranks hold alone (parallel/expert.py); None: this rank alone. Modules that hold
        nothing else are gathered by themselves

    Raises ValueError for a shard that does not divide the group, and for impossible offloading.
    """

    weight_shards: dict = {}  # a DTensor knows its own shard
    also_first = ()
    is_primary = True  # no lower rank holds the same gradients and state; hybrid: see make_mesh

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
        tp_shards: dict[str, tuple] | None = None,
        tp_group: dist.ProcessGroup | None = None,
        blocks: str = "blocks",
        others: dict[str, dist.ProcessGroup | None] | None = None,
    ):
        world = 1 if group is None else dist.get_world_size(group)
        if shard is None:
            shard = world
        if shard < 1 or world % shard:
            fitting = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
            raise ValueError(
                f"--fsdp_shard={shard} does not divide the {world} data-parallel ranks; "
                f"take {fitting}"
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
        self.group = group
        self.device = device
        self.world = world
        self.shard_ranks = shard
        self.reshard = reshard
        self.reduce_dtype = reduce_dtype
        self.param_dtype = param_dtype
        self.offload_params = offload_params
        self.folder = folder
        self.blocks_at = blocks
        self.others = others or {}
        self.tp = {"tp_shards": tp_shards, "tp_group": tp_group} if tp_shards else {}
        self.backward_is_collective = group is not None  # gathers, in forward too
        self.blocks = {}  # name -> module
        self.units = []
        self.shard_groups = []  # of each unit's parameters, as FSDP2 keeps them
        self.params = {}
        # Name -> (full shape, offsets) of each parameter that the optimizer steps in shards.
        self.shards = {}
        self.adapter = None
        self.micro_batches = 0  # in this step so far
        self.is_last = True  # the micro-batch in hand is the last one of the step
        self.got = set()  # parameters that got a gradient here since the last step
        self.unfinished = False  # a gradient was reduced after the last finish_gradients()
        self.sent_bytes = 0  # by this rank in a step

    # ---- who holds what --------------------------------------------------------------------------
    def parallelize(self, model: nn.Module) -> nn.Module:
        """Shards `model`; all ranks get their shards of rank 0's weights.

        For parameters on the meta device their shards get memory, for init_weights() to fill.
        Raises ValueError for a model without blocks.
        """
        self.model = model
        is_meta = all(p.is_meta for p in model.parameters())
        broadcast_start(model, self.group, self.device, self.others)
        if self.group is None or not is_meta:
            allocate(model, self.device)
        if self.group is None:
            self.params = dict(model.named_parameters())
            return model
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.blocks = blocks_of(model, self.blocks_at)
        blocks = [*self.blocks.values()]
        self.units = [unit for unit in blocks if next(unit.parameters(), None) is not None]
        self.units.append(model)
        meshes = self.other_meshes(model)
        mesh = self.make_mesh()
        self.units = [*meshes, *self.units]  # what is inside a block comes before it
        policies = dict(
            mp_policy=MixedPrecisionPolicy(self.param_dtype, self.reduce_dtype),
            offload_policy=self.offload_policy(),
        )
        for unit in self.units:
            reshard = self.reshard and unit is not model
            where = meshes.get(unit, mesh)
            fully_shard(unit, mesh=where, reshard_after_forward=reshard, **policies)
            # A sum, not a mean. FSDP2 would multiply by the factor 1 while it reduces, an operation
            # that only NCCL has: the second line asks for a plain sum.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            if self.shard_ranks <= 8 and is_gloo(self.group, self.device):
                unit.set_custom_all_gather(Broadcasts())
            # Zeros for missing gradients, before each reduce. (Private; before torch 2.13 a state
            # has one group under another name.)
            state = unit._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for shards in filter(None, groups):
                self.shard_groups.append(shards)
                shards.post_backward = functools.partial(self.reduce, shards, shards.post_backward)
        self.prefetch(model, [unit for unit in self.units[:-1] if unit not in meshes])
        model.register_forward_pre_hook(self.before_forward, prepend=True)
        model.register_forward_hook(self.after_forward)

        # Memory comes after fully_shard, so no rank ever allocates a full weight here.
        if self.offload_params == "disk":
            self.map_files(model)
        elif is_meta:
            where = "cpu" if self.offload_params else self.device
            model._apply(lambda x: torch.empty_like(x, device=where) if x.is_meta else x)
        self.params = dict(model.named_parameters())
        self.guard = StepGuard(self, model.parameters)
        return model

    def offload_policy(self):
        """What FSDP2 is told about the shards' memory."""
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

        if self.offload_params is None:
            return OffloadPolicy()
        # A mapped file cannot be pinned.
        pins = self.device.type == "cuda" and self.offload_params != "disk"
        return CPUOffloadPolicy(pin_memory=pins)

    def prefetch(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        """While one unit computes, the next one is gathered, in forward and in backward."""
        layers = [name.rpartition(".")[2] for name in self.blocks]
        numbers = [int(name) for name in layers if name.isdecimal()]
        is_one_chunk = not numbers or numbers[-1] - numbers[0] == len(numbers) - 1
        if not is_one_chunk:
            # A pipeline runs one of several model chunks at a time: another unit would come next.
            return
        for unit, following in itertools.pairwise([model, *blocks]):
            unit.set_modules_to_forward_prefetch([following])
        for unit, following in itertools.pairwise([model, *blocks[::-1]]):
            unit.set_modules_to_backward_prefetch([following])

    def other_meshes(self, model: nn.Module) -> dict:
        """Module -> torch's description of its group, of the largest that hold `others` alone."""
        found = {}
        if not self.others:
            return found
        from torch.distributed.device_mesh import DeviceMesh

        from parallel.mesh import new_group

        alone = None  # a group of this rank
        for name, module in model.named_modules():
            names = [f"{name}.{key}" for key, _ in module.named_parameters()]
            is_inside = any(name.startswith(f"{outer}.") for outer, _ in found.values())
            if not names or is_inside or not all(n in self.others for n in names):
                continue
            group = self.others[names[0]]
            if group is None:
                alone = group = alone or new_group([dist.get_rank()], self.device)
            mesh = DeviceMesh.from_group(group, self.device.type, mesh_dim_names=("shard",))
            found[module] = name, mesh
        return {module: mesh for module, (_, mesh) in found.items()}

    def make_mesh(self):
        """torch's description of the group: (shard,) or, if hybrid, (replicate, shard)."""
        from torch.distributed.device_mesh import DeviceMesh

        kind = self.device.type
        if self.shard_ranks == self.world:
            return DeviceMesh.from_group(self.group, kind, mesh_dim_names=("shard",))

        from parallel.mesh import new_group

        # A row of this matrix has all shards of the model, a column has all replicas of one shard.
        ranks = torch.tensor(dist.get_process_group_ranks(self.group)).view(-1, self.shard_ranks)
        (row,), (column,) = (ranks == dist.get_rank()).nonzero().T
        neighbours = new_group(ranks[row].tolist(), self.device)
        replicas = new_group(ranks[:, column].tolist(), self.device)
        self.is_primary = int(row) == 0
        names = "replicate", "shard"
        return DeviceMesh.from_group([replicas, neighbours], kind, ranks, mesh_dim_names=names)

    def map_files(self, model: nn.Module) -> None:
        """The memory of each shard is a file in `folder`. The system writes it out to gain room."""
        numbers = itertools.count()

        def with_memory(p: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
            new = torch.empty_like(p, device="cpu")
            new.to_local().set_(shard)
            return new

        def mapped(p: torch.Tensor) -> torch.Tensor:
            if not hasattr(p, "placements"):
                return p  # a buffer
            shape = (self.padded_rows(p), *p.shape[1:])
            path = Path(self.folder) / f"shard-{dist.get_rank()}-{next(numbers)}.bin"
            flat = mapped_file(path, math.prod(shape), p.dtype)
            if not p.is_meta:
                flat[: p.to_local().numel()] = p.to_local().flatten()
            return with_memory(p, flat.view(shape))

        def without_padding(p: torch.Tensor) -> torch.Tensor:
            if not hasattr(p, "placements"):
                return p
            length = max(0, p.shape[0] - self.first_row(p))
            return with_memory(p, p.to_local()[:length])

        # FSDP2 gathers from the padded memory that it sees first. If it saw a shard without
        # padding, it would copy that out of its file into memory.
        model._apply(mapped)
        model._apply(without_padding)

    def padded_rows(self, p: torch.Tensor) -> int:
        # FSDP2 gathers shards of equal length, so the last ones have padding.
        return math.ceil(p.shape[0] / shard_ranks(p))

    def first_row(self, p: torch.Tensor) -> int:
        """Where this rank's rows of p begin; past its end if it has none."""
        return p.device_mesh.get_local_rank("shard") * self.padded_rows(p)

    @torch.no_grad()
    def init_weights(self, source: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
        """Sets every parameter to source(its name, its full shape), a full tensor on the CPU.

        From a source that can give shards it takes this rank's rows alone.
        """
        # Weights gathered earlier would hide the new values of the shards.
        self.reshard_all()
        for name, p in self.params.items():
            if self.group is None:
                fill(p, source, name)
            else:
                rows = p.to_local()
                fill(rows, source, name, p.shape, self.first_row(p))
        if self.adapter is not None:
            self.adapter.gather_weights()

    # ---- forward and backward --------------------------------------------------------------------
    def last_micro_batch(self, flag: bool) -> None:
        """Before each micro-batch (in a pipeline: before its backward).

        flag: does its backward complete the gradients?
        """
        self.micro_batches += 1
        self.is_last = flag
        if self.group is not None:
            # Earlier micro-batches keep full gradients here; the last one reduces their sum.
            self.model.set_requires_gradient_sync(flag)
            # Until then embedding and head stay gathered, and with reshard=False all units.
            self.model.set_reshard_after_backward(flag, recurse=not self.reshard)

    def before_forward(self, *_) -> None:
        # FSDP2 sums the last unit when a backward ends. (Private.)
        did_raise = self.model._get_fsdp_state()._state_ctx.post_backward_final_callback_queued
        if did_raise:
            self.model.reset_iter_state()
            self.drop_full_gradients()

    def after_forward(self, *_) -> None:
        # No backward will reshard what this forward has gathered.
        if not torch.is_grad_enabled():
            self.reshard_all()

    def reshard_all(self) -> None:
        for unit in self.units:
            unit.reshard()

    def reduce(self, shards, reduce: Callable, *args) -> None:
        """FSDP2's `reduce` of one unit's gradients, with zeros in place of those missing here.

        shards: the unit's parameters, as FSDP2 keeps them.
        """
        if shards.reduce_grads:
            self.unfinished = True
            self.stand_in(shards)
        reduce(*args)

    def stand_in(self, shards) -> None:
        """Zeros for the gradients that are missing here, in the dtype of the others."""
        # A parameter that was never gathered has no memory for a gradient.
        params = [
            p
            for p in shards.fsdp_params
            if p.sharded_param.requires_grad and hasattr(p, "_unsharded_param")
        ]
        for p in params:
            if p.unsharded_param.grad is not None or p.unsharded_accumulated_grad is not None:
                self.got.add(p.sharded_param)
            else:
                p.unsharded_param.grad = torch.zeros_like(p.unsharded_param)
        # Gradients of several micro-batches add up in reduce_dtype: all of a unit, or none.
        if any(p.unsharded_accumulated_grad is not None for p in params):
            for p in params:
                if p.unsharded_accumulated_grad is None:
                    p.to_accumulated_grad_if_needed()

    # ---- the step --------------------------------------------------------------------------------
    def finish_gradients(self) -> None:
        """After the last backward, which has already summed the gradients over all replicas.

        A gradient that is missing on all replicas is None.
        """
        if self.group is not None and not self.is_last:
            raise RuntimeError(
                "finish_gradients() came before the last micro-batch, so nothing is summed yet; "
                "call last_micro_batch(i + 1 == n) before each of a step's n backward()"
            )
        self.sent_bytes = self.bytes_of_step(self.micro_batches)
        self.micro_batches = 0
        self.unfinished = False
        params = list(self.params.values())
        self.sent_bytes += drop_stand_ins(params, self.got, self.group, self.device)

    def bytes_of_step(self, micro_batches: int) -> int:
        """Bytes that this rank sends for gathers and reduces, by the formulas above."""
        block_gathers = 2 * micro_batches if self.reshard else 1
        total = 0
        for name, p in self.params.items():
            in_block = name.startswith(tuple(f"{block}." for block in self.blocks))
            gathers = block_gathers if in_block else 1
            dtype = self.param_dtype or p.dtype
            weight = p.numel() * dtype.itemsize
            gradient = p.numel() * (self.reduce_dtype or dtype).itemsize
            n = shard_ranks(p)
            replicas = p.device_mesh.size() // n if hasattr(p, "placements") else 1
            total += (n - 1) * weight * gathers // n
            total += (n - 1) * gradient // n
            total += 2 * (replicas - 1) * gradient // (replicas * n)
        return total

    @torch.no_grad()
    def gradients(self) -> dict[str, torch.Tensor]:
        """After finish_gradients: this rank's shards of the summed gradients, by name."""
        grads = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        if self.group is None:
            return grads
        return {name: grad.to_local() for name, grad in grads.items()}

    def make_optimizer(self, cls, groups: list[dict], **arguments) -> torch.optim.Optimizer:
        """The optimizer of this rank's shards; its step() moves the weights of all ranks.

        groups: as torch's optimizers take them. step() raises RuntimeError if the gradients are not
        summed yet. Raises ValueError for a method that couples parameters.
        """
        if self.group is None and not self.tp:
            return cls(groups, **arguments)
        groups = named_groups(self.model, groups)
        if not self.tp and is_elementwise(cls, {}):
            return self.admit(self.step_shards(cls, groups, arguments))
        try:
            from parallel.adapter import Adapter
        except ImportError as error:
            raise ImportError(
                f"{cls.__name__} may need full weights, and FSDP shards them: copy adapter.py, "
                "owners.py, shard.py and mesh.py into parallel/ too, or set elementwise = True in "
                "a class that steps each element by itself"
            ) from error

        self.adapter = Adapter(cls, groups, **self.tp, **arguments)
        self.shards = self.adapter.shards
        if self.group is None:
            return self.adapter.optimizer
        return self.admit(self.adapter.optimizer)

    def admit(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The same optimizer, guarded, whose zero_grad() clears the model's gradients too."""
        zero_grad = optimizer.zero_grad

        def zero_both(set_to_none: bool = True) -> None:
            # The optimizer steps tensors of its own, in the memory of the model's.
            zero_grad(set_to_none)
            self.model.zero_grad(set_to_none)

        optimizer.zero_grad = zero_both
        return self.guard.admit(optimizer)

    @torch.no_grad()
    def step_shards(self, cls, groups: list[dict], arguments: dict) -> torch.optim.Optimizer:
        """An optimizer of plain tensors that lie in the memory of the shards."""
        if self.shard_ranks > 1:
            refuse_coupled(cls, groups, arguments)
        self.shards = {}
        plain = {}  # weight -> what the optimizer steps of it: this rank's rows
        mine = []
        for group in groups:
            # A small weight may leave a rank without rows.
            here = {
                name: p
                for name, p in zip(group["names"], group["params"])
                if p.to_local().numel() > 0
            }
            for name, p in here.items():
                plain[p] = nn.Parameter(p.to_local(), p.requires_grad)
                if shard_ranks(p) > 1:
                    self.shards[name] = tuple(p.shape), (self.first_row(p), *[0] * (p.ndim - 1))
            stepped = [plain[p] for p in here.values()]
            mine.append(group | {"params": stepped, "names": list(here)})
        optimizer = cls(mine, **arguments)

        @torch.no_grad()
        def give(_, args: tuple, kwargs: dict) -> None:
            if any(x is not None for x in (*args[1:], *kwargs.values())):
                raise ValueError(
                    "step(closure) has no meaning with sharded weights: they would be needed in "
                    "the middle of a step; call loss.backward() and then step()"
                )
            for p, rows in plain.items():
                # FSDP2 may have moved the shard since the last step.
                rows.data = p.to_local()
                rows.grad = None if p.grad is None else p.grad.to_local()

        def let_go(*_) -> None:
            for rows in plain.values():
                rows.grad = None

        optimizer.register_step_pre_hook(give)
        optimizer.register_step_post_hook(let_go)
        return optimizer

    def broadcast_weights(self) -> None:
        """After something else than step() changed the optimizer's parameters."""
        if self.adapter is not None:
            self.adapter.broadcast_weights()

    def discard_step(self) -> None:
        """In place of optimizer.step(): drops gradients that no zero_grad() sees.

        Those are the full gradients of micro-batches before the last one.
        """
        self.micro_batches = 0
        self.is_last = True
        self.drop_full_gradients()

    def drop_full_gradients(self) -> None:
        for shards in self.shard_groups:
            for p in shards.fsdp_params:
                p.unsharded_accumulated_grad = None
                if hasattr(p, "_unsharded_param"):
                    p.unsharded_param.grad = None

    # ---- at times --------------------------------------------------------------------------------
    def state_dict(self, optimizer_state: dict) -> dict | None:
        """Weights and optimizer state are all there is: no entry of its own in a checkpoint."""

    def load_state_dict(self, read: Callable[[str], dict | int]) -> dict:
        """Takes up nothing, for no replica saved a state of its own."""
        return {}

    def outer_weights(self) -> AbstractContextManager:
        """`with` this: the model holds the weights to evaluate, as it always does."""
        return nullcontext()

    def weights(self) -> dict[str, torch.Tensor]:
        """What this rank puts into a checkpoint, by name: DTensors, which know their own shard."""
        return self.params


def shard_ranks(p: torch.Tensor) -> int:
    """Over how many ranks p is sharded; 1 where it is no DTensor."""
    return p.device_mesh["shard"].size() if hasattr(p, "placements") else 1


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
