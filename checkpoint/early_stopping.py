"""Early stopping: the best evaluation so far, its weights, and when to stop."""

import math
from collections.abc import Callable
from pathlib import Path

from checkpoint import save


class EarlyStopping:
    """Early stopping. The best weights are a checkpoint of their own, FOLDER/step-N, that no other
    prunes: it outlives a kill, and every layout reads it. (state_dict().copy(), often seen, keeps
    no weights.)
    """

    def __init__(self, folder: str | Path, patience: int | None, min_delta: float = 0.0):
        self.folder, self.patience, self.min_delta = Path(folder), patience, min_delta
        self.seen = {"loss": math.inf, "step": 0, "last": -1, "bad": 0}
        self.events = []

    def look(self, step: int, val_loss: float, tree: Callable[[], dict] = dict) -> bool:
        """After each evaluation, on all ranks: are these weights the best so far? Then tree() is
        saved. Where that fails, those before stay the best."""
        if self.patience is None:
            return False
        s, bound = self.seen, self.seen["loss"] - self.min_delta
        better = math.isfinite(val_loss) and val_loss < bound
        if better:
            try:
                save.save(self.folder, step, tree(), keep=1)
            except OSError as error:
                self.events.append({"step": step, "event": "save_failed", "text": str(error)})
                return False
            save.drop_after(self.folder, step)  # of before a rollback
            s |= {"loss": val_loss, "step": step, "bad": 0}
        s["bad"], s["last"] = s["bad"] + (not better and step > s["last"]), max(step, s["last"])
        return better

    def news(self) -> list[dict]:
        """Events for metrics.jsonl since it was last asked."""
        events, self.events = self.events, []
        return events

    @property
    def over(self) -> bool:
        return self.patience is not None and self.seen["bad"] >= self.patience

    @property
    def worse(self) -> bool:
        """Are the weights that were looked at last not the best ones?"""
        return self.patience is not None and self.seen["bad"] > 0 and self.seen["loss"] < math.inf

    @property
    def path(self) -> Path:
        return self.folder / f"step-{self.seen['step']:08d}"

    def tree(self) -> dict:
        return dict(self.seen)

    def load(self, tree: dict) -> None:
        self.seen |= {key: type(x)(tree.get(key, x)) for key, x in self.seen.items()}
        if not self.path.is_dir():  # gone: the next one is the best
            self.seen |= {"loss": math.inf, "bad": 0}
