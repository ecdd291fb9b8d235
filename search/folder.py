"""What is in a search's folder, whoever has been there since the last start.

    SWEEP_DIR/sweep.json     what is searched, and all the trials have in common
    SWEEP_DIR/trial-0007/    search/trials.py
    SWEEP_DIR/.lock          held while a search runs here

What is damaged is moved to NAME.damaged, what takes the place of a trial and is none of this search
to aside-NAME. A sentence names it, nothing is deleted, and the search goes on.
"""

import json
import os
import re
from pathlib import Path

from run import control
from search.trials import Trial, flags, write
from settings import parse

NAME = re.compile(r"trial-([0-9]{4,})")


def lock(home: Path) -> control.RunLock:
    """Makes the folder, and it is ours until release(). Raises ValueError where another search runs
    in it."""
    if os.path.lexists(home) and not home.is_dir():
        raise ValueError(f"{home} is no folder; take another SWEEP_DIR")
    try:
        return control.RunLock(home)
    except ValueError as error:
        said = str(error).removeprefix("--out_dir=").replace("another out_dir", "another SWEEP_DIR")
        raise ValueError(said) from None


# ---- sweep.json ----------------------------------------------------------------------------------
def in_order(home: Path, search: dict) -> dict:
    """The fields as the first command had them: their order decides which trial tries what."""
    was = [name.removeprefix("search.") for name in before(home) or {}]
    return {name: search[name] for name in sorted(search, key=[*was, *search].index)}


def before(home: Path) -> dict | None:
    """What sweep.json holds; None where there is none, or a damaged one."""
    try:
        found = json.loads((home / "sweep.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None


def same_search(home: Path, options: dict, search: dict, words: list[str], say) -> None:
    """Writes sweep.json; ValueError if it is there and says something else."""
    now = {name: text for name, text in options.items() if name not in ("trials", "jobs")}
    now |= {f"search.{name}": list(choice) for name, choice in search.items()}
    for word in words:  # later wins, as in train.py
        name, _, text = word[2:].partition("=")
        flag = word.startswith("--")
        now |= {name: parse.from_text(name, text)} if flag else parse.read_recipe(word)
    now, was, path = json.loads(json.dumps(now)), before(home), home / "sweep.json"
    if was is None and os.path.lexists(path):
        os.replace(path, free(path.with_name("sweep.json.damaged")))
        say(f"{path} is damaged and is moved to sweep.json.damaged; it is written anew")
    if was is None:
        return write(path, now)
    for name in [name for name in was | now if was.get(name, ...) != now.get(name, ...)]:
        old = f"{name}={shown(was[name])}" if name in was else f"no {name}"
        new = shown(now[name]) if name in now else "left out"
        raise ValueError(
            f"{home} holds a search with {old}, now it is {new}; type the same "
            "command again, or choose another folder"
        )


def shown(value) -> str:
    """As it is typed."""
    if isinstance(value, list):
        texts, span = [*map(str, value)], value[:1] in (["int"], ["lin"], ["log"])
        return (":" if span else ";" if "," in "".join(texts) else ",").join(texts)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def free(path: Path) -> Path:
    """This path, or the first of path-2, path-3, ... that is not taken."""
    found, count = path, 2
    while os.path.lexists(found):
        found, count = path.with_name(f"{path.name}-{count}"), count + 1
    return found


# ---- trials --------------------------------------------------------------------------------------
def find(home: Path, words: list[str], metric: str, method, say) -> dict[int, Trial]:
    """The trials by number. What is no trial of this search is named by say(sentence), and left
    alone or set aside. method: proposals.Proposals."""
    trials, places, strays = {}, {}, []
    for path in sorted(home.glob("trial-*"), key=lambda path: (path.is_symlink(), path)):
        match = NAME.fullmatch(path.name)
        trial = Trial(path, int(match[1]) if match else -1)
        none = method.grid and trial.number >= method.total
        if path.name != f"trial-{trial.number:04d}" or none:
            strays.append(path.name)
        elif not path.is_dir():
            aside(trial, "is no folder", say)
        elif (twin := places.setdefault(path.resolve(), path)) != path:
            aside(trial, f"is {twin.name} by another name", say)
        elif recognised(trial, method, say):
            trials[trial.number] = trial
            try:
                trial.settle(words)
            except ValueError:  # it is said where the trial is started
                pass
            if trial.status == "done" and trial.last(metric) is None:
                say(f"{path} is done and has no {metric} in its metrics.jsonl; it is tried again")
                trial.status = "unfinished"
    if strays:
        say(f"left alone in {home}, for this search has no such trial: {', '.join(strays)}")
    return dict(sorted(trials.items()))


def recognised(trial: Trial, method, say) -> bool:
    """Reads trial.json. Where it is lost, the run's own settings or its number tell the values."""
    whole, path = trial.read(), trial.folder / "trial.json"
    if whole and trial.values:
        fits = method.fits(trial.number, trial.values)
        if not fits:
            said = " ".join(flags(trial.values))
            aside(trial, f"has {said}, which this search does not give it", say)
        return fits
    if whole and not trial.has_run():  # killed before it began
        return True
    trial.status, trial.error = "unfinished", ""
    trial.values = method.read_back(trial.settings())
    if not method.fits(trial.number, trial.values):
        trial.values = {}
    what = f"{path} is {'missing' if whole else 'damaged'}"
    if not trial.values and method.study is not None and trial.has_run():
        aside(trial, f"has a run whose values nobody knows, for {what}", say)
        return False
    if not whole:
        os.replace(path, free(path.with_name("trial.json.damaged")))
    if not trial.values and method.study is None:
        method.begin(trial)
    say(f"{what}; the trial goes on with {' '.join(flags(trial.values)) or 'new values'}")
    return True


def aside(trial: Trial, why: str, say) -> None:
    """Makes room for a trial of this number. Raises ValueError where a process is at work there."""
    if not trial.folder.is_symlink() and (holder := trial.holder()):
        raise ValueError(f"{trial.folder} {why}, and {holder} is at work there; stop it first")
    new = free(trial.folder.with_name(f"aside-{trial.name}"))
    os.rename(trial.folder, new)
    say(f"{trial.folder} {why}; it is {new.name} now, and trial {trial.number} begins anew")
