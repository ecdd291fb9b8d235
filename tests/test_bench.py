"""The bench: a row for each class, state as the docstrings promise, one line for a wrong flag. The
network: bandwidths by their formulas, and the slow link by its name."""

import contextlib
import importlib
import io
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

import bench
from benchmarks import network as bench_network
from benchmarks import optimizers
from parallel.mesh import make_mesh

LIBRARIES = ("pytorch_optimizer", "schedulefree", "heavyball")
WORDS = {  # row: the docstring's words for what optimizers.STATE holds
    "sgd": "4 bytes a parameter with momentum",
    "lars": "4 bytes a parameter with momentum",
    "adamw": "8 bytes a parameter",
    "adaml2": "8 bytes a parameter",
    "ademamix": "12 bytes a parameter",
    "lamb": "8 bytes a parameter",
    "mars": "12 bytes a parameter",
    "lion": "4 bytes a parameter",
    "soapmuon": "8(a² + b²) bytes for GG and Q, 8ab for m and v",
    "muon": "4 bytes a parameter",
    "muown": "4 bytes a parameter and 12 a row",
    "pmuon": "8(a² + b²) bytes for GG and Q, 4ab for the momentum",
    "adafactor": "4·(rows + cols) bytes a matrix, 4 bytes an element of a vector",
    "shampoo": "8(a² + b²) bytes for L and P, 4ab for m, 4ab for v",
    "soap": "8(a² + b²) bytes for GG and Q, 8ab for m′ and v",
    "klsoap": "8(a² + b²) bytes for GG and Q, 4(a + b) for λ, 8ab for m′ and v",
    "adamwschedulefree": "8 bytes a parameter for AdamW, 4 for SGD",
    "sgdschedulefree": "8 bytes a parameter for AdamW, 4 for SGD",
}


@pytest.fixture
def alone(monkeypatch):
    """As where no peer but torch is installed."""
    for library in LIBRARIES:
        monkeypatch.setitem(sys.modules, library, None)


@pytest.fixture
def tiny(monkeypatch):
    small = [(8, 16), (16, 8)]
    monkeypatch.setattr(optimizers, "shapes", lambda kind, quick: small + [(16,)] * (kind == "all"))


def test_the_table_has_a_row_for_each_class_and_names_missing_peers(alone, tiny, capsys, tmp_path):
    out = tmp_path / "bench.md"
    assert bench.main(["optim", "--quick", "--threads=1", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    titles = [
        line.split(" | ")[0].strip("| ") for line in printed.splitlines() if line.startswith("| ")
    ]
    for row in optimizers.STATE:
        assert optimizers.ROWS[row][1][1].rsplit(".", 1)[1] in titles
    for library in LIBRARIES:
        assert f"skipped {library}." in printed and "not installed" in printed


def test_every_optimizer_class_has_a_row():
    classes = {ours[1] for _, ours, _ in optimizers.ROWS.values()}
    found = set()
    for file in Path(bench.__file__).parent.glob("optim/*.py"):
        module = importlib.import_module(f"optim.{file.stem}")
        found |= {
            f"optim.{file.stem}.{name}"
            for name, x in vars(module).items()
            if isinstance(x, type)
            and issubclass(x, torch.optim.Optimizer)
            and x.__module__ == module.__name__
        }
    assert found == classes


@pytest.mark.parametrize("row", optimizers.STATE)
def test_the_state_is_as_large_as_the_docstring_says(row, tiny):
    kind, (_, *ours), _ = optimizers.ROWS[row]
    candidate = optimizers.Candidate(*ours, optimizers.shapes(kind, True))
    candidate.step(torch.randn(200))
    candidate.state_bytes(row)  # asserts it
    docstring = importlib.import_module(ours[0].rsplit(".", 1)[0]).__doc__
    assert WORDS[row] in " ".join(docstring.split())


def test_a_wrong_claim_and_a_failing_peer_do_not_end_the_bench(monkeypatch, tiny, capsys):
    kind, ours, peers = optimizers.ROWS["lion"]
    broken = ("broken", "torch.optim.AdamW", {"lr": -1.0}, ())
    monkeypatch.setitem(optimizers.ROWS, "lion", (kind, ours, [broken]))
    monkeypatch.setitem(optimizers.ROWS, "sgd", (*optimizers.ROWS["sgd"][:2], []))
    monkeypatch.setitem(optimizers.STATE, "sgd", (5, 0))
    assert bench.main(["optim", "--quick", "--only=sgd,lion", "--threads=1"]) == 1
    printed = capsys.readouterr().out
    assert "| sgd | failed: AssertionError" in printed
    assert "| Lion |" in printed and "skipped broken: ValueError" in printed


@pytest.mark.parametrize(
    "command",
    [
        "",
        "optimizers",
        "optim --fast",
        "optim --only=adan",
        "optim --threads=0",
        "optim --quick=1",
        "optim --out",
    ],
)
def test_what_is_not_understood_is_one_line_and_exit_2(command, capsys):
    assert bench.main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "usage" in captured.err


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 48, 96), (2, 96, 48)])
def test_muon_compared_with_plain_products_is_one_algorithm(shape):
    from optim.muon import orthogonalize

    us = list(torch.randn(shape, dtype=torch.float64))
    X = orthogonalize(us, "quintic", 5, torch.float64)
    assert torch.allclose(optimizers.PLAIN[2](us, "quintic", 5, torch.float64), X, atol=1e-9)


def test_another_checkouts_class_takes_turns_with_ours(tmp_path, monkeypatch, capsys):
    (tmp_path / "optim").mkdir()
    text = Path(bench.__file__).with_name("optim").joinpath("muon.py").read_text(encoding="utf-8")
    seen = tmp_path / "seen"
    text += (
        f"\nclass Muon(Muon):\n    def step(self):\n        open({str(seen)!r}, 'a').write('x')\n"
    )
    text += "        sizes = [[p.numel() for p in g['params']] for g in self.param_groups]\n"
    text += "        assert sizes == [[64] * 4 + [256] * 2, [24, 40]], sizes\n"
    (tmp_path / "optim" / "muon.py").write_text(text, encoding="utf-8")
    monkeypatch.setitem(optimizers.MODELS, "default", (1, 8, 3, 5))
    command = ["optim", "--quick", "--only=muon", f"--beside={tmp_path}"]
    assert bench.main([*command, "--model=default"]) == 0
    assert "| Muon |" in (printed := capsys.readouterr().out) and "| beside.muon.Muon |" in printed
    # As often as ours: to warm up, and for each round of both builds.
    assert len(seen.read_text()) == 2 * (1 + 2)
    assert bench.main(["optim", "--only=muon", "--model=gpt2"]) == 2
    assert "--beside=FOLDER" in capsys.readouterr().err
    assert bench.main(["optim", "--only=lion", f"--beside={tmp_path}"]) == 2
    assert "has no optim/lion.py" in capsys.readouterr().err


# ---- the network ---------------------------------------------------------------------------------
def network(rank, world, argv, slow=lambda rank, peers: 0.0):
    """(exit status, what was printed) of `bench.py network` here; calls from rank to rank wait
    first."""
    plain = dist.batch_isend_irecv

    def slowed(ops):
        time.sleep(slow(rank, {dist.get_global_rank(op.group, op.group_peer) for op in ops}))
        return plain(ops)

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), mock.patch.object(dist, "batch_isend_irecv", slowed):
        return bench.main(["network", "--device=cpu", *argv]), printed.getvalue()


def check_table(text: str, axes: dict[str, int], sizes: list[int]) -> None:
    """A row for each axis, size and collective, and bandwidths that follow from bytes and time."""
    found = {}
    for line in (
        line.split() for line in text.splitlines() if line[:2] in axes and "GB/s" not in line
    ):
        axis, n, name, size, microseconds, alg, bus = line
        found[axis, name, int(size)] = float(bus) / float(alg)
        assert int(n) == axes[axis] and float(microseconds) > 0 and float(alg) > 0
        assert float(alg) == pytest.approx(int(size) / float(microseconds) / 1e3, rel=0.01)
    expected = {}
    for axis, n in axes.items():
        for size in [4 * n, *sizes]:
            size += -size % (4 * n)
            expected[axis, "all-reduce", size] = {2: 1.0, 4: 1.5}[n]
            expected[axis, "all-gather", size] = expected[axis, "reduce-scatter", size] = {
                2: 0.5,
                4: 0.75,
            }[n]
            expected[axis, "point-to-point", size] = 1.0
    assert found == pytest.approx(expected, rel=0.02)
    assert [line.split(":")[0] for line in text.splitlines() if "slowest" in line] == [*axes]


@pytest.mark.parametrize(
    "argv, axes, sizes",
    [
        pytest.param(
            ["--tp=2", "--quick"], {"dp": 2, "tp": 2}, [10_000, 100_000], marks=pytest.mark.slow
        ),
        pytest.param(
            ["--quick", "--sizes=1001,2e3"], {"dp": 4}, [1001, 2000], marks=pytest.mark.slow
        ),
        (["--quick", "--pp=2", "--cp=2"], {"pp": 2, "cp": 2}, [10_000, 100_000]),
    ],
)
def test_every_axis_is_measured_and_rank_0_prints(argv, axes, sizes):
    (status, text), *others = run_ranks(4, network, argv)
    check_table(text, axes, sizes)
    assert status == 0 and others == [(0, "")] * 3


@pytest.mark.parametrize(
    "argv, axis, link",
    [
        ([], "dp", (3, 0)),
        (["--tp=2"], "tp", (2, 3)),
        pytest.param([], "dp", (1, 2), marks=pytest.mark.slow),
        pytest.param(["--tp=2"], "dp", (1, 3), marks=pytest.mark.slow),
    ],
)
def test_a_slow_link_is_named(argv, axis, link):
    def slow(rank, peers):
        return 0.03 * (rank == link[0] and peers == {link[1]})

    (_, text), *_ = run_ranks(4, network, ["--quick", "--sizes=1000", *argv], slow)
    (line,) = [line for line in text.splitlines() if line.startswith(axis) and "slowest" in line]
    host = bench_network.socket.gethostname()
    assert f"rank {link[0]} ({host}) - rank {link[1]} ({host})" in line
    figures = {
        word: float(line.split(f"{word} ")[1].split(":")[0].split(",")[0])
        for word in ("median", "slowest")
    }
    assert figures["slowest"] < 1000 / 0.03 / 1e9 < figures["median"]


@pytest.mark.slow
def test_a_slow_rank_has_no_fast_link():
    (_, text), *_ = run_ranks(
        4, network, ["--quick", "--sizes=1000"], lambda rank, peers: 0.03 * (rank == 2)
    )
    pair, rank = text.splitlines()[-1].split("; at their best:")
    assert " rank 2 (" in pair and ": rank 2 (" in rank


def links(rank, world):
    """What each call leaves in x and y; then what reduce-scatter brought, gathered; and the
    pairs."""
    mesh, x, results = make_mesh(torch.device("cpu")), torch.full((2 * world,), rank + 1.0), {}
    y = torch.zeros_like(x)
    work = bench_network.collectives(mesh.groups["dp"], x, y)
    for name in [*work, "all-gather"]:
        work[name]()
        results[name + " again" * (name in results)] = x.tolist(), y.tolist()
        x.fill_(rank + 1.0)
    return results, bench_network.measure(mesh, "dp", [64], 1)[1]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_calls_move_the_whole_message_and_every_link_is_tried(world):
    for rank, (results, pairs) in enumerate(run_ranks(world, links)):
        total = world * (world + 1) / 2
        assert results["all-reduce"][0] == [total] * 2 * world
        assert results["all-gather"][1] == [r + 1.0 for r in range(world) for _ in range(2)]
        assert results["all-gather again"][1] == [total] * 2 * world
        assert results["point-to-point"][1] == [(rank - 1) % world + 1.0] * 2 * world
        expected = {(0, 1)} if world == 2 else {(r, (r + 1) % world) for r in range(world)}
        assert {*pairs} == expected and min(pairs.values()) > 0


@pytest.mark.parametrize(
    "argv", ["", "--quick=1", "--tp=0", "--sizes=1e", "--slow", "--device=tpux"]
)
def test_the_network_of_one_process_and_a_wrong_flag_are_one_line(argv, capsys):
    assert bench.main(["network", *argv.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert argv in captured.err if argv else "torchrun" in captured.err


@pytest.mark.slow
def test_the_network_under_torchrun():
    script = Path(bench.__file__)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, script.name, "network", "--quick", "--device=cpu"]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    check_table(done.stdout, {"dp": 2}, [10_000, 100_000])


@pytest.mark.parametrize(
    "argv, says", [([], "type torchrun"), (["--m=8"], "is not --micro_batches=8")]
)
def test_the_pipelines_bench_says_how_it_is_started(argv, says, capsys):
    assert bench.main(["pipeline", *argv]) == 2 and says in capsys.readouterr().err
