"""Search for good settings: grid, random or Optuna over any fields of train.py, each trial a process.

    python sweep.py SWEEP_DIR --search.lr=1e-3,3e-3,1e-2 --search.optim=muon,adamw            a grid: 6 trials
    python sweep.py SWEEP_DIR --method=random --trials=20 --jobs=2 --search.lr=log:1e-3:1e-1 recipe.toml
    python sweep.py SWEEP_DIR --method=optuna --trials=40 --search.n_layer=int:2:6 --steps=300

    --search.FIELD=     a,b,c            these values; split at ; where there is one: "0.9,0.95;0.9,0.99"
                        int:LOW:HIGH     whole numbers, both ends included
                        lin:LOW:HIGH     any number between (not for a grid)
                        log:LOW:HIGH     the same, each power of ten alike
    --method=grid       grid: every combination | random: drawn by (search_seed, number of the trial)
                        | optuna: TPE, and a trial worse than the median at the same step is stopped
    --trials=20         how many, not for a grid; a larger number later goes on
    --jobs=1            at a time; they share the cores, and the GPUs listed in CUDA_VISIBLE_DEVICES, evenly
    --metric=val_loss   the last one a trial logs counts; val_accuracy, tokens_per_s and mfu are maximised
    --launch=           instead of this Python: --launch="torchrun --standalone --nproc_per_node=2"
    --search_seed=0     of random and optuna; all else goes to train.py

    SWEEP_DIR/sweep.json      what is searched; another search needs another folder
    SWEEP_DIR/trial-0007/     a run; trial.json: its values and, once it is over, its status; output.log
    SWEEP_DIR/trials.csv      and table.md, best first, and sweep.png

Folders are the only memory: the same command again skips trials that are over, goes on with killed ones, and
tells Optuna all of them anew. To try a failed trial again, delete its folder. Medians compare equal steps, so
they mislead where batch_size, or another field that changes what a step is, is searched: use random there.
"""

import difflib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import config
import logger
import proposals
import resume
import sweep_results
from settings import FIELDS

TRAIN = str(Path(__file__).resolve().parent / "train.py")
OPTIONS = dict(method="grid", trials="20", jobs="1", metric="val_loss", launch="", search_seed="0")
ALLOWED = dict(method=("grid", "random", "optuna"),
               metric=("val_loss", "val_bpb", "perplexity", "loss", "step_s", "peak_bytes",
                       "val_accuracy", "tokens_per_s", "mfu"))  # fmt: skip
MAXIMISED = ALLOWED["metric"][-3:]


# ---- what is asked for -----------------------------------------------------------------------------------
def read(argv: list[str]) -> tuple[dict, dict, list[str]]:
    """(own options, {field: choices}, the words for train.py). Raises ValueError on any mistake."""
    options, search, words = dict(OPTIONS), {}, []
    for word in argv:
        name, equals, text = word[2:].partition("=")
        if not word.startswith("--"):
            words.append(word)
        elif name in OPTIONS and equals:
            options[name] = text
        elif name.startswith("search.") and equals:
            search[name[7:]] = proposals.choices(name[7:], text)
        elif near := difflib.get_close_matches(name, {*OPTIONS} - {*FIELDS, name}, 1, 0.75):
            raise ValueError(f"there is no field {name!r}; did you mean --{near[0]}?")
        else:
            words.append(word)
    for name in ("trials", "jobs", "search_seed"):
        if not options[name].isdecimal() or int(options[name]) < (name != "search_seed"):
            raise ValueError(f"--{name}={options[name]} is not allowed; it takes a whole number")
        options[name] = int(options[name])
    for name, allowed in ALLOWED.items():
        if options[name] not in allowed:
            raise ValueError(f"--{name}={options[name]} is not allowed; it takes {', '.join(allowed)}")
    if not search:
        raise ValueError("nothing to search; type for instance --search.lr=1e-3,3e-3,1e-2")
    if twice := [n for n in [*search, "out_dir"] if any(word.startswith(f"--{n}=") for word in words)]:
        raise ValueError(f"--{twice[0]} is set by the search; leave it out")
    if options["method"] == "grid":
        if any(word.startswith("--trials=") for word in argv):
            raise ValueError("a grid runs every combination; leave --trials out")
        for name, choice in search.items():
            if isinstance(choice, tuple) and choice[0] != "int":
                raise ValueError(f"a grid needs values, --search.{name}=A,B,C; or type --method=random")
    try:
        config.parse(words)
    except ValueError:  # perhaps it needs a field that is searched
        some = {name: proposals.draw(choice, random.Random(0)) for name, choice in search.items()}
        config.parse(words + flags(some))
    return options, search, words


def flags(values: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def same_search(home: Path, options: dict, search: dict, words: list[str]) -> None:
    """Writes SWEEP_DIR/sweep.json; ValueError if it is there and says something else."""
    now = {name: text for name, text in options.items() if name not in ("trials", "jobs")}
    now |= {f"search.{name}": list(choice) for name, choice in search.items()}
    for word in words:  # later wins, as in train.py
        name, _, text = word[2:].partition("=")
        now |= {name: config.from_text(name, text)} if word[:2] == "--" else config.read_recipe(word)
    now, path = json.loads(json.dumps(now)), home / "sweep.json"
    if not path.exists():
        return write(path, now)
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in [n for n in before | now if before.get(n, ...) != now.get(n, ...)]:
        raise ValueError(f"{home} holds a search with {name}={before.get(name)}, now it is {now.get(name)}; "
                         "type the same command again, or choose another folder")


def write(path: Path, content) -> None:
    path.with_name(path.name + ".tmp").write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(path.with_name(path.name + ".tmp"), path)  # a kill leaves the old one whole


# ---- one trial -------------------------------------------------------------------------------------------
class Trial:
    """A folder, and while it runs a process. status: unfinished, and at last done, pruned or failed."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, int(folder.name.removeprefix("trial-"))
        self.values, self.status, self.error = {}, "unfinished", ""
        self.process, self.steps, self.slot, self.stopped = None, 0, 0, None
        if (folder / "trial.json").exists():
            vars(self).update(json.loads((folder / "trial.json").read_text(encoding="utf-8")))

    def save(self) -> None:
        self.folder.mkdir(exist_ok=True)
        write(self.folder / "trial.json", {name: vars(self)[name] for name in ("values", "status", "error")})

    def curve(self, metric: str) -> dict[int, float | None]:
        """{step: value}, as logged so far."""
        path = self.folder / "metrics.jsonl"
        rows = logger.read_metrics(path) if path.exists() else []
        return {row["step"]: row[metric] for row in rows if metric in row}

    def start(self, words: list[str], launch: str, jobs: int) -> bool:
        """False, and failed, where train.py would refuse these values."""
        words = words + flags(self.values) + [f"--out_dir={self.folder}"]
        try:
            self.steps = config.parse(words).steps
        except ValueError as error:
            self.status, self.error = "failed", str(error)
            return False
        env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} | os.environ
        gpus = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if len(gpus) >= jobs > 1:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[self.slot :: jobs])
        argv = [*(shlex.split(launch) or [sys.executable]), TRAIN, *words]
        with open(self.folder / "output.log", "a") as out:  # a session of its own: Ctrl-C is ours to pass on
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, env=env, start_new_session=True)
        return True

    def judge(self, metric: str) -> None:
        """What became of a process that ended. Killed by a signal, or asked by us, it is unfinished."""
        code, last = self.process.returncode, self.last(metric)
        if code == 0 and max(self.curve("loss"), default=0) >= self.steps:
            self.status = "failed" if last is None else "done"
            self.error = "" if last is not None else f"no {metric} was logged, or it was no finite number"
        elif self.stopped == "by Optuna":
            self.status = "pruned"
        elif code > 0 and not self.stopped:
            lines = (self.folder / "output.log").read_text(errors="replace").split("\n")
            lines = [line.strip() for line in lines if line.strip()] or [f"exit status {code}"]
            ends = [line for line in lines if re.match(r"(train\.py|[\w.]*(Error|Exception)): ", line)]
            self.status, self.error = "failed", (ends or lines)[-1]

    def last(self, metric: str) -> float | None:
        return [None, *self.curve(metric).values()][-1]


# ---- all of them -----------------------------------------------------------------------------------------
def main(argv: list[str]) -> int:
    """One search; the exit status: 0, or 1 where no trial came to a result. ValueError for a mistake."""
    if not argv or argv[0].startswith("-") or argv[0].endswith(".toml"):
        raise ValueError("usage: python sweep.py SWEEP_DIR --search.FIELD=VALUES ... [--field=value ...]")
    home, (options, search, words) = Path(argv[0]), read(argv[1:])
    metric, jobs = options["metric"], options["jobs"]
    method = proposals.Proposals(options["method"], search, metric, metric in MAXIMISED,
                                 options["search_seed"], options["trials"])  # fmt: skip
    lock, stop, running = resume.RunLock(home), resume.StopSignal(), []

    def over(trial: Trial) -> None:
        trial.save()
        method.end(trial)
        last, shown = trial.last(metric), flags(sweep_results.rounded(trial.values))
        said = [trial.folder.name, f"{trial.status:10}", "" if last is None else f"{metric} {last:.4f}"]
        print("  ".join([*said, " ".join(shown), trial.error]).rstrip(), flush=True)

    try:
        same_search(home, options, search, words)
        trials = {trial.number: trial for trial in map(Trial, sorted(home.glob("trial-*")))}
        for trial in [trial for trial in trials.values() if trial.status != "unfinished"]:
            method.begin(trial)
            method.end(trial)
        waiting = [n for n in range(method.total) if n not in trials or trials[n].status == "unfinished"]
        while running or (waiting and not stop.asked):
            # The first to train prepares the corpus for all: until it has logged a row it is alone.
            ready = any((trial.folder / "metrics.jsonl").exists() for trial in trials.values())
            while waiting and not stop.asked and len(running) < (jobs if ready else 1):
                number = waiting.pop(0)
                trial = trials.setdefault(number, Trial(home / f"trial-{number:04d}"))
                trial.slot = min({*range(jobs)} - {other.slot for other in running})
                method.begin(trial)
                trial.save()
                if trial.start(words, options["launch"], jobs):
                    running.append(trial)
                else:
                    over(trial)
            began = time.monotonic()
            for trial in [*running]:
                if trial.process.poll() is not None:
                    running.remove(trial)
                    trial.judge(metric)
                    over(trial)
                elif not trial.stopped and (stop.asked or method.hopeless(trial, trial.steps)):
                    trial.stopped = "by us" if stop.asked else "by Optuna"
                    trial.process.terminate()  # SIGTERM: train.py saves a checkpoint and goes
            time.sleep(max(0.1, 10 * (time.monotonic() - began)))  # reading takes a tenth of a core at most
    finally:
        for trial in running:
            trial.process.terminate()
        stop.close()
        lock.release()
    found = (home, [*trials.values()], [*search], metric, metric in MAXIMISED)
    results = sweep_results.table(*found)
    if results:
        sweep_results.picture(*found)
    print(home / "table.md")
    return 0 if results or stop.asked else 1


if __name__ == "__main__":
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        sys.exit(0)
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
