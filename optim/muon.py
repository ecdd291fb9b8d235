"""Muon: momentum, orthogonalised. Every singular value of a matrix's update becomes about 1.

    b ← μ·b + (1−μ)·g                                momentum
    u = (1−μ)·g + μ·b                                Nesterov;  u = b  without
    X ← u / max(‖u‖, 1e-7)                           so that all singular values lie in [0, 1]
    ns_steps times (Newton–Schulz):                  a·s + b·s³ + c·s⁵ acts on each singular value s
        A = X·Xᵀ;  X ← a·X + (b·A + c·A²)·X          tall matrices are transposed first
    p ← p·(1 − lr·λ)                                 decoupled decay, before the step
    p ← p − lr·k·X                                   k = √max(1, rows/cols)  or  .2·√max(rows, cols)

    p `p`, g `g`: (rows, cols), a convolution's kernel as (dim 0, the rest)
    b `momentum_buffer`   μ `momentum`   λ `weight_decay`   k `adjust_lr_fn`   (a, b, c) `ns`

Jordan et al. 2024 (kellerjordan.github.io/posts/muon). A tutorial names other authors and the
cubic; the method is the quintic, which gives up precision (singular values end in .7 … 1.2) for
speed. `ns` is one of
    quintic  (3.4445, −4.7750, 2.0315) at every step
    cubic    (1.5, −.5, 0): converges exactly, but slowly; to compare, with 10 steps or more
    exact    (2, −1.5, .5): a quintic that converges exactly; 12 steps are usual
    polar    the best triple for each step, with safety factor 1.01 (Amsel et al. 2025, 2505.16932);
             4 of its steps train as well as 5 quintic ones (experiments/results/bench_muon_soap.md)
`normuon_beta2` (NorMuon, Li et al. 2025, 2510.05491; .95 is usual) evens out the rows of X, one row
a neuron:
    v ← β₂·v + (1−β₂)·mean of X² over the row     v `row_sq`
    X ← X/(√v + 1e-10)                            scaled back to the norm X had
`cautious`: decay only the elements where X·p > 0, which the step moves towards 0 anyway.
lr's unit: with the 'original' k a step changes a layer's output by about lr (in the spectral norm),
at any width; .02 is usual. With 'match_rms_adamw' (Liu et al. 2025, 2502.16982) the step's RMS is
.2·lr, so AdamW's lr and λ carry over. State: 4 bytes a parameter (+ 4 a row, NorMuon), 8 in AdamW
groups, doubled for float64, never below float32.

Muon is for hidden matrices. Embeddings, head and vectors go into groups of the same object that
take AdamW:
    adamw = {"params": others, "use_muon": False, "lr": 3e-4, "betas": (.9, .95)}
    Muon([{"params": matrices}, adamw])
`betas`, `eps`, `adamw_weight_decay` given to Muon serve groups that have none of their own; `fused`
steps those by a kernel of torch's. Clip gradients before, if at all: the update has no norm left.

Used with torch's schedulers (OneCycleLR moves momentum, and β₁ in AdamW groups), states of
torch.optim.Muon, fully_shard (by make_optimizer of parallel/sharded_optimizer.py; DTensors are
refused); all partners: docs/partners.md.

Example:
    import torch
    from optim.muon import Muon
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = Muon([{"params": matrices}, {"params": others, "use_muon": False}], lr=0.02)
    x = torch.randn(256, 8)
    for _ in range(100):
        before = matrices[0].detach().clone()
        loss = (model(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    step = (matrices[0].detach() - before) / 0.02 / 2  # k is 2 for 32 rows and 8 columns
    assert ((0.6 < torch.linalg.svdvals(step)) & (torch.linalg.svdvals(step) < 1.3)).all()
"""

import math

import torch

POLAR = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]
# Triples (a, b, c) for steps 1, 2, …; the last one repeats.
COEFFICIENTS = {
    "quintic": [(3.4445, -4.7750, 2.0315)],
    "cubic": [(1.5, -0.5, 0.0)],
    "exact": [(2.0, -1.5, 0.5)],
    "polar": [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR] + [(1.875, -1.25, 0.375)],
}
# k, by which one lr suits matrices of any shape.
SCALES = {
    "original": lambda rows, cols: math.sqrt(max(1, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
}
# Columns of a panel of `symmetric_product_`, and numbers of a stack of matrices: 3 × 8 MB in
# bfloat16 stay in a CPU's cache. Larger ones are slower there, and only take memory.
PANEL = 256
STACK = 2**22
# Groups with use_muon=False start from these: Muon's lr of 0.02 is far too large for AdamW.
ADAMW = {"lr": 3e-4, "weight_decay": 0.0}


def symmetric_product_(out, X, Y, beta=0.0, alpha=1.0) -> torch.Tensor:
    """out ← β·out + α·X·Y, known to be symmetric: (n, short, short)."""
    short = out.shape[1]
    # A CPU is bound by its multiplications. From three panels on it pays to multiply only what lies
    # below the diagonal, a panel of columns at a time, and to mirror it.
    if out.device.type != "cpu" or short < 3 * PANEL:
        return out.baddbmm_(X, Y, beta=beta, alpha=alpha)
    for i in range(0, short, PANEL):
        j = i + PANEL
        out[:, i:, i:j].baddbmm_(X[:, i:], Y[:, :, i:j], beta=beta, alpha=alpha)
        out[:, i:j, j:] = out[:, j:, i:j].mT
    return out


def orthogonalize(us, ns: str = "quintic", ns_steps: int = 5, dtype=torch.bfloat16) -> torch.Tensor:
    """n matrices (rows, cols) -> (n, rows, cols) of `dtype`, singular values near 1."""
    X = torch.stack([(u / u.norm().clamp(min=1e-7)).to(dtype) for u in us])
    # X·Xᵀ is smallest, (short, short), with the short side first.
    tall = X.shape[1] > X.shape[2]
    X = X.mT if tall else X  # (n, short, long)
    # In a long X the products with X cost most: then only every second step makes one.
    restart = 2 if X.shape[2] >= 2 * X.shape[1] else 1
    A = X.new_empty(*X.shape[:2], X.shape[1])
    for i in range(ns_steps):
        a, b, c = COEFFICIENTS[ns][min(i, len(COEFFICIENTS[ns]) - 1)]
        if i % restart == 0:
            symmetric_product_(A, X, X.mT)  # (n, short, short)
            Q = None
        P = symmetric_product_(A.clone(), A, A, b, c) if c else b * A
        P.diagonal(dim1=1, dim2=2).add_(a)
        # X ← P·X, but in a long X only every second step. Until then Q collects the Ps, and
        # A ← P·A·P spares a long product. Waiting for a third step blows up in bfloat16, on
        # gradients of low rank.
        Q = P if Q is None else symmetric_product_(torch.empty_like(P), P, Q)
        if (i + 1) % restart == 0 or i + 1 == ns_steps:
            # Q is symmetric, so that a tall X keeps its order in memory: to turn it costs more.
            X = torch.bmm(X.mT, Q).mT if tall else torch.bmm(Q, X)
        else:
            symmetric_product_(A, symmetric_product_(torch.empty_like(P), P, A), P)
    return X.mT if tall else X


def muon_directions(gs, bufs, momentum, nesterov, ns, ns_steps, ns_dtype) -> torch.Tensor:
    """X (n, rows, cols) for matrices of one shape. Updates the momenta `bufs`."""
    for g, b in zip(gs, bufs):
        b.lerp_(g, 1 - momentum)
    us = (g.lerp(b, momentum) if nesterov else b for g, b in zip(gs, bufs))
    return orthogonalize((u.flatten(1) for u in us), ns, ns_steps, ns_dtype)


def muon_update(p, x, row_sq, lr, weight_decay, adjust_lr_fn, normuon_beta2, cautious) -> None:
    """In place on `p` and NorMuon's `row_sq` (rows, 1); x: p's direction (rows, cols)."""
    x = x.to(p.dtype)
    if normuon_beta2 is not None:
        row_sq.lerp_(x.square().mean(1, keepdim=True), 1 - normuon_beta2)
        y = x / (row_sq.sqrt() + 1e-10)
        x = y * (x.norm() / (y.norm() + 1e-10))
    k = SCALES[adjust_lr_fn](*x.shape)
    x = x.reshape(p.shape)
    if cautious:
        p.sub_(p * (x * p > 0), alpha=lr * weight_decay)
    elif weight_decay:
        p.mul_(1 - lr * weight_decay)
    p.add_(x, alpha=-lr * k)


def adamw_update(p, g, exp_avg, exp_avg_sq, t, lr, beta1, beta2, eps, weight_decay, fused) -> None:
    """AdamW for what is no hidden matrix, in place; all tensors of one shape."""
    # The kernel ignores strides, so a transposed tensor takes the plain way.
    if fused and all(x.is_contiguous() for x in (p, g, exp_avg, exp_avg_sq)):
        # float32 on p's device, as the kernel reads it; filled there, so that nothing is copied.
        step = torch.full((), float(t), dtype=torch.float32, device=p.device)
        options = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
        options |= dict(amsgrad=False, maximize=False)
        torch._fused_adamw_([p], [g], [exp_avg], [exp_avg_sq], [], [step], **options)
        return
    p.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.addcdiv_(exp_avg, (exp_avg_sq / (1 - beta2**t)).sqrt_().add_(eps), value=-lr / (1 - beta1**t))


class Muon(torch.optim.Optimizer):
    """Raises ValueError for bad hyperparameters and vectors in a Muon group.

    Raises RuntimeError for sparse or complex gradients. `ns_dtype`: dtype of the products, or its
    name; None: bfloat16, float64 for float64 parameters.
    """

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = False  # needs full matrices; its AdamW groups alone are elementwise
    matrices_only: bool = True  # everything else belongs in a group with use_muon=False
    zero_init: bool = True  # projections and head may start at 0
    heavy_step: bool = True  # Newton-Schulz, too much for every replica to repeat
    mup_rule: str | None = "muon"  # a step has spectral norm k, at any width

    @staticmethod
    def state_numbers(
        shape: tuple[int, ...], use_muon: bool = True, *, normuon_beta2: float | None = None
    ) -> int:
        """Numbers of state that a parameter of this shape takes."""
        if not use_muon:
            return 2 * math.prod(shape)
        rows = shape[0] if normuon_beta2 is not None else 0
        return math.prod(shape) + rows

    def __init__(
        self,
        params,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns: str = "quintic",
        adjust_lr_fn: str = "original",
        ns_dtype: torch.dtype | str | None = None,
        normuon_beta2: float | None = None,
        cautious: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        adamw_weight_decay: float | None = None,
        fused: bool = False,
    ):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        defaults |= dict(ns=ns, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn, ns_dtype=ns_dtype)
        defaults |= dict(use_muon=True, normuon_beta2=normuon_beta2, cautious=cautious)
        # For AdamW groups that give none. Not named `betas`: where the defaults have those,
        # OneCycleLR moves β₁ and leaves the momentum alone.
        defaults |= dict(adamw_betas=betas, eps=eps, adamw_weight_decay=adamw_weight_decay)
        super().__init__(params, defaults | {"fused": fused})

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        if not group["use_muon"]:
            # What the group gives comes first, then AdamW's defaults, then Muon's.
            betas = self.defaults["adamw_betas"]
            group = {**self.defaults, **ADAMW, "betas": betas, **param_group}
            if group["adamw_weight_decay"] is not None:
                group["weight_decay"] = group["adamw_weight_decay"]
        check(group)
        if group["ns_dtype"] is not None:
            # As text, because a checkpoint cannot hold a dtype.
            group["ns_dtype"] = str(group["ns_dtype"]).removeprefix("torch.")
            if not getattr(getattr(torch, group["ns_dtype"], None), "is_floating_point", False):
                raise ValueError(
                    f"Muon: ns_dtype={group['ns_dtype']} is not allowed; take a floating dtype"
                )
        super().add_param_group(group)
        params = self.param_groups[-1]["params"]
        refused = [p for p in params if p.ndim < 2 or hasattr(p, "placements")]
        if group["use_muon"] and refused:
            # torch has appended the group already: take it back before the error.
            self.param_groups.pop()
            raise ValueError(
                f"Muon: {type(refused[0]).__name__} {tuple(refused[0].shape)} is no whole matrix;"
                " vectors go into a group with use_muon=False, DTensors to make_optimizer"
                " (parallel/sharded_optimizer.py)"
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
                raise RuntimeError("Muon: gradients must be dense and real, not sparse or complex")
        for group in self.param_groups:
            step_batch = self._muon if group["use_muon"] else self._adamw
            for ps in batches(group):
                # Float32 copies for half precision. For other dtypes .to() returns p itself.
                works = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in ps]
                gs = [p.grad.to(work.dtype) for p, work in zip(ps, works)]
                # Autocast would override ns_dtype in the products.
                with torch.autocast(ps[0].device.type, enabled=False):
                    step_batch(group, ps, works, gs)
                # Half precision is rounded once a step, here.
                for p, work in zip(ps, works):
                    if work is not p:
                        p.copy_(work)
        return loss

    def _muon(self, group: dict, ps: list, works: list, gs: list) -> None:
        states = [self.state[p] for p in ps]
        for state, work in zip(states, works):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(work)
            if group["normuon_beta2"] is not None and "row_sq" not in state:
                state["row_sq"] = work.new_zeros(work.shape[0], 1)
        bufs = [state["momentum_buffer"] for state in states]
        usual = "float64" if works[0].dtype == torch.float64 else "bfloat16"
        dtype = getattr(torch, group["ns_dtype"] or usual)
        options = [group[name] for name in ("momentum", "nesterov", "ns", "ns_steps")]
        X = muon_directions(gs, bufs, *options, dtype)
        names = "lr", "weight_decay", "adjust_lr_fn", "normuon_beta2", "cautious"
        for work, x, state in zip(works, X, states):
            muon_update(work, x, state.get("row_sq"), *(group[name] for name in names))

    def _adamw(self, group: dict, ps: list, works: list, gs: list) -> None:
        # OneCycleLR moves `momentum`, which means β₁ here. `cycled` is the value that went into
        # betas last, so that betas set by hand stay until the scheduler moves again.
        if "max_momentum" in group and group.get("cycled") != group["momentum"]:
            group["betas"] = (group["momentum"], group["betas"][1])
            group["cycled"] = group["momentum"]
        for p, work, g in zip(ps, works, gs):
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(work)
                state["exp_avg_sq"] = torch.zeros_like(work)
            t = state["step"] = int(state["step"]) + 1
            moments = state["exp_avg"], state["exp_avg_sq"]
            options = [group[name] for name in ("eps", "weight_decay", "fused")]
            adamw_update(work, g, *moments, t, group["lr"], *group["betas"], *options)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which casts state to the parameter's dtype; here it keeps full precision.

        What a saved group lacks stays as it is. Raises ValueError for another method's state.
        """

        def complete(_, saved: dict) -> dict:
            groups = [from_torch(dict(group)) for group in saved["param_groups"]]
            states = {}
            for ours, theirs in zip(self.param_groups, groups):
                # What an older version did not save keeps this optimizer's value.
                theirs.update((name, x) for name, x in ours.items() if name not in theirs)
                adamw = {"step", "exp_avg", "exp_avg_sq"}
                known = {"momentum_buffer"} if theirs["use_muon"] else adamw
                for i, p in zip(theirs["params"], ours["params"]):
                    state = saved["state"].get(i)
                    if not state:
                        continue
                    if state.keys() - {"row_sq"} != known:
                        raise ValueError(
                            f"Muon: a saved state of {', '.join(state)} is another method's"
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


def check(group: dict) -> None:
    """Raises ValueError for a hyperparameter that is not allowed."""
    beta1, beta2 = group.get("betas", group["adamw_betas"])
    group = group | {"betas[0]": beta1, "betas[1]": beta2}
    ends = dict.fromkeys(("lr", "weight_decay", "adamw_weight_decay", "eps"), "inf")
    ends |= dict.fromkeys(("momentum", "normuon_beta2", "betas[0]", "betas[1]"), 1)
    for name, end in ends.items():
        x = group[name]
        if x is not None and not 0 <= x < float(end):
            raise ValueError(f"Muon: {name}={x} is not allowed; it must lie in [0, {end})")
    for name, known in ("ns", COEFFICIENTS), ("adjust_lr_fn", SCALES):
        if group[name] not in known:
            raise ValueError(f"Muon: {name}={group[name]!r} is not one of {', '.join(known)}")
    n = group["ns_steps"]
    if not (isinstance(n, int) and n > 0):
        raise ValueError(f"Muon: ns_steps={n} is not allowed; it must be an integer ≥ 1")


def batches(group: dict) -> list[list]:
    """What steps together: a few matrices of one shape; with AdamW one tensor at a time."""
    found = {}
    for i, p in enumerate(group["params"]):
        if p.grad is not None and p.numel() > 0:
            sides = [p.shape[0], p[0].numel()] if group["use_muon"] else [i]
            found.setdefault((*sides, p.dtype, p.device), []).append(p)
    ns = [max(1, STACK // ps[0].numel()) for ps in found.values()]
    return [ps[i : i + n] for ps, n in zip(found.values(), ns) for i in range(0, len(ps), n)]


def from_torch(group: dict) -> dict:
    """A group of torch.optim.Muon in our words; ours stays as it is."""
    if "ns_coefficients" in group:
        triple = tuple(group.pop("ns_coefficients"))
        eps = group.pop("eps")
        names = [name for name, triples in COEFFICIENTS.items() if triples == [triple]]
        if not names or eps != 1e-7:
            raise ValueError(
                f"Muon: the saved run had ns_coefficients={triple}, eps={eps}; this one has 1e-7, "
                "and the coefficients of quintic, cubic and exact"
            )
        group.update(ns=names[0], adjust_lr_fn=group["adjust_lr_fn"] or "original")
    return group


if __name__ == "__main__":
    torch.manual_seed(0)
    for ns, steps in ("quintic", 5), ("cubic", 25), ("exact", 12), ("polar", 8):
        X = orthogonalize(torch.randn(1, 40, 60).double(), ns, steps, torch.float64)
        s = torch.linalg.svdvals(X)
        print(f"Muon {ns}, {steps} steps: singular values from {s.min():.3f} to {s.max():.3f}")
