"""Early stopping: the best evaluation so far, its weights, and when to stop."""

import math
from collections.abc import Callable
from pathlib import Path

from checkpoint import save
from checkpoint.plan import Share
from checkpoint.save import Saver


class EarlyStopping:
    """Keeps the best weights, and stops after `patience` evaluations that are not better.

    The best weights are a checkpoint of their own, FOLDER/step-N, which no other checkpoint prunes:
    it survives a kill, and every layout reads it. (state_dict().copy(), often seen, keeps no
    weights: the copy shares their memory.) patience=None turns all of this off.
    min_delta: how far below the best loss a loss has to be, in nats per token, to be better.
    saver: of the same run. Its process group serves here too; without one, the group of all ranks.
    """

    def __init__(
        self,
        folder: str | Path,
        patience: int | None,
        min_delta: float = 0.0,
        saver: Saver | None = None,
    ):
        self.folder = Path(folder)
        self.patience = patience
        self.min_delta = min_delta
        self.saver = saver
        # step, loss: of the best evaluation; last: the newest step; bad: evaluations since the best
        self.seen = {"loss": math.inf, "step": 0, "last": -1, "bad": 0}
        self.events = []
        self.share = Share()  # of this rank in the last save

    def update(self, step: int, val_loss: float, tree: Callable[[], dict] = dict) -> bool:
        """After each evaluation, on all ranks: are these weights the best so far?

        If so, tree() is saved. If that fails, the earlier weights stay the best.
        """
        if self.patience is None:
            return False
        seen = self.seen
        is_better = math.isfinite(val_loss) and val_loss < seen["loss"] - self.min_delta
        if is_better:
            group = None
            if self.saver is not None:
                # A save under way in the background speaks in the same group.
                self.saver.wait()
                group = self.saver.group
            try:
                save.save(self.folder, step, tree(), keep=1, group=group, share=self.share)
            except OSError as error:
                self.events.append({"step": step, "event": "save_failed", "text": str(error)})
                return False
            # A rollback may have left best weights of a later step, which never happened.
            save.drop_after(self.folder, step)
            seen |= {"loss": val_loss, "step": step, "bad": 0}
        elif step > seen["last"]:
            # An evaluation that is repeated after a rollback does not count twice.
            seen["bad"] += 1
        seen["last"] = max(step, seen["last"])
        return is_better

    def pop_events(self) -> list[dict]:
        """The events for metrics.jsonl since the last call."""
        events = self.events
        self.events = []
        return events

    @property
    def should_stop(self) -> bool:
        return self.patience is not None and self.seen["bad"] >= self.patience

    @property
    def best_is_earlier(self) -> bool:
        """Were earlier weights better than the weights evaluated last?"""
        return self.patience is not None and self.seen["bad"] > 0 and self.seen["loss"] < math.inf

    @property
    def path(self) -> Path:
        """The checkpoint of the best weights."""
        return self.folder / f"step-{self.seen['step']:08d}"

    def state_dict(self) -> dict:
        return dict(self.seen)

    def load_state_dict(self, state: dict) -> None:
        self.seen |= {key: type(x)(state.get(key, x)) for key, x in self.seen.items()}
        # Somebody deleted the best weights: the next ones become the best.
        if not self.path.is_dir():
            self.seen |= {"loss": math.inf, "bad": 0}
