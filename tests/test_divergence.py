"""A run that has diverged, or learns nothing, is named once; one that learns is not."""

import importlib
import json
import math
import random

import numpy as np
import pytest
from harness import run_ranks
from test_train import go

from checkpoint import load
from data.dataset import Tokens
from metrics import logger
from metrics.divergence import Divergence, unigram_entropy
from monitor import Aborted, SpikeMonitor
from run import build
from search.trials import Trial
from settings.fields import Config

GUESS = math.log(256)
UNIGRAM = 3.2
STEPS = 200  # blocks of 10


def fresh(policy="warn", steps=STEPS, warmup=10) -> Divergence:
    return Divergence(policy, steps, warmup, 256, UNIGRAM)


def noisy(levels: list[float], sd: float = 0.03, seed: int = 0, n: int = 10) -> list[float]:
    """n losses about each of these levels."""
    draw = random.Random(seed)
    return [draw.gauss(level, sd) for level in levels for _ in range(n)]


def told(losses: list[float], evaluations: dict | None = None, **options) -> list[tuple]:
    """(step, event) of all that is said of a run with these losses, and evaluations by step."""
    watch = fresh(**options)
    found = []
    for step, loss in enumerate([None, *losses]):
        if step > 0:
            watch.update(step, loss)
        if evaluations is not None and step in evaluations:
            watch.evaluated(step, evaluations[step])
        found += [(event["step"], event["event"]) for event in watch.pop_events()]
    return found


FALLING = [GUESS - 3.3 * (1 - 0.7**i) for i in range(12)]  # to 2.3


# ---- training losses -----------------------------------------------------------------------------
def test_a_run_that_learns_is_not_named():
    whole = FALLING + [2.3 - 0.02 * i for i in range(8)]
    assert told(noisy(whole)) == told(noisy(whole, sd=0.5)) == []
    # A restart of the schedule, and training on when all is memorised.
    assert told(noisy(FALLING + [2.75] * 4 + [2.2] * 4)) == []
    assert told([GUESS, *noisy([3.0, 1.0, 0.3, 0.1, *[0.02, 0.2] * 8])]) == []
    # Spikes that go again, the last one long.
    spiky = noisy(whole)
    spiky[100] = spiky[150] = math.inf
    spiky[121:124] = [9.0] * 3
    assert told(spiky) == []
    # One in each block.
    spiky[125::10] = [40.0] * 8
    assert told(spiky) == []


def test_a_loss_that_has_risen_is_named_at_its_third_level_once():
    risen = FALLING + [3.1] * 8
    assert told(noisy(risen)) == [(150, "divergence")]
    # Above that of guessing, and then once more.
    assert told(noisy(FALLING + [3.1] * 4 + [4.2] * 4)) == [(150, "divergence")]
    worse = noisy(FALLING + [3.1] * 3 + [6.0] * 5)
    assert told(worse) == [(150, "divergence"), (160, "divergence")]
    # While it comes down by itself it is left alone.
    assert told(noisy(FALLING + [4.4, 4.1, 3.8, 3.5, 3.2, 2.9, 2.6, 2.4])) == []


def test_a_slow_rise_is_named_too():
    slow = FALLING + [2.3 + 0.1 * i for i in range(1, 15)]
    found = told(noisy(slow))
    assert [event for _, event in found] == ["divergence"] and 190 <= found[0][0] <= 220


def test_who_recovers_to_a_new_best_is_named_anew():
    twice = FALLING + [3.1] * 3 + [2.0] + [3.1] * 4
    assert told(noisy(twice)) == [(150, "divergence"), (190, "divergence")]


def test_a_loss_above_that_of_guessing_is_named():
    assert told([GUESS, *noisy([5.9] * 20)], warmup=0)[0] == (30, "divergence")
    assert told([GUESS, *noisy([5.9] * 20)], warmup=50)[0] == (80, "divergence")
    assert told([GUESS] + [math.nan] * 199)[0][1] == "divergence"
    # Random weights may begin above it.
    assert told([6.5, *noisy([6.2, 5.8, 5.7, *FALLING[1:], *[2.3] * 8])], warmup=20) == []


def test_a_pretrained_model_is_measured_against_its_own_start():
    assert told([1.5, *noisy([1.5] + [1.8] * 19)]) == []
    assert told([1.5, *noisy([1.5] + [2.1] * 19)]) == [(40, "divergence")]
    # Its first batch may be a lucky one: the evaluation before it knows better.
    lucky = [1.2, *noisy([1.6] * 20)]
    assert told(lucky) != [] and told(lucky, {0: 1.5}) == []


# ---- evaluations ---------------------------------------------------------------------------------
def test_an_overfitted_run_is_not_named_whatever_its_validation_loss():
    learnt = noisy([GUESS - 5.4 * (1 - 0.75**i) for i in range(20)])
    evaluations = {0: GUESS, 50: 2.5, 100: 4.0, 150: 7.0, 200: 9.0}
    assert told(learnt, evaluations) == []
    # The same where what is trained on is no better than at the beginning.
    above = [GUESS, *noisy([5.6] * 20)]
    assert told(above) == [(110, "stuck")]
    assert told(above, evaluations) == [(110, "stuck"), (200, "divergence")]


def test_at_the_end_two_per_cent_above_the_first_evaluation_are_named():
    worse = [1.5, *noisy([1.5] + [1.6] * 19)]
    assert told(worse, {0: 1.5, 100: 1.6, 200: 1.6}) == [(200, "divergence")]
    assert told(worse, {0: 1.5, 100: 1.6, 200: 1.52}) == []
    assert told(worse, {0: 1.5, 100: 1.6, 150: 1.6}) == []


def test_an_evaluation_that_is_repeated_counts_once():
    watch = fresh()
    for step, loss in enumerate([GUESS, *noisy([5.62] * 12)], 1):
        watch.update(step, loss)
    watch.evaluated(0, GUESS)
    watch.evaluated(60, 5.9)
    watch.evaluated(60, 5.9)
    watch.pop_events()
    assert watch.pop_events() == []
    watch.evaluated(90, 5.9)
    assert [event["event"] for event in watch.pop_events()] == ["divergence"]


# ---- stuck ---------------------------------------------------------------------------------------
def test_a_run_that_stays_where_it_began_is_named_and_what_to_try():
    watch = fresh()
    for step, loss in enumerate(noisy([GUESS - 0.001 * i for i in range(20)]), 1):
        watch.update(step, loss)
    (event,) = watch.pop_events()
    assert (event["event"], event["step"]) == ("stuck", 110)
    assert "is where it began" in event["text"] and "--lr is far too low" in event["text"]


def test_a_run_that_stays_at_the_level_of_single_tokens_is_named():
    assert told(noisy([GUESS, 4.0] + [3.25] * 18)) == [(110, "stuck")]
    assert told(noisy([GUESS, 4.0] + [3.25] * 12 + [3.0, 2.9, 2.8, 2.7])) == [(110, "stuck")]
    # Below it something is learnt of the order of tokens.
    assert told(noisy([GUESS, 4.0] + [3.0] * 18)) == []


def test_while_the_loss_falls_it_is_not_stuck():
    assert told(noisy([GUESS - 0.08 * i for i in range(20)])) == []  # to 4.0
    assert told(noisy([GUESS - 0.01 * i for i in range(20)])) == [(110, "stuck")]
    # Random weights may begin above the loss of guessing, and then stay there.
    assert told([5.75, *noisy([5.7] * 20)]) == [(110, "stuck")]


def test_what_has_diverged_is_not_called_stuck_too():
    assert told([GUESS, *noisy([5.9] * 20)], warmup=0) == [(30, "divergence")]


# ---- policies, state -----------------------------------------------------------------------------
def test_none_says_nothing_and_a_short_run_is_not_judged():
    bad = [GUESS, *noisy([9.0] * 20)]
    assert told(bad, {0: GUESS, 100: 9.0, 200: 9.0}, policy=None) == []
    assert told(bad[:14], {0: GUESS, 14: 9.0}, steps=14, warmup=0) == []
    assert told(bad[:15], steps=15, warmup=0) == [(15, "divergence")]


def test_abort_says_why_and_does_so_again_where_the_run_is_continued():
    watch = fresh("abort")
    losses = noisy(FALLING + [3.1] * 8)
    for step, loss in enumerate(losses[:150], 1):
        assert watch.sentence == ""
        watch.update(step, loss)
    assert watch.sentence.startswith("step 150: training loss 3.1") and "--lr" in watch.sentence
    assert watch.pop_events()[0]["action"] == "abort"
    again = fresh("abort")
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    for step, loss in enumerate(losses[150:160], 151):
        again.update(step, loss)
    assert again.sentence.startswith("step 160")


def test_stuck_never_ends_a_run():
    watch = fresh("abort")
    for step in range(1, STEPS + 1):
        watch.update(step, GUESS)
    assert [event["event"] for event in watch.pop_events()] == ["stuck"] and watch.sentence == ""


@pytest.mark.parametrize("cut", [1, 47, 120, 149, 150, 151, 170])
def test_a_resumed_run_is_told_what_the_uninterrupted_one_is(cut):
    losses = noisy(FALLING + [3.1] * 4 + [4.2] * 4)
    evaluations = {0: GUESS, 60: 3.0, 120: 5.9, 150: 5.9, 200: 5.9}

    def follow(watch: Divergence, first: int, last: int) -> list[dict]:
        for step in range(first, last + 1):
            if step > 0:
                watch.update(step, losses[step - 1])
            if step in evaluations:
                watch.evaluated(step, evaluations[step])
        return watch.pop_events()

    whole, begun, resumed = fresh(), fresh(), fresh()
    expected = follow(whole, 0, 200)
    found = follow(begun, 0, cut)
    saved = begun.state_dict()
    as_text = json.dumps(saved)
    resumed.load_state_dict(json.loads(as_text))
    assert found + follow(resumed, cut + 1, 200) == expected != []
    assert resumed.state_dict() == whole.state_dict()
    # A snapshot stays what it was while the run goes on.
    follow(begun, cut + 1, 200)
    assert json.dumps(saved) == as_text
    # A checkpoint from before there was this.
    resumed.load_state_dict({})
    assert resumed.seen["told"] == whole.seen["told"]


# ---- the entropy of single tokens ----------------------------------------------------------------
def test_the_entropy_of_single_tokens_is_that_of_the_text():
    ids = np.array([0] * 50 + [1] * 25 + [2] * 25, dtype=np.uint16)
    assert unigram_entropy(Tokens([ids])) == pytest.approx(1.5 * math.log(2))
    text = np.random.default_rng(0).integers(0, 16, 300_000).astype(np.uint16)
    text = Tokens([text[:100_001], text[100_001:]])
    assert unigram_entropy(text, pieces=20, length=1000) == pytest.approx(math.log(16), abs=1e-3)
    halves = Tokens([np.repeat(np.array([3, 7], dtype=np.uint16), 500_000)])
    assert unigram_entropy(halves) == pytest.approx(math.log(2), abs=1e-3)


# ---- in a run ------------------------------------------------------------------------------------
BAD = ["--optim=adamw", "--lr=1", "--grad_clip=none", "--on_spike=none", "--warmup_steps=0"]
BAD += ["--arch=gpt2", "--steps=60", "--eval_every=0"]


def events(out_dir, *names: str) -> list[dict]:
    rows = logger.read_metrics(out_dir / "metrics.jsonl")
    return [row for row in rows if row.get("event") in names]


def test_a_diverged_run_says_so_once_on_the_screen_and_in_its_metrics(tmp_path, text, capsys):
    go(text, tmp_path, *BAD)
    (event,) = events(tmp_path, "divergence", "stuck")
    assert event["event"] == "divergence" and event["action"] == "warn" and event["step"] <= 30
    said = [line for line in capsys.readouterr().out.splitlines() if "has diverged" in line]
    assert len(said) == 1 and event["text"] in said[0]
    assert load.newest(tmp_path).step == 60
    go(text, tmp_path / "off", *BAD, "--on_divergence=none", "--steps=20")
    assert events(tmp_path / "off", "divergence", "stuck") == []
    # A branch starts anew: its own first loss is its start.
    before = load.newest(tmp_path).tree("divergence")["start"]
    go(text, tmp_path / "b", f"--resume={tmp_path}", "--steps=61")
    first = next(row for row in logger.read_metrics(tmp_path / "b/metrics.jsonl") if "lr" in row)
    assert load.newest(tmp_path / "b").tree("divergence")["start"] == first["loss"] != before


def test_a_rollback_undoes_what_was_seen(tmp_path, text, monkeypatch):
    detect, calls = SpikeMonitor.detect, []

    def once(self, *loss_and_norm):
        calls.append(loss_and_norm)
        return ("robust", 1.0) if len(calls) == 9 else detect(self, *loss_and_norm)

    monkeypatch.setattr(SpikeMonitor, "detect", once)
    go(text, tmp_path, "--on_spike=rollback", "--monitor.ring_every=5", "--eval_every=0")
    (event,) = events(tmp_path, "rollback")
    assert (event["step"], event["to"]) == (9, 5)
    losses = [row["loss"] for row in logger.read_metrics(tmp_path / "metrics.jsonl") if "lr" in row]
    assert len(losses) == 15  # 8 and 7 more, three of them again
    saved = load.newest(tmp_path).tree("divergence")
    assert saved["block"] == losses[-2:] and len(saved["levels"]) == 2


def test_early_stopping_acts_first(tmp_path, text, monkeypatch):
    seen = []
    monkeypatch.setattr(Divergence, "evaluated", lambda self, *found: seen.append(found))
    go(text, tmp_path, *BAD, "--eval_every=4", "--eval_tokens=64", "--patience=2")
    assert [step for step, _ in seen] == [0, 4] and seen[1][1] > seen[0][1]
    assert load.newest(tmp_path).step == 8


def test_warm_up_is_that_of_the_schedule():
    text = Tokens([np.arange(256, dtype=np.uint16)])
    for fields, warmup in ((dict(warmup_frac=0.25), 15), (dict(warmup_steps=7), 7)):
        built = build.divergence(Config(steps=60, vocab_size=256, **fields), text)
        assert (built.warmup, built.steps, built.policy) == (warmup, 60, "warn")
        assert built.guess == pytest.approx(built.unigram)


def aborted(rank: int, world: int, *args) -> str:
    with pytest.raises(Aborted) as error:
        go(*args)
    return str(error.value)


def test_abort_saves_and_ends_all_ranks_alike_and_a_search_counts_it(tmp_path, text, capsys):
    sentence = aborted(0, 1, text, tmp_path / "one", *BAD, "--on_divergence=abort")
    assert "; the monitor ended it\n" in capsys.readouterr().out
    (event,) = events(tmp_path / "one", "divergence")
    step = event["step"]
    assert (
        sentence == f"step {step}: {event['text']}" and load.newest(tmp_path / "one").step == step
    )
    two = tmp_path / "two"
    said = run_ranks(2, aborted, text, two, *BAD, "--on_divergence=abort", "--precision=fp64")
    assert said[0] == said[1] and load.newest(two).step < 60
    trial = Trial(tmp_path / "one", 0)
    trial.steps = 60
    trial.judge("loss", 1)
    assert trial.status == "diverged" and event["text"][:40] in trial.error
    # The same command resumes, and ends at a later block.
    with pytest.raises(Aborted, match=r"step \d+: ") as error:
        go(text, tmp_path / "one", *BAD, "--on_divergence=abort")
    assert step < int(str(error.value).split(":")[0].split()[1]) < 60


# ---- an extended run: its learning rate jumps, and that is said ----------------------------------
@pytest.mark.parametrize("keep", ["none", "1"])
def test_an_extended_run_says_both_learning_rates_why_and_what_to_type_instead(
    tmp_path, text, capsys, keep
):
    out = tmp_path / "out"
    more = ["--save_every=2", f"--keep={keep}", "--eval_every=0", "--decay_frac=0.5"]
    go(text, out, *more)
    capsys.readouterr()
    go(text, out, *more, "--steps=15")
    (said,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("lr goes"))
    rows = [row for row in logger.read_metrics(out / "metrics.jsonl") if "lr" in row]
    old, new = (f"{row['lr']:.1e}" for row in rows[11:13])
    assert said.startswith(f"lr goes from {old} to {new} at step 12: steps=15 (12 before); ")
    if keep == "1":
        assert "--resume=OUT/step-N --out_dir=NEW, from a checkpoint before the decay" in said
        assert "(step 6 or earlier), but none is left" in said
        return
    # The last one before lr fell: its branch goes on at the peak.
    resume = f"--resume={out}/step-00000006"
    assert said.endswith(f"; without the jump: {resume} --out_dir=NEW")
    go(text, tmp_path / "new", *more, "--steps=15", resume)
    assert "lr goes" not in capsys.readouterr().out


# ---- the experiment's verdict follows the figures ------------------------------------------------
def test_the_experiments_verdict_follows_the_figures():
    e = importlib.import_module("experiments.divergence")
    assert [len(runs) for runs in e.RUNS.values()] == [20, 20, 40]
    good = [
        g | {"named": [] if g["kind"] == "healthy" else ["stuck"], "at": [], "steps": 200}
        for g in e.GRID
    ]
    assert e.verdict(good)[:2] == (
        "holds",
        "40 of 40 bad runs are named; 0 of 40 runs that learn are named",
    )
    missed = [r | {"named": []} if i < 2 else r for i, r in enumerate(good)]
    assert e.verdict(missed)[0] == "holds"
    missed[2]["named"] = []
    assert e.verdict(missed)[0] == "holds in part"
    assert e.verdict([*good[:-1], good[-1] | {"named": ["stuck"]}])[0] == "holds in part"
    levels = [5.0, 4.0, 3.0, 2.5, 2.4, 2.3, 2.2, 2.2, 2.2, 2.2]
    r = {"begin": 5.5, "unigram": 3.2, "levels": levels}
    assert e.learns(r) and not e.learns(r | {"levels": [*levels[:-1], 2.5]})
    slow = [5.4 - 0.1 * i for i in range(10)]
    assert e.learns(r | {"levels": slow}) and not e.learns(r | {"levels": [5.4] * 10})
