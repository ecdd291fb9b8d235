"""What a checkpoint costs at many ranks, without the ranks: planned and found, not written.

    python -m benchmarks.scale_save [--worlds=16,1024,16384] [--tp=1] [--cut=first]

Every rank of a GPT-2 124M under AdamW holds rows of every weight and of its two states (ZeRO stage
3). One process plays a rank in the middle, and rank 0, which hears the descriptions of all. Seconds
are CPU time of this process; messages are what would be sent, compressed; peaks are Python's own
(tracemalloc), in runs of their own.

    describe     a rank: what it holds, and its message to rank 0
    merge        rank 0, once per run: all messages, the plan, and the plan's broadcast
    share        a rank: what the plan asks of it
    publish      rank 0, at each save: files.json and index.json
    open, find   a rank of the resumed run: index.json, and the slices that hold its rows

--cut: which ranks have a row more where rows do not divide: `first`, the first ones; `spread`, here
and there; `rotated`, the first ones from another rank on for each weight, so that each weight has a
sharding of its own. --tp: columns of every matrix are divided too.

From Python: save(world) and resume(folder, world) give these figures as a dict.
"""

import json
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path

import torch

from benchmarks import runs
from checkpoint import load, plan
from checkpoint.exchange import HEAD, LENGTH
from checkpoint.save import FORMAT, file_of
from checkpoint.slices import Slice, as_json, sha256
from metrics.outlets import command
from parallel.shard import Shard

FLAGS = {"--worlds": r"\d+(,\d+)*", "--tp": r"\d+", "--cut": "first|spread|rotated"}
FACTS = {"sha256": "0" * 64, "bytes": 1}  # of a file that nobody wrote


def shapes(n_layer: int = 12, width: int = 768, vocab: int = 50304, block: int = 1024) -> dict:
    """Parameter name -> shape."""
    found = {"embed.weight": (vocab, width), "positions.weight": (block, width)}
    for i in range(n_layer):
        for name in ("attn.q", "attn.k", "attn.v", "attn.out"):
            found[f"blocks.{i}.{name}.weight"] = (width, width)
            found[f"blocks.{i}.{name}.bias"] = (width,)
        for name in ("norm1", "norm2"):
            found[f"blocks.{i}.{name}.weight"] = (width,)
        found[f"blocks.{i}.mlp.up.weight"] = (4 * width, width)
        found[f"blocks.{i}.mlp.down.weight"] = (width, 4 * width)
    return found | {"norm.weight": (width,)}


def rows_of(n_rows: int, ranks: int, rank: int, cut: str, turn: int) -> tuple[int, int]:
    """(first, number) of this rank's rows of a weight."""
    if cut == "spread":
        first = rank * n_rows // ranks
        return first, (rank + 1) * n_rows // ranks - first
    whole, more = divmod(n_rows, ranks)
    begin = turn % ranks if cut == "rotated" else 0

    def more_before(r: int) -> int:
        # Ranks begin, begin + 1, ... have one more, and begin again at 0.
        return max(0, min(r, begin + more) - begin) + min(r, max(0, begin + more - ranks))

    first = rank * whole + more_before(rank)
    return first, whole + more_before(rank + 1) - more_before(rank)


def tree(world: int, rank: int, tp: int = 1, cut: str = "first", n_layer: int = 12) -> dict:
    """What this rank has for a checkpoint: meta tensors, for only their shapes are looked at."""
    dp_rank, tp_rank = divmod(rank, tp)
    model = {}
    states = {}
    for turn, (name, full) in enumerate(shapes(n_layer).items()):
        first, n_rows = rows_of(full[0], world // tp, dp_rank, cut, 7 * turn)
        offsets = [first] + [0] * (len(full) - 1)
        shape = [n_rows, *full[1:]]
        if len(full) == 2:
            shape[1] = full[1] // tp
            offsets[1] = shape[1] * tp_rank
        numbers = torch.empty(shape, device="meta")
        model[name] = Slice(numbers, Shard(full, tuple(offsets)))
        average = model[name]
        states[name] = {"step": torch.tensor(1.0), "exp_avg": average, "exp_avg_sq": average}
    rng = Slice(torch.empty(1, 5056, dtype=torch.uint8), Shard((world, 5056), (rank, 0)))
    return {
        "model": model,
        "optim": {"state": states, "groups": [{"lr": 6e-4, "betas": [0.9, 0.95]}]},
        "rng": rng,
        "progress": {"rows": 480, "skipped": []},
        "config": {f"field{i}": i for i in range(100)},
    }


def message(described: plan.Description) -> bytes:
    return as_json([described.form_key(), described.boxes, described.numbers])


def save(
    world: int, tp: int = 1, cut: str = "first", folder: Path | None = None, n_layer: int = 12
) -> dict:
    """The figures of a save by this many ranks. folder: where to leave the index, as of step 1."""
    middle = world // 2
    held = tree(world, middle, tp, cut, n_layer)
    with clock() as describe:
        own = plan.describe(held)
        own.digest()
        sent = zlib.compress(message(own), 1)

    messages = []
    forms = {}
    for rank in range(world):
        described = plan.describe(tree(world, rank, tp, cut, n_layer))
        messages.append(zlib.compress(message(described), 1))
        forms.setdefault(described.form_key(), zlib.compress(as_json(described.form), 1))

    with clock() as merge:
        heard = [json.loads(zlib.decompress(m)) for m in messages]
        texts = {key: json.loads(zlib.decompress(form)) for key, form in forms.items()}
        merged = plan.merge(heard, texts)
        broadcast = zlib.compress(as_json(merged), 1)
    with clock() as share:
        mine = plan.Share()
        mine.take(json.loads(zlib.decompress(broadcast)), middle, own.digest())

    with clock() as publish:
        files = as_json({file_of(rank): FACTS for rank in range(world)})
        index = index_of(merged, world, files)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "files.json").write_bytes(files)
        (folder / "index.json").write_bytes(index)
    return {
        "describe_s": describe.seconds,
        "sent_bytes": len(sent),
        "merge_s": merge.seconds,
        "heard_bytes": sum(max(len(m), HEAD) + LENGTH for m in messages)
        + sum(map(len, forms.values())),
        "forms": len(forms),
        "plan_bytes": len(broadcast),
        "share_s": share.seconds,
        "publish_s": publish.seconds,
        "index_bytes": len(index),
        "files_bytes": len(files),
        "shardings": len(merged["shardings"]),
        "grids": sum(map(len, merged["shardings"])),
        "writes": len(mine.writes),
    }


def index_of(merged: dict, world: int, files: bytes) -> bytes:
    names = [name for name, _ in plan.values_of(merged["tree"])]
    body = {
        "format": FORMAT,
        "step": 1,
        "world": world,
        "files": {"sha256": sha256(files), "bytes": len(files)},
        "tensors": merged["tensors"],
        "shardings": merged["shardings"],
        "tree": plan.with_values(merged, [[1] * len(names)] + [[]] * (world - 1)),
    }
    return as_json({"body": body, "sha256": sha256(as_json(body))})


def resume(folder: Path, world: int, tp: int = 1, cut: str = "first", n_layer: int = 12) -> dict:
    """The figures of a rank in the middle of `world` that reads the checkpoint in `folder`."""
    held = plan.describe(tree(world, world // 2, tp, cut, n_layer)).held
    with clock() as opening:
        saved = load.load(folder, verify=False)
    n_slices = 0
    files = set()
    with clock() as find:
        for name, s in held.items():
            if name == "rng":
                continue
            low = list(s.shard.offsets)
            high = [o + n for o, n in zip(low, s.tensor.shape)]
            sources = saved.sources(name, low, high)
            n_slices += len(sources)
            files |= {rank for rank, _, _ in sources}
    return {
        "open_s": opening.seconds,
        "find_s": find.seconds,
        "slices": n_slices,
        "files": len(files),
    }


class clock:
    """`with` this; .seconds is the CPU time that it took."""

    def __enter__(self):
        self.start = time.process_time()
        return self

    def __exit__(self, *error):
        self.seconds = time.process_time() - self.start


def peak(work) -> int:
    """Bytes that Python holds at most during work(), above what it held before."""
    tracemalloc.start()
    work()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def main(argv: list[str]) -> None:
    given = runs.flags(argv, FLAGS, __doc__)
    tp = int(given.get("--tp", 1))
    cut = given.get("--cut", "first")
    for world in map(int, given.get("--worlds", "16,1024,16384").split(",")):
        with tempfile.TemporaryDirectory() as out_dir:
            folder = Path(out_dir) / "step-00000001"
            figures = save(world, tp, cut, folder)
            for again in (world // 2, 2 * world):
                found = resume(folder, again, tp, cut)
                figures |= {f"{name} on {again}": x for name, x in found.items()}
            figures["open_peak"] = peak(lambda: load.load(folder, verify=False))
        held = tree(world, world // 2, tp, cut)
        figures["describe_peak"] = peak(lambda: message(plan.describe(held)))
        print(f"{world} ranks")
        for name, x in figures.items():
            print(f"    {name:<20} {x:.4f}" if isinstance(x, float) else f"    {name:<20} {x:,}")


if __name__ == "__main__":
    command("scale_save.py", main)
