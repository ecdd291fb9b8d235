"""Tensor parallelism: every matrix is cut over the ranks, each of which sees all the tokens.

Two products follow one another, attention's (q, k, v, then proj) as well as the MLP's (fc, then
proj). The first matrix is cut by columns and the second by rows, so that nothing is sent between
them:

    Y = g(act(f(X) W1) W2)        W1 = [A0 | A1]        W2 = [B0]
                                                             [B1]
                      rank 0             rank 1
    X                 full               full            f: nothing / backward: dX summed over ranks
    column: W1        A0                 A1
    act(X W1)         act(X A0)          act(X A1)       half of the heads, or of the MLP's width
    row: W2           B0                 B1
    their product     act(X A0) B0       act(X A1) B1
    Y                 the sum of both    the same        g: summed over ranks / backward: nothing

torch stores W1 and W2 transposed: a column layer's weight is cut along dimension 0, a row layer's
along 1. A column's bias is cut with it; a row's is full and added after the sum (before, it would
count N times). The embedding is cut by words: other ranks' words give zeros, g adds up. The head
too, tied or not: each rank has the logits of its words, and the loss takes three numbers a token
from the others instead of V. Norms, learned positions and n-grams are full everywhere, and so,
after f's sums, are their gradients. f stands once before q, k and v; in each of them, as a column
layer drawn alone has it, it would send dX three times.

Bytes sent per rank and micro-batch, a = (N-1)/N x those of one (B, T, C) activation:

    all-reduce, g      forward: each row layer, the embedding            (2 layers + 1) 2a
    all-reduce, f      backward: before attention, MLP and head          (2 layers + 1) 2a
    loss               all-reduce of the maximum, then of two sums       2 (N-1)/N 3 B T w
      hits             all-reduces of the maximum and of a place, int64  2 (N-1)/N B T (w + 8)
      no targets       instead of both: g of the logits, padded with 0   2 (N-1)/N B T V w

with w bytes in a logit. Under autocast all activations but the embedding's travel in its dtype. A
stage of a pipeline sends what is said of its layers, embedding and head. References: Shoeybi et al.
2019 (1909.08053), Narayanan et al. 2021 (2104.04473).
"""

import functools
import types
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from parallel.shard import Shard

COLUMN, ROW = ("attn.q", "attn.k", "attn.v", "mlp.fc", "head"), ("attn.proj", "mlp.proj")
VOCABULARY = ("embed",)


class CopyForwardSumBackward(torch.autograd.Function):
    """f: what all ranks hold goes into work that is split among them."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return summed(dy, ctx.group), None


class SumForwardCopyBackward(torch.autograd.Function):
    """g: the work of all ranks, added up, goes to all of them."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy, None


def summed(x: Tensor, group: dist.ProcessGroup, op=dist.ReduceOp.SUM) -> Tensor:
    """A new tensor: backward may have given the old one to somebody else too."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, group)
    return x


# ---- the loss of logits of which each rank holds its words' --------------------------------------
class CrossEntropy(torch.autograd.Function):
    """Sum of logsumexp(logits) - logits[target]; backward: softmax - one-hot of my words, nothing
    sent, plus the gradient of z_loss logsumexp(logits)^2, which is not in the value. Keeps the
    logits and makes no copy of them in forward; torch's own keeps their logarithmic softmax."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, targets: Tensor, group: dist.ProcessGroup, z_loss: float
    ) -> Tensor:
        here, mine = local_ids(targets, logits.shape[1], group)  # logits (BT, V/N), targets (BT,)
        top = summed(logits.amax(1), group, dist.ReduceOp.MAX)
        parts = zip(logits.split(1024), top.split(1024))
        exps = torch.cat([(part - t.unsqueeze(1)).exp_().sum(1) for part, t in parts])
        target = logits.gather(1, here.unsqueeze(1)).squeeze(1) - top
        exps, target = summed(torch.stack([exps, target.masked_fill(~mine, 0)]), group)
        counts, ctx.z_loss = targets != -100, z_loss  # F.cross_entropy passes over -100
        ctx.save_for_backward(logits, top, exps, here, mine, counts)
        return torch.where(counts, exps.log() - target, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        logits, top, exps, here, mine, counts = ctx.saved_tensors
        dlog_z = dloss * counts * (1 + 2 * ctx.z_loss * (top + exps.log()))
        dlogits = (logits - top.unsqueeze(1)).exp_().mul_((dlog_z / exps).unsqueeze(1))
        dlogits.scatter_add_(1, here.unsqueeze(1), (-dloss * mine).unsqueeze(1))
        return dlogits, None, None, None


def local_ids(ids: Tensor, words: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Where in my `words` words these ids are, 0 for those of other ranks; which are mine."""
    ids = ids - dist.get_rank(group) * words
    mine = (ids >= 0) & (ids < words)
    return ids.where(mine, 0), mine


def loss_fn(
    logits: Tensor,
    targets: Tensor | None,
    count: bool,
    group: dist.ProcessGroup,
    z_loss: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(sum of the token losses, how many targets are the likeliest token if asked), the same on all
    ranks.

    logits: (B, T, V/N), my words'; targets: (B, T), without: (logits of all words, None); z_loss:
    see above.
    """
    words, n, rank = logits.shape[-1], group.size(), dist.get_rank(group)
    if targets is None:
        padded = F.pad(logits, (rank * words, (n - 1 - rank) * words))
        return SumForwardCopyBackward.apply(padded, group), None
    logits, targets, hits = logits.flatten(0, 1), targets.flatten(), None
    if count:
        best, place = logits.detach().max(1)
        # Of equals the first wins, as in argmax
        ties = best == summed(best, group, dist.ReduceOp.MAX)
        place = torch.where(ties, place + rank * words, n * words)
        hits = (summed(place, group, dist.ReduceOp.MIN) == targets).sum()
    return CrossEntropy.apply(logits, targets, group, z_loss or 0.0), hits


# ---- who gets which shard ------------------------------------------------------------------------
def split(
    model: nn.Module,
    group: dist.ProcessGroup | None,
    enter: Callable | None = None,
    leave: Callable | None = None,
    column=COLUMN,
    row=ROW,
    vocabulary=VOCABULARY,
) -> dict[str, Shard]:
    """Each parameter of `model`, on the meta device or not, now holds my shard; those not in the
    returned {name: Shard} stay full.

    column, row, vocabulary: endings of the names of Linear, Linear and Embedding modules. f goes
    before the module that holds a row layer beside the column layers, which share its first
    argument, or before a column layer alone. The head's logits stay cut: model.loss_fn is replaced
    by the one above. enter(module, x), leave(module, x, bias): in place of f, and of g with its
    bias. Raises ValueError where N does not divide heads, key heads, width or vocabulary.
    """
    if group is None:
        return {}
    n, rank = group.size(), dist.get_rank(group)
    modules, dims, entries = dict(model.named_modules()), {}, set()
    enter = enter or (lambda module, x: CopyForwardSumBackward.apply(x, group))
    leave = leave or (lambda module, x, bias: add(SumForwardCopyBackward.apply(x, group), bias))
    parent = {name: name.rpartition(".")[0] for name in modules}
    with_rows = {parent[name] for name in modules if ends(name, row)}
    for name, module in modules.items():
        if ends(name, column):
            entries.add(parent[name] if parent[name] in with_rows else name)
        if ends(name, column + vocabulary):
            dims |= dict.fromkeys(module.parameters(recurse=False), 0)
        elif ends(name, row):
            dims[module.weight] = 1
        if ends(name, column + vocabulary + row):
            check(name, module, dims[module.weight], modules[parent[name]], n)
    if not dims:
        raise ValueError("split: no module's name ends as column=, row= or vocabulary= say")

    tp_shards = {}
    for name, p in model.named_parameters():
        if p in dims:
            shape, offsets = list(p.shape), [0] * p.ndim
            shape[dims[p]] //= n
            offsets[dims[p]] = rank * shape[dims[p]]
            tp_shards[name] = shard = Shard(tuple(p.shape), tuple(offsets))
            p.data = shard.narrow(p.data, shape).clone(memory_format=torch.contiguous_format)

    def row_forward(self, x: Tensor) -> Tensor:
        return leave(self, getattr(self, "matmul", F.linear)(x, self.weight, None), self.bias)

    def vocabulary_forward(self, ids: Tensor) -> Tensor:
        here, mine = local_ids(ids, self.weight.shape[0], group)
        return leave(self, type(self).forward(self, here).masked_fill(~mine.unsqueeze(-1), 0), None)

    for name, module in modules.items():
        if ends(name, row):
            module.in_features //= n
            module.forward = types.MethodType(row_forward, module)
        elif ends(name, column):
            module.out_features //= n
        elif ends(name, vocabulary):
            module.num_embeddings //= n
            module.forward = types.MethodType(vocabulary_forward, module)
    for name in entries:
        modules[name].register_forward_pre_hook(
            lambda m, args: (enter(m, for_matmul(args[0])), *args[1:])
        )
    if hasattr(model, "loss_fn") and any(ends(name, ("head",)) for name in modules):
        model.loss_fn = functools.partial(loss_fn, group=group)
    return tp_shards


def ends(name: str, endings: tuple[str, ...]) -> bool:
    return f".{name}".endswith(tuple(f".{ending}" for ending in endings))


def add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def for_matmul(x: Tensor) -> Tensor:
    """In the dtype to which autocast, if on, would cast it for each product anyway."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def check(name: str, module: nn.Module, dim: int, holder: nn.Module, n: int) -> None:
    """Raises ValueError where n does not divide what this module's weight has along dim, in whole
    heads."""
    count, base, last = (
        module.weight.shape[dim],
        module.weight.shape[1 - dim],
        name.rpartition(".")[2],
    )
    what, flag = f"the width {count} of {name}", "--n_embd"
    if last in ("q", "k", "v"):
        base = count = count // getattr(holder, "head_size", 1)
        what, flag = f"the {count} heads of {name}", "--n_head" if last == "q" else "--n_kv_head"
    elif isinstance(module, nn.Embedding) or last == "head":
        base, what, flag = count, f"the {count} words of the vocabulary", "--vocab_size"
    if count % n:
        fits, divisor = -(-base // n) * n, max(d for d in range(1, n) if count % d == 0)
        raise ValueError(f"--tp={n} does not divide {what}; type {flag}={fits} or --tp={divisor}")
