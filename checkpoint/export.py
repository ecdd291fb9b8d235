"""A checkpoint's weights as a folder that transformers loads.

    FOLDER/config.json                        checkpoint/families.py says which family it is
    FOLDER/model.safetensors                  of more than 5 GB model-00001-of-00002.safetensors
    FOLDER/model.safetensors.index.json       and so on, and the index of them
    FOLDER/tokenizer.json ...                 where the run has one

Written under another name and renamed at the end: there is a whole folder, or none. One file's
tensors are in memory at a time.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint import families, family_names
from checkpoint.load import Checkpoint
from checkpoint.save import write_tensors
from checkpoint.slices import DTYPES

LARGEST = 5 * 10**9  # bytes of one file
# Keys of config.json that name a dtype, in transformers 4 and 5.
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
VOCABULARY = ("embed.weight", "head.weight")


class Part(NamedTuple):
    """What of one of our parameters goes into a tensor of theirs."""

    name: str | None  # ours; None for a bias that is not there: zeros
    shape: tuple[int, ...]
    place: family_names.Tensor


def to_hugging_face(
    checkpoint: Checkpoint,
    fields: dict,
    folder: Path,
    n_vocab: int | None = None,
    end: int | None = None,
    files: tuple[Path, ...] = (),
    largest: int = LARGEST,
    *,
    drop_bias: bool = False,
) -> list[str]:
    """Writes `folder`; returns what is worth a line.

    fields: our resolved settings, see families.config_of; n_vocab: rows of the vocabulary that are
    written, None for all; end: the id that ends a document; files: copied beside; largest: bytes
    of one file; drop_bias: leave out a bias in the choice of experts that is not 0. Raises
    ValueError for a folder that is there, and for traits that no family has.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} is there already; give a new folder")
    n_rows = fields["vocab_size"]
    n_vocab = n_rows if n_vocab is None else n_vocab
    if not 0 < n_vocab <= n_rows:
        raise ValueError(f"--vocab_size={n_vocab} is not among the {n_rows} that the run has")
    config = families.config_of(fields | {"vocab_size": n_vocab})
    has_bias = chooses_with_bias(checkpoint)
    if has_bias and not drop_bias:
        raise ValueError(
            f"{checkpoint.path} chooses experts with a selection_bias, which no family of "
            "transformers has; a run with --moe_bias_lr=none from its start has none, and "
            "--selection_bias=drop leaves this one out: tokens then go to other experts, so train "
            f"on with --init_from={folder} --moe_bias_lr=none"
        )
    dtype = checkpoint.dtype("model/embed.weight")
    config["torch_dtype"] = DTYPE_NAMES[dtype]
    # Without these keys transformers takes GPT-2's own or Llama's.
    config["bos_token_id"] = None
    config["eos_token_id"] = end if end is not None and end < n_vocab else None
    tensors = parts_by_tensor(checkpoint, config["model_type"], n_vocab)

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_files(checkpoint, tensors, partial, largest)
    write_json(partial / "config.json", config)
    for file in files:
        shutil.copyfile(file, partial / file.name)
    partial.rename(folder)

    lines = []
    if n_vocab < n_rows:
        lines.append(f"of {n_rows} rows of the vocabulary the first {n_vocab} are written")
    if any(part.name is None for parts in tensors.values() for part in parts):
        lines.append("its biases are 0: the family has them, this run has none")
    if has_bias:
        lines.append(
            "its selection_bias is left out, so tokens go to other experts than in the run; train "
            f"on with --init_from={folder} --moe_bias_lr=none"
        )
    elif drop_bias:
        lines.append("there is no selection_bias to leave out")
    return lines


def names_of_weights(checkpoint: Checkpoint) -> list[str]:
    return [name.removeprefix("model/") for name in checkpoint.names() if name[:6] == "model/"]


def chooses_with_bias(checkpoint: Checkpoint) -> bool:
    """Has a layer's selection_bias a number that is not 0?"""
    names = filter(family_names.is_selection_bias, names_of_weights(checkpoint))
    return any(checkpoint.tensor(f"model/{name}").any() for name in names)


def parts_by_tensor(checkpoint: Checkpoint, family: str, n_vocab: int) -> dict[str, list[Part]]:
    """Their tensor's name -> its parts, in their order."""
    found = {}

    def add(name: str, saved: str | None, shape: list[int]) -> None:
        place = family_names.place(family, name)
        if name in VOCABULARY:
            shape = [n_vocab, *shape[1:]]
        found.setdefault(place.name, []).append(Part(saved, tuple(shape), place))

    names = names_of_weights(checkpoint)
    for name in names:
        if family_names.is_selection_bias(name):
            continue
        shape = checkpoint.shape(f"model/{name}")
        add(name, name, shape)
        bias = name.removesuffix("weight") + "bias"
        # GPT-2 has biases everywhere.
        has_bias = family_names.is_biased(family, name)
        if has_bias and name.endswith("weight") and bias not in names:
            add(bias, None, shape[:1])
    return {
        name: sorted(parts, key=lambda part: part.place.part or (0, 1))
        for name, parts in found.items()
    }


def write_files(checkpoint: Checkpoint, tensors: dict, folder: Path, largest: int) -> None:
    """The tensors in files of at most `largest` bytes, or one tensor, and the index of several."""
    itemsize = DTYPES[checkpoint.dtype("model/embed.weight")].itemsize
    shares = [[]]
    size = total = 0
    for name, parts in tensors.items():
        n_bytes = sum(torch.Size(part.shape).numel() for part in parts) * itemsize
        if shares[-1] and size + n_bytes > largest:
            shares.append([])
            size = 0
        shares[-1].append(name)
        size += n_bytes
        total += n_bytes
    files = ["model.safetensors"]
    if len(shares) > 1:
        n = len(shares)
        files = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    for file, names in zip(files, shares):
        held = {name: tensor_of(checkpoint, tensors[name]) for name in names}
        write_tensors(folder / file, held)
    if len(files) > 1:
        places = {name: file for file, names in zip(files, shares) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)


def tensor_of(checkpoint: Checkpoint, parts: list[Part]) -> Tensor:
    """Their tensor, of our parameters that it holds one after another."""
    dtype = DTYPES[checkpoint.dtype("model/embed.weight")]
    found = []
    for part in parts:
        if part.name is None:
            found.append(torch.zeros(part.shape, dtype=dtype))
        else:
            found.append(checkpoint.tensor(f"model/{part.name}", shape=part.shape))
    whole = torch.cat(found) if len(found) > 1 else found[0]
    return whole.T.contiguous() if parts[0].place.transposed else whole


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
