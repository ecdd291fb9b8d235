"""Muon's orthogonalisation on two ranks: all matrices on every rank, against each at its owner.

    python bench.py spread [--quick]

Milliseconds on two ranks of one thread each, as replicas do it (ddp) and as zero1 does, turn by
turn, and of the whole step with its broadcasts: medians over the turns after the first, of the
slower rank, and of their ratio with its smallest and largest value.
"""

import functools
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

import torch

from benchmarks import runs
from benchmarks.optimizers import shapes


def two_ranks(rank: int, store: str, quick: bool) -> None:
    """One of the two ranks of `spread`."""
    import torch.distributed as dist

    from optim import muon
    from parallel.ddp import DDP
    from parallel.zero import ZeRO

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(store).as_uri(), rank=rank, world_size=2)
    products, steps, plain = {"ddp": [], "zero1": []}, {"ddp": [], "zero1": []}, muon.orthogonalize
    optimizers = {}
    for name, replicas in ("ddp", DDP), ("zero1", functools.partial(ZeRO, stage=1)):
        model = torch.nn.Module()
        model.blocks = torch.nn.ModuleDict({"0": torch.nn.Module()})
        for i, shape in enumerate(shapes("hidden", quick)):
            setattr(
                model.blocks["0"], f"w{i}", torch.nn.Parameter(torch.empty(shape, device="meta"))
            )
        replicas = replicas(dist.group.WORLD, torch.device("cpu"))
        names, params = map(list, zip(*replicas.parallelize(model).named_parameters()))
        replicas.init_weights(lambda name, shape: torch.randn(shape).mul_(0.02))
        groups = [dict(kind="matrix", names=names, params=params)]
        optimizers[name] = replicas.make_optimizer(muon.Muon, groups)
    for turn in range(4 if quick else 12):
        for name, optimizer in optimizers.items():
            spent = [0.0]

            def timed(*args, spent=spent):
                start = time.perf_counter()
                result = plain(*args)
                spent[0] += 1000 * (time.perf_counter() - start)
                return result

            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(turn))
            with mock.patch.object(muon, "orthogonalize", timed):
                dist.barrier()
                start = time.perf_counter()
                optimizer.step()
                dist.barrier()
            steps[name].append(1000 * (time.perf_counter() - start))
            slower = torch.tensor(spent)
            dist.all_reduce(slower, op=dist.ReduceOp.MAX)
            products[name].append(slower.item())
    if rank == 0:
        for what, ms in ("orthogonalisation", products), ("whole step", steps):
            ratios = [b / a for a, b in list(zip(ms["ddp"], ms["zero1"]))[1:]]
            print(
                f"{what}: on every rank {median(ms['ddp'][1:]):.0f} ms, at owners "
                f"{median(ms['zero1'][1:]):.0f} ms, ratio {median(ratios):.2f} "
                f"({min(ratios):.2f}..{max(ratios):.2f})"
            )
    dist.barrier()
    dist.destroy_process_group()


def main(argv: list[str]) -> int:
    quick = "--quick" in runs.flags(argv, {"--quick": ""}, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(two_ranks, (f"{folder}/store", quick), nprocs=2)
    return 0
