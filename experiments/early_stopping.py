"""Claim: early stopping ends an overfitting run in time and gives the best weights back; the common
`state_dict().copy()` gives back the last ones.

Source: the fifth lesson's early stopping, whose `copy` is shallow: its tensors are the weights
themselves, which go on changing. Its rule, "not (loss > best - min_delta)", also takes a NaN for
the best loss, and then whatever comes next: the true best is forgotten.

Protocol: the first 24 KiB of the default corpus as a text of its own (a tenth of it is held out), 2
layers of width 64, 512 tokens a step, AdamW at a constant lr, 3 seeds; an evaluation every 20
steps. `whole`: 600 steps to the end; a shallow copy and a clone of the weights are taken at each
new best evaluation, and both are put back after the run. `patience`: the same run with
--patience=4. `nan`: that once more, and the evaluation after the best one reports NaN. Of each, the
weights in the final checkpoint are evaluated anew. The lesson's rule is followed on the evaluations
of the whole run, as they are and with such a NaN.

Expected: the held-out loss turns after some 100 steps and ends far above its best. With patience
the run ends 4 evaluations after the best, and its checkpoint has exactly the best loss, to the last
bit; so it has with a NaN on the way. The clone gives the best loss too, the shallow copy the last
one. After the NaN the lesson's rule gives back something worse than the best.

    python -m experiments.early_stopping [--quick] [--out=DIR] [--jobs=N]
"""

import math
import tempfile
from pathlib import Path

import torch

import train
from checkpoint import load
from data import corpora
from experiments import protocol
from experiments.findings import (
    INK,
    below,
    groups,
    judged,
    line,
    listed,
    markdown,
    pick,
    plus_minus,
)

PATIENCE, SEEDS, CASES = 4, (1, 2, 3), ("whole", "patience", "nan")
EVALUATE = train.evaluate
GRID = [dict(case=case, seed=seed) for case in CASES for seed in SEEDS]
QUICK = [dict(case=case, seed=1) for case in CASES]


# ---- rows ----------------------------------------------------------------------------------------
def row(keys: dict, quick: bool) -> dict:
    if keys["case"] != "nan":
        return figures_of(keys, quick)
    before = figures_of(keys | dict(case="patience"), quick)["val_loss"]
    return figures_of(keys, quick, nan_at=before.index(min(before)) + 1)


def figures_of(keys: dict, quick: bool, nan_at: int | None = None) -> dict:
    """Of one run, whose evaluation of this number reports NaN."""
    steps, every = (120, 15) if quick else (600, 20)
    case, evaluate, looks, kept = keys["case"], EVALUATE, [], {}

    def look(micro_batches, *others, **options) -> dict:
        """train.py's evaluation; what a text would keep of the best weights is kept beside."""
        model = micro_batches.model
        found = evaluate(micro_batches, *others, **options)
        best = min((x for x in looks if not math.isnan(x)), default=math.inf)
        if len(looks) == nan_at:
            found = found | {"val_loss": math.nan}
        elif found["val_loss"] < best:
            kept["copy"] = model.state_dict().copy()
            kept["clone"] = {name: p.clone() for name, p in model.state_dict().items()}
        looks.append(found["val_loss"])
        kept["again"] = lambda: evaluate(micro_batches, *others)["val_loss"]
        kept["model"] = model
        return found

    train.evaluate = look
    text = corpora.load("python", "bytes", str(protocol.CACHE)).train.slice(0, 24 * 1024)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "small.txt").write_bytes(bytes(text.tolist()))
        rows = protocol.train_run(
            data=f"{folder}/small.txt",
            out_dir=f"{folder}/run",
            seed=keys["seed"],
            steps=steps,
            n_layer=2,
            n_embd=64,
            block_size=64,
            batch_size=8,
            precision="fp32",
            optim="adamw",
            lr=2.0**-7,
            schedule="constant",
            eval_every=every,
            patience=None if case == "whole" else PATIENCE,
            **{"opt.betas": (0.9, 0.95)},
        )
        figures = {"final": loss_of(kept, load.resolve(f"{folder}/run").weights("model"))}
    for name in ("copy", "clone") if case == "whole" else ():
        figures[name] = loss_of(kept, lambda n, shape, name=name: kept[name][n])
    best = min(x for x in looks if not math.isnan(x))
    losses = [float(f"{x:.4g}") for x in protocol.curve(rows)]
    return figures | {
        "best": best,
        "best_step": every * looks.index(best),
        "steps": len(losses),
        "every": every,
        "val_loss": looks,
        "loss": losses[every // 2 :: every],
    }


def loss_of(kept: dict, weights) -> float:
    """The held-out loss of the run's model with these weights: a function of name and shape."""
    with torch.no_grad():
        for name, p in kept["model"].named_parameters():
            p.copy_(weights(name, tuple(p.shape)))
    return kept["again"]()


# ---- what they say -------------------------------------------------------------------------------
def lesson(losses: list[float], patience: int) -> tuple[int, int]:
    """(evaluations until the lesson's rule stops, or all there are; the one it takes for the
    best)."""
    best, at, bad = losses[0], 0, 0
    for i, loss in enumerate(losses[1:], 1):
        if loss > best:
            bad += 1
            if bad >= patience:
                return i + 1, at
        else:
            best, at, bad = loss, i, 0
    return len(losses), at


def with_nan(losses: list[float]) -> list[float]:
    """NaN instead of what followed the best."""
    return [math.nan if i == losses.index(min(losses)) + 1 else x for i, x in enumerate(losses)]


def parts(rows: list[dict]) -> dict[str, bool]:
    """What is claimed, in figures: does it hold?"""
    of = {case: pick(rows, case=case) for case in CASES}
    whole, stopped, nan = of.values()
    worse = [r["val_loss"][-1] / r["best"] - 1 for r in whole]
    saved = [1 - r["steps"] / w["steps"] for r, w in zip(stopped, whole)]
    rule = [
        r["val_loss"][lesson(with_nan(r["val_loss"]), PATIENCE)[1]] / r["best"] - 1 for r in whole
    ]
    return {
        (
            f"without it the run ends {plus_minus(worse, '+.0%')} above its best loss"
            " (overfits: 5 % or more)"
        ): (min(worse) >= 0.05),
        (
            f"with patience it takes {plus_minus(saved, '.0%')} fewer steps"
            " (ends before the run does)"
        ): (min(saved) > 0),
        "the final checkpoint has the best loss of its run, to the last bit": all(
            r["final"] == r["best"] for r in stopped
        ),
        "and it is the best loss of the whole run too": all(
            r["final"] == w["best"] for r, w in zip(stopped, whole)
        ),
        "the same with a NaN among the evaluations": all(r["final"] == r["best"] for r in nan),
        "a clone, put back after the whole run, gives the best loss": all(
            r["clone"] == r["best"] for r in whole
        ),
        "state_dict().copy(), put back, gives the last loss": all(
            r["copy"] == r["val_loss"][-1] != r["best"] for r in whole
        ),
        (
            f"after a NaN the lesson's rule gives back {plus_minus(rule, '+.1%')}"
            " above the best (above)"
        ): (min(rule) > 0),
    }


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    found = parts(rows)
    word, _, why = judged(found)
    if not next(iter(found.values())):
        word = "not at this scale"
    r = pick(rows, case="whole")[0]
    number = (
        f"best loss {r['best']:.3f}, given back by a clone {r['clone']:.3f}, by copy()"
        f" {r['copy']:.3f}"
    )
    return word, number, why


def table(rows: list[dict]) -> str:
    lines = listed(parts(rows))
    cells, whole = [], pick(rows, case="whole")

    def one(name: str, mine: list[dict], steps: list[float], loss: list[float]) -> None:
        cells.append(
            [
                name,
                plus_minus(steps, ".0f"),
                plus_minus([r["best_step"] for r in mine], ".0f"),
                plus_minus([r["best"] for r in mine]),
                plus_minus(loss),
            ]
        )

    names = dict(
        whole="none: the last weights",
        patience=f"--patience={PATIENCE}",
        nan=f"--patience={PATIENCE}, one evaluation is NaN",
    )
    for (case,), mine in groups(rows, "case").items():
        one(names[case], mine, [r["steps"] for r in mine], [r["final"] for r in mine])
    for name in ("clone", "copy"):
        one(
            f"at the end: the best, kept by {name}",
            whole,
            [r["steps"] for r in whole],
            [r[name] for r in whole],
        )
    for name, change in (("", list), (", one evaluation is NaN", with_nan)):
        rule = [lesson(change(r["val_loss"]), PATIENCE) for r in whole]
        steps = [(n - 1) * r["every"] for (n, _), r in zip(rule, whole)]
        one(
            f"the lesson's rule, cloned{name}",
            whole,
            steps,
            [r["val_loss"][at] for (_, at), r in zip(rule, whole)],
        )
    head = [
        "early stopping",
        "steps",
        "best at step",
        "best loss seen",
        "loss of the weights given back",
    ]
    return "\n".join(lines) + "\n\n" + markdown(head, cells)


def picture(rows: list[dict], figure) -> None:
    ax, whole, stopped = figure.subplots(), pick(rows, case="whole"), pick(rows, case="patience")
    every, n = whole[0]["every"], len(whole[0]["val_loss"])
    line(
        ax,
        {i * every: [r["val_loss"][i] for r in whole] for i in range(1, n)},
        "held out, whole run",
        color=INK[0],
        ls="",
        marker="o",
        ms=4,
    )
    line(
        ax,
        {(i + 0.5) * every: [r["loss"][i] for r in whole] for i in range(n - 1)},
        "training",
        color=INK[5],
        lw=1.8,
    )
    for i, r in enumerate(stopped):
        ax.axvline(r["steps"], color=INK[2], lw=1, label=f"--patience={PATIENCE} stops" * (i == 0))
        ax.plot(
            r["best_step"],
            r["final"],
            "o",
            ms=9,
            mfc="none",
            mew=2,
            color=INK[2],
            label="its final checkpoint" * (i == 0),
        )
    ends = [r["steps"] for r in whole]
    ax.plot(
        ends,
        [r["copy"] for r in whole],
        "x",
        ms=9,
        mew=2,
        color=INK[1],
        label="state_dict().copy() of the best, put back",
    )
    ax.plot(
        ends,
        [r["clone"] for r in whole],
        "+",
        ms=11,
        mew=2,
        color=INK[3],
        label="a clone, put back",
    )
    ax.set(
        xlabel="steps",
        ylabel="loss, nats a byte",
        title=f"An overfitting run; seeds: {len(whole)}",
    )
    below(ax, ncols=3)


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
