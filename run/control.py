"""Who may write into a run's folder, and how a run is asked to stop."""

import os
import shutil
import signal
import socket
import threading
import weakref
from pathlib import Path

import torch

from checkpoint.save import FOLDER


def leave(mesh, lock: "RunLock | None", rank_log, made_group: bool, offloads: bool) -> None:
    """The end of a run on this rank, after all ranks have come here.

    Files of offloaded state are of no use to a later run: they go.
    """
    mesh.agree(0)
    if lock is not None and offloads:
        shutil.rmtree(lock.out_dir / "offload", ignore_errors=True)
    rank_log.close()
    if lock is not None:
        lock.release()
    if made_group:
        torch.distributed.destroy_process_group()


def set_aside(out_dir: Path) -> None:
    """Moves whatever a run left in out_dir to the first free out_dir/earlier-N; nothing is
    deleted."""
    names = (
        "metrics.jsonl",
        "train.log",
        "config.toml",
        "loss.png",
        "histograms.jsonl",
        "histograms.png",
        "tensorboard",
        "wandb",
        "best",
    )
    left = [p for p in out_dir.iterdir() if p.name in names or FOLDER.fullmatch(p.name)]
    if left:
        number = 1
        while (out_dir / f"earlier-{number}").exists():
            number += 1
        (out_dir / f"earlier-{number}").mkdir()
        for path in left:
            path.rename(out_dir / f"earlier-{number}" / path.name)


class RunLock:
    """Only one run writes to OUT_DIR; rank 0 holds this for all. The system drops it when its
    holder dies.

    Raises ValueError, naming the holder.
    """

    def __init__(self, out_dir: str | Path):
        self.out_dir = Path(out_dir)
        try:
            Path(out_dir).mkdir(parents=True, exist_ok=True)
            self._file = open(Path(out_dir) / ".lock", "a+", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--out_dir={out_dir} cannot be used: {error.strerror}") from None
        try:
            if os.name == "nt":
                import msvcrt

                # Windows forbids reading locked bytes: lock one far behind the text
                self._file.seek(1 << 30)
                msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file = weakref.ref(self._file)  # a forked child must not hold it too
                os.register_at_fork(after_in_child=lambda: file() is None or file().close())
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"{out_dir} is in use by {holder}; stop it or take another out_dir"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


class StopSignal:
    """SIGTERM, Ctrl-C or a closed terminal (SIGHUP, unless nohup has it ignored): `asked` here,
    `agreed` once all ranks know, at one step. A second one is not held back."""

    def __init__(self):
        self.asked, self.agreed, self.before = False, False, {}
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self.before = {number: signal.signal(number, self.ask) for number in numbers}

    def ask(self, number: int, frame) -> None:
        self.asked = True
        signal.signal(number, self.before[number])

    def heard(self, mesh) -> bool:
        """Has any rank been asked? All ranks call it together and agree; a long evaluation does."""
        self.agreed = self.agreed or mesh.sum(self.asked)[0] > 0
        return self.agreed

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
