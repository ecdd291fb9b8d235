"""bench.py speedrun: tables from invented figures, and a real run of two tiny recipes."""

import math
import re
import types
from statistics import fmean

import numpy as np
import pytest
import torch

import bench
from benchmarks import runs, speedrun
from data import dataset

TINY = """
n_layer = 1
n_head = 2
n_embd = 16
batch_size = 4
steps = 4
threads = 1
device = "cpu"
precision = "fp32"
"""


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """--reference, of rows of 16 tokens, and --recipe, of rows of 24; a cache of their own."""
    monkeypatch.setattr(runs, "CACHE", tmp_path)
    for name, block_size in ("a", 16), ("b", 24):
        (tmp_path / f"{name}.toml").write_text(f"{TINY}block_size = {block_size}\n")
    return [f"--reference={tmp_path / 'a.toml'}", f"--recipe={tmp_path / 'b.toml'}"]


@pytest.fixture
def invented(monkeypatch):
    """No process starts: the seconds and losses of (recipe, seed) come from here, and `ran` says
    who ran."""
    seconds = {
        ("a", 1): 40.0,
        ("a", 2): 44.0,
        ("a", 3): 42.0,
        ("b", 1): 20.0,
        ("b", 2): 20.0,
        ("b", 3): 24.0,
    }
    losses = {
        ("a", 1): 1.6,
        ("a", 2): 1.7,
        ("a", 3): 1.8,
        ("b", 1): 1.60,
        ("b", 2): 1.61,
        ("b", 3): 1.62,
    }
    ran = []

    def run(words, out_dir, ranks=1):
        given = dict(word.partition("=")[::2] for word in words[1:])
        ran.append((words[0].removesuffix(".toml")[-1], int(given.get("--seed", 0))))
        assert {
            "--eval_tokens=32768",
            "--sample_tokens=0",
            "--save_every=0",
            "--plot=false",
            "--resume=never",
        } <= {*words}
        return seconds.get(ran[-1]), [{"step": 4, "val_loss": 9.0}]

    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr(speedrun, "loss_of", lambda run, held_out, multiple: losses[ran[-1]])
    return types.SimpleNamespace(seconds=seconds, losses=losses, ran=ran)


def test_recipes_take_turns_and_the_ratio_is_of_medians(recipes, invented, text, tmp_path, capsys):
    out = tmp_path / "page.md"
    assert bench.main(["speedrun", "--runs=3", f"--data={text}", *recipes, f"--out={out}"]) == 0
    turns = [(name, seed) for seed in (1, 2, 3) for name in "ab"]
    assert invented.ran == [("a", 0), ("b", 0), *turns]  # first an untimed start of each
    printed = capsys.readouterr().out
    assert printed.endswith(page := out.read_text())
    assert "run 2 of 3: ours: 20.0 s, loss 1.6100, val_loss 9.0000" in printed.split(page)[0]
    assert (
        "| reference: a.toml | 42.0 (40.0..44.0) | 1.7000 ± 0.1000 | 1.6000 1.7000 1.8000 | "
        "9.0000 ± 0.0000 | 9.0000 9.0000 9.0000 |" in page
    )
    assert "| ours: b.toml | 20.0 (20.0..24.0) | 1.6100 ± 0.0100 |" in page
    assert "reference / ours: **2.10** (pair by pair 1.75..2.20)" in page
    assert "loss 1.6100 <= 1.7000: reached" in page
    assert "sqrt(3) = 0.1559 >= 3.1 sd = 0.0310: significant" in page


def test_a_loss_above_the_references_is_not_reached(recipes, invented, text, capsys):
    invented.losses |= {("b", 1): 1.75, ("b", 2): 1.70, ("b", 3): 1.80}
    assert bench.main(["speedrun", "--runs=3", f"--data={text}", *recipes]) == 0
    printed = capsys.readouterr().out
    assert "loss 1.7500 > 1.7000: **not reached**" in printed and "**not significant**" in printed


@pytest.mark.parametrize(
    "target, words",
    [
        ("1.605", ["**not reached**", "**not significant**"]),
        ("1.61", [": reached", "**not significant**"]),
        ("1.62", [": reached", "0.0173 < 3.1 sd = 0.0310: **not significant**"]),
        ("1.63", [": reached", "0.0346 >= 3.1 sd = 0.0310: significant"]),
    ],
)
def test_an_entry_alone_is_held_against_a_given_loss(
    target, words, recipes, invented, text, capsys
):
    assert (
        bench.main(["speedrun", f"--loss={target}", "--runs=3", f"--data={text}", recipes[1]]) == 0
    )
    printed = capsys.readouterr().out
    assert {name for name, _ in invented.ran} == {"b"} and "reference / ours" not in printed
    assert all(word in printed for word in words)


def test_one_run_and_a_diverged_one_are_no_proof():
    assert "type --runs=2" in speedrun.verdict([1.0], 2.0)[1]
    said = speedrun.verdict([1.0, math.nan], 2.0)
    assert "not reached" in said[0] and "not significant" in said[1]


@pytest.mark.parametrize(
    "length, multiple", [(2**20, 64), (736_739, 256), (5000, 48), (4097, 4096), (50, 48)]
)
def test_stretches_are_whole_rows_apart_and_inside(length, multiple):
    found = speedrun.stretches(length, multiple)
    sizes = {last - first for first, last in found}
    assert len(sizes) == 1 and sizes.pop() % multiple == 0
    assert all(a[1] <= b[0] for a, b in zip(found, found[1:])) and found[-1][1] < length
    assert sum(last - first for first, last in found) <= speedrun.TOKENS
    assert length < 2**17 or sum(last - first for first, last in found) == speedrun.TOKENS


def test_each_length_of_rows_foretells_the_same_tokens(monkeypatch):
    held_out, seen = dataset.Tokens([np.arange(30_000) % 251], "x"), {}
    for T in (16, 24):

        def model(inputs, targets, T=T):
            assert inputs.shape == targets.shape and inputs.shape[1] == T
            assert torch.equal((inputs + 1) % 251, targets)
            seen.setdefault(T, []).extend(targets.flatten().tolist())
            return targets.double().sum()

        model.config = types.SimpleNamespace(block_size=T)
        monkeypatch.setattr(speedrun.sample, "load", lambda run: (model, None))
        assert speedrun.loss_of("run", held_out, 48) == fmean(seen[T])
    assert seen[16] == seen[24] and len(seen[16]) > 20_000


def test_recipes_of_two_tokenizers_are_refused(recipes, tmp_path, capsys):
    (tmp_path / "b.toml").write_text(TINY + 'tokenizer = "ids"\n')
    assert bench.main(["speedrun", *recipes]) == 2 and "one tokenizer" in capsys.readouterr().err


@pytest.mark.slow
def test_a_speedrun_end_to_end(recipes, text, capsys):
    assert bench.main(["speedrun", "--runs=2", f"--data={text}", *recipes]) == 0
    printed = capsys.readouterr().out
    for who, name in ("reference", "a"), ("ours", "b"):
        (row,) = re.findall(rf"\| {who}: {name}\.toml \| (.+) \|", printed)
        seconds, _, losses, _, logged = (re.findall(r"\d+\.\d+", cell) for cell in row.split("|"))
        assert 0.5 < float(seconds[0]) < 60 and len(losses) == 2
        # Of nearly all tokens
        assert [*map(float, losses)] == pytest.approx([*map(float, logged)], abs=2e-3)
    (tmp := recipes[0].partition("=")[2])
    with open(tmp, "a") as file:
        # There is no head: train.py's
        file.write("lr = 0.1\nembed_lr = 0.1\nhead_lr = 0.1\ntied = true\n")
    assert bench.main(["speedrun", "--runs=1", f"--data={text}", *recipes]) == 1
    assert f"speedrun: {tmp}: train.py: --head_lr" in capsys.readouterr().err
