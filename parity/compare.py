"""Two recordings, tensor by tensor in order of execution: where do they part first?

    recording A   one process, or any layout: the oracle       tensor = its pieces, joined
    recording B   the layout in question                       each piece against A's tensor there

Of each step come, in this order: inputs, outputs and choices of experts as they were computed,
gradients of outputs as backward computed them, the experts' counts and terms, gradients of
parameters from the last to the first, their norm, clipped gradients, weights and the experts'
biases after the step. Integers and biases agree where they are equal; else a piece of B agrees
where

    rms(b - a)  <=  relative (rms(a) + share x the largest rms of its kind in this step)

where a loss, which has no dimensions and is large beside activations, counts for itself alone. A
weight agrees where the difference is within 10 relative beside its last update (Adam divides by the
gradient), or within four roundings of the weight. The bounds are those of the coarsest dtype in A's
forwards and backwards. Copies that several ranks hold are compared one by one, and summands are
added first. A parameter whose gradient is zero but for rounding (a bias of keys) is noise once an
optimizer like Adam has made full steps of it: its later weights, and what its module returns, are
left out.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parity.recording import KINDS, Key, Piece, Recording

# dtype: (relative difference, share of the largest of its kind, epsilon). Why: docs/parity.md.
TOLERANCE = {
    "F64": (1e-9, 1e-3, 2.0**-52),
    "F32": (1e-4, 1e-2, 2.0**-23),
    "F16": (2e-2, 1e-1, 2.0**-10),
    "BF16": (1e-1, 1e-1, 2.0**-7),
}


# ---- differences ---------------------------------------------------------------------------------
@dataclass
class Difference:
    """A tensor in which B is not A."""

    key: Key
    error: float  # rms(b - a) over what its bound is relative to, or inf
    relative: float = math.inf  # rms(b - a) / rms(a); of a weight, / rms(its last update)
    pieces: list[Piece] = field(default_factory=list)  # of B, those that differ
    n_pieces: int = 0
    why: str = ""  # where it is not the numbers: missing, another shape

    def __str__(self) -> str:
        step, kind, name = self.key
        when = f"after step {step}" if kind == "weight" else f"in step {step}"
        return f"{kind} of {name}, {when}"


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def strangers(a: Recording, b: Recording) -> bool:
    """Have both parameters, and at most one with the same name and shape?"""
    of_a = shapes(a)
    of_b = shapes(b)
    shared = [name for name in of_a.keys() & of_b.keys() if of_a[name] == of_b[name]]
    return len(shared) <= 1 < min(len(of_a), len(of_b))


def shapes(recording: Recording) -> dict[str, tuple]:
    """Each parameter's full shape."""
    found = {}
    for (_, kind, name), pieces in recording.entries.items():
        if kind in ("gradient", "weight"):
            found[name] = pieces[0].shape
    return found


class Comparison:
    """A and B. Raises ValueError where they have nothing in common."""

    def __init__(self, a: Recording, b: Recording):
        self.a = a
        self.b = b
        common = a.entries.keys() & b.entries.keys()
        if not any(kind in KINDS for _, kind, _ in common) or strangers(a, b):
            some = ", ".join(sorted({name for _, _, name in b.entries})[:4])
            raise ValueError(
                "the second recording is of another model, or --names=map.toml has to say which of"
                f" its names ({some}, ...) are which of the first"
            )
        # A parameter's gradient or weight that only one of them has is a difference.
        steps = min(a.steps, b.steps)
        self.order = []
        for key in a.order:
            is_parameter = key[1] in ("gradient", "weight") and key[0] <= steps
            if key in common or is_parameter:
                self.order.append(key)
        self.scales = {}  # (step, phase) -> largest rms of A
        self.noisy = set()  # parameters whose gradients are rounding alone
        self.errors = {}  # key -> largest error, of what agrees too
        self.of_bound = 0.0  # the largest error, as a share of its bound

    def lacking(self) -> str:
        """What of A is compared with nothing, in a sentence; "" where all is compared."""
        found = []
        for kind in KINDS:
            names = [key[2] for key in self.a.order if key[1] == kind and key not in self.b.entries]
            names = [name for name in dict.fromkeys(names) if not self.is_in_b(kind, name)]
            if names and not any(key[1] == kind for key in self.b.entries):
                found.append(f"B has no {kind}")
            elif names:
                dots = ", ..." if len(names) > 4 else ""
                found.append(f"B has no {kind} of {', '.join(names[:4])}{dots}")
        if self.b.steps < self.a.steps:
            found.append(f"B ends after step {self.b.steps}")
        n = len(self.order)
        total = len(self.a.order)
        if not found and n == total:
            return ""
        return "; ".join([f"{n} of A's {total} tensors are compared", *found])

    def is_in_b(self, kind: str, name: str) -> bool:
        """In any step."""
        return any((step, kind, name) in self.b.entries for step in range(self.b.steps + 1))

    def scale(self, key: Key) -> float:
        """The largest rms in A of this kind in this step; of a loss, its own.

        A loss that is summed over all tokens is large beside activations, and no measure for them.
        """
        group = key[:2]
        if self.is_number(key):
            return rms(self.a.whole(key))
        if group not in self.scales:
            same = [k for k in self.order if k[:2] == group and not self.is_number(k)]
            self.scales[group] = max(rms(self.a.whole(k)) for k in same)
        return self.scales[group]

    def is_number(self, key: Key) -> bool:
        """Is it a sum over tokens without dimensions, such as a loss?"""
        return key[1] in ("output", "term") and self.a.entries[key][0].shape == ()

    def update(self, key: Key) -> Tensor:
        """A's change of this weight in its last step; the weight itself before the first."""
        step, kind, name = key
        before = (step - 1, kind, name)
        if before not in self.a.entries:
            return self.a.whole(key)
        return self.a.whole(key) - self.a.whole(before)

    def check(self, key: Key) -> Difference | None:
        if key not in self.b.entries:
            return Difference(key, math.inf, why="B has none")
        a = self.a.whole(key)
        step, kind, name = key
        relative, share, epsilon = TOLERANCE[self.a.coarsest]
        if kind == "gradient" and rms(a) <= relative * share * self.scale(key):
            # Zero but for rounding, as of a bias of keys. Adam makes full steps of it.
            self.noisy.add(name)
        if kind != "weight":
            size = rms(a)
            extra = share * self.scale(key)
        else:
            # What counts is the last update; but a weight is no more exact than its dtype. Adam
            # divides small gradients by themselves: their rounding becomes the step's.
            relative = 10 * relative
            size = rms(self.update(key))
            extra = 4 * epsilon * rms(a) / relative if step > 0 else 0.0
        covered = torch.zeros(a.shape, dtype=torch.bool)
        worst = 0.0
        relatively = 0.0
        bad = []
        n = 0
        for piece, x in self.b.blocks(key):
            n += 1
            if piece.shape != tuple(a.shape):
                why = f"its shape is {piece.shape}, not {tuple(a.shape)}"
                return Difference(key, math.inf, pieces=[piece], n_pieces=n, why=why)
            where = piece.where(tuple(x.shape))
            covered[where] = True
            there = a[where]
            if not x.is_floating_point() or kind == "selection_bias":
                if not torch.equal(there, x.to(there.dtype)):
                    bad.append(piece)
                    worst = 1.0
                    relatively = 1.0
                continue
            if self.is_noise(key):
                continue
            # What is far smaller than the others of its kind is no more exact than they are.
            base = size + extra
            gap = rms(x.double() - there)
            error = gap / max(base, 1e-300) if gap == gap else math.inf
            worst = max(worst, error)
            if error > relative:
                bad.append(piece)
                own = rms(there) if kind != "weight" else size
                relatively = max(relatively, gap / own if own and gap == gap else math.inf)
        if not covered.all():
            first = (~covered).nonzero()[0].tolist()
            why = f"no rank has the entries from {first} on"
            return Difference(key, math.inf, pieces=bad, n_pieces=n, why=why)
        self.errors[key] = worst
        self.of_bound = max(self.of_bound, worst / relative)
        return Difference(key, worst, relatively, bad, n) if bad else None

    def is_noise(self, key: Key) -> bool:
        """A weight whose gradients are rounding, and what is computed with it at once.

        After the softmax the noise is gone again.
        """
        _, kind, name = key
        if kind == "weight":
            return name in self.noisy
        modules = {noisy.rpartition(".")[0] for noisy in self.noisy}
        parent, _, word = name.rpartition(".")
        if word.startswith("rotated_"):
            return any(module.rpartition(".")[0] == parent for module in modules)
        return kind == "output" and name in modules

    def first(self) -> Difference | None:
        """The first difference in order of execution."""
        for key in self.order:
            found = self.check(key)
            if found is not None:
                return found
        return None

    def others(self, difference: Difference) -> list[Difference]:
        """What else of its step and kind differs."""
        found = []
        for key in self.order:
            if key[:2] == difference.key[:2]:
                other = self.check(key)
                if other is not None:
                    found.append(other)
        return found
