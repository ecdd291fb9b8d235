"""Several ranks in a fraction of a second: forked processes on gloo, with torch already imported.

    results = run_ranks(4, fn, *args)      # fn(rank, world, *args) in each of 4 processes; what
                                           they return

Spawning would import torch anew in each process (18 s for 8 ranks against 0.2 s). Where fork is
missing (Windows) the tests skip and say so. Each rank has one thread; a collective that waits 20 s
is a deadlock and fails the test.
"""

import gc
import multiprocessing
import pickle
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model import initial_weight
from optim.param_groups import kinds
from parallel.shard import Shard
from parallel.zero import ZeRO
from run.build import stepped_by_rows


def product_files() -> list[Path]:
    """The project's Python files but its tests; never those of an environment inside the folder."""
    root = Path(__file__).parent.parent
    packages = sorted(path.parent for path in root.glob("*/__init__.py"))
    inside = [path for folder in packages for path in sorted(folder.rglob("*.py"))]
    return [*sorted(root.glob("*.py")), *inside]


def fitted(replicas, cls, model):
    """The layout; a ZeRO cuts by rows what `cls` steps element by element, and nothing else."""
    if isinstance(replicas, ZeRO):
        replicas.by_rows = stepped_by_rows(cls, kinds(model))
    return replicas


def placed(replicas, by_name):
    """Name -> (copy of a tensor that belongs to a piece, the full shape, the piece's offsets)."""
    found = {}
    for name, x in by_name.items():
        full, offsets = replicas.shards.get(name, (tuple(x.shape), (0,) * x.ndim))
        found[name] = x.detach().clone(), full, offsets
    return found


def weights_here(replicas):
    """Name -> (this rank's weights, the full shape, where they begin); FSDP's are gathered."""
    found = {}
    for name, w in replicas.weights().items():
        w = w.full_tensor() if hasattr(w, "placements") else w
        whole = tuple(w.shape), (0,) * w.ndim
        found[name] = w.detach().clone(), *replicas.weight_shards.get(name, whole)
    return found


def same_here(found, expected):
    """Are this rank's weights, as weights_here() gives them, those parts of the full tensors?"""
    return all(
        torch.equal(x, Shard(*where).narrow(expected[name].detach(), x.shape))
        for name, (x, *where) in found.items()
    )


def joined(ranks):
    """The full tensors of all ranks' pieces, as `placed` gives them: each number on one rank."""
    tensors, owners = {}, {}
    for held in ranks:
        for name, (x, full, offsets) in held.items():
            place = tuple(slice(a, a + n) for a, n in zip(offsets, x.shape, strict=True))
            tensors.setdefault(name, x.new_full(full, torch.nan))[place] = x
            owners.setdefault(name, torch.zeros(full))[place] += 1
    assert all((count == 1).all() for count in owners.values())  # nothing twice, nothing missing
    return tensors


def gpu(*values):
    """One of the cases of a parametrize, which also runs on a GPU; its test takes `device`."""
    return pytest.param(*values, marks=pytest.mark.gpu)


def device_flags(device: torch.device) -> list[str]:
    """Flags for train.py: on this device, and not compiled, which would take longest."""
    return [f"--device={device}", "--compile=off"]


def run_ranks(world: int, fn, *args) -> list:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("several ranks in one test need fork, which this system lacks")
    if torch.cuda.is_initialized():
        pytest.skip("a forked rank cannot use CUDA, which this process has: leave --device out")
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(one_rank, (world, folder, fn, args), nprocs=world, start_method="fork")
        return [pickle.loads(Path(folder, f"result_{r}").read_bytes()) for r in range(world)]


def one_rank(rank: int, world: int, folder: str, fn, args: tuple) -> None:
    # What the parent left for its collector stays: a process group of an earlier test would wait,
    # as it goes, for threads that a fork does not copy.
    gc.freeze()
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=20)
    )
    result = fn(rank, world, *args)
    Path(folder, f"result_{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()  # only after success: a failed rank must not make the others wait
    dist.destroy_process_group()


@torch.no_grad()
def init_weights(model):
    """Every parameter of this GPT, or part of one, set to its initial weight, in its own dtype."""
    for name, p in model.named_parameters():
        p.copy_(initial_weight(model.config, name, tuple(p.shape)))
    return model
