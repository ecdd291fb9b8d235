"""ZeRO: replicas that stop keeping what another replica already keeps. Stages 1, 2 and 3, by hand.

Every parameter has one owner. Only the owner keeps its optimizer state (from stage 1 on), its
gradient (2), its weights (3). Four parameters on two ranks; capitals are there all the time, small
letters while in use:

              rank 0 owns A, C                      rank 1 owns B, D
              weights    gradients   state          weights    gradients   state
    ddp       A B C D    A B C D     A B C D        A B C D    A B C D     A B C D
    stage 1   A B C D    A B C D     A   C          A B C D    A B C D       B   D
    stage 2   A B C D    A b C d     A   C          A B C D    a B c D       B   D
    stage 3   A b C d    A b C d     A   C          a B c D    a B c D       B   D

Bytes per parameter on N ranks under Adam, the paper's mixed precision (weights 2, gradients 2,
float32 master weights and state 12) and float32 as here (4, 4, 8); bytes sent per rank and step
with A micro-batches, in units of (N-1)/N x the weights' bytes:

              mixed        float32     sent
    ddp       16           16          2                one all-reduce
    stage 1   4 + 12/N     8 + 8/N     1 + 1            gradients to owners, new weights from owners
    stage 2   2 + 14/N     4 + 12/N    A + 1            who frees a gradient must send it first
    stage 3   16/N         16/N        A (1 + 1 + 1)    weights forward, weights backward, gradients

plus what is in use: one unit's gradients and, in stage 3, the weights of two; and what the roll
call of parallel/ddp.py sends, 2 (N-1)/N bytes a parameter tensor. (For one micro-batch stages 1 and
2 are the same thing: no gradient waits for another.)

A unit is a block, or what comes before the blocks (0), or what follows them. When backward has left
a unit, its gradients start for their owners, in flat parts of at most `bucket_mb`, while the next
unit computes. In stage 3 weights are broadcast one unit ahead of their use, and then freed:

    forward  | compute 0 | compute 1 | compute 2 |  backward | compute 2 | compute 1 | compute 0 |
             | fetch 1   | fetch 2   |           |           | fetch 1   |           |           |
                         | free 0    | free 1    |                       | free 2    | free 1    |
                                                                         | send 2    | send 1, 0 |

Backward reads no weights of unit 0: they are looked up, not multiplied. With a tied head they are,
at the other end, and so are gains of a norm there: then they stay. What follows the blocks stays
from forward to backward. A gradient that is missing on some ranks counts as zero there; missing on
all, it is None.

All ranks must make the same forward and backward calls, evaluation too; but a rank may skip blocks
(in stage 3 not the last one) or a backward (not in stage 3). To compile, compile `block.forward`:
the hooks on a block must stay outside.

Rajbhandari et al. 2020 (1910.02054). There each rank owns a slice of one flat vector; here whole
parameters, so that any optimizer, Muon too, steps unchanged and its orthogonalisation spreads over
the ranks. The price: the load is even only up to the largest parameters, see parallel/ownership.py.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.allocate import mapped_file
from parallel.coupled import refuse_coupled
from parallel.ddp import cut
from parallel.ownership import owners_by_shape
from parallel.roll_call import drop_stand_ins, finished_first, watch


@dataclass
class Part:
    """Parameters of one owner side by side in one flat tensor: what one broadcast or one reduce
    sends."""

    owner: int
    names: list[str]
    flat: Tensor  # the weights, on the device; of size 0 where and while they are not held
    host: Tensor | None  # the owner's weights if they are offloaded
    params: list[nn.Parameter]  # the model's: views of `flat`
    kept: list[nn.Parameter]  # the optimizer's: views of `host`, or `params` themselves
    work: dist.Work | None = None  # a broadcast on its way


def trained(part: Part) -> bool:
    return any(p.requires_grad for p in part.params)  # may change from step to step


def pieces(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """`flat` cut into views, shaped as the tensors of `like`."""
    return [x.view(p.shape) for x, p in zip(flat.split([p.numel() for p in like]), like)]


class ZeRO:
    """A data-parallel layout, see parallel/protocol.py. With group=None (one replica) nothing is
    sent.

    group: the replicas; device: where the weights are used; stage: 1, 2 or 3; reduce_dtype:
    gradients are sent in it, None their own (an owner's own share is never rounded).
    offload_params, stage 3 only: owners keep and step their weights in host memory (`cpu`) or in
    files under `folder` mapped into it (`disk`). pinned: names that the first rank owns, as they
    are in another stage of a pipeline, too.

    Raises ValueError for another stage, and for offload_params that are unknown or without stage 3.
    """

    shards: dict = {}  # owners step full parameters
    is_primary = True  # nobody else holds what an owner holds

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        stage: int,
        bucket_mb: float = 25.0,
        reduce_dtype: torch.dtype | None = None,
        offload_params: str | None = None,
        folder: str | Path | None = None,
        pinned: tuple[str, ...] = (),
    ):
        if stage not in (1, 2, 3):
            raise ValueError(f"ZeRO has no stage {stage}; take 1, 2 or 3")
        if offload_params not in (None, "cpu", "disk"):
            raise ValueError(f"offload_params={offload_params} is not known; take cpu or disk")
        if offload_params is not None and stage != 3:
            raise ValueError(
                f"offload_params={offload_params} needs stage 3: before it every rank uses all "
                "its weights where they are; type --data_parallel=zero3"
            )
        self.group = group
        self.rank, self.n = (
            (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        )
        self.device, self.stage, self.bucket_bytes = device, stage, bucket_mb * 2**20
        self.reduce_dtype, self.offload, self.folder = reduce_dtype, offload_params, folder
        self.pinned = pinned
        # Each backward sends gradients, and with stage 3 each forward needs weights
        self.backward_is_collective = stage > 1 and group is not None
        # Do weights?
        self.travels = stage == 3 and (group is not None or offload_params is not None)
        # Units whose weights were fetched; gradients on their way
        self.here, self.sending = set(), []
        # Next: the unit whose gradients go next
        self.last, self.in_backward, self.next = True, False, 0
        self.unit = 0  # where forward or backward is
        self.owes = False  # has the micro-batch in hand not yet sent its gradients?
        self.got = set()  # parameters that got a gradient here since the last step
        self.fresh = True  # has nothing been sent since then?
        self.sent_bytes, self.finished, self.pending = 0, True, False  # pending: see finished_first

    # ---- who holds what --------------------------------------------------------------------------
    def parallelize(self, model: nn.Module) -> nn.Module:
        """Allocates what is held here of `model`, whose parameters are on the meta device, and
        watches it."""
        self.model, keys, blocks = model, list(model.blocks), list(model.blocks.values())
        named, unit, made, end = list(model.named_parameters()), {}, {}, len(blocks) + 1
        for name, _ in named:  # in the order of forward
            path = name.split(".")
            unit[name] = (
                keys.index(path[1]) + 1 if path[0] == "blocks" else end if any(unit.values()) else 0
            )
        tied = len(named) < len(list(model.named_parameters(remove_duplicate=False)))
        self.stays = tied or any(p.ndim < 2 for name, p in named if unit[name] == 0)  # does unit 0?
        owners = owners_by_shape({name: p.shape for name, p in named}, self.n)
        owners |= dict.fromkeys(self.pinned, 0)
        self.units = [[] for _ in range(end + 1)]
        spans = [[(n, p) for n, p in named[::-1] if unit[n] == i] for i in range(end + 1)]
        for span in spans if self.stage == 3 else [named[::-1]]:  # in the order of backward
            for run in cut(span, self.bucket_bytes):
                parts = {}
                for name, p in run:
                    parts.setdefault((owners[name], p.requires_grad), {})[name] = p
                for (owner, _), metas in parts.items():
                    self.units[min(unit[n] for n in metas)].append(self.hold(metas, owner, made))
        self.parts = [part for unit in self.units for part in unit]
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
                setattr(module, name, made[p])
            if self.travels and getattr(module, "matmul", None) is F.linear:
                module.matmul = linear

        if self.group is not None:
            for p in made.values():
                watch(p, self.got.add)
        if self.group is not None or self.travels:
            model.register_forward_pre_hook(lambda _, args: self.enter(0, None))
            for i, block in enumerate(blocks, 1):
                block.register_forward_pre_hook(lambda _, args, i=i: self.enter(i, args[0]))
            blocks[-1].register_forward_hook(lambda _, args, out: self.enter(end, out))
            model.register_forward_hook(lambda _, args, out: self.leave(out))
        return model

    def hold(self, metas: dict[str, nn.Parameter], owner: int, made: dict) -> Part:
        """The part of these meta parameters; the real ones go into `made`."""
        like, flat, host = list(metas.values()), None, None
        size, dtype, trained = sum(p.numel() for p in like), like[0].dtype, like[0].requires_grad
        flat = torch.empty(size, dtype=dtype, device=self.device)
        if owner == self.rank and self.offload == "cpu":
            host = torch.empty(size, dtype=dtype, pin_memory=self.device.type == "cuda")
        elif owner == self.rank and self.offload == "disk":
            host = mapped_file(Path(self.folder) / f"{next(iter(metas))}.weights", size, dtype)
        # .data has its own version: to fetch weights again is no change of what autograd saved for
        # backward
        params = [nn.Parameter(x.data, trained) for x in pieces(flat, like)]
        kept = params if host is None else [nn.Parameter(x, trained) for x in pieces(host, like)]
        made.update(zip(like, params))
        part = Part(owner, list(metas), flat, host, params, kept)
        self.drop(part)
        return part

    @torch.no_grad()
    def init_weights(self, source: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Every parameter held here from source(its name, its full shape), a full tensor on the
        CPU."""
        for part in self.parts:
            if self.stage < 3 or part.owner == self.rank:
                for name, p in zip(part.names, part.kept):
                    p.copy_(source(name, tuple(p.shape)))

    # ---- weights come and go ---------------------------------------------------------------------
    def broadcast(self, part: Part) -> None:
        if self.group is not None:
            part.work = dist.broadcast(
                part.flat, group=self.group, group_src=part.owner, async_op=True
            )
            self.sent_bytes += (self.n - 1) * part.flat.nbytes // self.n

    def wait(self, parts: list[Part]) -> None:
        for part in parts:
            if part.work is not None:
                part.work.wait()
                part.work = None

    def fetch(self, i: int) -> None:
        """Starts bringing the weights of unit i here."""
        if self.travels and i not in self.here:
            self.here.add(i)
            for part in self.units[i]:
                if part.owner != self.rank or part.host is not None:
                    part.flat.untyped_storage().resize_(part.flat.nbytes)
                if part.host is not None:
                    part.flat.copy_(part.host, non_blocking=True)
                self.broadcast(part)

    def need(self, i: int) -> None:
        self.fetch(i)
        self.wait(self.units[i])

    def free(self, units: Iterable[int]) -> None:
        for i in self.here.intersection(units):
            self.here.remove(i)
            self.wait(self.units[i])
            for part in self.units[i]:
                self.drop(part)

    def drop(self, part: Part) -> None:
        """Its weights go, unless they live here; parameters keep their shapes."""
        if self.travels and (part.owner != self.rank or part.host is not None):
            part.flat.untyped_storage().resize_(0)

    # ---- forward ---------------------------------------------------------------------------------
    def last_micro_batch(self, flag: bool) -> None:
        """Before each micro-batch (in a pipeline, its backward): does backward now complete the
        gradients?"""
        self.send_what_is_owed()
        if self.finished:  # a new step begins
            self.sent_bytes, self.finished = 0, False
        self.last, self.owes = flag, True

    def send_what_is_owed(self) -> None:
        """Where no backward followed the last call of last_micro_batch."""
        if self.owes:
            self.next = len(self.units) - 1
            self.send(0)
            self.collect()

    def enter(self, i: int, x: Tensor | None) -> None:
        """Forward enters unit i with x, from unit i-1. If this rank has skipped some before i, it
        fetches and later sends for them all the same, in the other ranks' order."""
        # Whatever an earlier forward without a backward, or a backward that failed, left behind
        if i == 0:
            self.in_backward, self.sending, self.unit = False, [], -1
            self.free(range(len(self.units)))
        if self.in_backward:  # activation checkpointing computes unit i again
            return self.need(i)
        before = self.unit = min(self.unit, i - 1)
        while self.unit < i:
            self.unit += 1
            if self.unit > 1 or not self.stays:
                self.free([self.unit - 1])
            self.need(self.unit)
            if self.unit + 1 < len(self.units):
                self.fetch(self.unit + 1)
        # A stage's input is a leaf: end() follows at once
        if x is not None and x.grad_fn is not None:
            x.register_hook(lambda _: self.back(before))

    def leave(self, out: Tensor) -> None:
        """Forward ends."""
        if out.requires_grad:
            out.register_hook(lambda _: self.begin())
        else:
            self.free(range(len(self.units)))

    # ---- backward --------------------------------------------------------------------------------
    def begin(self) -> None:
        """Backward begins."""
        self.in_backward, self.pending = True, True
        self.next, self.unit = len(self.units) - 1, len(self.units)
        torch.autograd.Variable._execution_engine.queue_callback(self.end)
        self.back(self.next)

    def back(self, i: int) -> None:
        """Backward comes to unit i, from i+1 or from above units that this rank has skipped."""
        while self.unit > i:
            self.unit -= 1
            self.free(range(self.unit + 1, len(self.units)))
            if self.unit > 0:
                self.need(self.unit)
            if self.unit > 1:
                self.fetch(self.unit - 1)
            self.send(self.unit + 1)

    def end(self) -> None:
        """Backward ends, perhaps without reaching the first units: all ranks must still send the
        same."""
        self.send(0)
        self.collect()
        self.free(range(len(self.units)))
        self.in_backward, self.owes = False, self.stage == 1 and not self.last

    @torch.no_grad()
    def send(self, i: int) -> None:
        """Starts the gradients of the units from `next` down to i for their owners."""
        if self.group is None or (self.stage == 1 and not self.last):
            return
        for unit in range(self.next, i - 1, -1):
            self.collect()
            for part in filter(trained, self.units[unit]):
                flat = torch.zeros_like(part.flat, dtype=self.reduce_dtype)
                # The owner sends zeros: its own share, and the sum so far, are in its p.grad.
                for p, x in zip(part.params, pieces(flat, part.params)):
                    if self.fresh and p.grad is None:
                        self.got.discard(p)  # that was in a probe which was thrown away
                    if part.owner != self.rank and p.grad is not None:
                        x.copy_(p.grad)
                        p.grad = None
                work = dist.reduce(flat, group=self.group, group_dst=part.owner, async_op=True)
                self.sending.append((part, flat, work))
                self.sent_bytes += (self.n - 1) * flat.nbytes // self.n
        self.next, self.fresh = min(self.next, i - 1), self.fresh and i > 0

    @torch.no_grad()
    def collect(self) -> None:
        """Waits for the gradients on their way; owners add them to their own."""
        for part, flat, work in self.sending:
            work.wait()
            for p, x in zip(part.params, pieces(flat, part.params)):
                if part.owner == self.rank:
                    p.grad = x.to(p.dtype, copy=True) if p.grad is None else p.grad.add_(x)
        self.sending = []

    # ---- the step --------------------------------------------------------------------------------
    def mine(self) -> dict[str, nn.Parameter]:
        """By name and in the model's order, the parameters owned by this rank, as its optimizer
        sees them."""
        kept = {
            n: p
            for part in self.parts
            if part.owner == self.rank
            for n, p in zip(part.names, part.kept)
        }
        return {n: kept[n] for n, _ in self.model.named_parameters() if n in kept}

    def finish_gradients(self) -> None:
        """After the last backward: owners hold the gradients' sums over all replicas, other ranks
        nothing. What no replica has is None."""
        self.last = True  # where weight gradients come later, no micro-batch was called so
        self.send_what_is_owed()
        self.finished, self.owes, self.pending, self.fresh = True, False, False, True
        params = [p for part in self.parts for p in part.params]
        self.sent_bytes += drop_stand_ins(params, self.got, self.group, self.device)
        for part in self.parts:
            for p, kept in zip(part.params, part.kept):
                if kept is not p and p.grad is not None:  # offloaded
                    kept.grad, p.grad = p.grad.cpu(), None

    def gradients(self) -> dict[str, Tensor]:
        """After finish_gradients: by name, the summed gradients of the parameters owned by this
        rank."""
        return {n: p.grad for n, p in self.mine().items() if p.grad is not None}

    def make_optimizer(self, cls, groups: list[dict], **arguments) -> torch.optim.Optimizer:
        """The optimizer of this rank's own parameters; its step() moves the weights of all ranks.
        It raises RuntimeError for gradients not yet summed, ValueError for late parameters."""
        mine = self.mine()
        names = [[n for n in group["names"] if n in mine] for group in groups]
        groups = [
            group | {"names": ns, "params": [mine[n] for n in ns]}
            for group, ns in zip(groups, names)
        ]
        if self.group is not None:
            refuse_coupled(cls, groups, arguments)
        optimizer = finished_first(cls(groups, **arguments), self)
        optimizer.register_step_post_hook(lambda *_: self.broadcast_weights())
        if self.group is not None:
            optimizer.add_param_group = self.refuse
        return optimizer

    def refuse(self, group: dict) -> None:
        raise ValueError(
            "add_param_group: under ZeRO every rank would step these parameters, with "
            "gradients of its own; give all groups to make_optimizer"
        )

    def broadcast_weights(self) -> None:
        """After the owners' weights changed: stages 1 and 2 send them to all, stage 3 when they are
        used."""
        changed = [] if self.stage == 3 else [*filter(trained, self.parts)]
        for part in changed:
            self.broadcast(part)
        self.wait(changed)

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

    def weights(self) -> dict[str, Tensor]:
        """By name, what this rank has to put into a checkpoint: nothing a lower rank already puts
        there."""
        if self.stage == 3:
            return self.mine()
        return dict(self.model.named_parameters()) if self.rank == 0 else {}


# ---- bfloat16 without copies of the weights ------------------------------------------------------
class Linear(torch.autograd.Function):
    """x·Wᵀ + b in autocast's dtype. Autocast itself keeps a cast copy of each W until backward, and
    no freeing of W frees that; this one casts W again. (Autograd casts gradients to the dtype they
    belong to.)
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # (..., K), (N, K); dy (..., N)
        rows, needs = dy.flatten(0, -2), ctx.needs_input_grad
        dx = dy @ weight.to(dy.dtype) if needs[0] else None
        dweight = rows.t() @ x.flatten(0, -2) if needs[1] else None
        return dx, dweight, rows.sum(0) if needs[2] else None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    if torch.is_autocast_enabled(x.device.type):
        return Linear.apply(x, weight, bias, torch.get_autocast_dtype(x.device.type))
    return F.linear(x, weight, bias)
