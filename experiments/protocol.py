"""What all experiments share: rows that are measured once and kept.

    GRID   a list of dicts, the keys of each row: {"precision": "bf16", "seed": 2}
    row    keys -> the figures of that row: {"val_loss": 1.338}; NaN is a figure, an exception is
           none
    csv    a line for each row: keys and figures, when, where and at which commit it was measured

    python -m experiments.NAME     measures what the csv lacks, then writes NAME.md and NAME.png
                      --quick      the small grid, short runs, in a folder of its own
                      --out=DIR    there, instead of experiments/results
                      --jobs=N     rows at a time: as many as there are cores, 1 where time is
                                   measured

Each row is a process of its own, so memory and time are its own, and a patch to a module ends with
it. It has one thread: two such rows at a time get more done than one with two threads. Where time
is measured it has all cores. A row that was killed is measured again, and the csv is replaced as a
whole, never half written.

An experiment is a docstring (Claim, Source, Protocol, Expected: written before it ran), a grid, a
row function, and a table, a picture and a verdict that look at the figures and nothing else
(findings.py):

    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
"""

import csv
import hashlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

import train
from data import corpora
from experiments import findings
from metrics import logger
from metrics.outlets import reader_may_leave
from run import control
from settings import parse

HERE = Path(__file__).resolve().parent
ROOT, RESULTS, CACHE = HERE.parent, HERE / "results", HERE.parent / "data_cache"
CONTEXT = ("seconds", "date", "machine", "commit")  # the last columns of every csv
# Its own is shared by forks: one killed as it writes would stop the others
tqdm.set_lock(threading.RLock())
START = "fork" if sys.platform == "linux" else "spawn"  # 0.05 s against 3 s


# ---- for row functions ---------------------------------------------------------------------------
def train_run(ranks: int = 1, **fields) -> list[dict]:
    """train.py with these fields (a dotted one as **{"fp8.scaling": "row"}), in this process, or in
    `ranks` of one thread each: all rows of its metrics.jsonl. It saves at the end alone, and
    nothing stays unless out_dir is given. With several ranks this process must not have used more
    than one thread before.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        usual = dict(
            out_dir=f"{folder}/run",
            data_dir=CACHE,
            save_every=0,
            sample_tokens=0,
            on_spike="none",
            on_nonfinite="none",
        )  # what happens, happens
        fields = usual | fields
        words = as_words(fields)
        if ranks == 1:
            train.main(parse.parse(words))
        else:
            mp.start_processes(
                one_rank, (ranks, words, f"{folder}/store"), ranks, start_method=START
            )
        return logger.read_metrics(Path(fields["out_dir"], "metrics.jsonl"))


def as_words(fields: dict) -> list[str]:
    """These fields of train.py as its command line has them."""
    texts = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in fields.items()}
    return [f"--{name}={text}" for name, text in texts.items()]


def one_rank(rank: int, ranks: int, words: list[str], store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=5),
    )
    train.main(parse.parse(words))
    dist.barrier()
    os._exit(0)  # without the interpreter's teardown, where gloo's threads may abort


def curve(rows: list[dict], name: str = "loss") -> list[float]:
    """The values that a run logged under this name; what was not finite is NaN."""
    return [math.nan if row[name] is None else row[name] for row in rows if name in row]


def tail(rows: list[dict], share: float = 0.1) -> float:
    """Mean training loss of the last tenth of the steps."""
    losses = curve(rows)
    return fmean(losses[-max(1, round(share * len(losses))) :])


# ---- rows, kept ----------------------------------------------------------------------------------
def read(path: Path) -> list[dict]:
    """The rows of a csv. A commit is text: 353e154 is no number."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: text if name in CONTEXT[1:] else value(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def value(text: str):
    """A cell: none, a number (NaN, Infinity too), true or false, a list, else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text or None


def write(path: Path, rows: list[dict]) -> None:
    names = [*dict.fromkeys(name for row in rows for name in row if name not in CONTEXT), *CONTEXT]
    with open(path.with_suffix(".tmp"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            cells = (row.get(name) for name in names)
            writer.writerow(
                ["" if c is None else c if isinstance(c, str) else json.dumps(c) for c in cells]
            )
    os.replace(path.with_suffix(".tmp"), path)  # a kill leaves the old one whole


def measure(row, keys: dict, quick: bool, threads: int, answer, log: str) -> None:
    """In a process of its own: sends the row's figures, or why there are none. Dies with its
    parent."""
    parent, alone = multiprocessing.parent_process().pid, hasattr(os, "setsid")
    if alone:
        os.setsid()  # one group with the ranks it may start, to be killed as a whole

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL) if alone else os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    try:
        answer.send((row(dict(keys), quick), ""))
    except BaseException:
        answer.send((None, traceback.format_exc()))


def measured(
    row,
    missing: list[dict],
    quick: bool,
    jobs: int,
    threads: int,
    bar: tqdm,
    until: float = math.inf,
):
    """Yields (keys, figures or None, why, seconds) of each row as it ends, `jobs` at a time. Rows
    that still run at `until`, a time.monotonic(), are stopped, and yield nothing."""
    context, waiting, running = multiprocessing.get_context(START), [*missing], {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            while (waiting or running) and time.monotonic() < until:
                while waiting and len(running) < jobs:
                    keys, (ours, theirs) = waiting.pop(0), context.Pipe(duplex=False)
                    arguments = (row, keys, quick, threads, theirs, f"{folder}/{len(waiting)}.log")
                    process = context.Process(target=measure, args=arguments)
                    process.start()
                    theirs.close()  # so that its end is seen here
                    running[ours] = process, keys, time.monotonic()
                wait_s = min(1.0, max(0.0, until - time.monotonic()))
                for ours in multiprocessing.connection.wait([*running], timeout=wait_s):
                    try:
                        figures, why = ours.recv()
                    except EOFError:
                        figures, why = None, "its process was killed"
                    process, keys, began = running.pop(ours)
                    process.join()
                    yield keys, figures, why, time.monotonic() - began
                if sys.stderr.isatty():
                    bar.refresh()  # time passes during a long row too
        finally:
            for process, _, _ in running.values():
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except (AttributeError, ProcessLookupError):  # Windows; not a group of its own yet
                    process.kill()
                process.join()


# ---- the command ---------------------------------------------------------------------------------
@reader_may_leave()
def main(
    doc: str,
    file: str,
    grid: list[dict],
    small: list[dict],
    row,
    table,
    picture,
    verdict,
    timed: bool = False,
) -> None:
    """`python -m experiments.NAME`, which it ends: 0, 1 where a row has no figures, 2 for a bad
    flag.

    row(keys, quick) -> figures; table(rows) -> markdown; picture(rows, figure) draws on a
    matplotlib Figure; verdict(rows) -> (one of findings.VERDICTS, one number as text, why as a
    sentence). timed: row by row.
    """
    words, name = sys.argv[1:], Path(file).stem
    if "--help" in words:
        print(doc)
        sys.exit(0)
    given = dict(word.partition("=")[::2] for word in words)
    quick, cores = "--quick" in given, os.cpu_count() or 1
    home = Path(given.get("--out") or (tempfile.mkdtemp(prefix=f"{name}-") if quick else RESULTS))
    try:
        for word in words:
            if not re.fullmatch(r"--quick|--out=.+|--jobs=[1-9]\d*", word):
                raise ValueError(
                    f"{word} is not understood; there are --quick, --out=DIR and --jobs=N"
                )
        if quick and home.resolve() == RESULTS:
            raise ValueError(f"--quick measures too little for {RESULTS}; take another --out=DIR")
        grid, path = small if quick else grid, home / f"{name}.csv"
        lock = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
        # One process for a csv
        lock = control.RunLock(Path(tempfile.gettempdir(), f"nanoscale-{lock}"))
    except ValueError as error:
        print(f"{name}.py: {error}", file=sys.stderr)
        sys.exit(2)
    home.mkdir(parents=True, exist_ok=True)
    jobs = int(given.get("--jobs", 1 if timed else cores))
    torch.set_num_threads(1)  # who forks must not have used more
    corpora.load("python", "bytes", str(CACHE))  # rows at the same time find the cache filled

    def key(one: dict) -> tuple:
        return tuple(str(value(str(one.get(part)))) for part in grid[0])

    wanted, kept = {key(keys): keys for keys in grid}, {key(one): one for one in read(path)}
    missing, here, failed = [keys for k, keys in wanted.items() if k not in kept], place(), 0
    tqdm.monitor_interval = 0  # no thread beside a fork
    with tqdm(
        total=len(wanted), initial=len(wanted) - len(missing), unit="row", smoothing=0
    ) as bar:
        for keys, figures, why, seconds in measured(
            row, missing, quick, jobs, cores if timed else 1, bar
        ):
            shown = " ".join(f"{part}={keys[part]}" for part in keys)
            if figures is None:
                bar.write(f"{shown}: no figures: {why}", file=sys.stderr)
                failed += 1
                continue
            kept[key(keys)] = keys | figures | here | {"seconds": round(seconds, 1)}
            # Of another grid: kept, not shown
            rest = [one for k, one in kept.items() if k not in wanted]
            write(path, [kept[k] for k in wanted if k in kept] + rest)
            numbers = [f"{n} {v:.5g}" for n, v in figures.items() if isinstance(v, (int, float))]
            bar.write(f"{shown}  {'  '.join(numbers[:4])}  {seconds:.0f} s", file=sys.stderr)
            bar.update()
    rows = [kept[k] | keys for k, keys in wanted.items() if k in kept]
    findings.report(doc, name, home, rows, len(wanted), quick, table, picture, verdict)
    lock.release()
    sys.exit(int(failed > 0))


def place() -> dict:
    """What all rows of this command share: day, machine, commit; + where files differ from it."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return found.stdout.strip()

    changed = git("status", "--porcelain", "-uno", "--", ".", ":!experiments/results", ":!*.md")
    commit = (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed)
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpu.read_text()) if cpu.exists() else None
    cores = f"{model[1].strip() if model else platform.machine()}, {os.cpu_count()} cores"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{cores}, torch {torch.__version__}",
        "commit": commit,
    }
