"""What the folder of a run holds, for a page about it, whatever of it is missing or damaged.

    metrics.jsonl   rows by step; the last of a repeated step counts, the others were undone
    config.toml     settings, and in its head commit, versions and machine
    trial.json      of a trial of a search: its values, its status, its error

What is not there gives a sentence in `notes`, never an error.
"""

import json
import math
import tomllib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from metrics.curves import Run, is_finite
from metrics.logger import read_metrics
from metrics.plot import branch_of

MAXIMISED = ("val_accuracy", "tokens_per_s", "mfu")  # of the metrics of a search
STATUSES = ("done", "pruned", "diverged", "unfinished", "failed")  # from the best to the worst


@dataclass
class Found:
    folder: Path
    run: Run
    config: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    undone: list[dict] = field(default_factory=list)  # train rows that a rollback took back
    notes: list[str] = field(default_factory=list)
    trial: dict = field(default_factory=dict)
    written: str = ""  # when the last line was

    def points(self, name: str) -> list[tuple[int, float | None]]:
        """(step, value) of this field; None where it was not finite."""
        values = {row["step"]: row[name] for row in self.run.rows if name in row}
        return [(step, x if is_finite(x) else None) for step, x in values.items()]

    def curve(self, name: str) -> dict[int, float]:
        return {step: x for step, x in self.points(name) if x is not None}

    def last(self, name: str) -> float | None:
        return [None, *self.curve(name).values()][-1]

    def steps(self) -> int:
        """The last step that was logged."""
        return max((row["step"] for row in self.run.rows), default=0)

    def events(self) -> list[dict]:
        return [row for row in self.run.rows if "event" in row]

    def seconds(self) -> float:
        """What the steps took, undone ones too; those between rows count as the others."""
        rows = [row for row in self.run.rows if "loss" in row]
        times = [row["step_s"] for row in rows if is_finite(row.get("step_s"))]
        steps = {row["step"] for row in rows}
        # Of a run that logs each step this factor is 1.
        every = (max(steps) - min(steps) + 1) / len(steps) if steps else 1
        return sum(times) * every

    def result(self, metric: str) -> float | None:
        """What a search makes of it: the last value, with patience that of the kept weights."""
        best = self.run.best()
        curve = self.curve(metric)
        if type(self.config.get("patience")) is int and best and best[0] in curve:
            return curve[best[0]]
        return None if self.trial.get("status") == "diverged" else self.last(metric)


def read(folder: Path, name: str) -> Found:
    """name: what the page calls it."""
    notes = []
    rows = []
    written = ""
    path = folder / "metrics.jsonl"
    if path.is_file():
        rows = read_metrics(path)
        written = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        with open(path, "rb") as file:
            n_lost = sum(bool(line.strip()) for line in file) - len(rows)
        if n_lost:
            lines = "1 line is" if n_lost == 1 else f"{n_lost:,} lines are"
            why = "no JSON object with a step (a kill may cut off the last one)"
            notes.append(f"{lines} left out of metrics.jsonl: {why}")
        if not rows:
            notes.append("metrics.jsonl has no rows")
    else:
        notes.append("no metrics.jsonl: nothing was logged, or it was deleted")
    seen = {}
    undone = []
    for row in rows:
        if "loss" in row:
            if row["step"] in seen:
                undone.append(seen[row["step"]])
            seen[row["step"]] = row
    config, environment, trouble = read_config(folder / "config.toml")
    notes += [trouble] if trouble else []
    # Sorting is stable: of a repeated step the last row counts.
    rows.sort(key=lambda row: row["step"])
    run = Run(name, rows, branch_of(folder, rows))
    trial = read_json(folder / "trial.json")
    return Found(folder, run, config, environment, undone, notes, trial, written)


def read_config(path: Path) -> tuple[dict, dict, str]:
    """(settings, what its head says, what is wrong with the file)."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}, {}, "no config.toml: its settings and its machine are not known"
    environment = {}
    for line in content.splitlines():
        if not line.startswith("# "):
            break
        name, _, value = line[2:].partition(": ")
        environment[name] = value
    try:
        config = tomllib.loads(content)
    except (ValueError, RecursionError):
        return {}, environment, "config.toml is damaged: its settings are not known"
    chosen = config.pop("chosen", {})
    return config | (chosen if isinstance(chosen, dict) else {}), environment, ""


def read_json(path: Path) -> dict:
    """{} where there is no such file, or a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# ---- order ---------------------------------------------------------------------------------------
def by_loss(found: list[Found]) -> list[Found]:
    """The best first: by validation, without one by training."""
    return sorted(found, key=lambda item: item.run.rank())


def by_result(trials: list[Found], metric: str) -> list[Found]:
    """The best first, as sweep.py orders them."""

    def rank(item: Found) -> tuple:
        status = item.trial.get("status")
        result = item.result(metric)
        size = math.inf if result is None else result
        if metric in MAXIMISED and result is not None:
            size = -result
        return STATUSES.index(status) if status in STATUSES else 3, size, item.run.name

    return sorted(trials, key=rank)
