"""Loss curves as a picture, and metrics.jsonl as a table.

    python -m metrics.plot RUN                             draws RUN/loss.png
    python -m metrics.plot RUN RUN ... [--out=FILE.png]    compares several runs in loss.png, and
                                                           prints a table of them, the best first
    python -m metrics.plot RUN --csv [--out=FILE.csv]      metrics.jsonl as a table, RUN/metrics.csv

Exit status: 0 done; 2 a mistake, in one line.
"""

import csv
import json
import os
import re
import shlex
import tomllib
from pathlib import Path

from metrics.curves import Run, draw
from metrics.labels import loss_text, one_line
from metrics.logger import read_metrics
from metrics.outlets import command


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
    if os.path.isfile(os.path.join(run, "sweep.json")):
        raise FileNotFoundError(
            f"{run} is the folder of a search: python -m metrics.report {shlex.quote(str(run))} "
            "makes its page, and metrics.plot draws its trial-* folders"
        )
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no metrics.jsonl")
    return path


def plot(runs, path) -> bool:
    """Draws the losses of a run's folder, or of a list of them, into the picture file `path`.

    Of several a table is printed, the best first. False, and a printed sentence, if no loss was
    logged. Raises FileNotFoundError for a folder without metrics.jsonl.
    """
    folders = [runs] if isinstance(runs, (str, os.PathLike)) else list(runs)
    found = []
    for folder, name in zip(folders, names_of(folders)):
        # Sorting is stable: if a step was repeated, its last row counts.
        rows = sorted(read_metrics(metrics_of(folder)), key=lambda row: row["step"])
        run = Run(name, rows, branch_of(folder, rows))
        if run.curves["loss"] or run.validation():
            found.append(run)
        else:
            print(f"{folder}: no loss was logged, nothing to draw")
    if not found:
        return False
    draw(found).savefig(path)
    if len(folders) > 1:
        print(table(found))
    return True


def names_of(folders: list) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    names = [path.name for path in paths]
    longest = max(len(path.parts) for path in paths)
    for n in range(2, longest + 1):
        is_unique = {name: names.count(name) == 1 for name in names}
        names = [
            name if is_unique[name] else str(Path(*path.parts[-n:]))
            for name, path in zip(names, paths)
        ]
    return names


def branch_of(folder, rows: list[dict]) -> tuple[str, int] | None:
    """The run that a branch leaves, as its config.toml has it, and the step."""
    try:
        config = tomllib.loads(Path(folder, "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    source = config.get("resume")
    if not isinstance(source, str) or source in ("auto", "never") or not rows:
        return None
    path = Path(source)
    # More digits are no step of a run.
    number = re.fullmatch(r"(?:step-)?(\d{1,15})", path.name, re.ASCII)
    if number:
        return str(path.parent), int(number[1])
    # A folder stands for its newest checkpoint, which the first line tells.
    return source, max(rows[0]["step"] - 1, 0)


def table(runs: list[Run]) -> str:
    """A line for each run, the best first: by validation, without one by training."""

    lines = [("run", "steps", "best validation", "at step", "last validation", "last training")]
    for run in sorted(runs, key=Run.rank):
        train = [*run.curves["loss"].values()]
        val = [*run.validation().values()]
        step, loss = run.best() or ("", None)
        numbers = [loss, step, val[-1] if val else None, train[-1] if train else None]
        cells = ["" if x is None else loss_text(x) if type(x) is float else str(x) for x in numbers]
        lines.append((one_line(run.name), str(max(row["step"] for row in run.rows)), *cells))
    widths = [max(map(len, column)) for column in zip(*lines)]
    out = []
    for name, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        out.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(out)


def main(args: list[str]) -> None:
    """What `python -m metrics.plot` does with these words. Raises ValueError, OSError."""
    if "--help" in args or "-h" in args:
        print(__doc__.strip())
        return
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
    command("metrics.plot", main, OSError)
