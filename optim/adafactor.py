"""Adafactor: Adam's second moment of a matrix kept as one row and one column; no first moment.

    w = t^δ,   δ = −.8                                             weight of the new g², unbiased
    R ← (1−w)·R + w·mean of g² over the last dimension             matrices, and stacks of them
    C ← (1−w)·C + w·mean of g² over the second-last dimension
    V = R·C / max(mean over rows of R, ε₁)                         an outer product
    V ← (1−w)·V + w·g²                                             vectors and scalars: all of it
    U = g / max(√V, ε₁);   U ← U / max(1, RMS(U)/d)                clipped: a large g outruns V
    ρ = min(lr, 1/√t)  if relative_step else  lr
    α = ρ·max(ε₂, RMS(p))  if scale_parameter else  ρ              p before decay
    p ← p·(1 − lr·λ)                                               decoupled decay, before the step
    p ← p − α·U;   with β₁:  m ← β₁·m + (1−β₁)·α·U,  p ← p − m     no bias correction

    p `p`   g `g`   R `row_var` (rows, 1)   C `col_var` (1, cols)   V `variance`   m `exp_avg`
    β₁ `beta1`   t `step`, from 1   δ `beta2_decay`   (ε₁, ε₂) `eps`   d `d`   λ `weight_decay`

Shazeer and Stern 2018 (arXiv 1804.04235), decay as in torch. A tutorial keeps one scalar for a
vector: vectors keep their full second moment, only matrices factor. lr has no unit with
scale_parameter: a matrix moves by about lr of its own RMS; without, lr is in units of weight.
State: 4·(rows + cols) bytes a matrix, 4 bytes an element of a vector, 4 more a parameter with
beta1; doubled for float64 parameters. Half-precision parameters keep float32 state.

Used with torch's schedulers, GradScaler, autocast, compile, DDP and torch.distributed.checkpoint,
and with fully_shard, there best by make_optimizer of parallel/sharded_optimizer.py. States of
torch.optim.Adafactor load; maximize is refused. OneCycleLR finds no momentum to move:
cycle_momentum=False. docs/partners.md has all partners.

Example:
    import torch
    from optim.adafactor import Adafactor
    layer = torch.nn.Linear(30, 20, bias=False)
    teacher = torch.nn.Linear(30, 20, bias=False)
    optimizer = Adafactor(layer.parameters(), lr=0.05)
    x = torch.randn(256, 30)
    for _ in range(100):
        loss = (layer(x) - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = optimizer.state[layer.weight]
    assert state["row_var"].numel() + state["col_var"].numel() == 50  # for 600 weights
    assert loss < 0.01
"""

import math

import torch

# Passed by position: the order is that of adafactor_update's arguments.
HYPERPARAMETERS = "lr beta2_decay eps d weight_decay beta1 relative_step scale_parameter".split()


def rms(x):
    return torch.linalg.vector_norm(x) / math.sqrt(x.numel())


def adafactor_update(
    p, g, state, t, lr, beta2_decay, eps, d, weight_decay, beta1, relative_step, scale_parameter
) -> None:
    """One step, in place on `p` and the tensors in `state`.

    They are row_var (..., rows, 1) and col_var (..., 1, cols), for vectors `variance`, shaped as
    `p`, instead; and exp_avg, shaped as `p`, if beta1 is given.
    """
    eps1, eps2 = eps
    if eps1 is None:
        eps1 = torch.finfo(p.dtype).eps
    w = t**beta2_decay
    # One buffer `u` of p's size holds g², then √V, then U.
    u = g.square()
    if p.ndim >= 2:
        row = state["row_var"]
        col = state["col_var"]
        row.lerp_(u.mean(-1, keepdim=True), w)
        col.lerp_(u.mean(-2, keepdim=True), w)
        row_share = row / row.mean(-2, keepdim=True).clamp(min=eps1)
        # √V: the roots of a row and a column cost less than the roots of a matrix.
        torch.mul(row_share.sqrt(), col.sqrt(), out=u)
    else:
        torch.sqrt(state["variance"].lerp_(u, w), out=u)
    torch.div(g, u.clamp_(min=eps1), out=u)
    alpha = min(lr, 1 / math.sqrt(t)) if relative_step else lr
    # Before the decay: α follows the weights as they were.
    if scale_parameter:
        alpha = alpha * rms(p).clamp(min=eps2)
    factor = alpha / (rms(u) / d).clamp(min=1)
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    if beta1 is None:
        p.addcmul_(u, factor, value=-1)
    else:
        p.sub_(state["exp_avg"].lerp_(u.mul_(factor), 1 - beta1))


class Adafactor(torch.optim.Optimizer):
    """Raises ValueError for bad hyperparameters, RuntimeError for sparse or complex gradients.

    `eps[0]=None`: the machine epsilon of the dtype that a step computes in (float32 for half
    precision).
    """

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = False  # needs whole rows, whole columns and the RMS of the parameter
    zero_init: bool = False  # a step follows the weights' norm: zeros hardly leave 0
    heavy_step: bool = False  # cheap enough for every replica to repeat
    mup_rule: str | None = None  # no rule: a step follows the weights' size

    @staticmethod
    def state_numbers(shape: tuple[int, ...], *, beta1: float | None = None) -> int:
        """Numbers of state that a parameter of this shape takes."""
        n = math.prod(shape)
        second_moment = n
        if len(shape) > 1:
            second_moment = math.prod(shape[:-1]) + n // max(1, shape[-2])  # rows and columns
        first_moment = n if beta1 is not None else 0
        return second_moment + first_moment

    def __init__(
        self,
        params,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (1e-30, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        beta1: float | None = None,
        relative_step: bool = True,
        scale_parameter: bool = True,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "beta2_decay": beta2_decay,
                "eps": eps,
                "d": d,
                "weight_decay": weight_decay,
                "beta1": beta1,
                "relative_step": relative_step,
                "scale_parameter": scale_parameter,
            },
        )

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        eps1, eps2 = group["eps"]
        for name, x, end in (
            ("lr", group["lr"], "inf"),
            ("eps[0]", eps1 or 0, "inf"),
            ("eps[1]", eps2, "inf"),
            ("beta1", group["beta1"] or 0, 1),
            ("weight_decay", group["weight_decay"], "inf"),
        ):
            if not 0 <= x < float(end):
                raise ValueError(f"Adafactor: {name}={x} is not allowed; it must lie in [0, {end})")
        if not group["beta2_decay"] <= 0:
            raise ValueError(
                f"Adafactor: beta2_decay={group['beta2_decay']} is not allowed; it must be ≤ 0"
            )
        if not group["d"] > 0:
            raise ValueError(f"Adafactor: d={group['d']} is not allowed; it must be > 0")
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
                raise RuntimeError(
                    "Adafactor: gradients must be dense and real, not sparse or complex"
                )
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                # A float32 copy for half precision. For other dtypes .to() returns p itself.
                work = p.to(torch.promote_types(p.dtype, torch.float32))
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    if p.ndim >= 2:
                        state["row_var"] = work.new_zeros(*p.shape[:-1], 1)
                        state["col_var"] = work.new_zeros(*p.shape[:-2], 1, p.shape[-1])
                    else:
                        state["variance"] = torch.zeros_like(work)
                if group["beta1"] is not None and "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(work)
                # A state of torch.optim.Adafactor has `step` as a tensor.
                t = state["step"] = int(state["step"]) + 1
                options = [group[name] for name in HYPERPARAMETERS]
                adafactor_update(work, p.grad.to(work.dtype), state, t, *options)
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
                if theirs.get("maximize"):
                    raise ValueError(
                        f"Adafactor: the saved run had maximize={theirs['maximize']}, which this "
                        "one lacks; load it into the class that saved it"
                    )
                # What an older version did not save keeps this optimizer's value.
                theirs.update((name, x) for name, x in ours.items() if name not in theirs)
                for i, p in zip(theirs["params"], ours["params"]):
                    state = saved["state"].get(i)
                    if not state:
                        continue
                    moments = {"row_var", "col_var"} if p.ndim >= 2 else {"variance"}
                    if state.keys() - {"exp_avg"} != {"step", *moments}:
                        raise ValueError(
                            f"Adafactor: a saved state of {', '.join(state)} is another method's"
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
    start, target = torch.randn(2, 20, 30, dtype=torch.float64)
    x = start.clone().requires_grad_()
    y = start.clone().requires_grad_()
    ours = Adafactor([x], lr=0.05, eps=(None, 1e-3))
    theirs = torch.optim.Adafactor([y], lr=0.05)
    ours.param_groups[0]["weight_decay"] = theirs.param_groups[0]["weight_decay"] = 0.01
    for _ in range(300):
        for z, optimizer in (x, ours), (y, theirs):
            optimizer.zero_grad()
            (z - target).square().sum().backward()
            optimizer.step()
    kept = sum(s.numel() for s in ours.state[x].values() if torch.is_tensor(s))
    print(
        f"Adafactor: 300 steps, {(x - y).abs().max():.0e} from torch.optim.Adafactor; {kept}"
        f" numbers of state for {x.numel()} weights; {(x - target).square().mean().sqrt():.0e} RMS"
        " from the minimum"
    )
