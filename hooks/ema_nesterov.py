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
(`follow`). From beta 1 on b would grow by itself. Call eval() before evaluating: W is the model, p
only where gradients are taken. State: 8 bytes a parameter (16 for float64). b of half-precision
weights is float32.

Neighbours: hooks/keep.py

Example:
    import torch
    from hooks.ema_nesterov import EMANesterov
    curvature = torch.tensor([1.0, 0.01])  # steep, and flat
    left = {}
    for beta in 0.001, 0.5:
        w = torch.nn.Parameter(torch.ones(2))
        optimizer = EMANesterov(beta, gamma=0.95).wear(torch.optim.SGD)([w], lr=0.5)
        for _ in range(200):
            (curvature * w.square()).sum().div(2).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.eval()  # the model holds W
        left[beta] = w.norm().item()
    assert left[0.5] < 0.7 * left[0.001]
"""

import dataclasses
import math

import torch
from torch.optim import Optimizer

from hooks.keep import beneath, check_mode, plain_step, subclass

KINDS = (None, "matrix", "embedding", "head", "scalar")


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
        in_range = 0 < self.beta < 1 and 0 <= self.gamma < 1 and 0 <= self.start < self.stop
        if not in_range or self.follow not in KINDS:
            raise ValueError(
                f"beta={self.beta}, gamma={self.gamma}, start={self.start}, stop={self.stop},"
                f" follow={self.follow} are not allowed: beta in (0, 1), gamma in [0, 1),"
                f" 0 <= start < stop, follow one of {', '.join(map(str, KINDS))}"
            )

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
        own = {"ahead_steps": 0, "ahead": 0.0, "first_lr": float(group["lr"])}
        if hook.follow is not None:
            own["follow"] = hook.follow
        group |= own | group

    def step(self, closure=None):
        check_mode(self)
        groups, state = self.param_groups, self.state
        every = [p for group in groups for p in group["params"] if closure or p.grad is not None]
        # Before its first step a parameter holds W itself.
        first = {p: p.detach().clone() for p in every if "held" not in state.get(p, {})}
        loss = plain(self, closure)
        for p, held in first.items():
            if p.grad is not None:
                mean = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
                state[p] |= {"held": held, "mean_step": mean}
        for group in groups:
            group["ahead_steps"] = taken = group.get("ahead_steps", 0) + 1
            is_inside = hook.start <= taken < hook.stop
            group["ahead"] = hook.beta * lr_factor(groups, group) if is_inside else 0.0
            remember(group, state, hook.gamma)
            look_ahead(group, state)
        return loss

    def eval(self, **options) -> None:
        """The model holds W from now on. options: those of the class beneath."""
        for group in self.param_groups:
            if group.get("train_mode", True):
                look_ahead({**group, "ahead": 0.0}, self.state)
        if hasattr(cls, "eval"):
            cls.eval(self, **options)
        for group in self.param_groups:
            group["train_mode"] = False

    def train(self) -> None:
        modes = [group.get("train_mode", True) for group in self.param_groups]
        if hasattr(cls, "train"):
            cls.train(self)
        for group, was_training in zip(self.param_groups, modes):
            if not was_training:
                look_ahead(group, self.state)
            group["train_mode"] = True

    body = {"add_param_group": add_param_group, "step": step, "eval": eval, "train": train}
    return subclass(looking_ahead, cls, (hook,), body, ("held", "mean_step"))


def lr_factor(groups: list[dict], group: dict) -> float:
    """lr/lr₀ of this group, or of the one it follows. Raises ValueError where there is none."""
    # schedules.follow knows also the kinds that another stage of a pipeline holds.
    if "follow_factor" in group:
        return group["follow_factor"]
    if "follow" in group:
        of_kind = [other for other in groups if other.get("kind") == group["follow"]]
        if not of_kind:
            raise ValueError(f"EMANesterov: follow={group['follow']}, but no group is of this kind")
        group = of_kind[0]
    # OneCycleLR's initial_lr is where it begins, 1/25 of its peak.
    peak = group.get("max_lr", group.get("initial_lr", group.get("first_lr", group["lr"])))
    return float(group["lr"] / peak) if group["lr"] else 0.0


@torch.no_grad()
def remember(group: dict, state: dict, gamma: float) -> None:
    """After a step: b takes in the whole move since the last W, and W is held."""
    for p in group["params"]:
        if "held" in state.get(p, {}):
            b, held = state[p]["mean_step"], state[p]["held"]
            b.lerp_(p.detach().to(b.dtype) - held, 1 - gamma)
            held.copy_(p)


@torch.no_grad()
def look_ahead(group: dict, state: dict) -> None:
    """p becomes W + beta b; the same bits whenever it is called."""
    for p in group["params"]:
        if "held" in state.get(p, {}):
            b, held = state[p]["mean_step"], state[p]["held"]
            p.copy_(held.to(b.dtype).add(b, alpha=group.get("ahead", 0.0)))


if __name__ == "__main__":
    print(__doc__)
