"""Where nothing is wrong the parity oracle is silent: on each layout of the matrix, with SGD, AdamW
and Muon, in float64 and in float32."""

import contextlib
import io
import tempfile

import matrix
import pytest

from parity.__main__ import main

OPTIMIZERS = ["SGD", "AdamW", "Muon"]
LAYOUTS = matrix.LAYOUTS | matrix.MODEL_PARALLEL
oracles = {}  # settings -> folder with the recording of one process


def settings(layout: str, optimizer: str, precision: str) -> list[str]:
    _, flags = LAYOUTS[layout]
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


def check(layout: str, optimizer: str, precision: str) -> str:
    """What the command says, with its oracle recorded once; fails where it is an alarm."""
    ranks, flags = LAYOUTS[layout]
    words = settings(layout, optimizer, precision)
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
    said = check(layout, optimizer, precision)
    assert "tensors agree" in said and "all 0" not in said
