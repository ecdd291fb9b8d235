import io
import json
import math
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from metrics import logger
from metrics.logger import Logger, read_metrics, short
from run import announce

ROOT = Path(__file__).parent.parent


def train_row(step, **changes):
    return (
        dict(
            step=step,
            loss=4.0 / step,
            lr=2e-2,
            grad_norm=0.83,
            tokens=step * 512,
            tokens_per_s=131072.0,
            mfu=None,
            step_s=0.1,
        )
        | changes
    )


def eval_row(step, **changes):
    return dict(step=step, val_loss=1.5, val_bpb=None, val_accuracy=0.5, perplexity=4.48) | changes


@pytest.fixture
def time_is(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self):
        return True


# ---- metrics.jsonl


def test_each_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    log = Logger(tmp_path / "deep" / "run", steps=10)
    log.evaluation(eval_row(0))
    log.train(train_row(1))
    log.event(1, "save", path="step-00000001")
    log.event(1, "skip", "row 3 is banned")
    assert read_metrics(tmp_path / "deep" / "run" / "metrics.jsonl") == [
        eval_row(0),
        train_row(1),
        {"step": 1, "event": "save", "path": "step-00000001"},
        {"step": 1, "event": "skip", "text": "row 3 is banned"},
    ]


def test_floats_come_back_bitwise(tmp_path):
    losses = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308]
    log = Logger(tmp_path, steps=10)
    for step, loss in enumerate(losses, 1):
        log.train(train_row(step, loss=loss))
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == losses


def test_tensors_and_numpy_scalars_become_numbers(tmp_path):
    import numpy as np

    log = Logger(tmp_path, steps=10)
    log.train(
        train_row(
            torch.tensor(1),
            loss=torch.tensor(1 / 3, dtype=torch.float64),
            grad_norm=np.float32(0.5),
            peak_bytes=np.int64(7),
        )
    )
    log.event(
        1,
        "skip",
        rows=torch.tensor([3, 4]),
        seen=(np.float32("inf"), {"z": torch.tensor(math.nan)}),
    )
    first, event = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["step"], first["loss"], first["grad_norm"], first["peak_bytes"]) == (
        1,
        1 / 3,
        0.5,
        7,
    )
    assert event == {"step": 1, "event": "skip", "rows": [3, 4], "seen": [None, {"z": None}]}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_a_non_finite_number_is_null_and_causes_one_event(tmp_path, bad):
    log = Logger(tmp_path, steps=10)
    log.train(train_row(1, loss=bad))
    log.train(train_row(2, grad_norm=bad))
    log.evaluation(eval_row(2, perplexity=bad))
    rows = [
        json.loads(line, parse_constant=pytest.fail) for line in open(tmp_path / "metrics.jsonl")
    ]
    event = {"event": "nonfinite", "value": str(float(bad))}
    assert rows == [
        train_row(1, loss=None),
        event | {"step": 1, "field": "loss"},
        train_row(2, grad_norm=None),
        event | {"step": 2, "field": "grad_norm"},
        eval_row(2, perplexity=None),
        event | {"step": 2, "field": "perplexity"},
    ]


def test_read_metrics_leaves_out_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n{"step": 2, "lo\xff')
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]
    path.write_bytes(b"")
    assert read_metrics(path) == []


def test_read_metrics_leaves_out_steps_that_are_damage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [-1, 0, 2**53 - 1, 2**53, 10**22]
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
    assert [row["step"] for row in read_metrics(path)] == [0, 2**53 - 1]


# ---- starting and resuming


def test_a_new_run_refuses_the_file_of_another(tmp_path):
    Logger(tmp_path, steps=10).close()
    with pytest.raises(
        ValueError, match="belongs to another run: resume it or choose another --out_dir"
    ):
        Logger(tmp_path, steps=10)


def test_a_resumed_run_is_cut_after_the_loaded_step(tmp_path):
    log = Logger(tmp_path, steps=10)
    for step in range(1, 7):
        log.train(train_row(step))
        if step % 2 == 0:
            log.evaluation(eval_row(step))
            log.event(step, "save")
    log.close()
    # 4 train rows, 2 evaluations, 2 saves
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:8]
    log = Logger(tmp_path, steps=10, first_step=4, resumed=True)
    log.train(train_row(5))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[:8] == kept
    assert [json.loads(line) for line in lines[8:]] == [
        {"step": 4, "event": "resume"},
        train_row(5),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "train.log"]


def test_a_half_written_last_line_is_cut_on_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.')
    Logger(tmp_path, steps=10, first_step=2, resumed=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "loss": 2.5}', '{"step": 2, "event": "resume"}']


def test_a_kill_while_cutting_leaves_the_old_file_whole(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(logger.os, "fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Logger(tmp_path, steps=10, first_step=1, resumed=True)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_branch_resumes_into_an_empty_folder(tmp_path):
    Logger(tmp_path / "branch", steps=10, first_step=4, resumed=True)
    assert read_metrics(tmp_path / "branch" / "metrics.jsonl") == [{"step": 4, "event": "resume"}]


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    log = Logger(tmp_path / "run", steps=10, main=False, resumed=True)
    log.train({})
    log.evaluation({})
    log.event(1, "save")
    log.log("hello")
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


# ---- the terminal


def test_plain_lines_read_as_documented(tmp_path, capsys, time_is):
    log = Logger(tmp_path, steps=1000)
    log.evaluation(eval_row(0, val_bpb=2.1640))
    log.train(train_row(119, loss=1.9))
    time_is[0] += 0.05
    log.train(train_row(120, loss=1.8345, mfu=0.123))
    log.event(120, "save", path="step-00000120")
    log.event(120, "skip", "rows 3 and 4 are banned", rows=[3, 4])
    log.log("a plain line")
    expected = [
        "step    0/1000  val loss 1.5000  bpb 2.1640  accuracy 50.0%  perplexity 4.48",
        "step  119/1000  loss 1.9000  lr 2.0e-02  grad 0.83  131k tok/s",
        "step  120/1000  loss 1.8345  lr 2.0e-02  grad 0.83  131k tok/s  12.3% mfu  eta 00:44",
        "step  120/1000  save  path step-00000120",
        "step  120/1000  skip  rows 3 and 4 are banned",
        "a plain line",
    ]
    assert capsys.readouterr() == ("\n".join(expected) + "\n", "")
    assert (tmp_path / "train.log").read_text().splitlines() == expected


def test_nan_is_shown_as_nan(tmp_path, capsys):
    Logger(tmp_path, steps=10).train(train_row(1, loss=math.nan, grad_norm=math.inf))
    assert "loss nan  lr 2.0e-02  grad inf" in capsys.readouterr().out


def test_lines_come_at_most_every_two_seconds_but_the_first_and_last_always(
    tmp_path, capsys, time_is
):
    log = Logger(tmp_path, steps=1000)
    for step in range(1, 1001):
        time_is[0] += 0.01
        log.train(train_row(step))
        if step == 500:
            log.evaluation(eval_row(step))
    lines = capsys.readouterr().out.splitlines()
    shown = [int(line.split()[1].split("/")[0]) for line in lines]
    assert shown == [1, 2, 3, 203, 403, 500, 603, 803, 1000]
    assert "eta 00:04" in lines[-3]  # 397 steps of 10 ms


def test_the_eta_forgets_the_slow_first_step_and_counts_evaluation(tmp_path, capsys, time_is):
    log = Logger(tmp_path, steps=10_000)
    time_is[0] += 90  # compiling
    log.train(train_row(1))
    for step in range(2, 102):
        time_is[0] += 1 + (step % 10 == 0) * 5  # every tenth step an evaluation of 5 s
        log.train(train_row(step))
    assert "eta 4:" in capsys.readouterr().out.splitlines()[-1]  # 9899 steps of 1.5 s: 4:07


def test_the_eta_follows_a_change_of_speed(tmp_path, capsys, time_is):
    log = Logger(tmp_path, steps=1000)
    for step in range(1, 201):
        time_is[0] += 10 if step <= 100 else 1
        log.train(train_row(step))
    assert capsys.readouterr().out.splitlines()[-1].endswith("eta 13:20")  # 800 steps of 1 s


def test_a_rollback_restarts_the_eta(tmp_path, capsys, time_is):
    log = Logger(tmp_path, steps=100)
    for step in (50, 51, 40, 41):
        time_is[0] += 2
        log.train(train_row(step))
    lines = capsys.readouterr().out.splitlines()
    assert "eta" not in lines[2] and lines[3].endswith("eta 01:58")


def test_a_terminal_gets_a_bar_and_train_log_the_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    log = Logger(tmp_path, steps=20, first_step=10, resumed=True)
    log.evaluation(eval_row(10))
    for step in range(11, 21, 3):
        log.train(train_row(step))
    log.log("above the bar")
    log.close()
    assert "50%|" in screen.getvalue() and "10/20" in screen.getvalue()
    assert "100%|" in screen.getvalue() and "20/20" in screen.getvalue()
    assert "loss 0.2000  lr 2.0e-02  131k tok/s  eta 00:00  val loss 1.5000" in screen.getvalue()
    assert capsys.readouterr().out.splitlines() == [
        "step 10/20  resume",
        "step 10/20  val loss 1.5000  accuracy 50.0%  perplexity 4.48",
        "above the bar",
    ]
    assert "step 11/20  loss 0.3636" in (tmp_path / "train.log").read_text()


def test_text_the_terminal_cannot_encode_does_not_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), encoding="cp1252"))
    Logger(tmp_path, steps=1).log("snow \u2603")
    assert raw.getvalue().split() == [b"snow", b"?"]
    assert (tmp_path / "train.log").read_text(encoding="utf-8") == "snow \u2603\n"


@pytest.mark.parametrize(
    "n, text",
    [
        (0, "0"),
        (9.5, "9.5"),
        (950, "950"),
        (1500, "1.5k"),
        (131072, "131k"),
        (2.5e9, "2.5B"),
        (7.3e11, "730B"),
        (1e18, "1e+18"),
        (10**299, "1e+299"),
    ],
)
def test_large_numbers_are_short(n, text):
    assert short(n) == text


def test_importing_logger_is_cheap():
    code = (
        "import sys, metrics.logger; "
        "print({'torch', 'numpy', 'tqdm', 'matplotlib'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent.parent,
        ).stdout
        == "set()\n"
    )


# ---- tables, TensorBoard, Weights & Biases


def test_a_csv_is_metrics_jsonl(tmp_path):
    import csv

    log = Logger(tmp_path, steps=10)
    log.evaluation(eval_row(0))
    for step, loss in enumerate([0.1 + 0.2, 1 / 3, math.nan], 1):
        log.train(train_row(step, loss=loss))
    log.event(3, "skip", 'the "second", row', rows=[3, 4])
    argv = [sys.executable, "-m", "metrics.plot", str(tmp_path), "--csv"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'metrics.csv'}\n", done.stderr

    def read(text):
        try:
            return json.loads(text)
        except ValueError:
            return text

    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as file:
        back = [{name: read(x) for name, x in row.items() if x} for row in csv.DictReader(file)]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    for was, row in zip(rows := read_metrics(tmp_path / "metrics.jsonl"), back, strict=True):
        value = row.pop("value", None)  # JSON reads nan as a number
        assert str(value) == str(was.pop("value", None))
        assert row == {name: x for name, x in was.items() if x is not None}
    assert len(rows) == 6
    assert subprocess.run([*argv, str(tmp_path)], capture_output=True, text=True).returncode == 2


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_number_and_a_resumed_run_its_own_alone(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    log = Logger(tmp_path, steps=10, tensorboard=True)
    log.evaluation(eval_row(0))
    for step in range(1, 7):
        log.train(train_row(step, loss=math.nan if step == 2 else 2.0**-step))
    log.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["loss"] == {s: 2.0**-s for s in (1, 3, 4, 5, 6)} and found["val_loss"] == {0: 1.5}
    assert (
        found["tokens"] == {s: 512 * s for s in range(1, 7)}
        and "step" not in found
        and "mfu" not in found
    )

    log = Logger(tmp_path, steps=10, first_step=4, resumed=True, tensorboard=True)
    log.train(train_row(5, loss=0.75))
    log.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["loss"] == {1: 0.5, 3: 0.125, 4: 0.0625, 5: 0.75} and found["val_loss"] == {0: 1.5}

    (tmp_path / "metrics.jsonl").unlink()  # a fresh start in the same folder
    log = Logger(tmp_path, steps=10, tensorboard=True)
    log.train(train_row(1, loss=0.25))
    log.close()
    assert scalars(tmp_path / "tensorboard")["loss"] == {1: 0.25}


def test_tensorboard_forgets_what_a_rollback_undid(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    log = Logger(tmp_path, steps=10, tensorboard=True)
    for step in range(1, 7):
        log.train(train_row(step, loss=float(step)))
    log.event(6, "rollback", "to 3", to=3, banned=[1, 2])
    for step in (4, 5):
        log.train(train_row(step, loss=0.25))
    log.close()
    assert scalars(tmp_path / "tensorboard")["loss"] == {1: 1.0, 2: 2.0, 3: 3.0, 4: 0.25, 5: 0.25}


class FakeRun:
    def __init__(self, **given):
        self.given, self.rows, self.steps, self.closed = given, [], [], False

    def define_metric(self, *names, step_metric):
        self.steps.append((*names, step_metric))

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.closed = True


def test_a_resumed_run_is_the_same_run_of_weights_and_biases(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setattr(wandb, "init", lambda **given: runs.append(FakeRun(**given)) or runs[-1])
    runs = []
    for first_step, resumed in ((0, False), (1, True)):
        log = Logger(
            tmp_path / "run", 10, first_step, resumed=resumed, wandb="mine", settings={"lr": 1}
        )
        log.train(train_row(first_step + 1, loss=math.inf if resumed else 0.5))
        log.close()
    assert [run.given["id"] for run in runs] == [
        (tmp_path / "run" / "wandb" / "id.txt").read_text()
    ] * 2
    assert all(run.given["project"] == "mine" and run.given["resume"] == "allow" for run in runs)
    assert runs[0].given["config"] == {"lr": 1} and runs[0].given["name"] == "run"
    assert runs[0].rows == [{k: x for k, x in train_row(1, loss=0.5).items() if x is not None}]
    assert "loss" not in runs[1].rows[0] and runs[1].steps == [("*", "step")] and runs[1].closed
    (tmp_path / "run" / "metrics.jsonl").unlink()
    Logger(tmp_path / "run", 10, wandb="true").close()
    assert runs[2].given["id"] != runs[0].given["id"] and runs[2].given["project"] == "nanoscale"


def test_an_offline_run_that_goes_on_does_not_fall_on_its_first_rows(tmp_path, monkeypatch):
    """Offline their run counts rows from 0 at each start; it is told to go on behind the earlier
    ones."""
    given = []

    class Offline(FakeRun):
        offline = True

        def log(self, row, step=None):
            given.append(step)

    fake = types.SimpleNamespace(
        init=lambda **more: Offline(**more), errors=types.SimpleNamespace(Error=OSError)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in range(3):
        if start:  # the folder is older by then
            os.utime(tmp_path / "wandb" / "id.txt", (time.time() - 60 * start,) * 2)
        log = Logger(tmp_path, 10, 2 * start, resumed=start > 0, wandb="mine")
        log.train(train_row(2 * start + 1))
        log.train(train_row(2 * start + 2))
        log.close()
    first, second, *rest = given
    assert (first, second) == (None, None) and rest[1] is rest[3] is None
    assert 59_000 < rest[0] < 119_000 < rest[2]


@pytest.mark.slow
def test_weights_and_biases_offline_keeps_the_run_on_disk(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = Logger(tmp_path, 10, wandb="mine", settings={"lr": 1})
    log.train(train_row(1, loss=0.8125))
    log.close()
    name = (tmp_path / "wandb" / "id.txt").read_text()
    (record,) = tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb")
    # Another process of theirs writes it, and may do so after finish()
    deadline = time.monotonic() + 30
    while b"0.8125" not in record.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"0.8125" in record.read_bytes() and b"tokens_per_s" in record.read_bytes()


@pytest.mark.parametrize(
    "package, given, said",
    [
        (
            "tensorboard",
            {"tensorboard": True},
            "--tensorboard needs a package: pip install tensorboard",
        ),
        ("wandb", {"wandb": "mine"}, "--wandb needs a package: pip install wandb"),
    ],
)
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, package, given, said):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=said):
        Logger(tmp_path, steps=10, **given)
    assert not (tmp_path / "metrics.jsonl").exists()


# ---- the record


def test_the_record_says_what_this_ran_on(monkeypatch):
    import os
    import platform

    import numpy

    record = announce.environment(torch.device("cpu"), 3, "abc")
    assert (record["torch"], record["python"], record["numpy"]) == (
        torch.__version__,
        platform.python_version(),
        numpy.__version__,
    )
    assert (record["ranks"], record["data_sha256"], record["devices"]) == (3, "abc", 0)
    assert (
        record["cores"] == os.cpu_count()
        and record["nccl"] == "none"
        and "CPU with" in record["hardware"]
    )
    assert (
        record["cuda"] == (torch.version.cuda or "none") and record["commit"] and record["platform"]
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A big GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    record = announce.environment(torch.device("cuda"), 3, "abc")
    assert (record["hardware"], record["devices"], record["nccl"]) == ("A big GPU", 8, "2.28.9")
