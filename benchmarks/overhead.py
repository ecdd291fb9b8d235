"""What training costs beside training: waiting for data, monitoring and checks, saving, starting.

    python bench.py overhead [recipe.toml] [--quick] [--out=FILE.md] [--field=...]

Of the default recipe, or the given one; fields are train.py's, --steps being 60 unless given.

Steps. One real run in a child process, in which the functions in DATA and CHECKS are wrapped by a
clock: rows cut out of the corpus; the guard's look, the gradient's norm (which clipping needs as
well), the one sum of scalars over ranks, the row of metrics, the rank's log, the watcher and the
histograms, both switched off by default. A call within another one counts once. A step lasts from
one snapshot() to the next, so the time of the row is in it. The first third of the steps warms up.
Share: mean milliseconds a step over those of the median step. On a GPU a function that waits for
the device gets the device's time: look at a CPU.

Saving. The same run with --save_every=6: the step beside which a checkpoint is written, which a
small model's is within one, and how long training waits for save() itself.

Start. Seconds from before the process starts until train.py has printed its first step, less those
of `import torch` alone, in turn. An untimed start before fills the cache of the corpus.
--quick: 12 steps, one start.
"""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from unittest import mock

import torch.multiprocessing as mp
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import monitor
from benchmarks import runs
from checkpoint import save, state
from data import cursor, dataset
from metrics import flops, logger, watch
from parallel import mesh, watchdog
from precision import histogram
from settings import parse

FLAGS = {"--quick": "", "--out": ".+"}
USUAL = ["--steps=60", "--eval_every=0", "--save_every=0", "--sample_tokens=0", "--resume=never"]
DATA = [(dataset.Dataset, "__call__"), (cursor.Cursor, "next_samples")]
CHECKS = [
    (monitor.SpikeMonitor, "check"),
    (monitor.SpikeMonitor, "snapshot"),
    (monitor.SpikeMonitor, "max_norm"),
    (state.State, "norm"),
    (mesh.Mesh, "sum"),
    (logger.Logger, "train"),
    (logger.Logger, "events"),
    (flops, "peak_bytes"),
    (flops, "mfu"),
    (watchdog.RankLog, "step"),
    (save.Saver, "due"),
    (save.Saver, "overdue"),
    (save.Saver, "pop_events"),
    (watch.Watch, "start"),
    (watch.Watch, "row"),
    (histogram.Recorder, "start"),
    (histogram.Recorder, "write"),
]
SAVE = (save.Saver, "save")  # between two steps; it is written during the next one
MARK = "SpikeMonitor.snapshot"  # called once, where a step begins


def name_of(owner, attribute: str) -> str:
    return f"{owner.__name__}.{attribute}"


class Clock:
    """steps: for each one {what: seconds}, and the time at which it began under "began"."""

    def __init__(self):
        self.steps, self.inside = [], False

    def around(self, name: str, function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            began = time.perf_counter()
            if name == MARK:
                self.steps.append({"began": began})
            if self.inside or not self.steps:
                return function(*args, **kwargs)
            self.inside, now = True, self.steps[-1]
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                now[name] = now.get(name, 0.0) + time.perf_counter() - began

        return timed


def child(_, words: list[str], path: str) -> None:
    """A process of its own: train.py with a clock around each function; the steps go to the file
    `path`."""
    import train

    clock = Clock()
    with contextlib.ExitStack() as stack:
        silence = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(silence))
        for owner, attribute in [*DATA, *CHECKS, SAVE]:
            timed = clock.around(name_of(owner, attribute), getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, timed))
        train.main(parse.parse(words))
    Path(path).write_text(json.dumps(clock.steps))


def settled(steps: list[dict]) -> tuple[list[float], dict[str, float]]:
    """(seconds of each step, {what: mean seconds of it in a step}) after the first third; the last
    step is left out, as it has no end."""
    lengths = [after["began"] - step["began"] for step, after in zip(steps, steps[1:])]
    first = len(lengths) // 3
    timed = steps[first : len(lengths)]
    names = dict.fromkeys(name for step in timed for name in step if name != "began")
    return lengths[first:], {n: fmean(step.get(n, 0.0) for step in timed) for n in names}


def beside_saves(steps: list[dict]) -> tuple[list[float], list[float]]:
    """(lengths of the steps that begin after a save, over the median of the others; seconds of the
    saves). The first of them is left out, as its buffers are new."""
    lengths = [after["began"] - step["began"] for step, after in zip(steps, steps[1:])]
    saved = [i for i, step in enumerate(steps[:-2]) if name_of(*SAVE) in step][1:]
    after = [i + 1 for i in saved]
    usual = median(x for i, x in enumerate(lengths) if i > after[0] and i not in (*saved, *after))
    return [lengths[i] / usual for i in after], [steps[i][name_of(*SAVE)] for i in saved]


def first_line(command: list[str], pattern: str) -> float:
    """Seconds from before the process starts until it prints a line that begins so; it is then
    killed. Raises RuntimeError with its last line where there is none."""
    began, line = time.perf_counter(), "it said nothing"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            for line in process.stdout:
                if re.match(pattern, line):
                    return time.perf_counter() - began
        finally:
            process.kill()
    raise RuntimeError(line.strip())


def start(words: list[str]) -> tuple[float, float]:
    """Seconds until train.py's first step is done, and until torch is imported, each from
    nothing."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [
            sys.executable,
            str(runs.TRAIN),
            *words,
            "--log_every=1",
            f"--out_dir={folder}/run",
        ]
        first = first_line(command, "step +1/")
    return first, first_line(
        [sys.executable, "-c", "import torch; print('torch', flush=True)"], "torch"
    )


def report(steps: list[dict], saves: list[dict], starts: list[tuple[float, float]]) -> list[str]:
    """The page's lines from what was measured; a figure beyond its target says so."""

    def beside(figure: float, target: float) -> str:
        return f"< {target:g}" if figure < target else f"**not** < {target:g}"

    lengths, seconds = settled(steps)
    step, rows = median(lengths), []
    for what, parts in ("waiting for data", DATA), ("monitoring and checks", CHECKS):
        names = [name for name in (name_of(*part) for part in parts) if name in seconds]
        share = 100 * sum(seconds[name] for name in names) / step
        rows.append(
            [f"**{what}**", f"{share * step * 10:.3f}", f"**{share:.2f} %**", beside(share, 1)]
        )
        rows += [
            [name, f"{1000 * seconds[name]:.3f}", f"{100 * seconds[name] / step:.2f} %", ""]
            for name in sorted(names, key=seconds.get, reverse=True)
        ]
    beyond, (slower, waits) = [first - bare for first, bare in starts], beside_saves(saves)
    return [
        f"The median of {len(lengths)} steps: {1000 * step:.1f} ms.",
        "",
        *runs.table(["", "ms a step", "share", "target, %"], rows),
        "",
        (
            "A step beside which a checkpoint is written, over the others' median: "
            f"**{runs.spread(slower)}**, {len(slower)} saves; save() itself: "
            f"{runs.spread([1000 * x for x in waits], '.1f')} ms."
        ),
        "",
        (
            f"Start to the end of the first step: {runs.spread([first for first, _ in starts])} s;"
            f" `import torch`: {runs.spread([bare for _, bare in starts])} s; beyond it"
            f" **{runs.spread(beyond)} s**, target, s: {beside(median(beyond), 0.9)}"
        ),
    ]


def main(argv: list[str]) -> int:
    """What `python bench.py overhead ...` does with the words after `overhead`: 0, 1 where a run
    failed."""
    own = [word for word in argv if word.partition("=")[0] in FLAGS]
    flags, words = runs.flags(own, FLAGS, __doc__), [word for word in argv if word not in own]
    quick = "--quick" in flags
    recipes, fields = ([w for w in words if w.startswith("--") == field] for field in (False, True))
    words = [*recipes, *USUAL, *["--steps=12"] * quick, f"--data_dir={runs.CACHE}", *fields]
    for word in fields:
        if word.startswith(("--out_dir=", "--resume=", "--save_", "--keep_every=")):
            raise ValueError(f"{word} is the bench's own; leave it out")
    if parse.parse(words).steps < (least := 12 if quick else 24):
        raise ValueError(f"a median needs some steps; type --steps={least}, or more")
    try:
        start(words)
        starts = [start(words) for _ in range(1 if quick else 5)]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path, found = Path(folder, "steps.json"), []
            for more in ([], [f"--save_every={3 if quick else 6}"]):
                mp.spawn(child, ([*words, *more, f"--out_dir={folder}/run"], str(path)), nprocs=1)
                found.append(json.loads(path.read_text()))
    except (RuntimeError, ProcessRaisedException, ProcessExitedException) as error:
        runs.tell(f"bench.py overhead: {str(error).strip().splitlines()[-1]}")
        return 1
    runs.show([runs.header(["overhead", *argv]), "", *report(*found, starts)], flags.get("--out"))
    return 0
