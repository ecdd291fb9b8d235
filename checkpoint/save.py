"""Writing checkpoints beside training: a step waits for a copy of the state, not for the disk.

    training     step 99   step 100  copy  step 101   step 102   step 103   step 104   step 105
                                        │                                       ▲
    background                          └► describe  write, sync  rename  prune ┘ event: save
    on the disk  step-50 ............................................. step-50 and step-100

The copy is this rank's part of the checkpoint once more, in host memory until the save is done. On
a GPU it is queued behind the step into pinned memory: the GPU makes it in its turn, Python does not
wait. Hashing and writing let other threads run: they hold no interpreter lock, and have a low
priority where the system lets a thread have its own.

The ranks exchange messages three times in a save: who holds what, who could write, is it published.
In the background they use a process group of their own, for in training's group these messages
would mix with the gradients. A save that is due while another one is under way waits for it.

Whoever leaves a run over the weekend wants it to continue when the disk is full. So a save that
fails is an event, earlier checkpoints are as they were, and the next save tries again. Only the
last save of a run raises.

    save(...)                             one checkpoint, now, on all ranks
    saver = Saver(...)                    made by all ranks, and used by all: save, wait
    saver.save(step, tree)                returns after the copy; tree may change from now on
    saver.pop_events()                    what became of the saves since the last call
    saver.save(step, tree, last=True)     returns when it is on the disk; OSError where that fails
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint.slices import DTYPE_NAMES, copied, merge, to_json, walk

FORMAT = 1  # of the index
# Replacing a checkpoint takes two renames. A kill between them leaves the old, still good one under
# the name .old-step-N.
FOLDER = re.compile(r"(\.old-)?step-([0-9]{8}|[1-9][0-9]{8,})")
FILE = re.compile(r"rank_[0-9]+\.safetensors")
# What a killed run left half-written, or half-deleted.
STALE = re.compile(r"\.tmp-(\.old-)?step-[0-9]{8,}")


def save(
    out_dir,
    step: int,
    tree: dict,
    keep: int | None = None,
    keep_every: int | None = None,
    group=None,
) -> Path:
    """Writes `tree` to OUT_DIR/step-N, then deletes old checkpoints, see `prune`.

    tree: nested dicts and lists of tensors, Slices, DTensors, numbers, str, bool, None; tuples
    become lists. With several ranks (of `group`; None = all) each calls with its own tree, or {},
    and the trees are merged; what several hold (the same shard of the same name, or a scalar) is
    taken from the lowest rank. If any rank fails, all raise (ValueError: such a tree cannot be
    saved; OSError: anything else) and earlier checkpoints stay as they were.
    """
    # A step ends on all ranks before the next begins: rank 0 makes the folder in which all write,
    # and publishes only what all have written.
    writer = Writer(Path(out_dir), step, group)
    described = writer.on_all_ranks(lambda: writer.describe(tree, keep))
    written = writer.on_all_ranks(lambda: writer.write(described))
    writer.on_all_ranks(lambda: writer.publish(written, keep, keep_every))
    return writer.folder


class Writer:
    """The three steps of one save; after each of them the ranks exchange what came of it.

    What a step returns is JSON.
    """

    def __init__(self, out_dir: Path, step: int, group):
        self.out_dir = out_dir
        self.step = step
        self.group = group
        self.rank = _rank(group)
        name = f"step-{step:08d}"
        self.folder = out_dir / name
        self.temporary = out_dir / f".tmp-{name}"
        self.old = out_dir / f".old-{name}"
        self.held = {}  # name -> this rank's Slice
        self.plan = {}  # "tensors" and "tree" of the index, the same on all ranks

    def describe(self, tree: dict, keep: int | None) -> tuple:
        """What this rank holds: the tree's skeleton, and name -> the shard of each tensor."""
        if self.rank == 0:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            # With upto=-1 it deletes only what killed runs left: the disk may need that space.
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
        """This rank's file: what the plan takes from this rank; None where that is nothing."""
        # Every rank has the same descriptions, and so makes the same plan: nobody sends it.
        self.plan.update(merge(described))
        file = f"rank_{self.rank}.safetensors"
        mine = {}
        for name, entry in self.plan["tensors"].items():
            if any(s["file"] == file for s in entry["slices"]):
                mine[name] = self.held[name].tensor
        return write_tensors(self.temporary / file, mine) if mine else None

    def publish(self, written: list, keep: int | None, keep_every: int | None) -> None:
        """Rank 0, for all: the index, the folder's final name; then old checkpoints may go."""
        if self.rank != 0:
            return
        # The index comes last: without it the folder is no checkpoint.
        files = {f"rank_{r}.safetensors": facts for r, facts in enumerate(written) if facts}
        body = {"format": FORMAT, "step": self.step, "files": files, **self.plan}
        index = as_json({"body": body, "sha256": sha256(as_json(body))})
        write_file(self.temporary / "index.json", [index])
        sync(self.temporary)
        # The old checkpoint of this step stays readable until the new one has its name.
        if self.folder.exists():
            shutil.rmtree(self.old, ignore_errors=True)
            os.rename(self.folder, self.old)
        os.rename(self.temporary, self.folder)
        # The new name must be on the disk before older checkpoints go.
        sync(self.out_dir)
        prune(self.out_dir, keep, upto=self.step, keep_every=keep_every)

    def on_all_ranks(self, work: Callable) -> list:
        """The results of all ranks' work(). Where it failed on one rank, all raise."""
        result = None
        cause = None
        sentence = None
        try:
            # Through JSON and back: one rank alone gets lists for tuples too, as if sent.
            result = json.loads(as_json(work()))
        except Exception as error:
            # Whatever it is, the other ranks must hear of it: they would wait for ever.
            cause = error
            sentence = str(error)
            if not isinstance(error, ValueError | OSError):
                sentence = f"{type(error).__name__}: {error}"
        answers = _exchange([result, sentence, isinstance(cause, ValueError)], self.group)
        for rank, (_, sentence, tree_is_wrong) in enumerate(answers):
            if sentence is not None:
                if self.rank == 0:
                    shutil.rmtree(self.temporary, ignore_errors=True)
                if len(answers) > 1:
                    sentence = f"rank {rank}: {sentence}"
                raise self.failure(sentence, tree_is_wrong) from cause
        return [result for result, _, _ in answers]

    def failure(self, sentence: str, tree_is_wrong: bool) -> Exception:
        """ValueError where the tree cannot be saved, OSError where the disk is at fault."""
        message = (
            f"step {self.step} was not saved, {sentence}; "
            f"the earlier checkpoints in {self.out_dir} are as they were"
        )
        if tree_is_wrong:
            return ValueError(message)
        return OSError(f"{message}; see that there is room and that it can be written")


class Saver:
    """The checkpoints of one run.

    every: steps between checkpoints; hours: see `overdue`; keep, keep_every: see `prune`;
    asynchronous: write in the background, as drawn above, or else while training waits.
    """

    def __init__(
        self,
        out_dir,
        every: int | None = None,
        hours: float | None = None,
        keep: int | None = None,
        keep_every: int | None = None,
        asynchronous: bool = True,
    ):
        self.out_dir = out_dir
        self.hours = hours
        self.keep = keep
        self.keep_every = keep_every
        self.intervals = [n for n in (every, keep_every) if n]  # in steps
        self.events = []
        self.saved_at = time.monotonic()
        self.saved = None  # the step of the last save, if it succeeded
        self.group = None
        self.pool = None
        self.under_way = None  # (step, future)
        if asynchronous:
            self.pool = ThreadPoolExecutor(1, "saving", initializer=_lower_priority)
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                # An hour: a slow disk is no deadlock. A rank that dies is noticed at once.
                self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))

    def due(self, step: int) -> bool:
        """Is a checkpoint saved after this step? Steps that are kept for ever are saved, too."""
        return step > 0 and any(step % n == 0 for n in self.intervals)

    def overdue(self) -> bool:
        """Have `hours` passed since the last save by this rank's clock? Clocks of ranks differ."""
        return self.hours is not None and time.monotonic() - self.saved_at >= 3600 * self.hours

    def save(self, step: int, tree: dict, last: bool = False) -> None:
        """Saves `tree`; it may change as soon as this returns.

        last: returns when the checkpoint is on the disk, and raises OSError where that fails.
        """
        self.wait()
        self.saved_at = time.monotonic()
        if last or self.pool is None:
            self._finish(step, lambda: self._write(step, tree), last)
            return
        # Training may change its tensors while the copy is written.
        tree = copied(tree)
        # The GPU passes this event when it has made the copies.
        event = None
        if torch.cuda.is_initialized():
            event = torch.cuda.Event()
            event.record()
        self.under_way = step, self.pool.submit(self._write, step, tree, event)

    def wait(self) -> None:
        """Waits until no save is under way. Raises ValueError where a tree cannot be saved."""
        if self.under_way is not None:
            step, future = self.under_way
            self.under_way = None
            self._finish(step, future.result)

    def drop_after(self, step: int) -> None:
        """Deletes checkpoints after `step`, if the newest save was of `step` and succeeded."""
        self.wait()
        if self.saved == step:
            drop_after(self.out_dir, step)

    def pop_events(self) -> list[dict]:
        """The events since the last call, such as {"step", "event": "save"}. Waits for nothing.

        A save that failed is "save_failed", with the reason in "text".
        """
        if self.under_way is not None:
            _, future = self.under_way
            if future.done():
                self.wait()
        events = self.events
        self.events = []
        return events

    def _write(self, step: int, tree: dict, event=None) -> None:
        if event is not None:
            event.synchronize()
        save(self.out_dir, step, tree, self.keep, self.keep_every, self.group)

    def _finish(self, step: int, result: Callable, last: bool = False) -> None:
        self.saved = None
        try:
            result()
        except OSError as error:
            # After any other save that fails, the next one tries again.
            if last:
                raise
            self.events.append({"step": step, "event": "save_failed", "text": str(error)})
            return
        self.saved = step
        self.events.append({"step": step, "event": "save"})


def _lower_priority() -> None:
    # On a CPU whose cores are all busy, a save at nice 0 lengthens a step by 12 %, at nice 10 by 7
    # to 12 %, at 19 by at most 5 %. Linux alone takes the id of a thread here.
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


# ---- what is kept --------------------------------------------------------------------------------
def found(out_dir) -> list[tuple[int, bool, Path]]:
    """[(step, False where the name begins with .old-, path)], oldest first; skips other names."""
    folder = Path(out_dir)
    checkpoints = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            is_current = match[1] is None
            checkpoints.append((int(match[2]), is_current, path))
    return sorted(checkpoints)


def prune(
    out_dir, keep: int | None, upto: int | None = None, keep_every: int | None = None
) -> None:
    """Deletes old checkpoints, and what killed runs left half-written.

    It keeps the newest `keep` checkpoints (None keeps all), and those whose step is a multiple of
    `keep_every`. Those after step `upto` are neither counted nor deleted: a run that fell back
    behind damaged checkpoints must not delete, as too old, the good one it has just saved.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep}: keep at least 1 checkpoint, or none to keep them all")
    there = found(out_dir)
    steps = sorted({step for step, _, _ in there if upto is None or step <= upto})
    too_old = set()
    for step in steps[:-keep] if keep else []:
        if not keep_every or step % keep_every:
            too_old.add(step)
    replaced = {step for step, is_current, _ in there if is_current}
    for step, is_current, path in there:
        if step in too_old or (step in replaced and not is_current):
            # Rename first: a kill while deleting must not leave half a checkpoint. Windows refuses
            # while somebody reads it, and the next save tries again.
            with contextlib.suppress(OSError):
                os.rename(path, path.with_name(f".tmp-{path.name}"))
    for path in Path(out_dir).iterdir():
        if STALE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def drop_after(out_dir, step: int) -> None:
    """Rank 0, for all: deletes the checkpoints of later steps, which a rollback has undone."""
    if _rank(None) != 0:
        return
    for at, _, path in found(out_dir):
        if at > step:
            doomed = path.with_name(f".tmp-{path.name}")
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


# ---- files ---------------------------------------------------------------------------------------
def write_tensors(path, tensors: dict) -> dict:
    """Writes a safetensors file: the length of its header in 8 bytes, the header in JSON, the data.

    Not by the library: its writer needs a second copy of all that shares memory or sits on a GPU,
    and its file would have to be read again for the checksum. Returns what `write_file` does.
    """
    # The widest numbers first, so that every tensor is aligned.
    tensors = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, t in tensors:
        begin = end
        end = begin + t.numel() * t.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [begin, end],
        }
    text = as_json(header)
    # Spaces up to a multiple of 8, so that the data behind the header are aligned.
    text += b" " * (-len(text) % 8)
    # As bytes, for numpy has no bfloat16. A generator: only one tensor at a time is copied to the
    # host.
    data = (t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, t in tensors)
    return write_file(path, chain((len(text).to_bytes(8, "little"), text), data))


def write_file(path, pieces: Iterable) -> dict:
    """Writes the pieces one after another: they are on the disk when this returns.

    Returns {"sha256", "bytes"} of the file.
    """
    digest = hashlib.sha256()
    size = 0
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    sync(path)
    return {"sha256": digest.hexdigest(), "bytes": size}


def sync(path) -> None:
    """Returns when the file, or the names in the folder, at `path` are on the disk."""
    is_file = Path(path).is_file()
    # Windows cannot open a folder, and syncs a file only through a handle that may write.
    if os.name == "posix" or is_file:
        handle = os.open(path, os.O_RDWR if is_file else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def as_json(value) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def sha256(data) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- ranks ---------------------------------------------------------------------------------------
def _rank(group) -> int:
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def _exchange(value, group) -> list:
    """Every rank's JSON value, in rank order. As bytes: all_gather_object would unpickle them."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    data = torch.frombuffer(bytearray(as_json(value)), dtype=torch.uint8).to(device)
    # The shapes in all_gather must be equal: pad to the longest, and cut by the lengths afterwards.
    size = torch.tensor([len(data)], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    longest = max(int(n) for n in sizes)
    padded = torch.nn.functional.pad(data, (0, longest - len(data)))
    gathered = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return [json.loads(x[:n].cpu().numpy().tobytes()) for x, n in zip(gathered, sizes)]
