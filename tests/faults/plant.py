"""Faults kept as patches of this checkout: planted in a copy, and looked for by the parity command.

    python tests/faults/plant.py              every fault: what the command says, what was expected
    python tests/faults/plant.py ddp_mean     these alone, with the command's whole output
    python tests/faults/plant.py --blind=5    five at random: the output first, the name afterwards

NAME.patch is the fault, a line of faults.csv says how to see it:

    flags, ranks, rest   the command: python -m parity FLAGS --ranks=RANKS REST
    clean                yes: one process would have the fault too, so the unharmed checkout's run
                         is recorded first, and compared with
    kind, cause          of the first tensor that differs, as `--json` names them

Each command runs in a fork of this process, which has torch imported and forgets this checkout's
modules: 2 seconds instead of 6.
"""

import contextlib
import csv
import io
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TOOLS = ("tests", "experiments", "benchmarks", "docs", "findings")  # folders that no run imports


class Fault(NamedTuple):
    name: str
    flags: str
    ranks: str
    rest: str
    clean: str
    kind: str
    cause: str

    @property
    def patch(self) -> Path:
        return HERE / f"{self.name}.patch"

    def command(self) -> list[str]:
        ranks = [f"--ranks={self.ranks}"] if self.ranks else []
        return [self.flags, *ranks, *self.rest.split()]


def faults() -> list[Fault]:
    with open(HERE / "faults.csv", newline="", encoding="utf-8") as file:
        return [Fault(**row) for row in csv.DictReader(file)]


def copy_of_tree(folder: Path) -> Path:
    """Every file of the checkout that a run may need, as it is now."""

    def left_out(where: str, names: list[str]) -> list[str]:
        if Path(where) != ROOT:
            return ["__pycache__"]
        return [
            n
            for n in names
            if n in (*TOOLS, "data_cache", "venv") or n.startswith((".", "_", "out"))
        ]

    shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True)
    return folder


def patched(tree: Path, fault: Fault, undo: bool = False, check: bool = False) -> None:
    """Plants the fault, or removes it. check: changes nothing.

    Raises CalledProcessError where the patch does not fit.
    """
    way = ["--reverse"] * undo + ["--check"] * check
    command = ["git", "apply", *way, str(fault.patch)]
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    subprocess.run(command, cwd=tree, check=True, env=environment)


def is_ours(path: str) -> bool:
    """Is it of this checkout? A virtual environment inside it is not."""
    return path.startswith(str(ROOT)) and not path.startswith(sys.prefix)


def parity(tree: Path, argv: list[str]) -> tuple[int, str]:
    """`python -m parity` of this tree: its status, and what it prints."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(False)
    process = context.Process(target=child, args=(tree, argv, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = (-1, "the command died")
    process.join()
    return found


def child(tree: Path, argv: list[str], sender) -> None:
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if is_ours(file) and name != "__main__":
            del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if not is_ours(path))]
    os.chdir(tree)
    out = io.StringIO()
    try:
        from parity.__main__ import main

        with contextlib.redirect_stdout(out):
            status = main(argv)
    except Exception as error:
        status = 2 if isinstance(error, ValueError) else 3
        out.write(f"{type(error).__name__}: {error}")
    sender.send((status, out.getvalue()))


def look(tree: Path, fault: Fault, more: list[str]) -> tuple[int, str]:
    """What the command says of the planted fault. The tree is left as it was."""
    with tempfile.TemporaryDirectory() as folder:
        if fault.clean:
            parity(tree, [*fault.command(), f"--keep={folder}/clean"])
            more = [*more, f"--against={folder}/clean/a"]
        patched(tree, fault)
        try:
            return parity(tree, [*fault.command(), *more])
        finally:
            patched(tree, fault, undo=True)


def verdict(fault: Fault, status: int, text: str) -> str:
    """ "" where the command has found the fault, else what is wrong."""
    if status != 1:
        return f"exit status {status}: {text.strip()[-300:]}"
    said = json.loads(text)
    if said["kind"] != fault.kind or said["cause"] != fault.cause:
        return f"{said['kind']} of {said['name']}: {said['cause']}: {said['sentence']}"
    return ""


def main(argv: list[str]) -> int:
    import torch  # once, before all forks

    torch.set_num_threads(1)
    import torch._dynamo  # noqa: F401
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401

    chosen = faults()
    names = [word for word in argv if not word.startswith("--")]
    blind = next((int(word[8:]) for word in argv if word.startswith("--blind=")), None)
    if names:
        chosen = [fault for fault in chosen if fault.name in names]
    if blind:
        chosen = random.sample(chosen, blind)
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_tree(Path(folder).resolve())
        for number, fault in enumerate(chosen, 1):
            if names or blind:
                print(f"---- fault {number}\n{look(tree, fault, [])[1]}", flush=True)
                continue
            wrong = verdict(fault, *look(tree, fault, ["--json"]))
            found += not wrong
            print(f"{fault.name}: {wrong and 'NOT ' + wrong or fault.cause}", flush=True)
    if names or blind:
        for number, fault in enumerate(chosen, 1):
            print(f"fault {number} was {fault.name}: {fault.kind}, {fault.cause}")
        return 0
    print(f"{found} of {len(chosen)} faults named")
    return found != len(chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
