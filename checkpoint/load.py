"""Atomic, verified checkpoints that any parallel layout can load. Without pickle: loading runs no
code.

    OUT_DIR/step-00000123/
        rank_0.safetensors     what rank 0 wrote: full tensors, or its slices of them
        rank_1.safetensors     ... (a rank with nothing to write has no file)
        index.json             {"body": {...}, "sha256": checksum of the body}

    body["tensors"]   name -> global shape, dtype, slices [{file, key, offsets, shape}]
    body["files"]     file -> sha256, bytes
    body["tree"]      what was saved, with {"$": "tensor"} for a tensor, {"$": "nan"} for
                      a number that is not finite

A tensor's name is its path in the tree: "model/blocks.0.attn.q.weight". A slice is a shard of
the full tensor, and reading a shard touches only the slices that overlap it, so every layout loads
what any other one saved:

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
import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from checkpoint.foreign import foreign
from checkpoint.save import (
    FILE,
    FOLDER,
    FORMAT,
    as_json,
    found,
    sha256,
)
from checkpoint.slices import DTYPES, TENSOR, check, inside, walk, within
from parallel.shard import Shard


class CheckpointDamaged(ValueError):
    """A checkpoint that is not what was written; the message says what is wrong."""


class Checkpoint:
    """What `load` returns. Files are memory-mapped at the first read; tensors come back on the
    CPU."""

    def __init__(self, path: Path, body: dict):
        self.path, self.step = path, body["step"]
        self._files, self._tensors, self._tree, self._open = (
            body["files"],
            body["tensors"],
            body["tree"],
            {},
        )

    def names(self) -> list[str]:
        return list(self._tensors)

    def tree(self, prefix: str | None = None, shard: Shard | None = None, shape=None, missing=None):
        """What was saved, with full tensors; `prefix` ("model", "optim/state") picks one branch,
        and `missing` stands for one that is not there.

        shard: of tensors of its global shape only this shard, of this local `shape`, is read.
        """
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
                if shard is not None and self._tensors[name]["shape"] == list(shard.global_shape):
                    return self.tensor(name, shard.offsets, shape)
                return self.tensor(name)
            return float(leaf["$"]) if isinstance(leaf, dict) else leaf

        return walk(node, from_json, prefix or "")

    def tensor(self, name: str, offsets=None, shape=None) -> torch.Tensor:
        """The full tensor, or its box of `shape` (None = to the end) that begins at `offsets`
        (None = 0)."""
        if name not in self._tensors:
            raise ValueError(f"{self.path} has no tensor {name!r}; names() lists what it has")
        entry = self._tensors[name]
        offsets = [0] * len(entry["shape"]) if offsets is None else list(offsets)
        shape = [n - o for n, o in zip(entry["shape"], offsets)] if shape is None else list(shape)
        if not inside(offsets, shape, entry["shape"]):
            raise ValueError(
                f"{name} has shape {entry['shape']}: no box of {shape} begins at {offsets}"
            )
        out = torch.empty(shape, dtype=DTYPES[entry["dtype"]])
        for s in entry["slices"]:
            low = [max(o, a) for o, a in zip(offsets, s["offsets"])]
            high = [
                min(o + n, a + m) for o, n, a, m in zip(offsets, shape, s["offsets"], s["shape"])
            ]
            if all(i < j for i, j in zip(low, high)):
                out[within(low, high, offsets)] = self._stored(entry, s)[
                    within(low, high, s["offsets"])
                ]
        return out

    def has(self, part: str) -> bool:
        return part in self._tree

    def weights(self, part: str):
        """A function of a parameter's name and shape: the full tensor. It raises ValueError where
        that parameter is missing or has another shape."""

        def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            saved = self._tensors.get(f"{part}/{name}")
            if saved is None or tuple(saved["shape"]) != tuple(shape):
                found = tuple(saved["shape"]) if saved else "missing"
                raise ValueError(f"{self.path} does not fit: {name} is {found}, not {tuple(shape)}")
            return self.tensor(f"{part}/{name}")

        return read

    def load_weights(self, model: torch.nn.Module, part: str = "model") -> None:
        """Every parameter of `model` from "<part>/<its name>", see `weights`."""
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(self.weights(part)(name, tuple(p.shape)))

    def check(self) -> None:
        """Raise CheckpointDamaged unless index.json is one that `save` could have written."""
        index, step, name = self.path / "index.json", self.step, FOLDER.fullmatch(self.path.name)
        try:
            if type(step) is not int or not 0 <= step < 2**53 or (name and int(name[2]) != step):
                raise ValueError(f"it is of step {step}, whatever the folder's name")
            if not all(isinstance(x, dict) for x in (self._tree, self._tensors, self._files)):
                raise ValueError("tree, tensors and files are not by name")
            check(self._tree, self._tensors)
            for file in {s["file"] for entry in self._tensors.values() for s in entry["slices"]}:
                if self._path(file).name not in self._files:
                    raise ValueError(f"no checksum of {file}")
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
            reason = ascii(str(e))[1:-1][:300]  # it may quote anything
            raise CheckpointDamaged(f"{index} contradicts itself: {reason}") from None

    def verify(self) -> None:
        """Read every byte; raise CheckpointDamaged unless files, tree and slices are as written."""
        self.check()
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._verify_file, self._files))
        for entry in self._tensors.values():
            for s in entry["slices"]:
                self._stored(entry, s)

    def _verify_file(self, file):
        path, facts = self._path(file), self._files[file]
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
                raise CheckpointDamaged(f"{path} is no file")
            with open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                if size != facts["bytes"]:
                    raise CheckpointDamaged(
                        f"{path} has {size} bytes, but {facts['bytes']} were written"
                    )
                if hashlib.file_digest(f, "sha256").hexdigest() != facts["sha256"]:
                    raise CheckpointDamaged(
                        f"{path} has changed since it was written (another sha256)"
                    )
        except OSError as e:
            raise CheckpointDamaged(f"{path} cannot be read: {e.strerror}") from None
        except (KeyError, TypeError):
            raise CheckpointDamaged(
                f"{self.path / 'index.json'} has no size and sha256 of {file}"
            ) from None

    def _path(self, file):
        if not FILE.fullmatch(file):  # never follow an index out of its folder
            raise CheckpointDamaged(
                f"{self.path / 'index.json'} names {file!r}, no rank_N.safetensors"
            )
        return self.path / file

    def _stored(self, entry, s):
        """A slice on disk; indexing it reads that part of the mapped file."""
        path = self._path(s["file"])
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            stored = self._open[path].get_slice(s["key"])
        except (SafetensorError, OSError) as e:
            raise CheckpointDamaged(f"{path} cannot be read: {e}") from None
        if stored.get_shape() != s["shape"] or stored.get_dtype() != entry["dtype"]:
            raise CheckpointDamaged(f"{path} holds another {s['key']} than index.json says")
        return stored


def load(path, verify: bool = True) -> Checkpoint:
    """Open the checkpoint folder `path`. Raises CheckpointDamaged unless it is exactly what was
    written.

    verify=False checks index.json alone: for ranks that trust the one which has read every byte.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path / "index.json").st_mode):
            raise CheckpointDamaged(f"{path / 'index.json'} is no file")
        index = json.loads((path / "index.json").read_bytes())
        body, version = index["body"], index["body"]["format"]
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
        raise CheckpointDamaged(
            f"{path / 'index.json'} has changed since it was written (another sha256)"
        )
    if version != FORMAT:  # not damaged: falling back to an older one would silently lose steps
        raise ValueError(
            f"{path} has format {version}, not {FORMAT}: load it with the code that wrote it"
        )
    try:
        checkpoint = Checkpoint(path, body)
    except KeyError as e:
        raise CheckpointDamaged(f"{path / 'index.json'} lacks {e}") from None
    checkpoint.verify() if verify else checkpoint.check()
    return checkpoint


def newest(out_dir, warn=print) -> Checkpoint | None:
    """A run's newest intact checkpoint, or None; `warn` gets one line for each damaged one passed
    over."""
    for _, _, path in reversed(found(out_dir)):
        try:
            return load(path)
        except CheckpointDamaged as e:
            warn(f"skipping a damaged checkpoint: {e}")
    return None


def before(out_dir, step: int, back: int = 1) -> list[Checkpoint]:
    """The newest `back` whole checkpoints of steps before this one, newest first; that of this step
    if there is no older one."""
    there, whole = [(at, path) for at, current, path in reversed(found(out_dir)) if current], []
    for _, path in [x for x in there if x[0] < step] or [x for x in there if x[0] == step]:
        if len(whole) < back:
            try:
                whole.append(load(path))
            except CheckpointDamaged:
                pass
    return whole


def resolve(path) -> Checkpoint:
    """resume=PATH: a checkpoint by whatever name, or a run's folder and thus its newest one.
    ValueError if there is none."""
    path = Path(path)
    if (path / "index.json").exists() or (FOLDER.fullmatch(path.name) and path.is_dir()):
        return load(path)
    if (checkpoint := newest(path)) is None:
        ours = "give a run's out_dir or one of the step-… folders in it"
        raise ValueError(f"{path} {missing(path)}; {ours}")
    return checkpoint


def missing(path: Path) -> str:
    """Why there is no checkpoint at `path`, as the middle of a sentence."""
    if what := foreign(path):
        return what
    if path.is_dir() or path.is_file():
        return "has no intact checkpoint" if path.is_dir() else "is not a folder"
    there = found(path.parent)
    if not there:
        return "does not exist, so it is not a folder of checkpoints"
    why, step = "is not there", FOLDER.fullmatch(path.name)
    with contextlib.suppress(ValueError):
        newest_one = load(there[-1][2], verify=False)
        every, keep = (
            newest_one.tree(f"config/{name}", missing=0) for name in ("save_every", "keep")
        )
        saved = type(every) is int and every and step and int(step[2]) % every == 0
        if saved and keep and int(step[2]) < there[0][0]:
            why = f"was deleted, for the run keeps its newest {keep} (--keep={keep})"
    return f"{why}; there are {', '.join(str(p) for _, _, p in there)}"


@contextlib.contextmanager
def reading(path):
    """Around code that takes up a checkpoint's tree: ValueError where that is not what this program
    writes. Checksums that fit say what a file is, not who wrote it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as e:
        raise ValueError(
            f"{path} holds what this program does not write ({type(e).__name__}: {e})"
        ) from e


# ---- command line --------------------------------------------------------------------------------
