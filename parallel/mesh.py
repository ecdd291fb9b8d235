"""Who stands where: the ranks of a run as one 4-D grid (pp, dp, cp, tp), always all four, most of
them of size 1.

    rank = ((pp_i * dp + dp_i) * cp + cp_i) * tp + tp_i     tp innermost: on the fastest link

    pp  pipeline stages: layers are split          dp  data parallel: sequences are split
    cp  context parallel: each sequence is split   tp  tensor parallel: each matrix is split

A group holds the ranks that differ from me in one coordinate alone; `replicas` those that differ in
dp or cp, which hold the same weights and sum their gradients. A group of size 1 is None, and a
collective over None is the identity: one process runs the same lines as a thousand.
"""

import hashlib
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    sizes: dict[str, int]  # {"pp": 1, "dp": 4, "cp": 1, "tp": 1}
    coords: dict[str, int]  # my place on each axis
    # Pp, dp, cp, tp, replicas; None where the size is 1
    groups: dict[str, dist.ProcessGroup | None]
    rank: int
    world: int
    device: torch.device  # where small tensors must lie to be sent

    def sum(self, *values: float) -> list[float]:
        """Numbers added over all ranks, in float64."""
        if self.world == 1:
            return [float(v) for v in values]
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(x)
        return x.tolist()

    def agree(self, value: int) -> int:
        """Rank 0's value on every rank; also a barrier."""
        return int(self.sum(value if self.rank == 0 else 0)[0])

    def alike(self, text: str) -> bool:
        """Do all ranks have the same text? All learn it."""
        mine = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
        return self.sum(self.agree(mine) != mine) == [0.0]

    def norm(self, tensors: list[torch.Tensor], everywhere: bool = True) -> torch.Tensor:
        """The 2-norm of the tensors of all ranks (or only of mine) together, 0-dim; the same on all
        of them.

        What several ranks hold, one of them may bring.
        """
        norm = torch.nn.utils.get_total_norm(tensors)
        if everywhere and self.world > 1:
            squares = norm.to(self.device, torch.float64).square()
            dist.all_reduce(squares)
            norm = squares.sqrt().to(tensors[0].device if tensors else self.device)
        return norm

    def table(self) -> list[str]:
        """The grid in lines for people; [] for one process."""
        what = dict(
            pp="stages of layers",
            dp="sequences",
            cp="parts of each sequence",
            tp="parts of each matrix",
        )
        lines, stride = [], self.world
        for axis, size in self.sizes.items():
            stride //= size
            first = " ".join(str(i * stride) for i in range(min(size, 8))) + " ..." * (size > 8)
            lines += [f"{axis}  {size:>4} {what[axis]:22} ranks {first}"] if size > 1 else []
        return ["mesh: the ranks along each axis, beginning at rank 0", *lines] if lines else []

    def first_on_each_machine(self, work):
        """work() by one process of each machine, then by the others: the first one fills the
        caches."""
        first = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        result = work() if first else None
        self.agree(0)
        return result if first else work()


def make_mesh(device: torch.device, tp: int = 1, cp: int = 1, pp: int = 1) -> Mesh:
    """The grid over the existing process group (or over this one process); dp takes what the others
    leave.

    Collective: all ranks make all groups in the same order. Raises ValueError if the sizes do not
    divide the world.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world % (tp * cp * pp):
        raise ValueError(
            f"tp*cp*pp = {tp * cp * pp} does not divide the {world} processes; start with "
            f"torchrun --nproc_per_node={tp * cp * pp} or a multiple of it"
        )
    sizes = dict(pp=pp, dp=world // (tp * cp * pp), cp=cp, tp=tp)
    grid = torch.arange(world).view(*sizes.values())
    coords = dict(zip(AXES, (int(i) for i in (grid == rank).nonzero()[0])))
    groups, made = {}, {}
    for name, dims in dict(pp=[0], dp=[1], cp=[2], tp=[3], replicas=[1, 2]).items():
        size = math.prod(grid.shape[dim] for dim in dims)
        for members in grid.movedim(dims, list(range(-len(dims), 0))).reshape(-1, size).tolist():
            if size > 1 and tuple(members) not in made:
                made[tuple(members)] = new_group(members, device, everybody=True)
            if rank in members:
                groups[name] = made.get(tuple(members))
    return Mesh(sizes, coords, groups, rank, world, device)


def new_group(ranks: list[int], device: torch.device, everybody: bool = False) -> dist.ProcessGroup:
    """A group of these ranks, made by them alone or by `everybody`, that waits no longer than the
    world does: torch's default for a group is half an hour."""
    options = getattr(dist.group.WORLD._get_backend(device), "options", None)
    patience = getattr(options, "_timeout", None)
    return dist.new_group(ranks, timeout=patience, use_local_synchronization=not everybody)
