"""torch.compile changes the speed of a run and nothing else."""

import shutil

import pytest
import torch
import torch._dynamo
from harness import gpu, run_ranks
from torch._dynamo.utils import counters

import train
from metrics import logger
from settings import parse

TINY = [
    "--n_layer=3",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=8",
    "--batch_size=8",
    "--steps=6",
    "--micro_batch_size=2",
    "--eval_every=3",
    "--eval_tokens=100",
    "--save_every=0",
    "--device=cpu",
    "--threads=1",
    "--precision=fp64",
    "--sample_tokens=20",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "squares.txt"
    path.write_text(" ".join(str(i * i) for i in range(3000)))
    return path


def go(text, out_dir, *more):
    torch._dynamo.reset()
    counters.clear()
    train.main(parse.parse([f"--data={text}", f"--out_dir={out_dir}", *TINY, *more]))


def on_ranks(rank, world, *args):
    go(*args)
    return len(counters["graph_break"]), counters["stats"]["unique_graphs"]


def trace(out_dir):
    rows = logger.read_metrics(out_dir / "metrics.jsonl")
    return [row[n] for row in rows for n in ("loss", "grad_norm", "val_loss") if n in row]


AOT = ["--compile=default", "--compile.backend=aot_eager"]


@pytest.mark.parametrize(
    "arch, graphs", [gpu("modern", 2), pytest.param("gpt2", 4, marks=pytest.mark.slow)]
)
def test_one_graph_for_training_one_for_evaluation_and_the_same_run(
    tmp_path, text, arch, graphs, device
):
    # Masks differ: a graph for each layer
    more = [f"--arch={arch}"] + ["--dropout=0.1"] * (arch == "gpt2")
    # Muon's products in bfloat16 would make a rounding of 1e-16 one of 1e-3.
    more += [f"--device={device}", "--opt.ns_dtype=float64"]
    go(text, tmp_path / "eager", "--compile=off", *more)
    assert not counters["stats"]
    go(text, tmp_path / "compiled", *more, *AOT)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == graphs
    assert trace(tmp_path / "compiled") == pytest.approx(trace(tmp_path / "eager"), rel=1e-10)


LAYOUTS = [
    "--data_parallel=fsdp",
    "--data_parallel=zero3",
    "--tp=2 --sp=true",
    "--pp=2",
    "--cp=2",
    "--cp=2 --cp_attention=ulysses",
]


@pytest.mark.parametrize("layout", [pytest.param(x, marks=pytest.mark.slow) for x in LAYOUTS])
def test_every_layout_compiles_and_only_the_ring_breaks_a_graph(tmp_path, text, layout):
    go(text, tmp_path / "alone")
    for breaks, graphs in run_ranks(2, on_ranks, text, tmp_path / "two", *layout.split(), *AOT):
        # Its messages are not traced
        assert (breaks > 0) == (layout == "--cp=2"), counters["graph_break"]
        assert breaks or 2 <= graphs <= 4
    assert trace(tmp_path / "two") == pytest.approx(trace(tmp_path / "alone"), rel=1e-10)


def test_without_a_compiler_a_line_says_so_and_the_run_goes_on(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    go(text, tmp_path / "out", "--compile=default")
    said = capsys.readouterr().out
    assert "C++ compiler" in said and "running uncompiled" in said
    assert not counters["stats"] and len(trace(tmp_path / "out")) > 10


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--compile.backend=aot"], "nothing to do with compile=off"),
        (["--compile=default", "--compile.backend=none_such"], "is none of"),
        (["--compile=default", "--compile.dynamc=true"], "did you mean --compile.dynamic"),
        (["--compile=default", "--pp=2", "--pp_schedule=zerobubble"], "--pp_schedule=1f1b"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, text, flags, says):
    with pytest.raises(ValueError, match=says):
        go(text, tmp_path / "out", *flags)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor_gives_the_same_run(tmp_path, text):
    go(text, tmp_path / "eager", "--precision=fp32")
    go(text, tmp_path / "compiled", "--precision=fp32", "--compile=default")
    assert counters["stats"]["unique_graphs"] == 2
    assert trace(tmp_path / "compiled") == pytest.approx(trace(tmp_path / "eager"), rel=1e-3)
