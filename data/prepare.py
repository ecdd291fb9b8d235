"""Texts and documents -> token shards, by many processes: for what is too large for each start.

    python -m data.prepare FOLDER OUT --tokenizer=gpt2 [--field=text] [--jobs=2] [--held_out=0.01]
                           [--skip_damaged]
    python train.py --data=OUT --tokenizer=gpt2

FOLDER   what --data= takes but shards (data/files.py): .jsonl .jsonl.gz .jsonl.zst .parquet .txt
OUT      train_000000.bin, train_000001.bin, ... and val_000000.bin: each document, then the end of
         text. prepare.json: what went in, and what was counted

    files      a.jsonl ──────────────────  b.parquet ────  c.txt  d.txt
    units      │  0  │  1  │  2  │    3          │   4   │     5      │     divided by size alone
    processes     A     B     A         B            A         B            whoever is free
    OUT        train_000000.bin  train_000001.bin ...                       a shard for each unit

A unit depends on the files alone, and a shard on its unit: any number of processes writes the same
bytes. A shard gets its name when it is whole, and a unit is done when OUT/.prepare has its counts;
after a kill the same command does what is missing. Of packed files each is one unit.

Held out are the files whose names say so (data/files.py); else one document in 100, chosen by its
sha256, whatever else is read. Memory: a unit is read and written document by document; documents
that are held out wait in OUT/.prepare until all is done, and become one shard.

Damaged lines and files end the work, with file and line. --skip_damaged leaves them out, counts
them and writes each sentence into prepare.json. Status: 0 done, 2 for a user's mistake, 1 else.
"""

import argparse
import concurrent.futures as futures
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.documents import Damage, Documents, Part, parts_of
from data.download import making, progress
from data.files import divided, is_shard, listed, relative
from data.pieces import check_end, document_ids
from data.shards import write_shard
from data.tokenizer import Tokenizer

# A corpus has some 64 units, so that all processes end at about the same time. A unit is not too
# small, for each begins with some work, nor too large, for a kill costs what is unfinished.
UNITS = 64
SMALLEST = 2**20  # bytes of files
LARGEST = 2**28
BATCH = 2**17  # ids written at a time
TOLD = 1000  # sentences about damage kept of each unit


@dataclass(frozen=True)
class Job:
    """What all units have in common. held_out: a share; None where names say what is held out."""

    out: Path
    tokenizer: str
    field: str
    held_out: float | None
    skip_damaged: bool

    @property
    def work(self) -> Path:
        return self.out / ".prepare"


class Stopped(Exception):
    """Another unit has failed, or somebody pressed Ctrl-C."""


# ---- what is to do -------------------------------------------------------------------------------
def units_of(files: dict[str, list[Path]]) -> list[tuple[str, list[Part]]]:
    """("train" or "val", parts of files) of each unit: a function of the files alone."""
    total = sum(path.stat().st_size for paths in files.values() for path in paths)
    size = min(max(total // UNITS, SMALLEST), LARGEST)
    units = []
    for split, paths in files.items():
        parts = []
        for path in paths:
            for part in parts_of(path, size):
                # A part that would make the unit much larger begins the next one.
                if parts and sum(p.size for p in parts) + part.size > size:
                    units.append((split, parts))
                    parts = []
                parts.append(part)
        if parts:
            units.append((split, parts))
    return units


def plan_of(job: Job, tokenizer: Tokenizer, files: dict[str, list[Path]]) -> dict:
    """All that decides the bytes of the shards, to be compared when the work is resumed.

    Not skip_damaged: a unit that was done without it has no damage.
    """
    names = relative([path for paths in files.values() for path in paths])
    inputs = []
    for split, paths in files.items():
        for path in paths:
            stat = path.stat()
            inputs.append([split, names[path], stat.st_size, stat.st_mtime_ns])
    return {
        "tokenizer": tokenizer.key,
        "field": job.field,
        "held_out": job.held_out,
        "inputs": inputs,
    }


def check_plan(job: Job, plan: dict) -> bool:
    """Is all done already? Raises ValueError where OUT was begun from something else."""
    for path in (job.out / "prepare.json", job.work / "plan.json"):
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            for name, value in plan.items():
                if before.get(name) != value:
                    what = f"--{name}={before.get(name)}"
                    if name == "inputs":
                        what = "other files, or files that have changed since"
                    raise ValueError(
                        f"{job.out} was begun with {what}: take another folder, or delete this one"
                    )
            return path.name == "prepare.json"
    strangers = {path.name for path in job.out.glob("*")} - {job.work.name}
    if strangers:
        raise ValueError(
            f"{job.out} has files of another origin, {min(strangers)}: take a new folder"
        )
    job.work.mkdir(parents=True, exist_ok=True)
    write_json(job.work / "plan.json", plan)
    return False


def write_json(path: Path, content: dict) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


# ---- a unit, in a process of its own -------------------------------------------------------------
class Unit:
    """Makes one shard, and says how far it is. shared: bytes read by all, and a wish to stop."""

    def __init__(self, job: Job, tokenizer: Tokenizer, index: int, split: str, parts, shared):
        self.job = job
        self.tokenizer = tokenizer
        self.split = split
        self.parts = parts
        self.shared = shared
        self.name = f"{index:06d}"
        self.counts = dict.fromkeys(
            ("documents", "tokens", "bytes", "val_documents", "val_tokens", "empty", "damaged"), 0
        )
        self.said = []

    def make(self) -> None:
        """Writes the shard, then the counts, by which the unit is done. Raises ValueError."""
        done = self.job.work / f"{self.name}.json"
        shard = self.job.out / f"train_{self.name}.bin"
        held_out = self.job.work / f"{self.name}.val"
        # Whoever was killed may have left a process that is still at it.
        with making(done) as missing:
            if not missing:
                return
            try:
                with open(held_out, "wb") as self.val:
                    write_shard(shard, self.batches(), self.tokenizer.n_vocab)
            except BaseException:
                shard.with_name(shard.name + ".tmp").unlink(missing_ok=True)
                held_out.unlink(missing_ok=True)
                raise
            if not self.counts["tokens"]:
                shard.unlink()
            write_json(done, self.counts | {"said": self.said})

    def batches(self) -> Iterator[np.ndarray]:
        """(N,) ids to train on, of many documents at a time; the others go to self.val."""
        waiting = []
        n_waiting = 0
        for document in self.documents():
            held_out = self.is_held_out(document)
            self.counts["bytes"] += len(document)
            self.counts["val_documents" if held_out else "documents"] += 1
            # A document may be larger than the memory, its pieces are not.
            for ids in document_ids(str(self.job.out), document, self.tokenizer):
                self.counts["val_tokens" if held_out else "tokens"] += len(ids)
                if held_out:
                    self.val.write(ids.astype("<u4").tobytes())
                    continue
                waiting.append(ids)
                n_waiting += len(ids)
                if n_waiting >= BATCH:
                    yield np.concatenate(waiting)
                    waiting = []
                    n_waiting = 0
        if waiting:
            yield np.concatenate(waiting)

    def is_held_out(self, document) -> bool:
        if self.job.held_out is None:
            return self.split == "val"
        drawn = int.from_bytes(hashlib.sha256(document).digest()[:8], "big")
        return drawn < self.job.held_out * 2**64

    def documents(self) -> Iterator:
        """Those that have text. Raises ValueError for a damaged one that may not be skipped."""
        any_bytes = self.tokenizer.name == "bytes"
        for part in self.parts:
            documents = Documents(part, self.job.field, any_bytes)
            told = 0
            for document in documents:
                if documents.done - told >= 2**18:
                    self.advance(documents.done - told)
                    told = documents.done
                if isinstance(document, Damage):
                    self.on_damage(document)
                elif len(document) == 0:
                    self.counts["empty"] += 1
                else:
                    yield document
            self.advance(part.size - told)

    def on_damage(self, sentence: str) -> None:
        if not self.job.skip_damaged:
            raise ValueError(
                f"{sentence}; mend it, name another field by --field=, or leave such out by "
                "--skip_damaged"
            )
        self.counts["damaged"] += 1
        if len(self.said) < TOLD:
            self.said.append(str(sentence))

    def advance(self, n_bytes: int) -> None:
        n_read, stop = self.shared
        with n_read.get_lock():
            n_read.value += n_bytes
        if stop.value:
            raise Stopped


def start_process(job: Job, shared) -> None:
    """What a process does once."""
    global PROCESS
    # Ctrl-C reaches all processes of a terminal: the first one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=die_with_parent, daemon=True).start()
    PROCESS = (job, Tokenizer(job.tokenizer), shared)


def die_with_parent() -> None:
    """Nobody reads what a process writes whose parent was killed; a new run does it again."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def make_unit(index: int, split: str, parts: list[Part]) -> None:
    job, tokenizer, shared = PROCESS
    Unit(job, tokenizer, index, split, parts, shared).make()


# ---- all of them ---------------------------------------------------------------------------------
def run(job: Job, tokenizer: Tokenizer, units: list, jobs: int) -> None:
    """Makes what is missing. Raises the first unit's fault."""
    spawn = multiprocessing.get_context("spawn")
    shared = (spawn.Value("q", 0), spawn.Value("b", 0))
    missing = []
    total = 0
    for index, (split, parts) in enumerate(units):
        if not (job.work / f"{index:06d}.json").exists():
            missing.append((index, split, parts))
            total += sum(part.size for part in parts)
    with progress(f"{len(missing)} of {len(units)} units", total) as bar:
        if jobs == 1 or len(missing) < 2:
            for unit in missing:
                Unit(job, tokenizer, *unit, shared).make()
                bar.update(shared[0].value - bar.n)
            return
        with futures.ProcessPoolExecutor(
            min(jobs, len(missing)), spawn, start_process, (job, shared)
        ) as pool:
            try:
                waiting = [pool.submit(make_unit, *unit) for unit in missing]
                todo = waiting
                while todo:
                    done, todo = futures.wait(todo, 0.2, futures.FIRST_EXCEPTION)
                    bar.update(shared[0].value - bar.n)
                    if any(unit.exception() for unit in done):
                        break
            finally:
                # Those that run end soon, those that wait never begin.
                shared[1].value = 1
                pool.shutdown(cancel_futures=True)
        for unit in waiting:
            fault = None if unit.cancelled() else unit.exception()
            if fault and not isinstance(fault, Stopped):
                raise fault


def finish(job: Job, tokenizer: Tokenizer, plan: dict, n_units: int) -> dict:
    """Writes what is held out and prepare.json; returns its counts. Raises ValueError."""
    counts = {}
    said = []
    names = [f"{i:06d}" for i in range(n_units)]
    for name in names:
        found = json.loads((job.work / f"{name}.json").read_text(encoding="utf-8"))
        said += found.pop("said")
        for what, n in found.items():
            counts[what] = counts.get(what, 0) + n
    for which, n in (("to train on", counts["tokens"]), ("held out", counts["val_tokens"])):
        if not n:
            raise ValueError(
                f"of {counts['documents'] + counts['val_documents']} documents none is {which}: "
                f"delete {job.out}, and take another share, --held_out=0.2, or name a file val"
            )

    def pieces() -> Iterator[np.ndarray]:
        for name in names:
            with open(job.work / f"{name}.val", "rb") as file:
                while raw := file.read(2**20):
                    yield np.frombuffer(raw, "<u4")

    write_shard(job.out / "val_000000.bin", pieces(), tokenizer.n_vocab)
    write_json(job.out / "prepare.json", plan | {"counts": counts, "skipped": said})
    shutil.rmtree(job.work)
    return counts


def prepare(
    data: str,
    out: str,
    tokenizer: str,
    field: str = "text",
    jobs: int = 1,
    held_out: float = 0.01,
    skip_damaged: bool = False,
) -> dict:
    """Makes the shards, or what is missing of them; returns the counts. Raises ValueError."""
    try:
        return _prepare(
            data, Path(os.path.expanduser(out)), tokenizer, field, jobs, held_out, skip_damaged
        )
    except BrokenProcessPool:
        raise ValueError(
            "a process was killed, perhaps for want of memory: type the same command again, with "
            "a smaller --jobs=; it continues"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"{error}: what is done is kept in {out}") from error
        raise ValueError(
            f"the disk of {out} is full: make room and type the same command again; it continues"
        ) from error


def _prepare(
    data: str, out: Path, tokenizer: str, field: str, jobs: int, held_out: float, skip_damaged: bool
) -> dict:
    files = listed(data)
    if not files:
        raise ValueError(f"{data} does not exist: give a folder, a file, or a list a.jsonl,b.jsonl")
    if any(map(is_shard, files)):
        raise ValueError(f"{data} has token shards already: type --data={data} to train on them")
    chosen = Tokenizer(tokenizer)
    if chosen.name == "ids":
        raise ValueError("--tokenizer=ids makes no tokens of text: name the tokenizer")
    check_end(data, chosen)
    split = divided(data, files)
    share = None if "val" in split else held_out
    job = Job(out, tokenizer, field, share, skip_damaged)
    plan = plan_of(job, chosen, split)
    if check_plan(job, plan):
        shutil.rmtree(job.work, ignore_errors=True)  # if the end was a kill
        return json.loads((job.out / "prepare.json").read_text(encoding="utf-8"))["counts"]
    units = units_of(split)
    run(job, chosen, units, jobs)
    return finish(job, chosen, plan, len(units))


# ---- the command ---------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}; usage: python -m data.prepare FOLDER OUT --tokenizer=gpt2")


def arguments(words: list[str] | None) -> argparse.Namespace:
    """Raises ValueError."""
    parser = Parser(
        prog="python -m data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("data", metavar="FOLDER")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--tokenizer", required=True, help="as train.py's --tokenizer=")
    parser.add_argument("--field", default="text", help="where .jsonl and .parquet have the text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument("--held_out", type=float, default=0.01, help="share of documents (0.01)")
    parser.add_argument("--skip_damaged", action="store_true", help="leave damaged lines out")
    found = parser.parse_args(words)
    if found.jobs < 1:
        parser.error(f"--jobs={found.jobs}: 1 or more")
    if not 0 < found.held_out < 1:
        parser.error(f"--held_out={found.held_out}: a share between 0 and 1")
    return found


def main(words: list[str] | None = None) -> int:
    began = time.perf_counter()
    try:
        given = arguments(words)
        counts = prepare(**vars(given))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - began
    print(
        f"{given.out}: {counts['documents']:,} documents, {counts['tokens']:,} tokens to train on; "
        f"{counts['val_documents']:,} documents, {counts['val_tokens']:,} tokens held out; "
        f"{counts['empty']:,} empty, {counts['damaged']:,} damaged left out; "
        f"{counts['bytes'] / 1e6:,.1f} MB of text in {seconds:,.1f} s"
    )
    print(f"python train.py --data={given.out} --tokenizer={given.tokenizer}")
    return 0


if __name__ == "__main__":
    from metrics.outlets import command

    command("data.prepare", main)
