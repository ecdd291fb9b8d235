"""Any torch optimizer on a model whose weights are spread over ranks: as DTensors (FSDP2), as the plain parts
that parallel/tensor.py leaves (`cuts`), or as both.

The optimizer never learns of it: it gets plain tensors. Which ones is decided group by group.

local   A method that works element by element (SGD, AdamW, Lion, Schedule-Free) steps the shards it has. Its
        parameters are plain tensors in the very memory of the DTensors' shards; nothing is sent.

owner   A method that looks at a whole matrix, row or norm (Muon, SOAP, Shampoo, Adafactor, LARS, LAMB). Each
        parameter has one owner among the ranks it is spread over; A2 is the part of A on rank 2:

                    rank 0     rank 1     rank 2                  rank 0     rank 1     rank 2
        gradients   A0 B0 C0   A1 B1 C1   A2 B2 C2   all-to-all   A0 A1 A2   B0 B1 B2   C0 C1 C2
        step                                                      A          B          C
        weights     A0 B0 C0   A1 B1 C1   A2 B2 C2   all-to-all   A          B          C
                                                     <---------

        Two collectives a step for each dtype and set of ranks, instead of one gather per parameter. State
        lives at the owner alone, and the owners work at the same time: Newton-Schulz spreads over the ranks
        for nothing. A matrix method run on the shards would silently be another method; run on DTensors, it
        repeats the work on every rank and sends something inside each product.

Bytes sent per rank and step: local 0; owner 2 (N-1)/N x the bytes of this rank's shards, on average. Memory:
the owners' whole weights, over all ranks one more copy of the model.

Any model of DTensors and any torch optimizer, in three lines:

    fully_shard(model)
    optimizer = make_optimizer(torch.optim.Adafactor, model.parameters(), lr=0.02)
    loss.backward(), optimizer.step(), optimizer.zero_grad()

A class that does not say whether it is `elementwise` gets owners, which is always right; with
make_optimizer(torch.optim.AdamW, model.parameters(), elementwise=True) nothing is sent.

What does not fit: a method that couples different parameters (LBFGS, Prodigy) sees only those of its rank;
step(closure) is refused; add_param_group takes no DTensors. Whoever loads weights into the model afterwards
has to call Adapter.take_weights().
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import new_group


class Exchange:
    """Weights of one dtype, spread over one group: all their shards go to the owners or come back at once."""

    def __init__(self, params: list[Tensor], places: list["Place"], group: dist.ProcessGroup):
        rank, n = dist.get_rank(group), dist.get_world_size(group)
        mesh = getattr(params[0], "device_mesh", None)  # weights kept on the CPU still travel between GPUs
        self.params, self.group = params, group
        self.wire = params[0].device if mesh is None else torch.device(mesh.device_type)
        shards = [local(p) for p in params]
        self.like = shards[0]
        owners = choose_owners([place.whole for place in places], n)
        self.by_owner = sorted(range(len(params)), key=lambda i: owners[i])  # the order on the wire
        self.mine = [i for i in self.by_owner if owners[i] == rank]
        self.boxes = [None] * n  # rank -> what it has of each parameter
        dist.all_gather_object(self.boxes, [(place.shape, place.offsets) for place in places], group)
        self.in_sizes = [sum(math.prod(boxes[i][0]) for i in self.mine) for boxes in self.boxes]
        self.out_sizes = [0] * n  # elements of mine that go to each owner; in_sizes: that come from each rank
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


class Adapter:
    """`optimizer`, an instance of `cls` on plain tensors, and what ties it to the weights in `groups`.

    groups: tensors or dicts, as torch's optimizers take them; what this rank does not step is left out of a
    dict's `params` and `names`. elementwise: may a shard be stepped alone? None asks the class, and one that
    does not say counts as no; Muon's groups with use_muon=False always may. cuts: name -> (dim, whole shape,
    offset) of the parameters that are a part, along dim, of a whole spread over cut_group.

    boxes: name -> (whole shape, offsets) of each parameter of which the optimizer here has a shard.
    sent_bytes: by this rank in each step, also on the optimizer. Collective: all ranks make it together, with
    the same groups.
    """

    @torch.no_grad()
    def __init__(self, cls: type[torch.optim.Optimizer], groups, elementwise: bool | None = None,
                 cuts: dict[str, tuple] | None = None, cut_group: dist.ProcessGroup | None = None,
                 **arguments):  # fmt: skip
        groups = list(groups)
        groups = groups if isinstance(groups[0], dict) else [{"params": groups}]
        groups = [{**g, "params": [p] if torch.is_tensor(p := g["params"]) else list(p)} for g in groups]
        elementwise = getattr(cls, "elementwise", False) if elementwise is None else elementwise
        self.params = [p for group in groups for p in group["params"]]
        self.local, self.boxes = [], {}  # (a DTensor, its shard as a parameter of the optimizer)
        stepped, spread = {}, {}  # weight -> what the optimizer gets; (ranks, dtype, device) -> weights
        for group in groups:
            for p, name in zip(group["params"], group.get("names") or [None] * len(group["params"])):
                place = find(p, (cuts or {}).get(name), cut_group)
                if len(place.ranks) > 1 and not (elementwise or group.get("use_muon") is False):
                    spread.setdefault((place.ranks, p.dtype, local(p).device), []).append((p, place))
                    continue
                if not hasattr(p, "placements"):
                    stepped[p] = p
                elif local(p).numel():
                    stepped[p] = nn.Parameter(local(p), p.requires_grad)
                    self.local.append((p, stepped[p]))
                if name is not None and len(place.ranks) > 1 and p in stepped:
                    self.boxes[name] = place.whole, place.offsets
        self.exchanges = []
        for (ranks, *_), found in spread.items():
            params, places = map(list, zip(*found))
            self.exchanges.append(Exchange(params, places, group_of(ranks, params[0], cut_group)))
        for exchange in self.exchanges:
            stepped |= {exchange.params[i]: whole for i, whole in exchange.wholes.items()}
        self.take_weights()
        self.sent_bytes = sum(exchange.sent_bytes for exchange in self.exchanges)
        self.optimizer = cls([only(group, stepped) for group in groups], **arguments)
        self.optimizer.register_step_pre_hook(self.before_step)
        self.optimizer.register_step_post_hook(self.after_step)
        self.optimizer.zero_grad, self.optimizer.sent_bytes = self.zero_grad, self.sent_bytes

    @torch.no_grad()
    def before_step(self, optimizer, args, kwargs) -> None:
        if any(x is not None for x in (*args[1:], *kwargs.values())):
            raise ValueError("step(closure) has no meaning with sharded weights: they would be needed in the "
                             "middle of a step; call loss.backward() and then step()")  # fmt: skip
        for p, shard in self.local:
            shard.data, shard.grad = local(p), None if p.grad is None else local(p.grad)
        for exchange in self.exchanges:
            grads = {i: torch.empty_like(whole) for i, whole in exchange.wholes.items()}
            exchange.to_owners([torch.zeros_like(local(p)) if p.grad is None else local(p.grad)
                                for p in exchange.params], grads)  # fmt: skip
            for i, whole in exchange.wholes.items():
                whole.grad = None if exchange.params[i].grad is None else grads[i]

    @torch.no_grad()
    def after_step(self, optimizer, args, kwargs) -> None:
        self.share_weights()
        for plain in (shard for _, shard in self.local):
            plain.grad = None
        for exchange in self.exchanges:
            for whole in exchange.wholes.values():
                whole.grad = None

    @torch.no_grad()
    def share_weights(self) -> None:
        """After something other than step() changed the optimizer's parameters: the model sees it too."""
        for exchange in self.exchanges:
            exchange.to_shards()

    @torch.no_grad()
    def take_weights(self) -> None:
        """After something other than the optimizer changed the model's weights: the owners see it too."""
        for exchange in self.exchanges:
            exchange.to_owners([local(p) for p in exchange.params], exchange.wholes)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The model's gradients; the optimizer's own live only during a step."""
        for p in self.params:
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()


def make_optimizer(cls: type[torch.optim.Optimizer], groups, elementwise: bool | None = None,
                   **arguments) -> torch.optim.Optimizer:  # fmt: skip
    """cls(groups, **arguments) for DTensors; see Adapter."""
    return Adapter(cls, groups, elementwise, **arguments).optimizer


# ---- who has what ----------------------------------------------------------------------------------------
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
    """The place of p: a plain tensor, a DTensor, or either of them a part (dim, whole shape, offset) that was
    cut over cut_group."""
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


def group_of(ranks: tuple[int, ...], p: Tensor, cut_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    known = [cut_group] if cut_group is not None else []
    known += [p.device_mesh.get_group(d) for d in sharded_dims(p)] if hasattr(p, "placements") else []
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
        raise ValueError(f"{tuple(p.shape)} with placements {p.placements}: the part on this rank is no box; "
                         "shard its dimensions by one mesh axis each")  # fmt: skip
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


def only(group: dict, stepped: dict) -> dict:
    """The group with what this rank steps in place of its DTensors, and no more names than that."""
    here = [p in stepped for p in group["params"]]
    kept = {"params": [stepped[p] for p, yes in zip(group["params"], here) if yes]}
    if "names" in group:
        kept["names"] = [name for name, yes in zip(group["names"], here) if yes]
    return {**group, **kept}


def unpack(flat: Tensor, views: list[Tensor]) -> None:
    """Consecutive stretches of `flat` into the views."""
    if views:
        pieces = flat.split([view.numel() for view in views])
        torch._foreach_copy_(views, [piece.view(view.shape) for piece, view in zip(pieces, views)])
