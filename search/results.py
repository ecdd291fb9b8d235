"""What a search has found: trials.csv for programs, table.md for people, best first, and sweep.png.

A trial is any object with number, name, values, status, error, reached(), and result(metric,
worst), which is `worst` where it has diverged. Nothing here decides anything: all three files are
written anew from the trials' folders.
"""

import csv
import io
import math
import os
import statistics
import textwrap
from pathlib import Path

from metrics.logger import short
from search.trials import STATUSES as ORDER
from search.trials import flags

WORST = {False: math.inf, True: -math.inf}  # of what is minimised, of what is maximised
SIGNS = {"pruned": " (hollow)", "diverged": " (×)"}  # as they are drawn


def rounded(values: dict) -> dict:
    return {name: f"{x:.4g}" if isinstance(x, float) else x for name, x in values.items()}


def tell(home: Path, trials: list, search: dict, metric: str, maximise: bool, say) -> list[str]:
    """Writes the three files, says which trial is best, says and returns what cannot be written."""
    results, trouble = {t.number: t.result(metric, WORST[maximise]) for t in trials}, []

    def rank(trial):
        value = results[trial.number]
        order = (value or 0) * (-1 if maximise else 1)
        return ORDER.index(trial.status), value is None, order, trial.number

    trials = sorted(trials, key=rank)
    done = [trial for trial in trials if trial.status == "done"]
    files = {"trials.csv": lambda: in_csv(rows), "table.md": lambda: in_markdown(rows)}
    if done:
        files["sweep.png"] = lambda: picture(trials, results, search, metric, maximise)
    rows = [["trial", "status", *search, metric, "steps", "error"]]
    for t in trials:
        values = [t.values.get(name) for name in search]
        rows.append([t.number, t.status, *values, results[t.number], t.reached(), t.error])
    for name, content in files.items():
        try:
            (home / f"{name}.tmp").write_bytes(content())
            os.replace(home / f"{name}.tmp", home / name)  # a full disk leaves the old one whole
        except Exception as error:  # no matplotlib, a full disk: a picture is not worth a search
            why = getattr(error, "strerror", None) or error
            trouble.append(f"{home / name} cannot be written: {why}")
            say(trouble[-1])
    if done:
        best = " ".join(flags(rounded(done[0].values)))
        say(f"best: {done[0].name}  {metric} {results[done[0].number]:.4f}  {best}")
    failed = [trial.name for trial in trials if trial.status == "failed"]
    if failed:
        say(f"{len(failed)} failed; to try one again, delete its folder")
    say(str(home / "table.md"))
    return trouble


def in_csv(rows: list[list]) -> bytes:
    """All digits."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "replace")


def in_markdown(rows: list[list]) -> bytes:
    """The metric, third from the end, to four places, what was searched to four digits."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for *values, value, steps, error in rows[1:]:
        values = rounded(dict(enumerate(values))).values()
        cells = [*values, None if value is None else f"{value:.4f}", steps, error]
        cells = ["" if x is None else " ".join(str(x).replace("|", "\\|").split()) for x in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


# ---- the picture ---------------------------------------------------------------------------------
def plain(text, longest: int = 24) -> str:
    """Text that matplotlib draws as it is, its end where it is long: paths differ there."""
    text = " ".join(str(text).split())
    return (text if len(text) <= longest else "…" + text[1 - longest :]).replace("$", r"\$")


def number(value) -> float | None:
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (TypeError, ValueError):
        return None


class Axis:
    """How one field lies along x. Listed values lie side by side, by size if they have one; a range
    is an axis of numbers, a logarithmic one for log:LOW:HIGH."""

    def __init__(self, name: str, choice: list[str] | tuple):
        self.name, self.kind = name, "list" if isinstance(choice, list) else choice[0]
        self.numeric = self.kind != "list" or all(number(text) is not None for text in choice)
        ordered = self.numeric and self.kind == "list"
        self.texts, self.ends = sorted(choice, key=float) if ordered else choice, choice[1:]

    def at(self, value) -> float:
        return self.texts.index(value) if self.kind == "list" else float(value)

    def set(self, ax) -> None:
        from matplotlib import ticker

        ax.set_xlabel(plain(self.name, 40), weight="bold")
        if self.kind == "list":
            n, texts = len(self.texts), [plain(text, 18) for text in self.texts]
            step = math.ceil(n / 16)
            wide = sum(len(text) + 2 for text in texts[::step]) > 34
            ax.set(xlim=(-0.5, n - 0.5), xticks=range(0, n, step))
            ax.set_xticklabels(
                texts[::step],
                rotation=35 if wide else 0,
                rotation_mode="anchor",
                ha="right" if wide else "center",
            )
            return
        (low, high), log = self.ends, self.kind == "log"
        ax.set_xscale("log" if log else "linear")
        ax.set_xmargin(0.04)
        ax.update_datalim([(low, 0), (high, 0)], updatey=False)
        if not log:
            ax.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=self.kind == "int"))
        elif high < 5 * low:  # hardly a round number in it
            ax.set_xticks([low * (high / low) ** (k / 4) for k in range(5)])
        else:
            subs = (1, 2, 5) if high < 200 * low else (1,)
            ax.xaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=8))
        ax.xaxis.set_major_formatter(lambda x, _: short(x) if x >= 10_000 else f"{x:.3g}")
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())


def picture(trials: list, results: dict, search: dict, metric: str, maximise: bool) -> bytes:
    """A PNG, from trials of which the best is the first: the metric over each field. Colours are
    the values of the first field of words; lines join the best trial of each value. What is far
    worse than the rest, or has diverged, lies at the rim. results: number -> the metric or None."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    drawn = ("done", "pruned", "diverged")
    shown = [t for t in trials if t.status in drawn and results[t.number] is not None]
    axes = [Axis(name, choice) for name, choice in search.items()]
    axes = [axis for axis in axes if axis.kind != "list" or len(axis.texts) > 1] or axes[:1]
    by = next((a for a in axes if not a.numeric and len(a.texts) <= 10), None) if axes[1:] else None
    kinds = by.texts if by else [None]

    best = results[trials[0].number]
    middle = statistics.median(results[t.number] for t in shown if t.status == "done")
    far = 3 * abs(middle - best) or abs(best) or 1.0  # a bad trial would flatten the others
    rim, nearer = (best - far, max) if maximise else (best + far, min)
    ys = {t.number: nearer(results[t.number], rim) for t in shown}
    low, high = min(ys.values()), max(ys.values())
    pad = 0.07 * (high - low) or 0.05 * abs(best) or 0.5

    columns, rows = min(len(axes), 3), math.ceil(len(axes) / 3)
    size = max(6.4, 4 * columns), 1.1 + 3.6 * rows
    figure = Figure(figsize=size, dpi=140, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for ax in grid.flat[len(axes) :]:
        ax.remove()
    for ax, axis in zip(grid.flat, axes):
        for k, kind in enumerate(kinds):
            mine = [t for t in shown if by is None or t.values[by.name] == kind]
            xs, color, line = {t.number: axis.at(t.values[axis.name]) for t in mine}, f"C{k}", {}
            for t in mine:  # the best comes first
                x, y, beyond = xs[t.number], ys[t.number], ys[t.number] != results[t.number]
                marker = ("v" if maximise else "^") if beyond else "o"
                marker = "x" if t.status == "diverged" else marker
                face = {"facecolors": "none"} if t.status == "pruned" else {}
                ax.scatter(x, y, s=28, marker=marker, alpha=0.85, color=color, **face)
                if t.status == "done" and not beyond:
                    line.setdefault(x, y)
            alone = len(axes) == 1 or axis.kind == "list" or 2 * len(line) < len(mine)
            if line and axis.numeric and alone:
                ax.plot(*zip(*sorted(line.items())), color=color, lw=1, alpha=0.6)
        ax.scatter(
            [axis.at(trials[0].values[axis.name])],
            [best],
            s=150,
            facecolors="none",
            edgecolors="black",
            lw=1.4,
            zorder=5,
        )
        axis.set(ax)
        ax.grid(alpha=0.25)
    for ax in grid[:, 0]:
        ax.set(ylabel=metric.replace("_", " "), ylim=(low - pad, high + pad))
    if by:
        dots = [Line2D([], [], marker="o", ls="", color=f"C{k}") for k in range(len(kinds))]
        labels = [f"{plain(by.name)}={plain(kind)}" for kind in kinds]
        longest = max(map(len, labels))
        fit = max(1, round(11 * size[0]) // (8 + longest))
        figure.legend(dots, labels, frameon=False, loc="outside lower left", ncols=fit)
    said = title(trials, metric, best, round(13 * figure.get_figwidth()))
    if any(ys[t.number] != results[t.number] and t.status != "diverged" for t in shown):
        said += ", worse than this picture: " + ("▼" if maximise else "▲")
    figure.suptitle(said, x=0.01, ha="left", fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def title(trials: list, metric: str, best: float, width: int) -> str:
    """The best trial (ringed), its values, and how the others ended."""
    counts = {status: sum(t.status == status for t in trials) for status in ORDER}
    words = [f"{n} {status}{SIGNS.get(status, '')}" for status, n in counts.items() if n]
    values = [f"{name}={plain(value)}" for name, value in rounded(trials[0].values).items()]
    said = f"Best (ringed): trial {trials[0].number}, {metric.replace('_', ' ')} {best:.4f}"
    said = ", ".join([said, *values])
    return "\n".join([*textwrap.wrap(said, width)[:4], *textwrap.wrap(", ".join(words), width)])
