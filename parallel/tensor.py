"""Tensor parallelism: each rank has a shard of every matrix, and sees all tokens.

Two products follow one another, in attention (q, k, v, then proj) and in the MLP (fc, then proj).
The first matrix is split by columns and the second by rows, so that nothing is sent between them:

    Y = g(act(f(X) W1) W2)        W1 = [A0 | A1]        W2 = [B0]
                                                             [B1]
                      rank 0             rank 1
    X                 full               full            f: nothing / backward: dX summed over ranks
    column: W1        A0                 A1
    act(X W1)         act(X A0)          act(X A1)       half of the heads, or of the MLP's width
    row: W2           B0                 B1
    their product     act(X A0) B0       act(X A1) B1
    Y                 the sum of both    the same        g: summed over ranks / backward: nothing

torch stores W1 and W2 transposed: a column layer's weight is split along dimension 0, a row layer's
weight along dimension 1. A column layer's bias is split with it. A row layer's bias is full, and is
added after the sum; before the sum it would count N times. The embedding is split by words: words
of other ranks give zeros, and g adds up. The head is split by words too, tied or not: each rank has
the logits of its words, and the loss needs three numbers a token from the others instead of V.
Norms, learned positions and n-grams are full on every rank, and so are their gradients, because f
has summed what reaches them. But a gain of the norm of queries or keys, full too, sees the rank's
heads alone: its gradient is summed over the ranks. One f serves q, k and v together; an f in each
of the three, as the drawing of a single column layer has it, would send dX three times.

Bytes sent per rank and micro-batch, a = (N-1)/N x the bytes of one (B, T, C) activation:

    all-reduce, g      forward: each row layer, the embedding            (2 layers + 1) 2a
    all-reduce, f      backward: before attention, MLP and head          (2 layers + 1) 2a
    gains of QK-norm   backward: all-reduce of their gradients           2 (N-1)/N their bytes
    loss               all-reduce of the maximum, then of two sums       2 (N-1)/N 3 B T w
      n_correct        all-reduces of the maximum and of an index, int64 2 (N-1)/N B T (w + 8)
      no targets       instead of both: g of the logits, padded with 0   2 (N-1)/N B T V w

with w bytes in a logit; in chunks (layers/chunked_loss.py) as many bytes, in more messages. Under
autocast all activations but the embedding's travel in its dtype. A stage of a pipeline sends the
rows of this table that belong to its layers, embedding and head.

A rank's shard is cut out of its own full weights, so these must be alike on all ranks: the same
seed, or a checkpoint. On the meta device shapes are cut, and init_weights() of a layout fills them.

References: Shoeybi et al. 2019 (1909.08053), Narayanan et al. 2021 (2104.04473).

Example:
    import tempfile, torch
    import torch.distributed as dist, torch.multiprocessing as mp
    from parallel.tensor import split

    class MLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(8, 32)
            self.down = torch.nn.Linear(32, 8)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    def compare(rank, file):
        dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
        torch.manual_seed(0)  # the same full weights on both ranks
        model = torch.nn.Sequential(MLP(), MLP())
        x = torch.randn(4, 8)
        with torch.no_grad():
            expected = model(x)
        shards = split(model, dist.group.WORLD, column=("up",), row=("down",), vocabulary=())
        y = model(x)  # this rank multiplies with 16 of the 32 neurons
        y.square().sum().backward()
        assert torch.allclose(y, expected, atol=1e-5)
        assert model[0].up.weight.grad.shape == (16, 8)
        print(f"rank {rank} has of the first weight", shards["0.up.weight"])
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(compare, (f"{folder}/store",), nprocs=2, start_method="fork")
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Of experts (layers/moe.py) the Linear in them: see split_experts.
EXPERTS = {"gate": 0, "fc": 0, "proj": 1}
COLUMN = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.fc", "head")
ROW = ("attn.proj", "mlp.proj")
VOCABULARY = ("embed",)
PARTIAL = ("attn.q_norm", "attn.k_norm")


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
    """x over all ranks of the group, added up or by another `op`, in a new tensor."""
    # Never in place: autograd may have given the same gradient to somebody else too.
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, group)
    return x


# ---- the loss, where each rank has the logits of its own words -----------------------------------
class CrossEntropy(torch.autograd.Function):
    """Sum over the tokens of logsumexp(logits) - logits[target].

    Backward: softmax - one-hot of this rank's words, plus the gradient of z_loss logsumexp^2, which
    is not in the value; nothing is sent. The logits are kept and not copied in forward, while
    torch's own cross entropy keeps their logarithmic softmax.
    """

    @staticmethod
    def forward(
        ctx, logits: Tensor, targets: Tensor, group: dist.ProcessGroup, z_loss: float
    ) -> Tensor:
        """logits (BT, V/N), targets (BT,) -> 0-dim"""
        index, is_mine = local_ids(targets, logits.shape[1], group)  # (BT,) each
        # exp cannot overflow once a token's largest logit, over all ranks, is subtracted.
        top = summed(logits.amax(1), group, dist.ReduceOp.MAX)  # (BT,)
        # 1024 tokens at a time: exp of all logits at once would be a second copy of them.
        sums = []
        for some, their_top in zip(logits.split(1024), top.split(1024)):
            sums.append((some - their_top.unsqueeze(1)).exp_().sum(1))
        # Stacked, so that one all-reduce carries both sums.
        target_logit = logits.gather(1, index.unsqueeze(1)).squeeze(1) - top
        mine = torch.stack([torch.cat(sums), target_logit.masked_fill(~is_mine, 0)])
        exp_sum, target_logit = summed(mine, group)  # (BT,) each

        # The target -100 leaves a token out, as in F.cross_entropy.
        counts = targets != -100
        ctx.z_loss = z_loss
        ctx.save_for_backward(logits, top, exp_sum, index, is_mine, counts)
        return torch.where(counts, exp_sum.log() - target_logit, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        logits, top, exp_sum, index, is_mine, counts = ctx.saved_tensors
        # d loss / d logsumexp: 1, and 2 z_loss logsumexp from the penalty.
        dlog_z = dloss * counts * (1 + 2 * ctx.z_loss * (top + exp_sum.log()))
        dlogits = (logits - top.unsqueeze(1)).exp_().mul_((dlog_z / exp_sum).unsqueeze(1))
        dlogits.scatter_add_(1, index.unsqueeze(1), (-dloss * is_mine).unsqueeze(1))
        return dlogits, None, None, None


def local_ids(ids: Tensor, n_words: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(index of each id in this rank's n_words words, or 0; whether the id is one of these)."""
    ids = ids - dist.get_rank(group) * n_words
    is_mine = (ids >= 0) & (ids < n_words)
    return ids.where(is_mine, 0), is_mine


def loss_fn(
    logits: Tensor,
    targets: Tensor | None,
    count: bool,
    group: dist.ProcessGroup,
    z_loss: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(sum of the token losses, number of targets that are the likeliest token, if asked to count).

    logits: (B, T, V/N), of this rank's words; targets: (B, T), or None: then (logits of all words,
    None). z_loss: see CrossEntropy. The same on all ranks.
    """
    n_words = logits.shape[-1]
    n = group.size()
    rank = dist.get_rank(group)
    if targets is None:
        # An all-gather by way of g, whose backward is known: zero-padded rows add up to full ones.
        padded = F.pad(logits, (rank * n_words, (n - 1 - rank) * n_words))
        return SumForwardCopyBackward.apply(padded, group), None
    logits = logits.flatten(0, 1)  # (BT, V/N)
    targets = targets.flatten()  # (BT,)
    n_correct = None
    if count:
        best, index = logits.detach().max(1)
        # Where several words are equally likely, the first one wins, as in argmax.
        is_best = best == summed(best, group, dist.ReduceOp.MAX)
        index = torch.where(is_best, index + rank * n_words, n * n_words)
        n_correct = (summed(index, group, dist.ReduceOp.MIN) == targets).sum()
    return CrossEntropy.apply(logits, targets, group, z_loss or 0.0), n_correct


# ---- who gets which shard ------------------------------------------------------------------------
def split(
    model: nn.Module,
    group: dist.ProcessGroup | None,
    enter: Callable | None = None,
    leave: Callable | None = None,
    column=COLUMN,
    row=ROW,
    vocabulary=VOCABULARY,
    partial=PARTIAL,
) -> dict[str, tuple]:
    """Replaces the matrices of `model` by this rank's shards, and puts f and g around them.

    model: on the meta device or not; group: None changes nothing. column, row, vocabulary: endings
    of the names of Linear, Linear and Embedding modules; partial: of modules between the matrices
    whose parameters all ranks hold and whose gradients are summed. enter(module, x),
    leave(module, x, bias): in place of f, and of g with the bias it adds.

    Where a module holds column layers and a row layer, f goes before the module, whose first
    argument the column layers share. Any other column layer gets an f of its own. The logits stay
    split: model.loss_fn is replaced by `loss_fn` above.

    Returns name -> (full shape, where in it this rank's shard begins) of each parameter that is
    split; all others stay full. Raises ValueError where
    N does not divide heads, key heads, width or vocabulary.
    """
    if group is None:
        return {}

    def copy(module: nn.Module, x: Tensor) -> Tensor:
        return CopyForwardSumBackward.apply(x, group)

    def add_up(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return add(SumForwardCopyBackward.apply(x, group), bias)

    def enter_first(module: nn.Module, args: tuple) -> tuple:
        x, *others = args
        # Cast before f, so that its messages have autocast's dtype too.
        return enter(module, for_matmul(x)), *others

    enter = enter or copy
    leave = leave or add_up
    modules = dict(model.named_modules())

    experts = [module for module in modules.values() if hasattr(module, "experts")]
    dims = split_dims(modules, group.size(), column, row, vocabulary)
    for module in experts:
        dims |= expert_dims(module, group.size())
    tp_shards = {}
    for name, p in model.named_parameters():
        if p in dims:
            tp_shards[name], mine = shard_along(p, dims[p], group)
            # Clone: a view would keep the full weight in memory.
            p.data = mine.clone(memory_format=torch.contiguous_format)

    # One f before q, k and v together: three would send dX three times.
    parents = {name: name.rpartition(".")[0] for name in modules}
    with_rows = {parents[name] for name in modules if ends(name, row)}
    entries = set()
    for name in modules:
        if ends(name, column):
            entries.add(parents[name] if parents[name] in with_rows else name)
    for name in entries:
        modules[name].register_forward_pre_hook(enter_first)

    replace_forwards(modules, group, leave, column, row, vocabulary)
    for module in experts:
        split_experts(module, group, enter, leave)
    for name, module in modules.items():
        if ends(name, partial):
            module.forward = types.MethodType(functools.partial(summed_forward, group), module)
    # The logits stay split by words, so the loss must sum over the ranks. A pipeline's stage may
    # have no head.
    if hasattr(model, "loss_fn") and any(ends(name, ("head",)) for name in modules):
        model.loss_fn = functools.partial(loss_fn, group=group)
    return tp_shards


def split_dims(
    modules: dict[str, nn.Module], n: int, column, row, vocabulary
) -> dict[nn.Parameter, int]:
    """Parameter -> the dimension along which it is split; raises ValueError where that fails."""
    dims = {}
    for name, module in modules.items():
        if ends(name, column + vocabulary):
            dims |= dict.fromkeys(module.parameters(recurse=False), 0)
        elif ends(name, row):
            dims[module.weight] = 1
        if ends(name, column + vocabulary + row):
            check(name, module, dims[module.weight], modules[name.rpartition(".")[0]], n)
    if not dims:
        raise ValueError("split: no module's name ends as column=, row= or vocabulary= say")
    return dims


def shard_along(p: Tensor, dim: int, group: dist.ProcessGroup) -> tuple[tuple, Tensor]:
    """Where this rank's shard of p along `dim` lies, (full shape, offsets), and a view of it."""
    size = p.shape[dim] // group.size()
    offsets = [0] * p.ndim
    offsets[dim] = dist.get_rank(group) * size
    return (tuple(p.shape), tuple(offsets)), p.data.narrow(dim, offsets[dim], size)


def replace_forwards(
    modules: dict[str, nn.Module],
    group: dist.ProcessGroup,
    leave: Callable,
    column,
    row,
    vocabulary,
) -> None:
    """Row layers and the embedding end with `leave`; all split modules know their new size."""
    n = group.size()

    def row_forward(self, x: Tensor) -> Tensor:
        # Without the bias: it is full on every rank, and before the sum it would count N times.
        matmul = getattr(self, "matmul", F.linear)
        return leave(self, matmul(x, self.weight, None), self.bias)

    def vocabulary_forward(self, ids: Tensor) -> Tensor:
        index, is_mine = local_ids(ids, self.weight.shape[0], group)
        # The class's forward, for self.forward is this very function.
        x = type(self).forward(self, index).masked_fill(~is_mine.unsqueeze(-1), 0)
        return leave(self, x, None)

    for name, module in modules.items():
        if ends(name, row):
            module.in_features //= n
            module.forward = types.MethodType(row_forward, module)
        elif ends(name, column):
            module.out_features //= n
        elif ends(name, vocabulary):
            module.num_embeddings //= n
            module.forward = types.MethodType(vocabulary_forward, module)


def summed_forward(group: dist.ProcessGroup, module: nn.Module, *args) -> Tensor:
    """The module's own forward, with parameters whose gradients are summed over the ranks."""
    # During the call f is between each parameter and its use. It goes straight into _parameters,
    # because setattr takes nothing but a Parameter in a parameter's place.
    own = {name: p for name, p in module._parameters.items() if p is not None}
    for name, p in own.items():
        module._parameters[name] = CopyForwardSumBackward.apply(p, group)
    try:
        return type(module).forward(module, *args)
    finally:
        module._parameters.update(own)


# ---- experts -------------------------------------------------------------------------------------
#     rank 0 has columns of every expert's fc and rows of its proj, rank 1 the others, and both have
#     the router: both choose alike, for all tokens
#
# f comes before router and experts, g after the sum over a token's experts: one of each a layer,
# where an f and a g in each expert would send k times as much. So in between a rank has its part of
# every result, and of every gradient: the router's is summed over the ranks, and the biases of the
# second matrices count 1/N on each. The gradient that balances loads is rank 0's alone.
def expert_dims(moe: nn.Module, n: int) -> dict[nn.Parameter, int]:
    """Parameter -> the dimension along which it is split, of a layer with experts."""
    dims = {}
    for mlp in mlps(moe):
        for kind, dim in EXPERTS.items():
            linear = getattr(mlp, kind)
            if linear is None:
                continue
            width = linear.weight.shape[dim]
            if width % n:
                fits = -(-width // n) * n
                raise ValueError(
                    f"--tp={n} does not divide the width {width} of an expert; type"
                    f" --expert_width={fits}"
                )
            dims[linear.weight] = dim
            if dim == 0 and linear.bias is not None:
                dims[linear.bias] = 0
    return dims


def mlps(moe: nn.Module) -> list[nn.Module]:
    found = list(moe.experts.values())
    return found if moe.shared is None else [*found, moe.shared]


def split_experts(moe: nn.Module, group: dist.ProcessGroup, enter: Callable, leave: Callable):
    """Puts f before the layer and g behind it, and sums what all ranks hold of its parameters."""
    n = group.size()
    for mlp in mlps(moe):
        for kind, dim in EXPERTS.items():
            linear = getattr(mlp, kind)
            if linear is not None and dim == 0:
                linear.out_features //= n
            elif linear is not None:
                linear.in_features //= n
    moe.adds_terms = dist.get_rank(group) == 0
    outside = [(moe.router, "weight", 1)]
    if moe.shared is not None:
        outside.append((moe.shared.proj, "bias", n))

    def forward(self, x: Tensor) -> Tensor:
        x = enter(self, x)
        with shared_out(outside, group):
            y = type(self).forward(self, x)
        return leave(self, y, None)

    def experts_forward(self, *args) -> Tensor:
        # Here, for a layout may have gathered these weights just now.
        biases = [(expert.proj, "bias", n) for expert in self.values()]
        with shared_out(biases, group):
            return type(self).forward(self, *args)

    moe.forward = types.MethodType(forward, moe)
    moe.experts.forward = types.MethodType(experts_forward, moe.experts)


@contextlib.contextmanager
def shared_out(places: list[tuple[nn.Module, str, int]], group: dist.ProcessGroup):
    """Within it a parameter counts 1/share on each rank, and its gradient is summed over them.

    places: (module, name of its parameter, share).
    """
    own = [(module, name, module._parameters[name], share) for module, name, share in places]
    own = [place for place in own if place[2] is not None]
    try:
        for module, name, p, share in own:
            module._parameters[name] = CopyForwardSumBackward.apply(p, group) / share
        yield
    finally:
        for module, name, p, _ in own:
            module._parameters[name] = p


def ends(name: str, endings: tuple[str, ...]) -> bool:
    """Does the module's name end with one of these, in whole words between dots?"""
    return f".{name}".endswith(tuple(f".{ending}" for ending in endings))


def add(x: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return x
    return x + bias.to(x.dtype)


def for_matmul(x: Tensor) -> Tensor:
    """x in the dtype to which autocast, if it is on, would cast it for each product anyway."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def check(name: str, module: nn.Module, dim: int, parent: nn.Module, n: int) -> None:
    """Raises ValueError where n does not divide this module's weight along dim, in whole heads."""
    kind = name.rpartition(".")[2]
    count = module.weight.shape[dim]
    if kind in ("q", "k", "v"):
        # A head must not be split: its scores need all of it.
        count //= getattr(parent, "head_size", 1)
        what = f"the {count} heads of {name}"
        flag = "--n_head" if kind == "q" else "--n_kv_head"
    elif isinstance(module, nn.Embedding) or kind == "head":
        what = f"the {count} words of the vocabulary"
        flag = "--vocab_size"
    else:
        what = f"the width {count} of {name}"
        flag = "--mlp_width"
    if count % n:
        fits = -(-count // n) * n  # rounded up to a multiple
        divisor = max(d for d in range(1, n) if count % d == 0)
        raise ValueError(f"--tp={n} does not divide {what}; type {flag}={fits} or --tp={divisor}")


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
