"""Random sequences of what users do to an optimizer, against the same without the detours.

A sequence is made from its class and its number alone: up to 30 operations on tiny tensors. It is
run in two or three ways, and after every operation weights, state and options are compared:

    detours   as it is: saved and loaded (files, hooks, options that are lacking, lists for tuples),
              copied, pickled, groups added late, steps inside autocast, GradScaler or a closure.
              The one left behind by a copy or a load goes on, so that nothing may be shared
    direct    the same class without them; a late group has its own optimizer. Not a bit differs
              (to 1e-12 after Schedule-Free has looked at its average)
    twin      torch's class with the detours, for SGD, AdamW, AdamL2 in float64: weights to 1e-12

    python -m pytest tests/test_partners_fuzz.py -k AdamW-007           one sequence
    PARTNERS_FUZZ=1000 python -m pytest tests/test_partners_fuzz.py     1000 of each class, not 25

Then faults are planted in the classes and in torch: each is found.
"""

import copy
import io
import itertools
import os
import pickle
import random
from contextlib import nullcontext

import pytest
import torch
from test_optim_contract import CASES
from torch.optim import lr_scheduler

from optim import (
    adafactor,
    adam_l2,
    adamw,
    ademamix,
    dion,
    kl_soap,
    lamb,
    lars,
    lion,
    mars,
    muon,
    muown,
    pmuon,
    sgd,
    shampoo,
    soap,
    soap_muon,
)
from optim.attributes import attribute
from optim.schedule_free import AdamWScheduleFree, SGDScheduleFree

SEQUENCES = int(os.environ.get("PARTNERS_FUZZ", "25"))
FEW = 12  # of each class are always run, the others are slow
SCHEDULE_FREE = AdamWScheduleFree, SGDScheduleFree
TWINS = {sgd.SGD: torch.optim.SGD, adamw.AdamW: torch.optim.AdamW, adam_l2.AdamL2: torch.optim.Adam}
SHAPES = [(3, 2), (3, 2), (2, 3), (2,), (), (2, 1, 2), (2, 2), (3,)]  # the last two join late
EARLY = [[0, 2, 3], [1, 4, 5]]  # the groups to begin with
SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.5, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.8)], [2]
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, [g["lr"] + 0.01 for g in o.param_groups], 50, cycle_momentum=has_momentum(o)
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, 3, cycle_momentum=has_momentum(o)),
}


def has_momentum(optimizer) -> bool:
    return bool({"momentum", "betas"} & optimizer.defaults.keys())


# ---- what happens: a list of tuples --------------------------------------------------------------
def options_of(cls: type, r: random.Random) -> dict:
    """Arguments of the constructor."""
    betas = r.choice([(0.9, 0.999), (0.8, 0.95), [0.9, 0.99]])
    own = {
        sgd.SGD: r.choice([{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}]),
        adamw.AdamW: {"betas": betas, "fused": r.random() < 0.3},
        adam_l2.AdamL2: {"betas": betas},
        ademamix.AdEMAMix: {
            "betas": (*betas, 0.9999),
            "alpha_warmup": r.choice([None, 4]),
            "beta3_warmup": r.choice([None, 9]),
        },
        adafactor.Adafactor: {
            "beta1": r.choice([None, 0.9]),
            "eps": r.choice([(1e-30, 1e-3), [None, 1e-3]]),
            "relative_step": r.random() < 0.5,
            "scale_parameter": r.random() < 0.5,
        },
        lars.LARS: {"exclude_1d": r.random() < 0.5, "nesterov": r.random() < 0.5},
        lamb.LAMB: {"betas": betas, "bias_correction": r.random() < 0.5},
        mars.MARS: {"betas": betas, "exclude_1d": r.random() < 0.5},
        shampoo.Shampoo: {
            "betas": betas,
            "precondition_frequency": r.choice([2, 3]),
            "grafting": r.choice(["adam", "rmsprop", "sgd", None]),
            "start_preconditioning_step": r.choice([1, 3]),
        },
        soap.SOAP: {
            "betas": betas,
            "precondition_frequency": r.choice([2, 3]),
            "normalize_grads": r.random() < 0.3,
            "correct_bias": r.random() < 0.7,
        },
        kl_soap.KLSOAP: {"betas": betas, "precondition_frequency": r.choice([2, 3])},
        soap_muon.SOAPMuon: {
            "betas": betas,
            "precondition_frequency": r.choice([2, 3]),
            "trust_gate": r.choice([(1.0, 1.0), (0.2, 0.9)]),
            "ns_dtype": r.choice([None, torch.float32]),
        },
        muon.Muon: {
            "nesterov": r.random() < 0.7,
            "normuon_beta2": r.choice([None, 0.95]),
            "betas": betas,
            "cautious": r.random() < 0.3,
            "ns": r.choice(["quintic", "polar"]),
            "ns_dtype": r.choice([None, torch.float32]),
        },
        muown.Muown: {"betas": betas},
        dion.Dion3: {
            "fraction": r.choice([0.25, 1.0]),
            "normuon_beta2": r.choice([None, 0.95]),
            "betas": betas,
            "ns_dtype": r.choice([None, torch.float32]),
        },
        pmuon.PMuon: {"betas": betas},
        AdamWScheduleFree: {
            "warmup_steps": r.choice([0, 4]),
            "r": r.choice([0, 1]),
            "betas": betas,
        },
        SGDScheduleFree: {"warmup_steps": r.choice([0, 4]), "r": r.choice([0, 1])},
    }.get(cls, {})
    return {"lr": CASES[cls][1], "weight_decay": r.choice([0.0, 0.05]), **own}


def sequence(cls: type, seed: int) -> tuple[dict, list[tuple]]:
    """Options and operations, the same at every call."""
    r = random.Random(f"{cls.__name__} {seed}")
    options, operations, late = options_of(cls, r), [], len(EARLY[0] + EARLY[1])
    dtypes = [torch.float64, torch.float64, torch.float32, torch.bfloat16]
    options["dtype"] = torch.float64 if cls in TWINS and r.random() < 0.8 else r.choice(dtypes)
    for _ in range(r.randint(15, 27)):
        name = r.choice(
            ["step"] * 9
            + ["save"] * 4
            + ["tick"] * 3
            + ["attach"]
            + [
                "copy",
                "pickle",
                "lr",
                "decay",
                "momentum",
                "zero_grad",
                "overwrite",
                "group",
                "look",
            ]
        )
        if name == "step":
            chances = r.choice(["gggg0-k", "gggg0-k", "ggggggg", "-", "0"])
            kinds = "".join(r.choice(chances) for _ in SHAPES)
            around = r.choice(["", "", "", "autocast", "scaler", "overflow", "closure"])
            operations.append((name, kinds, r.randrange(10**6), around))
        elif name == "save":
            how = r.choice(["file", "lacks", "json", "pre-hook", "post-hook", "live", "itself"])
            operations.append((name, how, r.randrange(10**6)))
        elif name == "attach":
            operations.append((name, r.choice(list(SCHEDULERS))))
        elif name == "group":
            if late < len(SHAPES):
                operations.append((name, late, CASES[cls][1] * r.choice([0.5, 2])))
                late += 1
        elif name in ("lr", "decay", "momentum"):
            lr = CASES[cls][1] * r.choice([0, 0.1, 0.5, 2])
            decay, momentum = r.choice([0, 0.01, 0.1]), r.choice([0.5, 0.8, 0.95])
            x = {"lr": lr, "decay": decay, "momentum": momentum}[name]
            operations.append((name, r.randrange(4), x))
        elif name == "zero_grad":
            operations.append((name, r.random() < 0.5))
        else:
            operations.append((name, r.randrange(10**6)))
    return options, operations + [("step", "g" * len(SHAPES), i, "") for i in range(3)]


# ---- how it happens ------------------------------------------------------------------------------
def random_like(p: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def pre_hook(_, state: dict) -> dict:
    groups = [{**group, "params": group["params"][::-1]} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def post_hook(optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] /= 2
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            for name in state.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer", "z", "row_var"}:
                state[name] = state[name] / 2


class Run:
    """Tiny weights and their optimizers: one, or for the direct way one for each late group."""

    def __init__(self, cls: type, options: dict, detours: bool):
        dtype, options = options["dtype"], {k: x for k, x in options.items() if k != "dtype"}
        self.cls, self.detours, self.ours = cls, detours, cls in CASES
        if not self.ours:
            options.pop("fused", None)
        self.options, self.schedulers, self.seen = options, [], []
        self.exact = True  # but for what eval() and train() round
        self.params = [
            random_like(torch.empty(shape, dtype=dtype), i).requires_grad_()
            for i, shape in enumerate(SHAPES)
        ]
        self.layout = []  # of each group the numbers of its parameters and its own options
        for i, numbers in enumerate(EARLY):
            matrices_only = attribute(cls, "matrices_only")
            flat = [n for n in numbers if len(SHAPES[n]) < 2 and matrices_only]
            own = {"lr": options["lr"] / (i + 1)}
            self.layout.append(([n for n in numbers if n not in flat], own))
            self.layout += [(flat, {"use_muon": False, "lr": 0.01})] if flat else []
        self.optimizers = [self.made(self.params)]
        self.train()

    def made(self, params: list, more: float = 1.0):
        """A new optimizer, its lr and decay `more` times what they were in the beginning."""
        options = {**self.options, "weight_decay": self.options["weight_decay"] + more - 1}
        return self.cls(
            [
                {**options, **own, "lr": own["lr"] * more, "params": [params[n] for n in numbers]}
                for numbers, own in self.layout
            ]
        )

    def train(self) -> None:
        for optimizer in self.optimizers:
            if hasattr(optimizer, "train"):
                optimizer.train()

    def groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def do(self, operation: tuple) -> None:
        name, *arguments = operation
        getattr(self, name)(*arguments)

    def state(self) -> dict:
        """{(number of the parameter, name): value}"""
        states = {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}
        return {
            (i, name): x
            for i, p in enumerate(self.params)
            for name, x in sorted(states.get(p, {}).items())
        }

    def everything(self) -> list[torch.Tensor]:
        state = (x for x in self.state().values() if torch.is_tensor(x))
        return [*self.params, *self.seen, *state]

    def names(self) -> list[str]:
        state = (f"state {name}" for name, x in self.state().items() if torch.is_tensor(x))
        seen = (f"parameter {i} as seen" for i in range(len(self.seen)))
        return [*(f"parameter {i}" for i in range(len(self.params))), *seen, *state]

    def numbers(self) -> dict:
        """What is counted and set, but for what torch itself adds to a copy."""
        options = self.optimizers[0].defaults.keys() - {"differentiable"}
        found = {
            ("group", i, k): tuple(x) if isinstance(x, list) else x
            for i, group in enumerate(self.groups())
            for k, x in group.items()
            if k in options
        }
        return found | {k: x for k, x in self.state().items() if not torch.is_tensor(x)}

    # -- the same for all
    def step(self, kinds: str, seed: int, around: str) -> None:
        for i, (p, kind) in enumerate(zip(self.params, kinds)):
            if kind != "k":
                p.grad = {"g": random_like(p, seed + i), "0": torch.zeros_like(p), "-": None}[kind]
        before = [p.detach().clone() if p.grad is None else None for p in self.params]
        some = any(p.grad is not None for group in self.groups() for p in group["params"])
        if around in ("scaler", "overflow") and some:
            self.step_scaled(around == "overflow")
        else:
            with torch.autocast("cpu") if around == "autocast" and self.detours else nullcontext():
                for optimizer in self.optimizers:
                    self.step_closed(optimizer) if around == "closure" else optimizer.step()
        for p, old in zip(self.params, before):
            assert old is None or torch.equal(p, old), "moved without a gradient"

    def step_closed(self, optimizer) -> None:
        if not self.detours:
            return optimizer.step()
        grads = [p.grad for p in self.params]
        optimizer.zero_grad()

        def closure():
            assert torch.is_grad_enabled()
            for p, grad in zip(self.params, grads):
                p.grad = grad
            return torch.tensor(5.0)

        assert optimizer.step(closure) == 5

    def step_scaled(self, overflow: bool) -> None:
        if not self.detours:
            for optimizer in () if overflow else self.optimizers:
                optimizer.step()
            return self.zero_grad(True)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(torch.zeros(()))  # makes its tensors
        known = [p for group in self.groups() for p in group["params"] if p.grad is not None]
        for p in known:
            p.grad = p.grad * 256
        if overflow:
            known[0].grad = torch.full_like(known[0], torch.inf)
        (optimizer,) = self.optimizers
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (128 if overflow else 256)
        self.zero_grad(True)

    def lr(self, i: int, x: float) -> None:
        self.groups()[i % len(self.groups())]["lr"] = x

    def decay(self, i: int, x: float) -> None:
        self.groups()[i % len(self.groups())]["weight_decay"] = x

    def momentum(self, i: int, x: float) -> None:
        group = self.groups()[i % len(self.groups())]
        if "betas" in group and not group.get("use_muon"):
            group["betas"] = (x, *group["betas"][1:])
        elif group.get("momentum"):
            group["momentum"] = x

    def attach(self, name: str) -> None:
        if len(self.schedulers) < 2:
            self.schedulers.append((name, [SCHEDULERS[name](o) for o in self.optimizers]))

    def tick(self, seed: int) -> None:
        for _, schedulers in self.schedulers:
            for scheduler in schedulers:
                scheduler.step()

    def zero_grad(self, set_to_none: bool) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def overwrite(self, seed: int) -> None:
        p = self.params[seed % len(self.params)]
        with torch.no_grad():
            p.copy_(random_like(p, seed))

    def group(self, number: int, lr: float) -> None:
        own = {"lr": lr}
        if attribute(self.cls, "matrices_only") and len(SHAPES[number]) < 2:
            own = {"use_muon": False, "lr": 0.01}
        self.layout.append(([number], own))
        group, self.schedulers = {**self.options, **own, "params": [self.params[number]]}, []
        if self.detours:
            self.optimizers[0].add_param_group(group)
        else:
            self.optimizers.append(self.cls([group]))
            self.train()

    def look(self, seed: int) -> None:
        """At the weights to evaluate, which every second time are saved and loaded. The direct way
        looks at a copy."""
        if self.cls not in SCHEDULE_FREE or self.params[0].dtype != torch.float64:
            return
        params, optimizers = self.params, self.optimizers
        if not self.detours:
            params, optimizers = copy.deepcopy((params, optimizers))
        for optimizer in optimizers * 2:
            optimizer.eval()
        self.seen, self.exact = [p.detach().clone() for p in params], False
        if self.detours:
            if seed % 2:
                self.save("file", seed)
            self.train()
            self.train()

    # -- detours
    def save(self, how: str, seed: int) -> None:
        if how == "post-hook" and not self.detours:
            for optimizer in self.optimizers:
                post_hook(optimizer)
        if not self.detours:
            return
        (old,), old_params = self.optimizers, self.params
        if how == "itself":
            return old.load_state_dict(old.state_dict())
        state = old.state_dict()
        self.params = [p.detach().clone().requires_grad_() for p in old_params]
        for p, q in zip(self.params, old_params):
            p.grad = None if q.grad is None else q.grad.clone()
        if how == "pre-hook":
            self.layout = [(numbers[::-1], own) for numbers, own in self.layout]
        new = self.made(self.params, more=3.0)
        hooks = {
            "pre-hook": (new.register_load_state_dict_pre_hook, pre_hook),
            "post-hook": (new.register_load_state_dict_post_hook, post_hook),
        }
        hook = hooks[how][0](hooks[how][1]) if how in hooks else None
        schedulers = [(name, [SCHEDULERS[name](new)]) for name, _ in self.schedulers]
        if how != "live":
            state = through_a_file(state)
        if how == "json":
            for group in state["param_groups"]:
                group |= {k: list(x) for k, x in group.items() if isinstance(x, tuple)}
        if how == "lacks" and self.ours:
            r = random.Random(seed)
            for group, fresh in zip(state["param_groups"], new.param_groups):
                known = [k for k, x in new.defaults.items() if group.get(k) == x == fresh[k]]
                for name in r.sample(known, min(2, len(known))):
                    del group[name]
        new.load_state_dict(state)
        if hook is not None:
            hook.remove()
        for (_, (scheduler,)), (_, (before,)) in zip(schedulers, self.schedulers):
            scheduler.load_state_dict(copy.deepcopy(before.state_dict()))
        self.optimizers, self.schedulers = [new], schedulers
        if self.ours or how != "live":  # torch's own shares what it is given
            disturb(old, old_params)

    def copy(self, seed: int) -> None:
        self.replace(copy.deepcopy)

    def pickle(self, seed: int) -> None:
        self.replace(lambda x: pickle.loads(pickle.dumps(x)))

    def replace(self, copied) -> None:
        if self.detours:
            (old,), params = self.optimizers, self.params
            grads = [p.grad for p in params]
            self.params, self.optimizers, self.schedulers = copied(
                (params, self.optimizers, self.schedulers)
            )
            for p, grad in zip(self.params, grads):
                p.grad = None if grad is None else grad.clone()
            disturb(old, params)


def through_a_file(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def disturb(optimizer, params) -> None:
    """One who is left behind goes another way."""
    for group in optimizer.param_groups:
        group["lr"] = 0.3
    if optimizer.param_groups[0].get("train_mode", True):
        for i, p in enumerate(params):
            p.grad = random_like(p, i)
        optimizer.step()


def close(p: torch.Tensor, q: torch.Tensor) -> bool:
    return torch.allclose(p, q, rtol=1e-12, atol=1e-12)


def compare(cls: type, seed: int) -> None:
    """Raises AssertionError where the ways part, with all that is needed to see it again."""
    options, operations = sequence(cls, seed)
    runs = {"detours": Run(cls, options, True), "direct": Run(cls, options, False)}
    if cls in TWINS and options["dtype"] == torch.float64:
        runs["twin"] = Run(TWINS[cls], options, True)
    for i, operation in enumerate(operations):
        try:
            for name, run in runs.items():
                run.do(operation)
            ours, direct, *twin = runs.values()
            name = "comparison"
            things = zip(ours.names(), ours.everything(), direct.everything(), strict=True)
            for what, x, y in things:
                same = torch.equal(x, y) or not ours.exact and close(x, y)
                assert same, f"{what} is {x.tolist()}, without detours {y.tolist()}"
            numbers, expected = ours.numbers(), direct.numbers()
            for what in numbers.keys() | expected.keys():
                x, y = numbers.get(what, "absent"), expected.get(what, "absent")
                assert x == y, f"{what} is {x}, without detours {y}"
            for run in twin:
                for j, (x, y) in enumerate(zip(ours.params, run.params)):
                    assert close(x, y), f"parameter {j} is {x.tolist()}, torch's {y.tolist()}"
        except Exception as error:
            done = "\n".join(f"    {operation}" for operation in operations[: i + 1])
            raise AssertionError(
                f"{cls.__name__}, sequence {seed}, {name}: {type(error).__name__}: {error}\n"
                f"{options}\n{done}\n"
                f"python -m pytest tests/test_partners_fuzz.py -k {cls.__name__}-{seed:03d}"
            ) from error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "cls, seed",
    [
        pytest.param(
            cls,
            seed,
            id=f"{cls.__name__}-{seed:03d}",
            marks=[pytest.mark.slow] if seed >= FEW else [],
        )
        for cls in CASES
        for seed in range(SEQUENCES)
    ],
)
def test_no_detour_changes_a_bit(cls, seed):
    compare(cls, seed)


# ---- planted faults ------------------------------------------------------------------------------
def loading(change):
    """A fault in what load_state_dict leaves: change(optimizer, groups before, what was given)."""

    def plant(m, cls):
        load = cls.load_state_dict

        def load_state_dict(self, state_dict):
            before = [dict(group) for group in self.param_groups]
            load(self, state_dict)
            change(self, before, state_dict)

        m.setattr(cls, "load_state_dict", load_state_dict)

    return plant


def stepping(change):
    """A fault in step(): change(the right step, optimizer, closure)."""

    def plant(m, cls):
        right = cls.step
        m.setattr(cls, "step", lambda self, closure=None: change(right, self, closure))

    return plant


def params_of(optimizer) -> list:
    return [p for group in optimizer.param_groups for p in group["params"]]


def forgets_steps(optimizer, *_):
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = 0


def forgets_state(optimizer, *_):
    optimizer.state.clear()


def exchanges_states(optimizer, *_):
    known = [p for p in params_of(optimizer) if optimizer.state.get(p)]
    for p, q in itertools.combinations(known, 2):
        if p.shape == q.shape:
            optimizer.state[p], optimizer.state[q] = optimizer.state[q], optimizer.state[p]
            return


def exchanges_groups(optimizer, *_):
    one, two = optimizer.param_groups[:2]
    for name in "lr", "weight_decay":
        one[name], two[name] = two[name], one[name]


def rounds_state(optimizer, *_):
    for state in optimizer.state.values():
        for name, x in state.items():
            if torch.is_tensor(x):
                state[name] = x.bfloat16().to(x.dtype)


def keeps_its_lr(optimizer, before, _):
    for group, old in zip(optimizer.param_groups, before):
        group["lr"] = old["lr"]


def shares_what_is_given(optimizer, _, given):
    ids = [i for group in given["param_groups"] for i in group["params"]]
    for i, p in zip(ids, params_of(optimizer)):
        for name, x in given["state"].get(i, {}).items():
            if not optimizer._optimizer_load_state_dict_pre_hooks:
                optimizer.state[p][name] = x


def empties_what_is_lacking(optimizer, _, given):
    for group, saved in zip(optimizer.param_groups, given["param_groups"]):
        for name in optimizer.defaults.keys() - saved.keys():
            group[name] = None


def decays_once_more(m, cls):
    loading(lambda optimizer, *_: setattr(optimizer, "loaded", True))(m, cls)

    def step(right, optimizer, closure):
        for group in optimizer.param_groups if hasattr(optimizer, "loaded") else ():
            for p in group["params"]:
                p.data.mul_(1 - group["lr"] * group["weight_decay"] * (p.grad is not None))
        return right(optimizer, closure)

    stepping(step)(m, cls)


def takes_none_for_zero(right, optimizer, closure):
    for p in params_of(optimizer):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return right(optimizer, closure)


def late_closure(right, optimizer, closure):
    right(optimizer)
    return None if closure is None else closure()


def rounds_in_autocast(right, optimizer, closure):
    for p in params_of(optimizer) if torch.is_autocast_enabled("cpu") else ():
        p.grad = None if p.grad is None else p.grad.bfloat16().to(p.dtype)
    return right(optimizer, closure)


def late_groups_inherit_counts(m, cls):
    """From their first step on they have the count of the first that has any."""
    right = cls.add_param_group

    def add_param_group(self, group):
        right(self, group)
        if getattr(self, "state", None):
            self.late = self.param_groups[-1]["params"]

    def step(right, optimizer, closure):
        loss = right(optimizer, closure)
        counts = [state["step"] for state in optimizer.state.values() if "step" in state]
        for p in getattr(optimizer, "late", []):
            if "step" in optimizer.state.get(p, {}):
                optimizer.state[p]["step"], optimizer.late = counts[0], []
        return loss

    m.setattr(cls, "add_param_group", add_param_group)
    stepping(step)(m, cls)


def copies_share_state(m, cls):
    def deep(self, memo):
        memo |= {id(x): x for state in self.state.values() for x in state.values()}
        return copy._reconstruct(self, memo, *self.__reduce_ex__(4))

    m.setattr(cls, "__deepcopy__", deep, raising=False)


def pickles_forget_decay(m, cls):
    right = cls.__getstate__

    def getstate(self):
        groups = [{**group, "weight_decay": 0.0} for group in self.param_groups]
        return {**right(self), "param_groups": groups}

    m.setattr(cls, "__getstate__", getstate)


def ignores_pre_hooks(m, cls):
    right = cls.register_load_state_dict_pre_hook
    m.setattr(
        cls,
        "register_load_state_dict_pre_hook",
        lambda self, hook, *more, **named: right(
            self, (lambda *_: None) if hook is pre_hook else hook, *more, **named
        ),
    )


def overwrites_post_hooks(m, cls):
    def overwritten(optimizer):
        groups = [dict(group) for group in optimizer.param_groups]
        state = {p: dict(state) for p, state in optimizer.state.items()}
        post_hook(optimizer)
        optimizer.state.update(state)
        for group, old in zip(optimizer.param_groups, groups):
            group.update(old)

    right = cls.register_load_state_dict_post_hook
    m.setattr(
        cls,
        "register_load_state_dict_post_hook",
        lambda self, hook, *more, **named: right(
            self, overwritten if hook is post_hook else hook, *more, **named
        ),
    )


def steps_on_overflow(m, cls):
    m.setattr(torch.amp.GradScaler, "step", lambda self, optimizer: optimizer.step())


def trains_twice(m, cls):
    def train(self):
        self._move(True)
        for group in self.param_groups:
            group["train_mode"] = False
        self._move(True)

    m.setattr(cls, "train", train)


COUNTING = {cls for cls in CASES if cls not in (sgd.SGD, lars.LARS, lion.Lion)}
FAULTS = {  # what is planted, and the classes where it is one (None: all)
    "a pre-hook's result is ignored": (ignores_pre_hooks, None),
    "a post-hook is overwritten": (overwrites_post_hooks, None),
    "step counts are not loaded": (loading(forgets_steps), COUNTING),
    "no state is loaded": (loading(forgets_state), None),
    "the states of two parameters are exchanged": (loading(exchanges_states), None),
    "two groups are exchanged": (loading(exchanges_groups), None),
    "state is rounded to another dtype": (loading(rounds_state), None),
    "lr is not loaded": (loading(keeps_its_lr), None),
    "a loaded state is shared": (loading(shares_what_is_given), None),
    "what a saved group lacks is emptied": (loading(empties_what_is_lacking), None),
    "decay acts twice after a load": (decays_once_more, None),
    "no gradient counts as zero": (stepping(takes_none_for_zero), None),
    "the closure runs too late": (stepping(late_closure), None),
    "autocast rounds gradients": (stepping(rounds_in_autocast), None),
    "a late group starts with the counts of others": (late_groups_inherit_counts, COUNTING),
    "a deep copy shares state": (copies_share_state, None),
    "a pickle forgets the decay": (pickles_forget_decay, None),
    "an overflow is stepped on": (steps_on_overflow, None),
    "train() moves the weights twice": (trains_twice, set(SCHEDULE_FREE)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    plant, classes = FAULTS[fault]
    for cls in CASES if classes is None else classes:
        for seed in range(25):
            with monkeypatch.context() as m:
                plant(m, cls)
                try:
                    compare(cls, seed)
                except AssertionError:
                    break
        else:
            pytest.fail(f"{cls.__name__}: {fault}, and nothing is seen of it")
        compare(cls, seed)  # so it was the fault
