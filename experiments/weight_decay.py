"""Claim: L2 in Adam's gradient is no weight decay: the step divides it by the gradient's size, so
weights decay unequally, the large ones less; AdamW decays all alike, and ends better.

Source: the second lesson, after Loshchilov and Hutter 2019, 1711.05101. The paper says that weights
with large *gradients* decay less; the lesson says large *weights*. Both are measured.

Protocol: the default corpus in bytes, 2 layers of width 64, 512 tokens a step, betas .9 and .95.
`loss`: 500 steps with each optimizer, 3 learning rates x 6 decays, equally many for both, 3 seeds;
its own best setting is the one with the lowest mean validation loss; AdamW is better if, seed by
seed, mean difference x sqrt(n) is at least 3.1 standard deviations. `share`: 300 steps; in the last
50 each matrix weight's decay is what λw puts into the step: AdamW's λw, or for L2 λw's part of the
first moment over the root of the second. Its share of the weight, in units of lr, is taken in ten
groups by the size of the gradient (root mean square of the 50) and by the size of the weight, and
its rank correlation with both; with the weight also at equal gradients, within the groups.

Expected: with L2 the tenth of the weights with the largest gradients decays less than half as much
as that with the smallest, and the correlation with the weight at equal gradients is near 0, until
λw outgrows the gradient itself: then the step is λw over its own size, and large weights do decay
less. AdamW's share is λ everywhere. In 500 steps, a tenth of an epoch, decay hardly helps anybody:
a small difference in loss.

    python -m experiments.weight_decay [--quick] [--out=DIR] [--jobs=N]
"""

import math

import torch
from torch.optim import optimizer as hooks

from experiments import protocol
from experiments.findings import (
    INK,
    clear,
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

DECAYS = {"adamw": (0.0, 0.01, 0.03, 0.1, 0.3, 1.0), "adam_l2": (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)}
NAMES = {"adamw": "AdamW", "adam_l2": "Adam + L2"}
SHARES = [("adamw", 0.1), ("adam_l2", 1e-5), ("adam_l2", 1e-3), ("adam_l2", 1e-1)]
LRS, SEEDS = (2.0**-8, 2.0**-7, 2.0**-6), (1, 2, 3)


def grid(lrs: tuple, every: int, shares: list, seeds: tuple) -> list[dict]:
    loss = [
        dict(part="loss", optim=optim, lr=lr, decay=decay, seed=seed)
        for optim in DECAYS
        for decay in DECAYS[optim][::every]
        for lr in lrs
        for seed in seeds
    ]
    return loss + [
        dict(part="share", optim=optim, lr=LRS[1], decay=decay, seed=seed)
        for optim, decay in shares
        for seed in seeds
    ]


GRID, QUICK = grid(LRS, 1, SHARES, SEEDS), grid(LRS[1:2], 3, SHARES[::2], SEEDS[:1])


# ---- rows ----------------------------------------------------------------------------------------
def row(keys: dict, quick: bool) -> dict:
    steps = 30 if quick else 500 if keys["part"] == "loss" else 300
    looked = shares_of_last(10 if quick else 50, steps) if keys["part"] == "share" else dict
    rows = protocol.train_run(
        optim=keys["optim"],
        lr=keys["lr"],
        weight_decay=keys["decay"],
        seed=keys["seed"],
        steps=steps,
        n_layer=2,
        n_embd=64,
        block_size=64,
        batch_size=8,
        precision="fp32",
        eval_every=steps,
        eval_tokens=4096 if quick else 32768,
        **{"opt.betas": (0.9, 0.95)},
    )
    return {"val_loss": protocol.curve(rows, "val_loss")[-1]} | looked()


def shares_of_last(window: int, steps: int):
    """From now on every optimizer step is looked at; what it returns gives the figures after the
    run."""
    # Parameter -> λw's first moment; sums over the window of decay, weight, gradient squared
    kept = {}

    def matrices(optimizer):
        found = [g for g in optimizer.param_groups if g["kind"] == "matrix"]
        return ((p, g, optimizer.state[p]) for g in found for p in g["params"])

    def before(optimizer, *_) -> None:
        for p, g, _ in matrices(optimizer):
            moment, *_ = kept.setdefault(p, [torch.zeros_like(p) for _ in range(4)])
            moment.lerp_(g["weight_decay"] * p.detach(), 1 - g["betas"][0])
            kept[p].append(p.detach().clone())

    def after(optimizer, *_) -> None:
        for p, g, state in matrices(optimizer):
            moment, decay, weight, square, old = kept[p]
            kept[p].pop()
            t, (beta1, beta2) = state["step"], g["betas"]
            if t <= steps - window:
                continue
            root = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + g["eps"]
            l2 = type(optimizer).__name__ == "AdamL2"
            decay += moment / (1 - beta1**t) / root if l2 else g["weight_decay"] * old
            weight += old
            square += p.grad**2

    hooks.register_optimizer_step_pre_hook(before)
    hooks.register_optimizer_step_post_hook(after)

    def figures() -> dict:
        decay, weight, square = (
            torch.cat([x[i].flatten() for x in kept.values()]) for i in (1, 2, 3)
        )
        gradient, size, share = square.sqrt(), weight.abs(), decay / weight

        def tenths(by: torch.Tensor) -> list[float]:
            parts = by.argsort().chunk(10)
            return [(decay[i] @ weight[i] / (weight[i] @ weight[i])).item() for i in parts]

        within = [ranked(size[i], share[i]) for i in gradient.argsort().chunk(10)]
        return {
            "by_gradient": tenths(gradient),
            "by_weight": tenths(size),
            "with_gradient": ranked(gradient, share),
            "with_weight": ranked(size, share),
            "with_weight_alone": sum(within) / 10,
        }

    return figures


def ranked(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation; 0 where one of them is the same everywhere, up to rounding."""
    if min((x.quantile(0.99) - x.quantile(0.01)).abs() / x.abs().mean() for x in (a, b)) < 1e-5:
        return 0.0
    return torch.corrcoef(torch.stack([x.argsort().argsort().double() for x in (a, b)]))[
        0, 1
    ].item()


# ---- what they say -------------------------------------------------------------------------------
def best(rows: list[dict], optim: str, **keys) -> list[dict]:
    """The rows of its setting with the lowest mean loss; a setting that diverged is none."""
    found = groups(pick(rows, part="loss", optim=optim, **keys), "lr", "decay").values()
    return min(found, key=lambda g: (math.isnan(x := mean_sd([r["val_loss"] for r in g])[0]), x))


def mean(rows: list[dict], optim: str, decay: float, name: str, i: int | None = None) -> float:
    found = [r[name] for r in pick(rows, part="share", optim=optim, decay=decay)]
    return mean_sd([x if i is None else x[i] for x in found])[0]


def parts(rows: list[dict]) -> dict[str, bool]:
    """What is claimed, in figures: does it hold?"""
    shares = [*groups(pick(rows, part="share"), "optim", "decay")]
    ratio = {
        key: mean(rows, *key, "by_gradient", 9) / mean(rows, *key, "by_gradient", 0)
        for key in shares
    }
    l2 = [key for key in shares if key[0] == "adam_l2"]
    alone = {key: mean(rows, *key, "with_weight_alone") for key in l2}
    gaps = paired(best(rows, "adam_l2"), best(rows, "adamw"), "val_loss")
    listed = ", ".join(f"{ratio[key]:.2g} at λ = {key[1]:g}" for key in l2)
    ranks = ", ".join(f"{x:+.2f} at λ = {key[1]:g}" for key, x in alone.items())
    return {
        (
            f"with L2 the weights of the largest gradients decay {listed} times as much as those of"
            " the smallest (half or less)"
        ): all(ratio[key] <= 0.5 for key in l2),
        f"with AdamW {ratio[shares[0]]:.2g} times (within 1 %)": abs(ratio[shares[0]] - 1) <= 0.01,
        (
            "at equal gradients, L2's decay goes with the size of the weight at rank correlations"
            f" of {ranks} (the lesson: large weights decay less, -0.5 or below)"
        ): all(x <= -0.5 for x in alone.values()),
        f"the best L2 ends {plus_minus(gaps, '+.2%')} from the best AdamW (clearly worse)": clear(
            gaps
        ),
    }


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    return judged(parts(rows))


def table(rows: list[dict]) -> str:
    lines = listed(parts(rows))
    lrs = [*dict.fromkeys(r["lr"] for r in pick(rows, part="loss"))]
    losses = []
    for (optim, decay), mine in groups(pick(rows, part="loss"), "optim", "decay").items():
        cells = [plus_minus([r["val_loss"] for r in pick(mine, lr=lr)]) for lr in lrs]
        top = best(rows, optim)[0]
        cells = [
            f"**{c}**" if (lr, decay) == (top["lr"], top["decay"]) else c
            for c, lr in zip(cells, lrs)
        ]
        losses.append([NAMES[optim], f"{decay:g}", *cells])
    shares = []
    for (optim, decay), mine in groups(pick(rows, part="share"), "optim", "decay").items():
        ends = [
            f"{mean(rows, optim, decay, name, i):.3g}"
            for name in ("by_gradient", "by_weight")
            for i in (0, 9)
        ]
        ranks = [
            plus_minus([r[name] for r in mine], "+.2f")
            for name in ("with_gradient", "with_weight", "with_weight_alone")
        ]
        shares.append([NAMES[optim], f"{decay:g}", *ends, *ranks])
    head = [
        "optimizer",
        "λ",
        "smallest gradients",
        "largest gradients",
        "smallest weights",
        "largest weights",
        "rank correlation with the gradient",
        "with the weight",
        "with the weight, at equal gradients",
    ]
    return "\n\n".join(
        [
            "\n".join(lines),
            "Validation loss (bold: its best):",
            markdown(["optimizer", "λ", *(f"lr 2^{math.log2(lr):.0f}" for lr in lrs)], losses),
            (
                "Share of a weight that one step decays, over lr, in the outermost tenths of the"
                " weights:"
            ),
            markdown(head, shares),
        ]
    )


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(13, 4.5)
    loss, *axes = figure.subplots(1, 3, width_ratios=[1.2, 1, 1])
    tried = {r["decay"] for r in pick(rows, part="loss")} - {0}
    zero = min(tried) / 100  # where a logarithmic axis has its 0
    for optim, color in zip(DECAYS, INK):
        decays = [*dict.fromkeys(r["decay"] for r in pick(rows, part="loss", optim=optim))]
        points = {d or zero: [r["val_loss"] for r in best(rows, optim, decay=d)] for d in decays}
        line(loss, points, NAMES[optim], color=color, marker="o", ms=4)
    loss.set(
        xscale="log",
        xlabel="λ",
        ylabel="validation loss, at its best lr",
        title="Loss against decay",
    )
    powers = [
        10.0**k for k in range(-20, 20, 2) if min(tried) <= 1.01 * 10.0**k <= 1.02 * max(tried)
    ]
    loss.set_xticks([zero, *powers], ["0", *(f"{x:g}" for x in powers)])
    loss.minorticks_off()
    loss.legend(frameon=False)
    for ax, name, of in zip(axes, ("by_gradient", "by_weight"), ("gradient", "weight")):
        for ((optim, decay), mine), color in zip(
            groups(pick(rows, part="share"), "optim", "decay").items(), INK
        ):
            middle = mean_sd([x for r in mine for x in r[name]])[0]
            line(
                ax,
                {i + 1: [r[name][i] / middle for r in mine] for i in range(10)},
                f"{NAMES[optim]}, λ = {decay:g}",
                color=color,
                marker="o",
                ms=4,
            )
        ax.set(
            yscale="log",
            xlabel=f"tenth of the weights by size of the {of}",
            ylabel="share decayed in a step, mean = 1",
            title=f"Who decays: by {of}",
        )
        ax.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
