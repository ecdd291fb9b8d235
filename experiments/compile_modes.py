"""Claim: compiling with torch.compile makes training faster, for some seconds at the first step:
the default mode is good in general, reduce-overhead for small models, max-autotune the slowest to
compile and the fastest to run.

Source: the fifth lesson, section 9 (the table of modes; "the first call is slow"; graph breaks;
dynamic shapes).

Protocol: train.py with --compile=off and each mode, bf16, one after the other with all cores, 5
times each, every time with empty caches. `large`: the default job, 4 layers of width 256, 16 x 256
tokens a step; `small`: 4 layers of width 64, 1 x 64 tokens, where launching operations is most of
the time. Compile seconds: the first step's less the median step's; tokens/s: of the median step of
the last two thirds. Graph breaks and graphs are torch's own counters: a graph that is new after the
first step is a recompilation. `lengths`: a model called with 5 lengths of sequences, with
dynamic=False, None (torch's default, which turns to True at the second length) and True: how many
graphs.

Expected: on a CPU 10 to 40 s to compile, minutes for max-autotune; some per cent faster, as most of
the time is products that oneDNN already does, and what fusing saves is memory traffic;
reduce-overhead the same as default, for it means CUDA graphs. No graph break, no recompilation in
training, whose shapes never change; the loss within 0.5 % of eager's.

    python -m experiments.compile_modes [--quick] [--out=DIR] [--jobs=N]
"""

import os
import tempfile
from statistics import median

import torch
import torch._dynamo
import torch._inductor.compile_fx  # not to be counted as compile time
from torch._dynamo.utils import counters

from experiments import protocol
from experiments.findings import INK, groups, judged, markdown, mean_sd, paired, pick, plus_minus
from layers import compile
from model import GPT, GPTConfig
from parallel import watchdog

MODES = ("off", "default", "reduce-overhead", "max-autotune")
SIZES = {"large": {}, "small": dict(n_embd=64, block_size=64, batch_size=1)}
LENGTHS, NEAR = (64, 48, 80, 96, 33), 0.005
DYNAMIC = {"fixed": False, "torch's default": None, "dynamic": True}


def grid(modes: tuple[str, ...], sizes: tuple[str, ...], seeds: tuple[int, ...]) -> list[dict]:
    cases = [("lengths", mode, seeds[0]) for mode in DYNAMIC]
    cases += [(size, mode, seed) for size in sizes for seed in seeds for mode in modes]
    return [dict(zip(("part", "mode", "seed"), case)) for case in cases]


GRID, QUICK = grid(MODES, ("large", "small"), (1, 2, 3, 4, 5)), grid(MODES[:2], ("small",), (1,))


# ---- rows ----------------------------------------------------------------------------------------
def row(keys: dict, quick: bool) -> dict:
    if keys["part"] == "lengths":
        return {
            "graphs": graphs_of(DYNAMIC[keys["mode"]]),
            "breaks": sum(counters["graph_break"].values()),
        }
    if compile.lacking(torch.device("cpu")) and keys["mode"] != "off":
        raise RuntimeError(compile.lacking(torch.device("cpu")))
    marks, begin = [], watchdog.RankLog.step

    def step(log, number: int) -> None:
        marks.append(counters["stats"]["unique_graphs"])
        begin(log, number)

    watchdog.RankLog.step = step
    small = dict(n_layer=1, n_embd=32, block_size=32) if quick else {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        rows = protocol.train_run(
            **SIZES[keys["part"]] | small,
            compile=keys["mode"],
            seed=keys["seed"],
            steps=9 if quick else 30 if keys["part"] == "large" else 300,
            precision="bf16",
            eval_every=0,
        )
    times, losses = protocol.curve(rows, "step_s"), protocol.curve(rows, "loss")
    usual = median(times[len(times) // 3 :])
    tokens = protocol.curve(rows, "tokens")[0]  # of one step
    return {
        "tokens_per_s": tokens / usual,
        "compile_s": times[0] - usual,
        "loss": losses[-1],
        "breaks": sum(counters["graph_break"].values()),
        "graphs": marks[-1],
        "again": marks[-1] - marks[1],
    }


def graphs_of(dynamic: bool | None) -> int:
    """How many graphs one block makes of sequences of LENGTHS; without generating code, which
    matters not."""
    model = GPT(GPTConfig(n_layer=1, n_embd=32, block_size=96))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    compile.compile_blocks(model, "default", dynamic=dynamic, backend="aot_eager")
    for length in LENGTHS:
        ids = torch.zeros(2, length, dtype=torch.long)
        model(ids, ids).backward()
    return counters["stats"]["unique_graphs"]


# ---- findings ------------------------------------------------------------------------------------
def faster(rows: list[dict], size: str, mode: str, base: str = "off") -> list[float]:
    """tokens/s of a mode against another's, run by run."""
    return paired(
        pick(rows, part=size, mode=mode), pick(rows, part=size, mode=base), "tokens_per_s"
    )


def clear(found: list[float]) -> bool:
    """The mean is above 0, and by more than the runs differ."""
    mean, sd = mean_sd(found)
    return mean > (sd if sd == sd else 0)


def parts(rows: list[dict]) -> dict[str, bool]:
    trained = [r for r in rows if r["part"] != "lengths"]
    sizes, modes = ([x for (x,) in groups(trained, name)] for name in ("part", "mode"))
    found = {}
    for size in sizes:
        gain = faster(rows, size, "default")
        found[f"default {plus_minus(gain, '+.0%')} tokens/s against eager, {size} (more)"] = clear(
            gain
        )
    if "max-autotune" in modes:
        gain = faster(rows, "large", "max-autotune", "default")
        found[f"max-autotune {plus_minus(gain, '+.0%')} against default, large (more)"] = clear(
            gain
        )
        slow, usual = (
            mean_sd([r["compile_s"] for r in pick(rows, part="large", mode=m)])[0]
            for m in ("max-autotune", "default")
        )
        found[f"max-autotune compiles {slow / usual:.1f} times as long as default (longer)"] = (
            slow > 1.2 * usual
        )
    if "reduce-overhead" in modes:
        gain = faster(rows, "small", "reduce-overhead", "default")
        found[f"reduce-overhead {plus_minus(gain, '+.0%')} against default, small (more)"] = clear(
            gain
        )
    breaks, again = (sum(r[name] for r in trained) for name in ("breaks", "again"))
    found[f"{breaks} graph breaks and {again} recompilations in training (none)"] = (
        breaks + again == 0
    )
    fixed, usual, free = (pick(rows, part="lengths", mode=mode)[0]["graphs"] for mode in DYNAMIC)
    text = (
        f"{len(LENGTHS)} lengths make {fixed} graphs, {usual} by torch's default, {free} if dynamic"
        " (fewer)"
    )
    found[text] = free < fixed
    losses = (
        paired(pick(rows, part=size, mode=mode), pick(rows, part=size, mode="off"), "loss")
        for size in sizes
        for mode in modes
    )
    # NaN is the largest
    off = max((abs(x) for some in losses for x in some), key=lambda x: (x != x, x))
    found[f"losses are within {off:.2%} of eager's (0.5 %)"] = off <= NEAR
    return found


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    word, number, why = judged(parts(rows))
    return word, number, why + "; on a CPU, without CUDA graphs"


def table(rows: list[dict]) -> str:
    lines = []
    for (size, mode), mine in groups(
        [r for r in rows if r["part"] != "lengths"], "part", "mode"
    ).items():
        gain = "" if mode == "off" else plus_minus(faster(rows, size, mode), "+.0%")
        lines.append(
            [
                size,
                mode,
                plus_minus([r["compile_s"] for r in mine], ".0f") if mode != "off" else "-",
                plus_minus([r["tokens_per_s"] for r in mine], ",.0f"),
                gain,
                *(max(r[k] for r in mine) for k in ("graphs", "breaks", "again")),
                plus_minus([r["loss"] for r in mine]),
            ]
        )
    head = [
        "job",
        "mode",
        "compile, s",
        "tokens/s",
        "against eager",
        "graphs",
        "breaks",
        "recompilations",
        "last loss",
    ]
    said = "\n".join(
        f"- {text}: {'yes' if held else '**no**'}" for text, held in parts(rows).items()
    )
    return said + "\n\n" + markdown(head, lines)


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(11, 4.2)
    trained = [r for r in rows if r["part"] != "lengths"]
    speed, wait = figure.subplots(1, 2)
    modes = [m for (m,) in groups(trained, "mode") if m != "off"]
    for i, ((size,), _) in enumerate(groups(trained, "part").items()):
        at = [k + 0.36 * i - 0.18 for k in range(len(modes))]
        gains = [[100 * x for x in faster(rows, size, mode)] for mode in modes]
        waits = [[r["compile_s"] for r in pick(rows, part=size, mode=mode)] for mode in modes]
        for ax, values in ((speed, gains), (wait, waits)):
            ax.bar(
                at,
                [mean_sd(v)[0] for v in values],
                0.34,
                color=INK[i],
                alpha=0.7,
                label=f"{size} job",
            )
            for x, v in zip(at, values):
                ax.plot([x] * len(v), v, "o", color="black", ms=4)
    for ax in (speed, wait):
        ax.set_xticks(range(len(modes)), modes)
        ax.axhline(0, color="black", lw=0.8)
        ax.grid(alpha=0.25, axis="y")
    speed.set(title="tokens/s against eager (dots: runs; bars: means)", ylabel="%")
    wait.set(title="What the first step takes longer", ylabel="seconds")
    speed.legend(frameon=False)


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict, timed=True)
