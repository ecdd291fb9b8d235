"""Context parallelism: the ranks share a long sequence, and attention reaches over all of it.

Each of n ranks holds t = T/n of the tokens in every layer, so what is kept for backward falls as
1/n. Attention alone needs tokens of other ranks. There are two ways to get at them.

`ring`: queries stay, keys and values travel (n = 3; kv_i: the keys and values of rank i)

            step 0         step 1         step 2        the sequence is in 2n chunks; rank r holds
    rank 0  kv0 causal     kv2 higher     kv1 higher    chunks r and 2n-1-r (zigzag):
    rank 1  kv1 causal     kv0 lower      kv2 higher             a   b   c   d   e   f
    rank 2  kv2 causal     kv1 lower      kv0 lower     rank     0   1   2   2   1   0

Every rank does the same work in every step, t*t/2 scores (and t/2 more in the first), and no score
is masked:
- keys from a lower rank: all my queries come after the first half of them and before the second:
  t x t/2;
- keys from a higher rank: only my second half of queries comes after them, and after all of them:
  t/2 x t;
- my own keys: the causal triangle. (If each rank held one contiguous part, rank 0 would be done
  here and wait for the last rank.)
Meanwhile the next block travels. Each block gives out and lse = log(sum exp(scores)), merged in
float32 or wider:

    total = log(exp(lse_1) + exp(lse_2))
    out = out_1 exp(lse_1 - total) + out_2 exp(lse_2 - total)

Backward sends the blocks round again. With the *final* out and lse each block has its true P, and
the gradients of all blocks add up:

    P = exp(S - lse)   dv = Pᵀ dout   dS = P * (dout vᵀ - rowsum(dout * out))  dq = dS k  dk = dSᵀ q

dk and dv follow their block one step behind, and each rank adds its part. The last of n-1 hops
brings them home, where the owner's part has waited.

`ulysses`: by an all-to-all each rank gets the whole sequence for 1/n of the heads

    rank 0  q k v [part 0, h0 h1]  ---->  [parts 0 1, h0] -> attention as   ---->  out as q
    rank 1  q k v [part 1, h0 h1]         [parts 0 1, h1]    on one rank           was

Bytes sent per rank and layer. kv: this rank's k and v; qo: its q and out; kv32: its dk and dv in at
least float32, so that rounding does not grow with n (kv for float32 and float64, 2 kv for bf16):

    ring       forward (n-1) kv            backward (n-1) (kv + kv32)   hidden, but for the last hop
    ulysses    forward (n-1)/n (kv + qo)   backward (n-1)/n (kv + qo)   waited for

Ulysses sends less from n = 3 on if k and v have as many heads as q, and runs any attention, but n
must divide these heads. The ring takes any number of heads, gains from few kv heads (GQA), and
hides messages once t*t/2 scores take longer than a block's journey. It keeps no more for backward
than one process for its tokens; Ulysses keeps q, k and out as they arrived, which are not computed
again (layers/recompute.py). (Llama 3, 2407.21783, gathers all k, v of the zigzag: simple, but
larger.)

References: Liu et al. 2023, 2310.01889 (ring); Brandon et al. 2023, 2311.09431 (even causal work,
by dealing single tokens where we deal chunks); Jacobs et al. 2023, 2309.14509 (Ulysses); Dao 2023,
2307.08691 (a block).

Example:
    import tempfile, torch
    import torch.distributed as dist, torch.multiprocessing as mp
    from torch.nn.functional import scaled_dot_product_attention
    from parallel.context import position_ids, ring

    def compare(rank, file):
        dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1, 4, 16, 8)  # (B, H, T, D) each
        expected = scaled_dot_product_attention(q, k, v, is_causal=True)
        mine = position_ids(16, 2, rank)  # zigzag: rank 0 has the first and the last quarter
        out = ring(dist.group.WORLD, *(x[:, :, mine] for x in (q, k, v)))
        assert torch.allclose(out, expected[:, :, mine], atol=1e-5)
        print(f"rank {rank} has the tokens {mine.tolist()}")
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(compare, (f"{folder}/store",), nprocs=2, start_method="fork")
"""

import inspect
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

aten = torch.ops.aten  # its fused attention kernels return the log-sum-exp, and take it in backward


def position_ids(block_size: int, n: int, rank: int, way: str = "ring") -> Tensor:
    """(block_size/n,) int64: the positions in the sequence that this rank holds, in local order.

    Raises ValueError where block_size is not a multiple of 2n (ring) or of n (ulysses).
    """
    n_chunks = {"ring": 2 * n, "ulysses": n}[way]
    if n == 1:
        n_chunks = 1
    if block_size % n_chunks:
        raise ValueError(
            f"--cp={n} and --cp_attention={way} split a sequence into {n_chunks} equal parts, not "
            f"possible with --block_size={block_size}; type a multiple of {n_chunks}"
        )
    chunks = torch.arange(block_size).chunk(n_chunks)
    if n_chunks > n:
        return torch.cat([chunks[rank], chunks[-1 - rank]])  # zigzag
    return chunks[rank]


def split(model: nn.Module, group: dist.ProcessGroup | None, way: str = "ring") -> None:
    """Makes the attention of `model` see the tokens of all ranks of `group`.

    Each rank holds the tokens at its `position_ids`. Replaces every module's `attention_fn`:
    q (B, H, t, D), k and v (B, Hkv, t, D) -> (B, H, t, D). group: None is one rank, and nothing
    changes. Raises ValueError where ulysses cannot deal out the heads.
    """
    assert way in ("ring", "ulysses"), way
    if group is None:
        return

    def sum_loads(load: Tensor) -> Tensor:
        load = load.clone()
        dist.all_reduce(load, group=group)
        return load

    for module in model.modules():
        # Experts' loads within a sequence (layers/moe.py): the other ranks have its other tokens.
        if hasattr(module, "sum_loads"):
            module.sum_loads = sum_loads
        if not hasattr(module, "attention_fn"):
            continue
        if way == "ring":
            module.attention_fn = partial(ring, group)
        else:
            check_heads(module, dist.get_world_size(group))
            module.attention_fn = partial(ulysses, group, module.attention_fn)


def check_heads(attention: nn.Module, n: int) -> None:
    """Raises ValueError where n ranks cannot have equally many heads each."""
    heads = attention.q.weight.shape[0] // attention.head_size
    kv_heads = attention.k.weight.shape[0] // attention.head_size
    if heads % n or kv_heads % n:
        raise ValueError(
            f"ulysses deals out heads, and --cp={n} does not divide {heads} heads and "
            f"{kv_heads} kv heads (of a tp rank); type --cp_attention=ring"
        )


def in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype in which autocast runs attention, if it is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    # autocast leaves float64 alone.
    return [x if x.dtype == torch.float64 else x.to(dtype) for x in tensors]


# ---- ring ----------------------------------------------------------------------------------------
def ring(group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor, **documents) -> Tensor:
    """An `attention_fn`: q (B, H, t, D), k and v (B, Hkv, t, D) -> (B, H, t, D).

    It does not call the function it replaces, which would not return the log-sum-exp. Raises
    ValueError for documents, whose masks its blocks do not take.
    """
    if documents:
        raise ValueError("a ring of keys hides no documents; take ulysses")
    assert q.shape[2] % 2 == 0, "zigzag: two chunks of equal length, see position_ids()"
    q, k, v = in_autocast_dtype(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        return RingForwardRingBackward.apply(q, k, v, group)


class RingForwardRingBackward(torch.autograd.Function):
    """Attention whose keys and values travel round the ring, forward and again backward."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        n = dist.get_world_size(group)
        rank = dist.get_rank(group)
        B, H, t, D = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        # Transposed, because the next projection reads (B, t, H, D).
        out = q.new_zeros(B, t, H, D, dtype=wide).transpose(1, 2)
        # exp(-inf) is 0, so the first block replaces the zeros in `out`.
        lse = q.new_full((B, H, t), -torch.inf, dtype=wide)
        kv = torch.stack([k, v])  # (2, B, Hkv, t, D): one message
        for step in range(n):
            # The block at hand travels on while it is worked with. The last one stays.
            is_last = step == n - 1
            arrive = pass_on([] if is_last else [kv], group)
            mine, keys, causal = visible(step, rank, t)
            merge(
                out[:, :, mine], lse[:, :, mine], *block(q[:, :, mine], *kv[:, :, :, keys], causal)
            )
            arrived = arrive()
            kv = None if is_last else arrived[0]
        ctx.group = group
        out = out.to(q.dtype)
        # Not the message: q and k as they came may be computed again (layers/recompute.py).
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        kv = torch.stack([k, v])
        group = ctx.group
        n = dist.get_world_size(group)
        rank = dist.get_rank(group)
        t = q.shape[2]
        dout = dout.contiguous()
        dq = torch.zeros_like(q, dtype=lse.dtype)
        own_dkv = torch.zeros_like(kv, dtype=lse.dtype)  # dk, dv of my own block
        dkv = None  # dk, dv of the last step's block, from all the ranks it has visited so far
        for step in range(n):
            # In step 0 all ranks work on their own blocks, so dk and dv have nothing to follow yet.
            sent = []
            if step < n - 1:
                sent.append(kv)
            if step > 1:
                sent.append(dkv)
            arrive = pass_on(sent, group)
            mine, keys, causal = visible(step, rank, t)
            queries = (x[:, :, mine] for x in (dout, q, out, lse))
            dq_part, dk_part, dv_part = block_backward(*queries, *kv[:, :, :, keys], causal)
            dq[:, :, mine] += dq_part
            del dq_part  # before anything else is allocated
            arrived = arrive()
            kv = arrived[0] if step < n - 1 else None
            # Whose dk and dv these are: my own stay here, the first rank after the owner begins
            # a sum, all others continue it.
            if step == 0:
                dkv = own_dkv
            elif step == 1:
                dkv = torch.zeros_like(own_dkv)
            else:
                dkv = arrived[-1]
            dkv[0][:, :, keys] += dk_part
            dkv[1][:, :, keys] += dv_part
            del dk_part, dv_part
        # Each sum is one rank before its owner on the ring: one more hop brings it home.
        own_dkv += pass_on([dkv], group)()[0]
        dk, dv = own_dkv.to(q.dtype)
        return dq.to(q.dtype), dk, dv, None


def visible(step: int, rank: int, t: int) -> tuple[slice, slice, bool]:
    """(which of my t queries, which of the t keys at hand they see, whether causally).

    In step `step` I have the keys of the rank that is `step` places before me on the ring.
    """
    everything = slice(None)
    first = slice(None, t // 2)
    second = slice(t // 2, None)
    if step == 0:
        # Chunk r comes before chunk 2n-1-r, so the local order is the order of time.
        return everything, everything, True
    from_lower_rank = step <= rank
    if from_lower_rank:
        return everything, first, False
    return second, everything, False


def pass_on(tensors: list[Tensor], group: dist.ProcessGroup) -> Callable[[], list[Tensor]]:
    """Starts sending these contiguous tensors to the next rank and receiving the previous rank's.

    Call the result to wait for all messages and to get the tensors received. Until then nothing may
    write to the tensors sent.
    """
    n = dist.get_world_size(group)
    rank = dist.get_rank(group)
    next_rank = dist.get_global_rank(group, (rank + 1) % n)
    previous_rank = dist.get_global_rank(group, (rank - 1) % n)
    arriving = [torch.empty_like(x) for x in tensors]
    # One batch of both directions: a ring of blocking sends would wait for ever.
    ops = [dist.P2POp(dist.isend, x, next_rank, group) for x in tensors]
    ops += [dist.P2POp(dist.irecv, x, previous_rank, group) for x in arriving]
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
    """q (B, H, t, D), k and v (B, Hkv, S, D) -> out (B, H, t, D), lse (B, H, t).

    lse is in at least float32.
    """
    if on_gpu(q):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    forward = formula
    if q.device.type == "cpu":
        forward = aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = forward(*grouped(q, k, v), 0.0, causal)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def block_backward(dout, q, out, lse, k, v, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block; out and lse belong to the attention to all blocks."""
    if on_gpu(q):
        # The kernel wants the random state of dropout: any will do where nothing is dropped.
        no_state = torch.empty(2, dtype=torch.uint64, device=q.device)
        lengths = (q.shape[2], k.shape[2])
        rest = (lse.contiguous(), None, None, *lengths, 0.0, causal, no_state, no_state)
        return aten._scaled_dot_product_flash_attention_backward(dout, q, k, v, out, *rest)
    backward = formula_backward
    if q.device.type == "cpu":
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    qs, ks, vs = grouped(q, k, v)
    dout, out, lse = (x.reshape(qs.shape[: x.ndim]) for x in (dout, out, lse))
    dq, dk, dv = backward(dout, qs, ks, vs, out, lse, 0.0, causal)
    # Several query heads share a kv head: its gradient is the sum over them.
    if dk.shape[1] > 1:
        dk = dk.sum(1)
    if dv.shape[1] > 1:
        dv = dv.sum(1)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(k.shape)


def on_gpu(q: Tensor) -> bool:
    """Can the GPU's fused kernel take q? If not, `formula` does, which holds all t x S scores."""
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] in range(8, 257, 8)
    return q.is_cuda and fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """B*Hkv batches of the H/Hkv heads that share a kv head; k and v are expanded, not copied."""
    q = q.unflatten(1, (k.shape[1], -1)).flatten(0, 1)  # (B Hkv, H/Hkv, t, D)
    k, v = (x.flatten(0, 1).unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (k, v))
    return [q, k, v]


def scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """q (..., t, D), k (..., S, D) -> (..., t, S), with -inf where a key comes after the query."""
    scaled = q @ k.mT * q.shape[-1] ** -0.5
    if not causal:
        return scaled
    is_later = torch.ones_like(scaled, dtype=torch.bool).triu(1)
    return scaled.masked_fill(is_later, -torch.inf)


def formula(q, k, v, dropout, causal) -> tuple[Tensor, Tensor]:
    """out and lse of a block, called as the fused kernels are."""
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    s = scores(q, k, causal)
    lse = s.logsumexp(-1)
    return (s - lse.unsqueeze(-1)).exp() @ v, lse


def formula_backward(dout, q, k, v, out, lse, dropout, causal) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of a block: the formulas at the top of this file."""
    dout, q, k, v, out = (x.to(lse.dtype) for x in (dout, q, k, v, out))
    p = (scores(q, k, causal) - lse.unsqueeze(-1)).exp()
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return ds @ k, ds.mT @ q, p.mT @ dout


# ---- ulysses -------------------------------------------------------------------------------------
def ulysses(
    group: dist.ProcessGroup, plain: Callable, q: Tensor, k: Tensor, v: Tensor, **documents
) -> Tensor:
    """An `attention_fn` around `plain`, which sees all T tokens of this rank's share of the heads.

    q (B, H, t, D), k and v (B, Hkv, t, D) -> (B, H, t, D); documents: of all T tokens
    """
    n = dist.get_world_size(group)
    # The heads of each rank, of q, k and v together: one message to each rank.
    shares = [x.unflatten(1, (n, -1)) for x in in_autocast_dtype(q, k, v)]  # (B, n, heads, t, D)
    x = torch.cat(shares, 2).movedim(1, 0)  # (n, B, heads, t, D): rank i's heads of my tokens at i
    # After the swap entry i is rank i's tokens of my heads: joined they are the sequence.
    x = SwapForwardSwapBackward.apply(x, group).movedim(0, 2).flatten(2, 3)  # (B, my heads, T, D)
    y = plain(*x.split([share.shape[2] for share in shares], 1), **documents)  # (B, H/n, T, D)
    # Back: rank i's tokens of my heads go to i, as (n, B, H/n, t, D).
    y = SwapForwardSwapBackward.apply(y.unflatten(2, (n, -1)).movedim(2, 0), group)
    return y.movedim(0, 1).flatten(1, 2)  # (B, H, t, D)


class SwapForwardSwapBackward(torch.autograd.Function):
    """All-to-all: x[j] of rank i and x[i] of rank j change places.

    It is its own inverse, and its own transpose.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        arrived = torch.empty_like(x)
        dist.all_to_all_single(arrived, x, group=group)
        return arrived

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return SwapForwardSwapBackward.apply(grad, ctx.group), None


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
