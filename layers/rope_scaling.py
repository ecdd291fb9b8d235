"""Rotary frequencies for sequences longer than those that a model was trained on.

Position p turns pair i of a head by the angle p f_i; f_i = base^(-2i/D). A scaling stretches waves:

    linear:FACTOR                      f_i / FACTOR, which is p / FACTOR: positions interpolated
    llama3:FACTOR:LOW:HIGH:ORIGINAL    f_i where ORIGINAL tokens hold HIGH waves or more,
                                       f_i / FACTOR where they hold LOW waves or fewer,
                                       between them a mixture of both:
        s = (ORIGINAL f_i / 2π - LOW) / (HIGH - LOW), between 0 and 1
        s f_i + (1 - s) f_i / FACTOR

References: Chen et al. 2023 (2306.15595); Grattafiori et al. 2024 (2407.21783), whose Llama 3.1 has
llama3:8:1:4:8192.

Example:
    import torch
    from layers.rope_scaling import parse, scaled
    f = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    found = scaled(f, parse("llama3:8:1:4:8192"))
    assert torch.equal(found[:20], f[:20])  # fast ones turn as before
    assert torch.equal(found[-20:], f[-20:] / 8)
"""

import inspect
import math
import re
from typing import NamedTuple

from torch import Tensor

NUMBER = r"[0-9]{1,12}(?:\.[0-9]{1,12})?"
FORMS = rf"linear:({NUMBER})|llama3:({NUMBER}):({NUMBER}):({NUMBER}):([0-9]{{1,12}})"


class Scaling(NamedTuple):
    factor: float
    # Waves in `original` tokens; None scales all frequencies alike.
    low: float | None = None
    high: float | None = None
    original: int | None = None  # tokens of the sequences before


def parse(text: str | None) -> Scaling | None:
    """What --rope_scaling says. Raises ValueError for what is none of the two forms."""
    if text is None:
        return None
    found = re.fullmatch(FORMS, text)
    hint = "type --rope_scaling=linear:4, or --rope_scaling=llama3:8:1:4:8192"
    if found is None:
        raise ValueError(
            f"rope_scaling={text[:60]!r} is neither linear:FACTOR nor"
            f" llama3:FACTOR:LOW:HIGH:ORIGINAL; {hint}"
        )
    every, factor, low, high, original = found.groups()
    if every is not None:
        scaling = Scaling(float(every))
    else:
        scaling = Scaling(float(factor), float(low), float(high), int(original))
    if scaling.factor < 1:
        raise ValueError(f"rope_scaling={text}: the factor must be at least 1; {hint}")
    if scaling.original is not None and not (scaling.low < scaling.high and scaling.original > 0):
        raise ValueError(
            f"rope_scaling={text}: LOW must be below HIGH, and ORIGINAL, tokens, above 0; {hint}"
        )
    return scaling


def scaled(frequency: Tensor, scaling: Scaling | None) -> Tensor:
    """The frequencies (D/2,), radians a token, stretched."""
    if scaling is None:
        return frequency
    slow = frequency / scaling.factor
    if scaling.original is None:
        return slow
    waves = scaling.original * frequency / (2 * math.pi)
    share = ((waves - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return share * frequency + (1 - share) * slow


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
