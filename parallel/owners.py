"""Who has what of a weight that is spread over ranks, and the exchange between shards and owners.

A weight has one owner among the ranks it is spread over; A2 is the shard of A on rank 2:

                rank 0     rank 1     rank 2                   rank 0     rank 1     rank 2
    shards      A0 B0 C0   A1 B1 C1   A2 B2 C2    to_owners    A0 A1 A2   B0 B1 B2   C0 C1 C2
                                                  to_shards
                                                  <--------

Each way is one uneven all-to-all for all weights of one dtype and one set of ranks: (N-1)/N x the
bytes of this rank's shards, on average. Which ranks together hold a DTensor once is read from its
mesh and its placements, as its shard is (parallel/shard.py).
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import new_group
from parallel.ownership import owners_by_size
from parallel.shard import Shard, local, shard_of, shard_of_shard


class Exchange:
    """Weights of one dtype, spread over one group: all their shards go to the owners or come back
    at once."""

    def __init__(self, params: list[Tensor], shards: list[Shard], group: dist.ProcessGroup):
        rank, n = dist.get_rank(group), dist.get_world_size(group)
        # Weights kept on the CPU still travel between GPUs
        mesh = getattr(params[0], "device_mesh", None)
        self.params, self.group = params, group
        self.wire = params[0].device if mesh is None else torch.device(mesh.device_type)
        self.like = local(params[0])
        owners = owners_by_size([shard.global_shape for shard in shards], n)
        self.by_owner = sorted(range(len(params)), key=lambda i: owners[i])  # the order on the wire
        self.mine = [i for i in self.by_owner if owners[i] == rank]
        # Rank -> of each parameter its shard there, and the shard's local shape
        self.shards = [None] * n
        here = [(shard, tuple(local(p).shape)) for shard, p in zip(shards, params)]
        dist.all_gather_object(self.shards, here, group)
        self.in_sizes = [sum(math.prod(there[i][1]) for i in self.mine) for there in self.shards]
        # Elements of mine that go to each owner; in_sizes: that come from each rank
        self.out_sizes = [0] * n
        for p, owner in zip(params, owners):
            self.out_sizes[owner] += local(p).numel()
        sent = sum(self.out_sizes) + sum(self.in_sizes) - self.out_sizes[rank] - self.in_sizes[rank]
        self.sent_bytes = sent * self.like.element_size()  # there and back
        self.full = {
            i: nn.Parameter(self.like.new_empty(shards[i].global_shape)) for i in self.mine
        }

    def views(self, full: dict[int, Tensor]) -> list[Tensor]:
        """Each rank's shards of `full`, rank by rank."""
        views = []
        for there in self.shards:
            for i in self.mine:
                shard, shape = there[i]
                views.append(shard.narrow(full[i], shape))
        return views

    def to_owners(self, shards: list[Tensor], full: dict[int, Tensor]) -> None:
        """Everybody's `shards` into the owners' `full` tensors, in place."""
        received = self.send([shards[i] for i in self.by_owner], self.out_sizes, self.in_sizes)
        unpack(received, self.views(full))

    def to_shards(self) -> None:
        """The owners' weights into everybody's shards."""
        received = self.send(self.views(self.full), self.in_sizes, self.out_sizes)
        unpack(received, [local(self.params[i]) for i in self.by_owner])

    def send(self, tensors: list[Tensor], out_sizes: list[int], in_sizes: list[int]) -> Tensor:
        flat = torch.cat([self.like.new_empty(0), *(x.reshape(-1) for x in tensors)]).to(self.wire)
        received = flat.new_empty(sum(in_sizes))
        dist.all_to_all_single(received, flat, in_sizes, out_sizes, group=self.group)
        return received.to(self.like.device)


def locate(
    p: Tensor, tp_shard: Shard | None = None, tp_group: dist.ProcessGroup | None = None
) -> tuple[Shard, tuple[int, ...]]:
    """Where this rank's shard of p lies, and the ranks that together hold the full tensor once.

    p: a plain tensor or a DTensor; tp_shard: where p itself, a shard over tp_group, lies.
    """
    shard = shard_of(p)
    ranks = (me,) = (dist.get_rank() if dist.is_initialized() else 0,)
    if hasattr(p, "placements"):
        mesh, dims = p.device_mesh, sharded_dims(p)
        at = [slice(None) if d in dims else i for d, i in enumerate(mesh.get_coordinate())]
        ranks = tuple(mesh.mesh[tuple(at)].flatten().tolist())
    if tp_shard is not None:
        shard = shard_of_shard(tp_shard, shard)
        others = dist.get_process_group_ranks(tp_group)  # the ranks are a grid
        ranks = tuple(sorted(rank + other - me for rank in ranks for other in others))
    return shard, ranks


def sharded_dims(p: Tensor) -> list[int]:
    """The dimensions of its mesh along which the DTensor p is sharded."""
    dims = enumerate(zip(p.placements, p.device_mesh.shape))
    return [d for d, (placement, size) in dims if size > 1 and not placement.is_replicate()]


def group_of(
    ranks: tuple[int, ...], p: Tensor, tp_group: dist.ProcessGroup | None
) -> dist.ProcessGroup:
    known = [tp_group] if tp_group is not None else []
    known += (
        [p.device_mesh.get_group(d) for d in sharded_dims(p)] if hasattr(p, "placements") else []
    )
    for group in known:
        if tuple(sorted(dist.get_process_group_ranks(group))) == ranks:
            return group
    wire = torch.device(p.device_mesh.device_type) if hasattr(p, "device_mesh") else p.device
    return new_group(list(ranks), wire)


def unpack(flat: Tensor, views: list[Tensor]) -> None:
    """Consecutive stretches of `flat` into the views."""
    if views:
        stretches = flat.split([view.numel() for view in views])
        torch._foreach_copy_(views, [x.view(view.shape) for x, view in zip(stretches, views)])
