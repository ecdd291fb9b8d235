"""Distributed data parallel: every rank has the full model and its own samples; gradients add up.

               rank 0              rank 1                          rank 0         rank 1
    weights    W                   W             all-reduce        W              W
    samples    s0 s1               s2 s3        ------------>
    gradient   g(s0)+g(s1)         g(s2)+g(s3)                     g(s0..s3)      g(s0..s3)

Gradients live in flat buckets, which are filled in the order in which backward produces gradients
(last layer first). When the last gradient of a bucket has arrived, the bucket's all-reduce starts,
and it runs while backward computes earlier layers. With several micro-batches, all but the last
one only add to the buckets and send nothing (torch calls this `no_sync`).

Bytes sent per rank and step: 2 (N-1)/N x (the gradients' bytes + 1 for each parameter), by ring
all-reduces, however many micro-batches there are.

The byte is the roll call (parallel/roll_call.py). A gradient that is missing on some replicas
counts as zero there. One that is missing on all stays None, so the optimizer leaves the parameter,
its state and its decay alone, as it does in one process. (A gradient of zeros is not missing.)

The sum is a plain sum, not a mean: the loss is already divided by the number of tokens in the
global batch, so no rank needs to know how many others there are. (`nn.DataParallel` is another
thing: one process with a thread per GPU, which copies the weights to every GPU at each step and
gathers all outputs on one. It is slower by design, and long discouraged.)

Reference: Li et al. 2020, PyTorch Distributed (2006.15704). Ours differs: `p.grad` is a view of
its bucket, so nothing is copied back.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from parallel.allocate import allocate
from parallel.buckets import make_buckets, split_like
from parallel.roll_call import RollCall, on_gradient, refuse_unfinished


class Bucket:
    """Gradients side by side in `flat`, one all-reduce; `views` has each in its own shape."""

    def __init__(self, named: list[tuple[str, nn.Parameter]]):
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        n_elements = sum(p.numel() for p in self.params)
        like = self.params[0]
        self.flat = torch.zeros(n_elements, dtype=like.dtype, device=like.device)
        self.views = split_like(self.flat, self.params)
        self.n_waiting = len(named)  # gradients that have not arrived in this step
        self.work = None  # the sum on its way
        self.sent_bytes = 0


class AllReduce:
    """The sum of a bucket, as DDP computes it by default.

    Compressor in parallel/compression.py has the same methods, and a memory.
    """

    def __call__(self, bucket: Bucket, group: dist.ProcessGroup):
        """Starts the sum of `bucket.flat` over the group, in place; returns what has a wait()."""
        n = dist.get_world_size(group)
        bucket.sent_bytes = 2 * (n - 1) * bucket.flat.nbytes // n
        return dist.all_reduce(bucket.flat, group=group, async_op=True)

    def forget(self, names: list[str]) -> None:
        """No replica has a gradient of these parameters."""

    def discard_step(self) -> None:
        """The optimizer does not take this step."""

    def state_dict(self, rank: int, world: int) -> dict:
        """What replica `rank` of `world` puts into a checkpoint."""
        return {}

    def load_state_dict(self, read: Callable[[str], dict | int], rank: int, world: int) -> None:
        """Takes up what `state_dict` gave."""


class DDP:
    """A data-parallel layout (parallel/protocol.py).

    group: the replicas; None is one replica, which sends nothing
    device: where the weights live
    bucket_mb: the largest message, in MiB; a larger parameter is a message of its own
    reduce: starts the sum of one bucket over a group; None = AllReduce (others are in
        parallel/compression.py)
    """

    shards: dict = {}  # the optimizer sees full parameters
    backward_is_collective = False  # only the last micro-batch sends anything

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        bucket_mb: float = 25.0,
        reduce: Callable | None = None,
    ):
        self.group = group
        self.device = device
        self.bucket_bytes = bucket_mb * 2**20
        self.reduce = reduce or AllReduce()
        self.rank = 0
        self.world = 1
        if group is not None:
            self.rank = dist.get_rank(group)
            self.world = dist.get_world_size(group)
        self.is_primary = self.rank == 0  # no lower rank holds the same gradients and state
        self.buckets = []
        self.next_to_send = 0  # index of the bucket whose sum starts next
        self.is_last = True  # the micro-batch in hand is the last one of the step
        self.unfinished = False  # a gradient arrived after the last finish_gradients()
        self.sent_bytes = 0  # by this rank in the last step

    def parallelize(self, model: nn.Module) -> nn.Module:
        """Allocates the parameters of `model`, which are on the meta device, and adds hooks."""
        self.model = allocate(model, self.device)
        if self.group is None:
            return self.model
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        # Backward comes to the last layers first.
        for in_bucket in make_buckets(named[::-1], self.bucket_bytes):
            bucket = Bucket(in_bucket)
            self.buckets.append(bucket)
            for p, view in zip(bucket.params, bucket.views):
                on_gradient(p, lambda p, b=bucket, v=view: self.arrived(p, b, v))
        # A frozen parameter has no bucket. If it thaws, replicas must not part in silence.
        for p in self.model.parameters():
            if not p.requires_grad:
                on_gradient(p, self.refuse_thawed)
        return self.model

    @torch.no_grad()
    def init_weights(self, source: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
        """Sets every parameter to source(its name, its full shape), a full tensor on the CPU."""
        for name, p in self.model.named_parameters():
            p.copy_(source(name, tuple(p.shape)))

    def last_micro_batch(self, flag: bool) -> None:
        """Before each micro-batch (in a pipeline: before its backward).

        flag: does its backward complete the gradients?
        """
        self.is_last = flag

    def arrived(self, p: nn.Parameter, bucket: Bucket, view: torch.Tensor) -> None:
        """A backward has added to p.grad."""
        self.unfinished = True
        # Only the first micro-batch of a step brings a tensor of its own. From then on p.grad is
        # the view, and later micro-batches add to the bucket in place.
        if p.grad is not view:
            view.copy_(p.grad)
            p.grad = view
        if self.is_last:
            bucket.n_waiting -= 1
            self.start_complete_buckets()

    def refuse_thawed(self, p: nn.Parameter) -> None:
        raise RuntimeError(
            "a parameter that was frozen at parallelize() got a gradient, and there is "
            "no bucket: replicas would part; set requires_grad before parallelize()"
        )

    def start_complete_buckets(self) -> None:
        """Starts the sums of complete buckets.

        A complete bucket waits for those before it: all ranks must start in the same order.
        """
        while self.next_to_send < len(self.buckets):
            bucket = self.buckets[self.next_to_send]
            if bucket.n_waiting != 0:
                return
            bucket.work = self.reduce(bucket, self.group)
            self.next_to_send += 1

    def finish_gradients(self) -> None:
        """After the last backward: waits until every gradient is the sum over all replicas.

        A gradient that is missing on all replicas is None.
        """
        self.unfinished = False
        named = [pair for bucket in self.buckets for pair in zip(bucket.names, bucket.params)]
        if not named:
            return

        # For the roll call: below, zeros take the place of what is missing.
        has_gradient = [p.grad is not None for _, p in named]

        # Buckets that have not started lack a gradient here.
        for bucket in self.buckets[self.next_to_send :]:
            for p, view in zip(bucket.params, bucket.views):
                if p.grad is None:
                    view.zero_()
                elif p.grad is not view:
                    # Somebody set p.grad by hand, without a backward.
                    view.copy_(p.grad)
                p.grad = view
            bucket.n_waiting = 0
        self.start_complete_buckets()

        # Behind all buckets, because all ranks must start a group's collectives in one order.
        call = RollCall(has_gradient, self.group, self.device)
        for bucket in self.buckets:
            bucket.work.wait()
            bucket.work = None
            bucket.n_waiting = len(bucket.params)

        # None, not zero: the optimizer must leave weight, state and decay alone. Compression takes
        # back what it sent for it.
        missing_here = [i for i, has in enumerate(has_gradient) if not has]
        missing = [named[i] for i in call.missing_everywhere(missing_here)]
        for _, p in missing:
            p.grad = None
        self.reduce.forget([name for name, _ in missing])

        self.next_to_send = 0
        self.sent_bytes = sum(bucket.sent_bytes for bucket in self.buckets) + call.sent_bytes

    def gradients(self) -> dict[str, torch.Tensor]:
        """After finish_gradients: the summed gradients by name."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def make_optimizer(self, cls, groups: list[dict], **arguments) -> torch.optim.Optimizer:
        """The optimizer of all parameters, the same on every rank.

        Its step() raises RuntimeError if the gradients are not summed yet.
        """
        return refuse_unfinished(cls(groups, **arguments), self)

    def discard_step(self) -> None:
        """The step whose gradients were summed last is not taken."""
        self.reduce.discard_step()

    def state_dict(self, optimizer_state: dict) -> dict | None:
        """What this rank puts into a checkpoint beside weights and optimizer state.

        It is what compression has not sent yet.
        """
        return self.reduce.state_dict(self.rank, self.world)

    def load_state_dict(self, read: Callable[[str], dict | int]) -> dict:
        """Takes up what `state_dict` gave, and returns {}: no replica has a state of its own.

        read("a/b") is that part of the entries of all ranks, merged, or {}.
        """
        # Only a compressed run writes this entry.
        if read("replicas"):
            self.reduce.load_state_dict(read, self.rank, self.world)
        return {}

    def outer_weights(self) -> AbstractContextManager:
        """`with` this: the model holds the weights to evaluate, as it always does."""
        return nullcontext()

    def broadcast_weights(self) -> None:
        """Nothing to send: whatever changes the weights changes them alike on every rank."""

    def weights(self) -> dict[str, torch.Tensor]:
        """What this rank puts into a checkpoint, by name: nothing that a lower rank puts there."""
        return dict(self.model.named_parameters()) if self.is_primary else {}
