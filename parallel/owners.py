"""Which ranks have which shard of a weight, and the exchange between shards and owners.

A sharded weight has one owner among the ranks that hold its shards; A2 is the shard of A on rank 2:

                rank 0     rank 1     rank 2                   rank 0     rank 1     rank 2
    shards      A0 B0 C0   A1 B1 C1   A2 B2 C2    to_owners    A0 A1 A2   B0 B1 B2   C0 C1 C2
                                                  to_shards
                                                  <--------

Each way is one uneven all-to-all for all weights of one dtype and one set of ranks: (N-1)/N x the
bytes of this rank's shards, on average. A DTensor's mesh and placements tell which ranks together
hold it once, and which shard is here (parallel/shard.py).

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
        exchange = Exchange(rows, shards, dist.group.WORLD)
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
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import new_group
from parallel.replicas import owners_by_size
from parallel.shard import Shard, local, shard_of, shard_of_shard


class Exchange:
    """Weights of one dtype, sharded over one group, whose shards travel together.

    params: the weights, plain tensors or DTensors; shards: where this rank's shard of each lies.
    full: index of each weight owned here -> its full tensor. sent_bytes: by this rank, there and
    back. Collective.
    """

    def __init__(self, params: list[Tensor], shards: list[Shard], group: dist.ProcessGroup):
        rank = dist.get_rank(group)
        n = dist.get_world_size(group)
        self.params = params
        self.group = group
        # Offloaded weights lie on the CPU, but their messages travel between GPUs.
        self.wire = wire_device(params[0])
        self.like = local(params[0])  # for its dtype and its device
        owners = owners_by_size([shard.global_shape for shard in shards], n)
        self.by_owner = sorted(range(len(params)), key=lambda i: owners[i])  # the order on the wire
        self.mine = [i for i in self.by_owner if owners[i] == rank]

        # Shards may be uneven or empty, so each rank tells the owners where its shards lie.
        here = [(shard, tuple(local(p).shape)) for shard, p in zip(shards, params)]
        self.shards = [None] * n  # [rank][weight] -> (Shard, local shape)
        dist.all_gather_object(self.shards, here, group)

        # Elements by rank, sent and received on the way to the owners; to_shards swaps the two.
        self.out_sizes = [0] * n
        for p, owner in zip(params, owners):
            self.out_sizes[owner] += local(p).numel()
        self.in_sizes = []
        for there in self.shards:
            self.in_sizes.append(sum(math.prod(there[i][1]) for i in self.mine))
        to_self = self.out_sizes[rank] + self.in_sizes[rank]
        n_sent = sum(self.out_sizes) + sum(self.in_sizes) - to_self
        self.sent_bytes = n_sent * self.like.element_size()

        self.full = {}
        for i in self.mine:
            self.full[i] = nn.Parameter(self.like.new_empty(shards[i].global_shape))

    def views(self, full: dict[int, Tensor]) -> list[Tensor]:
        """Each rank's shards of the full tensors, rank by rank, as views."""
        views = []
        for there in self.shards:
            for i in self.mine:
                shard, shape = there[i]
                views.append(shard.narrow(full[i], shape))
        return views

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


def locate(
    p: Tensor, tp_shard: Shard | None = None, tp_group: dist.ProcessGroup | None = None
) -> tuple[Shard, tuple[int, ...]]:
    """(where this rank's shard of p lies, the ranks that together hold the full tensor once).

    p: a plain tensor or a DTensor. tp_shard: where p itself lies if it is a shard over tp_group.
    """
    shard = shard_of(p)
    this_rank = dist.get_rank() if dist.is_initialized() else 0
    ranks = (this_rank,)
    if hasattr(p, "placements"):
        # Ranks along a dimension that shards p complete the tensor. Along any other dimension they
        # hold copies of this shard, so this rank alone counts.
        mesh = p.device_mesh
        dims = sharded_dims(p)
        index = []
        for dim, coordinate in enumerate(mesh.get_coordinate()):
            index.append(slice(None) if dim in dims else coordinate)
        ranks = tuple(mesh.mesh[tuple(index)].flatten().tolist())
    if tp_shard is not None:
        shard = shard_of_shard(tp_shard, shard)
        # All ranks are one grid: a step along tp is the same difference wherever it begins.
        tp_ranks = dist.get_process_group_ranks(tp_group)
        ranks = tuple(sorted(rank + other - this_rank for rank in ranks for other in tp_ranks))
    return shard, ranks


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


def group_of(
    ranks: tuple[int, ...], p: Tensor, tp_group: dist.ProcessGroup | None
) -> dist.ProcessGroup:
    """A process group of these ranks, which hold p: one that exists already, or a new one."""
    # A group costs memory and, with NCCL, connections: look among the existing ones first.
    known = []
    if tp_group is not None:
        known.append(tp_group)
    if hasattr(p, "placements"):
        known += [p.device_mesh.get_group(dim) for dim in sharded_dims(p)]
    for group in known:
        if tuple(sorted(dist.get_process_group_ranks(group))) == ranks:
            return group
    return new_group(list(ranks), wire_device(p))


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
