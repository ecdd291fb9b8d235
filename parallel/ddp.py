"""Distributed data parallel: every rank holds the whole model, sees its own rows, and gradients are
summed.

              rank 0              rank 1                          rank 0         rank 1
    weights   W                   W             all-reduce        W              W
    rows      r0 r1               r2 r3        ------------>
    gradient  g(r0)+g(r1)         g(r2)+g(r3)                     g(r0..r3)      g(r0..r3)

Gradients live in flat buckets, filled in the order in which backward produces them (last layer
first). As soon as the last gradient of a bucket is there, its all-reduce starts and runs while
backward goes on with earlier layers. The first micro-batches of an accumulated batch add into the
same buckets and send nothing (others call this `no_sync`).

Bytes sent per rank and step: 2 (N-1)/N x (the gradients' bytes + 1 for each parameter), by ring
all-reduces, however many micro-batches.

The byte is a roll call. A gradient that is missing on some replicas counts as zero there. One that
is missing on all of them stays None, so that the optimizer leaves the parameter, its state and its
decay alone, as it does in one process. (A gradient of zeros is not missing.)

The sum is plain, not a mean: the loss is already divided by the constant count of the global
batch's tokens, so no rank needs to know how many others there are. (`nn.DataParallel` instead runs
one process with a thread per GPU, copies the weights to every GPU at each step and gathers all
outputs on one: slower by design, and long since discouraged.)

Reference: Li et al. 2020, PyTorch Distributed (2006.15704). Ours differs in that `p.grad` is a view
of its bucket, so nothing is copied back.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from parallel.allocate import allocate
from parallel.roll_call import RollCall, finished_first, watch


class Bucket:
    def __init__(self, named: list[tuple[str, nn.Parameter]]):
        self.names, self.params = map(list, zip(*named))
        self.waiting, self.work, self.sent_bytes = len(named), None, 0
        sizes, like = [p.numel() for p in self.params], self.params[0]
        self.flat = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)
        self.views = [v.view_as(p) for v, p in zip(self.flat.split(sizes), self.params)]


class AllReduce:
    """How DDP sums a bucket. Compressor in parallel/compression.py has the same methods, and a
    memory."""

    def __call__(self, bucket: Bucket, group: dist.ProcessGroup):
        """Starts the sum of `bucket.flat` over the group, in place; returns what has a wait()."""
        n = dist.get_world_size(group)
        bucket.sent_bytes = 2 * (n - 1) * bucket.flat.nbytes // n
        return dist.all_reduce(bucket.flat, group=group, async_op=True)

    def forget(self, names: list[str]) -> None:
        """No replica has a gradient of these parameters."""

    def discard_step(self) -> None:
        """The optimizer does not take the step in hand."""

    def state_dict(self, rank: int, world: int) -> dict:
        """What replica `rank` of `world` has to put into a checkpoint."""
        return {}

    def load_state_dict(self, read: Callable[[str], dict | int], rank: int, world: int) -> None:
        """Takes up what `state_dict` gave."""


class DDP:
    """A data-parallel layout, see parallel/protocol.py. With group=None (one replica) nothing is
    sent.

    group: the replicas; device: where the weights live; reduce: starts the sum of one bucket over a
    group, None as AllReduce does it (parallel/compression.py has others).
    """

    # Name -> Shard (parallel/shard.py) of each parameter of which the optimizer has one
    shards: dict = {}
    backward_is_collective = False  # but for the last micro-batch, nothing is sent

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        bucket_mb: float = 25.0,
        reduce: Callable | None = None,
    ):
        self.group, self.device, self.bucket_bytes, self.reduce = (
            group,
            device,
            bucket_mb * 2**20,
            reduce or AllReduce(),
        )
        self.buckets, self.last, self.next = [], True, 0
        self.pending = False  # are there gradients that finish_gradients has not seen?
        self.sent_bytes = 0  # by this rank in the last step
        self.place = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.is_primary = self.place[0] == 0  # no lower rank holds the same gradients and state

    def parallelize(self, model: nn.Module) -> nn.Module:
        """Allocates the parameters of `model`, which are on the meta device, and watches them."""
        self.model = allocate(model, self.device)
        if self.group is not None:
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            for part in cut(named[::-1], self.bucket_bytes):
                bucket = Bucket(part)
                self.buckets.append(bucket)
                for p, view in zip(bucket.params, bucket.views):
                    watch(p, lambda p, b=bucket, v=view: self.arrived(p, b, v))
            for p in (p for p in self.model.parameters() if not p.requires_grad):
                watch(p, self.thawed)
        return self.model

    @torch.no_grad()
    def init_weights(self, source: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
        """Every parameter from source(its name, its full shape), a full tensor on the CPU."""
        for name, p in self.model.named_parameters():
            p.copy_(source(name, tuple(p.shape)))

    def last_micro_batch(self, flag: bool) -> None:
        """Before each micro-batch (in a pipeline, its backward): does backward now complete the
        gradients?"""
        self.last = flag

    def arrived(self, p: nn.Parameter, bucket: Bucket, view: torch.Tensor) -> None:
        self.pending = True
        if p.grad is not view:  # the step's first micro-batch; later ones add to the view in place
            view.copy_(p.grad)
            p.grad = view
        if self.last:
            bucket.waiting -= 1
            self.launch()

    def thawed(self, p: nn.Parameter) -> None:
        raise RuntimeError(
            "a parameter that was frozen at parallelize() got a gradient, and there is "
            "no bucket: replicas would part; set requires_grad before parallelize()"
        )

    def launch(self) -> None:
        """Starts every complete bucket, in the same order on all ranks."""
        while self.next < len(self.buckets) and self.buckets[self.next].waiting == 0:
            bucket = self.buckets[self.next]
            bucket.work = self.reduce(bucket, self.group)
            self.next += 1

    def finish_gradients(self) -> None:
        """After the last backward: waits until every gradient is the sum over all replicas. What
        none of them has is None."""
        self.pending = False
        named = [pair for bucket in self.buckets for pair in zip(bucket.names, bucket.params)]
        if not named:
            return
        here = [p.grad is not None for _, p in named]
        for bucket in self.buckets[self.next :]:  # those on their way are complete
            for p, view in zip(bucket.params, bucket.views):
                if p.grad is None:
                    view.zero_()
                elif p.grad is not view:  # put there by hand
                    view.copy_(p.grad)
                p.grad = view
            bucket.waiting = 0
        self.launch()
        call = RollCall(here, self.group, self.device)  # behind all buckets, on every rank
        for bucket in self.buckets:
            bucket.work.wait()
            bucket.waiting, bucket.work = len(bucket.params), None
        missing = [named[i] for i in call.nowhere([i for i, yes in enumerate(here) if not yes])]
        for _, p in missing:
            p.grad = None
        self.reduce.forget([name for name, _ in missing])
        self.next = 0
        self.sent_bytes = sum(bucket.sent_bytes for bucket in self.buckets) + call.sent_bytes

    def gradients(self) -> dict[str, torch.Tensor]:
        """After finish_gradients: by name, the summed gradients, or shards of them, that this rank
        holds."""
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    def make_optimizer(self, cls, groups: list[dict], **arguments) -> torch.optim.Optimizer:
        """The optimizer whose step() takes the gradients held here and moves the weights of all
        ranks. It raises RuntimeError where they have not been summed."""
        return finished_first(cls(groups, **arguments), self)

    def discard_step(self) -> None:
        """The step whose gradients were summed last is not taken."""
        self.reduce.discard_step()

    def state_dict(self, optimizer_state: dict) -> dict | None:
        """What this rank has to put into a checkpoint beside weights and optimizer state: what
        compression has not sent yet."""
        return self.reduce.state_dict(*self.place)

    def load_state_dict(self, read: Callable[[str], dict | int]) -> dict:
        """Takes up what `state_dict` gave; read("a/b") is that part of the trees of all ranks,
        merged, or {}. No replica saved an optimizer state of its own: {}."""
        if read("replicas"):  # a compressed run wrote it
            self.reduce.load_state_dict(read, *self.place)
        return {}

    def outer_weights(self) -> AbstractContextManager:
        """`with` this: the model holds the weights to evaluate, as it always does."""
        return nullcontext()

    def broadcast_weights(self) -> None:
        """After something else than step() changed the optimizer's parameters: the other ranks see
        it too."""

    def weights(self) -> dict[str, torch.Tensor]:
        """By name, what this rank has to put into a checkpoint: nothing a lower rank already puts
        there."""
        return dict(self.model.named_parameters()) if self.is_primary else {}


def cut(
    named: list[tuple[str, nn.Parameter]], limit: float
) -> list[list[tuple[str, nn.Parameter]]]:
    """Consecutive parameters of one dtype and device, cut where a bucket would pass `limit`
    bytes."""
    buckets, size = [], 0
    for name, p in named:
        same = buckets and (p.dtype, p.device) == (
            buckets[-1][-1][1].dtype,
            buckets[-1][-1][1].device,
        )
        if not same or size + p.nbytes > limit:
            buckets.append([])
            size = 0
        buckets[-1].append((name, p))
        size += p.nbytes
    return buckets
