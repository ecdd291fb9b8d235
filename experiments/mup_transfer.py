"""Claim: under μP the best learning rate of a narrow model is that of a wide one (Yang et al. 2022,
2203.03466).

Protocol: the default corpus in bytes, 2 layers, 4 heads, widths 64 to 512, base width 64; for AdamW and Muon,
with and without μP, a grid of learning rates a factor 2 apart, one seed, equal steps; the figure is the mean
training loss of the last tenth of the steps. The embedding's and head's lr move with AdamW's, and stay at
0.01 with Muon.

Expected: with μP the best lr moves by at most one grid step over 8 times the width; without, AdamW's falls as
1/width. Muon's update has a spectral norm that does not depend on the width, so it should move little either
way.

    python experiments/mup_transfer.py [--quick]        rows in results/mup_transfer.csv are not run again
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config
import logger
import train

WIDTHS = (64, 128, 256, 512)
GRID = {"adamw": [2.0**k for k in range(-11, -3)], "muon": [2.0**k for k in range(-8, 0)]}
STEPS = 100
FIELDS = ("optim", "mup", "width", "lr", "loss")


def one_run(optim: str, mup: bool, width: int, lr: float, steps: int) -> float:
    with tempfile.TemporaryDirectory() as out_dir:
        flags = [f"--optim={optim}", f"--lr={lr}", f"--n_embd={width}", f"--steps={steps}",
                 f"--out_dir={out_dir}", "--n_layer=2", "--block_size=64", "--batch_size=8",
                 "--precision=fp32",
                 "--eval_every=0", "--save_every=0", "--sample_tokens=0"]
        sys.stdout = open(os.devnull, "w")
        try:
            train.main(config.parse(flags + (["--mup_base_width=64"] if mup else [])))
        finally:
            sys.stdout = sys.__stdout__
        losses = [r["loss"] for r in logger.read_metrics(Path(out_dir) / "metrics.jsonl") if "loss" in r]
        tail = losses[-max(1, steps // 10) :]
        return float("nan") if None in tail else sum(tail) / len(tail)


def main() -> None:
    quick = "--quick" in sys.argv
    widths, steps = (WIDTHS[:2], 10) if quick else (WIDTHS, STEPS)
    path = Path(tempfile.mkdtemp() if quick else ROOT / "experiments" / "results") / "mup_transfer.csv"
    done = {}
    if path.exists():
        with open(path, newline="") as file:
            done = {tuple(r[f] for f in FIELDS[:4]): float(r["loss"]) for r in csv.DictReader(file)}
    for optim, grid in GRID.items():
        for mup in (True, False):
            for width in widths:
                for lr in grid[::4] if quick else grid:
                    key = (optim, str(mup), str(width), str(lr))
                    if key not in done:
                        done[key] = one_run(optim, mup, width, lr, steps)
                        with open(path, "w", newline="") as file:
                            csv.writer(file).writerows([FIELDS, *(k + (v,) for k, v in done.items())])
                        print(*key, f"{done[key]:.4f}", flush=True)
    lines = ["| optimizer | μP | " + " | ".join(f"width {w}" for w in widths) + " |"]
    lines.append("|---" * (2 + len(widths)) + "|")
    for optim in GRID:
        for mup in (True, False):
            cells = []
            for width in widths:
                mine = {float(k[3]): v for k, v in done.items() if k[:3] == (optim, str(mup), str(width))}
                losses = {lr: loss for lr, loss in mine.items() if loss == loss}
                best = min(losses, key=losses.get)
                cells.append(f"{best:.2g} ({losses[best]:.3f})")
            lines.append(f"| {optim} | {'on' if mup else 'off'} | " + " | ".join(cells) + " |")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout
    lines += ["", f"Best lr (training loss there); {steps} steps of 8 x 64 bytes, {commit.strip()}."]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
