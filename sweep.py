"""Search for good settings: grid, random or Optuna over fields of train.py, each trial a process.

    python sweep.py SWEEP_DIR --search.lr=1e-3,3e-3,1e-2 --search.optim=muon,adamw     a grid of 6
    python sweep.py SWEEP_DIR --method=random --jobs=2 --search.lr=log:1e-3:1e-1 recipe.toml
    python sweep.py SWEEP_DIR --method=optuna --trials=40 --search.n_layer=int:2:6 --steps=300

    --search.FIELD=     a,b,c            these values; "0.9,0.95;0.9,0.99" is split at ;
                        int:LOW:HIGH     whole numbers, both ends included
                        lin:LOW:HIGH     any number between (not for a grid)
                        log:LOW:HIGH     the same, each power of ten alike
    --method=grid       grid: every combination | random: drawn by (search_seed, trial's number)
                        | optuna: TPE, and a trial worse than the median at its step is stopped
    --trials=20         how many, not for a grid; a larger number later adds trials
    --jobs=1            at a time; they share the cores, and the GPUs listed in CUDA_VISIBLE_DEVICES
    --metric=val_loss   a trial's last value counts, or with --patience the value of the weights it
                        keeps; val_accuracy, tokens_per_s and mfu are maximised
    --launch=           instead of this Python: --launch="torchrun --standalone --nproc_per_node=2"
    --search_seed=0     for random and optuna; all other words go to train.py

    SWEEP_DIR/sweep.json      what is searched; another search needs another folder
    SWEEP_DIR/trial-0007/     a run: done, diverged, pruned, failed or unfinished (search/trials.py)
    SWEEP_DIR/trials.csv      and table.md, best first, and sweep.png

Folders are the only memory. The same command again skips trials that are over, waits for trials
that still run because the search alone was killed, resumes the unfinished ones, and tells Optuna of
all of them. To try a failed trial again, delete its folder. SIGTERM, Ctrl-C and a closed terminal
stop the trials too, each with a checkpoint. Medians compare equal steps. They mislead where a
searched field changes what a step is, such as batch_size: use random there.

Exit status: 0 a trial is done, or the search was told to stop; 1 none is done, or one was killed,
or something could not be written; 2 a mistake, and nothing has begun; 130 Ctrl-C twice.
"""

import difflib
import errno
import shlex
import shutil
import sys
import time
from pathlib import Path

from metrics.outlets import complain, reader_may_leave
from metrics.outlets import print_line as say
from metrics.report_read import MAXIMISED
from run import auto, build, control, optimizers
from run.options import resolve_options
from search import folder, proposals, results
from search.trials import OVER, Trial, flags
from settings import parse
from settings.fields import FIELDS, update

TRAIN = str(Path(__file__).resolve().parent / "train.py")
OPTIONS = dict(method="grid", trials="20", jobs="1", metric="val_loss", launch="", search_seed="0")
ALLOWED = dict(
    method=("grid", "random", "optuna"),
    metric=(
        "val_loss",
        "val_loss_ema",
        "val_bpb",
        "perplexity",
        "loss",
        "step_s",
        "peak_bytes",
        "val_accuracy",
        "tokens_per_s",
        "mfu",
    ),
)
# Errors after which no other trial could write either.
FULL = [getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EROFS")]


# ---- the command line ----------------------------------------------------------------------------
def read(argv: list[str]) -> tuple[dict, dict, list[str]]:
    """(own options, {field: choices}, the words for train.py). Raises ValueError on any mistake."""
    options, typed, words = sort_words(argv)
    words = parse.joined(words)
    check_own_options(options)
    if not typed:
        raise ValueError("nothing to search; type for instance --search.lr=1e-3,3e-3,1e-2")
    search = {name: proposals.choices(name, text) for name, text in typed.items()}
    for name in (*search, "out_dir"):
        if any(word.startswith(f"--{name}=") for word in words):
            raise ValueError(f"--{name} is set by the search; leave it out")
    if options["method"] == "grid":
        check_grid(argv, search)

    # Mistakes that a trial would meet show now: in the launcher, in fields, in their combinations.
    program(options["launch"])
    proposals.possible(search, lambda values: refuse(words + flags(values), options["metric"]))
    for name, text in typed.items():
        kept = search[name]
        if isinstance(kept, list) and len(kept) < len(proposals.listed(text)):
            say(f"--search.{name}={text} has a value twice; tried once: {', '.join(kept)}")
    return options, search, words


def sort_words(argv: list[str]) -> tuple[dict, dict, list[str]]:
    """(own options as typed, {field: text of --search.field=}, the words for train.py)."""
    options = dict(OPTIONS)
    typed = {}
    words = []
    # `--jobs 2` is `--jobs=2`. For train.py's own words parse.joined complains where none follows.
    for word in parse.with_equals(argv):
        name, _, text = word[2:].partition("=")
        is_ours = word.startswith("--") and (name in OPTIONS or name.split(".")[0] == "search")
        if not is_ours:
            # train.py's message about a misspelt --trials would not know the search's options.
            near = difflib.get_close_matches(name, {*OPTIONS} - {*FIELDS}, 1, 0.75)
            if word.startswith("--") and near and name not in FIELDS:
                raise ValueError(f"there is no field {name!r}; did you mean --{near[0]}?")
            words.append(word)
            continue
        field = name.removeprefix("search.")
        if name in ("search", "search."):
            raise ValueError(f"--{name} names no field; type for instance --search.lr=1e-3,1e-2")
        elif field in typed and name not in OPTIONS:
            raise ValueError(f"--{name} is there twice; type all its values in one: --{name}=A,B")
        elif name not in OPTIONS:
            typed[field] = text
        elif not text and name != "launch":
            raise ValueError(f"--{name} has no value; type --{name}={OPTIONS[name]}")
        else:
            options[name] = text
    return options, typed, words


def check_own_options(options: dict) -> None:
    """Turns trials, jobs and search_seed into numbers, in place. Raises ValueError for a value
    that is not allowed."""
    for name, least in (("trials", 1), ("jobs", 1), ("search_seed", 0)):
        text = options[name]
        if not text.isdecimal() or int(text) < least:
            raise ValueError(
                f"--{name}={text} is not allowed; it takes a whole number, {least} or more"
            )
        options[name] = int(text)
    for name, allowed in ALLOWED.items():
        if options[name] not in allowed:
            raise ValueError(
                f"--{name}={options[name]} is not allowed; it takes {', '.join(allowed)}"
            )


def check_grid(argv: list[str], search: dict) -> None:
    if any(word.startswith("--trials") for word in argv):
        raise ValueError("a grid runs every combination; leave --trials out")
    for name, choice in search.items():
        # A range of whole numbers can be tried one by one. lin and log have no such list.
        if isinstance(choice, tuple) and choice[0] != "int":
            raise ValueError(f"a grid needs values, --search.{name}=A,B,C; or type --method=random")


def program(launch: str) -> list[str]:
    """The words that start train.py. Raises ValueError where there is no such program."""
    try:
        words = shlex.split(launch) or [sys.executable]
    except ValueError as error:
        raise ValueError(f"--launch={launch} is no command line: {error}") from None
    if shutil.which(words[0]) is None:
        raise ValueError(f"--launch={launch}: there is no program {words[0]}")
    return [*words, TRAIN]


def refuse(words: list[str], metric: str) -> None:
    """Raises ValueError where train.py would not begin with these words."""
    cfg = parse.parse(words)
    if not cfg.eval_every and (metric.startswith("val_") or metric == "perplexity"):
        raise ValueError(
            f"--metric={metric} needs evaluations, eval_every={cfg.eval_every} makes "
            "none; type --eval_every=60, or --metric=loss"
        )
    if metric == "val_loss_ema" and cfg.ema is None:
        raise ValueError(f"--metric={metric} needs an average; type --ema=100 too (steps)")
    # What train.py checks only after it has read the data.
    optimizer_class = optimizers.chosen(cfg)
    options = resolve_options(cfg, optimizer_class)
    schedule = auto.resolve_schedule(cfg, optimizer_class)
    build.lr_schedule(update(cfg, schedule=schedule), options["schedule"])


# ---- the search ----------------------------------------------------------------------------------
class Search:
    """The trials of one search: which wait, which run, and what went wrong."""

    def __init__(self, home: Path, method, call: list[str], words: list[str], options: dict):
        self.home = home
        self.method = method
        self.call = call
        self.words = words
        self.metric = options["metric"]
        self.jobs = options["jobs"]
        self.trials = {}  # number -> Trial
        self.waiting = []  # numbers
        self.running = []  # Trials
        self.trouble = []

    def recover(self, trials: dict[int, Trial]) -> None:
        """Takes over what the folder holds: trials that are over, and those of a killed search."""
        self.trials = trials
        over = set()
        for number, trial in trials.items():
            if trial.status in OVER:
                over.add(number)
                self.method.begin(trial)
                self.method.end(trial, trial.result(self.metric, self.method.worst))
        self.waiting = [number for number in range(self.method.total) if number not in over]

        # Trials outlive a killed search. Wait for them: they lock their folders to others.
        for trial in [trials[n] for n in self.waiting if n in trials and trials[n].holder()]:
            self.waiting.remove(trial.number)
            self.running.append(trial)
            self.method.begin(trial)
            say(f"{trial.name}  still runs    {trial.holder()}, which is waited for")

    def over(self, trial: Trial) -> None:
        """The trial has ended: tells the method, the user, and the trial's folder."""
        value = trial.result(self.metric, self.method.worst)
        self.method.end(trial, value)
        scored = "" if value is None else f"{self.metric} {value:.4f}"
        shown = " ".join(flags(results.rounded(trial.values)))
        columns = [trial.name, f"{trial.status:10}", scored, shown, trial.error]
        say("  ".join(columns).rstrip())
        if trial.status == "unfinished" and not trial.stopped:
            self.trouble.append(trial)
        try:
            trial.save()
        except OSError as error:
            self.failed(f"{trial.folder}/trial.json cannot be written: {error.strerror}")

    def failed(self, text: str) -> None:
        self.trouble.append(text)
        say(text)

    def begin(self, trial: Trial) -> None:
        """Starts it, or says why not."""
        taken = {other.slot for other in self.running}
        trial.slot = min({*range(self.jobs)} - taken, default=0)
        try:
            self.method.begin(trial)
            trial.save()
            trial.parse(self.words)
            # It may have come to its end after an earlier search was killed: nobody has judged it.
            if trial.ended():
                trial.judge(self.metric, 0)
                self.over(trial)
            else:
                trial.start(self.call, self.jobs)
                self.running.append(trial)
        except ValueError as error:
            # train.py would refuse these values at every start, so it is not tried again.
            trial.status = "failed"
            trial.error = str(error)
            self.over(trial)
        except OSError as error:
            self.failed(f"{trial.folder} cannot be used: {error.strerror or error}")
            if error.errno in FULL:
                self.waiting.clear()

    def start_waiting(self, stop) -> None:
        """Starts trials in the free slots.

        The first trial prepares the corpus for all: until it has logged a row it runs alone.
        """
        is_ready = any((trial.folder / "metrics.jsonl").exists() for trial in self.trials.values())
        slots = self.jobs if is_ready else 1
        while self.waiting and not stop.requested and len(self.running) < slots:
            number = self.waiting.pop(0)
            trial = Trial(self.home / f"trial-{number:04d}", number)
            self.begin(self.trials.setdefault(number, trial))

    def check(self, stop) -> None:
        """Sees which of the running trials have ended, and stops those that shall end."""
        for trial in [*self.running]:
            if trial.process is None:
                # A killed search started it, so its exit status is unknown. begin() judges it by
                # what it logged.
                if not trial.holder():
                    self.running.remove(trial)
                    self.waiting.insert(0, trial.number)
            elif trial.process.poll() is not None:
                self.running.remove(trial)
                trial.judge(self.metric, trial.process.returncode)
                self.over(trial)
            elif not trial.stopped:
                if stop.requested:
                    trial.stop("by us")
                elif self.method.hopeless(trial, trial.steps):
                    trial.stop("by Optuna")

    def is_over(self, stop) -> bool:
        """Every trial is over; or a stop was requested, and all processes of ours have ended."""
        # A trial of a killed search is no process of ours: it keeps running when we stop.
        if any(trial.process for trial in self.running):
            return False
        return stop.requested or not (self.running or self.waiting)

    def run(self, stop) -> None:
        while not self.is_over(stop):
            self.start_waiting(stop)
            began = time.monotonic()
            self.check(stop)
            # A pause of ten times the look: reading what trials log takes a tenth of a core.
            time.sleep(max(0.1, 10 * (time.monotonic() - began)))
        for trial in self.running:
            say(f"{trial.name}  still runs    {trial.holder()}; the same command waits for it")


def main(argv: list[str]) -> int:
    """One search; its exit status. Raises ValueError for a mistake, OSError for a lost folder."""
    if {"--help", "-h"} & {*argv}:
        print(__doc__)
        return 0
    if not argv or not argv[0] or argv[0].startswith("-") or argv[0].endswith(".toml"):
        raise ValueError(
            "usage: python sweep.py SWEEP_DIR --search.FIELD=VALUES ... [--field=value ...]"
        )
    home = Path(argv[0]).expanduser()
    options, choices, words = read(argv[1:])
    choices = folder.in_order(home, choices)
    metric = options["metric"]
    maximise = metric in MAXIMISED
    method = proposals.Proposals(
        options["method"], choices, metric, maximise, options["search_seed"], options["trials"]
    )
    search = Search(home, method, [*program(options["launch"]), *words], words, options)
    lock = folder.lock(home)
    stop = control.StopSignal()
    try:
        folder.same_search(home, options, choices, words, say)
        search.recover(folder.find(home, words, metric, method, say))
        search.run(stop)
        trials = [*search.trials.values()]
        search.trouble += results.tell(home, trials, choices, metric, maximise, say)
    finally:
        # A second signal ends the search at once. Its trials end too, with a checkpoint.
        for trial in search.running:
            if trial.process is not None and not trial.stopped:
                trial.stop("by us")
        stop.close()
        lock.release()
    one_is_done = any(trial.status == "done" for trial in trials)
    if stop.requested or (one_is_done and not search.trouble):
        return 0
    return 1


if __name__ == "__main__":
    try:
        with reader_may_leave():
            sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        complain(f"sweep.py: {error}")
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        complain("sweep.py: stopped at once; the same command again resumes")
        sys.exit(130)
