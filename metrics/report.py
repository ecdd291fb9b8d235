"""A run, several, or a search as one HTML page that opens anywhere, without a network.

    python -m metrics.report RUN                      writes RUN/report.html
    python -m metrics.report RUN RUN ...              compares them, in report.html
    python -m metrics.report SWEEP_DIR                a search, its trials best first
    python -m metrics.report RUN --out=FILE.html      another file

The page says what each run was and how it ended, and has its curves, events, machine and settings;
of several the settings that differ. Curves zoom where one drags over them; without a script they
are still there. What a folder lacks is left out, and a sentence says so. Long curves are thinned
such that spikes stay.

    report_read.py     what a folder holds
    report_parts.py    facts, events, machines, settings
    report_curves.py   which curves; report_chart.py draws them, report.js zooms
    report_search.py   a search's trials
    report_page.py     HTML in which every text is text; report.css

Exit status: 0 done; 2 a mistake, in one line.
"""

import os
from pathlib import Path

from metrics import report_curves as pictures
from metrics import report_parts as parts
from metrics import report_search
from metrics.outlets import command
from metrics.plot import names_of
from metrics.report_page import page, tag
from metrics.report_read import Found, by_loss, by_result, read, read_json


def write(folders, path) -> bool:
    """Writes the page about a folder, or a list of folders, of runs and searches to `path`.

    Never raises: a page is not worth a run. False, and a printed sentence, where it failed.
    """
    folders = [folders] if isinstance(folders, (str, os.PathLike)) else [*folders]
    try:
        save(build(folders), path)
    except Exception as error:
        print(f"{path} was not written: {error or type(error).__name__}")
        return False
    return True


def save(content: str, path) -> None:
    # A full disk leaves the old file whole.
    new = Path(f"{path}.tmp")
    try:
        new.write_text(content, encoding="utf-8")
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def is_search(folder: Path) -> bool:
    return (folder / "sweep.json").is_file()


def trials_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("trial-*")) if path.is_dir()]


def build(folders: list) -> str:
    """The page. Raises ValueError for a folder of neither a run nor a search."""
    paths = []
    for folder in map(Path, folders):
        if is_search(folder):
            paths += trials_of(folder)
        elif any((folder / name).is_file() for name in ("metrics.jsonl", "config.toml")):
            paths.append(folder)
        else:
            raise ValueError(
                f"{folder} is not the folder of a run or a search: it has no metrics.jsonl, no "
                "config.toml and no sweep.json"
            )
    # A folder that is named twice is one.
    paths = [*dict.fromkeys(paths)]
    found = [read(path, name) for path, name in zip(paths, names_of(paths) if paths else [])]
    title = ", ".join(os.path.basename(os.path.abspath(folder)) for folder in folders[:4])
    if len(folders) > 4:
        title += f" and {len(folders) - 4} more"
    sections = [tag("h1", title)]
    found = by_loss(found)
    for folder in filter(is_search, map(Path, folders)):
        search = read_json(folder / "sweep.json")
        metric = report_search.metric_of(search)
        trials = by_result([item for item in found if item.folder.parent == folder], metric)
        sections += report_search.search(folder, search, trials)
        # The curves of the best are drawn.
        found = trials + [item for item in found if item not in trials]
    sections += about(found)
    made = tag("p", "Made by python -m metrics.report.", class_="quiet")
    return page(title, *sections, made)


def about(found: list[Found]) -> list:
    """What runs have, alone or together."""
    if not found:
        return [tag("p", "No run is here yet.")]
    is_alone = len(found) == 1
    sections = parts.run(found[0]) if is_alone else parts.runs(found)
    sections += [*parts.notes(found), *pictures.losses(found), *pictures.strips(found)]
    sections += parts.events(found)
    if is_alone:
        sections += [*pictures.histograms(found[0]), *pictures.loads(found[0])]
    return [*sections, *pictures.others(found), *parts.machines(found), *parts.settings(found)]


def main(args: list[str]) -> None:
    """What `python -m metrics.report` does with these words. Raises ValueError, OSError."""
    if "--help" in args or "-h" in args:
        print(__doc__.strip())
        return
    folders = [arg for arg in args if not arg.startswith("-")]
    outs = [arg.removeprefix("--out=") for arg in args if arg.startswith("--out=")]
    if not folders or len(folders) + len(outs) < len(args) or "" in outs:
        raise ValueError("usage: python -m metrics.report RUN [RUN ...] [--out=FILE.html]")
    # A run's page goes into its folder, a comparison here.
    folder = folders[0] if len(folders) == 1 else ""
    out = outs[-1] if outs else os.path.join(folder, "report.html")
    save(build(folders), out)
    print(out)


if __name__ == "__main__":
    command("metrics.report", main, OSError)
