"""Recipes, checkpoints, data and vocabularies of strangers run no code: each test plants some and
looks.

What a recipe may still do is what its fields say: read the data it names and write into the out_dir
it names. Read a stranger's recipe; it is twenty lines.
"""

import ast
import base64
import hashlib
import json
import os
import pickle
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from format_1 import as_bytes, as_format_1, facts_of, seal
from harness import product_files
from test_train import ROOT, flags, go

import sample
import train
from checkpoint import load as checkpoint
from data import corpora, download
from data.tokenizer import Tokenizer
from metrics import logger
from run import optimizers
from settings import parse

SOURCES = product_files()
TEXT = str(ROOT / "model.py")


class Payload:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """A file that code of a stranger would make; it must not be there after the test."""
    yield tmp_path / "the-code-has-run"
    assert not (tmp_path / "the-code-has-run").exists()


WATCHED, seen = (
    (
        "pickle.find_class",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "subprocess.Popen",
    ),
    None,
)
sys.addaudithook(
    lambda event, args: (
        seen.append((event, str(args))) if seen is not None and event in WATCHED else 0
    )
)


@contextmanager
def nothing_runs():
    """No class is looked up for a pickle, no process is started but git for the commit's name."""
    global seen
    seen = []
    try:
        yield
    finally:
        events, seen = [e for e in seen if "'git'" not in e[1]], None
    assert not events


def test_the_traps_of_these_tests_do_catch(tmp_path):
    for load in (pickle.loads, lambda raw: eval("pickle.loads(raw)")):
        with pytest.raises(AssertionError), nothing_runs():
            load(pickle.dumps(Payload(tmp_path / "mark")))
        assert (tmp_path / "mark").exists()


# ---- the source ----------------------------------------------------------------------------------
BANNED = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "execfile",
    "pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "cloudpickle",
    "yaml",
    "runpy",
    "pty",
}
CALLS = {
    "os.system",
    "os.popen",
    "torch.load",
    "torch.jit.load",
    "np.load",
    "numpy.load",
    "pandas.read_pickle",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "tarfile.extractall",
    "shutil.unpack_archive",
    "dist.recv_object_list",
    "dist.broadcast_object_list",
    "dist.scatter_object_list",
}
# Names that come from a list in the source, never from a user.
IMPORTS = {
    "optim/attributes.py": 1,  # every file of optim/
    "run/hooks.py": 1,
    "run/optimizers.py": 1,
    "metrics/logger.py": 1,
    "bench.py": 1,
    "benchmarks/gpu.py": 1,  # a stage, in a process of its own
    "benchmarks/layouts.py": 2,
    "benchmarks/layouts_ranks.py": 1,
    "benchmarks/optimizers.py": 3,
    "benchmarks/nanogpt.py": 1,
}
# Of a file, or of a message between ranks, weights alone are read: what a clone's train.py saved,
# which the bench runs and the user names; the file of nanoGPT's that --init_from= names; what one
# rank's optimizer tells the others.
WEIGHTS_ONLY = {
    "benchmarks/checkpointing.py": "torch.load",
    "benchmarks/nanogpt.py": "torch.load",
    "checkpoint/pretrained.py": "torch.load",
    "parallel/sharded_optimizer.py": "torch.load",
}
# Between the ranks of one run, who run the same code anyway.
BETWEEN_RANKS = {
    "precision/histogram.py",
    "benchmarks/network.py",
}
# How a file runs the example of its own docstring, which is as much its code as the rest.
EXAMPLE = """\
if __name__ == '__main__':
    example = __doc__.partition('Example:\\n')[2]
    print(example)
    exec(inspect.cleandoc(example))"""


def faults(tree: ast.Module, name: str) -> list[str]:
    """What in a source file could run a stranger's code."""
    found, imports = [], 0
    if tree.body and ast.unparse(tree.body[-1]) == EXAMPLE:
        tree = ast.Module(tree.body[:-1], [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {a.name.split(".")[0] for a in node.names} | {
                (getattr(node, "module", 0) or "").split(".")[0]
            }
            if getattr(node, "module", None) == "layers":
                names = {"layers"}  # layers.compile is ours
            found += [f"{node.lineno}: imports {n}" for n in names & BANNED]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        if called == WEIGHTS_ONLY.get(name) and "weights_only=True" in ast.unparse(node):
            continue
        if (
            called in BANNED
            or called in CALLS
            or last == "extractall"
            or last.startswith("read_pickle")
        ):
            found.append(f"{node.lineno}: {called}")
        if last in ("all_gather_object", "gather_object") and name not in BETWEEN_RANKS:
            found.append(f"{node.lineno}: {called} unpickles")
        if any(
            k.arg in ("shell", "allow_pickle") and ast.unparse(k.value) != "False"
            for k in node.keywords
        ):
            found.append(f"{node.lineno}: {called} with shell or allow_pickle")
        imports += last == "import_module" or called.endswith("spec_from_file_location")
    return found + ([f"{imports} imports by name"] if imports != IMPORTS.get(name, 0) else [])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_can_run_what_it_reads(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not faults(tree, path.relative_to(ROOT).as_posix())


@pytest.mark.parametrize(
    "line",
    [
        "eval(x)",
        "exec(open('a').read())",
        "import pickle",
        "from pickle import loads",
        "torch.load(f)",
        "import yaml",
        "subprocess.run(x, shell=True)",
        "np.load(f, allow_pickle=True)",
        "os.system(x)",
        "tar.extractall(p)",
        "importlib.import_module(x)",
        "dist.all_gather_object(a, b)",
        "import torch, marshal",
    ],
)
def test_the_scan_sees(line):
    assert faults(ast.parse(line), "new.py")


# ---- names ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "param_groups",
        "param_groups.os",
        "..\\x",
        "../evil",
        "/tmp/evil",
        "muon.torch",
        "muon.__class__",
        "muon.__builtins__",
        "muon.Optimizer",
        "",
        ".",
        ".Muon",
        "mup",
        "__init__",
        "optim.muon",
        "muon\n",
        "MUON",
        "muon.Muon.__init__",
        "evil",
    ],
)
def test_only_a_class_of_a_file_in_optim_is_an_optimizer(name, tmp_path, monkeypatch, mark):
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError), nothing_runs():
        optimizers.find_optimizer(name)


CODE = "__import__('pathlib').Path({!r}).touch()"


@pytest.mark.parametrize(
    "flag",
    [
        "--opt.eps={}",
        "--optim={}",
        "--schedule.shape={}",
        "--schedule={}",
        "--data={}",
        "--tokenizer={}",
        "--lr={}",
        "--resume={}",
        "--init_from={}",
        "--device={}",
        "--activation_checkpoint=every_{}",
        "--opt.__class__={}",
        "--opt.__init__={}",
        "--opt.params={}",
        "--opt.self={}",
        "--fp8.__dict__={}",
        "--compile.backend={}",
        "--{}=1",
        "--__class__={}",
        "--opt.betas=({},1)",
        "{}",
        "--data_url={}",
        "--compress=topk --compress.fraction={}",
        "--seed={}",
        "--wandb={}",
        "--steps=[{}]",
        "--opt.=1",
        "--given={}",
        "--options={}",
        "--sub={}",
    ],
)
def test_a_value_that_looks_like_code_is_a_word(flag, tmp_path, mark):
    with nothing_runs(), pytest.raises(ValueError) as error:
        go(
            TEXT,
            tmp_path / "out",
            "--steps=1",
            "--n_layer=1",
            *flag.format(CODE.format(str(mark))).split(" "),
        )
    assert "\n" not in str(error.value)


def test_a_recipe_is_numbers_and_words(tmp_path, mark):
    code, path = CODE.format(str(mark)), tmp_path / "a.toml"
    for text in (
        code,
        f"steps = {code}",
        f'steps = "{code}"',
        f'"{code}" = 1',
        f"[{code}]",
        f'lr = ["{code}"]',
        f'opt = "{code}"',
        f'"opt.__reduce__" = "{code}"\nsteps = "x"',
        "steps = !!python/object:os",
    ):
        path.write_text(text)
        with nothing_runs(), pytest.raises(ValueError):
            parse.parse([str(path)])
    path.write_bytes(pickle.dumps(Payload(mark)))
    with nothing_runs(), pytest.raises(ValueError):
        parse.parse([str(path)])


# ---- files ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    go(TEXT, out, "--steps=2", "--save_every=1", "--n_layer=1")
    return out


def signed(folder: Path, change=lambda body: None, files=None) -> None:
    """A stranger can write a checkpoint whose checksums are right."""
    body = json.loads((folder / "index.json").read_bytes())["body"]
    files = files or {"rank_0.safetensors": facts_of(folder / "rank_0.safetensors")}
    if body["format"] == 1:
        body["files"] = files
    else:
        (folder / "files.json").write_bytes(as_bytes(files))
        body["files"] = facts_of(folder / "files.json")
    change(body)
    seal(folder, body)


@pytest.mark.parametrize(
    "file",
    [
        "index.json",
        "files.json",
        "rank_0.safetensors",
        "metrics.jsonl",
        "config.toml",
        "data.pkl",
        "__init__.py",
        "torch.py",
        "json.py",
    ],
)
def test_a_file_of_a_run_may_hold_anything_and_nothing_runs(
    trained, tmp_path, monkeypatch, mark, file
):
    out = shutil.copytree(trained, tmp_path / "out")
    raw = CODE.format(str(mark)).encode() if file.endswith(".py") else pickle.dumps(Payload(mark))
    for folder in (out, *out.glob("step-*")):
        if (folder / file).exists() or file.endswith(("pkl", "py")):
            (folder / file).write_bytes(raw)
    for folder in out.glob("step-*"):
        if file.startswith("rank_0"):
            signed(folder)
    monkeypatch.chdir(out)
    with nothing_runs():
        for what in (
            lambda: go(TEXT, out, "--steps=3", "--n_layer=1", "--schedule=constant"),
            lambda: train.main(
                parse.parse([f"--resume={out}", f"--out_dir={tmp_path / 'b'}", "--steps=3"])
            ),
            lambda: sample.load(str(out)),
            lambda: logger.latest(out),
        ):
            try:
                what()
            except ValueError:
                pass


@pytest.mark.parametrize(
    "file",
    [
        "../../secret.safetensors",
        "/etc/passwd",
        "rank_0.safetensors/../../x",
        "rank_0.safetensors\n",
        "..\\x",
        "",
        "rank_0.pkl",
        "rank_0.pt",
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_an_index_cannot_lead_out_of_its_folder(trained, tmp_path, file, version):
    out = shutil.copytree(trained, tmp_path / "run" / "out")
    folder = max(out.glob("step-*"))
    secret = tmp_path / "run" / "secret.safetensors"
    shutil.copy(folder / "rank_0.safetensors", secret)

    if version == 1:
        as_format_1(folder)

    def change(body):
        for entry in body["tensors"].values():
            for s in entry.get("slices", ()):
                s["file"] = file

    signed(folder, change, {file: facts_of(folder / "rank_0.safetensors")})
    with nothing_runs(), pytest.raises(checkpoint.CheckpointDamaged):
        checkpoint.load(folder)


def test_the_settings_in_a_strangers_checkpoint_are_checked_like_a_recipe(trained, tmp_path, mark):
    code = CODE.format(str(mark))
    for name, value in (
        ("optim", code),
        ("optim", "os.system"),
        ("steps", code),
        ("tokenizer", code),
        ("options", {"opt.__class__": code}),
        ("options", code),
        ("precision", code),
    ):
        out = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(max(trained.glob("step-*")), out / "step-00000002")
        signed(out / "step-00000002", lambda body: body["tree"]["config"].update({name: value}))
        argv = [f"--resume={out}", f"--out_dir={out}-branch", "--steps=3", f"--data={TEXT}"]
        with nothing_runs(), pytest.raises(ValueError):
            train.main(parse.parse(argv))
        if name == "tokenizer":
            with nothing_runs(), pytest.raises(ValueError):
                sample.load(str(out))


def test_data_are_numbers(tmp_path, mark):
    raw = pickle.dumps(Payload(mark))
    (tmp_path / "d").mkdir()
    for name, content in (
        ("train.bin", raw + bytes(len(raw) % 2)),
        ("val.bin", bytes(200)),
        ("train.py", b"1/0"),
    ):
        (tmp_path / "d" / name).write_bytes(content)
    array = np.array([Payload(mark)] * 3, dtype=object)
    np.save(tmp_path / "d" / "train2.bin.npy", array, allow_pickle=True)
    (tmp_path / "d" / "train2.bin.npy").rename(tmp_path / "d" / "train2.bin")
    (tmp_path / "a.txt").write_bytes(raw * 20 + CODE.format(str(mark)).encode())
    with nothing_runs():
        for where in ("d", "a.txt"):
            try:
                corpora.load(str(tmp_path / where), "bytes", str(tmp_path), vocab_size=None)
            except ValueError:
                pass


@pytest.mark.parametrize("kind", ["pickle", "code", "words"])
def test_a_vocabulary_is_a_table(tmp_path, monkeypatch, mark, kind):
    """tiktoken keeps its tables in a folder under the sha1 of their address; a wrong one is thrown
    away."""
    import tiktoken
    import tiktoken.load

    def offline(blobpath):
        raise OSError("offline")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tables"))
    monkeypatch.setattr(tiktoken.load, "read_file", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    address = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    raw = {
        "pickle": pickle.dumps(Payload(mark)),
        "code": CODE.format(str(mark)).encode(),
        "words": base64.b64encode(b"a") + b" 0\n",
    }[kind]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / hashlib.sha1(address.encode()).hexdigest()).write_bytes(raw)
    with nothing_runs(), pytest.raises(ValueError, match="cannot fetch its encoding"):
        Tokenizer("r50k_base")


def test_a_download_with_another_checksum_is_not_used(tmp_path, mark):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "input.txt").write_bytes(pickle.dumps(Payload(mark)))
    with nothing_runs(), pytest.raises(ValueError, match="came twice with sha256"):
        corpora.load(
            "shakespeare", "bytes", str(tmp_path / "cache"), url=f"file://{tmp_path / 'web'}"
        )
    assert not list((tmp_path / "cache" / "shakespeare").iterdir())
    with pytest.raises(ValueError, match="came twice"):
        download.download(f"file://{tmp_path / 'web' / 'input.txt'}", tmp_path / "x", "0" * 64)


def test_the_environment_names_no_code(tmp_path, monkeypatch, mark):
    for name in ("NANOSCALE", "OPTIM", "PYTHONSTARTUP", "WANDB_MODE", "TORCHELASTIC_RUN_ID_"):
        monkeypatch.setenv(name, CODE.format(str(mark)))
    with nothing_runs():
        go(TEXT, tmp_path / "out", "--steps=1", "--n_layer=1")
    assert flags(TEXT, "x") and os.path.exists(tmp_path / "out")
