"""bench.py gpu: every branch on a device's type has a stage, a stage that fails or hangs costs no
other one its results, and a rehearsal on a CPU fills every table."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import bench
from benchmarks import gpu
from benchmarks.stages import plan as common

ROOT = Path(__file__).parent.parent
TOOLS = {"tests", "benchmarks", "experiments", "examples", "findings", "search"}


# ---- branches on a device ------------------------------------------------------------------------
def is_about_a_device(node: ast.AST) -> bool:
    """Does this expression ask of what kind a device is?

    x.device.type == "cuda", device.type in (...), x.is_cuda, torch.cuda.is_available() and its
    like, torch.backends.mps.is_available(), get_backend(...) == "nccl".
    """
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        types = [side for side in sides if isinstance(side, ast.Attribute) and side.attr == "type"]
        calls = [side.func for side in sides if isinstance(side, ast.Call)]
        backends = [f for f in calls if isinstance(f, ast.Attribute) and f.attr == "get_backend"]
        return bool(types or backends)
    if isinstance(node, ast.Attribute):
        return node.attr in ("is_cuda", "is_mps", "is_cpu")
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
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT)
        if place.parts[0] in TOOLS or place.parts[0].startswith("."):
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

    def make(seconds: float = 12, **bodies: str) -> Path:
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
    """Stages run in this process, which is faster, with their limits in a list."""
    limits = []

    def run_stage(name: str, limit: float, out: Path, words: list[str]) -> None:
        limits.append(limit)
        gpu.append(out / "gpu.jsonl", {"stage": name, "status": "started"})
        module = gpu.STAGES[name].module
        status = gpu.run_one(module, name, str(out), *words)
        gpu.append(out / "gpu.jsonl", {"stage": name, "status": "done", "seconds": status})

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    monkeypatch.syspath_prepend(tmp_path)
    return limits


def run_bench(out: Path, *words: str) -> int:
    return bench.main(["gpu", "--rehearse", f"--out={out}", *words])


def test_a_stage_that_fails_or_hangs_leaves_the_others_results(stages, tmp_path, capsys):
    out = stages(
        fails="raise RuntimeError('planted | fault')",
        hangs=(
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
            "time.sleep(600)"
        ),
        last="print('said', flush=True); plan.emit('First.', what='differs', ok=False)",
    )
    gpu.STAGES["hangs"] = gpu.STAGES["hangs"]._replace(seconds=0)  # what `fails` has left
    assert run_bench(out) == 1
    rows = gpu.read(out / "gpu.jsonl")
    ends = {row["stage"]: row["status"] for row in rows if "seconds" in row}
    assert list(ends) == ["fails", "hangs", "last"]
    assert ends["fails"] == "failed, status 1" and ends["last"] == "done"
    assert ends["hangs"].startswith("killed after ")
    for name in ends:
        whats = [row.get("what") for row in rows if row["stage"] == name and "table" in row]
        assert whats[0] == "before"
        assert ("after" in whats) == (ends[name] == "done")
    page = (out / "gpu.md").read_text()
    assert "**RuntimeError: planted | fault**" in page and page.count("| before |") == 3
    assert "said" in (out / "gpu.log").read_text()
    # The child of the one that hung is gone too (a zombie counts: nobody may have reaped it yet).
    pid = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_time_that_a_stage_leaves_is_the_next_ones_and_minutes_scale_all(stages, here):
    out = stages(seconds=50, one="pass", two="pass")
    assert run_bench(out, "--minutes=2.5") == 0
    one, two = here
    assert 24 < one <= 25 and 40 < two < 50


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


def test_every_row_is_on_the_disk_before_the_next_is_measured(monkeypatch, tmp_path):
    synced = []
    real = os.fsync
    monkeypatch.setattr(gpu.os, "fsync", lambda n: (synced.append(n), real(n)))
    gpu.append(tmp_path / "rows", {"a": 1})
    gpu.append(tmp_path / "rows", {"b": 2})
    assert len(synced) == 2 and gpu.read(tmp_path / "rows") == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    "words",
    ["--stages=nosuch", "--minutes=fast", "--out=none/there", "--nanogpt=/nowhere", "--stage=fp8"],
)
def test_a_mistake_is_one_line_and_exit_2(words, capsys, tmp_path):
    assert bench.main(["gpu", "--rehearse", f"--out={tmp_path}", words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1


def test_without_a_gpu_it_says_what_to_type(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["gpu", f"--out={tmp_path / 'out'}"]) == 2
    assert "--rehearse" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_each_stage_says_what_it_measures_and_the_first_three_fit_three_minutes():
    assert sum(stage.seconds for stage in gpu.STAGES.values()) == 300
    assert sum(stage.seconds for stage in list(gpu.STAGES.values())[:3]) <= 180
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
    x = torch.tensor([3.0, 4.0])
    assert common.difference(x * 1.1, x) == pytest.approx(0.1, rel=1e-5)


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
    for name in gpu.STAGES:
        mine = gpu.latest(name, rows)
        assert gpu.is_fine(mine), mine
        assert sum("table" in row for row in mine) > 0, name
    json.dumps(rows)
