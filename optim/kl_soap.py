"""KL-SOAP: SOAP with two covariances estimated together, each from gradients the other whitened.

first call   GGᵢ = (1−β_s)·G₍ᵢ₎·G₍ᵢ₎ᵀ/mᵢ,  Qᵢ = its eigenvectors, largest eigenvalue first,  λᵢ = .1
             no update, t stays 0
each later   t ← t + 1
    g′ = g rotated by every Qᵢ             Q₁ᵀ·g·Q₂ for a matrix
    m′ ← β₁·m′ + (1−β₁)·g′                 Adam, all in the rotated basis
    v  ← β₂·v + (1−β₂)·g′²
    u  = m′/(√v + ε) rotated back
    p  ← (p − lr·u)·(1 − lr·ω)             decoupled decay, after the step
    wᵢ = g′ / √λⱼ along every j ≠ i        whitened in all dimensions but i
    GGᵢ ← β_s·GGᵢ + (1−β_s)·Qᵢ·W₍ᵢ₎·W₍ᵢ₎ᵀ·Qᵢᵀ/mᵢ
    λᵢ  ← β_s·λᵢ + (1−β_s)·mean of W₍ᵢ₎² over its columns;  λᵢ ← max(λᵢ, 1/max(10, min(nᵢ, 4000))²)
    if t % frequency = 0, one step of power iteration:  Qᵢ ← qr(GGᵢ·Qᵢ);  m′ follows, v and λ stay

    p `p`   g `g`   G₍ᵢ₎ g with dimension i first, the others flattened: nᵢ rows, mᵢ columns
    m′ `exp_avg`   v `exp_avg_sq`   t `step`   GGᵢ `GG_i`   Qᵢ `Q_i`   λᵢ `eigenvalues_i`   ε `eps`
    β `betas`  β_s `shampoo_beta`, None = β₂  ω `weight_decay`  frequency `precondition_frequency`

Lin et al. 2025 (arXiv 2509.03378, September 2025), in their published form of February 2026
(github.com/yorkerlin/KL-Methods): QR, no bias correction. SOAP's means of G·Gᵀ and Gᵀ·G each count
the other side's scale; GG₁ ⊗ GG₂ here is nearest to the gradients' covariance in the
Kullback-Leibler divergence. Of NVIDIA's forms KlSoapV3 is near (QR, but with bias corrections, λ
read off GG, each gradient in a basis it already moved); REKLS, with eigh at every step, is not the
paper's. In three dimensions the authors' code takes some λ already moved; here all move at once.
lr is in units of (rotated) weight, as AdamW's. On train.py's default job .0015, .003, .006 end at
2.75, 1.71, 1.45 (one seed); of width 128 .012 was best of .003 to .024: 180 steps want more.
Dimensions above `max_precond_dim` are not rotated, nor vectors: Adam, a first call later. A step
magnifies rounding: two layouts drift apart though both are right. State of an a×b matrix:
8(a² + b²) bytes for GG and Q, 4(a + b) for λ, 8ab for m′ and v; doubled for float64, never less.

Used with torch's schedulers (OneCycleLR moves β₁), GradScaler, autocast, compile, DDP and
torch.distributed.checkpoint; with fully_shard by make_optimizer of parallel/sharded_optimizer.py:
DTensors are refused. docs/partners.md has all partners.

Example:
    import torch
    from optim.kl_soap import KLSOAP
    true = torch.linalg.qr(torch.randn(6, 6))[0]
    w = torch.zeros(6, 8, requires_grad=True)
    optimizer = KLSOAP([w], precondition_frequency=1)
    for _ in range(300):
        w.grad = true * torch.logspace(2, 0, 6) @ torch.randn(6, 8)  # largest along true[:, 0]
        optimizer.step()
    Q = optimizer.state[w]["Q_0"]
    assert torch.allclose((Q.T @ true).abs(), torch.eye(6), atol=0.3)
"""

import math

import torch

FIRST = 0.1  # every λ after the first call


def rotate(x, Qs, back=False):
    """Every dimension i of `x` by Qᵢᵀ (`back`: Qᵢ); None leaves a dimension alone."""
    for i, Q in enumerate(Qs):
        if Q is not None:
            Q = Q.mT if back else Q
            last = i == x.ndim - 1
            x = x @ Q if last else (Q.mT @ x.flatten(i + 1)).view(x.shape)
    return x


def adam_update(p, rotated, exp_avg, exp_avg_sq, Qs, lr, betas, eps, weight_decay) -> None:
    """Adam in the basis `Qs`: in place on `p`, `exp_avg`, `exp_avg_sq`, shaped as `rotated`."""
    exp_avg.lerp_(rotated, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(rotated, rotated, value=1 - betas[1])
    u = rotate(exp_avg / exp_avg_sq.sqrt().add_(eps), Qs, back=True)
    p.sub_(u, alpha=lr).mul_(1 - lr * weight_decay)


def factor_update(halves, rotated, GGs, eigenvalues, shampoo_beta) -> None:
    """The covariances `GGs` (nᵢ, nᵢ) and `eigenvalues` (nᵢ), in place; None: not rotated.

    halves: g rotated in every dimension but i, for each i; rotated: in every one.
    """
    after = [(1,) * (rotated.ndim - 1 - i) for i in range(rotated.ndim)]
    scales = [1.0 if x is None else x.rsqrt().view(-1, *n) for x, n in zip(eigenvalues, after)]
    for i in (i for i, GG in enumerate(GGs) if GG is not None):
        GG, x = GGs[i], eigenvalues[i]
        whitening = math.prod(scales[:i] + scales[i + 1 :])
        half = (halves[i] * whitening).movedim(i, 0).flatten(1)  # (nᵢ, mᵢ)
        GG.addmm_(half, half.mT, beta=shampoo_beta, alpha=(1 - shampoo_beta) / half.shape[1])
        whole = (rotated * whitening).movedim(i, 0).flatten(1)
        x.lerp_(whole.square().mean(1), 1 - shampoo_beta)
        x.clamp_(min=max(10, min(len(x), 4000)) ** -2)


def basis_update(exp_avg, GGs, Qs) -> None:
    """One step of power iteration, in place on `Qs`; the momentum moves into the new basis."""
    momentum = rotate(exp_avg, Qs, back=True)
    for GG, Q in zip(GGs, Qs):
        if GG is not None:
            # QR keeps the order of the columns, so v and λ still belong to them.
            Q.copy_(torch.linalg.qr(GG @ Q)[0])
    exp_avg.copy_(rotate(momentum, Qs))


class KLSOAP(torch.optim.Optimizer):
    """Raises ValueError for bad hyperparameters, RuntimeError for sparse or complex gradients."""

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = False  # needs whole matrices
    zero_init: bool = True  # projections and head may start at 0
    heavy_step: bool = True  # eigenbases, too much for every replica to repeat
    mup_rule: str | None = "soap"  # entries of a rotated step have one size, and random signs

    @staticmethod
    def state_numbers(shape: tuple[int, ...], *, max_precond_dim: int = 10000) -> int:
        """Numbers of state that a parameter of this shape takes."""
        sides = [n for n in shape if n <= max_precond_dim] if len(shape) > 1 else []
        return sum(2 * n * n + n for n in sides) + 2 * math.prod(shape)

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
    ):
        defaults = dict(lr=lr, betas=betas, shampoo_beta=shampoo_beta, eps=eps)
        defaults |= dict(weight_decay=weight_decay, precondition_frequency=precondition_frequency)
        super().__init__(params, defaults | {"max_precond_dim": max_precond_dim})

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        ends = dict.fromkeys(("lr", "eps", "weight_decay"), "inf") | {"shampoo_beta": 1}
        checked = [(name, group[name], 0, end) for name, end in ends.items()]
        beta1, beta2 = group["betas"]
        checked += [("betas[0]", beta1, 0, 1), ("betas[1]", beta2, 0, 1)]
        counts = "precondition_frequency", "max_precond_dim"
        for name, x, low, end in checked + [(name, group[name], 1, "inf") for name in counts]:
            if (name, x) != ("shampoo_beta", None) and (x is None or not low <= x < float(end)):
                raise ValueError(f"KLSOAP: {name}={x} is not allowed; it must be in [{low}, {end})")
        super().add_param_group(param_group)
        if any(hasattr(p, "placements") for p in self.param_groups[-1]["params"]):
            # torch has appended the group already: take it back before the error.
            self.param_groups.pop()
            raise ValueError("KLSOAP: for DTensors take make_optimizer (sharded_optimizer.py)")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Check every gradient first: an error must not leave half of the parameters stepped.
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if p.grad.layout != torch.strided or p.is_complex():
                raise RuntimeError("KLSOAP: gradients must be dense and real, not sparse, complex")
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
        beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
        state = self.state[p]
        if is_first := not state:
            state.update(self._new_state(work, group))
        kinds = "GG", "Q", "eigenvalues"
        GGs, Qs, eigenvalues = ([state.get(f"{x}_{i}") for i in range(p.ndim)] for x in kinds)
        # As in the authors' code: no gradient is rotated by a basis that was made from itself.
        if is_first:
            factor_update([g] * p.ndim, g, GGs, eigenvalues, beta)
            for GG, Q, x in zip(GGs, Qs, eigenvalues):
                if GG is not None:
                    # LAPACK fails on low ranks in float32, and on an infinity; smallest first.
                    Q.copy_(torch.linalg.eigh(GG.double().where(GG.isfinite().all(), 0))[1].flip(1))
                    x.fill_(FIRST)
            return
        t = state["step"] = int(state["step"]) + 1
        halves = [rotate(g, [*Qs[:i], None, *Qs[i + 1 :]]) for i in range(p.ndim)]
        rotated = rotate(halves[0], Qs[:1]) if Qs else g
        options = (group[x] for x in ("lr", "betas", "eps", "weight_decay"))
        adam_update(work, rotated, state["exp_avg"], state["exp_avg_sq"], Qs, *options)
        factor_update(halves, rotated, GGs, eigenvalues, beta)
        if t % group["precondition_frequency"] == 0:
            basis_update(state["exp_avg"], GGs, Qs)
        # Half precision is rounded once a step, here.
        if work is not p:
            p.copy_(work)

    @staticmethod
    def _new_state(work, group: dict) -> dict:
        state = {"step": 0, "exp_avg": torch.zeros_like(work), "exp_avg_sq": torch.zeros_like(work)}
        for i, n in enumerate(work.shape if work.ndim > 1 else ()):
            if n <= group["max_precond_dim"]:
                state[f"GG_{i}"] = work.new_zeros(n, n)
                state[f"Q_{i}"] = work.new_zeros(n, n)
                state[f"eigenvalues_{i}"] = work.new_ones(n)
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
                    if not (state := saved["state"].get(i)):
                        continue
                    # On the meta device: only the names are needed, not the n × n matrices.
                    new = self._new_state(torch.empty(p.shape, device="meta"), theirs)
                    if state.keys() != new.keys():
                        wrong = f"{', '.join(state)} is another method's, or of other options"
                        raise ValueError(f"KLSOAP: a saved state of {wrong}")
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
    true = torch.linalg.qr(torch.randn(6, 6))[0] * torch.logspace(0, 2, 6)
    optimizer = KLSOAP([w := torch.zeros(6, 8, requires_grad=True)], precondition_frequency=1)
    for _ in range(1000):
        w.grad = true @ torch.randn(6, 8)
        optimizer.step()
    found = (optimizer.state[w]["Q_0"].T @ true).square().sum(1).sqrt()
    print("KLSOAP: gradients deviate along Q_0 by", found.tolist())
