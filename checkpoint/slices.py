"""A tree of tensors as JSON and slices: who holds which shard of which tensor, under which name.

    rank 0  {"model": {"w": Slice(rows 0, 1)}, "step": 7} ─┐ merge  tree    {"model": {"w": TENSOR}}
    rank 1  {"model": {"w": Slice(rows 2, 3)}}            ─┘ ────►  tensors "model/w": rows 0, 1 in
                                                                            rank_0, 2, 3 in rank_1

A tensor's name is its path in the tree. A slice is a shard of the full tensor, a box in it, with
its `offsets` and its shape. Nothing here touches a disk or another rank. `merge` takes what all
ranks have sent; `check` accepts a tree and its tensors, ours or from a damaged file, only if
`merge` could have made them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from parallel.shard import Shard, local, shard_of, shard_of_shard

# The names of the safetensors format.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Stand-ins in the tree for what JSON cannot express.
TENSOR = {"$": "tensor"}
LEAVES = [TENSOR, {"$": "nan"}, {"$": "inf"}, {"$": "-inf"}]
DEPTH = 64  # levels of a tree; Python's own limit depends on who asks
CELLS = 2**24  # that the slices of one tensor may cut it into


@dataclass(frozen=True)
class Slice:
    """What this rank holds of a global tensor, and where in it that lies."""

    tensor: torch.Tensor
    shard: Shard


def as_slices(by_name: dict, shards: dict[str, Shard]) -> dict:
    """Tensors by parameter name, where those that are only a shard become Slices.

    by_name: parameter name -> tensor, or its optimizer state {key: tensor}; shards: name -> Shard
    of each parameter that is divided.
    """

    def sliced(value, shard):
        if isinstance(value, dict):
            return {key: sliced(x, shard) for key, x in value.items()}
        # A step counter, for instance, is not divided.
        if not isinstance(value, torch.Tensor) or value.ndim != len(shard.global_shape):
            return value
        # FSDP gives DTensors: each is a shard of what tensor parallelism has left to this rank.
        inner = as_slice("", value)
        return Slice(inner.tensor, shard_of_shard(shard, inner.shard))

    return {name: sliced(x, shards[name]) if name in shards else x for name, x in by_name.items()}


# ---- the tree ------------------------------------------------------------------------------------
def walk(node, leaf: Callable, name: str = ""):
    """`node` with leaf(name, value) in place of each leaf; a dict {"$": ...} is a leaf, too.

    Raises ValueError for a tree that is too deep, and for a key that cannot be in a name.
    """
    if name.count("/") >= DEPTH:
        raise ValueError(f"{name[:40]}... is nested deeper than {DEPTH} levels")
    if isinstance(node, list | tuple):
        return [walk(value, leaf, f"{name}/{i}") for i, value in enumerate(node)]
    if not isinstance(node, dict) or "$" in node:
        return leaf(name, node)
    # Names become keys in files, where "/" separates and safetensors reserves "__metadata__".
    for key in node:
        if not isinstance(key, str) or "/" in key or key in ("", "__metadata__"):
            raise ValueError(
                f"{name or 'the tree'} has the key {key!r}; keys are strings without '/'"
            )
    return {key: walk(value, leaf, f"{name}/{key}" if name else key) for key, value in node.items()}


def to_json(name: str, leaf, held: dict):
    """A leaf as JSON; a tensor goes into `held`, name -> Slice. ValueError for other types."""
    match leaf:
        case Slice() | torch.Tensor():
            # The tree only says that here is a tensor; its numbers go into a file.
            held[name] = leaf if isinstance(leaf, Slice) else as_slice(name, leaf)
            dtype = held[name].tensor.dtype
            if dtype not in DTYPE_NAMES:
                raise ValueError(f"{name} is {dtype}; a checkpoint takes {', '.join(DTYPES)}")
            return TENSOR
        case float() if not math.isfinite(leaf):
            return {"$": str(float(leaf))}
        # bool is an int, too.
        case None | str() | int() | float():
            return leaf
    takes = "tensors, str, int, float, bool and None"
    raise ValueError(f"{name} is of type {type(leaf).__name__}; a checkpoint takes {takes}")


def as_slice(name: str, tensor: torch.Tensor) -> Slice:
    """A tensor as the slice of it that this rank holds: all of it, unless it is a DTensor."""
    if any(p.is_partial() for p in getattr(tensor, "placements", ())):
        raise ValueError(
            f"{name} is a DTensor whose parts are not summed yet; redistribute it first"
        )
    return Slice(local(tensor), shard_of(tensor))


def copied(node):
    """`node` with each tensor in memory of its own on the host; DTensors become Slices."""
    match node:
        case dict():
            return {key: copied(value) for key, value in node.items()}
        case list() | tuple():
            return [copied(value) for value in node]
        case Slice():
            return replace(node, tensor=copied(node.tensor))
        case torch.Tensor() if hasattr(node, "placements"):
            return copied(as_slice("a tensor", node))
        case torch.Tensor():
            # Pinned memory: the GPU copies in its turn, and Python does not wait. Who reads the
            # copy waits for an event after it (checkpoint/save.py). What changes the tensor comes
            # later on the same stream.
            home = torch.empty(node.shape, dtype=node.dtype, pin_memory=node.is_cuda)
            return home.copy_(node.detach(), non_blocking=node.is_cuda)
    return node


def merge(described: list) -> dict:
    """The index's "tensors" and "tree", which say who writes what.

    described: for each rank its tree, and name -> (global shape, dtype, offsets, shape) of each
    tensor in it. Raises ValueError where ranks contradict each other.
    """
    tree = {}
    tensors = {}
    seen = set()
    for rank, (skeleton, held) in enumerate(described):
        tree = union(tree, skeleton)
        for name, (full, dtype, offsets, shape) in held.items():
            entry = tensors.setdefault(name, {"shape": full, "dtype": dtype, "slices": []})
            if (full, dtype) != (entry["shape"], entry["dtype"]):
                lower = f"{entry['dtype']} {entry['shape']}"
                raise ValueError(
                    f"{name} is {dtype} {full} on rank {rank} but {lower} on a lower one"
                )
            # A shard that a lower rank holds too is written by that rank. Nobody writes an empty
            # shard, unless the full tensor is empty.
            place = (name, *offsets, *shape)
            is_empty_shard = 0 in shape and 0 not in full
            if place not in seen and not is_empty_shard:
                seen.add(place)
                file = f"rank_{rank}.safetensors"
                entry["slices"].append(
                    {"file": file, "key": name, "offsets": offsets, "shape": shape}
                )
    check(tree, tensors)
    return {"tensors": tensors, "tree": tree}


def union(low, high):
    """Two trees as one; where both have a leaf, the leaf of `low` stays."""
    if isinstance(low, dict) and isinstance(high, dict) and "$" not in low and "$" not in high:
        both = dict(low)
        for key, value in high.items():
            both[key] = union(low[key], value) if key in low else value
        return both
    if isinstance(low, list) and isinstance(high, list) and len(low) == len(high):
        return [union(a, b) for a, b in zip(low, high)]
    return low


# ---- slices --------------------------------------------------------------------------------------
def inside(offsets: list, shape: list, full: list) -> bool:
    """Are `offsets` and `shape` a box inside a tensor of shape `full`? They may be any JSON."""
    if not all(type(n) is int for n in (*offsets, *shape, *full)):
        return False
    fits = all(0 <= o <= o + n <= m for o, n, m in zip(offsets, shape, full))
    return fits and len(offsets) == len(shape) == len(full)


def within(low: list, high: list, origin: list) -> tuple[slice, ...]:
    """The index of the box from `low` to `high` in a tensor that begins at `origin`."""
    return tuple(slice(i - o, j - o) for i, j, o in zip(low, high, origin))


def check(tree, tensors: dict) -> None:
    """Raises ValueError unless each tensor has its place in the tree and slices that cover it."""
    placed = set()

    def place(name, leaf):
        if isinstance(leaf, dict) and leaf not in LEAVES:
            raise ValueError(f"{name} is {leaf}, which means nothing here")
        if leaf == TENSOR:
            placed.add(name)

    # `union` keeps the lowest rank's leaf: where that is a number, a higher rank's tensor has no
    # place in the tree.
    walk(tree, place)
    for name in placed ^ set(tensors):
        raise ValueError(f"{name} is a tensor on one rank but not on a lower one")
    for name, entry in tensors.items():
        full = entry["shape"]
        slices = entry["slices"]
        if not slices or not all(inside(s["offsets"], s["shape"], full) for s in slices):
            raise ValueError(f"{name} {full} has no slice, or one that reaches beyond its shape")
        if entry["dtype"] not in DTYPES or any(s["key"] != name for s in slices):
            raise ValueError(
                f"{name} is {entry['dtype']}, no known type, or has a slice by another name"
            )
        # A key is the tensor's name, so a file can hold only one slice of it.
        if len({s["file"] for s in slices}) < len(slices):
            raise ValueError(f"{name} has two slices in one file")
        check_cover(name, full, slices)


def check_cover(name: str, full: list[int], slices: list[dict]) -> None:
    """Raises ValueError where some part of a tensor of shape `full` is in none of its slices.

    Each dimension is cut wherever a slice begins or ends. So a cell of the grid between these cuts
    is held as a whole or not at all, and few cells have to be checked:

        slices  0..3 and 2..5 of 7     cuts  0 2 3 5 7     cells held  yes yes yes no
    """
    corners = []
    for s in slices:
        low = s["offsets"]
        high = [o + n for o, n in zip(low, s["shape"])]
        corners.append((low, high))

    cuts = []  # in each dimension, sorted
    for dim, n in enumerate(full):
        edges = {0, n}
        for low, high in corners:
            edges |= {low[dim], high[dim]}
        cuts.append(sorted(edges))
    grid = [len(edges) - 1 for edges in cuts]
    # A damaged file may claim anything: do not let it take all memory.
    if math.prod(grid) > CELLS:
        raise ValueError(f"{name} {full} is cut into more than {CELLS} pieces")

    # Cells are marked, not the tensor's entries: 8 shards of it, however large, make 8 cells.
    number_of = [{edge: i for i, edge in enumerate(edges)} for edges in cuts]
    held = torch.zeros(grid, dtype=torch.bool)
    for low, high in corners:
        cells = [slice(number[i], number[j]) for number, i, j in zip(number_of, low, high)]
        held[tuple(cells)] = True
    if not held.all():
        first_hole = (~held).nonzero()[0].tolist()
        begins = [edges[i] for edges, i in zip(cuts, first_hole)]
        raise ValueError(f"no rank holds the part of {name} {full} that begins at {begins}")
