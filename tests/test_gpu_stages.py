"""bench.py gpu: every branch on a device's type has a stage, a stage that fails or hangs costs no
other one its results, and a rehearsal on a CPU fills every table."""

import ast
import collections
import importlib
import inspect
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from harness import product_files

import bench
from benchmarks import gpu
from benchmarks.stages import common, gpt2

ROOT = Path(__file__).parent.parent
TOOLS = {"tests", "benchmarks", "experiments", "examples", "findings", "search"}


# ---- branches on a device ------------------------------------------------------------------------
def is_about_a_device(node: ast.AST) -> bool:
    """Does this expression ask of what kind a device is?

    x.device.type == "cuda", device.type in (...), x.is_cuda, torch.cuda.is_available() and its
    like, torch.backends.mps.is_available(), get_backend(...) == "nccl", name == "cuda"; and such an
    answer that was stored, as on_gpu.
    """
    if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
        name = node.id if isinstance(node, ast.Name) else node.attr
        if name in ("on_gpu", "is_cuda", "is_mps", "is_cpu"):
            return True
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        words = [side.value for side in sides if isinstance(side, ast.Constant)]
        if {"cuda", "mps", "nccl"} & set(map(str, words)):
            return True
        types = [side for side in sides if isinstance(side, ast.Attribute) and side.attr == "type"]
        calls = [side.func for side in sides if isinstance(side, ast.Call)]
        backends = [f for f in calls if isinstance(f, ast.Attribute) and f.attr == "get_backend"]
        return bool(types or backends)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        of = ast.unparse(node.func.value)
        asks = node.func.attr.startswith(("is_available", "is_initialized", "is_bf16_supported"))
        return asks and of in ("torch.cuda", "torch.backends.mps")
    return False


def branches(source: str) -> set[str]:
    """Qualified names of the functions of a module that ask so; "<module>" outside functions."""
    found = set()

    def walk(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if is_about_a_device(child):
                found.add(".".join(names) or "<module>")
            inner = names
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = (*names, child.name)
            walk(child, inner)

    walk(ast.parse(source), ())
    return found


def product_branches() -> set[str]:
    """file:function of every branch on a device in the product."""
    found = set()
    for path in product_files():
        place = path.relative_to(ROOT)
        if place.parts[0] in TOOLS:
            continue
        names = branches(path.read_text(encoding="utf-8"))
        found |= {f"{place.as_posix()}:{name}" for name in names}
    return found


def covered() -> dict[str, list[str]]:
    """file:function -> the stages that name it."""
    found = {}
    for name, stage in gpu.STAGES.items():
        for place in importlib.import_module(stage.module).COVERS:
            found.setdefault(place, []).append(name)
    return found


def test_every_branch_on_a_devices_type_is_named_by_a_stage_and_no_other_place():
    named = covered().keys() | {*gpu.NEEDS_TWO_GPUS}
    assert product_branches() - named == set(), "a stage must run these: see its COVERS"
    assert named - product_branches() == set(), "no branch here any more: see COVERS"


@pytest.mark.parametrize(
    "line, is_found",
    [
        ("x.device.type == 'cuda'", True),
        ("device.type not in ('cuda', 'cpu')", True),
        ("torch.device(name).type == 'cuda'", True),
        ("x.is_cuda", True),
        ("torch.cuda.is_available()", True),
        ("torch.backends.mps.is_available()", True),
        ("dist.get_backend(group) == 'nccl'", True),
        ("kind == 'cuda'", True),
        ("self.on_gpu", True),
        ("torch.autocast(x.device.type)", False),
        ("cfg.offload == 'cpu'", False),
    ],
)
def test_a_branch_is_found_in_whichever_words(line, is_found):
    source = f"class A:\n    def f(x):\n        y = {line}\n        return y\n"
    assert branches(source) == ({"A.f"} if is_found else set())


# ---- stages --------------------------------------------------------------------------------------
STAGE = """
import json, os, subprocess, sys, time
COVERS = ()
def run(plan):
    plan.emit("First.", what="before", value=1.5)
    {body}
    plan.emit("First.", what="after", ok=True)
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """stages(NAME=BODY, ...): bench.py gpu has these stages, of so many seconds; returns --out."""

    def make(seconds: float = 100, **bodies: str) -> Path:
        table = {}
        for name, body in bodies.items():
            text = STAGE.format(body=textwrap.indent(body, "    ").strip())
            (tmp_path / f"stage_of_{name}.py").write_text(text)
            table[name] = gpu.Stage(f"stage_of_{name}", seconds)
        monkeypatch.setattr(gpu, "STAGES", table)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return tmp_path / "out"

    return make


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Stages run in this process, which is faster; their limits, in a list."""
    limits = []

    def run_group(names: list[str], limit: float, out: Path, words: list[str]) -> None:
        for name in names:
            limits.append(limit)
            row = {"stage": name, "status": "started", "rehearse": "--rehearse" in words}
            gpu.append(out / "gpu.jsonl", row)
            status = gpu.run_one(gpu.STAGES[name].module, name, str(out), *words)
            gpu.append(out / "gpu.jsonl", {"stage": name, "status": "done", "seconds": status})

    monkeypatch.setattr(gpu, "run_group", run_group)
    monkeypatch.syspath_prepend(tmp_path)
    yield limits
    # Another test has another stage of this name.
    for name in [name for name in sys.modules if name.startswith("stage_of_")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def signals():
    """main() sets SIGTERM's handler for its process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run_bench(out: Path, *words: str) -> int:
    return bench.main(["gpu", "--rehearse", f"--out={out}", *words])


@pytest.mark.slow
def test_a_stage_that_fails_or_hangs_leaves_the_others_results(
    stages, tmp_path, capsys, monkeypatch
):
    out = stages(
        fails="raise RuntimeError('planted | fault')",
        hangs=(
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            f"open({str(tmp_path / 'new')!r}, 'w').write(str(child.pid))\n"
            f"os.replace({str(tmp_path / 'new')!r}, {str(tmp_path / 'child')!r})\n"
            "time.sleep(600)"
        ),
        last="print('said', flush=True); plan.emit('First.', what='differs', ok=False)",
    )
    gpu.STAGES["last"] = gpu.STAGES["last"]._replace(beside=True)
    # The time is over when the one that hangs hangs, and the others have ended.
    done = tmp_path / "out" / "gpu.jsonl"
    is_over = (tmp_path / "child").exists
    monkeypatch.setattr(
        gpu,
        "is_over",
        lambda began, limit: is_over() and '"last", "status": "d' in done.read_text(),
    )
    assert run_bench(out) == 1
    rows = gpu.read(out / "gpu.jsonl")
    ends = {row["stage"]: row["status"] for row in rows if "seconds" in row}
    assert list(ends) == ["fails", "last", "hangs"]
    assert ends["fails"] == "failed, status 1" and ends["last"] == "done"
    assert ends["hangs"].startswith("killed after ")
    for name in ends:
        whats = [row.get("what") for row in rows if row["stage"] == name and "table" in row]
        assert whats[0] == "before"
        assert ("after" in whats) == (ends[name] == "done")
    page = (out / "gpu.md").read_text()
    assert "**RuntimeError: planted | fault**" in page and page.count("| before |") == 3
    assert "| differs |" in page and "**no**" in page
    assert "said" in (out / "gpu.log").read_text()
    # The child of the one that hung is gone too (a zombie counts: nobody may have reaped it yet).
    pid = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_limit_is_one_of_the_clock():
    assert gpu.is_over(time.monotonic() - 2, 1.9) and not gpu.is_over(time.monotonic(), 1)


def test_minutes_are_shared_out_and_time_that_a_stage_leaves_is_the_next_ones(stages, here):
    out = stages(one="pass", two="pass", three="pass", four="pass")
    gpu.STAGES["two"] = gpu.STAGES["two"]._replace(beside=True)
    gpu.STAGES["four"] = gpu.STAGES["four"]._replace(seconds=50)
    assert run_bench(out, "--minutes=2.5") == 0
    one, two, three, four = here
    assert 59 < one <= 60 and two == one and 100 < three < 120 and 120 < four < 150
    assert run_bench(out, "--minutes=5", "--stages=four") == 0
    assert 299 < here[-1] <= 300


def test_a_line_that_a_kill_cut_off_costs_only_itself_and_a_new_start_replaces_rows(stages, here):
    out = stages(one="pass", two="pass")
    assert run_bench(out, "--stages=one") == 0
    with open(out / "gpu.jsonl", "a") as file:
        file.write('{"stage": "one", "tab')
    assert run_bench(out, "--stages=two") == 0 and run_bench(out, "--stages=one") == 0
    rows = gpu.read(out / "gpu.jsonl")
    assert [row["stage"] for row in rows if row.get("status") == "done"] == ["one", "two", "one"]
    page = (out / "gpu.md").read_text()
    assert page.count("| before |") == 2 and page.count("## one: done") == 1


def test_what_differs_makes_the_bench_fail_though_all_stages_ended(stages, here):
    out = stages(one="pass", two="plan.emit('First.', what='x', ok=False)")
    assert run_bench(out, "--stages=one") == 0 and run_bench(out, "--stages=two") == 1
    assert "| x |" in (out / "gpu.md").read_text() and "**no**" in (out / "gpu.md").read_text()


def test_every_row_is_on_the_disk_before_the_next_is_measured(monkeypatch, tmp_path):
    synced = []
    real = os.fsync
    monkeypatch.setattr(gpu.os, "fsync", lambda n: (synced.append(n), real(n)))
    gpu.append(tmp_path / "rows", {"a": 1})
    gpu.append(tmp_path / "rows", {"b": 2})
    assert len(synced) == 2 and gpu.read(tmp_path / "rows") == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    "words, says",
    [
        (["--stages=nosuch"], "none of steps"),
        (["--minutes=fast"], "usage"),
        (["--minutes=0"], "type --minutes=5"),
        (["--out=none/there"], "mkdir"),
        (["--out=bench.py"], "is a file"),
        (["--nanogpt=/nowhere"], "has no train.py"),
        (["--nanogpt=.", "--stages=fp8"], "which --stages= leaves out"),
        (["--stage=fp8"], "usage"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(words, says, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert bench.main(["gpu", "--rehearse", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and says in captured.err
    assert not (ROOT / "out-gpu-rehearsal").exists()


def test_a_rehearsal_and_a_gpu_do_not_share_a_folder(stages, here, capsys, monkeypatch):
    out = stages(one="pass")
    assert run_bench(out) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench.main(["gpu", f"--out={out}"]) == 2
    assert "has the results of a rehearsal; type another folder" in capsys.readouterr().err


def test_without_a_gpu_it_says_what_to_type(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["gpu", f"--out={tmp_path / 'out'}"]) == 2
    assert "--rehearse" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_each_stage_says_what_it_measures_and_the_first_three_fit_three_minutes():
    alone = {name: stage for name, stage in gpu.STAGES.items() if not stage.beside}
    assert sum(stage.seconds for stage in alone.values()) == 300
    assert list(gpu.STAGES)[:3] == ["steps", "tests", "gpt2"]
    assert alone["steps"].seconds + alone["gpt2"].seconds <= 180
    for name, stage in gpu.STAGES.items():
        module = importlib.import_module(stage.module)
        assert module.__doc__ and list(inspect.signature(module.run).parameters) == ["plan"]
        assert f"    {name} " in gpu.__doc__ and f" {stage.seconds:g}\n" in gpu.__doc__


def test_differences_are_found(tmp_path):
    rows = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 2, "loss": 1.0, "grad_norm": 4.0}]
    other = [dict(rows[0]), dict(rows[1], grad_norm=5.0)]
    assert common.furthest(rows, rows) == 0 and common.furthest(rows, other) == 0.2
    assert (
        common.furthest(rows[:1], rows)
        == common.furthest([dict(rows[0], loss=None)], rows[:1])
        == float("inf")
    )
    assert common.furthest([], []) == float("inf")
    x = torch.tensor([3.0, 4.0])
    assert common.difference(x * 1.1, x) == pytest.approx(0.1, rel=1e-5)


def test_a_time_is_the_median_without_the_warm_up(monkeypatch):
    durations = iter([9, 9, 1, 2, 30])
    clock = [0.0]

    def work() -> None:
        clock[0] += next(durations)

    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    assert common.milliseconds(work, torch.device("cpu"), seconds=20) == 2000


def plan_of(tmp_path: Path, rows: list, nanogpt: Path | None = None) -> common.Plan:
    def emit(table: str, **cells) -> None:
        rows.append({"table": table, **cells})

    return common.Plan(torch.device("cpu"), True, tmp_path, tmp_path, nanogpt, emit)


NANOGPT = """
import sys
print("step 0: train loss 1.0, val loss 1.0")
for i, ms in enumerate([900, 80, 40, 50, 60, 50]):
    print(f"iter {i}: loss 1.0000, time {ms}.00ms, mfu -100.00%")
print(sys.argv[1:])
{end}
"""


@pytest.mark.parametrize(
    "end", ["", pytest.param("import time; time.sleep(600)", marks=pytest.mark.slow)]
)
def test_nanogpts_own_steps_are_read_also_of_one_that_hangs(end, tmp_path, monkeypatch, capsys):
    clone = tmp_path / "clone"
    for name in gpt2.nanogpt.FILES:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(NANOGPT.replace("{end}", end) if name == "train.py" else "")
    common.write_ids(tmp_path / "ids", 512, 5000)
    monkeypatch.setattr(gpt2, "SECONDS", 2 if end else 60)
    rows = []
    plan = plan_of(tmp_path, rows, clone)
    speed = gpt2.theirs(plan, tmp_path / "ids", common.SIZES["tiny"], 4, 2, 6)
    assert speed == 1000 * 4 * 32 / 50 == rows[0]["tokens_per_s"]
    assert rows[0]["ms"] == 50 and rows[0]["micro"] == 2
    assert "'--gradient_accumulation_steps=2'" in capsys.readouterr().out
    gpt2.beside(plan, "ours", 2 * speed, speed)
    assert rows[1]["ratio"] == 2


def test_the_estimate_is_of_the_fields_it_is_given():
    size = common.SIZES["124M"]
    one, two = (gpt2.predict(size, micro, 1) for micro in (4, 8))
    # With 4 x 1024 tokens 3.451 GB were measured, by storages on a CPU, with the same chunks.
    assert one == pytest.approx(3.451e9, rel=0.05) and 1.2 < two / one < 1.6
    assert gpt2.predict(dict(size, n_layer=24), 4, 1) > 1.4 * one


def test_what_fails_is_a_row_and_the_next_measurement_follows(tmp_path):
    rows = []
    plan = plan_of(tmp_path, rows)
    with common.failing_is_a_row(plan, "T", what="x"):
        raise ValueError("why not")
    assert rows == [{"table": "T", "what": "x", "note": "ValueError: why not", "ok": False}]


FILLED = {  # table of a rehearsal: the least rows
    "The machine.": 10,
    "Precisions: a run on the GPU beside the CPU's.": 8,
    "Compile: a compiled run beside the same one not compiled.": 1,
    "Features: a run with it beside the run without, both on the GPU.": 15,
    "Tests: pytest -m gpu.": 20,
    "GPT-2 124M, bf16.": 4,
    "Profile: the dearest of a step.": 16,
    "FP8: forward and backward of two blocks, not compiled.": 4,
    "FP8: forward and backward of two blocks, compiled.": 2,
    "FP8: the hardware's products beside the emulation's.": 3,
    "Optimizers: a step on the shapes of tiny, float32.": 17,
    "Ring attention: one block of 64 keys, bf16.": 2,
    "Attention: forward and backward, 64 tokens, bf16.": 9,
    "Compile modes: forward, backward and update of two blocks, bf16.": 2,
}


@pytest.mark.slow
def test_a_rehearsal_fills_every_table(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "bench.py", "gpu", "--rehearse", f"--out={tmp_path / 'out'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 180
    rows = gpu.read(tmp_path / "out" / "gpu.jsonl")
    found = collections.Counter(row["table"] for row in rows if "table" in row)
    assert {title: n for title, n in FILLED.items() if found[title] < n} == {}
    for name, stage in gpu.STAGES.items():
        assert gpu.is_fine(gpu.latest(name, rows)), name
        mine = [row["function"] for row in rows if row["stage"] == name and "function" in row]
        assert tuple(mine) == importlib.import_module(stage.module).COVERS
