"""Writing checkpoints beside training: a step waits for a copy of the state, not for the disk.

    training     step 99   step 100  copy  step 101   step 102   step 103   step 104   step 105
                                        │                                       ▲
    background                          └► describe  write, sync  rename  prune ┘ news: it is saved
    on the disk  step-50 ............................................. step-50 and step-100

The copy is this rank's part of the checkpoint once more, in host memory until the save is done. On
a GPU it is queued behind the step into pinned memory: the GPU makes it in its turn, Python does not
wait. Hashing and writing let other threads run: they hold no interpreter lock, and have a low
priority where the system lets a thread have its own.

The ranks speak of a save three times: who holds what, who could write, is it published. In the
background they do so in a group of their own, for in training's group their words would mix with
its gradients. A save that is due while the one before is under way waits for it.

Whoever leaves a run over the weekend wants it to go on when the disk is full: a save that failed in
its middle is news, earlier checkpoints are as they were, and the next save tries again. Only the
last one raises.

    save(...)                             one checkpoint, now, on all ranks
    saver = Saver(...)                    made by all ranks, and used by all: save, wait
    saver.save(step, tree)                returns after the copy; tree may change from now on
    saver.news()                          events: what became of the saves since the last call
    saver.save(step, tree, last=True)     waits for all of it; OSError where it failed
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint.slices import DTYPE_NAMES, copied, merge, to_json, walk

FORMAT = 1
# Replacing a checkpoint takes two renames; a kill between them leaves the old, still good one as
# .old-step-N.
FOLDER = re.compile(r"(\.old-)?step-([0-9]{8}|[1-9][0-9]{8,})")
FILE = re.compile(r"rank_[0-9]+\.safetensors")
STALE = re.compile(r"\.tmp-(\.old-)?step-[0-9]{8,}")


def save(
    out_dir,
    step: int,
    tree: dict,
    keep: int | None = None,
    keep_every: int | None = None,
    group=None,
) -> Path:
    """Write `tree` to OUT_DIR/step-N, then delete old checkpoints, see `prune`.

    tree: nested dicts and lists of tensors, Slices, DTensors, numbers, str, bool, None; tuples
    become lists. With several ranks (of `group`; None = all) each calls with its own tree, or {},
    and the trees are merged; what several hold (the same shard of the same name, or a scalar) is
    taken from the lowest rank. If any rank fails, all raise (ValueError: such a tree cannot be
    saved; OSError: anything else) and earlier checkpoints stay as they were.
    """
    writer = Writer(Path(out_dir), step, group)
    described = writer.on_all_ranks(lambda: writer.describe(tree, keep))
    written = writer.on_all_ranks(lambda: writer.write(described))
    writer.on_all_ranks(lambda: writer.publish(written, keep, keep_every))
    return writer.folder


class Writer:
    """The steps of one save, in their order; after each the ranks tell each other what came of it.
    What a step returns is JSON."""

    def __init__(self, out_dir: Path, step: int, group):
        self.out_dir, self.step, self.group, self.rank = out_dir, step, group, _rank(group)
        name = f"step-{step:08d}"
        self.folder = out_dir / name
        self.temporary, self.old = out_dir / f".tmp-{name}", out_dir / f".old-{name}"
        self.held = {}  # name -> this rank's Slice
        self.plan = {}  # "tensors" and "tree" of the index, the same on all ranks

    def describe(self, tree: dict, keep: int | None) -> tuple:
        """What this rank holds: the tree's skeleton, and name -> the box of each tensor."""
        if self.rank == 0:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            # Only what killed runs left: the disk may need that space
            prune(self.out_dir, keep, upto=-1)
            self.temporary.mkdir()
        skeleton = walk(tree, lambda name, leaf: to_json(name, leaf, self.held))
        described = {}
        for name, s in self.held.items():
            global_shape, offsets = s.shard
            dtype = DTYPE_NAMES[s.tensor.dtype]
            described[name] = global_shape, dtype, offsets, s.tensor.shape
        return skeleton, described

    def write(self, described: list) -> dict | None:
        """This rank's file, of what the plan takes from it; None where that is nothing."""
        self.plan.update(merge(described))
        file, mine = f"rank_{self.rank}.safetensors", {}
        for name, entry in self.plan["tensors"].items():
            if any(s["file"] == file for s in entry["slices"]):
                mine[name] = self.held[name].tensor
        return write_tensors(self.temporary / file, mine) if mine else None

    def publish(self, written: list, keep: int | None, keep_every: int | None) -> None:
        """The index, and the folder's name; then old checkpoints may go. Rank 0 does, for all."""
        if self.rank != 0:
            return
        files = {f"rank_{r}.safetensors": facts for r, facts in enumerate(written) if facts}
        body = {"format": FORMAT, "step": self.step, "files": files, **self.plan}
        index = as_json({"body": body, "sha256": sha256(as_json(body))})
        write_file(self.temporary / "index.json", [index])
        sync(self.temporary)
        if self.folder.exists():
            shutil.rmtree(self.old, ignore_errors=True)
            os.rename(self.folder, self.old)
        os.rename(self.temporary, self.folder)
        sync(self.out_dir)
        prune(self.out_dir, keep, upto=self.step, keep_every=keep_every)

    def on_all_ranks(self, work) -> list:
        """The results of all ranks' work(). Where it failed on one of them, all raise."""
        result = cause = sentence = None
        try:
            result = json.loads(as_json(work()))
        except Exception as error:  # whatever it is, the other ranks must hear of it
            cause, sentence = error, str(error)
            if not isinstance(error, ValueError | OSError):
                sentence = f"{type(error).__name__}: {error}"
        answers = _exchange([result, sentence, isinstance(cause, ValueError)], self.group)
        for r, (_, sentence, of_the_tree) in enumerate(answers):
            if sentence is not None:
                if self.rank == 0:
                    shutil.rmtree(self.temporary, ignore_errors=True)
                who = f"rank {r}: " if len(answers) > 1 else ""
                remedy = (
                    "" if of_the_tree else "; see that there is room and that it can be written"
                )
                raise (ValueError if of_the_tree else OSError)(
                    f"step {self.step} was not saved, {who}{sentence}; "
                    f"the earlier checkpoints in {self.out_dir} are as they were{remedy}"
                ) from cause
        return [result for result, _, _ in answers]


class Saver:
    """The checkpoints of one run. every: steps between them; hours: see `overdue`; keep,
    keep_every: see `prune`; asynchronous: in the background, as above, or while training waits."""

    def __init__(
        self,
        out_dir,
        every: int | None = None,
        hours: float | None = None,
        keep: int | None = None,
        keep_every: int | None = None,
        asynchronous: bool = True,
    ):
        self.out_dir, self.hours, self.keep, self.keep_every = out_dir, hours, keep, keep_every
        self.intervals, self.events = [n for n in (every, keep_every) if n], []
        self.saved_at = time.monotonic()
        self.group = self.pool = self.under_way = self.saved = None
        if asynchronous:
            self.pool = ThreadPoolExecutor(1, "saving", initializer=_step_back)
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                # A slow disk is no deadlock: this group waits long. A rank that dies is noticed at
                # once.
                self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))

    def due(self, step: int) -> bool:
        """Is this a step after which a checkpoint is saved? What is to be kept for ever is saved,
        too."""
        return step > 0 and any(step % n == 0 for n in self.intervals)

    def overdue(self) -> bool:
        """By this rank's clock `hours` have passed since the last save; ask one rank and tell the
        others."""
        return self.hours is not None and time.monotonic() - self.saved_at >= 3600 * self.hours

    def save(self, step: int, tree: dict, last: bool = False) -> None:
        """last: returns when the checkpoint is on the disk, and raises OSError where it cannot
        be."""
        self.wait()
        self.saved_at = time.monotonic()
        if last or self.pool is None:
            self._finish(step, lambda: self._write(step, tree), last)
            return
        tree, event = copied(tree), torch.cuda.Event() if torch.cuda.is_initialized() else None
        if event is not None:
            event.record()  # the GPU passes it when the copies are made
        self.under_way = step, self.pool.submit(self._write, step, tree, event)

    def wait(self) -> None:
        """Until nothing is under way. ValueError, as from `save`, where a tree cannot be saved."""
        if self.under_way is not None:
            (step, future), self.under_way = self.under_way, None
            self._finish(step, future.result)

    def drop_after(self, step: int) -> None:
        """Deletes checkpoints after `step`, but only if the newest save was of `step` and
        succeeded."""
        self.wait()
        if self.saved == step:
            drop_after(self.out_dir, step)

    def news(self) -> list[dict]:
        """[{"step", "event": "save"}] or, with the reason in "text", "save_failed". Waits for
        nothing."""
        if self.under_way is not None and self.under_way[1].done():
            self.wait()
        events, self.events = self.events, []
        return events

    def _write(self, step, tree, event=None):
        if event is not None:
            event.synchronize()
        save(self.out_dir, step, tree, self.keep, self.keep_every, self.group)

    def _finish(self, step, result, last=False):
        try:
            self.saved = None
            result()
            self.saved = step
            self.events.append({"step": step, "event": "save"})
        except OSError as error:
            if last:
                raise
            self.events.append({"step": step, "event": "save_failed", "text": str(error)})


def _step_back():
    # At 0 or 10 a step on a CPU, whose cores are all at work, takes 12 % longer
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


# ---- what is kept --------------------------------------------------------------------------------


def found(out_dir) -> list[tuple[int, bool, Path]]:
    """[(step, False for .old-, path)], oldest first; other names in the folder are not ours."""
    paths = Path(out_dir).iterdir() if Path(out_dir).is_dir() else ()
    matches = [(FOLDER.fullmatch(path.name), path) for path in paths]
    return sorted((int(m[2]), m[1] is None, path) for m, path in matches if m and path.is_dir())


def prune(
    out_dir, keep: int | None, upto: int | None = None, keep_every: int | None = None
) -> None:
    """Delete all but the newest `keep` checkpoints (None keeps all) and those whose step is a
    multiple of `keep_every`, and what killed runs left half-written.

    Those after step `upto` are neither counted nor deleted: a run that fell back behind damaged
    checkpoints must not delete, as too old, the good one it has just saved.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep}: keep at least 1 checkpoint, or none to keep them all")
    there = found(out_dir)
    steps = sorted({step for step, _, _ in there if upto is None or step <= upto})
    too_old = {
        step for step in (steps[:-keep] if keep else []) if not keep_every or step % keep_every
    }
    replaced = {step for step, current, _ in there if current}
    for step, current, path in there:
        if step in too_old or (step in replaced and not current):
            try:  # rename first: a kill while deleting must not leave half a checkpoint
                os.rename(path, path.with_name(f".tmp-{path.name}"))
            except OSError:
                pass  # Windows, while someone reads it; the next save tries again
    for path in Path(out_dir).iterdir():
        if STALE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def drop_after(out_dir, step: int) -> None:
    """Deletes the checkpoints of later steps, which a rollback has left behind; rank 0 does, for
    all."""
    for path in [path for at, _, path in found(out_dir) if at > step] if _rank(None) == 0 else ():
        os.rename(path, path.with_name(f".tmp-{path.name}"))
        shutil.rmtree(path.with_name(f".tmp-{path.name}"), ignore_errors=True)


# ---- files ---------------------------------------------------------------------------------------


def write_tensors(path, tensors: dict) -> dict:
    """Write a safetensors file: 8 bytes that give the header's length, the header in JSON, the
    data.

    By hand: the library's writer needs a second copy of all that shares memory or sits on a GPU,
    and its file would have to be read again for the checksum.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    # So that each one is aligned
    tensors = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    for name, t in tensors:
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [begin, end],
        }
    text = as_json(header)
    text += b" " * (-len(text) % 8)
    # any dtype as bytes; one tensor at a time on the host
    data = (t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, t in tensors)
    return write_file(path, chain((len(text).to_bytes(8, "little"), text), data))


def write_file(path, pieces) -> dict:
    """The pieces one after the other, on the disk when this returns: {"sha256", "bytes"} of
    them."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    sync(path)
    return {"sha256": digest.hexdigest(), "bytes": size}


def sync(path):
    if os.name == "posix" or Path(path).is_file():  # Windows cannot open a folder
        handle = os.open(path, os.O_RDWR if Path(path).is_file() else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def as_json(value) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def sha256(data) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- ranks ---------------------------------------------------------------------------------------


def _rank(group):
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def _exchange(value, group):
    """Every rank's JSON value, in rank order; as bytes, for all_gather_object would unpickle
    them."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    data = torch.frombuffer(bytearray(as_json(value)), dtype=torch.uint8).to(device)
    sizes = [
        torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
    longest = max(int(n) for n in sizes)
    rows = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(rows, torch.nn.functional.pad(data, (0, longest - len(data))), group=group)
    return [json.loads(row[:n].cpu().numpy().tobytes()) for row, n in zip(rows, sizes)]
