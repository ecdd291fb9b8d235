"""What a few steps spend their time and memory on: torch's profiler, one trace for each rank.

    python train.py --profile=10:13                      steps 10, 11 and 12, as in Python's slices

    out/profile/rank_0.trace.json.gz    drag it onto https://ui.perfetto.dev (nothing is uploaded)
    out/profile/rank_0.operators.txt    the operators that took the most time, on this rank
    out/profile/rank_0.memory.csv       seconds, device, bytes given out: a line for each change
    out/profile/memory.png              the same of rank 0, drawn

The step before the range is profiled too and thrown away: the first one pays for the profiler's own
start (on a GPU, for CUPTI's). A profiled step computes the same numbers, and is slower, for each
operator is written down. In the trace a step is a bar with the name "step N". What lies between two
of the steps, an evaluation or a checkpoint, is in the trace and in the table. `share` is of the
line "all", the sum.

Time on a GPU is that of kernels; of an operator's time on the CPU, what its callees took is left
out. Memory is what torch's allocators gave out. On a CPU that counts from 0 at the range's
beginning: what was there before is left out, as a warning of torch's says when some of it is freed.

Source: torch.profiler (pytorch.org/docs/stable/profiler.html).
"""

import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

COLUMNS = ("operator", "calls a step", "ms a step", "share", "MB a step")
LINES = 30  # in the file
SHORT = 8  # in the log


class Profiler:
    """Profiles steps first <= step < last of one rank.

    folder: where the files go; rank: of this process; device: whose kernels count as time; log:
    takes the lines for the user. Call start(step) before each step, end(step) after it unless a
    rollback undid it, and close() after the last one.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        device: torch.device,
        first: int,
        last: int,
        log: Callable[[str], None] = print,
    ):
        self.folder = folder
        self.rank = rank
        self.device = device
        self.first = first
        self.last = last
        self.log = log
        self.profiler = None  # torch's, while it runs
        self.bar = None  # the step that is under way
        self.n_steps = 0  # profiled ones
        self.is_over = False

    def start(self, step: int) -> None:
        """Before step `step`, of which the first is 1."""
        if self.is_over or step < self.first - 1:
            return
        if step >= self.last:
            self.is_over = True  # a run that resumes behind the range
            return
        if self.profiler is None:
            self.begin(n_warmup=int(step < self.first))
        else:
            self.end_bar()
            self.profiler.step()
        if step >= self.first:
            self.n_steps += 1
            self.bar = torch.profiler.record_function(f"step {step}")
            self.bar.__enter__()

    def end(self, step: int) -> None:
        """After step `step`. The last one of the range ends the profile."""
        self.end_bar()
        if self.n_steps == self.last - self.first or step >= self.last - 1:
            self.close()

    def begin(self, n_warmup: int) -> None:
        # Above its own levels: Kineto's notices about its own start and stop are no news to a user.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        action = torch.profiler.ProfilerAction
        self.profiler = torch.profiler.profile(
            activities=activities,
            schedule=lambda i: action.WARMUP if i < n_warmup else action.RECORD,
            on_trace_ready=self.write,
            record_shapes=True,  # a viewer shows them of each operator
            profile_memory=True,
        )
        self.profiler.start()

    def end_bar(self) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = None

    def close(self) -> None:
        """Writes what was profiled, also of a range that is cut off. Can be called twice."""
        if self.profiler is not None:
            self.end_bar()
            self.profiler.stop()  # calls write()
        self.is_over = True
        self.profiler = None

    def write(self, profiler: torch.profiler.profile) -> None:
        """The files of this rank."""
        if self.n_steps == 0:
            return  # the run ended before the range
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"rank_{self.rank}.trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        lines = operators(profiler.key_averages(), self.n_steps, self.device)
        text = "\n".join([*lines[:-1][: 2 + LINES], lines[-1]]) + "\n"
        (self.folder / f"rank_{self.rank}.operators.txt").write_text(text, encoding="utf-8")
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            memory = memory_rows(json.load(file)["traceEvents"])
        path = self.folder / f"rank_{self.rank}.memory.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("seconds", "device", "bytes"), *memory])
        if self.rank == 0:
            plot(memory, self.folder / "memory.png")
        for line in [*lines[: 2 + SHORT], f"profile: {trace}; open it in ui.perfetto.dev"]:
            self.log(line)


def operators(events, n_steps: int, device: torch.device) -> list[str]:
    """A table in plain text: two lines of heading, operators, dearest first, and their sum.

    events: of torch's key_averages(); on a GPU the rows are kernels and copies, which torch lists
    beside the operators that started them, with the same time.
    """
    on_gpu = device.type == "cuda"
    rows = []
    for event in events:
        is_of_gpu = event.device_type != torch.autograd.DeviceType.CPU
        # Bars, as of steps, hold all the rest. On a CPU the optimizer's is what its Python takes.
        is_bar = event.key.startswith(("step ", "ProfilerStep")) or (
            on_gpu and event.is_user_annotation
        )
        if is_bar or is_of_gpu != on_gpu:
            continue
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total  # µs
        # The allocations of an operator by itself; what it frees counts against them.
        memory = event.self_device_memory_usage if on_gpu else event.self_cpu_memory_usage  # bytes
        rows.append((time, memory, event.count, event.key))
    rows.sort(reverse=True)
    total = sum(time for time, *_ in rows)
    sums = (total, sum(row[1] for row in rows), sum(row[2] for row in rows), "all")
    head = f"{COLUMNS[0]:64}" + "".join(f"{name:>14}" for name in COLUMNS[1:])
    lines = [f"profile of {n_steps} steps, by time on the {'GPU' if on_gpu else 'CPU'}", head]
    for time, memory, count, name in [*rows, sums]:
        cells = (
            f"{count / n_steps:.1f}",
            f"{time / n_steps / 1000:.3f}",
            f"{time / (total or 1):.1%}",
            f"{memory / n_steps / 1e6:.2f}",
        )
        lines.append(f"{name[:63]:64}" + "".join(f"{cell:>14}" for cell in cells))
    return lines


def memory_rows(events: list[dict]) -> list[tuple[float, str, int]]:
    """(seconds since the first one, device, bytes given out) of a trace's memory events."""
    rows = []
    for event in events:
        if event["name"] != "[memory]":
            continue
        args = event["args"]
        device = "cpu" if args["Device Type"] == 0 else f"gpu {args['Device Id']}"
        rows.append((event["ts"] / 1e6, device, args["Total Allocated"]))
    rows.sort()
    began = rows[0][0] if rows else 0
    return [(round(seconds - began, 9), device, size) for seconds, device, size in rows]


def plot(memory: list[tuple[float, str, int]], path: Path) -> None:
    """Draws memory_rows, a line for each device."""
    from matplotlib.figure import Figure  # takes a second, so only here

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for device in sorted({device for _, device, _ in memory}):
        seconds = [second for second, of, _ in memory if of == device]
        sizes = [size / 1e6 for _, of, size in memory if of == device]
        axes.step(
            seconds,
            sizes,
            where="post",
            linewidth=0.8,
            label=f"{device}: at most {max(sizes):.4g} MB",
        )
    axes.set(xlabel="seconds", ylabel="MB given out by torch", title="memory of the profiled steps")
    axes.grid(alpha=0.3)
    # From 0: otherwise a small part that comes and goes would look like all of it.
    axes.set_ylim(bottom=0)
    if memory:
        figure.legend(frameon=False, loc="outside lower left", ncols=4)
    figure.savefig(path, dpi=120)
