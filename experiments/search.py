"""Claim: on one budget of trials random search finds better settings than a grid, and Optuna better
ones than random search.

Source: the fifth lesson, section 1 (grid, "random: more efficient", Optuna), after Bergstra and
Bengio 2012.

Protocol: lr (AdamW), batch size, weight decay and dropout of a GPT of 2 layers and width 64; 24
trials each of the same 76,800 tokens, so a larger batch means fewer steps. The grid: 3 lr, 2 of
each other. Random and Optuna (TPE, search/proposals.py, as sweep.py has them) draw from the ranges
between which the grid's values lie in the middle of equal parts; no trial is stopped early, as
trials of different batch sizes do not compare at a step. 5 repetitions: another seed of the draws
and of the training. The figure is the best validation loss after 24 trials, seed by seed against
the other method's; significant if the mean gap is 2 standard errors from 0.

Expected: lr decides, the other three hardly matter at this scale, and of lr a grid of 24 tries 3
values where random search tries 24: random search ends better. TPE draws its first 10 trials at
random and has 14 left to learn from them: a little better than random search, perhaps not
significantly.

    python -m experiments.search [--quick] [--out=DIR] [--jobs=N]
"""

import itertools
import math

from experiments import protocol
from experiments.findings import (
    INK,
    groups,
    judged,
    line,
    markdown,
    mean_sd,
    paired,
    pick,
    plus_minus,
)
from metrics import plot
from search import proposals

TOKENS, LENGTH, TRIALS = 76_800, 64, 24
RANGES = {
    "lr": ("log", 1e-4, 1e-1),
    "batch_size": ["4", "8", "16", "32"],
    "weight_decay": ("log", 1e-3, 1.0),
    "dropout": ("lin", 0.0, 0.4),
}
VALUES = {
    "lr": ["3.2e-4", "3.2e-3", "3.2e-2"],
    "batch_size": ["8", "16"],
    "weight_decay": ["5.6e-3", "0.18"],
    "dropout": ["0.1", "0.3"],
}
METHODS = ("grid", "random", "optuna")

GRID = [dict(method=method, seed=seed) for seed in (1, 2, 3, 4, 5) for method in METHODS]
QUICK = [dict(method=method, seed=1) for method in METHODS]


# ---- rows ----------------------------------------------------------------------------------------
class Trial:
    """What search/proposals.py asks of a trial."""

    def __init__(self, number: int):
        self.number, self.values, self.status, self.found = number, {}, "unfinished", {}

    def curve(self, metric: str) -> dict[int, float]:
        return self.found


def row(keys: dict, quick: bool) -> dict:
    method, seed, trials = keys["method"], keys["seed"], 2 if quick else TRIALS
    space = VALUES if method == "grid" else RANGES
    chosen = proposals.Proposals(method, space, "val_loss", False, seed, trials)
    losses, drawn = [], []
    plot.plot = lambda *_: None  # takes longer than a trial
    for number in range(trials):
        trial = Trial(number)
        chosen.begin(trial)
        steps = (8 if quick else TOKENS // LENGTH) // int(trial.values["batch_size"])
        rows = protocol.train_run(
            **trial.values,
            seed=seed,
            steps=max(2, steps),
            n_layer=1 if quick else 2,
            n_embd=64,
            block_size=LENGTH,
            optim="adamw",
            precision="fp32",
            eval_every=10_000,
            eval_tokens=2048 if quick else 16384,
            log_every=20,
            on_spike="none",
            on_nonfinite="none",
        )
        loss = protocol.curve(rows, "val_loss")[-1]
        trial.found = {max(2, steps): loss}
        trial.status = "done" if math.isfinite(loss) else "failed"
        chosen.end(trial)
        losses.append(loss)
        drawn.append([float(trial.values[name]) for name in RANGES])
    best = min(range(trials), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    settings = dict(zip((f"best_{name}" for name in RANGES), drawn[best]))
    return {"best": losses[best], **settings, "losses": losses, "drawn": [list(x) for x in drawn]}


# ---- findings ------------------------------------------------------------------------------------
def so_far(losses: list[float]) -> list[float]:
    """The best of the first 1, 2, ... trials; one that diverged is none."""
    return [*itertools.accumulate((x if math.isfinite(x) else math.inf for x in losses), min)]


def against(rows: list[dict], method: str, base: str) -> tuple[float, float]:
    """Mean gap of the best loss, seed by seed, and its standard error (NaN with one seed)."""
    found = paired(pick(rows, method=method), pick(rows, method=base), "best")
    mean, sd = mean_sd(found)
    return mean, sd / math.sqrt(len(found))


def better(rows: list[dict], method: str, base: str) -> bool:
    mean, error = against(rows, method, base)
    return mean < -2 * error


def reached(rows: list[dict], method: str) -> list[int | float]:
    """Trials, seed by seed, until the method is as good as the grid's best of all; inf where it
    never is."""
    goal = {r["seed"]: r["best"] for r in pick(rows, method="grid")}
    return [
        next((i + 1 for i, x in enumerate(so_far(r["losses"])) if x <= goal[r["seed"]]), math.inf)
        for r in pick(rows, method=method)
    ]


def parts(rows: list[dict]) -> dict[str, bool]:
    found = {}
    for method, base in (("random", "grid"), ("optuna", "random"), ("optuna", "grid")):
        mean, error = against(rows, method, base)
        found[
            f"{method} ends {mean:+.2%} ± {error:.2%} (standard error) from {base} (below 0 by 2"
            " errors)"
        ] = better(rows, method, base)
    return found


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    found, after = parts(rows), sorted(reached(rows, "random"))
    word, _, why = judged(found)
    if (
        word == "does not hold"
        and not better(rows, "grid", "random")
        and not better(rows, "random", "optuna")
    ):
        word = "not at this scale"  # no method is significantly better than another
    middle = after[len(after) // 2]
    goal = f"after {middle} trials" if math.isfinite(middle) else "not at all"
    number = (
        f"random search is as good as the whole grid of {len(rows[0]['losses'])} {goal} (median)"
    )
    return word, number, why


def table(rows: list[dict]) -> str:
    lines = []
    for (method,), mine in groups(rows, "method").items():
        after = sorted(reached(rows, method))
        spread = [format(mean_sd([r[f"best_{name}"] for r in mine])[0], ".2g") for name in RANGES]
        lines.append(
            [method, plus_minus([r["best"] for r in mine]), f"{after[len(after) // 2]:g}", *spread]
        )
    head = [
        "method",
        "best validation loss",
        "trials until the grid's best (median)",
        *(f"best {n}" for n in RANGES),
    ]
    said = "\n".join(
        f"- {text}: {'yes' if held else '**no**'}" for text, held in parts(rows).items()
    )
    return f"{said}\n\n{markdown(head, lines)}\n\nBest settings: means over repetitions."


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(12, 4.6)
    curve, lrs = figure.subplots(1, 2)
    for ((method,), mine), color in zip(groups(rows, "method").items(), INK):
        bests = zip(*(so_far(r["losses"]) for r in mine))
        points = {
            i + 1: [*values] for i, values in enumerate(bests) if all(map(math.isfinite, values))
        }
        line(curve, points, method, color=color, alpha=0.85)
        for r in mine:
            lrs.plot(
                [x[0] for x in r["drawn"]],
                [min(y, 4.5) for y in r["losses"]],
                "o",
                ms=4,
                mew=0,
                alpha=0.5,
                color=color,
                label=method if r is mine[0] else None,
            )
    lowest = min(r["best"] for r in rows)
    early = max(so_far(r["losses"])[len(r["losses"]) // 4] for r in rows)
    winner = min(rows, key=lambda r: r["best"])
    curve.set(
        title=f"The best so far; of all: {lowest:.3f}, {winner['method']}",
        xlabel="trials",
        ylabel="validation loss (nats per byte)",
        ylim=(lowest - 0.03, early + 0.1),
    )
    lrs.set(
        xscale="log",
        title="All trials (worse than 4.5: at the rim)",
        xlabel="learning rate",
        ylabel="validation loss (nats per byte)",
    )
    lrs.grid(alpha=0.25)
    for ax in (curve, lrs):
        ax.legend(frameon=False)


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
