"""Claim: with k times the batch SGD wants k times the learning rate, and a warm-up, until that
breaks; LARS and LAMB hold at batches several times larger, and LAMB is the one for transformers.

Source: the first lesson: Goyal et al. 2017 (1706.02677), You et al. 2017 (1708.03888), You et al.
2020 (1904.00962). Its figures are those of ResNet-50 on ImageNet (SGD to 8K, LARS and LAMB to 32K)
and of BERT; here the same rules are tried on a GPT, and only they, not those figures. The square
root for Adam is Malladi et al. 2022 (2205.10287).

Protocol: the default corpus in bytes, 2 layers of width 64, sequences of 64 bytes, 4 of them a step
for 2048 steps, or k times as many for 2048 / k steps, k = 1 to 64: equal tokens. Nothing starts at
zero (zero_init=false), no clipping, no decay, no guard; cosine to 0 after a warm-up over a tenth of
the steps, except for SGD without. Each method has 6 learning rates, a factor 2 apart around one
that short trials had shown to be near, at k = 1 and one seed; then --lr_scaling takes the best one
to the other batches, 3 seeds. A rule breaks at the first k whose mean validation loss is more than
3 % above that of k = 1, seed by seed. At k = 8 and 64, one seed, 2^-6, 2^-4, 2^-2 and 4 times the
rule's lr tell what is the rule's fault and what the batch's: at k = 64 there are 32 steps. ‖w‖/‖g‖
of each matrix is taken in the middle of a run at k = 1, the first seed's.

Expected: SGD with the linear rule breaks at 8 or 16, without warm-up no later; Adam with the square
root, LAMB and Muon a factor 2 to 4 later, LARS (linear rule) between; at 64 nobody holds. ‖w‖/‖g‖
differs by a factor 10 from layer to layer.

    python -m experiments.large_batch [--quick] [--out=DIR] [--jobs=N]
    python -m experiments.large_batch --data=FILE --cases=adamw:4,adamw:64,lamb:64
"""

import math
import re

from torch.optim import optimizer as hooks

from experiments import claims, protocol
from experiments.findings import INK, judged, line, listed, markdown, mean_sd, plus_minus

# Name: --optim, --lr_scaling, log2 of a middle lr, --warmup_frac, the constructor's arguments
CASES = {
    "SGD without warm-up": ("sgd", "linear", -2, 0.0, {"momentum": 0.9}),
    "SGD": ("sgd", "linear", -2, 0.1, {"momentum": 0.9}),
    "LARS": ("lars", "linear", 2, 0.1, {}),
    "AdamW": ("adamw", "sqrt", -8, 0.1, {"betas": (0.9, 0.95)}),
    "LAMB": ("lamb", "sqrt", -6, 0.1, {}),
    "Muon": ("muon", "sqrt", -6, 0.1, {}),
}
FACTORS, RETUNED, AWAY, BASE, LIMIT = (1, 2, 4, 8, 16, 32, 64), (8, 64), (-6, -4, -2, 0, 2), 4, 0.03
SEEDS, SMALL = "0 to tune, 1 to 3", "0 to tune, 1"  # in the csv
GRID = [dict(case=case, seed=SEEDS) for case in CASES]
QUICK = [dict(case=case, seed=SMALL) for case in CASES if case != "Muon"]


def row(keys: dict, quick: bool) -> dict:
    """All of one case: the best lr at the smallest batch decides the others."""
    optim, rule, middle, warmup, options = CASES[keys["case"]]
    factors, seeds, tries, total = (FACTORS, (1, 2, 3), range(-3, 3), 2048)
    if quick:
        factors, seeds, tries, total = (1, 64), (1,), (0,), 64

    def run(exponent: int, factor: int, seed: int) -> float:
        steps, batch = total // factor, BASE * factor
        rows = protocol.train_run(
            optim=optim,
            lr=2.0**exponent,
            lr_scaling=rule,
            base_batch_size=BASE,
            batch_size=batch,
            micro_batch_size=min(32, batch),
            steps=steps,
            seed=seed,
            schedule="cosine",
            warmup_frac=warmup,
            n_layer=2,
            n_embd=64,
            block_size=64,
            precision="fp32",
            zero_init=False,
            grad_clip="none",
            weight_decay=0,
            on_spike=None,
            on_nonfinite=None,
            eval_every=steps,
            eval_tokens=4096 if quick else 32768,
            **{f"opt.{name}": x for name, x in options.items()},
        )
        return protocol.curve(rows, "val_loss")[-1]

    tuned = {middle + k: run(middle + k, 1, 0) for k in tries}
    best = min(tuned, key=lambda k: (math.isnan(tuned[k]), tuned[k]))
    ratios = layer_ratios((total + 1) // 2)
    losses = [[run(best, factor, seed) for seed in seeds] for factor in factors]
    around = [[run(best + k, factor, 0) for k in AWAY] for factor in (() if quick else RETUNED)]
    return {
        "val_loss": mean_sd(losses[-1])[0],
        "log2_lr": best,
        "tried": [*tuned],
        "tuned": [*tuned.values()],
        "factors": [*factors],
        "losses": losses,
        "around": around,
        "layers": [*ratios],
        "ratios": [*ratios.values()],
    }


def layer_ratios(step: int) -> dict[str, float]:
    """Filled at this step of the next run: ‖w‖/‖g‖ of each matrix by name."""
    found, count = {}, [0]

    def look(optimizer, *_) -> None:
        count[0] += 1
        for g in optimizer.param_groups if count[0] == step else ():
            for name, p in zip(g["names"], g["params"]):
                if p.ndim > 1:
                    norm = p.grad.norm().item()
                    found[name.removesuffix(".weight")] = (
                        p.norm().item() / norm if norm else math.nan
                    )

    hooks.register_optimizer_step_pre_hook(look)
    return found


# ---- what they say -------------------------------------------------------------------------------
def gaps(one: dict) -> dict[int, list[float]]:
    """{factor: loss against that of factor 1, seed by seed}"""
    return {
        k: [x / y - 1 for x, y in zip(losses, one["losses"][0])]
        for k, losses in zip(one["factors"], one["losses"])
    }


def breaks(one: dict) -> float:
    """The first factor at which the rule has broken; infinity if it has not."""
    return next((k for k, x in gaps(one).items() if not mean_sd(x)[0] <= LIMIT), math.inf)


def shown(factor: float) -> str:
    return "not at all" if factor == math.inf else f"at {factor}x"


def spread(one: dict) -> float:
    """Largest over smallest ‖w‖/‖g‖; NaN where a gradient was 0."""
    return (
        max(one["ratios"]) / min(one["ratios"]) if all(x > 0 for x in one["ratios"]) else math.nan
    )


def parts(rows: list[dict]) -> dict[str, bool]:
    """What is claimed, in figures: does it hold?"""
    of = {r["case"]: r for r in rows}
    at = {case: breaks(r) for case, r in of.items()}
    ends = {case: mean_sd(gaps(r)[r["factors"][-1]])[0] for case, r in of.items()}
    cold, k = at["SGD without warm-up"], rows[0]["factors"][-1]
    found = {
        (
            f"SGD with the linear rule breaks {shown(at['SGD'])}"
            f" (at 2x it does not, at {k}x it does)"
        ): (2 < at["SGD"] < math.inf),
        f"without warm-up {shown(cold)} (earlier)": cold < at["SGD"],
    }
    for case in ("LARS", "LAMB"):
        found[f"{case} breaks {shown(at[case])} (4 times SGD's batch or more)"] = (
            at[case] >= 4 * at["SGD"]
        )
    lamb, adam = ends["LAMB"], ends["AdamW"]
    found[f"at {k}x LAMB ends {lamb:+.1%} from its own 1x, AdamW {adam:+.1%} (LAMB less)"] = (
        lamb < adam
    )
    ratio = spread(of["SGD"])
    found[f"‖w‖/‖g‖ differs by a factor {ratio:.1f} between SGD's matrices (10 or more)"] = (
        ratio >= 10
    )
    return found


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    found = parts(rows)
    word, _, why = judged(found)
    number = "breaks: " + ", ".join(f"{r['case']} {shown(breaks(r))}" for r in rows)
    return word, number, why


def table(rows: list[dict]) -> str:
    lines = listed(parts(rows))
    cells, again = [], []
    for r in rows:
        rim = " (rim)" * (r["log2_lr"] in (min(r["tried"]), max(r["tried"])))
        cells.append(
            [
                r["case"],
                CASES[r["case"]][1],
                f"2^{r['log2_lr']}{rim}",
                *(plus_minus(x, ".3f") for x in r["losses"]),
                shown(breaks(r)),
            ]
        )
        for factor, losses in zip(RETUNED, r["around"]):
            best = min(range(len(AWAY)), key=lambda i: (math.isnan(losses[i]), losses[i]))
            again.append(
                [r["case"], f"{factor}x", *(f"{x:.3f}" for x in losses), f"2^{AWAY[best]}"]
            )
    sgd = next(r for r in rows if r["case"] == "SGD")
    pairs = sorted(zip(sgd["ratios"], sgd["layers"]))
    head = ["method", "rule", "lr at 1x", *(f"{k}x" for k in rows[0]["factors"]), "breaks"]
    text = [
        "\n".join(lines),
        "Validation loss at equal tokens, the lr by the rule:",
        markdown(head, cells),
    ]
    if again:
        text += [
            "Validation loss at other learning rates, in units of the rule's (seed 0):",
            markdown(["method", "batch", *(f"2^{k}" for k in AWAY), "best"], again),
        ]
    ratios = ", ".join(f"{name} {x:.3g}" for x, name in pairs)
    return "\n\n".join([*text, f"‖w‖/‖g‖ in the middle of SGD's run at 1x: {ratios}."])


def up_to(top: float, points: dict[float, list[float]]) -> dict[float, list[float]]:
    """The points up to the first whose mean lies above the picture. That one has no deviation: its
    bar alone would cross the picture."""
    found = {}
    for x, values in points.items():
        mean = mean_sd(values)[0]
        found[x] = values if mean <= top else [mean]
        if not mean <= top:
            break
    return found


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(13, 5)
    losses, against, layers = figure.subplots(1, 3, width_ratios=[1.2, 1.2, 1])
    finite = [x for r in rows for x in sum(r["losses"], []) if not math.isnan(x)]
    top = min(max(finite), min(finite) + 2.5) + 0.05
    for r, color in zip(rows, INK):
        style = dict(color=color, marker="o", ms=4, ls="--" if "without" in r["case"] else "-")
        line(
            losses,
            up_to(top, dict(zip(r["factors"], r["losses"]))),
            f"{r['case']}, {CASES[r['case']][1]}",
            **style,
        )
        percent = {k: [100 * x for x in g] for k, g in gaps(r).items()}
        line(against, up_to(50, percent), r["case"], **style)
    against.axhline(100 * LIMIT, color="black", lw=0.8)
    losses.set(
        ylabel="validation loss",
        title="Equal tokens, lr by the rule",
        ylim=(min(finite) - 0.05, top),
    )
    against.set(
        ylabel="against its own 1x, % (line: 3 %, broken)",
        title="Where each rule breaks",
        ylim=(-5, 50),
    )
    for ax in (losses, against):
        ax.set_xscale("log", base=2)
        ax.set(xlabel="batch, times 256 tokens")
        ax.set_xticks(rows[0]["factors"], [f"{k}x" for k in rows[0]["factors"]])
    figure.legend(
        *losses.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False
    )
    sgd = next(r for r in rows if r["case"] == "SGD")
    layers.plot(sgd["ratios"], range(len(sgd["layers"])), "o", color=INK[5])
    layers.grid(alpha=0.25)
    layers.set_yticks(range(len(sgd["layers"])), sgd["layers"], fontsize=8)
    layers.invert_yaxis()
    layers.set(xscale="log", xlabel="‖w‖/‖g‖", title="Of each matrix (SGD, 1x, half way)")


# ---- on somebody's own text ----------------------------------------------------------------------
TYPED = {claims.slug(case): own for case, own in CASES.items()}


def candidate(name: str) -> dict:
    """adamw:64 is AdamW at a batch of 64, around the lr that its rule has there."""
    case, _, batch = name.partition(":")
    optim, rule, middle, warmup, options = TYPED[case]
    if not re.fullmatch(r"[1-9]\d*", batch):
        raise ValueError(f"--cases={name} lacks a batch; type {case}:64, 64 sequences a step")
    factor = int(batch) / BASE
    lr = 2.0**middle * (factor if rule == "linear" else math.sqrt(factor))
    fields = dict(optim=optim, lr=lr, warmup_frac=warmup, batch_size=int(batch))
    return fields | {f"opt.{key}": x for key, x in options.items()}


if __name__ == "__main__":
    claims.main(__file__, [*TYPED], candidate)
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
