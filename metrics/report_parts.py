"""What a page says of runs: facts, events, machines, settings.

Each function takes what was read of the runs, the best first, and returns pieces of HTML; [] where
there is nothing to show.
"""

from collections import Counter
from statistics import median

from metrics.labels import duration, loss_text
from metrics.logger import short
from metrics.report_chart import box
from metrics.report_curves import MOST_RUNS, color
from metrics.report_page import MOST_COLUMNS, MOST_ROWS, Markup, listed, quiet, shown, tag
from metrics.report_read import Found


def loss(x: float | None) -> str:
    return "" if x is None else loss_text(x)


# ---- facts ---------------------------------------------------------------------------------------
def ending(item: Found) -> str:
    """How a run ended, as far as its files tell."""
    done = item.steps()
    steps = item.config.get("steps")
    text = f"{done:,} step{'s' * (done != 1)}"
    if type(steps) is int and done >= steps:
        text = f"all {steps:,} steps" if steps != 1 else "its 1 step"
    elif type(steps) is int:
        text = f"{done:,} of {steps:,} steps: still running, stopped, or killed"
        if type(item.config.get("patience")) is int:
            text += f", or out of patience ({item.config['patience']} evaluations)"
    if item.trial.get("status", "done") != "done":
        text += f"; the search calls it {item.trial['status']}"
    if any(row["event"] == "divergence" for row in item.events()):
        text += "; diverged"
    train = item.points("loss")
    if train and train[-1][1] is None:
        text += "; its last loss is no number"
    return text


def what(item: Found) -> str:
    """What a run was, from its settings."""
    known = item.environment | item.config
    c = {name: shown(value, 80) for name, value in known.items()}

    def said(pattern: str, *names: str) -> str:
        return pattern.format(*(c[name] for name in names)) if all(n in c for n in names) else ""

    parts = [
        said("{}, {} layers of width {}, {} heads", "arch", "n_layer", "n_embd", "n_head"),
        said("{} at lr {}, schedule {}", "optim", "lr", "schedule"),
        said("{} sequences of {} tokens a step", "batch_size", "block_size"),
        said("{} on {}", "precision", "hardware"),
        said("{} ranks, {}", "ranks", "data_parallel") if c.get("ranks") != "1" else "1 process",
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
        "best validation loss": f"{loss_text(best[1])} at step {best[0]:,}" if best else None,
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
        name = box(i, color(i, found), shown(item.run.name, 60)) if i < MOST_RUNS else item.run.name
        branch = f" (leaves {shown(item.run.branch[0], 60)})" if item.run.branch else ""
        rows.append([name, *(value[name] for name in names)])
        rows[-1][1] += branch
    sections = [tag("h2", f"{len(found)} runs, the best first"), *listed(["run", *names], rows, 0)]
    if len(found) > MOST_RUNS:
        sections.append(quiet(f"Curves below are those of the first {MOST_RUNS}."))
    return sections


def notes(found: list[Found]) -> list[Markup]:
    """Sentences about what is missing or damaged."""
    of_notes = {}  # what is said -> of which runs
    for item in found:
        for note in item.notes:
            of_notes.setdefault(note, []).append(item.run.name)
    said = []
    for note, names in of_notes.items():
        if len(found) > 1:
            of = names[0] if len(names) == 1 else f"{len(names)} of {len(found)} runs"
            note = f"{of}: {note}"
        said.append(note)
    return [tag("ul", *(tag("li", shown(note)) for note in said[:MOST_ROWS]))] if said else []


# ---- events --------------------------------------------------------------------------------------
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
