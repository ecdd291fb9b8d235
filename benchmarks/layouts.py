"""Each layout of parallel/ beside torch's own: CPU seconds, wall seconds, peak memory of a step.

    python bench.py layouts [--quick] [--only=ddp,zero3] [--ranks=2|4] [--size=small|wide]
        [--turns=5] [--profile] [--out=FILE.md]

Both sides train one GPT (model.py) from the same weights on the same tokens in float32 with fused
AdamW, on forked gloo ranks of one thread each. They take turns; a turn is a fresh set of processes,
two steps that warm up and some that are timed. A row whose losses are apart by more than rounding
is no comparison, and says so instead of its ratios. A row, ours / theirs, below 1 where ours is
better; medians over turns, smallest and largest ratio in brackets:

    CPU      seconds a step of all threads of all ranks together
    wall     seconds a step; where ranks share cores, the scheduler's moods are in it
    tensors  the most bytes of living tensors on a rank, in the step (memory/meter.py)
    RSS      the most resident bytes of a rank beyond what it had before the model: gloo's and C++'s
             own buffers are in it, and what the allocator keeps
    losses   the largest relative difference of a step's mean loss

--size: the default job's size, and one wide enough that weights and messages outweigh activations.
--only: rows by name. --profile: what takes the time, on rank 0, in place of the table. --quick: a
tiny model, one turn: figures that say only that everything works. Peers that are not installed, or
that a CPU cannot run, are named with the reason.
"""

import dataclasses
import importlib
import json
import logging
import math
import multiprocessing
import re
import statistics
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

FLAGS = {
    "--quick": "",
    "--only": r"[\w+.,-]+",
    "--ranks": "[24]",
    "--size": "small|wide",
    "--turns": "[1-9][0-9]?",
    "--profile": "",
    "--out": ".+",
}
SIZES = {
    "small": Job(4, 256, 4, 256, 256, sequences=4),
    "wide": Job(2, 768, 8, 128, 2048, sequences=4),
}
QUICK = Job(2, 32, 2, 16, 64, sequences=2)
WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison. ours, theirs: "function" of layouts_ours.py and layouts_peers.py, or
    "module:function" of any other file of this folder: Job -> step(i) -> part of the loss."""

    peer: str  # what theirs is called
    ours: str
    theirs: str
    change: dict = dataclasses.field(default_factory=dict)  # fields of the job
    # Of the losses, relatively: float32 sums in another order.
    tolerance: float = 1e-4
    stages: int = 0  # of a pipeline, for each rank: as many layers as stages at least
    # Modules that theirs imports, in the parent: a fork then has them at once.
    imports: tuple[str, ...] = ()


SHARDED = ("torch.distributed.fsdp", "torch.distributed.tensor")
PARALLEL = ("torch.distributed.tensor.parallel",)
STAGED = ("torch.distributed.pipelining",)
ROWS = {
    "ddp": Row("DistributedDataParallel", "ddp", "ddp"),
    "ddp-accumulated": Row(
        "DistributedDataParallel, no_sync", "ddp", "ddp", dict(sequences=1, micro_batches=4)
    ),
    "zero1": Row("ZeroRedundancyOptimizer", "zero1", "zero_redundancy"),
    "zero2": Row(
        "fully_shard, reshard_after_forward=False", "zero2", "shard_grad_op", imports=SHARDED
    ),
    "zero3": Row("fully_shard", "zero3", "fully_sharded", imports=SHARDED),
    "fsdp": Row("fully_shard", "fsdp", "fully_sharded", imports=SHARDED),
    "tp": Row("parallelize_module", "tp", "parallelized", imports=PARALLEL),
    "tp+sp": Row("parallelize_module", "tp_sp", "parallelized_sequence", imports=PARALLEL),
    "tp+sp-gains": Row(
        "parallelize_module, SequenceParallel",
        "tp_sp",
        "parallelized_sequence",
        dict(norm="rmsnorm_gain"),
        imports=PARALLEL,
    ),
    "cp": Row("context_parallel", "cp", "context_parallel", imports=PARALLEL),
    "gpipe": Row("ScheduleGPipe", "gpipe", "gpipe", stages=1, imports=STAGED),
    "1f1b": Row("Schedule1F1B", "one_f_one_b", "one_f_one_b", stages=1, imports=STAGED),
    "interleaved": Row(
        "ScheduleInterleaved1F1B", "interleaved", "interleaved", stages=2, imports=STAGED
    ),
    "zerobubble": Row(
        "ScheduleInterleavedZeroBubble",
        "zerobubble",
        "interleaved_zero_bubble",
        stages=2,
        imports=STAGED,
    ),
    "zerobubble-zbv": Row("ScheduleZBVZeroBubble", "zerobubble", "zbv", stages=2, imports=STAGED),
    "fp16": Row("fp16_compress_hook", "compress_fp16", "fp16_hook", tolerance=1e-3),
    "bf16": Row("bf16_compress_hook", "compress_bf16", "bf16_hook", tolerance=1e-2),
    # Each has a first Q of its own, and theirs begins two steps later.
    "powersgd": Row("powerSGD_hook", "compress_powersgd", "powersgd_hook", tolerance=5e-2),
    "zero1-deepspeed": Row("DeepSpeed ZeRO 1", "zero1", "deepspeed1", imports=("deepspeed",)),
    "zero2-deepspeed": Row("DeepSpeed ZeRO 2", "zero2", "deepspeed2", imports=("deepspeed",)),
    "zero3-deepspeed": Row("DeepSpeed ZeRO 3", "zero3", "deepspeed3", imports=("deepspeed",)),
}


# ---- one side, one turn --------------------------------------------------------------------------
def resident(key: str) -> float:
    """Bytes by the kernel: VmRSS now, VmHWM the most so far. NaN where there is no /proc."""
    path = Path("/proc/self/status")
    text = path.read_text() if path.exists() else ""
    found = re.search(rf"{key}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else math.nan


def on_rank(rank: int, world: int, side: str, job: Job, steps: int, what: str, file: str) -> None:
    """Trains; rank 0 writes the figures. what: "time", "memory" or "profile"."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{file}.store", world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    module, _, function = side.rpartition(":")
    make = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    before = resident("VmRSS")
    step = make(dataclasses.replace(job, world=world, rank=rank))
    losses = [step(i) for i in range(WARM_UP)]

    if what == "memory":
        with Meter() as meter:
            # The first step shows the meter all that lives between steps.
            step(WARM_UP)
            meter.reset()
            step(WARM_UP + 1)
        figures = [0.0, 0.0, float(meter.peak), 0.0]
    elif what == "profile":
        figures = [0.0] * 4
        text = profiled(step, steps)
        if rank == 0:
            Path(f"{file}.profile").write_text(text, encoding="utf-8")
    else:
        dist.barrier()
        cpu = time.process_time()
        wall = time.perf_counter()
        for i in range(WARM_UP, WARM_UP + steps):
            losses.append(step(i))
        cpu = time.process_time() - cpu
        dist.barrier()
        wall = time.perf_counter() - wall
        figures = [cpu / steps, wall / steps, 0.0, resident("VmHWM") - before]

    figures = torch.tensor(figures, dtype=torch.float64)
    of_ranks = [torch.empty_like(figures) for _ in range(world)]
    dist.all_gather(of_ranks, figures)
    losses = torch.stack([torch.as_tensor(loss, dtype=torch.float64) for loss in losses])
    dist.all_reduce(losses)
    if rank == 0:
        cpu, wall, tensors, rss = torch.stack(of_ranks).T
        found = dict(
            cpu=cpu.sum().item(),
            wall=wall.max().item(),
            tensors=tensors.max().item(),
            rss=rss.max().item(),
            losses=losses.tolist(),
        )
        Path(file).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def profiled(step, steps: int) -> str:
    """The operators that take most of this rank's CPU time, and what is outside of all of them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    began = time.process_time()
    with torch.profiler.profile(activities=activities) as profiler:
        for i in range(steps):
            step(WARM_UP + i)
        spent = time.process_time() - began
    operators = sorted(profiler.key_averages(), key=lambda x: -x.self_cpu_time_total)
    inside = sum(x.self_cpu_time_total for x in operators) / 1e6
    lines = [
        f"{1000 * spent / steps:9.2f} ms a step, {1000 * (spent - inside) / steps:.2f} outside"
    ]
    for x in operators[:15]:
        lines.append(f"{x.self_cpu_time_total / 1e3 / steps:9.2f} {x.count / steps:7.1f} x {x.key}")
    return "\n".join(lines)


def measure(side: str, job: Job, world: int, steps: int, what: str = "time") -> dict:
    """One side's figures from fresh processes. Raises RuntimeError with the line that says why."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/found"
        arguments = world, side, job, steps, what, file
        try:
            mp.start_processes(on_rank, arguments, nprocs=world, start_method=method)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise RuntimeError(runs.reason(str(error))) from None
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        if what == "profile":
            found["profile"] = Path(f"{file}.profile").read_text(encoding="utf-8")
        return found


# ---- one row -------------------------------------------------------------------------------------
def job_of(row: Row, job: Job, world: int) -> Job:
    if row.stages:
        # Two micro-batches for each stage in flight, of half a batch each.
        layers = max(job.n_layer, row.stages * world)
        half = max(1, job.sequences // 2)
        job = dataclasses.replace(job, n_layer=layers, sequences=half, micro_batches=2 * world)
    return dataclasses.replace(job, **row.change)


def sides(row: Row) -> tuple[str, str]:
    ours = row.ours if ":" in row.ours else f"layouts_ours:{row.ours}"
    theirs = row.theirs if ":" in row.theirs else f"layouts_peers:{row.theirs}"
    return ours, theirs


def apart(a: list[float], b: list[float]) -> float:
    """The largest relative difference of the losses of the same steps."""
    gaps = [abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


def compared(row: Row, job: Job, world: int, turns: int, steps: int) -> list[str]:
    """The cells after the row's name. Raises RuntimeError where a side cannot run."""
    ours, theirs = sides(row)
    for name in row.imports:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise RuntimeError(f"not installed: {error}") from None
    found = {ours: [], theirs: []}
    for turn in range(turns):
        # Who begins changes too.
        for side in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
            found[side].append(measure(side, job, world, steps))
    a, b = found[ours], found[theirs]
    gap = max(apart(x["losses"], y["losses"]) for x, y in zip(a, b))
    if not gap <= row.tolerance:
        raise RuntimeError(
            f"losses differ by {gap:.1g}, more than {row.tolerance:g}: another computation"
        )

    cells = []
    for key, scale, form in (("cpu", 1000, ".1f"), ("wall", 1000, ".1f")):
        x, y = (scale * statistics.median(one[key] for one in side) for side in (a, b))
        cells += [f"{x:{form}}", f"{y:{form}}", ratio(a, b, key)]
    peaks = [measure(side, job, world, 1, "memory")["tensors"] / 1e6 for side in (ours, theirs)]
    cells += [f"{x:.1f}" for x in peaks] + [f"**{peaks[0] / peaks[1]:.2f}**"]
    cells += [ratio(a, b, "rss").replace("*", ""), f"{gap:.0e}"]
    return cells


def ratio(a: list[dict], b: list[dict], key: str) -> str:
    """Turn by turn: the median in bold, smallest and largest."""
    values = [x[key] / y[key] for x, y in zip(a, b)]
    return "**{}** {}".format(*runs.spread(values).split(" "))


HEAD = [
    "ours", "theirs", "CPU ms, ours", "theirs", "ratio", "wall ms, ours", "theirs", "ratio",
    "tensors MB, ours", "theirs", "ratio", "RSS ratio", "losses apart",
]  # fmt: skip


def described(job: Job) -> str:
    return (
        f"{job.n_layer} layers x {job.n_embd}, {job.block_size} tokens, {job.vocab_size} words, "
        f"{job.sequences} sequences a rank"
    )


def tables(names: list[str], size: str, job: Job, world: int, turns: int, steps: int) -> list[str]:
    """Lines of the page: one table, and what could not be compared."""
    lines = []
    left_out = []
    for name in names:
        row = ROWS[name]
        began = time.perf_counter()
        try:
            cells = compared(row, job_of(row, job, world), world, turns, steps)
            lines.append([name, row.peer, *cells])
        except RuntimeError as error:
            left_out.append(f"- {name} beside {row.peer}: no ratio, {error}")
        seconds = time.perf_counter() - began
        runs.tell(f"{size}, {world} ranks, {name}: {seconds:.0f} s")
    title = f"{size}, {world} ranks: {described(job)}; {turns} turns of {steps} steps"
    return [title, "", *runs.table(HEAD, lines), "", *left_out, ""]


def profiles(names: list[str], job: Job, world: int) -> list[str]:
    lines = []
    for name in names:
        row = ROWS[name]
        for side in sides(row):
            lines += [f"{name}, {side.partition(':')[2]} of {side.partition(':')[0]}:", "```"]
            lines += [measure(side, job_of(row, job, world), world, 5, "profile")["profile"], "```"]
    return lines


def main(argv: list[str]) -> int:
    """What `python bench.py layouts ...` does with the words after `layouts`."""
    given = runs.flags(argv, FLAGS, __doc__)
    names = given.get("--only", ",".join(ROWS)).split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise ValueError(f"--only={unknown[0]} is no row; there are {', '.join(ROWS)}")
    quick = "--quick" in given
    turns = int(given.get("--turns", 1 if quick else 5))
    steps = 1 if quick else 5
    sizes = {"quick": QUICK} if quick else SIZES
    if "--size" in given:
        sizes = {given["--size"]: SIZES[given["--size"]]}
    rank_counts = [2] if quick else [2, 4]
    if "--ranks" in given:
        rank_counts = [int(given["--ranks"])]

    # Before the forks: a child of a process with many threads may wait for one that it lacks.
    torch.set_num_threads(1)
    page = [runs.header(["layouts", *argv]), ""]
    for world in rank_counts:
        for size, job in sizes.items():
            if "--profile" in given:
                page += profiles(names, job, world)
            else:
                page += tables(names, size, job, world, turns, steps)
    runs.show(page, given.get("--out"))
    return 0
