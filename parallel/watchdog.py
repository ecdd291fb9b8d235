"""What a rank says when another one dies or hangs, and what each rank was doing meanwhile.

`explain` turns the error that a peer's death or silence raises into one sentence with rank, step
and place. It cannot say who is guilty: all ranks that wait look alike. --debug_ranks=true tells:
each rank keeps a log, and a reader puts the logs side by side:

    OUT_DIR/debug/rank_3.log
        2026-11-21 17:03:12 start: process 4711 on node0, pp 0 dp 3 cp 0 tp 0
        2026-11-21 17:03:15 step 36
        2026-11-21 17:03:16 step 37
        Timeout (0:01:00)!                      stuck in this step too long: the stacks
          File ".../parallel/mesh.py", line 41 in sum

    python -m parallel.watchdog OUT_DIR         (with metrics/outlets.py)
        step 37: rank 300, silent for 55 s when the others wrote last
        step 38: ranks 0 1 2 3 4 5 6 7 ... (511), in sum (parallel/mesh.py:41)

The stacks come from a thread of C (faulthandler) that needs neither the interpreter nor its lock.
It writes each time that a tenth of --timeout_minutes passes without a step. So a rank that is stuck
in C writes its stack too, and only a rank that is stopped, dead or cut off from the disk is silent.
`kill -USR1 PROCESS` asks for a stack at once. A crash (SIGSEGV, NCCL's abort) leaves its stack in
the log as well. A step costs a line of about 27 bytes.

With NCCL (read, not run yet) a rank that waits in vain raises nothing: NCCL's own watchdog thread
ends the process at the timeout (TORCH_NCCL_ASYNC_ERROR_HANDLING, 3 by default), and its lines take
the sentence's place. Python waits at the next number that it reads from the GPU, such as the loss:
there, not in the collective, is the stack in the log.

Example:
    import tempfile
    from pathlib import Path
    from parallel.watchdog import explain, report

    sentence = explain(RuntimeError("[gloo/pair.cc] Connection closed by peer [10.0.0.7]:4711"))
    print(sentence)
    assert "another rank has ended" in sentence
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "debug").mkdir()
        for rank, step in (0, 38), (1, 37):
            log = f"2026-11-21 17:03:12 start: process 1\\n2026-11-21 17:03:15 step {step}\\n"
            (Path(folder) / "debug" / f"rank_{rank}.log").write_text(log)
        print(*report(Path(folder)), sep="\\n")
        assert report(Path(folder))[0].startswith("step 37: rank 1")  # the one that is behind
"""

import contextlib
import faulthandler
import os
import re
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
# What gloo, NCCL and torch's store say when a peer is silent, and when it is gone.
SILENT = ("timed out", "timeout")
GONE = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "remote process exited",
    "connection refused",
    "connection was closed",
    "failed to recv",
    "failed to send",
)


class RankLog:
    """The log of one rank, OUT_DIR/debug/rank_N.log; a restart appends to it.

    folder: OUT_DIR/debug, or None: nothing is written. minutes: how long a collective waits.
    """

    def __init__(self, folder: Path | None, mesh, minutes: float):
        self.file = None
        self.patience = minutes * 60 / 10  # seconds
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if mesh.rank == 0:
            remove_higher_ranks(folder, mesh.world)
        self.file = open(folder / f"rank_{mesh.rank}.log", "a", buffering=1, encoding="utf-8")
        # This writes the stacks in a crash, the signal below whenever somebody asks, and
        # restart_timer where a step takes too long.
        faulthandler.enable(self.file)
        if hasattr(signal, "SIGUSR1"):  # not on Windows
            faulthandler.register(signal.SIGUSR1, self.file)
        place = " ".join(f"{axis} {i}" for axis, i in mesh.coords.items())
        self.log(f"start: process {os.getpid()} on {socket.gethostname()}, {place}")
        self.restart_timer()

    def step(self, number: int) -> None:
        """This rank begins the work that leads to step `number`."""
        if self.file is not None:
            self.log(f"step {number}")
            self.restart_timer()

    def close(self) -> None:
        if self.file is None:
            return
        # faulthandler knows the file by its number, which the next file opened may get.
        faulthandler.cancel_dump_traceback_later()
        if hasattr(signal, "SIGUSR1"):
            faulthandler.unregister(signal.SIGUSR1)
        if sys.__stderr__:
            faulthandler.enable(sys.__stderr__)
        else:
            faulthandler.disable()
        self.log("end")
        with contextlib.suppress(OSError):
            self.file.close()
        self.file = None

    def restart_timer(self) -> None:
        faulthandler.dump_traceback_later(self.patience, repeat=True, file=self.file)

    def log(self, text: str) -> None:
        # A full disk must not end the run for the sake of a log.
        with contextlib.suppress(OSError):
            self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def remove_higher_ranks(folder: Path, world: int) -> None:
    """Removes the logs that an earlier run with more ranks has left in the folder."""
    for path in folder.glob("rank_*.log"):
        rank = path.stem[5:]
        if rank.isdigit() and int(rank) >= world:
            path.unlink(missing_ok=True)


# ---- one sentence for an error -------------------------------------------------------------------
def own(file: str) -> str:
    """The path of a file of this repository, relative to its root; "" for any other file."""
    is_inside = Path(file).is_relative_to(ROOT) and "site-packages" not in file
    if not is_inside or file == __file__:
        return ""
    return Path(file).relative_to(ROOT).as_posix()


def explain(error: RuntimeError, minutes: float | None = None) -> str | None:
    """The sentence for an error that another rank's death or silence raised, else None.

    minutes: how long a collective waits, where the error's frames do not tell.
    """
    text = str(error).lower()
    if not (isinstance(error, dist.DistError) or "gloo" in text):
        return None
    is_silent = any(words in text for words in SILENT)
    is_gone = any(words in text for words in GONE)
    if not is_silent and not is_gone:
        # For example two collectives that do not match: a traceback is what helps there.
        return None

    # The innermost frame of this repository is the place. The outermost one with a `step` belongs
    # to train.main, which counts the steps done.
    step = ""
    place = "torch"
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = own(frame.f_code.co_filename)
        if not file:
            continue
        place = f"{frame.f_code.co_name} ({file}:{line})"
        if not step and isinstance(frame.f_locals.get("step"), int):
            step = f"at step {frame.f_locals['step'] + 1}"
        minutes = getattr(frame.f_locals.get("cfg"), "timeout_minutes", minutes)

    rank = os.environ.get("RANK")
    if not rank:
        rank = dist.get_rank() if dist.is_initialized() else 0
    who = f"rank {rank} {step or 'before the first step'}"
    if is_silent:
        long = "too long" if minutes is None else f"{minutes:g} minutes (--timeout_minutes)"
        # Before the ranks are connected rank 0 alone knows who has not come: parallel/launch.py.
        named = re.search(r"still missing: .*", str(error))
        which = named[0] if named else "--debug_ranks=true tells which"
        return f"{who}: waited {long} for another rank, in {place}; {which}"
    return (
        f"{who}: another rank has ended, noticed in {place}; what that one said last is the cause"
    )


def leave(error: RuntimeError) -> None:
    """Ends the process with the sentence and status 1 if another rank caused the error.

    It ends at once: with a peer gone, the teardown of collectives may wait or abort. Any other
    error is raised again.
    """
    sentence = explain(error)
    if sentence is None:
        raise error
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody may be reading
        print(f"train.py: {sentence}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(1)


# ---- reading the logs ----------------------------------------------------------------------------
def last_entry(text: str) -> tuple[int, str, bool]:
    """(the step a rank was at, what it was doing, whether it has written its stack there).

    text: its log. What it was doing is "" where the log does not tell.
    """
    # A restart appends to the log: what precedes the last start is about a process now gone.
    text = text[max(text.rfind(" start: "), 0) :]
    steps = list(re.finditer(r"^[\d-]+ [\d:]+ step (\d+)$", text, re.MULTILINE))
    step = 0
    if steps:
        step = int(steps[-1][1])
        text = text[steps[-1].start() :]
    if re.search(r"^[\d-]+ [\d:]+ end$", text, re.MULTILINE):
        return step, "ended", False
    # faulthandler writes the main thread last, and in it the innermost frame first.
    main_thread = re.split(r"^(?:Current thread|Thread) .*\n", text, flags=re.MULTILINE)[-1]
    frames = re.findall(r'^  File "(.*)", line (\d+) in (\S+)', main_thread, re.MULTILINE)
    for file, line, name in frames:
        if own(file):
            return step, f"in {name} ({own(file)}:{line})", True
    return step, "", False


def report(out_dir: Path) -> list[str]:
    """One line for all ranks at the same place, the furthest behind first.

    A rank that is neither done nor has written its stack counts as silent. Raises ValueError where
    the run has written no logs.
    """
    paths = sorted((out_dir / "debug").glob("rank_*.log"), key=lambda path: int(path.stem[5:]))
    if not paths:
        raise ValueError(
            f"there is no debug/rank_0.log in {out_dir}: start the run with --debug_ranks=true"
        )
    newest = max(path.stat().st_mtime for path in paths)
    places = {}  # (step, what it was doing) -> the ranks there
    for path in paths:
        step, doing, has_stack = last_entry(path.read_text(encoding="utf-8", errors="replace"))
        if not has_stack and doing != "ended":
            # All clocks are the file system's: compare with whoever wrote last, not with now.
            behind = round(newest - path.stat().st_mtime)
            doing = "on its way"
            if behind > 1:
                doing = f"silent for {behind} s when the others wrote last"
        places.setdefault((step, doing), []).append(int(path.stem[5:]))

    def suspicion(item: tuple) -> tuple:
        # The likeliest culprit first: whoever is behind, then whoever is silent, then the few that
        # are at another place than the many.
        (step, doing), ranks = item
        return step, not doing.startswith("silent"), len(ranks)

    lines = []
    for (step, doing), ranks in sorted(places.items(), key=suspicion):
        plural = "s" if len(ranks) > 1 else ""
        shown = " ".join(str(rank) for rank in ranks[:8])
        if len(ranks) > 8:
            shown += f" ... ({len(ranks)})"
        lines.append(f"step {step}: rank{plural} {shown}, {doing}")
    return lines


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise ValueError("type python -m parallel.watchdog OUT_DIR")
    print("\n".join(report(Path(arguments[0]))))


if __name__ == "__main__":
    from metrics.outlets import command

    command("parallel/watchdog.py", main, OSError)
