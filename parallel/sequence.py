"""Sequence parallelism: tensor parallelism whose ranks share out the tokens too, wherever each
token is treated alone.

Tensor parallelism cuts the products, but norms, dropout and the residual stream it repeats on every
rank, and keeps their activations N times. Here each rank has T/N of the tokens between the
products, and all T in them:

                            rank 0                rank 1
    residual stream x       tokens [0, T/2)       tokens [T/2, T)
    norm                    of these              of these
    f: all-gather           all T tokens          all T tokens           backward: reduce-scatter
    q k v, core, proj       its heads             its heads
    g: reduce-scatter       [0, T/2) of the sum   [T/2, T) of the sum    backward: all-gather
    bias, dropout, x +      its tokens            its tokens

So too with the MLP. The embedding ends with g, and f stands before the head, so that each rank has
the loss of all tokens over its words. Stages of a pipeline send each other (B, T/N, C).

Bytes sent per rank and micro-batch, a = (N-1)/N x those of one (B, T, C) activation, P the
parameters that see only this rank's tokens (gains and biases of norms, biases of row layers,
learned positions, n-grams):

    forward     reduce-scatter after each row layer and the embedding       (2 layers + 1) a
                all-gather before attention, MLP and head                   (2 layers + 1) a
    backward    all-gather and reduce-scatter at the same places            (2 layers + 1) 2a
    weights     all-reduce of their gradients                               2 (N-1)/N bytes of P
    loss        as in parallel/tensor.py

An all-reduce is a reduce-scatter and an all-gather: activations cost what they do without the
sequence's cut. The gradients of P are sums over tokens, of which each rank sees its own: they are
summed over the ranks in every backward. (Each in the layer that uses it, not in the optimizer:
elsewhere nobody needs to know which gradients are partial, and which, like those of the matrices,
must not be summed again.)

All that is active in training alone. In eval mode (module.eval()) nothing is kept for a backward
that could be saved, and a generated sequence is 1 token long: then it is parallel/tensor.py.

Reference: Korthikanti et al. 2022 (2205.05198). They keep of a gathered input T/N tokens and gather
it again in backward, one all-gather more for each f; here it is kept whole, as the products keep
it.
"""

import types

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import tensor
from parallel.shard import Shard

DROPOUTS = ("drop_embed", "drop_attn", "drop_mlp")
LOCAL = ("embed_norm", "attn_norm", "mlp_norm", "final_norm", "positions", "grams")

# torch 2.13 has new names for what 2.11 knows by the old ones alone
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GatherForwardScatterBackward(torch.autograd.Function):
    """f: (B, T/N, C) -> (B, T, C)."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return scattered(dy, ctx.group), None


class ScatterForwardGatherBackward(torch.autograd.Function):
    """g: (B, T, C), to be summed over ranks -> (B, T/N, C)."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return scattered(x, group)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return gathered(dy, ctx.group), None


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tokens of all ranks, in the order of ranks: (B, T/N, C) -> (B, T, C)."""
    parts = x.new_empty(group.size() * x.shape[0], *x.shape[1:])  # one rank's rows after another's
    all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts.chunk(group.size()), 1)


def scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """My tokens of the sum over ranks: (B, T, C) -> (B, T/N, C)."""
    parts = torch.cat(x.chunk(group.size(), 1))
    mine = parts.new_empty(x.shape[0], *parts.shape[1:])
    reduce_scatter(mine, parts, group=group)
    return mine


def split(
    model: nn.Module, group: dist.ProcessGroup | None, dropouts=DROPOUTS, local=LOCAL, **endings
) -> dict[str, Shard]:
    """`split` of parallel/tensor.py, with the tokens shared out between the products while in
    training.

    dropouts: endings of the names of modules called with (x, context), context.position_ids (...,
    T) being those of all tokens; local: of modules that treat each token alone, norms and the
    tables of positions and n-grams, which are called with those of all tokens (..., T); endings:
    see there. A stage that begins after other layers takes x (B, T/N, C) and, whole, the positions
    (T,).

    Raises ValueError as there and, when called, where N does not divide T.
    """
    if group is None:
        return {}
    n, rank = group.size(), dist.get_rank(group)

    def enter(module: nn.Module, x: Tensor) -> Tensor:
        f = GatherForwardScatterBackward if module.training else tensor.CopyForwardSumBackward
        return f.apply(x, group)

    def leave(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        if not module.training:
            return tensor.add(tensor.SumForwardCopyBackward.apply(x, group), bias)
        if x.shape[1] % n:
            raise ValueError(
                f"--tp={n} with --sp=true cannot share out {x.shape[1]} tokens equally; type "
                f"--block_size={-(-x.shape[1] // n) * n} (times cp) or --sp=false"
            )
        x = ScatterForwardGatherBackward.apply(x, group)
        return (
            x if bias is None else tensor.add(x, tensor.CopyForwardSumBackward.apply(bias, group))
        )

    def mine(positions: Tensor) -> Tensor:
        size = positions.shape[-1] // n
        return positions.narrow(-1, rank * size, size)

    def narrow_context(module: nn.Module, args: tuple) -> tuple | None:
        if not module.training:
            return None
        x, context = args
        return x, context._replace(position_ids=mine(context.position_ids))

    def local_forward(self, *args):
        """The module's own forward, with parameters whose gradients are summed over the ranks."""
        if not self.training:
            return type(self).forward(self, *args)
        args = (mine(args[0]),) if isinstance(self, nn.Embedding) else args
        own = {name: p for name, p in self._parameters.items() if p is not None}
        for name, p in own.items():
            self._parameters[name] = tensor.CopyForwardSumBackward.apply(p, group)
        try:
            return type(self).forward(self, *args)
        finally:
            self._parameters.update(own)

    tp_shards = tensor.split(model, group, enter, leave, **endings)
    for name, module in model.named_modules():
        if tensor.ends(name, dropouts):
            module.register_forward_pre_hook(narrow_context)
        elif tensor.ends(name, local):
            module.forward = types.MethodType(local_forward, module)
    return tp_shards
