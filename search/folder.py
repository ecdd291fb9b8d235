"""What is in a search's folder, whoever has been there since the last start.

    SWEEP_DIR/sweep.json     what is searched, and all the trials have in common
    SWEEP_DIR/trial-0007/    search/trials.py
    SWEEP_DIR/.lock          held while a search runs here

A damaged file is moved to NAME.damaged. What is named like a trial of this search but is none is
moved to aside-NAME. A sentence says so, nothing is deleted, and the search continues.
"""

import contextlib
import json
import os
import re
from pathlib import Path

from run import control
from search.trials import Trial, flags, write
from settings import parse
from settings.fields import plain

NAME = re.compile(r"trial-([0-9]{4,})")


def lock(home: Path) -> control.RunLock:
    """Makes the folder and locks it until release().

    Raises ValueError where another search runs in it.
    """
    if os.path.lexists(home) and not home.is_dir():
        raise ValueError(f"{home} is no folder; take another SWEEP_DIR")
    try:
        return control.RunLock(home)
    except ValueError as error:
        # RunLock's message names --out_dir, which is not what the user of a search types.
        text = str(error).removeprefix("--out_dir=").replace("another out_dir", "another SWEEP_DIR")
        raise ValueError(text) from None


# ---- sweep.json ----------------------------------------------------------------------------------
def in_order(home: Path, search: dict) -> dict:
    """The fields in the first command's order, which decides what each trial tries."""
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
    # Later words win, as in train.py.
    for word in words:
        if word.startswith("--"):
            name, _, text = word[2:].partition("=")
            now[name] = parse.from_text(name, text)
        else:
            now |= parse.read_recipe(word)
    # `was` comes from JSON, which turns tuples into lists: send `now` through it too.
    now = json.loads(json.dumps(now))
    was = before(home)
    path = home / "sweep.json"
    if was is None and os.path.lexists(path):
        aside = free(path.with_name("sweep.json.damaged"))
        os.replace(path, aside)
        say(f"{path} is damaged and is moved to {aside.name}; it is written anew")
    if was is None:
        return write(path, now)
    for name in was | now:
        if was.get(name, ...) == now.get(name, ...):
            continue
        old = f"{name}={shown(was[name])}" if name in was else f"no {name}"
        new = shown(now[name]) if name in now else "left out"
        raise ValueError(
            f"{home} holds a search with {old}, now it is {new}; type the same "
            "command again, or choose another folder"
        )


def shown(value) -> str:
    """A value or choices as a user types them."""
    if not isinstance(value, list):
        return plain(value)
    texts = [str(part) for part in value]
    if value[:1] in (["int"], ["lin"], ["log"]):
        return ":".join(texts)
    # A value such as 0.9,0.95 has commas in it, so the user has put semicolons between values.
    return (";" if "," in "".join(texts) else ",").join(texts)


def free(path: Path) -> Path:
    """This path, or the first of path-2, path-3, ... that is not taken."""
    found = path
    count = 2
    while os.path.lexists(found):
        found = path.with_name(f"{path.name}-{count}")
        count += 1
    return found


# ---- trials --------------------------------------------------------------------------------------
def find(home: Path, words: list[str], metric: str, method, say) -> dict[int, Trial]:
    """The trials by number.

    say(sentence) names what is no trial of this search; it is left alone or set aside. method:
    proposals.Proposals.
    """
    trials = {}
    places = {}  # where a folder really is -> its path
    strays = []
    # Links come last, so that of two names for one folder the link is set aside.
    for path in sorted(home.glob("trial-*"), key=lambda path: (path.is_symlink(), path)):
        match = NAME.fullmatch(path.name)
        trial = Trial(path, int(match[1]) if match else -1)
        # Only a grid has a last number: more --trials add to the other searches.
        is_beyond = method.grid and trial.number >= method.total
        if path.name != f"trial-{trial.number:04d}" or is_beyond:
            strays.append(path.name)
            continue
        if not path.is_dir():
            aside(trial, "is no folder", say)
            continue
        twin = places.setdefault(path.resolve(), path)
        if twin != path:
            aside(trial, f"is {twin.name} by another name", say)
        elif recognised(trial, method, say):
            trials[trial.number] = trial
            # A mistake in its values is no error here: Search.begin (sweep.py) reports it.
            with contextlib.suppress(ValueError):
                trial.parse(words)
            if trial.status == "done" and trial.last(metric) is None:
                say(f"{path} is done and has no {metric} in its metrics.jsonl; it is tried again")
                trial.status = "unfinished"
    if strays:
        say(f"left alone in {home}, for this search has no such trial: {', '.join(strays)}")
    return dict(sorted(trials.items()))


def recognised(trial: Trial, method, say) -> bool:
    """Reads trial.json; is it a trial of this search?

    Where the file is lost, the run's own settings or its number tell the values.
    """
    is_whole = trial.read()
    path = trial.folder / "trial.json"
    if is_whole and trial.values:
        fits = method.fits(trial.number, trial.values)
        if not fits:
            values = " ".join(flags(trial.values))
            aside(trial, f"has {values}, which this search does not give it", say)
        return fits
    # No trial.json and no run: the search was killed before this trial began.
    if is_whole and not trial.has_run():
        return True

    # trial.json is lost, but the run's config.toml may still tell the values.
    trial.status = "unfinished"
    trial.error = ""
    trial.values = method.read_back(trial.settings())
    if not method.fits(trial.number, trial.values):
        trial.values = {}
    what = f"{path} is {'missing' if is_whole else 'damaged'}"
    if not trial.values and method.study is not None and trial.has_run():
        aside(trial, f"has a run whose values nobody knows, for {what}", say)
        return False
    if not is_whole:
        os.replace(path, free(path.with_name("trial.json.damaged")))
    # In a grid and random search the number decides the values. Optuna's draw depends on the
    # trials before, so a run of lost values was set aside above.
    if not trial.values and method.study is None:
        method.begin(trial)
    say(f"{what}; the trial continues with {' '.join(flags(trial.values)) or 'new values'}")
    return True


def aside(trial: Trial, why: str, say) -> None:
    """Makes room for a trial of this number. Raises ValueError where a process is at work there."""
    # Only the link itself is renamed: a process in the folder behind it is not disturbed.
    holder = "" if trial.folder.is_symlink() else trial.holder()
    if holder:
        raise ValueError(f"{trial.folder} {why}, and {holder} is at work there; stop it first")
    new = free(trial.folder.with_name(f"aside-{trial.name}"))
    os.rename(trial.folder, new)
    say(f"{trial.folder} {why}; it is {new.name} now, and trial {trial.number} begins anew")
