"""Runs that survive: killed ranks, nodes, launchers, hung ranks; and what they say when they do
not."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from test_train import ROOT, close, flags, go, rows, trace
from test_two_nodes import free_port

from checkpoint import load
from parallel import launch as mesh
from parallel import mesh as meshes
from parallel import watchdog

TEXT = str(ROOT / "model.py")
needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="forks and kills processes"
)
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs 127.0.0.2")


def begin(out_dir, *more: str, launch=()) -> subprocess.Popen:
    """train.py as a process, under torchrun with the options `launch`; all it says goes to
    out_dir.log."""
    words = ["-m", "torch.distributed.run", *launch] if launch else []
    with open(f"{out_dir}.log", "ab") as log:
        return subprocess.Popen(
            [
                sys.executable,
                *words,
                "train.py",
                *flags(TEXT, out_dir, "--debug_ranks=true", *more),
            ],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def said(out_dir) -> str:
    return Path(f"{out_dir}.log").read_text(encoding="utf-8", errors="replace")


def last_step(out_dir) -> int:
    return max((int(p.name[5:]) for p in Path(out_dir).glob("step-*")), default=0)


def wait_for(what, seconds: float = 60, every: float = 0.02):
    """what(), once it is true."""
    end = time.time() + seconds
    while not (result := what()):
        assert time.time() < end, "what the test waits for does not happen"
        time.sleep(every)
    return result


def process_of(rank: int, out_dir) -> int:
    """The process that is, or was last, this rank."""
    diary = (Path(out_dir) / "debug" / f"rank_{rank}.log").read_text(encoding="utf-8")
    return int(re.findall(r"start: process (\d+)", diary)[-1])


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def same_end(a, b) -> None:
    """Both runs have the same metrics, and the same bits in their last checkpoint."""
    assert trace(a) == trace(b)
    a, b = load.newest(a), load.newest(b)
    assert a.names() == b.names() and all(torch.equal(a.tensor(n), b.tensor(n)) for n in a.names())


TWO = ["--standalone", "--nproc_per_node=2", "--max-restarts=3", "--monitor-interval=0.5"]


# ---- many ranks ----------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [["--data_parallel=zero1"], ["--data_parallel=ddp", "--tp=2"]], ids=["zero1", "tp 2"]
)
def test_32_ranks_start_save_and_resume(tmp_path, layout):
    tiny = ["--n_layer=2", "--n_embd=32", "--n_head=2", "--block_size=16", "--vocab_size=256"]
    tiny += ["--batch_size=32", "--micro_batch_size=1", "--eval_every=0", "--precision=fp64"]
    tiny += ["--optim=adamw", "--schedule=constant"]
    go(TEXT, tmp_path / "one", *tiny, "--steps=8")
    many = ["--standalone", "--nproc_per_node=32"]
    for steps in (4, 8):
        run = begin(tmp_path / "many", *tiny, *layout, f"--steps={steps}", launch=many)
        assert run.wait(300) == 0, said(tmp_path / "many")
        assert last_step(tmp_path / "many") == steps
    one, found = (rows(tmp_path / run, "loss") for run in ("one", "many"))
    assert found.keys() == one.keys() == set(range(1, 9))
    close(found, one, 1e-10)


# ---- a rank dies ---------------------------------------------------------------------------------
@needs_fork
@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_and_the_run_is_bitwise_the_undisturbed_one(tmp_path):
    more = ["--steps=400", "--save_every=25", "--eval_every=0"]
    assert begin(tmp_path / "whole", *more, launch=TWO).wait(120) == 0
    out, killed = tmp_path / "killed", 0
    launcher = begin(out, *more, launch=TWO)
    for rank, step in ((1, 50), (0, 200)):
        wait_for(lambda: last_step(out) >= step)
        killed = process_of(rank, out)
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: process_of(rank, out) != killed)
    assert launcher.wait(120) == 0
    same_end(out, tmp_path / "whole")
    assert re.search(
        r"rank 0 at step \d+: another rank has ended, noticed in \w+ \(.*\.py:\d+\)", said(out)
    )
    assert re.search(r"rank 1 at step \d+: another rank has ended", said(out))
    assert "Traceback" not in said(out)


@needs_linux
@pytest.mark.slow
def test_when_a_node_is_lost_the_other_goes_on_alone_with_the_same_batch(tmp_path):
    port, out = free_port(), tmp_path / "two"
    more = [
        "--steps=300",
        "--save_every=25",
        "--eval_every=100",
        "--optim=adamw",
        "--precision=fp64",
    ]
    assert begin(tmp_path / "one", *more).wait(120) == 0
    nodes = [
        begin(
            out,
            *more,
            launch=[
                "--nnodes=1:2",
                "--nproc_per_node=1",
                "--max-restarts=3",
                "--monitor-interval=0.5",
                "--rdzv_id=loss",
                "--rdzv_backend=c10d",
                f"--rdzv_endpoint=127.0.0.1:{port}",
                f"--local_addr=127.0.0.{i + 1}",
                f"--rdzv_conf=last_call_timeout=10,is_host={i == 0}",
            ],
        )
        for i in range(2)
    ]
    wait_for(lambda: last_step(out) >= 75)
    parents = {process_of(rank, out): rank for rank in range(2)}
    lost = next(
        p for p in parents if Path(f"/proc/{p}/stat").read_text().split()[3] == str(nodes[1].pid)
    )
    nodes[1].kill()
    os.kill(lost, signal.SIGKILL)
    nodes[1].wait()
    assert nodes[0].wait(120) == 0
    assert "\nlayout     2 ranks: dp 2" in said(out) and "\nlayout     1 process" in said(out)
    for kind in ("loss", "val_loss"):
        close(rows(out, kind), rows(tmp_path / "one", kind), 1e-10)
    assert rows(out).keys() == set(range(1, 301))


# ---- the only process dies -----------------------------------------------------------------------
@needs_fork
@pytest.mark.slow
def test_killed_thirty_times_at_random_moments_is_bitwise_the_undisturbed_run(tmp_path):
    """Each step is saved, so that many a kill falls into a save; some fall into the start."""
    more = ["--steps=400", "--n_embd=128", "--dropout=0.1", "--eval_every=50", "--save_every=1"]
    assert begin(tmp_path / "whole", *more, "--save_every=0").wait(200) == 0
    rng, out, in_a_save = random.Random(2718), tmp_path / "killed", 0
    for life in range(30):
        process, before = begin(out, *more), last_step(out)
        if life % 3 == 0:
            time.sleep(rng.uniform(0, 4))
        else:
            goal = before + rng.randint(1, 12)
            wait_for(lambda: last_step(out) >= goal, every=0.001)
            time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGTERM if life % 10 == 4 else signal.SIGKILL)
        assert process.wait(60) in (0, -signal.SIGTERM, -signal.SIGKILL) and last_step(out) < 400
        in_a_save += any(path.name.startswith(".tmp-step") for path in out.glob(".tmp*"))
    assert begin(out, *more).wait(200) == 0
    same_end(out, tmp_path / "whole")
    assert rows(out, "val_loss") == rows(tmp_path / "whole", "val_loss")
    assert in_a_save >= 3 and not list(out.glob(".tmp*"))


@needs_fork
@pytest.mark.slow
def test_a_hung_rank_ends_the_run_in_time_and_the_diaries_say_which_it_was(tmp_path):
    out = tmp_path / "hung"
    launcher = begin(
        out,
        "--steps=100000",
        "--eval_every=0",
        "--save_every=50",
        "--timeout_minutes=0.1",
        launch=TWO[:2],
    )
    wait_for(lambda: last_step(out) >= 50)
    hung = process_of(1, out)
    os.kill(hung, signal.SIGSTOP)
    try:
        wait_for(lambda: "waited" in said(out), 15)
        words = r"train.py: rank 0 at step (\d+): waited 0.1 minutes .* in \w+ \(.*py:\d+\)"
        step = int(re.search(words, said(out))[1])
        told = watchdog.report(out)
        assert len(told) == 2 and re.fullmatch(
            rf"step {step}: rank 0, in \w+ \(.*\.py:\d+\)", told[1]
        )
        assert re.match(rf"step ({step}|{step - 1}): rank 1, silent for \d s", told[0])
    finally:
        os.kill(hung, signal.SIGKILL)  # torchrun would ask it politely for 30 s
        assert launcher.wait(60) == 1


# ---- the launcher dies ---------------------------------------------------------------------------
@needs_fork
@pytest.mark.slow
def test_ranks_stop_when_torchrun_is_killed_and_the_same_command_goes_on(tmp_path):
    more, out = ["--steps=300", "--save_every=100", "--eval_every=0"], tmp_path / "killed"
    launcher = begin(out, *more, launch=TWO)
    wait_for(lambda: last_step(out) >= 100)
    ranks = [process_of(rank, out) for rank in range(2)]
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(map(alive, ranks)), seconds=10)
    assert "torchrun is gone, so this rank stops" in said(out)
    assert 100 < last_step(out) < 300 and last_step(out) % 100  # nothing was lost
    assert begin(out, *more, launch=TWO).wait(120) == 0
    assert begin(tmp_path / "whole", *more, launch=TWO).wait(120) == 0
    same_end(out, tmp_path / "whole")


@needs_fork
@pytest.mark.parametrize("machines, asked", [("1", True), ("2", False)])
def test_an_orphan_asks_itself_to_stop_and_where_other_machines_go_on_it_just_ends(
    tmp_path, monkeypatch, machines, asked
):
    monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
    if (launcher := os.fork()) == 0:
        parent = os.getpid()
        if os.fork() == 0:  # a rank, whose launcher ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            signal.signal(signal.SIGTERM, lambda *_: (tmp_path / "asked").touch())
            thread = threading.Thread(target=mesh.stop_with, args=(parent, 0.01, 0.2), daemon=True)
            thread.start()
            (tmp_path / "rank").write_text(str(os.getpid()))
            while True:
                time.sleep(0.01)
        wait_for((tmp_path / "rank").exists)
        os._exit(0)
    os.waitpid(launcher, 0)
    rank = int((tmp_path / "rank").read_text())
    wait_for(lambda: not alive(rank), 5)
    assert (tmp_path / "asked").exists() == asked


# ---- a restart -----------------------------------------------------------------------------------
class Dying:
    """A store whose user dies when it has been asked `last` times."""

    def __init__(self, store, last):
        self.store = store
        self.left = last

    def __getattr__(self, name):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return getattr(self.store, name)


def test_ranks_that_start_again_do_not_find_the_names_of_the_dead():
    """torchrun keeps one store over its restarts. Between two whole starts come some whose rank 0
    dies after a few messages, while ranks 1 and 2 wait and rank 3 never comes."""
    store, names = dist.HashStore(), []
    deaths = [(), (1,), (2,), (3,), (4,), (2, 3), (2, 2), (3, 1, 4)]
    with ThreadPoolExecutor(4) as pool:
        for lasts in deaths:
            store.set_timeout(timedelta(seconds=0.01))
            for last in lasts:
                for rank in (1, 0, 2):
                    with pytest.raises((dist.DistStoreError, KeyboardInterrupt)):
                        mesh.same_start(Dying(store, last if rank == 0 else 9), rank, 4)
            store.set_timeout(timedelta(seconds=5))
            for order in (1, 2, 3, 0), (0, 3, 1, 2):
                begun = []
                for rank in order:
                    begun.append(pool.submit(mesh.same_start, store, rank, 4))
                    time.sleep(0.003)
                said = {one.result(5) for one in begun}
                assert len(said) == 1
                names += said
    assert len({*names}) == 2 * len(deaths)


class Counted:
    """A store that counts what it is asked."""

    def __init__(self, store):
        self.store = store
        self.asked = 0

    def __getattr__(self, name):
        self.asked += 1
        return getattr(self.store, name)


def test_rank_0_asks_the_store_no_more_for_many_ranks_than_for_few():
    asked = {}
    for world in (2, 40):
        store = dist.HashStore()
        counted = [Counted(store) for _ in range(world)]
        with ThreadPoolExecutor(world) as pool:
            said = set(pool.map(mesh.same_start, counted, range(world), [world] * world))
        assert len(said) == 1
        asked[world] = counted[0].asked, max(one.asked for one in counted)
    assert asked[2] == asked[40] and asked[40][1] <= 5


def test_a_start_to_which_a_rank_does_not_come_ends_in_time_and_names_it():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    with ThreadPoolExecutor(2) as pool:
        begun = [pool.submit(mesh.same_start, store, rank, 15) for rank in (0, 1)]
        said = [watchdog.explain(one.exception(5)) for one in begun]
    assert all("another rank" in sentence for sentence in said)
    assert said[0].endswith("still missing: ranks 2 3 4 5 6 7 8 9 ... (13)")


# ---- what a rank says ----------------------------------------------------------------------------
def bereaved(rank: int, world: int, how: str) -> str | None:
    step = 36  # noqa: F841  the name that train.main gives to the steps done
    group = dist.new_group(timeout=timedelta(seconds=0.7 if how == "silent" else 10))
    dist.barrier()  # not before both ranks are connected
    if rank == 1:
        time.sleep(1.5) if how == "silent" else dist.destroy_process_group(group)
        return None
    time.sleep(0.1)
    try:
        dist.all_reduce(torch.zeros(3), group=group)
    except RuntimeError as error:
        return watchdog.explain(error, 10)


@pytest.mark.parametrize(
    "how, sentence",
    [
        (
            "silent",
            (
                r"rank 0 at step 37: waited 10 minutes .* another rank, in bereaved \(.*\);"
                r" --debug_ranks"
            ),
        ),
        (
            "gone",
            (
                r"rank 0 at step 37: another rank has ended, noticed in bereaved"
                r" \(tests/test_elastic.py:\d+\)"
            ),
        ),
    ],
)
def test_a_dead_or_silent_peer_is_one_sentence_with_rank_step_and_place(how, sentence):
    said = run_ranks(2, bereaved, how)[0]
    assert re.search(sentence, said) and "\n" not in said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("shape mismatch, timed out"),
        RuntimeError("[enforce fail at gloo/allreduce.cc:1] op.preamble.length <= op.nbytes"),
    ],
)
def test_an_error_of_our_own_keeps_its_traceback(error):
    assert watchdog.explain(error) is None
    with pytest.raises(RuntimeError) as raised:
        watchdog.leave(error)
    assert raised.value is error


# ---- the diaries ---------------------------------------------------------------------------------
@pytest.fixture
def alone():
    return meshes.make_mesh(torch.device("cpu"))


def test_without_debug_ranks_there_is_no_diary(tmp_path, alone):
    diary = watchdog.RankLog(None, alone, 10)
    diary.step(1)
    diary.close()
    with pytest.raises(ValueError, match="--debug_ranks=true"):
        watchdog.report(tmp_path)


def test_a_diary_has_each_step_and_where_a_rank_stands_that_stands_long(tmp_path, alone):
    diary = watchdog.RankLog(tmp_path / "debug", alone, minutes=0.02)
    (tmp_path / "debug" / "rank_1.log").write_text("2026-11-21 17:00:00 start: process 1\n")
    diary.step(1)
    diary.step(2)
    alone.sum(time.sleep(0.3) or 0)  # longer than a tenth of 1.2 s
    text = (tmp_path / "debug" / "rank_0.log").read_text()
    assert re.search(
        r" start: process \d+ on \S+, pp 0 dp 0 cp 0 tp 0\n.* step 1\n.* step 2\nTimeout", text
    )
    here = r"test_a_diary_has_each_step_and_\w+ \(tests/test_elastic.py:\d+\)"
    told = watchdog.report(tmp_path)
    assert re.fullmatch(rf"step 2: rank 0, in {here}", told[1]), told
    diary.close()
    assert watchdog.report(tmp_path)[1] == "step 2: rank 0, ended"
    with open(tmp_path / "other", "w"):  # which has the number of the file that was closed
        time.sleep(0.3)
    assert (tmp_path / "debug" / "rank_0.log").read_text().endswith(" end\n")  # and no more stacks
    assert (tmp_path / "other").read_text() == ""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1 here")
def test_a_signal_brings_a_stack_into_the_diary(tmp_path, alone):
    diary = watchdog.RankLog(tmp_path / "debug", alone, minutes=10)
    diary.step(5)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert "test_a_signal_brings_a_stack" in (tmp_path / "debug" / "rank_0.log").read_text()
    diary.close()


def test_the_reader_puts_those_first_who_are_behind(tmp_path):
    stack = "Timeout (0:01:00)!\nThread 0x1 (most recent call first):\n"
    stack += '  File "/torch/x.py", line 3 in reduce\n'
    stack += (
        f'  File "{ROOT}/parallel/mesh.py", line 41 in sum\n  File "{ROOT}/train.py", line 300 in'
        " main\n"
    )
    (tmp_path / "debug").mkdir()
    for rank in range(512):
        path, step = tmp_path / "debug" / f"rank_{rank}.log", 37 if rank == 300 else 38
        path.write_text(
            f"2026-11-21 17:00:00 start: process 1\n2026-11-21 17:00:00 step {step}\n"
            + (stack if rank != 300 else "")
        )
        os.utime(path, (1000, 1000 if rank == 300 else 1055))
    assert watchdog.report(tmp_path) == [
        "step 37: rank 300, silent for 55 s when the others wrote last",
        "step 38: ranks 0 1 2 3 4 5 6 7 ... (511), in sum (parallel/mesh.py:41)",
    ]
    for rank in range(2, 512):
        (tmp_path / "debug" / f"rank_{rank}.log").unlink()
    (tmp_path / "debug" / "rank_1.log").write_text("2026-11-21 17:00:00 step 38\n")
    os.utime(tmp_path / "debug" / "rank_1.log", (1000, 1000))
    assert (
        watchdog.report(tmp_path)[0]
        == "step 38: rank 1, silent for 55 s when the others wrote last"
    )


def other_text_on_rank_1(rank, world, folder):
    path = Path(folder) / f"text{rank}.txt"
    path.write_bytes(b"one text or another, " * 100 + bytes([65 + rank]))
    try:
        go(path, Path(folder) / "out")
    except ValueError as error:
        return str(error)


def test_machines_with_different_texts_are_refused_on_all_ranks(tmp_path):
    said = run_ranks(2, other_text_on_rank_1, str(tmp_path))
    assert all("is not the same on every machine" in sentence for sentence in said)
