"""Random edges thrown at runs of two ranks: always a sentence, and the same command again goes on.

Signals at any moment, a disk that takes no more, pipes that nobody reads, links, renamed and
damaged checkpoints, variables that are half set. 60 of them; EDGES=N in the environment takes
others, EDGES=N:M seeds N to M.
"""

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint import load
from metrics import logger

ROOT = Path(__file__).parent.parent
FIRST, LAST = map(int, (os.environ.get("EDGES", "0:60") + ":0").split(":")[:2])
SEEDS = range(FIRST, LAST or FIRST + 1)
STEPS = 60
FLAGS = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=16",
    "--batch_size=4",
    f"--steps={STEPS}",
    "--precision=fp32",
    "--compile=off",
    "--sample_tokens=0",
    "--plot=false",
    "--device=cpu",
    "--threads=1",
    "--eval_every=20",
    "--eval_tokens=256",
    "--save_every=10",
    "--timeout_minutes=0.5",
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_ranks(
    folder: Path,
    words: list[str],
    during=lambda processes: None,
    environments=({}, {}),
    before=None,
    stdout=subprocess.PIPE,
) -> list[tuple[int, str]]:
    """[(exit status, stderr)] of a run of two processes; during(processes) happens to them
    meanwhile."""
    port, processes = str(free_port()), []
    for rank, changes in enumerate(environments):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        place = {k: v for k, v in (os.environ | place | changes).items() if v is not None}
        err = open(folder / f"err-{rank}", "w")
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *FLAGS, *words],
                env=place,
                cwd=folder,
                stdout=stdout,
                stderr=err,
                preexec_fn=before,
            )
        )
    during(processes)
    for process in processes:
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            pytest.fail("a rank never ended")
        if process.stdout is not None:
            process.stdout.close()
    return [
        (p.returncode, (folder / f"err-{rank}").read_text()) for rank, p in enumerate(processes)
    ]


def said_well(results: list[tuple[int, str]], killed=()) -> None:
    for rank, (status, err) in enumerate(results):
        if rank in killed:
            continue
        assert "Traceback" not in err, err[-2000:]
        assert status in (0, 1, 2), (status, err[-500:])
        if status:
            assert "train.py: " in err, err[-500:]


def step_of(out: Path) -> int:
    try:
        return max((row["step"] for row in logger.read_metrics(out / "metrics.jsonl")), default=0)
    except OSError:
        return 0


def wait_for(out: Path, step: int, processes) -> None:
    end = time.monotonic() + 60
    while (
        step_of(out) < step and time.monotonic() < end and any(p.poll() is None for p in processes)
    ):
        time.sleep(0.02)


def no_room(kilobytes: int):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, resource.RLIM_INFINITY))

    return limit


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")
@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_is_said_and_the_same_command_goes_on(seed, text, tmp_path):
    rng, out = random.Random(seed), tmp_path / "out"
    shutil.copy(text, tmp_path / "text.txt")
    words, at = ["--data=text.txt", "--out_dir=out"], rng.randrange(0, STEPS)
    kind = rng.choice(
        [
            "signal",
            "signal",
            "kill",
            "pipe",
            "room",
            "variable",
            "damage",
            "lost",
            "link",
            "renamed",
            "edited",
        ]
    )
    print(f"seed {seed}: {kind} at step {at}")
    if kind == "signal":
        number, ranks = (
            rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]),
            rng.choice([[0], [1], [0, 1]]),
        )

        def during(processes):
            wait_for(out, max(at, 1), processes)
            for rank in ranks:
                processes[rank].send_signal(number)

        results = two_ranks(tmp_path, words, during)
        said_well(results)
        assert [status for status, _ in results] == [0, 0] and load.newest(out) is not None
    elif kind == "kill":
        rank = rng.randrange(2)

        def during(processes):
            wait_for(out, at, processes)
            processes[rank].kill()

        said_well(two_ranks(tmp_path, words, during), killed=[rank])
    elif kind == "pipe":

        def during(processes):
            wait_for(out, at, processes)
            for process in processes:
                process.stdout.close()

        results = two_ranks(tmp_path, words, during)
        said_well(results)
        assert [status for status, _ in results] == [0, 0] and load.newest(out).step == STEPS
    elif kind == "room":
        said_well(two_ranks(tmp_path, words, before=no_room(rng.choice([1, 4, 16, 64]))))
    elif kind == "variable":
        name = rng.choice(["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
        value = rng.choice([None, "x", "-1", "70000"]) if name != "MASTER_ADDR" else None
        value = None if name == "WORLD_SIZE" and value == "70000" else value
        results = two_ranks(tmp_path, words, environments=({name: value}, {name: value}))
        said_well(results)
    else:
        assert [status for status, _ in two_ranks(tmp_path, [*words, f"--steps={at + 1}"])] == [
            0,
            0,
        ]
        newest = load.newest(out).path
        if kind == "damage":
            file = rng.choice(sorted(newest.iterdir()))
            file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
        elif kind == "lost":
            name = rng.choice(["metrics.jsonl", "train.log", "config.toml"])
            (out / name).unlink()
        elif kind == "link":
            out.rename(tmp_path / "elsewhere")
            out.symlink_to(tmp_path / "elsewhere")
        elif kind == "renamed":  # a branch from a checkpoint under another name
            newest.rename(tmp_path / "mine")
            words = [*words, "--resume=mine"]
            words[1] = "--out_dir=branch"
            out = tmp_path / "branch"
        elif kind == "edited":  # as an editor saves: refused until it is as it was
            before = (tmp_path / "text.txt").read_bytes()
            (tmp_path / "text.txt").write_bytes(before[: len(before) // 2])
            results = two_ranks(tmp_path, words)
            said_well(results)
            assert at + 1 == STEPS or [status for status, _ in results] == [2, 2]
            (tmp_path / "text.txt").write_bytes(before)
    again = two_ranks(tmp_path, words)
    if (
        kind == "damage" and load.newest(out) is None
    ):  # its only checkpoint: said, and not begun anew unasked
        said_well(again)
        again = two_ranks(tmp_path, [*words, "--resume=never"])
    if kind == "renamed" and at + 1 == STEPS:  # a branch from its end
        said_well(again)
        return
    said_well(again)
    assert [status for status, _ in again] == [0, 0], again
    assert load.newest(out).step == STEPS
