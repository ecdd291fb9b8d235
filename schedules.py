"""Learning-rate and batch-size schedules: pure functions from the step to a multiplier or a size.

`step` counts updates from 0, `steps` is their number in all. A schedule multiplies each group's own
initial lr. Every schedule starts with linear warm-up over W steps:

    (step + 1) / W                     the first update already moves (from 0 it would be lost)
    start + (1 - start) step / W       with a start factor, as torch's LinearLR

and then runs its shape on t = step - W of T = steps - W, with x = t / T:

    wsd           1, then over the last decay_frac of all steps down to minimum: Hu et al. 2024
                  (2404.06395); with shape=power modded-nanogpt's PowerCool
    cosine        minimum + (1 - minimum) (1 + cos(2 pi cycles x)) / 2
    linear        1 - (1 - minimum) x
    constant      1
    inverse_sqrt  sqrt(s / (s + t)), s = timescale or W: Vaswani et al. 2017
    sgdr          cosine over T_0 steps, then again from 1 over T_mult times as many, ...
                  Loshchilov & Hutter 2017 (1608.03983)
    onecycle      from 1/div_factor up to 1 over pct_start of T, then down to
                  1/(div_factor final_div_factor): Smith & Topin 2019 (1708.07120); equal to torch's
                  OneCycleLR where W = 0

Shapes differ only after warm-up, so a run can branch off into any of them: with
`--resume=RUN/step-... --schedule=...` the stable phase of a WSD run ends in another decay. WSD is
MiniCPM's; Llama 2, often named for it, used cosine. In some texts a cosine starts at lr 0, which
loses a step, or all groups get one lr, which loses their differences.

Example:
    import torch
    from schedules import follow, multiplier
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    lrs = []
    for step in range(100):
        factor = multiplier("wsd", step, steps=100, warmup=10, decay_frac=0.4)
        follow(optimizer.param_groups, step, factor)
        lrs.append(optimizer.param_groups[0]["lr"])
    assert abs(lrs[0] - 0.01) < 1e-9  # the first of 10 steps of warm-up
    assert lrs[10] == lrs[60] == 0.1
    assert abs(lrs[80] - 0.05) < 1e-9  # half of the descent
"""

import inspect
import math

SHAPES_OF_WSD = ("linear", "cosine", "exponential", "sqrt", "power")


def wsd(
    t: int,
    T: int,
    minimum: float = 0.0,
    decay: int = 0,
    shape: str = "linear",
    power: float = 1.0,
) -> float:
    """Warm-up, stable, decay. shape: linear, cosine, exponential, sqrt (1 - sqrt) or power.

    decay: steps of the descent; power: the exponent of what is left of it, for shape=power. Raises
    ValueError for another shape, and for a power that is not above 0 or has no use.
    """
    if shape not in SHAPES_OF_WSD:
        raise ValueError(f"--schedule.shape={shape} is none of {', '.join(SHAPES_OF_WSD)}")
    if not power > 0 or (power != 1 and shape != "power"):
        raise ValueError(f"--schedule.power={power:g} must be above 0, with --schedule.shape=power")
    if t <= T - decay:
        return 1.0
    d = (t - (T - decay)) / decay  # 0 at the start of the descent, 1 at its end
    # An exponential never reaches 0: without a minimum it ends at 1/1000.
    if shape == "exponential":
        return (minimum or 1e-3) ** d
    if shape == "linear":
        fall = 1 - d
    elif shape == "power":
        fall = (1 - d) ** power
    elif shape == "cosine":
        fall = (1 + math.cos(math.pi * d)) / 2
    else:
        fall = 1 - math.sqrt(d)
    return minimum + (1 - minimum) * fall


def cosine(t: int, T: int, minimum: float = 0.0, cycles: float = 0.5) -> float:
    """cycles: whole waves until the end; 0.5 goes down once."""
    return minimum + (1 - minimum) * (1 + math.cos(2 * math.pi * cycles * t / T)) / 2


def linear(t: int, T: int, minimum: float = 0.0) -> float:
    return 1 - (1 - minimum) * t / T


def constant(t: int, T: int) -> float:
    return 1.0


def inverse_sqrt(t: int, T: int, minimum: float = 0.0, timescale: float = 1.0) -> float:
    """timescale, in steps: the length of the warm-up unless given."""
    if not timescale > 0:
        raise ValueError(f"--schedule.timescale={timescale} must be above 0 (steps)")
    return max(minimum, math.sqrt(timescale / (timescale + t)))


def sgdr(t: int, T: int, minimum: float = 0.0, T_0: int = 0, T_mult: int = 2) -> float:
    """T_0: steps of the first cycle, 0: three cycles fill T. T_mult: growth of a cycle.

    Raises ValueError for numbers that are not whole, or too small.
    """
    if T_0 < 0 or T_0 != int(T_0) or T_mult < 1 or T_mult != int(T_mult):
        raise ValueError(
            f"--schedule.T_0={T_0} must be a whole number from 0, T_mult={T_mult} one from 1"
        )
    # Three cycles are 1 + T_mult + T_mult² times as long as the first: so they fill T.
    length = T_0 or max(1, T // (1 + T_mult + T_mult**2))
    while t >= length:
        t -= length
        length *= T_mult
    return minimum + (1 - minimum) * (1 + math.cos(math.pi * t / length)) / 2


def onecycle(
    t: int,
    T: int,
    minimum: float = 0.0,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> float:
    """The end is 1/(div_factor final_div_factor), or `minimum` where that is higher.

    Raises ValueError for options out of range.
    """
    if not (0 < pct_start < 1 and div_factor >= 1 and final_div_factor >= 1):
        raise ValueError(
            f"onecycle takes pct_start={pct_start} between 0 and 1, div_factor={div_factor} and "
            f"final_div_factor={final_div_factor} from 1"
        )
    start = 1 / div_factor
    end = max(minimum, 1 / (div_factor * final_div_factor))
    # As torch counts it, the peak is at step pct_start T - 1, and the end at T - 1.
    top = pct_start * T - 1
    if t <= top and top <= 0:
        return 1.0
    if t <= top:
        return start + (1 - start) * (1 - math.cos(math.pi * t / top)) / 2
    return end + (1 - end) * (1 + math.cos(math.pi * (t - top) / (T - 1 - top))) / 2


SHAPES = {f.__name__: f for f in (wsd, cosine, linear, constant, inverse_sqrt, sgdr, onecycle)}
# Their value at a step does not depend on T: a run may be made longer without a jump in lr.
ENDLESS = (constant, inverse_sqrt)
# multiplier() sets these arguments, so they are no options of --schedule.NAME=.
OURS = ("t", "T", "minimum", "decay")


def takes(name: str, argument: str) -> bool:
    """Has this shape such an argument? --min_lr_frac sets `minimum`, --decay_frac `decay`."""
    return argument in inspect.signature(SHAPES[name]).parameters


def is_endless(name: str) -> bool:
    return SHAPES[name] in ENDLESS


def multiplier(
    name: str,
    step: int,
    steps: int,
    warmup: int = 0,
    minimum: float = 0.0,
    decay_frac: float = 0.4,
    warmup_start: float | None = None,
    **options,
) -> float:
    """The factor of each group's initial lr at this step.

    name: a key of SHAPES; options: its arguments; warmup: steps; warmup_start: the factor it starts
    from; minimum: where a decay ends; decay_frac: wsd's descent as a share of all steps. Raises
    ValueError for options out of range.
    """
    if step < warmup and warmup_start is None:
        return (step + 1) / warmup
    if step < warmup:
        return warmup_start + (1 - warmup_start) * step / warmup
    # At least 1: shapes divide by T, and a run may be all warm-up.
    T = max(1, steps - warmup)
    if takes(name, "minimum"):
        options["minimum"] = minimum
    if takes(name, "decay"):
        options["decay"] = min(T, round(decay_frac * steps))
    if name == "inverse_sqrt":
        options.setdefault("timescale", max(1, warmup))
    # Past the end the last value stays.
    return SHAPES[name](min(step - warmup, T), T, **options)


def follow(
    groups: list[dict],
    step: int,
    factor: float | dict[str, float],
    momentum_warmup: int | None = None,
    momentum_cooldown: int | None = None,
    steps: int = 0,
) -> None:
    """Sets the lr of each group to `factor` times the lr that it was made with.

    factor: of all groups, or kind -> factor of the groups of this `kind`. momentum_warmup,
    momentum_cooldown: of the run's `steps` the first, over which the groups' momentum warms up, and
    the last, over which it cools down; both None: it stays. Where they meet, the one counts that
    has come less far. Raises ValueError for a cool-down without `steps`.
    """
    if momentum_cooldown is not None and steps < 1:
        raise ValueError(
            "momentum_cooldown counts from the end: give follow() the run's steps, too"
        )
    for group in groups:
        own = factor[group["kind"]] if isinstance(factor, dict) else factor
        # What hooks/ema.py and ema_nesterov.py go by: a step that is skipped counts, too.
        for key in ("ema_steps", "ahead_steps"):
            if key in group:
                group[key] = step
        if "follow" in group:
            group["follow_factor"] = factor[group["follow"]] if isinstance(factor, dict) else factor
        # The first call keeps the group's own lr, under the key of torch's schedulers.
        group["lr"] = own * group.setdefault("initial_lr", group["lr"])
        if momentum_warmup is not None or momentum_cooldown is not None:
            usual = group.setdefault("initial_momentum", group["momentum"])
            ways = (step, momentum_warmup), (steps - step, momentum_cooldown)
            come, of = min((way for way in ways if way[1] is not None), key=lambda x: x[0] / x[1])
            group["momentum"] = momentum_at(come, of, MOMENTUM, usual)


MOMENTUM = 0.85  # where the nanoGPT speedruns start, and end


def momentum_at(step: int, warmup: int, start: float, end: float) -> float:
    """Momentum warm-up, linear: a long memory is of little use while gradients still turn fast.

    A cool-down is the same, with `step` the steps that are left.
    """
    if step >= warmup:
        return end
    return start + (end - start) * step / warmup


def scaled_lr(lr: float, rule: str | None, batch_size: int, base_batch_size: int | None) -> float:
    """lr for another batch size; both rules fail at large batches.

    linear: Goyal et al. 2017 (1706.02677), for SGD; sqrt: keeps Adam's noise, Malladi et al. 2022
    (2205.10287); None: lr as it is.
    """
    if rule is None:
        return lr
    power = {"linear": 1.0, "sqrt": 0.5}[rule]
    return lr * (batch_size / base_batch_size) ** power


def batch_at(step: int, batch_size: int, start: int | None = None, ramp: int | None = None) -> int:
    """Batch-size ramp: start, 2 start, ... batch_size, evenly over `ramp` steps.

    Brown et al. 2020 (2005.14165).
    """
    if ramp is None or step >= ramp:
        return batch_size
    return start * (1 + step * (batch_size // start) // ramp)


if __name__ == "__main__":
    print("after            0      10      30      60      90     100 of 100 steps, warm-up 10")
    for name in SHAPES:
        at = [multiplier(name, step, 100, warmup=10) for step in (0, 10, 30, 60, 90, 100)]
        print(f"{name:12}", *(f"{x:7.4f}" for x in at))
