"""The ranks of a run as one 4-D grid (pp, dp, cp, tp): always four axes, most of them of size 1.

    rank = ((pp_i * dp + dp_i) * cp + cp_i) * tp + tp_i     tp innermost: on the fastest link

    pp  pipeline stages: layers are split          dp  data parallel: sequences are split
    cp  context parallel: each sequence is split   tp  tensor parallel: each matrix is split

The group of an axis holds the ranks that differ from this one in that coordinate alone. The group
`dp_cp` holds the ranks that differ in dp or cp: they have the same weights and sum their gradients.
With expert parallelism `ep` neighbours in dp share out the experts (parallel/expert.py): they are
the group `ep`, and `expert_dp_cp` are the ranks of dp_cp that hold the same experts.
A group of size 1 is None, and a collective over None is the identity: one process runs the same
lines as a thousand.

Example:
    import torch
    from parallel.mesh import make_mesh

    mesh = make_mesh(torch.device("cpu"))  # under torchrun: make_mesh(device, tp=2)
    print(mesh.sizes, mesh.coords)
    assert mesh.sizes == {"pp": 1, "dp": 1, "cp": 1, "tp": 1}
    assert mesh.sum(2, 3) == [2.0, 3.0] and mesh.groups["tp"] is None
"""

import hashlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

# From the largest stride to the smallest: neighbours along tp are neighbouring ranks.
AXES = ("pp", "dp", "cp", "tp")
SPLITS = {
    "pp": "stages of layers",
    "dp": "sequences",
    "cp": "parts of each sequence",
    "tp": "parts of each matrix",
}


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid, its groups, and small sums over all ranks."""

    sizes: dict[str, int]  # {"pp": 1, "dp": 4, "cp": 1, "tp": 1}
    coords: dict[str, int]  # this rank's index on each axis
    groups: dict[str, dist.ProcessGroup | None]  # by axis, and others; None where the size is 1
    rank: int
    world: int
    device: torch.device  # where small tensors must lie to be sent

    def sum(self, *values: float) -> list[float]:
        """Each of the values, added over all ranks in float64."""
        if self.world == 1:
            return [float(value) for value in values]
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def agree(self, value: int) -> int:
        """Rank 0's value on every rank. It is a barrier too."""
        if self.rank != 0:
            value = 0
        return int(self.sum(value)[0])

    def alike(self, text: str) -> bool:
        """True on all ranks if all of them passed the same text, else False on all."""
        # 48 bits of a hash pass through float64 exactly.
        mine = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
        return self.sum(self.agree(mine) != mine) == [0.0]

    def norm(self, tensors: list[torch.Tensor], everywhere: bool = True) -> torch.Tensor:
        """The 2-norm of the tensors of all ranks together, 0-dim, the same on all ranks.

        Where several ranks hold the same tensor, one of them passes it. everywhere=False: the norm
        of this rank's tensors alone, and nothing is sent.
        """
        # A norm in bfloat16 has three digits, and one in float16 ends at 65504.
        is_narrow = any(x.dtype.itemsize < 4 for x in tensors)
        if is_narrow:
            wide = [torch.promote_types(x.dtype, torch.float32) for x in tensors]
            norms = [torch.linalg.vector_norm(x, dtype=w) for x, w in zip(tensors, wide)]
            norm = torch.stack([x.to(norms[0].device, norms[0].dtype) for x in norms]).norm()
        else:
            norm = torch.nn.utils.get_total_norm(tensors)
        if everywhere and self.world > 1:
            # Squares add up, norms do not. The norm of offloaded gradients lies on the CPU.
            squares = norm.to(self.device, torch.float64).square()
            dist.all_reduce(squares)
            norm = squares.sqrt()
            norm = norm.to(tensors[0].device if tensors else self.device)
        return norm

    def table(self) -> list[str]:
        """The grid in lines for people; [] for one process."""
        lines = []
        stride = self.world
        for axis, size in self.sizes.items():
            # The last axis varies fastest: neighbours on this axis are `stride` ranks apart.
            stride //= size
            if size > 1:
                ranks = " ".join(str(i * stride) for i in range(min(size, 8)))
                dots = " ..." if size > 8 else ""
                lines.append(f"{axis}  {size:>4} {SPLITS[axis]:22} ranks {ranks}{dots}")
        if lines:
            lines.insert(0, "mesh: the ranks along each axis, beginning at rank 0")
        return lines

    def first_on_each_machine(self, work: Callable):
        """work() by one process of each machine, then by the others, which find its caches full."""
        is_first = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        if is_first:
            result = work()
        self.agree(0)
        if not is_first:
            result = work()
        return result


def make_mesh(device: torch.device, tp: int = 1, cp: int = 1, pp: int = 1, ep: int = 1) -> Mesh:
    """The grid over the existing process group, or over this process alone; dp takes what is left.

    Collective, although a rank makes its own groups alone, at most one an axis. Raises ValueError
    if tp*cp*pp does not divide the number of processes, or ep does not divide dp.
    """
    rank = 0
    world = 1
    if dist.is_initialized():
        rank = dist.get_rank()
        world = dist.get_world_size()
    if world % (tp * cp * pp):
        raise ValueError(
            f"tp*cp*pp = {tp * cp * pp} does not divide the {world} processes; start with "
            f"torchrun --nproc_per_node={tp * cp * pp} or a multiple of it"
        )
    dp = world // (tp * cp * pp)
    if dp % ep:
        raise ValueError(
            f"ep={ep} does not divide the {dp} data-parallel ranks; start with torchrun "
            f"--nproc_per_node={tp * cp * pp * ep} or a multiple of it"
        )
    sizes = {"pp": pp, "dp": dp, "cp": cp, "tp": tp}

    # Axis -> (its size, how far apart in rank two neighbours are). dp and cp are neighbouring axes,
    # so that dp_cp is one axis too.
    lines = {
        "pp": (pp, dp * cp * tp),
        "dp": (dp, cp * tp),
        "cp": (cp, tp),
        "tp": (tp, 1),
        "dp_cp": (dp * cp, tp),
        "ep": (ep, cp * tp),
    }
    index = {}  # this rank's, on each line
    groups = {}
    made = {}  # ranks -> their group
    # Whoever makes a group waits for its other members. No ring of waiting ranks can come about:
    # the groups of one axis have no rank in common, and all ranks take the axes in this order.
    for name, (size, stride) in lines.items():
        index[name] = rank // stride % size
        first = rank - index[name] * stride
        members = range(first, first + size * stride, stride)
        # With cp=1, dp_cp is dp: two names for one group.
        if size > 1 and members not in made:
            made[members] = new_group(list(members), device)
        groups[name] = made.get(members)
    # The ranks of this one's dp_cp with the same place in their ep group.
    first = rank - index["dp_cp"] * tp
    members = []
    for i in range(dp):
        if i % ep == index["ep"]:
            members += range(first + i * cp * tp, first + (i + 1) * cp * tp, tp)
    groups["expert_dp_cp"] = None
    if ep == 1:
        groups["expert_dp_cp"] = groups["dp_cp"]
    elif len(members) > 1:
        groups["expert_dp_cp"] = new_group(members, device)
    coords = {axis: index[axis] for axis in AXES}
    return Mesh(sizes, coords, groups, rank, world, device)


def new_group(ranks: list[int], device: torch.device) -> dist.ProcessGroup:
    """A process group of these ranks, with the timeout of the group of all ranks.

    Its members alone call this. Each must have made equally many groups before, because torch names
    a group by its ranks and that number, and members that use two names wait for each other. With
    gloo a member reads the address of each other one; with NCCL the first collective connects them.
    """
    # The group of all ranks is there already: a second one would cost as much again.
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    # Only without a device_id can the members do this alone: see parallel/launch.py.
    # torch would give a new group its own default, half an hour.
    options = getattr(dist.group.WORLD._get_backend(device), "options", None)
    patience = getattr(options, "_timeout", None)
    return dist.new_group(ranks, timeout=patience, use_local_synchronization=True)


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
