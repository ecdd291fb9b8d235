"""One trial of a search: a folder, and while it runs a process.

    SWEEP_DIR/trial-0007/            a run of train.py, see there
    SWEEP_DIR/trial-0007/trial.json  its values, its status, its error
    SWEEP_DIR/trial-0007/output.log  what the process prints

    done         the run is over (all steps, or out of patience) and has logged the metric
    diverged     it is over and its loss is no finite number, or the spike monitor has ended it: the
                 worst result
    pruned       Optuna had it stopped
    failed       it ended with an error of its own, which would come again
    unfinished   it was killed, or told to stop, or the disk was full: the next start resumes it

Two locks say whether a process is at work in a folder, whoever started it: train.py's on .lock, and
ours on output.log. The process inherits ours with its stdout, so both outlive a killed search.
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

# From the best to the worst: tables and the choice of the best trial have this order.
STATUSES = ("done", "pruned", "diverged", "unfinished", "failed")
OVER = ("done", "pruned", "diverged", "failed")
# A line of output.log that names an error: train.py's own, or a traceback's last. In a distributed
# run torch puts [rankN]: before each line of a traceback.
ERROR_LINE = re.compile(r"(\[rank[0-9]+\]: *)?(train\.py|[\w.]*(Error|Exception)): ")
# Errors that are not the values' fault: another process, a full disk.
PASSING = re.compile(r"is in use by|No space left on device|Disk quota exceeded")
# A process that ends by one of these was told to stop, or killed. Windows lacks some of them.
STOPPING = {getattr(signal, name, None) for name in ("SIGHUP", "SIGINT", "SIGKILL", "SIGTERM")}


def flags(values: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def write(path: Path, content) -> None:
    """Writes JSON, all or nothing: a kill, a full disk or a power cut leaves the old file."""
    new = path.with_name(path.name + ".tmp")
    try:
        with open(new, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        # The error itself does not always name the file.
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
    """One trial: what its folder holds, what it logged, and its process."""

    def __init__(self, folder: Path, number: int):
        self.folder = folder
        self.number = number
        self.name = folder.name

        # What trial.json keeps for the next start.
        self.values = {}
        self.status = "unfinished"
        self.error = ""
        self.slot = 0  # which of the jobs that run at a time

        # What train.py makes of the words and values. parse() sets it; a value may be --steps.
        self.steps = 0
        self.patience = None
        self.min_delta = 0.0

        # The process of this start. None where an earlier search started it: holder() finds that.
        self.process = None
        self.stopped = None  # by whom, if it was told to stop
        self.log_start = 0  # where in output.log this start begins

    # ---- the folder ------------------------------------------------------------------------------
    def read(self) -> bool:
        """Reads trial.json. False where it is damaged; a missing one is no fault."""
        try:
            found = json.loads((self.folder / "trial.json").read_text(encoding="utf-8"))
            self.values = dict(found.get("values", {}))
            self.error = str(found.get("error", ""))
            self.slot = int(found.get("slot", 0))
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
        matches = [FOLDER.fullmatch(path.name) for path in self.folder.iterdir()]
        return max((int(match[2]) for match in matches if match), default=0)

    def settings(self) -> dict:
        """The settings that the run wrote down; {} where it wrote none."""
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
        """{step: value}, as logged so far; None where the value is no finite number."""
        curve = {}
        for row in self.rows():
            if metric in row:
                x = row[metric]
                is_finite = type(x) in (int, float) and abs(x) < math.inf
                curve[row["step"]] = x if is_finite else None
        return curve

    def kept(self) -> tuple[int | None, bool]:
        """(the step whose weights --patience keeps, has patience run out?).

        It counts as checkpoint/early_stopping.py does. (None, False) without --patience.
        """
        if self.patience is None:
            return None, False
        best = math.inf
        best_step = None
        n_bad = 0
        losses = self.curve("val_loss") | self.curve("val_loss_ema")  # as patience counts
        for step, loss in losses.items():
            if loss is not None and loss < best - self.min_delta:
                best = loss
                best_step = step
                n_bad = 0
            else:
                n_bad += 1
        return best_step, n_bad >= self.patience

    def last(self, metric: str) -> float | None:
        """The metric of the weights that the run ends with.

        This is the last logged value, or with --patience that of the best evaluation.
        """
        curve = self.curve(metric)
        best_step, _ = self.kept()
        is_evaluated = metric.startswith("val_") or metric == "perplexity"
        if metric in ("val_loss", "val_loss_ema") and best_step is not None:
            # Of the weights that are kept: with --ema= the average's, once it has begun.
            return (self.curve("val_loss") | self.curve("val_loss_ema")).get(best_step)
        if is_evaluated and best_step in curve:
            return curve[best_step]
        return [None, *curve.values()][-1]

    def result(self, metric: str, worst: float) -> float | None:
        return worst if self.status == "diverged" else self.last(metric)

    def reached(self) -> int:
        """The last step that it logged."""
        return max(self.curve("loss"), default=0)

    # ---- the process -----------------------------------------------------------------------------
    def parse(self, words: list[str]) -> None:
        """Learns what train.py makes of the words and values. Raises ValueError as it does."""
        cfg = parse.parse(words + flags(self.values))
        self.steps = cfg.steps
        self.patience = cfg.patience
        self.min_delta = cfg.min_delta

    def start(self, argv: list[str], jobs: int) -> None:
        """Starts the process. argv: the program and its words but the values. Raises OSError."""
        # Trials that run at once share the cores and GPUs. The user's own OMP_NUM_THREADS wins.
        env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} | os.environ
        gpus = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if len(gpus) >= jobs > 1:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[self.slot :: jobs])
        argv = [*argv, *flags(self.values), f"--out_dir={self.folder}"]
        with open(self.folder / "output.log", "ab") as out:
            self.log_start = out.tell()
            self.stopped = None
            self.error = ""
            # The process inherits this lock with its stdout, and holds it until it ends.
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (OSError, AttributeError):  # a file system, or a system, without locks
                pass
            # A session of its own: else Ctrl-C would reach it from the terminal and from us, and a
            # second signal ends train.py at once.
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=env,
                start_new_session=True,
            )

    def stop(self, why: str) -> None:
        self.stopped = why
        # This sends SIGTERM: train.py finishes its step, saves a checkpoint and ends.
        self.process.terminate()

    def ended(self) -> bool:
        """Did it come to its end while no search watched? Then its last checkpoint is there."""
        is_over = self.reached() >= self.steps or self.kept()[1]
        return bool(self.aborted()) or (is_over and self.saved() >= self.reached() > 0)

    def judge(self, metric: str, code: int) -> None:
        """Sets status and error of a run whose process has ended with this exit status."""
        self.error = ""
        step = max(self.reached(), self.saved())
        is_over = code == 0 and (step >= self.steps or self.kept()[1])
        counts = is_over or self.stopped == "by Optuna"
        if counts and self.has_lost_loss():
            self.status = "diverged"
            self.error = "its loss is no finite number"
        elif is_over and self.last(metric) is None:
            self.status = "failed"
            self.error = f"no {metric} was logged"
        elif counts:
            self.status = "done" if is_over else "pruned"
        # Told to stop by the search before its end: it stays unfinished.
        elif self.stopped:
            return
        elif self.aborted():
            self.status = "diverged"
            self.error = self.aborted()
        elif code == 0:
            self.error = f"it was told to stop at step {step}"
        else:
            self.judge_error(code)

    def judge_error(self, code: int) -> None:
        # A shell reports signal n as 128 + n, Python as -n.
        if code - 128 in STOPPING:
            code = 128 - code
        self.error = self.complaint(code)
        # What was killed, or had no room, may succeed the next time.
        may_pass = -code in STOPPING or PASSING.search(self.error)
        self.status = "unfinished" if may_pass else "failed"

    def has_lost_loss(self) -> bool:
        """Is the loss that counts no finite number? The validation loss counts, if there is one."""
        names = [name for name in ("val_loss", "loss") if self.curve(name)]
        return bool(names) and self.last(names[0]) is None

    def aborted(self) -> str:
        """Why the spike monitor (monitor.py) has ended the run; "" where it has not."""
        events = [row for row in self.rows() if row.get("action") == "abort"]
        if not events:
            return ""
        return one_line(f"step {events[-1]['step']}: {events[-1].get('text')}")

    def complaint(self, code: int) -> str:
        """The last error that this start's output has, or its last line."""
        if code < 0:
            is_known = -code in {*signal.Signals}
            name = signal.Signals(-code).name if is_known else f"signal {-code}"
            # Linux kills with this signal what takes too much memory.
            if name == "SIGKILL":
                return f"ended by {name}, perhaps for want of memory"
            return f"ended by {name}"
        try:
            with open(self.folder / "output.log", "rb") as file:
                file.seek(self.log_start)
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            lines = []
        lines = [line.strip() for line in lines if line.strip()]
        errors = list(filter(ERROR_LINE.match, lines))
        return one_line([f"exit status {code}", *lines, *errors][-1])


def one_line(text: str) -> str:
    return " ".join(text.split())[:300]
