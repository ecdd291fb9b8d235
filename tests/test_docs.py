"""docs/ and CONTRIBUTING.md are true: diffs apply and train, snippets run, and every field, event,
word, file and link is there."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from harness import run_ranks

import train
from checkpoint import load
from metrics.logger import read_metrics
from monitor import Aborted
from settings import parse

ROOT = Path(__file__).parent.parent
ROOMS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
OURS = ROOMS | {path.stem for path in ROOT.glob("*.py")}  # modules, and folders of modules
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "batch_size": 8,
    "steps": 3,
    "warmup_steps": 0,
    "eval_every": 3,
    "eval_tokens": 512,
    "sample_tokens": 0,
    "plot": "false",
    "async_save": "false",
    "precision": "fp64",
    "device": "cpu",
}


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def sections(text: str) -> dict[str, str]:
    """{heading: what stands below it}, for headings of the second level."""
    parts = re.split(r"^## (.+)\n", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def table(text: str) -> list[list[str]]:
    """The cells of each row of the tables in a text, without their heads."""
    found = []
    lines = text.splitlines()
    for above, line in zip(["", *lines], lines):
        is_rule = line.startswith("|---")
        if is_rule and found:
            found.pop()  # the head
        elif line.startswith("| ") and not is_rule:
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            found.append([cell.strip() for cell in cells])
    return found


def quoted(text: str) -> list[str]:
    """What stands between backticks, outside of blocks of code."""
    return re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def words(**fields) -> list[str]:
    return [f"--{name}={value}" for name, value in (TINY | fields).items()]


# ---- CONTRIBUTING.md -----------------------------------------------------------------------------
ADDITIONS = {
    heading: (re.search(r"```diff\n(.+?)```", text, re.S)[1], text.rsplit("```bash\n")[-1])
    for heading, text in sections(page("CONTRIBUTING.md")).items()
    if "```diff" in text
}


def apply(diff: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = ["git", "apply", *options, "-"]
    # A git hook sets variables that point to another repository.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(command, cwd=folder, input=diff, text=True, capture_output=True, env=env)


def files_of(diff: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.+)$", diff, re.M)


def flags_of(heading: str) -> list[str]:
    """The flags of the train.py command below a diff."""
    command = ADDITIONS[heading][1].partition("\n")[0]
    return command.split("train.py ")[1].split()


@pytest.mark.parametrize("heading", ADDITIONS)
def test_each_diff_applies_to_this_tree(heading):
    done = apply(ADDITIONS[heading][0], ROOT, "--check")
    assert done.returncode == 0, f"{done.stderr}make this diff of CONTRIBUTING.md anew"


def test_a_diff_that_does_not_fit_is_found():
    diff = ADDITIONS["A schedule"][0]
    assert apply(diff.replace(" def constant(", " def constants("), ROOT, "--check").returncode


def test_the_table_counts_the_files_of_each_diff():
    rows = table(page("CONTRIBUTING.md").split("\n## ")[0])
    said = {re.search(r"\(#(.+)\)", what)[1]: int(n) for what, n, _ in rows}
    assert said == {
        heading.lower().replace(" ", "-"): len(files_of(diff))
        for heading, (diff, _) in ADDITIONS.items()
    }


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A copy of the tree with all diffs applied."""
    copy = tmp_path_factory.mktemp("patched")
    for path in ROOT.glob("[!.]*.*"):
        if path.is_file():
            shutil.copy(path, copy)
    for room in ROOMS:
        shutil.copytree(
            ROOT / room, copy / room, ignore=shutil.ignore_patterns("results", "__pycache__")
        )
    for heading, (diff, _) in ADDITIONS.items():
        done = apply(diff, copy)
        assert done.returncode == 0, (heading, done.stderr)
    return copy


def test_the_diffs_are_formatted(patched):
    files = sorted(
        {name for diff, _ in ADDITIONS.values() for name in files_of(diff)} - {"README.md"}
    )
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files],
            cwd=patched,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def enter(copy: Path) -> None:
    """From here on this process, a fork, imports the project from the copy."""
    for name in [*sys.modules]:
        if name.split(".")[0] in OURS:
            del sys.modules[name]
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path) != ROOT)]
    os.chdir(copy)


def runs_in(rank: int, world: int, copy: Path, commands: list[list[str]]) -> list[list[dict]]:
    """The rows of metrics.jsonl of each run, made in the copy."""
    enter(copy)
    run = importlib.import_module("train")
    assert Path(run.__file__).parent == copy
    found = []
    for command in commands:
        cfg = importlib.import_module("settings.parse").parse(command)
        run.main(cfg)
        found.append(read_metrics(Path(cfg.out_dir, "metrics.jsonl")))
    return found


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def trained(patched, text, tmp_path_factory):
    """{name: rows} of short runs in the patched tree, each with the flags of its section."""
    folder = tmp_path_factory.mktemp("trained")

    def command(name: str, flags: list[str]) -> list[str]:
        return [*words(data=text, out_dir=folder / name), *flags]

    alone = {
        "base": [],
        "optimizer": flags_of("An optimizer"),
        "schedule": flags_of("A schedule"),
        "trait": flags_of("A trait"),
        "precision": flags_of("A precision"),
    }
    together = {
        "layout": flags_of("A data-parallel layout"),
        "layout, tied": [*flags_of("A data-parallel layout"), "--arch=gpt2"],
        "optimizer under zero1": [*flags_of("An optimizer"), "--data_parallel=zero1"],
    }
    alone["tied"] = ["--arch=gpt2"]
    found = {}
    for world, runs in ((1, alone), (2, together)):
        commands = [command(name, flags) for name, flags in runs.items()]
        found |= dict(zip(runs, run_ranks(world, runs_in, patched, commands)[0]))
    return folder, found


def test_the_optimizer_trains_alone_and_sharded(trained):
    _, found = trained
    rows = losses(found["optimizer"])
    assert len(rows) == 3 and rows[-1] < rows[0]
    assert losses(found["optimizer under zero1"]) == pytest.approx(rows, rel=1e-10)


def test_the_optimizers_example_is_true(monkeypatch):
    diff = ADDITIONS["An optimizer"][0]
    added = [line[1:] for line in diff.splitlines() if re.match(r"\+(?!\+\+ )", line)]
    module = types.ModuleType("optim.signum")
    exec("\n".join(added), vars(module))
    monkeypatch.setitem(sys.modules, "optim.signum", module)
    example = textwrap.dedent(module.__doc__.partition("Example:\n")[2])
    assert "assert " in example
    exec(example, {})


def test_the_schedule_decides_the_learning_rate(trained):
    _, found = trained
    rates = [row["lr"] for row in found["schedule"] if "lr" in row]
    assert rates == pytest.approx([rates[0] * (1 - t / 3) ** 3 for t in range(3)])


def test_the_trait_changes_the_run_that_asks_for_it_alone(trained, text, tmp_path):
    _, found = trained
    train.main(parse.parse(words(data=text, out_dir=tmp_path / "out")))
    ours = losses(read_metrics(tmp_path / "out" / "metrics.jsonl"))
    assert losses(found["base"]) == ours
    assert losses(found["trait"])[-1] != pytest.approx(ours[-1], rel=1e-6)


@pytest.mark.parametrize("layout, alone", [("layout", "base"), ("layout, tied", "tied")])
def test_the_layout_is_one_process(trained, layout, alone):
    _, found = trained
    assert losses(found[layout]) == pytest.approx(losses(found[alone]), rel=1e-10)
    assert all(row["sent_bytes"] > 0 for row in found[layout] if "loss" in row)


def test_the_precision_has_bf16_weights(trained):
    folder, found = trained
    weights = load.resolve(folder / "precision").tree("model")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16} and len(
        losses(found["base"])
    ) == 3


def judge(rank: int, world: int, copy: Path, folder: Path) -> tuple:
    """The experiment's verdict on made-up rows, and whether its picture can be drawn."""
    from matplotlib.figure import Figure

    enter(copy)
    tied_head = importlib.import_module("experiments.tied_head")
    verdicts = []
    for tied_loss in (1.0, 2.0):
        rows = [keys | {"val_loss": tied_loss if keys["tied"] else 1.0} for keys in tied_head.GRID]
        verdicts.append(tied_head.verdict(rows)[0])
    figure = Figure()
    tied_head.picture(rows, figure)
    figure.savefig(folder / "tied_head.png")
    return verdicts, tied_head.table(rows)


def test_the_experiment_judges_by_its_rows(patched, tmp_path):
    [(verdicts, page)] = run_ranks(1, judge, patched, tmp_path)
    assert verdicts == ["holds", "does not hold"] and "| True | 1 | 2.0000 |" in page
    assert (tmp_path / "tied_head.png").exists()


@pytest.mark.slow
def test_the_experiment_runs(patched, tmp_path):
    command = ADDITIONS["An experiment"][1].partition("\n")[0].split()
    assert command[0] == "python"
    done = subprocess.run([sys.executable, *command[1:], f"--out={tmp_path}"], cwd=patched)
    assert done.returncode == 0 and "**Verdict.**" in (tmp_path / "tied_head.md").read_text()


# ---- python.md -----------------------------------------------------------------------------------
SNIPPETS = re.findall(r"```python\n(.+?)```", page("docs/python.md"), re.S)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A folder with a run in out/: fields of every kind, then resumed."""
    folder = tmp_path_factory.mktemp("run")
    tiny = dict(data=text, out_dir=folder / "out", watch_every=1, precision="fp32")
    train.main(parse.parse(words(**tiny)))
    train.main(parse.parse(words(**tiny, steps=4)))
    return folder


@pytest.fixture
def in_run(run, monkeypatch):
    monkeypatch.chdir(run)
    return run


@pytest.mark.parametrize("i", range(len(SNIPPETS)))
def test_a_snippet_runs_and_is_what_its_comments_say(i, in_run):
    names = {}
    exec(compile(SNIPPETS[i], "docs/python.md", "exec"), names)
    if "prompt" in names:
        assert names["ids"].shape == (1, 4 + 100)
    if "nats" in names:
        assert names["logits"].shape == (1, 12, 256) and 0 < names["nats"] < 10
    if "cfg" in names:
        saved = names["saved"].tree("model")
        found = dict(names["model"].named_parameters())
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
    if "weights" in names:
        assert names["weights"]["embed.weight"].shape == (256, 32)
        assert names["loss_so_far"][1] == 4
    if "losses" in names:
        assert len(names["losses"]) == 3 and names["metrics"]["step"] == 3
    assert names.keys() & {"prompt", "nats", "cfg", "weights", "losses"}


def test_the_export_is_read_by_safetensors(in_run):
    from safetensors.torch import load_file

    from checkpoint.__main__ import main

    command = next(x for x in quoted(page("docs/python.md")) if "checkpoint export" in x)
    main(command.split()[3:])
    saved = load.resolve("out").tree("model")
    found = load_file("weights.safetensors")
    assert "load_file" in page("docs/python.md") and found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


# ---- metrics.md ----------------------------------------------------------------------------------
METRICS = sections(page("docs/metrics.md"))
PRODUCT = [
    path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    if path.parent.name not in ("tests", "experiments", "benchmarks", "search", "examples")
]


def documented_fields() -> set[str]:
    headings = ("Train rows", "Watched steps", "Evaluations")
    rows = [row for heading in headings for row in table(METRICS[heading])]
    return {re.sub(r"/[A-Z]+$", "/*", name) for row in rows for name in quoted(row[0])}


def documented_events() -> set[tuple]:
    """{(event, its fields)}; an event may have two forms."""
    rows = [[*map(quoted, row[:2]), row[1]] for row in table(METRICS["Events"])]
    fields = {}
    found = set()
    for [event], named, cell in rows:
        if "the same as" in cell:
            named = fields[named[0]]
        fields[event] = named
        found.add((event, frozenset(named)))
    return found


def keys_of(tree: ast.AST, name: str) -> set[str]:
    """The keys that a function gives the dict of this name; what varies in a key is *."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AugAssign):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id == name and isinstance(node.value, ast.Dict):
            found += node.value.keys
        if isinstance(target, ast.Subscript) and getattr(target.value, "id", None) == name:
            found.append(target.slice)
    return {re.sub(r"\{.+?\}", "*", ast.unparse(key).removeprefix("f").strip("'")) for key in found}


def function(file: str, name: str) -> ast.AST:
    tree = ast.parse(page(file))
    return next(
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name
    )


def test_metrics_md_has_the_fields_that_the_code_writes():
    returned = [
        x.value
        for x in ast.walk(function("run/evaluate.py", "evaluate"))
        if isinstance(x, ast.Return) and isinstance(x.value, ast.Dict)
    ]
    evaluation = {key.value for key in returned[0].keys} | {"val_loss_ema"}  # train.py's own
    row = keys_of(function("train.py", "main"), "row")
    watched = keys_of(function("metrics/watch.py", "row"), "found")
    losses = keys_of(function("run/balance.py", "row"), "found")
    loads = keys_of(function("metrics/experts.py", "statistics"), "found")
    assert min(len(evaluation), len(row), len(watched), len(loads)) >= 4
    written = row | watched | evaluation | losses | loads
    assert documented_fields() == written - {"step"}


def test_metrics_md_has_the_fields_of_a_real_run(run, text, tmp_path):
    fields = dict(data=text, out_dir=tmp_path, watch_every=1, n_expert=2, moe_sequence_loss=1)
    fields |= dict(ema=2)
    train.main(parse.parse(words(**fields)))
    paths = [run / "out" / "metrics.jsonl", tmp_path / "metrics.jsonl"]
    rows = [row for path in paths for row in read_metrics(path)]
    found = {key for row in rows if "event" not in row for key in row}
    found = {re.sub(r"/\w+$", "/*", key) for key in found}
    assert found == documented_fields() - {"idle_s"} | {"step"}


def written_events() -> set[tuple]:
    """{(event, its fields)} of each place in the code that makes one."""
    found = set()
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                items = {getattr(k, "value", None): v for k, v in zip(node.keys, node.values)}
                names = items.get("event")
                fields = {key for key in items if key not in ("step", "event", None)}
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("emit", "event"):
                names = node.args[1] if len(node.args) > 1 else None
                fields = {keyword.arg for keyword in node.keywords}
                fields |= {"text"} if len(node.args) > 2 else set()
            else:
                continue
            # A conditional expression names two.
            for part in ast.walk(names) if names is not None else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    found.add((part.value, frozenset(fields)))
    return found


def test_metrics_md_has_the_events_that_the_code_writes():
    assert documented_events() == written_events()


def test_metrics_md_has_the_events_of_real_runs(run, text, tmp_path):
    # The first update makes every later loss NaN; after four rollbacks the monitor gives up.
    bad = dict(optim="sgd", lr=1e38, grad_clip="none", logit_cap="none", on_nonfinite="rollback")
    fields = dict(data=text, out_dir=tmp_path, steps=12, precision="fp32")
    with pytest.raises(Aborted):
        train.main(parse.parse(words(**fields, **bad)))
    rows = read_metrics(run / "out" / "metrics.jsonl") + read_metrics(tmp_path / "metrics.jsonl")
    found = {
        (row["event"], frozenset(row.keys() - {"step", "event"})) for row in rows if "event" in row
    }
    assert {"resume", "save", "nonfinite", "rollback"} <= {event for event, _ in found}
    assert found <= documented_events()


# ---- glossary.md, reading.md, install.md, links --------------------------------------------------
def test_each_word_of_the_glossary_is_in_its_file():
    rows = table(page("docs/glossary.md"))
    assert len(rows) > 50
    assert [term for term, _, _ in rows] == sorted((t for t, _, _ in rows), key=str.lower)
    for term, _, file in rows:
        code = page(file.strip("`")).lower()
        for word in re.sub(r" \(.+\)", "", term).split(", "):
            forms = [re.sub("[- ]", space, word.lower()) for space in ("-", " ", "_", "")]
            assert any(form in code for form in forms), (word, file)


PATHS = sections(page("docs/reading.md"))


@pytest.mark.parametrize("path", PATHS)
def test_a_reading_path_has_files_lengths_and_names_that_are_there(path):
    rows = table(PATHS[path])
    assert len(rows) >= 4
    for file, n_lines, look_for in rows:
        code = page(file.strip("`"))
        assert code.count("\n") == pytest.approx(int(n_lines), rel=0.3), file
        for name in quoted(look_for):
            assert re.search(rf"\b{re.escape(name)}\b", code), (file, name)


def slug(heading: str) -> str:
    """GitHub's name of a heading's anchor."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), target


def test_readme_links_every_page():
    text = sections(page("README.md"))["Docs"]
    missing = [path.name for path in PAGES[1:] if f"{path.name})" not in text]
    assert missing == []


@pytest.mark.parametrize("path", PAGES[1:], ids=lambda path: path.name)
def test_files_that_a_page_names_are_there(path):
    made = {name for diff, _ in ADDITIONS.values() for name in files_of(diff)}
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    rooms = "|".join(sorted(ROOMS | {"docs", "tests", "configs"}))
    for name in re.findall(rf"`((?:{rooms})/[a-z0-9_/]+\.(?:py|md|toml|sh))`", text):
        assert name in made or (ROOT / name).exists(), name


def test_install_md_names_the_torch_that_requirements_pin():
    pinned = re.search(r"^torch==(\S+)$", page("requirements.txt"), re.M)[1]
    assert set(re.findall(r"torch==(\d[\d.]*\d)", page("docs/install.md"))) == {pinned}


def test_the_citation_is_complete():
    text = page("CITATION.cff")
    assert "license: MIT" in text and "MIT License" in page("LICENSE")
    keys = re.findall(r"^([a-z-]+):", text, re.M)
    # Those that the format asks for, then more of its own.
    assert {"cff-version", "message", "title", "authors"} <= {*keys} and len(keys) == len({*keys})
    assert {*keys} - {"cff-version", "message", "title", "authors"} <= {
        *"type abstract license keywords version date-released repository-code url doi".split()
    }
    assert "cff-version: 1.2.0" in text and "authors:\n  - name: the nanoscale authors" in text
    assert "the nanoscale authors" in page("LICENSE")


# ---- faq.md, verdicts ----------------------------------------------------------------------------
QUESTIONS = sections(page("docs/faq.md"))


def test_twenty_questions_have_short_answers_with_something_to_type():
    assert len(QUESTIONS) == 20
    for question, answer in QUESTIONS.items():
        lines = answer.strip().splitlines()
        assert 1 <= len(lines) <= 4, question
        assert re.search(r"`(python|torchrun|--)|\]\(", answer), question


def verdicts() -> list[tuple[str, int, int]]:
    """(verdict, parts as claimed, parts) of each page of experiments; 0 where none are counted."""
    found = []
    for path in sorted((ROOT / "experiments" / "results").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        match = re.search(r"^\*\*Verdict\.\*\* ([a-z ]+)(?:: (\d+) of (\d+) parts)?", text, re.M)
        if match:
            found.append((match[1], int(match[2] or 0), int(match[3] or 0)))
    return found


def test_readme_counts_the_verdicts_as_the_pages_have_them():
    found = verdicts()
    names = [verdict for verdict, _, _ in found]
    assert {*names} == {"holds", "holds in part"}  # else "none fails altogether" is to be changed
    text = " ".join(page("README.md").split())
    pattern = (
        r"tested (\d+) statements, (\d+) of them from five training courses.+? (\d+) hold and "
        r"(\d+) hold in part; none fails altogether\. Of the (\d+) parts that were counted "
        r"(\d+) are as claimed"
    )
    said = re.search(pattern, text)
    own = [  # their docstring says that no lesson claims it
        path
        for path in (ROOT / "experiments").glob("*.py")
        if re.search(r"^Source: (none of the lessons|.*, ours;)", path.read_text(), re.M)
    ]
    counts = [len(found), len(found) - len(own), names.count("holds"), names.count("holds in part")]
    counts += [sum(n for _, _, n in found), sum(n for _, n, _ in found)]
    assert [int(x) for x in said.groups()] == counts
