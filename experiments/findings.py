"""What people read of an experiment: means and standard deviations, a table, a picture, a verdict.

rows      dicts with the keys of the grid and the figures, as experiments/protocol.py keeps them
paired    figure / the base's with the same seed - 1: what a seed does to both drops out
NAME.md   claim, verdict, one number, table, picture, and how to get them again;
          experiments/all.py takes the first lines for the index
"""

import math
import re
from collections import Counter
from pathlib import Path
from statistics import fmean

from metrics.outlets import print_line

VERDICTS = ("holds", "holds in part", "not at this scale", "does not hold")
INK = "#3b75af", "#c8502d", "#5a9a4b", "#8a63a8", "#c9a227", "#6b6b6b"  # of all pictures


# ---- rows ----------------------------------------------------------------------------------------
def pick(rows: list[dict], **keys) -> list[dict]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in keys.items())]


def groups(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """{(values of these keys): their rows}, in the grid's order."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def paired(rows: list[dict], base: list[dict], figure: str, on: str = "seed") -> list[float]:
    """figure / the base's - 1, seed by seed."""
    other = {row[on]: row[figure] for row in base}
    return [row[figure] / other[row[on]] - 1 for row in rows if row[on] in other]


# ---- numbers -------------------------------------------------------------------------------------
def mean_sd(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1), NaN for one value; both are NaN where a value is."""
    mean, n = fmean(values), len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else math.nan


def plus_minus(values: list[float], form: str = ".4f") -> str:
    """1.3380 ± 0.0041; form ".2%" for shares, "+.2%" with a sign."""
    mean, sd = mean_sd(values)
    return f"{mean:{form}}" + (f" ± {sd:{form.removeprefix('+')}}" if len(values) > 1 else "")


def markdown(head: list[str], lines: list[list]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in cells)


# ---- verdicts ------------------------------------------------------------------------------------
def clear(differences: list[float]) -> bool:
    """Mean x sqrt(n) >= 3.1 standard deviations. One value, or NaN, says nothing."""
    mean, sd = mean_sd(differences)
    return mean > 0 and mean * math.sqrt(len(differences)) >= 3.1 * sd


def judged(parts: dict[str, bool]) -> tuple[str, str, str]:
    """(verdict, number, why) of a claim, from its parts: a sentence with its figure -> is it as
    claimed? The number is the first part without what is asked of it, which stands in brackets."""
    failed = [text for text, held in parts.items() if not held]
    word = (
        "holds" if not failed else "holds in part" if len(failed) < len(parts) else "does not hold"
    )
    why = f"{len(parts) - len(failed)} of {len(parts)} parts as claimed" + "; not so: " * bool(
        failed
    )
    return word, next(iter(parts)).partition(" (")[0], why + "; ".join(failed)


def listed(parts: dict[str, bool]) -> list[str]:
    """The same, a line each."""
    return [f"- {text}: {'yes' if held else '**no**'}" for text, held in parts.items()]


# ---- pictures ------------------------------------------------------------------------------------
def dots(ax, values: dict[str, list[float]], color: str = INK[0]) -> None:
    """A line for each name: every seed pale, mean and standard deviation strong."""
    for y, found in enumerate(values.values()):
        mean, sd = mean_sd(found)
        ax.plot(found, [y] * len(found), "o", ms=5, color=color, alpha=0.35, mew=0)
        error = None if math.isnan(sd) else sd
        # Many lines lie so close that large marks would touch.
        size, cap = (14, 4) if len(values) <= 24 else (8, 2)
        ax.errorbar(mean, y, xerr=error, fmt="|", ms=size, mew=2, capsize=cap, color=color)
    ax.set_yticks(range(len(values)), [*values])
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.grid(alpha=0.25, axis="x")


def line(ax, points: dict[float, list[float]], label: str, **style) -> None:
    """Through the means of {x: values}, with standard deviations: bars, or a shade where bars would
    be too many."""
    found = [mean_sd(values) for values in points.values()]
    means = [mean for mean, _ in found]
    errors = [0 if math.isnan(sd) else sd for _, sd in found]
    ax.grid(alpha=0.25)
    if len(points) <= 12 or style.get("ls") == "":
        ax.errorbar([*points], means, errors, label=label, capsize=3, **style)
        return
    low = [mean - error for mean, error in zip(means, errors)]
    high = [mean + error for mean, error in zip(means, errors)]
    [drawn] = ax.plot([*points], means, label=label, **style)
    ax.fill_between([*points], low, high, color=drawn.get_color(), alpha=0.15, lw=0)


def below(ax, **style) -> None:
    """The legend of a panel under it, where it covers nothing."""
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), **style)


# ---- NAME.md and NAME.png ------------------------------------------------------------------------
def report(
    doc: str,
    name: str,
    home: Path,
    rows: list[dict],
    asked: int,
    quick: bool,
    table,
    picture,
    verdict,
) -> None:
    """Both, once all rows are measured; till then NAME.md says how many are."""
    claim = " ".join(re.search(r"Claim:(.+?)\n\n", doc, re.S)[1].split())
    lines = [f"# {name}", f"**Claim.** {claim[0].upper() + claim[1:]}"]
    if len(rows) < asked:
        left = f"{len(rows)} of {asked} rows are measured, the same command measures the others"
        lines.append(f"**Verdict.** unfinished: {left}")
        (home / f"{name}.png").unlink(missing_ok=True)
    else:
        from matplotlib.figure import Figure

        word, number, why = verdict(rows)
        assert word in VERDICTS, word
        figure = Figure(figsize=(9, 4.5), dpi=140, layout="constrained")
        picture(rows, figure)
        figure.savefig(home / f"{name}.png")
        lines += [f"**Verdict.** {word}: {why}", f"**Number.** {number}", f"![{name}]({name}.png)"]
        lines += [table(rows), footer(name, rows, quick)]
    (home / f"{name}.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print_line("\n\n".join([*lines, str(home / f"{name}.md")]))


def footer(name: str, rows: list[dict], quick: bool) -> str:
    """Command, commits, machines, seeds, days, time; that rows stem from several commits is
    said."""
    of = {
        part: Counter(str(row[part]) for row in rows if part in row)
        for part in ("commit", "machine", "seed", "date")
    }
    commits = ", ".join(f"{commit} ({n} rows)" for commit, n in of["commit"].items())
    seeds = f"seed{'s' * (len(of['seed']) > 1)} {', '.join(of['seed'])}"
    if len(of["seed"]) > 12:
        seeds = f"{len(of['seed'])} seeds, {min(of['seed'], key=int)} to {max(of['seed'], key=int)}"
    minutes = sum(row["seconds"] or 0 for row in rows) / 60
    return (
        "; ".join(
            [
                f"`python -m experiments.{name}{' --quick' * quick}`",
                (
                    f"**rows of several commits**: {commits}"
                    if len(of["commit"]) > 1
                    else f"commit {commits}"
                ),
                *of["machine"],
                *[seeds] * bool(of["seed"]),
                ", ".join(sorted(of["date"])),
                f"the rows' times add up to {minutes:.0f} minutes",
            ]
        )
        + "."
    )
