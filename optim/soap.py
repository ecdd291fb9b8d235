"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

first call   GGᵢ = (1−β_s)·G₍ᵢ₎·G₍ᵢ₎ᵀ,  Qᵢ = its eigenvectors, largest eigenvalue first
             no update, t stays 0
each later   t ← t + 1
    g′ = g rotated by every Qᵢ             Q₁ᵀ·g·Q₂ for a matrix
    m′ ← β₁·m′ + (1−β₁)·g′                 Adam, all in the rotated basis
    v  ← β₂·v + (1−β₂)·g′²
    u  = m′/(√v + ε) rotated back          u ← u / (1e-30 + RMS(u)) with `normalize_grads`
    p  ← p − lr·√(1−β₂ᵗ)/(1−β₁ᵗ)·u         ε is not bias-corrected; without `correct_bias` p − lr·u
    p  ← p·(1 − lr·λ)                      decoupled decay, after the step
    GGᵢ ← β_s·GGᵢ + (1−β_s)·G₍ᵢ₎·G₍ᵢ₎ᵀ     then, if t % frequency = 0, one step of power iteration:
    sort Qᵢ's columns by diag(QᵢᵀGGᵢQᵢ), largest first, and v alike;  Qᵢ ← qr(GGᵢ·Qᵢ);  m′ follows

    p `p`   g `g`   G₍ᵢ₎ g with dimension i first, the others flattened
    m′ `exp_avg`   v `exp_avg_sq`   t `step`   GGᵢ `GG_i`   Qᵢ `Q_i`   β `betas`   ε `eps`
    β_s `shampoo_beta`, None = β₂   λ `weight_decay`   frequency `precondition_frequency`

Vyas et al. 2024 (arXiv 2409.11321). A tutorial names it otherwise, promises 2–3 times the speed
and twice Adam's memory: the paper reports over 40 % fewer steps than AdamW, and a square matrix
takes three times Adam's state. Dimensions above `max_precond_dim` are not rotated, nor vectors
(unless `precondition_1d`): Adam, a first call later. lr is in units of (rotated) weight, as
AdamW's. A step magnifies rounding: two layouts drift apart though both are right. State of an a×b
matrix: 8(a² + b²) bytes for GG and Q, 8ab for m′ and v; doubled for float64. Square: 24 bytes a
parameter. Half-precision parameters keep float32 state.

Used with torch's schedulers (OneCycleLR moves β₁), GradScaler, autocast, compile, DDP and
torch.distributed.checkpoint; with fully_shard by make_optimizer of parallel/sharded_optimizer.py:
DTensors are refused. States of the authors' SOAP load; merge_dims is refused. docs/partners.md has
all partners.

Example:
    import torch
    from optim.soap import SOAP
    teacher = torch.randn(16, 32)
    rotation = torch.linalg.qr(torch.randn(32, 32))[0]
    x = torch.randn(256, 32) * torch.logspace(-2, 0, 32) @ rotation  # badly scaled, not by axis
    final = {}
    for optimizer_class in SOAP, torch.optim.AdamW:
        w = torch.zeros(16, 32, requires_grad=True)
        optimizer = optimizer_class([w], lr=0.03, weight_decay=0)
        for _ in range(300):
            loss = (x @ (w - teacher).T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        final[optimizer_class] = loss
    assert final[SOAP] < 0.1 * final[torch.optim.AdamW]
"""

import math

import torch

PANEL = 128  # reflections that householder_qr applies at once
HALVED = 256  # columns of a symmetric product that are computed at once


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


def householder_qr(Y: torch.Tensor) -> torch.Tensor:
    """Q (n, n) of Y = Q·R, as torch.linalg.qr, whose time goes into making Q of its reflections."""
    n = len(Y)
    if n <= 2 * PANEL:
        return torch.linalg.qr(Y)[0]
    reflections, taus = torch.geqrf(Y)
    Q = torch.eye(n, dtype=Y.dtype, device=Y.device)
    # Column by column v, Q ← (I − τ·v·vᵀ)·Q, the last one first. A panel of them at once is
    # I − V·T·Vᵀ, where T⁻¹ has 1/τ on its diagonal and VᵀV above (Puglisi 1992).
    for i in reversed(range(0, n, PANEL)):
        V = reflections[i:, i : i + PANEL].tril(-1)
        V.diagonal().fill_(1)
        # τ = 0 is no reflection, and 1/τ so large that T is 0.
        inverse = (V.mT @ V).triu(1) + (1 / taus[i : i + PANEL].clamp(min=1e-30)).diag()
        TV = torch.linalg.solve_triangular(inverse, V.mT, upper=True)  # T·Vᵀ
        Q[i:, i:].addmm_(V, TV @ Q[i:, i:], alpha=-1)
    return Q


def rotate(x, Qs, back=False):
    """Every dimension i of `x` by Qᵢᵀ (`back`: Qᵢ); None leaves a dimension alone."""
    for i, Q in enumerate(Qs):
        if Q is None:
            continue
        if back:
            Q = Q.mT
        if i == x.ndim - 1:
            x = x @ Q
        else:
            x = (Q.mT @ x.flatten(i + 1)).view(x.shape)
    return x


def accumulate(g, GGs, shampoo_beta) -> None:
    """GGᵢ ← β_s·GGᵢ + (1−β_s)·G₍ᵢ₎·G₍ᵢ₎ᵀ, in place."""
    for i, GG in enumerate(GGs):
        if GG is not None:
            G = g.movedim(i, 0).reshape(g.shape[i], -1)  # (nᵢ, the rest)
            # A CPU is bound by its multiplications: only what lies below the diagonal, mirrored.
            width = HALVED if GG.device.type == "cpu" and len(GG) >= 3 * HALVED else len(GG)
            for j in range(0, len(GG), width):
                k = j + width
                GG[j:, j:k].addmm_(G[j:], G[j:k].mT, beta=shampoo_beta, alpha=1 - shampoo_beta)
                GG[j:k, k:] = GG[k:, j:k].mT


def soap_start(g, GGs, Qs, shampoo_beta) -> None:
    """The first call fills the lists `GGs` and `Qs` of (nᵢ, nᵢ); None: a dimension left alone."""
    accumulate(g, GGs, shampoo_beta)
    for GG, Q in zip(GGs, Qs):
        if GG is not None:
            # eigh puts the smallest eigenvalue first; the order of columns here is largest first.
            Q.copy_(eigh(GG)[1].flip(1))


def soap_update(
    p, g, exp_avg, exp_avg_sq, Qs, t, lr, betas, eps, weight_decay, normalize_grads, correct_bias
) -> None:
    """Adam in the basis `Qs`: in place on `p`, `exp_avg`, `exp_avg_sq`, all shaped as `g`."""
    beta1, beta2 = betas
    rotated = rotate(g, Qs)
    exp_avg.lerp_(rotated, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
    u = rotate(exp_avg / exp_avg_sq.sqrt().add_(eps), Qs, back=True)
    if normalize_grads:
        u = u / (1e-30 + u.square().mean().sqrt())
    step_size = lr
    if correct_bias:
        step_size = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
    p.sub_(u, alpha=step_size)
    p.mul_(1 - lr * weight_decay)


def basis_update(exp_avg, exp_avg_sq, GGs, Qs) -> None:
    """One step of power iteration, in place on `Qs`; the moments move into the new basis."""
    momentum = rotate(exp_avg, Qs, back=True)
    for i, (GG, Q) in enumerate(zip(GGs, Qs)):
        if GG is not None:
            # v has no exact rotation; it follows the order of the columns alone.
            product = GG @ Q
            order = (Q * product).sum(0).argsort(descending=True)  # diag(QᵀGGQ)
            exp_avg_sq.copy_(exp_avg_sq.index_select(i, order))
            # Sorted as rows of the transpose, the columns lie in LAPACK's order.
            Q.copy_(householder_qr(product.mT[order].mT))
    exp_avg.copy_(rotate(momentum, Qs))


def with_names(state: dict) -> dict:
    """A state of the authors' SOAP as ours: its `GG` and `Q` are lists, [] where not rotated."""
    if "GG" not in state:
        return state
    named = {name: state[name] for name in ("step", "exp_avg", "exp_avg_sq")}
    for name in "GG", "Q":
        for i, x in enumerate(state[name]):
            if len(x):
                named[f"{name}_{i}"] = x
    return named


class SOAP(torch.optim.Optimizer):
    """Raises ValueError for bad hyperparameters, RuntimeError for sparse or complex gradients."""

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = False  # needs whole matrices
    zero_init: bool = True  # projections and head may start at 0
    heavy_step: bool = True  # eigenbases, too much for every replica to repeat
    mup_rule: str | None = "soap"  # entries of a rotated step have one size, and random signs

    @staticmethod
    def state_numbers(
        shape: tuple[int, ...], *, max_precond_dim: int = 10000, precondition_1d: bool = False
    ) -> int:
        """Numbers of state that a parameter of this shape takes."""
        sides = shape if len(shape) > 1 or precondition_1d else ()
        squares = 2 * sum(d * d for d in sides if d <= max_precond_dim)
        return squares + 2 * math.prod(shape)

    def __init__(
        self,
        params,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
    ):
        defaults = dict(lr=lr, betas=betas, shampoo_beta=shampoo_beta, eps=eps)
        defaults |= dict(weight_decay=weight_decay, precondition_frequency=precondition_frequency)
        defaults |= dict(max_precond_dim=max_precond_dim, precondition_1d=precondition_1d)
        defaults |= dict(normalize_grads=normalize_grads, correct_bias=correct_bias)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        beta1, beta2 = group["betas"]
        for name, x, end in (
            ("lr", group["lr"], "inf"),
            ("eps", group["eps"], "inf"),
            ("betas[0]", beta1, 1),
            ("betas[1]", beta2, 1),
            ("shampoo_beta", group["shampoo_beta"] or 0, 1),
            ("weight_decay", group["weight_decay"], "inf"),
        ):
            if not 0 <= x < float(end):
                raise ValueError(f"SOAP: {name}={x} is not allowed; it must lie in [0, {end})")
        for name in "precondition_frequency", "max_precond_dim":
            if not group[name] >= 1:
                raise ValueError(
                    f"SOAP: {name}={group[name]} is not allowed; it must be at least 1"
                )
        super().add_param_group(param_group)
        if any(hasattr(p, "placements") for p in self.param_groups[-1]["params"]):
            # torch has appended the group already: take it back before the error.
            self.param_groups.pop()
            raise ValueError(
                "SOAP: needs whole tensors and got DTensors; make_optimizer(SOAP, ...) of "
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
                raise RuntimeError("SOAP: gradients must be dense and real, not sparse or complex")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel() > 0:
                    # Autocast would compute these products in half precision.
                    with torch.autocast(p.device.type, enabled=False):
                        self._step_parameter(group, p)
        return loss

    def _step_parameter(self, group: dict, p: torch.Tensor) -> None:
        # A float32 copy for half precision. For other dtypes .to() returns p itself.
        work = p.to(torch.promote_types(p.dtype, torch.float32))
        g = p.grad.to(work.dtype)
        shampoo_beta = group["shampoo_beta"]
        if shampoo_beta is None:
            shampoo_beta = group["betas"][1]
        state = self.state[p]
        is_first = not state
        if is_first:
            state.update(self._new_state(work, group))
        GGs = [state.get(f"GG_{i}") for i in range(p.ndim)]
        Qs = [state.get(f"Q_{i}") for i in range(p.ndim)]
        # As in the authors' code: no gradient is rotated by a basis that was made from itself.
        if is_first:
            soap_start(g, GGs, Qs, shampoo_beta)
            return
        t = state["step"] = int(state["step"]) + 1
        moments = state["exp_avg"], state["exp_avg_sq"]
        options = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        variants = group["normalize_grads"], group["correct_bias"]
        soap_update(work, g, *moments, Qs, t, *options, *variants)
        accumulate(g, GGs, shampoo_beta)
        if t % group["precondition_frequency"] == 0:
            basis_update(*moments, GGs, Qs)
        # Half precision is rounded once a step, here.
        if work is not p:
            p.copy_(work)

    @staticmethod
    def _new_state(work, group: dict) -> dict:
        state = {"step": 0, "exp_avg": torch.zeros_like(work), "exp_avg_sq": torch.zeros_like(work)}
        sides = work.shape if work.ndim > 1 or group["precondition_1d"] else ()
        for i, n in enumerate(sides):
            if n <= group["max_precond_dim"]:
                state[f"GG_{i}"] = work.new_zeros(n, n)
                state[f"Q_{i}"] = work.new_zeros(n, n)
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which casts state to the parameter's dtype; here it keeps full precision.

        What a saved group lacks stays as it is. Raises ValueError for another method's state.
        """

        def complete(_, saved: dict) -> dict:
            groups = [dict(group) for group in saved["param_groups"]]
            states = {}
            for ours, theirs in zip(self.param_groups, groups):
                if theirs.get("merge_dims"):
                    raise ValueError(
                        "SOAP: the saved run had merge_dims=True, which this one lacks"
                    )
                # The authors' class writes -1 where ours has None.
                if (theirs.get("shampoo_beta") or 0) < 0:
                    theirs["shampoo_beta"] = None
                # What an older version did not save keeps this optimizer's value.
                theirs.update((name, x) for name, x in ours.items() if name not in theirs)
                for i, p in zip(theirs["params"], ours["params"]):
                    state = with_names(saved["state"].get(i, {}))
                    if not state:
                        continue
                    # On the meta device: only the names are needed, not the n × n matrices.
                    new = self._new_state(torch.empty(p.shape, device="meta"), theirs)
                    if state.keys() != new.keys():
                        raise ValueError(
                            f"SOAP: a saved state of {', '.join(state)} for {tuple(p.shape)} is "
                            f"another method's, or of other options; here: {', '.join(new)}"
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
    rotation = torch.linalg.qr(torch.randn(32, 32))[0]
    # Badly scaled, but not along the axes: only a rotation finds the scales.
    inputs = torch.randn(256, 32) * torch.logspace(-2, 0, 32) @ rotation
    teacher = torch.randn(16, 32)
    for optimizer_class in SOAP, torch.optim.AdamW:
        w = torch.zeros(16, 32, requires_grad=True)
        optimizer = optimizer_class([w], lr=0.03, betas=(0.95, 0.95), weight_decay=0)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (inputs @ (w - teacher).T).square().mean()
            loss.backward()
            optimizer.step()
        print(
            f"{optimizer_class.__name__}: loss {loss:.0e} after 300 steps, features scaled and"
            " rotated"
        )
        if optimizer_class is SOAP:
            Q = optimizer.state[w]["Q_0"]
            print(f"SOAP: Q is orthogonal to {(Q.T @ Q - torch.eye(16)).abs().max():.0e}")
