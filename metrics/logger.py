"""What a run tells: metrics.jsonl for programs, a bar or plain lines for people, loss.png for both.

    metrics.jsonl   one JSON object a line, flushed line by line, floats with all their digits
        train        {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu", ...}
        evaluation   {"step", "val_loss", "val_bpb", "val_accuracy", "perplexity", and with --ema=
                     "val_loss_ema"}
        event        {"step", "event": "resume", "save", "spike", "rollback", "divergence", ...}
    train.log       the plain lines, whatever the terminal shows

Where a line cannot be written, the run reports it once and continues (metrics/outlets.py): a log is
not worth a run. `step` counts completed updates. JSON knows no NaN and no infinity: such a number
is written as null, and an event "nonfinite" names field and value. A resumed run continues its
file, cut back to the loaded step.

tensorboard=True and wandb=PROJECT also send every number to TensorBoard (RUN/tensorboard) and to
Weights & Biases (RUN/wandb; WANDB_MODE=offline needs no account). A resumed run continues its
curves there.
"""

import functools
import importlib.metadata
import json
import math
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta

from metrics.labels import loss_text
from metrics.outlets import LineFile, print_line, to_nowhere

# What people see of a row of metrics, in this order.
SHOWN = {
    "loss": lambda x: f"loss {loss_text(x)}",
    "lr": "lr {:.1e}".format,
    "grad_norm": lambda x: f"grad {x:.2f}" if x >= 0.1 else f"grad {x:.1e}",
    "tokens_per_s": lambda x: f"{short(x)} tok/s",
    "mfu": lambda x: f"{100 * x:.3g}% mfu",
    "val_loss": lambda x: f"val loss {loss_text(x)}",
    "val_loss_ema": lambda x: f"of the average {loss_text(x)}",
    "val_bpb": "bpb {:.4f}".format,
    "val_accuracy": "accuracy {:.1%}".format,
    "perplexity": lambda x: f"perplexity {x:.2f}" if x < 1e6 else f"perplexity {x:.1e}",
}


def short(n: float) -> str:
    """950 -> 950, 131072 -> 131k, 2.5e9 -> 2.5B, 1e18 -> 1e+18"""
    if n >= 1e15:
        return f"{n:.3g}"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")):
        if n >= size:
            break
    return f"{n / size:.0f}{letter}" if n >= 100 * size else f"{n / size:.3g}{letter}"


# ---- metrics.jsonl -------------------------------------------------------------------------------
def to_json(value):
    """Tensors and numpy scalars become Python numbers; what JSON cannot express becomes None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_metrics(path) -> list[dict]:
    """The rows of a metrics.jsonl, without lines that are no JSON object of a step.

    A kill may leave half a line. A step below 0 or from 2**53 is damage, and no place on an axis.
    """
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            step = row.get("step") if isinstance(row, dict) else None
            if type(step) is int and 0 <= step < 2**53:
                rows.append(row)
    return rows


def latest(out_dir) -> dict:
    """The last metrics of a run: what train.main returned; {} where its metrics.jsonl is gone."""
    path = os.path.join(out_dir, "metrics.jsonl")
    if not os.path.exists(path):
        return {}
    found = {}
    for row in read_metrics(path):
        if "val_loss" in row:
            found |= row
        elif "loss" in row:
            found |= {"step": row["step"], "loss": row["loss"]}
    return found


def cut_back(path: str, first_step: int) -> None:
    """Removes from a metrics.jsonl the rows of later steps than first_step."""
    kept = []
    for row in read_metrics(path):
        # A rollback from a later step to an earlier one stays: the samples it skipped are skipped
        # for good.
        back_at = row.get("to", math.inf)
        if row["step"] <= first_step or back_at <= first_step:
            kept.append(row)
    # A kill here leaves the old file whole.
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(to_json(row)) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


# ---- TensorBoard, Weights & Biases ---------------------------------------------------------------
def need(name: str, flag: str):
    """The module, or ValueError with what to type: these two packages are optional."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"--{flag} needs a package: pip install {flag.split('=')[0]}") from None


def to_tensorboard(out_dir, first_step: int) -> tuple[Callable, Callable, Callable]:
    """(write(row), close(), rewind(step)) for RUN/tensorboard.

    Points from first_step on, which earlier attempts left there, are hidden. rewind(step), after a
    rollback, hides those from its step on.
    """
    writer_class = need("torch.utils.tensorboard", "tensorboard").SummaryWriter
    start = functools.partial(writer_class, os.path.join(out_dir, "tensorboard"), flush_secs=10)
    writer = start(purge_step=first_step)

    def write(row: dict) -> None:
        for key, value in row.items():
            if key != "step":
                writer.add_scalar(key, value, row["step"])

    def rewind(step: int) -> None:
        # TensorBoard hides points only when a new writer says so.
        nonlocal writer
        writer.close()
        writer = start(purge_step=step)

    return write, lambda: writer.close(), rewind


def to_wandb(
    out_dir, project: str, settings: dict, resumed: bool
) -> tuple[Callable, Callable, Callable]:
    """(write(row), close(), rewind(step)) for a run of Weights & Biases.

    Its id is in RUN/wandb/id.txt. `step` is sent as a number beside the others: a step that is
    repeated after a kill is drawn over itself, not refused.
    """
    wandb = need("wandb", "wandb")
    path = os.path.join(out_dir, "wandb", "id.txt")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # A resumed run has the id of its first attempt, and so the same curves.
    if resumed and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            name = file.read()
    else:
        name = secrets.token_hex(4)
        with open(path, "w", encoding="utf-8") as file:
            file.write(name)
    try:
        run = wandb.init(
            project="nanoscale" if project == "true" else project,
            id=name,
            resume="allow",
            name=os.path.basename(os.path.abspath(out_dir)),
            dir=out_dir,
            config=settings,
        )
    except wandb.errors.Error as error:  # for instance no account
        raise ValueError(
            f"Weights & Biases: {error}; or set WANDB_MODE=offline".replace("\n", " ")
        ) from None
    # Curves are drawn over our step, not over the number of rows sent.
    run.define_metric("*", step_metric="step")
    # Offline, W&B counts rows from 0 again, and once synced they would fall on the earlier ones. So
    # the first row gets a number that is surely higher: no run logs rows faster than one a
    # millisecond.
    first_row = None
    if resumed and getattr(run, "offline", False):
        first_row = int(1000 * (time.time() - os.path.getmtime(path)))

    def write(row: dict) -> None:
        nonlocal first_row
        if first_row is None:
            run.log(row)
        else:
            number = first_row
            first_row = None
            run.log(row, step=number)

    return write, run.finish, lambda step: None


# ---- the logger ----------------------------------------------------------------------------------
class Logger:
    """One per process; with main=False (the other ranks) every method does nothing.

    steps: how many the run has; first_step: the loaded step. resumed=False starts a metrics.jsonl,
    and raises ValueError where out_dir has one. resumed=True keeps its rows up to first_step, and
    adds an event "resume"; without a file it starts one. tensorboard=True, wandb=PROJECT: see
    above; ValueError without the package. settings: what W&B shows.
    """

    def __init__(
        self,
        out_dir,
        steps: int,
        first_step: int = 0,
        main: bool = True,
        resumed: bool = False,
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: dict | None = None,
    ):
        self.main = main
        self.steps = steps
        self.bar = None
        if not main:
            return
        os.makedirs(out_dir, exist_ok=True)
        path = os.path.join(out_dir, "metrics.jsonl")
        if os.path.exists(path):
            if not resumed:
                raise ValueError(
                    f"{path} belongs to another run: resume it or choose another --out_dir"
                )
            cut_back(path, first_step)
        self.others = []  # (write, close, rewind) of each
        if tensorboard:
            self.others.append(to_tensorboard(out_dir, first_step + 1 if resumed else 0))
        if wandb is not None:
            self.others.append(to_wandb(out_dir, wandb, settings or {}, resumed))
        self.terminal_is_read = True
        self.metrics = LineFile(path, self.log)
        self.log_file = LineFile(os.path.join(out_dir, "train.log"), self._print)
        # (step, time at its end) for the ETA: the first, slow step is outside.
        self.recent = deque(maxlen=50)
        self.n_rows = 0
        self.printed_at = 0.0
        self.last_val = ""
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=steps,
                initial=first_step,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )
        if resumed:
            self.event(first_step, "resume")

    def train(self, row: dict) -> None:
        """Writes a train row and moves the bar, or prints a line.

        A line is printed for the first three and the last row, and whenever 2 s have passed.
        """
        if not self.main:
            return
        parts = self._record(row)
        step = int(row["step"])
        now = time.monotonic()
        eta = self._eta(step, now)
        if eta is not None:
            parts.append(eta)
        if self.bar is not None:
            shown = [part for part in parts if part and not part.startswith("grad")]
            if self.last_val:
                shown.append(self.last_val)
            self._bar(lambda bar: move(bar, step, "  ".join(shown)))
        # The first lines show that all is well; nobody reads a line for each fast step.
        self.n_rows += 1
        if self.n_rows <= 3 or step >= self.steps or now - self.printed_at >= 2:
            self.printed_at = now
            self._line(step, parts, terminal=self.bar is None)

    def _eta(self, step: int, now: float) -> str | None:
        """How long the run will still take, by the last 50 rows; None at the first row."""
        # A rollback goes back to an earlier step: a rate across it would be wrong.
        if self.recent and step <= self.recent[-1][0]:
            self.recent.clear()
        self.recent.append((step, now))
        if len(self.recent) == 1:
            return None
        first_step, first_time = self.recent[0]
        seconds_per_step = (now - first_time) / (step - first_step)
        eta = timedelta(seconds=round(seconds_per_step * max(self.steps - step, 0)))
        return f"eta {str(eta).removeprefix('0:')}"

    def evaluation(self, row: dict) -> None:
        """Writes an evaluation row and prints it."""
        if self.main:
            parts = self._record(row)
            self.last_val = parts[0] if parts else ""
            self._line(int(row["step"]), parts)

    def event(self, step: int, event: str, text: str = "", **fields) -> None:
        """Writes {"step", "event", "text" unless empty, **fields} and prints it."""
        if not self.main:
            return
        row = {"step": step, "event": event}
        if text:
            row["text"] = text
        self._write(row | fields)
        # People get the sentence; where there is none, the fields.
        parts = [text] if text else [f"{key} {x}" for key, x in fields.items()]
        self._line(step, [event, *parts])
        # The curves forget the steps that a rollback has undone.
        if event == "rollback":
            for _, _, rewind in self.others:
                self._send(rewind, fields["to"] + 1)

    def events(self, rows: list[dict]) -> None:
        """Writes and prints each one, as `event` does."""
        for row in rows:
            self.event(**row)

    def log(self, text: str, terminal: bool = True) -> None:
        """A line for people: into train.log, and to the terminal, above the bar if there is one."""
        if not self.main:
            return
        self.log_file.write(text)
        if terminal:
            self._print(text)

    def close(self) -> None:
        """The end of the run; the bar stays on the screen."""
        if not self.main:
            return
        self._bar(lambda bar: bar.close())
        # Over a copy, for `_send` takes out of self.others what fails.
        for _, close, _ in [*self.others]:
            self._send(close)
        self.metrics.close()
        self.log_file.close()

    def _write(self, row: dict) -> None:
        self.metrics.write(json.dumps(to_json(row), allow_nan=False, default=str))

    def _print(self, text: str) -> None:
        """Prints above the bar, until nobody reads the terminal any more."""
        if self.terminal_is_read:
            self._bar(lambda bar: bar.clear())
            if not print_line(text):
                self.terminal_is_read = False
                self.log_file.write("nobody reads the terminal any more: training continues")
        self._bar(lambda bar: bar.refresh())

    def _bar(self, draw: Callable) -> None:
        """draw(the bar), as long as there is one and it can be drawn."""
        if self.bar is None:
            return
        try:
            draw(self.bar)
        except (OSError, ValueError):
            # tqdm would complain once more at the end of the process.
            self.bar.disable = True
            self.bar = None
            to_nowhere(sys.stderr)
            self.log_file.write("the progress bar cannot be drawn any more: training continues")

    def _send(self, work: Callable, *args) -> None:
        """work(*args) of TensorBoard or W&B; where that fails they get nothing more."""
        try:
            work(*args)
        except Exception as error:
            # A full disk, a thread of theirs that died: it is never worth the run.
            self.others = [functions for functions in self.others if work not in functions]
            self.log(f"{work.__module__} fails and is left out from now on: {error}")

    def _record(self, row: dict) -> list[str]:
        """Writes a row, and an event for each number in it that is not finite.

        Returns what people see of it, a word or two for each number.
        """
        self._write(row)
        # The curves take only numbers that they can draw.
        numbers = {key: value for key, value in to_json(row).items() if value is not None}
        for write, _, _ in [*self.others]:
            self._send(write, numbers)
        for key, x in row.items():
            if x is not None and key not in numbers:
                text = str(float(x))
                self._write(
                    {"step": row["step"], "event": "nonfinite", "field": key, "value": text}
                )
        return [show(float(row[key])) for key, show in SHOWN.items() if row.get(key) is not None]

    def _line(self, step: int, parts: list[str], terminal: bool = True) -> None:
        width = len(str(self.steps))
        self.log("  ".join([f"step {step:{width}}/{self.steps}", *parts]), terminal)


def move(bar, step: int, text: str) -> None:
    bar.set_postfix_str(text, refresh=False)
    bar.update(step - bar.n)
