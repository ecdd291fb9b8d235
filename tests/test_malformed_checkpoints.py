"""Checkpoints that something has damaged or forged, by the hundred, from a fixed seed: what opens
one says in a ValueError what is wrong, or takes the one before. Never another exception, a hang,
gigabytes, other bits.

Bytes are changed as a disk does it, then the checksums say so; or the checksums are made to fit
afterwards, so that the structure itself is what has to be looked at.
"""

import copy
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from format_1 import as_format_1, facts_of, seal
from harness import run_ranks
from test_train import go, trace

from checkpoint import save
from checkpoint.load import CheckpointDamaged, load, newest, resolve
from checkpoint.slices import Slice
from parallel.shard import Shard

SHARDS = ["rank_0.safetensors", "rank_1.safetensors"]
FILES = {1: ["index.json", *SHARDS], 2: ["index.json", "files.json", *SHARDS]}  # of each format


def save_two(rank, world, out_dir):
    for step in (1, 2):
        w, first = torch.arange(24, dtype=torch.float64).view(4, 6) + step, 2 * rank
        tree = {
            "model": {
                "w": Slice(w[first : first + 2], Shard((4, 6), (first, 0))),
                "b": torch.full((3,), step),
            },
            "optim": {
                "groups": [{"lr": 0.5, "betas": [0.9, 0.95]}],
                "state": {f"own{rank}": torch.ones(5)},
            },
            "progress": {"rows": 8 * step, "loss": float("nan")},
            "fp8": torch.ones(4).to(torch.float8_e4m3fn),
        }
        save.save(out_dir, step, tree)


@pytest.fixture(scope="module", params=[1, 2], ids=["format 1", "format 2"])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def good(tmp_path_factory, version):
    folder = tmp_path_factory.mktemp("good")
    run_ranks(2, save_two, folder)
    if version == 1:
        for path in folder.iterdir():
            as_format_1(path)
    return folder


@pytest.fixture(autouse=True)
def no_hang():
    def stop(number, frame):
        raise AssertionError("it hangs")

    if hasattr(signal, "SIGALRM"):
        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(100)
        yield
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    else:
        yield


def fresh(good, tmp_path) -> Path:
    """A run with two checkpoints; the newest one's folder."""
    run, path = tmp_path / "run", tmp_path / "run" / "step-00000002"
    if run.exists():
        shutil.rmtree(path)
        shutil.copytree(good / path.name, path)
    else:
        shutil.copytree(good, run)
    return path


def bits(saved) -> dict:
    return {name: saved.tensor(name).view(torch.uint8).tolist() for name in saved.names()}


def falls_back(path, good, label) -> None:
    """Step 2 is refused with a sentence, and the run goes on from step 1."""
    for opens in (load, resolve):
        with pytest.raises(ValueError) as e:
            opens(path).tree()
        assert "\n" not in str(e.value) and len(str(e.value)) < 1000, label
    said = []
    found = newest(path.parent, said.append)
    assert found.step == 1 and len(said) == 1 and path.name in said[0], label
    assert bits(found) == bits(load(good / "step-00000001")), label


def bytes_changed(data: bytes, rng) -> bytes:
    i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice(
        [
            lambda: (
                data[: max(i - 1, 0)]
                + bytes([data[i - 1] ^ 1 << rng.randrange(8)])
                + data[max(i, 1) :]
            ),
            lambda: data[:i],
            lambda: data[:i] + data[j:],
            lambda: data[:j] + data[i:],
            lambda: data[:i] + rng.randbytes(rng.randrange(1, 9)) + data[i:],
            lambda: data[:i] + bytes(j - i) + data[j:],
            lambda: rng.randbytes(len(data)),
        ]
    )()


def same(data: bytes, other: bytes) -> bool:
    """Also if they differ by a blank between two words of JSON."""
    try:
        return data == other or json.loads(data) == json.loads(other)
    except (ValueError, RecursionError):
        return False


def test_bytes_that_changed_are_found_and_the_one_before_is_taken(good, version, tmp_path):
    rng = random.Random(1)
    for i in range(80):
        path = fresh(good, tmp_path)
        file = path / rng.choice(FILES[version])
        before = file.read_bytes()
        file.write_bytes(bytes_changed(before, rng))
        if not same(file.read_bytes(), before):
            falls_back(path, good, (i, file.name))


def reseal(path, body) -> None:
    """index.json with this body, and checksums of the files that fit."""
    files = body.get("files")
    if (path / "files.json").is_file():
        listed = json.loads((path / "files.json").read_bytes())
        correct(path, listed)
        (path / "files.json").write_bytes(save.as_json(listed))
        if isinstance(files, dict):
            files |= facts_of(path / "files.json") if files.keys() == {"sha256", "bytes"} else {}
    else:
        correct(path, files)
    seal(path, body)


def correct(path, files) -> None:
    for file, facts in files.items() if isinstance(files, dict) else ():
        if (path / str(file)).is_file() and isinstance(facts, dict):
            facts |= facts_of(path / file)


def deep(n: int, kind=list):
    node = 0
    for _ in range(n):
        node = [node] if kind is list else {"k": node}
    return node


ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    0.5,
    1e308,
    2**31,
    2**53,
    2**63,
    2**64,
    10**30,
    -(2**63),
    "",
    "x",
    "../x",
    "\ud800\n",
    "/etc",
    "rank_7.safetensors",
    "F4",
    "C64",
    "F32",
    [],
    [[]],
    {},
    [0] * 70,
    [2**62] * 3,
    {"$": "tensor"},
    {"$": "what"},
    {"$": None},
    {"$": [1]},
    {"": 1},
    {"a/b": 1},
    deep(300),
    deep(300, dict),
    deep(70, dict),
]


def places(node, at=()):
    """The path of every value in a JSON tree."""
    for key in (
        node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    ):
        yield *at, key
        yield from places(node[key], (*at, key))


def structure_changed(body, rng) -> tuple:
    """One value replaced by an odd one or by a copy of another, removed, or doubled; where and
    what."""
    everywhere = list(places(body))
    *above, key = rng.choice(everywhere)
    node = body
    for part in above:
        node = node[part]
    other = body
    for part in rng.choice(everywhere):
        other = other[part]
    how = rng.choice(["odd", "odd", "odd", "copy", "remove", "double"])
    if how == "remove":
        del node[key]
    elif how == "double" and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    elif how == "double":
        node[f"{key}2"] = copy.deepcopy(node[key])
    else:
        node[key] = copy.deepcopy(other if how == "copy" else rng.choice(ODD))
    return (*above, key), how


def test_a_forged_index_is_refused_or_holds_the_very_same_tensors(good, tmp_path):
    rng, refused = random.Random(2), 0
    want = bits(load(good / "step-00000002"))
    for i in range(160):
        path = fresh(good, tmp_path)
        body = json.loads((path / "index.json").read_bytes())["body"]
        label = i, *structure_changed(body, rng)
        reseal(path, body)
        for verify in (True, False):
            try:
                saved = load(path, verify)
                saved.tree()
                assert saved.step == 2 and bits(saved) == want, label
            except ValueError as e:
                refused += verify
                assert "\n" not in str(e), label
                if verify and isinstance(e, CheckpointDamaged):
                    assert newest(path.parent, lambda said: None).step == 1, label
    assert 80 < refused < 160  # what the tree says beside its tensors is not known here


def test_a_forged_header_of_a_file_is_refused_or_holds_the_very_same_tensors(good, tmp_path):
    rng, refused = random.Random(3), 0
    want = bits(load(good / "step-00000002"))
    for i in range(60):
        path = fresh(good, tmp_path)
        file = path / rng.choice(SHARDS)
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        if i % 3 == 0:
            label = i, "length"
            size = rng.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1])
            file.write_bytes(size.to_bytes(8, "little") + data[8:])
        elif i % 3 == 1:
            label = i, *structure_changed(header, rng)
            new = save.as_json(header)
            file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])
        else:
            label = i, "bytes"
            file.write_bytes(bytes_changed(data[: 8 + size], rng) + data[8 + size :])
        reseal(path, json.loads((path / "index.json").read_bytes())["body"])
        try:
            saved = load(path)
            saved.tree()
            assert bits(saved) == want, label
        except ValueError:
            refused += 1
            assert newest(path.parent, lambda said: None).step == 1, label
    assert refused > 40


def linked(file, target):
    file.unlink()
    file.symlink_to(target)


INSTEAD = {
    "nothing": lambda file: file.unlink(),
    "an empty file": lambda file: file.write_bytes(b""),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a link to nothing": lambda file: linked(file, "nowhere"),
    "a link to itself": lambda file: linked(file, file.name),
    "a link to a device without end": lambda file: linked(file, "/dev/zero"),
    "a pipe that nobody fills": lambda file: (file.unlink(), os.mkfifo(file)),
    "a file nobody may read": lambda file: (file.chmod(0), os.geteuid() == 0 and file.unlink()),
    "another file": lambda file: file.write_bytes(b"{}" * 40),
    "another step's file": lambda file: shutil.copy(
        file.parents[1] / "step-00000001" / file.name, file
    ),
}


@pytest.mark.skipif(os.name != "posix", reason="links and pipes are made as POSIX has them")
@pytest.mark.parametrize("what", INSTEAD)
def test_something_else_in_place_of_a_file_is_named(good, version, tmp_path, what):
    for name in FILES[version]:
        path = fresh(good, tmp_path)
        INSTEAD[what](path / name)
        falls_back(path, good, (what, name))


FOLDERS = {
    "a copy under another step's name": lambda run, name: shutil.copytree(
        run / "step-00000002", run / name
    ),
    "a link to another step": lambda run, name: (run / name).symlink_to(run / "step-00000002"),
    "an empty folder": lambda run, name: (run / name).mkdir(),
    "a file": lambda run, name: (run / name).write_text("step"),
    "a link to itself": lambda run, name: (run / name).symlink_to(run / name),
}


@pytest.mark.skipif(os.name != "posix", reason="links are made as POSIX has them")
@pytest.mark.parametrize("what", FOLDERS)
@pytest.mark.parametrize(
    "name", ["step-00000009", ".old-step-00000009", "step-000000009", f"step-{9:9<99}"]
)
def test_a_folder_that_only_looks_like_a_later_checkpoint_is_passed_over(
    good, tmp_path, what, name
):
    run = fresh(good, tmp_path).parent
    FOLDERS[what](run, name)
    said = []
    assert newest(run, said.append).path.name == "step-00000002" and len(said) < 2
    save.prune(run, 1, upto=2)
    assert newest(run, said.append).path.name == "step-00000002"


@pytest.mark.slow
def test_train_goes_on_from_the_one_before_or_says_what_is_wrong(tmp_path, text):
    """The whole of train.py on a run whose newest checkpoint is one of those above."""
    go(text, tmp_path / "whole")
    rng, outcomes = random.Random(4), []
    for i in range(12):
        run = tmp_path / f"hurt{i}"
        shutil.copytree(tmp_path / "whole", run)
        path = run / "step-00000012"
        if i < 5:
            file = path / rng.choice(["index.json", SHARDS[0]])
            file.write_bytes(bytes_changed(file.read_bytes(), rng))
        elif i < 7:
            (path / ["index.json", SHARDS[0]][i - 5]).unlink()
        else:
            body = json.loads((path / "index.json").read_bytes())["body"]
            part = ["tensors", "files", "progress", "config", "rng"][i - 7]
            structure_changed(body["tree"].get(part) or body[part], rng)
            reseal(path, body)
        try:
            go(text, run)
            outcomes.append("went on")
            assert trace(run) == trace(tmp_path / "whole"), i
        except ValueError as e:
            outcomes.append(str(e))
            assert "\n" not in str(e)
    assert outcomes.count("went on") > 6
