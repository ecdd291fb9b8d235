"""What a run leaves, as one flat dict: where it is said -> what is said.

Both sides of a comparison are read by this file alone: the standard library and numpy, no module of
the project. Numbers are kept as Python writes them, with all their digits, and tensors as their
bytes. What cannot be the same twice is replaced by a word in angle brackets: times, speeds, memory,
process numbers, commits, folders, and the names of Python files, which may move.

A checkpoint of format 2 is read as the format 1 that the base writes: a list of all slices, without
the checksums of the files, and a name for each rank's generator.

Two orders are not fixed and are made so. "save" events, which a thread reports when it is done,
come last. Of the train rows on a screen, where one more is shown whenever two seconds have passed,
the first three and the last of each command are kept.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

INPUTS = {"words.txt", "spiky.txt", "texts", "shards", "data_cache", "root.txt"}
# In this order a difference is looked for: what tells most comes first.
ORDER = ("status.json", ".jsonl", ".err", ".out", ".toml", ".safetensors", "index.json", "")
UNREAD = re.compile(r".*/\.lock|.*\.png")  # whether they are there is compared
# What the base does not know: a setting, a part of a checkpoint, events.
ADDED = {"on_divergence", "divergence", "stuck", "profile", "loss_chunk"}
MEASURED = {"tokens_per_s", "mfu", "step_s", "peak_bytes", "idle_s"}  # of a row of metrics.jsonl
HERE_AND_NOW = ("commit", "platform")  # of what a run notes of its machine
NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32,
         "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}  # fmt: skip

OURS = r"(?!(?:train|sample|sweep|bench)\.py)(?:\w+/)*\w+\.py"  # a script or module that may move
REPLACED = [  # in this order, in every text for people
    (rf"python (?:-m [\w.]+|{OURS})(?: (?:plot|csv|export)\b)?", "<command>"),
    (rf"(?<![\w./-]){OURS}(?::\d+)?\b", "<file>"),
    (r"\b[0-9a-f]{7,40}(?:-dirty)?(?=, torch )", "<commit>"),
    (r"\S+ tok/s", "<speed> tok/s"),
    (r"\S+ mfu", "<mfu> mfu"),
    (r"  eta [\d:, days]+", "  <eta>"),
    (r"process \d+ on [^\s,]+", "<process>"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "<time>"),
]
# What a run says of itself at its start and at its end, in the words of the base and in ours. The
# settings behind it are compared in config.toml.
HEADS = (
    "model|data|batch|optimizer|schedule|precision|layout|memory|guards|saves|unusual|done|stopped"
)
HEADS += "|loss|sent|events|folder|next"
SUMMARY = re.compile(
    rf"({HEADS}) +\S.*| {{11}}\S.*|commit .*, torch .*|.*: [\d,]+ tokens to train on, .*"
    r"|\w+: [\d,]+ parameters; a step is .*|mesh: .*|(dp|cp|tp|pp) +\d+ .* ranks .*|chosen: .*"
    r"|FP8 products .*|--fp8.hardware=never|precision=fp8: .*|lr goes from .*"
    r"|this machine is busy .*|lr=\S+: \w+'s own is .*"
)
TRAIN_ROW = re.compile(r"step +(\d+)/(\d+)  loss .*")
SAVE_LINE = re.compile(r"step +\d+/\d+  save")
NOISE = re.compile(r"\[Gloo\].*|[WE]\d{4} .*|\[W\d.*|\*+")  # of torch and of torchrun


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint: dtype and shape as safetensors names them, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def numbers(self) -> np.ndarray:
        if self.dtype == "BF16":  # the upper half of a float32
            wide = np.frombuffer(self.data, np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32)
        return np.frombuffer(self.data, NUMPY.get(self.dtype, np.uint8))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def difference(here, there) -> str:
    """Two values that differ, in words; tensors of one shape by their first number that does."""
    alike = isinstance(here, Tensor) and isinstance(there, Tensor) and str(here) == str(there)
    if not alike:
        return f"{short(here)}, in the base {short(there)}"
    a, b = here.numbers(), there.numbers()
    apart = np.flatnonzero(~((a == b) | ((a != a) & (b != b))))
    if not len(apart):
        return "the same numbers in other bits (a sign of zero, a NaN)"
    i = apart[0]
    return f"{len(apart)} of {len(a)} numbers, the first at {i}: {a[i]!r}, in the base {b[i]!r}"


def short(value) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


# ---- reading -------------------------------------------------------------------------------------
def facts(folder: Path, places: dict[str, str], reworded: dict[str, str]) -> dict[str, object]:
    """Everything that the case in `folder` has left. places: paths in it, and words for them;
    reworded: other words in it, and what to read for them."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    names = [name for name, path in sorted(paths.items()) if path.is_file()]
    names = [name for name in names if name.split("/")[0] not in INPUTS]
    names = [name for name in names if not name.endswith("/files.json")]  # of format 2 alone
    found = {}
    for name in sorted(names, key=rank):
        if UNREAD.fullmatch(name):
            continue
        for where, what in contents(paths[name], places):
            if isinstance(what, str):
                what = replaced(what, reworded)
            found[f"{name} {where}".rstrip()] = what
    return found | {"the files": names}


def rank(name: str) -> int:
    return next(i for i, ending in enumerate(ORDER) if name.endswith(ending))


def replaced(text: str, words: dict[str, str]) -> str:
    for ours, others in words.items():
        text = text.replace(ours, others)
    return text


def contents(path: Path, places: dict[str, str]) -> Iterator[tuple[str, object]]:
    """(where, what) of one file, in order."""
    if path.suffix == ".safetensors":
        yield from tensors(path.read_bytes(), path.stem.removeprefix("rank_"))
        return
    text = replaced(path.read_text(encoding="utf-8", errors="backslashreplace"), places)
    if path.suffix == ".jsonl":
        yield from rows(text)
    elif path.name == "index.json":
        yield from index(in_format_1(json.loads(text)["body"]))
    elif path.suffix == ".toml":
        yield from numbered(recipe(text))
    else:
        yield from numbered(screen(text))


def numbered(lines: list[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, 1):
        yield f"line {number}", line


def recipe(text: str) -> list[str]:
    """The lines of a config.toml. What a run says is `unknown` stays so."""
    for note in HERE_AND_NOW:
        text = re.sub(rf"(?m)^# {note}: (?!unknown).*", f"# {note}: <{note}>", text)
    return [line for line in text.splitlines() if line.split(" ")[0] not in ADDED]


def screen(text: str) -> list[str]:
    """The lines that a run says, without what differs from time to time."""
    for pattern, word in REPLACED:
        text = re.sub(pattern, word, text)
    lines, saves, shown = [], [], 0
    for line in text.splitlines():
        if NOISE.fullmatch(line):
            continue
        if SAVE_LINE.fullmatch(line):
            saves.append(line)
            continue
        if SUMMARY.fullmatch(line):  # another command begins, or this one ends
            shown = 0
            continue
        if row := TRAIN_ROW.fullmatch(line):
            shown += 1
            if shown > 3 and row[1] != row[2]:
                continue
        lines.append(line)
    return lines + sorted(saves)


def rows(text: str) -> Iterator[tuple[str, object]]:
    """metrics.jsonl or histograms.jsonl: of each row its keys in order, then every value."""
    parsed = [json.loads(line) for line in text.splitlines()]
    saves = [row for row in parsed if row.get("event") == "save"]
    others = [row for row in parsed if row.get("event") != "save"]
    others = [row for row in others if row.get("event") not in ADDED]
    for number, row in enumerate(others + sorted(saves, key=lambda row: row["step"]), 1):
        place = f"row {number} (step {row.get('step')})"
        yield f"{place} keys", list(row)
        for name, value in row.items():
            if name in MEASURED and value is not None:
                value = "<measured>"
            yield f"{place} {name}", repr(value)


def index(body: dict) -> Iterator[tuple[str, object]]:
    """The body of a checkpoint's index.json: every leaf by its path."""
    for part in (body["tree"], body["tree"].get("config", {})):
        for name in ADDED & part.keys():
            del part[name]
    chosen = body["tree"].get("config", {}).get("chosen")
    if chosen is not None:
        body["tree"]["config"]["chosen"] = [name for name in chosen if name not in ADDED]
    record = body["tree"].get("record", {})
    for note in HERE_AND_NOW:
        if record.get(note) not in (None, "unknown"):
            record[note] = f"<{note}>"
    yield from leaves("", body)


def in_format_1(body: dict) -> dict:
    """The body of an index of either format, as the base has it."""
    found = {}
    for name, entry in body.get("tensors", {}).items():
        slices = entry.get("slices", [])
        if "sharding" in entry:
            slices = slices_of(name, body["shardings"][entry["sharding"]])
        if name == "rng":
            body["tree"]["rng"] = {}
            for slice_ in slices:
                rank, size = str(slice_["offsets"][0]), slice_["shape"][1]
                body["tree"]["rng"][rank] = {"$": "tensor"}
                own = slice_ | {"key": f"rng/{rank}", "offsets": [0], "shape": [size]}
                found[f"rng/{rank}"] = {"shape": [size], "dtype": "U8", "slices": [own]}
        else:
            found[name] = {"shape": entry["shape"], "dtype": entry["dtype"], "slices": slices}
    return {"step": body["step"], "tensors": dict(sorted(found.items())), "tree": body["tree"]}


def slices_of(name: str, sharding: list[dict]) -> list[dict]:
    """All slices that the rules of a sharding stand for, see checkpoint/shardings.py."""
    found = []
    for grid in sharding:
        places = [(grid["rank"], grid["offsets"])]
        for times, ranks, move in grid["repeat"]:
            places = [
                (rank + i * ranks, [o + i * m for o, m in zip(offsets, move)])
                for i in range(times)
                for rank, offsets in places
            ]
        for rank, offsets in places:
            file = f"rank_{rank}.safetensors"
            found.append({"file": file, "key": name, "offsets": offsets, "shape": grid["shape"]})
    return found


def leaves(path: str, node) -> Iterator[tuple[str, object]]:
    if isinstance(node, dict):
        yield f"{path} keys", list(node)
        for key, value in node.items():
            yield from leaves(f"{path}/{key}", value)
    elif isinstance(node, list):
        yield f"{path} length", len(node)
        for i, value in enumerate(node):
            yield from leaves(f"{path}/{i}", value)
    else:
        yield path, repr(node)


def tensors(raw: bytes, rank: str) -> Iterator[tuple[str, object]]:
    """A safetensors file: 8 bytes with the length of its header, the header in JSON, the data."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    header = {f"rng/{rank}" if name == "rng" else name: entry for name, entry in header.items()}
    yield "tensors", list(header)
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        shape = entry["shape"][-1:] if name == f"rng/{rank}" else entry["shape"]
        yield name, Tensor(entry["dtype"], tuple(shape), raw[begin:end])


def trace(folder: Path) -> dict[str, list[list]]:
    """[[step, number], ...] of the losses, gradient norms and validation losses of a case."""
    found = {}
    for path in sorted(folder.rglob("metrics.jsonl")):
        run = path.parent.relative_to(folder).as_posix()
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for name in ("loss", "grad_norm", "val_loss"):
                if name in row:
                    found.setdefault(f"{run} {name}", []).append([row["step"], row[name]])
    return found
