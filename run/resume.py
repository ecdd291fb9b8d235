"""Where a new command resumes: which checkpoint, and with which settings.

resume=auto     out_dir's newest whole checkpoint; a fresh start where there is none
resume=never    a fresh start; what out_dir held moves to out_dir/earlier-N
resume=PATH     a branch from that run's newest checkpoint, or from that checkpoint, into an
                out_dir of its own; the same command again resumes the branch
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path

from checkpoint.load import Checkpoint, load, newest, resolve
from checkpoint.save import FOLDER
from data import corpora, tokenizer
from data.files import listed
from metrics.logger import read_metrics
from metrics.outlets import print_line
from run import optimizers, pretrained
from run.options import owner
from settings import checks, parse
from settings.fields import CHOSEN, FIELDS, LAYOUTS, Config, flag, update


# ---- which checkpoint ----------------------------------------------------------------------------
def find(
    out_dir: Path, resume: str, is_main: bool, agree: Callable[[int], int]
) -> tuple[Checkpoint | None, bool]:
    """(the checkpoint to resume from or None, whether it is out_dir's own). Changes no file.

    Rank 0 (is_main) reads every byte and decides; `agree` gives its numbers to all ranks. Raises
    ValueError where out_dir has checkpoints but none is whole, where there is nothing at the path
    to resume from, and where a branch would overwrite another run.
    """
    found = None
    same_run = True
    if is_main and resume != "never":
        found, same_run = find_on_main(out_dir, resume)

    # Numbers alone travel between the ranks. Each rank opens the folder that they describe.
    exists = agree(found is not None)
    same_run = bool(agree(same_run))
    step = agree(found.step if found else 0)
    is_old = agree(found is not None and found.path.name.startswith(".old-"))
    # --resume= may name the checkpoint itself, by any name that its folder has there.
    names_checkpoint = agree(found is not None and not same_run and found.path == Path(resume))
    if exists and not is_main:
        path = Path(resume)
        if not names_checkpoint:
            run_dir = out_dir if same_run else path
            prefix = ".old-" if is_old else ""
            path = run_dir / f"{prefix}step-{step:08d}"
        found = load(path, verify=False)
    return found, same_run


def find_on_main(out_dir: Path, resume: str) -> tuple[Checkpoint | None, bool]:
    """What `find` returns, for a resume that is not `never`; rank 0 alone calls it."""
    own = newest(out_dir)
    if own is None and any(FOLDER.fullmatch(path.name) for path in out_dir.iterdir()):
        raise ValueError(f"no checkpoint in {out_dir} is whole; type --resume=never to start anew")
    if resume == "auto":
        return own, True
    # The command that began a branch, typed again, resumes the branch.
    if own is not None and any(same_place(was, resume) for was in branched_from(own)):
        return own, True
    return start_of_branch(out_dir, resume, own), False


def start_of_branch(out_dir: Path, resume: str, own: Checkpoint | None) -> Checkpoint:
    """The checkpoint that a new branch starts from.

    own: the newest checkpoint in out_dir. Raises ValueError where out_dir holds a run, and where
    the path to resume from holds no state of an optimizer.
    """
    place = Path(resume).resolve()
    if own is not None and Path(out_dir).resolve() in (place, place.parent):
        raise ValueError(
            f"{resume} is of the run in {out_dir} itself: --resume=auto resumes its "
            "newest checkpoint, a branch needs an --out_dir of its own"
        )
    # Of several mistakes, a path with nothing to resume is told first.
    found = resolve(resume)
    if own is not None:
        was = branched_from(own)
        where = f" (a branch: {flag('resume', was[-1])} resumes it)" if was else ""
        raise ValueError(
            f"{out_dir} holds another run{where}; a branch needs an --out_dir of its own"
        )
    if not found.has("optim"):
        raise ValueError(f"{resume} holds weights alone; type {flag('init_from', resume)}")
    return found


def branched_from(saved: Checkpoint) -> list[str]:
    """The path that this checkpoint's run branched off from: as typed, and from the folder of then.

    Empty where the run is no branch.
    """
    typed = str(saved.tree("config/resume"))
    home = str(saved.tree("config/cwd", missing=""))
    if typed in ("auto", "never"):
        return []
    return [typed, os.path.join(home, typed)]


def same_place(a: str, b: str) -> bool:
    return Path(a).resolve() == Path(b).resolve()


def report_finished(cfg: Config, step: int, same_run: bool, is_main: bool) -> None:
    """Says that no step is left to do. Raises ValueError for a branch, which was to do some."""
    if not same_run:
        raise ValueError(f"a branch from step {step} needs more than --steps={cfg.steps}")
    if is_main:
        place = f"finished at step {step}"
        if step > cfg.steps:
            place = f"at step {step}, beyond --steps={cfg.steps}"
        more = f"for more type --steps={2 * step}, to start anew --resume=never"
        print_line(f"the run in {cfg.out_dir} is {place}; {more}")


def owes_evaluation(
    cfg: Config,
    resumed_from: Checkpoint | None,
    same_run: bool,
    is_main: bool,
    agree: Callable[[int], int],
) -> bool:
    """Did a stop cut off the evaluation of the state that this run resumes from?

    Rank 0 (is_main) looks into metrics.jsonl; `agree` gives its answer to all ranks.
    """
    if resumed_from is None or not same_run or not cfg.eval_every:
        return False
    step = resumed_from.step
    # The same rule as in the loop of train.py.
    was_due = step == cfg.steps or step % cfg.eval_every == 0
    metrics_file = Path(cfg.out_dir) / "metrics.jsonl"
    is_missing = False
    if is_main and was_due and metrics_file.exists():
        is_missing = True
        for row in read_metrics(metrics_file):
            # A rollback to before this step undoes its evaluation.
            if row.get("to", step) < step:
                is_missing = True
            elif row["step"] == step and "val_loss" in row:
                is_missing = False
    return bool(agree(is_missing))


def check_same_data(
    cfg: Config, corpus: corpora.Corpus, mesh, resumed_from: Checkpoint | None, same_run: bool
) -> None:
    """Raises ValueError where machines have different texts, or the earlier run had another one."""
    key = corpus.tokenizer.key if corpus.tokenizer.file else ""
    if not mesh.alike(f"{corpus.sha256} {key}"):
        raise ValueError(
            f"--data={cfg.data} or --tokenizer={cfg.tokenizer} is not the same on every machine; "
            "copy it to all from one"
        )
    if resumed_from is not None and key:
        if resumed_from.tree("record/tokenizer", missing="unknown") != key:
            own = tokenizer.kept(cfg.tokenizer, resumed_from.path)
            raise ValueError(
                f"--tokenizer={cfg.tokenizer} is not the one that {resumed_from.path} was trained "
                f"with; type {flag('tokenizer', own)}, or choose another --out_dir"
            )
    may_change = not same_run and "data" in cfg.given
    if resumed_from is None or may_change:
        return
    if resumed_from.tree("record/data_sha256") != corpus.sha256:
        raise ValueError(
            f"--data={cfg.data} has changed since {resumed_from.path} was written, or is another "
            "text; give the one of then, or choose another --out_dir"
        )


# ---- with which settings -------------------------------------------------------------------------
def with_saved_settings(cfg: Config, resumed_from: Checkpoint | None, same_run: bool) -> Config:
    """cfg, with the earlier run's settings where it leaves them open. Raises ValueError."""
    if resumed_from is None:
        return cfg
    saved = resumed_from.tree("config")
    saved["tokenizer"] = tokenizer.kept(saved["tokenizer"], resumed_from.path)
    new = continued(cfg, saved, branch=cfg.resume != "auto")
    if same_run:
        # A branch that is resumed with auto still knows where it branched off.
        new = update(new, resume=saved["resume"])
    return new


def continued(cfg: Config, saved: dict, branch: bool) -> Config:
    """cfg as the continuation of the run whose resolved settings are `saved`.

    What cfg leaves open (none or auto by default; in a branch everything not given) is taken from
    the saved run. Raises ValueError naming a field that differs and must not.
    """
    old = parse.from_dict(saved)
    home = str(saved.get("cwd") or "")
    cfg, old = with_found_data(cfg, old, home)

    # Of several mistakes, a value that no run can have is told first.
    for name in cfg.given & FIELDS.keys():
        if getattr(cfg, name) != getattr(old, name):
            check_possible(cfg, name, getattr(old, name))
    values = saved_values(cfg, old, home, branch)
    if branch:
        values |= values_chosen_anew(cfg)
    options = dict(cfg.options)
    if branch:
        # Another schedule or compression brings its own options; those of all others stay.
        kept = {k: v for k, v in old.options.items() if k.split(".")[0] not in cfg.given}
        options = kept | options
    new = update(cfg, **values, options=options)
    check_same_options(new, old.options, options, branch)
    # config.toml lists these fields under [chosen] then, no longer as given.
    chosen_anew = {name for name, value in values.items() if value is None}
    new.given_earlier = old.given - chosen_anew
    return checks.check(new)


def with_found_data(cfg: Config, old: Config, home: str) -> tuple[Config, Config]:
    """Both configs, with a path to the data that leads there from the present folder.

    home: the folder where the old run began.
    """
    there = seen_from(home, old.data)
    if is_there(old.data) or not is_there(there):
        return cfg, old
    if cfg.data == old.data:
        cfg = update(cfg, data=there)
    return cfg, update(old, data=there)


def saved_values(cfg: Config, old: Config, home: str, branch: bool) -> dict:
    """Field -> value, for the fields that the old run decides.

    Raises ValueError for a field that differs and must not.
    """
    values = {}
    # Kernels that were chosen, not typed. The rule for attention gives the same answer each time,
    # unless device or layout have changed; the one for compilation counts steps.
    chosen_here = {"attention"}
    if {"pp", "pp_schedule", "tp", "cp"} & cfg.given:
        chosen_here.add("compile")
    brought = (*pretrained.BROUGHT, *pretrained.OF_DOCUMENTS)
    for name, f in FIELDS.items():
        new = getattr(cfg, name)
        was = getattr(old, name)
        change = f.metadata["change"]
        if change == "per_run":
            continue
        is_given = name in cfg.given
        if name in chosen_here and name not in cfg.given | old.given:
            continue
        may_change = change == "may_change" or (branch and change == "on_branch")
        if is_given and may_change:
            continue  # `auto` and `none` that were typed are chosen anew
        is_open = new == "auto" or (new is None and name in CHOSEN)
        # The folder of --init_from= gave it; it may be gone, and is not asked again.
        is_open |= cfg.init_from is not None and name in brought and not is_given
        if is_open or (branch and not is_given):
            values[name] = was
        elif new != was and not may_change and not may_be_the_same(name, was, new, home):
            raise ValueError(mismatch(cfg, name, was, new, branch))
    return values


def values_chosen_anew(cfg: Config) -> dict:
    """Field -> default, for the fields of a branch that depend on what its command changes."""
    values = {}
    if "lr" in cfg.given:
        # The other kinds' lr were chosen with the old one.
        for name in {"embed_lr", "head_lr", "scalar_lr"} - cfg.given:
            values[name] = None
    if "warmup_frac" in cfg.given and "warmup_steps" not in cfg.given:
        values["warmup_steps"] = None
    if "data_parallel" in cfg.given:
        # Another layout has options of its own. DiLoCo is another algorithm, not a layout.
        for name in LAYOUTS.keys() - cfg.given - {"diloco_every"}:
            values[name] = FIELDS[name].default
    return values


def check_same_options(cfg: Config, old: dict, new: dict, branch: bool) -> None:
    """Raises ValueError for a dotted field of optimizer, hooks, outer step or FP8 that differs."""
    # opt.fused is the same step in another kernel.
    for name in sorted((old | new).keys() - {"opt.fused"}):
        if not name.startswith(("opt.", "hook.", "diloco.", "fp8.")):
            continue
        # What nobody typed has its default, which may be typed.
        was, now = (options.get(name, default_of(cfg, name)) for options in (old, new))
        if was != now:
            raise ValueError(mismatch(cfg, name, old.get(name), new.get(name), branch))


def default_of(cfg: Config, name: str):
    """What a dotted field is where nobody types it; None where it has no default."""
    namespace, _, argument = name.rpartition(".")
    if namespace.startswith("hook."):
        from run import hooks

        target = type(hooks.make(cfg, namespace.removeprefix("hook.")))
    else:
        target, _ = owner(cfg, namespace, optimizers.chosen(cfg))
    parameter = inspect.signature(target).parameters.get(argument)
    is_open = parameter is None or parameter.default is parameter.empty
    return None if is_open else parameter.default


def check_possible(cfg: Config, name: str, was) -> None:
    """Raises ValueError for a value that no run could have. was: the saved run's value."""
    value = getattr(cfg, name)
    if name == "data" and not is_there(value):
        corpora.load(value, cfg.tokenizer, cfg.data_dir)  # raises the fitting error
    elif name == "tokenizer":
        try:
            tokenizer.Tokenizer(value)
        except ValueError as error:
            own = f"; the run's own: {flag(name, was)}" if tokenizer.is_file(was) else ""
            raise ValueError(f"{error}{own}") from error
    elif name == "optim":
        optimizers.find_optimizer(value)
    elif name == "init_from" and value is not None:
        pretrained.weights(value)


def may_be_the_same(name: str, was, new, home: str) -> bool:
    """Is it perhaps another path to the same thing? check_same_data compares the contents."""
    if name == "tokenizer":
        return tokenizer.is_file(was) and tokenizer.is_file(new)
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
    """What to type for --data= here to mean the files that `data` meant in `folder`."""
    # A file's name may hold a comma itself.
    is_one_path = os.path.exists(os.path.join(folder, data))
    parts = [data] if is_one_path else data.split(",")
    return ",".join(os.path.join(folder, part.strip()) for part in parts)


def mismatch(cfg: Config, name: str, was, new, branch: bool) -> str:
    """What to tell a user whose command differs from the saved run in a field that must not."""
    if was is None and "." in name:
        if branch:
            return f"{cfg.resume} holds a run without --{name}; leave it out"
        return (
            f"{cfg.out_dir} holds a run without --{name}; leave it out, or --resume=never to "
            "start anew"
        )
    saved_flag = flag(name, was)
    saved = saved_flag.removeprefix("--")
    now = flag(name, new).partition("=")[2]
    if branch:
        return (
            f"{cfg.resume} has {saved} and a branch cannot change it to {now}; leave --{name} out"
        )
    return (
        f"{cfg.out_dir} holds a run with {saved}, now it is {now}: type {saved_flag} to resume "
        "it, --resume=never to start anew, or choose another --out_dir"
    )
