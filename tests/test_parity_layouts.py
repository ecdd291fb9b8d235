"""Where nothing is wrong the parity oracle is silent: on each layout of the matrix, with SGD, AdamW
and Muon, in float64 and in float32; with experts too, however uneven their loads."""

import contextlib
import io
import tempfile

import matrix
import pytest

from parity.__main__ import main
from parity.recording import Recording

OPTIMIZERS = ["SGD", "AdamW", "Muon"]
LAYOUTS = matrix.LAYOUTS | matrix.MODEL_PARALLEL
RECOMPUTED = {
    f"{how}, ranks {ranks}": (ranks, [f"--activation_checkpoint={how}", "--micro_batch_size=2"])
    for how in ("full", "selective", "mlp", "segments_2")
    for ranks in (1, 2)
}
REPLICAS = matrix.LAYOUTS | RECOMPUTED
EXPERTS = ("--n_expert=8", "--n_shared_expert=1", "--moe_sequence_loss=0.01")
ONE = ["--n_expert_active=1", "--normalize_gates=false"]
# Flags, and what the counts (E,) of some layer in some step must be.
UNEVEN = {
    "all tokens to one expert": (
        # The first step puts the biases at 1 and -1, beyond all scores.
        ["--n_expert=2", *ONE, "--moe_bias_lr=1"],
        lambda n: n.max() == n.sum(),
    ),
    "an expert without tokens": (
        ["--n_expert=16", *ONE, "--router=sigmoid"],
        lambda n: n.min() == 0 and (n > 0).sum() > 8,
    ),
    "loads more than 10 times apart": (
        ["--n_expert=4", *ONE, "--moe_bias_lr=0.1", "--lr=0.1"],
        lambda n: n.min() > 0 and n.max() > 10 * n.min(),
    ),
}
oracles = {}  # settings -> folder with the recording of one process


def settings(layout: tuple, optimizer: str, precision: str) -> list[str]:
    _, flags = layout
    stages = next((int(flag[5:]) for flag in flags if flag.startswith("--pp=")), 1)
    n_layer = 2 * stages
    more = ["--opt.ns_dtype=float32"] if (optimizer, precision) == ("Muon", "fp32") else []
    words = [*matrix.OPTIMIZERS[optimizer], *more, f"--n_layer={n_layer}"]
    return [*words, f"--precision={precision}", "--norm=rmsnorm_gain", "--bias=true"]


def command(argv: list[str]) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main(argv)
    return status, out.getvalue()


def check(layout: tuple, optimizer: str, precision: str, *more: str) -> str:
    """What the command says, with its oracle recorded once; fails where it is an alarm.

    layout: (ranks, flags).
    """
    ranks, flags = layout
    words = [*settings(layout, optimizer, precision), *more]
    key = tuple(words)
    flags = " ".join(flags) or "--tp=1"
    if key in oracles:
        status, said = command([flags, f"--ranks={ranks}", f"--against={oracles[key]}/a", *words])
    else:
        folder = tempfile.mkdtemp()
        status, said = command([flags, f"--ranks={ranks}", f"--keep={folder}", *words])
        oracles[key] = folder
    assert status == 0, said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_alarm(layout, optimizer, precision):
    said = check(LAYOUTS[layout], optimizer, precision)
    assert "tensors agree" in said and "all 0" not in said


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", REPLICAS)
def test_no_alarm_with_experts(layout, optimizer, precision):
    said = check(REPLICAS[layout], optimizer, precision, *EXPERTS)
    assert "tensors agree" in said and "all 0" not in said


@pytest.mark.slow
@pytest.mark.parametrize("layout", matrix.EXPERT_PARALLEL)
def test_no_alarm_with_experts_spread_over_ranks(layout):
    said = check(matrix.EXPERT_PARALLEL[layout], "Muon", "fp64", *EXPERTS)
    assert "tensors agree" in said and "all 0" not in said


def uneven(layout: tuple, loads: str, folder) -> None:
    ranks, flags = layout
    words, wanted = UNEVEN[loads]
    layout_words = " ".join(flags) or "--tp=1"
    status, said = command([layout_words, f"--ranks={ranks}", f"--keep={folder}/kept", *words])
    assert status == 0, said
    recording = Recording(folder / "kept" / "a")
    counts = [recording.whole(key) for key in recording.order if key[1] == "counts"]
    assert any(wanted(n) for n in counts), counts


FAST = {
    "all tokens to one expert": RECOMPUTED["full, ranks 2"],
    "an expert without tokens": matrix.LAYOUTS["zero3 2"],
    "loads more than 10 times apart": matrix.LAYOUTS["ddp 2"],
}


@pytest.mark.parametrize("loads", UNEVEN)
def test_experts_with_uneven_loads_are_no_alarm(loads, tmp_path):
    uneven(FAST[loads], loads, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("loads", UNEVEN)
@pytest.mark.parametrize("layout", REPLICAS)
def test_experts_with_uneven_loads_are_no_alarm_on_any_layout(layout, loads, tmp_path):
    uneven(REPLICAS[layout], loads, tmp_path)
