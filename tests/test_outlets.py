"""Logs are not worth a run: full disks, closed pipes and terminals, long evaluations when somebody
asks to stop."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from checkpoint import load
from metrics import logger, outlets
from run import control, evaluate

ROOT = Path(__file__).parent.parent
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")
no_room = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
TINY = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=16",
    "--batch_size=2",
    "--precision=fp32",
    "--compile=off",
    "--sample_tokens=0",
    "--plot=false",
    "--device=cpu",
    "--threads=1",
]


def python(code: str, **more) -> subprocess.CompletedProcess:
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **more
    )


def command(text, out_dir, *more: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "train.py"),
        f"--data={text}",
        f"--out_dir={out_dir}",
        *TINY,
        *more,
    ]


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come"
        time.sleep(0.05)


# ---- files ---------------------------------------------------------------------------------------
@no_room
def test_a_full_disk_is_said_once_and_raises_nothing():
    said = []
    lines = outlets.LineFile("/dev/full", said.append)
    for i in range(5):
        lines.write(f"line {i}")
    lines.close()
    assert len(said) == 1 and "/dev/full cannot be written" in said[0] and lines.n_lost == 5


@posix
def test_lines_come_back_on_a_line_of_their_own_when_there_is_room_again(tmp_path):
    path = tmp_path / "log"
    run = python(f"""
import resource, signal
from metrics import outlets
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
said = []
lines = outlets.LineFile({str(path)!r}, said.append)
lines.write("first")
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
for word in ("second, too long", "third"): lines.write(word)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for word in ("fourth", "fifth"): lines.write(word)
print(said)
""")
    assert run.returncode == 0, run.stderr
    assert path.read_text().splitlines() == ["first", "seco", "fourth", "fifth"]
    said = eval(run.stdout)
    assert len(said) == 2 and "cannot be written" in said[0] and "2 lines are missing" in said[1]


def test_a_file_that_cannot_be_opened_is_the_users_to_mend(tmp_path):
    with pytest.raises(OSError):
        outlets.LineFile(tmp_path / "no folder" / "log", print)


def test_a_closed_file_loses_lines_and_no_run(tmp_path):
    said = []
    lines = outlets.LineFile(tmp_path / "log", said.append)
    lines.file.close()
    lines.write("line")
    assert len(said) == 1 and "closed" in said[0]


def test_letters_that_cannot_be_encoded_are_no_error(tmp_path):
    lines = outlets.LineFile(tmp_path / "log", print)
    lines.write("half a letter: \udc80")
    assert (tmp_path / "log").read_text(encoding="utf-8") == "half a letter: ?\n"


@no_room
@pytest.mark.parametrize("broken", ["metrics", "log", "both"])
def test_the_logger_goes_on_without_what_it_cannot_write(tmp_path, broken, capsys):
    log = logger.Logger(tmp_path, steps=3)
    files = {"metrics": ["metrics"], "log": ["log_file"], "both": ["metrics", "log_file"]}
    for name in files[broken]:
        getattr(log, name).file = open("/dev/full", "ab", buffering=0)
    for step in (1, 2, 3):
        log.train({"step": step, "loss": 1.0 / step})
    log.evaluation({"step": 3, "val_loss": 0.5})
    log.event(3, "save")
    log.close()
    printed = capsys.readouterr().out
    assert printed.count("cannot be written") == (2 if broken == "both" else 1)
    assert printed.count("loss") >= 3  # people still see them
    if broken == "log":
        assert [row["step"] for row in logger.read_metrics(tmp_path / "metrics.jsonl")] == [
            1,
            2,
            3,
            3,
            3,
        ]


def test_tensorboard_and_wandb_that_fail_are_left_out(tmp_path, capsys):
    log = logger.Logger(tmp_path, steps=2)
    seen = []

    def write(row):
        seen.append(row)
        raise RuntimeError("their thread is dead")

    log.others = [(write, lambda: seen.append("closed"), print)]
    for step in (1, 2):
        log.train({"step": step, "loss": 1.0})
    log.close()
    assert (
        len(seen) == 1 and "left out from now on: their thread is dead" in capsys.readouterr().out
    )


# ---- the terminal --------------------------------------------------------------------------------
@posix
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away_is_no_error_and_no_exit_status(stream):
    code = f"""
import os
from metrics.outlets import complain, print_line
reader, writer = os.pipe()
os.dup2(writer, sys.{stream}.fileno()); os.close(writer); os.close(reader)
speak = print_line if {stream == "stdout"} else complain
heard = [speak("hello") for _ in range({2 if stream == "stdout" else 1})]
print("still here", heard, file=sys.{"stderr" if stream == "stdout" else "stdout"})
"""
    run = python(code)
    assert run.returncode == 0 and "still here" in run.stdout + run.stderr
    assert "Error" not in run.stderr


@posix
@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_whose_reader_goes_away_ends_well_and_saves(text, tmp_path, merged):
    out = tmp_path / "out"
    writer = subprocess.Popen(
        command(text, out, "--steps=30", "--eval_every=5", "--eval_tokens=64", "--save_every=0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merged else subprocess.PIPE,
        text=True,
    )
    writer.stdout.readline()
    writer.stdout.close()
    error = "" if merged else writer.stderr.read()
    assert writer.wait(120) == 0 and "Broken" not in error
    assert load.newest(out).step == 30
    assert max(row["step"] for row in logger.read_metrics(out / "metrics.jsonl")) == 30
    assert "nobody reads the terminal" in (out / "train.log").read_text(encoding="utf-8")


# ---- signals -------------------------------------------------------------------------------------
@pytest.fixture
def started():
    """Starts processes as Popen does; what a failing test leaves running ends with it."""
    found = []
    yield lambda *args, **options: found.append(subprocess.Popen(*args, **options)) or found[-1]
    for run in found:
        run.kill()
        run.wait()


@posix
@pytest.mark.parametrize("ignored", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_closed_terminal_saves_unless_nohup_said_not_to_care(text, tmp_path, started, ignored):
    out = tmp_path / "out"
    # Under nohup these tests would ignore it, too.
    how = signal.SIG_IGN if ignored else signal.SIG_DFL
    run = started(
        command(text, out, "--steps=100000", "--eval_every=0", "--save_every=0"),
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, how),
    )
    metrics = out / "metrics.jsonl"
    until(lambda: metrics.exists() and '"step": 3,' in metrics.read_text())
    run.send_signal(signal.SIGHUP)
    if ignored:
        at = len(metrics.read_bytes())
        until(lambda: len(metrics.read_bytes()) > at + 2000)
        assert run.poll() is None
        run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 0
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert last["event"] == "save" and load.newest(out).step == last["step"]


@posix
def test_a_stop_during_a_long_evaluation_saves_at_once(tmp_path, started):
    """Its evaluation at step 4 takes minutes; the steps before make none."""
    out, long = tmp_path / "out", tmp_path / "long.txt"
    long.write_text("the cat sat on the mat. " * 400_000)
    words = ["--micro_batch_size=1", "--eval_tokens=100000000", "--save_every=0"]
    subprocess.run(
        command(long, out, *words, "--steps=3", "--eval_every=0"),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    run = started(
        command(long, out, *words, "--steps=1000", "--eval_every=4"), stdout=subprocess.DEVNULL
    )
    metrics = out / "metrics.jsonl"
    until(lambda: '"step": 4, "loss"' in metrics.read_text())
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    assert run.wait(20) == 0
    assert load.newest(out).step == 4
    assert not [row for row in logger.read_metrics(metrics) if "val_loss" in row]


class OneRank:
    sizes = {"pp": 1, "dp": 1, "tp": 1}
    coords = {"dp": 0, "tp": 0}

    def sum(self, *values):
        return [float(v) for v in values]


class Rows:
    block_size, per_epoch = 4, 1000


class Bytes:
    def byte_lengths(self, *_):
        return None


@pytest.mark.parametrize("stop_at", [None, 1, 3])
def test_an_evaluation_asks_now_and_then_and_its_sums_do_not_depend_on_it(stop_at):
    model = torch.nn.Linear(1, 1)
    model.config, model.loss_fn = types.SimpleNamespace(vocab_size=256), None
    model.n_correct, asked, seen = 1, [], []

    def each(batches, rows, on_loss):
        for i, numbers in enumerate(batches):
            seen.extend(numbers)
            on_loss(
                i,
                torch.tensor(float(sum(numbers))),
                torch.zeros(len(numbers), 4, dtype=torch.int64),
            )

    def stopped():
        asked.append(len(seen))
        return len(asked) == stop_at

    found = evaluate.evaluate(
        types.SimpleNamespace(model=model, evaluate=each),
        Rows(),
        4 * 100,
        3,
        Bytes(),
        OneRank(),
        True,
        stopped=stopped,
    )
    assert model.training
    if stop_at is None:
        assert seen == list(range(100)) and asked == [24, 48, 72, 96]
        assert found["val_loss"] == sum(range(100)) / 400 and found["val_accuracy"] == 34 / 400
    else:
        assert found is None and len(seen) == 24 * stop_at


def test_all_ranks_learn_that_one_was_asked_to_stop():
    stop = control.StopSignal()
    try:
        assert not stop.heard(OneRank()) and not stop.agreed
        stop.requested = True
        assert stop.heard(OneRank()) and stop.agreed
    finally:
        stop.close()


@pytest.mark.parametrize("file", ["configs/slurm.sh", "docs/multinode.md"])
def test_torchrun_is_told_to_wait_for_the_save(file):
    assert "--shutdown_timeout=" in (ROOT / file).read_text(encoding="utf-8")
