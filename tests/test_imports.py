"""A file of a concept can be copied out: it imports torch, the standard library, one concept beside
it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Who stands where, and who has which gradient: every layout asks.
SHARED = {"parallel.mesh", "parallel.roll_call"}
FOLDERS = ("parallel", "precision", "memory")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_concept_imports_at_most_one_other(path):
    known = {"torch", "matplotlib", *sys.stdlib_module_names}
    others = {n for n in imported(path) if n.split(".")[0] not in known}
    siblings = {n for n in others if n.split(".")[0] == path.parent.name and n not in SHARED}
    assert others - siblings <= (SHARED if path.parent.name == "parallel" else set())
    assert len(siblings) <= 1


def test_only_the_tools_that_run_it_import_train():
    others = [path for folder in ("optim", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    for path in (*ROOT.glob("*.py"), *FILES, *others):
        tools = ("sweep.py", "overhead.py")  # which looks inside a run, in a process of its own
        assert "train" not in imported(path) or path.name in tools, path
