"""torch.compile changes the speed of a run and nothing else."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from harness import gpu, run_ranks
from torch._dynamo.utils import counters

import train
from layers import compile
from layers.compile import compile_blocks, own_gradients
from metrics import logger
from model import GPT, GPTConfig
from run import auto
from run.microbatches import MicroBatches
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


# ---- CUDA graphs, played on a CPU ----------------------------------------------------------------
class Replay(torch.autograd.Function):
    """x * weight, whose gradient of the weight lies in one memory, as a replayed graph's does."""

    memory = torch.zeros(3)

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        return x * weight

    @staticmethod
    def backward(ctx, dy):
        Replay.memory.copy_(dy * ctx.saved_tensors[0])
        return None, torch.empty(0).set_(Replay.memory.untyped_storage(), 0, (3,))


def accumulated(owns: bool) -> torch.Tensor:
    """The gradient of two micro-batches, of 1 and of 2."""
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleDict({"0": torch.nn.LayerNorm(3, bias=False)})
    weight = model.blocks["0"].weight
    if owns:
        own_gradients(model)
    for x in 1.0, 2.0:
        Replay.apply(torch.full((3,), x), weight).sum().backward()
    return weight.grad


def test_a_replay_does_not_overwrite_the_gradients_so_far():
    assert accumulated(owns=True).tolist() == [3, 3, 3]
    assert accumulated(owns=False).tolist() != [3, 3, 3]  # or there would be nothing to test


@pytest.mark.parametrize("is_pipeline, marks", [(False, 3), (True, 1)])
def test_each_forward_that_may_overwrite_the_ones_before_begins_a_step(
    monkeypatch, is_pipeline, marks
):
    """A pipeline's micro-batches wait for their backward together."""
    seen = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: seen.append(1))
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_kv_head=1, n_embd=8, block_size=4, vocab_size=8))
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    compile_blocks(model, "reduce-overhead")
    assert model.has_cuda_graphs
    replicas = SimpleNamespace(last_micro_batch=lambda is_last: None)
    pipe = SimpleNamespace(run=lambda *args: [0.0]) if is_pipeline else None
    device = torch.device("cpu")
    runs = MicroBatches(
        model, replicas, pipe, device, "fp32", torch.arange(4), (8, torch.float32, 1)
    )
    tokens = lambda ids: torch.zeros(len(ids), 5, dtype=torch.long)  # noqa: E731
    runs.forward_backward([[0], [1], [2]], tokens, 1.0)
    assert len(seen) == marks
    runs.evaluate([[0], [1], [2]], tokens, lambda *seen: None)
    assert len(seen) == 2 * marks


LONG = ["--steps=20000"]


@pytest.mark.parametrize(
    "flags, has_replicas, expected",
    [
        (LONG, False, "default"),
        ([], False, "off"),
        (["--steps=280"], False, "off"),
        (["--steps=290"], False, "default"),
        ([*LONG, "--compile=off"], False, "off"),
        (LONG, True, "off"),
        ([*LONG, "--tp=2"], False, "off"),
        ([*LONG, "--dropout=0.1"], False, "off"),
        ([*LONG, "--precision=fp64"], False, "off"),
        # A fourth of the work takes four times the steps, but for what a block costs by itself.
        (["--steps=1000", "--batch_size=4"], False, "off"),
        (["--steps=1020", "--batch_size=4"], False, "default"),
    ],
)
def test_auto_compiles_on_a_cpu_what_pays(flags, has_replicas, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(compile, "lacking", lambda device: None)
    cfg = parse.parse(flags)
    precision = "bf16" if cfg.precision == "auto" else cfg.precision
    found = auto.resolve_compile(cfg, precision, torch.device("cpu"), has_replicas)
    assert found == expected


def test_auto_compiles_nothing_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compile, "lacking", lambda device: "g++ is missing")
    cfg = parse.parse(LONG)
    assert auto.resolve_compile(cfg, "bf16", torch.device("cpu"), False) == "off"
