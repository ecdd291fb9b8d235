"""The tree keeps its shape: lines, functions and folders. `ruff format` and `ruff check` do the
rest."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
PRODUCT = [path for folder in (ROOT, *FOLDERS) for path in sorted(folder.glob("*.py"))]
FILES = [*PRODUCT, *sorted((ROOT / "tests").rglob("*.py"))]
# The one function that is read as a whole: the run, top to bottom.
LONG = {("train.py", "main")}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_line_is_past_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [f"line {i}: {line}" for i, line in enumerate(lines, 1) if len(line) > 100]


def test_the_formatter_is_told_to_look_away_20_times_at_most():
    away = "# fmt: " + "skip", "# fmt: " + "off"
    assert (
        sum(path.read_text(encoding="utf-8").count(mark) for path in FILES for mark in away) <= 20
    )


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_no_function_is_longer_than_80_lines(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert {f: n for f, n in lengths.items() if n > 80 and (name(path), f) not in LONG} == {}


def test_the_root_has_seven_files():
    files = "bench.py model.py monitor.py sample.py schedules.py sweep.py train.py"
    assert sorted(path.name for path in ROOT.glob("*.py")) == files.split()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_says_what_it_is_for_and_nothing_else(folder):
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) and len(tree.body) == 1
