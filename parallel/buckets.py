"""Parameters side by side in flat buckets: one message for many gradients or weights.

    parameters     a (2, 3)   b (4,)   c (2, 2)   d (10, 10)
    buckets        [a a a a a a b b b b c c c c]  [d d d ... d]        at most `limit` bytes each

A message costs its latency whatever its size, so small tensors travel together. A bucket is not
the whole model either, so that its message can start while backward still computes.
"""

from torch import Tensor, nn


def make_buckets(
    named: list[tuple[str, nn.Parameter]], limit: float
) -> list[list[tuple[str, nn.Parameter]]]:
    """Groups consecutive (name, parameter) pairs into buckets of at most `limit` bytes.

    All parameters of a bucket have one dtype and one device. A larger parameter is alone.
    """
    buckets = []
    size = 0
    kind = None
    for name, p in named:
        # No parameter is of kind None, so the first one opens a bucket.
        is_same_kind = kind == (p.dtype, p.device)
        if not is_same_kind or size + p.nbytes > limit:
            buckets.append([])
            size = 0
        buckets[-1].append((name, p))
        size += p.nbytes
        kind = (p.dtype, p.device)
    return buckets


def split_like(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of `flat` (n,), one after the other, in the shapes of the tensors `like`."""
    sizes = [x.numel() for x in like]
    return [view.view(x.shape) for view, x in zip(flat.split(sizes), like)]
