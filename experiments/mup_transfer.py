"""Claim: under μP the best learning rate of a narrow model is that of a wide one.

Source: Yang et al. 2022, 2203.03466, as the second lesson tells it.

Protocol: the default corpus in bytes, 2 layers, 4 heads, widths 64 to 512, base width 64; for AdamW and Muon,
with and without μP, a grid of learning rates a factor 2 apart, one seed, equal steps; the figure is the mean
training loss of the last tenth of the steps. The embedding's and head's lr move with AdamW's, and stay at
0.01 with Muon.

Expected: with μP the best lr moves by at most one grid step over 8 times the width; without, AdamW's falls as
1/width. Muon's update has a spectral norm that does not depend on the width, so it should move little either
way.

    python experiments/mup_transfer.py [--quick] [--out=DIR] [--jobs=N]
"""

import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if p != str(HERE))]  # else `precision` is one of us

from experiments import protocol
from experiments.findings import INK, groups, markdown, pick

LRS = {"adamw": [2.0**k for k in range(-11, -3)], "muon": [2.0**k for k in range(-8, 0)]}
CASES = [(optim, mup) for optim in LRS for mup in (True, False)]


def grid(widths: tuple[int, ...], every: int) -> list[dict]:
    return [dict(optim=optim, mup=mup, width=width, lr=lr, seed=1337)
            for optim, mup in CASES for width in widths for lr in LRS[optim][::every]]  # fmt: skip


GRID, QUICK = grid((64, 128, 256, 512), 1), grid((64, 128), 8)


def row(keys: dict, quick: bool) -> dict:
    return {"loss": protocol.tail(protocol.train_run(
        optim=keys["optim"], mup_base_width=64 if keys["mup"] else None, n_embd=keys["width"], lr=keys["lr"],
        seed=keys["seed"], steps=4 if quick else 100, n_layer=2, block_size=64, batch_size=8,
        precision="fp32", eval_every=0))}  # fmt: skip


def best(rows: list[dict], optim: str, mup: bool) -> dict[int, dict]:
    """{width: the row of the best lr}."""
    return {width: min((r for r in mine if not math.isnan(r["loss"])), key=lambda r: r["loss"])
            for (width,), mine in groups(pick(rows, optim=optim, mup=mup), "width").items()}  # fmt: skip


def moved(rows: list[dict], optim: str, mup: bool) -> int:
    """Grid steps from the best lr of the narrowest model to that of the widest."""
    found = [*best(rows, optim, mup).values()]
    return round(math.log2(found[-1]["lr"] / found[0]["lr"]))


def table(rows: list[dict]) -> str:
    widths = [*dict.fromkeys(r["width"] for r in rows)]
    lines = []
    for optim, mup in CASES:
        cells = [f"2^{math.log2(r['lr']):.0f} ({r['loss']:.3f})" for r in best(rows, optim, mup).values()]
        lines.append([optim, "on" if mup else "off", *cells, f"{moved(rows, optim, mup):+d}"])
    head = ["optimizer", "μP", *(f"width {w}" for w in widths), "moved, factors of 2"]
    return markdown(head, lines) + "\n\nBest lr (training loss there)."


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(11, 6.5)
    for ax, (optim, mup) in zip(figure.subplots(2, 2, sharey=True).flat, CASES):
        mine, good = pick(rows, optim=optim, mup=mup), best(rows, optim, mup)
        for ((width,), points), color in zip(groups(mine, "width").items(), INK):
            shown = [min(r["loss"], 3.6) for r in points]  # what is worse lies at the rim
            ax.plot([r["lr"] for r in points], shown, ".-", color=color, label=f"width {width}")
            ax.plot(good[width]["lr"], good[width]["loss"], "o", ms=11, mfc="none", mew=2, color=color)
        name = f"{optim} {'with' if mup else 'without'} μP"
        ax.set_title(f"{name}: the best lr moves by 2^{moved(rows, optim, mup)}")
        ax.set(xlabel="learning rate" + ", at width 64" * mup, ylabel="training loss (nats per byte)")
        ax.set_xscale("log", base=2)
        ax.grid(alpha=0.25)
        ax.legend(frameon=False, title="circle: the best")


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    on, off = moved(rows, "adamw", True), moved(rows, "adamw", False)
    number = f"AdamW's best lr moves by 2^{on:+d} with μP and by 2^{off:+d} without"
    still = abs(moved(rows, "muon", False)) <= 1
    why = f"over {rows[-1]['width'] // rows[0]['width']} times the width; Muon's " + (
        "stays within a grid step without μP too" if still else "moves as well")  # fmt: skip
    return ("holds" if abs(on) <= 1 < -off else "does not hold"), number, why


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
