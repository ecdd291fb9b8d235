"""Weights of other programs, read as our own: only what a rank holds, and no code.

    FOLDER/config.json                        Hugging Face: see checkpoint/families.py for which
    FOLDER/model.safetensors                  all tensors, or
    FOLDER/model.safetensors.index.json       {"weight_map": {tensor: file}}, and the files
    FOLDER/ckpt.pt, or a file .pt             nanoGPT: `model` and `model_args`
    FILE.safetensors                          our own export

    find(path)                  which of these is there, its description read; None: another thing
    Pretrained.check(shapes)    every tensor is there once, of a shape and dtype that fit
    Pretrained.weights()        a source for a layout's init_weights; a shard at a time is read, in
                                pieces of 4 MiB, straight into the parameter

Every mistake in such a folder is a ValueError with the name of what is wrong. A file's name in an
index is a plain name, so nothing outside the folder is read; safetensors hold numbers alone, and of
nanoGPT's file torch reads tensors and plain values alone (weights_only).
"""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from checkpoint import families, family_names
from checkpoint.families import Description, shown
from checkpoint.slices import DTYPES
from checkpoint.tensor_file import TensorFile, as_dict
from parallel.shard import Shard

PIECE = 2**22  # bytes of a tensor in memory beside the parameter that they go to
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
LONGEST = 2**27  # bytes of a description: more is none


class Pretrained:
    """What `find` returns: weights with their description. No tensor is read yet.

    tensors: their names -> where each can be read; described: None for our own export, whose
    settings nobody has written down.
    """

    def __init__(self, path: Path, described: Description | None, tensors: dict):
        self.path = path
        self.described = described
        self.tensors = tensors
        # A model saved without its head, or a compiled one, has the same names but for the front.
        self.actual = {}
        for name in tensors:
            bare = family_names.without_base(name.removeprefix("_orig_mod."))
            if bare in self.actual:
                raise ValueError(f"{path} has {shown(name)} and {shown(self.actual[bare])}")
            self.actual[bare] = name

    def at(self, name: str) -> tuple["Stored", family_names.Tensor]:
        """Where our parameter's numbers are: the tensor of theirs, and where in it."""
        places = [family_names.Tensor(name)]
        if self.described is not None:
            places = family_names.places(self.described.family, name)
        if not places:
            raise ValueError(f"{self.path} is a {self.described.family}, which has no {name}")
        found = []
        for there in places:
            actual = self.actual.get(family_names.without_base(there.name))
            if actual is not None:
                found.append((self.tensors[actual], there))
        if not found:
            raise ValueError(f"{self.path} has no tensor {places[0].name}, our {name}")
        if found[0][0] is not found[-1][0]:
            both = " and ".join(stored.name for stored, _ in found)
            raise ValueError(f"{self.path} has {both}, each of them our {name}")
        return found[0]

    def is_zero(self, name: str) -> bool:
        """Is it a bias of our experts, which no family has?"""
        return self.described is not None and family_names.is_selection_bias(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of our parameter there; ValueError for parts that are not equal."""
        stored, there = self.at(name)
        shape = stored.shape
        if there.expert is not None:
            if there.expert >= (shape[0] if shape else 0):
                raise ValueError(
                    f"{self.path}: {stored.name} of shape {shape} has no expert {there.expert}"
                )
            shape = shape[1:]
        shape = shape[::-1] if there.transposed else shape
        if there.part is None:
            return shape
        _, n_parts = there.part
        if not shape or shape[0] % n_parts:
            what = {2: "gate and up", 3: "q, k and v"}[n_parts]
            raise ValueError(
                f"{self.path}: {stored.name} of shape {stored.shape} is no {what} together"
            )
        return (shape[0] // n_parts, *shape[1:])

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises ValueError unless the tensors are those of a model with these parameters.

        shapes: our name -> shape. Embedding and head may have more rows here than there (they are
        padded), learned positions fewer (the first are taken).
        """
        used = set()
        n_used = {}  # a tensor of several experts -> how many of them
        for name, shape in shapes.items():
            if self.is_zero(name):
                continue
            stored, there = self.at(name)
            used.add(stored.name)
            if there.expert is not None:
                n_used[stored.name] = max(n_used.get(stored.name, 0), there.expert + 1)
            if stored.dtype not in FLOATS:
                raise ValueError(
                    f"{self.path}: {stored.name} is {stored.dtype}; those read are "
                    f"{', '.join(FLOATS)}"
                )
            found = self.shape(name)
            fits = found == tuple(shape)
            if len(found) == len(shape) == 2 and found[1] == shape[1]:
                is_padded = name in ("embed.weight", "head.weight") and found[0] <= shape[0]
                is_cut = name == "positions.weight" and found[0] >= shape[0]
                fits = fits or is_padded or is_cut
            if not fits:
                raise ValueError(
                    f"{self.path} does not fit: {stored.name}, our {name}, is {found}, not "
                    f"{tuple(shape)}"
                )
        for name, n in n_used.items():
            n_there = self.tensors[name].shape[0]
            if n_there != n:
                raise ValueError(
                    f"{self.path} does not fit: {name} is of {n_there} experts, not {n}"
                )
        self.check_left_over(used, is_tied="head.weight" not in shapes)

    def check_left_over(self, used: set[str], is_tied: bool) -> None:
        """Raises ValueError for a tensor that no parameter of ours takes."""
        for name in sorted(self.tensors.keys() - used):
            bare = name.removeprefix("_orig_mod.")
            if self.described is not None and family_names.BUFFERS.fullmatch(bare):
                continue
            # A tied head is the embedding, which some programs save twice.
            if is_tied and self.described is not None and bare == "lm_head.weight":
                self.check_same(name)
                continue
            raise ValueError(f"{self.path} has a tensor {shown(name)} that this model lacks")

    def check_same(self, head: str) -> None:
        """Raises ValueError unless the tensor `head` has the numbers of the embedding."""
        head = self.tensors[head]
        embed, _ = self.at("embed.weight")
        same = head.shape == embed.shape and head.dtype == embed.dtype and len(head.shape) == 2
        for first, last in pieces(head.shape[0], head.row_bytes()) if same else ():
            box = (slice(first, last), slice(0, head.shape[1]))
            # As bytes: a NaN is not equal to itself.
            same = same and as_bytes(head.read(box)) == as_bytes(embed.read(box))
        if not same:
            raise ValueError(
                f"{self.path} says that the head is tied, and {head.name} differs from {embed.name}"
            )

    def weights(self) -> "Weights":
        """A source for a layout's init_weights; call `check` before."""
        return Weights(self)


class Weights:
    """A function (our parameter's name, its full shape) -> the full tensor, on the CPU.

    `shard` gives a shard, `fill` reads one into place. Rows of embedding and head that are not
    there are the mean of those that are: a token's probability then falls at most by the share of
    new rows, for the mean of exponentials is at least the exponential of the mean. A selection_bias
    that is not there is zeros.
    """

    def __init__(self, pretrained: Pretrained):
        self.pretrained = pretrained
        self.means = {}  # our name -> the mean of the rows that are there

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.shard(name, Shard(tuple(shape), (0,) * len(shape)), shape)

    def shard(self, name: str, where: tuple, shape: tuple[int, ...]) -> Tensor:
        """The shard of this local shape at `where`: a Shard, or (full shape, offsets)."""
        if self.pretrained.is_zero(name):
            return torch.zeros(shape)
        stored, _ = self.pretrained.at(name)
        out = torch.empty(shape, dtype=DTYPES[stored.dtype])
        self.fill(out, name, where)
        return out

    def fill(self, out: Tensor, name: str, where: tuple | None = None) -> None:
        """Reads the shard at `where` (None: the full tensor) into `out`, converted to its dtype."""
        if self.pretrained.is_zero(name):
            out.zero_()
            return
        full, offsets = where or (tuple(out.shape), (0,) * out.ndim)
        n_rows = self.pretrained.shape(name)[0]
        n_there = min(max(n_rows - offsets[0], 0), len(out)) if full[0] > n_rows else len(out)
        self.copy(out[:n_there], name, offsets)
        if n_there < len(out):
            if name not in self.means:
                self.means[name] = self.mean_row(name)
            out[n_there:] = self.means[name][offsets[1] : offsets[1] + out.shape[1]].to(out)

    def copy(self, out: Tensor, name: str, offsets: tuple[int, ...]) -> None:
        """Reads the box of our parameter that begins at `offsets` into `out`, piece by piece."""
        stored, there = self.pretrained.at(name)
        low = list(offsets)
        if there.part is not None:
            low[0] += there.part[0] * self.pretrained.shape(name)[0]
        box = [slice(a, a + n) for a, n in zip(low, out.shape)]
        if there.transposed:
            box, out = box[::-1], out.T
        if not out.numel():
            return
        # The expert's part of a tensor of all.
        front = () if there.expert is None else (slice(there.expert, there.expert + 1),)
        itemsize = DTYPES[stored.dtype].itemsize
        first_row = box[0].start
        for first, last in pieces(len(out), out[0].numel() * itemsize):
            part = slice(first_row + first, first_row + last)
            read = stored.read((*front, part, *box[1:]))
            out[first:last].copy_(read[0] if front else read)

    def mean_row(self, name: str) -> Tensor:
        """(C,) in float64: the mean of the rows of embedding or head."""
        n_rows, width = self.pretrained.shape(name)
        total = torch.zeros(width, dtype=torch.float64)
        for first, last in pieces(n_rows, 8 * width):
            rows = torch.empty(last - first, width, dtype=torch.float64)
            self.copy(rows, name, (first, 0))
            total += rows.sum(0)
        return total / n_rows


def pieces(n_rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """(first, last + 1) of runs of rows, each of about PIECE bytes."""
    step = max(1, PIECE // max(1, row_bytes))
    return [(first, min(first + step, n_rows)) for first in range(0, n_rows, step)]


def as_bytes(x: Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


class Stored:
    """A tensor in a file. name: theirs; read(box) -> a copy or view of that box, on the CPU."""

    def __init__(self, name: str, shape, dtype: str, read: Callable[[tuple], Tensor]):
        self.name = name
        self.shape = tuple(shape)
        self.dtype = dtype
        self.read = read

    def row_bytes(self) -> int:
        return self.shape[-1] * DTYPES[self.dtype].itemsize


# ---- what is there -------------------------------------------------------------------------------
def find(path) -> Pretrained | None:
    """The weights of another program at `path`, or our own export; None where there are neither.

    Raises ValueError for a folder or file of that kind that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").exists() and has_safetensors(path):
            return hugging_face(path)
        return nanogpt(path / "ckpt.pt") if (path / "ckpt.pt").exists() else None
    if path.suffix == ".pt" and path.exists():
        return nanogpt(path)
    # A part of a checkpoint of ours is no export.
    is_part = (path.parent / "index.json").exists()
    if path.suffix == ".safetensors" and path.exists() and not is_part:
        return own_export(path)
    return None


def has_safetensors(folder: Path) -> bool:
    return (folder / INDEX).exists() or any(folder.glob("*.safetensors"))


def hugging_face(folder: Path) -> Pretrained:
    config = read_json(folder / "config.json")
    try:
        described = families.fields_of(config)
    except ValueError as e:
        raise ValueError(f"{folder / 'config.json'} {e}") from None
    index = folder / INDEX
    if index.exists():
        return Pretrained(folder, described, indexed(folder, index))
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if "model.safetensors" in files:
        files = ["model.safetensors"]
    if len(files) != 1:
        found = ", ".join(files[:5])
        raise ValueError(f"{folder} has no model.safetensors and no {INDEX}, but {found}")
    return Pretrained(folder, described, stored_in(folder / files[0]))


def indexed(folder: Path, index: Path) -> dict[str, Stored]:
    """Their name -> tensor, of the files that the index names."""
    places = read_json(index).get("weight_map")
    if type(places) is not dict or not places:
        raise ValueError(f"{index} has no weight_map of tensors to files")
    tensors = {}
    for name, file in places.items():
        # Never follow an index out of its folder.
        is_plain = type(file) is str and file.isascii() and file.isprintable()
        if not is_plain or os.path.basename(file) != file or "\\" in file or ":" in file:
            raise ValueError(f"{index} has {shown(name)} in {shown(file)}, which is no file's name")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{index} names {shown(file)}, which is no .safetensors")
    for file in sorted(set(places.values())):
        for name, stored in stored_in(folder / file).items():
            if places.get(name) != file:
                raise ValueError(f"{folder / file} has {shown(name)}, and {index.name} does not")
            tensors[name] = stored
    for name, file in places.items():
        if name not in tensors:
            raise ValueError(
                f"{folder / file} has no tensor {shown(name)}, which {index} has there"
            )
    return tensors


def stored_in(path: Path) -> dict[str, Stored]:
    """Their name -> tensor, of one safetensors file."""
    try:
        check_regular(path)
        file = TensorFile(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read: {shown(str(e))[1:-1]}") from None
    found = {}
    for name, facts in file.header.items():
        if name == "__metadata__":
            continue
        dtype = facts["dtype"]

        def read(box: tuple, name: str = name) -> Tensor:
            try:
                return file.box(name, box)
            except OSError as e:
                raise ValueError(f"{path} cannot be read: {e}") from None

        found[name] = Stored(name, facts["shape"], dtype, read)
    return found


def nanogpt(path: Path) -> Pretrained:
    """The file that nanoGPT's train.py saves.

    mmap: nothing is read until it is copied, so the optimizer's state never is.
    """
    try:
        check_regular(path)
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        # Whatever is in the file, and in whatever way torch stumbles over it.
        reason = shown(str(e).partition("\n")[0] or type(e).__name__)[1:-1]
        raise ValueError(
            f"{path} is no file of tensors and plain values, such as nanoGPT saves, and more is "
            f"not read ({reason})"
        ) from None
    parts = [saved.get(key) for key in ("model", "model_args")] if type(saved) is dict else [0]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path} has no tables model and model_args, which nanoGPT saves")
    model, args = parts
    try:
        described = families.nanogpt_fields(args)
    except ValueError as e:
        raise ValueError(f"{path}: model_args {e}") from None
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {}
    for name, x in model.items():
        is_plain = type(name) is str and isinstance(x, Tensor) and x.layout == torch.strided
        if not is_plain or x.dtype not in names:
            raise ValueError(f"{path}: model has {shown(name)}, which is no plain tensor")
        x = x.detach()
        tensors[name] = Stored(name, x.shape, names[x.dtype], x.__getitem__)
    return Pretrained(path, described, tensors)


def own_export(path: Path) -> Pretrained:
    """A file of `python -m checkpoint export`: our names, and no description."""
    tensors = stored_in(path)
    if "embed.weight" not in tensors:
        raise ValueError(
            f"{path} is no export of ours, which has an embed.weight; for a model of Hugging Face "
            "give the folder, with its config.json"
        )
    return Pretrained(path, None, tensors)


def check_regular(path: Path) -> None:
    """Raises OSError unless it is a file: opening a pipe would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is no file")


def read_json(path: Path) -> dict:
    """A table in a JSON file. Raises ValueError for anything else, and for a key that is twice."""
    try:
        check_regular(path)
        if path.stat().st_size > LONGEST:
            raise OSError("it is too long")
        found = json.loads(
            path.read_bytes(), object_pairs_hook=as_dict, parse_constant=no_such_number
        )
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {shown(str(e))[1:-1]}") from None
    if type(found) is not dict:
        raise ValueError(f"{path} is no table of names and values")
    return found


def no_such_number(text: str):
    raise ValueError(f"{text} is no number")
