"""Every optimizer under everybody else's tools is still itself: the table, written.

    python tests/partners.py                 runs every cell and writes docs/partners.md
    python tests/partners.py --part=hooks    the second table alone; --part=optimizers the first

A cell is 20 steps in float64, under the partner, of a small net: two matrices of one shape, a
kernel of three dimensions, one of them odd, and a vector, in two groups with an lr and a decay of
their own. The weights at the end (Schedule-Free: after eval()) are compared with two runs:

    by hand   the same class without the partner; what the partner does is done by hand
    twin      torch's class of the same mathematics, where there is one, under the same partner;
              alone for several ranks, and for the compiler, under which torch's rounds to float32

On two ranks the loss is doubled on one and 0 on the other, so that their mean is exact. What is
raised inside `making()`, before the first step, is a refusal; whatever is raised later is a fault.
"""

import copy
import functools
import io
import pickle
import platform
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))  # the modules under test

import torch

torch.set_num_threads(1)  # a forked child hangs in OpenMP if its parent ever used more

import torch.distributed.tensor  # noqa: E402, F401  (once here, not in every forked rank)
from harness import run_ranks  # noqa: E402
from test_optim_contract import CASES, give_gradients  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.distributed.checkpoint import state_dict as dcp  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

from hooks.cautious_decay import CautiousDecay  # noqa: E402
from hooks.ema import averaged  # noqa: E402
from hooks.ema_nesterov import EMANesterov  # noqa: E402
from hooks.hyperball import Hyperball  # noqa: E402
from hooks.radial_brake import RadialBrake  # noqa: E402
from hooks.radius_pin import RadiusPin  # noqa: E402
from hooks.uw_floor import UWFloor  # noqa: E402
from hooks.wear import hooked as wearing  # noqa: E402
from optim import adafactor, adam_l2, adamw, schedule_free, sgd, shampoo, soap  # noqa: E402
from optim.attributes import attribute  # noqa: E402
from optim.kl_soap import KLSOAP  # noqa: E402
from optim.muon import Muon  # noqa: E402
from optim.pmuon import PMuon  # noqa: E402
from optim.soap_muon import SOAPMuon  # noqa: E402
from parallel.sharded_optimizer import make_optimizer  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "partners.md"
STEPS = 20
WITH_HOOKS = "## With hooks"  # where the second part of the page begins
TOLERANCE = 1e-12  # relative to a tensor's largest element, or absolute where that is below 1
TWINS = {sgd.SGD: torch.optim.SGD, adamw.AdamW: torch.optim.AdamW, adam_l2.AdamL2: torch.optim.Adam}
SCHEDULE_FREE = schedule_free.AdamWScheduleFree, schedule_free.SGDScheduleFree
# For sums in another order.
CALM = {
    soap.SOAP: {"eps": 1e-2},
    KLSOAP: {"eps": 1e-2},
    SOAPMuon: {"eps": 1e-2},
    PMuon: {"eps": 1e-2},
    shampoo.Shampoo: {"eps": 1e-4},
}

# Hook -> a class that wears it; the floor is so high that it binds.
HOOKS = {
    "hyperball": lambda cls: wearing(cls, [Hyperball()]),
    "uw_floor": lambda cls: wearing(cls, [UWFloor(2.0)]),
    "uw_floor, rows": lambda cls: wearing(cls, [UWFloor(2.0, rows=True)]),
    "radial_brake": lambda cls: wearing(cls, [RadialBrake()]),
    "radius_pin": lambda cls: wearing(cls, [RadiusPin()]),
    "cautious_decay": lambda cls: wearing(cls, [CautiousDecay(0.3)]),
    "average": lambda cls: averaged(cls, 5, 2, 0.7),
    "EMA-Nesterov": lambda cls: EMANesterov(gamma=0.8).wear(cls),
}
NO_DECAY = "hyperball", "cautious_decay"  # of matrices


class Worn(NamedTuple):
    hook: str
    plain: type
    twin: type | None  # torch's class, wearing the same


WORN = {
    wear(cls): Worn(hook, cls, wear(TWINS[cls]) if cls in TWINS else None)
    for hook, wear in HOOKS.items()
    for cls in (sgd.SGD, adamw.AdamW, Muon)
}


def title(cls: type) -> str:
    """What a row is called."""
    return f"{WORN[cls].hook}: {cls.__name__}" if cls in WORN else cls.__name__


# ---- what is trained -----------------------------------------------------------------------------
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(6, 4, bias=False)
        self.kernel = nn.Parameter(torch.randn(3, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("oki,bi->bok", self.kernel, self.first(x).tanh())  # (B, 3, 2)
        return self.last(hidden.tanh().flatten(1))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


@functools.cache
def batch(t: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(t)
    return tuple(torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (6, 4))


def loss_of(model: nn.Module, t: int) -> Tensor:
    x, y = batch(t)
    return (model(x) - y).square().mean()


class Job(NamedTuple):
    """What one run trains with."""

    cls: type
    options: dict

    def groups(self, model: nn.Module) -> list[dict]:
        """Every option in every group, so that a partner adds none."""
        lr = self.options["lr"] / 2
        matrices_only = attribute(self.cls, "matrices_only")
        own = {"use_muon": False, "lr": 0.01} if matrices_only else {"lr": lr}
        params = dict(model.named_parameters())
        vectors = [params.pop("first.bias")]
        return [
            {**self.options, "params": list(params.values())},
            {**self.options, **own, "weight_decay": 0.02, "params": vectors},
        ]

    def start(self, model: nn.Module | None = None):
        """A model and its optimizer, ready to step."""
        model = net() if model is None else model
        with making():
            optimizer = self.cls(self.groups(model))
        return model, train_mode(optimizer)


def jobs(cls: type, calm: bool = False) -> list[tuple[Job, Job | None]]:
    """The runs of a class, each with its twin's."""
    if cls in WORN:
        hook, plain, twin = WORN[cls]
        options = {"lr": CASES[plain][1], **CASES[plain][0]}
        options |= {"weight_decay": 0.0} if hook in NO_DECAY else {}
        return [(Job(cls, options), Job(twin, options) if twin else None)]
    more = CALM.get(cls, {}) if calm else {}
    own = Job(cls, {"lr": CASES[cls][1], **CASES[cls][0], **more})
    if cls is adafactor.Adafactor:  # torch's has no beta1
        options = {"lr": 0.05, "weight_decay": 0.01, "eps": (None, 1e-3)}
        return [(own, None), (Job(cls, options), Job(torch.optim.Adafactor, options))]
    return [(own, Job(TWINS[cls], own.options) if cls in TWINS else None)]


def train_mode(optimizer):
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def fit(model, optimizer, steps, before=lambda t: None, scale=1, step=None) -> None:
    """Ordinary training. before(t): ahead of step t. scale: a factor of the loss."""
    for t in steps:
        before(t)
        model.zero_grad()
        (scale * loss_of(model, t)).backward()
        (step or optimizer.step)()


def look(cls: type, optimizer, share: Callable = lambda: None) -> Callable[[int], None]:
    """before(t) of fit(): at step 11 a second set of weights is looked at, which changes nothing.

    share(): brings this rank's weights to the others."""

    def before(t: int) -> None:
        if t == 11 and cls in WORN and hasattr(optimizer, "eval"):
            optimizer.eval()
            share()
            optimizer.train()
            share()

    return before


def final(model: nn.Module, optimizer) -> list[Tensor]:
    """The weights one would evaluate."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return weights(model)


def weights(model: nn.Module) -> list[Tensor]:
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return [p.detach().clone() for p in whole]


class Refused(Exception):
    """Something said no before the first step; __cause__ is what it raised."""


@contextmanager
def making():
    try:
        yield
    except Exception as error:
        raise Refused(str(error)) from error


KNOWN = {}  # what alone() has run


def alone(job: Job) -> list[Tensor]:
    """By hand, for a partner that must change nothing."""
    key = job.cls, repr(job.options)
    if key not in KNOWN:
        model, optimizer = job.start()
        fit(model, optimizer, range(STEPS))
        KNOWN[key] = final(model, optimizer)
    return KNOWN[key]


# ---- schedulers ----------------------------------------------------------------------------------
SCHEDULERS = {
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=7),
    "OneCycleLR": lambda o, **options: lr_scheduler.OneCycleLR(
        o, [group["lr"] for group in o.param_groups], STEPS + 1, **options
    ),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(
        o, 6, 2, eta_min=1e-3
    ),
}


def scheduled(name: str, job: Job) -> list[Tensor]:
    model, optimizer = job.start()
    has_none = name == "OneCycleLR" and "Adafactor" in job.cls.__name__
    with making():
        scheduler = SCHEDULERS[name](optimizer, **({"cycle_momentum": False} if has_none else {}))
    fit(model, optimizer, range(STEPS), before=lambda t: scheduler.step() if t else None)
    return final(model, optimizer)


def plan(name: str, job: Job) -> list[list[tuple[float, float | None]]]:
    """(lr, momentum) at each step of each group, as torch's SGD gets them; None: as it was."""
    lrs = [group["lr"] for group in job.groups(net())]
    plain = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in lrs], momentum=0.9)
    scheduler, found = SCHEDULERS[name](plain), []
    for _ in range(STEPS):
        found.append(
            [
                (group["lr"], group["momentum"] if name == "OneCycleLR" else None)
                for group in plain.param_groups
            ]
        )
        plain.step()
        scheduler.step()
    return found


def scheduled_by_hand(name: str, job: Job) -> list[Tensor]:
    model, optimizer = job.start()
    numbers = plan(name, job)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # the peak, which some hooks want to know

    def set_numbers(t: int) -> None:
        for group, (lr, momentum) in zip(optimizer.param_groups, numbers[t]):
            group["lr"] = lr
            if momentum is None or not {"momentum", "betas"} & group.keys():
                continue
            if group.get("use_muon") or "betas" not in group:  # what its user means by momentum
                group["momentum"] = momentum
            else:
                group["betas"] = (momentum, *group["betas"][1:])

    fit(model, optimizer, range(STEPS), before=set_numbers)
    found = final(model, optimizer)
    if job.cls in SCHEDULE_FREE:
        same(found, three_sequences(job, numbers), "the mean of z, written out")
    return found


def three_sequences(job: Job, numbers) -> list[Tensor]:
    """Schedule-Free with x, y and z apart: x is the weighted mean of every z so far; gradient and
    decay are taken at y, and a step leaves y where its own β₁ puts it. numbers: see plan()."""
    model, options = net(), job.options
    groups = job.groups(model)
    start = {p: p.detach().clone() for group in groups for p in group["params"]}
    old = {p: dict(x=x, z=x, v=0) for p, x in start.items()}
    largest, total = [0.0] * len(groups), [0.0] * len(groups)
    for t in range(STEPS):
        model.zero_grad()
        loss_of(model, t).backward()
        for i, (group, (lr, beta1)) in enumerate(zip(groups, numbers[t])):
            beta1 = 0.9 if beta1 is None else beta1
            gamma = lr * min(1, (t + 1) / options["warmup_steps"])
            largest[i] = max(largest[i], gamma)
            total[i] += largest[i] ** 2
            for p in group["params"]:
                s, d = old[p], p.grad
                if job.cls is schedule_free.AdamWScheduleFree:
                    s["v"] = 0.999 * s["v"] + 0.001 * d.square()
                    d = d / ((s["v"] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
                s["z"] = s["z"] - gamma * (d + group["weight_decay"] * p.detach())
                s["x"] = s["x"] + largest[i] ** 2 / total[i] * (s["z"] - s["x"])
                p.data = (1 - beta1) * s["z"] + beta1 * s["x"]
    return [old[p]["x"] for p in model.parameters()]


# ---- precision and the compiler ------------------------------------------------------------------
OVERFLOWS = 0, 7  # steps whose loss is infinite


def scaled(job: Job, by_hand: bool = False) -> list[Tensor]:
    """With loss scaling and clipping; by hand the steps that overflow are left out."""
    model, optimizer = job.start()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=not by_hand)
    for t in range(STEPS):
        if by_hand and t in OVERFLOWS:
            continue
        optimizer.zero_grad()
        scaler.scale(loss_of(model, t) * (torch.inf if t in OVERFLOWS else 1)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        stayed = all(map(torch.equal, before, weights(model)))
        assert stayed or t not in OVERFLOWS, "the step was taken though gradients were infinite"
    assert by_hand or scaler.get_scale() == 2**8
    return final(model, optimizer)


def autocasting(job: Job, by_hand: bool = False) -> list[Tensor]:
    """Gradients are given, so autocast has only the step itself to change; in float32 too, as it
    leaves float64 alone. Muon multiplies in bfloat16 unless told otherwise."""
    found = []
    for dtype in (torch.float64, torch.float32):
        if "ns_dtype" in job.start()[1].defaults:
            job = Job(job.cls, {**job.options, "ns_dtype": dtype})
        model, optimizer = job.start(net().to(dtype))
        with nullcontext() if by_hand else torch.autocast("cpu", torch.bfloat16):
            for t in range(STEPS):
                give_gradients(list(model.parameters()), t)
                optimizer.step()
            found += final(model, optimizer)
    return found


def compiled(job: Job, backend: str = "aot_eager", limit: int = 2) -> list[Tensor]:
    """limit: after so many compilations the rest runs as it is; torch stops at 8."""
    torch._dynamo.reset()
    model, optimizer = job.start()
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(lambda: optimizer.step(), backend=counter)
    with torch._dynamo.config.patch(recompile_limit=limit):
        fit(model, optimizer, range(STEPS), step=step)
    assert counter.op_count, "nothing was compiled"
    return final(model, optimizer)


# ---- saved, copied, extended in the middle -------------------------------------------------------
def through_dcp(job: Job) -> list[Tensor]:
    """Saved in the middle in three ways, each loaded into a fresh model and optimizer."""
    model, optimizer = job.start()
    fit(model, optimizer, range(STEPS // 2))
    found = []
    for how in (
        {},
        {"full_state_dict": True, "cpu_offload": True},
        {"flatten_optimizer_state_dict": True},
    ):
        options, file = dcp.StateDictOptions(**how), io.BytesIO()
        state = dcp.get_optimizer_state_dict(model, optimizer, options=options)
        torch.save((model.state_dict(), state), file)
        file.seek(0)
        saved_model, saved = torch.load(file, weights_only=True)
        other_model, other = job.start(net(seed=1))
        other_model.load_state_dict(saved_model)
        with making():
            dcp.set_optimizer_state_dict(other_model, other, saved, options=options)
        fit(other_model, other, range(STEPS // 2, STEPS))
        found += final(other_model, other)
    fit(model, optimizer, range(STEPS // 2, STEPS))  # the first one goes on as if never asked
    return found + final(model, optimizer)


def reversed_groups(groups: list[dict]) -> list[dict]:
    return [{**group, "params": group["params"][::-1]} for group in groups]


def halve(optimizer) -> None:
    """What the post-hook edits."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] / 2
        for p in group["params"]:
            for name, x in optimizer.state[p].items():
                if name in ("exp_avg", "exp_avg_sq", "momentum_buffer", "z", "row_var", "variance"):
                    optimizer.state[p][name] = x / 2


def hooked(job: Job) -> list[Tensor]:
    """Loaded twice: into parameters in reverse, by a pre-hook that returns a reversed state; and
    back, by one that changes what it is given, with a post-hook that edits."""
    model, optimizer = job.start()

    def returns(_, state):
        return {**state, "param_groups": reversed_groups(state["param_groups"])}

    def changes(_, state):
        state["param_groups"] = reversed_groups(state["param_groups"])

    fit(model, optimizer, range(6))
    middle = train_mode(job.cls(reversed_groups(job.groups(model))))
    middle.register_load_state_dict_pre_hook(returns)
    middle.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fit(model, middle, range(6, 12))
    last = train_mode(job.cls(job.groups(model)))
    last.register_load_state_dict_pre_hook(changes)
    last.register_load_state_dict_post_hook(halve)
    last.load_state_dict(copy.deepcopy(middle.state_dict()))
    fit(model, last, range(12, STEPS))
    return final(model, last)


def hooked_by_hand(job: Job) -> list[Tensor]:
    model, optimizer = job.start()
    fit(model, optimizer, range(STEPS), before=lambda t: halve(optimizer) if t == 12 else None)
    return final(model, optimizer)


def copied(job: Job) -> list[Tensor]:
    """A copy, a pickled copy of the copy, and both originals, which must not notice."""
    one = job.start()
    fit(*one, range(7))
    two = copy.deepcopy(one)
    fit(*two, range(7, 14))
    three = pickle.loads(pickle.dumps(two))
    fit(*three, range(14, STEPS))
    fit(*two, range(14, STEPS))
    fit(*one, range(7, STEPS))
    return final(*one) + final(*two) + final(*three)


def late(job: Job, by_hand: bool = False) -> list[Tensor]:
    """A matrix joins at step 8 as a beginner; by hand it gets an optimizer of its own."""
    model = net()
    groups, newcomer = job.groups(model), {**job.options, "params": [model.last.weight]}
    groups[0]["params"] = [p for p in groups[0]["params"] if p is not model.last.weight]
    optimizers = [train_mode(job.cls(groups))]

    def join(t: int) -> None:
        if t == 8 and by_hand:
            optimizers.append(train_mode(job.cls([newcomer])))
        elif t == 8:
            optimizers[0].add_param_group(newcomer)

    fit(model, None, range(STEPS), before=join, step=lambda: [each.step() for each in optimizers])
    return [final(model, optimizer) for optimizer in optimizers][-1]


# ---- two ranks -----------------------------------------------------------------------------------
def with_ddp(job: Job, rank: int) -> list[Tensor]:
    model, optimizer = job.start()
    before = look(job.cls, optimizer)
    fit(DistributedDataParallel(model), optimizer, range(STEPS), before, 2 * (rank == 0))
    return final(model, optimizer)


def with_zero(job: Job, rank: int) -> list[Tensor]:
    model = net()
    with making():
        optimizer = ZeroRedundancyOptimizer(job.groups(model), job.cls)
    for group in optimizer.param_groups if job.cls in SCHEDULE_FREE else ():
        group["train_mode"] = True  # what train() says; its own optimizer gets these at each step
    before = look(job.cls, optimizer.optim, optimizer._sync_params)
    fit(DistributedDataParallel(model), optimizer, range(STEPS), before, 2 * (rank == 0))
    final(model, optimizer.optim)
    optimizer._sync_params()  # eval() has moved this rank's share alone
    return weights(model)


def with_fully_shard(job: Job, rank: int) -> list[Tensor]:
    model, optimizer = job.start(fully_shard(net()))
    fit(model, optimizer, range(STEPS), look(job.cls, optimizer), 2 * (rank == 0))
    return final(model, optimizer)


def with_make_optimizer(job: Job, rank: int) -> list[Tensor]:
    model = fully_shard(net())
    with making():
        optimizer = train_mode(make_optimizer(job.cls, job.groups(model)))
    fit(model, optimizer, range(STEPS), look(job.cls, optimizer), 2 * (rank == 0))
    return final(model, optimizer)


# ---- the cells -----------------------------------------------------------------------------------
class Partner(NamedTuple):
    under: Callable  # (job), for two ranks (job, rank), to weights
    by_hand: Callable = alone
    ranks: int = 1
    calm: bool = False  # with the options of CALM
    twin_alone: bool = False


PARTNERS = {
    **{
        name: Partner(
            functools.partial(scheduled, name), functools.partial(scheduled_by_hand, name)
        )
        for name in SCHEDULERS
    },
    "GradScaler": Partner(scaled, functools.partial(scaled, by_hand=True)),
    "autocast": Partner(autocasting, functools.partial(autocasting, by_hand=True)),
    "torch.compile": Partner(compiled, calm=True, twin_alone=True),
    "DDP": Partner(with_ddp, ranks=2, twin_alone=True),
    "ZeroRedundancyOptimizer": Partner(with_zero, ranks=2, twin_alone=True),
    "fully_shard": Partner(with_fully_shard, ranks=2, calm=True, twin_alone=True),
    "fully_shard, make_optimizer": Partner(with_make_optimizer, ranks=2, twin_alone=True),
    "DCP state_dict": Partner(through_dcp, lambda job: alone(job) * 4),
    "load hooks": Partner(hooked, hooked_by_hand),
    "deepcopy, pickle": Partner(copied, lambda job: alone(job) * 3),
    "late group": Partner(late, functools.partial(late, by_hand=True)),
}
REFUSALS = {  # (row, partner) -> type and a part of the sentence
    (name, "fully_shard"): (ValueError, "make_optimizer")
    for name in (
        *("Shampoo", "SOAP", "KLSOAP", "Muon", "Muown", "Dion3", "SOAPMuon", "PMuon"),
        *(title(cls) for cls, worn in WORN.items() if worn.plain is Muon),
        *(title(cls) for cls, worn in WORN.items() if worn.hook in ("radial_brake", "radius_pin")),
    )
}
KEEPERS = [cls for cls in WORN if hasattr(cls, "eval")]  # of a second set of weights
NOTES = {  # (row, partner) -> how the two are used together
    (
        "Adafactor",
        "OneCycleLR",
    ): "With `cycle_momentum=False`: it has no momentum to cycle, and torch refuses to.",
    **{
        (cls.__name__, "DCP state_dict"): (
            "After `train()`, on the fresh optimizer too: `set_optimizer_state_dict` calls"
            " `step()`, which raises in eval mode."
        )
        for cls in SCHEDULE_FREE
    },
    **{
        (cls.__name__, "ZeroRedundancyOptimizer"): (
            '`group["train_mode"] = True` in its `param_groups` in place of `train()`: it writes'
            " them over its own optimizer's; after `.optim.eval()` the weights have to be"
            " broadcast."
        )
        for cls in SCHEDULE_FREE
    },
    **{
        (title(cls), "ZeroRedundancyOptimizer"): (
            "After `.optim.eval()`, and after `.optim.train()`, the weights have to be broadcast."
        )
        for cls in KEEPERS
    },
    **{
        (title(cls), "DCP state_dict"): (
            "In train mode: the flat form leaves out what `eval()` has set aside."
        )
        for cls in KEEPERS
    },
}


def same(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert len(found) == len(expected)
    start = weights(net())
    for i, (x, y) in enumerate(zip(found, expected)):
        assert x.shape == y.shape and x.dtype == y.dtype
        apart = ((x - y).abs().max() / y.abs().max().clamp(min=1)).item()
        assert apart <= TOLERANCE, f"tensor {i} is {apart:.0e} from {what}"
        assert not torch.equal(x, start[i % len(start)].to(x.dtype)), "it has learnt nothing"


def compare(partner: Partner, job: Job, twin: Job | None, found: list[Tensor]) -> None:
    same(found, partner.by_hand(job), "the same class by hand")
    if twin is not None:
        theirs = alone(twin) if partner.twin_alone else partner.under(twin)
        exact = ([x for x in xs if x.dtype == torch.float64] for xs in (found, theirs))
        same(*exact, "torch's class")


def cell(name: str, cls: type) -> None:
    """Raises AssertionError for a wrong number, Refused for a refusal, or what a fault raises."""
    for job, twin in jobs(cls, PARTNERS[name].calm):
        compare(PARTNERS[name], job, twin, PARTNERS[name].under(job))


class Said(NamedTuple):
    """What was raised, in words that travel between ranks."""

    refused: bool
    type: str
    message: str
    at: str


def said(error: Exception) -> Said:
    refused, error = isinstance(error, Refused), error.__cause__ or error
    last = traceback.extract_tb(error.__traceback__)[-1]
    at = f"{Path(last.filename).name}:{last.lineno}"
    return Said(refused, type(error).__name__, str(error), at)


def on_one_rank(rank: int, world: int, name: str, classes: list[type]) -> list:
    """For each class the weights of its jobs, or what was raised."""
    found, partner = [], PARTNERS[name]
    warnings.simplefilter("ignore")  # what eval() has to say about reshard()
    for cls in classes:
        try:
            found.append([partner.under(job, rank) for job, _ in jobs(cls, partner.calm)])
        except Exception as error:
            found.append(said(error))
    return found


def column(name: str, classes: list[type]) -> dict[type, Said | None]:
    """Each class under a partner: None where it is itself. Ranks run once for all classes."""
    partner, found = PARTNERS[name], {}
    ranks = run_ranks(partner.ranks, on_one_rank, name, classes) if partner.ranks > 1 else []
    for i, cls in enumerate(classes):
        try:
            found[cls] = next((rank[i] for rank in ranks if isinstance(rank[i], Said)), None)
            if not ranks:
                cell(name, cls)
            for rank in ranks if found[cls] is None else ():
                for (job, twin), result in zip(jobs(cls, partner.calm), rank[i]):
                    compare(partner, job, twin, result)
        except Exception as error:
            found[cls] = said(error)
    return found


# ---- the page ------------------------------------------------------------------------------------
PROSE = """\
# Partners

`python tests/partners.py`: {classes} optimizers under {partners} tools of others. {yes} of {all}
cells work. {versions}.

A cell is 20 steps of a small net in float64: two matrices of one shape, a kernel of three
dimensions, a vector; two groups. "yes": the weights at the end are those of the same class without
the tool, whose part is then done by hand, to 1e-12, and those of torch's own class where it has the
same mathematics (SGD, AdamW, Adam for AdamL2, Adafactor without `beta1`). A number is a note or a
refusal, below the table. `tests/test_partners.py` runs the same cells, and
`tests/test_partners_fuzz.py` mixes the tools at random.

- Schedulers: lr and momentum by hand, as torch's SGD gets them. OneCycleLR moves `momentum`, or
  `betas[0]` where there is none; in Muon and its kind `momentum` of matrices, `betas[0]` of
  other groups. The evaluated weights of Schedule-Free are the mean of all z, written out.
- GradScaler: unscale, clip, two steps that overflow and are skipped.
- autocast: the step inside it, gradients given, in float64 and in float32, where not a bit differs.
- torch.compile: the step, with aot_eager; with inductor in a slow test. Parameters in float64 of 0
  dimensions on a CPU are left out: compiled, torch 2.13 loses their update, in its own classes too.
- DDP, ZeroRedundancyOptimizer, fully_shard, make_optimizer (`parallel/sharded_optimizer.py`): 2
  ranks, gloo. fully_shard alone hands its DTensors to the class.
- DCP: `get_optimizer_state_dict` in the middle, plain, full and flat, set in a fresh optimizer.
- Load hooks: a pre-hook that returns a reordered state, one that changes its argument, a post-hook.
- Late group: `add_param_group` at step 8; by hand, an optimizer of its own from there on.
- SOAP, KLSOAP, SOAPMuon and PMuon with eps 1e-2, Shampoo with 1e-4 where a tool adds in another
  order (torch.compile, fully_shard): all five magnify rounding by themselves.

"""


HOOKS_PROSE = """\
{title}

`python tests/partners.py --part=hooks`: what [hooks/](../hooks) has, on SGD, AdamW and Muon, under
the same tools. {yes} of {all} cells work. {versions}.

The cells are those above: "yes" says that the weights at the end are those of the same class with
the same hook, without the tool; on SGD and AdamW also those of torch's class with the hook.

- Options are those of the optimizer above, but no decay of matrices for `hyperball` and
  `cautious_decay`, of which the latter takes 0.3; floor 2, so that it binds; gamma 0.8. The average
  is `averaged(cls, 5, 2, 0.7)`. What is compared is what `eval()` gives.
- By hand the schedulers' `initial_lr` is the peak: EMA-Nesterov's beta goes by lr/peak.
- On two ranks `eval()` and `train()` come at step 11 too, and change nothing.
- fully_shard alone: norms are DTensors' own, so those of whole matrices and rows.
- A step at lr 0, such as DCP takes in a fresh optimizer, leaves every bit. A tensor as lr, and
  `fused=True` of torch's classes under GradScaler, work too (`tests/test_partners.py`).
- inductor works too, but for `uw_floor` with `rows`: its CPU code generator in torch 2.13 raises a
  KeyError. `torch.compile(step, backend="aot_eager")` does not.

"""


def page(columns: dict[str, dict[type, Said | None]]) -> str:
    """The first part, of the optimizers."""
    return part(columns, list(CASES), PROSE, classes=len(CASES), partners=len(columns))


def hooks_page(columns: dict[str, dict[type, Said | None]]) -> str:
    """The second part."""
    return part(columns, list(WORN), HOOKS_PROSE, title=WITH_HOOKS)


def part(columns, rows: list[type], prose: str, **numbers) -> str:
    """Prose, the table of these classes, and its notes."""
    notes, lines = [], []
    for cls in rows:
        cells = []
        for name, found in columns.items():
            note, what = NOTES.get((title(cls), name)), found[cls]
            if what is not None:
                note = f"{what.type}: {what.message}"
                note = note if what.refused else f"FAILS at {what.at}, {note[:200]}"
            if note is not None and note not in notes:
                notes.append(note)
            number = [] if note is None else [str(notes.index(note) + 1)]
            cells.append(", ".join((["yes"] if what is None else []) + number))
        lines.append(" | ".join([f"| {title(cls)}", *cells]) + " |\n")
    yes = sum(what is None for found in columns.values() for what in found.values())
    here = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    prose = prose.format(yes=yes, all=len(rows) * len(columns), versions=here, **numbers)
    head = "|  | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|\n"
    below = (f"{i}. {note}\n".replace("\n", " ").strip() + "\n" for i, note in enumerate(notes, 1))
    return prose + head + "".join(lines) + "\n" + "".join(below)


def run(classes: list[type]) -> dict[str, dict[type, Said | None]]:
    columns = {}
    for name in PARTNERS:
        columns[name] = column(name, classes)
        for cls, what in columns[name].items():
            if what is not None:
                verdict = "refused" if what.refused else "FAILS"
                print(f"{name}, {title(cls)} {verdict}:", *what[1:], flush=True)
    return columns


def main(which: str) -> None:
    if which not in ("all", "optimizers", "hooks"):
        raise SystemExit(f"--part={which} is not one of all, optimizers, hooks")
    warnings.simplefilter("ignore")
    old, _, old_hooks = PAGE.read_text(encoding="utf-8").partition(WITH_HOOKS)
    first = old.strip() + "\n" if which == "hooks" else page(run(list(CASES)))
    is_kept = which == "optimizers" and old_hooks
    second = WITH_HOOKS + old_hooks if is_kept else hooks_page(run(list(WORN)))
    PAGE.write_text(first + "\n" + second, encoding="utf-8")
    print(*re.findall(r"\d+ of\s+\d+\s+cells work", first + second), sep="\n")


if __name__ == "__main__":
    main(*[word.removeprefix("--part=") for word in sys.argv[1:]] or ["all"])
