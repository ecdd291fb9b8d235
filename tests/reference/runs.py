"""A checkout whose cases are run: by a process that forks (launcher.py), or in new processes."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from cases import BARE, OWN, TINY, Case, Command, write_texts

HERE = Path(__file__).resolve().parent
# What torchrun and git leave in the environment would reach the runs.
FOREIGN = re.compile("RANK|WORLD_SIZE|MASTER_(ADDR|PORT)|(LOCAL|GROUP|ROLE|TORCHELASTIC|GIT)_.*")
FIXED = {"OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0",
         "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
SECONDS = 300  # a new process that takes longer fails


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not FOREIGN.fullmatch(name)}
    return kept | FIXED


def key(case: Case) -> str:
    """A word for all that decides a case's results, beside the checkout and the machine."""
    runner = [(HERE / name).read_text(encoding="utf-8") for name in ("launcher.py", "runs.py")]
    return hashlib.sha256(f"{case.commands}{TINY}{runner}".encode()).hexdigest()[:12]


class Tree:
    """The runs of one checkout, each rank with one thread."""

    def __init__(self, root: Path):
        self.root, self.env = Path(root).resolve(), environment()
        self.launcher = self.cpu = None

    def run(self, case: Case, folder: Path) -> None:
        """Leaves what the case writes in `folder`, new, and its exit statuses in status.json."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_texts(folder)
        statuses = []
        for number, command in enumerate(case.commands, 1):
            run = self.in_new_process if OWN in command.how else self.in_fork
            statuses.append(run(command, folder, str(number)))
        found = {"status": statuses, "cpu": self.cpu}
        (folder / "status.json").write_text(json.dumps(found), encoding="utf-8")

    def words(self, command: Command) -> list[str]:
        flags = command.flags if BARE in command.how else f"{TINY} {command.flags}"
        return [word.replace("TREE", str(self.root)) for word in shlex.split(flags)]

    def in_fork(self, command: Command, folder: Path, name: str) -> list[int]:
        if self.launcher is None:
            line = [sys.executable, str(HERE / "launcher.py"), str(self.root)]
            pipe = subprocess.PIPE
            self.launcher = subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, env=self.env)
        request = {"script": command.script, "argv": self.words(command), "ranks": command.ranks,
                   "folder": str(folder), "name": name, "stop": command.stop}  # fmt: skip
        print(json.dumps(request), file=self.launcher.stdin, flush=True)
        line = self.launcher.stdout.readline()
        if not line:
            raise RuntimeError(f"the launcher of {self.root} ended with {self.launcher.wait()}")
        answer = json.loads(line)
        self.cpu = answer["cpu"]
        return answer["status"]

    def in_new_process(self, command: Command, folder: Path, name: str) -> list[int]:
        start = [sys.executable]
        if command.ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone"]
            start += [f"--nproc_per_node={command.ranks}"]
        line = [*start, str(self.root / command.script), *self.words(command)]
        out, err = (folder / f"{name}.rank0.{ending}" for ending in ("out", "err"))
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            done = subprocess.run(
                line, cwd=folder, env=self.env, stdout=stdout, stderr=stderr, timeout=SECONDS
            )
        return [done.returncode] * command.ranks

    def close(self) -> None:
        if self.launcher is not None:
            self.launcher.stdin.close()
            self.launcher.wait()
