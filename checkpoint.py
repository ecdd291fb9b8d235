"""Atomic, verified checkpoints that any parallel layout can load. No pickle anywhere: loading runs no code.

    OUT_DIR/step-00000123/
        rank_0.safetensors     what rank 0 wrote: whole tensors, or its slices of them
        rank_1.safetensors     ... (a rank with nothing to write has no file)
        index.json             {"body": {...}, "sha256": checksum of the body}

    body["tensors"]   name -> global shape, dtype, slices [{file, key, offsets, shape}]
    body["files"]     file -> sha256, bytes
    body["tree"]      what was saved, with {"$": "tensor"} for a tensor, {"$": "nan"} for a non-finite number

A tensor's name is its path in the tree: "model/blocks.0.attn.q.weight". A slice is a box of the whole, and
reading a box touches only the slices that overlap it, so every layout loads what any other one saved:

    4 ranks saved             2 ranks read
    rank 0: rows 0, 1 ─┬───►  rank 0: rows 0..3
    rank 1: rows 2, 3 ─┘
    rank 2: rows 4, 5 ─┬───►  rank 1: rows 4..7
    rank 3: rows 6, 7 ─┘

A save writes .tmp-step-N, syncs it to the disk, renames it, and only then deletes old ones: killed at any
moment, the run keeps a good checkpoint. All ranks see the same OUT_DIR; only the holder of its RunLock saves.

    python checkpoint.py list RUN | show CHECKPOINT
    python checkpoint.py export RUN OUT.safetensors     the weights alone, in one file
    python checkpoint.py export RUN FOLDER              the same in torch.distributed.checkpoint's form
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

FORMAT = 1
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
TENSOR = {"$": "tensor"}
FILE = re.compile(r"rank_[0-9]+\.safetensors")
# Replacing a checkpoint takes two renames; a kill between them leaves the old, still good one as .old-step-N.
FOLDER = re.compile(r"(\.old-)?step-([0-9]{8,})")
STALE = re.compile(r"\.tmp-(\.old-)?step-[0-9]{8,}")


class CheckpointDamaged(ValueError):
    """A checkpoint that is not what was written; the message says what is wrong."""


@dataclass(frozen=True)
class Slice:
    """The part of a global tensor that this rank holds: a box whose first element sits at `offsets`."""

    tensor: torch.Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]


def save(out_dir, step: int, tree: dict, keep: int | None = None, group=None) -> Path:
    """Write `tree` to OUT_DIR/step-N, then delete all but the newest `keep` checkpoints (None keeps all).

    tree: nested dicts and lists of tensors, Slices, DTensors, numbers, str, bool, None; tuples become lists.
    With several ranks (of `group`; None = all) each calls with its own tree, or {}, and the trees are merged;
    what several hold (the same box of the same name, or a scalar) is taken from the lowest rank. If any rank
    fails, all raise (ValueError: such a tree cannot be saved; OSError: anything else) and earlier checkpoints
    stay as they were.
    """
    out_dir, rank = Path(out_dir), _rank(group)
    folder, temporary, old = (out_dir / f"{prefix}step-{step:08d}" for prefix in ("", ".tmp-", ".old-"))
    held, plan = {}, {}  # name -> this rank's Slice; "tensors" and "tree" of the index, the same on all ranks

    def describe():
        if rank == 0:
            out_dir.mkdir(parents=True, exist_ok=True)
            prune(out_dir, keep, upto=-1)  # only what killed runs left: the disk may need that space
            temporary.mkdir()
        skeleton = _map(tree, lambda name, leaf: _to_json(name, leaf, held))
        boxes = {}
        for name, s in held.items():
            boxes[name] = s.global_shape, DTYPE_NAMES[s.tensor.dtype], s.offsets, s.tensor.shape
        return skeleton, boxes

    def write():
        plan.update(_merge(described))
        file = f"rank_{rank}.safetensors"
        mine = [name for name, e in plan["tensors"].items() if any(s["file"] == file for s in e["slices"])]
        return _write(temporary / file, {name: held[name].tensor for name in mine}) if mine else None

    def publish():
        if rank != 0:
            return
        files = {f"rank_{r}.safetensors": facts for r, facts in enumerate(written) if facts}
        body = {"format": FORMAT, "step": step, "files": files, **plan}
        (temporary / "index.json").write_bytes(_json({"body": body, "sha256": _sha256(_json(body))}))
        _sync(temporary / "index.json")
        _sync(temporary)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        os.rename(temporary, folder)
        _sync(out_dir)
        prune(out_dir, keep, upto=step)

    def on_all_ranks(work):  # -> the list of all ranks' results
        result = cause = sentence = None
        try:
            result = json.loads(_json(work()))
        except Exception as e:  # whatever it is, the other ranks must hear of it
            cause, sentence = e, str(e) if isinstance(e, ValueError | OSError) else f"{type(e).__name__}: {e}"
        answers = _exchange([result, sentence, isinstance(cause, ValueError)], group)
        for r, (_, sentence, of_the_tree) in enumerate(answers):
            if sentence is not None:
                if rank == 0:
                    shutil.rmtree(temporary, ignore_errors=True)
                raise (ValueError if of_the_tree else OSError)(
                    f"step {step} was not saved, {f'rank {r}: ' if len(answers) > 1 else ''}{sentence}; "
                    f"the earlier checkpoints in {out_dir} are as they were"
                ) from cause
        return [result for result, _, _ in answers]

    described = on_all_ranks(describe)
    written = on_all_ranks(write)
    on_all_ranks(publish)
    return folder


class Checkpoint:
    """What `load` returns. Files are memory-mapped at the first read; tensors come back on the CPU."""

    def __init__(self, path: Path, body: dict):
        self.path, self.step = path, body["step"]
        self._files, self._tensors, self._tree, self._open = body["files"], body["tensors"], body["tree"], {}

    def names(self) -> list[str]:
        return list(self._tensors)

    def tree(self, prefix: str | None = None, box=None, missing=None):
        """What was saved, with whole tensors; `prefix` ("model", "optim/state") picks one branch, and
        `missing` stands for one that is not there.

        box: (whole shape, offsets, shape): of tensors of that whole shape only this box is read, see `boxed`.
        """
        node = self._tree
        for key in prefix.split("/") if prefix else []:
            try:
                node = node[int(key) if isinstance(node, list) else key]
            except (KeyError, IndexError, ValueError, TypeError):
                if missing is not None:
                    return missing
                raise ValueError(f"{self.path} has no {prefix!r}; it has {', '.join(self._tree)}") from None

        def from_json(name, leaf):
            if leaf == TENSOR and box is not None and self._tensors[name]["shape"] == list(box[0]):
                return self.tensor(name, box[1], box[2])
            if leaf == TENSOR:
                return self.tensor(name)
            return float(leaf["$"]) if isinstance(leaf, dict) else leaf

        return _map(node, from_json, prefix or "")

    def tensor(self, name: str, offsets=None, shape=None) -> torch.Tensor:
        """The whole tensor, or its box of `shape` (None = to the end) that begins at `offsets` (None = 0)."""
        if name not in self._tensors:
            raise ValueError(f"{self.path} has no tensor {name!r}; names() lists what it has")
        entry = self._tensors[name]
        offsets = [0] * len(entry["shape"]) if offsets is None else list(offsets)
        shape = [n - o for n, o in zip(entry["shape"], offsets)] if shape is None else list(shape)
        if not _inside(offsets, shape, entry["shape"]):
            raise ValueError(f"{name} has shape {entry['shape']}: no box of {shape} begins at {offsets}")
        out = torch.empty(shape, dtype=DTYPES[entry["dtype"]])
        for s in entry["slices"]:
            low = [max(o, a) for o, a in zip(offsets, s["offsets"])]
            high = [min(o + n, a + m) for o, n, a, m in zip(offsets, shape, s["offsets"], s["shape"])]
            if all(i < j for i, j in zip(low, high)):
                out[_box(low, high, offsets)] = self._stored(entry, s)[_box(low, high, s["offsets"])]
        return out

    def has(self, part: str) -> bool:
        return part in self._tree

    def weights(self, part: str):
        """A function of a parameter's name and shape: the whole tensor. It raises ValueError where that
        parameter is missing or has another shape."""

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

    def verify(self) -> None:
        """Read every byte; raise CheckpointDamaged unless files, tree and slices are as written."""
        try:
            with ThreadPoolExecutor() as pool:
                list(pool.map(self._verify_file, self._files))
            _check(self._tree, self._tensors)
            for entry in self._tensors.values():
                for s in entry["slices"]:
                    self._stored(entry, s)
        except CheckpointDamaged:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise CheckpointDamaged(f"{self.path / 'index.json'} contradicts itself: {e}") from None

    def _verify_file(self, file):
        path, facts = self._path(file), self._files[file]
        try:
            with open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                if size != facts["bytes"]:
                    raise CheckpointDamaged(f"{path} has {size} bytes, but {facts['bytes']} were written")
                if hashlib.file_digest(f, "sha256").hexdigest() != facts["sha256"]:
                    raise CheckpointDamaged(f"{path} has changed since it was written (another sha256)")
        except OSError as e:
            raise CheckpointDamaged(f"{path} cannot be read: {e.strerror}") from None

    def _path(self, file):
        if not FILE.fullmatch(file):  # never follow an index out of its folder
            raise CheckpointDamaged(f"{self.path / 'index.json'} names {file!r}, no rank_N.safetensors")
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


def boxed(by_name: dict, boxes: dict) -> dict:
    """by_name: parameter name -> tensor, or its optimizer state {key: tensor}. `boxes`: name -> (whole shape,
    offsets) where there is only that part of a parameter: its tensors become Slices."""

    def cut(value, box):
        if isinstance(value, dict):
            return {key: cut(x, box) for key, x in value.items()}
        if not isinstance(value, torch.Tensor) or value.ndim != len(box[0]):
            return value
        inner = _as_slice("", value)  # a DTensor may be a part of that part
        offsets = tuple(a + b for a, b in zip(box[1], inner.offsets))
        return Slice(inner.tensor, tuple(box[0]), offsets)

    return {name: cut(x, boxes[name]) if name in boxes else x for name, x in by_name.items()}


def load(path, verify: bool = True) -> Checkpoint:
    """Open the checkpoint folder `path`. Raises CheckpointDamaged unless it is exactly what was written.

    verify=False checks index.json alone: for ranks that trust the one which has read every byte.
    """
    path = Path(path)
    try:
        index = json.loads((path / "index.json").read_bytes())
        body, version = index["body"], index["body"]["format"]
        intact = index["sha256"] == _sha256(_json(body))
    except OSError as e:
        raise CheckpointDamaged(f"{path} has no readable index.json ({e.strerror}); cut short?") from None
    except (KeyError, TypeError, ValueError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointDamaged(f"{path / 'index.json'} has changed since it was written (another sha256)")
    if version != FORMAT:  # not damaged: falling back to an older one would silently lose steps
        raise ValueError(f"{path} has format {version}, not {FORMAT}: load it with the code that wrote it")
    checkpoint = Checkpoint(path, body)
    if verify:
        checkpoint.verify()
    return checkpoint


def newest(out_dir, warn=print) -> Checkpoint | None:
    """A run's newest intact checkpoint, or None; `warn` gets one line for each damaged one passed over."""
    for _, _, path in reversed(_found(out_dir)):
        try:
            return load(path)
        except CheckpointDamaged as e:
            warn(f"skipping a damaged checkpoint: {e}")
    return None


def resolve(path) -> Checkpoint:
    """resume=PATH: a checkpoint, or a run's folder and thus its newest one. ValueError if there is none."""
    path = Path(path)
    if FOLDER.fullmatch(path.name) or (path / "index.json").exists():
        return load(path)
    checkpoint = newest(path)
    if checkpoint is None:
        what = "has no intact checkpoint" if path.is_dir() else "is not a folder"
        raise ValueError(f"{path} {what}; give a run's out_dir or one of the step-… folders in it")
    return checkpoint


def prune(out_dir, keep: int | None, upto: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints (None keeps all), and what killed runs left half-written.

    Those after step `upto` are neither counted nor deleted: a run that fell back behind damaged checkpoints
    must not delete, as too old, the good one it has just saved.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep}: keep at least 1 checkpoint, or none to keep them all")
    found = _found(out_dir)
    steps = sorted({step for step, _, _ in found if upto is None or step <= upto})
    too_old = set(steps[:-keep] if keep else [])
    replaced = {step for step, current, _ in found if current}
    for step, current, path in found:
        if step in too_old or (step in replaced and not current):
            try:  # rename first: a kill while deleting must not leave half a checkpoint
                os.rename(path, path.with_name(f".tmp-{path.name}"))
            except OSError:
                pass  # Windows, while someone reads it; the next save tries again
    for path in Path(out_dir).iterdir():
        if STALE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


# ---- the tree ----


def _map(node, leaf, name=""):
    """`node` with leaf(name, value) in place of each leaf; a stand-in, {"$": ...}, is a leaf."""
    if isinstance(node, list | tuple):
        return [_map(value, leaf, f"{name}/{i}") for i, value in enumerate(node)]
    if not isinstance(node, dict) or "$" in node:
        return leaf(name, node)
    for key in node:
        if not isinstance(key, str) or "/" in key or key in ("", "__metadata__"):
            raise ValueError(f"{name or 'the tree'} has the key {key!r}; keys are strings without '/'")
    return {key: _map(value, leaf, f"{name}/{key}" if name else key) for key, value in node.items()}


def _to_json(name, leaf, held):
    """A leaf as JSON; a tensor goes into `held`."""
    match leaf:
        case Slice() | torch.Tensor():
            held[name] = leaf if isinstance(leaf, Slice) else _as_slice(name, leaf)
            dtype = held[name].tensor.dtype
            if dtype not in DTYPE_NAMES:
                raise ValueError(f"{name} is {dtype}; a checkpoint takes {', '.join(DTYPES)}")
            return TENSOR
        case float() if not math.isfinite(leaf):
            return {"$": str(float(leaf))}
        case None | str() | int() | float():
            return leaf
    takes = "tensors, str, int, float, bool and None"
    raise ValueError(f"{name} is of type {type(leaf).__name__}; a checkpoint takes {takes}")


def _as_slice(name, tensor):
    if not hasattr(tensor, "placements"):
        return Slice(tensor, tuple(tensor.shape), (0,) * tensor.dim())
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(p.is_partial() for p in tensor.placements):
        raise ValueError(f"{name} is a DTensor whose parts are not summed yet; redistribute it first")
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Slice(tensor.to_local(), tuple(tensor.shape), tuple(offsets))


def _merge(described):
    """All ranks' trees and boxes -> tensors and tree of the index, which says who writes what."""
    tree, tensors, seen = {}, {}, set()
    for rank, (skeleton, boxes) in enumerate(described):
        tree = _union(tree, skeleton)
        for name, (whole, dtype, offsets, shape) in boxes.items():
            entry = tensors.setdefault(name, {"shape": whole, "dtype": dtype, "slices": []})
            if (whole, dtype) != (entry["shape"], entry["dtype"]):
                lower = f"{entry['dtype']} {entry['shape']}"
                raise ValueError(f"{name} is {dtype} {whole} on rank {rank} but {lower} on a lower one")
            box = (name, *offsets, *shape)
            if box not in seen and (0 not in shape or 0 in whole):
                seen.add(box)
                file = f"rank_{rank}.safetensors"
                entry["slices"].append({"file": file, "key": name, "offsets": offsets, "shape": shape})
    _check(tree, tensors)
    return {"tensors": tensors, "tree": tree}


def _union(low, high):
    if isinstance(low, dict) and isinstance(high, dict) and "$" not in low and "$" not in high:
        return low | {key: _union(low[key], value) if key in low else value for key, value in high.items()}
    if isinstance(low, list) and isinstance(high, list) and len(low) == len(high):
        return [_union(a, b) for a, b in zip(low, high)]
    return low


# ---- boxes ----


def _inside(offsets, shape, whole):
    fits = all(0 <= o <= o + n <= m for o, n, m in zip(offsets, shape, whole))
    return fits and len(offsets) == len(shape) == len(whole)


def _box(low, high, origin):
    return tuple(slice(i - o, j - o) for i, j, o in zip(low, high, origin))


def _check(tree, tensors):
    """ValueError unless each tensor has its place in the tree and slices that cover it."""
    placed = set()
    _map(tree, lambda name, leaf: placed.add(name) if leaf == TENSOR else None)
    for name in placed ^ set(tensors):
        raise ValueError(f"{name} is a tensor on one rank but not on a lower one")
    for name, entry in tensors.items():
        # Cut each dimension where a slice begins or ends: a cell of that grid is held whole or not at all.
        whole, slices = entry["shape"], entry["slices"]
        if not slices or not all(_inside(s["offsets"], s["shape"], whole) for s in slices):
            raise ValueError(f"{name} {whole} has no slice, or one that reaches beyond its shape")
        boxes = [(s["offsets"], [o + n for o, n in zip(s["offsets"], s["shape"])]) for s in slices]
        cuts = [sorted({0, n, *(corner[d] for box in boxes for corner in box)}) for d, n in enumerate(whole)]
        place = [{cut: i for i, cut in enumerate(c)} for c in cuts]
        held = torch.zeros([len(c) - 1 for c in cuts], dtype=torch.bool)
        for low, high in boxes:
            held[tuple(slice(p[i], p[j]) for p, i, j in zip(place, low, high))] = True
        if not held.all():
            hole = [c[i] for c, i in zip(cuts, (~held).nonzero()[0].tolist())]
            raise ValueError(f"no rank holds the part of {name} {whole} that begins at {hole}")


# ---- files and ranks ----


def _write(path, tensors):
    """Write a safetensors file: 8 bytes that give the header's length, the header in JSON, the data.

    By hand: the library's writer needs a second copy of all that shares memory or sits on a GPU, and its file
    would have to be read again for the checksum.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    tensors = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each one is aligned
    for name, t in tensors:
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = _json(header)
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as f:
        for piece in (len(text).to_bytes(8, "little"), text, *(t for _, t in tensors)):
            if isinstance(piece, torch.Tensor):  # any dtype as bytes; one tensor at a time on the host
                piece = piece.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            f.write(piece)
            digest.update(piece)
    _sync(path)
    return {"sha256": digest.hexdigest(), "bytes": 8 + len(text) + end}


def _sync(path):
    if os.name == "posix" or Path(path).is_file():  # Windows cannot open a folder
        handle = os.open(path, os.O_RDWR if Path(path).is_file() else os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _json(value):
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _found(out_dir):
    """[(step, False for .old-, path)], oldest first; other names in the folder are not ours."""
    paths = Path(out_dir).iterdir() if Path(out_dir).is_dir() else ()
    matches = [(FOLDER.fullmatch(path.name), path) for path in paths]
    return sorted((int(m[2]), m[1] is None, path) for m, path in matches if m and path.is_dir())


def _rank(group):
    import torch.distributed as dist

    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def _exchange(value, group):
    """Every rank's JSON value, in rank order; as bytes, for all_gather_object would unpickle them."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    data = torch.frombuffer(bytearray(_json(value)), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
    longest = max(int(n) for n in sizes)
    rows = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(rows, torch.nn.functional.pad(data, (0, longest - len(data))), group=group)
    return [json.loads(row[:n].cpu().numpy().tobytes()) for row, n in zip(rows, sizes)]


# ---- command line ----


def main(args):
    match args:
        case ["list", run] if _found(run):
            for step, _, path in _found(run):
                try:
                    state = f"intact, {len(load(path).names())} tensors"
                except ValueError as e:
                    state = str(e)
                size = sum(f.stat().st_size for f in path.iterdir())
                print(f"step {step:>8}  {size / 2**20:10.1f} MiB  {state}")
        case ["list", run]:
            raise ValueError(f"{run} holds no checkpoints")
        case ["show", path]:
            checkpoint = resolve(path)

            def show(name, leaf):
                if leaf == TENSOR:
                    e = checkpoint._tensors[name]
                    size = math.prod(e["shape"]) * DTYPES[e["dtype"]].itemsize
                    leaf = f"{e['dtype']} {e['shape']}, {size:,} bytes in {len(e['slices'])} slice(s)"
                print(f"{name}: {leaf['$'] if isinstance(leaf, dict) else leaf}")

            _map(checkpoint._tree, show)
        case ["export", run, out]:
            checkpoint = resolve(run)
            weights = checkpoint.tree("model")
            if out.endswith(".safetensors"):
                _write(f"{out}.tmp", weights)
                os.replace(f"{out}.tmp", out)
            else:
                from torch.distributed import checkpoint as dcp

                if Path(out).exists():
                    raise ValueError(f"{out} is there already; give a new folder, or a name in .safetensors")
                dcp.save({"model": weights}, checkpoint_id=out, no_dist=True)
            print(f"{out}: {len(weights)} tensors of {checkpoint.path}")
        case _:
            raise ValueError("say list RUN, show CHECKPOINT, or export RUN OUT.safetensors (or a FOLDER)")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        print(f"checkpoint.py: {e}", file=sys.stderr)
        sys.exit(2)
