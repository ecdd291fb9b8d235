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

The byte is the roll call (parallel/replicas.py). A gradient that is missing on some replicas
counts as zero there. One that is missing on all stays None, so the optimizer leaves the parameter,
its state and its decay alone, as it does in one process. (A gradient of zeros is not missing.)

The sum is a plain sum, not a mean: the loss is already divided by the number of tokens in the
global batch, so no rank needs to know how many others there are. (`nn.DataParallel` is another
thing: one process with a thread per GPU, which copies the weights to every GPU at each step and
gathers all outputs on one. It is slower by design, and long discouraged.)

parallelize(model) keeps the model's own weights and gives every replica those of rank 0, and its
buffers, as torch's DDP does. (Later it sends no buffers.) For parameters on the meta device nothing
is sent: init_weights(source) gives every rank the same.

A forgotten call is a RuntimeError and no silent divergence: a second backward() that was announced
as the last one, and a step() by any optimizer before finish_gradients(). Gradients that zero_grad()
has set to None were dropped: then the next backward() begins a step anew.

Reference: Li et al. 2020, PyTorch Distributed (2006.15704). Ours differs: `p.grad` is a view of
its bucket, so nothing is copied back.

Neighbours: parallel/replicas.py

Example:
    import tempfile, torch
    import torch.distributed as dist, torch.multiprocessing as mp
    from parallel.ddp import DDP

    def train(rank, file):
        dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
        torch.manual_seed(rank)  # rank 0's weights count
        replicas = DDP(dist.group.WORLD, torch.device("cpu"))
        model = replicas.parallelize(torch.nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(20):
            x = torch.randn(2, 8, 4)  # two micro-batches of this rank's own samples
            for i in range(2):
                replicas.last_micro_batch(i == 1)
                loss = (model(x[i]) - x[i].sum(1, keepdim=True)).square().sum() / 32
                loss.backward()  # 32: the samples of both ranks
            replicas.finish_gradients()
            optimizer.step()
            optimizer.zero_grad()
        weights = [torch.empty(1, 4) for _ in range(2)]
        dist.all_gather(weights, model.weight.detach())
        assert torch.equal(*weights) and loss < 0.5
        if rank == 0:
            print("the same on both ranks:", model.weight.tolist())
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(train, (f"{folder}/store",), nprocs=2, start_method="fork")
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from parallel.replicas import (
    RollCall,
    StepGuard,
    allocate,
    broadcast_start,
    by_group,
    fill,
    make_buckets,
    on_gradient,
    split_like,
)


class Bucket:
    """Gradients side by side in `flat`, one all-reduce; `views` has each in its own shape."""

    def __init__(
        self, named: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup | None = None
    ):
        self.group = group
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        n_elements = sum(p.numel() for p in self.params)
        like = self.params[0]
        self.flat = torch.zeros(n_elements, dtype=like.dtype, device=like.device)
        self.views = split_like(self.flat, self.params)
        self.n_waiting = len(named)  # gradients that have not arrived in this step
        self.work = None  # the sum on its way
        self.sent_bytes = 0


class Done:
    """The sum over one replica."""

    def wait(self) -> None:
        pass


class AllReduce:
    """The sum of a bucket, as DDP computes it by default.

    Compressor in parallel/compression.py has the same methods, and a memory.
    """

    def __call__(self, bucket: Bucket, group: dist.ProcessGroup):
        """Starts the sum of `bucket.flat` over the group, in place; returns what has a wait()."""
        n = dist.get_world_size(group)
        bucket.sent_bytes = 2 * (n - 1) * bucket.flat.nbytes // n
        return dist.all_reduce(bucket.flat, group=group, async_op=True)

    def begin_step(self) -> None:
        """The step before was taken, or discarded by discard_step()."""

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
    others: name -> the group of replicas of this parameter, where it is not `group`: experts that
        some ranks hold alone (parallel/expert.py); None: this rank alone
    """

    shards: dict = {}  # the optimizer sees full parameters
    weight_shards: dict = {}
    backward_is_collective = False  # only the last micro-batch sends anything

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        bucket_mb: float = 25.0,
        reduce: Callable | None = None,
        others: dict[str, dist.ProcessGroup | None] | None = None,
    ):
        self.group = group
        self.others = others or {}
        self.device = device
        self.bucket_bytes = bucket_mb * 2**20
        self.reduce = reduce or AllReduce()
        self.rank = 0
        self.world = 1
        if group is not None:
            self.rank = dist.get_rank(group)
            self.world = dist.get_world_size(group)
        self.is_primary = self.rank == 0  # no lower rank holds the same gradients and state
        self.also_first = {
            name for name, g in self.others.items() if g is None or dist.get_rank(g) == 0
        }
        self.buckets = []
        self.next_to_send = 0  # index of the bucket whose sum starts next
        self.is_last = True  # the micro-batch in hand is the last one of the step
        self.unfinished = False  # a gradient arrived after the last finish_gradients()
        self.backward = None  # number of the backward in hand, autograd's own
        self.arrived_grads = {}  # parameter -> its view, of those that got a gradient in this step
        self.completed = set()  # those that got it from the last micro-batch
        self.sent_bytes = 0  # by this rank in the last step

    def parallelize(self, model: nn.Module) -> nn.Module:
        """Gives all replicas rank 0's weights, and adds hooks; returns `model`.

        Parameters on the meta device get memory instead, for init_weights() to fill.
        """
        broadcast_start(model, self.group, self.device, self.others)
        self.model = allocate(model, self.device)
        if self.group is None:
            return self.model
        self.guard = StepGuard(self, self.model.parameters)
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        # Backward comes to the last layers first.
        for group, some in by_group(named[::-1], self.group, self.others):
            for in_bucket in make_buckets(some, self.bucket_bytes):
                self.buckets.append(Bucket(in_bucket, group))
        for bucket in self.buckets:
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
            fill(p, source, name)

    def last_micro_batch(self, flag: bool) -> None:
        """Before each micro-batch (in a pipeline: before its backward).

        flag: does its backward complete the gradients?
        """
        self.is_last = flag
        # Before the forward, whose activations need the memory that this frees.
        if not self.unfinished:
            self.reduce.begin_step()

    def arrived(self, p: nn.Parameter, bucket: Bucket, view: torch.Tensor) -> None:
        """A backward has added to p.grad."""
        backward = torch._C._current_graph_task_id()
        if backward != self.backward:
            self.backward = backward
            # Within a step p.grad stays the view. If it is another tensor, or None, then the
            # gradients so far were dropped: the step is skipped, or a backward raised.
            dropped = [q for q, its_view in self.arrived_grads.items() if q.grad is not its_view]
            if dropped:
                self.begin_step_anew(drops_all=len(dropped) == len(self.arrived_grads))
        if p in self.completed:
            raise RuntimeError(
                "a second backward() after the last micro-batch, whose sum may be on its way: call "
                "last_micro_batch(i + 1 == n) before each of a step's n backward(), then "
                "finish_gradients(), or drop the gradients by zero_grad(set_to_none=True)"
            )
        self.unfinished = True
        self.arrived_grads[p] = view
        # Only the first micro-batch of a step brings a tensor of its own. From then on p.grad is
        # the view, and later micro-batches add to the bucket in place.
        if p.grad is not view:
            view.copy_(p.grad)
            p.grad = view
        if self.is_last:
            self.completed.add(p)
            bucket.n_waiting -= 1
            self.start_complete_buckets()

    def begin_step_anew(self, drops_all: bool) -> None:
        """Forgets the gradients of a step that was dropped without finish_gradients()."""
        started = [bucket for bucket in self.buckets if bucket.work is not None]
        if started and not drops_all:
            # A kept gradient may be a sum already, and would be summed again.
            raise RuntimeError(
                "zero_grad() dropped some gradients of an unfinished step and left others; call "
                "finish_gradients() before it, or drop all of them by model.zero_grad()"
            )
        for bucket in started:
            # All ranks have started it: a new sum may not overtake it.
            bucket.work.wait()
        self.reduce.forget([name for bucket in started for name in bucket.names])
        self.await_gradients()

    def await_gradients(self) -> None:
        """From now on gradients belong to a new step."""
        self.unfinished = False
        self.arrived_grads.clear()
        self.completed.clear()
        self.next_to_send = 0
        for bucket in self.buckets:
            bucket.work = None
            bucket.n_waiting = len(bucket.params)

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
            bucket.work = Done() if bucket.group is None else self.reduce(bucket, bucket.group)
            self.next_to_send += 1

    def finish_gradients(self) -> None:
        """After the last backward: waits until every gradient is the sum over all replicas.

        A gradient that is missing on all replicas is None.
        """
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

        # None, not zero: the optimizer must leave weight, state and decay alone. Compression takes
        # back what it sent for it.
        missing_here = [i for i, has in enumerate(has_gradient) if not has]
        missing = [named[i] for i in call.missing_everywhere(missing_here)]
        for _, p in missing:
            p.grad = None
        self.reduce.forget([name for name, _ in missing])

        self.await_gradients()
        self.sent_bytes = sum(bucket.sent_bytes for bucket in self.buckets) + call.sent_bytes

    def gradients(self) -> dict[str, torch.Tensor]:
        """After finish_gradients: the summed gradients by name."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def make_optimizer(self, cls, groups: list[dict], **arguments) -> torch.optim.Optimizer:
        """The optimizer of all parameters, the same on every rank.

        The step() of any optimizer raises RuntimeError if their gradients are not summed yet.
        """
        return cls(groups, **arguments)

    def discard_step(self) -> None:
        """In place of optimizer.step(): the gradients of this step are not used."""
        if self.unfinished:
            self.begin_step_anew(drops_all=True)
        else:
            # The residuals of compression: what was sent is owed again.
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
        named = self.model.named_parameters()
        return {name: p for name, p in named if self.is_primary or name in self.also_first}


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
