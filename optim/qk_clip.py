"""QK-clip: where a head's attention logits grew beyond tau, its queries and keys are scaled back.

    S_h = max of q_i·k_j / √D over the queries i of head h and the keys j that each sees
    γ_h = τ / S_h  where S_h > τ, else 1
    γ   = min of γ_h over the query heads h that share one head of keys
    W_k ← W_k √γ          that key head's rows, after the optimizer's step; those of biases too
    W_q ← W_q γ_h / √γ    head h's rows

Every logit of head h is multiplied by γ_h: a query head that shares its keys with one that grew
gets back what the keys lost (γ_h = 1: W_q / √γ). With as many key heads as query heads both factors
are √γ_h, the paper's. (There, in multi-head latent attention, the queries take all of γ_h where
heads share keys; that would leave W_k to grow.)

    S_h `top`   τ `tau`, 100 is usual   γ_h `gamma`   γ `shared`
    rows of W: a head's D are neighbours

Under Muon all directions of W_q and W_k grow alike, and their product's largest logit may run away,
softmax with it, to one key. QK-norm forbids that by construction, and then there is nothing to
clip. The optimizer's momentum is not scaled; nothing is kept from step to step. A factor below 1
means rounding in the weights' dtype: bf16 weights (bf16_sr) round to nearest here.

A fused attention kernel keeps the log-sum-exp and no maximum, so q·k is computed once more, some
queries at a time: one product beside the two of attention's forward and the five of its backward.
Measured on a CPU (one thread, 4 layers of width 256, 4 heads; processor time of forward and
backward) that adds 4 % to fp32 and 1 % to bf16 with 256 tokens in a sequence, 6 % and 8 % with
1024.

Reference: Kimi K2 (Kimi Team 2025, 2507.20534), MuonClip.
"""

import torch
from torch import Tensor

SCORES, ROWS = 2**22, 256  # most scores, and queries of each sequence, that are there at a time


@torch.no_grad()
def max_logits(q: Tensor, k: Tensor, places: Tensor, window: int | None = None) -> Tensor:
    """(H,): of each query head the largest q·k/√D, over the batch and all keys that are not later,
    or of those the last `window`.

    q (B, H, t, D); k (B, Hkv, T, D), all keys in the order of the sequence; places: (t,) of the
    queries in it, on the CPU. In bf16 for bf16, rounded by 2^-9 at most; else in at least float32.
    """
    (B, H, _, D), (kv, T) = q.shape, k.shape[1:3]
    dtype = q.dtype if q.dtype == torch.bfloat16 else torch.promote_types(q.dtype, torch.float32)
    top, size = (
        q.new_full((kv, H // kv), -torch.inf, dtype=dtype),
        max(1, min(SCORES // (B * H * T), ROWS)),
    )
    with torch.autocast(q.device.type, enabled=False):
        for mine, at in zip(q.to(dtype).split(size, 2), places.split(size)):
            end = int(at.max()) + 1  # nobody here sees further
            before = at.to(q.device).unsqueeze(1) - torch.arange(end, device=q.device)
            unseen = (before < 0) | (before >= (window or T))
            mask = (
                q.new_zeros(unseen.shape, dtype=dtype)
                .masked_fill_(unseen, -torch.inf)
                .repeat(H // kv, 1)
            )
            rows, keys = mine.reshape(B * kv, -1, D), k[:, :, :end].to(dtype).flatten(0, 1)
            scores = torch.baddbmm(mask, rows, keys.mT, alpha=D**-0.5)  # (B kv, H/kv size, end)
            top = torch.maximum(top, scores.view(B, kv, H // kv, -1).amax((0, 3)))
    return top.flatten()


def factors(top: Tensor, tau: float, kv: int) -> tuple[Tensor, Tensor]:
    """What the rows of W_q (..., H) and of W_k (..., kv) are multiplied by. top: (..., H)."""
    # A NaN is for others to handle
    gamma = torch.where((top > tau) & top.isfinite(), tau / top, 1.0)
    shared = gamma.unflatten(-1, (kv, -1)).amin(-1).sqrt()
    return gamma / shared.repeat_interleave(top.shape[-1] // kv, -1), shared


@torch.no_grad()
def clip(
    groups: list[dict], top: Tensor, tau: float, kv: int, head_size: int, shards: dict
) -> None:
    """In place, on the parameters of an optimizer's groups with full `names`
    (blocks.7.attn.q.weight), full or shards. top: (layers, H); shards: name -> (global shape,
    offsets) of the shards.
    """
    by = dict(zip("qk", factors(top, tau, kv)))
    for name, p in ((n, p) for group in groups for n, p in zip(group["names"], group["params"])):
        _, layer, module, which, *_ = name.split(".") + [""] * 3
        if module == "attn" and which in by:
            _, offsets = shards.get(name, (p.shape, (0,)))
            start = offsets[0]
            rows = by[which][int(layer)].repeat_interleave(head_size)[start : start + p.shape[0]]
            dtype = torch.promote_types(p.dtype, torch.float32)
            p.mul_(rows.to(p.device, dtype).view(-1, *[1] * (p.ndim - 1)))
