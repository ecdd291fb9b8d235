"""Claim: micro-batches keep the stages of a pipeline busy; what stays idle is (p-1)/(m+p-1) of the
time for p stages and m micro-batches with GPipe and 1F1B, 1F1B holds fewer activations, interleaved
stages and zero bubble idle less still.

Source: the third lesson, section 3 (naive layer split against a pipeline, "the bubble remains"),
with GPipe 1811.06965, PipeDream-flush 2006.09503, Narayanan et al. 2021 2104.04473, zero bubble
2401.10241.

Protocol: each schedule's idle share three ways: its formula; simulated (parallel/timeline.py:
backward takes twice as long as forward, messages nothing); measured in parallel/pipeline.py's
executor, 1 - (sum of the ranks' time outside of waits) / (p x the step's time), the best of three
steps. `sleep`: layers that sleep 20 ms forward, 20 ms for the input's and 20 ms for the weights'
gradient, so that 2, 4 or 8 stages on two cores do not disturb each other; `model`: p = 2, a GPT of
8 layers of width 256, micro-batches of 4 x 128 tokens. Most forwards in memory at once are counted
by the executor.

Expected: simulated is the formula to rounding; `sleep` within 0.03 of it; `model` within 0.1, as
stages are not quite equal (the last has the head). In flight: naive 1, GPipe m, 1F1B and zero
bubble p, interleaved with v = 2 chunks 3p - 1 halves.

    python -m experiments.pipeline_bubble [--quick] [--out=DIR] [--jobs=N]
"""

import json
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import pipeline as bench
from experiments import protocol
from experiments.findings import INK, groups, judged, markdown, pick
from parallel import pipeline, timeline

CPU, CHUNKS = torch.device("cpu"), {"interleaved": 2}
SLEPT, REAL, EXACT = 0.03, 0.1, 1e-9


def grid(stages: tuple[int, ...], counts: tuple[int, ...], real: tuple[int, ...]) -> list[dict]:
    cases = [
        ("sleep", name, p, m)
        for p in stages
        for m in counts
        for name in timeline.SCHEDULES
        if m >= p
    ]
    cases += [("model", name, 2, m) for m in real for name in timeline.SCHEDULES]
    return [dict(zip(("part", "schedule", "p", "m"), case)) for case in cases]


GRID, QUICK = grid((2, 4, 8), (4, 8, 16), (4, 8, 16)), grid((2,), (4,), (2,))


# ---- rows ----------------------------------------------------------------------------------------
class Sleep(torch.autograd.Function):
    """The identity, slowly; `with_w`: and nothing as the gradient of the second argument, as
    slowly."""

    @staticmethod
    def forward(ctx, x, seconds, asleep):
        ctx.seconds = seconds
        time.sleep(asleep)
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        time.sleep(ctx.seconds)
        return dx, None, None


class Sleeper(torch.nn.Module):
    """A layer of one weight whose product x + w sleeps `seconds` in forward and in each part of
    backward."""

    def __init__(self, seconds: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.matmul = lambda x, w, bias=None: (
            Sleep.apply(x, seconds, seconds) + Sleep.apply(w, seconds, 0)
        )

    def forward(self, x):
        return self.matmul(x, self.weight)


def row(keys: dict, quick: bool) -> dict:
    name, p, m = keys["schedule"], keys["p"], keys["m"]
    plan = timeline.simulate(timeline.schedule(name, p, m, CHUNKS.get(name, 1)))
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank_of, (keys, quick, folder), p, start_method=protocol.START)
        ranks = [json.loads(Path(folder, str(r)).read_text()) for r in range(p)]
    return {
        "measured": ranks[0]["idle"],
        "simulated": plan.bubble,
        "formula": formula(name, p, m),
        "seconds_a_step": ranks[0]["seconds"],
        "in_flight": max(r["in_flight"] for r in ranks),
        "planned": max(plan.in_flight),
    }


def rank_of(rank: int, keys: dict, quick: bool, folder: str) -> None:
    torch.set_num_threads(1)
    name, p, m = keys["schedule"], keys["p"], keys["m"]
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", p), rank=rank, world_size=p
    )
    made, plain = [], pipeline.Pipeline
    # To ask it for in_flight
    pipeline.Pipeline = lambda *a, **k: made.append(plain(*a, **k)) or made[-1]
    if keys["part"] == "model":
        bench.LAYERS, bench.C = (4, 64) if quick else (8, 256)
        seconds, idle = bench.one(name, CHUNKS.get(name, 1), m, CPU)
    else:
        seconds, idle = asleep(name, m, 0.01 if quick else 0.02)
    found = {"seconds": seconds, "idle": idle, "in_flight": made[0].in_flight}
    Path(folder, str(rank)).write_text(json.dumps(found))
    dist.barrier()
    protocol.os._exit(0)


def asleep(name: str, m: int, seconds: float) -> tuple[float, float]:
    """As `bench.one`, with stages that sleep instead of computing, all of them for as long."""
    v, p = CHUNKS.get(name, 1), dist.get_world_size()
    pipe = pipeline.Pipeline(dist.group.WORLD, name, p * v, v, CPU)
    model = torch.nn.ModuleDict({str(i): Sleeper(seconds / v) for i in pipe.stage_layers})
    if name == "zerobubble":
        pipe.deferred = pipeline.defer_weight_gradients(model)
    start, like, steps = torch.zeros(1), ((1,), torch.float32, CPU), []

    def forward(i: int, layers: list[int], x: torch.Tensor | None) -> torch.Tensor:
        # The first stage takes as long as the others
        x = start.clone().requires_grad_() if x is None else x
        for n in layers:
            x = model[str(n)](x)
        return x.sum() if layers[-1] == p * v - 1 else x

    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        pipe.run(m, forward, lambda i: like, 1.0)
        busy = torch.tensor([time.perf_counter() - began - pipe.idle_s])
        dist.all_reduce(busy)
        whole = time.perf_counter() - began
        steps.append((whole, 1 - busy.item() / (p * whole)))
    return min(steps)


def formula(name: str, p: int, m: int) -> float:
    """The idle share, as parallel/timeline.py's docstring has it, for m >= p."""
    of = {"interleaved": 2 * m, "zerobubble": 3 * m}.get(name, m)
    return 1 - 1 / p if name == "naive" else (p - 1) / (of + p - 1)


def held(name: str, p: int, m: int) -> int:
    """Forwards in memory at most, in chunks: of the first rank."""
    return {"naive": 1, "gpipe": m, "interleaved": min(3 * p - 1, 2 * m)}.get(name, min(p, m))


# ---- findings ------------------------------------------------------------------------------------
def worst(rows: list[dict], a: str, b: str) -> tuple[float, str]:
    """The largest |a - b|, and where."""
    r = max(rows, key=lambda r: abs(r[a] - r[b]))
    return abs(r[a] - r[b]), f"{r['schedule']}, p = {r['p']}, m = {r['m']}"


def parts(rows: list[dict]) -> dict[str, bool]:
    found = {}
    slept, real = pick(rows, part="sleep"), pick(rows, part="model")
    for mine, a, b, limit, name in (
        (rows, "simulated", "formula", EXACT, "simulated is the formula's"),
        (slept, "measured", "formula", SLEPT, "measured on sleeping stages"),
        (real, "measured", "simulated", REAL, "measured on a GPT"),
    ):
        gap, where = worst(mine, a, b)
        found[f"idle share {name}: within {gap:.3f} (claimed: {limit:g}; worst: {where})"] = (
            gap <= limit
        )
    order, right = ("naive", "gpipe", "interleaved", "zerobubble"), 0
    cases = groups(slept, "p", "m")
    for mine in cases.values():
        idle = [pick(mine, schedule=name)[0]["measured"] for name in order]
        right += idle == sorted(idle, reverse=True)
    found[
        f"naive idles most, then GPipe, interleaved, zero bubble: in {right} of {len(cases)} cases"
    ] = right == len(cases)
    right = sum(r["in_flight"] == r["planned"] == held(r["schedule"], r["p"], r["m"]) for r in rows)
    found[f"forwards in memory are those of the formula in {right} of {len(rows)} rows"] = (
        right == len(rows)
    )
    return found


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    found = parts(rows)
    word, _, why = judged(found)
    return word, [*found][1], why


def table(rows: list[dict]) -> str:
    lines = [
        [
            r["part"],
            r["p"],
            r["m"],
            r["schedule"],
            *(f"{r[k]:.3f}" for k in ("formula", "simulated", "measured")),
            f"{1000 * r['seconds_a_step']:.0f}",
            f"{r['in_flight']}{' halves' * (r['schedule'] in CHUNKS)}",
        ]
        for r in rows
    ]
    head = [
        "stages",
        "p",
        "m",
        "schedule",
        "idle share, formula",
        "simulated",
        "measured",
        "ms a step",
        "forwards in memory, at most",
    ]
    said = "\n".join(f"- {text}: {'yes' if ok else '**no**'}" for text, ok in parts(rows).items())
    return said + "\n\n" + markdown(head, lines)


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(13.5, 6.5)
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    shades = {"F": INK[0], "B": INK[1], "I": INK[1], "W": INK[2]}
    for ax, name in zip(left.subplots(len(timeline.SCHEDULES), 1, sharex=True), timeline.SCHEDULES):
        plan = timeline.simulate(
            timeline.schedule(name, 4, 8, CHUNKS.get(name, 1)),
            {k: x / CHUNKS.get(name, 1) for k, x in timeline.COST.items()},
        )
        for rank, (ops, spans) in enumerate(zip(plan.ops, plan.spans)):
            for op, (start, end) in zip(ops, spans):
                ax.barh(
                    rank,
                    end - start,
                    0.86,
                    start,
                    color=shades[op.kind],
                    alpha=0.8 - 0.35 * op.chunk,
                    edgecolor="white",
                    lw=0.6,
                )
        ax.set_title(
            f"{name}: {plan.bubble:.0%} idle, at most {max(plan.in_flight)} forwards in memory"
            + ", halves" * (name in CHUNKS)
            + ", continues to 96" * (name == "naive"),
            fontsize=9,
            loc="left",
        )
        ax.set(yticks=range(4), ylim=(3.5, -0.5), xlim=(0, 40))
        ax.tick_params(labelsize=7)
    ax.set_xlabel(
        "time; blue forward, red backward (or the input's gradient), green the weights' gradient"
    )
    left.suptitle("4 stages, 8 micro-batches", fontsize=11)
    ax = right.subplots()
    for name, color in zip(timeline.SCHEDULES, INK):
        for part, mark in (("sleep", "o"), ("model", "x")):
            mine = pick(rows, part=part, schedule=name)
            ax.plot(
                [r["formula"] for r in mine],
                [r["measured"] for r in mine],
                mark,
                color=color,
                alpha=0.8,
                label=name if part == "sleep" else None,
            )
    ax.plot([0, 0.9], [0, 0.9], color=INK[5], lw=1)
    ax.set(
        xlabel="idle share by the formula",
        ylabel="measured (dots: sleeping stages, crosses: a GPT on two cores)",
        title="Measured against (p-1)/(m+p-1) and the like",
    )
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict, timed=True)
