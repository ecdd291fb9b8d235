"""SOAP-Muon: momentum is whitened in SOAP's basis, then orthogonalised as in Muon.

    m ← μ·m + (1−μ)·g;   u = (1−μ)·g + μ·m            Nesterov momentum
    from the second call on, with the Qᵢ of the gradients before this one:
        u′ = Q₁ᵀ·u·Q₂;   v ← β·v + (1−β)·u′²          v of the momentum, not of g as in SOAP
        w = Q₁·(u′/max(√v, ε))·Q₂ᵀ;   u ← u + gate·(w·‖u‖₄/‖w‖₄ − u)
    X ← u/‖u‖₄;  ns_steps times (Newton–Schulz)  A = X·Xᵀ;  X ← a·X + (b·A + c·A²)·X
    p ← p·(1 − lr·λ) − lr·√max(1, rows/cols)·X        decoupled decay, before the step
    GG₁ ← β·GG₁ + (1−β)·g·gᵀ;  GG₂ ← β·GG₂ + (1−β)·gᵀ·g
    in the first call Qᵢ = eigenvectors of GGᵢ; then every `precondition_frequency` calls:
        sort Qᵢ's columns by diag(QᵢᵀGGᵢQᵢ), largest first, and v alike;  Qᵢ ← qr(GGᵢ·Qᵢ)
    gate = x·y, brought into [floor, cap] = `trust_gate`; (1, 1) is always w. x rises from 0 to 1
    where cos(w, u) goes from .2 to 1;  y = cos(w, g)/cos(u, g) in [0, 1]: is w as much downhill?

    p `p`, g `g`: (rows, cols), a convolution's kernel as (dim 0, the rest)   μ `momentum`
    m `momentum_buffer`   v `exp_avg_sq`   GG₁ `GG_0`   Q₁ `Q_0`   β `shampoo_beta`
    ε `eps`   λ `weight_decay`   (a, b, c) `ns_coefficients`, in `ns_dtype`; None: bfloat16, or
    float64 for float64 parameters   ‖x‖₄ = (Σ s⁴)^¼ of the singular values s

Vyas (nikhilvyas.github.io/SOAP_Muon.pdf), in the form of modded-nanogpt's track 3, rows 14 and 16
(the gate; May 2026), 44 to 46 (June). Row 46: lr .0375, frequency 1, (2, −1.5, .5) in 12 steps; the
gate for attention's output alone, (.45, .85) to step 1375 of 2900, the floor falling to 0 at 1625,
then (0, 1). v's scale drops out: it needs no correction. lr's unit is Muon's: a step changes a
layer's output by about lr; on the default job .04 is best of .01, .02, .04. A step magnifies
rounding, as SOAP's. State of an a×b matrix: 8(a² + b²) bytes for GG and Q, 8ab for m and v; 8 a
parameter in AdamW groups, of embeddings, head, vectors (`betas`; `eps` in both); twice in float64.
Used with schedulers (OneCycleLR moves momentum, β₁ of AdamW): docs/partners.md.

Example:
    import torch
    from optim.soap_muon import SOAPMuon
    w, bias = torch.zeros(8, 32, requires_grad=True), torch.zeros(8, requires_grad=True)
    optimizer = SOAPMuon([{"params": [w]}, {"params": [bias], "use_muon": False}], lr=1.0)
    w.grad = torch.randn(8, 32)
    optimizer.step()
    assert ((torch.linalg.svdvals(w.detach()) - 1).abs() < 0.4).all()
"""

import math

import torch


def norm4(x: torch.Tensor) -> torch.Tensor:
    """(Σ s⁴)^¼ of the singular values s of x, by way of x/‖x‖, lest x⁴ vanish."""
    size = x.norm().clamp(min=1e-30)
    x = (x.mT if x.shape[0] > x.shape[1] else x) / size
    return (x @ x.mT).norm().sqrt().clamp(min=1e-7) * size


def orthogonalize(u, coefficients, ns_steps, dtype) -> torch.Tensor:
    """(rows, cols) -> the same in `dtype`, with singular values near 1."""
    a, b, c = coefficients
    X = (u / u.norm().clamp(min=1e-30)).to(dtype)
    X = X.mT if u.shape[0] > u.shape[1] else X  # X·Xᵀ is smallest with the short side first
    for i in range(ns_steps):
        A = X @ X.mT
        if i == 0:  # A gives ‖X‖₄ for nothing
            size = A.to(u.dtype).norm().sqrt().clamp(min=1e-7).to(dtype)
            X, A = X / size, A / size.square()
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if u.shape[0] > u.shape[1] else X


def whiten(u, exp_avg_sq, Qs, beta, eps) -> torch.Tensor:
    """w of u, both (rows, cols). Updates v, `exp_avg_sq`."""
    rotated = Qs[0].mT @ u @ Qs[1]
    exp_avg_sq.mul_(beta).addcmul_(rotated, rotated, value=1 - beta)
    return Qs[0] @ (rotated / exp_avg_sq.sqrt().clamp_(min=max(eps, 1e-30))) @ Qs[1].mT


def blend(u, w, g, floor, cap) -> torch.Tensor:
    """Between u (where the gate is 0) and w, brought to u's norm (1); all (rows, cols)."""
    pairs = (w, u), (w, g), (u, g)
    wu, wg, ug = ((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-30) for x, y in pairs)
    gate = ((wu - 0.2) / 0.8).clamp(0, 1) * (wg / ug.clamp(min=1e-8)).clamp(0, 1)
    return torch.lerp(u, w * (norm4(u) / norm4(w)), gate.clamp(floor, cap))


def basis_update(g, exp_avg_sq, GGs, Qs, beta, t, frequency) -> None:
    """GG takes up g (rows, cols); Q is made, or moves by a power iteration, and v with it."""
    for i, (GG, Q, G) in enumerate(zip(GGs, Qs, (g, g.mT))):
        GG.addmm_(G, G.mT, beta=beta, alpha=1 - beta)
        if t == 1:
            # LAPACK fails on low ranks in float32, and on an infinity, with which all is lost.
            Q.copy_(torch.linalg.eigh(GG.double().where(GG.isfinite().all(), 0))[1].flip(1))
        elif (t - 1) % frequency == 0:
            product = GG @ Q
            order = (Q * product).sum(0).argsort(descending=True)  # diag(QᵀGGQ)
            exp_avg_sq.copy_(exp_avg_sq.index_select(i, order))
            Q.copy_(torch.linalg.qr(product.mT[order].mT)[0])  # columns as LAPACK wants them


def check(group: dict) -> None:
    """Raises ValueError for a hyperparameter that is not allowed."""
    dtype = getattr(torch, group["ns_dtype"] or "float32", None)
    rules = {
        "in [0, inf)": (("lr", "weight_decay", "eps"), lambda x: 0 <= x < math.inf),
        "in [0, 1)": (("momentum", "shampoo_beta"), lambda x: 0 <= x < 1),
        "two in [0, 1)": (
            ("betas", "adamw_betas"),
            lambda x: len(x) == 2 and all(0 <= y < 1 for y in x),
        ),
        "0 ≤ floor ≤ cap ≤ 1": (("trust_gate",), lambda x: len(x) == 2 and 0 <= x[0] <= x[1] <= 1),
        "three numbers": (("ns_coefficients",), lambda x: len(x) == 3),
        "1 or more": (("precondition_frequency", "ns_steps"), lambda x: x >= 1),
        "a floating dtype": (("ns_dtype",), lambda _: getattr(dtype, "is_floating_point", False)),
    }
    for allowed, (names, ok) in rules.items():
        for wrong in (f"{x}={group[x]}" for x in names if x in group and not ok(group[x])):
            raise ValueError(f"SOAPMuon: {wrong} is not allowed; {allowed} is")


class SOAPMuon(torch.optim.Optimizer):
    """ValueError: bad hyperparameters, vectors as matrices; RuntimeError: sparse, complex grads."""

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = False  # needs full matrices; its AdamW groups alone are elementwise
    matrices_only: bool = True  # everything else belongs in a group with use_muon=False
    zero_init: bool = True  # projections and head may start at 0
    heavy_step: bool = True  # Newton-Schulz and eigenbases, too much for every replica
    mup_rule: str | None = "muon"  # a step has one spectral norm, at any width

    @staticmethod
    def state_numbers(shape: tuple[int, ...], use_muon: bool = True) -> int:
        """Numbers of state that a parameter of this shape takes."""
        squares = shape[0] ** 2 + math.prod(shape[1:]) ** 2 if use_muon else 0
        return 2 * squares + 2 * math.prod(shape)

    def __init__(
        self,
        params,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        shampoo_beta: float = 0.9,
        precondition_frequency: int = 10,
        trust_gate: tuple[float, float] = (1.0, 1.0),
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_dtype: torch.dtype | str | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust_gate=trust_gate)
        defaults |= dict(shampoo_beta=shampoo_beta, precondition_frequency=precondition_frequency)
        defaults |= dict(ns_steps=ns_steps, ns_coefficients=ns_coefficients, ns_dtype=ns_dtype)
        # Not named `betas`: where the defaults have those, OneCycleLR leaves momentum alone.
        super().__init__(params, defaults | dict(use_muon=True, adamw_betas=betas, eps=eps))

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        if not group["use_muon"]:
            adamw = {"lr": 3e-4, "weight_decay": 0.0, "betas": self.defaults["adamw_betas"]}
            group |= adamw | param_group
        if group["ns_dtype"] is not None:  # as text, because a checkpoint cannot hold a dtype
            group["ns_dtype"] = str(group["ns_dtype"]).removeprefix("torch.")
        check(group)
        super().add_param_group(group)
        refused = any(p.ndim < 2 or hasattr(p, "placements") for p in group["params"])
        if group["use_muon"] and refused:
            # torch has appended the group already: take it back before the error.
            self.param_groups.pop()
            raise ValueError("SOAPMuon: vectors need use_muon=False, DTensors make_optimizer")

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        active = [(group, p) for group, p in pairs if p.grad is not None and p.numel() > 0]
        # Check every gradient first: an error must not leave half of the parameters stepped.
        if any(p.grad.layout != torch.strided or p.is_complex() for _, p in active):
            raise RuntimeError("SOAPMuon: gradients must be dense and real, not sparse or complex")
        for group, p in active:
            # A float32 copy for half precision. For other dtypes .to() returns p itself.
            work = p.to(torch.promote_types(p.dtype, torch.float32))
            if not self.state[p]:
                self.state[p].update(self._new_state(work, group))
            step_one = self._matrix if group["use_muon"] else self._adamw
            # Autocast would compute these products in half precision.
            with torch.autocast(p.device.type, enabled=False):
                step_one(group, self.state[p], work, p.grad.to(work.dtype))
            p.copy_(work)  # half precision is rounded once a step, here; else nothing happens
        return loss

    def _matrix(self, group: dict, state: dict, work, g) -> None:
        t = state["step"] = int(state["step"]) + 1
        m, v, beta = state["momentum_buffer"], state["exp_avg_sq"], group["shampoo_beta"]
        GGs, Qs = ([state[f"{x}_{i}"] for i in range(2)] for x in ("GG", "Q"))
        m.lerp_(g, 1 - group["momentum"])
        u, g = g.lerp(m, group["momentum"]).flatten(1), g.flatten(1)
        if t > 1:
            w, gate = whiten(u, v, Qs, beta, group["eps"]), group["trust_gate"]
            u = blend(u, w, g, *gate) if gate[0] < 1 else w
        dtype = group["ns_dtype"] or ("float64" if work.dtype == torch.float64 else "bfloat16")
        X = orthogonalize(u, group["ns_coefficients"], group["ns_steps"], getattr(torch, dtype))
        k, X = math.sqrt(max(1, X.shape[0] / X.shape[1])), X.to(work.dtype).reshape(work.shape)
        work.mul_(1 - group["lr"] * group["weight_decay"]).sub_(X, alpha=group["lr"] * k)
        basis_update(g, v, GGs, Qs, beta, t, group["precondition_frequency"])

    def _adamw(self, group: dict, state: dict, work, g) -> None:
        # OneCycleLR's `momentum` is β₁ here; betas set by hand stay until it moves again.
        if "max_momentum" in group and group.get("cycled") != group["momentum"]:
            group.update(betas=(group["momentum"], group["betas"][1]), cycled=group["momentum"])
        t = state["step"] = int(state["step"]) + 1
        m, v, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], group["betas"]
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
        work.mul_(1 - group["lr"] * group["weight_decay"])
        work.addcdiv_(m, root, value=-group["lr"] / (1 - beta1**t))

    @staticmethod
    def _new_state(work, group: dict) -> dict:
        if not group["use_muon"]:
            return {"step": 0} | {x: torch.zeros_like(work) for x in ("exp_avg", "exp_avg_sq")}
        sides = work.shape[0], math.prod(work.shape[1:])
        state = {f"{x}_{i}": work.new_zeros(n, n) for i, n in enumerate(sides) for x in ("GG", "Q")}
        moments = {"momentum_buffer": torch.zeros_like(work), "exp_avg_sq": work.new_zeros(sides)}
        return {"step": 0} | moments | state

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but in full precision. Raises ValueError for another method's state."""

        def complete(_, saved: dict) -> dict:
            groups, states = [dict(group) for group in saved["param_groups"]], {}
            for ours, theirs in zip(self.param_groups, groups):
                # What an older version did not save keeps this optimizer's value.
                theirs.update((name, x) for name, x in ours.items() if name not in theirs)
                for i, p in zip(theirs["params"], ours["params"]):
                    state = saved["state"].get(i, {})
                    new = self._new_state(torch.empty(p.shape, device="meta"), theirs)
                    if state and state.keys() != new.keys():
                        raise ValueError(f"SOAPMuon: a state of {[*state]} is another method's")
                    # Copies: steps work in place, and must not change the caller's state_dict.
                    dtype = torch.promote_types(p.dtype, torch.float32)
                    for name, x in state.items():
                        x = x.to(p.device, dtype, copy=True) if torch.is_tensor(x) else x
                        states.setdefault(p, {})[name] = x
            # Keyed by the parameter itself, a state escapes torch's cast to the parameter's dtype.
            return saved | {"state": states, "param_groups": groups}

        # Registered last, so that it reads what the caller's own pre-hooks return.
        last = self.register_load_state_dict_pre_hook(complete)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()


if __name__ == "__main__":
    X = orthogonalize(torch.randn(8, 32), (3.4445, -4.7750, 2.0315), 5, torch.float32)
    print("SOAPMuon: a step's singular values:", torch.linalg.svdvals(X).tolist())
