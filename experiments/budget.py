"""Runs of a comparison within a budget of time: a plan, rows that are kept, no more seeds than fit.

    probe      a few steps of each candidate: seconds beside the steps (start, evaluations), and of
               one step
    plan       steps of a run so that 5 seeds fit; 4 or 3 where that leaves too few steps
    measure    whole seeds while they end in time by what rows have taken so far; whatever runs at
               1.03 of the budget is stopped, and its seed is not counted

    FOLDER/plan.json     what was asked, steps, seconds spent, at how many seeds one has judged
    FOLDER/NAME.csv      a line for each run, written as it ends

A second command in the folder goes on: rows are not measured again, seconds spent count.
"""

import heapq
import json
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from experiments import protocol, significance
from experiments.findings import mean_sd

clock = time.monotonic
FULL, LATE = 0.93, 1.03  # of the budget: planned, and the end of whatever still runs
LEAST_STEPS, MOST_STEPS, MOST_SEEDS, PROBE = 30, 2000, 40, 10


@dataclass(frozen=True)
class Asked:
    """What is compared. candidates: name -> train.py's fields, lr its usual one; fields: for all;
    ranks: processes of a run; budget in seconds; range: learning rates go from the usual one
    / range to it x range; steps: of a run at the batch in fields, None for what fits; jobs: at a
    time; text: what identifies the data."""

    name: str
    data: str
    candidates: dict[str, dict]
    fields: dict
    ranks: int
    budget: float
    home: Path
    seed: int
    trials: int
    range: float
    steps: int | None
    jobs: int
    text: str = ""

    def rates(self, name: str) -> list[float]:
        """The learning rates of one candidate, evenly in their logarithm."""
        n, middle = self.trials, self.candidates[name]["lr"]
        return [middle * self.range ** (2 * i / (n - 1) - 1 if n > 1 else 0) for i in range(n)]

    def share(self, name: str) -> float:
        """Its steps for one step of the usual batch: equal tokens."""
        usual = int(self.fields["batch_size"])
        return usual / self.candidates[name].get("batch_size", usual)

    def same(self) -> dict:
        """What another command in the same folder must have, too."""
        kept = "name data text candidates fields seed trials range steps".split()
        return json.loads(json.dumps({part: getattr(self, part) for part in kept}))


def run(asked: Asked, steps: int, keys: dict, quick: bool) -> dict:
    """One row: a candidate at one learning rate with one seed."""
    name = keys["candidate"]
    steps = max(1, round(steps * asked.share(name)))
    fields = asked.fields | asked.candidates[name]
    fields |= dict(lr=keys["lr"], steps=steps, eval_every=steps, data=asked.data)
    # A second of the same name is another try, not the same run again.
    fields["seed"] = asked.seed + keys["seed"] + 10_000 * name.count(" again")
    rows = protocol.train_run(asked.ranks, **fields)
    losses, times = protocol.curve(rows), protocol.curve(rows, "step_s")
    piece = max(1, len(losses) // 25)
    pieces = [losses[i : i + piece] for i in range(0, len(losses) - piece + 1, piece)]
    return {
        "val_loss": protocol.curve(rows, "val_loss")[-1],
        "step_s": mean_sd(times[2:] or times)[0],
        "steps_s": sum(times),
        "curve": [round(mean_sd(values)[0], 4) for values in pieces],
    }


# ---- the plan ------------------------------------------------------------------------------------
def makespan(costs: list[float], jobs: int) -> float:
    """Seconds until all are done, each taken by the first that is free."""
    free = [0.0] * jobs
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def divide(asked: Asked, costs: dict[str, tuple[float, float]], spent: float) -> tuple[int, int]:
    """(steps of a run, seeds planned). costs: seconds beside the steps, and of one step. Raises
    ValueError where the budget is too small."""

    def seconds(steps: int, seeds: int) -> float:
        one = [beside + steps * asked.share(name) * s for name, (beside, s) in costs.items()]
        return makespan(one * (asked.trials * seeds), asked.jobs)

    room, fewest = FULL * asked.budget - spent, min(map(asked.share, costs))
    least = asked.steps or math.ceil(max(LEAST_STEPS, 8 / fewest))
    many = asked.steps or max(100, least)
    for seeds, steps in ((5, many), (4, least), (significance.LEAST, least)):
        if seconds(steps, seeds) <= room:
            while not asked.steps and steps < MOST_STEPS and seconds(steps + 10, seeds) <= room:
                steps += 10
            return steps, seeds
    need = math.ceil((seconds(least, significance.LEAST) + spent) / FULL / 5) * 5
    raise ValueError(
        f"--budget={asked.budget:g}s is too small for {len(costs)} candidates x {asked.trials}"
        f" learning rates x {significance.LEAST} seeds of {least} steps on this machine; it takes"
        f" --budget={need + 5}s or more"
    )


# ---- what is measured ----------------------------------------------------------------------------
class Session:
    """One folder's rows and plan, and the time that is left."""

    def __init__(self, asked: Asked):
        self.asked, self.began = asked, clock()
        self.path, self.csv = asked.home / "plan.json", asked.home / f"{asked.name}.csv"
        self.rows = protocol.read(self.csv)
        self.plan = {"asked": asked.same(), "spent": 0.0, "looks": []}
        if self.path.exists():
            self.plan = json.loads(self.path.read_text(encoding="utf-8"))
        for part, value in asked.same().items():
            if (old := self.plan["asked"].get(part)) != value:
                raise ValueError(
                    f"{asked.home} holds a claim with {part} {old}, not {value}; type another"
                    " --out=DIR"
                )
        self.spent_before = self.plan["spent"]

    def spent(self) -> float:
        """Seconds, earlier commands in this folder included."""
        return self.spent_before + clock() - self.began

    def save(self) -> None:
        self.plan["spent"] = round(self.spent(), 1)
        self.path.write_text(json.dumps(self.plan, indent=1) + "\n", encoding="utf-8")

    def keys(self, seed: int) -> list[dict]:
        """The rows of one seed: all candidates at all their learning rates."""
        return [
            dict(candidate=name, trial=i, lr=self.asked.rates(name)[i], seed=seed)
            for i in range(self.asked.trials)
            for name in self.asked.candidates
        ]

    def missing(self, seed: int) -> list[dict]:
        kept = {(r["candidate"], r["trial"], r["seed"]) for r in self.rows}
        return [k for k in self.keys(seed) if (k["candidate"], k["trial"], k["seed"]) not in kept]

    def collect(self, rows: list[dict], steps: int, until: float):
        """Yields (keys, figures, seconds) as they end. Raises RuntimeError where one fails."""
        row, jobs = partial(run, self.asked, steps), self.asked.jobs
        bar = tqdm(disable=True)
        for keys, figures, why, s in protocol.measured(row, rows, False, jobs, 1, bar, until):
            if figures is None:
                raise RuntimeError(f"{keys['candidate']}: {why.strip().splitlines()[-1]}")
            yield keys, figures, s

    def make_plan(self) -> None:
        """Probes, unless an earlier command has. Raises ValueError for too small a budget."""
        if "steps" not in self.plan:
            asked, costs = self.asked, {}
            probes = [
                dict(candidate=name, lr=own["lr"], seed=0) for name, own in asked.candidates.items()
            ]
            usual = max(1, min(map(asked.share, asked.candidates)))
            steps = math.ceil(PROBE / min(1, usual))
            for keys, found, seconds in self.collect(probes, steps, math.inf):
                costs[keys["candidate"]] = (max(0.0, seconds - found["steps_s"]), found["step_s"])
            self.plan["costs"] = {name: costs[name] for name in asked.candidates}
            self.plan["steps"], self.plan["seeds"] = divide(asked, costs, self.spent())
        self.save()

    def cost(self, name: str) -> float:
        """Seconds of one run, by the rows there are, else by the probes."""
        found = [r["seconds"] for r in self.rows if r["candidate"] == name][-6:]
        beside, step = self.plan["costs"][name]
        expected = beside + step * self.plan["steps"] * self.asked.share(name)
        return mean_sd(found)[0] if found else expected

    def next_rows(self) -> list[dict]:
        """The rows of the next seeds: half of those that fit, as the machine may slow down."""
        left, found, costs = self.asked.budget - self.spent(), [], []
        for seed in range(1, MOST_SEEDS + 1):
            rows = self.missing(seed)
            costs += [self.cost(keys["candidate"]) for keys in rows]
            if makespan(costs, self.asked.jobs) > left:
                break
            found += [rows] * bool(rows)
        return sum(found[: (len(found) + 1) // 2], [])

    def measure(self, say=print) -> None:
        """Until no further seed fits. Rows and plan are saved as each row ends."""
        place = protocol.place()
        until = clock() + LATE * self.asked.budget - self.spent()
        while rows := self.next_rows():
            for keys, figures, seconds in self.collect(rows, self.plan["steps"], until):
                self.rows.append(keys | figures | place | {"seconds": round(seconds, 2)})
                protocol.write(self.csv, self.rows)
                self.save()
                say(
                    f"seed {keys['seed']}  {keys['candidate']}  lr {keys['lr']:.3g}  validation"
                    f" {figures['val_loss']:.4f}  {seconds:.1f} s  ({self.spent():.0f} of"
                    f" {self.asked.budget:.0f} s)",
                    file=sys.stderr,
                )
            if clock() > until:
                break
        self.save()

    # ---- what was found --------------------------------------------------------------------------
    def losses(self) -> dict[str, dict[int, float]]:
        """candidate -> {seed: loss at its best learning rate}, of seeds that are complete for it;
        NaN where every rate diverged."""
        found = {name: {} for name in self.asked.candidates}
        for name, own in found.items():
            for seed in {r["seed"] for r in self.rows}:
                mine = [r for r in self.rows if (r["candidate"], r["seed"]) == (name, seed)]
                if len(mine) == self.asked.trials:
                    finite = [r["val_loss"] for r in mine if math.isfinite(r["val_loss"])]
                    own[seed] = min(finite, default=math.nan)
        return found

    def verdicts(self) -> list[dict]:
        """significance.judge of these; a look at more seeds than before is another look."""
        losses = self.losses()
        n = min(map(len, losses.values()))
        if n >= significance.LEAST and n not in self.plan["looks"]:
            self.plan["looks"].append(n)
            self.save()
        costs = [self.cost(name) for name in losses for _ in range(self.asked.trials)]
        minutes = makespan(costs * 10, self.asked.jobs) / 600
        return significance.judge(losses, max(1, len(self.plan["looks"])), minutes=minutes)
