"""A search: what is tried, what is skipped, continued and stopped, and what is told. Most tests put a program
of some lines in train.py's place, which logs a loss that is least at lr=0.01 and has n_layer=4."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import proposals
import sweep
from proposals import choices

ROOT = Path(sweep.__file__).parent
FAKE = """
import json, math, os, signal, sys, time
given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
lr, steps, stop = float(given.get("lr", 0.01)), int(given.get("steps", 12)), []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
open(given["out_dir"] + "/starts", "a").write(" ".join(sys.argv) + os.environ["OMP_NUM_THREADS"] + "\\n")
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
"""


@pytest.fixture
def go(tmp_path, monkeypatch):
    """A sweep in tmp_path/s with the program above: its exit status."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(sweep, "TRAIN", str(tmp_path / "fake.py"))
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
    assert {(r["lr"], r["n_layer"]) for r in found} == {(lr, n) for lr in ("1e-2", "1e-3") for n in "345"}
    assert (found[0]["lr"], found[0]["n_layer"], found[-1]["lr"]) == ("1e-2", "4", "1e-3")  # best first
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
        method = proposals.Proposals("random", {"lr": ("log", 1e-4, 1e-1), "n_layer": ("int", 2, 6),
                                                "dropout": ("lin", 0.0, 0.3)}, "val_loss", False, seed, 20)
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
    logs = [math.log10(v["lr"]) for v in many]  # uniform from -4 to -1: mean -2.5, a third in each decade
    assert abs(sum(logs) / 2000 + 2.5) < 0.1 and abs(sum(x < -3 for x in logs) / 2000 - 1 / 3) < 0.05


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
    (folder / "trial.json").write_text(json.dumps(kept | {"status": "unfinished", "values": {"lr": 0.01}}))
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
    for other in (["--search.lr=1e-3,2e-2", *words[1:]], [*words, "--steps=3"], words[:2],
                  [*words, "--metric=val_accuracy"], [*words, "--search.n_layer=2,3"]):
        with pytest.raises(ValueError, match="holds a search with .*, now it is .*another folder"):
            go(*other)


@pytest.mark.slow
def test_a_stopped_search_stops_its_trials_and_goes_on_later(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    program = str(tmp_path / "fake.py")
    code = f"import sys, sweep; sweep.TRAIN = {program!r}; sys.exit(sweep.main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, str(tmp_path / "s"), "--search.lr=1e-3,1e-2,1e-1", "--jobs=2",
            "--grad_clip=0.15", "--steps=20"]  # fmt: skip
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all((tmp_path / "s" / f"trial-000{n}" / "metrics.jsonl").exists() for n in (0, 1)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert [row["status"] for row in rows(tmp_path)] == ["unfinished"] * 2  # the third was never begun
    assert subprocess.run(argv, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    assert [(row["status"], row["steps"]) for row in rows(tmp_path)] == [("done", "20")] * 3


def test_two_searches_do_not_share_a_folder(go, tmp_path):
    lock = sweep.resume.RunLock(tmp_path / "s")
    with pytest.raises(ValueError, match="is in use by process"):
        go("--search.lr=1e-3,1e-2")
    lock.release()


def test_gpus_are_shared_out(go, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    (tmp_path / "fake.py").write_text(FAKE.replace('os.environ["OMP_NUM_THREADS"]',
                                                   '" gpus " + os.environ["CUDA_VISIBLE_DEVICES"]'))
    go("--search.lr=1e-3,1e-2,1e-1", "--jobs=2", "--grad_clip=0.05", "--steps=8")
    used = {(tmp_path / "s" / f"trial-000{n}" / "starts").read_text().split(" gpus ")[1] for n in range(3)}
    assert used == {"4,6\n", "5,7\n"}


# ---- Optuna
def test_tpe_finds_the_valley_prunes_and_learns_from_folders_alone(go, tmp_path):
    optuna = pytest.importorskip("optuna", reason="pip install optuna")
    method = proposals.Proposals("optuna", {"lr": ("log", 1e-4, 1.0)}, "loss", False, 0, 60)

    class Seen:  # a trial that needs no process
        def __init__(self, number, values=None):
            self.number, self.values, self.status = number, values or {}, "done"

        def curve(self, metric):
            return {0: 0.0} | {s: abs(math.log10(self.values["lr"]) + 2) + 1 / s for s in (1, 2, 3, 4)}

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
        (folder / "metrics.jsonl").write_text("".join(
            json.dumps({"step": s, "loss": 1 / s, "val_loss": 1 / s}) + "\n" for s in range(1, 41)))
    (tmp_path / "s" / "trial-0005").mkdir()
    (tmp_path / "s" / "trial-0005" / "trial.json").write_text(json.dumps({"values": {"lr": "0.9"}}))
    assert go(*good, "--trials=6") == 0
    stopped = rows(tmp_path)[-1]
    assert (stopped["trial"], stopped["status"]) == ("5", "pruned") and 10 <= int(stopped["steps"]) < 40
    assert go(*good, "--trials=6") == 0 and starts(tmp_path, 5) == 1


def test_without_optuna_there_is_one_line(go, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match="--method=optuna needs a package: pip install optuna"):
        go("--method=optuna", "--search.lr=1e-3,1e-2")


# ---- what is told
def test_a_failing_trial_is_a_row_with_its_error(go, tmp_path):
    assert go("--search.optim=muon,lion", "--search.n_embd=64,66", "--search.lr=0.01,5", "--steps=2") == 0
    found = {(r["optim"], r["n_embd"], r["lr"]): (r["status"], r["error"]) for r in rows(tmp_path)}
    assert found["muon", "64", "0.01"] == ("done", "")
    assert found["lion", "64", "0.01"] == ("failed", "ValueError: no lions | here")
    status, error = found["muon", "66", "0.01"]
    assert status == "failed" and "not divisible by n_head=4" in error
    assert found["muon", "64", "5"] == ("failed", "no val_loss was logged, or it was no finite number")
    assert "no lions \\| here" in (tmp_path / "s" / "table.md").read_text()
    assert not (tmp_path / "s" / "trial-0002" / "starts").exists()  # refused before it was begun


def test_where_all_trials_fail_the_exit_status_is_1(go):
    assert go("--search.optim=lion", "--steps=2") == 1


@pytest.mark.parametrize("words", [
    ["--search.lr=1e-3,1e-2,5e-2,0.5"], ["--search.optim=muon,adamw"],
    ["--search.lr=1e-3,1e-2", "--search.optim=muon,lion", "--search.n_layer=3,4"]])
def test_a_picture_is_drawn(go, tmp_path, words):
    from matplotlib.image import imread

    assert go(*words, "--steps=2", "--jobs=3") == 0
    rgb = imread(tmp_path / "s" / "sweep.png")[..., :3]
    assert rgb.shape[0] >= 500 and (rgb.max(-1) - rgb.min(-1) > 0.1).mean() > 2e-4


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
"""


@pytest.mark.parametrize("words, said", [
    [part.strip() for part in line.split("|")] for line in MISTAKES.strip("\n").split("\n")])
def test_a_mistake_is_one_line_and_begins_nothing(go, tmp_path, words, said):
    with pytest.raises(ValueError) as error:
        go(*words.split())
    assert said in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "s").exists()


@pytest.mark.slow
def test_train_itself_is_searched_and_a_mistake_exits_with_2(tmp_path):
    (tmp_path / "text.txt").write_bytes((ROOT / "config.py").read_bytes())
    tiny = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, eval_tokens=256, sample_tokens=0)
    (tmp_path / "tiny.toml").write_text("".join(f"{name} = {x}\n" for name, x in tiny.items()))
    argv = [sys.executable, ROOT / "sweep.py", tmp_path / "s", tmp_path / "tiny.toml", "--device=cpu",
            "--steps=4", "--eval_every=2", "--threads=1", f"--data={tmp_path / 'text.txt'}",
            f"--data_dir={tmp_path}", "--search.lr=0.02"]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(row["lr"], row["status"], row["steps"]) for row in rows(tmp_path)] == [("0.02", "done", "4")]
    failed = subprocess.run([*argv, "--steps=5"], capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2 and len(failed.stderr.splitlines()) == 1
    assert "holds a search with steps=4, now it is 5" in failed.stderr
