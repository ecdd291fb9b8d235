"""The bench: a row for each class, state as the docstrings promise, one line for a wrong flag."""

import importlib
import sys

import pytest
import torch

import bench

LIBRARIES = ("pytorch_optimizer", "schedulefree", "heavyball")
WORDS = {  # row: the docstring's words for what bench.STATE holds
    "sgd": "4 bytes a parameter with momentum", "lars": "4 bytes a parameter with momentum",
    "adamw": "8 bytes a parameter", "adaml2": "8 bytes a parameter", "lamb": "8 bytes a parameter",
    "lion": "4 bytes a parameter", "muon": "4 bytes a parameter",
    "adafactor": "4·(rows + cols) bytes a matrix, 4 bytes an element of a vector",
    "shampoo": "8(a² + b²) bytes for L and P, 4ab for m, 4ab for v",
    "soap": "8(a² + b²) bytes for GG and Q, 8ab for m′ and v",
    "adamwschedulefree": "8 bytes a parameter for AdamW, 4 for SGD",
    "sgdschedulefree": "8 bytes a parameter for AdamW, 4 for SGD",
}  # fmt: skip


@pytest.fixture
def alone(monkeypatch):
    """As where no peer but torch is installed."""
    for library in LIBRARIES:
        monkeypatch.setitem(sys.modules, library, None)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "shapes", lambda kind, quick: [(8, 16), (16, 8)] + [(16,)] * (kind == "all"))


def test_the_table_has_a_row_for_each_class_and_names_missing_peers(alone, tiny, capsys, tmp_path):
    out = tmp_path / "bench.md"
    assert bench.main(["optim", "--quick", "--threads=1", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    titles = [line.split(" | ")[0].strip("| ") for line in printed.splitlines() if line.startswith("| ")]
    for row in bench.STATE:
        assert bench.ROWS[row][1][1].rsplit(".", 1)[1] in titles
    for library in LIBRARIES:
        assert f"skipped {library}." in printed and "not installed" in printed


def test_every_optimizer_class_has_a_row():
    classes = {ours[1] for _, ours, _ in bench.ROWS.values()}
    found = set()
    for file in bench.Path(bench.__file__).parent.glob("optim/*.py"):
        module = importlib.import_module(f"optim.{file.stem}")
        found |= {f"optim.{file.stem}.{name}" for name, x in vars(module).items()
                  if isinstance(x, type) and issubclass(x, torch.optim.Optimizer)
                  and x.__module__ == module.__name__}  # fmt: skip
    assert found == classes


@pytest.mark.parametrize("row", bench.STATE)
def test_the_state_is_as_large_as_the_docstring_says(row, tiny):
    kind, (_, *ours), _ = bench.ROWS[row]
    candidate = bench.Candidate(*ours, bench.shapes(kind, True))
    candidate.step(torch.randn(200))
    candidate.state_bytes(row)  # asserts it
    docstring = importlib.import_module(ours[0].rsplit(".", 1)[0]).__doc__
    assert WORDS[row] in " ".join(docstring.split())


def test_a_wrong_claim_and_a_failing_peer_do_not_end_the_bench(monkeypatch, tiny, capsys):
    kind, ours, peers = bench.ROWS["lion"]
    broken = ("broken", "torch.optim.AdamW", {"lr": -1.0}, ())
    monkeypatch.setitem(bench.ROWS, "lion", (kind, ours, [broken]))
    monkeypatch.setitem(bench.ROWS, "sgd", (*bench.ROWS["sgd"][:2], []))
    monkeypatch.setitem(bench.STATE, "sgd", (5, 0))
    assert bench.main(["optim", "--quick", "--only=sgd,lion", "--threads=1"]) == 1
    printed = capsys.readouterr().out
    assert "| sgd | failed: AssertionError" in printed
    assert "| Lion |" in printed and "skipped broken: ValueError" in printed


@pytest.mark.parametrize("command", [
    "", "optimizers", "optim --fast", "optim --only=adan", "optim --threads=0", "optim --quick=1",
    "optim --out",
])  # fmt: skip
def test_what_is_not_understood_is_one_line_and_exit_2(command, capsys):
    assert bench.main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "usage" in captured.err


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 48, 96), (2, 96, 48)])
def test_muon_compared_with_plain_and_symmetric_products_is_one_algorithm(shape):
    from optim.muon import orthogonalize

    us = list(torch.randn(shape, dtype=torch.float64))
    X = orthogonalize(us, "quintic", 5, torch.float64)
    for update in bench.PLAIN[2], bench.SYMMETRIC[2]:
        assert torch.allclose(update(us, "quintic", 5, torch.float64), X, atol=1e-9)
