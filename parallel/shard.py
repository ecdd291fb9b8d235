"""A shard of a tensor: the shape of the full tensor, and where in it this rank's numbers begin.

    full tensor (4, 6)          rank 0  Shard((4, 6), (0, 0)), local shape (4, 3)
    +-------+-------+           rank 1  Shard((4, 6), (0, 3)), local shape (4, 3)
    | rank0 | rank1 |
    +-------+-------+           rank 1's rows over two ranks again, local shape (2, 3):
                                shard_of_shard(Shard((4, 6), (0, 3)), Shard((4, 3), (2, 0)))
                                == Shard((4, 6), (2, 3))

The local shape is the shape of the tensor at hand, so a shard does not repeat it. Tensor
parallelism splits with it; optimizers and checkpoints read from it which numbers they have. Nothing
here is sent. (torch's own Shard(dim) is a placement: it tells how a DTensor is divided, not where
one shard lies.)

Example:
    import torch
    from parallel.shard import Shard, shard_of_shard

    full = torch.arange(24).view(4, 6)
    right_half = Shard((4, 6), (0, 3))
    below = shard_of_shard(right_half, Shard((4, 3), (2, 0)))
    print(below, below.narrow(full, (2, 3)).tolist())
    assert below == Shard((4, 6), (2, 3))
    assert torch.equal(below.narrow(full, (2, 3)), full[2:, 3:])
"""

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Shard(NamedTuple):
    """Where a shard lies in its full tensor."""

    global_shape: tuple[int, ...]  # of the full tensor
    offsets: tuple[int, ...]  # in each dimension, where in the full tensor the shard begins

    def narrow(self, full: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The shard of this local shape, as a view of the full tensor."""
        assert tuple(full.shape) == self.global_shape, (tuple(full.shape), self.global_shape)
        for dim, (size, offset) in enumerate(zip(shape, self.offsets, strict=True)):
            # An empty shard may begin past the end, where torch takes no view.
            start = offset if size else 0
            full = full.narrow(dim, start, size)
        return full


def local(p: Tensor) -> Tensor:
    """The shard of p on this rank, in the same memory; a plain tensor is its own shard."""
    if hasattr(p, "placements"):
        return p.to_local()
    return p.detach()


def shard_of(p: Tensor) -> Shard:
    """Where this rank's shard of the DTensor p lies; of a plain tensor, all of it.

    Raises ValueError for a DTensor whose shard here is not one box of the full tensor.
    """
    if not hasattr(p, "placements"):
        return Shard(tuple(p.shape), (0,) * p.ndim)
    shard, shape = shard_at(p, p.device_mesh.get_coordinate())
    # Two mesh axes on one dimension can leave a rank several separate parts: no Shard says that.
    if shape != tuple(p.to_local().shape):
        raise ValueError(
            f"{tuple(p.shape)} with placements {p.placements}: the shard on this rank is no box; "
            "shard its dimensions by one mesh axis each"
        )
    return shard


def shard_at(p: Tensor, coordinate: Sequence[int]) -> tuple[Shard, tuple[int, ...]]:
    """(where the shard of the DTensor p lies, its local shape) on the rank at `coordinate`.

    coordinate: in p's device mesh. Nothing is sent: mesh and placements tell.
    """
    # Imported here: a run without DTensors need not load it.
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    shape, offsets = _compute_local_shape_and_global_offset(
        p.shape, p.device_mesh.shape, list(coordinate), p.placements
    )
    return Shard(tuple(p.shape), tuple(offsets)), tuple(shape)


def shard_of_shard(outer: Shard, inner: Shard) -> Shard:
    """Where `inner`, a shard of the tensor that `outer` has, lies in the full tensor of `outer`."""
    offsets = tuple(a + b for a, b in zip(outer.offsets, inner.offsets, strict=True))
    return Shard(outer.global_shape, offsets)


class ShardedSource:
    """A source of weights that knows full tensors, as one of this rank's shards too: `sharded`."""

    def __init__(self, source: Callable, shards: dict[str, Shard]):
        self.source = source
        self.shards = shards

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The full tensor, or this rank's shard, whichever has this shape."""
        return self.shard(name, Shard(tuple(shape), (0,) * len(shape)), shape)

    def in_full(self, name: str, where: tuple) -> Shard:
        """Where in the full tensor that lies which is at `where` in the full tensor or a shard."""
        inner = Shard(*where)
        outer = self.shards.get(name)
        if outer is not None and inner.global_shape != outer.global_shape:
            inner = shard_of_shard(outer, inner)
        return inner

    def shard(self, name: str, where: tuple, shape: tuple[int, ...]) -> Tensor:
        """The shard of this local shape that lies at `where` in what a call would give."""
        inner = self.in_full(name, where)
        # A checkpoint reads a shard alone. Where numbers are drawn, the full tensor is: they must
        # not depend on how many ranks share it.
        if hasattr(self.source, "shard"):
            return self.source.shard(name, inner, shape)
        return inner.narrow(self.source(name, inner.global_shape), shape)

    def fill(self, out: Tensor, name: str, where: tuple) -> None:
        """Sets `out` to the shard of its shape that lies at `where` in what a call would give."""
        inner = self.in_full(name, where)
        if hasattr(self.source, "fill"):
            self.source.fill(out, name, inner)
        else:
            out.copy_(inner.narrow(self.source(name, inner.global_shape), out.shape))


def sharded(source: Callable[[str, tuple[int, ...]], Tensor], shards: dict[str, tuple]):
    """`source`, which knows full tensors alone, as a source of shards too.

    source(name, full shape) -> full tensor; it may have methods `shard` and `fill`, see
    parallel/replicas.py, fill. The result takes a full shape or a local shape: asked with the
    local shape, it gives this rank's shard. shards: name -> Shard, or (full shape, offsets).
    """
    return ShardedSource(source, {name: Shard(*where) for name, where in shards.items()})


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
