"""Checkpoints written beside training: what is in them, how long training waits, what a full disk
costs."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import device_flags, run_ranks
from test_checkpoint import grid, in_a_fork, leftovers, needs_fork, random_bits, raw, steps
from test_train import go, trace

from checkpoint import load
from checkpoint import save as saving
from checkpoint.early_stopping import EarlyStopping
from checkpoint.load import newest
from checkpoint.save import Saver, prune, save
from checkpoint.slices import DTYPES, Slice, copied
from metrics import logger
from parallel.shard import Shard


@pytest.fixture
def gate(monkeypatch):
    """The background stands still before its first file until the gate is set."""
    gate, plain = threading.Event(), saving.write_file

    def write_file(path, pieces):
        assert gate.wait(20)
        return plain(path, pieces)

    monkeypatch.setattr(saving, "write_file", write_file)
    yield gate
    gate.set()


# ---- the copy ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_what_is_saved_is_the_state_at_the_call_bitwise(tmp_path, gate, device):
    tensors = {name: random_bits((5, 3), dtype).to(device) for name, dtype in DTYPES.items()}
    there = grid().to(device)
    tree = {
        "t": tensors,
        "columns": there.clone()[:, ::2],
        "turned": there.clone().T,
        "one": there.clone()[0, :1].expand(4),
        "part": [Slice(there.clone(), Shard((8, 6), (0, 0)))],
        "parameter": torch.nn.Parameter(there),
        "n": [1, 2],
    }
    want = {name: raw(t) for name, t in tensors.items()}
    saver = Saver(tmp_path)
    saver.save(7, tree)
    with torch.no_grad():
        others = tree["columns"], tree["turned"], tree["parameter"], tree["part"][0].tensor
        for t in (*others, *tensors.values()):
            (t if t.dtype == torch.float64 else t.view(torch.uint8)).zero_()
    tree["n"].append(3)
    tree["later"] = 1
    gate.set()
    saver.wait()
    read = newest(tmp_path).tree()
    assert {name: raw(t) for name, t in read["t"].items()} == want
    assert torch.equal(read["columns"], grid()[:, ::2]) and torch.equal(read["turned"], grid().T)
    assert torch.equal(read["part"][0], grid()) and torch.equal(read["parameter"], grid())
    assert torch.equal(read["one"], torch.zeros(4, dtype=torch.float64))
    assert read["n"] == [1, 2] and "later" not in read


@pytest.mark.gpu
def test_a_copy_shares_no_memory_and_is_contiguous(device):
    tree = {
        "a": [grid().to(device).T],
        "b": Slice(grid().to(device)[2:4], Shard((8, 6), (2, 0))),
        "c": torch.empty(0, 3, device=device),
        "d": None,
    }
    new = copied(tree)
    for old, t in (
        (tree["a"][0], new["a"][0]),
        (tree["b"].tensor, new["b"].tensor),
        (tree["c"], new["c"]),
    ):
        assert torch.equal(old.cpu(), t) and t.is_contiguous()
        assert (
            old.numel() == 0 or old.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()
        )
    assert (new["b"].shard, new["d"]) == (Shard((8, 6), (2, 0)), None)


# ---- the time line -------------------------------------------------------------------------------


def test_training_goes_on_while_the_background_writes(tmp_path, gate):
    saver = Saver(tmp_path)
    saver.save(1, {"w": grid()})
    assert saver.pop_events() == [] and steps(tmp_path) == []
    gate.set()
    saver.wait()
    assert steps(tmp_path) == [1]
    assert saver.pop_events() == [{"step": 1, "event": "save"}] and saver.pop_events() == []


def test_a_save_waits_for_the_one_before_and_the_last_for_all(tmp_path, gate):
    saver = Saver(tmp_path, keep=1)
    saver.save(1, {"v": 1})
    threading.Timer(0.1, gate.set).start()
    saver.save(2, {"v": 2})
    assert gate.is_set()
    saver.save(3, {"v": 3}, last=True)
    assert newest(tmp_path).tree() == {"v": 3} and steps(tmp_path) == [3]
    assert [e["step"] for e in saver.pop_events()] == [1, 2, 3]


def test_a_finished_save_is_news_without_being_asked_to_wait(tmp_path):
    saver, said = Saver(tmp_path), []
    saver.save(1, {})
    for _ in range(1000):
        said += saver.pop_events()
        time.sleep(0.01 if not said else 0)
    assert said == [{"step": 1, "event": "save"}]


def test_a_tree_that_cannot_be_saved_is_an_error_of_the_next_call(tmp_path):
    saver = Saver(tmp_path)
    saver.save(1, {"c": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="step 1 was not saved, c is torch.complex64"):
        saver.wait()
    saver.save(2, {}, last=True)
    assert steps(tmp_path) == [2]


def test_steps_and_hours_say_when_a_checkpoint_is_due(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    saver = Saver(tmp_path, every=10, hours=0.5, keep_every=25, asynchronous=False)
    assert [step for step in range(60) if saver.due(step)] == [10, 20, 25, 30, 40, 50]
    never = Saver(tmp_path, every=0, asynchronous=False)
    assert not any(never.due(step) for step in range(60)) and not never.overdue()
    now += 1799
    assert not saver.overdue()
    now += 1
    assert saver.overdue()
    saver.save(1, {})
    assert not saver.overdue()


def test_every_mth_checkpoint_is_kept_beside_the_newest(tmp_path):
    for step in range(1, 11):
        save(tmp_path, step, {}, keep=2, keep_every=4)
    assert steps(tmp_path) == [4, 8, 9, 10]
    prune(tmp_path, 1, keep_every=8)
    assert steps(tmp_path) == [8, 10]
    prune(tmp_path, None, keep_every=8)
    assert steps(tmp_path) == [8, 10]


# ---- several ranks -------------------------------------------------------------------------------


def save_beside_collectives(rank, world, out_dir):
    saver, w, sums = Saver(out_dir, keep=2), torch.zeros(50_000), []
    for step in range(1, 31):
        w += 1
        if step % 5 == 0:
            saver.save(step, {"w": {str(rank): w}, "step": step})
        x = torch.full((1000,), float(rank + step))
        dist.all_reduce(x)
        sums.append(set(x.tolist()) == {world * step + sum(range(world))})
    saver.save(30, {"w": {str(rank): w}, "step": 30}, last=True)
    return all(sums), [e["step"] for e in saver.pop_events()]


def test_saving_does_not_mix_with_the_collectives_of_training(tmp_path):
    steps_saved = [5, 10, 15, 20, 25, 30, 30]
    assert run_ranks(3, save_beside_collectives, tmp_path) == [(True, steps_saved)] * 3
    for step in (25, 30):
        saved = load.load(tmp_path / f"step-{step:08d}")
        assert all((saved.tensor(f"w/{r}") == step).all() for r in range(3))


def save_the_best(rank, world, out_dir):
    plain = saving.gather
    for asynchronous in (False, True):
        saver = Saver(out_dir, asynchronous=asynchronous)
        best = EarlyStopping(out_dir / "best", 2, saver=saver)

        def gather(message, group):
            assert group is saver.group and group is not None
            # Two saves at once would mix their messages.
            in_background = threading.current_thread() is not threading.main_thread()
            assert in_background or saver.under_way is None
            return plain(message, group)

        saving.gather = gather
        tree = {"mine": {str(rank): torch.ones(3)}}
        saver.save(1, tree)
        assert best.update(1, 2.0, lambda: tree)
        saver.wait()
    return saver.pop_events(), load.newest(best.folder).step


def test_the_best_weights_are_saved_in_the_group_of_saving_after_the_save_under_way(tmp_path):
    saved = [{"step": 1, "event": "save"}], 1
    assert run_ranks(2, save_the_best, tmp_path) == [saved] * 2


def full_on_one(rank, world, out_dir, failing):
    saver, plain = Saver(out_dir), saving.write_file

    def full(path, pieces):
        raise OSError(errno.ENOSPC, "No space left on device")

    tree = {"mine": {str(rank): torch.ones(3)}}
    saver.save(1, tree)
    saver.wait()
    saving.write_file = full if rank == failing else plain
    saver.save(2, tree)
    saver.wait()
    try:
        saver.save(3, tree, last=True)
    except OSError as e:
        return saver.pop_events(), str(e)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_of_one_rank_is_the_same_news_on_all_and_the_last_save_raises(
    tmp_path, failing
):
    for (first, second), sentence in run_ranks(2, full_on_one, tmp_path, failing):
        assert first == {"step": 1, "event": "save"} and second["event"] == "save_failed"
        for step, text in ((2, second["text"]), (3, sentence)):  # noqa: F402
            assert (
                f"step {step} was not saved, rank {failing}: [Errno 28] No space left on device"
                in text
            )
            assert "are as they were; see that there is room" in text
    assert steps(tmp_path) == [1] and not leftovers(tmp_path)


def save_without_rank_3(rank, out_dir):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{out_dir}/store", 8)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=8)
    saver = Saver(out_dir)
    # Nothing was ever sent in the background: the first message of this rank is missing.
    if rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    saver.save(1, {"w": {str(rank): torch.ones(3)}})
    try:
        saver.wait()
    except RuntimeError as e:
        Path(out_dir, f"noticed_{rank}").write_text(str(e))
    os._exit(0)


@needs_fork
def test_a_rank_that_dies_before_its_first_word_in_the_background_is_noticed_by_all(tmp_path):
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=save_without_rank_3, args=(r, tmp_path)) for r in range(8)]
    for process in ranks:
        process.start()
    end = time.monotonic() + 15
    for process in ranks:
        process.join(max(0, end - time.monotonic()))
        process.kill()
    noticed = sorted(path.name for path in tmp_path.glob("noticed_*"))
    assert noticed == [f"noticed_{r}" for r in range(8) if r != 3]


# ---- a full disk ---------------------------------------------------------------------------------


class Quota:
    """open() for a disk with room for so many bytes more; what is over is not written."""

    def __init__(self, room: int):
        self.room = room

    def __call__(self, path, mode):
        file, plain = open(path, mode), None

        def write(piece):
            data = bytes(piece)[: self.room]
            self.room -= len(data)
            plain(data)
            if len(data) < len(piece):
                raise OSError(errno.ENOSPC, "No space left on device")

        class File:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

        plain = file.write
        File.write = staticmethod(write)
        return File()


@pytest.mark.parametrize(
    "asynchronous", [False, True], ids=["while training waits", "in the background"]
)
def test_a_disk_that_fills_up_at_any_byte_costs_nothing_but_that_save(
    tmp_path, monkeypatch, asynchronous
):
    tree = {"w": grid(), "b": torch.ones(7), "lr": 0.5}
    size = sum(f.stat().st_size for f in save(tmp_path, 1, tree).iterdir())
    saver = Saver(tmp_path, keep=1, asynchronous=asynchronous)
    for room in (0, 1, 8, 9, *range(50, size, size // 12), size - 1):
        monkeypatch.setattr(saving, "open", Quota(room), raising=False)
        saver.save(2, tree)
        saver.wait()
        (event,) = saver.pop_events()
        assert event["event"] == "save_failed" and "No space left" in event["text"], room
        with pytest.raises(OSError, match="step 2 was not saved, .* see that there is room"):
            saving.open.room = room
            saver.save(2, tree, last=True)
        assert steps(tmp_path) == [1] and not leftovers(tmp_path), room
        assert torch.equal(newest(tmp_path, warn=pytest.fail).tensor("w"), grid())
    monkeypatch.setattr(saving, "open", Quota(size), raising=False)
    saver.save(2, tree, last=True)
    assert steps(tmp_path) == [2]


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 1 MiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if (
        sys.platform != "linux"
        or os.geteuid()
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("no right to mount a file system here")
    try:
        tree = {"w": torch.ones(75_000)}  # 300 kB: three fit, four do not
        saver = Saver(disk)
        for step in range(1, 5):
            saver.save(step, tree)
        saver.wait()
        assert [e["event"] for e in saver.pop_events()] == ["save"] * 3 + ["save_failed"]
        with pytest.raises(OSError, match="No space left on device"):
            saver.save(5, tree, last=True)
        assert newest(disk, warn=pytest.fail).step == 3 and not leftovers(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- killed --------------------------------------------------------------------------------------


def die_in_the_background(out_dir, name, nth):
    torch.set_num_threads(1)
    saver, plain, calls = Saver(out_dir, keep=1), getattr(os, name), []

    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    setattr(os, name, dying)
    saver.save(2, {"w": grid()})
    saver.wait()


@needs_fork
@pytest.mark.parametrize(
    "name, nth, survives",
    [
        ("mkdir", 1, 1),
        ("fsync", 1, 1),
        ("fsync", 3, 1),
        ("rename", 1, 1),
        ("fsync", 4, 1),
        ("fsync", 5, 2),
        ("rename", 2, 2),
        ("rmdir", 1, 2),
    ],
)
def test_a_kill_during_a_background_save_leaves_a_whole_checkpoint(tmp_path, name, nth, survives):
    save(tmp_path, 1, {"w": grid()})
    process = in_a_fork(die_in_the_background, tmp_path, name, nth)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = newest(tmp_path, warn=pytest.fail)
    assert found.step == survives and torch.equal(found.tensor("w"), grid())


def raise_while_saving(out_dir):
    torch.set_num_threads(1)
    plain = saving.write_file
    saving.write_file = lambda path, pieces: (time.sleep(0.1), plain(path, pieces))[1]
    saving.ASIDE = 1  # a thread begins when the program is ending
    Saver(out_dir).save(1, {"w": grid()})
    raise SystemExit(3)


@needs_fork
def test_a_run_that_fails_finishes_the_save_under_way(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=raise_while_saving, args=(tmp_path,)
    )
    process.start()
    process.join()
    assert process.exitcode == 3 and newest(tmp_path).step == 1


# ---- the whole run -------------------------------------------------------------------------------


def events(out_dir) -> list:
    found = logger.read_metrics(Path(out_dir) / "metrics.jsonl")
    return [(row["step"], row["event"]) for row in found if row.get("event", "").startswith("save")]


@pytest.mark.gpu
def test_a_run_is_bitwise_the_same_and_saves_the_same_in_the_background(
    tmp_path, text, device, deterministic
):
    for how in ("true", "false"):
        go(text, tmp_path / how, *device_flags(device), f"--async_save={how}", "--keep=none")
        assert events(tmp_path / how) == [(5, "save"), (10, "save"), (12, "save")]
    assert trace(tmp_path / "true") == trace(tmp_path / "false")
    for step in (5, 10, 12):
        one, two = (load.load(tmp_path / how / f"step-{step:08d}") for how in ("true", "false"))
        assert one.names() == two.names()
        assert all(raw(one.tensor(name)) == raw(two.tensor(name)) for name in one.names())


def full_in_the_middle(monkeypatch, failing: set):
    plain = saving.write_file

    def write_file(path, pieces):
        if int(path.parent.name[-8:]) in failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(path, pieces)

    monkeypatch.setattr(saving, "write_file", write_file)


@pytest.mark.parametrize("how", ["true", "false"])
def test_a_disk_that_is_full_for_a_while_does_not_stop_the_run(tmp_path, text, monkeypatch, how):
    full_in_the_middle(monkeypatch, {5})
    assert go(text, tmp_path, f"--async_save={how}")["step"] == 12
    assert events(tmp_path) == [(5, "save_failed"), (10, "save"), (12, "save")]


# In a process of its own, for a run that failed keeps its lock until it ends
def told(rank, world, *args):
    with pytest.raises(OSError) as e:
        go(*args)
    return str(e.value)


def test_a_last_save_that_fails_is_an_error_and_the_same_command_goes_on(
    tmp_path, text, monkeypatch
):
    go(text, tmp_path / "whole")
    full_in_the_middle(monkeypatch, {12})
    (sentence,) = run_ranks(1, told, text, tmp_path / "full")
    assert "step 12 was not saved, [Errno 28] No space left on device; the earlier" in sentence
    monkeypatch.undo()
    go(text, tmp_path / "full")
    assert trace(tmp_path / "full") == trace(tmp_path / "whole")


def test_hours_and_every_mth_are_flags(tmp_path, text):
    go(text, tmp_path / "hours", "--save_hours=0", "--save_every=0", "--keep=none", "--steps=3")
    assert steps(tmp_path / "hours") == [1, 2, 3]
    go(text, tmp_path / "mth", "--keep_every=4", "--save_every=5", "--keep=1")
    assert steps(tmp_path / "mth") == [4, 8, 12]
