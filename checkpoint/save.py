"""Writing checkpoints beside training: a step waits for a copy of the state, not for the disk.

    training     step 99   step 100  copy  step 101   step 102   step 103   step 104   step 105
                                        │                                       ▲
    background                          └► describe  write, sync  rename  prune ┘ event: save
    on the disk  step-50 ............................................. step-50 and step-100

The copy is this rank's part of the checkpoint once more, in host memory until the save is done. On
a GPU it is queued behind the step into pinned memory: the GPU makes it in its turn, Python does not
wait. Hashing and writing let other threads run: they hold no interpreter lock, and have a low
priority where the system lets a thread have its own.

In a save each rank speaks to rank 0 twice and hears whether all are well: before it writes, and
when it has written. The first save, and any before which somebody's tensors have changed in name,
shape, dtype or place, has two more such rounds, from which rank 0 makes the plan
(checkpoint/plan.py). A Saver has a process group of its own, for in training's group these
messages would mix with the gradients. A save that is due while another one is under way waits for
it.

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

from checkpoint.exchange import broadcast, gather, rank_in, star, world_of
from checkpoint.plan import Share, describe, merge, with_values
from checkpoint.slices import DTYPE_NAMES, as_json, copied, sha256

FORMAT = 2  # of the index
# Replacing a checkpoint takes two renames. A kill between them leaves the old, still good one under
# the name .old-step-N.
FOLDER = re.compile(r"(\.old-)?step-([0-9]{8}|[1-9][0-9]{8,})")
FILE = re.compile(r"rank_(0|[1-9][0-9]{0,8})\.safetensors")
# What a killed run left half-written, or half-deleted.
STALE = re.compile(r"\.tmp-(\.old-)?step-[0-9]{8,}")
ASIDE = 2**20  # bytes of a piece whose hashing is worth a thread: about 0.6 ms
AHEAD = 2**24  # bytes written between two words to the disk to begin


def save(
    out_dir,
    step: int,
    tree: dict,
    keep: int | None = None,
    keep_every: int | None = None,
    group=None,
    share: Share | None = None,
) -> Path:
    """Writes `tree` to OUT_DIR/step-N, then deletes old checkpoints, see `prune`.

    tree: nested dicts and lists of tensors, Slices, DTensors, numbers, str, bool, None; tuples
    become lists. With several ranks (of `group`; None = all) each calls with its own tree, or {},
    and the trees are merged; what several hold (the same shard of the same name, or a scalar) is
    taken from the lowest rank. If any rank fails, all raise (ValueError: such a tree cannot be
    saved; OSError: anything else) and earlier checkpoints stay as they were.

    share: kept by the caller from save to save, so that only the first one, and those before which
    a name, shape, dtype or shard has changed on some rank, describe who holds what.
    """
    # A step ends on all ranks before the next begins: rank 0 makes the folder in which all write,
    # and publishes only what all have written.
    writer = Writer(Path(out_dir), step, group, share or Share())
    is_planned = writer.on_all_ranks(lambda: writer.describe(tree, keep), all)
    plan = None
    if not is_planned:
        speakers = writer.on_all_ranks(writer.boxes, writer.choose_speakers)
        plan = writer.on_all_ranks(lambda: writer.form(speakers), writer.merge)
    writer.on_all_ranks(
        lambda: writer.write(plan), lambda written: writer.publish(written, keep, keep_every)
    )
    return writer.folder


class Writer:
    """The steps of one save. In each, every rank tells rank 0 something, and hears an answer.

    What a step returns is JSON.
    """

    def __init__(self, out_dir: Path, step: int, group, share: Share):
        self.out_dir = out_dir
        self.step = step
        self.group = group
        self.rank = rank_in(group)
        self.share = share
        name = f"step-{step:08d}"
        self.folder = out_dir / name
        self.temporary = out_dir / f".tmp-{name}"
        self.old = out_dir / f".old-{name}"
        self.description = None  # of what this rank holds
        self.heard = []  # on rank 0: [key of its form, boxes, numbers] of each rank

    def describe(self, tree: dict, keep: int | None) -> bool:
        """Looks at what this rank holds. Is it what the last plan was made from?"""
        if self.rank == 0:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            # With upto=-1 it deletes only what killed runs left: the disk may need that space.
            prune(self.out_dir, keep, upto=-1)
            self.temporary.mkdir()
        self.description = describe(tree)
        return self.description.digest() == self.share.digest

    def boxes(self) -> list:
        """The short part of this rank's description."""
        d = self.description
        return [d.form_key(), d.boxes, d.numbers]

    def choose_speakers(self, heard: list) -> list[int]:
        """Rank 0: of the ranks with the same form the lowest, who tells it for all of them."""
        self.heard = heard
        first = {}
        for rank, (key, _, _) in enumerate(heard):
            first.setdefault(key, rank)
        return list(first.values())

    def form(self, speakers: list[int]) -> list | None:
        """The long part of this rank's description, if it is to speak."""
        return self.description.form if self.rank in speakers else None

    def merge(self, forms: list) -> dict:
        """Rank 0: the plan."""
        return merge(
            self.heard, {key: form for (key, _, _), form in zip(self.heard, forms) if form}
        )

    def write(self, plan: dict | None) -> list:
        """This rank's file, where the plan takes something from it: [its facts, the values]."""
        if plan is not None:
            self.share.take(plan, self.rank, self.description.digest())
        mine = {name: self.description.held[name].tensor for name in self.share.writes}
        facts = write_tensors(self.temporary / file_of(self.rank), mine) if mine else None
        return [facts, [self.description.values[name] for name in self.share.brings]]

    def publish(self, written: list, keep: int | None, keep_every: int | None) -> None:
        """Rank 0, for all: the index, the folder's final name; then old checkpoints may go."""
        plan = self.share.plan
        files = {file_of(rank): facts for rank, (facts, _) in enumerate(written) if facts}
        body = {
            "format": FORMAT,
            "step": self.step,
            "world": len(written),
            "files": write_file(self.temporary / "files.json", [as_json(files)]),
            "tensors": plan["tensors"],
            "shardings": plan["shardings"],
            "tree": with_values(plan, [values for _, values in written]),
        }
        # The index comes last: without it the folder is no checkpoint.
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

    def on_all_ranks(self, work: Callable, answer: Callable):
        """answer(what work() returned on each rank): rank 0 works it out, and all ranks get it.

        Where one of them failed, all raise.
        """
        message, cause = self.attempt(work)
        messages = gather(message, self.group)
        verdict = None
        if messages is not None:
            verdict = next((m for m in messages if json.loads(m)[1] is not None), None)
            if verdict is None:
                results = [json.loads(m)[0] for m in messages]
                verdict, cause = self.attempt(lambda: answer(results))
        result, sentence, tree_is_wrong = json.loads(broadcast(verdict, self.group))
        if sentence is None:
            return result
        if self.rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
        raise self.failure(sentence, tree_is_wrong) from cause

    def attempt(self, work: Callable) -> tuple[bytes, Exception | None]:
        """[work(), None, None] as JSON; where it fails [None, why, is the tree wrong?]."""
        try:
            return as_json([work(), None, None]), None
        except Exception as error:
            # Whatever it is, the other ranks must hear of it: they would wait for ever.
            sentence = str(error)
            if not isinstance(error, ValueError | OSError):
                sentence = f"{type(error).__name__}: {error}"
            if world_of(self.group) > 1:
                sentence = f"rank {self.rank}: {sentence}"
            return as_json([None, sentence, isinstance(error, ValueError)]), error

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
        self.share = Share()  # of this rank in the last plan
        self.group = None
        self.pool = None
        self.under_way = None  # (step, future)
        if asynchronous:
            self.pool = ThreadPoolExecutor(1, "saving", initializer=_lower_priority)
        if world_of(None) > 1:
            # An hour: a slow disk is no deadlock. A rank that dies is noticed at once.
            self.group = star(timedelta(hours=1))

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
        save(self.out_dir, step, tree, self.keep, self.keep_every, self.group, self.share)

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


def file_of(rank: int) -> str:
    return f"rank_{rank}.safetensors"


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
    if rank_in(None) != 0:
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
    under_way = 0  # of these bytes, so many are on their way to the disk
    with open(path, "wb") as file:
        for piece in pieces:
            # Hashing takes longer than handing a piece to the system: both at once, and no further
            # piece in memory. Not a pool, which takes no work once the program is ending.
            if len(piece) >= ASIDE:
                hashing = threading.Thread(target=digest.update, args=(piece,))
                hashing.start()
                try:
                    file.write(piece)
                finally:
                    hashing.join()
            else:
                digest.update(piece)
                file.write(piece)
            size += len(piece)
            if size - under_way >= AHEAD:
                start_writing(file, under_way, size - under_way)
                under_way = size
    sync(path)
    return {"sha256": digest.hexdigest(), "bytes": size}


def start_writing(file, begin: int, n_bytes: int) -> None:
    """The disk begins with these bytes of the file, and the final sync finds them written.

    Where the system cannot be asked, it begins at the sync.
    """
    if hasattr(os, "posix_fadvise"):
        # Linux writes what is to be dropped from its cache, without waiting. What it is writing, it
        # cannot drop.
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), begin, n_bytes, os.POSIX_FADV_DONTNEED)


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
