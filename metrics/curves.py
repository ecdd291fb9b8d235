"""Curves of one run or of several as a matplotlib Figure; metrics/plot.py is the command.

    loss            each step thin and pale, smoothed thick in the same hue; validation as dots,
                    never a line; the best one ringed; a dotted line where a branch leaves
    events          a row of ticks for each kind, named at the left
    lr
    gradient norm   drawn like the loss

The height is for what a run does after the first tenth of its steps: a default run falls from 5.5
to 2.6 in that tenth and to 1.3 in the rest. What is cut off is said above the picture, validation
also by ▲. Steps stay linear: on a logarithmic axis the end, where runs differ, would have little
room.
"""

import math
import textwrap
from statistics import median

from metrics.labels import columns, loss_text, plain, tick_labels

TRAINING = "#3b75af"
VALIDATION = "#c8502d"
# Event -> colour of its ticks. Regular events, such as a save, say nothing about a curve.
DRAWN = {
    "spike": "#e69f00",
    "nonfinite": "#a6761d",
    "skip": "#9467bd",
    "rollback": "#d62728",
    "divergence": "#000000",
    "stuck": "#000000",
    "vanishing": "#17869e",
    "level": "#17869e",
    "save_failed": "#d62728",
    "resume": "#888888",
}
START_FRAC = 0.1  # of a run's steps: they do not set the limits
FEWEST = 20  # training losses after the start; with fewer, all is shown


class Run:
    """What metrics.jsonl has of a run.

    rows: by step; of a repeated step the last one counts. branch: the run that it leaves, and the
    step. curves: name -> {step: value}, where that is a finite number.
    """

    def __init__(self, name: str, rows: list[dict], branch: tuple[str, int] | None = None):
        self.name = name
        self.rows = rows
        self.branch = branch
        self.curves = {
            key: {row["step"]: row[key] for row in rows if is_finite(row.get(key))}
            for key in (
                "loss",
                "val_loss",
                "val_loss_ema",
                "lr",
                "grad_norm",
                "tokens",
                "tokens_per_s",
            )
        }

    def validation(self) -> dict[int, float]:
        """step -> validation loss of the model that is saved: with --ema= the average's."""
        found = self.curves["val_loss"] | self.curves["val_loss_ema"]
        return dict(sorted(found.items()))

    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss; None without an evaluation."""
        return min(self.validation().items(), key=lambda point: point[1], default=None)

    def rank(self) -> tuple[bool, float]:
        """What sorts runs, the best first: by validation, without one by training."""
        best = self.best()
        loss = best[1] if best else [math.inf, *self.curves["loss"].values()][-1]
        return best is None, loss


def is_finite(x) -> bool:
    # Not math.isfinite: a file may hold an integer that is no float.
    return type(x) in (int, float) and abs(x) < 1e300


# ---- the figure ----------------------------------------------------------------------------------
def draw(runs: list[Run]):
    """A Figure. runs: each with at least one training or validation loss."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in DRAWN if any(events_of(run, kind) for run in runs)]
    strips = [key for key in ("lr", "grad_norm") if any(run.curves[key] for run in runs)]
    heights = [4.0]
    if kinds:
        heights.append(0.1 + 0.17 * len(kinds))
    heights += [0.75] * len(strips)
    figure = Figure(figsize=(9, 1.3 + sum(heights)), dpi=140, layout="constrained")
    axes = [*figure.subplots(len(heights), height_ratios=heights, sharex=True, squeeze=False).flat]

    loss = axes[0]
    loss.set_ylabel("loss (nats per token)")
    loss.yaxis.set_major_formatter(together())
    note = set_limits(loss, runs)
    note = "\n".join(textwrap.wrap(note, 120, break_on_hyphens=False))
    loss.set_title(note, loc="left", fontsize=9, color="#555555")
    for run, color in zip(runs, hues(runs)):
        draw_losses(loss, run, color, alone=len(runs) == 1)
    mark_best(loss, runs)
    mark_branches(loss, runs)
    loss.grid(alpha=0.25)
    # A second axis is true only where every step has the same number of tokens.
    tokens = [point for run in runs for point in run.curves["tokens"].items()]
    per_step = {n / step for step, n in tokens if step * n > 0}
    if len(per_step) == 1:
        add_token_axis(loss, per_step.pop())
    if kinds:
        draw_events(axes[1], runs, kinds)
    for ax, key in zip(axes[len(axes) - len(strips) :], strips):
        draw_strip(ax, runs, key)
    axes[-1].set_xlabel("step")
    # As many numbers as have room.
    few = {} if loss.get_xlim()[1] < 1e7 else dict(nbins=4)
    axes[-1].xaxis.get_major_locator().set_params(integer=True, **few)
    axes[-1].xaxis.set_major_formatter(together())
    figure.align_ylabels(axes)
    add_legend(figure, loss)
    figure.suptitle(title_of(runs), x=0.01, ha="left", weight="bold")
    return figure


def hues(runs: list[Run]) -> list[str]:
    """One colour for each run."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if len(runs) == 1:
        return [TRAINING]
    # The usual ten repeat themselves after that.
    if len(runs) <= 10:
        return [f"C{i}" for i in range(len(runs))]
    return [to_hex(colormaps["turbo"](i / (len(runs) - 1))) for i in range(len(runs))]


def title_of(runs: list[Run]) -> str:
    """One run: its best and last loss. Several: which of them is best."""
    measured = [run for run in runs if run.best()]
    if measured:
        run = min(measured, key=lambda run: run.best()[1])
        step, loss = run.best()
        text = f"best validation loss {loss_text(loss)} at step {step}"
        final = loss_text([*run.validation().values()][-1])
        if final != loss_text(loss):
            text += f", {final} at the end"
    else:
        run = min(runs, key=lambda run: [*run.curves["loss"].values()][-1])
        last, loss = [*run.curves["loss"].items()][-1]
        text = f"training loss {loss_text(loss)} at step {last}"
    text = f"{plain(run.name, 60)}: {text}"
    if len(runs) > 1:
        text = f"Best of {len(runs)} is {text}"
    return "\n".join(textwrap.wrap(text, 85, break_on_hyphens=False))


def add_legend(figure, loss) -> None:
    """Below the picture, where it covers no curve."""
    handles, labels = loss.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    ncols = columns(labels, width)
    figure.set_size_inches(width, height + 0.2 * math.ceil(len(labels) / ncols))
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower left", ncols=ncols)


# ---- the loss ------------------------------------------------------------------------------------
def draw_losses(ax, run: Run, color: str, alone: bool) -> None:
    """Training and validation, after set_limits.

    alone: a single run has a colour for each, of several each run has one.
    """
    train = run.curves["loss"]
    name = plain(run.name, 40)
    if train:
        label = "training, smoothed" if alone else name
        draw_smoothed(ax, run, "loss", color, label, "training, each step" if alone else None)
    if alone:
        color = VALIDATION
    label = "validation" if alone else None if train else name
    draw_dots(ax, run.curves["val_loss"], label, color=color, mec="black", mew=0.7)
    label = "validation of the average" if alone else None
    draw_dots(ax, run.curves["val_loss_ema"], label, mfc="white", mec=color, mew=1.5)


def draw_dots(ax, val: dict, label: str | None, **style) -> None:
    """A dot for each evaluation; ▲ at the rim for those above the picture."""
    if not val:
        return
    low, top = ax.get_ylim()
    style |= dict(ls="", ms=6 if len(val) < 50 else 4, zorder=4)
    inside = {step: loss for step, loss in val.items() if loss <= top}
    ax.plot([*inside], [*inside.values()], "o", label=label, **style)
    rim = top - 0.02 * (top - low)
    above = [step for step in val if step not in inside]
    ax.plot(above, [rim] * len(above), "^", **style)


def smoothed(run: Run, key: str) -> tuple[list[int], list[float]]:
    """Steps and medians over 5 % of the run.

    Over less at the start of a run that begins there: neither a spike nor the first fall is
    smeared.
    """
    steps = [*run.curves[key]]
    values = [*run.curves[key].values()]
    last = len(values) - 1
    half = len(values) // 40
    # A median at each of n steps would take n²/20 numbers. For a picture 201 places are enough.
    places = sorted({k * last // 200 for k in range(201)})
    medians = []
    for k in places:
        radius = half if run.branch else min(k, half)
        medians.append(median(values[max(k - radius, 0) : k + radius + 1]))
    return [steps[k] for k in places], medians


def draw_smoothed(ax, run: Run, key: str, color: str, label=None, raw_label=None) -> None:
    """Each step thin and pale, smoothed thick."""
    curve = run.curves[key]
    # A line through a single point shows nothing.
    style = "-" if len(curve) > 1 else "s"
    ax.plot([*curve], [*curve.values()], style, color=color, alpha=0.35, lw=0.7, label=raw_label)
    ax.plot(*smoothed(run, key), style, color=color, lw=1.8, label=label)


def mark_best(ax, runs: list[Run]) -> None:
    """A ring around the lowest validation loss of all."""
    points = [run.best() for run in runs if run.best()]
    if not points:
        return
    if len(runs) > 1:
        ax.plot([], [], "o", color="#bbbbbb", mec="black", mew=0.7, label="dots: validation")
    step, loss = min(points, key=lambda point: point[1])
    ring = dict(ls="", ms=13, mfc="none", mec="black", mew=1.4, zorder=5)
    ax.plot([step], [loss], "o", label=f"best validation: {loss_text(loss)} at step {step}", **ring)


def mark_branches(ax, runs: list[Run]) -> None:
    """A dotted line where a branch leaves, and a diamond where its own curve begins.

    The legend has a row for each run that is left.
    """
    left = {}  # source -> branches
    for run in runs:
        if run.branch:
            left.setdefault(run.branch[0], []).append(run)
    for source, branches in left.items():
        steps = sorted({run.branch[1] for run in branches})
        at = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        label = f"leaves {plain(source, 40)} at {at}"
        if len(branches) > 1:
            label = f"{len(branches)} runs: each {label}"
        elif len(runs) > 1:
            label = f"{plain(branches[0].name, 40)} {label}"
        color = "#555555" if len(branches) > 1 else hues(runs)[runs.index(branches[0])]
        ax.plot([], [], color=color, ls=":", lw=1.3, label=label)
    for run, color in zip(runs, hues(runs)):
        if run.branch is None:
            continue
        ax.axvline(run.branch[1], color=color, ls=":", lw=1.3, zorder=1)
        steps, losses = smoothed(run, "loss" if run.curves["loss"] else "val_loss")
        ax.plot(steps[:1], losses[:1], "D", ms=6, color=color, mec="black", mew=0.7, zorder=4)


def set_limits(ax, runs: list[Run]) -> str:
    """Sets both; returns what is cut off, as a sentence, or ""."""
    x_limits, y_limits, note = limits(runs)
    ax.set(xlim=x_limits, ylim=y_limits)
    return note


def limits(runs: list[Run]) -> tuple[tuple[float, float], tuple[float, float], str]:
    """Of steps and of losses, and what is cut off, as a sentence, or ""."""
    of_runs = [points_of(run) for run in runs]
    points = [point for found in of_runs for point in found]
    low = min(point[0] for point in points)
    near = [point for i in near_the_best(of_runs, low) for point in of_runs[i]]
    high = usual_top(near, low)
    # The start is cut off only where it would take a third of the height or more.
    later = usual_top([point for point in near if not point[2]], low)
    if high - low > 1.5 * (later - low):
        high = later
    # A flat curve needs some height, too.
    is_flat = high - low <= 1e-6 * abs(high)
    pad = (abs(high) / 4 if is_flat else 0.06 * (high - low)) or 0.5
    y_limits = (low - pad, high + pad)
    first = min(point[1] for point in points)
    last = max(point[1] for point in points)
    pad = max(0.015 * (last - first), 0.015, 1e-15 * last)  # floats lie far apart at 1e15
    x_limits = (first - pad, last + pad)
    return x_limits, y_limits, cut_off(runs, of_runs, y_limits[1])


def points_of(run: Run) -> list[tuple[float, int, bool, bool]]:
    """(loss, step, is it of the start?, is it validation?) of each loss."""
    train = run.curves["loss"]
    val = run.curves["val_loss"]
    ema = run.curves["val_loss_ema"]
    steps = sorted({*train, *val, *ema})
    end_of_start = steps[0] + START_FRAC * (steps[-1] - steps[0])
    has_start = sum(step > end_of_start for step in train) >= FEWEST
    return [
        (loss, step, has_start and step <= end_of_start, is_val)
        for curve, is_val in ((train, False), (val, True), (ema, True))
        for step, loss in curve.items()
    ]


def near_the_best(of_runs: list[list[tuple]], low: float) -> list[int]:
    """Which runs set the height: not those that would flatten the half that ends lower."""
    later = [[point for point in points if not point[2]] for points in of_runs]
    ends = []
    for points in later:
        train = [point[0] for point in points if not point[3]]
        losses = train or [point[0] for point in points]
        ends.append(median(losses[-max(1, len(losses) // 10) :]))
    half = sorted(range(len(ends)), key=ends.__getitem__)[: (len(ends) + 1) // 2]
    reach = usual_top([point for i in half for point in later[i]], low)
    # Near runs are compared, however close to each other the best lie.
    height = max(reach - low, abs(low) / 4)
    tops = [usual_top(points, low) for points in later]
    return [i for i, top in enumerate(tops) if i in half or top - low <= 3 * height]


def usual_top(points: list[tuple], low: float) -> float:
    """The highest loss, without the few that would flatten the rest.

    Of training these are the highest 2 %; of validation, which is rare, the highest one, if there
    is enough training to tell what is usual.
    """
    train = sorted(point[0] for point in points if not point[3])
    val = sorted(point[0] for point in points if point[3])
    tops = [low]
    n_spared = 1 if len(train) >= FEWEST else 0
    for losses, place in (
        (train, math.ceil(0.98 * (len(train) - 1))),
        (val, len(val) - 1 - n_spared),
    ):
        if not losses:
            continue
        usual = losses[max(place, 0)]
        flattens = losses[-1] - low > 2 * (usual - low) > 0
        tops.append(usual if flattens else losses[-1])
    return max(tops)


def cut_off(runs: list[Run], of_runs: list[list[tuple]], top: float) -> str:
    above = []
    parts = []
    for run, points in zip(runs, of_runs):
        high = [point for point in points if point[0] > top]
        later = [point[0] for point in points if not point[2]]
        if min(later) > top:
            parts.append(f"all of {plain(run.name)}, from {min(later):.3g}")
        else:
            above += high
    if len(parts) > 3:
        parts[2:] = [f"{len(parts) - 2} more runs"]
    starts = [point[0] for point in above if point[2]]
    later = [point[0] for point in above if not point[2]]
    if starts:
        parts.append(f"the first steps, from {max(starts):.3g}")
    if later:
        parts.append(f"{len(later)} later loss{'es' * (len(later) > 1)}, up to {max(later):.3g}")
    if not parts:
        return ""
    is_val = any(point[3] and point[0] > top for points in of_runs for point in points)
    sign = "  (▲ validation)" if is_val else ""
    return f"above the picture: {'; '.join(parts)}{sign}"


def add_token_axis(ax, tokens_per_step: float) -> None:
    """A second axis at the top, in tokens."""
    to_tokens_and_back = (lambda x: x * tokens_per_step, lambda x: x / tokens_per_step)
    top = ax.secondary_xaxis("top", functions=to_tokens_and_back, xlabel="tokens")
    first, last = (tokens_per_step * x for x in ax.get_xlim())
    if last > 1e7 and last - first < last / 10:
        top.xaxis.get_major_locator().set_params(nbins=4)
    top.xaxis.set_major_formatter(together())


def together():
    """A matplotlib Formatter with all digits beside each tick, and none beyond the axis's end,
    where another axis's labels are."""
    from matplotlib import ticker

    class Together(ticker.Formatter):
        def __call__(self, x, pos=None):
            return tick_labels([x])[0]

        def format_ticks(self, values):
            return tick_labels([*values])

    return Together()


# ---- below the loss ------------------------------------------------------------------------------
def events_of(run: Run, kind: str) -> list[dict]:
    """One row for each step that has such an event."""
    return [*{row["step"]: row for row in run.rows if row.get("event") == kind}.values()]


def draw_events(ax, runs: list[Run], kinds: list[str]) -> None:
    """A tick at each step of an event; a rollback also has a line to where it went back."""
    names = []
    for y, kind in enumerate(kinds):
        n = 0
        for run, color in zip(runs, hues(runs)):
            if len(runs) == 1:
                color = DRAWN[kind]
            found = events_of(run, kind)
            n += len(found)
            ax.vlines([row["step"] for row in found], y - 0.4, y + 0.4, color=color, lw=1.6)
            for row in found:
                if kind == "rollback" and is_finite(row.get("to")):
                    ax.hlines(y, row["to"], row["step"], color=color, lw=1.6)
        names.append(f"{kind.replace('_', ' ')} ({n})")
    ax.set_yticks(range(len(kinds)), names, fontsize=8)
    ax.set_ylim(len(kinds) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(alpha=0.25, axis="x")


def draw_strip(ax, runs: list[Run], key: str) -> None:
    """The learning rate or the gradient norm of each run."""
    from matplotlib import ticker

    for run, color in zip(runs, hues(runs)):
        curve = run.curves[key]
        if curve and key == "grad_norm":
            draw_smoothed(ax, run, key, color)
        elif curve:
            ax.plot([*curve], [*curve.values()], "-" if len(curve) > 1 else "s", color=color)
    ax.set_ylabel("gradient\nnorm" if key == "grad_norm" else "lr", fontsize=8)
    values = [x for run in runs for x in run.curves[key].values()]
    # A spike of the norm would flatten all else.
    if key == "grad_norm" and min(values) > 0 and max(values) > 20 * median(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(ticker.LogLocator(numticks=4))
    else:
        ax.yaxis.set_major_locator(ticker.MaxNLocator(3, min_n_ticks=2))
    ax.yaxis.set_major_formatter(lambda x, _: f"{x:.3g}")
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    ax.tick_params(axis="y", labelsize=8)
    ax.grid(alpha=0.25)
