"""Two recordings, tensor by tensor in order of execution: where do they part first?

    recording A   one process, or any layout: the oracle       tensor = its pieces, joined
    recording B   the layout in question                       each piece against A's tensor there

Of each step come, in this order: inputs and outputs as they were computed, gradients of outputs as
backward computed them, gradients of parameters from the last to the first, their norm, clipped
gradients, weights after the step. A piece of B agrees where

    rms(b - a)  <=  relative (rms(a) + share x the largest rms of its kind in this step)

and a weight where the difference is within 10 relative beside its last update (Adam divides by the
gradient), or within four roundings of the weight. The bounds are those of the coarsest dtype in A's forwards and backwards. Copies that
several ranks hold are compared one by one, and summands are added first. A parameter whose
gradient is zero but for rounding (a bias of keys) is noise once an optimizer like Adam has made
full steps of it: its later weights, and what its module returns, are left out.

Names may differ: `names`, read from a TOML file, maps B's to A's, with * for any word:

    [names]
    "model.layers.*.self_attn.q_proj" = "blocks.*.attn.q"
"""

import json
import math
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

KINDS = ("input", "output", "output_gradient", "gradient", "norm", "clipped", "weight")
# dtype: (relative difference, share of the largest of its kind, epsilon). Why: docs/parity.md.
TOLERANCE = {
    "F64": (1e-9, 1e-3, 2.0**-52),
    "F32": (1e-4, 1e-2, 2.0**-23),
    "F16": (2e-2, 1e-1, 2.0**-10),
    "BF16": (1e-1, 1e-1, 2.0**-7),
}
Key = tuple[int, str, str]  # step, kind, name


class File:
    """A file of pieces, opened when the first is read."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def open(self):
        return safe_open(self.path, "pt")


@dataclass(frozen=True)
class Piece:
    """A tensor in a file, and where it lies in the full one (parity/record.py)."""

    rank: int
    shape: tuple[int, ...]
    index: tuple
    part: str
    dtype: str
    at: int
    file: File
    key: str

    def load(self) -> Tensor:
        return self.file.open.get_tensor(self.key)

    def where(self, local: tuple[int, ...]) -> tuple:
        """What indexes the full tensor at this piece."""
        box = all(isinstance(i, int) for i in self.index)
        if box:
            return tuple(slice(i, i + n) for i, n in zip(self.index, local))
        found = []
        for dim, (i, n) in enumerate(zip(self.index, local)):
            ids = torch.arange(i, i + n) if isinstance(i, int) else torch.tensor(i)
            found.append(ids.view(-1, *[1] * (len(local) - 1 - dim)))
        return tuple(found)

    @property
    def place(self) -> tuple:
        return self.shape, tuple(tuple(i) if isinstance(i, list) else i for i in self.index)


class Recording:
    """A folder that parity/record.py wrote. Raises ValueError where it is none."""

    def __init__(self, folder, names: dict[str, str] | None = None):
        self.folder = Path(folder)
        self.ranks = {}  # rank -> its axes and what it is about
        self.entries: dict[Key, list[Piece]] = {}
        self.files = {}  # name -> File
        self.groups = {}  # steps done -> the optimizer's groups
        files = sorted(self.folder.glob("rank_*.jsonl"))
        if not files:
            raise ValueError(f"{folder} is no recording: it has no rank_0.jsonl")
        renamed = renaming(names or {})
        for path in files:
            rank = int(path.stem.rpartition("_")[2])
            for line in path.read_text(encoding="utf-8").splitlines():
                self.read(json.loads(line), rank, renamed)
        self.axes = self.ranks[min(self.ranks)]["axes"]

    def read(self, fact: dict, rank: int, renamed) -> None:
        if "kind" not in fact:
            if "groups" in fact:
                self.groups[fact["step"]] = fact["groups"]
            else:
                self.ranks[rank] = fact
            return
        name = fact["file"]
        if name not in self.files:
            self.files[name] = File(self.folder / name)
        piece = Piece(
            rank,
            tuple(fact["shape"]),
            tuple(fact["index"]),
            fact["part"],
            fact["dtype"],
            fact["at"],
            self.files[name],
            fact["key"],
        )
        key = (fact["step"], fact["kind"], renamed(fact["name"]))
        self.entries.setdefault(key, []).append(piece)

    def coordinates(self, rank: int) -> dict[str, int]:
        return {axis: at for axis, (_, at) in self.ranks[rank]["axes"].items()}

    @cached_property
    def order(self) -> list[Key]:
        """All that is compared, in order of execution."""
        first = {key: min(p.at for p in pieces) for key, pieces in self.entries.items()}
        keys = [key for key in self.entries if key[1] in KINDS]
        backwards = ("gradient", "clipped")

        def rank(key: Key) -> tuple:
            at = -first[key] if key[1] in backwards else first[key]
            return key[0], phase(key[1]), at

        return sorted(keys, key=rank)

    @cached_property
    def coarsest(self) -> str:
        """The dtype with the widest bounds that any forward or backward has here."""
        found = set()
        for (_, kind, _), pieces in self.entries.items():
            if kind in ("output", "output_gradient", "gradient"):
                found |= {piece.dtype for piece in pieces}
        return max(found & TOLERANCE.keys(), key=TOLERANCE.get, default="F64")

    @property
    def steps(self) -> int:
        return max(key[0] for key in self.entries)

    def blocks(self, key: Key) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece, one at a time; summands with one place come as their sum."""
        by_place = {}
        for piece in self.entries[key]:
            by_place.setdefault(piece.place, {}).setdefault(piece.part, []).append(piece)
        for parts in by_place.values():
            if len(parts) == 1:
                for piece in next(iter(parts.values())):
                    yield piece, piece.load()
                continue
            firsts = [pieces[0] for pieces in parts.values()]
            total = firsts[0].load()
            for piece in firsts[1:]:
                total = total + piece.load()
            yield firsts[0], total

    def whole(self, key: Key) -> Tensor:
        """The full tensor, in float64 or int64; NaN where no piece lies."""
        full = None
        for piece, x in self.blocks(key):
            if full is None:
                dtype = torch.float64 if x.is_floating_point() else torch.int64
                start = torch.nan if x.is_floating_point() else -1
                full = torch.full(piece.shape, start, dtype=dtype)
            if x.numel():
                full[piece.where(tuple(x.shape))] = x.to(full.dtype)
        return full


def phase(kind: str) -> int:
    """Inputs and outputs come together."""
    return max(1, KINDS.index(kind))


def renaming(names: dict[str, str]):
    patterns = []
    for theirs, ours in names.items():
        regex = re.compile(re.escape(theirs).replace(r"\*", r"([^.]+)") + r"(?=$|[.\[#])")
        patterns.append((regex, re.sub(r"\*", "{}", ours)))

    def renamed(name: str) -> str:
        for regex, ours in patterns:
            found = regex.match(name)
            if found:
                return ours.format(*found.groups()) + name[found.end() :]
        return name

    return renamed


def read_names(path) -> dict[str, str]:
    """The table [names] of a TOML file. Raises ValueError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        names = tomllib.loads(text)["names"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--names={path}: wants a TOML file with a table [names]: {error}")
    return names


# ---- differences ---------------------------------------------------------------------------------
@dataclass
class Difference:
    """A tensor in which B is not A."""

    key: Key
    error: float  # rms(b - a) / rms(a), or inf
    pieces: list[Piece] = field(default_factory=list)  # of B, those that differ
    n_pieces: int = 0
    why: str = ""  # where it is not the numbers: missing, another shape

    def __str__(self) -> str:
        step, kind, name = self.key
        when = f"after step {step}" if kind == "weight" else f"in step {step}"
        return f"{kind} of {name}, {when}"


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


class Comparison:
    """A and B. Raises ValueError where they have nothing in common."""

    def __init__(self, a: Recording, b: Recording):
        self.a = a
        self.b = b
        common = a.entries.keys() & b.entries.keys()
        if not any(kind in KINDS for _, kind, _ in common):
            some = ", ".join(sorted({name for _, _, name in b.entries})[:4])
            raise ValueError(
                f"the recordings have no tensor in common; --names=map.toml says which names of"
                f" the second ({some}, ...) are which of the first"
            )
        # A parameter's gradient or weight that only one of them has is a difference.
        steps = min(a.steps, b.steps)
        self.order = []
        for key in a.order:
            is_parameter = key[1] in ("gradient", "weight") and key[0] <= steps
            if key in common or is_parameter:
                self.order.append(key)
        self.only_a = {key[1:] for key in a.order} - {key[1:] for key in b.order}
        self.only_b = {key[1:] for key in b.order} - {key[1:] for key in a.order}
        self.scales = {}  # (step, phase) -> largest rms of A
        self.noisy = set()  # parameters whose gradients are rounding alone
        self.errors = {}  # key -> largest error, of what agrees too

    def scale(self, key: Key) -> float:
        """The largest rms in A of this kind in this step."""
        group = key[:2]
        if group not in self.scales:
            same = [k for k in self.order if k[:2] == group and k in self.a.entries]
            self.scales[group] = max(rms(self.a.whole(k)) for k in same)
        return self.scales[group]

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
        bad = []
        n = 0
        for piece, x in self.b.blocks(key):
            n += 1
            if piece.shape != tuple(a.shape):
                why = f"its shape is {piece.shape}, not {tuple(a.shape)}"
                return Difference(key, math.inf, [piece], n, why)
            where = piece.where(tuple(x.shape))
            covered[where] = True
            there = a[where]
            if not x.is_floating_point():
                if not torch.equal(there, x.long()):
                    bad.append(piece)
                    worst = 1.0
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
        if not covered.all():
            first = (~covered).nonzero()[0].tolist()
            return Difference(key, math.inf, bad, n, f"no rank has the entries from {first} on")
        self.errors[key] = worst
        return Difference(key, worst, bad, n) if bad else None

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
