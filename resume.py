"""Which run lives in out_dir, where a new command goes on, and how a run is asked to stop.

resume=auto     out_dir's newest whole checkpoint; none: a fresh start
resume=never    a fresh start; what out_dir held moves to out_dir/earlier-N
resume=PATH     a branch from that run's newest checkpoint, or from that checkpoint, into an out_dir of its
                own; the same command again goes on with the branch
"""

import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from checkpoint import FOLDER, load, newest, resolve


def find(out_dir: Path, resume: str, is_main: bool, agree: Callable[[int], int]):
    """(the checkpoint to go on from or None, whether it is out_dir's own). Changes nothing on disk.

    Rank 0 (is_main) reads every byte and decides; `agree` gives its numbers to all. Raises ValueError where
    out_dir has checkpoints but none is whole, where there is nothing at the path to resume from, and where a
    branch would overwrite another run.
    """
    branch, found, in_place = resume not in ("auto", "never"), None, True
    if is_main and resume != "never":
        found = newest(out_dir)
        if found is None and any(FOLDER.fullmatch(p.name) for p in out_dir.iterdir()):
            raise ValueError(f"no checkpoint in {out_dir} is whole; type --resume=never to start anew")
        if branch and found is None:
            found, in_place = resolve(resume), False
        elif branch and Path(found.tree("config/resume")).resolve() != Path(resume).resolve():
            raise ValueError(f"{out_dir} holds another run; a branch needs an --out_dir of its own")
    exists, in_place, step = agree(found is not None), agree(in_place), agree(found.step if found else 0)
    old = agree(found is not None and found.path.name.startswith(".old-"))
    if exists and not is_main:
        run = out_dir if in_place else Path(resume)
        run = run.parent if FOLDER.fullmatch(run.name) and not in_place else run
        found = load(run / f"{'.old-' * old}step-{step:08d}", verify=False)
    return found, bool(in_place)


def set_aside(out_dir: Path) -> None:
    """Moves whatever a run left in out_dir to the first free out_dir/earlier-N; nothing is deleted."""
    names = ("metrics.jsonl", "train.log", "config.toml", "loss.png")
    left = [p for p in out_dir.iterdir() if p.name in names or FOLDER.fullmatch(p.name)]
    if left:
        number = 1
        while (out_dir / f"earlier-{number}").exists():
            number += 1
        (out_dir / f"earlier-{number}").mkdir()
        for path in left:
            path.rename(out_dir / f"earlier-{number}" / path.name)


class RunLock:
    """Only one run writes to OUT_DIR; rank 0 holds this for all. The system drops it when its holder dies.

    Raises ValueError, naming the holder.
    """

    def __init__(self, out_dir):
        try:
            Path(out_dir).mkdir(parents=True, exist_ok=True)
            self._file = open(Path(out_dir) / ".lock", "a+", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--out_dir={out_dir} cannot be used: {error.strerror}") from None
        try:
            if os.name == "nt":
                import msvcrt

                self._file.seek(1 << 30)  # Windows forbids reading locked bytes: lock one far behind the text
                msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.register_at_fork(after_in_child=self._file.close)  # or a forked child would hold it too
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(f"{out_dir} is in use by {holder}; stop it or take another out_dir") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


class StopSignal:
    """SIGTERM or Ctrl-C: `asked` here, `agreed` once all ranks know, at one step. A second one is not held
    back."""

    def __init__(self):
        self.asked, self.agreed, self.before = False, False, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGTERM, signal.SIGINT)}

    def ask(self, number: int, frame) -> None:
        self.asked = True
        signal.signal(number, self.before[number])

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
