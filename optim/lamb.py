"""LAMB: Adam whose step, layer by layer, has the norm of the layer's weights times lr.

    m ← β₁·m + (1−β₁)·g        m̂ = m / (1 − β₁ᵗ)
    v ← β₂·v + (1−β₂)·g²       v̂ = v / (1 − β₂ᵗ)        m̂ = m, v̂ = v without `bias_correction`
    u = m̂ / (√v̂ + ε) + λ·p                             decay is part of the step and of its norm
    r = ‖p‖ / ‖u‖                                      trust ratio; 1 where a norm is 0; not clamped
    p ← p − lr·r·u

    p `p`   g `g`   m `exp_avg`   v `exp_avg_sq`   t `step`, from 1
    β `betas`   ε `eps`   λ `weight_decay`

You et al. 2020 (arXiv 1904.00962). Bias correction divides m and v; implementations that divide lr
by 1−β₁ᵗ instead take ten times the step at t = 1, because r has already cancelled any factor of m.
A tutorial says 3 days for BERT at batch 16K; it was 76 minutes at 32K–64K, and 3 days the
baseline. lr has no unit: every tensor, vectors too, moves by lr times its own norm, so matrices
that start at 0 hardly learn. State: 8 bytes a parameter (16 for float64 parameters). Half-precision
parameters keep float32 m and v.

Used with torch's schedulers (OneCycleLR moves β₁), GradScaler, autocast, compile, DDP and
torch.distributed.checkpoint, and with fully_shard, there best by make_optimizer of
parallel/sharded_optimizer.py. docs/partners.md has all partners.

Example:
    import torch
    from optim.lamb import LAMB
    layer = torch.nn.Linear(8, 8)
    optimizer = LAMB(layer.parameters(), lr=0.01)
    before = layer.weight.detach().clone()
    loss = 1e6 * layer(torch.randn(64, 8)).square().mean()
    loss.backward()
    optimizer.step()
    moved = (layer.weight - before).norm() / before.norm()
    assert abs(moved - 0.01) < 1e-5  # lr, as a share of the weights, for any loss
"""

import math

import torch


def lamb_update(
    p, g, exp_avg, exp_avg_sq, bias1, bias2, lr, beta1, beta2, eps, weight_decay
) -> None:
    """One step, in place on `p`, `exp_avg`, `exp_avg_sq`, all shaped as `g`.

    biasᵢ = 1 − βᵢᵗ, or 1 without bias correction.
    """
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    # `scale` is both bias corrections. u is kept without it: r·u is the same, since r has 1/‖u‖.
    scale = bias2**0.5 / bias1
    u = exp_avg_sq.sqrt().add_(eps * bias2**0.5)
    torch.div(exp_avg, u, out=u).add_(p, alpha=weight_decay / scale)
    p_norm = torch.linalg.vector_norm(p)
    u_norm = torch.linalg.vector_norm(u)
    # A tensor that is 0 has no size to follow: it takes Adam's step.
    ratio = torch.where((p_norm > 0) & (u_norm > 0), p_norm / u_norm, scale)
    p.addcmul_(u, ratio, value=-lr)


class LAMB(torch.optim.Optimizer):
    """Raises ValueError for bad hyperparameters, RuntimeError for sparse or complex gradients."""

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = False  # needs the norm of the whole parameter
    zero_init: bool = False  # a step follows the weights' norm: zeros hardly leave 0
    heavy_step: bool = False  # cheap enough for every replica to repeat
    mup_rule: str | None = None  # no rule: a step follows the weights' size

    @staticmethod
    def state_numbers(shape: tuple[int, ...]) -> int:
        """Numbers of state that a parameter of this shape takes."""
        return 2 * math.prod(shape)

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
            },
        )

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        beta1, beta2 = group["betas"]
        for name, x, end in (
            ("lr", group["lr"], "inf"),
            ("eps", group["eps"], "inf"),
            ("betas[0]", beta1, 1),
            ("betas[1]", beta2, 1),
            ("weight_decay", group["weight_decay"], "inf"),
        ):
            if not 0 <= x < float(end):
                raise ValueError(f"LAMB: {name}={x} is not allowed; it must lie in [0, {end})")
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
                raise RuntimeError("LAMB: gradients must be dense and real, not sparse or complex")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                # A float32 copy for half precision. For other dtypes .to() returns p itself.
                work = p.to(torch.promote_types(p.dtype, torch.float32))
                state = self.state[p]
                if not state:
                    state.update(
                        step=0, exp_avg=torch.zeros_like(work), exp_avg_sq=torch.zeros_like(work)
                    )
                t = state["step"] = int(state["step"]) + 1
                bias1 = bias2 = 1.0
                if group["bias_correction"]:
                    bias1 = 1 - beta1**t
                    bias2 = 1 - beta2**t
                lamb_update(
                    work,
                    p.grad.to(work.dtype),
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    bias1,
                    bias2,
                    group["lr"],
                    beta1,
                    beta2,
                    group["eps"],
                    group["weight_decay"],
                )
                # Half precision is rounded once a step, here.
                if work is not p:
                    p.copy_(work)
        return loss

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
                    state = saved["state"].get(i)
                    if not state:
                        continue
                    if state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                        raise ValueError(
                            f"LAMB: a saved state of {', '.join(state)} is another method's"
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
    torch.manual_seed(0)
    w = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    before = w.detach().clone()
    w.grad = 1e6 * torch.randn_like(w)
    LAMB([w], lr=0.01).step()
    fraction = (w - before).norm() / before.norm()
    print(
        f"LAMB: at lr 0.01 the first step is {fraction:.6f} of the weights, whatever the gradient's"
        " size"
    )
    inputs = torch.randn(256, 32)
    teacher = torch.randn(16, 32)
    w = torch.randn(16, 32, requires_grad=True)
    optimizer = LAMB([w], weight_decay=0)
    for t in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - t / 300)
        optimizer.zero_grad()
        loss = (inputs @ (w - teacher).T).square().mean()
        loss.backward()
        optimizer.step()
    print(f"LAMB: a linear layer learns its teacher, loss {loss:.0e} after 300 steps")
