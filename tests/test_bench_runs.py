"""bench.py scaling, overhead, all: tables from invented figures, and real runs of tiny models."""

import math
import re
import subprocess

import pytest

import bench
from benchmarks import all as everything
from benchmarks import overhead, runs, scaling


# ---- scaling ---------------------------------------------------------------------------------------------
def test_the_exponent_is_that_of_the_power_law():
    xs = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert scaling.exponent(xs, [3 * x**0.75 for x in xs]) == pytest.approx(0.75)
    noisy = [x**1.5 * noise for x, noise in zip(xs, (1, 1.1, 1, 0.9, 1))]
    slope = 1.5 + math.log2(0.9 / 1.1) / 10  # sum of (i - 2) log2 noise, over 10
    assert scaling.exponent(xs, noisy) == pytest.approx(slope)


def test_growth_is_found_in_invented_runs():
    found = {}
    for case in scaling.SIZES:
        peak = 200 * 2**20 + 50 * case.parameters()
        found[case] = [{"tokens_per_s": 1e12 / case.flops() ** 0.8, "peak_bytes": peak}]
    said = "\n".join(scaling.growth(found, 200 * 2**20))
    assert "FLOPs^0.80" in said and "= 200 MiB + 50.0 N" in said and "own bytes ~ N^1.00" in said


def test_sizes_are_powers_of_two_of_the_default_models_blocks_and_ratios_are_round_by_round():
    counts = [case.parameters(("matrix",)) for case in scaling.SIZES]
    assert [n / counts[0] for n in counts] == [1, 2, 4, 8, 16]
    case = scaling.SIZES[2]
    assert (case.n_layer, case.n_embd, case.parameters()) == (4, 256, 3_276_800)  # the README's 3M
    assert case.flops() == 6 * (12 * 4 * 256**2 + 256 * 256) + 12 * 4 * 256 * 256
    figures = {(1, 2): (100, 200), (2, 1): (110, 180), (4, 1): (50, 60)}
    found = {layout: [{"tokens_per_s": x, "peak_bytes": 2**20, "sent_bytes": 7} for x in speeds]
             for layout, speeds in figures.items()}  # fmt: skip
    page = "\n".join(scaling.ranks_table(found, case, 2))
    assert "| 2 x 1 | 145 | 1.00 (0.90..1.10) | 1 | 7 | 13,107,200 |" in page
    assert "| 4 x 1 | 55 | 0.40 (0.30..0.50) | 1 | 7 | 19,660,800 |" in page
    assert "one process of 2: **1.00 (0.90..1.10)**" in page


@pytest.mark.slow
def test_scaling_end_to_end(capsys):
    assert bench.main(["scaling", "--quick"]) == 0
    by_ranks, page = capsys.readouterr().out.split("Sizes")
    for ranks, sent in (2, 4 * 40_960), (4, 6 * 40_960):
        (row,) = re.findall(rf"\| {ranks} x \d+ \| .+ \| ([\d,]+) \| ([\d,]+) \|", by_ranks)
        assert row == (f"{sent:,}", f"{sent:,}")  # what was counted is the formula
    assert page.count("| x") == 3 and "peak bytes =" in page


# ---- overhead --------------------------------------------------------------------------------------------
def test_a_call_within_another_counts_once_and_a_step_begins_at_the_mark(monkeypatch):
    clock, now = overhead.Clock(), [0.0]
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: now[0])

    def spend(seconds, inner=None):
        now[0] += seconds
        if inner:
            inner(seconds)

    mark, outer, inner = (clock.around(name, spend) for name in (overhead.MARK, "outer", "inner"))
    inner(9.0)  # before the first step
    for _ in range(2):
        mark(1.0)
        outer(2.0, inner)
        inner(3.0)
        now[0] += 10.0
    assert clock.steps == [{"began": began, overhead.MARK: 1.0, "outer": 4.0, "inner": 3.0}
                           for began in (9.0, 27.0)]  # fmt: skip


@pytest.mark.parametrize("log_ms, said", [(0.5, "| < 1 |"), (1.5, "| **not** < 1 |")])
def test_shares_are_of_the_median_step_beside_their_targets(log_ms, said):
    began = [0.0, 9.0, 9.1, 9.2, 9.3, 9.4, 9.5]  # the first step took long
    steps = [{"began": x, "Rows.__call__": 1e-4, "Logger.train": log_ms / 1e3} for x in began]
    steps[0]["Rows.__call__"] = steps[-1]["Rows.__call__"] = 1.0  # no part of it either
    page = "\n".join(overhead.report(steps, [(4.0, 1.5), (3.0, 1.5), (5.0, 1.5)]))
    assert "median of 4 steps: 100.0 ms" in page
    assert "| **waiting for data** | 0.100 | **0.10 %** | < 1 |" in page
    assert f"| **monitoring and checks** | {log_ms:.3f} | **{log_ms:.2f} %** {said}" in page
    assert "beyond it **2.50 (1.50..3.50) s**, target, s: **not** < 2" in page


def test_what_is_wrapped_is_called_by_train():
    source = (runs.TRAIN).read_text()
    for owner, attribute in overhead.DATA + overhead.CHECKS:
        word = r"train_rows|rows: data\.Rows" if attribute == "__call__" else rf"\.{attribute}\("
        assert callable(getattr(owner, attribute)) and re.search(word, source), attribute


@pytest.mark.slow
def test_overhead_end_to_end(text, capsys):
    words = ["--n_embd=32", "--batch_size=4", "--block_size=32", "--threads=1", "--device=cpu"]
    assert bench.main(["overhead", "--quick", f"--data={text}", *words]) == 0
    page = capsys.readouterr().out
    for owner, attribute in overhead.DATA + overhead.CHECKS:
        assert f"| {overhead.name_of(owner, attribute)} | " in page  # each was called
    (first, bare, beyond) = map(float, re.findall(r"(\d+\.\d\d) \(", page))
    assert first - bare == pytest.approx(beyond, abs=0.011) and 0 < bare < first
    assert bench.main(["overhead", "--quick", "--data=nowhere"]) == 1
    assert "overhead: train.py: --data=nowhere does not exist" in capsys.readouterr().err


# ---- all, and the words ----------------------------------------------------------------------------------
def test_all_goes_on_after_a_failure_and_says_so(monkeypatch, tmp_path, capsys):
    ran = []

    def run(command, **_):
        ran.append(command)
        bad = "train" in command
        stderr = "Traceback:\nValueError: a reason\n====\n" * bad
        return subprocess.CompletedProcess(command, int(bad), f"figures of {command[-2]}\n", stderr)

    monkeypatch.setattr(runs, "header", lambda words: " ".join(words))
    monkeypatch.setattr(everything.subprocess, "run", run)
    assert bench.main(["all", "--quick", f"--out={tmp_path / 'new'}"]) == 1
    page = (tmp_path / "new" / "benchmarks.md").read_text()
    assert re.findall("^## (.+)", page, re.M) == [*everything.NAMES] and len(ran) == len(everything.NAMES)
    assert {*everything.NAMES} == bench.FILES.keys() - {"all"}
    assert page.count("failed") == 1 and "**failed**, status 1: ValueError: a reason" in page
    assert "```\nfigures of network\n```" in page and page.count("```") == 4
    assert ["--nproc_per_node=2" in command for command in ran] == [False] * 6 + [True] * 2
    monkeypatch.setattr(everything, "NAMES", ("optim", "network"))
    assert bench.main(["all"]) == 0


@pytest.mark.parametrize("command, says", [
    ("speedrun --rnus=5", "usage"), ("speedrun --runs=0", "usage"), ("speedrun --loss=low", "usage"),
    ("speedrun --loss=1.5 --reference=x.toml", "without --reference="),
    ("speedrun --recipe=x.toml", "x.toml"),
    ("speedrun --data=nowhere", "nowhere"), ("speedrun --out=/nowhere/x.md", "mkdir"),
    ("scaling --ranks=2", "usage"), ("scaling --quick=yes", "usage"), ("overhead --n_layr=2", "n_layer"),
    ("overhead --steps=2", "--steps=4"), ("overhead --quick=1", "usage"), ("overhead --out_dir=x", "leave"),
    ("spread --slow", "usage"), ("all --only=optim", "usage"),
    ("all --out=README.md", "folder")])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_2(command, says, monkeypatch, capsys):
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setattr(subprocess, "Popen", None)  # before anything runs
    assert bench.main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and says in captured.err


def test_help_is_the_docstring_of_each_bench(capsys):
    assert bench.main(["--help"]) == 0 and "bench.py speedrun" in capsys.readouterr().out
    for name, file in bench.FILES.items():
        assert (runs.ROOT / "benchmarks" / f"{file}.py").exists() and f"{file}.py" in bench.__doc__
        assert bench.main([name, "--help"]) == 0 and f"bench.py {name}" in capsys.readouterr().out
