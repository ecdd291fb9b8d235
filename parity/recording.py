"""A recording that is read: what parity/record.py wrote, by step, kind and name, joined on demand.

Names of another trainer can be mapped: `names`, from a TOML file, with * for any word of a name:

    [names]
    "model.layers.*.self_attn.q_proj" = "blocks.*.attn.q"
"""

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

COARSEST = ("BF16", "F16", "F32", "F64")
# In the order in which a step computes them; of a recording, "part" is not compared.
KINDS = (
    "input",
    "output",
    "choice",
    "output_gradient",
    "counts",
    "term",
    "gradient",
    "norm",
    "clipped",
    "weight",
    "selection_bias",
)
Key = tuple[int, str, str]  # step, kind, name


class File:
    """A file of pieces, opened when the first is read."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def open(self):
        return safe_open(self.path, "pt")

    def load(self, key: str) -> Tensor:
        """Raises ValueError where the file is missing or damaged."""
        try:
            return self.open.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path} cannot be read: {str(error).splitlines()[0]}") from None


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
        return self.file.load(self.key)

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
    """A folder that parity/record.py wrote. Raises ValueError where it is none, or not whole."""

    def __init__(self, folder, names: dict[str, str] | None = None):
        self.folder = Path(folder)
        self.ranks = {}  # rank -> {"axes": ...}
        self.entries: dict[Key, list[Piece]] = {}
        self.files = {}  # name -> File
        self.groups = {}  # steps done -> the optimizer's groups
        files = sorted(self.folder.glob("rank_*.jsonl"))
        if not files:
            raise ValueError(f"{folder}: no recording there (it has no rank_0.jsonl)")
        renamed = Renaming(names or {})
        for path in files:
            self.read_file(path, renamed)
        self.axes = self.ranks[min(self.ranks)]["axes"]
        world = max(fact.get("world", 1) for fact in self.ranks.values())
        missing = [str(rank) for rank in range(world) if rank not in self.ranks]
        if missing:
            raise ValueError(
                f"{folder}: of {world} ranks {', '.join(missing)} is missing; copy its rank_N.*"
                " here, or record with world=1 what one process of a larger job does alone"
            )
        if not self.entries:
            raise ValueError(f"{folder}: nothing is recorded there: no step was made")
        if names and not renamed.used:
            some = ", ".join(sorted({key[2] for key in self.entries})[:4])
            raise ValueError(f"--names= matches no name in {folder} ({some}, ...)")

    def read_file(self, path: Path, renamed: "Renaming") -> None:
        number = 0
        try:
            rank = int(path.stem.rpartition("_")[2])
            for line in path.read_text(encoding="utf-8").splitlines():
                number += 1
                self.read(json.loads(line), rank, renamed)
        except (ValueError, KeyError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}, line {number}, cannot be read: {what}") from None
        if "axes" not in self.ranks.get(rank, {}):
            raise ValueError(f"{path} is empty or lacks its first line: record again")

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
        """The coarsest dtype that any forward or backward has here, such as BF16."""
        found = set()
        for (_, kind, _), pieces in self.entries.items():
            if kind in ("output", "output_gradient", "gradient"):
                found |= {piece.dtype for piece in pieces}
        return next((dtype for dtype in COARSEST if dtype in found), "F64")

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
    """Inputs, outputs and choices come together."""
    return max(KINDS.index("choice"), KINDS.index(kind))


class Renaming:
    """What a name of another trainer is here. used: did a pattern match any?"""

    def __init__(self, names: dict[str, str]):
        self.patterns = []
        self.used = False
        for theirs, ours in names.items():
            regex = re.compile(re.escape(theirs).replace(r"\*", r"([^.]+)") + r"(?=$|[.\[#])")
            self.patterns.append((regex, ours.split("*")))

    def __call__(self, name: str) -> str:
        for regex, words in self.patterns:
            found = regex.match(name)
            if found:
                self.used = True
                stars = [*found.groups()][: len(words) - 1] + [""]
                return "".join(w + star for w, star in zip(words, stars)) + name[found.end() :]
        return name


def read_names(path) -> dict[str, str]:
    """The table [names] of a TOML file. Raises ValueError."""
    wants = f"--names={path}: wants a TOML file with a table [names]"
    try:
        names = tomllib.loads(Path(path).read_text(encoding="utf-8")).get("names")
    except (OSError, ValueError) as error:
        raise ValueError(f"{wants}: {error}") from None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{wants}; it has none")
    for theirs, ours in names.items():
        if not isinstance(ours, str):
            raise ValueError(f'--names={path}: "{theirs}" = {ours} is no name; type "a.*.b"')
        if ours.count("*") > theirs.count("*"):
            raise ValueError(f'--names={path}: "{ours}" has more * than "{theirs}"')
    return names
