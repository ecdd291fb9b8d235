"""Runs with experts: the same on every layout, tokens of each expert and biases exactly so."""

import contextlib
import functools
import io
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from harness import run_ranks
from matrix import LAYOUTS, OPTIMIZERS, TINY, difference, text, trace

import layers.moe
import train
from run.balance import Balance
from settings import parse

EXPERTS = ["--n_expert=4", "--router_z_loss=0.01", "--moe_bias_lr=0.01"]
OTHERS = [
    "--router=sigmoid",
    "--n_shared_expert=1",
    "--moe_sequence_loss=0.01",
    "--moe_every=2",
    "--arch=llama",
    "--normalize_gates=false",
    "--bias=true",
]
RECOMPUTED = {
    how: (1, ["--micro_batch_size=4", f"--activation_checkpoint={how}"])
    for how in ("full", "selective", "mlp", "segments_2", "offload", "full_offload")
} | {"zero3 2, full": (2, ["--data_parallel=zero3", "--activation_checkpoint=full"])}
ALL = LAYOUTS | RECOMPUTED
SIX = ("SGD", "AdamW", "Muon", "SOAP", "Shampoo", "Lion")


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
    # Rows are filled up on layouts, and not in the oracle.
    block = 64 if layout == "one process" else 4
    with tempfile.TemporaryDirectory() as folder:
        text(folder)
        if world == 1:
            ranks = [runs(0, 1, folder, optimizers, flags, block)]
        else:
            ranks = run_ranks(world, runs, folder, optimizers, flags, block)
        assert all(found == ranks[0] for found in ranks), "ranks differ"
        return {name: (trace(f"{folder}/{name}"), ranks[0][name]) for name in optimizers}


@functools.cache
def oracle(optimizers, *more: str) -> dict:
    return column("one process", optimizers, *more)


def assert_one_process(layout: str, optimizers, *more: str) -> None:
    alone = oracle(tuple(optimizers), *more)
    for name, (losses, steps) in column(layout, tuple(optimizers), *more).items():
        expected, expected_steps = alone[name]
        assert difference(losses, expected) < (1e-4 if name == "SOAP" else 1e-10), name
        assert steps == expected_steps, name
        counts, biases = steps[::2], steps[1::2]
        assert len(counts) == 10 and counts[0] != counts[-1] and any(map(any, biases[-1])), (
            "nothing is counted or moved, so this proves nothing"
        )


FAST = ("ddp 2", "zero3 2", "full")


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


@pytest.mark.parametrize(
    "layout",
    [
        name if name in ("4 micro-batches", "fsdp 2") else pytest.param(name, marks=pytest.mark.slow)
        for name in ALL
    ],
)
def test_other_routers_and_terms_are_one_process(layout):
    assert_one_process(layout, ("SGD",), *OTHERS)


def test_dropout_and_clipping_go_with_experts():
    assert_one_process("ddp 2", ("SGD",), "--dropout=0.2", "--clip_value=0.02")


def test_experts_keep_biases_of_their_own():
    one, _ = oracle(("SGD",))["SGD"]
    for flags in (["--moe_bias_lr=none"], ["--router_z_loss=none"], ["--moe_sequence_loss=0.1"]):
        other, steps = column("one process", ("SGD",), *flags)["SGD"]
        assert other != one, flags
        if flags == ["--moe_bias_lr=none"]:
            assert not any(any(map(any, bias)) for bias in steps[1::2])
