"""Dion 3: Muon on the rows that have waited for it longest, a part of each matrix at a time.

    b ← b + g                                        what has not been applied yet, summed
    R ← the ⌈fraction·rows⌉ rows of b with the largest Σ|b|       of two alike the upper one
    X ← b[R], orthogonalised                         every singular value about 1
    b[R] ← μ·b[R]                                    error feedback: only what was used decays
    v[R] ← β₂·v[R] + (1−β₂)·mean of X² over the row               NorMuon's, of these rows alone
    X ← X/(√v[R] + 1e-8)                             scaled back to the norm X had
    p ← p·(1 − lr·λ)                                 decoupled decay, of all rows
    p[R] ← p[R] − lr·k·X                             k = √(rows/cols)  or  .2·√max(rows, cols)

    p `p`, g `g`: (rows, cols), a convolution's kernel as (dim 0, the rest)   b `momentum_buffer`
    v `row_sq`   μ `momentum`   β₂ `normuon_beta2`   λ `weight_decay`   k `adjust_lr_fn`

Dion (Ahn et al., April 2025, arXiv 2504.05295) shrinks the matrix by a power iteration. Its authors
now recommend Dion2 (2512.16928, December 2025), which takes some rows as they are, and with
NorMuon's row norms (2510.05491) Dion3 (github.com/microsoft/dion, August 2026), which is here;
normuon_beta2=None is Dion2, but for the columns that one takes where they are fewer. Rows are
chosen of the whole matrix (selection_scope="global" there): no layout changes the choice. X is
orthogonalised by Polar Express (2505.16932) in `ns_dtype`; None: bfloat16, float64 for float64.

lr's unit: with 'spectral' a step changes a layer's output by about lr; with 'match_rms_adamw'
AdamW's lr and λ carry over. On train.py's default job .04 ends lowest of .01, .02, .04 (1.551, one
seed). A small fraction is cheaper, but a small model pays: of width 64, 9 % above Muon's loss with
fraction=.25, none with 1. State: 4 bytes a parameter and 4 a row, 8 a parameter in AdamW groups, of
embeddings, head, vectors (`betas`, `eps`); twice in float64. Used with schedulers (OneCycleLR moves
momentum, β₁ of AdamW) and fully_shard (parallel/sharded_optimizer.py): docs/partners.md.

Example:
    import torch
    from optim.dion import Dion3
    w, bias = torch.zeros(8, 32, requires_grad=True), torch.zeros(8, requires_grad=True)
    optimizer = Dion3([{"params": [w]}, {"params": [bias], "use_muon": False}], fraction=0.25)
    w.grad = torch.randn(8, 32)
    w.grad[3:5] *= 10
    optimizer.step()
    assert w.abs().sum(1).nonzero().flatten().tolist() == [3, 4]  # two rows of eight have moved
"""

import math

import torch

# (a, b, c) of X ← a·X + (b·A + c·A²)·X, A = X·Xᵀ; as the authors' code has them, 2 % from the edge.
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# k, by which one lr suits matrices of any shape.
SCALES = {
    "spectral": lambda rows, cols: math.sqrt(rows / cols),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
}


def orthogonalize(us: list, dtype: torch.dtype) -> torch.Tensor:
    """n matrices (rows, cols) -> (n, rows, cols) of `dtype`, singular values near 1."""
    X = torch.stack([(u / (1.02 * u.norm() + 1e-7)).to(dtype) for u in us])
    tall = X.shape[1] > X.shape[2]  # X·Xᵀ is smallest with the short side first
    X = X.mT if tall else X
    # Few rows are long, and the products with X cost most: only every second step makes one.
    every = 2 if X.shape[2] >= 2 * X.shape[1] else 1
    A = P = Q = None  # Q collects the Ps of the steps between: X is to become Q·X
    for i, (a, b, c) in enumerate(POLAR, start=1):
        A = X @ X.mT if Q is None else P @ A @ P
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=1, dim2=2).add_(a)
        Q = P if Q is None else P @ Q
        if i % every == 0 or i == len(POLAR):
            X, Q = Q @ X, None
    return X.mT if tall else X


def take_rows(g, b, fraction: float, momentum: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(row numbers R (k,), their rows of b (k, cols)); b has taken g, and decayed where used."""
    b.add_(g)
    # A stable sort chooses the same of equal rows on every device; topk does not say which.
    order = b.abs().flatten(1).sum(1).sort(descending=True, stable=True).indices
    R = order[: math.ceil(fraction * len(b) - 1e-9)]
    chosen = b.index_select(0, R)
    b.index_copy_(0, R, chosen * momentum)
    return R, chosen.flatten(1)


def dion_update(p, x, R, row_sq, lr, weight_decay, adjust_lr_fn, normuon_beta2) -> None:
    """In place on `p` and NorMuon's `row_sq` (rows, 1); x: the direction (k, cols) of rows R."""
    if normuon_beta2 is not None:
        v = row_sq.index_select(0, R).lerp_(x.square().mean(1, keepdim=True), 1 - normuon_beta2)
        row_sq.index_copy_(0, R, v)
        y = x / (v.sqrt() + 1e-8)
        x = y * (x.norm() / y.norm().clamp(min=1e-8))
    k = SCALES[adjust_lr_fn](len(p), x.shape[1])
    p.mul_(1 - lr * weight_decay)
    p.index_add_(0, R, x.reshape(-1, *p.shape[1:]), alpha=-lr * k)


class Dion3(torch.optim.Optimizer):
    """Raises ValueError for bad values or vectors, RuntimeError for sparse or complex gradients."""

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = False  # needs full matrices; its AdamW groups alone are elementwise
    matrices_only: bool = True  # everything else belongs in a group with use_muon=False
    zero_init: bool = True  # projections and head may start at 0
    heavy_step: bool = True  # Newton-Schulz, too much for every replica to repeat
    mup_rule: str | None = "muon"  # a step has spectral norm k, at any width

    @staticmethod
    def state_numbers(shape: tuple, use_muon: bool = True, *, normuon_beta2=0.95) -> int:
        """Numbers of state that a parameter of this shape takes."""
        rows = 0 if normuon_beta2 is None else shape[0]
        return math.prod(shape) + rows if use_muon else 2 * math.prod(shape)

    def __init__(
        self,
        params,
        lr: float = 0.02,
        fraction: float = 0.25,
        momentum: float = 0.95,
        normuon_beta2: float | None = 0.95,
        weight_decay: float = 0.0,
        adjust_lr_fn: str = "spectral",
        ns_dtype: torch.dtype | str | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        defaults = dict(lr=lr, fraction=fraction, momentum=momentum, normuon_beta2=normuon_beta2)
        defaults |= dict(weight_decay=weight_decay, adjust_lr_fn=adjust_lr_fn, ns_dtype=ns_dtype)
        # Not named `betas`: where the defaults have those, OneCycleLR leaves momentum alone.
        super().__init__(params, defaults | dict(use_muon=True, adamw_betas=betas, eps=eps))

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, "betas": self.defaults["adamw_betas"], **param_group}
        if not group["use_muon"]:
            group |= {"lr": 3e-4, "weight_decay": 0.0, **param_group}  # not the matrices'
        if group["ns_dtype"] is not None:  # as text, because a checkpoint cannot hold a dtype
            group["ns_dtype"] = str(group["ns_dtype"]).removeprefix("torch.")
        dtype = getattr(torch, group["ns_dtype"] or "half", None)
        rules = {
            "[0,∞)": (("lr", "weight_decay", "eps"), lambda x: x is not None and 0 <= x < math.inf),
            "[0,1)": (("momentum",), lambda x: 0 <= x < 1),
            "two of [0,1)": (("betas",), lambda x: len(x) == 2 and all(0 <= y < 1 for y in x)),
            "None or [0,1)": (("normuon_beta2",), lambda x: x is None or 0 <= x < 1),
            "(0,1]": (("fraction",), lambda x: 0 < x <= 1),
            " or ".join(SCALES): (("adjust_lr_fn",), lambda x: x in SCALES),
            "a floating dtype": (("ns_dtype",), lambda _: getattr(dtype, "is_floating_point", 0)),
        }
        for allowed, (names, ok) in rules.items():
            for wrong in (f"{name}={group[name]}" for name in names if not ok(group[name])):
                raise ValueError(f"Dion3: {wrong} is not allowed; {allowed} is")
        super().add_param_group(group)
        refused = any(p.ndim < 2 or hasattr(p, "placements") for p in group["params"])
        if group["use_muon"] and refused:
            # torch has appended the group already: take it back before the error.
            self.param_groups.pop()
            raise ValueError("Dion3: vectors need use_muon=False, DTensors make_optimizer")

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        # What steps together: a group's matrices of one shape; with AdamW one tensor at a time.
        stacks = {}
        for i, group in enumerate(self.param_groups):
            active = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            for j, p in enumerate(active):
                # Before any step: an error must not leave half of the parameters stepped.
                if p.grad.layout != torch.strided or p.is_complex():
                    raise RuntimeError("Dion3: gradients must be dense and real")
                sides = (len(p), p[0].numel()) if group["use_muon"] else j
                _, ps = stacks.setdefault((i, sides, p.dtype, p.device), (group, []))
                ps.append(p)
        for group, ps in stacks.values():
            # Float32 copies for half precision. For other dtypes .to() returns p itself.
            works = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in ps]
            gs = [p.grad.to(work.dtype) for p, work in zip(ps, works)]
            states = [self.state[p] for p in ps]
            with torch.autocast(ps[0].device.type, enabled=False):  # it would override ns_dtype
                (step_dion if group["use_muon"] else step_adamw)(group, works, gs, states)
            for p, work in zip(ps, works):
                p.copy_(work)  # half precision is rounded once a step, here; else nothing happens
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but without rounding. Raises ValueError for another method's state."""

        def complete(_, saved: dict) -> dict:
            groups, states = [dict(group) for group in saved["param_groups"]], {}
            for ours, theirs in zip(self.param_groups, groups):
                # What an older version did not save keeps this optimizer's value.
                theirs.update((name, x) for name, x in ours.items() if name not in theirs)
                muon = theirs["use_muon"]
                known = {"momentum_buffer"} if muon else {"step", "exp_avg", "exp_avg_sq"}
                for i, p in zip(theirs["params"], ours["params"]):
                    state = saved["state"].get(i, {})
                    if state and state.keys() - {"row_sq"} != known:
                        raise ValueError(f"Dion3: a state of {[*state]} is another method's")
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


def step_dion(group: dict, works: list, gs: list, states: list) -> None:
    """Matrices of one shape. Fills their states."""
    taken = []
    for state, work, g in zip(states, works, gs):
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(work)
        if group["normuon_beta2"] is not None and "row_sq" not in state:
            state["row_sq"] = work.new_zeros(len(work), 1)
        taken.append(take_rows(g, state["momentum_buffer"], group["fraction"], group["momentum"]))
    dtype = group["ns_dtype"] or ("float64" if works[0].dtype == torch.float64 else "bfloat16")
    X = orthogonalize([rows for _, rows in taken], getattr(torch, dtype)).to(works[0].dtype)
    options = [group[name] for name in ("lr", "weight_decay", "adjust_lr_fn", "normuon_beta2")]
    for work, x, (R, _), state in zip(works, X, taken, states):
        dion_update(work, x, R, state.get("row_sq"), *options)


def step_adamw(group: dict, ps: list, gs: list, states: list) -> None:
    """AdamW for what is no hidden matrix. Fills the states."""
    # OneCycleLR's `momentum` is β₁ here; betas set by hand stay until it moves again.
    if "max_momentum" in group and group.get("cycled") != group["momentum"]:
        group.update(betas=(group["momentum"], group["betas"][1]), cycled=group["momentum"])
    lr, (beta1, beta2) = group["lr"], group["betas"]
    for state, p, g in zip(states, ps, gs):
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        t = state["step"] = int(state["step"]) + 1
        m = state["exp_avg"].lerp_(g, 1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
        p.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, root, value=-lr / (1 - beta1**t))


if __name__ == "__main__":
    s = torch.linalg.svdvals(orthogonalize([torch.randn(10, 200)], torch.float32)[0])
    print(f"Dion3: singular values of 10 rows of 200: {s.min():.3f} to {s.max():.3f}")
