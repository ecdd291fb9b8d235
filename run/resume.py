"""Which run lives in out_dir, where and with which settings a new command goes on.

resume=auto     out_dir's newest whole checkpoint; none: a fresh start
resume=never    a fresh start; what out_dir held moves to out_dir/earlier-N
resume=PATH     a branch from that run's newest checkpoint, or from that checkpoint, into an
                out_dir of its own; the same command again goes on with the branch
"""

import os
from collections.abc import Callable
from pathlib import Path

from checkpoint.load import Checkpoint, load, newest, resolve
from checkpoint.save import FOLDER
from data import corpora
from data.files import listed
from data.tokenizer import Tokenizer
from metrics.outlets import print_line
from run import optimizers
from settings import checks, parse
from settings.fields import CHOSEN, FIELDS, LAYOUTS, Config, flag, update


def find(out_dir: Path, resume: str, is_main: bool, agree: Callable[[int], int]):
    """(the checkpoint to go on from or None, whether it is out_dir's own). Changes nothing on disk.

    Rank 0 (is_main) reads every byte and decides; `agree` gives its numbers to all. Raises
    ValueError where out_dir has checkpoints but none is whole, where there is nothing at the path
    to resume from, and where a branch would overwrite another run.
    """
    branch, found, in_place = resume not in ("auto", "never"), None, True
    if is_main and resume != "never":
        found = newest(out_dir)
        if found is None and any(FOLDER.fullmatch(p.name) for p in out_dir.iterdir()):
            raise ValueError(
                f"no checkpoint in {out_dir} is whole; type --resume=never to start anew"
            )
        if branch and not (found and any(same_place(was, resume) for was in of_branch(found))):
            found, in_place = parent(out_dir, resume, found), False
    exists, in_place, step = (
        agree(found is not None),
        agree(in_place),
        agree(found.step if found else 0),
    )
    old = agree(found is not None and found.path.name.startswith(".old-"))
    itself = agree(found is not None and not in_place and found.path == Path(resume))  # by any name
    if exists and not is_main:
        inside = (out_dir if in_place else Path(resume)) / f"{'.old-' * old}step-{step:08d}"
        found = load(Path(resume) if itself else inside, verify=False)
    return found, bool(in_place)


def parent(out_dir: Path, resume: str, own: Checkpoint | None) -> Checkpoint:
    """What a new branch starts from. own: what out_dir has already. Raises ValueError."""
    place = Path(resume).resolve()
    if own is not None and Path(out_dir).resolve() in (place, place.parent):
        raise ValueError(
            f"{resume} is of the run in {out_dir} itself: --resume=auto goes on with its "
            "newest checkpoint, a branch needs an --out_dir of its own"
        )
    found = resolve(resume)  # whether it can be resumed at all comes first
    if own is not None:
        was = of_branch(own)
        where = f" (a branch: {flag('resume', was[-1])} goes on with it)" if was else ""
        raise ValueError(
            f"{out_dir} holds another run{where}; a branch needs an --out_dir of its own"
        )
    if not found.has("optim"):
        raise ValueError(f"{resume} holds weights alone; type {flag('init_from', resume)}")
    return found


def of_branch(saved: Checkpoint) -> list[str]:
    """Where the run of this checkpoint branched off: the path as it was typed, and from any
    folder."""
    typed, home = str(saved.tree("config/resume")), str(saved.tree("config/cwd", missing=""))
    return [] if typed in ("auto", "never") else [typed, os.path.join(home, typed)]


def same_place(a: str, b: str) -> bool:
    return Path(a).resolve() == Path(b).resolve()


def with_saved_settings(cfg: Config, resumed_from: Checkpoint | None, same_run: bool) -> Config:
    """cfg, with the earlier run's settings where it leaves them open. Raises ValueError."""
    if resumed_from is None:
        return cfg
    saved = resumed_from.tree("config")
    new = continued(cfg, saved, branch=cfg.resume != "auto")
    return update(new, resume=saved["resume"]) if same_run else new


def report_finished(cfg: Config, step: int, same_run: bool, is_main: bool) -> None:
    """Says that no step is left to do. Raises ValueError for a branch, which was to do some."""
    if not same_run:
        raise ValueError(f"a branch from step {step} needs more than --steps={cfg.steps}")
    if is_main:
        more = "type --steps= or --resume=never"
        print_line(f"the run in {cfg.out_dir} is finished at step {step}; {more}")


def check_same_data(
    cfg: Config, corpus: corpora.Corpus, mesh, resumed_from: Checkpoint | None, same_run: bool
) -> None:
    """Raises ValueError where machines have different texts, or the earlier run had another one."""
    if not mesh.alike(corpus.sha256):
        raise ValueError(
            f"--data={cfg.data} is not the same on every machine; copy it to all from one"
        )
    may_change = not same_run and "data" in cfg.given
    if resumed_from is None or may_change:
        return
    if resumed_from.tree("record/data_sha256") != corpus.sha256:
        raise ValueError(
            f"--data={cfg.data} has changed since {resumed_from.path} was written, or is another "
            "text; give the one of then, or choose another --out_dir"
        )


def continued(cfg: Config, saved: dict, branch: bool) -> Config:
    """cfg as the continuation of the run whose resolved settings are `saved`.

    What cfg leaves open (none or auto by default; in a branch everything not given) is taken from
    the saved run. Raises ValueError naming a field that differs and must not.
    """
    old, values, home = parse.from_dict(saved), {}, str(saved.get("cwd") or "")
    if not is_there(old.data) and is_there(there := seen_from(home, old.data)):
        if cfg.data == old.data:  # the run began in another folder
            cfg = update(cfg, data=there)
        old = update(old, data=there)
    for name in cfg.given & FIELDS.keys():
        if getattr(cfg, name) != getattr(old, name):
            possible(cfg, name)
    for name, f in FIELDS.items():
        new, was, change = getattr(cfg, name), getattr(old, name), f.metadata["change"]
        left_open = new == "auto" or (new is None and name in CHOSEN)
        allowed = change == "may_change" or (branch and change == "on_branch")
        if change == "per_run":
            continue
        if (branch and name not in cfg.given) or (
            left_open and not (allowed and name in cfg.given)
        ):
            values[name] = was
        elif new != was and not allowed and not may_be_the_same(name, was, new, home):
            raise ValueError(mismatch(cfg, name, was, new, branch))
    if branch and "lr" in cfg.given:  # the other kinds' lr were chosen with the old one
        values |= {n: None for n in ("embed_lr", "head_lr", "scalar_lr") if n not in cfg.given}
    if branch and "warmup_frac" in cfg.given and "warmup_steps" not in cfg.given:
        values["warmup_steps"] = None
    options = dict(cfg.options)
    if branch:  # another schedule or compression brings its own options, the others stay
        options = {
            k: v for k, v in old.options.items() if k.split(".")[0] not in cfg.given
        } | options
        if "data_parallel" in cfg.given:  # another layout, its own options too
            own = LAYOUTS.keys() - cfg.given - {"diloco_every"}
            values |= {name: FIELDS[name].default for name in own}
    # The same step in another kernel
    for name in sorted((old.options | options).keys() - {"opt.fused"}):
        if name.startswith(("opt.", "diloco.", "fp8.")) and options.get(name) != old.options.get(
            name
        ):
            raise ValueError(mismatch(cfg, name, old.options.get(name), options.get(name), branch))
    new = update(cfg, **values, options=options)
    new.earlier = old.given - {name for name, value in values.items() if value is None}
    return checks.check(new)


def possible(cfg: Config, name: str) -> None:
    """Raises ValueError for a value that no run could have: that comes before what this run has."""
    value = getattr(cfg, name)
    if name == "data" and not is_there(value):
        corpora.load(value, cfg.tokenizer, cfg.data_dir)  # says so
    elif name == "tokenizer":
        Tokenizer(value)
    elif name == "optim":
        optimizers.find_optimizer(value)
    elif name == "init_from" and value is not None:
        resolve(value)


def may_be_the_same(name: str, was, new, home: str) -> bool:
    """Another path to the same thing? Of data train.py compares the sha256."""
    if name == "data":
        return is_there(new) and not is_corpus(was) and not is_corpus(new)
    if name != "init_from" or None in (was, new):
        return False
    return same_place(was, new) or same_place(os.path.join(home, was), new)


def is_corpus(data: str) -> bool:
    return data.partition(":")[0] in corpora.CORPORA


def is_there(data: str) -> bool:
    """Is it a corpus, or are there files of that name, or of these names?"""
    try:
        return is_corpus(data) or bool(listed(data))
    except (ValueError, OSError):
        return False


def seen_from(folder: str, data: str) -> str:
    """--data= as it is to be written to mean the same elsewhere."""
    parts = [data] if os.path.exists(os.path.join(folder, data)) else data.split(",")
    return ",".join(os.path.join(folder, part.strip()) for part in parts)


def mismatch(cfg: Config, name: str, was, new, branch: bool) -> str:
    if was is None and "." in name:
        where, anew = (
            (cfg.resume, "") if branch else (cfg.out_dir, ", or --resume=never to start anew")
        )
        return f"{where} holds a run without --{name}; leave it out{anew}"
    go_on, now = flag(name, was), flag(name, new).partition("=")[2]
    if branch:
        leave = f"a branch cannot change it to {now}; leave --{name} out"
        return f"{cfg.resume} has {go_on[2:]} and {leave}"
    return (
        f"{cfg.out_dir} holds a run with {go_on[2:]}, now it is {now}: type {go_on} to go on, "
        "--resume=never to start anew, or choose another --out_dir"
    )
