"""Exponent histograms: every value in its bin, what a format would lose, parts that add up, the
picture."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import init_weights, run_ranks

from model import GPT, GPTConfig
from precision import histogram
from precision.histogram import HIGHEST, LOWEST, Recorder, exponents, outside, read

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
MODEL = dict(
    n_layer=2, n_head=2, n_kv_head=2, n_embd=8, block_size=8, vocab_size=16, zero_init=False
)

ROOT = Path(__file__).parent.parent


def only(counts):
    """{exponent: count} of the bins that are not empty; zeros and non-finite ones as "zero" and
    "odd"."""
    names = ["zero", "odd", *range(LOWEST, HIGHEST + 1)]
    return {name: n for name, n in zip(names, counts.tolist(), strict=True) if n}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_value_is_in_the_bin_of_its_power_of_two(dtype, device):
    powers = torch.arange(-14, 15)
    for mantissa in (1.0, 1.5, 2 - 2**-7):
        x = (mantissa * 2.0 ** powers.double()).to(device, dtype)
        assert only(exponents(torch.cat([x, -x]))) == dict.fromkeys(powers.tolist(), 2)
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0]).to(device, dtype)
    assert only(exponents(odd)) == {"zero": 2, "odd": 3, 0: 1}


@pytest.mark.gpu
def test_subnormal_numbers_and_those_beyond_the_bins_are_counted(device):
    def counted(*values, dtype=torch.float32):
        return only(exponents(torch.tensor(values, dtype=dtype).to(device)))

    largest = torch.finfo(torch.float32).max
    found = counted(2.0**-149, 3 * 2.0**-149, 2.0**-127, largest)
    assert found == {-149: 1, -148: 1, -127: 1, 127: 1}
    beyond = counted(1e-300, 1e300, 2.0**-151, 2.0**128, dtype=torch.float64)
    assert beyond == {-150: 2, 128: 2}
    assert counted(2.0**-24, 2.0**-14, dtype=torch.float16) == {-24: 1, -14: 1}


def test_counts_of_parts_add_up_and_shapes_do_not_matter():
    x = torch.randn(7, 5, 3)
    assert torch.equal(exponents(x[:3]) + exponents(x[3:]), exponents(x))
    assert torch.equal(exponents(x.permute(2, 0, 1)), exponents(x))
    assert only(exponents(torch.empty(0, 4))) == {} and only(exponents(torch.tensor(3.0))) == {1: 1}


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**9, 2.0**-5])
def test_shares_are_those_of_torchs_casts(format, scale):
    """1.5 times each power: no half of the smallest number, and below e4m3's largest of 1.75 x
    2^8."""
    x = 1.5 * 2.0 ** torch.arange(-100, 100).double()
    x = torch.cat([x, 1.5 * 2.0 ** torch.tensor([-140.0, -133, -128, 120]).double()])
    cast = (x * scale).float()
    info = torch.finfo(DTYPES[format])
    inside = cast.clamp(-info.max, info.max).to(DTYPES[format]).float()
    zero = inside == 0
    saturated, subnormal = cast > info.max, ~zero & (cast < info.smallest_normal)
    expected = [share.double().mean().item() for share in (zero, subnormal, saturated)]
    found = outside(exponents(x), format, scale)
    assert found == pytest.approx(expected, abs=1e-12) and (sum(expected) > 0)


def test_zeros_and_what_is_not_finite_have_no_share():
    x = torch.tensor([0.0, 0.0, math.inf, math.nan, 1.0, 1e-9])
    assert outside(exponents(x), "fp16") == (0.5, 0.0, 0.0)
    assert outside(exponents(torch.zeros(3)), "fp16") == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "format, scale",
    [
        ("fp8", 1.0),
        ("fp16", 1000.0),
        ("fp16", 0.0),
        ("fp16", -2.0),
        ("fp16", math.inf),
        ("fp16", math.nan),
    ],
)
def test_another_format_or_scale_is_refused(format, scale):
    with pytest.raises(ValueError, match="--format=fp8 .*fp16|no power of two"):
        outside(exponents(torch.ones(1)), format, scale)


# ---- recording -----------------------------------------------------------------------------------
def batch(rows):
    return torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(0))[rows]


def recorded(
    folder,
    rows=slice(0, 4),
    micro_batches=1,
    scale=1.0,
    steps=(0,),
    every=1,
    weights=None,
    device="cpu",
):
    model = init_weights(GPT(GPTConfig(**MODEL))).to(device)
    recorder = Recorder(model, folder, every)
    for step in steps:
        recorder.start(step, scale)
        for part in batch(rows).to(device).chunk(micro_batches):
            (model(part[:, :-1], part[:, 1:]) / 32 * scale).backward()
        gradients = {name: p.grad.div_(scale) for name, p in model.named_parameters()}
        recorder.write(weights or (lambda: dict(model.named_parameters())), gradients)
        model.zero_grad()
    return model


def rows_of(folder):
    return [json.loads(line) for line in Path(folder, "histograms.jsonl").read_text().splitlines()]


@pytest.mark.gpu
def test_a_row_for_each_weight_gradient_activation_and_its_gradient(tmp_path, device):
    model = recorded(tmp_path, device=device)
    rows = rows_of(tmp_path)
    linears = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    names = {kind: {r["tensor"] for r in rows if r["kind"] == kind} for kind in histogram.KINDS}
    parameters = {name for name, _ in model.named_parameters()}
    assert names == {
        "weight": parameters,
        "gradient": parameters,
        "activation": linears,
        "gradient of activation": linears,
    }
    assert [*rows[0]] == ["step", "tensor", "kind", "zeros", "nonfinite", "counts"]
    _, counts = read(tmp_path)
    for name, p in model.named_parameters():
        assert torch.equal(counts[name, "weight"], exponents(p))
    assert (
        counts["head", "activation"].sum()
        == counts["head", "gradient of activation"].sum()
        == 4 * 8 * 16
    )
    assert not any(m._forward_hooks for m in model.modules())


def test_activations_and_their_gradients_are_those_of_the_step(tmp_path):
    model = init_weights(GPT(GPTConfig(**MODEL)))
    kept, plain = [], model.head.matmul

    def product(x, weight, bias):
        kept.append(plain(x, weight, bias))
        kept[0].retain_grad()
        return kept[0]

    model.head.matmul = product
    recorder = Recorder(model, tmp_path, 1)
    recorder.start(0)
    (model(batch(slice(4))[:, :-1], batch(slice(4))[:, 1:]) / 32).backward()
    recorder.write(dict, {})
    _, counts = read(tmp_path)
    assert torch.equal(counts["head", "activation"], exponents(kept[0]))
    assert torch.equal(counts["head", "gradient of activation"], exponents(kept[0].grad))


@pytest.mark.gpu
def test_micro_batches_add_up_and_the_loss_scale_is_taken_out(tmp_path, device, deterministic):
    for name, options in dict(a={}, b={"micro_batches": 4}, c={"scale": 2.0**10}).items():
        (tmp_path / name).mkdir()
        recorded(tmp_path / name, device=device, **options)
    (_, a), (_, b), (_, c) = (read(tmp_path / name) for name in "abc")
    assert a.keys() == b.keys() == c.keys()
    for key, counts in a.items():
        assert torch.equal(counts, c[key]), key
        if "activation" in key[1]:
            moved = (counts - b[key]).abs().sum()  # other batch shapes may round another way
            assert moved <= 0.02 * counts.sum() and counts.sum() == b[key].sum(), key


def test_only_every_nth_step_is_recorded_and_evaluation_is_not(tmp_path):
    model = recorded(tmp_path, steps=range(5), every=2)
    assert {r["step"] for r in rows_of(tmp_path)} == {0, 2, 4}
    assert all(torch.equal(n, read(tmp_path, 4)[1][key]) for key, n in read(tmp_path, 0)[1].items())
    size = (tmp_path / "histograms.jsonl").stat().st_size
    recorder = Recorder(model, tmp_path, None)
    recorder.start(0)
    recorder.write(lambda: 1 / 0, {})  # not even asked for
    assert (tmp_path / "histograms.jsonl").stat().st_size == size
    recorder = Recorder(model.eval(), tmp_path / "none", 1)
    recorder.start(0)
    model(batch(slice(4))[:, :-1])
    assert recorder.counts == {}


def on_ranks(rank, world, folder):
    """Each rank its rows; rank 0 the first half of the names' weights, rank 1 the others, as in
    ZeRO."""
    model = init_weights(GPT(GPTConfig(**MODEL)))
    mine = dict([*model.named_parameters()][rank::2])
    recorded(folder, slice(2 * rank, 2 * rank + 2), weights=lambda: mine)


def test_ranks_add_up_to_the_whole(tmp_path):
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    recorded(tmp_path / "one", micro_batches=2)
    run_ranks(2, on_ranks, tmp_path / "two")
    (_, one), (_, two) = read(tmp_path / "one"), read(tmp_path / "two")
    assert one.keys() == two.keys() and len(rows_of(tmp_path / "two")) == len(one)
    for (name, kind), counts in one.items():
        if kind != "gradient":  # a rank's own, not summed here: another tensor
            assert torch.equal(counts, two[name, kind]), (name, kind)
        else:
            assert two[name, kind].sum() == 2 * counts.sum()


# ---- reading and drawing -------------------------------------------------------------------------
def test_half_a_line_is_passed_over_and_a_step_done_again_counts_once(tmp_path):
    row = {
        "step": 3,
        "tensor": "w",
        "kind": "weight",
        "zeros": 1,
        "nonfinite": 0,
        "counts": {"-2": 5},
    }
    again = row | {"counts": {"4": 6}}
    rows = [json.dumps(r) for r in (row, row | {"step": 1}, again)]
    (tmp_path / "histograms.jsonl").write_text(
        "\n".join([rows[0], rows[0][:40], "3", "{}", *rows[1:]])
    )
    step, counts = read(tmp_path)
    assert step == 3 and only(counts["w", "weight"]) == {"zero": 1, 4: 6}
    assert only(read(tmp_path / "histograms.jsonl", 1)[1]["w", "weight"]) == {"zero": 1, -2: 5}


def test_the_table_begins_with_what_loses_most():
    counts = {
        ("a", "weight"): exponents(torch.ones(4)),
        ("b", "gradient"): exponents(torch.tensor([1e-9, 1.0])),
        ("c", "gradient"): exponents(torch.tensor([1e-9, 1e-9])),
        ("d", "weight"): exponents(torch.tensor([1.0, math.inf, 0.0, 0.0])),
        ("e", "weight"): exponents(torch.tensor([1e6, 1.0, 1.0, 1.0])),
    }
    lines = histogram.table(counts, "fp16", 1.0)
    assert [line.split()[-2][0] for line in lines[1:]] == ["d", "c", "b", "e", "a"]
    assert lines[1].split()[:5] == ["0.00%", "0.00%", "0.00%", "50.00%", "1"]
    assert lines[3].split()[0] == "50.00%" and lines[4].split()[2] == "25.00%"
    scaled = histogram.table(counts, "fp16", 2.0**16)  # gradients alone are scaled
    assert {line.split()[-2]: line.split()[0] for line in scaled[1:]} == dict.fromkeys(
        ("a,", "b,", "c,", "d,", "e,"), "0.00%"
    )
    assert [line.split()[2] for line in scaled if " a," in line or " b," in line] == [
        "50.00%",
        "0.00%",
    ]


def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    recorded(tmp_path, steps=(0, 1))
    picture = tmp_path / "picture.png"
    histogram.main([str(tmp_path), "--format=e5m2", "--scale=1024", "--step=0", f"--out={picture}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 0, e5m2, gradients x 1024") and lines[-1] == str(picture)
    assert len(lines) == 3 + len(rows_of(tmp_path)) // 2
    assert picture.read_bytes()[:4] == b"\x89PNG"
    histogram.main([str(tmp_path / "histograms.jsonl")])
    assert (tmp_path / "histograms.png").exists()
    empty = {
        ("w", "weight"): exponents(torch.zeros(0)),
        ("v", "gradient"): exponents(torch.zeros(3)),
    }
    histogram.draw(empty, 0, "fp16", 1.0, str(picture))  # nothing to see, no error


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "usage"),
        (["{}", "x"], "usage"),
        (["{}", "--other=1"], "usage"),
        (["{}", "--scale"], "usage"),
        (["{}", "--scale=many"], "--scale takes a number"),
        (["{}", "--step=1.5"], "--step an integer"),
        (["{}", "--scale=1000"], "no power of two"),
        (["{}", "--format=fp8"], "--format=fp8"),
        (["{}", "--step=7"], "no histograms of step 7; it has [0]"),
        (["{}/missing"], "--histogram_every=N"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, monkeypatch):
    row = {
        "step": 0,
        "tensor": "w",
        "kind": "gradient",
        "zeros": 1,
        "nonfinite": 0,
        "counts": {"-2": 5},
    }
    (tmp_path / "histograms.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError) as error:
        histogram.main([a.format(tmp_path) for a in arguments])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_exits_with_2(tmp_path):
    (tmp_path / "histograms.jsonl").write_text("nonsense\n")
    done = subprocess.run(
        [sys.executable, "-m", "precision.histogram", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr == f"precision.histogram: {tmp_path / 'histograms.jsonl'} has no histograms\n"
    )
