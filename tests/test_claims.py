"""A claim on one's own text: equals are not told apart, a difference is, and time is kept.

Most tests put draws from a normal distribution, and a clock of their own, in the place of runs.
"""

import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from experiments import budget, claim_page, claims, optimizers, protocol, significance
from experiments.budget import Asked, Session

ROOT = Path(__file__).parent.parent
TEXT = "To be, or not to be, that is the question: whether it is nobler. " * 400
NAMES = ("adamw", "muon")


# ---- statistics ----------------------------------------------------------------------------------
@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 8, 30])
@pytest.mark.parametrize("t", [0.0, 0.3, -2.5, 12.0])
def test_the_tail_of_t_is_the_integral_of_its_density(df, t):
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    n = 4000
    h = abs(t) / n
    values = [scale * (1 + (i * h) ** 2 / df) ** (-(df + 1) / 2) for i in range(n + 1)]
    simpson = h / 3 * (values[0] + values[-1] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2]))
    assert significance.t_tail(t, df) == pytest.approx(1 - 2 * simpson, abs=1e-9)


def test_quantiles_are_those_of_the_tables():
    for df, level, t in ((2, 0.05, 4.303), (4, 0.05, 2.776), (4, 0.1, 2.132), (7, 0.02, 2.998)):
        assert significance.t_quantile(df, level) == pytest.approx(t, abs=6e-4)


def test_the_paired_test_is_students_own_example():
    """Two soporifics on ten patients (Student 1908): 1.58 hours more, t = 4.062, p = 0.00283."""
    more = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    mean, sd, p = significance.paired_test(more)
    assert (mean, round(sd, 3)) == (pytest.approx(1.58), 1.23)
    assert p == pytest.approx(0.002833, abs=1e-6)
    assert significance.paired_test([0.3])[2] == 1 and significance.paired_test([0, 0])[2] == 1


def test_holm_corrects_in_order_and_never_back():
    found = significance.holm([0.01, 0.04, 0.03, 0.005])
    assert found == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.7, 0.6]) == [1.0, 1.0]


def judged(*losses: list[float], **options) -> list[dict]:
    own = {name: dict(enumerate(found)) for name, found in zip("abc", losses)}
    return significance.judge(own, **options)


def test_a_verdict_is_one_of_three_with_its_figures():
    base = [2.0, 2.1, 1.9, 2.05]
    lower = [x - d for x, d in zip(base, (0.20, 0.21, 0.19, 0.2))]
    [one] = judged(base, lower)
    assert one["text"].startswith("b ends 0.200 ± 0.008 lower than a (4 seeds, p = 1.9e-05")
    near = [x - d for x, d in zip(base, (0.004, -0.003, 0.002, -0.001))]
    assert judged(base, near)[0]["text"].startswith("no difference found: b ends 0.001 ± 0.003 fr")
    assert "alike to the last digit" in judged(base, base)[0]["text"]
    far = [x - d for x, d in zip(base, (0.3, -0.1, 0.2, -0.2))]
    [one] = judged(base, far, minutes=2)
    assert one["word"] == "not enough" and "b ends 0.050 ± 0.238 lower" in one["text"]
    wide = [x - d for x, d in zip(base, (0.3, -0.3, 0.2, -0.2))]  # its mean is within the margin
    assert judged(base, wide)[0]["word"] == "not enough"
    # The same spread around the same mean would do at that many seeds, and not at fewer.
    n = significance.seeds_needed(4, 0.1, 0.1, 0.01, 0.02)
    enough = [significance.t_quantile(k - 1, 0.02) * 0.1 / math.sqrt(k) <= 0.1 for k in (n - 1, n)]
    assert enough == [False, True]
    assert "1 seed); about 4 more minutes" in judged([2.0], [1.0], minutes=2)[0]["text"]
    assert "2 seeds, p" in judged([2.0, 2.0], [1.0, 1.01])[0]["text"]  # two are never enough
    assert judged([2.0, 2.0], [1.0, 1.01])[0]["word"] == "not enough"
    [one] = judged(base, [1.0, math.nan, 1.0, 1.0])
    assert "b diverged with 1 of 4 seeds" in one["text"] and one["word"] == "not enough"


def test_more_candidates_and_more_looks_ask_for_more():
    base = [2.0, 2.1, 1.9, 2.05, 2.0]
    lower = [x - d for x, d in zip(base, (0.01, 0.03, 0.05, 0.02, 0.05))]
    alone = judged(base, lower)[0]["p"]
    assert judged(base, lower, base)[-1]["p"] == 1 and alone < 0.02
    assert judged(base, lower, base)[0]["p"] == pytest.approx(3 * alone)
    assert judged(base, lower, looks=2)[0]["p"] == pytest.approx(2 * alone)
    assert judged(base, lower, looks=2)[0]["word"] != "difference"


# ---- runs that are drawn -------------------------------------------------------------------------
class Played:
    """In the place of protocol.measured: draws losses, and moves a clock of its own."""

    def __init__(self, gap: float = 0.0, seed: int = 0, speed=lambda t: 1.0, stop: int = 10**9):
        self.now, self.gap, self.seed, self.speed, self.stop = 0.0, gap, seed, speed, stop
        self.rows, self.stopped = [], 0

    def measured(self, row, rows, quick, jobs, threads, bar, until=math.inf):
        asked, steps = row.args
        free = [self.now] * jobs
        for keys in rows:
            beside = 0.5
            began = min(free)
            seconds = self.speed(began) * (beside + steps * 0.02)
            if began + seconds > until:
                self.now, self.stopped = until, self.stopped + 1
                return
            free[free.index(began)] = self.now = began + seconds
            if len(self.rows) >= self.stop:
                raise KeyboardInterrupt
            self.rows.append(keys)
            took = seconds * steps * 0.02 / (beside + steps * 0.02)
            yield keys, self.figures(keys, steps, took), "", seconds

    def figures(self, keys: dict, steps: int, took: float) -> dict:
        """Loss over log lr is a parabola, the same for both up to the gap, with noise."""
        second = keys["candidate"] == NAMES[1]
        own = random.Random(f"{self.seed} {keys}")
        common = random.Random(f"{self.seed} {keys['seed']}").gauss(0, 0.05)
        best = random.Random(f"{self.seed} best").uniform(0.5, 1.5)
        loss = 2 + common + 0.03 * (keys.get("trial", 1) - best) ** 2
        loss += own.gauss(0, 0.02) - self.gap * second
        return dict(val_loss=loss, step_s=took / steps, steps_s=took, curve=[5.0, 3.0, loss])


def ask(folder: Path, seconds: float = 600, **more) -> Asked:
    usual = dict(
        name="optimizers",
        data="text.txt",
        candidates={name: dict(optim=name, lr=0.01) for name in NAMES},
        fields=claims.SIZE,
        ranks=1,
        budget=seconds,
        home=folder,
        seed=0,
        trials=3,
        range=3.0,
        steps=None,
        jobs=2,
    )
    return Asked(**usual | more)


def play(patch, played: Played, asked: Asked, keep: bool = False) -> Session:
    """A session of drawn runs, to its end or to its Ctrl-C."""
    patch.setattr(protocol, "measured", played.measured)
    patch.setattr(protocol, "place", lambda: {"date": "", "machine": "", "commit": ""})
    patch.setattr(budget, "clock", lambda: played.now)
    if not keep:
        patch.setattr(protocol, "write", lambda path, rows: None)
        patch.setattr(Session, "save", lambda self: None)
    session = Session(asked)
    try:
        session.make_plan()
        session.measure(lambda *_, **__: None)
    except KeyboardInterrupt:
        pass
    return session


def words_of(patch, tmp_path, gap: float, tries: int) -> list[str]:
    found = []
    for i in range(tries):
        session = play(patch, Played(gap, seed=i), ask(tmp_path, 200))
        found.append(session.verdicts()[0]["word"])
    return found


def test_equals_are_not_told_apart_in_19_of_20_tries(monkeypatch, tmp_path):
    """The planted null: one optimizer under two names, whose sweeps may pick other rates."""
    found = words_of(monkeypatch, tmp_path, 0.0, 200)
    assert found.count("difference") <= 10
    assert found.count("no difference") >= 150


def test_a_difference_of_three_standard_deviations_is_found(monkeypatch, tmp_path):
    sd = 0.02 * math.sqrt(2)
    found = words_of(monkeypatch, tmp_path, 3 * sd, 40)
    assert found.count("difference") >= 36


@pytest.mark.parametrize(
    "speed",
    [
        lambda t: 1.0,
        lambda t: 1 + t / 300,
        lambda t: 2.0 if t > 100 else 1.0,
        lambda t: 0.5 + 0 * t,
    ],
    ids=["steady", "slowing", "twice as slow", "fast"],
)
@pytest.mark.parametrize("seconds", [60, 300])
def test_the_budget_is_kept_within_a_tenth(monkeypatch, tmp_path, speed, seconds):
    played = Played(speed=speed)
    session = play(monkeypatch, played, ask(tmp_path, seconds))
    assert 0.7 * seconds <= played.now <= 1.1 * seconds
    assert played.stopped == 0 or speed(0) != speed(seconds)  # no run is begun in vain
    assert session.plan["seeds"] in (3, 4, 5) and session.plan["steps"] >= budget.LEAST_STEPS


def test_candidates_are_tuned_and_tried_alike(monkeypatch, tmp_path):
    played = Played()
    session = play(monkeypatch, played, ask(tmp_path, 100, trials=4))
    tried = {name: [] for name in NAMES}
    for keys in played.rows[2:]:
        tried[keys["candidate"]].append((keys["seed"], keys["trial"], keys["lr"]))
    assert sorted(tried["adamw"]) == sorted(tried["muon"])
    rates = sorted({lr for _, _, lr in tried["muon"]})
    assert rates == pytest.approx([0.01 / 3, 0.01 / 3 ** (1 / 3), 0.01 * 3 ** (1 / 3), 0.03])
    # A seed counts with its best rate, and only once all its rates are there.
    mine = [r for r in session.rows if (r["seed"], r["candidate"]) == (2, "muon")]
    assert session.losses()["muon"][2] == min(r["val_loss"] for r in mine)
    n = len(session.losses()["muon"])
    session.rows.remove(mine[0])
    assert [len(session.losses()[name]) for name in NAMES] == [n, n - 1]
    mine[1]["val_loss"] = math.nan  # one rate that diverged is no loss, and no end either
    session.rows.append(mine[0])
    assert session.losses()["muon"][2] == min(r["val_loss"] for r in (mine[0], *mine[2:]))


def test_ctrl_c_keeps_what_was_found_and_the_same_command_goes_on(monkeypatch, tmp_path):
    (tmp_path / "whole").mkdir()
    whole = play(monkeypatch, Played(), ask(tmp_path / "whole", 120), keep=True)
    (tmp_path / "cut").mkdir()
    first = Played(stop=12)
    play(monkeypatch, first, ask(tmp_path / "cut", 120), keep=True)
    second = Played()
    session = play(monkeypatch, second, ask(tmp_path / "cut", 120), keep=True)
    assert len(first.rows) == 12 and len(protocol.read(session.csv)) == len(session.rows)
    again = [k for k in second.rows if k in first.rows]
    assert again == [] and first.now + second.now <= 1.1 * 120
    found, other = (
        {(r["candidate"], r["trial"], r["seed"]): r["val_loss"] for r in s.rows}
        for s in (session, whole)
    )
    assert all(found[k] == other[k] for k in found.keys() & other.keys()) and len(found) > 20


def test_a_larger_budget_adds_seeds_and_is_another_look(monkeypatch, tmp_path):
    first = play(monkeypatch, Played(), ask(tmp_path, 60), keep=True)
    n = len(first.losses()["muon"])
    p = first.verdicts()[0]["p"]
    same = play(monkeypatch, Played(), ask(tmp_path, 60), keep=True)
    assert same.verdicts()[0]["p"] == p and same.plan["looks"] == [n]
    more = play(monkeypatch, Played(), ask(tmp_path, 240), keep=True)
    more.verdicts()
    assert len(more.losses()["muon"]) > n and len(more.plan["looks"]) == 2
    assert more.plan["steps"] == first.plan["steps"]
    with pytest.raises(ValueError, match="holds a claim with seed 0, not 1; type another --out"):
        Session(ask(tmp_path, 60, seed=1))
    with pytest.raises(ValueError, match="holds a claim with text , not abc;"):
        Session(ask(tmp_path, 60, text="abc"))


def test_too_small_a_budget_says_what_it_takes(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"--budget=3s is too small for 2 candidates x 3 ") as e:
        play(monkeypatch, Played(), ask(tmp_path, 3))
    need = float(str(e.value).split("--budget=")[-1].split("s or")[0])
    play(monkeypatch, Played(), ask(tmp_path, need))
    with pytest.raises(ValueError, match="too small"):
        play(monkeypatch, Played(), ask(tmp_path, need - 11))


def test_equal_tokens_at_another_batch(tmp_path):
    own = {"a:4": dict(lr=1, batch_size=4), "a:64": dict(lr=1, batch_size=64), "b": dict(lr=1)}
    asked = ask(tmp_path, candidates=own)
    assert [asked.share(name) for name in own] == [2.0, 0.125, 1.0]
    costs = {"a:4": (0.0, 0.01), "a:64": (0.0, 0.08), "b": (0.0, 0.01)}
    steps, _ = budget.divide(asked, costs, 0.0)
    assert steps * 0.125 >= 8
    with pytest.raises(ValueError, match="3 seeds of 64 steps"):
        budget.divide(ask(tmp_path, 12, candidates=own), costs, 0.0)
    assert budget.makespan([3, 1, 1, 1], 2) == 3


def test_a_run_is_its_candidate_at_one_rate_with_one_seed(monkeypatch, tmp_path):
    given = []
    rows = [{"loss": 3.0, "step_s": 1.0}] * 50 + [{"val_loss": 2.5}]
    monkeypatch.setattr(protocol, "train_run", lambda n, **fields: given.append(fields) or rows)
    own = {"a": dict(lr=1, batch_size=16), "a again": dict(lr=1, batch_size=16)}
    asked = ask(tmp_path, candidates=own, seed=7)
    for name in own:
        found = budget.run(asked, 100, dict(candidate=name, lr=0.5, seed=2), False)
    first, again = given
    assert found["val_loss"] == 2.5 and found["steps_s"] == 50 and found["curve"] == [3.0] * 25
    assert (first["lr"], first["steps"], first["seed"], first["data"]) == (0.5, 50, 9, "text.txt")
    assert first["eval_every"] == 50 and first["n_layer"] == 2
    assert again["seed"] not in range(7, 1000) and again | {"seed": 9} == first


def test_the_page_says_verdict_table_and_what_to_doubt(monkeypatch, tmp_path, capsys):
    session = play(monkeypatch, Played(gap=0.2), ask(tmp_path, 200), keep=True)
    claim_page.write(session)
    text = (tmp_path / "optimizers.md").read_text(encoding="utf-8")
    assert "**Verdict.** muon ends 0." in text and text.index("| muon |") < text.index("| adamw |")
    assert (tmp_path / "optimizers.png").stat().st_size > 10_000
    assert text.splitlines()[0] in capsys.readouterr().out
    session.rows = [r | {"val_loss": r["val_loss"] - r["trial"]} for r in session.rows]
    assert "of adamw, muon lies at the rim" in " ".join(claim_page.notes(session, []))
    assert "each run reads the text" not in claim_page.plan(session, 10**9)
    assert "each run reads the text" in claim_page.plan(session, 1000)


def sleeps(keys: dict, quick: bool) -> dict:
    time.sleep(keys["s"])
    return {"pid": os.getpid()}


def test_rows_that_still_run_at_the_deadline_are_stopped():
    began, rows = time.monotonic(), [{"s": 0.0}, {"s": 9.0}, {"s": 8.0}]
    found = protocol.measured(sleeps, rows, False, 2, 1, tqdm(disable=True), began + 0.5)
    assert [keys["s"] for keys, *_ in found] == [0.0]
    assert 0.4 < time.monotonic() - began < 3


# ---- the command ---------------------------------------------------------------------------------
def command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["optimizers.py", *words])
    names = [claims.slug(case) for case in optimizers.CASES]
    with pytest.raises(SystemExit) as ended:
        claims.main("optimizers.py", names, optimizers.candidate)
    return ended.value.code


@pytest.mark.parametrize(
    "words, says",
    [
        (["--optims=muon,adamw", "--data=none.txt"], "--data=none.txt does not exist"),
        (["--optims=muon,adamw", "--data=short.txt"], "is too short: "),
        (["--optims=muno,adamw"], "--optims: there is no muno; did you mean muon?"),
        (["--optims=muon"], "two candidates or more; type --optims=muon,adamw"),
        ([], "two candidates or more"),
        (["--optims=muon,adamw", "--data="], "--data=FILE is missing"),
        (["--optims=muon,adamw", "--budget=10"], "--budget=10 is no time; type --budget=10m"),
        (["--optims=muon,adamw", "--trials=0"], "--trials=0 is not allowed"),
        (["--optims=muon,adamw", "--range=0.5"], "--range=0.5 is not allowed"),
        (["--optims=muon,adamw", "--lr=1"], "--lr is set by the claim"),
        (["--optims=muon,adamw", "--optim=sgd"], "--optim is what is compared"),
        (["--optims=muon,adamw", "--n_emb=8"], "did you mean --n_embd?"),
        (["--optims=muon,adamw", "--n_embd=-8"], "n_embd"),
        (["--optims=muon,soap.Soup"], "no such class"),
        (["--optims=muon,adamw", "--budget=1s"], "--budget=1s is too small"),
        (["--optims=muon,adamw", f"--out={protocol.RESULTS}/mine"], "take another --out=DIR"),
    ],
)
def test_a_mistake_is_one_sentence(monkeypatch, tmp_path, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    Path("short.txt").write_text(TEXT[:5000])
    played = Played()
    monkeypatch.setattr(protocol, "measured", played.measured)
    monkeypatch.setattr(budget, "clock", lambda: played.now)
    data = [] if any(word.startswith("--data") for word in words) else ["--data=text.txt"]
    assert command(monkeypatch, *data, *words) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_claim_is_read(tmp_path):
    words = "--data=x.txt --optims=AdamW,muon,dion,muon --budget=90s --n_embd=32 --trials=5"
    names = [claims.slug(case) for case in optimizers.CASES]
    asked = claims.read("optimizers", words.split(), names, optimizers.candidate)
    assert [*asked.candidates] == ["adamw", "muon", "dion", "muon again"]
    assert asked.candidates["adamw"]["opt.betas"] == (0.9, 0.95)
    assert asked.candidates["dion"] == {"optim": "dion", "lr": 0.02}  # its class's own
    assert asked.candidates["muon"] == asked.candidates["muon again"]
    assert asked.budget == 90 and asked.fields["n_embd"] == "32" and asked.trials == 5
    assert asked.home == Path("out-claims/optimizers-x-adamw-muon-dion-muon_again")


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_without_data_an_experiment_is_what_it_was_and_its_example_is_read(monkeypatch, name):
    called = []
    monkeypatch.delitem(sys.modules, f"experiments.{name}", raising=False)  # runpy would warn
    monkeypatch.setattr(protocol, "main", lambda *given, **more: called.append((given, more)))
    monkeypatch.setattr(claims, "check_text", lambda asked: called.append(asked) or sys.exit(9))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick"])
    own = runpy.run_module(f"experiments.{name}", run_name="__main__")
    ((doc, _, grid, small, *functions), _) = called.pop()
    assert (doc, grid, small) == (own["__doc__"], own["GRID"], own["QUICK"]) and not called
    assert [f.__name__ for f in functions] == ["row", "table", "picture", "verdict"]
    claim = claims.CLAIMS[name]
    assert f"--data=FILE --{claim.flag}={claim.example}" in doc
    monkeypatch.setattr(
        sys, "argv", [f"{name}.py", "--data=x.txt", f"--{claim.flag}={claim.example}"]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"experiments.{name}", run_name="__main__")
    assert ended.value.code == 9 and len(called) == 1
    assert ",".join(called[0].candidates) == claim.example


# ---- runs as they are ----------------------------------------------------------------------------
TINY = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=4 --eval_tokens=512"


def start(folder: Path, *words: str) -> subprocess.Popen:
    (folder / "text.txt").write_text(TEXT * 3)
    given = [*TINY.split(), f"--data={folder}/text.txt", f"--out={folder}/out", *words]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.optimizers", *given],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def contents(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has ended
        return ""


@pytest.mark.slow
def test_one_optimizer_under_two_names_is_not_told_apart(tmp_path):
    """Time decides how many seeds there are, so chance may have its one time in 50."""
    verdicts = []
    for seed in (0, 100, 200):
        (tmp_path / str(seed)).mkdir()
        words = "--optims=adamw,adamw", "--budget=20s", f"--seed={seed}"
        out, error = start(tmp_path / str(seed), *words).communicate(timeout=60)
        verdicts += [line for line in out.splitlines() if "**Verdict.**" in line]
        assert "of 20 s)" in error, error
    assert len(verdicts) == 3
    assert sum("lower than" in verdict for verdict in verdicts) <= 1, verdicts


@pytest.mark.slow
def test_ctrl_c_leaves_a_table_and_no_process(tmp_path):
    process = start(tmp_path, "--optims=adamw,sgd", "--budget=60s", "--steps=60")
    csv, deadline = tmp_path / "out" / "optimizers.csv", time.monotonic() + 40
    while not csv.exists() or len(protocol.read(csv)) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command goes on" in error
    assert "not enough runs to tell" in out and "| sgd |" in out
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["spent"] > 0
    if sys.platform == "linux":  # a forked row has its parent's command line
        words = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in contents(p)]
        assert words == []
