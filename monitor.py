"""The spike guard: looks at the loss and the gradient's norm of a step before the optimizer takes
it.

    forward, backward ─► one sum over all ranks ─► look ─► step | skip | rollback | abort

    detector    expected                       a spike is above                          numbers
    robust      line through the last losses   expected + z robust sd (1.4826 MAD)       z=5.75, window=100
    ema         debiased EMA                   5 x expected                              factor=5, decay=0.99
    window      mean of the last losses        5 x expected                              factor=5, window=100
    previous    the loss before                3 x expected                              factor=3
    grad_norm   median of the norms            10, or 3 x expected if that is more       limit=10

All ranks see the same sums and compute alike in Python's floats: one decision, no further message.
The first `warmup` steps are silent. Then: compare, absorb what is accepted; the `accept`-th
suspicious step in a row is the new level. (Texts often absorb first, NaN too, or skip for ever
after a lasting change.) A factor hardly ever fires: 5 x a loss of 3 is above ln 50257, that of
knowing nothing. `robust`, the default, never foretells less than the last 8 losses: a falling loss
is convex and lies above lines through its past. What is not finite is found at any step (fp16
gradients are the loss scaler's); a norm below `vanishing` is a warning.

    warn, skip   the update is taken, is not taken
    clip         taken; for `recover` steps the gradient's norm is clipped to `clip`
    lr_cut       taken if finite; lr x `cut` grows back over `recover` steps
    rollback     the ring's last state from before this step comes back, and all rows since then are
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
from statistics import median

from checkpoint.snapshots import Ring


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
SLOWER = "a longer warm-up (--warmup_steps) or a lower --lr"


class Guard:
    """take() and look() before each step, then clip() and lr(); `events` is for metrics.jsonl.

    position: has `next`, a row, and ban(first, last). kept: what else a step changes, with tree()
    and load(). on_spike, on_nonfinite: policies, None = off. detector: or several, joined by +;
    factor ... limit: its numbers. disk: what a rollback goes back to with ring=0, see Ring. Raises
    ValueError for what is not allowed.
    """

    def __init__(
        self,
        model,
        optimizer,
        position,
        kept=(),
        on_spike: str | None = "skip",
        on_nonfinite: str | None = "skip",
        precision: str = "fp32",
        detector: str = "robust",
        factor: float = None,
        decay: float = None,
        window: int = None,
        z: float = None,
        limit: float = None,
        warmup: int = 20,
        accept: int = 10,
        vanishing: float = 0.01,
        clip: float = 0.1,
        cut: float = 0.5,
        recover: int = 100,
        ring: int = 2,
        ring_every: int = 25,
        rollbacks: int = 4,
        disk=None,
    ):
        own = dict(factor=factor, decay=decay, window=window, z=z, limit=limit)
        own, names = {k: x for k, x in own.items() if x is not None}, str(detector).split("+")
        self.numbers = n = dict(
            warmup=warmup,
            accept=accept,
            vanishing=vanishing,
            clip=clip,
            cut=cut,
            recover=recover,
            ring=ring,
            ring_every=ring_every,
            rollbacks=rollbacks,
        )
        for k, x in (own | n).items():
            least, most = 4 if k in ("warmup", "window") else 0, 1 if k in ("decay", "cut") else 1e9
            off = x == 0 and k not in ("vanishing", "ring")
            if type(x) not in (int, float) or not least <= x < most or off:
                above = f"{least} or more" if least or k in ("vanishing", "ring") else "above 0"
                raise ValueError(
                    f"--monitor.{k}={x}: it takes a number, {above} and below {most:g}"
                )
        if any(name not in DETECTORS for name in names):
            raise ValueError(
                f"--monitor.detector={detector}: take {', '.join(DETECTORS)}, or several by +"
            )
        takes = {name: own.keys() & inspect.signature(DETECTORS[name]).parameters for name in names}
        for k in own.keys() - set().union(*takes.values()):
            raise ValueError(f"--monitor.{k} means nothing to detector={detector}; leave it out")
        self.detectors = {name: {k: own[k] for k in ks} for name, ks in takes.items()}
        self.on_spike, self.on_nonfinite, self.fp16 = on_spike, on_nonfinite, precision == "fp16"
        backs = "rollback" in (on_spike, on_nonfinite)
        states = Ring(ring, ring_every, model, optimizer, kept) if ring else disk
        self.position, self.ring = position, states if backs else None
        self.events, self.back_at, self.sentence, self.keep = [], 0, "", max(500, window or 0)
        # Goes back in a rollback
        self.seen = {
            "losses": [],
            "norms": [],
            "rejected": [],
            "low": False,
            "clip_until": 0,
            "lr": 1.0,
            "cut_at": 0,
        }
        self.done = {"place": 0, "times": 0, "bad": 0, "found": []}

    def take(self, step: int) -> None:
        """Before each step: now and then, what there is goes into the ring."""
        if self.ring is not None:
            self.ring.take(step, (dict(self.seen), self.position.next))

    def look(self, step: int, loss: float, norm: float, rows: range | list[int]) -> str:
        """step, skip, rollback (done: go on from step `back_at`), or abort (save, then say
        `sentence`).

        step: updates before this one; loss, norm: the same on all ranks; rows: the batch's, of all
        ranks.
        """
        self.events, s, n = [], self.seen, self.numbers
        if not math.isfinite(loss + norm):
            # Its matter: it will not let this step happen
            scalers = self.fp16 and math.isfinite(loss)
            return (
                "step"
                if scalers
                else self.act(self.on_nonfinite, step, loss, norm, rows, "nonfinite")
            )
        self.done["bad"] = 0
        ready = self.on_spike is not None and len(s["losses"]) >= n["warmup"]
        for name, numbers in self.detectors.items() if ready else ():
            expected, limit = DETECTORS[name](
                s["norms" if name == "grad_norm" else "losses"], **numbers
            )
            if (norm if name == "grad_norm" else loss) > limit:
                s["rejected"] = [*s["rejected"], [loss, norm]]
                if len(s["rejected"]) < n["accept"]:
                    return self.act(self.on_spike, step, loss, norm, rows, name, expected)
                s["losses"], s["norms"] = map(list, zip(*s["rejected"][:-1]))
                self.tell(
                    step, "level", f"{name}: loss {loss:.4g}, norm {norm:.4g} are usual from now on"
                )
                break
        low = n["vanishing"]
        if norm < low and not s["low"]:
            self.tell(
                step,
                "vanishing",
                f"gradient norm {norm:.2g} is below {low:g}: all is learnt, "
                "or little comes through",
                detector="vanishing",
                value=norm,
                expected=low,
            )
        # Once, until twice that
        s["low"], s["rejected"] = norm < (2 * low if s["low"] else low), []
        for k, x in (("losses", loss), ("norms", norm)):
            s[k] = [*s[k], x][-self.keep :]
        return "step"

    def act(
        self, policy: str, step: int, loss: float, norm: float, rows, name: str, expected=None
    ) -> str:
        if policy is None:
            return "step"
        n, d, finite = self.numbers, self.done, name != "nonfinite"
        by_norm = name == "grad_norm" or (not finite and math.isfinite(loss))
        d["found"], d["bad"] = (
            [*(x for x in d["found"][-2:] if x <= step), step],
            d["bad"] + (not finite),
        )
        cause, remedy = self.cause(step, norm, finite, by_norm)
        value, what = (norm, "gradient norm") if by_norm else (loss, "loss")
        text = (
            f"{what} {value:.4g}{f', expected {expected:.4g} ({name})' if finite else ''}; likely"
            f" {cause}"
        )
        if policy == "rollback":
            near = d["times"] > 0 and abs(step - d["place"]) <= n["recover"]
            d["times"], d["place"] = d["times"] + 1 if near else 1, step
        if policy == "rollback" and d["times"] > n["rollbacks"]:
            policy, text = "abort", f"{text}, and {n['rollbacks']} rollbacks did not help"
        elif policy != "warn" and d["bad"] >= n["accept"]:
            policy, text = "abort", f"{text}, as in {d['bad']} steps in a row"
        self.tell(
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
        if policy == "abort":
            self.sentence = f"step {step + 1}: {text}. What helps: {remedy}"
        elif policy == "clip":
            self.seen["clip_until"] = step + n["recover"]
        elif policy == "lr_cut":
            self.seen |= {"lr": n["cut"] * self.lr(step), "cut_at": step}
            policy = "warn" if finite else "skip"
        elif policy == "rollback":
            state = self.ring.restore(step, d["times"])
            last = rows[-1] + (2 ** (d["times"] - 1) - 1) * len(rows)
            if state is None:
                self.position.ban(rows[0], last)
                self.tell(step, "skip", "nothing has been saved yet to go back to")
                return "skip"
            self.back_at, (seen, first) = state
            # A copy: the ring's own may come back again
            self.seen, self.position.next = dict(seen), first
            self.position.ban(first, last)
            self.tell(
                step,
                policy,
                f"to {self.back_at}, without rows {first}..{last}",
                to=self.back_at,
                banned=[first, last],
            )
        return "step" if policy in ("warn", "clip") else policy

    def cause(self, step: int, norm: float, finite: bool, by_norm: bool) -> tuple[str, str]:
        norms, found = self.seen["norms"] or [0.0], self.done["found"]
        before, lately = median(norms[-60:-10] or [0.0]), median(norms[-5:])
        return next(
            (cause, remedy)
            for holds, cause, remedy in (
                (
                    lately > 2 * before > 0,
                    f"lr too high: norms grew from {before:.2g} to {lately:.2g}",
                    SLOWER,
                ),
                (
                    finite and len(found) == 3 and step - found[0] <= 100,
                    "lr too high: spike after spike",
                    SLOWER,
                ),
                (not finite and self.fp16, "activations beyond fp16's 65504", "--precision=bf16"),
                (
                    not finite,
                    "overflow",
                    f"look at these rows, try higher --precision; if it stays, {SLOWER}",
                ),
                (
                    by_norm,
                    "a steep place, or few rows with large gradients",
                    "a smaller --grad_clip",
                ),
                (
                    norm > 3 * median(norms[-100:]),
                    "data outlier: loss and norm jump in one batch",
                    "look at these rows; --on_spike=rollback bans them",
                ),
                (
                    True,
                    "batch composition: harder rows",
                    "mix sources more finely, or a larger --batch_size",
                ),
            )
            if holds
        )

    def tell(self, step: int, event: str, text: str, **fields) -> None:
        self.events.append({"step": step + 1, "event": event, "text": text, **fields})

    def clip(self, step: int, usual: float | None) -> float | None:
        """What the gradient's norm is clipped to in this step."""
        return (
            usual
            if step >= self.seen["clip_until"]
            else min(usual or math.inf, self.numbers["clip"])
        )

    def lr(self, step: int) -> float:
        """What every lr is multiplied with in this step."""
        grown = min((step - self.seen["cut_at"]) / self.numbers["recover"], 1.0)
        return self.seen["lr"] + (1 - self.seen["lr"]) * grown

    def tree(self) -> dict:
        # Their lists are replaced, never changed
        return {"seen": dict(self.seen), "done": dict(self.done)}

    def load(self, tree: dict) -> None:
        self.seen, self.done = self.seen | tree.get("seen", {}), self.done | tree.get("done", {})


class Aborted(RuntimeError):
    """The guard has ended the run; the message says why, and what helps."""
