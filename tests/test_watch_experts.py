"""What a watched step says of its experts is what a plain computation finds, on every layout; the
file survives resuming and rollbacks; the picture's colours are the loads."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run_ranks
from test_train import go, rows

from data.dataset import Dataset
from layers.moe import MoE
from metrics import experts
from metrics.experts import Loads, edges_of, picture, read, statistics
from model import GPT, initial_weight
from run import build
from settings import parse

ROOT = Path(__file__).parent.parent
EXPERTS = ("--n_layer=4", "--n_expert=5", "--moe_every=2", "--expert_width=8", "--watch_every=1")
EXACT = ("--precision=fp64", "--zero_init=false", "--eval_every=none", "--moe_bias_lr=0.1")
LAYERS = {1, 3}


def recorded(folder) -> list[dict]:
    lines = (Path(folder) / "moe_load.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# ---- numbers -------------------------------------------------------------------------------------
def test_even_loads_are_one_and_one_expert_for_all_is_their_number():
    found = statistics({0: [6, 6, 6, 6], 2: [0, 12, 0, 0], 5: [3, 1, 0, 0]}, [0.5, -1.0, 2.0])
    entropy = (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(4)
    expected = {
        0: (1.0, 1.0, 1.0, 0.5),
        2: (4.0, 0.0, 0.0, -1.0),
        5: (3.0, 0.0, pytest.approx(entropy, rel=1e-15), 2.0),
    }
    names = ("moe_load_max", "moe_load_min", "moe_load_entropy", "moe_log_z")
    for layer, numbers in expected.items():
        assert tuple(found.pop(f"{name}/{layer}") for name in names) == numbers
    assert found == {"moe_load_max": 4.0, "moe_load_min": 0.0, "moe_load_entropy": 0.0}
    found = statistics({0: [4, 2], 1: [3, 3]}, [0.0, 0.0])
    assert found["moe_load_max"] == 4 / 3 and found["moe_load_min"] == 2 / 3
    assert found["moe_load_entropy"] == found["moe_load_entropy/0"] < 1


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """Three steps on one process."""
    folder = tmp_path_factory.mktemp("alone")
    go(text, folder, *EXPERTS, *EXACT, "--steps=3", "--plot=true")
    return folder


def test_the_first_row_is_what_is_found_by_hand(alone, text):
    """The model is built again from what the run wrote; each token's choice is made in Python."""
    cfg = parse.parse([f"{alone}/config.toml", "--resume=never"])
    corpus = build.corpus(cfg)
    data = Dataset(corpus.train, cfg.block_size, cfg.seed, corpus.tokenizer.n_vocab)
    model = build_model(cfg).double()
    seen = {}  # layer -> inputs (tokens, C)
    for i in LAYERS:
        layer = model.blocks[str(i)].mlp
        assert isinstance(layer, MoE)
        layer.register_forward_pre_hook(
            lambda _, inputs, i=i: seen.__setitem__(i, inputs[0].detach().flatten(0, 1))
        )
    batch = data(range(cfg.batch_size))
    model(batch[:, :-1], batch[:, 1:])
    [row] = [row for step, row in rows(alone).items() if step == 1]
    tokens = {}
    for i, x in seen.items():
        logits = x @ model.blocks[str(i)].mlp.router.weight.t()
        counts = [0] * cfg.n_expert
        for of_token in logits.tolist():
            for e in sorted(range(len(of_token)), key=lambda e: -of_token[e])[:2]:
                counts[e] += 1
        tokens[str(i)] = counts
        log_z = logits.exp().sum(-1).log().mean().item()
        assert row[f"moe_log_z/{i}"] == pytest.approx(log_z, rel=1e-11)
        assert row[f"moe_load_max/{i}"] == max(counts) * cfg.n_expert / sum(counts)
    assert recorded(alone)[0] == {"step": 1, "tokens": tokens}
    assert len({*map(tuple, tokens.values())}) == 2


def build_model(cfg) -> GPT:
    model = GPT(build.model_config(cfg))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_weight(model.config, name, p.shape))
    return model


def on_ranks(rank, world, *args):
    go(*args)


@pytest.mark.parametrize(
    "world, how",
    [(1, ["--micro_batch_size=2"]), (2, ["--data_parallel=ddp", "--micro_batch_size=2"])]
    + [
        pytest.param(2, [f"--data_parallel={layout}"], marks=pytest.mark.slow)
        for layout in ("zero1", "zero2", "zero3", "fsdp")
    ]
    + [pytest.param(1, [f"--activation_checkpoint={x}"]) for x in ("full", "selective")],
)
def test_every_layout_says_the_same(alone, text, tmp_path, world, how):
    args = text, tmp_path, *EXPERTS, *EXACT, "--steps=3", *how
    go(*args) if world == 1 else run_ranks(world, on_ranks, *args)
    assert recorded(tmp_path) == recorded(alone)
    here, there = rows(tmp_path), rows(alone)
    for step in (1, 2, 3):
        names = {name for name in there[step] if name.startswith("moe_")}
        assert {name.rpartition("/")[2] for name in names if "/" in name} == {"1", "3"}
        for name in names:
            assert here[step][name] == pytest.approx(there[step][name], rel=1e-10), name


def test_rows_of_other_steps_and_models_without_experts_have_none(text, tmp_path):
    go(text, tmp_path / "a", *EXPERTS, "--watch_every=2", "--steps=3", "--plot=true")
    with_loads = [step for step, row in rows(tmp_path / "a").items() if "moe_load_max" in row]
    assert with_loads == [2] == [row["step"] for row in recorded(tmp_path / "a")]
    go(text, tmp_path / "b", "--watch_every=1", "--steps=2", "--plot=true")
    assert not any(name.startswith("moe") for name in rows(tmp_path / "b")[1])
    assert not [path for path in (tmp_path / "b").iterdir() if "moe" in path.name]


# ---- the file ------------------------------------------------------------------------------------
def test_a_resumed_run_cuts_the_steps_that_it_does_again(text, tmp_path):
    tiny = *EXPERTS, "--save_every=2", "--eval_every=none"
    go(text, tmp_path, *tiny, "--steps=2", "--schedule=constant")
    first = recorded(tmp_path)
    # What the rest of a run that was killed leaves.
    later = json.dumps({"step": 3, "tokens": {"1": [640, 0, 0, 0, 0], "3": [640, 0, 0, 0, 0]}})
    with open(tmp_path / "moe_load.jsonl", "a") as file:
        file.write(f'{later}\n{later.replace("3,", "9,", 1)}\n{{"step": 10, "tok')
    go(text, tmp_path, *tiny, "--steps=4", "--schedule=constant")
    found = recorded(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3, 4] and found[:2] == first
    assert found[2] != json.loads(later)


def test_a_fresh_start_moves_the_file_and_the_picture_aside(text, tmp_path):
    for _ in range(2):
        go(text, tmp_path, *EXPERTS, "--steps=2", "--resume=never", "--plot=true")
    for folder in (tmp_path, tmp_path / "earlier-1"):
        assert [row["step"] for row in recorded(folder)] == [1, 2]
        assert (folder / "moe_load.png").stat().st_size > 10_000


def test_a_rollback_cuts_what_it_has_undone(tmp_path):
    loads = Loads(tmp_path)
    for step, n in ((1, 5), (2, 6), (3, 7), (2, 8)):
        loads.row(step, [0], torch.tensor([[n, 9]]), torch.zeros(1))
    assert [(row["step"], row["tokens"]["0"][0]) for row in recorded(tmp_path)] == [(1, 5), (2, 8)]


def test_a_rollback_of_a_run_too(text, tmp_path, monkeypatch):
    """The fourth step's loss is no number, once: the run goes back and does steps again."""
    from run.microbatches import MicroBatches

    plain, calls = MicroBatches.forward_backward, []

    def poisoned(self, *args):
        calls.append(0)
        return plain(self, *args) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(MicroBatches, "forward_backward", poisoned)
    more = "--on_nonfinite=rollback", "--monitor.ring_every=2", "--eval_every=none"
    go(text, tmp_path, *EXPERTS, *more, "--steps=6")
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"rollback"' in text and len(calls) > 6
    assert [row["step"] for row in recorded(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_does_not_end_the_run(tmp_path):
    loads = Loads(tmp_path / "gone")
    with pytest.warns(UserWarning, match="cannot be written"):
        row = loads.row(1, [0], torch.tensor([[1, 3]]), torch.zeros(1))
    assert row["moe_load_max"] == 1.5


def test_another_rank_writes_nothing(tmp_path):
    Loads(tmp_path, is_main=False).row(1, [0], torch.tensor([[1, 3]]), torch.zeros(1))
    assert [*tmp_path.iterdir()] == []


# ---- the picture ---------------------------------------------------------------------------------
def test_a_colour_is_a_load_over_its_layers_mean():
    layers = {1: [[4, 4, 4, 4], [0, 8, 4, 4]], 3: [[1, 2, 3, 10], [8, 8, 8, 8]]}
    figure = picture([10, 30], layers, "run")
    maps = [ax for ax in figure.axes if ax.get_title("left").startswith("layer")]
    assert [ax.get_title("left") for ax in maps] == [
        "layer 1: from 0.00 to 2.00 of the mean at step 30",
        "layer 3: from 1.00 to 1.00 of the mean at step 30",
    ]
    first, second = (ax.collections[0] for ax in maps)
    array = first.get_array()
    assert array[:, 0].tolist() == [1, 1, 1, 1]  # a row an expert, a column a step
    assert array[:, 1].tolist() == [None, 2, 1, 1]  # masked: no token
    assert second.get_array()[:, 0].tolist() == [0.25, 0.5, 0.75, 2.5]
    colors = first.cmap
    # No token is yellow, which no load is.
    yellow = [min(r, g) > 0.7 > b + 0.3 for r, g, b, _ in colors(np.linspace(0, 1, 256))]
    red, green, blue, _ = colors.get_bad()
    assert min(red, green) > 0.7 > blue + 0.3 and not any(yellow)
    assert all(channel > 0.95 for channel in colors(first.norm(1.0)))
    assert first.norm(4.0) == pytest.approx(1) and first.norm(0.25) == pytest.approx(0)
    red, blue = colors(first.norm(2.0)), colors(first.norm(0.5))
    assert red[0] > red[2] + 0.3 and blue[2] > blue[0] + 0.3


def test_columns_end_halfway_between_steps():
    assert edges_of([10]) == [9.5, 10.5]
    assert edges_of([10, 20, 50]) == [5, 15, 35, 65]


def test_many_layers_stand_beside_one_another():
    layers = {i: [[1] * 8] for i in range(30)}
    figure = picture([1], layers, "run")
    width, height = figure.get_size_inches()
    assert width < 25 and height < 25
    assert len([ax for ax in figure.axes if ax.get_title("left")]) == 30


@pytest.mark.parametrize("end", ["", '{"step": 7, "tok', "[]\n", '{"step": 7, "tokens": 3}\n'])
def test_reading_takes_what_was_not_undone_and_no_line_of_others(tmp_path, end):
    lines = [
        {"step": 5, "tokens": {"1": [1, 2]}},
        {"step": 6, "tokens": {"1": [3, 4]}},
        {"step": 8, "tokens": {"1": [7, 8]}},  # undone by a rollback
        {"step": 6, "tokens": {"1": [5, 6]}},
        {"step": 9, "tokens": {"1": [3, 4, 5]}},  # of another model
        {"step": 9, "tokens": {"1": [0, 0]}},
        {"step": 9, "tokens": {"x": [5, 6]}},
        {"step": 9, "tokens": {"1": [5, -6]}},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + end
    (tmp_path / "moe_load.jsonl").write_text(text)
    assert read(tmp_path) == ([5, 6], {1: [[1, 2], [5, 6]]})


@pytest.mark.slow
def test_the_command_draws_and_says_where(alone, tmp_path):
    assert (alone / "moe_load.png").exists()
    path = tmp_path / "mine.png"
    done = command(str(alone), f"--out={path}")
    assert done.returncode == 0 and done.stdout == f"{path}\n" and path.exists()
    experts.main([f"{alone}/moe_load.jsonl"])
    for words, says in (
        ([str(tmp_path)], "moe_load.jsonl: No such file.*--n_expert=8 --watch_every=10 makes it"),
        ([], "usage: python -m metrics.experts RUN"),
        ([str(alone), "--step=3"], "usage"),
        ([str(alone), str(alone)], "usage"),
    ):
        with pytest.raises(ValueError, match=says):
            experts.main(words)
    done = command(str(tmp_path))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    (tmp_path / "moe_load.jsonl").write_text("no rows\n")
    with pytest.raises(ValueError, match=re.escape("has no loads of experts")):
        experts.main([str(tmp_path)])


def command(*words: str) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "metrics.experts", *words]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
