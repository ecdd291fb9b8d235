"""bench.py scaling, overhead, job, nanogpt, all: tables of invented figures; runs of tiny
models."""

import math
import pickle
import re
import subprocess

import pytest

import bench
from benchmarks import all as everything
from benchmarks import nanogpt, overhead, runs, scaling
from data import corpora


# ---- scaling -------------------------------------------------------------------------------------
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
    figures = {
        ("muon", "ddp", 1, 2): (100, 200),
        ("muon", "ddp", 2, 1): (110, 180),
        ("muon", "ddp", 4, 1): (50, 60),
        ("muon", "zero1", 2, 1): (120, 240),
        ("adamw", "ddp", 1, 2): (10, 20),
        ("adamw", "ddp", 2, 1): (9, 20),
    }
    found = {
        layout: [{"tokens_per_s": x, "peak_bytes": 2**20, "sent_bytes": 7} for x in speeds]
        for layout, speeds in figures.items()
    }
    page = "\n".join(scaling.ranks_table(found, case, 2))
    assert "| muon, ddp | 2 x 1 | 145 | 1.00 (0.90..1.10) | 1 | 7 | 13,107,200 |" in page
    assert "| muon, ddp | 4 x 1 | 55 | 0.40 (0.30..0.50) | 1 | 7 | 19,660,800 |" in page
    for way, ratio in (
        ("muon, ddp", "1.00 (0.90..1.10)"),
        ("muon, zero1", "1.20 (1.20..1.20)"),
        ("adamw, ddp", "0.95 (0.90..1.00)"),
    ):
        assert f"- {way}: 2 ranks of one thread / one process of 2: **{ratio}**" in page


@pytest.mark.slow
def test_scaling_end_to_end(capsys):
    assert bench.main(["scaling", "--quick"]) == 0
    by_ranks, page = capsys.readouterr().out.split("Sizes")
    for ranks, sent in (2, 4 * 40_960), (4, 6 * 40_960):
        rows = re.findall(rf"ddp \| {ranks} x \d+ \| .+ \| ([\d,]+) \| ([\d,]+) \|", by_ranks)
        assert rows and {*rows} == {(f"{sent:,}", f"{sent:,}")}  # what was counted is the formula
    assert "| muon, zero1 | 2 x" in by_ranks
    assert page.count("| x") == 3 and "peak bytes =" in page


# ---- overhead ------------------------------------------------------------------------------------
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
    assert clock.steps == [
        {"began": began, overhead.MARK: 1.0, "outer": 4.0, "inner": 3.0} for began in (9.0, 27.0)
    ]


# Saved after 2, 6, 11
LENGTHS = [9.0, 1.0, 2.0, 5.0, 1.0, 1.1, 2.0, 1.2, 1.0, 1.0, 1.1, 3.0, 1.4, 1.0, 1.0]
SAVES = [
    {"began": sum(LENGTHS[:i])} | ({"Saver.save": i / 1e3} if i in (2, 6, 11) else {})
    for i in range(15)
]


def test_a_step_beside_a_save_is_compared_with_those_that_are_not():
    slower, waits = overhead.beside_saves(SAVES)
    assert slower == pytest.approx([1.2, 1.4]) and waits == pytest.approx([0.006, 0.011])


@pytest.mark.parametrize("log_ms, said", [(0.5, "| < 1 |"), (1.5, "| **not** < 1 |")])
def test_shares_are_of_the_median_step_beside_their_targets(log_ms, said):
    began = [0.0, 9.0, 9.1, 9.2, 9.3, 9.4, 9.5]  # the first step took long
    steps = [{"began": x, "Dataset.__call__": 1e-4, "Logger.train": log_ms / 1e3} for x in began]
    steps[0]["Dataset.__call__"] = steps[-1]["Dataset.__call__"] = 1.0  # no part of it either
    page = "\n".join(overhead.report(steps, SAVES, [(4.0, 1.5), (3.0, 1.5), (5.0, 1.5)]))
    assert "median of 4 steps: 100.0 ms" in page
    assert "| **waiting for data** | 0.100 | **0.10 %** | < 1 |" in page
    assert f"| **monitoring and checks** | {log_ms:.3f} | **{log_ms:.2f} %** {said}" in page
    saves = (
        "over the others' median: **1.30 (1.20..1.40)**, 2 saves; save() itself: 8.5 (6.0..11.0) ms"
    )
    assert saves in page
    assert "beyond it **2.50 (1.50..3.50) s**, target, s: **not** < 0.9" in page


def test_what_is_wrapped_is_called_by_train():
    source = (runs.TRAIN).read_text()
    for owner, attribute in overhead.DATA + overhead.CHECKS:
        word = "train_data" if attribute == "__call__" else rf"\.{attribute}\("
        assert callable(getattr(owner, attribute)) and re.search(word, source), attribute


@pytest.mark.slow
def test_overhead_end_to_end(text, capsys):
    words = ["--n_embd=32", "--batch_size=4", "--block_size=32", "--threads=1", "--device=cpu"]
    assert bench.main(["overhead", "--quick", f"--data={text}", *words]) == 0
    page = capsys.readouterr().out
    for owner, attribute in overhead.DATA + overhead.CHECKS:
        assert f"| {overhead.name_of(owner, attribute)} | " in page  # each was called
    first, bare, beyond = map(float, re.findall(r"(\d+\.\d\d) \(", page[page.index("Start to") :]))
    assert first - bare == pytest.approx(beyond, abs=0.011) and 0 < bare < first
    assert bench.main(["overhead", "--quick", "--data=nowhere"]) == 1
    assert "overhead: train.py: --data=nowhere does not exist" in capsys.readouterr().err


# ---- all, and the words --------------------------------------------------------------------------
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
    assert re.findall("^## (.+)", page, re.M) == [*everything.BENCHES, "At a glance"]
    assert len(ran) == len(everything.BENCHES) - 1 and "left out: type --nanogpt=" in page
    assert {name.split()[0] for name in everything.BENCHES} == bench.FILES.keys() - {
        "all",
        "gpu",
        "step",
    }
    assert page.count("**failed**, status 1: ValueError: a reason") == 2  # at a glance too
    assert "- train: **failed**, status 1: ValueError: a reason\n" in page
    assert "```\nfigures of network\n```" in page and page.count("```") == 4
    assert ["--nproc_per_node=2" in command for command in ran] == [False] * 12 + [True] * 2


def test_all_runs_nanogpt_where_its_clone_is_given(monkeypatch, clone):
    ran = []
    done = subprocess.CompletedProcess([], 0, "figures", "")
    monkeypatch.setattr(
        everything.subprocess, "run", lambda command, **_: ran.append(command[1:]) or done
    )
    monkeypatch.setattr(everything, "BENCHES", ("nanogpt", "optim"))
    monkeypatch.setattr(runs, "header", " ".join)
    assert bench.main(["all", f"--nanogpt={clone}"]) == 0
    program = str(runs.ROOT / "bench.py")
    assert ran == [[program, "nanogpt", f"--path={clone}"], [program, "optim"]]


def test_the_figures_in_bold_are_repeated_at_a_glance():
    table = "|  | s | n |\n|---|---|---|\n| x | **1.00** | -2 |\n| y | 3 | 4 |"
    page = ["## a", "", "no figure", table, "## b", "- ratio **5**", "a ** b"]
    assert everything.at_a_glance(page)[2:] == ["- a: x, s **1.00**, n -2", "- b: ratio **5**"]


def test_a_job_is_repeated_with_other_seeds(monkeypatch, capsys):
    ran = []

    def run(words, out_dir):
        ran.append(words)
        i = len(ran)
        return 10.0 + i, [{"step_s": 1.0, "tokens_per_s": 100.0 * i}, {"val_loss": 1.0 + i / 10}]

    monkeypatch.setattr(runs, "run", run)
    assert bench.main(["job", "--runs=2", "--n_embd=32"]) == 0
    assert [[w for w in words if "seed" in w] for words in ran] == [[], ["--seed=1"], ["--seed=2"]]
    assert all("--n_embd=32" in words and "--resume=never" in words for words in ran)
    row = "| **12.5 (12.0..13.0)** | **1.2500 ± 0.0707** | 250 (200..300) |"
    assert row in capsys.readouterr().out
    monkeypatch.setattr(
        runs,
        "run",
        lambda words, out_dir: (1.0, [{"step_s": 1.0, "tokens_per_s": 1.0}, {"val_loss": None}]),
    )
    assert bench.main(["job", "--runs=2"]) == 0 and "**nan ± nan**" in capsys.readouterr().out


# ---- nanoGPT, whose place a few lines take -------------------------------------------------------
THEIR_TRAIN = """
import os, sys
import torch
from model import GPT
exec(open("configurator.py").read())
given = dict(word.lstrip("-").split("=") for word in sys.argv[1:] if word.startswith("--"))
assert len(open("data/text/train.bin", "rb").read()) % 2 == 0
os.makedirs("run", exist_ok=True)
print("step 0: train loss 9.0, val loss 9.0")
for i in range(int(given["max_iters"]) + 1):
    print(f"iter {i}: loss 5.0, time {10 * (i + 1)}.5ms, mfu -100.00%")
print("step 10: train loss 2.0, val loss 2.5")
saved = {"model": GPT(None).state_dict(), "model_args": {"block_size": int(given["block_size"])}}
torch.save(saved, "run/ckpt.pt")
"""
THEIR_MODEL = """
import math
import torch
class GPTConfig:
    def __init__(self, block_size):
        self.block_size = block_size
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.w = config, torch.nn.Parameter(torch.zeros(1))
    def forward(self, x, y):
        return None, torch.tensor(math.log(256)) + self.w.sum()
"""


@pytest.fixture
def clone(tmp_path):
    for name in nanogpt.FILES:
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).touch()
    (tmp_path / "clone" / "train.py").write_text(THEIR_TRAIN)
    (tmp_path / "clone" / "model.py").write_text(THEIR_MODEL)
    return tmp_path / "clone"


@pytest.mark.slow
def test_nanogpts_seconds_steps_and_loss_are_read(clone, tmp_path, text):
    corpus = corpora.load(text, "bytes", str(tmp_path), None)
    folder = tmp_path / "folder"
    nanogpt.prepare(clone, folder, corpus)
    assert (folder / "data" / "text" / "val.bin").stat().st_size == 2 * len(corpus.val)
    assert pickle.loads((folder / "data" / "text" / "meta.pkl").read_bytes()) == {"vocab_size": 256}
    seconds, steps, val_loss = nanogpt.theirs(folder, ["x.py", "--max_iters=3", "--block_size=8"])
    assert steps == pytest.approx([0.0105, 0.0205, 0.0305, 0.0405]) and val_loss == 2.5
    assert 0.1 < seconds < 60
    assert nanogpt.loss_of(folder, corpus.val, 8) == pytest.approx(math.log(256))
    with pytest.raises(RuntimeError, match="nanoGPT: .*max_iters"):
        nanogpt.theirs(folder, ["--block_size=8"])
    with pytest.raises(RuntimeError, match="left no checkpoint"):  # not the first run's
        nanogpt.loss_of(folder, corpus.val, 8)


@pytest.mark.slow
def test_nanogpt_end_to_end(clone, tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(runs, "CACHE", tmp_path)
    assert bench.main(["nanogpt", f"--path={clone}", f"--data={text}", "--quick"]) == 0
    page = capsys.readouterr().out
    assert re.search(
        r"\| nanoGPT, float32 \| \d+ \(.*\) \| \*\*1\.00 \(1\.00\.\.1\.00\)\*\* \|", page
    )
    assert page.count("- seconds, nanoGPT / cpu_speedrun") == 1 and "5.5452" in page


@pytest.mark.parametrize(
    "command, says",
    [
        ("speedrun --rnus=5", "usage"),
        ("speedrun --runs=0", "usage"),
        ("speedrun --loss=low", "usage"),
        ("speedrun --loss=1.5 --reference=x.toml", "without --reference="),
        ("speedrun --recipe=x.toml", "x.toml"),
        ("speedrun --data=nowhere", "nowhere"),
        ("speedrun --out=/nowhere/x.md", "mkdir"),
        ("scaling --ranks=2", "usage"),
        ("scaling --quick=yes", "usage"),
        ("overhead --n_layr=2", "n_layer"),
        ("overhead --steps=2", "--steps=24"),
        ("overhead --quick=1", "usage"),
        ("overhead --out_dir=x", "leave"),
        ("overhead --save_hours=1", "leave"),
        ("nanogpt --path=nowhere", "git clone"),
        ("job --seed=3", "leave it out"),
        ("job --rnus=3", "rnus"),
        ("all --nanogpt=nowhere", "clone"),
        ("spread --slow", "usage"),
        ("memory --job=gpt3", "usage"),
        ("checkpoint --cut=columns", "usage"),
        ("checkpoint --ranks=0", "usage"),
        ("all --only=optim", "usage"),
        ("all --out=README.md", "folder"),
    ],
)
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
