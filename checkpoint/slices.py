"""A tree of tensors as JSON and boxes: who holds which part of which tensor, under which name.

    rank 0   {"model": {"w": Slice(rows 0, 1)}, "step": 7}  ─┐ merge   tree     {"model": {"w": TENSOR}, ...}
    rank 1   {"model": {"w": Slice(rows 2, 3)}}             ─┘ ────► tensors  "model/w": rows 0, 1 in rank_0,
                                                                               rows 2, 3 in rank_1

A tensor's name is its path in the tree. A slice is a box of the whole tensor: its `offsets` and its
shape. Nothing here touches a disk or another rank: `merge` is given what all ranks said, `check`
tells whether a tree and its tensors, ours or from a damaged file, are what merge makes.
"""

import math
from dataclasses import dataclass, replace

import torch

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
CELLS = 2**24  # pieces into which the slices of one tensor may cut it


@dataclass(frozen=True)
class Slice:
    """The part of a global tensor that this rank holds: a box whose first element sits at
    `offsets`."""

    tensor: torch.Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]


def boxed(by_name: dict, boxes: dict) -> dict:
    """by_name: parameter name -> tensor, or its optimizer state {key: tensor}. `boxes`: name ->
    (whole shape, offsets) where there is only that part of a parameter: its tensors become
    Slices."""

    def cut(value, box):
        if isinstance(value, dict):
            return {key: cut(x, box) for key, x in value.items()}
        if not isinstance(value, torch.Tensor) or value.ndim != len(box[0]):
            return value
        inner = as_slice("", value)  # a DTensor may be a part of that part
        offsets = tuple(a + b for a, b in zip(box[1], inner.offsets))
        return Slice(inner.tensor, tuple(box[0]), offsets)

    return {name: cut(x, boxes[name]) if name in boxes else x for name, x in by_name.items()}


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
    if not hasattr(tensor, "placements"):
        return Slice(tensor, tuple(tensor.shape), (0,) * tensor.dim())
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(p.is_partial() for p in tensor.placements):
        raise ValueError(
            f"{name} is a DTensor whose parts are not summed yet; redistribute it first"
        )
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Slice(tensor.to_local(), tuple(tensor.shape), tuple(offsets))


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
    """All ranks' trees and boxes -> tensors and tree of the index, which says who writes what."""
    tree, tensors, seen = {}, {}, set()
    for rank, (skeleton, boxes) in enumerate(described):
        tree = union(tree, skeleton)
        for name, (whole, dtype, offsets, shape) in boxes.items():
            entry = tensors.setdefault(name, {"shape": whole, "dtype": dtype, "slices": []})
            if (whole, dtype) != (entry["shape"], entry["dtype"]):
                lower = f"{entry['dtype']} {entry['shape']}"
                raise ValueError(
                    f"{name} is {dtype} {whole} on rank {rank} but {lower} on a lower one"
                )
            box = (name, *offsets, *shape)
            if box not in seen and (0 not in shape or 0 in whole):
                seen.add(box)
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


# ---- boxes ---------------------------------------------------------------------------------------


def inside(offsets, shape, whole):
    """Whether offsets and shape are those of a box of a tensor whose shape is `whole`."""
    if not all(type(n) is int for n in (*offsets, *shape, *whole)):
        return False
    fits = all(0 <= o <= o + n <= m for o, n, m in zip(offsets, shape, whole))
    return fits and len(offsets) == len(shape) == len(whole)


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
        whole, slices = entry["shape"], entry["slices"]
        if not slices or not all(inside(s["offsets"], s["shape"], whole) for s in slices):
            raise ValueError(f"{name} {whole} has no slice, or one that reaches beyond its shape")
        if entry["dtype"] not in DTYPES or any(s["key"] != name for s in slices):
            raise ValueError(
                f"{name} is {entry['dtype']}, no known type, or has a slice by another name"
            )
        if len({s["file"] for s in slices}) < len(slices):
            raise ValueError(f"{name} has two slices in one file")
        boxes = [(s["offsets"], [o + n for o, n in zip(s["offsets"], s["shape"])]) for s in slices]
        cuts = [
            sorted({0, n, *(corner[d] for box in boxes for corner in box)})
            for d, n in enumerate(whole)
        ]
        if math.prod(len(c) - 1 for c in cuts) > CELLS:
            raise ValueError(f"{name} {whole} is cut into more than {CELLS} pieces")
        place_of = [{cut: i for i, cut in enumerate(c)} for c in cuts]
        held = torch.zeros([len(c) - 1 for c in cuts], dtype=torch.bool)
        for low, high in boxes:
            held[tuple(slice(p[i], p[j]) for p, i, j in zip(place_of, low, high))] = True
        if not held.all():
            hole = [c[i] for c, i in zip(cuts, (~held).nonzero()[0].tolist())]
            raise ValueError(f"no rank holds the part of {name} {whole} that begins at {hole}")
