"""Atomic, verified checkpoints that any parallel layout can load; loading runs no code (no pickle).

    OUT_DIR/step-00000123/
        rank_0.safetensors     what rank 0 wrote: full tensors, or its slices of them
        rank_1.safetensors     ... (a rank with nothing to write has no file)
        files.json             file -> sha256, bytes of each rank's file
        index.json             {"body": {...}, "sha256": checksum of the body}

    body["tensors"]     name -> dtype, global shape, number of its sharding
    body["shardings"]   which rank has which box of a tensor, see checkpoint/shardings.py
    body["tree"]        what was saved, with {"$": "tensor"} for a tensor, {"$": "nan"} for a
                        number that is not finite
    body["world"]       how many ranks have saved
    body["files"]       sha256, bytes of files.json

index.json does not grow with the ranks: many tensors share a sharding, and that is a few rules.
files.json does, and only who verifies every file reads it. Format 1, which every checkpoint had
before, has one list of all slices instead; checkpoint/format_1.py reads it.

A tensor's name is its path in the tree: "model/blocks.0.attn.q.weight". A slice is a shard of
the full tensor, and reading a shard touches only the slices that overlap it, so every layout loads
what any other layout saved:

    4 ranks saved             2 ranks read
    rank 0: rows 0, 1 ─┬───►  rank 0: rows 0..3
    rank 1: rows 2, 3 ─┘
    rank 2: rows 4, 5 ─┬───►  rank 1: rows 4..7
    rank 3: rows 6, 7 ─┘

A save writes .tmp-step-N, syncs it to the disk, renames it, and only then deletes old ones: killed
at any moment, the run keeps a good checkpoint. All ranks see the same OUT_DIR; only the holder of
its RunLock saves.
"""

import contextlib
import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError

from checkpoint import format_1, plan, shardings
from checkpoint.foreign import foreign
from checkpoint.save import FILE, FOLDER, FORMAT, file_of, found
from checkpoint.slices import DTYPES, TENSOR, as_json, sha256, walk
from checkpoint.tensor_file import TensorFile, sha256_of
from parallel.shard import Shard


class CheckpointDamaged(ValueError):
    """A checkpoint that is not what was written; the message says what is wrong."""


class Checkpoint:
    """What `load` returns: a checkpoint on the disk, to be read as a whole or in parts.

    Files are opened at the first read. Tensors come back on the CPU.
    """

    def __init__(self, path: Path, body: dict):
        self.path = path
        self.step = body["step"]
        self._world = body["world"]
        self._files = body["files"]
        self._tensors = body["tensors"]
        self._shardings = body["shardings"]
        self._tree = body["tree"]
        self._open = {}  # rank -> its TensorFile

    def names(self) -> list[str]:
        return list(self._tensors)

    def tree(self, prefix: str | None = None, shard: Shard | None = None, shape=None, missing=None):
        """What was saved, with full tensors, or one branch of it.

        prefix: the branch, such as "model" or "optim/state"; missing: what to return where there is
        no such branch (None: raise ValueError). shard: of tensors that have its global shape only
        this shard is read; shape: its local shape.
        """
        # In a path, an element of a list goes by its number, as in "name/0".
        node = self._tree
        for key in prefix.split("/") if prefix else []:
            try:
                node = node[int(key) if isinstance(node, list) else key]
            except (KeyError, IndexError, ValueError, TypeError):
                if missing is not None:
                    return missing
                raise ValueError(
                    f"{self.path} has no {prefix!r}; it has {', '.join(self._tree)}"
                ) from None

        def from_json(name, leaf):
            if leaf == TENSOR:
                # A step counter in the same branch has another shape: it is read in full.
                if shard is not None and self._tensors[name]["shape"] == list(shard.global_shape):
                    return self.tensor(name, shard.offsets, shape)
                return self.tensor(name)
            # JSON has no NaN and no infinity: the tree holds {"$": "nan"} in their place.
            if isinstance(leaf, dict):
                return float(leaf["$"])
            return leaf

        return walk(node, from_json, prefix or "")

    def tensor(self, name: str, offsets=None, shape=None) -> torch.Tensor:
        """The full tensor, or a shard of it, in new memory.

        offsets: where the shard begins in each dimension (None: 0); shape: its shape (None: up to
        the end). Raises ValueError for an unknown name, or a shard beyond the tensor's shape.
        """
        offsets, shape, pieces = self._pieces(name, offsets, shape)
        # Memory is taken when every file has what it should.
        out = torch.empty(shape, dtype=DTYPES[self._tensors[name]["dtype"]])
        fill(out, name, offsets, pieces)
        return out

    def fill(self, out: torch.Tensor, name: str, offsets=None) -> None:
        """Reads the full tensor, or the shard at `offsets`, into `out`, which has its shape.

        A tensor of another dtype or device gets the numbers converted. Raises ValueError as
        `tensor` does, and where a full tensor has another shape.
        """
        if offsets is None and list(out.shape) != self._entry(name)["shape"]:
            saved = self._entry(name)["shape"]
            raise ValueError(f"{name} has shape {saved}, and is to fill {list(out.shape)}")
        offsets, _, pieces = self._pieces(name, offsets, out.shape)
        fill(out.detach(), name, offsets, pieces)
        # It may have gone past torch: a backward that still needs the old numbers must notice.
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)

    def _entry(self, name: str) -> dict:
        if name not in self._tensors:
            raise ValueError(f"{self.path} has no tensor {name!r}; names() lists what it has")
        return self._tensors[name]

    def _pieces(self, name: str, offsets, shape) -> tuple[list, list, list]:
        """(offsets, shape, [(low, high, offsets of a saved slice, its file)]) of a shard.

        low to high: the box that the shard shares with the saved slice.
        """
        full = self._entry(name)["shape"]
        offsets = [0] * len(full) if offsets is None else list(offsets)
        if shape is None:
            shape = [n - o for n, o in zip(full, offsets)]
        shape = list(shape)
        if not shardings.inside(offsets, shape, full):
            raise ValueError(f"{name} has shape {full}: no box of {shape} begins at {offsets}")
        ends = [o + n for o, n in zip(offsets, shape)]
        pieces = []
        for rank, begins, saved_shape in self.sources(name, offsets, ends):
            low = [max(o, b) for o, b in zip(offsets, begins)]
            high = [min(e, b + n) for e, b, n in zip(ends, begins, saved_shape)]
            pieces.append((low, high, begins, self._stored(name, rank, saved_shape)))
        return offsets, shape, pieces

    def sources(self, name: str, low: list[int], high: list[int]) -> list[shardings.Box]:
        """(rank, offsets, shape) of the slices that share something with the box low to high."""
        sharding = self._shardings[self._tensors[name]["sharding"]]
        return list(shardings.overlapping(sharding, low, high))

    def shape(self, name: str) -> list[int]:
        return self._tensors[name]["shape"]

    def dtype(self, name: str) -> str:
        """Its name in safetensors, such as F32."""
        return self._tensors[name]["dtype"]

    def n_slices(self, name: str) -> int:
        return shardings.count(self._shardings[self._tensors[name]["sharding"]])

    def has(self, part: str) -> bool:
        return part in self._tree

    def weights(self, part: str) -> "Weights":
        """The weights in the branch `part`, as a source for a layout's init_weights."""
        return Weights(self, part)

    def load_weights(self, model: torch.nn.Module, part: str = "model") -> None:
        """Fills parameters and buffers of `model` from "<part>/<name>"; raises as `weights`."""
        with torch.no_grad():
            kept = model.state_dict().keys()  # not what a step counts
            for name, p in [*model.named_parameters(), *model.named_buffers()]:
                if name not in kept:
                    continue
                self.weights(part).fill(p, name)

    def check(self) -> None:
        """Raises CheckpointDamaged unless index.json is one that `save` could have written."""
        with understanding(self.path / "index.json"):
            self._check()

    def _check(self) -> None:
        step = self.step
        # A folder that somebody renamed to another step would be continued at the wrong one.
        name = FOLDER.fullmatch(self.path.name)
        is_step = type(step) is int and 0 <= step < 2**53
        if not is_step or (name and int(name[2]) != step):
            raise ValueError(f"it is of step {step}, whatever the folder's name")
        if not all(isinstance(x, dict) for x in (self._tree, self._tensors, self._files)):
            raise ValueError("tree, tensors and files are not by name")
        if type(self._world) is not int:
            raise ValueError(f"{self._world} ranks have saved it")
        plan.check(self._tree, self._tensors, self._shardings, self._world)

    def verify(self) -> None:
        """Reads every byte; raises CheckpointDamaged unless all is as it was written."""
        self.check()
        files = self._read_files()
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._verify_file, files, files.values()))
        # The bytes are right; are they the tensors that the index promises?
        for number, names in self._names_by_sharding().items():
            sharding = self._shardings[number]
            # Each slice is in a file of its own: count them before a forged index has us list them.
            if shardings.count(sharding) > len(files):
                raise CheckpointDamaged(f"{self.path} has fewer files than index.json has slices")
            for rank, _, shape in shardings.boxes(sharding):
                # `files` are those whose bytes are right: one without a checksum would be trusted
                # unread.
                if file_of(rank) not in files:
                    raise CheckpointDamaged(f"{self.path} has no checksum of {file_of(rank)}")
                for name in names:
                    self._stored(name, rank, shape)

    def _names_by_sharding(self) -> dict[int, list[str]]:
        names = {}
        for name, entry in self._tensors.items():
            names.setdefault(entry["sharding"], []).append(name)
        return names

    def _read_files(self) -> dict:
        """file -> sha256, bytes, of each rank's file."""
        files = self._files
        if files.keys() == {"sha256", "bytes"}:
            self._verify_file("files.json", files)
            with understanding(self.path / "files.json"):
                files = json.loads((self.path / "files.json").read_bytes())
        # Never follow an index out of its folder.
        for file in files:
            if not FILE.fullmatch(file):
                raise CheckpointDamaged(f"{self.path} names {file!r}, no rank_N.safetensors")
        return files

    def _verify_file(self, file: str, facts: dict) -> None:
        path = self.path / file
        try:
            # Opening a pipe would wait for ever.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise CheckpointDamaged(f"{path} is no file")
            with open(path, "rb", buffering=0) as f:
                # The size first: it is cheap, and it tells a file that was cut short.
                size = os.fstat(f.fileno()).st_size
                if size != facts["bytes"]:
                    raise CheckpointDamaged(
                        f"{path} has {size} bytes, but {facts['bytes']} were written"
                    )
                if sha256_of(f) != facts["sha256"]:
                    raise CheckpointDamaged(
                        f"{path} has changed since it was written (another sha256)"
                    )
        except OSError as e:
            raise CheckpointDamaged(f"{path} cannot be read: {e.strerror}") from None
        except (KeyError, TypeError):
            raise CheckpointDamaged(
                f"{self.path / 'index.json'} has no size and sha256 of {file}"
            ) from None

    def _stored(self, name: str, rank: int, shape: list[int]) -> TensorFile:
        """The file with this rank's slice of a tensor, of this shape."""
        path = self.path / file_of(rank)
        try:
            # Opened once and kept: many tensors lie in one file.
            if rank not in self._open:
                self._open[rank] = TensorFile(path)
            file = self._open[rank]
            facts = file.facts(name)
        except (SafetensorError, OSError) as e:
            raise CheckpointDamaged(f"{path} cannot be read: {e}") from None
        if facts != (shape, self._tensors[name]["dtype"]):
            raise CheckpointDamaged(f"{path} holds another {name} than index.json says")
        return file


class Weights:
    """A function (a parameter's name, its full shape) -> its full tensor, from a checkpoint.

    `shard` reads a shard alone. Both raise ValueError where the parameter is missing or has another
    shape.
    """

    def __init__(self, checkpoint: Checkpoint, part: str):
        self.checkpoint = checkpoint
        self.part = part

    def __call__(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.shard(name, Shard(tuple(shape), (0,) * len(shape)), shape)

    def shard(self, name: str, where: tuple, shape: tuple[int, ...]) -> torch.Tensor:
        """The shard of this local shape at `where`: a Shard, or (full shape, offsets)."""
        full, offsets = where
        return self.checkpoint.tensor(self.key(name, full), offsets, shape)

    def fill(self, out: torch.Tensor, name: str, where: tuple | None = None) -> None:
        """Reads the shard at `where` (None: the full tensor) into `out`, which has its shape.

        Without a second copy of it where dtypes agree.
        """
        full, offsets = where or (tuple(out.shape), None)
        self.checkpoint.fill(out, self.key(name, full), offsets)

    def key(self, name: str, full: tuple) -> str:
        """The parameter's name in the checkpoint; ValueError unless it has this shape there."""
        key = f"{self.part}/{name}"
        saved = self.checkpoint._tensors.get(key)
        if saved is None or tuple(saved["shape"]) != tuple(full):
            path = self.checkpoint.path
            found = tuple(saved["shape"]) if saved else "missing"
            raise ValueError(f"{path} does not fit: {name} is {found}, not {tuple(full)}")
        return key


def fill(out: torch.Tensor, name: str, offsets: list[int], pieces: list) -> None:
    """Reads the pieces of a shard, as `Checkpoint._pieces` gives them, to their places in `out`."""
    for low, high, begins, file in pieces:
        there = shardings.within(low, high, begins)
        try:
            file.read(name, there, out[shardings.within(low, high, offsets)])
        except OSError as e:
            raise CheckpointDamaged(f"{file.path} cannot be read: {e}") from None


@contextlib.contextmanager
def understanding(path: Path):
    """`with` this, look into a file that may be damaged: CheckpointDamaged if it makes no sense."""
    try:
        yield
    except CheckpointDamaged:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        # The reason may quote the damaged file: no control character may reach the terminal.
        reason = ascii(str(e))[1:-1][:300]
        raise CheckpointDamaged(f"{path} contradicts itself: {reason}") from None


def load(path, verify: bool = True) -> Checkpoint:
    """Opens the checkpoint folder `path`.

    Raises CheckpointDamaged unless it is exactly what was written, and ValueError for the format of
    another version. verify=False checks index.json alone: for ranks that trust another one, which
    has read every byte.
    """
    path = Path(path)
    index_path = path / "index.json"
    # The checksum is of the body as we would write it: a changed value shows, a space does not.
    try:
        if not stat.S_ISREG(os.stat(index_path).st_mode):
            raise CheckpointDamaged(f"{index_path} is no file")
        index = json.loads(index_path.read_bytes())
        body = index["body"]
        version = body["format"]
        intact = index["sha256"] == sha256(as_json(body))
    except CheckpointDamaged:
        raise
    except OSError as e:
        if not path.exists():
            raise CheckpointDamaged(f"{path} is not there") from None
        raise CheckpointDamaged(
            f"{path} has no readable index.json ({e.strerror}); cut short?"
        ) from None
    except (KeyError, TypeError, ValueError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointDamaged(f"{index_path} has changed since it was written (another sha256)")
    # Another format is not damage: falling back to an older checkpoint would silently lose steps.
    if version not in (format_1.FORMAT, FORMAT):
        raise ValueError(
            f"{path} has format {version}, not {FORMAT}: load it with the code that wrote it"
        )
    if version == format_1.FORMAT:
        with understanding(index_path):
            body = format_1.translated(body)
    try:
        checkpoint = Checkpoint(path, body)
    except KeyError as e:
        raise CheckpointDamaged(f"{index_path} lacks {e}") from None
    if verify:
        checkpoint.verify()
    else:
        checkpoint.check()
    return checkpoint


def newest(out_dir, warn=print) -> Checkpoint | None:
    """A run's newest intact checkpoint, or None. warn(line) is told of each newer, damaged one."""
    # A kill may have left the old checkpoint of a step as .old-step-N: it counts here.
    for _, _, path in reversed(found(out_dir)):
        try:
            return load(path)
        except CheckpointDamaged as e:
            warn(f"skipping a damaged checkpoint: {e}")
    return None


def before(out_dir, step: int, back: int = 1) -> list[Checkpoint]:
    """The newest `back` intact checkpoints older than `step`, newest first.

    If there is no older one: the checkpoint of this step.
    """
    paths = [(at, path) for at, is_current, path in reversed(found(out_dir)) if is_current]
    candidates = [path for at, path in paths if at < step]
    if not candidates:
        candidates = [path for at, path in paths if at == step]
    intact = []
    for path in candidates:
        if len(intact) == back:
            break
        with contextlib.suppress(CheckpointDamaged):
            intact.append(load(path))
    return intact


def resolve(path) -> Checkpoint:
    """What resume=PATH means: the checkpoint at `path`, or the newest one of the run at `path`.

    Raises ValueError where there is none.
    """
    path = Path(path)
    if (path / "index.json").exists() or (FOLDER.fullmatch(path.name) and path.is_dir()):
        return load(path)
    checkpoint = newest(path)
    if checkpoint is None:
        ours = "give a run's out_dir or one of the step-… folders in it"
        raise ValueError(f"{path} {missing(path)}; {ours}")
    return checkpoint


def missing(path: Path) -> str:
    """Why there is no checkpoint at `path`, as the middle of a sentence."""
    what = foreign(path)
    if what:
        return what
    if path.is_dir():
        return "has no intact checkpoint"
    if path.is_file():
        return "is not a folder"
    # The path names nothing. Its neighbours tell whether it was ever a run's checkpoint.
    there = found(path.parent)
    if not there:
        return "does not exist, so it is not a folder of checkpoints"
    why = "is not there"
    name = FOLDER.fullmatch(path.name)
    with contextlib.suppress(ValueError):
        keep = keep_of_pruned(name, there)
        if keep:
            why = f"was deleted, for the run keeps its newest {keep} (--keep={keep})"
    return f"{why}; there are {', '.join(str(p) for _, _, p in there)}"


def keep_of_pruned(name: re.Match | None, there: list) -> int | None:
    """The run's --keep, where that is why the checkpoint of this name is gone; else None.

    name: a match of FOLDER; there: what `found` says of the folder. Raises ValueError where the
    newest checkpoint cannot be read.
    """
    newest_one = load(there[-1][2], verify=False)
    save_every = newest_one.tree("config/save_every", missing=0)
    keep = newest_one.tree("config/keep", missing=0)
    if not name or not save_every or type(save_every) is not int:
        return None
    # --keep is the reason only where the run saved this step, and all that is left is newer.
    step = int(name[2])
    oldest_step = there[0][0]
    was_saved = step % save_every == 0
    return keep if was_saved and step < oldest_step else None


@contextlib.contextmanager
def reading(path):
    """`with` this, take up a checkpoint's tree: ValueError for what this program does not write.

    A checksum that fits shows that a file is undamaged, not which program wrote it.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as e:
        raise ValueError(
            f"{path} holds what this program does not write ({type(e).__name__}: {e})"
        ) from e
