"""What each stage of `python bench.py gpu` is given, and what several of them need."""

import contextlib
import gc
import json
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks import runs
from model import GPT, GPTConfig

# nanoGPT's 124M, and GPT-2's next size; the last is for a rehearsal.
SIZES = {
    "124M": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304),
    "350M": dict(n_layer=24, n_head=16, n_embd=1024, block_size=1024, vocab_size=50304),
    "tiny": dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=512),
}


@dataclass(frozen=True)
class Plan:
    """device: where to measure; folder: for scratch files; out: the bench's --out.

    emit(table, **cells): one row of a table of that title, on the disk when it returns. A cell
    `ok=False` makes the stage, and the bench, fail.
    """

    device: torch.device
    rehearse: bool
    folder: Path
    out: Path
    nanogpt: Path | None
    emit: Callable


def milliseconds(
    work: Callable, device: torch.device, seconds: float, warmup: int = 2, calls: int = 5
) -> float:
    """Median time of a call of work(), after `warmup` calls that are not counted.

    On a GPU: of `calls` calls in a row between two events, divided, as in training, where Python
    runs ahead of the GPU. On a CPU: of single calls by the clock. It measures for about this many
    seconds, and once at least.
    """
    for _ in range(warmup):
        work()
    times = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / calls)
        else:
            start = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - start))
    return median(times)


@torch.no_grad()
def gpt(config: GPTConfig, device: torch.device) -> GPT:
    """A model on the device, its weights random and of the usual size, the same at each call."""
    with torch.device("meta"):
        model = GPT(config)
    model = model.to_empty(device=device)
    torch.manual_seed(0)
    for p in model.parameters():
        p.normal_(0, p.shape[-1] ** -0.5)
    return model


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """|x - y| / |y|, in float64, where y lies."""
    y = y.detach().double()
    x = x.detach().to(y.device).double()
    return ((x - y).norm() / y.norm()).item()


def train(words: list[str], folder: Path) -> list[dict]:
    """A run of train.py in this process: its train rows. What it says goes to our output."""
    import train as trainer  # as late as anything that it imports
    from settings import parse

    cfg = parse.parse([*words, f"--out_dir={folder}"])
    if cfg.compile != "off":
        # No graph of an earlier run serves this one, and beyond a number of them torch gives up.
        torch._dynamo.reset()
    freed(torch.device(cfg.device))
    try:
        trainer.main(cfg)
    finally:
        # --deterministic holds for a process, and the next run is in this one.
        torch.use_deterministic_algorithms(False)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "step_s" in row]


def furthest(rows: list[dict], others: list[dict]) -> float:
    """Largest relative difference of losses and gradient norms, step by step; inf where they have
    other steps, none, or numbers that are not finite."""
    if not rows or [row["step"] for row in rows] != [row["step"] for row in others]:
        return math.inf
    largest = 0.0
    for row, other in zip(rows, others):
        for name in ("loss", "grad_norm"):
            if row[name] is None or other[name] is None:  # was not finite
                return math.inf
            largest = max(largest, abs(row[name] - other[name]) / abs(other[name]))
    return largest


def write_ids(folder: Path, vocab_size: int, n_tokens: int) -> None:
    """train.bin and val.bin of ids as frequent as words are (Zipf), as nanoGPT and ours read them.

    Random ids: speed and memory do not depend on what they say, and nothing is downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = 1 / np.arange(1, vocab_size + 1)
    for split, n, seed in (("train", n_tokens, 1), ("val", n_tokens // 10 + 2048, 2)):
        draw = np.random.default_rng(seed).choice(vocab_size, n, p=weights / weights.sum())
        draw.astype(np.uint16).tofile(folder / f"{split}.bin")


def fields(size: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in size.items()]


def freed(device: torch.device) -> None:
    """Gives the cached memory of a measurement back before the next one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextlib.contextmanager
def failing_is_a_row(plan: Plan, table: str, **cells):
    """What raises inside is a row of its own, and the stage continues with the next measurement.

    After an error that CUDA cannot forget it ends: every later row would be a false failure.
    """
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        plan.emit(table, **cells, note=said, ok=False)
        if plan.device.type == "cuda":
            torch.cuda.synchronize(plan.device)


TEXT = str(runs.ROOT / "model.py")  # a text that every checkout has
