"""Learning-rate schedules: pure functions from (step, steps) to a multiplier of each group's own initial lr.

`step` counts from 0 the update about to be made, of `steps` in all. Every schedule starts with linear
warm-up:
    (step + 1) / warmup        for step < warmup       the first update already moves, at lr/warmup
and then runs its own shape on x = (step - warmup) / (steps - warmup), from 0 to just below 1.

    wsd       1 until the last decay_frac of the steps, then down     MiniCPM, Hu et al. 2024 (2404.06395);
              to minimum                                              not Llama 2's, which was cosine
    cosine    minimum + (1-minimum) (1 + cos(pi x)) / 2                  Loshchilov & Hutter 2017 (1608.03983)
    linear    1 - (1-minimum) x
    constant  1

Schedules differ in what they do *after* warm-up alone, so that any of them can be swapped or branched in
mid-run.
"""

import math


def wsd(x: float, minimum: float = 0.0, decay: float = 0.4, shape: str = "linear") -> float:
    """Warm-up, stable, decay; `decay` is the descent's share of x. shape: linear, cosine, exponential, sqrt
    (1 - sqrt)."""
    if shape not in ("linear", "cosine", "exponential", "sqrt"):
        raise ValueError(f"--schedule.shape={shape} is none of linear, cosine, exponential, sqrt")
    if x <= 1 - decay or decay == 0:
        return 1.0
    d = (x - (1 - decay)) / decay  # 0 at the start of the descent, 1 at its end
    if shape == "exponential":  # never reaches 0: without a minimum it ends at 1/1000
        return (minimum or 1e-3) ** d
    fall = {"linear": 1 - d, "cosine": (1 + math.cos(math.pi * d)) / 2, "sqrt": 1 - math.sqrt(d)}[shape]
    return minimum + (1 - minimum) * fall


def cosine(x: float, minimum: float = 0.0) -> float:
    return minimum + (1 - minimum) * (1 + math.cos(math.pi * x)) / 2


def linear(x: float, minimum: float = 0.0) -> float:
    return 1 - (1 - minimum) * x


def constant(x: float, minimum: float = 0.0) -> float:
    return 1.0


SHAPES = {"wsd": wsd, "cosine": cosine, "linear": linear, "constant": constant}
OURS = ("x", "minimum", "decay")  # arguments that multiplier() itself gives


def multiplier(name: str, step: int, steps: int, warmup: int = 0, minimum: float = 0.0,
               decay_frac: float = 0.4, **options) -> float:  # fmt: skip
    """What each group's initial lr is multiplied by at this step; name: a key of SHAPES, options: its own
    arguments.

    warmup in steps; decay_frac: wsd's descent as a share of all steps; minimum: where a decay ends, a share
    of lr.
    """
    if step < warmup:
        return (step + 1) / warmup
    after_warmup = max(1, steps - warmup)
    if name == "wsd":
        options["decay"] = min(1.0, decay_frac * steps / after_warmup)
    return SHAPES[name](min(1.0, (step - warmup) / after_warmup), minimum, **options)
