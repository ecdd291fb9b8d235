"""Who has what of a weight that is spread over ranks, and the exchange between shards and owners.

A weight has one owner among the ranks it is spread over; A2 is the part of A on rank 2:

                rank 0     rank 1     rank 2                   rank 0     rank 1     rank 2
    shards      A0 B0 C0   A1 B1 C1   A2 B2 C2    to_owners    A0 A1 A2   B0 B1 B2   C0 C1 C2
                                                  to_shards
                                                  <--------

Each way is one uneven all-to-all for all weights of one dtype and one set of ranks: (N-1)/N x the
bytes of this rank's shards, on average. What a DTensor's shard is, and which ranks together hold
the whole once, is read from its mesh and its placements.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import new_group


class Exchange:
    """Weights of one dtype, spread over one group: all their shards go to the owners or come back
    at once."""

    def __init__(self, params: list[Tensor], places: list["Place"], group: dist.ProcessGroup):
        rank, n = dist.get_rank(group), dist.get_world_size(group)
        # Weights kept on the CPU still travel between GPUs
        mesh = getattr(params[0], "device_mesh", None)
        self.params, self.group = params, group
        self.wire = params[0].device if mesh is None else torch.device(mesh.device_type)
        shards = [local(p) for p in params]
        self.like = shards[0]
        owners = choose_owners([place.whole for place in places], n)
        self.by_owner = sorted(range(len(params)), key=lambda i: owners[i])  # the order on the wire
        self.mine = [i for i in self.by_owner if owners[i] == rank]
        self.boxes = [None] * n  # rank -> what it has of each parameter
        dist.all_gather_object(
            self.boxes, [(place.shape, place.offsets) for place in places], group
        )
        self.in_sizes = [sum(math.prod(boxes[i][0]) for i in self.mine) for boxes in self.boxes]
        # Elements of mine that go to each owner; in_sizes: that come from each rank
        self.out_sizes = [0] * n
        for shard, owner in zip(shards, owners):
            self.out_sizes[owner] += shard.numel()
        sent = sum(self.out_sizes) + sum(self.in_sizes) - self.out_sizes[rank] - self.in_sizes[rank]
        self.sent_bytes = sent * self.like.element_size()  # there and back
        self.wholes = {i: nn.Parameter(self.like.new_empty(places[i].whole)) for i in self.mine}

    def pieces(self, wholes: dict[int, Tensor]) -> list[Tensor]:
        """Views of what each rank holds of `wholes`, rank by rank."""
        return [part(wholes[i], boxes[i]) for boxes in self.boxes for i in self.mine]

    def to_owners(self, shards: list[Tensor], wholes: dict[int, Tensor]) -> None:
        """Everybody's `shards` into the owners' `wholes`, in place."""
        received = self.send([shards[i] for i in self.by_owner], self.out_sizes, self.in_sizes)
        unpack(received, self.pieces(wholes))

    def to_shards(self) -> None:
        """The owners' weights into everybody's shards."""
        received = self.send(self.pieces(self.wholes), self.in_sizes, self.out_sizes)
        unpack(received, [local(self.params[i]) for i in self.by_owner])

    def send(self, tensors: list[Tensor], out_sizes: list[int], in_sizes: list[int]) -> Tensor:
        flat = torch.cat([self.like.new_empty(0), *(x.reshape(-1) for x in tensors)]).to(self.wire)
        received = flat.new_empty(sum(in_sizes))
        dist.all_to_all_single(received, flat, in_sizes, out_sizes, group=self.group)
        return received.to(self.like.device)


def local(p: Tensor) -> Tensor:
    """The part of it on this rank, in the same memory."""
    return p.to_local() if hasattr(p, "placements") else p.detach()


class Place(NamedTuple):
    """Where a weight's part on this rank lies, and the ranks that together hold the whole once."""

    whole: tuple[int, ...]
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    ranks: tuple[int, ...]


def find(p: Tensor, cut: tuple | None = None, cut_group: dist.ProcessGroup | None = None) -> Place:
    """The place of p: a plain tensor, a DTensor, or either of them a part (dim, whole shape,
    offset) that was cut over cut_group."""
    whole, shape, offsets = tuple(p.shape), tuple(p.shape), (0,) * p.ndim
    ranks = (me,) = (dist.get_rank() if dist.is_initialized() else 0,)
    if hasattr(p, "placements"):
        mesh, dims, (shape, offsets) = p.device_mesh, sharded_dims(p), box(p)
        at = [slice(None) if d in dims else i for d, i in enumerate(mesh.get_coordinate())]
        ranks = tuple(mesh.mesh[tuple(at)].flatten().tolist())
    if cut is not None:
        dim, whole, offset = cut
        offsets = tuple(o + offset * (i == dim) for i, o in enumerate(offsets))
        others = dist.get_process_group_ranks(cut_group)  # the ranks are a grid
        ranks = tuple(sorted(rank + other - me for rank in ranks for other in others))
    return Place(tuple(whole), shape, offsets, ranks)


def sharded_dims(p: Tensor) -> list[int]:
    """The dimensions of its mesh along which the DTensor p is cut."""
    dims = enumerate(zip(p.placements, p.device_mesh.shape))
    return [d for d, (placement, size) in dims if size > 1 and not placement.is_replicate()]


def group_of(
    ranks: tuple[int, ...], p: Tensor, cut_group: dist.ProcessGroup | None
) -> dist.ProcessGroup:
    known = [cut_group] if cut_group is not None else []
    known += (
        [p.device_mesh.get_group(d) for d in sharded_dims(p)] if hasattr(p, "placements") else []
    )
    for group in known:
        if tuple(sorted(dist.get_process_group_ranks(group))) == ranks:
            return group
    wire = torch.device(p.device_mesh.device_type) if hasattr(p, "device_mesh") else p.device
    return new_group(list(ranks), wire)


def box(p: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offsets of this rank's part of the DTensor p."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    if tuple(shape) != tuple(p.to_local().shape):
        raise ValueError(
            f"{tuple(p.shape)} with placements {p.placements}: the part on this rank is no box; "
            "shard its dimensions by one mesh axis each"
        )
    return tuple(shape), tuple(offsets)


def part(whole: Tensor, box: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    """A view of the box."""
    for dim, (size, offset) in enumerate(zip(*box)):
        whole = whole.narrow(dim, offset if size else 0, size)
    return whole


def choose_owners(shapes: list[tuple[int, ...]], n: int) -> list[int]:
    """Largest first, each to the rank that has least: matrices of one shape go round all ranks."""
    owners, load = [0] * len(shapes), [0] * n
    for i in sorted(range(len(shapes)), key=lambda i: (-math.prod(shapes[i]), shapes[i])):
        owners[i] = min(range(n), key=lambda rank: load[rank])
        load[owners[i]] += math.prod(shapes[i])
    return owners


def unpack(flat: Tensor, views: list[Tensor]) -> None:
    """Consecutive stretches of `flat` into the views."""
    if views:
        pieces = flat.split([view.numel() for view in views])
        torch._foreach_copy_(views, [piece.view(view.shape) for piece, view in zip(pieces, views)])
