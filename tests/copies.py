"""Files copied out of the repository, and files run as programs, each in a forked child.

A module's docstring names what to copy with the file, and shows how to use it:

    Neighbours: memory/flags.py, optim/attributes.py      all files it needs; no line: none

    Example:
        from optim.soap import SOAP                       indented by four; ends by being true
        ...

A fork has torch imported, so a child takes milliseconds. It forgets our modules, and finds some
only where it is told to look.
"""

import contextlib
import importlib
import inspect
import io
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import textwrap
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
# What the first name of an import of ours can be.
OURS = {path.stem for pattern in ("*.py", "tests/*.py") for path in ROOT.glob(pattern)}
OURS |= {path.parent.name for path in ROOT.glob("*/__init__.py")}
SECONDS = 60  # more is a deadlock


class Ended(NamedTuple):
    out: str
    err: str
    status: int | str | None  # what sys.exit was given; 0 without
    loaded: set[str]  # files of ours that were imported, relative to the folder


# ---- what a docstring says -----------------------------------------------------------------------
def example(doc: str) -> str:
    """The code below `Example:`, "" if there is none."""
    found = re.search(r"^Example:\n((?: {4}.*\n|\n)*)", f"{doc}\n", re.M)
    return textwrap.dedent(found[1]).strip() if found else ""


def neighbours(doc: str) -> set[str]:
    """The paths behind `Neighbours:`, up to the paragraph's end."""
    found = re.search(r"^Neighbours: (.*?)\n\n", f"{doc}\n\n", re.M | re.S)
    return {name.strip() for name in found[1].split(",")} if found else set()


# ---- what runs -----------------------------------------------------------------------------------
def run_copy(root: Path, name: str, doc: str, folder: Path) -> Ended:
    """Copies root/name and its neighbours into the empty folder, and runs the example there.

    Raises AssertionError with the child's traceback where it fails.
    """
    for copied in {name, *neighbours(doc)}:
        (folder / copied).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / copied, folder / copied)
    script = folder / "example.py"
    script.write_text(example(doc), encoding="utf-8")
    return in_child(folder, lambda: runpy.run_path(str(script)))


def run_program(name: str) -> Ended:
    """`python -m FOLDER.FILE`, or `python FILE.py`, from the repository's root."""
    module = name.removesuffix(".py").replace("/", ".")
    return in_child(ROOT, lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


def in_child(folder: Path, work) -> Ended:
    """work() in a forked process whose path has this folder instead of the repository."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("a test in a child with torch imported needs fork, which this system lacks")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=send_result, args=(sender, folder.resolve(), work))
    child.start()
    sender.close()
    try:
        assert receiver.poll(SECONDS), f"no end after {SECONDS} s"
        ended, result = receiver.recv()
    finally:
        child.kill()
        child.join()
    assert ended, result
    return Ended(*result)


def send_result(sender, folder: Path, work) -> None:
    try:
        sender.send((True, alone(folder, work)))
    except BaseException:
        sender.send((False, traceback.format_exc()))


def alone(folder: Path, work) -> tuple:
    """The fields of Ended: this class itself could not be pickled once it is forgotten here."""
    hidden = {ROOT.resolve(), Path(__file__).parent.resolve()}
    # Where inspect found our folders, the compiler would look for their modules.
    inspect._filesbymodname.clear()
    inspect.modulesbyfile.clear()
    for name in [*sys.modules]:
        if name.split(".")[0] in OURS:
            del sys.modules[name]
    sys.path[:] = [str(folder)] + [p for p in sys.path if p and Path(p).resolve() not in hidden]
    sys.argv[1:] = []
    os.chdir(folder)
    importlib.invalidate_caches()

    out = io.StringIO()
    err = io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            work()
        except SystemExit as end:
            status = end.code

    loaded = set()
    for name, module in sys.modules.items():
        # A package without an __init__.py has no file.
        if name.split(".")[0] in OURS and getattr(module, "__file__", None):
            loaded.add(Path(module.__file__).resolve().relative_to(folder).as_posix())
    return out.getvalue(), err.getvalue(), status, loaded
