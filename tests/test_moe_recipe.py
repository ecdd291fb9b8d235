"""configs/moe_gpu.toml: what it says of itself, and its flags on CPUs with a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from harness import run_ranks

import train
from memory import plan
from memory.predict import Layout, Model, predict
from memory.shapes import Experts
from settings.parse import parse

RECIPE = Path(__file__).parent.parent / "configs" / "moe_gpu.toml"
TINY = {
    "data": RECIPE.parent.parent / "model.py",
    "tokenizer": "bytes",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 16,
    "micro_batch_size": 1,
    "steps": 3,
    "eval_every": 3,
    "eval_tokens": 256,
    "watch_every": 1,
    "device": "cpu",
    "compile": "off",
    "plot": "false",
}


def planned():
    """(model, layout, cluster, batch) of the recipe, for memory/plan.py."""
    cfg = parse([str(RECIPE)])
    experts = Experts(cfg.n_expert, cfg.n_expert_active)
    # Tokens of --tokenizer=gpt2, and our rounding of their number.
    shape = cfg.n_layer, cfg.n_embd, cfg.n_head, cfg.n_head, 50304, cfg.block_size
    m = Model(*shape, experts=experts)
    x = Layout(ep=cfg.ep, data_parallel=cfg.data_parallel, micro_batch_size=cfg.micro_batch_size)
    return m, x, plan.cluster_of(plan.FLAGS | dict(gpu="H100")), cfg.batch_size


def test_the_recipe_has_the_size_and_the_figures_that_it_names():
    text = RECIPE.read_text()
    m, x, c, batch = planned()
    assert "1.01e9 weights" in text and round(m.parameters / 1e9, 2) == 1.01
    assert "124e6 a token" in text and round(m.active / 1e6) == 124
    with_ep = predict(m, c, x, batch)
    without = predict(m, c, replace(x, ep=1), batch)
    figures = [f"{p.held['total'] / 1e9:.0f} GB and {p.step:.3f} s" for p in (with_ep, without)]
    assert f"{figures[0]} a step; with ep = 1 {figures[1]}" in text
    assert "Not yet measured" in text


def trained(rank, world, folder, *more):
    flags = TINY | dict(out_dir=f"{folder}/run")
    train.main(parse([str(RECIPE), *(f"--{k}={v}" for k, v in flags.items()), *more]))
    lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    "world, more",
    [(2, ("--ep=2", "--n_expert=4")), (8, ())],
)
def test_the_recipe_runs_with_a_tiny_model(world, more, tmp_path):
    rows = run_ranks(world, trained, str(tmp_path), *more)[0]
    steps = [row for row in rows if "loss" in row and row["step"] > 0]
    assert [row["step"] for row in steps] == [1, 2, 3]
    # Experts' rows have travelled, and their loads are there.
    assert all(row["sent_bytes"] > 0 and row["loss"] < 6 for row in steps)
    assert (tmp_path / "run" / "moe_load.jsonl").exists()
