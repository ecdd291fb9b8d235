"""Every command that a reader finds (README, docs, recipes, docstrings) is understood by what it
starts, and README's module map names every file.

A command is read by its own program; where the program's work would begin, Understood is raised.
"""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from optim.attributes import own_classes
from settings import parse

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
PRODUCT = [
    path
    for folder in (ROOT, *FOLDERS)
    for path in sorted(folder.glob("*.py"))
    if path.name != "__init__.py"
]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "experiments" / "README.md"]
# Not bench*.md there: what was typed on a day, with the recipes of that day.
PAGES += sorted((ROOT / "experiments" / "results").glob("[!b]*.md"))
RECIPES = [*sorted((ROOT / "configs").rglob("*.toml")), ROOT / "configs" / "slurm.sh"]
SCRIPTS = [ROOT / "tests" / name for name in ("matrix.py", "partners.py", "faults/plant.py")]
COMMAND = r"(?:python|torchrun|sbatch) +[^\s`][^`]*?"
# What a page writes for something of the reader's own.
PLACEHOLDERS = {
    "NAME,...": "bf16",
    "bench.py NAME": "bench.py optim",
    "experiments.NAME": "experiments.optimizers",
    "configs/MINE.toml": "configs/cpu.toml",
    "my_recipe.toml": "recipe.toml",
    "recipe.toml": "configs/cpu.toml",
    "--field=...": "--lr=0.1",
    "--beside=FOLDER": "--beside=before",
    "--field=value": "--lr=0.1",
    "--step=N": "--step=1",
    "--jobs=N": "--jobs=1",
}


# ---- what is written -----------------------------------------------------------------------------
def lines_of(text: str) -> list[str]:
    """The commands on lines of their own, indented by four. Two blanks end one; a deeper line that
    begins with [-- goes on with it."""
    found, goes_on = [], False
    for line in text.splitlines():
        if goes_on and re.match(r" {8,}\[--", line):
            found[-1] += " " + line.strip()
            continue
        commands = re.findall(rf"(?:^   |  ) ({COMMAND})(?=  |$)", line)
        goes_on = bool(commands) and line.startswith("    ") and line[4] != " "
        found += commands if goes_on else []
    return found


def spans_of(text: str) -> list[str]:
    """The commands between `...`, which may go on over a line's end."""
    return [" ".join(span.split()) for span in re.findall(rf"`({COMMAND})`", text)]


def read(path: Path) -> str:
    """The part of a file that is prose: of code its docstring, of a recipe its comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text), clean=False) or ""
    if path.name == "CHANGELOG.md":  # the first cell of its tables names what is no more
        return re.sub(r"^ *\| .*? \|", "|", text, flags=re.M)
    if path.suffix != ".md":
        return "\n".join(line[2:] for line in text.splitlines() if line.startswith("#"))
    return text


def written() -> dict[str, str]:
    """Command -> a file that names it."""
    found = {}
    for path in (*PAGES, *RECIPES, *PRODUCT, *SCRIPTS):
        text = read(path)
        blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
        plain = re.sub(r"```.*?```", "", text, flags=re.S)
        shell = "\n".join(f"    {line}" for block in blocks for line in block.splitlines())
        shell = shell.replace("pip install -r requirements.txt && ", "")
        for command in (*lines_of(shell), *lines_of(plain), *spans_of(plain)):
            found.setdefault(command, path.relative_to(ROOT).as_posix())
    return found


WRITTEN = written()


def readings(command: str) -> list[list[str]]:
    """Its words: without the options in [], with each of them alone, with each x of --name=x|y."""
    for name, value in PLACEHOLDERS.items():
        command = command.replace(name, value)
    bare = re.sub(r"\[[^\[\]]*\]", "", command.replace("\\|", "|"))
    options = [option for option in re.findall(r"\[([^\[\]]*)\]", command) if option != "..."]
    found = []
    for text in (bare, *(f"{bare} {option}" for option in options)):
        cases = [[]]
        for word in shlex.split(text.replace(" ...", "")):
            name, equals, values = word.partition("=")
            values = values.split("|") if equals else [None]
            words = [name + equals + (value or "") for value in values]
            cases = [[*case, word] for case in cases for word in words]
        found += cases
    return found


# ---- how it is read ------------------------------------------------------------------------------
class Understood(BaseException):
    """The work would begin here."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which the placeholders are there: our recipes, and clones of nanoGPT."""
    from benchmarks import nanogpt

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for clone in ("CLONE", "DIR", "nanoGPT"):
        for name in ("train.py", *nanogpt.FILES):
            (tmp_path / clone / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / clone / name).touch()
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "optim").symlink_to(ROOT / "optim")
    (tmp_path / "before" / "train.py").touch()
    (tmp_path / "map.toml").write_text('[names]\n"model.*" = "*"\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # bench.py optim --threads=2
    return monkeypatch


def reads(place, main, words: list[str], *work: str) -> None:
    """main(words) gets as far as one of the functions `work`, named "module:function"."""

    def begin(*_, **__):
        raise Understood

    for name in work:
        module, _, function = name.partition(":")
        place.setattr(importlib.import_module(module), function, begin)
    with pytest.raises(Understood):
        main(words)


# Where the work of a program begins, once its words are understood.
BENCHES = {
    "optim": "benchmarks.optimizers:optim",
    "train": "benchmarks.training:measure",
    "speedrun": "data.corpora:load",
    "scaling": "benchmarks.runs:run",
    "overhead": "benchmarks.overhead:start",
    "job": "benchmarks.job:once",
    "step": "benchmarks.step:run",
    "nanogpt": "data.corpora:load",
    "spread": "torch.multiprocessing:spawn",
    "memory": "benchmarks.memory:row",
    "layouts": "benchmarks.layouts:measure",
    "experts": "benchmarks.experts:in_a_process",
    "checkpoint": "torch.multiprocessing:spawn",
    "scale": "benchmarks.scale:measure",
    "network": "parallel.launch:pick_device",
    "pipeline": "parallel.launch:start",
    "all": "benchmarks.all:section",
    "gpu": "benchmarks.gpu:take_folder",
}
TOOLS = {
    "sample": ["sample:load"],
    "sweep": ["search.folder:in_order"],
    "data.prepare": ["data.prepare:prepare"],
    "metrics.experts": ["metrics.experts:draw"],
    "metrics.plot": ["metrics.plot:plot", "metrics.plot:to_csv"],
    "metrics.report": ["metrics.report:build"],
    "benchmarks.scale_save": ["benchmarks.scale_save:save"],
    "checkpoint.__main__": ["checkpoint.__main__:found", "checkpoint.__main__:resolve"],
    "parallel.watchdog": ["parallel.watchdog:report"],
    "precision.histogram": ["precision.histogram:read"],
    "experiments.all": ["subprocess:run", "experiments.all:index"],
    "parity.__main__": ["parity.__main__:compare", "parity.__main__:record_both"],
}


def understood(place, words: list[str]) -> None:
    """AssertionError, ValueError, SystemExit or pytest's failure where they are not."""
    program, *words = words
    if program == "torchrun":
        words = [word + "1" if word.endswith("=") else word for word in words]
        if all(word.startswith("-") for word in words):  # its options alone
            words.append("train.py")
        launch = get_args_parser().parse_args(words)
        program = ["-m", launch.training_script] if launch.module else [launch.training_script]
        return understood(place, ["python", *program, *launch.training_script_args])
    if program == "sbatch":
        words = [word for word in words if not word.startswith("--nodes=")]
        assert (ROOT / words[0]).is_file(), words[0]
        return understood(place, ["python", "train.py", *words[1:]])
    assert program == "python"
    if words[0] == "-m" and words[1] == "pytest":
        assert all((ROOT / word).exists() for word in words[2:] if word.startswith("tests/"))
        return
    name, words = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    path = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
    path = path if path.is_file() else path.with_suffix("") / "__main__.py"
    assert path.is_file() and (path in PRODUCT or path in SCRIPTS), f"there is no {name}"
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if words == ["--help"]:
        assert "--help" in path.read_text(encoding="utf-8") or module in ("train", "sample")
    elif module == "train":
        parse.parse(words)
    elif module == "bench":
        main = importlib.import_module("bench").main
        place.setattr(torch.cuda, "is_available", lambda: True)  # as bench.py gpu wants it
        if words[1:] != ["--help"]:
            reads(place, main, words, BENCHES.get(words[0], "bench:main"))
        else:
            assert words[0] in BENCHES
    elif module == "parity.__main__" and not words:
        return  # its name, in a sentence
    elif module in TOOLS:
        reads(place, importlib.import_module(module).main, words, *TOOLS[module])
    elif module in ("memory.plan", "memory.estimate"):
        assert (module, words) == ("memory.plan", ["runs"]) or importlib.import_module(
            module
        ).parse(words)
    elif module == "memory.known":
        assert not words and importlib.import_module(module).listing(words)
    elif module == "parallel.pipeline":
        assert importlib.import_module(module).main(words)
    elif module.startswith("examples."):
        # Those beside the parity oracle take the layouts or models to record.
        assert len(words) <= 1 or module.startswith("examples.parity_")
    elif module.startswith("experiments."):
        from experiments import claims, protocol

        if any(word.startswith("--data=") for word in words):
            own = importlib.import_module(module)
            assert claims.read(path.stem, words, [], own.candidate)
            return
        place.setattr(sys, "argv", [f"{name}.py", *words])
        arguments = ("", f"{name}.py", [], [], None, None, None, None)
        reads(place, lambda _: protocol.main(*arguments), words, "run.control:RunLock")
    else:
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert path in SCRIPTS and all(f'"{name}' in path.read_text() for name in options)


# ---- the tests -----------------------------------------------------------------------------------
@pytest.mark.parametrize("command", WRITTEN, ids=lambda command: f"{WRITTEN[command]}: {command}")
def test_a_written_command_is_understood(command, place):
    for words in readings(command):
        understood(place, words)


@pytest.mark.parametrize(
    "command",
    [
        "python config.py --help",
        "python logger.py plot RUN",
        "python -m metrics.logger plot RUN",
        "python -m checkpoint exports RUN OUT.safetensors",
        "python train.py --zero=1",
        "python bench.py jobs",
        "python bench.py job --rounds=3",
        "python bench.py train --only=bf17",
        "torchrun --nnode=2 --nproc=2 train.py",
        "torchrun --standalone --nproc_per_node=4 bench.py network --tq=2",
        "torchrun --nnodes=2 faults.py OUT_DIR",
        "python -m memory.plan --parms=7e9",
        "python -m memory.estimate --params=7B --gpu=64",
        "python -m parallel.pipeline --schedule=2f2b",
        "python -m experiments.z_loss --fast",
        "python -m experiments.z_losses",
        "python -m experiments.optimizers --data=FILE --optims=muon,adamo",
        "python -m experiments.moe --data=FILE --optims=muon,adamw",
        "python sample.py RUN --length=3",
        "python sweep.py DIR --search.lr=grid:1:2",
        "sbatch slurm.sh configs/gpt2_124m.toml",
        "python tests/matrix.py --dtype=fp32",
    ],
)
def test_a_stale_command_is_found(command, place):
    wrong = (AssertionError, ValueError, KeyError, SystemExit, pytest.fail.Exception)
    with pytest.raises(wrong):
        understood(place, shlex.split(command))


def test_commands_are_found_wherever_they_stand():
    """The net itself: a line of a docstring with its continuation, a span over two lines, a block,
    a recipe's comment, a row of a table."""
    ends = [
        "bench.py network [--tp=2] [--cp=1] [--pp=1] [--device=auto] [--sizes=1e5,1e8] [--quick]",
        "python bench.py speedrun --recipe=configs/MINE.toml --runs=5",
        "python train.py configs/nanogpt_cpu.toml --data=my_text.txt",
        "torchrun --standalone --nproc_per_node=8 train.py configs/gpt2_124m.toml",
        "python -m parallel.pipeline --schedule=1f1b --pp=4",
        "python -m experiments.NAME --quick",
    ]
    for end in ends:
        assert any(command.endswith(end) for command in WRITTEN), end


def quick(command: str) -> bool:
    return command.endswith("--help") or "parallel.pipeline --schedule=1f1b" in command


@pytest.mark.parametrize(
    "command",
    [
        command if quick(command) else pytest.param(command, marks=pytest.mark.slow)
        for command in WRITTEN
        if quick(command) or re.match(r"python -m memory\.", command)
    ],
)
def test_a_written_command_runs(command, tmp_path):
    for words in readings(command):
        run = [sys.executable, *words[1:]]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


# ---- the map -------------------------------------------------------------------------------------
def test_the_module_map_names_every_file_once():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text.split("## Module map")[1].split("\n## ")[0]
    cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    named = [name for cell in cells for name in re.findall(r"`([\w/]+\.py)`", cell)]
    # `optim/*.py` stands for every optimizer: a new one is one file.
    optimizers = {f"optim/{name.split('.')[0]}.py" for name in own_classes()}
    assert "`optim/*.py`" in text
    ours = {path.relative_to(ROOT).as_posix() for path in PRODUCT} - optimizers
    assert sorted(named) == sorted(ours)
    assert [f"{folder.name}/" for folder in FOLDERS] == sorted(re.findall(r"\*\*(\w+/)\*\*", text))
