"""What a search tries next: a grid, random draws, or Optuna's TPE, which also stops what is hopeless.

    a,b,c           these values; split at ; where there is one: "0.9,0.95;0.9,0.99"
    int:LOW:HIGH    whole numbers, both ends included
    lin:LOW:HIGH    any number between
    log:LOW:HIGH    any number between, each power of ten alike

Random search (Bergstra and Bengio 2012, JMLR 13) looks at as many values of each field as it has trials, a
grid at few. TPE (Bergstra et al. 2011) draws from where good trials lie denser than bad ones. The median rule
(Golovin et al. 2017, Vizier) stops a trial whose best value so far is worse than the median of what the
finished ones had at the same step. Optuna's study lives in memory and is told all trials anew at each start.
"""

import itertools
import math
import random

import config


def choices(name: str, text: str) -> list[str] | tuple:
    """Of --search.NAME=TEXT: the values as typed, or (kind, low, high)."""
    config.known(name)
    if name == "out_dir":
        raise ValueError("each trial has an out_dir of its own; leave --search.out_dir out")
    kind, *ends = text.split(":")
    if kind not in ("int", "lin", "log"):
        values = list(dict.fromkeys(text.split(";" if ";" in text else ",")))
        return [value for value in values if config.from_text(name, value) is not ...]
    ends = [config.number(int if kind == "int" else float, end) for end in ends]
    if len(ends) != 2 or None in ends or not ends[0] < ends[1] < math.inf or (kind == "log" and ends[0] <= 0):
        raise ValueError(f"--search.{name}={text} is no range; type int:2:6, lin:0:0.3 or log:1e-3:1e-1")
    config.from_text(name, str(ends[0] if kind == "int" else 0.5))  # does it take such numbers?
    return (kind, *ends)


def draw(choice: list[str] | tuple, rng: random.Random):
    if isinstance(choice, list):
        return rng.choice(choice)
    kind, low, high = choice
    if kind == "int":
        return rng.randint(low, high)
    x = math.exp(rng.uniform(math.log(low), math.log(high))) if kind == "log" else rng.uniform(low, high)
    return min(max(x, low), high)


class Proposals:
    """A trial is any object with number, values (a dict, empty until chosen), status and curve(metric), which
    is {step: value}. `total` is how many trials there are."""

    def __init__(self, method: str, search: dict, metric: str, maximise: bool, seed: int, trials: int):
        self.search, self.metric, self.seed, self.total, self.study = search, metric, seed, trials, None
        self.grid = None
        if method == "grid":
            lists = [c if isinstance(c, list) else range(c[1], c[2] + 1) for c in search.values()]
            self.grid = [dict(zip(search, values)) for values in itertools.product(*lists)]
            self.total = len(self.grid)
        if method == "optuna":
            try:
                import optuna
            except ImportError:
                raise ValueError("--method=optuna needs a package: pip install optuna") from None
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            kinds, self.optuna, self.live = optuna.distributions, optuna, {}  # number -> Optuna's own trial
            self.space = {name: kinds.CategoricalDistribution(c) if isinstance(c, list)
                          else kinds.IntDistribution(*c[1:]) if c[0] == "int"
                          else kinds.FloatDistribution(*c[1:], log=c[0] == "log")
                          for name, c in search.items()}  # fmt: skip
            self.study = optuna.create_study(direction="maximize" if maximise else "minimize",
                                             pruner=optuna.pruners.MedianPruner(n_startup_trials=5))

    def begin(self, trial) -> None:
        """Chooses trial.values unless it has some; Optuna learns of the trial either way."""
        rng = random.Random(f"{self.seed}/{trial.number}")  # a later start draws something new
        if self.study is not None:
            if trial.values:
                self.study.enqueue_trial(trial.values)
            self.study.sampler = self.optuna.samplers.TPESampler(seed=rng.getrandbits(31))
            self.live[trial.number] = self.study.ask(self.space)
            trial.values = self.live[trial.number].params
        elif not trial.values and self.grid is not None:
            trial.values = self.grid[trial.number]
        elif not trial.values:
            trial.values = {name: draw(choice, rng) for name, choice in self.search.items()}

    def hopeless(self, trial, steps: int) -> bool:
        """Whether to stop a running trial: after its first quarter, and with five others done."""
        if self.study is None:
            return False
        live = self.live[trial.number]
        curve = {step: y for step, y in trial.curve(self.metric).items() if step and y is not None}
        for step in curve.keys() - self.study.trials[live.number].intermediate_values.keys():
            live.report(curve[step], step)  # but not step 0, before training
        return max(curve, default=0) >= steps / 4 and bool(curve) and live.should_prune()

    def end(self, trial) -> None:
        """What failed or diverged counts as the worst of the stopped, so that TPE keeps away from it."""
        if self.study is not None and trial.status != "unfinished":
            self.hopeless(trial, 0)  # reports what came last
            states, value, live = self.optuna.trial.TrialState, None, self.live.pop(trial.number)
            if trial.status == "done":
                value = [*trial.curve(self.metric).values()][-1]
            self.study.tell(live, value, states.PRUNED if value is None else states.COMPLETE)
