"""Loss curves as a picture, and metrics.jsonl as a table.

    python -m metrics.plot RUN                             draws RUN/loss.png
    python -m metrics.plot RUN RUN ... [--out=FILE.png]    compares several runs in loss.png
    python -m metrics.plot RUN --csv [--out=FILE.csv]      metrics.jsonl as a table, RUN/metrics.csv

Exit status: 0 done; 2 a mistake, in one line.
"""

import csv
import json
import math
import os
import sys
from statistics import median

from metrics.logger import read_metrics, short

# Event: colour
DRAWN = {"resume": "#888888", "skip": "#9467bd", "spike": "#e69f00", "rollback": "#d62728"}


def to_csv(run, path) -> None:
    """Every row of a run's metrics.jsonl, with a column for each name in it; None and what is not
    there are empty, lists are JSON. FileNotFoundError for a folder without metrics.jsonl."""
    rows = read_metrics(metrics_of(run))
    names = [*dict.fromkeys(name for row in rows for name in row)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: json.dumps(x) if isinstance(x, (list, dict)) else x for k, x in row.items()}
            )


def metrics_of(run) -> str:
    if not os.path.isfile(path := os.path.join(run, "metrics.jsonl")):
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no metrics.jsonl")
    return path


def plot(runs, path) -> bool:
    """Draw the losses of a run's folder, or of a list of them, into the picture file `path`; False,
    and a sentence, if no loss was logged. FileNotFoundError for a folder without metrics.jsonl."""
    from matplotlib.figure import Figure

    runs = [runs] if isinstance(runs, (str, os.PathLike)) else list(runs)
    figure = Figure(figsize=(9, 5), dpi=140, layout="constrained")
    ax = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", xmargin=0.01)
    single, title, losses, ratios = len(runs) == 1, "", [], set()
    for i, run in enumerate(runs):
        # Of a step that was run again, the last row counts.
        rows = sorted(read_metrics(metrics_of(run)), key=lambda row: row["step"])
        train, val, tokens = (by_step(rows, key) for key in ("loss", "val_loss", "tokens"))
        if not train and not val:
            print(f"{run}: no loss was logged, nothing to draw")
            continue
        final = [*(val or train).values()][-1]
        title = os.path.basename(os.path.abspath(run)).replace("$", r"\$")
        title += f": final {'validation' if val else 'training'} loss {final:.4f}"
        blue, red = ("#3b75af", "#c8502d") if single else (f"C{i}", f"C{i}")
        if train:
            label = "training, smoothed" if single else None if val else title
            draw_training(ax, train, blue, label, raw=single)
        if val:
            label = "validation" if single else title
            ax.plot([*val], [*val.values()], "o-", ms=4, color=red, label=label)
        if single:
            draw_events(ax, rows)
        losses += [*train.values(), *val.values()]
        ratios |= {tokens[step] / step for step in tokens if step * tokens[step]}
    if not losses:
        return False
    set_limits(ax, sorted(losses))
    title = title if single else "Training (lines) and validation (dots)"
    ax.set_title(title, loc="left", weight="bold")
    ax.xaxis.get_major_locator().set_params(integer=True)
    if len(ratios) == 1:  # the same tokens per step all along
        add_token_axis(ax, ratios.pop())
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    figure.savefig(path)
    return True


def by_step(rows, key) -> dict:
    return {row["step"]: row[key] for row in rows if row.get(key) is not None}


def draw_training(ax, train, color, label, raw) -> None:
    """The training loss as medians over 5 % of the run, and less at its start: neither a spike nor
    the first fall is smeared. raw: each step's loss behind them."""
    x, y = [*train], [*train.values()]
    half, at = len(y) // 40, sorted({k * (len(y) - 1) // 200 for k in range(201)})
    middle = [median(y[k - min(k, half) : k + min(k, half) + 1]) for k in at]
    if raw:
        ax.plot(x, y, color=color, alpha=0.25, lw=0.8)
    style = "-" if len(y) > 1 else "o"
    ax.plot([x[k] for k in at], middle, style, color=color, lw=1.2, label=label)


def draw_events(ax, rows) -> None:
    for event, color in DRAWN.items():
        if steps := [row["step"] for row in rows if row.get("event") == event]:
            look = dict(label=f"{event} ({len(steps)})", lw=1, alpha=0.5, zorder=1)
            ax.vlines(steps, 0, 1, color, "--", transform=ax.get_xaxis_transform(), **look)


def set_limits(ax, losses) -> None:
    """losses: sorted. What lies above 98 % of them is cut off where it would flatten the rest."""
    low, usual, high = losses[0], losses[math.ceil(0.98 * (len(losses) - 1))], losses[-1]
    high = usual if high - low > 2 * (usual - low) > 0 else high
    pad = 0.06 * (high - low) or 0.5
    right = max(ax.get_xlim()[1], 1)
    ax.set(xlim=(-0.01 * right, right), ylim=(low - pad, high + pad))


def add_token_axis(ax, ratio) -> None:
    """A second axis at the top, in tokens: `ratio` times the steps."""
    top = ax.secondary_xaxis(
        "top", functions=(lambda x: x * ratio, lambda x: x / ratio), xlabel="tokens"
    )
    top.xaxis.set_major_formatter(lambda x, _: short(x))


def main(args: list[str]) -> None:
    """What `python -m metrics.plot` does with these words. Raises ValueError, OSError."""
    as_csv = "--csv" in args
    runs = [arg for arg in args if not arg.startswith("-")]
    outs = [arg.removeprefix("--out=") for arg in args if arg.startswith("--out=")]
    if not runs or len(runs) + len(outs) + as_csv < len(args) or (as_csv and len(runs) > 1):
        raise ValueError(
            "usage: python -m metrics.plot RUN [RUN ...] [--out=FILE.png], "
            "or python -m metrics.plot RUN --csv [--out=FILE.csv]"
        )
    folder = runs[0] if len(runs) == 1 else ""
    out = outs[-1] if outs else os.path.join(folder, "metrics.csv" if as_csv else "loss.png")
    if as_csv:
        to_csv(runs[0], out)
        print(out)
    elif plot(runs, out):
        print(out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
