"""The parts of a page about runs: facts, curves, events, loads, machines, settings, a search.

Each function takes what was read of the runs, the best first, and returns pieces of HTML; [] where
there is nothing to show.
"""

import math
from collections import Counter
from pathlib import Path
from statistics import median

from metrics import curves
from metrics.curves import DRAWN, TRAINING, VALIDATION, is_finite
from metrics.logger import read_metrics, short
from metrics.report_page import Curve, Markup, box, chart, heat, key, label, table, tag
from metrics.report_read import Found

COLORS = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf".split()
UNDONE, EMA = "#777777", "#2e7d32"
MOST_RUNS = 40  # whose curves are drawn
MOST_ROWS = 300  # of a table
MOST_COLUMNS = 12
POINTS = 40_000  # of all curves of a part, some 15 bytes each
# Fields with a curve of their own; any other number of a row has one further down.
SHOWN = "step loss val_loss val_loss_ema lr grad_norm tokens tokens_per_s step_s peak_bytes".split()
# Powers of two that a format holds with all bits: precision/histogram.py.
NORMAL = {"fp16": (-14, 15), "bf16": (-126, 127), "e4m3": (-6, 8), "e5m2": (-14, 15)}


def shown(value, longest: int = 300):
    """A value of a file as a cell. Markup is ours, and stays."""
    if isinstance(value, Markup):
        return value
    text = f"{value:.6g}" if type(value) is float else str(value)
    return text if len(text) <= longest else text[: longest - 1] + "\u2026"


def loss(x: float | None) -> str:
    return "" if x is None else f"{x:.4f}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def listed(head: list, rows: list[list], best: int | None = None) -> list[Markup]:
    """A table that is no longer than a page can bear."""
    cells = [[shown(cell) if cell is not None else "" for cell in row] for row in rows[:MOST_ROWS]]
    found = [table([shown(name) for name in head], cells, best)]
    if len(rows) > MOST_ROWS:
        found.append(quiet(f"and {len(rows) - MOST_ROWS} more rows"))
    return found


def quiet(words: str) -> Markup:
    return tag("p", words, class_="quiet")


# ---- facts ---------------------------------------------------------------------------------------
def ending(item: Found) -> str:
    """How a run ended, as far as its files tell."""
    done = item.steps()
    steps = item.config.get("steps")
    text = f"{done:,} steps"
    if type(steps) is int and done >= steps:
        text = f"all {steps:,} steps"
    elif type(steps) is int:
        text = f"{done:,} of {steps:,} steps: still running, stopped, or killed"
        if type(item.config.get("patience")) is int:
            text += f", or out of patience ({item.config['patience']} evaluations)"
    if item.trial.get("status"):
        text += f"; the search calls it {item.trial['status']}"
    if any(row["event"] == "divergence" for row in item.events()):
        text += "; diverged"
    train = item.points("loss")
    if train and train[-1][1] is None:
        text += "; its last loss is no number"
    return text


def what(item: Found) -> str:
    """What a run was, from its settings."""
    c = {name: shown(value, 80) for name, value in item.config.items()}

    def said(pattern: str, *names: str) -> str:
        return pattern.format(*(c[name] for name in names)) if all(n in c for n in names) else ""

    parts = [
        said("{}, {} layers of width {}, {} heads", "arch", "n_layer", "n_embd", "n_head"),
        said("{} at lr {}, schedule {}", "optim", "lr", "schedule"),
        said("{} sequences of {} tokens a step", "batch_size", "block_size"),
        said("{}, {}", "precision", "data_parallel"),
        said("data {}, tokenizer {}", "data", "tokenizer"),
    ]
    return "; ".join(part for part in parts if part)


def facts(item: Found) -> dict:
    """Name -> value, of a single run's list and of a comparison's table."""
    best = item.run.best()
    speeds = [x for _, x in item.points("tokens_per_s") if x is not None]
    peaks = item.curve("peak_bytes").values()
    tokens = item.last("tokens")
    return {
        "ended": ending(item),
        "best validation loss": f"{best[1]:.4f} at step {best[0]:,}" if best else None,
        "last validation loss": loss(item.last("val_loss")),
        "of the average (--ema=)": loss(item.last("val_loss_ema")),
        "last training loss": loss(item.last("loss")),
        "tokens": short(tokens) if tokens is not None and tokens >= 0 else None,
        "time in steps": duration(item.seconds()) if item.seconds() else None,
        "tokens/s, median": short(median(speeds)) if speeds and min(speeds) >= 0 else None,
        "memory at most": f"{max(peaks) / 2**20:,.0f} MiB" if peaks else None,
        "events": counted(item),
        "last line written": item.written,
    }


def counted(item: Found) -> str:
    counts = Counter(shown(row["event"], 40) for row in item.events())
    return ", ".join(f"{n} {event}" for event, n in counts.items())


def run(item: Found) -> list[Markup]:
    """What a single run was, and how it ended."""
    rows = [["what", what(item)], *([name, value] for name, value in facts(item).items())]
    if item.run.branch:
        source, step = item.run.branch
        rows.append(["a branch", f"it leaves {source} at step {step:,}"])
    return [tag("h2", "Summary"), *listed([], [row for row in rows if row[1]])]


def runs(found: list[Found]) -> list[Markup]:
    """Several: a row each. The box of one that is drawn hides its curves."""
    values = [facts(item) for item in found]
    names = [name for name in values[0] if any(value[name] for value in values)]
    rows = []
    for i, (item, value) in enumerate(zip(found, values)):
        name = box(i, color(i, found), item.run.name) if i < MOST_RUNS else item.run.name
        branch = f" (leaves {item.run.branch[0]})" if item.run.branch else ""
        rows.append([name, *(value[name] for name in names)])
        rows[-1][1] += branch
    sections = [tag("h2", f"{len(found)} runs, the best first"), *listed(["run", *names], rows, 0)]
    if len(found) > MOST_RUNS:
        sections.append(quiet(f"Curves below are those of the first {MOST_RUNS}."))
    return sections


def notes(found: list[Found]) -> list[Markup]:
    """Sentences about what is missing or damaged."""
    said = []
    for item in found:
        said += [f"{item.run.name}: {note}" if len(found) > 1 else note for note in item.notes]
    return [tag("ul", *(tag("li", shown(note)) for note in said[:MOST_ROWS]))] if said else []


# ---- curves over steps ---------------------------------------------------------------------------
def color(i: int, found: list) -> str:
    if len(found) <= len(COLORS):
        return COLORS[i]
    return f"hsl({round(360 * i / min(len(found), MOST_RUNS))},65%,45%)"


def x_limits(found: list[Found]) -> tuple[float, float]:
    """Of every chart over steps, so that they lie under each other."""
    ends = [(i.run.rows[0]["step"], i.run.rows[-1]["step"]) for i in found if i.run.rows]
    first = min(end[0] for end in ends)
    last = max(end[1] for end in ends)
    pad = 0.015 * max(last - first, 1)
    return first - pad, last + pad


def limits(values: list[float], from_zero: bool = False) -> tuple[float, float]:
    """Of a y axis. A few values far above the rest are cut off."""
    values = sorted(values)
    low = min(0, values[0]) if from_zero else values[0]
    high = values[-1]
    usual = values[math.ceil(0.98 * (len(values) - 1))]
    if high - low > 2 * (usual - low) > 0:
        high = usual
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return (low if from_zero and low == 0 else low - pad), high + pad


def losses(found: list[Found]) -> list[Markup]:
    """Training and validation, and below them the events."""
    drawn = found[:MOST_RUNS]
    measured = [i for i in drawn if i.run.curves["loss"] or i.run.curves["val_loss"]]
    if not measured:
        return [tag("h2", "Loss"), quiet("No loss was logged.")]
    _, y_limits, cut_off = curves.limits([item.run for item in measured])
    is_alone = len(found) == 1
    made = []
    for i, item in enumerate(drawn):
        made += lines_of_run(item) if is_alone else lines_of_many(item, i, color(i, found))
    sections = [tag("h2", "Loss"), tag("p", curves.title_of([item.run for item in measured]))]
    n = POINTS // (2 * len(made) or 1)
    events = strip(drawn)
    sections.append(chart(made, x_limits(drawn), y_limits, 300, events=events, n=min(n, 2000)))
    shown_keys = made if is_alone else []
    hint = "Drag over a curve to zoom, double-click to go back. Loss in nats a token, over steps."
    if not is_alone:
        hint += " Lines: training, smoothed; dots: validation. Boxes in the table hide a run."
    sections += [key(shown_keys), quiet(hint)]
    return sections + ([quiet(cut_off)] if cut_off else [])


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


def smoothed(item: Found) -> list[tuple[int, float]]:
    return [*zip(*curves.smoothed(item.run, "loss"))] if item.run.curves["loss"] else []


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
            made.append(Curve(item.run.name, points, hue, run=i))
        values = [y for curve in made for _, y in curve.points if y is not None]
        if not values:
            continue
        log = name == "grad_norm" and min(values) > 0 and max(values) > 20 * median(values)
        y_limits = (min(values) / 1.3, max(values) * 1.3) if log else limits(values, True)
        n = POINTS // (2 * len(made))
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
        pieces.append(chart(made[:80], x_limits(drawn), limits(values), 110, n=max(n, 30)))
        if len(found) == 1 and len(made) > 1:
            pieces.append(key([curve for curve in made if curve.look == "line"][:40]))
    if not pieces:
        return []
    return [tag("details", tag("summary", tag("b", "Everything else that was logged")), *pieces)]


# ---- events, tensors, experts --------------------------------------------------------------------
def events(found: list[Found]) -> list[Markup]:
    rows = [(item, row) for item in found for row in item.events()]
    if not rows:
        return [tag("h2", "Events"), quiet("None.")]
    n_all = len(rows)
    if n_all > MOST_ROWS:  # saves are the least of news
        rows = [(item, row) for item, row in rows if row["event"] != "save"]
    lines = []
    for item, row in rows:
        rest = {name: x for name, x in row.items() if name not in ("step", "event", "text")}
        said = row.get("text") or ", ".join(f"{name} {shown(x, 80)}" for name, x in rest.items())
        name = [item.run.name] if len(found) > 1 else []
        lines.append([*name, f"{row['step']:,}", row["event"], said])
    head = [*(["run"] if len(found) > 1 else []), "step", "event", "what"]
    total = quiet(f"{n_all} in all") if n_all > MOST_ROWS else ""
    return [tag("h2", "Events"), total, *listed(head, lines)]


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
            if exponent.lstrip("-").isdecimal() and len(exponent) < 5 and is_finite(n) and n > 0:
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


# ---- machines and settings -----------------------------------------------------------------------
def machines(found: list[Found]) -> list[Markup]:
    return compared("Machine and versions", [item.environment for item in found], found)


def settings(found: list[Found]) -> list[Markup]:
    """All of a single run's, folded away; of several those that differ."""
    hidden = ("out_dir",) if len(found) > 1 else ()
    configs = [{k: v for k, v in item.config.items() if k not in hidden} for item in found]
    return compared("Settings", configs, found)


def compared(title: str, values: list[dict], found: list[Found]) -> list[Markup]:
    """What all have in one folded table, what differs in another."""
    names = [*dict.fromkeys(name for value in values for name in value)]
    if not names:
        return []
    missing = object()
    differ = [
        n for n in names if any(v.get(n, missing) != values[0].get(n, missing) for v in values)
    ]
    same = [[name, values[0][name]] for name in names if name not in differ]
    sections = [tag("h2", title)]
    if differ:
        rows = [[i.run.name, *(v.get(n) for n in differ)] for i, v in zip(found, values)]
        head = ["run", *differ]
        if len(differ) > len(rows):  # the longer side downwards
            head, *rows = [list(column) for column in zip(head, *rows)]
        more = len(head) - 1 - MOST_COLUMNS
        sections += listed(head[: MOST_COLUMNS + 1], [row[: MOST_COLUMNS + 1] for row in rows])
        sections += [quiet(f"and {more} more columns")] if more > 0 else []
    if len(found) > 1:
        words = f"{len(same)} that all runs share" if differ else f"All {len(same)} are the same."
    else:
        words = f"{len(same)} lines"
    return [*sections, tag("details", tag("summary", words), *listed([], same))]


# ---- a search ------------------------------------------------------------------------------------
def metric_of(search: dict) -> str:
    metric = search.get("metric", "val_loss")
    return metric if isinstance(metric, str) else "val_loss"


def search(folder: Path, sweep: dict, trials: list[Found]) -> list[Markup]:
    """The trials' table, and the metric over each field. trials: the best first."""
    metric = metric_of(sweep)
    fields = {name[7:]: choice for name, choice in sweep.items() if name.startswith("search.")}
    values = []
    for item in trials:
        own = item.trial.get("values")
        values.append(own if isinstance(own, dict) else {})
    names = [*dict.fromkeys([*fields, *(name for own in values for name in own)])][:MOST_COLUMNS]
    results = [item.result(metric) for item in trials]
    is_done = bool(trials) and trials[0].trial.get("status") == "done" and results[0] is not None
    title = f"Search {folder.name}: {len(trials)} trials"
    if is_done:
        best = ", ".join(f"{name}={shown(x, 60)}" for name, x in values[0].items())
        title += f"; best is {trials[0].folder.name}, {metric} {results[0]:.4f} with {best}"
    sections = [tag("h2", title)]
    if not sweep:
        sections.append(quiet("sweep.json is damaged: what was searched is not known."))
    rows = []
    for item, own, result in zip(trials, values, results):
        end = [loss(result), item.steps(), item.trial.get("error")]
        row = [item.folder.name, item.trial.get("status"), *(own.get(n) for n in names), *end]
        rows.append(row)
    head = ["trial", "status", *names, metric, "steps", "error"]
    sections += listed(head, rows, 0 if is_done else None)
    for name in names[:6] if is_done else []:
        points = [(own[name], y) for own, y in zip(values, results) if name in own]
        sections += over_field(name, fields.get(name), metric, points)
    return sections


def over_field(name: str, choice, metric: str, points: list[tuple]) -> list[Markup]:
    """The metric over one searched field. points: (value, result), the best first."""
    points = [(x, y) for x, y in points if y is not None]
    kinds = [*dict.fromkeys(shown(x, 24) for x, _ in points)]
    if len(kinds) < 2:
        return []
    numbers = [number(x) for x, _ in points]
    names = None
    if None in numbers:  # words lie side by side
        kinds.sort()
        places = [kinds.index(shown(x, 24)) for x, _ in points]
        names = dict(enumerate(kinds[:20]))
    else:
        places = numbers
        is_log = isinstance(choice, list) and choice[:1] == ["log"]
        # Listed values that grow by factors, too.
        if min(numbers) > 0 and (is_log or max(numbers) > 20 * min(numbers)):
            places = [math.log10(x) for x in numbers]
            names = dict(zip(places, (label(x) for x in numbers)))
            if len(names) > 9:
                names = {k: label(10.0**k) for k in range(*span(places))}
    made = [*zip(places, (y for _, y in points))]
    best = made[0][1]
    middle = median(y for _, y in made)
    # A bad trial would flatten the others.
    far = 3 * abs(middle - best) or abs(best) or 1
    seen = [y for _, y in made if abs(y - best) <= far]
    low, high = min(places), max(places)
    pad = 0.05 * (high - low)
    dots = [
        Curve("trial", sorted(made), TRAINING, "dots"),
        Curve("best", made[:1], VALIDATION, "ring"),
    ]
    pieces = [tag("h3", f"{metric} over {name}")]
    pieces.append(chart(dots, (low - pad, high + pad), limits(seen), 150, axis=name, names=names))
    n_beyond = len(made) - len(seen)
    return pieces + ([quiet(f"{n_beyond} worse ones lie beyond.")] if n_beyond else [])


def span(places: list[float]) -> tuple[int, int]:
    return math.ceil(min(places)), math.floor(max(places)) + 1


def number(value) -> float | None:
    """A finite number, or None."""
    try:
        x = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return x if is_finite(x) and not isinstance(value, bool) else None
