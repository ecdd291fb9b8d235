"""A tree of tensors as JSON and slices: what this rank holds, under which name.

    {"model": {"w": Slice(rows 2, 3)}, "step": 7}     tree     {"model": {"w": TENSOR}, "step": 7}
                                                      slices   "model/w": rows 2, 3

A tensor's name is its path in the tree. A slice is a shard of the full tensor, a box in it, with
its `offsets` and its shape. Nothing here touches a disk or another rank.
"""

import hashlib
import json
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


# ---- bytes ---------------------------------------------------------------------------------------
def as_json(value) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def sha256(data) -> str:
    return hashlib.sha256(data).hexdigest()
