"""The files of parallel/ alone: each has an example and at most the neighbours it must have, and
run as a program it shows something. (tests/test_copies.py runs the examples from copies.)"""

import ast
import shutil
from pathlib import Path

import pytest
import torch._dynamo  # imported before all forks, or each child spends a second on it
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
from copies import ROOT, example, in_child, neighbours, run_program

FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("parallel/[!_]*.py"))
# What a stranger copies first: each with one neighbour at most.
FIRST = {
    "ddp": {"parallel/replicas.py"},
    "zero": {"parallel/replicas.py"},
    "fsdp": {"parallel/replicas.py"},
    "diloco": {"parallel/replicas.py"},
    "replicas": set(),
    "tensor": set(),
    "sequence": {"parallel/tensor.py"},
    "context": set(),
    "mesh": set(),
}
# Programs of their own; all others run their example, which test_copies.py runs too.
PROGRAMS = ("parallel/pipeline.py", "parallel/watchdog.py")
BY_DEFAULT = (*PROGRAMS, "parallel/timeline.py", "parallel/shard.py")


def doc_of(name: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8")), clean=False)


@pytest.mark.parametrize("name", FILES)
def test_each_file_has_an_example_that_claims_something(name):
    assert "assert " in example(doc_of(name))


@pytest.mark.parametrize("name", FIRST)
def test_a_layout_needs_one_neighbour_at_most(name):
    """test_copies.py holds the line against what is imported."""
    assert neighbours(doc_of(f"parallel/{name}.py")) == FIRST[name]


def others_of(name: str) -> set[str]:
    """Files of ours that are imported anywhere in it, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "torch":
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            paths = [f"{module.replace('.', '/')}.py" for module in modules]
            found |= {path for path in paths if (ROOT / path).is_file()}
    return found


def test_what_is_imported_late_is_said_in_the_docstring():
    """`Neighbours:` names what an import needs; the docstring names what more a feature needs."""
    for name in FILES:
        for other in others_of(name):
            assert Path(other).name in doc_of(name), (name, other)


SOME_OPTIMIZER = """
import tempfile, torch
import torch.distributed as dist, torch.multiprocessing as mp
from parallel.fsdp import FSDP

def train(rank, file):
    dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
    replicas = FSDP(dist.group.WORLD, torch.device("cpu"), blocks="")
    model = replicas.parallelize(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    try:
        replicas.make_optimizer(torch.optim.Adafactor, model.parameters())
    except ImportError as error:
        assert str(error).startswith("Adafactor may need full weights")
        assert "copy adapter.py, owners.py, shard.py and mesh.py into parallel/ too" in str(error)
        raise SystemExit(7)

with tempfile.TemporaryDirectory() as folder:
    try:
        mp.start_processes(train, (f"{folder}/store",), nprocs=2, start_method="fork")
    except mp.ProcessExitedException as ended:
        print("exit code", ended.exit_code)
"""


def test_a_copy_says_what_else_to_copy(tmp_path):
    (tmp_path / "parallel").mkdir()
    for name in ("fsdp", "replicas"):
        shutil.copyfile(ROOT / f"parallel/{name}.py", tmp_path / f"parallel/{name}.py")
    code = compile(SOME_OPTIMIZER, "<a copy>", "exec")
    ended = in_child(tmp_path, lambda: exec(code, {"__name__": "example"}))
    assert ended.out == "exit code 7\n"


@pytest.mark.parametrize(
    "name",
    [n if n in BY_DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in FILES],
)
def test_a_file_run_as_a_program_shows_something(name):
    ended = run_program(name)
    if name == "parallel/watchdog.py":  # it reads the logs of a run
        assert "type python -m parallel.watchdog OUT_DIR" in ended.err and ended.status == 2
    else:
        assert ended.status == 0 and ended.out.strip() and not ended.err
