"""Runs with experts: the same on every layout, tokens of each expert and biases exactly so."""

import contextlib
import dataclasses
import functools
import io
import math
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from matrix import (
    CUT_UP,
    EXPERTS,
    LARGER,
    LAYOUTS,
    OPTIMIZERS,
    RECOMPUTED,
    SIX,
    TINY,
    TOLERANCES,
    difference,
    text,
    trace,
)

import layers.moe
import train
from checkpoint import load
from metrics import logger
from model import GPT
from precision import amp
from run import build
from run.balance import Balance
from settings import parse
from settings.fields import with_traits

CPU = torch.device("cpu")
SLOW = pytest.mark.slow
OTHERS = [
    "--router=sigmoid",
    "--n_shared_expert=1",
    "--moe_sequence_loss=0.01",
    "--moe_every=2",
    "--arch=llama",
    "--normalize_gates=false",
    "--bias=true",
]
ALL = LAYOUTS | RECOMPUTED | CUT_UP


class Recorded(Balance):
    """Keeps what each step has counted, and the biases after it."""

    runs: list = []

    def __init__(self, *args):
        super().__init__(*args)
        self.steps = []
        self.runs.append(self.steps)

    def finish_counts(self):
        super().finish_counts()
        self.steps.append(self.counts.tolist())

    def step(self):
        super().step()
        self.steps.append(self.bias.tolist())


def runs(rank, world, folder, optimizers, flags, block):
    """{optimizer: [counts, biases, counts ...]} of one rank; traces are in the folder."""
    Recorded.runs = []
    with (
        mock.patch.object(train, "Balance", Recorded),
        mock.patch.object(layers.moe, "BLOCK", block),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for name in optimizers:
            argv = [f"--data={folder}/squares.txt", f"--out_dir={folder}/{name}", *TINY]
            train.main(parse.parse([*argv, "--precision=fp64", *OPTIMIZERS[name], *flags]))
    return dict(zip(optimizers, Recorded.runs, strict=True))


def column(layout: str, optimizers, *more: str) -> dict:
    """{optimizer: (trace, [counts, biases, ...])} on one layout. "one process" is the oracle."""
    world, flags = ALL.get(layout, (1, []))
    flags = [*EXPERTS, "--data_parallel=ddp", *flags, *more]
    if layout in CUT_UP or layout == "one larger process":
        flags = [*LARGER, "--dropout=0.1", *flags]
    # Rows are filled up on layouts, and not in the oracle.
    block = 64 if layout in ("one process", "one larger process") else 4
    with tempfile.TemporaryDirectory() as folder:
        text(folder)
        if world == 1:
            ranks = [runs(0, 1, folder, optimizers, flags, block)]
        else:
            ranks = run_ranks(world, runs, folder, optimizers, flags, block)
        assert all(found == ranks[0] for found in ranks), "ranks differ"
        return {name: (trace(f"{folder}/{name}"), ranks[0][name]) for name in optimizers}


@functools.cache
def oracle(name: str, optimizers, *more: str) -> dict:
    return column(name, optimizers, *more)


def assert_one_process(layout: str, optimizers, *more: str) -> None:
    one = "one larger process" if layout in CUT_UP else "one process"
    alone = oracle(one, tuple(optimizers), *more)
    for name, (losses, steps) in column(layout, tuple(optimizers), *more).items():
        expected, expected_steps = alone[name]
        assert difference(losses, expected) < TOLERANCES.get(name, 1e-10), name
        assert steps == expected_steps, name
        counts, biases = steps[::2], steps[1::2]
        assert (
            len(counts) == (6 if layout in CUT_UP else 10)
            and counts[0] != counts[-1]
            and any(map(any, biases[-1]))
        ), "nothing is counted or moved, so this proves nothing"


FAST = ("full", "ep 2 x dp 2")


@pytest.mark.parametrize(
    "layout",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ALL],
)
def test_experts_on_every_layout_are_one_process(layout):
    assert_one_process(layout, ("SGD", "Muon"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_experts_with_six_optimizers_are_one_process(layout):
    assert_one_process(layout, SIX)


# Without SOAP-Muon, whose rounding grows until a token changes its expert: test_matrix.py has it in
# lock step.
LATER = ("AdEMAMix", "MARS", "Dion 3", "KL-SOAP", "Muown", "PMuon")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["ep 2", "zero1 x ep 2", "fsdp x ep 2", "ep 2 x tp 2", "ep 2 x pp 2 1f1b"]
)
def test_experts_with_the_methods_of_2024_to_2026_are_one_process(layout):
    assert_one_process(layout, LATER)


@pytest.mark.parametrize(
    "layout",
    [
        name if name == "4 micro-batches" else pytest.param(name, marks=pytest.mark.slow)
        for name in ALL
    ],
)
def test_other_routers_and_terms_are_one_process(layout):
    assert_one_process(layout, ("SGD",), *OTHERS)


def test_dropout_and_clipping_go_with_experts():
    assert_one_process("ddp 2", ("SGD",), "--dropout=0.2", "--clip_value=0.02")


def test_experts_keep_biases_of_their_own():
    one, _ = oracle("one process", ("SGD",))["SGD"]
    for flags in (["--moe_bias_lr=none"], ["--router_z_loss=none"], ["--moe_sequence_loss=0.1"]):
        other, steps = column("one process", ("SGD",), *flags)["SGD"]
        assert other != one, flags
        if flags == ["--moe_bias_lr=none"]:
            assert not any(any(map(any, bias)) for bias in steps[1::2])


# ---- saved, and resumed elsewhere ----------------------------------------------------------------
def from_shared(rank, world, folder, optimizers, flags, block, steps):
    more = [f"--steps={steps}", "--schedule=constant", "--eval_every=0"]
    return runs(rank, world, folder, optimizers, [*flags, *more], block)


def on(layout: str, folder, steps: int, optimizers=("Muon", "AdamW Schedule-Free")) -> dict:
    world, flags = ALL.get(layout, (1, []))
    flags = [*EXPERTS, "--moe_every=2", "--n_shared_expert=1", "--data_parallel=ddp", *flags]
    if world == 1:
        return from_shared(0, 1, folder, optimizers, flags, 4, steps)
    return run_ranks(world, from_shared, folder, optimizers, flags, 4, steps)[0]


def in_all(folder, name: str) -> dict:
    saved = load.newest(folder / name)
    return {x: saved.tensor(x) for x in saved.names() if x != "rng"}


@pytest.mark.parametrize(
    "layout", ["one process", "zero3 2", pytest.param("ep 2 x dp 2", marks=pytest.mark.slow)]
)
def test_a_run_resumed_is_the_run_bitwise(tmp_path, layout):
    for name, stops in (("whole", [8]), ("resumed", [3, 8])):
        (tmp_path / name).mkdir()
        text(tmp_path / name)
        for steps in stops:
            found = on(layout, tmp_path / name, steps)
    for optim in found:
        one, other = (in_all(tmp_path / name, optim) for name in ("whole", "resumed"))
        assert one.keys() == other.keys()
        for name, x in one.items():
            assert torch.equal(x, other[name]), name
        biases = [x for name, x in one.items() if name.endswith("selection_bias")]
        parts = 2 if "Schedule" in optim else 1  # as evaluated, and as trained
        assert len(biases) == parts and all(x.any() for x in biases)


@pytest.mark.parametrize(
    "saved, places",
    [
        pytest.param("zero3 4", ("one process", "fsdp 2"), marks=pytest.mark.slow),
        pytest.param("ep 4", ("one process", "tp 2"), marks=pytest.mark.slow),
        pytest.param("zero1 x ep 2", ("zero1 x ep 2 x pp 2", "zero3 2"), marks=pytest.mark.slow),
        pytest.param("fsdp x ep 2", ("ep 2 x pp 2 1f1b", "ep 2"), marks=pytest.mark.slow),
    ],
)
def test_saved_on_one_layout_and_resumed_on_others(tmp_path, saved, places):
    text(tmp_path)
    counts = on("one process", tmp_path, 8)
    (tmp_path / "four").mkdir()
    text(tmp_path / "four")
    on(saved, tmp_path / "four", 4)
    for layout in places:
        shutil.copytree(tmp_path / "four", tmp_path / layout)
        found = on(layout, tmp_path / layout, 8)
        for name in found:
            assert difference(trace(tmp_path / layout / name), trace(tmp_path / name)) < 1e-10
            assert found[name] == counts[name][8:], (layout, name)  # counts and bias of 4 steps


# ---- float32: a choice between two scores that rounding has made equal may flip ------------------
class Choices:
    """What MoE.choose gives in training, in the order of its calls: kept, or held against those of
    one process.

    expected: of one process, an entry a layer and step, (B, T, k); replayed: take them.
    """

    def __init__(self, rank=0, world=1, micro=8, expected=None, replayed=False):
        self.share, self.micro = 8 // world, min(micro, 8 // world)
        self.first, self.expected, self.replayed = rank * self.share, expected, replayed
        self.found, self.gaps, self.calls = [], [], 0

    def __call__(self, plain, layer, scores):
        own = plain(layer, scores)
        if not (layer.training and torch.is_grad_enabled()):
            return own
        if self.expected is None:
            self.found.append(own)
            return own
        n_micro, n_layer = self.share // self.micro, 2
        step, i, which = (
            self.calls // (n_micro * n_layer),
            self.calls // n_layer % n_micro,
            self.calls % n_layer,
        )
        self.calls += 1
        begin = self.first + i * self.micro
        theirs = self.expected[step * n_layer + which][begin : begin + self.micro]
        flipped = (own.sort(-1).values != theirs.sort(-1).values).any(-1)
        values = (scores.gather(-1, x).sort(-1).values[flipped] for x in (own, theirs))
        self.gaps += [gap for row in (next(values) - next(values)).abs().tolist() for gap in row]
        return theirs if self.replayed else own


def fp32(rank, world, folder, name, flags, micro, expected=None, replayed=False):
    choices = Choices(rank, world, micro, expected, replayed)
    plain = layers.moe.MoE.choose
    with (
        mock.patch.object(
            layers.moe.MoE, "choose", lambda layer, scores: choices(plain, layer, scores)
        ),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        argv = [f"--data={folder}/squares.txt", f"--out_dir={folder}/{world}-{replayed}", *TINY]
        argv += [*OPTIMIZERS[name], *EXPERTS, "--precision=fp32", "--steps=20", *flags]
        argv += ["--opt.ns_dtype=float32"] if name == "Muon" else []
        train.main(parse.parse(argv))
    return choices.found, choices.gaps


@pytest.mark.parametrize(
    "name, world, flags",
    [
        ("AdamW", 2, ["--data_parallel=zero3"]),
        *(
            pytest.param(name, world, [f"--data_parallel={layout}"], marks=pytest.mark.slow)
            for name in ("SGD", "AdamW", "Muon")
            for world in (2, 4)
            for layout in ("ddp", "zero1", "fsdp")
        ),
        *(
            pytest.param(name, world, [f"--ep={ep}", f"--data_parallel={layout}"], marks=SLOW)
            for name in ("SGD", "AdamW", "Muon")
            for world, ep in ((2, 2), (4, 4), (4, 2))
            for layout in ("ddp", "zero1", "fsdp")
        ),
    ],
)
def test_float32_follows_one_process_or_its_choices(tmp_path, name, world, flags):
    text(tmp_path)
    expected, _ = fp32(0, 1, tmp_path, name, ["--data_parallel=ddp"], 8)
    micro = 2
    flags = [*flags, f"--micro_batch_size={micro}"]
    found = run_ranks(world, fp32, tmp_path, name, flags, micro, expected)
    gaps = sum((gaps for _, gaps in found), [])
    alone = trace(tmp_path / "1-False")
    print(f"{len(gaps)} choices flip, by {max(gaps, default=0):.0e}")  # pytest -s
    if difference(trace(tmp_path / f"{world}-False"), alone) > 1e-5:
        assert gaps and max(gaps) < 1e-6, gaps
        run_ranks(world, fp32, tmp_path, name, flags, micro, expected, True)
        assert difference(trace(tmp_path / f"{world}-True"), alone) < 1e-5
    assert len(expected) == 40


@pytest.mark.slow
def test_a_flipped_choice_is_found_with_its_gap(tmp_path):
    text(tmp_path)
    expected, _ = fp32(0, 1, tmp_path, "SGD", [], 8)
    other = [x.clone() for x in expected]
    other[3][5, 2] = (other[3][5, 2] + 1) % 4
    found = run_ranks(2, fp32, tmp_path, "SGD", ["--micro_batch_size=2"], 2, other)
    assert not found[0][1] and found[1][1]  # sequence 5 is rank 1's
    run_ranks(2, fp32, tmp_path, "SGD", ["--micro_batch_size=2"], 2, other, True)
    assert difference(trace(tmp_path / "2-True"), trace(tmp_path / "1-False")) > 1e-5


# ---- the command line ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, said",
    [
        ("--moe_every=2", "moe_every means nothing without experts; type --n_expert=8"),
        ("--router=sigmoid", "router means nothing"),
        ("--moe_bias_lr=0.1", "moe_bias_lr means nothing"),
        ("--n_expert=4 --n_expert_active=5", "n_expert_active=5 .* --n_expert_active=2"),
        ("--n_expert=4 --n_expert_active=1", "gate is always 1.* --normalize_gates=false"),
        ("--n_expert=4 --moe_every=9", "moe_every=9 leaves none of 4 layers"),
        ("--n_expert=1", "n_expert=1 is out of range"),
        ("--n_expert=4 --mup_base_width=64", "mup_base_width has no rule for experts"),
        ("--ep=2", "ep means nothing without experts"),
        ("--n_expert=5 --ep=2", "ep=2 does not divide n_expert=5; type --n_expert=6"),
        ("--n_expert=4 --ep=2 --data_parallel=zero3", "type --data_parallel=zero1 or fsdp"),
        ("--n_expert=4 --ep=2 --diloco_every=2", "ep=2 is incompatible with diloco_every"),
        ("--n_expert=4 --ep=2 --compress=topk", "incompatible with compress"),
        ("--n_expert=4 --ep=2 --offload=cpu", "incompatible with offload"),
        ("--n_expert=4 --ep=2 --precision=bf16_sr", "type --precision=bf16"),
        ("--n_expert=4 --router_z_loss=0", "type --router_z_loss=none"),
        ("--n_expert=4 --moe_bias_lr=0", "type --moe_bias_lr=none"),
        ("--n_expert=4 --moe_sequence_loss=0", "type --moe_sequence_loss=none"),
    ],
)
def test_what_experts_do_not_take_is_refused(words, said):
    with pytest.raises(ValueError, match=said):
        parse.parse(words.split())


def test_experts_are_as_large_as_the_mlp_of_a_token_unless_said():
    def size(*words):
        return build.model_config(parse.parse(["--n_expert=8", "--arch=llama", *words])).expert_size

    assert size("--mlp_width=768") == 384
    assert size("--mlp_width=768", "--n_shared_expert=1") == 256
    assert size("--mlp_width=100", "--n_expert_active=3") == 40  # of 33.3
    assert size("--expert_width=7") == 7


@pytest.mark.parametrize(
    "flags",
    [
        ["--diloco_every=2", "--micro_batch_size=2"],
        ["--compress=topk", "--compress.fraction=0.5"],
        ["--data_parallel=zero3", "--offload=cpu", "--offload_params=cpu"],
    ],
)
def test_replicas_that_part_or_offload_agree_on_counts_and_biases(flags):
    with mock.patch.dict(ALL, {"here": (2, flags)}):
        losses, steps = column("here", ("AdamW",))["AdamW"]  # compares the ranks
    assert len(steps) == 20 and all(sum(counts[0]) == 2 * 64 for counts in steps[::2])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "precision",
    ["bf16_sr", "fp8", *(pytest.param(p, marks=SLOW) for p in ("bf16", "fp16", "fp32"))],
)
def test_experts_learn_in_every_precision(tmp_path, precision):
    text(tmp_path)
    more = ["--steps=6", "--dropout=0", f"--precision={precision}"]
    with contextlib.redirect_stdout(io.StringIO()):
        for name, flags in (("one", []), ("two", ["--micro_batch_size=2"])):
            argv = [f"--data={tmp_path}/squares.txt", f"--out_dir={tmp_path}/{name}", *TINY]
            train.main(parse.parse([*argv, *EXPERTS, "--optim=adamw", *more, *flags]))
    one, two = trace(tmp_path / "one"), trace(tmp_path / "two")
    assert max(abs(a / b - 1) for a, b in zip(one, two, strict=True)) < 0.02 and one[-1] < one[0]
    biases = [x for n, x in in_all(tmp_path, "one").items() if n.endswith("selection_bias")]
    assert len(biases) == 2 and all(x.dtype == torch.float32 and x.any() for x in biases)


def rows_of(folder, *flags):
    with contextlib.redirect_stdout(io.StringIO()):
        argv = [f"--data={folder}/squares.txt", f"--out_dir={folder}/run", "--resume=never", *TINY]
        train.main(parse.parse([*argv, *EXPERTS, "--optim=adamw", "--dropout=0", *flags]))
    rows = logger.read_metrics(Path(folder) / "run" / "metrics.jsonl")
    return [row for row in rows if "grad_norm" in row]


def test_terms_are_logged_a_token_and_not_as_loss(tmp_path):
    text(tmp_path)
    more = ["--precision=fp64", "--steps=3", "--lr=1e-9"]
    plain = rows_of(tmp_path, *more, "--router_z_loss=none")
    found = rows_of(tmp_path, *more, "--router_z_loss=0.5", "--moe_sequence_loss=0.25")
    for row, other in zip(found, plain, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert row["grad_norm"] != other["grad_norm"]
        # Two layers; log Z of four small logits is log 4, and even loads have a sequence loss of 1.
        assert row["moe_z_loss"] == pytest.approx(2 * 0.5 * math.log(4) ** 2, rel=0.2)
        assert row["moe_sequence_loss"] == pytest.approx(2 * 0.25, rel=0.2)
        assert not any(name.startswith("moe_") for name in other)


def test_the_loss_scale_of_fp16_is_on_the_terms_too(tmp_path):
    text(tmp_path)
    flags = ["--router_z_loss=3", "--moe_sequence_loss=3", "--steps=2"]
    norms = [
        [row["grad_norm"] for row in rows_of(tmp_path, *flags, f"--precision={precision}")]
        for precision in ("fp32", "fp16")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_fp8_multiplies_in_each_expert():
    cfg = parse.parse(["--n_expert=4", "--precision=fp8", "--vocab_size=256", "--n_embd=64"])
    model = GPT(build.model_config(with_traits(cfg)))
    state = build.convert_linears(cfg, {"delayed": True, "scaling": "tensor"}, model, CPU)
    assert all(block.mlp.experts.product is None for block in model.blocks.values())
    assert "blocks.3.mlp.experts.2.fc" in state.histories
    assert not any("router" in name for name in state.histories)


# The emulation in float64, so that equal scales are equal numbers.
WIDE_FP8 = dataclasses.replace(amp.PRECISIONS["fp64"], fp8_blocks=True)
# 128 tokens a rank of two, and 128 neurons: no block of 128 is cut, nor filled up with others.
BLOCKS = ["--n_layer=2", "--n_head=2", "--head_dim=128", "--n_embd=64", "--block_size=32"]
BLOCKS += ["--expert_width=256", "--zero_init=false", "--precision=fp8"]
# Rows of y and dx are a token's; of dW a feature's over the tokens that one product has.
ROWS = ["--fp8.scaling=row", "--fp8.weight_gradient=false"]


@functools.cache
def in_wide_fp8(layout: str, *flags: str) -> tuple[list[float], list]:
    with mock.patch.dict(amp.PRECISIONS, fp8=WIDE_FP8):
        return column(layout, ("SGD",), *BLOCKS, "--steps=4", "--eval_every=2", *flags)["SGD"]


def apart(losses: list[float], expected: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))


@pytest.mark.parametrize(
    "layout, flags",
    [
        ("ep 2 x tp 2", ()),
        *(
            pytest.param(layout, (), marks=SLOW)
            for layout in ("ep 2", "tp 2", "zero1 x ep 2", "fsdp x ep 2")
        ),
        *(
            pytest.param(layout, ROWS, marks=SLOW)
            for layout in ("ep 4", "ep 2 x dp 2", "ep 2, full", "ep 2 x cp 2")
        ),
    ],
)
def test_experts_of_the_same_scales_in_fp8_are_one_process(layout, flags):
    expected, steps = in_wide_fp8("one larger process", *flags)
    losses, found = in_wide_fp8(layout, *flags)
    assert apart(losses, expected) < 1e-10 and found == steps
    plain, _ = in_wide_fp8("one larger process", "--precision=fp64")
    assert apart(expected, plain) > 1e-5, "fp8 rounds nothing, so this proves nothing"


@pytest.mark.parametrize(
    "layout",
    [
        "ep 2 x dp 2",
        *(
            pytest.param(layout, marks=SLOW)
            for layout in ("ep 2, full", "ep 2 x tp 2", "ep 2 x cp 2", "fsdp x ep 2", "ddp 4")
        ),
    ],
)
def test_experts_keep_amaxes_of_their_own_whoever_holds_them(tmp_path, layout):
    """With delayed scales any split is exact, from the step on that finds a history."""
    delayed = ["--fp8.scaling=tensor", "--fp8.delayed=true", "--schedule=constant"]

    def resumed(name: str, steps: int) -> list:
        world, flags = ALL.get(name, (1, []))
        flags = [*EXPERTS, "--data_parallel=ddp", *BLOCKS, *delayed, *flags, f"--steps={steps}"]
        with mock.patch.dict(amp.PRECISIONS, fp8=WIDE_FP8):
            return run_ranks(world, runs, tmp_path / name, ("SGD",), flags, 4)[0]["SGD"]

    (tmp_path / "one").mkdir()
    text(tmp_path / "one")
    resumed("one", 2)
    shutil.copytree(tmp_path / "one", tmp_path / layout)
    assert resumed(layout, 4) == resumed("one", 4)
    traces = (trace(tmp_path / name / "SGD") for name in (layout, "one"))
    assert apart(*traces) < 1e-10
    found, expected = (in_all(tmp_path / name, "SGD") for name in (layout, "one"))
    histories = [name for name in expected if name.startswith("fp8/")]
    assert len(histories) == 2 * (4 + 4 * 2) and found.keys() == expected.keys()
    for name in histories:
        assert torch.equal(found[name], expected[name]) and expected[name][:4].all(), name


@pytest.mark.parametrize("layout", [pytest.param(x, marks=SLOW) for x in ("ep 2", "tp 2")])
def test_spread_experts_in_fp8_are_one_process_but_for_its_rounding(layout):
    flags = ("--precision=fp8", "--n_layer=2", "--steps=10", "--eval_every=5")
    expected = column("one larger process", ("AdamW", "Muon"), *flags)
    for name, (losses, _) in column(layout, ("AdamW", "Muon"), *flags).items():
        assert 0 < apart(losses, expected[name][0]) < 0.01, name


# ---- expert parallelism --------------------------------------------------------------------------
def counted_bytes(rank, world, folder, flags):
    """(what is logged as sent, what all-to-alls were given, counts of this rank) of one step."""
    given = []
    plain = dist.all_to_all_single

    def counted(out, x, receive=None, send=None, group=None):
        n, me = group.size(), dist.get_rank(group)
        send = send or [len(x) // n] * n
        given.append((sum(send) - send[me]) * x[:1].nbytes if len(x) else 0)
        return plain(out, x, receive, send, group=group)

    with mock.patch.object(dist, "all_to_all_single", counted):
        rows = rows_of(folder, "--steps=1", *flags)
    return sum(given), rows[0]["sent_bytes"]


@pytest.mark.parametrize(
    "flags", [["--ep=2"], pytest.param(["--ep=2", "--activation_checkpoint=full"], marks=SLOW)]
)
def test_the_bytes_of_all_to_alls_are_those_that_are_logged(tmp_path, flags):
    text(tmp_path)
    flags = [*flags, "--data_parallel=ddp", "--eval_every=0", "--precision=fp32"]
    given, logged = run_ranks(2, counted_bytes, str(tmp_path), flags)[0]
    assert given > 0 and logged > given
    # Of the rest: experts' gradients are sent to nobody, all others are.
    with torch.device("meta"):
        cfg = parse.parse([*TINY, *EXPERTS])
        model = GPT(build.model_config(with_traits(cfg)))
    others = {n: p for n, p in model.named_parameters() if ".experts." not in n}
    n_here = len(others) + (len([*model.parameters()]) - len(others)) // 2
    assert logged - given == sum(p.numel() * 4 for p in others.values()) + n_here


def bytes_and_rows(rank, world, folder, flags):
    """(bytes given to all-to-alls, bytes logged, rows for each expert (forwards, E)) of a step."""
    rows = []
    plain = layers.moe.MoE.choose

    def choose(layer, scores):
        chosen = plain(layer, scores)
        rows.append(torch.bincount(chosen.flatten(), minlength=layer.n_expert).tolist())
        return chosen

    with mock.patch.object(layers.moe.MoE, "choose", choose):
        return *counted_bytes(rank, world, folder, flags), rows


@pytest.mark.parametrize(
    "ranks, ep, more, repeated, width",
    [
        (4, 2, ["--precision=fp32", "--activation_checkpoint=full"], 2, 4),
        pytest.param(4, 4, ["--precision=bf16"], 1, 2, marks=SLOW),
        pytest.param(
            2, 2, ["--precision=fp64", "--activation_checkpoint=selective"], 2, 8, marks=SLOW
        ),
    ],
)
def test_bytes_are_the_formula_of_the_counts(tmp_path, ranks, ep, more, repeated, width):
    """repeated: forwards for each backward; width: bytes of a number that travels."""
    text(tmp_path)
    more = [*more, f"--ep={ep}", "--micro_batch_size=1", "--data_parallel=ddp", "--eval_every=0"]
    found = run_ranks(ranks, bytes_and_rows, str(tmp_path), more)
    n_layer, n_expert, n_embd = 2, 4, 16
    forwards = n_layer * 8 // ranks * repeated
    rows = torch.tensor([rows for _, _, rows in found])  # (ranks, forwards, E)
    assert rows.shape == (ranks, forwards, n_expert)
    rows = rows.view(ranks, forwards, ep, -1).sum((1, 3)) // repeated  # (from, to one of its ep)
    for rank, (given, _, _) in enumerate(found):
        me = rank % ep
        sent = rows[rank].sum() - rows[rank, me]
        received = rows[rank - me : rank - me + ep, me].sum() - rows[rank, me]
        counts = forwards * 4 * n_expert * (ep - 1) // ep
        assert given == counts + (repeated + 1) * (sent + received) * n_embd * width, rank
    assert len({int(x) for x in rows.flatten()}) > ep, "loads are even, so this proves less"


def few_tokens(rank, world, folder, flags):
    return rows_of(folder, *flags)


@pytest.mark.parametrize("bias", ["9", pytest.param("none", marks=SLOW)])
def test_ranks_without_rows_take_part(tmp_path, bias):
    """A token a rank, and biases that send all of them to one rank's experts."""
    text(tmp_path)
    shape = ["--block_size=1", "--batch_size=4", "--n_expert=8", "--steps=4", "--eval_tokens=8"]
    shape += [f"--moe_bias_lr={bias}", "--precision=fp64", "--data_parallel=ddp"]
    one = [row["loss"] for row in rows_of(tmp_path, *shape)]
    found = run_ranks(4, few_tokens, str(tmp_path), [*shape, "--ep=4"])
    assert [row["loss"] for row in found[0]] == pytest.approx(one, rel=1e-12)
