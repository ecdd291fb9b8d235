"""A search: what is tried, what is skipped, continued and stopped, what lies about in its folder,
and what is told. Most tests put a program of some lines in train.py's place, which logs a loss that
is least at lr=0.01 and has n_layer=4. It needs grad_clip seconds a step and clip_value seconds
before it begins."""

import csv
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import sweep
from search import proposals, results, trials
from search.proposals import choices

ROOT = Path(sweep.__file__).parent
FAKE = """
import fcntl, json, math, os, signal, sys, time
given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
lr, steps, stop = float(given.get("lr", 0.01)), int(given.get("steps", 12)), []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
time.sleep(float(given.get("clip_value", 0)))
lock = open(given["out_dir"] + "/.lock", "a+")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("train.py: " + given["out_dir"] + " is in use by another")
starts = open(given["out_dir"] + "/starts", "a")
starts.write(" ".join(sys.argv) + os.environ["OMP_NUM_THREADS"] + "\\n")
starts.close()
if given.get("optim") == "lion":
    sys.exit("some noise\\nValueError: no lions | here\\nmore noise")
path = given["out_dir"] + "/metrics.jsonl"
done = len(open(path).readlines()) // 2 if os.path.exists(path) else 0
with open(path, "a", buffering=1) as file:
    for step in range(done + 1, steps + 1):
        if stop:
            sys.exit(0)
        time.sleep(float(given.get("grad_clip", 0)))
        loss = abs(math.log10(lr) + 2) + abs(int(given.get("n_layer", 4)) - 4) / 10 + 1 / step
        row = {"step": step, "val_loss": loss if lr < 1 else None, "val_accuracy": 1 - loss / 9}
        file.write(json.dumps({"step": step, "loss": loss}) + "\\n" + json.dumps(row) + "\\n")
        if "patience" in given and step == 4:  # 1, 1/2, 1/3, 1/4: two are not better by 0.3
            break
os.makedirs(given["out_dir"] + f"/step-{step:08d}", exist_ok=True)
"""


@pytest.fixture
def go(tmp_path, monkeypatch):
    """A sweep in tmp_path/s with the program above: its exit status."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(sweep, "TRAIN", str(tmp_path / "fake.py"))
    # Which takes longer than all else
    monkeypatch.setattr(results, "picture", lambda *_: b"")
    return lambda *words: sweep.main([str(tmp_path / "s"), "--steps=12", *words])


def rows(folder) -> list[dict]:
    with open(folder / "s" / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def starts(folder, number: int) -> int:
    return len((folder / "s" / f"trial-{number:04d}" / "starts").read_text().splitlines())


# ---- what is tried
def test_ranges_are_read():
    assert choices("optim", "muon,adamw,muon") == ["muon", "adamw"]
    assert choices("opt.betas", "0.9,0.95;0.9,0.99") == ["0.9,0.95", "0.9,0.99"]
    assert choices("n_layer", "int:2:6") == ("int", 2, 6)
    assert choices("lr", "log:1e-4:1e-1") == ("log", 1e-4, 0.1)


def test_a_grid_is_every_combination(go, tmp_path):
    assert go("--search.lr=1e-3,1e-2", "--search.n_layer=int:3:5", "--jobs=2") == 0
    found = rows(tmp_path)
    assert {(r["lr"], r["n_layer"]) for r in found} == {
        (lr, n) for lr in ("1e-2", "1e-3") for n in "345"
    }
    # Best first
    assert (found[0]["lr"], found[0]["n_layer"], found[-1]["lr"]) == ("1e-2", "4", "1e-3")
    losses = [float(r["val_loss"]) for r in found]
    assert losses == sorted(losses) and losses[0] == pytest.approx(1 / 12)
    table = (tmp_path / "s" / "table.md").read_text().splitlines()
    assert len(table) == 8 and table[2].startswith("| 4 | done | 1e-2 | 4 | 0.0833 | 12 |")
    share = max(1, (os.cpu_count() or 1) // 2)
    folder = tmp_path / "s" / "trial-0000"
    said, threads = (folder / "starts").read_text(), os.environ.get("OMP_NUM_THREADS", share)
    assert said.endswith(f"--out_dir={folder}{threads}\n")


def test_random_draws_depend_on_seed_and_number_alone():
    def drawn(seed, *numbers):
        method = proposals.Proposals(
            "random",
            {"lr": ("log", 1e-4, 1e-1), "n_layer": ("int", 2, 6), "dropout": ("lin", 0.0, 0.3)},
            "val_loss",
            False,
            seed,
            20,
        )
        found = []
        for number in numbers:
            trial = type("Trial", (), {"number": number, "values": {}})()
            method.begin(trial)
            found.append(trial.values)
        return found

    many = drawn(0, *range(2000))
    assert drawn(0, 7) == [many[7]] and drawn(1, 7) != [many[7]]
    assert {v["n_layer"] for v in many} == {2, 3, 4, 5, 6}
    assert all(1e-4 <= v["lr"] <= 0.1 and 0 <= v["dropout"] <= 0.3 for v in many)
    # Uniform from -4 to -1: mean -2.5, a third in each decade
    logs = [math.log10(v["lr"]) for v in many]
    assert (
        abs(sum(logs) / 2000 + 2.5) < 0.1 and abs(sum(x < -3 for x in logs) / 2000 - 1 / 3) < 0.05
    )


def test_a_maximised_metric_puts_the_highest_first(go, tmp_path):
    assert go("--search.lr=1e-3,1e-2,3e-2", "--metric=val_accuracy") == 0
    assert [row["lr"] for row in rows(tmp_path)] == ["1e-2", "3e-2", "1e-3"]


# ---- what is skipped, continued, stopped
def test_the_same_command_skips_what_is_over_and_more_trials_go_on(go, tmp_path):
    words = ("--method=random", "--search.lr=log:1e-3:1e-1", "--steps=3")
    go(*words, "--trials=2")
    before = rows(tmp_path)
    go(*words, "--trials=3", "--jobs=2")
    assert [starts(tmp_path, n) for n in range(3)] == [1, 1, 1]
    assert all(row in rows(tmp_path) for row in before) and len(rows(tmp_path)) == 3


def test_a_killed_trial_is_continued_with_its_values(go, tmp_path):
    words = ("--method=random", "--trials=2", "--search.lr=log:1e-3:1e-1")
    go(*words)
    folder = tmp_path / "s" / "trial-0001"
    kept = json.loads((folder / "trial.json").read_text())
    (folder / "trial.json").write_text(
        json.dumps(kept | {"status": "unfinished", "values": {"lr": 0.01}})
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:10]))
    go(*words)
    assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (1, 2)
    best = rows(tmp_path)[0]
    assert (best["trial"], best["lr"], best["status"], best["steps"]) == ("1", "0.01", "done", "12")


def test_another_search_in_the_same_folder_is_refused(go):
    words = ["--search.lr=1e-3,1e-2", "--steps=2", "--dropout=0.1"]
    go(*words)
    assert go(words[0], words[2], words[1], "--jobs=3") == 0  # the same in another order
    for other in (
        ["--search.lr=1e-3,2e-2", *words[1:]],
        [*words, "--steps=3"],
        words[:2],
        [*words, "--metric=val_accuracy"],
        [*words, "--search.n_layer=2,3"],
    ):
        with pytest.raises(ValueError, match="holds a search with .*, now it is .*another folder"):
            go(*other)


def as_process(folder, *words) -> list[str]:
    """The command of a search in a process of its own, with the program above."""
    (folder / "fake.py").write_text(FAKE)
    code = (
        f"import sys, sweep; sweep.TRAIN = {str(folder / 'fake.py')!r}; "
        "sweep.results.picture = lambda *_: b''; sys.exit(sweep.main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", code, str(folder / "s"), *words]


def begun(folder, argv: list[str], *paths: str) -> subprocess.Popen:
    """The search, when these paths are in its folder."""
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not all((folder / "s" / path).exists() for path in paths):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_search_stops_its_trials_and_goes_on_later(tmp_path, number):
    argv = as_process(
        tmp_path, "--search.lr=1e-3,1e-2,1e-1", "--jobs=2", "--grad_clip=0.3", "--steps=20"
    )
    process = begun(tmp_path, argv, "trial-0000/metrics.jsonl", "trial-0001/metrics.jsonl")
    process.send_signal(number)
    assert process.wait(120) == 0
    # The third was never begun
    assert [row["status"] for row in rows(tmp_path)] == ["unfinished"] * 2
    assert subprocess.run(argv, cwd=ROOT, capture_output=True, timeout=240).returncode == 0
    assert [(row["status"], row["steps"]) for row in rows(tmp_path)] == [("done", "20")] * 3


@pytest.mark.slow
# In the midst, and before it has a lock of its own
@pytest.mark.parametrize("delay", ["0.01", "3"])
def test_what_a_killed_search_left_running_is_waited_for_and_counts(tmp_path, delay):
    argv = as_process(
        tmp_path, "--search.lr=1e-3,1e-2", "--grad_clip=0.4", "--steps=20", f"--clip_value={delay}"
    )
    ready = "trial-0000/metrics.jsonl" if delay == "0.01" else "trial-0000/output.log"
    process = begun(tmp_path, argv, ready)
    process.kill()
    process.wait()
    again = begun(tmp_path, argv, "table.md" if delay == "0.01" else ready)
    said = again.communicate(timeout=240)[0]
    assert again.returncode == 0 and "trial-0000  still runs" in said and "waited for" in said
    assert [(row["status"], row["steps"], row["error"]) for row in rows(tmp_path)] == [
        ("done", "20", "")
    ] * 2
    # Its last checkpoint told that it was over
    assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (1, 1)


@pytest.mark.slow
def test_what_a_killed_search_left_running_outlives_a_second_one_that_is_stopped(tmp_path):
    argv = as_process(tmp_path, "--search.lr=1e-3,1e-2", "--grad_clip=0.4", "--steps=30")
    process = begun(tmp_path, argv, "trial-0000/metrics.jsonl")
    process.kill()
    process.wait()
    again = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "still runs" in again.stdout.readline()
    again.terminate()
    assert (
        "the same command waits for it" in again.communicate(timeout=120)[0]
        and again.returncode == 0
    )
    assert rows(tmp_path)[0]["status"] == "unfinished"
    assert subprocess.run(argv, cwd=ROOT, capture_output=True, timeout=240).returncode == 0
    assert {(row["status"], row["steps"]) for row in rows(tmp_path)} == {("done", "30")}
    assert starts(tmp_path, 0) == 1


@pytest.mark.slow
def test_a_search_whose_reader_goes_away_comes_to_its_end(tmp_path):
    process = begun(
        tmp_path, as_process(tmp_path, "--search.lr=1e-3,1e-2", "--steps=5"), "trial-0000"
    )
    process.stdout.close()
    assert process.wait(240) == 0 and {row["status"] for row in rows(tmp_path)} == {"done"}


def test_two_searches_do_not_share_a_folder(go, tmp_path):
    lock = sweep.control.RunLock(tmp_path / "s")
    with pytest.raises(ValueError, match="is in use by process .* take another SWEEP_DIR"):
        go("--search.lr=1e-3,1e-2")
    lock.release()
    assert go("--search.lr=1e-3,1e-2") == 0


@pytest.mark.parametrize("killed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_who_is_at_work_in_a_folder_is_waited_for_whoever_started_it(go, tmp_path, capsys, killed):
    folder = tmp_path / "s" / "trial-0000"
    folder.mkdir(parents=True)
    by_hand = subprocess.Popen(
        [
            sys.executable,
            tmp_path / "fake.py",
            f"--out_dir={folder}",
            "--lr=1e-3",
            "--steps=12",
            "--grad_clip=0.2",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    if killed:  # then there is still something to do
        threading.Timer(1.0, by_hand.kill).start()
    assert go("--search.lr=1e-3,1e-2") == 0 and by_hand.poll() == (-signal.SIGKILL if killed else 0)
    assert "trial-0000  still runs" in capsys.readouterr().out
    assert starts(tmp_path, 0) == 1 + killed
    assert [(row["status"], row["steps"]) for row in rows(tmp_path)] == [("done", "12")] * 2


def test_a_run_that_ends_early_by_patience_is_done_with_the_weights_it_keeps(go, tmp_path):
    words = ("--search.lr=1e-2,1e-3", "--patience=2", "--min_delta=0.3")
    for _ in range(2):  # again: it is over
        assert go(*words) == 0
        found = [
            (row["status"], row["steps"], round(float(row["val_loss"]), 6))
            for row in rows(tmp_path)
        ]
        assert found == [("done", "4", 0.5), ("done", "4", 1.5)]  # of step 2, not of step 4
        assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (1, 1)


# What is logged last, and the exit status
LOST = [("null", 0), ("NaN", 0), ("Infinity", 0), ("1.5", 1)]


@pytest.mark.parametrize("last, status", LOST)
def test_a_run_that_diverges_or_is_aborted_is_a_result_the_worst_and_not_tried_again(
    go, tmp_path, last, status, capsys
):
    (tmp_path / "fake.py").write_text(
        FAKE
        + f"""
if lr == 0.1:
    with open(path, "a") as file:
        file.write('{{"step": 12, "val_loss": {last}}}\\n')
        if {status}:
            row = {{"step": 12, "event": "nonfinite", "text": "loss nan", "action": "abort"}}
            file.write(json.dumps(row) + "\\n")
            sys.exit("train.py: step 12: loss nan")
"""
    )
    for _ in range(2):
        assert go("--search.lr=0.1,0.01") == 0
        worst = rows(tmp_path)[-1]
        assert (worst["lr"], worst["status"], worst["val_loss"]) == ("0.1", "diverged", "inf")
        assert worst["error"] == ("step 12: loss nan" if status else "its loss is no finite number")
        assert (
            starts(tmp_path, 0) == 1 and "| inf | 12 |" in (tmp_path / "s" / "table.md").read_text()
        )


# ---- what lies about in the folder
WORDS = ("--search.lr=1e-3,1e-2", "--search.n_layer=3,4", "--jobs=4")  # trial 1: 1e-3 and 4


def move(path, new):
    os.rename(path, path.with_name(new))


def link(path, to):
    move(path, "elsewhere")
    os.symlink(to, path)


STRAYS = {  # what happens to trial 1, what is said, and how often it was started in all
    "a copy": (lambda t: shutil.copytree(t, f"{t}.bak"), "left alone .*: trial-0001.bak", 1),
    "a copy that a file manager makes": (
        lambda t: shutil.copytree(t, f"{t} (copy)"),
        "trial-0001 .copy",
        1,
    ),
    "a copy beyond the grid": (
        lambda t: shutil.copytree(t, t.with_name("trial-0007")),
        "trial-0007",
        1,
    ),
    "a number with too few zeros": (
        lambda t: (t.parent / "trial-2").mkdir(),
        "left alone .*: trial-2",
        1,
    ),
    "a copy in its place": (
        lambda t: (move(t, "mine"), shutil.copytree(t.with_name("trial-0002"), t)),
        "has --lr=1e-2 --n_layer=3, .* is aside-trial-0001 now",
        1,
    ),
    "a link to another": (lambda t: link(t, "trial-0002"), "is trial-0002 by another name", 1),
    "a link to itself, moved": (lambda t: link(t, "elsewhere"), "", 1),
    "a broken link": (lambda t: link(t, "nowhere"), "is no folder; it is aside-trial-0001 now", 1),
    "a file": (lambda t: (move(t, "mine"), t.write_text("notes")), "is no folder", 1),
    "an empty folder": (lambda t: (move(t, "mine"), t.mkdir()), "", 1),
    "trial.json empty": (
        lambda t: (t / "trial.json").write_text(""),
        "damaged; .*--lr=1e-3 --n_layer=4",
        1,
    ),
    "trial.json cut": (
        lambda t: (t / "trial.json").write_text('{"values": {"lr"'),
        "is damaged",
        1,
    ),
    "trial.json of bytes": (
        lambda t: (t / "trial.json").write_bytes(bytes(range(256))),
        "is damaged",
        1,
    ),
    "trial.json a list": (lambda t: (t / "trial.json").write_text("[1]"), "is damaged", 1),
    "trial.json with a list": (
        lambda t: (t / "trial.json").write_text('{"values": [1, 2]}'),
        "damaged",
        1,
    ),
    "trial.json a folder": (
        lambda t: (move(t / "trial.json", "x"), (t / "trial.json").mkdir()),
        "is damaged",
        1,
    ),
    "trial.json gone": (lambda t: (t / "trial.json").unlink(), "trial.json is missing", 1),
    "an unknown status": (
        lambda t: (t / "trial.json").write_text(
            '{"values": {"lr": "1e-3", "n_layer": "4"}, "status": "finished"}'
        ),
        "",
        1,
    ),
    "metrics.jsonl gone": (
        lambda t: ((t / "metrics.jsonl").unlink(), (t / "step-00000012").rmdir()),
        "has no val_loss in its metrics.jsonl; it is tried again",
        2,
    ),
    "sweep.json empty": (
        lambda t: (t.parent / "sweep.json").write_text(""),
        "to sweep.json.damaged",
        1,
    ),
    "sweep.json a list": (
        lambda t: (t.parent / "sweep.json").write_text("[]"),
        "sweep.json is damaged",
        1,
    ),
    "sweep.json gone": (lambda t: (t.parent / "sweep.json").unlink(), "", 1),
}


@pytest.mark.parametrize(
    "kind",
    [  # of three kinds one always
        kind if i % 3 == 0 else pytest.param(kind, marks=pytest.mark.slow)
        for i, kind in enumerate(STRAYS)
    ],
)
def test_what_is_no_trial_is_named_and_nothing_is_lost(go, tmp_path, capsys, kind):
    change, said, count = STRAYS[kind]
    go(*WORDS)
    found = (tmp_path / "s" / "trials.csv").read_text()
    change(tmp_path / "s" / "trial-0001")
    kept = {path.read_bytes() for path in tmp_path.rglob("metrics.jsonl")}
    capsys.readouterr()
    assert go(*WORDS) == 0 and re.search(said, first := capsys.readouterr().out), first
    assert go(*WORDS) == 0
    again = capsys.readouterr().out.replace(str(tmp_path), "")  # has the test's name in it
    assert not re.search("damaged|aside|missing|tried again", again), again
    assert (tmp_path / "s" / "trials.csv").read_text() == found
    assert [starts(tmp_path, n) for n in range(4)] == [1, count, 1, 1]
    assert kept <= {path.read_bytes() for path in tmp_path.rglob("metrics.jsonl")}


def test_a_trial_of_which_the_metric_is_lost_is_told_and_not_tried_for_ever(go, tmp_path, capsys):
    go(*WORDS)
    path = tmp_path / "s" / "trial-0001" / "metrics.jsonl"
    path.write_text('{"step": 12, "loss": 1.0}\n{"st')
    for said in ("has no val_loss in its metrics.jsonl; it is tried again", "best: trial-0003"):
        assert go(*WORDS) == 0 and said in capsys.readouterr().out
        last = rows(tmp_path)[-1]
        assert (last["status"], last["error"]) == ("failed", "no val_loss was logged")
    assert starts(tmp_path, 1) == 1


def test_a_folder_at_work_with_other_values_is_not_moved(go, tmp_path):
    go(*WORDS)
    folder = tmp_path / "s" / "trial-0001"
    (folder / "trial.json").write_text(json.dumps({"values": {"lr": "5", "n_layer": "4"}}))
    lock = sweep.control.RunLock(folder)
    with pytest.raises(
        ValueError, match="trial-0001 has --lr=5 .* process .* is at work there; stop it"
    ):
        go(*WORDS)
    lock.release()
    assert go(*WORDS) == 0 and (tmp_path / "s" / "aside-trial-0001" / "metrics.jsonl").exists()


def test_optuna_reads_lost_values_from_the_run_s_own_settings_or_sets_it_aside(
    go, tmp_path, capsys
):
    pytest.importorskip("optuna", reason="pip install optuna")
    words = (
        "--method=optuna",
        "--trials=3",
        "--search.lr=log:1e-3:1e-1",
        "--search.qk_norm=true,false",
    )
    go(*words)
    found, folder = rows(tmp_path), tmp_path / "s" / "trial-0001"
    values = json.loads((folder / "trial.json").read_text())["values"]
    (folder / "config.toml").write_text(f"lr = {values['lr']}\nqk_norm = {values['qk_norm']}\n")
    (folder / "trial.json").write_text("")
    assert go(*words) == 0 and rows(tmp_path) == found and starts(tmp_path, 1) == 1
    (folder / "config.toml").unlink()
    (folder / "trial.json").write_text("")
    assert go(*words) == 0 and "has a run whose values nobody knows" in capsys.readouterr().out
    assert (
        len(rows(tmp_path)) == 3
        and (tmp_path / "s" / "aside-trial-0001" / "metrics.jsonl").exists()
    )


def test_the_order_of_the_fields_on_the_command_line_changes_no_trial(go, tmp_path):
    go(*WORDS)
    found = (tmp_path / "s" / "trials.csv").read_text()
    shutil.rmtree(tmp_path / "s" / "trial-0001")
    assert go(*reversed(WORDS)) == 0 and (tmp_path / "s" / "trials.csv").read_text() == found
    assert [starts(tmp_path, n) for n in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["a file", "a broken link"])
def test_a_place_that_is_no_folder_is_told(tmp_path, name):
    place = tmp_path / "s"
    place.write_text("") if name == "a file" else place.symlink_to("nowhere")
    with pytest.raises(ValueError, match="s is no folder; take another SWEEP_DIR"):
        sweep.main([str(place), "--search.lr=1e-3,1e-2"])


def test_the_home_folder_may_be_a_tilde(go, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tiny.toml").write_text("steps = 2")
    assert sweep.main(["~/s", "~/tiny.toml", "--search.data=~/a b.txt;~/c,d.txt"]) == 0
    assert {row["data"] for row in rows(tmp_path) if row["status"] == "done"} == {
        "~/a b.txt",
        "~/c,d.txt",
    }
    # For settings/parse.py
    assert "--data=~/c,d.txt " in (tmp_path / "s" / "trial-0001" / "starts").read_text()


def test_gpus_are_shared_out(go, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    (tmp_path / "fake.py").write_text(
        FAKE.replace(
            'os.environ["OMP_NUM_THREADS"]', '" gpus " + os.environ["CUDA_VISIBLE_DEVICES"]'
        )
    )
    go("--search.lr=1e-3,1e-2,1e-1", "--jobs=2", "--grad_clip=0.05", "--steps=8")
    used = {
        (tmp_path / "s" / f"trial-000{n}" / "starts").read_text().split(" gpus ")[1]
        for n in range(3)
    }
    assert used == {"4,6\n", "5,7\n"}


# ---- Optuna
def test_tpe_finds_the_valley_prunes_and_learns_from_folders_alone(go, tmp_path):
    optuna = pytest.importorskip("optuna", reason="pip install optuna")
    method = proposals.Proposals("optuna", {"lr": ("log", 1e-4, 1.0)}, "loss", False, 0, 60)

    class Seen:  # a trial that needs no process
        def __init__(self, number, values=None):
            self.number, self.values, self.status = number, values or {}, "done"

        def curve(self, metric):
            return {0: 0.0} | {
                s: abs(math.log10(self.values["lr"]) + 2) + 1 / s for s in (1, 2, 3, 4)
            }

    tried = []
    for number in range(40):
        trial = Seen(number)
        method.begin(trial)
        stop = method.hopeless(trial, 4)
        tried.append((abs(math.log10(trial.values["lr"]) + 2), stop))
        trial.status = "pruned" if stop else "done"
        method.end(trial)
    early, late = sorted(x for x, _ in tried[:10])[5], sorted(x for x, _ in tried[25:])[7]
    assert late < 0.75 * early  # medians: it came nearer
    assert not any(stop for _, stop in tried[:5]) and any(stop for x, stop in tried[5:] if x > 0.5)
    assert not any(stop for x, stop in tried if x == min(tried)[0])
    told = [t for t in method.study.trials]
    assert 0 not in told[0].intermediate_values and told[0].value == tried[0][0] + 1 / 4
    pruned = optuna.trial.TrialState.PRUNED
    assert [t.state == pruned for t in told] == [stop for _, stop in tried]

    again = proposals.Proposals("optuna", {"lr": ("log", 1e-4, 1.0)}, "loss", False, 0, 60)
    for t, (_, stop) in zip(told, tried):
        trial = Seen(t.number, dict(t.params))
        again.begin(trial)
        assert trial.values == t.params
        trial.status = "pruned" if stop else "done"
        again.end(trial)
    new = [Seen(40), Seen(40)]
    method.begin(new[0])
    again.begin(new[1])
    assert new[0].values == new[1].values


def test_a_hopeless_trial_is_stopped_and_stays_so(go, tmp_path):
    pytest.importorskip("optuna", reason="pip install optuna")
    good = ("--method=optuna", "--search.lr=1e-2,0.9", "--steps=40", "--grad_clip=0.03")
    for n in range(5):
        folder = tmp_path / "s" / f"trial-000{n}"
        folder.mkdir(parents=True)
        (folder / "trial.json").write_text(json.dumps({"values": {"lr": "1e-2"}, "status": "done"}))
        (folder / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"step": s, "loss": 1 / s, "val_loss": 1 / s}) + "\n"
                for s in range(1, 41)
            )
        )
    (tmp_path / "s" / "trial-0005").mkdir()
    (tmp_path / "s" / "trial-0005" / "trial.json").write_text(json.dumps({"values": {"lr": "0.9"}}))
    assert go(*good, "--trials=6") == 0
    stopped = rows(tmp_path)[-1]
    assert (stopped["trial"], stopped["status"]) == ("5", "pruned") and 10 <= int(
        stopped["steps"]
    ) < 40
    assert go(*good, "--trials=6") == 0 and starts(tmp_path, 5) == 1


def test_without_optuna_there_is_one_line(go, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match="--method=optuna needs a package: pip install optuna"):
        go("--method=optuna", "--search.lr=1e-3,1e-2")


# ---- what is told
def test_a_failing_trial_is_a_row_with_its_error(go, tmp_path, capsys):
    assert (
        go("--search.optim=muon,lion", "--search.n_embd=64,66", "--search.lr=0.01,5", "--steps=2")
        == 0
    )
    found = {(r["optim"], r["n_embd"], r["lr"]): (r["status"], r["error"]) for r in rows(tmp_path)}
    assert found["muon", "64", "0.01"] == ("done", "")
    assert found["lion", "64", "0.01"] == ("failed", "ValueError: no lions | here")
    status, error = found["muon", "66", "0.01"]
    assert status == "failed" and "not divisible by n_head=4" in error
    assert found["muon", "64", "5"] == ("diverged", "its loss is no finite number")
    assert "no lions \\| here" in (tmp_path / "s" / "table.md").read_text()
    assert "--lr=0.01  ValueError: no lions | here\n" in capsys.readouterr().out
    assert not (tmp_path / "s" / "trial-0002" / "starts").exists()  # refused before it was begun


# How a process ends; the trial's status and error; the exit status of a search in which another is
# done.
MEMORY = "ended by SIGKILL, perhaps for want of memory"
BUSY, FULL = (
    "train.py: t is in use by process 1; stop it",
    "train.py: [Errno 28] No space left on device",
)
ENDS = {
    "a mistake": ("sys.exit('train.py: no such text')", "failed", "train.py: no such text", 0),
    "on a rank": (
        "print('[rank0]: RuntimeError: torn'); print('[rank0]: more'); sys.exit(1)",
        "failed",
        "[rank0]: RuntimeError: torn",
        0,
    ),
    "an exception": ("raise KeyError('abc')", "failed", "KeyError: 'abc'", 0),
    "a bare assert": ("assert lr > 1", "failed", "AssertionError", 0),
    "nothing said": ("sys.exit(3)", "failed", "exit status 3", 0),
    "a crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "failed", "ended by SIGSEGV", 0),
    "no metric": (
        "open(path, 'w').write('{\"step\": 12, \"loss\": 1.0}\\n'); sys.exit(0)",
        "failed",
        "no val_loss was logged",
        0,
    ),
    "no memory": ("os.kill(os.getpid(), signal.SIGKILL)", "unfinished", MEMORY, 1),
    "no memory, told by a shell": ("sys.exit(137)", "unfinished", MEMORY, 1),
    "Ctrl-C": ("sys.exit(130)", "unfinished", "ended by SIGINT", 1),
    "asked": (
        "os.kill(os.getpid(), signal.SIGTERM)",
        "unfinished",
        "it was told to stop at step 0",
        1,
    ),
    "a full disk": (f"sys.exit({FULL!r})", "unfinished", FULL, 1),
    "another at work": (f"sys.exit({BUSY!r})", "unfinished", BUSY, 1),
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow) if i % 3 else kind for i, kind in enumerate(ENDS)],
)
def test_how_a_trial_ended_is_in_the_table_and_on_the_screen(go, tmp_path, capsys, kind):
    end, status, error, code = ENDS[kind]
    (tmp_path / "fake.py").write_text(
        FAKE.replace("done = len", f"if lr == 0.1: {end}\ndone = len")
    )
    assert go("--search.lr=0.1,0.01") == code
    last, out = rows(tmp_path)[-1], capsys.readouterr().out
    assert (last["lr"], last["status"], last["error"]) == ("0.1", status, error)
    assert re.search(rf"trial-0000  {status} .*--lr=0.1  {re.escape(error)}\n", out), out
    (tmp_path / "fake.py").write_text(FAKE)  # whatever it was is mended
    assert go("--search.lr=0.1,0.01") == 0
    assert starts(tmp_path, 0) == 1 + (status == "unfinished")
    assert rows(tmp_path)[-1]["status"] == ("failed" if status == "failed" else "done")


def test_the_error_is_that_of_the_last_start(go, tmp_path):
    (tmp_path / "fake.py").write_text(
        "import sys; print('ValueError: of old', flush=True); sys.exit(143)"
    )
    assert go("--search.lr=0.1") == 1 and rows(tmp_path)[0]["error"] == "ended by SIGTERM"
    (tmp_path / "fake.py").write_text("import sys; print('a word', flush=True); sys.exit(4)")
    assert go("--search.lr=0.1") == 1 and rows(tmp_path)[0]["error"] == "a word"


def test_where_no_trial_comes_to_a_result_the_exit_status_is_1(go):
    assert go("--search.optim=lion", "--steps=2") == 1
    assert go("--search.optim=lion", "--steps=2") == 1


@pytest.mark.parametrize("name", ["trials.csv", "table.md", "sweep.png"])
def test_what_cannot_be_written_is_told_and_the_rest_is_there(go, tmp_path, capsys, name):
    (tmp_path / "s" / name).mkdir(parents=True)
    assert go("--search.lr=1e-3,1e-2") == 1
    assert f"{name} cannot be written: Is a directory\nbest: trial-0001" in capsys.readouterr().out
    others = {"trials.csv", "table.md", "sweep.png"} - {name}
    assert all((tmp_path / "s" / other).is_file() for other in others)
    (tmp_path / "s" / name).rmdir()
    assert go("--search.lr=1e-3,1e-2") == 0 and starts(tmp_path, 0) == 1


@pytest.mark.parametrize("number, told", [(errno.ENOSPC, 1), (errno.EACCES, 3)])
def test_a_disk_that_is_full_at_a_trial_s_beginning_ends_the_search_with_a_sentence(
    go, tmp_path, monkeypatch, capsys, number, told
):
    def full(path, content):
        raise OSError(number, os.strerror(number), str(path))

    words = ("--search.lr=1e-3,1e-2,1e-1", "--steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(trials, "write", full)
        assert go(*words) == 1
    assert capsys.readouterr().out.count(f"cannot be used: {os.strerror(number)}") == told
    assert go(*words) == 0 and {row["status"] for row in rows(tmp_path)} == {"done"}


def test_a_disk_that_is_full_at_a_trial_s_end_loses_nothing(go, tmp_path, monkeypatch, capsys):
    save = trials.Trial.save

    def full(trial):
        if trial.status == "done":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(trial)

    with monkeypatch.context() as patch:
        patch.setattr(trials.Trial, "save", full)
        assert go("--search.lr=1e-3,1e-2") == 1
    assert "trial.json cannot be written: No space left" in capsys.readouterr().out
    assert {row["status"] for row in rows(tmp_path)} == {"done"}
    assert go("--search.lr=1e-3,1e-2") == 0 and starts(tmp_path, 0) == 1


def test_optuna_hears_of_all_that_is_over(go, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna", reason="pip install optuna")
    told = {}
    tell = optuna.study.Study.tell

    def heard(study, trial, value, state):
        told[trial.params["lr"]] = (value, state.name)
        return tell(study, trial, value, state)

    monkeypatch.setattr(optuna.study.Study, "tell", heard)
    (tmp_path / "fake.py").write_text(
        FAKE.replace("done = len", "if lr == 0.1: sys.exit(3)\ndone = len", 1)
    )
    for n, lr in enumerate(("1e-2", "5", "0.1")):
        (tmp_path / "s" / f"trial-000{n}").mkdir(parents=True)
        (tmp_path / "s" / f"trial-000{n}" / "trial.json").write_text(
            json.dumps({"values": {"lr": lr}})
        )
    words = (
        "--method=optuna",
        "--search.lr=1e-2,5,0.1",
        "--trials=3",
        "--patience=2",
        "--min_delta=0.3",
    )
    for _ in range(2):  # as it happens, and from the folders
        assert go(*words) == 0
        assert told == {
            "1e-2": (0.5, "COMPLETE"),
            "5": (math.inf, "COMPLETE"),
            "0.1": (None, "PRUNED"),
        }
        told.clear()


def test_without_matplotlib_there_are_tables_and_a_sentence(go, tmp_path, monkeypatch, capsys):
    def missing(*_):
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(results, "picture", missing)
    assert go("--search.lr=1e-3", "--steps=2") == 1
    assert "sweep.png cannot be written: No module named 'matplotlib'" in capsys.readouterr().out
    assert (tmp_path / "s" / "table.md").exists()


# ---- mistakes
def test_values_are_read_as_people_type_them():
    assert choices("lr", " 1e-3 , 0.001,3e-3") == ["1e-3", "3e-3"]  # the same number twice
    assert choices("n_kv_head", "none,None,2") == ["none", "2"]
    assert choices("tied", "True,true,false,auto") == ["True", "false", "auto"]
    assert choices("opt.betas", "0.9,0.95;") == ["0.9,0.95"] and choices("lr", "3e-4") == ["3e-4"]
    assert choices("data", "my texts/a.txt, --b=c d.txt") == ["my texts/a.txt", "--b=c d.txt"]
    assert choices("opt.eps", "-1e-8,1e-8") == ["-1e-8", "1e-8"]


def test_a_value_that_is_there_twice_is_told_and_tried_once(go, tmp_path, capsys):
    assert go("--search.lr=1e-3,0.001,1e-2", "--steps=2") == 0 and len(rows(tmp_path)) == 2
    assert (
        "--search.lr=1e-3,0.001,1e-2 has a value twice; tried once: 1e-3, 1e-2"
        in capsys.readouterr().out
    )


def test_options_may_stand_apart_from_their_values(go, tmp_path):
    assert go("--search.lr", "1e-3,1e-2", "--jobs", "2", "--dropout", "0.1") == 0
    assert [row["lr"] for row in rows(tmp_path)] == ["1e-2", "1e-3"]
    assert "--dropout=0.1" in (tmp_path / "s" / "trial-0000" / "starts").read_text()


MISTAKES = """
                                        | nothing to search
--search.lrr=1,2                        | did you mean --lr?
--search.lr=a,b                         | a number
--search.lr=1,2 --stepz=3               | did you mean --steps?
--search.lr=1,2 --jbos=3                | did you mean --jobs?
--search.n_layer=log:1:9                | a whole number
--search.lr=log:0:1 --method=random     | is no range
--search.lr=lin:2:1                     | is no range
--search.lr=lin:1                       | is no range
--search.lr=log:1e-3:1                  | a grid needs values
--search.lr=1,2 --lr=3                  | is set by the search
--search.lr=1,2 --out_dir=x             | is set by the search
--search.out_dir=a,b                    | out_dir of its own
--search.lr=1,2 --trials=3              | leave --trials out
--search.lr=1,2 --jobs=0                | --jobs=0
--search.lr=1,2 --method=tpe            | grid, random, optuna
--search.lr=1,2 --metric=val            | val_loss
--search.lr=1,2 none.toml               | cannot read the recipe
--search.lr=1,2 --n_head=3              | not divisible
--search.lr                             | has an empty value
--search.lr= --steps=3                  | has an empty value
--search.lr=1e-3,,1e-2                  | has an empty value
--search.lr=1e-3,1e-2,                  | has an empty value
--search=lr                             | names no field
--search.lr=1 --search.lr=2             | is there twice
--search.lr=-1e-3,1e-3                  | out of range
--search.lr=nan,1                       | out of range
--search.dropout=0.1,1                  | out of range
--search.dropout=lin:0:1 --method=random | out of range
--search.n_layer=int:0:2                | out of range
--search.grad_clip=0,1                  | --grad_clip=none
--search.decay_frac=0.5,2               | is a share
--search.n_layer=1.5,2                  | a whole number
--search.n_layer=none,2                 | a whole number
--search.tied=yes,no                    | true or false
--search.optim=muon,liom                | did you mean lion?
--search.lr=1,2 --optim=lionn           | did you mean lion?
--search.lr=--steps=3,1                 | a number
--search.lr=LOG:1e-3:1                  | a range is int:2:6
--search.lr=log:-1:1 --method=random    | above 0
--search.lr=log:0.1:0.001               | log:0.001:0.1
--search.lr=lin:nan:1                   | is no range
--search.lr=lin:-inf:1                  | is no range
--search.lr=lin:0:1:2                   | is no range
--search.n_layer=int:1.5:3              | is no range
--search.n_layer=int:3:3                | one value
--search.n_layer=lin:2:6                | a whole number
--search.seed=int:1:1000000             | more than 100000
--search.resume=a,b                     | leave --search.resume out
--search.n_head=3,5                     | not divisible
--search.opt.momentun=0.9,0.95          | did you mean --opt.momentum?
--search.opt.betas=0.9,0.95 --optim=adamw | --search.opt.betas="A,B;C,D"
--search.schedule.shape=a,b             | shape
--search.schedule.shap=a,b              | no such argument
--search.lr=1,2 --eval_every=0          | needs evaluations
--search.lr=1,2 --launch=nosuchprogram  | there is no program nosuchprogram
--search.lr=1,2 --launch="              | no command line
--search.lr=1,2 --jobs                  | has no value
--search.lr=1,2 --jobs=two              | 1 or more
"""


@pytest.mark.parametrize(
    "words, said",
    [[part.strip() for part in line.split("|")] for line in MISTAKES.strip("\n").split("\n")],
)
def test_a_mistake_is_one_line_and_begins_nothing(go, tmp_path, words, said):
    with pytest.raises(ValueError) as error:
        go(*words.split())
    assert (
        said in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "s").exists()
    )


@pytest.mark.slow
def test_train_itself_is_searched_and_a_mistake_exits_with_2(tmp_path):
    (tmp_path / "text.txt").write_bytes((ROOT / "settings/parse.py").read_bytes())
    tiny = dict(
        n_layer=1,
        n_head=2,
        n_embd=16,
        block_size=16,
        batch_size=4,
        eval_tokens=256,
        sample_tokens=0,
    )
    (tmp_path / "tiny.toml").write_text("".join(f"{name} = {x}\n" for name, x in tiny.items()))
    argv = [
        sys.executable,
        ROOT / "sweep.py",
        tmp_path / "s",
        tmp_path / "tiny.toml",
        "--device=cpu",
        "--steps=4",
        "--eval_every=2",
        "--threads=1",
        f"--data={tmp_path / 'text.txt'}",
        f"--data_dir={tmp_path}",
        "--search.lr=0.02",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(row["lr"], row["status"], row["steps"]) for row in rows(tmp_path)] == [
        ("0.02", "done", "4")
    ]
    failed = subprocess.run([*argv, "--steps=5"], capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2 and len(failed.stderr.splitlines()) == 1
    assert "holds a search with steps=4, now it is 5" in failed.stderr
