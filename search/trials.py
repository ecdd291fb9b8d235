"""One trial of a search: a folder, and while it runs a process.

    SWEEP_DIR/trial-0007/            a run of train.py, see there
    SWEEP_DIR/trial-0007/trial.json  its values, its status, its error
    SWEEP_DIR/trial-0007/output.log  what the process prints

    done         the run is over (all steps, or out of patience) and has logged the metric
    diverged     it is over and its loss is no finite number, or the guard has ended it: the worst
    pruned       Optuna had it stopped
    failed       it ended with an error of its own, which would come again
    unfinished   it was killed, or told to stop, or the disk was full: the next start goes on

Two locks say whether a process is at work in a folder, whoever started it: train.py's on .lock, and
ours on output.log, which the process inherits with its stdout. So both outlive a killed search.
"""

import json
import math
import os
import re
import signal
import subprocess
from pathlib import Path

from checkpoint.save import FOLDER
from metrics import logger
from settings import parse

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STATUSES = ("done", "pruned", "diverged", "unfinished", "failed")
OVER = ("done", "pruned", "diverged", "failed")
SAID = re.compile(r"(\[rank[0-9]+\]: *)?(train\.py|[\w.]*(Error|Exception)): ")
# Not the values' fault: another process, a full disk.
PASSING = re.compile(r"is in use by|No space left on device|Disk quota exceeded")
ASKED = {getattr(signal, name, None) for name in ("SIGHUP", "SIGINT", "SIGKILL", "SIGTERM")}


def flags(values: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def write(path: Path, content) -> None:
    """JSON, whole or not at all: a kill, a full disk or a power cut leaves the old one."""
    new = path.with_name(path.name + ".tmp")
    try:
        with open(new, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:  # which of itself does not always say where
        raise OSError(error.errno, error.strerror, str(path)) from None


def locked(path: Path) -> bool:
    """Does a process hold the lock of this file?"""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, AttributeError):  # no file, no locks here
        pass
    return False


class Trial:
    def __init__(self, folder: Path, number: int):
        self.folder, self.number, self.name = folder, number, folder.name
        self.values, self.status, self.error, self.slot = {}, "unfinished", "", 0
        self.steps, self.patience, self.min_delta = 0, None, 0.0
        self.process, self.stopped = None, None
        self.at = 0  # where in output.log this start begins

    # ---- the folder ------------------------------------------------------------------------------
    def read(self) -> bool:
        """trial.json; False where it is there and damaged."""
        try:
            found = json.loads((self.folder / "trial.json").read_text(encoding="utf-8"))
            self.values = dict(found.get("values", {}))
            self.error, self.slot = str(found.get("error", "")), int(found.get("slot", 0))
        except FileNotFoundError:
            return True
        except (ValueError, TypeError, AttributeError, IsADirectoryError, RecursionError):
            return False
        if found.get("status") in STATUSES:
            self.status = found["status"]
        return True

    def save(self) -> None:
        self.folder.mkdir(exist_ok=True)
        kept = ("values", "status", "error", "slot")
        write(self.folder / "trial.json", {name: vars(self)[name] for name in kept})

    def has_run(self) -> bool:
        return (self.folder / "metrics.jsonl").exists() or self.saved() > 0

    def saved(self) -> int:
        """The step of the newest checkpoint, 0 without one."""
        found = (FOLDER.fullmatch(path.name) for path in self.folder.iterdir())
        return max((int(name[2]) for name in found if name), default=0)

    def settings(self) -> dict:
        """The run's own, as it wrote them down; {} where it did not."""
        try:
            return parse.read_recipe(str(self.folder / "config.toml"))
        except ValueError:
            return {}

    def holder(self) -> str:
        """The process at work in this folder, in words; "" where there is none."""
        if not any(locked(self.folder / name) for name in ("output.log", ".lock")):
            return ""
        try:
            return (self.folder / ".lock").read_text(encoding="utf-8").strip() or "a process"
        except (OSError, ValueError):
            return "a process"

    # ---- what it logged --------------------------------------------------------------------------
    def rows(self) -> list[dict]:
        try:
            return logger.read_metrics(self.folder / "metrics.jsonl")
        except OSError:
            return []

    def curve(self, metric: str) -> dict[int, float | None]:
        """{step: value}, as logged so far; None is no finite number."""
        found = {row["step"]: row[metric] for row in self.rows() if metric in row}

        def finite(x) -> bool:
            return type(x) in (int, float) and abs(x) < math.inf

        return {step: x if finite(x) else None for step, x in found.items()}

    def kept(self) -> tuple[int | None, bool]:
        """(the step whose weights --patience keeps, has it run out?), as position.Best counts."""
        best, at, bad = math.inf, None, 0
        for step, loss in self.curve("val_loss").items() if self.patience is not None else ():
            better = loss is not None and loss < best - self.min_delta
            best, at, bad = (loss, step, 0) if better else (best, at, bad + 1)
        return at, self.patience is not None and bad >= self.patience

    def last(self, metric: str) -> float | None:
        """Of the weights that the run ends with: what was logged last, with --patience the best."""
        curve, (at, _) = self.curve(metric), self.kept()
        looked = metric.startswith("val_") or metric == "perplexity"
        return curve[at] if looked and at in curve else [None, *curve.values()][-1]

    def result(self, metric: str, worst: float) -> float | None:
        return worst if self.status == "diverged" else self.last(metric)

    def reached(self) -> int:
        """The last step that it logged."""
        return max(self.curve("loss"), default=0)

    # ---- the process -----------------------------------------------------------------------------
    def settle(self, words: list[str]) -> None:
        """What train.py makes of the words and values. Raises ValueError where it refuses them."""
        cfg = parse.parse(words + flags(self.values))
        self.steps, self.patience, self.min_delta = cfg.steps, cfg.patience, cfg.min_delta

    def start(self, argv: list[str], jobs: int) -> None:
        """argv: the program and what it is told beside the values. Raises OSError."""
        env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} | os.environ
        gpus = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if len(gpus) >= jobs > 1:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[self.slot :: jobs])
        argv = [*argv, *flags(self.values), f"--out_dir={self.folder}"]
        with open(self.folder / "output.log", "ab") as out:
            self.at, self.stopped, self.error = out.tell(), None, ""
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (OSError, AttributeError):  # a file system, or a system, without
                pass
            self.process = subprocess.Popen(  # a session of its own: Ctrl-C is ours to pass on
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=env,
                start_new_session=True,
            )

    def stop(self, why: str) -> None:
        self.stopped = why
        self.process.terminate()  # SIGTERM: train.py saves a checkpoint and goes

    def ended(self) -> bool:
        """Did it come to its end while no search looked on? Then its last checkpoint is there."""
        over = self.reached() >= self.steps or self.kept()[1]
        return bool(self.aborted()) or (over and self.saved() >= self.reached() > 0)

    def judge(self, metric: str, code: int) -> None:
        """What became of a run whose process ended with this exit status."""
        value, at, self.error = self.last(metric), max(self.reached(), self.saved()), ""
        over = code == 0 and (at >= self.steps or self.kept()[1])
        code = 128 - code if code - 128 in ASKED else code  # as shells tell of a signal
        if (over or self.stopped == "by Optuna") and self.lost():
            self.status, self.error = "diverged", "its loss is no finite number"
        elif over and value is None:
            self.status, self.error = "failed", f"no {metric} was logged"
        elif over or self.stopped == "by Optuna":
            self.status = "done" if over else "pruned"
        elif self.stopped:
            return
        elif self.aborted():
            self.status, self.error = "diverged", self.aborted()
        elif code == 0:
            self.error = f"it was told to stop at step {at}"
        else:
            self.error = self.complaint(code)
            gone = -code in ASKED or PASSING.search(self.error)
            self.status = "unfinished" if gone else "failed"

    def lost(self) -> bool:
        """Is the loss that counts no finite number?"""
        names = [name for name in ("val_loss", "loss") if self.curve(name)]
        return bool(names) and self.last(names[0]) is None

    def aborted(self) -> str:
        """Why the guard (monitor.py) has ended the run; "" where it has not."""
        events = [row for row in self.rows() if row.get("action") == "abort"]
        last = events[-1] if events else {}
        return one_line(f"step {last['step']}: {last.get('text')}") if last else ""

    def complaint(self, code: int) -> str:
        """The last error that this start's output has, or its last line."""
        if code < 0:
            known = -code in {*signal.Signals}
            name = signal.Signals(-code).name if known else f"signal {-code}"
            return f"ended by {name}" + ", perhaps for want of memory" * (name == "SIGKILL")
        try:
            with open(self.folder / "output.log", "rb") as file:
                file.seek(self.at)
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            lines = []
        lines = [line.strip() for line in lines if line.strip()]
        return one_line([f"exit status {code}", *lines, *filter(SAID.match, lines)][-1])


def one_line(text: str) -> str:
    return " ".join(text.split())[:300]
