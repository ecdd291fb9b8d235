"""Where a run is in its data and among its evaluations: next row, banned rows, best step."""

import math
from collections.abc import Callable
from pathlib import Path

import checkpoint


class Position:
    """The next row of the data, and ranges never to be read. A banned row is a number: in another
    epoch its text comes again, in other company; for other `data` (a name of it) there are other
    bans."""

    def __init__(self, data: str = ""):
        self.data, self.next, self.banned = data, 0, []  # [[first, last], ...], sorted and apart

    def rows(self, n: int) -> range | list[int]:
        """The next n rows, of which each rank takes its share. Moves nothing; `next` is then
        rows[-1] + 1."""
        parts, at = [], self.next
        for first, last in [*self.banned, [math.inf, math.inf]]:
            if last >= at:
                parts.append(range(at, min(max(first, at), at + n)))
                n, at = n - len(parts[-1]), last + 1
        parts = [part for part in parts if part]
        return parts[0] if len(parts) == 1 else [row for part in parts for row in part]

    def ban(self, first: int, last: int) -> None:
        ranges, self.banned = sorted([*self.banned, [first, last]]), []
        for first, last in ranges:
            if self.banned and first <= self.banned[-1][1] + 1:
                first, last = self.banned[-1][0], max(last, self.banned.pop()[1])
            self.banned.append([first, last])

    @property
    def seen(self) -> int:
        """Rows taken so far."""
        return self.next - sum(
            max(0, min(last + 1, self.next) - first) for first, last in self.banned
        )

    def tree(self) -> dict:
        return {"rows": self.next, "banned": self.banned, "data": self.data}

    def load(self, tree: dict) -> None:
        self.next = int(tree["rows"])
        self.banned = [[int(i), int(j)] for i, j in tree.get("banned", [])]
        if tree.get("data", self.data) != self.data:
            self.next, self.banned = self.seen, []


class Best:
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
                checkpoint.save(self.folder, step, tree(), keep=1)
            except OSError as error:
                self.events.append({"step": step, "event": "save_failed", "text": str(error)})
                return False
            checkpoint.drop_after(self.folder, step)  # of before a rollback
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
