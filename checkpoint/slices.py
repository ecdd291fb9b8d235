"""A tree of tensors as JSON and slices: who holds which shard of which tensor, under which name.

    rank 0  {"model": {"w": Slice(rows 0, 1)}, "step": 7} ─┐ merge  tree    {"model": {"w": TENSOR}}
    rank 1  {"model": {"w": Slice(rows 2, 3)}}            ─┘ ────►  tensors "model/w": rows 0, 1 in
                                                                            rank_0, 2, 3 in rank_1

A tensor's name is its path in the tree. A slice is a shard of the full tensor, a box in it: its
`offsets` and its shape. Nothing here touches a disk or another rank: `merge` is given what all
ranks said, `check` tells whether a tree and its tensors, ours or from a damaged file, are what
merge makes.
"""

import math
from dataclasses import dataclass, replace

import torch

from parallel.shard import Shard, local, shard_of, shard_of_shard

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
TENSOR = {"$": "tensor"}
LEAVES = [TENSOR, {"$": "nan"}, {"$": "inf"}, {"$": "-inf"}]  # what JSON has no word for
DEPTH = 64  # levels of a tree; Python's own limit depends on who asks
CELLS = 2**24  # cells into which the slices of one tensor may cut it


@dataclass(frozen=True)
class Slice:
    """What this rank holds of a global tensor, and where in it that lies."""

    tensor: torch.Tensor
    shard: Shard


def as_slices(by_name: dict, shards: dict[str, Shard]) -> dict:
    """by_name: parameter name -> tensor, or its optimizer state {key: tensor}. The tensors of those
    in `shards`, of which there is only a shard, become Slices."""

    def sliced(value, shard):
        if isinstance(value, dict):
            return {key: sliced(x, shard) for key, x in value.items()}
        if not isinstance(value, torch.Tensor) or value.ndim != len(shard.global_shape):
            return value
        inner = as_slice("", value)  # a DTensor may be a shard of that shard
        return Slice(inner.tensor, shard_of_shard(shard, inner.shard))

    return {name: sliced(x, shards[name]) if name in shards else x for name, x in by_name.items()}


# ---- the tree ------------------------------------------------------------------------------------


def walk(node, leaf, name=""):
    """`node` with leaf(name, value) in place of each leaf; a stand-in, {"$": ...}, is a leaf."""
    if name.count("/") >= DEPTH:
        raise ValueError(f"{name[:40]}... is nested deeper than {DEPTH} levels")
    if isinstance(node, list | tuple):
        return [walk(value, leaf, f"{name}/{i}") for i, value in enumerate(node)]
    if not isinstance(node, dict) or "$" in node:
        return leaf(name, node)
    for key in node:
        if not isinstance(key, str) or "/" in key or key in ("", "__metadata__"):
            raise ValueError(
                f"{name or 'the tree'} has the key {key!r}; keys are strings without '/'"
            )
    return {key: walk(value, leaf, f"{name}/{key}" if name else key) for key, value in node.items()}


def to_json(name, leaf, held):
    """A leaf as JSON; a tensor goes into `held`."""
    match leaf:
        case Slice() | torch.Tensor():
            held[name] = leaf if isinstance(leaf, Slice) else as_slice(name, leaf)
            dtype = held[name].tensor.dtype
            if dtype not in DTYPE_NAMES:
                raise ValueError(f"{name} is {dtype}; a checkpoint takes {', '.join(DTYPES)}")
            return TENSOR
        case float() if not math.isfinite(leaf):
            return {"$": str(float(leaf))}
        case None | str() | int() | float():
            return leaf
    takes = "tensors, str, int, float, bool and None"
    raise ValueError(f"{name} is of type {type(leaf).__name__}; a checkpoint takes {takes}")


def as_slice(name, tensor):
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
            home = torch.empty(node.shape, dtype=node.dtype, pin_memory=node.is_cuda)
            return home.copy_(node.detach(), non_blocking=node.is_cuda)
    return node


def merge(described):
    """All ranks' trees and slices -> tensors and tree of the index, which says who writes what."""
    tree, tensors, seen = {}, {}, set()
    for rank, (skeleton, held) in enumerate(described):
        tree = union(tree, skeleton)
        for name, (full, dtype, offsets, shape) in held.items():
            entry = tensors.setdefault(name, {"shape": full, "dtype": dtype, "slices": []})
            if (full, dtype) != (entry["shape"], entry["dtype"]):
                lower = f"{entry['dtype']} {entry['shape']}"
                raise ValueError(
                    f"{name} is {dtype} {full} on rank {rank} but {lower} on a lower one"
                )
            slice_ = (name, *offsets, *shape)
            if slice_ not in seen and (0 not in shape or 0 in full):
                seen.add(slice_)
                file = f"rank_{rank}.safetensors"
                entry["slices"].append(
                    {"file": file, "key": name, "offsets": offsets, "shape": shape}
                )
    check(tree, tensors)
    return {"tensors": tensors, "tree": tree}


def union(low, high):
    if isinstance(low, dict) and isinstance(high, dict) and "$" not in low and "$" not in high:
        return low | {
            key: union(low[key], value) if key in low else value for key, value in high.items()
        }
    if isinstance(low, list) and isinstance(high, list) and len(low) == len(high):
        return [union(a, b) for a, b in zip(low, high)]
    return low


# ---- slices --------------------------------------------------------------------------------------


def inside(offsets, shape, full):
    """Whether offsets and shape are those of a box of a tensor whose shape is `full`."""
    if not all(type(n) is int for n in (*offsets, *shape, *full)):
        return False
    fits = all(0 <= o <= o + n <= m for o, n, m in zip(offsets, shape, full))
    return fits and len(offsets) == len(shape) == len(full)


def within(low, high, origin):
    """The index of the box from `low` to `high` in a tensor whose first element sits at
    `origin`."""
    return tuple(slice(i - o, j - o) for i, j, o in zip(low, high, origin))


def check(tree, tensors):
    """ValueError unless each tensor has its place in the tree and slices that cover it."""
    placed = set()

    def place(name, leaf):
        if isinstance(leaf, dict) and leaf not in LEAVES:
            raise ValueError(f"{name} is {leaf}, which stands for nothing")
        if leaf == TENSOR:
            placed.add(name)

    walk(tree, place)
    for name in placed ^ set(tensors):
        raise ValueError(f"{name} is a tensor on one rank but not on a lower one")
    for name, entry in tensors.items():
        # Cut each dimension where a slice begins or ends: a cell of that grid is held whole or not
        # at all.
        full, slices = entry["shape"], entry["slices"]
        if not slices or not all(inside(s["offsets"], s["shape"], full) for s in slices):
            raise ValueError(f"{name} {full} has no slice, or one that reaches beyond its shape")
        if entry["dtype"] not in DTYPES or any(s["key"] != name for s in slices):
            raise ValueError(
                f"{name} is {entry['dtype']}, no known type, or has a slice by another name"
            )
        if len({s["file"] for s in slices}) < len(slices):
            raise ValueError(f"{name} has two slices in one file")
        corners = [
            (s["offsets"], [o + n for o, n in zip(s["offsets"], s["shape"])]) for s in slices
        ]
        edges = [
            sorted({0, n, *(corner[d] for pair in corners for corner in pair)})
            for d, n in enumerate(full)
        ]
        if math.prod(len(e) - 1 for e in edges) > CELLS:
            raise ValueError(f"{name} {full} is cut into more than {CELLS} pieces")
        number_of = [{edge: i for i, edge in enumerate(e)} for e in edges]
        held = torch.zeros([len(e) - 1 for e in edges], dtype=torch.bool)
        for low, high in corners:
            held[tuple(slice(n[i], n[j]) for n, i, j in zip(number_of, low, high))] = True
        if not held.all():
            hole = [e[i] for e, i in zip(edges, (~held).nonzero()[0].tolist())]
            raise ValueError(f"no rank holds the part of {name} {full} that begins at {hole}")
