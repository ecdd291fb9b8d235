"""The document mask: a token sees its own document alone, from its start on.

A sequence of a long text runs across documents, and causal attention lets the second one look at
the first, with which it has nothing to do. Here it does not, and its positions begin anew:

    tokens      a b D c d e D f      D begins a document: the end of the one before, or a
    starts      0 0 2 2 2 2 6 6      beginning of its own (<s>)
    positions   0 1 0 1 2 3 0 1      what rotary or learned positions get: place - start

                       0 1 2 3 4 5 6 7   key
                    0  x                 query i sees the keys starts[i] <= j <= i,
                    1  x x               with a window besides i - window < j
                    2      x
                    3      x x
                    4      x x x
                    5      x x x x
                    6              x
                    7              x x

So a document's loss and gradients are those of the document alone. The first token of a sequence
may lie within a document, of which it then is the start. The target of a document's last token is
the D of the next: it says that the document ends.

The mask is made once for all layers: for sdpa a number for each query and key of each sequence, 0
or -inf, in the dtype of attention. (Of a bool mask torch makes such numbers in every layer, and
keeps them all.) A causal kernel skips the half of the scores that nobody sees; with a mask sdpa
computes all of them. flex skips blocks of 128 x 128 that lie in different documents.

References: Llama 3, 2407.21783 (3.2: little effect on short texts, much on long ones); Krell et al.
2021, 2107.02027 (packing, and a mask for what shares a sequence).

Example:
    import torch
    import torch.nn.functional as F
    from layers import document_mask
    ids = torch.tensor([[5, 6, 0, 7, 8, 9, 0, 5]])
    starts = document_mask.starts(ids, token=0)
    assert starts.tolist() == [[0, 0, 2, 2, 2, 2, 6, 6]]
    q, k, v = torch.randn(3, 1, 2, 8, 4)  # (B, H, T, D) each
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=document_mask.seen(starts))
    q, k, v = (x[:, :, 2:6] for x in (q, k, v))  # the second document alone
    alone = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(y[:, :, 2:6], alone, atol=1e-6)
"""

import functools
import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents(NamedTuple):
    """What attention knows of documents: the whole sequence's, whichever of its tokens are here."""

    starts: Tensor  # (B, T) for each token the place where its document begins
    mask: object = None  # what `sdpa` or `flex` of layers/attention.py takes; others take none


def starts(ids: Tensor, token: int) -> Tensor:
    """(B, T) token ids -> (B, T) int64: the place of the last `token` so far, or else 0."""
    places = torch.arange(ids.shape[1], device=ids.device)
    return torch.where(ids == token, places, 0).cummax(1).values


def seen(starts: Tensor) -> Tensor:
    """(B, T) starts -> (B, 1, T, T) bool: does query i see key j?"""
    places = torch.arange(starts.shape[1], device=starts.device)
    return ((places <= places.unsqueeze(1)) & (places >= starts.unsqueeze(2))).unsqueeze(1)


def make(
    kind: str, window: int | None, starts: Tensor, dtype: torch.dtype = torch.float32
) -> Documents:
    """The documents of a forward, for attention of this kind: "sdpa", "plain", "flex", "cache".

    dtype: of the queries; where autocast has another one, that is taken.
    """
    if kind in ("plain", "cache"):
        return Documents(starts)
    if kind == "flex":
        return Documents(starts, block_mask(starts, window))
    device = starts.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if casts and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if window is None or window >= starts.shape[1]:
        return Documents(starts, added(seen(starts), dtype))
    masks = seen(starts[:, :window]), seen_in_chunks(starts, window)
    return Documents(starts, tuple(added(mask, dtype) for mask in masks))


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where a key is seen (bool, any shape), else -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


def seen_in_chunks(starts: Tensor, window: int) -> Tensor:
    """(B n, 1, window, 2 window) bool: the masks of `sdpa` with a window, but for its first chunk.

    Query i of chunk c sees places of chunks c - 1 and c, 2 window in all. n: chunks from the second
    on; padding fills the last one.
    """
    later = F.pad(starts[:, window:], (0, -starts.shape[1] % window)).unflatten(1, (-1, window))
    chunk = torch.arange(later.shape[1], device=starts.device).view(-1, 1, 1)
    query = torch.arange(window, device=starts.device).unsqueeze(1)
    key = torch.arange(2 * window, device=starts.device)
    in_window = (key > query) & (key <= query + window)  # (window, 2 window)
    mask = in_window & (chunk * window + key >= later.unsqueeze(3))  # (B, n, window, 2 window)
    return mask.flatten(0, 1).unsqueeze(1)


def block_mask(starts: Tensor, window: int | None):
    """FlexAttention's: which blocks of 128 queries and keys see each other, in each sequence."""
    B, T = starts.shape
    window = T if window is None else window

    def sees(b, h, i, j):
        return (i >= j) & (i - j < window) & (j >= starts[b, i])

    return maker(starts.is_cuda)(sees, B, None, T, T, device=starts.device)


@functools.cache
def maker(compiled: bool):
    from torch.nn.attention.flex_attention import create_block_mask

    # Uncompiled it holds a number for each query and key of all sequences.
    return torch.compile(create_block_mask) if compiled else create_block_mask


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
