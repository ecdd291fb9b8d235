"""The roll call: which gradients are missing on which ranks, asked by every layout before a step.

    rank 0 has    a b . .            a b c .      summed; a gradient that a rank lacks is zero there
    rank 1 has    a . c .    --->    . . . d      missing on all: None, so weight and state stay

One all-reduce of a byte for each parameter: 2 (N-1)/N bytes per parameter, rank and step. A
gradient of zeros is not missing. (torch's DDP asks the same with find_unused_parameters=True.)
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn


class RollCall:
    """Which parameters got a gradient on any replica?

    has_gradient: for each parameter, whether it has a gradient here. All replicas call at the same
    moment. The answer is the maximum of their bytes, and only a replica that lacks a gradient
    reads it.
    """

    def __init__(self, has_gradient: list[bool], group: dist.ProcessGroup, device: torch.device):
        world = dist.get_world_size(group)
        self.flags = torch.tensor(has_gradient, dtype=torch.uint8)
        self.flags = self.flags.to(device, non_blocking=True)
        self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, group=group, async_op=True)
        self.sent_bytes = 2 * (world - 1) * len(has_gradient) // world

    def missing_everywhere(self, indices: list[int]) -> list[int]:
        """Those of these parameters, by index, for which no replica has a gradient."""
        self.work.wait()
        if not indices:
            return []
        # Here alone the host waits for a GPU: most steps lack nothing and never come here.
        flags = self.flags.tolist()
        return [i for i in indices if not flags[i]]


def drop_stand_ins(
    params: list[nn.Parameter],
    got: set[nn.Parameter],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> int:
    """Sets p.grad to None where no replica has a gradient and zeros stand in for it.

    got: the parameters that got a gradient here; it is emptied. Returns the bytes sent.
    """
    if group is None or not params:
        return 0
    call = RollCall([p in got for p in params], group, device)
    # What is in p.grad does not tell: a true gradient may be zero as well.
    stand_ins = [i for i, p in enumerate(params) if p.grad is not None and p not in got]
    for i in call.missing_everywhere(stand_ins):
        params[i].grad = None
    got.clear()
    return call.sent_bytes


def on_gradient(p: nn.Parameter, arrived: Callable[[nn.Parameter], None]) -> None:
    """Calls arrived(p) when a backward has added to p.grad, also if p is frozen now and thaws."""
    # torch takes a hook only while p requires a gradient.
    requires_grad = p.requires_grad
    if requires_grad or p.is_floating_point():
        p.requires_grad_().register_post_accumulate_grad_hook(arrived)
        p.requires_grad_(requires_grad)


def refuse_unfinished(optimizer: torch.optim.Optimizer, replicas) -> torch.optim.Optimizer:
    """The same optimizer, but its step() raises RuntimeError while replicas.unfinished."""

    def check(*_) -> None:
        if replicas.unfinished:
            raise RuntimeError(
                "optimizer.step() came before finish_gradients(): these gradients "
                "are not yet the sums over all replicas, whose weights would part; "
                "call finish_gradients() after the last backward()"
            )

    optimizer.register_step_pre_hook(check)
    return optimizer
