"""Where a run is in its data: the next row, and the rows that are never read again."""

import math


class Cursor:
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
