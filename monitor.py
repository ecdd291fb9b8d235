"""The spike monitor: checks the loss and the gradient's norm before the optimizer takes a step.

    forward, backward ─► one sum over all ranks ─► check ─► step | skip | rollback | abort

    detector    expected                  a spike is above                      numbers
    robust      line through last losses  expected + z robust sd (1.4826 MAD)   z=5.75, window=100
    ema         debiased EMA              5 x expected                          factor=5, decay=0.99
    window      mean of the last losses   5 x expected                          factor=5, window=100
    previous    the loss before           3 x expected                          factor=3
    grad_norm   median of the norms       10, or 3 x expected if that is more   limit=10

All ranks see the same sums and compute the same in Python's floats: they decide alike, and send no
further message. The first `warmup` steps are only recorded. After them a step is compared first,
and recorded only if it is accepted; the `accept`-th suspicious step in a row is the new level.
(Texts often record first, NaN too, or skip for ever after a lasting change.) A factor hardly ever
fires: 5 x a loss of 3 is above ln 50257, the loss of a model that knows nothing. `robust`, the
default, never expects less than the median of the last 8 losses: a falling loss is convex and lies
above lines through its past. A loss or norm that is not finite is found at any step (fp16 gradients
are left to the loss scaler); a norm below `vanishing` is a warning.

    warn, skip   the update is taken, is not taken
    clip         taken; for `recover` steps the gradient's norm is clipped to `clip`
    lr_cut       taken if finite; lr x `cut` grows back over `recover` steps
    rollback     the last snapshot from before this step comes back, and all samples since then, up
                 to this batch, are skipped for good: the same data would only lead here again. The
                 next rollback within `recover` steps returns one state further back and skips 1, 3,
                 7 batches more ahead; after `rollbacks` of them: abort. ring=0: the newest
                 checkpoint comes back instead
    abort        checkpoint, a sentence, the end; also after `accept` steps in a row that are not
                 finite

PaLM (2204.02311) restarted 100 steps before a spike and left out 200 to 500 batches, some 20 times;
Llama 3 (2407.21783), often quoted for automatic rollback, tells of few spikes and no intervention.

Neighbours: checkpoint/snapshots.py

Example:
    from monitor import SpikeMonitor
    monitor = SpikeMonitor(model=None, optimizer=None, cursor=None)  # rollback needs these
    for step in range(60):
        loss = 9.0 if step == 50 else 3 - 0.01 * step
        samples = range(8 * step, 8 * step + 8)
        verdict = monitor.check(step, loss, norm=1.0, samples=samples)
        if verdict == "step":
            continue  # here the optimizer takes its step
        print(step, verdict, monitor.events[0]["text"])
        assert (step, verdict) == (50, "skip")
    assert 9.0 not in monitor.seen.losses
"""

import inspect
import math
from dataclasses import dataclass, field, fields, replace
from statistics import median

from checkpoint.snapshots import SnapshotBuffer


# ---- detectors: what was accepted, oldest first -> (expected, what a spike is above) -------------
def robust(losses: list[float], z: float = 5.75, window: int = 100) -> tuple[float, float]:
    # At most the newest half of a young run: its steep start is soon forgotten.
    n = min(window, max(20, len(losses) // 2))
    return band(losses[-n:], z)


def band(x: list[float], z: float) -> tuple[float, float]:
    """A line through x by medians, which a few outliers do not move, and z robust sd above it."""
    # The slope is between the medians of both halves. 1.4826 MAD is the sd of normal numbers.
    half = len(x) // 2
    slope = (median(x[-half:]) - median(x[:half])) / (len(x) - half)
    start = median(v - slope * i for i, v in enumerate(x))
    sd = 1.4826 * median(abs(v - start - slope * i) for i, v in enumerate(x))
    expected = max(start + slope * len(x), median(x[-8:]))
    # A constant loss has no spread, and a change in its last digit would be a spike.
    sd = max(sd, 1e-3 * abs(expected))
    return expected, expected + z * sd


def ema(losses: list[float], factor: float = 5.0, decay: float = 0.99) -> tuple[float, float]:
    # The sum of the weights removes the bias of a young average towards zero.
    total = 0.0
    weight = 0.0
    for loss in losses:
        total = decay * total + loss
        weight = decay * weight + 1
    return total / weight, factor * total / weight


def window(losses: list[float], factor: float = 5.0, window: int = 100) -> tuple[float, float]:
    mean = sum(losses[-window:]) / len(losses[-window:])
    return mean, factor * mean


def previous(losses: list[float], factor: float = 3.0) -> tuple[float, float]:
    return losses[-1], factor * losses[-1]


def grad_norm(norms: list[float], limit: float = 10.0) -> tuple[float, float]:
    expected = median(norms[-100:])
    return expected, max(limit, 3 * expected)


DETECTORS = {f.__name__: f for f in (robust, ema, window, previous, grad_norm)}
# Fields of MonitorConfig that are arguments of detectors; None leaves a detector its default.
OF_DETECTORS = ("factor", "decay", "window", "z", "limit")


# ---- the numbers: --monitor.NAME= ----------------------------------------------------------------
def number(default, help: str, least: float | None = None, below: float = 1e9):
    """One number: least <= value < below; without `least` it is above 0."""
    return field(default=default, metadata=dict(help=help, least=least, below=below))


@dataclass(frozen=True)
class MonitorConfig:
    """All numbers of the monitor, checked. Raises ValueError for what is not allowed."""

    detector: str = field(default="robust", metadata=dict(help="or several, joined by +"))
    factor: float = number(None, "ema, window, previous: a spike is above factor x expected")
    decay: float = number(None, "ema: what the average keeps of itself each step", below=1)
    window: int = number(None, "robust, window: so many of the last losses count", least=4)
    z: float = number(None, "robust: a spike is so many robust sd above expected")
    limit: float = number(None, "grad_norm: no norm up to this is a spike")
    warmup: int = number(20, "accepted steps until the detectors speak", least=4)
    accept: int = number(10, "so many suspicious steps in a row are the new level")
    vanishing: float = number(0.01, "a gradient norm below this is a warning", least=0)
    clip: float = number(0.1, "clip: what the gradient's norm is clipped to after a spike")
    cut: float = number(0.5, "lr_cut: what lr is multiplied with at a spike", below=1)
    recover: int = number(100, "steps until clip, lr_cut and a row of rollbacks are over")
    ring: int = number(2, "rollback: snapshots in host memory; 0 = checkpoints instead", least=0)
    ring_every: int = number(25, "rollback: steps between snapshots")
    rollbacks: int = number(4, "rollback: so many in a row, then abort")

    def __post_init__(self):
        for f in fields(self):
            # A default may be None, which no range allows.
            is_number = "below" in f.metadata
            if is_number and getattr(self, f.name) != f.default:
                self.check_range(f.name, f.metadata["least"], f.metadata["below"])
        if any(name not in DETECTORS for name in self.names()):
            raise ValueError(
                f"--monitor.detector={self.detector}: take {', '.join(DETECTORS)}, or several by +"
            )
        # A number for a detector that is not in use would silently do nothing.
        taken = set().union(*self.detectors().values())
        for name in OF_DETECTORS:
            if getattr(self, name) is not None and name not in taken:
                raise ValueError(
                    f"--monitor.{name} means nothing to detector={self.detector}; leave it out"
                )

    def check_range(self, name: str, least: float | None, below: float) -> None:
        value = getattr(self, name)
        if least is None:
            allowed = "above 0"
            is_allowed = type(value) in (int, float) and 0 < value < below
        else:
            allowed = f"{least} or more"
            is_allowed = type(value) in (int, float) and least <= value < below
        if not is_allowed:
            raise ValueError(
                f"--monitor.{name}={value}: it takes a number, {allowed} and below {below:g}"
            )

    def names(self) -> list[str]:
        return str(self.detector).split("+")

    def detectors(self) -> dict[str, dict[str, float]]:
        """The chosen detectors, and which numbers each of them gets: {"ema": {"factor": 3.0}}."""
        found = {}
        for name in self.names():
            parameters = inspect.signature(DETECTORS[name]).parameters
            found[name] = {}
            for number_name in OF_DETECTORS:
                value = getattr(self, number_name)
                if value is not None and number_name in parameters:
                    found[name][number_name] = value
        return found


# ---- the monitor ---------------------------------------------------------------------------------
@dataclass
class Seen:
    """What a rollback takes back. Lists are replaced, never changed: snapshots share them."""

    losses: list[float] = field(default_factory=list)  # accepted, oldest first
    norms: list[float] = field(default_factory=list)
    rejected: list[list[float]] = field(default_factory=list)  # [loss, norm], in a row till now
    low: bool = False  # is the norm vanishing?
    clip_until: int = 0  # the step
    lr: float = 1.0  # the factor that the newest cut left
    cut_at: int = 0  # the step


@dataclass
class Done:
    """What a rollback leaves as it is: the monitor remembers that it did not help."""

    place: int = 0  # the step of the newest rollback
    times: int = 0  # rollbacks in a row
    bad: int = 0  # steps in a row that were not finite
    found: list[int] = field(default_factory=list)  # steps of the newest three spikes


class SpikeMonitor:
    """snapshot() and check() before each step, then max_norm() and lr_factor().

    events: what happened at the last step, for metrics.jsonl.
    cursor: the run's data.cursor.Cursor; kept: what else a step changes, objects with state_dict()
    and load_state_dict(); on_spike, on_nonfinite: policies, None = off; loss_scaling: does a loss
    scaler skip steps whose gradients overflow? disk: what a rollback returns to with ring=0, an
    object with the methods of SnapshotBuffer.
    """

    def __init__(
        self,
        model,
        optimizer,
        cursor,
        kept=(),
        on_spike: str | None = "skip",
        on_nonfinite: str | None = "skip",
        loss_scaling: bool = False,
        config: MonitorConfig = MonitorConfig(),
        disk=None,
    ):
        self.config = config
        self.detectors = config.detectors()
        self.on_spike = on_spike
        self.on_nonfinite = on_nonfinite
        self.loss_scaling = loss_scaling
        self.cursor = cursor
        self.snapshots = None
        if "rollback" in (on_spike, on_nonfinite):
            self.snapshots = disk
            if config.ring:
                self.snapshots = SnapshotBuffer(
                    config.ring, config.ring_every, model, optimizer, kept
                )
        self.events = []  # of the last step
        self.back_at = 0  # after "rollback": the step to continue from
        self.sentence = ""  # after "abort": why the run ends
        self.n_remembered = max(500, config.window or 0)  # losses and norms
        self.seen = Seen()
        self.done = Done()

    def snapshot(self, step: int) -> None:
        """Before each step: every `ring_every` steps, the state of the run goes into memory."""
        if self.snapshots is not None:
            self.snapshots.snapshot(step, (dict(vars(self.seen)), self.cursor.next))

    def check(self, step: int, loss: float, norm: float, samples: range | list[int]) -> str:
        """What to do with a step: "step", "skip", "rollback" or "abort".

        rollback: everything is put back already, and the run continues from step `back_at`; abort:
        save, then end with `sentence`. step: updates before this one; loss, norm: the same on all
        ranks; samples: the sample ids of the batch, of all ranks.
        """
        self.events = []
        # A NaN among accepted losses would silence detectors for as long as they remember it.
        if not math.isfinite(loss + norm):
            # Gradients overflow in fp16 now and then: the loss scaler skips such a step itself.
            if self.loss_scaling and math.isfinite(loss):
                return "step"
            return self.act(self.on_nonfinite, step, loss, norm, samples, "nonfinite")
        self.done.bad = 0

        seen = self.seen
        detector, expected = self.detect(loss, norm)
        if detector is not None:
            seen.rejected = [*seen.rejected, [loss, norm]]
            if len(seen.rejected) < self.config.accept:
                return self.act(self.on_spike, step, loss, norm, samples, detector, expected)
            # So many in a row are no spike: the run is on another level, and the past is forgotten.
            seen.losses = [loss for loss, _ in seen.rejected[:-1]]
            seen.norms = [norm for _, norm in seen.rejected[:-1]]
            text = f"{detector}: loss {loss:.4g}, norm {norm:.4g} are usual from now on"
            self.emit(step, "level", text)

        self.check_vanishing(step, loss, norm)
        seen.rejected = []
        # New lists, not append: snapshots share the old ones.
        seen.losses = [*seen.losses, loss][-self.n_remembered :]
        seen.norms = [*seen.norms, norm][-self.n_remembered :]
        return "step"

    def detect(self, loss: float, norm: float) -> tuple[str | None, float | None]:
        """The first detector that finds a spike, and what it expected; else (None, None)."""
        if self.on_spike is None or len(self.seen.losses) < self.config.warmup:
            return None, None
        for name, numbers in self.detectors.items():
            value = loss
            past = self.seen.losses
            if name == "grad_norm":
                value = norm
                past = self.seen.norms
            expected, limit = DETECTORS[name](past, **numbers)
            if value > limit:
                return name, expected
        return None, None

    def check_vanishing(self, step: int, loss: float, norm: float) -> None:
        """One warning, until the norm has been twice the limit again."""
        limit = self.config.vanishing
        was_low = self.seen.low
        if norm < limit and not was_low:
            self.emit(
                step,
                "vanishing",
                f"gradient norm {norm:.2g} is very small: {self.low_norm(step, loss)}",
                detector="vanishing",
                value=norm,
                expected=limit,
            )
        # A norm that wanders about the limit would warn again and again.
        self.seen.low = norm < (2 * limit if was_low else limit)

    def low_norm(self, step: int, loss: float) -> str:
        """What a vanishing gradient means, by the loss now and the oldest one remembered."""
        if not self.seen.losses:
            return "all is learnt, or little comes through"
        before = self.seen.losses[0]
        when = "at the start" if len(self.seen.losses) == step else "earlier"
        losses = f"(loss {loss:.3g}, {when} {before:.3g})"
        if loss < before:
            return f"converged, or stuck {losses}; if stuck, try a lower --lr"
        return f"stuck {losses}: try a lower --lr"

    def act(
        self,
        policy: str | None,
        step: int,
        loss: float,
        norm: float,
        samples,
        detector: str,
        expected: float | None = None,
    ) -> str:
        """check()'s answer to a spike, or to a step that is not finite: what the policy demands."""
        if policy is None:
            return "step"
        is_finite = detector != "nonfinite"
        by_norm = detector == "grad_norm" or (not is_finite and math.isfinite(loss))
        if not is_finite:
            self.done.bad += 1
        # After a rollback, spikes of later steps have not happened yet.
        before = [at for at in self.done.found[-2:] if at <= step]
        self.done.found = [*before, step]

        cause, remedy = self.cause(step, norm, is_finite, by_norm)
        value = norm if by_norm else loss
        text = f"gradient norm {value:.4g}" if by_norm else f"loss {value:.4g}"
        if is_finite:
            text += f", expected {expected:.4g} ({detector})"
        # escalate() before emit(): the event has to name the policy that is followed in the end.
        policy, text = self.escalate(policy, step, f"{text}; likely {cause}")
        self.emit(
            step,
            "spike" if is_finite else "nonfinite",
            text,
            detector=detector,
            value=value,
            expected=expected,
            cause=cause,
            remedy=remedy,
            rows=[samples[0], samples[-1]],
            action=policy,
        )

        if policy == "rollback":
            return self.roll_back(step, samples)
        if policy == "abort":
            self.sentence = f"step {step + 1}: {text}. What helps: {remedy}"
            return "abort"
        # clip and lr_cut only note the step here: max_norm() and lr_factor() act on it.
        if policy == "clip":
            self.seen.clip_until = step + self.config.recover
            return "step"
        if policy == "lr_cut":
            self.seen.lr = self.config.cut * self.lr_factor(step)
            self.seen.cut_at = step
            return "step" if is_finite else "skip"
        return "step" if policy == "warn" else policy

    def escalate(self, policy: str, step: int, text: str) -> tuple[str, str]:
        """(policy, text), or abort and a longer text where the policy has not helped so far."""
        config = self.config
        done = self.done
        if policy == "rollback":
            in_a_row = done.times > 0 and abs(step - done.place) <= config.recover
            done.times = done.times + 1 if in_a_row else 1
            done.place = step
            if done.times > config.rollbacks:
                return "abort", f"{text}, and {config.rollbacks} rollbacks did not help"
        # Skipping for ever would train nothing, and nobody would notice.
        if policy != "warn" and done.bad >= config.accept:
            return "abort", f"{text}, as in {done.bad} steps in a row"
        return policy, text

    def roll_back(self, step: int, samples) -> str:
        """Puts back an earlier state; "skip" where there is none."""
        # With each rollback in a row one state further back, and 0, 1, 3, 7 batches further ahead.
        state = self.snapshots.restore(step, self.done.times)
        batches_ahead = 2 ** (self.done.times - 1) - 1
        last = samples[-1] + batches_ahead * len(samples)
        if state is None:
            self.cursor.skip(samples[0], last)
            self.emit(step, "skip", "nothing has been saved yet to go back to")
            return "skip"
        self.back_at, (seen, first) = state
        self.seen = Seen(**seen)
        self.cursor.next = first
        self.cursor.skip(first, last)
        text = f"to {self.back_at}, without samples {first}..{last}"
        self.emit(step, "rollback", text, to=self.back_at, banned=[first, last])
        return "rollback"

    def cause(self, step: int, norm: float, is_finite: bool, by_norm: bool) -> tuple[str, str]:
        """(what is likely behind it, what helps)"""
        norms = self.seen.norms or [0.0]
        found = self.done.found
        earlier = median(norms[-60:-10] or [0.0])
        lately = median(norms[-5:])
        slower = "a longer warm-up (--warmup_steps) or a lower --lr"
        # The surest sign comes first: norms had grown for some steps before the spike.
        if lately > 2 * earlier > 0:
            return f"lr too high: norms grew from {earlier:.2g} to {lately:.2g}", slower
        if is_finite and len(found) == 3 and step - found[0] <= 100:
            return "lr too high: spike after spike", slower
        if not is_finite and self.loss_scaling:
            return "activations beyond fp16's 65504", "--precision=bf16"
        if not is_finite:
            remedy = f"look at these samples, try higher --precision; if it stays, {slower}"
            return "overflow", remedy
        if by_norm:
            cause = "a steep place, or a few samples with large gradients"
            return cause, "a smaller --grad_clip"
        if norm > 3 * median(norms[-100:]):
            remedy = "look at these samples; --on_spike=rollback skips them for good"
            return "data outlier: loss and norm jump in one batch", remedy
        remedy = "mix sources more finely, or a larger --batch_size"
        return "batch composition: harder samples", remedy

    def emit(self, step: int, event: str, text: str, **fields) -> None:
        self.events.append({"step": step + 1, "event": event, "text": text, **fields})

    def max_norm(self, step: int, usual: float | None) -> float | None:
        """What the gradient's norm is clipped to in this step; None: not at all."""
        if step >= self.seen.clip_until:
            return usual
        return min(usual or math.inf, self.config.clip)

    def lr_factor(self, step: int) -> float:
        """The factor of every lr in this step."""
        # From the factor of the newest cut in a straight line to 1. Before any cut it is 1.
        grown = min((step - self.seen.cut_at) / self.config.recover, 1.0)
        return self.seen.lr + (1 - self.seen.lr) * grown

    def state_dict(self) -> dict:
        return {"seen": dict(vars(self.seen)), "done": dict(vars(self.done))}

    def load_state_dict(self, state: dict) -> None:
        # A value that an older checkpoint lacks keeps its default.
        self.seen = replace(self.seen, **state.get("seen", {}))
        self.done = replace(self.done, **state.get("done", {}))


class Aborted(RuntimeError):
    """The monitor has ended the run; the message says why, and what helps."""


if __name__ == "__main__":
    monitor = SpikeMonitor(model=None, optimizer=None, cursor=None)
    verdicts = [monitor.check(i, 9.0 if i == 50 else 3.0, 1.0, range(8)) for i in range(51)]
    print(f"step 51: {verdicts[-1]}, {monitor.events[0]['text']}")
