"""--profile=FIRST:LAST: a trace of each rank that loads, of these steps alone; nothing when off."""

import csv
import gzip
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from harness import run_ranks

import train
from metrics import profile
from run import build
from settings import parse

ROOT = Path(__file__).parent.parent
TINY = (
    "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --steps=5 --eval_every=0"
    " --save_every=0 --sample_tokens=0 --plot=false --threads=1"
).split()


def losses(rank, world, words) -> list[float]:
    """The loss of each step; the run writes in the --out_dir of its words."""
    cfg = parse.parse(words)
    train.main(cfg)
    rows = Path(cfg.out_dir, "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, rows) if "loss" in row]


def check_trace(path: Path, steps: list[int]) -> None:
    """Asserts the schema that viewers need (Chrome's trace event format), and which steps it has.

    Complete events ("X") have a name, a beginning and a length in microseconds, a process and a
    thread; each flow that begins ("s") ends ("f").
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        trace = json.load(file)
    events = trace["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    for event in complete:
        assert isinstance(event["name"], str) and event["dur"] >= 0 and event["ts"] >= 0
        assert {"pid", "tid"} <= event.keys()
    assert {event["ph"] for event in events} <= set("XMisf")
    begun, ended = ({e["id"] for e in events if e["ph"] == phase} for phase in "sf")
    assert begun and begun == ended
    bars = sorted(
        (e for e in complete if e["name"].startswith("step ") and e["cat"] == "user_annotation"),
        key=lambda e: e["ts"],
    )
    assert [bar["name"] for bar in bars] == [f"step {step}" for step in steps]
    # Each step has its own forward, backward and update.
    for bar in bars:
        end = bar["ts"] + bar["dur"]
        names = {e["name"] for e in complete if bar["ts"] <= e["ts"] <= end}
        # Backward is an operator's, or that of parallel/autocast_linear.py.
        backward = {"MmBackward0", "TBackward0", "LinearBackward"}
        assert {"aten::mm", "aten::linear"} & names and backward & names
        assert any(name.startswith("Optimizer.step#") for name in names)


@pytest.mark.parametrize(
    "layout", ["--data_parallel=ddp", pytest.param("--tp=2", marks=pytest.mark.slow)]
)
def test_each_rank_has_a_trace_of_these_steps_and_the_run_is_the_same(layout, tmp_path, text):
    words = [*TINY, layout, f"--data={text}", "--optim=adamw"]
    plain = run_ranks(2, losses, [*words, f"--out_dir={tmp_path}/plain"])
    profiled = run_ranks(2, losses, [*words, f"--out_dir={tmp_path}/run", "--profile=2:4"])
    assert profiled == plain
    folder = tmp_path / "run" / "profile"
    for rank in range(2):
        check_trace(folder / f"rank_{rank}.trace.json.gz", [2, 3])
        lines = (folder / f"rank_{rank}.operators.txt").read_text().splitlines()
        assert lines[0] == "profile of 2 steps, by time on the CPU"
        assert lines[1].split()[0] == "operator" and any("aten::mm" in line for line in lines)
        with open(folder / f"rank_{rank}.memory.csv") as file:
            memory = list(csv.DictReader(file))
        assert max(int(row["bytes"]) for row in memory) > 0
        assert [float(row["seconds"]) for row in memory] == sorted(
            float(row["seconds"]) for row in memory
        )
    assert (folder / "memory.png").stat().st_size > 1000
    assert not (tmp_path / "plain" / "profile").exists()


def test_off_there_is_no_profiler_and_torch_never_starts_one(tmp_path, text, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a profiler, though --profile is off")

    monkeypatch.setattr(torch.profiler, "profile", refuse)
    monkeypatch.setattr(profile, "Profiler", refuse)
    monkeypatch.setattr(build, "Profiler", refuse)
    words = [*TINY, "--steps=2", f"--data={text}", f"--out_dir={tmp_path}"]
    assert len(losses(0, 1, words)) == 2


def driven(folder, steps, first=3, last=6) -> list[str]:
    """What a Profiler logs of these steps, each a small product."""
    said = []
    profiler = profile.Profiler(folder, 0, torch.device("cpu"), first, last, said.append)
    for step in steps:
        profiler.start(step)
        x = torch.ones(4, 4, requires_grad=True)
        (x @ x).sum().backward()
        profiler.end(step)
    profiler.close()
    profiler.close()
    return said


def bars(folder) -> list[str]:
    with gzip.open(folder / "rank_0.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    found = [e for e in events if e["name"].startswith("step ") and e["ph"] == "X"]
    return [e["name"] for e in sorted(found, key=lambda e: e["ts"])]


@pytest.mark.parametrize(
    "steps, profiled",
    [
        ([1, 2, 3, 4, 5, 6, 7], [3, 4, 5]),
        ([3, 4, 5, 6], [3, 4, 5]),  # resumed at the range: no step to warm up with
        ([5, 6, 7], [5]),  # resumed inside it
        ([2, 3, 4], [3, 4]),  # stopped inside it
        ([3, 4, 3, 4, 5, 6], [3, 4, 3]),  # a rollback: as many steps as were asked for
        ([4, 5], [4, 5]),
    ],
)
def test_the_range_is_profiled_however_the_run_goes(steps, profiled, tmp_path):
    said = driven(tmp_path, steps)
    assert bars(tmp_path) == [f"step {step}" for step in profiled]
    assert said[0].startswith(f"profile of {len(profiled)} steps")
    assert said[-1].endswith("open it in ui.perfetto.dev")


@pytest.mark.parametrize("steps", [[1], [1, 2], [6, 7], [9]])
def test_a_run_without_these_steps_writes_nothing(steps, tmp_path):
    assert driven(tmp_path / "profile", steps) == []
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("words", ["0:3", "5:5", "7:3", "7", "a:b", "1:2:3", "9:11", "-1:4", "1:"])
def test_a_range_that_is_none_is_refused_with_what_to_type(words):
    with pytest.raises(ValueError, match="profile=.*; type --profile="):
        parse.parse([*TINY, f"--profile={words}"])


@pytest.mark.slow
def test_kinetos_own_notices_do_not_reach_the_user(tmp_path):
    code = (
        "from pathlib import Path; from tests.test_profile import driven;"
        " driven(Path('{}'), [2, 3, 6])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.format(tmp_path)],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "profiler_start" not in done.stderr and bars(tmp_path) == ["step 3"]


def test_a_range_that_is_over_when_a_run_resumes_is_said(tmp_path, text, capsys):
    words = [*TINY, "--steps=6", f"--data={text}", f"--out_dir={tmp_path}"]
    losses(0, 1, [*words, "--steps=3"])
    capsys.readouterr()
    losses(0, 1, [*words, "--profile=2:4"])
    said = capsys.readouterr().out
    assert "nothing is profiled, as 3 steps are done already; type --profile=5:8" in said
    assert not (tmp_path / "profile").exists()


def event(name, cpu=0.0, gpu=0.0, n=2, is_gpu=False, is_user_annotation=False):
    """One of key_averages(), of these µs on the CPU and on the GPU."""
    kinds = torch.autograd.DeviceType
    return types.SimpleNamespace(
        key=name,
        count=n,
        self_cpu_time_total=cpu,
        self_device_time_total=gpu,
        self_cpu_memory_usage=4e6,
        self_device_memory_usage=2e6,
        device_type=kinds.CUDA if is_gpu else kinds.CPU,
        is_user_annotation=is_user_annotation,
    )


def test_the_table_has_each_microsecond_once_dearest_first():
    events = [
        event("aten::mm", cpu=1000, gpu=5000),
        event("a kernel of mm", gpu=5000, is_gpu=True),
        event("Memcpy", gpu=15000, is_gpu=True, n=4),
        event("Optimizer.step#AdamW.step", cpu=3000),
        event("Optimizer.step#AdamW.step", gpu=90000, is_gpu=True, is_user_annotation=True),
        event("step 10", cpu=7000),
        event("ProfilerStep*", cpu=9000),
    ]
    found = {}
    for device in ("cpu", "cuda"):
        head, columns, *lines = profile.operators(events, 2, torch.device(device))
        assert head == f"profile of 2 steps, by time on the {'GPU' if device == 'cuda' else 'CPU'}"
        assert columns.split("  ")[0] == "operator"
        found[device] = [tuple(line.rsplit(None, 4)) for line in lines]
        found[device] = [(name.strip(), *cells) for name, *cells in found[device]]
    assert found["cpu"] == [
        ("Optimizer.step#AdamW.step", "1.0", "1.500", "75.0%", "2.00"),
        ("aten::mm", "1.0", "0.500", "25.0%", "2.00"),
        ("all", "2.0", "2.000", "100.0%", "4.00"),
    ]
    assert found["cuda"] == [
        ("Memcpy", "2.0", "7.500", "75.0%", "1.00"),
        ("a kernel of mm", "1.0", "2.500", "25.0%", "1.00"),
        ("all", "3.0", "10.000", "100.0%", "2.00"),
    ]


def test_memory_is_read_by_device_and_in_order():
    def given(ts, kind, number, total):
        args = {"Device Type": kind, "Device Id": number, "Total Allocated": total}
        return {"name": "[memory]", "ts": ts, "args": args}

    events = [given(3e6, 1, 0, 70), given(2e6, 0, -1, 50), {"name": "aten::mm", "ts": 1e6}]
    assert profile.memory_rows(events) == [(0.0, "cpu", 50), (1.0, "gpu 0", 70)]


def test_what_comes_after_the_last_step_is_not_profiled(tmp_path):
    said = []
    profiler = profile.Profiler(tmp_path, 0, torch.device("cpu"), 1, 3, said.append)
    for step in (1, 2):
        profiler.start(step)
        torch.ones(3).exp()
        profiler.end(step)
        torch.ones(3).sinh()  # an evaluation, say
    text = (tmp_path / "rank_0.operators.txt").read_text()
    calls = {line.split()[0]: line.split()[1] for line in text.splitlines()[2:]}
    assert calls["aten::exp"] == "1.0" and calls["aten::sinh"] == "0.5"


def test_the_picture_of_memory_begins_at_0_and_names_the_peaks(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **more: found.append(figure))
    profile.plot([(0.0, "gpu 0", 900e6), (0.1, "cpu", 5e6), (0.2, "gpu 0", 950e6)], tmp_path)
    [figure] = found
    assert figure.axes[0].get_ylim()[0] == 0
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["cpu: at most 5 MB", "gpu 0: at most 950 MB"]
