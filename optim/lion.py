"""Lion: the sign of an interpolated momentum. Every element moves by exactly lr.

    p ← p·(1 − lr·λ)                         decoupled decay, before the step
    p ← p − lr·sign(β₁·m + (1−β₁)·g)         m as it was before this gradient; sign(0) = 0
    m ← β₂·m + (1−β₂)·g                      the memory is longer than the step's view

    p `p`   g `g`   m `exp_avg`   β `betas`   λ `weight_decay`

Chen et al. 2023 (arXiv 2302.06675). A tutorial takes β₂ in the sign and updates m twice: β₁
belongs to the sign, β₂ to m, and m is updated once. lr is in units of weight, and since no element
ever moves less, lr should be 3–10 times smaller than AdamW's, λ 3–10 times larger (lr·λ stays).
State: 4 bytes a parameter (8 for float64 parameters), half of Adam's. Half-precision parameters
keep float32 m.

Used with torch's schedulers (OneCycleLR moves β₁), GradScaler, autocast, compile, DDP, fully_shard
and torch.distributed.checkpoint. docs/partners.md has all partners.

To compile the step: torch compiles again for every new float, so hand the floats over as 0-D
tensors:
    fast = torch.compile(lion_update, dynamic=True)
    lion.lion_update = lambda *args: fast(
        *(torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else x for x in args))

Example:
    import torch
    from optim.lion import Lion
    layer = torch.nn.Linear(4, 1)
    optimizer = Lion(layer.parameters(), lr=0.01)
    x = torch.randn(64, 4)
    for _ in range(100):
        before = layer.weight.detach().clone()
        loss = (layer(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = (layer.weight - before).abs()
    assert torch.allclose(moved, torch.tensor(0.01), atol=1e-6)  # each by lr, large or small
"""

import math

import torch


def lion_update(p, g, exp_avg, lr, beta1, beta2, weight_decay) -> None:
    """One step, in place on `p` and `exp_avg`, of one shape with `g`."""
    # Before m moves: in the sign this gradient weighs 1 − β₁, in m it weighs 1 − β₂.
    direction = exp_avg.lerp(g, 1 - beta1).sign_()
    p.mul_(1 - lr * weight_decay).sub_(direction, alpha=lr)
    exp_avg.lerp_(g, 1 - beta2)


class Lion(torch.optim.Optimizer):
    """Raises ValueError for bad hyperparameters, RuntimeError for sparse or complex gradients."""

    # Read by other parts of the library; optim/attributes.py says what each one decides.
    elementwise: bool = True  # a shard of a parameter can be stepped without seeing the rest
    zero_init: bool = False  # moves what lies before zeros by full steps along noise
    heavy_step: bool = False  # cheap enough for every replica to repeat
    mup_rule: str | None = "adam"  # entries of a step have one size, whatever the gradient's

    @staticmethod
    def state_numbers(shape: tuple[int, ...]) -> int:
        """Numbers of state that a parameter of this shape takes."""
        return math.prod(shape)

    def __init__(
        self,
        params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        beta1, beta2 = group["betas"]
        for name, x, end in (
            ("lr", group["lr"], "inf"),
            ("betas[0]", beta1, 1),
            ("betas[1]", beta2, 1),
            ("weight_decay", group["weight_decay"], "inf"),
        ):
            if not 0 <= x < float(end):
                raise ValueError(f"Lion: {name}={x} is not allowed; it must lie in [0, {end})")
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
                raise RuntimeError("Lion: gradients must be dense and real, not sparse or complex")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                # A float32 copy for half precision. For other dtypes .to() returns p itself.
                work = p.to(torch.promote_types(p.dtype, torch.float32))
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(work)
                lion_update(
                    work,
                    p.grad.to(work.dtype),
                    state["exp_avg"],
                    group["lr"],
                    *group["betas"],
                    group["weight_decay"],
                )
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
                # What an older version did not save keeps this optimizer's value.
                theirs.update((name, x) for name, x in ours.items() if name not in theirs)
                for i, p in zip(theirs["params"], ours["params"]):
                    state = saved["state"].get(i)
                    if not state:
                        continue
                    if state.keys() != {"exp_avg"}:
                        raise ValueError(
                            f"Lion: a saved state of {', '.join(state)} is another method's"
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
    x = torch.zeros(1, requires_grad=True)
    optimizer = Lion([x], lr=0.1)
    path = []
    # By hand: sign(.1), sign(.009-1), sign(-.0811), sign(-.0802791+.5)
    for gradient in 1.0, -10.0, 0.0, 5.0:
        x.grad = torch.tensor([gradient])
        optimizer.step()
        path.append(round(x.item(), 4))
    print(
        f"Lion: gradients 1, -10, 0, 5 move a weight from 0 to {path}, by hand [-0.1, 0.0, 0.1,"
        " 0.0]"
    )
    target = torch.randn(20)
    x = torch.zeros(20, requires_grad=True)
    optimizer = Lion([x])
    for t in range(300):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - t / 300)
        optimizer.zero_grad()
        (x - target).square().sum().backward()
        optimizer.step()
    print(
        f"Lion: {(x - target).abs().max():.0e} from a quadratic's minimum after 300 steps of"
        " falling lr"
    )
