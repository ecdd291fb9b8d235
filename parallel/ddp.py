"""Distributed data parallel: every rank holds the whole model, sees its own rows, and gradients are summed.

              rank 0              rank 1                          rank 0         rank 1
    weights   W                   W             all-reduce        W              W
    rows      r0 r1               r2 r3        ------------>
    gradient  g(r0)+g(r1)         g(r2)+g(r3)                     g(r0..r3)      g(r0..r3)

Gradients live in flat buckets, filled in the order in which backward produces them (last layer first). As
soon as the last gradient of a bucket is there, its all-reduce starts and runs while backward goes on with
earlier layers. The first micro-batches of an accumulated batch add into the same buckets and send nothing
(others call this `no_sync`).

Bytes sent per rank and step: 2 (N-1)/N x the gradients' bytes (a ring all-reduce), however many
micro-batches.

The sum is plain, not a mean: the loss is already divided by the constant count of the global batch's tokens,
so no rank needs to know how many others there are. (`nn.DataParallel` instead runs one process with a thread
per GPU, copies the weights to every GPU at each step and gathers all outputs on one: slower by design, and
long since discouraged.)

Reference: Li et al. 2020, PyTorch Distributed (2006.15704). Ours differs in that `p.grad` is a view of its
bucket, so nothing is copied back.
"""

import torch
import torch.distributed as dist
from torch import nn


class Bucket:
    def __init__(self, params: list[nn.Parameter]):
        self.params, self.waiting, self.work = params, len(params), None
        self.flat = torch.zeros(
            sum(p.numel() for p in params), dtype=params[0].dtype, device=params[0].device
        )
        self.views = [v.view_as(p) for v, p in zip(self.flat.split([p.numel() for p in params]), params)]


class DDP:
    """The four verbs train.py calls. With group=None (one replica) they do nothing."""

    def __init__(self, group: dist.ProcessGroup | None, bucket_mb: float = 25.0):
        self.group, self.bucket_bytes = group, bucket_mb * 2**20
        self.buckets, self.last, self.next = [], True, 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Watches the model's parameters; returns the same model."""
        if self.group is not None:
            for params in cut([p for p in model.parameters() if p.requires_grad][::-1], self.bucket_bytes):
                bucket = Bucket(params)
                self.buckets.append(bucket)
                for p, view in zip(bucket.params, bucket.views):
                    p.register_post_accumulate_grad_hook(lambda p, b=bucket, v=view: self.arrived(p, b, v))
        return model

    def last_micro_batch(self, flag: bool) -> None:
        """Before each forward: are the gradients complete after it?"""
        self.last = flag

    def arrived(self, p: nn.Parameter, bucket: Bucket, view: torch.Tensor) -> None:
        if p.grad is not view:  # the step's first micro-batch; later ones add to the view in place
            view.copy_(p.grad)
            p.grad = view
        if self.last:
            bucket.waiting -= 1
            self.launch()

    def launch(self) -> None:
        """Starts every complete bucket, in the same order on all ranks."""
        while self.next < len(self.buckets) and self.buckets[self.next].waiting == 0:
            bucket = self.buckets[self.next]
            bucket.work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)
            self.next += 1

    def finish_gradients(self) -> None:
        """After the last backward: waits until every gradient is the sum over all replicas."""
        for bucket in self.buckets:
            for p, view in zip(bucket.params, bucket.views):
                if p.grad is None:  # unused on this rank, perhaps not on another
                    p.grad = view.zero_()
            bucket.waiting = 0
        self.launch()
        for bucket in self.buckets:
            bucket.work.wait()
            bucket.waiting, bucket.work = len(bucket.params), None
        self.next = 0

    def make_optimizer(self, cls, groups: list[dict], **arguments) -> torch.optim.Optimizer:
        return cls(groups, **arguments)


def cut(params: list[nn.Parameter], limit: float) -> list[list[nn.Parameter]]:
    """Consecutive parameters of one dtype and device, cut where a bucket would pass `limit` bytes."""
    buckets, size = [], 0
    for p in params:
        same = buckets and (p.dtype, p.device) == (buckets[-1][-1].dtype, buckets[-1][-1].device)
        if not same or size + p.nbytes > limit:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += p.nbytes
    return buckets
