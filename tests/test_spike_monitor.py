"""The spike monitor: what it finds and what it leaves alone, its policies, states that come back
bitwise."""

import importlib
import json
import math
import random
import re
from pathlib import Path
from statistics import median

import pytest
import torch
import torch._dynamo  # before the ranks are forked, as test_fsdp does
import torch.distributed.fsdp
import torch.distributed.tensor
from harness import fitted, gpu, run_ranks
from torch import nn

import monitor
from checkpoint import snapshots
from checkpoint.snapshots import SnapshotBuffer
from model import GPT, GPTConfig, initial_weight
from monitor import MonitorConfig, SpikeMonitor
from optim.adamw import AdamW
from optim.muon import Muon
from optim.param_groups import param_groups
from optim.schedule_free import AdamWScheduleFree
from parallel.ddp import DDP
from precision.loss_scale import LossScaler
from run.options import resolve_options
from settings import parse

CURVES = {
    line.split(",")[0]: [float(x) for x in line.split(",")[1:]]
    for line in (Path(__file__).parent / "data" / "clean_losses.csv").read_text().splitlines()[1:]
}


class Rows:
    """A position in the data with nothing else in it."""

    def __init__(self):
        self.next, self.bans = 0, []

    def skip(self, first, last):
        self.bans.append((first, last))


def guard(on_spike="warn", on_nonfinite="warn", loss_scaling=False, **numbers):
    model = nn.Linear(2, 2)
    optimizer, config = torch.optim.SGD(model.parameters(), 0.1), MonitorConfig(**numbers)
    return SpikeMonitor(model, optimizer, Rows(), (), on_spike, on_nonfinite, loss_scaling, config)


def fed(losses, norms=None, **options):
    """A guard that has seen these, and the steps at which it found a spike."""
    g, found = guard(**options), []
    for step, loss in enumerate(losses):
        g.check(step, loss, norms[step] if norms else 1.0, range(8 * step, 8 * step + 8))
        found += [step for event in g.events if event["event"] == "spike"]
    return g, found


def noise(n, seed=0, level=3.0, sd=0.05, fall=0.0):
    draw = random.Random(seed)
    return [level + fall * math.exp(-i / 40) + draw.gauss(0, sd) for i in range(n)]


# ---- detectors -----------------------------------------------------------------------------------
def test_clean_runs_of_every_optimizer_and_schedule_raise_no_alarm():
    assert sum(map(len, CURVES.values())) > 6000
    for name, losses in CURVES.items():
        for detector in ("robust", "previous", *(("ema", "window") if name == "lamb" else ())):
            assert fed(losses, detector=detector)[1] == [], (name, detector)


def test_robust_is_silent_on_a_steep_start_and_gaussian_noise():
    alarms = [step for seed in range(3) for step in fed(noise(800, seed, fall=4.0))[1]]
    assert alarms == []


def test_a_spike_of_8_robust_sd_is_found_on_its_own_step_in_real_curves():
    draw, hits, planted = random.Random(1), 0, 0
    for name, losses in CURVES.items():
        for _ in range(15):
            step = draw.randrange(21, len(losses))
            expected, limit = monitor.robust(losses[:step])
            value = expected + 8 * (limit - expected) / 5.75
            g = guard()
            g.seen.losses, g.seen.norms = losses[:step], [1.0] * step
            g.check(step, value, 1.0, range(8))
            planted, hits = planted + 1, hits + (g.events[0]["event"] == "spike" if g.events else 0)
    assert hits == planted == 135


def test_spikes_above_the_noise_of_the_neighbourhood_are_found():
    """8 sd of what an estimate from both sides says, on top of the step's own loss."""
    draw, hits, planted = random.Random(2), 0, 0
    for losses in CURVES.values():
        rest = [v - median(losses[max(0, i - 10) : i + 11]) for i, v in enumerate(losses)]
        for _ in range(10):
            step = draw.randrange(200, len(losses) - 1)
            sd = 1.4826 * median(map(abs, rest[step - 50 : step + 50]))
            expected, limit = monitor.robust(losses[:step])
            planted, hits = planted + 1, hits + (losses[step] + 8 * sd > limit)
    assert hits / planted > 0.9


@pytest.mark.parametrize(
    "detector, below, above, expected",
    [("ema", 14.9, 15.1, 3.0), ("window", 14.9, 15.1, 3.0), ("previous", 8.9, 9.1, 3.0)],
)
def test_presets_have_the_texts_factors(detector, below, above, expected):
    assert fed([3.0] * 30 + [below], detector=detector)[1] == []
    g, found = fed([3.0] * 30 + [above], detector=detector)
    assert found == [30] and g.events[0]["expected"] == pytest.approx(expected)


def test_numbers_of_a_preset_can_be_changed():
    assert fed([3.0] * 30 + [5.0], detector="ema", factor=1.5)[1] == [30]
    assert fed([3.0] * 30 + [5.0], detector="previous", factor=1.5)[1] == [30]
    losses = [1.0] * 30 + [3.0] * 8
    assert fed(losses + [12.0], detector="window", window=8)[1] == []  # mean 3
    assert fed(losses + [12.0], detector="window")[1] == [38]  # mean 1.4
    assert fed(noise(60) + [3.0 + 0.05 * 4.5], z=3.0)[1][-1] == 60
    assert fed([3.0] * 30 + [5.0], detector="ema", decay=0.5)[1] == []


def test_ema_is_debiased_and_weighs_the_newest_most():
    expected, limit = monitor.ema([1.0, 2.0], decay=0.5)
    assert expected == pytest.approx((0.5 * 1 + 2) / 1.5) and limit == 5 * expected
    x = [1.0, 4.0, 2.0, 8.0]
    weights = [0.9**i for i in range(3, -1, -1)]
    mean = sum(w * v for w, v in zip(weights, x)) / sum(weights)
    assert monitor.ema(x, decay=0.9)[0] == pytest.approx(mean, rel=1e-14)


def test_grad_norm_is_found_above_10_and_detectors_can_be_joined():
    assert fed([3.0] * 31, [1.0] * 30 + [9.9], detector="grad_norm")[1] == []
    g, found = fed([3.0] * 31, [1.0] * 30 + [10.1], detector="grad_norm")
    assert found == [30] and (g.events[0]["value"], g.events[0]["detector"]) == (10.1, "grad_norm")
    both = dict(detector="window+grad_norm")
    assert (
        fed([3.0] * 31, [1.0] * 30 + [10.1], **both)[1]
        == fed([3.0] * 30 + [16.0], **both)[1]
        == [30]
    )


def test_a_spike_is_compared_before_it_is_absorbed():
    losses = noise(60)
    g, found = fed(losses + [30.0] + losses + [30.0])
    assert found == [60, 121] and 30.0 not in g.seen.losses


@pytest.mark.parametrize("detector", ["robust", "ema", "window", "previous", "grad_norm"])
def test_a_lasting_level_is_accepted_as_the_tenth_in_a_row(detector):
    losses, norms = noise(100) + noise(100, 1, level=20.0), [1.0] * 100 + [40.0] * 100
    g, found = fed(losses, norms, detector=detector)
    assert found == [*range(100, 109)]
    g, found = fed(
        losses[:104] + losses[:1] + losses[100:],
        norms[:104] + norms[:1] + norms[100:],
        detector=detector,
    )
    assert found == [*range(100, 104), *range(105, 114)]  # an accepted step begins the row anew


def test_the_first_20_steps_are_silent_and_the_next_is_not():
    assert fed(noise(10) + [50.0] + noise(9))[1] == [] and fed(noise(20) + [50.0])[1] == [20]
    assert fed(noise(5) + [50.0], warmup=5)[1] == [5]


def test_what_is_not_finite_is_found_at_the_first_step_and_poisons_nothing():
    for bad in (math.nan, math.inf, -math.inf):
        for loss, norm in ((bad, 1.0), (3.0, bad), (bad, bad)):
            g = guard("skip", "skip")
            assert g.check(0, loss, norm, range(8)) == "skip"
            event = g.events[0]
            assert event["event"] == "nonfinite" and event["detector"] == "nonfinite"
            assert event["value"] is (norm if math.isfinite(loss) else loss) and event["rows"] == [
                0,
                7,
            ]
            assert g.seen.losses == g.seen.norms == []


def test_an_fp16_overflow_with_a_finite_loss_is_the_scalers():
    g = guard("skip", "skip", loss_scaling=True)
    assert g.check(0, 3.0, math.inf, range(8)) == "step" and g.events == [] and g.seen.losses == []
    assert g.check(0, math.nan, math.inf, range(8)) == "skip" and "bf16" in g.events[0]["remedy"]


def test_vanishing_gradients_are_one_warning_until_they_recover():
    g, told = guard("skip"), []
    for step, norm in enumerate([1, 0.02, 0.009, 0.005, 0.015, 0.009, 0.03, 0.001]):
        assert g.check(step, 3.0, norm, range(8)) == "step"
        told += [step for event in g.events if event["event"] == "vanishing"]
    assert told == [2, 7]


# ---- causes --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "norms, last, loss, cause",
    [
        ([1.0] * 60, 9.0, 30.0, "data outlier"),
        ([1.0] * 60, 1.1, 30.0, "batch composition"),
        ([1.0] * 45 + [1.2**i for i in range(15)], 20.0, 30.0, "lr too high: norms grew"),
        ([1.0] * 60, 1.0, math.nan, "overflow"),
    ],
)
def test_the_pattern_tells_the_cause(norms, last, loss, cause):
    g, _ = fed([*noise(60), loss], [*norms, last])
    assert g.events[0]["cause"].startswith(cause) and g.events[0]["remedy"]
    assert cause in g.events[0]["text"]


def test_spike_after_spike_means_the_lr_is_too_high():
    losses = noise(200)
    for step in (60, 100, 130):
        losses[step] = 30.0
    causes = [fed(losses[: step + 1])[0].events[0]["cause"] for step in (60, 100, 130)]
    assert causes[:2] == ["batch composition: harder samples"] * 2 and causes[2].startswith(
        "lr too high"
    )


def test_every_event_is_a_line_of_json_for_the_logger(tmp_path):
    from metrics import logger

    log = logger.Logger(tmp_path, 100)
    for event in fed([*noise(60), 30.0])[0].events + fed([math.nan])[0].events:
        assert {"step", "event", "detector", "value", "expected", "cause", "remedy", "rows"} <= {
            *event
        }
        log.event(**event)
    log.close()
    rows = logger.read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["event"], r["rows"]) for r in rows] == [
        (61, "spike", [480, 487]),
        (1, "nonfinite", [0, 7]),
    ]


# ---- policies ------------------------------------------------------------------------------------
def at_spike(policy, **options):
    g, _ = fed(noise(60), on_spike=policy, **options)
    g.snapshot(60)
    return g, g.check(60, 30.0, 9.0, range(480, 488))


def test_warn_and_skip():
    assert (
        at_spike("warn")[1] == "step"
        and at_spike("skip")[1] == "skip"
        and at_spike(None)[1] == "step"
    )
    assert at_spike(None)[0].events == [] and at_spike("skip")[0].events[0]["action"] == "skip"


def test_clip_is_tight_from_the_spike_on_for_a_while():
    g, verdict = at_spike("clip", recover=30)
    assert (
        verdict == "step"
        and g.max_norm(60, 1.0) == g.max_norm(89, None) == 0.1
        and g.max_norm(70, 0.05) == 0.05
    )
    assert g.max_norm(90, 1.0) == 1.0 and g.max_norm(90, None) is None


def test_lr_is_cut_and_grows_back_linearly():
    g, verdict = at_spike("lr_cut")
    assert verdict == "step" and [g.lr_factor(60 + i) for i in (0, 50, 100, 500)] == [
        0.5,
        0.75,
        1.0,
        1.0,
    ]
    g.check(110, 40.0, 9.0, range(8))
    assert g.lr_factor(110) == 0.375 and guard().lr_factor(0) == 1.0
    g = guard("lr_cut", "lr_cut")
    assert (
        g.check(0, math.nan, 1.0, range(8)) == "skip" and g.lr_factor(0) == 0.5
    )  # never a step of NaN


def test_abort_says_where_why_and_what_helps():
    g, verdict = at_spike("abort")
    assert verdict == "abort" and g.sentence.startswith("step 61: loss 30, expected 3.0")
    assert g.events[0]["remedy"] in g.sentence


def test_a_second_rollback_to_one_state_finds_it_as_it_was():
    g = guard("rollback", ring=1, ring_every=100)
    for _ in range(3):
        for step, loss in enumerate([*noise(60), 30.0]):
            g.snapshot(step)
            verdict = g.check(step, loss, 1.0, range(8 * step, 8 * step + 8))
        assert (verdict, g.back_at, g.seen) == ("rollback", 0, guard().seen)
    assert g.cursor.bans == [(0, 487), (0, 495), (0, 511)]  # 0, 1, 3 batches ahead


def test_rollback_goes_back_bans_the_rows_and_escalates_to_abort():
    g = guard("rollback", ring=3, ring_every=10)
    losses, step, back = noise(200), 0, []
    while step < 95:
        g.snapshot(step)
        g.cursor.next = 8 * step
        verdict = g.check(
            step, losses[step] if step != 57 else 30.0, 1.0, range(8 * step, 8 * step + 8)
        )
        if verdict == "rollback":
            assert [e["event"] for e in g.events] == ["spike", "rollback"]
            assert len(g.seen.losses) == g.back_at == g.events[1]["to"]
            back.append(g.back_at)
            step = g.back_at
            continue
        if verdict == "abort":
            break
        step += 1
    assert (
        back == [50, 40, 30, 30] and verdict == "abort" and "4 rollbacks did not help" in g.sentence
    )
    assert g.cursor.bans == [(392, 463), (312, 471), (232, 487), (232, 519)] and len(g.events) == 1


def test_a_far_later_rollback_begins_a_new_row():
    g = guard("rollback", ring=2, ring_every=10, rollbacks=1)
    losses, step, back, done = noise(400), 0, [], set()
    while step < 400:
        g.snapshot(step)
        spike = step in (57, 300) and step not in done
        done |= {step} if spike else set()
        verdict = g.check(step, 30.0 if spike else losses[step], 1.0, range(8 * step, 8 * step + 8))
        assert verdict != "abort"
        back += [g.back_at] if verdict == "rollback" else []
        step = g.back_at if verdict == "rollback" else step + 1
    assert back == [50, 290]


def test_ten_steps_in_a_row_without_a_number_end_the_run():
    g = guard("skip", "skip")
    assert [g.check(i, math.nan, 1.0, range(8)) for i in range(10)] == ["skip"] * 9 + ["abort"]
    g = guard("skip", "skip")
    for i in range(40):
        assert g.check(i, math.nan if i % 10 else 3.0, 1.0, range(8)) != "abort"
    g = guard("warn", "warn")
    assert {g.check(i, math.nan, 1.0, range(8)) for i in range(40)} == {"step"}


def test_a_resumed_guard_decides_bitwise_as_the_uninterrupted_one():
    losses = noise(300)
    for step in (50, 120, 121, 180):
        losses[step] = 30.0
    losses[200] = math.nan

    def run(g, first, last):
        return [
            (
                g.check(i, losses[i], 1 + losses[i], range(i, i + 1)),
                g.events,
                g.max_norm(i, 1.0),
                g.lr_factor(i),
            )
            for i in range(first, last)
        ]

    for policy in ("skip", "clip", "lr_cut"):
        for cut in (51, 121, 201):
            whole = guard(policy, "skip")
            expected = run(whole, 0, 300)
            first, second = guard(policy, "skip"), guard(policy, "skip")
            begun = run(first, 0, cut)
            tree = first.state_dict()
            text = json.dumps(tree)
            second.load_state_dict(json.loads(text))
            assert repr(begun + run(second, cut, 300)) == repr(expected)
            assert second.state_dict() == whole.state_dict() and json.dumps(tree) == text
    fresh = guard()
    fresh.load_state_dict({})
    assert fresh.state_dict() == guard().state_dict()


def decisions(rank, world):
    g, losses = guard("clip", "skip"), noise(80) + [30.0, math.nan] + noise(20)
    parts = torch.tensor([[x * w / 3 for w in ((1, 2) if world == 2 else (3,))] for x in losses])
    seen = []
    for step, part in enumerate(parts.double()):
        total = part[rank].clone()
        if world > 1:
            torch.distributed.all_reduce(total)
        seen.append((g.check(step, float(total), 1.0, range(8)), repr(g.events)))
    return seen, repr(g.state_dict())


def test_all_ranks_decide_alike():
    first, second = run_ranks(2, decisions)
    assert first == second and {v for v, _ in first[0]} == {"step", "skip"}


def test_mistakes_are_named():
    for options, words in (
        (dict(detector="robst"), "take robust"),
        (dict(z=3.0, detector="ema"), "--monitor.z means nothing"),
        (dict(factor=2.0), "--monitor.factor means nothing"),
        (dict(clip=0.0), "--monitor.clip=0.0"),
        (dict(decay=1.0, detector="ema"), "--monitor.decay"),
        (dict(window=2), "--monitor.window=2"),
        (dict(z=math.nan), "--monitor.z=nan"),
        (dict(z="much"), "--monitor.z=much"),
    ):
        with pytest.raises(ValueError, match=words):
            guard(**options)
    assert guard(vanishing=0).check(0, 1.0, 0.0, range(1)) == "step"


def test_options_fit_the_configs_check_of_signatures():
    def resolved(*words):
        cfg = parse.parse([f"--monitor.{word}" for word in words])
        return resolve_options(cfg, torch.optim.SGD)["monitor"]

    numbers = {"detector": "ema", "factor": 3, "accept": 5}
    assert resolved("detector=ema", "factor=3", "accept=5") == numbers
    for word, says in (
        ("acept=5", "did you mean --monitor.accept?"),
        ("accept=2.5", "wrong kind"),
        ("accept=0", "--monitor.accept=0: it takes a number, above 0 and below 1e"),
        ("warmup=3", "--monitor.warmup=3: it takes a number, 4 or more and below"),
        ("cut=1", "--monitor.cut has nothing to do without --on_spike=lr_cut"),
        ("factor=3", "--monitor.factor means nothing to detector=robust"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            resolved(word)


# ---- the ring ------------------------------------------------------------------------------------
OPTIMIZERS = [
    "sgd.SGD",
    "adamw.AdamW",
    "ademamix.AdEMAMix",
    "muon.Muon",
    "muown.Muown",
    "dion.Dion3",
    "pmuon.PMuon",
    "soap.SOAP",
    "shampoo.Shampoo",
    "adafactor.Adafactor",
    "lion.Lion",
    "lamb.LAMB",
    "mars.MARS",
    "schedule_free.AdamWScheduleFree",
]


def build(name, wrap=lambda optimizer: optimizer, device="cpu"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    model.to(device)
    file, cls = name.split(".")
    optimizer = getattr(importlib.import_module(f"optim.{file}"), cls)(model.parameters(), lr=0.01)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return model, wrap(optimizer)


def train(model, optimizer, first, last):
    for step in range(first, last):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(model[0].weight)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step()


def everything(model, optimizer):
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    state = [
        {k: v.tolist() if torch.is_tensor(v) else v for k, v in optimizer.state[p].items()}
        for g in optimizer.param_groups
        for p in g["params"]
        if p in optimizer.state
    ]
    return repr(([p.tolist() for p in model.parameters()], groups, state))


ON_GPU = ("adamw.AdamW", "muon.Muon", "soap.SOAP", "schedule_free.AdamWScheduleFree")


@pytest.mark.parametrize("name", [gpu(name) if name in ON_GPU else name for name in OPTIMIZERS])
@pytest.mark.parametrize("first", [0, 5])
def test_what_the_ring_puts_back_trains_on_bitwise(name, first, device):
    model, optimizer = build(name, device=device)
    ring = SnapshotBuffer(2, 1, model, optimizer)
    train(model, optimizer, 0, first)
    ring.snapshot(first)
    before = everything(model, optimizer)
    memory = [p.data_ptr() for p in model.parameters()]
    train(model, optimizer, first, 12)
    expected = everything(model, optimizer)
    for _ in range(2):  # the state in the ring is not touched by what follows
        assert ring.restore(12) == (first, None) and everything(model, optimizer) == before
        train(model, optimizer, first, 12)
        assert everything(model, optimizer) == expected != before
    assert memory == [p.data_ptr() for p in model.parameters()]


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_state_comes_back_in_its_own_memory(where, tmp_path, device):
    from memory.offload import offload

    def away(optimizer):
        return offload(optimizer, where, tmp_path, device)

    model, optimizer = build("adamw.AdamW", away, device)
    train(model, optimizer, 0, 3)
    ring = SnapshotBuffer(1, 1, model, optimizer)
    ring.snapshot(3)
    before, home = (
        everything(model, optimizer),
        optimizer.state[model[0].weight]["exp_avg"].data_ptr(),
    )
    train(model, optimizer, 3, 8)
    after = everything(model, optimizer)
    ring.restore(8)
    assert everything(model, optimizer) == before
    assert home == optimizer.state[model[0].weight]["exp_avg"].data_ptr()
    train(model, optimizer, 3, 8)
    assert everything(model, optimizer) == after


def test_the_ring_keeps_the_newest_and_goes_back_in_steps():
    model, optimizer = build("sgd.SGD")
    scaler = LossScaler(window=2)
    ring = SnapshotBuffer(2, 10, model, optimizer, [scaler])
    for step in range(35):
        ring.snapshot(step, f"at {step}")
        assert len(ring.states) <= 2
        scaler.update(True)
    scale = scaler.scale
    assert [state[0] for state in ring.states] == [20, 30]
    assert ring.restore(34) == (30, "at 30") and scaler.scale == 2.0 ** (16 + 15) < scale
    ring.snapshot(30)  # it is there
    assert ring.restore(34, 2) == (20, "at 20") and [state[0] for state in ring.states] == [20]
    ring = SnapshotBuffer(2, 10, model, optimizer)
    ring.snapshot(7)  # the first one whenever
    ring.snapshot(10)
    assert ring.restore(10) == (7, None)  # older than the step itself
    assert ring.restore(7) == (7, None)  # nothing older: the oldest


def on_layout(rank, world, folder, classes):
    """Trains, takes, trains on, goes back, trains on again: is every bit held here the same?"""
    from parallel.fsdp import FSDP
    from parallel.zero import ZeRO

    group, cpu, same = torch.distributed.group.WORLD, torch.device("cpu"), {}
    layouts = {
        "ddp": lambda: DDP(group, cpu),
        "fsdp": lambda: FSDP(group, cpu),
        "fsdp cpu": lambda: FSDP(group, cpu, offload_params="cpu"),
    }
    for stage in (1, 2, 3):
        layouts[f"zero{stage}"] = lambda stage=stage: ZeRO(group, cpu, stage)
    layouts["zero3 disk"] = lambda: ZeRO(
        group, cpu, 3, offload_params="disk", folder=f"{folder}/{rank}"
    )
    for name, make in layouts.items():
        for cls in classes:
            replicas = make()
            with torch.device("meta"):
                model = GPT(GPTConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=8, block_size=8))
            config, model = model.config, fitted(replicas, cls, model).parallelize(model)
            replicas.init_weights(lambda n, shape: initial_weight(config, n, shape))
            lrs = dict.fromkeys(("matrix", "embedding", "head", "scalar"), 0.02)
            groups = param_groups(model, lrs, 0.1, muon=cls is Muon)
            optimizer = replicas.make_optimizer(cls, groups)
            if hasattr(optimizer, "train"):
                optimizer.train()

            def steps(first, last):
                for step in range(first, last):
                    draw = torch.Generator().manual_seed(step)
                    x = torch.randint(99, (4, 9), generator=draw)[2 * rank : 2 * rank + 2]
                    replicas.last_micro_batch(True)
                    (model(x[:, :-1], x[:, 1:]) / 32).backward()
                    replicas.finish_gradients()
                    optimizer.step()
                    model.zero_grad(set_to_none=True)

            def held():
                params = [
                    *model.parameters(),
                    *(p for g in optimizer.param_groups for p in g["params"]),
                ]
                found = [
                    snapshots.local(p)
                    for p in params
                    if snapshots.local(p).untyped_storage().nbytes()
                ]
                found += [x for named in optimizer.state.values() for x in named.values()]
                return repr([x.tolist() if torch.is_tensor(x) else x for x in found])

            ring = SnapshotBuffer(1, 1, model, optimizer)
            steps(0, 2)
            ring.snapshot(2)
            before = held()
            steps(2, 5)
            after = held()
            ring.restore(5)
            back = held()
            steps(2, 5)
            same[name, cls.__name__] = back == before != after and held() == after
    return same


@pytest.mark.parametrize(
    "classes", [[Muon], pytest.param([AdamW, AdamWScheduleFree], marks=pytest.mark.slow)]
)
def test_the_ring_goes_back_bitwise_on_every_layout(tmp_path, classes):
    for same in run_ranks(2, on_layout, str(tmp_path), classes):
        assert len(same) == 7 * len(classes) and all(same.values()), same
