"""QK-clip scales a head's queries and keys back where its attention logits grew beyond tau.

    S_h = max of q_i·k_j / √D over the queries i of head h and the keys j that each sees
    γ_h = τ / S_h  where S_h > τ, else 1
    γ   = min of γ_h over the query heads h that share one head of keys
    W_k ← W_k √γ          that key head's rows, after the optimizer's step; biases alike
    W_q ← W_q γ_h / √γ    head h's rows

Every logit of head h is multiplied by γ_h: a query head that shares its keys with one that grew
gets back what the keys lost (γ_h = 1: W_q / √γ). With as many key heads as query heads both factors
are √γ_h, the paper's. (There, in multi-head latent attention, the queries take all of γ_h where
heads share keys; that would leave W_k to grow.)

    S_h `top`   τ `tau`, 100 is usual   γ_h `gamma`   √γ `root`
    rows of W: a head's D are neighbours

Under Muon all directions of W_q and W_k grow alike. Then the largest logit of their product may run
away, and softmax goes to one key. QK-norm forbids that by construction, and leaves nothing to clip.
The optimizer's momentum is not scaled; nothing is kept from step to step. A factor below 1 means
rounding in the weights' dtype: bf16 weights (bf16_sr) round to nearest here.

A fused attention kernel keeps the log-sum-exp and no maximum. So q·k is computed once more, some
queries at a time: one product beside the two of attention's forward and the five of its backward.
Measured on a CPU (one thread, 4 layers of width 256, 4 heads; processor time of forward and
backward) that adds 4 % to fp32 and 1 % to bf16 with 256 tokens in a sequence, 6 % and 8 % with
1024.

Reference: Kimi K2 (Kimi Team 2025, 2507.20534), MuonClip.

Example:
    import torch
    from optim.qk_clip import clip, max_logits
    x = torch.randn(1, 16, 8)
    weights = {f"blocks.0.attn.{name}.weight": 9 * torch.randn(8, 8) for name in "qk"}
    def largest():  # (H,) for 2 heads of 4
        q, k = ((x @ w.T).unflatten(-1, (2, 4)).transpose(1, 2) for w in weights.values())
        return max_logits(q, k, torch.arange(16))
    groups = [{"names": [*weights], "params": [*weights.values()]}]  # an optimizer's
    clip(groups, largest().unsqueeze(0), tau=100, n_kv_head=2, head_size=4, shards={})
    assert largest().max() < 100.1
"""

import torch
from torch import Tensor

# Limits on memory: scores at a time, and queries of each sequence at a time.
MAX_SCORES = 2**22
MAX_QUERIES = 256


@torch.no_grad()
def max_logits(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    window: int | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """(H,): each query head's largest q·k/√D, over the batch and the keys that a query sees.

    q (B, H, t, D); k (B, Hkv, T, D), all keys in the order of the sequence; position_ids: (t,) of
    the queries, on the CPU. A query sees no later key; of the others all, or the last `window`; and
    none before starts (B, T), where each token's document begins (layers/document_mask.py). In bf16
    for bf16, rounded by 2^-9 at most; else in at least float32.
    """
    B, H, _, D = q.shape
    Hkv, T = k.shape[1:3]
    shared = H // Hkv  # query heads that share one head of keys
    dtype = q.dtype
    if dtype != torch.bfloat16:
        dtype = torch.promote_types(dtype, torch.float32)
    top = q.new_full((Hkv, shared), -torch.inf, dtype=dtype)
    size = max(1, min(MAX_SCORES // (B * H * T), MAX_QUERIES))
    with torch.autocast(q.device.type, enabled=False):
        for some, at in zip(q.to(dtype).split(size, 2), position_ids.split(size)):
            # No query here sees keys after the last query: leave them out of the product.
            end = int(at.max()) + 1
            at = at.to(q.device)
            places = torch.arange(end, device=q.device)
            distance = at.unsqueeze(1) - places
            unseen = (distance < 0) | (distance >= (window or T))
            if starts is not None:
                unseen = unseen | (places < starts[:, at].unsqueeze(2))  # (B, queries, end)
                unseen = unseen.repeat_interleave(Hkv, 0)
            mask = q.new_zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)
            # Query heads that share keys are one longer list of queries, so keys need no copies.
            queries = some.reshape(B * Hkv, -1, D)
            keys = k[:, :, :end].to(dtype).flatten(0, 1)
            scores = torch.baddbmm(torch.cat([mask] * shared, -2), queries, keys.mT, alpha=D**-0.5)
            scores = scores.view(B, Hkv, shared, -1)
            top = torch.maximum(top, scores.amax((0, 3)))
    return top.flatten()


def factors(top: Tensor, tau: float, n_kv_head: int) -> tuple[Tensor, Tensor]:
    """What the rows of W_q (..., H) and of W_k (..., Hkv) are multiplied by. top: (..., H)."""
    # A head whose logit is NaN or inf keeps factor 1: τ/inf would set its weights to 0.
    gamma = torch.where((top > tau) & top.isfinite(), tau / top, 1.0)
    root = gamma.unflatten(-1, (n_kv_head, -1)).amin(-1).sqrt()
    return gamma / root.repeat_interleave(top.shape[-1] // n_kv_head, -1), root


@torch.no_grad()
def clip(
    groups: list[dict], top: Tensor, tau: float, n_kv_head: int, head_size: int, shards: dict
) -> None:
    """Scales the queries' and keys' weights in place.

    groups: an optimizer's, with full `names` (blocks.7.attn.q.weight), of full parameters or
    shards. top: (layers, H). shards: name -> (global shape, offsets) of the shards.
    """
    factors_q, factors_k = factors(top, tau, n_kv_head)
    factors_of = {"q": factors_q, "k": factors_k}
    for group in groups:
        for name, p in zip(group["names"], group["params"]):
            _, layer, module, which, *_ = name.split(".") + [""] * 3
            if module != "attn" or which not in factors_of:
                continue
            # A head has head_size rows, each with the head's factor. A shard has some of all rows.
            _, offsets = shards.get(name, (p.shape, (0,)))
            rows = factors_of[which][int(layer)].repeat_interleave(head_size)
            rows = rows[offsets[0] : offsets[0] + p.shape[0]]
            # In bf16 the factors would be rounded too: it has no number between 0.996 and 1.
            dtype = torch.promote_types(p.dtype, torch.float32)
            p.mul_(rows.to(p.device, dtype).view(-1, *[1] * (p.ndim - 1)))


if __name__ == "__main__":
    for top in 50.0, 100.0, 200.0, 400.0:
        q, k = factors(torch.tensor([top]), tau=100, n_kv_head=1)
        print(f"largest logit {top:g}: W_q x {q.item():.3f}, W_k x {k.item():.3f}")
