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
and grafting as in Anil et al. 2020 (2002.09018). A common text gives the exponent −1/2 for a
matrix: that is a variant (Morwani et al. 2024, 2406.17748; exponent=-0.5), the paper's is −1/4
each. eps: tiny values magnify rounding and learn worse. Dimensions above `max_precond_dim` are left
alone (Pᵢ = I). Vectors are preconditioned only with `precondition_1d`. lr's unit is that of the
grafted method: with adam, in units of weight as AdamW's. State of an a×b matrix: 8(a² + b²) bytes
for L and P, 4ab for m, 4ab for v (adam, rmsprop); doubled for float64. Square: 24 bytes a
parameter. Half-precision parameters keep float32 state.

Used with torch's schedulers (OneCycleLR moves β₁), GradScaler, autocast, compile, DDP and
torch.distributed.checkpoint; with fully_shard by make_optimizer of parallel/sharded_optimizer.py:
DTensors are refused. docs/partners.md has all partners.
"""

import math
from typing import Literal

import torch


def eigh(L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors; in float64 where LAPACK's float32 fails, as for many L of low
    rank."""
    try:
        eigenvalues, Q = torch.linalg.eigh(L)
    except torch.linalg.LinAlgError:
        eigenvalues, Q = torch.full_like(L[0], torch.nan), L
    if not (eigenvalues.isfinite().all() and Q.isfinite().all()) and L.isfinite().all():
        eigenvalues, Q = torch.linalg.eigh(L.double())
    return eigenvalues.to(L.dtype), Q.to(L.dtype)


def matrix_power(L, eps, exponent):
    """(L + eps·I)^exponent for a symmetric L: (n, n) without negative eigenvalues but for
    rounding's."""
    eigenvalues, Q = eigh(L)
    return (Q * (eigenvalues.clamp(min=0) + eps) ** exponent) @ Q.mT


def shampoo_update(
    p,
    g,
    exp_avg,
    exp_avg_sq,
    Ls,
    Ps,
    t,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    exponent,
    refresh,
    started,
    grafting,
) -> None:
    """In place on `p`, `exp_avg`, `exp_avg_sq` (or None), shaped as `g`, and on the lists `Ls`,
    `Ps` of (nᵢ, nᵢ), None for a dimension that is not preconditioned. `refresh`: new Ps; `started`:
    use them.
    """
    w, bias2 = (1, 1) if beta2 == 1 else (1 - beta2, 1 - beta2**t)
    for i, (L, P) in enumerate(zip(Ls, Ps)):
        if L is not None:
            G = g.movedim(i, 0).reshape(g.shape[i], -1)  # (nᵢ, the rest)
            L.mul_(beta2).addmm_(G, G.mT, alpha=w)
            if refresh:
                P.copy_(matrix_power(L / bias2, eps, exponent))
    exp_avg.lerp_(g, 1 - beta1)
    m = exp_avg / (1 - beta1**t)
    A = m
    if exp_avg_sq is not None:
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=w)
        A = m / (exp_avg_sq / (bias2 if grafting == "adam" else 1)).sqrt_().add_(1e-10)
    D = A
    if started:
        D = m
        # Contract the first dimension, put it last: after all of them the order is the old one
        for P in Ps:
            D = D.movedim(0, -1) if P is None else torch.tensordot(D, P, dims=([0], [0]))
        if grafting is not None:
            D = D * (A.norm() / (D.norm() + 1e-16))
    p.mul_(1 - lr * weight_decay).sub_(D * lr)


class Shampoo(torch.optim.Optimizer):
    """Raises ValueError for hyperparameters out of range, RuntimeError for sparse or complex
    gradients."""

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
        return squares + math.prod(shape) * (2 if grafting in ("adam", "rmsprop") else 1)

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
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "exponent": exponent,
                "precondition_frequency": precondition_frequency,
                "start_preconditioning_step": start_preconditioning_step,
                "max_precond_dim": max_precond_dim,
                "grafting": grafting,
                "precondition_1d": precondition_1d,
            },
        )

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
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if p.grad.layout != torch.strided or p.is_complex():  # before anything has moved
                raise RuntimeError(
                    "Shampoo: gradients must be dense and real, not sparse or complex"
                )
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None or p.numel() == 0:
                    continue
                # P itself, unless half precision
                work = p.to(torch.promote_types(p.dtype, torch.float32))
                if not self.state[p]:
                    self.state[p].update(self._new_state(work, group))
                state = self.state[p]
                Ls, Ps = ([state.get(f"{name}_{i}") for i in range(p.ndim)] for name in "LP")
                t = state["step"] = int(state["step"]) + 1
                start, exponent = group["start_preconditioning_step"], group["exponent"]
                with torch.autocast(p.device.type, enabled=False):  # products as everywhere else
                    shampoo_update(
                        work,
                        p.grad.to(work.dtype),
                        state["exp_avg"],
                        state.get("exp_avg_sq"),
                        Ls,
                        Ps,
                        t,
                        group["lr"],
                        beta1,
                        beta2,
                        group["eps"],
                        group["weight_decay"],
                        exponent=-0.5 / max(1, p.ndim) if exponent is None else exponent,
                        refresh=t == start
                        or t > start
                        and t % group["precondition_frequency"] == 0,
                        started=t >= start
                        and (p.ndim >= 2 or p.ndim == 1 and group["precondition_1d"]),
                        grafting=group["grafting"],
                    )
                if work is not p:
                    p.copy_(work)  # the one rounding
        return loss

    @staticmethod
    def _new_state(work, group: dict) -> dict:
        state = {"step": 0, "exp_avg": torch.zeros_like(work)}
        if group["grafting"] in ("adam", "rmsprop"):
            state["exp_avg_sq"] = torch.zeros_like(work)
        for i, n in enumerate(work.shape if work.ndim > 1 or group["precondition_1d"] else ()):
            if n <= group["max_precond_dim"]:
                state[f"L_{i}"] = work.new_zeros(n, n)
                state[f"P_{i}"] = torch.eye(n, dtype=work.dtype, device=work.device)
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """torch's own casts state to the parameter's dtype; here it keeps full precision. What a
        saved group does not say stays as it is here. Raises ValueError for the state of another
        method."""

        def complete(_, saved: dict) -> dict:  # runs after the pre-hooks of others
            groups, states = [dict(group) for group in saved["param_groups"]], {}
            for ours, theirs in zip(self.param_groups, groups):
                theirs.update((name, x) for name, x in ours.items() if name not in theirs)
                for i, p in zip(theirs["params"], ours["params"]):
                    if not (state := saved["state"].get(i)):
                        continue
                    new = self._new_state(torch.empty(p.shape, device="meta"), theirs)
                    if state.keys() != new.keys():
                        raise ValueError(
                            f"Shampoo: a saved state of {', '.join(state)} for {tuple(p.shape)} "
                            f"is another method's, or of other options; here: {', '.join(new)}"
                        )
                    dtype = torch.promote_types(p.dtype, torch.float32)
                    states[p] = {
                        name: x.to(p.device, dtype, copy=True) if torch.is_tensor(x) else x
                        for name, x in state.items()
                    }
            return saved | {"state": states, "param_groups": groups}  # keyed so, torch casts none

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
