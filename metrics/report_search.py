"""The part of a page about a search: its trials, best first, and the metric over each field."""

import math
from pathlib import Path
from statistics import median

from metrics.curves import TRAINING, VALIDATION, is_finite
from metrics.labels import loss_text
from metrics.report_chart import Curve, chart, label
from metrics.report_curves import limits
from metrics.report_page import MOST_COLUMNS, Markup, listed, quiet, shown, tag
from metrics.report_read import Found


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
        title += f"; best is {trials[0].folder.name}, {metric} {loss_text(results[0])} with {best}"
    sections = [tag("h2", title)]
    if not sweep:
        sections.append(quiet("sweep.json is damaged: what was searched is not known."))
    rows = []
    for item, own, result in zip(trials, values, results):
        end = [None if result is None else loss_text(result), item.steps(), item.trial.get("error")]
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
    # A few bad trials would flatten the many.
    far = math.inf
    if len(made) >= 10:
        far = 6 * abs(median(y for _, y in made) - best) or math.inf
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
    return pieces + ([quiet(f"Beyond the picture: {n_beyond} that are worse.")] if n_beyond else [])


def span(places: list[float]) -> tuple[int, int]:
    return math.ceil(min(places)), math.floor(max(places)) + 1


def number(value) -> float | None:
    """A finite number, or None."""
    try:
        x = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return x if is_finite(x) and not isinstance(value, bool) else None
