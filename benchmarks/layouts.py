"""Each layout of parallel/ beside torch's own: CPU seconds, wall seconds, peak memory of a step.

    python bench.py layouts [--quick] [--only=ddp,zero3] [--ranks=2|4] [--size=small|wide]
        [--turns=7] [--profile] [--out=FILE.md]

Both sides train one GPT (model.py) from the same weights on the same tokens in float32 with fused
AdamW, on forked gloo ranks of one thread each. They take turns of two steps in the same processes,
after two that warm up; memory is measured in processes of their own. A row whose losses are apart
by more than rounding is no comparison, and says so in place of its ratios. These are ours / theirs,
below 1 where ours is better; medians over turns, smallest and largest ratio in brackets:

    CPU      seconds a step of all threads of all ranks together
    wall     seconds a step; where ranks share cores, the scheduler's moods are in it
    tensors  the most bytes of living tensors on a rank, in the step (memory/meter.py)
    RSS      the most resident bytes of a rank beyond what it had before the model: gloo's and C++'s
             own buffers are in it, and what the allocator keeps
    losses   the largest relative difference of a step's mean loss

--size: the default job's model, and one wide enough that weights and messages outweigh activations.
Replicas have the sequences that a table names each; the ranks of tp and cp share as many; a
pipeline has 2 micro-batches of half as many for each rank, and at least as many layers as stages.
zerobubble is ZB-H1, one stage a rank; torch has it with two alone.
--only: rows by name. --profile: what takes the time, on rank 0, in place of the table. --quick: a
tiny model, one turn: figures that say only that everything works. Peers that are not installed, or
that a CPU cannot run, are named with the reason; exit status 1 where anything else has failed.
"""

import dataclasses
import importlib
import math
import statistics
import time

import torch

from benchmarks import runs
from benchmarks.layouts_job import Job
from benchmarks.layouts_ranks import measure, metered, profiled, timed

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
    "small": Job(4, 256, 4, 128, 256, sequences=4),
    "wide": Job(2, 768, 8, 128, 2048, sequences=2),
}
QUICK = Job(2, 32, 2, 16, 64, sequences=2)


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
    imports: tuple[str, ...] = ()  # modules of theirs
    refusal: str = ""  # words with which theirs refuses a CPU


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
    "tp": Row("parallelize_module", "tp", "layouts_peers_split:parallelized", imports=PARALLEL),
    "tp+sp": Row(
        "parallelize_module", "tp_sp", "layouts_peers_split:parallelized_sequence", imports=PARALLEL
    ),
    "tp+sp-gains": Row(
        "parallelize_module, SequenceParallel",
        "tp_sp",
        "layouts_peers_split:parallelized_sequence",
        dict(norm="rmsnorm_gain"),
        imports=PARALLEL,
    ),
    "cp": Row(
        "context_parallel",
        "cp",
        "layouts_peers_split:context_parallel",
        imports=PARALLEL,
        refusal="does not have a sharding strategy",
    ),
    "gpipe": Row("ScheduleGPipe", "gpipe", "layouts_peers_split:gpipe", stages=1, imports=STAGED),
    "1f1b": Row(
        "Schedule1F1B", "one_f_one_b", "layouts_peers_split:one_f_one_b", stages=1, imports=STAGED
    ),
    "interleaved": Row(
        "ScheduleInterleaved1F1B",
        "interleaved",
        "layouts_peers_split:interleaved",
        stages=2,
        imports=STAGED,
    ),
    "zerobubble": Row(
        "ScheduleInterleavedZeroBubble",
        "zerobubble",
        "layouts_peers_split:interleaved_zero_bubble",
        stages=2,
        imports=STAGED,
    ),
    "zerobubble-zbv": Row(
        "ScheduleZBVZeroBubble", "zerobubble", "layouts_peers_split:zbv", stages=2, imports=STAGED
    ),
    "fp16": Row("fp16_compress_hook", "compress_fp16", "fp16_hook", tolerance=1e-3),
    "bf16": Row(
        "bf16_compress_hook",
        "compress_bf16",
        "bf16_hook",
        tolerance=1e-2,
        refusal="BF16 all reduce communication hook required",
    ),
    # From one Q; the method makes more of a rounding.
    "powersgd": Row("powerSGD_hook", "compress_powersgd", "powersgd_hook", tolerance=1e-2),
    "zero1-deepspeed": Row("DeepSpeed ZeRO 1", "zero1", "deepspeed1", imports=("deepspeed",)),
    "zero2-deepspeed": Row("DeepSpeed ZeRO 2", "zero2", "deepspeed2", imports=("deepspeed",)),
    "zero3-deepspeed": Row("DeepSpeed ZeRO 3", "zero3", "deepspeed3", imports=("deepspeed",)),
}


# ---- one row -------------------------------------------------------------------------------------
def job_of(row: Row, job: Job, world: int) -> Job:
    if row.stages:
        # Two micro-batches for each stage in flight, of half a batch each.
        layers = max(job.n_layer, row.stages * world)
        half = max(1, job.sequences // 2)
        job = dataclasses.replace(job, n_layer=layers, sequences=half, micro_batches=2 * world)
    return dataclasses.replace(job, **row.change)


class LeftOut(Exception):
    """A peer that is not installed, or cannot run here: no fault of this project's."""


def sides_of(row: Row) -> list[str]:
    ours = row.ours if ":" in row.ours else f"layouts_ours:{row.ours}"
    theirs = row.theirs if ":" in row.theirs else f"layouts_peers:{row.theirs}"
    # In the parent: a rank that imports by itself would count that as memory.
    for side in ours, theirs:
        importlib.import_module(f"benchmarks.{side.partition(':')[0]}")
    for name in row.imports:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise LeftOut(f"not installed: {error}") from None
    return [ours, theirs]


def apart(a: list[float], b: list[float]) -> float:
    """The largest relative difference of the losses of the same steps; infinite for NaN."""
    gaps = [abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)]
    return math.inf if any(map(math.isnan, gaps)) else max(gaps)


def compared(row: Row, job: Job, world: int, turns: int, steps: int) -> list[str]:
    """The cells after the row's name.

    Raises LeftOut where the peer cannot run here, RuntimeError where anything else has failed.
    """
    sides = sides_of(row)
    try:
        found = measure(timed, sides, job, world, turns, steps)
    except RuntimeError as error:
        if row.refusal and row.refusal in str(error):
            raise LeftOut(str(error)) from None
        raise
    gap = apart(*found["losses"])
    if gap > row.tolerance:
        raise RuntimeError(
            f"losses differ by {gap:.1g}, more than {row.tolerance:g}: another computation"
        )
    cells = []
    for seconds in found["cpu"], found["wall"]:
        cells += [f"{1000 * statistics.median(x):.1f}" for x in seconds]
        mid, ends = runs.spread([x / y for x, y in zip(*seconds)]).split(" ")
        cells.append(f"**{mid}** {ends}")
    peaks = [measure(metered, [side], job, world) for side in sides]
    for key in "tensors", "rss":
        ours, theirs = (peak[key] for peak in peaks)
        cells += [f"{ours / 1e6:.1f}", f"{theirs / 1e6:.1f}", f"**{ours / theirs:.2f}**"]
    return [*cells, f"{gap:.0e}"]


HEAD = [
    "ours", "theirs", "CPU ms, ours", "theirs", "ratio", "wall ms, ours", "theirs", "ratio",
    "tensors MB, ours", "theirs", "ratio", "RSS MB, ours", "theirs", "ratio", "losses apart",
]  # fmt: skip


def described(job: Job) -> str:
    return (
        f"{job.n_layer} layers x {job.n_embd}, {job.block_size} tokens, {job.vocab_size} words, "
        f"{job.sequences} sequences"
    )


def table(
    names: list[str], size: str, job: Job, world: int, turns: int, steps: int
) -> tuple[list[str], bool]:
    """(lines of the page: a table, and what is not in it; whether nothing has failed)."""
    lines = []
    left_out = []
    well = True
    for name in names:
        row = ROWS[name]
        began = time.perf_counter()
        try:
            cells = compared(row, job_of(row, job, world), world, turns, steps)
            lines.append([name, row.peer, *cells])
        except LeftOut as why:
            left_out.append(f"- {name} beside {row.peer}: left out, {why}")
        except RuntimeError as error:
            left_out.append(f"- **{name} beside {row.peer} failed**: {error}")
            well = False
        seconds = time.perf_counter() - began
        runs.tell(f"{size}, {world} ranks, {name}: {seconds:.0f} s")
    title = f"{size}, {world} ranks: {described(job)}; {turns} turns of {steps} steps"
    return [title, "", *runs.table(HEAD, lines), "", *left_out, ""], well


def profiles(names: list[str], job: Job, world: int) -> list[str]:
    lines = []
    for name in names:
        row = ROWS[name]
        try:
            found = measure(profiled, sides_of(row), job_of(row, job, world), world, steps=5)
        except LeftOut as why:
            found = {name: [f"left out, {why}"]}
        for side, said in found.items():
            lines += [f"{name}, {side}, rank 0:", "", "```"]
            lines += [*said, "```", ""]
    return lines


def main(argv: list[str]) -> int:
    """What `python bench.py layouts ...` does with the words after `layouts`."""
    given = runs.flags(argv, FLAGS, __doc__)
    names = given.get("--only", ",".join(ROWS)).split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise ValueError(f"--only={unknown[0]} is no row; there are {', '.join(ROWS)}")
    quick = "--quick" in given
    turns = int(given.get("--turns", 1 if quick else 7))
    steps = 1 if quick else 2
    sizes = {"quick": QUICK} if quick else SIZES
    if "--size" in given:
        sizes = {given["--size"]: SIZES[given["--size"]]}
    rank_counts = [2] if quick else [2, 4]
    if "--ranks" in given:
        rank_counts = [int(given["--ranks"])]

    # Before the forks: a child of a process with many threads may wait for one that it lacks.
    torch.set_num_threads(1)
    page = [runs.header(["layouts", *argv]), ""]
    well = True
    for world in rank_counts:
        for size, job in sizes.items():
            if "--profile" in given:
                page += profiles(names, job, world)
            else:
                lines, did_well = table(names, size, job, world, turns, steps)
                page += lines
                well = well and did_well
    runs.show(page, given.get("--out"))
    return int(not well)
