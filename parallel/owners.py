"""Which ranks have which shard of a weight, and the exchange between shards and owners.

A sharded weight has one owner among the ranks that hold its shards; A2 is the shard of A on rank 2:

                rank 0     rank 1     rank 2                   rank 0     rank 1     rank 2
    shards      A0 B0 C0   A1 B1 C1   A2 B2 C2    to_owners    A0 A1 A2   B0 B1 B2   C0 C1 C2
                                                  to_shards
                                                  <--------

Each way is one uneven all-to-all for all weights of one dtype and one set of ranks: (N-1)/N x the
bytes of this rank's shards, on average. A DTensor's mesh and placements tell which ranks together
hold it once, and where the shard of each lies (parallel/shard.py): nobody asks the others.

Neighbours: parallel/mesh.py, parallel/replicas.py, parallel/shard.py

Example:
    import tempfile, torch
    import torch.distributed as dist, torch.multiprocessing as mp
    from parallel.owners import Exchange
    from parallel.shard import Shard

    def move(rank, file):
        dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
        rows = [torch.full((1, 3), float(rank)) for _ in range(2)]  # of two (2, 3) weights
        shards = [Shard((2, 3), (rank, 0))] * 2
        exchange = Exchange(rows, dist.group.WORLD, shards, dist.group.WORLD)
        with torch.no_grad():
            exchange.to_owners(rows, exchange.full)
            full = exchange.full[rank]  # rank 0 owns the first weight, rank 1 the second
            assert full.tolist() == [[0, 0, 0], [1, 1, 1]]
            full += 10 * (rank + 1)
            exchange.to_shards()
        assert [x[0, 0].item() for x in rows] == [10 + rank, 20 + rank]
        print(f"rank {rank} has", rows)
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(move, (f"{folder}/store",), nprocs=2, start_method="fork")
"""

import inspect
import itertools
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import new_group
from parallel.replicas import owners_by_size
from parallel.shard import Shard, local, shard_at, shard_of, shard_of_shard


class Exchange:
    """Weights of one dtype, sharded alike over one group, whose shards travel together.

    params: the weights, plain tensors or DTensors of one mesh, all on the ranks of `group`.
    tp_shards: of each weight, where it lies in its full tensor if it is itself one of the equal
    parts over tp_group, else None.
    full: index of each weight owned here -> its full tensor. owners: of each weight, by rank in
    the group. sent_bytes: by this rank, there and back. Nothing is sent to make it.

    Raises ValueError for tp_shards that are not equal parts.
    """

    def __init__(
        self,
        params: list[Tensor],
        group: dist.ProcessGroup,
        tp_shards: list[Shard | None] | None = None,
        tp_group: dist.ProcessGroup | None = None,
    ):
        rank = dist.get_rank(group)
        n = dist.get_world_size(group)
        tp_shards = tp_shards or [None] * len(params)
        self.params = params
        self.group = group
        # Offloaded weights lie on the CPU, but their messages travel between GPUs.
        self.wire = wire_device(params[0])
        self.like = local(params[0])  # for its dtype and its device
        shapes = []  # of the full weights
        for p, tp_shard in zip(params, tp_shards):
            shapes.append(tuple(p.shape) if tp_shard is None else tp_shard.global_shape)
        self.owners = owners_by_size(shapes, n)
        # In this order on the wire.
        self.by_owner = sorted(range(len(params)), key=lambda i: self.owners[i])
        self.mine = [i for i in self.by_owner if self.owners[i] == rank]

        # Elements by rank, sent and received on the way to the owners; to_shards swaps the two.
        self.out_sizes = [0] * n
        for p, owner in zip(params, self.owners):
            self.out_sizes[owner] += local(p).numel()
        self.in_sizes = [0] * n
        # (weight owned here, where a shard of it lies, its shape), rank by rank; empty ones left
        # out. Where other ranks' shards lie is computed, so an owner alone has a table of them.
        self.shards = []
        holders = holders_of(params[0], tp_group if tp_shards[0] else None) if self.mine else {}
        for other, holder in enumerate(holders.values()):
            for i in self.mine:
                shard, shape = shard_held(params[i], tp_shards[i], tp_group, *holder)
                if 0 not in shape:
                    self.shards.append((i, shard, shape))
                    self.in_sizes[other] += math.prod(shape)
        to_self = self.out_sizes[rank] + self.in_sizes[rank]
        n_sent = sum(self.out_sizes) + sum(self.in_sizes) - to_self
        self.sent_bytes = n_sent * self.like.element_size()

        self.full = {}
        for i in self.mine:
            self.full[i] = nn.Parameter(self.like.new_empty(shapes[i]))

    def views(self, full: dict[int, Tensor]) -> list[Tensor]:
        """Each rank's shards of the full tensors, rank by rank, as views."""
        return [shard.narrow(full[i], shape) for i, shard, shape in self.shards]

    def to_owners(self, shards: list[Tensor], full: dict[int, Tensor]) -> None:
        """All ranks' `shards`, one for each weight, into the owners' `full` tensors, in place."""
        received = self.send([shards[i] for i in self.by_owner], self.out_sizes, self.in_sizes)
        unpack(received, self.views(full))

    def to_shards(self) -> None:
        """The owners' weights into all ranks' shards, in place."""
        received = self.send(self.views(self.full), self.in_sizes, self.out_sizes)
        unpack(received, [local(self.params[i]) for i in self.by_owner])

    def send(self, tensors: list[Tensor], out_sizes: list[int], in_sizes: list[int]) -> Tensor:
        """One all-to-all of the tensors, laid end to end; out_sizes, in_sizes: elements by rank."""
        # A rank may have nothing to send, and cat wants at least one tensor.
        flat = torch.cat([self.like.new_empty(0), *(x.reshape(-1) for x in tensors)])
        flat = flat.to(self.wire)
        received = flat.new_empty(sum(in_sizes))
        dist.all_to_all_single(received, flat, in_sizes, out_sizes, group=self.group)
        return received.to(self.like.device)


def holders_of(
    p: Tensor, tp_group: dist.ProcessGroup | None = None
) -> dict[int, tuple[tuple[int, ...] | None, int]]:
    """Rank -> (its coordinate in p's mesh or None, its rank in tp_group or 0), in rank order.

    Of the ranks that together hold the full tensor once. tp_group: of a p that is itself a shard
    over that group, else None.
    """
    this_rank = dist.get_rank() if dist.is_initialized() else 0
    holders = {this_rank: None}
    if hasattr(p, "placements"):
        # Ranks along a dimension that shards p complete the tensor. Along any other dimension they
        # hold copies of this shard, so this rank alone counts.
        mesh = p.device_mesh
        dims = sharded_dims(p)
        index = []
        for dim, (here, size) in enumerate(zip(mesh.get_coordinate(), mesh.shape)):
            index.append(range(size) if dim in dims else range(here, here + 1))
        ranks = mesh.mesh[tuple(slice(i.start, i.stop) for i in index)].flatten().tolist()
        holders = dict(zip(ranks, itertools.product(*index)))
    tp_ranks = [this_rank]
    if tp_group is not None:
        tp_ranks = dist.get_process_group_ranks(tp_group)
    # All ranks are one grid: a step along tp is the same difference wherever it begins.
    all_of_them = {}
    for rank, coordinate in holders.items():
        for tp_rank, other in enumerate(tp_ranks):
            all_of_them[rank + other - this_rank] = coordinate, tp_rank
    return dict(sorted(all_of_them.items()))


def first_holder(p: Tensor, group: dist.ProcessGroup) -> int:
    """The rank, in the group of the ranks that hold the DTensor p once, of its first shard.

    That one is empty only if p is.
    """
    dims = sharded_dims(p)
    first = []
    for dim, here in enumerate(p.device_mesh.get_coordinate()):
        first.append(0 if dim in dims else here)
    return dist.get_group_rank(group, int(p.device_mesh.mesh[tuple(first)]))


def shard_held(
    p: Tensor,
    tp_shard: Shard | None,
    tp_group: dist.ProcessGroup | None,
    coordinate: tuple[int, ...] | None,
    tp_rank: int,
) -> tuple[Shard, tuple[int, ...]]:
    """(where the shard of p lies, its shape) on one of its holders, see `holders_of`.

    Raises ValueError where tp_shard is none of the equal parts along one dimension.
    """
    if coordinate is None:
        shard, shape = shard_of(p), tuple(p.shape)
    else:
        shard, shape = shard_at(p, coordinate)
    if tp_shard is None:
        return shard, shape
    # Equal parts in rank order: another rank's offset follows from the size of this rank's part.
    n = dist.get_world_size(tp_group)
    dims = [dim for dim, size in enumerate(p.shape) if size != tp_shard.global_shape[dim]]
    here = [0] * p.ndim
    there = [0] * p.ndim
    for dim in dims:
        here[dim] = dist.get_rank(tp_group) * p.shape[dim]
        there[dim] = tp_rank * p.shape[dim]
    is_equal_part = len(dims) == 1 and n * p.shape[dims[0]] == tp_shard.global_shape[dims[0]]
    if not is_equal_part or tp_shard.offsets != tuple(here):
        raise ValueError(
            f"{tuple(p.shape)} at {tp_shard.offsets} is none of {n} equal parts of "
            f"{tp_shard.global_shape} along one dimension, as parallel/tensor.py cuts them"
        )
    return shard_of_shard(Shard(tp_shard.global_shape, tuple(there)), shard), shape


def spread_of(p: Tensor, is_tp_shard: bool) -> tuple | None:
    """What tells the sets of ranks apart that hold a weight once; None: this rank alone does.

    Two weights of one spread are held by the same ranks. Nobody lists the ranks for it.
    """
    dims = sharded_dims(p) if hasattr(p, "placements") else []
    if not dims and not is_tp_shard:
        return None
    return (p.device_mesh if dims else None), tuple(dims), is_tp_shard


def sharded_dims(p: Tensor) -> list[int]:
    """The dimensions of its mesh along which the DTensor p is sharded."""
    dims = []
    for dim, (placement, size) in enumerate(zip(p.placements, p.device_mesh.shape)):
        if size > 1 and not placement.is_replicate():
            dims.append(dim)
    return dims


def wire_device(p: Tensor) -> torch.device:
    """The device from which messages about p leave."""
    if hasattr(p, "device_mesh"):
        return torch.device(p.device_mesh.device_type)
    return p.device


def group_of(p: Tensor, tp_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A process group of the ranks that together hold p once: one that exists, or a new one.

    tp_group: as in holders_of.
    """
    ranks = list(holders_of(p, tp_group))
    # A group costs memory and, with NCCL, connections: look among the existing ones first.
    known = []
    if tp_group is not None:
        known.append(tp_group)
    if hasattr(p, "placements"):
        known += [p.device_mesh.get_group(dim) for dim in sharded_dims(p)]
    for group in known:
        if sorted(dist.get_process_group_ranks(group)) == ranks:
            return group
    return new_group(ranks, wire_device(p))


def unpack(flat: Tensor, views: list[Tensor]) -> None:
    """Copies `flat` into the views, one after the other."""
    # A rank may own nothing, and foreach refuses empty lists.
    if not views:
        return
    parts = flat.split([view.numel() for view in views])
    parts = [part.view(view.shape) for part, view in zip(parts, views)]
    torch._foreach_copy_(views, parts)


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
