"""What a run costs each rank as ranks become many: groups, store, set-up, a step, memory.

    python bench.py scale [--worlds=1,4,16,64,256,1024,4096,16384] [--turns=3] [--quick]

One process plays rank 0, one in the middle and the last, one after the other, under torch's fake
process group: collectives return at once and what they would bring is made up, so numbers of the
loss mean nothing, and all host work is done. train.py itself runs, with a tiny GPT of 8 layers on
one thread. Two layouts: `dp`, zero3 over all ranks, and `grid`, tp 8 x pp 8 x dp with zero1.

    groups     process groups that the rank is in, that of all ranks too / calls of new_group
    members    in all its groups together
    store      messages of the rank to the store before step 1: start, and gloo's connections, which
               are 2n + 1 for a group of n, in that of saving 2 for each rank connected to
               (tests/test_scale.py counts them); NCCL's are a few a group
    mesh ms    make_mesh
    set-up s   from train.main's beginning to step 1: mesh, data, model, layout, optimizer
    step ms    of the host, the median of 5 steps
    heap MB    what Python holds at step 1 (tracemalloc), in a run of its own

Then what a checkpoint costs, for a GPT-2 124M whose weights and AdamW state all ranks share by
rows; only its index is written (benchmarks/scale_save.py has more figures, and divides columns):

    index kB   index.json, which each rank of a resumed run reads
    files kB   files.json with the checksums, which rank 0 alone reads
    plan s     of rank 0, once a run: hears all descriptions, makes the plan
    own ms     of a rank in the middle, once a run: its description, and its share of the plan
    save s     of rank 0, at each save: both files
    read ms    of a rank in the middle of the resumed run: opens index.json, finds its slices

Seconds are of the CPU, the smallest of `turns` runs.
"""

import contextlib
import io
import multiprocessing
import os
import tempfile
import time
import tracemalloc
from pathlib import Path
from statistics import median
from unittest import mock

from benchmarks import runs, scale_save

WORLDS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
LAYOUTS = {
    "dp": ["--data_parallel=zero3"],
    "grid": ["--data_parallel=zero1", "--tp=8", "--pp=8"],
}
MODEL_PARALLEL = {"dp": 1, "grid": 64}
STEPS = 6
COLUMNS = ("groups", "members", "store", "mesh ms", "set-up s", "step ms", "heap MB")
SAVE_COLUMNS = ("index kB", "files kB", "plan s", "own ms", "save s", "read ms")


def play(layout: str, world: int, rank: int, folder: str, trace: bool) -> dict:
    """One rank of a run, in this process, which should be a fresh one: its figures by column."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import schedules
    import train
    from checkpoint.save import Saver
    from parallel import launch
    from parallel.mesh import Mesh
    from settings import parse

    torch.set_flush_denormal(True)  # what nobody has sent may be slow numbers
    figures = {"calls": 0, "groups": 0, "members": 0, "store": 0}
    starts = []  # of steps, in seconds of the CPU
    new_group, make_mesh, batch_at = dist.new_group, train.make_mesh, schedules.batch_at

    def joined(n: int, messages: int) -> None:
        figures["groups"] += 1
        figures["members"] += n
        figures["store"] += messages

    def counted_group(ranks=None, **arguments):
        figures["calls"] += 1
        # Members that are played connect to nobody, with whatever they would have used.
        group = new_group(ranks, **arguments | {"backend": "fake"})
        if group is not None and group != dist.GroupMember.NON_GROUP_MEMBER:
            if ranks is None:  # that of saving: checkpoint/exchange.py, star
                joined(world, 1 + 2 * n_connections(rank, world))
            else:
                joined(len(ranks), 2 * len(ranks) + 1)
        return group

    def timed_mesh(*arguments):
        began = time.process_time()
        mesh = make_mesh(*arguments)
        figures["mesh ms"] = 1000 * (time.process_time() - began)
        return mesh

    def step_begins(*arguments):
        if not starts and trace:
            figures["heap MB"] = tracemalloc.get_traced_memory()[0] / 1e6
        starts.append(time.process_time())
        return batch_at(*arguments)

    dp = world // MODEL_PARALLEL[layout]
    cfg = parse.parse([*LAYOUTS[layout], *flags(folder), f"--batch_size={8 * dp}"])
    if trace:
        tracemalloc.start()
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        joined(world, 2 * world + 1)
        store = PlayedStore()
        launch.same_start(store, rank, world)
        figures["store"] += store.asked
    patches = [
        mock.patch.object(dist, "new_group", counted_group),
        mock.patch.object(train, "make_mesh", timed_mesh),
        mock.patch.object(schedules, "batch_at", step_begins),
        # Answers that a rank acts upon: all ranks say what this one says.
        mock.patch.object(Mesh, "agree", lambda mesh, value: int(value)),
        mock.patch.object(Mesh, "alike", lambda mesh, text: True),
        # The played one wants as much to be sent as comes.
        mock.patch.object(dist, "all_to_all_single", lambda received, *a, **more: received.zero_()),
        mock.patch.object(Saver, "save", lambda *arguments, **more: None),
        contextlib.redirect_stdout(io.StringIO()),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        began = time.process_time()
        train.main(cfg)
    steps = [b - a for a, b in zip(starts, starts[1:])]
    return figures | {"set-up s": starts[0] - began, "step ms": 1000 * median(steps)}


def n_connections(rank: int, world: int) -> int:
    """To how many ranks this one is connected in the group of saving.

    All are connected to rank 0. Its broadcast travels along a tree: rank 5 = 101 hears it from 001,
    its own number without the highest bit, and tells 1101, 10101, ..., its own with a higher one.
    """
    if rank == 0:
        return world - 1
    bit = 1 << (rank.bit_length() - 1)  # the highest one
    others = {0, rank - bit}
    while rank + 2 * bit < world:
        bit *= 2
        others.add(rank + bit)
    return len(others)


class PlayedStore:
    """A store in which all other ranks have already said what this one waits for."""

    def __init__(self):
        self.asked = 0

    def answer(self, *arguments):
        self.asked += 1

    set = wait = delete_key = answer

    def check(self, keys) -> bool:
        self.asked += 1
        return False

    def get(self, key: str) -> bytes:
        self.asked += 1
        return b"name"

    def add(self, key: str, n: int) -> int:
        self.asked += 1
        return n


def flags(folder: str) -> list[str]:
    """The tiny run, apart from its layout."""
    return [
        f"--out_dir={tempfile.mkdtemp(dir=folder)}",
        f"--data={folder}/text.txt",
        "--resume=never",
        "--device=cpu",
        "--precision=fp32",
        "--threads=1",
        "--compile=off",
        "--n_layer=8",
        "--n_head=8",
        "--n_embd=64",
        "--block_size=32",
        "--micro_batch_size=1",
        f"--steps={STEPS}",
        "--eval_every=0",
        "--sample_tokens=0",
        "--save_every=none",
        "--on_spike=warn",
        "--on_nonfinite=warn",
    ]


def in_fresh_process(*arguments) -> dict:
    with multiprocessing.Pool(1) as pool:
        return pool.apply(play, arguments)


def measure(layout: str, world: int, rank: int, folder: str, turns: int) -> dict:
    """The figures of one rank: counts, and the smallest of each time."""
    found = [in_fresh_process(layout, world, rank, folder, False) for _ in range(turns)]
    best = {name: min(one[name] for one in found) for name in found[0]}
    best["heap MB"] = in_fresh_process(layout, world, rank, folder, True)["heap MB"]
    return best


def row(world: int, rank: int, figures: dict) -> str:
    cells = [f"{world:,}", f"{rank:,}", f"{figures['groups']} / {figures['calls']}"]
    cells += [f"{figures[name]:,}" for name in ("members", "store")]
    cells += [short(figures[name]) for name in COLUMNS[3:]]
    return f"| {' | '.join(cells)} |"


def short(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def measure_save(world: int, folder: str, turns: int) -> dict:
    """The figures of a checkpoint by SAVE_COLUMNS, the smallest of each."""
    path = Path(folder) / "step-00000001"
    found = []
    for _ in range(turns):
        saved = scale_save.save(world, folder=path)
        read = scale_save.resume(path, world)
        found.append(
            {
                "index kB": saved["index_bytes"] / 1e3,
                "files kB": saved["files_bytes"] / 1e3,
                "plan s": saved["merge_s"],
                "own ms": 1000 * (saved["describe_s"] + saved["share_s"]),
                "save s": saved["publish_s"],
                "read ms": 1000 * (read["open_s"] + read["find_s"]),
            }
        )
    return {name: min(one[name] for one in found) for name in SAVE_COLUMNS}


def main(argv: list[str]) -> int:
    given = runs.flags(
        argv, {"--quick": "", "--worlds": r"\d+(,\d+)*", "--turns": r"[1-9]\d*"}, __doc__
    )
    quick = "--quick" in given
    worlds = [int(n) for n in given["--worlds"].split(",")] if "--worlds" in given else WORLDS
    if quick:
        worlds = [16, 1024]
    turns = 1 if quick else int(given.get("--turns", 3))
    import train  # noqa: F401  before the forks, or each of them spends two seconds on it

    print(
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {train.torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_text("To be, or not to be, that is the question.\n" * 2000)
        for layout in LAYOUTS:
            print(f"\n{layout}: train.py {' '.join(LAYOUTS[layout])}\n")
            print(f"| ranks | rank | {' | '.join(COLUMNS)} |")
            print("|---" * (2 + len(COLUMNS)) + "|")
            for world in worlds:
                if world % MODEL_PARALLEL[layout]:
                    continue
                for rank in sorted({0, world // 2, world - 1}):
                    print(row(world, rank, measure(layout, world, rank, folder, turns)), flush=True)
        print(f"\na checkpoint\n\n| ranks | {' | '.join(SAVE_COLUMNS)} |")
        print("|---" * (1 + len(SAVE_COLUMNS)) + "|")
        for world in worlds:
            figures = measure_save(world, folder, turns)
            cells = [short(figures[name]) for name in SAVE_COLUMNS]
            print(f"| {world:,} | {' | '.join(cells)} |", flush=True)
    return 0
