"""Sequence parallelism: tensor parallelism whose ranks also share out the tokens between products.

Tensor parallelism splits the products, but repeats norms, dropout and the residual stream on every
rank, and keeps their activations N times. These treat each token alone. So here each rank has T/N
of the tokens between the products, and all T tokens in them:

                            rank 0                rank 1
    residual stream x       tokens [0, T/2)       tokens [T/2, T)
    norm                    of these              of these
    f: all-gather           all T tokens          all T tokens           backward: reduce-scatter
    q k v, attention, proj  its heads             its heads
    g: reduce-scatter       [0, T/2) of the sum   [T/2, T) of the sum    backward: all-gather
    bias, dropout, x +      its tokens            its tokens

The MLP works likewise. The embedding ends with g, and f comes before the head, so that each rank
has the loss of all tokens over its words. Stages of a pipeline send each other (B, T/N, C).

Bytes sent per rank and micro-batch, a = (N-1)/N x the bytes of one (B, T, C) activation, P the
parameters that see only this rank's tokens (gains and biases of norms, biases of row layers,
learned positions, n-grams):

    forward     reduce-scatter after each row layer and the embedding       (2 layers + 1) a
                all-gather before attention, MLP and head                   (2 layers + 1) a
    backward    all-gather and reduce-scatter at the same places            (2 layers + 1) 2a
    weights     all-reduce of their gradients                               2 (N-1)/N bytes of P
    loss        as in parallel/tensor.py

An all-reduce is a reduce-scatter and an all-gather: activations cost as many bytes as in plain
tensor parallelism. The gradients of P are sums over tokens, and each rank sees its own tokens: they
are summed over the ranks in every backward. (In the layer that uses the parameter, not in the
optimizer: nobody else needs to know which gradients are partial, and which, like the gradients of
the matrices, must not be summed again.)

All this is active in training alone. In eval mode (module.eval()) this is parallel/tensor.py:
no activations are kept for a backward, so there is nothing to gain, and a generated sequence is 1
token long, too short to share out.

Reference: Korthikanti et al. 2022 (2205.05198). They keep T/N tokens of a gathered input and gather
it again in backward, one all-gather more for each f. Here it is kept in full, because the products
keep it anyway.

Neighbours: parallel/tensor.py

Example:
    import tempfile, torch
    import torch.distributed as dist, torch.multiprocessing as mp
    from parallel.sequence import split

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
        model = torch.nn.Sequential(torch.nn.LayerNorm(8), MLP())
        x = torch.randn(2, 6, 8)
        with torch.no_grad():
            expected = model(x).chunk(2, 1)[rank]
        names = dict(column=("up",), row=("down",), vocabulary=(), dropouts=(), local=("0",))
        split(model, dist.group.WORLD, **names)
        y = model(x.chunk(2, 1)[rank])  # the norm sees 3 of the 6 tokens, the products all of them
        y.square().sum().backward()
        assert torch.allclose(y, expected, atol=1e-5)
        gain = model[0].weight.grad  # summed over the ranks
        print(f"rank {rank}: {tuple(y.shape)}, the norm's gradient {gain.norm():.4f}")
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(compare, (f"{folder}/store",), nprocs=2, start_method="fork")
"""

import inspect
import types

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import tensor

DROPOUTS = ("drop_embed", "drop_attn", "drop_mlp")
LOCAL = ("embed_norm", "attn_norm", "mlp_norm", "final_norm", "positions", "grams")

# torch 2.13 has new names for these two; torch 2.11 knows the old names alone.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GatherForwardScatterBackward(torch.autograd.Function):
    """f: (B, T/N, C), the tokens of each rank -> (B, T, C), all tokens on all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return scattered(dy, ctx.group), None


class ScatterForwardGatherBackward(torch.autograd.Function):
    """g: (B, T, C), each rank's summand -> (B, T/N, C), the sum at this rank's tokens."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return scattered(x, group)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return gathered(dy, ctx.group), None


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tokens of all ranks, in the order of ranks: (B, T/N, C) -> (B, T, C)."""
    # all_gather puts one rank's sequences after another's, along the first dimension.
    parts = x.new_empty(group.size() * x.shape[0], *x.shape[1:])  # (N B, T/N, C)
    all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts.chunk(group.size()), 1)


def scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens of the sum over ranks: (B, T, C) -> (B, T/N, C)."""
    # reduce_scatter deals out the first dimension: the tokens of one rank after another's.
    parts = torch.cat(x.chunk(group.size(), 1))  # (N B, T/N, C)
    mine = parts.new_empty(x.shape[0], *parts.shape[1:])
    reduce_scatter(mine, parts, group=group)
    return mine


def split(
    model: nn.Module, group: dist.ProcessGroup | None, dropouts=DROPOUTS, local=LOCAL, **endings
) -> dict[str, tuple]:
    """`split` of parallel/tensor.py, where in training the ranks share out tokens between products.

    dropouts: endings of the names of modules called with (x, context), where context.position_ids
    (..., T) has all tokens. local: endings of the names of modules that treat each token alone:
    norms, and the tables of positions and n-grams, which are called with ids (..., T) of all
    tokens. endings: `column`, `row`, `vocabulary` of tensor.split. A pipeline stage that begins
    after other layers takes x (B, T/N, C) and the position ids (T,) of all tokens.

    Returns what tensor.split returns, and raises ValueError as it does; a forward raises ValueError
    where N does not divide T.
    """
    if group is None:
        return {}
    n = group.size()
    rank = dist.get_rank(group)

    def enter(module: nn.Module, x: Tensor) -> Tensor:
        if not module.training:
            return tensor.CopyForwardSumBackward.apply(x, group)
        return GatherForwardScatterBackward.apply(x, group)

    def leave(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        if not module.training:
            return tensor.add(tensor.SumForwardCopyBackward.apply(x, group), bias)
        n_tokens = x.shape[1]
        if n_tokens % n:
            fits = -(-n_tokens // n) * n  # rounded up to a multiple
            raise ValueError(
                f"--tp={n} with --sp=true cannot share out {n_tokens} tokens equally; type "
                f"--block_size={fits} (times cp) or --sp=false"
            )
        x = ScatterForwardGatherBackward.apply(x, group)
        if bias is None:
            return x
        # The bias sees this rank's tokens alone: its gradient is summed over the ranks.
        return tensor.add(x, tensor.CopyForwardSumBackward.apply(bias, group))

    def mine(ids: Tensor) -> Tensor:
        """(..., T) -> (..., T/N), of this rank's tokens"""
        size = ids.shape[-1] // n
        return ids.narrow(-1, rank * size, size)

    def narrow_context(module: nn.Module, args: tuple) -> tuple | None:
        # A dropout mask depends on the token's position, wherever the token is computed.
        if not module.training:
            return None
        x, context = args
        return x, context._replace(position_ids=mine(context.position_ids))

    def local_forward(self, *args):
        """The module's own forward, with parameters whose gradients are summed over the ranks."""
        if not self.training:
            return type(self).forward(self, *args)
        # A norm is called with this rank's tokens already, a table with the ids of all tokens.
        if isinstance(self, nn.Embedding):
            args = (mine(args[0]),)
        return tensor.summed_forward(group, self, *args)

    tp_shards = tensor.split(model, group, enter, leave, **endings)
    for name, module in model.named_modules():
        if tensor.ends(name, dropouts):
            module.register_forward_pre_hook(narrow_context)
        elif tensor.ends(name, local):
            module.forward = types.MethodType(local_forward, module)
    return tp_shards


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
