"""What an earlier program has saved, this one resumes; what a save says from the second one on."""

import os
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from format_1 import as_format_1
from harness import run_ranks
from test_checkpoint import grid, slice_of
from test_train import ROOT, close, flags, go, rows, trace

from checkpoint import exchange, load, state
from checkpoint import save as saving
from checkpoint.save import Saver
from checkpoint.slices import Slice
from parallel.shard import Shard

BEFORE = "b6f493b"  # the last commit at which ZeRO gave whole parameters to one owner
FLAGS = ["--batch_size=24", "--optim=adamw", "--eval_every=0", "--save_every=0", "--precision=fp64"]
FLAGS += ["--schedule=constant"]  # the same learning rates however many steps are asked for


def on_ranks(rank, world, text, out_dir, *more):
    return go(text, out_dir, *FLAGS, *more)["loss"]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_resumes_from_format_1_bitwise_and_on_more_ranks(tmp_path, text, ranks):
    def run(ranks, name, steps):
        layout = "--data_parallel=zero3" if ranks > 1 else "--data_parallel=auto"
        more = ["--n_layer=1", layout, f"--steps={steps}"]
        run_ranks(ranks, on_ranks, text, tmp_path / name, *more)

    run(ranks, "whole", 4)
    run(ranks, "half", 2)
    path = as_format_1(tmp_path / "half" / "step-00000002")
    assert {f"rng/{rank}" for rank in range(ranks)} <= {*load.load(path).names()}
    shutil.copytree(tmp_path / "half", tmp_path / "more")
    run(ranks, "half", 4)
    assert trace(tmp_path / "half") == trace(tmp_path / "whole")
    assert "rng" in load.newest(tmp_path / "half").names()
    if ranks > 1:
        run(3, "more", 4)
        close(rows(tmp_path / "more"), rows(tmp_path / "whole"), 1e-10)


@pytest.mark.slow
def test_what_an_earlier_program_saved_on_four_ranks_of_zero3_is_resumed(tmp_path, text):
    """On 1, 3 and 8 ranks, and by other layouts: the uninterrupted run of then, to rounding."""
    archive = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip(f"git has no {BEFORE} here")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(tmp_path / "then", filter="data")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    for run, steps in (("whole", 8), ("saved", 4)):
        words = [*FLAGS, "--data_parallel=zero3", f"--steps={steps}"]
        command = [*torchrun, "train.py", *flags(text, tmp_path / run, *words)]
        quiet = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=tmp_path / "then", env=quiet, check=True, capture_output=True)
    index = (tmp_path / "saved" / "step-00000004" / "index.json").read_text()
    assert '"format":1' in index and "rank_3.safetensors" in index
    for world, layout in [(1, "auto"), (3, "zero3"), (8, "zero3"), (3, "ddp"), (8, "fsdp")]:
        out = Path(shutil.copytree(tmp_path / "saved", tmp_path / f"{layout}{world}"))
        run_ranks(world, on_ranks, text, out, f"--data_parallel={layout}", "--steps=8")
        close(rows(out), rows(tmp_path / "whole"), 1e-10)


def save_generators(rank, world, out_dir):
    rows = Slice(torch.full((1, 16), 10 + rank, dtype=torch.uint8), Shard((world, 16), (rank, 0)))
    return saving.save(out_dir, 1, {"rng": rows})


@pytest.mark.parametrize("version", [1, 2])
def test_each_rank_gets_its_generator_and_a_new_one_that_of_rank_0(tmp_path, version):
    path = run_ranks(3, save_generators, tmp_path)[0]
    saved = load.load(as_format_1(path) if version == 1 else path)
    states = [state.rng_of(saved, rank) for rank in range(5)]
    assert all(s.shape == (16,) for s in states)
    assert [int(s[0]) for s in states] == [10, 11, 12, 10, 10]


# ---- later saves ---------------------------------------------------------------------------------
def bytes_to_rank_0(rank, world, out_dir):
    """What this rank sends in each save of a run whose tree changes now and then."""
    told = []
    plain = exchange.gather

    def gather(message, group):
        told[-1].append(len(message))
        return plain(message, group)

    saving.gather = gather
    saver = Saver(out_dir)
    w = slice_of(rank, world, grid(), 0)
    for step in range(1, 7):
        told.append([])
        tree = {"model": {"w": w}, "seen": [0.5] * step, "step": step, f"own{rank}": step * rank}
        if step in (3, 4) and rank == 2:
            # Such as the state of an optimizer, then the same by another name.
            tree["late" if step == 3 else "later"] = torch.ones(3)
        if step >= 5:
            tree["model"] = {"w": slice_of(rank, world, grid(), 1)}
        saver.save(step, tree)
        saver.wait()
    return told, [event["event"] for event in saver.pop_events()]


def test_who_holds_what_is_told_again_only_after_a_change(tmp_path):
    for told, events in run_ranks(3, bytes_to_rank_0, tmp_path):
        assert events == ["save"] * 6
        # A first save, a tensor more, another name, another cut: four messages, otherwise two.
        assert [len(messages) for messages in told] == [4, 2, 4, 4, 4, 2]
        assert all(max(told[i]) < 250 for i in (1, 5))
    for step in range(1, 7):
        saved = load.load(tmp_path / f"step-{step:08d}")
        tree = saved.tree()
        assert torch.equal(tree["model"]["w"], grid()) and ("late" in tree) == (step == 3)
        assert ("later" in tree) == (step == 4)
        assert tree["seen"] == [0.5] * step and tree["step"] == step
        assert [tree[f"own{rank}"] for rank in range(3)] == [0, step, 2 * step]
        assert saved.n_slices("model/w") == 3
