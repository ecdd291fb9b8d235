"""A running average of the weights, for any optimizer: `--ema=HORIZON`.

    E ← W                                          after each step to `start`
    E ← E + (W − E)/horizon                        after each later one
    A = W + share·(E − W)                          in eval mode: evaluate, save and sample these

    W `p`   E `ema` in the optimizer's state   A `p` in eval mode

Noise of single steps averages out, as it would with a smaller lr, and training goes on from W as if
nobody had looked. Polyak and Juditsky 1992; as a tail average with share .6 in record 46 of
modded-nanogpt's track 3 (2026), which begins at step 2,400 of 2,900 with horizon 150. Begin after
the steep part: E forgets where it began by e in `horizon` steps. decay = 1 − 1/horizon is
torch.optim.swa_utils.get_ema_multi_avg_fn's. State: 4 bytes a parameter (8 for float64), and in
eval mode the trained weights. E of half-precision weights is float32; a parameter counts from its
first gradient on.

Refused: an optimizer that averages by itself (Schedule-Free).

Neighbours: hooks/keep.py

Example:
    import torch
    from hooks.ema import averaged
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(100))
    optimizer = averaged(torch.optim.SGD, horizon=50)([w], lr=0.2)
    for _ in range(500):
        (w - 1 + torch.randn(100)).square().sum().div(2).backward()  # 1 is best, seen through noise
        optimizer.step()
        optimizer.zero_grad()
    noisy = (w - 1).norm()
    optimizer.eval()
    assert (w - 1).norm() < 0.5 * noisy
    optimizer.train()
    assert (w - 1).norm() == noisy
"""

import torch
from torch.optim import Optimizer

from hooks.keep import check_mode, plain_step, subclass


def averaged(
    cls: type[Optimizer], horizon: float, start: int = 0, share: float = 1.0
) -> type[Optimizer]:
    """A subclass of cls that averages, of the same name. horizon, start: in steps.

    Raises ValueError for an optimizer with an average of its own, a horizon below 1, a start below
    0 and a share outside (0, 1].
    """
    if hasattr(cls, "eval"):
        raise ValueError(
            f"{cls.__name__} keeps a second set of weights already: leave the average out, or"
            " average first and look ahead (hooks/ema_nesterov.py) last"
        )
    if not horizon >= 1 or not start >= 0 or not 0 < share <= 1:
        raise ValueError(
            f"horizon={horizon}, start={start}, share={share} are not allowed: horizon is at least"
            " 1 (step), start at least 0, share in (0, 1]"
        )
    plain = plain_step(cls)

    def add_param_group(self, param_group: dict) -> None:
        cls.add_param_group(self, param_group)
        self.param_groups[-1].setdefault("ema_steps", 0)

    def step(self, closure=None):
        check_mode(self)
        loss = plain(self, closure)
        for group in self.param_groups:
            # schedules.follow writes the run's own count, skipped steps and all.
            group["ema_steps"] = group.get("ema_steps", 0) + 1
            # Until then E is W: a state that is there from the first step on can be loaded by
            # tools that look for what a fresh optimizer has.
            is_averaging = group["ema_steps"] > start
            average(group["params"], self.state, horizon if is_averaging else 1)
        return loss

    @torch.no_grad()
    def eval(self, blend: bool = True) -> None:
        """The model holds A from now on. blend: else W, as it is."""
        for group in self.param_groups:
            is_swapped = not group.get("train_mode", True)
            has_begun = group.get("ema_steps", 0) > start
            group["train_mode"] = False
            for p in group["params"] if blend and has_begun and not is_swapped else ():
                state = self.state.get(p, {})
                if "ema" in state:
                    state["trained"] = p.detach().clone()
                    p.copy_(p.to(state["ema"].dtype).lerp(state["ema"], share))

    @torch.no_grad()
    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True
            for p in group["params"]:
                trained = self.state.get(p, {}).pop("trained", None)
                if trained is not None:
                    p.copy_(trained)

    body = {"add_param_group": add_param_group, "step": step, "eval": eval, "train": train}
    return subclass(averaged, cls, (horizon, start, share), body, ("ema",), ("trained",))


@torch.no_grad()
def average(params: list, state: dict, horizon: float) -> None:
    """Moves the E of each parameter towards it; one without E gets it with its first gradient."""
    for p in params:
        if "ema" in state.get(p, {}):
            mean = state[p]["ema"]
            mean.lerp_(p.detach().to(mean.dtype), 1 / horizon)
        elif p.grad is not None:
            # Half precision is too coarse to move by 1/horizon.
            dtype = torch.promote_types(p.dtype, torch.float32)
            state[p]["ema"] = p.detach().to(dtype, copy=True)


if __name__ == "__main__":
    print(__doc__)
