"""Who may import whom. A file imports from its own room and from rooms further left:

    schedules  <  settings                                       a run's settings, no torch
               <  optim hooks precision memory layers data parallel    what computes a step
               <  checkpoint metrics                             what keeps it, what looks
               <  model monitor                                  concepts at the root
               <  run                                            concepts from settings
               <  train sample sweep bench, search benchmarks experiments examples parity,
                  memory/plan and estimate, __main__

The rooms between settings and run are concepts. A concept takes plain arguments: it imports no
settings, and from another room only what CROSSINGS lists. In the folders of ALONE a file can be
copied out: it imports torch, the standard library, and one file beside it. What stands under
`if __name__ == "__main__"` is a command, which may import metrics.outlets everywhere.
"""

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = [
    {"schedules"},
    {"settings"},
    {"optim", "hooks", "precision", "memory", "layers", "data", "parallel"},
    {"checkpoint", "metrics"},
    {"model", "monitor"},
    {"run"},
    {"train", "sample", "sweep", "bench"}
    | {"search", "benchmarks", "experiments", "examples", "parity"},
]
CONCEPTS = set().union(*ROOMS[2:5])
# In the folder of a concept: commands, and what only they use. They bring concepts together.
TOOLS = {"checkpoint.__main__"} | {
    f"memory.{name}" for name in "estimate largest plan layouts predict claims".split()
}
FOLDERS = {room for rooms in ROOMS for room in rooms if (ROOT / room).is_dir()}
AT_ROOT = {"train", "model", "schedules", "monitor", "sample", "sweep", "bench"}

# Concepts that need one of another room: importer -> {imported: why}.
CROSSINGS = {
    "checkpoint.load": {"parallel.shard": "which part of a tensor to read"},
    "checkpoint.pretrained": {"parallel.shard": "which part of a tensor to read"},
    "checkpoint.slices": {"parallel.shard": "which part of a tensor is here"},
    "checkpoint.state": {
        "optim.param_groups": "optimizer state by the names of parameters",
        "parallel.mesh": "norms and steps over all ranks",
        "parallel.protocol": "what a layout has",
        "parallel.shard": "which part of a split matrix is here",
    },
    "memory.activations": {"precision.amp": "bytes of a number"},
    "memory.ranks": {
        "optim.attributes": "how many numbers an optimizer remembers",
        "optim.muon": "how many numbers it steps at once",
        "parallel.replicas": "which rank owns which parameter",
        "precision.amp": "bytes of a number",
    },
    "memory.shapes": {"precision.amp": "bytes of a number"},
    "metrics.watch": {
        "optim.qk_clip": "the largest attention logits",
        "parallel.context": "where this rank's tokens lie in the sequence",
        "parallel.mesh": "sums and maxima over all ranks",
        "parallel.tensor": "a sum over the ranks that share a head's words",
    },
    "model": {
        "layers.attention": "the kernel",
        "layers.document_mask": "what hides other documents",
        "layers.fewer_passes": "norms, QK-norm, squared ReLU, SwiGLU",
        "layers.moe": "experts in place of the MLP",
        "layers.rope_scaling": "frequencies for longer sequences",
        "layers.recompute": "what backward computes again",
        "layers.chunked_loss": "the head and its loss over some tokens at a time",
        "layers.ngram_embedding": "what n-grams add to the embedding",
    },
    "parallel.expert": {"layers.moe": "the order of rows by expert"},
    "monitor": {"checkpoint.snapshots": "what a rollback goes back to"},
}
# What each layout asks: who is where, who has which gradient, how memory is taken. And what each
# estimate of memory counts: a model's parameters, and bytes of a number.
SHARED = {f"parallel.{name}" for name in "mesh replicas shard protocol".split()}
SHARED |= {"memory.shapes"}
ALONE = ("optim", "hooks", "parallel", "precision", "memory", "layers")


def sources(root: Path) -> dict[str, str]:
    """Module -> its text: all Python at the root and in folders of product code and tools."""
    paths = [
        *root.glob("*.py"),
        *(path for room in sorted(FOLDERS) for path in (root / room).rglob("*.py")),
    ]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in paths
    }


def imported(text: str) -> set[str]:
    """Every name that could be a module: for `from a import b` both a and a.b."""
    names = set()
    tree = ast.parse(text)
    ends_well = ast.parse("from metrics.outlets import command").body[0]
    for block in tree.body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "__name__ == '__main__'":
            block.body = [x for x in block.body if ast.dump(x) != ast.dump(ends_well)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (node.module or "")
            names |= {package, *(f"{package}.{alias.name}" for alias in node.names)}
    return names


FILES = sources(ROOT)
IMPORTS = {name: imported(text) for name, text in FILES.items()}  # ours and others
OURS = {name: names & FILES.keys() for name, names in IMPORTS.items()}


def is_tool(name: str) -> bool:
    return name in TOOLS or name.split(".")[0] in ROOMS[-1]


def level(name: str) -> int:
    if is_tool(name):
        return len(ROOMS) - 1
    return next(i for i, rooms in enumerate(ROOMS) if name.split(".")[0] in rooms)


def is_concept(name: str) -> bool:
    return name.split(".")[0] in CONCEPTS and not is_tool(name)


def complaints(imports: dict[str, set[str]], crossings: dict = CROSSINGS) -> list[str]:
    """What breaks the rule, a sentence each."""
    found = []
    for name, others in imports.items():
        for other in sorted(others):
            if level(other) > level(name):
                found.append(f"{name} imports {other}, a room further right")
            elif is_concept(name) and other.split(".")[0] == "settings":
                found.append(f"{name} imports {other}; give it plain arguments")
            elif is_concept(name) and is_concept(other):
                same_room = name.split(".")[0] == other.split(".")[0]
                if not same_room and other not in crossings.get(name, {}):
                    found.append(
                        f"{name} imports {other} of another room; is CROSSINGS to have it?"
                    )
    for name, reasons in crossings.items():
        for other in reasons.keys() - imports.get(name, set()):
            found.append(f"{name} no longer imports {other}; take it out of CROSSINGS")
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        found.append(f"a circle: {' -> '.join(error.args[1])}")
    return found


def test_nobody_imports_further_right_or_in_a_circle_and_settings_stop_at_run():
    assert complaints(OURS) == []


def planted_line(name: str, line: str) -> dict[str, set[str]]:
    """OURS, if this file began with this line."""
    return OURS | {name: imported(f"{line}\n{FILES[name]}") & FILES.keys()}


@pytest.mark.parametrize(
    "name, line, says",
    [
        ("layers.attention", "import settings.fields", "layers.attention imports settings.fields"),
        ("optim.muon", "from settings import parse", "optim.muon imports settings.parse"),
        ("monitor", "from settings.checks import divisor", "monitor imports settings.checks"),
        ("memory.ranks", "import settings.parse", "memory.ranks imports settings.parse"),
        ("checkpoint.slices", "from checkpoint import load", "a circle: "),
        ("settings.fields", "import settings.parse", "a circle: "),
        ("data.cursor", "from checkpoint import load", "data.cursor imports checkpoint.load, a"),
        ("model", "import train", "model imports train, a room further right"),
        ("run.build", "from search import trials", "run.build imports search.trials, a room"),
        ("settings.checks", "import data.files", "settings.checks imports data.files, a room"),
        ("schedules", "import settings.fields", "schedules imports settings.fields, a room"),
        ("parallel.watchdog", "from metrics.outlets import command", "metrics.outlets, a room"),
        ("layers.compile", "def f():\n    import optim.sgd", "layers.compile imports optim.sgd of"),
    ],
)
def test_each_breach_is_named(name, line, says):
    assert any(says in x for x in complaints(planted_line(name, line)))


def test_tools_may_import_settings_and_a_crossing_that_is_no_more_is_named():
    for name in ("memory.plan", "checkpoint.__main__", "run.batch", "sample", "experiments.all"):
        assert complaints(planted_line(name, "import settings.parse")) == []
    gone = CROSSINGS | {"optim.sgd": {"parallel.mesh": "no longer"}}
    assert complaints(OURS, gone) == [
        "optim.sgd no longer imports parallel.mesh; take it out of CROSSINGS"
    ]


@pytest.mark.parametrize("name", [n for n in sorted(FILES) if n.split(".")[0] in ALONE])
def test_a_concept_imports_at_most_one_other(name):
    if is_tool(name):
        return
    siblings = [n for n in OURS[name] - SHARED if n.split(".")[0] == name.split(".")[0]]
    assert len(siblings) <= 1
    known = {"torch", "numpy", "matplotlib", *sys.stdlib_module_names, *FOLDERS, *AT_ROOT}
    assert {imported.split(".")[0] for imported in IMPORTS[name]} <= known


def test_only_the_tools_that_run_it_import_train():
    found = {name for name, others in OURS.items() if "train" in others}
    experiments = {name for name in found if name.startswith("experiments.")}
    # They look inside a run, in processes of their own.
    assert found - experiments == {
        "benchmarks.overhead",
        "benchmarks.scale",
        "benchmarks.stages.common",
        "parity.ours",
    }


def test_seven_files_stand_at_the_root_and_each_folder_says_what_it_holds():
    assert {path.stem for path in ROOT.glob("*.py")} == AT_ROOT
    for folder in FOLDERS:
        tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) and len(tree.body) == 1, folder
    python = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("[!.]*/**/*.py")}
    assert python == FOLDERS | {"tests"}  # no folder outside the rooms


def test_settings_need_no_torch():
    names = [f"settings.{path.stem}" for path in (ROOT / "settings").glob("[!_]*.py")]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert (
        len(names) >= 4 and subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    )


def test_a_run_imports_little_beyond_torch(tmp_path):
    """Each start pays for what is imported: the compiler takes a second, DTensors half of one."""
    code = (
        "import sys, torch; before = {*sys.modules}; import train; from settings import parse; "
        "train.main(parse.parse(sys.argv[1:])); print('new', *{*sys.modules} - before)"
    )
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 400)
    tiny = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=2 --steps=2"
    words = [f"--data={tmp_path}/text.txt", f"--out_dir={tmp_path}/run", "--plot=false"]
    done = start(tmp_path, "-c", code, *tiny.split(), *words)
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()[-1].split()[1:]
    ours = {path.stem for path in ROOT.glob("*.py")} | FOLDERS
    others = [name for name in found if name.split(".")[0] not in ours | sys.stdlib_module_names]
    assert {name.split(".")[0] for name in others} <= {"safetensors", "torch"}
    # In torch's own modules two small ones; the compiler, DTensors and FSDP are dozens each.
    assert len([name for name in others if name.startswith("torch.")]) < 8, others
    assert "run.evaluate" in found  # it has looked


# ---- installed packages of the same names --------------------------------------------------------
def start(where: Path, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(where), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def planted(tmp_path):
    """A folder of installed packages that have our folders' names and end whoever imports them."""
    for room in FOLDERS:
        (tmp_path / "site" / room).mkdir(parents=True)
        code = f"raise SystemExit('the installed {room}')\n"
        (tmp_path / "site" / room / "__init__.py").write_text(code)
    return tmp_path / "site"


def test_a_planted_package_would_be_found_if_ours_were_not_there(planted, tmp_path):
    """Where a folder has no __init__.py, a regular package later in the path wins."""
    (tmp_path / "bare" / "data").mkdir(parents=True)
    (tmp_path / "bare" / "a.py").write_text("import data.corpora\n")
    (tmp_path / "bare" / "data" / "corpora.py").write_text("")
    assert "the installed data" in start(planted, str(tmp_path / "bare" / "a.py")).stderr
    (tmp_path / "bare" / "data" / "__init__.py").write_text("")
    assert start(planted, str(tmp_path / "bare" / "a.py")).returncode == 0


@pytest.mark.parametrize(
    "words, says",
    [
        (["train.py", "--help"], "--on_spike"),
        pytest.param(["sweep.py", "--help"], "--search.FIELD", marks=pytest.mark.slow),
        pytest.param(["sample.py", "--help"], "--prompt", marks=pytest.mark.slow),
        pytest.param(["-m", "memory.plan", "--help"], "memory.plan", marks=pytest.mark.slow),
        pytest.param(
            ["-m", "torch.distributed.run", "--nproc_per_node=1", "train.py", "--help"],
            "--on_spike",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_our_folders_win_over_installed_packages(planted, words, says):
    ended = start(planted, *words)
    assert ended.returncode == 0 and says in ended.stdout, ended.stderr


@pytest.mark.slow
def test_our_folders_win_from_any_folder_and_as_modules(planted, tmp_path):
    ended = start(planted, str(ROOT / "train.py"), "--help", cwd=tmp_path)
    assert ended.returncode == 0 and "--on_spike" in ended.stdout, ended.stderr
    for words in (["checkpoint", "list"], ["metrics.plot"]):  # both miss a run there
        ended = start(planted, "-m", *words, str(tmp_path))
        assert ended.returncode == 2 and str(tmp_path) in ended.stderr, ended.stderr
