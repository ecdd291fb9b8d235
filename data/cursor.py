"""Where a run is in its data: the next sample, and the samples that it skips for good.

sample id   0 1 2 3 4 5 6 7 8 9       next = 2, skipped_samples = [[4, 6]]
                ^     - - -           next_samples(4) = [2, 3, 7, 8], and next is then 9
"""

import math


class Cursor:
    """The next sample of the data, and the ranges of samples that are never read.

    data: a name of the corpus. Another corpus has other text under the same ids, so nothing of it
    is skipped. A skipped sample is an id, not a text: the next epoch shows the same text again,
    among other texts and under another id.
    """

    def __init__(self, data: str = ""):
        self.data = data
        self.next = 0
        self.skipped_samples = []  # [[first, last], ...], sorted, with gaps between them

    def next_samples(self, n: int) -> range | list[int]:
        """The ids of the next n samples, for all ranks together.

        Does not move the cursor: whoever has used the samples sets `next` to the last id + 1.
        """
        parts = []
        start = self.next
        missing = n
        # A last, empty range at infinity ends the data behind the last skipped one.
        for first, last in [*self.skipped_samples, [math.inf, math.inf]]:
            if last >= start:
                part = range(start, min(max(first, start), start + missing))
                if part:
                    parts.append(part)
                missing -= len(part)
                start = last + 1
        # A range where nothing is skipped, which is nearly always: it costs no memory.
        if len(parts) == 1:
            return parts[0]
        return [sample_id for part in parts for sample_id in part]

    def skip(self, first: int, last: int) -> None:
        """Never read the samples first .. last again."""
        merged = []
        for low, high in sorted([*self.skipped_samples, [first, last]]):
            # + 1: both ends are included, so neighbours touch.
            if merged and low <= merged[-1][1] + 1:
                merged[-1] = [merged[-1][0], max(high, merged[-1][1])]
            else:
                merged.append([low, high])
        self.skipped_samples = merged

    @property
    def seen(self) -> int:
        """How many samples have been read so far."""
        n_skipped = 0
        for first, last in self.skipped_samples:
            n_skipped += max(0, min(last + 1, self.next) - first)
        return self.next - n_skipped

    def state_dict(self) -> dict:
        # Checkpoints have these names, so they stay as they are.
        return {"rows": self.next, "banned": self.skipped_samples, "data": self.data}

    def load_state_dict(self, state: dict) -> None:
        self.next = int(state["rows"])
        self.skipped_samples = [[int(i), int(j)] for i, j in state.get("banned", [])]
        # Another corpus: nothing is skipped there, and `seen`, for the log, must stay as it was.
        if state.get("data", self.data) != self.data:
            self.next = self.seen
            self.skipped_samples = []
