"""Checkpoints of format 1, which every run wrote before format 2: read for ever, written no more.

body["tensors"]   name -> shape, dtype, slices [{file, key, offsets, shape}], one for each rank
body["files"]     file -> sha256, bytes
"""

from checkpoint import shardings
from checkpoint.save import FILE
from checkpoint.slices import as_json

FORMAT = 1


def translated(body: dict) -> dict:
    """The body of an index of format 1 as one of format 2; only "files" stays what it was.

    Raises ValueError where it names a file that is no rank's. Whatever else raises here, such as a
    TypeError, is a damaged index.
    """
    tensors = {}
    found = []
    number_of = {}  # sharding, as text -> its number
    world = 0
    for name, entry in body["tensors"].items():
        boxes = []
        for s in entry["slices"]:
            boxes.append((rank_of(s["file"]), s["offsets"], s["shape"]))
            if s["key"] != name:
                raise ValueError(f"{name} has a slice by another name")
        boxes.sort(key=lambda box: box[0])
        world = max(world, *(rank + 1 for rank, _, _ in boxes))
        sharding = shardings.compress(boxes)
        number = number_of.setdefault(as_json(sharding), len(number_of))
        if number == len(found):
            found.append(sharding)
        tensors[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "sharding": number}
    return body | {"tensors": tensors, "shardings": found, "world": world}


def rank_of(file: str) -> int:
    match = FILE.fullmatch(file)
    if match is None:
        raise ValueError(f"it names {file!r}, no rank_N.safetensors")
    return int(match[1])
