"""The spike monitor: looks at the loss and the gradient's norm of a step before the optimizer takes
it.

    forward, backward ─► one sum over all ranks ─► check ─► step | skip | rollback | abort

    detector    expected                  a spike is above                      numbers
    robust      line through last losses  expected + z robust sd (1.4826 MAD)   z=5.75, window=100
    ema         debiased EMA              5 x expected                          factor=5, decay=0.99
    window      mean of the last losses   5 x expected                          factor=5, window=100
    previous    the loss before           3 x expected                          factor=3
    grad_norm   median of the norms       10, or 3 x expected if that is more   limit=10

All ranks see the same sums and compute alike in Python's floats: one decision, no further message.
The first `warmup` steps are silent. Then: compare, absorb what is accepted; the `accept`-th
suspicious step in a row is the new level. (Texts often absorb first, NaN too, or skip for ever
after a lasting change.) A factor hardly ever fires: 5 x a loss of 3 is above ln 50257, that of
knowing nothing. `robust`, the default, never predicts less than the last 8 losses: a falling loss
is convex and lies above lines through its past. What is not finite is found at any step (fp16
gradients are the loss scaler's); a norm below `vanishing` is a warning.

    warn, skip   the update is taken, is not taken
    clip         taken; for `recover` steps the gradient's norm is clipped to `clip`
    lr_cut       taken if finite; lr x `cut` grows back over `recover` steps
    rollback     the last snapshot from before this step comes back, and all rows since then are
                 banned for good, with this batch's: with the same data it would only come here
                 again. The next one within `recover` steps goes one state further back and bans 1,
                 3, 7 batches more ahead; after `rollbacks` of them: abort. ring=0: the newest
                 checkpoint comes back instead
    abort        checkpoint, a sentence, the end; so end `accept` steps in a row that are not finite

PaLM (2204.02311) restarted 100 steps before a spike and left out 200 to 500 batches, some 20 times;
Llama 3 (2407.21783), often quoted for automatic rollback, tells of few spikes and no intervention.
"""

import inspect
import math
from dataclasses import dataclass, field, fields, replace
from statistics import median

from checkpoint.snapshots import SnapshotBuffer


# ---- detectors: what was accepted, oldest first -> (expected, what a spike is above) -------------
def robust(losses: list[float], z: float = 5.75, window: int = 100) -> tuple[float, float]:
    # The steep start is soon forgotten
    return band(losses[-min(window, max(20, len(losses) // 2)) :], z)


def band(x: list[float], z: float) -> tuple[float, float]:
    half = len(x) // 2
    slope = (median(x[-half:]) - median(x[:half])) / (len(x) - half)
    start = median(v - slope * i for i, v in enumerate(x))
    sd = 1.4826 * median(abs(v - start - slope * i) for i, v in enumerate(x))
    expected = max(start + slope * len(x), median(x[-8:]))
    return expected, expected + z * max(sd, 1e-3 * abs(expected))  # a constant loss has no spread


def ema(losses: list[float], factor: float = 5.0, decay: float = 0.99) -> tuple[float, float]:
    total = weight = 0.0
    for loss in losses:
        total, weight = decay * total + loss, decay * weight + 1
    return total / weight, factor * total / weight


def window(losses: list[float], factor: float = 5.0, window: int = 100) -> tuple[float, float]:
    mean = sum(losses[-window:]) / len(losses[-window:])
    return mean, factor * mean


def previous(losses: list[float], factor: float = 3.0) -> tuple[float, float]:
    return losses[-1], factor * losses[-1]


def grad_norm(norms: list[float], limit: float = 10.0) -> tuple[float, float]:
    return median(norms[-100:]), max(limit, 3 * median(norms[-100:]))


DETECTORS = {f.__name__: f for f in (robust, ema, window, previous, grad_norm)}


# ---- the numbers: --monitor.NAME= ----------------------------------------------------------------
def number(default, help: str, least: float | None = None, below: float = 1e9):
    """One number: least <= value < below; without `least` it is above 0."""
    return field(default=default, metadata=dict(help=help, least=least, below=below))


@dataclass(frozen=True)
class MonitorConfig:
    """None is the detector's own default. Raises ValueError for what is not allowed."""

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
            if "below" in f.metadata and getattr(self, f.name) != f.default:
                self.check_range(f.name, **f.metadata)
        if any(name not in DETECTORS for name in self.names()):
            raise ValueError(
                f"--monitor.detector={self.detector}: take {', '.join(DETECTORS)}, or several by +"
            )
        taken = set().union(*self.detectors().values())
        for name in OF_DETECTORS:
            if getattr(self, name) is not None and name not in taken:
                raise ValueError(
                    f"--monitor.{name} means nothing to detector={self.detector}; leave it out"
                )

    def check_range(self, name: str, help: str, least: float | None, below: float) -> None:
        value = getattr(self, name)
        is_number = type(value) in (int, float)
        if not is_number or not (0 < value if least is None else least <= value) or value >= below:
            above = "above 0" if least is None else f"{least} or more"
            raise ValueError(
                f"--monitor.{name}={value}: it takes a number, {above} and below {below:g}"
            )

    def names(self) -> list[str]:
        return str(self.detector).split("+")

    def detectors(self) -> dict[str, dict[str, float]]:
        """What of this each detector takes: {"ema": {"factor": 3.0}}."""
        given = {k: getattr(self, k) for k in OF_DETECTORS if getattr(self, k) is not None}
        return {
            name: {
                k: x for k, x in given.items() if k in inspect.signature(DETECTORS[name]).parameters
            }
            for name in self.names()
        }


OF_DETECTORS = ("factor", "decay", "window", "z", "limit")


# ---- the monitor ---------------------------------------------------------------------------------
@dataclass
class Seen:
    """What a rollback takes back. Lists are replaced, never changed."""

    losses: list[float] = field(default_factory=list)  # accepted, oldest first
    norms: list[float] = field(default_factory=list)
    rejected: list[list[float]] = field(default_factory=list)  # [loss, norm], in a row till now
    low: bool = False  # is the norm vanishing?
    clip_until: int = 0  # the step
    lr: float = 1.0  # what the newest cut left of it
    cut_at: int = 0


@dataclass
class Done:
    """What stays after a rollback."""

    place: int = 0  # the step of the newest rollback
    times: int = 0  # rollbacks in a row
    bad: int = 0  # steps in a row that were not finite
    found: list[int] = field(default_factory=list)  # steps of the newest three spikes


class SpikeMonitor:
    """snapshot() and check() before each step, then clip() and lr(); `events` is for metrics.jsonl.

    position: has `next`, a row, and ban(first, last). kept: what else a step changes, with tree()
    and load(). on_spike, on_nonfinite: policies, None = off. disk: what a rollback goes back to
    with ring=0, see SnapshotBuffer.
    """

    def __init__(
        self,
        model,
        optimizer,
        position,
        kept=(),
        on_spike: str | None = "skip",
        on_nonfinite: str | None = "skip",
        loss_scaling: bool = False,
        config: MonitorConfig = MonitorConfig(),
        disk=None,
    ):
        self.config, self.detectors = config, config.detectors()
        self.on_spike, self.on_nonfinite = on_spike, on_nonfinite
        self.loss_scaling = loss_scaling
        self.position, self.snapshots = position, None
        if "rollback" in (on_spike, on_nonfinite):
            self.snapshots = disk
            if config.ring:
                self.snapshots = SnapshotBuffer(
                    config.ring, config.ring_every, model, optimizer, kept
                )
        self.events, self.back_at, self.sentence = [], 0, ""
        self.length = max(500, config.window or 0)  # losses and norms that are remembered
        self.seen, self.done = Seen(), Done()

    def snapshot(self, step: int) -> None:
        """Before each step: now and then, what there is goes into memory."""
        if self.snapshots is not None:
            self.snapshots.snapshot(step, (dict(vars(self.seen)), self.position.next))

    def check(self, step: int, loss: float, norm: float, rows: range | list[int]) -> str:
        """step, skip, rollback (done: resume from step `back_at`), or abort (save, then say
        `sentence`).

        step: updates before this one; loss, norm: the same on all ranks; rows: the batch's, of all
        ranks.
        """
        self.events, seen = [], self.seen
        if not math.isfinite(loss + norm):
            if self.loss_scaling and math.isfinite(loss):
                return "step"  # an overflow: the loss scaler will not let this step happen
            return self.act(self.on_nonfinite, step, loss, norm, rows, "nonfinite")
        self.done.bad = 0
        name, expected = self.detect(loss, norm)
        if name is not None:
            seen.rejected = [*seen.rejected, [loss, norm]]
            if len(seen.rejected) < self.config.accept:
                return self.act(self.on_spike, step, loss, norm, rows, name, expected)
            seen.losses = [x for x, _ in seen.rejected[:-1]]
            seen.norms = [x for _, x in seen.rejected[:-1]]
            text = f"{name}: loss {loss:.4g}, norm {norm:.4g} are usual from now on"
            self.emit(step, "level", text)
        self.check_vanishing(step, norm)
        seen.rejected = []
        seen.losses = [*seen.losses, loss][-self.length :]
        seen.norms = [*seen.norms, norm][-self.length :]
        return "step"

    def detect(self, loss: float, norm: float) -> tuple[str | None, float | None]:
        """The first detector that takes this for a spike, and what it expected; else None, None."""
        if self.on_spike is None or len(self.seen.losses) < self.config.warmup:
            return None, None
        for name, numbers in self.detectors.items():
            if name == "grad_norm":
                value, before = norm, self.seen.norms
            else:
                value, before = loss, self.seen.losses
            expected, limit = DETECTORS[name](before, **numbers)
            if value > limit:
                return name, expected
        return None, None

    def check_vanishing(self, step: int, norm: float) -> None:
        """One warning, until the norm has been twice the limit again."""
        limit, was_low = self.config.vanishing, self.seen.low
        if norm < limit and not was_low:
            self.emit(
                step,
                "vanishing",
                f"gradient norm {norm:.2g} is below {limit:g}: all is learnt, "
                "or little comes through",
                detector="vanishing",
                value=norm,
                expected=limit,
            )
        self.seen.low = norm < (2 * limit if was_low else limit)

    def act(
        self, policy: str, step: int, loss: float, norm: float, rows, name: str, expected=None
    ) -> str:
        """What the policy makes of a spike, or of what is not finite: check()'s answer."""
        if policy is None:
            return "step"
        finite = name != "nonfinite"
        by_norm = name == "grad_norm" or (not finite and math.isfinite(loss))
        self.done.found = [*(x for x in self.done.found[-2:] if x <= step), step]
        self.done.bad += not finite
        cause, remedy = self.cause(step, norm, finite, by_norm)
        value, what = (norm, "gradient norm") if by_norm else (loss, "loss")
        usual = f", expected {expected:.4g} ({name})" if finite else ""
        text = f"{what} {value:.4g}{usual}; likely {cause}"
        policy, text = self.escalate(policy, step, text)
        self.emit(
            step,
            "spike" if finite else "nonfinite",
            text,
            detector=name,
            value=value,
            expected=expected,
            cause=cause,
            remedy=remedy,
            rows=[rows[0], rows[-1]],
            action=policy,
        )
        if policy == "rollback":
            return self.roll_back(step, rows)
        if policy == "abort":
            self.sentence = f"step {step + 1}: {text}. What helps: {remedy}"
        elif policy == "clip":
            self.seen.clip_until = step + self.config.recover
        elif policy == "lr_cut":
            self.seen.lr, self.seen.cut_at = self.config.cut * self.lr(step), step
            policy = "step" if finite else "skip"
        return "step" if policy in ("warn", "clip") else policy

    def escalate(self, policy: str, step: int, text: str) -> tuple[str, str]:
        """abort, and why, in place of a policy that has not helped."""
        n, done = self.config, self.done
        if policy == "rollback":
            near = done.times > 0 and abs(step - done.place) <= n.recover
            done.times, done.place = done.times + 1 if near else 1, step
            if done.times > n.rollbacks:
                return "abort", f"{text}, and {n.rollbacks} rollbacks did not help"
        if policy != "warn" and done.bad >= n.accept:
            return "abort", f"{text}, as in {done.bad} steps in a row"
        return policy, text

    def roll_back(self, step: int, rows) -> str:
        state = self.snapshots.restore(step, self.done.times)
        last = rows[-1] + (2 ** (self.done.times - 1) - 1) * len(rows)
        if state is None:
            self.position.ban(rows[0], last)
            self.emit(step, "skip", "nothing has been saved yet to go back to")
            return "skip"
        self.back_at, (seen, first) = state
        self.seen, self.position.next = Seen(**seen), first
        self.position.ban(first, last)
        text = f"to {self.back_at}, without rows {first}..{last}"
        self.emit(step, "rollback", text, to=self.back_at, banned=[first, last])
        return "rollback"

    def cause(self, step: int, norm: float, finite: bool, by_norm: bool) -> tuple[str, str]:
        """(what is likely behind it, what helps)"""
        norms, found = self.seen.norms or [0.0], self.done.found
        before, lately = median(norms[-60:-10] or [0.0]), median(norms[-5:])
        slower = "a longer warm-up (--warmup_steps) or a lower --lr"
        if lately > 2 * before > 0:
            return f"lr too high: norms grew from {before:.2g} to {lately:.2g}", slower
        if finite and len(found) == 3 and step - found[0] <= 100:
            return "lr too high: spike after spike", slower
        if not finite and self.loss_scaling:
            return "activations beyond fp16's 65504", "--precision=bf16"
        if not finite:
            remedy = f"look at these rows, try higher --precision; if it stays, {slower}"
            return "overflow", remedy
        if by_norm:
            return "a steep place, or few rows with large gradients", "a smaller --grad_clip"
        if norm > 3 * median(norms[-100:]):
            remedy = "look at these rows; --on_spike=rollback bans them"
            return "data outlier: loss and norm jump in one batch", remedy
        remedy = "mix sources more finely, or a larger --batch_size"
        return "batch composition: harder rows", remedy

    def emit(self, step: int, event: str, text: str, **fields) -> None:
        self.events.append({"step": step + 1, "event": event, "text": text, **fields})

    def clip(self, step: int, usual: float | None) -> float | None:
        """What the gradient's norm is clipped to in this step."""
        if step >= self.seen.clip_until:
            return usual
        return min(usual or math.inf, self.config.clip)

    def lr(self, step: int) -> float:
        """What every lr is multiplied with in this step."""
        grown = min((step - self.seen.cut_at) / self.config.recover, 1.0)
        return self.seen.lr + (1 - self.seen.lr) * grown

    def tree(self) -> dict:
        return {"seen": dict(vars(self.seen)), "done": dict(vars(self.done))}

    def load(self, tree: dict) -> None:
        self.seen = replace(self.seen, **tree.get("seen", {}))
        self.done = replace(self.done, **tree.get("done", {}))


class Aborted(RuntimeError):
    """The monitor has ended the run; the message says why, and what helps."""
