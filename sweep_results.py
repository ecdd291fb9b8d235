"""What a search has found: trials.csv for programs, table.md for people, best first, and sweep.png.

A trial is any object with number, values, status, error, curve(metric), which is {step: value}, and
last(metric). Nothing here decides anything: all three files are written anew from the trials' folders.
"""

import csv
import math
import statistics
from pathlib import Path

ORDER = ("done", "pruned", "unfinished", "failed")


def rounded(values: dict) -> dict:
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values.items()}


def table(home: Path, trials: list, names: list[str], metric: str, maximise: bool) -> bool:
    """trials.csv and table.md; whether any trial is done."""
    sign = -1 if maximise else 1
    found = [(trial, trial.last(metric), max(trial.curve("loss"), default=0)) for trial in trials]
    found.sort(key=lambda row: (ORDER.index(row[0].status), row[1] is None, sign * (row[1] or 0)))
    head = ["trial", "status", *names, metric, "steps", "error"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    with open(home / "trials.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for trial, last, steps in found:
            begin, short = [trial.number, trial.status], rounded(trial.values)
            writer.writerow([*begin, *(trial.values.get(n) for n in names), last, steps, trial.error])
            end = ["" if last is None else f"{last:.4f}", steps, trial.error.replace("|", "\\|")]
            cells = [*begin, *(short.get(n, "") for n in names), *end]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    (home / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return bool(found) and found[0][0].status == "done"


def number(value) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def picture(home: Path, trials: list, names: list[str], metric: str, maximise: bool) -> None:
    """sweep.png: the metric over each field. Colours are the values of the first field of words; lines join
    the best trial of each value. What is far worse than the rest lies at the rim."""
    from matplotlib.figure import Figure

    shown = [t for t in trials if t.status in ("done", "pruned") and t.last(metric) is not None]
    numeric = {n: all(number(t.values[n]) is not None for t in shown) for n in names}
    by = next((n for n in names if not numeric[n]), None)
    kinds = [*dict.fromkeys(str(t.values[by]) for t in shown)] if by and len(names) > 1 else [""]
    ys = [t.last(metric) for t in shown if t.status == "done"]
    best = max(ys) if maximise else min(ys)
    far = 3 * abs(statistics.median(ys) - best) or math.inf  # a diverged trial would flatten the others
    figure = Figure(figsize=(max(6, 4 * len(names)), 4.2), dpi=140, layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, names):
        texts = sorted({str(t.values[name]) for t in shown})
        for k, kind in enumerate(kinds):
            points = [(number(t.values[name]) if numeric[name] else texts.index(str(t.values[name])),
                       min(max(t.last(metric), best - far), best + far), t.status)
                      for t in shown if kind in ("", str(t.values.get(by)))]  # fmt: skip
            for status, face in (("done", f"C{k}"), ("pruned", "none")):
                xs = [p[0] for p in points if p[2] == status], [p[1] for p in points if p[2] == status]
                label = kind if status == "done" else None
                if xs[0]:
                    ax.scatter(*xs, s=26, facecolors=face, edgecolors=f"C{k}", alpha=0.85, label=label)
            line = [p[:2] for p in sorted(points, key=lambda p: p[1], reverse=not maximise) if p[2] == "done"]
            if numeric[name] and line and (sum(numeric.values()) == 1 or len(dict(line)) < len(line)):
                ax.plot(*zip(*sorted(dict(line).items())), color=f"C{k}", lw=1, alpha=0.6)
        ax.set_xlabel(name)
        ax.grid(alpha=0.25)
        if not numeric[name]:
            ax.set(xticks=range(len(texts)), xticklabels=texts, xlim=(-0.5, len(texts) - 0.5))
        elif (xs := sorted(number(t.values[name]) for t in shown))[-1] >= 9 * xs[0] > 0:
            ax.set_xscale("log")
    axes[0].set_ylabel(metric.replace("_", " "))
    if kinds != [""]:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
    counts = {status: sum(t.status == status for t in trials) for status in ORDER}
    words = [f"{n} {status}{' (hollow)' * (status == 'pruned')}" for status, n in counts.items() if n]
    figure.suptitle(", ".join(words), x=0.01, ha="left", weight="bold")
    figure.savefig(home / "sweep.png")
