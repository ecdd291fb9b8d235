"""The curves of a page about runs: losses, events, strips below, sizes of values, loads of experts.

Each function takes what was read of the runs, the best first, and returns pieces of HTML; [] where
there is nothing to show.
"""

import math
import re
from collections import Counter
from statistics import median

from metrics import curves
from metrics.curves import DRAWN, TRAINING, VALIDATION, is_finite
from metrics.logger import read_metrics
from metrics.report_chart import Curve, chart, heat, key
from metrics.report_page import Markup, quiet, shown, tag
from metrics.report_read import Found

COLORS = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf".split()
UNDONE, EMA = "#777777", "#2e7d32"
MOST_RUNS = 40  # whose curves are drawn
POINTS = 40_000  # of all curves of a part, some 15 bytes each
# Fields with a curve of their own; any other number of a row has one further down.
SHOWN = "step loss val_loss val_loss_ema lr grad_norm tokens tokens_per_s step_s peak_bytes".split()
# Powers of two that a format holds with all bits: precision/histogram.py.
NORMAL = {"fp16": (-14, 15), "bf16": (-126, 127), "e4m3": (-6, 8), "e5m2": (-14, 15)}


def color(i: int, found: list) -> str:
    if len(found) <= len(COLORS):
        return COLORS[i]
    return f"hsl({round(360 * i / min(len(found), MOST_RUNS))},65%,45%)"


def x_limits(found: list[Found]) -> tuple[float, float]:
    """Of every chart over steps, so that they lie under each other."""
    ends = [(i.run.rows[0]["step"], i.run.rows[-1]["step"]) for i in found if i.run.rows]
    first = min(end[0] for end in ends)
    last = max(end[1] for end in ends)
    pad = max(0.015 * (last - first), 0.015, 1e-15 * last)  # floats lie far apart at 1e15
    return first - pad, last + pad


def limits(values: list[float], from_zero: bool = False) -> tuple[float, float]:
    """Of a y axis. A few values far above the rest are cut off."""
    values = sorted(values)
    low = min(0, values[0]) if from_zero else values[0]
    high = values[-1]
    usual = values[math.ceil(0.98 * (len(values) - 1))]
    if high - low > 2 * (usual - low) > 0:
        high = usual
    is_flat = high - low <= 1e-6 * abs(high)
    pad = (0.05 * abs(high) if is_flat else 0.06 * (high - low)) or 0.5
    return (low if from_zero and low == 0 else low - pad), high + pad


def losses(found: list[Found]) -> list[Markup]:
    """Training and validation, and below them the events."""
    drawn = found[:MOST_RUNS]
    measured = [i for i in drawn if i.run.curves["loss"] or i.run.curves["val_loss"]]
    if not measured:
        return [tag("h2", "Loss"), quiet("No loss was logged.")]
    _, y_limits, cut_off = curves.limits([item.run for item in measured])
    # A $ is escaped for matplotlib there.
    title = curves.title_of([item.run for item in measured]).replace(r"\$", "$")
    is_alone = len(found) == 1
    made = []
    for i, item in enumerate(drawn):
        made += lines_of_run(item) if is_alone else lines_of_many(item, i, color(i, found))
    sections = [tag("h2", "Loss"), tag("p", title)]
    n = POINTS // (2 * len(made) or 1)
    events = strip(drawn)
    sections.append(chart(made, x_limits(drawn), y_limits, 300, events=events, n=min(n, 2000)))
    shown_keys = made if is_alone else []
    hint = "Drag over a curve to zoom, double-click to go back. Loss in nats a token, over steps."
    if not is_alone:
        hint += " Lines: training, smoothed; dots: validation. Boxes in the table hide a run."
    sections += [key(shown_keys), quiet(hint)]
    # The page draws no sign of validation there.
    cut_off = cut_off.removesuffix("  (▲ validation)").replace(r"\$", "$")
    cut_off = cut_off[:1].upper() + cut_off[1:]
    return sections + ([quiet(f"{cut_off}.")] if cut_off else [])


def lines_of_run(item: Found) -> list[Curve]:
    train = item.points("loss")
    made = [
        Curve("training, each step", train, TRAINING, "pale"),
        Curve("training, smoothed", smoothed(item), TRAINING),
    ]
    undone = sorted((row["step"], row["loss"]) for row in item.undone if is_finite(row["loss"]))
    made.append(Curve("undone by a rollback", undone, UNDONE, "dots"))
    made.append(Curve("validation of the average", item.points("val_loss_ema"), EMA, "dots"))
    made.append(Curve("validation", item.points("val_loss"), VALIDATION, "dots"))
    best = item.run.best()
    if best:
        made.append(Curve("best validation", [best], VALIDATION, "ring"))
    return [curve for curve in made if curve.points]


def lines_of_many(item: Found, i: int, hue: str) -> list[Curve]:
    made = [
        Curve(item.run.name, smoothed(item), hue, run=i),
        Curve(f"{item.run.name}, validation", item.points("val_loss"), hue, "dots", run=i),
    ]
    return [curve for curve in made if curve.points]


def smoothed(item: Found, name: str = "loss") -> list[tuple[int, float]]:
    return [*zip(*curves.smoothed(item.run, name))] if item.run.curves[name] else []


def strip(found: list[Found]) -> dict[str, tuple[list[int], str]]:
    """Kind of event -> its steps and its colour, of at most 12 kinds."""
    steps = {}
    for item in found:
        for row in item.events():
            steps.setdefault(shown(row["event"], 40), set()).add(row["step"])
        if item.run.branch:
            steps.setdefault("branch", set()).add(item.run.branch[1])
    kinds = sorted(steps, key=lambda kind: [*DRAWN, kind].index(kind))[:12]
    return {kind: (sorted(steps[kind]), DRAWN.get(kind, "#999999")) for kind in kinds}


def strips(found: list[Found]) -> list[Markup]:
    """Learning rate, gradient norm, speed, memory."""
    drawn = found[:MOST_RUNS]
    sections = []
    for name, title, factor in (
        ("lr", "Learning rate of the matrices", 1),
        ("grad_norm", "Gradient norm, before clipping", 1),
        ("tokens_per_s", "Tokens a second", 1),
        ("peak_bytes", "Memory at most so far, MiB", 2**-20),
    ):
        made = []
        for i, item in enumerate(drawn):
            points = [(x, None if y is None else factor * y) for x, y in item.points(name)]
            hue = TRAINING if len(found) == 1 else color(i, found)
            # A single run has room for each step, which is noise where it goes up and down.
            noisy = len(found) == 1 and name in ("grad_norm", "tokens_per_s")
            made.append(Curve(item.run.name, points, hue, "pale" if noisy else "line", i))
            if noisy:
                made.append(Curve("smoothed", smoothed(item, name), hue, run=i))
        values = [y for curve in made for _, y in curve.points if y is not None]
        if not values:
            continue
        log = name == "grad_norm" and min(values) > 0 and max(values) > 20 * median(values)
        y_limits = (min(values) / 1.3, max(values) * 1.3) if log else limits(values, True)
        n = POINTS // (4 * len(made))  # four such charts
        sections.append(tag("h3", title))
        sections.append(chart(made, x_limits(drawn), y_limits, 110, log, n=min(n, 2000)))
    return sections


def others(found: list[Found]) -> list[Markup]:
    """Every other number of the rows, folded away."""
    drawn = found[:MOST_RUNS]
    groups = {}  # title -> curves
    for i, item in enumerate(drawn):
        rows = [row for row in item.run.rows if "event" not in row]
        names = dict.fromkeys(name for row in rows for name, x in row.items() if is_finite(x))
        for name in names:
            group, _, part = name.partition("/")
            if name in SHOWN or (part and len(found) > 1):
                continue
            label = (part or group) if len(found) == 1 else item.run.name
            mine = groups.setdefault(group, [])
            hue = COLORS[len(mine) % 10] if len(found) == 1 else color(i, found)
            mine.append(Curve(label, item.points(name), hue, run=i))
    pieces = []
    n = POINTS // (2 * sum(map(len, groups.values())) or 1)
    for group, made in [*groups.items()][:40]:
        values = [y for curve in made for _, y in curve.points if y is not None]
        few = any(len(curve.points) < 30 for curve in made)
        made += [Curve(c.name, c.points, c.color, "dots", c.run) for c in made if few]
        pieces.append(tag("h3", group))
        pieces.append(chart(made[:80], x_limits(drawn), limits(values), 110, n=max(n, 10)))
        if len(found) == 1 and len(made) > 1:
            pieces.append(key([curve for curve in made if curve.look == "line"][:40]))
    if not pieces:
        return []
    return [tag("details", tag("summary", tag("b", "Everything else that was logged")), *pieces)]


def histograms(item: Found) -> list[Markup]:
    """Of each kind of tensor the share of values in each power of two, at the last recording."""
    path = item.folder / "histograms.jsonl"
    if not path.is_file():
        return []
    kinds = {}  # kind -> step -> exponent -> count
    for row in read_metrics(path):
        counts = row.get("counts")
        if not isinstance(counts, dict):
            continue
        of_kind = kinds.setdefault(shown(row.get("kind"), 40), {})
        sums = of_kind.setdefault(row["step"], Counter())
        for exponent, n in counts.items():
            if re.fullmatch(r"-?[0-9]{1,4}", exponent) and is_finite(n) and n > 0:
                sums[int(exponent)] += n
    made = []
    for i, (kind, by_step) in enumerate([*kinds.items()][:10]):
        step = max(by_step)
        total = sum(by_step[step].values())
        points = sorted((e, n / total) for e, n in by_step[step].items())
        if points:
            made.append(Curve(f"{kind}, step {step}", points, COLORS[i]))
    if not made:
        return []
    places = [x for curve in made for x, _ in curve.points]
    low, high = min(places) - 1, max(places) + 1
    top = max(y for curve in made for _, y in curve.points)
    ranges = {
        name: ([x for x in range(a, b + 1) if low <= x <= high], "#999999")
        for name, (a, b) in NORMAL.items()
    }
    sections = [tag("h2", "Sizes of values"), key(made)]
    sections.append(chart(made, (low, high), (0, 1.06 * top), 160, axis="2 to the", events=ranges))
    words = "Share of the values between two powers of two. Ticks: what a format holds with all "
    words += "its bits. By tensor: python -m precision.histogram RUN --format=fp16"
    return [*sections, quiet(words)]


def loads(item: Found) -> list[Markup]:
    """How evenly tokens went to experts: a map for each layer."""
    if not (item.folder / "moe_load.jsonl").is_file():
        return []
    from metrics import experts  # torch's seconds are for those who have experts

    try:
        steps, layers = experts.read(item.folder)
    except ValueError:
        return [tag("h2", "Loads of experts"), quiet("moe_load.jsonl has no loads.")]
    every = max(1, math.ceil(len(steps) / 120))
    kept = range(len(steps) - 1, -1, -every)
    sections = [tag("h2", "Loads of experts")]
    for layer, of_steps in [*layers.items()][:16]:
        shares = []
        for k in reversed(kept):
            mean = sum(of_steps[k]) / len(of_steps[k])
            shares.append([tokens / mean for tokens in of_steps[k]])
        ends = f"{min(shares[-1]):.2f} to {max(shares[-1]):.2f} of the mean at step {steps[-1]}"
        sections += [tag("h3", f"layer {layer}: {ends}"), heat(shares)]
    words = f"An expert a row, steps {steps[0]} to {steps[-1]} from left to right. Blue: a quarter "
    return [*sections, quiet(f"{words}of the mean or less; red: four times or more; black: none.")]
