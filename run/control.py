"""The lock on a run's folder, the signals that stop a run, and how a rank leaves."""

import contextlib
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

    made_group: this run started the process group. offloads: state lies in files, which a later run
    cannot use; they are removed.
    """
    # A barrier: no rank removes a file that another one still reads.
    mesh.agree(0)
    if lock is not None and offloads:
        shutil.rmtree(lock.out_dir / "offload", ignore_errors=True)
    rank_log.close()
    if lock is not None:
        lock.release()
    if made_group:
        torch.distributed.destroy_process_group()


def set_aside(out_dir: Path) -> None:
    """Moves what a run left in out_dir to the first free out_dir/earlier-N; deletes nothing."""
    # What a run writes. Files of the user stay where they are.
    names = (
        "metrics.jsonl",
        "train.log",
        "config.toml",
        "tokenizer",
        "loss.png",
        "report.html",
        "histograms.jsonl",
        "histograms.png",
        "moe_load.jsonl",
        "moe_load.png",
        "tensorboard",
        "wandb",
        "best",
    )
    left = [p for p in out_dir.iterdir() if p.name in names or FOLDER.fullmatch(p.name)]
    if not left:
        return
    number = 1
    while (out_dir / f"earlier-{number}").exists():
        number += 1
    aside = out_dir / f"earlier-{number}"
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)


class RunLock:
    """A lock on out_dir, so that one run alone writes there. Rank 0 holds it for all ranks.

    The system drops it when its holder dies. Raises ValueError, naming the holder, where another
    run has it.
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

                # Windows forbids reading locked bytes: lock one far behind the text.
                self._file.seek(1 << 30)
                msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A forked child, such as a worker, must not hold it too.
                file = weakref.ref(self._file)
                os.register_at_fork(after_in_child=lambda: file() is None or file().close())
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"{out_dir} is in use by {holder}; stop it or take another out_dir"
            ) from None
        # The text names the holder, for the message of whoever comes next.
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


class StopSignal:
    """SIGTERM, Ctrl-C or a closed terminal (SIGHUP, unless nohup has it ignored).

    requested: this rank has had a signal; agreed: all ranks know, and stop at the same step. A
    second signal ends the process at once.
    """

    def __init__(self):
        self.requested = False
        self.agreed = False
        self.before = {}  # signal -> the handler it had
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self.before = {number: signal.signal(number, self.request) for number in numbers}

    def request(self, number: int, frame) -> None:
        self.requested = True
        # Not print(): the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, b"stopping after this step, then saving; once more: at once, unsaved\n")
        # The old handler comes back, so that a second signal has its usual effect.
        signal.signal(number, self.before[number])

    def heard(self, mesh) -> bool:
        """Has any rank had a signal? All ranks call it together and get the same answer."""
        self.agreed = self.agreed or mesh.sum(self.requested)[0] > 0
        return self.agreed

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
