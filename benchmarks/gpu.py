"""First light on a GPU: everything that only a GPU can answer, in a few minutes, by order of worth.

    python bench.py gpu [--minutes=5] [--stages=steps,fp8] [--out=DIR] [--nanogpt=CLONE]
    python bench.py gpu --rehearse [...]     the same stages on a CPU, at tiny sizes, in 3 minutes

    stage        what it answers                                               seconds of 300
    steps        is a step on the GPU the CPU's, in every precision; are offloading, sharding,
                 checkpointing, compiling the same step there                  55
    tests        pytest -m gpu, beside `steps`: neither measures time          55
    gpt2         GPT-2 124M, bf16, compiled: tokens/s, MFU, memory beside the estimate; and
                 nanoGPT's own train.py at the same settings, with --nanogpt=  125
    profile      where the time of a step of 124M goes                         25
    fp8          a block in FP8 by tensor, row and block against bf16          50
    optimizers   a step of each on the shapes of 124M and 350M                 20
    attention    kinds, windows, compile modes and CUDA graphs                 25

--minutes is the time of all chosen stages together, shared out in these proportions; the command
takes some seconds more. A rehearsal's limits are three times as long: they are to end a hang.

Each stage is a process of its own in a session of its own. At its time limit it is killed with all
its children, after its stack is in gpu.log; what it leaves of its time the next stages have. So a
stage that fails or hangs costs no other one its results. Every result is on the disk, as a line of
DIR/gpu.jsonl, before the next one is measured. DIR/gpu.md has them as tables, DIR/gpu.log what the
stages printed. Started again in the same DIR, a stage's new rows replace its old ones in the
tables. --commit=NAME is for a copy without git.

CLONE: git clone https://github.com/karpathy/nanoGPT. Exit status: 0 all is done and agrees; 1
something differs, failed, or ran out of time; 2 a user's mistake.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import nanogpt, runs
from benchmarks.stages.common import Plan

FLAGS = {
    "--minutes": r"[0-9]+(\.[0-9]+)?",
    "--stages": "[a-z0-9,]+",
    "--out": ".+",
    "--nanogpt": ".+",
    "--commit": ".+",
    "--rehearse": "",
}


class Stage(NamedTuple):
    module: str  # has run(plan), COVERS and a docstring
    seconds: float  # of 300
    beside: bool = False  # does it run beside the stage before it?


STAGES = {
    "steps": Stage("benchmarks.stages.steps", 55),
    "tests": Stage("benchmarks.stages.tests", 55, beside=True),
    "gpt2": Stage("benchmarks.stages.gpt2", 125),
    "profile": Stage("benchmarks.stages.profile", 25),
    "fp8": Stage("benchmarks.stages.fp8", 50),
    "optimizers": Stage("benchmarks.stages.optimizers", 20),
    "attention": Stage("benchmarks.stages.attention", 25),
}
# Branches that one GPU cannot reach: NCCL wants a GPU for each rank.
NEEDS_TWO_GPUS = (
    "checkpoint/exchange.py:device_of",
    "parallel/fsdp.py:FSDP.offload_policy",
)


# ---- the stages, one after the other -------------------------------------------------------------
def main(argv: list[str]) -> int:
    """What `python bench.py gpu ...` does with the words after `gpu`."""
    flags = runs.flags(argv, FLAGS, __doc__)
    names = flags.get("--stages", ",".join(STAGES)).split(",")
    rehearse = "--rehearse" in flags
    check(flags, names, rehearse)
    out = Path(flags.get("--out", "out-gpu-rehearsal" if rehearse else "out-gpu"))
    take_folder(out, rehearse)
    words = ["--rehearse"] if rehearse else []
    if "--nanogpt" in flags:
        words.append(f"--nanogpt={Path(flags['--nanogpt']).resolve()}")
    head = runs.header(["gpu", *argv], flags.get("--commit"))
    if not rehearse:
        head += f", {torch.cuda.get_device_name()}"

    # An outer time limit ends this process so; the stage under way must not stay on the GPU.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    deadline = began
    groups = grouped(names)
    # A rehearsal measures nothing: its limits are there to end a hang.
    minutes = float(flags.get("--minutes", 15 if rehearse else 5))
    share = 60 * minutes / sum(STAGES[group[0]].seconds for group in groups)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        # Kernels compiled for one stage serve the next, and none is left from another day.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for group in groups:
            # What the stages before have left is this one's, too.
            deadline += share * STAGES[group[0]].seconds
            run_group(group, deadline - time.monotonic(), out, words)
            rows = read(out / "gpu.jsonl")
            write_whole(out / "gpu.md", page(rows, head))
            for name in group:
                print("\n".join(section(name, rows)), flush=True)
    runs.tell(f"{time.monotonic() - began:.0f} s; the tables are in {out / 'gpu.md'}")
    rows = read(out / "gpu.jsonl")
    return int(not all(is_fine(latest(name, rows)) for name in names))


def check(flags: dict[str, str], names: list[str], rehearse: bool) -> None:
    """Raises ValueError for what cannot be done."""
    for name in names:
        if name not in STAGES:
            raise ValueError(f"--stages={name} is none of {', '.join(STAGES)}")
    if not rehearse and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here; type --rehearse to try the stages on the CPU")
    if float(flags.get("--minutes", 5)) <= 0:
        raise ValueError("--minutes=0 leaves no stage any time; type --minutes=5")
    clone = flags.get("--nanogpt")
    if clone is None:
        return
    if "gpt2" not in names:
        raise ValueError("--nanogpt= is for stage gpt2, which --stages= leaves out")
    if missing := [name for name in nanogpt.FILES if not Path(clone, name).is_file()]:
        raise ValueError(f"--nanogpt={clone} has no {missing[0]}; it is the folder of a clone")


def take_folder(out: Path, rehearse: bool) -> None:
    """Makes --out. Raises ValueError where it cannot hold these results."""
    if out.is_file():
        raise ValueError(f"--out={out} is a file; type the name of a folder")
    try:
        out.mkdir(exist_ok=True)
        (out / "gpu.jsonl").touch()
    except OSError as error:
        raise ValueError(f"--out={out}: {error.strerror}; type another folder") from None
    kinds = {row["rehearse"] for row in read(out / "gpu.jsonl") if "rehearse" in row}
    if kinds - {rehearse}:
        what = "a GPU" if rehearse else "a rehearsal"
        raise ValueError(f"--out={out} has the results of {what}; type another folder")


def grouped(names: list[str]) -> list[list[str]]:
    """The stages that run side by side."""
    groups = []
    for name in names:
        if STAGES[name].beside and groups:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def run_group(names: list[str], limit: float, out: Path, words: list[str]) -> None:
    """Stages in processes of their own, killed with their children after `limit` seconds."""
    began = time.monotonic()
    running = {}
    for name in names:
        row = {"stage": name, "status": "started", "limit_s": round(limit, 1)}
        append(out / "gpu.jsonl", row | {"rehearse": "--rehearse" in words})
        running[name] = start(name, limit, out, words)
    try:
        while running:
            for name, process in list(running.items()):
                status = process.poll()
                if status is None and not is_over(began, limit):
                    continue
                kill(running.pop(name))
                how = {None: f"killed after {limit:.0f} s", 0: "done"}.get(
                    status, f"failed, status {status}"
                )
                seconds = round(time.monotonic() - began, 1)
                append(out / "gpu.jsonl", {"stage": name, "status": how, "seconds": seconds})
            time.sleep(0.02)
    finally:  # Ctrl-C, or SIGTERM
        for process in running.values():
            kill(process)


def is_over(began: float, limit: float) -> bool:
    return time.monotonic() - began > limit


def start(name: str, limit: float, out: Path, words: list[str]) -> subprocess.Popen:
    """The process of a stage. It leads a session, so that killpg reaches what it starts."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        STAGES[name].module,
        name,
        str(out.resolve()),
    ]
    with open(out / "gpu.log", "a", encoding="utf-8") as log:
        print(f"==== {name}", file=log, flush=True)
        return subprocess.Popen(
            [*command, f"--limit={limit}", *words],
            cwd=runs.ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def kill(process: subprocess.Popen) -> None:
    """Ends the process and its children, those that outlive it too."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    try:
        # A process that waits for a driver may not end at all. The next stage does not wait for it.
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        runs.tell(f"process {process.pid} does not end")


# ---- results: one line each ----------------------------------------------------------------------
def append(path: Path, row: dict) -> None:
    """One more line, on the disk when this returns."""
    text = json.dumps(row) + "\n"
    # A killed stage may have left half a line.
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        text = "\n" + text
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict]:
    """The rows, without a line that was cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def latest(name: str, rows: list[dict]) -> list[dict]:
    """The rows of a stage's last start."""
    mine = [row for row in rows if row["stage"] == name]
    starts = [i for i, row in enumerate(mine) if row.get("status") == "started"]
    return mine[starts[-1] :] if starts else []


def is_fine(rows: list[dict]) -> bool:
    """Did this stage end by itself, and does everything agree that it compared?"""
    is_done = any(row.get("status") == "done" for row in rows)
    return is_done and all(row.get("ok", True) for row in rows)


# ---- the page ------------------------------------------------------------------------------------
def page(rows: list[dict], head: str) -> list[str]:
    names = dict.fromkeys(row["stage"] for row in rows)
    return [head, "", *(line for name in names for line in section(name, rows))]


def section(name: str, rows: list[dict]) -> list[str]:
    """A stage's tables in markdown."""
    mine = latest(name, rows)
    ended = [row for row in mine if "seconds" in row and "status" in row]
    how = f"{ended[-1]['status']}, {ended[-1]['seconds']} s" if ended else "did not end"
    lines = [f"## {name}: {how}", ""]
    tables = {}
    for row in mine:
        if "table" in row:
            cells = {key: x for key, x in row.items() if key not in ("stage", "table")}
            tables.setdefault(row["table"], []).append(cells)
        elif "error" in row:
            lines += [f"**{row['error']}**", ""]
    for title, body in tables.items():
        heads = [*dict.fromkeys(key for cells in body for key in cells)]
        cells = [[cell(row.get(head)) for head in heads] for row in body]
        lines += [title, "", *runs.table(heads, cells), ""]
    return lines


def cell(x) -> str:
    if x is None:
        return ""
    if isinstance(x, bool):
        return "yes" if x else "**no**"
    if isinstance(x, float):
        return f"{x:.4g}" if abs(x) < 1e5 else f"{x:,.0f}"
    return f"{x:,}" if isinstance(x, int) else str(x).replace("|", "/").replace("\n", " ")


def write_whole(path: Path, lines: list[str]) -> None:
    """Replaces the file in one move: a kill leaves the old one."""
    new = path.with_suffix(".new")
    new.write_text("\n".join(lines) + "\n", encoding="utf-8")
    new.replace(path)


# ---- a stage's own process -----------------------------------------------------------------------
def run_one(module: str, name: str, out: str, *words: str) -> int:
    """Runs a stage here; each of its rows goes to OUT/gpu.jsonl at once."""
    path = Path(out, "gpu.jsonl")
    given = dict(word.partition("=")[::2] for word in words)
    rehearse = "--rehearse" in given
    if rehearse:
        torch.set_num_threads(1)  # tiny products; threads would only wait for each other
    try:
        stage = importlib.import_module(module)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            plan = Plan(
                device=torch.device("cpu") if rehearse else torch.device("cuda", 0),
                rehearse=rehearse,
                folder=Path(folder),
                out=Path(out),
                nanogpt=Path(given["--nanogpt"]) if "--nanogpt" in given else None,
                emit=lambda table, **cells: append(path, {"stage": name, "table": table, **cells}),
            )
            if not rehearse:
                stage.run(plan)
                return 0
            with calls() as entered:
                stage.run(plan)
            check_covers(plan, stage.COVERS, entered)
    except BaseException as error:
        traceback.print_exc()
        said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        append(path, {"stage": name, "error": said})
        return 1
    return 0


@contextlib.contextmanager
def calls():
    """The code of every function of Python that is called meanwhile, as a set."""
    entered = set()
    sys.setprofile(lambda frame, event, _: entered.add(frame.f_code))
    try:
        yield entered
    finally:
        sys.setprofile(None)


def check_covers(plan: Plan, covers: tuple[str, ...], entered: set) -> None:
    """A row for each function that the stage names in COVERS: has it called it?"""
    here = {f"{code.co_filename}:{code.co_qualname}" for code in entered}
    for place in covers:
        # FlexAttention and its masks alone cannot be rehearsed: it has no backward on a CPU.
        is_flex = place.endswith((":flex_attention", ":block_mask"))
        is_entered = f"{runs.ROOT}/{place}" in here or is_flex
        plan.emit("Branches on a device that this stage takes.", function=place, ok=is_entered)


def watch(limit: float) -> None:
    """Writes the stacks just before the time is over, and ends with the bench."""
    faulthandler.dump_traceback_later(max(limit - 2, 0.1))
    bench = os.getppid()

    def wait() -> None:
        while os.getppid() == bench:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    watch(float(sys.argv[4].removeprefix("--limit=")))
    sys.exit(run_one(*sys.argv[1:]))
