"""Context parallelism: a long sequence is cut over n ranks. Each holds t = T/n of its tokens in
every layer, so what is kept for backward falls as 1/n; only attention has to look beyond them, in
one of two ways.

`ring`: queries stay, keys and values travel (n = 3; kv_i: those of rank i)

            step 0         step 1         step 2        the sequence is in 2n chunks; rank r holds
    rank 0  kv0 causal     kv2 higher     kv1 higher    chunks r and 2n-1-r (zigzag):
    rank 1  kv1 causal     kv0 lower      kv2 higher             a   b   c   d   e   f
    rank 2  kv2 causal     kv1 lower      kv0 lower     rank     0   1   2   2   1   0

Every rank does the same work in every step, t*t/2 scores (and t/2 more in the first), none of them
masked:
- from a lower rank: all my queries come after the first half of its keys and before the second:
  t x t/2;
- from a higher rank: only my second half of queries comes after its keys, and after all of them:
  t/2 x t;
- my own: the causal triangle. (In n plain stretches rank 0 would be done here and wait for the
  last rank.)
Meanwhile the next block travels. Each gives out and lse = log(sum exp(scores)), merged in float32
or wider:

    total = log(exp(lse_1) + exp(lse_2))
    out = out_1 exp(lse_1 - total) + out_2 exp(lse_2 - total)

Backward goes round again. With the *final* out and lse each block has its true P, and gradients add
up:

    P = exp(S - lse)   dv = Pᵀ dout   dS = P * (dout vᵀ - rowsum(dout * out))  dq = dS k  dk = dSᵀ q

dk and dv follow their block one step behind, each rank adds its part, and the last of n-1 hops
brings them home, where the owner's part has waited.

`ulysses`: by an all-to-all each rank gets the whole sequence for 1/n of the heads

    rank 0  q k v [stretch 0, h0 h1]  ---->  [stretches 0 1, h0] -> attention as   ---->  out as q
    rank 1  q k v [stretch 1, h0 h1]         [stretches 0 1, h1]    on one rank           was

Bytes sent per rank and layer. kv: this rank's k and v; qo: its q and out; kv32: its dk and dv in at
least float32, so that rounding does not grow with n (kv for float32 and float64, 2 kv for bf16):

    ring       forward (n-1) kv            backward (n-1) (kv + kv32)   hidden, but for the last hop
    ulysses    forward (n-1)/n (kv + qo)   backward (n-1)/n (kv + qo)   waited for

Ulysses sends less from n = 3 on if k and v have as many heads as q, and runs any attention, but n
must divide these heads. The ring takes any number, gains from few kv heads (GQA), and hides
messages once t*t/2 scores take longer than a block's journey. (Llama 3, 2407.21783, gathers all k,
v of the zigzag: simple, but larger.)

References: Liu et al. 2023, 2310.01889 (ring); Brandon et al. 2023, 2311.09431 (even causal work,
by dealing single tokens where we deal chunks); Jacobs et al. 2023, 2309.14509 (Ulysses); Dao 2023,
2307.08691 (a block).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

aten = torch.ops.aten  # whose fused attention kernels give, and take, the log-sum-exp


def positions(block_size: int, n: int, rank: int, way: str = "ring") -> Tensor:
    """(block_size/n,) int64: which places of the sequence this rank holds, in its local order.
    Raises ValueError where block_size is not a multiple of 2n (ring) or n (ulysses)."""
    pieces = {"ring": 2 * n, "ulysses": n}[way] if n > 1 else 1
    if block_size % pieces:
        raise ValueError(
            f"--cp={n} and --cp_attention={way} cut a sequence into {pieces} equal pieces, not "
            f"possible with --block_size={block_size}; type a multiple of {pieces}"
        )
    chunks = torch.arange(block_size).chunk(pieces)
    return torch.cat([chunks[rank], chunks[-1 - rank]]) if pieces > n else chunks[rank]


def split(model: nn.Module, group: dist.ProcessGroup | None, way: str = "ring") -> None:
    """The attention of `model` sees the tokens of all ranks of `group` (None: one rank, nothing
    changes), each of which holds those at its `positions`: replaces every module's `attention_fn`,
    q (B, H, t, D), k and v (B, Hkv, t, D) -> (B, H, t, D). Raises ValueError where ulysses cannot
    deal out the heads."""
    assert way in ("ring", "ulysses"), way
    for module in (
        [m for m in model.modules() if hasattr(m, "attention_fn")] if group is not None else []
    ):
        if way == "ulysses":
            n = dist.get_world_size(group)
            heads, kv_heads = (x.weight.shape[0] // module.head_size for x in (module.q, module.k))
            if heads % n or kv_heads % n:
                raise ValueError(
                    f"ulysses deals out heads, and --cp={n} does not divide {heads} heads and "
                    f"{kv_heads} kv heads (of a tp rank); type --cp_attention=ring"
                )
        module.attention_fn = (
            partial(ring, group) if way == "ring" else partial(ulysses, group, module.attention_fn)
        )


def as_autocast_would(*tensors: Tensor) -> list[Tensor]:
    """In the dtype in which autocast runs attention; float64 is left alone, as it leaves it."""
    device = tensors[0].device.type
    on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return [x.to(dtype) if on and x.dtype != torch.float64 else x for x in tensors]


# ---- ring ----------------------------------------------------------------------------------------
def ring(group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An `attention_fn`; it has no use for an earlier one, which would keep the log-sum-exp to
    itself."""
    assert q.shape[2] % 2 == 0, "zigzag: two chunks of equal length, see positions()"
    q, k, v = as_autocast_would(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        return RingForwardRingBackward.apply(q.contiguous(), k, v, group)


class RingForwardRingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        n, rank, (B, H, t, D) = dist.get_world_size(group), dist.get_rank(group), q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        home = kv = torch.stack([k, v])  # (2, B, Hkv, t, D): one message
        # Laid out as the next projection reads it
        out = q.new_zeros(B, t, H, D, dtype=wide).transpose(1, 2)
        lse = q.new_full((B, H, t), -torch.inf, dtype=wide)
        for step in range(n):
            arrive = pass_on([kv] * (step < n - 1), group)
            mine, keys, causal = seen(step, rank, t)
            merge(
                out[:, :, mine], lse[:, :, mine], *block(q[:, :, mine], *kv[:, :, :, keys], causal)
            )
            (kv,) = arrive() or [None]
        ctx.group, out = group, out.to(q.dtype)
        ctx.save_for_backward(q, home, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (q, kv, out, lse), group, dout = ctx.saved_tensors, ctx.group, dout.contiguous()
        n, rank, t = dist.get_world_size(group), dist.get_rank(group), q.shape[2]
        # Home: dk, dv of my own block
        dq, home = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, kv))
        dkv = None  # dk, dv of the last step's block, from all the ranks it has visited so far
        for step in range(n):
            arrive = pass_on([kv] * (step < n - 1) + [dkv] * (step > 1), group)
            mine, keys, causal = seen(step, rank, t)
            queries = (x[:, :, mine] for x in (dout, q, out, lse))
            parts = list(block_backward(*queries, *kv[:, :, :, keys], causal))
            dq[:, :, mine] += parts.pop(0)  # so its memory is let go of before the next step
            arrived = arrive()
            kv = arrived[0] if step < n - 1 else None
            dkv = home if step == 0 else torch.zeros_like(home) if step == 1 else arrived[-1]
            for total in dkv:
                total[:, :, keys] += parts.pop(0)
        home += pass_on([dkv], group)()[0]
        return dq.to(q.dtype), *home.to(q.dtype), None


def seen(step: int, rank: int, t: int) -> tuple[slice, slice, bool]:
    """Which of my t queries see which of the t keys of the rank `step` before me on the ring;
    causally?"""
    everything, first, second = slice(None), slice(None, t // 2), slice(t // 2, None)
    if step == 0:
        return everything, everything, True  # chunk r lies before chunk 2n-1-r: local order is time
    return (everything, first, False) if step <= rank else (second, everything, False)


def pass_on(tensors: list[Tensor], group: dist.ProcessGroup) -> Callable[[], list[Tensor]]:
    """Starts sending these contiguous tensors to the next rank on the ring, and receiving the like
    from the one before, in one batch: a ring of blocking sends would wait forever. Call what it
    returns to wait for all and have the ones received; until then nothing may write to the ones
    sent.
    """
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    after, before = (dist.get_global_rank(group, (rank + hop) % n) for hop in (1, -1))
    arriving = [torch.empty_like(x) for x in tensors]
    ops = [dist.P2POp(dist.isend, x, after, group) for x in tensors]
    ops += [dist.P2POp(dist.irecv, x, before, group) for x in arriving]
    works = dist.batch_isend_irecv(ops) if ops else []

    def arrive() -> list[Tensor]:
        for work in works:
            work.wait()
        return arriving

    return arrive


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """In place: out (B, H, t, D) and lse (B, H, t) take in the attention to further keys."""
    total = torch.logaddexp(lse, part_lse)
    out *= (lse - total).exp().unsqueeze(-1)
    out += part * (part_lse - total).exp().unsqueeze(-1)
    lse.copy_(total)


# ---- attention to one block of keys --------------------------------------------------------------
def block(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """q (B, H, t, D), k and v (B, Hkv, s, D) -> out (B, H, t, D), lse (B, H, t) in at least
    float32."""
    if on_gpu(q):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    forward = (
        aten._scaled_dot_product_flash_attention_for_cpu if q.device.type == "cpu" else formula
    )
    out, lse = forward(*grouped(q, k, v), 0.0, causal)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def block_backward(dout, q, out, lse, k, v, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block; out and lse are those of the attention to all blocks."""
    if on_gpu(q):
        # The random state of a dropout of 0
        none = torch.empty(2, dtype=torch.uint64, device=q.device)
        rest = (lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, none, none)
        return aten._scaled_dot_product_flash_attention_backward(dout, q, k, v, out, *rest)
    cpu = aten._scaled_dot_product_flash_attention_for_cpu_backward
    backward, (qs, ks, vs) = cpu if q.device.type == "cpu" else formula_backward, grouped(q, k, v)
    dout, out, lse = (x.reshape(qs.shape[: x.ndim]) for x in (dout, out, lse))
    dq, dk, dv = backward(dout, qs, ks, vs, out, lse, 0.0, causal)
    dk, dv = (x.sum(1) if x.shape[1] > 1 else x for x in (dk, dv))
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(k.shape)


def on_gpu(q: Tensor) -> bool:
    """Can the GPU's fused kernel take it? If not, the formula below, which holds all t x s scores,
    does."""
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] in range(8, 257, 8)
    return q.is_cuda and fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """B*Hkv batches of H/Hkv heads; k and v, which these share, are not copied."""
    q = q.unflatten(1, (k.shape[1], -1)).flatten(0, 1)
    return [q, *(x.flatten(0, 1).unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (k, v))]


def scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    s = q @ k.mT * q.shape[-1] ** -0.5  # (..., t, s)
    return s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf) if causal else s


def formula(q, k, v, dropout, causal) -> tuple[Tensor, Tensor]:
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    lse = (s := scores(q, k, causal)).logsumexp(-1)
    return (s - lse.unsqueeze(-1)).exp() @ v, lse


def formula_backward(dout, q, k, v, out, lse, dropout, causal) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (x.to(lse.dtype) for x in (dout, q, k, v, out))
    p = (scores(q, k, causal) - lse.unsqueeze(-1)).exp()
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return ds @ k, ds.mT @ q, p.mT @ dout


# ---- ulysses -------------------------------------------------------------------------------------
def ulysses(group: dist.ProcessGroup, plain: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An `attention_fn` around the plain one, which runs on all T tokens of this rank's share of
    the heads."""
    n = dist.get_world_size(group)
    # (B, n, heads, t, D) each
    shares = [x.unflatten(1, (n, -1)) for x in as_autocast_would(q, k, v)]
    x = torch.cat(shares, 2).movedim(1, 0)  # (n, B, heads, t, D): my stretch; heads of rank i at i
    x = SwapForwardSwapBackward.apply(x, group).movedim(0, 2).flatten(2, 3)  # (B, my heads, T, D)
    y = plain(*x.split([share.shape[2] for share in shares], 1))  # (B, H/n, T, D)
    y = SwapForwardSwapBackward.apply(y.unflatten(2, (n, -1)).movedim(2, 0), group)
    return y.movedim(0, 1).flatten(1, 2)  # (B, H, t, D)


class SwapForwardSwapBackward(torch.autograd.Function):
    """All-to-all: x[j] of rank i and x[i] of rank j change places; its own inverse, and its own
    transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, x = group, x.contiguous()
        arrived = torch.empty_like(x)
        dist.all_to_all_single(arrived, x, group=group)
        return arrived

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return SwapForwardSwapBackward.apply(grad, ctx.group), None
