"""Causal attention: a query sees itself and what came before, or the last `window` tokens of it.

    y_i = sum over j of softmax_j(q_i·k_j / sqrt(D)) v_j        i - window < j <= i

sdpa   torch's scaled_dot_product_attention. A window goes in stretches: the queries of one see it
       and the one before through a mask, so that time grows as 2 window T, and not as T^2 / 2 as
       without a window.

           queries of stretch 2       keys of 0 1 2 3, window 4
                                      . . . . | . x x x | x
                                      . . . . | . . x x | x x
                                      . . . . | . . . x | x x x
                                      . . . . | . . . . | x x x x

plain  The formula written out: scores through a mask, softmax, a product. It keeps the T x T
       probabilities, and in bfloat16 rounds the scores; on a CPU it then takes half the time of
       torch's kernel up to some 512 tokens, beyond them more.

flex   FlexAttention: a kernel compiled for this mask, which passes over blocks of 128 x 128 that
       nobody sees. For GPUs: torch has no backward for it on a CPU. It is compiled by itself, also
       where a block is (one graph break), so that the mask is made once and not in every layer.

References: a window, Beltagy et al. 2020 (2004.05150), Jiang et al. 2023 (2310.06825);
FlexAttention, Dong et al. 2024 (2412.05496).
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def choose(kind: str, window: int | None):
    """What attends in a block, by "sdpa", "plain" or "flex": q (B, H, T, D), k and v (B, Hkv, T, D)
    -> (B, H, T, D). Hkv divides H: grouped queries."""
    if kind == "sdpa":
        return functools.partial(causal_attention, window=window)
    if kind == "plain":
        return functools.partial(plain_attention, window=window)
    return torch.compiler.disable(functools.partial(flex_attention, window=window))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    T = q.shape[2]
    sdpa = functools.partial(F.scaled_dot_product_attention, enable_gqa=q.shape[1] != k.shape[1])
    if window is None or window >= T:
        return sdpa(q, k, v, is_causal=True)
    # Views would keep all
    first = sdpa(*(x[:, :, :window].contiguous() for x in (q, k, v)), is_causal=True)
    pad, i = -T % window, torch.arange(window, device=q.device).unsqueeze(1)
    # (B, H, n, window, D)
    later = F.pad(q[:, :, window:], (0, 0, 0, pad)).unflatten(2, (-1, window))
    # N of (2 window, D)
    pairs = (F.pad(x, (0, 0, 0, pad)).unfold(2, 2 * window, window).mT for x in (k, v))
    both = torch.arange(2 * window, device=q.device)
    mask = (both > i) & (both <= i + window)  # query i is at place i + window of its two stretches
    # (B n, H, ...)
    y = sdpa(*(x.transpose(1, 2).flatten(0, 1) for x in (later, *pairs)), attn_mask=mask)
    y = y.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, y[:, :, : T - window]], 2)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    (B, H, T, D), G = q.shape, q.shape[1] // k.shape[1]
    i, j = torch.arange(T, device=q.device).unsqueeze(1), torch.arange(T, device=q.device)
    unseen = (j > i) if window is None else (j > i) | (j <= i - window)
    mask = (
        torch.zeros(T, T, dtype=q.dtype, device=q.device)
        .masked_fill_(unseen, -math.inf)
        .repeat(G, 1)
    )
    # Heads of one k, v together
    q, k, v = q.reshape(-1, G * T, D), k.reshape(-1, T, D), v.reshape(-1, T, D)
    probabilities = torch.baddbmm(mask, q, k.mT, alpha=D**-0.5).softmax(-1)  # (B Hkv, G T, T)
    return torch.bmm(probabilities, v).view(B, H, T, D)


def newest_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for queries (B, H, 1, D) of the newest token alone, k and v being all that it
    sees."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def flex_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    T = q.shape[2]
    mask = block_mask(T, T if window is None else window, str(q.device))
    return kernel(q.is_cuda)(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def kernel(compiled: bool):
    # Eager it keeps all T x T scores
    from torch.nn.attention.flex_attention import flex_attention as plain

    return torch.compile(plain) if compiled else plain


@functools.lru_cache(maxsize=8)
def block_mask(T: int, window: int, device: str):
    """Which blocks of 128 queries and keys see each other at all."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b, h, i, j):
        return (i >= j) & (i - j < window)

    return create_block_mask(seen, None, None, T, T, device=device)
