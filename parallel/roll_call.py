"""Which gradients are missing where: what every data-parallel layout asks before a step.

    rank 0 has    a b . .            a b c .      summed; what a rank lacks counts as zero there
    rank 1 has    a . c .    --->    . . . d      missing on all: None, so weight and state stay

One all-reduce of a byte for each parameter, 2 (N-1)/N of that per rank and step. A gradient of
zeros is not missing. (torch's DDP asks so with find_unused_parameters=True.)
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn


class RollCall:
    """Which parameters got a gradient on any replica? Each sends a byte a parameter, 1 if it is
    here; the maximum tells. All replicas call at the same moment; only one that lacks a gradient
    reads the answer. (torch's DDP asks so with find_unused_parameters=True.)
    """

    def __init__(self, here: list[bool], group: dist.ProcessGroup, device: torch.device):
        n = dist.get_world_size(group)
        self.flags = torch.tensor(here, dtype=torch.uint8).to(device, non_blocking=True)
        self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, group=group, async_op=True)
        self.sent_bytes = 2 * (n - 1) * len(here) // n

    def nowhere(self, asked: list[int]) -> list[int]:
        """Those of the parameters with these numbers that no replica has a gradient of."""
        self.work.wait()
        flags = self.flags.tolist() if asked else []  # here alone the host waits for a GPU
        return [i for i in asked if not flags[i]]


def drop_stand_ins(
    params: list[nn.Parameter],
    got: set[nn.Parameter],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> int:
    """Zeros stand in p.grad for what is missing here: they go where no replica has a gradient.

    got: the parameters that got one here; empty afterwards. Returns the bytes sent.
    """
    if group is None or not params:
        return 0
    call = RollCall([p in got for p in params], group, device)
    zeros = [i for i, p in enumerate(params) if p.grad is not None and p not in got]
    for i in call.nowhere(zeros):
        params[i].grad = None
    got.clear()
    return call.sent_bytes


def watch(p: nn.Parameter, arrived: Callable[[nn.Parameter], None]) -> None:
    """Calls arrived(p) when a backward has added to p.grad, also if p is frozen now and thaws."""
    trained = p.requires_grad
    if trained or p.is_floating_point():
        p.requires_grad_().register_post_accumulate_grad_hook(arrived)
        p.requires_grad_(trained)


def finished_first(optimizer: torch.optim.Optimizer, replicas) -> torch.optim.Optimizer:
    """The same optimizer; its step() raises RuntimeError while replicas.pending."""

    def check(*_) -> None:
        if replicas.pending:
            raise RuntimeError(
                "optimizer.step() came before finish_gradients(): these gradients "
                "are not yet the sums over all replicas, whose weights would part; "
                "call finish_gradients() after the last backward()"
            )

    optimizer.register_step_pre_hook(check)
    return optimizer
