"""What a search has found: trials.csv for programs, table.md for people, best first, and sweep.png.

A trial is any object with number, name, values, status, error, reached(), and result(metric,
worst), which is `worst` where it has diverged. Nothing here decides anything: all three files are
rewritten from the trials' folders.
"""

import csv
import io
import math
import os
import statistics
import textwrap
from pathlib import Path

from metrics.labels import columns, plain
from metrics.logger import short
from search.trials import STATUSES as ORDER
from search.trials import flags

# Is the metric maximised? -> the worst value, which a diverged trial gets.
WORST = {False: math.inf, True: -math.inf}
# The marks of trials that are not done, as the picture's title explains them.
SIGNS = {"pruned": " (hollow)", "diverged": " (×)"}


def rounded(values: dict) -> dict:
    """Values for people: numbers to four digits."""
    return {name: f"{x:.4g}" if isinstance(x, float) else x for name, x in values.items()}


def tell(home: Path, trials: list, search: dict, metric: str, maximise: bool, say) -> list[str]:
    """Writes the three files and says which trial is best; returns what could not be written.

    say: called with each sentence. maximise: is more of the metric better?
    """
    results = {trial.number: trial.result(metric, WORST[maximise]) for trial in trials}

    def rank(trial) -> tuple:
        value = results[trial.number]
        # None cannot be compared with a number: such a trial ranks last of its status.
        size = value or 0
        if maximise:
            size = -size
        return ORDER.index(trial.status), value is None, size, trial.number

    trials = sorted(trials, key=rank)
    done = [trial for trial in trials if trial.status == "done"]
    rows = [["trial", "status", *search, metric, "steps", "error"]]
    for trial in trials:
        values = [trial.values.get(name) for name in search]
        outcome = [results[trial.number], trial.reached(), trial.error]
        rows.append([trial.number, trial.status, *values, *outcome])
    files = {"trials.csv": lambda: in_csv(rows), "table.md": lambda: in_markdown(rows)}
    if done:
        files["sweep.png"] = lambda: picture(trials, results, search, metric, maximise)
    trouble = []
    for name, content in files.items():
        try:
            # A full disk leaves the old file whole.
            (home / f"{name}.tmp").write_bytes(content())
            os.replace(home / f"{name}.tmp", home / name)
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
    """The rows with all digits."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "replace")


def in_markdown(rows: list[list]) -> bytes:
    """The rows with the metric to four places, and searched values to four digits."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for *values, value, steps, error in rows[1:]:
        values = rounded(dict(enumerate(values))).values()
        cells = [*values, None if value is None else f"{value:.4f}", steps, error]
        # A cell is one line, and a bar in it is no border.
        cells = ["" if x is None else " ".join(str(x).replace("|", "\\|").split()) for x in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


# ---- the picture ---------------------------------------------------------------------------------
def number(value) -> float | None:
    """A finite number, or None."""
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (TypeError, ValueError):
        return None


class Axis:
    """How one field lies along x.

    Listed values lie side by side, by size if they have one; as far apart as their logarithms where
    the largest is ten times the smallest or more. A range is an axis of numbers, a logarithmic one
    for log:LOW:HIGH.
    """

    def __init__(self, name: str, choice: list[str] | tuple):
        self.name = name
        self.kind = "list" if isinstance(choice, list) else choice[0]
        self.numeric = self.kind != "list" or all(number(text) is not None for text in choice)
        self.texts = choice
        if self.numeric and self.kind == "list":
            self.texts = sorted(choice, key=float)
        self.places = places(self.texts, self.numeric) if self.kind == "list" else []
        self.ends = choice[1:]

    def at(self, value) -> float:
        if self.kind == "list":
            return self.places[self.texts.index(value)]
        return float(value)

    def is_slanted(self) -> bool:
        """Are its labels too wide to lie side by side?"""
        if self.kind != "list":
            return False
        # An axis has room for 16 labels. With more than 34 letters in all they are slanted.
        texts = self.texts[:: math.ceil(len(self.texts) / 16)]
        return sum(len(plain(text, 18)) + 2 for text in texts) > 34

    def set(self, ax) -> None:
        from matplotlib import ticker

        ax.set_xlabel(plain(self.name, 40), weight="bold")
        if self.kind == "list":
            texts = [plain(text, 18) for text in self.texts]
            step = math.ceil(len(texts) / 16)
            wide = self.is_slanted()
            ax.set(xlim=(-0.5, len(texts) - 0.5), xticks=self.places[::step])
            ax.set_xticklabels(
                texts[::step],
                rotation=35 if wide else 0,
                rotation_mode="anchor",
                ha="right" if wide else "center",
            )
            return
        low, high = self.ends
        ax.set_xscale("log" if self.kind == "log" else "linear")
        ax.set_xmargin(0.04)
        # The axis shows the whole searched range, so that an untried part of it is seen.
        ax.update_datalim([(low, 0), (high, 0)], updatey=False)
        if self.kind != "log":
            ax.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=self.kind == "int"))
        elif high < 5 * low:
            # LogLocator's 1, 2, 5 times a power of ten: too few of them lie in so short a range.
            ax.set_xticks([low * (high / low) ** (k / 4) for k in range(5)])
        else:
            subs = (1, 2, 5) if high < 200 * low else (1,)
            ax.xaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=8))
        ax.xaxis.set_major_formatter(lambda x, _: short(x) if x >= 10_000 else f"{x:.3g}")
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())


def places(texts: list[str], numeric: bool) -> list[float]:
    """Where listed values lie, from 0 to their number - 1."""
    n = len(texts)
    even = [float(k) for k in range(n)]
    if not numeric or n < 3:
        return even
    numbers = [float(text) for text in texts]
    if numbers[0] <= 0 or numbers[-1] < 10 * numbers[0]:
        return even
    logs = [math.log(x / numbers[0]) for x in numbers]
    found = [(n - 1) * x / logs[-1] for x in logs]
    # Labels of neighbours need room.
    if min(b - a for a, b in zip(found, found[1:])) < max(0.4, n / 12):
        return even
    return found


def picture(trials: list, results: dict, search: dict, metric: str, maximise: bool) -> bytes:
    """A PNG of the metric over each field.

    trials: the best is the first; results: number -> the metric or None. Colours are the values of
    the first field of words. Lines join the best trial of each value. A trial that is far worse
    than the rest, or has diverged, lies at the rim.
    """
    from matplotlib.figure import Figure

    drawn = ("done", "pruned", "diverged")
    shown = [t for t in trials if t.status in drawn and results[t.number] is not None]
    # A field with one value is no axis, unless there is no other.
    axes = [Axis(name, choice) for name, choice in search.items()]
    axes = [axis for axis in axes if axis.kind != "list" or len(axis.texts) > 1] or axes[:1]
    by = None  # the field that colours tell apart
    if len(axes) > 1:
        by = next((axis for axis in axes if not axis.numeric and len(axis.texts) <= 10), None)

    # A bad trial would flatten the others: one that is more than three times as far from the best
    # as the median is drawn at the rim.
    best = results[trials[0].number]
    median = statistics.median(results[t.number] for t in shown if t.status == "done")
    far = 3 * abs(median - best) or abs(best) or 1.0
    if maximise:
        ys = {t.number: max(results[t.number], best - far) for t in shown}
    else:
        ys = {t.number: min(results[t.number], best + far) for t in shown}
    low = min(ys.values())
    high = max(ys.values())
    pad = 0.07 * (high - low) or 0.05 * abs(best) or 0.5

    columns = min(len(axes), 3)
    rows = math.ceil(len(axes) / 3)
    width = max(6.4, 4 * columns)
    # Slanted labels take their room from the page, not from the points.
    slanted = sum(
        any(axis.is_slanted() for axis in axes[k : k + 3]) for k in range(0, len(axes), 3)
    )
    height = 1.3 + 3.6 * rows + 0.9 * slanted
    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for ax in grid.flat[len(axes) :]:
        ax.remove()
    for ax, axis in zip(grid.flat, axes):
        for k, kind in enumerate(by.texts if by else [None]):
            mine = [t for t in shown if by is None or t.values[by.name] == kind]
            draw(ax, axis, mine, results, ys, f"C{k}", maximise, alone=len(axes) == 1)
        ring = dict(s=150, facecolors="none", edgecolors="black", lw=1.4, zorder=5)
        ax.scatter([axis.at(trials[0].values[axis.name])], [best], **ring)
        axis.set(ax)
        ax.grid(alpha=0.25)
    for ax in grid[:, 0]:
        ax.set(ylabel=metric.replace("_", " "), ylim=(low - pad, high + pad))
    if by:
        legend(figure, by, width)
    heading = title(trials, metric, best, round(11.5 * figure.get_figwidth()))
    if any(ys[t.number] != results[t.number] and t.status != "diverged" for t in shown):
        heading += ", worse than this picture: " + ("▼" if maximise else "▲")
    figure.suptitle(heading, x=0.01, ha="left", fontsize=10, weight="bold")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def draw(
    ax, axis: Axis, trials: list, results: dict, ys: dict, color: str, maximise: bool, alone: bool
) -> None:
    """The trials of one colour over one field. alone: is this the only field?"""
    line = {}  # x -> y of the best trial there
    for t in trials:
        x = axis.at(t.values[axis.name])
        y = ys[t.number]
        is_beyond = y != results[t.number]
        marker = "o"
        if t.status == "diverged":
            marker = "x"
        elif is_beyond:
            marker = "v" if maximise else "^"
        face = {"facecolors": "none"} if t.status == "pruned" else {}
        ax.scatter(x, y, s=28, marker=marker, alpha=0.85, color=color, **face)
        # `trials` begins with the best, so the first at each x stays.
        if t.status == "done" and not is_beyond:
            line.setdefault(x, y)
    # Where other fields vary too, a line would zigzag, unless many trials share an x.
    joins = alone or axis.kind == "list" or 2 * len(line) < len(trials)
    if line and axis.numeric and joins:
        ax.plot(*zip(*sorted(line.items())), color=color, lw=1, alpha=0.6)


def legend(figure, by: Axis, width: float) -> None:
    from matplotlib.lines import Line2D

    dots = [Line2D([], [], marker="o", ls="", color=f"C{k}") for k in range(len(by.texts))]
    labels = [f"{plain(by.name)}={plain(kind)}" for kind in by.texts]
    fit = columns(labels, width)
    figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(labels) / fit))
    figure.legend(dots, labels, frameon=False, loc="outside lower left", ncols=fit)


def title(trials: list, metric: str, best: float, width: int) -> str:
    """The best trial (ringed), its values, and how the others ended; wrapped at `width` letters."""
    counts = {status: sum(t.status == status for t in trials) for status in ORDER}
    words = [f"{n} {status}{SIGNS.get(status, '')}" for status, n in counts.items() if n]
    values = [f"{name}={plain(value)}" for name, value in rounded(trials[0].values).items()]
    best_line = f"Best (ringed): trial {trials[0].number}, {metric.replace('_', ' ')} {best:.4f}"
    best_line = ", ".join([best_line, *values])
    # Many fields would push the picture off the page: four lines at most.
    lines = textwrap.wrap(best_line, width)[:4]
    return "\n".join([*lines, *textwrap.wrap(", ".join(words), width)])
