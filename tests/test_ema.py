"""A running average of the weights, EMA-Nesterov: plain loops, torch's average, runs, layouts."""

import copy
import json
import pickle

import pytest
import torch
from harness import run_ranks
from matrix import LAYOUTS, MODEL_PARALLEL, column, difference
from test_hooks import CLASSES, SLOW, groups, problem
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sweep
import train
from checkpoint.load import load
from hooks.ema import averaged
from hooks.ema_nesterov import EMANesterov
from hooks.hyperball import Hyperball
from hooks.keep import beneath
from hooks.wear import hooked
from metrics import logger
from optim.adamw import AdamW
from optim.param_groups import evaluation_weights
from optim.schedule_free import AdamWScheduleFree
from optim.sgd import SGD
from parallel.sharded_optimizer import make_optimizer
from run import auto, optimizers, summary
from search import trials
from settings import parse

by_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__module__)


def step(model, x, optimizer):
    model(x).sub(x.flip(1)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def close(found, wanted, tolerance=1e-13):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- the average ---------------------------------------------------------------------------------
@by_class
def test_the_average_is_torchs_and_the_run_is_the_optimizers_own(cls):
    model, x = problem()
    twin = copy.deepcopy(model)
    optimizer = averaged(cls, 4, 3, 0.6)(groups(model, cls), lr=0.05, **CLASSES[cls])
    plain = cls(groups(twin, cls), lr=0.05, **CLASSES[cls])
    theirs = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / 4))
    for i in range(1, 9):
        step(model, x, optimizer)
        step(twin, x, plain)
        if i >= 3:
            theirs.update_parameters(twin)
        assert all(map(torch.equal, weights(model), weights(twin)))
        optimizer.eval()
        optimizer.eval()  # twice does no more
        wanted = [w.lerp(e, 0.6) for w, e in zip(weights(twin), weights(theirs.module))]
        close(weights(model), weights(twin) if i < 3 else wanted)
        optimizer.train()
        optimizer.train()
        assert all(map(torch.equal, weights(model), weights(twin)))
        optimizer.eval(blend=False)
        assert all(map(torch.equal, weights(model), weights(twin)))
        optimizer.train()
    assert isinstance(optimizer, cls) and beneath(type(optimizer)) is cls


def test_a_parameter_counts_from_its_first_gradient_on_and_a_step_without_one_counts():
    used, idle, late = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = averaged(AdamW, 2)([used, idle, late], lr=0.1)
    for i in range(3):
        used.grad = torch.ones(2)
        late.grad = torch.ones(2) if i == 1 else None
        optimizer.step()
    assert "ema" in optimizer.state[used] and idle not in optimizer.state
    assert torch.equal(optimizer.state[late]["ema"], late)  # averaged with itself


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_of_half_precision_the_average_is_float32_and_loads_so(dtype):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(9).to(dtype))
    optimizer = averaged(SGD, 100)([w], lr=0.1)
    path = []
    for _ in range(5):
        w.grad = torch.randn(9).to(dtype)
        optimizer.step()
        path.append(w.detach().float())
    wanted = path[0]
    for x in path[1:]:
        wanted = wanted + (x - wanted) / 100
    close([optimizer.state[w]["ema"]], [wanted], 1e-6)
    again = averaged(SGD, 100)([w], lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(again.state[w]["ema"], optimizer.state[w]["ema"])
    again.eval()
    assert torch.equal(w, optimizer.state[w]["ema"].to(dtype))
    again.train()
    assert torch.equal(w.float(), path[-1])


# ---- EMA-Nesterov --------------------------------------------------------------------------------
LRS = (0.05, 0.05, 0.04, 0.03, 0.02, 0.02, 0.01, 0.005)


def by_hand(cls, follow=None, start=2, stop=6):
    """The paper's two lines around a plain optimizer: (W after each step, the points ahead)."""
    model, x = problem()
    optimizer = cls(groups(model, cls), lr=0.05, **CLASSES[cls])
    kinds = [g["kind"] for g in optimizer.param_groups for _ in g["params"]]
    params = [p for g in optimizer.param_groups for p in g["params"]]
    b = [torch.zeros_like(p) for p in params]
    share = dict.fromkeys(kinds, 1.0)
    found = []
    for t, lr in enumerate(LRS):
        before = [p.detach().clone() for p in params]
        for p, kind, mean in zip(params, kinds, b):
            if start <= t < stop:
                p.data += 0.7 * share[follow or kind] * mean
        ahead = weights(model)
        for group in optimizer.param_groups:
            group["lr"] = lr * (2 if group["kind"] == "scalar" and t == 2 else 1)
            share[group["kind"]] = group["lr"] / 0.05
        step(model, x, optimizer)
        for i, p in enumerate(params):
            b[i] = 0.8 * b[i] + 0.2 * (p.detach() - before[i])
        found.append((weights(model), ahead))
    return found


@by_class
@pytest.mark.parametrize("follow", (None, "scalar"))
def test_ema_nesterov_is_the_papers_two_lines(cls, follow):
    hook = EMANesterov(beta=0.7, gamma=0.8, start=2, stop=6, follow=follow)
    model, x = problem()
    optimizer = hook.wear(cls)(groups(model, cls), lr=0.05, **CLASSES[cls])
    for t, (lr, (wanted, ahead)) in enumerate(zip(LRS, by_hand(cls, follow))):
        for group in optimizer.param_groups:
            group["lr"] = lr * (2 if group["kind"] == "scalar" and t == 2 else 1)
        close(weights(model), ahead)
        step(model, x, optimizer)
        there = weights(model)
        optimizer.eval()
        optimizer.eval()
        close(weights(model), wanted)
        optimizer.train()
        optimizer.train()
        assert all(map(torch.equal, weights(model), there))
    looked = [not torch.equal(a, w) for a, w in zip(ahead, wanted)]
    assert all(looked)
    close(by_hand(cls, follow, 9, 10)[-1][0], by_plain(cls))  # without a window the optimizer's own


def by_plain(cls):
    model, x = problem()
    optimizer = cls(groups(model, cls), lr=0.05, **CLASSES[cls])
    for t, lr in enumerate(LRS):
        for group in optimizer.param_groups:
            group["lr"] = lr * (2 if group["kind"] == "scalar" and t == 2 else 1)
        step(model, x, optimizer)
    return weights(model)


def test_in_half_precision_the_mean_step_is_float32_and_loads_so():
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(9).bfloat16())
    cls = EMANesterov(beta=0.9).wear(AdamW)
    optimizer = cls([w], lr=0.1)
    for _ in range(4):
        w.grad = torch.randn(9).bfloat16()
        optimizer.step()
    state = optimizer.state[w]
    assert state["mean_step"].dtype == torch.float32 and state["held"].dtype == torch.bfloat16
    ahead = (state["held"].float() + 0.9 * state["mean_step"]).bfloat16()
    assert torch.equal(w, ahead) and not torch.equal(w, state["held"])
    again = cls([w], lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key in ("held", "mean_step"):
        assert torch.equal(again.state[w][key], state[key])


# ---- both, and what surrounds them ---------------------------------------------------------------
def both(cls):
    return EMANesterov(beta=0.9, gamma=0.9).wear(averaged(hooked(cls, [Hyperball()]), 3, 2, 0.5))


def test_with_both_the_average_is_of_the_weights_and_not_of_the_points_ahead():
    model, x = problem()
    optimizer = both(AdamW)(model.parameters(), lr=0.05, weight_decay=0.0)
    path = []
    for _ in range(6):
        step(model, x, optimizer)
        there = weights(model)
        optimizer.eval(blend=False)
        path.append(weights(model))
        optimizer.train()
        assert all(map(torch.equal, weights(model), there))
    mean = path[1]
    for ws in path[2:]:
        mean = [m + (w - m) / 3 for m, w in zip(mean, ws)]
    optimizer.eval()
    close(weights(model), [(w + m) / 2 for w, m in zip(path[-1], mean)])
    optimizer.train()
    assert all(map(torch.equal, weights(model), there))
    with evaluation_weights(optimizer_named(optimizer)) as training:
        assert all(map(torch.equal, training.values(), there))
        close(weights(model), [(w + m) / 2 for w, m in zip(path[-1], mean)])
    assert all(map(torch.equal, weights(model), there))


def optimizer_named(optimizer):
    for group in optimizer.param_groups:
        group["names"] = [str(i) for i, _ in enumerate(group["params"])]
    return optimizer


def test_a_copy_a_pickle_and_a_loaded_state_go_on_as_the_original():
    model, x = problem()
    optimizer = both(AdamW)(model.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(3):
        step(model, x, optimizer)
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    other = copy.deepcopy(model)
    loaded = both(AdamW)(other.parameters(), lr=0.05, weight_decay=0.0)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twins.append((other, loaded))
    step(model, x, optimizer)
    for a, b in twins:
        step(a, x, b)
        assert all(map(torch.equal, weights(a), weights(model)))
        b.eval()
    optimizer.eval()
    for a, _ in twins:
        assert all(map(torch.equal, weights(a), weights(model)))


@pytest.mark.parametrize("cls", (averaged(SGD, 5), EMANesterov().wear(SGD), both(SGD)))
def test_a_step_in_eval_mode_raises_and_a_closure_and_step_hooks_work(cls):
    calls = []
    w = torch.nn.Parameter(torch.ones(2, 2))
    SGD([w], lr=0.1)  # torch wraps a class's step() at its first instance
    optimizer = cls([w], lr=0.1)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure():
        w.grad = torch.ones(2, 2) * 0.5
        return 7.0

    assert optimizer.step(closure) == 7.0 and calls == [1]
    assert {"ema", "held"} & optimizer.state[w].keys()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="train()"):
        optimizer.step()
    optimizer.train()
    optimizer.step()


def test_load_hooks_reorder_and_edit_what_is_kept():
    cls = EMANesterov(gamma=0.5).wear(averaged(AdamW, 3))
    ws = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = cls(ws, lr=0.1)
    for i in range(3):
        for k, w in enumerate(ws):
            w.grad = torch.full((2,), (-1.0) ** k + i)
        optimizer.step()
    again = cls(ws[::-1], lr=0.1)
    again.register_load_state_dict_pre_hook(
        lambda _, saved: saved | {"param_groups": [saved["param_groups"][0] | {"params": [1, 0]}]}
    )

    def double(loaded):
        for w in ws:
            loaded.state[w]["ema"] *= 2

    again.register_load_state_dict_post_hook(double)
    for _ in range(2):  # nothing of the first load stays for the second
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for w in ws:
            assert torch.equal(again.state[w]["ema"], 2 * optimizer.state[w]["ema"])
            for key in ("held", "mean_step", "exp_avg"):
                assert torch.equal(again.state[w][key], optimizer.state[w][key])
    assert not torch.equal(*(optimizer.state[w]["ema"] for w in ws))
    n_hooks = [len(again._optimizer_load_state_dict_pre_hooks)]
    assert [*n_hooks, len(again._optimizer_load_state_dict_post_hooks)] == [1, 1]


def test_what_is_refused():
    for cls in (AdamWScheduleFree, averaged(SGD, 5), EMANesterov().wear(SGD)):
        with pytest.raises(ValueError, match="second set of weights already"):
            averaged(cls, 5)
    for cls in (AdamWScheduleFree, EMANesterov().wear(SGD), EMANesterov().wear(averaged(SGD, 5))):
        with pytest.raises(ValueError, match="second set of weights by itself"):
            EMANesterov().wear(cls)
    follows = EMANesterov(follow="head").wear(SGD)([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    follows.param_groups[0]["params"][0].grad = torch.ones(2)
    with pytest.raises(ValueError, match="no group is of this kind"):
        follows.step()
    for bad in ((0.5,), (float("nan"),), (5, -1), (5, 0, 0.0), (5, 0, 1.1)):
        with pytest.raises(ValueError, match="not allowed"):
            averaged(SGD, *bad)
    for bad in (dict(beta=0), dict(beta=1), dict(gamma=1), dict(start=3, stop=3), dict(start=-1)):
        with pytest.raises(ValueError, match="not allowed"):
            EMANesterov(**bad)


def sharded(rank, world, cls):
    model, x = problem()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = make_optimizer(cls, model.parameters(), lr=0.05)
    for _ in range(3):
        step(model, x, optimizer)
    optimizer.eval()
    found = [p.full_tensor().detach().clone() for p in model.parameters()]
    optimizer.train()
    step(model, x, optimizer)
    return found, [p.full_tensor().detach() for p in model.parameters()]


@pytest.mark.parametrize(
    "cls", (averaged(AdamW, 3, 2, 0.7), pytest.param(EMANesterov(beta=0.9).wear(SGD), marks=SLOW))
)
def test_under_fully_shard(cls):
    model, x = problem()
    optimizer = cls(model.parameters(), lr=0.05)
    for _ in range(3):
        step(model, x, optimizer)
    optimizer.eval()
    looked = weights(model)
    optimizer.train()
    step(model, x, optimizer)
    for found in run_ranks(2, sharded, cls):
        close(found[0], looked, 1e-9)
        close(found[1], weights(model), 1e-9)


# ---- runs ----------------------------------------------------------------------------------------
WORN = ["--ema=3", "--ema_from=2", "--ema_share=0.6", "--hooks=ema_nesterov"]
WORN += [f"--hook.ema_nesterov.{field}" for field in ("beta=.9", "start=2", "gamma=.8")]
# Kinds of parameters with factors of their own, of which a stage of a pipeline may hold none.
FOLLOWS = ["--hook.ema_nesterov.follow=embedding", "--embed_decay_frac=0.9", "--decay_frac=0.1"]
FAST = {"zero1 2": "Muon", "tp 2": "Muon", "fsdp 2": "AdamW", "pp 2 1f1b": "AdamW"}
EVERY = [name for name in [*LAYOUTS, *MODEL_PARALLEL] if "one" not in name]


@pytest.mark.parametrize(
    "layout, optimizer",
    [(layout, name) for layout, name in FAST.items() if layout in EVERY]
    + [
        pytest.param(layout, name, marks=SLOW)
        for layout in EVERY
        for name in ("SGD", "AdamW", "Muon")
        if FAST.get(layout) != name
    ],
)
def test_a_layout_is_one_process(layout, optimizer):
    one = "one process" if layout in LAYOUTS else "one larger process"
    wanted = column(one, "fp64", [optimizer], *WORN, *FOLLOWS)[optimizer]
    found = column(layout, "fp64", [optimizer], *WORN, *FOLLOWS)[optimizer]
    assert difference(found, wanted) < 1e-10


TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8", "--batch_size=4"]
TINY += ["--eval_tokens=200", "--sample_tokens=0", "--plot=false", "--tokenizer=bytes"]
TINY += ["--threads=1", "--precision=fp32", "--schedule=constant", "--log_every=1"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(str(i * i) for i in range(2000)))
    return path


def rows(folder, name):
    found = logger.read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row[name]) for row in found if name in row]


def run(text, folder, *words):
    return train.main(parse.parse([*TINY, f"--data={text}", f"--out_dir={folder}", *words]))


@pytest.mark.parametrize(
    "more",
    (
        ["--optim=adamw"],
        pytest.param(["--precision=bf16_sr", "--optim=lion"], marks=SLOW),
        pytest.param(["--offload=cpu"], marks=SLOW),
    ),
)
def test_a_run_resumed_is_the_run_bitwise(tmp_path, text, more):
    words = [*WORN, "--eval_every=2", "--save_every=4", *more]
    run(text, tmp_path / "whole", *words, "--steps=8")
    run(text, tmp_path / "half", *words, "--steps=4")
    run(text, tmp_path / "half", *words, "--steps=8")
    for name in ("loss", "val_loss", "val_loss_ema"):
        assert rows(tmp_path / "half", name) == rows(tmp_path / "whole", name)
    # The average is evaluated beside the trained weights once it has begun.
    assert [step for step, _ in rows(tmp_path / "whole", "val_loss_ema")] == [4, 6, 8]
    trained, of_average = (rows(tmp_path / "whole", x)[-1][1] for x in ("val_loss", "val_loss_ema"))
    assert trained != of_average
    a, b = (load(tmp_path / name / "step-00000008") for name in ("half", "whole"))
    for part in ("model", "training_weights"):
        saved = b.tree(part)
        assert all(torch.equal(x, saved[name]) for name, x in a.tree(part).items())
    state = b.tree("optim/state/embed.weight")
    blend = state["held"] + 0.6 * (state["ema"] - state["held"].float())
    close([b.tree("model")["embed.weight"].float()], [blend], 1e-2 if "bf16" in more[0] else 1e-6)
    assert not torch.equal(saved["embed.weight"], b.tree("model")["embed.weight"])


def test_the_model_that_is_saved_is_the_average_and_a_fresh_run_evaluates_it(tmp_path, text):
    run(text, tmp_path / "a", "--ema=3", "--optim=adamw", "--eval_every=4", "--steps=8")
    found = rows(tmp_path / "a", "val_loss_ema")[-1][1]
    again = run(
        text, tmp_path / "b", f"--init_from={tmp_path}/a", "--optim=adamw", "--eval_every=4",
        "--steps=1",
    )  # fmt: skip
    assert again["step"] == 1
    assert rows(tmp_path / "b", "val_loss")[0] == (0, pytest.approx(found, rel=1e-6))


def test_a_run_with_an_average_has_the_schedule_of_one_without():
    cfg = parse.parse(["--ema=3", "--hooks=ema_nesterov"])
    assert auto.resolve_schedule(cfg, optimizers.chosen(cfg)) == "wsd"


def test_patience_counts_the_average(tmp_path, text):
    words = ["--ema=50", "--optim=adamw", "--lr=3", "--steps=40", "--eval_every=2", "--patience=2"]
    found = run(text, tmp_path / "a", *words, "--on_spike=none", "--grad_clip=none")
    averages = dict(rows(tmp_path / "a", "val_loss_ema"))
    trained = dict(rows(tmp_path / "a", "val_loss"))
    averages[0] = trained[0]
    best = min(averages, key=averages.get)
    assert [p.name for p in (tmp_path / "a/best").iterdir()] == [f"step-{best:08d}"]
    assert found["step"] < 40


@pytest.mark.parametrize("ring", ("2", "0"))
def test_a_rollback_takes_back_an_average_that_has_begun_since(tmp_path, text, ring, monkeypatch):
    words = [*WORN, "--optim=adamw", "--eval_every=2", "--steps=8", "--on_spike=rollback"]
    words += [f"--monitor.ring={ring}", "--monitor.ring_every=2", "--keep=99", "--ema_from=3"]
    words.append("--save_every=1" if ring != "0" else "--save_every=4")
    real = train.MicroBatches.forward_backward
    seen = []

    def spoilt(self, *args):
        seen.append(1)
        loss = real(self, *args)
        return loss * float("nan") if len(seen) == 5 else loss

    monkeypatch.setattr(train.MicroBatches, "forward_backward", spoilt)
    run(text, tmp_path / "a", *words, "--on_nonfinite=rollback")
    back = [row["to"] for row in logger.read_metrics(tmp_path / "a/metrics.jsonl") if "to" in row]
    assert back == [2 if ring != "0" else 4]  # of 2 steps before the average begins
    # The average is that of the weights that the run has kept.
    state = "optim/state/embed.weight"
    saved = [load(path).tree(state, missing={}) for path in sorted((tmp_path / "a").glob("step-*"))]
    if ring != "0":
        # The first two are of steps before the average begins.
        wanted, *later = [x["held"] for x in saved if "held" in x][2:]
        for held in later:
            wanted = wanted + (held - wanted) / 3
        close([saved[-1]["ema"]], [wanted], 1e-6)
    assert {"ema", "held", "mean_step"} <= saved[-1].keys()


def test_a_branch_may_leave_the_average_and_take_one_up(tmp_path, text):
    words = ["--optim=adamw", "--eval_every=2", "--save_every=4"]
    run(text, tmp_path / "a", *words, "--ema=3", "--steps=4")
    branch = f"--resume={tmp_path}/a/step-00000004"
    run(text, tmp_path / "b", *words, branch, "--ema=none", "--steps=6")
    assert rows(tmp_path / "b", "val_loss_ema") == []
    state = load(tmp_path / "b/step-00000006").tree("optim/state/embed.weight")
    assert "ema" not in state
    branch = f"--resume={tmp_path}/b/step-00000006"
    run(text, tmp_path / "c", *words, branch, "--ema=2", "--steps=8")
    assert [step for step, _ in rows(tmp_path / "c", "val_loss_ema")][-1] == 8
    with pytest.raises(ValueError, match="ema"):
        run(text, tmp_path / "a", *words, "--ema=4", "--steps=6")


def test_a_branch_begins_its_average_at_the_step_that_it_says(tmp_path, text):
    words = ["--optim=adamw", "--lr=0.03", "--eval_every=1", "--save_every=4"]
    run(text, tmp_path / "a", *words, "--ema=9", "--hooks=ema_nesterov", "--steps=4")
    branch = [*words, f"--resume={tmp_path}/a/step-00000004", "--hooks=ema_nesterov", "--steps=8"]
    # Later than its run's: until then what is evaluated and saved is W, no stale average.
    run(text, tmp_path / "b", *branch, "--ema=9", "--ema_from=6")
    losses = dict(rows(tmp_path / "b", "val_loss"))
    assert losses[5] < losses[4] and min(dict(rows(tmp_path / "b", "val_loss_ema"))) == 7
    run(text, tmp_path / "c", *branch, "--ema=none")
    assert "ema" not in load(tmp_path / "c/step-00000008").tree("optim/state/embed.weight")
    assert rows(tmp_path / "c", "loss") == rows(tmp_path / "b", "loss")
    # Its run had none: steps are counted from the run's beginning.
    branch = [*words, f"--resume={tmp_path}/c/step-00000008", "--hooks=ema_nesterov", "--steps=12"]
    run(text, tmp_path / "d", *branch, "--ema=9", "--ema_from=10")
    trained, averages = (dict(rows(tmp_path / "d", x)) for x in ("val_loss", "val_loss_ema"))
    assert min(averages) == 11 and averages[11] != trained[11]


def test_the_summary_and_a_search_tell_the_loss_of_the_weights_that_are_kept(tmp_path):
    found = [
        {"step": step, "val_loss": w, "val_bpb": w, "val_accuracy": 0, "perplexity": 1}
        for step, w in ((0, 5.5), (2, 4.0), (4, 3.0))
    ]
    found[2]["val_loss_ema"] = 4.5
    said = summary.about_losses([{"step": 4, "loss": 3.0}], found, patience=2)
    assert "validation 3.0000 at the end, 4.5000 the average, 4.0000 at best (step 2)" in said
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    trial = trials.Trial.__new__(trials.Trial)
    trial.folder, trial.patience, trial.min_delta = tmp_path, 2, 0.0
    assert trial.last("val_loss") == trial.last("val_loss_ema") == 4.0
    with pytest.raises(ValueError, match="needs an average"):
        sweep.refuse([], "val_loss_ema")


WRONG = {
    "--ema=0.5": "ema=0.5",
    "--ema_from=3": "ema_from means nothing without ema",
    "--ema_share=0.5": "ema_share means nothing without ema",
    "--ema=3 --ema_share=0": "ema_share=0",
    "--ema=3 --ema_share=2": "ema_share=2",
    "--ema=3 --diloco_every=2 --optim=adamw": "diloco_every lets them diverge",
    "--ema=3 --optim=schedule_free": "keeps a second set of weights already",
    "--hooks=ema_nesterov --optim=schedule_free": "second set of weights",
    "--hooks=ema_nesterov --diloco_every=2 --optim=adamw": "hooks=ema_nesterov keeps a second set",
    "--ema=3 --hooks=hyperball --optim=schedule_free": "--hooks=hyperball: AdamWScheduleFree",
    "--ema=3 --ema_from=9 --steps=9": "leaves none of the 9 steps",
    "--hooks=ema_nesterov --hook.ema_nesterov.start=9 --steps=9": "start=9 is past the 9 steps",
    "--ema=3 --qk_clip=100 --qk_norm=false": "--qk_clip scales weights, and --ema",
    "--hooks=ema_nesterov --hook.ema_nesterov.gamma=1": "gamma",
    "--hooks=ema_nesterov --hook.ema_nesterov.follow=heads": "follow=heads",
    "--hooks=ema": "there is no 'ema' in hooks/; type --ema=100",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_is_a_sentence_and_nothing_begins(tmp_path, text, words):
    with pytest.raises(ValueError) as caught:
        run(text, tmp_path / "x", *words.split())
    said = str(caught.value)
    assert WRONG[words] in said and "\n" not in said
    assert not list(tmp_path.glob("x/*.jsonl"))
