"""PMuon: Muon, after its update is divided by powers of its rows' and columns' covariances.

    b ← μ·b + (1−μ)·g;   u = (1−μ)·g + μ·b     momentum, Nesterov
    for both sides, G = u and G = uᵀ:
        GG ← β·GG + G·Gᵀ
        C = β·GG + G·Gᵀ + ε·tr(GG)/n·I         the newest counts 1 + β times; G has n rows
        Q ← qr(C·Q)                            a step of power iteration; Q starts as I
        P = Q·diag(Qᵀ·C·Q)^−γ·Qᵀ               about C^−γ
    w = P₀·u·P₁                                what is large in every step gets smaller
    p ← p·(1 − lr·λ)                           decoupled decay, before the step
    p ← p − lr·√max(1, rows/cols)·NS(w)        5 steps of Newton–Schulz, as in Muon

    p `p`, g `g`: (rows, cols), a convolution's kernel as (dim 0, the rest)   b `momentum_buffer`
    GG, Q `GG_i`, `Q_i`: (n, n), i = 0 for the rows, 1 for the columns   λ `weight_decay`
    μ `momentum`   β `beta`   γ `gamma`   ε `eps`, of matrices; AdamW groups start from 1e-10

zzp1012 2026-05-07, modded-nanogpt's track 3, pull request 285; no paper. Its 3225 steps reach a
loss for which Muon with the same settings takes 3325. Its page has g in the covariances; its code,
by a step in place, has u, as here. What we changed: ε is a share of the mean eigenvalue (there
1e-6, for gradients summed over 524288 tokens), so that the loss's scale changes nothing, and Q does
not start at random. A matrix costs two QRs a step; with new bases every 10 steps alone it was no
better than Muon. 60 steps of train.py's default job, all at lr .04: 1.801, Muon 1.833, Newton-Muon
(2604.01472) 1.989; that divides by the covariance of a layer's inputs, of which a rank may have a
part only.

lr's unit is Muon's: a step changes a layer's output by about lr (in the spectral norm). The default
is the best of .02, .04, .08 on train.py's default job: 1.308, 1.284, 1.342 (one seed).
State of an a×b matrix: 8(a² + b²) bytes for GG and Q, 4ab for the momentum; in AdamW groups 8 a
parameter; doubled for float64. Square: 20 bytes a parameter.

Embeddings, head and vectors go into groups of the same object that take AdamW:
    PMuon([{"params": matrices}, {"params": others, "use_muon": False, "lr": 3e-4}])
Used with torch's schedulers (OneCycleLR moves momentum, and β₁ in AdamW groups) and fully_shard (by
make_optimizer of parallel/sharded_optimizer.py); all partners: docs/partners.md.

Example:
    import torch
    from optim.pmuon import PMuon
    w = torch.randn(8, 16, requires_grad=True)
    optimizer = PMuon([w], lr=0.1)
    before, w.grad = w.detach().clone(), torch.randn(8, 16)
    optimizer.step()
    step = torch.linalg.svdvals(before - w.detach()) / 0.1
    assert ((0.5 < step) & (step < 1.3)).all()
"""

import math

import torch

NAMES = {"momentum_buffer", "GG_0", "GG_1", "Q_0", "Q_1"}  # of a matrix's state
STACK = 2**22  # numbers of the matrices that are orthogonalised in one batched product


def orthogonalize(us, dtype: torch.dtype) -> torch.Tensor:
    """n matrices (rows, cols) -> (n, rows, cols) of `dtype`, singular values near 1."""
    X = torch.stack([(u / u.norm().clamp(min=1e-7)).to(dtype) for u in us])
    # X·Xᵀ is smallest, (short, short), with the short side first.
    tall = X.shape[1] > X.shape[2]
    X = X.mT if tall else X
    for _ in range(5):
        A = torch.bmm(X, X.mT)
        P = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, P, X, beta=3.4445)
    return X.mT if tall else X


def adam(g, state: dict, betas, eps) -> torch.Tensor:
    """m̂/(√ŝ + ε), shaped as g; `state` keeps the moments and counts the steps."""
    if "step" not in state:
        state.update(step=0, exp_avg=torch.zeros_like(g), exp_avg_sq=torch.zeros_like(g))
    t = state["step"] = int(state["step"]) + 1
    m = state["exp_avg"].lerp_(g, 1 - betas[0])
    s = state["exp_avg_sq"].mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    return (m / (1 - betas[0] ** t)).div_((s / (1 - betas[1] ** t)).sqrt_().add_(eps))


def power(G, GG, Q, beta, gamma, eps) -> torch.Tensor:
    """About C^−γ (n, n) of the rows of G (n, any). In place on GG and Q (n, n)."""
    newest = G @ G.mT
    GG.mul_(beta).add_(newest)
    C = newest.add_(GG, alpha=beta)
    C.diagonal().add_(eps * GG.diagonal().mean() + 1e-30)
    Q.copy_(torch.linalg.qr(C @ Q)[0])
    eigenvalues = (Q * (C @ Q)).sum(0).clamp_(min=1e-30)
    return Q * eigenvalues.pow_(-gamma) @ Q.mT


class PMuon(torch.optim.Optimizer):
    """Raises ValueError for bad values or vectors, RuntimeError for sparse or complex gradients."""

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = False  # needs whole matrices; its AdamW groups alone are elementwise
    matrices_only: bool = True  # everything else belongs in a group with use_muon=False
    zero_init: bool = True  # projections and head may start at 0
    heavy_step: bool = True  # eigenbases, too much for every replica to repeat
    mup_rule: str | None = "muon"  # a step has spectral norm k, at any width

    @staticmethod
    def state_numbers(shape: tuple[int, ...], use_muon: bool = True) -> int:
        """Numbers of state that a parameter of this shape takes."""
        numbers = math.prod(shape)
        sides = (shape[0], numbers // max(1, shape[0]))
        return numbers + sum(2 * n * n for n in sides) if use_muon else 2 * numbers

    def __init__(
        self,
        params,
        lr: float = 0.04,
        momentum: float = 0.95,
        beta: float = 0.95,
        gamma: float = 0.3,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
    ):
        defaults = dict(lr=lr, momentum=momentum, beta=beta, gamma=gamma, eps=eps, use_muon=True)
        # Not named `betas`: where the defaults have those, OneCycleLR moves them, not the momentum.
        super().__init__(params, defaults | {"weight_decay": weight_decay, "adam_betas": betas})

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, "betas": self.defaults["adam_betas"], **param_group}
        if not group["use_muon"]:
            # AdamW's numbers are its own, not the matrices'.
            group |= {"lr": 3e-4, "weight_decay": 0.0, "eps": 1e-10, **param_group}
        ends = dict.fromkeys(("lr", "weight_decay", "eps", "gamma"), "inf")
        ends |= dict.fromkeys(("momentum", "beta"), 1)
        beta1, beta2 = group["betas"]
        betas = {"betas[0]": beta1, "betas[1]": beta2}
        for name, end in (ends | dict.fromkeys(betas, 1)).items():
            x = (group | betas)[name]
            if not 0 <= x < float(end):
                raise ValueError(f"PMuon: {name}={x} is not allowed; it must lie in [0, {end})")
        super().add_param_group(group)
        params = self.param_groups[-1]["params"]
        refused = [p for p in params if p.ndim < 2 or hasattr(p, "placements")]
        if group["use_muon"] and refused:
            # torch has appended the group already: take it back before the error.
            self.param_groups.pop()
            raise ValueError(
                f"PMuon: {type(refused[0]).__name__} {tuple(refused[0].shape)} is no whole matrix; "
                "vectors go into a group with use_muon=False, DTensors to make_optimizer"
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
                raise RuntimeError("PMuon: gradients must be dense and real, not sparse or complex")
        for group in self.param_groups:
            for ps in batches(group):
                # Float32 copies for half precision. For other dtypes .to() returns p itself.
                works = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in ps]
                # Autocast would change the dtypes of the products.
                with torch.autocast(ps[0].device.type, enabled=False):
                    (self._pmuon if group["use_muon"] else self._adamw)(group, ps, works)
        return loss

    def _pmuon(self, group: dict, ps: list, works: list) -> None:
        ws = []
        for p, work in zip(ps, works):
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(work)
                for i, n in enumerate(work.flatten(1).shape):
                    state[f"GG_{i}"] = work.new_zeros(n, n)
                    state[f"Q_{i}"] = torch.eye(n, dtype=work.dtype, device=work.device)
            g = p.grad.to(work.dtype)
            b = state["momentum_buffer"].lerp_(g, 1 - group["momentum"])
            u = g.lerp(b, group["momentum"]).flatten(1)
            options = [group[name] for name in ("beta", "gamma", "eps")]
            left = power(u, state["GG_0"], state["Q_0"], *options)
            right = power(u.mT, state["GG_1"], state["Q_1"], *options)
            ws.append(left @ u @ right)
        X = orthogonalize(ws, torch.float64 if works[0].dtype == torch.float64 else torch.bfloat16)
        k = math.sqrt(max(1, X.shape[1] / X.shape[2]))
        for p, work, x in zip(ps, works, X):
            work.mul_(1 - group["lr"] * group["weight_decay"])
            work.sub_(x.to(work.dtype).view(p.shape), alpha=group["lr"] * k)
            # Half precision is rounded once a step, here.
            if work is not p:
                p.copy_(work)

    def _adamw(self, group: dict, ps: list, works: list) -> None:
        # OneCycleLR moves `momentum`, which means β₁ here. `cycled` is the value that went into
        # betas last, so that betas set by hand stay until the scheduler moves again.
        if "max_momentum" in group and group.get("cycled") != group["momentum"]:
            group["betas"] = (group["momentum"], group["betas"][1])
            group["cycled"] = group["momentum"]
        for p, work in zip(ps, works):
            step = adam(p.grad.to(work.dtype), self.state[p], group["betas"], group["eps"])
            work.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"])
            if work is not p:
                p.copy_(work)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, in full precision; ValueError for another method's state."""

        def complete(_, saved: dict) -> dict:
            groups = [dict(group) for group in saved["param_groups"]]
            states = {}
            for ours, theirs in zip(self.param_groups, groups):
                # What an older version did not save keeps this optimizer's value.
                theirs.update((name, x) for name, x in ours.items() if name not in theirs)
                known = NAMES if theirs["use_muon"] else {"step", "exp_avg", "exp_avg_sq"}
                pairs = zip(theirs["params"], ours["params"])
                for p, state in [
                    (p, dict(saved["state"][i])) for i, p in pairs if saved["state"].get(i)
                ]:
                    if state.keys() != known:
                        raise ValueError(f"PMuon: the state of {', '.join(state)} is another's")
                    # Copies: steps work in place, and must not change the caller's state_dict.
                    dtype = torch.promote_types(p.dtype, torch.float32)
                    for name in state.keys() - {"step"}:
                        state[name] = state[name].to(p.device, dtype, copy=True)
                    states[p] = state
            # Keyed by the parameter itself, a state escapes torch's cast to the parameter's dtype.
            return saved | {"state": states, "param_groups": groups}

        # Registered last, so that it reads what the caller's own pre-hooks return.
        last = self.register_load_state_dict_pre_hook(complete)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()


def batches(group: dict) -> list[list]:
    """What steps together: a few matrices of one shape; with AdamW one tensor at a time."""
    found = {}
    for i, p in enumerate(group["params"]):
        if p.grad is not None and p.numel() > 0:
            sides = (p.shape[0], p[0].numel()) if group["use_muon"] else i
            found.setdefault((sides, p.dtype, p.device), []).append(p)
    ns = [max(1, STACK // ps[0].numel()) for ps in found.values()]
    return [ps[i : i + n] for ps, n in zip(found.values(), ns) for i in range(0, len(ps), n)]


if __name__ == "__main__":
    s = torch.linalg.svdvals(orthogonalize([torch.randn(40, 60)], torch.float32))
    print(f"PMuon: the singular values of a step lie from {s.min():.2f} to {s.max():.2f}")
