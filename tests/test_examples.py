"""The scripts of examples/ run: in this process, in forked ranks, and (slow) as they are typed."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401  before ranks are forked, or each spends a second on it
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
import torch.multiprocessing as mp

from examples import ddp_torchrun, fsdp2_any_optimizer, monitor_checkpoint, muon_alone, zero3_soap

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("[!_]*.py"))
needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="ranks are forked here"
)


def test_muon_learns_in_one_process(capsys):
    muon_alone.main()
    assert capsys.readouterr().out.startswith("loss 2.")


def test_an_example_that_learns_nothing_fails(monkeypatch):
    monkeypatch.setattr(muon_alone.Muon, "step", lambda self: None)
    with pytest.raises(AssertionError):
        muon_alone.main()


# ---- killed, and run again -----------------------------------------------------------------------
@needs_fork
def test_a_killed_loop_resumes_where_it_was_and_ends_as_if_nothing_had_happened(tmp_path, capsys):
    straight = monitor_checkpoint.main(tmp_path / "straight")
    out = capsys.readouterr().out
    assert len(straight) == 200 and "resumes" not in out
    assert re.search(r"step 120: loss .*: skip", out)

    # As a process of its own that a SIGKILL ends in the middle.
    killed = tmp_path / "killed"
    context = multiprocessing.get_context("fork")
    child = context.Process(target=monitor_checkpoint.main, args=(killed,))
    child.start()
    deadline = time.monotonic() + 30
    while not list(killed.glob("step-*")):
        assert time.monotonic() < deadline and child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL

    rest = monitor_checkpoint.main(killed)
    assert "resumes at step" in capsys.readouterr().out
    assert 0 < len(rest) < 200 and rest == straight[-len(rest) :]
    assert monitor_checkpoint.main(killed) == []  # nothing is left to do


# ---- several ranks -------------------------------------------------------------------------------
def as_rank(rank: int, port: int, main, words: tuple) -> None:
    """What torchrun does for a process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    main(*words)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@needs_fork
@pytest.mark.parametrize(
    "main, words",
    [
        (ddp_torchrun.main, ()),
        (zero3_soap.main, ()),
        (fsdp2_any_optimizer.main, ("shampoo",)),
        pytest.param(fsdp2_any_optimizer.main, ("muon",), marks=pytest.mark.slow),
        pytest.param(fsdp2_any_optimizer.main, ("adamw",), marks=pytest.mark.slow),
    ],
    ids=lambda x: getattr(x, "__module__", "-".join(x) if isinstance(x, tuple) else None),
)
def test_two_ranks_learn(main, words):
    mp.start_processes(as_rank, (free_port(), main, words), nprocs=2, start_method="fork")


@needs_fork
def test_a_rank_that_learns_nothing_fails(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(mp.ProcessRaisedException, match="assert total < first / 4"):
        mp.start_processes(
            as_rank, (free_port(), ddp_torchrun.main, ()), nprocs=2, start_method="fork"
        )


# ---- as they are typed ---------------------------------------------------------------------------
def command_of(name: str) -> list[str]:
    """The one that the script's docstring gives."""
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    [command] = re.findall(r"^    ((?:python|torchrun) .*)$", text, re.M)
    program, *words = command.split()
    start = [sys.executable]
    if program == "torchrun":
        start += ["-m", "torch.distributed.run"]
    return start + words


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_its_docstring_runs(name, tmp_path):
    words = [str(tmp_path) if word == "FOLDER" else word for word in command_of(name)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "loss" in ended.stdout, ended.stderr
