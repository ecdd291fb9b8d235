"""Do two candidates end at different losses, given a few seeds? A paired t-test, Holm's correction,
and a verdict that may be "not enough runs to tell".

    d = loss of a - loss of b, seed by seed      what a seed does to both drops out
    t = mean(d) sqrt(n) / sd(d)                  n - 1 degrees of freedom

With 3 to 8 seeds a test of signs cannot help: of 5 signs the rarest outcome has p = 1/16. The
t-test needs d to be about normal, which a mean over thousands of tokens is. Three seeds are the
least. p is multiplied by `looks`, how often one has judged before adding seeds (Bonferroni), and
pairs share the level by Holm's rule (1979): of the m pairs the smallest p is multiplied by m, the
next by m - 1, ...

A verdict is one of three. p <= 0.02: a difference; at 0.05 one in 20 comparisons of equals would
be called different. Else, if the 90 % interval of the mean lies within `margin` either way, no
difference (two one-sided tests at 5 %; Schuirmann 1987). Else the runs cannot tell, and how many
more seeds would is computed.
"""

import math
from itertools import combinations

from experiments.findings import mean_sd

LEVEL, LEAST, MARGIN, MOST = 0.02, 3, 0.02, 200
WORDS = ("difference", "no difference", "not enough")


def t_tail(t: float, df: int) -> float:
    """P(|T| > |t|) of Student's t with df = 1, 2, ... (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    if math.isinf(t):
        return 0.0
    angle = math.atan(abs(t) / math.sqrt(df))
    square = math.cos(angle) ** 2
    term = total = 1.0 if df > 1 else 0.0
    for k in range(2 + df % 2, df - 1, 2):
        term *= square * (k - 1) / k
        total += term
    if df % 2 == 0:
        inside = math.sin(angle) * total
    else:
        inside = 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)
    return max(0.0, 1 - inside)


def t_quantile(df: int, level: float) -> float:
    """The t that |T| exceeds with this probability."""
    low, high = 0.0, 1e5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > level else (low, middle)
    return high


def paired_test(differences: list[float]) -> tuple[float, float, float]:
    """(mean, standard deviation, p). One difference says nothing: p = 1."""
    mean, sd = mean_sd(differences)
    if len(differences) < 2 or mean == 0:
        return mean, sd, 1.0
    t = math.inf if sd == 0 else mean * math.sqrt(len(differences)) / sd
    return mean, sd, t_tail(t, len(differences) - 1)


def holm(ps: list[float]) -> list[float]:
    """Each p, corrected for there being several, in the order given."""
    found, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, ps[i] * (len(ps) - rank)))
        found[i] = largest
    return found


def judge(
    losses: dict[str, dict[int, float]], looks: int = 1, margin: float = MARGIN, minutes: float = 1
) -> list[dict]:
    """A verdict for each pair of candidates, the clearest first.

    losses: candidate -> {seed: loss}, NaN where it diverged; margin: what counts as no difference,
    as a share of the loss; minutes: what another seed takes. A verdict has a and b (a ends lower),
    n, mean, sd, p, word (one of WORDS) and text.
    """
    tests = []
    for a, b in combinations(losses, 2):
        seeds = sorted(losses[a].keys() & losses[b].keys())
        found = [losses[a][s] - losses[b][s] for s in seeds]
        if found and mean_sd(found)[0] > 0:
            a, b, found = b, a, [-x for x in found]
        bad = [
            f"{name} diverged with {n} of {len(seeds)} seeds"
            for name in (a, b)
            if (n := sum(math.isnan(losses[name][s]) for s in seeds))
        ]
        mean, sd, p = paired_test(found) if found and not bad else (math.nan, math.nan, 1.0)
        level = mean_sd([losses[b][s] for s in seeds])[0] if seeds else math.nan
        tests.append(
            dict(a=a, b=b, n=len(seeds), mean=mean, sd=sd, p=p, bad=bad, margin=margin * level)
        )
    corrected = holm([min(1.0, one["p"] * looks) for one in tests])
    for one, p in zip(tests, corrected):
        one["p"] = p
        one["word"], one["text"] = words(one, LEVEL / len(tests) / looks, minutes)
    return sorted(tests, key=lambda one: one["p"])


def words(one: dict, level: float, minutes: float) -> tuple[str, str]:
    """Which of WORDS, and the sentence. level: what is left of LEVEL for this pair."""
    a, b, n, mean, sd = (one[name] for name in ("a", "b", "n", "mean", "sd"))
    if one["bad"]:
        return WORDS[2], f"{a} and {b} cannot be compared: {' and '.join(one['bad'])}"
    seeds = f"{n} seed{'s' * (n != 1)}"
    if n >= LEAST and mean == sd == 0:
        return WORDS[1], f"no difference found: {a} and {b} end alike to the last digit ({seeds})"
    # One seed has no sd: three are what can be promised.
    shown = f"{abs(mean):.3f}" + f" ± {sd:.3f}" * (n > 1)
    if n >= LEAST and one["p"] <= LEVEL:
        return WORDS[0], f"{a} ends {shown} lower than {b} ({seeds}, p = {one['p']:.2g})"
    reach = t_quantile(n - 1, 0.1) * sd / math.sqrt(n) if n >= LEAST else math.inf
    if abs(mean) + reach <= one["margin"]:
        text = f"no difference found: {a} ends {shown} from {b}, at most"
        return WORDS[1], f"{text} {abs(mean) + reach:.3f} ({seeds}, p = {one['p']:.2g})"
    needed = seeds_needed(n, mean, sd, one["margin"], level)
    more = (needed - n) * minutes
    wait = f"about {max(1, more):.0f} more minute{'s' * (more >= 1.5)} would"
    if needed >= MOST:
        wait = f"not even {MOST} seeds would"
    known = f": {a} ends {shown} lower ({seeds}, p = {one['p']:.2g})" if n > 1 else f" ({seeds})"
    return WORDS[2], f"not enough runs to tell {a} from {b}{known}; {wait}"


def seeds_needed(n: int, mean: float, sd: float, margin: float, level: float) -> int:
    """If mean and sd stay as they are, how many seeds tell; MOST if not even so many."""
    if n < 2:
        return LEAST
    more = max(n + 1, LEAST)
    while more < MOST:
        found = t_quantile(more - 1, level) * sd / math.sqrt(more) <= abs(mean)
        equal = abs(mean) + t_quantile(more - 1, 0.1) * sd / math.sqrt(more) <= margin
        if found or equal:
            break
        more += max(1, more // 10)
    return more
