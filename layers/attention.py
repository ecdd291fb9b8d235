"""Causal attention: a query sees itself and all tokens before it, or the last `window` tokens.

    y_i = sum over j of softmax_j(q_i·k_j / sqrt(D)) v_j        i - window < j <= i

sdpa   torch's scaled_dot_product_attention. With a window, queries go in chunks of `window`. The
       queries of a chunk see their own chunk and the one before it, through a mask. So time grows
       as 2 window T; without a window it grows as T^2 / 2.

           queries of chunk 2         keys of chunks 0 1 2 3, window 4
                                      . . . . | . x x x | x
                                      . . . . | . . x x | x x
                                      . . . . | . . . x | x x x
                                      . . . . | . . . . | x x x x

plain  The formula written out: scores through a mask, softmax, a product. Queries go in chunks of
       64, and the keys that no query of a chunk sees are left out. It keeps the probabilities,
       about T x T / 2 for each head, and in bfloat16 it rounds the scores. torch's kernel takes so
       many times as long (two cores of an AMD EPYC, Zen 4; 4 heads of 64, 4096 tokens in all,
       forward and backward, median of 9):

           T           64    128    256    512   1024   2048
           bfloat16   3.3    2.6    1.9    2.0    1.3    1.1
           float32    1.3    1.1    1.3    1.6    1.2    1.0

           queries of chunk 0         P = softmax(Q Kᵀ / sqrt(D) + mask)       Y = P V
           see the keys x x . .       dV = Pᵀ dY        dP = dY Vᵀ
           of chunk 1   x x x x       dS = P (dP - rowsum(P dP))
                                      dQ = dS K / sqrt(D)       dK = dSᵀ Q / sqrt(D)

       Its backward is these lines. Autograd's would fill with zeros, and add, a tensor of the size
       of all keys for each chunk. Under torch.compile there is one chunk, which it fuses.

flex   FlexAttention: a kernel compiled for this mask, which skips blocks of 128 x 128 that nobody
       sees. It is for GPUs, as torch has no backward for it on a CPU. It is compiled apart from its
       block (one graph break), so that the mask is made once and not in every layer.

Which kernel torch takes on a GPU (sdp_utils.cpp; read, not run yet): flash for half types without a
mask; the memory-efficient one for half types and float32, with a mask too, but not for grouped
heads (pytorch pull request 191085 adds them), so with a window k and v are repeated; otherwise, as
for float64, the formula, which keeps T x T scores. FlexAttention's kernel is Triton's, for half
types and float32.

References: a window, Beltagy et al. 2020 (2004.05150), Jiang et al. 2023 (2310.06825);
FlexAttention, Dong et al. 2024 (2412.05496).

Example:
    import torch
    from layers.attention import choose
    q = torch.randn(2, 4, 16, 8)
    k, v = torch.randn(2, 2, 2, 16, 8)  # 2 heads of k and v for 4 of q
    sdpa = choose("sdpa", window=4)
    plain = choose("plain", window=4)
    assert torch.allclose(sdpa(q, k, v), plain(q, k, v), atol=1e-5)
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # queries of plain attention that see the same keys


def choose(kind: str, window: int | None):
    """The attention function of a block; kind: "sdpa", "plain" or "flex".

    It takes q (B, H, T, D), k and v (B, Hkv, T, D), and returns (B, H, T, D). Hkv divides H: with
    fewer k, v than q it is grouped-query attention. documents=, made by layers/document_mask.py for
    this kind and window, hides other documents.
    """
    if kind == "sdpa":
        return functools.partial(causal_attention, window=window)
    if kind == "plain":
        return functools.partial(plain_attention, window=window)
    return torch.compiler.disable(functools.partial(flex_attention, window=window))


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents=None
) -> Tensor:
    """`sdpa`, see above: q (B, H, T, D), k and v (B, Hkv, T, D) -> (B, H, T, D)."""
    T = q.shape[2]
    shared = q.shape[1] // k.shape[1]  # query heads that share a k and v
    mask = None if documents is None else documents.mask
    if window is None or window >= T:
        return sdpa(q, k, v, shared, mask)

    # The first chunk has none before it. Copies, as views would keep all of q, k, v for backward.
    mask_first, mask_later = (None, None) if mask is None else mask
    first = [x[:, :, :window].contiguous() for x in (q, k, v)]
    y_first = sdpa(*first, shared, mask_first)

    # The n later chunks, each with its own keys and values and those of the chunk before it.
    # Padding fills the last one; it lies behind all real queries, which do not see it.
    padding = (0, 0, 0, -T % window)
    q_chunks = F.pad(q[:, :, window:], padding).unflatten(2, (-1, window))  # (B, H, n, window, D)
    k_pairs = F.pad(k, padding).unfold(2, 2 * window, window).mT  # (B, Hkv, n, 2 window, D)
    v_pairs = F.pad(v, padding).unfold(2, 2 * window, window).mT

    if mask_later is None:
        # Query i is at place i + window of its two chunks, and sees the `window` places up to it.
        i = torch.arange(window, device=q.device).unsqueeze(1)
        place = torch.arange(2 * window, device=q.device)
        mask_later = (place > i) & (place <= i + window)  # (window, 2 window)

    # One call for all chunks of all sequences, as a batch of B n.
    batch = [x.transpose(1, 2).flatten(0, 1) for x in (q_chunks, k_pairs, v_pairs)]
    y = sdpa(*batch, shared, mask_later)  # (B n, H, window, D)
    y = y.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)  # (B, H, n window, D)
    return torch.cat([y_first, y[:, :, : T - window]], 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, shared: int, mask: Tensor | None) -> Tensor:
    """torch's kernel, causal or with this mask; shared: query heads that share a k and v."""
    if mask is not None and q.is_cuda and shared > 1:
        # The GPU's kernel that takes a mask takes no grouped heads.
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
        shared = 1
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)  # torch wants the same; nearly always it is
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared > 1
    )


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents=None
) -> Tensor:
    """`plain`, see above: q (B, H, T, D), k and v (B, Hkv, T, D) -> (B, H, T, D)."""
    B, H, T, D = q.shape
    device = q.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if casts and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    # Heads that share a k and v form one matrix of queries, so k and v are not repeated.
    n_kv_head = k.shape[1]
    q = q.reshape(B * n_kv_head, H // n_kv_head, T, D)
    k = k.reshape(B * n_kv_head, T, D)
    v = v.reshape(B * n_kv_head, T, D)
    starts = None if documents is None else documents.starts  # (B, T)
    # The compiler fuses the formula; transforms of torch.func and forward_ad (which have no public
    # names) would need rules for a Function.
    is_transformed = torch._C._functorch.peek_interpreter_stack() is not None
    is_transformed = is_transformed or torch.autograd.forward_ad._current_level >= 0
    if torch.compiler.is_compiling() or is_transformed:
        y, _ = attend(q, k, v, slice(0, T), window, starts)
    else:
        y = WrittenOut.apply(q, k, v, window, starts)
    return y.view(B, H, T, D)


class WrittenOut(torch.autograd.Function):
    """q (n, G, T, D), k and v (n, T, D) -> (n, G, T, D)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int | None, starts) -> Tensor:
        ctx.chunks = chunks(q.shape[2], window)
        y = torch.empty_like(q)
        kept = []
        for queries, keys in ctx.chunks:
            y[:, :, queries], probabilities = attend(
                q, k[:, keys], v[:, keys], queries, window, starts
            )
            if any(ctx.needs_input_grad):
                kept.append(probabilities)
        ctx.save_for_backward(q, k, v, *kept)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "plain attention: backward is written out once, and has no derivative; call "
                "backward without create_graph=True, or take attention=sdpa or torch.func"
            )
        # Autocast, where backward is called within, would cast half of what follows.
        with torch.autocast(dy.device.type, enabled=False):
            return WrittenOut.gradients(ctx, dy)

    @staticmethod
    def gradients(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *kept = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for (queries, keys), p in zip(ctx.chunks, kept):
            some_q = q[:, :, queries].flatten(1, 2)  # (n, G c, D)
            some_dy = dy[:, :, queries].flatten(1, 2)
            dv[:, keys] += torch.bmm(p.mT, some_dy)
            dp = torch.bmm(some_dy, v[:, keys].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, queries] = torch.bmm(ds, k[:, keys]).view_as(q[:, :, queries])
            dk[:, keys] += torch.bmm(ds.mT, some_q)
        return dq.mul_(scale), dk.mul_(scale), dv, None, None


def chunks(T: int, window: int | None) -> list[tuple[slice, slice]]:
    """(queries, the keys that they see) of each chunk."""
    found = []
    for start in range(0, T, CHUNK):
        end = min(start + CHUNK, T)
        first = 0 if window is None else max(0, start + 1 - window)
        found.append((slice(start, end), slice(first, end)))
    return found


def attend(
    q, k, v, queries: slice, window: int | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The `queries` of all q (n, G, T, D) over k and v (n, N, D), of which they see the last.

    starts: (B, T) where each token's document begins, for n = B Hkv, or None. Returns their result
    (n, G, c, D), and their probabilities (n, G c, N).
    """
    q = q[:, :, queries]
    n, G, c, D = q.shape
    N = k.shape[1]
    i = torch.arange(N - c, N, device=q.device).unsqueeze(1)  # the queries' places among the keys
    j = torch.arange(N, device=q.device)
    unseen = j > i
    if window is not None:
        unseen = unseen | (j <= i - window)
    if starts is not None:
        first = starts[:, queries].unsqueeze(2) - (queries.stop - N)  # (B, c, 1), among the keys
        unseen = (unseen | (j < first)).repeat_interleave(n // len(starts), 0)  # (n, c, N)
    mask = torch.zeros(unseen.shape, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill_(unseen, -math.inf)
    mask = torch.cat([mask] * G, -2)  # (n or none, G c, N)
    p = torch.baddbmm(mask, q.flatten(1, 2), k.mT, alpha=D**-0.5).softmax(-1)  # (n, G c, N)
    return torch.bmm(p, v).view(n, G, c, D), p


def newest_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of the newest token alone, q (B, H, 1, D), to all of k and v (B, Hkv, n, D).

    mask: (B, 1, 1, n) bool, False for the keys that it does not see.
    """
    shared = q.shape[1] // k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=shared > 1)
    return sdpa(q, k, v, shared, mask)


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents=None
) -> Tensor:
    """`flex`, see above: q (B, H, T, D), k and v (B, Hkv, T, D) -> (B, H, T, D)."""
    T = q.shape[2]
    if documents is None:
        mask = block_mask(T, T if window is None else window, str(q.device))
    else:
        mask = documents.mask
    return kernel(q.is_cuda)(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def kernel(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention as eager

    # Uncompiled it keeps all T x T scores: for tests on a CPU.
    return torch.compile(eager) if compiled else eager


@functools.lru_cache(maxsize=8)
def block_mask(T: int, window: int, device: str):
    """Which blocks of 128 queries and keys see each other at all."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b, h, i, j):
        return (i >= j) & (i - j < window)

    return create_block_mask(sees, None, None, T, T, device=device)


if __name__ == "__main__":
    q, k, v = torch.randn(3, 1, 4, 64, 8)
    apart = causal_attention(q, k, v, window=16) - plain_attention(q, k, v, window=16)
    print(f"sdpa and plain, 64 tokens, window 16: {apart.abs().max():.0e} apart")
