"""Experts beside obvious loops, and a model with experts beside the dense one of equal FLOPs.

    python bench.py experts [--only=layer,step,ranks] [--turns=5] [--steps=30] [--quick]
        [--out=FILE.md]

Layer. Forward and backward of one layer, 8 experts, 2 of a token, 16 x 256 tokens of width 256, in
float32 and under autocast in bfloat16: layers/moe.py, and three loops that anybody would write,

    where     each expert looks for its tokens, and adds its results to theirs
    sorted    rows sorted by expert, cut, put together, added to their tokens
    slots     for the first expert of each token, then for the second, a masked copy of all

with the same experts, whose products and activations are train.py's in all of them. Every call gets
other tokens, as a step does: a product of another number of rows than any before costs oneDNN a new
kernel. Each way has processes of its own, and they take turns; a figure is a process's median call,
the first third left out. The ratio is of the same turn: layers/moe.py's time over the fastest
loop's.

Step. Runs of train.py, the default job and the same with --n_expert=8, in which a token goes
through as many weights, with AdamW and Muon, in turns.

Ranks. The job with experts on two ranks of one thread, all experts on both of them under zero1, and
half of them on each under --ep=2: tokens/s, and the resident bytes of rank 0 at their peak.

--quick: one turn, few calls: it proves nothing.
"""

import functools
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import runs
from layers.moe import MoE
from layers.recompute import forget_results
from memory.heap import keep_freed_memory
from model import MLP, GPTConfig
from parallel.autocast_linear import keep_no_copies
from precision import amp, onednn

TABLES = "(layer|step|ranks)"
FLAGS = {
    "--only": f"{TABLES}(,{TABLES})*",
    "--turns": "[1-9][0-9]*",
    "--steps": "[1-9][0-9]*",
    "--quick": "",
    "--out": ".+",
}
BATCH, LENGTH, WIDTH = 16, 256, 256
ACTIVATIONS = {"relu2": 512, "swiglu": 384}  # -> the width of an expert
DENSE, EXPERTS = [], ["--n_expert=8"]
LAYOUTS = {
    "zero1": ["--data_parallel=zero1"],
    "ep 2": ["--ep=2"],
    "zero1 x ep 2": ["--data_parallel=zero1", "--ep=2"],
}
USUAL = ["--eval_every=0", "--save_every=0", "--sample_tokens=0", "--plot=false", "--resume=never"]


# ---- the layer -----------------------------------------------------------------------------------
def routed(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and experts of the tokens x (N, C), each (N, k)."""
    with torch.autocast("cpu", enabled=False):
        scores = (x @ layer.router.weight.t()).softmax(-1)
    gates, chosen = scores.topk(layer.n_active, -1)
    return gates / gates.sum(-1, keepdim=True), chosen


def where(layer: MoE, x: Tensor) -> Tensor:
    x = x.flatten(0, 1)
    gates, chosen = routed(layer, x)
    y = torch.zeros_like(x)
    for e, expert in layer.experts.items():
        tokens, slots = torch.where(chosen == int(e))
        out = expert(x[tokens]) * gates[tokens, slots].unsqueeze(-1)
        y.index_add_(0, tokens, out.to(y.dtype))
    return y


def by_sorting(layer: MoE, x: Tensor) -> Tensor:
    x = x.flatten(0, 1)
    gates, chosen = routed(layer, x)
    order = chosen.flatten().argsort()
    tokens = order // layer.n_active
    counts = chosen.flatten().bincount(minlength=len(layer.experts)).tolist()
    parts = x[tokens].split(counts)
    out = torch.cat([expert(part) for expert, part in zip(layer.experts.values(), parts)])
    out = out * gates.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add_(0, tokens, out.to(x.dtype))


def slots(layer: MoE, x: Tensor) -> Tensor:
    x = x.flatten(0, 1)
    gates, chosen = routed(layer, x)
    y = torch.zeros_like(x)
    for j in range(layer.n_active):
        for e, expert in layer.experts.items():
            mask = chosen[:, j] == int(e)
            out = torch.zeros_like(x)
            out[mask] = (expert(x[mask]) * gates[mask, j].unsqueeze(-1)).to(out.dtype)
            y = y + out
    return y


LOOPS = {"where": where, "sorted": by_sorting, "slots": slots}


def made(activation: str, precision: str) -> MoE:
    """A layer with the products that train.py gives it in this precision."""
    torch.manual_seed(0)
    c = GPTConfig(n_embd=WIDTH, activation=activation)
    layer = MoE(WIDTH, [MLP(c, ACTIVATIONS[activation]) for _ in range(8)], 2)
    if onednn.faster(amp.PRECISIONS[precision].products, torch.device("cpu")):
        layer.experts.product = onednn.matmul
        for module in layer.modules():
            if hasattr(module, "matmul"):
                module.matmul = onednn.linear
    else:
        keep_no_copies(layer)
    return layer


def measure(way: str, activation: str, precision: str, n: int) -> float:
    """Median seconds of forward and backward."""
    keep_freed_memory()
    layer = made(activation, precision)
    call = layer if way == "moe" else functools.partial(LOOPS[way], layer)
    # Loads are uneven, and other ones at each call.
    usual = 0.2 * torch.randn(WIDTH)
    found = []
    for _ in range(n):
        x = (torch.randn(BATCH, LENGTH, WIDTH) + usual).requires_grad_()
        dy = torch.randn(BATCH, LENGTH, WIDTH)
        began = time.perf_counter()
        with amp.autocast(precision, x.device), forget_results(x):
            y = call(x)
        y.view(x.shape).to(dy.dtype).backward(dy)
        found.append(time.perf_counter() - began)
        layer.zero_grad(set_to_none=True)
    return median(found[n // 3 :])


def in_a_process(way: str, activation: str, precision: str, n: int) -> float:
    code = f"from benchmarks.experts import measure; print(measure({way!r}, {activation!r}, "
    code += f"{precision!r}, {n}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(runs.reason(done.stderr))
    return float(done.stdout)


def layer_rows(turns: int, n: int) -> list[list[str]]:
    rows = []
    for precision in ("fp32", "bf16"):
        for activation in ACTIVATIONS:
            seconds = {way: [] for way in ("moe", *LOOPS)}
            for i in range(turns):
                for way in list(seconds) if i % 2 == 0 else reversed(seconds):
                    seconds[way].append(in_a_process(way, activation, precision, n))
            runs.tell(f"{precision} {activation}: {seconds}")
            own, *loops = seconds.values()
            ratios = [x / min(others) for x, *others in zip(own, *loops)]
            cells = [runs.spread([1000 * x for x in times], ".1f") for times in seconds.values()]
            rows.append([f"{precision}, {activation}", *cells, f"**{runs.spread(ratios)}**"])
    return rows


# ---- the whole step ------------------------------------------------------------------------------
def once(words: list[str], ranks: int = 1) -> dict:
    """The train row of a run's median step."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        _, rows = runs.run([*words, f"--data_dir={runs.CACHE}", *USUAL], Path(folder, "run"), ranks)
    last = [row for row in rows if "step_s" in row][-1]
    # None on Windows, which does not tell a process its peak.
    return runs.middle(rows) | {"peak_bytes": last["peak_bytes"] or math.nan}


def step_rows(turns: int, steps: int) -> list[list[str]]:
    rows = []
    for more in (["--optim=adamw"], ["--optim=muon"], ["--optim=muon", "--precision=fp32"]):
        words = [f"--steps={steps}", "--log_every=1", *more]
        dense, experts = [], []
        for i in range(turns):
            pair = [(dense, DENSE), (experts, EXPERTS)]
            for found, flags in pair if i % 2 == 0 else reversed(pair):
                found.append(once([*words, *flags])["step_s"])
        runs.tell(f"{' '.join(more)}: {dense} {experts}")
        ratios = [x / y for x, y in zip(experts, dense)]
        cells = [runs.spread([1000 * x for x in times], ".0f") for times in (dense, experts)]
        rows.append([" ".join(more), *cells, f"**{runs.spread(ratios)}**"])
    return rows


# ---- ranks ---------------------------------------------------------------------------------------
def rank_rows(turns: int, steps: int) -> list[list[str]]:
    rows = []
    for optim in ("adamw", "muon"):
        words = [f"--steps={steps}", "--log_every=1", f"--optim={optim}", "--threads=1", *EXPERTS]
        found = {name: [] for name in LAYOUTS}
        for i in range(turns):
            for name in list(found) if i % 2 == 0 else reversed(found):
                found[name].append(once([*words, *LAYOUTS[name]], ranks=2))
                runs.tell(f"{optim}, {name}: {found[name][-1]['tokens_per_s']:,.0f} tokens/s")
        for name, mine in found.items():
            cells = [f"{optim}, {name}"]
            for key, unit, form in (("tokens_per_s", 1, ",.0f"), ("peak_bytes", 2**20, ",.0f")):
                ratios = [own[key] / zero1[key] for own, zero1 in zip(mine, found["zero1"])]
                cells.append(runs.spread([row[key] / unit for row in mine], form))
                cells.append("" if name == "zero1" else f"**{runs.spread(ratios)}**")
            rows.append(cells)
    return rows


def main(argv: list[str]) -> int:
    """What `python bench.py experts ...` does with the words after `experts`: 0, or 1 where a run
    failed."""
    flags = runs.flags(argv, FLAGS, __doc__)
    quick = "--quick" in flags
    turns = 1 if quick else int(flags.get("--turns", 5))
    steps = int(flags.get("--steps", 4 if quick else 30))
    tables = {
        "layer": lambda: runs.table(
            ["ms, median (min..max)", "layers/moe.py", *LOOPS, "its time / the fastest loop's"],
            layer_rows(turns, 6 if quick else 40),
        ),
        "step": lambda: runs.table(
            ["ms a step, median (min..max)", "dense", "8 experts, 2 of a token", "ratio"],
            step_rows(turns, steps),
        ),
        "ranks": lambda: runs.table(
            ["2 ranks, median (min..max)", "tokens/s", "/ zero1's", "peak MiB", "/ zero1's"],
            rank_rows(turns, steps),
        ),
    }
    page = [runs.header(["experts", *argv])]
    try:
        for name in flags.get("--only", ",".join(tables)).split(","):
            page += ["", *tables[name]()]
    except RuntimeError as error:
        runs.tell(f"bench.py experts: {error}")
        return 1
    runs.show(page, flags.get("--out"))
    return 0
