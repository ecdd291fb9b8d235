"""A checkpoint of today as one of format 1, so that tests can see what every earlier run has left.

as_format_1(path)     path/step-N, in place: the same tensors, slices and leaves
seal(path, body)      index.json with this body and a checksum that fits, in any format
"""

import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from checkpoint.shardings import boxes


def as_bytes(value) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def seal(path: Path, body) -> None:
    sealed = {"body": body, "sha256": hashlib.sha256(as_bytes(body)).hexdigest()}
    (path / "index.json").write_bytes(as_bytes(sealed))


def facts_of(file: Path) -> dict:
    data = file.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def as_format_1(path: Path) -> Path:
    body = json.loads((path / "index.json").read_bytes())["body"]
    tensors = {}
    for name, entry in body["tensors"].items():
        slices = [
            {"file": f"rank_{rank}.safetensors", "key": name, "offsets": offsets, "shape": shape}
            for rank, offsets, shape in boxes(body["shardings"][entry["sharding"]])
        ]
        tensors[name] = {"shape": entry["shape"], "dtype": entry["dtype"], "slices": slices}
    if "rng" in tensors:
        name_each_generator(path, body, tensors)
    files = sorted(path.glob("rank_*.safetensors"))
    body = {
        "format": 1,
        "step": body["step"],
        "files": {file.name: facts_of(file) for file in files},
        "tensors": tensors,
        "tree": body["tree"],
    }
    (path / "files.json").unlink()
    seal(path, body)
    return path


def name_each_generator(path: Path, body: dict, tensors: dict) -> None:
    """Each rank's state was a tensor "rng/RANK", where it is now a row of "rng"."""
    body["tree"]["rng"] = {}
    for slice_ in tensors.pop("rng")["slices"]:
        rank = str(slice_["offsets"][0])
        there = load_file(path / slice_["file"])
        state = there.pop("rng")[0].clone()
        save_file(there | {f"rng/{rank}": state}, path / slice_["file"])
        body["tree"]["rng"][rank] = {"$": "tensor"}
        slice_ |= {"key": f"rng/{rank}", "offsets": [0], "shape": [len(state)]}
        tensors[f"rng/{rank}"] = {"shape": [len(state)], "dtype": "U8", "slices": [slice_]}
