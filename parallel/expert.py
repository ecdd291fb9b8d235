"""Expert parallelism: data-parallel ranks share out the experts, and send each other tokens.

            rank 0                     rank 1
    experts     0 1                        2 3              whole matrices, under their own names
    tokens      a b c                      d e f            of its own samples
    rows        a b | b c | a | c          d | e f | e f | d    sorted by expert 0 | 1 | 2 | 3
                0   | 1   | 2 | 3          0 | 1   | 2   | 3
      dispatch, an all-to-all: rows go to the rank of their expert
    rows        a b | b c   d | e f        a | c   e f | d  one sender after another
    sorted      a b d | b c e f            a e f | c d      by expert: each is one product
      combine, the all-to-all back: results go home, where a token's are added up

Routers and all that is not an expert are on every rank, as in data parallelism, and so are the
counts that keep loads even. The E experts of a layer are dealt out in order, E/N to a rank. The N
ranks are neighbours in dp: with ep=2 and dp=4 ranks 0 and 1 have one copy of all experts, 2 and 3
another, and an expert's gradient is summed over the ranks that hold it alone, 0 and 2 say
(`others` of parallel/ddp.py). Tensor parallel ranks hold parts of the same experts, and each sends
its own rows to the ranks of its own part; ranks that differ in cp hold the same experts.

Bytes sent by a rank for a layer and micro-batch, n_r rows of its tokens going to rank r, and m_r
coming from there, C numbers of w bytes each:

    counts      4 E (N-1)/N             forward
    dispatch    C w Σ_{r not me} n_r    forward, and backward of combine
    combine     C w Σ_{r not me} m_r    forward, and backward of dispatch

Activation checkpointing that repeats the forward sends its three once more: F forwards for each
backward are F 4 E (N-1)/N + (F+1) C w Σ (n_r + m_r), with F = 2 for `full` and `selective`.

How many rows each rank gets is known only when routers have chosen: the host waits for these
numbers once a layer. A rank without rows takes part with none.

References: GShard (Lepikhin et al. 2020, 2006.16668), DeepSeek-V3 (2412.19437).

Neighbours: layers/moe.py, layers/recompute.py

Example:
    import tempfile, torch
    import torch.distributed as dist, torch.multiprocessing as mp
    from layers.moe import MoE
    from parallel.expert import split

    class Expert(torch.nn.Module):
        gate, activation = None, staticmethod(torch.relu)

        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(8, 16, bias=False)
            self.proj = torch.nn.Linear(16, 8, bias=False)

    def compare(rank, file):
        dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
        torch.manual_seed(0)  # the same weights on both ranks
        layer = MoE(8, [Expert() for _ in range(4)], n_active=2)
        x = torch.randn(2, 3, 5, 8)[rank]  # tokens of its own
        expected = layer(x).detach()
        sent = [0]
        split(layer, dist.group.WORLD, sent)
        y = layer(x)  # tokens go to the rank of their expert, and come back
        y.sum().backward()
        assert torch.allclose(y, expected, atol=1e-6) and len(layer.experts) == 2
        print(f"rank {rank} has experts {[*layer.experts]} and has sent {sent[0]} bytes")
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(compare, (f"{folder}/store",), nprocs=2, start_method="fork")
"""

import inspect
import types

import torch
import torch.distributed as dist
from torch import Tensor, nn

from layers.moe import sort, with_zeros


class AllToAll(torch.autograd.Function):
    """Rows (R, C), send[r] of them for rank r, in order -> receive[r] of each rank r, in order."""

    @staticmethod
    def forward(ctx, x: Tensor, send: list[int], receive: list[int], group, sent) -> Tensor:
        ctx.how = receive, send, group, sent
        return exchanged(x, send, receive, group, sent)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        return exchanged(dy, *ctx.how), None, None, None, None


def exchanged(
    x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, sent: list[int]
) -> Tensor:
    sent[0] += (len(x) - send[dist.get_rank(group)]) * x.shape[1] * x.itemsize
    y = x.new_empty(sum(receive), *x.shape[1:])
    # As bytes: gloo knows no bfloat16 here.
    received, given = (t.contiguous().view(torch.uint8) for t in (y, x))
    dist.all_to_all_single(received, given, receive, send, group=group)
    return y


def split(model: nn.Module, group: dist.ProcessGroup | None, sent: list[int]) -> None:
    """Leaves each layer of experts this rank's share of them, and has it send rows to the others.

    group: None changes nothing; sent: a list of one number, to which the bytes sent are added.
    Raises ValueError where N does not divide the experts.
    """
    if group is None:
        return
    n = group.size()
    for module in model.modules():
        if not hasattr(module, "run_experts"):
            continue
        if module.n_expert % n:
            raise ValueError(
                f"--ep={n} does not divide n_expert={module.n_expert}; type"
                f" --n_expert={-(-module.n_expert // n) * n}"
            )
        size = module.n_expert // n
        first = dist.get_rank(group) * size
        mine = {str(e) for e in range(first, first + size)}
        for name in [name for name in module.experts if name not in mine]:
            del module.experts[name]
        module.run_experts = types.MethodType(run_experts_of(group, sent), module)
        # Elsewhere rows are filled up where they arrive.
        module.sort = lambda chosen, n_expert=module.n_expert: sort(chosen, n_expert)


def run_experts_of(group: dist.ProcessGroup, sent: list[int]):
    n = group.size()

    def run_experts(moe, x: Tensor, ends: Tensor) -> Tensor:
        """Rows sorted by expert (R, C) -> (R, C), of experts anywhere."""
        mine = ends.diff(prepend=ends.new_zeros(1)).view(n, -1)  # (N, E/N): rows that I send
        theirs = torch.empty_like(mine)  # (N, E/N): rows that each rank sends me
        dist.all_to_all_single(theirs, mine, group=group)
        send, receive = torch.stack([mine.sum(1), theirs.sum(1)]).tolist()
        sent[0] += mine.nbytes * (n - 1) // n

        x = AllToAll.apply(x, send, receive, group, sent)
        # One sender after another: the expert of each row, among those here.
        experts = torch.arange(mine.shape[1], device=x.device).repeat(n)
        # With its length known, the host need not wait once more.
        chosen = experts.repeat_interleave(theirs.flatten(), output_size=sum(receive)).unsqueeze(1)
        order = sort(chosen, mine.shape[1], *moe.experts.block(chosen))
        h = moe.experts(with_zeros(x, order).index_select(0, order.rows), order.ends)
        h = h.index_select(0, order.slots.flatten())
        return AllToAll.apply(h, receive, send, group, sent)

    return run_experts


def names_of(model: nn.Module) -> list[str]:
    """The parameters of experts, by their full names."""
    return [name for name, _ in model.named_parameters() if ".experts." in name]


def layers_of(model: nn.Module) -> list[str]:
    """The Linear layers of experts, by their full names."""
    return [name.rpartition(".")[0] for name in names_of(model)]


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
