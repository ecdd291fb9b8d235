"""Claim: WSD's short descent ends lower than a cosine, and one stable run serves several lengths;
SGDR's restarts find better minima; OneCycle and Schedule-Free, which needs no schedule, are on a
par with cosine.

Source: the second lesson (cosine, WSD, SGDR, Schedule-Free), the fourth (WSD, "Llama 2": it is
MiniCPM's, Hu et al. 2024, 2404.06395) and the fifth (cosine, OneCycle).

Protocol: the default corpus in bytes, 2 layers of width 64, 512 tokens a step, AdamW with betas .9
and .95, 16 steps of warm-up, all descents to 0. `shape`: 800 steps; WSD's descent takes the last
fifth; SGDR has three cycles of 112, 224 and 448 steps; each schedule has the same budget, 4
learning rates x 3 seeds, and counts at the one with the lowest mean validation loss. `branch`: a
run at constant lr keeps checkpoints at 160, 320 and 640 steps, from each --resume=PATH goes down to
0 in a quarter as many: runs of 200, 400 and 800 steps; beside them whole WSD runs and cosines of
these lengths; 3 learning rates, cosine at the best for each length, the branches at one for all
three. Better means: seed by seed, mean difference x sqrt(n) is at least 3.1 standard deviations; on
a par: at most 1 % worse.

Expected: all that end at 0 lie within 1 %, WSD not below cosine at 800 steps; SGDR a little worse,
its last cycle being shorter; a constant lr 5 % worse; Schedule-Free between. Branches equal whole
runs to the last bit.

    python -m experiments.schedules [--quick] [--out=DIR] [--jobs=N]
    python -m experiments.schedules --data=FILE --schedules=cosine,wsd --budget=10m
"""

import math
import tempfile

from experiments import claims, protocol
from experiments.findings import (
    INK,
    below,
    clear,
    dots,
    groups,
    judged,
    line,
    listed,
    markdown,
    mean_sd,
    paired,
    pick,
    plus_minus,
)

SHAPES = ("linear", "cosine", "exponential", "sqrt")
CASES = {
    "cosine": {"schedule": "cosine"},
    "linear": {"schedule": "linear"},
    **{f"WSD, {s}": {"schedule": "wsd", "decay_frac": 0.2, "schedule.shape": s} for s in SHAPES},
    "SGDR": {"schedule": "sgdr"},
    "OneCycle": {"schedule": "onecycle", "warmup_steps": 0},
    "Schedule-Free": {"optim": "schedule_free.AdamWScheduleFree", "schedule": "constant"},
    "constant": {"schedule": "constant"},
}
LRS, SEEDS, LENGTHS = (2.0**-8, 2.0**-7, 2.0**-6, 2.0**-5), (1, 2, 3), (200, 400, 800)


def grid(cases: list, lrs: tuple, branch_lrs: tuple, seeds: tuple) -> list[dict]:
    shapes = [dict(part="shape", case=c, lr=lr, seed=s) for c in cases for lr in lrs for s in seeds]
    return shapes + [
        dict(part="branch", case="", lr=lr, seed=s) for lr in branch_lrs for s in seeds
    ]


SHOWN = ("cosine", "WSD, linear", "SGDR", "OneCycle", "Schedule-Free", "constant")
GRID, QUICK = grid([*CASES], LRS, LRS[:3], SEEDS), grid(SHOWN[:5], LRS[1:2], LRS[1:2], SEEDS[:1])


# ---- rows ----------------------------------------------------------------------------------------
def row(keys: dict, quick: bool) -> dict:
    common = dict(
        optim="adamw",
        lr=keys["lr"],
        seed=keys["seed"],
        warmup_steps=2 if quick else 16,
        n_layer=2,
        n_embd=64,
        block_size=64,
        batch_size=8,
        precision="fp32",
        weight_decay=0,
        eval_tokens=4096 if quick else 32768,
        **{"opt.betas": (0.9, 0.95)},
    )
    if keys["part"] == "branch":
        return branches(common, [n // 40 for n in LENGTHS] if quick else LENGTHS)
    steps, looks = (20, 2) if quick else (800, 10)
    rows = protocol.train_run(
        **common | CASES[keys["case"]] | dict(steps=steps, eval_every=steps // looks)
    )
    return {
        "val_loss": protocol.curve(rows, "val_loss")[-1],
        "loss": protocol.tail(rows),
        "curve": [round(x, 4) for x in protocol.curve(rows, "val_loss")],
    }


def branches(common: dict, lengths: tuple) -> dict:
    """Final losses of each length: branched from one stable run, WSD as a whole, cosine; steps they
    took."""
    wsd, steps = CASES["WSD, linear"], {}

    def run(name: str, n: int, done: int = 0, **more) -> float:
        rows = protocol.train_run(**common | dict(steps=n, eval_every=n) | more)
        steps[name] = steps.get(name, 0) + n - done
        return protocol.curve(rows, "val_loss")[-1]

    with tempfile.TemporaryDirectory() as folder:
        starts = [n * 4 // 5 for n in lengths]
        run(
            "branched",
            starts[-1],
            schedule="constant",
            out_dir=f"{folder}/stable",
            save_every=starts[0],
            keep="none",
        )
        found = {
            "branched": [
                run(
                    "branched",
                    n,
                    at,
                    out_dir=f"{folder}/{n}",
                    resume=f"{folder}/stable/step-{at:08d}",
                    **wsd,
                )
                for n, at in zip(lengths, starts)
            ]
        }
    found["whole"] = [run("whole", n, **wsd) for n in lengths]
    found["cosine"] = [run("cosine", n, **CASES["cosine"]) for n in lengths]
    return found | {"lengths": [*lengths], "steps": [steps[name] for name in found]}


# ---- what they say -------------------------------------------------------------------------------
def least(found, loss) -> list[dict]:
    """Of lists of rows that with the lowest mean; NaN is the highest."""
    return min(found, key=lambda mine: (math.isnan(x := mean_sd([loss(r) for r in mine])[0]), x))


def best(rows: list[dict], case: str) -> list[dict]:
    return least(
        groups(pick(rows, part="shape", case=case), "lr").values(), lambda r: r["val_loss"]
    )


def gaps(rows: list[dict], case: str) -> list[float]:
    """Against cosine, each at its best lr."""
    return paired(best(rows, case), best(rows, "cosine"), "val_loss")


def by_length(rows: list[dict], name: str) -> list[list[float]]:
    """For each length, the losses of all seeds: the branches at one lr for all, the others at their
    best."""
    found, n = groups(pick(rows, part="branch"), "lr").values(), len(LENGTHS)
    if name == "branched":
        found = [least(found, lambda r: sum(r[name])) for _ in range(n)]
    else:
        found = [least(found, lambda r, i=i: r[name][i]) for i in range(n)]
    return [[r[name][i] for r in mine] for i, mine in enumerate(found)]


def parts(rows: list[dict]) -> dict[str, bool]:
    """What is claimed, in figures: does it hold?"""
    found = {}
    wsd = min(
        (c for (c,) in groups(pick(rows, part="shape"), "case") if c[:3] == "WSD"),
        key=lambda c: mean_sd(gaps(rows, c))[0],
    )
    for case in (wsd, "SGDR"):
        found[f"{case} ends {plus_minus(gaps(rows, case), '+.2%')} from cosine (clearly below)"] = (
            clear([-x for x in gaps(rows, case)])
        )
    for case in ("OneCycle", "Schedule-Free"):
        found[
            f"{case} ends {plus_minus(gaps(rows, case), '+.2%')} from cosine (at most 1 % worse)"
        ] = mean_sd(gaps(rows, case))[0] <= 0.01
    mine = pick(rows, part="branch")
    same = all(r["branched"] == r["whole"] for r in mine)
    found["branches from one stable run end as whole WSD runs do, to the last bit"] = same
    off = [
        a / b - 1
        for x, y in zip(by_length(rows, "branched"), by_length(rows, "cosine"))
        for a, b in zip(x, y)
    ]
    taken = dict(zip(("branched", "whole", "cosine"), mine[0]["steps"]))
    found[
        f"the branches end {plus_minus(off, '+.2%')} from cosines of their lengths, in"
        f" {taken['branched']} steps instead of {taken['cosine']} (at most 1 % worse)"
    ] = mean_sd(off)[0] <= 0.01
    return found


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    return judged(parts(rows))


def table(rows: list[dict]) -> str:
    lines = listed(parts(rows))
    shapes, lrs = (
        pick(rows, part="shape"),
        [*dict.fromkeys(r["lr"] for r in pick(rows, part="shape"))],
    )
    cells = []
    for (case,), mine in groups(shapes, "case").items():
        top = best(rows, case)
        rim = " (rim)" * (len(lrs) > 1 and top[0]["lr"] in (lrs[0], lrs[-1]))
        others = [f"{mean_sd([r['val_loss'] for r in pick(mine, lr=lr)])[0]:.4f}" for lr in lrs]
        cells.append(
            [
                case,
                f"2^{math.log2(top[0]['lr']):.0f}{rim}",
                plus_minus([r["val_loss"] for r in top]),
                "" if case == "cosine" else plus_minus(gaps(rows, case), "+.2%"),
                *others,
            ]
        )
    head = [
        "schedule",
        "best lr",
        "validation loss there",
        "against cosine",
        *(f"at 2^{math.log2(lr):.0f}" for lr in lrs),
    ]
    first = pick(rows, part="branch")[0]
    names = dict(
        branched="WSD, branched from one run", whole="WSD, whole runs", cosine="cosine, whole runs"
    )
    ends = [
        [text, *(plus_minus(x) for x in by_length(rows, name)), n]
        for (name, text), n in zip(names.items(), first["steps"])
    ]
    return "\n\n".join(
        [
            "\n".join(lines),
            markdown(head, cells),
            markdown(["", *(f"{n} steps" for n in first["lengths"]), "steps in all"], ends),
        ]
    )


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(13, 4.8)
    ends, curves, lengths = figure.subplots(1, 3)
    cases = [case for (case,) in groups(pick(rows, part="shape"), "case") if case != "cosine"]
    ends.axvline(0, color="black", lw=0.8)
    dots(ends, {case: [100 * x for x in gaps(rows, case)] for case in cases})
    ends.set(xlabel="loss against cosine, %, at its best lr", title="The end")
    drawn = [case for case in SHOWN if case in (*cases, "cosine")]
    for case, color in zip(drawn, INK):
        top = best(rows, case)
        n = len(top[0]["curve"])
        line(
            curves,
            {i / (n - 1): [r["curve"][i] for r in top] for i in range(1, n)},
            case,
            color=color,
        )
    low = min(r["val_loss"] for case in drawn for r in best(rows, case))
    curves.set(
        ylim=(low - 0.03, low + 0.8),
        xlabel="share of the run",
        ylabel="validation loss",
        title="On the way",
    )
    below(curves, ncols=3)
    steps = pick(rows, part="branch")[0]["lengths"]
    for name, color, style in (
        ("cosine", INK[0], "o-"),
        ("whole", INK[2], "s--"),
        ("branched", INK[1], "x"),
    ):
        text = {
            "cosine": "cosine, whole runs",
            "whole": "WSD, whole runs",
            "branched": "WSD, branched",
        }[name]
        line(lengths, dict(zip(steps, by_length(rows, name))), text, color=color, fmt=style)
    lengths.set(xlabel="steps", ylabel="validation loss", title="One stable run, three lengths")
    lengths.legend(frameon=False)


# ---- on somebody's own text ----------------------------------------------------------------------
TYPED = {claims.slug(case): fields for case, fields in CASES.items()}
TYPED = {"wsd": CASES["WSD, linear"], **TYPED, "inverse_sqrt": {"schedule": "inverse_sqrt"}}


def candidate(name: str) -> dict:
    return {"lr": 2.0**-7} | TYPED[name]


if __name__ == "__main__":
    claims.main(__file__, [*TYPED], candidate)
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
