"""Muown: Muon turns the rows of a matrix, Adam sets their lengths.

    pᵢ = gᵢ·vᵢ/‖vᵢ‖                        row i: magnitude g, direction v; p and ‖v‖ are kept
    ∂gᵢ = ⟨∂pᵢ, vᵢ⟩/‖vᵢ‖                   the gradient along the row, then what is left of it
    ∂vᵢ = gᵢ/‖vᵢ‖·(∂pᵢ − ∂gᵢ·vᵢ/‖vᵢ‖)
    b ← μ·b + (1−μ)·∂v                     momentum;  u = (1−μ)·∂v + μ·b  (Nesterov)
    v ← v − lr·.2·√max(rows, cols)·NS(u)   5 steps of Newton–Schulz, as in Muon
    m ← β₁·m + (1−β₁)·∂g                   Adam:  s ← β₂·s + (1−β₂)·∂g²
    g ← g − lr·m̂/(√ŝ + ε)                  with both bias-corrected
    p ← g·v/‖v‖ − lr·λ·p                   decoupled decay, of what p was

    p `p`, ∂p `g`: (rows, cols), a convolution's kernel as (dim 0, the rest)   b `momentum_buffer`
    m `exp_avg`   s `exp_avg_sq`   ‖v‖ `v_norm`, with the sign of g; each (rows, 1)
    μ `momentum`   β `betas`   ε `eps`   λ `weight_decay`

Lion, Hübler et al. 2026-05-11 (arXiv 2605.10797): without decay the lengths of the rows, and so the
spectral norm, drift up under Muon. ∂v stands at right angles to v, so that ‖v‖ grows and the rows
turn ever more slowly (2606.23637).

What we changed: g is read off the rows in every step. The authors keep it, and undo with the next
step what scales weights from outside (a hook, optim/qk_clip.py). A row of zeros, 0/0 in their code,
starts at length 1e-12, in the direction of its first step; matrices of 3n × n they cut in three.

lr is in AdamW's units: a step of v has RMS .2·lr, one of g is about lr. On train.py's
default job .01, .02, .04 end at 1.355, 1.384, 1.411 (one seed); the authors' long runs took 1e-3 to
3e-3. No μP rule: one lr serves v, whose best falls as 1/√width, and g, whose best stays.
State: 4 bytes a parameter and 12 a row, 8 a parameter in AdamW groups; doubled for float64.

Embeddings, head and vectors go into groups of the same object that take AdamW:
    Muown([{"params": matrices}, {"params": others, "use_muon": False, "lr": 3e-4}])
Used with torch's schedulers (OneCycleLR moves momentum, and β₁ in AdamW groups), and fully_shard by
make_optimizer of parallel/sharded_optimizer.py; all partners: docs/partners.md.

Example:
    import torch
    from optim.muown import Muown
    w = torch.randn(8, 32, requires_grad=True)
    optimizer = Muown([w], lr=0.02)
    before = w.detach().clone()
    (w - torch.randn(8, 32)).square().sum().backward()
    optimizer.step()
    lengths = w.norm(dim=1) - before.norm(dim=1)
    assert torch.allclose(lengths.abs(), torch.tensor(0.02), atol=1e-4)  # by Adam's step alone
"""

import math

import torch

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


def row_norms(x: torch.Tensor, least: float) -> torch.Tensor:
    return x.norm(dim=1, keepdim=True).clamp_(min=least)


def gradients(p, g, v_norm, least) -> tuple[torch.Tensor, torch.Tensor]:
    """The magnitude's gradient (rows, 1) and the direction's (rows, cols)."""
    length = row_norms(p, least)
    unit = p / length
    along = (g * unit).sum(1, keepdim=True)
    return along * v_norm.sign(), (g - unit * along).mul_(length / v_norm)


def muown_update(p, x, adam_step, v_norm, lr, weight_decay, least) -> None:
    """In place on `p` and `v_norm`; x: NS(u) (rows, cols), adam_step: of g (rows, 1)."""
    # Rows are put together anew, which rounds; without an lr they keep their bits.
    if lr == 0:
        return
    length = row_norms(p, least)
    magnitude = length.copysign(v_norm).sub_(adam_step, alpha=lr)
    # A row of length 0 would forget its direction.
    magnitude = magnitude.abs().clamp_(min=least).copysign_(magnitude)
    v = torch.add(p * (v_norm / length), x, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))
    norm = row_norms(v, least)
    p.mul_(-lr * weight_decay).addcmul_(v, magnitude / norm)
    v_norm.copy_(norm.copysign_(magnitude))


class Muown(torch.optim.Optimizer):
    """Raises ValueError for bad values or vectors, RuntimeError for sparse or complex gradients."""

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = False  # needs whole matrices; its AdamW groups alone are elementwise
    matrices_only: bool = True  # everything else belongs in a group with use_muon=False
    zero_init: bool = False  # rows of zeros grow by no more than lr a step
    heavy_step: bool = True  # Newton-Schulz, too much for every replica to repeat
    mup_rule: str | None = None  # one lr for two variables, which scale differently

    @staticmethod
    def state_numbers(shape: tuple[int, ...], use_muon: bool = True) -> int:
        """Numbers of state that a parameter of this shape takes."""
        return math.prod(shape) + 3 * shape[0] if use_muon else 2 * math.prod(shape)

    def __init__(
        self,
        params,
        lr: float = 0.02,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        defaults = dict(lr=lr, momentum=momentum, eps=eps, weight_decay=weight_decay, use_muon=True)
        # Not named `betas`: where the defaults have those, OneCycleLR moves them, not the momentum.
        super().__init__(params, defaults | {"adam_betas": betas})

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, "betas": self.defaults["adam_betas"], **param_group}
        if not group["use_muon"]:
            # AdamW's lr and decay are its own, not the matrices'.
            group |= {"lr": 3e-4, "weight_decay": 0.0, **param_group}
        ends = {"lr": "inf", "weight_decay": "inf", "eps": "inf", "momentum": 1}
        beta1, beta2 = group["betas"]
        betas = {"betas[0]": beta1, "betas[1]": beta2}
        for name, end in (ends | dict.fromkeys(betas, 1)).items():
            x = (group | betas)[name]
            if not 0 <= x < float(end):
                raise ValueError(f"Muown: {name}={x} is not allowed; it must lie in [0, {end})")
        super().add_param_group(group)
        params = self.param_groups[-1]["params"]
        refused = [p for p in params if p.ndim < 2 or hasattr(p, "placements")]
        if group["use_muon"] and refused:
            # torch has appended the group already: take it back before the error.
            self.param_groups.pop()
            raise ValueError(
                f"Muown: {type(refused[0]).__name__} {tuple(refused[0].shape)} is no whole matrix; "
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
                raise RuntimeError("Muown: gradients must be dense and real, not sparse or complex")
        for group in self.param_groups:
            for ps in batches(group):
                # Float32 copies for half precision. For other dtypes .to() returns p itself.
                works = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in ps]
                # Autocast would change the dtypes of the products.
                with torch.autocast(ps[0].device.type, enabled=False):
                    (self._muown if group["use_muon"] else self._adamw)(group, ps, works)
        return loss

    def _muown(self, group: dict, ps: list, works: list) -> None:
        works = [work.flatten(1) for work in works]
        least = max(1e-12, torch.finfo(ps[0].dtype).tiny)  # the least length that p can hold
        us, adam_steps = [], []
        for p, work in zip(ps, works):
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(work).view(p.shape)
                state["v_norm"] = row_norms(work, least)
            along, u = gradients(work, p.grad.to(work.dtype).flatten(1), state["v_norm"], least)
            b = state["momentum_buffer"].view(work.shape).lerp_(u, 1 - group["momentum"])
            us.append(u.lerp_(b, group["momentum"]))
            adam_steps.append(adam(along, state, group["betas"], group["eps"]))
        X = orthogonalize(us, torch.float64 if works[0].dtype == torch.float64 else torch.bfloat16)
        for p, work, x, adam_step in zip(ps, works, X, adam_steps):
            v_norm = self.state[p]["v_norm"]
            muown_update(work, x, adam_step, v_norm, group["lr"], group["weight_decay"], least)
            # Half precision is rounded once a step, here; a kernel's rows may be a copy, too.
            if work.dtype != p.dtype or p.ndim > 2:
                p.copy_(work.view(p.shape))

    def _adamw(self, group: dict, ps: list, works: list) -> None:
        # OneCycleLR moves `momentum`, here β₁; betas set by hand stay until it moves again.
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
                known = {"step", "exp_avg", "exp_avg_sq"}
                known |= {"momentum_buffer", "v_norm"} if theirs["use_muon"] else set()
                pairs = zip(theirs["params"], ours["params"])
                for p, state in [
                    (p, dict(saved["state"][i])) for i, p in pairs if saved["state"].get(i)
                ]:
                    if state.keys() != known:
                        raise ValueError(f"Muown: the state of {', '.join(state)} is another's")
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
    print(f"Muown: the singular values of a step of v lie from {s.min():.2f} to {s.max():.2f}")
