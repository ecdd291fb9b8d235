"""Shampoo: a preconditioner for each dimension of a tensor, made from its second moments there.

    Lᵢ ← β₂·Lᵢ + w·G₍ᵢ₎·G₍ᵢ₎ᵀ            from 0; G₍ᵢ₎ is g with dimension i first, the others
                                         flattened; w = 1−β₂; if β₂ = 1, the paper's plain sum:
                                         w = 1, undivided below
    Pᵢ = (Lᵢ/(1−β₂ᵗ) + ε·I)^e            every `precondition_frequency` steps; e = −1/(2·dims)
    m ← β₁·m + (1−β₁)·g                  m̂ = m / (1 − β₁ᵗ)
    D = m̂ · P₁ · P₂ …                    each Pᵢ over dimension i, at every step; for a matrix
                                         L^−¼·m̂·R^−¼
    D ← D·‖A‖ / (‖D‖ + 1e-16)            grafting: Shampoo's direction, the length of another
                                         method's step A: adam m̂/(√v̂ + 1e-10), rmsprop
                                         m̂/(√v + 1e-10), sgd m̂, where v ← β₂·v + w·g²
    p ← p − lr·(D + λ·p)                 decay joins the step; D = A before the start, for vectors

    p `p`   g `g`   m `exp_avg`   v `exp_avg_sq`   Lᵢ `L_i`   Pᵢ `P_i`   t `step`, from 1
    β `betas`   ε `eps`   λ `weight_decay`   e `exponent`

Gupta, Koren and Singer 2018 (arXiv 1802.09568), which is betas=(0, 1), grafting=None here; averages
and grafting as in Anil et al. 2020 (2002.09018). A tutorial gives the exponent −1/2 for a
matrix: that is a variant (Morwani et al. 2024, 2406.17748; exponent=-0.5), the paper's is −1/4
each. eps: tiny values magnify rounding and learn worse. Dimensions above `max_precond_dim` are left
alone (Pᵢ = I). Vectors are preconditioned only with `precondition_1d`. lr has the grafted method's
unit: with adam, units of weight, as AdamW's. State of an a×b matrix: 8(a² + b²) bytes for L and P,
4ab for m, 4ab for v (adam, rmsprop); doubled for float64. Square: 24 bytes a parameter.
Half-precision parameters keep float32 state.

Used with torch's schedulers (OneCycleLR moves β₁), GradScaler, autocast, compile, DDP and
torch.distributed.checkpoint; with fully_shard by make_optimizer of parallel/sharded_optimizer.py:
DTensors are refused. docs/partners.md has all partners.

Example:
    import torch
    from optim.shampoo import Shampoo
    teacher = torch.randn(16, 32)
    x = torch.randn(256, 32) * torch.logspace(-2, 0, 32)  # features of very different sizes
    final = {}
    for optimizer_class in Shampoo, torch.optim.SGD:
        w = torch.zeros(16, 32, requires_grad=True)
        optimizer = optimizer_class([w], lr=0.03)
        for _ in range(200):
            loss = (x @ (w - teacher).T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        final[optimizer_class] = loss
    assert final[Shampoo] < 0.01 * final[torch.optim.SGD]
"""

import math
from typing import Literal

import torch


def eigh(L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors; by float64 where float32 fails, as for many L of low rank."""
    try:
        eigenvalues, Q = torch.linalg.eigh(L)
    except torch.linalg.LinAlgError:
        eigenvalues = torch.full_like(L[0], torch.nan)
        Q = L
    # LAPACK fails in two ways: it raises, or it returns NaN.
    failed = not (eigenvalues.isfinite().all() and Q.isfinite().all())
    if failed and L.isfinite().all():
        eigenvalues, Q = torch.linalg.eigh(L.double())
    return eigenvalues.to(L.dtype), Q.to(L.dtype)


def matrix_power(L, eps, exponent):
    """(L + eps·I)^exponent of a symmetric L (n, n), whose eigenvalues are ≥ 0 but for rounding."""
    eigenvalues, Q = eigh(L)
    return (Q * (eigenvalues.clamp(min=0) + eps) ** exponent) @ Q.mT


def averaging(beta2, t) -> tuple[float, float]:
    """(weight of a new second moment, what the average is divided by)."""
    # β₂ = 1 is the paper's plain sum.
    if beta2 == 1:
        return 1, 1
    return 1 - beta2, 1 - beta2**t


def precondition_update(g, Ls, Ps, t, beta2, eps, exponent, refresh) -> None:
    """In place on the lists `Ls`, `Ps` of (nᵢ, nᵢ), None for a dimension left alone.

    `refresh`: compute new Ps.
    """
    weight, bias2 = averaging(beta2, t)
    for i, (L, P) in enumerate(zip(Ls, Ps)):
        if L is not None:
            G = g.movedim(i, 0).reshape(g.shape[i], -1)  # (nᵢ, the rest)
            L.mul_(beta2).addmm_(G, G.mT, alpha=weight)
            if refresh:
                P.copy_(matrix_power(L / bias2, eps, exponent))


def shampoo_update(
    p, g, exp_avg, exp_avg_sq, Ps, t, lr, betas, weight_decay, grafting, started
) -> None:
    """In place on `p`, `exp_avg`, `exp_avg_sq` (or None), all shaped as `g`.

    `started`: step along Shampoo's direction; before, and for vectors, along the grafted method's.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(g, 1 - beta1)
    m = exp_avg / (1 - beta1**t)
    A = m
    if exp_avg_sq is not None:
        weight, bias2 = averaging(beta2, t)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=weight)
        # RMSprop divides by √v without bias correction.
        if grafting != "adam":
            bias2 = 1
        A = m / (exp_avg_sq / bias2).sqrt_().add_(1e-10)
    D = A
    if started:
        D = m
        # tensordot puts the new dimension last: after one turn each the order is the old one.
        for P in Ps:
            D = D.movedim(0, -1) if P is None else torch.tensordot(D, P, dims=([0], [0]))
        if grafting is not None:
            D = D * (A.norm() / (D.norm() + 1e-16))
    p.mul_(1 - lr * weight_decay).sub_(D * lr)


class Shampoo(torch.optim.Optimizer):
    """Raises ValueError for bad hyperparameters, RuntimeError for sparse or complex gradients."""

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = False  # needs whole matrices
    zero_init: bool = True  # projections and head may start at 0
    heavy_step: bool = True  # inverse roots, too much for every replica to repeat
    mup_rule: str | None = None  # no rule is known

    @staticmethod
    def state_numbers(
        shape: tuple[int, ...],
        *,
        max_precond_dim: int = 8192,
        precondition_1d: bool = False,
        grafting: Literal["adam", "rmsprop", "sgd"] | None = "adam",
    ) -> int:
        """Numbers of state that a parameter of this shape takes."""
        sides = shape if len(shape) > 1 or precondition_1d else ()
        squares = 2 * sum(d * d for d in sides if d <= max_precond_dim)
        moments = 2 if grafting in ("adam", "rmsprop") else 1
        return squares + moments * math.prod(shape)

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        precondition_frequency: int = 10,
        start_preconditioning_step: int = 1,
        max_precond_dim: int = 8192,
        grafting: str | None = "adam",
        precondition_1d: bool = False,
        exponent: float | None = None,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, exponent=exponent)
        defaults["precondition_frequency"] = precondition_frequency
        defaults["start_preconditioning_step"] = start_preconditioning_step
        defaults["max_precond_dim"] = max_precond_dim
        defaults |= dict(grafting=grafting, precondition_1d=precondition_1d)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        beta1, beta2 = group["betas"]
        for name, x, end in (
            ("lr", group["lr"], "inf"),
            ("eps", group["eps"], "inf"),
            ("betas[0]", beta1, 1),
            ("weight_decay", group["weight_decay"], "inf"),
        ):
            if not 0 <= x < float(end):
                raise ValueError(f"Shampoo: {name}={x} is not allowed; it must lie in [0, {end})")
        if not 0 <= beta2 <= 1:
            raise ValueError(f"Shampoo: betas[1]={beta2} is not allowed; it must lie in [0, 1]")
        for name in "precondition_frequency", "start_preconditioning_step", "max_precond_dim":
            if not group[name] >= 1:
                raise ValueError(
                    f"Shampoo: {name}={group[name]} is not allowed; it must be at least 1"
                )
        if group["grafting"] not in ("adam", "rmsprop", "sgd", None):
            raise ValueError(
                f"Shampoo: grafting={group['grafting']!r}: must be adam, rmsprop, sgd or None"
            )
        super().add_param_group(param_group)
        if any(hasattr(p, "placements") for p in self.param_groups[-1]["params"]):
            # torch has appended the group already: take it back before the error.
            self.param_groups.pop()
            raise ValueError(
                "Shampoo: needs whole tensors and got DTensors; make_optimizer(Shampoo, ...) of "
                "parallel/sharded_optimizer.py brings them together"
            )

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
                    "Shampoo: gradients must be dense and real, not sparse or complex"
                )
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel() > 0:
                    self._step_parameter(group, p)
        return loss

    def _step_parameter(self, group: dict, p: torch.Tensor) -> None:
        # A float32 copy for half precision. For other dtypes .to() returns p itself.
        work = p.to(torch.promote_types(p.dtype, torch.float32))
        g = p.grad.to(work.dtype)
        if not self.state[p]:
            self.state[p].update(self._new_state(work, group))
        state = self.state[p]
        Ls = [state.get(f"L_{i}") for i in range(p.ndim)]
        Ps = [state.get(f"P_{i}") for i in range(p.ndim)]
        t = state["step"] = int(state["step"]) + 1

        # Inverse roots are costly: they are computed at the start, until which P is the identity,
        # and from then on only every precondition_frequency steps.
        start = group["start_preconditioning_step"]
        refresh = t == start or (t > start and t % group["precondition_frequency"] == 0)
        has_preconditioners = p.ndim >= 2 or (p.ndim == 1 and group["precondition_1d"])
        exponent = group["exponent"]
        if exponent is None:
            exponent = -0.5 / max(1, p.ndim)

        # Autocast would compute these products in half precision.
        with torch.autocast(p.device.type, enabled=False):
            precondition_update(g, Ls, Ps, t, group["betas"][1], group["eps"], exponent, refresh)
            moments = state["exp_avg"], state.get("exp_avg_sq")
            options = group["lr"], group["betas"], group["weight_decay"], group["grafting"]
            started = t >= start and has_preconditioners
            shampoo_update(work, g, *moments, Ps, t, *options, started)
        # Half precision is rounded once a step, here.
        if work is not p:
            p.copy_(work)

    @staticmethod
    def _new_state(work, group: dict) -> dict:
        state = {"step": 0, "exp_avg": torch.zeros_like(work)}
        if group["grafting"] in ("adam", "rmsprop"):
            state["exp_avg_sq"] = torch.zeros_like(work)
        sides = work.shape if work.ndim > 1 or group["precondition_1d"] else ()
        for i, n in enumerate(sides):
            if n <= group["max_precond_dim"]:
                state[f"L_{i}"] = work.new_zeros(n, n)
                state[f"P_{i}"] = torch.eye(n, dtype=work.dtype, device=work.device)
        return state

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
                    # On the meta device: only the names are needed, not the n × n matrices.
                    new = self._new_state(torch.empty(p.shape, device="meta"), theirs)
                    if state.keys() != new.keys():
                        raise ValueError(
                            f"Shampoo: a saved state of {', '.join(state)} for {tuple(p.shape)} "
                            f"is another method's, or of other options; here: {', '.join(new)}"
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
    G = torch.randn(6, 4, dtype=torch.float64)
    w = torch.zeros_like(G, requires_grad=True)
    w.grad = G
    Shampoo([w], lr=1, betas=(0, 1), eps=1e-9, grafting=None).step()
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    print(
        "Shampoo: first step of the 2018 form is G's orthogonal factor to"
        f" {(w + U @ Vh).abs().max():.0e}"
    )
    inputs = torch.randn(256, 32) * torch.logspace(-2, 0, 32)  # badly scaled features
    teacher = torch.randn(16, 32)
    for optimizer_class in Shampoo, torch.optim.AdamW:
        w = torch.zeros(16, 32, requires_grad=True)
        optimizer = optimizer_class([w], lr=0.03)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (inputs @ (w - teacher).T).square().mean()
            loss.backward()
            optimizer.step()
        print(
            f"{optimizer_class.__name__}: loss {loss:.0e} after 300 steps on badly scaled features"
        )
