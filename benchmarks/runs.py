"""What the benches share: train.py as a process, the words of a command line, where it ran.

Nothing here imports train.py: a run is a process of its own, so that its time and memory are its
own too.
"""

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from metrics import logger

ROOT = Path(__file__).resolve().parent.parent
# One cache for all runs, so that a corpus is downloaded and tokenised once.
TRAIN, CACHE = ROOT / "train.py", ROOT / "data_cache"


def usage(doc: str) -> str:
    """The command in a bench's docstring, which may have several lines."""
    return "usage: " + " ".join(doc.split("\n\n")[1].split())


def flags(argv: list[str], allowed: dict[str, str], doc: str) -> dict[str, str]:
    """{"--name": value} of words like --name=value. allowed: name -> what the whole value has to
    match. Raises ValueError for any other word, and for --out in a folder that is not there."""
    given = dict(word.partition("=")[::2] for word in argv)
    for word in argv:
        name, equals, text = word.partition("=")
        if name not in allowed or not re.fullmatch(allowed[name], text) or (equals and not text):
            raise ValueError(f"{word} is not understood; {usage(doc)}")
    if not (folder := Path(given.get("--out", ".")).parent).is_dir():
        raise ValueError(
            f"--out={given['--out']}: there is no folder {folder}; type mkdir -p {folder} first"
        )
    return given


def header(words: list[str], commit: str | None = None) -> str:
    """What a table has to say about itself: command, commit, versions, machine, day.

    commit: for a copy without git.
    """
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    if commit is None:
        try:
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        except OSError:  # git is not installed
            commit = ""
    cpus = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    cpu = (re.findall("model name.*: (.*)", cpus) or [platform.machine()])[0]
    return (
        f"`python bench.py {' '.join(words)}`, commit {commit or '?'}, torch {torch.__version__},"
        f" {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,"
        f" {time.strftime('%Y-%m-%d')}"
    )


def spread(values: list[float], form: str = ".2f") -> str:
    """median (smallest..largest)"""
    return f"{median(values):{form}} ({min(values):{form}}..{max(values):{form}})"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in [head, *rows]]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def show(lines: list[str], out: str | None) -> None:
    """Prints the page, and writes it to the file `out`."""
    print("\n".join(lines), flush=True)
    if out:
        Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")


def tell(text: str) -> None:
    """Progress, which is no part of the page."""
    print(text, file=sys.stderr, flush=True)


def reason(stderr: str) -> str:
    """The line of stderr that says why, from among tracebacks, warnings and torchrun's report."""
    said = [text.strip() for text in stderr.splitlines() if text.strip()]
    why = re.compile(r"(train|bench)\.py[ \w]*: |[\w.]*(Error|Exception|Interrupt)\b")
    errors = [text for text in said if why.match(text)]
    return (errors or said or [""])[-1]


def run(words: list[str], out_dir: Path, ranks: int = 1) -> tuple[float, list[dict]]:
    """train.py with these words, under torchrun where it has several ranks: seconds from before the
    process starts until it has ended, and the rows of its metrics.jsonl. Raises RuntimeError with
    the one line that says why it failed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *torchrun * (ranks > 1), str(TRAIN), *words, f"--out_dir={out_dir}"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    seconds, path = time.perf_counter() - began, Path(out_dir, "metrics.jsonl")
    rows = logger.read_metrics(path) if done.returncode == 0 and path.exists() else []
    if not any("step_s" in row for row in rows):
        raise RuntimeError(reason(done.stderr) or f"no step, and status {done.returncode}")
    return seconds, rows


def middle(rows: list[dict]) -> dict:
    """The train row of the median step; the first third is left out, as it compiles and warms
    up."""
    steps = [row for row in rows if "step_s" in row]
    timed = sorted(steps[len(steps) // 3 :], key=lambda row: row["step_s"])
    return timed[len(timed) // 2]
