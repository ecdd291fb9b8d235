"""What a rank says when another one dies or hangs, and what each rank was doing meanwhile.

`explain` turns the error that the death or the silence of a peer raises into one sentence with
rank, step and place. It cannot say who is guilty: all who wait look alike. For that there is
--debug_ranks=true, by which each rank keeps a diary, and a reader that puts the diaries side by
side:

    OUT_DIR/debug/rank_3.log
        2026-11-21 17:03:12 start: process 4711 on node0, pp 0 dp 3 cp 0 tp 0
        2026-11-21 17:03:15 step 36
        2026-11-21 17:03:16 step 37
        Timeout (0:01:00)!                      stands too long: the stacks
          File ".../parallel/mesh.py", line 41 in sum

    python -m parallel.watchdog OUT_DIR
        step 37: rank 300, silent for 55 s, its last word: step 37
        step 38: ranks 0 1 2 3 4 5 6 7 ... (511), in sum (parallel/mesh.py:41)

The stacks come from a thread of C (faulthandler) that needs neither the interpreter nor its lock,
after each tenth of the time that a collective waits at most: what is stuck in C writes them too,
and only what is stopped, dead or cut off from the disk is silent. `kill -USR1 PROCESS` asks for one
at once. A crash (SIGSEGV, NCCL's abort) leaves its stack there as well. A step costs a line of 27
bytes or so.
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
    """The log of one rank, OUT_DIR/debug/rank_N.log; a restart goes on at its end. `folder` None:
    nothing."""

    def __init__(self, folder: Path | None, mesh, minutes: float):
        self.file, self.patience = None, minutes * 60 / 10
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        # Of an earlier, larger world
        for path in folder.glob("rank_*.log") if mesh.rank == 0 else ():
            if path.stem[5:].isdigit() and int(path.stem[5:]) >= mesh.world:
                path.unlink(missing_ok=True)
        self.file = open(folder / f"rank_{mesh.rank}.log", "a", buffering=1, encoding="utf-8")
        faulthandler.enable(self.file)
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, self.file)
        place = " ".join(f"{axis} {i}" for axis, i in mesh.coords.items())
        self._say(f"start: process {os.getpid()} on {socket.gethostname()}, {place}")
        self._wait()

    def step(self, number: int) -> None:
        """This rank begins what leads to step `number`."""
        if self.file is not None:
            self._say(f"step {number}")
            self._wait()

    def close(self) -> None:
        if self.file is not None:
            faulthandler.cancel_dump_traceback_later()
            if hasattr(signal, "SIGUSR1"):
                faulthandler.unregister(signal.SIGUSR1)
            faulthandler.enable(sys.__stderr__) if sys.__stderr__ else faulthandler.disable()
            self._say("end")
            with contextlib.suppress(OSError):
                self.file.close()
            self.file = None

    def _wait(self) -> None:
        faulthandler.dump_traceback_later(self.patience, repeat=True, file=self.file)

    def _say(self, what: str) -> None:
        with contextlib.suppress(OSError):  # a full disk; a log is not worth a run
            self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}\n")


def own(file: str) -> str:
    """The path inside the repository, "" for files of others."""
    inside = Path(file).is_relative_to(ROOT) and "site-packages" not in file and file != __file__
    return Path(file).relative_to(ROOT).as_posix() if inside else ""


def explain(error: RuntimeError, minutes: float | None = None) -> str | None:
    """The sentence for an error that another rank's death or silence raised; None for any other
    error."""
    said = str(error).lower()
    if not (isinstance(error, dist.DistError) or "gloo" in said):
        return None
    silent = any(word in said for word in SILENT)
    if not silent and not any(word in said for word in GONE):
        # Two collectives that do not fit each other, say: a traceback is what one needs
        return None
    step, place = "", "torch"
    for frame, line in traceback.walk_tb(error.__traceback__):
        if ours := own(frame.f_code.co_filename):
            place = f"{frame.f_code.co_name} ({ours}:{line})"
            # Those that train.main has done
            if not step and isinstance(frame.f_locals.get("step"), int):
                step = f"at step {frame.f_locals['step'] + 1}"
            minutes = getattr(frame.f_locals.get("cfg"), "timeout_minutes", minutes)
    who = f"rank {os.environ.get('RANK') or (dist.get_rank() if dist.is_initialized() else 0)}"
    who += f" {step or 'before the first step'}"
    if silent:
        long = "too long" if minutes is None else f"{minutes:g} minutes (--timeout_minutes)"
        return f"{who}: waited {long} for another rank, in {place}; --debug_ranks=true tells which"
    return (
        f"{who}: another rank has ended, noticed in {place}; what that one said last is the cause"
    )


def leave(error: RuntimeError) -> None:
    """Ends the process with the sentence and status 1 if the error is another rank's; at once, for
    with a peer gone the teardown of collectives may wait or abort. Any other error is raised
    again."""
    sentence = explain(error)
    if sentence is None:
        raise error
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody may be reading
        print(f"train.py: {sentence}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(1)


# ---- reading the diaries -------------------------------------------------------------------------
def last_word(text: str) -> tuple[int, str, bool]:
    """(the step it was at, what it was doing, whether it stood there) at the end of a diary."""
    text = text[max(text.rfind(" start: "), 0) :]  # of the last start
    steps = list(re.finditer(r"^[\d-]+ [\d:]+ step (\d+)$", text, re.MULTILINE))
    tail = text[steps[-1].start() :] if steps else text
    number = int(steps[-1][1]) if steps else 0
    if re.search(r"^[\d-]+ [\d:]+ end$", tail, re.MULTILINE):
        return number, "ended", False
    # Main is last
    main = re.split(r"^(?:Current thread|Thread) .*\n", tail, flags=re.MULTILINE)[-1]
    for file, line, name in re.findall(r'^  File "(.*)", line (\d+) in (\S+)', main, re.MULTILINE):
        if ours := own(file):
            return number, f"in {name} ({ours}:{line})", True
    return number, "", False


def report(out_dir: Path) -> list[str]:
    """One line for all ranks at the same place, the furthest behind first. A rank that stands and
    has not written its stack is silent."""
    paths = sorted((out_dir / "debug").glob("rank_*.log"), key=lambda path: int(path.stem[5:]))
    if not paths:
        raise ValueError(
            f"there is no debug/rank_0.log in {out_dir}: start the run with --debug_ranks=true"
        )
    newest, groups = max(path.stat().st_mtime for path in paths), {}
    for path in paths:
        step, doing, stood = last_word(path.read_text(encoding="utf-8", errors="replace"))
        behind = round(newest - path.stat().st_mtime)
        if not stood and doing != "ended":
            doing = (
                f"silent for {behind} s when the others wrote last" if behind > 1 else "on its way"
            )
        groups.setdefault((step, doing), []).append(int(path.stem[5:]))
    lines = []
    for (step, doing), ranks in sorted(
        groups.items(),
        key=lambda item: (item[0][0], not item[0][1].startswith("silent"), len(item[1])),
    ):
        shown = " ".join(map(str, ranks[:8])) + (f" ... ({len(ranks)})" if len(ranks) > 8 else "")
        lines.append(f"step {step}: rank{'s' * (len(ranks) > 1)} {shown}, {doing}")
    return lines


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise ValueError("type python -m parallel.watchdog OUT_DIR")
    print("\n".join(report(Path(arguments[0]))))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"parallel/watchdog.py: {error}")
