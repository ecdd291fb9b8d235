"""Divergence: a run whose loss has risen for good, or never fell, is told so.

    level    the median of the training losses of a block of n steps; n is a twentieth of the run,
             at least 5 and at most 50. A few spikes do not move a median
    start    the first loss, of weights that no step has changed; for evaluations the first of them
    guess    ln V, the loss of a model that knows nothing of a vocabulary of V tokens
    ceiling  1.02 max(guess, start): random weights may begin a little above guessing
    best     the lowest level so far, or the start where that is lower
    unigram  the entropy of single tokens, the loss of a model that only counts them
    margin   max(best / 4, guess / 20, 4 sd of a level): no noise, and no restart of a schedule

    event        what is named                                              judged after warm-up
    divergence   3 levels in a row above min(ceiling, best + margin), the   at the end of a block
                 last one not falling
    divergence   2 evaluations in a row above min(ceiling, start + its      at an evaluation
                 margin); at the end of the run one above 1.02 start
    stuck        no level below 0.97 unigram so far, and the last not 2 %   from the 10th block on
                 lower than 5 blocks ago

The training loss decides. Overfitting raises the validation loss, to above `guess` if it goes on,
while the training loss falls: an evaluation counts only while the level is above the first one. A
run that is fine-tuned (--init_from), a branch, and one that begins on counted n-grams have a start
far below `guess` and are measured against that. A sudden jump belongs to the spike monitor
(monitor.py), and this one speaks of a level that stays. Rollback and early stopping act first.

For example, 180 steps on bytes (ln 256 = 5.545) have blocks of 9, and 4 steps of warm-up. A loss of
5.9 from the first block on is named at step 36, for there was warm-up in the first block. One that
falls to 2.0 and rises to 2.6 is named at the third level above 2.5. What was named of 80 runs:
experiments/results/divergence.md.

All ranks see the same sums and compute the same in Python's floats: they decide alike. It is said
once, and again only where a loss that had risen gets above `guess` too, or after a new best.
"""

import math
from statistics import median

import numpy as np

SHARE = 0.02  # what a loss may be above a bound and still be at it


def unigram_entropy(tokens, pieces: int = 256, length: int = 4096) -> float:
    """The entropy of single tokens, nats, of evenly spaced pieces of the text.

    tokens: anything with len() and slice(start, stop) -> a 1-D array of ids.
    """
    n = len(tokens)
    length = min(length, n)
    pieces = min(pieces, -(-n // length))
    starts = [i * (n - length) // max(1, pieces - 1) for i in range(pieces)]
    counts = np.bincount(np.concatenate([tokens.slice(at, at + length) for at in starts]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


class Divergence:
    """Names a run that has diverged or learns nothing, by its losses alone.

    policy: "warn", "abort", or None = off; steps: of the whole run; warmup: how many of them;
    vocab_size: V; unigram: nats. After "abort" `sentence` says why: the caller saves and stops.
    """

    def __init__(
        self, policy: str | None, steps: int, warmup: int, vocab_size: int, unigram: float
    ):
        self.policy = policy
        self.steps = steps
        self.warmup = warmup
        self.guess = math.log(vocab_size)
        self.unigram = unigram
        self.block_size = min(50, max(5, steps // 20))
        self.events = []
        self.sentence = ""  # after "abort"
        self.seen = {
            "block": [],  # losses of the unfinished block
            "levels": [],  # the last 6, oldest first
            "sds": [],  # of these levels
            "blocks": 0,  # finished after warm-up
            "start": math.inf,  # the first loss
            "first": math.inf,  # the first level
            "best": math.inf,
            "best_step": 0,
            "high": 0,  # levels in a row above the limit
            "val_start": math.inf,
            "val_high": 0,  # evaluations in a row above theirs
            "val_step": -1,  # of the newest evaluation
            "told": 0.0,  # the loss at which divergence was said
            "stuck": False,  # was it said?
        }

    # ---- training losses -------------------------------------------------------------------------
    def update(self, step: int, loss: float) -> None:
        """After each step: `step` updates are done, and `loss` is that of the last one's batch.

        The same on all ranks. What is not finite counts as infinite.
        """
        if self.policy is None:
            return
        seen = self.seen
        loss = loss if math.isfinite(loss) else math.inf
        if seen["start"] == math.inf:
            seen["start"] = loss if loss < math.inf else self.guess
            # The loss of one batch is noisy; the evaluation before the first step is less so.
            seen["best"] = min(seen["start"], self.guess)
            if seen["val_start"] < math.inf:
                seen["best"] = min(seen["val_start"], self.guess)
        # New lists, not append: a rollback's snapshots share the old ones.
        seen["block"] = [*seen["block"], loss]
        if len(seen["block"]) >= self.block_size:
            self.close_block(step)

    def close_block(self, step: int) -> None:
        seen = self.seen
        n = len(seen["block"])
        level = median(seen["block"])
        sd = 0.0
        if level < math.inf:
            # 1.4826 MAD is a robust sd of normal numbers; their median's is 1.25 / sqrt(n) of it.
            # An infinite loss in the block counts as twice the level.
            mad = median(min(abs(loss - level), level) for loss in seen["block"])
            sd = 1.25 * 1.4826 * mad / math.sqrt(n)
        seen["block"] = []
        seen["levels"] = [*seen["levels"], level][-6:]
        seen["sds"] = [*seen["sds"], sd][-6:]
        if seen["first"] == math.inf:
            seen["first"] = level
        if step - n < self.warmup:
            self.note_best(step, level)
            return
        seen["blocks"] += 1
        self.check_level(step, level)
        self.note_best(step, level)
        if seen["blocks"] >= 10:
            self.check_stuck(step)

    def note_best(self, step: int, level: float) -> None:
        if level < self.seen["best"]:
            # Whoever recovers may be told again.
            self.seen |= {"best": level, "best_step": step, "told": 0.0}

    def margin(self, best: float, sd: float = 0.0) -> float:
        return max(best / 4, self.guess / 20, 4 * sd)

    def ceiling(self, start: float) -> float:
        """Above this a model is worse than guessing; random weights may begin a little above."""
        return (1 + SHARE) * max(self.guess, start)

    def check_level(self, step: int, level: float) -> None:
        seen = self.seen
        sd = median(seen["sds"][-3:])
        limit = min(self.ceiling(seen["start"]), seen["best"] + self.margin(seen["best"], sd))
        seen["high"] = seen["high"] + 1 if level > limit else 0
        if seen["high"] < 3:
            return
        is_falling = level < (1 - SHARE) * seen["levels"][-3]
        if is_falling:
            return
        if level > self.ceiling(seen["start"]):
            why = f"is above {self.guess:.4g}, that of a model which knows nothing"
        else:
            why = f"has risen from {seen['best']:.4g} at step {seen['best_step']} and stays up"
        self.tell(step, "training loss", level, limit, why)

    # ---- evaluations -----------------------------------------------------------------------------
    def evaluated(self, step: int, val_loss: float) -> None:
        """After each evaluation of the weights at `step`; the same on all ranks."""
        seen = self.seen
        # An evaluation that is repeated after a rollback does not count twice.
        if self.policy is None or step <= seen["val_step"]:
            return
        seen["val_step"] = step
        val_loss = val_loss if math.isfinite(val_loss) else math.inf
        if seen["val_start"] == math.inf:
            seen["val_start"] = val_loss if val_loss < math.inf else self.guess
            return
        start = seen["val_start"]
        is_end = step >= self.steps
        limit = min(self.ceiling(start), start + self.margin(start))
        if is_end:
            limit = (1 + SHARE) * start
        is_high = seen["blocks"] >= 3 and val_loss > limit
        seen["val_high"] = seen["val_high"] + 1 if is_high else 0
        # Not so when it overfits: then training goes on falling.
        training_is_high = bool(seen["levels"]) and seen["levels"][-1] > seen["first"]
        if training_is_high and seen["val_high"] >= (1 if is_end else 2):
            why = f"is above {start:.4g}, where it began"
            self.tell(step, "validation loss", val_loss, limit, why)

    # ---- what is said ----------------------------------------------------------------------------
    def tell(self, step: int, what: str, loss: float, limit: float, why: str) -> None:
        """One event, one more where a risen loss gets above the ceiling; under abort the end."""
        told = self.seen["told"]
        ceiling = self.ceiling(self.seen["start"])
        is_new = told == 0 or told <= ceiling < loss
        if not is_new and self.policy == "warn":
            return
        self.seen["told"] = loss
        text = f"{what} {loss:.4g} {why}: the run has diverged; a lower --lr helps, or a longer"
        text += " --warmup_steps"
        self.emit(step, "divergence", text, value=loss, expected=limit, action=self.policy)
        if self.policy == "abort":
            self.sentence = f"step {step}: {text}"

    def check_stuck(self, step: int) -> None:
        """One warning, for the whole run."""
        seen = self.seen
        level = seen["levels"][-1]
        bound = 0.97 * self.unigram
        has_fallen = level < (1 - SHARE) * seen["levels"][0]
        is_told = seen["stuck"] or seen["told"] > 0
        if is_told or seen["best"] < bound or has_fallen:
            return
        seen["stuck"] = True
        if seen["best"] > 0.97 * min(seen["start"], self.guess):
            why = f"is where it began ({seen['start']:.4g}): nothing is learnt; --lr is far too "
            why += "low, or the first steps were far too large"
        else:
            why = f"is not below {self.unigram:.4g}, which counting single tokens gives: little "
            why += "is learnt; try a lower --lr, or a longer --warmup_steps"
        text = f"training loss {level:.4g} {why}"
        self.emit(step, "stuck", text, value=level, expected=bound)

    def emit(self, step: int, event: str, text: str, **fields) -> None:
        self.events = [*self.events, {"step": step, "event": event, "text": text, **fields}]

    def pop_events(self) -> list[dict]:
        """The events for metrics.jsonl since the last call."""
        events = self.events
        self.events = []
        return events

    # ---- checkpoints -----------------------------------------------------------------------------
    def state_dict(self) -> dict:
        return dict(self.seen)

    def load_state_dict(self, state: dict) -> None:
        # A value that an older checkpoint lacks keeps its default.
        for name, usual in self.seen.items():
            value = state.get(name, usual)
            is_list = isinstance(usual, list)
            self.seen[name] = [float(x) for x in value] if is_list else type(usual)(value)
