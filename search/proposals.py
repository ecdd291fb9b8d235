"""What a search tries next: a grid, random draws, or Optuna's TPE, which stops hopeless trials.

    a,b,c           these values; split at ; where there is one: "0.9,0.95;0.9,0.99"
    int:LOW:HIGH    whole numbers, both ends included
    lin:LOW:HIGH    any number between
    log:LOW:HIGH    any number between, each power of ten alike

Random search (Bergstra and Bengio 2012, JMLR 13) tries as many values of each field as it has
trials; a grid tries few. TPE (Bergstra et al. 2011) draws where good trials lie denser than bad
ones. The median rule (Golovin et al. 2017, Vizier) stops a trial whose best value so far is worse
than the median of the finished trials at the same step. Optuna's study lives in memory and is told
of all trials at each start.
"""

import math
import random
import re

from run import optimizers
from settings import parse

# The most trials of a grid. Combinations multiply: ten fields of four values are a million.
LARGEST = 100_000
# Words of settings/checks.py about one field alone: no value of another field mends such a one.
ALONE = re.compile("is out of range|is a share|makes no sense|is no text")


# ---- what --search.NAME=TEXT means ---------------------------------------------------------------
def listed(text: str) -> list[str]:
    """The values in "a,b,c" or "a,b;c,d"; a single "a,b;" is one value."""
    parts = text.removesuffix(";").split(";") if ";" in text else text.split(",")
    return [part.strip() for part in parts]


def choices(name: str, text: str) -> list[str] | tuple:
    """The meaning of --search.NAME=TEXT: the values as typed, each once, or (kind, low, high).

    Raises ValueError where train.py would refuse one of them in every run.
    """
    parse.known(name)
    if name in ("out_dir", "resume"):
        raise ValueError(
            "each trial has an out_dir of its own and resumes where it was; "
            f"leave --search.{name} out"
        )
    if re.match("(int|lin|log):", text.strip()):
        return span(name, text.strip())
    values = {}
    for part in listed(text):
        if not part:
            raise ValueError(f"--search.{name}={text} has an empty value; type --search.{name}=A,B")
        # 1e-3 and 0.001 are the same value, typed twice.
        meaning = repr(accepted(name, part, f"--search.{name}={text}"))
        values.setdefault(meaning, part)
    return [*values.values()]


def accepted(name: str, value: str, said: str):
    """What train.py makes of this value. said: what the user typed.

    Raises ValueError where it takes no such value, whatever else is set.
    """
    try:
        found = parse.from_text(name, value)
    except ValueError as error:
        hint = "; a range is int:2:6, lin:0:0.3 or log:1e-3:1e-1" if ":" in value else ""
        raise ValueError(f"{said}: {error}{hint}") from None
    if name == "optim":
        optimizers.find_optimizer(found)
    # Alone, n_head=7 fails against the default n_embd, but a searched n_embd may fit it.
    try:
        parse.parse([f"--{name}={value}"])
    except ValueError as error:
        if ALONE.search(str(error)):
            raise ValueError(f"{said}: {error}") from None
    return found


def span(name: str, text: str) -> tuple:
    """(kind, low, high) of a range such as int:2:6. Raises ValueError."""
    said = f"--search.{name}={text}"
    kind, *ends = text.split(":")
    ends = [parse.number(int if kind == "int" else float, end) for end in ends]
    if len(ends) != 2 or None in ends or not all(-math.inf < end < math.inf for end in ends):
        raise ValueError(f"{said} is no range; type int:2:6, lin:0:0.3 or log:1e-3:1e-1")
    low, high = ends
    if low == high:
        raise ValueError(f"{said} is no range but one value; type --search.{name}={low}")
    if low > high:
        raise ValueError(f"{said} is no range, the lower end comes first: {kind}:{high}:{low}")
    if kind == "log" and low <= 0:
        raise ValueError(
            f"{said} is no range, powers of ten are above 0; type for instance "
            "log:1e-3:1e-1, or lin: for one that has 0 in it"
        )
    # A field of whole numbers refuses a number from inside the range, though it may take the ends.
    if kind == "int":
        accepted(name, str(low), f"{said} draws whole numbers")
    else:
        # By pi, so that the number between two whole ends is never whole itself.
        inside = low + (high - low) / math.pi
        accepted(name, str(inside), f"{said} draws any number between")
    for end in ends:
        accepted(name, str(end), said)
    return (kind, low, high)


def draw(choice: list[str] | tuple, rng: random.Random):
    if isinstance(choice, list):
        return rng.choice(choice)
    kind, low, high = choice
    if kind == "int":
        return rng.randint(low, high)
    if kind == "log":
        x = math.exp(rng.uniform(math.log(low), math.log(high)))
    else:
        x = rng.uniform(low, high)
    # exp(log(high)) may round to a number above high.
    return min(max(x, low), high)


def size(choice: list[str] | tuple) -> int:
    """How many values a grid tries."""
    if isinstance(choice, list):
        return len(choice)
    _, low, high = choice
    return high - low + 1


def possible(search: dict, check) -> None:
    """Raises the ValueError of check(values) where all of 200 drawn combinations have one.

    The same for each value of a field with a dot, in all combinations: its owner may be searched
    too, so one combination says nothing.
    """
    rng = random.Random(0)
    drawn = []
    for _ in range(200):
        drawn.append({name: draw(choice, rng) for name, choice in search.items()})
    fixed = []
    for name, choice in search.items():
        if "." in name:
            values = choice if isinstance(choice, list) else choice[1:]
            fixed += [{name: x} for x in values]
    for given in [*fixed, {}]:
        refused = None
        for values in drawn:
            try:
                check(values | given)
                break
            except ValueError as error:
                refused = refused or error
        else:
            # Every combination was refused: the first error is raised. A value with commas in it,
            # typed without a semicolon, has come as several of the wrong kind.
            hint = ""
            if given and "wrong kind" in str(refused):
                hint = f'; with commas in them: --search.{next(iter(given))}="A,B;C,D"'
            raise ValueError(f"{refused}{hint}") from None


# ---- the methods ---------------------------------------------------------------------------------
class Proposals:
    """Chooses each trial's values, and says which running trials are hopeless.

    A trial is any object with number, values (a dict, empty until chosen), status and
    curve(metric), which is {step: value}. total: how many trials there are; worst: the result of a
    diverged one.
    """

    def __init__(
        self, method: str, search: dict, metric: str, maximise: bool, seed: int, trials: int
    ):
        self.search = search
        self.metric = metric
        self.seed = seed
        self.total = trials
        self.grid = method == "grid"
        self.study = None  # Optuna's
        self.worst = -math.inf if maximise else math.inf
        if self.grid:
            self.total = math.prod(map(size, search.values()))
            if self.total > LARGEST:
                raise ValueError(
                    f"a grid of {self.total} trials is more than {LARGEST}; search "
                    "fewer values, or type --method=random --trials=100"
                )
        if method == "optuna":
            self.start_study(maximise)

    def start_study(self, maximise: bool) -> None:
        try:
            import optuna
        except ImportError:
            raise ValueError("--method=optuna needs a package: pip install optuna") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.optuna = optuna
        self.live = {}  # number -> Optuna's own trial
        self.space = {}
        for name, choice in self.search.items():
            if isinstance(choice, list):
                self.space[name] = optuna.distributions.CategoricalDistribution(choice)
                continue
            kind, low, high = choice
            if kind == "int":
                self.space[name] = optuna.distributions.IntDistribution(low, high)
            else:
                is_log = kind == "log"
                self.space[name] = optuna.distributions.FloatDistribution(low, high, log=is_log)
        # The median of fewer than five trials says little.
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5)
        direction = "maximize" if maximise else "minimize"
        self.study = optuna.create_study(direction=direction, pruner=pruner)

    def at(self, number: int) -> dict:
        """The grid's values of this number; the last field changes fastest."""
        values = {}
        for name, choice in reversed(self.search.items()):
            number, i = divmod(number, size(choice))
            values[name] = choice[i] if isinstance(choice, list) else choice[1] + i
        return {name: values[name] for name in self.search}

    def fits(self, number: int, values: dict) -> bool:
        """Could this search give these values to the trial of this number?"""
        if self.grid:
            return number < self.total and values == self.at(number)
        if values.keys() != self.search.keys():
            return False
        for name, choice in self.search.items():
            x = values[name]
            if isinstance(choice, list):
                is_inside = x in choice
            else:
                kind, low, high = choice
                types = (int,) if kind == "int" else (int, float)
                is_inside = type(x) in types and low <= x <= high
            if not is_inside:
                return False
        return True

    def read_back(self, settings: dict) -> dict:
        """The values that a run with these settings had; {} where it was none of this search."""
        found = {}
        for name, choice in self.search.items():
            x = settings.get(name, settings.get(f"chosen.{name}"))
            # Back to the text as it was typed: the run's 0.001 may have been 1e-3 in the list.
            if isinstance(choice, list):
                x = next((text for text in choice if parse.from_text(name, text) == x), None)
            found[name] = x
        return {} if None in found.values() else found

    def begin(self, trial) -> None:
        """Chooses trial.values unless it has some; Optuna learns of the trial either way, once."""
        # By the trial's number: a search of more trials draws the same ones, and new ones after.
        rng = random.Random(f"{self.seed}/{trial.number}")
        if self.study is not None and trial.number not in self.live:
            if trial.values:
                # What is enqueued is what ask() returns next.
                self.study.enqueue_trial(trial.values)
            sampler = self.optuna.samplers.TPESampler(seed=rng.getrandbits(31))
            self.study.sampler = sampler
            self.live[trial.number] = self.study.ask(self.space)
            trial.values = self.live[trial.number].params
        elif not trial.values and self.grid:
            trial.values = self.at(trial.number)
        elif not trial.values:
            trial.values = {name: draw(choice, rng) for name, choice in self.search.items()}

    def hopeless(self, trial, steps: int) -> bool:
        """Whether to stop a running trial: after its first quarter, and with five others done.

        steps: of the whole trial. What is no finite number counts as the worst.
        """
        if self.study is None:
            return False
        live = self.live[trial.number]
        # Optuna warns of a step that is reported twice. Step 0 is before any training.
        curve = {step: y for step, y in trial.curve(self.metric).items() if step}
        known = self.study.trials[live.number].intermediate_values
        for step in curve.keys() - known.keys():
            live.report(self.worst if curve[step] is None else curve[step], step)
        return max(curve, default=0) >= steps / 4 and bool(curve) and live.should_prune()

    def end(self, trial, value: float | None = None) -> None:
        """Tells Optuna how a trial has ended.

        value: the result of a trial that is done; None: the last value of its curve. A diverged
        trial has the worst result. A failed one has none, as if it had been stopped. TPE avoids
        both.
        """
        if self.study is None or trial.status == "unfinished":
            return
        # For its side effect: it reports the steps since the last look.
        self.hopeless(trial, 0)
        live = self.live.pop(trial.number)
        if trial.status == "diverged":
            value = self.worst
        elif trial.status != "done":
            value = None
        elif value is None:
            value = [*trial.curve(self.metric).values()][-1]
        states = self.optuna.trial.TrialState
        state = states.PRUNED if value is None else states.COMPLETE
        self.study.tell(live, value, state)
