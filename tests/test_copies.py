"""Each file of a concept works copied into an empty folder, with the neighbours that it names; and
as a program it shows something."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  optimizers import it, in a second: once, before all forks
from copies import ROOT, example, neighbours, run_copy, run_program

FOLDERS = ("optim", "hooks", "precision", "memory", "layers")
# Programs that take words, and without them say which.
COMMANDS = ("memory/estimate.py", "memory/plan.py", "precision/histogram.py")


def doc_of(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""


def concepts() -> list[str]:
    """Of parallel/ the files that have an example, of the other folders all."""
    paths = [ROOT / "monitor.py", ROOT / "schedules.py"]
    for folder in FOLDERS:
        paths += sorted((ROOT / folder).glob("[!_]*.py"))
    paths += [p for p in sorted((ROOT / "parallel").glob("*.py")) if example(doc_of(p))]
    return [path.relative_to(ROOT).as_posix() for path in paths]


CONCEPTS = concepts()


# ---- copied --------------------------------------------------------------------------------------
def check_copy(root: Path, name: str, folder: Path) -> None:
    doc = doc_of(root / name)
    code = example(doc)
    assert code, f"{name} has no example"
    ended = run_copy(root, name, doc, folder)
    assert ended.loaded == {name, *neighbours(doc)}, f"Neighbours of {name}"
    assert ended.out or "assert " in code, f"the example of {name} claims nothing"


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_copied_file_runs_its_example(name, tmp_path):
    check_copy(ROOT, name, tmp_path)


def plant(root: Path, head: str, code: str = "from optim.mine import x\nassert x == 1") -> None:
    """optim/mine.py with this head and example, and optim/other.py beside it."""
    (root / "optim").mkdir(parents=True)
    (root / "optim" / "other.py").write_text("x = 1\n")
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    head, _, imports = head.partition("|")
    text = f'"""Mine.\n{head}\nExample:\n{lines}"""\n{imports}\nx = 1\n'
    (root / "optim" / "mine.py").write_text(text)


NEIGHBOUR = "\nNeighbours: optim/other.py\n|from optim import other"


@pytest.mark.parametrize("head", ["", NEIGHBOUR])
def test_a_planted_file_passes(head, tmp_path):
    plant(tmp_path / "root", head)
    check_copy(tmp_path / "root", "optim/mine.py", tmp_path / "copy")


@pytest.mark.parametrize(
    "head, code, says",
    [
        ("", "", "has no example"),
        ("", "from optim.mine import x", "claims nothing"),
        ("", "from optim.mine import x\nassert x == 2", "assert x == 2"),
        ("", "import optim.mine, optim.other\nassert 1", "No module named 'optim.other'"),
        ("|import optim.other", "import optim.mine\nassert 1", "No module named 'optim.other'"),
        ("|from optim import other", "import optim.mine\nassert 1", "cannot import name 'other'"),
        (NEIGHBOUR.split("|")[0], "import optim.mine\nassert 1", "Neighbours of optim/mine.py"),
        ("", "import math\nassert 1", "Neighbours of optim/mine.py"),  # it does not use the file
        ("", "from optim.mine import x\nimport schedules\nassert 1", "No module named 'schedules'"),
        ("", "import optim.mine, harness\nassert 1", "No module named 'harness'"),
    ],
)
def test_each_breach_is_found(head, code, says, tmp_path):
    plant(tmp_path / "root", head, code)
    with pytest.raises(AssertionError) as caught:
        check_copy(tmp_path / "root", "optim/mine.py", tmp_path / "copy")
    assert says in str(caught.value)


def test_what_the_two_forms_are():
    doc = (
        "A.\n\nNeighbours: a.py, optim/b.py,\nc.py\n\nExample:\n    x = 1\n\n    y = 2\nEnd.\n    z"
    )
    assert neighbours(doc) == {"a.py", "optim/b.py", "c.py"}
    assert example(doc) == "x = 1\n\ny = 2"
    assert (neighbours("No line."), example("For Example:\n    x = 1")) == (set(), "")


# ---- run -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [n for n in CONCEPTS if not n.startswith("parallel/")])
def test_a_file_run_as_a_program_shows_something(name):
    ended = run_program(name)
    if name in COMMANDS:
        assert ended.status == 2 and "--" in ended.err
    else:
        assert ended.status == 0 and ended.out.strip() and not ended.err


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CONCEPTS if not n.startswith("parallel/")])
def test_a_file_started_as_a_program_shows_something(name):
    words = [name] if "/" not in name else ["-m", name.removesuffix(".py").replace("/", ".")]
    command = [sys.executable, *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert ended.returncode == (2 if name in COMMANDS else 0), ended.stderr
    assert ended.stdout.strip() or name in COMMANDS
