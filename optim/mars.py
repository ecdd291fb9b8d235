"""MARS: AdamW on gradients that are corrected by what they were one step before.

    c ← g + γ·β₁/(1−β₁)·(g − g₋)                   g₋ the step before; c = g at the first step
    c ← c / max(1, ‖c‖)                            ‖·‖ of the whole tensor
    m ← β₁·m + (1−β₁)·c       m̂ = m / (1 − β₁ᵗ)    from here on AdamW, with c for g
    v ← β₂·v + (1−β₂)·c²      v̂ = v / (1 − β₂ᵗ)
    p ← p·(1 − lr·λ) − lr·m̂ / (√v̂ + ε)

An average of old gradients lags behind the weights. The difference of two gradients says how the
gradient moves, and shifts the average there; at γ = 1 that is STORM's recursive momentum, whose
noise falls, at a small γ a part of it.

    p `p`   g `g`   g₋ `last_grad`   m `exp_avg`   v `exp_avg_sq`   t `step`, from 1
    γ `gamma`   β `betas`   ε `eps`   λ `weight_decay`

Yuan et al., November 2024 (arXiv 2411.10438), MARS-AdamW; defaults are those of the authors' class.
In the paper g₋ is the gradient of this step's batch at the weights before: the exact form, a second
backward for each step. Here, as by default there, it is the gradient of the step before, with its
own batch. For the exact form take the coming batch's gradients before a step, and overwrite the
state after it:
    optimizer.state[p]["last_grad"].copy_(coming)

At the first step the authors' code has 0 for g₋, so that c is (1 + γβ₁/(1−β₁))·g, 1.475·g by
default; here c = g, as with the paper's x₁ = x₀. Vectors take AdamW with `betas_1d`, and their
group's lr and λ, unless exclude_1d=False (the authors' code takes kernels of three dimensions for
vectors too). lr is in units of weight, as AdamW's; on train.py's default job .003 ends lowest of
.0015, .003, .006 (validation loss 1.706, 1.648, 1.769, one seed). State: 12 bytes a parameter (24
for float64 parameters), 8 in vectors. Half-precision parameters keep float32 state.

Used with torch's schedulers (OneCycleLR moves β₁, and the correction with it), GradScaler,
autocast, compile, DDP and torch.distributed.checkpoint; with fully_shard by make_optimizer of
parallel/sharded_optimizer.py: DTensors work too, slowly. States of the authors' MARS-AdamW load.
docs/partners.md has all partners.

Example:
    import torch
    from optim.mars import MARS
    final = {}
    for gamma in 0.0, 0.025:
        torch.manual_seed(0)
        w = torch.ones(10, 10, requires_grad=True)
        optimizer = MARS([w], lr=0.1, gamma=gamma)
        for _ in range(60):
            loss = w.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        final[gamma] = loss.item()
    assert final[0.025] < 0.5 * final[0.0]  # plain momentum of .95 swings further
"""

import math

import torch


def corrected(g, last_grad, gamma: float, beta1: float) -> torch.Tensor:
    """c, clipped to norm 1, of the shape of `g`; `last_grad` becomes g, in place."""
    # From last_grad through g and beyond: g + k·(g − g₋).
    c = torch.lerp(last_grad, g, 1 + gamma * beta1 / (1 - beta1))
    last_grad.copy_(g)
    # A tensor throughout: to ask whether it clips, the host would wait for a GPU.
    return c.div_(c.norm().clamp(min=1))


def adamw_update(
    p, g, exp_avg, exp_avg_sq, bias1, root2, lr, beta1, beta2, eps, weight_decay
) -> None:
    """One step, in place on `p`, `exp_avg`, `exp_avg_sq`, all of one shape with `g`.

    bias1 = 1 − β₁ᵗ, root2 = √(1 − β₂ᵗ).
    """
    p.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    # √v̂ + ε, times root2: both bias corrections become one scalar factor.
    p.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(eps * root2), value=-lr * root2 / bias1)


class MARS(torch.optim.Optimizer):
    """Raises ValueError for bad hyperparameters, RuntimeError for sparse or complex gradients."""

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = False  # clips by the norm of the whole parameter
    zero_init: bool = False  # moves what lies before zeros by full steps along noise
    heavy_step: bool = False  # cheap enough for every replica to repeat
    mup_rule: str | None = "adam"  # entries of a step have one size, whatever the gradient's

    @staticmethod
    def state_numbers(shape: tuple[int, ...], *, exclude_1d: bool = True) -> int:
        """Numbers of state that a parameter of this shape takes."""
        return len(state_names(len(shape), exclude_1d)[1:]) * math.prod(shape)

    def __init__(
        self,
        params,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        gamma: float = 0.025,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        exclude_1d: bool = True,
        betas_1d: tuple[float, float] = (0.9, 0.95),
    ):
        defaults = dict(lr=lr, betas=betas, gamma=gamma, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults | dict(exclude_1d=exclude_1d, betas_1d=betas_1d))

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        named = {name: group[name] for name in ("lr", "gamma", "eps", "weight_decay")}
        for name in "betas", "betas_1d":
            beta1, beta2 = group[name]
            named |= {f"{name}[0]": beta1, f"{name}[1]": beta2}
        for name, x in named.items():
            end = 1 if name.startswith("betas") else "inf"
            if not 0 <= x < float(end):
                raise ValueError(f"MARS: {name}={x} is not allowed; it must lie in [0, {end})")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Check every gradient first: an error must not leave half of the parameters stepped.
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if p.grad.layout != torch.strided or p.is_complex():
                raise RuntimeError("MARS: gradients must be dense and real, not sparse or complex")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_parameter(group, p)
        return loss

    def _step_parameter(self, group: dict, p: torch.Tensor) -> None:
        # A float32 copy for half precision. For other dtypes .to() returns p itself.
        work = p.to(torch.promote_types(p.dtype, torch.float32))
        g = p.grad.to(work.dtype)
        is_corrected = p.ndim >= 2 or not group["exclude_1d"]
        beta1, beta2 = group["betas"] if is_corrected else group["betas_1d"]
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(work), exp_avg_sq=torch.zeros_like(work))
            if is_corrected:
                # The first difference is 0.
                state["last_grad"] = torch.zeros_like(work).copy_(g)
        t = state["step"] = int(state["step"]) + 1
        if is_corrected:
            g = corrected(g, state["last_grad"], group["gamma"], beta1)
        moments = state["exp_avg"], state["exp_avg_sq"]
        bias1, root2 = 1 - beta1**t, math.sqrt(1 - beta2**t)
        options = group["lr"], beta1, beta2, group["eps"], group["weight_decay"]
        adamw_update(work, g, *moments, bias1, root2, *options)
        # Half precision is rounded once a step, here.
        if work is not p:
            p.copy_(work)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which casts state to the parameter's dtype; here it keeps full precision.

        What a saved group lacks stays as it is. Raises ValueError for another method's state.
        """

        def complete(_, saved: dict) -> dict:
            groups = [from_authors(dict(group)) for group in saved["param_groups"]]
            states = {}
            for ours, theirs in zip(self.param_groups, groups):
                # What an older version did not save keeps this optimizer's value.
                theirs.update((name, x) for name, x in ours.items() if name not in theirs)
                for i, p in zip(theirs["params"], ours["params"]):
                    state = saved["state"].get(i)
                    if not state:
                        continue
                    names = state_names(p.ndim, theirs["exclude_1d"])
                    # The authors' class keeps a last_grad of vectors, and does not use it.
                    if not set(names) <= state.keys() <= {*names, "last_grad"}:
                        raise ValueError(
                            f"MARS: a saved state of {', '.join(state)} is another method's"
                        )
                    # Copies: steps work in place, and must not change the caller's state_dict.
                    dtype = torch.promote_types(p.dtype, torch.float32)
                    states[p] = {
                        name: x.to(p.device, dtype, copy=True) if torch.is_tensor(x) else x
                        for name, x in state.items()
                        if name in names
                    }
            # Keyed by the parameter itself, a state escapes torch's cast to the parameter's dtype.
            return saved | {"state": states, "param_groups": groups}

        # Registered last, so that it reads what the caller's own pre-hooks return.
        last = self.register_load_state_dict_pre_hook(complete)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()


def state_names(ndim: int, exclude_1d: bool) -> tuple[str, ...]:
    """What the state of a parameter of so many dimensions holds."""
    names = ("step", "exp_avg", "exp_avg_sq")
    return names + ("last_grad",) * (ndim >= 2 or not exclude_1d)


def from_authors(group: dict) -> dict:
    """A group of the authors' class in our words; ours stays as it is."""
    if "optimize_1d" in group:
        kind = group.pop("mars_type")
        if kind != "mars-adamw":
            raise ValueError(f"MARS: the saved run had mars_type={kind!r}; this one is mars-adamw")
        group["exclude_1d"] = not group.pop("optimize_1d")
    return group


if __name__ == "__main__":
    for gamma in 0.0, 0.025, 0.1:
        w = torch.ones(10, 10, requires_grad=True)
        optimizer = MARS([w], lr=0.1, gamma=gamma)
        for _ in range(60):
            optimizer.zero_grad()
            loss = w.square().sum()
            loss.backward()
            optimizer.step()
        print(f"MARS: gamma {gamma}: a quadratic goes from 100 to {loss:.3f} in 60 steps")
