"""AdEMAMix: Adam with a second momentum that remembers ten thousand steps.

    p  ← p·(1 − lr·λ)                              decoupled decay, before the step
    m₁ ← β₁·m₁ + (1−β₁)·g     m̂₁ = m₁ / (1 − β₁ᵗ)  the fast average, as Adam's
    m₂ ← β₃·m₂ + (1−β₃)·g                          the slow one; its start at 0 is not corrected
    v  ← β₂·v + (1−β₂)·g²     v̂  = v / (1 − β₂ᵗ)
    p  ← p − lr·(m̂₁ + α·m₂) / (√v̂ + ε)

Early on a long memory holds gradients of weights long left, so α and β₃ may grow with x = t/T:
    α  = α·x                                       until t = T, `alpha_warmup`
    β₃ = exp(1 / ((1−x)/ln β₁ + x/ln β₃))          from β₁; until t = T, `beta3_warmup`
The half-life of m₂, ln .5/ln β₃, then grows by the same number of steps at each step; a β₃ that
grows evenly would spend nearly all of T on short memories.

    p `p`   g `g`   m₁ `exp_avg`   m₂ `exp_avg_slow`   v `exp_avg_sq`   t `step`, from 1
    β `betas`   α `alpha`   ε `eps`   λ `weight_decay`

Pagliardini, Ablin and Grangier, September 2024 (arXiv 2409.03137). Defaults are those of the
authors' class. Their language models take alpha=8 and both warm-ups as long as the run
(github.com/apple/ml-ademamix): type --opt.alpha=8 --opt.alpha_warmup=STEPS
--opt.beta3_warmup=STEPS. Without warm-ups m₂ fills by 1/10,000 a step, and a run of some hundred
steps is AdamW's. lr is in units of weight, as AdamW's, but where gradients agree a step is up to 1
+ α times as long. On train.py's default job .002 ends lowest of .0005, .001, .002 (validation loss
1.820, 1.643, 1.592, one seed); in short runs alpha=8 with warm-ups ends higher. State: 12 bytes a
parameter (24 for float64 parameters), half as much again as Adam's. Half-precision parameters keep
float32 m₁, m₂ and v.

Used with torch's schedulers (OneCycleLR moves β₁), GradScaler, autocast, compile, DDP, fully_shard
and torch.distributed.checkpoint. States of the authors' class load. docs/partners.md has all
partners.

Example:
    import torch
    from optim.ademamix import AdEMAMix
    final = {}
    for alpha in 0.0, 8.0:
        w = torch.zeros(100, requires_grad=True)
        optimizer = AdEMAMix([w], lr=1e-3, alpha=alpha, alpha_warmup=300, beta3_warmup=300)
        noise = torch.Generator().manual_seed(0)
        for _ in range(300):
            # A slope of 0.1 under noise of 1: the old gradients know the slope.
            w.grad = 0.1 + torch.randn(100, generator=noise)
            optimizer.step()
        final[alpha] = w.mean().item()
    assert final[8.0] < 1.5 * final[0.0] < 0
"""

import math

import torch


def ademamix_update(
    p, g, m1, m2, v, bias1, root2, lr, beta1, beta2, beta3, alpha, eps, weight_decay
) -> None:
    """One step, in place on `p`, `m1`, `m2`, `v`, all of one shape with `g`.

    bias1 = 1 − β₁ᵗ, root2 = √(1 − β₂ᵗ); alpha, beta3: of this step.
    """
    p.mul_(1 - lr * weight_decay)
    m1.lerp_(g, 1 - beta1)
    m2.lerp_(g, 1 - beta3)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    # √v̂ + ε, times root2, and m̂₁ + α·m₂, times bias1: the rest is one scalar factor.
    denominator = v.sqrt().add_(eps * root2)
    p.addcdiv_(m1.add(m2, alpha=alpha * bias1), denominator, value=-lr * root2 / bias1)


def grown_alpha(t: int, alpha: float, warmup: int | None) -> float:
    """α at step t: in a straight line from 0 to `alpha` within `warmup` steps; None: at once."""
    return alpha * t / warmup if warmup is not None and t < warmup else alpha


def grown_beta3(t: int, beta1: float, beta3: float, warmup: int | None) -> float:
    """β₃ at step t: its half-life in a straight line from β₁'s; None: at once."""
    if warmup is None or t >= warmup:
        return beta3
    x = t / warmup
    # 1/ln β, a half-life but for a factor. That of β = 0 is no step.
    start, end = (1 / math.log(beta) if beta > 0 else 0.0 for beta in (beta1, beta3))
    inverse = (1 - x) * start + x * end
    return math.exp(1 / inverse) if inverse else 0.0


def with_names(state: dict) -> dict:
    """A state of the authors' class as ours; its fast average is None where β₁ is 0."""
    if "exp_avg_fast" not in state:
        return state
    named = {name: x for name, x in state.items() if name != "exp_avg_fast"}
    fast = state["exp_avg_fast"]
    return named | {"exp_avg": torch.zeros_like(state["exp_avg_sq"]) if fast is None else fast}


class AdEMAMix(torch.optim.Optimizer):
    """Raises ValueError for bad hyperparameters, RuntimeError for sparse or complex gradients.

    alpha_warmup, beta3_warmup: steps; None: neither α nor β₃ grows.
    """

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = True  # a shard of a parameter can be stepped without seeing the rest
    zero_init: bool = False  # moves what lies before zeros by full steps along noise
    heavy_step: bool = False  # cheap enough for every replica to repeat
    mup_rule: str | None = "adam"  # entries of a step have one size, whatever the gradient's

    @staticmethod
    def state_numbers(shape: tuple[int, ...]) -> int:
        """Numbers of state that a parameter of this shape takes."""
        return 3 * math.prod(shape)

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        alpha_warmup: int | None = None,
        beta3_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        defaults = dict(lr=lr, betas=betas, alpha=alpha, eps=eps, weight_decay=weight_decay)
        defaults |= dict(alpha_warmup=alpha_warmup, beta3_warmup=beta3_warmup)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        if len(group["betas"]) != 3:
            raise ValueError(
                f"AdEMAMix: betas={group['betas']} is not allowed; it takes three, as (.9, .999, "
                ".9999): fast, of the squares, slow"
            )
        named = {name: group[name] for name in ("lr", "alpha", "eps", "weight_decay")}
        named |= {f"betas[{i}]": beta for i, beta in enumerate(group["betas"])}
        for name, x in named.items():
            end = 1 if name.startswith("betas") else "inf"
            if not 0 <= x < float(end):
                raise ValueError(f"AdEMAMix: {name}={x} is not allowed; it must lie in [0, {end})")
        for name in "alpha_warmup", "beta3_warmup":
            if group[name] is not None and not group[name] >= 0:
                raise ValueError(
                    f"AdEMAMix: {name}={group[name]} is not allowed; type a number of steps, none"
                )
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
                raise RuntimeError(
                    "AdEMAMix: gradients must be dense and real, not sparse or complex"
                )
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_parameter(group, p)
        return loss

    def _step_parameter(self, group: dict, p: torch.Tensor) -> None:
        beta1, beta2, beta3 = group["betas"]
        # A float32 copy for half precision. For other dtypes .to() returns p itself.
        work = p.to(torch.promote_types(p.dtype, torch.float32))
        state = self.state[p]
        if not state:
            state["step"] = 0
            for name in "exp_avg", "exp_avg_slow", "exp_avg_sq":
                state[name] = torch.zeros_like(work)
        t = state["step"] = int(state["step"]) + 1
        ademamix_update(
            work,
            p.grad.to(work.dtype),
            *(state[name] for name in ("exp_avg", "exp_avg_slow", "exp_avg_sq")),
            *(1 - beta1**t, math.sqrt(1 - beta2**t)),
            *(group["lr"], beta1, beta2, grown_beta3(t, beta1, beta3, group["beta3_warmup"])),
            grown_alpha(t, group["alpha"], group["alpha_warmup"]),
            *(group["eps"], group["weight_decay"]),
        )
        # Half precision is rounded once a step, here.
        if work is not p:
            p.copy_(work)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which casts state to the parameter's dtype; here it keeps full precision.

        What a saved group lacks stays as it is. Raises ValueError for another method's state.
        """

        def complete(_, saved: dict) -> dict:
            groups = [dict(group) for group in saved["param_groups"]]
            states = {}
            for ours, theirs in zip(self.param_groups, groups):
                # What an older version did not save keeps this optimizer's value.
                theirs.update((name, x) for name, x in ours.items() if name not in theirs)
                for i, p in zip(theirs["params"], ours["params"]):
                    state = with_names(saved["state"].get(i, {}))
                    if not state:
                        continue
                    if state.keys() != {"step", "exp_avg", "exp_avg_slow", "exp_avg_sq"}:
                        raise ValueError(
                            f"AdEMAMix: a saved state of {', '.join(state)} is another method's"
                        )
                    # Copies: steps work in place, and must not change the caller's state_dict.
                    dtype = torch.promote_types(p.dtype, torch.float32)
                    states[p] = {
                        name: x.to(p.device, dtype, copy=True) if torch.is_tensor(x) else x
                        for name, x in state.items()
                    }
            # Keyed by the parameter itself, a state escapes torch's cast to the parameter's dtype.
            return saved | {"state": states, "param_groups": groups}

        # Registered last, so that it reads what the caller's own pre-hooks return.
        last = self.register_load_state_dict_pre_hook(complete)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()


if __name__ == "__main__":
    for t in 1, 100, 500, 900, 1000:
        beta3 = grown_beta3(t, 0.9, 0.9999, 1000)
        half_life = math.log(0.5) / math.log(beta3)
        print(f"AdEMAMix: step {t} of 1000: alpha {grown_alpha(t, 8, 1000):.2f}", end=", ")
        print(f"beta3 {beta3:.5f}, a half-life of {half_life:.0f} steps")
