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

# Event -> colour of its dashed lines. Other events are not drawn.
DRAWN = {
    "resume": "#888888",
    "skip": "#9467bd",
    "spike": "#e69f00",
    "rollback": "#d62728",
    "divergence": "#000000",
}


def to_csv(run, path) -> None:
    """Writes every row of a run's metrics.jsonl to the file `path`, a column for each name in it.

    None and what a row does not have are empty; lists are JSON. Raises FileNotFoundError for a
    folder without metrics.jsonl.
    """
    rows = read_metrics(metrics_of(run))
    # A dict, not a set: columns stay in the order in which their names first occur.
    names = [*dict.fromkeys(name for row in rows for name in row)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            for key, x in row.items():
                if isinstance(x, (list, dict)):
                    row[key] = json.dumps(x)
            writer.writerow(row)


def metrics_of(run) -> str:
    path = os.path.join(run, "metrics.jsonl")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no metrics.jsonl")
    return path


def plot(runs, path) -> bool:
    """Draws the losses of a run's folder, or of a list of them, into the picture file `path`.

    False, and a printed sentence, if no loss was logged. Raises FileNotFoundError for a folder
    without metrics.jsonl.
    """
    from matplotlib.figure import Figure

    runs = [runs] if isinstance(runs, (str, os.PathLike)) else list(runs)
    single = len(runs) == 1
    figure = Figure(figsize=(9, 5), dpi=140, layout="constrained")
    ax = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", xmargin=0.01)
    title = ""
    losses = []
    tokens_per_step = set()
    for i, run in enumerate(runs):
        # Sorting is stable: if a step was repeated, its last row counts.
        rows = sorted(read_metrics(metrics_of(run)), key=lambda row: row["step"])
        train = by_step(rows, "loss")
        val = by_step(rows, "val_loss")
        if not train and not val:
            print(f"{run}: no loss was logged, nothing to draw")
            continue
        title = title_of(run, train, val)
        if single:
            draw_single(ax, train, val)
            draw_events(ax, rows)
        else:
            draw_one_of_many(ax, train, val, f"C{i}", title)
        losses += [*train.values(), *val.values()]
        for step, tokens in by_step(rows, "tokens").items():
            if step * tokens:
                tokens_per_step.add(tokens / step)
    if not losses:
        return False
    set_limits(ax, sorted(losses))
    if not single:
        title = "Training (lines) and validation (dots)"
    ax.set_title(title, loc="left", weight="bold")
    ax.xaxis.get_major_locator().set_params(integer=True)
    # A second axis is true only where every step has the same number of tokens.
    if len(tokens_per_step) == 1:
        add_token_axis(ax, tokens_per_step.pop())
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    figure.savefig(path)
    return True


def by_step(rows: list[dict], key: str) -> dict:
    return {row["step"]: row[key] for row in rows if row.get(key) is not None}


def title_of(run, train: dict, val: dict) -> str:
    """The run's name and its last loss. train, val: step -> loss."""
    kind = "validation" if val else "training"
    final = [*(val or train).values()][-1]
    # matplotlib takes text between two $ for a formula.
    name = os.path.basename(os.path.abspath(run)).replace("$", r"\$")
    return f"{name}: final {kind} loss {final:.4f}"


def draw_single(ax, train: dict, val: dict) -> None:
    """One run: its two curves differ by colour. train, val: step -> loss."""
    if train:
        draw_training(ax, train, "#3b75af", "training, smoothed", raw=True)
    if val:
        draw_validation(ax, val, "#c8502d", "validation")


def draw_one_of_many(ax, train: dict, val: dict, color: str, title: str) -> None:
    """One run of several: its two curves share a colour, and one entry of the legend."""
    if train:
        draw_training(ax, train, color, None if val else title, raw=False)
    if val:
        draw_validation(ax, val, color, title)


def draw_training(ax, train: dict, color: str, label: str | None, raw: bool) -> None:
    """The training loss, smoothed; raw: with each step's loss behind it.

    Medians over 5 % of the run, and over less at its start: neither a spike nor the first fall is
    smeared.
    """
    steps = [*train]
    losses = [*train.values()]
    last = len(losses) - 1
    half = len(losses) // 40
    # A median at each of n steps would take n²/20 numbers. For a picture 201 places are enough.
    places = sorted({k * last // 200 for k in range(201)})
    medians = []
    for k in places:
        radius = min(k, half)
        medians.append(median(losses[k - radius : k + radius + 1]))
    if raw:
        ax.plot(steps, losses, color=color, alpha=0.25, lw=0.8)
    # A line through a single point shows nothing.
    style = "-" if len(losses) > 1 else "o"
    ax.plot([steps[k] for k in places], medians, style, color=color, lw=1.2, label=label)


def draw_validation(ax, val: dict, color: str, label: str) -> None:
    ax.plot([*val], [*val.values()], "o-", ms=4, color=color, label=label)


def draw_events(ax, rows: list[dict]) -> None:
    """A dashed line at each step of an event, such as a spike."""
    for event, color in DRAWN.items():
        steps = [row["step"] for row in rows if row.get("event") == event]
        if steps:
            style = dict(label=f"{event} ({len(steps)})", lw=1, alpha=0.5, zorder=1)
            ax.vlines(steps, 0, 1, color, "--", transform=ax.get_xaxis_transform(), **style)


def set_limits(ax, losses: list[float]) -> None:
    """losses: sorted. The top 2 % are cut off where they would flatten the rest."""
    low = losses[0]
    usual = losses[math.ceil(0.98 * (len(losses) - 1))]
    high = losses[-1]
    if high - low > 2 * (usual - low) > 0:
        high = usual
    # A flat curve needs some height, too.
    pad = 0.06 * (high - low) or 0.5
    right = max(ax.get_xlim()[1], 1)
    ax.set(xlim=(-0.01 * right, right), ylim=(low - pad, high + pad))


def add_token_axis(ax, tokens_per_step: float) -> None:
    """A second axis at the top, in tokens."""
    to_tokens_and_back = (lambda x: x * tokens_per_step, lambda x: x / tokens_per_step)
    top = ax.secondary_xaxis("top", functions=to_tokens_and_back, xlabel="tokens")
    top.xaxis.set_major_formatter(lambda x, _: short(x))


def main(args: list[str]) -> None:
    """What `python -m metrics.plot` does with these words. Raises ValueError, OSError."""
    # Any word that is neither a run, --out= nor --csv is a mistake.
    as_csv = "--csv" in args
    runs = [arg for arg in args if not arg.startswith("-")]
    outs = [arg.removeprefix("--out=") for arg in args if arg.startswith("--out=")]
    if not runs or len(runs) + len(outs) + as_csv < len(args) or (as_csv and len(runs) > 1):
        raise ValueError(
            "usage: python -m metrics.plot RUN [RUN ...] [--out=FILE.png], "
            "or python -m metrics.plot RUN --csv [--out=FILE.csv]"
        )
    # A run's picture goes into its folder, a comparison's here.
    folder = runs[0] if len(runs) == 1 else ""
    if outs:
        out = outs[-1]
    else:
        out = os.path.join(folder, "metrics.csv" if as_csv else "loss.png")
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
