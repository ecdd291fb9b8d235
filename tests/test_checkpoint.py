import errno
import json
import math
import multiprocessing
import os
import pickle
import random
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from format_1 import as_format_1, facts_of, seal
from harness import gpu, run_ranks
from safetensors.torch import load_file

from checkpoint import __main__, shardings, slices
from checkpoint import save as saving
from checkpoint.load import CheckpointDamaged, load, newest, resolve
from checkpoint.save import prune, save
from checkpoint.slices import Slice
from parallel.shard import Shard
from run.control import RunLock

needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(),
    reason="needs fork, which this system lacks",
)


def raw(t):
    return t.cpu().contiguous().view(-1).view(torch.uint8).tolist()


def random_bits(shape, dtype, seed=0):
    """Any bit pattern, so also NaNs with a payload, infinities, subnormals and -0."""
    n_bytes = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, high, (n_bytes,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(shape)


def grid(rows=8, columns=6):
    return torch.arange(rows * columns, dtype=torch.float64).view(rows, columns)


def steps(out_dir):
    return sorted(int(p.name.split("-")[1]) for p in Path(out_dir).glob("step-*"))


def leftovers(out_dir):
    return [p.name for p in Path(out_dir).iterdir() if p.name.startswith((".tmp", ".old"))]


# ---- one process ---------------------------------------------------------------------------------


ON_GPU = ("BF16", "F8_E4M3")
DTYPES = {name: gpu(x) if name in ON_GPU else x for name, x in slices.DTYPES.items()}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (4, 3, 2)], ids=str)
def test_every_dtype_and_shape_returns_bitwise(tmp_path, dtype, shape, device):
    t = random_bits(shape, dtype).to(device)
    c = load(save(tmp_path, 1, {"odd": random_bits((3,), torch.uint8), "a": {"b.weight": t}}))
    read = c.tree()["a"]["b.weight"]
    assert (read.dtype, read.shape) == (dtype, shape)
    assert raw(read) == raw(t)
    if len(shape) == 3:
        box = c.tensor("a/b.weight", offsets=(1, 0, 1), shape=(2, 3, 1))
        assert raw(box) == raw(t[1:3, 0:3, 1:2])


def test_tree_returns_with_its_lists_order_and_non_finite_numbers(tmp_path):
    tree = {
        "z": [1, {"t": torch.ones(2)}, []],
        "a": 0,
        "s": "é/\n",
        "big": 2**200,
        "none": None,
        "e": {},
    }
    tree |= {
        "yes": True,
        "tiny": 5e-324,
        "third": 1 / 3,
        "inf": math.inf,
        "low": -math.inf,
        "nan": math.nan,
    }
    read = load(save(tmp_path, 7, tree)).tree()
    assert list(read) == list(tree)
    assert torch.equal(read["z"][1].pop("t"), torch.ones(2))
    assert math.isnan(read.pop("nan"))
    tree["z"][1].pop("t")
    tree.pop("nan")
    assert read == tree
    assert read["yes"] is True
    assert load(save(tmp_path, 8, {"pair": (1, 2)})).tree() == {"pair": [1, 2]}


@pytest.mark.gpu
def test_non_contiguous_and_tied_tensors_return(tmp_path, device):
    w = grid().to(device)
    parameter = torch.nn.Parameter(w.T)
    read = load(save(tmp_path, 1, {"w": w, "tied": w, "columns": w[:, ::2], "t": parameter})).tree()
    for name, want in {"w": w, "tied": w, "columns": w[:, ::2], "t": w.T}.items():
        assert torch.equal(read[name], want.cpu()), name


def test_a_branch_and_a_box_are_read_alone(tmp_path):
    c = load(save(tmp_path, 3, {"model": {"w": grid()}, "optim": [{"lr": 0.1}]}))
    assert (c.step, c.names(), c.path) == (3, ["model/w"], tmp_path / "step-00000003")
    assert torch.equal(c.tree("model")["w"], grid())
    assert c.tree("optim/0") == {"lr": 0.1}
    assert torch.equal(c.tensor("model/w", (2, 3), (4, 2)), grid()[2:6, 3:5])
    assert torch.equal(c.tensor("model/w", (6, 0)), grid()[6:])
    for offsets, shape in [((6, 0), (3, 6)), ((-1, 0), (2, 6)), ((0,), (8,))]:
        with pytest.raises(ValueError, match="no box"):
            c.tensor("model/w", offsets, shape)
    with pytest.raises(ValueError, match="names()"):
        c.tensor("model/v")
    with pytest.raises(ValueError, match="it has model, optim"):
        c.tree("modle")


def test_what_is_read_does_not_share_memory_with_the_file(tmp_path):
    path = save(tmp_path, 1, {"w": grid()})
    load(path).tensor("w").zero_()
    assert torch.equal(load(path).tensor("w"), grid())


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"a/b": 1}, "without '/'"),
        ({0: 1}, "keys are strings"),
        ({"m": {"$": 1}}, "m is of type dict"),
        ({"m": {"d": torch.float32}}, "m/d is of type dtype"),
        ({"c": torch.zeros(2, dtype=torch.complex64)}, "c is torch.complex64"),
        ({"a": json.loads("[" * 80 + "]" * 80)}, "a/0/0.* is nested deeper than 64 levels"),
        (
            {"w": Slice(torch.zeros(2, 3), Shard((4, 3), (0, 0)))},
            r"no rank holds .* w .* begins at \[2, 0\]",
        ),
        ({"w": Slice(torch.zeros(2, 3), Shard((4, 3), (3, 0)))}, "beyond its shape"),
    ],
)
def test_what_cannot_be_saved_is_refused_in_one_sentence(tmp_path, tree, sentence):
    save(tmp_path, 1, {"good": 1})
    with pytest.raises(ValueError, match=sentence):
        save(tmp_path, 2, tree)
    assert steps(tmp_path) == [1]
    assert not leftovers(tmp_path)


def test_any_safetensors_reader_reads_the_files(tmp_path):
    t = {"f8": random_bits((3,), torch.float8_e4m3fn), "w": grid(), "flag": torch.tensor(True)}
    read = load_file(save(tmp_path, 1, t) / "rank_0.safetensors")
    assert read["w"].data_ptr() % 8 == 0, "aligned in the mapped file"
    assert {k: raw(v) for k, v in read.items()} == {k: raw(v) for k, v in t.items()}


# ---- keeping and choosing ------------------------------------------------------------------------


def test_keep_deletes_the_oldest_by_number(tmp_path):
    for step in [2, 10, 9, 123456789]:
        save(tmp_path, step, {"s": step}, keep=2)
    assert steps(tmp_path) == [10, 123456789]
    assert newest(tmp_path).tree() == {"s": 123456789}
    prune(tmp_path, 1)
    assert steps(tmp_path) == [123456789]
    with pytest.raises(ValueError, match="at least 1"):
        prune(tmp_path, 0)


def test_saving_behind_damaged_newer_ones_keeps_what_was_saved(tmp_path):
    for step in [30, 40]:
        (save(tmp_path, step, {}) / "index.json").unlink()
    save(tmp_path, 10, {}, keep=2)
    save(tmp_path, 20, {}, keep=1)
    assert newest(tmp_path, warn=lambda _: None).step == 20


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, {"v": 1})
    save(tmp_path, 1, {"v": 2})
    assert newest(tmp_path).tree() == {"v": 2}
    assert not leftovers(tmp_path)


def test_foreign_names_are_neither_read_nor_deleted(tmp_path):
    for name in ["step-7", "step-99999999.bak", ".tmp-mine", "notes"]:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000099").write_text("a file")
    (tmp_path / ".tmp-step-00000005").mkdir()
    save(tmp_path, 1, {}, keep=1)
    assert newest(tmp_path, warn=pytest.fail).step == 1
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        "step-7",
        "step-99999999.bak",
        ".tmp-mine",
        "notes",
        "step-00000099",
        "step-00000001",
    }


def test_resolve_takes_a_run_or_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no intact checkpoint"):
        resolve(tmp_path)
    save(tmp_path, 1, {})
    save(tmp_path, 2, {})
    assert resolve(tmp_path).step == 2
    assert resolve(tmp_path / "step-00000001").step == 1
    (tmp_path / "step-00000001").rename(tmp_path / "best")
    assert resolve(str(tmp_path / "best")).step == 1
    assert newest(tmp_path / "nowhere") is None


# ---- damage --------------------------------------------------------------------------------------


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


DAMAGE = {
    "truncated": (lambda p: truncate(p / "rank_0.safetensors"), "bytes, but"),
    "longer": (lambda p: (p / "rank_0.safetensors").open("ab").write(b"x"), "bytes, but"),
    "data flipped": (lambda p: flip(p / "rank_0.safetensors", -1), "another sha256"),
    "header flipped": (lambda p: flip(p / "rank_0.safetensors", 3), "another sha256"),
    "index flipped": (lambda p: flip(p / "index.json", -200), "another sha256"),
    "index truncated": (lambda p: truncate(p / "index.json"), "another sha256"),
    "index empty": (lambda p: (p / "index.json").write_text(""), "another sha256"),
    "list flipped": (lambda p: flip(p / "files.json", -20), "another sha256"),
    "list gone": (lambda p: (p / "files.json").unlink(), "cannot be read: No such file"),
    "shard gone": (lambda p: (p / "rank_0.safetensors").unlink(), "cannot be read: No such file"),
    "index gone": (lambda p: (p / "index.json").unlink(), "no readable index.json"),
    "emptied": (lambda p: [f.unlink() for f in p.iterdir()], "no readable index.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, kind, capsys):
    tree = {"w": grid(), "lr": 0.125}
    save(tmp_path, 9, tree)
    damage, sentence = DAMAGE[kind]
    damage(save(tmp_path, 10, tree))
    with pytest.raises(CheckpointDamaged, match=sentence):
        load(tmp_path / "step-00000010")
    assert newest(tmp_path).step == 9
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert sentence in printed
    assert "step-00000010" in printed


def test_every_flipped_bit_of_the_index_is_found(tmp_path):
    path = save(tmp_path, 1, {"w": torch.ones(2, 2), "lr": 0.1, "nan": math.nan})
    index = (path / "index.json").read_bytes()
    for i in range(len(index)):
        flip(path / "index.json", i)
        with pytest.raises(CheckpointDamaged):
            load(path)
        (path / "index.json").write_bytes(index)
    load(path)


def reseal(path, change, files=None):
    """A checkpoint changed by someone who also corrects its checksums.

    files: what files.json is to name, if it is not what is there.
    """
    body = json.loads((path / "index.json").read_bytes())["body"]
    there = {file.name: facts_of(file) for file in path.glob("rank_*")}
    if body["format"] == 1:
        body["files"] = files or there
    else:
        (path / "files.json").write_bytes(slices.as_json(files or there))
        body["files"] = facts_of(path / "files.json")
    change(body)
    seal(path, body)


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("file", ["rank_0.safetensors", "index.json"])
def test_a_pickle_in_place_of_a_file_runs_no_code(tmp_path, file):
    path = save(tmp_path, 1, {"w": torch.ones(2)})
    (path / file).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    if file != "index.json":
        reseal(path, lambda body: None)
    with pytest.raises(CheckpointDamaged):
        load(path).tree()
    if file != "index.json":
        with pytest.raises(CheckpointDamaged):
            load(path, verify=False).tree()
    assert not (tmp_path / "ran").exists()


OUTSIDE = ["../rank_0.safetensors", "{out}/rank_0.safetensors", "rank_0.safetensors/.."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    path = save(tmp_path, 1, {"w": torch.ones(2)})
    name = name.format(out=tmp_path)
    shard = path / "rank_0.safetensors"
    (tmp_path / "rank_0.safetensors").write_bytes(shard.read_bytes())
    reseal(path, lambda body: None, {shard.name: facts_of(shard), name: facts_of(shard)})
    with pytest.raises(CheckpointDamaged, match=r"no rank_N\.safetensors"):
        load(path)

    # In format 1 every slice named its file.
    def elsewhere(body):
        body["tensors"]["w"]["slices"][0]["file"] = name

    reseal(path, lambda body: None)
    reseal(as_format_1(path), elsewhere)
    for verify in (True, False):
        with pytest.raises(CheckpointDamaged, match=r"no rank_N\.safetensors"):
            load(path, verify).tree()
    reseal(path, elsewhere, {shard.name: facts_of(shard), name: facts_of(shard)})
    with pytest.raises(CheckpointDamaged, match=r"no rank_N\.safetensors"):
        load(path)


FORGED_1 = {
    "a shape that is not covered": lambda w: w.update(shape=[99]),
    "a slice beyond the shape": lambda w: w["slices"][0].update(offsets=[1]),
    "a smaller tensor than is stored": lambda w: (
        w.update(shape=[1]),
        w["slices"][0].update(shape=[1]),
    ),
    "another dtype": lambda w: w.update(dtype="F64"),
    "another key": lambda w: w["slices"][0].update(key="v"),
    "no slice": lambda w: w.update(slices=[]),
    "the same slice twice": lambda w: w.update(slices=w["slices"] * 2),
    "an offset with a point": lambda w: w["slices"][0].update(offsets=[0.0]),
    "nothing": lambda w: w.clear(),
}


@pytest.mark.parametrize("kind", FORGED_1)
def test_an_index_of_format_1_that_contradicts_the_files_is_refused(tmp_path, kind):
    path = as_format_1(save(tmp_path, 1, {"w": torch.ones(2)}))
    assert torch.equal(load(path).tensor("w"), torch.ones(2))
    reseal(path, lambda body: FORGED_1[kind](body["tensors"]["w"]))
    with pytest.raises(CheckpointDamaged):
        load(path)


def save_rows(rank, world, out_dir):
    return save(out_dir, 1, {"w": slice_of(rank, world, grid(), 0)})


# w has 8 rows of 6 numbers, two on each of four ranks.
ROWS = {"rank": 0, "offsets": [0, 0], "shape": [2, 6], "repeat": [[4, 1, [2, 0]]]}
FORGED = {
    "a shape that is not covered": lambda b, w, s: w.update(shape=[9, 6]),
    "a shape with a point": lambda b, w, s: w.update(shape=[8.0, 6]),
    "a slice beyond the shape": lambda b, w, s: s.update(offsets=[1, 0]),
    "a smaller tensor than is stored": lambda b, w, s: (
        w.update(shape=[4, 6]),
        s.update(shape=[1, 6], repeat=[[4, 1, [1, 0]]]),
    ),
    "another dtype": lambda b, w, s: w.update(dtype="F32"),
    "no sharding": lambda b, w, s: w.update(sharding=1),
    "a sharding counted from the end": lambda b, w, s: w.update(sharding=-1),
    "a sharding without slices": lambda b, w, s: b["shardings"][0].clear(),
    "every slice twice": lambda b, w, s: b["shardings"][0].append(dict(s)),
    "two slices in one file": lambda b, w, s: s.update(repeat=[[4, 0, [2, 0]]]),
    "grids that share a rank": lambda b, w, s: (
        s.update(repeat=[[3, 1, [2, 0]]]),
        b["shardings"][0].append(ROWS | {"rank": 2, "offsets": [6, 0], "repeat": []}),
    ),
    "repeats that share a rank": lambda b, w, s: s.update(
        shape=[2, 3], repeat=[[2, 1, [0, 3]], [4, 1, [2, 0]]]
    ),
    "rows shifted by one": lambda b, w, s: (
        s.update(offsets=[1, 0], repeat=[[3, 1, [2, 0]]]),
        b["shardings"][0].append(ROWS | {"rank": 3, "offsets": [7, 0], "shape": [1, 6]}),
    ),
    "a rank that is missing": lambda b, w, s: s.update(repeat=[[3, 1, [2, 0]]]),
    "a rank too many": lambda b, w, s: b.update(world=3),
    "a rank below zero": lambda b, w, s: s.update(rank=-1),
    "ranks one further": lambda b, w, s: (b.update(world=5), s.update(rank=1)),
    "an offset with a point": lambda b, w, s: s.update(offsets=[0.0, 0]),
    "a move with a point": lambda b, w, s: s.update(repeat=[[4, 1, [2.0, 0]]]),
    "a move back": lambda b, w, s: s.update(offsets=[6, 0], repeat=[[4, 1, [-2, 0]]]),
    "a move in one dimension": lambda b, w, s: s.update(repeat=[[4, 1, [2]]]),
    "a move that leaves gaps": lambda b, w, s: (
        w.update(shape=[14, 6]),
        s.update(repeat=[[4, 1, [4, 0]]]),
    ),
    "nothing": lambda b, w, s: s.clear(),
}


@pytest.mark.parametrize("kind", FORGED)
def test_an_index_that_contradicts_the_files_is_refused(four_rows, tmp_path, kind):
    path = Path(shutil.copytree(four_rows, tmp_path / "step-00000001"))
    assert torch.equal(load(path).tensor("w"), grid())

    def forge(body):
        assert body["shardings"] == [[ROWS]]
        FORGED[kind](body, body["tensors"]["w"], body["shardings"][0][0])

    reseal(path, forge)
    with pytest.raises(CheckpointDamaged):
        load(path)


@pytest.fixture(scope="module")
def four_rows(tmp_path_factory):
    return run_ranks(4, save_rows, tmp_path_factory.mktemp("rows"))[0]


def test_files_that_were_swapped_are_found_although_they_are_alike(four_rows, tmp_path):
    path = Path(shutil.copytree(four_rows, tmp_path / "step-00000001"))
    one, two = (path / f"rank_{rank}.safetensors" for rank in (1, 2))
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)
    with pytest.raises(CheckpointDamaged, match=r"rank_1.safetensors has changed"):
        load(path)


def test_a_list_without_one_of_the_files_is_refused(four_rows, tmp_path):
    path = Path(shutil.copytree(four_rows, tmp_path / "step-00000001"))
    there = json.loads((path / "files.json").read_bytes())
    assert there.keys() == {f"rank_{rank}.safetensors" for rank in range(4)}
    for left in ({}, {k: v for k, v in there.items() if "rank_2" not in k}):
        reseal(path, lambda body: None, left | {"rank_9.safetensors": there["rank_3.safetensors"]})
        (path / "rank_9.safetensors").write_bytes((path / "rank_3.safetensors").read_bytes())
        with pytest.raises(CheckpointDamaged, match="no checksum of rank_2|fewer files"):
            load(path)


@pytest.mark.parametrize(
    "body",
    [
        {"tree": [], "tensors": {}},
        {"step": 2},
        {"step": "1"},
        {"files": []},
        {"shardings": {}},
        {"world": "4"},
        {"tree": {"w": {"$": "tensor"}, "lr": {"$": None}}},
        {"tree": {"w": {"$": "tensor"}, "lr": {"$": "value", "rank": 0}}},
    ],
    ids=str,
)
@pytest.mark.parametrize("version", [1, 2])
def test_an_index_that_save_cannot_have_written_is_refused(tmp_path, body, version):
    path = save(tmp_path, 1, {"w": torch.ones(2)})
    if version == 1:
        as_format_1(path)
    forged = json.loads((path / "index.json").read_bytes())["body"] | body
    seal(path, forged)
    for verify in (True, False):
        if version == 1 and body.keys() & {"shardings", "world"}:
            load(path, verify)  # these are words of format 2
            continue
        with pytest.raises(CheckpointDamaged, match="contradicts itself"):
            load(path, verify)


def test_an_index_cannot_ask_for_more_memory_than_its_slices_need():
    inner = {"rank": 0, "offsets": [1] * 20, "shape": [1] * 20, "repeat": []}
    with pytest.raises(ValueError, match="pieces"):
        shardings.check("w", [3] * 20, [inner], world=1)
    scattered = ROWS | {"repeat": [[2**40, 1, [4, 0]]]}
    with pytest.raises(ValueError, match="scattered pieces"):
        shardings.check("w", [2**44, 6], [scattered], world=2**40)


def test_an_index_with_a_tensor_outside_of_its_tree_is_refused(tmp_path):
    path = save(tmp_path, 1, {"w": torch.ones(2)})
    reseal(path, lambda body: body.update(tree={}))
    with pytest.raises(CheckpointDamaged, match="w is a tensor"):
        load(path)


def test_a_later_format_stops_instead_of_falling_back(tmp_path):
    save(tmp_path, 1, {})
    reseal(save(tmp_path, 2, {}), lambda body: body.update(format=3))
    with pytest.raises(ValueError, match="load it with the code that wrote it") as e:
        newest(tmp_path)
    assert not isinstance(e.value, CheckpointDamaged)


# ---- several ranks -------------------------------------------------------------------------------


def slice_of(rank, world, t, dim):
    rows = torch.arange(t.shape[dim]).chunk(world)[rank]
    offsets = [0] * t.dim()
    offsets[dim] = int(rows[0])
    return Slice(t.index_select(dim, rows), Shard(tuple(t.shape), tuple(offsets)))


def save_slices(rank, world, out_dir):
    whole = random_bits((8, 6), torch.bfloat16)
    fp8 = random_bits((8,), torch.float8_e5m2)
    nobody = Slice(fp8[:0], Shard((8,), (0,)))  # a rank may hold nothing of a tensor
    tree = {
        "model": {
            "rows": slice_of(rank, world, whole, 0),
            "same": whole,
            f"stage{rank}": torch.tensor(rank),
        },
        "columns": slice_of(rank // 2, world // 2, whole, 1),  # each slice on two ranks
        "fp8": nobody if rank == 0 else slice_of(rank - 1, world - 1, fp8, 0),
        "groups": [{"lr": rank / 2, f"only{rank}": rank}],
        "banned": [7] * (world - rank),
        "loss": {"value": 1} if rank == 0 else math.nan,
        "rank": rank,
    }
    save(out_dir, 4, tree if rank != 2 else tree | {"late": 1})


def test_any_layout_reads_what_four_ranks_saved(tmp_path):
    run_ranks(4, save_slices, tmp_path)
    c = load(tmp_path / "step-00000004")
    whole, fp8 = random_bits((8, 6), torch.bfloat16), random_bits((8,), torch.float8_e5m2)
    tree = c.tree()
    for read in (tree["model"]["rows"], tree["columns"], tree["model"]["same"]):
        assert raw(read) == raw(whole)
    assert raw(tree["fp8"]) == raw(fp8)
    for r0 in range(8):
        for r1 in range(r0, 9):
            for name in ("model/rows", "columns"):
                assert raw(c.tensor(name, (r0, 1), (r1 - r0, 4))) == raw(whole[r0:r1, 1:5])
    assert [int(tree["model"][f"stage{r}"]) for r in range(4)] == [0, 1, 2, 3]
    assert tree["groups"] == [{"lr": 0.0, "only0": 0, "only1": 1, "only2": 2, "only3": 3}]
    assert (tree["rank"], tree["late"], tree["banned"], tree["loss"]) == (
        0,
        1,
        [7] * 4,
        {"value": 1},
    )
    files = [load_file(c.path / f"rank_{r}.safetensors") for r in range(4)]
    assert ["model/same" in f for f in files] == [True, False, False, False]
    assert ["columns" in f for f in files] == [True, False, True, False]
    assert ["fp8" in f for f in files] == [False, True, True, True]


def test_reading_a_box_opens_only_the_files_that_overlap_it(tmp_path):
    run_ranks(4, save_slices, tmp_path)
    (tmp_path / "step-00000004" / "rank_3.safetensors").unlink()
    c = load(tmp_path / "step-00000004", verify=False)
    assert c.tensor("model/rows", shape=(6, 6)).shape == (6, 6)
    with pytest.raises(CheckpointDamaged, match="rank_3"):
        c.tensor("model/rows")


def save_and_reload_elsewhere(rank, world, out_dir):
    t = grid()
    save(out_dir, 1, {"w": slice_of(rank, world, t, 0)})
    other = slice_of(rank, world, t, 1)  # saved by rows, read by columns
    read = load(out_dir / "step-00000001").tensor("w", other.shard.offsets, other.tensor.shape)
    return torch.equal(read, other.tensor)


def test_rows_are_read_back_as_columns_on_three_ranks(tmp_path):
    assert run_ranks(3, save_and_reload_elsewhere, tmp_path) == [True] * 3


def save_in_a_subgroup(rank, world, out_dir):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    tree = {} if rank == 1 else {f"r{rank}": torch.tensor(rank)}
    save(out_dir / str(rank // 2), 1, tree, group=groups[rank // 2])


def test_a_group_saves_alone_and_an_empty_rank_has_no_file(tmp_path):
    run_ranks(4, save_in_a_subgroup, tmp_path)
    assert load(tmp_path / "0" / "step-00000001").names() == ["r0"]
    assert load(tmp_path / "1" / "step-00000001").names() == ["r2", "r3"]
    assert not (tmp_path / "0" / "step-00000001" / "rank_1.safetensors").exists()


def save_dtensors(rank, world, out_dir):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Split

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = torch.nn.Linear(6, 8, dtype=torch.float64)
    places = {"weight": Split(0), "bias": Replicate()}
    for name, place in places.items():
        t = grid() if name == "weight" else grid()[0:1, :].new_tensor(range(8))
        setattr(model, name, torch.nn.Parameter(distribute_tensor(t, mesh["tp"], [place])))
    fully_shard(model, mesh=mesh["dp"])  # cuts the rows of the weight a second time
    uneven = distribute_tensor(grid(5, 3), mesh, [Split(0), Split(1)])
    save(out_dir, 1, {"model": model.state_dict(), "uneven": uneven})
    with pytest.raises(ValueError, match="not summed"):
        save(out_dir, 2, {"p": DTensor.from_local(torch.ones(2), mesh["tp"], [Partial()])})


def test_dtensors_of_fsdp_over_tensor_parallel_are_saved_as_slices(tmp_path):
    import torch.distributed.fsdp  # noqa: F401 - once, here, and not in each of four forks

    run_ranks(4, save_dtensors, tmp_path)
    tree = newest(tmp_path).tree()
    assert torch.equal(tree["model"]["weight"], grid())
    assert torch.equal(tree["model"]["bias"], torch.arange(8, dtype=torch.float64))
    assert torch.equal(tree["uneven"], grid(5, 3))


def fail_on_one(rank, world, out_dir, where, failing):
    save(out_dir, 1, {"w": grid(), "mine": {str(rank): torch.ones(3)}})
    real = getattr(saving, where)

    def full(path, *args, **kwargs):
        if rank == failing:
            if where == "write_tensors":
                Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args, **kwargs)

    setattr(saving, where, full)
    try:
        save(out_dir, 2, {"w": grid(), "mine": {str(rank): torch.ones(3)}}, keep=1)
    except OSError as e:
        return str(e)
    finally:
        setattr(saving, where, real)


FAILING = [("write_tensors", 0), ("write_tensors", 1), ("prune", 0), ("sync", 1), ("sha256", 0)]


@pytest.mark.parametrize(("where", "failing"), FAILING)
def test_a_full_disk_on_one_rank_raises_on_all_and_loses_nothing(tmp_path, where, failing):
    sentences = run_ranks(2, fail_on_one, tmp_path, where, failing)
    for sentence in sentences:
        assert f"step 2 was not saved, rank {failing}: [Errno 28] No space left" in sentence
        assert "earlier checkpoints" in sentence
    assert steps(tmp_path) == [1]
    assert not leftovers(tmp_path)
    assert torch.equal(newest(tmp_path, warn=pytest.fail).tensor("w"), grid())


def disagree(rank, world, out_dir, case):
    tree = {
        "shape": {"w": torch.zeros(2 + rank)},
        "dtype": {"w": torch.zeros(2, dtype=[torch.float32, torch.float64][rank])},
        "kind": {"w": torch.zeros(2) if rank else 1},
        "hole": {"w": Slice(torch.zeros(1), Shard((3,), (rank,)))},
        "type": {"w": object() if rank else 1},
    }[case]
    with pytest.raises(ValueError, match="step 1 was not saved") as e:
        save(out_dir, 1, tree)
    return str(e.value)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("shape", "w is F32 [3] on rank 1 but F32 [2] on a lower one"),
        ("dtype", "w is F64 [2] on rank 1 but F32 [2] on a lower one"),
        ("kind", "w is a tensor on one rank but not on a lower one"),
        ("hole", "no rank holds the part of w [3] that begins at [2]"),
        ("type", "rank 1: w is of type object"),
    ],
)
def test_ranks_that_disagree_all_get_the_same_sentence(tmp_path, case, sentence):
    for said in run_ranks(2, disagree, tmp_path, case):
        assert sentence in said
    assert list(tmp_path.iterdir()) == []


# ---- killed --------------------------------------------------------------------------------------


def in_a_fork(fn, *args):
    process = multiprocessing.get_context("fork").Process(target=fn, args=args, daemon=True)
    process.start()
    return process


def save_until_the_nth_call(out_dir, step, n):
    """Save, and die without any clean-up at the n-th call that changes the disk."""
    calls = 0

    def dying(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    torch.set_num_threads(1)
    save(out_dir, step, {"w": grid(), "step": step}, keep=1)
    os._exit(0)


@needs_fork
@pytest.mark.parametrize("step", [1, 2], ids=["again the same step", "the next step"])
def test_a_kill_between_any_two_disk_operations_loses_no_checkpoint(tmp_path, step):
    for n in range(1, 60):
        save(tmp_path, 1, {"w": grid(), "step": 1})
        process = in_a_fork(save_until_the_nth_call, tmp_path, step, n)
        process.join()
        survivor = newest(tmp_path, warn=pytest.fail)
        assert survivor.step in (1, step)
        assert torch.equal(survivor.tensor("w"), grid())
        assert all(load(path) for path in tmp_path.glob("step-*")), "none is half deleted"
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        save(tmp_path, 3, {}, keep=1)
        assert steps(tmp_path) == [3], "a later save tidies up"
        assert not leftovers(tmp_path)
        prune(tmp_path, 1)
        (tmp_path / "step-00000003").rename(tmp_path / f"done{n}")
    assert 8 < n < 59


def save_forever(out_dir):
    torch.set_num_threads(1)
    for i in range(10**6):
        save(out_dir, 1 + i // 2, {"w": torch.full((50_000,), i), "i": i}, keep=2)


@needs_fork
def test_a_kill_at_any_time_leaves_a_loadable_newest(tmp_path):
    save(tmp_path, 0, {"w": torch.zeros(1), "i": 0})
    for _ in range(12):
        process = in_a_fork(save_forever, tmp_path)
        time.sleep(random.uniform(0.02, 0.12))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        tree = newest(tmp_path, warn=pytest.fail).tree()
        assert (tree["w"] == tree["i"]).all()


def hold(out_dir, pipe):
    lock = RunLock(out_dir)
    pipe.send("held")
    time.sleep(60)
    lock.release()


@needs_fork
def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    here, there = multiprocessing.Pipe()
    process = in_a_fork(hold, tmp_path, there)
    assert here.recv() == "held"
    with pytest.raises(
        ValueError, match=f"in use by process {process.pid} .* take another out_dir"
    ):
        RunLock(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    RunLock(tmp_path).release()


def say_and_sleep(pipe):
    pipe.send("forked")
    time.sleep(60)


@needs_fork
def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    lock = RunLock(tmp_path)
    here, there = multiprocessing.Pipe()
    child = in_a_fork(say_and_sleep, there)
    assert here.recv() == "forked"
    with pytest.raises(ValueError, match=f"process {os.getpid()}"):
        RunLock(tmp_path)
    lock.release()
    RunLock(tmp_path).release()
    child.kill()
    child.join()


# ---- command line --------------------------------------------------------------------------------


def test_list_show_and_export(tmp_path, capsys):
    save(tmp_path, 1, {})
    flip(tmp_path / "step-00000001" / "index.json", 20)
    save(tmp_path, 2, {"model": {"w.weight": grid()}, "lr": 0.5, "nan": math.nan})
    __main__.main(["list", str(tmp_path)])
    damaged, intact = capsys.readouterr().out.splitlines()
    assert "another sha256" in damaged
    assert "step        2" in intact
    assert "1 tensors" in intact
    __main__.main(["show", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        "model/w.weight: F64 [8, 6], 384 bytes in 1 slice(s)",
        "lr: 0.5",
        "nan: nan",
    ]
    __main__.main(["export", str(tmp_path), str(tmp_path / "out.safetensors")])
    assert torch.equal(load_file(tmp_path / "out.safetensors")["w.weight"], grid())
    __main__.main(["export", str(tmp_path), str(tmp_path / "dcp")])
    found = {"model": {"w.weight": torch.zeros(8, 6, dtype=torch.float64)}}
    torch.distributed.checkpoint.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(found["model"]["w.weight"], grid())
    with pytest.raises(ValueError, match="there already"):
        __main__.main(["export", str(tmp_path), str(tmp_path / "dcp")])


def test_a_mistake_on_the_command_line_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    for args in (
        ["list", str(tmp_path)],
        ["show", str(tmp_path / "nowhere")],
        ["export", str(tmp_path)],
    ):
        with pytest.raises(ValueError):
            __main__.main(args)
    monkeypatch.setattr(sys, "argv", ["checkpoint"])
    with pytest.raises(SystemExit) as e:
        runpy.run_module("checkpoint", run_name="__main__", alter_sys=False)
    out, err = capsys.readouterr()
    assert (e.value.code, out, err.count("\n")) == (2, "", 1)
