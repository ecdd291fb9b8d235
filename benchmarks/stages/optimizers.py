"""A step of every optimizer on the shapes of GPT-2, beside torch's fused AdamW and its Muon.

Weights and gradients are float32 and random, groups are train.py's. Time is by the device's own
events, the median of some steps; a mean over ten where a preconditioner is new every ten. Ratio: to
torch's fused AdamW on the same shapes. torch.optim.Muon takes matrices alone, so fused AdamW has
the rest. state: bytes for each parameter.
"""

import functools
from collections.abc import Callable

import torch
from torch.optim import Optimizer

from benchmarks.stages import common
from benchmarks.stages.common import Plan
from memory.meter import nbytes
from model import GPT, GPTConfig
from optim import param_groups
from optim.attributes import attribute
from run.optimizers import find_optimizer

COVERS = ("memory/meter.py:nbytes", "optim/soap.py:accumulate")
OURS = {  # name in the table: (--optim=, its options)
    "AdamW, fused": ("adamw", {"fused": True}),
    "AdamW": ("adamw", {}),
    "Muon, fused AdamW": ("muon", {"fused": True}),
    "Muon": ("muon", {}),
    "Muown": ("muown", {}),
    "Dion 3": ("dion", {}),
    "PMuon": ("pmuon", {}),
    "SOAP": ("soap", {}),
    "Lion": ("lion", {}),
    "SGD": ("sgd", {"momentum": 0.9}),
    "AdamL2": ("adam_l2", {}),
    "AdEMAMix": ("ademamix", {}),
    "Adafactor": ("adafactor", {}),
    "LAMB": ("lamb", {}),
    "MARS": ("mars", {}),
    "LARS": ("lars", {}),
    "AdamWScheduleFree": ("schedule_free", {}),
    "SGDScheduleFree": ("schedule_free.SGDScheduleFree", {}),
    "Shampoo": ("shampoo", {}),
}
PERIOD = {"SOAP": 10, "Shampoo": 10}  # steps between new preconditioners


def run(plan: Plan) -> None:
    sizes = ("tiny",) if plan.rehearse else ("124M", "350M")
    peers = {
        "torch AdamW, fused": fused_adamw,
        "torch AdamW, foreach": foreach_adamw,
        "torch Muon, fused AdamW": torch_muon,
    }
    ours = {name: functools.partial(our_optimizer, name) for name in OURS}
    heavy = {name: ours.pop(name) for name in PERIOD}
    fastest = {}
    for candidates in (peers | ours, heavy):
        for size in sizes:
            model = shaped(plan, size)
            for name, make in candidates.items():
                ms = measure(plan, size, name, make, model, fastest.get(size))
                if name == "torch AdamW, fused":
                    fastest[size] = ms


def shaped(plan: Plan, size: str) -> GPT:
    """The model of this size, with random weights and gradients: zeros would be faster."""
    common.freed(plan.device)
    shape = common.SIZES[size]
    model = common.gpt(GPTConfig(**shape, n_kv_head=shape["n_head"]), plan.device)
    for p in model.parameters():
        p.grad = torch.randn_like(p).mul_(1e-3)
    return model


def fused_adamw(model: GPT) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=True)]


def foreach_adamw(model: GPT) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), weight_decay=0.1, foreach=True)]


def torch_muon(model: GPT) -> list[Optimizer]:
    kinds = param_groups.kinds(model)
    matrices = [p for name, p in model.named_parameters() if kinds[name] == "matrix"]
    rest = [p for name, p in model.named_parameters() if kinds[name] != "matrix"]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, fused=True)]


def our_optimizer(name: str, model: GPT) -> list[Optimizer]:
    optim, options = OURS[name]
    cls = find_optimizer(optim)
    lrs = dict.fromkeys(("matrix", "embedding", "head", "scalar"), 1e-3)
    groups = param_groups.param_groups(model, lrs, 0.1, attribute(cls, "matrices_only"))
    optimizer = cls(groups, **options)
    if param_groups.averages_weights(optimizer):
        optimizer.train()
    return [optimizer]


def measure(
    plan: Plan, size: str, name: str, make: Callable, model: GPT, fastest: float | None
) -> float | None:
    """A row; returns milliseconds a step, None where it failed."""
    table = f"Optimizers: a step on the shapes of {size}, float32."
    with common.failing_is_a_row(plan, table, optimizer=name):
        common.freed(plan.device)
        optimizers = make(model)
        n_steps = PERIOD.get(name, 1)

        def steps() -> None:
            for _ in range(n_steps):
                for optimizer in optimizers:
                    optimizer.step()

        # Ten steps at a time are long enough, and their first call is the warm-up.
        few = dict(warmup=1, calls=1) if n_steps > 1 else {}
        seconds = 0.05 if plan.rehearse else 0.2
        ms = common.milliseconds(steps, plan.device, seconds, **few) / n_steps
        state = nbytes(
            x
            for optimizer in optimizers
            for values in optimizer.state.values()
            for x in values.values()
            if torch.is_tensor(x)
        )
        n_params = sum(p.numel() for p in model.parameters())
        plan.emit(
            table,
            optimizer=name,
            ms=ms,
            ratio=None if fastest is None else ms / fastest,
            state=state / n_params,
        )
        return ms
