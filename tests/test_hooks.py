"""Hooks beside plain formulas, on optimizers of each kind, alone and in runs on every layout."""

import copy
import dataclasses
import functools
import importlib
import pickle
import pkgutil

import pytest
import torch
from harness import run_ranks
from matrix import LAYOUTS, MODEL_PARALLEL, OPTIMIZERS, column, difference
from torch.distributed.fsdp import fully_shard

import hooks as folder
import train
from checkpoint.load import load
from hooks.cautious_decay import CautiousDecay
from hooks.hyperball import Hyperball
from hooks.radial_brake import RadialBrake
from hooks.radius_pin import RadiusPin
from hooks.uw_floor import UWFloor
from hooks.wear import hooked, worn
from metrics import logger
from optim.adamw import AdamW
from optim.lamb import LAMB
from optim.lion import Lion
from optim.muon import Muon
from optim.schedule_free import AdamWScheduleFree
from optim.sgd import SGD
from parallel.sharded_optimizer import make_optimizer
from run.build import stepped_by_rows
from run.hooks import HELPERS
from settings import parse

SLOW = pytest.mark.slow
LR = 0.05


# ---- each hook beside its formula, entry by entry, on Python's own numbers -----------------------
def norm(rows):
    return sum(x * x for row in rows for x in row) ** 0.5


def by_hyperball(w, d, lr):
    r, size = norm(w), norm(d)
    moved = [[a - b * lr * r / size for a, b in zip(x, y)] for x, y in zip(w, d)]
    return [[a * r / norm(moved) for a in x] for x in moved]


def by_uw_floor(w, d, lr, floor=0.35):
    factor = max(1, lr * floor * norm(w) / norm(d))
    return [[a - b * factor for a, b in zip(x, y)] for x, y in zip(w, d)]


def by_row_floor(w, d, lr, floor=0.3825):
    return [by_uw_floor([x], [y], lr, floor)[0] for x, y in zip(w, d)]


def dot(w, d):
    return sum(a * b for x, y in zip(w, d) for a, b in zip(x, y))


def by_radial_brake(w, d, lr):
    # The step along w and the one across; only what makes w longer is halved.
    along = dot(w, d) / norm(w) ** 2
    across = [[b - along * a for a, b in zip(x, y)] for x, y in zip(w, d)]
    along = along / 2 if along < 0 else along
    return [[a - b - along * a for a, b in zip(x, y)] for x, y in zip(w, across)]


def by_radius_pin(w, d, lr):
    moved = [[a - b for a, b in zip(x, y)] for x, y in zip(w, d)]
    radius = norm(w) - dot(w, d) / norm(w)
    return [[a * radius / norm(moved) for a in x] for x in moved]


def by_cautious_decay(w, d, lr):
    return [
        [a - b - (lr * 0.1 * a if a * b > 0 else 0) for a, b in zip(x, y)] for x, y in zip(w, d)
    ]


FORMULAS = {
    "hyperball": (Hyperball(), by_hyperball),
    "uw_floor": (UWFloor(), by_uw_floor),
    "uw_floor, rows": (UWFloor(0.3825, rows=True), by_row_floor),
    "radial_brake": (RadialBrake(), by_radial_brake),
    "radius_pin": (RadiusPin(), by_radius_pin),
    "cautious_decay": (CautiousDecay(), by_cautious_decay),
}


def test_every_file_has_a_formula_here():
    files = {m.name for m in pkgutil.iter_modules(folder.__path__)} - {*HELPERS}
    # EMA-Nesterov has its oracle in tests/test_ema.py.
    assert files - {"ema_nesterov"} == {name.partition(",")[0] for name in FORMULAS}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("size", (1e-3, 1.0))
def test_a_hook_is_its_formula(name, size):
    torch.manual_seed(0)
    before = torch.randn(5, 3, dtype=torch.float64)
    for outward in (
        0.3,
        -0.3,
    ):  # a step that makes the matrix shorter, and one that makes it longer
        d = size * (torch.randn(5, 3, dtype=torch.float64) + outward * before)
        p = before - d
        hook, formula = FORMULAS[name]
        hook(p, before, LR)
        wanted = torch.tensor(formula(before.tolist(), d.tolist(), LR), dtype=torch.float64)
        torch.testing.assert_close(p, wanted, rtol=1e-12, atol=1e-14)
        assert (p - (before - d)).abs().max() > 1e-9 or (
            name == "radial_brake" and outward > 0 or name.startswith("uw") and size == 1
        )


@pytest.mark.parametrize("name", FORMULAS)
def test_zeros_a_step_of_nothing_and_kernels_are_no_nan(name):
    hook, _ = FORMULAS[name]
    for before, step in (
        (torch.zeros(3, 2), torch.ones(3, 2)),
        (torch.ones(3, 2), torch.zeros(3, 2)),
        (torch.zeros(3, 2), torch.zeros(3, 2)),
        (torch.ones(3, 2, 2, 2), torch.full((3, 2, 2, 2), 0.1)),
    ):
        p = before - step
        hook(p, before, LR)
        assert p.isfinite().all() and p.shape == before.shape
        if not step.any():
            assert torch.allclose(p, before)


def test_a_matrix_of_zeros_keeps_the_direction_of_its_first_step_under_radius_pin():
    p = torch.full((2, 2), 0.5)
    RadiusPin()(p, torch.zeros(2, 2), LR)
    torch.testing.assert_close(p, torch.full((2, 2), 0.5e-8), rtol=1e-5, atol=0)


# ---- worn by an optimizer ------------------------------------------------------------------------
def problem(dtype=torch.float64):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))
    return model.to(dtype), torch.randn(32, 6, dtype=dtype)


def groups(model, cls):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    spared = {"use_muon": False} if cls is Muon else {"weight_decay": 0}
    kinds = [{"params": matrices, "kind": "matrix"}, {"params": others, "kind": "scalar"} | spared]
    return [group | {"initial_lr": LR} for group in kinds]


CLASSES = {SGD: dict(momentum=0.9), AdamW: {}, Muon: {}, torch.optim.AdamW: {}}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__module__)
def test_worn_it_changes_the_optimizers_own_steps_of_matrices_alone(cls, name):
    hook, formula = FORMULAS[name]
    model, x = problem()
    options = dict(lr=LR, weight_decay=0.0) | CLASSES[cls]
    optimizer = hooked(cls, [hook])(groups(model, cls), **options)
    assert isinstance(optimizer, cls) and type(optimizer).__name__ == cls.__name__
    for _ in range(3):
        model(x).sub(x.flip(1)).square().sum().backward()
        # What the optimizer alone would do from here.
        twin_model = copy.deepcopy(model)
        twin = cls(groups(twin_model, cls), **options)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p, q in zip(twin_model.parameters(), model.parameters()):
            p.grad = q.grad.clone()
        twin.step()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        for p, alone, old in zip(model.parameters(), twin_model.parameters(), before):
            wanted = alone.detach()
            if p.ndim > 1:
                wanted = torch.tensor(formula(old.tolist(), (old - wanted).tolist(), LR)).to(p)
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-6, atol=1e-9)


def test_cautious_decay_on_muon_is_muons_own():
    trained = []
    for cls, own in (
        (Muon, dict(cautious=True, weight_decay=0.3)),
        (hooked(Muon, [CautiousDecay(0.3)]), dict(weight_decay=0.0)),
    ):
        model, x = problem()
        optimizer = cls(groups(model, Muon), lr=LR, **own)
        for _ in range(5):
            model(x).sub(x.flip(1)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append([p.detach() for p in model.parameters()])
    plain = problem()[0]
    for mine, muons, start in zip(*trained, plain.parameters()):
        torch.testing.assert_close(mine, muons, rtol=1e-12, atol=1e-12)
        assert not torch.equal(mine, start)


def test_hooks_come_in_the_order_that_is_given():
    seen = []
    first, second = (lambda p, before, lr, i=i: seen.append((i, lr)) for i in (1, 2))
    w = torch.nn.Parameter(torch.ones(2, 2))
    for order, wanted in (((first, second), [1, 2]), ((second, first), [2, 1])):
        seen.clear()
        optimizer = hooked(SGD, order)([w], lr=0.5)
        w.grad = torch.ones(2, 2)
        optimizer.step()
        assert seen == [(i, 0.5) for i in wanted]
    assert worn(type(optimizer)) == (second, first) and worn(SGD) == ()


def test_what_has_no_gradient_or_another_kind_is_left_alone():
    touched = []
    hook = lambda p, before, lr: touched.append(tuple(p.shape))  # noqa: E731
    ws = [torch.nn.Parameter(torch.ones(n, n)) for n in (2, 3, 4, 0, 5)]
    ws.append(torch.nn.Parameter(torch.ones(6, 6, dtype=torch.complex64)))
    for w in (*ws[:4], ws[5]):
        w.grad = torch.ones_like(w)
    kinds = [{"params": [ws[0], *ws[3:]], "kind": "matrix"}, {"params": [ws[1]], "kind": "head"}]
    groups = [*kinds, {"params": [ws[2]], "use_muon": False}]
    hooked(torch.optim.SGD, [hook])(groups, lr=0.1).step()
    assert touched == [(2, 2)]


def test_schedulers_a_scaler_a_closure_and_state_go_on_as_before():
    model, x = problem(torch.float32)
    optimizer = hooked(AdamW, [Hyperball()])(model.parameters(), lr=LR, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    radius = model[0].weight.norm().item()
    for i in range(4):
        loss = model(x).sub(x.flip(1)).square().mean()
        scaler.scale(loss).backward()
        if i == 2:
            model[0].weight.grad[0, 0] = torch.inf  # skipped
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        moved = (model[0].weight - before).norm().item()
        assert (moved == 0) == (i == 2)
        lr = optimizer.param_groups[0]["lr"]
        assert moved == pytest.approx(0 if i == 2 else lr * radius, rel=0.01)
        optimizer.zero_grad()
        scheduler.step()
    saved = copy.deepcopy(optimizer.state_dict())
    plain = AdamW(model.parameters(), lr=LR)
    plain.load_state_dict(saved)  # the state is the optimizer's own

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert model[0].weight.norm().item() == pytest.approx(radius, rel=1e-5)


def test_step_hooks_of_torch_run_once_also_where_the_class_has_stepped_before():
    calls = []
    w = torch.nn.Parameter(torch.ones(2, 2))
    SGD([w], lr=0.1)  # torch wraps a class's step() at its first instance
    optimizer = hooked(SGD, [Hyperball()])([w], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    w.grad = torch.randn(2, 2)
    optimizer.step()
    assert calls == ["pre", "post"]


def test_a_copy_and_a_pickle_go_on_as_the_original():
    model, x = problem()
    optimizer = hooked(hooked(AdamW, [UWFloor()]), [RadiusPin()])(model.parameters(), lr=LR)
    assert worn(type(optimizer)) == (UWFloor(), RadiusPin())

    def step(model, optimizer):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    step(model, optimizer)
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    wanted = step(model, optimizer)
    for twin in twins:
        assert all(torch.equal(a, b) for a, b in zip(step(*twin), wanted))


@pytest.mark.parametrize("own", (True, False))
def test_what_no_hook_touches_is_still_stepped_in_shards(own):
    cls = hooked(AdamW if own else torch.optim.AdamW, [UWFloor()])
    kinds = dict(e="embedding", h="head", s="scalar", m="matrix")
    assert stepped_by_rows(cls, kinds) == {"e", "h", "s"}
    assert stepped_by_rows(hooked(cls, [RadiusPin()]), kinds) == {"e", "h", "s"}
    assert stepped_by_rows(hooked(LAMB, [UWFloor()]), kinds) == set()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_rounded_after_the_step_and_after_the_hooks(dtype):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(4, 4).to(dtype))
    w.grad = torch.randn(4, 4).to(dtype)
    before = w.detach().clone()
    dtypes = []
    spy = lambda p, *_: dtypes.append(p.dtype)  # noqa: E731
    hooked(SGD, [Hyperball(), spy, CautiousDecay()])([w], lr=0.1).step()
    assert dtypes == [torch.float32] and w.dtype == dtype
    plain = (before.float() - 0.1 * w.grad.float()).to(dtype).float()
    Hyperball()(plain, before.float(), 0.1)
    CautiousDecay()(plain, before.float(), 0.1)
    assert torch.equal(w, plain.to(dtype))


# ---- sharded, and in runs ------------------------------------------------------------------------
def sharded(rank, world, cls):
    model, x = problem()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = make_optimizer(
        hooked(cls, [RadialBrake(), UWFloor(2.0, rows=True), RadiusPin()]),
        groups(model, cls),
        lr=LR,
    )
    for _ in range(3):
        model(x).sub(x.flip(1)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor().detach() for p in model.parameters()]


@pytest.mark.parametrize(
    "cls", [pytest.param(SGD, marks=SLOW), Lion, pytest.param(Muon, marks=SLOW)]
)
def test_under_fully_shard_norms_are_those_of_whole_rows_and_matrices(cls):
    model, x = problem()
    hooks = [RadialBrake(), UWFloor(2.0, rows=True), RadiusPin()]
    optimizer = hooked(cls, hooks)(groups(model, cls), lr=LR)
    for _ in range(3):
        model(x).sub(x.flip(1)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in run_ranks(2, sharded, cls):
        torch.testing.assert_close(
            found, [p.detach() for p in model.parameters()], rtol=1e-9, atol=1e-12
        )


WORN = {
    "hyperball": ["--hooks=hyperball", "--zero_init=false"],
    "all others": [
        "--hooks=radial_brake,uw_floor,radius_pin,cautious_decay",
        "--hook.uw_floor.rows=true",
        "--hook.uw_floor.floor=2",
    ],
}
FAST = {
    "zero3 2": [("AdamW", "all others")],
    "fsdp 2": [("Muon", "all others")],
    "tp 2 + sp": [("AdamW", "hyperball")],
}
EVERY = [name for name in [*LAYOUTS, *MODEL_PARALLEL] if "one" not in name]


@functools.cache
def alone(one: str, optimizer: str, *words: str):
    return column(one, "fp64", [optimizer], *words)[optimizer]


@pytest.mark.parametrize(
    "layout, optimizer, hook",
    [(layout, *pair) for layout, pairs in FAST.items() for pair in pairs]
    + [
        pytest.param(layout, optimizer, hook, marks=SLOW)
        for layout in EVERY
        for optimizer in ("SGD", "AdamW", "Muon")
        for hook in WORN
        if (optimizer, hook) not in FAST.get(layout, [])
    ],
)
def test_a_layout_is_one_process(layout, optimizer, hook):
    one = "one process" if layout in LAYOUTS else "one larger process"
    wanted = alone(one, optimizer, *WORN[hook])
    found = column(layout, "fp64", [optimizer], *WORN[hook])[optimizer]
    assert difference(found, wanted) < 1e-10
    assert difference(alone(one, optimizer), wanted) > 1e-6


TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8", "--batch_size=4"]
TINY += ["--eval_every=0", "--sample_tokens=0", "--plot=false", "--tokenizer=bytes", "--threads=1"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(str(i * i) for i in range(2000)))
    return path


def losses(folder):
    return [row["loss"] for row in logger.read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize(
    "more",
    (
        ["--optim=adamw"],
        pytest.param(["--precision=bf16_sr", "--optim=lion"], marks=SLOW),
        pytest.param(["--offload=cpu"], marks=SLOW),
    ),
)
def test_a_run_resumed_is_the_run_bitwise_and_another_hook_is_refused(tmp_path, text, more):
    words = [*TINY, f"--data={text}", "--log_every=1", *WORN["all others"], *more]
    train.main(parse.parse([*words, f"--out_dir={tmp_path}/whole", "--steps=6"]))
    half = [*words, f"--out_dir={tmp_path}/half"]
    train.main(parse.parse([*half, "--steps=6", "--schedule=constant", "--save_every=3"]))
    train.main(parse.parse([*half, f"--out_dir={tmp_path}/b", "--steps=3", "--schedule=constant"]))
    train.main(parse.parse([*half, f"--out_dir={tmp_path}/b", "--steps=6", "--schedule=constant"]))
    assert losses(tmp_path / "b") == losses(tmp_path / "half")
    plain = [word for word in half if "hook" not in word]
    with pytest.raises(ValueError, match="hooks"):
        train.main(parse.parse([*plain, "--hooks=uw_floor", "--steps=9"]))
    with pytest.raises(ValueError, match="hook.uw_floor.floor"):
        train.main(parse.parse([*half, "--hook.uw_floor.floor=3", "--steps=9"]))


def test_hyperball_starts_nothing_at_zero_and_keeps_every_norm(tmp_path, text):
    words = [*TINY, f"--data={text}", f"--out_dir={tmp_path}/run", "--optim=muon", "--steps=4"]
    found = train.main(parse.parse([*words, "--hooks=hyperball", "--lr=0.02", "--save_every=2"]))
    assert found["step"] == 4
    config = (tmp_path / "run/config.toml").read_text()
    assert "zero_init = false" in config and "weight_decay = 0.0" in config
    first, last = (load(tmp_path / f"run/step-0000000{n}").tree("model") for n in (2, 4))
    for name in ("blocks.0.attn.proj.weight", "blocks.1.mlp.fc.weight"):
        a, b = first[name], last[name]
        assert a.norm().item() == pytest.approx(b.norm().item(), rel=1e-5)
        assert not torch.equal(a, b)


WRONG = {
    "--hooks=hyperbal": "did you mean hyperball",
    "--hooks=wear": "there is no 'wear'",
    "--hooks=,": "there is no ''",
    "--hooks=hyperball,uw_floor": "the same relative size",
    "--hooks=radius_pin,hyperball": "both decide",
    "--hooks=radial_brake,hyperball": "radial_brake slows down",
    "--hooks=hyperball,cautious_decay": "undoes what decay",
    "--hooks=radial_brake,radial_brake": "twice",
    "--hooks=hyperball --weight_decay=0.1": "contradict",
    "--hooks=cautious_decay --weight_decay=0.1": "contradict",
    "--hooks=uw_floor --optim=schedule_free": "second set of weights",
    "--hooks=uw_floor --mup_base_width=16": "no rule for muP",
    "--hooks=hyperball --zero_init=true": "keeps a matrix of zeros at zero",
    "--hooks=hyperball --diloco_every=2 --optim=adamw": "--diloco_every moves weights",
    "--hooks=hyperball --qk_clip=100 --qk_norm=false": "--qk_clip moves weights",
    "--hook.uw_floor.floor=1": "needs --hooks=uw_floor",
    "--hooks=uw_floor --hook.radius_pin.x=1": "needs --hooks=radius_pin",
    "--hooks=uw_floor --hook.uw_floor=1": "has no field",
    "--hooks=uw_floor --hook.uw_floor.flor=1": "did you mean --hook.uw_floor.floor",
    "--hooks=uw_floor --hook.uw_floor.floor=0": "--hook.uw_floor.floor=0",
    "--hooks=uw_floor --hook.uw_floor.floor=a": "wrong kind",
    "--hooks=radial_brake --hook.radial_brake.outward=2": "must lie in",
    "--hooks=cautious_decay --hook.cautious_decay.weight_decay=0": "above 0",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_is_a_sentence_and_nothing_begins(tmp_path, text, words):
    with pytest.raises(ValueError) as caught:
        train.main(
            parse.parse([*TINY, f"--data={text}", f"--out_dir={tmp_path}/x", *words.split()])
        )
    said = str(caught.value)
    assert WRONG[words] in said and "\n" not in said
    assert not list(tmp_path.glob("x/*.jsonl"))


def test_schedule_free_is_refused():
    with pytest.raises(ValueError, match="second set"):
        hooked(AdamWScheduleFree, [Hyperball()])


def test_what_flattens_refuses_dtensors_and_the_group_is_taken_back():
    w, sharded, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (3, 2), (3,)))
    sharded.placements = vector.placements = ()  # as DTensors have them
    for hook in (RadiusPin(), RadialBrake()):
        optimizer = hooked(SGD, [UWFloor(), hook])([w], lr=0.1)
        with pytest.raises(ValueError, match=f"{type(hook).__name__}: needs whole .* make_optim"):
            optimizer.add_param_group({"params": [sharded]})
        assert len(optimizer.param_groups) == 1
        optimizer.add_param_group({"params": [vector]})  # no matrix
    hooked(SGD, [UWFloor()])([sharded], lr=0.1)  # its norms are DTensors' own


def test_every_hook_is_a_dataclass_of_plain_fields():
    for name in {m.name for m in pkgutil.iter_modules(folder.__path__)} - {*HELPERS}:
        module = importlib.import_module(f"hooks.{name}")
        own = [x for x in vars(module).values() if dataclasses.is_dataclass(x)]
        assert len(own) == 1 and own[0].__module__ == module.__name__
        assert own[0]() == own[0]()  # a default for every field
    assert set(OPTIMIZERS) >= {"SGD", "AdamW", "Muon"}
