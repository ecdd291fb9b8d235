"""Checkpoints beside torch.distributed.checkpoint (DCP): saved, saved in the background, loaded.

    python bench.py checkpoint [--quick] [--ranks=1,2,4] [--model=gpt-51m|gpt2] [--cut=rows|whole]
        [--turns=5] [--folder=DIR] [--out=FILE.md]

On gloo ranks of one machine: the weights and the AdamW state of a GPT, float32, 12 bytes a
parameter. --cut=rows: a rank has rows of every tensor, as under ZeRO-3 and FSDP; whole: each has
all, as under DDP. Both programs write the same tensors to DIR (none: where temporary files go),
turn by turn in an order that rotates. The first turn warms up, and checks that what is loaded has
the bits that were saved. Before each measurement the disk has nothing left to write (sync); it
lasts from one barrier to the next, and so ends with the slowest rank.

Ours keeps a sha256 of every file, and syncs files and names to the disk. DCP has no checksums.
`sync` is its sync_files=True, which is its default; `threads` its thread_count; `plans kept` its
enable_plan_caching, for ours keeps its plan; `buffers kept` a
DefaultStager that is used again.

save           save(), dcp.save()
waits          in the background: until Saver.save() or dcp.async_save() returns
durable        the same save, until it has ended
load, warm     rank 0 verifies every byte, then each rank reads its part into tensors that exist,
               which is what dcp.load() does. `unverified`: without sha256. `new memory`: as
               train.py resumes, where the optimizer has no state yet; weights are read, then
               copied into the model. The files are in the page cache
load, cold     the same, the files dropped from it (posix_fadvise); the disk may have a cache too

MB/s are 10^6 bytes of tensors a second: median over the turns (smallest..largest). x: seconds of
theirs over seconds of `ours`, turn by turn. --quick: 0.8 million parameters, 2 turns, and figures
that say only that it works.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from benchmarks import runs
from benchmarks.scale_save import shapes
from checkpoint import load
from checkpoint.plan import Share
from checkpoint.save import Saver, save
from checkpoint.slices import Slice
from parallel.shard import Shard

FLAGS = {
    "--quick": "",
    "--ranks": r"[1-9]\d?(,[1-9]\d?)*",
    "--model": "gpt-51m|gpt2",
    "--cut": "rows|whole",
    "--turns": r"[1-9]\d*",
    "--folder": ".+",
    "--out": ".+",
}
MODELS = {
    "gpt-51m": {"n_layer": 8, "width": 512},
    "gpt2": {},
    "quick": {"n_layer": 2, "width": 64, "vocab": 10240},
}
STATES = ("exp_avg", "exp_avg_sq")


def held(model: str, cut: str, rank: int, world: int) -> dict[str, dict[str, Slice]]:
    """What this rank has: "model" and each of STATES -> name -> Slice."""
    generator = torch.Generator().manual_seed(rank if cut == "rows" else 0)
    parts = {}
    for name, full in shapes(**MODELS[model]).items():
        begin, end = 0, full[0]
        if cut == "rows":
            # As DTensors are cut.
            rows = -(-full[0] // world)
            begin = min(rank * rows, full[0])
            end = min(begin + rows, full[0])
        where = Shard(full, (begin,) + (0,) * (len(full) - 1))
        for kind in ("model", *STATES):
            numbers = torch.randn(end - begin, *full[1:], generator=generator)
            parts.setdefault(kind, {})[name] = Slice(numbers, where)
    return parts


def zeros(parts: dict) -> dict:
    """Like `parts`, in memory that was there before."""
    empty = {}
    for kind, named in parts.items():
        empty[kind] = {n: Slice(torch.zeros_like(s.tensor), s.shard) for n, s in named.items()}
    return empty


class Ours:
    """checkpoint/: saves, saves in the background, loads.

    verify: sha256 of all files first? in_place: into tensors that are there, or as train.py?
    """

    def __init__(self, parts: dict, verify: bool = True, in_place: bool = True):
        self.parts = parts
        self.verify = verify
        self.in_place = in_place
        self.share = Share()
        self.saver = None

    def tree(self) -> dict:
        state = {}
        for name in self.parts["model"]:
            state[name] = {"step": torch.tensor(1.0)} | {k: self.parts[k][name] for k in STATES}
        return {"model": self.parts["model"], "optim": {"state": state, "groups": [{"lr": 6e-4}]}}

    def save(self, folder: Path) -> None:
        save(folder, 1, self.tree(), share=self.share)

    def save_in_background(self, folder: Path):
        """Returns a function that waits for the end of the save."""
        if self.saver is None:
            self.saver = Saver(folder)
        self.saver.out_dir = folder
        self.saver.save(1, self.tree())
        return self.finish

    def finish(self) -> None:
        self.saver.wait()
        for event in self.saver.pop_events():
            if event["event"] != "save":
                raise OSError(event["text"])

    def load(self, folder: Path, into: dict) -> None:
        is_first = dist.get_rank() == 0
        saved = load.load(folder / "step-00000001", self.verify and is_first)
        # The others read what rank 0 has found intact.
        dist.barrier()
        weights = saved.weights("model")
        for name, part in into["model"].items():
            state = f"optim/state/{name}"
            shape = tuple(part.tensor.shape)
            if self.in_place:
                saved.fill(part.tensor, f"model/{name}", part.shard.offsets)
                for kind in STATES:
                    saved.fill(into[kind][name].tensor, f"{state}/{kind}", part.shard.offsets)
            else:
                part.tensor.copy_(weights.shard(name, part.shard, shape))
                read = saved.tree(state, part.shard, shape)
                for kind in STATES:
                    into[kind][name] = Slice(read[kind], part.shard)


class DCP:
    """torch.distributed.checkpoint, with these arguments of FileSystemWriter.

    plans, buffers: are they kept from save to save?
    """

    def __init__(self, parts: dict, plans: bool = False, buffers: bool = False, **arguments):
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.parts = parts
        self.plans = plans
        self.stager = None
        if buffers:
            # Neither pinned nor shared, and copied at once: there is no GPU.
            self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.writer = arguments
        self.group = None

    def tree(self, parts: dict) -> dict:
        tree = {
            kind: {n: self.tensor(s) for n, s in named.items()} for kind, named in parts.items()
        }
        steps = {name: torch.tensor(1.0) for name in parts["model"]}
        return tree | {"step": steps, "lr": 6e-4}

    def tensor(self, part: Slice):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Split

        full = torch.empty(part.shard.global_shape, device="meta")
        if full.shape == part.tensor.shape:
            return part.tensor
        if self.group is None:
            self.group = init_device_mesh("cpu", (dist.get_world_size(),))
        return DTensor.from_local(
            part.tensor, self.group, [Split(0)], shape=full.shape, stride=full.stride()
        )

    def arguments(self, folder: Path) -> dict:
        from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

        planner = DefaultSavePlanner(enable_plan_caching=self.plans)
        return {
            "storage_writer": FileSystemWriter(folder / "dcp", **self.writer),
            "planner": planner,
        }

    def save(self, folder: Path) -> None:
        from torch.distributed import checkpoint as dcp

        dcp.save(self.tree(self.parts), **self.arguments(folder))

    def save_in_background(self, folder: Path):
        from torch.distributed import checkpoint as dcp

        tree = self.tree(self.parts)
        return dcp.async_save(tree, async_stager=self.stager, **self.arguments(folder)).result

    def load(self, folder: Path, into: dict) -> None:
        from torch.distributed import checkpoint as dcp

        dcp.load(self.tree(into), checkpoint_id=folder / "dcp")


# Row of a table -> who, with which arguments. The first is ours.
SAVES = {
    "ours": (Ours, {}),
    "DCP, sync": (DCP, {}),
    "DCP, sync, 2 threads, plans kept": (DCP, {"thread_count": 2, "plans": True}),
    "DCP, sync, 4 threads, plans kept": (DCP, {"thread_count": 4, "plans": True}),
    "DCP, no sync": (DCP, {"sync_files": False}),
    "DCP, no sync, 4 threads, plans kept": (
        DCP,
        {"sync_files": False, "thread_count": 4, "plans": True},
    ),
}
KEPT = {"thread_count": 4, "plans": True, "buffers": True}
BACKGROUND = {
    "ours": (Ours, {}),
    "DCP, sync": (DCP, {}),
    "DCP, sync, 4 threads, plans and buffers kept": (DCP, KEPT),
}
LOADS = {
    "ours": (Ours, {}),
    "ours, state in new memory": (Ours, {"in_place": False}),
    "ours, unverified": (Ours, {"verify": False}),
    "DCP": (DCP, {}),
}


# ---- on each rank --------------------------------------------------------------------------------
def timed(work) -> float:
    """Seconds of work() on the slowest rank."""
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def settle(folder: Path, drop: bool = False) -> None:
    """All that was written is on the disk; drop: and the files are no longer in the page cache."""
    dist.barrier()
    if dist.get_rank() == 0:
        os.sync()
        for path in folder.rglob("*") if drop else ():
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)
    dist.barrier()


def saves(who, folder: Path) -> dict[str, float]:
    return {"save": timed(lambda: who.save(folder))}


def saves_in_background(who, folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    finish = who.save_in_background(folder)
    waits = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    finish()
    dist.barrier()
    durable = time.perf_counter() - began
    dist.all_reduce(waits, dist.ReduceOp.MAX)
    return {"waits": waits.item(), "durable": durable}


def one_rank(rank: int, world: int, job: dict) -> None:
    """A rank of the benchmark. Rank 0 leaves {what: {row: [seconds of each turn]}} in a file."""
    torch.set_num_threads(max(1, os.cpu_count() // world))
    folder = Path(job["folder"])
    dist.init_process_group(
        "gloo", init_method=(folder / f"store{world}").as_uri(), rank=rank, world_size=world
    )
    parts = held(job["model"], job["cut"], rank, world)
    found = {}

    def note(row: str, seconds: dict, turn: int) -> None:
        for what, x in seconds.items():
            if turn > 0:
                found.setdefault(what, {}).setdefault(row, []).append(x)

    for measure, table in ((saves, SAVES), (saves_in_background, BACKGROUND)):
        rows = {row: kind(parts, **arguments) for row, (kind, arguments) in table.items()}
        for turn in range(job["turns"] + 1):
            for row in rotated(rows, turn):
                settle(folder)
                note(row, measure(rows[row], folder / "now"), turn)
                dist.barrier()
                if rank == 0:
                    shutil.rmtree(folder / "now")
    load_all(parts, folder, job["turns"], note)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def rotated(rows, turn: int) -> list:
    rows = list(rows)
    first = turn % len(rows)
    return rows[first:] + rows[:first]


def load_all(parts: dict, folder: Path, turns: int, note) -> None:
    """Both programs save once; then all rows of LOADS load, warm and cold."""
    for kind, arguments in LOADS.values():
        if arguments == {}:
            kind(parts).save(folder / "now")
    rows = {row: kind(parts, **arguments) for row, (kind, arguments) in LOADS.items()}
    into = zeros(parts)
    for turn in range(turns + 1):
        for row in rotated(rows, turn):
            for state in ("warm", "cold"):
                settle(folder, drop=state == "cold")
                if state == "warm":
                    # Reads every file, whatever the last row has left in the page cache.
                    rows[row].load(folder / "now", into)
                seconds = timed(lambda row=row: rows[row].load(folder / "now", into))
                note(row, {f"load, {state}": seconds}, turn)
            if turn == 0:
                check(parts, into, row)
                into = zeros(parts)


def check(parts: dict, into: dict, row: str) -> None:
    for kind, named in parts.items():
        for name, part in named.items():
            if not torch.equal(part.tensor, into[kind][name].tensor):
                raise RuntimeError(f"{row} has loaded another {kind}/{name} than was saved")


ORDER = [*SAVES, *BACKGROUND, *LOADS]


# ---- the page ------------------------------------------------------------------------------------
def report(found: dict, n_bytes: int) -> list[str]:
    """Tables of what one number of ranks has found."""
    lines = []
    for what, rows in found.items():
        ours = rows["ours"]
        table = []
        for row, seconds in sorted(rows.items(), key=lambda item: ORDER.index(item[0])):
            rates = [n_bytes / s / 1e6 for s in seconds]
            ratios = [s / own for s, own in zip(seconds, ours)]
            table.append(
                [
                    row,
                    runs.spread([1000 * s for s in seconds], ".0f"),
                    runs.spread(rates, ".0f"),
                    "" if row == "ours" else f"**{runs.spread(ratios)}**",
                ]
            )
        lines += runs.table([what, "ms", "MB/s", "x"], table) + [""]
    return lines


def main(argv: list[str]) -> int:
    """What `python bench.py checkpoint ...` does with the words after `checkpoint`."""
    given = runs.flags(argv, FLAGS, __doc__)
    quick = "--quick" in given
    job = {
        "model": "quick" if quick else given.get("--model", "gpt-51m"),
        "cut": given.get("--cut", "rows"),
        "turns": int(given.get("--turns", 2 if quick else 5)),
    }
    parent = given.get("--folder")
    if parent is not None and not Path(parent).is_dir():
        raise ValueError(f"--folder={parent} is no folder; type mkdir -p {parent} first")
    n_numbers = sum(torch.Size(s).numel() for s in shapes(**MODELS[job["model"]]).values())
    n_bytes = 12 * n_numbers
    page = [
        runs.header(["checkpoint", *argv]),
        "",
        f"{n_numbers / 1e6:.1f} million parameters, {n_bytes / 1e6:.0f} MB.",
    ]
    for world in map(int, given.get("--ranks", "1,2" if quick else "1,2,4").split(",")):
        runs.tell(f"{world} ranks ...")
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            words = (world, job | {"folder": folder})
            try:
                mp.spawn(one_rank, words, nprocs=world)
            except (ProcessRaisedException, ProcessExitedException) as error:
                runs.tell(f"bench.py checkpoint: {str(error).strip().splitlines()[-1]}")
                return 1
            found = torch.load(Path(folder, "found.pt"), weights_only=True)
        ranks = "1 rank" if world == 1 else f"{world} ranks, --cut={job['cut']}"
        page += ["", f"## {ranks}", "", *report(found, n_bytes)]
    runs.show(page, given.get("--out"))
    return 0
