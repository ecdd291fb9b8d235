"""AdamW: Adam with weight decay taken out of the gradient.

    p ← p·(1 − lr·λ)                                decoupled decay, before the step
    m ← β₁·m + (1−β₁)·g        m̂ = m / (1 − β₁ᵗ)    averages of g and g², freed of their start at 0
    v ← β₂·v + (1−β₂)·g²       v̂ = v / (1 − β₂ᵗ)
    p ← p − lr·m̂ / (√v̂ + ε)

    p `p`   g `g`   m `exp_avg`   v `exp_avg_sq`   t `step`, from 1
    β `betas`   ε `eps`   λ `weight_decay`

Loshchilov and Hutter 2019 (arXiv 1711.05101); Adam: Kingma and Ba 2015 (1412.6980). As in torch the
decay is lr·λ with the scheduled lr, not the paper's λ. Language models use betas (.9, .95) and λ =
.1; the defaults are torch's, as a drop-in. A tutorial says that Adam with L2 decays large
*weights* less: it is weights with large *gradients*. lr is in units of weight: an element moves by
about lr a step at most, whatever the gradient's scale. State: 8 bytes a parameter (16 for float64
parameters). Half-precision parameters keep float32 m and v.

Used wherever torch.optim.AdamW is: with torch's schedulers, GradScaler, autocast, compile, DDP,
fully_shard, torch.distributed.checkpoint. States of torch.optim.AdamW load; amsgrad and maximize
are refused. docs/partners.md has all partners.

`fused` steps all tensors in one kernel of torch's with the same formula: on a GPU one launch
instead of eight for each tensor, on a CPU half the time. None: for float32 parameters on either,
but for DTensors. Half-precision parameters would have float32 copies all at once. On a GPU that
kernel reads each `step` through a pointer to float32 on the same device, whatever the tensor's
dtype (torch's FusedAdamKernel.cu; its adam.py, 2.13, makes `step` so for fused and capturable, and
leaves it on the CPU otherwise). Here `step` is a number of Python's and the tensor is made anew, so
no state can be of the wrong kind: states of torch's class load with either. To compile the step
instead, with fused=False: torch compiles again for every new float, so hand the floats over as 0-D
tensors:
    fast = torch.compile(adamw_update, dynamic=True)
    adamw.adamw_update = lambda *args: fast(
        *(torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else x for x in args))

Example:
    import torch
    from optim.adamw import AdamW
    layer = torch.nn.Linear(4, 1)
    optimizer = AdamW(layer.parameters(), lr=0.03, weight_decay=0.0)
    x = torch.randn(64, 4)
    for _ in range(300):
        loss = (layer(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-6  # the layer has learned to add
"""

import math

import torch


def adamw_update(
    p, g, exp_avg, exp_avg_sq, bias1, root2, lr, beta1, beta2, eps, weight_decay
) -> None:
    """One step, in place on `p`, `exp_avg`, `exp_avg_sq`, all of one shape with `g`.

    bias1 = 1 − β₁ᵗ, root2 = √(1 − β₂ᵗ).
    """
    p.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    # √v̂ + ε, times root2: both bias corrections become one scalar factor in the last line.
    denominator = exp_avg_sq.sqrt().add_(eps * root2)
    p.sub_(torch.div(exp_avg, denominator, out=denominator).mul_(lr * root2 / bias1))


def fused_adamw_update(
    ps, gs, exp_avgs, exp_avg_sqs, t, lr, beta1, beta2, eps, weight_decay
) -> None:
    """The same for lists of tensors, all of one dtype and device and in their step t."""
    # The kernel wants a step for each tensor. It only reads them, so one tensor serves all. Filled
    # where it lies: torch.tensor() would copy it from the host, for which the host waits.
    steps = [torch.full((), float(t), dtype=torch.float32, device=ps[0].device)] * len(ps)
    torch._fused_adamw_(
        ps,
        gs,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=False,
        maximize=False,
    )


def is_fast(p) -> bool:
    """Does fused=None mean the kernel for this parameter?"""
    is_plain = not hasattr(p, "placements")  # no DTensor
    return p.dtype == torch.float32 and p.device.type in ("cpu", "cuda") and is_plain


class AdamW(torch.optim.Optimizer):
    """Raises ValueError for bad hyperparameters, RuntimeError for sparse or complex gradients."""

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = True  # a shard of a parameter can be stepped without seeing the rest
    zero_init: bool = False  # moves what lies before zeros by full steps along noise
    heavy_step: bool = False  # cheap enough for every replica to repeat
    mup_rule: str | None = "adam"  # entries of a step have one size, whatever the gradient's

    @staticmethod
    def state_numbers(shape: tuple[int, ...]) -> int:
        """Numbers of state that a parameter of this shape takes."""
        return 2 * math.prod(shape)

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool | None = None,
    ):
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused},
        )

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        beta1, beta2 = group["betas"]
        for name, x, end in (
            ("lr", group["lr"], "inf"),
            ("eps", group["eps"], "inf"),
            ("betas[0]", beta1, 1),
            ("betas[1]", beta2, 1),
            ("weight_decay", group["weight_decay"], "inf"),
        ):
            if not 0 <= x < float(end):
                raise ValueError(f"AdamW: {name}={x} is not allowed; it must lie in [0, {end})")
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
                raise RuntimeError("AdamW: gradients must be dense and real, not sparse or complex")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            hyperparameters = group["lr"], beta1, beta2, group["eps"], group["weight_decay"]
            fused = {}  # (t, dtype, device) -> what one kernel can step together
            for p in group["params"]:
                if p.grad is None:
                    continue
                # A float32 copy for half precision. For other dtypes .to() returns p itself.
                work = p.to(torch.promote_types(p.dtype, torch.float32))
                state = self.state[p]
                if not state:
                    state.update(
                        step=0, exp_avg=torch.zeros_like(work), exp_avg_sq=torch.zeros_like(work)
                    )
                # A state of torch.optim.AdamW has `step` as a tensor.
                t = state["step"] = int(state["step"]) + 1
                tensors = work, p.grad.to(work.dtype), state["exp_avg"], state["exp_avg_sq"]
                # The kernel ignores strides, so a transposed tensor takes the plain way.
                is_fused = is_fast(p) if group["fused"] is None else group["fused"]
                if is_fused and all(x.is_contiguous() for x in tensors):
                    fused.setdefault((t, work.dtype, p.device), []).append((p, *tensors))
                    continue
                adamw_update(*tensors, 1 - beta1**t, math.sqrt(1 - beta2**t), *hyperparameters)
                # Half precision is rounded once a step, here.
                if work is not p:
                    p.copy_(work)
            for (t, *_), rows in fused.items():
                ps, works, *others = map(list, zip(*rows))
                fused_adamw_update(works, *others, t, *hyperparameters)
                for p, work in zip(ps, works):
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
                for name in ("amsgrad", "maximize"):
                    if theirs.get(name):
                        raise ValueError(
                            f"AdamW: the saved run had {name}={theirs[name]}, which this one "
                            "lacks; load it into the class that saved it"
                        )
                # What an older version did not save keeps this optimizer's value.
                theirs.update((name, x) for name, x in ours.items() if name not in theirs)
                for i, p in zip(theirs["params"], ours["params"]):
                    state = saved["state"].get(i)
                    if not state:
                        continue
                    if state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                        raise ValueError(
                            f"AdamW: a saved state of {', '.join(state)} is another method's"
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
    start, target = torch.randn(2, 20, dtype=torch.float64)
    x = start.clone().requires_grad_()
    y = start.clone().requires_grad_()
    ours = AdamW([x], lr=0.03)
    theirs = torch.optim.AdamW([y], lr=0.03)
    for _ in range(300):
        for z, optimizer in (x, ours), (y, theirs):
            optimizer.zero_grad()
            (z - target).square().sum().backward()
            optimizer.step()
    print(
        f"AdamW: 300 steps, {(x - y).abs().max():.0e} from torch.optim.AdamW, "
        f"{(x - target).abs().max():.0e} from the minimum of the plain quadratic"
    )
