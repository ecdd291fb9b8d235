"""What a run tells: metrics.jsonl for programs, a bar or plain lines for people, loss.png for both.

    metrics.jsonl   one JSON object a line, flushed line by line, floats with all their digits
        train        {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu", ...}
        evaluation   {"step", "val_loss", "val_bpb", "val_accuracy", "perplexity"}
        event        {"step", "event": "resume", "save", "spike", "skip", "rollback", ...}
    train.log       the plain lines, whatever the terminal shows

What cannot be written is said once and dropped (metrics/outlets.py): a log is not worth a run.
`step` counts completed updates. JSON knows no NaN and no infinity: such a number is written as
null, and an event "nonfinite" names field and value. A resumed run continues its file, cut back to
the loaded step.

tensorboard=True and wandb=PROJECT also send every number to TensorBoard (RUN/tensorboard) and to
Weights & Biases (RUN/wandb; WANDB_MODE=offline needs no account). A resumed run goes on with the
same curves there.
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
from datetime import timedelta

from metrics.outlets import Lines, print_line, to_nowhere

SHOWN = {  # what people see of a row, in this order
    "loss": "loss {:.4f}".format,
    "lr": "lr {:.1e}".format,
    "grad_norm": lambda x: f"grad {x:.2f}" if x >= 0.1 else f"grad {x:.1e}",
    "tokens_per_s": lambda x: f"{short(x)} tok/s",
    "mfu": lambda x: f"{100 * x:.3g}% mfu",
    "val_loss": "val loss {:.4f}".format,
    "val_bpb": "bpb {:.4f}".format,
    "val_accuracy": "accuracy {:.1%}".format,
    "perplexity": "perplexity {:.2f}".format,
}


def short(n: float) -> str:
    """950 -> 950, 131072 -> 131k, 2.5e9 -> 2.5B"""
    size, letter = next(
        (pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if n >= pair[0]), (1, "")
    )
    return f"{n / size:.0f}{letter}" if n >= 100 * size else f"{n / size:.3g}{letter}"


def to_json(value):
    """Tensors and numpy scalars become Python numbers; what JSON does not know becomes None."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path) -> list[dict]:
    """The rows of a metrics.jsonl, without lines that are no JSON object: a kill may leave half a
    line."""
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                rows.append(json.loads(line))
            except ValueError:
                pass
    return [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int]


def latest(out_dir) -> dict:
    """The last metrics of a run: what train.main returned; {} where its metrics.jsonl is gone."""
    found, path = {}, os.path.join(out_dir, "metrics.jsonl")
    for row in read_metrics(path) if os.path.exists(path) else []:
        if "val_loss" in row:
            found |= row
        elif "loss" in row:
            found |= {"step": row["step"], "loss": row["loss"]}
    return found


def need(name: str, flag: str):
    """The module, or ValueError with what to type: these two packages are optional."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"--{flag} needs a package: pip install {flag.split('=')[0]}") from None


def to_tensorboard(out_dir, first_step: int):
    """(write(row), close(), rewind(step)) for RUN/tensorboard, where points from first_step on, of
    earlier attempts, go; after a rollback those from its step on."""
    new = need("torch.utils.tensorboard", "tensorboard").SummaryWriter
    start = functools.partial(new, os.path.join(out_dir, "tensorboard"), flush_secs=10)
    writer = start(purge_step=first_step)

    def write(row: dict) -> None:
        for key, value in row.items():
            if key != "step":
                writer.add_scalar(key, value, row["step"])

    def rewind(step: int) -> None:
        nonlocal writer
        writer.close()
        writer = start(purge_step=step)

    return write, lambda: writer.close(), rewind


def to_wandb(out_dir, project: str, settings: dict, resumed: bool):
    """(write(row), close(), rewind(step)) for a run of Weights & Biases, whose id is in
    RUN/wandb/id.txt. `step` is sent as a number beside the others: a step done again after a kill
    is drawn over itself, not refused."""
    wandb, path = need("wandb", "wandb"), os.path.join(out_dir, "wandb", "id.txt")
    os.makedirs(os.path.dirname(path), exist_ok=True)
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
    run.define_metric("*", step_metric="step")
    # Offline it counts rows from 0 again, and once synced they would fall on those of before
    later = []
    if resumed and getattr(run, "offline", False):
        # No run logs a row in a millisecond
        later.append(int(1000 * (time.time() - os.path.getmtime(path))))

    def write(row: dict) -> None:
        run.log(row, **({"step": later.pop()} if later else {}))

    return write, run.finish, lambda step: None


class Logger:
    """One per process; with main=False (the other ranks) every method does nothing.

    resumed=False starts a metrics.jsonl, and raises ValueError where out_dir has one. resumed=True
    keeps its rows up to first_step, the loaded step, and adds an event "resume"; without a file it
    starts one. tensorboard=True, wandb=PROJECT: see above; ValueError without the package. W&B
    shows settings.
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
        self.main, self.steps, self.bar = main, steps, None
        if not main:
            return
        os.makedirs(out_dir, exist_ok=True)
        path = os.path.join(out_dir, "metrics.jsonl")
        if os.path.exists(path):
            if not resumed:
                raise ValueError(
                    f"{path} belongs to another run: resume it or choose another --out_dir"
                )
            # What a rollback banned stays banned, and on record
            kept = [
                row
                for row in read_metrics(path)
                if row["step"] <= first_step or row.get("to", math.inf) <= first_step
            ]
            # A kill here leaves the old file whole
            with open(path + ".tmp", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(to_json(row)) + "\n" for row in kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".tmp", path)
        self.others = (
            [to_tensorboard(out_dir, first_step + 1 if resumed else 0)] if tensorboard else []
        )
        if wandb is not None:
            self.others.append(to_wandb(out_dir, wandb, settings or {}, resumed))
        self.heard = True  # does anybody read the terminal?
        self.metrics = Lines(path, self.say)
        self.log = Lines(os.path.join(out_dir, "train.log"), self._print)
        # (step, time at its end) for the ETA: the first, slow step is outside
        self.recent = deque(maxlen=50)
        self.n_rows, self.printed_at, self.last_val = 0, 0.0, ""
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
        """Write a train row and move the bar, or print a line: for the first three and the last
        row, and whenever 2 s have passed."""
        if not self.main:
            return
        parts = self._record(row)
        step, now = int(row["step"]), time.monotonic()
        if self.recent and step <= self.recent[-1][0]:  # rolled back
            self.recent.clear()
        self.recent.append((step, now))
        if len(self.recent) > 1:
            seconds_per_step = (now - self.recent[0][1]) / (step - self.recent[0][0])
            eta = timedelta(seconds=round(seconds_per_step * max(self.steps - step, 0)))
            parts.append(f"eta {str(eta).removeprefix('0:')}")
        if self.bar is not None:
            shown = [part for part in parts if not part.startswith("grad")] + [self.last_val]
            self._bar(
                lambda bar: (
                    bar.set_postfix_str("  ".join(filter(None, shown)), refresh=False),
                    bar.update(step - bar.n),
                )
            )
        self.n_rows += 1
        if self.n_rows <= 3 or step >= self.steps or now - self.printed_at >= 2:
            self.printed_at = now
            self._line(step, parts, terminal=self.bar is None)

    def evaluation(self, row: dict) -> None:
        """Write an evaluation row and print it."""
        if self.main:
            parts = self._record(row)
            self.last_val = parts[0] if parts else ""
            self._line(int(row["step"]), parts)

    def event(self, step: int, event: str, text: str = "", **fields) -> None:
        """Write {"step", "event", "text" unless empty, **fields} and print it."""
        if self.main:
            self._write({"step": step, "event": event} | ({"text": text} if text else {}) | fields)
            self._line(
                step, [event] + ([text] if text else [f"{key} {x}" for key, x in fields.items()])
            )
            for _, _, rewind in self.others if event == "rollback" else ():
                self._send(rewind, fields["to"] + 1)

    def events(self, rows: list[dict]) -> None:
        """Each one as `event` takes it."""
        for row in rows:
            self.event(**row)

    def say(self, text: str, terminal: bool = True) -> None:
        """A line for people: into train.log, and to the terminal, above the bar if there is one."""
        if not self.main:
            return
        self.log.write(text)
        if terminal:
            self._print(text)

    def close(self) -> None:
        """The end of the run; the bar stays on the screen."""
        if not self.main:
            return
        self._bar(lambda bar: bar.close())
        for _, close, _ in [*self.others]:
            self._send(close)
        self.metrics.close()
        self.log.close()

    def _write(self, row: dict) -> None:
        self.metrics.write(json.dumps(to_json(row), allow_nan=False, default=str))

    def _print(self, text: str) -> None:
        """To the terminal, above the bar; once nobody reads there, no more."""
        if self.heard and self.bar is not None:
            self._bar(lambda bar: bar.clear())
        if self.heard and not print_line(text):
            self.heard = False
            self.log.write("nobody reads the terminal any more: training goes on")
        self._bar(lambda bar: bar.refresh())

    def _bar(self, draw) -> None:
        """draw(the bar), as long as there is one and it can be drawn."""
        try:
            if self.bar is not None:
                draw(self.bar)
        except (OSError, ValueError):
            self.bar.disable, self.bar = True, None
            to_nowhere(sys.stderr)
            self.log.write("the progress bar cannot be drawn any more: training goes on")

    def _send(self, work, *args) -> None:
        """work(*args) of TensorBoard or W&B; where that fails they get nothing more."""
        try:
            work(*args)
        except Exception as error:  # a full disk, a thread of theirs that died, whatever
            self.others = [verbs for verbs in self.others if work not in verbs]
            self.say(f"{work.__module__} fails and is left out from now on: {error}")

    def _record(self, row: dict) -> list[str]:
        """Write a row, and an event for each number in it that is not finite; return what people
        see."""
        self._write(row)
        for write, *_ in [*self.others]:
            self._send(
                write, {key: value for key, value in to_json(row).items() if value is not None}
            )
        for key, x in row.items():
            if x is not None and to_json(x) is None:
                self._write(
                    {
                        "step": row["step"],
                        "event": "nonfinite",
                        "field": key,
                        "value": str(float(x)),
                    }
                )
        return [show(float(row[key])) for key, show in SHOWN.items() if row.get(key) is not None]

    def _line(self, step: int, parts: list[str], terminal: bool = True) -> None:
        self.say("  ".join([f"step {step:{len(str(self.steps))}}/{self.steps}", *parts]), terminal)
