"""What `bench.py layouts` does on the ranks of a row: times both sides, meters or profiles them.

Ranks are forked (spawned where a system cannot fork), on gloo, with one thread each. A side is
"module:function" of a file in this folder: the function takes a rank's job (layouts_job.py) and
returns step(i), whose values, added over the ranks, are the mean loss of a token.
"""

import dataclasses
import importlib
import json
import logging
import math
import multiprocessing
import re
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import runs
from benchmarks.layouts_job import Job
from memory.meter import Meter

WARM_UP = 2  # steps: torch's DDP makes its buckets anew after the first


def resident(key: str) -> float:
    """Bytes by the kernel: VmRSS now, VmHWM the most so far. NaN where there is no /proc."""
    path = Path("/proc/self/status")
    text = path.read_text() if path.exists() else ""
    found = re.search(rf"{key}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else math.nan


def made(side: str, job: Job):
    """The step of "module:function" on this rank."""
    module, _, function = side.partition(":")
    return getattr(importlib.import_module(f"benchmarks.{module}"), function)(job)


def timed(sides: list[str], job: Job, turns: int, steps: int) -> dict:
    """The sides take turns: CPU seconds of a step over all ranks, wall seconds, mean losses."""
    ways = [made(side, job) for side in sides]
    losses = [[way(i) for i in range(WARM_UP)] for way in ways]
    seconds = torch.zeros(len(sides), turns, dtype=torch.float64)
    wall = [[] for _ in sides]
    for turn in range(turns):
        # Who begins changes too.
        order = list(range(len(sides)))
        for k in order if turn % 2 == 0 else reversed(order):
            dist.barrier()
            began = time.perf_counter()
            cpu = time.process_time()
            for i in range(steps):
                losses[k].append(ways[k](WARM_UP + turn * steps + i))
            seconds[k, turn] = (time.process_time() - cpu) / steps
            dist.barrier()
            wall[k].append((time.perf_counter() - began) / steps)
    dist.all_reduce(seconds)
    losses = torch.tensor([[float(x) for x in side] for side in losses], dtype=torch.float64)
    dist.all_reduce(losses)
    return dict(cpu=seconds.tolist(), wall=wall, losses=losses.tolist())


def metered(sides: list[str], job: Job, turns: int, steps: int) -> dict:
    """Peak bytes of the fullest rank: resident beyond what was before, and of living tensors."""
    (side,) = sides
    before = resident("VmRSS")
    step = made(side, job)
    for i in range(WARM_UP + 1):
        step(i)
    rss = resident("VmHWM") - before
    with Meter() as meter:
        # The first step shows the meter all that lives between steps.
        step(WARM_UP + 1)
        meter.reset()
        step(WARM_UP + 2)
    peaks = torch.tensor([meter.peak, rss], dtype=torch.float64)
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    return dict(zip(("tensors", "rss"), peaks.tolist()))


def profiled(sides: list[str], job: Job, turns: int, steps: int) -> dict:
    """The operators that take most of rank 0's time, each without those inside of it."""
    found = {}
    for side in sides:
        step = made(side, job)
        for i in range(WARM_UP):
            step(i)
        cpu = time.process_time()
        wall = time.perf_counter()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for i in range(steps):
                step(WARM_UP + i)
            cpu = 1000 * (time.process_time() - cpu) / steps
            wall = 1000 * (time.perf_counter() - wall) / steps
        lines = [f"{wall:9.2f} ms a step, {cpu:.2f} of CPU; in operators, waiting included:"]
        operators = sorted(profiler.key_averages(), key=lambda x: -x.self_cpu_time_total)
        for x in operators[:15]:
            ms = x.self_cpu_time_total / 1000 / steps
            lines.append(f"{ms:9.2f} {x.count / steps:7.1f} x {x.key}")
        found[side] = lines
    return found


def on_rank(rank: int, world: int, work, sides, job: Job, turns: int, steps: int, file: str):
    """work: one of the three above; rank 0 writes what it returns."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{file}.store", world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    found = work(sides, dataclasses.replace(job, world=world, rank=rank), turns, steps)
    if rank == 0:
        Path(file).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(work, sides: list[str], job: Job, world: int, turns: int = 1, steps: int = 1) -> dict:
    """Its figures from fresh processes. Raises RuntimeError with the line that says why not."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/found"
        arguments = world, work, sides, job, turns, steps, file
        try:
            mp.start_processes(on_rank, arguments, nprocs=world, start_method=method)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise RuntimeError(runs.reason(str(error))) from None
        return json.loads(Path(file).read_text(encoding="utf-8"))
