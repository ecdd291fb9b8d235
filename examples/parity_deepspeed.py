"""DeepSpeed's ZeRO 1, 2 and 3 on a CPU, recorded, and compared with one process in plain torch.

It needs DeepSpeed (0.19.8 was tried; `pip install --no-deps deepspeed einops hjson msgpack ninja
psutil py-cpuinfo pydantic` will do without CUDA). Type at the root:

    python -m examples.parity_deepspeed [1 2 3]

Two forked processes on gloo, three steps in float32, AdamW.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from examples.parity_torch import BATCH, batches, loss_fn, make, train
from parity.compare import Comparison
from parity.diagnose import diagnose, report
from parity.record import record
from parity.recording import Recording


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)


def config(stage: int, world: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": BATCH // world,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def one_rank(rank: int, world: int, stage: int, folder: str) -> None:
    """Trains through DeepSpeed's engine; gradients and weights are asked of it, whole."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store_{stage}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    model = make().float()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer_of(model),
        config=config(stage, world),
        dist_init_required=False,
    )
    named = dict(engine.module.named_parameters())

    def weights():
        return {name: safe_get_full_fp32_param(p) for name, p in named.items()}

    recorder = record(
        engine.module,
        Path(folder, f"zero{stage}"),
        rank=rank,
        axes={"dp": (world, rank)},
        backward_scale=1 / world,
    )
    recorder.begin(weights())
    n = BATCH // world
    rows = slice(rank * n, rank * n + n)
    for ids, targets in batches():
        recorder.batch(range(rows.start, rows.stop), of=BATCH)
        engine.backward(loss_fn(engine(ids[rows]), targets[rows]))
        recorder.gradients({name: safe_get_full_grad(p) for name, p in named.items()})
        engine.step()
        recorder.end_step(weights())
    recorder.close()
    dist.barrier()


def compared(stages: list[int], folder: str) -> dict[int, str]:
    """Stage -> what parity says of it."""
    model = make().float()
    optimizer = optimizer_of(model)
    train(model, record(model, Path(folder, "alone"), optimizer), optimizer)
    said = {}
    for stage in stages:
        mp.start_processes(one_rank, (2, stage, folder), nprocs=2, start_method="fork")
        comparison = Comparison(
            Recording(Path(folder, "alone")), Recording(Path(folder, f"zero{stage}"))
        )
        first = comparison.first()
        if first is None:
            said[stage] = f"all {len(comparison.order)} tensors agree"
        else:
            said[stage] = report(comparison, first, diagnose(comparison, first))
    return said


def main(stages: list[int]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        for stage, said in compared(stages or [1, 2, 3], folder).items():
            print(f"ZeRO {stage}: {said}")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
