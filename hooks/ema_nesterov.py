"""EMA-Nesterov: gradients are taken ahead, along the mean of the last hundred steps.

    W′ ← step(W + β·b)                             any optimizer, from the point ahead
    b ← γ·b + (1−γ)·(W′ − W)                       the move ahead is part of what is averaged
    β = beta·lr/lr₀                                0 before `start` steps are taken, and from `stop`

    W `p` in eval mode, and `held` in the state   W + β·b `p` in train mode   b `mean_step`
    γ `gamma`   lr, lr₀ the group's `lr` and `initial_lr`, at the step before; of OneCycleLR
    `max_lr`

Yau et al., May 2026 (arXiv 2605.25395): the momentum of the whole method's steps, at a horizon of
1/(1−γ) steps, whatever momentum the optimizer has within. Record 46 of modded-nanogpt's track 3
begins after 300 of 2,900 steps and stops 950 before the end; it scales all by the embedding's lr
(`follow`). Call eval() before evaluating: W is the model, and p only where gradients are taken.
State: 8 bytes a parameter (16 for float64). b of half-precision weights is
float32.

Example:
    import torch
    from hooks.ema_nesterov import EMANesterov
    curvature = torch.tensor([1.0, 0.01])  # steep, and flat
    left = {}
    for hook in None, EMANesterov(beta=20.0, gamma=0.95):
        w = torch.nn.Parameter(torch.ones(2))
        cls = torch.optim.SGD if hook is None else hook.wear(torch.optim.SGD)
        optimizer = cls([w], lr=0.5)
        for _ in range(200):
            (curvature * w.square()).sum().div(2).backward()
            optimizer.step()
            optimizer.zero_grad()
        if hook is not None:
            optimizer.eval()  # the model holds W
        left[hook is not None] = w.norm().item()
    assert left[True] < 0.5 * left[False]
"""

import dataclasses
import math

import torch
from torch.optim import Optimizer

from hooks.keep import beneath, check_mode, plain_step, subclass

KINDS = ("matrix", "embedding", "head", "scalar")


@dataclasses.dataclass(frozen=True)
class EMANesterov:
    """beta: how many mean steps ahead; gamma: what b keeps in a step; start, stop: in steps.

    follow: the `kind` of the group whose lr scales beta for all, as optim/param_groups.py names
    kinds; None: each group's own. Raises ValueError for what is out of range.
    """

    beta: float = 0.3
    gamma: float = 0.99
    start: int = 0
    stop: float = math.inf
    follow: str | None = None

    def __post_init__(self):
        if not (self.beta > 0 and 0 <= self.gamma < 1 and 0 <= self.start < self.stop):
            raise ValueError(
                f"beta={self.beta}, gamma={self.gamma}, start={self.start}, stop={self.stop} are"
                " not allowed: beta above 0, gamma in [0, 1), 0 <= start < stop"
            )
        if self.follow not in (None, *KINDS):
            raise ValueError(f"follow={self.follow} is none of {', '.join(KINDS)}")

    def wear(self, cls: type[Optimizer]) -> type[Optimizer]:
        """A subclass of cls that looks ahead, of the same name. Raises ValueError as hooked()."""
        if hasattr(beneath(cls), "eval") or "held" in getattr(cls, "keeps", ()):
            raise ValueError(
                f"{cls.__name__} keeps a second set of weights by itself; take another optimizer,"
                " or ema_nesterov once"
            )
        return looking_ahead(cls, self)


def looking_ahead(cls: type[Optimizer], hook: EMANesterov) -> type[Optimizer]:
    plain = plain_step(cls)

    def add_param_group(self, param_group: dict) -> None:
        cls.add_param_group(self, param_group)
        group = self.param_groups[-1]
        group.setdefault("ahead_steps", 0)
        group.setdefault("first_lr", float(group["lr"]))
        if hook.follow is not None:
            group.setdefault("follow", hook.follow)

    def step(self, closure=None):
        check_mode(self)
        # Before its first step a parameter holds W itself.
        first = {
            p: p.detach().clone()
            for group in self.param_groups
            for p in group["params"]
            if "held" not in self.state.get(p, {}) and (closure or p.grad is not None)
        }
        loss = plain(self, closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p in first and p.grad is not None:
                    dtype = torch.promote_types(p.dtype, torch.float32)
                    start = torch.zeros_like(p, dtype=dtype)
                    self.state[p] |= {"held": first[p], "mean_step": start}
            group["ahead_steps"] = taken = group.get("ahead_steps", 0) + 1
            is_inside = hook.start <= taken < hook.stop
            group["ahead"] = hook.beta * lr_factor(self, group) if is_inside else 0.0
            known = [p for p in group["params"] if "held" in self.state.get(p, {})]
            remember(known, self.state, hook.gamma)
            look_ahead(known, self.state, group["ahead"])
        return loss

    def lr_factor(self, group: dict) -> float:
        # schedules.follow knows also the kinds that another stage of a pipeline holds.
        if "follow_factor" in group:
            return group["follow_factor"]
        if hook.follow is not None:
            group = group_of(self, hook.follow)
        # OneCycleLR's initial_lr is where it begins, 1/25 of its peak.
        first = group.get("first_lr", group["lr"])
        peak = group.get("max_lr", group.get("initial_lr", first))
        return float(group["lr"] / peak) if group["lr"] else 0.0

    @torch.no_grad()
    def eval(self, **options) -> None:
        """The model holds W from now on. options: those of the class beneath."""
        for group in self.param_groups:
            if group.get("train_mode", True):
                for p in group["params"]:
                    if "held" in self.state.get(p, {}):
                        p.copy_(self.state[p]["held"])
        if hasattr(cls, "eval"):
            cls.eval(self, **options)
        for group in self.param_groups:
            group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        modes = [group.get("train_mode", True) for group in self.param_groups]
        if hasattr(cls, "train"):
            cls.train(self)
        for group, was_training in zip(self.param_groups, modes):
            known = [p for p in group["params"] if "held" in self.state.get(p, {})]
            if not was_training:
                look_ahead(known, self.state, group.get("ahead", 0.0))
            group["train_mode"] = True

    body = {"add_param_group": add_param_group, "step": step, "eval": eval, "train": train}
    return subclass(looking_ahead, cls, (hook,), body, ("held", "mean_step"))


def group_of(optimizer: Optimizer, kind: str) -> dict:
    """The group of this kind. Raises ValueError where there is none."""
    for group in optimizer.param_groups:
        if group.get("kind") == kind:
            return group
    raise ValueError(f"EMANesterov: follow={kind}, but no group is of this kind")


@torch.no_grad()
def remember(params: list, state: dict, gamma: float) -> None:
    """After a step: b takes in the whole move since the last W, and W is held."""
    for p in params:
        b, held = state[p]["mean_step"], state[p]["held"]
        b.lerp_(p.detach().to(b.dtype) - held, 1 - gamma)
        held.copy_(p)


@torch.no_grad()
def look_ahead(params: list, state: dict, beta: float) -> None:
    """p becomes W + beta b; the same bits whenever it is called."""
    for p in params if beta else ():
        b = state[p]["mean_step"]
        p.copy_(state[p]["held"].to(b.dtype).add(b, alpha=beta))
